//! The tier under test: servers, configuration, weir.

use std::fmt::Write as _;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_local::{ConfigSpec, Run, TierSpec, Weir, free_port, http_get};

use crate::watch::Watch;
use crate::{binary, connect};

/// weir's ports are picked before it binds them; another process may be quicker.
const PORT_ATTEMPTS: u32 = 4;
/// Environment variable with what several weirs share.
const PEERS_SECRET: &str = "WEIR_PEERS_SECRET";

/// A running tier. Its servers are reached as fields: `tier.shards[0].primary`, `tier.shards[0].replicas[0]`, `tier.hub`,
/// `tier.redis`. Dropping it stops everything.
#[derive(Debug)]
pub struct Tier {
    proxy: Proxy,
    servers: weir_local::Tier,
    builder: Builder,
    _watch: Watch,
}

/// One weir of a tier. Dropping it stops it.
#[derive(Debug)]
pub struct Proxy {
    weir: Weir,
    port: u16,
    http_port: u16,
    password: String,
}

/// What a tier is to be like. Made by [`Tier::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    servers: TierSpec,
    config_extra: String,
    weir: Option<PathBuf>,
    /// The secret that several weirs share; there is one otherwise.
    peers: Option<String>,
    /// How long each may serve after a primary has answered it; as configured by default otherwise.
    lease: Option<&'static str>,
    /// How they hear of each other's writes; weir's default if `None`.
    peers_mode: Option<String>,
    /// More lines of their section.
    peers_extra: String,
    /// Of every weir, as (name, value).
    environment: Vec<(String, String)>,
}

impl Deref for Tier {
    type Target = weir_local::Tier;

    fn deref(&self) -> &weir_local::Tier {
        &self.servers
    }
}

impl Builder {
    /// How many shards (default 2).
    #[must_use]
    pub fn shards(mut self, shards: u32) -> Self {
        self.servers.shards = shards;
        self
    }

    /// How many replicas each shard has (default 0).
    #[must_use]
    pub fn replicas(mut self, replicas: u32) -> Self {
        self.servers.replicas = replicas;
        self
    }

    /// How many replicas the hub has (default 0).
    #[must_use]
    pub fn hub_replicas(mut self, replicas: u32) -> Self {
        self.servers.hub_replicas = replicas;
        self
    }

    /// Whether there is a Redis (default no).
    #[must_use]
    pub fn redis(mut self, redis: bool) -> Self {
        self.servers.redis = redis;
        self
    }

    /// Whether each Postgres server logs every statement; read them with `server.log()` (default no).
    #[must_use]
    pub fn log_statements(mut self, log_statements: bool) -> Self {
        self.servers.log_statements = log_statements;
        self
    }

    /// TOML that is merged over the generated `weir.toml`: tables key by key, anything else as a whole.
    #[must_use]
    pub fn config_extra(mut self, toml: &str) -> Self {
        self.config_extra.push_str(toml);
        self.config_extra.push('\n');
        self
    }

    /// Declares tables of database `shop`: sharded ones as `"users(user_id bigint)"`, with key and type, reference tables by
    /// their name. `" unique email"` behind one declares a column as unique over all shards.
    #[must_use]
    pub fn tables(self, tables: &[&str]) -> Self {
        let section = |table: &&str| {
            let (table, unique) = table.split_once(" unique ").unwrap_or((table, ""));
            let unique = if unique.is_empty() { String::new() } else { format!("global_unique = [{unique:?}]\n") };
            let declared = match table.split_once('(') {
                None => format!("name = {table:?}\nkind = \"reference\"\n"),
                Some((name, key)) => {
                    let (key, key_type) = key.trim_end_matches(')').split_once(' ').unwrap_or((key, ""));
                    format!("name = {name:?}\nkind = \"sharded\"\nkey = {key:?}\ntype = {key_type:?}\n")
                }
            };
            format!("[[database.shop.table]]\n{declared}{unique}")
        };
        let sections: String = tables.iter().map(section).collect();
        self.config_extra(&sections)
    }

    /// The weir to start, if it is not the one of this build.
    #[must_use]
    pub fn weir(mut self, binary: Option<PathBuf>) -> Self {
        self.weir = binary;
        self
    }

