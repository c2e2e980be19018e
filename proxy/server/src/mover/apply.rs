//! Applying what one server has written to the other, transaction by transaction.
//!
//! Invariant: what is applied and how far that is commit together, so nothing is applied twice and nothing is left out; what the mover
//! has applied itself is known by its first change and is never sent back. Every change must meet exactly one row.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use hashbrown::HashMap;
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_core::reshard::script::{MovedTable, Script};
use weir_core::sql::word::{quote_literal, quote_name};
use weir_core::topology::{Key, KeySet, KeyType};
use weir_wire::pgoutput::{Copied, Message, Old, Relation, Tuple, Value, read_copied, read_message};

use super::{Pair, Side, sql};
use crate::back::walsender::Walsender;

/// Statements are sent when they have grown to this.
const BATCH_BYTES: usize = 128 * 1024;
/// Changes that commit together, at most, where their transactions allow it.
const TOGETHER_MAX: u32 = 2000;
/// As much is behind, at most, where both are in step.
const IN_STEP_BYTES: i64 = 256 * 1024;
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// A table as the stream describes it.
struct Shape {
    quoted: String,
    columns: Vec<Column>,
    /// Where the shard key is, and of what type it is.
    key: usize,
    key_type: KeyType,
    /// Those of its keys that move.
    moving: KeySet,
    /// The whole row is the identity: equal rows may be there more than once.
    whole: bool,
    /// The other side has the same columns.
    fits: bool,
}

struct Column {
    quoted: String,
    identifies: bool,
}

enum Known {
    Moved(Shape),
    /// `weir.move_applied`.
    Applied,
    Other,
}

/// Reads one side and writes the other.
pub(super) struct Follower {
    server: Walsender,
    /// Asked for its position.
    out: Client,
    into: Client,
    script: Script,
    id: String,
    keys: KeySet,
    tables: Vec<MovedTable>,
    /// The same on the other side.
    there: Vec<MovedTable>,
    relations: HashMap<u32, Known>,
    /// Ends of transactions at or below this have been applied and committed.
    applied: u64,
    /// The other side says so of itself, and has committed it.
    noted: u64,
    /// The end of the last transaction that was read to its end.
    read: u64,
    /// All below has been sent to us.
    sent: u64,
    /// Of the transaction that is being read: it came from here, or was applied before.
    skips: bool,
    inside: bool,
    batch: String,
    batched: u32,
    /// A transaction is open on the other side, with so many changes.
    open: Option<u32>,
    mark: i64,
    changes: i64,
    confirmed: Instant,
    /// A frame that is not for now.
    kept: Option<Bytes>,
    /// Transactions that committed at or past this are not for now.
    stop: Option<u64>,
}

impl Follower {
    /// Goes on where the slot and the progress say.
    pub(super) async fn open(pair: &Pair, from: Side) -> Result<Follower> {
        let client = sql::plain(pair.at(from)).await?;
        sql::free_slot(&client, &pair.script.name()).await?;
        let server = pair.at(from).walsender().await?;
        Self::begin(pair, from, server).await
    }

    pub(super) async fn begin(pair: &Pair, from: Side, mut server: Walsender) -> Result<Follower> {
        let out = sql::plain(pair.at(from)).await?;
        let into = sql::as_replica(pair.at(from.other())).await?;
        let applied: i64 = into.query_one(&pair.script.ask_applied(), &[]).await?.try_get(0)?;
        let name = pair.script.name();
        if let Some(why) = sql::broken(&out, &name, applied).await? {
            bail!("the {} cannot be followed: {why}", from.name());
        }
        let start =
            format!("START_REPLICATION SLOT {name} LOGICAL 0/0 (proto_version '1', publication_names '\"{name}\"')");
        server.start(&start).await?;
        let there = sql::tables(&into, &pair.rules, &pair.keys).await?;
        Ok(Follower {
            server,
            out,
            into,
            script: pair.script.clone(),
            id: pair.id.to_string(),
            keys: pair.keys.clone(),
            tables: pair.tables.clone(),
            there,
            relations: HashMap::new(),
            applied: applied as u64,
            noted: applied as u64,
            read: applied as u64,
            sent: 0,
            skips: false,
            inside: false,
            batch: String::new(),
            batched: 0,
            open: None,
            mark: 0,
            changes: 0,
            confirmed: Instant::now(),
            kept: None,
            stop: None,
        })
    }

