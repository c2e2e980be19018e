//! The SCRAM-SHA-256 exchange with a client (RFC 5802 and 7677, src/backend/libpq/auth-scram.c), one value per login.
//!
//! The proof is checked by pgwire's `ScramServerAuth`. What it leaves to its caller is here: message framing, length and
//! NUL checks, one answer for unknown users and wrong passwords, and no way to go on after a failure. Its comparison of
//! SHA-256(ClientKey) with StoredKey is not constant-time; that tells nothing, because a client without StoredKey can
//! neither choose nor foresee the value that is compared. Its nonce is 18 random bytes of its own.
//!
//! Invariant: [`ScramServer::on_final`] succeeds only for a known user who holds the password; channel binding is never
//! offered, so a client that asks for it is refused.

use pgwire::api::auth::sasl::scram::{ScramServerAuth, ScramServerAuthWaitingForClientFinal};
use pgwire::error::PgWireError;
use weir_core::error::{Blame, UserError, sqlstate};

use super::secret::Secret;

/// The one mechanism weir offers to clients.
pub const MECHANISM: &str = "SCRAM-SHA-256";

/// Postgres's own cap (PG_MAX_SASL_MESSAGE_LENGTH in src/include/libpq/sasl.h).
const MESSAGE_BYTES_MAX: usize = 1024;

/// The server's side of one exchange. After an error every further message is refused.
#[derive(Debug)]
pub struct ScramServer {
    user: String,
    state: State,
}

#[derive(Debug)]
enum State {
    Start(Secret),
    Challenged { waiting: Box<ScramServerAuthWaitingForClientFinal>, known: bool },
    Done,
}

impl ScramServer {
    /// `secret` is a mock if the user is not known; `user` only words the error.
    pub fn new(user: &str, secret: Secret) -> Self {
        ScramServer { user: user.to_owned(), state: State::Start(secret) }
    }

    /// The body of SASLInitialResponse (mechanism, length, client-first-message) → data of AuthenticationSASLContinue.
    pub fn on_first(&mut self, body: &[u8]) -> Result<Vec<u8>, UserError> {
        let State::Start(secret) = std::mem::replace(&mut self.state, State::Done) else {
            return Err(malformed("a second initial response"));
        };
        let message = checked(initial_response(body)?)?;
        let (answer, waiting) = ScramServerAuth::new()
            .on_client_first_message_with_secret(message, secret.to_pgwire())
            .map_err(|error| self.refusal(&error))?;
        // r=<client nonce><server nonce>: the client's part must be there and printable.
        let nonce = client_nonce(message).ok_or_else(|| malformed("no nonce of printable characters"))?;
        debug_assert!(answer.as_bytes()[2..].starts_with(nonce));
        self.state = State::Challenged { waiting: Box::new(waiting), known: secret.is_known() };
        Ok(answer.into_bytes())
    }

    /// The body of SASLResponse (client-final-message) → data of AuthenticationSASLFinal. `Ok` means authenticated.
    pub fn on_final(&mut self, body: &[u8]) -> Result<Vec<u8>, UserError> {
        let State::Challenged { waiting, known } = std::mem::replace(&mut self.state, State::Done) else {
            return Err(malformed("a final response out of turn"));
        };
        let answer = waiting.on_client_final_message(checked(body)?).map_err(|error| self.refusal(&error))?;
        if known { Ok(answer.into_bytes()) } else { Err(self.wrong_password()) }
    }

    /// pgwire's messages repeat the client's bytes; none of them is passed on.
    fn refusal(&self, error: &PgWireError) -> UserError {
        match error {
            PgWireError::InvalidPassword(_) => self.wrong_password(),
            _ => malformed("the message breaks RFC 5802, or asks for channel binding, which is not offered"),
        }
    }

    fn wrong_password(&self) -> UserError {
        let message = format!("password authentication failed for user \"{}\"", self.user);
        UserError::new(Blame::Client, sqlstate::INVALID_PASSWORD, message).fatal()
    }
}

fn malformed(detail: &'static str) -> UserError {
    UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, "malformed SCRAM message").detail(detail).fatal()
}

/// Cuts client-first-message out of SASLInitialResponse; every byte must be accounted for.
fn initial_response(body: &[u8]) -> Result<&[u8], UserError> {
    let end = body.iter().position(|&byte| byte == 0).ok_or_else(|| malformed("the mechanism's name does not end"))?;
    if &body[..end] != MECHANISM.as_bytes() {
        let error =
            UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, "client selected an invalid SASL mechanism");
        return Err(error.hint(format!("weir offers {MECHANISM}.")).fatal());
    }
    let (length, message) = body[end + 1..].split_first_chunk::<4>().ok_or_else(|| malformed("no length"))?;
    if i32::from_be_bytes(*length) < 0 {
        return Err(malformed("no initial response"));
    }
    if u32::from_be_bytes(*length) as usize != message.len() {
        return Err(malformed("the length does not match"));
    }
    Ok(message)
}

fn checked(message: &[u8]) -> Result<&[u8], UserError> {
    match message {
        [] => Err(malformed("empty")),
        _ if message.len() > MESSAGE_BYTES_MAX => Err(malformed("longer than 1024 bytes")),
        _ if message.contains(&0) => Err(malformed("it holds a NUL byte")),
        _ => Ok(message),
    }
}

/// gs2-cbind-flag "," [authzid] "," "n=" name "," "r=" c-nonce ["," extensions]
fn client_nonce(message: &[u8]) -> Option<&[u8]> {
    let nonce = message.split(|&byte| byte == b',').nth(3)?.strip_prefix(b"r=")?;
    (!nonce.is_empty() && nonce.iter().all(u8::is_ascii_graphic)).then_some(nonce)
}
