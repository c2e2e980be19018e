//! Is a server there, what role has it, how far has it replayed: asked once a second on a connection of its own.
//!
//! Invariant: [`EndpointHealth`] is the state and is moved by two functions that take time and jitter as arguments; the
//! task around it only asks and sleeps. [`EndpointView`] is what others read, without locks.
//! Non-goals: deciding freshness. The replay position here is a hint up to a second old; a read that must be fresh asks
//! on its own connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_postgres::Client;
use weir_core::election::{Report, Role, Seen};
use weir_core::id::Lsn;

use crate::config::{Endpoint, ServerAuth, ShardConfig};
use crate::control::{OpenError, Target};
use crate::roles::{Roles, Route};

/// Pause between probes of a server that answers.
const EVERY: Duration = Duration::from_secs(1);
/// The same while its shard has no primary, and the shortest pause of all.
const EVERY_VACANT: Duration = Duration::from_millis(100);
/// First and longest pause after failures; it doubles in between.
const BACKOFF: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a connection or an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// By then every server has answered, or failed to, for the first time.
pub const FIRST_WORD_MAX: Duration = Duration::from_secs(5);
/// Stands for "not known" in the atomic.
const NO_LAG: u64 = u64::MAX;

/// What one successful probe saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    pub report: Report,
    /// `None` on a primary, and on a standby that has replayed nothing yet.
    pub lag: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet probed.
    Unknown,
    Up(Observation),
    /// `failures` in a row; the last one with `error`.
    Down {
        failures: u32,
        error: String,
    },
}

/// State of one server and when to ask it again.
#[derive(Clone, Debug)]
pub struct EndpointHealth {
    health: Health,
    next: Duration,
}

impl EndpointHealth {
    pub fn new() -> Self {
        EndpointHealth { health: Health::Unknown, next: Duration::ZERO }
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// When the next probe is due, on the clock of the caller's `now`.
    pub fn next(&self) -> Duration {
        self.next
    }

    pub fn succeeded(&mut self, now: Duration, observation: Observation) {
        self.health = Health::Up(observation);
        self.next = now + EVERY;
    }

    /// `jitter` in 0..1 spreads the retries of many proxies over half to all of the pause.
    pub fn failed(&mut self, now: Duration, jitter: f64, error: String) {
        let failures = match self.health {
            Health::Down { failures, .. } => failures.saturating_add(1),
            Health::Unknown | Health::Up(_) => 1,
        };
        let pause = BACKOFF.saturating_mul(1 << (failures - 1).min(10)).min(BACKOFF_MAX);
        self.health = Health::Down { failures, error };
        self.next = now + pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
    }
}

impl Default for EndpointHealth {
    fn default() -> Self {
        Self::new()
    }
}

/// What the last probe found, readable from any thread at the cost of a load.
#[derive(Debug)]
pub struct EndpointView {
    pub endpoint: Arc<Endpoint>,
    /// 0 unknown, 1 up, 2 down.
    state: AtomicU8,
    has_been_up: AtomicBool,
    in_recovery: AtomicBool,
    replay_lsn: AtomicU64,
    lag_ms: AtomicU64,
    last_error: Mutex<Option<String>>,
    report: Mutex<Option<Report>>,
    role: Mutex<Role>,
    /// Is `role` that of a replica? For reads, which must not lock anything.
    is_replica: AtomicBool,
}

impl EndpointView {
    pub fn new(endpoint: Endpoint) -> Arc<Self> {
        Arc::new(EndpointView {
            endpoint: Arc::new(endpoint),
            state: AtomicU8::new(0),
            has_been_up: AtomicBool::new(false),
            in_recovery: AtomicBool::new(false),
            replay_lsn: AtomicU64::new(0),
            lag_ms: AtomicU64::new(NO_LAG),
            last_error: Mutex::new(None),
            report: Mutex::new(None),
            role: Mutex::new(Role::Away),
            is_replica: AtomicBool::new(false),
        })
    }

    pub fn is_up(&self) -> bool {
        self.state.load(Ordering::Acquire) == 1
    }

    /// Has no probe ended yet?
    pub fn is_unknown(&self) -> bool {
        self.state.load(Ordering::Acquire) == 0
    }

    /// For readiness: reached at least once since the start.
    pub fn has_been_up(&self) -> bool {
        self.has_been_up.load(Ordering::Acquire)
    }

    /// Of the last probe that succeeded.
    pub fn in_recovery(&self) -> bool {
        self.in_recovery.load(Ordering::Acquire)
    }

    /// A hint, up to a probe interval old; zero before the first probe.
    pub fn replay_lsn(&self) -> Lsn {
        Lsn(self.replay_lsn.load(Ordering::Acquire))
    }

    pub fn lag_ms(&self) -> Option<u64> {
        Some(self.lag_ms.load(Ordering::Acquire)).filter(|lag| *lag != NO_LAG)
    }

