//! What the hub knows of moves, and how far each proxy has come in knowing it.
//!
//! Invariant: a step that statements must know of and the epoch change in one transaction, and on the connection that holds the mover's
//! lock: who has lost the lock changes nothing. Non-goal: deciding what the next step is (`weir_core::reshard::phase`).

use std::fmt::Write as _;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, GenericClient, Row};
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::lock::MOVER;
use weir_core::reshard::phase::{Aim, Phase};
use weir_core::reshard::throttle::{Held, Limits};
use weir_core::topology::KeySet;
use weir_core::topology::moves::{Move, Moves};

use super::shards::KnownShard;
use super::{Hub, HubError, bounded, schema};

/// A proxy that drives the moves and is not heard of for so long drives them no more: it is stopped, or cut off. It asks every second.
/// Postgres 14; before that TCP alone tells.
const SILENT_MAX: &str = "4s";
/// How long one waits in line to drive the moves, before it looks again whether there are any.
const IN_LINE: &str = "4s";
/// Entries of proxies that have not been heard of for so long are taken away.
const FORGOTTEN_AFTER: &str = "1 hour";

/// A move as the hub has it.
#[derive(Clone, Debug)]
pub struct MoveRow {
    pub id: i32,
    pub from: String,
    pub to: String,
    pub keys: KeySet,
    pub phase: Phase,
    pub aim: Aim,
    pub paused: bool,
    pub progress: MoveProgress,
    /// Seconds since its phase began.
    pub since: f64,
    /// What the last attempt failed at.
    pub error: Option<String>,
    /// What has happened to it, and is over.
    pub notice: Option<String>,
    pub limits: Limits,
}

/// How much is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MoveProgress {
    pub rows_total: i64,
    pub rows_done: i64,
    pub bytes_done: i64,
    /// Changes applied since the copy.
    pub changes: i64,
    /// WAL of the source that is not applied yet.
    pub lag_bytes: i64,
    /// How long the last change of owner made statements wait, by the mover's clock.
    pub paused_us: Option<i64>,
    /// Why it waits.
    pub held: Option<Held>,
}

const COLUMNS: &str = "m.id, s.name, t.name, m.slots, m.phase, m.aim, m.paused, m.rows_total, m.rows_done, m.bytes_done, m.changes, \
                       m.lag_bytes, m.paused_us, \
                       extract(epoch FROM clock_timestamp() - m.since)::float8, m.error, m.notice, m.limits, m.held_by \
                       FROM weir.move m JOIN weir.shard s ON s.database = m.database AND s.id = m.source \
                       JOIN weir.shard t ON t.database = m.database AND t.id = m.target";

/// Moves that are not over; and also those of the last hundred that are.
const OPEN: &str = "AND m.phase NOT IN ('done', 'cancelled', 'rolled_back')";
const RECENT: &str =
    "AND (m.phase NOT IN ('done', 'cancelled', 'rolled_back') OR m.id > (SELECT max(id) - 100 FROM weir.move))";

fn damaged(database: &str, id: i32, what: &str) -> HubError {
    HubError::Damaged { database: database.to_owned(), what: format!("move {id}: {what}") }
}

