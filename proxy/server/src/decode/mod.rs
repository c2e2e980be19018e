//! Writes that go round weir: per shard, one task follows the primary's WAL and moves the words of what was written.
//!
//! Invariant: while the state is [`State::Up`], every commit of a published table is announced when it is decoded and ended
//! only once the primary shows it; and a gap, whatever made it, voids everything that was read before. A decoded commit may
//! come before the primary shows it: an entry that is filled in between would be stale for ever, so its words stay pending as
//! long as that takes. How much of the WAL is behind is shown, never guessed at.
//!
//! Its slot is temporary and dies with its connection, and a connection that does not answer dies by wal_sender_timeout: no
//! slot outlives weir. Of several proxies one decodes and tells the others, as they tell each other of their clients' writes. Non-goals: tables that
//! are not published ([`publish`] names them).

mod publish;
mod settle;
mod stream;
mod tick;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, Statement};
use weir_core::error::UserError;
use weir_core::fresh::decoded::Snapshot;
use weir_core::fresh::words::WordSet;
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::id::ShardId;
use weir_core::lock;
use weir_wire::pgoutput::SERVER_VERSION_MIN;

use self::publish::Publisher;
use self::settle::Settling;
use self::stream::Stream;
use crate::back::connect::Login;
use crate::config::{Config, Decoding as Mode};
use crate::database::{Database, Shard};
use crate::fleet::member::Announcement;

const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A server that cannot be followed is asked again that often.
const REFUSED_RETRY: Duration = Duration::from_secs(15);
/// How often a proxy that does not lead tries to.
const LEAD_RETRY: Duration = Duration::from_secs(1);
/// In mode `auto` so many slots and walsenders are left to replicas and others.
const SPARE: i32 = 2;
const PUBLISH_GAP: Duration = Duration::from_millis(20);
/// Whoever may create in a schema on the path could else answer for a catalogue or an operator.
const OWN_NAMES: &str = "SET search_path = pg_catalog, pg_temp";
/// Tables that are named where there are gaps.
const SHOWN_MAX: usize = 20;

/// What one shard's decoder is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is not wanted, or the server cannot: why.
    Off(String),
    /// Not yet, or not any more: why.
    Down(String),
    /// Another proxy decodes, and tells this one.
    Standby,
    Up,
}

impl State {
    /// Word and reason.
    pub fn shown(&self) -> (&'static str, &str) {
        match self {
            State::Off(why) => ("off", why),
            State::Down(why) => ("down", why),
            State::Standby => ("standby", "another proxy decodes, and tells this one"),
            State::Up => ("up", ""),
        }
    }
}

/// Tables that are not, or not wholly, seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gaps {
    /// Not published: weir's account may not.
    pub unseen: Vec<String>,
    /// Without replica identity: only INSERT and TRUNCATE are seen.
    pub partly: Vec<String>,
    /// Why DDL beside weir is not told at once, if so.
    pub ddl: Option<String>,
}

/// Counts since the start, and where it stands.
#[derive(Debug, Default)]
pub struct Counters {
    pub transactions: AtomicU64,
    pub words: AtomicU64,
    pub reconnects: AtomicU64,
    /// Up to where in the WAL all commits have been announced.
    pub handled: AtomicU64,
    /// WAL that is written but not decoded yet, in bytes.
    pub lag_bytes: AtomicU64,
    /// How long the last commit took from its time stamp until it was sent to us, in microseconds of the server's clock.
    pub lag_us: AtomicI64,
    /// Transactions being decoded, and decoded ones that the primary does not show yet.
    pub open: AtomicU64,
    pub waiting: AtomicU64,
}

/// One shard's decoder as others see it.
#[derive(Debug)]
pub struct Decoding {
    state: Mutex<State>,
    gaps: Mutex<Gaps>,
    pub counters: Counters,
    task: Mutex<Option<AbortHandle>>,
}

