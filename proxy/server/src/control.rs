//! Connections of weir's own to the servers: metadata, the LSN clock, recovery, auth_query. Never for clients' statements.

use anyhow::{Context, Result};
use tokio_postgres::{Client, Connection, Socket};

use crate::auth::credential::Credential;
use crate::back::connect::Login;
use crate::back::tls::{ControlStream, ServerTls};

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
