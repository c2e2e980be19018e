//! Working a batch off one message at a time, when its parts belong on different shards or weir itself must answer some.
//!
//! Invariant: the replies are those that one server would have given, in message order; everything up to Sync still commits
//! or fails together.

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::id::ShardId;
use weir_core::plan::{Access, Plan, Values, Wrap};
use weir_core::session::replies::{Owed, Replies};
use weir_core::sql::class::Class;
use weir_wire::backend::{BIND_COMPLETE, CLOSE_COMPLETE, NO_DATA, NO_PARAMETERS, PARSE_COMPLETE, tag};
use weir_wire::frame;
use weir_wire::frontend::{self, Bind, Execute, Object, Target, is_binary, put_sync};
use weir_wire::row;

use super::batch::Ending;
use super::control::aborted;
use super::cursor::{asks_binary, binary_cursor};
use super::extended::{Step, Survey, ensure, spread_of};
use super::names::{Portal, Undo};
use super::session::{Failure, Session};
use super::simple::Place;
use crate::exec::fan::{Form, Question};
use crate::exec::open::Reader;
use crate::exec::relay::{Capture, Trail, columns_of};
use crate::hot::Given;
use crate::statements::Prepared;

impl Session {
    pub async fn stepwise(&mut self, survey: &mut Survey, ending: Ending) -> Result<(), Failure> {
        self.end_idle_pipeline().await?;
        if self.pipelining().is_some() {
            return Err(split_pipeline().into());
        }
        let writes = survey
            .steps
            .iter()
            .filter(|step| matches!(step, Step::Execute { portal, .. } if !matches!(portal.plan.access, Access::Read)));
        let executes = survey.steps.iter().filter(|step| matches!(step, Step::Execute { .. })).count();
        let controls = survey.steps.iter().any(
            |step| matches!(step, Step::Execute { portal, .. } if portal.prepared.shape.class.controls_transaction()),
        );
        let in_parts = survey
            .steps
            .iter()
            .any(|step| matches!(step, Step::Execute { portal, rows_max: 1.., .. } if portal.plan.merge.is_some()));
        let own = self.txn.is_none() && (executes > 1 && writes.count() > 0 || in_parts) && !controls;
        if own {
            self.begin_implicit();
        }
        self.copied_in = false;
        let mut result = self.steps(survey).await;
        if own {
            result = match result {
                Ok(()) => self.commit_all().await,
                Err(failure @ Failure::End(_)) => Err(failure),
                Err(failure) => self.roll_back_all().await.and(Err(failure)),
            };
        }
        match result {
            Ok(()) => {}
            Err(Failure::Reported) => self.skipping = ending == Ending::Flush,
            Err(failure) => return Err(failure),
        }
        if ending == Ending::Sync && !std::mem::take(&mut self.copied_in) {
            self.put_ready();
        }
        self.release();
        Ok(())
    }

    /// Drivers close what they have dropped at any time: no server is asked, or waited for, where none has anything to close.
    pub fn closes_here(&self, step: &Step) -> bool {
        match step {
            Step::CloseStatement { .. } => true,
            Step::ClosePortal { .. } => self.held.is_empty(),
            _ => false,
        }
    }

