//! Rows that weir reads first and then writes as values: INSERT … SELECT where the rows do not stay on the shards they are read from,
//! and UPDATE of the shard key, which deletes rows (that is the reading) and inserts what they become.
//!
//! The query is a statement of its own, with a plan of its own. The INSERT becomes one of VALUES (its *form*, planned with a row of
//! NULLs), and each row of the query a row of literals in it, so that whatever holds for an INSERT of many rows holds here: keys,
//! numbers from sequences, conflicts, RETURNING in order, copies on every shard.
//!
//! Invariant: a value that is written is the value that was read: its literal has the type it was read with, so that Postgres
//! converts it to the column's type as it would have done in the one statement. Where that is not certain, it is refused.
//! Non-goals: reading and writing.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::Plan;
use super::bind::Shape;
use super::refuse;
use super::rewrite::slice;
use super::values::text_key;
use crate::error::UserError;
use crate::sql::facts::{Schema, TableName, family};
use crate::sql::lex::{Token, lex};
use crate::sql::rows::{FromQuery, Rows, Update, split};
use crate::sql::word::{self, quote_literal, quote_name};
use crate::topology::catalog::{DefaultKind, RelationKind};
use crate::topology::{Key, KeyType, Placement, Topology};

/// What a template knows of a statement whose rows can be carried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Carry {
    kind: Kind,
    table: TableName,
    /// The columns that values are for, in order; a query may have fewer if none are listed.
    columns: Vec<Target>,
    /// Types of the user's own may be converted in ways weir does not know.
    own_casts: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Kind {
    Insert(FromQuery),
    Update {
        update: Update,
        /// What each column becomes; `None`: it stays.
        values: Vec<Option<Range<usize>>>,
        key: Box<str>,
        /// The table has unique indexes.
        unique: bool,
        /// It sets columns that weir does not know: unless Postgres does not know them either, it must not be carried.
        stale: bool,
    },
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Target {
    name: Box<str>,
    type_oid: u32,
}

/// How one column's values are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// As a literal of no type of its own: the column's input function reads it.
    Plain,
    /// As a literal of this type of pg_catalog.
    As(&'static str),
}

/// An INSERT of rows, cut where its rows stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Form {
    /// Up to the first row, and what follows the last.
    pub head: String,
    pub tail: String,
    /// The columns it lists, if it does.
    columns: Option<Vec<String>>,
}

/// What `::text` gives.
pub const TEXT: u32 = 25;
const VARCHAR: u32 = 1043;
const NAME: u32 = 19;
const NUMERIC: u32 = 1700;
const UNKNOWN: u32 = 705;
/// OIDs below are the same on every server (FirstNormalObjectId in src/include/access/transam.h).
const FIRST_OWN_OID: u32 = 16_384;

/// Types of pg_catalog whose text form says all of a value (with the settings that are asked for before). With the schema in
/// front, a name means the type without any modifier: `bit` is no `bit(1)`.
const TYPES: &[(u32, &str)] = &[
    (16, "bool"),
    (17, "bytea"),
    (18, "\"char\""),
    (19, "name"),
    (20, "int8"),
    (21, "int2"),
    (23, "int4"),
    (26, "oid"),
    (114, "json"),
    (142, "xml"),
    (600, "point"),
    (601, "lseg"),
    (602, "path"),
    (603, "box"),
    (604, "polygon"),
    (628, "line"),
    (650, "cidr"),
    (700, "float4"),
    (701, "float8"),
    (718, "circle"),
    (774, "macaddr8"),
    (790, "money"),
    (829, "macaddr"),
    (869, "inet"),
    (1042, "bpchar"),
    (1043, "varchar"),
    (1082, "date"),
    (1083, "time"),
    (1114, "timestamp"),
    (1184, "timestamptz"),
    (1186, "interval"),
    (1266, "timetz"),
    (1560, "bit"),
    (1562, "varbit"),
    (1700, "numeric"),
    (2950, "uuid"),
    (3614, "tsvector"),
    (3615, "tsquery"),
    (3802, "jsonb"),
    (3904, "int4range"),
    (3906, "numrange"),
    (3908, "tsrange"),
    (3910, "tstzrange"),
    (3912, "daterange"),
    (3926, "int8range"),
    (1000, "_bool"),
    (1001, "_bytea"),
    (1005, "_int2"),
    (1007, "_int4"),
    (1009, "_text"),
    (1014, "_bpchar"),
    (1015, "_varchar"),
    (1016, "_int8"),
    (1021, "_float4"),
    (1022, "_float8"),
    (1115, "_timestamp"),
    (1182, "_date"),
    (1185, "_timestamptz"),
    (1231, "_numeric"),
    (2951, "_uuid"),
    (3807, "_jsonb"),
];

