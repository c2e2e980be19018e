//! All the servers below one weir: shards with their replicas, the hub, Redis.
//!
//! Invariant: a [`TierState`] on disk describes what a kept run holds, so that a later start with it finds the same
//! passwords, the same number of shards and, where they are free, the same ports.
//! Non-goal: changing the number of shards of a kept tier. That is resharding, and weir's business.

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::cluster::SUPERUSER;
use crate::{Cluster, ClusterSpec, Database, Redis, RedisSpec, Replica, Run, password};

const STATE_FILE: &str = "tier.json";

/// What a tier is to be like.
#[derive(Clone, Debug)]
pub struct TierSpec {
    pub shards: u32,
    /// Per shard.
    pub replicas: u32,
    /// Of the hub.
    pub hub_replicas: u32,
    /// Start Redis. An error if it is not installed.
    pub redis: bool,
    /// Every Postgres server logs every statement.
    pub log_statements: bool,
}

/// What must not change between two starts on the same directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TierState {
    pub shards: u32,
    /// Of role `shop`, which owns database `shop` on every shard.
    pub shop_password: String,
    /// Of the superuser `weir_admin` everywhere.
    pub admin_password: String,
    /// What the storefront signs with: order references must outlive a restart.
    pub storefront_secret: String,
    /// The port each server was last on, by name; also weir's own (`weir`, `http`).
    pub ports: BTreeMap<String, u16>,
}

/// One shard: a primary and its replicas.
#[derive(Debug)]
pub struct Shard {
    pub name: String,
    pub primary: Cluster,
    pub replicas: Vec<Replica>,
}

/// The running servers. Dropping them stops them.
#[derive(Debug)]
pub struct Tier {
    pub redis: Option<Redis>,
    pub shards: Vec<Shard>,
    pub hub: Cluster,
    pub hub_replicas: Vec<Replica>,
    pub state: TierState,
    pub run: Arc<Run>,
}

impl TierState {
    /// The state of a kept run, or a new one with random passwords.
    pub fn load_or_new(run: &Run, shards: u32) -> Result<Self> {
        let path = run.path().join(STATE_FILE);
        if !path.exists() {
            return Ok(Self {
                shards,
                shop_password: password(),
                admin_password: password(),
                storefront_secret: password(),
                ports: BTreeMap::new(),
            });
        }
        let state: Self = serde_json::from_slice(&std::fs::read(&path)?)
            .with_context(|| format!("{} is damaged; remove {}", path.display(), run.path().display()))?;
        if state.shards != shards {
            bail!(
                "{} holds a tier of {} shards, not {shards}. Start with --shards {}, or choose another directory",
                run.path().display(),
                state.shards,
                state.shards
            );
        }
        Ok(state)
    }

    /// The port `name` had last time; 0 if none.
    pub fn port(&self, name: &str) -> u16 {
        self.ports.get(name).copied().unwrap_or(0)
    }

    /// Writes it into the run's directory, readable by us alone.
    pub fn save(&self, run: &Run) -> Result<()> {
        write_private(&run.path().join(STATE_FILE), &serde_json::to_string_pretty(self)?)
    }
}

