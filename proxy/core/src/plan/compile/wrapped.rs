//! Statements around a query or a table: EXPLAIN, DECLARE and COPY.

use super::super::bind::{Route, Shape};
use super::super::reason::{NoCacheReason, PrimaryReason, RouteReason};
use super::super::{Access, Target, hidden, refuse};
use super::{Compiler, Source};
use crate::error::UserError;
use crate::sql::class::{Class, CopyDirection, CopyEndpoint, CopyRelation, classify};
use crate::sql::facts::{Instance, Spread, Use};
use crate::sql::lex::{Token, TokenKind, lex};
use crate::sql::word;
use crate::topology::Placement;

impl Compiler<'_> {
    /// The statement inside EXPLAIN, DECLARE or COPY, without the right to be merged.
    fn inner(&mut self, source: Source<'_>, tokens: &[Token], why: &'static str) -> Shape {
        let (Some(first), Some(last)) = (tokens.first(), tokens.last()) else { return self.unparsed(source, why) };
        let text = &source.text[first.start as usize..last.end as usize];
        let mut own = Vec::new();
        if lex(text, &mut own).is_err() {
            return self.unparsed(source, why);
        }
        let inner = Source { sql: text, original: &own, text, tokens: &own, params: source.params };
        let mut shape = match classify(text, &own) {
            Class::Select | Class::Values | Class::Insert | Class::Update | Class::Delete | Class::With { .. } => {
                self.data(inner, None)
            }
            _ => self.unparsed(inner, "this kind of statement is not analysed"),
        };
        shape.scatter = Err(why.into());
        shape.deal = Err(why.into());
        shape.cacheable = Err(NoCacheReason::NotSelect);
        shape.engine = false;
        shape
    }

    pub(super) fn explain(&mut self, analyze: bool, inner: usize, source: Source<'_>) -> Shape {
        let mut shape = self.inner(
            source,
            source.tokens.get(inner..).unwrap_or_default(),
            "each shard would have a plan of its own; ask ROUTE '<statement>' in the admin database \"weir\" instead",
        );
        if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
            return Shape::refusing(refuse::explain_spread(), shape.access);
        }
        if !analyze {
            shape.writes.clear();
            shape.access = Access::PrimaryRead(PrimaryReason::SessionStatement);
        }
        shape
    }

    /// `DECLARE name … CURSOR … FOR query`
    pub(super) fn declare(&mut self, source: Source<'_>) -> Shape {
        let query =
            source.tokens.iter().position(|token| token.is_word(source.text, "for")).map_or(0, |index| index + 1);
        let shape = self.inner(source, &source.tokens[query..], "a cursor reads one shard");
        if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
            return Shape::refusing(refuse::cursor_spread(), shape.access);
        }
        shape
    }

    pub(super) fn copy(
        &mut self,
        direction: CopyDirection,
        endpoint: CopyEndpoint,
        relation: Option<&CopyRelation>,
        source: Source<'_>,
    ) -> Shape {
        let Some(relation) = relation else {
            let end = source.tokens.iter().position(|token| token.kind == TokenKind::RightParen && token.depth <= 1);
            if source.tokens.get(1).is_none_or(|token| token.kind != TokenKind::LeftParen) {
                return self.unparsed(source, "its COPY is not understood");
            }
            let shape = self.inner(source, &source.tokens[2..end.unwrap_or(2)], "COPY of a query reads one shard");
            if matches!(shape.route, Route::Fixed { target: Target::All | Target::Many(_), .. }) {
                return Shape::refusing(refuse::copy_spread(), shape.access);
            }
            return shape;
        };
        let table = self.schema.resolve(relation.schema.as_deref(), &relation.name);
        let instance = |usage| Instance { table: table.clone(), usage, keys: None, spread: Spread::Free, top: true };
        let loads = direction == CopyDirection::From;
        let usage = if loads { Use::Insert } else { Use::Read };
        let server_side = matches!(endpoint, CopyEndpoint::File | CopyEndpoint::Program);
        let access = if loads || server_side { Access::Write } else { self.read_access(&[&instance(usage)], false) };
        if !self.single()
            && let Some(error) = self.copy_refusal(&instance(usage), source)
        {
            return Shape::refusing(error, access);
        }
        let (target, reason) = match self.schema.placement(&table) {
            _ if self.single() => (Target::Home, RouteReason::SingleShard),
            Placement::Sharded { .. } => return Shape::refusing(refuse::copy_sharded(&relation.name), access),
            Placement::Reference if loads && endpoint == CopyEndpoint::Stdin => {
                (Target::All, RouteReason::ReferenceWrite)
            }
            Placement::Reference if loads => {
                return Shape::refusing(
                    refuse::reference_shape(&table, "a source that each server reads by itself"),
                    access,
                );
            }
            Placement::Reference if access == Access::Read => (Target::Any, RouteReason::ReferenceRead),
            Placement::Reference | Placement::Global => (Target::Home, RouteReason::GlobalTable),
        };
        let mut shape = Shape::fixed(target, access, reason);
        self.needs(&[instance(usage)], &mut shape);
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