    /// Applies what comes for about so long. True: little is left.
    pub(super) async fn follow_for(&mut self, time: Duration) -> Result<bool> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.round(end).await?;
        }
        Ok(self.lag_bytes().await? <= IN_STEP_BYTES)
    }

    /// Applies nothing for a while, and lets the server know that somebody is there.
    pub(super) async fn rest(&mut self) -> Result<()> {
        if self.confirmed.elapsed() >= STATUS_EVERY {
            self.confirm().await?;
        }
        Ok(())
    }

    /// Until this mark has been read.
    pub(super) async fn follow_to_mark(&mut self, mark: i64) -> Result<()> {
        while self.mark < mark || self.inside {
            self.round(Instant::now() + STATUS_EVERY).await?;
        }
        self.commit().await
    }

    /// Applies all that committed below `position`, and nothing past it; the next call of another kind goes on.
    pub(super) async fn stop_at(&mut self, position: u64) -> Result<()> {
        self.stop = Some(position);
        // Something comes past it for sure.
        self.out.query(&self.script.mark(), &[]).await?;
        while self.kept.is_none() {
            self.round(Instant::now() + STATUS_EVERY).await?;
        }
        self.stop = None;
        self.commit().await
    }

    /// Bytes of the other side's WAL that have not been applied.
    pub(super) async fn lag_bytes(&mut self) -> Result<i64> {
        let position = sql::last(&self.out, "SELECT (pg_current_wal_lsn() - '0/0')::int8").await?;
        let position: i64 = position.parse().context("a position")?;
        Ok((position - self.read.max(self.sent) as i64).max(0))
    }

    pub(super) fn take_changes(&mut self) -> i64 {
        std::mem::take(&mut self.changes)
    }

    /// What is there, and what comes until `end` if nothing is; then all that was read to its end is committed.
    async fn round(&mut self, end: Instant) -> Result<()> {
        let mut wait = end;
        loop {
            let frame = match self.kept.take() {
                Some(kept) => Some(kept),
                None => match tokio::time::timeout_at(wait, self.server.receive()).await {
                    Ok(frame) => Some(frame?),
                    Err(_) => None,
                },
            };
            let Some(frame) = frame else { break };
            if self.is_past_stop(&frame)? {
                self.kept = Some(frame);
                break;
            }
            self.take(&frame).await?;
            if !self.inside && self.open.unwrap_or_default() + self.batched >= TOGETHER_MAX {
                break;
            }
            // What is there already is taken along.
            wait = Instant::now();
        }
        if !self.inside {
            self.commit().await?;
        }
        self.rest().await
    }

    fn is_past_stop(&self, frame: &Bytes) -> Result<bool> {
        let Some(stop) = self.stop else { return Ok(false) };
        let Copied::Data { message, .. } = read_copied(frame)? else { return Ok(false) };
        Ok(matches!(read_message(message, false)?, Message::Begin { final_lsn, .. } if final_lsn >= stop))
    }

    async fn take(&mut self, frame: &Bytes) -> Result<()> {
        match read_copied(frame)? {
            Copied::Keepalive { wal_end, reply_now, .. } => {
                if !self.inside {
                    self.sent = self.sent.max(wal_end);
                }
                if reply_now {
                    self.confirm().await?;
                }
            }
            Copied::Data { message, .. } => {
                self.on_message(&read_message(message, false)?)?;
                if self.batch.len() >= BATCH_BYTES {
                    self.send().await?;
                }
            }
        }
        Ok(())
    }

    fn on_message(&mut self, message: &Message<'_>) -> Result<()> {
        match message {
            Message::Begin { final_lsn, .. } => {
                self.inside = true;
                self.skips = *final_lsn < self.applied;
            }
            Message::Commit { end_lsn, .. } => {
                self.inside = false;
                self.read = self.read.max(*end_lsn);
            }
            Message::Relation { relation, .. } => {
                let known = self.known(relation)?;
                self.relations.insert(relation.id, known);
            }
            Message::Insert { relation, new, .. } => self.on_change(*relation, None, Some(new))?,
            Message::Update { relation, old, new, .. } => {
                self.on_change(*relation, Some(old.as_ref().map_or(new, Old::tuple)), Some(new))?;
            }
            Message::Delete { relation, old, .. } => self.on_change(*relation, Some(old.tuple()), None)?,
            _ => {}
        }
        Ok(())
    }

    fn known(&self, relation: &Relation<'_>) -> Result<Known> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).context("a name that is not UTF-8");
        let (schema, name) = (text(relation.schema)?, text(relation.name)?);
        if schema == "weir" && name == "move_applied" {
            return Ok(Known::Applied);
        }
        let of_name = |table: &&MovedTable| table.schema == schema && table.name == name;
        let Some(table) = self.tables.iter().find(of_name) else { return Ok(Known::Other) };
        let names: Vec<String> = relation.columns.iter().map(|column| text(column.name)).collect::<Result<_>>()?;
        let fits = |there: &MovedTable| names.iter().collect::<BTreeSet<_>>() == there.columns.iter().collect();
        let fits = self.there.iter().find(of_name).is_some_and(fits);
        let key = names
            .iter()
            .position(|name| *name == table.key)
            .with_context(|| format!("{schema}.{name} has lost its key"))?;
        let columns = names.iter().zip(&relation.columns);
        let columns = columns.map(|(name, column)| Column { quoted: quote_name(name), identifies: column.identifies });
        Ok(Known::Moved(Shape {
            quoted: format!("{}.{}", quote_name(&schema), quote_name(&name)),
            columns: columns.collect(),
            key,
            key_type: table.key_type,
            moving: table.moving(&self.keys).into_owned(),
            whole: relation.identity == b'f',
            fits,
        }))
    }

    /// `was`: what is known of the row before.
    fn on_change(&mut self, relation: u32, was: Option<&Tuple<'_>>, new: Option<&Tuple<'_>>) -> Result<()> {
        let shape = match self.relations.get(&relation) {
            Some(Known::Moved(shape)) => shape,
            Some(Known::Applied) => {
                if let Some(new) = new {
                    self.on_applied(new)?;
                }
                return Ok(());
            }
            Some(Known::Other) | None => return Ok(()),
        };
        if self.skips {
            return Ok(());
        }
        let moves = |row: &Tuple<'_>| -> Result<bool> { Ok(shape.moving.contains(hash_of(shape, row)?)) };
        let (from, to) = (was.map(&moves).transpose()?.unwrap_or(false), new.map(&moves).transpose()?.unwrap_or(false));
        if (from || to) && !shape.fits {
            bail!(
                "{} has other columns on the other server: it was changed beside weir while its rows were on their way; make both alike, \
                 or give the move up",
                shape.quoted
            );
        }
        let mut sql = String::new();
        match (from, to, was, new) {
            (true, true, Some(was), Some(new)) => put_update(&mut sql, shape, was, new)?,
            (true, false, Some(was), _) => put_delete(&mut sql, shape, was)?,
            (false, true, _, Some(new)) => put_insert(&mut sql, shape, new)?,
            _ => return Ok(()),
        }
        self.batch.push_str(&sql);
        self.batched += 1;
        self.changes += 1;
        Ok(())
    }

    /// A transaction of the mover's own, or a mark.
    fn on_applied(&mut self, new: &Tuple<'_>) -> Result<()> {
        let text = |index| match new.get(index) {
            Some(Value::Text(text)) => std::str::from_utf8(text).context("a number"),
            _ => Err(anyhow!("weir.move_applied has other columns")),
        };
        if text(0)? == self.id {
            self.skips = true;
            self.mark = self.mark.max(text(2)?.parse().context("a mark")?);
        }
        Ok(())
    }

    /// Sends what has gathered into the open transaction, or a new one.
    async fn send(&mut self) -> Result<()> {
        if self.batched == 0 {
            return Ok(());
        }
        if self.open.is_none() {
            self.into.batch_execute(&format!("BEGIN; {}", self.script.begin_apply())).await?;
        }
        let batch = std::mem::take(&mut self.batch);
        let answers = self.into.simple_query(&batch).await.context("a change cannot be applied")?;
        let counts = answers.iter().filter_map(|answer| match answer {
            SimpleQueryMessage::CommandComplete(rows) => Some(*rows),
            _ => None,
        });
        let wrong = counts.enumerate().find(|(_, rows)| *rows != 1);
        if let Some((number, rows)) = wrong {
            let statement = batch.split(";\n").nth(number).unwrap_or_default();
            let shown: String = statement.chars().take(200).collect();
            bail!("a change has met {rows} rows instead of one: {shown}");
        }
        self.open = Some(self.open.unwrap_or_default() + std::mem::take(&mut self.batched));
        Ok(())
    }

    /// What has been read to its end is there for good.
    async fn commit(&mut self) -> Result<()> {
        self.send().await?;
        if self.open.take().is_some() {
            let end = format!("{}; COMMIT", self.script.end_apply(self.read));
            self.into.batch_execute(&end).await.context("the changes cannot be committed")?;
            self.noted = self.noted.max(self.read);
        }
        self.applied = self.applied.max(self.read);
        Ok(())
    }

    /// The server needs not keep what is applied. It is never told of more than the other side says of itself: by that a server is
    /// known that was promoted and lacks something.
    async fn confirm(&mut self) -> Result<()> {
        self.confirmed = Instant::now();
        if self.open.is_none() {
            let is_idle = !self.inside && self.batched == 0 && self.kept.is_none();
            self.applied = if is_idle { self.applied.max(self.sent) } else { self.applied };
            if self.applied > self.noted {
                self.into.batch_execute(&self.script.end_apply(self.applied)).await.context("the progress")?;
                self.noted = self.applied;
            }
        }
        let confirm = self.server.confirm(self.noted);
        timeout(Duration::from_secs(10), confirm).await.context("the source does not listen")?
    }
}

