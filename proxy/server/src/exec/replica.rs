//! Asking a replica: its own replay position comes in front of the answer on the same connection, and decides.
//!
//! Invariant: a strict answer is held back until that position covers the words and the words have not moved meanwhile. At
//! looser levels the position must cover what the level names, and a large answer is passed on once it does. A replica that
//! fails is no error of the client's, as long as nothing has been passed on. Non-goals: the cache, and asking the primary
//! ([`super::read`]).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::{Bytes, BytesMut};
use weir_core::error::sqlstate;
use weir_core::fresh::bound::replica_answer_ok;
use weir_core::fresh::words::Observation;
use weir_core::fresh::{Choice, PrimaryBecause, ReadBound};
use weir_core::id::{Lsn, ShardId};
use weir_core::session::replies::{Owed, Replies};
use weir_wire::backend::{Status, tag};
use weir_wire::frame;
use weir_wire::row;

use super::failures::lost;
use super::fan::{Question, put_question};
use super::read::Asked;
use super::relay::{Broken, Capture, Flow, Trail, relay};
use crate::back::pool::Lease;
use crate::database::Shard;
use crate::database::progress::Waited;
use crate::front::cancel::cancelled;
use crate::front::session::{End, Failure, Session, malformed};
use crate::statements::Shape;
use crate::unsound::{self, Place, Variant};

/// A reply that must be held back until it is proven fresh goes to the primary if it is larger than this.
const REPLICA_REPLY_BYTES_MAX: usize = 64 * 1024;
/// Null from a server that was promoted: it has stopped replaying, and what it shows is no primary's past any more.
const REPLAY_POSITION: &str =
    "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() END";

/// What became of a read that a replica was to answer.
pub enum Elsewhere {
    /// The whole result; `proven`: it is the truth of now, as a cached one must be.
    Answered {
        frames: Bytes,
        proven: bool,
    },
    /// The client has it already.
    Passed,
    Primary(PrimaryBecause),
}

/// A replica and what it must prove.
struct Chosen<'a> {
    shard: &'a Shard,
    number: usize,
    bound: ReadBound,
    need: Lsn,
}

/// What came of one exchange with a replica.
enum Told {
    /// Its replay position, and the whole result.
    Whole(Lsn, Bytes),
    /// The client has it already.
    Passed,
    Nothing(PrimaryBecause),
}

impl Session {
    /// Asks a replica with its replay position in front. If none is far enough, it may wait once until one is.
    pub async fn ask_replica(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        seen: &Observation,
        (shape, asked): (&Shape, &Asked),
    ) -> Result<Elsewhere, Failure> {
        if !self.db.shard(shard).has_replicas() {
            return Ok(Elsewhere::Primary(PrimaryBecause::NoReplica));
        }
        let bound = self.bound(asked.level, shard);
        if bound.must_be_unmoved() && shape.is_large() {
            return Ok(Elsewhere::Primary(PrimaryBecause::TooLarge));
        }
        let first = self.ask_chosen(shard, question, (bound, seen), (shape, asked)).await?;
        let Elsewhere::Primary(PrimaryBecause::ReplicasBehind | PrimaryBecause::ReplicaAnsweredBehind) = first else {
            return Ok(first);
        };
        let Some(nearly) = self.db.nearly_fresh(shard, bound, seen) else { return Ok(first) };
        let waiting = async { Ok(nearly.wait().await) };
        let waited = self.cancel.slot.unless_cancelled(waiting).await?;
        self.stats.waited(waited);
        match waited {
            // What a replica would answer now could not be released.
            Waited::CaughtUp if bound.must_be_unmoved() && !self.db.shard(shard).words.unmoved(seen) => {
                Ok(Elsewhere::Primary(PrimaryBecause::Moved))
            }
            Waited::CaughtUp => self.ask_chosen(shard, question, (bound, seen), (shape, asked)).await,
            Waited::InVain => Ok(Elsewhere::Primary(PrimaryBecause::WaitedInVain)),
            Waited::Full => Ok(first),
        }
    }

    /// Asks the replica that may be far enough, as far as is known.
    async fn ask_chosen(
        &mut self,
        shard: ShardId,
        question: Question<'_>,
        (bound, seen): (ReadBound, &Observation),
        (shape, asked): (&Shape, &Asked),
    ) -> Result<Elsewhere, Failure> {
        let (number, need) = match self.db.choose(shard, bound, seen) {
            Choice::Primary(because) => return Ok(Elsewhere::Primary(because)),
            Choice::Replica(number, _) if unsound::is(Variant::ReplicaUnasked) => (number, Lsn(0)),
            Choice::Replica(number, need) => (number, need),
        };
        let failed = Ok(Elsewhere::Primary(PrimaryBecause::ReplicaFailed));
        let Some(pool) = self.pools.replica(shard, number) else { return failed };
        // A replica that cannot be reached is no error: the primary answers.
        let lease = match Box::pin(self.cancel.slot.unless_cancelled(pool.lease())).await {
            Ok(lease) => lease,
            Err(error) if error.sqlstate == sqlstate::QUERY_CANCELED => return Err(error.into()),
            Err(_) => return failed,
        };
        let db = Arc::clone(&self.db);
        let chosen = Chosen { shard: db.shard(shard), number, bound, need };
        let (replay, frames) = match self.ask_with_position(lease, question, &chosen, (shape, asked)).await? {
            Told::Whole(replay, frames) => (replay, frames),
            Told::Passed => {
                self.stats.read_replica(shard, number);
                return Ok(Elsewhere::Passed);
            }
            Told::Nothing(because) => return Ok(Elsewhere::Primary(because)),
        };
        unsound::linger(Place::Replied).await;
        if let Err(because) = chosen.judge(replay, seen) {
            db.stats.replica_rejected.fetch_add(1, Relaxed);
            return Ok(Elsewhere::Primary(because));
        }
        self.stats.read_replica(shard, number);
        Ok(Elsewhere::Answered { frames, proven: replica_answer_ok(seen.lsn(), replay) })
    }

