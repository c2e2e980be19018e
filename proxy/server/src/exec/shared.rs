//! A read that memory cannot answer: what another proxy has stored in Redis, or is about to store there.
//!
//! Redis is asked for what memory has never had, and, where there are other proxies, for what has moved: one of them may have read
//! it again already. A leader for which others wait, or for whose last read they did, agrees with other proxies on who asks the
//! server; a lone miss does not, and pays one round trip to Redis as ever.

use weir_core::cache::{CacheKey, MissReason};

use crate::cache::{Cache, Filled, Lookup, Moment};
use crate::flights::Leader;
use crate::front::session::{Failure, Session};

impl Session {
    pub(super) async fn look_shared(
        &self,
        cache: &Cache,
        (key, moment): (&CacheKey, &Moment<'_>),
        missed: MissReason,
        leader: Option<&mut Leader>,
    ) -> Result<Lookup, Failure> {
        let peers = self.db.shard(moment.shard).member.has_peers();
        if !cache.may_be_shared(missed, moment.seen, peers) {
            return Ok(Lookup::Miss(missed));
        }
        let Some(leader) = leader.filter(|_| peers) else { return Ok(cache.get_remote(key, moment).await) };
        if !leader.is_crowded() {
            let found = cache.get_remote(key, moment).await;
            let fillable = matches!(found, Lookup::Miss(MissReason::Absent | MissReason::Moved));
            if !fillable || !leader.has_followers() {
                return Ok(found);
            }
        }
        let waiting = async { Ok(cache.filled_by_another(key, moment).await) };
        Ok(match self.cancel.slot.unless_cancelled(waiting).await? {
            Filled::Hit(reply) => Lookup::Hit(reply),
            Filled::Mine(lease) => {
                leader.hold(lease);
                Lookup::Miss(missed)
            }
            Filled::Miss(reason) => Lookup::Miss(reason),
        })
    }
}
