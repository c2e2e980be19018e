//! A whole real tier for a test or a bench: `Tier::builder().shards(2).replicas(1).redis(true).start().await`.
//!
//! Servers are processes on free ports, the proxy is the `weir` binary of this build, and nothing is mocked. Every value
//! here stops what it started when it is dropped, also when a test panics; see `weir_local::Run` for harder deaths.
//! Non-goals: building binaries (`make test` does that first), and skipping where a server is not installed.

mod front;
mod storefront;
mod tier;
pub mod tpch;
mod watch;

pub use front::{Front, FrontBuilder};
pub use storefront::Storefront;
pub use tier::{Builder, Proxy, Tier};
pub use weir_local::{
    Cluster, ClusterSpec, Redis, RedisSpec, Replica, Run, Server, Shard, free_port, start_redis_cluster,
};

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// One Postgres without weir, with the storefront's role and database: the other DSN of "one suite, two DSNs".
#[derive(Debug)]
pub struct Plain {
    pub cluster: Cluster,
    pub run: Arc<Run>,
    _watch: watch::Watch,
}

impl Plain {
    /// Starts it on a free port.
    pub async fn start() -> Result<Self> {
        let run = Run::temporary("test")?;
        let watch = watch::Watch::over(&run);
        let spec = ClusterSpec::new("plain", &weir_local::password()).database("shop", "shop", &weir_local::password());
        Ok(Self { cluster: Cluster::start(&run, spec).await?, run, _watch: watch })
    }

    /// A URL for role `shop` on database `shop`.
    pub fn dsn(&self) -> String {
        self.cluster.dsn("shop", "shop")
    }
}

/// Connects to Postgres or weir without TLS and drives the connection in a task of its own.
pub async fn connect(dsn: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(dsn, NoTls).await?;
    tokio::spawn(async move {
        // A connection that breaks is seen by its client, which is what tests look at; why it did is only said here.
        if let Err(error) = connection.await {
            eprintln!("a connection ended: {error:?}");
        }
    });
    Ok(client)
}

/// Who would answer a statement on `database`: the target that ROUTE names in weir's console. `None`: it is refused.
pub async fn route_target(console: &Client, database: &str, sql: &str) -> Option<String> {
    let route = format!("ROUTE {database} '{}'", sql.replace('\'', "''"));
    console.simple_query(&route).await.ok()?.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) if row.get(0) == Some("target") => row.get(1).map(str::to_owned),
        _ => None,
    })
}

/// The `weir` of this build.
pub fn weir_binary() -> Result<PathBuf> {
    binary("WEIR_BIN", "weir")
}

/// A binary of this build: what `variable` names, or `name` beside the running test or bench.
fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(PathBuf::from(path));
    }
    let ourselves = std::env::current_exe()?;
    let mut dir = ourselves.parent().context("an executable is in a directory")?;
    // Cargo puts tests into target/<profile>/deps and binaries one above.
    if dir.ends_with("deps") {
        dir = dir.parent().context("deps is in a profile's directory")?;
    }
    let path = dir.join(name);
    if !path.is_file() {
        bail!("{} is not there. Build it first: cargo build --workspace (or set {variable})", path.display());
    }
    Ok(path)
}
