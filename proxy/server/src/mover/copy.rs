//! The first copy of the rows, as one snapshot of the source has them, by several connections at once.
//!
//! Invariant: every row of the slots that the snapshot has is copied once, and what was copied is durable before the copy counts as done.
//! Memory does not grow with the tables: what the target does not take is not read. Non-goal: going on where a copy was interrupted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use weir_core::reshard::phase::Aim;
use weir_core::reshard::pieces::{Piece, cut};
use weir_core::reshard::throttle::Held;

use super::apply::Follower;
use super::throttle::Gate;
use super::{LOOK, Mover, Pair, Side, clear, guard, sql};
use crate::hub::moves::MoveRow;

/// Longest wait for a row.
const PIECE_WAIT: Duration = Duration::from_secs(600);
/// Of a table, so much is one piece.
const PIECE_BYTES: u64 = 64 << 20;
/// Pages of a table that are looked at to learn how many rows will move.
const SAMPLE_PAGES: f64 = 500.0;
/// Bytes between two looks whether it may go on.
const GATE_BYTES: u64 = 64 * 1024;

/// What those who copy share.
struct Copying {
    pair: Pair,
    snapshot: String,
    pieces: Mutex<VecDeque<Piece>>,
    gate: Gate,
    rows: AtomicI64,
    bytes: AtomicI64,
}

impl Mover {
    /// Begins at the beginning: what an earlier attempt has left on the target is taken away. `None`: it was told otherwise.
    pub(super) async fn copy(&mut self, row: &MoveRow) -> Result<Option<Follower>> {
        let slot = self.pair.script.name();
        let source = sql::plain(&self.pair.source).await.context("the source")?;
        let target = sql::as_replica(&self.pair.target).await.context("the target")?;
        sql::drop_slot(&source, &slot).await?;
        self.owns_nothing(row, Side::Target).await?;
        clear::rows(&target, &self.pair).await.context("rows of an earlier attempt")?;
        target.batch_execute(&self.pair.script.end_apply(0)).await?;
        let mut server = self.pair.source.walsender().await?;
        let (position, snapshot) = guard::export(&mut server, &slot).await?;
        let (pieces, rows) = self.pair.pieces(&source).await.context("sizes of the tables")?;
        (self.progress.rows_total, self.progress.rows_done, self.progress.bytes_done) = (rows, 0, 0);
        let copying = Arc::new(Copying {
            pair: self.pair.clone(),
            snapshot,
            pieces: Mutex::new(pieces.into()),
            gate: Gate::new(),
            rows: AtomicI64::new(0),
            bytes: AtomicI64::new(0),
        });
        if !self.copy_all(&copying).await? {
            return Ok(None);
        }
        self.progress.rows_total = self.progress.rows_done;
        // Flushes all that was committed before it, too.
        target.batch_execute(&self.pair.script.end_apply(position.0)).await?;
        Follower::begin(&self.pair, Side::Source, server).await.map(Some)
    }

    /// False: it was told otherwise, and nobody copies any more.
    async fn copy_all(&mut self, copying: &Arc<Copying>) -> Result<bool> {
        if !self.may_copy(copying).await? {
            return Ok(false);
        }
        let mut copies = JoinSet::new();
        let count = self.pair.config.copies.min(copying.pieces.lock().len());
        for _ in 0..count {
            let copying = Arc::clone(copying);
            copies.spawn(async move { copying.work().await });
        }
        let goes_on = loop {
            // Both may be dropped while they wait: a task that has ended is kept in the set.
            tokio::select! {
                ended = copies.join_next() => match ended {
                    Some(ended) => ended.context("a copy broke off")??,
                    None => break true,
                },
                () = sleep(LOOK) => {}
            }
            self.progress.rows_done = copying.rows.load(Relaxed);
            self.progress.bytes_done = copying.bytes.load(Relaxed);
            self.progress.rows_total = self.progress.rows_total.max(self.progress.rows_done);
            if self.noted.elapsed() >= LOOK && !self.may_copy(copying).await? {
                break false;
            }
        };
        copies.shutdown().await;
        self.progress.held = None;
        Ok(goes_on)
    }

