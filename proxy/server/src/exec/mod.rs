//! Running statements: [`relay`] on one Backend without looking into rows, [`fan`] on several with a merge, [`read`]
//! from the cache or a [`replica`], [`commit`] for what several shards must decide together, [`unique`] for columns that are unique
//! over all of them, [`copy`] for streams of rows to and from several, [`carry`] for rows that are read first and then written elsewhere.

pub mod apart;
pub mod carry;
pub mod commit;
pub mod copied;
mod copy;
pub mod engine;
pub mod explain;
pub mod failures;
pub mod fan;
pub mod guests;
mod kept;
mod limits;
pub mod open;
mod own_types;
pub mod read;
pub mod relay;
pub mod replica;
mod shared;
pub mod snapshot;
mod stale;
mod ungrouped;
pub mod unique;
