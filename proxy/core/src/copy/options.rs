//! The options of a COPY statement, in the old and the new spelling (copy_opt_list and copy_generic_opt_list of
//! src/backend/parser/gram.y).
//!
//! Invariant: an option that could change how rows are told apart and is not understood is an error, never skipped.
//! Non-goal: refusing what Postgres refuses (two delimiters, a quote in text format); the servers see the statement too.

use crate::sql::lex::{Token, TokenKind};
use crate::sql::word;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Format {
    #[default]
    Text,
    Csv,
    Binary,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    pub format: Format,
    pub delimiter: u8,
    /// CSV only.
    pub quote: u8,
    pub escape: u8,
    pub null: Box<[u8]>,
    /// What stands for a column's default (Postgres 16).
    pub default: Option<Box<[u8]>>,
    /// The first line is a header.
    pub header: bool,
    pub force_null: Columns,
    pub force_not_null: Columns,
    pub encoding: Option<Box<str>>,
    /// The columns in parentheses behind the table.
    pub columns: Option<Vec<Box<str>>>,
    /// Index of the first token behind WHERE.
    pub filter: Option<usize>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Columns {
    #[default]
    None,
    All,
    Named(Vec<Box<str>>),
}

impl Columns {
    pub fn contain(&self, name: &str) -> bool {
        match self {
            Columns::None => false,
            Columns::All => true,
            Columns::Named(names) => names.iter().any(|named| **named == *name),
        }
    }
}

/// What the statement says; `None` leaves it to the format.
#[derive(Default)]
struct Written {
    format: Format,
    delimiter: Option<u8>,
    quote: Option<u8>,
    escape: Option<u8>,
    null: Option<Box<[u8]>>,
    default: Option<Box<[u8]>>,
    header: bool,
    force_null: Columns,
    force_not_null: Columns,
    encoding: Option<Box<str>>,
    columns: Option<Vec<Box<str>>>,
}

impl Options {
    /// Reads a COPY of a table or a query; `Err` names the word that is not understood.
    pub fn read(sql: &str, tokens: &[Token]) -> Result<Self, String> {
        let mut reader = Reader { sql, tokens, at: 0 };
        let mut written = Written::default();
        reader.head(&mut written)?;
        let filter = reader.options(&mut written)?;
        Ok(written.complete(filter))
    }
}

impl Written {
    fn complete(self, filter: Option<usize>) -> Options {
        let csv = self.format == Format::Csv;
        let quote = self.quote.unwrap_or(b'"');
        Options {
            format: self.format,
            delimiter: self.delimiter.unwrap_or(if csv { b',' } else { b'\t' }),
            quote,
            escape: self.escape.unwrap_or(quote),
            null: self.null.unwrap_or_else(|| if csv { Box::default() } else { (*b"\\N").into() }),
            default: self.default,
            header: self.header,
            force_null: self.force_null,
            force_not_null: self.force_not_null,
            encoding: self.encoding,
            columns: self.columns,
            filter,
        }
    }
}

struct Reader<'a> {
    sql: &'a str,
    tokens: &'a [Token],
    at: usize,
}

