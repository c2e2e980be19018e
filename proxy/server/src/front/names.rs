//! A session's prepared statements and portals, by the names the client gave them.
//!
//! Every change can be undone: an error in a pipeline means that what followed never happened.

use std::iter::repeat_n;
use std::sync::Arc;

use bytes::Bytes;
use hashbrown::HashMap;
use smallvec::SmallVec;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::plan::{Datum, Plan, Values};
use weir_core::topology::Topology;
use weir_wire::frontend::Bind;

use crate::database::Database;
use crate::statements::Prepared;

/// Statements one client may keep; each costs an entry here, not on a server.
const STATEMENTS_MAX: usize = 65_536;
/// And what their texts may add up to.
const STATEMENT_BYTES_MAX: usize = 32 * 1024 * 1024;

#[derive(Default)]
pub struct Names {
    statements: HashMap<Bytes, Known>,
    /// Length of the texts of `statements`.
    statement_bytes: usize,
    unnamed: Option<Known>,
    portals: HashMap<Bytes, Portal>,
}

/// What a statement's name stands for.
#[derive(Clone)]
pub struct Known {
    pub prepared: Arc<Prepared>,
    /// Names and types of its columns as the client was told, if it asked (`relay::columns_of`).
    pub columns: Option<u64>,
    /// The view under which its columns were found to be others; it cannot run there.
    pub changed_in: Option<u64>,
}

impl Known {
    fn new(prepared: Arc<Prepared>) -> Self {
        Known { prepared, columns: None, changed_in: None }
    }
}

/// A bound statement.
#[derive(Clone)]
pub struct Portal {
    pub prepared: Arc<Prepared>,
    /// The whole body of its Bind message.
    pub bind: Bytes,
    pub plan: Arc<Plan>,
    /// Where it lives once a server knows it.
    pub bound_on: Option<ShardId>,
}

/// How to take a change back.
pub enum Undo {
    /// `backend`: the id under which a Backend was to prepare it.
    Statement {
        name: Bytes,
        before: Option<Known>,
        backend: Option<u64>,
    },
    Portal {
        name: Bytes,
        before: Option<Portal>,
    },
    /// A Backend never got to prepare this.
    BackendPrepared {
        id: u64,
    },
    BackendUnnamed,
}

impl Names {
    pub fn statement(&self, name: &[u8]) -> Result<&Known, UserError> {
        let found = if name.is_empty() { self.unnamed.as_ref() } else { self.statements.get(name) };
        found.ok_or_else(|| {
            let name = String::from_utf8_lossy(name);
            let message = if name.is_empty() {
                "unnamed prepared statement does not exist".to_owned()
            } else {
                format!("prepared statement \"{name}\" does not exist")
            };
            UserError::new(Blame::Client, sqlstate::UNKNOWN_STATEMENT, message)
        })
    }

    /// Errors: 42P05 when a name is taken, 54000 when there are too many.
    pub fn define(&mut self, name: &Bytes, prepared: Arc<Prepared>) -> Result<Undo, UserError> {
        if name.is_empty() {
            // The server drops the old one before it looks at the new text. It does not where the message is skipped, but then
            // no statement is safer than one that the client thinks replaced.
            self.unnamed = Some(Known::new(prepared));
            return Ok(Undo::Statement { name: Bytes::new(), before: None, backend: None });
        }
        if self.statements.contains_key(name) {
            let message = format!("prepared statement \"{}\" already exists", String::from_utf8_lossy(name));
            return Err(UserError::new(Blame::Client, sqlstate::DUPLICATE_STATEMENT, message));
        }
        let bytes = self.statement_bytes + prepared.sql.len();
        if self.statements.len() >= STATEMENTS_MAX || bytes > STATEMENT_BYTES_MAX {
            return Err(too_many(self.statements.len()));
        }
        let name = Bytes::copy_from_slice(name);
        self.keep(name.clone(), Known::new(prepared));
        Ok(Undo::Statement { name, before: None, backend: None })
    }

    fn keep(&mut self, name: Bytes, known: Known) {
        self.statement_bytes += known.prepared.sql.len();
        if let Some(before) = self.statements.insert(name, known) {
            self.statement_bytes -= before.prepared.sql.len();
        }
    }

    fn give_up(&mut self, name: &[u8]) -> Option<Known> {
        let given_up = self.statements.remove(name)?;
        self.statement_bytes -= given_up.prepared.sql.len();
        Some(given_up)
    }

