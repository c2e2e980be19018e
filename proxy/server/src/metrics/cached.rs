//! What the cache says of a read, as labels: one series per reason, known in advance.

use metrics::{Counter, Gauge};
use weir_core::cache::{MissReason, NoFillReason};
use weir_core::plan::NoCacheReason;

use super::Registry;

/// Label `result` of `weir_cache_requests_total`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheResult {
    /// Answered by the in-process cache.
    HitLocal,
    /// Answered by Redis.
    HitShared,
    /// Answered by an equal read that was under way.
    Coalesced,
    /// Answered by what is overtaken, as its tables allow.
    HitStale,
    Miss(MissReason),
}

/// Hits come before misses.
const HITS: [CacheResult; 4] =
    [CacheResult::HitLocal, CacheResult::HitShared, CacheResult::Coalesced, CacheResult::HitStale];

impl CacheResult {
    pub const COUNT: usize = HITS.len() + MissReason::ALL.len();

    pub fn all() -> [CacheResult; Self::COUNT] {
        std::array::from_fn(|index| match HITS.get(index) {
            Some(hit) => *hit,
            None => CacheResult::Miss(MissReason::ALL[index - HITS.len()]),
        })
    }

    /// Its place in [`CacheResult::all`].
    pub fn index(self) -> usize {
        match self {
            CacheResult::HitLocal => 0,
            CacheResult::HitShared => 1,
            CacheResult::Coalesced => 2,
            CacheResult::HitStale => 3,
            CacheResult::Miss(reason) => HITS.len() + reason as usize,
        }
    }

    pub fn label(self) -> String {
        match self {
            CacheResult::HitLocal => "hit_local".to_owned(),
            CacheResult::HitShared => "hit_shared".to_owned(),
            CacheResult::Coalesced => "hit_coalesced".to_owned(),
            CacheResult::HitStale => "hit_stale".to_owned(),
            CacheResult::Miss(reason) => format!("miss_{}", reason.as_str()),
        }
    }
}

/// Label `result` of `weir_cache_fills_total`.
pub type Fill = Result<(), NoFillReason>;

pub const FILLS: usize = 1 + NoFillReason::ALL.len();

pub fn fills() -> [Fill; FILLS] {
    std::array::from_fn(|index| match index.checked_sub(1) {
        None => Ok(()),
        Some(refused) => Err(NoFillReason::ALL[refused]),
    })
}

pub fn fill_index(fill: Fill) -> usize {
    fill.map_or_else(|reason| 1 + reason as usize, |()| 0)
}

pub fn fill_label(fill: Fill) -> &'static str {
    fill.map_or_else(NoFillReason::as_str, |()| "filled")
}

/// What all databases of the process share: Redis, and what proxies agree on through it.
pub struct SharedMetrics {
    up: Gauge,
    down: Gauge,
    /// In the order of [`LEASES`].
    leases: [Counter; LEASES.len()],
}

/// Label `result` of `weir_cache_leases_total`.
const LEASES: [&str; 3] = ["taken", "waited", "timed_out"];

impl SharedMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let servers = |state| registry.gauge("weir_redis_servers", &[("state", state)]);
        let lease = |result| registry.counter("weir_cache_leases_total", &[("result", result)]);
        SharedMetrics { up: servers("up"), down: servers("down"), leases: LEASES.map(lease) }
    }

    /// Servers that are known of, and how many answer; leases since the start, in the order of the labels.
    pub fn set(&self, (known, up): (usize, usize), leases: [u64; LEASES.len()]) {
        self.up.set(up as f64);
        self.down.set(known.saturating_sub(up) as f64);
        for (counter, count) in self.leases.iter().zip(leases) {
            counter.absolute(count);
        }
    }
}

/// Label `reason` of `weir_cache_uncacheable_total`; the reasons of a read on the primary share one.
pub const UNCACHEABLE: usize = NoCacheReason::LABELS.len();

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_a_place_and_a_label_of_its_own() {
        let results = CacheResult::all();
        assert!(results.iter().enumerate().all(|(index, result)| result.index() == index));
        assert_eq!(results.iter().map(|result| result.label()).collect::<BTreeSet<_>>().len(), CacheResult::COUNT);
        assert!(fills().iter().enumerate().all(|(index, fill)| fill_index(*fill) == index));
        assert_eq!(fills().map(fill_label).into_iter().collect::<BTreeSet<_>>().len(), FILLS);
    }
}
