//! Every decision weir takes, as plain values and functions.
//!
//! Invariant: nothing here touches a socket, a clock, randomness, the environment or an async runtime; time and
//! bytes come in as arguments, answers go out as values that carry their reason.
//!
//! Reading order follows a query: [`sql`] learns facts from text, [`plan`] turns them into a target, [`fresh`] and
//! [`cache`] say who may answer, [`session`] keeps a client's state, [`merge`] joins the answers of several shards. [`hba`] says
//! who may come in at all.

pub mod admin;
pub mod advise;
pub mod cache;
pub mod copy;
pub mod election;
pub mod engine;
pub mod error;
pub mod fresh;
pub mod hba;
pub mod hot;
pub mod id;
pub mod lock;
pub mod merge;
pub mod plan;
pub mod pool;
pub mod reshard;
pub mod session;
pub mod snapshot;
pub mod sql;
pub mod topology;
pub mod unique;
