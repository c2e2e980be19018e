//! The client's socket with its two buffers, plain or TLS.
//!
//! Invariant: `inbuf` never grows past the frame it is waiting for plus one read; `out` is bounded by whoever fills it; a
//! client that is waited for while nothing of it is half done has no buffer at all (see [`spare`]).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use weir_core::error::{Severity, UserError};
use weir_wire::backend::{Report, tag};
use weir_wire::frame;

use crate::back::conn::{read_into, write_from};
use crate::notifiers::Notifiers;

/// How much is read from a client at once, to begin with: clients that wait for a server connection keep what they asked.
const READ_BYTES: usize = 2 * 1024;
/// How much is read at once from a client who sends much.
const READ_BYTES_MAX: usize = 64 * 1024;
/// Room for a reply that is about to come.
const REPLY_BYTES: usize = 8 * 1024;

/// How long a client may take to read why it must go, and then to go.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);
const HANGING_UP_MAX: Duration = Duration::from_secs(1);

pub enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

pub struct Client {
    socket: Socket,
    pub address: SocketAddr,
    pub inbuf: BytesMut,
    pub out: BytesMut,
    /// TLS has taken bytes that the kernel may not have.
    unflushed: bool,
    /// How much is read at once now.
    room: usize,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// Of the certificate it was shown, for SCRAM channel binding.
    pub end_point: Option<Arc<[u8]>>,
    /// Who its notifications are from; known once it has logged in.
    pub notifiers: Option<Arc<Notifiers>>,
    /// What is sent to it is kept for weir itself.
    kept: Option<Box<Kept>>,
}

/// A reply that weir asked for in the client's name, to use its rows itself.
#[derive(Default)]
struct Kept {
    /// What the client was to be sent already.
    before: BytesMut,
    reply: BytesMut,
    bytes_max: usize,
    /// It was longer than that, and is gone.
    over: bool,
}

impl Client {
    pub fn new(socket: Socket, address: SocketAddr) -> Self {
        let (inbuf, out) = (BytesMut::new(), BytesMut::new());
        Client {
            socket,
            address,
            inbuf,
            out,
            unflushed: false,
            room: READ_BYTES,
            received_bytes: 0,
            sent_bytes: 0,
            end_point: None,
            notifiers: None,
            kept: None,
        }
    }

    pub fn is_tls(&self) -> bool {
        matches!(self.socket, Socket::Tls(_))
    }

    /// The certificate the client showed in the handshake, verified there.
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        match &self.socket {
            Socket::Plain(_) => None,
            Socket::Tls(stream) => Some(stream.get_ref().1.peer_certificates()?.first()?),
        }
    }

    /// Where the client reached us.
    pub fn local_address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Plain(stream) => stream.local_addr().ok(),
            Socket::Tls(stream) => stream.get_ref().0.local_addr().ok(),
        }
    }

    /// The first byte of a plain connection, left where it is. `None` at its end, and on TLS.
    pub async fn peek(&self) -> io::Result<Option<u8>> {
        let Socket::Plain(stream) = &self.socket else { return Ok(None) };
        let mut first = [0];
        Ok((stream.peek(&mut first).await? == 1).then_some(first[0]))
    }

    /// Gives up the plain socket for a TLS handshake. `None` if it is TLS already.
    pub fn into_plain(self) -> Option<TcpStream> {
        match self.socket {
            Socket::Plain(stream) => Some(stream),
            Socket::Tls(_) => None,
        }
    }

    /// Reads once. `Ok(0)`: the client hung up.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.inbuf.capacity() == 0 {
            self.inbuf = spare::take(self.room);
        }
        let received = read_into(&mut self.socket, &mut self.inbuf, self.room, cx);
        if received.is_pending() && self.inbuf.is_empty() {
            spare::give(&mut self.inbuf);
        }
        let read = ready!(received)?;
        if read >= self.room {
            self.room = (self.room * 2).min(READ_BYTES_MAX);
        }
        self.received_bytes += read as u64;
        Poll::Ready(Ok(read))
    }

    /// To be called when a reply is about to be put into `out`, piece by piece.
    pub fn expect_reply(&mut self) {
        if self.out.capacity() == 0 {
            self.out = spare::take(REPLY_BYTES);
        }
    }

    /// From now on what goes to the client is kept, up to so many bytes.
    pub fn keep(&mut self, bytes_max: usize) {
        let before = std::mem::take(&mut self.out);
        self.kept = Some(Box::new(Kept { before, bytes_max, ..Kept::default() }));
    }

    /// Ends [`Client::keep`]: what was kept, `None` if it was more than it could be.
    pub fn take_kept(&mut self) -> Option<BytesMut> {
        let mut kept = self.kept.take()?;
        kept.absorb(&mut self.out);
        self.out = kept.before;
        (!kept.over).then_some(kept.reply)
    }

    /// Sends `out`. Ready when all of it is with the kernel.
    pub fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(kept) = &mut self.kept {
            kept.absorb(&mut self.out);
        }
        let (keeps, there) = (self.is_tls(), self.out.len());
        let sent = write_from(&mut self.socket, (&mut self.out, &mut self.unflushed), keeps, cx);
        self.sent_bytes += (there - self.out.len()) as u64;
        sent
    }

    /// Is there something that the kernel does not have yet? Also with nothing in `out`: TLS takes what does not fit any more.
    pub fn has_unsent(&self) -> bool {
        !self.out.is_empty() || self.unflushed
    }

    pub async fn send(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx)).await
    }

    /// Sends what is in `out`, as the last there is, and waits a moment for the client to hang up. To close at once would reset the
    /// connection of a client that is still sending, and drivers that fail to send do not look for the reason.
    pub async fn part(&mut self) {
        let _ = tokio::time::timeout(LAST_WORDS_MAX, self.send()).await;
        let hung_up = async {
            std::future::poll_fn(|cx| Pin::new(&mut self.socket).poll_shutdown(cx)).await?;
            while self.receive().await? > 0 {
                self.inbuf.clear();
            }
            io::Result::Ok(())
        };
        let _ = tokio::time::timeout(HANGING_UP_MAX, hung_up).await;
    }

    pub async fn receive(&mut self) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_receive(cx)).await
    }

    pub fn put_error(&mut self, error: &UserError) {
        let severity = match error.severity {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
        };
        let report = Report {
            severity,
            sqlstate: error.sqlstate,
            message: &error.message,
            detail: error.detail.as_deref(),
            hint: error.hint.as_deref(),
            routine: error.routine,
        };
        report.put(tag::ERROR, &mut self.out);
    }

    /// Something of weir's own to know besides an answer.
    pub fn put_notice(&mut self, message: &str) {
        let report = Report { severity: "NOTICE", sqlstate: "00000", message, detail: None, hint: None, routine: None };
        report.put(tag::NOTICE, &mut self.out);
    }

    /// Passes on what a server says besides its answers; a notification under its sender's own number.
    pub fn put_aside(&mut self, kind: u8, body: &[u8]) {
        let start = self.out.len() + frame::HEADER;
        frame::put(&mut self.out, kind, |out| out.extend_from_slice(body));
        if kind == tag::NOTIFICATION
            && let Some(notifiers) = &self.notifiers
        {
            notifiers.name_sender(&mut self.out[start..]);
        }
    }

    /// Everything is answered: what is not needed to wait is given away.
    pub fn shrink(&mut self) {
        if self.out.is_empty() {
            spare::give(&mut self.out);
        }
        if self.inbuf.is_empty() {
            spare::give(&mut self.inbuf);
        }
    }
}

