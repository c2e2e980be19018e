//! The LSN clock of one shard: ends the writes that sessions have acknowledged.
//!
//! A write's words stay pending until a position at or past its commit is known. Asking the primary for one per write
//! would cost a fifth of its throughput, so sessions hand their finished intents over, and one task asks for all of them
//! at once, over a connection of its own.
//!
//! Invariant: a position is asked for only after every intent it ends was handed over, hence after its commit was
//! acknowledged. An intent whose outcome is unknown is handed over only once its backend has left the server: never after
//! a time-out. What cannot be ended stays pending, which costs cache and replica use and never an old answer.
//!
//! Start and restart: until the primary has answered, and again when it turns out to be another server, another timeline
//! or a restarted one, every word is without a position: no replica covers it, and what was read before is void. From the moment when
//! another server is the primary, what the last one says of positions counts for nothing ([`crate::roles`]).
//!
//! Bounds: the queue (beyond it a write ends without a position, so that the cache goes on and only replicas wait), lost
//! backends, every query. Non-goals: probing replicas, finding a new primary.

mod counters;
mod identity;
mod primary;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use weir_core::fresh::decoded::Snapshot;
use weir_core::fresh::{MarkedWords, Past, Shown, UNPLACED, WordSet, Words};
use weir_core::id::Lsn;
use weir_wire::peer::Write;

use crate::control::{OpenError, Target};
use crate::fleet::member::{Announcement, Member};
use crate::roles::Generation;
use crate::settings::ServerSettings;
use crate::sole::{Before, Sole};
use crate::unsound::{self, Place, Variant};

pub use counters::ClockCounters;
pub use identity::Identity;
use primary::{ClockError, Primary, closed};

/// Intents waiting for a position; more end without one.
const QUEUE_MAX: usize = 16_384;
/// Lost backends whose outcome is awaited; the words of more stay pending for the life of the process.
const LOST_MAX: usize = 65_536;
/// Shortest time between two positions: under load, what is handed over meanwhile shares the next one.
const POSITION_GAP: Duration = Duration::from_millis(1);
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// How often lost backends are looked for: at first, and at most.
const LOST_POLL_MIN: Duration = Duration::from_millis(20);
const LOST_POLL_MAX: Duration = Duration::from_millis(250);
/// With nothing to do, the server is asked that often whether it is still the same.
const IDLE_PROBE: Duration = Duration::from_secs(1);

/// After a read that may lag, positions are asked for so often that the next one finds a young one, for this long.
const LAG_WATCH: Duration = Duration::from_secs(10);
/// Pause between them: a quarter of the lag, within these bounds.
const LAG_GAP_MIN: Duration = Duration::from_millis(2);
const LAG_GAP_MAX: Duration = Duration::from_millis(250);

/// The clock. Dropping it ends its task and its connection.
pub struct Clock {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    words: Arc<Words>,
    /// Who else is told that writes are over.
    member: Arc<Member>,
    /// Who else may write unheard: looked for on the clock's connection.
    sole: Arc<Sole>,
    settings: ServerSettings,
    queue: Mutex<Queue>,
    handed_over: Notify,
    primary: Target,
    /// The generation of the primary that answers, plus one; 0: none does.
    connected: AtomicU64,
    generation: Generation,
    counters: ClockCounters,
    /// The last write that has a position, and one at or past it; the position is stored first.
    placed: AtomicU64,
    placed_at: AtomicU64,
    past: Mutex<Past>,
    /// Present from when somebody decodes on.
    shown: Mutex<Option<Shown>>,
    watch: Mutex<Watch>,
    /// Times of `past` and `watch` are counted from here.
    start: Instant,
}

/// Somebody reads at a level that may lag.
#[derive(Default)]
struct Watch {
    until_ms: u64,
    gap: Option<Duration>,
}

/// Names a write that was handed over; later ones have higher numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

impl Ticket {
    /// Of a write whose outcome the session does not know: it never has a position.
    pub const LOST: Ticket = Ticket(u64::MAX);
}

