//! `weir reshard`: the console's RESHARD and SHOW MOVES as commands, for people.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use weir_core::reshard::phase::{Order, Phase};
use weir_core::sql::word::{quote_literal, quote_name};

use crate::control::Target;
use crate::explain::told;

/// Between two looks of `status --watch`.
const LOOK: Duration = Duration::from_secs(1);
/// Columns of a progress bar.
const BAR: usize = 30;

#[derive(Clone, Debug, clap::Args)]
pub struct ReshardArgs {
    #[command(subcommand)]
    action: Action,
    /// The weir to ask, as postgres://user@host:port, by one of its admin_users (stats_users for plan and status); the password
    /// may come from PGPASSWORD
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
    /// Begin: copy the rows and keep both sides in step, without handing anything over yet
    Start {
        #[command(subcommand)]
        goal: Wanted,
    },
    /// How far moves are
    Status {
        /// Again every second, until all of them rest
        #[arg(long)]
        watch: bool,
    },
    /// Hand the slots over; statements that touch them wait for some tenths of a second
    Cutover(OneMove),
    /// Give up the way back, and take away what the move has left
    Complete(OneMove),
    /// Give the slots back, with all that was written since
    Rollback(OneMove),
    /// Give a move up that has not handed over yet
    Cancel(OneMove),
    /// Stop copying and applying for a while; WAL is kept meanwhile
    Pause(OneMove),
    /// Go on
    Resume(OneMove),
    /// Compare both sides once more
    Verify(OneMove),
    /// How much moves may burden their servers; "off" takes a limit away
    Throttle {
        #[command(flatten)]
        one: OneMove,
        /// Of the copy, per second, for example 20MiB
        #[arg(long)]
        rate: Option<String>,
        /// While a replica of source or target is that far behind nothing is copied, for example 10s
        #[arg(long)]
        lag: Option<String>,
        /// While so many statements of others run on the source nothing is copied
        #[arg(long)]
        active: Option<String>,
        /// When a move makes the source keep so much WAL it lets go of it and is paused, for example 50GiB
        #[arg(long)]
        wal: Option<String>,
    },
}

#[derive(Clone, Debug, clap::Args)]
struct OneMove {
    /// Just this one of `weir reshard status`; else all that are not over
    #[arg(value_name = "MOVE")]
    id: Option<i32>,
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
    /// Slots of shards whose statements take more than their share of the time, as it was measured
    Balance,
    /// Just these slots
    Move {
        /// For example 0-99,200
        slots: String,
        #[arg(long, value_name = "SHARD")]
        to: String,
    },
    /// One key gets a shard of its choice, whatever its slot says
    Isolate {
        key: String,
        /// bigint, text or uuid, where sharded tables have keys of several types
        #[arg(long = "type", value_name = "TYPE")]
        key_type: Option<String>,
        #[arg(long, value_name = "SHARD")]
        to: String,
        /// host:port, if that shard is to be added for this key alone
        #[arg(long, value_name = "ADDRESS")]
        at: Option<String>,
    },
    /// A key that was isolated goes back to where its slot is
    Release {
        key: String,
        #[arg(long = "type", value_name = "TYPE")]
        key_type: Option<String>,
    },
}

/// What is to be told.
pub async fn run(arguments: ReshardArgs) -> Result<String> {
    let mut weir = Target::of_command(&arguments.weir).context("--weir")?;
    weir.config.dbname("weir").application_name("weir reshard");
    let client = weir.open().await.context("cannot reach weir's admin database")?;
    let database = arguments.database.as_ref().map_or_else(String::new, |name| format!("{} ", quote_name(name)));
    let of = |one: &OneMove| format!("{database}{}", one.id.map_or_else(String::new, |id| format!("MOVE {id}")));
    let order = |order: Order, one: &OneMove| format!("RESHARD {} {}", order.as_str(), of(one));
    let command = match &arguments.action {
        Action::Plan { goal } => {
            return Ok(shown(&asked(&client, &format!("RESHARD PLAN {database}{}", in_words(goal))).await?));
        }
        Action::Status { watch } => return status(&client, arguments.database.as_deref(), *watch).await,
        Action::Start { goal } => format!("RESHARD START {database}{}", in_words(goal)),
        Action::Cutover(one) => order(Order::Cutover, one),
        Action::Complete(one) => order(Order::Complete, one),
        Action::Rollback(one) => order(Order::Rollback, one),
        Action::Cancel(one) => order(Order::Cancel, one),
        Action::Pause(one) => order(Order::Pause, one),
        Action::Resume(one) => order(Order::Resume, one),
        Action::Verify(one) => order(Order::Verify, one),
        Action::Throttle { one, rate, lag, active, wal } => {
            let limits = [("rate", rate), ("lag", lag), ("active", active), ("wal", wal)];
            let set = |(name, value): (&str, &Option<String>)| {
                value.as_ref().map(|value| format!("{name} = {}", quote_literal(value)))
            };
            let limits: Vec<String> = limits.into_iter().filter_map(set).collect();
            ensure!(!limits.is_empty(), "one of --rate, --lag, --active and --wal is needed");
            format!("RESHARD THROTTLE {} {}", of(one), limits.join(", "))
        }
    };
    let mut text = moves(&asked(&client, &command).await?, None);
    text.push_str("weir reshard status --watch tells how far it is.\n");
    Ok(text)
}

async fn asked(client: &Client, command: &str) -> Result<Vec<SimpleQueryRow>> {
    let messages = client.simple_query(command).await.map_err(told)?;
    let rows = messages.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    Ok(rows.collect())
}

