//! The questions that one server is asked before anything moves.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use tokio_postgres::Client;
use weir_core::id::Slot;
use weir_core::reshard::survey::{Rows, ServerSaid, TableSaid};
use weir_core::sql::word::quote_name;
use weir_core::topology::spread::{names, spread};
use weir_core::topology::{KeySet, KeyType, TableRules, in_sql};

use super::LEAVES;
use crate::back::connect::Login;
use crate::catalog::drift;

/// Tables with more rows than this are counted in a part of their pages.
const COUNTED_MAX: f64 = 1_000_000.0;
/// Rows that such a part should have.
const SAMPLE_ROWS: f64 = 300_000.0;
/// Bytes of the largest table that are read to learn how fast it can be.
const TRIAL_BYTES: usize = 4 << 20;

/// `own` is the role and everybody it is a member of: who may do with a table what its owner may.
const SERVER: &str = "
SELECT current_setting('server_version_num')::int4, current_setting('wal_level'),
       current_setting('max_replication_slots')::int4 - (SELECT count(*) FROM pg_replication_slots)::int4,
       current_setting('max_wal_senders')::int4 - (SELECT count(*) FROM pg_stat_get_wal_senders())::int4,
       (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user),
       has_database_privilege(current_database(), 'CREATE')
       AND coalesce(has_schema_privilege(to_regnamespace('weir'), 'CREATE'), true),
       (SELECT coalesce(array_agg(extname::text), '{}') FROM pg_extension),
       (SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()),
       (SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8 FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND datname = current_database()),
       (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()),
       current_setting('max_prepared_transactions')::int4";

const LOOSE: &str = "
SELECT format('%s.%s.%s', wanted.schema, wanted.name, wanted.col)
FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted(schema, name, col)
     JOIN pg_class c ON c.relname = wanted.name AND c.relnamespace = to_regnamespace(quote_ident(wanted.schema))
     JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = wanted.col
WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
                  AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
ORDER BY 1";

const FOREIGN: &str = "
SELECT format('%s.%s', n.nspname, c.relname) {leaves}
WHERE NOT pg_has_role(current_user, c.relowner, 'USAGE') ORDER BY 1";

const TABLES: &str = "
SELECT wanted.schema, wanted.name, n.nspname::text, c.relname::text, c.relpersistence = 'u',
       c.relreplident = 'f' OR EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid
           AND (i.indisreplident OR c.relreplident = 'd' AND i.indisprimary)),
       greatest(c.reltuples, 0)::float8, pg_table_size(c.oid)::float8,
       array(SELECT x.relname::text FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
             WHERE i.indrelid = c.oid AND i.indisunique AND NOT EXISTS (
                 SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = wanted.key AND a.attnum = ANY(i.indkey))
             ORDER BY 1),
       c.relkind <> 'r' OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid)
{leaves} ORDER BY 3, 4";

/// What one server said.
pub struct Answers {
    pub said: ServerSaid,
    pub tables: Vec<TableSaid>,
    pub rate: Option<f64>,
}

/// Asks one server; its rows only where some are to be given away.
pub async fn server(login: &Login, rules: &TableRules, given: Option<&KeySet>) -> Result<Answers> {
    let client = crate::control::connect(login).await?;
    let row = client.query_one(SERVER, &[]).await.context("its settings")?;
    let extensions: Vec<String> = row.try_get(6)?;
    let said = ServerSaid {
        version: row.try_get(0)?,
        wal_level: row.try_get(1)?,
        slots_free: row.try_get(2)?,
        senders_free: row.try_get(3)?,
        may_replicate: row.try_get(4)?,
        may_create: row.try_get(5)?,
        may_apply: client
            .batch_execute("SET session_replication_role = replica; RESET session_replication_role")
            .await
            .is_ok(),
        foreign: foreign(&client, rules).await.context("the owners of its tables")?,
        extensions: extensions.into_iter().collect(),
        encoding: row.try_get(7)?,
        oldest_transaction: row.try_get(8)?,
        prepared: row.try_get(9)?,
        preparable: row.try_get(10)?,
        loose: loose(&client, rules).await.context("its unique columns")?,
        objects: drift::objects(&client, rules).await.context("its schema")?,
    };
    let (mut tables, mut rate) = (Vec::new(), None);
    if let Some(given) = given {
        let mut largest = (0.0, String::new());
        let foreign = &said.foreign;
        for sharded in sharded(&client, rules).await? {
            let Sharded { mut said, key, key_type, rows, bytes, quoted } = sharded;
            if foreign.contains(&said.name) || said.is_strange {
                // It may not even be read.
                tables.push(said);
                continue;
            }
            if bytes > largest.0 {
                largest = (bytes, quoted.clone());
            }
            let table = Counted { table: &quoted, key: &key, key_type, rows };
            (said.rows, said.keys) = table.count(&client, given).await.with_context(|| said.name.clone())?;
            said.is_sampled = table.percent().is_some();
            tables.push(said);
        }
        rate = trial(&client, &largest.1).await?;
    }
    Ok(Answers { said, tables, rate })
}

