//! Configuration: one file, read once, turned from raw TOML into values that cannot be wrong.
//!
//! Invariant: a [`Config`] has passed every check; nothing downstream validates again. Paths are absolute, durations and
//! sizes are typed, every secret is a [`Secret`] that prints as `***`. An error names file, line, what is wrong and the
//! nearest known key.
//! Non-goals: talking to servers (the catalogue and the hub have checks of their own), reloading (the caller swaps one
//! whole value or keeps the old one).

mod checked;
mod error;
mod limits;
mod passfile;
mod raw;
mod secret;
mod upstream;
mod users;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use weir_core::hba::Hba;
use weir_core::id::ShardId;
use weir_core::topology::{Placement, TableRules};

use crate::auth::credential::Credential;
use crate::back::tls::ServerTls;

pub use error::ConfigError;
pub use limits::{Overrides, PoolConfig, ReshardConfig};
pub use passfile::PassFile;
pub use secret::Secret;
pub use upstream::Flags;
pub use users::{Proof, User, Users};

/// The whole configuration of one weir process.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it was read from, absolute; "the command line" if there was none.
    pub path: PathBuf,
    /// Where clients connect. Port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Where /metrics, /livez, /readyz and the status page are served.
    pub http_listen: SocketAddr,
    /// `None` only with `auth_query`.
    pub users_file: Option<PathBuf>,
    /// Threads that serve sessions.
    pub workers: usize,
    /// Contents of `users_file`.
    pub users: Users,
    /// `None` only when every database has one shard.
    pub hub: Option<HubConfig>,
    pub engine: EngineConfig,
    /// In order of name. Empty only when there is a `wildcard`.
    pub databases: Vec<DatabaseConfig>,
    /// `[database."*"]` or `upstream`: serves every name that has no entry of its own. Its `server_database` is where weir's
    /// own connections go.
    pub wildcard: Option<DatabaseConfig>,
    /// `[user.<name>]`.
    pub overrides: BTreeMap<String, Overrides>,
    pub pool: PoolConfig,
    pub limits: LimitsConfig,
    pub reshard: ReshardConfig,
    pub cache: CacheConfig,
    pub zones: Zones,
    /// `None`: this is the only proxy in front of its servers.
    pub peers: Option<PeersConfig>,
    pub tls: Option<TlsConfig>,
    /// Who may come from where, and how they prove who they are.
    pub hba: Hba,
    /// How users are looked up that are not in `users_file`.
    pub auth_query: Option<AuthQueryConfig>,
    pub server_auth: ServerAuth,
    pub log: LogConfig,
    /// Users of the admin database who may change things. Each is in `users`.
    pub admin_users: Vec<String>,
    /// Users of the admin database who may only look. Each is in `users`.
    pub stats_users: Vec<String>,
}

/// The Postgres database that keeps weir's own metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubConfig {
    /// A Postgres connection string that tokio-postgres has accepted.
    pub dsn: Secret,
    /// For a `dsn` without one.
    pub password: Option<Secret>,
    pub tls: ServerTls,
    /// Streaming replicas of its server, where reads of the fallback engine may run.
    pub replicas: Vec<Endpoint>,
    /// Nobody named it, so weir makes the database if it is missing, from a connection to this one.
    pub made_from: Option<String>,
}

/// The fallback engine: Postgres on the hub answers reads that neither one shard nor a merge can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    pub enabled: bool,
    /// Name of its database on the hub's server; `{database}` stands for the database's own name.
    pub database: String,
    /// Sharded tables are partitioned foreign tables, where the hub's account may make them so; else views.
    pub partitions: bool,
    /// Server connections per database and user, on each server of the hub.
    pub pool_size: usize,
    /// Longest wait for one of them; `None`: as for any other.
    pub wait_max: Option<Duration>,
    /// A file of the hub's server (or `system`) by which it verifies the shards, where weir does.
    pub server_ca: Option<String>,
    /// Memory of one sort or hash, in bytes.
    pub work_mem: usize,
    /// Temporary files of one statement, in bytes; more gets 54000.
    pub temp_bytes_max: usize,
    /// A statement that returns more rows gets 54000.
    pub rows_max: u64,
    /// A statement that runs longer gets 54000.
    pub time_max: Duration,
}

