//! What is known of one server before it is asked for a read: whether it is there, how far it was, how busy it is with our statements.
//!
//! Non-goal: proving freshness; the replica's own word on the same connection does that.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use smallvec::SmallVec;
use weir_core::fresh::{Choice, Observation, ReadBound, ReplicaView, UNPLACED, choose};
use weir_core::id::{Lsn, ShardId};

use super::Database;
use super::progress::{Progress, Waited};
use crate::config::Zones;
use crate::probe::EndpointView;

/// A replica that has just said it is behind is not asked again for so long.
const BEHIND: Duration = Duration::from_millis(5);

/// A server of one shard.
pub struct Server {
    pub view: Arc<EndpointView>,
    pub progress: Arc<Progress>,
    /// Where it is, if that is configured.
    pub zone: Option<Box<str>>,
    /// See [`ReplicaView::is_near`].
    pub is_near: bool,
    /// Statements under way on it.
    outstanding: AtomicU32,
}

/// A statement under way on a replica.
pub struct Outstanding<'a>(&'a AtomicU32);

/// A replica that a read should wait for.
pub struct Nearly {
    progress: Arc<Progress>,
    need: Lsn,
    /// How long ago the primary is known to have been there.
    age: Duration,
    wait_max: Duration,
}

impl Nearly {
    /// Dropping the future ends the wait.
    pub async fn wait(self) -> Waited {
        self.progress.reach(self.need, self.age, self.wait_max).await
    }
}

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Server {
    pub fn new(view: Arc<EndpointView>, progress: Arc<Progress>, zones: &Zones) -> Self {
        let zone = zones.of(&view.endpoint).map(Box::from);
        let is_near = zones.is_near(&view.endpoint);
        Server { view, progress, zone, is_near, outstanding: AtomicU32::new(0) }
    }

    /// Is it there, and a replica of the primary?
    pub fn stands_by(&self) -> bool {
        self.view.is_up() && self.view.is_replica()
    }

    /// Counts a statement on it until the guard is dropped.
    pub fn occupy(&self) -> Outstanding<'_> {
        self.outstanding.fetch_add(1, Relaxed);
        Outstanding(&self.outstanding)
    }

    /// What choosing a replica looks at.
    pub fn seen(&self) -> ReplicaView {
        let (last_known_replay, age_us) = self.progress.last();
        ReplicaView {
            connected: self.stands_by(),
            is_near: self.is_near,
            outstanding: self.outstanding.load(Relaxed),
            last_known_replay,
            may_have_moved: age_us > BEHIND.as_micros() as u64,
        }
    }
}

impl Database {
    /// Who is to answer a read whose words look like `seen`.
    pub fn choose(&self, shard: ShardId, bound: ReadBound, seen: &Observation) -> Choice {
        let replicas: SmallVec<[ReplicaView; 4]> = self.shard(shard).servers.iter().map(Server::seen).collect();
        choose(bound, seen, &replicas, self.turn.fetch_add(1, Relaxed))
    }

    /// No replica is far enough for a read, as far as is known: is one worth a wait? That which is likely to be there first.
    pub fn nearly_fresh(&self, shard: ShardId, bound: ReadBound, seen: &Observation) -> Option<Nearly> {
        let wait_max = self.config.replica_wait_max?;
        let need = bound.need(seen).ok().filter(|need| *need != UNPLACED)?;
        let shard = self.shard(shard);
        let age = shard.clock.age_of(need);
        let replicas = shard.servers.iter().filter(|server| server.stands_by());
        let connected = replicas.map(|server| &server.progress);
        let soonest = connected.min_by_key(|progress| progress.expected_us(age))?;
        let worth = soonest.is_worth_a_wait(age, wait_max);
        worth.then(|| Nearly { progress: Arc::clone(soonest), need, age, wait_max })
    }
}