fn row(row: &Row, database: &str) -> Result<MoveRow, HubError> {
    let id: i32 = row.try_get(0)?;
    let (keys, phase, aim): (&str, &str, &str) = (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    let (limits, held): (&str, Option<&str>) = (row.try_get(16)?, row.try_get(17)?);
    Ok(MoveRow {
        id,
        from: row.try_get(1)?,
        to: row.try_get(2)?,
        keys: KeySet::parse(keys).ok_or_else(|| damaged(database, id, "its slots cannot be read"))?,
        phase: Phase::parse(phase).ok_or_else(|| damaged(database, id, "its phase is not known"))?,
        aim: Aim::parse(aim).ok_or_else(|| damaged(database, id, "its aim is not known"))?,
        paused: row.try_get(6)?,
        progress: MoveProgress {
            rows_total: row.try_get(7)?,
            rows_done: row.try_get(8)?,
            bytes_done: row.try_get(9)?,
            changes: row.try_get(10)?,
            lag_bytes: row.try_get(11)?,
            paused_us: row.try_get(12)?,
            held: held.and_then(Held::parse),
        },
        since: row.try_get(13)?,
        error: row.try_get(14)?,
        notice: row.try_get(15)?,
        limits: Limits::parse(limits).ok_or_else(|| damaged(database, id, "its limits cannot be read"))?,
    })
}

async fn rows(client: &impl GenericClient, database: &str, which: &str) -> Result<Vec<MoveRow>, HubError> {
    let found = client.query_typed(&select(which), &[(&database, Type::TEXT)]).await?;
    found.iter().map(|found| row(found, database)).collect()
}

fn select(which: &str) -> String {
    format!("SELECT {COLUMNS} WHERE m.database = $1 {which} ORDER BY m.id")
}

/// How many of the slots and of the keys beside them a shard owns.
async fn owned(client: &impl GenericClient, (database, shard): (&str, &str), keys: &KeySet) -> Result<i64, HubError> {
    let sql = "SELECT (SELECT count(*) FROM weir.slot l WHERE l.database = $1 AND l.shard = s.id AND l.slot = ANY ($3)) \
               + (SELECT count(*) FROM unnest($4::int8[]) AS h(hash) \
                  JOIN weir.slot l ON l.database = $1 AND l.slot = (h.hash >> 52) & 4095 \
                  LEFT JOIN weir.isolated_key k ON k.database = $1 AND k.hash = h.hash \
                  WHERE coalesce(k.shard, l.shard) = s.id) \
               FROM weir.shard s WHERE s.database = $1 AND s.name = $2";
    let beside: Vec<i64> = keys.beside().map(|hash| hash as i64).collect();
    Ok(client.query_one(sql, &[&database, &shard, &numbers(keys), &beside]).await?.try_get(0)?)
}

/// Are these the keys of the slots that stay behind?
async fn stays(client: &impl GenericClient, database: &str, keys: &KeySet) -> Result<bool, HubError> {
    let sql = "SELECT hash FROM weir.isolated_key WHERE database = $1 AND ((hash >> 52) & 4095)::int2 = ANY ($2) ORDER BY hash";
    let rows = client.query(sql, &[&database, &numbers(keys)]).await?;
    let found = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
    let mut expected: Vec<i64> = keys.except().map(|hash| hash as i64).collect();
    expected.sort_unstable();
    Ok(found == expected)
}

fn numbers(keys: &KeySet) -> Vec<i16> {
    keys.slots().iter().map(|slot| slot.index() as i16).collect()
}

/// The slots as Postgres numbers bits of a `bytea`, in hexadecimal digits.
fn bits(keys: &KeySet) -> String {
    let mut bytes = [0_u8; Slot::COUNT / 8];
    for slot in keys.slots().iter() {
        bytes[slot.index() / 8] |= 1 << (slot.index() % 8);
    }
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

pub(super) async fn epoch(client: &impl GenericClient, database: &str) -> Result<Epoch, HubError> {
    let sql = "SELECT epoch FROM weir.topology WHERE database = $1";
    let row = client.query_typed_one(sql, &[(&database, Type::TEXT)]).await?;
    Ok(Epoch(row.try_get::<_, i64>(0)? as u64))
}

/// Asks for the moves of database $1 that are not over.
pub(super) fn ask_open() -> String {
    select(OPEN)
}

/// What statements must know of what [`ask_open`] has given.
pub(super) fn known(found: &[Row], database: &str, shards: &[KnownShard]) -> Result<Moves, HubError> {
    let mut moves = Vec::new();
    for found in found {
        let row = row(found, database)?;
        let Some(stage) = row.phase.stage() else { continue };
        let shard = |name: &str| {
            let number = shards.iter().position(|shard| shard.name == name);
            number
                .map(|number| ShardId(number as u16))
                .ok_or_else(|| damaged(database, row.id, "its shard is not known"))
        };
        moves.push(Move { id: row.id.into(), from: shard(&row.from)?, to: shard(&row.to)?, keys: row.keys, stage });
    }
    Ok(Moves::new(moves))
}

/// What is known of a move that is to be made.
#[derive(Clone, Debug)]
pub struct NewMove {
    pub from: String,
    pub to: String,
    pub keys: KeySet,
    /// What a single key is called.
    pub key: Option<String>,
    pub aim: Aim,
}

impl Hub {
    /// The moves that are not over, or (`all`) also the last ones that are.
    pub async fn moves(&self, database: &str, all: bool) -> Result<Vec<MoveRow>, HubError> {
        let which = if all { RECENT } else { OPEN };
        bounded(async { rows(&*self.client().await?, database, which).await }).await
    }

    /// Puts moves down, all or none. Their numbers; `None`: some are still under way, or the slots have another owner by now.
    /// `weights`, by shard, count once all of them are done; if one is given up or taken back, those of before stay.
    pub async fn add_moves(
        &self,
        database: &str,
        moves: &[NewMove],
        weights: &[(String, u32)],
    ) -> Result<Option<Vec<i32>>, HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            schema::lock(&transaction).await?;
            let open = rows(&transaction, database, OPEN).await?;
            if !open.is_empty() {
                return Ok(None);
            }
            let next = "UPDATE weir.shard SET next_weight = (SELECT weight FROM unnest($2::text[], $3::int[]) AS w(name, weight) \
                        WHERE w.name = weir.shard.name) WHERE database = $1";
            let (names, shares): (Vec<&str>, Vec<i32>) =
                weights.iter().map(|(name, weight)| (name.as_str(), *weight as i32)).unzip();
            transaction.execute(next, &[&database, &names, &shares]).await?;
            let mut ids = Vec::new();
            for one in moves {
                // The map may have changed since they were planned.
                let expected = one.keys.slots().len() + one.keys.beside().count();
                let is_as_planned = owned(&transaction, (database, &one.from), &one.keys).await? == expected as i64
                    && stays(&transaction, database, &one.keys).await?;
                if !is_as_planned {
                    return Ok(None);
                }
                let sql = "INSERT INTO weir.move (database, source, target, slots, phase, aim) \
                           SELECT $1, s.id, t.id, $4, 'queued', $5 FROM weir.shard s, weir.shard t \
                           WHERE (s.database, s.name, t.database, t.name) = ($1, $2, $1, $3) RETURNING id";
                let keys = one.keys.to_string();
                let made =
                    transaction.query_one(sql, &[&database, &one.from, &one.to, &keys, &one.aim.as_str()]).await?;
                ids.push(made.try_get(0)?);
                // While it moves a key has an owner of its own: the one it has now.
                let sql = "INSERT INTO weir.isolated_key (database, hash, key, shard) SELECT $1, $2, $3, id FROM weir.shard \
                           WHERE (database, name) = ($1, $4) ON CONFLICT DO NOTHING";
                for hash in one.keys.beside() {
                    let name = one.key.as_deref().unwrap_or_default();
                    transaction.execute(sql, &[&database, &(hash as i64), &name, &one.from]).await?;
                }
            }
            transaction.commit().await?;
            Ok(Some(ids))
        })
        .await
    }

    /// Sets what is wanted of a move, where its phase is still the one that was judged. False: it is another by now.
    pub async fn order_move(
        &self,
        id: i32,
        judged: Phase,
        aim: Aim,
        paused: bool,
        phase: Phase,
    ) -> Result<bool, HubError> {
        bounded(async {
            let sql = "UPDATE weir.move SET aim = $3, paused = $4, phase = $5, \
                       since = CASE WHEN phase = $5 THEN since ELSE clock_timestamp() END WHERE id = $1 AND phase = $2";
            let client = self.client().await?;
            let (judged, aim, phase) = (judged.as_str(), aim.as_str(), phase.as_str());
            Ok(client.execute(sql, &[&id, &judged, &aim, &paused, &phase]).await? == 1)
        })
        .await
    }

    /// How much a move may burden its servers from now on.
    pub async fn limit_move(&self, id: i32, limits: &Limits) -> Result<(), HubError> {
        bounded(async {
            let sql = "UPDATE weir.move SET limits = $2 WHERE id = $1";
            self.client().await?.execute(sql, &[&id, &limits.to_string()]).await?;
            Ok(())
        })
        .await
    }

    /// This proxy works by `epoch` and nothing below it. Also says that it is there; only this is waited for until it is on disk: an epoch
    /// that a crash of the hub takes is said again, and what others did because of it comes later in the WAL.
    pub async fn acknowledge(&self, database: &str, proxy: &str, epoch: Epoch) -> Result<(), HubError> {
        bounded(async {
            let sql = "INSERT INTO weir.proxy (database, id, epoch, seen) SELECT $1, $2, $3, clock_timestamp() \
                       FROM (SELECT count(set_config('synchronous_commit', 'off', true)) FROM weir.proxy WHERE (database, id) = ($1, $2)) AS known \
                       ON CONFLICT (database, id) DO UPDATE SET epoch = excluded.epoch, seen = excluded.seen";
            let epoch = epoch.0 as i64;
            let values: [(&(dyn ToSql + Sync), Type); 3] =
                [(&database, Type::TEXT), (&proxy, Type::TEXT), (&epoch, Type::INT8)];
            self.client().await?.execute_typed(sql, &values).await?;
            Ok(())
        })
        .await
    }

    /// It does nothing any more.
    pub async fn depart(&self, database: &str, proxy: &str) -> Result<(), HubError> {
        bounded(async {
            let sql = "DELETE FROM weir.proxy WHERE (database, id) = ($1, $2)";
            self.client().await?.execute(sql, &[&database, &proxy]).await?;
            Ok(())
        })
        .await
    }

    /// Waits in line to become the one who drives the moves of a database, so that nobody has to find out that the last one is gone.
    /// `None`: another proxy does still.
    pub async fn drive(&self, database: &str, home: &str) -> Result<Option<Driving>, HubError> {
        bounded(async {
            let client = self.server.open().await?;
            let settings = format!(
                "SET lock_timeout = '{IN_LINE}'; SELECT set_config('idle_session_timeout', '{SILENT_MAX}', false) \
                 WHERE current_setting('server_version_num')::int >= 140000"
            );
            client.batch_execute(&settings).await?;
            match client.query_one("SELECT pg_advisory_lock($1, hashtext($2))", &[&MOVER, &database]).await {
                Ok(_) => {}
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            client.batch_execute("SET lock_timeout = 0").await?;
            Ok(Some(Driving { client, database: database.to_owned(), home: home.to_owned() }))
        })
        .await
    }
}

