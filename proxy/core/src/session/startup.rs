//! The settings a client brings in its StartupMessage, as values that SET understands.
//!
//! Source: process_startup_options in src/backend/utils/init/postinit.c and process_postgres_switches in
//! src/backend/tcop/postgres.c. Invariant: a switch weir cannot carry to every server connection is refused, never dropped.
//!
//! Non-goal: whether a setting exists; the first server connection says so.

use crate::error::{Blame, UserError, sqlstate};
use crate::sql::class::canonical;
use crate::sql::word::{quote_literal, quote_name};

use super::vars::VarSet;

/// Settings whose text is a list of identifiers (GUC_LIST_QUOTE in src/include/utils/guc.h): as one literal it would be one name.
const NAME_LISTS: [&str; 4] =
    ["local_preload_libraries", "search_path", "session_preload_libraries", "temp_tablespaces"];

/// The settings of a StartupMessage: `options` first, then the parameters by name, as the server applies them.
/// `user`, `database`, `replication` and protocol options (`_pq_.…`) are none.
pub fn startup_vars<'a>(parameters: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Result<VarSet, UserError> {
    let mut settings = Vec::new();
    for (_, options) in parameters.clone().filter(|(name, _)| *name == "options") {
        settings.extend(parse_options(options)?);
    }
    let named = parameters.filter(|(name, _)| {
        !matches!(*name, "user" | "database" | "replication" | "options") && !name.starts_with("_pq_.")
    });
    settings.extend(named.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let mut vars = VarSet::default();
    for (name, value) in settings {
        let name = canonical(&name);
        // Postgres takes it and lets the login overrule it.
        if name == super::vars::SESSION_AUTHORIZATION {
            continue;
        }
        let text = sql_value(&name, &value)?;
        if !vars.set(&name, &text) {
            return Err(
                refused("too many settings in the startup packet").hint("Move some of them into ALTER ROLE … SET.")
            );
        }
    }
    Ok(vars)
}

/// Parses `options`: `-c name=value`, `-cname=value`, `--name=value`; a backslash keeps the character behind it.
pub fn parse_options(options: &str) -> Result<Vec<(String, String)>, UserError> {
    let mut settings = Vec::new();
    let mut words = split_options(options).into_iter();
    while let Some(word) = words.next() {
        let setting = if word == "-c" {
            words.next().ok_or_else(|| refused("option -c of the startup packet needs name=value"))?
        } else if let Some(long) = word.strip_prefix("--") {
            long.to_owned()
        } else if let Some(short) = word.strip_prefix("-c") {
            short.to_owned()
        } else {
            return Err(refused(format!("option \"{word}\" of the startup packet is not supported"))
                .hint("Write settings as -c name=value or --name=value."));
        };
        let (name, value) = setting
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| refused(format!("option \"{setting}\" of the startup packet needs a value")))?;
        settings.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(settings)
}

fn refused(message: impl Into<std::borrow::Cow<'static, str>>) -> UserError {
    UserError::new(Blame::Client, sqlstate::SYNTAX_ERROR, message).fatal()
}

/// pg_split_opts in src/backend/utils/init/postinit.c.
fn split_options(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = options.chars();
    while let Some(char) = chars.next() {
        match char {
            ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c' => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            char => word.get_or_insert_default().push(char),
        }
    }
    words.extend(word);
    words
}

/// A raw setting as SQL text behind `SET name TO`.
fn sql_value(name: &str, value: &str) -> Result<String, UserError> {
    if !NAME_LISTS.contains(&name) || value.trim().is_empty() {
        return Ok(quote_literal(value));
    }
    let names = split_names(value)
        .ok_or_else(|| refused(format!("invalid list of names for \"{name}\" in the startup packet")))?;
    Ok(names.iter().map(|name| quote_name(name)).collect::<Vec<_>>().join(", "))
}

/// SplitIdentifierString in src/backend/utils/adt/varlena.c; `None` if malformed.
fn split_names(list: &str) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut rest = list.trim_start();
    loop {
        let name = if let Some(quoted) = rest.strip_prefix('"') {
            let mut name = String::new();
            rest = quoted;
            loop {
                let (part, after) = rest.split_once('"')?;
                name.push_str(part);
                rest = after;
                let Some(doubled) = rest.strip_prefix('"') else { break };
                name.push('"');
                rest = doubled;
            }
            name
        } else {
            let end = rest.find(|char: char| char == ',' || char.is_ascii_whitespace()).unwrap_or(rest.len());
            let name = rest[..end].to_ascii_lowercase();
            rest = &rest[end..];
            name
        };
        if name.is_empty() {
            return None;
        }
        names.push(name);
        rest = rest.trim_start();
        match rest.strip_prefix(',') {
            Some(after) => rest = after.trim_start(),
            None => return rest.is_empty().then_some(names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(parameters: &[(&str, &str)]) -> Result<Vec<(String, String)>, UserError> {
        let vars = startup_vars(parameters.iter().copied())?;
        Ok(vars.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    #[test]
    fn parameters_and_options_become_settings() {
        let parameters = [
            ("user", "me"),
            ("database", "d"),
            ("TimeZone", "UTC"),
            ("_pq_.x", "1"),
            ("options", r#"-c work_mem=4MB --search-path="$user",Public -cmy.var=a\ b\\ -c timezone=no"#),
            ("application_name", "it's"),
            ("session_authorization", "other"),
        ];
        let expected = [
            ("application_name", "'it''s'"),
            ("my.var", r"E'a b\\'"),
            ("search_path", "\"$user\", \"public\""),
            ("timezone", "'UTC'"),
            ("work_mem", "'4MB'"),
        ];
        let expected: Vec<_> = expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(vars(&parameters), Ok(expected));
    }

    #[test]
    fn what_cannot_be_carried_is_refused() {
        for options in ["-d 5", "-c", "-c x", "x=1", "--=1", "-c search_path=a,,b", "-c search_path=\"a"] {
            let error = vars(&[("options", options)]).expect_err(options);
            assert_eq!(error.severity, crate::error::Severity::Fatal, "{options}");
        }
    }
}
