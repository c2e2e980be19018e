//! A state of the fleet: the primary with its table, the members with what they know, and what is on its way between them.
//!
//! It is always [`NOW`]: when time passes, what was noted lies further back. Versions of words only grow, so whether an entry or a look
//! is still of the word's version is kept instead of the number.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::hash::{BuildHasher as _, Hash, Hasher};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use foldhash::quality::FixedState;
use weir_wire::peer::Write;

use super::super::{Heard, Hearing, Roster, Row, Standing, Term, Tie, Told, UnderWay};
use crate::fresh::words::{Observation, UNPLACED, WordSet, Words, forge};
use crate::id::Lsn;

pub const MEMBERS: usize = 3;
pub const NOW: u64 = 1_000_000_000;
/// A step of the clock, and every member's lease.
pub const TICK: u64 = 1_000_000;
pub const LEASE: u64 = TICK;
/// Of leases that are not part of the play.
pub const FOR_EVER: u64 = u64::MAX;
/// Every member writes at most once.
pub const TOKEN: u64 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Life {
    #[default]
    Absent,
    Alive,
    Dead,
}

/// To whom, and the how manyeth.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Link {
    pub to: u8,
    pub number: u8,
}

/// What is kept of another's write; `maker` and `token` name it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Foreign {
    pub maker: u8,
    pub token: u8,
    /// Whose server process has it.
    pub pid: u8,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Msg {
    Announce,
    Attach { joined: u64, serves: bool, writes: bool, orphans: Vec<Foreign> },
    Over,
}

/// A connection that one member has opened to another.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Pipe {
    pub number: u8,
    pub up: bool,
    pub queue: Vec<Msg>,
    /// Of the last connection: sent, and perhaps still to arrive.
    pub late: Vec<Msg>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    Waiting,
    Heard,
    Deaf,
}

/// An attempt to attach to somebody.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Attempt {
    #[default]
    None,
    /// To that joining of its.
    Begun { joined: u64 },
    /// It is told over that connection, and has not answered.
    Sent(Link),
}

/// When the primary was asked, and what it said.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Asked {
    pub at: u64,
    pub epoch: u64,
    pub out: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Keeping {
    #[default]
    Idle,
    /// The primary has answered, and the answer is on its way.
    Asked(Asked),
    /// The rows were read; these are to be put out, and the rest is to be done.
    Read(Vec<u64>),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Writing {
    #[default]
    Idle,
    /// Raised here.
    Raised,
    Telling([Option<Answer>; MEMBERS]),
    /// It may be forwarded.
    Cleared,
    Sent,
    Acknowledged,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Reading {
    #[default]
    Idle,
    Looked,
    /// The word's stamp was true, and Redis is being asked.
    AskShared,
    AskPrimary,
    Answered(u8),
    Done,
}

/// A read, and what it must not fall below: the newest that was acknowledged, and read by anybody, when it began.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Reader {
    pub phase: Reading,
    pub acked: u8,
    pub read: u8,
    /// The word is still as it was at the look, and was nothing pending?
    pub held: bool,
    pub pending: bool,
    /// It was asked whether this member may serve, and it may.
    pub served: bool,
}

/// The word of the one register, what is kept under it, and who reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Desk {
    pub id: u8,
    pub pending: u8,
    pub stamp: u64,
    /// True as long as the word does not move.
    pub entry: Option<u8>,
    pub reader: Reader,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Member {
    pub life: Life,
    pub standing: Standing,
    pub leased_until: u64,
    pub told: Told<Link>,
    pub heard: Heard<Foreign>,
    /// Writes whose outcome is not known.
    pub lost: Vec<Foreign>,
    pub roster: Option<Roster>,
    pub keeping: Keeping,
    pub attempts: [Attempt; MEMBERS],
    pub deaf: BTreeSet<u64>,
    pub desk: Desk,
    pub writing: Writing,
}

/// A server process that a member's write has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Work {
    #[default]
    None,
    Active,
    /// Committed and visible, with that value.
    Done(u8),
}

/// A row of the table; whether its keeper's connection is there is seen by its member.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Seat {
    pub joined: u64,
    pub out: bool,
}

/// A part of a state, which most steps leave as it is: copied when it changes, and hashed once.
#[derive(Clone, Debug)]
pub struct Part<T> {
    part: Rc<T>,
    hash: Cell<Option<u64>>,
}

impl<T> Part<T> {
    fn new(part: T) -> Self {
        Part { part: Rc::new(part), hash: Cell::new(None) }
    }
}

impl<T> Deref for Part<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.part
    }
}

impl<T: Clone> DerefMut for Part<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.hash.set(None);
        Rc::make_mut(&mut self.part)
    }
}

