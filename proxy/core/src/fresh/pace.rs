//! How long a replica takes to show what the primary has, and whether a read should wait for it.
//!
//! Measured, not computed from bytes: replay that is delayed on purpose, that waits for WAL or that is busy looks alike here. A
//! sample is the time from when a position was the primary's to when the replica was seen to have replayed it. Invariant: none that
//! answers depend on; a wrong guess costs a wait in vain, or a statement on the primary. Non-goal: proving freshness
//! ([`super::replica_answer_ok`]).
//!
//! Times are microseconds on any clock that does not run backwards.

/// What was remembered beyond this is forgotten as soon as a position arrives.
const TAKES_US_MAX: u64 = 1_000_000;
/// A replica that is not worth waiting for is waited for all the same so often, by one read: it may have become quicker.
const TRIAL_US: u64 = 100_000;

/// The pace of one replica.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// `None`: not measured yet.
    takes_us: Option<u64>,
    /// When a read last began to wait that was not likely to succeed.
    tried_us: Option<u64>,
}

impl Pace {
    /// A position that was the primary's `took_us` ago was just seen to be replayed.
    pub fn arrived(&mut self, took_us: u64) {
        let known = self.takes_us.filter(|known_us| *known_us <= TAKES_US_MAX);
        self.takes_us = Some(known.map_or(took_us, |known_us| known_us.midpoint(took_us)));
    }

    /// A position that was the primary's `took_us` ago is still not replayed. Twice that is what it is thought to take: else every
    /// read would find that it must be there any moment, as long as replay stands still.
    pub fn in_vain(&mut self, took_us: u64) {
        let doubled_us = took_us.saturating_mul(2);
        self.takes_us = Some(self.takes_us.map_or(doubled_us, |known_us| known_us.max(doubled_us)));
    }

    /// How long it will take until the replica has what was the primary's `age_us` ago. `None`: not measured yet.
    pub fn expected_us(&self, age_us: u64) -> Option<u64> {
        self.takes_us.map(|takes_us| takes_us.saturating_sub(age_us))
    }

    /// Should a read that needs what was the primary's `age_us` ago wait, if it may do so for `wait_us_max`?
    pub fn is_worth_a_wait(&mut self, age_us: u64, wait_us_max: u64, now_us: u64) -> bool {
        if self.expected_us(age_us).is_some_and(|expected_us| expected_us <= wait_us_max) {
            return true;
        }
        let due = self.tried_us.is_none_or(|tried_us| now_us.saturating_sub(tried_us) >= TRIAL_US);
        if due {
            self.tried_us = Some(now_us);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_US: u64 = 5_000;

    #[test]
    fn what_is_nearly_there_is_waited_for_and_what_is_far_is_not() {
        let mut pace = Pace::default();
        assert!(pace.is_worth_a_wait(0, MAX_US, 0), "nothing is known: try");
        for _ in 0..8 {
            pace.arrived(8_000);
        }
        assert!(!pace.is_worth_a_wait(0, MAX_US, 1), "8 ms are more than 5");
        assert!(pace.is_worth_a_wait(3_000, MAX_US, 1), "5 ms are left");
        assert!(pace.is_worth_a_wait(60_000_000, MAX_US, 1), "it should be there any moment");
        assert_eq!(pace.expected_us(2_000), Some(6_000));
    }

    #[test]
    fn a_replica_that_stands_still_is_tried_now_and_then_and_found_again() {
        let mut pace = Pace::default();
        pace.arrived(1_000);
        let (mut waits, mut now_us) = (0, 0);
        // Replay is paused for ten seconds; a read comes every millisecond.
        for _ in 0..10_000 {
            now_us += 1_000;
            if pace.is_worth_a_wait(now_us.min(2_000_000), MAX_US, now_us) && now_us < 10_000_000 {
                waits += 1;
                pace.in_vain(now_us.min(2_000_000) + MAX_US);
            }
        }
        assert!((50..=120).contains(&waits), "{waits}");
        let mut trials = 0;
        while !pace.is_worth_a_wait(0, MAX_US, now_us) || pace.expected_us(0) > Some(MAX_US) {
            now_us += TRIAL_US;
            trials += 1;
            pace.arrived(1_000);
        }
        assert!(trials <= 10, "{trials}");
    }
}
