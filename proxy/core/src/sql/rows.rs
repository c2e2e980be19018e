//! The rows of an INSERT … VALUES, found by tokens: where each stands, and the statement with only some of them.
//!
//! Invariant: ranges are token indexes of the normal text and of the original alike. What does not have exactly the form
//! `INSERT INTO name [AS alias] [(columns)] [OVERRIDING … VALUE] VALUES (…)[, (…)]… [ON CONFLICT …] [RETURNING …]` has no
//! rows here. Non-goals: what the values mean (that is the parser's and the planner's business), and WITH in front.

use std::ops::Range;

use super::lex::{Token, TokenKind};

/// Where the parts of an INSERT stand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rows {
    /// What stands between the parentheses of the column list.
    pub columns: Option<Range<usize>>,
    /// Each row with its parentheses; never empty.
    pub rows: Vec<Range<usize>>,
    /// The table's name, qualified as written, and its alias.
    pub table: Range<usize>,
    pub overriding: Option<Range<usize>>,
    /// The word VALUES.
    pub values: usize,
    /// What it is followed by: ON CONFLICT, RETURNING.
    pub conflict: bool,
    pub returning: bool,
    /// One past the statement's last token, its semicolon excluded.
    pub end: usize,
}

impl Rows {
    /// The rows of a statement; `None` if it is no INSERT of plain rows.
    pub fn find(sql: &str, tokens: &[Token]) -> Option<Rows> {
        let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
        let mut reader = Reader { sql, tokens: &tokens[..end], at: 0 };
        if !reader.word("insert") || !reader.word("into") {
            return None;
        }
        let table = reader.name()?;
        let columns = if reader.next_is(TokenKind::LeftParen) {
            let inside = reader.parentheses()?;
            Some(inside.start + 1..inside.end - 1)
        } else {
            None
        };
        let overriding = reader.at;
        if reader.word("overriding") && !((reader.word("user") || reader.word("system")) && reader.word("value")) {
            return None;
        }
        let overriding = Some(overriding..reader.at).filter(|range| !range.is_empty());
        let values = reader.at;
        if !reader.word("values") {
            return None;
        }
        let mut rows = vec![reader.parentheses()?];
        while reader.next_is(TokenKind::Comma) {
            reader.at += 1;
            rows.push(reader.parentheses()?);
        }
        let tail = &tokens[reader.at..end];
        let conflict = tail.first().is_some_and(|token| token.is_word(sql, "on"));
        if !conflict && tail.first().is_some_and(|token| !token.is_word(sql, "returning")) {
            return None;
        }
        let returning = tail.iter().any(|token| token.depth == 0 && token.is_word(sql, "returning"));
        Some(Rows { columns, rows, table, overriding, values, conflict, returning, end })
    }

    /// The values of one row, each as its tokens.
    pub fn values_of(&self, row: usize, tokens: &[Token]) -> Vec<Range<usize>> {
        split(tokens, self.rows[row].start + 1..self.rows[row].end - 1)
    }

    /// The statement with only the rows that are to be kept, in their order, and `more` behind its last token. At least one
    /// row must be kept. Everything else stays byte for byte.
    pub fn keep(&self, sql: &str, tokens: &[Token], kept: impl Fn(usize) -> bool, more: &str) -> String {
        let byte = |token: usize| tokens[token].start as usize;
        let end_byte = |token: usize| tokens[token - 1].end as usize;
        let mut text = String::with_capacity(sql.len());
        text.push_str(&sql[..byte(self.rows[0].start)]);
        let mut first = true;
        for (_, row) in self.rows.iter().enumerate().filter(|(index, _)| kept(*index)) {
            if !std::mem::take(&mut first) {
                text.push_str(", ");
            }
            text.push_str(&sql[byte(row.start)..end_byte(row.end)]);
        }
        let last = self.rows.last().map_or(self.end, |row| row.end);
        text.push_str(&sql[end_byte(last)..end_byte(self.end)]);
        text.push_str(more);
        text
    }
}

/// `INSERT INTO name [OVERRIDING … VALUE] DEFAULT VALUES`: the name, and the two words; `None` for anything else.
pub fn default_values(sql: &str, tokens: &[Token]) -> Option<(Range<usize>, Range<usize>)> {
    let mut reader = Reader { sql, tokens, at: 0 };
    if !reader.word("insert") || !reader.word("into") {
        return None;
    }
    let table = reader.name()?;
    let start = reader.at;
    (reader.word("default") && reader.word("values")).then_some((table, start..reader.at))
}

/// `INSERT INTO name [AS alias] [(columns)] [OVERRIDING … VALUE] SELECT … [ON CONFLICT …] [RETURNING …]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FromQuery {
    /// The table's name, qualified as written, and its alias.
    pub table: Range<usize>,
    /// What stands between the parentheses of the column list.
    pub columns: Option<Range<usize>>,
    pub query: Range<usize>,
    pub returning: bool,
    /// One past the statement's last token, its semicolon excluded.
    pub end: usize,
}

