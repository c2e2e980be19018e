//! What moving slots means: from what a DBA wants to the keys that go from one shard to another.
//!
//! Invariant: a draft moves what it has to and nothing else; every step has one source and one target that differ, and no key is
//! in two steps. Names stand for shards, because a shard that is to be added has no number yet.
//! Non-goals: rows, servers, and whether it can be done ([`survey`] judges what servers have said).

pub mod balance;
pub mod load;
pub mod phase;
pub mod pieces;
pub mod script;
pub mod survey;
pub mod throttle;

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::error::{Blame, UserError, sqlstate};
use crate::id::{ShardId, Slot};
use crate::topology::ring::{Placed, RingShard, propose};
use crate::topology::{Key, KeySet, KeyType, SlotMap, SlotSet, TableRules};

/// What is wanted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Goal {
    /// A server that is there and empty becomes a shard and takes its share. `address` is host:port.
    Add { shard: String, address: String, weight: u32 },
    /// A shard gives up all it has.
    Remove { shard: String },
    /// Shares change; who is not named keeps his weight.
    Weigh(Vec<(String, u32)>),
    /// Just these slots.
    Move { slots: SlotSet, to: String },
    /// Slots move from shards whose statements take more than their share of the time.
    Balance,
    /// One key, wherever its slot is. `address`: `to` may be a new shard that gets nothing else, and its server is there.
    Isolate { key: NamedKey, to: String, address: Option<String> },
    /// A key that was isolated goes back to where its slot is.
    Release { key: NamedKey },
}

impl Goal {
    /// The shard that is to be added, its address (host:port) and its share of the slots.
    pub fn adds(&self) -> Option<(&str, &str, u32)> {
        match self {
            Goal::Add { shard, address, weight } => Some((shard, address, *weight)),
            Goal::Isolate { to, address: Some(address), .. } => Some((to, address, 0)),
            _ => None,
        }
    }

    /// The key it is about.
    pub fn key(&self) -> Option<&NamedKey> {
        match self {
            Goal::Isolate { key, .. } | Goal::Release { key } => Some(key),
            _ => None,
        }
    }
}

/// A key as somebody has written it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedKey {
    pub text: String,
    /// None: that of all sharded tables.
    pub key_type: Option<KeyType>,
}

impl NamedKey {
    /// Its hash. Errors: 22P02 for a text that is none of the type; 42804 if no type is given and tables have several.
    pub fn hash(&self, rules: &TableRules) -> Result<u64, UserError> {
        let key_type = match self.key_type {
            Some(key_type) => key_type,
            None => only_type(rules)?,
        };
        let key = Key::parse(Cow::Borrowed(self.text.as_bytes()), key_type);
        let key = key.ok_or_else(|| {
            refused("22P02", format!("\"{}\" is no shard key of type {}", self.text, key_type.name()))
                .hint("Write the key as a text that Postgres reads as a value of that type.")
        })?;
        Ok(key.hash())
    }
}

/// The type that the keys of all sharded tables have.
fn only_type(rules: &TableRules) -> Result<KeyType, UserError> {
    let mut names: Vec<(&str, KeyType)> =
        rules.sharded().map(|(_, _, _, key_type)| (key_type.name(), key_type)).collect();
    names.sort_unstable_by_key(|(name, _)| *name);
    names.dedup();
    match names.as_slice() {
        [(_, only)] => Ok(*only),
        _ => Err(refused("42804", "it is not clear of which type the key is".to_owned())
            .detail(format!(
                "Sharded tables have keys of: {}.",
                names.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
            ))
            .hint("RESHARD PLAN ISOLATE KEY '42' TYPE bigint TO shard2")),
    }
}

/// A shard of today and its share of the slots; 0: it does not take part (yet).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Weighed {
    pub name: Box<str>,
    pub weight: u32,
}

/// Keys that go from one shard to another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    pub from: Box<str>,
    pub to: Box<str>,
    pub keys: KeySet,
}

/// What there is today.
#[derive(Clone, Copy, Debug)]
pub struct Today<'a> {
    /// In the order of `slots`.
    pub shards: &'a [Weighed],
    pub slots: &'a SlotMap,
    pub rules: &'a TableRules,
}

