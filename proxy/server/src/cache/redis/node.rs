//! The way to one Redis server.
//!
//! Invariant: while it is down no look-up asks it: one task keeps trying, and only a connection that has answered is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use weir_core::cache::{Encoded, MissReason};

use super::{CLAIM_TIMEOUT, Common, GET_TIMEOUT, GETS_MAX, LEASE_MS, RedisServers, Room, SET_TIMEOUT, Stored, Waiting};

/// Failures in a row after which the connection is given up.
const FAILURES_MAX: usize = 3;
const RETRY_MS_MIN: u64 = 100;
const RETRY_MS_MAX: u64 = 2_000;
/// Entries waiting to be stored here; one more is dropped.
const SETS_MAX: usize = 1_024;
/// Entries stored with one write.
const SETS_PER_WRITE: usize = 64;
/// Shortest time between two writes: what comes meanwhile shares the next one.
const STORE_GAP: Duration = Duration::from_millis(1);

/// Dropping it ends its task.
pub(super) struct Node {
    link: Arc<Link>,
    gets: Semaphore,
    queue: mpsc::Sender<Queued>,
    keeper: JoinHandle<()>,
}

/// Shared with the task that keeps the connection.
struct Link {
    common: Arc<Common>,
    servers: RedisServers,
    /// `None` while it is down: nobody waits for it.
    connection: ArcSwapOption<MultiplexedConnection>,
    failures: AtomicUsize,
    gave_up: Notify,
}

enum Queued {
    /// The room is given back when it is stored or dropped.
    Store { waiting: Waiting, _room: Room },
    /// A key that is not needed any more.
    Forget(String),
}

impl Node {
    pub fn start(servers: RedisServers, common: Arc<Common>) -> Node {
        let link = Arc::new(Link {
            common,
            servers,
            connection: ArcSwapOption::empty(),
            failures: AtomicUsize::new(0),
            gave_up: Notify::new(),
        });
        let (queue, waiting) = mpsc::channel(SETS_MAX);
        let keeper = tokio::spawn(keep(Arc::clone(&link), waiting));
        Node { link, gets: Semaphore::new(GETS_MAX), queue, keeper }
    }

    /// Does it answer?
    pub fn is_up(&self) -> bool {
        self.link.connection.load().is_some()
    }

