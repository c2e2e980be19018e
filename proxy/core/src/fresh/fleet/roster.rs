//! What a member makes of the other rows of its table: whom to attach to, whom to put out, whose row may go, and how far it has come
//! itself.
//!
//! Who joins serves only when everybody in the table announces to it, and when those who died are proven to have nothing under way:
//! members that serve have kept their announcements in mind and pass them on; where there is none, the server processes
//! that a dead proxy may have left behind at work are waited for.
//!
//! Invariant: a row leaves the table only when nothing of that proxy's is under way that others do not know of. Non-goals: reading
//! the table, and what to say to others.

use std::collections::{BTreeMap, BTreeSet};

use super::silence::Silence;
use super::{Hearing, Standing, fence_us};

/// Another row of the table.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Row {
    pub id: u64,
    pub lease_us: u64,
    /// The epoch with which it joined.
    pub joined: u64,
    pub out: bool,
    /// The connection that keeps its row is there.
    pub keeps: bool,
    /// It has asked for its lease of late.
    pub lives: bool,
}

/// What binds this member to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tie {
    /// It is told of every write, over a connection that works.
    pub told: bool,
    /// It tells, for this joining of ours; did it serve then?
    pub attached: Option<bool>,
}

/// Pid, its start, start of its transaction.
pub type Process = (i32, Option<String>, Option<String>);

/// The next step to the removal of a dead member's row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Burial {
    /// Somebody else, or a later look.
    Later,
    /// First all who join hear what it had under way: [`Roster::passes_on`].
    PassOn,
    /// First the processes must have ended that it may have left at work: [`Roster::is_nothing_left`].
    Prove,
    Remove,
}

/// The other rows of the table, and what is being done about them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Roster {
    hearing: Hearing,
    /// Of this member.
    lease_us: u64,
    joined: u64,
    /// The newest one whose rows were read.
    epoch: u64,
    rows: Vec<Row>,
    /// Who was seen put out, and when that holds for sure.
    fences: BTreeMap<u64, u64>,
    /// Attempts to attach that are under way, and who was not reached by the last one.
    attempting: BTreeSet<u64>,
    failed: BTreeSet<u64>,
    /// Who has to hear of orphans before the row of their proxy goes, and the attempts that tell of them: those that began later.
    owed: BTreeSet<u64>,
    paying: BTreeSet<u64>,
    /// Processes at work when a dead proxy's fence was passed, by proxy.
    at_work: BTreeMap<u64, BTreeSet<Process>>,
    /// Where others push: who does not answer, and whom nothing can be heard of any more.
    silence: Silence,
    over: BTreeSet<u64>,
}

impl Roster {
    /// Of a member that has just joined with epoch `joined`.
    pub fn new(hearing: Hearing, lease_us: u64, joined: u64) -> Roster {
        Roster {
            hearing,
            lease_us,
            joined,
            epoch: 0,
            rows: Vec::new(),
            fences: BTreeMap::new(),
            attempting: BTreeSet::new(),
            failed: BTreeSet::new(),
            owed: BTreeSet::new(),
            paying: BTreeSet::new(),
            at_work: BTreeMap::new(),
            silence: Silence::default(),
            over: BTreeSet::new(),
        }
    }

