//! Shards as the hub knows them: who they are, where their servers are, and whether they take part.
//!
//! Invariant: a shard's number is its place in the hub's list, which only grows; every change of who takes part raises the epoch, in the
//! same transaction. Where the configuration names a shard, its addresses are the configuration's. Non-goals: making a shard ready
//! before it is activated, or empty before it is retired (that is the mover's).

use std::sync::Arc;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, Row, Transaction};
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::topology::moves::Moves;
use weir_core::topology::{Isolated, Roster, ShardState, SlotMap, Topology};

use super::{Hub, HubError, bounded, schema};
use crate::config::{DatabaseConfig, Endpoint, ShardConfig};

/// Shards of one database, whatever their state: bounds what a process keeps for each.
pub const SHARDS_MAX: usize = 512;

/// What the hub says of one database: the map, and how its shards are reached.
#[derive(Clone, Debug)]
pub struct HubMap {
    pub topology: Topology,
    /// In [`ShardId`] order, as many as the topology has.
    pub shards: Vec<ShardConfig>,
}

/// A shard as the hub knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KnownShard {
    pub name: String,
    pub weight: u32,
    /// First the primary; empty where an earlier weir has not written it down.
    pub servers: Vec<Endpoint>,
    pub state: ShardState,
    pub slots: Vec<Slot>,
    /// Keys that are isolated here, by hash, with their names.
    pub keys: Vec<(u64, String)>,
}

impl KnownShard {
    fn owns_nothing(&self) -> bool {
        self.slots.is_empty() && self.keys.is_empty()
    }
}

/// What a start has to tell the hub.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Its addresses are not those of the configuration.
    Address(ShardId, ShardConfig),
    /// It is new.
    Joins(ShardConfig),
    /// Nobody has said where it is, and it owns nothing.
    Forgotten(ShardId),
}

/// The shards of database $1.
pub(super) const KNOWN: &str = "
SELECT t.epoch, s.id, s.name, s.weight, s.servers, s.state,
       CASE s.id WHEN 0 THEN t.owners END,
       ARRAY(SELECT k.hash FROM weir.isolated_key k WHERE k.database = s.database AND k.shard = s.id ORDER BY k.hash),
       ARRAY(SELECT k.key FROM weir.isolated_key k WHERE k.database = s.database AND k.shard = s.id ORDER BY k.hash),
       (SELECT max(version) FROM weir.schema_version)
FROM weir.topology t JOIN weir.shard s USING (database) WHERE t.database = $1 ORDER BY s.id";

/// What [`KNOWN`] has given.
pub(super) fn known(rows: &[Row], database: &str) -> Result<(Epoch, Vec<KnownShard>), HubError> {
    let damaged = |what: String| HubError::Damaged { database: database.to_owned(), what };
    let mut shards: Vec<KnownShard> = Vec::new();
    let (mut epoch, mut owners) = (Epoch(0), None);
    for row in rows {
        epoch = Epoch(row.try_get::<_, i64>(0)? as u64);
        // A newer weir may have made it mean what this one does not know.
        schema::known(row.try_get(9)?)?;
        let name: String = row.try_get(2)?;
        if usize::try_from(row.try_get::<_, i16>(1)?) != Ok(shards.len()) {
            return Err(damaged(format!("the shard with number {} is missing", shards.len())));
        }
        let word: String = row.try_get(5)?;
        let state = ShardState::parse(&word).ok_or_else(|| damaged(format!("shard {name} is \"{word}\"")))?;
        let servers: Vec<String> = row.try_get(4)?;
        let read = |text: &String| Endpoint::parse(text).ok_or_else(|| damaged(format!("\"{text}\" of shard {name}")));
        let servers = servers.iter().map(read).collect::<Result<_, _>>()?;
        owners = owners.or(row.try_get::<_, Option<Vec<Option<i16>>>>(6)?);
        let (hashes, names): (Vec<i64>, Vec<String>) = (row.try_get(7)?, row.try_get(8)?);
        let keys = hashes.into_iter().map(|hash| hash as u64).zip(names).collect();
        let weight = row.try_get::<_, i32>(3)?.max(0) as u32;
        shards.push(KnownShard { name, weight, servers, state, slots: Vec::new(), keys });
    }
    for (slot, owner) in Slot::all().zip(owners.into_iter().flatten()) {
        // One that nobody owns, or a shard that there is not, is missed when the map is made.
        if let Some(shard) = owner.and_then(|owner| shards.get_mut(usize::try_from(owner).ok()?)) {
            shard.slots.push(slot);
        }
    }
    Ok((epoch, shards))
}

pub(super) async fn ask(client: &impl GenericClient, database: &str) -> Result<(Epoch, Vec<KnownShard>), HubError> {
    known(&client.query_typed(KNOWN, &[(&database, Type::TEXT)]).await?, database)
}

