//! Guards, fences and publications on both servers, and the slot of the way back.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::timeout;

use super::{Pair, Side, sql};
use crate::back::walsender::Walsender;

/// A slot is made when all transactions that write now are over.
pub(super) const SLOT_WAIT: Duration = Duration::from_secs(600);

/// Everything that has to be there before the first row is copied. May be run again.
pub(super) async fn prepare(pair: &Pair) -> Result<()> {
    // The target first: what is copied there is nobody's to write, from the first row on.
    for side in [Side::Target, Side::Source] {
        let client = sql::plain(pair.login(side)).await?;
        let prepare = pair.script.prepare(&pair.tables, side == Side::Source);
        let script = format!("BEGIN; {prepare}; COMMIT");
        client.batch_execute(&script).await.with_context(|| format!("fence and guards of the {}", side.name()))?;
        for number in 0..pair.tables.len() {
            let set = pair.script.set_guard(&pair.tables, number);
            sql::patiently(&client, &set)
                .await
                .with_context(|| format!("the guard of {}", pair.tables[number].quoted()))?;
        }
        let publish = format!("BEGIN; {}; COMMIT", pair.script.publish(&pair.tables));
        sql::patiently(&client, &publish).await.context("the publication")?;
    }
    Ok(())
}

/// The slot that what the target writes after the cut-over is read from. Made while statements run, for that takes as long as the
/// longest of them.
pub(super) async fn way_back(pair: &Pair) -> Result<()> {
    let slot = pair.script.name();
    let client = sql::plain(&pair.target).await?;
    sql::drop_slot(&client, &slot).await?;
    let mut server = Walsender::connect(&pair.target, "weir mover", &sql::WALSENDER_SETTINGS).await?;
    let make = format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput NOEXPORT_SNAPSHOT");
    timeout(SLOT_WAIT, server.command(&make)).await.context("transactions on the target do not end")??;
    Ok(())
}

/// Lets go of the WAL from before now: the target has written nothing of its own in these slots yet.
pub(super) async fn advance_way_back(pair: &Pair) -> Result<()> {
    let client = sql::plain(&pair.target).await?;
    let advance = "SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())";
    client.query(advance, &[&pair.script.name()]).await.context("the slot of the way back")?;
    Ok(())
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}
