//! Answers that may be served for a while after they have been overtaken: only where all their tables opt in
//! (`stale_while_revalidate`), and never beyond the time that is allowed.
//!
//! Invariant: an answer is served so only if it was the truth at some moment within that time. That moment is a look at its words
//! which found it true, or the one just before it was asked for; no clock stands in the words. What a FLUSH or a change of the schema
//! moves is looked at besides ([`WordSet::firm`]), and voids it at once. A session never gets one from before a write of its own.
//!
//! Bounds: one refresh of an entry at a time. Non-goals: running it (`crate::exec::stale`).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use weir_core::fresh::{Dependencies, Observation, WordSet, Words};

/// A refresh that has not filled the entry after so long is not waited for any more: another may begin.
const REFRESH_MAX: Duration = Duration::from_secs(1);

/// What a read that may be answered so starts with, before it looks at its words.
#[derive(Clone, Debug)]
pub struct Lenient {
    pub firm: Observation,
    pub asked: Instant,
    /// For how many milliseconds an answer may have been overtaken, at most.
    pub stale_ms: u32,
}

impl Lenient {
    pub fn now(words: &Words, reads: &Dependencies, stale_ms: u32) -> Self {
        // In this order: the answer is to be younger than both.
        let asked = Instant::now();
        Lenient { firm: words.observe(&WordSet::firm(reads)), asked, stale_ms }
    }
}

/// What is kept beside an entry that may be served so.
#[derive(Debug)]
pub(super) struct Grace {
    pub(super) firm: Observation,
    /// Before its answer was asked for.
    asked: Instant,
    /// When it was last known to be the truth, in microseconds after `asked`.
    true_us: AtomicU64,
    /// When a refresh began, in microseconds after `asked`; 0: none has.
    refresh_us: AtomicU64,
}

impl Grace {
    pub(super) fn of(lenient: &Lenient) -> Self {
        let (true_us, refresh_us) = (AtomicU64::new(0), AtomicU64::new(0));
        Grace { firm: lenient.firm.clone(), asked: lenient.asked, true_us, refresh_us }
    }

    /// It was found true by a look that came after `looked`.
    pub(super) fn is_true(&self, looked: Instant) {
        self.true_us.fetch_max(self.us(looked), Relaxed);
    }

    /// When it was last known to be the truth.
    pub(super) fn true_at(&self) -> Instant {
        self.asked + Duration::from_micros(self.true_us.load(Relaxed))
    }

    /// How long ago that was.
    pub(super) fn true_ms_ago(&self, now: Instant) -> u64 {
        // Rounded up: never beyond what is allowed.
        self.us(now).saturating_sub(self.true_us.load(Relaxed)).div_ceil(1_000)
    }

    /// Is it the caller who refreshes it?
    pub(super) fn begins_refresh(&self, now: Instant) -> bool {
        let (now_us, last_us) = (self.us(now).max(1), self.refresh_us.load(Relaxed));
        let due = last_us == 0 || now_us.saturating_sub(last_us) >= REFRESH_MAX.as_micros() as u64;
        due && self.refresh_us.compare_exchange(last_us, now_us, Relaxed, Relaxed).is_ok()
    }

    fn us(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.asked).as_micros() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_refresh_at_a_time_and_ages_from_the_last_time_it_was_true() {
        let words = Words::new();
        let lenient = Lenient::now(&words, &Dependencies::new(), 500);
        let grace = Grace::of(&lenient);
        let after = |ms| lenient.asked + Duration::from_millis(ms);
        assert_eq!((grace.true_ms_ago(after(0)), grace.true_ms_ago(after(70))), (0, 70));
        grace.is_true(after(50));
        grace.is_true(after(20));
        assert_eq!((grace.true_ms_ago(after(70)), grace.true_ms_ago(after(40))), (20, 0));
        assert!(grace.begins_refresh(after(100)) && !grace.begins_refresh(after(101)));
        assert!(!grace.begins_refresh(after(1_099)) && grace.begins_refresh(after(1_100)));
    }
}
