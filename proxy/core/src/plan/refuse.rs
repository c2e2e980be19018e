//! Every refusal of the planner in one place: SQLSTATE 0A000, a DETAIL that says why, a HINT that says what to do.

use crate::error::{Blame, UserError, sqlstate};
use crate::sql::facts::TableName;

const WITH_KEY: &str = "Give every sharded table in the statement the same shard key, for example WHERE";

fn refuse(message: &'static str, detail: String, hint: String) -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, message).detail(detail).hint(hint)
}

fn key_hint(table: &TableName, column: &str) -> String {
    format!("{WITH_KEY} {table}.{column} = $1.")
}

pub fn unparsed(why: &str, table: &str) -> UserError {
    refuse(
        "weir does not understand this statement on a sharded or reference table",
        format!("It names \"{table}\", and {why}."),
        "Write it in plainer SQL, or run it on each shard directly.".to_owned(),
    )
}

pub fn not_spread(why: &str, table: &TableName, column: &str) -> UserError {
    refuse("this statement cannot run across shards", format!("{why}."), key_hint(table, column))
}

pub fn keys_apart(shards: usize, why: &str, table: &TableName, column: &str) -> UserError {
    refuse(
        "this statement touches several shards and cannot be split",
        format!("Its keys of {table}.{column} live on {shards} shards, and {why}."),
        "Send one statement per key.".to_owned(),
    )
}

pub fn insert_apart(shards: usize, why: &str, table: &TableName, column: &str) -> UserError {
    refuse(
        "this INSERT has rows for several shards",
        format!("Its values of {table}.{column} live on {shards} shards, and {why}."),
        format!("Send one INSERT per value of {column}."),
    )
}

pub fn returning_order() -> UserError {
    refuse(
        "the rows that this INSERT returns cannot be put in order",
        "It has rows for several shards, not all of them were inserted, and several have one shard key.".to_owned(),
        "Send one INSERT per shard key, or leave RETURNING out.".to_owned(),
    )
}

pub fn carried_columns(table: &TableName) -> UserError {
    refuse(
        "the rows of this statement cannot be carried to another shard",
        format!("Some of its columns are not known to be columns of {table}."),
        "Repeat it in half a minute, when the catalogue has been read again.".to_owned(),
    )
}

pub fn carried_type(table: &TableName, column: &str, type_oid: u32) -> UserError {
    refuse(
        "the rows of this statement cannot be carried to another shard",
        format!("The value for {table}.{column} has the type of OID {type_oid}, which may change on its way."),
        format!("Cast it to the type of {column} in the query."),
    )
}

pub fn carried_key(table: &TableName, column: &str, type_oid: u32) -> UserError {
    refuse(
        "the shard key of this INSERT cannot be known in advance",
        format!("The value for {table}.{column} has the type of OID {type_oid}, and Postgres may store another one."),
        format!("Cast it to the type of {column} in the query."),
    )
}

pub fn mixed_home(table: &TableName, other: &TableName) -> UserError {
    refuse(
        "a table with one home cannot be used together with rows of another shard",
        format!("{table} lives on the home shard only, the rows of {other} on the shard of their key."),
        format!("Declare {table} as a reference table, or use two statements."),
    )
}

pub fn system_mixed(table: &TableName) -> UserError {
    refuse(
        "system catalogues cannot be used together with sharded tables",
        format!("{table} describes one server only."),
        "Use two statements.".to_owned(),
    )
}

pub fn key_changes(table: &TableName, column: &str, why: Option<&str>) -> UserError {
    let why = why.map_or(String::new(), |why| format!(", but {why}"));
    refuse(
        "the shard key of a row cannot be changed",
        format!("The statement sets {table}.{column}, and the row may then belong to another shard{why}."),
        "Delete the row and insert it with its new key.".to_owned(),
    )
}

pub fn keys_meet(table: &TableName, column: &str) -> UserError {
    refuse(
        "the shard keys of several rows cannot be exchanged",
        format!(
            "The statement gives a row of {table} the value of {column} that another one of its rows had; whether Postgres would \
             find them equal on the way depends on their order."
        ),
        "Change the rows one by one.".to_owned(),
    )
}

pub fn key_missing(table: &TableName, column: &str) -> UserError {
    refuse(
        "this INSERT has no value for the shard key",
        format!("{table} is spread by {column}, and the statement gives it none."),
        format!("List {column} among the inserted columns."),
    )
}

pub fn sequence_default(table: &TableName, column: &str) -> UserError {
    refuse(
        "the default of this column counts on each shard for itself",
        format!(
            "{table}.{column} takes its default from a sequence, and weir cannot give this statement numbers of its own."
        ),
        format!("Use INSERT … VALUES, or give {column} a value."),
    )
}

pub fn sequence_use(function: &str, sequence: &str) -> UserError {
    refuse(
        "a sequence of sharded or reference tables cannot be used in this way",
        format!("The numbers of {sequence} come from weir's hub, and {function}() stands where weir cannot answer it."),
        format!("Ask SELECT {function}('{sequence}') in a statement of its own and pass the result as a parameter."),
    )
}

