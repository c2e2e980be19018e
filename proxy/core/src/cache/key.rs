//! What names a cached reply: everything that could change a byte of it.
//!
//! Invariant: two executions get equal keys only if all their parts are equal. The parts are written with their lengths,
//! so that no two different lists of parts share an encoding, and equality compares those bytes; the hash only finds.
//!
//! What must not enter: portal and statement names, the client's address, anything that changes no byte of a reply.

use std::hash::{BuildHasher, Hash, Hasher};

use bytes::Bytes;
use foldhash::quality::FixedState;

use crate::id::ShardId;

/// One bound parameter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Param<'a> {
    /// Type OID as the client declared or Postgres inferred it; 0 if neither is known.
    pub type_oid: u32,
    pub binary: bool,
    /// `None` is SQL NULL.
    pub value: Option<&'a [u8]>,
}

/// The parts of a key.
#[derive(Clone, Copy, Debug)]
pub struct KeyParts<'a> {
    /// Replies of different shards differ (type OIDs).
    pub shard: ShardId,
    pub database: &'a str,
    /// The role that is in force (SET ROLE included), since grants and policies hang on it.
    pub role: &'a str,
    /// Normalised text; literals that were lifted out of it come as `params`.
    pub statement: &'a str,
    pub params: &'a [Param<'a>],
    /// As in Bind: none, one for all, or one per column; 0 text, 1 binary.
    pub result_formats: &'a [i16],
    /// Every setting that shapes a result (search_path, TimeZone, DateStyle, …), in a fixed order.
    pub settings: &'a [(&'a str, &'a str)],
}

/// A key: its exact bytes and a 128-bit hash of them. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct CacheKey {
    hash: u128,
    bytes: Bytes,
}

impl CacheKey {
    pub fn new(parts: &KeyParts<'_>) -> CacheKey {
        let mut out = Vec::with_capacity(96 + parts.statement.len() + 24 * parts.params.len());
        out.extend_from_slice(&parts.shard.0.to_be_bytes());
        put(&mut out, parts.database.as_bytes());
        put(&mut out, parts.role.as_bytes());
        put(&mut out, parts.statement.as_bytes());
        put_count(&mut out, parts.params.len());
        for param in parts.params {
            out.extend_from_slice(&param.type_oid.to_be_bytes());
            out.push(u8::from(param.binary) | u8::from(param.value.is_none()) << 1);
            put(&mut out, param.value.unwrap_or_default());
        }
        put_formats(&mut out, parts.result_formats);
        put_count(&mut out, parts.settings.len());
        for (name, value) in parts.settings {
            put(&mut out, name.as_bytes());
            put(&mut out, value.as_bytes());
        }
        Self::from_bytes(out.into())
    }

    /// A key from its exact bytes, as [`CacheKey::bytes`] gave them.
    pub fn from_bytes(bytes: Bytes) -> CacheKey {
        // Two independent seeds. Stable within a build; between builds a change only makes entries unreachable.
        let half = |seed: u64| FixedState::with_seed(seed).hash_one(&bytes[..]);
        let hash = u128::from(half(0x7765_6972)) << 64 | u128::from(half(0x63_6163_6865));
        CacheKey { hash, bytes }
    }

    pub fn hash128(&self) -> u128 {
        self.hash
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl PartialEq for CacheKey {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && self.bytes == other.bytes
    }
}

impl Eq for CacheKey {}

impl Hash for CacheKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash as u64);
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&(count as u64).to_be_bytes());
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// "All text" is written in one way, whichever way the client said it; other lists stay as they are, because how many
/// columns a single code stands for is not known here.
fn put_formats(out: &mut Vec<u8>, formats: &[i16]) {
    let formats = if formats.iter().all(|&format| format == 0) { &[] } else { formats };
    put_count(out, formats.len());
    for format in formats {
        out.extend_from_slice(&format.to_be_bytes());
    }
}
