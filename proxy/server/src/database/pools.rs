//! The pools of a database: per user, one to each shard's primary and one to each server that stands by.
//!
//! Invariant: a pool to a primary leads to whoever it is when a connection is opened ([`crate::roles`]); a pool to a standby leads to one
//! server, and is used while that server is a replica. Non-goal: the policy ([`weir_core::pool`]).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::sync::{Arc, OnceLock};

use tokio::sync::Semaphore;
use weir_core::fresh::Level;
use weir_core::id::ShardId;
use weir_core::pool::{Bounds, Mode};

use super::{Database, EnginePools, SPARE_MAX, Shard};
use crate::auth::credential::{Credential, Keyring};
use crate::back::connect::Login;
use crate::back::pool::{Pool, PoolLimits};
use crate::config::{Config, PoolConfig};
use crate::engine::ENGINE;
use crate::growing::Growing;
use crate::roles::{Roles, Route};

/// One user's pools.
pub struct UserPools {
    shards: Growing<ShardPools>,
    pub engine: Option<EnginePools>,
    /// Places for transactions of weir's own that write columns which are unique over all shards.
    pub unique_turns: Arc<Semaphore>,
    keyring: Keyring,
    mode: AtomicU8,
    /// [`Level::packed`], and above it whether the user's own section says so.
    freshness: AtomicU64,
}

/// Bit of [`UserPools::freshness`].
const BY_ROLE: u64 = 1 << 63;

struct ShardPools {
    /// To whoever is the primary.
    primary: Arc<Pool>,
    replicas: Vec<Arc<Pool>>,
    /// To the server that is configured as the primary, once it is a replica. Of these `replicas` has none.
    first: OnceLock<Arc<Pool>>,
    servers: Arc<Roles>,
}

impl ShardPools {
    /// The pool for reads from a server that is a replica; the first is the one that is configured as the primary.
    fn replica(&self, server: usize) -> Option<&Arc<Pool>> {
        match server.checked_sub(1) {
            Some(number) => self.replicas.get(number),
            None => Some(
                self.first
                    .get_or_init(|| self.primary.to_another(self.name_of_first(), Route::Server(self.servers.first()))),
            ),
        }
    }

    fn name_of_first(&self) -> String {
        self.primary.name.replace("/primary", "/replica-first")
    }

    /// Those that stand by, as far as they are in use.
    fn others(&self) -> impl Iterator<Item = &Arc<Pool>> {
        self.replicas.iter().chain(self.first.get())
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Pool>> {
        std::iter::once(&self.primary).chain(self.others())
    }
}

fn primary_name(base: &str) -> String {
    format!("{base}/primary")
}

fn replica_name(base: &str, number: usize) -> String {
    format!("{base}/replica{number}")
}

impl UserPools {
    /// How long sessions that begin now keep a Backend.
    pub fn mode(&self) -> Mode {
        match self.mode.load(Relaxed) {
            mode if mode == Mode::Session as u8 => Mode::Session,
            mode if mode == Mode::Statement as u8 => Mode::Statement,
            _ => Mode::Transaction,
        }
    }

    /// How fresh reads are where neither session nor statement says so; true: the user's own section does.
    pub fn freshness(&self) -> (Level, bool) {
        let packed = self.freshness.load(Relaxed);
        (Level::unpacked(packed & !BY_ROLE), packed & BY_ROLE != 0)
    }

