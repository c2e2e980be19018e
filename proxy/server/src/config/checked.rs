//! Raw file → [`Config`]: every rule the file must satisfy, each failing with its line.
//!
//! Non-goals: no sockets and no name look-ups. The only reading done here is of the secret files that the file names.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use weir_core::id::{ShardId, Slot};

use super::error::{Source, nearest};
use super::raw;
use super::value::{Size, Time};
use super::{
    CacheConfig, Config, ConfigError, DatabaseConfig, Endpoint, Freshness, HubConfig, LimitsConfig, LogConfig,
    LogFormat, LogLevel, PoolConfig, Secret, ServerAuth, ShardConfig, TlsConfig, TlsMode, Users,
};

mod table;

/// Permission bits that a secret file must not have: anything for group and others.
pub(super) const OTHERS: u32 = 0o077;
/// For a TLS key, whose group may be a certificate group: anything for others.
const WORLD: u32 = 0o007;
/// Names that lead to the admin console.
const ADMIN_DATABASES: [&str; 2] = ["weir", "pgbouncer"];
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Checked<T> = Result<T, ConfigError>;

pub(super) fn check(source: Source) -> Checked<Config> {
    let file: raw::File = source.parse()?;
    let users_file = absolute(&source, file.users_file.get_ref());
    let users = Users::load(&users_file)?;
    let databases = databases(&source, file.database)?;
    let hub = file.hub.map(|hub| hub_of(&source, hub)).transpose()?;
    if let (None, Some(database)) = (&hub, databases.iter().find(|database| database.shards.len() > 1)) {
        let message =
            format!("database `{}` has {} shards but there is no [hub]", database.name, database.shards.len());
        return Err(source.whole(message).hint("the hub keeps the slot map: add [hub] with dsn = \"postgres://…\""));
    }
    Ok(Config {
        listen: address(&source, &file.listen)?,
        http_listen: address(&source, &file.http_listen)?,
        users_file,
        workers: count(&source, file.workers.as_ref(), "workers", 1..=1024, default_workers())?,
        hub,
        databases,
        pool: pool(&source, &file.pool)?,
        limits: limits(&source, &file.limits)?,
        cache: cache(&source, &file.cache)?,
        tls: file.tls.map(|tls| tls_of(&source, &tls)).transpose()?,
        server_auth: server_auth(&source, &file.server_auth)?,
        log: log(&source, &file.log)?,
        admin_users: known_users(&source, &file.admin_users, &users)?,
        stats_users: known_users(&source, &file.stats_users, &users)?,
        users,
        path: source.path,
    })
}

/// Half of the cores. A relayed statement is nine tenths kernel work, some of it on behalf of the servers beside weir, and a
/// second worker costs each statement wake-ups across cores: on two cores one worker relays as many statements as two do, for
/// a seventh less CPU each.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

// ---- databases ----

fn databases(
    source: &Source,
    raw: std::collections::BTreeMap<Spanned<String>, raw::Database>,
) -> Checked<Vec<DatabaseConfig>> {
    if raw.is_empty() {
        return Err(source
            .whole("no database is configured")
            .hint("add [database.<name>] with one [[database.<name>.shard]]"));
    }
    raw.into_iter().map(|(name, database)| database_of(source, &name, &database)).collect()
}

