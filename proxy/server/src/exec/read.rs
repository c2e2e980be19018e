//! Reads that somebody other than the primary may answer: the cache, or a replica that is proven fresh.
//!
//! Invariant: nothing is released to the client that a write acknowledged before the read began could have changed. A cached
//! entry is served only while its words stand still; a replica ([`super::replica`]) has to prove itself; otherwise the primary
//! is asked; or an answer that is overtaken is served, where its tables allow that ([`super::stale`]). Where a looser level is asked for (`crate::level`), less is asked of replicas; the cache keeps to the strict level
//! for all. Protocol: weir-core `fresh::words`.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use weir_core::cache::key::{CacheKey, KeyParts, Param};
use weir_core::cache::{MissReason, NoFillReason};
use weir_core::fresh::words::{Observation, WordSet};
use weir_core::fresh::{Level, PrimaryBecause};
use weir_core::hot::Use;
use weir_core::id::ShardId;
use weir_core::plan::{Access, Plan};
use weir_core::session::replies::Replies;
use weir_wire::backend::{BIND_COMPLETE, PARSE_COMPLETE, tag};
use weir_wire::frame;
use weir_wire::frontend::{Bind, is_binary};

use super::fan::{Question, put_question};
use super::relay::{Capture, Flow, Trail};
use super::replica::Elsewhere;
use crate::cache::{Lookup, Moment};
use crate::flights::{Leader, Part};
use crate::front::batch::Ending;
use crate::front::extended::{Step, Survey};
use crate::front::session::{Failure, Session};
use crate::hot::Given;
use crate::level::Hint;
use crate::metrics::CacheResult;
use crate::statements::Shape;
use crate::unsound::{self, Place, Variant};

/// What the client asked for around a lone read; says which frames its reply has.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// How fresh the answer must be.
    pub level: Level,
    /// What its hint says, about the cache too.
    pub hint: Hint,
    pub parse: bool,
    /// Which step binds.
    pub bind: Option<usize>,
    pub describe: bool,
    pub executed: bool,
    simple: bool,
}

impl Asked {
    pub fn simple(level: Level, hint: Hint) -> Self {
        Asked { level, hint, simple: true, ..Asked::default() }
    }

    /// Writes the reply from a result's frames: RowDescription, rows, CommandComplete; or an error.
    pub fn put(&self, frames: &[u8], out: &mut BytesMut) {
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

    /// The same of a reply that ends in an error: what the server had not come to is not reported as done.
    fn put_failed(&self, frames: &[u8], trail: &Trail, out: &mut BytesMut) {
        // Weir's own Parse, which is the client's.
        let parsed = !trail.undone.contains(&u32::MAX);
        let came = Asked { parse: self.parse && parsed, bind: self.bind.filter(|_| trail.bound), ..self.clone() };
        came.put(frames, out);
    }
}

/// What comes after a look into memory that found nothing.
enum AfterMiss {
    Answered,
    /// Run it, perhaps with others waiting for it.
    Run(Option<Leader>),
}

impl Session {
    /// Is this batch one read on its own, of the kind that the cache or a replica may answer?
    pub fn lone_read(&self, survey: &Survey, ending: Ending) -> Option<Asked> {
        if ending != Ending::Sync || self.txn.is_some() || !self.held.is_empty() || !self.db.answers_elsewhere() {
            return None;
        }
        let mut asked = Asked::default();
        for (place, step) in survey.steps.iter().enumerate() {
            match step {
                Step::Parse { .. } if place == 0 => asked.parse = true,
                Step::Bind { bound, .. } if asked.bind.is_none() && matches!(bound.plan.access, Access::Read) => {
                    asked.bind = Some(place);
                    asked.hint = bound.prepared.hint;
                }
                Step::DescribePortal { .. } if asked.bind.is_some() && !asked.executed => asked.describe = true,
                Step::Execute { rows_max: 0, .. } if asked.bind.is_some() && !asked.executed => asked.executed = true,
                _ => return None,
            }
        }
        asked.level = self.level(asked.hint).0;
        asked.executed.then_some(asked)
    }

    pub async fn read_batch(&mut self, shard: ShardId, survey: &Survey, asked: &Asked) -> Result<bool, Failure> {
        let Some(Step::Bind { bound, .. }) = asked.bind.and_then(|place| survey.steps.get(place)) else {
            return Ok(false);
        };
        let question = Question::Portal { prepared: &bound.prepared, bind: &bound.bind, merged: false };
        self.read_elsewhere(shard, question, &bound.plan, &bound.prepared.shape, asked).await
    }

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
        let Some(used) = self.elsewhere(shard, question, (plan, shape), asked).await? else { return Ok(false) };
        let given = match question {
            Question::Portal { bind, .. } => Given::Bind(bind),
            Question::Text(sql) => Given::Literals(sql, &self.scratch.normal.literals),
            Question::Once { .. } | Question::Opened { .. } | Question::Described(_) | Question::Guarded(_) => {
                Given::Unknown
            }
        };
        self.stats.used(plan, used, given);
        Ok(true)
    }

