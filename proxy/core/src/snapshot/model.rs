//! The gate, explored exhaustively in a small scope: every interleaving of clients that commit on two shards, one after the other's
//! acknowledgement or at the same time, and of takers of snapshots.
//!
//! Checked: WHOLE (a distributed transaction is in both snapshots or in none), ORDER (a transaction is not seen without those that
//! were acknowledged before it asked to commit), FRESH (what was acknowledged before a taker began is seen), and END (nobody is left
//! waiting). [`Mutant`]s break one rule each, to show that the checker would notice.

use std::collections::HashSet;

use super::{Deciding, Gate, Taking, Window};

const SHARDS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mutant {
    None,
    /// Writes of one shard do not look whether the gate is shut.
    NoLook,
    /// Distributed transactions decide whenever they like.
    NoDecide,
    /// Decisions that are under way are not waited for.
    NoStill,
    /// The gate opens when one of two snapshots is there.
    EarlyLeave,
    /// One that has waited decides without counting as under way.
    NotCounted,
}

/// Where a transaction writes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Writes {
    One(usize),
    Both,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    /// Not asked for yet.
    Idle,
    WaitsToGo(Window),
    Goes,
    WaitsToDecide(Window),
    Decides,
    /// Visible on the first shard.
    Half,
    Visible,
    Acked,
    GivenUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Txn {
    writes: Writes,
    /// The one whose acknowledgement its client waits for.
    behind: Option<usize>,
    step: Step,
    /// Those acknowledged when it asked to commit, as bits.
    known: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Take {
    Idle,
    Waits(Window),
    Shut,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Taker {
    take: Take,
    /// Those acknowledged when it began, as bits.
    known: u8,
    /// What each shard's snapshot shows, as bits.
    seen: [Option<u8>; SHARDS],
    left: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    gate: Gate,
    txns: Vec<Txn>,
    takers: Vec<Taker>,
    visible: [u8; SHARDS],
}

fn bit(index: usize) -> u8 {
    1 << index
}

impl World {
    fn new(txns: &[(Writes, Option<usize>)], takers: usize) -> Self {
        let txn = |&(writes, behind)| Txn { writes, behind, step: Step::Idle, known: 0 };
        let taker = Taker { take: Take::Idle, known: 0, seen: [None; SHARDS], left: false };
        World {
            gate: Gate::default(),
            txns: txns.iter().map(txn).collect(),
            takers: vec![taker; takers],
            visible: [0; SHARDS],
        }
    }

    fn acked(&self) -> u8 {
        (0..self.txns.len()).filter(|index| self.txns[*index].step == Step::Acked).map(bit).sum()
    }

    /// All worlds that one step of this transaction leads to.
    fn step_txn(&self, index: usize, mutant: Mutant, next: &mut Vec<World>) {
        let txn = self.txns[index];
        let mut world = self.clone();
        let mut to = |world: &mut World, step| {
            world.txns[index].step = step;
            next.push(world.clone());
        };
        match txn.step {
            Step::Idle => {
                if txn.behind.is_some_and(|first| self.txns[first].step != Step::Acked) {
                    return;
                }
                world.txns[index].known = self.acked();
                match self.gate.window().filter(|_| mutant != Mutant::NoLook) {
                    Some(window) => to(&mut world, Step::WaitsToGo(window)),
                    None => to(&mut world, Step::Goes),
                }
            }
            Step::WaitsToGo(window) if self.gate.has_ended(window) => to(&mut world, Step::Goes),
            Step::Goes => match txn.writes {
                Writes::One(shard) => {
                    world.visible[shard] |= bit(index);
                    to(&mut world, Step::Visible);
                }
                Writes::Both if mutant == Mutant::NoDecide => to(&mut world, Step::Decides),
                Writes::Both => match world.gate.decide() {
                    Deciding::Now => to(&mut world, Step::Decides),
                    Deciding::After(window) => to(&mut world, Step::WaitsToDecide(window)),
                },
            },
            Step::WaitsToDecide(window) => {
                if self.gate.has_ended(window) {
                    if mutant == Mutant::NotCounted {
                        world.gate.decided();
                    }
                    to(&mut world, Step::Decides);
                }
                let mut world = self.clone();
                world.gate.give_up(window);
                to(&mut world, Step::GivenUp);
            }
            Step::Decides => {
                world.visible[0] |= bit(index);
                to(&mut world, Step::Half);
            }
            Step::Half => {
                world.visible[1] |= bit(index);
                to(&mut world, Step::Visible);
            }
            Step::Visible => {
                let counted = !matches!(mutant, Mutant::NoDecide | Mutant::NotCounted);
                if txn.writes == Writes::Both && counted {
                    world.gate.decided();
                }
                to(&mut world, Step::Acked);
            }
            _ => {}
        }
    }

    fn step_taker(&self, index: usize, mutant: Mutant, next: &mut Vec<World>) {
        let taker = self.takers[index];
        let mut world = self.clone();
        match taker.take {
            Take::Idle => {
                world.takers[index].known = self.acked();
                world.ask(index);
                next.push(world);
            }
            Take::Waits(window) if self.gate.has_ended(window) => {
                world.ask(index);
                next.push(world);
            }
            Take::Shut => {
                let ready = mutant == Mutant::NoStill || self.gate.is_still() || taker.seen != [None; SHARDS];
                for shard in (0..SHARDS).filter(|shard| ready && taker.seen[*shard].is_none()) {
                    let mut world = self.clone();
                    world.takers[index].seen[shard] = Some(self.visible[shard]);
                    if mutant == Mutant::EarlyLeave && !taker.left {
                        world.takers[index].left = true;
                        world.gate.leave();
                    }
                    next.push(world);
                }
                if taker.seen.iter().all(Option::is_some) {
                    world.takers[index].take = Take::Done;
                    if !taker.left {
                        world.gate.leave();
                    }
                    next.push(world.clone());
                } else if taker.seen == [None; SHARDS] {
                    // It has waited too long for the gate to be still.
                    world.takers[index].take = Take::Done;
                    world.gate.leave();
                    next.push(world);
                }
            }
            _ => {}
        }
    }

    fn ask(&mut self, taker: usize) {
        self.takers[taker].take = match self.gate.take() {
            Taking::Shut => Take::Shut,
            Taking::After(window) => Take::Waits(window),
        };
    }

    fn fault(&self) -> Option<&'static str> {
        for taker in &self.takers {
            let [Some(first), Some(second)] = taker.seen else { continue };
            let sees = |index: usize| match self.txns[index].writes {
                Writes::One(shard) => [first, second][shard] & bit(index) != 0,
                Writes::Both => first & second & bit(index) != 0,
            };
            for (index, txn) in self.txns.iter().enumerate() {
                if txn.writes == Writes::Both && (first ^ second) & bit(index) != 0 {
                    return Some("WHOLE");
                }
                let lacks = |known: u8| (0..self.txns.len()).any(|other| known & bit(other) != 0 && !sees(other));
                if sees(index) && lacks(txn.known) {
                    return Some("ORDER");
                }
                if lacks(taker.known) {
                    return Some("FRESH");
                }
            }
        }
        None
    }

    fn is_over(&self) -> bool {
        let ended = |txn: &Txn| match txn.behind.map(|first| self.txns[first].step) {
            Some(Step::GivenUp | Step::Idle) => txn.step == Step::Idle,
            _ => matches!(txn.step, Step::Acked | Step::GivenUp),
        };
        self.txns.iter().all(ended) && self.takers.iter().all(|taker| taker.take == Take::Done)
    }
}

/// Every reachable world: how many there are, or the first fault.
fn explore(start: World, mutant: Mutant) -> Result<usize, &'static str> {
    let mut known = HashSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        if let Some(fault) = world.fault() {
            return Err(fault);
        }
        let mut next = Vec::new();
        (0..world.txns.len()).for_each(|index| world.step_txn(index, mutant, &mut next));
        (0..world.takers.len()).for_each(|index| world.step_taker(index, mutant, &mut next));
        if next.is_empty() && !world.is_over() {
            return Err("END");
        }
        open.extend(next.into_iter().filter(|world| known.insert(world.clone())));
    }
    Ok(known.len())
}

