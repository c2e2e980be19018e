//! Messages a client sends: checked views for reading, writers for what weir sends to a Backend itself.

use bytes::BytesMut;

use crate::frame::{put, put_cstr};
use crate::read::{Malformed, Reader};

/// Message tags.
pub mod tag {
    pub const BIND: u8 = b'B';
    pub const CLOSE: u8 = b'C';
    pub const COPY_DATA: u8 = b'd';
    pub const COPY_DONE: u8 = b'c';
    pub const COPY_FAIL: u8 = b'f';
    pub const DESCRIBE: u8 = b'D';
    pub const EXECUTE: u8 = b'E';
    pub const FLUSH: u8 = b'H';
    pub const FUNCTION_CALL: u8 = b'F';
    pub const PARSE: u8 = b'P';
    pub const PASSWORD: u8 = b'p';
    pub const QUERY: u8 = b'Q';
    pub const SYNC: u8 = b'S';
    pub const TERMINATE: u8 = b'X';
}

/// Statement or portal, as named by Describe and Close.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Object {
    Statement,
    Portal,
}

#[derive(Clone, Copy, Debug)]
pub struct Parse<'a> {
    pub name: &'a [u8],
    pub sql: &'a [u8],
    /// Big-endian type OIDs, four bytes each.
    pub types: &'a [u8],
}

impl<'a> Parse<'a> {
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let name = reader.cstr()?;
        let sql = reader.cstr()?;
        let count = reader.count()?;
        let types = reader.bytes(count * 4)?;
        reader.end()?;
        Ok(Parse { name, sql, types })
    }

    pub fn put(&self, out: &mut BytesMut) {
        put(out, tag::PARSE, |out| {
            put_cstr(out, self.name);
            put_cstr(out, self.sql);
            out.extend_from_slice(&((self.types.len() / 4) as u16).to_be_bytes());
            out.extend_from_slice(self.types);
        });
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Bind<'a> {
    pub portal: &'a [u8],
    pub statement: &'a [u8],
    /// Everything after the two names: formats, values, result formats.
    pub tail: &'a [u8],
    /// Big-endian parameter format codes, two bytes each.
    formats: &'a [u8],
    values: &'a [u8],
    pub parameters: usize,
    /// Big-endian result format codes, two bytes each; empty: all text; one: for all columns.
    pub result_formats: &'a [u8],
}

