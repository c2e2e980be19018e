//! Cutting a client's bytes into requests: a simple query, or a batch of extended messages up to Sync or Flush.
//!
//! Invariant: every message is checked to be well formed before any of its batch is acted upon.

use bytes::{Bytes, BytesMut};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::frame::{self, BadLength, HEADER};
use weir_wire::frontend::{Bind, Execute, Object, Parse, Target, read_query, tag};
use weir_wire::read::Malformed;

/// A pipeline longer than this is worked off in pieces before its Sync has come. Over several shards its parts are looked at
/// together as far as that is affordable.
const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// The same where there is one server, which takes it as it comes: so its errors reach the client early.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// A list of messages that has grown longer is not kept for the next batch.
const OPS_KEPT_MAX: usize = 8;

/// What the client asks for next.
#[derive(Debug)]
pub enum Request {
    /// Text of a simple query.
    Query(Bytes),
    Batch(Batch),
    /// A whole FunctionCall frame.
    FunctionCall(Bytes),
    Terminate,
}

/// How a batch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    Sync,
    /// Flush, a piece of a very long pipeline, or a message of another kind behind it: answers are due, the pipeline goes on.
    Flush,
}

#[derive(Debug)]
pub struct Batch {
    pub ops: Vec<Op>,
    pub ending: Ending,
}

/// One extended message; its parts are slices of the client's bytes.
#[derive(Clone, Debug)]
pub enum Op {
    Parse { name: Bytes, sql: Bytes, types: Bytes },
    Bind { portal: Bytes, statement: Bytes, body: Bytes },
    Describe { object: Object, name: Bytes },
    Execute { portal: Bytes, rows_max: i32 },
    Close { object: Object, name: Bytes },
}

/// Bytes after which the session cannot go on: where the next message begins is not certain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    Type(u8),
    Length(BadLength),
    Layout,
}

impl From<Malformed> for Unusable {
    fn from(_: Malformed) -> Self {
        Unusable::Layout
    }
}

impl From<BadLength> for Unusable {
    fn from(bad: BadLength) -> Self {
        Unusable::Length(bad)
    }
}

impl From<Unusable> for UserError {
    fn from(unusable: Unusable) -> Self {
        let violation = |message| UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, message).fatal();
        match unusable {
            Unusable::Type(kind) => violation(format!("invalid frontend message type {kind}")),
            Unusable::Length(BadLength { length: 0..4, .. }) => violation("invalid message length".to_owned()),
            Unusable::Length(BadLength { length, .. }) => {
                UserError::new(Blame::Client, sqlstate::TOO_COMPLEX, "message is too long")
                    .detail(format!("It claims to have {length} bytes."))
                    .hint("Send less at once, or raise limits.message_bytes_max.")
                    .fatal()
            }
            Unusable::Layout => super::session::malformed(),
        }
    }
}

/// Collects messages until a request is complete.
#[derive(Debug)]
pub struct Collector {
    ops: Vec<Op>,
    bytes: usize,
    message_bytes_max: usize,
    batch_bytes_max: usize,
}

impl Collector {
    /// A longer message than `message_bytes_max` is refused.
    pub fn new(message_bytes_max: usize) -> Self {
        Collector { ops: Vec::new(), bytes: 0, message_bytes_max, batch_bytes_max: BATCH_BYTES_MAX }
    }

    /// For a session on one server.
    #[must_use]
    pub fn in_pieces(mut self) -> Self {
        self.batch_bytes_max = PIECE_BYTES_MAX;
        self
    }

    pub fn is_in_pieces(&self) -> bool {
        self.batch_bytes_max == PIECE_BYTES_MAX
    }

    /// There is more than one server now.
    pub fn in_batches(&mut self) {
        self.batch_bytes_max = BATCH_BYTES_MAX;
    }