    /// `None`: the caller should relay it from the primary.
    async fn elsewhere(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        (plan, shape): (&Plan, &Shape),
        asked: &Asked,
    ) -> Result<Option<Use>, Failure> {
        if self.db.is_suspect() {
            Box::pin(self.db.verify()).await?;
        }
        let Some(set) = WordSet::for_read(&plan.reads) else {
            self.stats.read_primary(shard, PrimaryBecause::Unwatched);
            return Ok(None);
        };
        let words = Arc::clone(&self.db.shard(shard).words);
        let lenient = self.lenient(&words, plan, asked);
        let seen = words.observe(&set);
        let watched = self.db.shard(shard).watches_words();
        if let (Level::Strict, Err(because)) = (asked.level, watched) {
            self.stats.read_primary(shard, because);
            return Ok(None);
        }
        let mut key = match (&self.db.cache, asked.hint.cacheable(plan.cacheable)) {
            (Some(_), Ok(())) if watched.is_ok() => self.cache_key(shard, question),
            (Some(_), Err(reason)) => {
                self.stats.uncacheable(reason);
                None
            }
            _ => None,
        };
        let epoch = self.view().topology.epoch;
        let moment = Moment { words: &words, seen: &seen, shard, epoch, lenient: lenient.as_deref() };
        let mut flight = None;
        if let Some(found) = key.take() {
            self.stats.wanted(&found);
            let Err(missed) = self.hit(&found, &moment, asked) else { return Ok(Some(Use::Hit)) };
            if self.serve_overtaken((&found, &moment, &words), missed, question, asked)? {
                return Ok(Some(Use::Hit));
            }
            if lenient.is_some() || !self.is_not_worth_keeping(missed, &seen) {
                // Boxed: a hit must not carry the room for it.
                match Box::pin(self.after_miss((&found, &moment), missed, asked)).await? {
                    AfterMiss::Answered => return Ok(Some(Use::Hit)),
                    AfterMiss::Run(leader) => (key, flight) = (Some(found), leader),
                }
            }
        }
        unsound::linger(Place::Observed).await;
        // Boxed, as what follows: hits are many, and the room would be part of every session's task.
        match Box::pin(self.ask_replica(shard, question, &seen, (shape, asked))).await? {
            Elsewhere::Answered { frames, proven } => {
                // While something is pending, a replica may lack what was acknowledged before it was asked.
                let moment = Moment { lenient: moment.lenient.filter(|_| !seen.pending()), ..moment };
                self.fill(key.as_ref().filter(|_| proven), &moment, &frames);
                asked.put(&frames, &mut self.client.out);
                if let Some(leader) = flight.filter(|_| proven) {
                    leader.land(&frames);
                }
                return Ok(Some(Use::Read));
            }
            Elsewhere::Passed => return Ok(Some(Use::Read)),
            Elsewhere::Primary(because) => self.stats.read_primary(shard, because),
        }
        let Some(key) = key else { return Ok(None) };
        Box::pin(self.ask_primary(question, asked, (&key, &moment), flight)).await?;
        Ok(Some(Use::Read))
    }

    /// Answers from memory, without waiting.
    fn hit(&mut self, key: &CacheKey, moment: &Moment<'_>, asked: &Asked) -> Result<(), MissReason> {
        match self.db.cache.as_ref().map(|cache| cache.get_local(key, moment)) {
            Some(Lookup::Hit(reply)) => {
                asked.put(reply.frames(), &mut self.client.out);
                self.stats.cache(CacheResult::HitLocal);
                Ok(())
            }
            Some(Lookup::Miss(reason)) => Err(reason),
            None => Err(MissReason::Absent),
        }
    }

    /// After a miss: is the reply to be passed on like any other, since it cannot be kept, or not for long?
    fn is_not_worth_keeping(&self, missed: MissReason, seen: &Observation) -> bool {
        let reason = match missed {
            MissReason::Pending => NoFillReason::Pending,
            MissReason::Moved | MissReason::Absent
                if self.db.cache.as_ref().is_some_and(|cache| cache.is_write_hot(seen)) =>
            {
                NoFillReason::WriteHot
            }
            _ => return false,
        };
        self.stats.cache(CacheResult::Miss(missed));
        self.stats.fill(Err(reason));
        true
    }