impl<T: Hash> Hash for Part<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let hash = self.hash.get().unwrap_or_else(|| FixedState::with_seed(7).hash_one(&*self.part));
        self.hash.set(Some(hash));
        state.write_u64(hash);
    }
}

#[derive(Clone, Hash, Debug)]
pub struct World {
    pub epoch: u64,
    pub seats: [Option<Seat>; MEMBERS],
    pub works: [Work; MEMBERS],
    pub visible: u8,
    pub acked: u8,
    pub read: u8,
    pub members: [Part<Member>; MEMBERS],
    /// From, to.
    pub pipes: Part<[[Pipe; MEMBERS]; MEMBERS]>,
    /// All that was ever stored in Redis, which may give back any of it: value and stamp.
    pub shared: BTreeSet<(u8, u64)>,
    pub crashes: u8,
    pub cuts: u8,
    /// Answers that do not come in time.
    pub delays: u8,
}

pub fn id_of(member: usize) -> u64 {
    member as u64 + 1
}

pub fn member_of(id: u64) -> usize {
    id as usize - 1
}

fn the_word() -> WordSet {
    WordSet::from_indexes([0])
}

impl Desk {
    /// The word as the product has it. Its version is 0 in every state.
    fn words(&self) -> Words {
        forge::stamped(u64::from(self.id), u64::from(self.pending), self.stamp)
    }

    fn keep(&mut self, words: &Words) {
        let (state, _) = forge::raw(words, 0);
        if state >> 16 != 0 {
            self.entry = None;
            self.reader.held = false;
        }
        (self.pending, self.stamp) = (state as u16 as u8, forge::stamp(words));
    }

    pub fn raise(&mut self) {
        let words = self.words();
        // The intent is forged again when the write is over.
        let _ = words.begin_write(&the_word()).expect("room");
        self.keep(&words);
    }

    /// The write is over that `maker` named so.
    pub fn lower(&mut self, maker: u8, token: u8) {
        let words = self.words();
        words.end_write(forge::intent(the_word()).named(u64::from(maker), u64::from(token)), None);
        self.keep(&words);
    }

    /// What was read before is void.
    pub fn begin_anew(&mut self) {
        let words = self.words();
        words.raise_floor(UNPLACED);
        self.keep(&words);
    }

    pub fn with<T>(&mut self, act: impl FnOnce(&Words) -> T) -> T {
        let words = self.words();
        let done = act(&words);
        self.keep(&words);
        done
    }

    pub fn look(&self) -> Observation {
        self.words().observe(&the_word())
    }

    /// The look with which the read began.
    pub fn seen(&self) -> Observation {
        let version = if self.reader.held { 0 } else { 1 << 40 };
        forge::observation(the_word(), &[version], self.reader.pending, Lsn(0))
    }

    /// As it is kept with the entry that is true now.
    pub fn of_entry() -> Observation {
        Observation::settled(the_word(), [0]).expect("one version")
    }
}

impl Member {
    pub fn new(member: usize, life: Life) -> Member {
        let id = if life == Life::Alive { id_of(member) as u8 } else { 0 };
        let mut desk = Desk { id, ..Desk::default() };
        if life == Life::Alive {
            desk.stamp = forge::stamp(&forge::first(id_of(member)));
        }
        Member {
            life,
            standing: Standing::Out,
            leased_until: 0,
            told: Told::default(),
            heard: Heard::default(),
            lost: Vec::new(),
            roster: None,
            keeping: Keeping::Idle,
            attempts: Default::default(),
            deaf: BTreeSet::new(),
            desk,
            writing: Writing::Idle,
        }
    }

    pub fn term(&self) -> Term {
        Term { leased_until_us: self.leased_until, hears_until_us: u64::MAX }
    }

    pub fn may_serve(&self) -> bool {
        self.term().may_serve(self.standing == Standing::Serves, NOW)
    }

    pub fn stand(&mut self, standing: Standing) {
        self.standing = standing;
        if standing < Standing::Writes {
            self.leased_until = 0;
            self.told.tell_only(|_| false);
        }
    }
}

impl World {
    pub fn new(budgets: (u8, u8, u8)) -> World {
        let (crashes, cuts, delays) = budgets;
        World {
            epoch: 0,
            seats: [None; MEMBERS],
            works: [Work::None; MEMBERS],
            visible: 0,
            acked: 0,
            read: 0,
            members: std::array::from_fn(|member| Part::new(Member::new(member, Life::Absent))),
            pipes: Part::new(Default::default()),
            shared: BTreeSet::new(),
            crashes,
            cuts,
            delays,
        }
    }

