//! Which Redis servers there are, as whom weir logs in to them, over what, and which of them is asked.
//!
//! Invariant: a connection that comes out of here has answered; one found through Sentinels was a master when it did. Nothing here
//! is needed for right answers: entries are judged by whoever reads them. Neither an error nor a log line holds a password.
//!
//! Sentinels and Cluster nodes are asked with plain commands, not through the client library's own types for them: those keep
//! reconnecting and retrying on their own, where here one task per server does, with one bound on all that waits for it.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisResult,
    TlsCertificates, Value,
};

use super::{GETS_MAX, SET_TIMEOUT};
use crate::config::RedisConfig;

/// From dialling to the answer of the log-in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Servers that one URL may name.
const NAMED_MAX: usize = 64;

/// What is configured, in the terms of the client library.
#[derive(Clone, Debug)]
pub enum RedisServers {
    One(ConnectionInfo),
    /// They say who is the master of this name now.
    Sentinel {
        sentinels: Vec<ConnectionInfo>,
        master: String,
        /// How the master is reached, but for its address.
        login: ConnectionInfo,
    },
    /// Any of these says who has which slots.
    Cluster(Vec<ConnectionInfo>),
}

/// Why there is no way to Redis. No variant's text holds any of the URL.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadRedis {
    #[error("redis is not a Redis URL")]
    Url,
    #[error("the Redis URL names no master after its Sentinels")]
    NoMaster,
    #[error("the Redis URL names more than {NAMED_MAX} servers")]
    TooMany,
    #[error("a Redis Cluster has no databases but 0")]
    Database,
    #[error("the certificates for Redis cannot be used")]
    Certificates,
}

impl RedisServers {
    pub fn new(config: &RedisConfig) -> Result<RedisServers, BadRedis> {
        let (scheme, rest) = config.url.expose().split_once("://").ok_or(BadRedis::Url)?;
        let (plain, form) = match scheme {
            "redis" | "rediss" | "unix" | "redis+unix" => {
                return server(config, config.url.expose()).map(RedisServers::One);
            }
            "redis+sentinel" | "redis+cluster" => ("redis", scheme),
            "rediss+sentinel" | "rediss+cluster" => ("rediss", scheme),
            _ => return Err(BadRedis::Url),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let login = if login.is_empty() { String::new() } else { format!("{login}@") };
        if hosts.split(',').count() > NAMED_MAX {
            return Err(BadRedis::TooMany);
        }
        let all = |database: &str| -> Result<Vec<ConnectionInfo>, BadRedis> {
            let named = hosts.split(',').map(str::trim);
            named.map(|host| server(config, &format!("{plain}://{login}{host}/{database}"))).collect()
        };
        if form.ends_with("cluster") {
            return if matches!(path, "" | "0") { all("").map(RedisServers::Cluster) } else { Err(BadRedis::Database) };
        }
        let (master, database) = path.split_once('/').unwrap_or((path, ""));
        let sentinels = all(database)?;
        let login = sentinels.first().filter(|_| !master.is_empty()).ok_or(BadRedis::NoMaster)?.clone();
        let sentinels = sentinels.into_iter().map(|sentinel| as_sentinel(config, sentinel)).collect();
        Ok(RedisServers::Sentinel { sentinels, master: master.to_owned(), login })
    }

    /// `None`, with a line in the log, if there is no server that answers.
    pub(super) async fn connect(&self) -> Option<MultiplexedConnection> {
        match self {
            RedisServers::One(server) => connect(server).await,
            RedisServers::Sentinel { sentinels, master, login } => {
                for sentinel in sentinels {
                    if let Some(connection) = master_by(sentinel, master, login).await {
                        return Some(connection);
                    }
                }
                None
            }
            RedisServers::Cluster(seeds) => {
                for seed in seeds {
                    if let Some(connection) = connect(seed).await {
                        return Some(connection);
                    }
                }
                None
            }
        }
    }

    /// Does another server take over from one that does not take writes any more?
    pub(super) fn have_successors(&self) -> bool {
        matches!(self, RedisServers::Sentinel { .. })
    }
}

/// The same log-in at another server.
pub(super) fn elsewhere(login: &ConnectionInfo, host: &str, port: u16) -> ConnectionInfo {
    let host = host.to_owned();
    login.clone().set_addr(match login.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => ConnectionAddr::Tcp(host, port),
    })
}

fn server(config: &RedisConfig, url: &str) -> Result<ConnectionInfo, BadRedis> {
    let info = url.into_connection_info().map_err(|_| BadRedis::Url)?;
    let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let mut login = info.redis_settings().clone();
    if let Some(user) = &config.user {
        login = login.set_username(user);
    }
    if let Some(password) = &config.password {
        login = login.set_password(password.expose());
    }
    let info = info.set_redis_settings(login);
    let client_tls = config.identity.as_ref().map(|(chain, key)| ClientTlsConfig {
        client_cert: chain.clone().into_bytes(),
        client_key: key.expose().as_bytes().to_vec(),
    });
    let root_cert = config.authorities.clone().map(String::into_bytes);
    if client_tls.is_none() && root_cert.is_none() {
        return Ok(info);
    }
    let certificates = TlsCertificates { client_tls, root_cert };
    let client = Client::build_with_tls(info, certificates).map_err(|_| BadRedis::Certificates)?;
    Ok(client.get_connection_info().clone())
}

