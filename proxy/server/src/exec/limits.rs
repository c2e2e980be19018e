//! What a statement may use of the fallback engine, and how the client is told that it wanted more.
//!
//! Invariant: a limit of weir's is 54000 with the key that raises it, whenever it is hit and whatever Postgres calls it; a limit of the
//! client's own stays what Postgres calls it. Rows that the hub fetches from the shards cannot be counted here: its memory, its
//! temporary files and its time are what bounds them.

use std::time::Instant;

use bytes::BytesMut;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::plan::Plan;
use weir_wire::backend::tag;
use weir_wire::frame;

use super::engine::wanted_for;
use super::relay::Trail;
use crate::engine::Engine;

/// Of one statement.
pub struct Bounds<'a> {
    pub plan: &'a Plan,
    pub engine: &'a Engine,
    pub start: Instant,
    /// That may still be returned.
    pub rows: u64,
}

impl Bounds<'_> {
    /// Takes the rows among `frames` off what may still be returned.
    pub fn take_rows(&mut self, frames: &[u8]) -> Result<(), UserError> {
        let mut rest = frames;
        while let Ok(Some(next)) = frame::peek(rest, usize::MAX >> 1) {
            rest = &rest[next.raw.len()..];
            if matches!(next.tag, tag::DATA_ROW | tag::COPY_DATA) {
                self.rows = self.rows.checked_sub(1).ok_or_else(|| {
                    let max = self.engine.config.rows_max;
                    too_much(self.plan, &format!("It returns more than {max} rows."), "engine.rows_max")
                })?;
            }
        }
        Ok(())
    }

    /// An error that means one of the engine's own limits, in weir's words.
    pub fn hit(&self, trail: &Trail) -> Option<UserError> {
        let config = &self.engine.config;
        match &trail.sqlstate? {
            b"53400" => {
                let what = format!("Its temporary files would have grown beyond {} bytes.", config.temp_bytes_max);
                Some(too_much(self.plan, &what, "engine.temp_bytes_max"))
            }
            b"57014" if self.start.elapsed() >= config.time_max => {
                Some(too_much(self.plan, &format!("It ran longer than {:?}.", config.time_max), "engine.time_max"))
            }
            _ => None,
        }
    }
}

/// `key`: what to raise.
pub fn too_much(plan: &Plan, what: &str, key: &str) -> UserError {
    UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "the statement needs more than the fallback engine may use")
        .detail(format!("{} {what}", wanted_for(plan)))
        .hint(format!("Restrict it by the shard key, or raise {key}."))
}

/// Takes the error away that the frames end with.
pub fn without_error(frames: &mut BytesMut) {
    let mut at = 0;
    while let Ok(Some(next)) = frame::peek(&frames[at..], usize::MAX >> 1) {
        if next.tag == tag::ERROR {
            frames.truncate(at);
            return;
        }
        at += next.raw.len();
    }
}
