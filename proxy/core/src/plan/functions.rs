//! How harmful a function call is for routing and caching: default deny.

use crate::sql::facts::FunctionName;
use crate::topology::catalog::{Catalog, Volatility};

/// Worst last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Harm {
    Immutable,
    /// Same within one statement, but not for ever or not on every server.
    Stable,
    /// Built-in, may change server state but no table of the user's.
    Volatile,
    /// May do anything.
    Unknown,
}

/// Special syntax of the grammar that is no row of pg_proc (src/backend/parser/gram.y, func_expr_common_subexpr).
const SYNTAX_IMMUTABLE: &[&str] = &["coalesce", "greatest", "grouping", "least", "nullif", "row"];
const SYNTAX_STABLE: &[&str] = &[
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "localtime",
    "localtimestamp",
    "session_user",
    "system_user",
    "user",
];
/// Declared stable, but they fail on a standby.
const PRIMARY_ONLY: &[&str] = &["pg_current_xact_id", "txid_current"];
/// Declared stable for an overload or a setting, but equal on servers with equal settings and data; used in reference writes.
const STEADY: &[&str] = &[
    "array_to_string",
    "concat",
    "concat_ws",
    "date_part",
    "date_trunc",
    "format",
    "json_build_array",
    "json_build_object",
    "jsonb_build_array",
    "jsonb_build_object",
    "plainto_tsquery",
    "to_char",
    "to_date",
    "to_json",
    "to_jsonb",
    "to_number",
    "to_timestamp",
    "to_tsquery",
    "to_tsvector",
    "websearch_to_tsquery",
];

/// Gives the same on every shard in one distributed statement, though declared stable.
pub fn steady(name: &str) -> bool {
    STEADY.contains(&name)
}

/// Volatile, but all they do is to give each row a value of its own, wherever it is.
const BY_ROW: &[&str] = &["clock_timestamp", "gen_random_uuid", "random", "timeofday", "uuidv4", "uuidv7"];

/// A volatile built-in that may be called for each row on the row's own server.
pub fn harmless_by_row(function: &FunctionName, catalog: &Catalog) -> bool {
    harm(function, catalog) == Harm::Volatile && BY_ROW.contains(&&*function.name)
}

/// The worst of some calls.
pub fn worst(functions: &[FunctionName], catalog: &Catalog) -> Harm {
    functions.iter().map(|function| harm(function, catalog)).max().unwrap_or(Harm::Immutable)
}

pub fn harm(function: &FunctionName, catalog: &Catalog) -> Harm {
    let name = &*function.name;
    match function.schema.as_deref() {
        Some("pg_catalog") => {}
        Some(_) => return Harm::Unknown,
        // An unqualified name may mean a user's function, whatever the search path is by now.
        None if catalog.user_functions.contains_key(name) => return Harm::Unknown,
        None if SYNTAX_IMMUTABLE.contains(&name) => return Harm::Immutable,
        None if SYNTAX_STABLE.contains(&name) => return Harm::Stable,
        None => {}
    }
    // These run a query of their own, over any table.
    if name.contains("_to_xml") || name == "ts_stat" {
        return Harm::Unknown;
    }
    if PRIMARY_ONLY.contains(&name) {
        return Harm::Volatile;
    }
    match catalog.builtin(name, function.arguments) {
        Some(Volatility::Immutable) => Harm::Immutable,
        Some(Volatility::Stable) => Harm::Stable,
        Some(Volatility::Volatile) => Harm::Volatile,
        None => Harm::Unknown,
    }
}
