//! Cancel requests: each reaches only the statement it was sent for.
//!
//! Invariant: while a cancel for a Backend is on its way, that Backend is not given back to the pool; so the signal can
//! only hit the session's own statement. (A cancel is on its way until the server has closed the cancel connection,
//! which it does after it has sent the signal: src/backend/postmaster, ProcessStartupPacket.) A statement that still waits
//! for a Backend is cancelled by giving up its place in the queue. A cancel that comes when nothing runs is forgotten.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use bytes::BytesMut;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_wire::startup;

use crate::back::connect::CancelKey;
use crate::back::stream::Stream;

/// How long one cancel may take before its Backend is given up instead.
const CANCEL_MAX: Duration = Duration::from_secs(3);
/// Secrets of clients that speak protocol 3.2 or newer (MAX_CANCEL_KEY_LENGTH in src/include/storage/procsignal.h), and of older ones.
const SECRET_BYTES: [usize; 2] = [32, 4];

/// All sessions' cancel keys.
#[derive(Default)]
pub struct CancelRegistry {
    sessions: Mutex<HashMap<i32, Arc<CancelSlot>>>,
}

/// What one session runs now.
#[derive(Debug)]
pub struct CancelSlot {
    secret: Box<[u8]>,
    state: Mutex<State>,
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<Arc<CancelKey>>,
    waiting: Waiting,
    /// Cancels on their way.
    under_way: usize,
    /// A cancel was sent and nobody knows whether the server has acted on it yet.
    astray: bool,
}

/// Does the session's statement wait for a Backend?
#[derive(Debug, Default)]
enum Waiting {
    #[default]
    No,
    Yes(Waker),
    Cancelled,
}

impl CancelRegistry {
    /// A new key for a session that speaks protocol 3.`minor`; unguessable process number and secret.
    pub fn register(self: &Arc<Self>, minor: u16) -> Registration {
        let [long, short] = SECRET_BYTES;
        let mut secret = vec![0; if minor >= 2 { long } else { short }].into_boxed_slice();
        rand::fill(&mut secret[..]);
        let slot = Arc::new(CancelSlot { secret, state: Mutex::default(), settled: Notify::new() });
        let mut sessions = self.sessions.lock();
        loop {
            let process = rand::random_range(1..i32::MAX);
            if sessions.contains_key(&process) {
                continue;
            }
            sessions.insert(process, Arc::clone(&slot));
            return Registration { registry: Arc::clone(self), process, slot };
        }
    }

    /// Serves one CancelRequest. False: the key is of no session here; the client is not told, as by Postgres.
    pub async fn cancel(&self, process: i32, secret: &[u8]) -> bool {
        let slot = self.sessions.lock().get(&process).cloned();
        let Some(slot) = slot.filter(|slot| same_secret(&slot.secret, secret)) else { return false };
        slot.give_up_waiting();
        slot.cancel_running().await;
        true
    }
}

/// False: it was sent, but not seen through.
async fn send_cancel(key: &CancelKey) -> bool {
    // Until it is connected nothing has been sent, so a failure here harms nobody.
    let Ok(Ok(mut stream)) = tokio::time::timeout(CANCEL_MAX, dial(key)).await else { return true };
    let mut request = BytesMut::new();
    startup::put_cancel(&mut request, key.process, &key.secret);
    let exchange = async {
        stream.write_all(&request).await?;
        stream.flush().await?;
        // The server answers by closing; only then has the signal been sent.
        stream.read(&mut [0; 1]).await
    };
    matches!(tokio::time::timeout(CANCEL_MAX, exchange).await, Ok(Ok(_)))
}

async fn dial(key: &CancelKey) -> std::io::Result<Stream> {
    let stream = TcpStream::connect(key.address).await?;
    match &key.tls {
        Some(tls) => tls.tls.encrypt(&tls.host, stream).await,
        None => Ok(Stream::Plain(stream)),
    }
}

/// In a time that depends on the lengths only.
fn same_secret(ours: &[u8], theirs: &[u8]) -> bool {
    let differs = ours.iter().zip(theirs).fold(0, |differs, (a, b)| std::hint::black_box(differs | (a ^ b)));
    ours.len() == theirs.len() && differs == 0
}

