//! The hub: the Postgres database that holds the slot map, its epoch and the table rules, in schema `weir`.
//!
//! Invariant: a slot map in the hub is complete (4096 slots, each on a shard that takes part) or it is not handed out; and
//! losing the hub changes nothing for running sessions: the last map stays in force, with a log line and a metric.
//! Non-goals: moving slots (that is resharding), and rows of applications.

mod load;
pub mod moves;
mod schema;
pub mod sequence;
pub mod servers;
mod shards;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Statement};
use weir_core::id::{Epoch, ShardId};
use weir_core::topology::follow::{self, Shown};
use weir_core::topology::moves::Moves;
use weir_core::topology::ring::{self, RingShard};
use weir_core::topology::{Placement, Roster, SlotMap, TableRules, Topology};

use crate::config::{DatabaseConfig, HubConfig};
use crate::control::{OpenError, Target};
use crate::roles::Route;

use self::servers::{Connections, Servers};
pub use shards::{HubMap, SHARDS_MAX};

/// How they are named in the hub; the proxy's own name follows.
pub const NAME: &str = "weir hub ";
/// Connections that one process keeps to the hub.
const CONNECTIONS: u32 = 2;
/// Longest wait for a connection or an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The map is read again this often, whatever was notified.
const REREAD: Duration = Duration::from_secs(5);
/// Pause before it is connected to again.
const AGAIN: Duration = Duration::from_millis(250);

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("the hub's dsn is not valid")]
    Dsn,
    #[error("the hub cannot be reached: {0}")]
    Unreachable(String),
    #[error("the hub refused: {0}")]
    Postgres(#[from] tokio_postgres::Error),
    #[error("the hub has schema version {found}, this weir knows up to {known}; use a newer weir")]
    TooNew { found: i32, known: i32 },
    #[error(
        "database {database}: nobody has said where shard {shard} is, which the hub knows; add it to the config with \
             this name"
    )]
    MissingShard { database: String, shard: String },
    #[error("database {database}: there is no shard {shard}; SHOW SHARDS names them")]
    NoShard { database: String, shard: String },
    #[error("database {database}: shard {shard} is {state} and {verb}")]
    ShardState { database: String, shard: String, state: &'static str, verb: &'static str },
    #[error("database {database}: more than {SHARDS_MAX} shards, of which retired ones count as well")]
    TooManyShards { database: String },
    #[error("database {database}: the slot map in the hub is not complete: {what}")]
    Damaged { database: String, what: String },
}

impl From<OpenError> for HubError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Driver(error) => HubError::Postgres(error),
            other => HubError::Unreachable(other.to_string()),
        }
    }
}

/// Told by [`Hub::watch`].
#[derive(Debug)]
pub enum HubEvent {
    /// The map was read and its epoch is higher than what was told before.
    Changed(HubMap),
    /// The map was read: how it stands to what was told before, and its epoch. One that is backward is never told as a change.
    Read(Shown, Epoch),
    /// Reading failed; the last map stays in force.
    Lost(HubError),
}

/// A handle; cheap to clone.
#[derive(Clone, Debug)]
pub struct Hub {
    pool: bb8::Pool<Connections>,
    server: Target,
    route: Option<Route>,
    /// They end with the last handle.
    _probes: Arc<JoinSet<()>>,
}

/// The map of a database that needs no hub: one shard that owns everything, at epoch 1.
pub fn without_hub(database: &DatabaseConfig) -> HubMap {
    let topology = Topology {
        epoch: Epoch(1),
        shards: database.shards.iter().map(|shard| shard.name.as_str().into()).collect(),
        roster: Roster::fixed(database.shards.len()),
        slots: SlotMap::single(ShardId(0)),
        tables: Arc::new(database.rules()),
        home: database.home,
        moves: Moves::default(),
    };
    HubMap { topology, shards: database.shards.clone() }
}

impl Hub {
    /// Connects and makes sure that the schema is there; any number of proxies may do so at once.
    pub async fn connect(hub: &HubConfig) -> Result<Hub, HubError> {
        let Servers { server, route, probes } = Servers::find(hub).await?;
        if let Some(other) = &hub.made_from {
            bounded(make_database(&server, other)).await?;
        }
        let pool = bb8::Pool::builder()
            .max_size(CONNECTIONS)
            .connection_timeout(PATIENCE)
            .build(Connections(server.clone()))
            .await?;
        let hub = Hub { pool, server, route, _probes: Arc::new(probes) };
        let prepare = || {
            bounded(async {
                let mut client = hub.client().await?;
                schema::ensure(&mut client).await
            })
        };
        if let Err(error) = prepare().await {
            if !matches!(error, HubError::Unreachable(_)) {
                return Err(error);
            }
            // The pool only says that it took too long: a connection of its own says why.
            bounded(async { Ok(hub.server.open().await?) }).await?;
            prepare().await?;
        }
        Ok(hub)
    }

