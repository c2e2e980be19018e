//! The result cache: memory first (L1), Redis behind it (L2).
//!
//! Invariant: what comes out was judged by [`weir_core::cache::judge`] against a look the caller took after its own
//! request arrived, wherever the bytes were stored. Redis is never believed: its bytes are decoded with a checksum, their
//! full key is compared, and the stamps of their words must be the stamps now (`weir_core::fresh::words`). So Redis may
//! die, stall, be emptied or be fed nonsense, and the worst that happens is a miss.
//!
//! Bounds: L1 by bytes; L2 as in [`redis`].
//!
//! Non-goals: deciding what may be cached (the planner's), and single-flight (`weir_core::cache::Flights`).

mod lease;
mod redis;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use quick_cache::Weighter;
use weir_core::cache::{CacheKey, Entry, Heat, MissReason, NoFillReason, Now, Reply, judge, may_fill};
use weir_core::fresh::{Observation, Words};
use weir_core::id::{Epoch, ShardId};

pub use self::lease::{FillLease, Filled};
pub use self::redis::{BadRedis, RedisServers};
use self::redis::{Redis, Stored, Waiting};
use crate::config::RedisConfig;

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
    l1: quick_cache::sync::Cache<CacheKey, Arc<Entry>, ByBytes, foldhash::fast::RandomState>,
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

impl Weighter<CacheKey, Arc<Entry>> for ByBytes {
    fn weight(&self, _: &CacheKey, entry: &Arc<Entry>) -> u64 {
        entry.weight() as u64
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
            found.and_then(|entry| {
                let judged = judge(&entry, key, &self.now(moment));
                if judged == Err(MissReason::Moved) {
                    self.heat.void(&entry.seen, moment.seen);
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

    /// Would a reply that depends on what `seen` looked at be void before it is asked for again?
    pub fn is_write_hot(&self, seen: &Observation) -> bool {
        self.heat.is_hot(seen.words())
    }

    /// Is Redis to be asked for what memory has not?
    pub fn has_shared(&self) -> bool {
        self.l2.is_some()
    }

    /// A second look into memory, which no counter hears of.
    pub fn peek(&self, key: &CacheKey, moment: &Moment<'_>) -> Option<Reply> {
        let entry = self.l1.get(key)?;
        judge(&entry, key, &self.now(moment)).ok().map(|()| entry.reply.clone())
    }

    /// Redis alone. A hit is kept in memory. May wait as long as [`Redis::get`] does; a miss at once while Redis is down.
    pub async fn get_remote(&self, key: &CacheKey, moment: &Moment<'_>) -> Lookup {
        match self.ask_redis(key, moment).await {
            Ok(entry) => {
                self.counters.hits_l2.fetch_add(1, Ordering::Relaxed);
                let reply = entry.reply.clone();
                self.l1.insert(key.clone(), Arc::new(entry));
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
        let entry = entry.adopt(moment.seen, &stamps).ok_or(MissReason::Moved)?;
        judge(&entry, key, &self.now(moment)).map(|()| entry)
    }

    /// Stores a complete reply that was read after the look `moment.seen`: in memory now, in Redis soon.
    ///
    /// `frames`: RowDescription, DataRows, CommandComplete, as the server sent them.
    pub fn put(&self, key: &CacheKey, moment: &Moment<'_>, frames: Bytes) -> Result<(), NoFillReason> {
        let entry = self.entry(key, moment, frames).inspect_err(|_| {
            self.counters.not_stored.fetch_add(1, Ordering::Relaxed);
        })?;
        let entry = Arc::new(entry);
        self.l1.insert(key.clone(), Arc::clone(&entry));
        self.counters.stored.fetch_add(1, Ordering::Relaxed);
        if let Some(redis) = &self.l2
            && let Some(stamps) = moment.words.stamps(moment.seen)
        {
            redis.put(Waiting { key: self.redis_key(key), entry, stamps });
        }
        Ok(())
    }

    fn entry(&self, key: &CacheKey, moment: &Moment<'_>, frames: Bytes) -> Result<Entry, NoFillReason> {
        if frames.len() > self.settings.entry_bytes_max {
            return Err(NoFillReason::TooLarge);
        }
        let reply = Reply::new(frames).ok_or(NoFillReason::NotAReply)?;
        may_fill(moment.words, moment.seen)?;
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
        Moment { words, seen, shard: ShardId(0), epoch: Epoch(1) }
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
