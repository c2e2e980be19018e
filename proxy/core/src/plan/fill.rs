//! Values that weir draws from a sequence and writes into a statement before it is planned.
//!
//! A sequence counts on each server for itself, so where there are several shards the numbers of a sharded or reference table come from
//! blocks that the hub hands out, and the statement is given them as if the client had written them: as numbers in a simple query, as
//! further parameters of a prepared one. Invariant: edits touch nothing of what the client wrote but DEFAULT, the
//! calls that are answered, and the end of lists. Non-goals: where numbers come from, and what the filled statement then means.

use std::ops::Range;
use std::sync::Arc;

use super::rewrite::{Edit, Piece, Rewrite};
use crate::sql::lex::Token;
use crate::topology::catalog::{RelationName, SequenceRule};

/// What one value of a [`Filling`] is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drawing {
    /// `nextval()`, or the default of a column.
    Next(Arc<Sequence>),
    /// `currval()`
    Current(Arc<Sequence>),
    /// `lastval()`: what the session has drawn last, if it was drawn from weir.
    Last,
    /// `setval()`: the value that is set, and whether it counts as drawn.
    Set { sequence: Arc<Sequence>, value: i64, drawn: bool },
    /// The sequence read like a table: a number below which all that were drawn are.
    Seen(Arc<Sequence>),
}

/// A sequence whose numbers are weir's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sequence {
    pub name: RelationName,
    pub rule: SequenceRule,
    /// Columns that are filled from it: schema, table, column.
    pub columns: Vec<(RelationName, Box<str>)>,
}

/// A part of inserted text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Patch {
    Text(Box<str>),
    /// The value of this number.
    Value(usize),
}

/// A statement with gaps to be filled.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filling {
    /// In the order in which Postgres would draw them.
    pub drawings: Vec<Drawing>,
    /// Replacements of token ranges, as in [`Edit`].
    pub edits: Vec<(Range<usize>, Vec<Patch>)>,
}

impl Filling {
    /// Brings edits, and with them drawings, into the order of the text: Postgres draws row by row.
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.edits.sort_by_key(|(range, _)| (range.start, range.end));
        let mut drawings = Vec::with_capacity(self.drawings.len());
        for patch in self.edits.iter_mut().flat_map(|(_, patches)| patches) {
            if let Patch::Value(number) = patch {
                drawings.push(self.drawings[*number].clone());
                *number = drawings.len() - 1;
            }
        }
        self.drawings = drawings;
        self
    }

    /// The statement with each value written as `value` says.
    pub fn apply(&self, sql: &str, tokens: &[Token], value: impl Fn(usize) -> String) -> String {
        let edits = self.edits.iter().map(|(range, patches)| {
            let piece = |patch: &Patch| match patch {
                Patch::Text(text) => Piece::Text(text.clone()),
                Patch::Value(number) => Piece::Text(value(*number).into()),
            };
            Edit { range: range.clone(), pieces: patches.iter().map(piece).collect() }
        });
        Rewrite::new(edits.collect()).apply(sql, tokens)
    }
}
