//! The protocol, explored exhaustively in a small scope with the real code: every interleaving of up to two writers and
//! three readers around one register, one primary, one lagging replica and one cache.
//!
//! Writes are numbered in commit order, so "newer" is "larger". A commit has the three stages Postgres has, which are
//! not atomic: WAL (a replica may apply it), VISIBLE (new snapshots of the primary see it), ACK (the proxy and the client
//! know). A backend may be lost at any stage, after which it may still commit. Checked:
//! - RT: a read that starts after a write was acknowledged returns it or a newer one;
//! - MON: a read that starts after another read finished never returns less;
//! - PERM: when everything has come to rest, no entry that would be served differs from the primary;
//! - LEAK: when everything has come to rest, nothing is pending.
//!
//! The moves of words, the looks, hit, fill and release decisions, the choice of the server and the joining of flights
//! are the functions of the product. [`Mutant`]s break one of them each, to show that the checker would notice. Two checks are
//! kept although no mutant without them is caught, because each is implied by others: not serving a hit, and not asking a
//! replica, while something is pending (raising also moves the version; the second look demands that the first was settled).
//! The larger model this follows (crashes of whole proxies, CDC, Redis failover, leases) is in the research prototypes.

use bytes::Bytes;
use hashbrown::HashMap;

use super::bound::{Choice, ReadBound, ReplicaView, choose, replica_answer_ok};
use super::words::{Observation, WordSet, Words, forge};
use crate::cache::{CacheKey, Entry, Flights, Join, KeyParts, Now, Reply, judge, may_fill};
use crate::id::{Epoch, Lsn, ShardId};

const WRITERS: usize = 2;
const READERS: usize = 3;
const WORD_COUNT: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mutant {
    None,
    /// Versions move before and after, but nothing is ever pending.
    DoubleBump,
    /// Replica answers are released without a second look.
    NoSecondLook,
    /// A reply is stored under the words as they are after the read, not as they were before it.
    StampAfter,
    /// The state word moves before the LSN is stored.
    StateBeforeLsn,
    /// The LSN is asked for when the commit is sent instead of after it is acknowledged.
    EarlyLsn,
    /// An intent of unknown outcome ends after some time instead of with its backend.
    TimeOut,
    /// A flight is joined by its key alone.
    JoinByKey,
}

#[derive(Clone, Copy)]
struct Scope {
    writers: usize,
    readers: usize,
    /// Backends that may be lost.
    deaths: u8,
    /// Statements that may fail and roll back.
    rollbacks: u8,
    replica: bool,
    flights: bool,
    /// A validated reply reaches the store some time later.
    late_store: bool,
    /// Two words, and every operation on them one word at a time.
    torn: bool,
    mutant: Mutant,
}

impl Scope {
    const SMALL: Scope = Scope {
        writers: 2,
        readers: 2,
        deaths: 0,
        rollbacks: 0,
        replica: false,
        flights: false,
        late_store: false,
        torn: false,
        mutant: Mutant::None,
    };

