//! Rows of COPY that belong to several shards: which options a COPY has, and which part of its data is whose.
//!
//! Invariant: every byte of the client's stream goes to a part as it came, rows whole and in order; what is not a row (a
//! header, the end marker) goes to every part. Where a row cannot be placed surely, nothing after it is passed on.
//! Sources: src/backend/commands/copyfromparse.c and the COPY page of Postgres's manual. Non-goals: converting values, and
//! checking what the servers check themselves (they see every byte that is sent).

mod binary;
mod lines;
mod options;
mod out;
mod splitter;
mod text;

#[cfg(test)]
mod tests;

pub use lines::context_with_line;
pub use options::{Format, Options};
pub use out::Joiner;
pub use splitter::Splitter;

use std::ops::Range;

use crate::error::{Blame, UserError, sqlstate};
use crate::sql::lex::{TokenKind, lex};
use crate::topology::KeyType;

/// Where the query stands in `COPY (query) TO …`, in bytes. `None`: it is no such statement.
pub fn query_of(sql: &str) -> Option<Range<usize>> {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).ok()?;
    let open = |at: usize| tokens.get(at).is_some_and(|token| token.kind == TokenKind::LeftParen);
    if !tokens.first()?.is_word(sql, "copy") || !open(1) {
        return None;
    }
    let end = tokens.iter().position(|token| token.kind == TokenKind::RightParen && token.depth <= 1)?;
    (end > 2).then(|| tokens[2].start as usize..tokens[end - 1].end as usize)
}

/// How to find the shard key in each row of a COPY … FROM STDIN.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// As errors name it: without its schema.
    pub table: Box<str>,
    pub column: Box<str>,
    pub key_type: KeyType,
    /// The column is a varchar, which may store less than it is given.
    pub varchar: bool,
    /// Position of the key among the columns of a row, from 0.
    pub position: usize,
    pub options: Options,
}

/// Why a row cannot be placed. The server it is sent to usually has the better words for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Misfit {
    NullKey,
    UnreadableKey,
    BlankKey,
    MissingKey,
    DefaultKey,
    /// `\.` beside other data, or in CSV, where versions of Postgres differ.
    Marker,
    CarriageReturn,
    Newline,
    UnterminatedQuote,
    Cut,
    AfterEnd,
    TooLong,
}

/// Does Postgres read this name of an encoding as UTF-8 (src/common/encnames.c)?
pub fn is_utf8(name: &str) -> bool {
    let plain: String =
        name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect();
    matches!(&*plain, "utf8" | "unicode")
}

const BAD_COPY_DATA: &str = "22P04";

impl Misfit {
    /// In Postgres's words where it has the same error; `line`: of the client's data.
    fn error(self, layout: &Layout, line: u64) -> UserError {
        let Layout { table, column, .. } = layout;
        let at = format!("COPY {table}, line {line}.");
        let bad = |message: &'static str| UserError::new(Blame::Client, BAD_COPY_DATA, message).detail(at.clone());
        let refused = |message: &'static str, why: String| {
            UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, message).detail(format!("{at} {why}"))
        };
        let csv = layout.options.format == Format::Csv;
        match self {
            Misfit::NullKey => {
                refused("the shard key of a copied row cannot be NULL", format!("{table} is spread by {column}."))
                    .hint(format!("Give {column} a value in every row."))
            }
            Misfit::UnreadableKey => refused(
                "the shard key of a copied row cannot be read",
                format!("weir places rows of {table} by {column}, of type {}.", layout.key_type.name()),
            )
            .hint(format!("Write {column} in its plain form.")),
            Misfit::BlankKey => refused(
                "the shard key of a copied row cannot end in blanks",
                format!(
                    "{table} is spread by {column}, a varchar, and Postgres cuts blanks off a value that is too long."
                ),
            )
            .hint(format!("Copy {column} without them, or make it a text.")),
            Misfit::MissingKey => bad("missing data for the shard key column"),
            Misfit::DefaultKey => {
                refused("the shard key of a copied row cannot be a default", format!("{table} is spread by {column}."))
                    .hint(format!("Give {column} a value in every row."))
            }
            Misfit::Marker => bad("end-of-copy marker corrupt").hint("Put \\. on a line of its own, or quote it."),
            Misfit::CarriageReturn if csv => {
                bad("unquoted carriage return found in data").hint("Use quoted CSV field to represent carriage return.")
            }
            Misfit::CarriageReturn => {
                bad("literal carriage return found in data").hint("Use \"\\r\" to represent carriage return.")
            }
            Misfit::Newline if csv => {
                bad("unquoted newline found in data").hint("Use quoted CSV field to represent newline.")
            }
            Misfit::Newline => bad("literal newline found in data").hint("Use \"\\n\" to represent newline."),
            Misfit::UnterminatedQuote => bad("unterminated CSV quoted field"),
            Misfit::Cut => bad("unexpected EOF in COPY data"),
            Misfit::AfterEnd => bad("received copy data after EOF marker"),
            Misfit::TooLong => UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "a copied row is too long")
                .detail(at)
                .hint("Raise limits.message_bytes_max, or copy the row by itself with INSERT."),
        }
    }
}
