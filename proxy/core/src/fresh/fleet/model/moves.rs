//! What may happen next in a state of the fleet: one step of one member, a message that arrives, a server process, a fault, or time.
//!
//! What the members decide they ask the product's functions; what is left out or done otherwise by a [`Mutant`] stands beside it.

use weir_wire::peer::Write;

use super::super::{Attach, Burial, Roster, Row, Standing, Term, Tie, borrow, lend, lender};
use super::world::*;
use super::{Broken, Mutant, Scope};
use crate::cache::may_fill;

/// A step that was found, what it leads to, and what it breaks.
pub struct Step {
    pub label: &'static str,
    pub member: usize,
    pub world: World,
    pub broken: Option<Broken>,
}

pub struct Moves<'a> {
    scope: &'a Scope,
    world: &'a World,
    found: Vec<Step>,
}

/// All steps from `world`.
pub fn moves(scope: &Scope, world: &World) -> Vec<Step> {
    let mut moves = Moves { scope, world, found: Vec::new() };
    for member in 0..scope.members {
        moves.keeper(member);
        moves.writer(member);
        moves.reader(member);
        moves.server(member);
        moves.clock(member);
        for other in (0..scope.members).filter(|other| *other != member) {
            moves.attempt(member, other);
            moves.arrive(member, other);
            moves.connection(member, other);
        }
        moves.crash(member);
    }
    moves.go("time passes", 0, World::pass_time);
    moves.found
}

