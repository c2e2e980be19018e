//! Dependency words: what is being written, what has been written, and up to which LSN, per shard.
//!
//! Invariant: a write of a word becomes visible on the primary only between its `begin_write` and its `end_write`. In
//! that span `pending > 0`, and each end of it changes `version`. So two looks at a word that find the same version
//! and nothing pending prove that nothing became visible in between: a primary snapshot taken between them is still
//! the truth at the second look, and so is a replica snapshot whose replay position covers the word's LSN at the
//! first. Cache hits, cache fills and replica answers are all released on that proof and on no other.
//!
//! Versions count this process's own steps. For stores that several proxies share, each word also has a *stamp*: the sum of
//! the marks of all writes of it that are over. A write has the same mark at every proxy that hears of it, and every proxy
//! hears of it before it can become visible; so two settled words with equal stamps (once one was taken over from the other)
//! have seen the same writes, and what was true under the one is true under the other.
//!
//! Non-goals: exactness (words are shared by hash, which only over-invalidates), eviction (there is none: a word that
//! forgot would turn "unknown" into "unmoved"), and waiting (nothing here blocks).
//!
//! Orderings. The messages that carry commits and snapshots travel through sockets and other processes, which the
//! memory model does not see, so each step that must precede or follow such a message is fenced:
//! - a writer raises its words, then a `SeqCst` fence, then sends whatever may commit: a reader whose snapshot shows the
//!   write looks again later and cannot miss the raise;
//! - a reader looks, then a fence, then asks for its snapshot; and has the answer, then a fence, then looks again:
//!   neither look can slide over the snapshot it brackets;
//! - a writer stores the LSN and only then moves the state word with `Release`. Every change of a state word is a
//!   read-modify-write, so a reader that acquires *any* later value of it also sees that LSN.
//!
//! A look at several words is not atomic and need not be: each word is unmoved between its own two loads, all first
//! loads precede the snapshot and all second loads follow it, so all of them hold at the snapshot.

use smallvec::SmallVec;

use super::sync::{AtomicU64, Ordering, fence};
use super::{Dependencies, Dependency};
use crate::id::Lsn;

/// Words per shard.
pub const WORDS: usize = 1 << 16;

/// State word: `version << 16 | pending`.
const PENDING_MASK: u64 = 0xffff;
const VERSION_ONE: u64 = 1 << 16;
/// Writers that may be under way on one word at the same time.
pub const PENDING_MAX: u64 = PENDING_MASK;

/// The position of a write that is over but has none yet: no replica covers it until [`Words::place`].
pub const UNPLACED: Lsn = Lsn(u64::MAX);

/// The freshness state of one shard. 1.5 MiB; shared by all sessions.
pub struct Words {
    words: Box<[Word]>,
    /// Marks that nobody else gives.
    marks: AtomicU64,
}

struct Word {
    state: AtomicU64,
    lsn: AtomicU64,
    stamp: AtomicU64,
}

impl Default for Words {
    fn default() -> Self {
        Self::new()
    }
}

impl Words {
    pub fn new() -> Self {
        Self::seeded(0)
    }

    /// `seed` must be another one for every process that shares a store with others.
    pub fn seeded(seed: u64) -> Self {
        Self::sized(WORDS, seed)
    }

    /// `count` must be a power of two; smaller than [`WORDS`] only in tests, where whole states are copied around.
    pub(super) fn sized(count: usize, seed: u64) -> Self {
        debug_assert!(count.is_power_of_two() && count <= WORDS);
        let word = |index: usize| Word {
            state: AtomicU64::new(0),
            lsn: AtomicU64::new(0),
            stamp: AtomicU64::new(mix(mix(seed).wrapping_add(index as u64))),
        };
        Words { words: (0..count).map(word).collect(), marks: AtomicU64::new(mix(seed ^ 1)) }
    }

    fn new_mark(&self) -> u64 {
        mix(self.marks.fetch_add(1, Ordering::Relaxed))
    }

    fn word(&self, index: u16) -> &Word {
        &self.words[usize::from(index) & (self.words.len() - 1)]
    }

    /// Announces a write of `set`, **before** anything that may commit it is sent (step W1 of the protocol).
    ///
    /// On error nothing is announced, and the write must not be sent.
    pub fn begin_write(&self, set: &WordSet) -> Result<Intent, WordsFull> {
        for (done, &index) in set.0.iter().enumerate() {
            if self.raise(index).is_err() {
                for &raised in &set.0[..done] {
                    self.settle(raised);
                }
                return Err(WordsFull { word: index });
            }
        }
        fence(Ordering::SeqCst);
        Ok(Intent { set: set.clone(), mark: self.new_mark() })
    }