/// One database as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseConfig {
    /// The name clients connect to.
    pub name: String,
    /// Its name on the servers.
    pub server_database: String,
    /// At least one; the index is the [`ShardId`].
    pub shards: Vec<ShardConfig>,
    pub tables: Vec<TableRuleConfig>,
    /// Shard of global tables and of statements without a table.
    pub home: ShardId,
    /// Longest wait of a read for a replica that is nearly fresh enough; `None`: it goes to the primary.
    pub replica_wait_max: Option<Duration>,
    pub overrides: Overrides,
}

/// One shard: a primary and its streaming replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardConfig {
    pub name: String,
    pub primary: Endpoint,
    pub replicas: Vec<Endpoint>,
    /// Share of the slots relative to the other shards, 1 to 1000.
    pub weight: u32,
}

/// Host name or address, and port, of one Postgres server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Without the brackets of an IPv6 literal.
    pub host: String,
    pub port: u16,
}

/// Where this process and the servers are. Servers that are not named are in no zone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zones {
    pub own: Option<String>,
    pub servers: BTreeMap<Endpoint, String>,
}

impl Zones {
    pub fn of(&self, server: &Endpoint) -> Option<&str> {
        self.servers.get(server).map(String::as_str)
    }

    /// Is it in the zone of this process, or has that none?
    pub fn is_near(&self, server: &Endpoint) -> bool {
        self.own.as_deref().is_none_or(|own| self.of(server) == Some(own))
    }
}

/// Where one declared table lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRuleConfig {
    pub schema: String,
    pub name: String,
    pub placement: Placement,
    /// Columns of a sharded table whose values are unique over all shards.
    pub unique: Vec<String>,
    pub cache: CachePolicy,
}

/// What may be done with answers that read a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// They are cached whenever it is safe.
    #[default]
    Auto,
    Never,
    /// And served for so many milliseconds although they are overtaken.
    Stale(u32),
}

/// Bounds of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    pub client_connections_max: usize,
    /// Clients of one user, unless `[user.<name>]` says otherwise.
    pub user_connections_max: Option<usize>,
    /// Clients of one database, unless `[database.<name>]` says otherwise.
    pub database_connections_max: Option<usize>,
    /// Databases of the wildcard entry that are set up at the same time.
    pub wildcard_databases_max: usize,
    /// Without clients for this long, a database of the wildcard entry is taken down; its idle connections go earlier.
    pub wildcard_idle_max: Duration,
    /// A client that asks nothing for this long is disconnected (57P05).
    pub idle_client_max: Option<Duration>,
    /// A client that leaves its transaction idle for this long is disconnected (25P03).
    pub idle_in_transaction_max: Option<Duration>,
    /// A statement that runs for this long is cancelled (57014).
    pub query_time_max: Option<Duration>,
    /// A transaction that lasts this long ends with its session (25P04).
    pub transaction_time_max: Option<Duration>,
    /// From accept to AuthenticationOk.
    pub login_time_max: Duration,
    /// To open and log in one server connection.
    pub connect_time_max: Duration,
    /// Longest message accepted from a client or server, in bytes.
    pub message_bytes_max: usize,
    /// Rows held by one cross-shard merge, in bytes.
    pub merge_bytes_max: usize,
    /// Groups held by one cross-shard merge.
    pub merge_groups_max: usize,
    /// Prepared statements kept on one server connection.
    pub prepared_per_server_max: usize,
    /// Numbers of one sequence taken from the hub at a time.
    pub sequence_block: usize,
    /// How long SIGTERM waits for running transactions.
    pub drain_time_max: Duration,
}

/// Other proxies in front of the same servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeersConfig {
    /// Where they reach this one.
    pub listen: SocketAddr,
    /// What they are told to connect to, `host:port`; `None`: `listen`.
    pub advertise: Option<String>,
    /// The same for all of them.
    pub secret: Secret,
    pub mode: PeersMode,
    /// How long cache and replicas may be used after the primary has last answered.
    pub lease: Duration,
    /// `None`: they speak plain TCP.
    pub tls: Option<PeersTlsConfig>,
}

/// What proxies show each other, and verify. All PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeersTlsConfig {
    pub authorities: String,
    pub certificate: String,
    pub key: Secret,
}

/// How the proxies of a tier hear of each other's writes; the same for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PeersMode {
    /// Before they can commit: no read is older than what was acknowledged anywhere.
    #[default]
    Leased,
    /// As soon as they are told, which nobody waits for: reads show what another proxy acknowledged within a lease.
    Push,
}

