//! Cuts SQL text into tokens exactly where Postgres does (src/backend/parser/scan.l of PostgreSQL 16–18).
//!
//! Invariant: tokens are ordered, do not overlap, lie on character boundaries, and everything between them is white space
//! or comment. Time is linear in the text, and nothing is allocated beyond the caller's token buffer.
//!
//! Non-goals: keywords (a keyword is a [`TokenKind::Word`]), the values of literals (see [`super::word`]), grammar, and text
//! beyond what the caller is willing to read. What Postgres would refuse to lex is a [`LexError`]; the server words the error.

use std::fmt;

use memchr::{memchr, memchr2, memmem};

/// One token: the bytes `start..end` of the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    pub kind: TokenKind,
    pub start: u32,
    pub end: u32,
    /// Open parentheses and brackets in front of this token (saturating); a closing one counts as inside.
    pub depth: u16,
}

impl Token {
    /// The token's own bytes; `sql` must be the text it was lexed from.
    pub fn text(self, sql: &str) -> &str {
        &sql[self.start as usize..self.end as usize]
    }

    /// Is this the unquoted word `word`? ASCII case is ignored, as Postgres does for keywords.
    pub fn is_word(self, sql: &str, word: &str) -> bool {
        self.kind == TokenKind::Word && self.text(sql).eq_ignore_ascii_case(word)
    }
}

/// What a token is, as far as its spelling tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TokenKind {
    /// An unquoted identifier or keyword.
    Word,
    /// `"name"` or `U&"name"`.
    QuotedWord,
    /// Decimal, `0x`, `0o` or `0b`, of any size: Postgres itself makes what does not fit in int4 an int8 or numeric.
    Integer,
    /// With a point or an exponent.
    Decimal,
    /// `'…'` without backslash escapes, continuations over line ends included.
    String,
    /// `E'…'`, or `'…'` where backslashes escape (see [`Strings::Escaping`]).
    EscapeString,
    /// `U&'…'`; a `UESCAPE` clause is a word and a string of its own.
    UnicodeString,
    /// `B'…'` or `X'…'`.
    BitString,
    /// `$$…$$` or `$tag$…$tag$`.
    DollarString,
    /// `$n`.
    Param(u16),
    /// Any operator, `*`, `=`, `<`, `=>` and the like included.
    Operator,
    /// `::`
    Cast,
    LeftParen,
    RightParen,
    LeftBracket,
    RightBracket,
    Comma,
    Semicolon,
    Dot,
    Colon,
    /// `:=`
    ColonEquals,
    /// `..`
    DotDot,
}

/// What a backslash means in a plain `'…'`: the server's `standard_conforming_strings`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Strings {
    /// `standard_conforming_strings = on`, the default since PostgreSQL 9.1.
    #[default]
    Standard,
    /// `standard_conforming_strings = off`: a plain string is an escape string, and `U&'…'` is refused.
    Escaping,
}

/// Why the text cannot be lexed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LexFault {
    UnterminatedComment,
    UnterminatedString,
    UnterminatedBitString,
    UnterminatedDollarString,
    UnterminatedIdentifier,
    EmptyIdentifier,
    BadNumber,
    BadParam,
    UnicodeStringRefused,
    UnexpectedByte,
    TooLong,
}

impl LexFault {
    pub fn as_str(self) -> &'static str {
        match self {
            LexFault::UnterminatedComment => "unterminated comment",
            LexFault::UnterminatedString => "unterminated string",
            LexFault::UnterminatedBitString => "unterminated bit string",
            LexFault::UnterminatedDollarString => "unterminated dollar-quoted string",
            LexFault::UnterminatedIdentifier => "unterminated quoted identifier",
            LexFault::EmptyIdentifier => "zero-length quoted identifier",
            LexFault::BadNumber => "malformed number",
            LexFault::BadParam => "malformed parameter number",
            LexFault::UnicodeStringRefused => "U& string while standard_conforming_strings is off",
            LexFault::UnexpectedByte => "byte that starts no token",
            LexFault::TooLong => "text of 4 GiB or more",
        }
    }
}

/// The text cannot be lexed from byte `at` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LexError {
    pub at: u32,
    pub what: LexFault,
}

impl fmt::Display for LexError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.what.as_str(), self.at)
    }
}

impl std::error::Error for LexError {}

