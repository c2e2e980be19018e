//! What the tier looks like at one epoch: shards, slot map, and which tables live where.
//!
//! A [`Topology`] is immutable; a change is a new value with a higher epoch. What must not enter it: addresses,
//! connections, anything that differs between two proxies that read the same hub.

pub mod catalog;
pub mod drift;
pub mod follow;
pub mod hash;
pub mod in_sql;
pub mod key;
pub mod keyset;
pub mod moves;
pub mod ring;
pub mod roster;
pub mod slots;
pub mod spread;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::id::{Epoch, ShardId, Slot};
pub use key::{Key, KeyType};
pub use keyset::KeySet;
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
        self.slots.owner_of(key.hash())
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

    /// What statements are planned for.
    pub fn width(&self) -> Width {
        match self.roster {
            _ if self.is_single() => Width::One,
            _ if self.roster.is_lone() => Width::Lone,
            _ => Width::Several,
        }
    }
}

/// How many shards may have a part in a statement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Width {
    One,
    /// One ([`Roster::is_lone`]) that is about to have company: what must hold over all shards is seen to already.
    Lone,
    Several,
}

/// Slot → shard, for every slot, and the keys that have an owner of their own. The truth lives in the hub; this is one read of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotMap {
    owners: Arc<[ShardId]>,
    /// By hash, ascending.
    isolated: Arc<[Isolated]>,
}

/// A key that has an owner of its own, whatever its slot says; and what hashes alike.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Isolated {
    pub hash: u64,
    pub owner: ShardId,
    /// The key as it was written when it was isolated.
    pub name: Box<str>,
}

impl SlotMap {
    /// `None` unless there is exactly one owner per slot.
    pub fn new(owners: Vec<ShardId>) -> Option<Self> {
        (owners.len() == Slot::COUNT).then(|| SlotMap { owners: owners.into(), isolated: Arc::default() })
    }

    /// Every slot on one shard.
    pub fn single(shard: ShardId) -> Self {
        SlotMap { owners: vec![shard; Slot::COUNT].into(), isolated: Arc::default() }
    }

    /// With owners of their own for these keys, each named once.
    #[must_use]
    pub fn isolating(self, keys: impl IntoIterator<Item = Isolated>) -> Self {
        let mut isolated: Vec<_> = keys.into_iter().collect();
        isolated.sort_unstable_by_key(|key| key.hash);
        SlotMap { isolated: isolated.into(), ..self }
    }

    /// The owner of a slot, but for the keys of it that are isolated.
    pub fn owner(&self, slot: Slot) -> ShardId {
        self.owners[slot.index()]
    }

    /// The owner of a key with this hash.
    pub fn owner_of(&self, hash: u64) -> ShardId {
        // Asked with every statement; keys are isolated rarely.
        if !self.isolated.is_empty()
            && let Ok(at) = self.isolated.binary_search_by_key(&hash, |key| key.hash)
        {
            return self.isolated[at].owner;
        }
        self.owner(Slot::of_hash(hash))
    }

    pub fn owners(&self) -> &[ShardId] {
        &self.owners
    }

    /// Keys with owners of their own, ascending by hash.
    pub fn isolated(&self) -> &[Isolated] {
        &self.isolated
    }

    /// Everything that a shard owns.
    pub fn owned_by(&self, shard: ShardId) -> KeySet {
        let slots = Slot::all().filter(|slot| self.owner(*slot) == shard).collect();
        KeySet::new(slots, self.isolated.iter().map(|key| (key.hash, key.owner == shard)))
    }

    /// These slots without what is isolated of them.
    pub fn plain(&self, slots: SlotSet) -> KeySet {
        KeySet::new(slots, self.isolated.iter().map(|key| (key.hash, false)))
    }

    /// Keys that have another owner in the other map.
    pub fn differing(&self, other: &SlotMap) -> KeySet {
        // Asked at the beginning of each transaction with one snapshot, mostly of the same map.
        if Arc::ptr_eq(&self.owners, &other.owners) && Arc::ptr_eq(&self.isolated, &other.isolated) {
            return KeySet::default();
        }
        let slots = Slot::all().filter(|slot| self.owner(*slot) != other.owner(*slot)).collect();
        let isolated = self.isolated.iter().chain(other.isolated.iter()).map(|key| key.hash);
        KeySet::new(slots, isolated.map(|hash| (hash, self.owner_of(hash) != other.owner_of(hash))))
    }

    /// The same with all these keys on one shard.
    #[must_use]
    pub fn giving(&self, keys: &KeySet, shard: ShardId) -> Self {
        let mut owners = self.owners.to_vec();
        keys.slots().iter().for_each(|slot| owners[slot.index()] = shard);
        let mut isolated = self.isolated.to_vec();
        for key in isolated.iter_mut().filter(|key| keys.contains(key.hash)) {
            key.owner = shard;
        }
        for hash in keys.beside() {
            if let Err(at) = isolated.binary_search_by_key(&hash, |key| key.hash) {
                isolated.insert(at, Isolated { hash, owner: shard, name: Box::default() });
            }
        }
        SlotMap { owners: owners.into(), isolated: isolated.into() }
    }

    /// The same with other numbers for the shards.
    #[must_use]
    pub fn renumbered(&self, number: impl Fn(ShardId) -> ShardId) -> Self {
        SlotMap {
            owners: self.owners.iter().map(|owner| number(*owner)).collect(),
            isolated: self.isolated.iter().map(|key| Isolated { owner: number(key.owner), ..key.clone() }).collect(),
        }
    }

    /// Slots per shard, for the shards `0..shards`.
    pub fn counts(&self, shards: usize) -> Vec<usize> {
        let mut counts = vec![0; shards];
        for owner in self.owners.iter() {
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

    /// Schema, name, key and its type of every table that is spread by key.
    pub fn sharded(&self) -> impl Iterator<Item = (&str, &str, &str, KeyType)> {
        self.iter().filter_map(|(schema, name, placement)| match placement {
            Placement::Sharded { key, key_type } => Some((schema, name, &**key, *key_type)),
            Placement::Reference | Placement::Global => None,
        })
    }

    /// Is anything spread by key at all?
    pub fn any_sharded(&self) -> bool {
        self.sharded().next().is_some()
    }
}