    /// Compare-and-swap rather than an addition: one writer too many would carry from `pending` into `version` and
    /// make a busy word look idle.
    fn raise(&self, index: u16) -> Result<u64, u64> {
        self.word(index).state.fetch_update(Ordering::SeqCst, Ordering::Relaxed, |state| {
            (state & PENDING_MASK < PENDING_MAX).then(|| state.wrapping_add(VERSION_ONE + 1))
        })
    }

    /// version + 1 and pending - 1 in one addition. `pending` is at least 1 here, because only an [`Intent`] leads here.
    fn settle(&self, index: u16) {
        self.word(index).state.fetch_add(VERSION_ONE - 1, Ordering::SeqCst);
    }

    /// Ends a write whose outcome is final (step W4). `lsn`: a position of this primary that was asked for after the
    /// outcome was known, hence at or past the commit. `None`: rolled back, or nothing was written. [`UNPLACED`]: it is
    /// committed, but nobody can say where; the cache may go on, replicas may not.
    pub fn end_write(&self, intent: Intent, lsn: Option<Lsn>) {
        for &index in &intent.set.0 {
            if let Some(lsn) = lsn {
                // Before the state moves: a reader that finds nothing pending must find this LSN.
                self.word(index).lsn.fetch_max(lsn.0, Ordering::Relaxed);
            }
            self.word(index).stamp.fetch_add(intent.mark, Ordering::Relaxed);
            self.settle(index);
        }
    }

    /// Gives the words among `set` that are [`UNPLACED`] a position that was asked for after the last write that left
    /// them so was acknowledged. The caller must exclude such a write from ending meanwhile.
    pub fn place(&self, set: impl IntoIterator<Item = u16>, lsn: Lsn) {
        for index in set {
            // Fails, and rightly, where the word has a position already.
            let place = &self.word(index).lsn;
            let _ = place.compare_exchange(UNPLACED.0, lsn.0, Ordering::SeqCst, Ordering::Relaxed);
        }
    }

    /// A look at `set`: before a snapshot is asked for (R1), or to judge a cached entry (R2).
    pub fn observe(&self, set: &WordSet) -> Observation {
        let mut states = SmallVec::with_capacity(set.0.len());
        let mut pending = false;
        let mut lsn = 0;
        for &index in &set.0 {
            let word = self.word(index);
            let state = word.state.load(Ordering::SeqCst);
            pending |= state & PENDING_MASK != 0;
            lsn = lsn.max(word.lsn.load(Ordering::Relaxed));
            states.push(state >> 16);
        }
        fence(Ordering::SeqCst);
        Observation { set: set.clone(), versions: states, pending, lsn: Lsn(lsn) }
    }

    /// The second look (R5): is everything still as `seen`, and was and is nothing pending?
    pub fn unmoved(&self, seen: &Observation) -> bool {
        fence(Ordering::SeqCst);
        !seen.pending
            && seen.set.0.iter().zip(&seen.versions).all(|(&index, &version)| {
                // A settled state is its version alone, so one comparison covers both.
                self.word(index).state.load(Ordering::SeqCst) == version << 16
            })
    }

    /// The stamps of the words of a look, in its order. `None`: it is not true any more, or was not settled.
    pub fn stamps(&self, seen: &Observation) -> Option<SmallVec<[u64; 6]>> {
        let stamps = seen.set.0.iter().map(|index| self.word(*index).stamp.load(Ordering::SeqCst)).collect();
        self.unmoved(seen).then_some(stamps)
    }

    /// Words `first..first + count` as others may take them over: version and stamp, `None` while something is pending.
    pub fn settled_stamps(&self, first: u16, count: u16) -> Vec<Option<(u64, u64)>> {
        let settled = |index: u16| {
            let word = self.word(index);
            let state = word.state.load(Ordering::SeqCst);
            let stamp = word.stamp.load(Ordering::SeqCst);
            let still = state & PENDING_MASK == 0 && word.state.load(Ordering::SeqCst) == state;
            still.then_some((state >> 16, stamp))
        };
        (0..count).map(|step| settled(first.wrapping_add(step))).collect()
    }

