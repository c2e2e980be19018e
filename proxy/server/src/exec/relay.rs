//! Passing one Backend's replies to the client as raw frames.
//!
//! Invariant: only [`Replies`] decides which frame is whose; a frame it does not expect ends the Backend. Rows are never
//! decoded, and a row larger than any buffer flows through in pieces. Both directions move at once, so that neither a
//! long pipeline nor a slow client can block the other for ever.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use smallvec::SmallVec;
use weir_core::session::replies::{Desync, Replies, Verdict};
use weir_wire::backend::{Status, tag};
use weir_wire::frame::{self, HEADER};
use weir_wire::{frontend, read::Malformed, row};

use crate::back::conn::{Backend, MESSAGE_BYTES_MAX};
use crate::front::client::Client;

/// The client is not sent less than this at a time while more is coming.
const OUT_BYTES: usize = 64 * 1024;
/// From here on bytes change hands with their buffer instead of being copied.
const SWAP_BYTES: usize = 16 * 1024;

/// Why a relay ended well.
#[derive(Debug, PartialEq, Eq)]
pub enum Flow {
    /// ReadyForQuery came; it was not forwarded, the session words its own.
    Ready(Status),
    /// All is answered and no ReadyForQuery was owed (Flush, or a COPY in the extended protocol).
    Drained,
    /// The capture would have grown past its limit; the rest of the reply is unread.
    Overflow,
}

