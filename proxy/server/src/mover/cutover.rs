//! The change of owner, there and back.
//!
//! Order: statements of the slots wait at every proxy; the lock waits for transactions that have written them; the fence closes the giver;
//! what it has written last is applied; the taker's fence opens; the hub's map changes; everybody learns it. Before the map changes a
//! failure leads back to where it began. After it everything goes forward.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use tokio::time::timeout;
use tokio_postgres::Client;
use weir_core::reshard::phase::{Aim, Phase};

use super::apply::Follower;
use super::{Mover, Side, sql};
use crate::hub::moves::MoveRow;

/// Longest wait for every proxy to hold its statements.
const HELD_MAX: Duration = Duration::from_millis(200);
/// Longest wait for transactions that have written the slots.
const LOCK_WAIT_MS: u32 = 150;
/// Longest wait for the rest to be applied.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// It is tried only while so little of the WAL is left.
const LAG_MAX: i64 = 1 << 20;
/// Pause between attempts; it doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(500);

impl Mover {
    pub(super) async fn cut_over(&mut self, row: &MoveRow) -> Result<()> {
        self.hand_over(row, Side::Source, Phase::Reverse, Phase::Catchup).await
    }

    pub(super) async fn cut_back(&mut self, row: &MoveRow) -> Result<()> {
        self.hand_over(row, Side::Target, Phase::ClearTarget, Phase::Reverse).await
    }

    /// `after`: the phase that follows; `before`: the one it falls back to.
    async fn hand_over(&mut self, row: &MoveRow, giver: Side, after: Phase, before: Phase) -> Result<()> {
        // Whatever an earlier attempt has closed is opened first, by who holds the lock alone.
        let outcome = self.try_hand_over(row, giver, after).await;
        let Err(error) = outcome else { return Ok(()) };
        // Was it the hub's answer alone that was lost?
        if self.driving.move_now(self.pair.id).await?.phase == after {
            return Ok(());
        }
        self.reopen(giver).await.context("the fences")?;
        let back = if giver == Side::Source && row.aim == Aim::Cancelled { Phase::ClearTarget } else { before };
        self.driving.step(row, back, None).await?;
        self.driving.note_error(self.pair.id, &format!("the cut-over is tried again: {error:#}")).await?;
        self.follow_meanwhile(giver).await
    }

    /// Some time for what was held back, while changes go on being applied.
    async fn follow_meanwhile(&mut self, owner: Side) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < PAUSE {
            self.follow(owner).await?;
        }
        Ok(())
    }

    async fn try_hand_over(&mut self, row: &MoveRow, giver: Side, after: Phase) -> Result<()> {
        let begun = Instant::now();
        let script = self.pair.script.clone();
        let gives = sql::plain(self.pair.login(giver)).await?;
        let takes = sql::plain(self.pair.login(giver.other())).await?;
        if self.follower.is_none() {
            self.follower = Some(Follower::open(&self.pair, giver).await?);
        }
        let epoch = self.driving.epoch().await?;
        let behind = self.settled(epoch, HELD_MAX).await?;
        anyhow::ensure!(behind.is_empty(), "proxies do not answer in time: {}", behind.join(", "));
        let follower = self.follower.as_mut().context("nothing is followed")?;
        let lag = follower.lag_bytes().await?;
        anyhow::ensure!(lag <= LAG_MAX, "{lag} bytes of WAL are still to be applied");
        let lock = format!("SET lock_timeout = {LOCK_WAIT_MS}; {}; SET lock_timeout = 0", script.lock());
        gives.batch_execute(&lock).await.context("a transaction that has written the slots is still open")?;
        // From here on nobody writes them: not who comes late, nor who goes past weir.
        set_fence(&gives, &script.set_fence(false)).await?;
        let mark: i64 = gives.query_one(&script.mark(), &[]).await?.try_get(0)?;
        timeout(DRAIN_MAX, follower.follow_to_mark(mark))
            .await
            .map_err(|_| anyhow!("the rest is not applied in time"))??;
        set_fence(&takes, &script.set_fence(true)).await?;
        let owner = if giver == Side::Source { &row.to } else { &row.from };
        self.driving.step(row, after, Some(owner)).await?;
        self.progress.paused_us = Some(begun.elapsed().as_micros() as i64);
        self.progress.changes += follower.take_changes();
        self.driving.note(self.pair.id, &self.progress).await?;
        // The next one reads the other server.
        self.follower = None;
        tracing::info!(
            move_id = self.pair.id,
            pause_us = self.progress.paused_us,
            "the slots of a move have another owner"
        );
        // The lock ends with its connection.
        Ok(())
    }

    /// The giver owns the slots still: its fence is opened and the other one closed, once nobody else is at it.
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