    /// One exchange with the chosen replica.
    async fn ask_with_position(
        &mut self,
        mut lease: Lease,
        question: Question<'_>,
        chosen: &Chosen<'_>,
        (shape, asked): (&Shape, &Asked),
    ) -> Result<Told, Failure> {
        let replica = &chosen.shard.servers[chosen.number];
        let _occupied = replica.occupy();
        let mut replies = Replies::default();
        self.prime_lease(&mut lease, &mut replies);
        lease.put_query(REPLAY_POSITION);
        replies.push(Owed::Query { hidden: false });
        put_question(&mut lease, question, &mut replies)?;
        let mut capture = Capture::Hold { reply: BytesMut::new(), bytes_max: REPLICA_REPLY_BYTES_MAX };
        let mut trail = Trail::default();
        self.cancel.slot.begin(&lease.cancel_key);
        let flow = relay(&mut self.client, &mut lease, &mut replies, &mut capture, &mut trail).await;
        let reply = if let Capture::Hold { reply, .. } = capture { reply.freeze() } else { Bytes::new() };
        let told = split_position(&reply);
        if let Some((replay, _)) = &told {
            replica.progress.note(*replay);
        }
        if let (Ok(Flow::Overflow), Some((replay, frames))) = (&flow, &told)
            && !chosen.bound.must_be_unmoved()
            && replica_answer_ok(chosen.need, *replay)
        {
            asked.put(frames, &mut self.client.out);
            return Box::pin(self.pass_on(lease, &mut replies, trail)).await;
        }
        self.uncancel(&mut lease).await;
        match flow {
            Ok(Flow::Ready(Status::Idle)) => {}
            Ok(Flow::Overflow) => {
                lease.doubt("a reply too large to hold back");
                shape.mark_large();
                return Ok(Told::Nothing(PrimaryBecause::TooLarge));
            }
            Ok(_) | Err(_) => {
                lease.doubt("a replica failed");
                return Ok(Told::Nothing(PrimaryBecause::ReplicaFailed));
            }
        }
        if trail.sqlstate.as_ref().is_some_and(|code| code == sqlstate::QUERY_CANCELED.as_bytes()) {
            // It was cancelled or took too long; the primary must not run it again. If only the question for the position was
            // hit, that was meant for the statement too.
            let Some((_, frames)) = told else { return Err(cancelled().into()) };
            asked.put(&frames, &mut self.client.out);
            return Err(Failure::Reported);
        }
        Ok(match told {
            Some((replay, frames)) if !trail.failed && !trail.chatter => Told::Whole(replay, frames),
            // What else the server said, the primary says, if it is to be said.
            _ => Told::Nothing(PrimaryBecause::ReplicaFailed),
        })
    }

    /// After the last relay on a lease that is not held.
    async fn uncancel(&mut self, lease: &mut Lease) {
        if !self.cancel.slot.end() && !Box::pin(self.cancel.slot.settle()).await {
            lease.doubt("a cancel request was still on its way");
        }
    }

    /// Passes the rest of a large reply on as it comes. What goes wrong now goes wrong before the client's eyes.
    async fn pass_on(&mut self, mut lease: Lease, replies: &mut Replies, mut trail: Trail) -> Result<Told, Failure> {
        let flow = relay(&mut self.client, &mut lease, replies, &mut Capture::Off, &mut trail).await;
        self.uncancel(&mut lease).await;
        self.db.stats.server_error(&trail);
        match flow {
            Ok(Flow::Ready(Status::Idle)) if trail.failed => Err(Failure::Reported),
            Ok(Flow::Ready(Status::Idle)) => Ok(Told::Passed),
            Ok(_) => {
                lease.doubt("a replica's reply did not end");
                Ok(Told::Passed)
            }
            Err(broken) => {
                lease.doubt("a relay broke");
                let end = match broken {
                    Broken::Client(_) => End::ClientGone,
                    Broken::Protocol(_) => End::Fatal(malformed()),
                    broken => End::Fatal(lost(&lease.pool().name.clone(), &broken.to_string())),
                };
                Err(Failure::End(end))
            }
        }
    }
}

impl Chosen<'_> {
    /// May the answer be released, now that it is complete? `seen`: the look from before it was asked for.
    fn judge(&self, replay: Lsn, seen: &Observation) -> Result<(), PrimaryBecause> {
        if !replica_answer_ok(self.need, replay) {
            return Err(PrimaryBecause::ReplicaAnsweredBehind);
        }
        match self.bound.must_be_unmoved() {
            true if !self.shard.words.unmoved(seen) && !unsound::is(Variant::NoSecondLook) => {
                Err(PrimaryBecause::Moved)
            }
            true => self.shard.watches_words(),
            false => Ok(()),
        }
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
