//! Throw-away Postgres clusters and Redis servers, for `weir dev`, tests and benches.
//!
//! Everything lives in a [`Run`]: one directory and the processes started in it. Reading order: [`Run`] (what is owned
//! and how it is cleaned up) → [`Process`] (one child) → [`Cluster`] and [`Replica`] (Postgres) → [`Redis`] → [`Tier`]
//! (all servers below weir, and the configuration that names them) → [`Weir`] and [`Storefront`] (our own programs).
//!
//! Invariant: nothing outlives the run. Dropping it stops every process and removes the directory; a run whose owner
//! was killed outright is cleaned up by its reaper at once, and by the next run at the latest.
//! Non-goals: durability (`fsync` is off), any platform without POSIX processes, servers reachable from other machines.

mod account;
mod binaries;
mod cluster;
mod port;
mod process;
mod program;
mod redis;
mod redis_cluster;
mod replica;
mod run;
mod server;
mod settings;
mod template;
mod tier;
mod tier_config;

pub use account::Account;
pub use binaries::Binaries;
pub use cluster::{Cluster, ClusterSpec, Database, Role};
pub use port::{free as free_port, wanted_or_free as port_or_free};
pub use process::{Process, StopSignal, log_tail};
pub use program::{Storefront, StorefrontSpec, Weir, http_get};
pub use redis::{Redis, RedisSpec};
pub use redis_cluster::start_redis_cluster;
pub use replica::Replica;
pub use run::{Leftovers, Run};
pub use server::Server;
pub use tier::{Shard, Tier, TierSpec, TierState};
pub use tier_config::ConfigSpec;

/// A random password of 24 letters and digits: safe inside a DSN and a TOML string without escaping.
pub fn password() -> String {
    use rand::distr::{Alphanumeric, SampleString};
    Alphanumeric.sample_string(&mut rand::rng(), 24)
}
