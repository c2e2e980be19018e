//! Working a batch off one message at a time, when its parts belong on different shards or weir itself must answer some.
//!
//! Invariant: the replies are those that one server would have given, in message order; everything up to Sync still commits
//! or fails together.

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::plan::Access;
use weir_core::session::replies::{Owed, Replies};
use weir_wire::backend::{BIND_COMPLETE, CLOSE_COMPLETE, NO_DATA, NO_PARAMETERS, PARSE_COMPLETE, tag};
use weir_wire::frame;
use weir_wire::frontend::{self, Bind, Execute, Object, Target, is_binary, put_sync};
use weir_wire::row;

use super::batch::Ending;
use super::extended::{Step, Survey, ensure, spread_of};
use super::names::Portal;
use super::session::{Failure, Session};
use super::simple::Place;
use crate::exec::fan::{Form, Question};
use crate::exec::relay::{Capture, Trail};
use crate::statements::Prepared;

impl Session {
    pub async fn stepwise(&mut self, survey: &mut Survey, ending: Ending) -> Result<(), Failure> {
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
        let own = self.txn.is_none() && executes > 1 && writes.count() > 0 && !controls;
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

    async fn steps(&mut self, survey: &mut Survey) -> Result<(), Failure> {
        let steps = std::mem::take(&mut survey.steps);
        for (done, step) in steps.iter().enumerate() {
            let result = self.step(step).await;
            if let Err(failure) = result {
                self.undo_from(survey, &steps[done..]);
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Names defined by messages that were never reached, or failed, are taken back.
    fn undo_from(&mut self, survey: &mut Survey, unreached: &[Step]) {
        for step in unreached {
            if let Step::Parse { op, .. } = step
                && let Some(super::names::Undo::Statement { name, before, .. }) = survey.undo.get_mut(*op as usize)
            {
                self.names.undo_statement(std::mem::take(name), before.take());
            }
        }
    }

    async fn step(&mut self, step: &Step) -> Result<(), Failure> {
        match step {
            Step::Parse { prepared, .. } => {
                if !self.is_for_weir(&prepared.shape.class) {
                    self.describe_statement(prepared, false).await?;
                }
                self.client.out.extend_from_slice(PARSE_COMPLETE);
            }
            Step::Bind { portal, bound, .. } => {
                self.names.bind(portal, bound.clone());
                self.client.out.extend_from_slice(BIND_COMPLETE);
            }
            Step::DescribeStatement { prepared, .. } if self.is_for_weir(&prepared.shape.class) => {
                self.client.out.extend_from_slice(NO_PARAMETERS);
                self.client.out.extend_from_slice(NO_DATA);
            }
            Step::DescribeStatement { prepared, .. } => {
                let description = self.describe_statement(prepared, true).await?;
                self.client.out.extend_from_slice(&description);
            }
            Step::DescribePortal { portal, .. } => self.describe_portal(portal).await?,
            Step::Execute { name, portal, rows_max } => self.execute(name, portal, *rows_max).await?,
            Step::CloseStatement { .. } => self.client.out.extend_from_slice(CLOSE_COMPLETE),
            Step::ClosePortal { name } => {
                self.names.close_portal(name);
                self.client.out.extend_from_slice(CLOSE_COMPLETE);
            }
            Step::Refuse(error) => return Err(error.clone().into()),
        }
        Ok(())
    }

    /// Has a server prepare the statement. Returns its ParameterDescription and RowDescription or NoData, for the client's
    /// eyes (`wanted`), with weir's own columns left out.
    async fn describe_statement(&mut self, prepared: &Prepared, wanted: bool) -> Result<BytesMut, Failure> {
        let shard = self.held.first().map_or(self.view().topology.home, |held| held.shard);
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
    async fn captured(
        &mut self,
        index: usize,
        replies: &mut Replies,
        undo: &mut [super::names::Undo],
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
    fn settle_hidden(&mut self, index: usize) {
        let lease = &mut self.held[index].lease;
        lease.busy = false;
        let status = lease.status;
        self.follow(index, status);
    }

    async fn describe_portal(&mut self, portal: &Portal) -> Result<(), Failure> {
        if self.is_for_weir(&portal.prepared.shape.class) {
            self.client.out.extend_from_slice(NO_DATA);
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

    async fn execute(&mut self, name: &Bytes, portal: &Portal, rows_max: i32) -> Result<(), Failure> {
        let prepared = &portal.prepared;
        let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default().to_owned();
        if self.control(&sql, &prepared.shape.class).await? {
            return Ok(());
        }
        let place = match portal.bound_on {
            Some(shard) => Place::One(shard),
            None => self.place(&portal.plan, || spread_of(&portal.bind)),
        };
        match place {
            Place::One(shard) => self.execute_on(shard, name, portal, rows_max).await,
            Place::Several(_) if rows_max != 0 => Err(partial_fetch().into()),
            Place::Several(shards) => {
                for shard in &shards {
                    self.stats.sent_to(&portal.plan, *shard);
                }
                let question = Question::Portal { prepared, bind: &portal.bind, merged: portal.plan.merge.is_some() };
                let form = Form { description: false, columns: prepared.template.merged_columns() };
                match &portal.plan.merge {
                    Some(spec) => self.merged_read(&shards, question, spec.clone(), form).await,
                    None => self.spread_write(&shards, question, &prepared.shape, &portal.plan, form).await,
                }
            }
        }
    }

    async fn execute_on(
        &mut self,
        shard: ShardId,
        name: &Bytes,
        portal: &Portal,
        rows_max: i32,
    ) -> Result<(), Failure> {
        let prepared = &portal.prepared;
        self.stats.sent_to(&portal.plan, shard);
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        if !matches!(portal.plan.access, Access::Read) {
            self.note_write(index, &portal.plan, self.txn.is_none() || prepared.shape.class.commits_itself())?;
        }
        let lease = &mut self.held[index].lease;
        let mut undo = Vec::new();
        if portal.bound_on.is_none() {
            let statement = ensure(lease, &Bytes::from_static(b"x"), prepared, &mut undo, &mut replies);
            let bind = Bind::read(&portal.bind).map_err(|_| super::session::malformed())?;
            bind.put_for(statement.as_bytes(), &mut lease.out);
            replies.push(Owed::BindComplete { hidden: true });
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
        if self.txn.is_some()
            && let Ok(kept) = self.names.portal(name)
        {
            kept.bound_on = Some(shard);
        }
        let shape = std::sync::Arc::clone(&prepared.shape);
        self.after(&shape).await;
        Ok(())
    }
}

fn split_pipeline() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "a pipeline cannot go on on another shard")
        .detail("Statements of this pipeline, flushed but not yet synced, run on one shard; the next one belongs on another.")
        .hint("Send Sync between them.")
}

fn partial_fetch() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "a portal over several shards cannot be fetched in parts",
    )
    .detail("Execute asked for a limited number of rows of a statement that reads several shards.")
    .hint("Turn the driver's fetch size off for this statement, or add LIMIT.")
}