    /// One more variable of the environment of every weir.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Whether more weirs can be started on the same servers, with [`Tier::another`] (default no).
    #[must_use]
    pub fn peers(mut self, peers: bool) -> Self {
        self.peers = peers.then(|| "a secret of the tests".to_owned());
        self
    }

    /// How long each weir may serve after a primary has answered it: longer than the default where the machine is busy with other
    /// things than what is tested.
    #[must_use]
    pub fn lease(mut self, lease: &'static str) -> Self {
        self.lease = Some(lease);
        self
    }

    /// The same, with more lines in their section.
    #[must_use]
    pub fn peers_with(self, lines: &str) -> Self {
        Builder { peers_extra: lines.to_owned(), ..self.peers(true) }
    }

    /// The same, with a mode in which they hear of each other's writes.
    #[must_use]
    pub fn peers_mode(self, mode: &str) -> Self {
        Builder { peers_mode: Some(mode.to_owned()), ..self.peers(true) }
    }

    /// Starts the servers and weir. Returns when weir says that it is ready.
    pub async fn start(self) -> Result<Tier> {
        let run = Run::temporary("test")?;
        let watch = Watch::over(&run);
        let servers = weir_local::Tier::start(&run, &self.servers, Arc::new(|_| {})).await?;
        let proxy = self.start_proxy(&servers, "weir.toml", None).await?;
        Ok(Tier { proxy, servers, builder: self, _watch: watch })
    }

