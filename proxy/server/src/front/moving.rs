//! Statements while slots are on their way from one shard to another.
//!
//! Invariant: between the announcement that the owner of slots is about to change and the change, no statement that touches such a
//! slot is sent, but for those of transactions that have written one: the mover waits for their end. A transaction with one snapshot
//! keeps the map of that snapshot, and by it writes nothing that has another owner since. Waits are bounded.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;
use weir_core::error::{Blame, UserError};
use weir_core::id::ShardId;
use weir_core::plan::{Access, Plan, Template, Values};
use weir_core::sql::class::Class;
use weir_core::sql::normal::Literal;
use weir_core::topology::moves::Apart;
use weir_core::topology::{Topology, Width};

use super::batch::{Batch, Op};
use super::names::{Portal, bind, bind_undrawn};
use super::session::{Held, Session};
use crate::database::View;
use crate::statements::{Prepared, Understood};

/// Definitions that may change what a row of a table is.
const REDEFINES: [&str; 6] = ["ALTER TABLE", "DROP TABLE", "ALTER TYPE", "DROP TYPE", "ALTER SCHEMA", "DROP SCHEMA"];
/// Longest wait for a shard to confirm the map.
const MAP_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the new owner.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// What a request has to do with slots that are on their way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Touch {
    Nothing,
    Moving,
    /// Their owner is about to change.
    Waiting,
    /// It draws from a sequence, and who counts is about to change.
    Drawing,
    /// Written by an older map, and they have another owner since.
    Gone,
}

impl Touch {
    /// `planned`: the plan of the template on a map.
    fn of(apart: &Apart, template: &Template, mut planned: impl FnMut(&Topology) -> Option<Plan>) -> Touch {
        let nobody = apart.nobody();
        if apart.draws_wait && template.filling().is_some() {
            return Touch::Drawing;
        }
        let Some(plan) = planned(&apart.moving) else {
            return match template.filling() {
                // Refused, whatever moves.
                None => Touch::Nothing,
                // Whose slot it is shows when its key is drawn.
                Some(_) if apart.waiting.is_some() => Touch::Waiting,
                Some(_) => Touch::Moving,
            };
        };
        if plan.changes_shared() && (apart.shared_waits || apart.shared_gone) {
            return if apart.shared_gone { Touch::Gone } else { Touch::Waiting };
        }
        // Which values a statement takes and gives up, and so whose slots they are, shows when it has run.
        let settles = plan.settles();
        if !settles && !plan.touches(nobody) {
            return Touch::Nothing;
        }
        let mut among = |topology: &Option<Topology>| topology.as_ref().and_then(&mut planned);
        if plan.access == Access::Write && among(&apart.gone).is_some_and(|plan| plan.touches(nobody)) {
            return Touch::Gone;
        }
        match among(&apart.waiting) {
            Some(plan) if settles || plan.touches(nobody) => Touch::Waiting,
            _ => Touch::Moving,
        }
    }
}

impl Session {
    /// The database's view, noted as the one that this request is planned by; or that of the transaction's snapshot.
    pub fn base_view(&self) -> Arc<View> {
        let base = self.view_in_force();
        match self.txn.as_ref().and_then(|txn| txn.map.as_ref()) {
            None => base,
            // It keeps the one it began by in any case.
            Some(_) if base.width == Width::One => base,
            // Its rows are those of then, so their owners are, too.
            Some(taken) if (base.version, base.topology.epoch) == (taken.version, taken.topology.epoch) => {
                Arc::clone(taken)
            }
            Some(taken) => Arc::new(kept(taken, &base)),
        }
    }

    /// The database's view, noted as the one that this request is planned by.
    pub fn view_in_force(&self) -> Arc<View> {
        let mut base = self.db.view_arc();
        if base.width == Width::One && self.db.hub.is_none() {
            return base;
        }
        if let Some((noted, _)) = self.stats.working_by() {
            return match self.db.alone_at(noted) {
                None => base,
                Some(alone) => Arc::new(kept_alone(alone, &base)),
            };
        }
        loop {
            let epoch = base.topology.epoch;
            self.stats.works_by(epoch);
            // Who put another into force in between may not have seen the note.
            base = self.db.view_arc();
            if base.topology.epoch == epoch {
                return base;
            }
        }
    }

    /// Did what is under way begin while there was one shard? Then it ends by that map, whatever is in force.
    pub fn began_alone(&self) -> bool {
        let noted = self.stats.working_by().filter(|_| self.db.hub.is_some());
        noted.is_some_and(|(epoch, _)| self.db.alone_at(epoch).is_some() || self.db.view().width == Width::One)
    }