impl Moves<'_> {
    fn go(&mut self, label: &'static str, member: usize, change: impl FnOnce(&mut World)) {
        let mut world = self.world.clone();
        change(&mut world);
        self.found.push(Step { label, member, world, broken: None });
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.scope.mutant == mutant
    }

    fn tie(&self, world: &World, member: usize, row: &Row) -> Tie {
        let tie = world.tie(member, row);
        let assumed = tie.attached.or(Some(false)).filter(|_| self.is(Mutant::JoinUnattached));
        Tie { attached: assumed.or(tie.attached), ..tie }
    }

    // ---- keepers ----

    fn keeper(&mut self, member: usize) {
        let me = &self.world.members[member];
        let may_come = me.life == Life::Absent && self.scope.joins[member];
        let joins = (me.life == Life::Alive && self.scope.rejoins) || may_come;
        if me.roster.is_none() && joins {
            self.go("joins", member, |world| world.join(member));
        }
        if me.roster.is_none() || self.scope.frozen[member] {
            return;
        }
        match &me.keeping {
            Keeping::Idle => {
                let out = self.world.seats[member].is_none_or(|seat| seat.out);
                let asked = Asked { at: NOW, epoch: self.world.epoch, out };
                if self.scope.slow_primary[member] {
                    self.go("asks for its lease", member, |world| {
                        world.members[member].keeping = Keeping::Asked(asked);
                    });
                } else {
                    self.renew(self.world.clone(), member, asked);
                }
            }
            Keeping::Asked(asked) => self.renew(self.world.clone(), member, *asked),
            Keeping::Read(gone) => {
                let (mut world, gone) = (self.world.clone(), gone.clone());
                if self.act(&mut world, member, &gone) {
                    self.found.push(Step { label: "does what is to be done", member, world, broken: None });
                }
            }
        }
    }

    /// The primary's answer arrives.
    fn renew(&mut self, mut world: World, member: usize, Asked { at, epoch, out }: Asked) {
        if out {
            self.hear_that_it_is_out(world, member);
            return;
        }
        let rows = world.rows(member);
        let mut roster = world.members[member].roster.take().expect("it has joined");
        let at = if self.is(Mutant::LeaseFromTheAnswer) { NOW } else { at };
        let tie = |row: &Row| self.tie(&world, member, row);
        let standing = world.members[member].standing;
        let good = roster.is_lease_good_at(epoch);
        let settled = roster.is_settled(epoch, standing, world.members[member].heard.writers(), &tie);
        let deaf = world.members[member].deaf.clone();
        let done = settled && deaf.is_empty();
        let (mut begun, mut gone) = (Vec::new(), Vec::new());
        if !done {
            let mut read = roster.clone();
            read.read(epoch, rows);
            begun = read.begin_attempts(&tie);
            gone = read.gone(standing, &deaf, &tie);
            roster = read;
        }
        let joined: Vec<u64> = begun.iter().map(|id| joined_of(&roster, *id)).collect();
        let me = &mut *world.members[member];
        if good {
            me.leased_until = if self.scope.for_ever { FOR_EVER } else { Term::lease_until(at, LEASE) };
        }
        me.deaf.clear();
        for (id, joined) in begun.into_iter().zip(joined) {
            me.attempts[member_of(id)] = Attempt::Begun { joined };
        }
        me.roster = Some(roster);
        me.keeping = if done { Keeping::Idle } else { Keeping::Read(gone.clone()) };
        if done || self.scope.slow_primary[member] || self.act(&mut world, member, &gone) {
            self.found.push(Step { label: "keeps its row", member, world, broken: None });
        }
    }

    /// A process that goes on does so as a whole: what it may forward it forwards before its keeper's connection ends.
    fn hear_that_it_is_out(&mut self, mut world: World, member: usize) {
        let me = &mut *world.members[member];
        if me.writing == Writing::Cleared {
            return;
        }
        (me.keeping, me.roster) = (Keeping::Idle, None);
        me.deaf.clear();
        me.stand(Standing::Out);
        self.found.push(Step { label: "hears that it is out", member, world, broken: None });
    }

    /// Puts out who is gone, buries, and stands higher if it may. False: it was put out itself.
    fn act(&mut self, world: &mut World, member: usize, gone: &[u64]) -> bool {
        let mut roster = world.members[member].roster.clone().expect("it has joined");
        for id in gone {
            if world.seats[member].is_none_or(|seat| seat.out) {
                self.hear_that_it_is_out(world.clone(), member);
                return false;
            }
            world.epoch += 1;
            if let Some(seat) = &mut world.seats[member_of(*id)] {
                seat.out = true;
            }
            roster.put_out(*id);
        }
        roster.mark_fences(NOW);
        let now = if self.is(Mutant::NoExclusionWait) { NOW + 9 * TICK } else { NOW };
        let told = roster.to_tell(now);
        world.members[member].told.tell_only(|id| told.contains(&id));
        for gone in roster.vanished(world.members[member].heard.writers()) {
            self.orphan(world, member, gone);
        }
        for id in roster.dead(now) {
            self.bury(world, member, (&mut roster, id));
        }
        let me = &world.members[member];
        let reached = roster.reached(me.standing, now, &|row| self.tie(world, member, row));
        let me = &mut *world.members[member];
        if let Some(reached) = reached {
            if reached == Standing::Serves {
                me.desk.begin_anew();
            }
            me.stand(reached);
        }
        (me.roster, me.keeping) = (Some(roster), Keeping::Idle);
        true
    }

    fn bury(&self, world: &mut World, member: usize, (roster, id): (&mut Roster, u64)) {
        let standing = world.members[member].standing;
        let ready = match roster.burial(id, standing, &|row| self.tie(world, member, row)) {
            Burial::Later => false,
            Burial::PassOn => {
                let any = self.orphan(world, member, id);
                roster.passes_on(any) || self.is(Mutant::BuriedBeforePassedOn)
            }
            Burial::Prove => {
                let active = world.works[member_of(id)] == Work::Active;
                let now = active.then_some((member_of(id) as i32, None, None)).into_iter().collect();
                roster.is_nothing_left(id, &now) || self.is(Mutant::BuriedUnproven)
            }
            Burial::Remove => true,
        };
        if ready {
            world.epoch += 1;
            let seat = &mut world.seats[member_of(id)];
            *seat = seat.filter(|seat| !seat.out);
            roster.buried(id);
        }
    }

    /// What somebody who is gone had under way is of unknown outcome from now on.
    fn orphan(&self, world: &mut World, member: usize, gone: u64) -> bool {
        let me = &mut *world.members[member];
        let orphans = me.heard.orphan(gone);
        let any = !orphans.is_empty();
        for orphan in orphans {
            if self.is(Mutant::OrphansEndAtOnce) {
                me.desk.lower(orphan.maker, orphan.token);
            } else {
                me.lost.push(orphan);
            }
        }
        me.lost.sort_unstable();
        any
    }

    // ---- attaching ----

    fn attempt(&mut self, member: usize, other: usize) {
        let me = &self.world.members[member];
        match me.attempts[other] {
            Attempt::None | Attempt::Sent(_) => {}
            Attempt::Begun { joined } => {
                let there = self.world.members[other].life == Life::Alive;
                let passes = !self.is(Mutant::JoinWithoutWhatIsUnderWay);
                if there {
                    self.go("attaches", member, |world| attach(world, (member, other), joined, passes));
                }
                if !there || self.world.delays > 0 {
                    self.go("does not reach another", member, |world| {
                        world.delays -= u8::from(there);
                        end_attempt(world, (member, other), false);
                    });
                }
            }
        }
    }

    // ---- messages ----

    fn arrive(&mut self, from: usize, to: usize) {
        let (pipe, any) = (&self.world.pipes[from][to], self.is(Mutant::AnyConnection));
        if !pipe.queue.is_empty() {
            self.go("a message arrives", to, |world| {
                let pipe = &mut world.pipes[from][to];
                let (message, number) = (pipe.queue.remove(0), pipe.number);
                take(world, (from, to), (message, number), any);
            });
        }
        if !pipe.late.is_empty() {
            self.go("a message of the last connection arrives", to, |world| {
                let pipe = &mut world.pipes[from][to];
                let message = pipe.late.remove(0);
                // Its number, unless another connection has been opened since.
                let number = pipe.number - u8::from(pipe.up);
                take(world, (from, to), (message, number), any);
            });
            self.go("the last connection's messages are lost", to, |world| world.pipes[from][to].late.clear());
        }
    }

    /// Cuts, and answers that come too late.
    fn connection(&mut self, member: usize, other: usize) {
        if self.world.cuts > 0 && member == 0 && self.world.pipes[member][other].up {
            self.go("a connection is cut", member, |world| {
                world.cuts -= 1;
                world.cut(member, other);
            });
        }
        if self.world.delays == 0 {
            return;
        }
        let me = &self.world.members[member];
        if let Writing::Telling(answers) = me.writing
            && answers[other] == Some(Answer::Waiting)
        {
            self.go("a write waits no longer for an answer", member, |world| {
                world.delays -= 1;
                if let Writing::Telling(answers) = &mut world.members[member].writing {
                    answers[other] = Some(Answer::Deaf);
                }
            });
        }
        if let Attempt::Sent(_) = me.attempts[other] {
            self.go("an attempt waits no longer for an answer", member, |world| {
                world.delays -= 1;
                end_attempt(world, (member, other), false);
            });
        }
    }

    // ---- writers ----

    fn writer(&mut self, member: usize) {
        let me = &self.world.members[member];
        if me.life != Life::Alive {
            return;
        }
        let may_write = me.term().may_write(me.standing, NOW);
        match me.writing {
            Writing::Idle if self.scope.writes[member] => self.go("raises its word", member, |world| {
                let me = &mut *world.members[member];
                me.desk.raise();
                me.told.begin(TOKEN, under_way(member));
                me.writing = Writing::Raised;
                if may_write {
                    tell(world, member);
                }
            }),
            Writing::Raised if may_write => self.go("tells the others", member, |world| tell(world, member)),
            Writing::Raised if self.scope.takes_back => {
                self.go("takes its write back", member, |world| over(world, member));
            }
            Writing::Telling(answers) if !answers.contains(&Some(Answer::Waiting)) => {
                self.after_telling(member, answers);
            }
            Writing::Cleared => self.go("sends its write", member, |world| {
                world.works[member] = Work::Active;
                world.members[member].writing = Writing::Sent;
            }),
            Writing::Sent => {
                if let Work::Done(value) = self.world.works[member] {
                    self.go("its write is acknowledged", member, |world| {
                        world.acked = world.acked.max(value);
                        world.members[member].writing = Writing::Acknowledged;
                    });
                }
            }
            Writing::Acknowledged => self.go("its write is over", member, |world| over(world, member)),
            Writing::Idle | Writing::Raised | Writing::Telling(_) | Writing::Done => {}
        }
    }

    fn after_telling(&mut self, member: usize, answers: [Option<Answer>; MEMBERS]) {
        let deaf: Vec<u64> = (0..MEMBERS).filter(|other| answers[*other] == Some(Answer::Deaf)).map(id_of).collect();
        let me = &self.world.members[member];
        let is_deaf = !deaf.is_empty() && !self.is(Mutant::DeafIgnored);
        let may = me.term().may_forward(is_deaf, me.standing, NOW);
        let label = if may { "may forward its write" } else { "has to tell again" };
        self.go(label, member, |world| {
            let me = &mut *world.members[member];
            if !may {
                me.deaf.extend(deaf);
            }
            me.writing = if may { Writing::Cleared } else { Writing::Raised };
        });
    }

    fn server(&mut self, member: usize) {
        if self.world.works[member] == Work::Active {
            self.go("the server commits", member, |world| {
                world.visible += 1;
                world.works[member] = Work::Done(world.visible);
            });
        }
    }

    /// Writes of unknown outcome end when their server processes are gone.
    fn clock(&mut self, member: usize) {
        let lost = &self.world.members[member].lost;
        if let Some(at) = lost.iter().position(|lost| self.world.is_process_gone(usize::from(lost.pid))) {
            self.go("a lost write has ended", member, |world| {
                let me = &mut *world.members[member];
                let lost = me.lost.remove(at);
                me.desk.lower(lost.maker, lost.token);
            });
        }
    }

    fn crash(&mut self, member: usize) {
        if self.world.crashes > 0 && self.scope.dies[member] && self.world.members[member].life == Life::Alive {
            self.go("dies", member, |world| {
                world.crashes -= 1;
                world.crash(member);
            });
        }
    }

    // ---- readers ----

    fn reader(&mut self, member: usize) {
        let me = &self.world.members[member];
        if me.life != Life::Alive || !self.scope.reads[member] {
            return;
        }
        let desk = &me.desk;
        match desk.reader.phase {
            // What is read from the primary alone is not in question there.
            Reading::Idle if self.scope.orphaned && !me.may_serve() => {}
            Reading::Idle => self.go("a read looks at its word", member, |world| {
                let (acked, read) = (world.acked, world.read);
                let desk = &mut world.members[member].desk;
                let pending = desk.look().pending();
                desk.reader = Reader { phase: Reading::Looked, acked, read, held: true, pending, served: false };
            }),
            Reading::Looked => {
                let served = me.may_serve() || (self.is(Mutant::NoLease) && me.standing == Standing::Serves);
                match desk.entry.filter(|_| served && Desk::of_entry().same_moment(&desk.seen())) {
                    Some(value) => self.answer((member, "a read is answered from memory"), value, None),
                    None => self.go("a read misses", member, |world| {
                        let reader = &mut world.members[member].desk.reader;
                        reader.served = served;
                        let shared = served && self.scope.shared;
                        reader.phase = if shared { Reading::AskShared } else { Reading::AskPrimary };
                    }),
                }
            }
            Reading::AskShared => self.ask_shared(member),
            Reading::AskPrimary => self.go("a read has its snapshot", member, |world| {
                let value = world.visible;
                world.members[member].desk.reader.phase = Reading::Answered(value);
            }),
            Reading::Answered(value) => self.fill(member, value),
            Reading::Done => {}
        }
        self.borrow_stamp(member);
    }

    /// Redis may give back whatever it was ever given, or nothing.
    fn ask_shared(&mut self, member: usize) {
        let mut desk = self.world.members[member].desk;
        let seen = desk.seen();
        let stamps = desk.with(|words| words.stamps(&seen));
        for (value, stamp) in self.world.shared.clone() {
            if stamps.as_ref().is_some_and(|stamps| stamps[..] == [stamp]) {
                self.answer((member, "a read is answered from Redis"), value, Some(value));
            }
        }
        self.go("Redis has nothing", member, |world| {
            world.members[member].desk.reader.phase = Reading::AskPrimary;
        });
    }

    fn fill(&mut self, member: usize, value: u8) {
        let me = &self.world.members[member];
        let (mut desk, fills) = (me.desk, me.desk.reader.served && me.may_serve());
        let seen = desk.seen();
        let filled = fills && desk.with(|words| may_fill(words, &seen)).is_ok();
        let stamps = desk.with(|words| words.stamps(&seen)).filter(|_| filled && self.scope.shared);
        self.answer((member, "a read is answered by the primary"), value, filled.then_some(value));
        if let (Some(stamps), Some(step)) = (stamps, self.found.last_mut()) {
            step.world.shared.insert((value, stamps[0]));
        }
    }

    /// The read is over; `kept` is what memory keeps from now on.
    fn answer(&mut self, (member, label): (usize, &'static str), value: u8, kept: Option<u8>) {
        let reader = self.world.members[member].desk.reader;
        self.go(label, member, |world| {
            world.read = world.read.max(value);
            let desk = &mut world.members[member].desk;
            desk.entry = kept.or(desk.entry);
            desk.reader = Reader { phase: Reading::Done, ..Reader::default() };
        });
        if let Some(step) = self.found.last_mut() {
            step.broken = match value {
                _ if value < reader.acked => Some(Broken::Rt),
                _ if value < reader.read => Some(Broken::Mon),
                _ => None,
            };
        }
    }

    // ---- stamps ----

    /// In one step, as far as the lender goes; the borrower may have been asking for long: its own stamp is from before the
    /// question, so it is taken over only if nothing has moved since.
    fn borrow_stamp(&mut self, member: usize) {
        let me = &self.world.members[member];
        if !self.scope.shared || !me.may_serve() {
            return;
        }
        let others = self.world.rows(member).into_iter().map(|row| (row.id, row.out));
        let Some(from) = lender(id_of(member), others).map(member_of) else { return };
        let other = &self.world.members[from];
        if other.life != Life::Alive || !other.may_serve() {
            return;
        }
        let unsettled = self.is(Mutant::LentUnsettled);
        let mut theirs = other.desk;
        let theirs = if unsettled { vec![theirs.stamp] } else { theirs.with(|words| lend(words, 0, 1)) };
        let mine = me.desk.clone().with(|words| words.settled_stamps(0, 1));
        let mine = if unsettled { vec![Some((0, me.desk.stamp))] } else { mine };
        if mine[0].is_some_and(|(_, stamp)| theirs[0] != 0 && stamp != theirs[0]) {
            self.go("takes over a stamp", member, |world| {
                let desk = &mut world.members[member].desk;
                if unsettled {
                    desk.stamp = theirs[0];
                } else {
                    desk.with(|words| borrow(words, 0, &mine, &theirs));
                }
            });
        }
    }
}