/// Why a relay broke.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("client: {0}")]
    Client(io::Error),
    #[error("server: {0}")]
    Server(io::Error),
    #[error("{0}")]
    Desync(#[from] Desync),
    #[error("a statement of weir's own failed: {0}")]
    Hidden(String),
    #[error("client: {0}")]
    Protocol(#[from] Malformed),
}

/// What happened on the way.
#[derive(Debug, Default)]
pub struct Trail {
    /// Ops that an error undid, see [`Verdict::Failed`].
    pub undone: SmallVec<[u32; 8]>,
    /// The server reported an error to the client.
    pub failed: bool,
    /// It had bound a portal before.
    pub bound: bool,
    /// So it did as its last words on this connection.
    pub fatal: bool,
    /// SQLSTATE of the first error.
    pub sqlstate: Option<[u8; 5]>,
    /// Anything but plain results was forwarded (notice, parameter status, notification).
    pub chatter: bool,
    /// What the columns of each described statement are, in order ([`columns_of`]).
    pub described: SmallVec<[u64; 1]>,
}

/// A hash of the names and types of a statement's columns. `body`: of its RowDescription, empty for NoData.
pub fn columns_of(body: &[u8]) -> u64 {
    use std::hash::{BuildHasher, Hash, Hasher};
    let mut hasher = foldhash::quality::FixedState::with_seed(1).build_hasher();
    for field in row::fields(body).unwrap_or_default() {
        (field.name, field.type_oid, field.type_modifier).hash(&mut hasher);
    }
    hasher.finish()
}

impl Trail {
    /// What a frame that is forwarded tells of the exchange.
    fn note(&mut self, kind: u8, body: &[u8], verdict: Verdict) {
        match (verdict, kind) {
            (Verdict::Failed { undone }, _) => self.fail(undone, body),
            (Verdict::Described, _) => self.described.push(columns_of(body)),
            (
                _,
                tag::NOTICE | tag::PARAMETER_STATUS | tag::NOTIFICATION | tag::COPY_DATA | tag::COPY_OUT | tag::COPY_IN,
            ) => self.chatter = true,
            _ => {}
        }
    }

    fn fail(&mut self, undone: SmallVec<[u32; 8]>, error: &[u8]) {
        self.failed = true;
        self.fatal |= matches!(weir_wire::backend::report_field(error, b'V'), Some(b"FATAL" | b"PANIC"));
        self.undone.extend(undone);
        if self.sqlstate.is_none() {
            self.sqlstate = weir_wire::backend::report_field(error, b'C').and_then(|code| code.try_into().ok());
        }
    }
}

/// Keeps a copy of what is forwarded.
#[derive(Debug, Default)]
pub enum Capture {
    /// Forward at once, keep nothing.
    #[default]
    Off,
    /// Hold everything back, and give up ([`Flow::Overflow`]) when it gets larger.
    Hold { reply: BytesMut, bytes_max: usize },
}

/// Sends what is in `backend.out` and relays until nothing is owed.
pub async fn relay(
    client: &mut Client,
    backend: &mut Backend,
    replies: &mut Replies,
    capture: &mut Capture,
    trail: &mut Trail,
) -> Result<Flow, Broken> {
    backend.busy = true;
    client.expect_reply();
    let mut passing = 0;
    let mut heard = false;
    let mut uploading = 0;
    loop {
        if let Some(flow) = digest(client, backend, replies, capture, trail, &mut passing)? {
            if uploading > 0 {
                finish_upload(client, backend, uploading).await?;
            }
            backend.busy = !matches!(flow, Flow::Ready(_));
            return Ok(flow);
        }
        if replies.copying_in() && forward_copy(client, backend, replies, &mut uploading)? {
            continue;
        }
        wait(client, backend, replies.copying_in(), &mut heard).await?;
    }
}

/// Waits until something moved: bytes to or from the server, or to or from the client. `heard`: the server has spoken. Until
/// then weir's own answers (to a Parse that the Backend knows already) wait for its words: one system call less.
async fn wait(client: &mut Client, backend: &mut Backend, listen: bool, heard: &mut bool) -> Result<(), Broken> {
    poll_fn(|cx| {
        if backend.has_unsent()
            && let Poll::Ready(sent) = backend.poll_send(cx)
        {
            sent.map_err(Broken::Server)?;
        }
        if client.out.len() < OUT_BYTES
            && let Poll::Ready(received) = backend.poll_receive(cx)
        {
            received.map_err(Broken::Server)?;
            *heard = true;
            return Poll::Ready(Ok(()));
        }
        // Nothing to read right now: time to let the client have what there is.
        if client.has_unsent()
            && (*heard || client.out.len() >= OUT_BYTES)
            && let Poll::Ready(sent) = client.poll_send(cx)
        {
            sent.map_err(Broken::Client)?;
            return Poll::Ready(Ok(()));
        }
        if listen { poll_upload(client, backend, cx) } else { Poll::Pending }
    })
    .await
}

/// Ready when the client has sent more of its copy data, for which the server's buffer has room.
fn poll_upload(client: &mut Client, backend: &Backend, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
    if backend.out.len() >= OUT_BYTES {
        return Poll::Pending;
    }
    match ready!(client.poll_receive(cx)).map_err(Broken::Client)? {
        0 => Poll::Ready(Err(Broken::Client(io::ErrorKind::UnexpectedEof.into()))),
        _ => Poll::Ready(Ok(())),
    }
}

/// Judges every frame that has arrived. `passing`: bytes of a large frame that are still to come and are passed on unseen.
fn digest(
    client: &mut Client,
    backend: &mut Backend,
    replies: &mut Replies,
    capture: &mut Capture,
    trail: &mut Trail,
    passing: &mut usize,
) -> Result<Option<Flow>, Broken> {
    let mut judged = 0;
    let outcome = loop {
        if *passing > 0 {
            let step = (*passing).min(backend.inbuf.len() - judged);
            judged += step;
            *passing -= step;
            if *passing > 0 {
                break None;
            }
        }
        if let Some(own) = replies.own_due() {
            forward(client, capture, &backend.inbuf[..judged]);
            backend.inbuf.advance(judged);
            judged = 0;
            forward(client, capture, own);
            continue;
        }
        if replies.is_empty() {
            break Some(Flow::Drained);
        }
        let rest = &backend.inbuf[judged..];
        let header = frame::header(rest, MESSAGE_BYTES_MAX)
            .map_err(|bad| Broken::Server(io::Error::new(io::ErrorKind::InvalidData, bad)))?;
        let Some((kind, total)) = header else { break None };
        if rest.len() < total {
            let bulk = matches!(kind, tag::DATA_ROW | tag::COPY_DATA);
            if !bulk || matches!(capture, Capture::Hold { .. }) || replies.on_frame(kind, &[])? != Verdict::Forward {
                break None;
            }
            trail.note(kind, &[], Verdict::Forward);
            *passing = total;
            continue;
        }
        if let (tag::NOTIFICATION, Some(notifiers)) = (kind, &client.notifiers) {
            notifiers.name_sender(&mut backend.inbuf[judged + HEADER..judged + total]);
        }
        let body = &backend.inbuf[judged + HEADER..judged + total];
        match replies.on_frame(kind, body)? {
            verdict @ (Verdict::Forward | Verdict::CopyIn | Verdict::Described | Verdict::Failed { .. }) => {
                trail.note(kind, body, verdict);
                judged += total;
                judged += run_of(kind, &backend.inbuf[judged..]);
            }
            Verdict::HiddenFailed => return Err(Broken::Hidden(error_text(body))),
            verdict @ (Verdict::Swallow | Verdict::Ready { .. }) => {
                trail.bound |= kind == tag::BIND_COMPLETE;
                forward(client, capture, &backend.inbuf[..judged]);
                backend.inbuf.advance(judged + total);
                judged = 0;
                if let Verdict::Ready { status, hidden } = verdict {
                    backend.status = status;
                    if !hidden && replies.is_empty() {
                        break Some(Flow::Ready(status));
                    }
                }
            }
        }
    };
    hand_over(client, backend, capture, judged);
    Ok(if overflows(capture) { Some(Flow::Overflow) } else { outcome })
}

/// Bytes of the whole rows at the start of `rest` that follow a row: each is judged like the one before.
fn run_of(kind: u8, rest: &[u8]) -> usize {
    let mut run = 0;
    while matches!(kind, tag::DATA_ROW | tag::COPY_DATA)
        && let Ok(Some((next, total))) = frame::header(&rest[run..], MESSAGE_BYTES_MAX)
        && next == kind
        && rest.len() - run >= total
    {
        run += total;
    }
    run
}

/// Forwards what was judged of `inbuf`. Much of it, with nothing else on its way: the client gets the buffer, and only the
/// start of the next frame is copied.
fn hand_over(client: &mut Client, backend: &mut Backend, capture: &mut Capture, judged: usize) {
    let rest = backend.inbuf.len() - judged;
    if judged < SWAP_BYTES || rest > SWAP_BYTES || !client.out.is_empty() || matches!(capture, Capture::Hold { .. }) {
        forward(client, capture, &backend.inbuf[..judged]);
        backend.inbuf.advance(judged);
        return;
    }
    std::mem::swap(&mut client.out, &mut backend.inbuf);
    backend.inbuf.clear();
    backend.inbuf.extend_from_slice(&client.out[judged..]);
    client.out.truncate(judged);
}

fn forward(client: &mut Client, capture: &mut Capture, bytes: &[u8]) {
    match capture {
        Capture::Off => client.out.extend_from_slice(bytes),
        Capture::Hold { reply, .. } => reply.extend_from_slice(bytes),
    }
}

fn overflows(capture: &Capture) -> bool {
    match capture {
        Capture::Hold { reply, bytes_max } => reply.len() > *bytes_max,
        Capture::Off => false,
    }
}

/// While the server wants COPY data: passes the client's copy messages on. True if something was passed.
/// `uploading`: bytes of a large CopyData that are still to come and are passed on unseen.
fn forward_copy(
    client: &mut Client,
    backend: &mut Backend,
    replies: &mut Replies,
    uploading: &mut usize,
) -> Result<bool, Broken> {
    let mut passed = (*uploading).min(client.inbuf.len());
    *uploading -= passed;
    let mut ended = false;
    while *uploading == 0 {
        let rest = &client.inbuf[passed..];
        let header = frame::header(rest, MESSAGE_BYTES_MAX).map_err(|_| Malformed)?;
        let Some((kind, total)) = header else { break };
        if rest.len() < total {
            if kind == frontend::tag::COPY_DATA && total > OUT_BYTES {
                *uploading = total - rest.len();
                passed += rest.len();
            }
            break;
        }
        match kind {
            frontend::tag::COPY_DATA => passed += total,
            frontend::tag::COPY_DONE | frontend::tag::COPY_FAIL => {
                passed += total;
                replies.copy_ended();
                ended = true;
                break;
            }
            // The server ignores these during a copy; so they are not sent and not owed.
            frontend::tag::SYNC | frontend::tag::FLUSH => {
                backend.out.extend_from_slice(&client.inbuf[..passed]);
                client.inbuf.advance(passed + total);
                passed = 0;
            }
            _ => return Err(Malformed.into()),
        }
    }
    backend.out.extend_from_slice(&client.inbuf[..passed]);
    client.inbuf.advance(passed);
    // In the extended protocol the server keeps its answer until Flush or Sync, and the Sync of before was ignored.
    if ended && !replies.owes_ready() {
        frontend::put_flush(&mut backend.out);
    }
    Ok(passed > 0)
}

/// The server has ended the copy amid a message: the rest of it is still the server's, which reads and forgets it.
async fn finish_upload(client: &mut Client, backend: &mut Backend, mut left: usize) -> Result<(), Broken> {
    while left > 0 || backend.has_unsent() {
        let step = left.min(client.inbuf.len());
        backend.out.extend_from_slice(&client.inbuf[..step]);
        client.inbuf.advance(step);
        left -= step;
        poll_fn(|cx| {
            if client.has_unsent()
                && let Poll::Ready(sent) = client.poll_send(cx)
            {
                sent.map_err(Broken::Client)?;
            }
            if let Poll::Ready(sent) = backend.poll_send(cx) {
                sent.map_err(Broken::Server)?;
                if left == 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            if left > 0 { poll_upload(client, backend, cx) } else { Poll::Pending }
        })
        .await?;
    }
    Ok(())
}

fn error_text(body: &[u8]) -> String {
    let field = |code| weir_wire::backend::report_field(body, code).map(String::from_utf8_lossy).unwrap_or_default();
    format!("{}: {}", field(b'C'), field(b'M'))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use rustls::crypto::ring::default_provider;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket, TcpStream};
    use tokio_rustls::{TlsAcceptor, TlsConnector};
    use weir_core::session::replies::Owed;

    use super::*;
    use crate::back::connect::CancelKey;
    use crate::back::stream::Stream;
    use crate::front::client::Socket;

    /// Far less than what TLS keeps for a kernel that takes no more.
    const KERNEL_BYTES: u32 = 4 * 1024;

    fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).expect("a key");
        let mut roots = RootCertStore::empty();
        roots.add(signed.cert.der().clone()).expect("an authority");
        let server = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let server = server.with_safe_default_protocol_versions().expect("versions").with_no_client_auth();
        let client = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let client = client.with_safe_default_protocol_versions().expect("versions").with_root_certificates(roots);
        let server = server.with_single_cert(vec![signed.cert.der().clone()], key).expect("a server");
        (Arc::new(server), Arc::new(client.with_no_client_auth()))
    }

    /// Two ends of a connection that holds little.
    async fn narrow() -> (TcpStream, TcpStream) {
        let listening = TcpSocket::new_v4().expect("a socket");
        listening.set_recv_buffer_size(KERNEL_BYTES).expect("its size");
        listening.bind(([127, 0, 0, 1], 0).into()).expect("a port");
        let listening: TcpListener = listening.listen(1).expect("listening");
        let ours = TcpSocket::new_v4().expect("a socket");
        ours.set_send_buffer_size(KERNEL_BYTES).expect("its size");
        let ours = ours.connect(listening.local_addr().expect("an address")).await.expect("connected");
        (ours, listening.accept().await.expect("accepted").0)
    }

    #[tokio::test]
    async fn a_large_statement_reaches_a_slow_server_whole_inside_tls() {
        const STATEMENT_BYTES: usize = 300_000;
        let (server_config, client_config) = configs();
        let (ours, theirs) = narrow().await;
        let server = tokio::spawn(async move {
            let mut theirs = TlsAcceptor::from(server_config).accept(theirs).await.expect("a handshake");
            let mut statement = vec![0; STATEMENT_BYTES];
            theirs.read_exact(&mut statement).await.expect("the whole statement");
            theirs.write_all(b"Z\x00\x00\x00\x05I").await.expect("an answer");
            theirs.flush().await.expect("an answer");
            theirs
        });
        let name = "localhost".try_into().expect("a name");
        let ours = TlsConnector::from(client_config).connect(name, ours).await.expect("a handshake");
        let address = ([127, 0, 0, 1], 0).into();
        let key = CancelKey { address, process: 1, secret: Bytes::new(), tls: None };
        let now = std::time::Instant::now();
        let mut backend = Backend::new(Stream::Tls(Box::new(ours)), BytesMut::new(), Arc::new(key), now);
        let mut client = Client::new(Socket::Plain(narrow().await.0), address);
        backend.out.resize(STATEMENT_BYTES, b'x');
        let mut replies = Replies::default();
        replies.push(Owed::Sync { hidden: false });
        let (mut capture, mut trail) = (Capture::Off, Trail::default());
        let relayed = relay(&mut client, &mut backend, &mut replies, &mut capture, &mut trail);
        let relayed = tokio::time::timeout(Duration::from_secs(30), relayed).await.expect("the end of it is sent");
        assert_eq!(relayed.expect("relayed"), Flow::Ready(Status::Idle));
        assert!(!backend.has_unsent());
        server.await.expect("the server");
    }
}