/// What the configuration says that the hub does not know yet. Errors: more shards than a process can keep.
pub(super) fn changes(database: &DatabaseConfig, known: &[KnownShard]) -> Result<Vec<Change>, HubError> {
    let mut changes = Vec::new();
    for (number, shard) in known.iter().enumerate() {
        let id = ShardId(number as u16);
        match database.shards.iter().find(|configured| configured.name == shard.name) {
            Some(configured) if shard.servers != servers(configured) => {
                changes.push(Change::Address(id, configured.clone()));
            }
            Some(_) => {}
            None if shard.servers.is_empty() && shard.owns_nothing() && shard.state != ShardState::Retired => {
                changes.push(Change::Forgotten(id));
            }
            None => {}
        }
    }
    let new = database.shards.iter().filter(|shard| known.iter().all(|known| known.name != shard.name));
    changes.extend(new.cloned().map(Change::Joins));
    let joining = changes.iter().filter(|change| matches!(change, Change::Joins(_))).count();
    if known.len() + joining > SHARDS_MAX {
        return Err(HubError::TooManyShards { database: database.name.clone() });
    }
    Ok(changes)
}

pub(super) async fn record(transaction: &Transaction<'_>, database: &str, changes: &[Change]) -> Result<(), HubError> {
    for change in changes {
        match change {
            Change::Address(id, shard) => {
                let sql = "UPDATE weir.shard SET servers = $3 WHERE database = $1 AND id = $2";
                transaction.execute(sql, &[&database, &(id.0 as i16), &addresses(shard)]).await?;
            }
            Change::Joins(shard) => {
                insert(transaction, database, shard).await?;
                raise_epoch(transaction, database).await?;
                tracing::info!(
                    database,
                    shard = shard.name,
                    "the hub did not know this shard: it is joining and owns no slots; `weir reshard start add {} {}` gives it some",
                    shard.name,
                    shard.primary
                );
            }
            Change::Forgotten(id) => set_state(transaction, database, *id, ShardState::Retired).await?,
        }
    }
    Ok(())
}

/// Adds a shard behind the last one.
async fn insert(transaction: &Transaction<'_>, database: &str, shard: &ShardConfig) -> Result<ShardId, HubError> {
    let sql = "INSERT INTO weir.shard (database, id, name, weight, servers, state) \
               SELECT $1, coalesce(max(id) + 1, 0), $2, $3, $4, 'joining' FROM weir.shard WHERE database = $1 RETURNING id";
    let row = transaction.query_one(sql, &[&database, &shard.name, &(shard.weight as i32), &addresses(shard)]).await?;
    Ok(ShardId(row.try_get::<_, i16>(0)? as u16))
}

async fn set_state(
    transaction: &Transaction<'_>,
    database: &str,
    shard: ShardId,
    state: ShardState,
) -> Result<(), HubError> {
    let sql = "UPDATE weir.shard SET state = $3 WHERE database = $1 AND id = $2";
    transaction.execute(sql, &[&database, &(shard.0 as i16), &state.as_str()]).await?;
    raise_epoch(transaction, database).await
}

/// Proxies read the map again when it is notified, and take it over when its epoch is higher.
pub(super) async fn raise_epoch(transaction: &Transaction<'_>, database: &str) -> Result<(), HubError> {
    transaction.execute("UPDATE weir.topology SET epoch = epoch + 1 WHERE database = $1", &[&database]).await?;
    transaction.execute("SELECT pg_notify('weir_topology', $1)", &[&database]).await?;
    Ok(())
}

fn servers(shard: &ShardConfig) -> Vec<Endpoint> {
    std::iter::once(&shard.primary).chain(&shard.replicas).cloned().collect()
}

pub(super) fn addresses(shard: &ShardConfig) -> Vec<String> {
    servers(shard).iter().map(ToString::to_string).collect()
}

/// The map as statements need it. Errors: a slot without an owner, or one that does not take part; a shard that nobody has said
/// where to find; a home shard that does not take part.
pub(super) fn map(
    database: &DatabaseConfig,
    epoch: Epoch,
    known: Vec<KnownShard>,
    moves: Moves,
) -> Result<HubMap, HubError> {
    let damaged = |what: String| HubError::Damaged { database: database.name.clone(), what };
    let (mut owners, mut isolated) = (vec![None; Slot::COUNT], Vec::new());
    for (number, shard) in known.iter().enumerate() {
        if shard.state != ShardState::Active && !shard.owns_nothing() {
            return Err(damaged(format!("shard {} is {} and owns slots", shard.name, shard.state.as_str())));
        }
        let owner = ShardId(number as u16);
        isolated.extend(shard.keys.iter().map(|(hash, name)| Isolated {
            hash: *hash,
            owner,
            name: name.as_str().into(),
        }));
        for slot in &shard.slots {
            owners[slot.index()] = Some(owner);
        }
    }
    let found = owners.iter().flatten().count();
    let slots = SlotMap::new(owners.into_iter().flatten().collect());
    let slots = slots.ok_or_else(|| damaged(format!("{found} of {} slots have an owner", Slot::COUNT)))?;
    let home_name = &database.shards[usize::from(database.home.0)].name;
    let home = known.iter().position(|shard| shard.name == *home_name && shard.state == ShardState::Active);
    let home = home.ok_or_else(|| damaged(format!("the home shard {home_name} does not take part")))?;
    let states = known.iter().map(|shard| shard.state).collect();
    let rules = Arc::new(database.rules());
    let roster = Roster::new(states);
    let shards = known.into_iter().map(|shard| reached(database, shard)).collect::<Result<Vec<_>, _>>()?;
    let topology = Topology {
        epoch,
        shards: shards.iter().map(|shard| shard.name.as_str().into()).collect(),
        roster,
        slots: slots.isolating(isolated),
        tables: rules,
        home: ShardId(home as u16),
        moves,
    };
    Ok(HubMap { topology, shards })
}

