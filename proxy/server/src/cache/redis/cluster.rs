//! Who has which keys of a Redis Cluster.
//!
//! Invariant: each key is looked up and stored at one server alone, the master of its slot as the Cluster last told it; a key whose
//! slot nobody has, or whose server says that it is another's, is a miss and makes the map be read again. Redirections are not
//! followed: the next look-up goes to the right place.
//!
//! Non-goals: replicas of the Cluster (they are asked once they are masters), and moving slots.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use redis::aio::MultiplexedConnection;
use redis::{ConnectionAddr, ConnectionInfo, Value};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::node::Node;
use super::servers::{RedisServers, elsewhere};
use super::{Common, SET_TIMEOUT};

/// Of a Redis Cluster, by its specification.
const SLOTS: u16 = 16_384;
/// More servers than these are left out: their keys are misses.
const NODES_MAX: usize = 256;
/// The map is read so often at least, and no more often than that, however much goes wrong.
const LOOK_EVERY: Duration = Duration::from_secs(10);
const LOOK_SOON: Duration = Duration::from_secs(1);
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Dropping it ends its task.
pub(super) struct Cluster {
    map: Arc<ArcSwap<Map>>,
    keeper: JoinHandle<()>,
}

#[derive(Default)]
struct Map {
    /// First and last slot, and whose they are; in order, without overlap.
    ranges: Vec<(u16, u16, Arc<Node>)>,
    nodes: HashMap<(String, u16), Arc<Node>>,
}

/// Slots of one master: first, last, host, port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Range {
    first: u16,
    last: u16,
    host: String,
    port: u16,
}

impl Cluster {
    pub fn start(seeds: Vec<ConnectionInfo>, common: Arc<Common>) -> Cluster {
        let map = Arc::new(ArcSwap::from_pointee(Map::default()));
        let keeper = tokio::spawn(keep(seeds, common, Arc::clone(&map)));
        Cluster { map, keeper }
    }

    /// `None`: nobody is known to have it.
    pub fn node_of(&self, key: &str) -> Option<Arc<Node>> {
        let (map, slot) = (self.map.load(), slot_of(key));
        let after = map.ranges.partition_point(|(first, ..)| *first <= slot);
        let (_, last, node) = map.ranges.get(after.checked_sub(1)?)?;
        (slot <= *last).then(|| Arc::clone(node))
    }

