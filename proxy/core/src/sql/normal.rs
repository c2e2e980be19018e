//! One text for all statements of one shape: value literals become parameters, outer comments and `;` go.
//!
//! Invariant: token `i` of the statement is token `i` of its normal text, so that an edit can be found in one and done in
//! the other. The normal text is a key and the planner's input; it is never sent to a server.
//!
//! Non-goals: equality beyond literals (letter case and inner white space stay). Two statements with one normal text may
//! still have literals of different kinds: the kinds belong to the key as well.

use std::ops::Range;

use memchr::memchr2;

use super::lex::{Token, TokenKind};

/// The result of [`normalize`]; reused, so that a repeated statement allocates nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Normal {
    pub text: String,
    /// Lifted literals in order; the n-th (from 0) is `$(params + 1 + n)` in `text`.
    pub literals: Vec<Literal>,
    /// The highest `$n` the client wrote.
    pub params: u16,
}

/// A value that stood in the statement itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Literal {
    pub kind: LiteralKind,
    /// First byte in the original text.
    pub start: u32,
    /// One past the last byte in the original text.
    pub end: u32,
}

/// How a literal was spelt. A sign in front is an operator token and not part of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LiteralKind {
    Integer,
    Decimal,
    /// A plain `'…'` of unknown type.
    String,
}

/// Words after which an expression starts; in lower case, sorted.
const BEFORE_VALUE: [&str; 18] = [
    "and",
    "between",
    "case",
    "else",
    "ilike",
    "in",
    "like",
    "limit",
    "not",
    "offset",
    "or",
    "returning",
    "select",
    "set",
    "then",
    "values",
    "when",
    "where",
];

/// Words that make the parenthesis behind them hold type modifiers, or (`extract`) a field name; sorted.
const BEFORE_MODIFIER: [&str; 18] = [
    "bit",
    "bpchar",
    "char",
    "character",
    "dec",
    "decimal",
    "extract",
    "float",
    "interval",
    "nchar",
    "numeric",
    "time",
    "timestamp",
    "timestamptz",
    "timetz",
    "varbit",
    "varchar",
    "varying",
];

/// Words that end a BY list at its own depth; sorted.
const AFTER_LIST: [&str; 12] = [
    "except",
    "fetch",
    "for",
    "having",
    "intersect",
    "limit",
    "offset",
    "order",
    "returning",
    "union",
    "window",
    "with",
];

/// Statements whose literals are values; sorted.
const LIFTED: [&str; 6] = ["delete", "insert", "select", "update", "values", "with"];

/// Writes the normal form of the one statement in `tokens` (a range of the tokens of `sql`) into `out`.
///
/// Not lifted, because there a literal is not just a value: GROUP BY, ORDER BY and DISTINCT ON lists (positions),
/// type modifiers, strings behind a type name or keyword, and every string that is not a plain `'…'`.
pub fn normalize(sql: &str, tokens: &[Token], out: &mut Normal) {
    out.text.clear();
    out.literals.clear();
    out.params = tokens.iter().fold(0, |highest, token| match token.kind {
        TokenKind::Param(number) => highest.max(number),
        _ => highest,
    });
    let count = tokens.iter().rposition(|token| token.kind != TokenKind::Semicolon).map_or(0, |last| last + 1);
    let tokens = &tokens[..count];
    let first_word = tokens.iter().find(|token| token.kind != TokenKind::LeftParen);
    if first_word.is_some_and(|&token| is_one_of(sql, token, &LIFTED)) {
        lift(sql, tokens, out);
    } else if let (Some(first), Some(last)) = (tokens.first(), tokens.last()) {
        out.text.push_str(&sql[first.start as usize..last.end as usize]);
    }
}

/// The tokens' text with every comment between them turned into one space.
pub fn plain_text(sql: &str, tokens: &[Token]) -> String {
    let mut text = String::new();
    for (index, token) in tokens.iter().enumerate() {
        if index > 0 {
            push_gap(sql, tokens[index - 1], *token, &mut text);
        }
        text.push_str(token.text(sql));
    }
    text
}

/// Where literals stay, and until when.
#[derive(Clone, Copy)]
enum Quiet {
    No,
    /// Inside a parenthesis opened at this depth.
    Parens(u16),
    /// In a BY list at this depth.
    List(u16),
}