impl<'a> Bind<'a> {
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let portal = reader.cstr()?;
        let statement = reader.cstr()?;
        let tail = reader.rest();
        let count = reader.count()?;
        let formats = reader.bytes(count * 2)?;
        let parameters = reader.count()?;
        let values = reader.rest();
        for _ in 0..parameters {
            reader.value()?;
        }
        let count = reader.count()?;
        let result_formats = reader.bytes(count * 2)?;
        reader.end()?;
        if !matches!(formats.len() / 2, 0 | 1) && formats.len() / 2 != parameters {
            return Err(Malformed);
        }
        Ok(Bind { portal, statement, tail, formats, values, parameters, result_formats })
    }

    /// Each parameter in order: is it binary, and its bytes (`None`: null).
    pub fn values(&self) -> impl Iterator<Item = (bool, Option<&'a [u8]>)> + '_ {
        let mut reader = Reader::new(self.values);
        (0..self.parameters).map(move |index| (is_binary(self.formats, index), reader.value().unwrap_or(None)))
    }

    /// As [`Bind::put_for`], for a statement with `hidden` more result columns at the end, which come as text unless one
    /// format holds for all.
    pub fn put_wider(&self, statement: &[u8], hidden: usize, out: &mut BytesMut) {
        let codes = self.result_formats.len() / 2;
        if hidden == 0 || codes < 2 {
            return self.put_for(statement, out);
        }
        put(out, tag::BIND, |out| {
            put_cstr(out, self.portal);
            put_cstr(out, statement);
            out.extend_from_slice(&self.tail[..self.tail.len() - self.result_formats.len() - 2]);
            out.extend_from_slice(&((codes + hidden) as u16).to_be_bytes());
            out.extend_from_slice(self.result_formats);
            out.extend_from_slice(&vec![0; 2 * hidden]);
        });
    }

    /// The body of the same message with more parameters, of type bigint.
    pub fn with_numbers(&self, numbers: &[i64]) -> BytesMut {
        let codes = self.formats.len() / 2;
        let binary = codes == 1 && self.formats != [0, 0];
        let mut body = BytesMut::with_capacity(self.tail.len() + numbers.len() * 24 + 64);
        put_cstr(&mut body, self.portal);
        put_cstr(&mut body, self.statement);
        let more_codes = if codes > 1 { numbers.len() } else { 0 };
        body.extend_from_slice(&((codes + more_codes) as u16).to_be_bytes());
        body.extend_from_slice(self.formats);
        body.extend_from_slice(&vec![0; 2 * more_codes]);
        body.extend_from_slice(&((self.parameters + numbers.len()) as u16).to_be_bytes());
        let results = self.result_formats.len() + 2;
        body.extend_from_slice(&self.values[..self.values.len() - results]);
        for number in numbers {
            let text = number.to_string();
            let value = if binary { &number.to_be_bytes()[..] } else { text.as_bytes() };
            body.extend_from_slice(&(value.len() as i32).to_be_bytes());
            body.extend_from_slice(value);
        }
        body.extend_from_slice(&self.tail[self.tail.len() - results..]);
        body
    }

    /// The body of the same message with all results as text.
    pub fn as_text(&self) -> BytesMut {
        let mut body = BytesMut::with_capacity(self.tail.len() + 64);
        put_cstr(&mut body, self.portal);
        put_cstr(&mut body, self.statement);
        body.extend_from_slice(&self.tail[..self.tail.len() - self.result_formats.len() - 2]);
        body.extend_from_slice(&[0, 0]);
        body
    }

    /// The same message for another portal.
    #[must_use]
    pub fn on_portal(self, portal: &'a [u8]) -> Self {
        Bind { portal, ..self }
    }

    /// The same message with another statement name.
    pub fn put_for(&self, statement: &[u8], out: &mut BytesMut) {
        put(out, tag::BIND, |out| {
            put_cstr(out, self.portal);
            put_cstr(out, statement);
            out.extend_from_slice(self.tail);
        });
    }
}

/// Format code of column or parameter `index` in a list of two-byte codes that may be empty or of length one.
pub fn is_binary(codes: &[u8], index: usize) -> bool {
    let code = match codes.len() / 2 {
        0 => return false,
        1 => &codes[..2],
        _ => codes.get(index * 2..index * 2 + 2).unwrap_or(&[0, 0]),
    };
    code != [0, 0]
}

#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub object: Object,
    pub name: &'a [u8],
}

impl<'a> Target<'a> {
    /// Body of Describe or Close.
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let object = match reader.u8()? {
            b'S' => Object::Statement,
            b'P' => Object::Portal,
            _ => return Err(Malformed),
        };
        let name = reader.cstr()?;
        reader.end()?;
        Ok(Target { object, name })
    }

    /// `tag` is [`tag::DESCRIBE`] or [`tag::CLOSE`].
    pub fn put(&self, tag: u8, out: &mut BytesMut) {
        put(out, tag, |out| {
            out.extend_from_slice(match self.object {
                Object::Statement => b"S",
                Object::Portal => b"P",
            });
            put_cstr(out, self.name);
        });
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Execute<'a> {
    pub portal: &'a [u8],
    /// 0: all rows.
    pub rows_max: i32,
}

impl<'a> Execute<'a> {
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let portal = reader.cstr()?;
        let rows_max = reader.i32()?;
        reader.end()?;
        Ok(Execute { portal, rows_max })
    }

    pub fn put(&self, out: &mut BytesMut) {
        put(out, tag::EXECUTE, |out| {
            put_cstr(out, self.portal);
            out.extend_from_slice(&self.rows_max.to_be_bytes());
        });
    }
}

