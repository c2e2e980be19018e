//! One proxy at one shard: what it has told the others, what they have told it, and whether it may serve.
//!
//! Invariant: a write is sent to the server only after every other member that may serve has it among the writes under way, so
//! that its words are pending there as well; and they stay so until its end was heard, or its server process is gone.
//! What is under way and who is told change under one lock: a member that attaches learns of each write either then or by its
//! own announcement.

mod push;
mod shown;
mod stamps;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, timeout};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::fleet::told::Peer;
use weir_core::fresh::fleet::{Attach, Heard, Row, Standing, Term, Tie, Told, UnderWay, Unheard};
use weir_core::fresh::{Dependencies, Dependency, Intent, UNPLACED, WordSet, Words, WordsFull};
use weir_core::id::Lsn;
use weir_wire::peer::{Ending, Message, Write};

use super::Fleet;
use super::link::{Answer, Deaf, Link};
use crate::clock::Clock;
use crate::roles::Generation;
use crate::unsound::{self, Place, Variant};

/// Longest wait for a peer to say that it has heard.
const HEAR_MAX: Duration = Duration::from_secs(1);
/// Longest time a write waits until everybody has been told or shut out.
const TELL_MAX: Duration = Duration::from_secs(10);
/// Between two looks at whether writing is possible again, besides being woken.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A write that is under way here, and everywhere it was told.
#[must_use = "the words stay pending until it is ended"]
#[derive(Debug)]
pub struct Announcement {
    pub intent: Intent,
    /// 0: nobody else is told of it.
    token: u64,
    /// It may change the schema.
    pub schema: bool,
}

impl Announcement {
    /// One that only this process knows of.
    pub fn alone(intent: Intent) -> Self {
        Announcement { intent, token: 0, schema: false }
    }

    /// Whatever the other one keeps pending this one does, too, and nobody else waits to hear of the other one's end.
    pub fn covers(&self, other: &Announcement) -> bool {
        other.token == 0 && (self.schema || !other.schema) && self.intent.words().contains_all(other.intent.words())
    }
}

pub struct Member {
    pub id: u64,
    /// `None`: there is one proxy.
    fleet: Option<Arc<Fleet>>,
    words: Arc<Words>,
    /// Microseconds on the clock that goes on while the machine sleeps.
    lease_until_us: AtomicU64,
    /// As long as others are heard, where they push; else for ever.
    hears_until_us: AtomicU64,
    /// Is `standing` that it serves? For reads, which must not lock anything.
    serves: AtomicBool,
    /// Moves too when `told` loses somebody, so that writes that wait look again.
    standing: watch::Sender<Standing>,
    told: Mutex<Told<Arc<Link>>>,
    heard: Mutex<Heard<Foreign>>,
    /// Writes of others that may change the schema: under way, and of those the ones that are over but for a look at the schema.
    schema_doubts: AtomicUsize,
    schema_moved: AtomicUsize,
    /// The others in the table: member, address, and whether it was put out.
    others: Mutex<Vec<(u64, String, bool)>>,
    /// Who did not hear; for the keeper.
    deaf: Mutex<BTreeSet<u64>>,
    poked: Notify,
    /// Name of the primary's life that the lease is from.
    life: AtomicU64,
    /// Of the shard's primary, and the one in which this proxy has joined.
    generation: Generation,
    joined_in: AtomicU64,
}

/// A write of another proxy.
struct Foreign {
    announcement: Announcement,
    pid: i32,
}

impl Member {
    pub fn new(fleet: Option<Arc<Fleet>>, words: Arc<Words>, generation: Generation) -> Arc<Member> {
        Arc::new(Member {
            // As Postgres's bigint, and never 0.
            id: rand::random::<u64>() >> 1 | 1,
            fleet,
            words,
            lease_until_us: AtomicU64::new(0),
            hears_until_us: AtomicU64::new(u64::MAX),
            serves: AtomicBool::new(false),
            standing: watch::Sender::new(Standing::Out),
            told: Mutex::default(),
            heard: Mutex::default(),
            schema_doubts: AtomicUsize::new(0),
            schema_moved: AtomicUsize::new(0),
            others: Mutex::default(),
            deaf: Mutex::default(),
            poked: Notify::new(),
            life: AtomicU64::new(0),
            generation,
            joined_in: AtomicU64::new(0),
        })
    }

    /// Are there other proxies, or may there be?
    pub fn has_peers(&self) -> bool {
        self.fleet.is_some()
    }

