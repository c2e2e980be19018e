//! Reads that somebody other than the primary may answer: the cache, or a replica that is proven fresh.
//!
//! Invariant: nothing is released to the client that a write acknowledged before the read began could have changed. A cached
//! entry is served only while its words stand still; a replica's answer is held back until its own replay position covers
//! the words and the words have not moved meanwhile; otherwise the primary is asked. Protocol: weir-core `fresh::words`.

use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use weir_core::cache::key::{CacheKey, KeyParts, Param};
use weir_core::error::sqlstate;
use weir_core::fresh::bound::replica_answer_ok;
use weir_core::fresh::words::{Observation, WordSet};
use weir_core::id::{Lsn, ShardId};
use weir_core::plan::Plan;
use weir_core::session::replies::{Owed, Replies};
use weir_wire::backend::{BIND_COMPLETE, PARSE_COMPLETE, Status, tag};
use weir_wire::frame;
use weir_wire::frontend::{Bind, is_binary};
use weir_wire::row;

use super::fan::{Question, put_question};
use super::relay::{Capture, Flow, Trail, relay};
use crate::cache::{Lookup, Moment};
use crate::database::Shard;
use crate::front::cancel::cancelled;
use crate::front::session::{Failure, Session};
use crate::metrics::CacheResult;
use crate::statements::Shape;

/// Replica answers larger than this go to the primary, since they cannot be held back until they are proven.
const REPLICA_REPLY_BYTES_MAX: usize = 64 * 1024;
const REPLAY_POSITION: &str = "SELECT pg_catalog.pg_last_wal_replay_lsn()";

/// What the client asked for around a lone read; says which frames its reply has.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    pub parse: bool,
    /// Which step binds.
    pub bind: Option<usize>,
    pub describe: bool,
    pub executed: bool,
    simple: bool,
}

impl Asked {
    pub fn simple() -> Self {
        Asked { simple: true, ..Asked::default() }
    }

    /// Writes the reply from a result's frames: RowDescription, rows, CommandComplete; or an error.
    fn put(&self, frames: &[u8], out: &mut BytesMut) {
        if self.parse {
            out.extend_from_slice(PARSE_COMPLETE);
        }
        if self.bind.is_some() {
            out.extend_from_slice(BIND_COMPLETE);
        }
        let described = match frame::peek(frames, usize::MAX >> 1) {
            Ok(Some(first)) if first.tag == tag::ROW_DESCRIPTION && !self.simple && !self.describe => first.raw.len(),
            _ => 0,
        };
        out.extend_from_slice(&frames[described..]);
    }
}

impl Session {
    /// Answers a read from the cache or a replica, or from the primary on behalf of the cache. False: nothing was done and the
    /// caller should relay it from the primary.
    pub async fn read_elsewhere(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        plan: &Plan,
        shape: &Shape,
        asked: &Asked,
    ) -> Result<bool, Failure> {
        if self.db.is_suspect() {
            Box::pin(self.db.verify()).await?;
        }
        // Without the clock a restart or promotion of the primary would go unnoticed.
        if !self.db.shard(shard).clock.connected() {
            return Ok(false);
        }
        let Some(set) = WordSet::for_read(&plan.reads) else { return Ok(false) };
        let words = std::sync::Arc::clone(&self.db.shard(shard).words);
        let seen = words.observe(&set);
        if !self.db.shard(shard).member.may_serve() {
            return Ok(false);
        }
        let key = match (&self.db.cache, &plan.cacheable) {
            (Some(_), Ok(())) => self.cache_key(shard, question),
            _ => None,
        };
        let epoch = self.view().topology.epoch;
        let moment = Moment { words: &words, seen: &seen, shard, epoch };
        if let (Some(cache), Some(key)) = (&self.db.cache, &key) {
            if let Lookup::Hit(reply) = cache.get(key, &moment).await {
                asked.put(reply.frames(), &mut self.client.out);
                self.stats.cache(CacheResult::HitLocal);
                return Ok(true);
            }
            self.stats.cache(CacheResult::Miss);
        }
        if !seen.pending()
            && !shape.is_large()
            && let Some(frames) = self.ask_replica(shard, question, &seen, (shape, asked)).await?
        {
            self.fill(key.as_ref(), &moment, &frames);
            asked.put(&frames, &mut self.client.out);
            return Ok(true);
        }
        let Some(key) = key else { return Ok(false) };
        self.ask_primary(shard, question, asked, &key, &moment).await?;
        Ok(true)
    }

    /// Stores a complete, quiet result if its words have stood still since they were looked at.
    fn fill(&self, key: Option<&CacheKey>, moment: &Moment<'_>, frames: &Bytes) {
        if let (Some(cache), Some(key)) = (&self.db.cache, key)
            && self.db.shard(moment.shard).member.may_serve()
        {
            // A refusal is counted there; the reply is right all the same.
            let _ = cache.put(key, moment, frames.clone());
        }
    }

