//! Extended-protocol batches: surveyed first, then relayed to one Backend as they are, or worked off step by step.
//!
//! Invariant: names change in message order, and what an error undoes is taken back; a statement reaches a Backend under
//! weir's own name for it, prepared there when needed, so that a client may find it again on any Backend.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::plan::{Access, Wrap};
use weir_core::session::pin::Pin;
use weir_core::session::replies::{Owed, Replies};
use weir_core::session::vars::Reading;
use weir_core::sql::class::Class;
use weir_core::topology::Width;
use weir_wire::backend::{CLOSE_COMPLETE, PARSE_COMPLETE};
use weir_wire::frontend::{self, Bind, Execute, Object, Parse, Target, put_flush, put_sync};

use super::batch::{Batch, Ending, Op};
use super::names::{Portal, Undo, bind};
use super::session::{End, Failure, Held, Session};
use super::simple::Place;
use crate::database::View;
use crate::exec::relay::{Capture, Flow, Trail};
use crate::hot::Given;
use crate::statements::{Prepared, Said};

/// One message with what it refers to.
pub enum Step {
    Parse {
        name: Bytes,
        prepared: Arc<Prepared>,
        op: u32,
    },
    Bind {
        portal: Bytes,
        statement: Bytes,
        bound: Portal,
    },
    DescribeStatement {
        name: Bytes,
        prepared: Arc<Prepared>,
    },
    DescribePortal {
        name: Bytes,
        portal: Portal,
    },
    Execute {
        name: Bytes,
        portal: Portal,
        rows_max: i32,
    },
    CloseStatement {
        op: u32,
    },
    ClosePortal {
        name: Bytes,
        op: u32,
    },
    /// The message cannot be carried out; nothing after it counts.
    Refuse(UserError),
}

/// A batch with all names resolved.
#[derive(Default)]
pub struct Survey {
    pub steps: Vec<Step>,
    pub undo: Vec<Undo>,
    /// Portals bound in this batch.
    bound: SmallVec<[(Bytes, Portal); 2]>,
    /// All steps belong on this one shard.
    shard: Option<ShardId>,
    /// They do not, or some step needs weir's own hand.
    stepwise: bool,
    /// Some step controls the transaction or changes a setting.
    controls: bool,
}

impl Survey {
    /// Longer lists are not kept for the next batch.
    const STEPS_KEPT_MAX: usize = 8;

    /// Does it bind or run anything?
    fn has_work(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Bind { .. } | Step::Execute { .. }))
    }

    fn clear(&mut self) {
        if self.steps.capacity() > Self::STEPS_KEPT_MAX || self.undo.capacity() > Self::STEPS_KEPT_MAX {
            *self = Survey::default();
            return;
        }
        self.steps.clear();
        self.undo.clear();
        self.bound.clear();
        self.shard = None;
        self.stepwise = false;
        self.controls = false;
    }
}

impl Session {
    pub async fn extended(&mut self, batch: &mut Batch) -> Result<(), End> {
        if batch.ops.is_empty() {
            return if batch.ending == Ending::Sync { self.sync_only().await } else { Ok(()) };
        }
        let ending = batch.ending;
        if let Err(failure) = self.check_columns(batch).await {
            batch.ops.clear();
            return self.give_up_batch(failure, ending);
        }
        let view = match self.view_of_batch(batch).await {
            Ok(view) => view,
            Err(error) => {
                batch.ops.clear();
                return self.give_up_batch(error.into(), ending);
            }
        };
        let mut survey = self.survey(batch, view).await;
        let result = if survey.stepwise {
            // Boxed, as other rare ways are: their room would be part of every session's task.
            Box::pin(self.stepwise(&mut survey, ending)).await
        } else {
            self.relay_batch(&mut survey, ending).await
        };
        survey.clear();
        self.spare_survey = survey;
        match result {
            Ok(()) | Err(Failure::Reported) => Ok(()),
            Err(Failure::Refused(error)) => {
                self.announced.publish();
                self.fail(&error);
                self.skipping = ending == Ending::Flush;
                if ending == Ending::Sync { self.sync_only().await } else { Ok(()) }
            }
            Err(Failure::End(end)) => Err(end),
        }
    }