    /// May reads be answered from the cache or by replicas? Ask after the words were looked at.
    pub fn may_serve(&self) -> bool {
        let serves = || self.serves.load(SeqCst);
        self.fleet.is_none() || self.term().may_serve(serves(), now_us()) || unsound::is(Variant::NoLease) && serves()
    }

    /// A lease from a primary that was replaced is none.
    fn term(&self) -> Term {
        let is_replaced = self.joined_in.load(SeqCst) != self.generation.load(SeqCst);
        let leased_until_us = if is_replaced { 0 } else { self.lease_until_us.load(SeqCst) };
        Term { leased_until_us, hears_until_us: self.hears_until_us.load(SeqCst) }
    }

    fn may_write(&self) -> bool {
        self.term().may_write(self.standing(), now_us())
    }

    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// How long it may serve without another answer, of the primary or of those who push.
    pub fn lease_left(&self) -> Duration {
        Duration::from_micros(self.term().served_until_us().saturating_sub(now_us()))
    }

    /// Is another proxy writing what may change the schema?
    pub fn doubts_schema(&self) -> bool {
        self.schema_doubts.load(SeqCst) > 0
    }

    // ---- own writes ----

    /// Raises the words of `writes` here; call it before anything is sent that may commit. Errors: 53300 for too many writes at once.
    pub fn announce(self: &Arc<Self>, writes: &Dependencies, pid: i32) -> Result<Announcing, UserError> {
        let words = &WordSet::of(writes);
        let intent = unsound::begin_write(&self.words, words).map_err(too_many)?;
        let Some(fleet) = &self.fleet else { return Ok(Announcing::Done(Announcement::alone(intent))) };
        let token = fleet.token();
        let schema = writes.contains(&Dependency::Anything);
        let announcement = Announcement { intent: intent.named(self.id, token), token, schema };
        let write = || Write { token, pid, schema, words: words.indexes().to_vec() };
        let waits = {
            let mut told = self.told.lock();
            told.begin(token, UnderWay { words: words.clone(), pid, schema });
            if self.is_pushed(schema) {
                told.peers().iter().for_each(|peer| self.push(peer, write()));
                false
            } else {
                !told.peers().is_empty()
            }
        };
        if !waits && self.may_write() {
            return Ok(Announcing::Done(announcement));
        }
        let write = write();
        Ok(Announcing::Untold(Untold { member: Arc::clone(self), announcement: Some(announcement), write }))
    }

    /// Until everybody has heard and this proxy is still one that may write.
    async fn tell(&self, write: &Write) -> Result<(), UserError> {
        unsound::linger(Place::Raised).await;
        if unsound::is(Variant::NoPeers) {
            return Ok(());
        }
        let deadline = Instant::now() + TELL_MAX;
        let mut standing = self.standing.subscribe();
        let pushed = self.is_pushed(write.schema);
        loop {
            if self.may_write() {
                let peers = self.told.lock().peers().to_vec();
                let deaf = if pushed { Vec::new() } else { self.tell_each(&peers, write).await };
                if self.term().may_forward(!deaf.is_empty(), self.standing(), now_us()) {
                    return Ok(());
                }
                if !deaf.is_empty() {
                    self.deaf.lock().extend(deaf);
                    self.poke();
                }
            }
            if Instant::now() >= deadline {
                return Err(unheard());
            }
            let _ = timeout(LOOK_AGAIN, standing.changed()).await;
        }
    }

