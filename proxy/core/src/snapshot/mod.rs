//! The commit gate: how the snapshots of all shards are taken at one moment.
//!
//! While snapshots are taken the gate is *shut*: what asks to commit from then on waits until all of them are there, and decisions of
//! distributed transactions that are under way are waited for first. Then the snapshots
//!
//! - show every distributed transaction whole or not at all: none is between its decision and its last COMMIT PREPARED;
//! - show no transaction without what was acknowledged before its commit was asked for. Say A is not in its shard's snapshot: it
//!   became visible behind it, so it was acknowledged while the gate was shut or later. A commit that is asked for after that finds
//!   the gate shut, or all snapshots taken.
//!
//! So a write of one shard that is under way when the gate shuts need not be waited for, however long it takes: it is in its shard's
//! snapshot or not, and nothing that knows of it can be in another's. Nor need a write wait again that has waited for one
//! window's end: it asked before the next one began.
//!
//! Invariant: while the gate is shut no decision begins, and all that waited for its opening begin before it is shut again, so that
//! neither side starves the other. Snapshots that are asked for meanwhile share a window, until the first of its takers leaves.
//! Non-goals: waiting, and how long (the server's part); writes of other proxies, which this gate does not see.

#[cfg(test)]
mod model;

/// What stands between commits and the taking of snapshots. One for each database.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub struct Gate {
    phase: Phase,
    /// Windows that have begun.
    windows: u64,
    /// Distributed transactions that are being decided.
    deciding: u32,
    /// Those that begin when the window ends.
    waiting: u32,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    #[default]
    Open,
    /// `takers` take snapshots. `closing`: one of them is done, so nobody joins any more.
    Shut { takers: u32, closing: bool },
}

/// A time for which the gate is shut, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window(u64);

/// What becomes of the wish to take snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Taking {
    /// The gate is shut. Snapshots may be taken as soon as it [`is_still`](Gate::is_still).
    Shut,
    /// Ask again when this window has ended.
    After(Window),
}

/// What becomes of the wish to decide a distributed transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Deciding {
    Now,
    /// When this window ends. It counts as under way from then on, without asking again.
    After(Window),
}

impl Gate {
    /// The window that is open to snapshots now, and shut to commits. A write of one shard goes when there is none, or when the
    /// one that it has found has ended.
    pub fn window(&self) -> Option<Window> {
        match self.phase {
            Phase::Open => None,
            Phase::Shut { .. } => Some(Window(self.windows)),
        }
    }

    pub fn has_ended(&self, window: Window) -> bool {
        self.window() != Some(window)
    }

    /// Somebody wants to take snapshots.
    pub fn take(&mut self) -> Taking {
        match &mut self.phase {
            Phase::Open => {
                self.windows += 1;
                self.phase = Phase::Shut { takers: 1, closing: false };
                Taking::Shut
            }
            Phase::Shut { takers, closing: false } => {
                *takers += 1;
                Taking::Shut
            }
            Phase::Shut { closing: true, .. } => Taking::After(Window(self.windows)),
        }
    }

    /// Is nothing being decided? While the gate is shut it stays so.
    pub fn is_still(&self) -> bool {
        self.deciding == 0
    }

    /// Somebody who was told [`Taking::Shut`] is done, with snapshots or without. The last one opens the gate.
    pub fn leave(&mut self) {
        let Phase::Shut { takers, .. } = self.phase else { return };
        self.phase = match takers {
            0 | 1 => Phase::Open,
            more => Phase::Shut { takers: more - 1, closing: true },
        };
        if self.phase == Phase::Open {
            self.deciding += std::mem::take(&mut self.waiting);
        }
    }

    /// A distributed transaction is about to be decided.
    pub fn decide(&mut self) -> Deciding {
        match self.window() {
            None => {
                self.deciding += 1;
                Deciding::Now
            }
            Some(window) => {
                self.waiting += 1;
                Deciding::After(window)
            }
        }
    }

    /// It is decided and told to all its shards; or nobody knows, and whoever takes snapshots must look.
    pub fn decided(&mut self) {
        self.deciding = self.deciding.saturating_sub(1);
    }

    /// One that was told to wait is given up: while it waits, or when it counts as under way already.
    pub fn give_up(&mut self, window: Window) {
        if self.has_ended(window) {
            self.decided();
        } else {
            self.waiting = self.waiting.saturating_sub(1);
        }
    }
}