impl PeersMode {
    pub fn as_str(self) -> &'static str {
        match self {
            PeersMode::Leased => "leased",
            PeersMode::Push => "push",
        }
    }
}

/// What is done about weirs in front of the same database that are none of the peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OtherWeirs {
    /// They are looked for, and while one is there neither cache nor replicas answer.
    Check,
    /// They are not looked for.
    Ignore,
}

impl OtherWeirs {
    pub fn as_str(self) -> &'static str {
        match self {
            OtherWeirs::Check => "check",
            OtherWeirs::Ignore => "ignore",
        }
    }
}

/// The read-through cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    pub enabled: bool,
    /// Second level; `None`: the in-process cache alone.
    pub redis: Option<RedisConfig>,
    /// Memory of the in-process cache, in bytes.
    pub l1_bytes: usize,
    /// A larger reply is not cached, in bytes.
    pub entry_bytes_max: usize,
    /// A longer reply is compressed in the second level, in bytes.
    pub compress_above: usize,
    /// An entry older than this is not served, whatever the protocol says.
    pub max_age: Duration,
    pub decoding: Decoding,
    pub other_weirs: OtherWeirs,
}

/// How Redis is reached. What this says makes a [`crate::cache::RedisServers`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisConfig {
    /// Of one server, of Sentinels or of a Cluster. May hold a password.
    pub url: Secret,
    /// Wins over the URL's.
    pub user: Option<String>,
    /// Wins over the URL's.
    pub password: Option<Secret>,
    /// Of the Sentinels, who have none of the above.
    pub sentinel_password: Option<Secret>,
    /// PEM, the authorities that sign the servers' certificates; `None`: the system's.
    pub authorities: Option<String>,
    /// PEM, certificate chain and key that weir shows.
    pub identity: Option<(String, Secret)>,
}

impl RedisConfig {
    /// Reached by its URL alone.
    pub fn plain(url: &str) -> Self {
        RedisConfig {
            url: Secret::new(url),
            user: None,
            password: None,
            sentinel_password: None,
            authorities: None,
            identity: None,
        }
    }
}

/// Are writes that go round weir followed in the servers' WAL?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Decoding {
    Off,
    /// Where the server can.
    #[default]
    Auto,
    /// And while that does not work, only primaries answer reads.
    Require,
}

impl Decoding {
    pub fn as_str(self) -> &'static str {
        match self {
            Decoding::Off => "off",
            Decoding::Auto => "auto",
            Decoding::Require => "require",
        }
    }
}

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM chain, leaf first.
    pub certificate: PathBuf,
    /// PEM private key; not readable by others.
    pub key: PathBuf,
    /// PEM, the authorities that sign clients' certificates; `None`: clients are not asked for one.
    pub client_ca: Option<PathBuf>,
    pub mode: TlsMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Answer SSLRequest with N.
    Disable,
    /// Both encrypted and plain clients.
    Allow,
    /// Refuse clients that do not encrypt.
    Require,
}

/// How weir itself logs in to every server: catalogue, probes, LSN clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerAuth {
    pub user: String,
    pub password: ServerPassword,
    /// As clients' statements are sent, too.
    pub tls: ServerTls,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerPassword {
    /// The same everywhere.
    Fixed(Secret),
    /// By server, port, database and user; a server that is not in it must trust weir, or its certificate.
    Passfile(PassFile),
}

/// Users that the servers know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthQueryConfig {
    /// One parameter, the name. Columns: name, password as pg_authid stores it, and, if wanted, until when it is valid.
    pub sql: String,
    /// Where it runs: home shard of this configured database, as the user of `server_auth`. `None`: of `upstream`, or else the
    /// first.
    pub database: Option<String>,
    /// An answer this young is used again; zero: every login asks.
    pub max_age: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    pub level: LogLevel,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

impl Config {
    /// Reads and checks a file, its users file and the secret files it names.
    pub fn load(path: impl AsRef<Path>) -> Result<Config, ConfigError> {
        Self::load_with(Some(path.as_ref()), &Flags::default())
    }

