//! How far one replica has replayed, and reads that wait until it has gone a little further.
//!
//! Everybody who waits for one replica shares one question: a task of its own asks the replica for its position as long as somebody
//! waits, and wakes those whose position has come. Invariant: what it says is a hint; the replica proves itself on the connection
//! that answers. Bounds: waiters; each waits for as long as its database allows. Non-goal: judging who should wait
//! (`weir_core::fresh::Pace`).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, timeout};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Statement};
use weir_core::fresh::{Pace, replica_answer_ok};
use weir_core::id::Lsn;

use crate::control::{OpenError, Target};

/// Reads that may wait for one replica at the same time; more go to the primary.
const WAITERS_MAX: usize = 1_024;
/// Pause between two questions while somebody waits.
const ASK_GAP: Duration = Duration::from_millis(1);
/// Longest wait for an answer, and pause after a failure.
const PATIENCE: Duration = Duration::from_secs(1);
const POSITION: &str = "SELECT pg_catalog.pg_last_wal_replay_lsn()";

/// What is known of one replica's replay.
pub struct Progress {
    replay: AtomicU64,
    /// Microseconds since `start`.
    told_us: AtomicU64,
    start: Instant,
    pace: Mutex<Pace>,
    waiters: Mutex<Vec<Waiter>>,
    somebody_waits: Notify,
}

struct Waiter {
    need: Lsn,
    arrived: oneshot::Sender<()>,
}

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waited {
    CaughtUp,
    InVain,
    /// Too many others wait.
    Full,
}

impl Waited {
    pub const ALL: [Waited; 3] = [Waited::CaughtUp, Waited::InVain, Waited::Full];

    /// Metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Waited::CaughtUp => "caught_up",
            Waited::InVain => "in_vain",
            Waited::Full => "full",
        }
    }
}

impl Progress {
    pub fn new() -> Arc<Self> {
        Arc::new(Progress {
            replay: AtomicU64::new(0),
            told_us: AtomicU64::new(0),
            start: Instant::now(),
            pace: Mutex::default(),
            waiters: Mutex::default(),
            somebody_waits: Notify::new(),
        })
    }

    /// It has just said how far it is.
    pub fn note(&self, replay: Lsn) {
        self.replay.store(replay.0, Relaxed);
        self.told_us.store(self.now_us(), Relaxed);
    }