    /// Sync with nothing before it: ends a pipeline if there is one.
    pub async fn sync_only(&mut self) -> Result<(), End> {
        if let Some(index) = self.pipelining() {
            self.pass_gate().await;
            let mut replies = Replies::default();
            put_sync(&mut self.held[index].lease.out);
            replies.push(Owed::Sync { hidden: false });
            let relayed = self.relay_on(index, &mut replies, &mut Capture::Off, &mut Trail::default()).await;
            match relayed {
                Ok(Flow::Ready(status)) => self.follow(index, status),
                Ok(_) => {}
                Err(Failure::End(end)) => return Err(end),
                Err(Failure::Refused(error)) => self.fail(&error),
                Err(Failure::Reported) => {}
            }
            self.announced.publish();
        }
        self.put_ready();
        self.release();
        Ok(())
    }

    async fn survey(&mut self, batch: &mut Batch, view: Arc<View>) -> Survey {
        let mut survey = std::mem::take(&mut self.spare_survey);
        survey.steps.reserve(batch.ops.len());
        let ending = batch.ending;
        let draws = view.width == Width::Several && !view.catalog.drawn.is_empty();
        for op in batch.ops.drain(..) {
            let op = match op {
                // Boxed: rare, and its room would be part of every session's task.
                Op::Bind { .. } if draws => Box::pin(self.filled_bind(op, &view)).await,
                op => Ok(op),
            };
            match op.and_then(|op| self.resolve(op, &view, &mut survey)) {
                Ok(step) => survey.steps.push(step),
                Err(error) => {
                    survey.steps.push(Step::Refuse(error));
                    survey.stepwise = true;
                    break;
                }
            }
        }
        let pipeline = self.pipelining().map(|index| self.held[index].shard);
        if survey.shard.is_none() {
            let held = self.held.first().map(|held| held.shard);
            survey.shard = pipeline.or(held).or(Some(view.topology.home));
        }
        survey.stepwise |= pipeline.is_some() && pipeline != survey.shard;
        // Weir's own error aborted the transaction and the server does not know: it must not go on there.
        survey.stepwise |= self.txn.as_ref().is_some_and(|txn| txn.failed) && !self.server_knows_failure();
        if survey.controls {
            // A lone BEGIN waits for a statement that needs a server. In a pipeline the one server keeps the order.
            let executes = survey.steps.iter().filter(|step| matches!(step, Step::Execute { .. })).count();
            let piped = executes > 1 || pipeline.is_some() || ending == Ending::Flush;
            survey.stepwise |= !(piped && self.is_single());
        }
        survey.stepwise |= pipeline.is_none() && survey.steps.iter().all(|step| self.closes_here(step));
        survey
    }

    /// A failed transaction takes no new statements, also none that weir would answer for because the server has it already.
    fn refuse_known_text(&self, prepared: &Prepared) -> Result<(), UserError> {
        let failed = self.txn.as_ref().is_some_and(|txn| txn.failed);
        if failed
            && !prepared.shape.class.ends_failed_transaction()
            && self
                .held
                .iter()
                .any(|held| held.lease.is_prepared(prepared.id) || held.lease.unnamed == Some(prepared.id))
        {
            return Err(super::control::aborted());
        }
        Ok(())
    }

    fn survey_class(&self, class: &Class, survey: &mut Survey) {
        if self.is_for_weir(class) {
            survey.controls = true;
            survey.stepwise |= !class.controls_server();
        }
    }

