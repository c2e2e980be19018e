//! One database as clients see it: its shards, its current view of schema and topology, its pools and its cache.
//!
//! Invariant: a [`View`] is immutable; a change of schema or topology swaps in a whole new one. Sessions look the view up per
//! statement, so that none works on an old map for longer than one statement.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use parking_lot::Mutex;
use weir_core::error::UserError;
use weir_core::fresh::words::Words;
use weir_core::id::{Lsn, ShardId};
use weir_core::topology::catalog::Catalog;
use weir_core::topology::{TableRules, Topology};

use crate::back::connect::Login;
use crate::back::pool::{Pool, PoolLimits};
use crate::cache::Cache;
use crate::clock::Clock;
use crate::config::{Config, DatabaseConfig, Endpoint};
use crate::probe::EndpointView;
use crate::statements::Statements;
use crate::stats::DatabaseStats;

/// A replica that has just said it is behind is not asked again for so long.
const BEHIND: Duration = Duration::from_millis(5);
/// Longest wait for re-reading the catalogue after DDL.
const CATALOG_MAX: Duration = Duration::from_secs(5);

/// Everything planning looks at.
pub struct View {
    /// Changes whenever a template could.
    pub version: u64,
    pub topology: Topology,
    pub rules: Arc<TableRules>,
    pub catalog: Arc<Catalog>,
    pub search_path: Vec<Box<str>>,
    pub shards: usize,
}

pub struct Shard {
    pub name: Box<str>,
    pub primary: Arc<EndpointView>,
    pub replicas: Vec<Replica>,
    pub words: Arc<Words>,
    pub clock: Clock,
}

pub struct Replica {
    pub view: Arc<EndpointView>,
    replay: AtomicU64,
    /// Microseconds since the database was set up.
    asked_us: AtomicU64,
    start: Instant,
}

pub struct Database {
    pub name: Arc<str>,
    pub config: DatabaseConfig,
    view: ArcSwap<View>,
    pub shards: Vec<Shard>,
    pub statements: Statements,
    pub cache: Option<Cache>,
    pub stats: DatabaseStats,
    users: Mutex<HashMap<Arc<str>, Arc<UserPools>>>,
    turn: AtomicUsize,
    catalog_login: Login,
    catalog_reading: tokio::sync::Mutex<()>,
}

/// One user's pools.
pub struct UserPools {
    shards: Vec<ShardPools>,
}

struct ShardPools {
    primary: Arc<Pool>,
    replicas: Vec<Arc<Pool>>,
}

impl UserPools {
    pub fn primary(&self, shard: ShardId) -> &Arc<Pool> {
        &self.shards[usize::from(shard.0)].primary
    }

    pub fn replica(&self, shard: ShardId, number: usize) -> Option<&Arc<Pool>> {
        self.shards[usize::from(shard.0)].replicas.get(number)
    }

    /// All pools with their shard; `true`: of a primary.
    pub fn iter(&self) -> impl Iterator<Item = (ShardId, bool, &Arc<Pool>)> {
        self.shards.iter().enumerate().flat_map(|(shard, pools)| {
            let shard = ShardId(shard as u16);
            let replicas = pools.replicas.iter().map(move |pool| (shard, false, pool));
            std::iter::once((shard, true, &pools.primary)).chain(replicas)
        })
    }
}

impl Replica {
    pub fn new(view: Arc<EndpointView>) -> Self {
        Replica { view, replay: AtomicU64::new(0), asked_us: AtomicU64::new(0), start: Instant::now() }
    }

    /// What it has just said on its own connection.
    pub fn note_replay(&self, replay: Lsn) {
        self.replay.store(replay.0, Relaxed);
        self.asked_us.store(self.start.elapsed().as_micros() as u64, Relaxed);
    }

