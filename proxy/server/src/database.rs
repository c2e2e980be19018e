//! One database as clients see it: its shards, its current view of schema and topology, its pools and its cache.
//!
//! Invariant: a [`View`] is immutable; a change of schema or topology swaps in a whole new one. Sessions look the view up per
//! statement, so that none works on an old map for longer than one statement.

mod engine;
mod identity;
pub mod lease;
mod pools;
mod primaries;
pub mod progress;
mod server;

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};
use weir_core::error::UserError;
use weir_core::fresh::PrimaryBecause;
use weir_core::fresh::words::Words;
use weir_core::id::{Epoch, ShardId};
use weir_core::topology::catalog::Catalog;
use weir_core::topology::moves::Apart;
use weir_core::topology::{ShardState, TableRules, Topology, Width, follow};

use crate::back::connect::Login;
use crate::back::pool::Pool;
use crate::cache::Cache;
use crate::clock::Clock;
use crate::config::DatabaseConfig;
use crate::engine::Engine;
use crate::fleet::member::Member;
use crate::flights::Airspace;
use crate::growing::Growing;
use crate::hub::Hub;
use crate::hub::moves::MoveRow;
use crate::map::Maps;
use crate::recover::Prepared;
use crate::roles::Roles;
use crate::seats::SeatCount;
use crate::sequences::Sequences;
use crate::settings::Followed;
use crate::snapshot::Snapshots;
use crate::statements::Statements;
use crate::stats::DatabaseStats;
use crate::unique::Unique;

use self::lease::MapLease;

pub use engine::EnginePools;
pub use pools::UserPools;
pub use primaries::Primaries;
pub use server::{Nearly, Outstanding, Server};

/// How long a connection to a database of the wildcard entry stays open unused. Postgres itself waits 5 s for others to leave
/// before it refuses to drop a database.
const SPARE_MAX: Duration = Duration::from_secs(4);
/// Longest wait for re-reading the catalogue after DDL.
const CATALOG_MAX: Duration = Duration::from_secs(5);
/// Between two readings in the background: at least so long, and this many times what the last one took, so that a
/// migration of a thousand statements does not read a thousand catalogues.
const CATALOG_PAUSE: Duration = Duration::from_millis(50);
const CATALOG_SHARE: u32 = 4;

/// Everything planning looks at.
#[derive(Clone, Debug)]
pub struct View {
    /// Changes whenever a template could.
    pub version: u64,
    pub topology: Topology,
    pub rules: Arc<TableRules>,
    pub catalog: Arc<Catalog>,
    pub search_path: Vec<Box<str>>,
    pub width: Width,
    /// While slots move: who touches them?
    pub apart: Option<Arc<Apart>>,
}

/// The servers of one shard and what is known of them. Databases of the wildcard entry share theirs.
pub struct Shard {
    pub name: Box<str>,
    /// Which of them is the primary.
    pub roles: Arc<Roles>,
    /// In the order of the configuration; the first is the one that it calls the primary.
    pub servers: Vec<Server>,
    pub words: Arc<Words>,
    pub clock: Clock,
    /// This proxy among others.
    pub member: Arc<Member>,
    /// The right to work by the map in force.
    pub map: Arc<MapLease>,
}