    fn resolve(&mut self, op: Op, view: &View, survey: &mut Survey) -> Result<Step, UserError> {
        Ok(match op {
            Op::Parse { name, sql, types } => {
                let prepared = self.prepare((&sql, &types), view);
                // A key declared as a type that is laid out differently would be misread in binary form.
                self.db.check_types(&prepared)?;
                self.refuse_known_text(&prepared)?;
                let op = survey.undo.len() as u32;
                survey.undo.push(self.names.define(&name, Arc::clone(&prepared))?);
                self.survey_class(&prepared.shape.class, survey);
                Step::Parse { name, prepared, op }
            }
            Op::Bind { portal, statement, body } => {
                let prepared = match self.filled.take() {
                    Some(filled) => filled,
                    None => self.current(&statement, view)?,
                };
                let plan = bind(&self.db, &prepared, &body, &view.topology)?;
                self.heed(prepared.hint);
                self.note_draws(&prepared.shape, &plan);
                self.survey_class(&prepared.shape.class, survey);
                let place = self.place(&view.topology, &plan, || spread_of(&body));
                self.keep_snapshot(&plan, &place, view)?;
                match place {
                    Place::One(shard) => {
                        let explains = matches!(plan.wrap, Wrap::Explain(_));
                        survey.stepwise |=
                            explains || plan.settles() || survey.shard.is_some_and(|already| already != shard);
                        survey.shard.get_or_insert(shard);
                    }
                    Place::Several(_) | Place::Engine => survey.stepwise = true,
                }
                let bound = Portal { prepared, bind: body, plan: Arc::new(plan), bound_on: None };
                survey.bound.retain(|(name, _)| *name != portal);
                survey.bound.push((portal.clone(), bound.clone()));
                Step::Bind { portal, statement, bound }
            }
            Op::Describe { object: Object::Statement, name } => {
                let prepared = self.current(&name, view)?;
                self.survey_class(&prepared.shape.class, survey);
                survey.stepwise |= prepared.template.hidden_columns() > 0;
                Step::DescribeStatement { name, prepared }
            }
            Op::Describe { object: Object::Portal, name } => {
                let portal = self.find_portal(&name, survey, view)?;
                Step::DescribePortal { name, portal }
            }
            Op::Execute { portal: name, rows_max } => {
                let portal = self.find_portal(&name, survey, view)?;
                Step::Execute { name, portal, rows_max }
            }
            Op::Close { object: Object::Statement, name } => {
                let op = survey.undo.len() as u32;
                survey.undo.push(self.names.close_statement(&name).1);
                Step::CloseStatement { op }
            }
            Op::Close { object: Object::Portal, name } => {
                let op = survey.undo.len() as u32;
                survey.bound.retain(|(bound, _)| *bound != name);
                survey.undo.push(self.names.close_portal(&name));
                Step::ClosePortal { name, op }
            }
        })
    }

    /// What is known of a statement's text and types, as this session means them now.
    pub fn prepare(&mut self, (sql, types): (&Bytes, &Bytes), view: &View) -> Arc<Prepared> {
        let reading = self.reading();
        self.db.statements.prepare(Said { sql, types, reading }, view, &mut self.scratch)
    }

    /// How this session's texts are read. What has been set out of sight is known to nobody else.
    fn reading(&self) -> Reading {
        let followed = |pin: Pin| {
            !matches!(pin, Pin::SetConfig | Pin::Function | Pin::Unparsed | Pin::SetInsideUncertainTransaction)
        };
        if self.held.iter().filter_map(|held| held.pinned).all(followed) {
            self.vars.current().reading()
        } else {
            Reading::own(self.cancel.process as u32)
        }
    }

    /// What a name stands for, learnt anew if the schema has changed since, or the settings that its text is read by.
    pub fn current(&mut self, name: &Bytes, view: &View) -> Result<Arc<Prepared>, UserError> {
        let known = self.names.statement(name)?;
        let same = known.prepared.view_version == view.version;
        if same && known.prepared.reading == self.reading() || self.server_checks(known) {
            return Ok(Arc::clone(&known.prepared));
        }
        // Also if the view is yet another one by now: what was found of the last one has not been looked at again.
        if !same && known.changed_in.is_some() {
            return Err(super::described::changed());
        }
        let prepared = Arc::clone(&known.prepared);
        let fresh = self.prepare((&prepared.sql, &prepared.types), view);
        self.names.refresh(name, Arc::clone(&fresh));
        Ok(fresh)
    }

    /// A portal of this batch or an earlier one; one that a server knows already fixes the shard.
    fn find_portal(&mut self, name: &Bytes, survey: &mut Survey, view: &View) -> Result<Portal, UserError> {
        if let Some((_, portal)) = survey.bound.iter().find(|(bound, _)| bound == name) {
            return Ok(portal.clone());
        }
        let portal = match self.names.portal(name) {
            Ok(portal) => portal.clone(),
            Err(missing) => self.portal_of_server(name, view).ok_or(missing)?,
        };
        self.still_owned(&portal, view)?;
        match portal.bound_on {
            Some(shard) => {
                survey.stepwise |= survey.shard.is_some_and(|already| already != shard);
                survey.shard.get_or_insert(shard);
            }
            None => survey.stepwise = true,
        }
        Ok(portal)
    }

