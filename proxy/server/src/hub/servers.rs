//! The hub's servers, and which of them is asked: the primary of now.
//!
//! Invariant: where replicas are named, all that weir asks the hub goes to the server that is in force as its primary, on a connection
//! that is cut when another becomes it; so nothing is read from, or written to, a hub that was replaced and lives on. Non-goals:
//! promoting one, and judging what a promotion has lost ([`weir_core::topology::follow`]).

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_postgres::config::Host;

use super::{HubError, NAME, PATIENCE};
use crate::config::{Endpoint, HubConfig};
use crate::control::{OpenError, Target};
use crate::probe::{self, EndpointView};
use crate::roles::{Roles, Route};

/// How the servers are told apart from shards, for people.
const CALLED: &str = "hub";

/// The way to the hub.
pub(super) struct Servers {
    pub server: Target,
    /// The same for connections of clients, which do not come through [`Target`]. `None`: it is reached by a socket file.
    pub route: Option<Route>,
    /// They end when this is dropped.
    pub probes: JoinSet<()>,
}

/// Where the connection string leads first. `None`: to a socket file.
fn first(dsn: &tokio_postgres::Config) -> Option<Endpoint> {
    let Host::Tcp(host) = dsn.get_hosts().first()? else { return None };
    Some(Endpoint { host: host.clone(), port: dsn.get_ports().first().copied().unwrap_or(5432) })
}

/// Who logs in, and to which database; not where. Errors: the connection string is not valid.
pub fn account(hub: &HubConfig) -> Result<tokio_postgres::Config, HubError> {
    let dsn = parsed(hub)?;
    let mut login = tokio_postgres::Config::new();
    if let Some(user) = dsn.get_user() {
        login.user(user);
    }
    if let Some(password) = dsn.get_password() {
        login.password(password);
    }
    if let Some(database) = dsn.get_dbname() {
        login.dbname(database);
    }
    Ok(login)
}

fn parsed(hub: &HubConfig) -> Result<tokio_postgres::Config, HubError> {
    let mut config: tokio_postgres::Config = hub.dsn.expose().parse().map_err(|_| HubError::Dsn)?;
    if let Some(password) = &hub.password {
        config.password(password.expose());
    }
    Ok(config)
}

impl Servers {
    /// Finds out who is the primary, if there may be another than the one in the connection string.
    pub(super) async fn find(hub: &HubConfig) -> Result<Servers, HubError> {
        let mut dsn = parsed(hub)?;
        dsn.connect_timeout(PATIENCE).application_name(format!("{NAME}{}", crate::map::proxy_id()));
        let mut probes = JoinSet::new();
        let named = first(&dsn);
        let Some(primary) = named.clone().filter(|_| !hub.replicas.is_empty()) else {
            let route = named.map(|at| Route::Server(Arc::new(at)));
            return Ok(Servers { server: Target::new(dsn, hub.tls.clone()), route, probes });
        };
        let all = std::iter::once(&primary).chain(&hub.replicas);
        let views: Vec<_> = all.map(|at| EndpointView::new(at.clone())).collect();
        let roles = Roles::new(CALLED, views.clone());
        for view in views {
            let at = Route::Server(Arc::clone(&view.endpoint));
            let server = probe::prepared(Target::routed(account(hub)?, at, hub.tls.clone()));
            probes.spawn(probe::run(view, Arc::clone(&roles), server));
        }
        roles.decided(probe::FIRST_WORD_MAX).await;
        let mut login = account(hub)?;
        login.connect_timeout(PATIENCE).application_name(dsn.get_application_name().unwrap_or(NAME));
        let route = Route::Primary(roles);
        Ok(Servers { server: Target::routed(login, route.clone(), hub.tls.clone()), route: Some(route), probes })
    }
}

/// Opens the connections that are kept.
#[derive(Clone, Debug)]
pub(super) struct Connections(pub Target);

impl bb8::ManageConnection for Connections {
    type Connection = Client;
    type Error = OpenError;

    async fn connect(&self) -> Result<Client, OpenError> {
        self.0.open().await
    }

    async fn is_valid(&self, client: &mut Client) -> Result<(), OpenError> {
        Ok(client.simple_query("").await.map(drop)?)
    }

    fn has_broken(&self, client: &mut Client) -> bool {
        client.is_closed()
    }
}