    async fn steps(&mut self, survey: &mut Survey) -> Result<(), Failure> {
        let steps = std::mem::take(&mut survey.steps);
        let mut bind_due = false;
        for (done, step) in steps.iter().enumerate() {
            // A Bind that is executed at once is answered by the server that binds it: it may refuse the values.
            let executed_next = matches!((step, steps.get(done + 1)), (Step::Bind { portal, .. }, Some(Step::Execute { name, .. })) if name == portal);
            let result = match (self.refuse_if_aborted(step), step) {
                (Err(failure), _) => Err(failure),
                (Ok(()), Step::Execute { name, portal, rows_max }) => {
                    let call = Call { name, portal, rows_max: *rows_max, bind_due: std::mem::take(&mut bind_due) };
                    self.execute(call).await
                }
                (Ok(()), Step::Bind { portal, bound, .. }) if executed_next => {
                    let closed = self.close_read(&Reader::Portal(portal.clone())).await;
                    self.names.bind(portal, bound.clone());
                    bind_due = true;
                    closed.map(|_| ())
                }
                (Ok(()), step) => self.step(step).await,
            };
            if let Err(failure) = result {
                self.undo_from(survey, &steps[done..]);
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Names defined by messages that were never reached, or failed, are taken back.
    fn undo_from(&mut self, survey: &mut Survey, unreached: &[Step]) {
        for step in unreached.iter().rev() {
            if let Step::Parse { op, .. } | Step::CloseStatement { op } | Step::ClosePortal { op, .. } = step
                && let Some(undo) = survey.undo.get_mut(*op as usize)
            {
                self.names.undo(std::mem::replace(undo, Undo::BackendUnnamed));
            }
        }
    }

    /// What a failed transaction does not accept (exec_parse_message and its neighbours in src/backend/tcop/postgres.c).
    fn refuse_if_aborted(&self, step: &Step) -> Result<(), Failure> {
        if !self.txn.as_ref().is_some_and(|txn| txn.failed) {
            return Ok(());
        }
        let prepared = match step {
            Step::Parse { prepared, .. } | Step::DescribeStatement { prepared, .. } => prepared,
            Step::Bind { bound: portal, .. } | Step::DescribePortal { portal, .. } => &portal.prepared,
            _ => return Ok(()),
        };
        if prepared.shape.class.ends_failed_transaction() { Ok(()) } else { Err(aborted().into()) }
    }

    /// Nothing of it needs a server to be described: no parameters, no rows.
    fn answers_itself(&self, class: &Class) -> bool {
        self.is_for_weir(class) && !on_server_state(class)
    }

    async fn step(&mut self, step: &Step) -> Result<(), Failure> {
        match step {
            Step::Parse { prepared, .. } => {
                if !self.answers_itself(&prepared.shape.class) {
                    self.describe_statement(prepared, false).await?;
                }
                self.client.out.extend_from_slice(PARSE_COMPLETE);
            }
            Step::Bind { portal, bound, .. } => {
                self.close_read(&Reader::Portal(portal.clone())).await?;
                self.names.bind(portal, bound.clone());
                self.client.out.extend_from_slice(BIND_COMPLETE);
            }
            Step::DescribeStatement { prepared, .. } if self.answers_itself(&prepared.shape.class) => {
                self.client.out.extend_from_slice(NO_PARAMETERS);
                self.client.out.extend_from_slice(NO_DATA);
            }
            Step::DescribeStatement { prepared, .. } if self.is_own_fetch(&prepared.shape.class) => {
                self.client.out.extend_from_slice(NO_PARAMETERS);
                self.put_cursor_description(&prepared.shape.class);
            }
            Step::DescribeStatement { name, prepared } => {
                let description = self.describe_statement(prepared, true).await?;
                self.names.described(name, columns_in(&description));
                self.client.out.extend_from_slice(&description);
            }
            Step::DescribePortal { portal, .. } => self.describe_portal(portal).await?,
            Step::Execute { name, portal, rows_max } => {
                self.execute(Call { name, portal, rows_max: *rows_max, bind_due: false }).await?;
            }
            Step::CloseStatement { .. } => self.client.out.extend_from_slice(CLOSE_COMPLETE),
            Step::ClosePortal { name, .. } => {
                self.close_read(&Reader::Portal(name.clone())).await?;
                self.names.close_portal(name);
                self.client.out.extend_from_slice(CLOSE_COMPLETE);
            }
            Step::Refuse(error) => return Err(error.clone().into()),
        }
        Ok(())
    }

    /// Has a server prepare the statement. Returns its ParameterDescription and RowDescription or NoData, for the client's
    /// eyes (`wanted`), with weir's own columns left out.
    pub async fn describe_statement(&mut self, prepared: &Prepared, wanted: bool) -> Result<BytesMut, Failure> {
        let shard = self.held.first().map_or(self.view().topology.home, |held| held.shard);
        self.describe_on(shard, prepared, wanted).await
    }

    /// The same on one certain shard.
    pub async fn describe_on(
        &mut self,
        shard: ShardId,
        prepared: &Prepared,
        wanted: bool,
    ) -> Result<BytesMut, Failure> {
        self.see(&prepared.sql, &prepared.shape.class).await?;
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        let lease = &mut self.held[index].lease;
        let mut undo = Vec::new();
        let name = ensure(lease, &Bytes::from_static(b"x"), prepared, &mut undo, &mut replies);
        if wanted {
            Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::DESCRIBE, &mut lease.out);
            replies.push(Owed::Describe);
        }
        put_sync(&mut lease.out);
        replies.push(Owed::Sync { hidden: true });
        self.captured(index, &mut replies, &mut undo).await
    }

    /// Runs what is owed and returns the visible frames; a server error goes to the client instead.
    pub async fn captured(
        &mut self,
        index: usize,
        replies: &mut Replies,
        undo: &mut [Undo],
    ) -> Result<BytesMut, Failure> {
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max: usize::MAX };
        let mut trail = Trail::default();
        self.relay_on(index, replies, &mut capture, &mut trail).await?;
        self.settle_hidden(index);
        let Capture::Hold { reply, .. } = capture else { return Ok(BytesMut::new()) };
        if trail.failed {
            self.undo(index, undo, &trail.undone);
            self.client.out.unsplit(reply);
            self.db.stats.server_error(&trail);
            return Err(Failure::Reported);
        }
        Ok(reply)
    }

    /// A hidden ReadyForQuery has ended the exchange: nothing is under way, and the transaction is as the server says.
    pub fn settle_hidden(&mut self, index: usize) {
        let lease = &mut self.held[index].lease;
        lease.busy = false;
        let status = lease.status;
        self.follow(index, status);
    }

    async fn describe_portal(&mut self, portal: &Portal) -> Result<(), Failure> {
        if self.answers_itself(&portal.prepared.shape.class) {
            self.client.out.extend_from_slice(NO_DATA);
            return Ok(());
        }
        if self.put_cursor_description(&portal.prepared.shape.class) {
            return Ok(());
        }
        let both = self.describe_statement(&portal.prepared, true).await?;
        let Ok(Some(first)) = frame::peek(&both, usize::MAX >> 1) else { return Ok(()) };
        let Ok(Some(second)) = frame::peek(&both[first.raw.len()..], usize::MAX >> 1) else { return Ok(()) };
        if second.tag != tag::ROW_DESCRIPTION {
            self.client.out.extend_from_slice(second.raw);
            return Ok(());
        }
        // The statement's description says nothing of the formats that Bind has chosen.
        let bind = Bind::read(&portal.bind).map_err(|_| super::session::malformed())?;
        let mut fields = row::fields(second.body).map_err(|_| super::session::malformed())?;
        for (column, field) in fields.iter_mut().enumerate() {
            field.binary = is_binary(bind.result_formats, column);
        }
        frame::put(&mut self.client.out, tag::ROW_DESCRIPTION, |out| row::put_fields(out, fields.into_iter()));
        Ok(())
    }

    async fn execute(&mut self, call: Call<'_>) -> Result<(), Failure> {
        let Call { portal, .. } = call;
        let prepared = &portal.prepared;
        let failed = self.txn.as_ref().is_some_and(|txn| txn.failed);
        if on_server_state(&prepared.shape.class) {
            if failed {
                return Err(aborted().into());
            }
            return self.execute_on_state(call).await;
        }
        if !failed && !prepared.shape.class.is_control() {
            self.see(&prepared.sql, &prepared.shape.class).await?;
        }
        let place = match portal.bound_on {
            _ if prepared.shape.class.is_control() => None,
            Some(shard) => Some(Place::One(shard)),
            None => Some(self.place(&self.view().topology, &portal.plan, || spread_of(&portal.bind))),
        };
        if let Some(place) = &place {
            // Again after the survey of the batch: the BEGIN of this snapshot may have been in it.
            let view = self.view();
            self.keep_snapshot(&portal.plan, place, &view)?;
        }
        // As a statement for several shards: its plan is told, or what it notes of globally unique columns is settled.
        let as_several = matches!(portal.plan.wrap, Wrap::Explain(_)) || portal.plan.settles();
        if let Some(Place::One(shard)) = place
            && !failed
            && !as_several
        {
            return self.execute_on(shard, call).await;
        }
        if call.bind_due {
            self.client.out.extend_from_slice(BIND_COMPLETE);
        }
        let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default().to_owned();
        if self.control(&sql, &prepared.shape.class).await? {
            return Ok(());
        }
        let several = match &place {
            Some(Place::One(shard)) if as_several => Some(vec![*shard]),
            Some(Place::Several(shards)) => Some(shards.clone()),
            _ => None,
        };
        if let Some(shards) = several {
            return self.execute_several(call, &shards).await;
        }
        if place == Some(Place::Engine) {
            return self.engine_portal((call.name, call.rows_max), portal, &portal.plan).await;
        }
        let shard = match place {
            Some(Place::One(shard)) => shard,
            // A control statement that the session leaves to the server.
            _ => match self.place(&self.view().topology, &portal.plan, || 0) {
                Place::One(shard) => shard,
                Place::Several(_) | Place::Engine => self.view().topology.home,
            },
        };
        self.execute_on(shard, Call { bind_due: false, ..call }).await
    }

    /// A statement about what only a server knows: a cursor, or what SQL PREPARE has made.
    async fn execute_on_state(&mut self, call: Call<'_>) -> Result<(), Failure> {
        let Call { portal, .. } = call;
        let prepared = &portal.prepared;
        if self.is_own_fetch(&prepared.shape.class) && asks_binary(&portal.bind) {
            return Err(binary_cursor().into());
        }
        let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default();
        let bind_due = call.bind_due && self.is_own_cursor(&prepared.shape.class);
        if bind_due {
            self.client.out.extend_from_slice(BIND_COMPLETE);
        }
        if self.use_cursor(sql, &prepared.shape.class, false).await? {
            return Ok(());
        }
        let prepares = matches!(prepared.shape.class, Class::Execute { .. });
        self.see(&prepared.sql, &Class::Other).await?;
        let shard = if prepares { self.pinned_or_home() } else { self.cursor_shard(&prepared.shape.class)? };
        let index = self.hold(shard).await?;
        self.note_write_of(index, &Dependencies::from_slice(&[Dependency::Anything]), true).await?;
        self.execute_on(shard, call).await
    }

    async fn execute_several(&mut self, call: Call<'_>, shards: &[ShardId]) -> Result<(), Failure> {
        let Call { name, portal, rows_max, .. } = call;
        for shard in shards {
            self.stats.sent_to(&portal.plan, *shard, Given::Bind(&portal.bind));
        }
        if self.has_open(&Reader::Portal(name.clone())) || rows_max > 0 && self.reads_in_parts(portal) {
            let reply = self.client.out.len();
            let done = self.execute_part(name, portal, rows_max, shards).await;
            return match self.second_try(done, reply, &portal.prepared.template)? {
                Some(plan) => self.engine_portal((name, rows_max), portal, &plan).await,
                None => Ok(()),
            };
        }
        let reads = portal.plan.merge.is_some() && portal.plan.wrap == Wrap::None;
        if reads && self.read_portals.contains(name) {
            self.put_tag("SELECT 0");
            return Ok(());
        }
        let prepared = &portal.prepared;
        let question = Question::Portal { prepared, bind: &portal.bind, merged: portal.plan.merge.is_some() };
        let form = Form { description: false, columns: prepared.template.merged_columns() };
        let reply = self.client.out.len();
        let asked = (question, question.sql(), &*prepared.template);
        let done = self.spread_guarded(shards, asked, &prepared.shape, &portal.plan, form).await;
        if let Some(plan) = self.second_try(done, reply, &prepared.template)? {
            return self.engine_portal((name, rows_max), portal, &plan).await;
        }
        if reads {
            self.read_portals.push(name.clone());
        }
        Ok(())
    }

    async fn execute_on(&mut self, shard: ShardId, call: Call<'_>) -> Result<(), Failure> {
        let Call { name, portal, rows_max, bind_due } = call;
        let prepared = &portal.prepared;
        self.stats.sent_to(&portal.plan, shard, Given::Bind(&portal.bind));
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        self.own_sequences(index, &prepared.shape, &mut replies);
        if !matches!(portal.plan.access, Access::Read) {
            self.note_notifier(index, &prepared.shape);
            self.note_write(index, &portal.plan, self.txn.is_none() || prepared.shape.class.commits_itself()).await?;
        }
        let lease = &mut self.held[index].lease;
        let mut undo = Vec::new();
        if portal.bound_on.is_none() {
            let statement = ensure(lease, &Bytes::from_static(b"x"), prepared, &mut undo, &mut replies);
            let bind = Bind::read(&portal.bind).map_err(|_| super::session::malformed())?;
            bind.put_for(statement.as_bytes(), &mut lease.out);
            replies.push(Owed::BindComplete { hidden: !bind_due });
        }
        Execute { portal: name, rows_max }.put(&mut lease.out);
        put_sync(&mut lease.out);
        replies.push(Owed::Execute);
        replies.push(Owed::Sync { hidden: true });
        let mut trail = Trail::default();
        self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
        self.settle_hidden(index);
        if self.txn.is_none() {
            self.announced.publish();
        }
        self.db.stats.server_error(&trail);
        self.pin_for(index, &prepared.shape);
        if trail.failed {
            self.undo(index, &mut undo, &trail.undone);
            return Err(Failure::Reported);
        }
        self.note_cursor(&prepared.shape.class, shard);
        if self.txn.is_some()
            && let Ok(kept) = self.names.portal(name)
        {
            kept.bound_on = Some(shard);
        }
        let shape = std::sync::Arc::clone(&prepared.shape);
        self.after(&shape).await;
        Ok(())
    }

    /// A simple query behind extended messages that no Sync has ended yet: on the server it runs in their transaction and
    /// ends it.
    pub async fn query_in_pipeline(&mut self, sql: &Bytes) -> Result<(), Failure> {
        let Some(index) = self.pipelining() else { return Ok(()) };
        let shard = self.held[index].shard;
        let view = self.view();
        let text = std::str::from_utf8(sql).unwrap_or_default();
        let known = self.db.statements.understand(text, &view, &mut self.scratch);
        let values = Values { params: &[], sql: text, literals: &self.scratch.normal.literals };
        let fits = known.template.bind(&values, &view.topology).is_ok_and(|plan| {
            match self.place(&view.topology, &plan, || 0) {
                Place::One(_) if plan.settles() => false,
                Place::One(place) => place == shard || plan.target == weir_core::plan::Target::Any,
                Place::Several(_) | Place::Engine => false,
            }
        });
        if !fits
            || known.template.filling().is_some()
            || known.shape.class.is_control()
            || text.trim_end_matches(';').contains(';')
        {
            return Err(split_pipeline().into());
        }
        let mut request = BytesMut::new();
        frame::put(&mut request, frontend::tag::QUERY, |out| frame::put_cstr(out, sql));
        let trail = self.run_raw(shard, &request, &[Dependency::Anything]).await?;
        self.pin_for(index, &known.shape);
        if trail.failed {
            return Err(Failure::Reported);
        }
        self.after(&known.shape).await;
        Ok(())
    }
}

/// One Execute message.
struct Call<'a> {
    name: &'a Bytes,
    portal: &'a Portal,
    rows_max: i32,
    /// Its Bind has not been answered yet.
    bind_due: bool,
}

/// May a statement for several shards return rows? A write only with RETURNING.
pub fn returns_rows(plan: &Plan, sql: &str) -> bool {
    const WORD: &[u8] = b"returning";
    plan.merge.is_some() || sql.as_bytes().windows(WORD.len()).any(|word| word.eq_ignore_ascii_case(WORD))
}

/// They return rows, and only the server knows which.
fn on_server_state(class: &Class) -> bool {
    matches!(class, Class::Fetch { .. } | Class::Move { .. } | Class::CloseCursor(_) | Class::Execute { .. })
}

/// The columns in what [`Session::describe_statement`] has returned.
pub fn columns_in(description: &[u8]) -> u64 {
    let mut rest = description;
    while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
        if next.tag == tag::ROW_DESCRIPTION {
            return columns_of(next.body);
        }
        rest = &rest[next.raw.len()..];
    }
    columns_of(&[])
}

pub fn split_pipeline() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "a pipeline cannot go on on another shard")
        .detail("Statements of this pipeline, flushed but not yet synced, run on one shard; the next one belongs on another.")
        .hint("Send Sync between them.")
}
