//! How much replicas and the cache take off the primary while it is written to and the replica lags.
//!
//! One shard with one replica that applies every commit so many milliseconds late (`recovery_min_apply_delay`), strict reads, uniform keys,
//! 5 % writes. Counted is what the primary was asked, by weir's own count of statements per server. Closed loop.
//! Non-goals: what it costs ([`crate::mixed`]).

use std::fmt::{self, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_postgres::Client;
use weir_harness::Tier;

const CONNECTIONS: usize = 16;
const KEYS: i64 = 100_000;
const WRITE_PERCENT: u64 = 5;
const LAG_MS: u32 = 5;
const WARM_UP: Duration = Duration::from_secs(1);

/// Once, with or without the cache.
#[derive(Clone, Debug)]
pub struct OffSample {
    pub cached: bool,
    pub reads: f64,
    /// Share of reads that something else than the primary answered.
    pub off_primary: f64,
}

impl fmt::Display for OffSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let with = if self.cached { "replica and cache" } else { "replica" };
        write!(f, "{with}: {:.0} reads/s, {:.1} % off the primary", self.reads, self.off_primary * 100.0)
    }
}

pub async fn run(length: Duration, rounds: u32, weir: Option<PathBuf>) -> Result<Vec<OffSample>> {
    let mut tiers = Vec::new();
    for cached in [false, true] {
        let cache = if cached { "[cache]\ndecoding = \"off\"" } else { "[cache]\nenabled = false\ndecoding = \"off\"" };
        let builder = Tier::builder().shards(1).replicas(1).tables(&["registers(id bigint)"]).config_extra(cache);
        let tier = builder.weir(weir.clone()).start().await?;
        tier.connect()
            .await?
            .batch_execute("CREATE TABLE registers (id bigint PRIMARY KEY, n bigint, body text)")
            .await?;
        let filled =
            format!("INSERT INTO registers SELECT id, 0, repeat('v', 200) FROM generate_series(0, {KEYS} - 1) id");
        tier.shards[0].primary.admin("shop").await?.batch_execute(&format!("{filled}; ANALYZE registers")).await?;
        let replica = tier.shards[0].replicas[0].admin("shop").await?;
        replica.batch_execute(&format!("ALTER SYSTEM SET recovery_min_apply_delay = '{LAG_MS}ms'")).await?;
        replica.batch_execute("SELECT pg_reload_conf()").await?;
        tiers.push((cached, tier));
    }
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for (cached, tier) in &tiers {
            let sample = measured(tier, *cached, length).await?;
            eprintln!("round {round}/{rounds}: {sample}");
            samples.push(sample);
        }
    }
    Ok(samples)
}

async fn measured(tier: &Tier, cached: bool, length: Duration) -> Result<OffSample> {
    let from = Instant::now() + WARM_UP;
    let until = from + length;
    let mut loops = JoinSet::new();
    for connection in 0..CONNECTIONS {
        loops.spawn(keep_asking(tier.connect().await?, connection as u64 + 1, (from, until)));
    }
    tokio::time::sleep_until(from.into()).await;
    let before = asked_of_primary(tier).await?;
    tokio::time::sleep_until(until.into()).await;
    let asked = asked_of_primary(tier).await? - before;
    let (mut reads, mut writes) = (0.0, 0.0);
    while let Some(ended) = loops.join_next().await {
        let (read, written) = ended??;
        (reads, writes) = (reads + read, writes + written);
    }
    ensure!(reads > 0.0, "nothing was asked");
    // What was asked of it beside the writes; statements at the edges blur it a little.
    let on_primary = ((asked - writes) / reads).clamp(0.0, 1.0);
    Ok(OffSample { cached, reads: reads / length.as_secs_f64(), off_primary: 1.0 - on_primary })
}

async fn asked_of_primary(tier: &Tier) -> Result<f64> {
    let (_, metrics) = tier.http_get("/metrics").await?;
    let lines =
        metrics.lines().filter(|line| line.starts_with("weir_queries_total{") && line.contains("role=\"primary\""));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

async fn keep_asking(client: Client, mut seed: u64, (from, until): (Instant, Instant)) -> Result<(f64, f64)> {
    let read = client.prepare("SELECT n, body FROM registers WHERE id = $1").await?;
    let write = client.prepare("UPDATE registers SET n = n + 1 WHERE id = $1").await?;
    let (mut reads, mut writes) = (0.0, 0.0);
    loop {
        let began = Instant::now();
        if began >= until {
            return Ok((reads, writes));
        }
        let is_write = crate::mixed::next(&mut seed) % 100 < WRITE_PERCENT;
        let key = (crate::mixed::next(&mut seed) % KEYS as u64) as i64;
        if is_write {
            client.execute(&write, &[&key]).await?;
        } else {
            client.query_one(&read, &[&key]).await?;
        }
        if began >= from {
            *if is_write { &mut writes } else { &mut reads } += 1.0;
        }
    }
}

/// As a table in Markdown.
pub fn table(samples: &[OffSample], median: fn(Vec<f64>) -> Option<f64>) -> String {
    let mut text = String::new();
    for cached in [false, true] {
        let of = |figure: fn(&OffSample) -> f64| {
            median(samples.iter().filter(|sample| sample.cached == cached).map(figure).collect())
        };
        let (Some(reads), Some(off)) = (of(|one| one.reads), of(|one| one.off_primary)) else { continue };
        if text.is_empty() {
            let _ = writeln!(
                text,
                "\nStrict reads of {KEYS} keys with {WRITE_PERCENT} % writes, one replica that lags {LAG_MS} ms, {CONNECTIONS} connections:\n"
            );
            text.push_str("| Answered by | reads/s | off the primary |\n|---|--:|--:|\n");
        }
        let by = if cached { "replica and cache" } else { "replica" };
        let _ = writeln!(text, "| {by} | {reads:.0} | {:.1} % |", off * 100.0);
    }
    text
}

pub fn to_json(samples: &[OffSample]) -> Value {
    let one = |sample: &OffSample| json!({ "cached": sample.cached, "reads_per_second": sample.reads, "off_primary": sample.off_primary });
    samples.iter().map(one).collect()
}
