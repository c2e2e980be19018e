//! Finishing distributed transactions whose coordinator is gone.
//!
//! Invariant: the decision row in `weir.txlog` on the anchor shard is the truth. Who finds a prepared transaction writes an
//! abort row for it if there is no row yet (waiting behind a commit that is under way), then obeys the row. Any number of
//! proxies may do so at once; the outcome is the same.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_core::id::ShardId;

use crate::back::connect::Login;
use crate::database::Database;

const EVERY: Duration = Duration::from_secs(2);
/// Younger ones are left to their coordinator, which is probably alive.
const AGE_S_MIN: f64 = 3.0;
/// Decisions are kept at least this long after they were made, and until nothing prepared refers to them.
const KEEP: &str = "10 minutes";
const PATIENCE: Duration = Duration::from_secs(10);

const SCHEMA: &str = "
CREATE SCHEMA IF NOT EXISTS weir;
CREATE TABLE IF NOT EXISTS weir.txlog (
    gid text PRIMARY KEY,
    decision \"char\" NOT NULL CHECK (decision IN ('c', 'a')),
    at timestamptz NOT NULL DEFAULT now());
GRANT USAGE ON SCHEMA weir TO PUBLIC;
GRANT INSERT ON weir.txlog TO PUBLIC";

/// Makes the decision log on every shard. Needed before the first distributed transaction.
pub async fn prepare(logins: &[Login]) -> Result<()> {
    for login in logins {
        let client = crate::control::connect(login).await?;
        // Several proxies may start at once; CREATE … IF NOT EXISTS alone races with itself.
        let script = format!("BEGIN; SELECT pg_advisory_xact_lock(7765697201); {SCHEMA}; COMMIT");
        client.batch_execute(&script).await.with_context(|| format!("weir.txlog on {}:{}", login.host, login.port))?;
    }
    Ok(())
}

/// Looks for leftovers for ever; dropping the future ends it.
pub async fn run(db: Arc<Database>, logins: Vec<Login>) {
    loop {
        tokio::time::sleep(EVERY).await;
        match tokio::time::timeout(PATIENCE, sweep(&db, &logins)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => {
                tracing::info!(database = %db.name, count, "finished distributed transactions left in doubt");
            }
            Ok(Err(error)) => {
                tracing::debug!(database = %db.name, "looking for prepared transactions failed: {error:#}");
            }
            Err(_) => tracing::debug!(database = %db.name, "looking for prepared transactions took too long"),
        }
    }
}

async fn sweep(db: &Database, logins: &[Login]) -> Result<usize> {
    let mut clients = Vec::with_capacity(logins.len());
    for login in logins {
        clients.push(crate::control::connect(login).await?);
    }
    let mut finished = 0;
    let mut live = Vec::new();
    for client in &clients {
        let rows = client
            .query(
                "SELECT gid, extract(epoch FROM now() - prepared)::float8 FROM pg_prepared_xacts
                 WHERE database = current_database() AND gid LIKE 'weir\\_%'",
                &[],
            )
            .await?;
        for row in rows {
            let (gid, age_s): (String, f64) = (row.get(0), row.get(1));
            live.push(gid.clone());
            if age_s >= AGE_S_MIN && finish(db, &clients, client, &gid).await? {
                finished += 1;
            }
        }
    }
    for client in &clients {
        client
            .execute(
                &format!("DELETE FROM weir.txlog WHERE at < now() - interval '{KEEP}' AND gid <> ALL($1)"),
                &[&live],
            )
            .await?;
    }
    Ok(finished)
}

/// Obeys the anchor's decision, making it an abort if there is none.
async fn finish(db: &Database, clients: &[Client], client: &Client, gid: &str) -> Result<bool> {
    let Some(anchor) = anchor_of(db, gid) else {
        tracing::warn!(%gid, "prepared transaction of a shard that is not known; left alone");
        return Ok(false);
    };
    let anchor = &clients[usize::from(anchor.0)];
    anchor.execute("INSERT INTO weir.txlog (gid, decision) VALUES ($1, 'a') ON CONFLICT DO NOTHING", &[&gid]).await?;
    let row = anchor.query_one("SELECT decision = 'c' FROM weir.txlog WHERE gid = $1", &[&gid]).await?;
    let verb = if row.get(0) { "COMMIT" } else { "ROLLBACK" };
    // The name was made by weir: letters, digits, '-' and '_' only, or it would not have an anchor.
    match client.batch_execute(&format!("{verb} PREPARED '{gid}'")).await {
        Ok(()) => Ok(true),
        // Somebody else was quicker.
        Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_OBJECT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The shard named in `weir_<anchor>_<epoch>_<random>`.
fn anchor_of(db: &Database, gid: &str) -> Option<ShardId> {
    if !gid.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')) {
        return None;
    }
    let mut parts = gid.strip_prefix("weir_")?.rsplitn(3, '_');
    let (_random, _epoch, anchor) = (parts.next()?, parts.next()?, parts.next()?);
    let found = db.shards.iter().position(|shard| crate::exec::commit::plain_name(&shard.name) == anchor)?;
    Some(ShardId(found as u16))
}
