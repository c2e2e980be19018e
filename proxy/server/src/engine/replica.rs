//! The hub's replicas: which of them may run a statement of the fallback engine, and whether what they show is in force.
//!
//! Invariants: a replica is asked only once its replay has been seen to hold the build that is wanted, and only on connections that
//! were opened after that, because a database's settings count from the login on. The statement's own connection then checks the token
//! itself, as on the primary; so a standby that was rewound or replaced is noticed.
//! And what a replica shows is in force only if the primary shows the same token after the statement came ([`Confirm`]): by itself a
//! standby that lags, or has lost its primary, would go on answering by definitions that another proxy has replaced long ago.
//! Rows are no matter of the hub's lag: foreign tables fetch them from the shards' primaries, whichever server of the hub asks.
//! Non-goal: doing without the hub's primary.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_postgres::Client;

use super::{Engine, State};
use crate::config::Endpoint;
use crate::control::{OpenError, Target};
use crate::database::Database;

/// Between two looks at a replica that is in step, and between attempts to reach one that is not there.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks at one whose replay is awaited.
const LOOK_BEHIND: Duration = Duration::from_millis(50);
/// Longest wait for a connection or an answer.
const PATIENCE: Duration = Duration::from_secs(3);

const STANDING: &str = "SELECT pg_catalog.pg_is_in_recovery(), (SELECT token FROM weir_engine.state)";
const TOKEN: &str = "SELECT token FROM weir_engine.state";

/// Which server of the hub runs a statement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HubServer {
    Primary,
    /// By its place in the configuration.
    Replica(usize),
}

/// How a replica stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It shows the build with this token, and connections have its settings.
    InStep(String),
    /// Its replay has not come to the build that is wanted.
    Behind,
    Away(String),
}

pub struct Replica {
    pub endpoint: Endpoint,
    target: Target,
    standing: Mutex<Standing>,
    /// A statement has found something wrong with it.
    doubted: Notify,
    /// Statements it was chosen for.
    pub asked: AtomicU64,
}

impl Replica {
    pub fn new(endpoint: Endpoint, target: Target) -> Self {
        Replica {
            endpoint,
            target,
            standing: Mutex::new(Standing::Away("not reached yet".to_owned())),
            doubted: Notify::new(),
            asked: AtomicU64::new(0),
        }
    }

    pub fn standing(&self) -> Standing {
        self.standing.lock().clone()
    }

    fn is_in_step(&self, token: &str) -> bool {
        matches!(&*self.standing.lock(), Standing::InStep(found) if found == token)
    }

    /// Not asked again before it has been looked at.
    pub fn doubt(&self) {
        *self.standing.lock() = Standing::Behind;
        self.doubted.notify_one();
    }
}

impl Engine {
    /// The server for a statement that wants the build with this token. Replicas go first, in turn, as long as they have `room`.
    pub fn choose(&self, token: &str, room: impl Fn(HubServer) -> bool) -> HubServer {
        let count = self.replicas.len();
        if count == 0 {
            return HubServer::Primary;
        }
        let first = self.turn.fetch_add(1, Relaxed);
        let in_step = || {
            let in_turn = (0..count).map(|step| (first + step) % count);
            in_turn.filter(|number| self.replicas[*number].is_in_step(token)).map(HubServer::Replica)
        };
        let free = in_step().chain([HubServer::Primary]).find(|server| room(*server));
        free.or_else(|| in_step().next()).unwrap_or(HubServer::Primary)
    }
}

impl Engine {
    /// Where a statement would run now, for people.
    pub fn would_run_on(&self) -> String {
        match self.state() {
            State::Ready(ready) => self.name_of(self.choose(&ready.token, |_| true)),
            State::Starting | State::Failed { .. } => self.name_of(HubServer::Primary),
        }
    }

    /// A server of the hub, for people.
    pub fn name_of(&self, server: HubServer) -> String {
        match server {
            HubServer::Primary => format!("primary {}", self.route.endpoint()),
            HubServer::Replica(number) => format!("replica {}", self.replicas[number].endpoint),
        }
    }
}

