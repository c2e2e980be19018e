//! The fallback engine's database on the hub, as one SQL text made of the home shard's catalogue and a topology.
//!
//! Every relation of the shards stands there under its own name, so that a client's statement runs unchanged: a sharded table is
//! partitioned by a hash whose remainder is the number of the shard, with a foreign table of each shard as its partition; any other
//! table is a foreign table of the home shard. Views, types and functions that cannot write are made anew. While slots move, a sharded
//! table is a view of those foreign tables that leaves guests out.
//!
//! Invariants: the same input gives the same text, so that its hash says whether a database is up to date. What cannot be made, or
//! would not mean the same there, is listed as skipped with its reason and never stands for something else. Clients can read, and
//! nothing more; the passwords in the text are the hub's account's alone to see.
//! Non-goals: running the text, and reading catalogues.

mod script;

pub use script::{reach, script};

use crate::id::Epoch;
use crate::topology::{KeySet, SlotMap, TableRules};

/// Schema of weir's own objects in that database.
pub const SCHEMA: &str = "weir_engine";

/// A shard's server as the hub reaches it.
#[derive(Clone, PartialEq, Eq)]
pub struct ShardServer {
    pub host: String,
    pub port: u16,
    pub database: String,
    pub user: String,
    /// `None`: the server asks for none.
    pub password: Option<String>,
    /// As libpq spells it.
    pub sslmode: &'static str,
    /// For the modes that verify: a file of the hub's server, or `system`.
    pub sslrootcert: Option<String>,
}

/// An object that is made by one statement, if it can be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// `view`, `type` …, for people.
    pub kind: &'static str,
    /// Its name without schema.
    pub name: String,
    /// Its name for people.
    pub shown: String,
    pub sql: String,
}

/// An object that is not to be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    pub kind: String,
    /// Its name without schema; empty for what no statement names.
    pub name: String,
    pub shown: String,
    pub reason: String,
}

/// What kind of relation a foreign table is to stand for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    pub oid: u32,
    pub schema: String,
    pub name: String,
    pub columns: Vec<Column>,
    /// Roles that may read it, quoted; `PUBLIC` is a word.
    pub readers: Vec<String>,
    /// Roles that may read some columns: column and role, both quoted.
    pub column_readers: Vec<(String, String)>,
    /// Why it cannot be read from the hub.
    pub refused: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Column {
    pub name: String,
    /// Name, type, collation and NOT NULL, as CREATE TABLE wants them.
    pub definition: String,
    /// Type, or what a domain is made of.
    pub type_oid: u32,
}

/// A role of the shards.
#[derive(Clone, PartialEq, Eq)]
pub struct Role {
    pub name: String,
    pub login: bool,
    pub inherit: bool,
    /// It may read everything, as superusers do.
    pub reads_all: bool,
    /// As pg_authid stores it, where weir's account may see that.
    pub verifier: Option<String>,
    pub valid_until: Option<String>,
}

/// What the home shard's catalogue says, in the order in which things are to be made.
#[derive(Clone, Default)]
pub struct Home {
    /// Settings in force for a session without any of its own.
    pub settings: Vec<(String, String)>,
    pub roles: Vec<Role>,
    /// Group and member.
    pub memberships: Vec<(String, String)>,
    /// Role and `name=value`.
    pub role_settings: Vec<(String, String)>,
    /// Schema, and the roles that may use it, quoted.
    pub schemas: Vec<(String, Vec<String>)>,
    /// Without these no statement would surely mean the same.
    pub needed: Vec<String>,
    pub extensions: Vec<Object>,
    pub types: Vec<Object>,
    pub tables: Vec<Table>,
    /// Primary keys in words. They are not made; but a database made under others is another one.
    pub keys: Vec<String>,
    pub functions: Vec<Object>,
    pub views: Vec<Object>,
    /// Statements that give roles what they have on functions and views.
    pub grants: Vec<String>,
    pub skipped: Vec<Skipped>,
}

/// What the text is made for.
pub struct Target<'a> {
    /// The engine's database.
    pub database: &'a str,
    pub epoch: Epoch,
    /// In order of their ids.
    pub shards: &'a [ShardServer],
    pub home: usize,
    pub slots: &'a SlotMap,
    pub rules: &'a TableRules,
    /// Keys of which each of the shards may have rows that it does not own.
    pub guests: &'a [Option<&'a KeySet>],
    /// The hub's account may make operator classes.
    pub partitions: bool,
    /// It is a superuser.
    pub superuser: bool,
    /// Of one sort or hash, in KiB.
    pub work_mem_kib: usize,
    /// Of one statement's temporary files, in KiB.
    pub temp_kib_max: usize,
}
