//! How fast a move copies, beside a pipe: `COPY … TO STDOUT` of one server into `COPY … FROM STDIN` of the other, same servers, same
//! columns, same primary key.
//!
//! Both begin with an empty table and end when the last row is committed. The move does more: it picks the rows of its slots, makes a
//! replication slot, and has guards; its time is that of its phase `copy`, as the hub has it. They take turns, so that what else the machine
//! does hits both. Non-goals: catching up, comparing, and clients beside it.

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_postgres::Client;
use weir_harness::{Tier, connect};

use crate::cost::usage;

/// Longest wait for a phase of a move.
const PATIENCE: Duration = Duration::from_secs(1800);
const LOOK: Duration = Duration::from_millis(20);
/// What a row takes in the table.
const ROW_BYTES: usize = 256;
const FILLER: usize = ROW_BYTES - 80;

/// How the rows went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Pipe,
    Move,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Pipe => "COPY | COPY",
            Way::Move => "a move",
        }
    }
}

/// One copy of all rows.
#[derive(Clone, Debug)]
pub struct CopySample {
    way: Way,
    rows: u64,
    table_bytes: u64,
    seconds: f64,
    /// Processor time of weir; of the pipe it is the client's, and not measured.
    proxy_seconds: Option<f64>,
}

impl fmt::Display for CopySample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:.1} s, {:.0} MB/s", self.way.name(), self.seconds, self.rate())
    }
}

impl CopySample {
    /// Megabytes of the source's table per second.
    fn rate(&self) -> f64 {
        self.table_bytes as f64 / 1e6 / self.seconds
    }
}

/// A table of so many megabytes goes from one shard to the other, `rounds` times each way.
pub async fn run(megabytes: usize, rounds: u32, weir: Option<PathBuf>) -> Result<Vec<CopySample>> {
    let builder = Tier::builder().shards(2).tables(&["events(user_id bigint)"]);
    let tier = builder.config_extra("[cache]\nenabled = false").weir(weir).start().await?;
    let [source, target] = [tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?];
    let (hub, console) = (tier.hub.admin("weir_hub").await?, connect(&tier.admin_dsn()).await?);
    let (rows, table_bytes) = fill(&tier, (&source, &hub), megabytes).await?;
    target.batch_execute("CREATE TABLE public.piped (LIKE events INCLUDING ALL)").await?;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for way in [Way::Pipe, Way::Move] {
            for server in [&source, &target] {
                server.batch_execute("CHECKPOINT").await?;
            }
            let before = tier.weir_pid().map(usage);
            let seconds = match way {
                Way::Pipe => pipe(&source, &target).await?,
                Way::Move => moved(&hub, &console).await?,
            };
            let after = tier.weir_pid().map(usage);
            let proxy_seconds = before.zip(after).map(|(before, after)| after.since(before).cpu.as_secs_f64());
            let proxy_seconds = proxy_seconds.filter(|_| way == Way::Move);
            let sample = CopySample { way, rows, table_bytes, seconds, proxy_seconds };
            eprintln!("round {round}/{rounds}: {sample}");
            samples.push(sample);
            match way {
                Way::Pipe => target.batch_execute("TRUNCATE public.piped").await?,
                Way::Move => {
                    console.simple_query("RESHARD CANCEL").await?;
                    reaches(&hub, "cancelled").await?;
                    target.batch_execute("VACUUM (TRUNCATE) events").await?;
                }
            }
        }
    }
    Ok(samples)
}

