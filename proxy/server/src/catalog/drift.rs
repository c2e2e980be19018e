//! Reading what the shards have of the declared tables, to compare it.
//!
//! Invariant: only what DDL makes is read, never rows or positions of sequences; nothing is changed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_core::id::ShardId;
use weir_core::topology::TableRules;
use weir_core::topology::drift::{Drift, Object, Objects, drift};

use crate::back::connect::Login;
use crate::database::Database;

const EVERY: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(20);

/// Global tables are on one shard and cannot differ. An index that a constraint made is told by the constraint.
const OBJECTS: &str = "
WITH t AS (
    SELECT c.oid, c.relkind, n.nspname || '.' || c.relname AS name
    FROM unnest($1::text[], $2::text[]) AS wanted(schema, name)
    JOIN pg_namespace n ON n.nspname = wanted.schema
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name)
SELECT t.name, 'table', t.name, t.relkind::text FROM t
UNION ALL
SELECT t.name, 'column', a.attname::text, concat_ws(' ', format_type(a.atttypid, a.atttypmod),
       CASE WHEN a.attnotnull THEN 'NOT NULL' END,
       'DEFAULT ' || pg_get_expr(f.adbin, f.adrelid),
       'IDENTITY ' || nullif(a.attidentity::text, ''), 'GENERATED ' || nullif(a.attgenerated::text, ''),
       'COLLATE ' || quote_ident(o.collname))
FROM t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
LEFT JOIN pg_collation o ON o.oid = a.attcollation
UNION ALL
SELECT t.name, 'index', x.relname::text,
       pg_get_indexdef(i.indexrelid) || CASE WHEN i.indisvalid THEN '' ELSE ' (INVALID)' END
FROM t JOIN pg_index i ON i.indrelid = t.oid JOIN pg_class x ON x.oid = i.indexrelid
WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = i.indrelid)
UNION ALL
SELECT t.name, 'constraint', k.conname::text, pg_get_constraintdef(k.oid)
FROM t JOIN pg_constraint k ON k.conrelid = t.oid WHERE k.contype <> 'n'
UNION ALL
SELECT t.name, 'partition', n.nspname || '.' || c.relname, pg_get_expr(c.relpartbound, c.oid)
FROM t CROSS JOIN LATERAL pg_partition_tree(t.oid) AS p JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE t.relkind = 'p' AND p.level > 0
UNION ALL
SELECT t.name, 'sequence', s.relname::text,
       concat_ws(' ', format_type(q.seqtypid, NULL), 'INCREMENT', q.seqincrement, 'MIN', q.seqmin, 'MAX', q.seqmax,
                 CASE WHEN q.seqcycle THEN 'CYCLE' END)
FROM t JOIN pg_depend d ON d.refobjid = t.oid AND d.refclassid = 'pg_class'::regclass AND d.classid = 'pg_class'::regclass
JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_sequence q ON q.seqrelid = s.oid";

/// What one shard has of the declared tables.
pub async fn objects(client: &Client, rules: &TableRules) -> Result<Objects> {
    let declared = || rules.iter().filter(|(_, _, placement)| **placement != weir_core::topology::Placement::Global);
    let schemas: Vec<&str> = declared().map(|(schema, _, _)| schema).collect();
    let names: Vec<&str> = declared().map(|(_, name, _)| name).collect();
    let rows = client.query(OBJECTS, &[&schemas, &names]).await?;
    let read = |row: &tokio_postgres::Row| {
        let object = Object { table: row.try_get(0)?, kind: row.try_get(1)?, name: row.try_get(2)? };
        Ok((object, row.try_get(3)?))
    };
    rows.iter().map(read).collect()
}

/// What was compared last.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// The shards, in the order of each drift's definitions.
    pub shards: Vec<ShardId>,
    pub found: Vec<Drift>,
}

/// Asks every shard, and compares.
pub async fn read(logins: &[Login], rules: &TableRules) -> Result<Vec<Drift>> {
    let mut shards = Vec::with_capacity(logins.len());
    for login in logins {
        let client = crate::control::connect(login).await?;
        shards.push(objects(&client, rules).await.with_context(|| login.route.endpoint().to_string())?);
    }
    Ok(drift(&shards))
}

/// Keeps [`Database::drift`] up to date for ever; dropping the future ends it.
pub async fn watch(db: Arc<Database>) {
    let mut told = 0;
    loop {
        let rules = Arc::clone(&db.view().rules);
        let (shards, logins): (Vec<ShardId>, Vec<Login>) = db.primaries.active().into_iter().unzip();
        match tokio::time::timeout(PATIENCE, read(&logins, &rules)).await {
            Ok(Ok(found)) => {
                if found.len() > told {
                    tracing::warn!(database = %db.name, objects = found.len(), "the shards' schemas differ; SHOW DRIFT says where");
                }
                told = found.len();
                *db.drift.lock() = Compared { shards, found };
            }
            Ok(Err(error)) => tracing::debug!(database = %db.name, "comparing the shards' schemas failed: {error:#}"),
            Err(_) => tracing::debug!(database = %db.name, "comparing the shards' schemas took too long"),
        }
        tokio::time::sleep(EVERY).await;
    }
}
