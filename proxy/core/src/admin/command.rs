//! The console's grammar: case does not matter, one `;` at the end is fine.
//!
//! What drivers and pools send on their own (SET, BEGIN, `SELECT 1` …) is answered politely and does nothing. Everything
//! else is an error that lists what there is.

use super::flush::{Flush, flush};
use super::reshard::{self, Reshard};
use super::table::Cell;
use crate::error::{Blame, UserError, sqlstate};

/// One parsed command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    Show(Show),
    /// Explain the way of a statement without running it.
    Route {
        database: Option<String>,
        sql: String,
    },
    Act(Act),
    Reshard(Reshard),
    /// One column, one row.
    Select(&'static str, Cell),
    /// Accepted without effect, answered with this tag alone; an empty tag stands for an empty query.
    Chatter(&'static str),
}

/// Commands that change something. Without a database: all of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Act {
    /// Read the configuration again.
    Reload,
    /// Let running transactions end, then keep everybody waiting.
    Pause(Option<String>),
    /// The end of a pause.
    Resume(Option<String>),
    /// Close every server connection at its next idle moment, so that new ones are opened.
    Reconnect(Option<String>),
    /// End all sessions of a database and keep newcomers waiting until RESUME.
    Kill(String),
    /// End one session, by its number in SHOW CLIENTS.
    KillClient(u64),
    /// Cached answers count no more.
    Flush(Flush),
}

impl Act {
    /// The tag that says that it is done.
    pub fn tag(&self) -> &'static str {
        match self {
            Act::Reload => "RELOAD",
            Act::Pause(_) => "PAUSE",
            Act::Resume(_) => "RESUME",
            Act::Reconnect(_) => "RECONNECT",
            Act::Kill(_) => "KILL",
            Act::KillClient(_) => "KILL_CLIENT",
            Act::Flush(_) => "FLUSH",
        }
    }
}

/// The tables there are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Show {
    Cache,
    Clients,
    Config,
    Databases,
    Decoding,
    Digests,
    Drift,
    Engine,
    Help,
    HotKeys,
    Lists,
    Moves,
    Peers,
    Pins,
    Pools,
    PreparedTransactions,
    Replicas,
    Servers,
    Shards,
    SlotLoad,
    Slots,
    State,
    Stats,
    StatsAverages,
    StatsTotals,
    Totals,
    Unique,
    Users,
    Version,
}

impl Show {
    pub const ALL: [Show; 29] = [
        Show::Cache,
        Show::Clients,
        Show::Config,
        Show::Databases,
        Show::Decoding,
        Show::Digests,
        Show::Drift,
        Show::Engine,
        Show::Help,
        Show::HotKeys,
        Show::Lists,
        Show::Moves,
        Show::Peers,
        Show::Pins,
        Show::Pools,
        Show::PreparedTransactions,
        Show::Replicas,
        Show::Servers,
        Show::Shards,
        Show::SlotLoad,
        Show::Slots,
        Show::State,
        Show::Stats,
        Show::StatsAverages,
        Show::StatsTotals,
        Show::Totals,
        Show::Unique,
        Show::Users,
        Show::Version,
    ];

    /// The word after SHOW.
    pub fn name(self) -> &'static str {
        self.described().0
    }

    /// One line for SHOW HELP.
    pub fn meaning(self) -> &'static str {
        self.described().1
    }

    fn described(self) -> (&'static str, &'static str) {
        match self {
            Show::Cache => ("CACHE", "hits, misses and size of the cache"),
            Show::Clients => ("CLIENTS", "client connections"),
            Show::Config => ("CONFIG", "settings in force; secrets are never shown"),
            Show::Databases => ("DATABASES", "servers of each database"),
            Show::Decoding => ("DECODING", "what is seen of writes that go round weir, per shard"),
            Show::Digests => ("DIGESTS", "which cacheable reads are asked for most"),
            Show::Drift => ("DRIFT", "where the shards' schemas differ"),
            Show::Engine => ("ENGINE", "the fallback engine on the hub, and what it does not have"),
            Show::Help => ("HELP", "this list"),
            Show::HotKeys => ("HOT KEYS", "which keys are read and written most"),
            Show::Lists => ("LISTS", "how many of everything"),
            Show::Moves => ("MOVES", "slots on their way between shards, and how far they are"),
            Show::Peers => ("PEERS", "this proxy and others, at each shard"),
            Show::Pins => ("PINS", "why sessions keep their server connection"),
            Show::Pools => ("POOLS", "clients and server connections per database and user"),
            Show::PreparedTransactions => {
                ("PREPARED TRANSACTIONS", "parts of distributed transactions that wait for their decision")
            }
            Show::Replicas => ("REPLICAS", "health, replay position and lag of every server"),
            Show::Servers => ("SERVERS", "server connections"),
            Show::Shards => ("SHARDS", "shards with their servers, slots and health"),
            Show::SlotLoad => ("SLOT LOAD", "which slots take most of the servers' time, as this weir has measured it"),
            Show::Slots => ("SLOTS", "which shard owns which slots, and keys that are isolated"),
            Show::State => ("STATE", "is weir active, draining, ready"),
            Show::Stats => ("STATS", "totals and averages per database"),
            Show::StatsAverages => ("STATS_AVERAGES", "averages per database"),
            Show::StatsTotals => ("STATS_TOTALS", "totals per database"),
            Show::Totals => ("TOTALS", "totals and averages of all databases together"),
            Show::Unique => ("UNIQUE", "columns that are unique over all shards"),
            Show::Users => ("USERS", "known users"),
            Show::Version => ("VERSION", "version of weir"),
        }
    }
}

