//! What the shards have of a globally unique column: does it fit, are its triggers there, how far had weir come?

use anyhow::Result;
use weir_core::sql::facts::family;
use weir_core::unique::{Rule, script};

use super::Shards;

/// How far weir has come with a column, as the home shard keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Nothing is there yet.
    New,
    Building,
    Valid,
    Failed,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::New => "new",
            State::Building => "building",
            State::Valid => "valid",
            State::Failed => "failed",
        }
    }
}

/// The SQL types of a column and of its table's shard key, as Postgres writes them.
pub struct Types {
    pub column: String,
    pub key: String,
}

/// What the shards say together.
pub enum Seen {
    /// The table is not there.
    NoTable,
    /// Why it cannot be kept unique.
    Unfit(String),
    /// `noted`: every shard has all triggers, and they fire.
    Fit { types: Types, noted: bool, state: State },
}

const COLUMN: &str = "
SELECT c.relkind = 'r' AND c.relpersistence = 'p' AND NOT c.relispartition AND NOT EXISTS (
           SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent)),
       a.oid, a.name, a.deterministic, k.name,
       (SELECT count(*) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace w ON w.oid = p.pronamespace
        WHERE t.tgrelid = c.oid AND w.nspname = 'weir' AND p.proname = $5 AND t.tgenabled IN ('O', 'A'))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN LATERAL (SELECT coalesce(nullif(t.typbasetype, 0), t.oid) AS oid,
                          format_type(coalesce(nullif(t.typbasetype, 0), t.oid), -1) AS name,
                          coalesce(o.collisdeterministic, true) AS deterministic
                   FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation o ON o.oid = a.attcollation
                   WHERE a.attrelid = c.oid AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped) a ON true
LEFT JOIN LATERAL (SELECT format_type(coalesce(nullif(t.typbasetype, 0), t.oid), -1) AS name
                   FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                   WHERE a.attrelid = c.oid AND a.attname = $4 AND a.attnum > 0 AND NOT a.attisdropped) k ON true
WHERE n.nspname = $1 AND c.relname = $2";

const STATE: &str = "SELECT state FROM weir.unique_rule WHERE rule = $1";

pub(super) async fn look(rule: &Rule, shards: &Shards) -> Result<Seen> {
    let mut all_noted = true;
    let mut found: Option<Types> = None;
    let mut missing = 0;
    for client in shards.clients.values() {
        let note = rule.object("note");
        let parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
            &[&rule.schema, &rule.table, &rule.column, &rule.key, &note];
        let Some(row) = client.query_opt(COLUMN, parameters).await? else {
            missing += 1;
            continue;
        };
        let (type_oid, column, key): (Option<u32>, Option<String>, Option<String>) =
            (row.try_get(1)?, row.try_get(2)?, row.try_get(4)?);
        if !row.try_get::<_, bool>(0)? {
            return Ok(Seen::Unfit("It is not an ordinary table: partitions, parents, foreign and unlogged tables do not note all changes.".into()));
        }
        let (Some(type_oid), Some(column)) = (type_oid, column) else {
            return Ok(Seen::Unfit(format!("The table has no column {}.", rule.column)));
        };
        let Some(key) = key else {
            return Ok(Seen::Unfit(format!("The table has no column {}, its shard key.", rule.key)));
        };
        if family(type_oid).is_none() || !row.try_get::<_, Option<bool>>(3)?.unwrap_or(true) {
            return Ok(Seen::Unfit(format!(
                "Values of type {column} are not compared by their text; integers, text, varchar and uuid with a deterministic collation are."
            )));
        }
        if found.as_ref().is_some_and(|types| types.column != column) {
            return Ok(Seen::Unfit("The shards have different types for it.".into()));
        }
        all_noted &= row.try_get::<_, i64>(5)? == script::TRIGGERS.len() as i64;
        found = Some(Types { column, key });
    }
    let Some(types) = found else { return Ok(Seen::NoTable) };
    if missing > 0 {
        return Ok(Seen::Unfit(format!("The table is missing on {missing} of the shards.")));
    }
    let state = shards.on(shards.home)?.query_opt(STATE, &[&rule.id().0]).await?;
    let state = match state.map(|row| row.try_get::<_, String>(0)).transpose()?.as_deref() {
        Some("building") => State::Building,
        Some("valid") => State::Valid,
        Some("failed") => State::Failed,
        _ => State::New,
    };
    Ok(Seen::Fit { types, noted: all_noted, state })
}
