//! Indexes that a new shard gets when its rows are there: each is made once from all rows, rather than kept up row by row.
//!
//! Invariant: what others rely on is never late: whatever is unique, identifies rows or belongs to a constraint. What is missing is found
//! in the catalogues each time, so all of it may be done again after a crash; who writes the tables is not kept waiting.
//! Non-goals: tables that every shard has in full (statements read them at once), and tablespaces.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_core::lock;
use weir_core::sql::word::{quote_literal, quote_name};
use weir_core::topology::TableRules;

use crate::config::ReshardConfig;

/// Between looks whether the other one is done.
const LOOK: Duration = Duration::from_millis(500);

/// An index of a sharded table that may come late.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Late {
    pub schema: String,
    pub name: String,
    /// As [`super::schema`] names it.
    pub object: String,
    pub(super) definition: String,
    pub(super) comment: Option<String>,
    pub(super) table: String,
}

/// Those with targets for statistics, and those that tables are clustered by, bear more than their definition says.
const LATE: &str = "
SELECT n.nspname::text, x.relname::text, 'index ' || n.nspname::regnamespace::text || '.' || quote_ident(x.relname),
       pg_get_indexdef(i.indexrelid), obj_description(i.indexrelid, 'pg_class'), i.indrelid::regclass::text
FROM unnest($1::text[], $2::text[]) AS wanted(schema, name)
JOIN pg_namespace n ON n.nspname = wanted.schema
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.name AND c.relkind = 'r'
JOIN pg_index i ON i.indrelid = c.oid JOIN pg_class x ON x.oid = i.indexrelid
WHERE i.indisvalid AND NOT (i.indisunique OR i.indisexclusion OR i.indisreplident OR i.indisclustered)
  AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = x.oid AND d.deptype = 'e')
  AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = x.oid AND a.attstattarget >= 0)
ORDER BY pg_relation_size(i.indexrelid) DESC, 1, 2";

/// Those of a server, the largest first.
pub async fn late(client: &Client, rules: &TableRules) -> Result<Vec<Late>, tokio_postgres::Error> {
    let (schemas, names): (Vec<&str>, Vec<&str>) = rules.sharded().map(|(schema, name, ..)| (schema, name)).unzip();
    // With the path that makes names come out whole.
    client.batch_execute("BEGIN READ ONLY; SET LOCAL search_path = pg_catalog").await?;
    let rows = client.query(LATE, &[&schemas, &names]).await;
    client.batch_execute("ROLLBACK").await?;
    let read = |row: &tokio_postgres::Row| {
        Ok(Late {
            schema: row.try_get(0)?,
            name: row.try_get(1)?,
            object: row.try_get(2)?,
            definition: row.try_get(3)?,
            comment: row.try_get(4)?,
            table: row.try_get(5)?,
        })
    };
    rows?.iter().map(read).collect()
}

/// What `home` has of them and `target` has not, though it has the table.
pub async fn missing(home: &Client, target: &Client, rules: &TableRules) -> Result<Vec<Late>> {
    let mut missing = Vec::new();
    for index in late(home, rules).await? {
        let sql = "SELECT to_regclass($1) IS NOT NULL AND NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass($2) AND indisvalid)";
        if target.query_one(sql, &[&index.table, &index.quoted()]).await?.try_get(0)? {
            missing.push(index);
        }
    }
    Ok(missing)
}

/// Makes what is missing, and tells the planner what the tables are like. Takes as long as it takes.
pub async fn make(home: &Client, target: &Client, (rules, config): (&TableRules, &ReshardConfig)) -> Result<()> {
    while !target.query_one("SELECT pg_try_advisory_lock($1)", &[&lock::INDEXES]).await?.try_get::<_, bool>(0)? {
        tokio::time::sleep(LOOK).await;
    }
    let memory = config.index_memory.map(|bytes| format!("SET maintenance_work_mem = '{}kB'", bytes / 1024));
    let workers = config.index_workers.map(|count| format!("SET max_parallel_maintenance_workers = {count}"));
    let settings = [memory, workers].into_iter().flatten().collect::<Vec<_>>().join("; ");
    target.batch_execute(&settings).await.context("settings for indexes")?;
    for index in missing(home, target, rules).await? {
        index.make(target).await.with_context(|| format!("index {}", index.quoted()))?;
        tracing::info!(index = index.quoted(), "an index of the new shard is there");
        target.batch_execute(&format!("ANALYZE {}", index.table)).await.context("ANALYZE")?;
    }
    target.batch_execute("SELECT pg_advisory_unlock_all()").await?;
    Ok(())
}

impl Late {
    fn quoted(&self) -> String {
        format!("{}.{}", quote_name(&self.schema), quote_name(&self.name))
    }

    /// Without keeping writers out: a statement for all shards writes these tables, if no row of them.
    async fn make(&self, target: &Client) -> Result<()> {
        // What an attempt that was broken off has left is not valid and stands in the way.
        target.batch_execute(&format!("DROP INDEX CONCURRENTLY IF EXISTS {}", self.quoted())).await?;
        let rest = self.definition.strip_prefix("CREATE INDEX ").context("a definition of another kind")?;
        target.batch_execute(&format!("CREATE INDEX CONCURRENTLY {rest}")).await?;
        if let Some(comment) = &self.comment {
            let comment = format!("COMMENT ON INDEX {} IS {}", self.quoted(), quote_literal(comment));
            target.batch_execute(&comment).await?;
        }
        Ok(())
    }
}