pub struct Database {
    pub name: Arc<str>,
    pub config: DatabaseConfig,
    view: ArcSwap<View>,
    /// By number; [`crate::servers`] appends those that join.
    pub shards: Growing<Arc<Shard>>,
    /// Their shares of the slots when those are placed anew, by number, as the hub has them.
    weights: Mutex<Vec<u32>>,
    /// How weir itself logs in to them.
    pub primaries: Arc<Primaries>,
    pub statements: Statements,
    pub cache: Option<Arc<Cache>>,
    /// Reads that have missed the cache and are under way.
    pub airspace: Arc<Airspace>,
    pub stats: DatabaseStats,
    pub seats: Arc<SeatCount>,
    pub sequences: Sequences,
    /// It came up because somebody asked for it, and goes when nobody does.
    pub on_demand: bool,
    /// Name for the cache: a database that was dropped and made anew is another one.
    identity: ArcSwap<String>,
    suspect: AtomicBool,
    paused: AtomicBool,
    /// What runs on its behalf, until it is taken down.
    tasks: Mutex<JoinSet<()>>,
    users: Mutex<HashMap<Arc<str>, Arc<UserPools>>>,
    pub notifiers: Arc<crate::notifiers::Notifiers>,
    /// What waited for its decision when recovery last looked.
    pub prepared: Mutex<Vec<Prepared>>,
    /// What is seen of writes that go round weir, per shard.
    pub decoding: Growing<crate::decode::Decoding>,
    /// Where the shards' schemas differ, as they were last compared.
    pub drift: Mutex<crate::catalog::drift::Compared>,
    turn: AtomicUsize,
    settings: Mutex<Followed>,
    catalog_login: Login,
    catalog_reading: tokio::sync::Mutex<()>,
    /// Somebody has asked for currval() or lastval(): from then on what draws from a sequence keeps its connection.
    pub asks_sequences: AtomicBool,
    /// What answers reads that the shards cannot.
    pub engine: Option<Arc<Engine>>,
    /// Columns that are unique over all shards; `None`: there are none.
    pub unique: Option<Arc<Unique>>,
    /// How all shards are seen at one moment; `None`: there is one shard.
    pub snapshots: Option<Arc<Snapshots>>,
    /// The last map of a time with one shard, which has company now: who began by it ends by it.
    alone: OnceLock<Topology>,
    /// How often the schema has changed since the catalogue in the view was read; 0: it is known to be true.
    catalog_doubts: AtomicU64,
    pub maps: Maps,
    pub hub: Option<Hub>,
    pub moves: KnownMoves,
}

/// Slots on their way.
#[derive(Default)]
pub struct KnownMoves {
    /// As the hub was last asked.
    pub rows: Mutex<Vec<MoveRow>>,
    /// Ready after something was said about them here: if it is this process that drives them, it looks at once.
    pub ordered: Notify,
}

impl Shard {
    /// May another server than the primary answer reads?
    pub fn has_replicas(&self) -> bool {
        self.servers.len() > 1
    }

    /// Do the words tell of every write now? Ask after looking at them. Without the clock a restart or promotion of the primary
    /// would go unnoticed; without a lease, the writes of other proxies; and those of a weir that is no peer in any case.
    pub fn watches_words(&self) -> Result<(), PrimaryBecause> {
        if !self.clock.connected() {
            return Err(PrimaryBecause::ClockDown);
        }
        if !self.clock.sole().may_serve() {
            return Err(PrimaryBecause::AnotherWeir);
        }
        if self.member.may_serve() && self.map.covers() { Ok(()) } else { Err(PrimaryBecause::NoLease) }
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
            search_path,
            ..self.clone()
        }
    }
}

/// What a [`Database`] is put together from.
pub struct Parts {
    pub topology: Topology,
    pub shards: Vec<Arc<Shard>>,
    pub primaries: Arc<Primaries>,
    pub cache: Option<Arc<Cache>>,
    pub stats: DatabaseStats,
    pub on_demand: bool,
    pub sequences: Sequences,
    pub engine: Option<Arc<Engine>>,
    pub unique: Option<Arc<Unique>>,
    pub snapshots: Option<Arc<Snapshots>>,
    /// If it has one shard, it may have more one day.
    pub grows: bool,
    pub hub: Option<Hub>,
}

