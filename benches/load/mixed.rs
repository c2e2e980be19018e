//! Reads and writes mixed, with and without what keeps reads fresh: what the cache gives, and what it costs where it gives nothing.
//!
//! The same rows behind five weirs of one binary: one passes through, one keeps dependency words and a cache, one follows the WAL
//! as well, one has Redis, and one announces its writes to another weir. Closed loop: each connection asks again as soon as it has its
//! answer. Unless it is wanted otherwise, servers do not wait for the disk, so that a write is as cheap as it can be and what weir adds
//! shows most.
//! Non-goals: hits alone ([`crate::hits`]).

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;
use weir_harness::{Proxy, Tier};

use crate::cost::{Usage, usage};

/// Of all statements, how many are writes.
pub const WRITE_PERCENT: [u32; 6] = [0, 5, 10, 30, 50, 100];
pub const CONNECTIONS: usize = 16;
pub const KEYS: i64 = 1000;
const WARM_UP: Duration = Duration::from_millis(700);
const READ: &str = "SELECT n, body FROM registers WHERE id = $1";
const WRITE: &str = "UPDATE registers SET n = n + 1 WHERE id = $1";

/// What a weir does for freshness.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Care {
    /// Nothing: it only routes and pools.
    PassThrough,
    Words,
    Decoding,
    Redis,
    Peers,
}

impl Care {
    pub const ALL: [Care; 5] = [Care::PassThrough, Care::Words, Care::Decoding, Care::Redis, Care::Peers];

    pub fn name(self) -> &'static str {
        match self {
            Care::PassThrough => "pass-through",
            Care::Words => "cache in memory",
            Care::Decoding => "… and decoding",
            Care::Redis => "… and Redis",
            Care::Peers => "… and a second weir",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Care::PassThrough => "[cache]\nenabled = false\ndecoding = \"off\"",
            Care::Words => "[cache]\ndecoding = \"off\"",
            Care::Decoding | Care::Redis | Care::Peers => "[cache]\ndecoding = \"require\"",
        }
    }
}

/// One mix through one weir, once.
#[derive(Clone, Debug)]
pub struct MixedSample {
    pub care: Care,
    pub write_percent: u32,
    /// Statements per second, over all connections.
    pub statements: f64,
    /// Share of the reads that the cache answered.
    pub hit_ratio: f64,
    /// Processor time of weir per statement, in microseconds.
    pub proxy_us: f64,
    /// The same of weir and the server together: what is left when the clients are taken away.
    pub all_us: f64,
}

impl fmt::Display for MixedSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (care, percent) = (self.care.name(), self.write_percent);
        let (statements, hits) = (self.statements, self.hit_ratio * 100.0);
        write!(f, "{percent} % writes, {care}: {statements:.0}/s, {hits:.0} % hits, {:.1} + ", self.proxy_us)?;
        write!(f, "{:.1} µs", self.all_us - self.proxy_us)
    }
}

struct Site {
    care: Care,
    tier: Tier,
    /// Kept, because its weir ends with it.
    _second: Option<Proxy>,
}

