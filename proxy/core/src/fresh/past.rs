//! Where the primary was, and when: what it takes to say that a replica is no further behind than so many milliseconds.
//!
//! Invariant: a position is noted with the time just before it was asked for, so it covers everything that was acknowledged
//! before that time; a replica that has replayed it shows all of that. No clock of another machine takes part, and nothing is
//! guessed from what a replica said some time ago.
//!
//! Bounds: three rings, coarser the older they are. Non-goal: asking (the LSN clock's).

use std::collections::VecDeque;

use crate::id::Lsn;

/// Least time between two positions of each ring, in milliseconds.
const GAPS_MS: [u64; 3] = [1, 50, 5_000];
/// Positions each ring keeps: about a quarter of a second, thirteen seconds, twenty minutes.
const KEPT: usize = 256;

/// The positions of one primary, newest last.
#[derive(Debug, Default)]
pub struct Past {
    rings: [VecDeque<(u64, Lsn)>; GAPS_MS.len()],
}

impl Past {
    /// The primary was asked at `asked_ms`, on a clock that does not run backwards, and said `position`.
    pub fn note(&mut self, asked_ms: u64, position: Lsn) {
        for (ring, gap_ms) in self.rings.iter_mut().zip(GAPS_MS) {
            if ring.back().is_some_and(|(newest_ms, _)| asked_ms < newest_ms + gap_ms) {
                continue;
            }
            if ring.len() == KEPT {
                ring.pop_front();
            }
            ring.push_back((asked_ms, position));
        }
    }

    /// The oldest known position that was asked for at `since_ms` or later.
    pub fn since(&self, since_ms: u64) -> Option<Lsn> {
        let oldest = |ring: &VecDeque<(u64, Lsn)>| {
            let at = ring.partition_point(|(asked_ms, _)| *asked_ms < since_ms);
            ring.get(at).copied()
        };
        self.rings.iter().filter_map(oldest).min_by_key(|(asked_ms, _)| *asked_ms).map(|(_, position)| position)
    }

    /// When a position at or past `need` was first known to be the primary's, as far as that is remembered.
    pub fn reached(&self, need: Lsn) -> Option<u64> {
        let first = |ring: &VecDeque<(u64, Lsn)>| {
            let at = ring.partition_point(|(_, position)| *position < need);
            ring.get(at).map(|(asked_ms, _)| *asked_ms)
        };
        self.rings.iter().filter_map(first).min()
    }

    /// Positions of before mean nothing any more: the primary is another one, or was restarted.
    pub fn clear(&mut self) {
        self.rings.iter_mut().for_each(VecDeque::clear);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_oldest_position_that_is_young_enough_counts() {
        let mut past = Past::default();
        assert_eq!(past.since(0), None);
        for ms in [10, 20, 20, 30] {
            past.note(ms, Lsn(ms * 100));
        }
        assert_eq!(
            [0, 10, 11, 20, 30].map(|ms| past.since(ms)),
            [1000, 1000, 2000, 2000, 3000].map(|at| Some(Lsn(at)))
        );
        assert_eq!(past.since(31), None);
        let reached = [1, 1000, 1001, 3000, 3001].map(|need| past.reached(Lsn(need)));
        assert_eq!(reached, [Some(10), Some(10), Some(20), Some(30), None]);
        past.clear();
        assert_eq!(past.since(0), None);
    }

    #[test]
    fn an_hour_of_positions_stays_small_and_reaches_back() {
        let mut past = Past::default();
        for ms in 0..3_600_000_u64 {
            past.note(ms, Lsn(ms));
        }
        assert!(past.rings.iter().all(|ring| ring.len() <= KEPT));
        // Asked for what is no more than this old, it has something nearly as old.
        for (ago_ms, slack_ms) in [(10, 1), (200, 1), (1_000, 50), (10_000, 50), (60_000, 5_000), (1_000_000, 5_000)] {
            let since_ms = 3_599_999 - ago_ms;
            let found = past.since(since_ms).expect("known").0;
            assert!((since_ms..=since_ms + slack_ms).contains(&found), "{ago_ms}: {found}");
        }
    }

    proptest! {
        /// Whatever was noted, the answer is never older than was asked for, and there is one if anything is young enough.
        #[test]
        fn never_older_than_asked_for(steps in proptest::collection::vec(0_u64..400, 1..600), since_ms in 0_u64..60_000) {
            let mut past = Past::default();
            let mut now = 0;
            for step in steps {
                now += step;
                past.note(now, Lsn(now));
            }
            match past.since(since_ms) {
                Some(found) => prop_assert!(found.0 >= since_ms),
                // The newest position may have been skipped by a gap of one millisecond only, never by more.
                None => prop_assert!(now < since_ms + GAPS_MS[0]),
            }
        }
    }
}
