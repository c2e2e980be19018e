//! The result cache: memory first (L1), Redis behind it (L2).
//!
//! Invariant: what comes out was judged by [`weir_core::cache::judge`] against a look the caller took after its own
//! request arrived, wherever the bytes were stored. Redis is never believed: its bytes are decoded with a checksum, their
//! full key is compared, and the stamps of their words must be the stamps now (`weir_core::fresh::words`). So Redis may
//! die, stall, be emptied or be fed nonsense, and the worst that happens is a miss.
//!
//! Bounds: L1 by bytes; L2 as in [`redis`].
//!
//! Admission to L1 is `quick_cache`'s: a modified Clock-PRO, close to S3-FIFO, weighed by bytes. What is new goes into a small queue
//! (3 % of the bytes, once the cache is full) and leaves it first in, first out, unless it was asked for again meanwhile; then it
//! moves on to the main ring, where what is asked for gets another round. Keys that have left are remembered for a while, half as
//! many as there is room for entries, and go straight into the ring when they come back. So a scan of what is asked for once passes
//! through the small queue, and what is asked for again and again stays; a test compares it with LRU.
//!
//! Non-goals: deciding what may be cached (the planner's), and single-flight (`weir_core::cache::Flights`).

mod lease;
mod redis;
pub mod stale;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use quick_cache::Weighter;
use weir_core::cache::{
    CacheKey, Entry, Heat, MissReason, NoFillReason, Now, Overtaken, Reply, judge, judge_overtaken, may_fill,
};
use weir_core::fresh::{Observation, Words};
use weir_core::id::{Epoch, ShardId};

pub use self::lease::{FillLease, Filled};
pub use self::redis::{BadRedis, RedisServers};
use self::redis::{Redis, Stored, Waiting};
use self::stale::{Grace, Lenient};
use crate::config::RedisConfig;
use crate::unsound::{self, Variant};

/// How far the clock of another proxy may be ahead. What it has stored just now is of use, and too old by as much later.
const CLOCK_AHEAD_MS_MAX: u64 = 1_000;
/// What an encoded entry may have besides its reply: key, words, frame.
const ENTRY_OVERHEAD_MAX: usize = 1 << 20;

/// Sizes in bytes.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    pub l1_bytes_max: usize,
    /// Replies longer than this are not stored.
    pub entry_bytes_max: usize,
    /// In Redis, longer replies are compressed.
    pub compress_above: usize,
    /// Entries older than this are not served, whatever their words say.
    pub age_max: Duration,
    /// `None`: memory alone.
    pub redis: Option<RedisConfig>,
    /// Prefix of all Redis keys: the same for processes that tell each other of their writes, and for no others.
    pub namespace: String,
}

/// Why there can be no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The text of the error never holds the URL, which may hold a password.
    #[error(transparent)]
    Redis(BadRedis),
}

/// What a look-up or a fill is about, besides its key. Take `seen` before anything else.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    pub words: &'a Words,
    pub seen: &'a Observation,
    pub shard: ShardId,
    pub epoch: Epoch,
    /// All its tables let it be answered by what is overtaken. Was taken before `seen`.
    pub lenient: Option<&'a Lenient>,
}

/// An answer that is overtaken and may be served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Overdue {
    pub reply: Reply,
    /// It is the caller who is to refresh it.
    pub refresh: bool,
}

/// An entry in memory.
#[derive(Clone, Debug)]
struct Local {
    entry: Arc<Entry>,
    /// Present if it may be served although it is overtaken.
    grace: Option<Arc<Grace>>,
}

/// The answer to a look-up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Lookup {
    Hit(Reply),
    Miss(MissReason),
}

/// Counts since the start. A look-up that goes on to Redis counts in both levels.
#[derive(Debug, Default)]
pub struct CacheCounters {
    pub hits_l1: AtomicU64,
    pub hits_l2: AtomicU64,
    /// In the order of [`MissReason::ALL`].
    pub misses_l1: [AtomicU64; MissReason::ALL.len()],
    pub misses_l2: [AtomicU64; MissReason::ALL.len()],
    pub stored: AtomicU64,
    /// Replies that were not stored, for any [`NoFillReason`].
    pub not_stored: AtomicU64,
    /// See [`Cache::leases`].
    pub leases: AtomicU64,
    pub lease_waits: AtomicU64,
    pub lease_timeouts: AtomicU64,
    pub redis_errors: AtomicU64,
    /// Entries not sent to Redis because too many were waiting.
    pub redis_dropped: AtomicU64,
    /// Entries sent to Redis compressed, and the bytes that has spared.
    pub redis_compressed: AtomicU64,
    pub redis_bytes_spared: AtomicU64,
}

