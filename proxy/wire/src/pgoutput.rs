//! Logical replication: the frames inside CopyBoth, and the messages of the output plugin pgoutput in them.
//!
//! Invariant: total on any bytes. A message is taken apart as borrowed slices of itself, must be consumed exactly, and a count
//! never leads to an allocation before as many bytes are there. Versions 1 and 2 of the plugin's protocol: 2 streams large
//! transactions before they end. Non-goals: two-phase messages (they come only if asked for), and what values mean.
//!
//! Source: Postgres documentation, "Streaming Replication Protocol" and "Logical Replication Message Formats";
//! src/backend/replication/logical/proto.c.

use bytes::BytesMut;

use crate::frame::put;
use crate::read::{Malformed, Reader};

/// The oldest server with everything that is asked for here: streaming and logical messages.
pub const SERVER_VERSION_MIN: i32 = 140_000;

/// Most columns a relation can have (MaxTupleAttributeNumber, src/include/access/htup_details.h).
const COLUMNS_MAX: usize = 1664;

// ---- CopyBoth ---------------------------------------------------------------------------------------------------------

/// What a server sends as CopyData. Positions are bytes of WAL, times microseconds since 2000-01-01 by its clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Copied<'a> {
    /// XLogData: one message of the plugin.
    Data {
        start: u64,
        wal_end: u64,
        sent_at: i64,
        message: &'a [u8],
    },
    Keepalive {
        wal_end: u64,
        sent_at: i64,
        reply_now: bool,
    },
}

/// The body of a CopyData frame of a walsender.
pub fn read_copied(body: &[u8]) -> Result<Copied<'_>, Malformed> {
    let mut reader = Reader::new(body);
    match reader.u8()? {
        b'w' => {
            let (start, wal_end, sent_at) = (reader.u64()?, reader.u64()?, reader.i64()?);
            Ok(Copied::Data { start, wal_end, sent_at, message: reader.rest() })
        }
        b'k' => {
            let (wal_end, sent_at, reply) = (reader.u64()?, reader.i64()?, reader.u8()?);
            reader.end()?;
            Ok(Copied::Keepalive { wal_end, sent_at, reply_now: reply != 0 })
        }
        _ => Err(Malformed),
    }
}

/// A standby status update, framed as CopyData: everything below `position` was received and needs not be sent again.
/// `now`: microseconds since 2000-01-01.
pub fn put_status(out: &mut BytesMut, position: u64, now: i64) {
    put(out, crate::backend::tag::COPY_DATA, |out| {
        out.extend_from_slice(b"r");
        for _written_flushed_applied in 0..3 {
            out.extend_from_slice(&position.to_be_bytes());
        }
        out.extend_from_slice(&now.to_be_bytes());
        out.extend_from_slice(&[0]);
    });
}

// ---- messages ---------------------------------------------------------------------------------------------------------

/// One message. `part`: inside a streamed block, the (sub)transaction it belongs to; 0 outside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    Begin {
        final_lsn: u64,
        committed_at: i64,
        xid: u32,
    },
    Commit {
        lsn: u64,
        end_lsn: u64,
        committed_at: i64,
    },
    Origin {
        lsn: u64,
        name: &'a [u8],
    },
    Relation {
        part: u32,
        relation: Relation<'a>,
    },
    Type {
        part: u32,
        id: u32,
        schema: &'a [u8],
        name: &'a [u8],
    },
    Insert {
        part: u32,
        relation: u32,
        new: Tuple<'a>,
    },
    /// `old` is there if the identity has changed, and always where the whole row is the identity.
    Update {
        part: u32,
        relation: u32,
        old: Option<Old<'a>>,
        new: Tuple<'a>,
    },
    Delete {
        part: u32,
        relation: u32,
        old: Old<'a>,
    },
    Truncate {
        part: u32,
        relations: Vec<u32>,
        cascade: bool,
        restart_identity: bool,
    },
    /// pg_logical_emit_message.
    Message {
        part: u32,
        transactional: bool,
        lsn: u64,
        prefix: &'a [u8],
        content: &'a [u8],
    },
    StreamStart {
        xid: u32,
        first: bool,
    },
    StreamStop,
    StreamCommit {
        xid: u32,
        lsn: u64,
        end_lsn: u64,
        committed_at: i64,
    },
    /// `part` equals `xid` if the whole transaction was rolled back.
    StreamAbort {
        xid: u32,
        part: u32,
    },
}

