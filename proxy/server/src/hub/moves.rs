//! What the hub knows of moves, and how far each proxy has come in knowing it.
//!
//! Invariant: a step that statements must know of and the epoch change in one transaction, and on the connection that holds the mover's
//! lock: who has lost the lock changes nothing. Non-goal: deciding what the next step is (`weir_core::reshard::phase`).

use std::collections::BTreeMap;

use tokio_postgres::{Client, GenericClient, Row};
use weir_core::id::{Epoch, ShardId};
use weir_core::reshard::phase::{Aim, Phase};
use weir_core::topology::SlotSet;
use weir_core::topology::moves::{Move, Moves};

use super::{Hub, HubError, bounded, schema};

/// First half of the advisory lock under which one proxy drives the moves of a database: "wmov" as bytes.
const MOVER: i32 = i32::from_be_bytes(*b"wmov");
/// Entries of proxies that have not been heard of for so long are taken away.
const FORGOTTEN_AFTER: &str = "1 hour";

/// A move as the hub has it.
#[derive(Clone, Debug)]
pub struct MoveRow {
    pub id: i32,
    pub from: String,
    pub to: String,
    pub slots: SlotSet,
    pub phase: Phase,
    pub aim: Aim,
    pub paused: bool,
    pub progress: MoveProgress,
    /// Seconds since its phase began.
    pub since: f64,
    /// What the last attempt failed at.
    pub error: Option<String>,
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
}

const COLUMNS: &str = "m.id, s.name, t.name, m.slots, m.phase, m.aim, m.paused, m.rows_total, m.rows_done, m.bytes_done, m.changes, \
                       m.lag_bytes, m.paused_us, \
                       extract(epoch FROM clock_timestamp() - m.since)::float8, m.error \
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
    let (slots, phase, aim): (&str, &str, &str) = (row.try_get(3)?, row.try_get(4)?, row.try_get(5)?);
    Ok(MoveRow {
        id,
        from: row.try_get(1)?,
        to: row.try_get(2)?,
        slots: SlotSet::parse(slots).ok_or_else(|| damaged(database, id, "its slots cannot be read"))?,
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
        },
        since: row.try_get(13)?,
        error: row.try_get(14)?,
    })
}

async fn rows(client: &impl GenericClient, database: &str, which: &str) -> Result<Vec<MoveRow>, HubError> {
    let sql = format!("SELECT {COLUMNS} WHERE m.database = $1 {which} ORDER BY m.id");
    client.query(&sql, &[&database]).await?.iter().map(|found| row(found, database)).collect()
}

async fn owned(client: &impl GenericClient, (database, shard): (&str, &str), slots: &SlotSet) -> Result<i64, HubError> {
    let numbers: Vec<i16> = slots.iter().map(|slot| slot.index() as i16).collect();
    let sql = "SELECT count(*) FROM weir.slot l JOIN weir.shard s ON s.database = l.database AND s.id = l.shard \
               WHERE l.database = $1 AND s.name = $2 AND l.slot = ANY ($3)";
    Ok(client.query_one(sql, &[&database, &shard, &numbers]).await?.try_get(0)?)
}

pub(super) async fn epoch(client: &impl GenericClient, database: &str) -> Result<Epoch, HubError> {
    let row = client.query_one("SELECT epoch FROM weir.topology WHERE database = $1", &[&database]).await?;
    Ok(Epoch(row.try_get::<_, i64>(0)? as u64))
}

/// What statements must know.
pub(super) async fn read(
    client: &impl GenericClient,
    database: &str,
    ids: &BTreeMap<&str, ShardId>,
) -> Result<Moves, HubError> {
    let mut moves = Vec::new();
    for row in rows(client, database, OPEN).await? {
        let Some(stage) = row.phase.stage() else { continue };
        let shard =
            |name: &str| ids.get(name).copied().ok_or_else(|| damaged(database, row.id, "its shard is not known"));
        moves.push(Move { id: row.id.into(), from: shard(&row.from)?, to: shard(&row.to)?, slots: row.slots, stage });
    }
    Ok(Moves::new(moves))
}

/// What is known of a move that is to be made.
#[derive(Clone, Debug)]
pub struct NewMove {
    pub from: String,
    pub to: String,
    pub slots: SlotSet,
    pub aim: Aim,
}

impl Hub {
    /// The moves that are not over, or (`all`) also the last ones that are.
    pub async fn moves(&self, database: &str, all: bool) -> Result<Vec<MoveRow>, HubError> {
        let which = if all { RECENT } else { OPEN };
        bounded(async { rows(&*self.client().await?, database, which).await }).await
    }