    fn is_worth_asking(&self, need: Lsn) -> bool {
        if !self.view.is_up() {
            return false;
        }
        let age_us = (self.start.elapsed().as_micros() as u64).saturating_sub(self.asked_us.load(Relaxed));
        self.replay.load(Relaxed) >= need.0 || age_us > BEHIND.as_micros() as u64
    }
}

impl View {
    /// The same, with names found along another search_path.
    #[must_use]
    pub fn under_search_path(&self, path: Vec<String>) -> View {
        use std::hash::BuildHasher;
        let search_path: Vec<Box<str>> = path.into_iter().map(String::into_boxed_str).collect();
        View {
            // Templates are found by version, so another path needs another version.
            version: self.version ^ (foldhash::quality::FixedState::with_seed(7).hash_one(&search_path) | 1 << 63),
            topology: self.topology.clone(),
            rules: Arc::clone(&self.rules),
            catalog: Arc::clone(&self.catalog),
            search_path,
            shards: self.shards,
        }
    }
}

impl Database {
    pub fn new(
        config: &Config,
        database: DatabaseConfig,
        topology: Topology,
        shards: Vec<Shard>,
        cache: Option<Cache>,
        stats: DatabaseStats,
    ) -> Arc<Self> {
        let home = &database.shards[usize::from(database.home.0)].primary;
        let catalog_login = Login {
            host: home.host.as_str().into(),
            port: home.port,
            user: config.server_auth.user.as_str().into(),
            database: database.server_database.as_str().into(),
            password: Some(config.server_auth.password.expose().into()),
            deadline: config.limits.connect_time_max,
        };
        let view = View {
            version: 1,
            rules: Arc::clone(&topology.tables),
            catalog: Arc::new(Catalog::default()),
            search_path: vec!["public".into()],
            shards: topology.shard_count(),
            topology,
        };
        let alone = shards.len() == 1 && cache.is_none() && shards[0].replicas.is_empty();
        let statements = Statements::new();
        Arc::new(Database {
            name: database.name.as_str().into(),
            stats,
            config: database,
            view: ArcSwap::from_pointee(view),
            shards,
            statements: if alone { statements.for_one_server() } else { statements },
            cache,
            users: Mutex::default(),
            turn: AtomicUsize::new(0),
            catalog_login,
            catalog_reading: tokio::sync::Mutex::new(()),
        })
    }

    pub fn view(&self) -> arc_swap::Guard<Arc<View>> {
        self.view.load()
    }

    pub fn view_arc(&self) -> Arc<View> {
        self.view.load_full()
    }

    pub fn shard(&self, shard: ShardId) -> &Shard {
        &self.shards[usize::from(shard.0)]
    }

    /// Must writes be announced? Only where somebody else than the primary may answer reads.
    pub fn tracks_freshness(&self) -> bool {
        self.answers_elsewhere()
    }

    /// Is there a cache or a replica?
    pub fn answers_elsewhere(&self) -> bool {
        self.cache.is_some() || self.shards.iter().any(|shard| !shard.replicas.is_empty())
    }

    /// A replica to ask for a read that must cover `need`, in turn.
    pub fn choose_replica(&self, shard: ShardId, need: Lsn) -> Option<usize> {
        let shard = self.shard(shard);
        let replicas = &shard.replicas;
        if replicas.is_empty() || !shard.clock.connected() {
            return None;
        }
        let first = self.turn.fetch_add(1, Relaxed);
        (0..replicas.len())
            .map(|step| (first + step) % replicas.len())
            .find(|number| replicas[*number].is_worth_asking(need))
    }

    /// The pools of a user, made at the first login.
    pub fn pools(&self, config: &Config, user: &str, password: &str) -> Arc<UserPools> {
        let mut users = self.users.lock();
        if let Some(pools) = users.get(user) {
            return Arc::clone(pools);
        }
        let pools = Arc::new(self.make_pools(config, user, password));
        users.insert(user.into(), Arc::clone(&pools));
        pools
    }

