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
//! still wrong. Reading order: the test → [`Rig`] → [`Lane`] → [`judge`] → [`shrink`]; the statements come from [`author`].
//! Non-goal: errors while a statement runs; the author writes none, since which row fails first is not decided.

mod author;
mod blocks;
mod dice;
mod rows;
mod values;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use author::{Author, Decided};
pub use dice::Dice;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use weir_harness::{Plain, Tier};

use super::near::Near;
use super::{Answer, Order, Parameter, Right, Statement, binary, first_difference, how, show, text};

const SEEDS: &str = include_str!("random/seeds.txt");
const SHARDS: [u32; 3] = [2, 3, 5];
/// Of each of the two series of a short run.
const STATEMENTS: u64 = 150;
/// Statements that are on their way at the same time.
const LANES: u64 = 4;
/// After so many wrong ones a run ends.
const WRONG_MAX: usize = 8;
/// Tries to cut one wrong statement down.
const SHRINK_TRIES_MAX: usize = 1500;
/// Joins may multiply rows; what takes plain Postgres longer is left out.
const SERVER_TIME: &str = "SET statement_timeout = '2s'";
/// Through weir a sub-query of each row may be a question to every shard; what takes longer counts as refused.
const WEIR_TIME: &str = "SET statement_timeout = '30s'";

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
    let rig = Arc::new(Rig::start().await?);
    let lanes = number("WEIR_RANDOM_LANES").unwrap_or(LANES).max(1);
    let (seeds, begun) = (Arc::new(seeds), Instant::now());
    let mut running = JoinSet::new();
    for lane in 0..lanes as usize {
        let (rig, seeds) = (Arc::clone(&rig), Arc::clone(&seeds));
        running.spawn(async move {
            let mut lane = (Lane::start(&rig).await?, lane);
            while let Some(seed) = seeds.get(lane.1) {
                if let Err(error) = lane.0.run(*seed).await {
                    eprintln!("WRONG, seed {seed}: {error:#}\n");
                    rig.totals.lock().wrong.push(format!("seed {seed}: {error:#}"));
                }
                let mut totals = rig.totals.lock();
                totals.done += 1;
                if totals.wrong.len() >= WRONG_MAX {
                    break;
                }
                if totals.done % 1000 == 0 {
                    eprintln!("{} statements in {:?}\n{}", totals.done, begun.elapsed(), totals.figures());
                }
                lane.1 += lanes as usize;
            }
            anyhow::Ok(())
        });
    }
    while let Some(lane) = running.join_next().await {
        lane??;
    }
    let totals = std::mem::take(&mut *rig.totals.lock());
    let (wrong, took) = (&totals.wrong, begun.elapsed());
    eprintln!("{} statements in {took:?}, {} wrong\n{}", totals.done, wrong.len(), totals.figures());
    ensure!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
    let merged = |shards: &u32| totals.counts.get(shards).is_some_and(|counts| counts.contains_key("merged"));
    ensure!(SHARDS.iter().all(merged), "hardly anything was answered");
    Ok(())
}

/// The servers, and what they did.
struct Rig {
    plain: Plain,
    tiers: Vec<(u32, Tier)>,
    totals: Mutex<Totals>,
}

#[derive(Default)]
struct Totals {
    done: u64,
    wrong: Vec<String>,
    left_out: u32,
    /// How statements were answered, by the number of shards.
    counts: BTreeMap<u32, BTreeMap<String, u32>>,
    refusals: BTreeMap<String, u32>,
}

/// Connections on which one statement after the other runs, on all servers at the same time.
struct Lane {
    rig: Arc<Rig>,
    single: Client,
    sharded: Vec<Sharded>,
}

/// A lane's connections to a tier.
struct Sharded {
    shards: u32,
    client: Client,
    console: Client,
}

impl Rig {
    async fn start() -> Result<Self> {
        let plain = Plain::start().await?;
        let single = weir_harness::connect(&plain.dsn()).await?;
        rows::load(&single).await.context("loading plain Postgres")?;
        let mut tiers = Vec::new();
        for shards in SHARDS {
            let tier = Tier::builder().shards(shards).tables(rows::DECLARED).start().await?;
            rows::load(&tier.connect().await?).await.with_context(|| format!("loading {shards} shards"))?;
            tiers.push((shards, tier));
        }
        Ok(Rig { plain, tiers, totals: Mutex::default() })
    }

    async fn single(&self) -> Result<Client> {
        let single = weir_harness::connect(&self.plain.dsn()).await?;
        single.batch_execute(SERVER_TIME).await?;
        Ok(single)
    }
}

impl Lane {
    async fn start(rig: &Arc<Rig>) -> Result<Self> {
        let mut sharded = Vec::new();
        for (shards, tier) in &rig.tiers {
            let console = weir_harness::connect(&tier.admin_dsn()).await?;
            sharded.push(Sharded { shards: *shards, client: timed(tier).await?, console });
        }
        Ok(Lane { rig: Arc::clone(rig), single: rig.single().await?, sharded })
    }

