//! What a statement does to columns that are unique over all shards.
//!
//! Invariant: a write that could leave a value unchecked is settled or refused. What is missed here is refused by the shards
//! themselves at commit ([`crate::unique`]). Tables that are not declared so, and databases without any, cost nothing.

use super::super::bind::{Route, Shape};
use super::super::refuse;
use super::{Compiler, Source};
use crate::error::UserError;
use crate::sql::facts::{Instance, TableName, Use};
use crate::sql::lex::TokenKind;
use crate::sql::word;
use crate::topology::Width;
use crate::topology::catalog::{UniqueColumn, UniqueState};

/// What a write may do to columns that are unique over all shards.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Noting {
    /// Nothing.
    #[default]
    None,
    /// The shards note what it changes; that is settled before it is acknowledged. `skips`: its ON CONFLICT looks for values
    /// of such a column, and the server sees those of its own shard only.
    Settled { skips: bool },
    /// Nobody knows: it runs code that may write anything. Settled at the end of the transaction block, if there is one.
    Late,
}

impl Noting {
    /// Of two parts of one statement.
    pub(super) fn with(self, other: Noting) -> Noting {
        match (self, other) {
            (Noting::Settled { skips: one }, Noting::Settled { skips: two }) => Noting::Settled { skips: one || two },
            (settled @ Noting::Settled { .. }, _) | (_, settled @ Noting::Settled { .. }) => settled,
            (Noting::Late, _) | (_, Noting::Late) => Noting::Late,
            (Noting::None, Noting::None) => Noting::None,
        }
    }
}

impl Compiler<'_> {
    fn any_unique(&self) -> bool {
        self.schema.width != Width::One && self.schema.rules.any_unique()
    }

    /// For a statement on `instances`.
    pub(super) fn note_unique(&self, instances: &[Instance], source: Source<'_>, shape: &mut Shape) {
        let refused = matches!(shape.route, Route::Refuse(_)) && shape.carry.is_none();
        if !self.any_unique() || refused {
            return;
        }
        let mut skips = false;
        for instance in instances.iter().filter(|instance| instance.usage.is_write()) {
            let columns = self.schema.rules.unique_columns(&instance.table.schema, &instance.table.name);
            if let Some(error) = columns.iter().find_map(|column| self.unenforced(instance, column)) {
                *shape = Shape::refusing(error, shape.access);
                return;
            }
            // Triggers and foreign keys of others may write such a table as well.
            let spreads = self.schema.relation(&instance.table).is_some_and(|relation| relation.writes_spread);
            if !columns.is_empty() || spreads {
                skips |= instance.usage == Use::Insert && skips_conflicts(source, columns);
                shape.noting = Noting::Settled { skips };
            }
        }
    }

    /// Has the table such columns, while one shard takes part?
    pub(super) fn notes_lone(&self, table: &TableName) -> bool {
        self.lone() && !self.schema.rules.unique_columns(&table.schema, &table.name).is_empty()
    }

    /// For code that weir cannot see through.
    pub(super) fn note_late(&self, shape: &mut Shape) {
        if self.any_unique() && shape.noting == Noting::None {
            shape.noting = Noting::Late;
        }
    }

    /// For a statement that is not understood, and goes to the one server all the same.
    pub(super) fn note_unread(&self, shape: &mut Shape) {
        if self.lone() && self.any_unique() {
            shape.noting = Noting::Settled { skips: false };
        }
    }

    /// For a statement that may change all of a table.
    pub(super) fn noted_all(&self, changes: bool, mut shape: Shape) -> Shape {
        if changes && self.any_unique() {
            shape.noting = Noting::Settled { skips: false };
        }
        shape
    }

    /// Why a write cannot be checked.
    fn unenforced(&self, instance: &Instance, column: &str) -> Option<UserError> {
        let TableName { schema, name } = &instance.table;
        let known = self.schema.catalog.unique.get(&(schema.clone(), name.clone()));
        let state = known.into_iter().flatten().find(|known| &*known.column == column);
        match state.map(|UniqueColumn { state, .. }| state) {
            Some(UniqueState::Building | UniqueState::Valid) => None,
            // What frees or changes values is how duplicates are mended.
            Some(UniqueState::Failed { noted: true, .. }) if instance.usage != Use::Insert => None,
            Some(UniqueState::Failed { reason, .. }) => Some(refuse::unique_failed(&instance.table, column, reason)),
            // Its server's own constraint holds, and what is noted from some moment on is settled.
            None if self.lone() => None,
            None => Some(refuse::unique_unknown(&instance.table, column)),
        }
    }
}

/// May its ON CONFLICT mean one of these columns?
fn skips_conflicts(source: Source<'_>, columns: &[Box<str>]) -> bool {
    let (text, tokens) = (source.text, source.tokens);
    let is = |at: usize, word: &str| tokens.get(at).is_some_and(|token| token.is_word(text, word));
    let Some(on) = (0..tokens.len()).find(|at| is(*at, "on") && is(*at + 1, "conflict")) else { return false };
    let target = tokens.get(on + 2..).unwrap_or_default();
    let Some((open, inside)) = target.split_first().filter(|(open, _)| open.kind == TokenKind::LeftParen) else {
        return true;
    };
    let inside = inside.split(|token| token.kind == TokenKind::RightParen && token.depth <= open.depth + 1).next();
    inside.unwrap_or_default().iter().any(|token| match word::name(text, *token) {
        Some(name) => columns.iter().any(|column| **column == *name),
        None => token.kind != TokenKind::Comma,
    })
}