/// How a relation looks from here on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relation<'a> {
    pub id: u32,
    /// Empty for pg_catalog.
    pub schema: &'a [u8],
    pub name: &'a [u8],
    /// pg_class.relreplident.
    pub identity: u8,
    pub columns: Vec<Column<'a>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Column<'a> {
    pub name: &'a [u8],
    pub type_oid: u32,
    pub type_modifier: i32,
    /// Part of the replica identity.
    pub identifies: bool,
}

/// What is told of a row before its change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Old<'a> {
    /// Only columns of the identity; the others read as null.
    Key(Tuple<'a>),
    /// The whole row (REPLICA IDENTITY FULL).
    Row(Tuple<'a>),
}

impl<'a> Old<'a> {
    pub fn tuple(&self) -> &Tuple<'a> {
        match self {
            Old::Key(tuple) | Old::Row(tuple) => tuple,
        }
    }
}

/// The values of a row in the order of [`Relation::columns`], as they came; checked to be whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple<'a> {
    count: usize,
    values: &'a [u8],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Value<'a> {
    Null,
    /// Stored outside the row and not written anew: what it was before.
    Unchanged,
    Text(&'a [u8]),
    Binary(&'a [u8]),
}

impl<'a> Tuple<'a> {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut reader = Reader::new(self.values);
        // They were read once before, so none is missing.
        (0..self.count).map_while(move |_| read_value(&mut reader).ok())
    }

    pub fn get(&self, index: usize) -> Option<Value<'a>> {
        self.values().nth(index)
    }
}

/// One message; `streamed`: it came between StreamStart and StreamStop.
pub fn read_message(body: &[u8], streamed: bool) -> Result<Message<'_>, Malformed> {
    let mut reader = Reader::new(body);
    let kind = reader.u8()?;
    let has_part = matches!(kind, b'R' | b'Y' | b'I' | b'U' | b'D' | b'T' | b'M');
    let part = if streamed && has_part { reader.u32()? } else { 0 };
    let message = match kind {
        b'B' => Message::Begin { final_lsn: reader.u64()?, committed_at: reader.i64()?, xid: reader.u32()? },
        b'C' => {
            reader.u8()?;
            Message::Commit { lsn: reader.u64()?, end_lsn: reader.u64()?, committed_at: reader.i64()? }
        }
        b'O' => Message::Origin { lsn: reader.u64()?, name: reader.cstr()? },
        b'R' => Message::Relation { part, relation: read_relation(&mut reader)? },
        b'Y' => Message::Type { part, id: reader.u32()?, schema: reader.cstr()?, name: reader.cstr()? },
        b'I' => {
            let relation = reader.u32()?;
            expect(&mut reader, b'N')?;
            Message::Insert { part, relation, new: read_tuple(&mut reader)? }
        }
        b'U' => read_update(part, &mut reader)?,
        b'D' => {
            let relation = reader.u32()?;
            let old = match reader.u8()? {
                b'K' => Old::Key(read_tuple(&mut reader)?),
                b'O' => Old::Row(read_tuple(&mut reader)?),
                _ => return Err(Malformed),
            };
            Message::Delete { part, relation, old }
        }
        b'T' => read_truncate(part, &mut reader)?,
        b'M' => {
            let (flags, lsn, prefix) = (reader.u8()?, reader.u64()?, reader.cstr()?);
            let length = reader.u32()? as usize;
            Message::Message { part, transactional: flags & 1 != 0, lsn, prefix, content: reader.bytes(length)? }
        }
        b'S' => Message::StreamStart { xid: reader.u32()?, first: reader.u8()? == 1 },
        b'E' => Message::StreamStop,
        b'c' => {
            let xid = reader.u32()?;
            reader.u8()?;
            Message::StreamCommit { xid, lsn: reader.u64()?, end_lsn: reader.u64()?, committed_at: reader.i64()? }
        }
        b'A' => Message::StreamAbort { xid: reader.u32()?, part: reader.u32()? },
        _ => return Err(Malformed),
    };
    reader.end()?;
    Ok(message)
}

fn expect(reader: &mut Reader<'_>, byte: u8) -> Result<(), Malformed> {
    if reader.u8()? == byte { Ok(()) } else { Err(Malformed) }
}

