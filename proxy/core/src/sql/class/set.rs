//! SET and RESET in every spelling of gram.y (set_rest, set_rest_more, reset_rest).
//!
//! Invariant: a name comes out in the one form the server stores it under, so that two spellings of one setting meet.

use super::{Class, Scope, SetValue, Target, modes};
use crate::sql::cursor::Cursor;
use crate::sql::lex::{Token, TokenKind};
use crate::sql::word;

/// Behind SET. The statement is read to its end or not at all.
pub(super) fn set(cursor: &mut Cursor<'_>) -> Option<Class> {
    if cursor.eat("constraints") {
        cursor.at = cursor.tokens.len();
        return Some(Class::SetConstraints);
    }
    if cursor.eat_all("session characteristics as transaction") {
        return modes(cursor).map(Class::SetCharacteristics);
    }
    let named_session = cursor.sees_at(1, "authorization") || assigns(cursor, 1);
    let scope = if cursor.sees("local") && !assigns(cursor, 1) {
        cursor.at += 1;
        Scope::Local
    } else {
        cursor.at += usize::from(cursor.sees("session") && !named_session);
        Scope::Session
    };
    if cursor.sees("transaction") && !assigns(cursor, 1) {
        cursor.at += 1;
        if cursor.eat("snapshot") {
            cursor.at = cursor.tokens.len();
            return Some(Class::SetTransaction(super::Modes::default()));
        }
        return modes(cursor).map(Class::SetTransaction);
    }
    let name = name(cursor)?;
    let value = if cursor.is_done() {
        // SET NAMES alone means its default; nothing else may end here.
        (name == "client_encoding").then_some(SetValue::Default)?
    } else if cursor.eat("default") || (name == "timezone" && cursor.eat("local")) {
        SetValue::Default
    } else {
        SetValue::Text(value(cursor)?)
    };
    Some(match (value, scope) {
        (SetValue::Default, Scope::Session) => Class::Reset(Target::Name(name)),
        (value, scope) => Class::Set { name, value, scope },
    })
}

/// Behind RESET.
pub(super) fn reset(cursor: &mut Cursor<'_>) -> Option<Target> {
    if cursor.tokens.len() == cursor.at + 1 && cursor.eat("all") {
        return Some(Target::All);
    }
    let name = if cursor.eat_all("time zone") {
        "timezone".to_owned()
    } else if cursor.eat_all("session authorization") {
        "session_authorization".to_owned()
    } else if cursor.eat_all("transaction isolation level") {
        "transaction_isolation".to_owned()
    } else {
        dotted(cursor)?
    };
    Some(Target::Name(name))
}

/// Is the token `ahead` from here `=` or TO, so that what is in front of it is a setting's name?
fn assigns(cursor: &Cursor<'_>, ahead: usize) -> bool {
    let equals = cursor.tokens.get(cursor.at + ahead).is_some_and(|token| token.text(cursor.sql) == "=");
    equals || cursor.sees_at(ahead, "to")
}

/// The setting, and its TO or `=` where it has one.
fn name(cursor: &mut Cursor<'_>) -> Option<String> {
    const PHRASES: [(&str, &str); 6] = [
        ("time zone", "timezone"),
        ("session authorization", "session_authorization"),
        ("xml option", "xmloption"),
        ("names", "client_encoding"),
        ("schema", "search_path"),
        ("role", "role"),
    ];
    for (phrase, name) in PHRASES {
        let words = phrase.split(' ').count();
        if !assigns(cursor, words) && cursor.eat_all(phrase) {
            return Some(name.to_owned());
        }
    }
    let name = dotted(cursor)?;
    let assigned = assigns(cursor, 0);
    cursor.at += 1;
    // FROM CURRENT has a meaning in CREATE FUNCTION only.
    (assigned && !cursor.is_done()).then_some(name)
}

fn dotted(cursor: &mut Cursor<'_>) -> Option<String> {
    let mut name = cursor.name()?;
    while cursor.eat_kind(TokenKind::Dot) {
        name.push('.');
        name.push_str(&cursor.name()?);
    }
    Some(canonical(&name))
}

/// The one name under which the server keeps a setting: lower case, old names replaced (map_old_guc_names in
/// src/backend/utils/misc/guc.c).
pub fn canonical(name: &str) -> String {
    match name.to_ascii_lowercase().as_str() {
        "sort_mem" => "work_mem".to_owned(),
        "vacuum_mem" => "maintenance_work_mem".to_owned(),
        name => name.to_owned(),
    }
}

/// The value up to the end: words, numbers with their sign, strings, commas, and INTERVAL's fields and precision.
fn value(cursor: &mut Cursor<'_>) -> Option<String> {
    let mut text = String::new();
    let rest = &cursor.tokens[cursor.at..];
    for (index, &token) in rest.iter().enumerate() {
        let space = index > 0 && separated(rest[index - 1], token);
        text.push_str(if space { " " } else { "" });
        match token.kind {
            TokenKind::String | TokenKind::EscapeString | TokenKind::UnicodeString | TokenKind::DollarString => {
                text.push_str(&word::quote_literal(&word::string_value(cursor.sql, token)?));
            }
            TokenKind::Word => text.push_str(&token.text(cursor.sql).to_ascii_lowercase()),
            TokenKind::QuotedWord | TokenKind::Integer | TokenKind::Decimal | TokenKind::Comma => {
                text.push_str(token.text(cursor.sql));
            }
            TokenKind::LeftParen | TokenKind::RightParen => text.push_str(token.text(cursor.sql)),
            TokenKind::Operator if matches!(token.text(cursor.sql), "+" | "-") => text.push_str(token.text(cursor.sql)),
            _ => return None,
        }
    }
    cursor.at = cursor.tokens.len();
    Some(text)
}

fn separated(left: Token, right: Token) -> bool {
    let tight = matches!(right.kind, TokenKind::Comma | TokenKind::LeftParen | TokenKind::RightParen);
    !tight && !matches!(left.kind, TokenKind::Operator | TokenKind::LeftParen)
}
