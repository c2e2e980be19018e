//! Freshness: one mechanism that decides who may answer a read, for replicas and the cache alike.
//! The protocol and its proof obligations are in `words`.

pub mod bound;
pub mod decoded;
pub mod fleet;
pub mod marked;
#[cfg(test)]
mod model;
pub mod pace;
pub mod past;
pub mod shown;
pub mod sign;
mod sync;
pub mod words;

use smallvec::SmallVec;

use crate::topology::hash::hash_bytes_extended;

pub use bound::{Choice, Level, PrimaryBecause, ReadBound, ReplicaView, SessionMark, choose, replica_answer_ok};
pub use marked::MarkedWords;
pub use pace::Pace;
pub use past::Past;
pub use shown::Shown;
pub use words::{Intent, Observation, UNPLACED, WORDS, WordSet, Words, WordsFull};

/// What a statement reads or writes, as far as freshness cares. Hashes name tables and key values; collisions only
/// over-invalidate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dependency {
    /// G: anything at all (DDL, grants, statements that cannot be classified).
    Anything,
    /// G too: rows, nobody knows of which tables; but not what tables there are.
    AnyRows,
    /// A(T): any write of table T.
    Table(TableHash),
    /// B(T): a write of table T whose keys are not known.
    Keyless(TableHash),
    /// K(T,k): a write of one key of table T.
    Key(TableHash, KeyHash),
    /// F(T): somebody has said that nothing read of table T before counts any more. Only answers that may be served although
    /// they are overtaken depend on it.
    Flushed(TableHash),
}

/// Stable hash of a table's schema and name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TableHash(pub u64);

impl TableHash {
    /// Of a table by schema and name, as the catalogue stores them.
    pub fn of(schema: &str, name: &str) -> Self {
        TableHash(hash_bytes_extended(format!("{schema}.{name}").as_bytes(), 0))
    }
}

/// Stable hash of a canonical key value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyHash(pub u64);

/// Dependencies of one statement. A keyed read depends on G, B(T), K(T,k); a keyless read on G, A(T). A keyed write
/// raises A(T), K(T,k); a keyless write A(T), B(T); an unclassified one G.
pub type Dependencies = SmallVec<[Dependency; 6]>;
