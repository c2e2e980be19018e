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
use hashbrown::hash_map::Entry;
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, timeout};
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::{Dependencies, Dependency, Intent, UNPLACED, WordSet, Words, WordsFull};
use weir_core::id::Lsn;
use weir_wire::peer::{Ending, Message, Write};

use super::Fleet;
use super::link::{Answer, Deaf, Link};
use crate::clock::Clock;
use crate::roles::Generation;
use crate::unsound::{self, Place, Variant};

/// Longest wait for a peer to say that it has heard.
const HEAR_MAX: Duration = Duration::from_millis(500);
/// Longest time a write waits until everybody has been told or shut out.
const TELL_MAX: Duration = Duration::from_secs(5);
/// Between two looks at whether writing is possible again, besides being woken.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Writes of others that are kept in mind.
const FOREIGN_MAX: usize = 1 << 20;

/// How far this proxy has come at the shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// It is not in the table, or does not know whether it is: it neither serves nor writes.
    Out,
    /// It has left for good.
    Left,
    /// Everybody else who may serve hears of its writes. Whether it hears of all of theirs is not known yet.
    Writes,
    /// It hears of all writes and may answer from its cache and from replicas.
    Serves,
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Out => "out",
            Standing::Left => "left",
            Standing::Writes => "joining",
            Standing::Serves => "serving",
        }
    }
}

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
    told: Mutex<Told>,
    heard: Mutex<Heard>,
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

#[derive(Default)]
struct Told {
    /// By token: words, server process, and whether it may change the schema.
    writes: HashMap<u64, (WordSet, i32, bool)>,
    /// Was there ever one?
    begun: bool,
    peers: Vec<Peer>,
}

/// Somebody who is told.
#[derive(Clone)]
struct Peer {
    id: u64,
    link: Arc<Link>,
    /// The epoch with which it joined, as it was when we attached.
    joined: u64,
    /// It has said that it heard who attached.
    heard: bool,
}

#[derive(Default)]
struct Heard {
    attached: HashMap<u64, Attached>,
    /// By the member that makes them, and token.
    writes: HashMap<(u64, u64), Foreign>,
    /// Who may have written what is still to be heard of, where others push.
    counted: BTreeSet<u64>,
}

/// What somebody says who attaches.
#[derive(Clone, Copy)]
pub(super) struct Attach<'a> {
    pub from: u64,
    pub joined: u64,
    pub serves: bool,
    pub complete: bool,
    pub writes: &'a [Write],
    pub orphans: &'a [Write],
}

/// Somebody who tells.
#[derive(Clone, Copy)]
struct Attached {
    /// The connection on which it does. What comes late on an older one is not heard any more.
    connection: u64,
    /// The epoch of our joining that it knew.
    joined: u64,
    /// It answered from its cache then.
    serves: bool,
    /// All that it had announced by then is heard of, where it pushes.
    until_us: u64,
}

