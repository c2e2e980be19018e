//! The dependency words under every interleaving and every reordering that the memory model allows.
//!
//! The code is the product's own file, compiled against loom's atomics ([`weir_words::fresh::sync`]); it knows nothing of that. Writers
//! raise, make something visible, and lower; readers bracket a look at it with two looks at the words, fill a cache, and are served
//! from it. Mutants weaken the code from below (a fence that does nothing, an order that is relaxed, a store that comes late): each
//! must be caught, or the model proves nothing.
//!
//! Bounded: at most [`PREEMPTIONS`] unforced switches per run, as most real races need no more than two. loom takes `SeqCst`
//! accesses for acquire and release, which is weaker than what they are, so what holds here holds.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use weir_words::fresh::few_words;
use weir_words::fresh::sync::{Mutant, break_by, mutant_is};
use weir_words::fresh::words::{Observation, WordSet, Words};
use weir_words::id::Lsn;

/// Unforced switches between threads in one run.
const PREEMPTIONS: usize = 2;

fn the_word() -> WordSet {
    WordSet::from_indexes([0])
}

/// One register on a primary: its value is how often it was written, which is also its position in the log.
struct Desk {
    words: Words,
    visible: AtomicU64,
    acknowledged: AtomicU64,
}

impl Desk {
    fn new(words: usize) -> Arc<Desk> {
        let (visible, acknowledged) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Desk { words: few_words(words, 0), visible, acknowledged })
    }

    fn write(&self, set: &WordSet) {
        let intent = self.words.begin_write(set).expect("room");
        if mutant_is(Mutant::EarlyEnd) {
            let next = self.visible.load(Ordering::Relaxed) + 1;
            self.words.end_write(intent, Some(Lsn(next)));
            self.visible.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let number = self.visible.fetch_add(1, Ordering::Relaxed) + 1;
        self.words.end_write(intent, Some(Lsn(number)));
        self.acknowledged.fetch_max(number, Ordering::Release);
    }

    /// What was acknowledged, a look, the primary's value, and whether the second look agrees.
    fn read(&self, set: &WordSet) -> (u64, Observation, u64, bool) {
        let acknowledged = self.acknowledged.load(Ordering::Acquire);
        let seen = self.words.observe(set);
        let value = self.visible.load(Ordering::Relaxed);
        let holds = self.words.unmoved(&seen);
        (acknowledged, seen, value, holds)
    }
}

/// A bracket that held has seen exactly the last write, and the word has its LSN.
fn brackets() {
    let desk = Desk::new(1);
    let writers: Vec<_> = (0..2)
        .map(|_| {
            let desk = Arc::clone(&desk);
            thread::spawn(move || desk.write(&the_word()))
        })
        .collect();
    let (acknowledged, seen, value, holds) = desk.read(&the_word());
    if holds {
        assert!(value >= acknowledged, "read {value} after {acknowledged} was acknowledged");
        assert_eq!(value, seen.lsn().0, "a settled bracket sees exactly the last write");
    }
    for writer in writers {
        writer.join().expect("a writer");
    }
    let now = desk.words.observe(&the_word());
    assert!(!now.pending() && now.lsn() == Lsn(2), "all has come to rest: {now:?}");
}

/// A write of two words is seen through both or neither.
fn two_words() {
    let desk = Desk::new(2);
    let both = WordSet::from_indexes([0, 1]);
    let writer = {
        let (desk, both) = (Arc::clone(&desk), both.clone());
        thread::spawn(move || desk.write(&both))
    };
    for set in [both, WordSet::from_indexes([1])] {
        let (acknowledged, seen, value, holds) = desk.read(&set);
        if holds {
            assert!(value >= acknowledged);
            assert_eq!(value, seen.lsn().0, "both words tell of the last write");
        }
    }
    writer.join().expect("a writer");
}