    /// The map of a database. On its very first start the ring places the slots and the result is stored with epoch 1;
    /// of several proxies starting at once, one places and the others read. Later on, shards that the configuration names and the
    /// hub does not know are registered as joining.
    pub async fn load_or_propose(&self, database: &DatabaseConfig) -> Result<HubMap, HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            schema::lock(&transaction).await?;
            let (_, known) = shards::ask(&transaction, &database.name).await?;
            if known.is_empty() {
                schema::store(&transaction, database, &propose(database)?).await?;
            } else {
                shards::record(&transaction, &database.name, &shards::changes(database, &known)?).await?;
                schema::store_rules(&transaction, &database.name, &database.rules()).await?;
            }
            transaction.commit().await?;
            read(&client, database).await
        })
        .await
    }

    /// Reads the map as it is now.
    pub async fn read(&self, database: &DatabaseConfig) -> Result<HubMap, HubError> {
        bounded(async {
            let client = self.client().await?;
            read(&client, database).await
        })
        .await
    }

    /// Reads the map every five seconds, when `weir_topology` is notified and after every reconnect, for ever; dropping the
    /// future ends it. `known` is the map in force; only one with a higher epoch is told as a change.
    pub async fn watch(&self, database: DatabaseConfig, mut known: Topology, tell: impl Fn(HubEvent) + Send) {
        let mut told = None::<Instant>;
        loop {
            let begun = Instant::now();
            let error = self.follow(&database, &mut known, &tell).await;
            // An attempt that failed at once has said nothing new.
            if begun.elapsed() >= REREAD || told.is_none_or(|at| at.elapsed() >= REREAD) {
                tell(HubEvent::Lost(error));
                told = Some(Instant::now());
            }
            // Sooner, if another server has become the primary.
            self.server.pause(AGAIN).await;
        }
    }

    /// The same by one connection, which LISTENs and reads, until it breaks.
    async fn follow(&self, database: &DatabaseConfig, known: &mut Topology, tell: &impl Fn(HubEvent)) -> HubError {
        // One that has not been looked at is as good as many.
        let (notify, mut notified) = mpsc::channel(1);
        let ready = bounded(async {
            let client = self.server.open_hearing(notify).await?;
            client.batch_execute("LISTEN weir_topology").await?;
            let reader = MapReader::prepare(&client).await?;
            Ok((client, reader))
        });
        let (client, reader) = match ready.await {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        loop {
            match bounded(reader.read(&client, database)).await {
                Ok(map) => {
                    let shown = follow::compare(known, &map.topology);
                    tell(HubEvent::Read(shown, map.topology.epoch));
                    if shown == Shown::Newer {
                        known.clone_from(&map.topology);
                        tell(HubEvent::Changed(map));
                    }
                }
                Err(error) if client.is_closed() || matches!(error, HubError::Unreachable(_)) => return error,
                Err(error) => tell(HubEvent::Lost(error)),
            }
            // Either way the map is read again: a notification only makes it sooner.
            if let Ok(None) = tokio::time::timeout(REREAD, notified.recv()).await {
                return HubError::Unreachable("the connection was closed".to_owned());
            }
        }
    }

    /// Where clients' connections find its primary. `None`: by a socket file, which they cannot use.
    pub fn route(&self) -> Option<&Route> {
        self.route.as_ref()
    }

    /// The primary as somebody else asks it, who is named so.
    pub fn target(&self, application: &str) -> Target {
        let mut server = self.server.clone();
        server.config.application_name(application);
        server
    }

    async fn client(&self) -> Result<bb8::PooledConnection<'_, Connections>, HubError> {
        self.pool.get().await.map_err(|error| match error {
            bb8::RunError::User(error) => error.into(),
            bb8::RunError::TimedOut => HubError::Unreachable(format!("no connection within {}s", PATIENCE.as_secs())),
        })
    }
}

