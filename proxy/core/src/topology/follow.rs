//! May a map that the hub shows take the place of the one in force?
//!
//! A hub that was restored, or promoted without its last transactions, shows an older map than the one proxies work by, or later another
//! one under the same number. Invariant: neither is ever taken for progress. Non-goal: mending it, which needs somebody who knows
//! where the rows are.

use super::Topology;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{Epoch, ShardId};
    use crate::topology::moves::Moves;
    use crate::topology::{Roster, SlotMap, TableRules};

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
}
