//! Keeping columns unique over all shards: the shards' objects, and the state of each column.
//!
//! A declared column begins without objects. It gets its triggers on every shard (from then on every write is noted and settled),
//! then every value that was there before is looked up ([`build`]), then it is valid; or it has failed, with the reason. The
//! state of the home shard counts, and all proxies read it with the catalogue.
//!
//! Invariant: a column is called valid only after its triggers have been there on every shard for as long as its lookup table has
//! been filled. Every step may be repeated: a proxy that dies in the middle leaves a state from which the next one goes on.
//! Non-goals: what a statement notes and how it is settled (`exec/unique.rs`).

mod build;
mod inspect;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use tokio_postgres::Client;
use weir_core::id::ShardId;
use weir_core::lock::{UNIQUE_LOOKS, UNIQUE_OBJECTS};
use weir_core::topology::catalog::UniqueState;
use weir_core::topology::{TableRules, Topology, Width};
use weir_core::unique::{Rule, RuleId, script};

use self::inspect::{Seen, State};
use crate::back::connect::Login;
use crate::database::{Database, Primaries, View};
use crate::growing::Growing;

/// Between two looks at the columns: at least so long, and this many times what the last one took.
const EVERY: Duration = Duration::from_secs(20);
const SHARE: u32 = 4;
/// The same where a table has come since the last one.
const SOON: Duration = Duration::from_secs(1);
/// How long a client's DDL waits for the triggers of the table that it has made.
const DDL_WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a lock of weir's own on a client's table, so that its clients do not queue behind it for long. And an account
/// that row security hides rows from fails, instead of looking up some of them.
const OWN_SETTINGS: &str = "SET lock_timeout = '3s'; SET row_security = off";

/// The globally unique columns of one database.
pub struct Unique {
    rules: Vec<Rule>,
    primaries: Arc<Primaries>,
    home: ShardId,
    /// What proves to each shard that weir itself calls; empty until the shard has its objects.
    secrets: Growing<OnceLock<String>>,
    looking: tokio::sync::Mutex<()>,
}

/// One connection to each shard that takes part.
pub struct Shards {
    clients: BTreeMap<ShardId, Client>,
    home: ShardId,
}

impl Unique {
    /// The columns that are declared; `None`: there are none.
    pub fn declared(topology: &Topology, primaries: &Arc<Primaries>) -> Option<Arc<Unique>> {
        let rules = declared(&topology.tables);
        let secrets = topology.shards.iter().map(|_| OnceLock::new()).collect();
        let (primaries, home) = (Arc::clone(primaries), topology.home);
        (!rules.is_empty())
            .then(|| Arc::new(Unique { rules, primaries, home, secrets, looking: tokio::sync::Mutex::new(()) }))
    }

    /// Makes the shards' objects, where a column is declared, and takes away what was declared before and is not now.
    pub async fn prepare(declared: Option<&Unique>, primaries: &Primaries) -> Result<()> {
        for (shard, login) in primaries.active() {
            match declared {
                Some(unique) => unique.prepare_shard(shard).await?,
                None => drop(objects(&[], &login).await?),
            }
        }
        Ok(())
    }

    /// Room for one more shard. `None`: there is none left.
    pub fn append(&self) -> Option<usize> {
        self.secrets.push(OnceLock::new())
    }

    /// Makes the objects of a shard that joins. May be done again.
    pub async fn prepare_shard(&self, shard: ShardId) -> Result<()> {
        if self.secrets[shard].get().is_none()
            && let Some(secret) = objects(&self.rules, self.primaries.of(shard)).await?
        {
            let _ = self.secrets[shard].set(secret);
        }
        Ok(())
    }

