//! Connections of the mover's, and what they are asked of tables and slots.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio_postgres::{Client, SimpleQueryMessage, Statement};
use weir_core::reshard::script::{MovedTable, Script};
use weir_core::sql::word::quote_literal;
use weir_core::topology::spread::{Spread, names, spread_of};
use weir_core::topology::{KeySet, KeyType, Placement, TableRules};

use super::reach::Reach;
use crate::reshard::LEAVES;

/// Values must be written and read alike on both servers. Nothing that an administrator has set for clients may end what takes long.
/// What is applied must be there after a crash, whatever clients may lose: the hub's map counts on it.
pub(super) const SETTINGS: &str = "SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex'; \
                        SET timezone = 'UTC'; SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
                        SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
/// Triggers and foreign keys have done their work on the other server. Guards do not hold here.
const AS_REPLICA: &str = "SET session_replication_role = replica";
/// Others queue behind who waits for a lock, so it is never waited for longer.
const LOCK_WAIT: Duration = Duration::from_millis(100);
const LOCK_ATTEMPTS: u32 = 600;

/// The same of a replication connection.
pub(super) const WALSENDER_SETTINGS: [(&str, &str); 6] = [
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("TimeZone", "UTC"),
    ("client_encoding", "UTF8"),
];

const TABLES: &str = "
SELECT n.nspname::text, c.relname::text, array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated = ''),
       bool_and(a.atttypid < 16384), c.relkind::text
{leaves}
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
GROUP BY 1, 2, c.oid, c.relkind ORDER BY 1, 2";

pub(super) async fn plain(server: &Reach) -> Result<Client> {
    server.open().await
}

/// One whose writes are nobody's news.
pub(super) async fn as_replica(server: &Reach) -> Result<Client> {
    let client = plain(server).await?;
    let context = "weir's account may not set session_replication_role (superuser, or GRANT SET ON PARAMETER session_replication_role)";
    client.batch_execute(AS_REPLICA).await.context(context)?;
    Ok(client)
}

/// The tables that have rows of these keys, as a server has them.
pub(super) async fn tables(client: &Client, rules: &TableRules, keys: &KeySet) -> Result<Vec<MovedTable>> {
    let mut tables = Vec::new();
    for wanted in spread_of(rules, keys) {
        tables.extend(leaves(client, wanted).await?);
    }
    Ok(tables)
}

/// The reference tables; they have no key.
pub(super) async fn reference_tables(client: &Client, rules: &TableRules) -> Result<Vec<MovedTable>> {
    let mut tables = Vec::new();
    for (schema, name, placement) in rules.iter() {
        if *placement == Placement::Reference {
            let wanted = Spread { schema, name, key: "", key_type: KeyType::Int, by_slot: false };
            tables.extend(leaves(client, wanted).await?);
        }
    }
    Ok(tables)
}

/// The tables that a declared one's rows are in: itself, or its partitions. None, if it is not there (yet).
async fn leaves(client: &Client, wanted: Spread<'_>) -> Result<Vec<MovedTable>> {
    let sql = TABLES.replace("{leaves}", LEAVES);
    let mut tables = Vec::new();
    let [schemas, names, keys] = names(std::iter::once(wanted));
    for row in client.query(&sql, &[&schemas, &names, &keys]).await? {
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        if row.try_get::<_, &str>(4)? != "r" {
            bail!("{schema}.{name} is no table of this server's own, so its rows cannot be moved");
        }
        tables.push(MovedTable {
            schema,
            name,
            key: wanted.key.to_owned(),
            key_type: wanted.key_type,
            columns: row.try_get::<_, Option<Vec<String>>>(2)?.unwrap_or_default(),
            binary: row.try_get(3)?,
            by_slot: wanted.by_slot,
        });
    }
    Ok(tables)
}

/// Reads as of a snapshot that another connection has exported.
pub(super) async fn begin_snapshot(client: &Client, snapshot: &str) -> Result<()> {
    let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{snapshot}'");
    client.batch_execute(&begin).await.context("the snapshot")
}

/// Pages of a table, of so many bytes.
pub(super) async fn pages(client: &Client, table: &MovedTable) -> Result<(u64, u64)> {
    let sql = format!(
        "SELECT pg_relation_size({}::regclass), current_setting('block_size')::int8",
        quote_literal(&table.quoted())
    );
    let row = client.query_one(&sql, &[]).await?;
    let (bytes, page) = (row.try_get::<_, i64>(0)?.max(0) as u64, row.try_get::<_, i64>(1)?.max(1) as u64);
    Ok((bytes / page, page))
}

