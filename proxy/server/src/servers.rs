//! Bringing up the servers of shards: probes, clocks and this proxy's place among others, at the start and whenever a shard joins.
//!
//! Invariant: a shard is in every list that is read by its number before a topology names it; and one takes part here only after its
//! objects have been made, or after that has been tried for a while. Sessions never wait for any of it. Non-goals: what a shard must have
//! before it may be activated (that is the mover's), and who its primary is ([`crate::roles`]).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinSet;
use weir_core::fresh::words::Words;
use weir_core::id::{Epoch, ShardId};
use weir_core::topology::{Roster, ShardState, Topology, Width};

use crate::app::{Basis, control_login, primary_login, shard_subject};
use crate::clock::Clock;
use crate::config::{Config, DatabaseConfig, PeersMode, ShardConfig};
use crate::database::lease::MapLease;
use crate::database::progress::{self, Progress};
use crate::database::{Database, Server, Shard};
use crate::decode;
use crate::fleet::Fleet;
use crate::fleet::member::Member;
use crate::hub::{Hub, HubMap, without_hub};
use crate::probe::{self, EndpointView};
use crate::roles::Roles;
use crate::sole::Sole;

/// How long a map waits for the objects of a shard that begins to take part.
const READY_MAX: Duration = Duration::from_secs(5);
/// Between two attempts to make them, and the longest one.
const RETRY: Duration = Duration::from_secs(1);
/// Between two looks at the catalogue while another proxy makes triggers.
const SEE_AGAIN: Duration = Duration::from_millis(50);
const ATTEMPT_MAX: Duration = Duration::from_secs(10);

/// The map of a database, and the database with the shards of that map, in its order.
pub async fn chart(hub: Option<&Hub>, database: &DatabaseConfig) -> Result<(HubMap, DatabaseConfig)> {
    let map = match hub {
        Some(hub) => {
            // Before the map is read: whoever changes it after that waits for this proxy.
            let read = async {
                hub.acknowledge(&database.name, crate::map::proxy_id(), Epoch(0)).await?;
                hub.load_or_propose(database).await
            };
            read.await.with_context(|| format!("hub, database {}", database.name))?
        }
        None => without_hub(database),
    };
    let known = DatabaseConfig { shards: map.shards.clone(), home: map.topology.home, ..database.clone() };
    Ok((map, known))
}

/// The same for all databases of the file, whose servers know of no other proxies that do not fit.
pub async fn charts(config: &Config, hub: Option<&Hub>) -> Result<Vec<(HubMap, DatabaseConfig)>> {
    let mut charts = Vec::new();
    for database in &config.databases {
        let (map, known) = chart(hub, database).await?;
        agree_with_peers(config, &known, Some(&map)).await?;
        charts.push((map, known));
    }
    if let Some(wildcard) = &config.wildcard {
        agree_with_peers(config, wildcard, None).await?;
    }
    Ok(charts)
}

/// Errors: another proxy in front of the same servers hears of writes in another way.
async fn agree_with_peers(config: &Config, database: &DatabaseConfig, map: Option<&HubMap>) -> Result<()> {
    let Some(mode) = config.peers.as_ref().map(|peers| peers.mode) else { return Ok(()) };
    for (number, shard) in database.shards.iter().enumerate() {
        if map.is_none_or(|map| map.topology.roster.is_active(ShardId(number as u16))) {
            agree(config, database, shard, mode).await?;
        }
    }
    Ok(())
}

async fn agree(config: &Config, database: &DatabaseConfig, shard: &ShardConfig, mode: PeersMode) -> Result<()> {
    let server = crate::control::target(&control_login(config, database, &shard.primary));
    crate::fleet::keeper::agrees(&server, mode).await.with_context(|| format!("{}", shard.primary))
}

/// All shards of a database, by number. `map`: with the state of each; without it all take part.
pub fn watch_all(
    config: &Config,
    database: &DatabaseConfig,
    map: Option<&HubMap>,
    fleet: Option<&Arc<Fleet>>,
    tasks: &mut JoinSet<()>,
) -> Vec<Arc<Shard>> {
    let shards = database.shards.iter().enumerate().map(|(number, shard)| {
        let state = map.and_then(|map| map.topology.roster.state(ShardId(number as u16)));
        if state == Some(ShardState::Retired) {
            let shard = watch_one(config, (database, shard), None, &mut JoinSet::new());
            shard.clock.stop();
            return shard;
        }
        watch_one(config, (database, shard), fleet, tasks)
    });
    shards.collect()
}

