//! Why a plan is what it is: one set of enums for EXPLAIN and ROUTE, logs and metric labels.

use std::fmt;
use std::sync::Arc;

use crate::error::UserError;
use crate::id::{ShardId, Slot};
use crate::topology::Topology;

/// A key condition as people read it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyName {
    pub table: Box<str>,
    pub column: Box<str>,
    /// `$1`, `42`, `any of $1`.
    pub value: Box<str>,
}

/// Why this target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RouteReason {
    /// There is but one shard.
    SingleShard,
    /// Everything the statement touches is keyed by one value.
    Key { name: Arc<KeyName>, slot: Slot, shard: ShardId },
    /// Several keys, all of one shard.
    KeysTogether { name: Arc<KeyName>, keys: usize, shard: ShardId },
    /// The key is NULL or the list of keys empty: no row can match.
    NoKey { name: Arc<KeyName> },
    /// Keys on several shards.
    KeysApart { name: Arc<KeyName>, keys: usize, shards: usize },
    /// No key: every shard is asked.
    Scatter,
    /// COPY into a sharded table: each row goes to the shard of its key.
    RowsApart,
    /// Only reference tables are read.
    ReferenceRead,
    /// A reference table is written on every shard.
    ReferenceWrite,
    /// A table that is not declared sharded or reference lives at home.
    GlobalTable,
    /// pg_catalog or information_schema.
    SystemCatalog,
    /// No table and nothing but immutable functions.
    NoTable,
    /// No table, but a function whose answer depends on the server.
    ServerFunction,
    /// Every shard must have it.
    EveryShard,
    /// Temporary objects live in the session's one server connection.
    Temporary,
    /// A statement that is about the session or the server.
    SessionStatement,
    /// Not understood, and it names no sharded or reference table.
    Unparsed,
    /// The rows it inserts are read first: they do not stay where they are, as this refusal says.
    Carried { refusal: Box<UserError> },
    /// Neither one shard nor a merge can answer, as this refusal says; Postgres on the hub can.
    Engine { refusal: Box<UserError> },
}

impl RouteReason {
    /// Does the statement look at rows of an application's tables, so that it matters which snapshot it sees?
    pub fn sees_rows(&self) -> bool {
        !matches!(
            self,
            RouteReason::SystemCatalog
                | RouteReason::NoTable
                | RouteReason::ServerFunction
                | RouteReason::EveryShard
                | RouteReason::Temporary
                | RouteReason::SessionStatement
        )
    }

    /// A stable name for metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            RouteReason::SingleShard => "single_shard",
            RouteReason::Key { .. } => "key",
            RouteReason::KeysTogether { .. } => "keys_together",
            RouteReason::NoKey { .. } => "no_key",
            RouteReason::KeysApart { .. } => "keys_apart",
            RouteReason::Scatter => "scatter",
            RouteReason::RowsApart => "rows_apart",
            RouteReason::ReferenceRead => "reference_read",
            RouteReason::ReferenceWrite => "reference_write",
            RouteReason::GlobalTable => "global_table",
            RouteReason::SystemCatalog => "system_catalog",
            RouteReason::NoTable => "no_table",
            RouteReason::ServerFunction => "server_function",
            RouteReason::EveryShard => "every_shard",
            RouteReason::Temporary => "temporary",
            RouteReason::SessionStatement => "session_statement",
            RouteReason::Unparsed => "unparsed",
            RouteReason::Carried { .. } => "carried",
            RouteReason::Engine { .. } => "engine",
        }
    }

    /// The sentence with shards called by their names.
    pub fn sentence(&self, topology: &Topology) -> String {
        let shard = |id: ShardId| topology.name_of(id);
        match self {
            RouteReason::Key { name, slot, shard: id } => {
                format!("{} → slot {} → {}", Condition(name), slot.index(), shard(*id))
            }
            RouteReason::KeysTogether { name, keys, shard: id } => {
                format!("{}: {keys} keys, all on {}", Condition(name), shard(*id))
            }
            other => other.to_string(),
        }
    }
}

struct Condition<'a>(&'a KeyName);

impl fmt::Display for Condition<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} = {}", self.0.table, self.0.column, self.0.value)
    }
}

