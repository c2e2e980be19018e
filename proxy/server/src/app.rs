//! Wiring: what one weir process is made of, and how it starts and stops.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::words::Words;
use weir_core::topology::Topology;

use crate::auth::directory::Directory;
use crate::auth::query::AuthQuery;
use crate::back::connect::Login;
use crate::cache::{Cache, CacheSettings};
use crate::catalog;
use crate::clock::Clock;
use crate::config::{Config, DatabaseConfig, Endpoint};
use crate::database::{Database, Replica, Shard};
use crate::front::cancel::CancelRegistry;
use crate::front::tls::ClientTls;
use crate::hub::{Hub, HubEvent, without_hub};
use crate::metrics::{Metrics, Subject};
use crate::probe::{self, EndpointView};
use crate::stats::{ClientCount, DatabaseStats};

/// How often idle server connections are looked at.
const UPKEEP: Duration = Duration::from_secs(5);
/// How often the catalogue is read again, for DDL that went round weir.
const CATALOG_EVERY: Duration = Duration::from_secs(30);

pub struct App {
    pub config: Config,
    databases: Vec<Arc<Database>>,
    pub cancels: Arc<CancelRegistry>,
    pub clients: Arc<ClientCount>,
    pub tls: Option<ClientTls>,
    pub metrics: Arc<Metrics>,
    /// Who may log in.
    pub directory: Directory,
    pub started: Instant,
    pub listening: AtomicBool,
    pub draining: AtomicBool,
}

/// An [`App`] with its sockets and background tasks.
pub struct Running {
    pub app: Arc<App>,
    listener: TcpListener,
    http: TcpListener,
    tasks: JoinSet<()>,
}

impl App {
    pub fn database(&self, name: &str) -> Option<Arc<Database>> {
        self.databases.iter().find(|db| &*db.name == name).cloned()
    }

    pub fn databases(&self) -> impl Iterator<Item = &Arc<Database>> {
        self.databases.iter()
    }

    pub fn is_admin_database(&self, name: &str) -> bool {
        matches!(name, "weir" | "pgbouncer")
    }

