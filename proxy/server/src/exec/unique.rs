//! Settling what the shards have noted of columns that are unique over all shards ([`weir_core::unique`]).
//!
//! Invariant: a statement whose notes are not settled is not acknowledged, or not committed; the lookup rows are written in the
//! transaction of the rows. Whoever settles is in a transaction, so that an error takes both back. Waits for values that others
//! are taking are bounded by the servers ([`script::WAIT_S`]); what is noted is held in memory within the merge's limit.

use bytes::{BufMut, Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::Dependencies;
use weir_core::id::{ShardId, Slot};
use weir_core::plan::{Noting, Plan};
use weir_core::unique::{ClearedApart, Note, deal, owned_bits, script};
use weir_wire::backend::{Status, report_field, tag, without_report_field};
use weir_wire::row;

use super::failures::unexpected;
use super::fan::{Question, Source};
use crate::front::session::{Failure, Session};

/// What a noted value costs besides its bytes.
const NOTE_OVERHEAD_BYTES: usize = 64;
/// text and bigint (src/include/catalog/pg_type.dat), and int4.
const TEXT: u32 = 25;
const INT8: u32 = 20;
const INT4: u32 = 23;
/// What Postgres says when a lock is not to be had in time (ERRCODE_LOCK_NOT_AVAILABLE).
const LOCK_NOT_AVAILABLE: &[u8] = b"55P03";

impl Session {
    /// A place among those who write such columns in a transaction of their own. There are as many as a shard has Backends, so
    /// that they never wait for each other's Backends in a circle: nobody holds one while he waits for his turn.
    pub async fn unique_turn(&mut self, plan: &Plan) -> Result<Option<tokio::sync::OwnedSemaphorePermit>, UserError> {
        if !plan.settles() || self.txn.is_some() {
            return Ok(None);
        }
        // What an earlier step of the same request has looked at can be had again.
        self.held.retain(|held| held.pinned.is_some() || held.lease.busy || held.lease.status != Status::Idle);
        if !self.held.is_empty() {
            return Ok(None);
        }
        let pools = std::sync::Arc::clone(&self.pools);
        let turns = std::sync::Arc::clone(&pools.unique_turns);
        let wait_max = self.app.config().pool_of(&self.db.name, &self.user).wait_max;
        let turn = async move {
            match tokio::time::timeout(wait_max, turns.acquire_owned()).await {
                Ok(Ok(turn)) => Ok(turn),
                _ => Err(no_turn(wait_max)),
            }
        };
        Box::pin(self.cancel.slot.unless_cancelled(turn)).await.map(Some)
    }

    /// Brings the lookup tables in step with what the held Backends have noted since they were last asked.
    pub async fn settle_unique(&mut self) -> Result<(), Failure> {
        let mut skips = false;
        let mut writers: Vec<ShardId> = Vec::new();
        for held in self.held.iter_mut().filter(|held| held.noting != Noting::None) {
            skips |= matches!(held.noting, Noting::Settled { skips: true });
            held.noting = Noting::None;
            writers.push(held.shard);
        }
        writers.sort_unstable();
        let Some(unique) = self.db.unique.clone().filter(|_| !writers.is_empty()) else { return Ok(()) };
        // Values lie by the map in force, whatever map the rows were planned by: nothing of theirs is in a snapshot.
        self.stats.works_by_none();
        let view = self.view_in_force();
        let slots = &view.topology.slots;
        // With one writer its own values need no second question. With several, a value may have moved between them: it is
        // given up before it is taken.
        let own = if let [only] = writers[..] { owned_bits(slots, only) } else { [0; Slot::COUNT / 8] };
        let mut rows = Vec::new();
        for &shard in &writers {
            let bind = bind(&[unique.secret(shard).as_bytes(), &own]);
            let answer = self.ask_unique(shard, script::SETTLE, &bind, skips).await?;
            rows.extend(answer);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let notes: Option<Vec<Note<'_>>> = rows.iter().map(note).collect();
        let notes = notes.ok_or_else(|| unexpected("a malformed note"))?;
        let parts = deal(notes, slots, view.topology.active()).map_err(|ClearedApart| cleared_apart())?;
        for (shard, part) in parts {
            let text = |value: fn(&Note<'_>) -> Option<Vec<u8>>| array(TEXT, part.iter().map(value));
            let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<i64>().ok();
            let rules = array(INT8, part.iter().map(|note| number(note.rule).map(|rule| rule.to_be_bytes().to_vec())));
            let deltas =
                array(INT4, part.iter().map(|note| number(note.delta).map(|by| (by as i32).to_be_bytes().to_vec())));
            let (values, keys) =
                (text(|note| note.value.map(<[u8]>::to_vec)), text(|note| note.key.map(<[u8]>::to_vec)));
            let bind = bind(&[unique.secret(shard).as_bytes(), &rules, &values, &keys, &deltas]);
            self.ask_unique(shard, script::APPLY, &bind, skips).await?;
        }
        Ok(())
    }

    /// Asks a shard one of weir's own questions within the open transaction; gives the rows.
    async fn ask_unique(
        &mut self,
        shard: ShardId,
        sql: &str,
        bind: &Bytes,
        skips: bool,
    ) -> Result<Vec<Bytes>, Failure> {
        let question = Question::Once { sql, types: b"", bind, hidden: 0 };
        let mut sources = self.ask(&[shard], question).await?;
        self.note_write_of(sources[0].index, &Dependencies::new(), false).await?;
        let gathered = self.gather_notes(&mut sources[0]).await;
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        let rows = gathered?;
        match sources[0].failed.take() {
            None => Ok(rows),
            Some(body) => Err(self.unique_failure(&body, skips)),
        }
    }

    async fn gather_notes(&mut self, source: &mut Source) -> Result<Vec<Bytes>, Failure> {
        let bytes_max = self.app.config().limits.merge_bytes_max;
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while !source.done {
            let (kind, body) = self.next_frame(source).await?;
            if kind == tag::DATA_ROW {
                bytes += body.len() + NOTE_OVERHEAD_BYTES;
                if bytes > bytes_max {
                    return Err(too_many(bytes_max).into());
                }
                rows.push(body);
            }
        }
        Ok(rows)
    }

    /// What the client is told: a duplicate as Postgres tells it.
    fn unique_failure(&mut self, body: &[u8], skips: bool) -> Failure {
        match report_field(body, b'C') {
            Some(code) if code == sqlstate::UNIQUE_VIOLATION.as_bytes() && skips => {
                let detail = report_field(body, b'D').map(String::from_utf8_lossy).unwrap_or_default();
                elsewhere(&detail).into()
            }
            Some(code) if code == sqlstate::UNIQUE_VIOLATION.as_bytes() => {
                let body = without_report_field(body, b'W');
                self.report(&body)
            }
            Some(LOCK_NOT_AVAILABLE) => waited().into(),
            _ => self.report(body),
        }
    }
}

/// A Bind of the unnamed statement with values in binary form; results come as text.
fn bind(values: &[&[u8]]) -> Bytes {
    let mut body = BytesMut::from(&b"\0\0"[..]);
    body.put_u16(1);
    body.put_u16(1);
    body.put_u16(values.len() as u16);
    for value in values {
        body.put_u32(value.len() as u32);
        body.extend_from_slice(value);
    }
    body.put_u16(0);
    body.freeze()
}

/// A one-dimensional array as array_recv reads it (src/backend/utils/adt/arrayfuncs.c).
fn array(element: u32, values: impl ExactSizeIterator<Item = Option<Vec<u8>>>) -> BytesMut {
    let mut body = BytesMut::new();
    body.put_u32(1);
    body.put_u32(1);
    body.put_u32(element);
    body.put_u32(values.len() as u32);
    body.put_u32(1);
    for value in values {
        match value {
            None => body.put_i32(-1),
            Some(value) => {
                body.put_u32(value.len() as u32);
                body.extend_from_slice(&value);
            }
        }
    }
    body
}

/// A row of [`script::SETTLE`].
fn note(row: &Bytes) -> Option<Note<'_>> {
    let columns = row::values(row).ok()?;
    let [slot, rule, value, key, delta] = columns[..] else { return None };
    let slot = match slot {
        None => None,
        Some(number) => Some(Slot::new(std::str::from_utf8(number).ok()?.parse().ok()?)?),
    };
    Some(Note { slot, rule: rule?, value, key, delta: delta? })
}

fn elsewhere(detail: &str) -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "ON CONFLICT cannot see the row on another shard")
        .detail(format!("{detail} The server that has the new row does not have the other."))
        .hint("Name the columns of the shard key in ON CONFLICT, or insert without it and handle SQLSTATE 23505.")
}

fn waited() -> UserError {
    UserError::new(Blame::Client, sqlstate::DEADLOCK_DETECTED, "another transaction holds a globally unique value")
        .detail(format!(
            "It has not ended within {}s; the two may be waiting for each other on different shards.",
            script::WAIT_S
        ))
        .hint("Run the transaction again.")
}

fn cleared_apart() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "a table with globally unique columns is emptied on all shards or none",
    )
    .detail("Some shards have truncated it and others have not.")
    .hint("TRUNCATE it through weir with a statement of its own, or use DELETE.")
}

fn too_many(bytes_max: usize) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "the statement changes too many globally unique values")
        .detail(format!("Those of other shards take more than {bytes_max} bytes (merge_bytes_max)."))
        .hint("Write fewer rows at a time.")
}

fn no_turn(wait_max: std::time::Duration) -> UserError {
    UserError::new(Blame::Proxy, sqlstate::TOO_MANY_CONNECTIONS, "too many writers of globally unique columns")
        .detail(format!("None of them has ended within {wait_max:?}."))
        .hint("Raise the pool's size, or write less at the same time.")
}
