//! Handles of one database: what its sessions, pools, probes and cache count.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};
use parking_lot::Mutex;
use weir_core::admin::StatCounts;
use weir_core::fresh::PrimaryBecause;
use weir_core::id::{Epoch, ShardId};
use weir_core::plan::NoCacheReason;
use weir_core::topology::SlotMap;

use super::cached::{CacheResult, FILLS, Fill, UNCACHEABLE, fill_index, fill_label, fills};
use super::stripe::{Stripe, Striped};
use super::tally::Tally;
use super::{Registry, Subject};
use crate::database::progress::Waited;
use crate::decode::Counters;
use crate::growing::Growing;
use crate::hub::moves::{MoveProgress, MoveRow};

/// Label `role` of a server connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Primary,
    Replica,
}

/// Label `route`: how a statement's target was chosen, coarsely.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RouteKind {
    /// One shard, by key.
    Single,
    /// Any shard would do.
    Any,
    /// The home shard.
    Home,
    /// A read of several shards.
    Scatter,
    /// A write on several shards.
    Broadcast,
    /// A read by the fallback engine; its shard is the home shard.
    Engine,
}

impl Role {
    pub const ALL: [Role; 2] = [Role::Primary, Role::Replica];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Replica => "replica",
        }
    }
}

impl RouteKind {
    pub const ALL: [RouteKind; 6] = [
        RouteKind::Single,
        RouteKind::Any,
        RouteKind::Home,
        RouteKind::Scatter,
        RouteKind::Broadcast,
        RouteKind::Engine,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            RouteKind::Single => "single",
            RouteKind::Any => "any",
            RouteKind::Home => "home",
            RouteKind::Scatter => "scatter",
            RouteKind::Broadcast => "broadcast",
            RouteKind::Engine => "engine",
        }
    }
}

/// A striped count and the counter it is published as.
struct Published {
    count: Striped,
    counter: Counter,
}

impl Published {
    fn new(counter: Counter) -> Self {
        Published { count: Striped::default(), counter }
    }

    fn publish(&self) {
        self.counter.absolute(self.count.value());
    }
}

/// Gauges of one pool.
#[derive(Clone)]
pub struct PoolMetrics {
    pub active: Gauge,
    pub idle: Gauge,
    pub login: Gauge,
}

/// Handles of one server.
pub struct EndpointMetrics {
    /// host:port
    pub name: String,
    reads: Published,
    up: Gauge,
    primary: Gauge,
    near: Gauge,
    lag: Gauge,
}

struct ShardMetrics {
    pools: [PoolMetrics; 2],
    /// By route and role.
    queries: [[Published; 2]; RouteKind::ALL.len()],
    endpoints: Vec<EndpointMetrics>,
    /// Which of them is the primary, and how often another one became it.
    primary: AtomicUsize,
    promotions: Counter,
    slots: Gauge,
    load_share: Gauge,
    decoding: DecodingMetrics,
}

/// Handles of the task that follows a shard's WAL.
pub struct DecodingMetrics {
    up: Gauge,
    lag_bytes: Gauge,
    lag_seconds: Gauge,
    waiting: Gauge,
    transactions: Counter,
    words: Counter,
    reconnects: Counter,
}

#[derive(Default)]
struct Totals {
    server_assignments: Striped,
    transaction_us: Striped,
    query_us: Striped,
    wait_us: Striped,
    client_parses: Striped,
    server_parses: Striped,
    binds: Striped,
    client_logins: Striped,
    queries: Striped,
}

/// All handles of one database.
pub struct DatabaseMetrics {
    name: String,
    pub clients_active: Gauge,
    pub clients_idle: Gauge,
    pub clients_waiting: Gauge,
    query_seconds: Histogram,
    transaction_seconds: Histogram,
    wait_seconds: Histogram,
    shards: Growing<ShardMetrics>,
    cache: [Published; CacheResult::COUNT],
    fills: [Published; FILLS],
    uncacheable: [Published; UNCACHEABLE],
    /// Reads that the primary answered though there are replicas, by reason.
    primary_reads: [Published; PrimaryBecause::ALL.len()],
    /// Reads that waited for a replica, by outcome.
    replica_waits: [Published; Waited::ALL.len()],
    transactions: Published,
    received: Published,
    sent: Published,
    totals: Totals,
    /// Why sessions kept their server connection.
    pub pins: Tally,
    epoch: Gauge,
    hub_behind: Gauge,
    /// Share of the hottest key in all that is read and written.
    pub hot_share: Gauge,
    hot_slot_share: Gauge,
    pub moves: MoveMetrics,
    period: Mutex<Period>,
}

