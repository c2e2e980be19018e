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
    pub host: Arc<str>,
    pub port: u16,
    pub user: Arc<str>,
    pub database: Arc<str>,
    pub credential: Keyring,
    pub tls: ServerTls,
    pub deadline: Duration,
}

/// What a server reports at login, in its order.
pub type Parameters = Vec<(Bytes, Bytes)>;

/// Logs in. Errors are ready for the client: 08001 with the server named, or the server's own refusal.
pub async fn connect(login: &Login) -> Result<(Backend, Parameters), UserError> {
    // Nothing else: whatever a client does not set itself must be what it would be on a connection of its own.
    let parameters = [("user", &*login.user), ("database", &*login.database)];
    connect_as(login, &parameters).await
}

/// As [`connect`], with these startup parameters in place of weir's own.
pub async fn connect_as<T: AsRef<str>>(
    login: &Login,
    parameters: &[(T, T)],
) -> Result<(Backend, Parameters), UserError> {
    // Boxed: a login, with its TLS handshake, would else be part of every session's task for all its life.
    match tokio::time::timeout(login.deadline, Box::pin(open(login, parameters))).await {
        Ok(result) => result,
        Err(_) => Err(unreachable(login, &format!("no answer within {:?}", login.deadline))),
    }
}

async fn open<T: AsRef<str>>(login: &Login, parameters: &[(T, T)]) -> Result<(Backend, Parameters), UserError> {
    let unreachable_io = |error: io::Error| unreachable(login, &error.to_string());
    let stream = TcpStream::connect((&*login.host, login.port)).await.map_err(unreachable_io)?;
    stream.set_nodelay(true).map_err(unreachable_io)?;
    let address = stream.peer_addr().map_err(unreachable_io)?;
    let mut stream = login.tls.encrypt(&login.host, stream).await.map_err(unreachable_io)?;
    let mut hello = BytesMut::new();
    startup::put_startup(&mut hello, parameters);
    stream.write_all(&hello).await.map_err(unreachable_io)?;
    stream.flush().await.map_err(unreachable_io)?;

    let tls = stream.is_tls().then(|| CancelTls { tls: login.tls.clone(), host: Arc::clone(&login.host) });
    let key = CancelKey { address, process: 0, secret: Bytes::new(), tls: tls.clone() };
    let mut auth = ClientAuth::new(&login.user, login.credential.now(), stream.channel());
    let mut backend = Backend::new(stream, BytesMut::new(), Arc::new(key), Instant::now());
    let mut reported = Vec::new();
    loop {
        let (tag, body) = backend.receive().await.map_err(unreachable_io)?;
        match tag {
            tag::AUTHENTICATION => {
                if let Some(answer) = auth.respond(&body)? {
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
            tag::ERROR => return Err(refused(login, &body)),
            _ => return Err(unreachable(login, "it does not speak the Postgres protocol")),
        }
    }
}

fn unreachable(login: &Login, why: &str) -> UserError {
    UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, format!("cannot connect to server {}:{}", login.host, login.port))
        .detail(why.to_owned())
        .hint("Check that this Postgres server is running and reachable from weir; SHOW SHARDS in the admin database lists them.")
}

fn refused(login: &Login, body: &[u8]) -> UserError {
    let field =
        |code| report_field(body, code).map(|text| String::from_utf8_lossy(text).into_owned()).unwrap_or_default();
    if let Some(error) = crate::databases::passed_on(&field(b'C'), &field(b'M')) {
        return error.detail(format!("server {}:{} says so", login.host, login.port));
    }
    UserError::new(
        Blame::Server,
        sqlstate::CANNOT_CONNECT,
        format!("server {}:{} refused the login", login.host, login.port),
    )
    .detail(format!("{}: {}", field(b'C'), field(b'M')))
    .hint("Check the user's password in users_file and pg_hba.conf of that server.")
}