    /// Replaces what a name stands for after the schema has changed.
    pub fn refresh(&mut self, name: &Bytes, prepared: Arc<Prepared>) {
        if let Some(known) = self.known_mut(name) {
            known.prepared = prepared;
            known.changed_in = None;
        }
    }

    /// The client has been told of the columns of what `name` stands for.
    pub fn described(&mut self, name: &Bytes, columns: u64) {
        if let Some(known) = self.known_mut(name) {
            known.columns = Some(columns);
        }
    }

    /// Under the view `version`, it has other columns than the client was told.
    pub fn changed(&mut self, name: &Bytes, version: u64) {
        if let Some(known) = self.known_mut(name) {
            known.changed_in = Some(version);
        }
    }

    fn known_mut(&mut self, name: &Bytes) -> Option<&mut Known> {
        if name.is_empty() { self.unnamed.as_mut() } else { self.statements.get_mut(name) }
    }

    /// Closing what does not exist is no error, as in Postgres. True: it did exist.
    pub fn close_statement(&mut self, name: &[u8]) -> (bool, Undo) {
        let before = if name.is_empty() { self.unnamed.take() } else { self.give_up(name) };
        (before.is_some(), Undo::Statement { name: Bytes::copy_from_slice(name), before, backend: None })
    }

    fn undo_statement(&mut self, name: Bytes, before: Option<Known>) {
        match (name.is_empty(), before) {
            (true, before) => self.unnamed = before,
            (false, Some(before)) => self.keep(name, before),
            (false, None) => drop(self.give_up(&name)),
        }
    }

    /// A simple query ends the unnamed statement, as on the server.
    pub fn forget_unnamed(&mut self) {
        self.unnamed = None;
    }

    pub fn forget_statements(&mut self) {
        self.statements.clear();
        self.statement_bytes = 0;
        self.unnamed = None;
    }

    pub fn bind(&mut self, name: &Bytes, portal: Portal) {
        self.portals.insert(Bytes::copy_from_slice(name), portal);
    }

    pub fn portal(&mut self, name: &[u8]) -> Result<&mut Portal, UserError> {
        self.portals.get_mut(name).ok_or_else(|| {
            let message = format!("portal \"{}\" does not exist", String::from_utf8_lossy(name));
            UserError::new(Blame::Client, sqlstate::UNKNOWN_PORTAL, message)
        })
    }

    pub fn close_portal(&mut self, name: &[u8]) -> Undo {
        Undo::Portal { name: Bytes::copy_from_slice(name), before: self.portals.remove(name) }
    }

    /// Takes back what the messages behind an error would have changed.
    pub fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Statement { name, before, .. } => self.undo_statement(name, before),
            Undo::Portal { name, before: Some(before) } => {
                self.portals.insert(name, before);
            }
            Undo::Portal { .. } | Undo::BackendPrepared { .. } | Undo::BackendUnnamed => {}
        }
    }

    /// The transaction is over, and with it its portals.
    pub fn forget_portals(&mut self) {
        self.portals.clear();
    }
}

fn too_many(kept: usize) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "too many prepared statements")
        .detail(format!(
            "this session keeps {kept} statements; it may keep {STATEMENTS_MAX}, and {} MiB of text",
            STATEMENT_BYTES_MAX >> 20
        ))
        .hint("Close statements that are no longer needed, or limit the driver's statement cache.")
}

/// What a Bind message makes of its statement.
pub fn bind(db: &Database, prepared: &Prepared, body: &Bytes, topology: &Topology) -> Result<Plan, UserError> {
    bind_undrawn(db, prepared, (body, 0), topology)
}

/// The same where this many numbers are still to be drawn for it, and taken for NULL meanwhile.
pub fn bind_undrawn(
    db: &Database,
    prepared: &Prepared,
    (body, undrawn): (&Bytes, usize),
    topology: &Topology,
) -> Result<Plan, UserError> {
    let bind = Bind::read(body).map_err(|_| super::session::malformed())?;
    let params: SmallVec<[Datum<'_>; 8]> = bind
        .values()
        .map(|(binary, value)| match value {
            None => Datum::Null,
            Some(bytes) if binary => Datum::Binary(bytes),
            Some(bytes) => Datum::Text(bytes),
        })
        .chain(repeat_n(Datum::Null, undrawn))
        .collect();
    let sql = std::str::from_utf8(&prepared.sql).unwrap_or_default();
    if let Some(refusal) = &prepared.mistyped {
        return db.plan_refused(&prepared.template, UserError::clone(refusal));
    }
    let values = Values { params: &params, sql, literals: &prepared.literals };
    db.plan_of(&prepared.template, &values, topology)
}
