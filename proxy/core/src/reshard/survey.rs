//! What servers have said before anything is moved, and what of it stands in the way.
//!
//! Invariant: every finding names the shard, what is wrong and what to do. A blocker is what would make a move fail or be
//! wrong; a warning is what may cost more than expected. Non-goals: asking, and repairing.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::Slot;
use crate::topology::KeySet;
use crate::topology::drift::{Objects, drift};

/// Slots and senders that one move takes on each of its two servers: one stream there, one back.
const STREAMS: i32 = 2;
/// A slot with so many times its fair share of the rows is worth a word.
const SKEWED: f64 = 16.0;
/// Rows below which skew means nothing.
const SKEW_ROWS_MIN: f64 = 10_000.0;
/// A transaction that has been open for so long will hold up the cut-over, which waits for those that wrote what moves.
const LONG_SECONDS: f64 = 60.0;

/// What one server is and allows.
#[derive(Clone, Debug, Default)]
pub struct ServerSaid {
    /// `server_version_num`.
    pub version: i32,
    pub wal_level: String,
    pub slots_free: i32,
    pub senders_free: i32,
    /// weir's account may make replication slots.
    pub may_replicate: bool,
    /// It may make schema `weir`, publications and triggers: CREATE on the database.
    pub may_create: bool,
    /// It may set session_replication_role, so that guards, triggers and foreign keys let pass what it applies.
    pub may_apply: bool,
    /// Sharded tables that it does not own, and so may not guard.
    pub foreign: Vec<String>,
    pub extensions: BTreeSet<String>,
    pub encoding: String,
    /// `max_prepared_transactions`.
    pub preparable: i32,
    /// Columns that are to be unique over all shards, and not even unique here by an index of their own.
    pub loose: Vec<String>,
    /// Age of the oldest open transaction, in seconds.
    pub oldest_transaction: f64,
    /// Transactions that are prepared and not decided.
    pub prepared: i64,
    pub objects: Objects,
}

/// One sharded table on a source.
#[derive(Clone, Debug, Default)]
pub struct TableSaid {
    /// With its schema.
    pub name: String,
    /// Rows can be told apart in the WAL: by a primary key, another unique index, or whole.
    pub has_identity: bool,
    pub unlogged: bool,
    /// Its rows are not in itself, or not all of them: a foreign table, a view, one that others inherit from.
    pub is_strange: bool,
    /// Unique constraints and indexes without the shard key among their columns.
    pub unique_elsewhere: Vec<String>,
    pub rows: BTreeMap<Slot, Rows>,
    /// Of single keys that were asked for, by hash; they are part of their slot's.
    pub keys: BTreeMap<u64, Rows>,
    /// Rows were counted in a part of its pages.
    pub is_sampled: bool,
}

/// Rows of one slot.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rows {
    pub rows: f64,
    /// Without indexes.
    pub bytes: f64,
}

impl std::ops::AddAssign for Rows {
    fn add_assign(&mut self, other: Rows) {
        self.rows += other.rows;
        self.bytes += other.bytes;
    }
}

impl std::ops::SubAssign for Rows {
    fn sub_assign(&mut self, other: Rows) {
        self.rows = (self.rows - other.rows).max(0.0);
        self.bytes = (self.bytes - other.bytes).max(0.0);
    }
}

impl TableSaid {
    /// What it has of these keys.
    pub fn within(&self, keys: &KeySet) -> Rows {
        let mut sum = Rows::default();
        keys.slots().iter().filter_map(|slot| self.rows.get(&slot)).for_each(|rows| sum += *rows);
        keys.beside().filter_map(|hash| self.keys.get(&hash)).for_each(|rows| sum += *rows);
        keys.except().filter_map(|hash| self.keys.get(&hash)).for_each(|rows| sum -= *rows);
        sum
    }

