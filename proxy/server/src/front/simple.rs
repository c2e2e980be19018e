//! Simple queries: one text, of any number of statements, answered by one ReadyForQuery.
//!
//! A single statement goes where its plan says. Several statements go to one server as they are if they all belong there;
//! otherwise they run one by one inside a transaction that weir makes, so that they still commit or fail together.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use smallvec::SmallVec;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::id::ShardId;
use weir_core::plan::{Access, Plan, Target, Values, Wrap};
use weir_core::pool::Mode;
use weir_core::session::pin::Pin;
use weir_core::session::replies::{Owed, Replies};
use weir_core::sql::class::Class;
use weir_core::sql::lex::lex;
use weir_core::sql::normal::split_statements;
use weir_core::topology::{Topology, Width};
use weir_wire::backend::{EMPTY_QUERY, Status};

use super::session::{End, Failure, Session};
use super::stepwise::split_pipeline;
use super::transaction::Snapshot;
use crate::database::View;
use crate::exec::failures::no_common_snapshot;
use crate::exec::fan::Question;
use crate::exec::read::Asked;
use crate::exec::relay::{Capture, Flow, Trail};
use crate::hot::Given;
use crate::statements::Understood;

/// Longer texts are not looked into; they go to the home server whole, and only where nothing is sharded.
const TEXT_BYTES_MAX: usize = 1024 * 1024;

impl Session {
    pub async fn simple(&mut self, sql: Bytes) -> Result<(), End> {
        self.names.forget_unnamed();
        if self.pipelining().is_some()
            && let Err(failure) = Box::pin(self.end_idle_pipeline()).await
        {
            return self.conclude(Err(failure));
        }
        let result = match std::str::from_utf8(&sql) {
            _ if self.pipelining().is_some() => Box::pin(self.query_in_pipeline(&sql)).await,
            Ok(text) if text.len() <= TEXT_BYTES_MAX => self.text(text).await,
            _ => Box::pin(self.opaque(&sql)).await,
        };
        self.conclude(result)
    }

    pub async fn function_call(&mut self, frame: &Bytes) -> Result<(), End> {
        let home = self.view().topology.home;
        if let Err(failure) = self.see(b"", &Class::Select).await {
            return self.conclude(Err(failure));
        }
        let result = match self.pipelining() {
            Some(index) if self.held[index].shard != home => Err(split_pipeline().into()),
            _ => self.run_raw(home, frame, &[Dependency::Anything]).await,
        };
        self.conclude(result.map(|_| ()))
    }

    /// Sends one frame that ends in its own ReadyForQuery to `shard`, as it is.
    pub async fn run_raw(&mut self, shard: ShardId, frame: &[u8], writes: &[Dependency]) -> Result<Trail, Failure> {
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        if !writes.is_empty() {
            self.note_write_of(index, &Dependencies::from_slice(writes), true).await?;
        }
        self.held[index].lease.put_raw(frame);
        self.relay_query(index, replies).await
    }

    /// Relays the whole reply to a simple query that has just been written to a Backend.
    pub async fn relay_query(&mut self, index: usize, mut replies: Replies) -> Result<Trail, Failure> {
        replies.push(Owed::Query { hidden: false });
        let mut trail = Trail::default();
        let flow = self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
        self.announced.publish();
        if let Flow::Ready(status) = flow {
            self.follow(index, status);
        }
        self.db.stats.server_error(&trail);
        Ok(trail)
    }