/// Looks after one replica, for ever; dropping the future ends it.
pub async fn watch(number: usize, engine: Arc<Engine>, db: Arc<Database>) {
    let replica = &engine.replicas[number];
    loop {
        let lost = follow(number, &engine, &db).await;
        let was = std::mem::replace(&mut *replica.standing.lock(), Standing::Away(lost.clone()));
        if !matches!(was, Standing::Away(_)) {
            tracing::warn!(database = %db.name, replica = %replica.endpoint, "the hub's replica cannot be asked: {lost}");
        }
        // Cancel-safe: a notification that is not taken stays.
        let _ = tokio::time::timeout(LOOK, replica.doubted.notified()).await;
    }
}

/// Until the connection is lost: why.
async fn follow(number: usize, engine: &Engine, db: &Database) -> String {
    let replica = &engine.replicas[number];
    let mut states = engine.state.subscribe();
    let client = match tokio::time::timeout(PATIENCE, replica.target.open()).await {
        Ok(Ok(client)) => client,
        Ok(Err(OpenError::Driver(error))) => return told(&error),
        Ok(Err(error)) => return error.to_string(),
        Err(_) => return format!("no connection within {PATIENCE:?}"),
    };
    loop {
        let wanted = match &*states.borrow_and_update() {
            State::Ready(ready) => Some(ready.token.clone()),
            State::Starting | State::Failed { .. } => None,
        };
        let found = match tokio::time::timeout(PATIENCE, client.query_one(STANDING, &[])).await {
            Ok(Ok(row)) => row.try_get(0).and_then(|standby: bool| Ok((standby, row.try_get::<_, Option<String>>(1)?))),
            Ok(Err(error)) => Err(error),
            Err(_) => return format!("no answer within {PATIENCE:?}"),
        };
        let pause = match found {
            Err(error) => return told(&error),
            Ok((false, _)) => return "it is no standby any more".to_owned(),
            Ok((true, Some(token))) if wanted.as_ref() == Some(&token) => {
                if !replica.is_in_step(&token) {
                    // First this: connections of before may have logged in to the settings of before.
                    db.reconnect_engine_replica(number);
                    *replica.standing.lock() = Standing::InStep(token);
                    tracing::info!(database = %db.name, replica = %replica.endpoint, "the hub's replica is in step");
                }
                LOOK
            }
            Ok(_) => {
                *replica.standing.lock() = Standing::Behind;
                if wanted.is_some() { LOOK_BEHIND } else { LOOK }
            }
        };
        // Cancel-safe: both only notify, and what they notify of is looked up anew.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = replica.doubted.notified() => tokio::time::sleep(LOOK_BEHIND).await,
            changed = states.changed() => if changed.is_err() { return "weir is ending".to_owned() },
        }
    }
}

fn told(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |refusal| refusal.message().to_owned())
}

/// Asks the hub's primary which build is in force, once for all statements that wait to know.
pub struct Confirm {
    target: Target,
    /// How many have asked.
    asked: watch::Sender<u64>,
    /// For how many of them this is an answer: it was read after they had asked. `None`: the primary did not say.
    told: watch::Sender<(u64, Option<String>)>,
}

impl Confirm {
    pub fn new(target: Target) -> Self {
        Confirm { target, asked: watch::Sender::new(0), told: watch::Sender::new((0, None)) }
    }

    /// Is the build with this token in force now?
    pub async fn is_in_force(&self, token: &str) -> bool {
        let mut told = self.told.subscribe();
        let mut mine = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            mine = *asked;
        });
        let answer = tokio::time::timeout(PATIENCE, told.wait_for(|(upto, _)| *upto >= mine)).await;
        matches!(answer, Ok(Ok(told)) if told.1.as_deref() == Some(token))
    }

    /// Answers for ever; dropping the future ends it.
    pub async fn run(&self) {
        let mut asked = self.asked.subscribe();
        // Some may have asked before.
        asked.mark_changed();
        let mut client = None;
        while asked.changed().await.is_ok() {
            let upto = *asked.borrow_and_update();
            let token = tokio::time::timeout(PATIENCE, self.token(&mut client)).await;
            let token = token.ok().and_then(Result::ok);
            if token.is_none() {
                client = None;
            }
            self.told.send_replace((upto, token));
        }
    }

    async fn token(&self, client: &mut Option<Client>) -> Result<String, OpenError> {
        let open = match client.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => self.target.open().await?,
        };
        Ok(client.insert(open).query_one(TOKEN, &[]).await?.try_get(0)?)
    }
}