fn database_of(source: &Source, name: &Spanned<String>, raw: &raw::Database) -> Checked<DatabaseConfig> {
    let place = name.span();
    if ADMIN_DATABASES.contains(&name.get_ref().as_str()) {
        return Err(source.error(place, format!("`{}` is the admin console and cannot be a database", name.get_ref())));
    }
    if raw.shard.is_empty() {
        let hint = format!("add [[database.{}.shard]] with name and primary", name.get_ref());
        return Err(source.error(place, format!("database `{}` has no shard", name.get_ref())).hint(hint));
    }
    if raw.shard.len() > Slot::COUNT {
        return Err(source.error(place, format!("more shards than the {} slots", Slot::COUNT)));
    }
    let shards = raw.shard.iter().map(|shard| shard_of(source, shard)).collect::<Checked<Vec<_>>>()?;
    distinct_shards(source, raw)?;
    let home = match &raw.home {
        None => ShardId(0),
        Some(home) => home_of(source, home, &shards)?,
    };
    let server_database = match &raw.server_database {
        None => name.get_ref().clone(),
        Some(text) => non_empty(source, text, "server_database")?,
    };
    Ok(DatabaseConfig {
        name: non_empty(source, name, "the database name")?,
        server_database,
        shards,
        tables: table::tables(source, &raw.table)?,
        home,
        freshness: freshness(source, raw.freshness.as_ref())?,
    })
}

fn shard_of(source: &Source, raw: &raw::Shard) -> Checked<ShardConfig> {
    let weight = match &raw.weight {
        None => 1,
        Some(weight) => ranged(source, weight, "weight", 1..=1000)? as u32,
    };
    Ok(ShardConfig {
        name: non_empty(source, &raw.name, "name")?,
        primary: endpoint(source, &raw.primary)?,
        replicas: raw.replicas.iter().map(|replica| endpoint(source, replica)).collect::<Checked<_>>()?,
        weight,
    })
}

/// Two shards on one server would hold each other's rows, so names and endpoints must differ throughout a database.
fn distinct_shards(source: &Source, raw: &raw::Database) -> Checked<()> {
    let mut names = BTreeSet::new();
    let mut endpoints = BTreeSet::new();
    for shard in &raw.shard {
        if !names.insert(shard.name.get_ref()) {
            return Err(source.error(shard.name.span(), format!("shard name `{}` is used twice", shard.name.get_ref())));
        }
        for address in std::iter::once(&shard.primary).chain(&shard.replicas) {
            if !endpoints.insert(address.get_ref()) {
                return Err(source.error(address.span(), format!("server `{}` is used twice", address.get_ref())));
            }
        }
    }
    Ok(())
}

fn home_of(source: &Source, home: &Spanned<String>, shards: &[ShardConfig]) -> Checked<ShardId> {
    let index = shards.iter().position(|shard| shard.name == *home.get_ref());
    index
        .map(|index| ShardId(index as u16))
        .ok_or_else(|| unknown(source, home, "shard", shards.iter().map(|shard| shard.name.as_str())))
}

fn freshness(source: &Source, raw: Option<&Spanned<String>>) -> Checked<Freshness> {
    let Some(level) = raw else { return Ok(Freshness::default()) };
    match level.get_ref().as_str() {
        "strict" => Ok(Freshness::Strict),
        text if text == "session" || text == "any" || text.starts_with("lag") => {
            let message = format!("freshness level `{text}` is not yet available");
            Err(source.error(level.span(), message).hint("use \"strict\", which is also the default"))
        }
        _ => Err(unknown(source, level, "freshness level", ["strict", "session", "any"].into_iter())),
    }
}

// ---- sections ----

fn hub_of(source: &Source, hub: Spanned<raw::Hub>) -> Checked<HubConfig> {
    let span = hub.span();
    let hub = hub.into_inner();
    let (place, dsn) = match (hub.dsn, hub.dsn_file, hub.dsn_env) {
        (Some(dsn), None, None) => (dsn.span(), Secret::new(dsn.into_inner())),
        (None, Some(file), None) => (file.span(), secret_file(source, &file)?),
        (None, None, Some(name)) => (name.span(), secret_env(source, &name)?),
        _ => return Err(source.error(span, "[hub] needs exactly one of dsn, dsn_file, dsn_env")),
    };
    // The parser's error may quote the string, password and all, so it is not repeated.
    dsn.expose().parse::<tokio_postgres::Config>().map_err(|_| {
        source
            .error(place, "the hub's dsn is not a Postgres connection string")
            .hint("postgres://user:password@host:port/database")
    })?;
    Ok(HubConfig { dsn })
}

