//! The connection that this process opened to another one, to tell it things. One for all shards; answers come back on it.
//!
//! Invariant: what is sent arrives in order or not at all: a connection that failed once is never used again, and everybody
//! who waits for an answer on it learns that none will come.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use weir_wire::frame;
use weir_wire::peer::{FRAME_BYTES_MAX, GREETING_BYTES_MAX, Message, VERSION};

use super::tls::{PeerStream, PeerTls};
use crate::auth::scram::hmac;
use crate::config::Secret;

/// Longest wait for a connection, and for each message of its opening.
const OPEN_MAX: Duration = Duration::from_millis(500);
/// Messages waiting to be sent; a peer that lets more wait counts as lost.
const QUEUE_MAX: usize = 65_536;
/// Messages sent with one write.
const BATCH: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Opening,
    Up,
    Down,
}

type Waiting = HashMap<(u64, u64), oneshot::Sender<Answer>>;

pub struct Link {
    address: String,
    queue: mpsc::Sender<Message>,
    /// Who waits for an answer, by the member that gives it and the token. `None`: it is down.
    waiting: Mutex<Option<Waiting>>,
    state: watch::Sender<State>,
}

/// No answer will come.
#[derive(Clone, Copy, Debug)]
pub struct Deaf;

/// What a member says to a question.
#[derive(Debug)]
pub enum Answer {
    Heard { known: bool },
    Stamps(Vec<u64>),
}

/// A connection is itself and no other, whoever is at its end.
impl PartialEq for Link {
    fn eq(&self, other: &Link) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Link {
    pub fn open(address: String, secret: Secret, tls: Arc<PeerTls>) -> Arc<Link> {
        let (queue, messages) = mpsc::channel(QUEUE_MAX);
        let waiting = Mutex::new(Some(HashMap::new()));
        let link = Arc::new(Link { address, queue, waiting, state: watch::Sender::new(State::Opening) });
        tokio::spawn(run(Arc::clone(&link), (secret, tls), messages));
        link
    }

    pub fn is_down(&self) -> bool {
        *self.state.borrow() == State::Down
    }

    /// Waits until it is open. False: it could not be opened, or has ended.
    pub async fn ready(&self) -> bool {
        let mut state = self.state.subscribe();
        state.wait_for(|state| *state != State::Opening).await.is_ok_and(|state| *state == State::Up)
    }

    /// Sends something that is not answered. What a connection that is down loses, the next one's opening makes good.
    pub fn send(&self, message: Message) {
        if self.queue.try_send(message).is_err() {
            self.end();
        }
    }

    /// Sends something that may be lost: not at all if much waits already, so that strangers who make weir send it cannot end the
    /// connection.
    pub fn send_if_idle(&self, message: Message) {
        if self.queue.capacity() > QUEUE_MAX / 2 {
            self.send(message);
        }
    }

    /// Sends something that member `by` answers under `token`.
    pub fn ask(&self, message: Message, by: u64, token: u64) -> Result<oneshot::Receiver<Answer>, Deaf> {
        let (answer, answered) = oneshot::channel();
        match &mut *self.waiting.lock() {
            Some(waiting) => waiting.insert((by, token), answer),
            None => return Err(Deaf),
        };
        self.send(message);
        Ok(answered)
    }

    fn answered(&self, by: u64, token: u64, answer: Answer) {
        let waiting = self.waiting.lock().as_mut().and_then(|waiting| waiting.remove(&(by, token)));
        if let Some(waiting) = waiting {
            // Nobody listens any more: it waited for too long.
            let _ = waiting.send(answer);
        }
    }

    fn end(&self) {
        self.state.send_replace(State::Down);
        self.waiting.lock().take();
    }
}

async fn run(link: Arc<Link>, (secret, tls): (Secret, Arc<PeerTls>), messages: mpsc::Receiver<Message>) {
    if let Err(error) = speak(&link, (&secret, &tls), messages).await {
        tracing::debug!(peer = %link.address, "the connection to a peer ended: {error}");
    }
    link.end();
}

async fn speak(link: &Link, (secret, tls): (&Secret, &PeerTls), messages: mpsc::Receiver<Message>) -> io::Result<()> {
    let stream = timeout(OPEN_MAX, TcpStream::connect(&link.address)).await??;
    stream.set_nodelay(true)?;
    let mut stream = timeout(OPEN_MAX, tls.call(&link.address, stream)).await??;
    timeout(OPEN_MAX, greet(&mut stream, secret, Side::Caller)).await??;
    link.state.send_if_modified(|state| {
        let opening = *state == State::Opening;
        if opening {
            *state = State::Up;
        }
        opening
    });
    let (reader, writer) = tokio::io::split(stream);
    let mut state = link.state.subscribe();
    tokio::select! {
        ended = hear(link, reader) => ended,
        ended = send_all(writer, messages) => ended,
        _ = state.wait_for(|state| *state == State::Down) => Ok(()),
    }
}

async fn hear(link: &Link, mut reader: ReadHalf<PeerStream>) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        while let Some(message) = cut(&mut buffer, FRAME_BYTES_MAX)? {
            match message {
                Message::Heard { by, token, known } => link.answered(by, token, Answer::Heard { known }),
                Message::Stamps { by, token, stamps } => link.answered(by, token, Answer::Stamps(stamps)),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        if reader.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn send_all(mut writer: WriteHalf<PeerStream>, mut messages: mpsc::Receiver<Message>) -> io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH);
    let mut out = BytesMut::new();
    while messages.recv_many(&mut batch, BATCH).await > 0 {
        batch.drain(..).for_each(|message| message.put(&mut out));
        writer.write_all(&out).await?;
        writer.flush().await?;
        out.clear();
    }
    Ok(())
}

/// The message at the start of `buffer`, if all of it has arrived.
pub fn cut(buffer: &mut BytesMut, bytes_max: usize) -> io::Result<Option<Message>> {
    let invalid = |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let Some(found) = frame::peek(buffer, bytes_max).map_err(|error| invalid(&error))? else { return Ok(None) };
    let message = Message::read(found.tag, found.body).map_err(|error| invalid(&error))?;
    let length = found.raw.len();
    bytes::Buf::advance(buffer, length);
    Ok(Some(message))
}

/// Which end of a connection this is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Caller,
    Called,
}