    async fn text(&mut self, sql: &str) -> Result<(), Failure> {
        let view = self.view();
        if let Some(known) = self.db.statements.recall(sql, &view, &mut self.scratch) {
            return self.statement(sql, &known).await;
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.tokens.clear();
        let lexed = lex(sql, &mut scratch.tokens);
        let parts: SmallVec<[std::ops::Range<usize>; 2]> =
            if lexed.is_ok() { split_statements(sql, &scratch.tokens).collect() } else { SmallVec::new() };
        let single = lexed.is_err() || parts.len() == 1;
        if lexed.is_ok() && parts.is_empty() {
            self.scratch = scratch;
            self.client.out.extend_from_slice(EMPTY_QUERY);
            return Ok(());
        }
        if single {
            let understood = self.db.statements.understand_tokens(sql, &view, &mut scratch);
            self.db.statements.remember(sql, &view, &understood, &scratch);
            self.scratch = scratch;
            return self.statement(sql, &understood).await;
        }
        let texts: Vec<&str> = parts
            .iter()
            .map(|part| &sql[scratch.tokens[part.start].start as usize..scratch.tokens[part.end - 1].end as usize])
            .collect();
        self.scratch = scratch;
        Box::pin(self.several(sql, &texts)).await
    }

    /// A text weir cannot read (another encoding, or very long).
    async fn opaque(&mut self, sql: &[u8]) -> Result<(), Failure> {
        let view = self.view();
        if view.rules.any_sharded() && view.width == Width::Several {
            return Err(UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this text cannot be routed")
                .detail("It is longer than 1 MiB or not valid UTF-8, so its shard key cannot be read.")
                .hint("Use client_encoding UTF8, and parameters or COPY for large values.")
                .into());
        }
        self.see(sql, &Class::Other).await?;
        let mut frame = bytes::BytesMut::new();
        weir_wire::frame::put(&mut frame, b'Q', |out| weir_wire::frame::put_cstr(out, sql));
        let trail = self.run_raw(view.topology.home, &frame, &[Dependency::Anything]).await?;
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }

    /// Runs one statement and writes its whole reply but ReadyForQuery.
    pub async fn statement(&mut self, sql: &str, understood: &Understood) -> Result<(), Failure> {
        self.heed(understood.hint);
        let class = &understood.shape.class;
        let may_control = class.is_control() || self.txn.as_ref().is_some_and(|txn| txn.failed);
        if may_control && Box::pin(self.control(sql, class)).await? {
            return Ok(());
        }
        if let Some(filling) = understood.template.filling()
            && let Some((text, filled)) = Box::pin(self.filled_text(sql, filling)).await?
        {
            return Box::pin(self.statement(&text, &filled)).await;
        }
        self.see(sql.as_bytes(), class).await?;
        let mut view = self.view();
        let literals = std::mem::take(&mut self.scratch.normal.literals);
        let passed = match view.apart {
            None => Ok(()),
            // Boxed: rare.
            Some(_) => Box::pin(self.view_to_plan(understood, sql, &literals)).await.map(|passed| view = passed),
        };
        let values = Values { params: &[], sql, literals: &literals };
        let bound = passed.and_then(|()| self.db.plan_of(&understood.template, &values, &view.topology));
        self.scratch.normal.literals = literals;
        let plan = bound?;
        self.note_draws(&understood.shape, &plan);
        let place = self.place(&view.topology, &plan, || super::extended::spread_of(sql.as_bytes()));
        self.keep_snapshot(&plan, &place, &view)?;
        match place {
            Place::One(shard) if matches!(plan.wrap, Wrap::Explain(_)) => {
                self.stats.sent_to(&plan, shard, Given::Literals(sql, &self.scratch.normal.literals));
                Box::pin(self.spread_text(&[shard], sql, understood, &plan)).await
            }
            Place::One(shard) if plan.settles() => {
                self.stats.sent_to(&plan, shard, Given::Literals(sql, &self.scratch.normal.literals));
                let done = Box::pin(self.spread_text(&[shard], sql, understood, &plan)).await;
                if let Some(index) = self.held.iter().position(|held| held.shard == shard) {
                    self.note_notifier(index, &understood.shape);
                    self.pin_for(index, &understood.shape);
                }
                done
            }
            Place::One(shard) => self.single(shard, sql, understood, &plan).await,
            Place::Several(shards) => {
                for shard in &shards {
                    self.stats.sent_to(&plan, *shard, Given::Unknown);
                }
                let reply = self.client.out.len();
                let done = Box::pin(self.spread_text(&shards, sql, understood, &plan)).await;
                match self.second_try(done, reply, &understood.template)? {
                    Some(plan) => Box::pin(self.engine_text(sql, &understood.shape.class, &plan)).await,
                    None => Ok(()),
                }
            }
            Place::Engine => Box::pin(self.engine_text(sql, &understood.shape.class, &plan)).await,
        }
    }

    /// The shard whose snapshot the transaction sees, where it has but one.
    fn snapshot_on(&self) -> Option<ShardId> {
        match self.txn.as_ref()?.snapshot {
            Snapshot::OneShard(shard) => shard,
            _ => None,
        }
    }

    /// Which shards a plan means for this session now.
    /// `spread` chooses among shards that are all alike: the same one for the same question, so that caches stay warm.
    pub fn place(&self, topology: &Topology, plan: &Plan, spread: impl FnOnce() -> u64) -> Place {
        match &plan.target {
            Target::One(shard) => Place::One(*shard),
            Target::Home => Place::One(topology.home),
            Target::Any => Place::One(match self.snapshot_on().or(self.held.first().map(|held| held.shard)) {
                Some(shard) => shard,
                None => topology.roster.any(spread()).unwrap_or(topology.home),
            }),
            Target::Many(shards) if shards.len() == 1 => Place::One(shards[0]),
            Target::Many(shards) => Place::Several(shards.to_vec()),
            Target::Engine => Place::Engine,
            Target::All if topology.is_single() => Place::One(topology.home),
            Target::All => Place::Several(topology.active().to_vec()),
        }
    }

    /// A transaction with one snapshot for all of it stays on the shard that took it: another would show other moments.
    pub fn keep_snapshot(&mut self, plan: &Plan, place: &Place, view: &View) -> Result<(), UserError> {
        let Some(txn) = self.txn.as_mut().filter(|txn| txn.keeps_one_shard() && plan.reason.sees_rows()) else {
            return Ok(());
        };
        let Place::One(shard) = place else { return Err(no_common_snapshot()) };
        match txn.snapshot {
            Snapshot::OneShard(Some(taken)) if taken != *shard => return Err(no_common_snapshot()),
            _ => txn.snapshot = Snapshot::OneShard(Some(*shard)),
        }
        self.keep_map(view);
        Ok(())
    }

    async fn single(&mut self, shard: ShardId, sql: &str, understood: &Understood, plan: &Plan) -> Result<(), Failure> {
        if self.txn.is_none()
            && self.held.is_empty()
            && matches!(plan.access, Access::Read)
            && self.db.answers_elsewhere()
        {
            let (level, _) = self.level(understood.hint);
            let question = Question::Text(sql);
            let asked = Asked::simple(level, understood.hint);
            // Boxed, like what follows a plan for several shards: its room would be part of every session's task.
            if Box::pin(self.read_elsewhere(shard, question, plan, &understood.shape, &asked)).await? {
                return Ok(());
            }
        }
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        self.own_sequences(index, &understood.shape, &mut replies);
        if !matches!(plan.access, Access::Read) {
            self.leave_databases(&understood.shape, sql);
            self.note_notifier(index, &understood.shape);
            self.note_write(index, plan, self.txn.is_none() || understood.shape.class.commits_itself()).await?;
        }
        self.stats.sent_to(plan, shard, Given::Literals(sql, &self.scratch.normal.literals));
        self.held[index].lease.put_query(sql);
        let trail = self.relay_query(index, replies).await?;
        self.pin_for(index, &understood.shape);
        if trail.failed {
            return Err(Failure::Reported);
        }
        self.note_cursor(&understood.shape.class, shard);
        self.after(&understood.shape).await;
        Ok(())
    }

    /// Pins the session if the statement may have left something behind, whether it succeeded or not: an advisory lock
    /// outlives the error that follows it.
    pub fn pin_for(&mut self, index: usize, shape: &crate::statements::Shape) {
        match shape.pin() {
            Some(pin) => self.pin(index, pin),
            None if self.must_keep_draws(index, shape) => self.pin(index, Pin::SequenceState),
            None => {}
        }
    }

    /// May a later currval() or lastval() of this session ask for what the statement has drawn? Where nobody has ever asked, a
    /// nextval() by name keeps its connection only while there are plenty, and what a table draws by itself does not.
    fn must_keep_draws(&self, index: usize, shape: &crate::statements::Shape) -> bool {
        if self.db.asks_sequences.load(Relaxed) {
            return shape.draws();
        }
        shape.effects.draws && {
            let counts = self.held[index].lease.pool().counts();
            counts.busy * 2 <= counts.size
        }
    }

    /// Before currval() or lastval(): what another session has drawn on this connection is not for this one.
    pub fn own_sequences(&mut self, index: usize, shape: &crate::statements::Shape, replies: &mut Replies) {
        if !shape.effects.pins.contains(Pin::SequenceState) {
            return;
        }
        self.db.asks_sequences.store(true, Relaxed);
        let held = &mut self.held[index];
        let own = held.lease.drawn_by == self.cancel.process && self.drew_on == Some(held.lease.cancel_key.process);
        if !own && held.pinned.is_none() && held.lease.status != Status::Failed {
            held.lease.put_query("DISCARD SEQUENCES");
            replies.push(Owed::Query { hidden: true });
            held.lease.drawn_by = self.cancel.process;
            self.drew_on = Some(held.lease.cancel_key.process);
        }
    }

    /// Before a statement that drops or copies a database: weir's own idle connections must not stand in its way.
    pub fn leave_databases(&self, shape: &crate::statements::Shape, sql: &str) {
        if let Class::Ddl(ddl) = &shape.class
            && ddl.what.ends_with(" DATABASE")
        {
            let names = weir_core::sql::databases::to_be_left(sql);
            self.app.databases.let_go(names.iter().map(String::as_str));
        }
    }

    /// What a statement that has succeeded means for the session.
    pub async fn after(&mut self, shape: &Arc<crate::statements::Shape>) {
        if !shape.class.changes_schema() {
            return;
        }
        // Code may or may not change the schema; DDL does.
        let renews = matches!(shape.class, Class::Ddl(_) | Class::SelectInto);
        let made_keeper = matches!(shape.class, Class::Ddl(_)) && shape.pin().is_some();
        match &mut self.txn {
            Some(txn) => {
                txn.changed_schema = true;
                txn.made_keeper |= made_keeper;
                txn.renews |= renews;
                return;
            }
            None if renews => self.db.renew_statements(),
            None => {}
        }
        if made_keeper {
            self.db.refresh_catalog().await;
            Box::pin(crate::unique::catch_up(&self.db)).await;
        } else {
            Box::pin(self.db.schema_changed()).await;
        }
    }

    /// Several statements in one text.
    async fn several(&mut self, sql: &str, texts: &[&str]) -> Result<(), Failure> {
        let mut view = self.view();
        if view.apart.is_some() {
            view = self.view_to_plan_all(texts).await?;
        }
        let statement_mode = self.stats.mode() == Mode::Statement;
        let mut understood = Vec::with_capacity(texts.len());
        let mut shards = Vec::with_capacity(texts.len());
        let mut settles = false;
        for text in texts {
            let known = self.db.statements.understand(text, &view, &mut self.scratch);
            let values = Values { params: &[], sql: text, literals: &self.scratch.normal.literals };
            let plan = self.db.plan_of(&known.template, &values, &view.topology);
            let plan = plan.ok().filter(|_| known.template.filling().is_none());
            let place = plan.as_ref().map(|plan| self.place(&view.topology, plan, || 0));
            settles |= plan.as_ref().is_some_and(Plan::settles);
            if let (Some(plan), Some(place)) = (&plan, &place) {
                self.keep_snapshot(plan, place, &view)?;
            }
            shards.push(place);
            if statement_mode && known.shape.class.controls_transaction() {
                return Err(super::mode::no_transactions().into());
            }
            understood.push(known);
        }
        let in_block = self.txn.is_some() && !view.topology.is_single();
        let sets = |known: &Understood| matches!(known.shape.class, Class::SetTransaction(_));
        if in_block && (self.sees_all_shards() || understood.iter().any(sets)) {
            return self.one_by_one(texts, &understood, false).await;
        }
        let home = Some(Place::One(view.topology.home));
        let together = if view.topology.is_single() {
            Some(view.topology.home)
        } else {
            common_shard(&shards, &understood).filter(|_| !settles)
        };
        if !view.topology.is_single()
            && let Some(ends) = brackets(&understood)
            && !(ends && together.is_some())
        {
            return self.one_by_one(texts, &understood, false).await;
        }
        if let Some(shard) = together {
            return self.together(shard, sql, &understood).await;
        }
        let controls = understood.iter().any(|known| known.shape.class.controls_transaction());
        if controls && (settles || shards.iter().any(|place| *place != home)) {
            return Err(UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "transaction control inside a query of several statements")
                .detail("The statements belong to different shards, and the text also contains BEGIN, COMMIT, ROLLBACK or a savepoint.")
                .hint("Send BEGIN and COMMIT as queries of their own.")
                .into());
        }
        let own = self.txn.is_none();
        self.one_by_one(texts, &understood, own).await
    }

