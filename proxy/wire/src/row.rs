//! RowDescription and DataRow bodies.

use bytes::BytesMut;

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