/// The steps to a goal, by source and target. Errors: 42704 for a shard that is not there or a key that is not isolated, 42710 for a
/// shard that is there, 22023 for a goal that leaves nobody or changes nothing, and those of [`NamedKey::hash`].
pub fn draft(goal: &Goal, today: Today<'_>) -> Result<Vec<Step>, UserError> {
    let Today { shards, slots, rules } = today;
    let mut wanted: Vec<Weighed> = shards.to_vec();
    let steps = match goal {
        Goal::Add { shard, weight, .. } => {
            match wanted.iter_mut().find(|known| *known.name == **shard) {
                Some(known) if known.weight > 0 => {
                    return Err(refused("42710", format!("shard \"{shard}\" exists already"))
                        .hint("RESHARD PLAN WEIGHT changes its share of the slots."));
                }
                // It is registered and takes no part yet.
                Some(known) => known.weight = *weight,
                None => wanted.push(Weighed { name: shard.as_str().into(), weight: *weight }),
            }
            levelled(&wanted, shards, slots)?
        }
        Goal::Remove { shard } => {
            wanted[position(shards, shard)?].weight = 0;
            let steps = levelled(&wanted, shards, slots)?;
            with_released(steps, (shard, shards), slots)?
        }
        Goal::Weigh(weights) => {
            for (shard, weight) in weights {
                wanted[position(shards, shard)?].weight = *weight;
            }
            levelled(&wanted, shards, slots)?
        }
        Goal::Move { slots: moved, to } => {
            let to = position(shards, to)?;
            let pairs = moved.iter().map(|slot| (usize::from(slots.owner(slot).0), to, slot));
            gathered(pairs.filter(|(from, to, _)| from != to), shards, slots)
        }
        Goal::Isolate { key, to, address } => {
            let hash = key.hash(rules)?;
            if address.is_none() {
                position(shards, to)?;
            }
            moved_key(hash, slots.owner_of(hash), to, shards)
        }
        Goal::Release { key } => {
            let hash = key.hash(rules)?;
            if slots.isolated().iter().all(|isolated| isolated.hash != hash) {
                return Err(refused("42704", format!("key \"{}\" is not isolated", key.text))
                    .hint("SHOW SLOTS lists those that are."));
            }
            let home = usize::from(slots.owner(Slot::of_hash(hash)).0);
            moved_key(hash, slots.owner_of(hash), &shards[home].name, shards)
        }
        // [`balance::balance`] knows of load and rows.
        Goal::Balance => Vec::new(),
    };
    if steps.is_empty() {
        return Err(refused(sqlstate::INVALID_PARAMETER_VALUE, "there is nothing to move".to_owned())
            .detail("Every slot is already where this plan would put it.")
            .hint("SHOW SLOTS says where they are."));
    }
    Ok(steps)
}

/// From where the slots are to where weights want them.
fn levelled(wanted: &[Weighed], shards: &[Weighed], slots: &SlotMap) -> Result<Vec<Step>, UserError> {
    let ring: Vec<RingShard<'_>> =
        wanted.iter().map(|shard| RingShard { name: &shard.name, weight: shard.weight }).collect();
    let names: Vec<Box<str>> = shards.iter().map(|shard| shard.name.clone()).collect();
    let placed = Placed { shards: &names, slots };
    let proposed = propose(&ring, Some(placed)).ok_or_else(|| {
        refused(sqlstate::INVALID_PARAMETER_VALUE, "no shard would be left to take the slots".to_owned())
            .hint("At least one shard must have a weight above 0.")
    })?;
    // `wanted` begins with the shards of today, so numbers mean the same in both maps.
    let pairs = slots.owners().iter().zip(proposed.owners()).zip(Slot::all());
    let moved = pairs.filter(|((from, to), _)| from != to).map(|((from, to), slot)| (from.0.into(), to.0.into(), slot));
    Ok(gathered(moved, wanted, slots))
}

/// By pair of shards; keys that are isolated stay where they are.
fn gathered(moved: impl Iterator<Item = (usize, usize, Slot)>, shards: &[Weighed], map: &SlotMap) -> Vec<Step> {
    let mut by_pair: BTreeMap<(usize, usize), Vec<Slot>> = BTreeMap::new();
    for (from, to, slot) in moved {
        by_pair.entry((from, to)).or_default().push(slot);
    }
    let name = |number: usize| shards[number].name.clone();
    let step =
        |((from, to), slots)| Step { from: name(from), to: name(to), keys: map.plain(SlotSet::from_iter(slots)) };
    by_pair.into_iter().map(step).collect()
}

/// One key, if it is not there already.
fn moved_key(hash: u64, from: ShardId, to: &str, shards: &[Weighed]) -> Vec<Step> {
    let from = &shards[usize::from(from.0)].name;
    if **from == *to {
        return Vec::new();
    }
    vec![Step { from: from.clone(), to: to.into(), keys: KeySet::single(hash) }]
}

/// A shard that gives up its slots gives up the keys that were isolated there, too: to where their slots will be.
fn with_released(
    mut steps: Vec<Step>,
    (shard, shards): (&str, &[Weighed]),
    map: &SlotMap,
) -> Result<Vec<Step>, UserError> {
    let leaver = ShardId(position(shards, shard)? as u16);
    for key in map.isolated().iter().filter(|key| key.owner == leaver) {
        // Its slot is another shard's, so it stays where it is.
        let home = &shards[usize::from(map.owner(Slot::of_hash(key.hash)).0)].name;
        let single = KeySet::single(key.hash);
        match steps.iter_mut().find(|step| *step.from == *shard && step.to == *home) {
            Some(step) => step.keys = step.keys.with(&single),
            None => steps.push(Step { from: shard.into(), to: home.clone(), keys: single }),
        }
    }
    Ok(steps)
}

fn position(shards: &[Weighed], name: &str) -> Result<usize, UserError> {
    shards.iter().position(|shard| *shard.name == *name).ok_or_else(|| {
        let names: Vec<&str> = shards.iter().map(|shard| &*shard.name).collect();
        refused("42704", format!("there is no shard \"{name}\"")).detail(format!("There are: {}.", names.join(", ")))
    })
}

fn refused(code: &'static str, message: String) -> UserError {
    UserError::new(Blame::Client, code, message)
}

#[cfg(test)]
mod tests;
