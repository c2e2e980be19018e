//! Wiring: what one weir process is made of, and how it starts and stops.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::topology::TableRules;

use crate::auth::directory::Directory;
use crate::auth::query::AuthQuery;
use crate::back::connect::Login;
use crate::cache::{Cache, CacheSettings};
use crate::catalog;
use crate::config::{Config, ConfigError, DatabaseConfig, Endpoint, Flags, ShardConfig};
use crate::database::{Database, Parts, Primaries, Shard};
use crate::databases::Databases;
use crate::engine::Engine;
use crate::fleet::Fleet;
use crate::front::cancel::CancelRegistry;
use crate::front::tls::ClientTls;
use crate::hub::{Hub, HubMap};
use crate::metrics::{Metrics, Subject};
use crate::roles::{Roles, Route};
use crate::sequences::Sequences;
use crate::servers::{chart, charts, know_primaries, watch_all};
use crate::snapshot::Snapshots;
use crate::stats::{ClientCount, DatabaseStats};
use crate::unique::Unique;

/// How often databases and their idle server connections are looked at.
const UPKEEP: Duration = Duration::from_secs(1);
/// How often samples are folded and averages taken.
const TICK: Duration = Duration::from_secs(5);
/// How often the catalogue is read again, for DDL that went round weir.
const CATALOG_EVERY: Duration = Duration::from_secs(30);

pub struct App {
    config: ArcSwap<Config>,
    /// How `config` was said, so that it can be read again.
    pub source: ConfigSource,
    pub databases: Databases,
    pub cancels: Arc<CancelRegistry>,
    pub clients: Arc<ClientCount>,
    /// What handshakes need; `None` where TLS is off.
    pub tls: ArcSwapOption<ClientTls>,
    pub metrics: Arc<Metrics>,
    /// Other proxies in front of the same servers; `None`: there are none.
    pub fleet: Option<Arc<Fleet>>,
    /// Who may log in.
    pub directory: Directory,
    pub started: Instant,
    pub listening: AtomicBool,
    pub draining: AtomicBool,
}

/// What the configuration is read from.
#[derive(Clone, Debug, Default)]
pub struct ConfigSource {
    pub file: Option<PathBuf>,
    pub flags: Flags,
    pub log_level: Option<crate::log::Level>,
}

/// An [`App`] with its sockets and background tasks.
pub struct Running {
    pub app: Arc<App>,
    listener: TcpListener,
    http: TcpListener,
    tasks: JoinSet<()>,
}

/// What databases are made on: servers that are probed and clocked, and a cache.
#[derive(Clone)]
pub struct Basis {
    pub config: DatabaseConfig,
    pub shards: Vec<Arc<Shard>>,
    /// For databases of the wildcard entry.
    pub on_demand: bool,
    cache: Option<Arc<Cache>>,
    hub: Option<Hub>,
    pub fleet: Option<Arc<Fleet>>,
    pub metrics: Arc<Metrics>,
}

impl ConfigSource {
    pub fn read(&self) -> Result<Config, ConfigError> {
        Config::load_with(self.file.as_deref(), &self.flags)
    }
}

impl App {
    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Puts another one into force, as far as it can be changed at run time ([`crate::reload`] checks that).
    pub fn install(&self, config: Config) {
        self.clients.set_max(config.limits.client_connections_max);
        self.directory.set_users(&config.users);
        self.config.store(Arc::new(config));
        let config = self.config();
        for db in self.databases() {
            db.reconfigure(&config);
        }
    }

    pub fn database(&self, name: &str) -> Option<Arc<Database>> {
        self.databases.get(name)
    }

    pub fn databases(&self) -> Vec<Arc<Database>> {
        self.databases.all()
    }

