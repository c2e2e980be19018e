//! The right to work by the map in force, shard by shard.
//!
//! Whoever is about to change the owner of slots writes the new epoch down on the shards, and waits for every proxy to say that it works
//! by it. One that is stopped, or cut off from the hub, cannot say so: but it learns from the shard itself that its map is old, or it
//! learns nothing, and then its right ends. So it needs not be waited for longer than [`LEASE`]; and losing the hub alone stops nobody.
//! Invariant: the right lasts from the moment the question was sent, and is given only by the shard's primary, for an epoch that is
//! not older than what is written there.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use weir_core::id::Epoch;

use crate::control::Target;

/// How long an answer of the shard counts.
pub const LEASE: Duration = Duration::from_secs(5);
/// Between two questions, after a failure, and the longest wait for an answer.
const EVERY: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(2);

/// How the connections that ask are named; the proxy's own name follows.
pub const ASKS: &str = "weir map ";

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What one shard has said of the map.
#[derive(Debug)]
pub struct MapLease {
    /// Microseconds since [`START`] at which the right ends; [`u64::MAX`]: nobody changes maps here.
    until_us: AtomicU64,
    /// What the shard has written down.
    written: AtomicU64,
    /// What this proxy works by.
    in_force: AtomicU64,
    changed: Notify,
}

impl MapLease {
    /// `is_needed`: is there a hub, so that maps change?
    pub fn new(is_needed: bool) -> Arc<MapLease> {
        LazyLock::force(&START);
        Arc::new(MapLease {
            until_us: AtomicU64::new(if is_needed { 0 } else { u64::MAX }),
            written: AtomicU64::new(0),
            in_force: AtomicU64::new(0),
            changed: Notify::new(),
        })
    }

    /// May this shard be asked by the map in force, now? For what has been read: could it be, when it was?
    pub fn covers(&self) -> bool {
        let until_us = self.until_us.load(Acquire);
        until_us == u64::MAX
            || self.written.load(Relaxed) <= self.in_force.load(Relaxed)
                && (START.elapsed().as_micros() as u64) < until_us
    }

    /// Waits until it may. False: it took longer.
    pub async fn covered(&self, longest: Duration) -> bool {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if self.covers() {
                    return;
                }
                // A lease that is prolonged between the look and the wait is seen at the next change, which is soon.
                let _ = timeout(EVERY, changed).await;
            }
        };
        timeout(longest, wait).await.is_ok()
    }

    /// Another map is in force.
    pub fn install(&self, epoch: Epoch) {
        self.in_force.store(epoch.0, Relaxed);
        self.changed.notify_waiters();
    }

    /// Asks whoever is the primary, for ever.
    pub async fn follow(self: Arc<Self>, mut primary: Target) {
        primary.config.application_name(format!("{ASKS}{}", crate::map::proxy_id()));
        loop {
            let failed = self.ask_on(&primary).await;
            if let Err(error) = failed {
                tracing::debug!("a shard does not tell its map: {error:#}");
            }
            primary.pause(AGAIN).await;
        }
    }

    async fn ask_on(&self, primary: &Target) -> Result<()> {
        let client = timeout(PATIENCE, primary.open()).await??;
        loop {
            let asked = START.elapsed();
            let answer = timeout(PATIENCE, client.query_opt("SELECT epoch FROM weir.map", &[])).await?;
            let written = match answer {
                Ok(row) => row.map_or(Ok(0), |row| row.try_get::<_, i64>(0))?,
                // No map was ever changed here.
                Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => 0,
                Err(error) => return Err(error.into()),
            };
            self.written.store(written as u64, Relaxed);
            self.until_us.store((asked + LEASE).as_micros() as u64, Release);
            self.changed.notify_waiters();
            tokio::time::sleep(EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_ends_with_time_and_with_a_newer_map() {
        let lease = MapLease::new(true);
        assert!(!lease.covers(), "nothing was asked yet");
        lease.install(Epoch(3));
        lease.written.store(3, Relaxed);
        lease.until_us.store((START.elapsed() + LEASE).as_micros() as u64, Release);
        assert!(lease.covers());
        lease.written.store(4, Relaxed);
        assert!(!lease.covers(), "the shard knows a newer map");
        lease.install(Epoch(4));
        assert!(lease.covers());
        lease.until_us.store(START.elapsed().as_micros() as u64, Release);
        assert!(!lease.covers(), "it has not been asked for long");
        assert!(MapLease::new(false).covers(), "maps do not change here");
    }
}