impl Carry {
    /// Of an INSERT of a query; `None`: it is something else, or its columns are not known.
    pub(super) fn find(sql: &str, tokens: &[Token], schema: &Schema<'_>) -> Option<Carry> {
        let insert = FromQuery::find(sql, tokens)?;
        let named = &tokens[insert.table.clone()];
        let end = named.iter().position(|token| token.is_word(sql, "as")).unwrap_or(named.len());
        let mut names: Vec<String> = named[..end].iter().filter_map(|token| word::name(sql, *token)).collect();
        let name = names.pop()?;
        let table = schema.resolve(names.last().map(String::as_str), &name);
        let known = &schema.relation(&table)?.columns;
        let target = |name: &str| {
            let column = known.iter().find(|column| *column.name == *name)?;
            Some(Target { name: column.name.clone(), type_oid: column.type_oid })
        };
        let columns: Option<Vec<Target>> = match &insert.columns {
            None => known.iter().map(|column| target(&column.name)).collect(),
            Some(listed) => split(tokens, listed.clone())
                .iter()
                .map(|part| match &tokens[part.clone()] {
                    [token] => target(&word::name(sql, *token)?),
                    _ => None,
                })
                .collect(),
        };
        let own_casts = schema.catalog.own_casts;
        Some(Carry { kind: Kind::Insert(insert), table, columns: columns?, own_casts })
    }

