//! Connections of weir's own to the servers: metadata, the LSN clock, recovery, auth_query. Never for clients' statements.

use anyhow::{Context, Result};
use tokio_postgres::{Client, Connection, Socket};

use crate::auth::credential::Credential;
use crate::back::connect::Login;
use crate::back::tls::{ControlStream, Material, ServerTls, ServerTlsMode};

/// Makes schema `weir` on a shard, inside a transaction, under the lock that everything in it is made under: several proxies may
/// start at once, and CREATE … IF NOT EXISTS alone races with itself.
pub const MAKE_SCHEMA: &str = "SELECT pg_advisory_xact_lock(7765697201); CREATE SCHEMA IF NOT EXISTS weir";

/// A server as the driver sees it.
#[derive(Clone, Debug)]
pub struct Target {
    pub config: tokio_postgres::Config,
    tls: ServerTls,
}

impl Target {
    pub fn new(mut config: tokio_postgres::Config, tls: ServerTls) -> Self {
        config.ssl_mode(tls.driver_mode());
        Target { config, tls }
    }

    /// A server that a command is given as a connection string. A password may come from PGPASSWORD as well; TLS is used
    /// where the server has it.
    pub fn of_command(dsn: &str) -> Result<Self> {
        // The driver's own message may show the string, and with it a password.
        let mut config: tokio_postgres::Config = dsn.parse().ok().context("not a valid connection string")?;
        if config.get_password().is_none()
            && let Ok(password) = std::env::var("PGPASSWORD")
        {
            config.password(password);
        }
        let tls = ServerTls::new(ServerTlsMode::Prefer, Material::default()).map_err(anyhow::Error::msg)?;
        Ok(Target::new(config, tls))
    }

    /// Logs in; the caller drives the connection.
    pub async fn connect(&self) -> Result<(Client, Connection<Socket, ControlStream<Socket>>), tokio_postgres::Error> {
        self.config.connect(self.tls.clone()).await
    }

    /// Logs in; the connection lives as long as the client does, and its errors come back through the client as well.
    pub async fn open(&self) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = self.connect().await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("control connection ended: {error}");
            }
        });
        Ok(client)
    }
}

/// The same login for the driver.
pub fn target(login: &Login) -> Target {
    let mut config = tokio_postgres::Config::new();
    config
        .host(&*login.host)
        .port(login.port)
        .user(&*login.user)
        .dbname(&*login.database)
        .application_name("weir control")
        .connect_timeout(login.deadline);
    if let Credential::Password(password) = &*login.credential.now() {
        config.password(&**password);
    }
    Target::new(config, login.tls.clone())
}

/// Logs in; the connection lives as long as the client does.
pub async fn connect(login: &Login) -> Result<Client> {
    target(login).open().await.with_context(|| format!("{}:{}", login.host, login.port))
}
