//! Opening a server connection: TCP, TLS, startup, authentication, until the first ReadyForQuery.
//!
//! Every step is bounded by one deadline. Non-goal: pooling.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::backend::{Status, read_parameter_status, report_field, tag};
use weir_wire::read::Reader;
use weir_wire::startup;

use super::conn::Backend;
use super::tls::ServerTls;
use crate::auth::credential::Keyring;
use crate::auth::scram_client::ClientAuth;
use crate::config::Endpoint;
use crate::roles::Route;

/// Body of a BackendKeyData: process number, and a secret of up to 256 bytes (protocol 3.2).
const KEY_BYTES: std::ops::RangeInclusive<usize> = 8..=4 + 256;

/// What CancelRequest needs.
#[derive(Clone, Debug)]
pub struct CancelKey {
    pub address: SocketAddr,
    pub process: i32,
    pub secret: Bytes,
    /// Set where the Backend is inside TLS: a cancel then is too, as libpq's are since 17.
    pub tls: Option<CancelTls>,
}

/// How to encrypt a CancelRequest.
#[derive(Clone, Debug)]
pub struct CancelTls {
    pub tls: ServerTls,
    pub host: Arc<str>,
}

/// Where and as whom to log in.
#[derive(Clone)]
pub struct Login {
    pub route: Route,
    pub user: Arc<str>,
    pub database: Arc<str>,
    pub credential: Keyring,
    pub tls: ServerTls,
    pub deadline: Duration,
}

/// What a server reports at login, in its order.
pub type Parameters = Vec<(Bytes, Bytes)>;

/// Why a login has failed, ready for the client.
pub(super) enum Refused {
    /// The server was not reached, or is not up: 08001 with the server named, or its own 57P03. Another moment may be a better one.
    Away(UserError),
    /// It does not want this login.
    Said(UserError),
}

impl From<Refused> for UserError {
    fn from(refused: Refused) -> Self {
        let (Refused::Away(error) | Refused::Said(error)) = refused;
        error
    }
}

/// Logs in. Errors are ready for the client.
pub async fn connect(login: &Login) -> Result<(Backend, Parameters), UserError> {
    Ok(reach(login).await?)
}

/// As [`connect`], for whoever tries again.
pub(super) async fn reach(login: &Login) -> Result<(Backend, Parameters), Refused> {
    // Nothing else: whatever a client does not set itself must be what it would be on a connection of its own.
    let parameters = [("user", &*login.user), ("database", &*login.database)];
    attempt(login, &parameters).await
}

/// Logs in with these startup parameters in place of weir's own. Errors are ready for the client.
pub async fn connect_as<T: AsRef<str>>(
    login: &Login,
    parameters: &[(T, T)],
) -> Result<(Backend, Parameters), UserError> {
    Ok(attempt(login, parameters).await?)
}

async fn attempt<T: AsRef<str>>(login: &Login, parameters: &[(T, T)]) -> Result<(Backend, Parameters), Refused> {
    // Boxed: a login, with its TLS handshake, would else be part of every session's task for all its life.
    match tokio::time::timeout(login.deadline, Box::pin(open(login, parameters))).await {
        Ok(result) => result,
        Err(_) => Err(unreachable(login.route.endpoint(), &format!("no answer within {:?}", login.deadline))),
    }
}

async fn open<T: AsRef<str>>(login: &Login, parameters: &[(T, T)]) -> Result<(Backend, Parameters), Refused> {
    let way = login.route.now().map_err(|vacant| Refused::Away(vacant.told()))?;
    let server = way.endpoint;
    let unreachable_io = |error: io::Error| unreachable(server, &error.to_string());
    let stream = TcpStream::connect((server.host.as_str(), server.port)).await.map_err(unreachable_io)?;
    stream.set_nodelay(true).map_err(unreachable_io)?;
    let cut = way.guard(&stream).map_err(unreachable_io)?;
    let address = stream.peer_addr().map_err(unreachable_io)?;
    let mut stream = login.tls.encrypt(&server.host, stream).await.map_err(unreachable_io)?;
    let mut hello = BytesMut::new();
    startup::put_startup(&mut hello, parameters);
    stream.write_all(&hello).await.map_err(unreachable_io)?;
    stream.flush().await.map_err(unreachable_io)?;

    let tls = stream.is_tls().then(|| CancelTls { tls: login.tls.clone(), host: server.host.as_str().into() });
    let key = CancelKey { address, process: 0, secret: Bytes::new(), tls: tls.clone() };
    let mut auth = ClientAuth::new(&login.user, login.credential.now(), stream.channel());
    let mut backend = Backend::new(stream, BytesMut::new(), Arc::new(key), Instant::now());
    backend.cut = cut;
    let mut reported = Vec::new();
    loop {
        let (tag, body) = backend.receive().await.map_err(unreachable_io)?;
        match tag {
            tag::AUTHENTICATION => {
                if let Some(answer) = auth.respond(&body).map_err(Refused::Said)? {
                    backend.out.extend_from_slice(&answer);
                    backend.send().await.map_err(unreachable_io)?;
                }
            }
            tag::PARAMETER_STATUS => {
                if read_parameter_status(&body).is_ok() {
                    let mut reader = Reader::new(&body);
                    let name = reader.cstr().map(|name| body.slice_ref(name));
                    let value = reader.cstr().map(|value| body.slice_ref(value));
                    if let (Ok(name), Ok(value)) = (name, value) {
                        reported.push((name, value));
                    }
                }
            }
            tag::BACKEND_KEY_DATA if KEY_BYTES.contains(&body.len()) => {
                let process = i32::from_be_bytes([body[0], body[1], body[2], body[3]]);
                backend.cancel_key =
                    Arc::new(CancelKey { address, process, secret: body.slice(4..), tls: tls.clone() });
            }
            tag::NOTICE => {}
            tag::READY => {
                backend.status = Status::Idle;
                return Ok((backend, reported));
            }
            tag::ERROR => return Err(refused(server, &body)),
            _ => return Err(unreachable(server, "it does not speak the Postgres protocol")),
        }
    }
}

fn unreachable(server: &Endpoint, why: &str) -> Refused {
    let error = UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, format!("cannot connect to server {server}"));
    Refused::Away(error.detail(why.to_owned()).hint(
        "Check that this Postgres server is running and reachable from weir; SHOW SHARDS in the admin database lists them.",
    ))
}

fn refused(server: &Endpoint, body: &[u8]) -> Refused {
    let field =
        |code| report_field(body, code).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default();
    let code = field(b'C');
    let error = match crate::databases::passed_on(&code, &field(b'M')) {
        Some(error) => error.detail(format!("server {server} says so")),
        None => {
            let message = format!("server {server} refused the login");
            UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, message)
                .detail(format!("{code}: {}", field(b'M')))
                .hint("Check the user's password in users_file and pg_hba.conf of that server.")
        }
    };
    // It starts, stops, or has just been stopped.
    if code.starts_with("57P") { Refused::Away(error) } else { Refused::Said(error) }
}
