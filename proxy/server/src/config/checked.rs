//! Raw file → [`Config`]: every rule the file must satisfy, each failing with its line.
//!
//! Non-goals: no sockets and no name look-ups. The only reading done here is of the secret files that the file names.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use weir_core::id::{ShardId, Slot};

use super::error::{Source, nearest};
use super::upstream::{ANY, Flags, Given, OWN_DATABASE, Upstream, upstream};
use super::value::{Size, Time};
use super::{
    CacheConfig, Config, ConfigError, DatabaseConfig, Decoding, Endpoint, EngineConfig, HubConfig, LogConfig,
    LogFormat, LogLevel, Secret, ServerAuth, ServerPassword, ShardConfig, Users,
};
use super::{limits, raw};
use crate::back::tls::ServerTls;

mod access;
mod alone;
mod peers;
mod redis;
mod table;
mod zones;

/// Permission bits that a secret file must not have: anything for group and others.
pub(super) const OTHERS: u32 = 0o077;
/// For a TLS key, whose group may be a certificate group: anything for others.
const WORLD: u32 = 0o007;
/// Names that lead to the admin console.
const ADMIN_DATABASES: [&str; 2] = ["weir", "pgbouncer"];
/// Reached from this machine alone until somebody says otherwise.
const LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 6432));
const HTTP_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9187));
/// What to do where nobody could log in.
const WHO: &str = "say users_file = \"users.toml\", with [user.<name>] in it, or add [auth_query]";
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

pub(super) use access::default_passfile;

pub(super) type Checked<T> = Result<T, ConfigError>;

pub(super) fn check(source: Source, flags: &Flags) -> Checked<Config> {
    let file: raw::File = source.parse()?;
    let (users_file, users) = users(&source, file.users_file.as_ref())?;
    let (databases, wildcard, upstream) = databases(&source, &file, flags)?;
    alone::check(&source, &file, &databases, wildcard.as_ref())?;
    let auth_query = access::auth_query(&source, file.auth_query.as_ref(), &databases, upstream.is_some())?;
    if users.is_empty() && auth_query.is_none() {
        return Err(source.whole("nobody could log in").hint(WHO));
    }
    let dsn_tls = upstream.as_ref().map(|upstream| upstream.tls);
    let server_tls = access::server_tls(&source, file.server_tls.as_ref(), dsn_tls)?;
    let (upstream_auth, upstream_hub) = match upstream {
        Some(upstream) => (Some(ServerAuth { tls: server_tls.clone(), ..upstream.auth }), upstream.hub),
        None => (None, None),
    };
    let server_auth = own_log_in(&source, upstream_auth, file.server_auth.as_ref(), &server_tls)?;
    let upstream_hub = upstream_hub.map(|hub| HubConfig { tls: server_tls, ..hub });
    let hub = hub(&source, (flags.hub.as_ref(), file.hub.as_ref(), upstream_hub), &server_auth)?;
    needs_hub(&source, hub.as_ref(), databases.iter().chain(&wildcard))?;
    let tls = file.tls.map(|tls| access::tls(&source, &tls)).transpose()?;
    // Users that only the servers know cannot be checked here.
    let checked_users = if auth_query.is_none() { Some(&users) } else { None };
    let admin_users = match known_users(&source, &file.admin_users, checked_users)? {
        // Somebody must be able to; weir's own user can do more than that already.
        nobody if nobody.is_empty() && dsn_tls.is_some() => vec![server_auth.user.clone()],
        named => named,
    };
    Ok(Config {
        listen: address(&source, flags.listen, file.listen.as_ref(), LISTEN)?,
        http_listen: address(&source, flags.http_listen, file.http_listen.as_ref(), HTTP_LISTEN)?,
        users_file,
        workers: count(&source, file.workers.as_ref(), "workers", 1..=1024, default_workers())?,
        hub,
        engine: engine(&source, &file.engine)?,
        databases,
        wildcard,
        overrides: limits::of_users(&source, &file.user)?,
        pool: limits::pool(&source, &file.pool)?,
        limits: limits::limits(&source, &file.limits)?,
        reshard: limits::reshard(&source, &file.reshard)?,
        cache: cache(&source, &file.cache, flags.redis.as_ref())?,
        zones: zones::zones(&source, (file.zone.as_ref(), file.zone_env.as_ref()), &file.server_zones)?,
        peers: peers::peers(&source, file.peers.as_ref())?,
        hba: access::hba(&source, file.hba_file.as_ref(), tls.as_ref())?,
        auth_query,
        tls,
        server_auth,
        log: log(&source, &file.log)?,
        admin_users,
        stats_users: known_users(&source, &file.stats_users, checked_users)?,
        users,
        path: source.path,
    })
}

