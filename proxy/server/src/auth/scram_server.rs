//! The SCRAM-SHA-256(-PLUS) exchange with a client (RFC 5802 and 7677, src/backend/libpq/auth-scram.c), one value per login.
//!
//! Invariant: [`ScramServer::on_final`] succeeds only for a known user who holds the password and, where channel binding
//! was chosen, who sees the same certificate. Unknown users get the same messages up to and with the refusal.
//! Non-goals: message framing, which users there are.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use weir_core::error::{Blame, UserError, sqlstate};

use super::scram::{self, PLAIN, PLUS, ScramKeys, TLS_SERVER_END_POINT};
use super::secret::{Key, Verifier};

/// Postgres's own cap (PG_MAX_SASL_MESSAGE_LENGTH in src/include/libpq/sasl.h).
const MESSAGE_BYTES_MAX: usize = 1024;

/// What a proof is checked against.
#[derive(Debug)]
pub struct Expected {
    pub verifier: Verifier,
    /// False for a mock, whose exchange fails whatever the client proves.
    pub known: bool,
}

/// A login that has succeeded.
#[derive(Debug)]
pub struct Proven {
    /// Data of AuthenticationSASLFinal.
    pub answer: Vec<u8>,
    /// What the proof gave away.
    pub keys: ScramKeys,
}

/// The server's side of one exchange. After an error every further message is refused.
#[derive(Debug)]
pub struct ScramServer {
    user: String,
    /// Hash of the server's certificate; `None`: channel binding is not offered.
    certificate: Option<Arc<[u8]>>,
    state: State,
}

#[derive(Debug)]
enum State {
    Start(Expected),
    Challenged(Box<Challenged>),
    Done,
}

#[derive(Debug)]
struct Challenged {
    expected: Expected,
    /// gs2-header and channel binding data as the client must repeat them.
    binding: Vec<u8>,
    bound: bool,
    nonce: String,
    /// client-first-message-bare "," server-first-message.
    messages: String,
}

/// The parts of client-first-message.
struct First<'a> {
    gs2_header: &'a str,
    bound: bool,
    bare: &'a str,
    nonce: &'a str,
}

impl ScramServer {
    /// `user` only words the error. `certificate` is the hash for tls-server-end-point, on TLS connections.
    pub fn new(user: &str, expected: Expected, certificate: Option<Arc<[u8]>>) -> Self {
        ScramServer { user: user.to_owned(), certificate, state: State::Start(expected) }
    }

    /// The mechanisms to offer, best first.
    pub fn mechanisms(&self) -> &'static [&'static str] {
        if self.certificate.is_some() { &[PLUS, PLAIN] } else { &[PLAIN] }
    }

    /// The body of SASLInitialResponse (mechanism, length, client-first-message) → data of AuthenticationSASLContinue.
    pub fn on_first(&mut self, body: &[u8]) -> Result<Vec<u8>, UserError> {
        let State::Start(expected) = std::mem::replace(&mut self.state, State::Done) else {
            return Err(malformed("The client sent a second initial response."));
        };
        let (mechanism, message) = initial_response(body)?;
        let plus = mechanism == PLUS.as_bytes() && self.certificate.is_some();
        if !plus && mechanism != PLAIN.as_bytes() {
            return Err(refused(
                sqlstate::PROTOCOL_VIOLATION,
                "client selected an invalid SASL authentication mechanism",
            )
            .hint(format!("This server offers {}.", self.mechanisms().join(" and "))));
        }
        let first = self.read_first(checked(message)?, plus)?;
        let nonce = format!("{}{}", first.nonce, scram::nonce());
        let salt = STANDARD.encode(&expected.verifier.salt);
        let challenge = format!("r={nonce},s={salt},i={}", expected.verifier.iterations);
        let mut binding = first.gs2_header.as_bytes().to_vec();
        if let (true, Some(certificate)) = (first.bound, &self.certificate) {
            binding.extend_from_slice(certificate);
        }
        let messages = format!("{},{challenge}", first.bare);
        self.state = State::Challenged(Box::new(Challenged { expected, binding, bound: first.bound, nonce, messages }));
        Ok(challenge.into_bytes())
    }

    /// The body of SASLResponse (client-final-message). `Ok` means authenticated.
    pub fn on_final(&mut self, body: &[u8]) -> Result<Proven, UserError> {
        let State::Challenged(challenged) = std::mem::replace(&mut self.state, State::Done) else {
            return Err(malformed("The client sent a final response out of turn."));
        };
        let Challenged { expected, binding, bound, nonce, messages } = *challenged;
        let (without_proof, proof) = read_final(checked(body)?, &binding, bound, &nonce)?;
        let verifier = expected.verifier;
        let signed = [messages.as_bytes(), b",", without_proof.as_bytes()];
        let client_key = scram::xor(&proof, &scram::hmac(&verifier.stored_key, &signed));
        let right = scram::same(&scram::sha256(&client_key), &verifier.stored_key);
        let signature = STANDARD.encode(scram::hmac(&verifier.server_key, &signed));
        if !right || !expected.known {
            return Err(wrong_password(&self.user));
        }
        Ok(Proven { answer: format!("v={signature}").into_bytes(), keys: ScramKeys { client_key, verifier } })
    }

    /// read_client_first_message: gs2-cbind-flag "," [authzid] "," [m=…] n=name "," r=nonce ["," extensions]
    fn read_first<'a>(&self, message: &'a str, plus: bool) -> Result<First<'a>, UserError> {
        let mut parts = message.splitn(3, ',');
        let flag = parts.next().unwrap_or_default();
        let (Some(authzid), Some(bare)) = (parts.next(), parts.next()) else {
            return Err(malformed("The message ends within its header."));
        };
        let bound = self.read_flag(flag, plus)?;
        if !authzid.is_empty() {
            return Err(if authzid.starts_with("a=") {
                refused(sqlstate::FEATURE_NOT_SUPPORTED, "client uses authorization identity, but it is not supported")
            } else {
                malformed("Unexpected attribute where an authorization identity may be.")
            });
        }
        if bare.starts_with("m=") {
            return Err(refused(sqlstate::FEATURE_NOT_SUPPORTED, "client requires an unsupported SCRAM extension"));
        }
        let mut attributes = bare.split(',');
        let name = attributes.next().and_then(|name| name.strip_prefix("n="));
        let nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r="));
        let (Some(_), Some(nonce)) = (name, nonce) else {
            return Err(malformed("It needs a user name and a nonce, in this order."));
        };
        if nonce.is_empty() || !nonce.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused(sqlstate::PROTOCOL_VIOLATION, "non-printable characters in SCRAM nonce"));
        }
        let gs2_header = &message[..message.len() - bare.len()];
        Ok(First { gs2_header, bound, bare, nonce })
    }

    /// Does the client bind? It must do so if it chose PLUS; and one that believes we cannot must be right, or somebody has
    /// cut PLUS out of our offer.
    fn read_flag(&self, flag: &str, plus: bool) -> Result<bool, UserError> {
        match flag {
            "n" | "y" if plus => Err(malformed(
                "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data.",
            )),
            "n" => Ok(false),
            "y" if self.certificate.is_some() => {
                let error = refused(sqlstate::INVALID_AUTHORIZATION, "SCRAM channel binding negotiation error");
                Err(error.detail(
                    "The client supports SCRAM channel binding but thinks the server does not. However, this server does support channel binding.",
                ))
            }
            "y" => Ok(false),
            _ => {
                let Some(kind) = flag.strip_prefix("p=") else {
                    return Err(malformed("Unexpected channel-binding flag."));
                };
                if !plus {
                    return Err(malformed(
                        "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes channel binding data.",
                    ));
                }
                if kind != TLS_SERVER_END_POINT {
                    return Err(refused(sqlstate::PROTOCOL_VIOLATION, "unsupported SCRAM channel-binding type"));
                }
                Ok(true)
            }
        }
    }
}