    async fn relay_batch(&mut self, survey: &mut Survey, ending: Ending) -> Result<(), Failure> {
        let shard = survey.shard.unwrap_or_else(|| self.view().topology.home);
        if let Some(asked) = self.lone_read(survey, ending) {
            match self.read_batch(shard, survey, &asked).await {
                Ok(false) => {}
                Ok(true) | Err(Failure::Reported) => {
                    self.put_ready();
                    self.release();
                    return Ok(());
                }
                Err(failure) => return Err(failure),
            }
        }
        self.before_batch(survey, ending).await?;
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        if !self.held[index].lease.busy {
            self.prime(index, &mut replies);
            for step in &survey.steps {
                if let Step::Execute { portal, .. } = step {
                    self.own_sequences(index, &portal.prepared.shape, &mut replies);
                }
            }
        }
        self.put_steps(index, survey, &mut replies).await?;
        if ending == Ending::Sync {
            put_sync(&mut self.held[index].lease.out);
            replies.push(Owed::Sync { hidden: false });
        } else {
            put_flush(&mut self.held[index].lease.out);
            self.held[index].piped |= survey.has_work();
        }
        let mut trail = Trail::default();
        let open = self.txn.is_some();
        let flow = self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
        self.db.stats.server_error(&trail);
        self.note_columns(&survey.steps, &trail.described);
        if survey.controls {
            self.note_controls(index, survey, open, trail.failed);
        }
        for step in &survey.steps {
            if let Step::Execute { portal, .. } = step {
                self.pin_for(index, &portal.prepared.shape);
            }
        }
        if trail.failed {
            self.undo(index, &mut survey.undo, &trail.undone);
        } else {
            for step in &survey.steps {
                if let Step::Execute { portal, .. } = step {
                    self.after(&portal.prepared.shape).await;
                }
            }
        }
        match flow {
            Flow::Ready(status) => {
                self.announced.publish();
                self.follow(index, status);
                self.keep_portals(survey, shard);
                self.put_ready();
                self.release();
            }
            Flow::Drained | Flow::Overflow => {
                self.keep_portals(survey, shard);
                self.skipping = trail.failed;
            }
        }
        Ok(())
    }

    /// What the control statements of a relayed batch mean for the session.
    fn note_controls(&mut self, index: usize, survey: &Survey, open: bool, failed: bool) {
        let executed = survey.steps.iter().filter_map(|step| match step {
            Step::Execute { portal, .. } => Some(&portal.prepared.shape.class),
            _ => None,
        });
        let classes: Vec<&Class> = executed.collect();
        if failed {
            self.note_failed(index, &classes, open);
        } else {
            self.note_settings(index, &classes, open);
        }
    }

    /// Portals outlive the batch inside a transaction or an unfinished pipeline.
    fn keep_portals(&mut self, survey: &mut Survey, shard: ShardId) {
        if self.txn.is_none() && self.pipelining().is_none() {
            return;
        }
        for (name, portal) in survey.bound.drain(..) {
            self.names.bind(&name, Portal { bound_on: Some(shard), ..portal });
        }
    }

    /// Notes, and announces where it is time to, what the steps write.
    async fn note_steps(&mut self, index: usize, survey: &Survey) -> Result<(), Failure> {
        let autocommit = self.txn.is_none();
        for step in &survey.steps {
            if let Step::Execute { portal, .. } = step
                && !matches!(portal.plan.access, Access::Read)
            {
                let sql = std::str::from_utf8(&portal.prepared.sql).unwrap_or_default();
                self.leave_databases(&portal.prepared.shape, sql);
                self.note_notifier(index, &portal.prepared.shape);
                self.note_write(index, &portal.plan, autocommit || portal.prepared.shape.class.commits_itself())
                    .await?;
            }
        }
        Ok(())
    }

    /// Writes the steps to a Backend and what they owe to `replies`.
    async fn put_steps(&mut self, index: usize, survey: &mut Survey, replies: &mut Replies) -> Result<(), Failure> {
        self.note_steps(index, survey).await?;
        // What was prepared before this transaction changed the schema may mean what no longer exists.
        let anew = self.txn.as_ref().is_some_and(|txn| txn.renews);
        let Held { lease, shard, .. } = &mut self.held[index];
        let shard = *shard;
        for step in &survey.steps {
            match step {
                Step::Parse { name, prepared, op } => {
                    self.stats.parse();
                    if anew {
                        forget(lease, prepared.id, replies);
                    }
                    put_parse(lease, name, prepared, *op, &mut survey.undo, replies);
                }
                Step::Bind { statement, bound, .. } => {
                    self.stats.bind();
                    let name = ensure(lease, statement, &bound.prepared, &mut survey.undo, replies);
                    let bind = Bind::read(&bound.bind).map_err(|_| super::session::malformed())?;
                    bind.put_for(name.as_bytes(), &mut lease.out);
                    replies.push(Owed::BindComplete { hidden: false });
                }
                Step::DescribeStatement { name, prepared } => {
                    let name = ensure(lease, name, prepared, &mut survey.undo, replies);
                    Target { object: Object::Statement, name: name.as_bytes() }
                        .put(frontend::tag::DESCRIBE, &mut lease.out);
                    replies.push(Owed::DescribeStatement);
                }
                Step::DescribePortal { name, .. } => {
                    Target { object: Object::Portal, name }.put(frontend::tag::DESCRIBE, &mut lease.out);
                    replies.push(Owed::Describe);
                }
                Step::Execute { name, rows_max, portal } => {
                    self.stats.sent_to(&portal.plan, shard, Given::Bind(&portal.bind));
                    Execute { portal: name, rows_max: *rows_max }.put(&mut lease.out);
                    replies.push(Owed::Execute);
                }
                Step::CloseStatement { op } => {
                    replies.push(Owed::Own { bytes: CLOSE_COMPLETE, op: *op });
                }
                Step::ClosePortal { name, op } => {
                    Target { object: Object::Portal, name }.put(frontend::tag::CLOSE, &mut lease.out);
                    replies.push(Owed::Close { hidden: false, op: *op });
                }
                Step::Refuse(error) => return Err(error.clone().into()),
            }
        }
        Ok(())
    }
}

