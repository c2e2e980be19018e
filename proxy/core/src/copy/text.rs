//! Text and CSV: where a row ends, where its key is, and what the key's value is.
//!
//! Invariant: a row is read once, however it is cut into chunks; the scan goes on where it stopped. The rules are those of
//! `CopyReadLineText`, `CopyReadAttributesText` and `CopyReadAttributesCSV` (src/backend/commands/copyfromparse.c).

use std::borrow::Cow;
use std::ops::Range;

use memchr::memchr3;

use super::options::{Format, Options};
use super::{Layout, Misfit};

/// How lines end: the first one decides for all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Ending {
    #[default]
    Unknown,
    Newline,
    Return,
    Both,
}

/// How far the row in hand has been read. Positions count from its first byte.
#[derive(Debug, Default)]
pub(super) struct Scan {
    ending: Ending,
    row: Row,
}

#[derive(Clone, Debug, Default)]
struct Row {
    at: usize,
    /// Fields that have ended, and where the one in hand starts.
    fields: usize,
    start: usize,
    key: Option<Range<usize>>,
    in_quotes: bool,
    /// A backslash with a point has been seen (text).
    marker: bool,
    /// Line ends inside quotes (CSV).
    inner_newlines: u32,
    inner_returns: u32,
}

/// A whole row.
#[derive(Debug)]
pub(super) struct Found {
    /// With its line end.
    pub len: usize,
    /// Without it.
    pub body: usize,
    pub key: Option<Range<usize>>,
    pub marker: bool,
    pub lines: Counted,
    pub in_quotes: bool,
}

/// How many lines a row counts for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    pub lines: u32,
    /// Where it is the first: before the first line end outside quotes only carriage returns count inside.
    pub as_first: u32,
}

impl Counted {
    pub const ONE: Counted = Counted { lines: 1, as_first: 1 };
}

impl Scan {
    /// The row at the start of `bytes`, which begin where the row does. `None`: more is needed. `last`: there is no more.
    pub fn row(&mut self, bytes: &[u8], last: bool, layout: &Layout) -> Result<Option<Found>, Misfit> {
        let newlines_count = self.ending == Ending::Newline;
        let end = match layout.options.format {
            Format::Csv => self.csv_end(bytes, last, layout)?,
            _ => self.text_end(bytes, last, layout)?,
        };
        let (body, width) = match end {
            Some(end) => end,
            None if last && !bytes.is_empty() => (bytes.len(), 0),
            None => return Ok(None),
        };
        let mut row = std::mem::take(&mut self.row);
        if row.key.is_none() && row.fields == layout.position {
            row.key = Some(row.start..body);
        }
        Ok(Some(Found {
            len: body + width,
            body,
            key: row.key,
            marker: row.marker,
            lines: Counted {
                lines: 1 + if newlines_count { row.inner_newlines } else { row.inner_returns },
                as_first: 1 + row.inner_returns,
            },
            in_quotes: row.in_quotes,
        }))
    }

    /// Where the row's line end is, and its width.
    fn text_end(&mut self, bytes: &[u8], last: bool, layout: &Layout) -> Result<Option<(usize, usize)>, Misfit> {
        let delimiter = layout.options.delimiter;
        loop {
            let rest = &bytes[self.row.at..];
            let found = if self.row.key.is_some() {
                memchr3(b'\n', b'\r', b'\\', rest)
            } else {
                rest.iter().position(|&byte| byte == delimiter || matches!(byte, b'\n' | b'\r' | b'\\'))
            };
            let Some(offset) = found else {
                self.row.at = bytes.len();
                return Ok(None);
            };
            let at = self.row.at + offset;
            self.row.at = at;
            match bytes[at] {
                b'\\' => {
                    // Whatever follows it is data, a line end too.
                    let Some(next) = bytes.get(at + 1) else { return Ok(None) };
                    self.row.marker |= *next == b'.';
                    self.row.at = at + 2;
                }
                b'\n' | b'\r' => return self.line_end(bytes, last),
                _ => self.row.end_field(at, layout.position),
            }
        }
    }

    fn csv_end(&mut self, bytes: &[u8], last: bool, layout: &Layout) -> Result<Option<(usize, usize)>, Misfit> {
        let Options { delimiter, quote, escape, .. } = layout.options;
        loop {
            let rest = &bytes[self.row.at..];
            let looks_for_fields = self.row.key.is_none() && !self.row.in_quotes;
            let escapes = escape != quote && self.row.in_quotes;
            let found = if looks_for_fields || escapes {
                rest.iter().position(|&byte| {
                    byte == quote
                        || matches!(byte, b'\n' | b'\r')
                        || (looks_for_fields && byte == delimiter)
                        || (escapes && byte == escape)
                })
            } else {
                memchr3(quote, b'\n', b'\r', rest)
            };
            let Some(offset) = found else {
                self.row.at = bytes.len();
                return Ok(None);
            };
            let at = self.row.at + offset;
            self.row.at = at;
            let byte = bytes[at];
            match byte {
                _ if escapes && byte == escape => {
                    let Some(next) = bytes.get(at + 1) else { return Ok(None) };
                    self.row.at = at + if *next == escape || *next == quote { 2 } else { 1 };
                }
                // A doubled quote opens again at once.
                _ if byte == quote => {
                    self.row.in_quotes = !self.row.in_quotes;
                    self.row.at = at + 1;
                }
                b'\n' | b'\r' if self.row.in_quotes => {
                    self.row.inner_newlines += u32::from(byte == b'\n');
                    self.row.inner_returns += u32::from(byte == b'\r');
                    self.row.at = at + 1;
                }
                b'\n' | b'\r' => return self.line_end(bytes, last),
                _ => self.row.end_field(at, layout.position),
            }
        }
    }

