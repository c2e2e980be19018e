//! Connections of weir's own to the servers: metadata, the LSN clock, recovery, auth_query. Never for clients' statements.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Connection, Socket};

use crate::auth::credential::Credential;
use crate::back::connect::Login;
use crate::back::tls::{ControlStream, Material, ServerTls, ServerTlsMode};
use crate::config::Endpoint;
use crate::roles::{Cut, Route, Tenure, Vacant};

/// Longest wait for a TCP connection, where the caller has set no other.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// A server as the driver sees it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Without a host, if there is a route.
    pub config: tokio_postgres::Config,
    route: Option<Route>,
    tls: ServerTls,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Driver(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Vacant(#[from] Vacant),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl OpenError {
    /// What the driver or the server said, for who looks for that in an error.
    pub fn into_anyhow(self) -> anyhow::Error {
        match self {
            OpenError::Driver(error) => error.into(),
            other => other.into(),
        }
    }
}

impl Target {
    pub fn new(mut config: tokio_postgres::Config, tls: ServerTls) -> Self {
        config.ssl_mode(tls.driver_mode());
        Target { config, route: None, tls }
    }

    /// `config` has no host: where to connect is found out each time.
    pub fn routed(config: tokio_postgres::Config, route: Route, tls: ServerTls) -> Self {
        Target { route: Some(route), ..Target::new(config, tls) }
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

    /// The generation of the primary that it leads to now.
    pub fn tenure(&self) -> Tenure {
        self.route.as_ref().map_or_else(Tenure::unending, Route::tenure)
    }

    /// The primary was lost: the servers are asked at once.
    pub fn doubt(&self) {
        if let Some(roles) = self.route.as_ref().and_then(Route::follows) {
            roles.doubt();
        }
    }

    /// When the primary that it leads to came into force, if that is another one than at first.
    pub fn promoted(&self) -> Option<Instant> {
        let standing = self.route.as_ref()?.follows()?.standing();
        (standing.generation > 0).then_some(standing.since)
    }

    /// A pause between attempts, which ends when something about the primary has changed.
    pub async fn pause(&self, pause: Duration) {
        match &self.route {
            Some(route) => route.pause(pause).await,
            None => tokio::time::sleep(pause).await,
        }
    }

    /// Logs in to a server that `config` names; the caller drives the connection.
    pub async fn connect(&self) -> Result<(Client, Connection<Socket, ControlStream<Socket>>), tokio_postgres::Error> {
        self.config.connect(self.tls.clone()).await
    }

    /// Logs in; the connection lives as long as the client does, and its errors come back through the client as well. One to a
    /// primary is cut when another server becomes it.
    pub async fn open(&self) -> Result<Client, OpenError> {
        self.open_with(None).await
    }

    /// The same; each notification that comes is told, unless one that was told has not been looked at. The sender is dropped with the
    /// connection.
    pub async fn open_hearing(&self, heard: mpsc::Sender<()>) -> Result<Client, OpenError> {
        self.open_with(Some(heard)).await
    }

    async fn open_with(&self, heard: Option<mpsc::Sender<()>>) -> Result<Client, OpenError> {
        let way = self.route.as_ref().map(Route::now).transpose()?;
        let Some(way) = way else { return Ok(drive(self.connect().await?, None, heard)) };
        let Endpoint { host, port } = way.endpoint;
        if !way.follows() {
            let mut config = self.config.clone();
            config.host(host).port(*port);
            return Ok(drive(config.connect(self.tls.clone()).await?, None, heard));
        }
        let patience = self.config.get_connect_timeout().copied().unwrap_or(CONNECT_MAX);
        let opened = tokio::time::timeout(patience, TcpStream::connect((host.as_str(), *port)));
        let stream = opened.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        stream.set_nodelay(true)?;
        let cut = way.guard(&stream)?;
        let tls = MakeTlsConnect::<TcpStream>::make_tls_connect(&mut self.tls.clone(), host)?;
        Ok(drive(self.config.connect_raw(stream, tls).await?, cut, heard))
    }
}

/// Lets a connection run until its client is dropped.
fn drive<S, T>(
    (client, mut connection): (Client, Connection<S, T>),
    cut: Option<Arc<Cut>>,
    heard: Option<mpsc::Sender<()>>,
) -> Client
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        loop {
            match std::future::poll_fn(|task| connection.poll_message(task)).await {
                Some(Ok(AsyncMessage::Notification(_))) => {
                    if let Some(heard) = &heard {
                        // A full queue says it already.
                        let _ = heard.try_send(());
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::debug!("control connection ended: {error}");
                    break;
                }
                None => break,
            }
        }
        drop(cut);
    });
    client
}

/// The same login for the driver.
pub fn target(login: &Login) -> Target {
    let mut config = tokio_postgres::Config::new();
    config.user(&*login.user).dbname(&*login.database).application_name("weir control").connect_timeout(login.deadline);
    if let Credential::Password(password) = &*login.credential.now() {
        config.password(&**password);
    }
    Target::routed(config, login.route.clone(), login.tls.clone())
}

/// Logs in; the connection lives as long as the client does.
pub async fn connect(login: &Login) -> Result<Client> {
    target(login).open().await.map_err(OpenError::into_anyhow).with_context(|| login.route.endpoint().to_string())
}