/// The right to drive the moves of a database: a lock that lasts as long as the connection it is made on.
pub struct Driving {
    client: Client,
    database: String,
    /// Of the shard that never leaves.
    home: String,
}

impl Driving {
    /// The right is still there. Errors: it is lost, or nobody knows.
    pub async fn holds(&self) -> Result<(), HubError> {
        bounded(async { Ok(self.client.batch_execute("SELECT").await?) }).await
    }

    pub async fn moves(&self) -> Result<Vec<MoveRow>, HubError> {
        bounded(rows(&self.client, &self.database, RECENT)).await
    }

    pub async fn move_now(&self, id: i32) -> Result<MoveRow, HubError> {
        let found = bounded(rows(&self.client, &self.database, &format!("AND m.id = {id}"))).await?;
        found.into_iter().next().ok_or_else(|| damaged(&self.database, id, "it is gone"))
    }

    /// One step further. If statements must know of it the epoch rises with it, and everybody is told. The epoch in force then.
    /// `owner`: who owns the slots from now on, if that changes.
    pub async fn step(&self, from: &MoveRow, to: Phase, owner: Option<&str>) -> Result<Epoch, HubError> {
        let text = match (from.phase.stage() == to.stage() && owner.is_none(), owner) {
            (true, _) => String::new(),
            (false, None) => RAISE.to_owned(),
            (false, Some(owner)) => format!("{}{RAISE}", self.give(&from.keys, owner)),
        };
        let weights = match to {
            Phase::Done => KEEP_WEIGHTS,
            Phase::Cancelled | Phase::RolledBack => DROP_WEIGHTS,
            _ => "",
        };
        let keys = if to.is_final() { FORGET_KEYS } else { "" };
        let leaves = match to {
            Phase::Done => LEAVE.replace("{home}", &quoted(&self.home)).replace("{from}", &quoted(&from.from)),
            _ => String::new(),
        };
        let text = format!("{text}{weights}{keys}{leaves}");
        let sql = format!(
            "BEGIN; DO $weir$ BEGIN \
             UPDATE weir.move SET phase = '{to}', since = clock_timestamp(), error = NULL{aim} WHERE id = {id} AND phase = '{was}'; \
             IF NOT FOUND THEN RAISE 'move {id} is not in phase {was} any more'; END IF; END $weir$; {text} COMMIT; \
             SELECT epoch FROM weir.topology WHERE database = {database}",
            to = to.as_str(),
            // Nobody waits for what cannot be.
            aim = if to == Phase::Forward { ", aim = CASE aim WHEN 'back' THEN 'moved' ELSE aim END" } else { "" },
            id = from.id,
            was = from.phase.as_str(),
            text = text.replace("{database}", &quoted(&self.database)),
            database = quoted(&self.database),
        );
        bounded(async {
            let answers = self.client.simple_query(&sql).await;
            let answers = match answers {
                Ok(answers) => answers,
                Err(error) => {
                    // The block it opened must not outlive it.
                    let _ = self.client.batch_execute("ROLLBACK").await;
                    return Err(error.into());
                }
            };
            let epoch = answers.iter().find_map(|answer| match answer {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
                _ => None,
            });
            epoch.map(Epoch).ok_or_else(|| damaged(&self.database, from.id, "no epoch"))
        })
        .await
    }

