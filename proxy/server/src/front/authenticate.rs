//! How a client proves who it is, as the HBA rules say.
//!
//! Invariant: an [`Identity`] exists only for a user who is known and has proved what the rule asks. Users that are not known
//! go through the same messages as known ones, up to and with the refusal.
//! Source: ClientAuthentication in src/backend/libpq/auth.c, for the order of checks and the words.

use std::io;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::hba::{ClientCertificate, Method, Peer};
use weir_core::session::vars::VarSet;
use weir_wire::backend::tag;
use weir_wire::frame;
use weir_wire::frontend;

use super::client::Client;
use super::startup::{HELLO_BYTES_MAX, Refused};
use crate::app::App;
use crate::auth::certificate::common_name;
use crate::auth::credential::Credential;
use crate::auth::directory::Entry;
use crate::auth::scram;
use crate::auth::scram_server::{ScramServer, wrong_password};
use crate::auth::secret::Md5Hash;

/// Codes of Authentication messages (src/include/libpq/protocol.h).
const MD5: i32 = 5;
const SASL: i32 = 10;
const SASL_CONTINUE: i32 = 11;
const SASL_FINAL: i32 = 12;

/// Who a client says it is.
pub(super) struct Claim<'a> {
    pub user: &'a str,
    pub database: &'a str,
    /// Physical replication: no database is meant.
    pub replication: bool,
}

/// A client that has proved who it is.
pub(super) struct Identity {
    /// What its servers' connections log in with.
    pub credential: Credential,
    /// Defaults of its sessions.
    pub settings: VarSet,
}

/// Finds the rule, and asks for what it asks for. AuthenticationOk is the caller's to send.
pub(super) async fn authenticate(app: &App, client: &mut Client, claim: &Claim<'_>) -> Result<Identity, Refused> {
    let peer = Peer {
        address: client.address.ip(),
        local: client.local_address().map_or(client.address, |local| local).ip(),
        encrypted: client.is_tls(),
        user: claim.user,
        database: claim.database,
        replication: claim.replication,
    };
    let config = app.config();
    let rule = config.hba.decide(&peer)?;
    let (method, certificate) = (rule.method, rule.certificate);
    if (method == Method::Cert || certificate != ClientCertificate::NotAsked) && client.peer_certificate().is_none() {
        return Err(refused("connection requires a valid client certificate")
            .hint("Connect with sslcert and sslkey, signed by the authority in client_ca of weir's [tls].")
            .into());
    }
    let entry = app.directory.find(claim.user).await?;
    let entry = entry.as_deref();
    let credential = match method {
        Method::Trust | Method::Cert => entry.map_or(Credential::None, Entry::credential),
        // Rejections have been told by the rules.
        Method::Reject | Method::Scram => scram_login(app, client, claim.user, entry).await?,
        Method::Md5 | Method::AsStored => {
            let hash = match method {
                Method::Md5 => entry.and_then(|entry| entry.md5_of(claim.user)),
                _ => entry.and_then(Entry::md5),
            };
            match (hash, entry) {
                (Some(hash), Some(entry)) => md5_login(app, client, claim.user, entry, hash).await?,
                _ => scram_login(app, client, claim.user, entry).await?,
            }
        }
    };
    if method == Method::Cert || certificate == ClientCertificate::VerifyFull {
        let named = client.peer_certificate().and_then(common_name);
        if named.as_deref() != Some(claim.user) {
            return Err(match method {
                Method::Cert => {
                    refused(format!("certificate authentication failed for user \"{}\"", claim.user)).into()
                }
                Method::Trust => refused(format!("\"trust\" authentication failed for user \"{}\"", claim.user)).into(),
                _ => wrong_password(claim.user).into(),
            });
        }
    }
    let Some(entry) = entry else {
        return Err(refused(format!("role \"{}\" does not exist", claim.user))
            .hint("Add the user to weir's users_file, or configure [auth_query].")
            .into());
    };
    Ok(Identity { credential, settings: entry.settings.clone() })
}

/// SCRAM-SHA-256, with channel binding where the client wants it. What the client's proof gives away is what weir logs in
/// with, unless it knows the password itself.
async fn scram_login(app: &App, client: &mut Client, user: &str, entry: Option<&Entry>) -> Result<Credential, Refused> {
    let mut exchange = ScramServer::new(user, app.directory.expected(user, entry), client.end_point.clone());
    frame::put(&mut client.out, tag::AUTHENTICATION, |out| {
        out.extend_from_slice(&SASL.to_be_bytes());
        for mechanism in exchange.mechanisms() {
            frame::put_cstr(out, mechanism.as_bytes());
        }
        out.extend_from_slice(&[0]);
    });
    client.send().await?;
    let first = password_message(client).await?;
    let challenge = exchange.on_first(&first)?;
    put_authentication(client, SASL_CONTINUE, &challenge);
    client.send().await?;
    let last = password_message(client).await?;
    let proven = exchange.on_final(&last).inspect_err(|error| note_failure(app, user, error))?;
    put_authentication(client, SASL_FINAL, &proven.answer);
    Ok(match entry.map_or(Credential::None, Entry::credential) {
        Credential::None => Credential::Scram(proven.keys.into()),
        password => password,
    })
}

async fn md5_login(
    app: &App,
    client: &mut Client,
    user: &str,
    entry: &Entry,
    hash: Md5Hash,
) -> Result<Credential, Refused> {
    let salt: [u8; 4] = rand::random();
    put_authentication(client, MD5, &salt);
    client.send().await?;
    let answer = password_message(client).await?;
    let answer = answer.strip_suffix(b"\0").ok_or_else(super::session::malformed)?;
    if !scram::same(answer, hash.answer(salt).as_bytes()) {
        let error = wrong_password(user);
        note_failure(app, user, &error);
        return Err(error.into());
    }
    Ok(match entry.credential() {
        Credential::None => Credential::Md5(hash),
        password => password,
    })
}

fn note_failure(app: &App, user: &str, error: &UserError) {
    if error.sqlstate == sqlstate::INVALID_PASSWORD {
        app.directory.doubt(user);
    }
}

fn put_authentication(client: &mut Client, code: i32, data: &[u8]) {
    frame::put(&mut client.out, tag::AUTHENTICATION, |out| {
        out.extend_from_slice(&code.to_be_bytes());
        out.extend_from_slice(data);
    });
}

fn refused(message: impl Into<std::borrow::Cow<'static, str>>) -> UserError {
    UserError::new(Blame::Client, sqlstate::INVALID_AUTHORIZATION, message).fatal()
}

/// The body of the next message, which must be of the password family.
async fn password_message(client: &mut Client) -> Result<Bytes, Refused> {
    loop {
        let header = frame::header(&client.inbuf, HELLO_BYTES_MAX).map_err(|_| super::session::malformed())?;
        if let Some((kind, total)) = header {
            if kind != frontend::tag::PASSWORD {
                return Err(super::session::malformed().into());
            }
            if client.inbuf.len() >= total {
                return Ok(client.inbuf.split_to(total).freeze().slice(frame::HEADER..));
            }
        }
        if client.receive().await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}