impl CacheCounters {
    fn miss(counts: &[AtomicU64], reason: MissReason) {
        if let Some(index) = MissReason::ALL.iter().position(|one| *one == reason) {
            counts[index].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Both levels. Dropping it ends its background task.
pub struct Cache {
    settings: CacheSettings,
    l1: quick_cache::sync::Cache<CacheKey, Local, ByBytes, foldhash::fast::RandomState>,
    l2: Option<Redis>,
    counters: Arc<CacheCounters>,
    /// What is written more often than read.
    heat: Heat,
    /// Ages are counted from here: what a clock on the wall said then, since other processes read what this one stores.
    start: Instant,
    started_at_ms: u64,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<CacheKey, Local> for ByBytes {
    fn weight(&self, _: &CacheKey, local: &Local) -> u64 {
        (local.entry.weight() + local.grace.as_ref().map_or(0, |_| size_of::<Grace>())) as u64
    }
}

impl Cache {
    /// With Redis this must run inside a tokio runtime; it returns at once and connects in the background.
    pub fn new(settings: CacheSettings) -> Result<Cache, CacheError> {
        let counters = Arc::new(CacheCounters::default());
        let stored = Stored { age_max: settings.age_max, compress_above: settings.compress_above };
        let servers = settings.redis.as_ref().map(RedisServers::new).transpose().map_err(CacheError::Redis)?;
        let l2 = servers.map(|servers| Redis::start(servers, stored, Arc::clone(&counters)));
        // An estimate for the first allocation only.
        let entries = (settings.l1_bytes_max / 1024).clamp(64, 1 << 20);
        let l1 = quick_cache::sync::Cache::with(
            entries,
            settings.l1_bytes_max as u64,
            ByBytes,
            foldhash::fast::RandomState::default(),
            quick_cache::sync::DefaultLifecycle::default(),
        );
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let started_at_ms = since_1970.as_millis() as u64;
        Ok(Cache { settings, l1, l2, counters, heat: Heat::default(), start: Instant::now(), started_at_ms })
    }

    /// Memory first; Redis only if memory has nothing under this key, since what memory has is never older.
    pub async fn get(&self, key: &CacheKey, moment: &Moment<'_>) -> Lookup {
        match self.get_local(key, moment) {
            Lookup::Miss(MissReason::Absent) if self.l2.is_some() => self.get_remote(key, moment).await,
            local => local,
        }
    }

    /// Memory alone, without waiting.
    pub fn get_local(&self, key: &CacheKey, moment: &Moment<'_>) -> Lookup {
        // Spares the look-up, and says why rather than "absent".
        let judged = if moment.seen.pending() {
            Err(MissReason::Pending)
        } else {
            let found = self.l1.get(key).ok_or(MissReason::Absent);
            found.and_then(|local| {
                let entry = &local.entry;
                let judged = judge(entry, key, &self.now(moment));
                match (judged, &local.grace, moment.lenient) {
                    (Ok(()), Some(grace), Some(lenient)) => grace.is_true(lenient.asked),
                    (Err(MissReason::Moved), ..) => self.heat.void(&entry.seen, moment.seen),
                    _ => {}
                }
                judged.map(|()| entry.reply.clone())
            })
        };
        match judged {
            Ok(reply) => {
                self.heat.answered(moment.seen.words());
                self.counters.hits_l1.fetch_add(1, Ordering::Relaxed);
                Lookup::Hit(reply)
            }
            Err(reason) => {
                CacheCounters::miss(&self.counters.misses_l1, reason);
                Lookup::Miss(reason)
            }
        }
    }

    /// After a miss: what is in memory may be overtaken and an answer all the same. `wrote_since`: has the session written
    /// something on this shard since then?
    pub fn get_overtaken(
        &self,
        key: &CacheKey,
        moment: &Moment<'_>,
        wrote_since: impl FnOnce(Instant) -> bool,
    ) -> Option<Overdue> {
        let lenient = moment.lenient?;
        let local = self.l1.get(key)?;
        let grace = local.grace?;
        let now = Instant::now();
        let overtaken = Overtaken {
            firm_then: &grace.firm,
            firm_now: &lenient.firm,
            true_ms_ago: grace.true_ms_ago(now),
            stale_ms: lenient.stale_ms,
        };
        judge_overtaken(&local.entry, key, &self.now(moment), &overtaken).ok()?;
        if wrote_since(grace.true_at()) {
            return None;
        }
        Some(Overdue { reply: local.entry.reply.clone(), refresh: grace.begins_refresh(now) })
    }

    /// Would a reply that depends on what `seen` looked at be void before it is asked for again?
    pub fn is_write_hot(&self, seen: &Observation) -> bool {
        self.heat.is_hot(seen.words())
    }

    /// Is Redis to be asked for what memory has not? Of what memory has and was written since, only another proxy may have stored more.
    pub fn may_be_shared(&self, missed: MissReason, seen: &Observation, has_peers: bool) -> bool {
        let worth = match missed {
            MissReason::Absent => true,
            MissReason::Moved => has_peers && !self.heat.is_warm(seen.words()),
            _ => false,
        };
        worth && self.l2.is_some()
    }

    /// A second look into memory, which no counter hears of.
    pub fn peek(&self, key: &CacheKey, moment: &Moment<'_>) -> Option<Reply> {
        let entry = self.l1.get(key)?.entry;
        judge(&entry, key, &self.now(moment)).ok().map(|()| entry.reply.clone())
    }

    /// Redis alone. A hit is kept in memory. May wait as long as [`Redis::get`] does; a miss at once while Redis is down.
    pub async fn get_remote(&self, key: &CacheKey, moment: &Moment<'_>) -> Lookup {
        match self.ask_redis(key, moment).await {
            Ok(entry) => {
                self.heat.answered(moment.seen.words());
                self.counters.hits_l2.fetch_add(1, Ordering::Relaxed);
                let reply = entry.reply.clone();
                self.keep(key, Arc::new(entry), moment);
                Lookup::Hit(reply)
            }
            Err(reason) => {
                CacheCounters::miss(&self.counters.misses_l2, reason);
                Lookup::Miss(reason)
            }
        }
    }

    async fn ask_redis(&self, key: &CacheKey, moment: &Moment<'_>) -> Result<Entry, MissReason> {
        let redis = self.l2.as_ref().ok_or(MissReason::Absent)?;
        let found = redis.get(&self.redis_key(key)).await?.ok_or(MissReason::Absent)?;
        self.accept(key, moment, found)
    }

    /// The entry that Redis has returned, if it is one and true.
    fn accept(&self, key: &CacheKey, moment: &Moment<'_>, found: Bytes) -> Result<Entry, MissReason> {
        let entry = Entry::decode(found, self.encoded_bytes_max()).map_err(|_| MissReason::Garbled)?;
        // Another process may have stored it, whose versions are not ours.
        let stamps = moment.words.stamps(moment.seen).ok_or(MissReason::Moved)?;
        let stamps = if unsound::is(Variant::RedisJudges) { entry.seen.versions().into() } else { stamps };
        let mut entry = entry.adopt(moment.seen, &stamps).ok_or(MissReason::Moved)?;
        let now_ms = self.now_ms();
        if (now_ms..=now_ms + CLOCK_AHEAD_MS_MAX).contains(&entry.stored_at_ms) {
            entry.stored_at_ms = now_ms;
        }
        judge(&entry, key, &self.now(moment)).map(|()| entry)
    }

    /// Stores a complete reply that was read after the look `moment.seen`: in memory now, in Redis soon, unless that is hardly
    /// worth it.
    ///
    /// `frames`: RowDescription, DataRows, CommandComplete, as the server sent them.
    pub fn put(&self, key: &CacheKey, moment: &Moment<'_>, frames: Bytes) -> Result<(), NoFillReason> {
        let found = self.entry(key, moment, frames).and_then(|entry| {
            let entry = Arc::new(entry);
            let settled = may_fill(moment.words, moment.seen);
            // What is not the truth for certain may still be what an overtaken answer would be.
            if settled.is_ok() || moment.lenient.is_some() {
                self.keep(key, Arc::clone(&entry), moment);
            }
            settled.map(|()| entry)
        });
        let entry = found.inspect_err(|_| {
            self.counters.not_stored.fetch_add(1, Ordering::Relaxed);
        })?;
        self.counters.stored.fetch_add(1, Ordering::Relaxed);
        if let Some(redis) = &self.l2
            && !self.heat.is_warm(moment.seen.words())
            && let Some(stamps) = moment.words.stamps(moment.seen)
        {
            redis.put(Waiting { key: self.redis_key(key), entry, stamps });
        }
        Ok(())
    }

    fn keep(&self, key: &CacheKey, entry: Arc<Entry>, moment: &Moment<'_>) {
        let grace = moment.lenient.map(|lenient| Arc::new(Grace::of(lenient)));
        self.l1.insert(key.clone(), Local { entry, grace });
    }

    fn entry(&self, key: &CacheKey, moment: &Moment<'_>, frames: Bytes) -> Result<Entry, NoFillReason> {
        if frames.len() > self.settings.entry_bytes_max {
            return Err(NoFillReason::TooLarge);
        }
        let reply = Reply::new(frames).ok_or(NoFillReason::NotAReply)?;
        let (shard, epoch, seen) = (moment.shard, moment.epoch, moment.seen.clone());
        let entry = Entry { key: key.clone(), shard, epoch, seen, stored_at_ms: self.now_ms(), reply };
        // Long keys and word lists count too, and what Redis would refuse to give back is not worth keeping.
        let fits = entry.weight() <= self.encoded_bytes_max();
        if fits { Ok(entry) } else { Err(NoFillReason::TooLarge) }
    }

    fn encoded_bytes_max(&self) -> usize {
        self.settings.entry_bytes_max + ENTRY_OVERHEAD_MAX
    }

    fn now<'a>(&self, moment: &Moment<'a>) -> Now<'a> {
        Now {
            seen: moment.seen,
            shard: moment.shard,
            epoch: moment.epoch,
            now_ms: self.now_ms(),
            age_ms_max: self.settings.age_max.as_millis() as u64,
        }
    }

    fn now_ms(&self) -> u64 {
        self.started_at_ms + self.start.elapsed().as_millis() as u64
    }

    fn redis_key(&self, key: &CacheKey) -> String {
        format!("{}:{:032x}", self.settings.namespace, key.hash128())
    }

    pub fn counters(&self) -> &CacheCounters {
        &self.counters
    }

    /// Fills of which other proxies were told, waits for theirs, and those of them that were too long.
    pub fn leases(&self) -> [u64; 3] {
        let CacheCounters { leases, lease_waits, lease_timeouts, .. } = &*self.counters;
        [leases, lease_waits, lease_timeouts].map(|count| count.load(Ordering::Relaxed))
    }

    /// Entries and bytes in memory.
    pub fn local_size(&self) -> (usize, u64) {
        (self.l1.len(), self.l1.weight())
    }

    /// Is Redis configured, and does all of it answer?
    pub fn redis_up(&self) -> Option<bool> {
        self.redis_servers().map(|(known, up)| known > 0 && known == up)
    }

    /// Redis servers that are asked, and how many of them answer.
    pub fn redis_servers(&self) -> Option<(usize, usize)> {
        self.l2.as_ref().map(Redis::servers)
    }
}

#[cfg(test)]
mod tests {
    use weir_core::cache::KeyParts;
    use weir_core::fresh::WordSet;

    use super::*;

    const FRAMES: &[u8] = b"T\0\0\0\x06\0\0D\0\0\0\x06\0\0C\0\0\0\x0dSELECT 1\0";

    fn settings() -> CacheSettings {
        CacheSettings {
            l1_bytes_max: 1 << 20,
            entry_bytes_max: 1 << 10,
            compress_above: 1 << 10,
            age_max: Duration::from_secs(60),
            redis: None,
            namespace: "test".into(),
        }
    }

    fn key(statement: &str) -> CacheKey {
        CacheKey::new(&KeyParts {
            shard: ShardId(0),
            database: "shop",
            role: "app",
            statement,
            params: &[],
            result_formats: &[],
            settings: &[],
        })
    }

    fn at<'a>(words: &'a Words, seen: &'a Observation) -> Moment<'a> {
        Moment { words, seen, shard: ShardId(0), epoch: Epoch(1), lenient: None }
    }

    fn count(counts: &[AtomicU64], reason: MissReason) -> u64 {
        let index = MissReason::ALL.iter().position(|one| *one == reason).expect("listed");
        counts[index].load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn a_reply_is_served_until_its_words_move() {
        let cache = Cache::new(settings()).expect("a cache");
        let (words, set, key) = (Words::new(), WordSet::from_indexes([3]), key("SELECT 1"));
        let seen = words.observe(&set);
        assert_eq!(cache.get(&key, &at(&words, &seen)).await, Lookup::Miss(MissReason::Absent));
        cache.put(&key, &at(&words, &seen), Bytes::from_static(FRAMES)).expect("stored");
        let Lookup::Hit(reply) = cache.get_local(&key, &at(&words, &words.observe(&set))) else { panic!("a hit") };
        assert_eq!(reply.frames(), FRAMES);

        let intent = words.begin_write(&set).expect("room");
        let miss = |reason| assert_eq!(cache.get_local(&key, &at(&words, &words.observe(&set))), Lookup::Miss(reason));
        miss(MissReason::Pending);
        words.end_write(intent, None);
        miss(MissReason::Moved);
        assert_eq!(count(&cache.counters().misses_l1, MissReason::Moved), 1);
        assert_eq!(cache.counters().hits_l1.load(Ordering::Relaxed), 1);
        let late = cache.put(&key, &at(&words, &seen), Bytes::from_static(FRAMES));
        assert_eq!(late, Err(NoFillReason::Moved));
    }

    #[test]
    fn an_overtaken_reply_is_served_until_its_time_is_over_or_it_is_flushed() {
        let cache = Cache::new(settings()).expect("a cache");
        let (words, set, key) = (Words::new(), WordSet::from_indexes([3]), key("SELECT 1"));
        let table = weir_core::fresh::TableHash(7);
        let reads = weir_core::fresh::Dependencies::from_slice(&[weir_core::fresh::Dependency::Table(table)]);
        let look = |stale_ms| (Lenient::now(&words, &reads, stale_ms), words.observe(&set));
        let never = |_: Instant| false;
        let (lenient, seen) = look(60_000);
        let then = Moment { lenient: Some(&lenient), ..at(&words, &seen) };
        cache.put(&key, &then, Bytes::from_static(FRAMES)).expect("stored");
        assert!(cache.get_overtaken(&key, &at(&words, &seen), never).is_none(), "nobody allows it");

        let write = words.begin_write(&set).expect("room");
        let (lenient, seen) = look(60_000);
        let now = Moment { lenient: Some(&lenient), ..at(&words, &seen) };
        let overdue = cache.get_overtaken(&key, &now, never).expect("pending, and yet served");
        assert_eq!((overdue.reply.frames(), overdue.refresh), (&Bytes::from_static(FRAMES), true));
        assert!(!cache.get_overtaken(&key, &now, never).expect("served").refresh, "one refreshes it");
        assert!(cache.get_overtaken(&key, &now, |_| true).is_none(), "not to who has written since");
        // A refresh amid the write is no truth, and yet younger.
        assert_eq!(cache.put(&key, &now, Bytes::from_static(FRAMES)), Err(NoFillReason::Pending));
        words.end_write(write, None);
        let (lenient, seen) = look(60_000);
        let now = Moment { lenient: Some(&lenient), ..at(&words, &seen) };
        assert_eq!(cache.get_local(&key, &now), Lookup::Miss(MissReason::Moved));
        assert!(cache.get_overtaken(&key, &now, never).expect("served").refresh);
        std::thread::sleep(Duration::from_millis(3));
        let (lenient, seen) = look(2);
        let now = Moment { lenient: Some(&lenient), ..at(&words, &seen) };
        assert!(cache.get_overtaken(&key, &now, never).is_none(), "never beyond");

        let flushed = weir_core::fresh::Dependencies::from_slice(&[weir_core::fresh::Dependency::Flushed(table)]);
        let flush = words.begin_write(&WordSet::of(&flushed)).expect("room");
        words.end_write(flush, None);
        let (lenient, seen) = look(60_000);
        let now = Moment { lenient: Some(&lenient), ..at(&words, &seen) };
        assert!(cache.get_overtaken(&key, &now, never).is_none(), "flushed");
    }

    #[tokio::test]
    async fn what_is_no_reply_or_too_long_is_not_stored() {
        let cache = Cache::new(settings()).expect("a cache");
        let (words, key) = (Words::new(), key("SELECT 1"));
        let seen = words.observe(&WordSet::from_indexes([3]));
        let put = |frames: Bytes| cache.put(&key, &at(&words, &seen), frames);
        assert_eq!(put(Bytes::from_static(b"E\0\0\0\x05\0")), Err(NoFillReason::NotAReply));
        assert_eq!(put(vec![0; 2 << 10].into()), Err(NoFillReason::TooLarge));
        assert_eq!(cache.counters().not_stored.load(Ordering::Relaxed), 2);
        assert_eq!(cache.local_size().0, 0);
    }

    #[tokio::test]
    async fn age_and_bytes_are_bounded() {
        let cache = Cache::new(CacheSettings { age_max: Duration::ZERO, ..settings() }).expect("a cache");
        let words = Words::new();
        let seen = words.observe(&WordSet::from_indexes([3]));
        cache.put(&key("SELECT 1"), &at(&words, &seen), Bytes::from_static(FRAMES)).expect("stored");
        assert_eq!(cache.get_local(&key("SELECT 1"), &at(&words, &seen)), Lookup::Miss(MissReason::TooOld));
        for number in 0..20_000 {
            let key = key(&format!("SELECT {number}"));
            cache.put(&key, &at(&words, &seen), Bytes::from_static(FRAMES)).expect("stored");
        }
        assert!(cache.local_size().1 <= 1 << 20, "{:?}", cache.local_size());
    }

    /// Least recently used goes first, weighed alike: what the cache is compared with.
    struct Lru {
        bytes_max: u64,
        bytes: u64,
        by_key: hashbrown::HashMap<u64, u64>,
        by_age: std::collections::BTreeMap<u64, u64>,
    }

    impl Lru {
        /// True: it was there.
        fn ask(&mut self, key: u64, turn: u64, weight: u64) -> bool {
            let known = self.by_key.insert(key, turn);
            match known {
                Some(last) => drop(self.by_age.remove(&last)),
                None => self.bytes += weight,
            }
            self.by_age.insert(turn, key);
            while self.bytes > self.bytes_max {
                let Some((_, oldest)) = self.by_age.pop_first() else { break };
                self.by_key.remove(&oldest);
                self.bytes -= weight;
            }
            known.is_some()
        }
    }

    #[test]
    fn what_is_asked_for_again_survives_a_scan_of_what_is_asked_for_once() {
        const HOT: u64 = 800;
        let cache = Cache::new(settings()).expect("a cache");
        let words = Words::new();
        let seen = words.observe(&WordSet::from_indexes([3]));
        let ask = |number: u64| {
            let key = key(&format!("SELECT {number:08}"));
            let hit = matches!(cache.get_local(&key, &at(&words, &seen)), Lookup::Hit(_));
            if !hit {
                cache.put(&key, &at(&words, &seen), Bytes::from_static(FRAMES)).expect("stored");
            }
            hit
        };
        ask(0);
        let weight = cache.local_size().1;
        let (by_key, by_age) = (hashbrown::HashMap::new(), std::collections::BTreeMap::new());
        let mut lru = Lru { bytes_max: settings().l1_bytes_max as u64, bytes: 0, by_key, by_age };
        assert!(HOT * weight < lru.bytes_max, "what is hot has room: {weight} bytes each");
        let (mut turn, mut hits, mut lru_hits, mut asked) = (0_u64, 0_u64, 0_u64, 0_u64);
        for round in 0..40_u64 {
            // What is hot is asked for twice; then a report reads five times what there is room for.
            for step in 0..2 * HOT {
                let number = step % HOT;
                turn += 1;
                asked += 1;
                hits += u64::from(ask(number));
                lru_hits += u64::from(lru.ask(number, turn, weight));
            }
            for step in 0..5 * lru.bytes_max / weight {
                let number = 1_000_000 + round * 1_000_000 + step;
                turn += 1;
                ask(number);
                lru.ask(number, turn, weight);
            }
        }
        let share = |hits: u64| hits as f64 / asked as f64;
        println!("hits of what is hot, between scans: {:.3}; with LRU {:.3}", share(hits), share(lru_hits));
        assert!(share(hits) > 0.95 && share(hits) > share(lru_hits) + 0.3, "{} {}", share(hits), share(lru_hits));
        assert!(cache.local_size().1 <= settings().l1_bytes_max as u64);
    }

    #[tokio::test]
    async fn a_redis_that_is_not_there_costs_nothing() {
        let redis = |url| Some(RedisConfig::plain(url));
        let cache = Cache::new(CacheSettings { redis: redis("redis://127.0.0.1:1"), ..settings() }).expect("a cache");
        let words = Words::new();
        let seen = words.observe(&WordSet::from_indexes([3]));
        let asked = Instant::now();
        for _ in 0..100 {
            let found = cache.get(&key("SELECT 1"), &at(&words, &seen)).await;
            assert_eq!(found, Lookup::Miss(MissReason::StoreDown));
        }
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        assert_eq!(cache.redis_up(), Some(false));
        assert!(Cache::new(CacheSettings { redis: redis("http://x"), ..settings() }).is_err());
    }
}