    pub async fn note(&self, id: i32, progress: &MoveProgress) -> Result<(), HubError> {
        bounded(async {
            let sql = "UPDATE weir.move SET rows_total = $2, rows_done = $3, bytes_done = $4, changes = $5, lag_bytes = $6, \
                       paused_us = $7, held_by = $8 WHERE id = $1";
            let MoveProgress { rows_total, rows_done, bytes_done, changes, lag_bytes, paused_us, held } = *progress;
            let held = held.map(Held::as_str);
            let values: [&(dyn ToSql + Sync); 8] =
                [&id, &rows_total, &rows_done, &bytes_done, &changes, &lag_bytes, &paused_us, &held];
            self.client.execute(sql, &values).await?;
            Ok(())
        })
        .await
    }

    /// Statements that give keys to a shard.
    fn give(&self, keys: &KeySet, owner: &str) -> String {
        let database = quoted(&self.database);
        let owner = format!(
            "(SELECT id FROM weir.shard WHERE database = {database} AND name = {owner})",
            owner = quoted(owner)
        );
        let mut sql = String::new();
        // Writing to a String cannot fail.
        if !keys.slots().is_empty() {
            let _ = write!(
                sql,
                "UPDATE weir.topology SET owners = ARRAY(SELECT CASE get_bit(decode('{bits}', 'hex'), place::int - 1) WHEN 1 THEN {owner} ELSE shard END \
                 FROM unnest(owners) WITH ORDINALITY AS o(shard, place) ORDER BY place) WHERE database = {database}; ",
                bits = bits(keys),
            );
        }
        let beside: Vec<String> = keys.beside().map(|hash| format!("'{}'", hash as i64)).collect();
        if !beside.is_empty() {
            let hashes = beside.join(",");
            let _ = write!(
                sql,
                "UPDATE weir.isolated_key SET shard = {owner} WHERE database = {database} AND hash IN ({hashes}); "
            );
        }
        sql
    }