async fn foreign(client: &Client, rules: &TableRules) -> Result<Vec<String>> {
    let [schemas, names, keys] = names(spread(rules));
    let rows = client.query(&FOREIGN.replace("{leaves}", LEAVES), &[&schemas, &names, &keys]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

async fn loose(client: &Client, rules: &TableRules) -> Result<Vec<String>> {
    let (mut schemas, mut names, mut columns) = (Vec::new(), Vec::new(), Vec::new());
    for (schema, table, ..) in rules.sharded() {
        for column in rules.unique_columns(schema, table) {
            schemas.push(schema);
            names.push(table);
            columns.push(&**column);
        }
    }
    let rows = client.query(LOOSE, &[&schemas, &names, &columns]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

struct Sharded {
    said: TableSaid,
    key: String,
    key_type: KeyType,
    /// As the planner knows it.
    rows: f64,
    bytes: f64,
    quoted: String,
}

async fn sharded(client: &Client, rules: &TableRules) -> Result<Vec<Sharded>> {
    let declared: BTreeMap<_, _> = spread(rules).map(|table| ((table.schema, table.name), table)).collect();
    let [schemas, names, keys] = names(spread(rules));
    let rows = client.query(&TABLES.replace("{leaves}", LEAVES), &[&schemas, &names, &keys]).await;
    let mut found = Vec::new();
    for row in &rows.context("its tables")? {
        let Some(table) = declared.get(&(row.try_get(0)?, row.try_get(1)?)) else { continue };
        let (schema, name): (&str, &str) = (row.try_get(2)?, row.try_get(3)?);
        let said = TableSaid {
            name: format!("{schema}.{name}"),
            unlogged: row.try_get(4)?,
            has_identity: row.try_get(5)?,
            unique_elsewhere: row.try_get(8)?,
            is_strange: row.try_get(9)?,
            ..TableSaid::default()
        };
        let quoted = format!("{}.{}", quote_name(schema), quote_name(name));
        let (rows, bytes) = (row.try_get(6)?, row.try_get(7)?);
        found.push(Sharded { said, key: quote_name(table.key), key_type: table.key_type, rows, bytes, quoted });
    }
    Ok(found)
}

/// A table whose rows are counted, large ones in a part of their pages.
struct Counted<'a> {
    table: &'a str,
    key: &'a str,
    key_type: KeyType,
    /// As the planner knows it.
    rows: f64,
}

impl Counted<'_> {
    fn percent(&self) -> Option<f64> {
        (self.rows > COUNTED_MAX).then(|| (SAMPLE_ROWS / self.rows * 100.0).max(0.01))
    }

    /// Rows and bytes by slot, and by hash of the keys that are given away or kept on their own.
    async fn count(&self, client: &Client, given: &KeySet) -> Result<(BTreeMap<Slot, Rows>, BTreeMap<u64, Rows>)> {
        let key = format!("t.{}", self.key);
        let by_slot = self.sums(client, &format!("({})::int8", in_sql::slot(&key, self.key_type)), "").await?;
        let slot = |number: i64| Slot::new(u16::try_from(number).ok()?);
        let by_slot = by_slot.into_iter().filter_map(|(number, rows)| Some((slot(number)?, rows))).collect();
        let single: Vec<String> =
            given.beside().chain(given.except()).map(|hash| format!("'{}'", hash as i64)).collect();
        if single.is_empty() {
            return Ok((by_slot, BTreeMap::new()));
        }
        let hash = in_sql::hash(&key, self.key_type);
        let by_key = self.sums(client, &hash, &format!("AND {hash} IN ({})", single.join(", "))).await?;
        Ok((by_slot, by_key.into_iter().map(|(hash, rows)| (hash as u64, rows)).collect()))
    }

    async fn sums(&self, client: &Client, group: &str, only: &str) -> Result<Vec<(i64, Rows)>> {
        let percent = self.percent();
        let sample = percent.map_or_else(String::new, |percent| format!(" TABLESAMPLE SYSTEM ({percent:.4})"));
        let sql = format!(
            "SELECT {group}, count(*)::float8, sum(pg_column_size(t.*))::float8 FROM {} AS t{sample} \
             WHERE t.{} IS NOT NULL {only} GROUP BY 1",
            self.table, self.key
        );
        let times = percent.map_or(1.0, |percent| 100.0 / percent);
        let rows = client.query(&sql, &[]).await?;
        let read = |row: &tokio_postgres::Row| {
            let counted = Rows { rows: row.try_get::<_, f64>(1)? * times, bytes: row.try_get::<_, f64>(2)? * times };
            Ok((row.try_get(0)?, counted))
        };
        rows.iter().map(read).collect()
    }
}

/// Bytes per second, by reading the start of a table as a move would. `None`: there is nothing to read.
async fn trial(client: &Client, table: &str) -> Result<Option<f64>> {
    if table.is_empty() {
        return Ok(None);
    }
    let began = Instant::now();
    // Bounded by the server: a stream that is given up would have to be read to its end.
    let rows = format!(
        "COPY (SELECT * FROM {table} LIMIT greatest(1, (SELECT ({TRIAL_BYTES} / greatest(pg_table_size(c.oid) / \
         greatest(c.reltuples, 1), 1))::int8 FROM pg_class c WHERE c.oid = '{}'::regclass))) TO STDOUT (FORMAT binary)",
        table.replace('\'', "''")
    );
    let mut stream = std::pin::pin!(client.copy_out(&rows).await?);
    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        bytes += piece?.len();
    }
    let seconds = began.elapsed().as_secs_f64();
    Ok((bytes > 0 && seconds > 0.0).then(|| bytes as f64 / seconds))
}
