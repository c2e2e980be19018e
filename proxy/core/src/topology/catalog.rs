//! What the servers' own catalogue says of tables and functions: read by the server crate, used by planning.
//!
//! One immutable value per database; a new one is made after DDL. Nothing here says where a table lives (that is
//! [`super::TableRules`]), only what it is.

pub mod reach;

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
    pub default: DefaultKind,
}

/// What an INSERT that leaves the column out puts there (pg_attrdef, pg_attribute.attidentity).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DefaultKind {
    #[default]
    None,
    /// The same whenever and wherever it is computed.
    Constant,
    /// The server computes it from other columns; nobody else may.
    Generated,
    /// It may differ between servers or moments: now(), a sequence, an identity column, a random value.
    Differs,
}

/// Schema and name of a relation.
pub type RelationName = (Box<str>, Box<str>);

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relation {
    pub kind: RelationKind,
    pub columns: Vec<Column>,
    /// Writing it may write other tables: user triggers, or foreign keys of others that CASCADE or SET.
    pub writes_spread: bool,
    /// Foreign keys refer to it.
    pub referenced: bool,
    /// Has a primary key or unique index whose columns do not include the given shard key: filled by name, for checks.
    pub unique_columns: Vec<Vec<Box<str>>>,
    /// Other relations whose rows its rows are made of or depend on, through any number of views, rules, policies,
    /// partitions and functions (see [`reach`]). Sorted; system catalogues are left out.
    pub reads: Vec<RelationName>,
    /// Relations its triggers mention, followed in the same way. Sorted.
    pub triggers: Vec<RelationName>,
}

/// A column that takes its default from a sequence, and from nothing else: serial, identity, or `DEFAULT nextval('…')`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrawnColumn {
    pub column: Box<str>,
    pub sequence: RelationName,
    /// GENERATED ALWAYS AS IDENTITY: a value can only be given with OVERRIDING SYSTEM VALUE.
    pub always: bool,
}

/// How a sequence counts (pg_sequence).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SequenceRule {
    pub start: i64,
    /// Above 0: weir leaves sequences that count down, or start anew at their end, to the servers.
    pub increment: i64,
    pub max: i64,
}

/// How far a function's answer can be relied on (pg_proc.provolatile).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Volatility {
    Immutable,
    Stable,
    Volatile,
}

/// Functions of one name that accept the same numbers of arguments; their worst volatility.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overload {
    pub least_arguments: u16,
    pub most_arguments: u16,
    pub volatility: Volatility,
}

/// All functions and procedures of one name outside pg_catalog together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct UserFunction {
    /// Relations their bodies mention, directly or through views and other functions (see [`reach`]). Sorted.
    pub mentions: Vec<RelationName>,
    /// A body could not be read: it may mention anything.
    pub opaque: bool,
    /// One of them is volatile, so that Postgres lets it write.
    pub may_write: bool,
}

/// What may leave state behind in the session, through functions whose bodies do. By bare names, in any schema.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keepers {
    pub functions: BTreeSet<Box<str>>,
    /// Relations whose rules, views or policies call such functions.
    pub read: BTreeSet<Box<str>>,
    /// Relations whose triggers do.
    pub written: BTreeSet<Box<str>>,
}

/// A column that is unique over all shards: how far weir has come with that on the home shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UniqueColumn {
    pub column: Box<str>,
    pub state: UniqueState,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UniqueState {
    /// Its triggers note every change, and values from before are still being looked up.
    Building,
    /// Every value is in the lookup table of its shard.
    Valid,
    /// Why it cannot be enforced. `noted`: every change is still noted.
    Failed { reason: Box<str>, noted: bool },
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Catalog {
    /// What weir keeps for columns that are unique over all shards, by table.
    pub unique: BTreeMap<RelationName, Vec<UniqueColumn>>,
    /// Columns that draw from a sequence with a [`SequenceRule`], by table, in attribute order.
    pub drawn: BTreeMap<RelationName, Vec<DrawnColumn>>,
    /// The sequences of those columns.
    pub sequences: BTreeMap<RelationName, SequenceRule>,
    /// Partitions at any depth, with the table that they are partitions of in the end.
    pub partitions: BTreeMap<RelationName, RelationName>,
    /// By schema, then name.
    pub relations: BTreeMap<Box<str>, BTreeMap<Box<str>, Relation>>,
    /// Functions of schema pg_catalog.
    pub builtin_functions: BTreeMap<Box<str>, Vec<Overload>>,
    /// Functions in any other schema: a call of such a name is never known harmless.
    pub user_functions: BTreeMap<Box<str>, UserFunction>,
    /// Names of aggregates in any schema (pg_proc.prokind 'a').
    pub aggregates: BTreeSet<Box<str>>,
    /// Names of window functions in any schema (pg_proc.prokind 'w').
    pub windows: BTreeSet<Box<str>>,
    /// What may leave state behind in the session.
    pub keepers: Keepers,
    /// Does the database's default collation order by bytes (C, POSIX, C.UTF-8)?
    pub database_byte_order: bool,
    /// May a session that has not set extra_float_digits itself read floats as text with too few digits (less than 1)?
    pub floats_rounded: bool,
    /// Has somebody made casts of types that Postgres uses by itself (pg_cast.castcontext)?
    pub own_casts: bool,
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
            && self.partitions == other.partitions
            && self.unique == other.unique
            && self.drawn == other.drawn
            && self.sequences == other.sequences
            && self.builtin_functions == other.builtin_functions
            && self.user_functions == other.user_functions
            && self.aggregates == other.aggregates
            && self.windows == other.windows
            && self.keepers == other.keepers
            && self.database_byte_order == other.database_byte_order
            && self.floats_rounded == other.floats_rounded
            && self.own_casts == other.own_casts
    }

    /// The worst of the built-ins of that name that accept so many arguments; of all of them where the number is not
    /// known or fits none. `None`: no built-in of that name.
    pub fn builtin(&self, name: &str, arguments: Option<u16>) -> Option<Volatility> {
        let overloads = self.builtin_functions.get(name)?;
        let accepts = |overload: &&Overload| {
            arguments.is_some_and(|count| (overload.least_arguments..=overload.most_arguments).contains(&count))
        };
        let worst = |overload: &Overload| overload.volatility;
        overloads.iter().filter(accepts).map(worst).max().or_else(|| overloads.iter().map(worst).max())
    }
}
