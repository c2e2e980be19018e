//! Whether the rows of an INSERT can be dealt out to several shards, or stay on those they are read from.

use std::sync::Arc;

use super::super::bind::{Route, Shape};
use super::super::carry::Carry;
use super::super::deal::Deal;
use super::super::functions::{Harm, harmless_by_row, worst};
use super::super::{Access, refuse};
use super::{Compiler, Placed, Source};
use crate::sql::facts::{ColumnFacts, Facts, Instance, ItemKind, SelectShape, TableName, Use, Verb, family};
use crate::sql::lex::{TokenKind, lex};
use crate::sql::normal::Normal;
use crate::sql::rows::{FromQuery, Rows, split};
use crate::sql::{parse, word};
use crate::topology::Placement;
use crate::topology::catalog::RelationKind;

impl Compiler<'_> {
    /// INSERT over several shards: if nothing else can be done with the rows of its query, they are carried.
    pub(super) fn insert(&mut self, source: Source<'_>, normal: &Normal) -> Shape {
        let carry = Carry::find(source.text, source.tokens, self.schema).map(Arc::new);
        let mut shape = Shape { carry, ..self.data(source, Some(normal)) };
        if shape.carry.is_some() && matches!(shape.route, Route::Refuse(_)) {
            // What its form notes is settled with it.
            shape = self.noted_all(true, shape);
        }
        shape
    }

    /// A statement that sets the shard key of rows: an UPDATE that is no more than that carries them.
    pub(super) fn moves(&self, source: Source<'_>, (table, column): (&TableName, &str), access: Access) -> Shape {
        let carry = Carry::of_update(source.text, source.tokens, table, self.schema);
        let refusal = refuse::key_changes(table, column, carry.as_ref().err().copied());
        Shape { carry: carry.ok().map(Arc::new), ..Shape::refusing(refusal, access) }
    }

    /// `Err`: why its rows must stay together. `demand`: where the keys of the rows are.
    pub(super) fn deal(
        &self,
        facts: &Facts,
        placed: &Placed<'_>,
        source: Source<'_>,
        demand: Option<usize>,
    ) -> Result<Deal, String> {
        if facts.verb != Verb::Insert {
            return Err("it is no INSERT".into());
        }
        let rows = Rows::find(source.text, source.tokens).filter(|_| !facts.writes_in_with && !facts.with);
        let rows = rows.ok_or("it is no plain INSERT … VALUES")?;
        let [target] = placed.sharded.as_slice() else { return Err("it reads other sharded rows".into()) };
        let Placement::Sharded { key, key_type } = self.schema.placement(&target.table) else {
            return Err("its tables changed meanwhile".into());
        };
        let keys = target.keys.as_ref().map_or(0, |keys| keys.terms.len());
        let Some(demand) = demand.filter(|_| keys == rows.rows.len()) else {
            return Err("weir cannot tell its rows apart".into());
        };
        if let Some(table) = placed.global.first() {
            return Err(format!("{} lives on the home shard only", table.table));
        }
        if facts.limited_subquery {
            return Err("it has a sub-query that returns only some of its rows".into());
        }
        if facts.locks_rows {
            return Err("it locks rows".into());
        }
        if facts.server_bound {
            return Err("it asks for what differs between servers (ctid, xmin)".into());
        }
        let catalog = self.schema.catalog;
        let harmful = facts.functions.iter().find(|function| {
            worst(std::slice::from_ref(*function), catalog) >= Harm::Volatile && !harmless_by_row(function, catalog)
        });
        if let Some(function) = harmful {
            return Err(format!("{}() is not known to be the same for a part of the rows", function.name));
        }
        let may_skip = rows.conflict || self.may_skip(target);
        Ok(Deal { rows, demand, key: key.clone(), key_type: *key_type, may_skip })
    }

    /// May the table itself take less rows than it is given?
    fn may_skip(&self, target: &Instance) -> bool {
        self.schema
            .relation(&target.table)
            .is_none_or(|relation| relation.writes_spread || relation.kind != RelationKind::PlainTable)
    }
}

impl Compiler<'_> {
    /// Does an INSERT … SELECT put every row on the shard that it is read from? Then all shards do their part alone. `Err`: why
    /// that is not certain.
    ///
    /// The query is looked at by itself: it must be one that could be spread, without LIMIT and groups over shards, and its
    /// column for the key must be the key of what it reads.
    pub(super) fn stays(&self, facts: &Facts, placed: &Placed<'_>, source: Source<'_>) -> Result<(), String> {
        let target = placed.sharded.iter().find(|instance| instance.usage == Use::Insert);
        let (Some(target), Some(insert)) = (target, FromQuery::find(source.text, source.tokens)) else {
            return Err("it is no INSERT … SELECT".into());
        };
        let Placement::Sharded { key, key_type } = self.schema.placement(&target.table) else {
            return Err("its tables changed meanwhile".into());
        };
        if source.tokens[insert.query.start].kind == TokenKind::LeftParen {
            return Err("its query stands in parentheses".into());
        }
        if facts.writes_in_with || facts.server_bound || worst(&facts.functions, self.schema.catalog) >= Harm::Volatile
        {
            return Err("it does more than read and insert".into());
        }
        let position =
            self.key_position(source, &insert, target, key).ok_or("weir cannot tell where its key stands")?;
        let (first, last) = (source.tokens[insert.query.start], source.tokens[insert.query.end - 1]);
        let text = &source.text[first.start as usize..last.end as usize];
        let mut tokens = Vec::new();
        lex(text, &mut tokens).map_err(|_| "weir cannot cut it into words")?;
        let query = parse::facts(text, &tokens, source.params, self.schema).map_err(|parse::Unparsed(why)| why)?;
        let inner = Source { sql: text, original: &tokens, text, tokens: &tokens, params: source.params };
        let scatter = self.scatter(&query, &self.place(&query), inner)?;
        let read = scatter.read.ok_or("it is no query")?;
        if read.group.is_some() || read.limit.is_some() || read.offset.is_some() {
            return Err("its query needs the rows of all shards together".into());
        }
        if insert.returning && !read.order.is_empty() {
            return Err("its rows would come back in another order".into());
        }
        let column = query.select.as_ref().and_then(|shape| output(shape, position));
        match column {
            Some(column) if column.is_key && family(column.type_oid) == Some(*key_type) => Ok(()),
            _ => Err(format!("its column for {key} is not the shard key of what it reads")),
        }
    }

    /// Where among the values of an INSERT … SELECT the key stands.
    fn key_position(&self, source: Source<'_>, insert: &FromQuery, target: &Instance, key: &str) -> Option<usize> {
        match &insert.columns {
            Some(columns) => split(source.tokens, columns.clone())
                .iter()
                .position(|part| word::name(source.text, source.tokens[part.start]).as_deref() == Some(key)),
            None => self.schema.relation(&target.table)?.columns.iter().position(|column| &*column.name == key),
        }
    }
}

/// The column that an output of a SELECT is, with `*` written out.
fn output(shape: &SelectShape, position: usize) -> Option<&ColumnFacts> {
    let mut at = 0;
    for item in &shape.items {
        match &item.kind {
            ItemKind::Wildcard(columns) => {
                let columns = columns.as_ref()?;
                if position < at + columns.len() {
                    return columns[position - at].column.as_ref();
                }
                at += columns.len();
            }
            ItemKind::Expression(expression) => {
                if position == at {
                    return expression.column.as_ref();
                }
                at += 1;
            }
        }
    }
    None
}
