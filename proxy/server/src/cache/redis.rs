//! The second level of the cache: encoded entries in Redis.
//!
//! Invariant: nobody waits long for Redis. While it is down no look-up asks it: one task keeps trying, and only a connection
//! that has answered is used. What comes back is bytes, to be judged by the caller.
//!
//! Bounds: look-ups by number and time; stores by number and bytes waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, RedisError};
use smallvec::SmallVec;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use weir_core::cache::{Encoded, Entry, MissReason};

use super::{CacheCounters, CacheError};

/// A look-up that takes longer is a miss.
const GET_TIMEOUT: Duration = Duration::from_millis(20);
const SET_TIMEOUT: Duration = Duration::from_millis(500);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Failures in a row after which the connection is given up.
const FAILURES_MAX: usize = 3;
const RETRY_MS_MIN: u64 = 100;
const RETRY_MS_MAX: u64 = 2_000;
/// Look-ups under way at Redis; one more is a miss.
const GETS_MAX: usize = 512;
/// Entries and bytes waiting to be stored in Redis; one more is dropped.
const SETS_MAX: usize = 1_024;
const SET_BYTES_MAX: usize = 16 << 20;
/// Entries stored in Redis with one write.
const SETS_PER_WRITE: usize = 64;
/// The way to Redis.
pub(super) struct Redis {
    link: Arc<Link>,
    gets: Semaphore,
    queue: mpsc::Sender<Waiting>,
    keeper: JoinHandle<()>,
}

/// Shared with the task that keeps the connection.
struct Link {
    /// `None` while Redis is down: nobody waits for it.
    connection: ArcSwapOption<MultiplexedConnection>,
    failures: AtomicUsize,
    gave_up: Notify,
    waiting_bytes: AtomicUsize,
    counters: Arc<CacheCounters>,
    store: Stored,
}

/// How entries are stored.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    /// Redis forgets them then.
    pub age_max: Duration,
    /// In bytes.
    pub compress_above: usize,
}

/// An entry on its way to Redis.
pub(super) struct Waiting {
    pub key: String,
    pub entry: Arc<Entry>,
    /// Of its words, when it was true.
    pub stamps: SmallVec<[u64; 6]>,
}

impl Redis {
    pub fn start(url: &str, store: Stored, counters: Arc<CacheCounters>) -> Result<Redis, CacheError> {
        let info = url.into_connection_info().map_err(CacheError::Url)?;
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(info).map_err(CacheError::Url)?;
        let link = Arc::new(Link {
            connection: ArcSwapOption::empty(),
            failures: AtomicUsize::new(0),
            gave_up: Notify::new(),
            waiting_bytes: AtomicUsize::new(0),
            counters,
            store,
        });
        let (queue, waiting) = mpsc::channel(SETS_MAX);
        let keeper = tokio::spawn(keep(client, Arc::clone(&link), waiting));
        Ok(Redis { link, gets: Semaphore::new(GETS_MAX), queue, keeper })
    }

    /// Does it answer?
    pub fn is_up(&self) -> bool {
        self.link.connection.load().is_some()
    }

    /// Waits [`GET_TIMEOUT`] at most.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, MissReason> {
        let connection = self.link.connection.load_full().ok_or(MissReason::StoreDown)?;
        let _permit = self.gets.try_acquire().map_err(|_| MissReason::StoreDown)?;
        let mut asked = MultiplexedConnection::clone(&connection);
        let mut command = redis::cmd("GET");
        command.arg(key);
        match timeout(GET_TIMEOUT, command.query_async::<Option<Vec<u8>>>(&mut asked)).await {
            Ok(Ok(found)) => {
                self.link.failures.store(0, Ordering::Relaxed);
                Ok(found.map(Bytes::from))
            }
            Ok(Err(error)) => {
                self.link.failed(&connection, Some(&error));
                Err(MissReason::StoreDown)
            }
            Err(_) => {
                self.link.failed(&connection, None);
                Err(MissReason::StoreDown)
            }
        }
    }

    /// Stores it soon, or drops it.
    pub fn put(&self, waiting: Waiting) {
        if self.link.connection.load().is_none() {
            return;
        }
        let bytes = waiting.entry.weight();
        let room = self.link.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes <= SET_BYTES_MAX;
        if !room || self.queue.try_send(waiting).is_err() {
            self.link.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.link.counters.redis_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Link {
    /// Counts a failure on `connection`; `None` is a time-out. Enough of them in a row, or a broken connection, and it is
    /// given up. An error that Redis itself answered (out of memory, still loading) costs the one request only.
    fn failed(&self, connection: &Arc<MultiplexedConnection>, error: Option<&RedisError>) {
        self.counters.redis_errors.fetch_add(1, Ordering::Relaxed);
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
        }
    }
}

/// Keeps a connection that answers, and stores what waits. Ends when the cache is dropped.
async fn keep(client: Client, link: Arc<Link>, mut waiting: mpsc::Receiver<Waiting>) {
    let mut retry_ms = RETRY_MS_MIN;
    loop {
        if let Some(connection) = connect(&client).await {
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
            link.counters.redis_errors.fetch_add(1, Ordering::Relaxed);
        }
        // What waited for the dead connection would be stored late; drop it.
        while let Ok(dropped) = waiting.try_recv() {
            link.waiting_bytes.fetch_sub(dropped.entry.weight(), Ordering::Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(retry_ms)).await;
        retry_ms = (retry_ms * 2).min(RETRY_MS_MAX);
    }
}

/// A connection counts as up once it has answered.
async fn connect(client: &Client) -> Option<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(SET_TIMEOUT))
        .set_pipeline_buffer_size(GETS_MAX);
    let mut connection = match client.get_multiplexed_async_connection_with_config(&config).await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(%error, "cache: no connection to Redis");
            return None;
        }
    };
    match redis::cmd("PING").query_async::<redis::Value>(&mut connection).await {
        Ok(_) => Some(connection),
        Err(error) => {
            tracing::debug!(%error, "cache: Redis does not answer PING");
            None
        }
    }
}

/// False when nobody will send anything any more.
async fn store_until_given_up(
    link: &Link,
    connection: &Arc<MultiplexedConnection>,
    waiting: &mut mpsc::Receiver<Waiting>,
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
            let bytes: usize = batch.iter().map(|one: &Waiting| one.entry.weight()).sum();
            link.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return true;
        }
        store(link, connection, &mut batch).await;
    }
}

async fn store(link: &Link, connection: &Arc<MultiplexedConnection>, batch: &mut Vec<Waiting>) {
    let mut pipeline = redis::pipe();
    let Stored { age_max, compress_above } = link.store;
    let age_ms_max = (age_max.as_millis() as u64).max(1);
    for Waiting { key, entry, stamps } in batch.drain(..) {
        link.waiting_bytes.fetch_sub(entry.weight(), Ordering::Relaxed);
        if let Some(Encoded { bytes, spared }) = entry.encode(&stamps, compress_above) {
            if let Some(spared) = spared {
                link.counters.redis_compressed.fetch_add(1, Ordering::Relaxed);
                link.counters.redis_bytes_spared.fetch_add(spared as u64, Ordering::Relaxed);
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