fn joined_of(roster: &Roster, id: u64) -> u64 {
    roster.rows().iter().find(|row| row.id == id).map_or(0, |row| row.joined)
}

/// It is there, and is told from now on.
fn attach(world: &mut World, (member, other): (usize, usize), joined: u64, passes: bool) {
    let pipe = &mut world.pipes[member][other];
    if !pipe.up {
        (pipe.number, pipe.up) = (pipe.number + 1, true);
    }
    let link = Link { to: other as u8, number: pipe.number };
    let me = &mut *world.members[member];
    me.told.meet(id_of(other), joined);
    me.told.attach(id_of(other), joined, link);
    let (serves, writes) = (me.standing == Standing::Serves, !me.told.writes().is_empty() && passes);
    me.attempts[other] = Attempt::Sent(link);
    let orphans = me.lost.clone();
    world.send(member, link, Msg::Attach { joined, serves, writes, orphans });
}

fn end_attempt(world: &mut World, (member, other): (usize, usize), attached: bool) {
    let me = &mut *world.members[member];
    me.attempts[other] = Attempt::None;
    if let Some(roster) = &mut me.roster {
        roster.end_attempt(id_of(other), attached);
    }
}

/// Whoever waits on that connection has the answer.
fn answer(world: &mut World, (from, to): (usize, usize), number: u8, (is_attach, known): (bool, bool)) {
    let on = Link { to: to as u8, number };
    if !world.is_up(from, on) {
        return;
    }
    let me = &mut *world.members[from];
    match (is_attach, me.attempts[to], &mut me.writing) {
        (true, Attempt::Sent(link), _) if link == on => {
            me.told.attached(id_of(to), &link, known);
            end_attempt(world, (from, to), known);
        }
        (false, _, Writing::Telling(answers)) if answers[to] == Some(Answer::Waiting) => {
            answers[to] = Some(if known { Answer::Heard } else { Answer::Deaf });
        }
        _ => {}
    }
}

