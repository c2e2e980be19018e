//! What the servers' own catalogue says of tables and functions: read by the server crate, used by planning.
//!
//! One immutable value per database; a new one is made after DDL. Nothing here says where a table lives (that is
//! [`super::TableRules`]), only what it is.

use std::collections::{BTreeMap, BTreeSet};

/// What kind of relation a name stands for (pg_class.relkind, narrowed to what planning needs).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RelationKind {
    /// An ordinary permanent, logged table with no parent, children, rules or row security.
    PlainTable,
    /// A table with something that makes its contents or writes more than its own rows (partitioned, inherited,
    /// unlogged, row security, rules).
    OtherTable,
    View,
    MaterializedView,
    Foreign,
    Sequence,
}

/// One column, in attribute order without dropped ones.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Column {
    pub name: Box<str>,
    pub type_oid: u32,
    /// Does ordering or equality of this column follow byte order (collation C, POSIX, C.UTF-8, or none needed)?
    pub byte_order: bool,
    pub not_null: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relation {
    pub kind: RelationKind,
    pub columns: Vec<Column>,
    /// Writing it may write other tables: user triggers, or foreign keys of others that CASCADE or SET.
    pub writes_spread: bool,
    /// Has a primary key or unique index whose columns do not include the given shard key: filled by name, for checks.
    pub unique_columns: Vec<Vec<Box<str>>>,
}

/// Volatility of all functions of one name together: the worst of the overloads (pg_proc.provolatile).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Volatility {
    Immutable,
    Stable,
    Volatile,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Catalog {
    /// By schema, then name.
    pub relations: BTreeMap<Box<str>, BTreeMap<Box<str>, Relation>>,
    /// Functions of schema pg_catalog.
    pub builtin_functions: BTreeMap<Box<str>, Volatility>,
    /// Names of functions in any other schema: a call of such a name is never known harmless.
    pub user_functions: BTreeSet<Box<str>>,
    /// Does the database's default collation order by bytes (C, POSIX, C.UTF-8)?
    pub database_byte_order: bool,
    /// Grows with every re-read, so that cached templates of an older one are dropped.
    pub version: u64,
}

impl Catalog {
    pub fn relation(&self, schema: &str, name: &str) -> Option<&Relation> {
        self.relations.get(schema)?.get(name)
    }

    /// Does it say the same, whatever its version?
    pub fn same_as(&self, other: &Catalog) -> bool {
        self.relations == other.relations
            && self.builtin_functions == other.builtin_functions
            && self.user_functions == other.user_functions
            && self.database_byte_order == other.database_byte_order
    }

    /// `None`: no built-in of that name.
    pub fn builtin(&self, name: &str) -> Option<Volatility> {
        self.builtin_functions.get(name).copied()
    }
}
