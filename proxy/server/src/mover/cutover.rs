//! The change of owner, there and back.
//!
//! Order: statements of the slots wait at every proxy; the lock waits for transactions that have written them; the fence closes the giver;
//! what it has written last is applied; the taker's fence opens; the hub's map changes; everybody learns it. Before the map changes a
//! failure leads back to where it began. After it everything goes forward.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use tokio::time::timeout;
use tokio_postgres::Client;
use weir_core::id::Epoch;
use weir_core::reshard::phase::{Aim, Phase};

use super::apply::Follower;
use super::{Mover, Side, sql};
use crate::hub::moves::MoveRow;

/// Longest wait for every proxy to hold its statements, at first and at most.
const HELD_MAX: Duration = Duration::from_millis(150);
const HELD_MOST: Duration = Duration::from_secs(2);
/// Longest wait for transactions that have written the slots.
const LOCK_WAIT_MS: u32 = 150;
/// Longest wait for the rest to be applied.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// It begins only when so little of the WAL is left.
const LAG_MAX: i64 = 64 * 1024;
/// Longest wait for that.
const IN_STEP_MAX: Duration = Duration::from_secs(60);
/// Time for what was held back, before it is tried again; it doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(300);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// From whom to whom, and what is before, meanwhile and after.
pub(super) struct Handover {
    giver: Side,
    meanwhile: Phase,
    after: Phase,
    before: Phase,
}

pub(super) const THERE: Handover =
    Handover { giver: Side::Source, meanwhile: Phase::Cutover, after: Phase::Reverse, before: Phase::Ready };
pub(super) const BACK: Handover =
    Handover { giver: Side::Target, meanwhile: Phase::Cutback, after: Phase::ClearTarget, before: Phase::Reverse };

/// Connections that are open before anybody waits.
struct Hands {
    gives: Client,
    takes: Client,
}

impl Mover {
    /// Changes the owner, or leaves everything as it was and says why.
    pub(super) async fn hand_over(&mut self, row: &MoveRow, way: &Handover) -> Result<()> {
        let hands = Hands {
            gives: sql::plain(self.pair.login(way.giver)).await?,
            takes: sql::plain(self.pair.login(way.giver.other())).await?,
        };
        self.get_in_step(way.giver).await?;
        let begun = Instant::now();
        let epoch = self.driving.step(row, way.meanwhile, None).await?;
        let waiting = MoveRow { phase: way.meanwhile, ..row.clone() };
        let Err(error) = self.try_hand_over(&waiting, way, (&hands, epoch, begun)).await else {
            self.vain = 0;
            return Ok(());
        };
        // The lock goes with its connection.
        drop(hands);
        // Was it the hub's answer alone that was lost?
        let now = self.driving.move_now(self.pair.id).await?;
        if now.phase == way.after {
            return Ok(());
        }
        self.fall_back(&now, way).await?;
        self.vain += 1;
        let note = format!("the change of owner was tried {} times, and is tried again: {error:#}", self.vain);
        tracing::info!(move_id = self.pair.id, "{note}");
        self.driving.note_error(self.pair.id, &note).await?;
        let (begun, pause) = (Instant::now(), (PAUSE * (1 << self.vain.min(6))).min(PAUSE_MAX));
        while begun.elapsed() < pause {
            self.follow(way.giver).await?;
        }
        Ok(())
    }

    /// Everything as it was before: the giver's fence is opened, and statements go on.
    pub(super) async fn fall_back(&mut self, row: &MoveRow, way: &Handover) -> Result<()> {
        self.reopen(way.giver).await.context("the fences")?;
        let gives_up = way.giver == Side::Source && row.aim == Aim::Cancelled;
        self.driving.step(row, if gives_up { Phase::ClearTarget } else { way.before }, None).await?;
        Ok(())
    }

    async fn get_in_step(&mut self, owner: Side) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.follow(owner).await?;
            let follower = self.follower.as_mut().context("nothing is followed")?;
            let lag = follower.lag_bytes().await?;
            if lag <= LAG_MAX {
                return Ok(());
            }
            ensure!(begun.elapsed() < IN_STEP_MAX, "{lag} bytes of WAL are still to be applied");
        }
    }

    async fn try_hand_over(
        &mut self,
        row: &MoveRow,
        way: &Handover,
        (hands, epoch, begun): (&Hands, Epoch, Instant),
    ) -> Result<()> {
        let script = self.pair.script.clone();
        let held_max = (HELD_MAX * (1 << self.vain.min(6))).min(HELD_MOST);
        let behind = self.settled(epoch, held_max).await?;
        ensure!(behind.is_empty(), "proxies do not hold their statements in time: {}", behind.join(", "));
        let held = begun.elapsed();
        let follower: &mut Follower = self.follower.as_mut().context("nothing is followed")?;
        let lock = format!("SET lock_timeout = {LOCK_WAIT_MS}; {}; SET lock_timeout = 0", script.lock());
        hands.gives.batch_execute(&lock).await.context("a transaction that has written the slots is still open")?;
        let locked = begun.elapsed();
        // From here on nobody writes them: not who comes late, nor who goes past weir.
        set_fence(&hands.gives, &script.set_fence(false)).await?;
        let mark: i64 = hands.gives.query_one(&script.mark(), &[]).await?.try_get(0)?;
        timeout(DRAIN_MAX, follower.follow_to_mark(mark))
            .await
            .map_err(|_| anyhow!("the rest is not applied in time"))??;
        let drained = begun.elapsed();
        set_fence(&hands.takes, &script.set_fence(true)).await?;
        let owner = if way.giver == Side::Source { &row.to } else { &row.from };
        self.driving.step(row, way.after, Some(owner)).await?;
        let done = begun.elapsed();
        self.progress.paused_us = Some(done.as_micros() as i64);
        self.progress.changes += follower.take_changes();
        // The next one reads the other server.
        self.follower = None;
        tracing::info!(
            move_id = self.pair.id,
            ?held,
            ?locked,
            ?drained,
            ?done,
            "the slots of a move have another owner"
        );
        self.driving.note(self.pair.id, &self.progress).await?;
        Ok(())
    }

    /// The giver owns the slots still: the other fence is closed and its own opened, once nobody else is at it.
    async fn reopen(&self, giver: Side) -> Result<()> {
        let script = &self.pair.script;
        let takes = sql::plain(self.pair.login(giver.other())).await?;
        set_fence(&takes, &script.set_fence(false)).await?;
        let gives = sql::plain(self.pair.login(giver)).await?;
        if sql::first(&gives, &script.ask_fence()).await? == "t" {
            return Ok(());
        }
        gives.batch_execute(&format!("SET lock_timeout = '5s'; {}; SET lock_timeout = 0", script.lock())).await?;
        set_fence(&gives, &script.set_fence(true)).await?;
        gives.batch_execute(&script.unlock()).await?;
        Ok(())
    }
}

async fn set_fence(client: &Client, sql: &str) -> Result<()> {
    client.batch_execute(sql).await.context("the fence")
}
