//! What clients feel of slots that move: how long writes wait while their slots change hands, and what becomes of all others meanwhile.
//!
//! Writes come at a fixed rate, whatever becomes of those before (open loop), and each is timed from the moment at which it was due: a
//! write that could not be sent because the one before it waited has waited as well. Half of them go to keys that move, there and back
//! again, on connections of their own; the other half to keys that stay. Then a fourth shard joins three, and the rows that it got are counted.
//! Non-goals: the speed of the copy, and anything that dies.

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use weir_core::id::Slot;
use weir_core::topology::Key;
use weir_harness::{Cluster, ClusterSpec, Tier};

/// Connections for each kind of keys.
const CONNECTIONS: usize = 16;
/// Around a cut-over, before and after its longest wait.
const AROUND: Duration = Duration::from_millis(500);
/// What is taken as ordinary, before each cut-over.
const BEFORE: Duration = Duration::from_secs(3);
/// Between two looks at a move.
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(600);
const WRITE: &str = "UPDATE accounts SET n = n + 1 WHERE id = $1";
/// Everything that shard0 has moves: half of the keys.
const START: &str = "RESHARD START MOVE SLOTS 0-4095 TO shard1";

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Rows of the table, one tier for each.
    pub rows: Vec<i64>,
    /// There and back, so often.
    pub rounds: u32,
    /// Writes per second, of both kinds together.
    pub rate: u32,
    pub weir: Option<PathBuf>,
}

/// One table that moved there and back several times. Times in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct PauseSample {
    pub rows: i64,
    pub writes: usize,
    pub failed: usize,
    /// Of each cut-over: the longest wait of a write whose key moved.
    pub pauses: Vec<f64>,
    /// The same by the mover's own clock, from the first step to the last.
    pub mover: Vec<f64>,
    /// What the mover did in that time: until statements were held, the lock was got, the rest was applied, the owner had changed.
    pub stages: Vec<[f64; 4]>,
    /// Writes that stay, before cut-overs and around them: median and 99th percentile.
    pub others_before: [f64; 2],
    pub others_around: [f64; 2],
}

/// A fourth shard joined three.
#[derive(Clone, Debug)]
pub struct ShareSample {
    pub rows: i64,
    pub moved: i64,
    pub seconds: f64,
}

/// One write: when it was due, since the start, and how long after that it was done, in seconds.
#[derive(Clone, Copy)]
struct Written {
    due: f64,
    took: f64,
}

impl fmt::Display for PauseSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [_, before] = self.others_before;
        let [_, around] = self.others_around;
        let longest = at(&self.pauses, 1.0);
        let (rows, count, failed) = (self.rows, self.pauses.len(), self.failed);
        write!(
            f,
            "{rows} rows, {count} cut-overs: longest wait {longest:.1} ms, others' p99 {before:.2} → {around:.2} ms, "
        )?;
        write!(f, "{failed} of {} writes failed", self.writes)
    }
}

/// Every table, then the fourth shard.
pub async fn run(wanted: &Wanted) -> Result<(Vec<PauseSample>, Option<ShareSample>)> {
    let mut samples = Vec::new();
    for &rows in &wanted.rows {
        let sample = there_and_back(wanted, rows).await.with_context(|| format!("{rows} rows"))?;
        eprintln!("{sample}");
        samples.push(sample);
    }
    let share = fourth(wanted.rows.iter().copied().max().unwrap_or(10_000).min(100_000), wanted).await?;
    eprintln!("3 to 4 shards: {} of {} rows moved in {:.1} s", share.moved, share.rows, share.seconds);
    Ok((samples, Some(share)))
}

