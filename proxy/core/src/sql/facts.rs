//! What planning needs to know of one statement: plain values, no syntax tree.
//!
//! Invariant: a [`Facts`] only says what is certain. A key set that is present holds every key the table instance can
//! touch; a name that could not be resolved leaves the fact out, and the planner then has less to go by, never something
//! false. Non-goals: where anything lives now (that is the planner with a topology) and how to print SQL.

use crate::topology::catalog::{Catalog, Relation};
use crate::topology::{KeyType, Placement, TableRules, Width};

/// The database as planning sees it.
#[derive(Clone, Copy, Debug)]
pub struct Schema<'a> {
    pub rules: &'a TableRules,
    pub catalog: &'a Catalog,
    /// Effective schemas in look-up order, without `pg_catalog` (it is always searched).
    pub search_path: &'a [Box<str>],
    pub width: Width,
}

/// A relation name after the search path was applied.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TableName {
    pub schema: Box<str>,
    pub name: Box<str>,
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if &*self.schema == "public" { f.write_str(&self.name) } else { write!(f, "{}.{}", self.schema, self.name) }
    }
}

impl<'a> Schema<'a> {
    /// Finds a relation as Postgres would: the first schema of the path that has it. A name nobody knows keeps the first
    /// schema of the path (or `pg_catalog` for names that start with `pg_`).
    pub fn resolve(&self, schema: Option<&str>, name: &str) -> TableName {
        let found = |schema: &str| TableName { schema: schema.into(), name: name.into() };
        if let Some(schema) = schema {
            return found(schema);
        }
        for schema in self.search_path {
            if self.catalog.relation(schema, name).is_some() || self.declared(schema, name) {
                return found(schema);
            }
        }
        if name.starts_with("pg_") {
            return found("pg_catalog");
        }
        found(self.search_path.first().map_or("public", |schema| schema))
    }

    fn declared(&self, schema: &str, name: &str) -> bool {
        *self.rules.placement(schema, name) != Placement::Global
    }

    pub fn relation(&self, table: &TableName) -> Option<&'a Relation> {
        self.catalog.relation(&table.schema, &table.name)
    }

    /// Is the column a varchar, which may store less than it is given?
    pub fn is_varchar(&self, table: &TableName, column: &str) -> bool {
        const VARCHAR: u32 = 1043;
        let mut columns = self.relation(table).into_iter().flat_map(|relation| &relation.columns);
        columns.any(|one| &*one.name == column && one.type_oid == VARCHAR)
    }

    /// A partition lives where the table does that it is a part of.
    pub fn placement(&self, table: &TableName) -> &'a Placement {
        let declared = self.rules.placement(&table.schema, &table.name);
        if *declared != Placement::Global || self.catalog.partitions.is_empty() {
            return declared;
        }
        let whole = self.catalog.partitions.get(&(table.schema.clone(), table.name.clone()));
        whole.map_or(declared, |(schema, name)| self.rules.placement(schema, name))
    }
}

/// A value written where a key, a limit or an offset stands.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Term {
    /// `$n`: a client parameter, or a lifted literal when n is above the client's count.
    Param { number: u16, negated: bool },
    /// `= ANY($n)`: the elements of an array in `$n`.
    Array { number: u16 },
    /// A literal that was left in the text.
    Literal(Literal),
    /// `'{1,2}'` left in the text, as an array.
    ArrayLiteral(Box<str>),
    /// `NULL`: equal to nothing.
    Null,
}

/// An unlifted literal, unquoted.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Literal {
    Number(Box<str>),
    String(Box<str>),
}

/// Every key a table instance can touch: the union of its terms. Never empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeySet {
    pub terms: Vec<Term>,
}

impl KeySet {
    pub fn one(term: Term) -> Self {
        KeySet { terms: vec![term] }
    }

    /// Is it one value, whatever the parameters?
    pub fn is_single(&self) -> bool {
        matches!(self.terms.as_slice(), [Term::Param { .. } | Term::Literal(_) | Term::Null])
    }
}

/// What a statement does to a table instance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    Read,
    Insert,
    Update,
    Delete,
}

impl Use {
    pub fn is_write(self) -> bool {
        self != Use::Read
    }
}

/// How an instance of a sharded table relates to the tables the top-level FROM is spread by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spread {
    /// In the top-level FROM, never null-extended: its rows are rows of the result.
    Core,
    /// Its key equals a core instance's key wherever its rows matter.
    WithCore,
    /// Nothing is known.
    Free,
}

/// One mention of a relation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    pub table: TableName,
    pub usage: Use,
    /// Sharded tables only: the keys it is restricted to, if certain.
    pub keys: Option<KeySet>,
    pub spread: Spread,
    /// Is it in the statement's outermost block?
    pub top: bool,
}

/// A function call by name; `schema` only if written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FunctionName {
    pub schema: Option<Box<str>>,
    pub name: Box<str>,
    /// How many arguments, where that can be told from the text.
    pub arguments: Option<u16>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    Select,
    Insert,
    Update,
    Delete,
}

/// What an INSERT says of the shard key of the table it fills.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KeySetting {
    /// The statement does not set the key column of an existing row, or gives an INSERT its key.
    Fine,
    /// UPDATE or ON CONFLICT sets the key column to something that may differ from the row's key.
    Changes,
    /// The INSERT has no value for the key column.
    Missing,
    /// The INSERT's key is computed by the server.
    Computed,
}