/// The one that is named nearest.
fn hub(
    source: &Source,
    (flag, section, upstream): (Option<&Secret>, Option<&Spanned<raw::Hub>>, Option<HubConfig>),
    server_auth: &ServerAuth,
) -> Checked<Option<HubConfig>> {
    match (flag, section) {
        (Some(dsn), _) => {
            let wrong = |message: &str| Source::none().whole(format!("--hub: {message}"));
            access::hub_dsn(dsn.clone(), server_auth, wrong).map(Some)
        }
        (None, Some(hub)) => access::hub(source, hub, server_auth).map(Some),
        (None, None) => Ok(upstream),
    }
}

/// How weir itself logs in to the servers: as `upstream` says, or the section.
fn own_log_in(
    source: &Source,
    upstream_auth: Option<ServerAuth>,
    given: Option<&Spanned<raw::ServerAuth>>,
    server_tls: &ServerTls,
) -> Checked<ServerAuth> {
    match (upstream_auth, given) {
        (Some(auth), None) => Ok(auth),
        // The connection string is nearer; the section may still hold the password that is better not in it.
        (Some(auth), Some(raw)) => {
            let own = access::server_auth(source, raw, server_tls)?;
            let silent = matches!(auth.password, ServerPassword::Passfile(_));
            Ok(if silent && auth.user == own.user { own } else { auth })
        }
        (None, Some(raw)) => access::server_auth(source, raw, server_tls),
        (None, None) => {
            let error = source.whole("there is no [server_auth]: weir itself has to log in to the servers");
            Err(error.hint("add [server_auth] with user and password_file, or say upstream"))
        }
    }
}

/// Half of the cores. A relayed statement is nine tenths kernel work, some of it on behalf of the servers beside weir, and a
/// second worker costs each statement wake-ups across cores: on two cores one worker relays as many statements as two do, for
/// a seventh less CPU each.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

fn users(source: &Source, file: Option<&Spanned<String>>) -> Checked<(Option<PathBuf>, Users)> {
    let file = file.map(|path| absolute(source, path.get_ref()));
    let users = file.as_deref().map(Users::load).transpose()?.unwrap_or_default();
    Ok((file, users))
}

fn needs_hub<'a>(
    source: &Source,
    hub: Option<&HubConfig>,
    mut databases: impl Iterator<Item = &'a DatabaseConfig>,
) -> Checked<()> {
    let Some(database) = databases.find(|database| hub.is_none() && database.shards.len() > 1) else { return Ok(()) };
    let message = format!("database `{}` has {} shards but there is no [hub]", database.name, database.shards.len());
    Err(source.whole(message).hint("the hub keeps the slot map: add [hub] with dsn = \"postgres://…\""))
}

// ---- databases ----

/// The named databases, the wildcard, and what `upstream` says beyond that.
fn databases(
    source: &Source,
    file: &raw::File,
    flags: &Flags,
) -> Checked<(Vec<DatabaseConfig>, Option<DatabaseConfig>, Option<Upstream>)> {
    let mut named = Vec::new();
    let mut wildcard = None;
    for (name, database) in &file.database {
        match database_of(source, name, database, file.hub.is_some())? {
            any if any.name == ANY => wildcard = Some(any),
            database => named.push(database),
        }
    }
    let replicas = Given::all(&flags.replicas, "--replica", &file.replicas);
    let shards = Given::all(&flags.shards, "--shard", &file.shards);
    let Some(given) = Given::one(flags.upstream.as_ref(), "--upstream", file.upstream.as_ref()) else {
        if let Some(orphan) = replicas.first().or(shards.first()) {
            return Err(orphan.error(source, "there is no upstream it could belong to"));
        }
        if wildcard.as_ref().is_some_and(|any| any.shards.is_empty()) {
            let hint = "add [[database.\"*\".shard]] with name and primary, or say upstream";
            return Err(source.whole("database `*` has no shard").hint(hint));
        }
        if named.is_empty() && wildcard.is_none() {
            return Err(source
                .whole("no database is configured")
                .hint("say upstream = \"postgres://…\", or add [database.<name>] with one [[database.<name>.shard]]"));
        }
        return Ok((named, wildcard, None));
    };
    let mut upstream = upstream(source, &given, &replicas, &shards)?;
    if let Some(declared) = wildcard {
        if !declared.shards.is_empty() {
            return Err(given.error(source, "[database.\"*\"] has shards of its own: say one or the other"));
        }
        // The section may still say what the command line cannot: tables, limits, home.
        upstream.database = DatabaseConfig {
            shards: upstream.database.shards,
            server_database: upstream.database.server_database,
            ..declared
        };
    }
    Ok((named, Some(upstream.database.clone()), Some(upstream)))
}

