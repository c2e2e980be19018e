//! Which shards take part: shards come and go while sessions run, and their numbers never mean another one.
//!
//! Invariant: only an active shard owns slots, and only active ones are asked by statements that go to all or any. A shard keeps its
//! number for ever: one that is retired stays in the list. Non-goal: what makes a shard ready (that is the mover's).

use std::sync::Arc;

use crate::id::ShardId;

/// What a shard is to statements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShardState {
    /// It is being prepared: it may have copies of rows and owns none.
    Joining,
    /// It has the schema, and is being given what all shards have: nobody changes that meanwhile.
    Entering,
    Active,
    /// It has given up all it had.
    Retired,
}

/// All shards of one epoch with their states. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Roster {
    states: Arc<[ShardState]>,
    active: Arc<[ShardId]>,
}

impl ShardState {
    /// As the hub has it, and as people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            ShardState::Joining => "joining",
            ShardState::Entering => "entering",
            ShardState::Active => "active",
            ShardState::Retired => "retired",
        }
    }

    /// `None`: it is none of these words.
    pub fn parse(word: &str) -> Option<Self> {
        let all = [ShardState::Joining, ShardState::Entering, ShardState::Active, ShardState::Retired];
        all.into_iter().find(|state| state.as_str() == word)
    }
}

impl Roster {
    /// In the order of their numbers.
    pub fn new(states: Vec<ShardState>) -> Self {
        let is_active = |(_, state): &(usize, &ShardState)| **state == ShardState::Active;
        let active = states.iter().enumerate().filter(is_active).map(|(number, _)| ShardId(number as u16)).collect();
        Roster { states: states.into(), active }
    }

    /// So many shards, which all take part.
    pub fn fixed(shards: usize) -> Self {
        Roster::new(vec![ShardState::Active; shards])
    }

    /// Those that take part, ascending.
    pub fn active(&self) -> &[ShardId] {
        &self.active
    }

    pub fn is_active(&self, shard: ShardId) -> bool {
        self.state(shard) == Some(ShardState::Active)
    }

    /// Must what every shard has stay as it is, because another one is being given it?
    pub fn is_anyone_entering(&self) -> bool {
        self.states.contains(&ShardState::Entering)
    }

    /// `None`: there is no such shard.
    pub fn state(&self, shard: ShardId) -> Option<ShardState> {
        self.states.get(usize::from(shard.0)).copied()
    }

    /// Is there one shard, and no other that joins or has left? Then nothing has to be routed.
    pub fn is_single(&self) -> bool {
        self.states.len() == 1
    }

    /// Does one shard take part that has never had company, and all others join? Then its server does what several shards need weir
    /// for: it counts its sequences itself, and its own constraints are enough.
    pub fn is_lone(&self) -> bool {
        self.active.len() == 1 && self.states.iter().filter(|state| **state != ShardState::Joining).count() == 1
    }

    /// One that takes part, chosen by any number.
    pub fn any(&self, number: u64) -> Option<ShardId> {
        let count = self.active.len().max(1) as u64;
        self.active.get((number % count) as usize).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_active_shards_take_part_and_numbers_stay() {
        let states =
            [ShardState::Retired, ShardState::Active, ShardState::Joining, ShardState::Active, ShardState::Entering];
        let roster = Roster::new(states.to_vec());
        assert!(roster.is_anyone_entering() && !Roster::fixed(4).is_anyone_entering());
        assert_eq!(roster.active(), [ShardId(1), ShardId(3)]);
        assert_eq!((roster.any(4), roster.any(7)), (Some(ShardId(1)), Some(ShardId(3))));
        assert!(roster.is_active(ShardId(3)) && !roster.is_active(ShardId(2)) && !roster.is_active(ShardId(9)));
        for state in states {
            assert_eq!(ShardState::parse(state.as_str()), Some(state));
        }
        assert_eq!((ShardState::parse("gone"), Roster::new(Vec::new()).any(1)), (None, None));
    }

    #[test]
    fn a_shard_that_gets_company_is_not_alone() {
        assert!(Roster::fixed(1).is_single() && !Roster::fixed(2).is_single());
        let with = |state| Roster::new(vec![ShardState::Active, state]);
        assert!(!with(ShardState::Joining).is_single());
        assert!(Roster::fixed(1).is_lone() && with(ShardState::Joining).is_lone());
        let company = [ShardState::Entering, ShardState::Active, ShardState::Retired];
        assert!(company.into_iter().all(|state| !with(state).is_lone()));
    }
}
