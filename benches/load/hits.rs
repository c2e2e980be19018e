//! Repeated reads of one value: out of weir's cache, out of Redis, and from Postgres itself.
//!
//! Closed loop: each connection asks again as soon as it has its answer. The clients are in this process and cost about the
//! same on every path, so what differs is the way to the value.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;

use crate::cost::{Usage, usage};
use crate::stage::Stage;

const WARM_UP: Duration = Duration::from_millis(500);
const REDIS_KEY: &str = "bench_value";
const SQL: &str = "SELECT body FROM bench_value WHERE id = $1";

/// Where the value comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reader {
    RedisGet,
    WeirCache,
    Postgres,
}

impl Reader {
    pub const ALL: [Reader; 3] = [Reader::RedisGet, Reader::WeirCache, Reader::Postgres];

    pub fn name(self) -> &'static str {
        match self {
            Reader::RedisGet => "Redis GET",
            Reader::WeirCache => "weir, cached SELECT",
            Reader::Postgres => "Postgres, direct SELECT",
        }
    }

    /// The process whose time is counted.
    fn pid(self, stage: &Stage) -> Option<u32> {
        match self {
            Reader::RedisGet => stage.redis.pid(),
            Reader::WeirCache => stage.cached_weir_pid(),
            Reader::Postgres => stage.cluster.pid(),
        }
    }
}

/// What one run measured.
#[derive(Clone, Debug)]
pub struct HitSample {
    pub reader: Reader,
    pub connections: usize,
    /// Length of the value.
    pub bytes: usize,
    /// Reads per second, over all connections.
    pub reads: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Processor time of the serving process per read, in microseconds.
    pub server_us: f64,
    /// Share of reads that weir counted as cache hits; none for the others.
    pub hit_ratio: Option<f64>,
}

impl fmt::Display for HitSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} bytes, {} connections: {:.0} reads/s, p99 {:.0} µs",
            self.reader.name(),
            self.bytes,
            self.connections,
            self.reads,
            self.p99_us
        )
    }
}

/// One connection that can read the value.
enum Client {
    Redis(redis::aio::MultiplexedConnection),
    Postgres(tokio_postgres::Client, tokio_postgres::Statement),
}

impl Client {
    async fn open(stage: &Stage, reader: Reader, bytes: usize) -> Result<Client> {
        let dsn = match reader {
            Reader::RedisGet => {
                let mut connection = redis::Client::open(stage.redis.url())?.get_multiplexed_async_connection().await?;
                let value = "v".repeat(bytes);
                redis::cmd("SET").arg(REDIS_KEY).arg(value).exec_async(&mut connection).await?;
                return Ok(Client::Redis(connection));
            }
            Reader::WeirCache => stage.cached_dsn(),
            Reader::Postgres => stage.direct_dsn(),
        };
        let client = weir_harness::connect(&dsn).await?;
        let statement = client.prepare(SQL).await?;
        Ok(Client::Postgres(client, statement))
    }

    /// Reads the value once; gives its length.
    async fn read(&mut self, key: i32) -> Result<usize> {
        Ok(match self {
            Client::Redis(connection) => {
                let value: Vec<u8> = redis::cmd("GET").arg(REDIS_KEY).query_async(connection).await?;
                value.len()
            }
            Client::Postgres(client, statement) => {
                let row = client.query_one(statement, &[&key]).await?;
                row.try_get::<_, &str>(0)?.len()
            }
        })
    }

    /// Reads until `until`; gives each read's time in microseconds, without those before `from`.
    ///
    /// The client comes back too: a Postgres backend whose client is gone takes its count of processor time with it.
    async fn loop_until(mut self, bytes: usize, (from, until): (Instant, Instant)) -> Result<(Client, Vec<f32>)> {
        let mut times = Vec::new();
        loop {
            let began = Instant::now();
            if began >= until {
                return Ok((self, times));
            }
            let length = self.read(bytes as i32).await?;
            ensure!(length == bytes, "the value has {length} bytes, not {bytes}");
            if began >= from {
                times.push(began.elapsed().as_secs_f32() * 1e6);
            }
        }
    }
}

/// All connections read for `length`, after a warm-up.
pub async fn run(
    stage: &Stage,
    reader: Reader,
    (connections, bytes): (usize, usize),
    length: Duration,
) -> Result<HitSample> {
    let what = || format!("{} with {connections} connections", reader.name());
    let mut clients = Vec::with_capacity(connections);
    for _ in 0..connections {
        clients.push(Client::open(stage, reader, bytes).await.with_context(what)?);
    }
    let from = Instant::now() + WARM_UP;
    let until = from + length;
    let mut loops = JoinSet::new();
    for client in clients {
        loops.spawn(client.loop_until(bytes, (from, until)));
    }
    tokio::time::sleep_until(from.into()).await;
    let (counted, used) = (cache_counts(stage, reader).await?, used_by(stage, reader));
    tokio::time::sleep_until(until.into()).await;
    let used = used_by(stage, reader).since(used);
    let counted = cache_counts(stage, reader).await?.map(|after| after.since(counted.unwrap_or_default()));
    let mut times = Vec::new();
    // A finished task keeps its result, and so its client, until it is joined here.
    while let Some(finished) = loops.join_next().await {
        times.extend(finished?.with_context(what)?.1);
    }
    ensure!(!times.is_empty(), "{}: no read finished", what());
    times.sort_by(f32::total_cmp);
    let at = |share: f64| f64::from(times[((times.len() - 1) as f64 * share) as usize]);
    Ok(HitSample {
        reader,
        connections,
        bytes,
        reads: times.len() as f64 / length.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        server_us: used.cpu.as_secs_f64() * 1e6 / times.len() as f64,
        hit_ratio: counted.map(CacheCounts::ratio),
    })
}

fn used_by(stage: &Stage, reader: Reader) -> Usage {
    reader.pid(stage).map(usage).unwrap_or_default()
}

/// `weir_cache_requests_total`, by whether the result label begins with "hit".
#[derive(Clone, Copy, Default, Debug)]
pub struct CacheCounts {
    pub hits: f64,
    all: f64,
}

impl CacheCounts {
    fn since(self, earlier: CacheCounts) -> CacheCounts {
        CacheCounts { hits: self.hits - earlier.hits, all: self.all - earlier.all }
    }

    fn ratio(self) -> f64 {
        if self.all > 0.0 { self.hits / self.all } else { 0.0 }
    }

    pub fn parse(metrics: &str) -> CacheCounts {
        let mut counts = CacheCounts::default();
        for line in metrics.lines().filter(|line| line.starts_with("weir_cache_requests_total{")) {
            let value: f64 = line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or(0.0);
            counts.all += value;
            if line.contains("result=\"hit") {
                counts.hits += value;
            }
        }
        counts
    }
}

async fn cache_counts(stage: &Stage, reader: Reader) -> Result<Option<CacheCounts>> {
    if reader != Reader::WeirCache {
        return Ok(None);
    }
    let (_, metrics) = weir_local::http_get(stage.cached_http_port, "/metrics").await?;
    Ok(Some(CacheCounts::parse(&metrics)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_told_from_misses() {
        let text = "weir_cache_requests_total{result=\"hit_l1\"} 6\nweir_cache_requests_total{result=\"hit_l2\"} 2\n\
                    weir_cache_requests_total{result=\"miss_absent\"} 2\nweir_other{result=\"hit\"} 9\n";
        let counts = CacheCounts::parse(text);
        assert!((counts.ratio() - 0.8).abs() < 1e-9, "{counts:?}");
        assert!(CacheCounts::default().ratio().abs() < 1e-9);
    }
}
