//! Counts under label values that are not known in advance: SQLSTATEs, pin reasons. Cold: a lock and a map.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::Registry;

/// Distinct values that get a series of their own; more are counted as `other`.
const VALUES_MAX: usize = 128;

#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<Box<str>, u64>>);

impl Tally {
    pub fn add(&self, value: &str) {
        let mut counts = self.0.lock();
        let value = if counts.len() < VALUES_MAX || counts.contains_key(value) { value } else { "other" };
        match counts.get_mut(value) {
            Some(count) => *count += 1,
            None => {
                counts.insert(value.into(), 1);
            }
        }
    }

    /// All counts, in order of value.
    pub fn counts(&self) -> Vec<(String, u64)> {
        self.0.lock().iter().map(|(value, count)| (value.to_string(), *count)).collect()
    }

    pub(super) fn publish(
        &self,
        registry: &Registry,
        name: &'static str,
        label: &'static str,
        more: &[(&'static str, &str)],
    ) {
        for (value, count) in self.counts() {
            let labels: Vec<(&'static str, &str)> = more.iter().copied().chain([(label, value.as_str())]).collect();
            registry.counter(name, &labels).absolute(count);
        }
    }
}
