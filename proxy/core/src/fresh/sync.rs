//! The atomics of the dependency words, in one place, so that a model checker's can stand in for them.

pub use std::sync::atomic::{AtomicU64, Ordering, fence};
