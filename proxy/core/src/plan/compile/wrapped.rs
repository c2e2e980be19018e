//! Statements around a query or a table: EXPLAIN, DECLARE and COPY.

use std::ops::Range;
use std::sync::Arc;

use super::super::bind::{Route, Scatter, Shape};
use super::super::reason::{NoCacheReason, PrimaryReason, RouteReason};
use super::super::{Access, ExplainFormat, Noting, Target, Wrap, hidden, refuse};
use super::{Compiler, Source};
use crate::copy::{Layout, Options, is_utf8};
use crate::error::UserError;
use crate::sql::class::{Class, Copy, CopyDirection, CopyEndpoint, classify};
use crate::sql::facts::{Instance, Spread, TableName, Use};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::normal::{Literal, Normal};
use crate::sql::word;
use crate::topology::catalog::{Column, DefaultKind};
use crate::topology::{KeyType, Placement};

impl Compiler<'_> {
    /// The statement inside EXPLAIN, DECLARE or COPY, planned as if it stood alone; `range` is where it stands among the tokens.
    fn query(&mut self, source: Source<'_>, range: Range<usize>, why: &'static str) -> Shape {
        let part = |text: &str, tokens: &[Token], own: &mut Vec<Token>| {
            let tokens = tokens.get(range.clone())?;
            let span = tokens.first()?.start as usize..tokens.last()?.end as usize;
            lex(&text[span.clone()], own).is_ok().then_some(span)
        };
        let (mut own, mut original) = (Vec::new(), Vec::new());
        let (Some(text), Some(sql)) =
            (part(source.text, source.tokens, &mut own), part(source.sql, source.original, &mut original))
        else {
            return self.unparsed(source, why);
        };
        let (text, sql) = (&source.text[text], &source.sql[sql]);
        let inner = Source { sql, original: &original, text, tokens: &own, params: source.params };
        let mut shape = match classify(text, &own) {
            Class::Select | Class::Values | Class::Insert | Class::Update | Class::Delete | Class::With { .. } => {
                self.data(inner, None)
            }
            _ => self.unparsed(inner, "this kind of statement is not analysed"),
        };
        shape.deal = Err(why.into());
        shape.carry = None;
        shape.cacheable = Err(NoCacheReason::NotSelect);
        if let Ok(Scatter { read: Some(read) }) = &mut shape.scatter {
            read.rewrite = read.rewrite.shifted(range.start);
        }
        shape
    }

    pub(super) fn explain(&mut self, analyze: bool, inner: usize, source: Source<'_>) -> Shape {
        let mut shape = self.query(source, inner..source.tokens.len(), "its EXPLAIN is not understood");
        let written = shape.access == Access::Write;
        // The engine's plan is told only of what the engine would run.
        shape.engine &= shape.scatter.is_err();
        if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
            return Shape::refusing(refuse::explain_spread(), shape.access);
        }
        if !analyze {
            shape.noting = Noting::None;
            shape.writes.clear();
            shape.access = Access::PrimaryRead(PrimaryReason::SessionStatement);
        }
        if matches!(shape.route, Route::Keyed(_)) {
            match ExplainFormat::of(source.sql, source.original.get(..inner).unwrap_or_default()) {
                Some(_) if analyze && written => {
                    shape.scatter = Err("EXPLAIN ANALYZE would change rows on several shards".into());
                }
                Some(format) => shape.wrap = Wrap::Explain(format),
                None => shape.scatter = Err("EXPLAIN over shards does not know this format".into()),
            }
        }
        shape
    }

    /// `DECLARE name … CURSOR … FOR query`
    pub(super) fn declare(&mut self, source: Source<'_>) -> Shape {
        let found = source.tokens.iter().position(|token| token.is_word(source.text, "for"));
        let query = found.map_or(0, |index| index + 1);
        let mut shape = self.query(source, query..source.tokens.len(), "its cursor is not understood");
        if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
            return Shape::refusing(refuse::cursor_spread(), shape.access);
        }
        let options = &source.tokens[..query];
        let asked = |word: &str, unless: &str| {
            let found = options.iter().position(|token| token.is_word(source.text, word));
            found.is_some_and(|at| at == 0 || !options[at - 1].is_word(source.text, unless))
        };
        let special = asked("binary", "") || asked("scroll", "no") || asked("hold", "without");
        shape.engine &= !special;
        match &shape.scatter {
            Ok(Scatter { read: Some(_) }) if !special => shape.wrap = Wrap::Cursor,
            Ok(_) => shape.scatter = Err("a BINARY, SCROLL or WITH HOLD cursor reads one shard".into()),
            Err(_) => {}
        }
        shape
    }

    pub(super) fn copy(&mut self, copy: &Copy, source: Source<'_>) -> Shape {
        let Some(relation) = &copy.relation else { return self.copy_query(copy, source) };
        let table = self.schema.resolve(relation.schema.as_deref(), &relation.name);
        let instance = |usage| Instance { table: table.clone(), usage, keys: None, spread: Spread::Free, top: true };
        let loads = copy.direction == CopyDirection::From;
        let usage = if loads { Use::Insert } else { Use::Read };
        let server_side = matches!(copy.endpoint, CopyEndpoint::File | CopyEndpoint::Program);
        let access = if loads || server_side { Access::Write } else { self.read_access(&[&instance(usage)], false) };
        if !self.single()
            && let Some(error) = self.copy_refusal(&instance(usage), source)
        {
            return Shape::refusing(error, access);
        }
        let (target, reason, wrap) = match self.schema.placement(&table) {
            _ if self.single() && !(loads && self.notes_lone(&table)) => {
                (Target::Home, RouteReason::SingleShard, Wrap::None)
            }
            Placement::Sharded { .. } if server_side => {
                return Shape::refusing(refuse::copy_of_server(&table), access);
            }
            Placement::Sharded { key, key_type } => match self.copy_spread(loads, (&table, key, *key_type), source) {
                Ok((reason, wrap)) => (Target::All, reason, wrap),
                Err(error) => return Shape::refusing(error, access),
            },
            Placement::Reference if loads && copy.endpoint == CopyEndpoint::Stdin => {
                (Target::All, RouteReason::ReferenceWrite, Wrap::None)
            }
            Placement::Reference if loads => {
                return Shape::refusing(
                    refuse::reference_shape(&table, "a source that each server reads by itself"),
                    access,
                );
            }
            Placement::Reference if access == Access::Read => (Target::Any, RouteReason::ReferenceRead, Wrap::None),
            Placement::Reference | Placement::Global => (Target::Home, RouteReason::GlobalTable, Wrap::None),
        };
        let mut shape = Shape::fixed(target, access, reason);
        shape.wrap = wrap;
        self.needs(&[instance(usage)], &mut shape);
        self.note_unique(&[instance(usage)], source, &mut shape);
        shape
    }

    /// COPY of a sharded table: `key` is the table, its key column and that column's type.
    fn copy_spread(
        &self,
        loads: bool,
        key: (&TableName, &str, KeyType),
        source: Source<'_>,
    ) -> Result<(RouteReason, Wrap), UserError> {
        let (table, column, key_type) = key;
        let unread = |word: String| refuse::unparsed(&format!("its COPY has \"{word}\""), &table.name);
        let options = Options::read(source.sql, source.original).map_err(unread)?;
        if !loads {
            return Ok((RouteReason::Scatter, Wrap::CopyOut(Arc::new(options))));
        }
        let filter = options.filter.and_then(|start| source.original.get(start..)).unwrap_or_default();
        if let Some(named) = hidden::named(source.sql, filter, self.schema) {
            return Err(refuse::unparsed("its WHERE is not analysed", &named));
        }
        if options.encoding.as_deref().is_some_and(|name| !is_utf8(name)) {
            return Err(refuse::copy_encoding(table));
        }
        let name = (table.schema.clone(), table.name.clone());
        let left_out = |column: &str| match &options.columns {
            Some(listed) => options.default.is_some() || listed.iter().all(|listed| **listed != *column),
            None => options.default.is_some(),
        };
        let drawn = self.schema.catalog.drawn.get(&name).into_iter().flatten().filter(|_| !self.lone());
        if let Some(drawn) = drawn.into_iter().find(|drawn| left_out(&drawn.column)) {
            return Err(refuse::sequence_default(table, &drawn.column));
        }
        let position = match &options.columns {
            Some(columns) => columns.iter().position(|listed| **listed == *column),
            None => {
                let relation = self.schema.relation(table).ok_or_else(|| refuse::copy_unknown(table))?;
                let copied = |one: &&Column| one.default != DefaultKind::Generated;
                relation.columns.iter().filter(copied).position(|one| *one.name == *column)
            }
        };
        let position = position.ok_or_else(|| refuse::key_missing(table, column))?;
        let varchar = self.schema.is_varchar(table, column);
        let layout = Layout { table: table.name.clone(), column: column.into(), key_type, varchar, position, options };
        Ok((RouteReason::RowsApart, Wrap::CopyIn(Arc::new(layout))))
    }

    /// `COPY (query) TO …`: over several shards rows that may come in any order, each from one shard; anything else is the engine's.
    fn copy_query(&mut self, copy: &Copy, source: Source<'_>) -> Shape {
        let end = source.tokens.iter().position(|token| token.kind == TokenKind::RightParen && token.depth <= 1);
        if source.tokens.get(1).is_none_or(|token| token.kind != TokenKind::LeftParen) {
            return self.unparsed(source, "its COPY is not understood");
        }
        let mut shape = self.query(source, 2..end.unwrap_or(2), "its COPY is not understood");
        shape.engine &= copy.endpoint == CopyEndpoint::Stdout;
        let spread = match std::mem::replace(&mut shape.scatter, Err("COPY of such a query reads one shard".into())) {
            Ok(Scatter { read: Some(read) }) if copy.endpoint == CopyEndpoint::Stdout => read.concatenates(),
            _ => false,
        };
        if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
            return Shape::refusing(refuse::copy_spread(), shape.access);
        }
        if spread && let Ok(options) = Options::read(source.sql, source.original) {
            shape.scatter = Ok(Scatter { read: None });
            shape.wrap = Wrap::CopyOut(Arc::new(options));
        }
        shape
    }

    /// What stands behind the table, or is left out of it.
    fn copy_refusal(&self, instance: &Instance, source: Source<'_>) -> Option<UserError> {
        let reference = *self.schema.placement(&instance.table) == Placement::Reference && instance.usage.is_write();
        let listed = copied_columns(source);
        let default = || hidden::copy_default(&instance.table, listed.as_deref(), self.schema);
        hidden::relation_refusal(instance, self.schema).or_else(|| reference.then(default)?)
    }
}

/// The column list of `COPY table (…)`, where there is one.
fn copied_columns(source: Source<'_>) -> Option<Vec<String>> {
    let direction = |token: &Token| token.is_word(source.text, "from") || token.is_word(source.text, "to");
    let head = source.tokens.split(direction).next()?;
    let open = head.iter().position(|token| token.kind == TokenKind::LeftParen)?;
    Some(head[open..].iter().filter_map(|&token| word::name(source.text, token)).collect())
}

/// Literals of a COPY behind its query, if it has one: they say how rows are written.
pub(super) fn literals_of_options(normal: &Normal, source: Source<'_>) -> Vec<u16> {
    let query = source.original.get(1).is_some_and(|token| token.kind == TokenKind::LeftParen);
    let end = source.original.iter().find(|token| query && token.kind == TokenKind::RightParen && token.depth <= 1);
    let behind =
        |(index, literal): (usize, &Literal)| end.is_none_or(|end| literal.start > end.start).then_some(index as u16);
    normal.literals.iter().enumerate().filter_map(behind).collect()
}
