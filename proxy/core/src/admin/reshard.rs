//! `RESHARD`: what would move and what stands in the way, moves that begin, and what is said to those that run.
//!
//! Names of shards and databases keep their case, as with the console's other commands. Non-goal: looking names up.

use super::command::{quoted, usage};
use super::table::{Cell, Column, Kind, Table};
use crate::error::UserError;
use crate::reshard::phase::Order;
use crate::reshard::survey::Finding;
use crate::reshard::throttle::Limit;
use crate::reshard::{Goal, NamedKey};
use crate::topology::{KeyType, SlotSet};

/// One command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reshard {
    /// What would move; changes nothing.
    Plan(PlanRequest),
    /// Begin with it.
    Start(PlanRequest),
    /// Say something to moves that run.
    Order { order: Order, which: Which },
    /// How much moves may burden their servers.
    Throttle { limits: Vec<Limit>, which: Which },
}

/// Which moves are meant.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Which {
    /// None: the only one there is.
    pub database: Option<String>,
    /// None: all that are not over.
    pub id: Option<i32>,
}

impl Reshard {
    /// Does it change nothing?
    pub fn only_reads(&self) -> bool {
        matches!(self, Reshard::Plan(_))
    }
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlanRequest {
    /// None: the only one there is.
    pub database: Option<String>,
    pub goal: Goal,
}

/// One line of a plan: what a step moves of one table, or all of it.
#[derive(Clone, PartialEq, Debug)]
pub struct PlanLine {
    pub from: String,
    pub to: String,
    /// None: of all tables together.
    pub table: Option<String>,
    pub slots: usize,
    pub rows: u64,
    /// Without indexes.
    pub bytes: u64,
    /// At the rate that the source was read with.
    pub seconds: Option<f64>,
    /// Which slots, or that rows were estimated.
    pub note: String,
}

const WORDS: [&str; 7] = ["ADD", "REMOVE", "WEIGHT", "BALANCE", "MOVE", "ISOLATE", "RELEASE"];
const HINT: &str = "RESHARD PLAN | START [database] ADD SHARD shard2 'db3.example.com:5432' [WEIGHT 1]; REMOVE SHARD shard2; WEIGHT shard0 = 2, shard1 = 1; \
                    MOVE SLOTS 0-99, 200 TO shard1; BALANCE; ISOLATE KEY '42' [TYPE bigint] TO shard1 [AT 'db3.example.com:5432']; RELEASE KEY '42' [TYPE bigint]. RESHARD CUTOVER | COMPLETE | ROLLBACK | CANCEL | PAUSE | RESUME | VERIFY [database] [MOVE number]. \
                    RESHARD THROTTLE [database] [MOVE number] rate = 20MiB, lag = 10s, active = 8, wal = 50GiB; off takes a limit away.";

/// What follows RESHARD.
pub(super) fn command(rest: &str) -> Result<Reshard, UserError> {
    let wrong = || usage("RESHARD needs to be told what", HINT);
    let words = words(rest).ok_or_else(wrong)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (verb, rest) = words.split_first().ok_or_else(wrong)?;
    match verb.to_ascii_uppercase().as_str() {
        "PLAN" => Ok(Reshard::Plan(request(rest)?)),
        "START" => Ok(Reshard::Start(request(rest)?)),
        "THROTTLE" => {
            // The first pair begins a word before its `=`.
            let begin = rest.iter().position(|word| *word == "=").and_then(|at| at.checked_sub(1)).ok_or_else(wrong)?;
            let limits = limits(&rest[begin..]).ok_or_else(wrong)?;
            Ok(Reshard::Throttle { limits, which: which(&rest[..begin]).ok_or_else(wrong)? })
        }
        verb => {
            let order = Order::ALL.into_iter().find(|order| order.as_str() == verb).ok_or_else(wrong)?;
            Ok(Reshard::Order { order, which: which(rest).ok_or_else(wrong)? })
        }
    }
}

/// `[database] [MOVE number]`
fn which(words: &[&str]) -> Option<Which> {
    let (database, id) = match words {
        [] => (None, None),
        [word, id] if word.eq_ignore_ascii_case("MOVE") => (None, Some(id.parse().ok()?)),
        [database] => (Some((*database).to_owned()), None),
        [database, word, id] if word.eq_ignore_ascii_case("MOVE") => {
            (Some((*database).to_owned()), Some(id.parse().ok()?))
        }
        _ => return None,
    };
    Some(Which { database, id })
}

/// `rate = 20MiB, lag = off`, cut into words.
fn limits(words: &[&str]) -> Option<Vec<Limit>> {
    let pair = |pair: &[&str]| match pair {
        [name, "=", value] => Limit::parse(name, value),
        _ => None,
    };
    words.split(|word| *word == ",").map(pair).collect()
}

fn request(words: &[&str]) -> Result<PlanRequest, UserError> {
    let wrong = || usage("RESHARD PLAN and START need a goal", HINT);
    let mut words = words.iter().copied().peekable();
    let is = |word: Option<&str>, expected: &str| word.is_some_and(|word| word.eq_ignore_ascii_case(expected));
    let names_goal = |word: &&str| WORDS.iter().any(|goal| word.eq_ignore_ascii_case(goal));
    let database = words.next_if(|word| !names_goal(word)).map(str::to_owned);
    let goal = words.next().ok_or_else(wrong)?.to_ascii_uppercase();
    let words: Vec<&str> = words.collect();
    let goal = match (goal.as_str(), words.as_slice()) {
        ("ADD", [shard, name, address, weight @ ..]) if is(Some(shard), "SHARD") => {
            let weight = match weight {
                [] => Some(1),
                [word, weight] if is(Some(word), "WEIGHT") => weight.parse().ok().filter(|weight| *weight > 0),
                _ => None,
            };
            let weight = weight.ok_or_else(wrong)?;
            Goal::Add { shard: (*name).to_owned(), address: (*address).to_owned(), weight }
        }
        ("REMOVE", [shard, name]) if is(Some(shard), "SHARD") => Goal::Remove { shard: (*name).to_owned() },
        ("BALANCE", []) => Goal::Balance,
        ("WEIGHT", pairs) if !pairs.is_empty() => Goal::Weigh(weights(pairs).ok_or_else(wrong)?),
        ("MOVE", [slots, set @ .., to, name]) if is(Some(slots), "SLOTS") && is(Some(to), "TO") => {
            let slots = SlotSet::parse(&set.concat()).ok_or_else(wrong)?;
            Goal::Move { slots, to: (*name).to_owned() }
        }
        ("ISOLATE", [key, text, rest @ ..]) if is(Some(key), "KEY") => {
            let (key, rest) = named_key(text, rest).ok_or_else(wrong)?;
            let (to, address) = match rest {
                [to, name] if is(Some(to), "TO") => (*name, None),
                [to, name, at, address] if is(Some(to), "TO") && is(Some(at), "AT") => (*name, Some(*address)),
                _ => return Err(wrong()),
            };
            Goal::Isolate { key, to: to.to_owned(), address: address.map(str::to_owned) }
        }
        ("RELEASE", [key, text, rest @ ..]) if is(Some(key), "KEY") => match named_key(text, rest) {
            Some((key, [])) => Goal::Release { key },
            _ => return Err(wrong()),
        },
        _ => return Err(wrong()),
    };
    Ok(PlanRequest { database, goal })
}

/// A key and maybe its type, and what follows.
fn named_key<'a, 'w>(text: &str, rest: &'a [&'w str]) -> Option<(NamedKey, &'a [&'w str])> {
    let (key_type, rest) = match rest {
        [word, name, rest @ ..] if word.eq_ignore_ascii_case("TYPE") => {
            (Some(KeyType::parse(&name.to_ascii_lowercase())?), rest)
        }
        rest => (None, rest),
    };
    Some((NamedKey { text: text.to_owned(), key_type }, rest))
}