fn hash_of(shape: &Shape, row: &Tuple<'_>) -> Result<u64> {
    let Some(Value::Text(text)) = row.get(shape.key) else { bail!("a row of {} without its key", shape.quoted) };
    let key = Key::parse(text.into(), shape.key_type)
        .with_context(|| format!("a key of {} that cannot be read", shape.quoted))?;
    Ok(key.hash())
}

fn put_value(sql: &mut String, value: Value<'_>) -> Result<()> {
    match value {
        Value::Null => sql.push_str("NULL"),
        Value::Text(text) => {
            sql.push_str(&quote_literal(std::str::from_utf8(text).context("a value that is not UTF-8")?));
        }
        Value::Unchanged => bail!("a row comes to the slots with a value that is not in the WAL"),
        Value::Binary(_) => bail!("a value in binary form"),
    }
    Ok(())
}

fn put_insert(sql: &mut String, shape: &Shape, new: &Tuple<'_>) -> Result<()> {
    let columns: Vec<&str> = shape.columns.iter().map(|column| column.quoted.as_str()).collect();
    let _ = write!(sql, "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES (", shape.quoted, columns.join(", "));
    for (number, value) in new.values().enumerate() {
        sql.push_str(if number > 0 { ", " } else { "" });
        put_value(sql, value)?;
    }
    sql.push_str(");\n");
    Ok(())
}

