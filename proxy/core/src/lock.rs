//! The advisory locks that weir takes on servers: all their keys, so that no two purposes share one.
//!
//! Invariant: a key never changes its meaning, for weirs of several versions may run beside each other. Non-goals: taking them, and the locks
//! by which weirs notice each other, whose keys are hashes of names ([`crate::fresh::sign`]).

/// Held by who makes schema `weir` on a shard, and what is in it: several proxies may start at once, and CREATE … IF NOT EXISTS alone races
/// with itself.
pub const SCHEMA: i64 = 7_765_697_201;
/// Makes it under that lock, inside a transaction.
pub const MAKE_SCHEMA: &str = "SELECT pg_advisory_xact_lock(7765697201); CREATE SCHEMA IF NOT EXISTS weir";
/// Held by the proxy that decodes a shard's WAL, as long as it does.
pub const DECODES: i64 = 7_765_697_202;
/// Held by who makes the objects that all unique columns share.
pub const UNIQUE_OBJECTS: i64 = i64::from_be_bytes(*b"weirunq1");
/// On the home shard: held by who looks at unique columns and looks their values up.
pub const UNIQUE_LOOKS: i64 = 7_765_697_203;
/// Held by who makes indexes that a new shard lacks.
pub const INDEXES: i64 = i64::from_be_bytes(*b"weirlate");
/// On the hub: held by who makes its tables, or changes what they say of moves and shards.
pub const HUB: i64 = i64::from_be_bytes(*b"weirhub1");
/// On the hub: held by who builds the fallback engine.
pub const ENGINE: i64 = i64::from_be_bytes(*b"weireng1");

/// First halves of pairs. On the hub, with a hash of the database's name: held by the proxy that drives its moves.
pub const MOVER: i32 = i32::from_be_bytes(*b"wmov");
/// With a move's number: held by who has written rows that it moves.
pub const MOVE: i32 = i32::from_be_bytes(*b"wmve");
/// With a move's number: held by who copies.
pub const COPIES: i32 = i32::from_be_bytes(*b"wmcp");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_purpose_has_its_own() {
        let whole = [SCHEMA, DECODES, UNIQUE_OBJECTS, UNIQUE_LOOKS, INDEXES, HUB, ENGINE];
        assert_eq!(BTreeSet::from(whole).len(), whole.len());
        let halves = [MOVER, MOVE, COPIES];
        assert_eq!(BTreeSet::from(halves).len(), halves.len());
        assert!(MAKE_SCHEMA.contains(&format!("({SCHEMA})")));
    }
}