fn tell(world: &mut World, member: usize) {
    let peers: Vec<Link> = world.members[member].told.peers().iter().map(|peer| peer.link).collect();
    let mut answers = [None; MEMBERS];
    for link in peers {
        let sent = world.send(member, link, Msg::Announce);
        answers[usize::from(link.to)] = Some(if sent { Answer::Waiting } else { Answer::Deaf });
    }
    world.members[member].writing = Writing::Telling(answers);
}

/// A write has ended, here and wherever it was told.
fn over(world: &mut World, member: usize) {
    let me = &mut *world.members[member];
    me.told.end(TOKEN);
    me.desk.lower(member as u8 + 1, TOKEN as u8);
    me.writing = Writing::Done;
    let links: Vec<Link> = me.told.peers().iter().map(|peer| peer.link).collect();
    for link in links {
        world.send(member, link, Msg::Over);
    }
}

/// A message arrives on that connection; on `any`, if it is not looked at.
fn take(world: &mut World, (from, to): (usize, usize), (message, number): (Msg, u8), any: bool) {
    if world.members[to].life != Life::Alive {
        return;
    }
    let maker = from as u8 + 1;
    let Member { heard, desk, lost, .. } = &mut *world.members[to];
    let connection = if any { 0 } else { u64::from(number) };
    let on = (id_of(from), connection);
    let begin = |desk: &mut Desk, write: &Write| {
        desk.raise();
        Some(Foreign { maker, token: write.token as u8, pid: write.pid as u8 })
    };
    let (is_attach, known) = match message {
        Msg::Announce => {
            let write = named(Foreign { maker, token: TOKEN as u8, pid: from as u8 });
            (false, heard.announce(on, TOKEN, || begin(desk, &write)).is_ok())
        }
        Msg::Attach { joined, serves, writes, orphans } => {
            let write = named(Foreign { maker, token: TOKEN as u8, pid: from as u8 });
            let writes: Vec<Write> = writes.then_some(write).into_iter().collect();
            let orphans: Vec<Write> = orphans.iter().map(|orphan| named(Foreign { token: 0, ..*orphan })).collect();
            let (writes, orphans) = (&writes[..], &orphans[..]);
            let attach = Attach { from: id_of(from), joined, serves, complete: false, writes, orphans };
            let taken = heard.attach(&attach, connection, |write| begin(desk, write));
            taken.ended.iter().for_each(|write| desk.lower(write.maker, write.token));
            lost.extend(taken.orphans);
            lost.sort_unstable();
            (true, taken.whole)
        }
        Msg::Over => {
            if let Some(write) = heard.end(on, TOKEN) {
                desk.lower(write.maker, write.token);
            }
            return;
        }
    };
    answer(world, (from, to), number, (is_attach, known));
}