/// Everything certain about one DML statement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub verb: Verb,
    pub instances: Vec<Instance>,
    pub functions: Vec<FunctionName>,
    /// FOR UPDATE / FOR SHARE anywhere.
    pub locks_rows: bool,
    /// INSERT, UPDATE or DELETE inside WITH.
    pub writes_in_with: bool,
    pub with: bool,
    pub key_setting: KeySetting,
    /// Columns of written tables that get a default which may differ between servers: `(table, column)`.
    pub differing_defaults: Vec<(TableName, Box<str>)>,
    /// ON CONFLICT DO UPDATE: an INSERT that may change rows it does not give the key of.
    pub updates_conflicts: bool,
    /// Any sub-query with LIMIT, OFFSET, FETCH or DISTINCT ON over a sharded table.
    pub limited_subquery: bool,
    /// ctid, xmin and the like, or TABLESAMPLE: true of one server only.
    pub server_bound: bool,
    /// The outermost SELECT, if the statement is one SELECT block.
    pub select: Option<SelectShape>,
    /// Why the statement cannot be spread although it is parsed (set operation, FULL JOIN, …).
    pub unspreadable: Option<&'static str>,
    /// Parameters used as a key and also elsewhere, so that the server may have chosen another type for them.
    pub ambiguous_params: Vec<u16>,
}

/// The outermost SELECT block as merging sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SelectShape {
    pub items: Vec<SelectItem>,
    pub distinct: bool,
    /// How many expressions DISTINCT ON has; 0: there is none.
    pub distinct_on: usize,
    pub group: Vec<Expression>,
    pub having: bool,
    /// What HAVING says, if it can be reproduced.
    pub having_formula: Option<Formula>,
    pub order: Vec<Ordering>,
    pub limit: Limit,
    pub offset: Limit,
    /// FETCH FIRST … WITH TIES.
    pub ties: bool,
    /// All columns of everything in FROM are known, so that a name which is none of them is an output name.
    pub names_complete: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SelectItem {
    pub kind: ItemKind,
    /// Output name; `None` also for what Postgres calls `?column?`.
    pub name: Option<Box<str>>,
    /// The output name depends on what weir does not know.
    pub name_unsure: bool,
    /// The name is written behind the expression.
    pub aliased: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ItemKind {
    /// `*` or `t.*`: the columns it stands for, if the catalogue knows them all.
    Wildcard(Option<Vec<WildcardColumn>>),
    Expression(Expression),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WildcardColumn {
    pub name: Box<str>,
    pub column: Option<ColumnFacts>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ColumnFacts {
    /// Number of the FROM entry, unique in the statement.
    pub owner: usize,
    pub name: Box<str>,
    pub byte_order: bool,
    /// Is it a core instance's shard key, or equal to one?
    pub is_key: bool,
    /// 0 when unknown.
    pub type_oid: u32,
}

/// What is known of one expression of the outermost SELECT.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Expression {
    /// It is nothing but a column.
    pub column: Option<ColumnFacts>,
    /// It is nothing but this bare name (a column or, in ORDER BY and GROUP BY, an output name).
    pub bare_name: Option<Box<str>>,
    /// It is nothing but a lifted or plain literal or parameter.
    pub value: Option<Term>,
    /// It is nothing but an aggregate call.
    pub aggregate: Option<Aggregate>,
    /// It is more than an aggregate call, and can be put together from aggregates.
    pub formula: Option<Formula>,
    pub has_aggregate: bool,
    pub has_window: bool,
    /// Every window in it is partitioned by the shard key, so that no partition spans shards.
    pub windows_stay: bool,
    pub has_subquery: bool,
    /// May text of this expression be compared by bytes?
    pub byte_order: bool,
    /// COLLATE something that is not byte order.
    pub foreign_collation: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Aggregate {
    pub name: Box<str>,
    /// Written without a schema, so that its name is one token.
    pub plain_name: bool,
    pub distinct: bool,
    /// count(DISTINCT k) where k is the shard key.
    pub argument_is_key: bool,
    /// Type of the argument if it is a plain column, else 0.
    pub argument_type: u32,
    /// May text of its one argument be compared by bytes?
    pub argument_byte_order: bool,
    /// ORDER BY inside, WITHIN GROUP, or several arguments.
    pub ordered: bool,
    pub filtered: bool,
}

/// An expression over aggregates, columns and numbers, in operations whose result can be reproduced without a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Formula {
    Aggregate(Aggregate),
    Column(ColumnFacts),
    /// A number in the text, lifted or not, or NULL; never a client's parameter, whose type the server chooses.
    Constant(Term),
    Apply(Operation, Vec<Formula>),
}

/// The operations of a [`Formula`], on integers, numeric and boolean alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Negate,
    Add,
    Subtract,
    Multiply,
    Divide,
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    And,
    Or,
    Not,
    IsNull,
    IsNotNull,
    Coalesce,
    NullIf,
    Round,
    ToInt2,
    ToInt4,
    ToInt8,
    ToNumeric,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ordering {
    pub expression: Expression,
    pub descending: bool,
    pub nulls_first: bool,
}

/// LIMIT or OFFSET.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Limit {
    #[default]
    None,
    Term(Term),
    /// An expression, or FETCH: not known before the server computes it.
    Computed,
}

/// Type family of a column, for comparing keys; `None` for every type that cannot be one, char(n) among them: its hash
/// ignores trailing blanks.
pub fn family(type_oid: u32) -> Option<KeyType> {
    match type_oid {
        20 | 21 | 23 => Some(KeyType::Int),
        25 | 1043 => Some(KeyType::Text),
        2950 => Some(KeyType::Uuid),
        _ => None,
    }
}