impl Quiet {
    fn ended_by(self, sql: &str, token: Token) -> bool {
        match self {
            Quiet::No => false,
            Quiet::Parens(depth) => token.depth <= depth,
            Quiet::List(depth) => {
                let closes = matches!(token.kind, TokenKind::RightParen | TokenKind::RightBracket);
                token.depth < depth || (token.depth == depth && (closes || is_one_of(sql, token, &AFTER_LIST)))
            }
        }
    }
}

fn lift(sql: &str, tokens: &[Token], out: &mut Normal) {
    let mut quiet = Quiet::No;
    let mut lifted_before = false;
    // What stays as it is goes over in runs; from here on it has not yet.
    let mut run = tokens.first().map_or(0, |first| first.start as usize);
    for (index, &token) in tokens.iter().enumerate() {
        if quiet.ended_by(sql, token) {
            quiet = Quiet::No;
        }
        let (start, behind) = (token.start as usize, &tokens[..index]);
        if let Some(left) = behind.last() {
            let end = left.end as usize;
            if is_comment(&sql[end..start]) {
                out.text.push_str(&sql[run..end]);
                out.text.push(' ');
                run = start;
            } else if lifted_before && end == start && glues(sql.as_bytes()[start]) {
                // `'x'and` must not become `$1and`, nor `'x'1` another parameter.
                out.text.push(' ');
            }
        }
        let number = u32::from(out.params) + 1 + out.literals.len() as u32;
        let kind = literal_kind(token.kind).filter(|_| matches!(quiet, Quiet::No) && is_value(sql, behind));
        let kind = kind.filter(|_| u16::try_from(number).is_ok());
        lifted_before = kind.is_some();
        if let Some(kind) = kind {
            out.text.push_str(&sql[run..start]);
            push_param(number, Literal { kind, start: token.start, end: token.end }, out);
            run = token.end as usize;
        }
        if matches!(quiet, Quiet::No) {
            quiet = starts_quiet(sql, behind, token);
        }
    }
    out.text.push_str(&sql[run..tokens.last().map_or(run, |last| last.end as usize)]);
}

