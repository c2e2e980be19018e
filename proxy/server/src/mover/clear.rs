//! Taking away what a move has left: rows on the side that does not own them, guards, fences, publications and slots.

use anyhow::{Context as _, Result};
use tokio::time::sleep;
use tokio_postgres::Client;
use weir_core::id::Epoch;
use weir_core::reshard::phase::{Aim, Phase};
use weir_core::reshard::pieces::cut;

use super::census::SETTLED_MAX;
use super::{LOOK, Mover, Pair, Side, sql};
use crate::hub::moves::MoveRow;

/// Of a table, so much is cleared by one statement.
const CLEARED_BYTES: u64 = 2 << 20;

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
            let client = sql::plain(self.pair.at(side)).await?;
            sql::drop_slot(&client, &name).await?;
        }
        self.owns_nothing(row, loser).await?;
        let client = sql::as_replica(self.pair.at(loser)).await?;
        // The fence goes last: where there is none, somebody has been here before.
        if sql::last(&client, &self.pair.script.has_fence()).await? == "t" {
            rows(&client, &self.pair).await.with_context(|| format!("rows on the {}", loser.name()))?;
        }
        // A shard that has joined with this move takes part without it, too.
        if row.aim == Aim::Cancelled {
            self.pair.make_indexes().await.context("indexes of the target")?;
        }
        self.nobody_lingers(epoch).await?;
        for side in [Side::Source, Side::Target] {
            let client = sql::plain(self.pair.at(side)).await?;
            for table in &self.pair.tables {
                sql::patiently(&client, &self.pair.script.drop_guard(table)).await.context("the guards")?;
            }
            sql::patiently(&client, &self.pair.script.forget()).await.context("the fence")?;
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
    /// The guards are what keeps a proxy that stands still from writing, when it goes on, what nobody would find any more.
    async fn nobody_lingers(&mut self, epoch: Epoch) -> Result<()> {
        loop {
            let behind = self.census.lingering(&self.driving, epoch).await?;
            if behind.is_empty() {
                return Ok(());
            }
            let what = format!("the guards stay until these proxies go on, or are gone: {}", behind.join(", "));
            self.driving.note_error(self.pair.id, &what).await?;
            sleep(LOOK).await;
        }
    }

    /// Before anything is deleted: the map itself says that these rows are not this side's. Errors: it says otherwise.
    pub(super) async fn owns_nothing(&self, row: &MoveRow, side: Side) -> Result<()> {
        let name = if side == Side::Source { &row.from } else { &row.to };
        let owned = self.driving.owned(name, &self.pair.keys).await?;
        anyhow::ensure!(owned == 0, "shard {name} owns {owned} of these slots by the map; nothing is deleted there");
        Ok(())
    }
}

/// Who copied before and is not there any more may still be heard by the server.
const COPIES: &str = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid() \
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                      AND (classid, objid, objsubid) = ($1::int4::oid, $2::int4::oid, 2)";

/// Deletes rows of the slots, some at a time.
pub(super) async fn rows(client: &Client, pair: &Pair) -> Result<()> {
    let (class, id) = pair.script.copy_lock();
    client.query(COPIES, &[&class, &id]).await.context("copies of before")?;
    client.batch_execute("SET lock_timeout = '60s'").await?;
    client.query("SELECT pg_advisory_lock($1, $2)", &[&class, &id]).await.context("copies of before do not end")?;
    client.query("SELECT pg_advisory_unlock($1, $2)", &[&class, &id]).await?;
    client.batch_execute("SET lock_timeout = 0").await?;
    // In any order: nothing checks foreign keys here.
    for table in &pair.tables {
        let (pages, page) = sql::pages(client, table).await?;
        // Page by page: what was deleted before is not looked at again. Until nothing is found: a table may be rewritten meanwhile.
        let mut deleted = 1;
        while deleted > 0 {
            deleted = 0;
            for piece in cut(&[pages], CLEARED_BYTES / page) {
                deleted += client.execute(&pair.script.clear(table, piece.condition().as_deref()), &[]).await?;
            }
        }
    }
    Ok(())
}
