//! `FLUSH`: which cached answers are to count no more.
//!
//! Names of tables are written as in SQL: unquoted ones in lower case. The name of a database keeps its case, as with the
//! console's other commands. Non-goal: looking names up.

use super::command::{maybe_name, quoted, usage};
use crate::error::UserError;

/// What is made void.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Flush {
    /// All of one database, or of all.
    Database(Option<String>),
    /// What was read of a table, in all databases that have it.
    Table(Named),
    /// What was read of the rows with this shard key, which is as it was written.
    Key(Named, String),
}

/// A table. Without a schema: the first on the search path that has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Named {
    pub schema: Option<String>,
    pub table: String,
}

/// What follows FLUSH.
pub(super) fn flush(rest: &str) -> Result<Flush, UserError> {
    let (word, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    match word.to_ascii_uppercase().as_str() {
        "TABLE" => match named(after.trim_start()) {
            Some((table, "")) => Ok(Flush::Table(table)),
            _ => Err(usage("FLUSH TABLE needs one table", "FLUSH TABLE users; FLUSH TABLE public.users.")),
        },
        "KEY" => {
            let parsed = named(after.trim_start()).and_then(|(table, after)| Some((table, value(after)?)));
            let example = "FLUSH KEY users 42; FLUSH KEY public.users '42'.";
            let (table, value) = parsed.ok_or_else(|| usage("FLUSH KEY needs a table and a value", example))?;
            Ok(Flush::Key(table, value))
        }
        _ => maybe_name(rest).map(Flush::Database),
    }
}

/// `table` or `schema.table`, and what follows without the blanks between.
fn named(text: &str) -> Option<(Named, &str)> {
    let (first, rest) = identifier(text)?;
    let Some(second) = rest.strip_prefix('.') else {
        return Some((Named { schema: None, table: first }, rest.trim_start()));
    };
    let (table, rest) = identifier(second)?;
    Some((Named { schema: Some(first), table }, rest.trim_start()))
}

fn identifier(text: &str) -> Option<(String, &str)> {
    if text.starts_with('"') {
        return quoted(text, '"').filter(|(name, _)| !name.is_empty());
    }
    let part_of_name = |char: char| char.is_alphanumeric() || matches!(char, '_' | '$');
    let end = text.find(|char| !part_of_name(char)).unwrap_or(text.len());
    (end > 0).then(|| (text[..end].to_ascii_lowercase(), &text[end..]))
}

/// One word, or text in quotes.
fn value(text: &str) -> Option<String> {
    if text.starts_with('\'') {
        return quoted(text, '\'').filter(|(_, after)| after.is_empty()).map(|(value, _)| value);
    }
    let plain = !text.is_empty() && !text.contains(|char: char| char.is_whitespace() || char == '\'');
    plain.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(schema: Option<&str>, table: &str) -> Named {
        Named { schema: schema.map(Into::into), table: table.into() }
    }

    #[test]
    fn a_database_a_table_or_a_key_is_flushed() {
        let database = |name: Option<&str>| Flush::Database(name.map(Into::into));
        for (text, expected) in [
            ("", database(None)),
            ("Shop", database(Some("Shop"))),
            ("\"table\"", database(Some("table"))),
            ("TABLE Users", Flush::Table(table(None, "users"))),
            ("table  public.\"Users\"", Flush::Table(table(Some("public"), "Users"))),
            ("KEY users 42", Flush::Key(table(None, "users"), "42".into())),
            ("key s.emails 'o''neil@example.com'", Flush::Key(table(Some("s"), "emails"), "o'neil@example.com".into())),
            ("KEY users ''", Flush::Key(table(None, "users"), String::new())),
        ] {
            assert_eq!(flush(text), Ok(expected), "{text}");
        }
        for wrong in [
            "TABLE",
            "TABLE a.b.c",
            "TABLE users 1",
            "TABLE .users",
            "TABLE \"\"",
            "TABLE \"a",
            "KEY",
            "KEY users",
            "KEY users 1 2",
            "KEY users 'a' b",
            "KEY users 'a",
            "one two",
        ] {
            let error = flush(wrong).expect_err(wrong);
            assert!(error.hint.is_some(), "{wrong}");
        }
    }
}