/// `shard0 = 2 , shard1 = 1`, cut into words.
fn weights(words: &[&str]) -> Option<Vec<(String, u32)>> {
    let pair = |pair: &[&str]| match pair {
        [name, "=", weight] => Some(((*name).to_owned(), weight.parse().ok()?)),
        _ => None,
    };
    words.split(|word| *word == ",").map(pair).collect()
}

/// Words, text in quotes without them, and `=` and `,` on their own.
fn words(mut rest: &str) -> Option<Vec<String>> {
    let mut found = Vec::new();
    loop {
        rest = rest.trim_start();
        let Some(first) = rest.chars().next() else { return Some(found) };
        let word = match first {
            '\'' | '"' => {
                let (text, after) = quoted(rest, first)?;
                rest = after;
                text
            }
            '=' | ',' => {
                rest = &rest[1..];
                first.to_string()
            }
            _ => {
                let ends = |char: char| char.is_whitespace() || matches!(char, '=' | ',' | '\'' | '"');
                let (word, after) = rest.split_at(rest.find(ends).unwrap_or(rest.len()));
                rest = after;
                word.to_owned()
            }
        };
        found.push(word);
    }
}

/// The plan as a table: steps first, then what stands in the way.
pub fn plan_table(lines: &[PlanLine], findings: &[Finding]) -> Table {
    let text = |name| Column { name, kind: Kind::Text };
    let number = |name| Column { name, kind: Kind::Int8 };
    let columns = vec![
        text("what"),
        text("from"),
        text("to"),
        text("table"),
        number("slots"),
        number("rows"),
        number("bytes"),
        number("seconds"),
        text("note"),
    ];
    let line = |line: &PlanLine| {
        let what = if line.table.is_some() { "table" } else { "move" };
        vec![
            what.into(),
            (&line.from).into(),
            (&line.to).into(),
            line.table.as_ref().into(),
            Cell::Int(line.slots as i64),
            line.rows.into(),
            line.bytes.into(),
            line.seconds.map(|seconds| seconds.ceil() as i64).into(),
            (&line.note).into(),
        ]
    };
    let finding = |finding: &Finding| {
        let table = Some(&finding.table).filter(|table| !table.is_empty());
        let note = format!("{}. {}", finding.what, finding.remedy);
        let nothing = || Cell::Null;
        vec![
            finding.gravity.as_str().into(),
            (&finding.shard).into(),
            nothing(),
            table.into(),
            nothing(),
            nothing(),
            nothing(),
            nothing(),
            note.trim_end().into(),
        ]
    };
    Table { columns, rows: lines.iter().map(line).chain(findings.iter().map(finding)).collect(), tag: "RESHARD PLAN" }
}