    /// Takes as many frames as make one request from the front of `inbuf`; `None`: more bytes are needed.
    pub fn next(&mut self, inbuf: &mut BytesMut) -> Result<Option<Request>, Unusable> {
        loop {
            let Some((kind, total)) = frame::header(inbuf, self.message_bytes_max)? else {
                return Ok(None);
            };
            // What is not of the extended protocol comes after all that is; copy data may have been sent ahead of the answer.
            if !self.ops.is_empty()
                && matches!(kind, tag::QUERY | tag::FUNCTION_CALL | tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL)
            {
                return Ok(Some(self.finish(Ending::Flush)));
            }
            if inbuf.len() < total {
                inbuf.reserve(total - inbuf.len());
                return Ok(None);
            }
            let frame = inbuf.split_to(total).freeze();
            if let Some(request) = self.take(kind, &frame)? {
                return Ok(Some(request));
            }
        }
    }

    fn take(&mut self, kind: u8, frame: &Bytes) -> Result<Option<Request>, Unusable> {
        let body = &frame[HEADER..];
        let part = |part: &[u8]| frame.slice_ref(part);
        let op = match kind {
            tag::QUERY => return Ok(Some(Request::Query(part(read_query(body)?)))),
            tag::TERMINATE => return Ok(Some(Request::Terminate)),
            tag::FUNCTION_CALL => return Ok(Some(Request::FunctionCall(frame.clone()))),
            tag::SYNC => return Ok(Some(self.finish(Ending::Sync))),
            tag::FLUSH => return Ok(Some(self.finish(Ending::Flush))),
            // What is left of a copy that has failed; Postgres ignores it too.
            tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL => return Ok(None),
            tag::PARSE => {
                let parse = Parse::read(body)?;
                Op::Parse { name: part(parse.name), sql: part(parse.sql), types: part(parse.types) }
            }
            tag::BIND => {
                let bind = Bind::read(body)?;
                Op::Bind { portal: part(bind.portal), statement: part(bind.statement), body: part(body) }
            }
            tag::DESCRIBE => {
                let target = Target::read(body)?;
                Op::Describe { object: target.object, name: part(target.name) }
            }
            tag::EXECUTE => {
                let execute = Execute::read(body)?;
                Op::Execute { portal: part(execute.portal), rows_max: execute.rows_max }
            }
            tag::CLOSE => {
                let target = Target::read(body)?;
                Op::Close { object: target.object, name: part(target.name) }
            }
            unknown => return Err(Unusable::Type(unknown)),
        };
        self.ops.push(op);
        self.bytes += frame.len();
        Ok(if self.bytes > self.batch_bytes_max { Some(self.finish(Ending::Flush)) } else { None })
    }

    /// Takes back the emptied list of a batch that has been served.
    pub fn recycle(&mut self, batch: Batch) {
        if self.ops.is_empty() && batch.ops.capacity() <= OPS_KEPT_MAX {
            self.ops = batch.ops;
            self.ops.clear();
        }
    }

    /// Messages that have come without a Sync or Flush behind them, as if a Flush had.
    pub fn unfinished(&mut self) -> Option<Request> {
        if self.ops.is_empty() { None } else { Some(self.finish(Ending::Flush)) }
    }

    pub fn has_unfinished(&self) -> bool {
        !self.ops.is_empty()
    }

    fn finish(&mut self, ending: Ending) -> Request {
        self.bytes = 0;
        Request::Batch(Batch { ops: std::mem::take(&mut self.ops), ending })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_at_sync_and_a_lying_length_is_malformed() {
        let mut wire = BytesMut::new();
        Parse { name: b"a", sql: b"SELECT 1", types: b"" }.put(&mut wire);
        Execute { portal: b"", rows_max: 0 }.put(&mut wire);
        let mut collector = Collector::new(1 << 20);
        assert!(matches!(collector.next(&mut wire), Ok(None)));
        weir_wire::frontend::put_sync(&mut wire);
        let Ok(Some(Request::Batch(batch))) = collector.next(&mut wire) else { panic!("no batch") };
        assert_eq!((batch.ops.len(), batch.ending), (2, Ending::Sync));
        let mut lying = BytesMut::from(&b"E\0\0\0\x06xx"[..]);
        assert!(collector.next(&mut lying).is_err());
    }
}
