//! Wiring: what one weir process is made of, and how it starts and stops.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::future::join_all;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::sign::Sign;
use weir_core::fresh::words::Words;
use weir_core::topology::TableRules;

use crate::auth::directory::Directory;
use crate::auth::query::AuthQuery;
use crate::back::connect::Login;
use crate::cache::{Cache, CacheSettings};
use crate::catalog;
use crate::clock::Clock;
use crate::config::{Config, ConfigError, DatabaseConfig, Endpoint, Flags, PeersMode};
use crate::database::progress::{self, Progress};
use crate::database::{Database, Parts, Server, Shard};
use crate::databases::Databases;
use crate::engine::Engine;
use crate::fleet::Fleet;
use crate::fleet::member::Member;
use crate::front::cancel::CancelRegistry;
use crate::front::tls::ClientTls;
use crate::hub::{Hub, HubEvent, without_hub};
use crate::metrics::{Metrics, Subject};
use crate::probe::{self, EndpointView};
use crate::roles::{Roles, Route};
use crate::sequences::Sequences;
use crate::snapshot::Snapshots;
use crate::sole::Sole;
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
pub struct Basis {
    pub config: DatabaseConfig,
    pub shards: Vec<Arc<Shard>>,
    cache: Option<Arc<Cache>>,
    hub: Option<Hub>,
    fleet: Option<Arc<Fleet>>,
    metrics: Arc<Metrics>,
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
        let wildcard = self.databases.wildcard().map(|any| (any.config.name.as_str(), any.shards.as_slice()));
        let all = self.databases();
        for (name, shards) in all.iter().map(|db| (&*db.name, db.shards.as_slice())).chain(wildcard) {
            for shard in shards.iter().filter(|shard| !shard.roles.has_been_up()) {
                reasons.push(format!("{name}/{}: the primary has not been reached yet", shard.name));
            }
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
            Some(hub) => Some(Hub::connect(hub).await.context("hub")?),
            None => None,
        };
        let mut tasks = JoinSet::new();
        let cancels = Arc::default();
        let fleet = match &config.peers {
            Some(peers) => {
                agree_with_peers(&config, peers.mode).await?;
                Some(Fleet::start(peers, &cancels, &mut tasks).await?)
            }
            None => None,
        };
        let metrics = Arc::new(Metrics::new(&config.databases.iter().map(subject).collect::<Vec<_>>())?);
        let process = rand::random();
        let mut basis = |database: &DatabaseConfig| -> Result<Basis> {
            let sign = crate::names::sign(&config, database, process);
            Ok(Basis {
                shards: watch_servers(&config, database, (fleet.as_ref(), sign), &mut tasks),
                fleet: fleet.clone(),
                config: database.clone(),
                cache: start_cache(&config)?,
                hub: hub.clone(),
                metrics: Arc::clone(&metrics),
            })
        };
        let mut named = Vec::new();
        for database in &config.databases {
            let basis = basis(database)?;
            know_primaries(&basis).await;
            named.push(start_database(&config, database, &basis).await?);
        }
        let wildcard = config.wildcard.as_ref().map(basis).transpose()?;
        if let Some(wildcard) = &wildcard {
            know_primaries(wildcard).await;
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
        tasks.spawn(upkeep(Arc::clone(&app)));
        tasks.spawn(crate::front::time_out::run(Arc::clone(&app)));
        tasks.spawn(crate::reload::on_signal(Arc::clone(&app)));
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
    fn busy_sessions(&self) -> usize {
        self.databases().iter().map(|db| db.stats.live().iter().filter(|session| session.is_busy()).count()).sum()
    }
}

/// Waits for the servers' first words on who is the primary, and until other weirs must know that this one is there. What goes on
/// without says so itself.
async fn know_primaries(basis: &Basis) {
    for shard in basis.shards.iter().filter(|shard| shard.roles.may_change()) {
        shard.roles.decided(probe::FIRST_WORD_MAX).await;
    }
    join_all(basis.shards.iter().map(|shard| shard.clock.sole().settled())).await;
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

/// Errors: another proxy in front of the same servers hears of writes in another way.
async fn agree_with_peers(config: &Config, mode: PeersMode) -> Result<()> {
    for database in config.databases.iter().chain(&config.wildcard) {
        for shard in &database.shards {
            let server = crate::control::target(&control_login(config, database, &shard.primary));
            crate::fleet::keeper::agrees(&server, mode).await.with_context(|| format!("{}", shard.primary))?;
        }
    }
    Ok(())
}

/// Probes and clocks of a database's servers, and this proxy's place among others.
fn watch_servers(
    config: &Config,
    database: &DatabaseConfig,
    (fleet, sign): (Option<&Arc<Fleet>>, Sign),
    tasks: &mut JoinSet<()>,
) -> Vec<Arc<Shard>> {
    let shards = database.shards.iter().map(|shard| {
        let views = std::iter::once(&shard.primary).chain(&shard.replicas);
        let views: Vec<_> = views.map(|endpoint| EndpointView::new(endpoint.clone())).collect();
        let roles = Roles::new(&shard.name, views.clone());
        for view in &views {
            let (view, auth) = (Arc::clone(view), config.server_auth.clone());
            tasks.spawn(probe::run(view, Arc::clone(&roles), auth, database.server_database.clone()));
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
        let sole = Sole::new(sign, config.cache.other_weirs);
        let made = Arc::new(Shard {
            name: shard.name.as_str().into(),
            roles,
            servers,
            clock: Clock::start(server.clone(), Arc::clone(&words), Arc::clone(&member), sole),
            words,
            member,
        });
        if let Some(fleet) = fleet {
            fleet.take_part(&made, server, tasks);
        }
        made
    });
    shards.collect()
}

/// One database, ready for clients: its map and its catalogue are read.
pub async fn start_database(config: &Config, database: &DatabaseConfig, basis: &Basis) -> Result<Arc<Database>> {
    let topology = match &basis.hub {
        Some(hub) if database.shards.len() > 1 || !basis.is_wildcard() => {
            hub.load_or_propose(database).await.with_context(|| format!("hub, database {}", database.name))?
        }
        _ => without_hub(database),
    };
    let epoch = topology.epoch;
    let logins: Vec<Login> = basis.shards.iter().map(|shard| primary_login(config, database, &shard.roles)).collect();
    let all_logins = logins.clone();
    if logins.len() > 1 {
        crate::recover::prepare(&logins).await.with_context(|| format!("database {}", database.name))?;
    }
    let unique = match logins.len() {
        1 => None,
        _ => Unique::prepare(&topology.tables, &logins, topology.home)
            .await
            .with_context(|| format!("database {}", database.name))?,
    };
    let figures = basis.metrics.enroll(&subject(database));
    let parts = Parts {
        topology,
        shards: basis.shards.clone(),
        cache: basis.cache.clone(),
        stats: DatabaseStats::new(Arc::clone(&basis.metrics), figures),
        on_demand: basis.is_wildcard(),
        sequences: Sequences::new(&database.name, basis.hub.clone(), logins.clone()),
        engine: if basis.is_wildcard() { None } else { Engine::new(config, database, logins.clone()) },
        unique: unique.clone(),
        snapshots: (logins.len() > 1).then(|| Snapshots::new(logins.clone())),
    };
    let engine = parts.engine.clone();
    let db = Database::new(config, database.clone(), parts);
    if let Some(fleet) = &basis.fleet {
        fleet.enroll(&db);
    }
    db.refresh_catalog().await;
    report_rules(&db).await;
    if let Some(unique) = unique {
        crate::unique::catch_up(&db).await;
        db.spawn(crate::unique::run(Arc::clone(&db), unique));
    }
    if logins.len() > 1 {
        db.spawn(catalog::drift::watch(Arc::clone(&db), logins.clone()));
        db.spawn(crate::recover::run(Arc::clone(&db), logins));
    }
    db.spawn(reread_catalog(Arc::clone(&db)));
    crate::decode::start(config, &db, all_logins);
    if let Some(engine) = engine {
        crate::engine::start(&engine, &db);
    }
    if let Some(hub) = basis.hub.clone().filter(|_| database.shards.len() > 1 || !basis.is_wildcard()) {
        db.spawn(watch_hub(hub, Arc::clone(&db), epoch));
    }
    Ok(db)
}

impl Basis {
    fn is_wildcard(&self) -> bool {
        self.config.is_wildcard()
    }
}

/// Users are looked up on the home shard of one database: on whoever is its primary, or a replica while there is none.
fn auth_query(config: &Config, named: &[Arc<Database>], wildcard: Option<&Basis>) -> Option<AuthQuery> {
    let query = config.auth_query.as_ref()?;
    let of_named = |db: &Arc<Database>| (db.config.clone(), db.shards.clone());
    let (database, shards) = match &query.database {
        Some(name) => of_named(named.iter().find(|db| *db.name == **name)?),
        None => wildcard.map(|any| (any.config.clone(), any.shards.clone())).or(named.first().map(of_named))?,
    };
    let home = &shards[usize::from(database.home.0)];
    let primary = crate::control::target(&primary_login(config, &database, &home.roles));
    let servers = home.servers.iter().map(|server| &*server.view.endpoint);
    let servers = servers.map(|endpoint| crate::control::target(&control_login(config, &database, endpoint)));
    Some(AuthQuery::new(&query.sql, primary, servers.collect(), Arc::clone(&home.roles), query.max_age))
}

/// What is counted of a database.
fn subject(database: &DatabaseConfig) -> Subject {
    let shard = |shard: &crate::config::ShardConfig| {
        let servers = std::iter::once(&shard.primary).chain(&shard.replicas).map(ToString::to_string).collect();
        (shard.name.clone(), servers)
    };
    Subject { database: database.name.clone(), shards: database.shards.iter().map(shard).collect() }
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
            let roles = probe::once(shard, &config.server_auth, &database.server_database).await;
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

async fn watch_hub(hub: Hub, db: Arc<Database>, epoch: weir_core::id::Epoch) {
    let config = db.config.clone();
    hub.watch(config, epoch, |event| match event {
        HubEvent::Changed(topology) => {
            tracing::info!(database = %db.name, epoch = %topology.epoch, "new topology");
            db.install_topology(topology);
        }
        HubEvent::Reachable => {}
        HubEvent::Lost(error) => {
            tracing::warn!(database = %db.name, "the hub is out of reach, the last map stays in force: {error}");
        }
    })
    .await;
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
