//! Measuring what a move does to its servers, and making it wait.
//!
//! Invariant: what is to be decided is decided by `weir_core::reshard::throttle`; limits are read from the hub, so that whoever takes a
//! move over keeps them. Replicas are those that this weir probes. Busy is who runs a statement on the source and is not weir's mover:
//! what SQL can tell without rights of its own. Non-goal: the cut-over, which is too short to wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use weir_core::reshard::phase::Phase;
use weir_core::reshard::throttle::{Held, Limits, Measured, Pace};

use super::{LOOK, Mover, ORDERS, Pair, sql};
use crate::hub::moves::MoveRow;

const ACTIVE: &str = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND backend_type = 'client backend' \
                      AND application_name <> 'weir control' AND NOT starts_with(application_name, 'weir mover ')";
const WAL: &str =
    "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8 FROM pg_replication_slots WHERE slot_name = $1";

/// Asks the source, at most once a second.
#[derive(Default)]
pub(super) struct Meter {
    source: Option<Client>,
    last: Option<(Instant, Measured)>,
}

impl Meter {
    pub(super) async fn measure(&mut self, pair: &Pair, limits: &Limits) -> Result<Measured> {
        if let Some((_, measured)) = self.last.filter(|(at, _)| at.elapsed() < LOOK) {
            return Ok(measured);
        }
        let mut measured = Measured { lag_ms: pair.lag_ms(), ..Measured::default() };
        if limits.active.is_some() || limits.wal.is_some() {
            let source = match self.source.take().filter(|client| !client.is_closed()) {
                Some(client) => self.source.insert(client),
                None => self.source.insert(sql::plain(&pair.source).await?),
            };
            measured.active =
                Some(source.query_one(ACTIVE, &[]).await.context("activity")?.try_get::<_, i64>(0)?.max(0) as u64);
            let kept = source.query_opt(WAL, &[&pair.script.name()]).await.context("WAL that is kept")?;
            let kept: Option<i64> = kept.map(|row| row.try_get(0)).transpose()?.flatten();
            measured.wal = kept.map(|kept| kept.max(0) as u64);
        }
        self.last = Some((Instant::now(), measured));
        Ok(measured)
    }
}

impl Pair {
    /// Of the replica of either shard that is furthest behind, as they were probed last.
    fn lag_ms(&self) -> Option<u64> {
        let servers = self.shards.iter().flat_map(|shard| &shard.servers);
        servers.filter(|server| server.stands_by()).filter_map(|server| server.view.lag_ms()).max()
    }
}

impl Mover {
    /// Too much WAL is kept for a move that can begin again: it lets go of it, and waits to be told to go on. True: it has.
    pub(super) async fn lets_go(&mut self, row: &MoveRow) -> Result<bool> {
        if row.limits.wal.is_none() || !row.phase.may_begin_again() {
            return Ok(false);
        }
        let measured = self.meter.measure(&self.pair, &row.limits).await?;
        if !row.limits.lets_go(&measured) {
            return Ok(false);
        }
        let what = format!(
            "paused in phase {}: the source kept {} bytes of WAL for it, and its limit is {}; RESHARD RESUME begins again",
            row.phase.as_str(),
            measured.wal.unwrap_or_default(),
            row.limits
        );
        tracing::warn!(move_id = self.pair.id, "{what}");
        self.follower = None;
        self.driving.notice(self.pair.id, &what).await?;
        self.driving.pause(self.pair.id).await?;
        self.driving.step(row, Phase::Prepare, None).await?;
        sql::drop_slot(&sql::plain(&self.pair.source).await?, &self.pair.script.name()).await?;
        Ok(true)
    }

    /// Is it held up where it catches up? Then some time has passed.
    pub(super) async fn is_held(&mut self, row: &MoveRow) -> Result<bool> {
        let measured = self.meter.measure(&self.pair, &row.limits).await?;
        self.progress.held = row.limits.held(&measured);
        if self.progress.held.is_some() {
            if let Some(follower) = &mut self.follower {
                follower.rest().await?;
            }
            self.note().await?;
            sleep(ORDERS).await;
        }
        Ok(self.progress.held.is_some())
    }
}

/// What all who copy pass.
pub(super) struct Gate {
    held: watch::Sender<Option<Held>>,
    pace: Mutex<(Option<u64>, Pace)>,
    begun: Instant,
    paced: AtomicBool,
}

impl Gate {
    pub(super) fn new() -> Self {
        Gate {
            held: watch::Sender::new(None),
            pace: Mutex::default(),
            begun: Instant::now(),
            paced: AtomicBool::new(false),
        }
    }

    pub(super) fn set(&self, held: Option<Held>, rate: Option<u64>) {
        self.pace.lock().0 = rate;
        self.held.send_if_modified(|now| std::mem::replace(now, held) != held);
    }

    /// Has anybody waited for the rate since this was asked last?
    pub(super) fn has_paced(&self) -> bool {
        self.paced.swap(false, Ordering::Relaxed)
    }

    /// So many bytes have gone; returns when more may.
    pub(super) async fn pass(&self, bytes: u64) -> Result<()> {
        let mut wait = {
            let (rate, pace) = &mut *self.pace.lock();
            pace.sent((*rate, self.begun.elapsed()), bytes)
        };
        // In parts: the rate may be another one soon.
        while !wait.is_zero() {
            self.paced.store(true, Ordering::Relaxed);
            let part = wait.min(Duration::from_secs(1));
            sleep(part).await;
            wait -= part;
        }
        if self.held.borrow().is_some() {
            self.held.subscribe().wait_for(Option::is_none).await.context("nobody is there to let it go on")?;
        }
        Ok(())
    }
}
