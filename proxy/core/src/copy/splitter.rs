//! The data of one COPY … FROM STDIN, cut into rows and handed to the parts they belong to.
//!
//! Invariant: what `sink` is given, in order, is the input, except that what is for every part comes once for each; any way of
//! cutting the input into chunks gives the same. Held back is at most one row.

use std::sync::Arc;

use super::lines::Lines;
use super::options::Format;
use super::text::Counted;
use super::{Layout, Misfit, binary, text};
use crate::error::UserError;
use crate::id::ShardId;
use crate::topology::{Key, SlotMap};

/// Takes the bytes that are for a part.
pub type Sink<'s> = dyn FnMut(usize, &[u8]) + 's;

#[derive(Debug)]
pub struct Splitter {
    layout: Arc<Layout>,
    /// Slot → part.
    /// Parts in place of shards.
    slots: SlotMap,
    parts: usize,
    row_bytes_max: usize,
    /// The start of a row whose end has not come.
    carry: Vec<u8>,
    stage: Stage,
    text: text::Scan,
    binary: binary::Scan,
    lines: Lines,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The header is due.
    Header,
    Rows,
    /// The end marker has come; what follows counts for nothing in text, and must not be there in binary.
    Ended,
}

/// A row that cannot be placed: its bytes, and its lines as Postgres counts them.
struct Bad {
    misfit: Misfit,
    len: usize,
    lines: Counted,
}

impl Splitter {
    /// `parts`: the shards that take part, and `slots` says who owns what; a part is an index among `parts`.
    pub fn new(layout: Arc<Layout>, parts: &[ShardId], slots: &SlotMap, row_bytes_max: usize) -> Self {
        let part = |owner| parts.iter().position(|part| *part == owner).unwrap_or(0) as u16;
        let header = layout.options.header || layout.options.format == Format::Binary;
        Splitter {
            layout,
            slots: slots.renumbered(|owner| ShardId(part(owner))),
            parts: parts.len(),
            row_bytes_max,
            carry: Vec::new(),
            stage: if header { Stage::Header } else { Stage::Rows },
            text: text::Scan::default(),
            binary: binary::Scan::default(),
            lines: Lines::new(parts.len()),
        }
    }

    /// Takes more of the data. On an error the row it is about has been given to part 0 if that may have a better error for it,
    /// and nothing more must be pushed.
    pub fn push(&mut self, chunk: &[u8], sink: &mut Sink<'_>) -> Result<(), UserError> {
        if self.carry.is_empty() {
            let used = self.take(chunk, false, sink)?;
            self.carry.extend_from_slice(&chunk[used..]);
        } else {
            let mut held = std::mem::take(&mut self.carry);
            held.extend_from_slice(chunk);
            let used = self.take(&held, false, sink)?;
            held.drain(..used);
            self.carry = held;
        }
        if self.carry.len() > self.row_bytes_max {
            return Err(Misfit::TooLong.error(&self.layout, self.lines.total + 1));
        }
        Ok(())
    }

    /// There is no more data.
    pub fn finish(&mut self, sink: &mut Sink<'_>) -> Result<(), UserError> {
        let held = std::mem::take(&mut self.carry);
        let used = self.take(&held, true, sink)?;
        if used == held.len() {
            return Ok(());
        }
        self.lines.add(0, Counted::ONE);
        sink(0, &held[used..]);
        Err(Misfit::Cut.error(&self.layout, self.lines.total))
    }

