//! Guards, fences and publications on both servers, and the slot of the way back.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::timeout;
use weir_core::id::Lsn;

use super::{Pair, Side, sql};
use crate::back::walsender::Walsender;

/// A slot is made when all transactions that write now are over.
const SLOT_WAIT: Duration = Duration::from_secs(600);

/// Everything that has to be there before the first row is copied. May be run again. `owner`: whose fence is open, where there is none
/// yet.
pub(super) async fn prepare(pair: &Pair, owner: Side) -> Result<()> {
    // The target first: what is copied there is nobody's to write, from the first row on.
    for side in [Side::Target, Side::Source] {
        let client = sql::plain(pair.at(side)).await?;
        let prepare = pair.script.prepare(&pair.tables, side == owner);
        let script = format!("BEGIN; {prepare}; COMMIT");
        client.batch_execute(&script).await.with_context(|| format!("fence and guards of the {}", side.name()))?;
        for table in &pair.tables {
            let set = pair.script.set_guard(table);
            sql::patiently(&client, &set).await.with_context(|| format!("the guard of {}", table.quoted()))?;
        }
        sql::patiently(&client, &pair.script.publish(&pair.tables)).await.context("the publication")?;
    }
    Ok(())
}

/// The slot that what the target writes after the cut-over is read from. Made while statements run, for that takes as long as the
/// longest of them.
pub(super) async fn way_back(pair: &Pair) -> Result<()> {
    let slot = pair.script.name();
    let client = sql::plain(&pair.target).await?;
    sql::drop_slot(&client, &slot).await?;
    let mut server = pair.target.walsender().await?;
    make_slot(&mut server, &format!("{slot} LOGICAL pgoutput NOEXPORT_SNAPSHOT")).await?;
    Ok(())
}

/// Makes a slot of this name (maybe with TEMPORARY behind it). Its position, and a snapshot of it that can be taken until the connection
/// is told something else.
pub(super) async fn export(server: &mut Walsender, slot: &str) -> Result<(Lsn, String)> {
    let made = make_slot(server, &format!("{slot} LOGICAL pgoutput EXPORT_SNAPSHOT")).await?;
    match made.as_slice() {
        [_, Some(position), Some(snapshot), ..] => {
            Ok((Lsn::parse(position).context("the snapshot's position")?, snapshot.clone()))
        }
        _ => bail!("the server exported no snapshot"),
    }
}

async fn make_slot(server: &mut Walsender, slot: &str) -> Result<Vec<Option<String>>> {
    let made = timeout(SLOT_WAIT, server.command(&format!("CREATE_REPLICATION_SLOT {slot}"))).await;
    made.context("transactions on the server do not end")?
}

/// Lets go of the WAL from before now: the target has written nothing of its own in these slots yet, so the source has it all.
pub(super) async fn advance_way_back(pair: &Pair) -> Result<()> {
    let client = sql::plain(&pair.target).await?;
    let advance = "SELECT (end_lsn - '0/0')::int8 FROM pg_replication_slot_advance($1, pg_current_wal_lsn())";
    let row = client.query_one(advance, &[&pair.script.name()]).await.context("the slot of the way back")?;
    let reached = pair.script.end_apply(row.try_get::<_, i64>(0)? as u64);
    sql::plain(&pair.source).await?.batch_execute(&reached).await.context("how far the way back is")?;
    Ok(())
}

/// Is everything there that [`prepare`] makes?
pub(super) async fn stands(pair: &Pair, side: Side) -> Result<bool> {
    let client = sql::plain(pair.at(side)).await?;
    if sql::last(&client, &pair.script.ask_standing(pair.tables.len())).await? != "t" {
        return Ok(false);
    }
    Ok(client.query_opt(&pair.script.ask_applied(), &[]).await?.is_some())
}

impl Side {
    pub(super) fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}