/// Counts at the end of the last period, and what the period before it averaged.
#[derive(Default)]
struct Period {
    last: StatCounts,
    averages: StatCounts,
}

impl DatabaseMetrics {
    pub(super) fn new(registry: &Registry, subject: &Subject) -> Arc<Self> {
        let name = subject.database.as_str();
        let clients = |state| registry.gauge("weir_client_connections", &[("pool", name), ("state", state)]);
        let histogram = |metric| registry.histogram(metric, &[("database", name)]);
        let counted = |metric| Published::new(registry.counter(metric, &[("database", name)]));
        let labelled = |metric, label, value: &str| {
            Published::new(registry.counter(metric, &[("database", name), (label, value)]))
        };
        let cache = CacheResult::all().map(|one| labelled("weir_cache_requests_total", "result", &one.label()));
        let fills = fills().map(|one| labelled("weir_cache_fills_total", "result", fill_label(one)));
        let uncacheable = NoCacheReason::LABELS.map(|one| labelled("weir_cache_uncacheable_total", "reason", one));
        let primary_reads =
            PrimaryBecause::ALL.map(|because| labelled("weir_primary_reads_total", "reason", because.as_str()));
        let replica_waits = Waited::ALL.map(|waited| labelled("weir_replica_waits_total", "result", waited.as_str()));
        Arc::new(DatabaseMetrics {
            name: name.to_owned(),
            clients_active: clients("active"),
            clients_idle: clients("idle"),
            clients_waiting: clients("waiting"),
            query_seconds: histogram("weir_query_duration_seconds"),
            transaction_seconds: histogram("weir_transaction_duration_seconds"),
            wait_seconds: histogram("weir_pool_wait_duration_seconds"),
            shards: subject.shards.iter().map(|shard| ShardMetrics::new(registry, name, shard)).collect::<Growing<_>>(),
            cache,
            fills,
            uncacheable,
            primary_reads,
            replica_waits,
            transactions: counted("weir_transactions_total"),
            received: counted("weir_client_received_bytes_total"),
            sent: counted("weir_client_sent_bytes_total"),
            totals: Totals::default(),
            pins: Tally::default(),
            epoch: registry.gauge("weir_topology_epoch", &[("database", name)]),
            hub_behind: registry.gauge("weir_hub_behind", &[("database", name)]),
            hot_share: registry.gauge("weir_hot_key_share", &[("database", name)]),
            hot_slot_share: registry.gauge("weir_hot_slot_share", &[("database", name)]),
            moves: MoveMetrics::new(registry, name),
            period: Mutex::default(),
        })
    }

    /// The label `database`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gauges of a shard's pool; `None` for a shard that does not exist.
    pub fn pool(&self, shard: ShardId, role: Role) -> Option<PoolMetrics> {
        self.shards.get(usize::from(shard.0)).map(|shard| shard.pools[role as usize].clone())
    }

    pub fn decoding(&self, shard: ShardId) -> Option<&DecodingMetrics> {
        self.shards.get(usize::from(shard.0)).map(|shard| &shard.decoding)
    }

    /// Handles of a shard that joins: its name, and its servers as `host:port`. Beyond the room for shards nothing is counted.
    pub(super) fn add_shard(&self, registry: &Registry, shard: &(String, Vec<String>)) {
        self.shards.push(ShardMetrics::new(registry, &self.name, shard));
    }

    /// Which server of a shard is the primary, and after how many others.
    pub fn primary(&self, shard: ShardId, server: usize, generation: u64) {
        if let Some(shard) = self.shards.get(usize::from(shard.0)) {
            shard.primary.store(server, Relaxed);
            shard.promotions.absolute(generation);
        }
    }

    /// A server of a shard; the one that is configured as the primary is the first.
    pub fn endpoint(&self, shard: ShardId, index: usize) -> Option<&EndpointMetrics> {
        self.shards.get(usize::from(shard.0))?.endpoints.get(index)
    }

    /// A new slot map came into force.
    pub fn topology(&self, epoch: Epoch, slots: &SlotMap) {
        self.epoch.set(epoch.0 as f64);
        for (shard, count) in self.shards.iter().zip(slots.counts(self.shards.len())) {
            shard.slots.set(count as f64);
        }
    }

    /// Shares of the time that keyed statements take: by shard, and of the slot that has most.
    pub fn load(&self, shares: impl Iterator<Item = f64>, hottest_slot: f64) {
        self.shards.iter().zip(shares).for_each(|(shard, share)| shard.load_share.set(share));
        self.hot_slot_share.set(hottest_slot);
    }

