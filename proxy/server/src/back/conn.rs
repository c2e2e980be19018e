//! One connection to a Postgres server and all that weir knows of its state.
//!
//! Invariant: whoever finds that it cannot account for the connection's state calls [`Backend::doubt`]; such a Backend is
//! closed and never lent again. Non-goal: deciding what to send.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use weir_core::session::vars::VarSet;
use weir_wire::backend::Status;
use weir_wire::frame;
use weir_wire::frontend;

use super::connect::CancelKey;
use super::stream::Stream;
use crate::roles::Cut;

/// Largest message a server may send; Postgres's own limit (MaxAllocSize).
pub const MESSAGE_BYTES_MAX: usize = 0x3fff_ffff + 6;
/// How much is read from a server at once, to begin with.
const READ_BYTES: usize = 32 * 1024;
/// How much is read at once of a result that does not end.
const READ_BYTES_MAX: usize = 256 * 1024;

/// One logged-in server connection.
pub struct Backend {
    stream: Stream,
    pub inbuf: BytesMut,
    pub out: BytesMut,
    /// TLS has taken bytes that the kernel may not have.
    unflushed: bool,
    /// How much is read at once now.
    room: usize,
    pub cancel_key: Arc<CancelKey>,
    /// Statements prepared here under weir's names, oldest first.
    prepared: Prepared,
    /// How many of them at most.
    pub prepared_max: usize,
    /// Which statement the unnamed one is now.
    pub unnamed: Option<u64>,
    /// Session settings applied here beyond the server's defaults.
    pub vars: VarSet,
    /// Transaction status as of the last ReadyForQuery.
    pub status: Status,
    /// A request is on its way and has not been answered to its end.
    pub busy: bool,
    /// The session (its cancel process number) that has last written here, and so may have drawn from a sequence; 0: none.
    pub drawn_by: i32,
    doubt: Option<&'static str>,
    pub since: Instant,
    pub idle_since: Instant,
    /// How it is ended when another server becomes the primary.
    pub cut: Option<Arc<Cut>>,
}

impl Backend {
    pub fn new(stream: Stream, inbuf: BytesMut, cancel_key: Arc<CancelKey>, now: Instant) -> Self {
        Backend {
            stream,
            inbuf,
            out: BytesMut::new(),
            unflushed: false,
            room: READ_BYTES,
            cancel_key,
            prepared: Prepared::default(),
            prepared_max: usize::MAX,
            unnamed: None,
            vars: VarSet::default(),
            status: Status::Idle,
            busy: false,
            drawn_by: 0,
            doubt: None,
            since: now,
            idle_since: now,
            cut: None,
        }
    }

    /// Marks the connection as one whose state is not known; it will be closed.
    pub fn doubt(&mut self, why: &'static str) {
        self.doubt.get_or_insert(why);
    }

    pub fn is_doubted(&self) -> bool {
        self.doubt.is_some()
    }

    /// Was it ended, because another server has become the primary?
    pub fn is_cut(&self) -> bool {
        self.cut.as_ref().is_some_and(|cut| cut.is_done())
    }

    /// May it be lent to somebody else?
    pub fn is_clean(&self) -> bool {
        self.doubt.is_none()
            && !self.is_cut()
            && !self.busy
            && self.status == Status::Idle
            && self.inbuf.is_empty()
            && !self.has_unsent()
    }

    /// Is there something that the kernel does not have yet? Also with nothing in `out`: TLS takes what does not fit any more.
    pub fn has_unsent(&self) -> bool {
        !self.out.is_empty() || self.unflushed
    }

    /// Has the server said something or hung up although nothing was asked? Costs a system call only if it may have.
    pub fn has_news(&mut self) -> bool {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match &self.stream {
            Stream::Plain(stream) => {
                stream.poll_read_ready(&mut cx).is_ready()
                    && !matches!(stream.try_read_buf(&mut self.inbuf), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
            }
            // What the server sent beside data, such as session tickets, is taken in and does not count.
            Stream::Tls(_) => self.poll_receive(&mut cx).is_ready(),
        }
    }

    /// Large buffers are not kept while idle.
    pub fn shrink(&mut self) {
        self.room = READ_BYTES;
        shrink(&mut self.out);
        shrink(&mut self.inbuf);
    }

    pub fn is_prepared(&self, id: u64) -> bool {
        self.prepared.ids.contains(&id)
    }

    /// Writes a simple query. It ends the unnamed statement, as it does on the server.
    pub fn put_query(&mut self, sql: &str) {
        frontend::put_query(&mut self.out, sql);
        self.unnamed = None;
    }

    /// Writes a whole frame that acts like a simple query.
    pub fn put_raw(&mut self, frame: &[u8]) {
        self.out.extend_from_slice(frame);
        self.unnamed = None;
    }

    /// Notes that statement `id` is prepared; returns one to close when there are too many.
    pub fn note_prepared(&mut self, id: u64) -> Option<u64> {
        self.prepared.insert(id, self.prepared_max)
    }

    pub fn forget_prepared(&mut self, id: u64) {
        self.prepared.ids.remove(&id);
    }

    /// The server forgot all statements (DISCARD ALL, DEALLOCATE ALL).
    pub fn forget_all_prepared(&mut self) {
        self.prepared = Prepared::default();
        self.unnamed = None;
    }

    /// Sends what is in `out`. Ready when all of it is with the kernel.
    pub fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let keeps = self.stream.is_tls();
        write_from(&mut self.stream, (&mut self.out, &mut self.unflushed), keeps, cx)
    }