    /// Takes over the stamp of another proxy that hears of all writes, as this one does. `mine`: this word as it was before the
    /// other was asked. Nothing happens if it has moved since.
    pub fn take_stamp(&self, index: u16, mine: (u64, u64), theirs: u64) -> bool {
        let (version, stamp) = mine;
        let word = self.word(index);
        // The exchange fails if a write ended since: its mark must not be lost.
        word.state.load(Ordering::SeqCst) == version << 16
            && word.stamp.compare_exchange(stamp, theirs, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Everything at or below `lsn` is unknown (start, restart or promotion of the primary, writes seen elsewhere):
    /// replicas must have replayed past it, and whatever was read before is void.
    pub fn raise_floor(&self, lsn: Lsn) {
        let marks = self.marks.fetch_add(self.words.len() as u64, Ordering::Relaxed);
        for (word, mark) in self.words.iter().zip(marks..) {
            word.lsn.fetch_max(lsn.0, Ordering::Relaxed);
            word.stamp.fetch_add(mix(mark), Ordering::Relaxed);
            word.state.fetch_add(VERSION_ONE, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }
}

/// The words of a statement: sorted, each once. Up to six without allocating.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct WordSet(SmallVec<[u16; 6]>);

impl WordSet {
    /// The words that `dependencies` name.
    pub fn of(dependencies: &Dependencies) -> WordSet {
        Self::from_indexes(dependencies.iter().map(|dependency| word_of(*dependency)))
    }

    /// The words a read must watch: those it names and G, which every unclassified write raises. `None` if all it
    /// names is [`Dependency::Anything`]: ordinary writes do not raise G, so no word vouches for such a read.
    pub fn for_read(dependencies: &Dependencies) -> Option<WordSet> {
        if !dependencies.is_empty() && dependencies.iter().all(|one| *one == Dependency::Anything) {
            return None;
        }
        let named = dependencies.iter().map(|dependency| word_of(*dependency));
        Some(Self::from_indexes(named.chain([word_of(Dependency::Anything)])))
    }

    /// What voids an answer to such a read at once, even where it may be served although it is overtaken: G, and that its tables
    /// are flushed.
    pub fn firm(dependencies: &Dependencies) -> WordSet {
        let flushed = dependencies.iter().filter_map(|dependency| match *dependency {
            Dependency::Anything | Dependency::AnyRows | Dependency::Flushed(_) => None,
            Dependency::Table(table) | Dependency::Keyless(table) | Dependency::Key(table, _) => {
                Some(word_of(Dependency::Flushed(table)))
            }
        });
        Self::from_indexes(flushed.chain([word_of(Dependency::Anything)]))
    }

    /// Sorts and removes duplicates: a write must raise a shared word once, as it will lower it once.
    pub fn from_indexes(indexes: impl IntoIterator<Item = u16>) -> WordSet {
        let mut words: SmallVec<[u16; 6]> = indexes.into_iter().collect();
        words.sort_unstable();
        words.dedup();
        WordSet(words)
    }

    pub fn indexes(&self) -> &[u16] {
        &self.0
    }

    /// The words of both: what a transaction has touched so far.
    #[must_use]
    pub fn union(&self, other: &WordSet) -> WordSet {
        Self::from_indexes(self.0.iter().chain(&other.0).copied())
    }

    pub fn contains_all(&self, other: &WordSet) -> bool {
        other.0.iter().all(|index| self.0.binary_search(index).is_ok())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Fixed for all builds (splitmix64's finaliser), so that proxies can tell each other word indexes.
fn word_of(dependency: Dependency) -> u16 {
    let (kind, table, key) = match dependency {
        Dependency::Anything | Dependency::AnyRows => (0, 0, 0),
        Dependency::Table(table) => (1, table.0, 0),
        Dependency::Keyless(table) => (2, table.0, 0),
        Dependency::Key(table, key) => (3, table.0, key.0),
        Dependency::Flushed(table) => (4, table.0, 0),
    };
    (mix(mix(mix(kind).wrapping_add(table)).wrapping_add(key)) >> 48) as u16
}

fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A write under way. Ends only through [`Words::end_write`]: an intent that is lost leaves its words pending for the
/// life of the process, which costs cache and replica use but never an old answer.
#[must_use = "the words stay pending until end_write"]
#[derive(Debug)]
pub struct Intent {
    set: WordSet,
    mark: u64,
}

impl Intent {
    /// The same, as other proxies know it: `maker` and `token` name the write.
    pub fn named(mut self, maker: u64, token: u64) -> Self {
        self.mark = mix(mix(maker).wrapping_add(token));
        self
    }

    pub fn words(&self) -> &WordSet {
        &self.set
    }
}

/// A word already has [`PENDING_MAX`] writers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("dependency word {word} has {PENDING_MAX} writes under way")]
pub struct WordsFull {
    pub word: u16,
}

/// One look at a set of words.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Observation {
    set: WordSet,
    versions: SmallVec<[u64; 6]>,
    pending: bool,
    lsn: Lsn,
}

impl Observation {
    /// Was a write under way on any of the words?
    pub fn pending(&self) -> bool {
        self.pending
    }

    /// The newest write known on any of the words.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    pub fn words(&self) -> &WordSet {
        &self.set
    }

    /// In the order of [`Observation::words`].
    pub fn versions(&self) -> &[u64] {
        &self.versions
    }

    /// Same words at the same versions, and both looks found nothing pending: nothing became visible in between.
    pub fn same_moment(&self, other: &Observation) -> bool {
        !self.pending && !other.pending && self.versions == other.versions && self.set == other.set
    }

    /// A settled observation from its parts, as a store returns them. `None` if they cannot be one.
    pub fn settled(set: WordSet, versions: impl IntoIterator<Item = u64>) -> Option<Observation> {
        let versions: SmallVec<[u64; 6]> = versions.into_iter().collect();
        (versions.len() == set.0.len()).then_some(Observation { set, versions, pending: false, lsn: Lsn(0) })
    }
}

/// For the model checker, which copies whole states around, and for tests that need a state no run reaches quickly.
#[cfg(test)]
pub(super) mod forge {
    use super::*;

    pub fn words(raw: &[(u64, u64)]) -> Words {
        let words = Words::sized(raw.len(), 0);
        for (word, (state, lsn)) in words.words.iter().zip(raw) {
            word.state.store(*state, Ordering::SeqCst);
            word.lsn.store(*lsn, Ordering::SeqCst);
        }
        words
    }

    /// One settled or pending word with a stamp, of a process that gives its own marks.
    pub fn stamped(seed: u64, state: u64, stamp: u64) -> Words {
        let words = Words::sized(1, seed);
        words.words[0].state.store(state, Ordering::SeqCst);
        words.words[0].stamp.store(stamp, Ordering::SeqCst);
        words
    }

    /// One word as it is when a process starts.
    pub fn first(seed: u64) -> Words {
        Words::sized(1, seed)
    }

    pub fn stamp(words: &Words) -> u64 {
        words.words[0].stamp.load(Ordering::SeqCst)
    }

    pub fn raw(words: &Words, index: usize) -> (u64, u64) {
        let word = &words.words[index];
        (word.state.load(Ordering::SeqCst), word.lsn.load(Ordering::SeqCst))
    }

    pub fn intent(set: WordSet) -> Intent {
        Intent { set, mark: 1 }
    }

    pub fn observation(set: WordSet, versions: &[u64], pending: bool, lsn: Lsn) -> Observation {
        Observation { set, versions: versions.into(), pending, lsn }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64 as Plain};

    use proptest::prelude::*;

    use super::*;
    use crate::fresh::{KeyHash, TableHash};

    fn set(indexes: &[u16]) -> WordSet {
        WordSet::from_indexes(indexes.iter().copied())
    }

    #[test]
    fn a_write_moves_its_words_and_no_others() {
        let words = Words::new();
        let (mine, other) = (set(&[3, 9]), set(&[4]));
        let (before, elsewhere) = (words.observe(&mine), words.observe(&other));
        let intent = words.begin_write(&mine).expect("room");
        let during = words.observe(&mine);
        assert!(during.pending() && !words.unmoved(&before) && !words.unmoved(&during));
        words.end_write(intent, Some(Lsn(70)));
        let after = words.observe(&mine);
        assert!(!after.pending() && words.unmoved(&after));
        assert_eq!(after.lsn(), Lsn(70));
        assert!(!words.unmoved(&before) && !words.unmoved(&during), "an observation never comes back");
        assert!(!after.same_moment(&before) && !after.same_moment(&during) && after.same_moment(&after));
        assert!(words.unmoved(&elsewhere));
    }

    #[test]
    fn a_rolled_back_write_moves_versions_but_no_lsn() {
        let words = Words::new();
        let mine = set(&[1]);
        let intent = words.begin_write(&mine).expect("room");
        words.end_write(intent, None);
        assert_eq!(words.observe(&mine).lsn(), Lsn(0));
        assert_eq!(words.observe(&mine).versions(), [2]);
    }

    #[test]
    fn stamps_are_equal_where_the_same_writes_are_over() {
        let (here, there) = (Words::seeded(1), Words::seeded(2));
        let both = set(&[3, 9]);
        let stamps = |words: &Words| words.stamps(&words.observe(&both));
        assert_ne!(stamps(&here), stamps(&there));
        for index in [3, 9] {
            let mine = there.settled_stamps(index, 1)[0].expect("settled");
            let theirs = here.settled_stamps(index, 1)[0].expect("settled");
            assert!(there.take_stamp(index, mine, theirs.1));
        }
        assert_eq!(stamps(&here), stamps(&there));
        let before = stamps(&here);
        // Two writes end in another order at each; while one is under way there are no stamps.
        let begin = |words: &Words, token| words.begin_write(&both).expect("room").named(7, token);
        let (one, two) = (begin(&here, 1), begin(&here, 2));
        let (other, another) = (begin(&there, 1), begin(&there, 2));
        assert_eq!(stamps(&here), None);
        here.end_write(one, None);
        there.end_write(another, None);
        here.end_write(two, None);
        assert_eq!(stamps(&there), None);
        there.end_write(other, None);
        assert_eq!(stamps(&here), stamps(&there));
        assert_ne!(stamps(&here), before);
        here.raise_floor(Lsn(1));
        assert_ne!(stamps(&here), stamps(&there));
    }

    #[test]
    fn a_stamp_is_not_taken_over_once_its_word_has_moved() {
        let words = Words::seeded(1);
        let mine = words.settled_stamps(5, 1)[0].expect("settled");
        let write = words.begin_write(&set(&[5])).expect("room");
        assert!(!words.take_stamp(5, mine, 77) && words.settled_stamps(5, 1) == [None]);
        words.end_write(write, None);
        assert!(!words.take_stamp(5, mine, 77));
        let now = words.settled_stamps(5, 1)[0].expect("settled");
        assert!(words.take_stamp(5, now, 77) && words.settled_stamps(5, 1)[0].map(|(_, stamp)| stamp) == Some(77));
    }

    #[test]
    fn an_lsn_never_falls() {
        let words = Words::new();
        let mine = set(&[1]);
        for lsn in [9, 4] {
            let intent = words.begin_write(&mine).expect("room");
            words.end_write(intent, Some(Lsn(lsn)));
        }
        assert_eq!(words.observe(&mine).lsn(), Lsn(9));
    }

    #[test]
    fn one_writer_too_many_is_refused_and_leaves_no_trace() {
        let words = forge::words(&[(0, 0), (7 << 16 | PENDING_MAX, 0)]);
        assert_eq!(words.begin_write(&set(&[0, 1])).map(|_| ()), Err(WordsFull { word: 1 }));
        assert!(!words.observe(&set(&[0])).pending());
        assert_eq!(forge::raw(&words, 1).0, 7 << 16 | PENDING_MAX);
    }

    #[test]
    fn a_version_may_wrap_without_touching_pending() {
        let words = forge::words(&[(!PENDING_MASK, 0)]);
        let intent = words.begin_write(&set(&[0])).expect("room");
        assert_eq!(forge::raw(&words, 0).0, 1);
        words.end_write(intent, None);
        assert_eq!(forge::raw(&words, 0).0, VERSION_ONE);
    }

    #[test]
    fn a_floor_voids_every_observation_and_asks_replicas_for_more() {
        let words = Words::new();
        let mine = set(&[11]);
        let before = words.observe(&mine);
        words.raise_floor(Lsn(500));
        assert!(!words.unmoved(&before));
        assert_eq!(words.observe(&mine).lsn(), Lsn(500));
        assert!(!words.observe(&mine).pending());
    }

    #[test]
    fn an_unplaced_write_lets_the_cache_go_on_but_no_replica() {
        let words = Words::new();
        let (mine, other) = (set(&[11]), set(&[12]));
        for set in [&mine, &other] {
            let intent = words.begin_write(set).expect("room");
            words.end_write(intent, Some(UNPLACED));
        }
        let seen = words.observe(&mine);
        assert!(!seen.pending() && words.unmoved(&seen));
        assert!(!crate::fresh::replica_answer_ok(seen.lsn(), Lsn(u64::MAX - 1)));
        words.place(mine.indexes().iter().copied().chain([40]), Lsn(90));
        assert_eq!(words.observe(&mine).lsn(), Lsn(90));
        assert_eq!(words.observe(&other).lsn(), UNPLACED);
        assert_eq!(words.observe(&set(&[40])).lsn(), Lsn(0));
        assert!(words.unmoved(&seen), "placing moves nothing");
    }

    #[test]
    fn a_read_of_anything_has_no_words_and_every_other_read_watches_g() {
        let (table, key) = (TableHash(1), KeyHash(2));
        assert_eq!(WordSet::for_read(&[Dependency::Anything].into_iter().collect()), None);
        let named = [Dependency::Keyless(table), Dependency::Key(table, key)].into_iter().collect();
        let read = WordSet::for_read(&named).expect("words");
        let opaque = WordSet::of(&[Dependency::Anything].into_iter().collect());
        assert!(read.contains_all(&opaque) && read.contains_all(&WordSet::of(&named)));
        assert!(WordSet::for_read(&Dependencies::new()).is_some_and(|set| set == opaque));
    }

    #[test]
    fn word_indexes_are_fixed_for_all_builds() {
        let (table, key) = (TableHash(0x0123_4567_89ab_cdef), KeyHash(42));
        let all =
            [Dependency::Anything, Dependency::Table(table), Dependency::Keyless(table), Dependency::Key(table, key)];
        assert_eq!(all.map(word_of), EXPECTED_WORDS);
    }

    const EXPECTED_WORDS: [u16; 4] = [9090, 65460, 42451, 63483];

    proptest! {
        #[test]
        fn sets_are_sorted_and_unique(indexes in proptest::collection::vec(any::<u16>(), 0..40)) {
            let set = WordSet::from_indexes(indexes.iter().copied());
            prop_assert!(set.indexes().windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(indexes.iter().all(|index| set.indexes().contains(index)));
        }

        /// Against a plain reference: after any sequence of begins and ends, pending counts open writes, versions count
        /// edges, and the LSN is the largest given.
        #[test]
        fn words_count_as_a_plain_model_does(
            steps in proptest::collection::vec((any::<bool>(), proptest::collection::vec(0_u16..4, 0..4), 0_u64..50), 0..60),
        ) {
            let words = Words::sized(4, 0);
            let mut plain = [(0_u64, 0_u64, 0_u64); 4];
            let mut open: Vec<Intent> = Vec::new();
            for (begin, indexes, lsn) in steps {
                if begin || open.is_empty() {
                    let set = WordSet::from_indexes(indexes);
                    set.indexes().iter().for_each(|&i| { plain[usize::from(i)].0 += 1; plain[usize::from(i)].1 += 1; });
                    open.push(words.begin_write(&set).expect("room"));
                } else {
                    let intent = open.swap_remove(lsn as usize % open.len());
                    let lsn = (lsn % 3 != 0).then_some(Lsn(lsn));
                    for &i in intent.words().indexes() {
                        let word = &mut plain[usize::from(i)];
                        *word = (word.0 + 1, word.1 - 1, word.2.max(lsn.map_or(0, |lsn| lsn.0)));
                    }
                    words.end_write(intent, lsn);
                }
            }
            for (index, (version, pending, lsn)) in plain.into_iter().enumerate() {
                prop_assert_eq!(forge::raw(&words, index), (version << 16 | pending, lsn));
            }
        }
    }

    /// Threads, not a model: writers publish a value between begin and end, readers bracket their load by two looks; a
    /// bracket that held must have seen the newest value whose writer had ended before the first look.
    #[test]
    fn brackets_hold_under_real_threads() {
        let (words, value, ended, stop) = (Words::sized(2, 0), Plain::new(0), Plain::new(0), AtomicBool::new(false));
        let mine = set(&[0, 1]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let ended = ended.load(Ordering::Relaxed);
                        let seen = words.observe(&mine);
                        let read = value.load(Ordering::Relaxed);
                        if words.unmoved(&seen) {
                            assert!(read >= ended, "read {read} after {ended} had ended");
                            assert!(seen.lsn().0 >= ended, "LSN {} after {ended} had ended", seen.lsn());
                            assert_eq!(read, seen.lsn().0, "a settled bracket sees exactly the last write");
                        }
                    }
                });
            }
            for number in 1..=20_000 {
                let intent = words.begin_write(&mine).expect("room");
                value.store(number, Ordering::Relaxed);
                words.end_write(intent, Some(Lsn(number)));
                ended.store(number, Ordering::Release);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
