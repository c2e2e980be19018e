//! One reader asks, the others wait: equal reads that miss the cache at the same moment cost the server one statement.
//!
//! Invariant: who follows whom is decided by [`weir_core::cache::Flights`], so a follower is never handed what was read before
//! a write that it must see. A leader that fails, is cancelled or dies wakes its followers, who then run for themselves; so does
//! the end of a bounded wait. Replies that cannot be shared (too large) are remembered, so that nobody waits for them again.
//!
//! Keys that others waited for are remembered too: theirs are the reads that are worth agreeing on with other proxies
//! (`crate::cache::FillLease`), which a leader may hold until it lands.
//!
//! Only reads that have missed come here. Non-goals: waiting for other proxies, and reads that may not be cached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::watch;
use weir_core::cache::{CacheKey, FlightId, Flights, Join};
use weir_core::fresh::{Observation, WordSet};

use crate::unsound::{self, Variant};

use crate::cache::FillLease;

/// Flights at the same time, and followers of one; more run for themselves.
const OPEN_MAX: usize = 4_096;
const FOLLOWERS_MAX: usize = 65_536;
/// Longest wait for a leader. As long as one may wait for a server connection: then it is better to queue for one.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Keys of each kind that are remembered.
const REMEMBERED: usize = 1_024;

/// What a leader leaves to its followers. `None`: run for yourself.
type Landed = Option<Bytes>;

/// The reads under way that others may wait for.
pub struct Airspace {
    inner: Mutex<Inner>,
    /// Whose reply could not be shared.
    unshareable: Hashes,
    /// Whose last flight had followers.
    crowded: Hashes,
}

/// Hashes of keys, each in its place. One that is forgotten or mistaken costs a wait, or spares one.
struct Hashes(Box<[AtomicU64]>);

struct Inner {
    flights: Flights,
    landings: HashMap<FlightId, watch::Receiver<Landed>>,
}

/// What a read that has missed does.
pub enum Part {
    /// Run it; then [`Leader::land`], or drop it.
    Lead(Leader),
    Follow(Follower),
    Alone,
}

/// Dropped without having landed, its followers run for themselves.
pub struct Leader {
    airspace: Arc<Airspace>,
    id: FlightId,
    key_hash: u64,
    landing: watch::Sender<Landed>,
    /// Other proxies wait as long as this is held.
    lease: Option<FillLease>,
}

pub struct Follower {
    airspace: Arc<Airspace>,
    id: FlightId,
    landing: watch::Receiver<Landed>,
}

impl Default for Airspace {
    fn default() -> Self {
        let inner = Inner { flights: Flights::new(OPEN_MAX, FOLLOWERS_MAX), landings: HashMap::new() };
        Airspace { inner: Mutex::new(inner), unshareable: Hashes::default(), crowded: Hashes::default() }
    }
}

impl Default for Hashes {
    fn default() -> Self {
        Hashes(std::iter::repeat_with(AtomicU64::default).take(REMEMBERED).collect())
    }
}

impl Hashes {
    fn has(&self, hash: u64) -> bool {
        self.place_of(hash).load(Relaxed) == hash
    }

    fn note(&self, hash: u64) {
        self.place_of(hash).store(hash, Relaxed);
    }

    fn forget(&self, hash: u64) {
        if self.has(hash) {
            self.place_of(hash).store(0, Relaxed);
        }
    }

    fn place_of(&self, hash: u64) -> &AtomicU64 {
        &self.0[hash as usize % REMEMBERED]
    }
}

impl Airspace {
    /// `seen`: the look at the words that the read started with.
    pub fn join(self: &Arc<Self>, key: &CacheKey, seen: &Observation) -> Part {
        let key_hash = key.hash128() as u64;
        if seen.pending() || self.unshareable.has(key_hash) {
            return Part::Alone;
        }
        let by_key = unsound::is(Variant::JoinByKey);
        let nothing = by_key.then(|| Observation::settled(WordSet::default(), [])).flatten();
        let mut inner = self.inner.lock();
        match inner.flights.join(key, nothing.as_ref().unwrap_or(seen)) {
            Join::Alone(_) => Part::Alone,
            Join::Lead(id) => {
                let (landing, followers) = watch::channel(None);
                inner.landings.insert(id, followers);
                Part::Lead(Leader { airspace: Arc::clone(self), id, key_hash, landing, lease: None })
            }
            Join::Follow(id) => match inner.landings.get(&id) {
                Some(landing) => Part::Follow(Follower { airspace: Arc::clone(self), id, landing: landing.clone() }),
                None => Part::Alone,
            },
        }
    }

    fn close(&self, id: FlightId, key_hash: u64) {
        let followers = {
            let mut inner = self.inner.lock();
            // A flight lands once; later there is nothing to learn from it.
            inner.landings.remove(&id).map(|_| inner.flights.land(id))
        };
        match followers {
            Some(0) => self.crowded.forget(key_hash),
            Some(_) => self.crowded.note(key_hash),
            None => {}
        }
    }

