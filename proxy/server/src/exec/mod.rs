//! Running statements: [`relay`] on one Backend without looking into rows, [`fan`] on several with a merge, [`read`]
//! from the cache or a replica, [`commit`] for what several shards must decide together, [`copy`] for streams of rows to and from several.

pub mod apart;
pub mod commit;
pub mod copy;
pub mod engine;
pub mod explain;
pub mod failures;
pub mod fan;
mod kept;
mod limits;
pub mod open;
pub mod read;
pub mod relay;
mod ungrouped;
