//! The first copy of the rows, as one snapshot of the source has them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::timeout;

use super::apply::Follower;
use super::guard::SLOT_WAIT;
use super::{Mover, Side, clear, sql};
use crate::back::walsender::Walsender;
use crate::hub::moves::MoveRow;

/// Longest wait for a piece of a table.
const PIECE_WAIT: Duration = Duration::from_secs(600);

impl Mover {
    /// Begins at the beginning: what an earlier attempt has left on the target is taken away.
    pub(super) async fn copy(&mut self, row: &MoveRow) -> Result<Follower> {
        let slot = self.pair.script.name();
        let source = sql::plain(&self.pair.source).await.context("the source")?;
        let target = sql::as_replica(&self.pair.target).await.context("the target")?;
        sql::drop_slot(&source, &slot).await?;
        self.owns_nothing(row, Side::Target).await?;
        clear::rows(&target, &self.pair).await.context("rows of an earlier attempt")?;
        target.batch_execute(&self.pair.script.end_apply(0)).await?;
        let mut server = Walsender::connect(&self.pair.source, "weir mover", &sql::WALSENDER_SETTINGS).await?;
        let make = format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput EXPORT_SNAPSHOT");
        let made =
            timeout(SLOT_WAIT, server.command(&make)).await.context("transactions on the source do not end")??;
        let snapshot = made.get(2).cloned().flatten().context("the server exported no snapshot")?;
        let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'");
        source.batch_execute(&begin).await.context("the snapshot")?;
        self.progress.rows_done = 0;
        self.progress.bytes_done = 0;
        self.progress.rows_total = 0;
        for table in &self.pair.tables {
            let rows: i64 = source.query_one(&self.pair.script.count(table), &[]).await?.try_get(0)?;
            self.progress.rows_total += rows;
        }
        for number in 0..self.pair.tables.len() {
            self.copy_table(&source, &target, number).await.with_context(|| self.pair.tables[number].quoted())?;
        }
        source.batch_execute("COMMIT").await?;
        Follower::begin(&self.pair, Side::Source, server).await
    }

    async fn copy_table(
        &mut self,
        source: &tokio_postgres::Client,
        target: &tokio_postgres::Client,
        number: usize,
    ) -> Result<()> {
        let table = &self.pair.tables[number];
        let (read, write) = (self.pair.script.copy_out(table), table.copy_in());
        let rows = source.copy_out(&read).await.context("reading")?;
        let sink = target.copy_in::<_, Bytes>(&write).await.context("writing")?;
        tokio::pin!(rows, sink);
        while let Some(piece) = timeout(PIECE_WAIT, rows.next()).await.context("the source does not go on")? {
            let piece = piece.context("reading")?;
            self.progress.bytes_done += piece.len() as i64;
            timeout(PIECE_WAIT, sink.feed(piece)).await.context("the target does not go on")?.context("writing")?;
            self.note().await?;
        }
        let copied =
            timeout(PIECE_WAIT, sink.finish()).await.context("the target does not go on")?.context("writing")?;
        self.progress.rows_done += copied as i64;
        Ok(())
    }
}