/// A move, as SHOW MOVES shows it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct MovesRow {
    pub database: String,
    pub id: i32,
    pub from: String,
    pub to: String,
    pub slots: usize,
    /// The key that is isolated or released.
    pub key: Option<String>,
    pub phase: &'static str,
    /// What it is to reach.
    pub aim: &'static str,
    pub is_paused: bool,
    /// Seconds since the phase began.
    pub since_s: i64,
    pub rows: i64,
    pub rows_total: i64,
    pub bytes: i64,
    /// Rows per second of the copy.
    pub rate: Option<i64>,
    /// Until the copy is done.
    pub eta_s: Option<i64>,
    /// Changes applied since the copy.
    pub changes: i64,
    pub lag_bytes: i64,
    /// How long the last change of owner made statements wait, in microseconds.
    pub pause_us: Option<i64>,
    /// Why it waits at the moment.
    pub throttled_by: Option<&'static str>,
    /// How much it may burden its servers.
    pub limits: String,
    /// What has happened to it that is over, and is worth knowing.
    pub notice: Option<String>,
    pub error: Option<String>,
}

/// The moves as a table.
pub fn moves_table(rows: &[MovesRow], tag: &'static str) -> Table {
    let text = |name| Column { name, kind: Kind::Text };
    let number = |name| Column { name, kind: Kind::Int8 };
    let columns = vec![
        text("database"),
        number("id"),
        text("from"),
        text("to"),
        number("slots"),
        text("key"),
        text("phase"),
        text("aim"),
        text("paused"),
        number("since_s"),
        number("rows"),
        number("rows_total"),
        number("bytes"),
        number("rows_per_s"),
        number("eta_s"),
        number("changes"),
        number("lag_bytes"),
        number("pause_us"),
        text("throttled_by"),
        text("limits"),
        text("notice"),
        text("error"),
    ];
    let cells = |row: &MovesRow| {
        vec![
            Cell::from(&row.database),
            Cell::Int(row.id.into()),
            (&row.from).into(),
            (&row.to).into(),
            Cell::Int(row.slots as i64),
            row.key.as_ref().into(),
            row.phase.into(),
            row.aim.into(),
            row.is_paused.into(),
            Cell::Int(row.since_s),
            Cell::Int(row.rows),
            Cell::Int(row.rows_total),
            Cell::Int(row.bytes),
            row.rate.into(),
            row.eta_s.into(),
            Cell::Int(row.changes),
            Cell::Int(row.lag_bytes),
            row.pause_us.into(),
            row.throttled_by.map(str::to_owned).as_ref().into(),
            (&row.limits).into(),
            row.notice.as_ref().into(),
            row.error.as_ref().into(),
        ]
    };
    Table { columns, rows: rows.iter().map(cells).collect(), tag }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_read() {
        let slots = |text| SlotSet::parse(text).expect("slots");
        let key = |text: &str, key_type| NamedKey { text: text.into(), key_type };
        for (text, database, goal) in [
            (
                "PLAN ADD SHARD shard2 'db3:5432'",
                None,
                Goal::Add { shard: "shard2".into(), address: "db3:5432".into(), weight: 1 },
            ),
            (
                "plan \"my shop\" add shard Shard2 db3:5432 weight 3",
                Some("my shop"),
                Goal::Add { shard: "Shard2".into(), address: "db3:5432".into(), weight: 3 },
            ),
            ("PLAN shop REMOVE SHARD shard1", Some("shop"), Goal::Remove { shard: "shard1".into() }),
            ("PLAN WEIGHT a=2,b = 0", None, Goal::Weigh(vec![("a".into(), 2), ("b".into(), 0)])),
            ("PLAN shop BALANCE", Some("shop"), Goal::Balance),
            ("PLAN MOVE SLOTS 0-9, 12 TO b", None, Goal::Move { slots: slots("0-9,12"), to: "b".into() }),
            ("PLAN ISOLATE KEY 42 TO b", None, Goal::Isolate { key: key("42", None), to: "b".into(), address: None }),
            (
                "PLAN shop isolate key 'O''Hara to' type TEXT to b at 'db3:5432'",
                Some("shop"),
                Goal::Isolate {
                    key: key("O'Hara to", Some(KeyType::Text)),
                    to: "b".into(),
                    address: Some("db3:5432".into()),
                },
            ),
            ("PLAN RELEASE KEY '-1' TYPE bigint", None, Goal::Release { key: key("-1", Some(KeyType::Int)) }),
        ] {
            assert_eq!(
                command(text),
                Ok(Reshard::Plan(PlanRequest { database: database.map(Into::into), goal })),
                "{text}"
            );
        }
        for (text, order, database, id) in [
            ("CUTOVER", Order::Cutover, None, None),
            ("rollback shop", Order::Rollback, Some("shop"), None),
            ("PAUSE MOVE 7", Order::Pause, None, Some(7)),
            ("CANCEL \"my shop\" move 7", Order::Cancel, Some("my shop"), Some(7)),
        ] {
            let which = Which { database: database.map(Into::into), id };
            assert_eq!(command(text), Ok(Reshard::Order { order, which }), "{text}");
        }
        assert_eq!(
            command("THROTTLE shop MOVE 7 rate = '20MiB', lag=off"),
            Ok(Reshard::Throttle {
                limits: vec![Limit::Rate(Some(20 << 20)), Limit::Lag(None)],
                which: Which { database: Some("shop".into()), id: Some(7) }
            })
        );
        for wrong in [
            "",
            "THROTTLE",
            "THROTTLE shop",
            "THROTTLE = 5s",
            "THROTTLE rate = 20",
            "THROTTLE shop 7 rate = 20MiB",
            "THROTTLE rate = 20MiB,",
            "PLAN",
            "BEGIN ADD SHARD a b:1",
            "CUTOVER shop 7",
            "CUTOVER MOVE seven",
            "PLAN ADD SHARD a",
            "PLAN ISOLATE KEY 42",
            "PLAN ISOLATE KEY 42 TYPE point TO b",
            "PLAN RELEASE KEY 42 TO b",
            "PLAN ADD a b:1",
            "PLAN ADD SHARD a b:1 WEIGHT",
            "PLAN ADD SHARD a b:1 WEIGHT 0",
            "PLAN ADD SHARD a 'b:1",
            "PLAN WEIGHT",
            "PLAN WEIGHT a 2",
            "PLAN WEIGHT a = 2,",
            "PLAN BALANCE now",
            "PLAN MOVE SLOTS TO b",
            "PLAN MOVE SLOTS 5000 TO b",
            "PLAN MOVE SLOTS 1 2 TO b c",
            "PLAN shop shop REMOVE SHARD a",
        ] {
            assert!(command(wrong).expect_err(wrong).hint.is_some(), "{wrong}");
        }
    }
}