    fn cache_key(&self, shard: ShardId, question: Question<'_>) -> Option<CacheKey> {
        let settings: Vec<(&str, &str)> = self.vars.current().iter().collect();
        let database = self.db.identity();
        let parts = |statement, params: &[Param<'_>], formats: &[i16]| {
            CacheKey::new(&KeyParts {
                shard,
                database: &database,
                role: &self.user,
                statement,
                params,
                result_formats: formats,
                settings: &settings,
            })
        };
        match question {
            Question::Text(sql) => Some(parts(sql, &[], &[])),
            Question::Portal { prepared, bind, .. } => {
                let bind = Bind::read(bind).ok()?;
                let params: Vec<Param<'_>> = bind
                    .values()
                    .enumerate()
                    .map(|(index, (binary, value))| {
                        let oid = prepared.types.get(index * 4..index * 4 + 4).and_then(|oid| oid.try_into().ok());
                        Param { type_oid: oid.map_or(0, u32::from_be_bytes), binary, value }
                    })
                    .collect();
                let columns = bind.result_formats.len() / 2;
                let formats: Vec<i16> =
                    (0..columns).map(|column| i16::from(is_binary(bind.result_formats, column))).collect();
                Some(parts(std::str::from_utf8(&prepared.sql).ok()?, &params, &formats))
            }
            // Such texts only write, or are read in parts.
            Question::Once { .. } | Question::Opened { .. } | Question::Described(_) => None,
        }
    }

    /// Asks a replica with its replay position in front. `None`: no replica could prove that it is fresh.
    async fn ask_replica(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        seen: &Observation,
        (shape, asked): (&Shape, &Asked),
    ) -> Result<Option<Bytes>, Failure> {
        let Some(number) = self.db.choose_replica(shard, seen.lsn()) else { return Ok(None) };
        let Some(pool) = self.pools.replica(shard, number) else { return Ok(None) };
        // A replica that cannot be reached is no error: the primary answers.
        let mut lease = match Box::pin(self.cancel.slot.unless_cancelled(pool.lease())).await {
            Ok(lease) => lease,
            Err(error) if error.sqlstate == sqlstate::QUERY_CANCELED => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        let mut replies = Replies::default();
        self.prime_lease(&mut lease, &mut replies);
        lease.put_query(REPLAY_POSITION);
        replies.push(Owed::Query { hidden: false });
        put_question(&mut lease, question, &mut replies)?;
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max: REPLICA_REPLY_BYTES_MAX };
        let mut trail = Trail::default();
        self.cancel.slot.begin(&lease.cancel_key);
        let flow = relay(&mut self.client, &mut lease, &mut replies, &mut capture, &mut trail).await;
        if !self.cancel.slot.end() && !Box::pin(self.cancel.slot.settle()).await {
            lease.doubt("a cancel request was still on its way");
        }
        let Capture::Hold { reply, .. } = capture else { return Ok(None) };
        match flow {
            Ok(Flow::Ready(Status::Idle)) => {}
            Ok(Flow::Overflow) => {
                lease.doubt("a reply too large to hold back");
                shape.mark_large();
                return Ok(None);
            }
            Ok(_) | Err(_) => {
                lease.doubt("a replica failed");
                return Ok(None);
            }
        }
        drop(lease);
        if trail.sqlstate.as_ref().is_some_and(|code| code == sqlstate::QUERY_CANCELED.as_bytes()) {
            // It was cancelled or took too long; the primary must not run it again. If only the question for the position was
            // hit, that was meant for the statement too.
            let Some((_, frames)) = split_position(&reply.freeze()) else { return Err(cancelled().into()) };
            asked.put(&frames, &mut self.client.out);
            return Err(Failure::Reported);
        }
        if trail.failed || trail.chatter {
            // The primary says it, if it is to be said.
            return Ok(None);
        }
        let Some((replay, frames)) = split_position(&reply.freeze()) else { return Ok(None) };
        self.db.shard(shard).replicas[number].note_replay(replay);
        let Shard { words, member, .. } = self.db.shard(shard);
        if !replica_answer_ok(seen.lsn(), replay) || !words.unmoved(seen) || !member.may_serve() {
            self.db.stats.replica_rejected.fetch_add(1, Relaxed);
            return Ok(None);
        }
        self.stats.read_replica(shard, number);
        Ok(Some(frames))
    }

    /// Runs it on the primary, holding the reply back as long as it may be worth keeping.
    async fn ask_primary(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        asked: &Asked,
        key: &CacheKey,
        moment: &Moment<'_>,
    ) -> Result<(), Failure> {
        let index = self.hold(shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        put_question(&mut self.held[index].lease, question, &mut replies)?;
        let bytes_max = self.app.config().cache.entry_bytes_max;
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max };
        let mut trail = Trail::default();
        let mut flow = self.relay_on(index, &mut replies, &mut capture, &mut trail).await?;
        let Capture::Hold { reply, .. } = capture else { return Ok(()) };
        let frames = reply.freeze();
        asked.put(&frames, &mut self.client.out);
        if flow == Flow::Overflow {
            flow = self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
        } else if !trail.failed && !trail.chatter {
            self.fill(Some(key), moment, &frames);
        }
        if let Flow::Ready(status) = flow {
            self.follow(index, status);
        }
        self.release();
        self.db.stats.server_error(&trail);
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }
}

/// Splits the reply to [`REPLAY_POSITION`] off the front of `frames`.
fn split_position(frames: &Bytes) -> Option<(Lsn, Bytes)> {
    let mut at = 0;
    let mut replay = None;
    loop {
        let next = frame::peek(&frames[at..], usize::MAX >> 1).ok()??;
        at += next.raw.len();
        match next.tag {
            tag::DATA_ROW => {
                let values = row::values(next.body).ok()?;
                replay = values
                    .first()
                    .copied()
                    .flatten()
                    .and_then(|text| std::str::from_utf8(text).ok())
                    .and_then(Lsn::parse);
            }
            tag::COMMAND_COMPLETE => return Some((replay?, frames.slice(at..))),
            _ => {}
        }
    }
}
