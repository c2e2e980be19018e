//! Shard key values in the one canonical form whose hash Postgres and weir agree on.

use std::borrow::Cow;

use super::hash::{hash_bytes_extended, hash_int8_extended};
use crate::id::Slot;

/// Type family of a shard key. int2, int4 and int8 hash alike, text and varchar hash alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum KeyType {
    Int,
    Text,
    Uuid,
}

/// A non-null key value.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Key<'a> {
    Int(i64),
    /// Bytes in the server's encoding (UTF-8).
    Text(Cow<'a, [u8]>),
    Uuid([u8; 16]),
}

impl Key<'_> {
    /// Would a column of type varchar(n) perhaps store another value? Postgres cuts blanks off what is too long.
    pub fn ends_blank(&self) -> bool {
        matches!(self, Key::Text(text) if text.ends_with(b" "))
    }

    /// Postgres's extended hash with seed 0: `hashint8extended`, `hashtextextended`, `uuid_hash_extended`.
    pub fn hash(&self) -> u64 {
        match self {
            Key::Int(value) => hash_int8_extended(*value, 0),
            Key::Text(bytes) => hash_bytes_extended(bytes, 0),
            Key::Uuid(bytes) => hash_bytes_extended(bytes, 0),
        }
    }

    pub fn slot(&self) -> Slot {
        Slot::of_hash(self.hash())
    }

    /// A value in text form, as the type's input function reads it. `None`: it cannot be read, or only by some servers.
    pub fn parse(text: Cow<'_, [u8]>, key_type: KeyType) -> Option<Key<'_>> {
        match key_type {
            KeyType::Int => parse_integer(&text).map(Key::Int),
            KeyType::Text => Some(Key::Text(text)),
            KeyType::Uuid => parse_uuid(&text).map(Key::Uuid),
        }
    }

    /// A value in binary form; integers of any width.
    pub fn from_binary(bytes: &[u8], key_type: KeyType) -> Option<Key<'_>> {
        match key_type {
            KeyType::Int => binary_integer(bytes).map(Key::Int),
            KeyType::Text => Some(Key::Text(Cow::Borrowed(bytes))),
            KeyType::Uuid => bytes.try_into().ok().map(Key::Uuid),
        }
    }

    pub fn into_owned(self) -> Key<'static> {
        match self {
            Key::Int(value) => Key::Int(value),
            Key::Text(bytes) => Key::Text(Cow::Owned(bytes.into_owned())),
            Key::Uuid(bytes) => Key::Uuid(bytes),
        }
    }
}

impl KeyType {
    /// The names a config file may use for it.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "bigint" | "int8" | "integer" | "int" | "int4" | "smallint" | "int2" => Some(KeyType::Int),
            "text" | "varchar" | "character varying" => Some(KeyType::Text),
            "uuid" => Some(KeyType::Uuid),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            KeyType::Int => "bigint",
            KeyType::Text => "text",
            KeyType::Uuid => "uuid",
        }
    }
}

/// An int2, int4 or int8 as its send function writes it.
pub fn binary_integer(bytes: &[u8]) -> Option<i64> {
    if let Ok(bytes) = <[u8; 8]>::try_from(bytes) {
        return Some(i64::from_be_bytes(bytes));
    }
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(i64::from(i32::from_be_bytes(bytes)));
    }
    <[u8; 2]>::try_from(bytes).ok().map(|bytes| i64::from(i16::from_be_bytes(bytes)))
}

/// As int8in reads it (src/backend/utils/adt/numutils.c): blanks around, a sign, decimal digits.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let start = text.iter().position(|byte| !blank(byte))?;
    let end = text.iter().rposition(|byte| !blank(byte))? + 1;
    std::str::from_utf8(&text[start..end]).ok()?.parse().ok()
}

/// As uuid_in reads it (src/backend/utils/adt/uuid.c): hex digits of any case, an optional hyphen after every four of
/// them, optional braces around the whole.
pub fn parse_uuid(text: &[u8]) -> Option<[u8; 16]> {
    let text = match text {
        [b'{', inner @ .., b'}'] => inner,
        [b'{', ..] | [.., b'}'] => return None,
        _ => text,
    };
    let mut bytes = [0; 16];
    let mut at = 0;
    for (index, byte) in bytes.iter_mut().enumerate() {
        let high = char::from(*text.get(at)?).to_digit(16)?;
        let low = char::from(*text.get(at + 1)?).to_digit(16)?;
        *byte = (high << 4 | low) as u8;
        at += 2;
        if index % 2 == 1 && index < 15 && text.get(at) == Some(&b'-') {
            at += 1;
        }
    }
    (at == text.len()).then_some(bytes)
}