#[derive(Default)]
struct Queue {
    /// The last ticket.
    handed_over: u64,
    /// Acknowledged, waiting for a position.
    over: Vec<Announcement>,
    /// Outcome unknown.
    lost: Vec<Lost>,
    /// Words with writes that ended without a position.
    unplaced: MarkedWords,
}

/// A write whose backend was lost.
struct Lost {
    write: Announcement,
    pid: i32,
    seen: Seen,
}

/// What is known of the process that has a lost backend's pid.
#[derive(PartialEq, Eq)]
enum Seen {
    NotYet,
    /// It started then, if the server tells us. When that changes, it is another process and the lost one is gone.
    Since(Option<String>),
}

impl Clock {
    /// Must run inside a tokio runtime. Returns at once; until the primary has answered, no replica covers any word.
    pub fn start(primary: Target, words: Arc<Words>, member: Arc<Member>, sole: Arc<Sole>) -> Clock {
        words.raise_floor(UNPLACED);
        let shared = Arc::new(Shared {
            words,
            member,
            settings: ServerSettings::new(sole.scope()),
            sole,
            queue: Mutex::new(Queue::default()),
            handed_over: Notify::new(),
            generation: primary.tenure().generation(),
            primary,
            connected: AtomicU64::new(0),
            counters: ClockCounters::default(),
            placed: AtomicU64::new(0),
            placed_at: AtomicU64::new(0),
            past: Mutex::default(),
            shown: Mutex::default(),
            watch: Mutex::default(),
            start: Instant::now(),
        });
        let task = tokio::spawn(run(Arc::clone(&shared)));
        Clock { shared, task }
    }

    /// Asks no more: for a shard that is gone.
    pub fn stop(&self) {
        self.task.abort();
    }

    /// Takes over a write that the server has acknowledged.
    pub fn post(&self, write: Announcement) -> Ticket {
        let mut queue = self.shared.queue.lock();
        queue.handed_over += 1;
        let ticket = Ticket(queue.handed_over);
        if queue.over.len() >= QUEUE_MAX {
            // Under the lock, so that this word cannot be given an older position at the same time.
            queue.unplaced.extend(write.intent.words().indexes().iter().copied());
            self.shared.member.over([write], Some(UNPLACED));
            self.shared.counters.unplaced.fetch_add(1, Ordering::Relaxed);
            return ticket;
        }
        queue.over.push(write);
        drop(queue);
        self.shared.handed_over.notify_one();
        ticket
    }

    /// A position at or past the commit of that write, once there is one.
    pub fn position_of(&self, ticket: Ticket) -> Option<Lsn> {
        let placed = self.shared.placed.load(Ordering::Acquire) >= ticket.0;
        placed.then(|| Lsn(self.shared.placed_at.load(Ordering::Relaxed)))
    }

    /// A position of the primary that covers all that was acknowledged `ago` or longer ago. `None` at first: asking for it
    /// makes the clock ask often enough that the next reads find one.
    pub fn position_since(&self, ago: Duration) -> Option<Lsn> {
        let now_ms = self.shared.now_ms();
        let mut watch = self.shared.watch.lock();
        let gap = (ago / 4).clamp(LAG_GAP_MIN, LAG_GAP_MAX);
        let running = watch.until_ms > now_ms && watch.gap.is_some_and(|known| known <= gap);
        watch.until_ms = now_ms + LAG_WATCH.as_millis() as u64;
        if !running {
            watch.gap = Some(watch.gap.map_or(gap, |known| known.min(gap)));
            self.shared.handed_over.notify_one();
        }
        drop(watch);
        self.shared.past.lock().since(now_ms.saturating_sub(ago.as_millis() as u64))
    }

    /// From now on [`Clock::has_shown`] can tell.
    pub fn keep_shown(&self) {
        self.shared.shown.lock().get_or_insert_default();
    }