pub fn sequence_unclear(function: &str) -> UserError {
    refuse(
        "weir cannot tell which sequence is meant",
        format!("{function}() is not given a name as a literal, and some sequences get their numbers from weir's hub."),
        format!("Write {function}('name')."),
    )
}

pub fn sequence_mixed(sequence: &str) -> UserError {
    refuse(
        "a statement cannot draw from a sequence and ask what was drawn",
        format!("The numbers of {sequence} come from weir's hub, which gives them before the statement runs."),
        "Use two statements.".to_owned(),
    )
}

pub fn sequence_user_value(table: &TableName) -> UserError {
    refuse(
        "OVERRIDING USER VALUE is not supported on several shards",
        format!("The identity columns of {table} get their numbers from weir's hub."),
        "Leave the identity column out of the statement.".to_owned(),
    )
}

pub fn sequence_restart(sequence: &str) -> UserError {
    refuse(
        "a sequence of sharded or reference tables cannot be started anew",
        format!("The numbers of {sequence} come from weir's hub, in blocks that other sessions hold already."),
        format!("Raise it with SELECT setval('{sequence}', n); to lower it, drop and make the table anew."),
    )
}

pub fn key_computed(table: &TableName, column: &str) -> UserError {
    refuse(
        "the shard key of this INSERT cannot be known in advance",
        format!("The value of {table}.{column} is computed by the server."),
        format!("Give {column} as a parameter or a literal, or select it from a table restricted to one key."),
    )
}

pub fn null_key(table: &TableName, column: &str) -> UserError {
    refuse(
        "the shard key of an inserted row cannot be NULL",
        format!("{table} is spread by {column}."),
        format!("Give {column} a value."),
    )
}

pub fn blank_key(table: &TableName, column: &str) -> UserError {
    refuse(
        "the shard key of an inserted row cannot end in blanks",
        format!(
            "{table} is spread by {column}, a varchar, and Postgres cuts blanks off a value that is too long for it."
        ),
        format!("Give {column} without them, or make it a text."),
    )
}

pub fn reference_mixed(table: &TableName, other: &TableName) -> UserError {
    refuse(
        "a reference table can only be written from its own statement and other reference tables",
        format!("{table} is written on every shard, but {other} is not the same on every shard."),
        "Read the values first, then write them as parameters.".to_owned(),
    )
}

pub fn reference_function(table: &TableName, function: &str) -> UserError {
    refuse(
        "this write of a reference table would differ from shard to shard",
        format!("{table} is written on every shard, and {function}() may give each another value."),
        "Compute the value first and pass it as a parameter.".to_owned(),
    )
}

pub fn reference_shape(table: &TableName, why: &str) -> UserError {
    refuse(
        "this write of a reference table could differ from shard to shard",
        format!("{table} is written on every shard, and the statement has {why}."),
        "Write the reference table in a statement of its own, with the values as parameters.".to_owned(),
    )
}

pub fn reference_default(table: &TableName, column: &str) -> UserError {
    refuse(
        "this write of a reference table would differ from shard to shard",
        format!("{table} is written on every shard, and the default of {column} may give each another value."),
        format!("Give {column} a value: compute it first and pass it as a parameter."),
    )
}

pub fn view_sharded(view: &TableName, table: &TableName) -> UserError {
    refuse(
        "a view or special table over sharded tables is not supported on several shards",
        format!("{view} reads {table}, whose rows live on several shards."),
        format!("Query the tables themselves ({table} with its shard key) instead of {view}."),
    )
}

pub fn view_reference_write(view: &TableName, table: &TableName) -> UserError {
    refuse(
        "a reference table cannot be written through a view",
        format!("{view} leads to {table}, which must be written on every shard."),
        format!("Write {table} itself."),
    )
}

pub fn trigger_reaches(target: &TableName, table: &TableName) -> UserError {
    refuse(
        "a table whose triggers use sharded or reference tables cannot be written on several shards",
        format!("A trigger of {target} mentions {table}, and it would see or write one shard's rows only."),
        format!("Drop the trigger, and write {table} in statements of its own."),
    )
}

pub fn function_reaches(function: &str, table: &TableName) -> UserError {
    refuse(
        "a function that uses sharded or reference tables is not supported on several shards",
        format!("The body of {function}() mentions {table}, and it would see or write one shard's rows only."),
        "Run the function's statements themselves, or declare it STABLE if it only reads reference tables.".to_owned(),
    )
}

pub fn function_opaque(function: &str) -> UserError {
    refuse(
        "a function that weir cannot look into is not supported on several shards",
        format!("The body of {function}(), or of a function it calls, is too long to be read."),
        "Split it into shorter functions, or run its statements themselves.".to_owned(),
    )
}

pub fn block(name: &str) -> UserError {
    refuse(
        "a code block that uses sharded or reference tables is not supported on several shards",
        format!("It names \"{name}\", and it would see or write one shard's rows only."),
        "Send its statements one by one.".to_owned(),
    )
}

