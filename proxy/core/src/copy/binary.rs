//! The binary format: header, rows of counted fields, trailer ("Binary Format" of the COPY page of Postgres's manual).
//!
//! Invariant: as in text, a row is walked through once, however it is cut into chunks.

use std::ops::Range;

use super::{Layout, Misfit};

/// Signature (11 bytes), flags, length of the header's extension.
pub(super) const HEADER_MIN: usize = 19;

/// How far the row in hand has been read.
#[derive(Debug, Default)]
pub(super) struct Scan {
    at: usize,
    fields: usize,
    key: Option<Key>,
}

/// Where the key is; none of it if it is NULL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Key {
    Null,
    Bytes(Range<usize>),
}

#[derive(Debug)]
pub(super) enum Found {
    Row { len: usize, key: Option<Key> },
    Trailer { len: usize },
}

/// Bytes of the header at the start of `bytes`; `None` while it is not whole.
pub(super) fn header(bytes: &[u8]) -> Option<usize> {
    let extension = i32::from_be_bytes(bytes.get(15..HEADER_MIN)?.try_into().ok()?);
    let total = HEADER_MIN + usize::try_from(extension).unwrap_or(0);
    (bytes.len() >= total).then_some(total)
}

impl Scan {
    /// The row at the start of `bytes`; `None`: more is needed.
    pub fn row(&mut self, bytes: &[u8], layout: &Layout) -> Result<Option<Found>, Misfit> {
        let Some((count, _)) = bytes.split_first_chunk::<2>() else { return Ok(None) };
        let Ok(count) = usize::try_from(i16::from_be_bytes(*count)) else {
            return if *count == [0xff, 0xff] { Ok(Some(Found::Trailer { len: 2 })) } else { Err(Misfit::MissingKey) };
        };
        self.at = self.at.max(2);
        while self.fields < count {
            let Some((length, _)) = bytes.get(self.at..).and_then(|rest| rest.split_first_chunk::<4>()) else {
                return Ok(None);
            };
            let start = self.at + 4;
            let (end, key) = match usize::try_from(i32::from_be_bytes(*length)) {
                Ok(length) => (start + length, Key::Bytes(start..start + length)),
                Err(_) if *length == [0xff; 4] => (start, Key::Null),
                Err(_) => return Err(Misfit::Cut),
            };
            if end > bytes.len() {
                return Ok(None);
            }
            if self.fields == layout.position {
                self.key = Some(key);
            }
            self.fields += 1;
            self.at = end;
        }
        let done = std::mem::take(self);
        Ok(Some(Found::Row { len: done.at, key: done.key }))
    }
}