    /// Puts moves down, all or none. Their numbers; `None`: some are still under way, or the slots have another owner by now.
    pub async fn add_moves(&self, database: &str, moves: &[NewMove]) -> Result<Option<Vec<i32>>, HubError> {
        bounded(async {
            let mut client = self.client().await?;
            let transaction = client.transaction().await?;
            schema::lock(&transaction).await?;
            let open = rows(&transaction, database, OPEN).await?;
            if !open.is_empty() {
                return Ok(None);
            }
            let mut ids = Vec::new();
            for one in moves {
                // The map may have changed since they were planned.
                if owned(&transaction, (database, &one.from), &one.slots).await? != one.slots.len() as i64 {
                    return Ok(None);
                }
                let sql = "INSERT INTO weir.move (database, source, target, slots, phase, aim) \
                           SELECT $1, s.id, t.id, $4, 'queued', $5 FROM weir.shard s, weir.shard t \
                           WHERE (s.database, s.name, t.database, t.name) = ($1, $2, $1, $3) RETURNING id";
                let slots = one.slots.to_string();
                let made =
                    transaction.query_one(sql, &[&database, &one.from, &one.to, &slots, &one.aim.as_str()]).await?;
                ids.push(made.try_get(0)?);
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

    /// This proxy works by `epoch` and nothing below it. Also says that it is there.
    pub async fn acknowledge(&self, database: &str, proxy: &str, epoch: Epoch) -> Result<(), HubError> {
        bounded(async {
            let sql = "INSERT INTO weir.proxy (database, id, epoch, seen) VALUES ($1, $2, $3, clock_timestamp()) \
                       ON CONFLICT (database, id) DO UPDATE SET epoch = excluded.epoch, seen = excluded.seen";
            self.client().await?.execute(sql, &[&database, &proxy, &(epoch.0 as i64)]).await?;
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

    /// Tries to become the one who drives the moves of a database. `None`: another proxy does.
    pub async fn drive(&self, database: &str) -> Result<Option<Driving>, HubError> {
        bounded(async {
            let client = self.server.open().await?;
            let sql = "SELECT pg_try_advisory_lock($1, hashtext($2))";
            let got: bool = client.query_one(sql, &[&MOVER, &database]).await?.try_get(0)?;
            Ok(got.then(|| Driving { client, database: database.to_owned() }))
        })
        .await
    }
}

/// The right to drive the moves of a database: a lock that lasts as long as the connection it is made on.
pub struct Driving {
    client: Client,
    database: String,
}

impl Driving {
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
            (false, Some(owner)) => {
                let slots: Vec<String> = from.slots.iter().map(|slot| slot.index().to_string()).collect();
                format!(
                    "UPDATE weir.slot SET shard = (SELECT id FROM weir.shard WHERE database = {database} AND name = {owner}) \
                     WHERE database = {database} AND slot IN ({slots}); {RAISE}",
                    database = quoted(&self.database),
                    owner = quoted(owner),
                    slots = slots.join(","),
                )
            }
        };
        let sql = format!(
            "BEGIN; DO $weir$ BEGIN \
             UPDATE weir.move SET phase = '{to}', since = clock_timestamp(), error = NULL WHERE id = {id} AND phase = '{was}'; \
             IF NOT FOUND THEN RAISE 'move {id} is not in phase {was} any more'; END IF; END $weir$; {text} COMMIT; \
             SELECT epoch FROM weir.topology WHERE database = {database}",
            to = to.as_str(),
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
                       paused_us = $7 WHERE id = $1";
            let MoveProgress { rows_total, rows_done, bytes_done, changes, lag_bytes, paused_us } = *progress;
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
                [&id, &rows_total, &rows_done, &bytes_done, &changes, &lag_bytes, &paused_us];
            self.client.execute(sql, &values).await?;
            Ok(())
        })
        .await
    }

    /// How many of these slots a shard owns.
    pub async fn owned(&self, shard: &str, slots: &SlotSet) -> Result<i64, HubError> {
        bounded(owned(&self.client, (&self.database, shard), slots)).await
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
            let rows = self.client.query(sql, &[&self.database]).await?;
            rows.iter().map(|row| Ok((row.try_get(0)?, Epoch(row.try_get::<_, i64>(1)? as u64)))).collect()
        })
        .await
    }

    /// Those that have a connection to the hub. `sessions`: the names that begin with $1, without that.
    pub async fn connected(&self, sessions: &str) -> Result<Vec<String>, HubError> {
        bounded(async {
            let rows = self.client.query(sessions, &[&super::NAME]).await?;
            rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
        })
        .await
    }
}

/// `{database}` stands for its name as a literal.
const RAISE: &str = "UPDATE weir.topology SET epoch = epoch + 1 WHERE database = {database}; NOTIFY weir_topology;";

fn quoted(text: &str) -> String {
    weir_core::sql::word::quote_literal(text)
}