    fn words(&self) -> usize {
        if self.torn { 2 } else { 1 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// Some words raised (torn only).
    Raising,
    /// Raised on all words; what may commit has been sent.
    Sent,
    Wal,
    Visible,
    /// The outcome is known, the client has it.
    Acked,
    RolledBack,
    /// The shared clock has answered.
    LsnKnown,
    /// `StateBeforeLsn`: the state has moved, the LSN is still to come.
    LsnLate,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
struct Writer {
    stage: Stage,
    /// Words done in a torn begin or end.
    step: u8,
    number: u8,
    lsn: u8,
    /// The proxy lost the backend, which may live on.
    lost: bool,
    /// The intent is over, though the backend may not be.
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    /// Looking word by word (torn only).
    Looking,
    AskPrimary,
    AskReplica,
    FromPrimary,
    FromReplica,
    Following,
    /// The leader's reply is there, the follower has yet to pass it on.
    Landed,
    /// Answered; the reply is still on its way to the store.
    Storing,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
struct Reader {
    phase: Phase,
    /// Words done in a torn look.
    step: u8,
    /// What it may not fall below: newest acknowledged, newest read by anybody, when it started.
    rt: u8,
    mon: u8,
    versions: [u8; WORD_COUNT],
    pending: bool,
    lsn: u8,
    value: u8,
    leader: u8,
}

/// A word in the checker's own compact form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Small {
    version: u8,
    pending: u8,
    lsn: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    words: [Small; WORD_COUNT],
    wal: u8,
    visible: u8,
    replayed: u8,
    acked: u8,
    read: u8,
    stored: Option<(u8, [u8; WORD_COUNT])>,
    writers: [Writer; WRITERS],
    readers: [Reader; READERS],
    deaths: u8,
    rollbacks: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Broken {
    Rt,
    Mon,
    Perm,
    Leak,
}

/// Positions far enough apart that none looks like the end of a page header.
fn lsn_of(number: u8) -> Lsn {
    Lsn(u64::from(number) * 64)
}

fn number_of(lsn: Lsn) -> u8 {
    (lsn.0 / 64) as u8
}

struct Checker {
    scope: Scope,
    key: CacheKey,
    reply: Reply,
    seen: HashMap<State, u32>,
    /// Every state with where it came from, for the trace.
    found: Vec<(State, u32, &'static str)>,
    broken: Vec<(Broken, u32)>,
}

impl Checker {
    /// Explores everything, or until each of `until` has been broken.
    fn run(scope: Scope, until: &[Broken]) -> Checker {
        let parts = KeyParts {
            shard: ShardId(0),
            database: "shop",
            role: "app",
            statement: "SELECT v FROM r",
            params: &[],
            result_formats: &[],
            settings: &[],
        };
        let reply = Reply::new(Bytes::from_static(b"T\0\0\0\x06\0\0C\0\0\0\x0dSELECT 0\0")).expect("a reply");
        let mut checker = Checker {
            scope,
            key: CacheKey::new(&parts),
            reply,
            seen: HashMap::new(),
            found: Vec::new(),
            broken: Vec::new(),
        };
        let empty = State {
            words: Default::default(),
            wal: 0,
            visible: 0,
            replayed: 0,
            acked: 0,
            read: 0,
            stored: None,
            writers: Default::default(),
            readers: Default::default(),
            deaths: scope.deaths,
            rollbacks: scope.rollbacks,
        };
        checker.reach(empty, 0, "empty cache");
        checker.reach(State { stored: Some((0, [0; WORD_COUNT])), ..empty }, 0, "warm cache");
        let mut next = 0;
        while next < checker.found.len() && (until.is_empty() || !checker.has_broken(until)) {
            let (state, before) = (checker.found[next].0, checker.found.len());
            let moves = checker.moves(&state, next as u32);
            if moves == 0 {
                debug_assert_eq!(before, checker.found.len());
                checker.at_rest(&state, next as u32);
            }
            next += 1;
        }
        checker
    }

    /// Records a state; equal readers and equal writers are interchangeable unless a flight names them.
    fn reach(&mut self, mut state: State, from: u32, label: &'static str) -> u32 {
        if !self.scope.flights {
            state.readers[..self.scope.readers].sort_unstable();
        }
        state.writers[..self.scope.writers].sort_unstable();
        let index = self.found.len() as u32;
        if let Some(known) = self.seen.get(&state) {
            return *known;
        }
        self.seen.insert(state, index);
        self.found.push((state, from, label));
        index
    }

    fn moves(&mut self, state: &State, at: u32) -> usize {
        let mut count = 0;
        for index in 0..self.scope.writers {
            count += self.writer_moves(state, at, index);
            count += self.backend_moves(state, at, index);
        }
        for index in 0..self.scope.readers {
            count += self.reader_moves(state, at, index);
        }
        if self.scope.replica && state.replayed < state.wal {
            self.reach(State { replayed: state.replayed + 1, ..*state }, at, "replica replays");
            count += 1;
        }
        count
    }

    fn at_rest(&mut self, state: &State, at: u32) {
        let now = Self::look(state, 0..self.scope.words());
        if let Some((value, _)) = state.stored
            && self.is_hit(state, &now)
            && value != state.visible
        {
            self.broken.push((Broken::Perm, at));
        }
        if now.pending() {
            self.broken.push((Broken::Leak, at));
        }
    }

    // ---- the real functions, on the checker's states ----

    fn real(state: &State) -> Words {
        forge::words(
            &state.words.map(|word| (u64::from(word.version) << 16 | u64::from(word.pending), lsn_of(word.lsn).0)),
        )
    }

    fn keep(state: &mut State, words: &Words) {
        for (index, word) in state.words.iter_mut().enumerate() {
            let (raw, lsn) = forge::raw(words, index);
            *word = Small { version: (raw >> 16) as u8, pending: raw as u8, lsn: number_of(Lsn(lsn)) };
        }
    }

    fn set(range: std::ops::Range<usize>) -> WordSet {
        WordSet::from_indexes(range.map(|index| index as u16))
    }

    fn look(state: &State, range: std::ops::Range<usize>) -> Observation {
        Self::real(state).observe(&Self::set(range))
    }

    fn seen_by(&self, reader: &Reader) -> Observation {
        let count = self.scope.words();
        let versions = reader.versions.map(u64::from);
        forge::observation(Self::set(0..count), &versions[..count], reader.pending, lsn_of(reader.lsn))
    }

    fn is_hit(&self, state: &State, now: &Observation) -> bool {
        let Some((_, versions)) = state.stored else { return false };
        let count = self.scope.words();
        let seen = Observation::settled(Self::set(0..count), versions[..count].iter().map(|one| u64::from(*one)));
        let entry = Entry {
            key: self.key.clone(),
            shard: ShardId(0),
            epoch: Epoch(1),
            seen: seen.expect("one version per word"),
            stored_at_ms: 0,
            reply: self.reply.clone(),
        };
        let now = Now { seen: now, shard: ShardId(0), epoch: Epoch(1), now_ms: 1, age_ms_max: 60_000 };
        judge(&entry, &self.key, &now).is_ok()
    }

    // ---- writers ----

    fn writer_moves(&mut self, state: &State, at: u32, index: usize) -> usize {
        let writer = state.writers[index];
        if writer.lost {
            return self.recovery_moves(state, at, index);
        }
        let mut next = *state;
        let me = &mut next.writers[index];
        let label = match writer.stage {
            Stage::Idle | Stage::Raising => {
                let range = self.step_range(writer.step);
                me.step = range.end as u8;
                me.stage = Stage::Raising;
                if range.end == self.scope.words() {
                    (me.stage, me.step) = (Stage::Sent, 0);
                    me.lsn = state.wal;
                }
                self.begin(&mut next, range);
                "W raises, then sends"
            }
            Stage::Visible => {
                me.stage = Stage::Acked;
                next.acked = next.acked.max(writer.number);
                "W acknowledged"
            }
            Stage::Acked => {
                me.stage = Stage::LsnKnown;
                if self.scope.mutant != Mutant::EarlyLsn {
                    me.lsn = state.wal;
                }
                "clock answers"
            }
            Stage::LsnKnown | Stage::RolledBack => {
                let range = self.step_range(writer.step);
                let over = range.end == self.scope.words();
                me.step = range.end as u8;
                let lsn = (writer.stage == Stage::LsnKnown).then_some(writer.lsn);
                if over {
                    let late = self.scope.mutant == Mutant::StateBeforeLsn && lsn.is_some();
                    *me = Writer {
                        stage: if late { Stage::LsnLate } else { Stage::Done },
                        lsn: writer.lsn,
                        ..Writer::default()
                    };
                }
                self.end(&mut next, range, lsn);
                "W ends"
            }
            Stage::LsnLate => {
                *me = Writer { stage: Stage::Done, ..Writer::default() };
                next.words[0].lsn = next.words[0].lsn.max(writer.lsn);
                "LSN stored late"
            }
            Stage::Sent | Stage::Wal | Stage::Done => return 0,
        };
        self.reach(next, at, label);
        1
    }

    /// What the backend does by itself, whether or not the proxy still hears it.
    fn backend_moves(&mut self, state: &State, at: u32, index: usize) -> usize {
        let writer = state.writers[index];
        let mut count = 0;
        let mut go = |checker: &mut Checker, label, change: &dyn Fn(&mut State, &mut Writer)| {
            let (mut next, mut me) = (*state, writer);
            change(&mut next, &mut me);
            next.writers[index] = me;
            checker.reach(next, at, label);
            count += 1;
        };
        // The row lock is held until the commit is visible.
        let locked = state.writers.iter().any(|other| other.stage == Stage::Wal);
        if writer.stage == Stage::Sent && !locked {
            go(self, "WAL", &|next, me| {
                next.wal += 1;
                (me.stage, me.number) = (Stage::Wal, next.wal);
            });
        }
        if writer.stage == Stage::Wal {
            go(self, "VISIBLE", &|next, me| {
                next.visible = me.number;
                me.stage = Stage::Visible;
            });
        }
        if writer.stage == Stage::Sent && !writer.lost && state.rollbacks > 0 {
            go(self, "rolled back", &|next, me| {
                next.rollbacks -= 1;
                me.stage = Stage::RolledBack;
            });
        }
        if matches!(writer.stage, Stage::Sent | Stage::Wal | Stage::Visible) && !writer.lost && state.deaths > 0 {
            go(self, "backend lost", &|next, me| {
                next.deaths -= 1;
                me.lost = true;
            });
        }
        count
    }

    /// A lost backend: its intent ends with an LSN taken once it is gone, i.e. has committed or never will.
    fn recovery_moves(&mut self, state: &State, at: u32, index: usize) -> usize {
        let writer = state.writers[index];
        let mut count = 0;
        if writer.ended {
            // Only under `TimeOut`: the backend has nobody left to tell.
            return 0;
        }
        if matches!(writer.stage, Stage::Sent | Stage::Visible) {
            let mut next = *state;
            next.writers[index] = Writer { stage: Stage::Done, ..Writer::default() };
            self.end(&mut next, 0..self.scope.words(), Some(state.wal));
            self.reach(next, at, "backend gone; W ends");
            count += 1;
        }
        if self.scope.mutant == Mutant::TimeOut {
            let mut next = *state;
            next.writers[index].ended = true;
            self.end(&mut next, 0..self.scope.words(), Some(state.wal));
            self.reach(next, at, "time-out; W ends");
            count += 1;
        }
        count
    }

    fn step_range(&self, step: u8) -> std::ops::Range<usize> {
        let start = usize::from(step);
        if self.scope.torn { start..start + 1 } else { 0..self.scope.words() }
    }

    fn begin(&self, state: &mut State, range: std::ops::Range<usize>) {
        if self.scope.mutant == Mutant::DoubleBump {
            range.for_each(|index| state.words[index].version += 1);
            return;
        }
        let words = Self::real(state);
        // The intent is forged again from its words when the writer ends.
        let _ = words.begin_write(&Self::set(range)).expect("room");
        Self::keep(state, &words);
    }

    fn end(&self, state: &mut State, range: std::ops::Range<usize>, lsn: Option<u8>) {
        if self.scope.mutant == Mutant::DoubleBump {
            for word in &mut state.words[range] {
                word.version += 1;
                word.lsn = word.lsn.max(lsn.unwrap_or(0));
            }
            return;
        }
        let lsn = lsn.filter(|_| self.scope.mutant != Mutant::StateBeforeLsn).map(lsn_of);
        let words = Self::real(state);
        words.end_write(forge::intent(Self::set(range)), lsn);
        Self::keep(state, &words);
    }

    // ---- readers ----

    fn reader_moves(&mut self, state: &State, at: u32, index: usize) -> usize {
        let reader = state.readers[index];
        match reader.phase {
            Phase::Idle => {
                let start = Reader { rt: state.acked, mon: state.read, ..Reader::default() };
                self.look_and_choose(state, at, (index, start))
            }
            Phase::Looking => self.look_and_choose(state, at, (index, reader)),
            Phase::AskPrimary => {
                let me = Reader { phase: Phase::FromPrimary, value: state.visible, ..reader };
                self.set_reader(state, at, (index, me), "primary snapshot")
            }
            Phase::AskReplica => {
                let me = if replica_answer_ok(lsn_of(reader.lsn), lsn_of(state.replayed)) {
                    Reader { phase: Phase::FromReplica, value: state.replayed, ..reader }
                } else {
                    Reader { phase: Phase::AskPrimary, ..reader }
                };
                self.set_reader(state, at, (index, me), "replica reports its position")
            }
            Phase::FromPrimary | Phase::FromReplica => self.complete(state, at, (index, reader)),
            Phase::Storing => {
                let mut next = *state;
                next.stored = Some((reader.value, reader.versions));
                self.set_reader(&next, at, (index, Reader { phase: Phase::Done, ..Reader::default() }), "stored late")
            }
            Phase::Landed => {
                self.answer(state, at, (index, reader), reader.value);
                1
            }
            Phase::Following | Phase::Done => 0,
        }
    }

    fn set_reader(&mut self, state: &State, at: u32, (index, me): (usize, Reader), label: &'static str) -> usize {
        let mut next = *state;
        next.readers[index] = me;
        self.reach(next, at, label);
        1
    }

    /// One look, then: hit, or join a flight, or ask a server.
    fn look_and_choose(&mut self, state: &State, at: u32, (index, mut me): (usize, Reader)) -> usize {
        let range = self.step_range(me.step);
        let look = Self::look(state, range.clone());
        for (word, version) in range.clone().zip(look.versions()) {
            me.versions[word] = *version as u8;
        }
        me.pending |= look.pending();
        me.lsn = me.lsn.max(number_of(look.lsn()));
        me.step = range.end as u8;
        if range.end < self.scope.words() {
            me.phase = Phase::Looking;
            return self.set_reader(state, at, (index, me), "R looks at a word");
        }
        me.step = 0;
        let seen = self.seen_by(&me);
        if let Some((value, _)) = state.stored
            && self.is_hit(state, &seen)
        {
            self.answer(state, at, (index, me), value);
            return 1;
        }
        let ask = Reader { phase: Phase::AskPrimary, ..me };
        let mut count = self.set_reader(state, at, (index, ask), "R misses, asks the primary");
        if self.scope.replica {
            let (last_known_replay, may_have_moved) = (Lsn(u64::MAX), false);
            let view =
                ReplicaView { connected: true, is_near: true, outstanding: 0, last_known_replay, may_have_moved };
            if let Choice::Replica(_, need) = choose(ReadBound::Strict, &seen, &[view], 0) {
                let ask = Reader { phase: Phase::AskReplica, lsn: number_of(need), ..me };
                count += self.set_reader(state, at, (index, ask), "R misses, asks the replica");
            }
        }
        if self.scope.flights {
            count += self.join_moves(state, at, (index, me));
        }
        count
    }

    fn join_moves(&mut self, state: &State, at: u32, (index, me): (usize, Reader)) -> usize {
        let mut count = 0;
        let under_way = [Phase::AskPrimary, Phase::AskReplica, Phase::FromPrimary, Phase::FromReplica];
        for (leader, other) in state.readers.iter().enumerate().take(self.scope.readers) {
            if leader == index || !under_way.contains(&other.phase) {
                continue;
            }
            let mut flights = Flights::new(4, 4);
            let led = flights.join(&self.key, &self.seen_by(other));
            let joined = flights.join(&self.key, &self.seen_by(&me));
            let follows = matches!((led, joined), (Join::Lead(flight), Join::Follow(joined)) if flight == joined);
            if follows || self.scope.mutant == Mutant::JoinByKey {
                let me = Reader { phase: Phase::Following, leader: leader as u8, ..me };
                count += self.set_reader(state, at, (index, me), "R joins a flight");
            }
        }
        count
    }

    /// The answer is complete: the second look, then release, fill, or run again on the primary.
    fn complete(&mut self, state: &State, at: u32, (index, mut me): (usize, Reader)) -> usize {
        let range = self.step_range(me.step);
        let versions = me.versions.map(u64::from);
        let part = forge::observation(Self::set(range.clone()), &versions[range.clone()], me.pending, lsn_of(me.lsn));
        let replica = me.phase == Phase::FromReplica;
        let blind = self.scope.mutant == Mutant::NoSecondLook && replica;
        let late_stamp = self.scope.mutant == Mutant::StampAfter && !replica;
        if late_stamp {
            me.versions[0] = state.words[0].version;
        }
        let holds = blind || late_stamp || may_fill(&Self::real(state), &part).is_ok();
        if !holds && replica {
            let again = Reader { rt: me.rt, mon: me.mon, ..Reader::default() };
            return self.look_again_on_primary(state, at, (index, again));
        }
        if holds && range.end < self.scope.words() {
            me.step = range.end as u8;
            return self.set_reader(state, at, (index, me), "R checks a word");
        }
        let mut next = *state;
        let (value, mut after) = (me.value, Reader { phase: Phase::Done, ..Reader::default() });
        if holds && self.scope.late_store {
            after = Reader { phase: Phase::Storing, value, versions: me.versions, ..Reader::default() };
        } else if holds {
            next.stored = Some((value, me.versions));
        }
        // Followers take the same bytes; each is judged by its own start when it passes them on.
        for other in &mut next.readers {
            if other.phase == Phase::Following && usize::from(other.leader) == index {
                (other.phase, other.value) = (Phase::Landed, value);
            }
        }
        self.finish(&next, at, (index, me), (value, after));
        1
    }

    fn look_again_on_primary(&mut self, state: &State, at: u32, (index, mut me): (usize, Reader)) -> usize {
        let look = Self::look(state, 0..self.scope.words());
        for (word, version) in look.versions().iter().enumerate() {
            me.versions[word] = *version as u8;
        }
        (me.pending, me.lsn) = (look.pending(), number_of(look.lsn()));
        me.phase = Phase::AskPrimary;
        self.set_reader(state, at, (index, me), "moved: R runs again on the primary")
    }

    fn answer(&mut self, state: &State, at: u32, (index, me): (usize, Reader), value: u8) {
        self.finish(state, at, (index, me), (value, Reader { phase: Phase::Done, ..Reader::default() }));
    }

    fn finish(&mut self, state: &State, at: u32, (index, me): (usize, Reader), (value, after): (u8, Reader)) {
        let mut next = *state;
        next.readers[index] = after;
        next.read = next.read.max(value);
        let reached = self.reach(next, at, "R answers");
        if value < me.rt {
            self.broken.push((Broken::Rt, reached));
        }
        if value < me.mon {
            self.broken.push((Broken::Mon, reached));
        }
    }

    // ---- verdict ----

    fn trace(&self, mut at: u32) -> String {
        let mut lines = Vec::new();
        loop {
            let (state, from, label) = &self.found[at as usize];
            lines.push(format!("{label}: {state:?}"));
            if *from == at || lines.len() > 60 || at < 2 {
                break;
            }
            at = *from;
        }
        lines.reverse();
        lines.join("\n")
    }

    #[track_caller]
    fn holds(scope: Scope) {
        let checker = Self::run(scope, &[]);
        if let Some((broken, at)) = checker.broken.first() {
            panic!("{broken:?} broken after\n{}", checker.trace(*at));
        }
    }

    #[track_caller]
    fn catches(scope: Scope, expected: &[Broken]) {
        let checker = Self::run(scope, expected);
        assert!(checker.has_broken(expected), "{:?} broke only {:?}", scope.mutant, checker.broken.first());
    }

    fn has_broken(&self, all: &[Broken]) -> bool {
        all.iter().all(|one| self.broken.iter().any(|(found, _)| found == one))
    }
}

use Broken::{Mon, Perm, Rt};

#[test]
fn cache_holds_with_rollbacks() {
    Checker::holds(Scope { readers: 3, rollbacks: 1, ..Scope::SMALL });
}

#[test]
fn cache_and_replica_hold() {
    Checker::holds(Scope { readers: 3, replica: true, ..Scope::SMALL });
}

#[test]
fn cache_and_replica_hold_when_backends_are_lost() {
    Checker::holds(Scope { replica: true, deaths: 2, ..Scope::SMALL });
    Checker::holds(Scope { writers: 1, readers: 3, replica: true, deaths: 1, rollbacks: 1, ..Scope::SMALL });
}

#[test]
fn flights_hold() {
    Checker::holds(Scope { flights: true, rollbacks: 1, ..Scope::SMALL });
    Checker::holds(Scope { writers: 1, readers: 3, flights: true, replica: true, deaths: 1, ..Scope::SMALL });
}

#[test]
fn a_late_store_holds() {
    Checker::holds(Scope { replica: true, late_store: true, ..Scope::SMALL });
}

#[test]
fn looks_and_moves_need_not_be_atomic() {
    Checker::holds(Scope { torn: true, ..Scope::SMALL });
    Checker::holds(Scope { torn: true, replica: true, writers: 1, readers: 3, deaths: 1, ..Scope::SMALL });
}

#[test]
fn mutants_are_caught() {
    let base = Scope { replica: true, ..Scope::SMALL };
    let cases: [(Mutant, &[Broken]); 5] = [
        (Mutant::DoubleBump, &[Mon]),
        (Mutant::NoSecondLook, &[Mon]),
        (Mutant::StampAfter, &[Rt, Perm]),
        (Mutant::StateBeforeLsn, &[Rt, Mon]),
        (Mutant::EarlyLsn, &[Rt, Mon]),
    ];
    for (mutant, expected) in cases {
        Checker::catches(Scope { mutant, ..base }, expected);
    }
    Checker::catches(Scope { mutant: Mutant::TimeOut, deaths: 1, ..base }, &[Mon, Perm]);
    Checker::catches(Scope { mutant: Mutant::JoinByKey, flights: true, readers: 3, writers: 1, ..base }, &[Rt, Mon]);
}