    /// A shard that has the tables and is about to take part gets the triggers of those columns that the home shard has, and what is
    /// known of them. May be done again.
    pub async fn equip(&self, shard: ShardId) -> Result<()> {
        self.prepare_shard(shard).await?;
        let home = crate::control::connect(self.primaries.of(self.home)).await?;
        let client = crate::control::connect(self.primaries.of(shard)).await?;
        for rule in &self.rules {
            let known = "SELECT state, reason FROM weir.unique_rule WHERE rule = $1 AND to_regclass($2) IS NOT NULL";
            let Some(row) = home.query_opt(known, &[&rule.id().0, &script::table_name(rule)]).await? else { continue };
            let (state, reason): (String, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
            let (triggers, state) = (script::triggers(rule), script::state(rule, &state, reason.as_deref()));
            client.batch_execute(&format!("BEGIN; {triggers}; {state}; COMMIT")).await?;
        }
        Ok(())
    }

    /// Before the one shard gets company. Call when every proxy settles what is noted: from here on it is.
    pub async fn begin(&self, db: &Database) -> Result<()> {
        self.look(db, true).await?;
        let view = db.view_arc();
        let is_there = |rule: &&Rule| view.catalog.relation(&rule.schema, &rule.table).is_some();
        let is_valid = |rule: &Rule| matches!(state_of(&view, rule), Some(UniqueState::Valid));
        match self.rules.iter().filter(is_there).find(|rule| !is_valid(rule)) {
            None => Ok(()),
            Some(rule) => Err(anyhow!("{}.{} is not unique yet: SHOW UNIQUE tells why", rule.table, rule.column)),
        }
    }

    /// Before slots move: while values from before are looked up, their rows must stay where they are. Errors: somebody is at it. Whoever
    /// begins it later sees that slots move.
    pub async fn rests(&self) -> Result<()> {
        let home = crate::control::connect(self.primaries.of(self.home)).await?;
        let is_free: bool = home.query_one("SELECT pg_try_advisory_lock($1)", &[&UNIQUE_LOOKS]).await?.try_get(0)?;
        // The lock goes with the connection.
        ensure!(
            is_free,
            "waits until values of globally unique columns are looked up: SHOW UNIQUE tells how far that is"
        );
        Ok(())
    }

    pub fn secret(&self, shard: ShardId) -> &str {
        self.secrets[shard].get().map_or("", String::as_str)
    }

    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Is there a table whose columns are not yet, or not any more, as they should be?
    fn has_work(&self, view: &View) -> bool {
        self.rules.iter().any(|rule| {
            let state = state_of(view, rule);
            view.catalog.relation(&rule.schema, &rule.table).is_some()
                && !matches!(state, Some(UniqueState::Valid | UniqueState::Building))
        })
    }

    /// Is there a table of which this proxy has not seen the triggers? Another one may have made them meanwhile.
    pub fn lacks(&self, view: &View) -> bool {
        self.rules
            .iter()
            .any(|rule| view.catalog.relation(&rule.schema, &rule.table).is_some() && state_of(view, rule).is_none())
    }

    /// One look at every column: what is missing is made. Proxies take turns. `begins`: one shard takes part, whose own constraints were
    /// enough so far, and nothing can move yet.
    async fn look(&self, db: &Database, begins: bool) -> Result<()> {
        if db.view().width != Width::Several && !begins {
            return Ok(());
        }
        let _one_at_a_time = self.looking.lock().await;
        let mut clients = BTreeMap::new();
        for (shard, login) in self.primaries.active() {
            let client = crate::control::connect(&login).await?;
            client.batch_execute(OWN_SETTINGS).await?;
            clients.insert(shard, client);
        }
        let shards = Shards { clients, home: self.home };
        let home = shards.on(self.home)?;
        if home.query_one("SELECT pg_try_advisory_lock($1)", &[&UNIQUE_LOOKS]).await?.try_get::<_, bool>(0)? {
            // Asked under the lock: who moves slots has put that down before he looks whether anybody has it.
            let open = match &db.hub {
                Some(hub) if !begins => hub.moves(&db.name, false).await?,
                _ => Vec::new(),
            };
            for rule in self.rules.iter().filter(|_| open.is_empty()) {
                if let Err(error) = self.look_at(rule, &shards, db).await {
                    tracing::warn!(database = %db.name, "{}.{}: {error:#}", rule.table, rule.column);
                }
            }
            if !open.is_empty() && self.has_work(&db.view()) {
                tracing::warn!(database = %db.name, "globally unique columns have to wait until no slots move: SHOW MOVES");
            }
            home.execute("SELECT pg_advisory_unlock($1)", &[&UNIQUE_LOOKS]).await?;
        }
        db.refresh_catalog().await;
        Ok(())
    }

    async fn look_at(&self, rule: &Rule, shards: &Shards, db: &Database) -> Result<()> {
        let seen = inspect::look(rule, shards).await?;
        let types = match seen {
            Seen::NoTable => return Ok(()),
            Seen::Unfit(reason) => return shards.set(rule, State::Failed, Some(&reason)).await,
            Seen::Fit { types, noted, state } => {
                if state == State::Valid && noted {
                    return Ok(());
                }
                let anew = state == State::New || !noted && state != State::Building;
                if anew {
                    shards.start_anew(rule).await?;
                }
                if anew || !noted {
                    shards.each(&script::triggers(rule)).await?;
                    // From now on clients may write: everything is noted.
                    db.refresh_catalog().await;
                }
                types
            }
        };
        let view = db.view_arc();
        let logins = self.primaries.active().into_iter().map(|(_, login)| login).collect();
        let build = build::Build { rule, types: &types, slots: &view.topology.slots, logins };
        let duplicates = build.run(shards).await?;
        if duplicates.is_empty() {
            tracing::info!(database = %db.name, "{}.{} is unique over all shards", rule.table, rule.column);
            shards.set(rule, State::Valid, None).await
        } else {
            let reason = build::reason(&duplicates);
            tracing::warn!(database = %db.name, "{}.{}: {reason}", rule.table, rule.column);
            shards.set(rule, State::Failed, Some(&reason)).await
        }
    }
}

impl Shards {
    fn on(&self, shard: ShardId) -> Result<&Client> {
        self.clients.get(&shard).with_context(|| format!("shard {shard} has left"))
    }