impl Database {
    pub fn new(database: DatabaseConfig, parts: Parts) -> Arc<Self> {
        let Parts {
            topology,
            shards,
            primaries,
            cache,
            stats,
            on_demand,
            sequences,
            engine,
            unique,
            snapshots,
            grows,
            hub,
        } = parts;
        let catalog_login = primaries.of(topology.home).clone();
        let view = View {
            version: 1,
            rules: Arc::clone(&topology.tables),
            catalog: Arc::new(Catalog::default()),
            search_path: vec!["public".into()],
            width: topology.width(),
            apart: Apart::of(&topology).map(Arc::new),
            topology,
        };
        let maps = Maps::new(view.topology.epoch);
        stats.load.follow(&view.topology.slots);
        for shard in &shards {
            shard.map.install(view.topology.epoch);
        }
        let alone = shards.len() == 1 && !grows && cache.is_none() && !shards[0].has_replicas();
        let statements = Statements::new();
        Arc::new(Database {
            weights: Mutex::new(database.shards.iter().map(|shard| shard.weight).collect()),
            identity: ArcSwap::from_pointee(database.name.clone()),
            name: database.name.as_str().into(),
            stats,
            config: database,
            view: ArcSwap::from_pointee(view),
            decoding: shards.iter().map(|_| crate::decode::Decoding::new()).collect(),
            shards: shards.into_iter().collect(),
            primaries,
            statements: if alone { statements.for_one_server() } else { statements },
            cache,
            airspace: Arc::default(),
            seats: SeatCount::new(),
            sequences,
            on_demand,
            suspect: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            tasks: Mutex::default(),
            users: Mutex::default(),
            notifiers: Arc::default(),
            turn: AtomicUsize::new(0),
            settings: Mutex::default(),
            catalog_login,
            prepared: Mutex::default(),
            drift: Mutex::default(),
            catalog_reading: tokio::sync::Mutex::new(()),
            asks_sequences: AtomicBool::new(false),
            engine,
            unique,
            snapshots,
            alone: OnceLock::new(),
            catalog_doubts: AtomicU64::new(0),
            maps,
            hub,
            moves: KnownMoves::default(),
        })
    }

    pub fn view(&self) -> arc_swap::Guard<Arc<View>> {
        self.view.load()
    }

    pub fn view_arc(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// The map with one shard that whoever works by `epoch` began by, if it is not in force any more.
    pub fn alone_at(&self, epoch: Epoch) -> Option<&Topology> {
        self.alone.get().filter(|last| epoch <= last.epoch)
    }

    pub fn shard(&self, shard: ShardId) -> &Shard {
        &self.shards[shard]
    }

    /// Its share of the slots when those are placed anew; nothing for one that the hub has not told of yet.
    pub fn weight(&self, shard: ShardId) -> u32 {
        self.weights.lock().get(usize::from(shard.0)).copied().unwrap_or_default()
    }

    /// By number.
    pub fn set_weights(&self, weights: Vec<u32>) {
        *self.weights.lock() = weights;
    }

    /// Must writes be announced? Only where somebody else than the primary may answer reads.
    pub fn tracks_freshness(&self) -> bool {
        self.cache.is_some() || self.shards.iter().any(|shard| shard.has_replicas())
    }

    /// May a cache or a replica be asked? Not while it is uncertain what a statement reads.
    pub fn answers_elsewhere(&self) -> bool {
        self.tracks_freshness() && !self.doubts_catalog()
    }

    /// Has the schema changed since the catalogue was read? Then what a plan says of reads and writes may be wrong.
    pub fn doubts_catalog(&self) -> bool {
        self.catalog_doubts.load(Acquire) != 0
    }

    /// Looks after idle connections, and forgets users who have neither sessions nor connections. Call every second.
    pub fn upkeep(&self, now: Instant) {
        let changes = self.shards.iter().map(|shard| shard.clock.settings().changes()).sum();
        if self.settings.lock().follow(changes, now) {
            tracing::info!(database = %self.name, "settings of roles or databases have changed: server connections are replaced");
            self.reconnect();
            // What was read under the old ones may look otherwise now.
            self.shards.iter().for_each(|shard| shard.clock.begin_anew());
        }
        let view = self.view_arc();
        for (_, pools) in self.all_pools() {
            for (shard, _, pool) in pools.iter() {
                if view.topology.roster.state(shard) == Some(ShardState::Retired) {
                    pool.close_idle();
                } else {
                    pool.upkeep(now);
                }
            }
        }
        self.users.lock().retain(|_, pools| Arc::strong_count(pools) > 1 || pools.connections() > 0);
        if self.on_demand && self.is_detached() {
            self.suspect.store(true, Relaxed);
        }
    }

    /// Closes every idle server connection, so that the server can drop or copy the database. How many there were.
    pub fn close_idle(&self) -> usize {
        self.suspect.store(true, Relaxed);
        self.all_pools()
            .iter()
            .map(|(_, pools)| pools.iter().map(|(_, _, pool)| pool.close_idle()).sum::<usize>())
            .sum()
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Relaxed)
    }

