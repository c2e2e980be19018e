//! What the tier looks like at one epoch: shards, slot map, and which tables live where.
//!
//! A [`Topology`] is immutable; a change is a new value with a higher epoch. What must not enter it: addresses,
//! connections, anything that differs between two proxies that read the same hub.

pub mod catalog;
pub mod drift;
pub mod hash;
pub mod in_sql;
pub mod key;
pub mod moves;
pub mod ring;
pub mod roster;
pub mod slots;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::id::{Epoch, ShardId, Slot};
pub use key::{Key, KeyType};
pub use roster::{Roster, ShardState};
pub use slots::SlotSet;

/// The whole map at one epoch.
#[derive(Clone, Debug)]
pub struct Topology {
    pub epoch: Epoch,
    /// Names in [`ShardId`] order, of those too that do not take part.
    pub shards: Arc<[Box<str>]>,
    pub roster: Roster,
    pub slots: SlotMap,
    pub tables: Arc<TableRules>,
    /// Where global tables, catalogue look-ups and statements without a table go.
    pub home: ShardId,
    /// What is on its way between shards.
    pub moves: moves::Moves,
}

impl Topology {
    /// The shard that owns `key` now.
    pub fn shard_of(&self, key: &Key<'_>) -> ShardId {
        self.slots.owner(key.slot())
    }

    /// The shards that take part, ascending.
    pub fn active(&self) -> &[ShardId] {
        self.roster.active()
    }

    /// With one shard nothing has to be routed by key.
    pub fn is_single(&self) -> bool {
        self.roster.is_single()
    }

    /// The name of a shard; its number, if there is none.
    pub fn name_of(&self, shard: ShardId) -> String {
        self.shards.get(usize::from(shard.0)).map_or_else(|| shard.to_string(), ToString::to_string)
    }

    /// For [`crate::plan::Schema`]: one, or more than one.
    pub fn width(&self) -> usize {
        if self.is_single() { 1 } else { self.active().len().max(2) }
    }
}

/// Slot → shard, for every slot. The truth lives in the hub; this is one read of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotMap(Arc<[ShardId]>);

impl SlotMap {
    /// `None` unless there is exactly one owner per slot.
    pub fn new(owners: Vec<ShardId>) -> Option<Self> {
        (owners.len() == Slot::COUNT).then(|| SlotMap(owners.into()))
    }

    /// Every slot on one shard.
    pub fn single(shard: ShardId) -> Self {
        SlotMap(vec![shard; Slot::COUNT].into())
    }

    pub fn owner(&self, slot: Slot) -> ShardId {
        self.0[slot.index()]
    }

    pub fn owners(&self) -> &[ShardId] {
        &self.0
    }

    /// The same with other numbers for the shards.
    #[must_use]
    pub fn renumbered(&self, number: impl Fn(ShardId) -> ShardId) -> Self {
        SlotMap(self.0.iter().map(|owner| number(*owner)).collect())
    }

    /// Slots per shard, for the shards `0..shards`.
    pub fn counts(&self, shards: usize) -> Vec<usize> {
        let mut counts = vec![0; shards];
        for owner in self.0.iter() {
            if let Some(count) = counts.get_mut(usize::from(owner.0)) {
                *count += 1;
            }
        }
        counts
    }
}

/// How a table is spread over the shards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Rows live on the shard that owns the slot of `key`. Tables with equal key values of one [`KeyType`] are colocated.
    Sharded { key: Box<str>, key_type: KeyType },
    /// A full copy on every shard: read anywhere, written everywhere.
    Reference,
    /// One home: [`Topology::home`]. Also every table that is not declared.
    Global,
}

/// The declared tables, by schema and name (both as stored in the server's catalogue, i.e. unquoted names in lower case).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TableRules {
    rules: BTreeMap<(Box<str>, Box<str>), Placement>,
    /// Columns of sharded tables whose values are unique over all shards.
    unique: BTreeMap<catalog::RelationName, Vec<Box<str>>>,
    /// Tables whose rows are never cached.
    uncached: BTreeSet<catalog::RelationName>,
    /// For how many milliseconds answers that read a table may be served although they are overtaken.
    stale_ms: BTreeMap<catalog::RelationName, u32>,
}

impl TableRules {
    pub fn insert(&mut self, schema: &str, name: &str, placement: Placement) -> Option<Placement> {
        self.rules.insert((schema.into(), name.into()), placement)
    }

    /// Placement of a table; an undeclared one is global.
    pub fn placement(&self, schema: &str, name: &str) -> &Placement {
        self.rules.get(&(schema.into(), name.into())).unwrap_or(&Placement::Global)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Placement)> {
        self.rules.iter().map(|((schema, name), placement)| (&**schema, &**name, placement))
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Declares columns of a sharded table as unique over all shards.
    pub fn insert_unique(&mut self, schema: &str, name: &str, columns: Vec<Box<str>>) {
        if !columns.is_empty() {
            self.unique.insert((schema.into(), name.into()), columns);
        }
    }

    /// Columns of a table that are declared unique over all shards.
    pub fn unique_columns(&self, schema: &str, name: &str) -> &[Box<str>] {
        if self.unique.is_empty() {
            return &[];
        }
        self.unique.get(&(schema.into(), name.into())).map_or(&[], Vec::as_slice)
    }

    /// Is any column declared unique over all shards?
    pub fn any_unique(&self) -> bool {
        !self.unique.is_empty()
    }

    /// Declares that nothing that reads a table is ever cached.
    pub fn insert_uncached(&mut self, schema: &str, name: &str) {
        self.uncached.insert((schema.into(), name.into()));
    }

    /// Is it declared so?
    pub fn is_uncached(&self, schema: &str, name: &str) -> bool {
        !self.uncached.is_empty() && self.uncached.contains(&(schema.into(), name.into()))
    }

    /// Declares that answers that read a table may be served for that long although they are overtaken.
    pub fn insert_stale(&mut self, schema: &str, name: &str, stale_ms: u32) {
        self.stale_ms.insert((schema.into(), name.into()), stale_ms);
    }

    /// For how many milliseconds that is declared, if it is.
    pub fn stale_ms(&self, schema: &str, name: &str) -> Option<u32> {
        if self.stale_ms.is_empty() {
            return None;
        }
        self.stale_ms.get(&(schema.into(), name.into())).copied()
    }

    /// Is anything spread by key at all?
    pub fn any_sharded(&self) -> bool {
        self.rules.values().any(|placement| matches!(placement, Placement::Sharded { .. }))
    }
}
