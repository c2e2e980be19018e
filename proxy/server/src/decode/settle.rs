//! From decoded to shown: commits whose words are pending until the primary shows them, and gaps that are not over yet.
//!
//! Invariant: an intent is ended only after a snapshot of the primary, asked for after the commit was decoded, shows its
//! transaction; one of an earlier connection only after everything that was running at the start of this one is over. So none
//! ends early, and none waits for a transaction number that another server will never reach.

use std::convert::Infallible;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Result, ensure};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::types::PgLsn;
use weir_core::fresh::decoded::Committed;

use super::{Decoder, Primary, QUERY_TIMEOUT};
use crate::fleet::member::Announcement;
use crate::unsound::{self, Place, Variant};

/// Commits that wait. Each belongs to a server process that has not finished, so a server's max_connections is the real bound.
const WAITING_MAX: usize = 300_000;
/// With nothing to wait for, the server is asked that often whether it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Between two looks at what is not shown yet: at first, and at most.
const LOOK_MIN: Duration = Duration::from_micros(200);
/// Shortest time between two looks on behalf of what has come: under load, many commits share one.
const LOOK_GAP: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(20);
/// The same on behalf of what is to be voided once more, which may have to wait for a transaction of hours.
const VOID_LOOK_MAX: Duration = Duration::from_millis(100);
/// How long a server that cannot be followed is asked about what was decoded before.
const FINISH_MAX: Duration = Duration::from_secs(60);
/// How often publications are compared with the tables there are, whatever was told.
const SCHEMA_EVERY: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Settling {
    queue: Mutex<Queue>,
    came: Notify,
    schema: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// Of connections that are gone.
    old: Vec<Announcement>,
    /// When everything below this number is over, everything is voided once more and `old` ends.
    void_at: Option<u64>,
}

/// What a look has left.
pub(super) struct Left {
    pub waiting: usize,
    pub old: usize,
    /// Something has yet to be voided once more.
    void: bool,
}

/// Commits that were announced together.
struct Waiting {
    xids: Vec<u32>,
    announcement: Announcement,
    schema_changed: bool,
}

impl Settling {
    /// Takes over commits that were announced.
    pub(super) fn put(&self, committed: &[Committed], announcement: Announcement) -> Result<()> {
        let xids = committed.iter().map(|one| one.xid).collect();
        let schema_changed = committed.iter().any(|one| one.schema_changed);
        let mut queue = self.queue.lock();
        queue.waiting.push(Waiting { xids, announcement, schema_changed });
        let count = queue.waiting.len();
        drop(queue);
        self.came.notify_one();
        ensure!(count < WAITING_MAX, "too many commits wait to be shown by the primary");
        Ok(())
    }

    /// The connection is gone, and with it the meaning of transaction numbers.
    pub(super) fn all_are_old(&self) {
        let mut queue = self.queue.lock();
        let waiting = std::mem::take(&mut queue.waiting);
        queue.old.extend(waiting.into_iter().map(|waiting| waiting.announcement));
        queue.void_at = None;
    }

    /// There may have been writes that nobody saw: everything is void, now, and once more when all that may have committed
    /// meanwhile is shown.
    pub(super) async fn void(&self, decoder: &Decoder, primary: &Primary) -> Result<()> {
        self.void_now(decoder, primary).await?;
        let now = primary.snapshot().await?;
        let mut queue = self.queue.lock();
        queue.void_at = Some(queue.void_at.unwrap_or(0).max(now.xmax));
        drop(queue);
        self.came.notify_one();
        Ok(())
    }

    /// Every read depends on the word of anything: a write of that voids them all, here and at other proxies.
    async fn void_now(&self, decoder: &Decoder, primary: &Primary) -> Result<()> {
        let announcement = decoder.announce_anything(primary.pid).await?;
        decoder.here().clock.post(announcement);
        Ok(())
    }

    /// Ready after DDL that was decoded, and now and then.
    pub(super) async fn schema_has_changed(&self) {
        // Time and again in any case, so whether it was told does not matter.
        let _told = timeout(SCHEMA_EVERY, self.schema.notified()).await;
    }