    /// Keeps every session waiting that next needs a server connection.
    pub fn pause(&self) {
        // Under the lock, so that pools that are being made are either found here or find the flag.
        let users = self.users.lock();
        self.paused.store(true, Relaxed);
        users.values().for_each(|pools| pools.iter().for_each(|(_, _, pool)| pool.pause()));
    }

    pub fn resume(&self) {
        let users = self.users.lock();
        self.paused.store(false, Relaxed);
        users.values().for_each(|pools| pools.iter().for_each(|(_, _, pool)| pool.resume()));
    }

    /// Replaces every server connection at its next idle moment.
    pub fn reconnect(&self) {
        self.all_pools().iter().for_each(|(_, pools)| pools.iter().for_each(|(_, _, pool)| pool.reconnect()));
    }

    /// Is no server connection in use?
    pub fn is_quiet(&self) -> bool {
        self.all_pools().iter().all(|(_, pools)| pools.iter().all(|(_, _, pool)| pool.counts().busy == 0))
    }

    /// Is no server connection open? Then the database may have been dropped behind weir.
    fn is_detached(&self) -> bool {
        let held = |pool: &Arc<Pool>| pool.counts().busy + pool.counts().idle;
        self.all_pools().iter().all(|(_, pools)| pools.iter().all(|(_, _, pool)| held(pool) == 0))
    }

