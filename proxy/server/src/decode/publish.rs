//! What is decoded: publications that name the tables, and event triggers that tell of DDL.
//!
//! Two publications per account, by its OID, so that neither several proxies nor several tiers on one server get into each
//! other's way: they want the same content, and whoever comes first makes it. Tables with a replica identity are published
//! with all that is done to them; others with INSERT and TRUNCATE only, because Postgres refuses UPDATE and DELETE of a table that
//! publishes them without an identity. That is also why nothing is published FOR ALL TABLES, and why the event trigger takes a
//! table out as soon as DDL has taken its identity away, in the same transaction.
//!
//! Partitions are published themselves, under their own names and identities: published by way of their root, TRUNCATE of a
//! partition would not be seen, and which partition a row is in would be lost.
//!
//! Invariant: nothing here stops or delays DDL of others for longer than [`LOCK_TIMEOUT`], which is shorter than a deadlock
//! lasts; what could not be locked is tried again. Non-goals: taking anything down (docs/dba.md says how).

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};
use weir_core::lock::MAKE_SCHEMA;

use super::{Gaps, OWN_NAMES, QUERY_TIMEOUT};
use crate::back::connect::Login;

/// In milliseconds; deadlock_timeout is 1 s, so that if somebody has to give way it is we.
const LOCK_TIMEOUT: &str = "500ms";
/// Tables that are published with one statement.
const BATCH: usize = 50;
/// Longest time for one comparison.
const CATCH_UP_MAX: Duration = Duration::from_secs(120);

/// A table is identified as CheckCmdReplicaIdentity has it (src/backend/executor/execReplication.c).
const TABLES: &str = "
SELECT n.nspname::text, c.relname::text, weir_has_identity, pg_has_role(c.relowner, 'USAGE'),
       EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
               WHERE r.prrelid = c.oid AND p.pubname = $1),
       EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
               WHERE r.prrelid = c.oid AND p.pubname = $2)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (SELECT c.relreplident = 'f' OR EXISTS (
    SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisunique AND i.indimmediate AND i.indpred IS NULL
    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END) AS weir_has_identity) identity
WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND c.oid >= 16384
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'weir') AND n.nspname !~ '^pg_(toast|temp)'
ORDER BY 1, 2";

const PUBLICATIONS: &str = "
SELECT pubname::text, pubinsert AND pubtruncate AND (pubupdate AND pubdelete) = (pubname = $1) AND NOT pubviaroot
       AND NOT puballtables AND pg_has_role(pubowner, 'USAGE')
FROM pg_publication WHERE pubname IN ($1, $2)";

/// Tells of DDL on anything but temporary objects, within its transaction. Whatever fails in it is none of the DDL's business. It
/// runs with our rights in others' sessions, so nothing of theirs may stand before pg_catalog, not even temporary objects.
const TELL: &str = r"
BEGIN
    IF tg_tag LIKE '%PUBLICATION' THEN RETURN; END IF;
    IF tg_event = 'sql_drop' THEN
        IF NOT EXISTS (SELECT FROM pg_event_trigger_dropped_objects() WHERE NOT is_temporary) THEN RETURN; END IF;
    ELSIF NOT EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE schema_name IS DISTINCT FROM 'pg_temp') THEN RETURN;
    END IF;
    PERFORM pg_logical_emit_message(true, 'weir', 'ddl');
    IF tg_tag IN ('ALTER TABLE', 'DROP INDEX') THEN PERFORM weir.keep_publications(); END IF;
EXCEPTION WHEN OTHERS THEN NULL;
END";

/// Takes tables that have lost their identity out of publications that need one, before somebody updates them.
const KEEP: &str = r"
DECLARE lost record;
BEGIN
    FOR lost IN
        SELECT p.pubname, n.nspname, c.relname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid
        JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE p.pubname LIKE 'weir\_rows\_%' AND c.relreplident <> 'f' AND NOT EXISTS (
            SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisunique AND i.indimmediate
            AND i.indpred IS NULL
            AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END)
    LOOP
        EXECUTE format('ALTER PUBLICATION %I DROP TABLE ONLY %I.%I', lost.pubname, lost.nspname, lost.relname);
    END LOOP;
END";

/// Name, event.
const TRIGGERS: [(&str, &str); 2] = [("weir_ddl", "ddl_command_end"), ("weir_drop", "sql_drop")];

