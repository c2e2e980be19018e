//! Slots on their way from one shard to another, as far as those must know who read and write meanwhile.
//!
//! Invariant: while slots move, rows of them are on both shards, and one of the two owns them; what the other one holds are its
//! *guests*, and no statement that could meet them may see them. Non-goal: how the rows get there (that is the mover's).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{KeySet, Topology};
use crate::id::{Epoch, ShardId};

/// How far a move has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The source owns the slots, and the target has copies.
    Copying,
    /// As before, but statements that touch the slots wait: the owner is about to change.
    Cutting,
    /// The target owns the slots, and the source still has what it had.
    Moved,
    /// As before, but statements that touch the slots wait: they go back to the source.
    Returning,
}

/// One move.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    pub id: i64,
    pub from: ShardId,
    pub to: ShardId,
    pub keys: KeySet,
    pub stage: Stage,
}

/// For each shard that may hold rows it does not own, the keys of those rows.
pub type Guests = BTreeMap<ShardId, KeySet>;

/// All moves of an epoch. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Moves {
    all: Arc<[Move]>,
    guests: Arc<Guests>,
    waiting: Arc<KeySet>,
}

impl Moves {
    pub fn new(all: Vec<Move>) -> Self {
        let mut guests = Guests::new();
        let mut waiting = KeySet::default();
        for one in &all {
            let host = match one.stage {
                Stage::Copying | Stage::Cutting => one.to,
                Stage::Moved | Stage::Returning => one.from,
            };
            let set = guests.entry(host).or_default();
            *set = set.with(&one.keys);
            if matches!(one.stage, Stage::Cutting | Stage::Returning) {
                waiting = waiting.with(&one.keys);
            }
        }
        Moves { all: all.into(), guests: guests.into(), waiting: waiting.into() }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Move> {
        self.all.iter()
    }

    /// Is nothing on its way?
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Keys of which a shard may hold rows that it does not own. `None`: all it has is its own.
    pub fn guests(&self, shard: ShardId) -> Option<&KeySet> {
        // Asked with every statement that several shards answer; moves are rare.
        if self.guests.is_empty() { None } else { self.guests.get(&shard) }
    }

    /// The same for all shards. `None`: no shard has any.
    pub fn all_guests(&self) -> Option<&Arc<Guests>> {
        Some(&self.guests).filter(|guests| !guests.is_empty())
    }

    /// Keys whose owner is about to change.
    pub fn waiting(&self) -> &KeySet {
        &self.waiting
    }

    /// The shards that own these now, and are to own them no more in a moment.
    pub fn givers(&self) -> impl Iterator<Item = ShardId> {
        self.all.iter().filter_map(|one| match one.stage {
            Stage::Cutting => Some(one.from),
            Stage::Returning => Some(one.to),
            Stage::Copying | Stage::Moved => None,
        })
    }

    /// Every shard that gives or takes.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> {
        self.all.iter().flat_map(|one| [one.from, one.to])
    }

    fn moving(&self) -> KeySet {
        self.all.iter().fold(KeySet::default(), |all, one| all.with(&one.keys))
    }
}

/// Maps on which keys that move lie on a shard that does not exist: a plan made on one of them tells whether a statement touches
/// such a slot, however it names its keys.
#[derive(Clone, Debug)]
pub struct Apart {
    pub moving: Topology,
    /// Those whose statements wait; `None`: there are none.
    pub waiting: Option<Topology>,
    /// Those that have another owner in force; `None`: there are none. Only for who keeps an older map.
    pub gone: Option<Topology>,
    /// What every shard has must stay as it is: a shard is being given it.
    pub shared_waits: bool,
    /// More shards have it than the map knows. Only for who keeps an older map.
    pub shared_gone: bool,
    /// The one shard's own sequences count no more, and who counts in their place has not begun.
    pub draws_wait: bool,
    /// In force.
    pub epoch: Epoch,
}

impl Apart {
    /// `None`: nothing moves.
    pub fn of(topology: &Topology) -> Option<Apart> {
        let shared_waits = topology.roster.is_anyone_entering();
        if topology.moves.is_empty() && !shared_waits {
            return None;
        }
        Some(Apart {
            moving: without(topology, &topology.moves.moving()),
            waiting: without_any(topology, topology.moves.waiting()),
            gone: None,
            shared_waits,
            shared_gone: false,
            draws_wait: draws_wait(topology),
            epoch: topology.epoch,
        })
    }