    /// Has the hub forgotten the map in force?
    pub fn hub_is_behind(&self, behind: bool) {
        self.hub_behind.set(f64::from(u8::from(behind)));
    }

    /// Totals since the start, for SHOW STATS.
    pub fn totals(&self) -> StatCounts {
        let totals = &self.totals;
        StatCounts {
            server_assignments: totals.server_assignments.value(),
            transactions: self.transactions.count.value(),
            queries: totals.queries.value(),
            bytes_received: self.received.count.value(),
            bytes_sent: self.sent.count.value(),
            transaction_us: totals.transaction_us.value(),
            query_us: totals.query_us.value(),
            wait_us: totals.wait_us.value(),
            client_parses: totals.client_parses.value(),
            server_parses: totals.server_parses.value(),
            binds: totals.binds.value(),
            client_logins: totals.client_logins.value(),
        }
    }

    /// What SHOW STATS calls averages: of the last whole period.
    pub fn averages(&self) -> StatCounts {
        self.period.lock().averages
    }

    /// How often the cache gave each answer, how fills went, and why reads were not for it: label and count.
    pub fn cache_figures(&self) -> Vec<(String, u64)> {
        let results = CacheResult::all().into_iter().map(CacheResult::label).zip(&self.cache);
        let fills = fills().into_iter().map(|fill| format!("fill_{}", fill_label(fill))).zip(&self.fills);
        let reasons = NoCacheReason::LABELS.iter().map(|label| format!("uncacheable_{label}")).zip(&self.uncacheable);
        results.chain(fills).chain(reasons).map(|(name, one)| (name, one.count.value())).collect()
    }

    /// How often the primary answered a read that a replica might have, by reason.
    pub fn primary_reads(&self) -> impl Iterator<Item = (PrimaryBecause, u64)> {
        PrimaryBecause::ALL.into_iter().zip(&self.primary_reads).map(|(because, one)| (because, one.count.value()))
    }

    pub(super) fn tick(&self, elapsed: Duration) {
        let now = self.totals();
        let mut period = self.period.lock();
        period.averages = averages(&period.last, &now, elapsed);
        period.last = now;
    }

    pub(super) fn publish(&self, registry: &Registry) {
        let counted = self.cache.iter().chain(&self.fills).chain(&self.uncacheable).chain(&self.primary_reads);
        let counted = counted.chain(&self.replica_waits).chain([&self.transactions, &self.received, &self.sent]);
        counted.for_each(Published::publish);
        for shard in self.shards.iter() {
            shard.queries.iter().flatten().for_each(Published::publish);
            shard.endpoints.iter().for_each(|endpoint| endpoint.reads.publish());
        }
        self.pins.publish(registry, "weir_pins_total", "reason", &[("database", &self.name)]);
    }
}

/// Per second; times per transaction, query or assignment (PgBouncer, src/stats.c, calc_average).
fn averages(before: &StatCounts, now: &StatCounts, elapsed: Duration) -> StatCounts {
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let grown = |field: fn(&StatCounts) -> u64| field(now).saturating_sub(field(before));
    let rate = |field| (grown(field) as f64 / seconds).round() as u64;
    let mean = |sum, count| grown(sum) / grown(count).max(1);
    StatCounts {
        server_assignments: rate(|counts| counts.server_assignments),
        transactions: rate(|counts| counts.transactions),
        queries: rate(|counts| counts.queries),
        bytes_received: rate(|counts| counts.bytes_received),
        bytes_sent: rate(|counts| counts.bytes_sent),
        transaction_us: mean(|counts| counts.transaction_us, |counts| counts.transactions),
        query_us: mean(|counts| counts.query_us, |counts| counts.queries),
        wait_us: rate(|counts| counts.wait_us),
        client_parses: rate(|counts| counts.client_parses),
        server_parses: rate(|counts| counts.server_parses),
        binds: rate(|counts| counts.binds),
        client_logins: rate(|counts| counts.client_logins),
    }
}