/// Probes and clock of a shard's servers, and this proxy's place among others; they run until `tasks` is dropped.
fn watch_one(
    config: &Config,
    (database, shard): (&DatabaseConfig, &ShardConfig),
    fleet: Option<&Arc<Fleet>>,
    tasks: &mut JoinSet<()>,
) -> Arc<Shard> {
    let views = std::iter::once(&shard.primary).chain(&shard.replicas);
    let views: Vec<_> = views.map(|endpoint| EndpointView::new(endpoint.clone())).collect();
    let roles = Roles::new(&shard.name, views.clone());
    for view in &views {
        let server = probe::target(view, &config.server_auth, &database.server_database);
        tasks.spawn(probe::run(Arc::clone(view), Arc::clone(&roles), server));
    }
    let servers = views.into_iter().map(|view| {
        let progress = Progress::new();
        let server = crate::control::target(&control_login(config, database, &view.endpoint));
        tasks.spawn(progress::follow(Arc::clone(&progress), server));
        Server::new(view, progress, &config.zones)
    });
    let servers = servers.collect();
    let words = Arc::new(Words::seeded(rand::random()));
    let server = crate::control::target(&primary_login(config, database, &roles));
    let member = Member::new(fleet.cloned(), Arc::clone(&words), Arc::clone(roles.generation()));
    let map = MapLease::new(config.hub.is_some() && !database.is_wildcard());
    if !map.covers() {
        tasks.spawn(Arc::clone(&map).follow(server.clone()));
    }
    let sole = Sole::new(crate::names::sign(config, database), config.cache.other_weirs);
    let made = Arc::new(Shard {
        name: shard.name.as_str().into(),
        roles,
        servers,
        clock: Clock::start(server.clone(), Arc::clone(&words), Arc::clone(&member), sole),
        words,
        member,
        map,
    });
    if let Some(fleet) = fleet {
        fleet.take_part(&made, server, tasks);
    }
    made
}

/// Waits for the servers' first words on who is the primary, and until other weirs must know that this one is there. What goes on
/// without says so itself.
pub async fn know_primaries(shards: &[Arc<Shard>], map: Option<&HubMap>) {
    let is_active = |number: usize| map.is_none_or(|map| map.topology.roster.is_active(ShardId(number as u16)));
    let active = || shards.iter().enumerate().filter(|(number, _)| is_active(*number)).map(|(_, shard)| shard);
    for shard in active().filter(|shard| shard.roles.may_change()) {
        shard.roles.decided(probe::FIRST_WORD_MAX).await;
    }
    join_all(active().map(|shard| shard.clock.sole().settled())).await;
}

/// Brings up the shards of a database that come while it is served.
pub struct Joining {
    db: Arc<Database>,
    config: Arc<Config>,
    basis: Basis,
    /// Shards that have the objects they need to take part.
    ready: watch::Sender<Vec<ShardId>>,
}

impl Joining {
    /// Begins with those that were joining before.
    pub fn new(db: &Arc<Database>, config: Arc<Config>, basis: Basis) -> Self {
        let topology = &db.view_arc().topology;
        // One that is alone needs no objects.
        let ready = watch::Sender::new(if topology.is_single() { Vec::new() } else { topology.active().to_vec() });
        let this = Joining { db: Arc::clone(db), config, basis, ready };
        for (shard, _) in db.shards.by_shard() {
            if topology.roster.state(shard) == Some(ShardState::Joining) {
                this.prepare(shard);
            }
        }
        this
    }

    /// Makes everything ready for a map; then it can be put into force. `None`: this process cannot work by it.
    pub async fn admit(&self, map: HubMap) -> Option<Topology> {
        let db = &self.db;
        let (last, topology) = (db.view_arc(), map.topology);
        if last.topology.is_single() && !topology.is_single() {
            if !last.rules.any_sharded() {
                tracing::warn!(database = %db.name, "the hub knows a second shard, and the config file declares no sharded tables: it stays alone");
                return None;
            }
            if self.ready.borrow().is_empty() {
                self.get_company(&last.topology).await;
            }
        }
        if last.width != Width::Several && topology.width() == Width::Several {
            self.see_triggers().await;
        }
        if self.basis.on_demand && map.shards.len() > db.shards.len() {
            tracing::warn!(database = %db.name, "the hub knows a new shard; add it to the wildcard entry and restart this weir");
            return None;
        }
        for shard in map.shards.iter().skip(db.shards.len()) {
            if let Err(error) = self.append(shard, &topology.roster) {
                tracing::error!(database = %db.name, shard = shard.name, "cannot join here, so the last map stays in force: {error:#}");
                return None;
            }
        }
        db.set_weights(map.shards.iter().map(|shard| shard.weight).collect());
        let begins = |shard: &ShardId| !last.topology.roster.is_active(*shard);
        let begin: Vec<ShardId> = topology.active().iter().copied().filter(begins).collect();
        self.wait_for(&begin).await;
        for shard in begin {
            decode::start(&self.config, db, shard);
        }
        Some(topology)
    }

