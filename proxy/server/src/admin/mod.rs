//! Console tables as bytes: RowDescription, DataRows and CommandComplete, in text or binary as the client asked.
//!
//! The messages are encoded by pgwire's structs: the console is cold, so its path may allocate freely.
//! Non-goal: the protocol around them (ReadyForQuery, Parse and Bind replies); the session does that for every statement.

use bytes::{BufMut, BytesMut};
use pgwire::messages::Message;
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};
use pgwire::messages::response::CommandComplete;
use weir_core::admin::{Cell, Column, Kind, Table};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::backend;

const INT8: (u32, i16) = (20, 8);
const TEXT: (u32, i16) = (25, -1);

/// Result formats of one Bind: none given is all text, one is for all columns, else one each.
#[derive(Clone, Copy, Debug)]
pub struct Formats<'a>(&'a [i16]);

impl<'a> Formats<'a> {
    pub const TEXT: Formats<'static> = Formats(&[]);

    /// Refuses what Postgres refuses: unknown codes, and a count that fits neither rule.
    pub fn new(codes: &'a [i16], columns: usize) -> Result<Self, UserError> {
        let protocol = |message: String| Err(UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, message));
        if let Some(code) = codes.iter().find(|code| !matches!(code, 0 | 1)) {
            return protocol(format!("unsupported format code: {code}"));
        }
        if codes.len() > 1 && codes.len() != columns {
            return protocol(format!(
                "bind message has {} result formats but query has {columns} columns",
                codes.len()
            ));
        }
        Ok(Formats(codes))
    }

    fn is_binary(self, column: usize) -> bool {
        match self.0 {
            [] => false,
            [all] => *all == 1,
            each => each.get(column) == Some(&1),
        }
    }
}

/// Appends the RowDescription of a table; NoData for one without columns.
pub fn put_description(table: &Table, formats: Formats<'_>, out: &mut BytesMut) -> Result<(), UserError> {
    if table.columns.is_empty() {
        out.extend_from_slice(backend::NO_DATA);
        return Ok(());
    }
    let fields = table.columns.iter().enumerate().map(|(index, column)| field(column, formats.is_binary(index)));
    put(&RowDescription::new(fields.collect()), out)
}

/// Appends the DataRows and the CommandComplete (EmptyQueryResponse for an empty query).
pub fn put_rows(table: &Table, formats: Formats<'_>, out: &mut BytesMut) -> Result<(), UserError> {
    if table.tag.is_empty() {
        out.extend_from_slice(backend::EMPTY_QUERY);
        return Ok(());
    }
    for row in &table.rows {
        let mut data = BytesMut::new();
        for (index, cell) in row.iter().enumerate() {
            put_cell(cell, formats.is_binary(index), &mut data);
        }
        put(&DataRow::new(data, row.len() as i16), out)?;
    }
    put(&CommandComplete::new(table.tag.to_owned()), out)
}

/// Appends the whole answer to a simple query, without ReadyForQuery.
pub fn put_simple(table: &Table, out: &mut BytesMut) -> Result<(), UserError> {
    if !table.columns.is_empty() {
        put_description(table, Formats::TEXT, out)?;
    }
    put_rows(table, Formats::TEXT, out)
}

fn field(column: &Column, binary: bool) -> FieldDescription {
    let (oid, size) = match column.kind {
        Kind::Int8 => INT8,
        Kind::Text => TEXT,
    };
    FieldDescription::new(column.name.to_owned(), 0, 0, oid, size, -1, i16::from(binary))
}

fn put_cell(cell: &Cell, binary: bool, out: &mut BytesMut) {
    let mut sized = |bytes: &[u8]| {
        out.put_i32(bytes.len() as i32);
        out.extend_from_slice(bytes);
    };
    match cell {
        Cell::Null => out.put_i32(-1),
        // Binary text is the text itself.
        Cell::Text(text) => sized(text.as_bytes()),
        Cell::Int(number) if binary => sized(&number.to_be_bytes()),
        Cell::Int(number) => sized(number.to_string().as_bytes()),
    }
}

fn put(message: &impl Message, out: &mut BytesMut) -> Result<(), UserError> {
    message.encode(out).map_err(|error| {
        UserError::new(Blame::Proxy, sqlstate::INTERNAL, format!("cannot encode an admin reply: {error}"))
            .hint("This is a defect of weir; please report it with the command.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_wire::{frame, row};

    fn table() -> Table {
        let column = |name, kind| Column { name, kind };
        Table {
            columns: vec![column("name", Kind::Text), column("items", Kind::Int8)],
            rows: vec![vec!["a\u{e9}".into(), Cell::Int(-2)], vec![Cell::Null, Cell::Null]],
            tag: "SHOW",
        }
    }

    /// Tags and bodies of everything in the buffer, cut by weir-wire rather than by the encoder's own crate.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut found = Vec::new();
        while let Some(frame) = frame::peek(bytes, 1 << 20).expect("lengths are right") {
            found.push((frame.tag, frame.body.to_vec()));
            bytes = &bytes[frame.raw.len()..];
        }
        assert!(bytes.is_empty(), "trailing bytes");
        found
    }

    #[test]
    fn a_simple_answer_is_three_kinds_of_frames() {
        let mut out = BytesMut::new();
        put_simple(&table(), &mut out).expect("encodes");
        let frames = frames(&out);
        assert_eq!(frames.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), b"TDDC");
        let fields = row::fields(&frames[0].1).expect("columns");
        assert_eq!(
            (fields[1].name, fields[1].type_oid, fields[1].type_size, fields[1].binary),
            (&b"items"[..], 20, 8, false)
        );
        assert_eq!(row::values(&frames[1].1).expect("values"), [Some("a\u{e9}".as_bytes()), Some(b"-2")]);
        assert_eq!(row::values(&frames[2].1).expect("values"), [None, None]);
        assert_eq!(frames[3].1, b"SHOW\0");
    }

    #[test]
    fn integers_go_out_binary_when_asked() {
        for codes in [&[1][..], &[0, 1]] {
            let formats = Formats::new(codes, 2).expect("valid");
            let mut out = BytesMut::new();
            put_description(&table(), formats, &mut out).expect("encodes");
            put_rows(&table(), formats, &mut out).expect("encodes");
            let frames = frames(&out);
            assert!(row::fields(&frames[0].1).expect("columns")[1].binary);
            assert_eq!(row::values(&frames[1].1).expect("values")[1], Some(&(-2i64).to_be_bytes()[..]));
        }
    }

    #[test]
    fn wrong_formats_are_refused() {
        assert_eq!(Formats::new(&[2], 2).expect_err("unknown code").sqlstate, "08P01");
        assert_eq!(Formats::new(&[0, 1, 0], 2).expect_err("too many").sqlstate, "08P01");
        assert!(Formats::new(&[], 2).is_ok());
    }

    #[test]
    fn answers_without_rows_are_tags() {
        let mut out = BytesMut::new();
        put_simple(&Table::done("SET"), &mut out).expect("encodes");
        put_simple(&Table::done(""), &mut out).expect("encodes");
        put_description(&Table::done("SET"), Formats::TEXT, &mut out).expect("encodes");
        assert_eq!(frames(&out).iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), b"CIn");
    }
}
