//! Limits and modes of pools.
