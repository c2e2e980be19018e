//! Statements that need a database to themselves: to drop, rename, move or copy one, Postgres wants nobody connected to it
//! (CountOtherDBBackends in src/backend/commands/dbcommands.c).

use std::borrow::Cow;

use super::cursor::Cursor;
use super::lex::{TokenKind, lex};
use super::word;

/// The databases that this one statement wants nobody to be connected to. Empty for any other statement.
pub fn to_be_left(sql: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    if lex(sql, &mut tokens).is_err() {
        return Vec::new();
    }
    let mut cursor = Cursor::new(sql, &tokens);
    let verb = cursor.word().unwrap_or_default();
    if !cursor.eat("database") {
        return Vec::new();
    }
    if verb == "drop" {
        cursor.eat_all("if exists");
    }
    let Some(name) = cursor.name() else { return Vec::new() };
    match verb.as_str() {
        "drop" => vec![name],
        "alter" if cursor.eat_all("rename to") || cursor.eat_all("set tablespace") => vec![name],
        "create" => vec![template(cursor).unwrap_or_else(|| "template1".to_owned())],
        _ => Vec::new(),
    }
}

/// `… TEMPLATE [=] name`, the name as an identifier or as a string.
fn template(mut cursor: Cursor<'_>) -> Option<String> {
    while !cursor.is_done() && !cursor.eat("template") {
        cursor.at += 1;
    }
    if cursor.peek().is_some_and(|token| token.text(cursor.sql) == "=") {
        cursor.at += 1;
    }
    let token = cursor.peek()?;
    if token.kind == TokenKind::String {
        return word::string_value(cursor.sql, token).map(Cow::into_owned);
    }
    // DEFAULT is a word of the grammar here, unless it is quoted.
    if cursor.sees("default") { None } else { cursor.name() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_are_found_in_what_needs_them_alone() {
        for (sql, expected) in [
            ("DROP DATABASE shop", &["shop"][..]),
            ("drop database if exists \"Shop\" with (force);", &["Shop"]),
            ("/* why */ ALTER DATABASE Shop RENAME TO store", &["shop"]),
            ("ALTER DATABASE shop SET TABLESPACE fast", &["shop"]),
            ("ALTER DATABASE shop SET work_mem = '1MB'", &[]),
            ("CREATE DATABASE copy TEMPLATE shop", &["shop"]),
            ("CREATE DATABASE copy WITH OWNER = me TEMPLATE = 'Shop' ENCODING 'UTF8'", &["Shop"]),
            ("CREATE DATABASE fresh", &["template1"]),
            ("CREATE DATABASE fresh TEMPLATE DEFAULT", &["template1"]),
            ("DROP TABLE database", &[]),
            ("SELECT 'DROP DATABASE x'", &[]),
            ("DROP DATABASE", &[]),
        ] {
            assert_eq!(to_be_left(sql), expected, "{sql}");
        }
    }
}