async fn filled(shards: u32, rows: i64, wanted: &Wanted) -> Result<Tier> {
    let builder = Tier::builder().shards(shards).tables(&["accounts(id bigint)"]);
    let tier = builder.config_extra("[log]\nformat = \"json\"").weir(wanted.weir.clone()).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE accounts (id bigint PRIMARY KEY, n bigint NOT NULL, note text)").await?;
    let sink = client.copy_in("COPY accounts FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    let mut text = String::new();
    for id in 0..rows {
        writeln!(text, "{id}\t0\tsomething that is said of account {id}")?;
        if text.len() > 64 * 1024 || id + 1 == rows {
            futures_util::SinkExt::send(&mut sink, bytes::Bytes::from(std::mem::take(&mut text))).await?;
        }
    }
    sink.finish().await?;
    for shard in &tier.shards {
        shard.primary.admin("shop").await?.batch_execute("VACUUM ANALYZE accounts").await?;
    }
    Ok(tier)
}

async fn there_and_back(wanted: &Wanted, rows: i64) -> Result<PauseSample> {
    let tier = filled(2, rows, wanted).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let owners = owners(&console).await?;
    let (moving, staying): (Vec<i64>, Vec<i64>) = (0..rows).partition(|id| owners[Key::Int(*id).slot().index()] == 0);
    let began = Instant::now();
    let (stop, stopped) = watch::channel(false);
    let [moving, staying] = [(moving, 0.0), (staying, 0.5)].map(|(keys, shift)| {
        let pace = f64::from(wanted.rate) / 2.0;
        tokio::spawn(writes(tier.dsn("shop"), keys, (pace, shift, began), stopped.clone()))
    });
    let mut turns = Vec::new();
    for round in 1..=wanted.rounds {
        said(&console, START).await?;
        reaches(&console, "ready").await?;
        turns.push(turn(&console, ("RESHARD CUTOVER", "reverse"), began).await?);
        turns.push(turn(&console, ("RESHARD ROLLBACK", "rolled_back"), began).await?);
        eprintln!("round {round}/{}: {rows} rows went there and back", wanted.rounds);
    }
    tokio::time::sleep(AROUND).await;
    stop.send_replace(true);
    let ((moving, failed), (staying, failed_too)) = (moving.await??, staying.await??);
    let mut sample = PauseSample { rows, failed: failed + failed_too, ..PauseSample::default() };
    sample.writes = moving.len() + staying.len() + sample.failed;
    judge(&mut sample, &turns, (&moving, &staying))?;
    sample.stages = stages(&tier.weir_log());
    sample.mover = sample.stages.iter().map(|stages| stages[3]).collect();
    Ok(sample)
}

/// A cut-over, between two moments since the start.
#[derive(Clone, Copy)]
struct Turn {
    from: f64,
    until: f64,
}

async fn turn(console: &Client, (order, phase): (&str, &str), began: Instant) -> Result<Turn> {
    tokio::time::sleep(BEFORE).await;
    let from = began.elapsed().as_secs_f64();
    said(console, order).await?;
    reaches(console, phase).await?;
    Ok(Turn { from, until: began.elapsed().as_secs_f64() })
}

fn judge(sample: &mut PauseSample, turns: &[Turn], (moving, staying): (&[Written], &[Written])) -> Result<()> {
    let (mut before, mut around) = (Vec::new(), Vec::new());
    for turn in turns {
        let within = |from: f64, until: f64| move |one: &&Written| from <= one.due && one.due < until;
        let hit = moving.iter().filter(within(turn.from, turn.until));
        let hit = hit.max_by(|one, other| one.took.total_cmp(&other.took)).context("nothing was written meanwhile")?;
        sample.pauses.push(hit.took * 1e3);
        let took = |one: &Written| one.took * 1e3;
        before.extend(staying.iter().filter(within(turn.from - BEFORE.as_secs_f64(), turn.from)).map(took));
        let middle = hit.due + hit.took / 2.0;
        let half = AROUND.as_secs_f64();
        around.extend(staying.iter().filter(within(middle - half, middle + half)).map(took));
    }
    ensure!(!before.is_empty() && !around.is_empty(), "nothing was written to keys that stay");
    sample.others_before = [at(&before, 0.5), at(&before, 0.99)];
    sample.others_around = [at(&around, 0.5), at(&around, 0.99)];
    Ok(())
}

/// Writes at `pace` per second, from a `shift` of its distance on; gives all that were done, and how many were refused.
async fn writes(
    dsn: String,
    keys: Vec<i64>,
    (pace, shift, began): (f64, f64, Instant),
    stopped: watch::Receiver<bool>,
) -> Result<(Vec<Written>, usize)> {
    let (mut writers, keys) = (JoinSet::new(), Arc::new(keys));
    for number in 0..CONNECTIONS {
        let client = weir_harness::connect(&dsn).await?;
        let (keys, stopped) = (Arc::clone(&keys), stopped.clone());
        let due = move |turn: usize| ((turn * CONNECTIONS + number) as f64 + shift) / pace;
        writers.spawn(async move {
            let statement = client.prepare(WRITE).await?;
            let (mut done, mut failed) = (Vec::new(), 0);
            // The turn that is due now: connecting took a while.
            let first = (began.elapsed().as_secs_f64() * pace / CONNECTIONS as f64) as usize + 1;
            for turn in first.. {
                let mut due = due(turn);
                if began.elapsed().as_secs_f64() < due {
                    tokio::time::sleep_until((began + Duration::from_secs_f64(due)).into()).await;
                    // That our own timer is late is nobody's wait.
                    due = began.elapsed().as_secs_f64();
                }
                if *stopped.borrow() {
                    break;
                }
                // Spread over all keys, without a key twice at one time.
                let key = keys[(turn * CONNECTIONS + number) * 7919 % keys.len()];
                match client.execute(&statement, &[&key]).await {
                    Ok(_) => done.push(Written { due, took: began.elapsed().as_secs_f64() - due }),
                    Err(error) => {
                        eprintln!("a write failed: {error:?}");
                        failed += 1;
                    }
                }
            }
            Ok::<_, anyhow::Error>((done, failed))
        });
    }
    let (mut done, mut failed) = (Vec::new(), 0);
    while let Some(writer) = writers.join_next().await {
        let (of_one, refused) = writer??;
        done.extend(of_one);
        failed += refused;
    }
    Ok((done, failed))
}

/// Shard by slot, as the console says.
async fn owners(console: &Client) -> Result<Vec<i64>> {
    let mut owners = vec![0; Slot::COUNT];
    for row in said(console, "SHOW SLOTS").await? {
        let number = |name: &str| -> Result<i64> { Ok(row.get(name).context("a number")?.parse()?) };
        let (first, last) = (number("first_slot")? as usize, number("last_slot")? as usize);
        owners[first..=last].fill(number("shard")?);
    }
    Ok(owners)
}

/// What the console answers; asked again while the move has just gone on, or the last one is not over everywhere.
async fn said(console: &Client, command: &str) -> Result<Vec<SimpleQueryRow>> {
    let began = Instant::now();
    loop {
        match console.simple_query(command).await {
            Ok(messages) => {
                let rows = messages.into_iter();
                return Ok(rows
                    .filter_map(|one| if let SimpleQueryMessage::Row(row) = one { Some(row) } else { None })
                    .collect());
            }
            Err(error)
                if began.elapsed() < Duration::from_secs(10)
                    && error.code().is_some_and(|code| matches!(code.code(), "55000" | "55006")) =>
            {
                tokio::time::sleep(LOOK).await;
            }
            Err(error) => return Err(error).context(command.to_owned()),
        }
    }
}

/// Waits until all moves that are not over are in this phase.
async fn reaches(console: &Client, phase: &str) -> Result<()> {
    let began = Instant::now();
    let mut last = Vec::new();
    while began.elapsed() < PATIENCE {
        let moves = said(console, "SHOW MOVES").await?;
        let is_over = |phase: &str| matches!(phase, "done" | "cancelled" | "rolled_back");
        let phases: Vec<&str> = moves.iter().filter_map(|row| row.get("phase")).collect();
        if phases.last() == Some(&phase) && phases.iter().all(|one| *one == phase || is_over(one)) {
            return Ok(());
        }
        last = moves.iter().map(|row| format!("{:?} {:?}", row.get("phase"), row.get("error"))).collect();
        tokio::time::sleep(LOOK).await;
    }
    bail!("not all moves reached {phase}: {last:?}")
}

/// From lines of weir's log in JSON: how long each step of each cut-over took, and all of it.
fn stages(log: &str) -> Vec<[f64; 4]> {
    let of_line = |line: &str| -> Option<[f64; 4]> {
        let fields = serde_json::from_str::<Value>(line).ok()?.get("fields")?.clone();
        let ms = |name: &str| milliseconds(fields.get(name)?.as_str()?);
        let (held, locked, drained, done) = (ms("held")?, ms("locked")?, ms("drained")?, ms("done")?);
        Some([held, locked - held, drained - locked, done])
    };
    log.lines().filter_map(of_line).collect()
}

/// A duration as Rust prints it.
fn milliseconds(text: &str) -> Option<f64> {
    let units = [("ms", 1.0), ("µs", 1e-3), ("ns", 1e-6), ("s", 1e3)];
    units.iter().find_map(|(unit, times)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * times))
}