impl CancelSlot {
    /// A statement starts on this Backend.
    pub fn begin(&self, key: &Arc<CancelKey>) {
        self.state.lock().running.push(Arc::clone(key));
    }

    pub fn is_running(&self) -> bool {
        !self.state.lock().running.is_empty()
    }

    /// A statement that waits for a Backend waits no longer.
    fn give_up_waiting(&self) {
        let mut state = self.state.lock();
        if matches!(state.waiting, Waiting::Yes(_))
            && let Waiting::Yes(waker) = std::mem::replace(&mut state.waiting, Waiting::Cancelled)
        {
            waker.wake();
        }
    }

    /// Asks the servers to cancel what runs now. False: nothing does.
    pub async fn cancel_running(&self) -> bool {
        let targets = {
            let mut state = self.state.lock();
            if state.running.is_empty() {
                return false;
            }
            state.under_way += 1;
            state.running.clone()
        };
        for target in &targets {
            if !send_cancel(target).await {
                self.state.lock().astray = true;
            }
        }
        self.state.lock().under_way -= 1;
        self.settled.notify_waiters();
        true
    }

    /// Nothing runs any more. True: no cancel is on its way. False: call [`CancelSlot::settle`] before the Backend is
    /// given back.
    pub fn end(&self) -> bool {
        let mut state = self.state.lock();
        state.running.clear();
        state.under_way == 0 && !state.astray
    }

    /// Waits until no cancel is on its way. False: one may still be, and the Backend must be closed.
    pub async fn settle(&self) -> bool {
        let settled = async {
            loop {
                let notified = self.settled.notified();
                {
                    let mut state = self.state.lock();
                    if state.under_way == 0 {
                        return !std::mem::take(&mut state.astray);
                    }
                }
                notified.await;
            }
        };
        tokio::time::timeout(CANCEL_MAX * 3, settled).await.unwrap_or(false)
    }

    /// Waits for what a statement needs before it can run. Errors: 57014 if the statement is cancelled meanwhile; then the
    /// wait is given up. Costs nothing if there is no wait.
    pub async fn unless_cancelled<T>(&self, wait: impl Future<Output = Result<T, UserError>>) -> Result<T, UserError> {
        let mut wait = pin!(wait);
        let at_once = std::future::poll_fn(|cx| Poll::Ready(wait.as_mut().poll(cx))).await;
        if let Poll::Ready(outcome) = at_once {
            return outcome;
        }
        let leave = Leave(self);
        let outcome = std::future::poll_fn(|cx| {
            if !self.state.lock().waiting.go_on(cx.waker()) {
                return Poll::Ready(Err(cancelled()));
            }
            wait.as_mut().poll(cx)
        })
        .await;
        if leave.now() { Err(cancelled()) } else { outcome }
    }
}

impl Waiting {
    /// False: the statement was cancelled.
    fn go_on(&mut self, waker: &Waker) -> bool {
        match self {
            Waiting::Cancelled => return false,
            Waiting::Yes(known) => known.clone_from(waker),
            Waiting::No => *self = Waiting::Yes(waker.clone()),
        }
        true
    }
}

/// Ends the wait, also when the waiting task is dropped, so that a later cancel cannot mean this statement.
struct Leave<'a>(&'a CancelSlot);

impl Leave<'_> {
    /// True: a cancel came in time.
    fn now(&self) -> bool {
        matches!(std::mem::take(&mut self.0.state.lock().waiting), Waiting::Cancelled)
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.now();
    }
}

/// As Postgres words it (ProcessInterrupts in src/backend/tcop/postgres.c).
pub fn cancelled() -> UserError {
    UserError::new(Blame::Client, sqlstate::QUERY_CANCELED, "canceling statement due to user request")
}

/// A session's entry in the registry; removed when dropped.
pub struct Registration {
    registry: Arc<CancelRegistry>,
    pub process: i32,
    pub slot: Arc<CancelSlot>,
}

impl Registration {
    pub fn secret(&self) -> &[u8] {
        &self.slot.secret
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.sessions.lock().remove(&self.process);
    }
}