pub(super) struct Publisher {
    login: Login,
    /// Of tables with an identity, and of the others.
    names: [String; 2],
    /// Why DDL is not told.
    ddl: Option<String>,
}

/// What one comparison came to.
pub(super) struct CaughtUp {
    pub gaps: Gaps,
    /// Tables are published that were not before.
    pub added: bool,
}

struct Table {
    name: String,
    quoted: String,
    identified: bool,
    owned: bool,
    in_rows: bool,
    in_inserts: bool,
}

impl Publisher {
    pub(super) async fn new(login: Login, client: &Client) -> Result<Publisher> {
        let asked = client.query_one("SELECT oid FROM pg_roles WHERE rolname = current_user", &[]);
        let account: u32 = timeout(QUERY_TIMEOUT, asked).await??.try_get(0)?;
        let names = [format!("weir_rows_{account}"), format!("weir_inserts_{account}")];
        let told = timeout(CATCH_UP_MAX, tell_of_ddl(client)).await?;
        let ddl = told.err().map(|error| sentence(&error));
        Ok(Publisher { login, names, ddl })
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Makes the publications what they should be, over a connection of its own: it may have to wait for locks.
    pub(super) async fn catch_up(&self) -> Result<CaughtUp> {
        timeout(CATCH_UP_MAX, Box::pin(self.compare())).await.context("publications: no answer in time")?
    }

    async fn compare(&self) -> Result<CaughtUp> {
        let client = crate::control::connect(&self.login).await?;
        let settings = format!("SET lock_timeout = '{LOCK_TIMEOUT}'; SET statement_timeout = '30s'; {OWN_NAMES}");
        client.batch_execute(&settings).await?;
        self.create(&client).await.context("publications")?;
        let [rows, inserts] = &self.names;
        let tables: Vec<Table> =
            client.query(TABLES, &[rows, inserts]).await?.iter().map(Table::from_row).collect::<Result<_, _>>()?;
        // First what keeps others from writing.
        let unidentified = |table: &&Table| table.in_rows && !table.identified;
        self.alter(&client, rows, "DROP", tables.iter().filter(unidentified)).await?;
        let mut unseen: Vec<String> = Vec::new();
        let mut added = false;
        for (name, identified) in [(rows, true), (inserts, false)] {
            let missing = |table: &&Table| {
                table.owned
                    && table.identified == identified
                    && !(if identified { table.in_rows } else { table.in_inserts })
            };
            let missing: Vec<&Table> = tables.iter().filter(missing).collect();
            let failed = self.alter(&client, name, "ADD", missing.iter().copied()).await?;
            added |= failed.len() < missing.len();
            unseen.extend(failed);
        }
        let foreign = |table: &&Table| !table.owned && !table.in_rows && !table.in_inserts;
        unseen.extend(tables.iter().filter(foreign).map(|table| table.name.clone()));
        let partly = tables.iter().filter(|table| !table.identified && !unseen.contains(&table.name));
        let partly = partly.map(|table| table.name.clone()).collect();
        Ok(CaughtUp { gaps: Gaps { unseen, partly, ddl: self.ddl.clone() }, added })
    }

    async fn create(&self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let [rows, inserts] = &self.names;
        let there = client.query(PUBLICATIONS, &[rows, inserts]).await?;
        let known = |row: &Row| Ok::<(String, bool), tokio_postgres::Error>((row.try_get(0)?, row.try_get(1)?));
        let there: Vec<(String, bool)> = there.iter().map(known).collect::<Result<_, _>>()?;
        for (name, publish) in [(rows, "insert, update, delete, truncate"), (inserts, "insert, truncate")] {
            let options = format!("(publish = '{publish}', publish_via_partition_root = false)");
            let found = there.iter().find(|(known, _)| known == name).map(|(_, right)| *right);
            let made = match found {
                Some(true) => continue,
                Some(false) => client.batch_execute(&format!("ALTER PUBLICATION {name} SET {options}")).await,
                None => client.batch_execute(&format!("CREATE PUBLICATION {name} WITH {options}")).await,
            };
            match made {
                // Another proxy was quicker.
                Err(error) if error.code() == Some(&SqlState::DUPLICATE_OBJECT) => {}
                made => made?,
            }
        }
        Ok(())
    }

    /// Adds or drops tables; those that could not be, because somebody holds a lock on them or has dropped them meanwhile.
    async fn alter(
        &self,
        client: &Client,
        name: &str,
        verb: &str,
        tables: impl Iterator<Item = &Table>,
    ) -> Result<Vec<String>, tokio_postgres::Error> {
        let tables: Vec<&Table> = tables.collect();
        let mut failed = Vec::new();
        for batch in tables.chunks(BATCH) {
            let list: Vec<String> = batch.iter().map(|table| format!("ONLY {}", table.quoted)).collect();
            let all = client.batch_execute(&format!("ALTER PUBLICATION {name} {verb} TABLE {}", list.join(", "))).await;
            match all {
                Ok(()) => continue,
                Err(error) if error.is_closed() => return Err(error),
                Err(_) => {}
            }
            for (table, listed) in batch.iter().zip(&list) {
                let one = client.batch_execute(&format!("ALTER PUBLICATION {name} {verb} TABLE {listed}")).await;
                match one {
                    Ok(()) => {}
                    Err(error) if error.is_closed() => return Err(error),
                    // Another proxy was quicker, or the table is gone.
                    Err(error) if error.code() == Some(&SqlState::DUPLICATE_OBJECT) => {}
                    Err(error) => {
                        tracing::debug!(table = table.name, "{verb} TABLE of {name}: {}", sentence(&error));
                        failed.push(table.name.clone());
                    }
                }
            }
        }
        Ok(failed)
    }
}

impl Table {
    fn from_row(row: &Row) -> Result<Table, tokio_postgres::Error> {
        let (schema, name): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        Ok(Table {
            quoted: format!("{}.{}", quoted(&schema), quoted(&name)),
            name: format!("{schema}.{name}"),
            identified: row.try_get(2)?,
            owned: row.try_get(3)?,
            in_rows: row.try_get(4)?,
            in_inserts: row.try_get(5)?,
        })
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Makes the event triggers, if they are not there as they should be. Only a superuser may, or whom the server lets.
async fn tell_of_ddl(client: &Client) -> Result<(), tokio_postgres::Error> {
    const THERE: &str = "SELECT count(*) FROM pg_event_trigger t JOIN pg_proc p ON p.oid = t.evtfoid \
        JOIN pg_namespace n ON n.oid = p.pronamespace \
        WHERE (t.evtname, t.evtevent) IN (('weir_ddl', 'ddl_command_end'), ('weir_drop', 'sql_drop')) AND t.evtenabled = 'A' \
        AND n.nspname = 'weir' AND p.proname = 'tell_of_ddl' AND p.prosrc = $1 \
        AND EXISTS (SELECT FROM pg_proc k WHERE k.pronamespace = n.oid AND k.proname = 'keep_publications' AND k.prosrc = $2)";
    let there: i64 = client.query_one(THERE, &[&TELL, &KEEP]).await?.try_get(0)?;
    if there == TRIGGERS.len() as i64 {
        return Ok(());
    }
    let mut script = format!(
        "BEGIN; SET LOCAL lock_timeout = '5s'; {MAKE_SCHEMA};
         CREATE OR REPLACE FUNCTION weir.keep_publications() RETURNS void LANGUAGE plpgsql SECURITY DEFINER
             SET search_path = pg_catalog, pg_temp AS $weir${KEEP}$weir$;
         REVOKE ALL ON FUNCTION weir.keep_publications() FROM PUBLIC;
         CREATE OR REPLACE FUNCTION weir.tell_of_ddl() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER
             SET search_path = pg_catalog, pg_temp AS $weir${TELL}$weir$;"
    );
    for (name, event) in TRIGGERS {
        let _ = write!(
            script,
            "DROP EVENT TRIGGER IF EXISTS {name};
             CREATE EVENT TRIGGER {name} ON {event} EXECUTE FUNCTION weir.tell_of_ddl();
             ALTER EVENT TRIGGER {name} ENABLE ALWAYS;"
        );
    }
    script.push_str("COMMIT");
    let made = client.batch_execute(&script).await;
    if made.is_err() {
        client.batch_execute("ROLLBACK").await?;
    }
    made
}

fn sentence(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |told| told.message().to_owned())
}
