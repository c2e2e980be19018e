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