    /// What is known of it, for the choice of a primary.
    pub fn seen(&self) -> Seen {
        match (self.state.load(Ordering::Acquire), *self.report.lock()) {
            (1, Some(report)) => Seen::Up(report),
            (0, _) => Seen::Unknown,
            _ => Seen::Down,
        }
    }

    /// What the last probe that succeeded was told.
    pub fn last_report(&self) -> Option<Report> {
        *self.report.lock()
    }

    pub fn role(&self) -> Role {
        *self.role.lock()
    }

    pub fn take_role(&self, role: Role) {
        let before = std::mem::replace(&mut *self.role.lock(), role);
        self.is_replica.store(role == Role::Replica, Ordering::SeqCst);
        if role != before && matches!(role, Role::Superseded | Role::OtherTimeline | Role::Foreign) {
            tracing::warn!(server = %self.endpoint, role = role.as_str(), "this server is not used");
        }
    }

    /// Does it follow the primary in force?
    pub fn is_replica(&self) -> bool {
        self.is_replica.load(Ordering::SeqCst)
    }

    /// Why the last failed probe failed; kept after recovery, for people.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Makes a state visible. `state` is stored last, so that whoever sees "up" sees what belongs to it.
    pub fn publish(&self, health: &Health) {
        match health {
            Health::Unknown => self.state.store(0, Ordering::Release),
            Health::Up(observation) => {
                let lag = observation.lag.map_or(NO_LAG, |lag| lag.as_millis() as u64);
                *self.report.lock() = Some(observation.report);
                self.in_recovery.store(observation.report.in_recovery, Ordering::Release);
                self.replay_lsn.store(observation.report.position.0, Ordering::Release);
                self.lag_ms.store(lag, Ordering::Release);
                self.has_been_up.store(true, Ordering::Release);
                self.state.store(1, Ordering::Release);
            }
            Health::Down { error, .. } => {
                *self.last_error.lock() = Some(error.clone());
                self.state.store(2, Ordering::Release);
            }
        }
    }
}

/// A standby that is connected and has replayed all it received has no lag, however old its last transaction is. The timeline it
/// receives is shown to `pg_read_all_stats` only; that of its last restart point is never ahead of it.
const QUESTION: &str = "
SELECT r, CASE WHEN r THEN coalesce(pg_last_wal_replay_lsn(), '0/0') ELSE pg_current_wal_insert_lsn() END::text,
       CASE WHEN NOT r THEN NULL
            WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN 0
            ELSE greatest(0, extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp()) * 1000)::bigint END,
       (pg_control_system()).system_identifier,
       CASE WHEN r THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver), (pg_control_checkpoint()).timeline_id)
            ELSE ('x' || substring(pg_walfile_name(pg_current_wal_insert_lsn()) for 8))::bit(32)::int END,
       (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint
FROM pg_is_in_recovery() AS r";

/// A server as it is probed.
pub fn prepared(mut server: Target) -> Target {
    server.config.application_name("weir probe").connect_timeout(PATIENCE);
    server
}

/// The same for a server of a shard.
pub fn target(view: &EndpointView, auth: &ServerAuth, database: &str) -> Target {
    let mut config = tokio_postgres::Config::new();
    config.user(&auth.user).dbname(database);
    if let Some(password) = auth.password(&view.endpoint.host, view.endpoint.port, database) {
        config.password(password);
    }
    prepared(Target::routed(config, Route::Server(Arc::clone(&view.endpoint)), auth.tls.clone()))
}

/// The servers of a shard, each asked once: for commands, which do not go on asking.
pub async fn once(shard: &ShardConfig, auth: &ServerAuth, database: &str) -> Arc<Roles> {
    let views: Vec<_> =
        std::iter::once(&shard.primary).chain(&shard.replicas).map(|at| EndpointView::new(at.clone())).collect();
    let roles = Roles::new(&shard.name, views.clone());
    for view in views {
        let server = target(&view, auth, database);
        let answer = tokio::time::timeout(2 * PATIENCE, probe(&server, &mut None)).await;
        let health = match answer.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
            Ok(observation) => Health::Up(observation),
            Err(error) => Health::Down { failures: 1, error },
        };
        view.publish(&health);
    }
    roles.look();
    roles
}

/// Probes one server for ever; dropping the future ends it and its connection.
pub async fn run(view: Arc<EndpointView>, roles: Arc<Roles>, server: Target) {
    let start = Instant::now();
    let mut health = EndpointHealth::new();
    let mut client = None;
    let mut doubts = roles.doubts();
    loop {
        let was_up = matches!(health.health(), Health::Up(_));
        let answer = tokio::time::timeout(2 * PATIENCE, probe(&server, &mut client)).await;
        match answer.unwrap_or_else(|_| Err(format!("no answer within {}s", 2 * PATIENCE.as_secs()))) {
            Ok(observation) => health.succeeded(start.elapsed(), observation),
            Err(error) => {
                client = None;
                health.failed(start.elapsed(), rand::random(), error);
            }
        }
        view.publish(health.health());
        roles.look();
        match health.health() {
            Health::Up(seen) if !was_up => {
                let in_recovery = seen.report.in_recovery;
                tracing::info!(server = %view.endpoint, in_recovery, "server is up");
            }
            Health::Down { failures: 1, error } => tracing::warn!(server = %view.endpoint, %error, "server is down"),
            _ => {}
        }
        wait(&roles, &health, start, &mut doubts).await;
    }
}