/// Every mix through every weir, `rounds` times, in turns.
pub async fn run(
    length: Duration,
    rounds: u32,
    (cares, mixes): (&[Care], &[u32]),
    (durable, weir): (bool, Option<PathBuf>),
) -> Result<Vec<MixedSample>> {
    let mut sites = Vec::new();
    for &care in cares {
        let site = Site::start(care, weir.clone()).await.with_context(|| care.name())?;
        if durable {
            site.wait_for_the_disk().await.with_context(|| care.name())?;
        }
        sites.push(site);
    }
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for &write_percent in mixes {
            for site in &sites {
                let sample = site.mixed(write_percent, length).await.with_context(|| site.care.name())?;
                eprintln!("round {round}/{rounds}: {sample}");
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}

impl Site {
    async fn start(care: Care, weir: Option<PathBuf>) -> Result<Site> {
        let builder = Tier::builder().shards(1).tables(&["registers(id bigint)"]).config_extra(care.config());
        let redis = matches!(care, Care::Redis | Care::Peers);
        let tier = builder.redis(redis).peers(care == Care::Peers).weir(weir).start().await?;
        let client = tier.connect().await?;
        client.batch_execute("CREATE TABLE registers (id bigint PRIMARY KEY, n bigint, body text)").await?;
        let filled =
            format!("INSERT INTO registers SELECT id, 0, repeat('v', 200) FROM generate_series(0, {KEYS} - 1) id");
        // Straight to the server: the rows are no statement that is measured.
        tier.shards[0].primary.admin("shop").await?.batch_execute(&format!("{filled}; ANALYZE registers")).await?;
        let second = if care == Care::Peers { Some(tier.another().await?) } else { None };
        Ok(Site { care, tier, _second: second })
    }

    /// From now on the server does what one in service does: a commit is on the disk when it is acknowledged.
    async fn wait_for_the_disk(&self) -> Result<()> {
        let primary = self.tier.shards[0].primary.admin("shop").await?;
        for setting in ["fsync", "full_page_writes"] {
            primary.batch_execute(&format!("ALTER SYSTEM SET {setting} = on")).await?;
        }
        primary.batch_execute("SELECT pg_reload_conf()").await?;
        Ok(())
    }

    async fn mixed(&self, write_percent: u32, length: Duration) -> Result<MixedSample> {
        let from = Instant::now() + WARM_UP;
        let until = from + length;
        let mut loops = JoinSet::new();
        for connection in 0..CONNECTIONS {
            let client = self.tier.connect().await?;
            let seed = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(connection as u64 + 1);
            loops.spawn(keep_asking(client, seed, write_percent, (from, until)));
        }
        tokio::time::sleep_until(from.into()).await;
        let (hits, proxy, server) = (self.hits().await?, self.proxy(), self.server());
        tokio::time::sleep_until(until.into()).await;
        let (proxy, server) = (self.proxy().since(proxy).cpu, self.server().since(server).cpu);
        let hits = self.hits().await? - hits;
        let (mut statements, mut reads) = (0, 0);
        while let Some(ended) = loops.join_next().await {
            let counted = ended??;
            statements += counted.statements;
            reads += counted.reads;
        }
        ensure!(statements > 0, "nothing was asked");
        Ok(MixedSample {
            care: self.care,
            write_percent,
            statements: statements as f64 / length.as_secs_f64(),
            hit_ratio: if reads > 0 { hits / reads as f64 } else { 0.0 },
            proxy_us: proxy.as_secs_f64() * 1e6 / statements as f64,
            all_us: (proxy + server).as_secs_f64() * 1e6 / statements as f64,
        })
    }

    fn proxy(&self) -> Usage {
        self.tier.weir_pid().map(usage).unwrap_or_default()
    }

    fn server(&self) -> Usage {
        self.tier.shards[0].primary.pid().map(usage).unwrap_or_default()
    }

    async fn hits(&self) -> Result<f64> {
        let (_, metrics) = self.tier.http_get("/metrics").await?;
        Ok(crate::hits::CacheCounts::parse(&metrics).hits)
    }
}

/// What one connection has done between two moments.
#[derive(Default)]
struct Counted {
    statements: u64,
    reads: u64,
}

async fn keep_asking(
    client: tokio_postgres::Client,
    mut seed: u64,
    write_percent: u32,
    (from, until): (Instant, Instant),
) -> Result<Counted> {
    let (read, write) = (client.prepare(READ).await?, client.prepare(WRITE).await?);
    let mut counted = Counted::default();
    loop {
        let began = Instant::now();
        if began >= until {
            return Ok(counted);
        }
        let is_write = next(&mut seed) % 100 < u64::from(write_percent);
        let key = skewed(&mut seed);
        if is_write {
            client.execute(&write, &[&key]).await?;
        } else {
            client.query_one(&read, &[&key]).await?;
        }
        if began >= from {
            counted.statements += 1;
            counted.reads += u64::from(!is_write);
        }
    }
}

/// xorshift64: cheap, and the same keys in every run.
pub fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed >> 11
}

/// A key: the lower, the more often, about as 1/(key + 1).
fn skewed(seed: &mut u64) -> i64 {
    let unit = next(seed) as f64 / (1_u64 << 53) as f64;
    (((KEYS + 1) as f64).powf(unit) - 1.0) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_keys_come_more_often_and_all_are_in_range() {
        let (mut seed, mut low) = (7, 0);
        for _ in 0..10_000 {
            let key = skewed(&mut seed);
            assert!((0..KEYS).contains(&key), "{key}");
            low += u32::from(key < 10);
        }
        assert!((2_500..4_500).contains(&low), "{low}");
    }
}
