//! What is known of one server before it is asked for a read: whether it is there, how far it was, how busy it is with our statements.
//!
//! Non-goal: proving freshness; the replica's own word on the same connection does that.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use weir_core::fresh::ReplicaView;
use weir_core::id::Lsn;

use crate::probe::EndpointView;

/// A replica that has just said it is behind is not asked again for so long.
const BEHIND: Duration = Duration::from_millis(5);

/// A server of one shard.
pub struct Server {
    pub view: Arc<EndpointView>,
    replay: AtomicU64,
    /// Microseconds since the database was set up.
    asked_us: AtomicU64,
    start: Instant,
    /// Statements under way on it.
    outstanding: AtomicU32,
}

/// A statement under way on a replica.
pub struct Outstanding<'a>(&'a AtomicU32);

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Server {
    pub fn new(view: Arc<EndpointView>) -> Self {
        let (replay, asked_us, outstanding) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU32::new(0));
        Server { view, replay, asked_us, start: Instant::now(), outstanding }
    }

    /// Counts a statement on it until the guard is dropped.
    pub fn occupy(&self) -> Outstanding<'_> {
        self.outstanding.fetch_add(1, Relaxed);
        Outstanding(&self.outstanding)
    }

    /// What it has just said on its own connection.
    pub fn note_replay(&self, replay: Lsn) {
        self.replay.store(replay.0, Relaxed);
        self.asked_us.store(self.start.elapsed().as_micros() as u64, Relaxed);
    }

    /// What choosing a replica looks at.
    pub fn seen(&self) -> ReplicaView {
        let age_us = (self.start.elapsed().as_micros() as u64).saturating_sub(self.asked_us.load(Relaxed));
        ReplicaView {
            connected: self.view.is_up() && self.view.is_replica(),
            outstanding: self.outstanding.load(Relaxed),
            last_known_replay: Lsn(self.replay.load(Relaxed)),
            may_have_moved: age_us > BEHIND.as_micros() as u64,
        }
    }
}
