//! What other members have told one: who attached, and their writes that are under way.
//!
//! Invariant: an announcement counts only on the connection on which its member attached last; what comes late on an older one may be
//! over by now. Whoever attaches names all that is under way, so whatever it does not name has ended.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use weir_wire::peer::Write;

/// Writes of others that are kept in mind.
const WRITES_MAX: usize = 1 << 20;

/// What others have told. `W` is what is kept of a write: its words are pending as long as it is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Heard<W> {
    attached: BTreeMap<u64, Attached>,
    /// By the member that makes them, and token.
    writes: BTreeMap<(u64, u64), W>,
    /// Who may have written what is still to be heard of, where others push.
    counted: BTreeSet<u64>,
}

/// Somebody who tells.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Attached {
    connection: u64,
    /// The epoch of our joining that it knew.
    joined: u64,
    /// It answered from its cache then.
    serves: bool,
    /// All that it had announced by then is heard of, where it pushes.
    until_us: u64,
}

/// What somebody says who attaches.
#[derive(Clone, Copy, Debug)]
pub struct Attach<'a> {
    pub from: u64,
    pub joined: u64,
    pub serves: bool,
    /// It has never written before.
    pub complete: bool,
    pub writes: &'a [Write],
    /// Writes of the dead that it keeps in mind.
    pub orphans: &'a [Write],
}

/// What follows when somebody has attached.
#[derive(Debug)]
#[must_use = "words stay pending until what has ended is lowered"]
pub struct Taken<W> {
    /// Writes of its that are over: acknowledged, or taken back.
    pub ended: Vec<W>,
    /// Writes of the dead, which end with their server processes.
    pub orphans: Vec<W>,
    /// All of it is kept in mind, and it is heard from now on.
    pub whole: bool,
}

/// Why an announcement is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unheard {
    /// Who announces has not attached on that connection, or not last.
    Unattached,
    NoRoom,
}

impl<W> Default for Heard<W> {
    fn default() -> Self {
        Heard { attached: BTreeMap::new(), writes: BTreeMap::new(), counted: BTreeSet::new() }
    }
}

impl<W> Heard<W> {
    /// A write is announced on `connection`; `begin` raises its words, unless that was done before.
    pub fn announce(
        &mut self,
        (from, connection): (u64, u64),
        token: u64,
        begin: impl FnOnce() -> Option<W>,
    ) -> Result<&W, Unheard> {
        if !self.is_attached(from, connection) {
            return Err(Unheard::Unattached);
        }
        self.keep((from, token), begin).ok_or(Unheard::NoRoom)
    }

    /// A write is over, as is said on `connection`.
    pub fn end(&mut self, (from, connection): (u64, u64), token: u64) -> Option<W> {
        if self.is_attached(from, connection) { self.writes.remove(&(from, token)) } else { None }
    }

    /// Somebody will announce all its writes from now on, on `connection`, and names those under way.
    pub fn attach(
        &mut self,
        attach: &Attach<'_>,
        connection: u64,
        mut begin: impl FnMut(&Write) -> Option<W>,
    ) -> Taken<W> {
        let Attach { from, joined, serves, writes, orphans, .. } = *attach;
        self.attached.remove(&from);
        let under_way: HashSet<u64> = writes.iter().map(|write| write.token).collect();
        let ended = self.forget(from, |token| !under_way.contains(&token));
        let mut taken = Taken { ended, orphans: Vec::new(), whole: false };
        for write in writes {
            if self.keep((from, write.token), || begin(write)).is_none() {
                return taken;
            }
        }
        for orphan in orphans {
            let Some(kept) = begin(orphan) else { return taken };
            taken.orphans.push(kept);
        }
        self.attached.insert(from, Attached { connection, joined, serves, until_us: 0 });
        taken.whole = true;
        taken
    }

    /// A member is gone: its writes, which end when their server processes are.
    pub fn orphan(&mut self, member: u64) -> Vec<W> {
        self.attached.remove(&member);
        self.forget(member, |_| true)
    }

    /// The members whose writes are kept in mind.
    pub fn writers(&self) -> BTreeSet<u64> {
        self.writes.keys().map(|(from, _)| *from).collect()
    }

    /// How many writes of a member are under way.
    pub fn count(&self, member: u64) -> usize {
        self.writes.range(of(member)).count()
    }

    /// Has it attached to this joining of ours, and did it serve?
    pub fn attached(&self, id: u64, joined: u64) -> Option<bool> {
        self.attached.get(&id).filter(|attached| attached.joined == joined).map(|attached| attached.serves)
    }

    fn is_attached(&self, from: u64, connection: u64) -> bool {
        self.attached.get(&from).is_some_and(|attached| attached.connection == connection)
    }

    fn forget(&mut self, member: u64, tokens: impl Fn(u64) -> bool) -> Vec<W> {
        let keys = self.writes.range(of(member)).map(|(key, _)| *key);
        let keys: Vec<(u64, u64)> = keys.filter(|(_, token)| tokens(*token)).collect();
        keys.iter().filter_map(|key| self.writes.remove(key)).collect()
    }

    fn keep(&mut self, key: (u64, u64), begin: impl FnOnce() -> Option<W>) -> Option<&W> {
        if !self.writes.contains_key(&key) {
            if self.writes.len() >= WRITES_MAX {
                return None;
            }
            self.writes.insert(key, begin()?);
        }
        self.writes.get(&key)
    }

    // ---- where others push ----

    /// `from` has answered on `connection` what it was asked at `at_us`.
    pub fn answer(&mut self, (from, connection): (u64, u64), at_us: u64) {
        let attached = self.attached.get_mut(&from);
        // An answer on an older connection may have overtaken what comes on this one.
        if let Some(attached) = attached.filter(|attached| attached.connection == connection) {
            attached.until_us = attached.until_us.max(at_us);
        }
    }

    /// When was the question asked that `member` answered last? 0: none was.
    pub fn until_us(&self, member: u64) -> u64 {
        self.attached.get(&member).map_or(0, |attached| attached.until_us)
    }

    /// All of `ids` must be heard from now on. False: somebody is not among them any more, whose last writes may have been announced
    /// to nobody, so that what was read before is void.
    #[must_use]
    pub fn count_on(&mut self, ids: BTreeSet<u64>) -> bool {
        let all = self.counted.is_subset(&ids);
        self.counted = ids;
        all
    }

    /// Until when all that must be heard are.
    pub fn hears_until_us(&self, lease_us: u64) -> u64 {
        let until = |member: &u64| match self.until_us(*member) {
            0 => 0,
            until_us => until_us.saturating_add(lease_us),
        };
        self.counted.iter().map(until).min().unwrap_or(u64::MAX)
    }

    /// Is it counted on and heard, or need not be heard?
    pub fn is_fresh(&self, member: u64, lease_us: u64, now_us: u64) -> bool {
        !self.counted.contains(&member) || now_us < self.until_us(member).saturating_add(lease_us)
    }
}

/// All writes of a member.
fn of(member: u64) -> std::ops::RangeInclusive<(u64, u64)> {
    (member, 0)..=(member, u64::MAX)
}
