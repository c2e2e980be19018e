//! FLUSH: cached answers count no more, here and at the other proxies.
//!
//! To the cache it is a write of what is flushed that changes nothing: its words are raised wherever they are kept, and lowered when
//! the shard's clock has a position. So whatever was stored before, in memory or in Redis, is void from then on, and whatever is
//! being read meanwhile is not stored. Non-goal: giving memory back; void entries leave as others come.

use std::borrow::Cow;
use std::sync::Arc;

use weir_core::admin::{Flush, Named};
use weir_core::error::{Blame, UserError};
use weir_core::fresh::{Dependencies, Dependency, KeyHash, TableHash};
use weir_core::sql::facts::{Schema, TableName};
use weir_core::topology::{Key, Placement};

use super::act::chosen;
use crate::app::App;
use crate::database::{Database, Shard, View};
use crate::fresh::Announced;

/// Nothing is left half done when the future is dropped: each shard is flushed or not. Errors: 42P01 for an unknown table,
/// 42809 for a key of a table that has none, 57P03 if other proxies could not be told.
pub async fn flush(app: &App, what: &Flush) -> Result<(), UserError> {
    let mut done = Done::default();
    match what {
        Flush::Database(name) => {
            for db in chosen(app, name.as_deref())? {
                done.write(&db, &[Dependency::Anything]).await?;
            }
        }
        Flush::Table(named) => {
            for (db, table) in having(app, named)? {
                let table = TableHash::of(&table.schema, &table.name);
                // What a write of all its rows would raise.
                let all = [Dependency::Table(table), Dependency::Keyless(table), Dependency::Flushed(table)];
                done.write(&db, &all).await?;
            }
        }
        Flush::Key(named, value) => {
            for (db, table) in having(app, named)? {
                let key = key(&db.view(), &table, value)?;
                let table = TableHash::of(&table.schema, &table.name);
                let all = [Dependency::Table(table), Dependency::Key(table, key), Dependency::Flushed(table)];
                done.write(&db, &all).await?;
            }
        }
    }
    Ok(())
}

/// What has been written already: databases of the wildcard share their shards.
#[derive(Default)]
struct Done(Vec<(Arc<Shard>, Dependencies)>);

impl Done {
    async fn write(&mut self, db: &Arc<Database>, writes: &[Dependency]) -> Result<(), UserError> {
        if !db.tracks_freshness() {
            return Ok(());
        }
        let writes = Dependencies::from_slice(writes);
        for (id, shard) in db.shards.by_shard() {
            if self.0.iter().any(|(known, written)| Arc::ptr_eq(known, shard) && *written == writes) {
                continue;
            }
            let mut announced = Announced::default();
            // No server process has a part in it; and nothing is waited for between the two.
            announced.announce(db, (id, 0), &writes).await?;
            announced.publish();
            self.0.push((Arc::clone(shard), writes.clone()));
        }
        Ok(())
    }
}

/// The databases that have the table.
fn having(app: &App, named: &Named) -> Result<Vec<(Arc<Database>, TableName)>, UserError> {
    let found = |db: Arc<Database>| {
        let view = db.view_arc();
        let View { rules, catalog, search_path, width, .. } = &*view;
        let schema = Schema { rules, catalog, search_path, width: *width };
        let table = schema.resolve(named.schema.as_deref(), &named.table);
        schema.relation(&table).is_some().then_some((db, table))
    };
    let found: Vec<_> = app.databases().into_iter().filter_map(found).collect();
    if found.is_empty() {
        let name = named.schema.iter().chain([&named.table]).map(String::as_str).collect::<Vec<_>>().join(".");
        return Err(UserError::new(Blame::Client, "42P01", format!("relation \"{name}\" does not exist"))
            .detail("No database that weir serves now has it.")
            .hint(
                "Name its schema too, if it is not public; write names that are not in lower case in double quotes.",
            ));
    }
    Ok(found)
}

fn key(view: &View, table: &TableName, value: &str) -> Result<KeyHash, UserError> {
    let Placement::Sharded { key_type, .. } = view.rules.placement(&table.schema, &table.name) else {
        return Err(UserError::new(Blame::Client, "42809", format!("table \"{table}\" has no shard key"))
            .hint(format!("FLUSH TABLE {table} makes all that was read of it void.")));
    };
    let key = Key::parse(Cow::Borrowed(value.as_bytes()), *key_type).ok_or_else(|| {
        let shown: String = value.chars().take(100).collect();
        let message = format!("invalid input syntax for type {}: \"{shown}\"", key_type.name());
        UserError::new(Blame::Client, "22P02", message)
    })?;
    Ok(KeyHash(key.hash()))
}
