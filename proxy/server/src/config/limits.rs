//! Pools and what one user or database may have of them, and the bounds of the process.
//!
//! Invariant: a user's word wins over its database's, which wins over `[pool]` and `[limits]`.

use std::collections::BTreeMap;
use std::time::Duration;

use toml::Spanned;
use weir_core::fresh::Level;
use weir_core::pool::Mode;

use super::checked::{Checked, bytes, choice, count, time};
use super::error::Source;
use super::value::Time;
use super::{Config, LimitsConfig, raw};

const MIB: usize = 1 << 20;
const MODES: [(&str, Mode); 3] =
    [("transaction", Mode::Transaction), ("session", Mode::Session), ("statement", Mode::Statement)];

/// Server connections per database, user, shard and role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    pub size: usize,
    /// Connections opened ahead and kept open even when idle; at most `size`.
    pub min: usize,
    /// Connections beyond `size`, for clients that have waited for `reserve_after`.
    pub reserve: usize,
    pub reserve_after: Duration,
    pub mode: Mode,
    /// Clients that may wait for a connection; one more gets 53300.
    pub wait_queue_max: usize,
    /// Longest wait for a connection; then 53300.
    pub wait_max: Duration,
    /// An idle connection is closed after this long.
    pub idle_max: Duration,
    /// A connection is closed at its next idle moment after this long.
    pub lifetime_max: Duration,
}

/// How moves work at their servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReshardConfig {
    /// Connections to each server that rows are copied by at the same time.
    pub copies: usize,
    /// maintenance_work_mem for indexes of a new shard, in bytes; `None`: what the server has.
    pub index_memory: Option<usize>,
    /// max_parallel_maintenance_workers for them; `None`: what the server has.
    pub index_workers: Option<usize>,
}

/// What one user or one database has otherwise than the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Clients at the same time.
    pub connections_max: Option<usize>,
    pub pool_size: Option<usize>,
    pub pool_min: Option<usize>,
    pub pool_reserve: Option<usize>,
    pub pool_mode: Option<Mode>,
    /// How fresh reads are.
    pub freshness: Option<Level>,
}

impl Config {
    /// The pools of one user on one database.
    pub fn pool_of(&self, database: &str, user: &str) -> PoolConfig {
        let mut pool = self.pool.clone();
        for overrides in [self.of_database(database), self.overrides.get(user)].into_iter().flatten() {
            pool.size = overrides.pool_size.unwrap_or(pool.size);
            pool.min = overrides.pool_min.unwrap_or(pool.min);
            pool.reserve = overrides.pool_reserve.unwrap_or(pool.reserve);
            pool.mode = overrides.pool_mode.unwrap_or(pool.mode);
        }
        // A smaller size of a user takes the minimum of its database down with it.
        pool.min = pool.min.min(pool.size);
        pool
    }

    /// How fresh the reads of one user on one database are, and whether it is the user's own section that says so.
    pub fn freshness_of(&self, database: &str, user: &str) -> (Level, bool) {
        let own = self.overrides.get(user).and_then(|user| user.freshness);
        let of_database = || self.of_database(database).and_then(|database| database.freshness).unwrap_or_default();
        own.map_or_else(|| (of_database(), false), |level| (level, true))
    }

    /// Clients that one user may have at the same time, over all databases.
    pub fn user_connections_max(&self, user: &str) -> Option<usize> {
        self.overrides.get(user).and_then(|user| user.connections_max).or(self.limits.user_connections_max)
    }

    /// Clients that one database may have at the same time.
    pub fn database_connections_max(&self, database: &str) -> Option<usize> {
        let own = self.of_database(database).and_then(|database| database.connections_max);
        own.or(self.limits.database_connections_max)
    }

    fn of_database(&self, name: &str) -> Option<&Overrides> {
        self.database(name).or(self.wildcard.as_ref()).map(|database| &database.overrides)
    }
}

impl LimitsConfig {
    /// The shortest time-out of clients that is on.
    pub fn shortest_time_out(&self) -> Option<Duration> {
        [self.idle_client_max, self.idle_in_transaction_max, self.query_time_max, self.transaction_time_max]
            .into_iter()
            .flatten()
            .min()
    }
}