/// Until the server is to be asked again: soon, if its shard looks for a primary.
async fn wait(roles: &Roles, health: &EndpointHealth, start: Instant, doubts: &mut watch::Receiver<()>) {
    // Also after a doubt: many may doubt at once.
    tokio::time::sleep(EVERY_VACANT).await;
    if roles.is_vacant() && matches!(health.health(), Health::Up(_)) {
        return;
    }
    let pause = health.next().saturating_sub(start.elapsed());
    // The sender lives as long as the shard.
    let _ = tokio::time::timeout(pause, doubts.changed()).await;
}

/// Asks on the open connection, or opens one first.
async fn probe(server: &Target, client: &mut Option<Client>) -> Result<Observation, String> {
    let open = match client {
        Some(open) if !open.is_closed() => open,
        _ => client.insert(server.open().await.map_err(|error| match error {
            OpenError::Driver(error) => sentence(&error),
            other => other.to_string(),
        })?),
    };
    let row = open.query_one(QUESTION, &[]).await.map_err(|error| sentence(&error))?;
    let lsn: String = row.try_get(1).map_err(|error| sentence(&error))?;
    let position = Lsn::parse(&lsn).ok_or_else(|| format!("{lsn} is not a WAL position"))?;
    let read = || -> Result<_, tokio_postgres::Error> {
        let report = Report {
            in_recovery: row.try_get(0)?,
            system: row.try_get::<_, i64>(3)? as u64,
            timeline: row.try_get::<_, i32>(4)? as u32,
            position,
            started: row.try_get(5)?,
        };
        let lag = row.try_get::<_, Option<i64>>(2)?;
        Ok(Observation { report, lag: lag.map(|lag_ms| Duration::from_millis(lag_ms.max(0) as u64)) })
    };
    read().map_err(|error| sentence(&error))
}

/// The error with its causes: tokio-postgres alone would say "db error".
fn sentence(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: Report = Report { in_recovery: true, system: 1, timeline: 1, position: Lsn(77), started: 1 };
    const SEEN: Observation = Observation { report: REPORT, lag: Some(Duration::from_millis(5)) };

    #[test]
    fn failures_back_off_and_success_resets() {
        let mut health = EndpointHealth::new();
        let now = Duration::from_secs(100);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            health.failed(now, 1.0, "refused".into());
            pauses.push(health.next().checked_sub(now).unwrap().as_millis());
        }
        assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 5000, 5000, 5000]);
        health.failed(now, 0.0, "refused".into());
        assert_eq!(health.next().checked_sub(now).unwrap(), BACKOFF_MAX / 2, "jitter halves at most");
        assert!(matches!(health.health(), Health::Down { failures: 9, .. }));
        health.succeeded(now, SEEN);
        assert_eq!((health.health(), health.next()), (&Health::Up(SEEN), now + EVERY));
        health.failed(now, 1.0, "gone".into());
        assert_eq!(health.next().checked_sub(now).unwrap(), BACKOFF, "a new outage starts over");
    }

    #[test]
    fn a_very_long_outage_does_not_overflow() {
        let mut health =
            EndpointHealth { health: Health::Down { failures: u32::MAX, error: String::new() }, next: Duration::ZERO };
        health.failed(Duration::ZERO, 1.0, "still".into());
        assert_eq!(health.next(), BACKOFF_MAX);
    }

    #[test]
    fn the_view_shows_the_last_state() {
        let view = EndpointView::new(Endpoint { host: "h".into(), port: 1 });
        assert_eq!(view.seen(), Seen::Unknown);
        assert!(view.is_unknown() && !view.is_up() && !view.has_been_up());
        view.publish(&Health::Up(SEEN));
        assert!(view.is_up() && view.in_recovery() && view.has_been_up());
        assert_eq!((view.replay_lsn(), view.lag_ms(), view.seen()), (Lsn(77), Some(5), Seen::Up(REPORT)));
        view.publish(&Health::Down { failures: 1, error: "gone".into() });
        assert!(!view.is_up() && view.has_been_up());
        assert_eq!((view.last_error().as_deref(), view.seen()), (Some("gone"), Seen::Down));
        assert_eq!(view.last_report(), Some(REPORT), "for people");
        view.publish(&Health::Up(Observation { report: Report { in_recovery: false, ..REPORT }, lag: None }));
        assert_eq!((view.in_recovery(), view.lag_ms()), (false, None));
    }
}
