//! weir's side of a login at a Postgres server: SCRAM-SHA-256(-PLUS), MD5 or plain text, as the server asks.
//!
//! Invariant: once SCRAM has begun, AuthenticationOk counts only after the server has proved that it knows the verifier
//! too. A server cannot make weir repeat or change the method within one login.
//!
//! Non-goals: GSSAPI, SSPI, OAuth.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use postgres_protocol::authentication::{md5_hash, sasl};
use weir_core::error::{Blame, UserError, sqlstate};

use super::credential::Credential;
use super::scram::{self, PLAIN, PLUS, ScramKeys, TLS_SERVER_END_POINT};

/// Authentication request codes (src/include/libpq/protocol.h).
mod code {
    pub const OK: i32 = 0;
    pub const CLEARTEXT: i32 = 3;
    pub const MD5: i32 = 5;
    pub const SASL: i32 = 10;
    pub const SASL_CONTINUE: i32 = 11;
    pub const SASL_FINAL: i32 = 12;
}

/// What the connection allows a login to be bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    Plain,
    /// TLS; the hash of the server's certificate where its kind has one.
    Tls(Option<Vec<u8>>),
}

/// One login.
pub struct ClientAuth {
    user: String,
    credential: Arc<Credential>,
    channel: Channel,
    state: State,
}

enum State {
    Start,
    /// A password or hash has been sent.
    Sent,
    /// client-first-message has been sent.
    First(Scram),
    /// client-final-message has been sent.
    Final(Scram),
    /// The server's signature was right.
    Proved,
    Done,
}

enum Scram {
    Password(Box<sasl::ScramSha256>),
    Keys(Box<KeyExchange>),
}

impl ClientAuth {
    pub fn new(user: &str, credential: Arc<Credential>, channel: Channel) -> Self {
        ClientAuth { user: user.to_owned(), credential, channel, state: State::Start }
    }

    /// True once the server has accepted the login.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// The body of an Authentication message (int32 code first) → the whole message to answer with, if one is due.
    pub fn respond(&mut self, body: &[u8]) -> Result<Option<Vec<u8>>, UserError> {
        let (code, data) =
            body.split_first_chunk::<4>().ok_or_else(|| self.refused("its authentication request is cut short"))?;
        // Whatever goes wrong below, this login is over.
        let state = std::mem::replace(&mut self.state, State::Sent);
        match (i32::from_be_bytes(*code), state) {
            (code::OK, State::Start | State::Sent | State::Proved) => {
                self.state = State::Done;
                Ok(None)
            }
            (code::OK, _) => Err(self.refused("it accepted the login without proving that it knows the password")),
            (code::CLEARTEXT, State::Start) => {
                let Credential::Password(password) = &*self.credential else { return Err(self.lacks("a password")) };
                if password.contains('\0') {
                    return Err(self.lacks("a password without NUL"));
                }
                Ok(Some(password_message(&[password.as_bytes(), b"\0"])))
            }
            (code::MD5, State::Start) => {
                let salt = data.try_into().map_err(|_| self.refused("its MD5 salt is not four bytes"))?;
                let hash = match &*self.credential {
                    Credential::Password(password) => md5_hash(self.user.as_bytes(), password.as_bytes(), salt),
                    Credential::Md5(hash) => hash.answer(salt),
                    Credential::Scram(_) | Credential::None => return Err(self.lacks("an MD5 hash")),
                };
                Ok(Some(password_message(&[hash.as_bytes(), b"\0"])))
            }
            (code::SASL, State::Start) => self.first(data).map(Some),
            (code::SASL_CONTINUE, State::First(scram)) => self.challenged(scram, data).map(Some),
            (code::SASL_FINAL, State::Final(scram)) => {
                let proved = match scram {
                    Scram::Password(mut exchange) => exchange.finish(data).is_ok(),
                    Scram::Keys(exchange) => exchange.finish(data),
                };
                if !proved {
                    return Err(self.refused("it could not prove that it knows the password"));
                }
                self.state = State::Proved;
                Ok(None)
            }
            (code, _) => Err(self
                .refused(format!("authentication request {code} is unknown or out of turn"))
                .hint("weir logs in to servers with scram-sha-256, md5, password, cert or trust; see pg_hba.conf.")),
        }
    }

    /// `mechanisms`: names, each with a NUL, and one NUL more.
    fn first(&mut self, mechanisms: &[u8]) -> Result<Vec<u8>, UserError> {
        let offers = |wanted: &str| mechanisms.split(|&byte| byte == 0).any(|name| name == wanted.as_bytes());
        let (mechanism, binding) = match &self.channel {
            Channel::Tls(Some(hash)) if offers(PLUS) => (PLUS, Binding::Bound(hash.clone())),
            Channel::Tls(Some(_)) if offers(PLAIN) => (PLAIN, Binding::NotOffered),
            _ if offers(PLAIN) => (PLAIN, Binding::Unable),
            _ => {
                let error = self.refused("it offers no SASL mechanism that weir can use");
                return Err(error.hint("Use scram-sha-256 in pg_hba.conf."));
            }
        };
        let scram = match &*self.credential {
            Credential::Password(password) => {
                Scram::Password(Box::new(sasl::ScramSha256::new(password.as_bytes(), binding.into())))
            }
            Credential::Scram(keys) => Scram::Keys(Box::new(KeyExchange::new(Arc::clone(keys), binding))),
            Credential::Md5(_) | Credential::None => return Err(self.lacks("a password or SCRAM key")),
        };
        let message = match &scram {
            Scram::Password(exchange) => exchange.message().to_vec(),
            Scram::Keys(exchange) => exchange.first().into_bytes(),
        };
        let length = (message.len() as u32).to_be_bytes();
        let answer = password_message(&[mechanism.as_bytes(), b"\0", &length, &message]);
        self.state = State::First(scram);
        Ok(answer)
    }