/// Why an announcement is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unheard {
    /// Who announces has not attached on that connection, or not last.
    Unattached,
    NoRoom,
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
        let has_lease = || now_us() < self.served_until_us() || unsound::is(Variant::NoLease);
        self.fleet.is_none() || (self.serves.load(SeqCst) && has_lease())
    }

    fn served_until_us(&self) -> u64 {
        self.leased_until_us().min(self.hears_until_us.load(SeqCst))
    }

    /// A lease from a primary that was replaced is none.
    fn leased_until_us(&self) -> u64 {
        let is_replaced = self.joined_in.load(SeqCst) != self.generation.load(SeqCst);
        if is_replaced { 0 } else { self.lease_until_us.load(SeqCst) }
    }

    fn may_write(&self) -> bool {
        *self.standing.borrow() >= Standing::Writes && now_us() < self.leased_until_us()
    }

    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// How long it may serve without another answer, of the primary or of those who push.
    pub fn lease_left(&self) -> Duration {
        Duration::from_micros(self.served_until_us().saturating_sub(now_us()))
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
            told.writes.insert(token, (words.clone(), pid, schema));
            told.begun = true;
            if self.is_pushed(schema) {
                told.peers.iter().for_each(|peer| self.push(peer, write()));
                false
            } else {
                !told.peers.is_empty()
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
                let peers = self.told.lock().peers.clone();
                let deaf = if pushed { Vec::new() } else { self.tell_each(&peers, write).await };
                if deaf.is_empty() && self.may_write() {
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
    async fn tell_each(&self, peers: &[Peer], write: &Write) -> Vec<u64> {
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
            told.writes.remove(&token);
            for peer in &told.peers {
                peer.link.send(Message::Over { from: self.id, to: peer.id, token, ending });
            }
        }
    }

    // ---- others' writes ----

    /// Another proxy announces a write on `connection`. True: it may change the schema.
    pub(super) fn hear(&self, from: u64, write: &Write, connection: u64) -> Result<bool, Unheard> {
        let mut heard = self.heard.lock();
        let Heard { attached, writes, .. } = &mut *heard;
        attached.get(&from).filter(|attached| attached.connection == connection).ok_or(Unheard::Unattached)?;
        self.begin_foreign(writes, from, write).ok_or(Unheard::NoRoom)
    }

    fn begin_foreign(&self, writes: &mut HashMap<(u64, u64), Foreign>, from: u64, write: &Write) -> Option<bool> {
        let full = writes.len() >= FOREIGN_MAX;
        match writes.entry((from, write.token)) {
            Entry::Occupied(known) => Some(known.get().announcement.schema),
            Entry::Vacant(_) if full => None,
            Entry::Vacant(place) => {
                let announcement = self.begin_for(from, write)?;
                let schema = announcement.schema;
                place.insert(Foreign { announcement, pid: write.pid });
                Some(schema)
            }
        }
    }

    fn begin_for(&self, from: u64, write: &Write) -> Option<Announcement> {
        let set = WordSet::from_indexes(write.words.iter().copied());
        let intent = unsound::begin_write(&self.words, &set).ok()?.named(from, write.token);
        self.schema_doubts.fetch_add(usize::from(write.schema), SeqCst);
        Some(Announcement { intent, token: 0, schema: write.schema })
    }

    /// Another proxy's write is over.
    pub(super) fn hear_end(&self, from: u64, token: u64, ending: Ending, (connection, clock): (u64, &Clock)) {
        let write = {
            let mut heard = self.heard.lock();
            let here = heard.attached.get(&from).is_some_and(|attached| attached.connection == connection);
            if here { heard.writes.remove(&(from, token)) } else { None }
        };
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
        let Attach { from, joined, serves, complete, writes, orphans } = *attach;
        let under_way: HashSet<u64> = writes.iter().map(|write| write.token).collect();
        let mut heard = self.heard.lock();
        heard.attached.remove(&from);
        let ended = |(member, token): &(u64, u64), _: &mut Foreign| *member == from && !under_way.contains(token);
        heard.writes.extract_if(ended).for_each(|(_, write)| {
            clock.post(write.announcement);
        });
        for write in writes {
            self.begin_foreign(&mut heard.writes, from, write)?;
        }
        for orphan in orphans {
            clock.unknown_outcome(self.begin_for(from, orphan)?, orphan.pid);
        }
        if self.pushes() && !complete {
            // What was lost on its way here may have overwritten what was read before.
            clock.begin_anew();
        }
        heard.attached.insert(from, Attached { connection, joined, serves, until_us: 0 });
        self.poke();
        Some(())
    }

    /// A member is gone: its writes end when their server processes are. Were there any?
    pub(super) fn orphan(&self, member: u64, clock: &Clock) -> bool {
        let mut heard = self.heard.lock();
        heard.attached.remove(&member);
        let mut any = false;
        for (_, write) in heard.writes.extract_if(|(from, _), _| *from == member) {
            clock.unknown_outcome(write.announcement, write.pid);
            any = true;
        }
        any
    }

    /// The members whose writes are kept in mind.
    pub(super) fn heard_of(&self) -> BTreeSet<u64> {
        self.heard.lock().writes.keys().map(|(from, _)| *from).collect()
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
        // A new joining of its: it has served nothing since the last one ended.
        self.told.lock().peers.retain(|peer| peer.id != id || peer.joined == joined);
        let asked = fleet.token();
        let there = link.ask(Message::Ask { to: id, token: asked }, id, asked);
        if !is_heard(there).await {
            return false;
        }
        let (token, orphans) = (fleet.token(), clock.lost());
        let answer = {
            let mut told = self.told.lock();
            let writes = told.writes.iter().map(|(token, (words, pid, schema))| {
                let words = words.indexes().to_vec();
                Write { token: *token, pid: *pid, schema: *schema, words }
            });
            let writes = writes.collect();
            told.peers.retain(|peer| peer.id != id);
            told.peers.push(Peer { id, link: Arc::clone(&link), joined, heard: false });
            let (serves, complete) = (self.serves.load(SeqCst), !told.begun);
            let from = self.id;
            link.ask(Message::Attach { from, to: id, token, joined, serves, complete, writes, orphans }, id, token)
        };
        let heard = is_heard(answer).await;
        let mut told = self.told.lock();
        let attached = |peer: &&mut Peer| peer.id == id && Arc::ptr_eq(&peer.link, &link);
        if let Some(peer) = told.peers.iter_mut().find(attached) {
            peer.heard = heard;
        }
        drop(told);
        self.standing.send_modify(|_| {});
        heard
    }

    /// Is it told over a connection that works, for that joining of its?
    pub(super) fn tells(&self, id: u64, joined: u64) -> bool {
        let told = self.told.lock();
        told.peers.iter().any(|peer| peer.id == id && peer.joined == joined && peer.heard && !peer.link.is_down())
    }

    /// Nobody else is told any more: they serve nothing. Their absence may be what a write waits for.
    pub(super) fn tell_only(&self, ids: impl Fn(u64) -> bool) {
        let mut told = self.told.lock();
        let before = told.peers.len();
        told.peers.retain(|peer| ids(peer.id));
        if told.peers.len() != before {
            drop(told);
            self.standing.send_modify(|_| {});
        }
    }

    /// Has it attached to this joining of ours, and did it serve?
    pub(super) fn attached(&self, id: u64, joined: u64) -> Option<bool> {
        let attached = self.heard.lock().attached.get(&id).copied();
        attached.filter(|attached| attached.joined == joined).map(|attached| attached.serves)
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
        self.lease_until_us.store(asked_us + lease.as_micros() as u64, SeqCst);
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
            self.told.lock().peers.clear();
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
