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
    /// What it reads is written more often than it would be asked for.
    WriteHot,
}

impl NoFillReason {
    /// In order of declaration.
    pub const ALL: [NoFillReason; 5] = [
        NoFillReason::Pending,
        NoFillReason::Moved,
        NoFillReason::TooLarge,
        NoFillReason::NotAReply,
        NoFillReason::WriteHot,
    ];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            NoFillReason::Pending => "pending",
            NoFillReason::Moved => "moved",
            NoFillReason::TooLarge => "too_large",
            NoFillReason::NotAReply => "not_a_reply",
            NoFillReason::WriteHot => "write_hot",
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
    is_about(entry, key, now)?;
    if !entry.seen.same_moment(now.seen) {
        return Err(MissReason::Moved);
    }
    is_young(entry, now)
}

fn is_about(entry: &Entry, key: &CacheKey, now: &Now<'_>) -> Result<(), MissReason> {
    if entry.key != *key {
        return Err(MissReason::OtherKey);
    }
    if entry.epoch != now.epoch || entry.shard != now.shard {
        return Err(MissReason::OtherEpoch);
    }
    Ok(())
}

fn is_young(entry: &Entry, now: &Now<'_>) -> Result<(), MissReason> {
    // An entry from the future has no age that could be trusted.
    match now.now_ms.checked_sub(entry.stored_at_ms) {
        Some(age_ms) if age_ms < now.age_ms_max => Ok(()),
        _ => Err(MissReason::TooOld),
    }
}

/// What is known of an entry that is to be served although it is overtaken (`stale_while_revalidate`).
#[derive(Clone, Copy, Debug)]
pub struct Overtaken<'a> {
    /// The words that void it at once ([`crate::fresh::WordSet::firm`]), before its answer was asked for.
    pub firm_then: &'a Observation,
    /// The same words now.
    pub firm_now: &'a Observation,
    /// How long ago it was known to be the truth, at least; in milliseconds.
    pub true_ms_ago: u64,
    /// How long that may be.
    pub stale_ms: u32,
}

/// May `entry`, which is not the truth of now, answer a read of `key` whose tables all allow that?
pub fn judge_overtaken(
    entry: &Entry,
    key: &CacheKey,
    now: &Now<'_>,
    overtaken: &Overtaken<'_>,
) -> Result<(), MissReason> {
    is_about(entry, key, now)?;
    if !overtaken.firm_then.same_moment(overtaken.firm_now) {
        return Err(MissReason::Moved);
    }
    if overtaken.true_ms_ago >= u64::from(overtaken.stale_ms) {
        return Err(MissReason::TooOld);
    }
    is_young(entry, now)
}

/// May a reply be stored that was read after the look `seen` and is complete now (R5)?
pub fn may_fill(words: &Words, seen: &Observation) -> Result<(), NoFillReason> {
    if seen.pending() {
        return Err(NoFillReason::Pending);
    }
    if words.unmoved(seen) { Ok(()) } else { Err(NoFillReason::Moved) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::entry::tests::entry;
    use crate::fresh::WordSet;

    fn now(seen: &Observation) -> Now<'_> {
        Now { seen, shard: ShardId(2), epoch: Epoch(5), now_ms: 1500, age_ms_max: 1000 }
    }

    #[test]
    fn an_entry_is_served_only_at_its_moment() {
        let entry = entry("SELECT 1");
        let key = &entry.key.clone();
        let seen = entry.seen.clone();
        assert_eq!(judge(&entry, key, &now(&seen)), Ok(()));
        assert_eq!(judge(&entry, key, &Now { now_ms: 1999, ..now(&seen) }), Ok(()));
        assert_eq!(judge(&entry, key, &Now { now_ms: 2000, ..now(&seen) }), Err(MissReason::TooOld));
        assert_eq!(judge(&entry, key, &Now { now_ms: 999, ..now(&seen) }), Err(MissReason::TooOld));
        assert_eq!(judge(&entry, key, &Now { epoch: Epoch(6), ..now(&seen) }), Err(MissReason::OtherEpoch));
        assert_eq!(judge(&entry, key, &Now { shard: ShardId(0), ..now(&seen) }), Err(MissReason::OtherEpoch));
        let other_key = super::super::entry::tests::entry("SELECT 2").key;
        assert_eq!(judge(&entry, &other_key, &now(&seen)), Err(MissReason::OtherKey));
        let moved = Observation::settled(seen.words().clone(), [10, 1 << 47, 4]).expect("three words");
        assert_eq!(judge(&entry, key, &now(&moved)), Err(MissReason::Moved));
        let others = Observation::settled(WordSet::from_indexes([7, 1, 901]), [10, 1 << 47, 3]).expect("three words");
        assert_eq!(judge(&entry, key, &now(&others)), Err(MissReason::Moved));
    }

    #[test]
    fn an_overtaken_entry_is_served_for_so_long_and_not_once_it_is_void() {
        let entry = entry("SELECT 1");
        let key = &entry.key.clone();
        let words = Words::new();
        let firm = WordSet::from_indexes([5, 6]);
        let firm_then = words.observe(&firm);
        let moved = Observation::settled(entry.seen.words().clone(), [10, 1 << 47, 4]).expect("three words");
        let judged = |now: &Now<'_>, true_ms_ago| {
            let firm_now = words.observe(&firm);
            let overtaken = Overtaken { firm_then: &firm_then, firm_now: &firm_now, true_ms_ago, stale_ms: 400 };
            judge_overtaken(&entry, key, now, &overtaken)
        };
        assert_eq!(judge(&entry, key, &now(&moved)), Err(MissReason::Moved));
        assert_eq!(judged(&now(&moved), 399), Ok(()));
        assert_eq!(judged(&now(&moved), 400), Err(MissReason::TooOld));
        assert_eq!(judged(&Now { now_ms: 2000, ..now(&moved) }, 1), Err(MissReason::TooOld));
        assert_eq!(judged(&Now { epoch: Epoch(6), ..now(&moved) }, 1), Err(MissReason::OtherEpoch));
        let intent = words.begin_write(&WordSet::from_indexes([6])).expect("room");
        assert_eq!(judged(&now(&moved), 1), Err(MissReason::Moved), "at once");
        words.end_write(intent, None);
        assert_eq!(judged(&now(&moved), 1), Err(MissReason::Moved), "and for good");
    }

    #[test]
    fn pending_words_serve_and_fill_nothing() {
        let (words, set) = (Words::new(), WordSet::from_indexes([1, 7, 900]));
        let settled = words.observe(&set);
        assert_eq!(may_fill(&words, &settled), Ok(()));
        let intent = words.begin_write(&set).expect("room");
        let pending = words.observe(&set);
        let entry = entry("SELECT 1");
        assert_eq!(judge(&entry, &entry.key, &now(&pending)), Err(MissReason::Pending));
        assert_eq!(may_fill(&words, &settled), Err(NoFillReason::Moved));
        words.end_write(intent, None);
        assert_eq!(may_fill(&words, &settled), Err(NoFillReason::Moved));
        assert_eq!(may_fill(&words, &pending), Err(NoFillReason::Pending));
    }
}
