//! The fallback engine: Postgres on the hub, in a database that shows the rows of all shards, for reads that neither one shard nor
//! a merge can answer.
//!
//! Invariant: a statement runs there only while the database is as the catalogue version and the epoch in force want it. Its token
//! is checked in the statement's own transaction, whose lock on the token keeps a rebuild waiting; so no statement sees half of one.
//! Any number of proxies may look after the same database: what it must look like is a pure function of the home shard's catalogue
//! and the map ([`weir_core::engine`]), and an older epoch never replaces a newer one. Where the hub has replicas, statements run there ([`replica`]).
//! Non-goals: running statements ([`crate::exec::engine`]).

mod build;
mod mended;
mod read;
mod replica;
mod tables;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use tokio::sync::{Notify, watch};
use weir_core::engine::Skipped;
use weir_core::error::UserError;
use weir_core::id::{Epoch, ShardId};
use weir_core::plan::{Plan, Template, Values};
use weir_core::topology::Topology;

use crate::back::tls::ServerTls;
use crate::config::{Config, DatabaseConfig, EngineConfig};
use crate::control::Target;
use crate::database::{Database, Primaries};
use crate::hub::Hub;
use crate::hub::servers::account;
use crate::roles::{self, Route};
use crate::statements::Prepared;

pub use mended::Asker;
use mended::Mended;
use replica::{Confirm, Replica};
pub use replica::{HubServer, Standing};

/// How its connections to the hub are named.
const NAMED: &str = "weir engine";
/// Longest wait of a statement for the engine to be brought into step.
const WAIT: Duration = Duration::from_secs(5);
/// A failure this young is told at once; after an older one a statement waits for another attempt.
const FAILURE_FRESH: Duration = Duration::from_secs(1);
/// Longest time for one build.
const BUILD_MAX: Duration = Duration::from_secs(60);
/// Between two attempts that nobody waits for, after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// How often it is compared with the home shard, for grants and roles that changed behind weir.
const LOOK: Duration = Duration::from_secs(30);
/// Between two builds that nobody waits for: at least so long, and this many times what the last one took.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_SHARE: u32 = 4;

/// The number that stands for the engine among the shards'.
pub const ENGINE: ShardId = ShardId(u16::MAX);

/// One database's engine.
pub struct Engine {
    pub config: EngineConfig,
    /// Its own database on the hub's server.
    pub database: String,
    /// Where clients' connections find it: the hub's primary.
    pub route: Route,
    /// The same for weir's own, to the hub's database.
    hub: Target,
    tls: ServerTls,
    pub replicas: Vec<Replica>,
    /// Whose turn it is among them.
    turn: AtomicUsize,
    pub confirm: Confirm,
    pub mended: Mended,
    /// How weir logs in to each shard's primary.
    shards: Arc<Primaries>,
    state: watch::Sender<State>,
    /// A statement waits.
    needed: Notify,
    /// Schema or map have changed.
    changed: Notify,
}

/// How it stands.
#[derive(Clone, Debug)]
pub enum State {
    /// Not built since this process started.
    Starting,
    Ready(Arc<Ready>),
    Failed {
        problem: Problem,
        at: Instant,
    },
}

/// A database that is up to date.
#[derive(Debug)]
pub struct Ready {
    /// Version of the view it was made for; the catalogue was read later.
    pub version: u64,
    pub epoch: Epoch,
    /// Of the shards' primaries, which it names ([`roles::age`]).
    pub age: u64,
    /// What the database says as long as it is this one.
    pub token: String,
    pub skipped: Vec<Skipped>,
    /// The shards' OIDs of types that are not Postgres's own, by the hub's.
    pub types: HashMap<u32, u32>,
}

/// Why it cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Problem {
    #[error("{0}")]
    Unreachable(String),
    #[error("{0}")]
    Unfit(String),
    #[error("it is being brought into step with the shards")]
    Building,
}

impl Engine {
    /// `None`: the configuration has no use for one. The caller says whether there are several shards.
    pub fn new(
        (config, hub): (&Config, Option<&Hub>),
        database: &DatabaseConfig,
        shards: Arc<Primaries>,
    ) -> Option<Arc<Self>> {
        let (hub, at) = (hub?, config.hub.as_ref()?);
        if !config.engine.enabled {
            return None;
        }
        let Some(route) = hub.route().cloned() else {
            tracing::warn!("no fallback engine: the hub's dsn names no host, and clients' connections need one");
            return None;
        };
        let name = config.engine.database_of(&database.name);
        let mut primary = hub.target(NAMED);
        let mut own = primary.clone();
        own.config.dbname(&name);
        primary.config.connect_timeout(WAIT);
        let replicas = at.replicas.iter().map(|replica| {
            let mut login = account(at).ok()?;
            login.host(&replica.host).port(replica.port).dbname(&name).connect_timeout(WAIT).application_name(NAMED);
            Some(Replica::new(replica.clone(), Target::new(login, at.tls.clone())))
        });
        Some(Arc::new(Engine {
            route,
            config: config.engine.clone(),
            replicas: replicas.collect::<Option<_>>()?,
            turn: AtomicUsize::new(0),
            confirm: Confirm::new(own),
            mended: Mended::new(),
            database: name,
            hub: primary,
            tls: at.tls.clone(),
            shards,
            state: watch::Sender::new(State::Starting),
            needed: Notify::new(),
            changed: Notify::new(),
        }))
    }