type Lease = crate::back::pool::Lease;

fn put_parse(
    lease: &mut Lease,
    name: &Bytes,
    prepared: &Prepared,
    op: u32,
    undo: &mut Vec<Undo>,
    replies: &mut Replies,
) {
    let known = if name.is_empty() { lease.unnamed == Some(prepared.id) } else { lease.is_prepared(prepared.id) };
    if known {
        replies.push(Owed::Own { bytes: PARSE_COMPLETE, op });
        return;
    }
    prepare_on(lease, name.is_empty(), prepared, undo, replies);
    // One error takes both back: the client's name, and the note that the Backend has it.
    if let Some(Undo::Statement { backend, .. }) = undo.get_mut(op as usize) {
        *backend = (!name.is_empty()).then_some(prepared.id);
    }
    replies.push(Owed::Parse { hidden: false, op });
}

/// Has the Backend forget a statement, so that it is prepared again.
fn forget(lease: &mut Lease, id: u64, replies: &mut Replies) {
    if lease.is_prepared(id) {
        let name = Prepared::backend_name(id);
        Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::CLOSE, &mut lease.out);
        replies.push(Owed::Close { hidden: true, op: u32::MAX });
        lease.forget_prepared(id);
    }
    lease.unnamed = None;
}

/// Makes sure the Backend knows the statement; returns the name it has there.
pub fn ensure(
    lease: &mut Lease,
    name: &Bytes,
    prepared: &Prepared,
    undo: &mut Vec<Undo>,
    replies: &mut Replies,
) -> String {
    let unnamed = name.is_empty();
    let known = if unnamed { lease.unnamed == Some(prepared.id) } else { lease.is_prepared(prepared.id) };
    if !known {
        let op = prepare_on(lease, unnamed, prepared, undo, replies);
        replies.push(Owed::Parse { hidden: true, op });
    }
    if unnamed { String::new() } else { Prepared::backend_name(prepared.id) }
}

/// Sends Parse; returns the op that undoes the note of it.
fn prepare_on(
    lease: &mut Lease,
    unnamed: bool,
    prepared: &Prepared,
    undo: &mut Vec<Undo>,
    replies: &mut Replies,
) -> u32 {
    let op = undo.len() as u32;
    if unnamed {
        lease.unnamed = Some(prepared.id);
        undo.push(Undo::BackendUnnamed);
        Parse { name: b"", sql: &prepared.sql, types: &prepared.types }.put(&mut lease.out);
        return op;
    }
    if let Some(oldest) = lease.note_prepared(prepared.id) {
        let name = Prepared::backend_name(oldest);
        Target { object: Object::Statement, name: name.as_bytes() }.put(frontend::tag::CLOSE, &mut lease.out);
        replies.push(Owed::Close { hidden: true, op: u32::MAX });
    }
    undo.push(Undo::BackendPrepared { id: prepared.id });
    let name = Prepared::backend_name(prepared.id);
    Parse { name: name.as_bytes(), sql: &prepared.sql, types: &prepared.types }.put(&mut lease.out);
    op
}

/// Which of several equal shards a read goes to: the same one for the same question, so that caches stay warm.
pub fn spread_of(body: &[u8]) -> u64 {
    use std::hash::BuildHasher;
    foldhash::fast::FixedState::with_seed(1).hash_one(body)
}
