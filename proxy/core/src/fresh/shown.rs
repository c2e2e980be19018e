//! Which decoded transactions need no word moved, because all their words have moved since they became visible.
//!
//! Most of what is decoded came through weir, which has moved its words already; to move them again would only void what
//! was read in between. Invariant: a word is settled after the reading of the clock that ends its writes, and whatever was
//! read before is void from then on; so what is valid now was read after that reading, and shows all that its snapshot shows.
//! If every word of a transaction was settled by a reading that shows the transaction, nothing valid now can lack it.
//!
//! It does not matter who wrote, or what else moved the words before or after. Bounds: a ring of readings; of older ones
//! nothing is claimed. Non-goal: asking (the LSN clock's).

use std::collections::VecDeque;

use super::decoded::Snapshot;
use super::words::{WORDS, WordSet};

/// Readings that are kept: at one per millisecond, the transactions of a quarter of a second.
const KEPT: usize = 256;

/// The readings of one primary that settled words, newest last.
#[derive(Debug)]
pub struct Shown {
    /// Number of the last reading; the first has 1.
    last: u64,
    readings: VecDeque<Snapshot>,
    /// By word: the last reading that settled it; 0: none did.
    settled: Box<[u64]>,
}

impl Default for Shown {
    fn default() -> Self {
        Shown { last: 0, readings: VecDeque::with_capacity(KEPT), settled: vec![0; WORDS].into() }
    }
}

impl Shown {
    /// A reading: the snapshot was taken by the primary after the writes of `words` were handed over, and their words have been
    /// settled since.
    pub fn note(&mut self, snapshot: Snapshot, words: impl IntoIterator<Item = u16>) {
        if self.readings.len() == KEPT {
            self.readings.pop_front();
        }
        self.readings.push_back(snapshot);
        self.last += 1;
        for word in words {
            self.settled[usize::from(word)] = self.last;
        }
    }

    /// Is nothing that is valid now older than transaction `xid`, which moved `words`? False also where that is not known.
    pub fn covers(&self, xid: u32, words: &WordSet) -> bool {
        words
            .indexes()
            .iter()
            .all(|word| self.reading(self.settled[usize::from(*word)]).is_some_and(|it| it.shows(xid)))
    }

    /// The primary is another one, or was restarted: transaction numbers mean something else.
    pub fn clear(&mut self) {
        *self = Shown { last: self.last, ..Shown::default() };
    }

    fn reading(&self, number: u64) -> Option<&Snapshot> {
        let first = self.last + 1 - self.readings.len() as u64;
        self.readings.get(usize::try_from(number.checked_sub(first)?).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        Snapshot::parse(text).expect("a snapshot")
    }

    fn words(indexes: &[u16]) -> WordSet {
        WordSet::from_indexes(indexes.iter().copied())
    }

    #[test]
    fn only_what_every_word_has_seen_is_covered() {
        let mut shown = Shown::default();
        assert!(!shown.covers(5, &words(&[1])), "nothing is known yet");
        shown.note(snapshot("10:12:10"), [1, 2]);
        assert!(shown.covers(9, &words(&[1, 2])) && shown.covers(11, &words(&[2])));
        assert!(!shown.covers(10, &words(&[1])), "under way at the reading");
        assert!(!shown.covers(12, &words(&[1])), "begun after it");
        assert!(!shown.covers(9, &words(&[1, 3])), "one word has not moved");
        shown.note(snapshot("12:12:"), [1]);
        assert!(shown.covers(10, &words(&[1])) && !shown.covers(10, &words(&[2])), "each word has its own reading");
    }

    #[test]
    fn of_readings_that_are_forgotten_nothing_is_claimed() {
        let mut shown = Shown::default();
        shown.note(snapshot("10:10:"), [1]);
        for _ in 0..KEPT - 1 {
            shown.note(snapshot("20:20:"), [2]);
        }
        assert!(shown.covers(9, &words(&[1])), "the oldest that is kept");
        shown.note(snapshot("20:20:"), [2]);
        assert!(!shown.covers(9, &words(&[1])) && shown.covers(9, &words(&[2])));
        shown.clear();
        assert!(!shown.covers(9, &words(&[2])));
        shown.note(snapshot("30:30:"), [3]);
        assert!(shown.covers(9, &words(&[3])) && !shown.covers(9, &words(&[2])), "numbers go on after a new start");
    }
}