    /// The database that a command of the console names, or the only one there is. `command`: its name, and how it is written with
    /// one. Errors: 3D000.
    pub fn database_meant(&self, name: Option<&str>, command: (&str, &str)) -> Result<Arc<Database>, UserError> {
        let all = self.databases();
        let found = match (name, all.as_slice()) {
            (Some(name), _) => self.database(name),
            (None, [only]) => Some(Arc::clone(only)),
            (None, _) => None,
        };
        found.ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|db| &*db.name).collect();
            let (command, written) = command;
            let message = format!("{command} does not know which database is meant");
            UserError::new(Blame::Client, sqlstate::UNKNOWN_DATABASE, message)
                .hint(format!("Write {written} with one of: {}.", names.join(", ")))
        })
    }

    pub fn is_admin_database(&self, name: &str) -> bool {
        matches!(name, "weir" | "pgbouncer")
    }

    /// May this user see the console?
    pub fn admit_admin(&self, user: &str) -> Result<(), UserError> {
        let named = |users: &[String]| users.iter().any(|name| name == user);
        let config = self.config();
        if named(&config.admin_users) || named(&config.stats_users) {
            return Ok(());
        }
        Err(UserError::new(
            Blame::Client,
            sqlstate::INVALID_AUTHORIZATION,
            format!("user \"{user}\" may not use the admin console"),
        )
        .hint("List the user in admin_users or stats_users of the config file."))
    }

    /// Why this process should get no traffic; empty: it is ready.
    pub fn not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.draining.load(Relaxed) {
            reasons.push("shutting down".to_owned());
        }
        if !self.listening.load(Relaxed) {
            reasons.push("not listening yet".to_owned());
        }
        let mut look = |name: &str, shard: &Shard| {
            if !shard.roles.has_been_up() {
                reasons.push(format!("{name}/{}: the primary has not been reached yet", shard.name));
            }
        };
        for db in self.databases() {
            db.view().topology.active().iter().for_each(|shard| look(&db.name, db.shard(*shard)));
        }
        if let Some(any) = self.databases.wildcard() {
            any.shards.iter().for_each(|shard| look(&any.config.name, shard));
        }
        reasons
    }
}

impl Running {
    /// Connects to hub and servers, reads map and catalogue, and opens the sockets.
    pub async fn start(config: Config, source: ConfigSource) -> Result<Running> {
        let listener =
            TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
        let http = TcpListener::bind(config.http_listen)
            .await
            .with_context(|| format!("cannot listen on {}", config.http_listen))?;
        if let Some(wildcard) = &config.wildcard {
            meet_any(&config, wildcard).await?;
        }
        let hub = match &config.hub {
            // Boxed: it is only done once, and all of the start would carry room for it.
            Some(hub) => Some(Box::pin(Hub::connect(hub)).await.context("hub")?),
            None => None,
        };
        let mut tasks = JoinSet::new();
        let cancels = Arc::default();
        let charts = charts(&config, hub.as_ref()).await?;
        let fleet = match &config.peers {
            Some(peers) => Some(Fleet::start(peers, &cancels, &mut tasks).await?),
            None => None,
        };
        let metrics = Arc::new(Metrics::new(&charts.iter().map(|(_, known)| subject(known)).collect::<Vec<_>>())?);
        let mut basis = |database: &DatabaseConfig, map: Option<&HubMap>| -> Result<Basis> {
            Ok(Basis {
                shards: watch_all(&config, database, map, fleet.as_ref(), &mut tasks),
                fleet: fleet.clone(),
                config: database.clone(),
                cache: start_cache(&config)?,
                hub: hub.clone(),
                on_demand: false,
                metrics: Arc::clone(&metrics),
            })
        };
        let mut named = Vec::new();
        for (map, known) in charts {
            let basis = basis(&known, Some(&map))?;
            know_primaries(&basis.shards, Some(&map)).await;
            named.push(start_database(&config, &basis, map).await?);
        }
        let wildcard = config.wildcard.as_ref().map(|any| basis(any, None)).transpose()?;
        if let Some(wildcard) = &wildcard {
            know_primaries(&wildcard.shards, None).await;
        }
        let auth_query = auth_query(&config, &named, wildcard.as_ref());
        let tls = ClientTls::of(&config).context("tls")?;
        let app = Arc::new(App {
            clients: ClientCount::new(config.limits.client_connections_max),
            databases: Databases::new(named, wildcard),
            cancels,
            tls: ArcSwapOption::new(tls),
            metrics,
            fleet,
            directory: Directory::new(&config.users, auth_query),
            started: Instant::now(),
            listening: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            config: ArcSwap::from_pointee(config),
            source,
        });
        app.look_after(&mut tasks);
        Ok(Running { app, listener, http, tasks })
    }