/// Parses one command.
pub fn parse(text: &str) -> Result<Command, UserError> {
    let text = text.trim();
    let text = text.strip_suffix(';').map_or(text, str::trim_end);
    let (word, rest) = split_word(text);
    match word.to_ascii_uppercase().as_str() {
        "" => Ok(Command::Chatter("")),
        "SHOW" => show(rest),
        "ROUTE" => route(rest),
        "RELOAD" if rest.is_empty() => Ok(Command::Act(Act::Reload)),
        "PAUSE" => Ok(Command::Act(Act::Pause(maybe_name(rest)?))),
        "RESUME" => Ok(Command::Act(Act::Resume(maybe_name(rest)?))),
        "RECONNECT" => Ok(Command::Act(Act::Reconnect(maybe_name(rest)?))),
        "KILL" => match maybe_name(rest)? {
            Some(database) => Ok(Command::Act(Act::Kill(database))),
            None => Err(usage("KILL needs a database", "KILL shop; to end one session: KILL_CLIENT <id>.")),
        },
        "KILL_CLIENT" => rest
            .parse()
            .map(|id| Command::Act(Act::KillClient(id)))
            .map_err(|_| usage("KILL_CLIENT needs the number of a client", "SHOW CLIENTS has it in its column id.")),
        "RESHARD" => Ok(Command::Reshard(reshard::command(rest)?)),
        "FLUSH" => Ok(Command::Act(Act::Flush(flush(rest)?))),
        "SELECT" => select(rest),
        "SET" => Ok(Command::Chatter("SET")),
        "RESET" => Ok(Command::Chatter("RESET")),
        "BEGIN" => Ok(Command::Chatter("BEGIN")),
        "START" => Ok(Command::Chatter("START TRANSACTION")),
        "COMMIT" | "END" => Ok(Command::Chatter("COMMIT")),
        "ROLLBACK" | "ABORT" => Ok(Command::Chatter("ROLLBACK")),
        "DISCARD" => Ok(Command::Chatter("DISCARD ALL")),
        "DEALLOCATE" => Ok(Command::Chatter("DEALLOCATE ALL")),
        "HELP" if rest.is_empty() => Ok(Command::Show(Show::Help)),
        _ => Err(unknown(text)),
    }
}

fn show(rest: &str) -> Result<Command, UserError> {
    let name = rest.split_whitespace().collect::<Vec<_>>().join(" ").to_ascii_uppercase();
    if let Some(show) = Show::ALL.into_iter().find(|show| show.name() == name) {
        return Ok(Command::Show(show));
    }
    // Settings that drivers ask for when they connect.
    match name.as_str() {
        "SERVER_VERSION" => Ok(Command::Select("server_version", "15.0".into())),
        "CLIENT_ENCODING" => Ok(Command::Select("client_encoding", "UTF8".into())),
        "SERVER_ENCODING" => Ok(Command::Select("server_encoding", "UTF8".into())),
        "STANDARD_CONFORMING_STRINGS" => Ok(Command::Select("standard_conforming_strings", "on".into())),
        "DATESTYLE" => Ok(Command::Select("DateStyle", "ISO".into())),
        "TIMEZONE" | "TIME ZONE" => Ok(Command::Select("TimeZone", "UTC".into())),
        "TRANSACTION ISOLATION LEVEL" | "TRANSACTION_ISOLATION" => {
            Ok(Command::Select("transaction_isolation", "read committed".into()))
        }
        _ => Err(unknown(&format!("SHOW {rest}"))),
    }
}

