//! May the fallback engine answer? It is Postgres itself, on the hub, with every table under its own name, so the text of
//! the client runs there unchanged. What must hold is that the statement only reads, and that nothing in it tells one server
//! from another.
//!
//! Invariant: default deny. A function that is not known to be the same on every server, a system column, an object
//! identifier, ONLY (which means no rows of a partitioned table) keep the refusal that planning has given.
//! Non-goal: whether the engine is there and has the tables; that is known when the statement runs.

use super::functions::{Harm, harm, steady};
use crate::sql::facts::{Facts, FunctionName, Schema, Verb};
use crate::sql::lex::{Token, TokenKind};
use crate::sql::word;
use crate::topology::catalog::reach::is_system_schema;

/// Stable by their declaration, and equal on every server for one session with one set of settings.
const SAME_ON_SERVERS: &[&str] = &[
    "age",
    "array_to_json",
    "current_date",
    "current_role",
    "current_schema",
    "current_schemas",
    "current_time",
    "current_timestamp",
    "current_user",
    "date",
    "generate_series",
    "json_agg",
    "json_object_agg",
    "jsonb_agg",
    "jsonb_object_agg",
    "jsonb_path_exists_tz",
    "jsonb_path_match_tz",
    "jsonb_path_query_array_tz",
    "jsonb_path_query_first_tz",
    "jsonb_path_query_tz",
    "localtime",
    "localtimestamp",
    "make_timestamptz",
    "now",
    "phraseto_tsquery",
    "pg_typeof",
    "quote_literal",
    "quote_nullable",
    "row_to_json",
    "session_user",
    "statement_timestamp",
    "string_to_array",
    "timezone",
    "transaction_timestamp",
    "ts_headline",
    "user",
];
/// Volatile, but they change nothing, and no answer of theirs is wrong.
const ANY_ANSWER: &[&str] =
    &["clock_timestamp", "gen_random_uuid", "pg_sleep", "random", "random_normal", "timeofday", "uuidv4", "uuidv7"];
/// What is true of one server only, wherever it stands: system columns, names of the catalogue, identifiers of objects.
const OF_ONE_SERVER: &[&str] = &[
    "cmax",
    "cmin",
    "ctid",
    "current_catalog",
    "current_database",
    "oid",
    "oidvector",
    "regclass",
    "regcollation",
    "regconfig",
    "regdictionary",
    "regnamespace",
    "regoper",
    "regoperator",
    "regproc",
    "regprocedure",
    "regrole",
    "regtype",
    "tableoid",
    "tablesample",
    "xmax",
    "xmin",
];
/// Words by which a statement that begins as a query changes something after all.
const WRITING: &[&str] = &["delete", "insert", "into", "merge", "truncate", "update"];

/// Of a statement whose facts are known.
pub fn reads(facts: &Facts, text: &str, tokens: &[Token], schema: &Schema<'_>) -> bool {
    facts.verb == Verb::Select
        && !facts.writes_in_with
        && !facts.locks_rows
        && !facts.server_bound
        && facts
            .instances
            .iter()
            .all(|instance| !instance.usage.is_write() && !is_system_schema(&instance.table.schema))
        && facts.functions.iter().all(|function| harmless(function, schema))
        && words_are_plain(text, tokens)
}

/// Of one that the parser does not know: by its words alone.
pub fn reads_by_words(text: &str, tokens: &[Token], schema: &Schema<'_>) -> bool {
    let Some(first) = tokens.iter().find(|token| token.kind != TokenKind::LeftParen) else { return false };
    if !["select", "values", "table", "with"].iter().any(|word| first.is_word(text, word)) {
        return false;
    }
    let one = |(at, token): (usize, &Token)| {
        let next = tokens.get(at + 1);
        let Some(name) = word::name(text, *token) else { return true };
        if token.kind == TokenKind::Word && WRITING.contains(&&*name) {
            return false;
        }
        // FOR UPDATE and its like; UPDATE itself is among the words above.
        let locks = |next: &Token| ["share", "no", "key"].iter().any(|word| next.is_word(text, word));
        if token.is_word(text, "for") && next.is_some_and(locks) {
            return false;
        }
        let catalog_name = name.starts_with("pg_") && name != "pg_typeof" && name != "pg_sleep";
        if catalog_name || name == "information_schema" {
            return false;
        }
        // A user's function may also be called as if it were a column, and SQL's own without parentheses.
        let called = next.is_some_and(|next| next.kind == TokenKind::LeftParen);
        let is_function = called && schema.catalog.builtin_functions.contains_key(&*name);
        let function = FunctionName { schema: None, name: name.into(), arguments: None };
        let is_function = is_function || schema.catalog.user_functions.contains_key(&*function.name);
        !is_function || harmless(&function, schema)
    };
    tokens.iter().enumerate().all(one) && words_are_plain(text, tokens)
}

fn words_are_plain(text: &str, tokens: &[Token]) -> bool {
    tokens.iter().enumerate().all(|(at, token)| {
        let Some(name) = word::name(text, *token) else { return true };
        let after_rows = || {
            let before = at.checked_sub(1).map(|before| tokens[before]);
            before.is_some_and(|before| before.is_word(text, "rows") || before.is_word(text, "row"))
        };
        !(OF_ONE_SERVER.contains(&&*name) || token.is_word(text, "only") && !after_rows())
    })
}

/// A user's function that Postgres lets change nothing reads the same tables there.
fn harmless(function: &FunctionName, schema: &Schema<'_>) -> bool {
    let name = &*function.name;
    if function.schema.as_deref() != Some("pg_catalog")
        && let Some(own) = schema.catalog.user_functions.get(name)
    {
        return !own.may_write && !own.opaque;
    }
    match harm(function, schema.catalog) {
        Harm::Immutable => true,
        Harm::Stable => steady(name) || SAME_ON_SERVERS.contains(&name),
        Harm::Volatile => ANY_ANSWER.contains(&name),
        Harm::Unknown => false,
    }
}