/// A Sentinel has a password of its own, or none, and no databases.
fn as_sentinel(config: &RedisConfig, server: ConnectionInfo) -> ConnectionInfo {
    let login = redis::RedisConnectionInfo::default();
    let login = match &config.sentinel_password {
        Some(password) => login.set_password(password.expose()),
        None => login,
    };
    server.set_redis_settings(login)
}

/// Asks one Sentinel, and the server that it names whether it is a master: a Sentinel may be the last to know.
async fn master_by(sentinel: &ConnectionInfo, master: &str, login: &ConnectionInfo) -> Option<MultiplexedConnection> {
    let mut asked = connect(sentinel).await?;
    let mut command = redis::cmd("SENTINEL");
    command.arg("get-master-addr-by-name").arg(master);
    let answer: RedisResult<Option<(String, u16)>> = command.query_async(&mut asked).await;
    let Ok(Some((host, port))) = answer.inspect_err(|error| tracing::debug!(%error, "cache: a Sentinel refused"))
    else {
        return None;
    };
    let mut connection = connect(&elsewhere(login, &host, port)).await?;
    let role: RedisResult<Vec<Value>> = redis::cmd("ROLE").query_async(&mut connection).await;
    // Who may not ask for the role takes the Sentinel's word.
    let other = role.is_ok_and(|role| !matches!(role.first(), Some(Value::BulkString(name)) if name == b"master"));
    (!other).then_some(connection)
}

/// The answer to PING is what counts: a server that is loading its data, or wants another password, is not there.
async fn connect(server: &ConnectionInfo) -> Option<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(SET_TIMEOUT))
        .set_pipeline_buffer_size(GETS_MAX);
    let connected = async {
        let client = Client::open(server.clone())?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        redis::cmd("PING").query_async::<Value>(&mut connection).await?;
        RedisResult::Ok(connection)
    };
    let connected = connected.await;
    connected.inspect_err(|error| tracing::debug!(%error, server = %server.addr(), "cache: Redis is not there")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    fn of(url: &str) -> Result<RedisServers, BadRedis> {
        RedisServers::new(&RedisConfig::plain(url))
    }

    fn addresses(servers: &[ConnectionInfo]) -> Vec<String> {
        servers.iter().map(|server| server.addr().to_string()).collect()
    }

    #[test]
    fn sentinels_and_nodes_are_named_in_a_list() {
        let config = RedisConfig {
            sentinel_password: Some(Secret::new("theirs")),
            ..RedisConfig::plain("redis+sentinel://app:p%40ss@one:26379,[::1]:2,three/shop/4")
        };
        let Ok(RedisServers::Sentinel { sentinels, master, login }) = RedisServers::new(&config) else {
            panic!("Sentinels")
        };
        assert_eq!(addresses(&sentinels), ["one:26379", "::1:2", "three:6379"]);
        assert_eq!((&*master, login.redis_settings().db()), ("shop", 4));
        assert_eq!(login.redis_settings().username(), Some("app"));
        assert_eq!(login.redis_settings().password(), Some("p@ss"));
        let theirs = sentinels[0].redis_settings();
        assert_eq!((theirs.username(), theirs.password(), theirs.db()), (None, Some("theirs"), 0));
        let found = elsewhere(&login, "10.0.0.7", 6380);
        assert_eq!((&*found.addr().to_string(), found.redis_settings().password()), ("10.0.0.7:6380", Some("p@ss")));

        let Ok(RedisServers::Cluster(seeds)) = of("rediss+cluster://a:1,b:2") else { panic!("a cluster") };
        assert_eq!(addresses(&seeds), ["a:1", "b:2"]);
        let moved = elsewhere(&seeds[0], "c", 3);
        assert!(
            matches!(moved.addr(), ConnectionAddr::TcpTls { insecure: false, .. }),
            "what is found is encrypted too"
        );
    }

    #[test]
    fn what_is_no_url_says_why() {
        let wrong = |url: &str| of(url).expect_err(url);
        assert_eq!(wrong("http://x"), BadRedis::Url);
        assert_eq!(wrong("redis:x"), BadRedis::Url);
        assert_eq!(wrong("redis+cluster://a:1,:2"), BadRedis::Url);
        assert_eq!(wrong("redis+sentinel://a:1"), BadRedis::NoMaster);
        assert_eq!(wrong("redis+sentinel://a:1//3"), BadRedis::NoMaster);
        assert_eq!(wrong("redis+cluster://a:1/3"), BadRedis::Database);
        assert_eq!(wrong(&format!("redis+cluster://{}", ["a"; 65].join(","))), BadRedis::TooMany);
        let authorities = Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned());
        let config = RedisConfig { authorities, ..RedisConfig::plain("rediss://a:1") };
        assert_eq!(RedisServers::new(&config).expect_err("no certificate"), BadRedis::Certificates);
    }
}