impl FromQuery {
    /// `None`: it is no such INSERT.
    pub fn find(sql: &str, tokens: &[Token]) -> Option<FromQuery> {
        let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
        let mut reader = Reader { sql, tokens: &tokens[..end], at: 0 };
        if !reader.word("insert") || !reader.word("into") {
            return None;
        }
        let table = reader.name()?;
        let begins = |token: &Token| QUERY.iter().any(|word| token.is_word(sql, word));
        let opens = |at: usize| tokens[at..end].iter().find(|token| token.kind != TokenKind::LeftParen);
        let columns = if reader.next_is(TokenKind::LeftParen) && !opens(reader.at).is_some_and(begins) {
            let inside = reader.parentheses()?;
            Some(inside.start + 1..inside.end - 1)
        } else {
            None
        };
        if reader.word("overriding") && !((reader.word("user") || reader.word("system")) && reader.word("value")) {
            return None;
        }
        let start = reader.at;
        if !opens(start).is_some_and(begins) {
            return None;
        }
        let top = |at: &usize, word: &str| tokens[*at].depth == 0 && tokens[*at].is_word(sql, word);
        let conflict =
            |at: &usize| top(at, "on") && tokens.get(at + 1).is_some_and(|next| next.is_word(sql, "conflict"));
        let stop = (start..end).find(|at| conflict(at) || top(at, "returning")).unwrap_or(end);
        let returning = (stop..end).any(|at| top(&at, "returning"));
        Some(FromQuery { table, columns, query: start..stop, returning, end })
    }
}

/// `UPDATE name [[AS] alias] SET column = value, … [WHERE …] [RETURNING …]`: one table and plain columns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Update {
    /// The table's name with its alias, as written.
    pub table: Range<usize>,
    pub name: Range<usize>,
    pub alias: Option<usize>,
    /// Columns with their values.
    pub set: Vec<(String, Range<usize>)>,
    /// WHERE and what follows, or nothing.
    pub condition: Range<usize>,
    /// RETURNING and what follows, or nothing.
    pub returning: Range<usize>,
}

impl Update {
    /// `None`: it is no such UPDATE.
    pub fn find(sql: &str, tokens: &[Token]) -> Option<Update> {
        let end = tokens.iter().position(|token| token.kind == TokenKind::Semicolon).unwrap_or(tokens.len());
        let mut reader = Reader { sql, tokens: &tokens[..end], at: 0 };
        if !reader.word("update") || reader.word("only") {
            return None;
        }
        let start = reader.at;
        reader.identifier().then_some(())?;
        while reader.next_is(TokenKind::Dot) {
            reader.at += 1;
            reader.identifier().then_some(())?;
        }
        let name = start..reader.at;
        let mut alias = None;
        if !reader.word("set") {
            reader.word("as");
            alias = Some(reader.at);
            (reader.identifier() && reader.word("set")).then_some(())?;
        }
        let table = start..reader.at - 1;
        let top = |word: &str, from: usize| {
            (from..end).find(|at| tokens[*at].depth == 0 && tokens[*at].is_word(sql, word)).unwrap_or(end)
        };
        let from = reader.at;
        let returning = top("returning", from);
        let condition = top("where", from).min(returning);
        let plain = top("from", from) >= condition
            && !tokens[condition..returning].iter().any(|token| token.is_word(sql, "current"));
        let mut set = Vec::new();
        for item in split(tokens, from..condition) {
            let [column, equals, ..] = &tokens[item.clone()] else { return None };
            let value = item.start + 2..item.end;
            let is_default = value.len() == 1 && tokens[value.start].is_word(sql, "default");
            if equals.text(sql) != "=" || value.is_empty() || is_default {
                return None;
            }
            set.push((super::word::name(sql, *column)?, value));
        }
        let found = Update { table, name, alias, set, condition: condition..returning, returning: returning..end };
        Some(found).filter(|_| plain)
    }
}

/// Words that a query begins with, behind any number of parentheses.
const QUERY: &[&str] = &["select", "table", "with"];

/// Splits a list at its commas; parentheses inside it hide theirs.
pub fn split(tokens: &[Token], list: Range<usize>) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let Some(depth) = tokens.get(list.start).filter(|_| !list.is_empty()).map(|_| base_depth(tokens, &list)) else {
        return parts;
    };
    let mut start = list.start;
    for index in list.clone() {
        if tokens[index].kind == TokenKind::Comma && tokens[index].depth == depth {
            parts.push(start..index);
            start = index + 1;
        }
    }
    parts.push(start..list.end);
    parts
}

fn base_depth(tokens: &[Token], list: &Range<usize>) -> u16 {
    list.clone().map(|index| tokens[index].depth).min().unwrap_or(0)
}

struct Reader<'t> {
    sql: &'t str,
    tokens: &'t [Token],
    at: usize,
}

impl Reader<'_> {
    fn word(&mut self, word: &str) -> bool {
        let found = self.tokens.get(self.at).is_some_and(|token| token.is_word(self.sql, word));
        self.at += usize::from(found);
        found
    }

    fn next_is(&self, kind: TokenKind) -> bool {
        self.tokens.get(self.at).is_some_and(|token| token.kind == kind)
    }

    fn identifier(&mut self) -> bool {
        let found = self.next_is(TokenKind::Word) || self.next_is(TokenKind::QuotedWord);
        self.at += usize::from(found);
        found
    }

    /// `a`, `a.b`, `a.b.c`, each with `AS alias` or not.
    fn name(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        loop {
            if !self.identifier() {
                return None;
            }
            if !self.next_is(TokenKind::Dot) {
                break;
            }
            self.at += 1;
        }
        if self.word("as") && !self.identifier() {
            return None;
        }
        Some(start..self.at)
    }

    /// From an opening parenthesis to its closing one.
    fn parentheses(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        let open = self.tokens.get(start).filter(|token| token.kind == TokenKind::LeftParen)?;
        let closes = |token: &Token| token.kind == TokenKind::RightParen && token.depth == open.depth + 1;
        let length = self.tokens[start..].iter().position(closes)?;
        self.at = start + length + 1;
        Some(start..self.at)
    }
}