    /// Is nothing that is valid now older than this transaction of the primary, which moved `words`? See [`Shown::covers`].
    pub fn has_shown(&self, xid: u32, words: &WordSet) -> bool {
        // What the last primary's readings show says nothing of the transactions of this one.
        self.connected() && self.shared.shown.lock().as_ref().is_some_and(|shown| shown.covers(xid, words))
    }

    /// How long ago the primary is known to have been at `position`; not at all, if that is not remembered.
    pub fn age_of(&self, position: Lsn) -> Duration {
        let reached_ms = self.shared.past.lock().reached(position);
        Duration::from_millis(reached_ms.map_or(0, |reached_ms| self.shared.now_ms().saturating_sub(reached_ms)))
    }

    /// Takes over a write whose backend was lost while it may have been committing.
    pub fn unknown_outcome(&self, write: Announcement, pid: i32) {
        self.shared.counters.lost.fetch_add(1, Ordering::Relaxed);
        let mut queue = self.shared.queue.lock();
        let same = |lost: &&mut Lost| lost.pid == pid && lost.write.covers(&write);
        if let Some(known) = queue.lost.iter_mut().find(same) {
            // Proxies tell each other of these whenever they meet, and what was told must not come back as one more. If another
            // process has that number by now it is waited for as well.
            known.seen = Seen::NotYet;
            self.shared.member.over([write], None);
            return;
        }
        if queue.lost.len() >= LOST_MAX {
            self.shared.counters.stuck.fetch_add(1, Ordering::Relaxed);
            tracing::error!(pid, "clock: too many lost backends; some words stay pending");
            return;
        }
        queue.lost.push(Lost { write, pid, seen: Seen::NotYet });
        drop(queue);
        self.shared.handed_over.notify_one();
    }

    /// The writes whose outcome is not known, for other proxies to keep in mind too.
    pub fn lost(&self) -> Vec<Write> {
        let queue = self.shared.queue.lock();
        let write = |lost: &Lost| Write {
            token: 0,
            pid: lost.pid,
            schema: lost.write.schema,
            words: lost.write.intent.words().indexes().to_vec(),
        };
        queue.lost.iter().map(write).collect()
    }

    /// Whatever was read before is void, and no replica covers anything until the primary has been asked again.
    pub fn begin_anew(&self) {
        self.shared.begin_anew();
    }

    pub fn sole(&self) -> &Sole {
        &self.shared.sole
    }

    /// What new connections begin with, as far as it is set on the primary.
    pub fn settings(&self) -> &ServerSettings {
        &self.shared.settings
    }

    /// Does the primary answer? While it does not, a promotion may go unnoticed.
    pub fn connected(&self) -> bool {
        self.shared.connected.load(Ordering::SeqCst) == self.shared.generation.load(Ordering::SeqCst) + 1
    }

    /// Writes waiting for a position, and writes of unknown outcome.
    pub fn waiting(&self) -> (usize, usize) {
        let queue = self.shared.queue.lock();
        (queue.over.len(), queue.lost.len())
    }

