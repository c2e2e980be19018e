//! The fleet, explored exhaustively in small scopes with the real code: two or three members, one word, at most one write and one
//! read at each, in every order of steps, messages, faults and time.
//!
//! Writes are numbered as they become visible on the primary, so "newer" is "larger". A step is as small as a process can be stopped
//! between two: a stopped process is one that takes no step while time passes and others go on. Checked:
//! - RT: a read that starts after a write was acknowledged returns it or a newer one;
//! - MON: a read that starts after another read finished never returns less;
//! - PERM: when nothing is written or on its way, nothing that would be served differs from the primary;
//! - LEAK: from every state, all that live can come to serve again with nothing pending.
//!
//! Who joins, attaches, is told, is put out, buried and may serve or write is decided by the functions of the product: [`Roster`],
//! [`Told`], [`Heard`], [`Term`], the words and the stamps. [`Mutant`]s leave out a step, to show that the checker would notice.
//!
//! Assumed: a process goes on as a whole, so that what it may forward it forwards before its keeper's connection ends. Not played:
//! replicas and flights ([`crate::fresh::model`] plays them for one proxy), members that push, changes of the schema.
//!
//! [`Roster`]: super::Roster
//! [`Told`]: super::Told
//! [`Heard`]: super::Heard
//! [`Term`]: super::Term

mod moves;
mod world;

use std::hash::BuildHasher as _;

use foldhash::quality::FixedState;
use hashbrown::HashMap;