    /// The client's number of the line that `part` calls `own`; `None` if it is too long ago.
    pub fn client_line(&self, part: usize, own: u64) -> Option<u64> {
        self.lines.of(part, own)
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Hands out all whole rows; returns how many bytes they are.
    fn take(&mut self, bytes: &[u8], last: bool, sink: &mut Sink<'_>) -> Result<usize, UserError> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let step = match (self.layout.options.format, self.stage) {
                (Format::Binary, _) => self.take_binary(rest, sink),
                (_, Stage::Ended) => return Ok(bytes.len()),
                _ => self.take_text(rest, last, sink),
            };
            match step {
                Ok(0) => break,
                Ok(used) => at += used,
                Err(Bad { misfit, len, lines }) => {
                    // A server that has seen no line yet does not know which line ends are wrong.
                    let judges = !matches!(misfit, Misfit::CarriageReturn | Misfit::Newline) || self.lines.begun(0);
                    self.lines.add(0, lines);
                    if judges {
                        sink(0, &rest[..len]);
                    }
                    return Err(misfit.error(&self.layout, self.lines.total));
                }
            }
        }
        Ok(at)
    }

    fn to_all(&self, bytes: &[u8], sink: &mut Sink<'_>) {
        (0..self.parts).for_each(|part| sink(part, bytes));
    }

    fn take_text(&mut self, rest: &[u8], last: bool, sink: &mut Sink<'_>) -> Result<usize, Bad> {
        let unending = |misfit| Bad { misfit, len: rest.len(), lines: Counted::ONE };
        let Some(found) = self.text.row(rest, last, &self.layout).map_err(unending)? else { return Ok(0) };
        let row = &rest[..found.len];
        let body = &row[..found.body];
        let csv = self.layout.options.format == Format::Csv;
        if body == b"\\." && !csv {
            self.stage = Stage::Ended;
            self.to_all(row, sink);
            return Ok(found.len);
        }
        if self.stage == Stage::Header {
            self.stage = Stage::Rows;
            self.lines.add_to_all();
            self.to_all(row, sink);
            return Ok(found.len);
        }
        let part = match () {
            () if found.marker || body == b"\\." => Err(Misfit::Marker),
            () if found.in_quotes => Err(Misfit::UnterminatedQuote),
            () => self.text_part(found.key.map(|key| &body[key])),
        };
        let part = part.map_err(|misfit| Bad { misfit, len: found.len, lines: found.lines })?;
        self.lines.add(part, found.lines);
        sink(part, row);
        Ok(found.len)
    }

    /// Whose a row with this key is.
    fn text_part(&self, field: Option<&[u8]>) -> Result<usize, Misfit> {
        let value = text::value(field.ok_or(Misfit::MissingKey)?, &self.layout)?;
        self.part_of(Key::parse(value, self.layout.key_type))
    }

    fn part_of(&self, key: Option<Key<'_>>) -> Result<usize, Misfit> {
        let key = key.ok_or(Misfit::UnreadableKey)?;
        if self.layout.varchar && key.ends_blank() { Err(Misfit::BlankKey) } else { Ok(self.part(&key)) }
    }

    fn take_binary(&mut self, rest: &[u8], sink: &mut Sink<'_>) -> Result<usize, Bad> {
        let unending = |misfit| Bad { misfit, len: rest.len(), lines: Counted::ONE };
        match self.stage {
            Stage::Header => {
                let Some(len) = binary::header(rest) else { return Ok(0) };
                self.stage = Stage::Rows;
                self.to_all(&rest[..len], sink);
                return Ok(len);
            }
            Stage::Ended => return Err(unending(Misfit::AfterEnd)),
            Stage::Rows => {}
        }
        match self.binary.row(rest, &self.layout).map_err(unending)? {
            None => Ok(0),
            Some(binary::Found::Trailer { len }) => {
                self.stage = Stage::Ended;
                self.to_all(&rest[..len], sink);
                Ok(len)
            }
            Some(binary::Found::Row { len, key }) => {
                let part = match key {
                    None => Err(Misfit::MissingKey),
                    Some(binary::Key::Null) => Err(Misfit::NullKey),
                    Some(binary::Key::Bytes(range)) => {
                        self.part_of(Key::from_binary(&rest[range], self.layout.key_type))
                    }
                };
                let part = part.map_err(|misfit| Bad { misfit, len, lines: Counted::ONE })?;
                self.lines.add(part, Counted::ONE);
                sink(part, &rest[..len]);
                Ok(len)
            }
        }
    }

    fn part(&self, key: &Key<'_>) -> usize {
        usize::from(self.slots.owner_of(key.hash()).0)
    }
}