fn read_relation<'a>(reader: &mut Reader<'a>) -> Result<Relation<'a>, Malformed> {
    let (id, schema, name, identity) = (reader.u32()?, reader.cstr()?, reader.cstr()?, reader.u8()?);
    let count = reader.count()?;
    if count > COLUMNS_MAX {
        return Err(Malformed);
    }
    let mut columns = Vec::new();
    for _ in 0..count {
        let flags = reader.u8()?;
        let name = reader.cstr()?;
        let (type_oid, type_modifier) = (reader.u32()?, reader.i32()?);
        columns.push(Column { name, type_oid, type_modifier, identifies: flags & 1 != 0 });
    }
    Ok(Relation { id, schema, name, identity, columns })
}

fn read_update<'a>(part: u32, reader: &mut Reader<'a>) -> Result<Message<'a>, Malformed> {
    let relation = reader.u32()?;
    let old = match reader.u8()? {
        b'N' => return Ok(Message::Update { part, relation, old: None, new: read_tuple(reader)? }),
        b'K' => Old::Key(read_tuple(reader)?),
        b'O' => Old::Row(read_tuple(reader)?),
        _ => return Err(Malformed),
    };
    expect(reader, b'N')?;
    Ok(Message::Update { part, relation, old: Some(old), new: read_tuple(reader)? })
}

fn read_truncate<'a>(part: u32, reader: &mut Reader<'a>) -> Result<Message<'a>, Malformed> {
    let count = reader.u32()? as usize;
    let options = reader.u8()?;
    // Every relation has its four bytes, so this bounds the list before it is made.
    if reader.rest().len() != count.saturating_mul(4) {
        return Err(Malformed);
    }
    let relations = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
    Ok(Message::Truncate { part, relations, cascade: options & 1 != 0, restart_identity: options & 2 != 0 })
}

/// Walks over a tuple, so that it is known to be whole.
fn read_tuple<'a>(reader: &mut Reader<'a>) -> Result<Tuple<'a>, Malformed> {
    let count = reader.count()?;
    let all = reader.rest();
    for _ in 0..count {
        read_value(reader)?;
    }
    Ok(Tuple { count, values: &all[..all.len() - reader.rest().len()] })
}

