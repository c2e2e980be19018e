//! From an expression over aggregates to what the merge computes: which hidden columns it needs, and its numbers.
//!
//! A [`Blueprint`] belongs to a template: numbers that were lifted out of the text are still terms in it, and binding puts
//! the text of one execution in their place.

use std::ops::Range;

use super::values::Values;
use crate::merge;
use crate::sql::facts::{Literal, Operation, Term};
use crate::sql::lex::{Token, TokenKind};

/// A formula over columns of the shards' rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Blueprint {
    Column(usize),
    Constant(Term),
    Apply(Operation, Vec<Blueprint>),
}

impl Blueprint {
    /// Puts the numbers of one execution in; `None`: one of them is not there.
    pub fn bind(&self, values: &Values<'_>, client_params: u16) -> Option<merge::Formula> {
        Some(match self {
            Blueprint::Column(column) => merge::Formula::Column(*column),
            Blueprint::Constant(Term::Null) => merge::Formula::Null,
            Blueprint::Constant(Term::Literal(Literal::Number(text))) => merge::Formula::Number(text.clone()),
            Blueprint::Constant(Term::Param { number, negated: false }) => {
                merge::Formula::Number(values.written_number(*number, client_params)?.into())
            }
            Blueprint::Constant(_) => return None,
            Blueprint::Apply(operation, parts) => {
                let parts = parts.iter().map(|part| part.bind(values, client_params)).collect::<Option<_>>()?;
                merge::Formula::Apply(*operation, parts)
            }
        })
    }
}

/// The next call of a function among `tokens`: from its name to the end of its FILTER, if it has one.
pub fn call(sql: &str, tokens: &[Token], within: &Range<usize>, name: &str) -> Option<Range<usize>> {
    let start = within.clone().find(|&at| {
        tokens[at].is_word(sql, name)
            && at + 1 < within.end
            && tokens[at + 1].kind == TokenKind::LeftParen
            && (at == within.start || tokens[at - 1].kind != TokenKind::Dot)
    })?;
    let mut end = closed(tokens, start + 1, within.end)?;
    if end + 1 < within.end && tokens[end].is_word(sql, "filter") && tokens[end + 1].kind == TokenKind::LeftParen {
        end = closed(tokens, end + 1, within.end)?;
    }
    Some(start..end)
}

/// One past the parenthesis that closes the one at `open`; `None` if there is none.
pub fn closed(tokens: &[Token], open: usize, end: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().take(end).skip(open) {
        match token.kind {
            TokenKind::LeftParen => depth += 1,
            TokenKind::RightParen => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}