/// What a table has that must be alike on both servers, and whether a move minds it.
const DESCRIBED: &str = "
SELECT format('%I.%I', n.nspname, c.relname),
    array(SELECT concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod), a.attgenerated::text) FROM pg_attribute a
          WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname),
    EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = $4 AND t.tgenabled = 'O')
    AND EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE r.prrelid = c.oid AND p.pubname = $5)
{leaves}";

/// Asks for tables as [`described`] has them; once asked it is planned, where the server can keep a plan.
pub(super) async fn prepare_described(client: &Client) -> Result<Statement> {
    let keep_plan = "SELECT set_config('plan_cache_mode', 'force_generic_plan', false) \
                     WHERE current_setting('server_version_num')::int >= 120000";
    client.batch_execute(keep_plan).await?;
    Ok(client.prepare(&DESCRIBED.replace("{leaves}", LEAVES)).await?)
}

/// Columns of each table that has rows of the keys, and whether it is guarded and published.
pub(super) async fn described(
    (client, prepared): (&Client, &Statement),
    rules: &TableRules,
    script: &Script,
) -> Result<BTreeMap<String, (Vec<String>, bool)>> {
    let [schemas, names, keys] = names(spread_of(rules, script.keys()));
    let rows = client.query(prepared, &[&schemas, &names, &keys, &script.trigger(), &script.name()]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, (row.try_get(1)?, row.try_get(2)?)))).collect()
}

/// The first value of the last row of a text.
pub(super) async fn last(client: &Client, sql: &str) -> Result<String> {
    let rows = client.simple_query(sql).await?.into_iter().rev();
    let mut rows = rows.filter_map(|one| if let SimpleQueryMessage::Row(row) = one { Some(row) } else { None });
    Ok(rows.next().context("no row")?.get(0).unwrap_or_default().to_owned())
}

/// Does what waits for a lock that writers hold, in short attempts, so that nobody queues behind it for long. Statements without BEGIN and
/// COMMIT, which are one transaction all the same.
pub(super) async fn patiently(client: &Client, sql: &str) -> Result<()> {
    let millis = LOCK_WAIT.as_millis();
    for attempt in 1.. {
        let done = client.batch_execute(&format!("SET lock_timeout = {millis}; {sql}; SET lock_timeout = 0")).await;
        match done {
            Ok(()) => return Ok(()),
            Err(error) if error.code().is_some_and(|code| code.code() == "55P03") && attempt < LOCK_ATTEMPTS => {
                tokio::time::sleep(LOCK_WAIT).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Why what a slot still gives cannot go on where the other side stands; `None`: it can. `applied`: that side has all below it.
///
/// A slot is a server's own: one that is promoted has none. And a server that is promoted may lack what its predecessor had applied and
/// told the slot of, which is never sent again.
pub(super) async fn broken(client: &Client, slot: &str, applied: i64) -> Result<Option<&'static str>> {
    let sql = "SELECT wal_status, (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = $1";
    let Some(row) = client.query_opt(sql, &[&slot]).await? else {
        return Ok(Some("its replication slot is gone, as after a promotion"));
    };
    if row.try_get::<_, Option<&str>>(0)? == Some("lost") {
        return Ok(Some("its replication slot needed WAL that the server has thrown away (max_slot_wal_keep_size)"));
    }
    let confirmed: Option<i64> = row.try_get(1)?;
    Ok(confirmed.filter(|confirmed| *confirmed > applied).map(
        |_| "the other server lacks what it had applied before, as after a promotion of a replica that was behind",
    ))
}

/// Takes a replication slot away, and whoever reads it.
pub(super) async fn drop_slot(client: &Client, slot: &str) -> Result<()> {
    for _ in 0..50 {
        let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        let Some(row) = client.query_opt(sql, &[&slot]).await? else { return Ok(()) };
        match row.try_get::<_, Option<i32>>(0)? {
            Some(pid) => {
                client.execute("SELECT pg_terminate_backend($1)", &[&pid]).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None => match client.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await {
                Ok(_) => return Ok(()),
                Err(error) if error.code().is_some_and(|code| matches!(code.code(), "55006" | "42704")) => {}
                Err(error) => return Err(error.into()),
            },
        }
    }
    bail!("replication slot {slot} is in use and does not become free")
}

/// Ends whoever reads a slot: another mover that has lost the hub, maybe.
pub(super) async fn free_slot(client: &Client, slot: &str) -> Result<()> {
    let sql = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL";
    for _ in 0..50 {
        if client.query(sql, &[&slot]).await?.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("replication slot {slot} is in use and does not become free")
}