    /// The fullest slot and how many times the mean it has, where that is worth a word.
    fn skew(&self) -> Option<(Slot, f64)> {
        let total: f64 = self.rows.values().map(|rows| rows.rows).sum();
        let (slot, most) = self.rows.iter().max_by(|one, other| one.1.rows.total_cmp(&other.1.rows))?;
        let times = most.rows / (total / self.rows.len().max(1) as f64).max(1.0);
        let share = most.rows / total.max(1.0);
        (total >= SKEW_ROWS_MIN && (times >= SKEWED || self.rows.len() > 1 && share > 0.5)).then_some((*slot, times))
    }
}

/// How much a finding weighs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Gravity {
    Blocker,
    Warning,
    /// Just to be known.
    Note,
}

impl Gravity {
    pub fn as_str(self) -> &'static str {
        match self {
            Gravity::Blocker => "blocker",
            Gravity::Warning => "warning",
            Gravity::Note => "note",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    pub gravity: Gravity,
    pub shard: String,
    /// Empty: the server as a whole.
    pub table: String,
    pub what: String,
    pub remedy: String,
}

/// Everything there is to say of one server that takes part.
pub fn judge_server(shard: &str, said: &ServerSaid) -> Vec<Finding> {
    let mut list = Findings { shard, table: "", found: Vec::new() };
    if said.wal_level != "logical" {
        list.blocker(format!("wal_level is {}", said.wal_level), "Set wal_level = logical and restart the server.");
    }
    let (slots, senders) = (said.slots_free, said.senders_free);
    if slots < STREAMS {
        let what = format!("{slots} replication slots are free, {STREAMS} are needed");
        list.blocker(what, "Raise max_replication_slots, or drop slots that nobody uses (pg_replication_slots).");
    }
    if senders < STREAMS {
        let what = format!("{senders} walsenders are free, {STREAMS} are needed");
        list.blocker(what, "Raise max_wal_senders.");
    }
    if said.preparable == 0 {
        let what = "max_prepared_transactions is 0, so no transaction over several shards can commit".to_owned();
        list.blocker(what, "Set it to the connections that weir may have there, at least, and restart the server.");
    }
    if !said.may_replicate {
        let remedy = "ALTER ROLE … REPLICATION, or on managed Postgres the role that stands for it (rds_replication).";
        list.blocker("weir's account may not replicate".to_owned(), remedy);
    }
    if !said.may_create {
        let remedy = "GRANT CREATE ON DATABASE … to weir's account.";
        list.blocker("weir's account may not create publications and schema weir".to_owned(), remedy);
    }
    if !said.may_apply {
        let remedy = "Postgres 15 and later: GRANT SET ON PARAMETER session_replication_role TO weir's account. Before that it must be superuser, \
                      or a member of what stands for it on managed Postgres and may set it (rds_superuser).";
        list.blocker("weir's account may not set session_replication_role".to_owned(), remedy);
    }
    for table in &said.foreign {
        let mut of_table = Findings { shard, table, found: Vec::new() };
        let remedy = "ALTER TABLE … OWNER TO weir's account, or make that account a member of the owner.";
        of_table.blocker("weir's account does not own it, and so may not guard or publish it".to_owned(), remedy);
        list.found.append(&mut of_table.found);
    }
    if said.prepared > 0 {
        let what = format!("{} prepared transactions wait for their decision", said.prepared);
        list.warning(what, "SHOW PREPARED TRANSACTIONS lists them; a cut-over waits for those that wrote what moves.");
    }
    if said.oldest_transaction > LONG_SECONDS {
        let what = format!("a transaction has been open for {:.0} s", said.oldest_transaction);
        list.warning(
            what,
            "A replication slot is made only when all that run now are over, and a cut-over waits for writers.",
        );
    }
    list.found
}

/// What stands in the way where one shard is to get company.
pub fn judge_lone(shard: &str, said: &ServerSaid) -> Vec<Finding> {
    let mut list = Findings { shard, table: "", found: Vec::new() };
    for column in &said.loose {
        list.blocker(
            format!("{column} is declared global_unique, and nothing keeps it unique on this shard"),
            "Add a UNIQUE constraint of that column alone, or do not declare it.",
        );
    }
    let what = "all data is on one shard, which refuses nothing; with several, some statements are refused".to_owned();
    list.warning(what, "weir advise on a log of statements tells which, and why.");
    list.found
}

/// Does the target fit the source? `is_new`: it is to get its tables from the source.
pub fn judge_pair(source: (&str, &ServerSaid), target: (&str, &ServerSaid), is_new: bool) -> Vec<Finding> {
    let (from, source) = source;
    let (to, target) = target;
    let mut list = Findings { shard: to, table: "", found: Vec::new() };
    if source.encoding != target.encoding {
        let what = format!("its encoding is {}, that of {from} is {}", target.encoding, source.encoding);
        list.blocker(what, "Text keys hash by their bytes: make the database with the same encoding.");
    }
    let (older, newer) = (target.version / 10_000, source.version / 10_000);
    if older < newer {
        let what = format!("it is Postgres {older}, {from} is {newer}");
        list.blocker(what, "Types and functions of the newer one may be missing: upgrade the target first.");
    }
    let missing: Vec<&str> = source.extensions.difference(&target.extensions).map(String::as_str).collect();
    if !missing.is_empty() {
        let what = format!("extensions of {from} are missing: {}", missing.join(", "));
        list.blocker(what, "CREATE EXTENSION on the target.");
    }
    let tables = |said: &ServerSaid| said.objects.keys().any(|object| object.kind == "table");
    if is_new && tables(target) {
        let what = "it has tables of the same names already".to_owned();
        list.blocker(
            what,
            "A shard that is to be added must not have the declared tables: drop them, or use an empty database.",
        );
    }
    if !is_new {
        for one in drift(&[source.objects.clone(), target.objects.clone()]) {
            let what = format!("{} {} is not the same on {from} and {to}", one.object.kind, one.object.name);
            let mut of_table = Findings { shard: to, table: &one.object.table, found: Vec::new() };
            of_table.blocker(what, "SHOW DRIFT has both definitions; make them the same.");
            list.found.append(&mut of_table.found);
        }
    }
    list.found
}

/// Everything there is to say of one table on a source.
pub fn judge_table(shard: &str, table: &TableSaid) -> Vec<Finding> {
    let mut list = Findings { shard, table: &table.name, found: Vec::new() };
    if table.unlogged {
        let what = "it is unlogged: changes of its rows are not in the WAL".to_owned();
        list.blocker(what, "ALTER TABLE … SET LOGGED.");
    }
    if table.is_strange {
        let what = "its rows are in another table or on another server".to_owned();
        list.blocker(
            what,
            "Foreign tables, views and what other tables inherit from do not move: detach it, or do not declare it.",
        );
    } else if !table.has_identity {
        let what = "its rows cannot be told apart in the WAL: no primary key, no replica identity".to_owned();
        list.blocker(what, "Add a primary key, or ALTER TABLE … REPLICA IDENTITY FULL.");
    }
    if !table.unique_elsewhere.is_empty() {
        let what =
            format!("unique without the shard key, so equal values may meet: {}", table.unique_elsewhere.join(", "));
        list.warning(what, "Values from sequences through weir never meet; others: declare them global_unique.");
    }
    if let Some((slot, times)) = table.skew() {
        let what = format!("slot {} has {times:.0} times the rows of a mean slot", slot.index());
        list.warning(what, "One key may have most of them, or keys are composed so that they hash alike.");
    }
    list.found
}

struct Findings<'a> {
    shard: &'a str,
    table: &'a str,
    found: Vec<Finding>,
}

impl Findings<'_> {
    fn blocker(&mut self, what: String, remedy: &str) {
        self.add(Gravity::Blocker, what, remedy);
    }

    fn warning(&mut self, what: String, remedy: &str) {
        self.add(Gravity::Warning, what, remedy);
    }

    fn add(&mut self, gravity: Gravity, what: String, remedy: &str) {
        let (shard, table) = (self.shard.to_owned(), self.table.to_owned());
        self.found.push(Finding { gravity, shard, table, what, remedy: remedy.to_owned() });
    }
}