    /// Runs the statement of a seed everywhere.
    async fn run(&mut self, seed: u64) -> Result<()> {
        let (statement, decided) = statement(seed);
        let near = Near::of(&self.single, &statement).await?;
        let Some(expected) = self.expected(&statement).await? else {
            self.rig.totals.lock().left_out += 1;
            return Ok(());
        };
        let [first, second, third] = self.sharded.as_slice() else { bail!("not as many tiers as expected") };
        let question = (&statement, &decided, (&expected, &near));
        let (first, second, third) = tokio::join!(first.ask(question), second.ask(question), third.ask(question));
        for (at, outcome) in [first, second, third].into_iter().enumerate() {
            let shards = self.sharded[at].shards;
            match outcome {
                Ok((how, reason)) => {
                    let mut totals = self.rig.totals.lock();
                    *totals.counts.entry(shards).or_default().entry(how).or_default() += 1;
                    if let (Some(reason), 0) = (reason, at) {
                        *totals.refusals.entry(reason).or_default() += 1;
                    }
                }
                Err(error) => {
                    self.renew(at).await?;
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

    /// A new connection, since the old one may be stuck in a statement.
    async fn renew(&mut self, at: usize) -> Result<()> {
        self.sharded[at].client = timed(&self.rig.tiers[at].1).await?;
        Ok(())
    }

    /// What plain Postgres says in text and in binary; `None`: it took too long.
    async fn expected(&mut self, statement: &Statement) -> Result<Option<(Answer, Answer)>> {
        let both = async {
            anyhow::Ok((text(&self.single, &statement.with_literals()).await?, binary(&self.single, statement).await?))
        };
        let Ok(both) = both.await else {
            self.single = self.rig.single().await?;
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
        let near = Near::of(&self.single, statement).await?;
        let Some(expected) = self.expected(statement).await? else { return Ok(false) };
        if matches!(expected.0, Answer::Failed { .. }) {
            return Ok(false);
        }
        let client = &self.sharded[at].client;
        let wrong = check(client, statement, &Decided::By(Vec::new()), (&expected, &near)).await.is_err();
        if wrong {
            self.renew(at).await?;
        }
        Ok(wrong)
    }
}

impl Sharded {
    /// How it was answered, and why not.
    async fn ask(
        &self,
        (statement, decided, right): (&Statement, &Decided, (&(Answer, Answer), &Near)),
    ) -> Result<(String, Option<String>)> {
        let checked = check(&self.client, statement, decided, right).await?;
        let alike = matches!(right.0.0, Answer::Failed { .. }) && checked.right == Right::Equal;
        let how = if alike { "failed alike".to_owned() } else { how(&self.console, statement, checked.right).await };
        Ok((how, checked.reason))
    }
}

impl Totals {
    fn figures(&self) -> String {
        let mut text = String::new();
        for (shards, counts) in &self.counts {
            let _ = writeln!(text, "{shards} shards: {counts:?}");
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

/// A connection through weir that waits no longer than the test does.
async fn timed(tier: &Tier) -> Result<Client> {
    let client = tier.connect().await?;
    client.batch_execute(WEIR_TIME).await?;
    Ok(client)
}

struct Verdict {
    right: Right,
    /// Why it was refused.
    reason: Option<String>,
}

/// One statement through weir, in text and in binary.
async fn check(
    client: &Client,
    statement: &Statement,
    decided: &Decided,
    (expected, near): (&(Answer, Answer), &Near),
) -> Result<Verdict> {
    let literal = statement.with_literals();
    let got = text(client, &literal).await.context("text")?;
    let first = judge(decided, &expected.0, &got, (near, false)).with_context(|| format!("text: {literal}"))?;
    let got = binary(client, statement).await.context("binary")?;
    let second = judge(decided, &expected.1, &got, (near, true)).context("binary")?;
    Ok(if first.right == Right::Refused { first } else { second })
}

/// The statement of a seed.
fn statement(seed: u64) -> (Statement, Decided) {
    let written = Author::new(seed).statement();
    let parameters = written.parameters.into_iter().map(|text| Parameter(Some(text))).collect();
    let family = "random".to_owned();
    let (order, near) = (Order::Any, written.near);
    let statement = Statement { family, must_be_answered: false, order, near, sql: written.sql, parameters };
    (statement, written.order)
}

/// Equal, or refused with a reason; anything else is an error.
fn judge(decided: &Decided, expected: &Answer, got: &Answer, (near, binary): (&Near, bool)) -> Result<Verdict> {
    let differs = || format!("plain Postgres: {}\nweir:           {}", show(expected), show(got));
    let equal = Verdict { right: Right::Equal, reason: None };
    match (expected, got) {
        (Answer::Failed { code, .. }, Answer::Failed { code: other, .. }) if code == other => Ok(equal),
        (_, Answer::Failed { code, explained, message }) if code == "0A000" || code == "54000" => {
            ensure!(*explained, "a refusal without DETAIL or HINT\n{}", differs());
            let reason = message.split(" / ").take(2).collect::<Vec<_>>().join(": ");
            Ok(Verdict { right: Right::Refused, reason: Some(reason) })
        }
        (Answer::Rows { .. }, Answer::Failed { code, .. }) if code == "57014" => {
            Ok(Verdict { right: Right::Refused, reason: Some("it took too long".to_owned()) })
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
            let ordered = near.by(sorted).in_order(&left, &right, binary);
            ensure!(ordered, "another order\n{}", first_difference(&left, &right));
            let (mut left, mut right) = (rows.clone(), other_rows.clone());
            let same = near.in_any_order(&left, &right, binary);
            left.sort();
            right.sort();
            ensure!(same, "{}", first_difference(&left, &right));
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
