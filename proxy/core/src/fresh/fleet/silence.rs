//! Who does not answer, where proxies push.
//!
//! Invariant: questions are counted, not time: a process that was stopped itself finds old answers when it goes on, and nobody to
//! blame. Non-goals: whether this proxy may serve; that is for how long the last answers hold.

use std::collections::BTreeMap;

/// Questions without an answer after which somebody is put out. They are asked every third of a lease, so nothing has been
/// served for a while by then.
const UNANSWERED_MAX: u32 = 5;

#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(super) struct Silence {
    counted_at_us: u64,
    /// By member.
    answers: BTreeMap<u64, Answers>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
struct Answers {
    /// When the question was asked that was answered last; 0: none was.
    until_us: u64,
    unanswered: u32,
}

impl Silence {
    /// Everybody was just asked. `answers`: all members, and the questions that they have answered. Counts once in `every_us`.
    pub fn note(&mut self, now_us: u64, every_us: u64, answers: Vec<(u64, u64)>) {
        if now_us < self.counted_at_us + every_us {
            return;
        }
        self.counted_at_us = now_us;
        let before = std::mem::take(&mut self.answers);
        for (id, until_us) in answers {
            let known = before.get(&id).copied().unwrap_or_default();
            let unanswered = if until_us > known.until_us { 0 } else { known.unanswered + 1 };
            self.answers.insert(id, Answers { until_us, unanswered });
        }
    }

    /// Has it answered of late?
    pub fn is_heard(&self, id: u64) -> bool {
        self.answers.get(&id).is_some_and(|answers| answers.unanswered < 2)
    }

    /// Has it left so many questions unanswered that it may be dead?
    pub fn is_long(&self, id: u64) -> bool {
        self.answers.get(&id).is_some_and(|answers| answers.unanswered >= UNANSWERED_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY_US: u64 = 10;

    #[test]
    fn questions_are_counted_and_not_time() {
        let mut silence = Silence::default();
        (0..5).for_each(|round| silence.note(100 + round * 10, EVERY_US, vec![(7, 1)]));
        assert!(!silence.is_long(7) && !silence.is_heard(7));
        // In quick succession they count as one, and time alone as none.
        silence.note(141, EVERY_US, vec![(7, 1)]);
        assert!(!silence.is_long(7));
        silence.note(1_000_000, EVERY_US, vec![(7, 1)]);
        assert!(silence.is_long(7));
        silence.note(2_000_000, EVERY_US, vec![(7, 1_999_999), (8, 0)]);
        assert!(silence.is_heard(7) && !silence.is_long(7) && !silence.is_long(8));
    }
}