    /// All of it on one server, as Postgres would run it.
    async fn together(&mut self, shard: ShardId, sql: &str, understood: &[Understood]) -> Result<(), Failure> {
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        for known in understood {
            self.own_sequences(index, &known.shape, &mut replies);
        }
        if understood.iter().any(|known| known.template.is_write() || known.shape.class.controls_transaction()) {
            for known in understood {
                self.note_notifier(index, &known.shape);
            }
            self.note_write_of(index, &Dependencies::from_slice(&[Dependency::Anything]), true).await?;
        }
        let open = self.txn.is_some();
        self.held[index].lease.put_query(sql);
        let trail = self.relay_query(index, replies).await?;
        for known in understood {
            self.pin_for(index, &known.shape);
        }
        let classes: Vec<&Class> = understood.iter().map(|known| &known.shape.class).collect();
        if trail.failed {
            self.note_failed(index, &classes, open);
            return Err(Failure::Reported);
        }
        self.note_settings(index, &classes, open);
        let defaults = self.default_modes();
        if let Some(txn) = self.txn.as_mut().filter(|_| !open) {
            txn.note_text(&classes, defaults, shard);
        }
        if classes.iter().any(|class| matches!(class, Class::Deallocate(weir_core::sql::class::Target::All))) {
            self.names.forget_statements();
            self.held[index].lease.forget_all_prepared();
        }
        for known in understood {
            self.after(&known.shape).await;
        }
        Ok(())
    }