/// A chain over both shards, and somebody who writes on both at once.
fn scopes() -> Vec<World> {
    use Writes::{Both, One};
    let chain = |first, second| [(first, None), (second, Some(0))];
    let chains = [chain(One(0), One(1)), chain(One(1), One(0)), chain(Both, One(1)), chain(One(0), Both)];
    let mut scopes = Vec::new();
    for chain in chains {
        scopes.push(World::new(&chain, 2));
        scopes.push(World::new(&[chain[0], chain[1], (Both, None)], 2));
        scopes.push(World::new(&[chain[0], chain[1], (One(0), Some(1))], 1));
    }
    scopes
}

#[test]
fn snapshots_are_whole_ordered_and_fresh_and_nobody_waits_for_ever() {
    let mut worlds = 0;
    for scope in scopes() {
        worlds += explore(scope.clone(), Mutant::None).unwrap_or_else(|fault| panic!("{fault}: {scope:?}"));
    }
    assert!(worlds > 10_000, "{worlds} worlds are too few to show anything");
}

#[test]
fn the_checker_notices_what_is_left_out() {
    for (mutant, wanted) in [
        (Mutant::NoLook, "ORDER"),
        (Mutant::NoDecide, "WHOLE"),
        (Mutant::NoStill, "WHOLE"),
        (Mutant::EarlyLeave, "ORDER"),
        (Mutant::NotCounted, "WHOLE"),
    ] {
        let faults: Vec<&str> = scopes().into_iter().filter_map(|scope| explore(scope, mutant).err()).collect();
        assert!(faults.contains(&wanted), "{mutant:?} gives {faults:?}");
    }
}
