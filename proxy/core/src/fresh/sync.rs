//! The atomics of the dependency words, in one place: `tests/words_loom.rs` compiles the words against a model checker's.

pub use std::sync::atomic::{AtomicU64, Ordering, fence};