fn pool(source: &Source, raw: &raw::Pool) -> Checked<PoolConfig> {
    let size = count(source, raw.size.as_ref(), "size", 1..=10_000, 20)?;
    let min = count(source, raw.min.as_ref(), "min", 0..=10_000, 0)?;
    if let (true, Some(raw_min)) = (min > size, &raw.min) {
        return Err(source.error(raw_min.span(), format!("min is {min}, more than size {size}")));
    }
    Ok(PoolConfig {
        size,
        min,
        wait_queue_max: count(source, raw.wait_queue_max.as_ref(), "wait_queue_max", 0..=1_000_000, 10_000)?,
        wait_max: time(source, raw.wait_max.as_ref(), "wait_max", Duration::from_secs(5))?,
        idle_max: time(source, raw.idle_max.as_ref(), "idle_max", Duration::from_secs(600))?,
        lifetime_max: time(source, raw.lifetime_max.as_ref(), "lifetime_max", Duration::from_secs(3600))?,
    })
}

fn limits(source: &Source, raw: &raw::Limits) -> Checked<LimitsConfig> {
    let second = Duration::from_secs(1);
    Ok(LimitsConfig {
        client_connections_max: count(
            source,
            raw.client_connections_max.as_ref(),
            "client_connections_max",
            1..=1_000_000,
            10_000,
        )?,
        login_time_max: time(source, raw.login_time_max.as_ref(), "login_time_max", 60 * second)?,
        connect_time_max: time(source, raw.connect_time_max.as_ref(), "connect_time_max", 5 * second)?,
        message_bytes_max: bytes(source, raw.message_bytes_max.as_ref(), "message_bytes_max", 256 * MIB)?,
        merge_bytes_max: bytes(source, raw.merge_bytes_max.as_ref(), "merge_bytes_max", 64 * MIB)?,
        merge_groups_max: count(source, raw.merge_groups_max.as_ref(), "merge_groups_max", 1..=100_000_000, 100_000)?,
        prepared_per_server_max: count(
            source,
            raw.prepared_per_server_max.as_ref(),
            "prepared_per_server_max",
            1..=100_000,
            500,
        )?,
        drain_time_max: time(source, raw.drain_time_max.as_ref(), "drain_time_max", 30 * second)?,
    })
}

fn cache(source: &Source, raw: &raw::Cache) -> Checked<CacheConfig> {
    let l1_bytes = bytes(source, raw.l1_bytes.as_ref(), "l1_bytes", 64 * MIB)?;
    let entry_bytes_max = bytes(source, raw.entry_bytes_max.as_ref(), "entry_bytes_max", 256 * KIB)?;
    if let (true, Some(raw_entry)) = (entry_bytes_max > l1_bytes, &raw.entry_bytes_max) {
        return Err(source.error(raw_entry.span(), "entry_bytes_max is more than l1_bytes"));
    }
    let redis = raw.redis.as_ref().map(|url| {
        // The URL may hold a password: say what is wrong without repeating it.
        let known = ["redis://", "rediss://", "redis+unix://", "unix://"];
        if known.iter().any(|scheme| url.get_ref().starts_with(scheme)) {
            Ok(Secret::new(url.get_ref().as_str()))
        } else {
            Err(source.error(url.span(), "redis is not a Redis URL").hint("redis://[[user]:password@]host:port[/db]"))
        }
    });
    Ok(CacheConfig {
        enabled: raw.enabled.unwrap_or(true),
        redis: redis.transpose()?,
        l1_bytes,
        entry_bytes_max,
        max_age: time(source, raw.max_age.as_ref(), "max_age", Duration::from_secs(60))?,
    })
}

