//! Newtypes for everything that is "just a number", so that a slot is never passed where a shard is meant.

use std::fmt;

/// A shard of one database: its index in [`crate::topology::Topology::shards`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ShardId(pub u16);

/// One of [`Slot::COUNT`] parts of the key space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(u16);

impl Slot {
    /// Number of slots; fixed for ever, because it is stored in the hub and computed in SQL on the shards.
    pub const COUNT: usize = 4096;

    /// The slot of a 64-bit Postgres extended hash (seed 0): its top 12 bits.
    pub fn of_hash(hash: u64) -> Self {
        Slot((hash >> 52) as u16)
    }

    /// `None` unless `index < Slot::COUNT`.
    pub fn new(index: u16) -> Option<Self> {
        (usize::from(index) < Self::COUNT).then_some(Slot(index))
    }

    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    pub fn all() -> impl Iterator<Item = Slot> {
        (0..Self::COUNT as u16).map(Slot)
    }
}

/// Version of the topology; grows by one with every change of the slot map or endpoints.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch(pub u64);

/// A WAL position of one server; positions of different servers do not compare.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Parses Postgres's text form `XXXXXXXX/XXXXXXXX` (src/backend/utils/adt/pg_lsn.c).
    pub fn parse(text: &str) -> Option<Self> {
        let (high, low) = text.split_once('/')?;
        if high.is_empty() || low.is_empty() || high.len() > 8 || low.len() > 8 {
            return None;
        }
        let high = u64::from_str_radix(high, 16).ok()?;
        let low = u64::from_str_radix(low, 16).ok()?;
        Some(Lsn(high << 32 | low))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_round_trips_through_text() {
        let lsn = Lsn::parse("1/1E000028").expect("valid");
        assert_eq!(lsn, Lsn(0x1_1E00_0028));
        assert_eq!(lsn.to_string(), "1/1E000028");
        for bad in ["", "/", "1", "1/", "/1", "1/123456789", "g/0"] {
            assert_eq!(Lsn::parse(bad), None, "{bad}");
        }
    }
}
