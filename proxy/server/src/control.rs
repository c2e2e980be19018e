//! Connections of weir's own to the servers: metadata, the LSN clock, recovery. Never for clients' statements.

use anyhow::{Context, Result};
use tokio_postgres::{Client, NoTls};

use crate::back::connect::Login;

/// The same login for the driver.
pub fn config(login: &Login) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config
        .host(&*login.host)
        .port(login.port)
        .user(&*login.user)
        .dbname(&*login.database)
        .application_name("weir control")
        .connect_timeout(login.deadline);
    if let Some(password) = &login.password {
        config.password(&**password);
    }
    config
}

/// Logs in; the connection lives as long as the client does.
pub async fn connect(login: &Login) -> Result<Client> {
    let (client, connection) =
        config(login).connect(NoTls).await.with_context(|| format!("{}:{}", login.host, login.port))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("control connection ended: {error}");
        }
    });
    Ok(client)
}