    fn challenged(&mut self, scram: Scram, challenge: &[u8]) -> Result<Vec<u8>, UserError> {
        let (scram, answer) = match scram {
            Scram::Password(mut exchange) => {
                exchange.update(challenge).map_err(|_| self.refused("its SCRAM challenge is malformed"))?;
                let answer = exchange.message().to_vec();
                (Scram::Password(exchange), answer)
            }
            Scram::Keys(mut exchange) => {
                let answer = exchange.challenged(challenge).map_err(|problem| self.unanswerable(problem))?;
                (Scram::Keys(exchange), answer.into_bytes())
            }
        };
        self.state = State::Final(scram);
        Ok(password_message(&[&answer]))
    }

    fn unanswerable(&self, problem: BadChallenge) -> UserError {
        match problem {
            BadChallenge::Malformed => self.refused("its SCRAM challenge is malformed"),
            BadChallenge::OtherVerifier => self
                .refused("its password verifier of this user is not the one that weir checked the client with")
                .hint(
                    "Give all servers the same verifier (copy rolpassword of pg_authid), or give weir the password in users_file. After a change of password, log in again.",
                ),
        }
    }

    fn lacks(&self, what: &str) -> UserError {
        self.refused(format!("it asks for {what} and weir has none for this user")).hint(
            "Give the user a password in users_file, or a SCRAM verifier on weir and all servers alike; or let the server trust weir by its client certificate.",
        )
    }

    fn refused(&self, detail: impl Into<std::borrow::Cow<'static, str>>) -> UserError {
        let message = format!("weir could not log in to the server as \"{}\"", self.user);
        UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, message).detail(detail)
    }
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientAuth({})", self.user)
    }
}

/// The gs2 flag of RFC 5802 §6.
enum Binding {
    Unable,
    /// weir could, the server seems not to.
    NotOffered,
    /// With the hash of the server's certificate.
    Bound(Vec<u8>),
}

impl From<Binding> for sasl::ChannelBinding {
    fn from(binding: Binding) -> Self {
        match binding {
            Binding::Unable => sasl::ChannelBinding::unsupported(),
            Binding::NotOffered => sasl::ChannelBinding::unrequested(),
            Binding::Bound(hash) => sasl::ChannelBinding::tls_server_end_point(hash),
        }
    }
}

/// SCRAM with the keys instead of the password.
struct KeyExchange {
    keys: Arc<ScramKeys>,
    header: String,
    bound_to: Vec<u8>,
    nonce: String,
    /// AuthMessage, once the challenge is there.
    signed: String,
}

enum BadChallenge {
    Malformed,
    /// Another salt or number of iterations: the keys do not fit.
    OtherVerifier,
}

impl KeyExchange {
    fn new(keys: Arc<ScramKeys>, binding: Binding) -> Self {
        let (header, bound_to) = match binding {
            Binding::Unable => ("n,,".to_owned(), Vec::new()),
            Binding::NotOffered => ("y,,".to_owned(), Vec::new()),
            Binding::Bound(hash) => (format!("p={TLS_SERVER_END_POINT},,"), hash),
        };
        KeyExchange { keys, header, bound_to, nonce: scram::nonce(), signed: String::new() }
    }

    fn first(&self) -> String {
        format!("{}n=,r={}", self.header, self.nonce)
    }

    /// server-first-message → client-final-message.
    fn challenged(&mut self, challenge: &[u8]) -> Result<String, BadChallenge> {
        let challenge = std::str::from_utf8(challenge).map_err(|_| BadChallenge::Malformed)?;
        let mut attributes = challenge.split(',');
        let mut attribute = |name| attributes.next().and_then(|text| text.strip_prefix(name));
        let (Some(nonce), Some(salt), Some(iterations)) = (attribute("r="), attribute("s="), attribute("i=")) else {
            return Err(BadChallenge::Malformed);
        };
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(BadChallenge::Malformed);
        }
        let salt = STANDARD.decode(salt).map_err(|_| BadChallenge::Malformed)?;
        let iterations: u32 = iterations.parse().map_err(|_| BadChallenge::Malformed)?;
        let verifier = &self.keys.verifier;
        if salt != verifier.salt || iterations != verifier.iterations {
            return Err(BadChallenge::OtherVerifier);
        }
        let binding = STANDARD.encode([self.header.as_bytes(), &self.bound_to].concat());
        let without_proof = format!("c={binding},r={nonce}");
        self.signed = format!("n=,r={},{challenge},{without_proof}", self.nonce);
        let signature = scram::hmac(&verifier.stored_key, &[self.signed.as_bytes()]);
        let proof = STANDARD.encode(scram::xor(&self.keys.client_key, &signature));
        Ok(format!("{without_proof},p={proof}"))
    }

    /// Does server-final-message prove that the server has the verifier?
    fn finish(&self, last: &[u8]) -> bool {
        let signature = scram::hmac(&self.keys.verifier.server_key, &[self.signed.as_bytes()]);
        let sent = last.strip_prefix(b"v=").and_then(|text| STANDARD.decode(text).ok());
        sent.is_some_and(|sent| scram::same(&sent, &signature))
    }
}

/// PasswordMessage, SASLInitialResponse and SASLResponse share the tag and differ in their body.
fn password_message(parts: &[&[u8]]) -> Vec<u8> {
    let length = 4 + parts.iter().map(|part| part.len()).sum::<usize>();
    let mut message = Vec::with_capacity(1 + length);
    message.push(b'p');
    message.extend_from_slice(&(length as u32).to_be_bytes());
    for part in parts {
        message.extend_from_slice(part);
    }
    message
}

#[cfg(test)]
mod tests;
