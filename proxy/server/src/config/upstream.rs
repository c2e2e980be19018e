//! One server instead of a list of databases: `upstream`, `replicas` and `shards`, in the file or on the command line.
//!
//! Invariant: what comes out is an ordinary wildcard database and an ordinary log-in of weir's own; nothing downstream knows
//! how it was said. A connection string may hold a password, so no error repeats one.

use std::net::SocketAddr;
use std::ops::Range;

use toml::Spanned;
use weir_core::id::ShardId;

use super::checked::Checked;
use super::error::Source;
use super::{
    ConfigError, DatabaseConfig, Endpoint, HubConfig, Overrides, Secret, ServerAuth, ServerPassword, ShardConfig,
};
use crate::back::tls::{ServerTls, ServerTlsMode};

/// Where weir's own connections go when the connection string names no database.
pub(super) const OWN_DATABASE: &str = "postgres";
/// The hub that weir makes itself. Clients cannot reach it: to them the name means the admin console.
const HUB_DATABASE: &str = "weir";
/// What the wildcard is called.
pub(super) const ANY: &str = "*";

/// What the command line says. Each has a key of the same meaning in the file, over which it wins.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// Serve every database and user of this server, as postgres://user@host:port[/database]: the user weir itself logs in
    /// as, and the database it does so on [default: postgres]. Its password comes from PGPASSWORD or a password file
    /// (PGPASSFILE); in the DSN other users of this machine could see it. File: upstream
    #[arg(long, value_name = "DSN", value_parser = secret)]
    pub upstream: Option<Secret>,
    /// A streaming replica of the upstream, as postgres://host:port; may be repeated. File: replicas
    #[arg(long = "replica", value_name = "DSN", value_parser = secret)]
    pub replicas: Vec<Secret>,
    /// One more shard beside the upstream; may be repeated. Which tables are sharded is declared in a config file
    /// ([[database."*".table]]); tables that are not stay on the upstream. File: shards
    #[arg(long = "shard", value_name = "DSN", value_parser = secret)]
    pub shards: Vec<Secret>,
    /// The database for weir's own metadata, needed with shards [default: database weir of the upstream, made if it is
    /// missing]. File: [hub] dsn
    #[arg(long, value_name = "DSN", value_parser = secret)]
    pub hub: Option<Secret>,
    /// Second level of the cache. File: [cache] redis
    #[arg(long, value_name = "URL", value_parser = secret)]
    pub redis: Option<Secret>,
    /// Where clients connect [default: 127.0.0.1:6432]. File: listen
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Where /metrics, /livez, /readyz and the status page are served [default: 127.0.0.1:9187]. File: http_listen
    #[arg(long, value_name = "ADDRESS")]
    pub http_listen: Option<SocketAddr>,
}

#[expect(clippy::unnecessary_wraps, reason = "clap wants a parser that may fail")]
fn secret(text: &str) -> Result<Secret, String> {
    Ok(Secret::new(text))
}

impl Flags {
    /// The flags that are set, as typed.
    pub fn given(&self) -> Vec<&'static str> {
        [
            ("--upstream", self.upstream.is_some()),
            ("--replica", !self.replicas.is_empty()),
            ("--shard", !self.shards.is_empty()),
            ("--hub", self.hub.is_some()),
            ("--redis", self.redis.is_some()),
            ("--listen", self.listen.is_some()),
            ("--http-listen", self.http_listen.is_some()),
        ]
        .into_iter()
        .filter_map(|(flag, set)| set.then_some(flag))
        .collect()
    }
}

/// A value and where it was said.
pub(super) struct Given<'a> {
    pub text: &'a str,
    place: Place,
}

