//! What other processes tell this one.
//!
//! Invariant: an announcement is answered only after its words are pending here. Messages of one connection are worked off in
//! order, without waiting for anything.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use weir_core::fresh::fleet::{Attach, Unheard};
use weir_wire::peer::{FRAME_BYTES_MAX, Message};

use super::Fleet;
use super::link::{Side, cut, greet};
use crate::config::PeersMode;

/// Connections at the same time; each peer needs one.
const CONNECTIONS_MAX: usize = 1024;
/// Longest opening of a connection.
const GREET_MAX: Duration = Duration::from_secs(2);
/// Words whose stamps are told with one message.
pub const STAMPS_MAX: u16 = 4096;
/// Pause after a failure to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

static CONNECTIONS: AtomicU64 = AtomicU64::new(1);

pub async fn run(fleet: Arc<Fleet>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let fleet = Arc::clone(&fleet);
                tokio::spawn(async move {
                    if let Err(error) = hear(&fleet, stream).await {
                        tracing::debug!(peer = %from, "a peer's connection ended: {error}");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a peer: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn hear(fleet: &Fleet, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = timeout(GREET_MAX, fleet.tls.answer(stream)).await??;
    timeout(GREET_MAX, greet(&mut stream, &fleet.secret, Side::Called)).await??;
    let connection = CONNECTIONS.fetch_add(1, Relaxed);
    let (mut buffer, mut out) = (BytesMut::new(), BytesMut::new());
    loop {
        while let Some(message) = cut(&mut buffer, FRAME_BYTES_MAX)? {
            if let Some(answer) = fleet.take(message, connection)? {
                answer.put(&mut out);
            }
        }
        if !out.is_empty() {
            stream.write_all(&out).await?;
            stream.flush().await?;
            out.clear();
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

impl Fleet {
    /// One message, and what is answered.
    fn take(&self, message: Message, connection: u64) -> io::Result<Option<Message>> {
        let (by, token, heard) = match message {
            Message::Ask { to, token } => (to, token, self.shard_of(to).map(|shard| (shard, false))),
            Message::Announce { from, to, write } => {
                let shard = self.shard_of(to);
                let taken = shard.as_ref().map(|shard| shard.member.hear(from, &write, connection));
                match taken {
                    // Nobody waits for an answer; what is lost must be made good by attaching anew.
                    Some(Err(Unheard::NoRoom)) if self.mode == PeersMode::Push => {
                        return Err(io::ErrorKind::OutOfMemory.into());
                    }
                    Some(Ok(false)) if self.mode == PeersMode::Push => return Ok(None),
                    _ => (to, write.token, shard.zip(taken.and_then(Result::ok))),
                }
            }
            Message::Attach { from, to, token, joined, serves, complete, writes, orphans } => {
                let attach = Attach { from, joined, serves, complete, writes: &writes, orphans: &orphans };
                let shard = self.shard_of(to);
                let taken =
                    shard.as_ref().and_then(|shard| shard.member.hear_attach(&attach, (connection, &shard.clock)));
                // What it wrote while this one was not told may have changed the schema.
                (to, token, shard.zip(taken.map(|()| true)))
            }
            Message::Ping { from, to, at_us } => {
                if let Some(shard) = self.shard_of(to) {
                    shard.member.answer_ping(from, at_us);
                }
                return Ok(None);
            }
            Message::Pong { from, to, at_us } => {
                if let Some(shard) = self.shard_of(to) {
                    shard.member.hear_pong(from, at_us, connection);
                }
                return Ok(None);
            }
            Message::Over { from, to, token, ending } => {
                if let Some(shard) = self.shard_of(to) {
                    shard.member.hear_end(from, token, ending, (connection, &shard.clock));
                }
                return Ok(None);
            }
            Message::AskStamps { to, token, first, count } => {
                let stamps = self.shard_of(to).map(|shard| shard.member.stamps(first, count.min(STAMPS_MAX)));
                return Ok(Some(Message::Stamps { by: to, token, stamps: stamps.unwrap_or_default() }));
            }
            Message::Cancel { process, secret } => {
                let cancels = Arc::clone(&self.cancels);
                // It waits for servers; a wrong key ends it at once.
                tokio::spawn(async move { cancels.cancel(process, &secret).await });
                return Ok(None);
            }
            Message::Hello { .. } | Message::Proof { .. } | Message::Heard { .. } | Message::Stamps { .. } => {
                return Err(io::ErrorKind::InvalidData.into());
            }
        };
        // Before the answer: from then on the other proxy may change the schema.
        if let Some((shard, true)) = &heard {
            self.doubt_catalogs(shard);
        }
        Ok(Some(Message::Heard { by, token, known: heard.is_some() }))
    }
}
