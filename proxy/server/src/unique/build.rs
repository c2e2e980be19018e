//! Looking up the values that were in a table before its column was declared unique over all shards.
//!
//! Each shard's rows are listed by one snapshot, in batches; a batch's rows are then locked as they are now, and their values put
//! into the lookup tables before the locks are given up. So no row is missed (what has changed since the snapshot has been
//! noted by its trigger), and none that has gone is put back. Invariant: nothing is ever taken out here, and a value that is
//! there is left alone, so that it can be begun again at any time.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_core::id::{ShardId, Slot};
use weir_core::sql::word::quote_name;
use weir_core::topology::SlotMap;
use weir_core::unique::{Rule, script};

use super::inspect::Types;
use super::{OWN_SETTINGS, Shards};
use crate::back::connect::Login;

/// Rows that are locked at the same time.
const BATCH: usize = 1000;
/// How often a batch is tried whose rows or values somebody else holds.
const ATTEMPTS: u32 = 5;
/// Duplicate values that are told.
const TOLD_MAX: usize = 10;
/// Characters of each.
const TOLD_CHARS: usize = 60;

pub(super) struct Build<'a> {
    pub rule: &'a Rule,
    pub types: &'a Types,
    pub slots: &'a SlotMap,
    pub logins: Vec<Login>,
}

/// A value and the shard key of its row, as text.
type Pair = (String, String);

impl Build<'_> {
    /// Looks up all values; gives some of those that are there more than once.
    pub async fn run(&self, shards: &Shards) -> Result<Vec<String>> {
        let mut duplicates = Vec::new();
        for login in &self.logins {
            let reader = crate::control::connect(login).await?;
            let locker = crate::control::connect(login).await?;
            locker.batch_execute(OWN_SETTINGS).await?;
            reader.batch_execute(OWN_SETTINGS).await?;
            reader.batch_execute(&self.listing()).await?;
            loop {
                let rows = reader.query(&format!("FETCH {BATCH} FROM weir_values"), &[]).await?;
                if rows.is_empty() || duplicates.len() >= TOLD_MAX {
                    break;
                }
                let pairs: Vec<Pair> =
                    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_>>()?;
                self.batch(&locker, &pairs, shards, &mut duplicates).await?;
            }
        }
        duplicates.sort_unstable();
        duplicates.dedup();
        duplicates.truncate(TOLD_MAX);
        Ok(duplicates)
    }

    fn listing(&self) -> String {
        let (column, key) = (quote_name(&self.rule.column), quote_name(&self.rule.key));
        format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; DECLARE weir_values NO SCROLL CURSOR FOR \
             SELECT {column}::text, {key}::text FROM ONLY {} WHERE {column} IS NOT NULL AND {key} IS NOT NULL",
            script::table_name(self.rule)
        )
    }

    async fn batch(
        &self,
        locker: &Client,
        pairs: &[Pair],
        shards: &Shards,
        duplicates: &mut Vec<String>,
    ) -> Result<()> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            locker.batch_execute("BEGIN").await?;
            let tried = self.put(locker, pairs, shards, duplicates).await;
            locker.batch_execute("COMMIT").await?;
            match tried {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(()), Err).context("values that were there before cannot be looked up")
    }

    async fn put(&self, locker: &Client, pairs: &[Pair], shards: &Shards, duplicates: &mut Vec<String>) -> Result<()> {
        let (column, key) = (quote_name(&self.rule.column), quote_name(&self.rule.key));
        let (values, keys): (Vec<&str>, Vec<&str>) = pairs.iter().map(|(value, key)| (&**value, &**key)).unzip();
        let sql = format!(
            "SELECT value, key, count(*), ((hashtextextended(value COLLATE \"C\", 0) >> 52) & 4095)::int FROM (
                 SELECT {column}::text AS value, {key}::text AS key FROM ONLY {table}
                 WHERE {column} = ANY ($1::text[]::{column_type}[]) AND {key} = ANY ($2::text[]::{key_type}[]) FOR SHARE) held
             GROUP BY value, key",
            table = script::table_name(self.rule),
            column_type = self.types.column,
            key_type = self.types.key,
        );
        let mut parts: BTreeMap<ShardId, Vec<Pair>> = BTreeMap::new();
        for row in locker.query(&sql, &[&values, &keys]).await? {
            let (value, key): Pair = (row.try_get(0)?, row.try_get(1)?);
            if row.try_get::<_, i64>(2)? > 1 {
                duplicates.push(value.clone());
            }
            let slot = u16::try_from(row.try_get::<_, i32>(3)?).ok().and_then(Slot::new).context("no slot")?;
            parts.entry(self.slots.owner(slot)).or_default().push((value, key));
        }
        for (shard, pairs) in parts {
            self.put_on(shards.on(shard)?, &pairs, duplicates).await?;
        }
        Ok(())
    }

    async fn put_on(&self, client: &Client, pairs: &[Pair], duplicates: &mut Vec<String>) -> Result<()> {
        let (values, keys): (Vec<&str>, Vec<&str>) = pairs.iter().map(|(value, key)| (&**value, &**key)).unzip();
        let id = self.rule.id().0;
        let put =
            "INSERT INTO weir.unique_value SELECT $1, * FROM unnest($2::text[], $3::text[]) ON CONFLICT DO NOTHING";
        client.execute(put, &[&id, &values, &keys]).await?;
        let others = "SELECT u.value FROM unnest($2::text[], $3::text[]) AS u(value, key) \
                      JOIN weir.unique_value v ON v.rule = $1 AND v.value = u.value COLLATE \"C\" WHERE v.key <> u.key";
        for row in client.query(others, &[&id, &values, &keys]).await? {
            duplicates.push(row.try_get(0)?);
        }
        Ok(())
    }
}

/// What a column has failed for that has values more than once.
pub(super) fn reason(duplicates: &[String]) -> String {
    let shown = |value: &String| format!("({})", value.chars().take(TOLD_CHARS).collect::<String>());
    let shown: Vec<String> = duplicates.iter().map(shown).collect();
    format!("Some values are there more than once: {}.", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_names_values_but_not_all_of_a_long_one() {
        let told = reason(&["a@x".into(), "b".repeat(200)]);
        assert_eq!(told, format!("Some values are there more than once: (a@x), ({}).", "b".repeat(TOLD_CHARS)));
    }
}