    /// `behind`: the port its peers are told, and the one it listens on.
    async fn start_proxy(&self, servers: &weir_local::Tier, file: &str, behind: Option<(u16, u16)>) -> Result<Proxy> {
        let binary = match &self.weir {
            Some(weir) => weir.clone(),
            None => binary("WEIR_BIN", "weir")?,
        };
        for attempt in 1.. {
            let (port, http_port) = (free_port()?, free_port()?);
            let mut extra = self.config_extra.clone();
            let mut environment = self.environment.clone();
            if let Some(secret) = &self.peers {
                let own = free_port()?;
                let (told, listens) = behind.unwrap_or((own, own));
                writeln!(extra, "[peers]\nlisten = \"127.0.0.1:{listens}\"\nadvertise = \"127.0.0.1:{told}\"")?;
                writeln!(extra, "secret_env = \"{PEERS_SECRET}\"")?;
                if let Some(lease) = self.lease {
                    writeln!(extra, "lease = \"{lease}\"")?;
                }
                if let Some(mode) = &self.peers_mode {
                    writeln!(extra, "mode = \"{mode}\"")?;
                }
                extra.push_str(&self.peers_extra);
                environment.push((PEERS_SECRET.to_owned(), secret.clone()));
            }
            let config = servers.write_config_as(file, &ConfigSpec { port, http_port, extra })?;
            let arguments = vec!["run".into(), "--config".into(), config.into()];
            match Weir::start_with(&servers.run, &binary, arguments, (&environment, http_port)).await {
                Ok(weir) => return Ok(Proxy { weir, port, http_port, password: servers.state.shop_password.clone() }),
                Err(error) if attempt < PORT_ATTEMPTS && format!("{error:#}").contains("in use") => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last attempt returns")
    }
}

impl Tier {
    /// A tier of 2 shards without replicas and without Redis, to be changed from there.
    pub fn builder() -> Builder {
        Builder {
            servers: TierSpec { shards: 2, replicas: 0, hub_replicas: 0, redis: false, log_statements: false },
            config_extra: String::new(),
            weir: None,
            peers: None,
            lease: None,
            peers_mode: None,
            peers_extra: String::new(),
            environment: Vec::new(),
        }
    }

    /// One more weir in front of the same servers; the tier must have been built with [`Builder::peers`].
    pub async fn another(&self) -> Result<Proxy> {
        self.another_behind(None).await
    }

    /// The same; `behind`: the port its peers are told, and the one it listens on for them.
    pub async fn another_behind(&self, behind: Option<(u16, u16)>) -> Result<Proxy> {
        let file = format!("weir-{}.toml", free_port()?);
        self.builder.start_proxy(&self.servers, &file, behind).await
    }

    /// One more weir whose section of peers has other lines.
    pub async fn another_with(&self, lines: &str) -> Result<Proxy> {
        let file = format!("weir-{}.toml", free_port()?);
        self.builder.clone().peers_with(lines).start_proxy(&self.servers, &file, None).await
    }

    /// One more weir whose file says another mode of peers.
    pub async fn another_in_mode(&self, mode: &str) -> Result<Proxy> {
        let file = format!("weir-{}.toml", free_port()?);
        self.builder.clone().peers_mode(mode).start_proxy(&self.servers, &file, None).await
    }

    /// One more weir that knows nothing of others, as somebody might start by mistake.
    pub async fn another_without_peers(&self) -> Result<Proxy> {
        let file = format!("weir-{}.toml", free_port()?);
        self.builder.clone().peers(false).start_proxy(&self.servers, &file, None).await
    }

    /// The weir that the tier was started with.
    pub fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// A URL for role `shop` on `database` through weir.
    pub fn dsn(&self, database: &str) -> String {
        self.proxy.dsn(database)
    }

    /// A URL for weir's admin database.
    pub fn admin_dsn(&self) -> String {
        self.proxy.admin_dsn()
    }

    /// weir's port for Postgres clients.
    pub fn port(&self) -> u16 {
        self.proxy.port()
    }

    /// A new connection of role `shop` to database `shop` through weir.
    pub async fn connect(&self) -> Result<Client> {
        self.proxy.connect().await
    }

    /// weir's metrics page.
    pub fn metrics_url(&self) -> String {
        self.proxy.metrics_url()
    }

    /// A GET on weir's HTTP port: (status, body).
    pub async fn http_get(&self, path: &str) -> Result<(u16, String)> {
        self.proxy.http_get(path).await
    }

    /// weir's process id; none while it is killed.
    pub fn weir_pid(&self) -> Option<u32> {
        self.proxy.weir_pid()
    }

    /// Kills weir as `kill -9` does.
    pub fn kill_weir(&self) {
        self.proxy.kill_weir();
    }

    /// Asks weir to end (SIGTERM) and waits until it has; kills it if it takes more than 5 s.
    pub fn stop_weir(&self) {
        self.proxy.stop_weir();
    }

    /// Kills weir if it runs and starts it again on the same ports and configuration. Returns when it is ready.
    pub async fn restart_weir(&self) -> Result<()> {
        self.proxy.restart_weir().await
    }

    /// All weir has logged, over all its starts.
    pub fn weir_log(&self) -> String {
        self.proxy.weir_log()
    }
}

impl Proxy {
    /// A URL for role `shop` on `database` through weir.
    pub fn dsn(&self, database: &str) -> String {
        format!("postgres://shop:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// A URL for weir's admin database.
    pub fn admin_dsn(&self) -> String {
        self.dsn("weir")
    }

    /// weir's port for Postgres clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A new connection of role `shop` to database `shop` through weir.
    pub async fn connect(&self) -> Result<Client> {
        connect(&self.dsn("shop"))
            .await
            .with_context(|| format!("connecting to weir. Its log ends with:\n{}", self.weir.log_tail()))
    }

    /// weir's metrics page.
    pub fn metrics_url(&self) -> String {
        format!("http://127.0.0.1:{}/metrics", self.http_port)
    }

    /// A GET on weir's HTTP port: (status, body).
    pub async fn http_get(&self, path: &str) -> Result<(u16, String)> {
        http_get(self.http_port, path).await
    }

    /// weir's process id; none while it is killed.
    pub fn weir_pid(&self) -> Option<u32> {
        self.weir.pid()
    }

    /// Kills weir as `kill -9` does.
    pub fn kill_weir(&self) {
        self.weir.kill9();
    }

    /// Asks weir to end (SIGTERM) and waits until it has; kills it if it takes more than 5 s.
    pub fn stop_weir(&self) {
        self.weir.stop();
    }

    /// Kills weir if it runs and starts it again on the same ports and configuration. Returns when it is ready.
    pub async fn restart_weir(&self) -> Result<()> {
        self.weir.restart().await
    }

    /// The same, with more variables in its environment for this once.
    pub async fn restart_weir_with(&self, environment: &[(String, String)]) -> Result<()> {
        self.weir.restart_with(environment).await
    }

    /// How weir ended, if it was running and ended by itself.
    pub fn weir_exited(&self) -> Option<std::process::ExitStatus> {
        self.weir.exited()
    }

    /// All weir has logged, over all its starts.
    pub fn weir_log(&self) -> String {
        self.weir.log()
    }
}
