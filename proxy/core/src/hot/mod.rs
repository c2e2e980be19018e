//! The keys that are asked for most, in bounded memory: Space-Saving (Metwally, Agrawal, El Abbadi 2005) with decay.
//!
//! Invariant: after `total` (decayed) records on `places` places, an estimate is never below the true count and at most
//! `total / places` above it, so a key with more than that is always among the places. Half of everything is forgotten every
//! [`HALF_LIFE_MS`], rounded down: what counts is the last minutes. Non-goals: sampling (the caller's, by weight) and names of tables.

use std::hash::Hash;

use hashbrown::HashMap;

use crate::fresh::{KeyHash, TableHash};

/// After so long, counts weigh half.
pub const HALF_LIFE_MS: u64 = 60_000;

/// What is counted. Without a key: the table as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Subject {
    pub table: TableHash,
    pub key: Option<KeyHash>,
}

/// What was done with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// A read that a server answered.
    Read,
    /// A read that the cache, or another reader's answer, has spared the servers.
    Hit,
    Write,
}

/// One place, for one subject; `N` is what it is known by besides.
#[derive(Clone, PartialEq, Debug)]
pub struct Hot<S = Subject, N = Box<str>> {
    pub subject: S,
    /// At least the true count; `error` of it may be others'.
    pub count: u64,
    pub error: u64,
    /// Since it has its place; reads include hits.
    pub reads: u64,
    pub hits: u64,
    pub writes: u64,
    /// Its name (of a key: as text), if somebody knew it.
    pub text: Option<N>,
}

/// Counts of one database.
#[derive(Debug)]
pub struct Sketch<S = Subject, N = Box<str>> {
    hot: Vec<Hot<S, N>>,
    index: HashMap<S, usize>,
    places: usize,
    total: u64,
    halved_ms: u64,
}

impl<S: Copy + Ord + Hash, N: Clone> Sketch<S, N> {
    pub fn new(places: usize) -> Self {
        Sketch { hot: Vec::new(), index: HashMap::new(), places: places.max(1), total: 0, halved_ms: 0 }
    }

    /// Counts `weight` uses of `subject` at `now_ms`. `text` is asked for only when the key is not known as text yet.
    pub fn record(&mut self, subject: S, (used, weight): (Use, u64), now_ms: u64, text: impl FnOnce() -> Option<N>) {
        self.decay(now_ms);
        self.total += weight;
        let at = match self.index.get(&subject) {
            Some(at) => *at,
            None => self.take_place(subject),
        };
        let one = &mut self.hot[at];
        one.count += weight;
        match used {
            Use::Read => one.reads += weight,
            Use::Hit => (one.reads, one.hits) = (one.reads + weight, one.hits + weight),
            Use::Write => one.writes += weight,
        }
        if one.text.is_none() {
            one.text = text();
        }
    }

    /// A free place, or that of the one with the least count, which the newcomer may have had all along.
    fn take_place(&mut self, subject: S) -> usize {
        let fresh = |error| Hot { subject, count: error, error, reads: 0, hits: 0, writes: 0, text: None };
        if self.hot.len() < self.places {
            self.hot.push(fresh(0));
            self.index.insert(subject, self.hot.len() - 1);
            return self.hot.len() - 1;
        }
        let least = self.hot.iter().enumerate().min_by_key(|(_, one)| one.count).map_or(0, |(at, _)| at);
        self.index.remove(&self.hot[least].subject);
        self.hot[least] = fresh(self.hot[least].count);
        self.index.insert(subject, least);
        least
    }

    fn decay(&mut self, now_ms: u64) {
        let lives = now_ms.saturating_sub(self.halved_ms) / HALF_LIFE_MS;
        if lives == 0 {
            return;
        }
        self.halved_ms += lives * HALF_LIFE_MS;
        let by = lives.min(63) as u32;
        self.total >>= by;
        for one in &mut self.hot {
            for part in [&mut one.count, &mut one.error, &mut one.reads, &mut one.hits, &mut one.writes] {
                *part >>= by;
            }
        }
        self.hot.retain(|one| one.count > 0);
        self.index = self.hot.iter().enumerate().map(|(at, one)| (one.subject, at)).collect();
    }