    fn make_pools(&self, config: &Config, user: &str, password: &str) -> UserPools {
        let limits = PoolLimits {
            size: config.pool.size,
            min: config.pool.min,
            prepared_max: config.limits.prepared_per_server_max,
            waiting_max: config.pool.wait_queue_max,
            wait_max: config.pool.wait_max,
            idle_max: config.pool.idle_max,
            lifetime: config.pool.lifetime_max,
        };
        let pool = |endpoint: &Endpoint, name: String| {
            let login = Login {
                host: endpoint.host.as_str().into(),
                port: endpoint.port,
                user: user.into(),
                database: self.config.server_database.as_str().into(),
                password: Some(password.into()),
                deadline: config.limits.connect_time_max,
            };
            Pool::new(name, login, limits)
        };
        let shards = self.config.shards.iter().map(|shard| {
            let base = format!("{}/{}", self.name, shard.name);
            let replicas = shard.replicas.iter().enumerate();
            ShardPools {
                primary: pool(&shard.primary, format!("{base}/primary")),
                replicas: replicas
                    .map(|(number, endpoint)| pool(endpoint, format!("{base}/replica{number}")))
                    .collect(),
            }
        });
        UserPools { shards: shards.collect() }
    }

    /// All users' pools, for figures and upkeep.
    pub fn all_pools(&self) -> Vec<(Arc<str>, Arc<UserPools>)> {
        self.users.lock().iter().map(|(user, pools)| (Arc::clone(user), Arc::clone(pools))).collect()
    }

    /// Puts a new topology into force.
    pub fn install_topology(&self, topology: Topology) {
        self.view.rcu(|view| View {
            version: if topology.tables == view.rules { view.version } else { view.version + 1 },
            rules: Arc::clone(&topology.tables),
            catalog: Arc::clone(&view.catalog),
            search_path: view.search_path.clone(),
            shards: topology.shard_count(),
            topology: topology.clone(),
        });
    }

    /// Reads the home shard's catalogue again; after DDL, before its success is told. On failure the old one stays and the
    /// next reading mends it.
    pub async fn refresh_catalog(&self) {
        let _one_at_a_time = self.catalog_reading.lock().await;
        // Boxed: every session that may change the schema would else carry room for it.
        match tokio::time::timeout(CATALOG_MAX, Box::pin(self.read_catalog())).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(database = %self.name, "cannot read the catalogue: {error:#}"),
            Err(_) => tracing::warn!(database = %self.name, "cannot read the catalogue within {CATALOG_MAX:?}"),
        }
    }

    /// Foreign keys as the home shard has them, for checking the declared tables.
    pub async fn foreign_keys(&self) -> anyhow::Result<Vec<crate::catalog::ForeignKey>> {
        let client = crate::control::connect(&self.catalog_login).await?;
        Ok(crate::catalog::foreign_keys(&client).await?)
    }

    async fn read_catalog(&self) -> anyhow::Result<()> {
        let login = &self.catalog_login;
        let client = crate::control::connect(login).await?;
        let version = self.view().version + 1;
        let catalog = Arc::new(crate::catalog::read(&client, version).await?);
        self.view.rcu(|view| View {
            version: if catalog.same_as(&view.catalog) { view.version } else { view.version + 1 },
            topology: view.topology.clone(),
            rules: Arc::clone(&view.rules),
            catalog: Arc::clone(&catalog),
            search_path: view.search_path.clone(),
            shards: view.shards,
        });
        Ok(())
    }

    /// Where a statement would go and why, without running it.
    pub fn route(&self, sql: &str) -> Result<Vec<(String, String)>, UserError> {
        let view = self.view();
        let mut scratch = crate::statements::Scratch::default();
        let understood = self.statements.understand(sql, &view, &mut scratch);
        let values = weir_core::plan::Values { params: &[], sql, literals: &scratch.normal.literals };
        let plan = understood.template.bind(&values, &view.topology)?;
        Ok(weir_core::plan::explain(&plan, &view.topology))
    }
}