    /// Who did not hear.
    async fn tell_each(&self, peers: &[Peer<Arc<Link>>], write: &Write) -> Vec<u64> {
        let asked = peers.iter().map(|peer| async move {
            let announce = Message::Announce { from: self.id, to: peer.id, write: write.clone() };
            let answer = peer.link.ask(announce, peer.id, write.token);
            (!is_heard(answer).await).then_some(peer.id)
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// Writes are over, and their words are lowered here. `lsn` as for `Words::end_write`.
    pub fn over(&self, announcements: impl IntoIterator<Item = Announcement>, lsn: Option<Lsn>) {
        let ending = match lsn {
            None => Ending::Nothing,
            Some(UNPLACED) => Ending::Somewhere,
            Some(lsn) => Ending::At { lsn: lsn.0, life: self.life.load(SeqCst) },
        };
        let mut told = None;
        for Announcement { intent, token, schema } in announcements {
            unsound::end_write(&self.words, intent, lsn);
            unsound::reach(Place::Lowered);
            // Of its own this process looks at the schema itself.
            if schema && token == 0 {
                self.schema_moved.fetch_add(1, SeqCst);
                self.poke();
            }
            if token == 0 {
                continue;
            }
            // Under the lock: whoever attaches finds it among those under way, or does not hear of its end either.
            let told = told.get_or_insert_with(|| self.told.lock());
            told.end(token);
            for peer in told.peers() {
                peer.link.send(Message::Over { from: self.id, to: peer.id, token, ending });
            }
        }
    }

    // ---- others' writes ----

    /// Another proxy announces a write on `connection`. True: it may change the schema.
    pub(super) fn hear(&self, from: u64, write: &Write, connection: u64) -> Result<bool, Unheard> {
        let mut heard = self.heard.lock();
        let kept = heard.announce((from, connection), write.token, || self.begin_foreign(from, write))?;
        Ok(kept.announcement.schema)
    }

    fn begin_foreign(&self, from: u64, write: &Write) -> Option<Foreign> {
        Some(Foreign { announcement: self.begin_for(from, write)?, pid: write.pid })
    }

    fn begin_for(&self, from: u64, write: &Write) -> Option<Announcement> {
        let set = WordSet::from_indexes(write.words.iter().copied());
        let intent = unsound::begin_write(&self.words, &set).ok()?.named(from, write.token);
        self.schema_doubts.fetch_add(usize::from(write.schema), SeqCst);
        Some(Announcement { intent, token: 0, schema: write.schema })
    }

    /// Another proxy's write is over.
    pub(super) fn hear_end(&self, from: u64, token: u64, ending: Ending, (connection, clock): (u64, &Clock)) {
        let write = self.heard.lock().end((from, connection), token);
        let Some(Foreign { announcement, .. }) = write else { return };
        match ending {
            Ending::Nothing => self.over([announcement], None),
            // Positions of another life of the primary say nothing in this one.
            Ending::At { lsn, life } if life == self.life.load(SeqCst) => self.over([announcement], Some(Lsn(lsn))),
            Ending::At { .. } | Ending::Somewhere => {
                clock.post(announcement);
            }
        }
    }

    /// Another proxy will announce all its writes from now on, on `connection`, and names those under way: its others have
    /// ended. `None`: not all can be kept in mind.
    pub(super) fn hear_attach(&self, attach: &Attach<'_>, (connection, clock): (u64, &Clock)) -> Option<()> {
        let mut heard = self.heard.lock();
        let taken = heard.attach(attach, connection, |write| self.begin_foreign(attach.from, write));
        for write in taken.ended {
            clock.post(write.announcement);
        }
        for write in taken.orphans {
            clock.unknown_outcome(write.announcement, write.pid);
        }
        if !taken.whole {
            return None;
        }
        if self.pushes() && !attach.complete {
            // What was lost on its way here may have overwritten what was read before.
            clock.begin_anew();
        }
        drop(heard);
        self.poke();
        Some(())
    }

    /// A member is gone: its writes end when their server processes are. Were there any?
    pub(super) fn orphan(&self, member: u64, clock: &Clock) -> bool {
        let mut heard = self.heard.lock();
        let orphans = heard.orphan(member);
        let any = !orphans.is_empty();
        // Under the lock: who attaches finds them there or here.
        for write in orphans {
            clock.unknown_outcome(write.announcement, write.pid);
        }
        any
    }

    /// The members whose writes are kept in mind.
    pub(super) fn heard_of(&self) -> BTreeSet<u64> {
        self.heard.lock().writers()
    }

    /// What may have changed the schema is over: `look` doubts it once more, and then it is doubted on no other ground.
    pub(super) fn settle_schema(&self, look: impl FnOnce()) {
        let moved = self.schema_moved.swap(0, SeqCst);
        if moved > 0 {
            look();
            self.schema_doubts.fetch_sub(moved, SeqCst);
        }
    }

    // ---- the keeper's side ----

    /// Tells somebody of every write from now on. False: it did not hear.
    ///
    /// It is asked first: from the moment it is told, writes wait for it, and one that cannot be reached and has not begun to
    /// serve must not keep them waiting.
    pub(super) async fn attach(&self, id: u64, joined: u64, link: Arc<Link>, clock: &Clock) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        self.told.lock().meet(id, joined);
        let asked = fleet.token();
        let there = link.ask(Message::Ask { to: id, token: asked }, id, asked);
        if !is_heard(there).await {
            return false;
        }
        let (token, orphans) = (fleet.token(), clock.lost());
        let answer = {
            let mut told = self.told.lock();
            let writes = told.writes().iter().map(|(token, UnderWay { words, pid, schema })| {
                let words = words.indexes().to_vec();
                Write { token: *token, pid: *pid, schema: *schema, words }
            });
            let writes = writes.collect();
            told.attach(id, joined, Arc::clone(&link));
            let (serves, complete) = (self.serves.load(SeqCst), !told.has_written());
            let from = self.id;
            link.ask(Message::Attach { from, to: id, token, joined, serves, complete, writes, orphans }, id, token)
        };
        let heard = is_heard(answer).await;
        self.told.lock().attached(id, &link, heard);
        self.standing.send_modify(|_| {});
        heard
    }

    /// What binds this member, which joined with epoch `joined`, to another.
    pub(super) fn tie(&self, row: &Row, joined: u64) -> Tie {
        let told = self.told.lock().tells(row.id, row.joined, |link| !link.is_down());
        Tie { told, attached: self.heard.lock().attached(row.id, joined) }
    }

    /// Nobody else is told any more: they serve nothing. Their absence may be what a write waits for.
    pub(super) fn tell_only(&self, ids: impl Fn(u64) -> bool) {
        if self.told.lock().tell_only(ids) {
            self.standing.send_modify(|_| {});
        }
    }

    pub(super) fn know(&self, others: Vec<(u64, String, bool)>) {
        *self.others.lock() = others;
    }

    pub(super) fn take_deaf(&self) -> BTreeSet<u64> {
        std::mem::take(&mut *self.deaf.lock())
    }

    /// Wakes the keeper.
    pub(super) fn poke(&self) {
        self.poked.notify_one();
    }

    pub(super) async fn poked(&self) {
        self.poked.notified().await;
    }

    /// The primary has answered a question asked at `asked_us`.
    pub(super) fn extend(&self, asked_us: u64, lease: Duration) {
        self.lease_until_us.store(Term::lease_until(asked_us, lease.as_micros() as u64), SeqCst);
    }

    /// Before this proxy joins: on this life of the primary, in this generation.
    pub(super) fn begin_life(&self, life: u64, generation: u64) {
        self.life.store(life, SeqCst);
        self.joined_in.store(generation, SeqCst);
    }

    pub(super) fn stand(&self, standing: Standing) {
        self.serves.store(standing == Standing::Serves, SeqCst);
        if standing < Standing::Writes {
            self.lease_until_us.store(0, SeqCst);
            self.told.lock().tell_only(|_| false);
        }
        self.standing.send_if_modified(|now| std::mem::replace(now, standing) != standing);
    }
}

/// How far an announcement has come.
pub enum Announcing {
    Done(Announcement),
    Untold(Untold),
}

/// A write that is pending here and that others still have to hear of. Dropping it takes everything back.
pub struct Untold {
    member: Arc<Member>,
    announcement: Option<Announcement>,
    write: Write,
}

impl Untold {
    /// Tells the others. Errors: 57P03 if somebody could neither be told nor shut out.
    pub async fn tell(mut self) -> Result<Announcement, UserError> {
        self.member.tell(&self.write).await?;
        self.announcement.take().ok_or_else(unheard)
    }
}

impl Drop for Untold {
    fn drop(&mut self) {
        self.member.over(self.announcement.take(), None);
    }
}

async fn is_heard(answer: Result<oneshot::Receiver<Answer>, Deaf>) -> bool {
    match answer {
        Ok(answer) => matches!(timeout(HEAR_MAX, answer).await, Ok(Ok(Answer::Heard { known: true }))),
        Err(Deaf) => false,
    }
}

/// Microseconds on a clock that neither runs backwards nor stops while the machine sleeps.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

fn too_many(full: WordsFull) -> UserError {
    UserError::new(Blame::Proxy, sqlstate::TOO_MANY_CONNECTIONS, "too many writes of one table are under way")
        .detail(format!("{full}."))
        .hint("Retry later.")
}

fn unheard() -> UserError {
    UserError::new(Blame::Proxy, sqlstate::CANNOT_CONNECT_NOW, "the other proxies cannot be told of this write")
        .detail(format!(
            "Within {TELL_MAX:?} they neither heard of it nor could be shut out; nothing was sent to the server."
        ))
        .hint("Retry; SHOW PEERS says who is missing, and whether this proxy can reach the shard's primary.")
}
