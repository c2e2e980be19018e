//! A client that speaks frames and costs next to nothing: what is measured is the other side.
//!
//! It logs in with SCRAM-SHA-256 and remembers what the password's 4096 rounds gave for a salt (RFC 5802 §5.1 allows that), so
//! that thousands of log-ins a second are bounded by the server. Non-goals: checking the server's signature, TLS, any error
//! but "it did not work".

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use weir_wire::backend::{report_field, tag};
use weir_wire::{frame, frontend, startup};

type Key = [u8; 32];

/// Largest reply frame that is taken.
const FRAME_BYTES_MAX: usize = 1 << 30;

/// Whom to log in as, and where.
#[derive(Clone)]
pub struct Account {
    pub port: u16,
    pub user: &'static str,
    pub database: &'static str,
    pub password: String,
    keys: Arc<parking_lot::Mutex<Vec<Known>>>,
}

/// What the password is worth with one salt.
#[derive(Clone)]
struct Known {
    salt: String,
    iterations: u32,
    client_key: Key,
}

impl Account {
    pub fn new(port: u16, user: &'static str, database: &'static str, password: &str) -> Self {
        Account { port, user, database, password: password.to_owned(), keys: Arc::default() }
    }

    fn client_key(&self, salt: &str, iterations: u32) -> Result<Key> {
        let known = self.keys.lock().clone();
        if let Some(known) = known.iter().find(|known| known.salt == salt && known.iterations == iterations) {
            return Ok(known.client_key);
        }
        let salted = stretched(self.password.as_bytes(), &STANDARD.decode(salt)?, iterations)?;
        let client_key = keyed(&salted, b"Client Key")?;
        let known = Known { salt: salt.to_owned(), iterations, client_key };
        self.keys.lock().push(known);
        Ok(client_key)
    }
}

/// One logged-in connection. It is reset when dropped, so that no port stays in TIME_WAIT.
pub struct Raw {
    pub stream: TcpStream,
    inbuf: BytesMut,
    pub out: BytesMut,
}

impl Raw {
    pub async fn login(account: &Account) -> Result<Raw> {
        let stream = TcpStream::connect(("127.0.0.1", account.port)).await?;
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))?;
        let mut raw = Raw { stream, inbuf: BytesMut::new(), out: BytesMut::new() };
        startup::put_startup(&mut raw.out, &[("user", account.user), ("database", account.database)]);
        raw.authenticate(account).await?;
        raw.until_ready().await?;
        // Thousands of these are held: none keeps its buffers.
        (raw.inbuf, raw.out) = (BytesMut::new(), BytesMut::new());
        Ok(raw)
    }

    async fn authenticate(&mut self, account: &Account) -> Result<()> {
        let nonce = STANDARD.encode(rand::random::<[u8; 18]>());
        let first = format!("n=,r={nonce}");
        loop {
            let (kind, body) = self.next().await?;
            if kind != tag::AUTHENTICATION {
                bail!("the log-in was answered with {}", told(kind, &body));
            }
            match body.first_chunk::<4>().map(|code| i32::from_be_bytes(*code)) {
                Some(0) => return Ok(()),
                Some(10) => frame::put(&mut self.out, frontend::tag::PASSWORD, |out| {
                    frame::put_cstr(out, b"SCRAM-SHA-256");
                    out.extend_from_slice(&(first.len() as i32 + 3).to_be_bytes());
                    out.extend_from_slice(b"n,,");
                    out.extend_from_slice(first.as_bytes());
                }),
                Some(11) => {
                    let answer = proof(account, &first, std::str::from_utf8(&body[4..])?)?;
                    frame::put(&mut self.out, frontend::tag::PASSWORD, |out| out.extend_from_slice(answer.as_bytes()));
                }
                Some(12) => {}
                other => bail!("authentication request {other:?}"),
            }
        }
    }

    /// Sends what is in `out`, then reads to the next ReadyForQuery; gives the number of frames before it.
    pub async fn until_ready(&mut self) -> Result<usize> {
        for frames in 0.. {
            match self.next().await? {
                (tag::READY, _) => return Ok(frames),
                (kind @ tag::ERROR, body) => bail!("{}", told(kind, &body)),
                _ => {}
            }
        }
        Ok(0)
    }

    /// Runs one simple query, results unseen.
    pub async fn query(&mut self, sql: &str) -> Result<()> {
        frontend::put_query(&mut self.out, sql);
        self.until_ready().await?;
        Ok(())
    }

    /// Sends what is in `out`.
    pub async fn flush(&mut self) -> Result<()> {
        if !self.out.is_empty() {
            self.stream.write_all(&self.out).await?;
            self.out.clear();
        }
        Ok(())
    }

    /// Sends what is in `out` and reads one frame.
    pub async fn next(&mut self) -> Result<(u8, Bytes)> {
        self.flush().await?;
        loop {
            if let Some((kind, total)) = frame::header(&self.inbuf, FRAME_BYTES_MAX)?
                && self.inbuf.len() >= total
            {
                return Ok((kind, self.inbuf.split_to(total).freeze().slice(frame::HEADER..)));
            }
            if self.stream.read_buf(&mut self.inbuf).await? == 0 {
                bail!("the connection was closed");
            }
        }
    }
}

fn told(kind: u8, body: &[u8]) -> String {
    let field = |code| report_field(body, code).map(String::from_utf8_lossy).unwrap_or_default();
    match kind {
        tag::ERROR => format!("{}: {}", field(b'C'), field(b'M')),
        _ => format!("message '{}'", char::from(kind)),
    }
}

/// client-final-message of RFC 5802 for the server's challenge.
fn proof(account: &Account, first: &str, challenge: &str) -> Result<String> {
    let part = |name: &str| challenge.split(',').find_map(|part| part.strip_prefix(name));
    let (nonce, salt) = (part("r=").context("no nonce")?, part("s=").context("no salt")?);
    let client_key = account.client_key(salt, part("i=").context("no iteration count")?.parse()?)?;
    let unproven = format!("c=biws,r={nonce}");
    let signature = keyed(&Sha256::digest(client_key), format!("{first},{challenge},{unproven}").as_bytes())?;
    let proof: Vec<u8> = client_key.iter().zip(signature).map(|(key, sign)| key ^ sign).collect();
    Ok(format!("{unproven},p={}", STANDARD.encode(proof)))
}

fn keyed(key: &[u8], message: &[u8]) -> Result<Key> {
    Ok(Hmac::<Sha256>::new_from_slice(key)?.chain_update(message).finalize().into_bytes().into())
}

/// Hi() of RFC 5802.
fn stretched(password: &[u8], salt: &[u8], iterations: u32) -> Result<Key> {
    let mut last = keyed(password, &[salt, &[0, 0, 0, 1]].concat())?;
    let mut all = last;
    for _ in 1..iterations {
        last = keyed(password, &last)?;
        all.iter_mut().zip(last).for_each(|(all, last)| *all ^= last);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677 §3.
    #[test]
    fn the_rfc_example_is_proven() {
        let account = Account::new(0, "user", "", "pencil");
        let challenge = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let answer = proof(&account, "n=user,r=rOprNGfwEbeRWgbNEkqO", challenge).expect("a proof");
        assert!(answer.ends_with("p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="), "{answer}");
    }
}