fn push_param(number: u32, literal: Literal, out: &mut Normal) {
    if out.text.as_bytes().last().is_some_and(|&byte| glues(byte)) {
        out.text.push(' ');
    }
    out.text.push('$');
    let mut digits = [0u8; 5];
    let mut at = digits.len();
    let mut rest = number;
    while rest > 0 && at > 0 {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    digits[at..].iter().for_each(|&digit| out.text.push(char::from(digit)));
    out.literals.push(literal);
}

/// Would this byte run together with a `$n` beside it?
fn glues(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

fn literal_kind(kind: TokenKind) -> Option<LiteralKind> {
    match kind {
        TokenKind::Integer => Some(LiteralKind::Integer),
        TokenKind::Decimal => Some(LiteralKind::Decimal),
        TokenKind::String => Some(LiteralKind::String),
        _ => None,
    }
}

/// Does an expression start behind these tokens?
fn is_value(sql: &str, behind: &[Token]) -> bool {
    let Some(&previous) = behind.last() else { return false };
    match previous.kind {
        TokenKind::LeftParen | TokenKind::LeftBracket | TokenKind::Comma | TokenKind::Operator => true,
        TokenKind::Word => is_one_of(sql, previous, &BEFORE_VALUE),
        _ => false,
    }
}

fn starts_quiet(sql: &str, behind: &[Token], token: Token) -> Quiet {
    let back = |steps: usize| behind.len().checked_sub(steps).map(|index| behind[index]);
    let word = |steps: usize, word: &str| back(steps).is_some_and(|token| token.is_word(sql, word));
    match token.kind {
        TokenKind::Word if token.is_word(sql, "by") => Quiet::List(token.depth),
        TokenKind::LeftParen => {
            let modifiers = back(1).is_some_and(|token| is_one_of(sql, token, &BEFORE_MODIFIER));
            let named = back(1).is_some_and(|token| matches!(token.kind, TokenKind::Word | TokenKind::QuotedWord));
            let kind = |steps: usize, kind: TokenKind| back(steps).is_some_and(|token| token.kind == kind);
            let cast = kind(2, TokenKind::Cast) || (kind(2, TokenKind::Dot) && kind(4, TokenKind::Cast));
            let typed = named && (cast || (word(2, "as") && !word(1, "materialized")));
            let distinct_on = word(1, "on") && word(2, "distinct");
            if modifiers || typed || distinct_on { Quiet::Parens(token.depth) } else { Quiet::No }
        }
        _ => Quiet::No,
    }
}

fn push_gap(sql: &str, left: Token, right: Token, text: &mut String) {
    let gap = &sql[left.end as usize..right.start as usize];
    text.push_str(if is_comment(gap) { " " } else { gap });
}

/// Blanks alone or with a comment: a dash or slash in a gap can only be a comment's, and one byte cannot be one.
fn is_comment(gap: &str) -> bool {
    gap.len() > 1 && memchr2(b'-', b'/', gap.as_bytes()).is_some()
}

/// Is the token an unquoted word of this sorted lower-case list?
fn is_one_of(sql: &str, token: Token, words: &[&str]) -> bool {
    const WORD_BYTES_MAX: usize = 16;
    let text = token.text(sql).as_bytes();
    if token.kind != TokenKind::Word || text.len() > WORD_BYTES_MAX {
        return false;
    }
    let mut folded = [0u8; WORD_BYTES_MAX];
    folded[..text.len()].copy_from_slice(text);
    folded.make_ascii_lowercase();
    words.binary_search_by(|word| word.as_bytes().cmp(&folded[..text.len()])).is_ok()
}

/// The statements of a simple query as ranges of token indexes, without their `;`; empty ones are dropped.
///
/// A `;` inside parentheses (CREATE RULE) or inside the BEGIN ATOMIC … END body of a function separates nothing.
pub fn split_statements<'a>(sql: &'a str, tokens: &'a [Token]) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut at = 0;
    std::iter::from_fn(move || {
        while tokens.get(at).is_some_and(|token| token.kind == TokenKind::Semicolon) {
            at += 1;
        }
        let start = at;
        at += statement_length(sql, tokens.get(start..)?);
        (start < at).then_some(start..at)
    })
}

fn statement_length(sql: &str, tokens: &[Token]) -> usize {
    let creates_routine = tokens.first().is_some_and(|token| token.is_word(sql, "create"))
        && tokens.iter().take(4).any(|token| token.is_word(sql, "function") || token.is_word(sql, "procedure"));
    let mut blocks = 0u32;
    for (index, token) in tokens.iter().enumerate().filter(|(_, token)| token.depth == 0) {
        match token.kind {
            TokenKind::Semicolon if blocks == 0 => return index,
            TokenKind::Word if creates_routine => {
                let atomic = tokens.get(index + 1).is_some_and(|next| next.is_word(sql, "atomic"));
                if (token.is_word(sql, "begin") && atomic) || (blocks > 0 && token.is_word(sql, "case")) {
                    blocks += 1;
                } else if token.is_word(sql, "end") {
                    blocks = blocks.saturating_sub(1);
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sql::lex::lex;

    fn normal(sql: &str) -> (String, Vec<&str>) {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).unwrap_or_else(|error| panic!("{sql}: {error}"));
        let mut out = Normal::default();
        normalize(sql, &tokens, &mut out);
        let mut again = Vec::new();
        lex(&out.text, &mut again).unwrap_or_else(|error| panic!("{}: {error}", out.text));
        let count = tokens.iter().rposition(|token| token.kind != TokenKind::Semicolon).map_or(0, |last| last + 1);
        assert_eq!(again.len(), count, "{sql} -> {}", out.text);
        let literals = out.literals.iter().map(|literal| &sql[literal.start as usize..literal.end as usize]).collect();
        (out.text, literals)
    }

    #[test]
    fn values_are_lifted() {
        let cases: [(&str, &str, &[&str]); 12] = [
            ("select * from t where id = 42", "select * from t where id = $1", &["42"]),
            ("SELECT'x'and 1", "SELECT $1 and $2", &["'x'", "1"]),
            (
                "select $2 + 1, -1.5 limit 10 offset 5;;",
                "select $2 + $3, -$4 limit $5 offset $6",
                &["1", "1.5", "10", "5"],
            ),
            (
                "insert into t values (1,'it''s'), (2, null)",
                "insert into t values ($1,$2), ($3, null)",
                &["1", "'it''s'", "2"],
            ),
            ("update t set a='b' where c in(1,2)", "update t set a=$1 where c in($2,$3)", &["'b'", "1", "2"]),
            ("/* x */ select 1 /* y */ , /* z */ 2 -- w", "select $1 , $2", &["1", "2"]),
            (
                "select a from t where b between 1 and 2 and c like 'x%'",
                "select a from t where b between $1 and $2 and c like $3",
                &["1", "2", "'x%'"],
            ),
            ("delete from t where a = 'x'::uuid", "delete from t where a = $1::uuid", &["'x'"]),
            ("select case when a then 1 else 2 end", "select case when a then $1 else $2 end", &["1", "2"]),
            (
                "with x as materialized (select 1) select * from x",
                "with x as materialized (select $1) select * from x",
                &["1"],
            ),
            ("(select 1)", "(select $1)", &["1"]),
            ("select array[1, 2]", "select array[$1, $2]", &["1", "2"]),
        ];
        for (sql, text, literals) in cases {
            assert_eq!(normal(sql), (text.to_owned(), literals.to_vec()), "{sql}");
        }
    }

    #[test]
    fn what_is_more_than_a_value_stays() {
        for sql in [
            "select a from t order by 1, 2",
            "select a, count(*) from t group by 1, a + 2",
            "select distinct on (1) a from t",
            "select a::numeric(10, 2), b::my.type(3) from t",
            "select cast(a as varchar(10)) from t",
            "select interval '7 days', date '2020-01-01', timestamp(3) '2020-01-01'",
            "select E'a', B'1', U&'x', $$x$$",
            "select extract('year' from a) from t",
            "select a at time zone 'UTC' from t",
            "select a from t where b like c escape '!'",
            "create table t (a int default 5)",
            "set x = 5",
        ] {
            assert_eq!(normal(sql), (sql.to_owned(), vec![]), "{sql}");
        }
        assert_eq!(normal("select a from t order by 1 limit 2").0, "select a from t order by 1 limit $1");
        assert_eq!(normal("select (select a from t order by 1), 2").0, "select (select a from t order by 1), $1");
        assert_eq!(normal("select a::varchar(10), 2").0, "select a::varchar(10), $1");
    }

    #[test]
    fn a_quote_beside_another_token_leaves_room() {
        assert_eq!(normal("select a='x'and b").0, "select a=$1 and b");
        assert_eq!(normal("select a='x'\"b\"").0, "select a=$1\"b\"");
        assert_eq!(normal("select a='x'1").0, "select a=$1 1");
    }

    #[test]
    fn too_many_literals_stay_literals() {
        let sql = format!("select $65534, {}", ["7"; 5].join(","));
        assert_eq!(normal(&sql).0, "select $65534, $65535,7,7,7,7");
    }

    fn split(sql: &str) -> Vec<String> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        split_statements(sql, &tokens).map(|range| plain_text(sql, &tokens[range])).collect()
    }

    #[test]
    fn statements_split_at_the_top_only() {
        assert_eq!(split(";; select 1;/*;*/; select ';' ;"), ["select 1", "select ';'"]);
        assert_eq!(split(" -- nothing"), Vec::<String>::new());
        assert_eq!(split("create rule r as on insert to t do (select 1; select 2); select 3").len(), 2);
        let body =
            "create or replace function f() returns int begin atomic select case when a then 1 end; select 2; end";
        assert_eq!(split(&format!("{body}; select 4")), [body, "select 4"]);
        assert_eq!(split("begin; select 1; end"), ["begin", "select 1", "end"]);
        assert_eq!(split("create table begin (atomic int); select 1").len(), 2);
    }

    proptest! {
        #[test]
        fn tokens_keep_their_places(pieces in proptest::collection::vec(prop_oneof![
            Just("select"), Just(" "), Just("'x'"), Just("1"), Just("1.5"), Just("("), Just(")"), Just(","), Just("a"),
            Just("by"), Just("="), Just("-"), Just("/*c*/"), Just("$3"), Just("\"q\""), Just("$$d$$"), Just("::"), Just("\n"),
            Just("--c\n"), Just("limit"), Just("é"), Just(";"), Just("["), Just("."),
        ], 0..30)) {
            let sql = format!("select {}", pieces.concat());
            let mut tokens = Vec::new();
            if lex(&sql, &mut tokens).is_ok() {
                let _ = normal(&sql);
            }
        }
    }
}