impl Reader<'_> {
    fn eat(&mut self, word: &str) -> bool {
        let found = self.tokens.get(self.at).is_some_and(|token| token.is_word(self.sql, word));
        self.at += usize::from(found);
        found
    }

    fn eat_kind(&mut self, kind: TokenKind) -> bool {
        let found = self.tokens.get(self.at).is_some_and(|token| token.kind == kind);
        self.at += usize::from(found);
        found
    }

    fn misread<T>(&self) -> Result<T, String> {
        let word = self.tokens.get(self.at).map_or("its end", |token| token.text(self.sql));
        Err(word.to_owned())
    }

    fn string(&mut self) -> Result<Box<str>, String> {
        let value = self.tokens.get(self.at).and_then(|token| word::string_value(self.sql, *token));
        let Some(value) = value else { return self.misread() };
        self.at += 1;
        Ok(value.into())
    }

    /// A string of one byte; a longer one is refused by Postgres.
    fn byte(&mut self) -> Result<Option<u8>, String> {
        let value = self.string()?;
        match value.as_bytes() {
            [byte] => Ok(Some(*byte)),
            _ => Err(format!("'{value}'")),
        }
    }

    /// A string, or a word in lower case.
    fn value(&mut self) -> Result<String, String> {
        if let Some(name) = self.tokens.get(self.at).and_then(|token| word::name(self.sql, *token)) {
            self.at += 1;
            return Ok(name);
        }
        if let Some(token) = self.tokens.get(self.at).filter(|token| token.kind == TokenKind::Integer) {
            self.at += 1;
            return Ok(token.text(self.sql).to_owned());
        }
        self.string().map(|value| value.to_ascii_lowercase())
    }

    fn names(&mut self) -> Result<Vec<Box<str>>, String> {
        let mut names = Vec::new();
        loop {
            let name = self.tokens.get(self.at).and_then(|token| word::name(self.sql, *token));
            let Some(name) = name else { return self.misread() };
            names.push(name.into_boxed_str());
            self.at += 1;
            if !self.eat_kind(TokenKind::Comma) {
                return Ok(names);
            }
        }
    }

    /// `COPY [BINARY] {table [(columns)] | (query)} {FROM | TO} [PROGRAM] {'file' | STDIN | STDOUT}`
    fn head(&mut self, written: &mut Written) -> Result<(), String> {
        if !self.eat("copy") {
            return self.misread();
        }
        let query = self.tokens.get(self.at).is_some_and(|token| token.kind == TokenKind::LeftParen);
        if !query {
            if self.eat("binary") {
                written.format = Format::Binary;
            }
            self.names_of_table()?;
            if self.eat_kind(TokenKind::LeftParen) {
                written.columns = Some(self.names()?);
                if !self.eat_kind(TokenKind::RightParen) {
                    return self.misread();
                }
            }
        } else if let Some(end) =
            self.tokens[self.at..].iter().position(|token| token.kind == TokenKind::RightParen && token.depth <= 1)
        {
            self.at += end + 1;
        }
        if !self.eat("from") && !self.eat("to") {
            return self.misread();
        }
        self.eat("program");
        self.at += 1;
        Ok(())
    }

    fn names_of_table(&mut self) -> Result<(), String> {
        loop {
            if self.tokens.get(self.at).and_then(|token| word::name(self.sql, *token)).is_none() {
                return self.misread();
            }
            self.at += 1;
            if !self.eat_kind(TokenKind::Dot) {
                return Ok(());
            }
        }
    }

    /// What is behind the end point. Returns where the condition of WHERE starts.
    fn options(&mut self, written: &mut Written) -> Result<Option<usize>, String> {
        // Older than old: `[USING] DELIMITERS 'x'`.
        if self.eat("using") || self.tokens.get(self.at).is_some_and(|token| token.is_word(self.sql, "delimiters")) {
            if !self.eat("delimiters") {
                return self.misread();
            }
            written.delimiter = self.byte()?;
        }
        self.eat("with");
        if self.eat_kind(TokenKind::LeftParen) {
            loop {
                self.option(written)?;
                if self.eat_kind(TokenKind::RightParen) {
                    break;
                }
                if !self.eat_kind(TokenKind::Comma) {
                    return self.misread();
                }
            }
        } else {
            while self.old_option(written)? {}
        }
        if self.eat("where") {
            return Ok(Some(self.at));
        }
        self.eat_kind(TokenKind::Semicolon);
        if self.at < self.tokens.len() { self.misread() } else { Ok(None) }
    }

    fn option(&mut self, written: &mut Written) -> Result<(), String> {
        let start = self.at;
        let name = self.value()?;
        match &*name {
            "format" => {
                written.format = match &*self.value()? {
                    "text" => Format::Text,
                    "csv" => Format::Csv,
                    "binary" => Format::Binary,
                    other => return Err(other.to_owned()),
                };
            }
            "delimiter" => written.delimiter = self.byte()?,
            "quote" => written.quote = self.byte()?,
            "escape" => written.escape = self.byte()?,
            "null" => written.null = Some(self.string()?.as_bytes().into()),
            "default" => written.default = Some(self.string()?.as_bytes().into()),
            "encoding" => written.encoding = Some(self.value()?.into()),
            "header" => written.header = self.flag(true)?,
            "force_null" => written.force_null = self.columns()?,
            "force_not_null" => written.force_not_null = self.columns()?,
            "force_quote" => {
                self.columns()?;
            }
            "freeze" => {
                self.flag(false)?;
            }
            // A server that leaves bad rows out would leave out what weir cannot place, too; but it need not be the same ones.
            "on_error" if self.value()? == "stop" => {}
            "log_verbosity" => {
                self.value()?;
            }
            _ => {
                self.at = start;
                return self.misread();
            }
        }
        Ok(())
    }

    /// `true`, `on`, `1`, nothing at all; `MATCH` where there is a header to match.
    fn flag(&mut self, matches: bool) -> Result<bool, String> {
        let ends = |token: &Token| matches!(token.kind, TokenKind::Comma | TokenKind::RightParen);
        if self.tokens.get(self.at).is_some_and(ends) {
            return Ok(true);
        }
        match &*self.value()? {
            "true" | "on" | "1" => Ok(true),
            "match" if matches => Ok(true),
            "false" | "off" | "0" => Ok(false),
            other => Err(other.to_owned()),
        }
    }

    /// `*` or `(a, b)`
    fn columns(&mut self) -> Result<Columns, String> {
        if self.tokens.get(self.at).is_some_and(|token| token.text(self.sql) == "*") {
            self.at += 1;
            return Ok(Columns::All);
        }
        if !self.eat_kind(TokenKind::LeftParen) {
            return self.misread();
        }
        let names = self.names()?;
        if self.eat_kind(TokenKind::RightParen) { Ok(Columns::Named(names)) } else { self.misread() }
    }

    /// One option of before Postgres 9.0; false when there is none.
    fn old_option(&mut self, written: &mut Written) -> Result<bool, String> {
        match () {
            () if self.eat("binary") => written.format = Format::Binary,
            () if self.eat("csv") => written.format = Format::Csv,
            () if self.eat("header") => written.header = true,
            () if self.eat("freeze") => {}
            () if self.eat("delimiter") => {
                self.eat("as");
                written.delimiter = self.byte()?;
            }
            () if self.eat("null") => {
                self.eat("as");
                written.null = Some(self.string()?.as_bytes().into());
            }
            () if self.eat("quote") => {
                self.eat("as");
                written.quote = self.byte()?;
            }
            () if self.eat("escape") => {
                self.eat("as");
                written.escape = self.byte()?;
            }
            () if self.eat("encoding") => written.encoding = Some(self.string()?.to_ascii_lowercase().into()),
            () if self.eat("force") => {
                let not = self.eat("not");
                let null = self.eat("null");
                if !null && (not || !self.eat("quote")) {
                    return self.misread();
                }
                let all = self.tokens.get(self.at).is_some_and(|token| token.text(self.sql) == "*");
                let columns = if all { self.columns()? } else { Columns::Named(self.names()?) };
                match (not, null) {
                    (true, _) => written.force_not_null = columns,
                    (false, true) => written.force_null = columns,
                    (false, false) => {}
                }
            }
            () => return Ok(false),
        }
        Ok(true)
    }
}
