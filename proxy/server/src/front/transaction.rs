//! The transaction block of a session, before and after servers know of it.
//!
//! Invariant: a Backend that joins late is told everything the client has said of the transaction, in order. Non-goals: how
//! it begins and ends on servers ([`super::session`], [`crate::exec::commit`]).

use weir_core::id::ShardId;

/// A transaction block as the client sees it. Servers learn of it when a statement needs them (lazy BEGIN).
#[derive(Debug, Clone)]
pub struct Transaction {
    /// What to send to each Backend that joins, in order: BEGIN, savepoints, SET LOCAL.
    pub prelude: Vec<Joined>,
    /// Weir's error aborted it; the servers may not know.
    pub failed: bool,
    /// Made by weir for one request of several statements or shards; ends with the request.
    pub implicit: bool,
    /// One snapshot for the whole transaction: it cannot span shards.
    pub one_snapshot: bool,
    /// The shard that took it, once a statement has read or written rows.
    pub snapshot_on: Option<ShardId>,
    /// It changed the schema.
    pub changed_schema: bool,
    /// In a way that all sessions must know of: something in it may leave state behind.
    pub made_keeper: bool,
    /// Its DDL may have changed what statements mean.
    pub renews: bool,
}

/// One statement of a transaction's prelude.
#[derive(Debug, Clone)]
pub struct Joined {
    pub sql: String,
    /// The savepoint it makes, if it makes one.
    pub savepoint: Option<Box<str>>,
}

impl Transaction {
    /// A BEGIN of the client that weir answers itself.
    pub fn lazy(sql: &str, one_snapshot: bool) -> Self {
        let begin = Joined { sql: sql.to_owned(), savepoint: None };
        Transaction {
            prelude: vec![begin],
            failed: false,
            implicit: false,
            one_snapshot,
            snapshot_on: None,
            changed_schema: false,
            made_keeper: false,
            renews: false,
        }
    }

    /// For one request of several statements or shards.
    pub fn implicit() -> Self {
        Transaction { implicit: true, ..Self::lazy("BEGIN", false) }
    }

    /// The client's own BEGIN went to a server unseen (in a multi-statement query).
    pub fn begun_by_client(failed: bool) -> Self {
        Transaction { failed, ..Self::lazy("BEGIN", false) }
    }
}
