//! Everything counted, under Prometheus names with the prefix `weir_`.
//!
//! Invariant: the query path only touches handles that were registered when its database was; it never hashes a name or
//! a label. Labels are bounded: databases, shards and servers of the config, the first databases of a wildcard, and
//! closed lists of reasons.
//!
//! Choice: one counter shared by two threads costs 104 ns per increment, alone 9 ns. So what every statement counts is
//! [`Striped`] (a session has a stripe of its own, most stripes have one writer at a time) and is summed when rendered.
//! Gauges and histograms are the `metrics` crate's handles: 9 and 42 ns.
//! Non-goals: the exporter's socket (see `http`), and percentiles (histograms have buckets; the reader aggregates).

mod cached;
mod database;
mod stripe;
mod tally;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusRecorder};
use parking_lot::Mutex;

pub use cached::{CacheResult, Fill, SharedMetrics};
pub use database::{DatabaseMetrics, EndpointMetrics, PoolMetrics, Role, RouteKind, SessionMetrics};
pub use stripe::{Stripe, Striped};
pub use tally::Tally;

/// 50 µs to 10 s: a cache hit is far below a millisecond, a bad query above a second.
const SECONDS: [f64; 17] =
    [5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
const METADATA: Metadata<'static> = Metadata::new("weir", Level::INFO, None);

/// Databases with figures of their own.
const ENROLLED_MAX: usize = 200;
/// The label that all further ones share.
const OTHERS: &str = "*";

/// Name, type and help of every metric.
const DESCRIBED: [(&str, Type, &str); 48] = [
    ("weir_client_connections", Type::Gauge, "Client connections of a database by state (active, idle, waiting)."),
    ("weir_server_connections", Type::Gauge, "Server connections by shard, role and state (active, idle, login)."),
    ("weir_query_duration_seconds", Type::Histogram, "From the statement's arrival to the end of its reply."),
    ("weir_transaction_duration_seconds", Type::Histogram, "From a transaction's first statement to its end."),
    ("weir_pool_wait_duration_seconds", Type::Histogram, "Wait of a client for a server connection."),
    ("weir_queries_total", Type::Counter, "Statements sent to servers by route, shard and role."),
    ("weir_transactions_total", Type::Counter, "Transactions, autocommit statements included."),
    ("weir_client_received_bytes_total", Type::Counter, "Bytes received from clients."),
    ("weir_client_sent_bytes_total", Type::Counter, "Bytes sent to clients."),
    ("weir_errors_total", Type::Counter, "Errors sent to clients by SQLSTATE, the servers' own included."),
    ("weir_reads_total", Type::Counter, "Reads by the server that answered them."),
    ("weir_replica_lag_seconds", Type::Gauge, "Replay lag of a replica at its last probe."),
    ("weir_server_up", Type::Gauge, "1 when the last probe of the server succeeded."),
    ("weir_server_primary", Type::Gauge, "1 for the server that is its shard's primary."),
    ("weir_server_near", Type::Gauge, "1 for a server in this proxy's zone, or if that has none."),
    ("weir_promotions_total", Type::Counter, "Times when a shard's primary was replaced, or given up as one."),
    (
        "weir_primary_reads_total",
        Type::Counter,
        "Reads that the primary answered though a replica might have, by reason.",
    ),
    (
        "weir_replica_waits_total",
        Type::Counter,
        "Reads that waited for a replica which was nearly far enough, by what came of it.",
    ),
    ("weir_hot_key_share", Type::Gauge, "Share of the hottest key, or table without one, in all uses of keys."),
    ("weir_cache_requests_total", Type::Counter, "Cacheable reads by what the cache said."),
    ("weir_cache_fills_total", Type::Counter, "Replies that were to be cached, by what became of them."),
    ("weir_cache_uncacheable_total", Type::Counter, "Reads of one shard that may not be cached, by reason."),
    ("weir_cache_leases_total", Type::Counter, "Fills of which proxies agreed that one does them, by what came of it."),
    ("weir_redis_servers", Type::Gauge, "Redis servers that hold cached replies, by state (up, down)."),
    ("weir_slots", Type::Gauge, "Slots owned by a shard."),
    (
        "weir_shard_load_share",
        Type::Gauge,
        "Share of a shard's slots in the time of all statements that one key routes, lately.",
    ),
    ("weir_hot_slot_share", Type::Gauge, "The same of the slot that has most."),
    ("weir_topology_epoch", Type::Gauge, "Epoch of the slot map in force."),
    (
        "weir_hub_behind",
        Type::Gauge,
        "1 if the hub shows an older map than the one in force, or another one under its number.",
    ),
    ("weir_moves", Type::Gauge, "Moves of slots between shards that are not over."),
    ("weir_moves_failing", Type::Gauge, "Moves whose last attempt has failed."),
    ("weir_moves_waiting", Type::Gauge, "Moves that wait: paused in their copy, held by a limit, or for other moves."),
    ("weir_move_rows_copied", Type::Gauge, "Rows that moves which are not over have copied."),
    ("weir_move_rows_expected", Type::Gauge, "Rows that they are expected to copy, estimated until the copy is done."),
    ("weir_move_bytes_copied", Type::Gauge, "Bytes that they have copied."),
    ("weir_move_lag_bytes", Type::Gauge, "WAL that is still to be applied by the move that is furthest behind."),
    ("weir_move_pause_seconds", Type::Gauge, "How long the last change of owner made statements of its slots wait."),
    ("weir_pins_total", Type::Counter, "Sessions that kept their server connection, by reason."),
    (
        "weir_decoding_up",
        Type::Gauge,
        "1 while a shard's WAL is followed, here or by a peer, so that writes beside weir are seen.",
    ),
    ("weir_decoding_lag_bytes", Type::Gauge, "WAL of a shard that is written and not decoded yet."),
    ("weir_decoding_lag_seconds", Type::Gauge, "From the last decoded commit to its arrival, by the server's clock."),
    ("weir_decoding_waiting_commits", Type::Gauge, "Decoded commits that the primary does not show yet."),
    (
        "weir_decoding_transactions_total",
        Type::Counter,
        "Transactions that were decoded and wrote something weir reads.",
    ),
    ("weir_decoding_words_total", Type::Counter, "Dependency words moved by them."),
    ("weir_decoding_reconnects_total", Type::Counter, "Streams that ended; each voids the shard's cache."),
    ("weir_hub_up", Type::Gauge, "1 when the hub answered last time; 0 leaves the last slot map in force."),
    ("weir_config_last_reload_success", Type::Gauge, "1 when the last start or reload of the configuration succeeded."),
    ("weir_build_info", Type::Gauge, "Always 1; the version is a label."),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Type {
    Counter,
    Gauge,
    Histogram,
}

/// All metrics of one process.
pub struct Metrics {
    registry: Registry,
    databases: Mutex<BTreeMap<String, Arc<DatabaseMetrics>>>,
    errors: Tally,
    hub_up: Gauge,
    reload_success: Gauge,
    pub shared: SharedMetrics,
    sessions: AtomicUsize,
}

/// What is to be counted of one database: its shards in order, each with its servers as `host:port`.
#[derive(Clone, Debug)]
pub struct Subject {
    pub database: String,
    pub shards: Vec<(String, Vec<String>)>,
}

impl Metrics {
    /// Registers everything that is known in advance.
    pub fn new(subjects: &[Subject]) -> Result<Self, BuildError> {
        let registry = Registry::new()?;
        let databases = subjects
            .iter()
            .map(|subject| (subject.database.clone(), DatabaseMetrics::new(&registry, subject)))
            .collect();
        registry.gauge("weir_build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        let reload_success = registry.gauge("weir_config_last_reload_success", &[]);
        reload_success.set(1.0);
        Ok(Metrics {
            hub_up: registry.gauge("weir_hub_up", &[]),
            reload_success,
            shared: SharedMetrics::new(&registry),
            errors: Tally::default(),
            sessions: AtomicUsize::new(0),
            databases: Mutex::new(databases),
            registry,
        })
    }

    /// Handles of a database that was not known in advance. Handles are for ever, so beyond [`ENROLLED_MAX`] names all
    /// others share those of `subject.database` = [`OTHERS`].
    pub fn enroll(&self, subject: &Subject) -> Arc<DatabaseMetrics> {
        let mut databases = self.databases.lock();
        let known = databases.len();
        if let Some(database) = databases.get(&subject.database) {
            return Arc::clone(database);
        }
        let named = if known < ENROLLED_MAX {
            subject.clone()
        } else {
            Subject { database: OTHERS.to_owned(), ..subject.clone() }
        };
        let database =
            databases.entry(named.database.clone()).or_insert_with(|| DatabaseMetrics::new(&self.registry, &named));
        Arc::clone(database)
    }

    /// Handles of a shard that joins a database.
    pub fn add_shard(&self, database: &DatabaseMetrics, shard: &(String, Vec<String>)) {
        database.add_shard(&self.registry, shard);
    }

    /// Handles of a database; looked up once per session.
    pub fn database(&self, name: &str) -> Option<Arc<DatabaseMetrics>> {
        self.databases.lock().get(name).cloned()
    }

    /// The number of a new session, from 1, and its own view of its database, with the next stripe.
    pub fn session(&self, database: &Arc<DatabaseMetrics>) -> (u64, SessionMetrics) {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        (number as u64 + 1, SessionMetrics::new(Arc::clone(database), Stripe::of(number)))
    }

    /// An error was sent to a client. Cold: takes a lock.
    pub fn error(&self, sqlstate: &str) {
        let is_code = sqlstate.len() == 5 && sqlstate.bytes().all(|byte| byte.is_ascii_alphanumeric());
        self.errors.add(if is_code { sqlstate } else { "other" });
    }

    pub fn set_hub_up(&self, is_up: bool) {
        self.hub_up.set(f64::from(u8::from(is_up)));
    }

    pub fn set_reload_success(&self, succeeded: bool) {
        self.reload_success.set(f64::from(u8::from(succeeded)));
    }

    /// To be called every few seconds: folds recorded samples into buckets, which would otherwise pile up.
    pub fn upkeep(&self) {
        self.registry.recorder.handle().run_upkeep();
    }

    /// To be called once a period: what SHOW STATS calls averages is measured over the last one.
    pub fn tick(&self, period: Duration) {
        for database in self.databases.lock().values() {
            database.tick(period);
        }
    }

    /// The text that /metrics answers.
    pub fn render(&self) -> String {
        for database in self.databases.lock().values() {
            database.publish(&self.registry);
        }
        self.errors.publish(&self.registry, "weir_errors_total", "sqlstate", &[]);
        self.registry.recorder.handle().render()
    }
}

/// Registers handles without the global recorder.
struct Registry {
    recorder: PrometheusRecorder,
}

impl Registry {
    fn new() -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, _, _) in DESCRIBED.iter().filter(|(_, kind, _)| *kind == Type::Histogram) {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), &SECONDS)?;
        }
        let recorder = builder.build_recorder();
        for (name, kind, help) in DESCRIBED {
            let name = KeyName::from_const_str(name);
            match kind {
                Type::Counter => recorder.describe_counter(name, None, help.into()),
                Type::Gauge => recorder.describe_gauge(name, None, help.into()),
                Type::Histogram => recorder.describe_histogram(name, None, help.into()),
            }
        }
        Ok(Registry { recorder })
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    Key::from_parts(name, labels.iter().map(|(name, value)| Label::new(*name, (*value).to_owned())).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests;
