//! What a session notes of the writes it sends: for freshness, for columns that are unique over all shards, for slots that move.
//!
//! Invariant: a write that may commit with the request that is sent now has been announced before. Non-goal: what becomes of it
//! ([`crate::fresh`]).

use weir_core::error::UserError;
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::plan::{Noting, Plan};

use super::session::Session;

impl Session {
    /// Notes a write: announced at once if it may commit with this very request, else when the transaction commits.
    pub async fn note_write(&mut self, index: usize, plan: &Plan, commits_now: bool) -> Result<(), UserError> {
        let held = &mut self.held[index];
        if self.txn.is_some() && !matches!(held.noting, Noting::Settled { skips: true }) && plan.noting != Noting::None
        {
            held.noting = plan.noting;
        }
        self.note_write_of(index, &plan.writes, commits_now).await
    }

    pub async fn note_write_of(
        &mut self,
        index: usize,
        writes: &Dependencies,
        commits_now: bool,
    ) -> Result<(), UserError> {
        if commits_now {
            self.pass_gate().await;
        }
        let held = &mut self.held[index];
        held.wrote = true;
        held.changed |= !writes.is_empty();
        held.wrote_moving |= self.touches_moving;
        held.lease.drawn_by = self.cancel.process;
        self.drew_on = Some(held.lease.cancel_key.process);
        if !self.db.tracks_freshness() {
            return Ok(());
        }
        // Told apart: who hears of a write that may change the schema doubts his own, and must not pass that on with every row
        // that he writes meanwhile, or two of them would never stop.
        let unclear = |schema| if schema { Dependency::Anything } else { Dependency::AnyRows };
        let doubted: Dependencies;
        let mut writes = writes;
        if self.db.doubts_catalog() {
            doubted = Dependencies::from_slice(&[unclear(writes.contains(&Dependency::Anything))]);
            writes = &doubted;
        }
        const DIRTY_MAX: usize = 64;
        // Also what is announced at once: the text may have begun a transaction, whose COMMIT makes it visible again.
        if held.dirty.len() + writes.len() > DIRTY_MAX {
            let schema = held.dirty.iter().chain(writes).any(|write| *write == Dependency::Anything);
            held.dirty.clear();
            held.dirty.push(unclear(schema));
        } else {
            for write in writes {
                if !held.dirty.contains(write) {
                    held.dirty.push(*write);
                }
            }
        }
        if !commits_now {
            return Ok(());
        }
        let server = (held.shard, held.lease.cancel_key.process);
        let announced = self.announced.announce(&self.db, server, writes).await;
        if announced.is_err() {
            // What was put down for it will never be sent.
            self.held[index].lease.doubt("a write on it could not be announced");
        }
        announced
    }
}
