//! Finishing distributed transactions whose coordinator is gone.
//!
//! Invariant: the decision row in `weir.txlog` on the anchor shard is the truth. Who finds a prepared transaction writes an
//! abort row for it if there is no row yet (waiting behind a commit that is under way), then obeys the row. Any number of
//! proxies may do so at once; the outcome is the same. Sessions write decisions under their clients' own roles, so every role may
//! insert rows; one counts only if it knows the number whose digest the name ends with, or is ours.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::id::ShardId;
use weir_core::lock::MAKE_SCHEMA;
use weir_core::sql::word::quote_name;

use crate::back::connect::Login;
use crate::database::{Database, Primaries};
use crate::fresh::Announced;

/// With [`AGE_S_MIN`], nothing stays in doubt for more than five seconds where the shards can be reached.
const EVERY: Duration = Duration::from_secs(1);
/// Old decisions are looked for once in so many rounds.
const FORGET_EVERY: u32 = 60;
/// Younger ones are left to their coordinator, which is probably alive.
const AGE_S_MIN: f64 = 3.0;
/// Decisions are kept at least this long after they were made, and until nothing prepared refers to them.
const KEEP: &str = "10 minutes";
const PATIENCE: Duration = Duration::from_secs(10);

const PREPARED: &str = "
SELECT gid, extract(epoch FROM now() - prepared)::float8, owner::text FROM pg_prepared_xacts
WHERE database = current_database() AND gid LIKE 'weir\\_%'";

/// A participant of a distributed transaction that waits for its decision.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub shard: ShardId,
    pub gid: String,
    pub age_s: f64,
    pub owner: String,
}

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS weir.txlog (
    gid text NOT NULL,
    decision \"char\" NOT NULL DEFAULT 'c' CHECK (decision IN ('c', 'a')),
    secret bytea,
    at timestamptz NOT NULL DEFAULT now());
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'weir.txlog'::regclass AND attname = 'parts') THEN
        ALTER TABLE weir.txlog ADD COLUMN parts text CHECK (parts ~ '^[A-Za-z0-9-]+:[0-9]{1,18}(,[A-Za-z0-9-]+:[0-9]{1,18})*$'),
            ALTER COLUMN at SET DEFAULT clock_timestamp();
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS weir.map (epoch bigint NOT NULL);
INSERT INTO weir.map SELECT 0 WHERE NOT EXISTS (SELECT FROM weir.map);
GRANT USAGE ON SCHEMA weir TO PUBLIC;
GRANT INSERT (gid, secret, parts) ON weir.txlog TO PUBLIC";

/// Is a row of the log its coordinator's decision, or recovery's?
pub const COUNTS: &str = "(decision = 'a' OR encode(substr(sha256(secret), 1, 16), 'hex') = right(gid, 32))";

/// Makes the decision log on every shard. Needed before the first distributed transaction.
pub async fn prepare(logins: &[Login]) -> Result<()> {
    for login in logins {
        let client = crate::control::connect(login).await?;
        let unique = format!("CREATE UNIQUE INDEX IF NOT EXISTS txlog_decision ON weir.txlog (gid) WHERE {COUNTS}");
        let script = format!("BEGIN; {MAKE_SCHEMA}; {SCHEMA}; {unique}; COMMIT");
        client.batch_execute(&script).await.with_context(|| format!("weir.txlog on {}", login.route.endpoint()))?;
    }
    Ok(())
}

/// Looks for leftovers for ever; dropping the future ends it.
pub async fn run(db: Arc<Database>) {
    let mut sweeper = Sweeper { primaries: Arc::clone(&db.primaries), clients: BTreeMap::new(), rounds: 0 };
    loop {
        tokio::time::sleep(EVERY).await;
        match tokio::time::timeout(PATIENCE, sweeper.sweep(&db)).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(database = %db.name, count, "finished distributed transactions left in doubt"),
            Err(_) => {
                tracing::debug!(database = %db.name, "looking for prepared transactions took too long");
                sweeper.clients.clear();
            }
        }
    }
}

/// One connection per shard, kept from round to round.
struct Sweeper {
    primaries: Arc<Primaries>,
    clients: BTreeMap<ShardId, Link>,
    rounds: u32,
}

struct Link {
    client: Client,
    /// The server process.
    pid: i32,
}

/// A COMMIT PREPARED under way. When nobody waits for it any more, its outcome is not known.
struct Commits {
    announced: Announced,
    pid: i32,
}

impl Drop for Commits {
    fn drop(&mut self) {
        self.announced.unknown(|_| self.pid);
    }
}