    pub fn counters(&self) -> &ClockCounters {
        &self.shared.counters
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Connects again and again; ends when the clock is dropped.
async fn run(shared: Arc<Shared>) {
    let mut known: Option<Identity> = None;
    let mut retry = RETRY_MIN;
    loop {
        match Primary::connect(&shared.primary, &shared.sole).await {
            Ok((primary, mut heard)) => {
                let mut tenure = primary.tenure.clone();
                // Cancel-safe: what was taken from the queue goes back to it. A primary that is gone is not served for until it is asked
                // next: it may be back by then, without the commits that its crash has lost.
                let served = tokio::select! {
                    served = serve(&primary, &shared, &mut known) => served,
                    lost = look_around(&primary, &shared) => Err(lost),
                    () = tenure.over() => Err(ClockError::Replaced),
                    () = closed(&mut heard) => Err(ClockError::Closed),
                };
                if shared.connected.swap(0, Ordering::SeqCst) != 0 {
                    retry = RETRY_MIN;
                }
                shared.sole.lost();
                if let Err(error) = served {
                    shared.counters.errors.fetch_add(1, Ordering::Relaxed);
                    shared.primary.doubt();
                    tracing::warn!(%error, "clock: lost the primary");
                }
            }
            Err(error) => {
                shared.counters.errors.fetch_add(1, Ordering::Relaxed);
                // Who starts waits for the first word on who is the primary, and then for this.
                if !matches!(&error, ClockError::Unreached(OpenError::Vacant(vacant)) if vacant.is_unasked()) {
                    shared.sole.lost();
                }
                tracing::debug!(%error, "clock: no connection to the primary");
            }
        }
        shared.primary.pause(retry.mul_f64(rand::random_range(0.5..1.0))).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
}

impl Shared {
    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn begin_anew(&self) {
        if !unsound::is(Variant::NoFloor) {
            self.words.raise_floor(UNPLACED);
        }
        self.queue.lock().unplaced = MarkedWords::all();
        self.handed_over.notify_one();
    }

    /// Asks for a position, and keeps it with the time.
    async fn ask(&self, primary: &Primary) -> Result<(Lsn, Snapshot), ClockError> {
        let asked_ms = self.now_ms();
        let (position, snapshot) = primary.position().await?;
        // A write on the next primary may be among those that this position is for.
        if primary.tenure.is_over() {
            return Err(ClockError::Replaced);
        }
        if primary.standard_pages {
            self.past.lock().note(asked_ms, position);
        }
        Ok((position, snapshot))
    }

    /// How long to wait for writes before asking for a position anyhow.
    fn idle(&self) -> Duration {
        let now_ms = self.now_ms();
        let mut watch = self.watch.lock();
        if watch.until_ms <= now_ms {
            watch.gap = None;
        }
        watch.gap.unwrap_or(IDLE_PROBE)
    }
}

/// Until the connection fails.
async fn serve(primary: &Primary, shared: &Shared, known: &mut Option<Identity>) -> Result<(), ClockError> {
    let (first, _) = primary.position().await?;
    if primary.tenure.is_over() {
        return Err(ClockError::Replaced);
    }
    if known.as_ref() != Some(&primary.identity) {
        tracing::info!(identity = ?primary.identity, position = %first, "clock: a new floor");
        shared.past.lock().clear();
        if let Some(shown) = shared.shown.lock().as_mut() {
            shown.clear();
        }
        if known.is_none() || !unsound::is(Variant::NoFloor) {
            shared.words.raise_floor(first);
        }
        shared.counters.floors.fetch_add(1, Ordering::Relaxed);
        // Words whose writes ended without a position get theirs with the next one asked for.
        shared.queue.lock().unplaced = MarkedWords::all();
        *known = Some(primary.identity.clone());
    }
    // What an earlier connection took and gave back waits.
    shared.handed_over.notify_one();
    shared.connected.store(primary.tenure.number() + 1, Ordering::SeqCst);
    let mut lost_poll = LOST_POLL_MIN;
    let mut looked_at = Instant::now();
    loop {
        let lost = !shared.queue.lock().lost.is_empty();
        if !lost {
            lost_poll = LOST_POLL_MIN;
        }
        // `Notify` keeps a permit that comes while nobody waits, so nothing handed over is overlooked.
        let woken = timeout(if lost { lost_poll } else { shared.idle() }, shared.handed_over.notified()).await;
        if lost && looked_at.elapsed() >= lost_poll {
            lost_poll =
                if look_for_lost(primary, shared).await? { LOST_POLL_MIN } else { (lost_poll * 2).min(LOST_POLL_MAX) };
            looked_at = Instant::now();
        }
        if woken.is_ok() || lost {
            let asked_at = Instant::now();
            end_waiting(primary, shared).await?;
            sleep(POSITION_GAP.saturating_sub(asked_at.elapsed())).await;
        } else {
            shared.ask(primary).await?;
        }
    }
}

/// Looks for those who write unheard, and for what is set anew, until the connection fails.
async fn look_around(primary: &Primary, shared: &Shared) -> ClockError {
    loop {
        match timeout(QUERY_TIMEOUT, shared.sole.look(&primary.look, &primary.client)).await {
            Err(slow) => return slow.into(),
            Ok(Err(error)) => return error.into(),
            Ok(Ok(Before::IsVoid)) => shared.begin_anew(),
            Ok(Ok(Before::Counts)) => {}
        }
        match timeout(QUERY_TIMEOUT, shared.settings.look(&primary.client)).await {
            Err(slow) => return slow.into(),
            Ok(Err(error)) => return error.into(),
            Ok(Ok(())) => {}
        }
        sleep(shared.sole.extend()).await;
    }
}

/// Takes all that was handed over, asks for one position, ends them with it. Nothing is asked if nothing waits.
async fn end_waiting(primary: &Primary, shared: &Shared) -> Result<(), ClockError> {
    let (mut taken, last) = {
        let mut queue = shared.queue.lock();
        let last = queue.handed_over;
        let over = std::mem::take(&mut queue.over);
        // Without standard pages words stay unplaced; asking for their sake would never end.
        let unplaced =
            if primary.standard_pages { std::mem::take(&mut queue.unplaced) } else { MarkedWords::default() };
        (Taken { shared, over, unplaced }, last)
    };
    if taken.over.is_empty() && taken.unplaced.is_empty() {
        return Ok(());
    }
    let (position, snapshot) = shared.ask(primary).await?;
    shared.counters.positions.fetch_add(1, Ordering::Relaxed);
    shared.counters.ended.fetch_add(taken.over.len() as u64, Ordering::Relaxed);
    let lsn = if primary.standard_pages { position } else { UNPLACED };
    unsound::linger(Place::Placed).await;
    // What is said of words that are settled is said once they are.
    let kept = shared.shown.lock().is_some();
    let settled = if kept { taken.words() } else { Vec::new() };
    let early = unsound::is(Variant::EarlyLsn).then(|| Lsn(shared.placed_at.load(Ordering::Relaxed)));
    shared.member.over(taken.over.drain(..), Some(early.unwrap_or(lsn)));
    if let Some(shown) = shared.shown.lock().as_mut().filter(|_| kept) {
        shown.note(snapshot, settled);
    }
    shared.placed_at.store(lsn.0, Ordering::Relaxed);
    shared.placed.store(last, Ordering::Release);
    // A word that another write left unplaced since then has to wait for a later position; the lock keeps more such
    // writes from ending while this is decided.
    let queue = shared.queue.lock();
    let placeable = std::mem::take(&mut taken.unplaced);
    shared.words.place(placeable.without(&queue.unplaced), position);
    Ok(())
}

/// What was taken from the queue goes back to it unless it was ended: also when the wait for the position is cancelled.
struct Taken<'a> {
    shared: &'a Shared,
    over: Vec<Announcement>,
    unplaced: MarkedWords,
}

impl Taken<'_> {
    /// The words of all that is over.
    fn words(&self) -> Vec<u16> {
        self.over.iter().flat_map(|write| write.intent.words().indexes()).copied().collect()
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.over.is_empty() && self.unplaced.is_empty() {
            return;
        }
        let mut queue = self.shared.queue.lock();
        // At most one batch more than the queue's bound.
        self.over.append(&mut queue.over);
        std::mem::swap(&mut queue.over, &mut self.over);
        queue.unplaced.merge(std::mem::take(&mut self.unplaced));
    }
}

/// Hands over the writes whose backends have left the server. Was any?
async fn look_for_lost(primary: &Primary, shared: &Shared) -> Result<bool, ClockError> {
    let pids: Vec<i32> = shared.queue.lock().lost.iter().map(|lost| lost.pid).collect();
    let present = primary.present(&pids).await?;
    let mut queue = shared.queue.lock();
    let (mut gone, mut still) = (Vec::new(), Vec::new());
    for (index, mut lost) in std::mem::take(&mut queue.lost).into_iter().enumerate() {
        let asked_for = index < pids.len();
        let found = present.iter().find(|(pid, _)| *pid == lost.pid);
        match (asked_for, found, &lost.seen) {
            (true, None, _) => gone.push(lost.write),
            (true, _, Seen::Since(_)) if unsound::is(Variant::IntentTimeOut) => gone.push(lost.write),
            (true, Some((_, now)), Seen::Since(before)) if now != before => gone.push(lost.write),
            (true, Some((_, now)), Seen::NotYet) => {
                // It may be a newer process under the same pid; waiting for that one too is merely longer.
                lost.seen = Seen::Since(now.clone());
                still.push(lost);
            }
            _ => still.push(lost),
        }
    }
    queue.lost = still;
    let any = !gone.is_empty();
    // Their commits, if any, are visible by now, so the next position covers them.
    queue.over.append(&mut gone);
    Ok(any)
}

#[cfg(test)]
mod tests {
    use weir_core::fresh::WordSet;
    use weir_core::fresh::sign::{Scope, Sign};