fn tls_of(source: &Source, raw: &raw::Tls) -> Checked<TlsConfig> {
    let mode = match &raw.mode {
        None => TlsMode::Allow,
        Some(mode) => choice(
            source,
            mode,
            "TLS mode",
            &[("disable", TlsMode::Disable), ("allow", TlsMode::Allow), ("require", TlsMode::Require)],
        )?,
    };
    let certificate = absolute(source, raw.certificate.get_ref());
    let key = absolute(source, raw.key.get_ref());
    if mode != TlsMode::Disable {
        at(source, &raw.key, private_file(&key, WORLD))?;
    }
    Ok(TlsConfig { certificate, key, mode })
}

fn server_auth(source: &Source, raw: &Spanned<raw::ServerAuth>) -> Checked<ServerAuth> {
    let span = raw.span();
    let raw = raw.get_ref();
    let password = match (&raw.password_file, &raw.password_env) {
        (Some(file), None) => secret_file(source, file)?,
        (None, Some(name)) => secret_env(source, name)?,
        _ => return Err(source.error(span, "[server_auth] needs exactly one of password_file, password_env")),
    };
    Ok(ServerAuth { user: non_empty(source, &raw.user, "user")?, password })
}

fn log(source: &Source, raw: &raw::Log) -> Checked<LogConfig> {
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    Ok(LogConfig {
        level: raw.level.as_ref().map_or(Ok(LogLevel::Info), |level| choice(source, level, "log level", &levels))?,
        format: raw
            .format
            .as_ref()
            .map_or(Ok(LogFormat::Text), |format| choice(source, format, "log format", &formats))?,
    })
}

fn known_users(source: &Source, names: &[Spanned<String>], users: &Users) -> Checked<Vec<String>> {
    names
        .iter()
        .map(|name| match users.get(name.get_ref()) {
            Some(_) => Ok(name.get_ref().clone()),
            None => Err(unknown(source, name, "user", users.iter().map(|(name, _)| name))),
        })
        .collect()
}

// ---- scalars ----

fn address(source: &Source, raw: &Spanned<String>) -> Checked<SocketAddr> {
    raw.get_ref().parse().map_err(|_| {
        source
            .error(raw.span(), format!("`{}` is not an address to listen on", raw.get_ref()))
            .hint("write \"127.0.0.1:6432\" or \"[::]:6432\"")
    })
}

fn endpoint(source: &Source, raw: &Spanned<String>) -> Checked<Endpoint> {
    let parsed = raw.get_ref().rsplit_once(':').and_then(|(host, port)| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let plain = bare.is_some() || !host.contains(':');
        let port = port.parse().ok().filter(|port| *port != 0)?;
        (plain && !host.is_empty() && !host.contains(['/', ' ', '@', '[']))
            .then(|| Endpoint { host: host.into(), port })
    });
    parsed.ok_or_else(|| {
        source
            .error(raw.span(), format!("`{}` is not host:port of a server", raw.get_ref()))
            .hint("write \"db1.example.com:5432\" or \"[::1]:5432\"")
    })
}

fn non_empty(source: &Source, raw: &Spanned<String>, what: &str) -> Checked<String> {
    let text = raw.get_ref();
    if text.is_empty() || text.contains('\0') {
        return Err(source.error(raw.span(), format!("{what} must not be empty or hold NUL")));
    }
    Ok(text.clone())
}

fn ranged(source: &Source, raw: &Spanned<i64>, key: &str, range: std::ops::RangeInclusive<i64>) -> Checked<i64> {
    let value = *raw.get_ref();
    if range.contains(&value) {
        return Ok(value);
    }
    Err(source.error(raw.span(), format!("{key} is {value}; it must be between {} and {}", range.start(), range.end())))
}

fn count(
    source: &Source,
    raw: Option<&Spanned<i64>>,
    key: &str,
    range: std::ops::RangeInclusive<i64>,
    default: usize,
) -> Checked<usize> {
    raw.map_or(Ok(default), |raw| ranged(source, raw, key, range).map(|value| value as usize))
}