    /// Masters that are known of, and how many of them answer.
    pub fn nodes(&self) -> (usize, usize) {
        let map = self.map.load();
        (map.nodes.len(), map.nodes.values().filter(|node| node.is_up()).count())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Reads the map again and again. Ends when the cluster is dropped.
async fn keep(seeds: Vec<ConnectionInfo>, common: Arc<Common>, map: Arc<ArcSwap<Map>>) {
    let mut turn = 0;
    loop {
        turn += 1;
        if let Some(ranges) = look(&seeds, &map.load_full(), turn).await {
            install(ranges, &seeds[0], &common, &map);
        }
        let now = map.load();
        let whole = !now.nodes.is_empty() && now.nodes.values().all(|node| node.is_up());
        let wait = if whole { LOOK_EVERY } else { LOOK_SOON };
        // Woken or not, it is time.
        let _ = timeout(wait, common.misplaced.notified()).await;
        sleep(LOOK_PAUSE).await;
    }
}

/// Asks one of the masters, another one each time, since one may be cut off and know of nothing new; else a seed.
async fn look(seeds: &[ConnectionInfo], map: &Map, turn: usize) -> Option<Vec<Range>> {
    let nodes: Vec<&Arc<Node>> = map.nodes.values().collect();
    for step in 0..nodes.len() {
        let place = (turn + step) % nodes.len();
        if let Some(connection) = nodes[place].connection()
            && let Some((host, _)) = map.nodes.keys().nth(place)
            && let Some(ranges) = ask(connection, host).await
        {
            return Some(ranges);
        }
    }
    for seed in seeds {
        let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) = seed.addr() else { continue };
        if let Some(connection) = RedisServers::One(seed.clone()).connect().await
            && let Some(ranges) = ask(connection, host).await
        {
            return Some(ranges);
        }
    }
    None
}

/// `host`: who is asked, since it may call itself by no name.
async fn ask(mut connection: MultiplexedConnection, host: &str) -> Option<Vec<Range>> {
    let mut command = redis::cmd("CLUSTER");
    command.arg("SLOTS");
    let answer = timeout(SET_TIMEOUT, command.query_async::<Value>(&mut connection)).await.ok()?;
    let answer = answer.inspect_err(|error| tracing::debug!(%error, "cache: no map of the Redis Cluster")).ok()?;
    ranges(&answer, host)
}

/// The answer to CLUSTER SLOTS: first slot, last slot, then servers as host, port, …, the master first. `None`: it is not one.
fn ranges(answer: &Value, asked: &str) -> Option<Vec<Range>> {
    let Value::Array(rows) = answer else { return None };
    let slot = |value: &Value| match value {
        Value::Int(slot) => u16::try_from(*slot).ok().filter(|slot| *slot < SLOTS),
        _ => None,
    };
    let mut found = Vec::new();
    for row in rows.iter().take(usize::from(SLOTS)) {
        let Value::Array(row) = row else { return None };
        let [first, last, Value::Array(master), ..] = &row[..] else { return None };
        let [host, Value::Int(port), ..] = &master[..] else { return None };
        let host = match host {
            Value::BulkString(name) if !name.is_empty() => String::from_utf8(name.clone()).ok()?,
            Value::BulkString(_) | Value::Nil => asked.to_owned(),
            _ => return None,
        };
        // A master that does not know its own name yet.
        if host == "?" {
            continue;
        }
        found.push(Range { first: slot(first)?, last: slot(last)?, host, port: u16::try_from(*port).ok()? });
    }
    found.sort();
    let disjoint =
        found.iter().all(|one| one.first <= one.last) && found.windows(2).all(|pair| pair[0].last < pair[1].first);
    disjoint.then_some(found)
}

/// Servers that stay keep their connections.
fn install(found: Vec<Range>, login: &ConnectionInfo, common: &Arc<Common>, map: &ArcSwap<Map>) {
    let old = map.load();
    let mut new = Map::default();
    for Range { first, last, host, port } in found {
        let name = (host, port);
        if !new.nodes.contains_key(&name) {
            if new.nodes.len() == NODES_MAX {
                continue;
            }
            let node = old.nodes.get(&name).cloned().unwrap_or_else(|| {
                let server = RedisServers::One(elsewhere(login, &name.0, name.1));
                Arc::new(Node::start(server, Arc::clone(common)))
            });
            new.nodes.insert(name.clone(), node);
        }
        new.ranges.push((first, last, Arc::clone(&new.nodes[&name])));
    }
    map.store(Arc::new(new));
}

/// CRC-16/XMODEM of the key, or of what stands between its first brace and the next closing one, as the Cluster's specification has it.
fn slot_of(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    let crc = hashed.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    });
    crc % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot_of("123456789"), 0x31c3);
        assert_eq!(slot_of(""), 0);
        assert_eq!(slot_of("{user1000}.following"), slot_of("user1000"));
        assert_eq!(slot_of("foo{}{bar}"), slot_of("foo{}{bar}"));
        assert_ne!(slot_of("foo{}{bar}"), slot_of("bar"));
        assert_eq!(slot_of("foo{bar}{zap}"), slot_of("bar"));
    }

    fn row(first: i64, last: i64, host: Option<&str>, port: i64) -> Value {
        let host = host.map_or(Value::Nil, |host| Value::BulkString(host.as_bytes().to_vec()));
        let master =
            Value::Array(vec![host, Value::Int(port), Value::BulkString(b"id".to_vec()), Value::Array(vec![])]);
        Value::Array(vec![Value::Int(first), Value::Int(last), master.clone(), master])
    }

    #[test]
    fn maps_are_read_or_refused() {
        let read = |rows: Vec<Value>| ranges(&Value::Array(rows), "asked");
        let range = |first, last, host: &str, port| Range { first, last, host: host.to_owned(), port };
        assert_eq!(
            read(vec![row(100, 16383, Some("b"), 2), row(0, 99, None, 1)]),
            Some(vec![range(0, 99, "asked", 1), range(100, 16383, "b", 2)])
        );
        assert_eq!(
            read(vec![row(0, 99, Some("?"), 1), row(100, 200, Some(""), 1)]),
            Some(vec![range(100, 200, "asked", 1)])
        );
        assert_eq!(read(vec![]), Some(vec![]));
        assert_eq!(read(vec![row(0, 100, None, 1), row(100, 200, None, 1)]), None, "one slot, two masters");
        assert_eq!(read(vec![row(9, 8, None, 1)]), None);
        assert_eq!(read(vec![row(0, 16384, None, 1)]), None);
        assert_eq!(read(vec![row(-1, 3, None, 1)]), None);
        assert_eq!(read(vec![row(0, 3, None, 70_000)]), None);
        assert_eq!(read(vec![Value::Array(vec![Value::Int(1)])]), None);
        assert_eq!(ranges(&Value::Okay, "asked"), None);
    }
}
