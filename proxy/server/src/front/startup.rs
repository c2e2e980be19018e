//! From the first byte to the first ReadyForQuery: TLS, protocol version, login.
//!
//! Invariant: bytes that came before TLS are never interpreted after it (CVE-2021-23214): anything buffered behind an
//! SSLRequest ends the connection. Before login a client can make weir hold at most [`HELLO_BYTES_MAX`] and one exchange.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::session::startup::startup_vars;
use weir_core::session::vars::{VarSet, Vars};
use weir_wire::backend::{AUTHENTICATION_OK, Status, put_backend_key, put_negotiate, put_parameter_status, put_ready};
use weir_wire::startup::{PROTOCOL_MINOR_MAX, Request, Startup, parse, size};

use super::authenticate::{Claim, authenticate};
use super::client::{Client, Socket};
use super::replication::{Mode, Replication, Wanted};
use super::session::Session;
use super::tls::ClientTls;
use crate::app::App;
use crate::config::TlsMode;
use crate::database::{Database, UserPools};
use crate::seats::Seats;
use crate::stats::Entry;

/// Most a client may have sent before it is logged in.
pub(super) const HELLO_BYTES_MAX: usize = 16 * 1024;

/// What became of a new connection.
pub enum Hello {
    Session(Box<Session>),
    Replication(Box<Replication>),
    /// The admin console.
    Admin(Box<Client>, String),
    /// Served (a cancel request) or refused; nothing more to do.
    Done,
}

/// First byte of a TLS record that holds a handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// Takes a new client up to its first ReadyForQuery. Refusals have been told to the client.
pub async fn hello(app: &Arc<App>, client: Client) -> io::Result<Hello> {
    let client = direct_tls(app, client).await?;
    let Some((mut client, request)) = negotiate(app, client).await? else { return Ok(Hello::Done) };
    let result = match parse(&request) {
        Ok(Request::Cancel { process, secret }) => {
            if !app.cancels.cancel(process, secret).await
                && let Some(fleet) = &app.fleet
            {
                fleet.cancel_elsewhere(process, secret);
            }
            return Ok(Hello::Done);
        }
        Ok(Request::Startup(startup)) => login(app, &mut client, &startup).await,
        Ok(Request::Unsupported(version)) => Err(UserError::new(
            Blame::Client,
            sqlstate::FEATURE_NOT_SUPPORTED,
            format!(
                "unsupported frontend protocol {}.{}: server supports 3.0 to 3.{PROTOCOL_MINOR_MAX}",
                version >> 16,
                version & 0xffff
            ),
        )
        .fatal()
        .into()),
        _ => Err(super::session::malformed().into()),
    };
    match result {
        Ok(LoggedIn::Admin(user)) => Ok(Hello::Admin(Box::new(client), user)),
        Ok(LoggedIn::Session(newcomer)) => greet(app, client, newcomer).await,
        Ok(LoggedIn::Replication { wanted, pools, minor }) => {
            let login = pools.primary(wanted.shard).login();
            let opened = Replication::open(client, wanted, login, app.cancels.register(minor)).await?;
            Ok(opened.map_or(Hello::Done, |replication| Hello::Replication(Box::new(replication))))
        }
        Err(Refused::Gone(error)) => Err(error),
        Err(Refused::User(error)) => {
            client.put_error(&error.fatal());
            client.send().await?;
            Ok(Hello::Done)
        }
    }
}

enum LoggedIn {
    Admin(String),
    Session(Newcomer),
    Replication { wanted: Wanted, pools: Arc<UserPools>, minor: u16 },
}

/// What is known of a client that has logged in.
struct Newcomer {
    db: Arc<Database>,
    pools: Arc<UserPools>,
    user: Arc<str>,
    vars: VarSet,
    application_name: String,
    seats: Seats,
    /// Of protocol 3, as agreed.
    minor: u16,
}

pub(super) enum Refused {
    User(UserError),
    Gone(io::Error),
}

impl From<UserError> for Refused {
    fn from(error: UserError) -> Self {
        Refused::User(error)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Refused::Gone(error)
    }
}

/// Answers SSL and GSS requests until the client sends something else. `None`: the connection is over.
async fn negotiate(app: &App, mut client: Client) -> io::Result<Option<(Client, Bytes)>> {
    loop {
        let Some(request) = first_request(&mut client).await? else { return Ok(None) };
        match parse(&request) {
            Ok(Request::Ssl) if !client.is_tls() => {
                if !client.inbuf.is_empty() {
                    return Ok(None);
                }
                match app.tls.load_full() {
                    Some(tls) => {
                        answer(&mut client, b"S").await?;
                        client = encrypt(client, &tls, false).await?;
                    }
                    None => answer(&mut client, b"N").await?,
                }
            }
            Ok(Request::Gss) => answer(&mut client, b"N").await?,
            Ok(Request::Startup(_))
                if !client.is_tls() && app.config().tls.as_ref().is_some_and(|tls| tls.mode == TlsMode::Require) =>
            {
                client.put_error(
                    &UserError::new(
                        Blame::Client,
                        sqlstate::INVALID_AUTHORIZATION,
                        "this server takes encrypted connections only",
                    )
                    .hint("Connect with sslmode=require.")
                    .fatal(),
                );
                client.send().await?;
                return Ok(None);
            }
            _ => return Ok(Some((client, request))),
        }
    }
}