/// Lexes `sql` into `out`, which is cleared first; strings as with `standard_conforming_strings = on`.
/// After an error `out` holds the tokens in front of it.
pub fn lex(sql: &str, out: &mut Vec<Token>) -> Result<(), LexError> {
    lex_with(sql, Strings::Standard, out)
}

/// [`lex`] for a session whose `standard_conforming_strings` is known.
pub fn lex_with(sql: &str, strings: Strings, out: &mut Vec<Token>) -> Result<(), LexError> {
    out.clear();
    if u32::try_from(sql.len()).is_err() {
        return Err(LexError { at: 0, what: LexFault::TooLong });
    }
    let mut lexer = Lexer { text: sql.as_bytes(), at: 0, strings, signs_end: 0 };
    let mut depth = 0u16;
    loop {
        lexer.skip_blanks().map_err(|what| lexer.fault(what))?;
        let start = lexer.at;
        let Some(&first) = lexer.text.get(start) else { return Ok(()) };
        let kind = lexer.token(first).map_err(|what| LexError { at: start as u32, what })?;
        out.push(Token { kind, start: start as u32, end: lexer.at as u32, depth });
        match kind {
            TokenKind::LeftParen | TokenKind::LeftBracket => depth = depth.saturating_add(1),
            TokenKind::RightParen | TokenKind::RightBracket => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
}

/// What a byte can start, looked up once per token; letters share a class with `_` and every non-ASCII byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Blank,
    Letter,
    Digit,
    Operator,
    Quote,
    DoubleQuote,
    Dollar,
    Dot,
    Colon,
    Single(TokenKind),
}

const CLASSES: [Class; 256] = {
    let mut table = [Class::Other; 256];
    let mut byte = 0usize;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => Class::Blank,
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80..=0xff => Class::Letter,
            b'0'..=b'9' => Class::Digit,
            b'~' | b'!' | b'@' | b'#' | b'^' | b'&' | b'|' | b'`' | b'?' | b'+' | b'-' | b'*' | b'/' | b'%' | b'<'
            | b'>' | b'=' => Class::Operator,
            b'\'' => Class::Quote,
            b'"' => Class::DoubleQuote,
            b'$' => Class::Dollar,
            b'.' => Class::Dot,
            b':' => Class::Colon,
            b'(' => Class::Single(TokenKind::LeftParen),
            b')' => Class::Single(TokenKind::RightParen),
            b'[' => Class::Single(TokenKind::LeftBracket),
            b']' => Class::Single(TokenKind::RightBracket),
            b',' => Class::Single(TokenKind::Comma),
            b';' => Class::Single(TokenKind::Semicolon),
            _ => Class::Other,
        };
        byte += 1;
    }
    table
};

fn class(byte: u8) -> Class {
    CLASSES[usize::from(byte)]
}

fn continues_word(byte: u8) -> bool {
    matches!(class(byte), Class::Letter | Class::Digit | Class::Dollar)
}

struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    strings: Strings,
    /// Up to here every byte from `at` on is a `+` or `-` operator of its own; spares a second look at a long run.
    signs_end: usize,
}