    pub fn joined(&self) -> u64 {
        self.joined
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    fn pushes(&self) -> bool {
        self.hearing == Hearing::Pushed
    }

    // ---- looks at the table ----

    /// All were just asked to answer. `until_us`: when the question was asked that a member answered last.
    pub fn note_silence(&mut self, now_us: u64, until_us: impl Fn(u64) -> u64) {
        let answers = self.rows.iter().map(|row| (row.id, until_us(row.id))).collect();
        self.silence.note(now_us, self.lease_us / 4, answers);
    }

    /// The primary has answered with `epoch`: does the lease hold before the rows are read? Where others push, it must be known first
    /// of whose writes this member has to hear.
    pub fn is_lease_good_at(&self, epoch: u64) -> bool {
        epoch == self.epoch || !self.pushes()
    }

    /// Is there nothing to do until the epoch changes? `writers`: whose writes are kept in mind, some perhaps by a message that came
    /// when its sender's row was gone.
    pub fn is_settled(
        &self,
        epoch: u64,
        standing: Standing,
        writers: BTreeSet<u64>,
        tie: &dyn Fn(&Row) -> Tie,
    ) -> bool {
        let all_told = self.rows.iter().all(|row| {
            let heard = !self.pushes() || self.silence.is_heard(row.id);
            !row.out && tie(row).told && heard
        });
        let all_known = self.vanished(writers).is_empty();
        let as_before = epoch == self.epoch && all_told && all_known;
        as_before && standing == Standing::Serves && self.attempting.is_empty()
    }

    /// The rows of the others, read after `epoch` was.
    pub fn read(&mut self, epoch: u64, rows: Vec<Row>) {
        self.epoch = epoch;
        self.rows = rows;
    }

    // ---- attaching ----

    /// To whom an attempt to attach begins now.
    pub fn begin_attempts(&mut self, tie: &dyn Fn(&Row) -> Tie) -> Vec<u64> {
        let wanted = self.rows.iter().filter(|row| !row.out && (self.owed.contains(&row.id) || !tie(row).told));
        let begun: Vec<u64> = wanted.map(|row| row.id).filter(|id| !self.attempting.contains(id)).collect();
        self.attempting.extend(&begun);
        self.paying.extend(begun.iter().filter(|id| self.owed.contains(id)));
        begun
    }

    pub fn end_attempt(&mut self, id: u64, attached: bool) {
        self.attempting.remove(&id);
        let pays = self.paying.remove(&id);
        if attached {
            self.failed.remove(&id);
            if pays {
                self.owed.remove(&id);
            }
        } else {
            self.failed.insert(id);
        }
    }

    // ---- exclusion ----

    /// Who is to be put out: could not be reached again, and is dead, or a write waits for it (`deaf`), or this member cannot begin
    /// otherwise.
    pub fn gone(&self, standing: Standing, deaf: &BTreeSet<u64>, tie: &dyn Fn(&Row) -> Tie) -> Vec<u64> {
        let begins = standing < if self.pushes() { Standing::Writes } else { Standing::Serves };
        let is_gone = |row: &&Row| {
            let (failed, deaf) = (self.failed.contains(&row.id), deaf.contains(&row.id));
            let unreachable = failed && (begins || deaf);
            // It is connected, and yet it did not answer in time.
            let silent = deaf && tie(row).told;
            // Its process is gone, or it will join anew; what it had under way stays pending until then.
            let dead = failed && !row.keeps;
            // Whoever lives would only come back, and its writes would wait meanwhile.
            let unheard = self.pushes() && !row.lives && self.silence.is_long(row.id);
            !row.out && (unreachable || silent || dead || unheard)
        };
        self.rows.iter().filter(is_gone).map(|row| row.id).collect()
    }

    /// This member has put it out.
    pub fn put_out(&mut self, id: u64) {
        self.failed.remove(&id);
        self.rows.iter_mut().filter(|row| row.id == id).for_each(|row| row.out = true);
    }

    /// From one lease after its row says so, a member that is put out serves nothing, and need not be told.
    pub fn mark_fences(&mut self, now_us: u64) {
        for row in &self.rows {
            if row.out {
                self.fences.entry(row.id).or_insert(now_us + fence_us(row.lease_us));
            } else {
                // Whoever is back may die again, with other processes at work.
                self.fences.remove(&row.id);
                self.at_work.remove(&row.id);
            }
        }
    }

    fn is_fenced(&self, id: u64, now_us: u64) -> bool {
        self.fences.get(&id).is_some_and(|until_us| now_us >= *until_us)
    }

    /// Who may serve, and so must be told.
    pub fn to_tell(&self, now_us: u64) -> BTreeSet<u64> {
        self.rows.iter().map(|row| row.id).filter(|id| !self.is_fenced(*id, now_us)).collect()
    }

    /// Whose row is gone among `writers`: it left, or somebody has seen that it is dead.
    pub fn vanished(&self, writers: BTreeSet<u64>) -> Vec<u64> {
        writers.into_iter().filter(|id| self.rows.iter().all(|row| row.id != *id)).collect()
    }

    // ---- the dead ----

    /// Of whom nothing may be left, where others push.
    pub fn to_prove(&mut self, now_us: u64) -> Vec<u64> {
        self.over.retain(|id| self.rows.iter().any(|row| row.id == *id && row.out));
        let fenced = self.rows.iter().filter(|row| row.out && self.is_fenced(row.id, now_us)).map(|row| row.id);
        fenced.filter(|id| !self.over.contains(id)).collect()
    }

    /// Nothing is left of it that could be heard of.
    pub fn is_over(&mut self, id: u64) {
        self.over.insert(id);
    }

    /// Whom this member must hear, where others push.
    pub fn counted(&self) -> BTreeSet<u64> {
        self.rows.iter().map(|row| row.id).filter(|id| !self.over.contains(id)).collect()
    }

    /// Have all processes ended their transactions that were at work when a dead proxy was fenced, and may have been its? `now`: those
    /// at work now.
    pub fn is_nothing_left(&mut self, id: u64, now: &BTreeSet<Process>) -> bool {
        let then = self.at_work.entry(id).or_insert_with(|| now.clone());
        then.retain(|process| now.contains(process));
        then.is_empty()
    }

    /// Whose rows should go.
    pub fn dead(&self, now_us: u64) -> Vec<u64> {
        let dead = |row: &&Row| row.out && !row.keeps && self.is_fenced(row.id, now_us);
        self.rows.iter().filter(dead).map(|row| row.id).collect()
    }

    pub fn burial(&self, id: u64, standing: Standing, tie: &dyn Fn(&Row) -> Tie) -> Burial {
        // Who serves knows what the dead had under way.
        let serves = |row: &Row| !row.out && tie(row).attached == Some(true);
        match (self.pushes(), standing) {
            (true, _) if self.over.contains(&id) => Burial::Remove,
            (true, _) => Burial::Later,
            (false, Standing::Serves) => Burial::PassOn,
            (false, _) if self.rows.iter().any(serves) => Burial::Later,
            (false, _) => Burial::Prove,
        }
    }

    /// The dead had something under way (`any`) that is now kept in mind. Have all heard of that and of what was found before?
    pub fn passes_on(&mut self, any: bool) -> bool {
        if any {
            // An attempt that is under way may have begun without them.
            self.owed = self.rows.iter().filter(|row| !row.out).map(|row| row.id).collect();
            self.paying.clear();
        }
        self.owed.retain(|id| self.rows.iter().any(|row| row.id == *id && !row.out));
        self.owed.is_empty() && self.attempting.is_empty()
    }

    /// Its row is gone.
    pub fn buried(&mut self, id: u64) {
        self.rows.retain(|row| row.id != id);
        self.fences.remove(&id);
    }

    // ---- how far it has come ----

    /// A primary that was promoted `ago_us` may never have heard of a proxy that had joined at the last one, and may serve until its
    /// lease is over: nobody writes here before.
    pub fn has_outlived_others(&self, ago_us: u64) -> bool {
        let lease_us = self.rows.iter().map(|row| row.lease_us).fold(self.lease_us, u64::max);
        ago_us > fence_us(lease_us)
    }

    /// The higher standing that this member has reached. Before it serves, all that was read before is void: it may have been
    /// overwritten unheard.
    pub fn reached(&self, standing: Standing, now_us: u64, tie: &dyn Fn(&Row) -> Tie) -> Option<Standing> {
        let told = |row: &Row| if row.out { self.is_fenced(row.id, now_us) } else { tie(row).told };
        let heard = |row: &Row| !row.out && tie(row).attached.is_some();
        let may_serve = |row: &Row| self.over.contains(&row.id) || (told(row) && heard(row));
        if standing < Standing::Serves && self.attempting.is_empty() && self.rows.iter().all(may_serve) {
            return Some(Standing::Serves);
        }
        // Nobody waits for what is pushed, so it must be known from the first on who hears of it.
        let may_write = |row: &Row| told(row) && (!self.pushes() || row.out || heard(row));
        let writes = standing < Standing::Writes && self.rows.iter().all(may_write);
        writes.then_some(Standing::Writes)
    }

    /// For the model, in whose states it is always now: time passes by what was noted lying further back.
    #[cfg(test)]
    pub(super) fn age(&mut self, now_us: u64, by_us: u64) {
        for until_us in self.fences.values_mut() {
            *until_us = if *until_us <= now_us + by_us { 0 } else { *until_us - by_us };
        }
    }
}
