//! The values behind tokens: names as Postgres folds them, strings without their quotes, and the way back.
//!
//! Sources: downcase_truncate_identifier in src/backend/parser/scansup.c, the xq/xe/xus rules of scan.l, quote_literal in
//! src/backend/utils/adt/quote.c. Non-goal: a custom `UESCAPE` character; the caller sees the clause as tokens of its own.

use std::borrow::Cow;

use super::lex::{Token, TokenKind, continuation};

/// An identifier is cut to this many bytes (NAMEDATALEN - 1), at a character boundary.
const NAME_BYTES_MAX: usize = 63;

/// The identifier a word token names: folded to lower case unless quoted. `None` for other tokens and bad `U&` escapes.
pub fn name(sql: &str, token: Token) -> Option<String> {
    let text = token.text(sql);
    let mut name = match token.kind {
        TokenKind::Word => text.to_ascii_lowercase(),
        TokenKind::QuotedWord => match text.strip_prefix('"') {
            Some(quoted) => quoted.strip_suffix('"')?.replace("\"\"", "\""),
            None => unicode_escapes(&text.get(3..text.len() - 1)?.replace("\"\"", "\""))?,
        },
        _ => return None,
    };
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    Some(name)
}

/// The value of a string token. `None` for other tokens and for escapes Postgres refuses.
pub fn string_value(sql: &str, token: Token) -> Option<Cow<'_, str>> {
    let text = token.text(sql);
    match token.kind {
        TokenKind::String => Some(plain_body(text)),
        TokenKind::EscapeString => escape_body(text.strip_prefix(['e', 'E']).unwrap_or(text)).map(Cow::Owned),
        TokenKind::UnicodeString => unicode_escapes(&plain_body(&text[2..])).map(Cow::Owned),
        TokenKind::DollarString => {
            let tag = text[1..].find('$')? + 2;
            Some(Cow::Borrowed(&text[tag..text.len() - tag]))
        }
        _ => None,
    }
}

/// `value` as a string literal that means the same whatever `standard_conforming_strings` is.
pub fn quote_literal(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 3);
    quoted.push_str(if value.contains('\\') { "E'" } else { "'" });
    for char in value.chars() {
        if matches!(char, '\'' | '\\') {
            quoted.push(char);
        }
        quoted.push(char);
    }
    quoted.push('\'');
    quoted
}

/// `name` in double quotes.
pub fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The body of a quoted string and its continuations with `''` undone; backslashes stay as they are.
fn plain_body(text: &str) -> Cow<'_, str> {
    let inner = &text[1..text.len() - 1];
    if !inner.contains('\'') {
        return Cow::Borrowed(inner);
    }
    let mut body = String::with_capacity(inner.len());
    let mut at = 1;
    while let Some(length) = text[at..].find('\'') {
        body.push_str(&text[at..at + length]);
        at += length + 1;
        if text[at..].starts_with('\'') {
            body.push('\'');
            at += 1;
        } else {
            match continuation(text.as_bytes(), at) {
                Some(open) => at = open + 1,
                None => break,
            }
        }
    }
    Cow::Owned(body)
}

