//! What a clock counts.

use std::sync::atomic::AtomicU64;

/// Counts since the start.
#[derive(Debug, Default)]
pub struct ClockCounters {
    /// Writes ended with a position.
    pub ended: AtomicU64,
    /// Positions asked for; `ended / positions` is how many writes share one.
    pub positions: AtomicU64,
    /// Writes ended without a position because the queue was full.
    pub unplaced: AtomicU64,
    /// Writes whose backend was lost with the outcome unknown.
    pub lost: AtomicU64,
    /// Of those, the ones that could not even be remembered.
    pub stuck: AtomicU64,
    /// Starts, restarts and promotions of the primary.
    pub floors: AtomicU64,
    pub errors: AtomicU64,
}
