//! Which cacheable reads are asked for most, so that another cache can be filled with them before anybody asks (`weir cache warm`).
//!
//! Sampled as hot keys are: one statement in sixteen of each session, counted sixteenfold, in bounded memory. What is kept of a read
//! is its cache key, which is all that it takes to ask the same again. Non-goals: reads that are never cached, and how long any took.

use std::time::Instant;

use parking_lot::Mutex;
use weir_core::cache::CacheKey;
use weir_core::hot::{Hot, Sketch, Use};

use crate::hot::SAMPLE;

/// Reads counted per database.
const PLACES: usize = 512;
/// Longer reads are not counted: they would make the list large.
const KEY_BYTES_MAX: usize = 4 * 1024;

pub struct Digests {
    sketch: Mutex<Sketch<u128, CacheKey>>,
    start: Instant,
}

impl Default for Digests {
    fn default() -> Self {
        Digests { sketch: Mutex::new(Sketch::new(PLACES)), start: Instant::now() }
    }
}

impl Digests {
    /// Counts one sampled read.
    pub fn record(&self, key: &CacheKey) {
        if key.bytes().len() <= KEY_BYTES_MAX {
            let now_ms = self.start.elapsed().as_millis() as u64;
            self.sketch.lock().record(key.hash128(), (Use::Read, u64::from(SAMPLE)), now_ms, || Some(key.clone()));
        }
    }

    /// The most asked first.
    pub fn most_asked(&self, most: usize) -> Vec<Hot<u128, CacheKey>> {
        let now_ms = self.start.elapsed().as_millis() as u64;
        self.sketch.lock().hottest(now_ms, most).0
    }
}
