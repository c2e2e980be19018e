//! Random SELECTs on one plain Postgres and through weir with 2, 3 and 5 shards, in text and in binary: equal, or refused.
//!
//! `make test` runs a few hundred: the seeds of `random/seeds.txt` (once wrong, now right), a fixed series and a new one.
//! A long run, whose last lines are the figures for the documentation:
//!
//! ```text
//! WEIR_RANDOM_STATEMENTS=100000 WEIR_RANDOM_SEED=7 cargo test -p weir-tests --test it -- --nocapture random_statements
//! ```
//!
//! A statement is made of one number, which is printed when it goes wrong, after the statement was cut down to what is
//! still wrong. Reading order: the test → [`Rig`] → [`judge`] → [`shrink`]; the statements come from [`author`].
//! Non-goal: errors while a statement runs; the author writes none, since which row fails first is not decided.

mod author;
mod blocks;
mod dice;
mod rows;
mod values;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use author::{Author, Decided};
pub use dice::Dice;
use tokio_postgres::Client;
use weir_harness::{Plain, Tier};

use super::{Answer, Order, Parameter, Right, Statement, binary, first_difference, how, show, text};

const SEEDS: &str = include_str!("random/seeds.txt");
const SHARDS: [u32; 3] = [2, 3, 5];
/// Of each of the two series of a short run.
const STATEMENTS: u64 = 150;
/// After so many wrong ones a run ends.
const WRONG_MAX: usize = 8;
/// Tries to cut one wrong statement down.
const SHRINK_TRIES_MAX: usize = 1500;
/// Joins may multiply rows; what takes plain Postgres longer is left out.
const SERVER_TIME: &str = "SET statement_timeout = '2s'";

#[tokio::test(flavor = "multi_thread")]
async fn random_statements_are_answered_as_by_one_postgres_or_refused() -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 >> 10;
    let base = number("WEIR_RANDOM_SEED").unwrap_or(fresh);
    let mut seeds: Vec<u64> = SEEDS.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    match number("WEIR_RANDOM_STATEMENTS") {
        Some(count) => seeds = (0..count).map(|at| base.wrapping_add(at)).collect(),
        None => seeds.extend((0..STATEMENTS).chain((0..STATEMENTS).map(|at| base.wrapping_add(at)))),
    }
    eprintln!("random statements: {} seeds, the last series from {base}", seeds.len());
    let mut rig = Rig::start().await?;
    let (mut wrong, begun) = (Vec::new(), Instant::now());
    for (at, seed) in seeds.iter().enumerate() {
        if let Err(error) = rig.run(*seed).await {
            eprintln!("WRONG, seed {seed}: {error:#}\n");
            wrong.push(format!("seed {seed}: {error:#}"));
        }
        if wrong.len() >= WRONG_MAX {
            break;
        }
        if (at + 1) % 1000 == 0 {
            eprintln!("{} statements in {:?}\n{}", at + 1, begun.elapsed(), rig.figures());
        }
    }
    eprintln!("{} statements in {:?}, {} wrong\n{}", seeds.len(), begun.elapsed(), wrong.len(), rig.figures());
    ensure!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
    let answered = rig.tiers.iter().all(|tier| tier.counts.get("merged").is_some_and(|merged| *merged > 0));
    ensure!(answered, "hardly anything was answered");
    Ok(())
}

/// The servers, and what they did.
struct Rig {
    plain: Plain,
    single: Client,
    tiers: Vec<Sharded>,
    left_out: u32,
    refusals: BTreeMap<String, u32>,
}

struct Sharded {
    tier: Tier,
    shards: u32,
    client: Client,
    console: Client,
    counts: BTreeMap<String, u32>,
}

impl Rig {
    async fn start() -> Result<Self> {
        let plain = Plain::start().await?;
        let single = weir_harness::connect(&plain.dsn()).await?;
        rows::load(&single).await.context("loading plain Postgres")?;
        single.batch_execute(SERVER_TIME).await?;
        let mut tiers = Vec::new();
        for shards in SHARDS {
            let tier = Tier::builder().shards(shards).tables(rows::DECLARED).start().await?;
            let (client, console) = (tier.connect().await?, weir_harness::connect(&tier.admin_dsn()).await?);
            rows::load(&client).await.with_context(|| format!("loading {shards} shards"))?;
            tiers.push(Sharded { tier, shards, client, console, counts: BTreeMap::new() });
        }
        Ok(Rig { plain, single, tiers, left_out: 0, refusals: BTreeMap::new() })
    }