    /// The hottest first, and how many records there were in all, both as of `now_ms`.
    pub fn hottest(&mut self, now_ms: u64, most: usize) -> (Vec<Hot<S, N>>, u64) {
        self.decay(now_ms);
        let mut hot: Vec<Hot<S, N>> = self.hot.iter().filter(|one| one.count > one.error).cloned().collect();
        hot.sort_by_key(|one| (std::cmp::Reverse(one.count - one.error), one.subject));
        hot.truncate(most);
        (hot, self.total)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subject(key: u64) -> Subject {
        Subject { table: TableHash(1), key: Some(KeyHash(key)) }
    }

    /// A key of Zipf's law over 10,000 keys, from a number in 0..1.
    fn zipf(uniform: f64) -> u64 {
        10_000_f64.powf(uniform) as u64
    }

    fn filled(sketch: &mut Sketch, uniforms: &[f64]) -> HashMap<u64, u64> {
        let mut exact = HashMap::new();
        for uniform in uniforms {
            let key = zipf(*uniform);
            *exact.entry(key).or_insert(0) += 1;
            sketch.record(subject(key), (Use::Read, 1), 0, || None);
        }
        exact
    }

    proptest! {
        /// Against exact counts: never below, at most `total / places` above, and nothing above that is missing.
        #[test]
        fn estimates_are_within_their_bound(
            uniforms in proptest::collection::vec(0.0..1.0_f64, 1..3000),
            places in 1_usize..64,
        ) {
            let mut sketch = Sketch::new(places);
            let exact = filled(&mut sketch, &uniforms);
            let bound = uniforms.len() as u64 / places as u64;
            prop_assert!(sketch.hot.len() <= places && sketch.index.len() == sketch.hot.len());
            for one in &sketch.hot {
                let truth = exact[&one.subject.key.expect("keyed").0];
                prop_assert!(one.count >= truth && one.count - one.error <= truth && one.error <= bound);
            }
            for (key, truth) in &exact {
                prop_assert!(*truth <= bound || sketch.index.contains_key(&subject(*key)), "{key}: {truth}");
            }
        }
    }

    proptest! {
        // Twenty thousand draws each.
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_hottest_of_zipf_are_found(seed in 0_u64..1000) {
            let mut state = seed;
            let uniforms: Vec<f64> = (0..20_000).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 11) as f64 / (1_u64 << 53) as f64
            }).collect();
            let mut sketch = Sketch::new(256);
            filled(&mut sketch, &uniforms);
            let (hottest, total) = sketch.hottest(0, 5);
            prop_assert_eq!(total, 20_000);
            let keys: Vec<u64> = hottest.iter().map(|one| one.subject.key.expect("keyed").0).collect();
            prop_assert!(keys.starts_with(&[1, 2]), "{:?}", keys);
            prop_assert!(keys.iter().all(|key| *key <= 8), "{:?}", keys);
        }
    }

    #[test]
    fn uses_are_told_apart_and_forgotten() {
        let mut sketch: Sketch = Sketch::new(4);
        sketch.record(subject(1), (Use::Read, 16), 0, || Some("one".into()));
        sketch.record(subject(1), (Use::Hit, 32), 10, || panic!("it is known"));
        sketch.record(subject(1), (Use::Write, 16), 20, || None);
        let (hot, total) = sketch.hottest(30, 9);
        assert_eq!((hot[0].reads, hot[0].hits, hot[0].writes, hot[0].count, total), (48, 32, 16, 64, 64));
        assert_eq!(hot[0].text.as_deref(), Some("one"));
        let (hot, total) = sketch.hottest(HALF_LIFE_MS, 9);
        assert_eq!((hot[0].reads, hot[0].count, total), (24, 32, 32));
        // What was hot an hour ago gives way to what is used now.
        sketch.record(subject(2), (Use::Read, 1), 60 * HALF_LIFE_MS, || None);
        let (hot, _) = sketch.hottest(60 * HALF_LIFE_MS, 1);
        assert_eq!(hot[0].subject, subject(2));
    }
}