/// Three shards, and one that joins.
async fn fourth(rows: i64, wanted: &Wanted) -> Result<ShareSample> {
    let tier = filled(3, rows, wanted).await?;
    let spec = ClusterSpec::new("added", &tier.state.admin_password);
    let added = Cluster::start(&tier.run, spec.database("shop", "shop", &tier.state.shop_password)).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let began = Instant::now();
    said(&console, &format!("RESHARD START ADD SHARD shard3 '{}'", added.address())).await?;
    for (phase, order) in [("ready", "RESHARD CUTOVER"), ("reverse", "RESHARD COMPLETE")] {
        reaches(&console, phase).await?;
        said(&console, order).await?;
    }
    reaches(&console, "done").await?;
    let seconds = began.elapsed().as_secs_f64();
    let count = "SELECT count(*) FROM accounts";
    let moved: i64 = added.admin("shop").await?.query_one(count, &[]).await?.try_get(0)?;
    let mut all = moved;
    for shard in &tier.shards {
        all += shard.primary.admin("shop").await?.query_one(count, &[]).await?.try_get::<_, i64>(0)?;
    }
    ensure!(all == rows, "{all} rows are left of {rows}");
    Ok(ShareSample { rows, moved, seconds })
}

/// A percentile; nothing of nothing.
fn at(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

/// As a table in Markdown.
pub fn table(samples: &[PauseSample], share: Option<&ShareSample>) -> String {
    let mut text = String::new();
    if !samples.is_empty() {
        text.push_str("\nHalf of all keys move to the other shard and back; writes at a fixed rate, timed from when they were due (ms):\n\n");
        text.push_str("| Rows | cut-overs | a moving key's write waits, p50 | p99 | max | mover: hold | lock | drain | flip | others' p50 before | around | p99 before | around | failed of writes |\n");
        text.push_str("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    }
    for sample in samples {
        let stage = |number: usize| {
            let of = |stages: &[f64; 4]| match number {
                3 => stages[3] - stages[0] - stages[1] - stages[2],
                number => stages[number],
            };
            at(&sample.stages.iter().map(of).collect::<Vec<_>>(), 0.5)
        };
        let ([before, before99], [around, around99]) = (sample.others_before, sample.others_around);
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {before:.2} | {around:.2} | {before99:.2} | {around99:.2} | {} of {} |",
            sample.rows,
            sample.pauses.len(),
            at(&sample.pauses, 0.5),
            at(&sample.pauses, 0.99),
            at(&sample.pauses, 1.0),
            stage(0),
            stage(1),
            stage(2),
            stage(3),
            sample.failed,
            sample.writes,
        );
    }
    if let Some(share) = share {
        let percent = share.moved as f64 / share.rows as f64 * 100.0;
        let (moved, rows, seconds) = (share.moved, share.rows, share.seconds);
        let _ = writeln!(text, "\n3 shards to 4: {moved} of {rows} rows moved, {percent:.1} %, in {seconds:.1} s.");
    }
    text
}

pub fn to_json(samples: &[PauseSample], share: Option<&ShareSample>) -> Value {
    let one = |sample: &PauseSample| {
        json!({
            "rows": sample.rows, "writes": sample.writes, "failed": sample.failed, "pauses_ms": sample.pauses,
            "mover_ms": sample.mover, "others_before_ms": sample.others_before, "others_around_ms": sample.others_around,
        })
    };
    let share = share.map(|share| json!({ "rows": share.rows, "moved": share.moved, "seconds": share.seconds }));
    json!({ "pauses": samples.iter().map(one).collect::<Vec<_>>(), "fourth_shard": share })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_the_log() {
        let log = "no json\n{\"fields\":{\"message\":\"other\"}}\n{\"fields\":{\"message\":\"the slots of a move have another owner\",\
                   \"held\":\"8.5ms\",\"locked\":\"9ms\",\"drained\":\"1.009s\",\"done\":\"1.0095s\"}}\n";
        let found = stages(log);
        assert_eq!(found.len(), 1);
        let expected = [8.5, 0.5, 1000.0, 1009.5];
        assert!(found[0].iter().zip(expected).all(|(one, other)| (one - other).abs() < 1e-6), "{found:?}");
        assert_eq!([milliseconds("500µs"), milliseconds("x")], [Some(0.5), None]);
    }

    #[test]
    fn a_write_that_waited_its_turn_has_waited() {
        let written = |due, took| Written { due, took };
        let moving = [written(4.9, 0.001), written(5.0, 0.200), written(5.1, 0.100), written(6.0, 0.9)];
        let staying: Vec<Written> = (0..80).map(|number| written(f64::from(number) * 0.1, 0.002)).collect();
        let mut sample = PauseSample::default();
        judge(&mut sample, &[Turn { from: 4.5, until: 5.5 }], (&moving, &staying)).expect("samples");
        assert_eq!((sample.pauses, sample.others_around), (vec![200.0], [2.0, 2.0]));
    }
}