    /// Runs the statement of a seed everywhere.
    async fn run(&mut self, seed: u64) -> Result<()> {
        let (statement, decided) = statement(seed);
        let Some(expected) = self.expected(&statement).await? else {
            self.left_out += 1;
            return Ok(());
        };
        for at in 0..self.tiers.len() {
            let tier = &mut self.tiers[at];
            match tier.check(&statement, &decided, &expected).await {
                Ok(Verdict { right, reason }) => {
                    let how = if matches!(expected.0, Answer::Failed { .. }) && right == Right::Equal {
                        "failed alike".to_owned()
                    } else {
                        how(&tier.console, &statement, right).await
                    };
                    *tier.counts.entry(how).or_default() += 1;
                    if let (Some(reason), 0) = (reason, at) {
                        *self.refusals.entry(reason).or_default() += 1;
                    }
                }
                Err(error) => {
                    tier.client = tier.tier.connect().await?;
                    let shards = tier.shards;
                    let small = self.shrink(at, &statement, &decided).await?;
                    bail!(
                        "{shards} shards: {error:#}\n{}\nparameters {:?}\ncut down: {small}",
                        statement.sql,
                        statement.parameters
                    );
                }
            }
        }
        Ok(())
    }

    /// What plain Postgres says in text and in binary; `None`: it took too long.
    async fn expected(&mut self, statement: &Statement) -> Result<Option<(Answer, Answer)>> {
        let both = async {
            anyhow::Ok((text(&self.single, &statement.with_literals()).await?, binary(&self.single, statement).await?))
        };
        let Ok(both) = both.await else {
            self.single = weir_harness::connect(&self.plain.dsn()).await?;
            self.single.batch_execute(SERVER_TIME).await?;
            return Ok(None);
        };
        let slow = |answer: &Answer| matches!(answer, Answer::Failed { code, .. } if code == "57014");
        Ok((!slow(&both.0) && !slow(&both.1)).then_some(both))
    }

    /// Cuts a wrong statement down by leaving out runs of its words, as long as it stays wrong and plain Postgres runs it.
    /// What stands in an ORDER BY, or behind one, stays: without it rows would not be decided.
    async fn shrink(&mut self, at: usize, statement: &Statement, decided: &Decided) -> Result<String> {
        let mut sql = statement.with_literals();
        if *decided == Decided::CountOnly {
            return Ok(sql);
        }
        let (mut length, mut tries) = (words(&sql).len() / 2, 0);
        while length > 0 {
            let (mut from, mut shorter) = (0, false);
            while let Some(shorn) = without(&sql, from, length) {
                tries += 1;
                if tries > SHRINK_TRIES_MAX {
                    return Ok(sql);
                }
                let smaller = Statement { sql: shorn.clone(), parameters: Vec::new(), ..statement.clone() };
                if !fixed_rows(&sql, &shorn) || !self.still_wrong(at, &smaller).await? {
                    from += 1;
                    continue;
                }
                (sql, shorter) = (shorn, true);
            }
            if !shorter || length > 1 {
                length /= 2;
            }
        }
        Ok(sql)
    }

    async fn still_wrong(&mut self, at: usize, statement: &Statement) -> Result<bool> {
        let Some(expected) = self.expected(statement).await? else { return Ok(false) };
        if matches!(expected.0, Answer::Failed { .. }) {
            return Ok(false);
        }
        let tier = &mut self.tiers[at];
        let wrong = tier.check(statement, &Decided::By(Vec::new()), &expected).await.is_err();
        if wrong {
            tier.client = tier.tier.connect().await?;
        }
        Ok(wrong)
    }

    fn figures(&self) -> String {
        let mut text = String::new();
        for tier in &self.tiers {
            let _ = writeln!(text, "{} shards: {:?}", tier.shards, tier.counts);
        }
        let _ = writeln!(text, "left out, because plain Postgres took too long: {}", self.left_out);
        let mut reasons: Vec<_> = self.refusals.iter().collect();
        reasons.sort_by_key(|reason| std::cmp::Reverse(*reason.1));
        for (reason, count) in reasons.into_iter().take(25) {
            let _ = writeln!(text, "  {count:6} {reason}");
        }
        text
    }
}