    /// One line for whoever started it by hand.
    pub fn introduction(&self) -> Result<String> {
        let config = self.app.config();
        let mut served: Vec<String> = config.databases.iter().map(|database| database.name.clone()).collect();
        if let Some(any) = &config.wildcard {
            let primary = &any.shards[usize::from(any.home.0)].primary;
            served.push(format!("every database of {primary}"));
        }
        let (listen, http) = (self.listener.local_addr()?, self.http.local_addr()?);
        Ok(format!("weir listens on {listen} and serves {}; status on http://{http}/", served.join(", ")))
    }

    /// Serves until `stop` resolves, then lets running sessions finish for a while.
    pub async fn serve(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let app = Arc::clone(&self.app);
        tracing::info!(postgres = %self.listener.local_addr()?, http = %self.http.local_addr()?, "weir is up");
        let operator = Arc::new(crate::console::source::HttpSource(Arc::clone(&app)));
        let http = self.http;
        self.tasks.spawn(async move {
            if let Err(error) = crate::http::serve(http, operator, std::future::pending()).await {
                tracing::error!("the HTTP side ended: {error}");
            }
        });
        app.listening.store(true, Relaxed);
        crate::front::listen::run(Arc::clone(&app), self.listener, stop).await;
        app.draining.store(true, Relaxed);
        let deadline = Instant::now() + app.config().limits.drain_time_max;
        while app.busy_sessions() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if let Some(fleet) = &app.fleet {
            fleet.leave().await;
        }
        self.tasks.abort_all();
        Ok(())
    }
}

impl App {
    /// What runs as long as the process.
    fn look_after(self: &Arc<Self>, tasks: &mut JoinSet<()>) {
        for db in self.databases() {
            if let Some(hub) = db.hub.clone() {
                let (app, of) = (Arc::clone(self), Arc::clone(&db));
                db.spawn(async move {
                    of.maps.several(&of).await;
                    tokio::join!(crate::load::run(hub.clone(), Arc::clone(&of)), crate::mover::run(app, hub, of));
                });
            }
        }
        tasks.spawn(upkeep(Arc::clone(self)));
        tasks.spawn(crate::front::time_out::run(Arc::clone(self)));
        tasks.spawn(crate::reload::on_signal(Arc::clone(self)));
    }

    fn busy_sessions(&self) -> usize {
        self.databases().iter().map(|db| db.stats.live().iter().filter(|session| session.is_busy()).count()).sum()
    }
}

/// The first connections to the server of the wildcard, or to a replica that may have taken its place.
async fn meet_any(config: &Config, wildcard: &DatabaseConfig) -> Result<()> {
    let home = &wildcard.shards[usize::from(wildcard.home.0)];
    let met = meet(config, wildcard, &home.primary).await;
    if met.is_err() {
        for replica in &home.replicas {
            if meet(config, wildcard, replica).await.is_ok() {
                return Ok(());
            }
        }
    }
    met
}

/// What is wrong with a server is told at once, with what to do.
async fn meet(config: &Config, wildcard: &DatabaseConfig, primary: &Endpoint) -> Result<()> {
    let login = control_login(config, wildcard, primary);
    let met = tokio::time::timeout(2 * config.limits.connect_time_max, crate::control::connect(&login)).await;
    let error = match met {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) => error,
        Err(_) => anyhow!("no answer within {:?}", 2 * config.limits.connect_time_max),
    };
    let refusal = error.downcast_ref::<tokio_postgres::Error>();
    let code = refusal.and_then(|error| error.code()).map(tokio_postgres::error::SqlState::code);
    let what_to_do = match code {
        Some("28P01") => "check the password: in PGPASSWORD, in a password file (PGPASSFILE), or in the DSN",
        Some("28000") => "let weir's address in: pg_hba.conf of that server",
        Some("3D000") => "name a database that weir's own connections may use: postgres://user@host:port/database",
        Some(_) => "see the log of that server",
        None if format!("{error:#}").contains("password missing") => {
            "give its password in PGPASSWORD, in a password file (PGPASSFILE), or in the DSN"
        }
        None => "check host and port, that Postgres runs there, and that it listens on that address",
    };
    let dsn = format!("postgres://{}@{primary}/{}", login.user, login.database);
    Err(error.context(format!("cannot log in to {dsn}; {what_to_do}")))
}

