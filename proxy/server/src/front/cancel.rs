//! Cancel requests: each reaches only the statement it was sent for.
//!
//! Invariant: while a cancel for a Backend is on its way, that Backend is not given back to the pool; so the signal can
//! only hit the session's own statement. (A cancel is on its way until the server has closed the cancel connection,
//! which it does after it has sent the signal: src/backend/postmaster, ProcessStartupPacket.)

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use weir_wire::startup;

use crate::back::connect::CancelKey;
use crate::back::stream::Stream;

/// How long one cancel may take before its Backend is given up instead.
const CANCEL_MAX: Duration = Duration::from_secs(3);

/// All sessions' cancel keys.
#[derive(Default)]
pub struct CancelRegistry {
    sessions: Mutex<HashMap<i32, Arc<CancelSlot>>>,
}

/// What one session runs now.
#[derive(Debug)]
pub struct CancelSlot {
    secret: [u8; 4],
    state: Mutex<State>,
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<CancelKey>,
    /// Cancels on their way.
    under_way: usize,
}

impl CancelRegistry {
    /// A new key for a session; unguessable process number and secret.
    pub fn register(self: &Arc<Self>) -> Registration {
        let mut sessions = self.sessions.lock();
        loop {
            let process = rand::random_range(1..i32::MAX);
            if sessions.contains_key(&process) {
                continue;
            }
            let slot = Arc::new(CancelSlot { secret: rand::random(), state: Mutex::default(), settled: Notify::new() });
            sessions.insert(process, Arc::clone(&slot));
            return Registration { registry: Arc::clone(self), process, slot };
        }
    }

    /// Serves one CancelRequest. Wrong keys are ignored silently, as Postgres does.
    pub async fn cancel(&self, process: i32, secret: &[u8]) {
        let Some(slot) = self.sessions.lock().get(&process).cloned() else { return };
        if !same_secret(&slot.secret, secret) {
            return;
        }
        let targets = {
            let mut state = slot.state.lock();
            if state.running.is_empty() {
                return;
            }
            state.under_way += 1;
            state.running.clone()
        };
        for target in &targets {
            let _ = tokio::time::timeout(CANCEL_MAX, send_cancel(target)).await;
        }
        slot.state.lock().under_way -= 1;
        slot.settled.notify_waiters();
    }
}

async fn send_cancel(key: &CancelKey) -> std::io::Result<()> {
    let stream = TcpStream::connect(key.address).await?;
    let mut stream = match &key.tls {
        Some(tls) => tls.tls.encrypt(&tls.host, stream).await?,
        None => Stream::Plain(stream),
    };
    let mut request = BytesMut::new();
    startup::put_cancel(&mut request, key.process, &key.secret);
    stream.write_all(&request).await?;
    stream.flush().await?;
    // The server answers by closing; only then has the signal been sent.
    let _ = stream.read(&mut [0; 1]).await?;
    Ok(())
}

fn same_secret(ours: &[u8], theirs: &[u8]) -> bool {
    ours.len() == theirs.len() && ours.iter().zip(theirs).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

impl CancelSlot {
    /// A statement starts on this Backend.
    pub fn begin(&self, key: &CancelKey) {
        self.state.lock().running.push(key.clone());
    }

    /// Nothing runs any more. True: no cancel is on its way. False: call [`CancelSlot::settle`] before the Backend is
    /// given back.
    pub fn end(&self) -> bool {
        let mut state = self.state.lock();
        state.running.clear();
        state.under_way == 0
    }

    /// Waits until no cancel is on its way. False: it took too long and the Backend must be closed.
    pub async fn settle(&self) -> bool {
        let settled = async {
            loop {
                let notified = self.settled.notified();
                if self.state.lock().under_way == 0 {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(CANCEL_MAX * 2, settled).await.is_ok()
    }
}

/// A session's entry in the registry; removed when dropped.
pub struct Registration {
    registry: Arc<CancelRegistry>,
    pub process: i32,
    pub slot: Arc<CancelSlot>,
}

impl Registration {
    pub fn secret(&self) -> [u8; 4] {
        self.slot.secret
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.sessions.lock().remove(&self.process);
    }
}
