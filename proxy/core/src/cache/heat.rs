//! Words that are written more often than what depends on them is read: nothing is kept for them for a while.
//!
//! An entry that is void before it is asked for again costs the holding back and copying of a reply and gives nothing. So each
//! word has a small score: up when an entry is found void because this word has moved, once for each version however many find
//! one (a stampede after one write is no reason to keep nothing), down when an entry that depends on it answers. Above a threshold nothing is filled, but for one reply in sixteen: if that one answers again and again, the
//! score falls, and all are filled as before. That is the decay; no clock takes part. Well below it, what is filled is no longer shared
//! with other processes, which costs more than keeping it.
//!
//! Invariant: none that answers depend on; a lost update costs a fill or spares one. Non-goals: what is still pending (it cannot
//! be filled anyway), and which keys are read most.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};

use crate::fresh::{Observation, WORDS, WordSet};

/// From here on nothing is filled.
const HOT: u8 = 16;
/// From here on what is filled stays here: others would hardly find it before it is void.
const WARM: u8 = 4;
/// Scores do not grow beyond this, so that a word is forgiven after half as many answers.
const SCORE_MAX: u8 = 32;
/// While a word is hot, one in so many fills is let through.
const PROBE: u32 = 16;

/// The scores of all words: 128 KiB. Shards share them; that can only spare a fill, or cost one.
pub struct Heat {
    /// Low byte: the score. High byte: the end of the version that was counted last.
    scores: Box<[AtomicU16]>,
    refused: AtomicU32,
}

impl Default for Heat {
    fn default() -> Self {
        Heat { scores: (0..WORDS).map(|_| AtomicU16::new(0)).collect(), refused: AtomicU32::new(0) }
    }
}

impl Heat {
    /// An entry that depends on these words has answered. Costs a load per word while they are cold.
    pub fn answered(&self, words: &WordSet) {
        for &index in words.indexes() {
            let score = &self.scores[usize::from(index)];
            let now = score.load(Relaxed);
            if score_of(now) > 0 {
                score.store(now - 1, Relaxed);
            }
        }
    }

    /// An entry that was filled at `then` is void `now`.
    pub fn void(&self, then: &Observation, now: &Observation) {
        if then.words() != now.words() {
            return;
        }
        let versions = then.versions().iter().zip(now.versions());
        for (&index, (before, after)) in then.words().indexes().iter().zip(versions) {
            if before != after {
                let score = &self.scores[usize::from(index)];
                let [counted, old] = score.load(Relaxed).to_be_bytes();
                let version = *after as u8;
                if counted != version {
                    score.store(u16::from_be_bytes([version, (old + 1).min(SCORE_MAX)]), Relaxed);
                }
            }
        }
    }

    /// Is a reply that depends on these words not worth keeping?
    pub fn is_hot(&self, words: &WordSet) -> bool {
        self.has_reached(HOT, words) && !self.refused.fetch_add(1, Relaxed).is_multiple_of(PROBE)
    }

    /// Is a reply that depends on these words not worth telling other processes of, nor to be looked for among theirs?
    pub fn is_warm(&self, words: &WordSet) -> bool {
        self.has_reached(WARM, words)
    }

    fn has_reached(&self, threshold: u8, words: &WordSet) -> bool {
        words.indexes().iter().any(|&index| score_of(self.scores[usize::from(index)].load(Relaxed)) >= threshold)
    }
}

fn score_of(score: u16) -> u8 {
    score.to_be_bytes()[1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fresh::Words;

    /// Reads and writes of one key in turn, as a cache would see them; gives how many of `reads` were filled and how many hits
    /// there were.
    fn run(heat: &Heat, words: &Words, reads: usize, writes_per_read: f64) -> (usize, usize) {
        let set = WordSet::from_indexes([1, 7, 900]);
        let key = WordSet::from_indexes([900]);
        let (mut entry, mut filled, mut hits, mut due) = (None::<Observation>, 0, 0, 0.0);
        for _ in 0..reads {
            due += writes_per_read;
            while due >= 1.0 {
                let intent = words.begin_write(&key).expect("room");
                words.end_write(intent, None);
                due -= 1.0;
            }
            let now = words.observe(&set);
            match entry.take() {
                Some(then) if then.same_moment(&now) => {
                    heat.answered(&set);
                    hits += 1;
                    entry = Some(then);
                    continue;
                }
                Some(then) => heat.void(&then, &now),
                None => {}
            }
            if !heat.is_hot(&set) {
                entry = Some(now);
                filled += 1;
            }
        }
        (filled, hits)
    }

    #[test]
    fn many_that_find_one_write_are_one() {
        let (heat, words, set) = (Heat::default(), Words::new(), WordSet::from_indexes([900]));
        let then = words.observe(&set);
        let intent = words.begin_write(&set).expect("room");
        words.end_write(intent, None);
        for _ in 0..1000 {
            heat.void(&then, &words.observe(&set));
            assert!(!heat.is_hot(&set));
        }
    }

    #[test]
    fn what_is_read_more_often_than_written_is_always_filled() {
        for writes_per_read in [0.0, 0.05, 0.1, 0.4] {
            let (heat, words) = (Heat::default(), Words::new());
            let (filled, hits) = run(&heat, &words, 10_000, writes_per_read);
            assert!(!heat.is_warm(&WordSet::from_indexes([900])), "{writes_per_read}: nor was it kept from others");
            assert_eq!(filled + hits, 10_000, "{writes_per_read}: no fill was refused");
            assert!(hits as f64 >= 10_000.0 * (0.99 - writes_per_read), "{writes_per_read}: {hits}");
        }
    }

    #[test]
    fn what_is_written_before_every_read_is_hardly_filled() {
        let (heat, words) = (Heat::default(), Words::new());
        let (filled, hits) = run(&heat, &words, 10_000, 1.0);
        assert!(filled <= 10_000 / PROBE as usize + 2 * usize::from(HOT), "{filled}");
        assert_eq!(hits, 0);
        assert!(heat.is_warm(&WordSet::from_indexes([900])));
        // And it is forgiven when the writes end.
        let (_, hits) = run(&heat, &words, 10_000, 0.0);
        assert!(hits > 9_900, "{hits}");
        assert!(!heat.is_hot(&WordSet::from_indexes([900])) && !heat.is_warm(&WordSet::from_indexes([900])));
    }

    #[test]
    fn only_the_word_that_moved_is_blamed() {
        let (heat, words) = (Heat::default(), Words::new());
        run(&heat, &words, 1_000, 1.0);
        assert!((0..PROBE).any(|_| heat.is_hot(&WordSet::from_indexes([900]))));
        assert!((0..2 * PROBE).all(|_| !heat.is_hot(&WordSet::from_indexes([1, 7, 901]))));
    }
}
