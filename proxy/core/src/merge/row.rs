//! DataRow bodies (protocol 3: `i16` column count, then per column an `i32` length, -1 for null, and that many bytes).
//!
//! Invariant: a [`Row`] exists only for a body whose lengths add up exactly, so its accessors cannot fail.
//! Non-goals: knowing what a value means.

use bytes::{BufMut, BytesMut};
use smallvec::SmallVec;

use crate::error::{Blame, UserError, sqlstate};

/// A checked DataRow body.
pub(super) struct Row<'a> {
    body: &'a [u8],
    /// Start and end of each value; `None` is null.
    fields: SmallVec<[Option<(usize, usize)>; 16]>,
}

impl<'a> Row<'a> {
    /// Fails (08P01) unless `body` holds exactly `columns` well-formed columns.
    pub(super) fn parse(body: &'a [u8], columns: usize) -> Result<Self, UserError> {
        Self::split(body, columns).ok_or_else(|| {
            UserError::new(Blame::Server, sqlstate::PROTOCOL_VIOLATION, "a shard sent a malformed row")
                .detail(format!("A DataRow of {} bytes does not hold {columns} columns.", body.len()))
                .hint("Check that all shards have the same schema.")
        })
    }

    fn split(body: &'a [u8], columns: usize) -> Option<Self> {
        let count = u16::from_be_bytes(body.get(..2)?.try_into().ok()?);
        if usize::from(count) != columns {
            return None;
        }
        let mut at = 2;
        let mut fields = SmallVec::with_capacity(columns);
        for _ in 0..columns {
            let length = i32::from_be_bytes(body.get(at..at + 4)?.try_into().ok()?);
            at += 4;
            if length == -1 {
                fields.push(None);
                continue;
            }
            let end = at.checked_add(usize::try_from(length).ok()?)?;
            body.get(at..end)?;
            fields.push(Some((at, end)));
            at = end;
        }
        (at == body.len()).then_some(Row { body, fields })
    }

    /// The value of a column that exists; `None` is null.
    pub(super) fn get(&self, column: usize) -> Option<&'a [u8]> {
        self.fields.get(column).copied().flatten().map(|(start, end)| &self.body[start..end])
    }

    /// Appends a whole DataRow frame of the first `visible` columns.
    pub(super) fn append_frame(&self, visible: usize, out: &mut BytesMut) {
        if visible >= self.fields.len() {
            append_frame(self.body, out);
            return;
        }
        // Hidden columns are the last ones, so what stays is a prefix: up to the end of the last visible value.
        let end = self.fields[..visible].iter().fold(2, |at, field| match field {
            Some((_, end)) => *end,
            None => at + 4,
        });
        out.reserve(end + 5);
        out.put_u8(b'D');
        out.put_u32(end as u32 + 4);
        out.put_u16(visible as u16);
        out.put_slice(&self.body[2..end]);
    }
}

/// Appends a DataRow frame around a body.
fn append_frame(body: &[u8], out: &mut BytesMut) {
    out.reserve(body.len() + 5);
    out.put_u8(b'D');
    out.put_u32(body.len() as u32 + 4);
    out.put_slice(body);
}

/// Builds a DataRow body column by column.
pub(super) struct RowBuilder {
    body: Vec<u8>,
}

impl RowBuilder {
    pub(super) fn new(columns: usize) -> Self {
        RowBuilder { body: (columns as u16).to_be_bytes().to_vec() }
    }

    pub(super) fn push(&mut self, value: Option<&[u8]>) {
        match value {
            Some(value) => {
                self.body.extend_from_slice(&(value.len() as i32).to_be_bytes());
                self.body.extend_from_slice(value);
            }
            None => self.body.extend_from_slice(&(-1_i32).to_be_bytes()),
        }
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.body
    }
}

/// Rewrites a RowDescription body without its last `hidden` columns, appending the new body (no type byte, no length)
/// to `out`. A body that is not well formed is passed on as it is: the client will say so better than we could.
pub fn strip_row_description(body: &[u8], hidden: usize, out: &mut BytesMut) {
    match visible_description(body, hidden) {
        Some((visible, columns)) => {
            out.put_u16(visible);
            out.put_slice(columns);
        }
        None => out.put_slice(body),
    }
}

/// The number of visible columns and their descriptions.
fn visible_description(body: &[u8], hidden: usize) -> Option<(u16, &[u8])> {
    /// Table oid, attribute number, type oid, type length, type modifier, format.
    const AFTER_NAME: usize = 4 + 2 + 4 + 2 + 4 + 2;
    let count = u16::from_be_bytes(body.get(..2)?.try_into().ok()?);
    let visible = count.checked_sub(u16::try_from(hidden).ok()?)?;
    let mut end = 2;
    for _ in 0..visible {
        let name = memchr::memchr(0, body.get(end..)?)?;
        end += name + 1 + AFTER_NAME;
    }
    Some((visible, body.get(2..end)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut builder = RowBuilder::new(values.len());
        for value in values {
            builder.push(*value);
        }
        builder.finish()
    }

    #[test]
    fn hidden_columns_are_cut_off() {
        let body = body(&[Some(b"ab"), None, Some(b""), Some(b"hidden")]);
        let row = Row::parse(&body, 4).expect("well formed");
        assert_eq!((row.get(0), row.get(1), row.get(2)), (Some(&b"ab"[..]), None, Some(&b""[..])));
        for (visible, expected) in [
            (4, &body[..]),
            (3, b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0"),
            (2, b"\0\x02\0\0\0\x02ab\xff\xff\xff\xff"),
            (0, b"\0\0"),
        ] {
            let mut out = BytesMut::new();
            row.append_frame(visible, &mut out);
            assert_eq!(out[0], b'D');
            assert_eq!(out[1..5], (expected.len() as u32 + 4).to_be_bytes());
            assert_eq!(&out[5..], expected, "{visible}");
        }
    }

    #[test]
    fn malformed_rows_are_refused() {
        let good = body(&[Some(b"ab"), None]);
        for length in 0..good.len() {
            assert!(Row::parse(&good[..length], 2).is_err(), "{length}");
        }
        let mut long = good.clone();
        long.push(0);
        assert!(Row::parse(&long, 2).is_err());
        assert!(Row::parse(&good, 1).is_err());
        assert!(Row::parse(b"\0\x01\xff\xff\xff\xfe", 1).is_err());
        assert!(Row::parse(b"\0\x01\x7f\xff\xff\xff", 1).is_err());
    }

    #[test]
    fn descriptions_lose_their_hidden_columns() {
        let mut description = vec![0, 2];
        for name in ["a", "weir_1"] {
            description.extend_from_slice(name.as_bytes());
            description.push(0);
            description.extend_from_slice(&[7; 18]);
        }
        let strip = |body: &[u8], hidden| {
            let mut out = BytesMut::new();
            strip_row_description(body, hidden, &mut out);
            out.to_vec()
        };
        let mut expected = vec![0, 1, b'a', 0];
        expected.extend_from_slice(&[7; 18]);
        assert_eq!(strip(&description, 1), expected);
        assert_eq!(strip(&description, 0), description);
        assert_eq!(strip(&description, 2), [0, 0]);
        assert_eq!(strip(&description, 3), description);
        assert_eq!(strip(&expected[..10], 0), &expected[..10]);
    }
}