pub fn created_from(name: &str) -> UserError {
    refuse(
        "rows of sharded tables cannot be put into a new or temporary table",
        format!("Its query names \"{name}\", and each shard would fill it with its own rows only."),
        "Create the table first, declare it, and fill it with INSERT … SELECT for one shard key.".to_owned(),
    )
}

pub fn ambiguous(number: u16) -> UserError {
    refuse(
        "the type of a shard key parameter is not certain",
        format!("${number} is a shard key and also used elsewhere in the statement, and it came in binary form."),
        format!("Write ${number}::bigint (or the key's type) at every use, or use two parameters."),
    )
}

pub fn parameter_type(number: u16, wanted: &str) -> UserError {
    refuse(
        "a shard key parameter is declared with another type",
        format!("${number} is compared with a shard key of type {wanted}."),
        format!("Declare ${number} as {wanted}, or leave its type out."),
    )
}

pub fn ties_without_count() -> UserError {
    refuse(
        "the row count of FETCH FIRST … WITH TIES cannot be NULL",
        "The rows come from several shards, so weir itself looks for ties.".to_owned(),
        "Give a whole number that is not negative.".to_owned(),
    )
}

pub fn number_missing() -> UserError {
    refuse(
        "an expression over aggregates of several shards cannot be computed",
        "weir cannot read a number in it.".to_owned(),
        "Restrict the statement to one shard key, or compute the expression in the application.".to_owned(),
    )
}

pub fn explain_spread() -> UserError {
    refuse(
        "EXPLAIN of a write of every shard is not supported",
        "Each shard has a plan of its own.".to_owned(),
        "Ask ROUTE '<statement>' in the admin database \"weir\", or EXPLAIN the statement with a shard key.".to_owned(),
    )
}

pub fn cursor_spread() -> UserError {
    refuse(
        "a cursor over several shards is not supported",
        "Its query runs on more than one shard.".to_owned(),
        "Run the query without a cursor, or restrict it to one shard key.".to_owned(),
    )
}

pub fn copy_of_server(table: &TableName) -> UserError {
    refuse(
        "COPY of a sharded table from or to a server's file is not supported",
        format!("The rows of {table} live on several shards, and each would read or write a file of its own."),
        "Use COPY FROM STDIN or TO STDOUT (\\copy in psql).".to_owned(),
    )
}

pub fn copy_encoding(table: &TableName) -> UserError {
    refuse(
        "COPY into a sharded table reads UTF-8 only",
        format!("weir has to read the shard key of every row of {table}."),
        "Set client_encoding to UTF8, and leave ENCODING out.".to_owned(),
    )
}

pub fn copy_unknown(table: &TableName) -> UserError {
    refuse(
        "COPY into a table that weir does not know yet",
        format!("The columns of {table} are not known."),
        "Repeat it in half a minute, when the catalogue has been read again, or list the columns.".to_owned(),
    )
}

pub fn copy_spread() -> UserError {
    refuse(
        "COPY of a query that changes rows on several shards is not supported",
        "Its rows would have to be merged.".to_owned(),
        "Run the query by itself, or restrict it to one shard key.".to_owned(),
    )
}

/// SQLSTATE of what cannot be done to something that is in use (ERRCODE_OBJECT_IN_USE).
const IN_USE: &str = "55006";

const MOVE_OVER: &str = "Run it again when the move is over. SHOW MOVES in the admin database tells how far it is.";

pub fn while_moving(command: &str, why: &str) -> UserError {
    UserError::new(Blame::Client, IN_USE, format!("{command} is not possible while slots move between shards"))
        .detail(format!("It {why}."))
        .hint(MOVE_OVER)
}

/// A read may still be the fallback engine's, which takes what is not supported.
pub fn meets_guests(why: &str, writes: bool) -> UserError {
    let sqlstate = if writes { IN_USE } else { sqlstate::FEATURE_NOT_SUPPORTED };
    let message = "this statement is not possible while slots move between shards";
    UserError::new(Blame::Client, sqlstate, message)
        .detail(format!("It would meet rows on a shard that does not own them, and {why}."))
        .hint(MOVE_OVER)
}

/// SQLSTATE of what cannot be done before something else has been (ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE).
const NOT_READY: &str = "55000";

pub fn unique_failed(table: &TableName, column: &str, reason: &str) -> UserError {
    UserError::new(Blame::Client, NOT_READY, format!("{table}.{column} cannot be kept unique over all shards"))
        .detail(reason.to_owned())
        .hint("Remove the cause; weir looks again within a minute. SHOW UNIQUE in the admin database tells the state.")
}

pub fn unique_unknown(table: &TableName, column: &str) -> UserError {
    UserError::new(Blame::Proxy, NOT_READY, format!("{table}.{column} is not yet kept unique over all shards"))
        .detail("Its triggers are not there yet, or have been taken away.")
        .hint("weir makes them within a minute, or when no slots move any more (SHOW MOVES). SHOW UNIQUE in the admin database tells the state.")
}