struct Verdict {
    right: Right,
    /// Why it was refused.
    reason: Option<String>,
}

impl Sharded {
    async fn check(&self, statement: &Statement, decided: &Decided, expected: &(Answer, Answer)) -> Result<Verdict> {
        let literal = statement.with_literals();
        let got = text(&self.client, &literal).await.context("text")?;
        let first = judge(decided, &expected.0, &got).with_context(|| format!("text: {literal}"))?;
        let got = binary(&self.client, statement).await.context("binary")?;
        let second = judge(decided, &expected.1, &got).context("binary")?;
        Ok(if first.right == Right::Refused { first } else { second })
    }
}

/// The statement of a seed.
fn statement(seed: u64) -> (Statement, Decided) {
    let written = Author::new(seed).statement();
    let parameters = written.parameters.into_iter().map(|text| Parameter(Some(text))).collect();
    let family = "random".to_owned();
    let statement = Statement { family, must_be_answered: false, order: Order::Any, sql: written.sql, parameters };
    (statement, written.order)
}

/// Equal, or refused with a reason; anything else is an error.
fn judge(decided: &Decided, expected: &Answer, got: &Answer) -> Result<Verdict> {
    let differs = || format!("plain Postgres: {}\nweir:           {}", show(expected), show(got));
    let equal = Verdict { right: Right::Equal, reason: None };
    match (expected, got) {
        (Answer::Failed { code, .. }, Answer::Failed { code: other, .. }) if code == other => Ok(equal),
        (_, Answer::Failed { code, explained, message }) if code == "0A000" || code == "54000" => {
            ensure!(*explained, "a refusal without DETAIL or HINT\n{}", differs());
            let reason = message.split(" / ").take(2).collect::<Vec<_>>().join(": ");
            Ok(Verdict { right: Right::Refused, reason: Some(reason) })
        }
        (Answer::Rows { columns, rows }, Answer::Rows { columns: other_columns, rows: other_rows }) => {
            ensure!(columns == other_columns, "other columns: {columns:?}, {other_columns:?}");
            let Decided::By(sorted) = decided else {
                ensure!(rows.len() == other_rows.len(), "{} rows, {} rows", rows.len(), other_rows.len());
                return Ok(equal);
            };
            let by = |rows: &[Vec<Option<Vec<u8>>>]| -> Vec<Vec<Option<Vec<u8>>>> {
                rows.iter().map(|row| sorted.iter().map(|at| row[*at].clone()).collect()).collect()
            };
            let (left, right) = (by(rows), by(other_rows));
            ensure!(left == right, "another order\n{}", first_difference(&left, &right));
            let (mut left, mut right) = (rows.clone(), other_rows.clone());
            left.sort();
            right.sort();
            ensure!(left == right, "{}", first_difference(&left, &right));
            Ok(equal)
        }
        _ => bail!("{}", differs()),
    }
}

fn words(sql: &str) -> Vec<&str> {
    sql.split(' ').collect()
}

/// The statement without `length` words from the `from`-th on; `None` at its end.
fn without(sql: &str, from: usize, length: usize) -> Option<String> {
    let words = words(sql);
    let after = words.get(from + length..)?;
    Some([&words[..from], after].concat().join(" "))
}

/// Is everything that decides which rows are returned still there?
fn fixed_rows(before: &str, after: &str) -> bool {
    let count = |sql: &str, word: &str| sql.matches(word).count();
    let limits = ["LIMIT", "OFFSET", "FETCH"].iter().map(|word| count(before, word)).sum::<usize>();
    let tail = |sql: &str| sql.find("ORDER BY").map(|at| sql[at..].to_owned());
    if limits == 0 && !before.contains("DISTINCT ON") && !before.contains("OVER (") {
        return true;
    }
    tail(before) == tail(after)
}

#[test]
fn statements_of_a_seed_are_the_same_for_ever() {
    let (first, again) = (statement(42).0, statement(42).0);
    assert_eq!(first.sql, again.sql);
    assert_ne!(first.sql, statement(43).0.sql);
}

/// A statement is not waited for longer than the driver of the corpus does.
#[test]
fn the_servers_time_is_shorter_than_the_wait() {
    assert!(super::ANSWER_WAIT > Duration::from_secs(2));
}
