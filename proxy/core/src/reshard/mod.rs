//! What moving slots means: from what a DBA wants to the slots that go from one shard to another.
//!
//! Invariant: a draft moves what it has to and nothing else; every step has one source and one target that differ, and no slot is
//! in two steps. Names stand for shards, because a shard that is to be added has no number yet.
//! Non-goals: rows, servers, and whether it can be done ([`survey`] judges what servers have said).

pub mod phase;
pub mod script;
pub mod survey;

use std::collections::BTreeMap;

use crate::error::{Blame, UserError, sqlstate};
use crate::topology::ring::{Placed, RingShard, propose};
use crate::topology::{SlotMap, SlotSet};

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
}

/// A shard of today and its share of the slots; 0: it does not take part (yet).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Weighed {
    pub name: Box<str>,
    pub weight: u32,
}

/// Slots that go from one shard to another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    pub from: Box<str>,
    pub to: Box<str>,
    pub slots: SlotSet,
}

/// The steps to a goal, by source and target. `shards` in the order of `slots`. Errors: 42704 for a shard that is not there, 42710
/// for one that is, 22023 for a goal that leaves nobody or changes nothing.
pub fn draft(goal: &Goal, shards: &[Weighed], slots: &SlotMap) -> Result<Vec<Step>, UserError> {
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
            levelled(&wanted, shards, slots)?
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
            gathered(pairs.filter(|(from, to, _)| from != to), shards)
        }
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
    let pairs = slots.owners().iter().zip(proposed.owners()).zip(crate::id::Slot::all());
    let moved = pairs.filter(|((from, to), _)| from != to).map(|((from, to), slot)| (from.0.into(), to.0.into(), slot));
    Ok(gathered(moved, wanted))
}

fn gathered(moved: impl Iterator<Item = (usize, usize, crate::id::Slot)>, shards: &[Weighed]) -> Vec<Step> {
    let mut by_pair: BTreeMap<(usize, usize), Vec<crate::id::Slot>> = BTreeMap::new();
    for (from, to, slot) in moved {
        by_pair.entry((from, to)).or_default().push(slot);
    }
    let name = |number: usize| shards[number].name.clone();
    let step = |((from, to), slots)| Step { from: name(from), to: name(to), slots: SlotSet::from_iter(slots) };
    by_pair.into_iter().map(step).collect()
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