fn database_of(source: &Source, name: &Spanned<String>, raw: &raw::Database, has_hub: bool) -> Checked<DatabaseConfig> {
    let place = name.span();
    if ADMIN_DATABASES.contains(&name.get_ref().as_str()) {
        return Err(source.error(place, format!("`{}` is the admin console and cannot be a database", name.get_ref())));
    }
    let any = name.get_ref() == ANY;
    if raw.shard.is_empty() && !any {
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
        None if any => OWN_DATABASE.to_owned(),
        None => name.get_ref().clone(),
        Some(text) => non_empty(source, text, "server_database")?,
    };
    let grows = has_hub || shards.len() > 1;
    Ok(DatabaseConfig {
        name: non_empty(source, name, "the database name")?,
        server_database,
        shards,
        tables: table::tables(source, &raw.table, grows)?,
        home,
        replica_wait_max: limits::replica_wait_max(source, raw.replica_wait_max.as_ref())?,
        overrides: limits::overrides(
            source,
            &raw::Overrides {
                connections_max: raw.connections_max.clone(),
                pool_size: raw.pool_size.clone(),
                pool_min: raw.pool_min.clone(),
                pool_reserve: raw.pool_reserve.clone(),
                pool_mode: raw.pool_mode.clone(),
                freshness: raw.freshness.clone(),
            },
        )?,
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

// ---- sections ----

fn cache(source: &Source, raw: &raw::Cache, redis: Option<&Secret>) -> Checked<CacheConfig> {
    let l1_bytes = bytes(source, raw.l1_bytes.as_ref(), "l1_bytes", 64 * MIB)?;
    let entry_bytes_max = bytes(source, raw.entry_bytes_max.as_ref(), "entry_bytes_max", 256 * KIB)?;
    if let (true, Some(raw_entry)) = (entry_bytes_max > l1_bytes, &raw.entry_bytes_max) {
        return Err(source.error(raw_entry.span(), "entry_bytes_max is more than l1_bytes"));
    }
    Ok(CacheConfig {
        enabled: raw.enabled.unwrap_or(true),
        redis: redis::redis(source, raw, redis)?,
        l1_bytes,
        entry_bytes_max,
        compress_above: bytes(source, raw.compress_above.as_ref(), "compress_above", 4 * KIB)?,
        max_age: time(source, raw.max_age.as_ref(), "max_age", Duration::from_secs(60))?,
        decoding: match raw.decoding.as_ref().map(|word| (word, word.get_ref().as_str())) {
            None | Some((_, "auto")) => Decoding::Auto,
            Some((_, "off")) => Decoding::Off,
            Some((_, "require")) => Decoding::Require,
            Some((word, _)) => {
                return Err(unknown(source, word, "mode of decoding", ["auto", "off", "require"].into_iter()));
            }
        },
        other_weirs: alone::other_weirs(source, raw)?,
    })
}

fn engine(source: &Source, raw: &raw::Engine) -> Checked<EngineConfig> {
    let database = match &raw.database {
        None => "weir_engine_{database}".to_owned(),
        Some(name) => non_empty(source, name, "database")?,
    };
    Ok(EngineConfig {
        enabled: raw.enabled.unwrap_or(true),
        database,
        partitions: raw.partitions.unwrap_or(true),
        pool_size: count(source, raw.pool_size.as_ref(), "pool_size", 1..=1000, 5)?,
        wait_max: raw.wait_max.as_ref().map(|raw| time(source, Some(raw), "wait_max", Duration::ZERO)).transpose()?,
        server_ca: raw.server_ca.as_ref().map(|raw| server_ca(source, raw)).transpose()?,
        work_mem: bytes(source, raw.work_mem.as_ref(), "work_mem", 32 * MIB)?,
        temp_bytes_max: bytes(source, raw.temp_bytes_max.as_ref(), "temp_bytes_max", 4096 * MIB)?,
        rows_max: count(source, raw.rows_max.as_ref(), "rows_max", 1..=1_000_000_000_000, 10_000_000)? as u64,
        time_max: time(source, raw.time_max.as_ref(), "time_max", Duration::from_secs(300))?,
    })
}

/// The file is another server's: nothing can be read here.
fn server_ca(source: &Source, raw: &Spanned<String>) -> Checked<String> {
    let text = non_empty(source, raw, "server_ca")?;
    if text == "system" || text.starts_with('/') {
        return Ok(text);
    }
    Err(source.error(raw.span(), "server_ca is a file of the hub's server: write its whole path, or \"system\""))
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

fn known_users(source: &Source, names: &[Spanned<String>], users: Option<&Users>) -> Checked<Vec<String>> {
    names
        .iter()
        .map(|name| match users {
            Some(users) if users.get(name.get_ref()).is_none() => {
                Err(unknown(source, name, "user", users.iter().map(|(name, _)| name)))
            }
            _ => Ok(name.get_ref().clone()),
        })
        .collect()
}

// ---- scalars ----

fn address(
    source: &Source,
    flag: Option<SocketAddr>,
    raw: Option<&Spanned<String>>,
    default: SocketAddr,
) -> Checked<SocketAddr> {
    let (None, Some(raw)) = (flag, raw) else { return Ok(flag.unwrap_or(default)) };
    raw.get_ref().parse().map_err(|_| {
        source
            .error(raw.span(), format!("`{}` is not an address to listen on", raw.get_ref()))
            .hint("write \"127.0.0.1:6432\" or \"[::]:6432\"")
    })
}

fn endpoint(source: &Source, raw: &Spanned<String>) -> Checked<Endpoint> {
    Endpoint::parse(raw.get_ref()).ok_or_else(|| {
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

pub(super) fn count(
    source: &Source,
    raw: Option<&Spanned<i64>>,
    key: &str,
    range: std::ops::RangeInclusive<i64>,
    default: usize,
) -> Checked<usize> {
    raw.map_or(Ok(default), |raw| ranged(source, raw, key, range).map(|value| value as usize))
}

/// More than zero and at most a year, so that it can be added to any clock.
pub(super) fn time(source: &Source, raw: Option<&Spanned<Time>>, key: &str, default: Duration) -> Checked<Duration> {
    let Some(raw) = raw else { return Ok(default) };
    let Time(value) = *raw.get_ref();
    if value.is_zero() || value > Duration::from_secs(365 * 86_400) {
        return Err(source.error(raw.span(), format!("{key} must be more than 0 and at most 365d")));
    }
    Ok(value)
}

/// At least 1 KiB and at most 1 TiB.
pub(super) fn bytes(source: &Source, raw: Option<&Spanned<Size>>, key: &str, default: usize) -> Checked<usize> {
    let Some(raw) = raw else { return Ok(default) };
    let Size(value) = *raw.get_ref();
    if !(1 << 10..=1 << 40).contains(&value) {
        return Err(source.error(raw.span(), format!("{key} must be between 1KiB and 1024GiB")));
    }
    Ok(value as usize)
}

pub(super) fn choice<T: Copy>(source: &Source, raw: &Spanned<String>, what: &str, options: &[(&str, T)]) -> Checked<T> {
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
    let value = variable(source, raw)?;
    secret(source, raw.span(), &value)
}

/// The value of the environment variable that is named.
fn variable(source: &Source, name: &Spanned<String>) -> Checked<String> {
    std::env::var(name.get_ref())
        .map_err(|_| source.error(name.span(), format!("environment variable `{}` is not set", name.get_ref())))
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
