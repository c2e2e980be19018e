//! Reads of the fallback engine that a client fetches in parts: portals with a row limit, and cursors.
//!
//! Invariant: the statement runs to its end when it is opened, as any other on the engine, and its rows are kept here until they are
//! fetched, those of one session within `limits.merge_bytes_max`; so between two fetches the hub holds nothing for it. What is kept ends with its
//! transaction, and with a savepoint that it is younger than. Non-goal: going backward.

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError};
use weir_core::plan::Plan;
use weir_core::sql::lex::lex;
use weir_wire::backend::tag;
use weir_wire::frame;

use super::engine::{Asked, cannot};
use super::limits::too_much;
use super::open::{OpenRead, Reader};
use crate::front::names::Portal;
use crate::front::session::{Failure, Session};

/// The rows of one statement.
pub struct Kept {
    /// RowDescription frame.
    description: BytesMut,
    /// DataRow frames.
    rows: BytesMut,
    bytes_max: usize,
}

impl Session {
    /// Frames of the engine's: to the client, or what is to be fetched to where it is kept.
    pub fn pass_engine(&mut self, frames: BytesMut, kept: &mut Option<Kept>, plan: &Plan) -> Result<(), UserError> {
        let Some(kept) = kept else {
            self.client.out.unsplit(frames);
            return Ok(());
        };
        let mut rest = &*frames;
        while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
            rest = &rest[next.raw.len()..];
            match next.tag {
                tag::DATA_ROW => kept.rows.extend_from_slice(next.raw),
                tag::ROW_DESCRIPTION => kept.description.extend_from_slice(next.raw),
                tag::COMMAND_COMPLETE => {}
                _ => self.client.out.extend_from_slice(next.raw),
            }
        }
        if kept.rows.len() <= kept.bytes_max {
            return Ok(());
        }
        let what = "Its rows, which are kept until they are fetched, are too many to hold.";
        Err(too_much(plan, what, "limits.merge_bytes_max"))
    }

    /// Execute of a portal with a row limit, or the next one of a portal that was read in part.
    pub async fn engine_part(
        &mut self,
        (name, rows_max): (&Bytes, i32),
        asked: Asked<'_>,
        plan: &Plan,
    ) -> Result<(), Failure> {
        let reader = Reader::Portal(name.clone());
        if !self.has_open(&reader) {
            self.keep_rows(reader.clone(), asked, plan).await?;
        }
        self.put_part(&reader, rows_max).await
    }

    /// DECLARE of a cursor. `portal`: the values of its parameters.
    pub async fn engine_cursor(
        &mut self,
        name: &str,
        (sql, portal): (&str, Option<&Portal>),
        plan: &Plan,
    ) -> Result<(), Failure> {
        if self.txn.as_ref().is_none_or(|txn| txn.implicit) {
            let message = "DECLARE CURSOR can only be used in transaction blocks";
            return Err(UserError::new(Blame::Client, "25P01", message).into());
        }
        let reader = Reader::Cursor(name.to_owned());
        if self.has_open(&reader) {
            return Err(UserError::new(Blame::Client, "42P03", format!("cursor \"{name}\" already exists")).into());
        }
        let query = query_of(sql).ok_or_else(|| cannot(plan, "its cursor is not understood"))?;
        let asked = portal.map_or_else(|| Asked::text(query), |portal| Asked::once(query, portal));
        self.keep_rows(reader, asked, plan).await?;
        self.put_tag("DECLARE CURSOR");
        Ok(())
    }

    async fn keep_rows(&mut self, reader: Reader, asked: Asked<'_>, plan: &Plan) -> Result<(), Failure> {
        self.room_for_read()?;
        let others: usize = self.open_reads.iter().map(OpenRead::bytes).sum();
        let bytes_max = self.app.config().limits.merge_bytes_max.saturating_sub(others);
        let mut kept = Some(Kept { description: BytesMut::new(), rows: BytesMut::new(), bytes_max });
        Box::pin(self.engine_read(asked, plan, &mut kept)).await?;
        let Some(kept) = kept else { return Ok(()) };
        let age = self.txn.as_ref().map_or(0, |txn| txn.prelude.len());
        self.open_reads.push(OpenRead::kept(reader, (kept.description, kept.rows), age));
        Ok(())
    }
}

/// What stands behind FOR in `DECLARE name … CURSOR … FOR query`.
fn query_of(sql: &str) -> Option<&str> {
    let mut tokens = Vec::new();
    lex(sql, &mut tokens).ok()?;
    let at = tokens.iter().position(|token| token.is_word(sql, "for"))?;
    Some(&sql[tokens.get(at + 1)?.start as usize..])
}
