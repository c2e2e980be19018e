//! The admin console: commands in, tables out.
//!
//! Invariant: column names and order of the commands PgBouncer has are those of PgBouncer 1.25 (src/admin.c,
//! src/stats.c), so that its exporters and habits work; ours come with names of their own, and behind theirs.
//! Non-goals: bytes on the wire (the server encodes a [`Table`]), and where figures come from ([`AdminSource`]).

pub mod columns;
pub mod command;
pub mod flush;
pub mod reshard;
pub mod rows;
pub mod table;

pub use command::{Act, Command, Show};
pub use flush::{Flush, Named};
pub use reshard::{MovesRow, PlanLine, PlanRequest, Reshard, Which, moves_table, plan_table};
pub use rows::*;
pub use table::{Cell, Column, Kind, Table};

use crate::error::UserError;

/// What the console shows, supplied by the running process.
pub trait AdminSource {
    /// Current figures. Only the parts that `show` needs have to be filled.
    fn snapshot(&self, show: Show) -> Snapshot;

    /// Where a statement would go and why, as name and sentence. Without a database: the only one there is, or an error
    /// that lists them.
    fn route(&self, database: Option<&str>, sql: &str) -> Result<Vec<(String, String)>, UserError>;
}

/// Answers one command. One that changes something is the caller's to carry out; here is what it answers when it has been.
pub fn answer(command: &Command, source: &dyn AdminSource) -> Result<Table, UserError> {
    match command {
        Command::Show(show) => Ok(columns::show(*show, &source.snapshot(*show))),
        Command::Route { database, sql } => {
            let rows = source.route(database.as_deref(), sql)?;
            Ok(columns::route(rows))
        }
        Command::Act(act) => Ok(Table::done(act.tag())),
        // Its columns; the rows take a while, and are the caller's to get.
        Command::Reshard(Reshard::Plan(_)) => Ok(plan_table(&[], &[])),
        Command::Reshard(_) => Ok(moves_table(&[], "RESHARD")),
        Command::Select(column, cell) => Ok(columns::select(column, cell.clone())),
        Command::Chatter(tag) => Ok(Table::done(tag)),
    }
}

#[cfg(test)]
mod tests;