async fn first_request(client: &mut Client) -> io::Result<Option<Bytes>> {
    loop {
        match size(&client.inbuf) {
            Err(_) => return Ok(None),
            Ok(Some(total)) if client.inbuf.len() >= total => return Ok(Some(client.inbuf.split_to(total).freeze())),
            Ok(_) => {}
        }
        if client.inbuf.len() > HELLO_BYTES_MAX || client.receive().await? == 0 {
            return Ok(None);
        }
    }
}

async fn answer(client: &mut Client, letter: &[u8]) -> io::Result<()> {
    client.out.extend_from_slice(letter);
    client.send().await
}

/// TLS that begins at once, without SSLRequest (`sslnegotiation=direct` of libpq 17).
async fn direct_tls(app: &App, client: Client) -> io::Result<Client> {
    match app.tls.load_full() {
        Some(tls) if client.peek().await? == Some(TLS_HANDSHAKE) => encrypt(client, &tls, true).await,
        _ => Ok(client),
    }
}

async fn encrypt(client: Client, tls: &ClientTls, direct: bool) -> io::Result<Client> {
    let address = client.address;
    let Some(stream) = client.into_plain() else { return Err(io::ErrorKind::InvalidData.into()) };
    let stream = tls.accept(stream, direct).await?;
    let mut client = Client::new(Socket::Tls(Box::new(stream)), address);
    client.end_point.clone_from(&tls.end_point);
    Ok(client)
}

async fn login(app: &Arc<App>, client: &mut Client, startup: &Startup<'_>) -> Result<LoggedIn, Refused> {
    let text = |name: &str| {
        startup.get(name).map(|value| String::from_utf8_lossy(value).into_owned()).filter(|value| !value.is_empty())
    };
    let user = text("user").ok_or_else(|| {
        UserError::new(
            Blame::Client,
            sqlstate::INVALID_AUTHORIZATION,
            "no PostgreSQL user name specified in startup packet",
        )
    })?;
    let mode = Mode::read(text("replication").as_deref())?;
    let database = text("database").unwrap_or_else(|| user.clone());
    let extensions: Vec<&[u8]> = startup.extensions().collect();
    let minor = PROTOCOL_MINOR_MAX.min(startup.minor);
    if startup.minor > PROTOCOL_MINOR_MAX || !extensions.is_empty() {
        put_negotiate(&mut client.out, minor, &extensions);
    }
    let claim = Claim { user: &user, database: &database, replication: mode == Mode::Physical };
    let identity = authenticate(app, client, &claim).await?;
    let pairs: Vec<(String, String)> = startup
        .parameters
        .iter()
        .map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), String::from_utf8_lossy(value).into_owned()))
        .collect();
    if mode != Mode::Off {
        let wanted = Wanted::read(app, mode, &user, &pairs, text("database").as_deref()).await?;
        let pools = wanted.db.pools(&app.config(), &user, identity.credential);
        return Ok(LoggedIn::Replication { wanted, pools, minor });
    }
    if app.is_admin_database(&database) {
        return app.admit_admin(&user).map(|()| LoggedIn::Admin(user)).map_err(Into::into);
    }
    let config = app.config();
    let (db, seats) = app.databases.enter(&config, &database, &user).await?;
    let vars = startup_vars(pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())))?;
    let vars = over(identity.settings, &vars)?;
    let pools = db.pools(&config, &user, identity.credential);
    let application_name = text("application_name").unwrap_or_default();
    Ok(LoggedIn::Session(Newcomer { db, pools, user: user.into(), vars, application_name, seats, minor }))
}

/// The user's defaults, with what the client says on top.
fn over(mut settings: VarSet, vars: &VarSet) -> Result<VarSet, UserError> {
    if vars.iter().all(|(name, value)| settings.set(name, value)) {
        return Ok(settings);
    }
    Err(UserError::new(Blame::Client, sqlstate::SYNTAX_ERROR, "too many settings in the startup packet"))
}

/// Login is done: what a server would report now, the cancel key, and ReadyForQuery.
async fn greet(app: &Arc<App>, mut client: Client, newcomer: Newcomer) -> io::Result<Hello> {
    let Newcomer { db, pools, user, vars, application_name, seats, minor } = newcomer;
    client.out.extend_from_slice(AUTHENTICATION_OK);
    let home = db.view().topology.home;
    if let Err(error) = report_parameters(&mut client, pools.primary(home), &vars).await {
        client.put_error(&error.fatal());
        client.send().await?;
        return Ok(Hello::Done);
    }
    let cancel = app.cancels.register(minor);
    put_backend_key(&mut client.out, cancel.process, cancel.secret());
    put_ready(&mut client.out, Status::Idle);
    client.send().await?;
    let entry = Entry { seats, mode: pools.mode(), cancel: Arc::clone(&cancel.slot) };
    let stats = db.stats.open(Arc::clone(&user), &client, application_name, entry);
    Ok(Hello::Session(Box::new(Session::new(Arc::clone(app), db, pools, user, client, cancel, Vars::new(vars), stats))))
}

/// ParameterStatus as the servers report it, with the client's own settings applied and thereby checked.
async fn report_parameters(
    client: &mut Client,
    pool: &Arc<crate::back::pool::Pool>,
    vars: &VarSet,
) -> Result<(), UserError> {
    let parameters = pool.parameters().await?;
    for (name, value) in parameters.iter() {
        put_parameter_status(&mut client.out, name, value);
    }
    client.out.extend_from_slice(&pool.reported_settings(vars).await?);
    Ok(())
}