    /// Of an UPDATE that sets the shard key of its table. `Err`: why its rows cannot be deleted and inserted instead.
    pub(super) fn of_update(
        sql: &str,
        tokens: &[Token],
        table: &TableName,
        schema: &Schema<'_>,
    ) -> Result<Carry, &'static str> {
        let update = Update::find(sql, tokens).ok_or("it is no plain UPDATE … SET column = value")?;
        let (Some(relation), Placement::Sharded { key, .. }) = (schema.relation(table), schema.placement(table)) else {
            return Err("its table is not known yet");
        };
        if relation.kind != RelationKind::PlainTable {
            return Err("its table has row security, rules, parents or parts");
        }
        if relation.writes_spread {
            return Err("its table has triggers, or foreign keys that act on other tables");
        }
        if relation.referenced {
            return Err("foreign keys refer to its table");
        }
        let mut columns = Vec::new();
        let mut values = Vec::new();
        for column in relation.columns.iter().filter(|column| column.default != DefaultKind::Generated) {
            columns.push(Target { name: column.name.clone(), type_oid: column.type_oid });
            let set = update.set.iter().find(|(name, _)| **name == *column.name);
            values.push(set.map(|(_, value)| value.clone()));
        }
        let known = |name: &str| relation.columns.iter().any(|column| *column.name == *name);
        let stale = !update.set.iter().all(|(name, _)| known(name));
        let unique = !relation.unique_columns.is_empty();
        let kind = Kind::Update { update, values, key: key.clone(), unique, stale };
        Ok(Carry { kind, table: table.clone(), columns, own_casts: schema.catalog.own_casts })
    }

    /// The statement that reads the rows. `sql` and `tokens` are those of the statement this was made of, or of one that differs
    /// from it in lifted literals only.
    pub fn query(&self, sql: &str, tokens: &[Token]) -> String {
        match &self.kind {
            Kind::Insert(insert) => slice(sql, tokens, &insert.query).to_owned(),
            Kind::Update { update, values, key, .. } => {
                let mut text = format!(
                    "DELETE FROM {} {} RETURNING ",
                    slice(sql, tokens, &update.table),
                    slice(sql, tokens, &update.condition)
                );
                for (target, value) in self.columns.iter().zip(values) {
                    match value {
                        Some(value) => text.push_str(slice(sql, tokens, value)),
                        None => text.push_str(&quote_name(&target.name)),
                    }
                    text.push_str(", ");
                }
                text + &format!("({})::text", quote_name(key))
            }
        }
    }

    /// The last columns of [`Carry::query`] that are not written: the key that a row had.
    pub fn hidden(&self) -> usize {
        usize::from(matches!(self.kind, Kind::Update { .. }))
    }

    /// What the command tag says instead of INSERT.
    pub fn word(&self) -> Option<&'static str> {
        matches!(self.kind, Kind::Update { .. }).then_some("UPDATE")
    }

    /// May rows of the statement stand in each other's way?
    pub fn may_meet(&self) -> bool {
        matches!(self.kind, Kind::Update { unique: true, .. })
    }

    /// The INSERT of these rows: VALUES or a query.
    pub fn with(&self, sql: &str, tokens: &[Token], rows: &str) -> String {
        match &self.kind {
            Kind::Insert(insert) => {
                let Range { start, end } = insert.query;
                let head = &sql[tokens[0].start as usize..tokens[start].start as usize];
                let tail = &sql[tokens[end - 1].end as usize..tokens[insert.end - 1].end as usize];
                format!("{head}{rows}{tail}")
            }
            Kind::Update { update, .. } => {
                let table = slice(sql, tokens, &update.name);
                let alias = update.alias.map_or(String::new(), |at| format!(" AS {}", tokens[at].text(sql)));
                let columns: Vec<String> = self.columns.iter().map(|target| quote_name(&target.name)).collect();
                let returning = slice(sql, tokens, &update.returning);
                let columns = columns.join(", ");
                format!("INSERT INTO {table}{alias} ({columns}) OVERRIDING SYSTEM VALUE {rows} {returning}")
            }
        }
    }

    /// How the values of columns of these types are written; 0A000 if that is not certain.
    pub fn written(&self, types: &[u32]) -> Result<Vec<Written>, UserError> {
        if matches!(self.kind, Kind::Update { stale: true, .. }) {
            return Err(refuse::carried_columns(&self.table));
        }
        let one = |(index, &from): (usize, &u32)| {
            let Some(target) = self.columns.get(index) else { return Err(refuse::carried_columns(&self.table)) };
            written(from, target.type_oid, self.own_casts)
                .ok_or_else(|| refuse::carried_type(&self.table, &target.name, from))
        };
        types.iter().enumerate().map(one).collect()
    }
}

/// Postgres has checked that a conversion by assignment exists. A query's literals have no type of their own in an INSERT, and come as
/// text: no built-in type but the string types takes a real text, so reading it as the column does is right for both.
fn written(from: u32, to: u32, own_casts: bool) -> Option<Written> {
    let own = |oid| oid >= FIRST_OWN_OID;
    if (own(from) || own(to)) && own_casts {
        return None;
    }
    if from == to || from == TEXT || from == UNKNOWN || own(from) && (own(to) || matches!(to, TEXT | VARCHAR)) {
        return Some(Written::Plain);
    }
    TYPES.iter().find(|(oid, _)| *oid == from).map(|(_, name)| Written::As(name))
}