use super::Standing;
use world::{Desk, Keeping, Life, MEMBERS, Work, World};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mutant {
    None,
    /// Whoever is put out counts as fenced at once.
    NoExclusionWait,
    /// Reads are answered from memory without a lease.
    NoLease,
    /// The lease runs from when the primary has answered.
    LeaseFromTheAnswer,
    /// Who attaches does not name what it has under way.
    JoinWithoutWhatIsUnderWay,
    /// Who joins does not wait until the others announce to it.
    JoinUnattached,
    /// A row goes before those who join have heard what its proxy had under way.
    BuriedBeforePassedOn,
    /// A row goes although server processes of its proxy are at work.
    BuriedUnproven,
    /// What the dead had under way counts as over.
    OrphansEndAtOnce,
    /// A write goes on although somebody has not heard.
    DeafIgnored,
    /// Messages count on whatever connection they come.
    AnyConnection,
    /// Stamps of words with writes under way are taken over.
    LentUnsettled,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Broken {
    Rt,
    Mon,
    Perm,
    Leak,
}

#[derive(Clone, Copy)]
struct Scope {
    members: usize,
    /// Members that serve from the beginning; the others join if they may.
    serving: usize,
    joins: [bool; MEMBERS],
    writes: [bool; MEMBERS],
    reads: [bool; MEMBERS],
    dies: [bool; MEMBERS],
    /// Their keepers ask for nothing.
    frozen: [bool; MEMBERS],
    crashes: u8,
    cuts: u8,
    delays: u8,
    /// Time may pass between their questions to the primary and its answers.
    slow_primary: [bool; MEMBERS],
    /// Leases do not run out: nobody who lives is put out.
    for_ever: bool,
    /// The first is dead from the beginning, and the server is at work on its write, which the second has heard of.
    orphaned: bool,
    /// Who was put out comes back.
    rejoins: bool,
    takes_back: bool,
    /// There is a Redis.
    shared: bool,
    mutant: Mutant,
}

const NONE: [bool; MEMBERS] = [false; MEMBERS];
const FIRST: [bool; MEMBERS] = [true, false, false];
const SECOND: [bool; MEMBERS] = [false, true, false];
const THIRD: [bool; MEMBERS] = [false, false, true];
const BOTH: [bool; MEMBERS] = [true, true, false];

impl Scope {
    /// Two that serve; the first writes, the second reads.
    const PAIR: Scope = Scope {
        members: 2,
        serving: 2,
        joins: NONE,
        writes: FIRST,
        reads: SECOND,
        dies: NONE,
        frozen: NONE,
        crashes: 0,
        cuts: 0,
        delays: 0,
        slow_primary: NONE,
        for_ever: false,
        orphaned: false,
        rejoins: true,
        takes_back: false,
        shared: false,
        mutant: Mutant::None,
    };
    /// One that serves and writes, and one that joins and reads.
    const JOIN: Scope = Scope { serving: 1, joins: SECOND, ..Scope::PAIR };
    /// One dies with its write under way, one knows of it, and one joins.
    const HEIRS: Scope =
        Scope { members: 3, joins: THIRD, reads: THIRD, orphaned: true, for_ever: true, ..Scope::PAIR };
    /// The connection between them is cut, and one that is put out stays away.
    const CUT: Scope = Scope { cuts: 1, rejoins: false, ..Scope::PAIR };
}

struct Checker {
    scope: Scope,
    hasher: FixedState,
    seen: HashMap<u64, u32>,
    /// Of every state: where it came from, by which step of whom.
    found: Vec<(u32, &'static str, usize)>,
    edges: Vec<(u32, u32)>,
    /// States in which all that live serve, and nothing is pending.
    good: Vec<u32>,
    broken: Vec<(Broken, u32)>,
}

impl Checker {
    /// Explores everything, or, if `until_broken`, until something is. Leaks are looked for at the end.
    fn run(scope: Scope, until_broken: bool) -> Checker {
        let mut checker = Checker {
            scope,
            hasher: FixedState::with_seed(5),
            seen: HashMap::new(),
            found: Vec::new(),
            edges: Vec::new(),
            good: Vec::new(),
            broken: Vec::new(),
        };
        let mut layer: Vec<(World, u32)> = Vec::new();
        checker.reach(checker.begin(), (0, "begin", 0), &mut layer);
        while !layer.is_empty() && (!until_broken || checker.broken.is_empty()) {
            let mut next = Vec::new();
            for (world, at) in layer {
                for step in moves::moves(&checker.scope, &world) {
                    let reached = checker.reach(step.world, (at, step.label, step.member), &mut next);
                    checker.edges.push((at, reached));
                    checker.broken.extend(step.broken.map(|broken| (broken, reached)));
                }
            }
            layer = next;
        }
        if checker.broken.is_empty() {
            checker.find_leaks();
        }
        checker
    }

    /// Those who serve from the beginning have come to it by the same steps, and have kept what they have read.
    fn begin(&self) -> World {
        let quiet = Scope { frozen: NONE, writes: NONE, reads: NONE, joins: NONE, shared: false, ..self.scope };
        let mut world = World::new((0, 0, 0));
        for member in 0..self.scope.serving {
            world.join(member);
            let serve = |world: &World| {
                let serves = |one: usize| {
                    let me = &world.members[one];
                    me.standing == Standing::Serves && me.keeping == Keeping::Idle
                };
                (0..=member).all(serves) && world.is_quiet()
            };
            world = self.until(&quiet, world, serve);
        }
        if self.scope.orphaned {
            let dies = Scope { writes: FIRST, dies: FIRST, frozen: [true; MEMBERS], ..quiet };
            let orphaned = |world: &World| {
                let (dead, heir) = (world.works[0] == Work::Active, world.members[1].desk.pending == 1);
                dead && heir && world.members[0].life == Life::Dead
            };
            world = self.until(&dies, World { crashes: 1, ..world }, orphaned);
        }
        for member in 0..self.scope.serving {
            world.members[member].desk.entry = Some(0);
            let stamp = world.members[member].desk.stamp;
            world.shared.extend(self.scope.shared.then_some((0, stamp)));
        }
        World { crashes: self.scope.crashes, cuts: self.scope.cuts, delays: self.scope.delays, ..world }
    }

    /// By the shortest way.
    fn until(&self, scope: &Scope, world: World, goal: impl Fn(&World) -> bool) -> World {
        let (mut known, mut layer) = (HashMap::new(), vec![world]);
        loop {
            if let Some(at) = layer.iter().position(&goal) {
                return layer.swap_remove(at);
            }
            let steps = layer.iter().flat_map(|world| moves::moves(scope, world)).map(|step| step.world);
            layer = steps.filter(|next| known.insert(self.hasher.hash_one(next), ()).is_none()).collect();
            assert!(!layer.is_empty(), "it never comes to that");
        }
    }

    fn reach(&mut self, mut world: World, from: (u32, &'static str, usize), next: &mut Vec<(World, u32)>) -> u32 {
        if !self.scope.shared {
            let stamped = world.members.iter_mut().filter(|member| member.desk.stamp != 0);
            stamped.for_each(|member| member.desk.stamp = 0);
        }
        let (hash, index) = (self.hasher.hash_one(&world), self.found.len() as u32);
        if let Some(known) = self.seen.get(&hash) {
            return *known;
        }
        self.seen.insert(hash, index);
        self.found.push(from);
        if Self::is_served_wrongly(&world) {
            self.broken.push((Broken::Perm, index));
        }
        let rests = |one: usize| {
            let me = &world.members[one];
            let is_away = me.roster.is_none() && !self.scope.rejoins;
            is_away || me.standing == Standing::Serves && me.desk.pending == 0
        };
        if world.alive().all(rests) {
            self.good.push(index);
        }
        next.push((world, index));
        index
    }

    fn is_served_wrongly(world: &World) -> bool {
        let wrong = |one: usize| {
            let Desk { entry, pending, stamp, .. } = world.members[one].desk;
            let served = |value: u8| pending == 0 && value != world.visible;
            let shared = world.shared.iter().any(|(value, of)| *of == stamp && served(*value));
            world.members[one].may_serve() && (entry.is_some_and(served) || shared)
        };
        world.is_quiet() && world.alive().any(wrong)
    }

    /// States from which no good one can be reached.
    fn find_leaks(&mut self) {
        let mut before: Vec<Vec<u32>> = vec![Vec::new(); self.found.len()];
        self.edges.iter().for_each(|(from, to)| before[*to as usize].push(*from));
        let mut reaches = vec![false; self.found.len()];
        let mut open = self.good.clone();
        while let Some(at) = open.pop() {
            if !std::mem::replace(&mut reaches[at as usize], true) {
                open.extend(&before[at as usize]);
            }
        }
        if let Some(at) = reaches.iter().position(|reaches| !reaches) {
            self.broken.push((Broken::Leak, at as u32));
        }
    }

    fn trace(&self, mut at: u32) -> String {
        let mut lines = Vec::new();
        while at != 0 {
            let (from, label, member) = self.found[at as usize];
            lines.push(format!("{}: {label}", ["A", "B", "C"][member]));
            at = from;
        }
        lines.reverse();
        lines.join("\n")
    }

    #[track_caller]
    fn holds(scope: Scope) {
        let checker = Self::run(scope, false);
        eprintln!("{} states, {} steps", checker.found.len(), checker.edges.len());
        if let Some((broken, at)) = checker.broken.first() {
            panic!("{broken:?} broken after\n{}", checker.trace(*at));
        }
    }

    #[track_caller]
    fn catches(scope: Scope, mutant: Mutant, expected: Broken) {
        let checker = Self::run(Scope { mutant, ..scope }, true);
        let broke = checker.broken.first().map(|(broken, _)| *broken);
        assert_eq!(broke, Some(expected), "{mutant:?}, after {} states", checker.found.len());
    }
}

use Broken::{Leak, Perm, Rt};

/// Delays are stops as well: who does not answer in time may go on later.
#[test]
fn a_pair_holds() {
    Checker::holds(Scope { delays: 1, ..Scope::PAIR });
    Checker::holds(Scope::CUT);
}

#[test]
fn a_pair_with_redis_holds() {
    Checker::holds(Scope { shared: true, reads: BOTH, ..Scope::PAIR });
}

#[test]
fn who_joins_holds() {
    Checker::holds(Scope { takes_back: true, ..Scope::JOIN });
    Checker::holds(Scope { slow_primary: SECOND, ..Scope::JOIN });
}

#[test]
fn who_joins_after_the_last_has_died_holds() {
    Checker::holds(Scope { dies: FIRST, crashes: 1, ..Scope::JOIN });
}

#[test]
fn heirs_hold() {
    Checker::holds(Scope::HEIRS);
}

#[test]
fn mutants_are_caught() {
    let delayed = Scope { delays: 1, ..Scope::PAIR };
    let shared = Scope { shared: true, writes: SECOND, ..Scope::PAIR };
    let dies = Scope { dies: FIRST, crashes: 1, ..Scope::PAIR };
    let last = Scope { dies: FIRST, crashes: 1, ..Scope::JOIN };
    for (mutant, scope, expected) in [
        (Mutant::NoExclusionWait, delayed, Rt),
        (Mutant::NoLease, delayed, Rt),
        (Mutant::LeaseFromTheAnswer, Scope { slow_primary: SECOND, rejoins: false, ..delayed }, Rt),
        (Mutant::JoinWithoutWhatIsUnderWay, Scope::JOIN, Perm),
        (Mutant::JoinUnattached, Scope::JOIN, Perm),
        (Mutant::BuriedBeforePassedOn, Scope::HEIRS, Perm),
        (Mutant::BuriedUnproven, last, Perm),
        (Mutant::OrphansEndAtOnce, dies, Perm),
        (Mutant::DeafIgnored, Scope::CUT, Perm),
        (Mutant::AnyConnection, Scope::CUT, Leak),
        (Mutant::LentUnsettled, shared, Perm),
    ] {
        Checker::catches(scope, mutant, expected);
    }
}