fn read_value<'a>(reader: &mut Reader<'a>) -> Result<Value<'a>, Malformed> {
    match reader.u8()? {
        b'n' => Ok(Value::Null),
        b'u' => Ok(Value::Unchanged),
        kind @ (b't' | b'b') => {
            let length = reader.u32()? as usize;
            let bytes = reader.bytes(length)?;
            Ok(if kind == b't' { Value::Text(bytes) } else { Value::Binary(bytes) })
        }
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes put together from numbers and texts.
    fn bytes(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn frames_of_a_walsender_are_read_and_status_is_written() {
        let data = bytes(&[b"w", &7_u64.to_be_bytes(), &9_u64.to_be_bytes(), &(-1_i64).to_be_bytes(), b"E"]);
        assert_eq!(read_copied(&data), Ok(Copied::Data { start: 7, wal_end: 9, sent_at: -1, message: b"E" }));
        let keepalive = bytes(&[b"k", &9_u64.to_be_bytes(), &5_i64.to_be_bytes(), b"\x01"]);
        assert_eq!(read_copied(&keepalive), Ok(Copied::Keepalive { wal_end: 9, sent_at: 5, reply_now: true }));
        for bad in [&b""[..], b"x", &keepalive[..17], &bytes(&[&keepalive, b"x"])] {
            assert_eq!(read_copied(bad), Err(Malformed));
        }
        let mut out = BytesMut::new();
        put_status(&mut out, 0x0102, 3);
        assert_eq!((out[0], out.len()), (b'd', 5 + 1 + 24 + 8 + 1));
        assert_eq!(out[5..14], *b"r\0\0\0\0\0\0\x01\x02");
    }

    #[test]
    fn rows_are_seen_as_they_came() {
        let tuple = b"\0\x04ntu\0\0\0\x02hin";
        // Wrong on purpose: after 't' comes a length.
        assert_eq!(read_message(&bytes(&[b"I\0\0\0\x07N", tuple]), false), Err(Malformed));
        let tuple = b"\0\x04nut\0\0\0\x02hib\0\0\0\x01\xff";
        let insert = bytes(&[b"I\0\0\0\x07N", tuple]);
        let Ok(Message::Insert { part: 0, relation: 7, new }) = read_message(&insert, false) else { panic!() };
        let expected = [Value::Null, Value::Unchanged, Value::Text(b"hi"), Value::Binary(&[0xff])];
        assert_eq!((new.len(), new.is_empty(), new.values().collect::<Vec<_>>()), (4, false, expected.to_vec()));
        assert_eq!((new.get(2), new.get(4)), (Some(Value::Text(b"hi")), None));
        let streamed = bytes(&[b"I\0\0\0\x63\0\0\0\x07N", tuple]);
        assert!(matches!(read_message(&streamed, true), Ok(Message::Insert { part: 99, relation: 7, .. })));
        let update = bytes(&[b"U\0\0\0\x07K", b"\0\x01t\0\0\0\x011", b"N", tuple]);
        let Ok(Message::Update { old: Some(Old::Key(old)), .. }) = read_message(&update, false) else { panic!() };
        assert_eq!(old.get(0), Some(Value::Text(b"1")));
        let delete = bytes(&[b"D\0\0\0\x07O", tuple]);
        let Ok(Message::Delete { old: old @ Old::Row(_), .. }) = read_message(&delete, false) else { panic!() };
        assert_eq!(*old.tuple(), new);
    }

    #[test]
    fn the_other_messages_are_read() {
        let relation = b"R\0\0\0\x07public\0t\0d\0\x02\x01id\0\0\0\0\x14\xff\xff\xff\xff\0name\0\0\0\0\x19\0\0\0\x01";
        let Ok(Message::Relation { relation, .. }) = read_message(relation, false) else { panic!() };
        assert_eq!((relation.id, relation.schema, relation.name), (7, &b"public"[..], &b"t"[..]));
        let [id, name] = relation.columns.as_slice() else { panic!() };
        assert_eq!((id.name, id.type_oid, id.type_modifier, id.identifies), (&b"id"[..], 20, -1, true));
        assert_eq!((name.type_oid, name.identifies), (25, false));
        let truncate = b"T\0\0\0\x02\x03\0\0\0\x07\0\0\0\x08";
        let expected = Message::Truncate { part: 0, relations: vec![7, 8], cascade: true, restart_identity: true };
        assert_eq!(read_message(truncate, false), Ok(expected));
        let message = b"M\x01\0\0\0\0\0\0\0\x05weir\0\0\0\0\x03ddl";
        let Ok(Message::Message { transactional: true, lsn: 5, prefix: b"weir", content: b"ddl", .. }) =
            read_message(message, false)
        else {
            panic!()
        };
        assert_eq!(read_message(b"S\0\0\0\x09\x01", false), Ok(Message::StreamStart { xid: 9, first: true }));
        assert_eq!(read_message(b"E", true), Ok(Message::StreamStop));
        assert_eq!(read_message(b"A\0\0\0\x09\0\0\0\x0a", false), Ok(Message::StreamAbort { xid: 9, part: 10 }));
        let huge = b"T\xff\xff\xff\xff\0\0\0\0\x01";
        assert_eq!(read_message(huge, false), Err(Malformed));
    }

    proptest! {
        /// Whatever comes, it is taken apart or refused, and a tuple that was taken has as many values as it says.
        #[test]
        fn any_bytes_are_read_or_refused(kind in prop::sample::select(b"BCORYIUDTMSEcAwkx".to_vec()), rest in prop::collection::vec(prop::sample::select(vec![0_u8, 0, 0, 0, 1, 2, 4, b'N', b'K', b'O', b'n', b'u', b't', b'b', 0xff]), 0..60), streamed: bool) {
            let body = [&[kind], rest.as_slice()].concat();
            let _ = read_copied(&body);
            match read_message(&body, streamed) {
                Ok(Message::Insert { new, .. }) => prop_assert_eq!(new.values().count(), new.len()),
                Ok(Message::Update { old, new, .. }) => {
                    prop_assert_eq!(new.values().count(), new.len());
                    prop_assert!(old.is_none_or(|old| old.tuple().values().count() == old.tuple().len()));
                }
                _ => {}
            }
        }
    }
}
