//! A counter that many threads raise without meeting each other.

use std::sync::atomic::{AtomicU64, Ordering};

/// More than workers, so that two busy sessions seldom share one; each stripe fills a cache line.
const STRIPES: usize = 8;

#[repr(align(64))]
#[derive(Debug, Default)]
struct Line(AtomicU64);

/// A monotonic counter; the value is the sum of its stripes.
#[derive(Debug, Default)]
pub struct Striped([Line; STRIPES]);

/// Which stripe a session counts on.
#[derive(Clone, Copy, Debug)]
pub struct Stripe(usize);

impl Stripe {
    /// The stripe of the n-th session.
    pub fn of(session: usize) -> Self {
        Stripe(session % STRIPES)
    }
}

impl Striped {
    pub fn add(&self, stripe: Stripe, count: u64) {
        self.0[stripe.0].0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0.iter().map(|line| line.0.load(Ordering::Relaxed)).sum()
    }
}