impl Tier {
    /// Starts all servers, several at a time. `on_start` is told the name of each as it becomes ready.
    pub async fn start(run: &Arc<Run>, spec: &TierSpec, on_start: Arc<dyn Fn(&str) + Send + Sync>) -> Result<Self> {
        let mut state = TierState::load_or_new(run, spec.shards)?;
        state.save(run)?;
        let mut starting = JoinSet::new();
        for index in 0..spec.shards {
            let start = start_shard(Arc::clone(run), spec.clone(), state.clone(), index, Arc::clone(&on_start));
            starting.spawn(async move { start.await.map(|shard| (index, shard)) });
        }
        let hub = Cluster::start(run, hub_spec(&state, spec)).await?;
        on_start("hub");
        let mut hub_replicas = Vec::new();
        for replica in 0..spec.hub_replicas {
            let name = format!("hub-replica{replica}");
            hub_replicas.push(hub.replica_on(&name, state.port(&name)).await?);
            on_start(&name);
        }
        let redis = if spec.redis {
            let redis = Redis::start_as(run, RedisSpec { port: state.port("redis"), ..RedisSpec::default() }).await?;
            on_start("redis");
            Some(redis)
        } else {
            None
        };
        let mut shards = Vec::new();
        while let Some(started) = starting.join_next().await {
            shards.push(started??);
        }
        shards.sort_by_key(|(index, _)| *index);
        let shards: Vec<Shard> = shards.into_iter().map(|(_, shard)| shard).collect();
        let of_hub = std::iter::once(&*hub).chain(hub_replicas.iter().map(|replica| &**replica));
        for server in shards.iter().flat_map(Shard::servers).chain(of_hub) {
            state.ports.insert(server.name().to_owned(), server.port());
        }
        if let Some(redis) = &redis {
            state.ports.insert("redis".to_owned(), redis.port());
        }
        state.save(run)?;
        Ok(Self { redis, shards, hub, hub_replicas, state, run: Arc::clone(run) })
    }

    /// Stops Postgres with a checkpoint, replicas last, so that a kept tier starts without recovery.
    pub fn stop_cleanly(&self) {
        self.hub.stop_cleanly();
        self.hub_replicas.iter().for_each(|replica| replica.stop_cleanly());
        for shard in &self.shards {
            shard.primary.stop_cleanly();
            shard.replicas.iter().for_each(|replica| replica.stop_cleanly());
        }
    }

    /// The name and the log of a server that has ended by itself, if any has.
    pub fn first_dead(&self) -> Option<(String, String)> {
        if let Some(redis) = &self.redis
            && redis.exited().is_some()
        {
            return Some(("redis".to_owned(), crate::log_tail(&self.run.log_path("redis"))));
        }
        let of_hub = std::iter::once(&*self.hub).chain(self.hub_replicas.iter().map(|replica| &**replica));
        let dead = self.shards.iter().flat_map(Shard::servers).chain(of_hub).find(|s| s.exited().is_some())?;
        Some((dead.name().to_owned(), dead.log_tail()))
    }
}

impl Shard {
    /// The primary and the replicas.
    pub fn servers(&self) -> impl Iterator<Item = &crate::Server> {
        std::iter::once(&*self.primary).chain(self.replicas.iter().map(|replica| &**replica))
    }
}

async fn start_shard(
    run: Arc<Run>,
    spec: TierSpec,
    state: TierState,
    index: u32,
    on_start: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Shard> {
    let name = format!("shard{index}");
    let mut cluster = ClusterSpec::new(&name, &state.admin_password).database("shop", "shop", &state.shop_password);
    cluster.port = state.port(&name);
    cluster.log_statements = spec.log_statements;
    let primary = Cluster::start(&run, cluster).await?;
    on_start(&name);
    let mut replicas = Vec::new();
    for replica in 0..spec.replicas {
        let name = format!("{name}-replica{replica}");
        replicas.push(primary.replica_on(&name, state.port(&name)).await?);
        on_start(&name);
    }
    Ok(Shard { name, primary, replicas })
}

fn hub_spec(state: &TierState, spec: &TierSpec) -> ClusterSpec {
    let mut hub = ClusterSpec::new("hub", &state.admin_password);
    hub.databases.push(Database { name: "weir_hub".to_owned(), owner: SUPERUSER.to_owned() });
    hub.port = state.port("hub");
    hub.log_statements = spec.log_statements;
    hub
}

/// Writes a file that only we can read, from its first byte on.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    let partial = path.with_extension("partial");
    let _ = std::fs::remove_file(&partial); // Its mode would be that of whoever left it.
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)
        .with_context(|| format!("cannot write {}", partial.display()))?;
    file.write_all(text.as_bytes())?;
    Ok(std::fs::rename(&partial, path)?)
}