impl std::fmt::Display for Gaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lists = [("not seen", &self.unseen), ("only INSERT and TRUNCATE are seen of", &self.partly)];
        let mut parts: Vec<String> = Vec::new();
        for (what, tables) in lists.into_iter().filter(|(_, tables)| !tables.is_empty()) {
            let more = tables.len().saturating_sub(SHOWN_MAX);
            let shown = tables[..tables.len() - more].join(", ");
            parts.push(if more == 0 { format!("{what}: {shown}") } else { format!("{what}: {shown} and {more} more") });
        }
        parts.extend(self.ddl.iter().map(|why| format!("DDL is not told at once: {why}")));
        f.write_str(&parts.join("; "))
    }
}

impl Decoding {
    pub fn new() -> Self {
        let state = Mutex::new(State::Off("the shard does not take part".to_owned()));
        Decoding { state, gaps: Mutex::default(), counters: Counters::default(), task: Mutex::default() }
    }

    pub fn state(&self) -> State {
        self.state.lock().clone()
    }

    pub fn gaps(&self) -> Gaps {
        self.gaps.lock().clone()
    }

    fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    /// The shard takes part no more.
    pub fn stop(&self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
        self.set(State::Off("the shard has been retired".to_owned()));
    }
}

impl Default for Decoding {
    fn default() -> Self {
        Self::new()
    }
}

/// Starts the decoder of a shard that takes part, by weir's own login to its primary, unless it runs. Does nothing where only primaries
/// answer reads.
pub fn start(config: &Config, db: &Arc<Database>, shard: ShardId) {
    let mode = config.cache.decoding;
    let off = match mode {
        Mode::Off => Some("cache.decoding is \"off\""),
        _ if !db.tracks_freshness() => Some("nothing but the primary answers reads"),
        Mode::Auto if db.on_demand => {
            Some("databases of the wildcard entry are decoded only if cache.decoding is \"require\"")
        }
        Mode::Auto | Mode::Require => None,
    };
    let decoding = &db.decoding[shard];
    if decoding.task.lock().is_some() {
        return;
    }
    match off {
        Some(why) => decoding.set(State::Off(why.to_owned())),
        None => {
            let login = db.primaries.of(shard).clone();
            decoding.set(State::Down("starting".to_owned()));
            *decoding.task.lock() = Some(db.spawn(Decoder::new(db, shard, login, mode).run()));
        }
    }
}