    /// A file, if there is one, and the command line, which wins.
    pub fn load_with(path: Option<&Path>, flags: &Flags) -> Result<Config, ConfigError> {
        let Some(path) = path else { return checked::check(error::Source::none(), flags) };
        let absolute = std::path::absolute(path).map_err(|error| ConfigError::unreadable(path, &error))?;
        let text = std::fs::read_to_string(&absolute).map_err(|error| ConfigError::unreadable(&absolute, &error))?;
        checked::check(error::Source { path: absolute, text }, flags)
    }

    pub fn database(&self, name: &str) -> Option<&DatabaseConfig> {
        self.databases.iter().find(|database| database.name == name)
    }
}

impl ServerAuth {
    /// weir's password on that server, if there is one.
    pub fn password(&self, host: &str, port: u16, database: &str) -> Option<&str> {
        match &self.password {
            ServerPassword::Fixed(password) => Some(password.expose()),
            ServerPassword::Passfile(file) => file.find(host, port, database, &self.user).map(Secret::expose),
        }
    }

    /// The same as what a login presents.
    pub fn credential(&self, host: &str, port: u16, database: &str) -> Credential {
        self.password(host, port, database).map_or(Credential::None, Credential::password)
    }
}

impl EngineConfig {
    /// Its database for the one that clients call `name`, cut to the 63 bytes of a Postgres name.
    pub fn database_of(&self, name: &str) -> String {
        let mut database = self.database.replace("{database}", name);
        let end = (0..=database.len().min(63)).rev().find(|at| database.is_char_boundary(*at)).unwrap_or(0);
        database.truncate(end);
        database
    }
}

impl DatabaseConfig {
    /// Does it stand for every name that has no entry of its own?
    pub fn is_wildcard(&self) -> bool {
        self.name == upstream::ANY
    }

    /// The declared tables as planning wants them.
    pub fn rules(&self) -> TableRules {
        let mut rules = TableRules::default();
        for table in &self.tables {
            rules.insert(&table.schema, &table.name, table.placement.clone());
            let columns = table.unique.iter().map(|column| column.as_str().into()).collect();
            rules.insert_unique(&table.schema, &table.name, columns);
            match table.cache {
                CachePolicy::Auto => {}
                CachePolicy::Never => rules.insert_uncached(&table.schema, &table.name),
                CachePolicy::Stale(stale_ms) => rules.insert_stale(&table.schema, &table.name, stale_ms),
            }
        }
        rules
    }
}

impl Endpoint {
    /// `host:port`, or `[address]:port`. `None`: it is not that.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let plain = bare.is_some() || !host.contains(':');
        let port = port.parse().ok().filter(|port| *port != 0)?;
        (plain && !host.is_empty() && !host.contains(['/', ' ', '@', '[']))
            .then(|| Endpoint { host: host.into(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl LogLevel {
    /// As `tracing_subscriber`'s filter spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// `weir check <file>`: what the file says, in a few lines, or why it cannot be used.
pub fn check(path: impl AsRef<Path>) -> Result<String, ConfigError> {
    use fmt::Write;
    let config = Config::load(path)?;
    let mut text = format!("{} is valid\n", config.path.display());
    // Writing to a String cannot fail, hence the ignored results.
    let _ = writeln!(text, "  clients on {}, http on {}", config.listen, config.http_listen);
    for database in config.databases.iter().chain(&config.wildcard) {
        let replicas: usize = database.shards.iter().map(|shard| shard.replicas.len()).sum();
        let count =
            |wanted: fn(&Placement) -> bool| database.tables.iter().filter(|table| wanted(&table.placement)).count();
        let _ = writeln!(
            text,
            "  database {}: {} shard(s), {replicas} replica(s), {} sharded, {} reference, {} global table(s), home {}",
            database.name,
            database.shards.len(),
            count(|placement| matches!(placement, Placement::Sharded { .. })),
            count(|placement| matches!(placement, Placement::Reference)),
            count(|placement| matches!(placement, Placement::Global)),
            database.shards[usize::from(database.home.0)].name,
        );
    }
    let cache = match (&config.cache.enabled, &config.cache.redis) {
        (false, _) => "off",
        (true, None) => "in this process alone",
        (true, Some(_)) => "in this process and Redis",
    };
    let pool = &config.pool;
    let mode = pool.mode.as_str();
    let _ = writeln!(text, "  {} user(s), {mode} pooling, pool size {}, cache {cache}", config.users.len(), pool.size);
    Ok(text)
}

#[cfg(test)]
mod tests;