/// 28P01 as Postgres words it; the same for wrong passwords, unknown users and expired passwords.
pub fn wrong_password(user: &str) -> UserError {
    refused(sqlstate::INVALID_PASSWORD, format!("password authentication failed for user \"{user}\""))
}

/// read_client_final_message: c=binding "," r=nonce ["," extensions] "," p=proof, and nothing behind it.
fn read_final<'a>(message: &'a str, binding: &[u8], bound: bool, nonce: &str) -> Result<(&'a str, Key), UserError> {
    let (without_proof, proof) =
        message.rsplit_once(",p=").ok_or_else(|| malformed("The final message has no proof."))?;
    let mut attributes = without_proof.split(',');
    let sent = attributes.next().and_then(|attribute| attribute.strip_prefix("c="));
    let sent = sent.ok_or_else(|| malformed("The final message does not start with the channel binding."))?;
    if sent != STANDARD.encode(binding) {
        return Err(if bound {
            refused(sqlstate::INVALID_AUTHORIZATION, "SCRAM channel binding check failed").hint(
                "Somebody between client and server decrypts the connection, or ends TLS in front of this server.",
            )
        } else {
            refused(sqlstate::PROTOCOL_VIOLATION, "unexpected SCRAM channel-binding attribute in client-final-message")
        });
    }
    if attributes.next().and_then(|attribute| attribute.strip_prefix("r=")) != Some(nonce) {
        return Err(refused(sqlstate::PROTOCOL_VIOLATION, "invalid SCRAM response").detail("Nonce does not match."));
    }
    let proof = STANDARD.decode(proof).ok().and_then(|proof| Key::try_from(proof).ok());
    Ok((without_proof, proof.ok_or_else(|| malformed("Malformed proof in client-final-message."))?))
}

fn refused(sqlstate: &'static str, message: impl Into<std::borrow::Cow<'static, str>>) -> UserError {
    UserError::new(Blame::Client, sqlstate, message).fatal()
}

fn malformed(detail: &'static str) -> UserError {
    refused(sqlstate::PROTOCOL_VIOLATION, "malformed SCRAM message").detail(detail)
}

/// Cuts mechanism and client-first-message out of SASLInitialResponse; every byte must be accounted for.
fn initial_response(body: &[u8]) -> Result<(&[u8], &[u8]), UserError> {
    let end = body.iter().position(|&byte| byte == 0);
    let end = end.ok_or_else(|| malformed("The name of the mechanism does not end."))?;
    let (length, message) =
        body[end + 1..].split_first_chunk::<4>().ok_or_else(|| malformed("The initial response has no length."))?;
    if i32::from_be_bytes(*length) < 0 {
        return Err(malformed("The initial response is missing."));
    }
    if u32::from_be_bytes(*length) as usize != message.len() {
        return Err(malformed("Message length does not match input length."));
    }
    Ok((&body[..end], message))
}

fn checked(message: &[u8]) -> Result<&str, UserError> {
    match message {
        [] => Err(malformed("The message is empty.")),
        _ if message.len() > MESSAGE_BYTES_MAX => Err(malformed("The message is longer than 1024 bytes.")),
        _ if message.contains(&0) => Err(malformed("The message holds a NUL byte.")),
        _ => std::str::from_utf8(message).map_err(|_| malformed("The message is not UTF-8.")),
    }
}