    /// Judges the carriage return or newline that has been reached.
    fn line_end(&mut self, bytes: &[u8], last: bool) -> Result<Option<(usize, usize)>, Misfit> {
        let at = self.row.at;
        match (bytes[at], self.ending) {
            (b'\n', Ending::Unknown | Ending::Newline) => {
                self.ending = Ending::Newline;
                Ok(Some((at, 1)))
            }
            (b'\n', _) => Err(Misfit::Newline),
            (_, Ending::Newline) => Err(Misfit::CarriageReturn),
            (_, Ending::Return) => Ok(Some((at, 1))),
            (_, ending) => match bytes.get(at + 1) {
                Some(b'\n') => {
                    self.ending = Ending::Both;
                    Ok(Some((at, 2)))
                }
                None if !last => Ok(None),
                _ if ending == Ending::Both => Err(Misfit::CarriageReturn),
                _ => {
                    self.ending = Ending::Return;
                    Ok(Some((at, 1)))
                }
            },
        }
    }
}

impl Row {
    fn end_field(&mut self, at: usize, key: usize) {
        if self.fields == key {
            self.key = Some(self.start..at);
        }
        self.fields += 1;
        self.start = at + 1;
        self.at = at + 1;
    }
}

/// The value of a field. `Err` if it is NULL or a default.
pub(super) fn value<'f>(field: &'f [u8], layout: &Layout) -> Result<Cow<'f, [u8]>, Misfit> {
    let Options { null, default, .. } = &layout.options;
    if layout.options.format == Format::Csv {
        return csv_value(field, layout);
    }
    match field {
        _ if *field == **null => Err(Misfit::NullKey),
        _ if default.as_deref() == Some(field) => Err(Misfit::DefaultKey),
        _ => Ok(unescape(field)),
    }
}

/// The backslash sequences of text format.
fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if memchr::memchr(b'\\', field).is_none() {
        return Cow::Borrowed(field);
    }
    let mut value = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(&byte) = field.get(at) {
        at += 1;
        if byte != b'\\' {
            value.push(byte);
            continue;
        }
        let Some(&next) = field.get(at) else {
            value.push(byte);
            break;
        };
        at += 1;
        let digits = |at: usize, radix: u32, count: usize| {
            let digit = |byte: &u8| char::from(*byte).to_digit(radix);
            let found: Vec<u32> = field.get(at..).unwrap_or_default().iter().take(count).map_while(digit).collect();
            (found.iter().fold(0, |number, digit| number * radix + digit), found.len())
        };
        value.push(match next {
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 11,
            b'0'..=b'7' => {
                let (number, count) = digits(at - 1, 8, 3);
                at += count - 1;
                number as u8
            }
            b'x' if field.get(at).is_some_and(u8::is_ascii_hexdigit) => {
                let (number, count) = digits(at, 16, 2);
                at += count;
                number as u8
            }
            other => other,
        });
    }
    Cow::Owned(value)
}

fn csv_value<'f>(field: &'f [u8], layout: &Layout) -> Result<Cow<'f, [u8]>, Misfit> {
    let Options { quote, escape, null, default, force_null, force_not_null, .. } = &layout.options;
    let quoted = memchr::memchr(*quote, field).is_some();
    let value = if quoted { Cow::Owned(unquote(field, *quote, *escape)) } else { Cow::Borrowed(field) };
    let is_null = if quoted {
        *value == **null && force_null.contain(&layout.column)
    } else {
        *field == **null && !force_not_null.contain(&layout.column)
    };
    match () {
        () if is_null => Err(Misfit::NullKey),
        () if !quoted && default.as_deref() == Some(field) => Err(Misfit::DefaultKey),
        () => Ok(value),
    }
}

fn unquote(field: &[u8], quote: u8, escape: u8) -> Vec<u8> {
    let mut value = Vec::with_capacity(field.len());
    let mut in_quotes = false;
    let mut at = 0;
    while let Some(&byte) = field.get(at) {
        at += 1;
        match field.get(at) {
            Some(&next) if in_quotes && byte == escape && (next == escape || next == quote) => {
                value.push(next);
                at += 1;
            }
            _ if byte == quote => in_quotes = !in_quotes,
            _ => value.push(byte),
        }
    }
    value
}