impl Lexer<'_> {
    fn fault(&self, what: LexFault) -> LexError {
        LexError { at: self.at as u32, what }
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.text.get(self.at + ahead).copied()
    }

    /// Moves over white space and comments; on an error `at` is where the comment starts.
    fn skip_blanks(&mut self) -> Result<(), LexFault> {
        while let Some(byte) = self.peek(0) {
            match byte {
                _ if class(byte) == Class::Blank => self.at += 1,
                b'-' if self.peek(1) == Some(b'-') => self.at = line_end(self.text, self.at),
                b'/' if self.peek(1) == Some(b'*') => {
                    self.at = comment_end(self.text, self.at).ok_or(LexFault::UnterminatedComment)?;
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Reads the token that starts at `at` with `first`, and moves behind it.
    fn token(&mut self, first: u8) -> Result<TokenKind, LexFault> {
        match class(first) {
            Class::Letter => self.word_or_prefixed_string(first),
            Class::Digit => self.number(),
            Class::Operator => Ok(self.operator()),
            Class::Single(kind) => {
                self.at += 1;
                Ok(kind)
            }
            Class::Quote => match self.strings {
                Strings::Standard => self.string(0, TokenKind::String),
                Strings::Escaping => self.string(0, TokenKind::EscapeString),
            },
            Class::DoubleQuote => self.quoted_word(0),
            Class::Dollar => self.dollar(),
            Class::Dot => match self.peek(1) {
                Some(b'.') => Ok(self.advance(2, TokenKind::DotDot)),
                Some(b'0'..=b'9') => self.number(),
                _ => Ok(self.advance(1, TokenKind::Dot)),
            },
            Class::Colon => match self.peek(1) {
                Some(b':') => Ok(self.advance(2, TokenKind::Cast)),
                Some(b'=') => Ok(self.advance(2, TokenKind::ColonEquals)),
                _ => Ok(self.advance(1, TokenKind::Colon)),
            },
            Class::Blank | Class::Other => Err(LexFault::UnexpectedByte),
        }
    }

    fn advance(&mut self, bytes: usize, kind: TokenKind) -> TokenKind {
        self.at += bytes;
        kind
    }

    /// `N'…'` is no case of its own: scan.l, too, returns the word NCHAR and then a plain string.
    fn word_or_prefixed_string(&mut self, first: u8) -> Result<TokenKind, LexFault> {
        match (first | 0x20, self.peek(1)) {
            (b'e', Some(b'\'')) => return self.string(1, TokenKind::EscapeString),
            (b'b' | b'x', Some(b'\'')) => return self.string(1, TokenKind::BitString),
            (b'u', Some(b'&')) => match self.peek(2) {
                Some(b'\'') if self.strings == Strings::Escaping => return Err(LexFault::UnicodeStringRefused),
                Some(b'\'') => return self.string(2, TokenKind::UnicodeString),
                Some(b'"') => return self.quoted_word(2),
                _ => {}
            },
            _ => {}
        }
        let rest = &self.text[self.at..];
        self.at += rest.iter().position(|&byte| !continues_word(byte)).unwrap_or(rest.len());
        Ok(TokenKind::Word)
    }

    /// A quoted string whose quote stands `prefix` bytes ahead, with its continuations behind line ends.
    fn string(&mut self, prefix: usize, kind: TokenKind) -> Result<TokenKind, LexFault> {
        let escapes = kind == TokenKind::EscapeString;
        let mut open = self.at + prefix;
        loop {
            let close =
                if escapes { escape_string_end(self.text, open + 1) } else { quote_end(self.text, open + 1, b'\'') };
            let end = close.ok_or(match kind {
                TokenKind::BitString => LexFault::UnterminatedBitString,
                _ => LexFault::UnterminatedString,
            })?;
            match continuation(self.text, end) {
                Some(next) => open = next,
                None => {
                    self.at = end;
                    return Ok(kind);
                }
            }
        }
    }

    fn quoted_word(&mut self, prefix: usize) -> Result<TokenKind, LexFault> {
        let open = self.at + prefix;
        let end = quote_end(self.text, open + 1, b'"').ok_or(LexFault::UnterminatedIdentifier)?;
        if end == open + 2 {
            return Err(LexFault::EmptyIdentifier);
        }
        self.at = end;
        Ok(TokenKind::QuotedWord)
    }

    /// `$1`, or a dollar quote; scan.l lets any other `$` through for the grammar to refuse.
    fn dollar(&mut self) -> Result<TokenKind, LexFault> {
        if matches!(self.peek(1), Some(b'0'..=b'9')) {
            return self.param();
        }
        let rest = &self.text[self.at + 1..];
        let tag = rest
            .iter()
            .position(|&byte| !matches!(class(byte), Class::Letter | Class::Digit))
            .filter(|&end| rest[end] == b'$')
            .ok_or(LexFault::UnexpectedByte)?;
        let body = self.at + tag + 2;
        let delimiter = &self.text[self.at..body];
        let length = memmem::find(&self.text[body..], delimiter).ok_or(LexFault::UnterminatedDollarString)?;
        self.at = body + length + delimiter.len();
        Ok(TokenKind::DollarString)
    }

    fn param(&mut self) -> Result<TokenKind, LexFault> {
        let digits = &self.text[self.at + 1..];
        let length = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
        let mut number = 0u16;
        for &digit in &digits[..length] {
            let shifted = number.checked_mul(10).ok_or(LexFault::BadParam)?;
            number = shifted.checked_add(u16::from(digit - b'0')).ok_or(LexFault::BadParam)?;
        }
        self.at += 1 + length;
        if self.peek(0).is_some_and(|byte| class(byte) == Class::Letter) {
            return Err(LexFault::BadParam);
        }
        Ok(TokenKind::Param(number))
    }

    /// decinteger, hexinteger, octinteger, bininteger, numeric and real of scan.l, and the junk behind them.
    fn number(&mut self) -> Result<TokenKind, LexFault> {
        let mut kind = TokenKind::Integer;
        if self.peek(0) == Some(b'0') && self.radix_integer()? {
            return self.end_of_number(kind);
        }
        self.digits(u8::is_ascii_digit);
        // `1..2` is a range: the integer ends in front of both points.
        if self.peek(0) == Some(b'.') && self.peek(1) != Some(b'.') {
            kind = TokenKind::Decimal;
            self.at += 1;
            if self.peek(0).is_some_and(|byte| byte.is_ascii_digit()) {
                self.digits(u8::is_ascii_digit);
            }
        }
        if matches!(self.peek(0), Some(b'e' | b'E')) {
            kind = TokenKind::Decimal;
            self.at += if matches!(self.peek(1), Some(b'+' | b'-')) { 2 } else { 1 };
            if !self.peek(0).is_some_and(|byte| byte.is_ascii_digit()) {
                return Err(LexFault::BadNumber);
            }
            self.digits(u8::is_ascii_digit);
        }
        self.end_of_number(kind)
    }

    /// `0x…`, `0o…`, `0b…`: true if there was one.
    fn radix_integer(&mut self) -> Result<bool, LexFault> {
        let is_digit: fn(&u8) -> bool = match self.peek(1) {
            Some(b'x' | b'X') => u8::is_ascii_hexdigit,
            Some(b'o' | b'O') => |byte| matches!(byte, b'0'..=b'7'),
            Some(b'b' | b'B') => |byte| matches!(byte, b'0' | b'1'),
            _ => return Ok(false),
        };
        self.at += 2;
        let first = self.at;
        self.digits(is_digit);
        if self.at == first { Err(LexFault::BadNumber) } else { Ok(true) }
    }

    /// Digits with single underscores in front of any of them. Callers that forbid a leading one check for it before.
    fn digits(&mut self, is_digit: fn(&u8) -> bool) {
        loop {
            let underscore = usize::from(self.peek(0) == Some(b'_'));
            match self.peek(underscore) {
                Some(byte) if is_digit(&byte) => self.at += underscore + 1,
                _ => return,
            }
        }
    }

    fn end_of_number(&self, kind: TokenKind) -> Result<TokenKind, LexFault> {
        match self.peek(0) {
            Some(byte) if class(byte) == Class::Letter => Err(LexFault::BadNumber),
            _ => Ok(kind),
        }
    }

    /// The longest run of operator bytes that holds no comment start, without a trailing `+` or `-` unless the operator has
    /// a byte no SQL operator has (scan.l, rule `operator`: so that `a=-1` and `a*-1` are what everyone expects).
    fn operator(&mut self) -> TokenKind {
        if self.at < self.signs_end {
            return self.advance(1, TokenKind::Operator);
        }
        let rest = &self.text[self.at..];
        let mut length = 1;
        while let Some(&byte) = rest.get(length) {
            let next = rest.get(length + 1);
            let comment = (byte == b'-' && next == Some(&b'-')) || (byte == b'/' && next == Some(&b'*'));
            if class(byte) != Class::Operator || comment {
                break;
            }
            length += 1;
        }
        let signed = |length: usize| length > 1 && matches!(rest[length - 1], b'+' | b'-');
        if signed(length) {
            let unusual =
                |byte: &u8| matches!(byte, b'~' | b'!' | b'@' | b'#' | b'^' | b'&' | b'|' | b'`' | b'?' | b'%');
            if !rest[..length - 1].iter().any(unusual) {
                self.signs_end = self.at + length;
                while signed(length) {
                    length -= 1;
                }
            }
        }
        self.advance(length, TokenKind::Operator)
    }
}

/// The line end behind a `--` comment at `at` (the line end itself is white space), or the end of the text.
fn line_end(text: &[u8], at: usize) -> usize {
    memchr2(b'\n', b'\r', &text[at..]).map_or(text.len(), |length| at + length)
}

/// Behind the nested comment that starts at `at`.
fn comment_end(text: &[u8], mut at: usize) -> Option<usize> {
    at += 2;
    let mut nested = 1u32;
    loop {
        at += memchr2(b'*', b'/', text.get(at..)?)?;
        match (text[at], text.get(at + 1)) {
            (b'*', Some(b'/')) => {
                nested -= 1;
                at += 2;
                if nested == 0 {
                    return Some(at);
                }
            }
            (b'/', Some(b'*')) => {
                nested += 1;
                at += 2;
            }
            _ => at += 1,
        }
    }
}

/// Behind the closing `quote` of a body that starts at `at`; a doubled quote stands for itself.
fn quote_end(text: &[u8], mut at: usize, quote: u8) -> Option<usize> {
    loop {
        at += memchr(quote, text.get(at..)?)? + 1;
        if text.get(at) != Some(&quote) {
            return Some(at);
        }
        at += 1;
    }
}

/// [`quote_end`] for a body in which a backslash takes the next byte with it.
fn escape_string_end(text: &[u8], mut at: usize) -> Option<usize> {
    loop {
        at += memchr2(b'\'', b'\\', text.get(at..)?)?;
        match (text[at], text.get(at + 1)) {
            (b'\\', _) | (_, Some(b'\'')) => at += 2,
            _ => return Some(at + 1),
        }
    }
}

/// Where the next piece's quote stands, if the string that ended at `end` continues: white space with at least one line
/// end in it, and `--` comments, as scan.l's `quotecontinue` has it. The look-ahead reads blanks a second time at most.
pub(super) fn continuation(text: &[u8], end: usize) -> Option<usize> {
    let mut at = end;
    let mut line_ended = false;
    loop {
        match text.get(at)? {
            b'\n' | b'\r' => {
                line_ended = true;
                at += 1;
            }
            b' ' | b'\t' | 0x0b | 0x0c => at += 1,
            b'-' if text.get(at + 1) == Some(&b'-') => at = line_end(text, at),
            b'\'' if line_ended => return Some(at),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::TokenKind::*;
    use super::*;

    fn kinds(sql: &str) -> Vec<(TokenKind, &str)> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
        tokens.iter().map(|token| (token.kind, token.text(sql))).collect()
    }

    fn fault(sql: &str) -> Option<LexFault> {
        lex(sql, &mut Vec::new()).err().map(|error| error.what)
    }

    #[test]
    fn words_and_quoted_words() {
        assert_eq!(kinds("selecT naïve a$1$b _x"), [(Word, "selecT"), (Word, "naïve"), (Word, "a$1$b"), (Word, "_x")]);
        assert_eq!(
            kinds(r#""a""b".U&"d\0061" u&x u & "x""#),
            [
                (QuotedWord, r#""a""b""#),
                (Dot, "."),
                (QuotedWord, r#"U&"d\0061""#),
                (Word, "u"),
                (Operator, "&"),
                (Word, "x"),
                (Word, "u"),
                (Operator, "&"),
                (QuotedWord, r#""x""#),
            ]
        );
        assert_eq!(fault(r#"select """#), Some(LexFault::EmptyIdentifier));
        assert_eq!(fault(r#"select "a"#), Some(LexFault::UnterminatedIdentifier));
    }

    #[test]
    fn strings_of_every_prefix() {
        assert_eq!(
            kinds(r"'it''s \' E'a\'b''c' e'\\' b'01' X'fF' U&'\0061' n'x'"),
            [
                (String, r"'it''s \'"),
                (EscapeString, r"E'a\'b''c'"),
                (EscapeString, r"e'\\'"),
                (BitString, "b'01'"),
                (BitString, "X'fF'"),
                (UnicodeString, r"U&'\0061'"),
                (Word, "n"),
                (String, "'x'"),
            ]
        );
        let mut tokens = Vec::new();
        lex_with(r"'a\'b'", Strings::Escaping, &mut tokens).expect("one string");
        assert_eq!(tokens, [Token { kind: EscapeString, start: 0, end: 6, depth: 0 }]);
        assert_eq!(
            lex_with("u&'x'", Strings::Escaping, &mut tokens),
            Err(LexError { at: 0, what: LexFault::UnicodeStringRefused })
        );
        for open in ["'a", r"E'a\'", r"E'a\", "'a''", "u&'"] {
            assert_eq!(fault(open), Some(LexFault::UnterminatedString), "{open}");
        }
        assert_eq!(fault("x'0"), Some(LexFault::UnterminatedBitString));
    }

    #[test]
    fn a_string_continues_over_a_line_end_only() {
        assert_eq!(kinds("'a'\n  'b'").len(), 1);
        assert_eq!(kinds("'a' -- c\n -- d\n\t'b'\r'c'").len(), 1);
        assert_eq!(kinds("E'a'\n'\\\\'").len(), 1);
        assert_eq!(kinds("'a' 'b'").len(), 2);
        assert_eq!(kinds("'a' /* \n */ 'b'").len(), 2);
        assert_eq!(kinds("'a' /* */ \n 'b'").len(), 2);
        assert_eq!(kinds("'a'\n").len(), 1);
        assert_eq!(kinds("'a'\n, 'b'").len(), 3);
    }

    #[test]
    fn dollar_quotes_follow_identifier_rules() {
        assert_eq!(
            kinds("$$a'b$$ $t1$ $x$ $$ $t1$1$$$$"),
            [(DollarString, "$$a'b$$"), (DollarString, "$t1$ $x$ $$ $t1$"), (Integer, "1"), (DollarString, "$$$$"),]
        );
        assert_eq!(kinds("a$$b$$"), [(Word, "a$$b$$")]);
        assert_eq!(kinds("$ä$x$a$ $ä$").len(), 1);
        assert_eq!(fault("$a$ $A$"), Some(LexFault::UnterminatedDollarString));
        assert_eq!(fault("$a b$"), Some(LexFault::UnexpectedByte));
        assert_eq!(fault("$"), Some(LexFault::UnexpectedByte));
    }

    #[test]
    fn params() {
        assert_eq!(kinds("$1,$65535"), [(Param(1), "$1"), (Comma, ","), (Param(65535), "$65535")]);
        assert_eq!(fault("$65536"), Some(LexFault::BadParam));
        assert_eq!(fault("$1a"), Some(LexFault::BadParam));
    }

    #[test]
    fn numbers() {
        assert_eq!(
            kinds("1 1_000 0xFf_F 0o17 0b_1 1.5 1. .5 1e5 1.e-5 .5E+10 1..2 00"),
            [
                (Integer, "1"),
                (Integer, "1_000"),
                (Integer, "0xFf_F"),
                (Integer, "0o17"),
                (Integer, "0b_1"),
                (Decimal, "1.5"),
                (Decimal, "1."),
                (Decimal, ".5"),
                (Decimal, "1e5"),
                (Decimal, "1.e-5"),
                (Decimal, ".5E+10"),
                (Integer, "1"),
                (DotDot, ".."),
                (Integer, "2"),
                (Integer, "00"),
            ]
        );
        for junk in ["1a", "1_", "1__0", "1e", "1e+", "0x", "0b2", "0o8", "1.5a", "1_000é", "0xg"] {
            assert_eq!(fault(junk), Some(LexFault::BadNumber), "{junk}");
        }
    }

    #[test]
    fn operators_end_where_scan_l_ends_them() {
        let operators = |sql: &'static str| kinds(sql).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(operators("a=-1"), ["a", "=", "-", "1"]);
        assert_eq!(operators("a*-+1"), ["a", "*", "-", "+", "1"]);
        assert_eq!(operators("a @- b"), ["a", "@-", "b"]);
        assert_eq!(operators("a->>'b' #>> c"), ["a", "->>", "'b'", "#>>", "c"]);
        assert_eq!(operators("a<--b\nc"), ["a", "<", "c"]);
        assert_eq!(operators("a+/*b*/c"), ["a", "+", "c"]);
        assert_eq!(operators("a@-/*x*/1"), ["a", "@-", "1"]);
        assert_eq!(operators("a::int:=b=>c:d"), ["a", "::", "int", ":=", "b", "=>", "c", ":", "d"]);
        assert_eq!(operators("+-+-1"), ["+", "-", "+", "-", "1"]);
        assert_eq!(operators("+-*1"), ["+-*", "1"]);
        assert_eq!(operators("a <> b != c"), ["a", "<>", "b", "!=", "c"]);
    }

    #[test]
    fn comments_nest_and_yield_nothing() {
        assert_eq!(kinds("/* a /* b */ ' */ select -- ' \r 1 /**/"), [(Word, "select"), (Integer, "1")]);
        assert_eq!(kinds("/*/ x */ 1"), [(Integer, "1")]);
        assert_eq!(kinds("/*****/1"), [(Integer, "1")]);
        assert_eq!(kinds("-- only"), []);
        assert_eq!(fault("1 /* /* */"), Some(LexFault::UnterminatedComment));
        assert_eq!(lex("1 /*", &mut Vec::new()), Err(LexError { at: 2, what: LexFault::UnterminatedComment }));
    }

    #[test]
    fn depth_counts_both_brackets() {
        let mut tokens = Vec::new();
        lex("f(a[1], (2)) )", &mut tokens).expect("lexes");
        let depths: Vec<u16> = tokens.iter().map(|token| token.depth).collect();
        assert_eq!(depths, [0, 0, 1, 1, 2, 2, 1, 1, 2, 2, 1, 0]);
    }

    #[test]
    fn unknown_bytes_are_refused() {
        for bad in ["{", "\\", "\u{1}", "\0"] {
            assert_eq!(fault(bad), Some(LexFault::UnexpectedByte), "{bad:?}");
        }
    }

    /// Fails by taking hours: a rule that looks again at what it has seen needs 10^11 steps here.
    #[test]
    fn long_runs_stay_linear() {
        let mut tokens = Vec::new();
        for unit in ["+-", "'a'\n", "(", "/*", "$a", "1.", "@-", "a$", "''", "\"\"\"", "--\n"] {
            let _ = lex(&unit.repeat(500_000), &mut tokens);
        }
    }

    /// Pieces that meet in every order, so that the property tests reach the inside of each rule.
    fn sqlish() -> impl Strategy<Value = std::string::String> {
        let piece = prop_oneof![
            Just(" "),
            Just("\n"),
            Just("--"),
            Just("/*"),
            Just("*/"),
            Just("'"),
            Just("''"),
            Just("E'"),
            Just("U&'"),
            Just("u&\""),
            Just("b'"),
            Just("\""),
            Just("$$"),
            Just("$a$"),
            Just("$1"),
            Just("\\"),
            Just("1"),
            Just("1_0"),
            Just("0x1"),
            Just(".5"),
            Just("."),
            Just(".."),
            Just("e5"),
            Just("abc"),
            Just("ü"),
            Just("+"),
            Just("-"),
            Just("*"),
            Just("/"),
            Just("@"),
            Just("<="),
            Just(":"),
            Just("("),
            Just(")"),
            Just("["),
            Just("]"),
            Just(","),
            Just(";"),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    /// White space and comments only?
    fn blank(text: &str) -> bool {
        let mut tokens = Vec::new();
        lex(text, &mut tokens).is_ok() && tokens.is_empty()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn random_text_never_panics(text in any::<std::string::String>(), escaping in any::<bool>()) {
            let strings = if escaping { Strings::Escaping } else { Strings::Standard };
            let _ = lex_with(&text, strings, &mut Vec::new());
        }

        #[test]
        fn tokens_and_blanks_cover_the_text(sql in sqlish()) {
            let mut tokens = Vec::new();
            let lexed = lex(&sql, &mut tokens);
            let mut at = 0;
            for token in &tokens {
                prop_assert!(token.start < token.end);
                prop_assert!(blank(&sql[at..token.start as usize]));
                at = token.end as usize;
            }
            if lexed.is_ok() {
                prop_assert!(blank(&sql[at..]));
            }
        }

        #[test]
        fn tokens_joined_by_blanks_are_the_same_tokens(sql in sqlish()) {
            let mut tokens = Vec::new();
            let _ = lex(&sql, &mut tokens);
            let joined = tokens.iter().map(|token| token.text(&sql)).collect::<Vec<_>>().join(" ");
            let mut again = Vec::new();
            prop_assert!(lex(&joined, &mut again).is_ok());
            let kinds = |tokens: &[Token]| tokens.iter().map(|token| (token.kind, token.depth)).collect::<Vec<_>>();
            prop_assert_eq!(kinds(&tokens), kinds(&again));
        }
    }
}