    /// Runs until the database is taken down.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.tasks.lock().spawn(task)
    }

    /// Ends everything that runs on its behalf. Its sessions, if there are any, go on.
    pub fn shut_down(&self) {
        self.tasks.lock().abort_all();
        self.close_idle();
    }

    /// All users' pools, for figures and upkeep.
    pub fn all_pools(&self) -> Vec<(Arc<str>, Arc<UserPools>)> {
        self.users.lock().iter().map(|(user, pools)| (Arc::clone(user), Arc::clone(pools))).collect()
    }

    /// Puts a shard at the end of the list, with all that is kept by shard. Statements go there once a topology says so. `None`: there
    /// is no room for it.
    pub fn append(&self, shard: Arc<Shard>, login: Login) -> Option<ShardId> {
        // Under the lock, so that pools that are being made are either found here or find the shard. It is in the list last.
        let users = self.users.lock();
        self.decoding.push(crate::decode::Decoding::new())?;
        self.primaries.push(login)?;
        if let Some(unique) = &self.unique {
            unique.append()?;
        }
        for pools in users.values() {
            pools.append(&self.name, &shard)?;
        }
        self.shards.push(shard).map(|number| ShardId(number as u16))
    }

    /// Puts a new topology into force, of shards that are all in the list.
    pub fn install_topology(&self, topology: Topology) {
        let old = self.view_arc();
        // A replica that lags would show slots as they were.
        for shard in follow::voided(&old.topology, &topology) {
            self.shard(shard).clock.begin_anew();
        }
        let apart = Apart::of(&topology).map(Arc::new);
        self.primaries.install(&topology.roster, Instant::now());
        if old.topology.is_single() && !topology.is_single() {
            // Before the new one can be seen: who works by the old one works on by it.
            let _ = self.alone.set(old.topology.clone());
        }
        self.view.rcu(|view| View {
            version: view.version
                + u64::from(topology.tables != view.rules || topology.width() != old.topology.width()),
            rules: Arc::clone(&topology.tables),
            width: topology.width(),
            apart: apart.clone(),
            topology: topology.clone(),
            ..View::clone(view)
        });
        self.stats.load.follow(&topology.slots);
        self.maps.note(&old.topology, &topology);
        self.shards.iter().for_each(|shard| shard.map.install(topology.epoch));
        for shard in old.topology.active().iter().filter(|shard| !topology.roster.is_active(**shard)) {
            self.decoding[*shard].stop();
            tracing::info!(database = %self.name, shard = %self.shard(*shard).name, "takes part no more: its idle connections are closed");
        }
        self.note_change();
    }

    /// After DDL, before its success is told. Where plans need the catalogue to find their shards it is read at once. Where
    /// there is one shard all statements go there anyhow: reads stay with the primary and writes count as writes of anything
    /// until a reading in the background has caught up.
    pub async fn schema_changed(self: &Arc<Self>) {
        if self.view().topology.is_single() {
            self.doubt_catalog();
            return;
        }
        self.refresh_catalog().await;
        crate::unique::catch_up(self).await;
    }

    /// DDL has changed what statements may mean, maybe without a trace in the catalogue (a type dropped and made anew): all are
    /// prepared anew from now on.
    pub fn renew_statements(&self) {
        self.view.rcu(|view| View { version: view.version + 1, ..View::clone(view) });
        self.note_change();
    }

    /// The schema has changed, and a reading in the background will tell how.
    ///
    /// The version changes at once: what servers have prepared for the old one may have another result type now.
    pub fn doubt_catalog(self: &Arc<Self>) {
        self.renew_statements();
        if self.catalog_doubts.fetch_add(1, AcqRel) == 0 {
            tokio::spawn(catch_up(Arc::downgrade(self)));
        }
    }

    /// Reads the home shard's catalogue again. On failure the old one stays and the next reading mends it.
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
            catalog: Arc::clone(&catalog),
            ..View::clone(view)
        });
        self.note_change();
        Ok(())
    }

    /// One reading on behalf of the doubts there are now. True: none is left.
    async fn settle_doubts(&self) -> bool {
        let _one_at_a_time = self.catalog_reading.lock().await;
        let doubts = self.catalog_doubts.load(Acquire);
        if self.shards.iter().any(|shard| shard.member.doubts_schema()) {
            // Another proxy is at it; what is read now may be over in a moment.
            return false;
        }
        let read = tokio::time::timeout(CATALOG_MAX, self.read_catalog()).await;
        matches!(read, Ok(Ok(()))) && self.catalog_doubts.compare_exchange(doubts, 0, AcqRel, Acquire).is_ok()
    }

    /// Where a statement would go and why, without running it.
    pub fn route(&self, sql: &str) -> Result<Vec<(String, String)>, UserError> {
        let view = self.view();
        let mut scratch = crate::statements::Scratch::default();
        let understood = self.statements.understand(sql, &view, &mut scratch);
        let values = weir_core::plan::Values { params: &[], sql, literals: &scratch.normal.literals };
        let mut plan = self.plan_of(&understood.template, &values, &view.topology)?;
        plan.cacheable = understood.hint.cacheable(plan.cacheable);
        let mut told = weir_core::plan::explain(&plan, &view.topology);
        if let (weir_core::plan::Target::Engine, Some(engine)) = (&plan.target, &self.engine) {
            told.push(("hub".to_owned(), engine.would_run_on()));
        }
        told.extend(self.route_level(&plan, understood.hint, &view.topology));
        Ok(told)
    }
}

/// Reads the catalogue until no doubt is left. Ends with its database.
async fn catch_up(db: Weak<Database>) {
    let mut pause = CATALOG_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        let Some(db) = db.upgrade() else { return };
        let start = Instant::now();
        if db.settle_doubts().await {
            return;
        }
        pause = CATALOG_PAUSE.max(start.elapsed() * CATALOG_SHARE);
    }
}