/// What is filled is served only while it is true. `moves`: what happens to the register meanwhile.
fn served(moves: fn(&Desk)) {
    let desk = Desk::new(1);
    let cache: Arc<Mutex<Option<(Observation, u64)>>> = Arc::new(Mutex::new(None));
    let mover = {
        let desk = Arc::clone(&desk);
        thread::spawn(move || moves(&desk))
    };
    let filler = {
        let (desk, cache) = (Arc::clone(&desk), Arc::clone(&cache));
        thread::spawn(move || {
            let (_, seen, value, holds) = desk.read(&the_word());
            if holds {
                *cache.lock().expect("unpoisoned") = Some((seen, value));
            }
        })
    };
    for _ in 0..2 {
        let acknowledged = desk.acknowledged.load(Ordering::Acquire);
        let now = desk.words.observe(&the_word());
        let entry = cache.lock().expect("unpoisoned").clone();
        if let Some((seen, value)) = entry
            && seen.same_moment(&now)
        {
            assert!(value >= acknowledged, "served {value} after {acknowledged} was acknowledged");
        }
    }
    mover.join().expect("a writer");
    filler.join().expect("a filler");
    let (now, entry) = (desk.words.observe(&the_word()), cache.lock().expect("unpoisoned").clone());
    if let Some((seen, value)) = entry
        && seen.same_moment(&now)
    {
        assert_eq!(value, desk.visible.load(Ordering::Relaxed), "what is served for ever is true");
    }
}

fn served_beside_a_writer() {
    served(|desk| desk.write(&the_word()));
}

/// A write that was seen elsewhere: there is no intent, only a floor before anybody hears of it.
fn served_beside_a_floor() {
    served(|desk| {
        desk.visible.fetch_add(1, Ordering::Relaxed);
        desk.words.raise_floor(Lsn(1));
        desk.acknowledged.fetch_max(1, Ordering::Release);
    });
}

/// A stamp that was taken over counts the writes that end meanwhile: at rest, equal stamps are those of equal writes.
fn stamps() {
    let (here, there) = (Arc::new(few_words(1, 1)), Arc::new(few_words(1, 2)));
    let writer = {
        let (here, there) = (Arc::clone(&here), Arc::clone(&there));
        thread::spawn(move || {
            let own = here.begin_write(&the_word()).expect("room").named(7, 1);
            let heard = there.begin_write(&the_word()).expect("room").named(7, 1);
            here.end_write(own, None);
            there.end_write(heard, None);
        })
    };
    let mine = there.settled_stamps(0, 1)[0];
    let theirs = here.settled_stamps(0, 1)[0];
    let taken = match (mine, theirs) {
        (Some(mine), Some((_, theirs))) => there.take_stamp(0, mine, theirs),
        _ => false,
    };
    writer.join().expect("a writer");
    let at_rest = |words: &Words| words.settled_stamps(0, 1)[0].map(|(_, stamp)| stamp);
    assert!(!taken || at_rest(&here) == at_rest(&there), "both have seen the same writes");
}

/// Does it hold in every run?
fn holds(play: fn(), mutant: Mutant) -> bool {
    // A thread of its own: what loom keeps per thread does not outlive a failure.
    let played = std::thread::spawn(move || {
        break_by(mutant);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(PREEMPTIONS);
        model.check(play);
    });
    played.join().is_ok()
}

#[test]
fn a_bracket_that_held_has_seen_exactly_the_last_write() {
    assert!(holds(brackets, Mutant::None));
}

#[test]
fn a_write_of_two_words_is_seen_through_both_or_neither() {
    assert!(holds(two_words, Mutant::None));
}

#[test]
fn what_is_filled_is_served_only_while_it_is_true() {
    assert!(holds(served_beside_a_writer, Mutant::None));
}

#[test]
fn a_floor_voids_what_was_filled() {
    assert!(holds(served_beside_a_floor, Mutant::None));
}

#[test]
fn equal_stamps_are_those_of_equal_writes() {
    assert!(holds(stamps, Mutant::None));
}

#[test]
fn broken_orders_are_caught() {
    let broken: [(Mutant, &str, fn()); 8] = [
        (Mutant::NoFence, "brackets", brackets),
        (Mutant::Relaxed, "brackets", brackets),
        (Mutant::Relaxed, "served_beside_a_writer", served_beside_a_writer),
        (Mutant::StateBeforeLsn, "brackets", brackets),
        (Mutant::StateBeforeLsn, "two_words", two_words),
        (Mutant::NothingPending, "brackets", brackets),
        (Mutant::EarlyEnd, "brackets", brackets),
        (Mutant::BlindStamp, "stamps", stamps),
    ];
    let missed: Vec<String> = broken
        .into_iter()
        .filter(|(mutant, _, play)| holds(*play, *mutant))
        .map(|(mutant, name, _)| format!("{mutant:?} in {name}"))
        .collect();
    assert_eq!(missed, Vec::<String>::new());
}