    #[cfg(test)]
    fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        inner.flights.is_empty() && inner.landings.is_empty()
    }
}

impl Leader {
    /// Hands the followers a complete reply, which nothing that was written before they came can have changed.
    pub fn land(self, frames: &Bytes) {
        // Nobody joins any more from here on, and whoever has joined sees the reply.
        self.airspace.close(self.id, self.key_hash);
        self.landing.send_replace(Some(frames.clone()));
    }

    /// Its reply is of a kind that cannot be shared, and the next one will be.
    pub fn give_up(self) {
        self.airspace.unshareable.note(self.key_hash);
    }

    /// Does anybody wait for it?
    pub fn has_followers(&self) -> bool {
        self.airspace.inner.lock().flights.followers(self.id) > 0
    }

    /// Did anybody wait for the last read of its key?
    pub fn is_crowded(&self) -> bool {
        self.airspace.crowded.has(self.key_hash)
    }

    /// Until it lands or is dropped.
    pub fn hold(&mut self, lease: FillLease) {
        self.lease = Some(lease);
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        // The end of the sender wakes whoever still waits.
        self.airspace.close(self.id, self.key_hash);
    }
}

impl Follower {
    /// The leader's reply; `None`: run for yourself. Dropping the wait leaves the flight.
    pub async fn reply(self) -> Option<Bytes> {
        self.reply_within(WAIT_MAX).await
    }

    async fn reply_within(mut self, wait_max: Duration) -> Option<Bytes> {
        let landed = tokio::time::timeout(wait_max, self.landing.wait_for(Option::is_some)).await;
        match landed {
            Ok(Ok(reply)) => reply.clone(),
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.airspace.inner.lock().flights.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use weir_core::cache::KeyParts;
    use weir_core::fresh::Words;
    use weir_core::id::ShardId;

    use super::*;

    fn key(statement: &str) -> CacheKey {
        let (shard, database, role) = (ShardId(0), "shop", "app");
        CacheKey::new(&KeyParts { shard, database, role, statement, params: &[], result_formats: &[], settings: &[] })
    }

    fn seen() -> Observation {
        Words::new().observe(&WordSet::from_indexes([3]))
    }

    fn lead(airspace: &Arc<Airspace>) -> Leader {
        let Part::Lead(leader) = airspace.join(&key("a"), &seen()) else { panic!("it is the first") };
        leader
    }

    fn follow(airspace: &Arc<Airspace>) -> Follower {
        let Part::Follow(follower) = airspace.join(&key("a"), &seen()) else { panic!("it is not the first") };
        follower
    }

    #[tokio::test]
    async fn followers_get_the_leaders_reply() {
        let airspace = Arc::new(Airspace::default());
        let leader = lead(&airspace);
        let waiting = tokio::spawn(follow(&airspace).reply());
        let late = follow(&airspace);
        assert!(matches!(airspace.join(&key("b"), &seen()), Part::Lead(_)), "another read has a flight of its own");
        leader.land(&Bytes::from_static(b"rows"));
        assert_eq!(waiting.await.expect("joined").as_deref(), Some(&b"rows"[..]));
        assert_eq!(late.reply().await.as_deref(), Some(&b"rows"[..]), "also who has not looked yet");
        assert!(airspace.is_empty());
        drop(lead(&airspace));
    }

    #[tokio::test]
    async fn who_follows_a_leader_that_dies_runs_for_itself() {
        let airspace = Arc::new(Airspace::default());
        let leader = lead(&airspace);
        let (one, other) = (follow(&airspace), follow(&airspace));
        drop(other);
        drop(leader);
        assert_eq!(one.reply().await, None);
        assert!(airspace.is_empty());
    }

    #[tokio::test]
    async fn waiting_ends() {
        let airspace = Arc::new(Airspace::default());
        let _leader = lead(&airspace);
        assert_eq!(follow(&airspace).reply_within(Duration::from_millis(1)).await, None);
    }

    #[test]
    fn keys_that_were_waited_for_are_remembered_until_nobody_waits() {
        let airspace = Arc::new(Airspace::default());
        let leader = lead(&airspace);
        assert!(!leader.is_crowded() && !leader.has_followers());
        let follower = follow(&airspace);
        assert!(leader.has_followers());
        drop((leader, follower));
        let leader = lead(&airspace);
        assert!(leader.is_crowded() && !leader.has_followers());
        leader.land(&Bytes::from_static(b"rows"));
        assert!(!lead(&airspace).is_crowded());
    }

    #[test]
    fn nobody_waits_twice_for_what_cannot_be_shared() {
        let airspace = Arc::new(Airspace::default());
        lead(&airspace).give_up();
        assert!(matches!(airspace.join(&key("a"), &seen()), Part::Alone));
        assert!(matches!(airspace.join(&key("b"), &seen()), Part::Lead(_)));
    }
}