fn put_update(sql: &mut String, shape: &Shape, was: &Tuple<'_>, new: &Tuple<'_>) -> Result<()> {
    let _ = write!(sql, "UPDATE ONLY {} SET ", shape.quoted);
    let changed = shape.columns.iter().zip(new.values()).filter(|(_, value)| *value != Value::Unchanged);
    for (number, (column, value)) in changed.enumerate() {
        let _ = write!(sql, "{}{} = ", if number > 0 { ", " } else { "" }, column.quoted);
        put_value(sql, value)?;
    }
    put_where(sql, shape, was)
}

fn put_delete(sql: &mut String, shape: &Shape, was: &Tuple<'_>) -> Result<()> {
    let _ = write!(sql, "DELETE FROM ONLY {}", shape.quoted);
    put_where(sql, shape, was)
}

/// The one row that `was` identifies.
fn put_where(sql: &mut String, shape: &Shape, was: &Tuple<'_>) -> Result<()> {
    let identity = shape.columns.iter().zip(was.values()).filter(|(column, _)| shape.whole || column.identifies);
    if shape.whole {
        let _ = write!(sql, " WHERE ctid = (SELECT ctid FROM ONLY {}", shape.quoted);
    }
    for (number, (column, value)) in identity.enumerate() {
        sql.push_str(if number > 0 { " AND " } else { " WHERE " });
        match (shape.whole, value) {
            (true, value) => {
                // As text: not every type has an equality.
                let _ = write!(sql, "{}::text IS NOT DISTINCT FROM ", column.quoted);
                put_value(sql, value)?;
            }
            (false, value) => {
                let _ = write!(sql, "{} = ", column.quoted);
                put_value(sql, value)?;
            }
        }
    }
    sql.push_str(if shape.whole { " LIMIT 1);\n" } else { ";\n" });
    Ok(())
}