/// Body of Query: the text.
pub fn read_query(body: &[u8]) -> Result<&[u8], Malformed> {
    let mut reader = Reader::new(body);
    let sql = reader.cstr()?;
    reader.end()?;
    Ok(sql)
}

pub fn put_query(out: &mut BytesMut, sql: &str) {
    put(out, tag::QUERY, |out| put_cstr(out, sql.as_bytes()));
}

pub fn put_sync(out: &mut BytesMut) {
    out.extend_from_slice(&[tag::SYNC, 0, 0, 0, 4]);
}

pub fn put_flush(out: &mut BytesMut) {
    out.extend_from_slice(&[tag::FLUSH, 0, 0, 0, 4]);
}

pub fn put_terminate(out: &mut BytesMut) {
    out.extend_from_slice(&[tag::TERMINATE, 0, 0, 0, 4]);
}

pub fn put_copy_fail(out: &mut BytesMut, why: &str) {
    put(out, tag::COPY_FAIL, |out| put_cstr(out, why.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bind_shows_values_with_their_formats() {
        let body = b"p\0s\0\0\x02\0\0\0\x01\0\x02\0\0\0\x01a\xff\xff\xff\xff\0\x01\0\x01";
        let bind = Bind::read(body).expect("valid");
        let values: Vec<_> = bind.values().collect();
        assert_eq!(values, [(false, Some(&b"a"[..])), (true, None)]);
        assert!(is_binary(bind.result_formats, 7));
        let mut out = BytesMut::new();
        bind.put_for(b"weir_1", &mut out);
        let again = Bind::read(&out[5..]).expect("valid");
        assert_eq!((again.portal, again.statement, again.tail), (&b"p"[..], &b"weir_1"[..], bind.tail));
    }

    #[test]
    fn numbers_follow_the_formats_that_are_there() {
        let texts: &[&[u8]] = &[
            b"p\0s\0\0\0\0\x01\0\0\0\x01a\0\0",
            b"p\0s\0\0\x01\0\x01\0\x01\0\0\0\x01a\0\x01\0\x01",
            b"p\0s\0\0\x02\0\x01\0\0\0\x02\0\0\0\x01a\xff\xff\xff\xff\0\0",
            b"p\0s\0\0\0\0\0\0\0",
        ];
        for (body, binary) in texts.iter().zip([false, true, false, false]) {
            let bind = Bind::read(body).expect("valid");
            let more = bind.with_numbers(&[7, -300]);
            let more = Bind::read(&more).expect("valid");
            assert_eq!((more.portal, more.result_formats), (bind.portal, bind.result_formats));
            let values: Vec<_> = more.values().collect();
            assert_eq!(values[..bind.parameters], bind.values().collect::<Vec<_>>());
            let number: [&[u8]; 2] =
                if binary { [&7_i64.to_be_bytes(), &(-300_i64).to_be_bytes()] } else { [b"7", b"-300"] };
            assert_eq!(values[bind.parameters..], [(binary, Some(number[0])), (binary, Some(number[1]))]);
        }
    }

    #[test]
    fn more_columns_need_more_formats() {
        let body = b"\0s\0\0\0\0\x01\0\0\0\x01a\0\x02\0\x01\0\0";
        let bind = Bind::read(body).expect("valid");
        let mut out = BytesMut::new();
        bind.put_wider(b"t", 2, &mut out);
        let wider = Bind::read(&out[5..]).expect("valid");
        assert_eq!((wider.parameters, wider.result_formats), (1, &[0, 1, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(wider.values().collect::<Vec<_>>(), [(false, Some(&b"a"[..]))]);
    }

    proptest! {
        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Parse::read(&body);
            if let Ok(bind) = Bind::read(&body) {
                prop_assert_eq!(bind.values().count(), bind.parameters);
            }
            let _ = Target::read(&body);
            let _ = Execute::read(&body);
            let _ = read_query(&body);
        }
    }
}
