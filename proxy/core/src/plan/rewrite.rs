//! Edits of the original text, expressed in token indexes: what a shard is sent instead of what the client wrote.
//!
//! Invariant: every byte that is not inside an edit stays as the client wrote it; nothing is re-printed from a tree.

use std::ops::Range;

use crate::sql::lex::Token;

/// A part of inserted text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    Text(Box<str>),
    /// A copy of these tokens of the original, as written.
    Tokens(Range<usize>),
}

/// Replaces the tokens of `range` by `pieces`; an empty range inserts right behind token `range.start - 1`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Edit {
    pub range: Range<usize>,
    pub pieces: Vec<Piece>,
}

/// Edits in ascending order that do not overlap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rewrite {
    edits: Vec<Edit>,
}

impl Rewrite {
    /// Sorts the edits; they must not overlap.
    pub fn new(mut edits: Vec<Edit>) -> Self {
        edits.sort_by_key(|edit| (edit.range.start, edit.range.end));
        debug_assert!(edits.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
        Rewrite { edits }
    }

    /// The same edits of a longer statement, in which the one it was made for stands `by` tokens behind the start.
    #[must_use]
    pub fn shifted(&self, by: usize) -> Self {
        let moved = |range: &Range<usize>| range.start + by..range.end + by;
        let piece = |piece: &Piece| match piece {
            Piece::Text(text) => Piece::Text(text.clone()),
            Piece::Tokens(range) => Piece::Tokens(moved(range)),
        };
        let edit = |edit: &Edit| Edit { range: moved(&edit.range), pieces: edit.pieces.iter().map(piece).collect() };
        Rewrite { edits: self.edits.iter().map(edit).collect() }
    }

    /// These edits and more, none of which touches what another one does.
    #[must_use]
    pub fn and(self, more: Vec<Edit>) -> Self {
        let mut edits = self.edits;
        edits.extend(more);
        Rewrite::new(edits)
    }

    pub fn is_empty(&self) -> bool {
        self.edits.is_empty()
    }

    /// Applies the edits to `sql`, which `tokens` were cut from: the statement this was made for, or one that differs from it
    /// only in lifted literals, white space and comments.
    pub fn apply(&self, sql: &str, tokens: &[Token]) -> String {
        let mut text = String::with_capacity(sql.len() + 64);
        let mut at = 0;
        for edit in &self.edits {
            let (start, end) = if edit.range.is_empty() {
                let end = edit.range.start.checked_sub(1).map_or(0, |before| tokens[before].end as usize);
                (end, end)
            } else {
                (tokens[edit.range.start].start as usize, tokens[edit.range.end - 1].end as usize)
            };
            text.push_str(&sql[at..start]);
            for piece in &edit.pieces {
                match piece {
                    Piece::Text(piece) => text.push_str(piece),
                    Piece::Tokens(range) => text.push_str(slice(sql, tokens, range)),
                }
            }
            at = end;
        }
        text.push_str(&sql[at..]);
        text
    }
}

/// The original text of a token range.
pub fn slice<'s>(sql: &'s str, tokens: &[Token], range: &Range<usize>) -> &'s str {
    if range.is_empty() {
        return "";
    }
    &sql[tokens[range.start].start as usize..tokens[range.end - 1].end as usize]
}
