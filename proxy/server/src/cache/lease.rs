//! A fill lease: of several proxies that miss the same entry at the same moment, one asks the server and the others wait for Redis.
//!
//! Invariant: none that answers depend on. What comes out is judged like any entry, at the waiter's own look; a lease that is lost,
//! held twice or never given back costs statements or a bounded wait. Each version of an entry has a lease of its own, so that who
//! fills what was true before a write holds up nobody after it.
//!
//! Bounds: a holder that is gone is waited for [`super::redis::LEASE_MS`], one that is slow for [`WAIT_MAX`].

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use weir_core::cache::{CacheKey, MissReason, Reply};

use super::redis::{Claimed, LEASE_MS};
use super::{Cache, CacheCounters, Moment};

/// As long as one waits for another session of the same proxy.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two looks: twice as long each time.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(20);
const RENEW_EVERY: Duration = Duration::from_millis(LEASE_MS / 3);

/// The right to fill one version of an entry, as far as other proxies ask for it. Dropping it gives it back, after what was stored
/// before.
pub struct FillLease {
    /// Holds the lease.
    renewal: JoinHandle<()>,
}

/// What there is to do for an entry that Redis has not.
pub enum Filled {
    /// Nothing: another proxy has filled it.
    Hit(Reply),
    /// Fill it: nobody else does.
    Mine(FillLease),
    /// Run it: nobody is to be waited for.
    Miss(MissReason),
}

impl FillLease {
    fn start(claimed: Claimed) -> FillLease {
        let renewal = async move {
            let end = Instant::now() + WAIT_MAX;
            while Instant::now() < end {
                sleep(RENEW_EVERY).await;
                claimed.renew().await;
            }
            // Still held, for whoever drops this; nobody waits so long.
            std::future::pending::<()>().await;
        };
        FillLease { renewal: tokio::spawn(renewal) }
    }
}

impl Drop for FillLease {
    fn drop(&mut self) {
        // What it holds goes with it.
        self.renewal.abort();
    }
}

impl Cache {
    /// Waits until another proxy has stored the entry, or until it is this one's turn.
    pub async fn filled_by_another(&self, key: &CacheKey, moment: &Moment<'_>) -> Filled {
        let (end, mut pause) = (Instant::now() + WAIT_MAX, LOOK_MIN);
        loop {
            match self.claim(key, moment).await {
                Err(reason) => {
                    CacheCounters::miss(&self.counters.misses_l2, reason);
                    return Filled::Miss(reason);
                }
                Ok(Some(filled)) => return filled,
                Ok(None) if Instant::now() >= end => {
                    self.counters.lease_timeouts.fetch_add(1, Relaxed);
                    return Filled::Miss(MissReason::Absent);
                }
                Ok(None) => {}
            }
            if pause == LOOK_MIN {
                self.counters.lease_waits.fetch_add(1, Relaxed);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LOOK_MAX);
        }
    }

    /// `None`: somebody else has the lease.
    async fn claim(&self, key: &CacheKey, moment: &Moment<'_>) -> Result<Option<Filled>, MissReason> {
        let redis = self.l2.as_ref().ok_or(MissReason::Absent)?;
        let stamps = moment.words.stamps(moment.seen).ok_or(MissReason::Moved)?;
        let version = stamps.iter().fold(0_u64, |sum, stamp| sum.rotate_left(7) ^ stamp);
        let (claimed, found) = redis.claim(&self.redis_key(key), &format!("{version:016x}")).await?;
        if let Some(found) = found
            && let Ok(entry) = self.accept(key, moment, found)
        {
            self.heat.answered(moment.seen.words());
            self.counters.hits_l2.fetch_add(1, Relaxed);
            let reply = entry.reply.clone();
            self.keep(key, Arc::new(entry), moment);
            return Ok(Some(Filled::Hit(reply)));
        }
        Ok(claimed.map(|claimed| {
            self.counters.leases.fetch_add(1, Relaxed);
            Filled::Mine(FillLease::start(claimed))
        }))
    }
}
