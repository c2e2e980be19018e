//! The second level of the cache: encoded entries in Redis.
//!
//! Invariant: nobody waits long for Redis, and what comes back is bytes, to be judged by the caller. Each server has a task that
//! keeps the way to it ([`node`]); which server has a key is known from the configuration or learnt from the Cluster
//! ([`cluster`]). A server that is away costs misses for its keys alone.
//!
//! Bounds: look-ups by number and time; stores by number and bytes waiting, all servers together.

mod cluster;
mod node;
mod servers;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::sync::Notify;
use weir_core::cache::{Entry, MissReason};

use self::cluster::Cluster;
use self::node::Node;
pub use self::servers::{BadRedis, RedisServers};
use super::CacheCounters;

/// A look-up that takes longer is a miss.
const GET_TIMEOUT: Duration = Duration::from_millis(20);
/// The same where others wait for it too: they had rather wait on than ask the server all at once.
const CLAIM_TIMEOUT: Duration = Duration::from_millis(200);
const SET_TIMEOUT: Duration = Duration::from_millis(500);
/// Look-ups under way at one server; one more is a miss.
const GETS_MAX: usize = 512;
/// Nobody fills what another proxy is filling, for as long as that says so again within this.
pub(super) const LEASE_MS: u64 = 1_000;
/// Bytes of entries waiting to be stored; one more is dropped.
const SET_BYTES_MAX: usize = 16 << 20;

/// The way to Redis.
pub(super) struct Redis {
    servers: Servers,
    common: Arc<Common>,
}

enum Servers {
    One(Arc<Node>),
    Many(Cluster),
}

/// What the tasks of all servers share.
struct Common {
    waiting_bytes: AtomicUsize,
    counters: Arc<CacheCounters>,
    store: Stored,
    /// Some server is gone, or has said that a key is not its own.
    misplaced: Notify,
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

/// Its share of what may wait to be stored.
struct Room {
    common: Arc<Common>,
    bytes: usize,
}

impl Redis {
    /// Must run inside a tokio runtime.
    pub fn start(servers: RedisServers, store: Stored, counters: Arc<CacheCounters>) -> Redis {
        let (waiting_bytes, misplaced) = (AtomicUsize::new(0), Notify::new());
        let common = Arc::new(Common { waiting_bytes, counters, store, misplaced });
        let servers = match servers {
            RedisServers::Cluster(seeds) => Servers::Many(Cluster::start(seeds, Arc::clone(&common))),
            one => Servers::One(Arc::new(Node::start(one, Arc::clone(&common)))),
        };
        Redis { servers, common }
    }

    /// Servers that are known of, and how many of them answer.
    pub fn servers(&self) -> (usize, usize) {
        match &self.servers {
            Servers::One(node) => (1, usize::from(node.is_up())),
            Servers::Many(cluster) => cluster.nodes(),
        }
    }

    /// Waits [`GET_TIMEOUT`] at most.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, MissReason> {
        self.node_of(key).ok_or(MissReason::StoreDown)?.get(key).await
    }

    /// Waits [`CLAIM_TIMEOUT`] at most. Takes the lease `name` beside `key` if nobody has it, and gets what is stored under `key` after that, in one round trip.
    pub async fn claim(&self, key: &str, name: &str) -> Result<(Option<Claimed>, Option<Bytes>), MissReason> {
        let node = self.node_of(key).ok_or(MissReason::StoreDown)?;
        // In braces: a Cluster keeps it where the entry is.
        let lease = format!("{{{key}}}:{name}");
        let (taken, found) = node.claim(&lease, key).await?;
        // Only if it is ours: dropping one gives the lease back.
        Ok((taken.then(|| Claimed { node, lease }), found))
    }

    /// Stores it soon, or drops it.
    pub fn put(&self, waiting: Waiting) {
        if let Some(node) = self.node_of(&waiting.key).filter(|node| node.is_up()) {
            let room = Room::take(&self.common, waiting.entry.weight());
            node.put(waiting, room);
        }
    }

    fn node_of(&self, key: &str) -> Option<Arc<Node>> {
        match &self.servers {
            Servers::One(node) => Some(Arc::clone(node)),
            Servers::Many(cluster) => cluster.node_of(key),
        }
    }
}

/// A lease that is ours. Dropping it gives it back, after what has been stored before.
pub(super) struct Claimed {
    node: Arc<Node>,
    lease: String,
}

impl Claimed {
    /// Holds it longer.
    pub async fn renew(&self) {
        self.node.renew(&self.lease).await;
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.node.forget(std::mem::take(&mut self.lease));
    }
}

impl Room {
    /// `None`: too much is waiting.
    fn take(common: &Arc<Common>, bytes: usize) -> Option<Room> {
        let waiting = common.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let room = Room { common: Arc::clone(common), bytes };
        (waiting <= SET_BYTES_MAX).then_some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.common.waiting_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