    /// The position it has last told, and how long ago, in microseconds.
    pub fn last(&self) -> (Lsn, u64) {
        let told_us = self.told_us.load(Relaxed);
        (Lsn(self.replay.load(Relaxed)), self.now_us().saturating_sub(told_us))
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    /// How long it will take to have what was the primary's `age` ago; `None`: not measured yet.
    pub fn expected_us(&self, age: Duration) -> Option<u64> {
        self.pace.lock().expected_us(age.as_micros() as u64)
    }

    /// Should a read wait that needs what was the primary's `age` ago?
    pub fn is_worth_a_wait(&self, age: Duration, wait_max: Duration) -> bool {
        let now_us = self.now_us();
        self.pace.lock().is_worth_a_wait(age.as_micros() as u64, wait_max.as_micros() as u64, now_us)
    }

    /// Waits until it has replayed `need`, which was the primary's `age` ago, but no longer than `wait_max`. Dropping the future
    /// ends the wait.
    pub async fn reach(&self, need: Lsn, age: Duration, wait_max: Duration) -> Waited {
        let began = Instant::now();
        let (arrived, arrival) = oneshot::channel();
        {
            let mut waiters = self.waiters.lock();
            waiters.retain(|waiter| !waiter.arrived.is_closed());
            if waiters.len() >= WAITERS_MAX {
                return Waited::Full;
            }
            waiters.push(Waiter { need, arrived });
        }
        self.somebody_waits.notify_one();
        let came = matches!(timeout(wait_max, arrival).await, Ok(Ok(())));
        let took_us = (age + began.elapsed()).as_micros() as u64;
        let mut pace = self.pace.lock();
        if came {
            pace.arrived(took_us);
            Waited::CaughtUp
        } else {
            pace.in_vain(took_us);
            Waited::InVain
        }
    }

    /// Wakes those whose position has come. True: others still wait.
    fn wake(&self, replay: Lsn) -> bool {
        let mut waiters = self.waiters.lock();
        waiters.retain(|waiter| !waiter.arrived.is_closed());
        for waiter in waiters.extract_if(.., |waiter| replica_answer_ok(waiter.need, replay)) {
            // Who has given up meanwhile needs no word.
            let _ = waiter.arrived.send(());
        }
        !waiters.is_empty()
    }
}

/// Asks the replica while somebody waits for it, for ever; dropping the future ends it. It connects when that happens first.
pub async fn follow(progress: Arc<Progress>, replica: Target) {
    let mut open: Option<(Client, Statement)> = None;
    loop {
        // `Notify` keeps a permit that comes while nobody listens, so no waiter is overlooked.
        progress.somebody_waits.notified().await;
        let watched = timeout(PATIENCE, ask_until_nobody_waits(&progress, &replica, &mut open));
        match watched.await {
            Ok(Ok(())) => {}
            // Those who wait give up in time by themselves.
            Ok(Err(error)) => {
                tracing::debug!(%error, "cannot ask a replica how far it is");
                open = None;
                sleep(PATIENCE).await;
            }
            // Somebody waits all the time, or it does not answer: a new connection will tell.
            Err(_) => {
                open = None;
                progress.somebody_waits.notify_one();
            }
        }
    }
}

async fn ask_until_nobody_waits(
    progress: &Progress,
    replica: &Target,
    open: &mut Option<(Client, Statement)>,
) -> Result<(), OpenError> {
    let (client, position) = match open {
        Some(open) => open,
        none => {
            let client = replica.open().await?;
            let position = client.prepare(POSITION).await?;
            none.insert((client, position))
        }
    };
    loop {
        let replay: Option<PgLsn> = client.query_one(&*position, &[]).await?.try_get(0)?;
        let replay = Lsn(replay.map_or(0, Into::into));
        progress.note(replay);
        if !progress.wake(replay) {
            return Ok(());
        }
        sleep(ASK_GAP).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGE: Duration = Duration::from_millis(2);

    #[tokio::test]
    async fn whoever_waits_is_woken_when_the_position_has_come() {
        let progress = Progress::new();
        let waiting = |need: u64| {
            let progress = Arc::clone(&progress);
            tokio::spawn(async move { progress.reach(Lsn(need), AGE, Duration::from_secs(10)).await })
        };
        let (near, far) = (waiting(1_000), waiting(2_000));
        while progress.waiters.lock().len() < 2 {
            tokio::task::yield_now().await;
        }
        assert!(progress.wake(Lsn(999)), "both wait");
        assert!(progress.wake(Lsn(1_500)), "one waits");
        assert_eq!(near.await.expect("no panic"), Waited::CaughtUp);
        assert!(!far.is_finished());
        assert!(!progress.wake(Lsn(2_000)));
        assert_eq!(far.await.expect("no panic"), Waited::CaughtUp);
        assert!(progress.expected_us(AGE).is_some());
    }

    #[tokio::test]
    async fn waiting_and_waiters_are_bounded() {
        let progress = Progress::new();
        assert_eq!(progress.reach(Lsn(1), AGE, Duration::from_millis(1)).await, Waited::InVain);
        assert!(!progress.wake(Lsn(0)), "who has given up waits no more");
        let mut crowd = tokio::task::JoinSet::new();
        for _ in 0..WAITERS_MAX {
            let progress = Arc::clone(&progress);
            crowd.spawn(async move { progress.reach(Lsn(1), AGE, Duration::from_secs(10)).await });
        }
        while progress.waiters.lock().len() < WAITERS_MAX {
            tokio::task::yield_now().await;
        }
        assert_eq!(progress.reach(Lsn(1), AGE, Duration::from_secs(10)).await, Waited::Full);
        assert!(!progress.wake(Lsn(1)));
    }
}