/// How a shard is reached: as the configuration says, or as whoever added it has said. Its weight is the hub's: RESHARD changes it there.
fn reached(database: &DatabaseConfig, known: KnownShard) -> Result<ShardConfig, HubError> {
    let KnownShard { name, weight, servers, state, .. } = known;
    if let Some(configured) = database.shards.iter().find(|shard| shard.name == name) {
        return Ok(ShardConfig { weight, ..configured.clone() });
    }
    let mut servers = servers.into_iter();
    match (servers.next(), state) {
        (Some(primary), _) => Ok(ShardConfig { name, primary, replicas: servers.collect(), weight }),
        // Nobody will connect to it.
        (None, ShardState::Retired) => {
            Ok(ShardConfig { primary: Endpoint { host: name.clone(), port: 5432 }, name, replicas: Vec::new(), weight })
        }
        (None, _) => Err(HubError::MissingShard { database: database.name.clone(), shard: name }),
    }
}

impl Hub {
    /// Registers a shard that is to join: every proxy gets to know it, and no statement goes there yet. One that is there already
    /// under this name is left as it is, if it is joining. Errors: it takes part, or has been retired; too many shards.
    pub async fn add_shard(&self, database: &str, shard: &ShardConfig) -> Result<ShardId, HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let (transaction, known) = locked(&mut client, database).await?;
            if let Some(at) = known.iter().position(|known| known.name == shard.name) {
                return match known[at].state {
                    ShardState::Joining => Ok(ShardId(at as u16)),
                    state => Err(refused(database, &shard.name, state, "cannot join")),
                };
            }
            if known.len() >= SHARDS_MAX {
                return Err(HubError::TooManyShards { database: database.to_owned() });
            }
            let id = insert(&transaction, database, shard).await?;
            raise_epoch(&transaction, database).await?;
            transaction.commit().await?;
            Ok(id)
        })
        .await
    }

    /// Lets a shard take part that was joining: from the next epoch on it may own slots, and statements for all shards reach it. It must
    /// have the schema and the rows of reference tables. Errors: it is not joining.
    pub async fn activate(&self, database: &str, shard: &str) -> Result<(), HubError> {
        self.step(database, shard, (ShardState::Joining, ShardState::Active)).await
    }

    /// From the next epoch on nobody changes what all shards have, so that this one can be given it. Errors: it is not joining.
    pub async fn enter(&self, database: &str, shard: &str) -> Result<Epoch, HubError> {
        self.step(database, shard, (ShardState::Joining, ShardState::Entering)).await?;
        bounded(async { super::moves::epoch(&*self.client().await?, database).await }).await
    }

    /// It has what all shards have (`has_all`) and takes part, or it goes on joining.
    pub async fn entered(&self, database: &str, shard: &str, has_all: bool) -> Result<(), HubError> {
        let to = if has_all { ShardState::Active } else { ShardState::Joining };
        self.step(database, shard, (ShardState::Entering, to)).await
    }

    async fn step(&self, database: &str, shard: &str, (from, to): (ShardState, ShardState)) -> Result<(), HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let (transaction, known) = locked(&mut client, database).await?;
            let Some(at) = known.iter().position(|known| known.name == shard) else {
                return Err(HubError::NoShard { database: database.to_owned(), shard: shard.to_owned() });
            };
            let found = &known[at];
            if found.state == to {
                return Ok(());
            }
            if found.state != from {
                return Err(refused(database, shard, found.state, "cannot take part"));
            }
            set_state(&transaction, database, ShardId(at as u16), to).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }
}

/// The shards, for one change that is made alone.
async fn locked<'c>(client: &'c mut Client, database: &str) -> Result<(Transaction<'c>, Vec<KnownShard>), HubError> {
    let transaction = client.transaction().await?;
    schema::lock(&transaction).await?;
    let (_, known) = ask(&transaction, database).await?;
    Ok((transaction, known))
}

fn refused(database: &str, shard: &str, state: ShardState, verb: &'static str) -> HubError {
    HubError::ShardState { database: database.to_owned(), shard: shard.to_owned(), state: state.as_str(), verb }
}