/// One database, ready for clients: `map` has the shards of `basis`, and the catalogue is read.
pub async fn start_database(config: &Config, basis: &Basis, map: HubMap) -> Result<Arc<Database>> {
    let (topology, database) = (map.topology, &basis.config);
    let of = || format!("database {}", database.name);
    let logins = basis.shards.iter().map(|shard| primary_login(config, database, &shard.roles)).collect();
    let primaries = Primaries::new(logins, &topology.roster);
    let several = !topology.is_single();
    // It may have company one day.
    let grows = basis.hub.is_some() && !basis.on_demand && topology.tables.any_sharded();
    let unique = Unique::declared(&topology, &primaries).filter(|_| several || grows);
    if several {
        let logins: Vec<Login> = primaries.active().into_iter().map(|(_, login)| login).collect();
        crate::recover::prepare(&logins).await.with_context(of)?;
        Unique::prepare(unique.as_deref(), &primaries).await.with_context(of)?;
    }
    let figures = basis.metrics.enroll(&subject(database));
    let served = (several || grows).then(|| Arc::clone(&primaries));
    let parts = Parts {
        shards: basis.shards.clone(),
        cache: basis.cache.clone(),
        stats: DatabaseStats::new(Arc::clone(&basis.metrics), figures),
        on_demand: basis.on_demand,
        sequences: Sequences::new(&database.name, basis.hub.clone(), Arc::clone(&primaries)),
        engine: served
            .clone()
            .filter(|_| !basis.on_demand)
            .and_then(|shards| Engine::new((config, basis.hub.as_ref()), database, shards)),
        unique,
        snapshots: served.map(Snapshots::new),
        grows,
        hub: basis.hub.clone(),
        primaries,
        topology,
    };
    let db = Database::new(database.clone(), parts);
    if let Some(fleet) = &basis.fleet {
        fleet.enroll(&db);
    }
    db.refresh_catalog().await;
    report_rules(&db).await;
    if several {
        crate::unique::catch_up(&db).await;
        crate::servers::look_after_several(&db);
    }
    db.spawn(reread_catalog(Arc::clone(&db)));
    for shard in db.view_arc().topology.active() {
        crate::decode::start(config, &db, *shard);
    }
    if let Some(hub) = basis.hub.clone().filter(|_| several || !basis.on_demand) {
        db.spawn(crate::map::run(hub, Arc::clone(&db), Arc::new(config.clone()), basis.clone()));
    }
    Ok(db)
}

impl Basis {
    /// For one database of the wildcard entry, with its shards in the order of its map. Errors: the hub knows a shard that the entry
    /// does not name.
    pub async fn on_demand(&self, database: &DatabaseConfig) -> Result<(Basis, HubMap)> {
        let hub = self.hub.as_ref().filter(|_| database.shards.len() > 1);
        let (map, config) = chart(hub, database).await?;
        let find = |shard: &ShardConfig| {
            let known = self.shards.iter().find(|known| *known.name == *shard.name).cloned();
            known.with_context(|| format!("shard {} is in the hub and not in [database.\"*\"]", shard.name))
        };
        let shards = map.shards.iter().map(find).collect::<Result<_>>()?;
        Ok((Basis { config, shards, on_demand: true, ..self.clone() }, map))
    }
}

/// Users are looked up on the home shard of one database: on whoever is its primary, or a replica while there is none.
fn auth_query(config: &Config, named: &[Arc<Database>], wildcard: Option<&Basis>) -> Option<AuthQuery> {
    let query = config.auth_query.as_ref()?;
    let of_named =
        |db: &Arc<Database>| Some((db.config.clone(), db.shards.get(usize::from(db.config.home.0))?.clone()));
    let of_any = |any: &Basis| Some((any.config.clone(), any.shards.get(usize::from(any.config.home.0))?.clone()));
    let (database, home) = match &query.database {
        Some(name) => of_named(named.iter().find(|db| *db.name == **name)?)?,
        None => wildcard.and_then(of_any).or(named.first().and_then(of_named))?,
    };
    let primary = crate::control::target(&primary_login(config, &database, &home.roles));
    let servers = home.servers.iter().map(|server| &*server.view.endpoint);
    let servers = servers.map(|endpoint| crate::control::target(&control_login(config, &database, endpoint)));
    Some(AuthQuery::new(&query.sql, primary, servers.collect(), Arc::clone(&home.roles), query.max_age))
}