    /// Looks what is wanted and what is the matter, and lets those who copy wait or go on. False: nobody wants it any more.
    async fn may_copy(&mut self, copying: &Copying) -> Result<bool> {
        let row = self.driving.move_now(self.pair.id).await?;
        if row.aim == Aim::Cancelled || self.lets_go(&row).await? {
            return Ok(false);
        }
        let measured = self.meter.measure(&self.pair, &row.limits).await?;
        let held = if row.paused { Some(Held::Paused) } else { row.limits.held(&measured) };
        copying.gate.set(held, row.limits.rate);
        self.progress.held = held.or(copying.gate.has_paced().then_some(Held::Rate));
        self.note().await?;
        Ok(true)
    }
}

impl Pair {
    /// How the tables are cut, and about how many rows of them move.
    async fn pieces(&self, source: &Client) -> Result<(Vec<Piece>, i64)> {
        let version: i32 =
            source.query_one("SELECT current_setting('server_version_num')::int4", &[]).await?.try_get(0)?;
        let (mut pages, mut moving, mut most) = (Vec::new(), 0.0, u64::MAX);
        for table in &self.tables {
            let (count, page) = sql::pages(source, table).await?;
            pages.push(count);
            most = PIECE_BYTES / page;
            let percent = (SAMPLE_PAGES / count.max(1) as f64 * 100.0).min(100.0);
            let rows: i64 = source.query_one(&self.script.count(table, percent), &[]).await?.try_get(0)?;
            moving += rows as f64 * 100.0 / percent;
        }
        // Earlier ones would read the whole table for each piece.
        let most = if version >= 140_000 { most } else { u64::MAX };
        Ok((cut(&pages, most), moving as i64))
    }
}

impl Copying {
    /// Takes pieces until none is left.
    async fn work(&self) -> Result<()> {
        let source = sql::plain(&self.pair.source).await.context("the source")?;
        let target = sql::as_replica(&self.pair.target).await.context("the target")?;
        let (class, id) = self.pair.script.copy_lock();
        target.query("SELECT pg_advisory_lock_shared($1, $2)", &[&class, &id]).await?;
        target.batch_execute("SET synchronous_commit = off").await?;
        sql::begin_snapshot(&source, &self.snapshot).await?;
        loop {
            let Some(piece) = self.pieces.lock().pop_front() else { break };
            let table = &self.pair.tables[piece.table];
            self.copy(&source, &target, &piece).await.with_context(|| table.quoted())?;
        }
        source.batch_execute("COMMIT").await?;
        Ok(())
    }

    async fn copy(&self, source: &Client, target: &Client, piece: &Piece) -> Result<()> {
        // However small it is.
        self.gate.pass(0).await?;
        let table = &self.pair.tables[piece.table];
        let read = self.pair.script.copy_out(table, piece.condition().as_deref());
        let rows = source.copy_out(&read).await.context("reading")?;
        let sink = target.copy_in::<_, Bytes>(&table.copy_in()).await.context("writing")?;
        tokio::pin!(rows, sink);
        // A row is a message; the server's own count at the end is the truth.
        let (mut counted, mut told, mut passing) = (0_i64, 0_i64, 0_u64);
        while let Some(row) = timeout(PIECE_WAIT, rows.next()).await.context("the source does not go on")? {
            let row = row.context("reading")?;
            passing += row.len() as u64;
            counted += 1;
            timeout(PIECE_WAIT, sink.feed(row)).await.context("the target does not go on")?.context("writing")?;
            if passing >= GATE_BYTES {
                self.tell(passing, counted - told);
                self.gate.pass(passing).await?;
                (told, passing) = (counted, 0);
            }
        }
        let copied =
            timeout(PIECE_WAIT, sink.finish()).await.context("the target does not go on")?.context("writing")?;
        self.tell(passing, copied as i64 - told);
        Ok(())
    }

    fn tell(&self, bytes: u64, rows: i64) {
        self.bytes.fetch_add(bytes as i64, Relaxed);
        self.rows.fetch_add(rows, Relaxed);
    }
}