/// Rows of slots that the first shard owns, and how many bytes they are.
async fn fill(tier: &Tier, (source, hub): (&Client, &Client), megabytes: usize) -> Result<(u64, u64)> {
    let made = "CREATE TABLE events (user_id bigint, n bigint, at timestamptz, amount numeric(10,2), note text, PRIMARY KEY (user_id, n))";
    tier.connect().await?.batch_execute(made).await?;
    let owned: Vec<i32> = hub
        .query("SELECT slot::int4 FROM weir.slot l JOIN weir.shard s ON (s.database, s.id) = (l.database, l.shard) WHERE s.name = 'shard0'", &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let wanted = (megabytes * 1_000_000 / ROW_BYTES) as i64;
    // About half of the keys are the first shard's.
    let sql = "INSERT INTO events SELECT k, n, now(), n * 1.5, repeat(md5(k::text), 1 + $3 / 32)
               FROM generate_series(1, $1::int8 / 5) k, generate_series(1, 10) n
               WHERE ((hashint8extended(k, 0) >> 52) & 4095)::int4 = ANY ($2)";
    let rows = source.execute(sql, &[&wanted, &owned, &(FILLER as i32)]).await?;
    source.batch_execute("VACUUM ANALYZE events").await?;
    let bytes: i64 = source.query_one("SELECT pg_table_size('events')", &[]).await?.get(0);
    Ok((rows, bytes as u64))
}

/// Seconds of a copy from server to server by one connection each.
async fn pipe(source: &Client, target: &Client) -> Result<f64> {
    let begun = Instant::now();
    let rows = source.copy_out("COPY events TO STDOUT (FORMAT binary)").await?;
    let sink = target.copy_in::<_, Bytes>("COPY public.piped FROM STDIN (FORMAT binary)").await?;
    tokio::pin!(rows, sink);
    while let Some(row) = rows.next().await {
        sink.feed(row?).await?;
    }
    sink.finish().await?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Seconds of the phase `copy` of a move of all that the first shard has.
async fn moved(hub: &Client, console: &Client) -> Result<f64> {
    console.simple_query("RESHARD START MOVE SLOTS 0-4095 TO shard1").await?;
    reaches(hub, "copy").await?;
    let begun = Instant::now();
    while phase(hub).await?.0 == "copy" {
        tokio::time::sleep(LOOK).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    reaches(hub, "ready").await?;
    Ok(seconds)
}

/// Of the last move, with its error.
async fn phase(hub: &Client) -> Result<(String, Option<String>)> {
    let row = hub.query_one("SELECT phase, error FROM weir.move ORDER BY id DESC LIMIT 1", &[]).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

async fn reaches(hub: &Client, wanted: &str) -> Result<()> {
    let begun = Instant::now();
    let mut last = None;
    while begun.elapsed() < PATIENCE {
        let (phase, error) = phase(hub).await.context("the move")?;
        if phase == wanted {
            return Ok(());
        }
        last = Some((phase, error));
        tokio::time::sleep(LOOK).await;
    }
    bail!("the move did not reach {wanted}: {last:?}")
}

pub fn put_table(samples: &[CopySample], text: &mut String) {
    let Some(first) = samples.first() else { return };
    let megabytes = first.table_bytes as f64 / 1e6;
    let _ = writeln!(text, "\n{} rows ({megabytes:.0} MB) copied from one server to the other:\n", first.rows);
    text.push_str("| Way | s | MB/s | ÷ COPY \\| COPY, MB/s | weir CPU s |\n|---|--:|--:|--:|--:|\n");
    let of = |way: Way, figure: fn(&CopySample) -> f64| {
        crate::report::median(samples.iter().filter(|sample| sample.way == way).map(figure).collect())
            .unwrap_or_default()
    };
    for way in [Way::Pipe, Way::Move] {
        let cpu = of(way, |sample| sample.proxy_seconds.unwrap_or_default());
        let _ = writeln!(
            text,
            "| {} | {:.1} | {:.0} | {:.2} | {cpu:.1} |",
            way.name().replace('|', "\\|"),
            of(way, |sample| sample.seconds),
            of(way, CopySample::rate),
            of(way, CopySample::rate) / of(Way::Pipe, CopySample::rate),
        );
    }
}

pub fn json(samples: &[CopySample]) -> Vec<Value> {
    let one = |sample: &CopySample| {
        json!({
            "way": sample.way.name(), "rows": sample.rows, "table_bytes": sample.table_bytes, "seconds": sample.seconds,
            "proxy_cpu_seconds": sample.proxy_seconds,
        })
    };
    samples.iter().map(one).collect()
}