    /// For a transaction that keeps the map of its snapshot, while `now` is in force. `None`: all is where it was, and stays.
    pub fn since(kept: &Topology, now: &Topology) -> Option<Apart> {
        let gone = kept.slots.differing(&now.slots);
        let shared_waits = now.roster.is_anyone_entering();
        let shared_gone = now.active().iter().any(|shard| !kept.roster.is_active(*shard));
        if gone.is_empty() && now.moves.is_empty() && !shared_waits && !shared_gone {
            return None;
        }
        Some(Apart {
            moving: without(kept, &gone.with(&now.moves.moving())),
            waiting: None,
            gone: without_any(kept, &gone),
            shared_waits,
            shared_gone,
            draws_wait: draws_wait(now),
            epoch: now.epoch,
        })
    }

    /// The shard that does not exist.
    pub fn nobody(&self) -> ShardId {
        ShardId(self.moving.shards.len() as u16 - 1)
    }
}

fn draws_wait(topology: &Topology) -> bool {
    topology.roster.is_anyone_entering() && topology.active().len() == 1
}

/// The map with these keys on one shard more, which does not exist.
fn without(topology: &Topology, keys: &KeySet) -> Topology {
    let nobody = ShardId(topology.shards.len() as u16);
    let shards = topology.shards.iter().cloned().chain(["moving".into()]).collect();
    Topology { shards, slots: topology.slots.giving(keys, nobody), ..topology.clone() }
}

fn without_any(topology: &Topology, keys: &KeySet) -> Option<Topology> {
    (!keys.is_empty()).then(|| without(topology, keys))
}

#[cfg(test)]
mod tests {
    use super::super::{Roster, ShardState, SlotMap};
    use super::*;

    fn map(epoch: u64, states: &[ShardState]) -> Topology {
        Topology {
            epoch: Epoch(epoch),
            shards: states.iter().map(|_| "a".into()).collect(),
            roster: Roster::new(states.to_vec()),
            slots: SlotMap::single(ShardId(0)),
            tables: Arc::default(),
            home: ShardId(0),
            moves: Moves::default(),
        }
    }

    #[test]
    fn while_a_shard_enters_what_all_have_waits_and_once_it_has_it_an_older_map_changes_nothing() {
        use ShardState::{Active, Entering, Joining};
        let [joining, entering, active] =
            [(1, Joining), (2, Entering), (3, Active)].map(|(epoch, state)| map(epoch, &[Active, state]));
        assert!(Apart::of(&joining).is_none() && Apart::of(&active).is_none());
        let said = |apart: Option<Apart>| {
            apart.map(|apart| (apart.shared_waits, apart.shared_gone, apart.draws_wait, apart.epoch.0))
        };
        assert_eq!(said(Apart::of(&entering)), Some((true, false, true, 2)));
        assert_eq!(said(Apart::since(&joining, &joining)), None);
        assert_eq!(said(Apart::since(&joining, &entering)), Some((true, false, true, 2)));
        assert_eq!(said(Apart::since(&joining, &active)), Some((false, true, false, 3)));
        assert_eq!(said(Apart::since(&active, &active)), None);
        // Its sequences are the hub's already.
        assert_eq!(said(Apart::of(&map(4, &[Active, Active, Entering]))), Some((true, false, false, 4)));
    }

    #[test]
    fn who_does_not_own_has_guests() {
        let slots = KeySet::parse("1-3").expect("a set");
        let more = KeySet::parse("9").expect("a set");
        let one = Move { id: 1, from: ShardId(0), to: ShardId(1), keys: slots.clone(), stage: Stage::Copying };
        let two = Move { id: 2, from: ShardId(2), to: ShardId(1), keys: more.clone(), stage: Stage::Cutting };
        let moves = Moves::new(vec![one.clone(), two.clone()]);
        assert_eq!(moves.guests(ShardId(1)), Some(&slots.with(&more)));
        assert_eq!((moves.guests(ShardId(0)), moves.guests(ShardId(2))), (None, None));
        assert_eq!((moves.waiting(), moves.givers().collect::<Vec<_>>()), (&more, vec![ShardId(2)]));
        let moves = Moves::new(vec![Move { stage: Stage::Moved, ..one }, two]);
        assert_eq!(moves.guests(ShardId(0)), Some(&slots));
        assert_eq!(moves.guests(ShardId(1)), Some(&more));
        assert!(Moves::default().is_empty() && Moves::default().guests(ShardId(0)).is_none());
    }
}
