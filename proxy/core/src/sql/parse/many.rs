//! INSERT … VALUES with many rows: parsed by its first row alone, where the others are as plain as that.
//!
//! A thousand rows are a text far longer than what the parser is given, and all it could say of them is which constant stands
//! where. Invariant: a statement is shortened only if every row has the same number of values, DEFAULT at the same places, and
//! nothing but constants otherwise, so that the short one touches what the long one touches. Non-goal: rows with
//! calls, operators or sub-queries: those are parsed whole, or not at all.

use std::ops::Range;

use super::terms::Constant;
use crate::sql::facts::{Literal, Term};
use crate::sql::lex::{Token, TokenKind};
use crate::sql::rows::Rows;
use crate::sql::word;
use crate::topology::KeyType;

/// The statement with its first row alone, if that says all but the constants of the others.
pub fn shortened(text: &str, tokens: &[Token], rows: &Rows) -> Option<String> {
    if rows.rows.len() < 2 {
        return None;
    }
    let first = rows.values_of(0, tokens);
    let defaults: Vec<bool> = first.iter().map(|value| is_default(text, &tokens[value.clone()])).collect();
    for row in 0..rows.rows.len() {
        let values = rows.values_of(row, tokens);
        let alike = values.len() == defaults.len()
            && values.iter().zip(&defaults).all(|(value, default)| {
                let value = &tokens[value.clone()];
                if *default { is_default(text, value) } else { is_plain(text, value) }
            });
        if !alike {
            return None;
        }
    }
    Some(rows.keep(text, tokens, |row| row == 0, ""))
}

fn is_default(text: &str, value: &[Token]) -> bool {
    matches!(value, [word] if word.is_word(text, "default"))
}

/// A constant without DEFAULT, maybe with a sign and a cast to a type by its one name.
fn is_plain(text: &str, value: &[Token]) -> bool {
    let Some((constant, cast)) = parts(value) else { return false };
    let fits = match constant.kind {
        TokenKind::Integer | TokenKind::Decimal => constant.text(text).bytes().all(is_number_byte),
        TokenKind::Param(_)
        | TokenKind::String
        | TokenKind::EscapeString
        | TokenKind::DollarString
        | TokenKind::BitString => true,
        TokenKind::Word => ["null", "true", "false"].iter().any(|word| constant.is_word(text, word)),
        _ => false,
    };
    // What stands behind a reg… type is looked up by its name.
    fits && cast.is_none_or(|cast| !cast.text(text).to_ascii_lowercase().starts_with("reg"))
}

/// Digits, a point, an exponent; other bases and separators are left to the parser's guard.
fn is_number_byte(byte: u8) -> bool {
    byte.is_ascii_digit() || matches!(byte, b'.' | b'e' | b'E' | b'+' | b'-')
}

/// The constant, and the type it is cast to.
fn parts(value: &[Token]) -> Option<(Token, Option<Token>)> {
    match value {
        [constant] => Some((*constant, None)),
        [constant, cast, name] if cast.kind == TokenKind::Cast && name.kind == TokenKind::Word => {
            Some((*constant, Some(*name)))
        }
        [sign, number] if sign.kind == TokenKind::Operator && is_number(*number) => Some((*number, None)),
        _ => None,
    }
}

fn is_number(token: Token) -> bool {
    matches!(token.kind, TokenKind::Integer | TokenKind::Decimal | TokenKind::Param(_))
}

/// A plain value as a key; `None` if it is none that weir can know.
pub fn constant(text: &str, tokens: &[Token], value: Range<usize>) -> Option<Constant> {
    let value = &tokens[value];
    let (token, cast) = parts(value)?;
    let negated = match value {
        [sign, _] => match sign.text(text) {
            "-" => true,
            _ => return None,
        },
        _ => false,
    };
    let term = match token.kind {
        TokenKind::Param(number) => Term::Param { number, negated },
        TokenKind::Integer | TokenKind::Decimal => {
            let sign = if negated { "-" } else { "" };
            Term::Literal(Literal::Number(format!("{sign}{}", token.text(text)).into()))
        }
        TokenKind::String => Term::Literal(Literal::String(word::string_value(text, token)?.into())),
        TokenKind::Word if token.is_word(text, "null") => Term::Null,
        _ => return None,
    };
    let cast = match cast {
        Some(name) => Some(cast_family(&name.text(text).to_ascii_lowercase())?),
        None => None,
    };
    Some(Constant { term, cast })
}

fn cast_family(name: &str) -> Option<KeyType> {
    match name {
        "bigint" | "int8" | "integer" | "int" | "int4" | "smallint" | "int2" => Some(KeyType::Int),
        "text" | "varchar" => Some(KeyType::Text),
        "uuid" => Some(KeyType::Uuid),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::lex::lex;

    fn short(sql: &str) -> Option<String> {
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("lexes");
        shortened(sql, &tokens, &Rows::find(sql, &tokens)?)
    }

    #[test]
    fn rows_of_constants_are_told_by_the_first() {
        assert_eq!(
            short("INSERT INTO t (a, b) VALUES (1, $1::uuid) , (-2, 'x'), (NULL, true) ON CONFLICT DO NOTHING;")
                .as_deref(),
            Some("INSERT INTO t (a, b) VALUES (1, $1::uuid) ON CONFLICT DO NOTHING")
        );
        assert_eq!(
            short("insert into t values (1, default), (2, DEFAULT)").as_deref(),
            Some("insert into t values (1, default)")
        );
    }

    #[test]
    fn rows_of_anything_else_are_not() {
        for sql in [
            "insert into t values (1)",
            "insert into t values (1), (2, 3)",
            "insert into t values (1, default), (2, 3)",
            "insert into t values (1, 3), (2, default)",
            "insert into t values (1), (now())",
            "insert into t values (1), (1 + 1)",
            "insert into t values (1), ((select 1))",
            "insert into t values (1), (0x1f)",
            "insert into t values (1), ('users'::regclass)",
            "insert into t values (1), (a)",
            "insert into t select 1",
            "with x as (select 1) insert into t values (1), (2)",
            "insert into t values (1), (2) limit 1",
        ] {
            assert_eq!(short(sql), None, "{sql}");
        }
    }
}