/// Both ends show that they know the secret, without saying it: each signs both random numbers and its own side. The caller goes
/// first, so that nobody can have a stranger's number signed.
pub async fn greet(stream: &mut PeerStream, secret: &Secret, side: Side) -> io::Result<()> {
    let nonce: [u8; 16] = rand::random();
    let mut buffer = BytesMut::new();
    say(stream, &Message::Hello { version: VERSION, nonce }).await?;
    let theirs = match next(stream, &mut buffer).await? {
        Message::Hello { version: VERSION, nonce } => nonce,
        Message::Hello { version, .. } => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("it speaks version {version}")));
        }
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let (calls, is_called) = match side {
        Side::Caller => (nonce, theirs),
        Side::Called => (theirs, nonce),
    };
    let sign = |side: Side| {
        let side: &[u8] = if side == Side::Caller { b"weir peer caller" } else { b"weir peer called" };
        hmac(secret.expose().as_bytes(), &[side, &calls, &is_called])
    };
    let theirs = if side == Side::Caller { Side::Called } else { Side::Caller };
    if side == Side::Caller {
        say(stream, &Message::Proof { mac: sign(side) }).await?;
    }
    let Message::Proof { mac } = next(stream, &mut buffer).await? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    if !crate::auth::scram::same(&mac, &sign(theirs)) || !buffer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it does not know the secret"));
    }
    if side == Side::Called {
        say(stream, &Message::Proof { mac: sign(side) }).await?;
    }
    Ok(())
}

async fn say(stream: &mut PeerStream, message: &Message) -> io::Result<()> {
    let mut out = BytesMut::new();
    message.put(&mut out);
    stream.write_all(&out).await?;
    stream.flush().await
}

async fn next(stream: &mut PeerStream, buffer: &mut BytesMut) -> io::Result<Message> {
    loop {
        if let Some(message) = cut(buffer, GREETING_BYTES_MAX)? {
            return Ok(message);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