/// Appends one value as SQL.
pub fn put_value(out: &mut String, value: Option<&str>, written: Written) {
    let Some(value) = value else {
        out.push_str("NULL");
        return;
    };
    out.push_str(&quote_literal(value));
    if let Written::As(name) = written {
        out.push_str("::pg_catalog.");
        out.push_str(name);
    }
}

impl Form {
    /// `sql`: an INSERT of one row or more.
    pub fn of(sql: &str) -> Option<Form> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).ok()?;
        let rows = Rows::find(sql, &tokens)?;
        let (first, last) = (rows.rows.first()?, rows.rows.last()?);
        let name = |part: &Range<usize>| word::name(sql, *tokens.get(part.start)?);
        let columns = match &rows.columns {
            Some(listed) => Some(split(&tokens, listed.clone()).iter().map(name).collect::<Option<Vec<_>>>()?),
            None => None,
        };
        Some(Form {
            head: sql[..tokens[first.start].start as usize].to_owned(),
            tail: sql[tokens[last.end - 1].end as usize..tokens[rows.end - 1].end as usize].to_owned(),
            columns,
        })
    }

    /// Where among the values of a row the column stands.
    pub fn position(&self, column: &str, carry: &Carry) -> Option<usize> {
        match &self.columns {
            Some(columns) => columns.iter().position(|listed| listed == column),
            None => carry.columns.iter().position(|target| &*target.name == column),
        }
    }
}

/// The key column of the table that a form fills.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CarriedKey {
    table: TableName,
    pub column: Box<str>,
    key_type: KeyType,
}

impl CarriedKey {
    /// Of a template's target; `None`: it is not sharded.
    pub(super) fn of(table: &TableName, schema: &Schema<'_>) -> Option<CarriedKey> {
        match schema.placement(table) {
            Placement::Sharded { key, key_type } => {
                Some(CarriedKey { table: table.clone(), column: key.clone(), key_type: *key_type })
            }
            Placement::Reference | Placement::Global => None,
        }
    }

    /// May values that were read with this type be taken for keys by their text? Else the server may store another one.
    pub fn check(&self, from: u32) -> Result<(), UserError> {
        let same = family(from) == Some(self.key_type) || matches!(from, TEXT | UNKNOWN);
        let converted = match self.key_type {
            // Only if it is written as a whole number: anything else is refused when it is read.
            KeyType::Int => from == NUMERIC,
            KeyType::Text => from == NAME || family(from) == Some(KeyType::Int),
            KeyType::Uuid => false,
        };
        if same || converted { Ok(()) } else { Err(refuse::carried_key(&self.table, &self.column, from)) }
    }

    /// A row takes the key that another row of the same statement gives up.
    pub fn meets(&self) -> UserError {
        refuse::keys_meet(&self.table, &self.column)
    }

    /// The key that this text stands for, read with that type.
    pub fn read<'v>(&self, value: &'v [u8], from: u32) -> Result<Key<'v>, UserError> {
        let rounded =
            |error| if from == NUMERIC { refuse::carried_key(&self.table, &self.column, from) } else { error };
        text_key(Cow::Borrowed(value), self.key_type).map_err(rounded)
    }
}

impl super::Template {
    /// The plan of a statement that `refusal` says cannot be planned as it is: its rows are carried, if it is an INSERT of a query.
    pub fn carried(&self, refusal: UserError) -> Result<Plan, UserError> {
        self.inner.carried(refusal)
    }

    /// For the template of a [`Form`]: the key of the table it fills, if that is sharded.
    pub fn carried_key(&self) -> Option<&Arc<CarriedKey>> {
        self.inner.carried_key.as_ref()
    }

    /// For the template of a [`Form`]: the plan of it with a row for each of these keys (`None`: null), if its table is sharded.
    pub fn bind_rows(&self, keys: &[Option<Key<'_>>], topology: &Topology) -> Result<Plan, UserError> {
        Shape::bind_rows(&self.inner, keys, topology)
    }
}
