//! Versioned single-flight: of many equal reads that miss at the same moment, one runs and the others wait for it.
//!
//! Invariant: a follower joins only a flight whose leader looked at the very same words at the same versions, with
//! nothing pending at either look. Then nothing became visible between the leader's look and the follower's, so the
//! leader's answer is not older than the follower's own start. Joining by key alone was refuted by the model: a
//! follower that starts after a write would be handed what was read before it.
//!
//! Pure: it counts and names flights; the caller moves bytes and wakes waiters. Non-goal: flights across proxies.

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use super::key::CacheKey;
use crate::fresh::Observation;

/// Names a flight until it lands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlightId(u64);

/// What a read that missed should do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Join {
    /// Run it, then [`Flights::land`], whatever the outcome.
    Lead(FlightId),
    /// Wait for that flight, or [`Flights::leave`] it.
    Follow(FlightId),
    /// Run it without anybody waiting.
    Alone(Alone),
}

/// Why a read neither leads nor follows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Alone {
    /// A write of what it reads is under way.
    Pending,
    FlightsFull,
    FollowersFull,
}

/// What the followers of a landed flight do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Landing {
    /// Take the leader's reply, which was complete and, if a replica gave it, validated.
    Share,
    /// Run it yourself: the leader failed, was cancelled, or its reply may not be shared.
    RunYourself,
}

/// The reads under way, by key and moment.
#[derive(Debug)]
pub struct Flights {
    by_moment: HashMap<(CacheKey, Observation), FlightId>,
    by_id: HashMap<FlightId, Flight>,
    next: u64,
    open_max: usize,
    followers_max: usize,
}

#[derive(Debug)]
struct Flight {
    moment: (CacheKey, Observation),
    followers: usize,
}

impl Flights {
    pub fn new(open_max: usize, followers_max: usize) -> Self {
        Flights { by_moment: HashMap::new(), by_id: HashMap::new(), next: 0, open_max, followers_max }
    }

    pub fn join(&mut self, key: &CacheKey, seen: &Observation) -> Join {
        if seen.pending() {
            return Join::Alone(Alone::Pending);
        }
        let full = self.by_id.len() >= self.open_max;
        match self.by_moment.entry((key.clone(), seen.clone())) {
            Entry::Occupied(found) => {
                let id = *found.get();
                match self.by_id.get_mut(&id) {
                    Some(flight) if flight.followers < self.followers_max => {
                        flight.followers += 1;
                        Join::Follow(id)
                    }
                    _ => Join::Alone(Alone::FollowersFull),
                }
            }
            Entry::Vacant(_) if full => Join::Alone(Alone::FlightsFull),
            Entry::Vacant(place) => {
                let id = FlightId(self.next);
                self.next += 1;
                let moment = place.key().clone();
                place.insert(id);
                self.by_id.insert(id, Flight { moment, followers: 0 });
                Join::Lead(id)
            }
        }
    }

    /// A follower stops waiting (its client is gone, or it waited long enough).
    pub fn leave(&mut self, id: FlightId) {
        if let Some(flight) = self.by_id.get_mut(&id) {
            flight.followers = flight.followers.saturating_sub(1);
        }
    }

    /// How many wait for it now.
    pub fn followers(&self, id: FlightId) -> usize {
        self.by_id.get(&id).map_or(0, |flight| flight.followers)
    }

    /// The leader is done, well or badly: nobody can join any more. Returns how many followers are to be woken.
    pub fn land(&mut self, id: FlightId) -> usize {
        let Some(flight) = self.by_id.remove(&id) else { return 0 };
        self.by_moment.remove(&flight.moment);
        flight.followers
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::entry::tests::entry;
    use crate::fresh::{WordSet, Words};

    fn key(statement: &str) -> CacheKey {
        entry(statement).key
    }

    #[test]
    fn equal_reads_at_one_moment_share_a_flight() {
        let (words, set) = (Words::new(), WordSet::from_indexes([4]));
        let seen = words.observe(&set);
        let mut flights = Flights::new(8, 8);
        let Join::Lead(id) = flights.join(&key("a"), &seen) else { panic!("first one leads") };
        assert_eq!(flights.join(&key("a"), &words.observe(&set)), Join::Follow(id));
        assert_eq!(flights.join(&key("a"), &seen), Join::Follow(id));
        assert!(matches!(flights.join(&key("b"), &seen), Join::Lead(other) if other != id));
        flights.leave(id);
        assert_eq!(flights.followers(id), 1);
        assert_eq!(flights.land(id), 1);
        assert_eq!((flights.land(id), flights.followers(id)), (0, 0));
        assert!(
            matches!(flights.join(&key("a"), &seen), Join::Lead(other) if other != id),
            "a flight that landed is over"
        );
    }

    #[test]
    fn a_read_that_starts_after_a_write_does_not_join_one_from_before() {
        let (words, set) = (Words::new(), WordSet::from_indexes([4]));
        let mut flights = Flights::new(8, 8);
        let Join::Lead(before) = flights.join(&key("a"), &words.observe(&set)) else { panic!("first one leads") };
        let intent = words.begin_write(&set).expect("room");
        assert_eq!(flights.join(&key("a"), &words.observe(&set)), Join::Alone(Alone::Pending));
        words.end_write(intent, None);
        let Join::Lead(after) = flights.join(&key("a"), &words.observe(&set)) else { panic!("a moment of its own") };
        assert_ne!(before, after);
        // The older flight's landing leaves the newer one in place.
        flights.land(before);
        assert_eq!(flights.join(&key("a"), &words.observe(&set)), Join::Follow(after));
    }

    #[test]
    fn flights_and_followers_are_bounded() {
        let words = Words::new();
        let seen = words.observe(&WordSet::from_indexes([4]));
        let mut flights = Flights::new(1, 1);
        let Join::Lead(id) = flights.join(&key("a"), &seen) else { panic!("first one leads") };
        assert_eq!(flights.join(&key("b"), &seen), Join::Alone(Alone::FlightsFull));
        assert_eq!(flights.join(&key("a"), &seen), Join::Follow(id));
        assert_eq!(flights.join(&key("a"), &seen), Join::Alone(Alone::FollowersFull));
        flights.leave(id);
        assert_eq!(flights.join(&key("a"), &seen), Join::Follow(id));
        assert_eq!(flights.land(id), 1);
        assert!(flights.is_empty() && flights.by_moment.is_empty());
    }
}
