//! May a stored reply be served, and may a reply be stored?
//!
//! Every "no" is a reason, used by EXPLAIN output, logs and metric labels alike. Whether a *statement* may be cached at
//! all is the planner's verdict; here it is about one entry and one execution.

use super::entry::Entry;
use super::key::CacheKey;
use crate::fresh::{Observation, Words};
use crate::id::{Epoch, ShardId};

/// Why a look-up did not answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MissReason {
    /// Nothing is stored under this key.
    Absent,
    /// A write of what it reads is under way.
    Pending,
    /// Something it depends on was written after it was stored.
    Moved,
    TooOld,
    /// Stored under another topology, or for another shard.
    OtherEpoch,
    /// Another statement with the same hash.
    OtherKey,
    /// The store returned something that is not an entry.
    Garbled,
    /// The store did not answer, not in time, or is not being asked after failures.
    StoreDown,
}

impl MissReason {
    pub const ALL: [MissReason; 8] = [
        MissReason::Absent,
        MissReason::Pending,
        MissReason::Moved,
        MissReason::TooOld,
        MissReason::OtherEpoch,
        MissReason::OtherKey,
        MissReason::Garbled,
        MissReason::StoreDown,
    ];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            MissReason::Absent => "absent",
            MissReason::Pending => "pending",
            MissReason::Moved => "moved",
            MissReason::TooOld => "too_old",
            MissReason::OtherEpoch => "other_epoch",
            MissReason::OtherKey => "other_key",
            MissReason::Garbled => "garbled",
            MissReason::StoreDown => "store_down",
        }
    }
}

/// Why a complete reply was not stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NoFillReason {
    /// A write was under way when the read started.
    Pending,
    /// A write began, ended or both while the read ran.
    Moved,
    TooLarge,
    /// Not exactly one RowDescription, rows and a CommandComplete: an error, a notice, a suspended portal, ….
    NotAReply,
    /// Read inside a transaction that wrote or keeps an old snapshot.
    InTransaction,
}

impl NoFillReason {
    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            NoFillReason::Pending => "pending",
            NoFillReason::Moved => "moved",
            NoFillReason::TooLarge => "too_large",
            NoFillReason::NotAReply => "not_a_reply",
            NoFillReason::InTransaction => "in_transaction",
        }
    }
}

/// What an entry is judged against. Look at the words and the topology first, read the clock last.
#[derive(Clone, Copy, Debug)]
pub struct Now<'a> {
    pub seen: &'a Observation,
    pub shard: ShardId,
    pub epoch: Epoch,
    /// Milliseconds on any clock that does not run backwards within this process.
    pub now_ms: u64,
    pub age_ms_max: u64,
}

/// May `entry` answer a read of `key` (R2)?
pub fn judge(entry: &Entry, key: &CacheKey, now: &Now<'_>) -> Result<(), MissReason> {
    if now.seen.pending() {
        return Err(MissReason::Pending);
    }
    if entry.key != *key {
        return Err(MissReason::OtherKey);
    }
    if entry.epoch != now.epoch || entry.shard != now.shard {
        return Err(MissReason::OtherEpoch);
    }
    if !entry.seen.same_moment(now.seen) {
        return Err(MissReason::Moved);
    }
    // An entry from the future has no age that could be trusted.
    match now.now_ms.checked_sub(entry.stored_at_ms) {
        Some(age_ms) if age_ms < now.age_ms_max => Ok(()),
        _ => Err(MissReason::TooOld),
    }
}

/// May a reply be stored that was read after the look `seen` and is complete now (R5)?
pub fn may_fill(words: &Words, seen: &Observation) -> Result<(), NoFillReason> {
    if seen.pending() {
        return Err(NoFillReason::Pending);
    }
    if words.unmoved(seen) { Ok(()) } else { Err(NoFillReason::Moved) }
}