    /// How many of these slots and keys beside them a shard owns.
    pub async fn owned(&self, shard: &str, keys: &KeySet) -> Result<i64, HubError> {
        bounded(owned(&self.client, (&self.database, shard), keys)).await
    }

    /// The epoch in force.
    pub async fn epoch(&self) -> Result<Epoch, HubError> {
        bounded(epoch(&self.client, &self.database)).await
    }

    pub async fn note_error(&self, id: i32, error: &str) -> Result<(), HubError> {
        bounded(async {
            self.client.execute("UPDATE weir.move SET error = $2 WHERE id = $1", &[&id, &error]).await?;
            Ok(())
        })
        .await
    }

    /// Stops a move until somebody lets it go on.
    pub async fn pause(&self, id: i32) -> Result<(), HubError> {
        bounded(async {
            self.client.execute("UPDATE weir.move SET paused = true WHERE id = $1", &[&id]).await?;
            Ok(())
        })
        .await
    }

    /// Says what has happened to a move; stays in its line.
    pub async fn notice(&self, id: i32, what: &str) -> Result<(), HubError> {
        bounded(async {
            self.client.execute("UPDATE weir.move SET notice = $2 WHERE id = $1", &[&id, &what]).await?;
            Ok(())
        })
        .await
    }

    /// Forgets proxies that have been gone for long.
    pub async fn forget_proxies(&self) -> Result<(), HubError> {
        bounded(async {
            let gone = format!("DELETE FROM weir.proxy WHERE seen < clock_timestamp() - interval '{FORGOTTEN_AFTER}'");
            Ok(self.client.batch_execute(&gone).await?)
        })
        .await
    }

