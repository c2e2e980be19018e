//! The data of one COPY … TO STDOUT made of the data of several parts, one part after the other.
//!
//! Invariant: what goes out is what one server would send for all the rows: one header, one trailer. Postgres sends each row as
//! a message of its own; a text header, too, while a binary header comes in front of whatever comes first
//! (src/backend/commands/copyto.c).

use std::ops::Range;

use super::binary::HEADER_MIN;
use super::options::{Format, Options};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Joiner {
    format: Format,
    header: bool,
    /// Nothing of the part in hand has come yet.
    fresh: bool,
    part: usize,
    parts: usize,
}

impl Joiner {
    pub fn new(options: &Options, parts: usize) -> Self {
        Joiner { format: options.format, header: options.header, fresh: true, part: 0, parts }
    }

    /// Which bytes of the next message of the part in hand go out.
    pub fn message(&mut self, body: &[u8]) -> Range<usize> {
        let fresh = std::mem::replace(&mut self.fresh, false);
        let again = fresh && self.part > 0;
        if self.format != Format::Binary {
            return if again && self.header { 0..0 } else { 0..body.len() };
        }
        let header = if fresh { HEADER_MIN.min(body.len()) } else { 0 };
        let trailer = body[header..] == [0xff, 0xff];
        let start = if again { header } else { 0 };
        let end = if trailer && self.part + 1 < self.parts { header } else { body.len() };
        start..end
    }

    /// The next message is of the next part.
    pub fn next_part(&mut self) {
        self.fresh = true;
        self.part += 1;
    }
}
