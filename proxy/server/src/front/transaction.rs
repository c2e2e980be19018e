//! The transaction block of a session, before and after servers know of it.
//!
//! Invariant: a Backend that joins late is told everything the client has said of the transaction, in order. Non-goals: how
//! it begins and ends on servers ([`super::session`], [`crate::exec::commit`]).

use std::sync::Arc;

use weir_core::id::ShardId;
use weir_core::sql::class::{Class, Isolation, Modes};

use crate::database::View;

/// A transaction block as the client sees it. Servers learn of it when a statement needs them (lazy BEGIN).
#[derive(Debug, Clone)]
pub struct Transaction {
    /// What to send to each Backend that joins, in order: BEGIN, savepoints, SET LOCAL.
    pub prelude: Vec<Joined>,
    /// Weir's error aborted it; the servers may not know.
    pub failed: bool,
    /// Made by weir for one request of several statements or shards; ends with the request.
    pub implicit: bool,
    /// What the client and its session's defaults say of it.
    pub modes: Modes,
    pub snapshot: Snapshot,
    /// The map as it was when that snapshot was taken.
    pub map: Option<Arc<View>>,
    /// It has taken locks before its snapshot.
    pub locked: bool,
    /// Cursors that one shard has, with that shard; the last one of a name counts.
    pub cursors: Vec<(Box<str>, ShardId)>,
    /// It changed the schema.
    pub changed_schema: bool,
    /// In a way that all sessions must know of: something in it may leave state behind.
    pub made_keeper: bool,
    /// Its DDL may have changed what statements mean.
    pub renews: bool,
}

/// Whose snapshot a transaction sees, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {
    /// No statement has needed one.
    NotYet,
    /// Every statement has its own.
    EachStatement,
    /// One for all of it, which cannot span shards: of this shard, once a statement has read or written rows.
    OneShard(Option<ShardId>),
    /// One of each shard, all taken at one moment. It only reads.
    AllShards,
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
    pub fn lazy(sql: &str, modes: Modes) -> Self {
        let begin = Joined { sql: sql.to_owned(), savepoint: None };
        Transaction {
            prelude: vec![begin],
            failed: false,
            implicit: false,
            modes,
            snapshot: Snapshot::NotYet,
            map: None,
            locked: false,
            cursors: Vec::new(),
            changed_schema: false,
            made_keeper: false,
            renews: false,
        }
    }

    /// For one request of several statements or shards.
    pub fn implicit() -> Self {
        Transaction { implicit: true, ..Self::lazy("BEGIN", Modes::default()) }
    }

    /// The client's own BEGIN went to a server unseen (in a multi-statement query).
    pub fn begun_by_client(failed: bool) -> Self {
        Transaction { failed, ..Self::lazy("BEGIN", Modes::default()) }
    }

    /// The next one, as AND CHAIN begins it: with the modes of this one.
    #[must_use]
    pub fn chained(&self) -> Self {
        let mut next = Self::lazy("BEGIN", self.modes);
        if let Some(sql) = set_transaction(self.modes) {
            next.prelude.push(Joined { sql, savepoint: None });
        }
        next
    }

    /// One that began on this shard, in a text that weir has sent as it was: what the text's last BEGIN and what follows it say.
    pub fn note_text(&mut self, classes: &[&Class], defaults: Modes, shard: ShardId) {
        for class in classes {
            match class {
                Class::Begin(modes) => self.modes = modes_over(*modes, defaults),
                Class::SetTransaction(modes) => self.set_modes(*modes),
                _ => {}
            }
        }
        self.prelude.extend(set_transaction(self.modes).map(|sql| Joined { sql, savepoint: None }));
        self.snapshot = match self.wanted() {
            Snapshot::NotYet | Snapshot::EachStatement => Snapshot::EachStatement,
            Snapshot::OneShard(_) | Snapshot::AllShards => Snapshot::OneShard(Some(shard)),
        };
    }

    /// SET TRANSACTION: what it says counts, what it leaves out stays.
    pub fn set_modes(&mut self, modes: Modes) {
        self.modes = modes_over(modes, self.modes);
    }

    /// The snapshot that its modes ask for.
    ///
    /// Of a SERIALIZABLE one that only reads, too: those that write stay on one shard each, so a circle of dependencies that leads over it
    /// leads over it on one shard already, and that shard sees it. Not so if it is DEFERRABLE, for which each shard would choose a moment
    /// of its own.
    pub fn wanted(&self) -> Snapshot {
        let Modes { isolation, read_only, deferrable } = self.modes;
        match isolation {
            Some(Isolation::RepeatableRead) if read_only == Some(true) => Snapshot::AllShards,
            Some(Isolation::Serializable) if read_only == Some(true) && deferrable != Some(true) => Snapshot::AllShards,
            Some(Isolation::RepeatableRead | Isolation::Serializable) => Snapshot::OneShard(None),
            _ => Snapshot::EachStatement,
        }
    }

    /// What it sees, or will see when its first statement comes.
    pub fn sees(&self) -> Snapshot {
        if self.snapshot == Snapshot::NotYet { self.wanted() } else { self.snapshot }
    }

    /// Does it stay on the shard of the first row that it sees?
    pub fn keeps_one_shard(&self) -> bool {
        matches!(self.sees(), Snapshot::OneShard(_))
    }
}

/// `modes`, and where it is silent `others`.
pub fn modes_over(modes: Modes, others: Modes) -> Modes {
    Modes {
        isolation: modes.isolation.or(others.isolation),
        read_only: modes.read_only.or(others.read_only),
        deferrable: modes.deferrable.or(others.deferrable),
    }
}

/// The statement that gives a transaction these modes; `None`: there is nothing to say.
fn set_transaction(modes: Modes) -> Option<String> {
    let isolation = modes.isolation.map(|isolation| format!("ISOLATION LEVEL {}", isolation.as_str()));
    let read_only = modes.read_only.map(|only| if only { "READ ONLY" } else { "READ WRITE" }.to_owned());
    let deferrable = modes.deferrable.map(|may| if may { "DEFERRABLE" } else { "NOT DEFERRABLE" }.to_owned());
    let all: Vec<String> = [isolation, read_only, deferrable].into_iter().flatten().collect();
    (!all.is_empty()).then(|| format!("SET TRANSACTION {}", all.join(", ")))
}
