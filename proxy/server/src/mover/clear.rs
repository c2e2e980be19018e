//! Taking away what a move has left: rows on the side that does not own them, guards, fences, publications and slots.

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_core::reshard::phase::{Aim, Phase};

use super::census::SETTLED_MAX;
use super::{Mover, Pair, Side, sql};
use crate::hub::moves::MoveRow;

/// Rows that one statement deletes.
const ROWS: u32 = 5000;

impl Mover {
    /// The rows of the side that lost the slots go, then everybody learns that nothing moves, then the guards go: until the last moment
    /// nothing can be written that would be deleted.
    pub(super) async fn clear(&mut self, row: &MoveRow, loser: Side) -> Result<()> {
        let epoch = self.driving.epoch().await?;
        // Who works by an older map may still read them there.
        let behind = self.settled(epoch, SETTLED_MAX).await?;
        anyhow::ensure!(behind.is_empty(), "waits for proxies that still work by an older map: {}", behind.join(", "));
        let name = self.pair.script.name();
        for side in [Side::Source, Side::Target] {
            let client = sql::plain(self.pair.login(side)).await?;
            sql::drop_slot(&client, &name).await?;
        }
        self.owns_nothing(row, loser).await?;
        let client = sql::as_replica(self.pair.login(loser)).await?;
        rows(&client, &self.pair).await.with_context(|| format!("rows on the {}", loser.name()))?;
        for side in [Side::Source, Side::Target] {
            let client = sql::plain(self.pair.login(side)).await?;
            for table in &self.pair.tables {
                sql::patiently(&client, &self.pair.script.drop_guard(table)).await.context("the guards")?;
            }
            client.batch_execute(&self.pair.script.forget(self.pair.tables.len())).await.context("the fence")?;
        }
        let end = match (row.phase, row.aim) {
            (Phase::ClearSource, _) => Phase::Done,
            (_, Aim::Back) => Phase::RolledBack,
            _ => Phase::Cancelled,
        };
        self.driving.note(self.pair.id, &self.progress).await?;
        self.driving.step(row, end, None).await?;
        Ok(())
    }
}

impl Mover {
    /// Before anything is deleted: the map itself says that these rows are not this side's. Errors: it says otherwise.
    pub(super) async fn owns_nothing(&self, row: &MoveRow, side: Side) -> Result<()> {
        let name = if side == Side::Source { &row.from } else { &row.to };
        let owned = self.driving.owned(name, &self.pair.slots).await?;
        anyhow::ensure!(owned == 0, "shard {name} owns {owned} of these slots by the map; nothing is deleted there");
        Ok(())
    }
}

/// Deletes rows of the slots, some at a time.
pub(super) async fn rows(client: &Client, pair: &Pair) -> Result<()> {
    // In any order: nothing checks foreign keys here.
    for table in &pair.tables {
        let delete = pair.script.clear(table, ROWS);
        while client.execute(&delete, &[]).await? > 0 {}
    }
    Ok(())
}
