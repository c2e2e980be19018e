//! The 22 queries of TPC-H on one Postgres and through weir on two shards: how much longer they take, and how many rows must move for it.
//!
//! Rows that move are those the shards' statements returned, to weir or to the fallback engine, counted by `pg_stat_statements`.

use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_harness::{Plain, Tier, connect, route_target, tpch};

const SHARDS: u32 = 2;

/// One query: the best of its rounds on either side.
#[derive(Clone, Debug)]
pub struct TpchSample {
    pub query: usize,
    pub one_ms: f64,
    pub weir_ms: f64,
    /// By merge, by the engine, on one shard: as ROUTE says it.
    pub how: String,
    pub rows_moved: i64,
}

impl fmt::Display for TpchSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "TPC-H {}: {:.1} ms, one Postgres {:.1} ms, {} rows moved",
            self.query, self.weir_ms, self.one_ms, self.rows_moved
        )
    }
}

/// `weir`: the binary, if it is not the one beside us.
pub async fn run(scale: f64, rounds: u32, weir: Option<PathBuf>) -> Result<Vec<TpchSample>> {
    let plain = Plain::start().await?;
    let builder = Tier::builder().shards(SHARDS).tables(tpch::TABLES);
    let tier = builder.config_extra("[cache]\nenabled = false").weir(weir).start().await?;
    let mut counters = Vec::new();
    for shard in &tier.shards {
        counters.push(counter(&shard.primary).await.context("pg_stat_statements")?);
    }
    let (one, many) = (connect(&plain.dsn()).await?, tier.connect().await?);
    let console = connect(&tier.admin_dsn()).await?;
    for client in [&one, &many] {
        tpch::load(client, scale).await?;
        client.batch_execute("ANALYZE").await?;
    }
    let mut samples = Vec::new();
    for query in 1..=22 {
        let sql = tpch::query(query)?;
        let mut sample = TpchSample {
            query,
            one_ms: f64::MAX,
            weir_ms: f64::MAX,
            how: route_target(&console, "shop", &sql).await.unwrap_or_default(),
            rows_moved: 0,
        };
        for _ in 0..rounds {
            sample.one_ms = sample.one_ms.min(taken_ms(&one, &sql).await?);
            for counter in &counters {
                counter.batch_execute("SELECT pg_stat_statements_reset()").await?;
            }
            sample.weir_ms = sample.weir_ms.min(taken_ms(&many, &sql).await?);
            sample.rows_moved = 0;
            for counter in &counters {
                sample.rows_moved += counter.query_one(MOVED, &[]).await?.try_get::<_, i64>(0)?;
            }
        }
        eprintln!("{sample}");
        samples.push(sample);
    }
    Ok(samples)
}

/// What statements of database `shop` have returned.
const MOVED: &str =
    "SELECT coalesce(sum(s.rows), 0)::int8 FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
    WHERE d.datname = 'shop' AND s.query ~* '^\\s*(select|with|fetch)'";

/// Has a server count its statements, and gives a connection that reads what it counted.
async fn counter(server: &weir_harness::Cluster) -> Result<Client> {
    let admin = server.admin("postgres").await?;
    admin.batch_execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'").await?;
    drop(admin);
    server.stop_cleanly();
    server.restart().await?;
    let admin = server.admin("postgres").await?;
    admin.batch_execute("CREATE EXTENSION pg_stat_statements").await?;
    Ok(admin)
}

async fn taken_ms(client: &Client, sql: &str) -> Result<f64> {
    let started = Instant::now();
    client.simple_query(sql).await.with_context(|| sql.to_owned())?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}
