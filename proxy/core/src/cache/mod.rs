//! The result cache's decisions: what names a reply, what a stored reply is, when it may be served, filled or shared.
//!
//! Invariant: nothing is served unless the words it was read under are the words now, with nothing pending at either
//! look; see [`crate::fresh::words`]. Stores (memory, Redis) only hold bytes: they may lose, delay or garble them.

pub mod entry;
pub mod flight;
pub mod heat;
pub mod key;
pub mod verdict;

pub use entry::{BadEntry, Encoded, Entry, Reply};
pub use flight::{Alone, FlightId, Flights, Join, Landing};
pub use heat::Heat;
pub use key::{CacheKey, KeyParts, Param, ReadParts};
pub use verdict::{MissReason, NoFillReason, Now, Overtaken, judge, judge_overtaken, may_fill};