    /// May this user see the console?
    pub fn admit_admin(&self, user: &str) -> Result<(), UserError> {
        let named = |users: &[String]| users.iter().any(|name| name == user);
        if named(&self.config.admin_users) || named(&self.config.stats_users) {
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
        for db in &self.databases {
            for shard in &db.shards {
                if !shard.primary.has_been_up() {
                    reasons.push(format!("{}/{}: the primary has not been reached yet", db.name, shard.name));
                }
            }
        }
        reasons
    }
}

impl Running {
    /// Connects to hub and servers, reads map and catalogue, and opens the sockets.
    pub async fn start(config: Config) -> Result<Running> {
        let listener =
            TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
        let http = TcpListener::bind(config.http_listen)
            .await
            .with_context(|| format!("cannot listen on {}", config.http_listen))?;
        let hub = match &config.hub {
            Some(hub) => Some(Hub::connect(hub).await.context("hub")?),
            None => None,
        };
        let metrics = Arc::new(Metrics::new(&config.databases.iter().map(subject).collect::<Vec<_>>())?);
        let mut tasks = JoinSet::new();
        let mut databases = Vec::new();
        for database in &config.databases {
            databases.push(start_database(&config, database, hub.as_ref(), &metrics, &mut tasks).await?);
        }
        let tls = config.tls.as_ref().map(ClientTls::load).transpose().context("tls")?.flatten();
        let app = Arc::new(App {
            clients: ClientCount::new(config.limits.client_connections_max),
            databases,
            cancels: Arc::default(),
            tls,
            metrics,
            directory: Directory::new(&config.users, auth_query(&config)),
            started: Instant::now(),
            listening: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            config,
        });
        tasks.spawn(upkeep(Arc::clone(&app)));
        Ok(Running { app, listener, http, tasks })
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
        let deadline = Instant::now() + app.config.limits.drain_time_max;
        while app.busy_sessions() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.tasks.abort_all();
        Ok(())
    }
}

impl App {
    fn busy_sessions(&self) -> usize {
        self.databases.iter().map(|db| db.stats.live().iter().filter(|session| session.is_busy()).count()).sum()
    }
}

async fn start_database(
    config: &Config,
    database: &DatabaseConfig,
    hub: Option<&Hub>,
    metrics: &Arc<Metrics>,
    tasks: &mut JoinSet<()>,
) -> Result<Arc<Database>> {
    let topology = match hub {
        Some(hub) => hub.load_or_propose(database).await.with_context(|| format!("hub, database {}", database.name))?,
        None => without_hub(database),
    };
    let epoch = topology.epoch;
    let logins: Vec<Login> =
        database.shards.iter().map(|shard| control_login(config, database, &shard.primary)).collect();
    if logins.len() > 1 {
        crate::recover::prepare(&logins).await.with_context(|| format!("database {}", database.name))?;
    }
    let shards = database.shards.iter().zip(&logins).map(|(shard, login)| {
        let mut watch = |endpoint: &Endpoint| {
            let view = EndpointView::new(endpoint.clone());
            tasks.spawn(probe::run(Arc::clone(&view), config.server_auth.clone(), database.server_database.clone()));
            view
        };
        let words = Arc::new(Words::new());
        Shard {
            name: shard.name.as_str().into(),
            primary: watch(&shard.primary),
            replicas: shard.replicas.iter().map(|replica| Replica::new(watch(replica))).collect(),
            clock: Clock::start(crate::control::target(login), Arc::clone(&words)),
            words,
        }
    });
    let shards: Vec<Shard> = shards.collect();
    let cache = start_cache(config, &topology)?;
    let figures = metrics.database(&database.name).context("metrics were registered for every database")?;
    let stats = DatabaseStats::new(Arc::clone(metrics), figures);
    let db = Database::new(config, database.clone(), topology, shards, cache, stats);
    db.refresh_catalog().await;
    report_rules(&db).await;
    if logins.len() > 1 {
        tasks.spawn(crate::recover::run(Arc::clone(&db), logins));
    }
    tasks.spawn(reread_catalog(Arc::clone(&db)));
    if let Some(hub) = hub {
        tasks.spawn(watch_hub(hub.clone(), Arc::clone(&db), epoch));
    }
    Ok(db)
}

/// What is counted of a database.
fn subject(database: &DatabaseConfig) -> Subject {
    let shard = |shard: &crate::config::ShardConfig| {
        let servers = std::iter::once(&shard.primary).chain(&shard.replicas).map(ToString::to_string).collect();
        (shard.name.clone(), servers)
    };
    Subject { database: database.name.clone(), shards: database.shards.iter().map(shard).collect() }
}

fn control_login(config: &Config, database: &DatabaseConfig, endpoint: &Endpoint) -> Login {
    Login {
        host: endpoint.host.as_str().into(),
        port: endpoint.port,
        user: config.server_auth.user.as_str().into(),
        database: database.server_database.as_str().into(),
        credential: config.server_auth.credential(&endpoint.host, endpoint.port, &database.server_database).into(),
        tls: config.server_auth.tls.clone(),
        deadline: config.limits.connect_time_max,
    }
}

/// Users are looked up on the home shard of one database: its primary, or a replica while that is away.
fn auth_query(config: &Config) -> Option<AuthQuery> {
    let query = config.auth_query.as_ref()?;
    let database = config.database(&query.database)?;
    let home = &database.shards[usize::from(database.home.0)];
    let servers = std::iter::once(&home.primary).chain(&home.replicas);
    let servers = servers.map(|endpoint| crate::control::target(&control_login(config, database, endpoint)));
    Some(AuthQuery::new(&query.sql, servers.collect(), query.max_age))
}

fn start_cache(config: &Config, topology: &Topology) -> Result<Option<Cache>> {
    if !config.cache.enabled {
        return Ok(None);
    }
    let settings = CacheSettings {
        l1_bytes_max: config.cache.l1_bytes,
        entry_bytes_max: config.cache.entry_bytes_max,
        age_max: config.cache.max_age,
        redis_url: config.cache.redis.as_ref().map(|url| url.expose().to_owned()),
        // Words live in memory: what an earlier process stored must not be found again.
        namespace: format!("weir:{:016x}:{}", rand::random::<u64>(), topology.epoch),
    };
    Ok(Some(Cache::new(settings)?))
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
        db.refresh_catalog().await;
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
    loop {
        tokio::time::sleep(UPKEEP).await;
        let now = Instant::now();
        app.metrics.upkeep();
        app.metrics.tick(UPKEEP);
        for db in app.databases() {
            for (_, pools) in db.all_pools() {
                for (_, _, pool) in pools.iter() {
                    pool.retire(now);
                }
            }
        }
    }
}