    /// Reads what has come into `inbuf`; more at once as long as there is more. An end of stream is an error: servers do not
    /// hang up between frames for fun.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let read = ready!(read_into(&mut self.stream, &mut self.inbuf, self.room, cx))?;
        if read >= self.room / 4 * 3 {
            self.room = (self.room * 2).min(READ_BYTES_MAX);
        }
        Poll::Ready(if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) })
    }

    /// Sends `out`, reading meanwhile so that neither side can block the other. Cancel-safe.
    pub async fn send(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            if self.poll_send(cx)?.is_ready() {
                return Poll::Ready(Ok(()));
            }
            if let Poll::Ready(read) = self.poll_receive(cx) {
                read?;
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await
    }

    /// The next whole frame: tag and body. Cancel-safe.
    pub async fn receive(&mut self) -> io::Result<(u8, Bytes)> {
        std::future::poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Ready when [`Backend::poll_frame`] would not wait. Takes nothing.
    pub fn poll_has_frame(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match frame::header(&self.inbuf, MESSAGE_BYTES_MAX) {
                Ok(Some((_, total))) if self.inbuf.len() < total => {}
                Ok(None) => {}
                _ => return Poll::Ready(()),
            }
            if ready!(self.poll_receive(cx)).is_err() {
                return Poll::Ready(());
            }
        }
    }

    /// As [`Backend::receive`], for waiting on several Backends at once.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(u8, Bytes)>> {
        loop {
            match frame::header(&self.inbuf, MESSAGE_BYTES_MAX) {
                Err(bad) => return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, bad))),
                Ok(Some((tag, total))) if self.inbuf.len() >= total => {
                    let body = self.inbuf.split_to(total).freeze().slice(frame::HEADER..);
                    return Poll::Ready(Ok((tag, body)));
                }
                Ok(_) => ready!(self.poll_receive(cx))?,
            }
        }
    }
}

/// Lets go of an empty buffer that has grown large.
pub fn shrink(buffer: &mut BytesMut) {
    const KEEP_BYTES: usize = 64 * 1024;
    // Its capacity does not count what has been consumed at its front; what it could take without growing does.
    if buffer.is_empty() && buffer.try_reclaim(KEEP_BYTES + 1) {
        *buffer = BytesMut::new();
    }
}

/// Reads once into the spare room of `buffer`; 0 means end of stream.
pub fn read_into<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut BytesMut,
    room: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    if buffer.capacity() - buffer.len() < room / 4 {
        buffer.reserve(room);
    }
    // `read_buf` keeps no state between polls, so a fresh future per poll loses nothing.
    std::pin::pin!(stream.read_buf(buffer)).poll(cx)
}

/// Sends all of `out`. A stream that `keeps` some of what it takes is flushed, too; `unflushed` between calls: it is still to be.
pub fn write_from<S: AsyncWrite + Unpin>(
    stream: &mut S,
    (out, unflushed): (&mut BytesMut, &mut bool),
    keeps: bool,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    while !out.is_empty() {
        let sent = ready!(Pin::new(&mut *stream).poll_write(cx, out))?;
        if sent == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        out.advance(sent);
        *unflushed = keeps;
    }
    if *unflushed {
        ready!(Pin::new(&mut *stream).poll_flush(cx))?;
        *unflushed = false;
    }
    Poll::Ready(Ok(()))
}

/// Which statements are prepared, bounded, first in first out.
#[derive(Default)]
struct Prepared {
    ids: hashbrown::HashSet<u64, foldhash::fast::RandomState>,
    order: std::collections::VecDeque<u64>,
}

impl Prepared {
    fn insert(&mut self, id: u64, max: usize) -> Option<u64> {
        if !self.ids.insert(id) {
            return None;
        }
        self.order.push_back(id);
        while self.ids.len() > max {
            let oldest = self.order.pop_front()?;
            if oldest != id && self.ids.remove(&oldest) {
                return Some(oldest);
            }
        }
        None
    }
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("process", &self.cancel_key.process)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}
