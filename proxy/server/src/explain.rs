//! `weir explain`: where a running weir would send a statement, and why, without running it. It asks the admin console.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use tokio_postgres::SimpleQueryMessage;
use weir_core::sql::word::quote_name;

use crate::control::Target;

#[derive(Clone, Debug, clap::Args)]
pub struct ExplainArgs {
    /// The statement
    sql: String,
    /// The weir to ask, as postgres://user@host:port, by one of its admin_users or stats_users; the password may come from
    /// PGPASSWORD
    #[arg(long, value_name = "DSN", default_value = "postgres://127.0.0.1:6432")]
    weir: String,
    /// The database the statement is for, where there are several
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
}

/// The answer of ROUTE as text, one line per item.
pub async fn run(arguments: ExplainArgs) -> Result<String> {
    let mut weir = Target::of_command(&arguments.weir).context("--weir")?;
    weir.config.dbname("weir").application_name("weir explain");
    let client = weir.open().await.context("cannot reach weir's admin database")?;
    let database = arguments.database.map_or_else(String::new, |name| format!("{} ", quote_name(&name)));
    let route = format!("ROUTE {database}'{}'", arguments.sql.replace('\'', "''"));
    let mut text = String::new();
    for message in client.simple_query(&route).await.map_err(told)? {
        if let SimpleQueryMessage::Row(row) = message {
            let _ = writeln!(text, "{:<12}{}", row.get(0).unwrap_or_default(), row.get(1).unwrap_or_default());
        }
    }
    Ok(text)
}

/// A refusal in the server's words, with what to do.
pub(crate) fn told(error: tokio_postgres::Error) -> anyhow::Error {
    let Some(refusal) = error.as_db_error() else { return error.into() };
    let mut text = refusal.message().to_owned();
    for (name, more) in [("DETAIL", refusal.detail()), ("HINT", refusal.hint())] {
        if let Some(more) = more {
            let _ = write!(text, "\n{name}:  {more}");
        }
    }
    anyhow::Error::msg(text)
}