    /// The view a statement is to be planned by, now that no slot it touches is about to change its owner.
    pub async fn view_to_plan(
        &mut self,
        understood: &Understood,
        sql: &str,
        literals: &[Literal],
    ) -> Result<Arc<View>, UserError> {
        loop {
            let (view, Some(apart)) = self.view_anew() else { return Ok(self.view()) };
            stays_as_defined(&understood.shape.class, &view)?;
            let touch = self.touch_of_text(&apart, understood, (sql, literals));
            if self.passes(touch, (&view, &apart)).await? {
                return Ok(view);
            }
        }
    }

    /// The same for several statements in one text.
    pub async fn view_to_plan_all(&mut self, texts: &[&str]) -> Result<Arc<View>, UserError> {
        loop {
            let (view, Some(apart)) = self.view_anew() else { return Ok(self.view()) };
            let mut touch = Touch::Nothing;
            for text in texts {
                let understood = self.db.statements.understand(text, &view, &mut self.scratch);
                stays_as_defined(&understood.shape.class, &view)?;
                touch = touch.max(self.touch_of_text(&apart, &understood, (text, &self.scratch.normal.literals)));
            }
            if self.passes(touch, (&view, &apart)).await? {
                return Ok(view);
            }
        }
    }

    fn touch_of_text(&self, apart: &Apart, understood: &Understood, (sql, literals): (&str, &[Literal])) -> Touch {
        let values = Values { params: &[], sql, literals };
        Touch::of(apart, &understood.template, |topology| self.db.plan_of(&understood.template, &values, topology).ok())
    }

    /// The view in force, and while slots move what tells them apart. What the request has done so far is over.
    fn view_anew(&self) -> (Arc<View>, Option<Arc<Apart>>) {
        if !self.began_alone() {
            self.stats.works_by_none();
        }
        let view = self.view();
        let apart = view.apart.clone();
        (view, apart)
    }

    /// The view a batch of the extended protocol is to be planned by.
    pub async fn view_of_batch(&mut self, batch: &Batch) -> Result<Arc<View>, UserError> {
        let view = self.view();
        match view.apart {
            None => Ok(view),
            // Boxed: rare.
            Some(_) => Box::pin(self.view_to_survey(batch)).await,
        }
    }

    async fn view_to_survey(&mut self, batch: &Batch) -> Result<Arc<View>, UserError> {
        loop {
            let (view, Some(apart)) = self.view_anew() else { return Ok(self.view()) };
            let mut parsed: SmallVec<[(Bytes, Arc<Prepared>); 2]> = SmallVec::new();
            let mut touch = Touch::Nothing;
            for op in &batch.ops {
                match op {
                    Op::Parse { name, sql, types } => parsed.push((name.clone(), self.prepare((sql, types), &view))),
                    Op::Bind { statement, body, .. } => {
                        let own = parsed.iter().rev().find(|(name, _)| name == statement);
                        let Some(prepared) = own
                            .map(|(_, prepared)| Arc::clone(prepared))
                            .or_else(|| self.current(statement, &view).ok())
                        else {
                            continue;
                        };
                        stays_as_defined(&prepared.shape.class, &view)?;
                        let (means, undrawn) = match prepared.template.filling() {
                            None => (Arc::clone(&prepared), 0),
                            Some(filling) => (self.filled_statement(&prepared, filling, &view), filling.drawings.len()),
                        };
                        touch = touch.max(Touch::of(&apart, &prepared.template, |topology| {
                            bind_undrawn(&self.db, &means, (body, undrawn), topology).ok()
                        }));
                    }
                    // A portal of before: its transaction has its shards already, see [`Session::still_owned`].
                    Op::Describe { .. } | Op::Execute { .. } | Op::Close { .. } => touch = touch.max(Touch::Moving),
                }
            }
            if self.passes(touch, (&view, &apart)).await? {
                return Ok(view);
            }
        }
    }

    /// Errors: by this view's map, which a snapshot may keep, the bound statement writes what has another owner since.
    pub fn not_gone(&self, prepared: &Prepared, body: &Bytes, view: &View) -> Result<(), UserError> {
        let Some(apart) = view.apart.as_ref().filter(|apart| apart.gone.is_some()) else { return Ok(()) };
        match Touch::of(apart, &prepared.template, |topology| bind(&self.db, prepared, body, topology).ok()) {
            Touch::Gone => Err(gone()),
            _ => Ok(()),
        }
    }

