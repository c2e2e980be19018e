//! May a map that the hub shows take the place of the one in force, and what does it void?
//!
//! A hub that was restored, or promoted without its last transactions, shows an older map than the one proxies work by, or later another
//! one under the same number. Invariant: neither is ever taken for progress. Non-goal: mending it, which needs somebody who knows
//! where the rows are.

use std::collections::BTreeSet;

use super::Topology;
use super::moves::Moves;
use crate::id::{Epoch, ShardId};

/// How a map that was read stands to the one in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    Newer,
    Same,
    /// The hub has forgotten what is in force here.
    Older,
    /// Another map has been given the number of the one in force.
    Other,
}

impl Shown {
    /// Has the hub lost something?
    pub fn is_backward(self) -> bool {
        matches!(self, Shown::Older | Shown::Other)
    }
}

/// Epochs decide; under the same one, the owners of slots and what is on its way.
pub fn compare(in_force: &Topology, read: &Topology) -> Shown {
    if read.epoch > in_force.epoch {
        Shown::Newer
    } else if read.epoch < in_force.epoch {
        Shown::Older
    } else if read.slots == in_force.slots && read.moves == in_force.moves {
        Shown::Same
    } else {
        Shown::Other
    }
}

/// Shards of which nothing counts any more that was read, or known of their replicas, by the map before: their rows that are shown may
/// be others without anybody having written them. Every shard of a move, unless the one step between the two maps only lets
/// statements wait or go on: that shows the same rows, and is waited for by everybody.
pub fn voided(before: &Topology, now: &Topology) -> BTreeSet<ShardId> {
    let shows_the_same = now.epoch == Epoch(before.epoch.0 + 1)
        && now.slots == before.slots
        && now.roster == before.roster
        && now.moves.all_guests() == before.moves.all_guests();
    let moves = [&before.moves, &now.moves].into_iter().filter(|_| !shows_the_same);
    moves.flat_map(Moves::shards).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Slot;
    use crate::topology::moves::{Move, Stage};
    use crate::topology::{KeySet, Roster, SlotMap, SlotSet, TableRules};

    fn map(epoch: u64, owner: u16) -> Topology {
        Topology {
            epoch: Epoch(epoch),
            shards: ["a".into(), "b".into()].into(),
            roster: Roster::fixed(2),
            slots: SlotMap::single(ShardId(owner)),
            tables: TableRules::default().into(),
            home: ShardId(0),
            moves: Moves::default(),
        }
    }

    #[test]
    fn what_a_hub_has_forgotten_is_no_progress() {
        let ours = map(7, 0);
        for (read, shown) in
            [(map(8, 1), Shown::Newer), (map(7, 0), Shown::Same), (map(6, 0), Shown::Older), (map(7, 1), Shown::Other)]
        {
            assert_eq!(compare(&ours, &read), shown);
            assert_eq!(shown.is_backward(), matches!(shown, Shown::Older | Shown::Other));
        }
    }

    #[test]
    fn letting_statements_wait_voids_nothing_and_every_other_step_does() {
        let keys = KeySet::from(SlotSet::from_iter([Slot::new(7).expect("a slot")]));
        let at = |epoch: u64, stage: Option<Stage>| {
            let one = |stage| Move { id: 1, from: ShardId(0), to: ShardId(1), keys: keys.clone(), stage };
            let own = map(epoch, 0);
            let is_over = matches!(stage, Some(Stage::Moved | Stage::Returning));
            let slots = if is_over { own.slots.giving(&keys, ShardId(1)) } else { own.slots.clone() };
            Topology { slots, moves: Moves::new(stage.map(one).into_iter().collect()), ..own }
        };
        let both = BTreeSet::from([ShardId(0), ShardId(1)]);
        use Stage::{Copying, Cutting, Moved, Returning};
        for (before, now, is_void) in [
            (None, Some(Copying), true),
            (Some(Copying), Some(Cutting), false),
            (Some(Cutting), Some(Copying), false),
            (Some(Cutting), Some(Moved), true),
            (Some(Moved), Some(Returning), false),
            (Some(Returning), Some(Moved), false),
            (Some(Returning), Some(Copying), true),
            (Some(Copying), None, true),
            (Some(Moved), None, true),
        ] {
            let found = voided(&at(4, before), &at(5, now));
            assert_eq!(found == both, is_void, "{before:?} to {now:?}: {found:?}");
            // What was in between, nobody knows.
            assert_eq!(voided(&at(4, before), &at(6, now)), both);
        }
        assert!(voided(&at(4, None), &at(5, None)).is_empty());
    }
}