    /// Ends what the primary shows, for ever.
    pub(super) async fn run(&self, decoder: &Decoder, primary: &Primary) -> Result<Infallible> {
        let mut pause = LOOK_MIN;
        let mut told = Instant::now();
        loop {
            let looked = Instant::now();
            let left = self.look(decoder, primary).await?;
            pause = match left {
                Left { waiting: 0, void: false, .. } => HEARTBEAT,
                Left { waiting: 0, .. } => pause.min(VOID_LOOK_MAX),
                Left { .. } => pause.min(LOOK_MAX),
            };
            // What comes meanwhile is worth a look of its own, together with all that comes within the gap.
            if timeout(pause, self.came.notified()).await.is_ok() {
                pause = LOOK_MIN;
                sleep(LOOK_GAP.saturating_sub(looked.elapsed())).await;
            } else {
                pause *= 2;
            }
            if told.elapsed() >= HEARTBEAT {
                told = Instant::now();
                self.measure(decoder, primary).await?;
            }
        }
    }

    /// How much of the WAL is not decoded yet.
    async fn measure(&self, decoder: &Decoder, primary: &Primary) -> Result<()> {
        let counters = &decoder.decoding().counters;
        // First where we are, then where the server is: never less than the truth.
        let handled = counters.handled.load(Relaxed);
        let asked = primary.client.query_one("SELECT pg_current_wal_lsn()", &[]);
        let written: PgLsn = timeout(QUERY_TIMEOUT, asked).await??.try_get(0)?;
        counters.lag_bytes.store(u64::from(written).saturating_sub(handled), Relaxed);
        decoder.publish_figures();
        Ok(())
    }

    /// Waits until nothing of earlier connections is left, for a while: this server will not be followed.
    pub(super) async fn finish_old(&self, decoder: &Decoder, primary: &Primary) -> Result<()> {
        let start = Instant::now();
        while self.look(decoder, primary).await?.old > 0 && start.elapsed() < FINISH_MAX {
            sleep(HEARTBEAT).await;
        }
        Ok(())
    }

    /// One look at the primary on behalf of all that wait; how many still do.
    pub(super) async fn look(&self, decoder: &Decoder, primary: &Primary) -> Result<Left> {
        let (asked_for, any_old) = {
            let queue = self.queue.lock();
            (queue.waiting.len(), !queue.old.is_empty())
        };
        unsound::linger(Place::Decoded).await;
        let now = primary.snapshot().await?;
        let (shown, old, void) = {
            let mut queue = self.queue.lock();
            // Others only add to the end.
            let later = queue.waiting.split_off(asked_for);
            let (shown, still): (Vec<_>, Vec<_>) =
                std::mem::take(&mut queue.waiting).into_iter().partition(|waiting| {
                    unsound::is(Variant::UngatedDecoding) || waiting.xids.iter().all(|xid| now.shows(*xid))
                });
            queue.waiting = still;
            queue.waiting.extend(later);
            if any_old && queue.void_at.is_none() {
                queue.void_at = Some(now.xmax);
            }
            let void = queue.void_at.is_some_and(|at| now.xmin >= at);
            if void {
                queue.void_at = None;
            }
            (shown, if void { std::mem::take(&mut queue.old) } else { Vec::new() }, void)
        };
        let shard = decoder.here();
        for waiting in shown {
            if waiting.schema_changed {
                decoder.db.doubt_catalog();
                self.schema.notify_one();
            }
            shard.clock.post(waiting.announcement);
        }
        for announcement in old {
            shard.clock.post(announcement);
        }
        if void {
            self.void_now(decoder, primary).await?;
        }
        let queue = self.queue.lock();
        let counters = &decoder.decoding().counters;
        counters.waiting.store((queue.waiting.len() + queue.old.len()) as u64, Relaxed);
        Ok(Left { waiting: queue.waiting.len(), old: queue.old.len(), void: queue.void_at.is_some() })
    }
}