    /// Memory has not answered: Redis, or another session that asks the same right now.
    async fn after_miss(
        &mut self,
        (key, moment): (&CacheKey, &Moment<'_>),
        missed: MissReason,
        asked: &Asked,
    ) -> Result<AfterMiss, Failure> {
        let db = Arc::clone(&self.db);
        let Some(cache) = &db.cache else { return Ok(AfterMiss::Run(None)) };
        let mut leader = match db.airspace.join(key, moment.seen) {
            Part::Lead(leader) => Some(leader),
            Part::Alone => None,
            Part::Follow(follower) => {
                let waiting = async { Ok(follower.reply().await) };
                match self.cancel.slot.unless_cancelled(waiting).await? {
                    Some(frames) => {
                        asked.put(&frames, &mut self.client.out);
                        self.stats.cache(CacheResult::Coalesced);
                        return Ok(AfterMiss::Answered);
                    }
                    None => None,
                }
            }
        };
        // Memory once more: another leader may have landed between that look and this flight's start.
        let again = cache.peek(key, moment).filter(|_| leader.is_some());
        let found = match again {
            Some(reply) => Ok((reply, CacheResult::HitLocal)),
            None => match self.look_shared(cache, (key, moment), missed, leader.as_mut()).await? {
                Lookup::Hit(reply) => Ok((reply, CacheResult::HitShared)),
                Lookup::Miss(reason) => Err(reason),
            },
        };
        let (reply, result) = match found {
            Ok(found) => found,
            Err(reason) => {
                self.stats.cache(CacheResult::Miss(reason));
                return Ok(AfterMiss::Run(leader));
            }
        };
        asked.put(reply.frames(), &mut self.client.out);
        self.stats.cache(result);
        if let Some(leader) = leader {
            leader.land(reply.frames());
        }
        Ok(AfterMiss::Answered)
    }

    /// Stores a complete, quiet result if its words have stood still since they were looked at.
    fn fill(&self, key: Option<&CacheKey>, moment: &Moment<'_>, frames: &Bytes) {
        let late = unsound::is(Variant::StampAfter).then(|| moment.words.observe(moment.seen.words()));
        let moment = &Moment { seen: late.as_ref().unwrap_or(moment.seen), ..*moment };
        if let (Some(cache), Some(key)) = (&self.db.cache, key)
            && self.db.shard(moment.shard).member.may_serve()
        {
            // The reply is right all the same.
            self.stats.fill(cache.put(key, moment, frames.clone()));
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
            Question::Once { .. } | Question::Opened { .. } | Question::Described(_) | Question::Guarded(_) => None,
        }
    }

    /// Runs it on the primary, holding the reply back as long as it may be worth keeping.
    async fn ask_primary(
        &mut self,
        question: Question<'_>,
        asked: &Asked,
        (key, moment): (&CacheKey, &Moment<'_>),
        flight: Option<Leader>,
    ) -> Result<(), Failure> {
        let index = self.hold(moment.shard).await?;
        let mut replies = Replies::default();
        self.prime(index, &mut replies);
        put_question(&mut self.held[index].lease, question, &mut replies)?;
        let bytes_max = self.app.config().cache.entry_bytes_max;
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max };
        let mut trail = Trail::default();
        let mut flow = self.relay_on(index, &mut replies, &mut capture, &mut trail).await?;
        let Capture::Hold { reply, .. } = capture else { return Ok(()) };
        let frames = reply.freeze();
        unsound::linger(Place::Replied).await;
        if trail.failed {
            asked.put_failed(&frames, &trail, &mut self.client.out);
        } else {
            asked.put(&frames, &mut self.client.out);
        }
        if flow == Flow::Overflow {
            self.stats.fill(Err(NoFillReason::TooLarge));
            // Before the rest of it, which the client may take its time for.
            if let Some(leader) = flight {
                leader.give_up();
            }
            flow = self.relay_on(index, &mut replies, &mut Capture::Off, &mut trail).await?;
        } else if trail.failed || trail.chatter {
            self.stats.fill(Err(NoFillReason::NotAReply));
        } else {
            self.fill(Some(key), moment, &frames);
            if let Some(leader) = flight {
                leader.land(&frames);
            }
        }
        if let Flow::Ready(status) = flow {
            self.follow(index, status);
        }
        self.release();
        self.db.stats.server_error(&trail);
        if trail.failed { Err(Failure::Reported) } else { Ok(()) }
    }
}