/// More than zero and at most a year, so that it can be added to any clock.
fn time(source: &Source, raw: Option<&Spanned<Time>>, key: &str, default: Duration) -> Checked<Duration> {
    let Some(raw) = raw else { return Ok(default) };
    let Time(value) = *raw.get_ref();
    if value.is_zero() || value > Duration::from_secs(365 * 86_400) {
        return Err(source.error(raw.span(), format!("{key} must be more than 0 and at most 365d")));
    }
    Ok(value)
}

/// At least 1 KiB and at most 1 TiB.
fn bytes(source: &Source, raw: Option<&Spanned<Size>>, key: &str, default: usize) -> Checked<usize> {
    let Some(raw) = raw else { return Ok(default) };
    let Size(value) = *raw.get_ref();
    if !(1 << 10..=1 << 40).contains(&value) {
        return Err(source.error(raw.span(), format!("{key} must be between 1KiB and 1024GiB")));
    }
    Ok(value as usize)
}

fn choice<T: Copy>(source: &Source, raw: &Spanned<String>, what: &str, options: &[(&str, T)]) -> Checked<T> {
    let found = options.iter().find(|(name, _)| name == raw.get_ref());
    found.map(|(_, value)| *value).ok_or_else(|| unknown(source, raw, what, options.iter().map(|(name, _)| *name)))
}

fn unknown<'a>(
    source: &Source,
    raw: &Spanned<String>,
    what: &str,
    known: impl Iterator<Item = &'a str>,
) -> ConfigError {
    let known: Vec<&str> = known.collect();
    let error = source.error(raw.span(), format!("unknown {what} `{}`", raw.get_ref()));
    match nearest(raw.get_ref(), known.iter().copied()) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint(format!("known: {}", known.join(", "))),
    }
}

// ---- secrets and paths ----

/// Relative paths are relative to the directory of the configuration file, not to where weir was started.
fn absolute(source: &Source, path: &str) -> PathBuf {
    source.path.parent().unwrap_or(Path::new("/")).join(path)
}

fn secret_file(source: &Source, raw: &Spanned<String>) -> Checked<Secret> {
    let path = absolute(source, raw.get_ref());
    at(source, raw, private_file(&path, OTHERS))?;
    let read = std::fs::read_to_string(&path).map_err(|error| ConfigError::unreadable(&path, &error));
    secret(source, raw.span(), &at(source, raw, read)?)
}

fn secret_env(source: &Source, raw: &Spanned<String>) -> Checked<Secret> {
    let value = std::env::var(raw.get_ref())
        .map_err(|_| source.error(raw.span(), format!("environment variable `{}` is not set", raw.get_ref())))?;
    secret(source, raw.span(), &value)
}

/// One trailing line break belongs to the editor, not to the secret.
fn secret(source: &Source, span: Range<usize>, text: &str) -> Checked<Secret> {
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(source.error(span, "the secret is empty"));
    }
    Ok(Secret::new(text))
}

/// Refuses a secret file that has any of the permission bits in `forbidden`.
pub(super) fn private_file(path: &Path, forbidden: u32) -> Checked<()> {
    let metadata = std::fs::metadata(path).map_err(|error| ConfigError::unreadable(path, &error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & forbidden == 0 {
        return Ok(());
    }
    let message = format!("it holds secrets but its mode is {mode:04o}");
    let error = ConfigError { path: path.into(), line: None, message, hint: None };
    Err(error.hint(format!("chmod {:04o} {}", mode & !forbidden, path.display())))
}

/// The same error, told at the line that names the file.
fn at<T>(source: &Source, raw: &Spanned<String>, result: Checked<T>) -> Checked<T> {
    result.map_err(|error| {
        let message = format!("{}: {}", error.path.display(), error.message);
        ConfigError { hint: error.hint, ..source.error(raw.span(), message) }
    })
}
