//! Values of the types weir can order and compare, as bytes that sort with memcmp exactly as Postgres sorts the values.
//!
//! Invariant: two values have the same bytes if and only if Postgres calls them equal, in either wire format, and no
//! value's bytes are a prefix of another's, so keys of several columns can be put one after the other.
//! Non-goals: collations other than byte order; the planner says where bytes will do ([`super::OrderKey::byte_order`]).

use super::datetime;
use super::numeric::Decimal;
use crate::error::{Blame, UserError, sqlstate};

/// The types, by pg_type.oid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Bool,
    Bytea,
    Char,
    Int {
        bytes: u8,
    },
    Oid,
    /// text, varchar: byte order only where the planner vouches for it.
    Text,
    /// Blank-padded: trailing blanks do not count.
    Bpchar,
    /// Always in C collation.
    Name,
    Float4,
    Float8,
    Numeric,
    Date,
    Time,
    Timestamp,
    Timestamptz,
    Uuid,
}

impl Kind {
    /// `None`: no order or equality of this type can be reproduced.
    pub(super) fn of(type_oid: u32) -> Option<Self> {
        Some(match type_oid {
            16 => Kind::Bool,
            17 => Kind::Bytea,
            18 => Kind::Char,
            19 => Kind::Name,
            20 => Kind::Int { bytes: 8 },
            21 => Kind::Int { bytes: 2 },
            23 => Kind::Int { bytes: 4 },
            25 | 1043 => Kind::Text,
            26 => Kind::Oid,
            700 => Kind::Float4,
            701 => Kind::Float8,
            1042 => Kind::Bpchar,
            1082 => Kind::Date,
            1083 => Kind::Time,
            1114 => Kind::Timestamp,
            1184 => Kind::Timestamptz,
            1700 => Kind::Numeric,
            2950 => Kind::Uuid,
            _ => return None,
        })
    }

    pub(super) fn is_float(self) -> bool {
        matches!(self, Kind::Float4 | Kind::Float8)
    }

    /// Does its order depend on a collation?
    pub(super) fn is_collated(self) -> bool {
        matches!(self, Kind::Text | Kind::Bpchar)
    }
}

/// A column whose values can be compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Comparable {
    pub(super) column: usize,
    pub(super) kind: Kind,
    pub(super) binary: bool,
    pub(super) descending: bool,
    pub(super) nulls_first: bool,
}

impl Comparable {
    /// Appends the sort bytes of `value` (`None` is null). Fails (0A000) for text weir cannot read.
    pub(super) fn append(&self, value: Option<&[u8]>, out: &mut Vec<u8>) -> Result<(), UserError> {
        let Some(value) = value else {
            out.push(if self.nulls_first { 0 } else { 2 });
            return Ok(());
        };
        out.push(1);
        let start = out.len();
        encode(self.kind, self.binary, value, out).ok_or_else(|| unreadable(self, value))?;
        if self.descending {
            out[start..].iter_mut().for_each(|byte| *byte = !*byte);
        }
        Ok(())
    }
}

fn unreadable(column: &Comparable, value: &[u8]) -> UserError {
    let format = if column.binary { "binary" } else { "text" };
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "cannot merge the rows of several shards by this column",
    )
    .detail(format!(
        "Column {} has a {:?} of {} bytes in {format} format that weir cannot read exactly.",
        column.column + 1,
        column.kind,
        value.len()
    ))
    .hint("Use DateStyle ISO, or restrict the query to one shard key.")
}

fn encode(kind: Kind, binary: bool, value: &[u8], out: &mut Vec<u8>) -> Option<()> {
    match kind {
        Kind::Text | Kind::Name => escaped(value.iter().copied(), out),
        Kind::Bpchar => {
            let end = value.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
            escaped(value[..end].iter().copied(), out);
        }
        Kind::Bytea if binary => escaped(value.iter().copied(), out),
        Kind::Bytea => escaped(bytea_from_text(value)?.into_iter(), out),
        Kind::Char => out.push(char_byte(value)?),
        Kind::Bool => out.push(u8::from(boolean(binary, value)?)),
        Kind::Uuid if binary => out.extend_from_slice(&fixed::<16>(value)?),
        Kind::Uuid => out.extend_from_slice(&uuid_from_text(value)?),
        Kind::Numeric => decimal(binary, value)?.sort_key(out),
        Kind::Float4 | Kind::Float8 => out.extend_from_slice(&float_order(float(kind, binary, value)?).to_be_bytes()),
        Kind::Int { .. } | Kind::Oid => signed(integer(kind, binary, value)?, out),
        Kind::Date | Kind::Time | Kind::Timestamp | Kind::Timestamptz => signed(moment(kind, binary, value)?, out),
    }
    Some(())
}