/// Makes the hub's own database if it is missing, from a connection to the `other` one of the same server.
async fn make_database(hub: &Target, other: &str) -> Result<(), HubError> {
    let mut server = hub.clone();
    server.config.dbname(other);
    let client = server.open().await?;
    let name = hub.config.get_dbname().unwrap_or_default();
    let made = async {
        if client.query_opt("SELECT FROM pg_catalog.pg_database WHERE datname = $1", &[&name]).await?.is_none() {
            tracing::info!(database = name, "making the hub's database");
            let sql = format!("CREATE DATABASE {}", weir_core::sql::word::quote_name(name));
            match client.batch_execute(&sql).await {
                // Another proxy was quicker.
                Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::DUPLICATE_DATABASE) => {}
                Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::UNIQUE_VIOLATION) => {}
                made => made?,
            }
        }
        Ok(())
    };
    made.await
}

/// A hub that hangs is a hub that is lost.
async fn bounded<T>(work: impl Future<Output = Result<T, HubError>>) -> Result<T, HubError> {
    let answer = tokio::time::timeout(2 * PATIENCE, work).await;
    answer.unwrap_or_else(|_| Err(HubError::Unreachable(format!("no answer within {}s", 2 * PATIENCE.as_secs()))))
}

/// First placement of all slots, by the ring. It gives no map only to a list of shards that the config refuses as well.
fn propose(database: &DatabaseConfig) -> Result<SlotMap, HubError> {
    let ring: Vec<RingShard<'_>> =
        database.shards.iter().map(|shard| RingShard { name: &shard.name, weight: shard.weight }).collect();
    ring::propose(&ring, None).ok_or_else(|| HubError::Damaged {
        database: database.name.clone(),
        what: format!("the ring could not place the slots on {} shard(s)", ring.len()),
    })
}

/// One consistent read: a single transaction sees one snapshot.
/// What the map is read with, prepared on one connection: statements may be waiting for it.
struct MapReader {
    shards: Statement,
    moves: Statement,
}

impl MapReader {
    async fn prepare(client: &Client) -> Result<MapReader, HubError> {
        let ask_open = moves::ask_open();
        let (shards, moves) = tokio::try_join!(
            client.prepare_typed(shards::KNOWN, &[Type::TEXT]),
            client.prepare_typed(&ask_open, &[Type::TEXT])
        )?;
        Ok(MapReader { shards, moves })
    }

    /// One consistent read, in one round trip.
    async fn read(&self, client: &Client, database: &DatabaseConfig) -> Result<HubMap, HubError> {
        let name: [&(dyn ToSql + Sync); 1] = [&database.name];
        // Sent in this order.
        let (begun, shards, moves, ended) = tokio::join!(
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            client.query(&self.shards, &name),
            client.query(&self.moves, &name),
            client.batch_execute("COMMIT"),
        );
        begun?;
        let (epoch, known) = shards::known(&shards?, &database.name)?;
        let moves = moves::known(&moves?, &database.name, &known)?;
        ended?;
        shards::map(database, epoch, known, moves)
    }
}

async fn read(client: &Client, database: &DatabaseConfig) -> Result<HubMap, HubError> {
    MapReader::prepare(client).await?.read(client, database).await
}

/// Kind, key and key type of a rule as the hub stores them.
fn rule_columns(placement: &Placement) -> (&'static str, Option<&str>, Option<&'static str>) {
    match placement {
        Placement::Sharded { key, key_type } => ("sharded", Some(key), Some(key_type.name())),
        Placement::Reference => ("reference", None, None),
        Placement::Global => ("global", None, None),
    }
}

/// The rules as parallel arrays, for one statement.
#[derive(Default)]
struct RuleArrays<'a> {
    schemas: Vec<&'a str>,
    names: Vec<&'a str>,
    kinds: Vec<&'static str>,
    keys: Vec<Option<&'a str>>,
    types: Vec<Option<&'static str>>,
}

impl<'a> RuleArrays<'a> {
    fn of(rules: &'a TableRules) -> Self {
        let mut arrays = RuleArrays::default();
        for (schema, name, placement) in rules.iter() {
            let (kind, key, key_type) = rule_columns(placement);
            arrays.schemas.push(schema);
            arrays.names.push(name);
            arrays.kinds.push(kind);
            arrays.keys.push(key);
            arrays.types.push(key_type);
        }
        arrays
    }
}

#[cfg(test)]
mod tests;