    pub fn alive(&self) -> impl Iterator<Item = usize> {
        (0..MEMBERS).filter(|member| self.members[*member].life == Life::Alive)
    }

    pub fn is_up(&self, from: usize, link: Link) -> bool {
        let pipe = &self.pipes[from][usize::from(link.to)];
        pipe.up && pipe.number == link.number
    }

    pub fn tie(&self, member: usize, row: &Row) -> Tie {
        let me = &self.members[member];
        let joined = me.roster.as_ref().map_or(0, Roster::joined);
        let told = me.told.tells(row.id, row.joined, |link| self.is_up(member, *link));
        Tie { told, attached: me.heard.attached(row.id, joined) }
    }

    pub fn rows(&self, but: usize) -> Vec<Row> {
        let others = (0..MEMBERS).filter(|other| *other != but);
        let row = |other: usize| {
            let Seat { joined, out } = self.seats[other]?;
            // The connection of one that was put out stays until it looks; the next one comes with its next joining.
            let keeps = self.members[other].life == Life::Alive && self.members[other].roster.is_some();
            Some(Row { id: id_of(other), lease_us: LEASE, joined, out, keeps, lives: keeps })
        };
        others.filter_map(row).collect()
    }

    pub fn join(&mut self, member: usize) {
        if self.members[member].life == Life::Absent {
            *self.members[member] = Member::new(member, Life::Alive);
        }
        self.epoch += 1;
        self.seats[member] = Some(Seat { joined: self.epoch, out: false });
        let me = &mut *self.members[member];
        me.roster = Some(Roster::new(Hearing::Leased, LEASE, self.epoch));
    }

    pub fn send(&mut self, from: usize, link: Link, message: Msg) -> bool {
        let up = self.is_up(from, link);
        if up {
            self.pipes[from][usize::from(link.to)].queue.push(message);
        }
        up
    }

    /// A connection ends; what was sent may still arrive.
    pub fn cut(&mut self, from: usize, to: usize) {
        if !self.pipes[from][to].up {
            return;
        }
        let pipe = &mut self.pipes[from][to];
        pipe.up = false;
        pipe.late = std::mem::take(&mut pipe.queue);
        let me = &mut *self.members[from];
        if let Writing::Telling(answers) = &mut me.writing
            && answers[to] == Some(Answer::Waiting)
        {
            answers[to] = Some(Answer::Deaf);
        }
        if let Attempt::Sent(_) = me.attempts[to] {
            me.attempts[to] = Attempt::None;
            if let Some(roster) = &mut me.roster {
                roster.end_attempt(id_of(to), false);
            }
        }
    }

    pub fn crash(&mut self, member: usize) {
        for other in (0..MEMBERS).filter(|other| *other != member) {
            self.cut(member, other);
            self.cut(other, member);
            self.pipes[other][member].late.clear();
        }
        *self.members[member] = Member::new(member, Life::Dead);
    }

    pub fn pass_time(&mut self) {
        for me in &mut self.members {
            let me = &mut **me;
            me.leased_until = match me.leased_until {
                FOR_EVER => FOR_EVER,
                until if until <= NOW + TICK => 0,
                until => until - TICK,
            };
            if let Keeping::Asked(asked) = &mut me.keeping {
                asked.at = (asked.at - TICK).max(NOW - LEASE);
            }
            if let Some(roster) = &mut me.roster {
                roster.age(NOW, TICK);
            }
        }
    }

    /// Has the server process gone, or may it, that had a write of that member?
    pub fn is_process_gone(&self, member: usize) -> bool {
        let me = &self.members[member];
        let at_rest = matches!(me.writing, Writing::Idle | Writing::Done);
        self.works[member] != Work::Active && (me.life != Life::Alive || at_rest)
    }

    /// Nothing is written or on its way.
    pub fn is_quiet(&self) -> bool {
        let still = |member: usize| {
            let me = &self.members[member];
            let pipes = self.pipes[member].iter().all(|pipe| pipe.queue.is_empty() && pipe.late.is_empty());
            let attempts = me.attempts.iter().all(|attempt| *attempt == Attempt::None);
            pipes && attempts && matches!(me.writing, Writing::Idle | Writing::Done)
        };
        (0..MEMBERS).all(still) && !self.works.contains(&Work::Active)
    }
}

pub fn named(foreign: Foreign) -> Write {
    Write { token: u64::from(foreign.token), pid: i32::from(foreign.pid), schema: false, words: vec![0] }
}

pub fn under_way(member: usize) -> UnderWay {
    UnderWay { words: the_word(), pid: member as i32, schema: false }
}