/// Why one attempt ended.
enum Ended {
    /// The server cannot be followed as it is.
    Refused(String),
    Lost(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Ended {
    fn from(error: E) -> Self {
        Ended::Lost(error.into())
    }
}

/// The task of one shard.
struct Decoder {
    db: Arc<Database>,
    shard: ShardId,
    login: Login,
    mode: Mode,
    settling: Settling,
    /// In mode `require`: keeps everybody but the primary from answering while the stream is down, here and, by the second, at
    /// other proxies.
    barred: [Option<Announcement>; 2],
}

impl Decoder {
    fn new(db: &Arc<Database>, shard: ShardId, login: Login, mode: Mode) -> Self {
        Decoder { db: Arc::clone(db), shard, login, mode, settling: Settling::default(), barred: [None, None] }
    }

    fn here(&self) -> &Shard {
        self.db.shard(self.shard)
    }

    fn decoding(&self) -> &Decoding {
        &self.db.decoding[self.shard]
    }

    /// For ever; ends with its database.
    async fn run(mut self) {
        let mut retry = RETRY_MIN;
        let mut told = String::new();
        self.bar();
        loop {
            let began = Instant::now();
            let ended = self.attempt().await;
            let was_up = self.decoding().state() == State::Up;
            self.bar();
            let (pause, state) = match ended {
                Ended::Refused(why) => (REFUSED_RETRY, State::Off(why)),
                Ended::Lost(error) => {
                    let why = format!("{error:#}");
                    if was_up || why != told {
                        tracing::warn!(database = %self.db.name, shard = %self.here().name, "decoding ended: {why}");
                        told.clone_from(&why);
                    }
                    (retry, State::Down(why))
                }
            };
            self.decoding().set(state);
            self.settling.all_are_old();
            self.publish_figures();
            if was_up {
                self.decoding().counters.reconnects.fetch_add(1, Relaxed);
                self.bar_everywhere().await;
            }
            self.login.route.pause(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            retry = if was_up && began.elapsed() > RETRY_MAX { RETRY_MIN } else { (retry * 2).min(RETRY_MAX) };
        }
    }

    /// Until it fails.
    async fn attempt(&mut self) -> Ended {
        match self.follow().await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn follow(&mut self) -> Result<std::convert::Infallible, Ended> {
        let primary = timeout(QUERY_TIMEOUT, Primary::connect(&self.login)).await.context("no connection")??;
        if let Err(refused) = self.requirements(&primary.client).await {
            self.settling.finish_old(self, &primary).await?;
            return Err(refused);
        }
        self.lead(&primary).await?;
        self.bar_everywhere().await;
        self.decoding().set(State::Down("publications are being made".to_owned()));
        let publisher = Publisher::new(self.login.clone(), &primary.client).await?;
        *self.decoding().gaps.lock() = publisher.catch_up().await?.gaps;
        self.decoding()
            .set(State::Down("waiting for transactions that were running when the slot was made".to_owned()));
        let mut stream = {
            let opened = Stream::open(&self.login, publisher.names());
            tokio::select! {
                opened = opened => opened?,
                lost = watch(&primary.client) => return Err(Ended::Lost(lost)),
            }
        };
        // All that commits from here on is decoded; what was before may have gone unseen.
        self.here().clock.keep_shown();
        self.settling.void(self, &primary).await?;
        self.decoding().set(State::Up);
        self.unbar();
        tracing::info!(database = %self.db.name, shard = %self.here().name, "writes are followed in the WAL");
        let this = &*self;
        let ended: Result<std::convert::Infallible> = tokio::select! {
            ended = stream.follow(this, primary.pid) => ended,
            ended = this.settling.run(this, &primary) => ended,
            ended = this.keep_published(&publisher, &primary) => ended,
            ended = tick::run(&this.login) => ended,
        };
        Ok(ended?)
    }

    /// Can this server be followed by this account?
    async fn requirements(&self, client: &Client) -> Result<(), Ended> {
        const ASKED: &str = "SELECT current_setting('server_version_num')::int4, current_setting('wal_level'), pg_is_in_recovery(), \
            current_setting('max_replication_slots')::int4 - (SELECT count(*) FROM pg_replication_slots)::int4, \
            current_setting('max_wal_senders')::int4 - (SELECT count(*) FROM pg_stat_get_wal_senders())::int4, \
            has_database_privilege(current_database(), 'CREATE')";
        let row = timeout(QUERY_TIMEOUT, client.query_one(ASKED, &[])).await??;
        let refused = |why: String| Err(Ended::Refused(why));
        let version: i32 = row.try_get(0)?;
        if version < SERVER_VERSION_MIN {
            return refused(format!("the server is older than Postgres {}", SERVER_VERSION_MIN / 10_000));
        }
        let level: String = row.try_get(1)?;
        if level != "logical" {
            return refused(format!("wal_level is {level}, not logical"));
        }
        if row.try_get(2)? {
            return refused("the server is in recovery".to_owned());
        }
        let spare = if self.mode == Mode::Auto { SPARE } else { 0 };
        for (column, what) in [(3, "max_replication_slots"), (4, "max_wal_senders")] {
            if row.try_get::<_, i32>(column)? <= spare {
                return refused(format!("{what} leaves none free (\"auto\" leaves {SPARE} to others)"));
            }
        }
        if !row.try_get::<_, bool>(5)? {
            return refused(format!("{} may not create publications in this database (CREATE)", self.login.user));
        }
        Ok(())
    }

    /// Waits until this proxy is the one of several that decodes. The lock lives as long as the connection does.
    async fn lead(&mut self, primary: &Primary) -> Result<()> {
        if !self.here().member.has_peers() {
            return Ok(());
        }
        let mut tries = 0;
        loop {
            let asked = async { primary.client.query_one("SELECT pg_try_advisory_lock($1)", &[&lock::DECODES]).await };
            if timeout(QUERY_TIMEOUT, asked).await??.try_get(0)? {
                return Ok(());
            }
            self.decoding().set(State::Standby);
            self.publish_figures();
            self.settling.look(self, primary).await?;
            // Whoever leads now has had the time to bar what has to be.
            tries += 1;
            if tries == 2 {
                self.unbar();
            }
            sleep(LEAD_RETRY.mul_f64(rand::random_range(0.75..1.25))).await;
        }
    }

    /// Brings the publications up to date after DDL, and now and then.
    async fn keep_published(&self, publisher: &Publisher, primary: &Primary) -> Result<std::convert::Infallible> {
        loop {
            self.settling.schema_has_changed().await;
            // What a migration does within a moment is looked at once.
            sleep(PUBLISH_GAP).await;
            let caught_up = match publisher.catch_up().await {
                Ok(caught_up) => caught_up,
                Err(error) => {
                    tracing::warn!(database = %self.db.name, "publications are not brought up to date: {error:#}");
                    continue;
                }
            };
            if caught_up.added {
                // Who wrote one of them before it was published, and commits later, is not decoded.
                self.settling.void(self, primary).await?;
            }
            *self.decoding().gaps.lock() = caught_up.gaps;
        }
    }

    /// Raises the words of anything, here and at other proxies.
    async fn announce_anything(&self, pid: i32) -> Result<Announcement> {
        let anything: Dependencies = [Dependency::Anything].into_iter().collect();
        crate::fresh::announce(self.here(), &anything, pid).await.map_err(told)
    }

    fn bar(&mut self) {
        if self.mode == Mode::Require && self.barred.iter().all(Option::is_none) {
            let anything = WordSet::of(&[Dependency::Anything].into_iter().collect());
            self.barred[0] = self.here().words.begin_write(&anything).ok().map(Announcement::alone);
        }
    }

    /// Who cannot be told serves nothing anyhow.
    async fn bar_everywhere(&mut self) {
        if self.mode == Mode::Require && self.barred[1].is_none() && self.here().member.has_peers() {
            self.barred[1] = self.announce_anything(0).await.ok();
        }
    }

    fn unbar(&mut self) {
        for barred in self.barred.iter_mut().filter_map(Option::take) {
            self.db.shard(self.shard).clock.post(barred);
        }
    }

    fn publish_figures(&self) {
        let decoding = self.decoding();
        if let Some(figures) = self.db.stats.database.decoding(self.shard) {
            let seen = matches!(decoding.state(), State::Up | State::Standby);
            figures.publish(seen, &decoding.counters);
        }
    }
}

fn told(error: UserError) -> anyhow::Error {
    anyhow!("{}{}", error.message, error.detail.map(|detail| format!(": {detail}")).unwrap_or_default())
}

/// Until the server does not answer any more.
async fn watch(client: &Client) -> anyhow::Error {
    loop {
        sleep(Duration::from_secs(1)).await;
        match timeout(QUERY_TIMEOUT, client.batch_execute("SELECT 1")).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return anyhow!("no answer within {QUERY_TIMEOUT:?}"),
        }
    }
}

/// The connection to a primary on which questions are asked, and which holds the advisory lock.
struct Primary {
    client: Client,
    pid: i32,
    snapshot: Statement,
}

impl Primary {
    async fn connect(login: &Login) -> Result<Primary> {
        let client = crate::control::connect(login).await?;
        client.batch_execute(OWN_NAMES).await?;
        let snapshot = client.prepare("SELECT pg_current_snapshot()::text").await?;
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).await?.try_get(0)?;
        Ok(Primary { client, pid, snapshot })
    }

    /// What the server shows now.
    async fn snapshot(&self) -> Result<Snapshot> {
        let asked = self.client.query_one(&self.snapshot, &[]);
        let text: String = timeout(QUERY_TIMEOUT, asked).await.context("no answer in time")??.try_get(0)?;
        Snapshot::parse(&text).with_context(|| format!("the server's snapshot cannot be read: {text}"))
    }
}
