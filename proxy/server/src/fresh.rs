//! Writes that have been announced and not yet published: what stands between a session and the words of its shards.
//!
//! Invariant: every announcement ends in exactly one way: published to the shard's clock after the server has answered, or
//! handed over as unknown when it has not. A session that ends hands over what is left.

use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;
use weir_core::error::UserError;
use weir_core::fresh::{Dependencies, SessionMark};
use weir_core::id::ShardId;

use crate::clock::{Clock, Ticket};
use crate::database::{Database, Shard};
use crate::fleet::member::{Announcement, Announcing};
use crate::unsound::{self, Place};

#[derive(Default)]
pub struct Announced {
    writes: Vec<(Arc<Database>, ShardId, Announcement)>,
    /// The last write of the session on each shard.
    last: SmallVec<[(ShardId, Ticket, Instant); 1]>,
}

impl Announced {
    /// Raises the words of `writes` on `shard`, here and wherever else they are kept, before anything that can commit is sent to
    /// the server process `pid`. Errors: 53300 for too many writes at once, 57P03 if other proxies could not be told.
    pub async fn announce(
        &mut self,
        db: &Arc<Database>,
        (shard, pid): (ShardId, i32),
        writes: &Dependencies,
    ) -> Result<(), UserError> {
        if writes.is_empty() {
            return Ok(());
        }
        let announcement = announce(db.shard(shard), writes, pid).await?;
        self.writes.push((Arc::clone(db), shard, announcement));
        Ok(())
    }

    /// The servers have answered: the shards' clocks finish the writes, whatever became of them.
    pub fn publish(&mut self) {
        for (db, shard, announcement) in self.writes.drain(..) {
            unsound::reach(Place::Answered);
            let ticket = db.shard(shard).clock.post(announcement);
            unsound::reach(Place::Posted);
            note(&mut self.last, shard, ticket);
        }
    }

    /// What the session has written on a shard, for reads that must not be older.
    pub fn mark(&self, shard: ShardId, clock: &Clock) -> SessionMark {
        match self.last.iter().find(|(on, ..)| *on == shard) {
            None => SessionMark::Nothing,
            Some((_, ticket, _)) => clock.position_of(*ticket).map_or(SessionMark::Unknown, SessionMark::At),
        }
    }

    /// May the session have written on a shard what a server did not show at `then`?
    pub fn wrote_since(&self, shard: ShardId, then: Instant) -> bool {
        self.writes.iter().any(|(_, on, _)| *on == shard)
            || self.last.iter().any(|(on, _, over)| *on == shard && *over >= then)
    }

    /// Connections died unanswered: the writes on each shard end when the server process that had them is gone.
    /// `process_on` names that process; 0 if there is none any more.
    pub fn unknown(&mut self, process_on: impl Fn(ShardId) -> i32) {
        for (db, shard, announcement) in self.writes.drain(..) {
            db.shard(shard).clock.unknown_outcome(announcement, process_on(shard));
            note(&mut self.last, shard, Ticket::LOST);
        }
    }
}

/// Raises the words of `writes` on one shard, here and at other proxies. `pid`: the server process on whose end they hear of the
/// write's end, if this proxy dies. Whoever calls it sees to its end: [`Clock::post`], [`Clock::unknown_outcome`].
pub async fn announce(shard: &Shard, writes: &Dependencies, pid: i32) -> Result<Announcement, UserError> {
    let announcement = match shard.member.announce(writes, pid)? {
        Announcing::Done(announcement) => announcement,
        // Boxed: every session would else carry room for it.
        Announcing::Untold(untold) => Box::pin(untold.tell()).await?,
    };
    unsound::linger(Place::Told).await;
    unsound::reach_soon(Place::Sent);
    Ok(announcement)
}

/// Later tickets cover earlier ones, and a lost one is never covered.
fn note(last: &mut SmallVec<[(ShardId, Ticket, Instant); 1]>, shard: ShardId, ticket: Ticket) {
    let now = Instant::now();
    match last.iter_mut().find(|(on, ..)| *on == shard) {
        Some((_, known, over)) => (*known, *over) = (ticket.max(*known), now),
        None => last.push((shard, ticket, now)),
    }
}
