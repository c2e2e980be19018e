//! weir, broken on purpose: what the freshness checker switches on to prove that it would notice (docs/freshness-checker.md).
//!
//! With the feature `unsound` the variable `WEIR_UNSOUND` names one [`Variant`], which breaks one step of the protocol;
//! `WEIR_FAILPOINT=<step>:<nth>` kills the process at the nth time it comes to a [`Place`]; and `WEIR_LINGER=<step>:<ms>` makes it linger
//! there, or with `anywhere` at all steps, up to so long and now and then, which widens what is otherwise a matter of microseconds.
//!
//! Invariant: without the feature nothing here is more than a constant, and an optimised build with it does not compile. Non-goal:
//! faults that are not in weir itself; those the checker makes from outside.

#[cfg(all(feature = "unsound", not(debug_assertions)))]
compile_error!("the feature `unsound` breaks weir on purpose and must not be built for service");

/// One step done otherwise, as it might have seemed good enough. Named in `WEIR_UNSOUND` as they are here, in snake case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// Words move when a write is over, and not before anything is sent.
    IntentAfterWrite,
    /// Versions move before and after a write, but nothing is pending in between.
    NoPending,
    /// A replica's answer is released without a second look at the words.
    NoSecondLook,
    /// What a replica says of its replay position is not looked at.
    ReplicaUnasked,
    /// An entry is stored under the words as they are after the read.
    StampAfter,
    /// The position of a write is one that was asked for before it was acknowledged.
    EarlyLsn,
    /// A write of unknown outcome counts as over after a while, though its server process is still there.
    IntentTimeOut,
    /// Who waits for whose answer is decided by the key alone.
    JoinByKey,
    /// Other proxies are not waited for when a write is announced: they hear nothing of it.
    NoPeers,
    /// A proxy answers from its cache although its lease has run out.
    NoLease,
    /// A decoded commit is over before the primary shows it.
    UngatedDecoding,
    /// What is found in Redis is believed.
    RedisJudges,
    /// What was read in an earlier life of the primary stays true.
    NoFloor,
}

/// A place between two steps, where the process may be killed or linger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// A write's words are raised here, and nobody else is told.
    Raised,
    /// All are told, and nothing is sent.
    Told,
    /// Sent, and perhaps committed.
    Sent,
    /// The server has answered, and the client does not know.
    Answered,
    /// The write is handed over to the clock.
    Posted,
    /// Its position is known, and its words are still pending.
    Placed,
    /// Its words are lowered here, and nobody else knows.
    Lowered,
    /// A read has looked at its words and asked nobody yet.
    Observed,
    /// Its answer is there, and neither judged nor kept.
    Replied,
    /// A commit is decoded, and the primary is not yet asked whether it shows it.
    Decoded,
}

#[cfg(not(feature = "unsound"))]
mod off {
    use weir_core::fresh::{Intent, WordSet, Words, WordsFull};
    use weir_core::id::Lsn;

    use super::{Place, Variant};

    /// Is weir to do this wrong?
    pub const fn is(_: Variant) -> bool {
        false
    }

    /// [`Words::begin_write`].
    pub fn begin_write(words: &Words, set: &WordSet) -> Result<Intent, WordsFull> {
        words.begin_write(set)
    }

    /// [`Words::end_write`].
    pub fn end_write(words: &Words, intent: Intent, lsn: Option<Lsn>) {
        words.end_write(intent, lsn);
    }

    /// Dies here if it was told to.
    pub const fn reach(_: Place) {}

    /// Dies a little later, while others go on, if it was told to.
    pub const fn reach_soon(_: Place) {}

    /// Dies here, or waits a little.
    pub fn linger(_: Place) -> std::future::Ready<()> {
        std::future::ready(())
    }
}

#[cfg(not(feature = "unsound"))]
pub use off::{begin_write, end_write, is, linger, reach, reach_soon};

#[cfg(feature = "unsound")]
mod on;

#[cfg(feature = "unsound")]
pub use on::{begin_write, end_write, is, linger, reach, reach_soon, warn};

#[cfg(all(test, not(feature = "unsound")))]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_done_wrong_by_default() {
        const { assert!(!is(Variant::NoPending)) };
        assert_eq!(size_of_val(&linger(Place::Told)), size_of::<Option<()>>());
    }
}