impl Kept {
    fn absorb(&mut self, out: &mut BytesMut) {
        self.over |= self.reply.len() + out.len() > self.bytes_max;
        if self.over {
            self.reply.clear();
            out.clear();
        } else if self.reply.is_empty() {
            std::mem::swap(&mut self.reply, out);
        } else {
            self.reply.extend_from_slice(out);
            out.clear();
        }
    }
}

/// Buffers that no client needs right now, kept by each thread for the next client that says something: ten thousand idle
/// clients have none, and a busy one costs no allocation.
mod spare {
    use std::cell::RefCell;

    use bytes::BytesMut;

    use super::{READ_BYTES, REPLY_BYTES};

    /// Buffers one thread keeps.
    const KEPT_MAX: usize = 64;
    /// A buffer that has grown further is freed.
    const KEPT_BYTES_MAX: usize = 4 * REPLY_BYTES;

    thread_local! {
        static KEPT: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    }

    /// An empty buffer with room for `room` bytes or more.
    pub fn take(room: usize) -> BytesMut {
        let mut kept = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
        kept.reserve(room);
        kept
    }

    /// Takes an empty buffer away. What still refers to its bytes keeps them alive; then it is no use to others.
    pub fn give(buffer: &mut BytesMut) {
        let mut given = std::mem::take(buffer);
        // Its capacity does not count what has been consumed at its front; what it could take without growing does.
        let large = given.try_reclaim(KEPT_BYTES_MAX + 1);
        if !large && given.try_reclaim(READ_BYTES) {
            KEPT.with_borrow_mut(|kept| {
                if kept.len() < KEPT_MAX {
                    kept.push(given);
                }
            });
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_buffer_comes_back_only_when_nobody_reads_it() {
            let mut buffer = take(READ_BYTES);
            buffer.extend_from_slice(b"hello");
            let frame = buffer.split_to(5).freeze();
            give(&mut buffer);
            assert_eq!((buffer.capacity(), KEPT.with_borrow(Vec::len)), (0, 0));
            assert_eq!(&frame[..], b"hello");
            let mut buffer = take(READ_BYTES);
            buffer.extend_from_slice(b"hello");
            drop(buffer.split_to(5));
            give(&mut buffer);
            assert_eq!(KEPT.with_borrow(Vec::len), 1);
            assert!(take(REPLY_BYTES).capacity() >= REPLY_BYTES);
            let mut large = BytesMut::with_capacity(KEPT_BYTES_MAX + 1);
            give(&mut large);
            assert_eq!((large.capacity(), KEPT.with_borrow(Vec::len)), (0, 0));
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tls(stream) => Pin::new(&mut **stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tls(stream) => Pin::new(&mut **stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
        }
    }
}