    /// Other limits from now on; sessions keep the mode they began with.
    fn set(&self, pool: &PoolConfig, limits: PoolLimits, of_engine: Option<PoolLimits>) {
        self.mode.store(pool.mode as u8, Relaxed);
        if let (Some(pools), Some(limits)) = (&self.engine, of_engine) {
            std::iter::once(&pools.primary).chain(&pools.replicas).for_each(|pool| pool.set_limits(limits));
        }
        for pools in self.shards.iter() {
            pools.all().for_each(|pool| pool.set_limits(limits));
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.iter().map(|(_, _, pool)| pool.counts()).map(|counts| counts.busy + counts.idle + counts.waiting).sum()
    }

    /// [`ENGINE`] stands for the engine, if there is one.
    pub fn primary(&self, shard: ShardId) -> &Arc<Pool> {
        match &self.engine {
            Some(engine) if shard == ENGINE => &engine.primary,
            _ => &self.shards[shard].primary,
        }
    }

    /// Pools to a shard that joins, with the limits and the login of the others.
    pub(super) fn append(&self, database: &str, shard: &Shard) -> Option<usize> {
        let like = &self.shards.get(0)?.primary;
        let base = format!("{database}/{}", shard.name);
        let replicas = shard.servers.iter().skip(1).enumerate().map(|(number, server)| {
            like.to_another(replica_name(&base, number), Route::Server(Arc::clone(&server.view.endpoint)))
        });
        self.shards.push(ShardPools {
            replicas: replicas.collect(),
            primary: like.to_another(primary_name(&base), Route::Primary(Arc::clone(&shard.roles))),
            first: OnceLock::new(),
            servers: Arc::clone(&shard.roles),
        })
    }

    /// For reads from a server of a shard, by its place.
    pub fn replica(&self, shard: ShardId, server: usize) -> Option<&Arc<Pool>> {
        self.shards[shard].replica(server)
    }

    /// All pools with their shard; `true`: of a primary. The engine's are under [`ENGINE`].
    pub fn iter(&self) -> impl Iterator<Item = (ShardId, bool, &Arc<Pool>)> {
        self.shards
            .by_shard()
            .flat_map(|(shard, pools)| {
                let replicas = pools.others().map(move |pool| (shard, false, pool));
                std::iter::once((shard, true, &pools.primary)).chain(replicas)
            })
            .chain(self.engine.iter().flat_map(|pools| {
                let replicas = pools.replicas.iter().map(|pool| (ENGINE, false, pool));
                std::iter::once((ENGINE, true, &pools.primary)).chain(replicas)
            }))
    }
}

impl Database {
    /// The pools of a user, made at the first login. Connections opened from now on log in with what this login has proved.
    pub fn pools(&self, config: &Config, user: &str, credential: Credential) -> Arc<UserPools> {
        let mut users = self.users.lock();
        if let Some(pools) = users.get(user) {
            pools.keyring.learn(credential);
            return Arc::clone(pools);
        }
        let pools = Arc::new(self.make_pools(config, user, Keyring::new(credential)));
        users.insert(user.into(), Arc::clone(&pools));
        pools
    }

    fn make_pools(&self, config: &Config, user: &str, keyring: Keyring) -> UserPools {
        let wanted = config.pool_of(&self.name, user);
        let limits = self.pool_limits(config, &wanted);
        let pool = |route: Route, name: String| {
            let login = Login {
                route,
                user: user.into(),
                database: self.config.server_database.as_str().into(),
                credential: keyring.clone(),
                tls: config.server_auth.tls.clone(),
                deadline: config.limits.connect_time_max,
            };
            let pool = Pool::new(name, login, limits);
            if self.is_paused() {
                pool.pause();
            }
            pool
        };
        let shards = self.shards.iter().map(|shard| {
            let base = format!("{}/{}", self.name, shard.name);
            let replicas = shard.servers.iter().skip(1).enumerate().map(|(number, server)| {
                pool(Route::Server(Arc::clone(&server.view.endpoint)), replica_name(&base, number))
            });
            ShardPools {
                primary: pool(Route::Primary(Arc::clone(&shard.roles)), primary_name(&base)),
                replicas: replicas.collect(),
                first: OnceLock::new(),
                servers: Arc::clone(&shard.roles),
            }
        });
        let shards = shards.collect();
        let engine = self.engine.as_ref().map(|engine| self.engine_pools(engine, (config, user), &wanted, &keyring));
        let unique_turns = Arc::new(Semaphore::new(wanted.size.max(1)));
        let mode = AtomicU8::new(wanted.mode as u8);
        let freshness = AtomicU64::new(self.packed_freshness(config, user));
        UserPools { shards, engine, unique_turns, keyring, mode, freshness }
    }

    fn packed_freshness(&self, config: &Config, user: &str) -> u64 {
        let (level, by_role) = config.freshness_of(&self.name, user);
        level.packed() | if by_role { BY_ROLE } else { 0 }
    }

    pub(super) fn pool_limits(&self, config: &Config, wanted: &PoolConfig) -> PoolLimits {
        PoolLimits {
            bounds: Bounds { size: wanted.size, reserve: wanted.reserve, waiting_max: wanted.wait_queue_max },
            min: wanted.min,
            reserve_after: wanted.reserve_after,
            prepared_max: config.limits.prepared_per_server_max,
            wait_max: wanted.wait_max,
            // An idle connection would keep others from dropping the database.
            idle_max: if self.on_demand { wanted.idle_max.min(SPARE_MAX) } else { wanted.idle_max },
            lifetime: wanted.lifetime_max,
        }
    }

    /// The limits of a new configuration, for pools that exist already.
    pub fn reconfigure(&self, config: &Config) {
        for (user, pools) in self.users.lock().iter() {
            let wanted = config.pool_of(&self.name, user);
            let of_engine = self.engine.as_ref().map(|engine| self.engine_limits(engine, config, &wanted));
            pools.set(&wanted, self.pool_limits(config, &wanted), of_engine);
            pools.freshness.store(self.packed_freshness(config, user), Relaxed);
        }
    }
}