/// What is counted of a database.
fn subject(database: &DatabaseConfig) -> Subject {
    Subject { database: database.name.clone(), shards: database.shards.iter().map(shard_subject).collect() }
}

pub fn shard_subject(shard: &ShardConfig) -> (String, Vec<String>) {
    let servers = std::iter::once(&shard.primary).chain(&shard.replicas).map(ToString::to_string).collect();
    (shard.name.clone(), servers)
}

/// How weir itself logs in to a server of a database.
pub fn control_login(config: &Config, database: &DatabaseConfig, endpoint: &Endpoint) -> Login {
    own_login(config, database, endpoint, Route::Server(Arc::new(endpoint.clone())))
}

/// The same to whoever is the primary of a shard. All of its servers have the same accounts.
pub fn primary_login(config: &Config, database: &DatabaseConfig, roles: &Arc<Roles>) -> Login {
    own_login(config, database, &roles.first(), Route::Primary(Arc::clone(roles)))
}

fn own_login(config: &Config, database: &DatabaseConfig, endpoint: &Endpoint, route: Route) -> Login {
    Login {
        route,
        user: config.server_auth.user.as_str().into(),
        database: database.server_database.as_str().into(),
        credential: config.server_auth.credential(&endpoint.host, endpoint.port, &database.server_database).into(),
        tls: config.server_auth.tls.clone(),
        deadline: config.limits.connect_time_max,
    }
}

fn start_cache(config: &Config) -> Result<Option<Arc<Cache>>> {
    if !config.cache.enabled {
        return Ok(None);
    }
    let settings = CacheSettings {
        l1_bytes_max: config.cache.l1_bytes,
        entry_bytes_max: config.cache.entry_bytes_max,
        compress_above: config.cache.compress_above,
        age_max: config.cache.max_age,
        redis: config.cache.redis.clone(),
        namespace: crate::names::namespace(config),
    };
    Ok(Some(Arc::new(Cache::new(settings)?)))
}

/// Where the schemas of each database's shards differ, in lines to be read.
pub async fn differences(config: &Config) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for database in config.databases.iter().filter(|database| database.shards.len() > 1) {
        let mut logins: Vec<Login> = Vec::new();
        for shard in &database.shards {
            let roles = crate::probe::once(shard, &config.server_auth, &database.server_database).await;
            logins.push(primary_login(config, database, &roles));
        }
        let mut rules = TableRules::default();
        for table in &database.tables {
            rules.insert(&table.schema, &table.name, table.placement.clone());
        }
        for drift in catalog::drift::read(&logins, &rules).await? {
            let object = &drift.object;
            lines.push(format!("{}: {} {} of {}", database.name, object.kind, object.name, object.table));
            for (shard, definition) in database.shards.iter().zip(&drift.definitions) {
                lines.push(format!("  {}: {}", shard.name, definition.as_deref().unwrap_or("missing")));
            }
        }
    }
    Ok(lines)
}

/// Says in the log where the declared tables do not fit the servers' schema.
async fn report_rules(db: &Database) {
    let view = db.view();
    let foreign_keys = db.foreign_keys().await.unwrap_or_default();
    for problem in catalog::check_rules(&view.rules, &view.catalog, &foreign_keys) {
        tracing::warn!(database = %db.name, "{problem}");
    }
}

async fn reread_catalog(db: Arc<Database>) {
    loop {
        tokio::time::sleep(CATALOG_EVERY).await;
        if !db.on_demand || db.seats.now() > 0 {
            db.refresh_catalog().await;
        }
    }
}

async fn upkeep(app: Arc<App>) {
    let mut last_tick = Instant::now();
    loop {
        tokio::time::sleep(UPKEEP).await;
        let now = Instant::now();
        if now.duration_since(last_tick) >= TICK {
            app.metrics.upkeep();
            app.metrics.tick(now.duration_since(last_tick));
            last_tick = now;
        }
        app.databases.upkeep(&app.config(), now);
    }
}