/// `[user.<name>]`.
pub(super) fn of_users(
    source: &Source,
    raw: &BTreeMap<String, raw::Overrides>,
) -> Checked<BTreeMap<String, Overrides>> {
    raw.iter().map(|(name, user)| Ok((name.clone(), overrides(source, user)?))).collect()
}

pub(super) fn overrides(source: &Source, raw: &raw::Overrides) -> Checked<Overrides> {
    let found = Overrides {
        connections_max: some_count(source, raw.connections_max.as_ref(), "connections_max")?,
        pool_size: some(source, raw.pool_size.as_ref(), "pool_size", 1..=10_000)?,
        pool_min: some(source, raw.pool_min.as_ref(), "pool_min", 0..=10_000)?,
        pool_reserve: some(source, raw.pool_reserve.as_ref(), "pool_reserve", 0..=10_000)?,
        pool_mode: raw.pool_mode.as_ref().map(|mode| choice(source, mode, "pool mode", &MODES)).transpose()?,
        freshness: raw.freshness.as_ref().map(|level| freshness(source, level)).transpose()?,
    };
    if let (Some(size), Some(min), Some(raw_min)) = (found.pool_size, found.pool_min, &raw.pool_min)
        && min > size
    {
        return Err(source.error(raw_min.span(), format!("pool_min is {min}, more than pool_size {size}")));
    }
    Ok(found)
}

/// Where a replica replays as it should, what it lacks is there within a few milliseconds.
pub(super) const REPLICA_WAIT_MAX: Duration = Duration::from_millis(5);
/// Who would wait longer is better served at a looser level.
const LONGEST_REPLICA_WAIT: Duration = Duration::from_secs(1);

/// `None`: reads never wait for a replica.
pub(super) fn replica_wait_max(source: &Source, raw: Option<&Spanned<Time>>) -> Checked<Option<Duration>> {
    let wait_max = raw.map_or(REPLICA_WAIT_MAX, |raw| raw.get_ref().0);
    match raw {
        Some(raw) if wait_max > LONGEST_REPLICA_WAIT => {
            Err(source.error(raw.span(), format!("replica_wait_max is more than {LONGEST_REPLICA_WAIT:?}")))
        }
        _ => Ok(Some(wait_max).filter(|wait_max| !wait_max.is_zero())),
    }
}

fn freshness(source: &Source, raw: &Spanned<String>) -> Checked<Level> {
    Level::parse(raw.get_ref()).ok_or_else(|| {
        let message = format!("unknown freshness level `{}`", raw.get_ref());
        source.error(raw.span(), message).hint(format!("known: {}", Level::SPELLINGS))
    })
}

pub(super) fn pool(source: &Source, raw: &raw::Pool) -> Checked<PoolConfig> {
    let size = count(source, raw.size.as_ref(), "size", 1..=10_000, 20)?;
    let min = count(source, raw.min.as_ref(), "min", 0..=10_000, 0)?;
    if let (true, Some(raw_min)) = (min > size, &raw.min) {
        return Err(source.error(raw_min.span(), format!("min is {min}, more than size {size}")));
    }
    Ok(PoolConfig {
        size,
        min,
        reserve: count(source, raw.reserve.as_ref(), "reserve", 0..=10_000, 0)?,
        reserve_after: time(source, raw.reserve_after.as_ref(), "reserve_after", Duration::from_secs(3))?,
        mode: raw.mode.as_ref().map_or(Ok(Mode::Transaction), |mode| choice(source, mode, "pool mode", &MODES))?,
        wait_queue_max: count(source, raw.wait_queue_max.as_ref(), "wait_queue_max", 0..=1_000_000, 10_000)?,
        wait_max: time(source, raw.wait_max.as_ref(), "wait_max", Duration::from_secs(5))?,
        idle_max: time(source, raw.idle_max.as_ref(), "idle_max", Duration::from_secs(600))?,
        lifetime_max: time(source, raw.lifetime_max.as_ref(), "lifetime_max", Duration::from_secs(3600))?,
    })
}

