//! RowDescription and DataRow bodies.

use bytes::{Bytes, BytesMut};

use crate::read::{Malformed, Reader};

/// One column of a RowDescription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub table: u32,
    pub attribute: i16,
    pub type_oid: u32,
    pub type_size: i16,
    pub type_modifier: i32,
    pub binary: bool,
}

/// The columns of a RowDescription body.
pub fn fields(body: &[u8]) -> Result<Vec<Field<'_>>, Malformed> {
    let mut reader = Reader::new(body);
    let count = reader.count()?;
    let mut fields = Vec::with_capacity(count.min(body.len() / 19));
    for _ in 0..count {
        fields.push(Field {
            name: reader.cstr()?,
            table: reader.u32()?,
            attribute: reader.i16()?,
            type_oid: reader.u32()?,
            type_size: reader.i16()?,
            type_modifier: reader.i32()?,
            binary: reader.i16()? != 0,
        });
    }
    reader.end()?;
    Ok(fields)
}

/// Appends a RowDescription body of `fields`.
pub fn put_fields<'a>(out: &mut BytesMut, fields: impl ExactSizeIterator<Item = Field<'a>>) {
    out.extend_from_slice(&(fields.len() as u16).to_be_bytes());
    for field in fields {
        out.extend_from_slice(field.name);
        out.extend_from_slice(&[0]);
        out.extend_from_slice(&field.table.to_be_bytes());
        out.extend_from_slice(&field.attribute.to_be_bytes());
        out.extend_from_slice(&field.type_oid.to_be_bytes());
        out.extend_from_slice(&field.type_size.to_be_bytes());
        out.extend_from_slice(&field.type_modifier.to_be_bytes());
        out.extend_from_slice(&i16::from(field.binary).to_be_bytes());
    }
}

/// The values of a DataRow body, each `None` when null.
pub fn values(body: &[u8]) -> Result<Vec<Option<&[u8]>>, Malformed> {
    let mut reader = Reader::new(body);
    let count = reader.count()?;
    let mut values = Vec::with_capacity(count.min(body.len() / 4));
    for _ in 0..count {
        values.push(reader.value()?);
    }
    reader.end()?;
    Ok(values)
}

/// Takes the last column off a DataRow body; its value, `None` when null or when there is no column.
pub fn take_last(body: &mut Bytes) -> Result<Option<Bytes>, Malformed> {
    let mut reader = Reader::new(body);
    let count = reader.count()?;
    let Some(kept) = count.checked_sub(1) else { return Ok(None) };
    for _ in 0..kept {
        reader.value()?;
    }
    let last = reader.value()?;
    reader.end()?;
    let length = last.map_or(0, <[u8]>::len);
    let value = last.map(|_| body.slice(body.len() - length..));
    let mut rest = BytesMut::from(&body[..body.len() - length - 4]);
    rest[..2].copy_from_slice(&(kept as u16).to_be_bytes());
    *body = rest.freeze();
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_column_comes_off() {
        let row = b"\0\x02\0\0\0\x01a\0\0\0\x02bc";
        let mut body = Bytes::from_static(row);
        assert_eq!(take_last(&mut body), Ok(Some(Bytes::from_static(b"bc"))));
        assert_eq!(values(&body), Ok(vec![Some(&b"a"[..])]));
        assert_eq!(take_last(&mut body), Ok(Some(Bytes::from_static(b"a"))));
        assert_eq!(take_last(&mut body), Ok(None));
        let mut null = Bytes::from_static(b"\0\x01\xff\xff\xff\xff");
        assert_eq!(take_last(&mut null), Ok(None));
        assert_eq!(values(&null), Ok(vec![]));
        assert!(take_last(&mut Bytes::from_static(b"\0\x02\0\0")).is_err());
    }
}
