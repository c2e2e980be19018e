//! Serving an answer that is overtaken while it is refreshed, where tables opt in (`stale_while_revalidate`).
//!
//! The session that is the first to be served so refreshes the answer: on an idle Backend of its user, in a task of its own; or, if
//! none is idle, by asking the primary as if there were no answer, while others are still served. Invariant: see
//! [`crate::cache::stale`]; the refresh is the ordinary fill. Bounds: its time; one per entry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use weir_core::cache::{CacheKey, MissReason};
use weir_core::fresh::{Observation, Words};
use weir_core::id::{Epoch, ShardId};
use weir_core::plan::Plan;
use weir_core::session::replies::{Replies, Verdict};
use weir_wire::backend::tag;
use weir_wire::frame;

use super::fan::{Question, put_question};
use super::read::Asked;
use crate::back::pool::Lease;
use crate::cache::stale::Lenient;
use crate::cache::{Moment, Overdue};
use crate::database::Database;
use crate::front::session::{Failure, Session};
use crate::metrics::CacheResult;
use crate::stats::SessionStats;

/// A refresh that takes longer is given up, with its connection.
const REFRESH_TIME_MAX: Duration = Duration::from_secs(30);

/// One refresh under way.
struct Refresh {
    db: Arc<Database>,
    stats: Arc<SessionStats>,
    key: CacheKey,
    words: Arc<Words>,
    seen: Observation,
    lenient: Lenient,
    shard: ShardId,
    epoch: Epoch,
    bytes_max: usize,
}

impl Session {
    /// What a read starts with whose tables let it be answered so, unless somebody asks for more. To be called before the look at
    /// its words.
    pub fn lenient(&self, words: &Words, plan: &Plan, asked: &Asked) -> Option<Box<Lenient>> {
        let stale_ms = self.stale_ms(plan.stale_ms?, asked.hint)?;
        Some(Box::new(Lenient::now(words, &plan.reads, stale_ms)))
    }

    /// Memory has not answered, with a reason. True: an answer that is overtaken was served.
    pub fn serve_overtaken(
        &mut self,
        (key, moment, words): (&CacheKey, &Moment<'_>, &Arc<Words>),
        missed: MissReason,
        question: Question<'_>,
        asked: &Asked,
    ) -> Result<bool, Failure> {
        let (Some(cache), Some(lenient)) = (&self.db.cache, moment.lenient) else { return Ok(false) };
        if !matches!(missed, MissReason::Pending | MissReason::Moved) {
            return Ok(false);
        }
        let wrote_since = |asked: Instant| self.announced.wrote_since(moment.shard, asked);
        let Some(Overdue { reply, refresh }) = cache.get_overtaken(key, moment, wrote_since) else { return Ok(false) };
        if refresh {
            // Without one the session asks for itself.
            let Some(mut lease) = self.pools.primary(moment.shard).lease_idle() else { return Ok(false) };
            let mut replies = Replies::default();
            self.prime_lease(&mut lease, &mut replies);
            put_question(&mut lease, question, &mut replies)?;
            let refresh = Refresh {
                db: Arc::clone(&self.db),
                stats: Arc::clone(&self.stats),
                key: key.clone(),
                words: Arc::clone(words),
                seen: moment.seen.clone(),
                lenient: lenient.clone(),
                shard: moment.shard,
                epoch: moment.epoch,
                bytes_max: self.app.config().cache.entry_bytes_max,
            };
            tokio::spawn(refresh.run(lease, replies));
        }
        asked.put(reply.frames(), &mut self.client.out);
        self.stats.cache(CacheResult::HitStale);
        Ok(true)
    }
}

impl Refresh {
    async fn run(self, mut lease: Lease, mut replies: Replies) {
        let reply = whole_reply(&mut lease, &mut replies, self.bytes_max);
        match tokio::time::timeout(REFRESH_TIME_MAX, reply).await {
            Ok(Some(Ok(frames))) => self.fill(frames),
            // It failed, said more than a result, or is too large: not to be kept.
            Ok(Some(Err(()))) => {}
            Ok(None) | Err(_) => lease.doubt("a refresh of a cached answer did not end"),
        }
    }

    fn fill(&self, frames: Bytes) {
        let (Some(cache), true) = (&self.db.cache, self.db.shard(self.shard).member.may_serve()) else { return };
        let (words, seen) = (&*self.words, &self.seen);
        let moment = Moment { words, seen, shard: self.shard, epoch: self.epoch, lenient: Some(&self.lenient) };
        self.stats.fill(cache.put(&self.key, &moment, frames));
    }
}

/// Sends what is in `lease.out` and reads the reply to its end. `None`: the connection cannot be used any more. `Err`: it is not a
/// result that may be kept.
async fn whole_reply(lease: &mut Lease, replies: &mut Replies, bytes_max: usize) -> Option<Result<Bytes, ()>> {
    lease.busy = true;
    lease.send().await.ok()?;
    let (mut reply, mut kept) = (BytesMut::new(), true);
    loop {
        let (kind, body) = lease.receive().await.ok()?;
        match replies.on_frame(kind, &body).ok()? {
            Verdict::Swallow => {}
            Verdict::HiddenFailed | Verdict::CopyIn => return None,
            Verdict::Ready { status, hidden } => {
                lease.status = status;
                if !hidden && replies.is_empty() {
                    lease.busy = false;
                    return Some(if kept { Ok(reply.freeze()) } else { Err(()) });
                }
            }
            Verdict::Failed { .. } => kept = false,
            Verdict::Forward | Verdict::Described => {
                kept &= matches!(kind, tag::ROW_DESCRIPTION | tag::DATA_ROW | tag::COMMAND_COMPLETE);
                kept &= reply.len() + body.len() <= bytes_max;
                if kept {
                    frame::put(&mut reply, kind, |out| out.extend_from_slice(&body));
                }
            }
        }
    }
}