impl ShardMetrics {
    fn new(registry: &Registry, database: &str, (shard, servers): &(String, Vec<String>)) -> Self {
        let labels = |role: Role| [("database", database), ("shard", shard.as_str()), ("role", role.as_str())];
        let pool = |role: Role| {
            let [database, shard, role] = labels(role);
            let gauge = |state| registry.gauge("weir_server_connections", &[database, shard, role, ("state", state)]);
            PoolMetrics { active: gauge("active"), idle: gauge("idle"), login: gauge("login") }
        };
        let queries = |route: RouteKind, role: Role| {
            let [database, shard, role] = labels(role);
            Published::new(registry.counter("weir_queries_total", &[database, shard, role, ("route", route.as_str())]))
        };
        let endpoint = |name: &String| {
            let labels = [("database", database), ("shard", shard.as_str()), ("endpoint", name.as_str())];
            EndpointMetrics {
                name: name.clone(),
                reads: Published::new(registry.counter("weir_reads_total", &labels)),
                up: registry.gauge("weir_server_up", &labels),
                primary: registry.gauge("weir_server_primary", &labels),
                near: registry.gauge("weir_server_near", &labels),
                lag: registry.gauge("weir_replica_lag_seconds", &labels),
            }
        };
        ShardMetrics {
            pools: Role::ALL.map(pool),
            queries: RouteKind::ALL.map(|route| Role::ALL.map(|role| queries(route, role))),
            endpoints: servers.iter().map(endpoint).collect(),
            primary: AtomicUsize::new(0),
            promotions: registry.counter("weir_promotions_total", &[("database", database), ("shard", shard)]),
            slots: registry.gauge("weir_slots", &[("database", database), ("shard", shard)]),
            load_share: registry.gauge("weir_shard_load_share", &[("database", database), ("shard", shard)]),
            decoding: DecodingMetrics::new(registry, &[("database", database), ("shard", shard)]),
        }
    }
}

/// Slots on their way between shards.
pub struct MoveMetrics {
    /// Moves that are not over.
    pub open: Gauge,
    /// Of those, the ones whose last attempt has failed.
    pub failing: Gauge,
    /// Of those, the ones that something holds up.
    pub waiting: Gauge,
    pub rows_copied: Gauge,
    pub rows_expected: Gauge,
    pub bytes_copied: Gauge,
    pub lag_bytes: Gauge,
    /// How long the last change of owner took.
    pub pause_seconds: Gauge,
}

impl MoveMetrics {
    fn new(registry: &Registry, database: &str) -> Self {
        let gauge = |name| registry.gauge(name, &[("database", database)]);
        MoveMetrics {
            open: gauge("weir_moves"),
            failing: gauge("weir_moves_failing"),
            waiting: gauge("weir_moves_waiting"),
            rows_copied: gauge("weir_move_rows_copied"),
            rows_expected: gauge("weir_move_rows_expected"),
            bytes_copied: gauge("weir_move_bytes_copied"),
            lag_bytes: gauge("weir_move_lag_bytes"),
            pause_seconds: gauge("weir_move_pause_seconds"),
        }
    }

    /// As they are known at the moment, the last one last.
    pub fn publish(&self, moves: &[MoveRow]) {
        let open = || moves.iter().filter(|one| !one.phase.is_final());
        let sum = |figure: fn(&MoveProgress) -> i64| open().map(|one| figure(&one.progress)).sum::<i64>() as f64;
        self.open.set(open().count() as f64);
        self.failing.set(open().filter(|one| one.error.is_some()).count() as f64);
        self.waiting.set(open().filter(|one| one.progress.held.is_some()).count() as f64);
        self.rows_copied.set(sum(|done| done.rows_done));
        self.rows_expected.set(sum(|done| done.rows_total));
        self.bytes_copied.set(sum(|done| done.bytes_done));
        self.lag_bytes.set(open().map(|one| one.progress.lag_bytes).max().unwrap_or_default() as f64);
        let pause_us = moves.iter().rev().find_map(|one| one.progress.paused_us).unwrap_or_default();
        self.pause_seconds.set(pause_us as f64 / 1e6);
    }
}