enum Place {
    Line(Range<usize>),
    Flag(&'static str),
}

impl<'a> Given<'a> {
    /// The flag if it is set, else the key.
    pub fn one(flag: Option<&'a Secret>, name: &'static str, key: Option<&'a Spanned<String>>) -> Option<Given<'a>> {
        let flag = flag.map(|value| Given { text: value.expose(), place: Place::Flag(name) });
        flag.or_else(|| key.map(|value| Given { text: value.get_ref(), place: Place::Line(value.span()) }))
    }

    /// What was found where `key` says.
    pub fn at(text: &'a str, key: &Spanned<String>) -> Given<'a> {
        Given { text, place: Place::Line(key.span()) }
    }

    /// The flags if there are any, else the key.
    pub fn all(flags: &'a [Secret], name: &'static str, key: &'a [Spanned<String>]) -> Vec<Given<'a>> {
        if flags.is_empty() {
            return key.iter().filter_map(|value| Given::one(None, name, Some(value))).collect();
        }
        flags.iter().filter_map(|value| Given::one(Some(value), name, None)).collect()
    }

    pub fn error(&self, source: &Source, message: &str) -> ConfigError {
        match &self.place {
            Place::Line(span) => source.error(span.clone(), message),
            Place::Flag(name) => Source::none().whole(format!("{name}: {message}")),
        }
    }
}

/// One server as a connection string names it.
struct Server {
    endpoint: Endpoint,
    user: Option<String>,
    password: Option<String>,
    database: Option<String>,
    tls: ServerTlsMode,
}

/// What `upstream` and its companions stand for.
pub(super) struct Upstream {
    pub database: DatabaseConfig,
    pub auth: ServerAuth,
    /// As libpq takes `sslmode`: `prefer` if the connection string has none.
    pub tls: ServerTlsMode,
    /// When there are several shards and nobody named a hub.
    pub hub: Option<HubConfig>,
}

/// Builds the wildcard database. `password` finds one for (host, port, database, user) where the string has none.
pub(super) fn upstream(
    source: &Source,
    given: &Given<'_>,
    replicas: &[Given<'_>],
    shards: &[Given<'_>],
) -> Checked<Upstream> {
    let first = server(source, given)?;
    let user = first.user.clone().ok_or_else(|| {
        given.error(source, "it does not say as which user weir logs in").hint("postgres://user@host:port")
    })?;
    let own = first.database.clone().unwrap_or_else(|| OWN_DATABASE.to_owned());
    let password = first.password.clone().or_else(|| std::env::var("PGPASSWORD").ok()).filter(|word| !word.is_empty());
    let mut known = vec![first.endpoint.clone()];
    let mut more = |others: &[Given<'_>]| -> Checked<Vec<Endpoint>> {
        others
            .iter()
            .map(|other| {
                let server = server(source, other)?;
                if server.user.as_ref().is_some_and(|name| *name != user)
                    || server.password.as_ref().is_some_and(|word| Some(word) != password.as_ref())
                {
                    let message = "it names another user or password than the upstream";
                    return Err(other.error(source, message).hint("weir logs in alike on all servers"));
                }
                if known.contains(&server.endpoint) {
                    return Err(other.error(source, &format!("server `{}` is used twice", server.endpoint)));
                }
                known.push(server.endpoint.clone());
                Ok(server.endpoint)
            })
            .collect()
    };
    let replicas = more(replicas)?;
    let shards = more(shards)?;
    let shard =
        |(number, primary, replicas)| ShardConfig { name: format!("shard{number}"), primary, replicas, weight: 1 };
    let password = match password {
        Some(password) => ServerPassword::Fixed(Secret::new(password)),
        None => ServerPassword::Passfile(super::checked::default_passfile()?),
    };
    let auth = ServerAuth { user, password, tls: ServerTls::default() };
    let hub = (!shards.is_empty()).then(|| default_hub(&first.endpoint, &auth, &own));
    let primaries = std::iter::once((first.endpoint, replicas)).chain(shards.into_iter().map(|other| (other, vec![])));
    Ok(Upstream {
        database: DatabaseConfig {
            name: ANY.to_owned(),
            server_database: own,
            shards: primaries
                .enumerate()
                .map(|(number, (primary, replicas))| shard((number, primary, replicas)))
                .collect(),
            tables: Vec::new(),
            home: ShardId(0),
            replica_wait_max: Some(super::limits::REPLICA_WAIT_MAX),
            overrides: Overrides::default(),
        },
        auth,
        tls: first.tls,
        hub,
    })
}

fn default_hub(endpoint: &Endpoint, auth: &ServerAuth, own: &str) -> HubConfig {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
    let password = auth.password(&endpoint.host, endpoint.port, HUB_DATABASE).map(Secret::new);
    let (host, port, user) = (quoted(&endpoint.host), endpoint.port, quoted(&auth.user));
    let dsn = format!("host='{host}' port={port} user='{user}' dbname='{HUB_DATABASE}'");
    HubConfig {
        dsn: Secret::new(dsn),
        password,
        tls: auth.tls.clone(),
        replicas: Vec::new(),
        made_from: Some(own.to_owned()),
    }
}

/// Reads a URL, a `key=value` string, or plain `host:port`.
fn server(source: &Source, given: &Given<'_>) -> Checked<Server> {
    let text = given.text;
    let url = if text.contains('=') || text.contains("://") { text.to_owned() } else { format!("postgres://{text}") };
    let wrong = |message: &str| given.error(source, message).hint("postgres://user@host:port/database");
    // The parser's error may quote the string, password and all, so it is not repeated.
    let parsed: tokio_postgres::Config = url.parse().map_err(|_| wrong("it is not a Postgres connection string"))?;
    let host = match parsed.get_hosts() {
        [tokio_postgres::config::Host::Tcp(host)] if !host.is_empty() => host.clone(),
        [] => return Err(wrong("it names no host")),
        [_] => return Err(wrong("weir reaches servers over TCP only")),
        _ => return Err(wrong("it names several hosts").hint("a replica is a --replica, a shard a --shard")),
    };
    let password = parsed.get_password().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    Ok(Server {
        endpoint: Endpoint {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: parsed.get_ports().first().copied().unwrap_or(5432),
        },
        user: parsed.get_user().map(str::to_owned).filter(|user| !user.is_empty()),
        password: password.filter(|password| !password.is_empty()),
        tls: match parsed.get_ssl_mode() {
            tokio_postgres::config::SslMode::Disable => ServerTlsMode::Disable,
            tokio_postgres::config::SslMode::Require => ServerTlsMode::Require,
            _ => ServerTlsMode::Prefer,
        },
        database: parsed.get_dbname().map(str::to_owned).filter(|name| !name.is_empty()),
    })
}