fn signed(value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(&((value as u64) ^ (1 << 63)).to_be_bytes());
}

/// Zero bytes become `00 FF` and the end is `00 00`, so that order and the no-prefix rule hold for any bytes.
fn escaped(bytes: impl Iterator<Item = u8>, out: &mut Vec<u8>) {
    for byte in bytes {
        out.push(byte);
        if byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0, 0]);
}

/// -0 equals 0, NaN equals NaN and is above infinity (float8_cmp_internal).
fn float_order(value: f64) -> u64 {
    if value.is_nan() {
        return u64::MAX;
    }
    let bits = if value == 0.0 { 0 } else { value.to_bits() };
    if bits >> 63 == 0 { bits | 1 << 63 } else { !bits }
}

fn fixed<const N: usize>(value: &[u8]) -> Option<[u8; N]> {
    value.try_into().ok()
}

fn parsed<T: std::str::FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// An int2, int4, int8 or oid.
pub(super) fn integer(kind: Kind, binary: bool, value: &[u8]) -> Option<i64> {
    match (kind, binary) {
        (_, false) => parsed(value),
        (Kind::Int { bytes: 2 }, true) => fixed(value).map(i16::from_be_bytes).map(i64::from),
        (Kind::Int { bytes: 4 }, true) => fixed(value).map(i32::from_be_bytes).map(i64::from),
        (Kind::Oid, true) => fixed(value).map(u32::from_be_bytes).map(i64::from),
        (_, true) => fixed(value).map(i64::from_be_bytes),
    }
}

/// A float4 or float8; the wider type holds both exactly.
pub(super) fn float(kind: Kind, binary: bool, value: &[u8]) -> Option<f64> {
    match (kind, binary) {
        (Kind::Float4, true) => fixed(value).map(f32::from_be_bytes).map(f64::from),
        (_, true) => fixed(value).map(f64::from_be_bytes),
        (Kind::Float4, false) => parsed::<f32>(value).map(f64::from),
        (_, false) => parsed(value),
    }
}

pub(super) fn decimal(binary: bool, value: &[u8]) -> Option<Decimal> {
    if binary { Decimal::from_binary(value) } else { Decimal::from_text(value) }
}

pub(super) fn boolean(binary: bool, value: &[u8]) -> Option<bool> {
    match (binary, value) {
        (true, [0]) | (false, b"f") => Some(false),
        (true, [1]) | (false, b"t") => Some(true),
        _ => None,
    }
}

fn moment(kind: Kind, binary: bool, value: &[u8]) -> Option<i64> {
    match (kind, binary) {
        (Kind::Date, true) => Some(match i32::from_be_bytes(fixed(value)?) {
            i32::MIN => i64::MIN,
            i32::MAX => i64::MAX,
            days => i64::from(days),
        }),
        (_, true) => fixed(value).map(i64::from_be_bytes),
        (Kind::Date, false) => datetime::date(value),
        (Kind::Time, false) => datetime::time(value),
        (kind, false) => datetime::timestamp(value, kind == Kind::Timestamptz),
    }
}

/// "char": one byte; its text is empty for zero and, from Postgres 16 on, `\ooo` above ASCII.
fn char_byte(value: &[u8]) -> Option<u8> {
    match value {
        [] => Some(0),
        [byte] => Some(*byte),
        [b'\\', digits @ ..] => octal(digits),
        _ => None,
    }
}

fn octal(digits: &[u8]) -> Option<u8> {
    match digits {
        [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7'] => Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')),
        _ => None,
    }
}

fn hex(digit: u8) -> Option<u8> {
    (digit as char).to_digit(16).map(|digit| digit as u8)
}

/// Both settings of `bytea_output`.
fn bytea_from_text(text: &[u8]) -> Option<Vec<u8>> {
    if let Some(digits) = text.strip_prefix(b"\\x") {
        let (pairs, rest) = digits.as_chunks::<2>();
        return rest
            .is_empty()
            .then(|| pairs.iter().map(|[high, low]| Some(hex(*high)? << 4 | hex(*low)?)).collect())?;
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let (byte, after) = match (first, after) {
            (b'\\', [b'\\', after @ ..]) => (b'\\', after),
            (b'\\', _) => (octal(after.get(..3)?)?, &after[3..]),
            (byte, _) => (byte, after),
        };
        bytes.push(byte);
        rest = after;
    }
    Some(bytes)
}

fn uuid_from_text(text: &[u8]) -> Option<[u8; 16]> {
    let mut digits = text.iter().filter(|&&byte| byte != b'-').map(|&byte| hex(byte));
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        *byte = digits.next()?? << 4 | digits.next()??;
    }
    digits.next().is_none().then_some(uuid)
}