    /// Waits [`GET_TIMEOUT`] at most.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, MissReason> {
        let mut command = redis::cmd("GET");
        command.arg(key);
        let found =
            self.ask(GET_TIMEOUT, async |mut asked| command.query_async::<Option<Vec<u8>>>(&mut asked).await).await;
        found.map(|found| found.map(Bytes::from))
    }

    /// Takes the lease if nobody has it, and gets what is stored under `key` after that.
    pub async fn claim(&self, lease: &str, key: &str) -> Result<(bool, Option<Bytes>), MissReason> {
        let mut both = redis::pipe();
        both.cmd("SET").arg(lease).arg(1).arg("NX").arg("PX").arg(LEASE_MS).cmd("GET").arg(key);
        let answer = self
            .ask(CLAIM_TIMEOUT, async |mut asked| both.query_async::<(Value, Option<Vec<u8>>)>(&mut asked).await)
            .await;
        answer.map(|(taken, found)| (taken == Value::Okay, found.map(Bytes::from)))
    }

    /// Holds a lease longer. That it is another's by now does no harm.
    pub async fn renew(&self, lease: &str) {
        let mut command = redis::cmd("SET");
        command.arg(lease).arg(1).arg("XX").arg("PX").arg(LEASE_MS);
        // Failures are counted, and then the lease ends by itself.
        let _ = self.ask(CLAIM_TIMEOUT, async |mut asked| command.query_async::<Value>(&mut asked).await).await;
    }

    /// Removes a lease soon, or leaves it to its end.
    pub fn forget(&self, lease: String) {
        if self.is_up() {
            let _ = self.queue.try_send(Queued::Forget(lease));
        }
    }

    async fn ask<T>(
        &self,
        wait_max: Duration,
        question: impl AsyncFnOnce(MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, MissReason> {
        let connection = self.link.connection.load_full().ok_or(MissReason::StoreDown)?;
        let _permit = self.gets.try_acquire().map_err(|_| MissReason::StoreDown)?;
        let answer = timeout(wait_max, question(MultiplexedConnection::clone(&connection))).await;
        match answer {
            Ok(Ok(answer)) => {
                self.link.failures.store(0, Ordering::Relaxed);
                return Ok(answer);
            }
            Ok(Err(error)) => self.link.failed(&connection, Some(&error)),
            Err(_) => self.link.failed(&connection, None),
        }
        Err(MissReason::StoreDown)
    }

    /// Stores it soon, or drops it. `room`: for it; `None` if there was none.
    pub fn put(&self, waiting: Waiting, room: Option<Room>) {
        let queued = room.is_some_and(|room| self.queue.try_send(Queued::Store { waiting, _room: room }).is_ok());
        if !queued {
            self.link.common.counters.redis_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The connection in use, for questions that are not about a key.
    pub fn connection(&self) -> Option<MultiplexedConnection> {
        self.link.connection.load().as_ref().map(|connection| MultiplexedConnection::clone(connection))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Link {
    /// Counts a failure on `connection`; `None` is a time-out. Enough of them in a row, or a broken connection, and it is
    /// given up. An error that Redis itself answered (out of memory, still loading) costs the one request only, unless it says
    /// that somebody else is to be asked now.
    fn failed(&self, connection: &Arc<MultiplexedConnection>, error: Option<&RedisError>) {
        self.common.counters.redis_errors.fetch_add(1, Ordering::Relaxed);
        if error.is_some_and(is_of_another) {
            self.common.misplaced.notify_one();
            if self.servers.have_successors() {
                self.give_up(connection);
            }
            return;
        }
        let answered = error.is_some_and(|error| !error.is_io_error() && !error.is_unrecoverable_error());
        if answered {
            return;
        }
        let in_a_row = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        let broken = error.is_some_and(|error| !error.is_timeout());
        if broken || in_a_row >= FAILURES_MAX {
            self.give_up(connection);
        }
    }

    /// Only if it is still the one in use: a late failure must not end its successor.
    fn give_up(&self, connection: &Arc<MultiplexedConnection>) {
        let current = self.connection.load();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            self.connection.compare_and_swap(&current, None);
            self.gave_up.notify_one();
            self.common.misplaced.notify_one();
        }
    }
}

/// Has the server said that it is not, or not any more, the one to ask?
fn is_of_another(error: &RedisError) -> bool {
    use ServerErrorKind::{Ask, ClusterDown, MasterDown, Moved, ReadOnly};
    matches!(error.kind(), ErrorKind::Server(Moved | Ask | ClusterDown | MasterDown | ReadOnly))
}

/// Keeps a connection that answers, and stores what waits. Ends when the node is dropped.
async fn keep(link: Arc<Link>, mut waiting: mpsc::Receiver<Queued>) {
    let mut retry_ms = RETRY_MS_MIN;
    loop {
        if let Some(connection) = link.servers.connect().await {
            tracing::info!("cache: Redis answers");
            retry_ms = RETRY_MS_MIN;
            link.failures.store(0, Ordering::Relaxed);
            let connection = Arc::new(connection);
            link.connection.store(Some(Arc::clone(&connection)));
            if !store_until_given_up(&link, &connection, &mut waiting).await {
                return;
            }
            tracing::warn!(retry_ms, "cache: Redis does not answer; serving from memory alone");
        } else {
            link.common.counters.redis_errors.fetch_add(1, Ordering::Relaxed);
        }
        // What waited for the dead connection would be stored late; drop it.
        while waiting.try_recv().is_ok() {}
        tokio::time::sleep(Duration::from_millis(retry_ms)).await;
        retry_ms = (retry_ms * 2).min(RETRY_MS_MAX);
    }
}

/// False when nobody will send anything any more.
async fn store_until_given_up(
    link: &Link,
    connection: &Arc<MultiplexedConnection>,
    waiting: &mut mpsc::Receiver<Queued>,
) -> bool {
    let mut batch = Vec::with_capacity(SETS_PER_WRITE);
    loop {
        // Both are cancel-safe: `recv_many` takes nothing unless it returns, and `Notify` keeps its permit.
        tokio::select! {
            taken = waiting.recv_many(&mut batch, SETS_PER_WRITE) => if taken == 0 {
                return false;
            },
            () = link.gave_up.notified() => {}
        }
        let current = link.connection.load();
        if !current.as_ref().is_some_and(|current| Arc::ptr_eq(current, connection)) {
            return true;
        }
        store(link, connection, &mut batch).await;
        tokio::time::sleep(STORE_GAP).await;
    }
}

async fn store(link: &Link, connection: &Arc<MultiplexedConnection>, batch: &mut Vec<Queued>) {
    let mut pipeline = redis::pipe();
    let Stored { age_max, compress_above } = link.common.store;
    let (age_ms_max, counters) = ((age_max.as_millis() as u64).max(1), &link.common.counters);
    for queued in batch.drain(..) {
        let Waiting { key, entry, stamps } = match queued {
            Queued::Store { waiting, .. } => waiting,
            Queued::Forget(lease) => {
                pipeline.cmd("DEL").arg(lease).ignore();
                continue;
            }
        };
        if let Some(Encoded { bytes, spared }) = entry.encode(&stamps, compress_above) {
            if let Some(spared) = spared {
                counters.redis_compressed.fetch_add(1, Ordering::Relaxed);
                counters.redis_bytes_spared.fetch_add(spared as u64, Ordering::Relaxed);
            }
            pipeline.cmd("SET").arg(key).arg(bytes).arg("PX").arg(age_ms_max).ignore();
        }
    }
    if pipeline.is_empty() {
        return;
    }
    let mut asked = MultiplexedConnection::clone(connection);
    match timeout(SET_TIMEOUT, pipeline.query_async::<()>(&mut asked)).await {
        Ok(Ok(())) => link.failures.store(0, Ordering::Relaxed),
        Ok(Err(error)) => link.failed(connection, Some(&error)),
        Err(_) => link.failed(connection, None),
    }
}