    /// Runs a text on every shard, the home shard last, each in a transaction of its own.
    async fn each(&self, sql: &str) -> Result<()> {
        let others = self.clients.iter().filter(|(shard, _)| **shard != self.home).map(|(_, client)| client);
        for client in others.chain([self.on(self.home)?]) {
            if let Err(error) = client.batch_execute(&format!("BEGIN; {sql}; COMMIT")).await {
                // The text stopped inside its transaction.
                client.batch_execute("ROLLBACK").await?;
                return Err(error.into());
            }
        }
        Ok(())
    }

    async fn set(&self, rule: &Rule, state: State, reason: Option<&str>) -> Result<()> {
        self.each(&script::state(rule, state.as_str(), reason)).await
    }

    /// Without triggers nothing is noted while the lookup table is emptied; whoever noted something before has ended by then,
    /// also with what he still had to write into it.
    async fn start_anew(&self, rule: &Rule) -> Result<()> {
        self.each(&script::drop_triggers(rule)).await?;
        let empty = format!(
            "LOCK TABLE weir.unique_value IN SHARE ROW EXCLUSIVE MODE; DELETE FROM weir.unique_value WHERE rule = {}",
            rule.id().0
        );
        self.each(&empty).await?;
        self.set(rule, State::Building, None).await
    }
}

/// Looks at the columns for ever; dropping the future ends it.
pub async fn run(db: Arc<Database>, unique: Arc<Unique>) {
    let (mut pause, mut lacked, mut since) = (EVERY, false, Instant::now());
    loop {
        tokio::time::sleep(SOON).await;
        // A table that has just come cannot be written before.
        let lacks = unique.lacks(&db.view());
        if since.elapsed() < pause && (lacked || !lacks) {
            continue;
        }
        let start = Instant::now();
        if let Err(error) = unique.look(&db, false).await {
            tracing::warn!(database = %db.name, "cannot look after globally unique columns: {error:#}");
        }
        (pause, lacked, since) = (EVERY.max(start.elapsed() * SHARE), unique.lacks(&db.view()), Instant::now());
    }
}

/// At the start, and after DDL: a table that has just been made gets its triggers before anybody is told of it. What takes
/// longer goes on in the background.
pub async fn catch_up(db: &Arc<Database>) {
    let Some(unique) = db.unique.clone().filter(|unique| unique.has_work(&db.view())) else { return };
    let of = Arc::clone(db);
    let looking = tokio::spawn(async move {
        if let Err(error) = unique.look(&of, false).await {
            tracing::warn!(database = %of.name, "cannot look after globally unique columns: {error:#}");
        }
    });
    // Late or not, the statement has been run.
    let _ = tokio::time::timeout(DDL_WAIT_MAX, looking).await;
}

/// How far a column has come, as the catalogue was last read. `None`: its triggers are not there.
pub fn state_of<'v>(view: &'v View, rule: &Rule) -> Option<&'v UniqueState> {
    let columns = view.catalog.unique.get(&(rule.schema.as_str().into(), rule.table.as_str().into()))?;
    columns.iter().find(|known| *known.column == *rule.column).map(|known| &known.state)
}