pub(super) fn limits(source: &Source, raw: &raw::Limits) -> Checked<LimitsConfig> {
    let second = Duration::from_secs(1);
    let clients = raw.client_connections_max.as_ref();
    let databases = raw.wildcard_databases_max.as_ref();
    let prepared = raw.prepared_per_server_max.as_ref();
    Ok(LimitsConfig {
        client_connections_max: count(source, clients, "client_connections_max", 1..=1_000_000, 10_000)?,
        user_connections_max: some_count(source, raw.user_connections_max.as_ref(), "user_connections_max")?,
        database_connections_max: some_count(
            source,
            raw.database_connections_max.as_ref(),
            "database_connections_max",
        )?,
        wildcard_databases_max: count(source, databases, "wildcard_databases_max", 1..=100_000, 1000)?,
        wildcard_idle_max: time(source, raw.wildcard_idle_max.as_ref(), "wildcard_idle_max", 60 * second)?,
        idle_client_max: some_time(source, raw.idle_client_max.as_ref(), "idle_client_max")?,
        idle_in_transaction_max: some_time(source, raw.idle_in_transaction_max.as_ref(), "idle_in_transaction_max")?,
        query_time_max: some_time(source, raw.query_time_max.as_ref(), "query_time_max")?,
        transaction_time_max: some_time(source, raw.transaction_time_max.as_ref(), "transaction_time_max")?,
        login_time_max: time(source, raw.login_time_max.as_ref(), "login_time_max", 60 * second)?,
        connect_time_max: time(source, raw.connect_time_max.as_ref(), "connect_time_max", 5 * second)?,
        message_bytes_max: bytes(source, raw.message_bytes_max.as_ref(), "message_bytes_max", 256 * MIB)?,
        merge_bytes_max: bytes(source, raw.merge_bytes_max.as_ref(), "merge_bytes_max", 64 * MIB)?,
        merge_groups_max: count(source, raw.merge_groups_max.as_ref(), "merge_groups_max", 1..=100_000_000, 100_000)?,
        prepared_per_server_max: count(source, prepared, "prepared_per_server_max", 1..=100_000, 500)?,
        sequence_block: count(source, raw.sequence_block.as_ref(), "sequence_block", 1..=1_000_000, 1000)?,
        drain_time_max: time(source, raw.drain_time_max.as_ref(), "drain_time_max", 30 * second)?,
    })
}

pub(super) fn reshard(source: &Source, raw: &raw::Reshard) -> Checked<ReshardConfig> {
    let memory = raw.index_memory.as_ref();
    Ok(ReshardConfig {
        copies: count(source, raw.copies.as_ref(), "copies", 1..=32, 2)?,
        index_memory: memory.map(|memory| bytes(source, Some(memory), "index_memory", 0)).transpose()?,
        index_workers: some(source, raw.index_workers.as_ref(), "index_workers", 0..=64)?,
    })
}

fn some(
    source: &Source,
    raw: Option<&Spanned<i64>>,
    key: &str,
    range: std::ops::RangeInclusive<i64>,
) -> Checked<Option<usize>> {
    raw.map(|raw| count(source, Some(raw), key, range, 0)).transpose()
}

fn some_count(source: &Source, raw: Option<&Spanned<i64>>, key: &str) -> Checked<Option<usize>> {
    some(source, raw, key, 1..=1_000_000)
}

fn some_time(source: &Source, raw: Option<&Spanned<Time>>, key: &str) -> Checked<Option<Duration>> {
    raw.map(|raw| time(source, Some(raw), key, Duration::ZERO)).transpose()
}

#[cfg(test)]
impl Default for LimitsConfig {
    fn default() -> Self {
        limits(&Source::none(), &raw::Limits::default()).expect("the defaults are valid")
    }
}

#[cfg(test)]
impl Default for ReshardConfig {
    fn default() -> Self {
        reshard(&Source::none(), &raw::Reshard::default()).expect("the defaults are valid")
    }
}