impl Sweeper {
    /// One round: gives how many were finished. A shard that cannot be reached keeps nobody else's from being finished.
    async fn sweep(&mut self, db: &Arc<Database>) -> usize {
        let mut found = Vec::new();
        let mut complete = true;
        let shards: Vec<ShardId> = self.primaries.lately_active().into_iter().map(|(shard, _)| shard).collect();
        self.clients.retain(|shard, _| shards.contains(shard));
        for shard in shards {
            match self.prepared_on(shard).await {
                Ok(rows) => found.extend(rows),
                Err(error) => {
                    tracing::debug!(database = %db.name, %shard, "looking for prepared transactions failed: {error:#}");
                    self.clients.remove(&shard);
                    complete &= !self.primaries.is_active(shard);
                }
            }
        }
        let mut finished = 0;
        for prepared in found.iter().filter(|prepared| prepared.age_s >= AGE_S_MIN) {
            match self.finish(db, prepared).await {
                Ok(done) => finished += usize::from(done),
                Err(error) => tracing::debug!(gid = %prepared.gid, "cannot be finished yet: {error:#}"),
            }
        }
        self.rounds = self.rounds.wrapping_add(1);
        if complete && self.rounds.is_multiple_of(FORGET_EVERY) {
            let live: Vec<&str> = found.iter().map(|prepared| &*prepared.gid).collect();
            self.forget(&live).await;
        }
        *db.prepared.lock() = found;
        finished
    }

    async fn client(&mut self, shard: ShardId) -> Result<&Link> {
        if self.clients.get(&shard).is_none_or(|link| link.client.is_closed()) {
            let client = crate::control::connect(self.primaries.of(shard)).await?;
            let pid = client.query_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)?;
            self.clients.insert(shard, Link { client, pid });
        }
        self.clients.get(&shard).context("just connected")
    }

    async fn prepared_on(&mut self, shard: ShardId) -> Result<Vec<Prepared>> {
        let rows = self.client(shard).await?.client.query(PREPARED, &[]).await?;
        let read = |row: &tokio_postgres::Row| {
            let (gid, age_s, owner) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            Ok(Prepared { shard, gid, age_s, owner })
        };
        rows.iter().map(read).collect()
    }

    /// Obeys the anchor's decision, making it an abort if there is none.
    async fn finish(&mut self, db: &Arc<Database>, prepared: &Prepared) -> Result<bool> {
        let gid = &prepared.gid;
        let Some(anchor) = anchor_of(db, gid) else {
            tracing::warn!(%gid, "prepared transaction of a shard that is not known; left alone");
            return Ok(false);
        };
        let anchor = &self.client(anchor).await?.client;
        anchor
            .execute("INSERT INTO weir.txlog (gid, decision) VALUES ($1, 'a') ON CONFLICT DO NOTHING", &[&gid])
            .await?;
        let sql = format!("SELECT decision = 'c' FROM weir.txlog WHERE gid = $1 AND {COUNTS}");
        let row = anchor.query_one(&sql, &[&gid]).await?;
        let verb = if row.try_get(0)? { "COMMIT" } else { "ROLLBACK" };
        // The name was made by weir: letters, digits, '-' and '_' only, or it would not have an anchor.
        // Its session's announcement ended with its connection, and what it wrote is known to nobody any more.
        let Link { client, pid } = self.client(prepared.shard).await?;
        let mut commits = Commits { announced: Announced::default(), pid: *pid };
        if verb == "COMMIT" && db.tracks_freshness() {
            let anything = Dependencies::from_slice(&[Dependency::Anything]);
            let told = commits.announced.announce(db, (prepared.shard, *pid), &anything).await;
            told.map_err(|error| anyhow!("{}", error.message))?;
        }
        let done = finish_as(client, &prepared.owner, &format!("{verb} PREPARED '{gid}'")).await;
        commits.announced.publish();
        match done {
            Ok(()) => Ok(true),
            // Somebody else was quicker.
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes old decisions that nothing prepared refers to.
    async fn forget(&self, live: &[&str]) {
        let sql = format!("DELETE FROM weir.txlog WHERE at < now() - interval '{KEEP}' AND gid <> ALL($1)");
        for Link { client, .. } in self.clients.values() {
            if let Err(error) = client.execute(&sql, &[&live]).await {
                tracing::debug!("old decisions stay: {error}");
            }
        }
    }
}

/// Finishes a transaction that this account has not prepared: superusers may, and who may take the part of its owner.
async fn finish_as(client: &Client, owner: &str, sql: &str) -> Result<(), tokio_postgres::Error> {
    match client.batch_execute(sql).await {
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            client.batch_execute(&format!("SET ROLE {}", quote_name(owner))).await?;
            let done = client.batch_execute(sql).await;
            client.batch_execute("RESET ROLE").await?;
            done
        }
        done => done,
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