    /// All proxies that have said that they are there, and the epoch below which each does nothing any more.
    pub async fn proxies(&self) -> Result<Vec<(String, Epoch)>, HubError> {
        bounded(async {
            let sql = "SELECT id, epoch FROM weir.proxy WHERE database = $1";
            let rows = self.client.query_typed(sql, &[(&self.database, Type::TEXT)]).await?;
            rows.iter().map(|row| Ok((row.try_get(0)?, Epoch(row.try_get::<_, i64>(1)? as u64)))).collect()
        })
        .await
    }

    /// Those that have a connection to the hub. `sessions`: the names that begin with $1, without that.
    pub async fn connected(&self, sessions: &str) -> Result<Vec<String>, HubError> {
        bounded(async {
            let rows = self.client.query_typed(sessions, &[(&super::NAME, Type::TEXT)]).await?;
            rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
        })
        .await
    }
}

/// The last of the moves that weights were given with is done. Before it is, and if one of them comes to another end, plans go by those of
/// before: else the next one would move what was just given up.
const KEEP_WEIGHTS: &str = " UPDATE weir.shard SET weight = next_weight, next_weight = NULL WHERE database = {database} AND next_weight IS NOT NULL \
                            AND NOT EXISTS (SELECT FROM weir.move m WHERE m.database = {database} \
                            AND m.phase NOT IN ('done', 'cancelled', 'rolled_back'));";
const DROP_WEIGHTS: &str =
    " UPDATE weir.shard SET next_weight = NULL WHERE database = {database} AND next_weight IS NOT NULL;";

/// `{database}` stands for its name as a literal.
const RAISE: &str = "UPDATE weir.topology SET epoch = epoch + 1 WHERE database = {database}; NOTIFY weir_topology;";
/// When nothing is on its way any more, keys that are where their slot is are isolated no more. Not before: a move that goes back with
/// a slot must leave them where they are.
const FORGET_KEYS: &str = " DELETE FROM weir.isolated_key k USING weir.slot l \
    WHERE k.database = {database} AND l.database = {database} AND l.slot = (k.hash >> 52) & 4095 AND l.shard = k.shard \
    AND NOT EXISTS (SELECT FROM weir.move m WHERE m.database = {database} AND m.phase NOT IN ('done', 'cancelled', 'rolled_back'));";

/// A shard that has given up all it owned takes part no more, unless it is home. After [`FORGET_KEYS`]; `{from}` and `{home}` are names.
const LEAVE: &str = " WITH left_now AS (UPDATE weir.shard s SET state = 'retired' \
    WHERE s.database = {database} AND s.name = {from} AND s.name <> {home} AND s.state = 'active' \
    AND NOT EXISTS (SELECT FROM weir.slot l WHERE l.database = {database} AND l.shard = s.id) \
    AND NOT EXISTS (SELECT FROM weir.isolated_key k WHERE k.database = {database} AND k.shard = s.id) \
    AND NOT EXISTS (SELECT FROM weir.move m WHERE m.database = {database} AND s.id IN (m.source, m.target) \
                    AND m.phase NOT IN ('done', 'cancelled', 'rolled_back')) RETURNING id) \
    UPDATE weir.topology SET epoch = epoch + 1 WHERE database = {database} AND EXISTS (SELECT FROM left_now); \
    NOTIFY weir_topology;";

fn quoted(text: &str) -> String {
    weir_core::sql::word::quote_literal(text)
}
