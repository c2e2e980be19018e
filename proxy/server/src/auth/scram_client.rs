//! weir's side of a login at a Postgres server: SCRAM-SHA-256, MD5 or plain text, as the server asks.
//!
//! Invariant: once SCRAM has begun, AuthenticationOk counts only after the server has proved that it knows the password
//! too. A server cannot make weir repeat or change the method within one login.
//!
//! Non-goals: GSSAPI, SSPI, OAuth; channel binding (the connection to the server is plain so far).

use std::fmt;

use postgres_protocol::authentication::{md5_hash, sasl};
use weir_core::error::{Blame, UserError, sqlstate};

/// Authentication request codes (src/include/libpq/protocol.h).
mod code {
    pub const OK: i32 = 0;
    pub const CLEARTEXT: i32 = 3;
    pub const MD5: i32 = 5;
    pub const SASL: i32 = 10;
    pub const SASL_CONTINUE: i32 = 11;
    pub const SASL_FINAL: i32 = 12;
}

/// One login.
pub struct ClientAuth {
    user: String,
    password: Option<String>,
    state: State,
}

enum State {
    Start,
    /// A password or hash has been sent.
    Sent,
    /// client-first-message has been sent.
    First(Box<sasl::ScramSha256>),
    /// client-final-message has been sent.
    Final(Box<sasl::ScramSha256>),
    /// The server's signature was right.
    Proved,
    Done,
}

impl ClientAuth {
    /// `password` is `None` if weir has none for this user: then only a server that asks for none lets it in.
    pub fn new(user: &str, password: Option<&str>) -> Self {
        ClientAuth { user: user.to_owned(), password: password.map(str::to_owned), state: State::Start }
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
            (code::CLEARTEXT, State::Start) => Ok(Some(password_message(&[self.password()?.as_bytes(), b"\0"]))),
            (code::MD5, State::Start) => {
                let salt = data.try_into().map_err(|_| self.refused("its MD5 salt is not four bytes"))?;
                let hash = md5_hash(self.user.as_bytes(), self.password()?.as_bytes(), salt);
                Ok(Some(password_message(&[hash.as_bytes(), b"\0"])))
            }
            (code::SASL, State::Start) => self.first(data).map(Some),
            (code::SASL_CONTINUE, State::First(mut scram)) => {
                scram.update(data).map_err(|_| self.refused("its SCRAM challenge is malformed"))?;
                let answer = password_message(&[scram.message()]);
                self.state = State::Final(scram);
                Ok(Some(answer))
            }
            (code::SASL_FINAL, State::Final(mut scram)) => {
                scram.finish(data).map_err(|_| self.refused("it could not prove that it knows the password"))?;
                self.state = State::Proved;
                Ok(None)
            }
            (code, _) => Err(self
                .refused(format!("authentication request {code} is unknown or out of turn"))
                .hint("weir logs in to servers with scram-sha-256, md5, password or trust; see pg_hba.conf.")),
        }
    }

    /// `mechanisms`: names, each with a NUL, and one NUL more.
    fn first(&mut self, mechanisms: &[u8]) -> Result<Vec<u8>, UserError> {
        if !mechanisms.split(|&byte| byte == 0).any(|name| name == sasl::SCRAM_SHA_256.as_bytes()) {
            return Err(self
                .refused("it offers no SASL mechanism that weir knows")
                .hint("Use scram-sha-256 in pg_hba.conf."));
        }
        let scram = sasl::ScramSha256::new(self.password()?.as_bytes(), sasl::ChannelBinding::unsupported());
        let message = scram.message();
        let length = (message.len() as u32).to_be_bytes();
        let answer = password_message(&[sasl::SCRAM_SHA_256.as_bytes(), b"\0", &length, message]);
        self.state = State::First(Box::new(scram));
        Ok(answer)
    }

    fn password(&self) -> Result<&str, UserError> {
        self.password.as_deref().filter(|password| !password.contains('\0')).ok_or_else(|| {
            self.refused("it asks for a password and weir has none for this user")
                .hint("Give the user a password or server_password in the users file.")
        })
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