    /// Errors: a portal of before writes what has had another owner since it was bound.
    pub fn still_owned(&self, portal: &Portal, view: &View) -> Result<(), UserError> {
        if view.width == Width::One || portal.plan.access == Access::Read {
            return Ok(());
        }
        self.not_gone(&portal.prepared, &portal.bind, view)?;
        match bind(&self.db, &portal.prepared, &portal.bind, &view.topology) {
            Ok(now) if now.target != portal.plan.target => Err(gone()),
            _ => Ok(()),
        }
    }

    /// May it be planned by this view? Else another one is in force on return.
    async fn passes(&mut self, touch: Touch, (view, apart): (&View, &Apart)) -> Result<bool, UserError> {
        self.touches_moving = touch != Touch::Nothing;
        match touch {
            Touch::Nothing => {
                self.stats.stands_aside();
                Ok(true)
            }
            Touch::Moving => Ok(true),
            Touch::Waiting | Touch::Drawing => {
                let givers: SmallVec<[ShardId; 2]> = view.topology.moves.givers().collect();
                let is_awaited =
                    |held: &Held| held.wrote_moving && (apart.shared_waits || givers.contains(&held.shard));
                if touch == Touch::Waiting && self.held.iter().any(is_awaited) {
                    return Ok(true);
                }
                self.stats.works_by_none();
                let epoch = apart.epoch;
                if self.cancel.slot.unless_cancelled(async { Ok(self.db.maps.left(epoch, WAIT_MAX).await) }).await? {
                    Ok(false)
                } else {
                    Err(still_handed_over())
                }
            }
            Touch::Gone => Err(gone()),
        }
    }

    /// Waits for the shard to confirm the map in force.
    pub async fn await_map(&self, shard: ShardId) -> Result<(), UserError> {
        let shard = self.db.shard(shard);
        let wait = async { Ok(shard.map.covered(MAP_MAX).await) };
        if self.cancel.slot.unless_cancelled(wait).await? { Ok(()) } else { Err(map_not_confirmed(&shard.name)) }
    }

    /// From here on the transaction is planned by the map that its snapshot was taken by.
    pub fn keep_map(&mut self, view: &View) {
        if let Some(txn) = self.txn.as_mut().filter(|txn| txn.map.is_none()) {
            txn.map = Some(Arc::new(kept(view, view)));
        }
    }
}

/// The schema as it is now, the map as it was.
fn kept(map: &View, now: &View) -> View {
    let apart = Apart::since(&map.topology, &now.topology).map(Arc::new);
    View { topology: map.topology.clone(), apart, ..now.clone() }
}

/// The same for what began while there was one shard. Nothing moves until it has ended.
fn kept_alone(alone: &Topology, now: &View) -> View {
    // Templates are found by version, and these are for one shard.
    let version = now.version | 1 << 62;
    View { version, topology: alone.clone(), width: Width::One, apart: None, ..now.clone() }
}

/// What the mover has read of the tables must hold while rows of them are on their way.
fn stays_as_defined(class: &Class, view: &View) -> Result<(), UserError> {
    let Class::Ddl(ddl) = class else { return Ok(()) };
    if view.topology.moves.is_empty() || ddl.temporary || !REDEFINES.contains(&ddl.what) {
        return Ok(());
    }
    Err(UserError::new(Blame::Client, "55006", format!("{} has to wait while slots are on their way between shards", ddl.what))
        .detail("The rows that arrive must fit the tables as they were when they left.")
        .hint("Run it again when the move is over: SHOW MOVES tells how far it is. New tables and indexes may be made meanwhile."))
}

fn still_handed_over() -> UserError {
    UserError::new(Blame::Proxy, "55P03", "rows of this statement are being handed over to another shard")
        .detail(format!("The statement has waited for {} s.", WAIT_MAX.as_secs()))
        .hint("Run it again. SHOW MOVES tells how far the move is, and what it waits for.")
}

/// As Postgres says it of a row that somebody else has changed since.
fn gone() -> UserError {
    UserError::new(Blame::Client, "40001", "could not serialize access: rows of this key have moved to another shard")
        .detail("Their owner has changed since the transaction took its snapshot.")
        .hint("Run the transaction again.")
}

fn map_not_confirmed(shard: &str) -> UserError {
    UserError::new(Blame::Proxy, "08006", format!("shard {shard} has not confirmed which slots it owns"))
        .detail(format!(
            "This weir has not heard from its primary for {} s, or knows an older map than the shard and cannot reach the hub.",
            crate::database::lease::LEASE.as_secs()
        ))
        .hint("Run it again. SHOW REPLICAS tells how the servers are; the log tells whether the hub is out of reach.")
}
