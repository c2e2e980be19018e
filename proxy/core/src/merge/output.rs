//! The last step of every merge: DISTINCT, then OFFSET, then LIMIT, then hidden columns off, as frames for the client.

use bytes::BytesMut;
use hashbrown::HashSet;

use super::row::Row;
use super::value::Comparable;
use super::{MergeLimits, too_complex};
use crate::error::UserError;

/// Counts what the merger keeps in memory.
pub(super) struct Budget {
    used: usize,
    limits: MergeLimits,
}

/// What one kept row costs besides its bytes: allocations, hash table entries.
const ROW_OVERHEAD_BYTES: usize = 64;

impl Budget {
    pub(super) fn new(limits: MergeLimits) -> Self {
        Budget { used: 0, limits }
    }

    /// Takes room for something kept; one row alone is always allowed, since it already is in memory. Fails with 54000.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), UserError> {
        let bytes = bytes + ROW_OVERHEAD_BYTES;
        if self.used > 0 && self.used + bytes > self.limits.buffered_bytes_max {
            return Err(self.exceeded());
        }
        self.used += bytes;
        Ok(())
    }

    /// Fails (54000) if rows that wait to be polled are too many for one more.
    pub(super) fn check_ready(&self, ready_bytes: usize) -> Result<(), UserError> {
        if self.used + ready_bytes > self.limits.buffered_bytes_max { Err(self.exceeded()) } else { Ok(()) }
    }

    fn exceeded(&self) -> UserError {
        too_complex(format!(
            "Merging them takes more than {} bytes (buffered_bytes_max).",
            self.limits.buffered_bytes_max
        ))
    }

    pub(super) fn give_back(&mut self, bytes: usize) {
        self.used = self.used.saturating_sub(bytes + ROW_OVERHEAD_BYTES);
    }

    /// Fails (54000) if `groups` are too many.
    pub(super) fn check_groups(&self, groups: usize) -> Result<(), UserError> {
        if groups > self.limits.groups_max {
            return Err(too_complex(format!(
                "They have more than {} groups or distinct rows (groups_max).",
                self.limits.groups_max
            )));
        }
        Ok(())
    }
}

/// How duplicates are found.
pub(super) enum Distinct {
    Off,
    /// Rows come in any order, or an order that does not bring equal rows together.
    Seen {
        columns: Vec<Comparable>,
        seen: HashSet<Box<[u8]>, foldhash::fast::RandomState>,
    },
    /// Equal rows come one after the other.
    Adjacent {
        columns: Vec<Comparable>,
        previous: Option<Vec<u8>>,
    },
}

impl Distinct {
    /// Is `row` one not seen before?
    fn admits(&mut self, row: &Row<'_>, budget: &mut Budget) -> Result<bool, UserError> {
        match self {
            Distinct::Off => Ok(true),
            Distinct::Seen { columns, seen } => {
                let key = key_of(columns, row)?;
                if seen.contains(&key[..]) {
                    return Ok(false);
                }
                budget.check_groups(seen.len() + 1)?;
                budget.take(key.len())?;
                seen.insert(key.into());
                Ok(true)
            }
            Distinct::Adjacent { columns, previous } => {
                let key = Some(key_of(columns, row)?);
                let new = *previous != key;
                *previous = key;
                Ok(new)
            }
        }
    }
}

/// The sort bytes of several columns.
pub(super) fn key_of(columns: &[Comparable], row: &Row<'_>) -> Result<Vec<u8>, UserError> {
    let mut key = Vec::with_capacity(columns.len() * 10);
    for column in columns {
        column.append(row.get(column.column), &mut key)?;
    }
    Ok(key)
}

/// Where the rows end.
pub(super) struct Last {
    /// Rows that may still go out; `None`: any number.
    left: Option<u64>,
    /// WITH TIES: what rows are sorted by; else empty.
    ties: Vec<Comparable>,
    /// The sort bytes of the last row within the limit, once that is reached.
    reached: Option<Vec<u8>>,
    ended: bool,
}

impl Last {
    pub(super) fn new(limit: Option<u64>, ties: Vec<Comparable>) -> Self {
        Last { left: limit, ties, reached: None, ended: limit == Some(0) }
    }

    /// May `row` go out? Rows come in order.
    fn admits(&mut self, row: &Row<'_>) -> Result<bool, UserError> {
        if let Some(reached) = &self.reached {
            self.ended = key_of(&self.ties, row)? != *reached;
            return Ok(!self.ended);
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
            if *left == 0 && self.ties.is_empty() {
                self.ended = true;
            } else if *left == 0 {
                self.reached = Some(key_of(&self.ties, row)?);
            }
        }
        Ok(true)
    }
}

pub(super) struct Output {
    visible: usize,
    distinct: Distinct,
    skip: u64,
    last: Last,
    /// Frames not yet polled.
    ready: BytesMut,
    ready_rows: usize,
    /// Rows polled.
    rows: u64,
}

impl Output {
    pub(super) fn new(visible: usize, distinct: Distinct, skip: u64, last: Last) -> Self {
        Output { visible, distinct, skip, last, ready: BytesMut::new(), ready_rows: 0, rows: 0 }
    }

    /// LIMIT is satisfied.
    pub(super) fn is_full(&self) -> bool {
        self.last.ended
    }

    /// Takes the next row of the merged result.
    pub(super) fn offer(&mut self, row: &Row<'_>, budget: &mut Budget) -> Result<(), UserError> {
        if self.is_full() || !self.distinct.admits(row, budget)? {
            return Ok(());
        }
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        if !self.last.admits(row)? {
            return Ok(());
        }
        row.append_frame(self.visible, &mut self.ready);
        self.ready_rows += 1;
        Ok(())
    }

    pub(super) fn ready_bytes(&self) -> usize {
        self.ready.len()
    }

    /// Hands the ready frames over; returns how many rows.
    pub(super) fn drain(&mut self, out: &mut BytesMut) -> usize {
        out.extend_from_slice(&self.ready);
        self.ready.clear();
        self.rows += self.ready_rows as u64;
        std::mem::take(&mut self.ready_rows)
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows
    }
}