    /// `own`: in a transaction that weir makes for it.
    async fn one_by_one(&mut self, texts: &[&str], understood: &[Understood], own: bool) -> Result<(), Failure> {
        if own {
            self.begin_implicit();
        }
        for (text, known) in texts.iter().zip(understood) {
            // Fills the scratch with this statement's literals again.
            let fresh = self.db.statements.understand(text, &self.view(), &mut self.scratch);
            let known = if Arc::ptr_eq(&fresh.shape, &known.shape) { known } else { &fresh };
            if let Err(failure) = self.statement(text, known).await {
                if own && !matches!(failure, Failure::End(_)) {
                    self.roll_back_all().await?;
                }
                return Err(failure);
            }
        }
        if own { self.commit_all().await } else { Ok(()) }
    }
}

/// Where a plan runs.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    One(ShardId),
    Several(Vec<ShardId>),
    Engine,
}

/// Does the text open a transaction block with its first statement and control it no more, but for its end? Then it means the same
/// as its statements sent one by one. Some(true): the block ends with the text, and nothing of it is left to remember.
fn brackets(understood: &[Understood]) -> Option<bool> {
    let classes: Vec<&Class> = understood.iter().map(|known| &known.shape.class).collect();
    let (Class::Begin(_), [inner @ .., last]) = (classes.first()?, classes.get(1..)?) else { return None };
    let ends = matches!(last, Class::Commit { chain: false } | Class::Rollback { chain: false });
    let blocks = |class: &&Class| matches!(class, Class::Begin(_) | Class::Commit { .. } | Class::Rollback { .. });
    let plain = !inner.iter().any(blocks) && (ends || !blocks(last));
    plain.then_some(ends)
}

/// The one shard all statements belong to; statements that control the transaction or the session go anywhere.
fn common_shard(places: &[Option<Place>], understood: &[Understood]) -> Option<ShardId> {
    let mut common = None;
    for (place, known) in places.iter().zip(understood) {
        if known.shape.class.controls_transaction() || matches!(known.shape.class, Class::Set { .. }) {
            continue;
        }
        match place {
            Some(Place::One(shard)) if common.is_none_or(|common| common == *shard) => common = Some(*shard),
            _ => return None,
        }
    }
    common
}
