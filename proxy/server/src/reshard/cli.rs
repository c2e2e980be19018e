//! `weir reshard plan`: the console's RESHARD PLAN as a command, for people.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow};
use weir_core::sql::word::quote_name;

use crate::control::Target;
use crate::explain::told;

#[derive(Clone, Debug, clap::Args)]
pub struct ReshardArgs {
    #[command(subcommand)]
    action: Action,
    /// The weir to ask, as postgres://user@host:port, by one of its admin_users or stats_users; the password may come from
    /// PGPASSWORD
    #[arg(long, global = true, value_name = "DSN", default_value = "postgres://127.0.0.1:6432")]
    weir: String,
    /// The database, where there are several
    #[arg(long, global = true, value_name = "NAME")]
    database: Option<String>,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Action {
    /// Say what would move, how much that is, and what stands in the way
    Plan {
        #[command(subcommand)]
        goal: Wanted,
    },
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Wanted {
    /// A new shard takes its share
    Add {
        name: String,
        /// host:port of its primary
        address: String,
        /// Its share relative to the others
        #[arg(long, default_value_t = 1)]
        weight: u32,
    },
    /// A shard gives up all it has
    Remove { name: String },
    /// Shares change
    Weight {
        /// NAME=WEIGHT
        #[arg(required = true)]
        shares: Vec<String>,
    },
    /// Just these slots
    Move {
        /// For example 0-99,200
        slots: String,
        #[arg(long, value_name = "SHARD")]
        to: String,
    },
}

/// The plan as text.
pub async fn run(arguments: ReshardArgs) -> Result<String> {
    let mut weir = Target::of_command(&arguments.weir).context("--weir")?;
    weir.config.dbname("weir").application_name("weir reshard");
    let client = weir.open().await.context("cannot reach weir's admin database")?;
    let Action::Plan { goal } = &arguments.action;
    let mut command = "RESHARD PLAN ".to_owned();
    if let Some(name) = &arguments.database {
        let _ = write!(command, "{} ", quote_name(name));
    }
    command.push_str(&in_words(goal));
    let messages = client.simple_query(&command).await.map_err(told)?;
    let rows: Vec<&SimpleQueryRow> = messages
        .iter()
        .filter_map(|message| if let SimpleQueryMessage::Row(row) = message { Some(row) } else { None })
        .collect();
    Ok(shown(&rows))
}

fn in_words(goal: &Wanted) -> String {
    match goal {
        Wanted::Add { name, address, weight } => {
            format!("ADD SHARD {} {} WEIGHT {weight}", quote_name(name), quote_name(address))
        }
        Wanted::Remove { name } => format!("REMOVE SHARD {}", quote_name(name)),
        Wanted::Weight { shares } => format!("WEIGHT {}", shares.join(", ")),
        Wanted::Move { slots, to } => format!("MOVE SLOTS {slots} TO {}", quote_name(to)),
    }
}

fn shown(rows: &[&SimpleQueryRow]) -> String {
    let mut text = String::new();
    let cell = |row: &SimpleQueryRow, name: &str| row.get(name).unwrap_or_default().to_owned();
    let number = |row: &SimpleQueryRow, name: &str| row.get(name).and_then(|text| text.parse::<f64>().ok());
    for row in rows {
        let (from, to, table) = (cell(row, "from"), cell(row, "to"), cell(row, "table"));
        let amount = || {
            let seconds =
                number(row, "seconds").map_or(String::new(), |seconds| format!(", about {}", lasting(seconds)));
            format!("{} rows, {}{seconds}", cell(row, "rows"), size(number(row, "bytes").unwrap_or_default()))
        };
        let note = cell(row, "note");
        let _ = match row.get("what") {
            Some("move") => {
                writeln!(text, "{from} → {to}: {} of 4096 slots, {}\n  {note}", cell(row, "slots"), amount())
            }
            Some("table") => writeln!(text, "  {table:<32} {} ({note})", amount()),
            Some(what) => {
                let place = if table.is_empty() { from } else { format!("{from}, {table}") };
                writeln!(text, "{}: {place}: {note}", what.to_uppercase())
            }
            None => Ok(()),
        };
    }
    let blockers = rows.iter().filter(|row| row.get("what") == Some("blocker")).count();
    let _ = match blockers {
        0 => writeln!(text, "Nothing stands in the way."),
        _ => writeln!(text, "{blockers} to mend before anything can move."),
    };
    text
}

fn size(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn lasting(seconds: f64) -> String {
    match seconds as u64 {
        under @ 0..=99 => format!("{under} s"),
        under @ 100..=5_999 => format!("{} min", under.div_ceil(60)),
        more => format!("{:.1} h", more as f64 / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_as_people_say_them() {
        assert_eq!([size(0.0), size(1023.0), size(1536.0), size(5e9)], ["0 B", "1023 B", "1.5 KiB", "4.7 GiB"]);
        assert_eq!([lasting(1.0), lasting(120.0), lasting(36_000.0)], ["1 s", "2 min", "10.0 h"]);
    }
}