fn declared(rules: &TableRules) -> Vec<Rule> {
    let mut declared = Vec::new();
    for (schema, table, key, _) in rules.sharded() {
        for column in rules.unique_columns(schema, table) {
            declared.push(Rule {
                schema: schema.to_owned(),
                table: table.to_owned(),
                column: column.to_string(),
                key: key.to_string(),
            });
        }
    }
    declared
}

/// Makes the objects that all columns share, if one is declared, and takes away those of others; gives what proves to the shard that
/// weir itself calls.
async fn objects(rules: &[Rule], login: &Login) -> Result<Option<String>> {
    let client = crate::control::connect(login).await?;
    let there = "SELECT to_regclass('weir.unique_rule') IS NOT NULL";
    let there: bool = client.query_one(there, &[]).await?.try_get(0)?;
    if there {
        forget_others(&client, rules).await?;
    }
    if rules.is_empty() {
        return Ok(None);
    }
    let script = format!("BEGIN; SELECT pg_advisory_xact_lock({UNIQUE_OBJECTS}); {}; COMMIT", script::shared());
    let made = client.batch_execute(&script).await;
    made.with_context(|| format!("objects for global_unique on {}", login.route.endpoint()))?;
    Ok(Some(client.query_one("SELECT secret FROM weir.unique_secret", &[]).await?.try_get(0)?))
}

/// Takes away the objects of columns that are not declared any more.
async fn forget_others(client: &Client, rules: &[Rule]) -> Result<()> {
    let moves = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'weir.unique_value'::regclass AND tgname ~ '^zzzz_weir_move_')";
    let ids: Vec<i64> = rules.iter().map(|rule| rule.id().0).collect();
    let others = "SELECT rule, schema_name, table_name, column_name FROM weir.unique_rule WHERE rule <> ALL ($1)";
    for row in client.query(others, &[&ids]).await? {
        let rule =
            Rule { schema: row.try_get(1)?, table: row.try_get(2)?, column: row.try_get(3)?, key: String::new() };
        // Named by what was stored, which may be another's hash after all: only what fits is touched.
        if RuleId(row.try_get(0)?) != rule.id() {
            continue;
        }
        // What lies there of slots that another shard owns is not to be written.
        if client.query_one(moves, &[]).await?.try_get(0)? {
            tracing::warn!(
                "{}.{} stays unique over all shards while slots move; start weir again after that",
                rule.table,
                rule.column
            );
            continue;
        }
        let there = "SELECT to_regclass($1) IS NOT NULL";
        let there: bool = client.query_one(there, &[&script::table_name(&rule)]).await?.try_get(0)?;
        let triggers = if there { script::drop_triggers(&rule) } else { String::new() };
        let id = rule.id().0;
        let sql = format!(
            "BEGIN; {triggers} DELETE FROM weir.unique_value WHERE rule = {id}; DELETE FROM weir.unique_rule WHERE rule = {id}; COMMIT"
        );
        client.batch_execute(&sql).await?;
        tracing::info!("{}.{} is not unique over all shards any more", rule.table, rule.column);
    }
    Ok(())
}