    pub fn tls(&self) -> &ServerTls {
        &self.tls
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Of the shards' primaries.
    fn age(&self) -> u64 {
        roles::age(self.shards.active().iter().map(|(_, login)| &login.route))
    }

    /// Schema or map may have changed.
    pub fn note_change(&self) {
        self.changed.notify_one();
    }

    /// The database turned out to be another one than was known.
    pub fn note_stale(&self) {
        self.state.send_if_modified(|state| {
            let stale = matches!(state, State::Ready(_));
            if stale {
                *state = State::Starting;
            }
            stale
        });
        self.needed.notify_one();
    }

    /// The engine as the view in force wants it; waits a while if it is not there yet.
    pub async fn ready(&self, db: &Database) -> Result<Arc<Ready>, Problem> {
        let mut watch = self.state.subscribe();
        let deadline = tokio::time::Instant::now() + WAIT;
        loop {
            let wanted = {
                let view = db.view();
                (view.version, view.topology.epoch, self.age())
            };
            let problem = match watch.borrow_and_update().clone() {
                State::Ready(ready)
                    if ready.version >= wanted.0 && (ready.epoch, ready.age) == (wanted.1, wanted.2) =>
                {
                    return Ok(ready);
                }
                State::Failed { problem, at } if at.elapsed() < FAILURE_FRESH => return Err(problem),
                State::Failed { problem, .. } => problem,
                State::Ready(_) | State::Starting => Problem::Building,
            };
            self.needed.notify_one();
            if !matches!(tokio::time::timeout_at(deadline, watch.changed()).await, Ok(Ok(()))) {
                return Err(problem);
            }
        }
    }
}

impl Database {
    /// Binds a template; what that refuses goes to the engine, if it can answer.
    pub fn plan_of(&self, template: &Template, values: &Values<'_>, topology: &Topology) -> Result<Plan, UserError> {
        let planned = template.bind(values, topology).or_else(|refusal| template.carried(refusal));
        planned.or_else(|refusal| self.plan_refused(template, refusal))
    }

    /// A key parameter of another type would be misread; the engine reads it as Postgres does.
    pub fn check_types(&self, prepared: &Prepared) -> Result<(), UserError> {
        let Some(refusal) = &prepared.mistyped else { return Ok(()) };
        self.plan_refused(&prepared.template, UserError::clone(refusal)).map(|_| ())
    }

    pub fn plan_refused(&self, template: &Template, refusal: UserError) -> Result<Plan, UserError> {
        if self.engine.is_some() { template.on_engine(refusal) } else { Err(refusal) }
    }
}

/// Begins to look after a database's engine, as long as the database is there.
pub fn start(engine: &Arc<Engine>, db: &Arc<Database>) {
    db.spawn(run(Arc::clone(engine), Arc::clone(db)));
    for number in 0..engine.replicas.len() {
        db.spawn(replica::watch(number, Arc::clone(engine), Arc::clone(db)));
    }
    if !engine.replicas.is_empty() {
        let engine = Arc::clone(engine);
        db.spawn(async move { engine.confirm.run().await });
    }
}

/// Keeps the engine in step, for ever; dropping the future ends it.
async fn run(engine: Arc<Engine>, db: Arc<Database>) {
    // Whoever has just started a tier often makes its schema next.
    let _ = tokio::time::timeout(PAUSE, engine.needed.notified()).await;
    // Of the build that clients' connections have logged in to.
    let mut logged_in = None;
    loop {
        let start = Instant::now();
        let (view, age) = (db.view_arc(), engine.age());
        let built = match tokio::time::timeout(BUILD_MAX, Box::pin(build::build(&engine, (&view, age)))).await {
            Ok(built) => built,
            Err(_) => Err(Problem::Unreachable(format!("it was not done within {BUILD_MAX:?}"))),
        };
        let now = db.view_arc();
        let in_step = now.version == view.version && now.topology.epoch == view.topology.epoch && age == engine.age();
        if built.is_err() && !in_step {
            // It was cut off from a primary or a shard that is none any more, which is no failure to tell of.
            continue;
        }
        let failed = built.is_err();
        match built {
            Ok((ready, made)) => {
                if made {
                    tracing::info!(database = %db.name, engine = engine.database, "the fallback engine is in step");
                }
                // Whoever made it: they have the settings of before.
                if logged_in.as_ref() != Some(&ready.token) {
                    db.reconnect_engine();
                    logged_in = Some(ready.token.clone());
                }
                engine.state.send_replace(State::Ready(Arc::new(ready)));
            }
            Err(problem) => {
                tracing::warn!(database = %db.name, engine = engine.database, "the fallback engine cannot be used: {problem}");
                engine.state.send_replace(State::Failed { problem, at: Instant::now() });
            }
        }
        pause(&engine, failed, in_step, start.elapsed()).await;
    }
}

/// Until there may be something to do. Cancel-safe in all its waits: a notification that is not taken stays.
async fn pause(engine: &Engine, failed: bool, in_step: bool, took: Duration) {
    if failed {
        let _ = tokio::time::timeout(RETRY, engine.needed.notified()).await;
        return;
    }
    if in_step {
        tokio::select! {
            () = engine.needed.notified() => return,
            () = engine.changed.notified() => {}
            () = tokio::time::sleep(LOOK) => return,
        }
    }
    let _ = tokio::time::timeout(PAUSE.max(took * PAUSE_SHARE), engine.needed.notified()).await;
}
