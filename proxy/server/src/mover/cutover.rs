//! The change of owner, there and back.
//!
//! Order: statements of the slots wait at every proxy; the lock waits for transactions that have written them; the fence closes the giver;
//! what it has written last is applied; the taker's fence opens; the hub's map changes; everybody learns it. Before the map changes a
//! failure leads back to where it began. After it everything goes forward.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use weir_core::id::Epoch;
use weir_core::reshard::phase::{Aim, Phase};

use super::apply::Follower;
use super::census::write_epoch;
use super::reach::Reach;
use super::{Mover, Side, guard, sql};
use crate::hub::moves::MoveRow;

/// Longest wait for every proxy to hold its statements, at first and at most.
const HELD_MAX: Duration = Duration::from_millis(150);
const HELD_MOST: Duration = Duration::from_secs(2);
/// Longest wait for transactions that have written the slots.
const LOCK_WAIT_MS: u32 = 150;
/// Longest wait for the rest to be applied.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Longest wait for one answer of a server meanwhile: one that hangs must not keep statements waiting.
const ANSWER_MAX: Duration = Duration::from_secs(1);
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
    /// Asks either of them for its tables.
    asks: [Statement; 2],
}

impl Hands {
    async fn open([gives, takes]: [&Reach; 2]) -> Result<Hands> {
        let (gives, takes) = (sql::plain(gives).await?, sql::plain(takes).await?);
        let asks = [sql::prepare_described(&gives).await?, sql::prepare_described(&takes).await?];
        Ok(Hands { gives, takes, asks })
    }
}

/// Has the taker's fence been told to open?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taker {
    Untouched,
    /// It may be open, also if nobody has heard so.
    Told,
}