impl DecodingMetrics {
    fn new(registry: &Registry, labels: &[(&'static str, &str)]) -> Self {
        DecodingMetrics {
            up: registry.gauge("weir_decoding_up", labels),
            lag_bytes: registry.gauge("weir_decoding_lag_bytes", labels),
            lag_seconds: registry.gauge("weir_decoding_lag_seconds", labels),
            waiting: registry.gauge("weir_decoding_waiting_commits", labels),
            transactions: registry.counter("weir_decoding_transactions_total", labels),
            words: registry.counter("weir_decoding_words_total", labels),
            reconnects: registry.counter("weir_decoding_reconnects_total", labels),
        }
    }

    pub fn publish(&self, is_up: bool, counters: &Counters) {
        self.up.set(f64::from(u8::from(is_up)));
        self.lag_bytes.set(counters.lag_bytes.load(Relaxed) as f64);
        self.lag_seconds.set(counters.lag_us.load(Relaxed) as f64 / 1e6);
        self.waiting.set(counters.waiting.load(Relaxed) as f64);
        self.transactions.absolute(counters.transactions.load(Relaxed));
        self.words.absolute(counters.words.load(Relaxed));
        self.reconnects.absolute(counters.reconnects.load(Relaxed));
    }
}

impl EndpointMetrics {
    /// Reads it has answered.
    pub fn reads(&self) -> u64 {
        self.reads.count.value()
    }

    /// What a probe saw. A lag that is not known leaves the last one.
    pub fn probed(&self, is_up: bool, is_primary: bool, is_near: bool, lag: Option<Duration>) {
        self.near.set(f64::from(u8::from(is_near)));
        self.up.set(f64::from(u8::from(is_up)));
        self.primary.set(f64::from(u8::from(is_primary)));
        if let Some(lag) = lag {
            self.lag.set(lag.as_secs_f64());
        }
    }
}

/// One session's way to count; made at its start, with a stripe that is mostly its own.
#[derive(Clone)]
pub struct SessionMetrics {
    database: Arc<DatabaseMetrics>,
    stripe: Stripe,
}

impl SessionMetrics {
    pub(super) fn new(database: Arc<DatabaseMetrics>, stripe: Stripe) -> Self {
        SessionMetrics { database, stripe }
    }

    pub fn database(&self) -> &Arc<DatabaseMetrics> {
        &self.database
    }

    /// One statement was sent to a shard; a scatter counts once per shard.
    pub fn sent_to(&self, route: RouteKind, shard: ShardId, role: Role) {
        if let Some(shard) = self.database.shards.get(usize::from(shard.0)) {
            shard.queries[route as usize][role as usize].count.add(self.stripe, 1);
        }
    }

    /// One statement of the client has its whole answer.
    pub fn query(&self, elapsed: Duration) {
        self.database.query_seconds.record(elapsed.as_secs_f64());
        self.database.totals.queries.add(self.stripe, 1);
        self.database.totals.query_us.add(self.stripe, elapsed.as_micros() as u64);
    }

    pub fn transaction(&self, elapsed: Duration) {
        self.database.transaction_seconds.record(elapsed.as_secs_f64());
        self.database.transactions.count.add(self.stripe, 1);
        self.database.totals.transaction_us.add(self.stripe, elapsed.as_micros() as u64);
    }

    /// A server connection was handed over after this wait.
    pub fn assigned(&self, wait: Duration) {
        self.database.wait_seconds.record(wait.as_secs_f64());
        self.database.totals.server_assignments.add(self.stripe, 1);
        self.database.totals.wait_us.add(self.stripe, wait.as_micros() as u64);
    }

    /// A read was answered by the primary.
    pub fn read_by_primary(&self, shard: ShardId) {
        if let Some(known) = self.database.shards.get(usize::from(shard.0)) {
            self.read_by(shard, known.primary.load(Relaxed));
        }
    }

    /// A read was answered by the server at this place among the shard's.
    pub fn read_by(&self, shard: ShardId, index: usize) {
        if let Some(endpoint) = self.database.endpoint(shard, index) {
            endpoint.reads.count.add(self.stripe, 1);
        }
    }

    /// Counts nothing where there is no replica that could have answered.
    pub fn read_primary(&self, shard: ShardId, because: PrimaryBecause) {
        if self.database.endpoint(shard, 1).is_some() {
            self.database.primary_reads[because as usize].count.add(self.stripe, 1);
        }
    }

    pub fn waited(&self, waited: Waited) {
        self.database.replica_waits[waited as usize].count.add(self.stripe, 1);
    }

    pub fn cache(&self, result: CacheResult) {
        self.database.cache[result.index()].count.add(self.stripe, 1);
    }

    pub fn fill(&self, fill: Fill) {
        self.database.fills[fill_index(fill)].count.add(self.stripe, 1);
    }

    pub fn uncacheable(&self, reason: NoCacheReason) {
        self.database.uncacheable[reason.index()].count.add(self.stripe, 1);
    }

    /// Bytes that came from the client and went to it.
    pub fn traffic(&self, received: u64, sent: u64) {
        self.database.received.count.add(self.stripe, received);
        self.database.sent.count.add(self.stripe, sent);
    }

    pub fn client_parse(&self) {
        self.database.totals.client_parses.add(self.stripe, 1);
    }

    pub fn server_parse(&self) {
        self.database.totals.server_parses.add(self.stripe, 1);
    }

    pub fn bind(&self) {
        self.database.totals.binds.add(self.stripe, 1);
    }

    pub fn login(&self) {
        self.database.totals.client_logins.add(self.stripe, 1);
    }

    /// The session keeps its server connection, for a reason of a closed list.
    pub fn pinned(&self, reason: &'static str) {
        self.database.pins.add(reason);
    }
}
