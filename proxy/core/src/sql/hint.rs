//! What a comment in front of a statement or behind it says to weir: `/* weir: freshness=any */`.
//!
//! Postgres ignores it, the text that statements are recognised by does not contain it, and so the same program runs with
//! or without weir. Also understood, for tools that write comments in sqlcommenter's form: `/*weir_freshness='any'*/` among
//! other keys, URL-encoded.
//!
//! Invariant: only comments count that our lexer takes for comments outside the statement; text inside a string is never a
//! hint. Non-goals: what the values mean, and comments amid a statement.

use smallvec::SmallVec;

use super::lex::{Token, TokenKind};

/// One `key=value`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hint {
    pub key: String,
    pub value: String,
}

/// The hints around the statement that `tokens` are of. Nearly always none, found out by the bytes around the tokens alone.
pub fn hints(sql: &str, tokens: &[Token]) -> SmallVec<[Hint; 1]> {
    let mut found = SmallVec::new();
    let last = tokens.iter().rfind(|token| token.kind != TokenKind::Semicolon);
    let (Some(first), Some(last)) = (tokens.first(), last) else { return found };
    for around in [sql.get(..first.start as usize), sql.get(last.end as usize..)].into_iter().flatten() {
        if around.len() > 4 {
            comments(around, &mut |comment| read(comment, &mut found));
        }
    }
    found
}

/// Calls `each` with the inside of every comment of a text that has nothing else but blanks and semicolons.
fn comments(text: &str, each: &mut impl FnMut(&str)) {
    let mut rest = text;
    while let Some(at) = rest.find(['/', '-']) {
        rest = &rest[at..];
        let (inside, after) = if let Some(line) = rest.strip_prefix("--") {
            line.split_once('\n').unwrap_or((line, ""))
        } else if let Some(block) = rest.strip_prefix("/*") {
            let end = block_end(block);
            (&block[..end], block.get(end + 2..).unwrap_or(""))
        } else {
            return;
        };
        each(inside);
        rest = after;
    }
}

/// Where a block comment's `*/` is, counted from behind its `/*`; they nest.
fn block_end(block: &str) -> usize {
    let bytes = block.as_bytes();
    let (mut at, mut depth) = (0, 1);
    while at + 1 < bytes.len() {
        match &bytes[at..at + 2] {
            b"*/" if depth == 1 => return at,
            b"*/" => (depth, at) = (depth - 1, at + 2),
            b"/*" => (depth, at) = (depth + 1, at + 2),
            _ => at += 1,
        }
    }
    block.len()
}

fn read(comment: &str, found: &mut SmallVec<[Hint; 1]>) {
    const OWN: &str = "weir:";
    const KEY: &str = "weir_";
    let comment = comment.trim();
    if let Some(own) = comment.strip_prefix(OWN) {
        found.extend(own.split([',', ';']).filter(|part| !part.trim().is_empty()).map(|part| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            Hint { key: key.trim().to_owned(), value: value.trim().to_owned() }
        }));
        return;
    }
    for part in comment.split(',') {
        let Some((key, value)) = part.trim().strip_prefix(KEY).and_then(|part| part.split_once('=')) else { continue };
        let quoted = value.trim().strip_prefix('\'').and_then(|value| value.strip_suffix('\''));
        let Some(value) = quoted else { continue };
        found.push(Hint { key: key.trim().to_owned(), value: url_decoded(value) });
    }
}

fn url_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let code = after.get(..2).and_then(|code| std::str::from_utf8(code).ok());
        match code.filter(|_| *first == b'%').and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::lex::lex;

    fn of(sql: &str) -> Vec<(String, String)> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        hints(sql, &tokens).into_iter().map(|hint| (hint.key, hint.value)).collect()
    }

    fn freshness(value: &str) -> Vec<(String, String)> {
        vec![("freshness".into(), value.into())]
    }

    #[test]
    fn comments_around_a_statement_are_read() {
        assert_eq!(of("/* weir: freshness=lag<=500ms */ SELECT 1"), freshness("lag<=500ms"));
        assert_eq!(of("SELECT 1 /*weir:freshness = any*/ ;"), freshness("any"));
        assert_eq!(of("SELECT 1; -- weir: freshness=any"), freshness("any"));
        assert_eq!(of("-- by hand\n-- weir: freshness=any\n/* x */ SELECT 1"), freshness("any"));
        assert_eq!(of("/* a /* nested */ one */ /* weir: freshness=any */ SELECT 1"), freshness("any"));
        assert_eq!(of("SELECT 1 /*action='x',weir_freshness='lag%3C%3D2s',trace='00-1'*/"), freshness("lag<=2s"));
        assert_eq!(
            of("/* weir: freshness=any, colour=blue; alone */ SELECT 1"),
            [("freshness", "any"), ("colour", "blue"), ("alone", "")].map(|(key, value)| (key.into(), value.into()))
        );
    }

    #[test]
    fn other_text_is_no_hint() {
        for sql in [
            "SELECT '/* weir: freshness=any */'",
            "SELECT /* weir: freshness=any */ 1",
            "SELECT $$ /* weir: freshness=any */ $$",
            "SELECT 1 /* freshness=any */",
            "SELECT 1 /* weirfreshness='any', xweir_freshness='any' */",
            "SELECT 1 /* weir_freshness=any */",
            "SELECT 1 -- see weir: freshness=any",
            "SELECT 1 - -1",
            "",
        ] {
            assert_eq!(of(sql), [], "{sql}");
        }
        assert_eq!(url_decoded("a%2"), "a%2");
        assert_eq!(url_decoded("%zz%41"), "%zzA");
    }
}