impl Mover {
    /// Changes the owner, or leaves everything as it was and says why.
    pub(super) async fn hand_over(&mut self, row: &MoveRow, way: &Handover) -> Result<()> {
        let hands = Hands::open([self.pair.at(way.giver), self.pair.at(way.giver.other())]).await?;
        if way.giver == Side::Source {
            guard::advance_way_back(&self.pair).await?;
        }
        self.get_in_step(way.giver).await?;
        self.tables_stand(&hands).await?;
        // The last one that the servers hear of before statements wait: the next one they are told with the fences.
        self.census.write((&self.driving, self.pair.servers()), self.driving.epoch().await?).await?;
        let begun = Instant::now();
        let epoch = self.driving.step(row, way.meanwhile, None).await?;
        let waiting = MoveRow { phase: way.meanwhile, ..row.clone() };
        let mut taker = Taker::Untouched;
        let tried = self.try_hand_over(&waiting, way, (&hands, epoch, begun), &mut taker).await;
        let Err(error) = tried else {
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
        self.fall_back(&now, way, taker).await?;
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

    /// Somebody who is gone has begun it: nobody knows how far he was.
    pub(super) async fn take_back(&mut self, row: &MoveRow, way: &Handover) -> Result<()> {
        self.fall_back(row, way, Taker::Told).await
    }

    /// Everything as it was before: the giver's fence is opened, and statements go on.
    async fn fall_back(&mut self, row: &MoveRow, way: &Handover, taker: Taker) -> Result<()> {
        let mut unclear = None;
        if taker == Taker::Told {
            let closed = timeout(ANSWER_MAX, self.close(way.giver.other())).await;
            let closed = closed.context("it does not answer").flatten().context("the taker's fence");
            // Nobody has ever known the target as the owner: only who goes past weir could write there meanwhile, and that is found
            // when both sides are compared once more. The source has been the owner, and somebody may believe it still.
            match (closed, way.giver) {
                (Err(error), Side::Target) => return Err(error),
                (closed, _) => unclear = closed.err(),
            }
        }
        self.reopen(way.giver).await.context("the fences")?;
        let gives_up = way.giver == Side::Source && row.aim == Aim::Cancelled;
        let to = match (gives_up, &unclear) {
            (true, _) => Phase::ClearTarget,
            (false, Some(_)) => Phase::Catchup,
            (false, None) => way.before,
        };
        self.driving.step(row, to, None).await?;
        // A new attempt ends what is under way there, and closes the fence before it goes on.
        unclear.map_or(Ok(()), Err)
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
        taker: &mut Taker,
    ) -> Result<()> {
        let script = self.pair.script.clone();
        let held_max = (HELD_MAX * (1 << self.vain.min(6))).min(HELD_MOST);
        let settled = timeout(held_max + ANSWER_MAX, self.settled_soon(epoch, held_max)).await;
        let behind = settled.context("the servers cannot be told of the map")??;
        ensure!(behind.is_empty(), "proxies do not hold their statements in time: {}", behind.join(", "));
        let held = begun.elapsed();
        // Left in the midst of its work it is of no more use, and must not be taken for one that is.
        let mut follower: Follower = self.follower.take().context("nothing is followed")?;
        let lock = format!("SET lock_timeout = {LOCK_WAIT_MS}; {}; SET lock_timeout = 0", script.lock());
        let locking = timeout(ANSWER_MAX, hands.gives.batch_execute(&lock)).await.context("no answer");
        if let Err(error) = locking.and_then(|locked| Ok(locked?)) {
            self.follower = Some(follower);
            return Err(error.context("a transaction that has written the slots is still open"));
        }
        let locked = begun.elapsed();
        // From here on nobody writes them: not who comes late, nor who goes past weir.
        let close = format!("{}; {}; {}", write_epoch(epoch), script.set_fence(false), script.mark());
        let mark =
            timeout(ANSWER_MAX, sql::last(&hands.gives, &close)).await.context("no answer")?.context("the fence")?;
        let mark = mark.parse().context("a mark")?;
        let rest = timeout(DRAIN_MAX, follower.follow_to_mark(mark));
        let rest = async { rest.await.map_err(|_| anyhow!("the rest is not applied in time"))? };
        tokio::try_join!(rest, self.tables_stand(hands))?;
        let drained = begun.elapsed();
        *taker = Taker::Told;
        set_fence(&hands.takes, &format!("{}; {}", write_epoch(epoch), script.set_fence(true))).await?;
        let owner = if way.giver == Side::Source { &row.to } else { &row.from };
        self.driving.step(row, way.after, Some(owner)).await?;
        let done = begun.elapsed();
        self.progress.paused_us = Some(done.as_micros() as i64);
        // The next one reads the other server.
        self.progress.changes += follower.take_changes();
        drop(follower);
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

    /// What was done to tables beside weir is not in the stream: then nothing is handed over. Errors: which, and what to do.
    async fn tables_stand(&self, hands: &Hands) -> Result<()> {
        let (rules, script) = (&self.pair.rules, &self.pair.script);
        let both = async {
            let [here, there] = &hands.asks;
            let (here, there) = ((&hands.gives, here), (&hands.takes, there));
            tokio::try_join!(sql::described(here, rules, script), sql::described(there, rules, script))
        };
        let (here, there) = timeout(ANSWER_MAX, both).await.context("no answer")??;
        for table in here.keys().chain(there.keys()) {
            let (ours, theirs) = (here.get(table), there.get(table));
            ensure!(
                ours.map(|(columns, _)| columns) == theirs.map(|(columns, _)| columns),
                "{table} is not the same on both servers: it was changed beside weir while its rows were on their way; make both alike, \
                 or give the move up"
            );
            ensure!(
                ours.is_some_and(|(_, is_minded)| *is_minded),
                "{table} was made while slots were on their way, or its guard or publication is gone, so what is in it did not move; \
                 give the move up and begin again"
            );
        }
        Ok(())
    }

    /// Closes the fence of a side that owns nothing.
    pub(super) async fn close(&self, side: Side) -> Result<()> {
        let client = sql::plain(self.pair.at(side)).await?;
        set_fence(&client, &self.pair.script.set_fence(false)).await
    }

    /// The giver owns the slots still: its fence is opened, once nobody else is at it.
    pub(super) async fn reopen(&self, giver: Side) -> Result<()> {
        let script = &self.pair.script;
        let gives = sql::plain(self.pair.at(giver)).await?;
        if sql::last(&gives, &script.ask_fence()).await? == "t" {
            return Ok(());
        }
        gives.batch_execute(&format!("SET lock_timeout = '5s'; {}; SET lock_timeout = 0", script.lock())).await?;
        set_fence(&gives, &script.set_fence(true)).await?;
        gives.batch_execute(&script.unlock()).await?;
        Ok(())
    }
}

async fn set_fence(client: &Client, sql: &str) -> Result<()> {
    timeout(ANSWER_MAX, client.batch_execute(sql)).await.context("no answer")?.context("the fence")
}