fn select(rest: &str) -> Result<Command, UserError> {
    let plain = rest.to_ascii_lowercase();
    match plain.as_str() {
        "" => Ok(Command::Chatter("SELECT 1")),
        "version()" | "pg_catalog.version()" => {
            Ok(Command::Select("version", concat!("weir ", env!("CARGO_PKG_VERSION"), " admin console").into()))
        }
        "current_database()" => Ok(Command::Select("current_database", "weir".into())),
        "current_schema()" => Ok(Command::Select("current_schema", Cell::Null)),
        _ => match plain.parse::<i64>() {
            Ok(number) => Ok(Command::Select("?column?", number.into())),
            Err(_) => Err(unknown(&format!("SELECT {rest}"))),
        },
    }
}

/// Nothing, or one name, quoted or not. Unlike in SQL the case of an unquoted one stays: it is the config file's.
pub(super) fn maybe_name(rest: &str) -> Result<Option<String>, UserError> {
    let (name, after) = match quoted(rest, '"') {
        Some(found) => found,
        None => (rest.to_owned(), ""),
    };
    if !after.is_empty() || name.contains(char::is_whitespace) && !rest.starts_with('"') {
        return Err(usage("one database at a time", "Write a name with blanks in double quotes."));
    }
    Ok(Some(name).filter(|name| !name.is_empty()))
}

pub(super) fn usage(message: &'static str, hint: &'static str) -> UserError {
    UserError::new(Blame::Client, sqlstate::SYNTAX_ERROR, message).hint(hint)
}

/// `ROUTE 'sql'`, `ROUTE database 'sql'`; the statement may also be dollar-quoted.
fn route(rest: &str) -> Result<Command, UserError> {
    let usage = || {
        UserError::new(Blame::Client, sqlstate::SYNTAX_ERROR, "ROUTE needs a quoted statement")
            .hint("ROUTE 'SELECT 1', or ROUTE shop 'SELECT 1'; write '' for a quote inside, or use $$ … $$.")
    };
    let (database, literal) = match rest.chars().next() {
        Some('\'' | '$') => (None, rest),
        Some('"') => {
            let (name, after) = quoted(rest, '"').ok_or_else(usage)?;
            (Some(name), after)
        }
        Some(_) => {
            let (name, after) = split_word(rest);
            (Some(name.to_owned()), after)
        }
        None => return Err(usage()),
    };
    let literal = literal.trim_start();
    let (sql, after) =
        if literal.starts_with('\'') { quoted(literal, '\'') } else { dollar_quoted(literal) }.ok_or_else(usage)?;
    if !after.trim().is_empty() || sql.trim().is_empty() {
        return Err(usage());
    }
    Ok(Command::Route { database, sql })
}

/// Text between `mark`s, doubled marks taken as one, and what follows. `None` when it is not closed.
pub(super) fn quoted(text: &str, mark: char) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text.strip_prefix(mark)?;
    loop {
        let end = rest.find(mark)?;
        value.push_str(&rest[..end]);
        rest = &rest[end + mark.len_utf8()..];
        match rest.strip_prefix(mark) {
            Some(after) => {
                value.push(mark);
                rest = after;
            }
            None => return Some((value, rest)),
        }
    }
}

fn dollar_quoted(text: &str) -> Option<(String, &str)> {
    let inner = text.strip_prefix('$')?;
    let tag = &inner[..inner.find('$')?];
    if !tag.chars().all(|char| char.is_alphanumeric() || char == '_') {
        return None;
    }
    let mark = format!("${tag}$");
    let body = &text[mark.len()..];
    let end = body.find(&mark)?;
    Some((body[..end].to_owned(), &body[end + mark.len()..]))
}

/// First word and the rest without the blanks between. A quote also ends the word.
fn split_word(text: &str) -> (&str, &str) {
    let end = text.find(|char: char| char.is_whitespace() || char == '\'' || char == '$').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

fn unknown(command: &str) -> UserError {
    // A statement sent here by mistake may be long and may hold data: name its beginning only.
    let shown: String = command.chars().take(40).collect();
    let names: Vec<&str> = Show::ALL.iter().map(|show| show.name()).collect();
    UserError::new(Blame::Client, sqlstate::SYNTAX_ERROR, format!("the admin console does not know \"{shown}\""))
        .detail(format!("It knows SHOW {}; ROUTE [database] '<sql>'; RELOAD; PAUSE, RESUME, RECONNECT [database]; KILL <database>; KILL_CLIENT <id>; FLUSH [database], FLUSH TABLE <table>, FLUSH KEY <table> <value>; RESHARD PLAN | START [database] <goal>, RESHARD CUTOVER | COMPLETE | ROLLBACK | CANCEL | PAUSE | RESUME | VERIFY [database] [MOVE <id>].", names.join("|")))
        .hint("SHOW HELP explains them. To run SQL, connect to one of the databases that SHOW DATABASES lists.")
}