    use super::*;
    use crate::config::OtherWeirs;

    fn set(index: u16) -> WordSet {
        WordSet::from_indexes([index])
    }

    fn begun(words: &Words, index: u16) -> Announcement {
        Announcement::alone(words.begin_write(&set(index)).expect("room"))
    }

    /// Nothing listens there, so the clock never gets a position.
    fn unreachable() -> (Arc<Clock>, Arc<Words>) {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(1).user("nobody");
        let words = Arc::new(Words::new());
        let config = Target::new(config, crate::back::tls::ServerTls::default());
        let member = Member::new(None, Arc::clone(&words), Generation::default());
        let sign = Sign { scope: Scope::Database, fleet: None, process: 1 };
        let sole = Sole::new(sign, OtherWeirs::Check);
        (Arc::new(Clock::start(config, Arc::clone(&words), member, sole)), words)
    }

    #[tokio::test]
    async fn without_the_primary_nothing_ends_and_no_replica_covers_anything() {
        let (clock, words) = unreachable();
        clock.post(begun(&words, 3));
        clock.unknown_outcome(begun(&words, 4), 77);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(clock.waiting(), (1, 1));
        assert!(!clock.connected());
        for (index, pending) in [(3, true), (4, true), (6, false)] {
            let seen = words.observe(&set(index));
            assert_eq!((seen.pending(), seen.lsn()), (pending, UNPLACED), "word {index}");
        }
    }