/// The value of an escape string whose first quote is the first byte of `text` (rules xqescape, xqoctesc, xqhexesc and
/// xeunicode). Octal and hexadecimal escapes name bytes, so the result is checked to be UTF-8 without NUL.
fn escape_body(text: &str) -> Option<String> {
    let text = text.as_bytes();
    let mut body = Vec::with_capacity(text.len());
    let mut at = 1;
    loop {
        match *text.get(at)? {
            b'\'' if text.get(at + 1) == Some(&b'\'') => {
                body.push(b'\'');
                at += 2;
            }
            b'\'' => match continuation(text, at + 1) {
                Some(open) => at = open + 1,
                None => break,
            },
            b'\\' => at += 1 + escape(&text[at + 1..], &mut body)?,
            byte => {
                body.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(body).ok().filter(|body| !body.contains('\0'))
}

/// Decodes what stands behind a backslash into `body`; the number of bytes it takes.
fn escape(text: &[u8], body: &mut Vec<u8>) -> Option<usize> {
    let digits = |from: usize, max: usize, radix: u32| {
        let tail = &text[from.min(text.len())..];
        tail.iter().take(max).take_while(|&&byte| (byte as char).is_digit(radix)).count()
    };
    let number = |from: usize, length: usize, radix: u32| {
        text[from..from + length]
            .iter()
            .fold(0u32, |sum, &byte| sum * radix + (byte as char).to_digit(radix).unwrap_or(0))
    };
    match *text.first()? {
        b'b' => body.push(8),
        b'f' => body.push(12),
        b'n' => body.push(b'\n'),
        b'r' => body.push(b'\r'),
        b't' => body.push(b'\t'),
        b'v' => body.push(11),
        b'0'..=b'7' => {
            let length = digits(0, 3, 8);
            body.push(number(0, length, 8) as u8);
            return Some(length);
        }
        b'x' if digits(1, 2, 16) > 0 => {
            let length = digits(1, 2, 16);
            body.push(number(1, length, 16) as u8);
            return Some(1 + length);
        }
        unicode @ (b'u' | b'U') => {
            let length = if unicode == b'u' { 4 } else { 8 };
            if digits(1, length, 16) < length {
                return None;
            }
            let first = number(1, length, 16);
            // A surrogate pair may be written as two escapes.
            let pair = (0xd800..0xdc00).contains(&first) && text.get(1 + length) == Some(&b'\\');
            let (code, used) =
                if pair && text.get(2 + length) == Some(&unicode) && digits(3 + length, length, 16) == length {
                    let second = number(3 + length, length, 16).checked_sub(0xdc00).filter(|low| *low < 0x400)?;
                    (0x10000 + ((first - 0xd800) << 10) + second, 2 * length + 3)
                } else {
                    (first, length + 1)
                };
            body.extend_from_slice(char::from_u32(code)?.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(used);
        }
        byte => body.push(byte),
    }
    Some(1)
}

/// `\XXXX`, `\+XXXXXX` and `\\` of a `U&` string or identifier (str_udeescape in src/backend/parser/parser.c).
fn unicode_escapes(text: &str) -> Option<String> {
    let mut value = String::with_capacity(text.len());
    let mut rest = text;
    let mut high: Option<u32> = None;
    while let Some(char) = rest.chars().next() {
        if char != '\\' {
            value.push(char);
            rest = &rest[char.len_utf8()..];
        } else if let Some(after) = rest.strip_prefix("\\\\") {
            value.push('\\');
            rest = after;
        } else {
            let (from, length) = if rest.starts_with("\\+") { (2, 6) } else { (1, 4) };
            let digits =
                rest.get(from..from + length).filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
            let code = u32::from_str_radix(digits, 16).ok()?;
            rest = &rest[from + length..];
            match (high.take(), code) {
                (None, 0xd800..0xdc00) => {
                    high = Some(code);
                    continue;
                }
                (None, _) => value.push(char::from_u32(code).filter(|char| *char != '\0')?),
                (Some(first), 0xdc00..0xe000) => {
                    value.push(char::from_u32(0x10000 + ((first - 0xd800) << 10) + (code - 0xdc00))?);
                }
                (Some(_), _) => return None,
            }
            continue;
        }
        if high.is_some() {
            return None;
        }
    }
    high.is_none().then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sql::lex::{Strings, lex, lex_with};

    fn value(sql: &str) -> Option<String> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        assert_eq!(tokens.len(), 1, "{sql}");
        string_value(sql, tokens[0]).map(Cow::into_owned).or_else(|| name(sql, tokens[0]))
    }

    #[test]
    fn names_fold_unless_quoted() {
        assert_eq!(value("FooÄ").as_deref(), Some("fooÄ"));
        assert_eq!(value(r#""Fo""o""#).as_deref(), Some("Fo\"o"));
        assert_eq!(value(r#"U&"d\0061t\+000061""#).as_deref(), Some("data"));
        assert_eq!(value(r#"U&"\00""#), None);
        assert_eq!(value(&"é".repeat(40)).as_deref(), Some("é".repeat(31).as_str()));
    }

    #[test]
    fn strings_lose_their_quotes() {
        let cases = [
            ("'a''b\\'", Some("a'b\\")),
            ("'a' -- it's\n 'b'''", Some("ab'")),
            (r"E'a\'b''\\\n\x41\101\u00e9'", Some("a'b'\\\nAAé")),
            (r"E'\uD83D\uDE00'", Some("😀")),
            (r"E'\uD83D'", None),
            (r"E'\xff'", None),
            (r"E'\000'", None),
            (r"U&'\0041\\\D83D\DE00'", Some("A\\😀")),
            (r"U&'\D83Dx'", None),
            ("$$a'$x$$", Some("a'$x")),
            ("$t$a$$b$t$", Some("a$$b")),
        ];
        for (sql, expected) in cases {
            assert_eq!(value(sql).as_deref(), expected, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn a_quoted_literal_reads_back_in_both_modes(text in "[^\\x00]*", escaping in any::<bool>()) {
            let sql = quote_literal(&text);
            let mut tokens = Vec::new();
            lex_with(&sql, if escaping { Strings::Escaping } else { Strings::Standard }, &mut tokens).expect("lexes");
            prop_assert_eq!(tokens.len(), 1);
            let value = string_value(&sql, tokens[0]);
            prop_assert_eq!(value.as_deref(), Some(text.as_str()));
        }

        #[test]
        fn any_string_token_decodes_or_is_refused(body in "[a-z'\\\\u0-9x\n -]{0,20}", prefix in "(|E|U&)") {
            let sql = format!("{prefix}'{body}'");
            let mut tokens = Vec::new();
            let _ = lex(&sql, &mut tokens);
            for token in tokens {
                let _ = (string_value(&sql, token), name(&sql, token));
            }
        }
    }
}