impl fmt::Display for RouteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteReason::Key { name, slot, shard } => {
                write!(f, "{} → slot {} → shard {shard}", Condition(name), slot.index())
            }
            RouteReason::KeysTogether { name, keys, shard } => {
                write!(f, "{}: {keys} keys, all on shard {shard}", Condition(name))
            }
            RouteReason::NoKey { name } => write!(f, "{} can match no row, so any shard may say so", Condition(name)),
            RouteReason::KeysApart { name, keys, shards } => {
                write!(f, "{}: {keys} keys on {shards} shards", Condition(name))
            }
            RouteReason::SingleShard => f.write_str("there is only one shard"),
            RouteReason::Scatter => f.write_str("no shard key in the statement: every shard takes part"),
            RouteReason::RowsApart => f.write_str("each row goes to the shard of its key"),
            RouteReason::ReferenceRead => f.write_str("only reference tables are read: any shard has them"),
            RouteReason::ReferenceWrite => f.write_str("a reference table is written on every shard"),
            RouteReason::GlobalTable => {
                f.write_str("a table that is neither sharded nor reference lives on the home shard")
            }
            RouteReason::SystemCatalog => f.write_str("system catalogues are read on the home shard"),
            RouteReason::NoTable => f.write_str("no table, and every shard computes the same"),
            RouteReason::ServerFunction => {
                f.write_str("no table, but a function that depends on the server: home shard")
            }
            RouteReason::EveryShard => f.write_str("every shard must have it"),
            RouteReason::Temporary => f.write_str("temporary objects live on the session's own connection"),
            RouteReason::SessionStatement => f.write_str("a statement about the session or the server: home shard"),
            RouteReason::Unparsed => {
                f.write_str("not understood, and no sharded or reference table is named: home shard, as a write")
            }
            RouteReason::Carried { refusal } => {
                f.write_str("its rows are read first, and each goes to where it belongs")?;
                match &refusal.detail {
                    Some(detail) => write!(f, " ({})", detail.trim_end_matches('.')),
                    None => Ok(()),
                }
            }
            RouteReason::Engine { refusal } => {
                write!(f, "{}: the fallback engine on the hub answers", refusal.message)?;
                match &refusal.detail {
                    Some(detail) => write!(f, " ({})", detail.trim_end_matches('.')),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Why a read may not go to a replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PrimaryReason {
    RowLocks,
    UnknownRelation,
    /// A view, partitioned table or the like: what it reads is not known.
    NotPlainTable,
    SystemCatalog,
    /// ctid, xmin, TABLESAMPLE: true of one server.
    ServerBound,
    /// SHOW, FETCH and the like.
    SessionStatement,
}

impl PrimaryReason {
    pub fn as_str(self) -> &'static str {
        match self {
            PrimaryReason::RowLocks => "row_locks",
            PrimaryReason::UnknownRelation => "unknown_relation",
            PrimaryReason::NotPlainTable => "not_plain_table",
            PrimaryReason::SystemCatalog => "system_catalog",
            PrimaryReason::ServerBound => "server_bound",
            PrimaryReason::SessionStatement => "session_statement",
        }
    }
}

impl fmt::Display for PrimaryReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PrimaryReason::RowLocks => "it locks rows",
            PrimaryReason::UnknownRelation => "a relation in it is not in the catalogue weir read",
            PrimaryReason::NotPlainTable => {
                "a view, partitioned or otherwise special table: what it reads is not known"
            }
            PrimaryReason::SystemCatalog => "it reads system catalogues",
            PrimaryReason::ServerBound => "it asks for what differs between servers (ctid, xmin, TABLESAMPLE)",
            PrimaryReason::SessionStatement => "it is about the session",
        })
    }
}

/// Why a reply may not be cached.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NoCacheReason {
    NotSelect,
    Write,
    Primary(PrimaryReason),
    /// A function that is not built-in and immutable.
    Function,
    NoTable,
    Scatter,
    NotPlainTable,
    /// A text value such as 'now' or 'today' that the server may read as the present time.
    TimeWord,
    Unparsed,
    /// It reads every shard through the fallback engine.
    Engine,
    /// The configuration says so for a table in it.
    Policy,
    /// The statement's hint says so.
    Hint,
}

impl NoCacheReason {
    /// What [`NoCacheReason::as_str`] may say.
    pub const LABELS: [&str; 12] = [
        "not_select",
        "write",
        "primary_read",
        "function",
        "no_table",
        "scatter",
        "not_plain_table",
        "time_word",
        "unparsed",
        "engine",
        "policy",
        "hint",
    ];

    /// Its place among the labels.
    pub fn index(self) -> usize {
        let label = self.as_str();
        Self::LABELS.iter().position(|known| *known == label).unwrap_or_default()
    }

    pub fn as_str(self) -> &'static str {
        match self {
            NoCacheReason::NotSelect => "not_select",
            NoCacheReason::Write => "write",
            NoCacheReason::Primary(_) => "primary_read",
            NoCacheReason::Function => "function",
            NoCacheReason::NoTable => "no_table",
            NoCacheReason::Scatter => "scatter",
            NoCacheReason::NotPlainTable => "not_plain_table",
            NoCacheReason::TimeWord => "time_word",
            NoCacheReason::Unparsed => "unparsed",
            NoCacheReason::Engine => "engine",
            NoCacheReason::Policy => "policy",
            NoCacheReason::Hint => "hint",
        }
    }
}

impl fmt::Display for NoCacheReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoCacheReason::NotSelect => f.write_str("not a SELECT"),
            NoCacheReason::Write => f.write_str("it may write"),
            NoCacheReason::Primary(reason) => write!(f, "{reason}"),
            NoCacheReason::Function => f.write_str("it calls a function that is not built-in and immutable"),
            NoCacheReason::NoTable => f.write_str("it reads no table"),
            NoCacheReason::Scatter => f.write_str("it is merged from several shards"),
            NoCacheReason::NotPlainTable => f.write_str("a relation in it is not a plain table"),
            NoCacheReason::TimeWord => f.write_str("a value in it may mean the present time"),
            NoCacheReason::Unparsed => f.write_str("not understood"),
            NoCacheReason::Engine => f.write_str("it is answered by the fallback engine"),
            NoCacheReason::Policy => f.write_str("a table in it is configured with cache = \"never\""),
            NoCacheReason::Hint => f.write_str("its hint says cache=never"),
        }
    }
}