    #[tokio::test]
    async fn beyond_the_queue_writes_end_without_a_position() {
        let (clock, words) = unreachable();
        for _ in 0..QUEUE_MAX {
            clock.post(begun(&words, 3));
        }
        clock.post(begun(&words, 4));
        assert_eq!(clock.waiting(), (QUEUE_MAX, 0));
        assert_eq!(clock.counters().unplaced.load(Ordering::Relaxed), 1);
        assert!(words.observe(&set(3)).pending());
        let seen = words.observe(&set(4));
        assert_eq!((seen.pending(), seen.lsn()), (false, UNPLACED));
    }

    #[tokio::test]
    async fn what_is_told_again_is_kept_once() {
        let (clock, words) = unreachable();
        for (index, pid) in [(4, 77), (4, 77), (5, 77), (4, 78), (4, 77)] {
            clock.unknown_outcome(begun(&words, index), pid);
        }
        assert_eq!(clock.waiting(), (0, 3));
        assert_eq!(clock.lost().len(), 3);
        assert!([4, 5].iter().all(|index| words.observe(&set(*index)).pending()));
    }

    #[tokio::test]
    async fn what_was_taken_but_not_ended_goes_back() {
        let (clock, words) = unreachable();
        let shared = &clock.shared;
        drop(Taken { shared, over: vec![begun(&words, 3)], unplaced: [9].into_iter().collect() });
        assert_eq!(clock.waiting(), (1, 0));
        assert!(shared.queue.lock().unplaced.without(&MarkedWords::default()).eq([9]));
    }
}