async fn status(client: &Client, database: Option<&str>, watch: bool) -> Result<String> {
    let mut shown_lines = 0;
    loop {
        let rows = asked(client, "SHOW MOVES").await?;
        let text = moves(&rows, database);
        let goes_on =
            rows.iter().any(|row| row.get("phase").and_then(Phase::parse).is_some_and(|phase| !phase.rests()));
        if !watch || !goes_on {
            return Ok(if shown_lines > 0 { over(shown_lines, &text) } else { text });
        }
        // On a terminal in place of what was there; else one after the other.
        let overwrites = shown_lines > 0 && std::io::stdout().is_terminal();
        print!("{}", if overwrites { over(shown_lines, &text) } else { text.clone() });
        shown_lines = text.lines().count();
        tokio::time::sleep(LOOK).await;
    }
}

/// The text, over lines that are there.
fn over(lines: usize, text: &str) -> String {
    format!("\x1b[{lines}A\x1b[J{text}")
}

/// Rows of SHOW MOVES as people read them.
fn moves(rows: &[SimpleQueryRow], database: Option<&str>) -> String {
    let mut text = String::new();
    for row in rows.iter().filter(|row| database.is_none() || row.get("database") == database) {
        let cell = |name: &str| row.get(name).unwrap_or_default();
        let number = |name: &str| cell(name).parse::<f64>().ok();
        let paused = if cell("paused") == "t" { ", paused" } else { "" };
        let what = row.get("key").map_or_else(|| format!("{} slots", cell("slots")), |key| format!("key {key}"));
        let _ = writeln!(
            text,
            "move {} {}: {} → {}, {what}: {}{paused} (for {})",
            cell("id"),
            cell("database"),
            cell("from"),
            cell("to"),
            cell("phase"),
            lasting(number("since_s").unwrap_or_default())
        );
        let (done, total) = (number("rows").unwrap_or_default(), number("rows_total").unwrap_or_default());
        if total > 0.0 {
            let rate = number("rows_per_s").map_or(String::new(), |rate| format!(", {rate:.0} rows/s"));
            let eta = number("eta_s").map_or(String::new(), |eta| format!(", {} left", lasting(eta)));
            let bytes = size(number("bytes").unwrap_or_default());
            let _ = writeln!(text, "  [{}] {done:.0} of {total:.0} rows, {bytes}{rate}{eta}", bar(done / total));
            let lag = size(number("lag_bytes").unwrap_or_default());
            let pause =
                number("pause_us").map_or(String::new(), |us| format!(", owner changed in {:.0} ms", us / 1000.0));
            let _ = writeln!(text, "  {} changes since, {lag} behind{pause}", cell("changes"));
        }
        if let Some(held) = row.get("throttled_by") {
            let _ = writeln!(text, "  waits: {held} ({})", cell("limits"));
        }
        for said in [row.get("notice"), row.get("error")].into_iter().flatten() {
            let _ = writeln!(text, "  {said}");
        }
        if let Some(next) = Phase::parse(cell("phase")).and_then(what_next) {
            let _ = writeln!(text, "  next: {next}");
        }
    }
    if text.is_empty() {
        text.push_str("Nothing moves.\n");
    }
    text
}

fn what_next(phase: Phase) -> Option<&'static str> {
    match phase {
        Phase::Ready => Some("weir reshard cutover, or cancel"),
        Phase::Reverse => Some("weir reshard complete, or rollback"),
        Phase::Forward => Some("weir reshard complete; there is no way back any more"),
        _ => None,
    }
}

fn bar(share: f64) -> String {
    let filled = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    format!("{}{}", "█".repeat(filled), "░".repeat(BAR - filled))
}

fn in_words(goal: &Wanted) -> String {
    match goal {
        Wanted::Add { name, address, weight } => {
            format!("ADD SHARD {} {} WEIGHT {weight}", quote_name(name), quote_name(address))
        }
        Wanted::Remove { name } => format!("REMOVE SHARD {}", quote_name(name)),
        Wanted::Weight { shares } => format!("WEIGHT {}", shares.join(", ")),
        Wanted::Balance => "BALANCE".to_owned(),
        Wanted::Move { slots, to } => format!("MOVE SLOTS {slots} TO {}", quote_name(to)),
        Wanted::Isolate { key, key_type, to, at } => {
            let at = at.as_ref().map_or_else(String::new, |address| format!(" AT {}", quote_name(address)));
            format!("ISOLATE KEY {} TO {}{at}", key_in_words(key, key_type.as_deref()), quote_name(to))
        }
        Wanted::Release { key, key_type } => format!("RELEASE KEY {}", key_in_words(key, key_type.as_deref())),
    }
}

fn key_in_words(key: &str, key_type: Option<&str>) -> String {
    let key_type = key_type.map_or_else(String::new, |name| format!(" TYPE {}", quote_name(name)));
    format!("{}{key_type}", quote_name(key))
}

fn shown(rows: &[SimpleQueryRow]) -> String {
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
                let slots = number(row, "slots").filter(|slots| *slots > 0.0);
                let slots = slots.map_or(String::new(), |slots| format!("{slots} of 4096 slots, "));
                writeln!(text, "{from} → {to}: {slots}{}\n  {note}", amount())
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
        assert_eq!((bar(0.0), bar(0.5).chars().filter(|char| *char == '█').count()), ("░".repeat(BAR), BAR / 2));
        assert_eq!([lasting(1.0), lasting(120.0), lasting(36_000.0)], ["1 s", "2 min", "10.0 h"]);
    }
}