    /// The one shard gets what several need, however long that takes: nothing moves until this proxy works by the new map.
    async fn get_company(&self, alone: &Topology) {
        alone.active().iter().for_each(|shard| self.prepare(*shard));
        while !self.are_ready(alone.active()).await {
            tracing::warn!(database = %self.db.name, "a second shard has to wait: weir's objects cannot be made on the first one yet");
        }
        tracing::info!(database = %self.db.name, "a second shard is to come: statements are routed from now on");
        look_after_several(&self.db);
    }

    /// Whoever lets a second shard in has made triggers of columns that are unique over all shards; until this proxy has seen them it can
    /// only refuse to write such tables.
    async fn see_triggers(&self) {
        let Some(unique) = &self.db.unique else { return };
        let seen = async {
            self.db.refresh_catalog().await;
            while unique.lacks(&self.db.view()) {
                tokio::time::sleep(SEE_AGAIN).await;
                self.db.refresh_catalog().await;
            }
        };
        if tokio::time::timeout(READY_MAX, seen).await.is_err() {
            tracing::warn!(database = %self.db.name, "globally unique columns are not seen to be ready: writes of their tables are refused until then");
        }
    }

    /// One more shard, in every list.
    fn append(&self, shard: &ShardConfig, roster: &Roster) -> Result<()> {
        let db = &self.db;
        let mut tasks = JoinSet::new();
        let fleet = self.basis.fleet.as_ref();
        let made = watch_one(&self.config, (&db.config, shard), fleet, &mut tasks);
        let login = primary_login(&self.config, &db.config, &made.roles);
        self.basis.metrics.add_shard(&db.stats.database, &shard_subject(shard));
        let id = db.append(made, login).ok_or_else(|| anyhow!("this process has room for no more"))?;
        let state = roster.state(id).unwrap_or(ShardState::Joining);
        tracing::info!(database = %db.name, shard = shard.name, primary = %shard.primary, "a shard is {}", state.as_str());
        db.spawn(async move { while tasks.join_next().await.is_some() {} });
        if state != ShardState::Retired {
            self.prepare(id);
        }
        Ok(())
    }

    /// Makes the objects a shard needs to take part, however often it takes.
    fn prepare(&self, shard: ShardId) {
        let (db, ready) = (Arc::clone(&self.db), self.ready.clone());
        self.db.spawn(async move {
            loop {
                let made = tokio::time::timeout(ATTEMPT_MAX, make_objects(&db, shard));
                match made.await.unwrap_or_else(|_| Err(anyhow!("no answer within {ATTEMPT_MAX:?}"))) {
                    Ok(()) => break ready.send_modify(|ready| ready.push(shard)),
                    Err(error) => {
                        tracing::debug!(database = %db.name, shard = %db.shard(shard).name, "cannot be prepared yet: {error:#}");
                    }
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }

    /// Waits until these have weir's objects. False: it took longer than [`READY_MAX`].
    async fn are_ready(&self, shards: &[ShardId]) -> bool {
        let mut ready = self.ready.subscribe();
        let all = ready.wait_for(|ready| shards.iter().all(|shard| ready.contains(shard)));
        tokio::time::timeout(READY_MAX, all).await.is_ok()
    }

    /// Until these are ready, or for so long: without its objects a shard can only refuse, and never mislead.
    async fn wait_for(&self, shards: &[ShardId]) {
        if !self.are_ready(shards).await {
            let names: Vec<&str> = shards.iter().map(|shard| &*self.db.shard(*shard).name).collect();
            tracing::warn!(database = %self.db.name, shards = names.join(", "), "takes part before its objects could be made");
        }
    }
}

/// What has to be looked after where there are several shards.
pub fn look_after_several(db: &Arc<Database>) {
    db.spawn(crate::catalog::drift::watch(Arc::clone(db)));
    db.spawn(crate::recover::run(Arc::clone(db)));
    if let Some(unique) = db.unique.clone() {
        db.spawn(crate::unique::run(Arc::clone(db), unique));
    }
    if let Some(engine) = &db.engine {
        crate::engine::start(engine, db);
    }
}

/// May be done again.
async fn make_objects(db: &Database, shard: ShardId) -> Result<()> {
    crate::recover::prepare(&[db.primaries.of(shard).clone()]).await?;
    match &db.unique {
        Some(unique) => unique.prepare_shard(shard).await,
        None => Ok(()),
    }
}
