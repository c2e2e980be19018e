//! The dependency words as they are in weir-core, from the same file, with loom's atomics in place of the processor's.
//!
//! Invariant: the file is included as it is; all that differs is below it, in [`fresh::sync`]. That is why this is a package of its
//! own: as a library it is compiled without the unit tests of that file, which want real atomics, and with them it is empty. Non-goal:
//! anything but the words.

/// What the file names as `crate::id`.
#[cfg(not(test))]
pub mod id {
    pub use weir_core::id::Lsn;
}

/// What the file names as `super`.
#[cfg(not(test))]
pub mod fresh {
    pub use weir_core::fresh::{Dependencies, Dependency};

    pub mod sync;
    #[path = "../../../../proxy/core/src/fresh/words.rs"]
    pub mod words;

    /// So few words that their interleavings can be counted. `count`: a power of two; `seed`: as for [`words::Words::seeded`].
    pub fn few_words(count: usize, seed: u64) -> words::Words {
        words::Words::sized(count, seed)
    }
}
