//! Waiting for a client, and for the rest of what it has begun to ask.
//!
//! Meanwhile held Backends may speak by themselves, and are passed on. Messages of the extended protocol may come without
//! Sync or Flush behind them: Postgres works each off as it comes and reports an error at once, and a client may wait for
//! that without asking.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::session::replies::{Owed, Replies};
use weir_wire::backend::tag;
use weir_wire::frontend::put_sync;

use super::batch::{Collector, Request};
use super::session::{End, Failure, Session};
use crate::exec::relay::{Capture, Trail};

/// How long messages wait for a Sync or Flush behind them before they are worked off without.
const PATIENCE: Duration = Duration::from_millis(20);

impl Session {
    /// Ends a pipeline that has only prepared and described, unseen: no portal and no work is lost by it. Drivers ask for a
    /// description with Flush and go on with whatever they like, BEGIN as a simple query included.
    pub async fn end_idle_pipeline(&mut self) -> Result<(), Failure> {
        let Some(index) = self.pipelining() else { return Ok(()) };
        if self.held[index].piped {
            return Ok(());
        }
        let mut replies = Replies::default();
        put_sync(&mut self.held[index].lease.out);
        replies.push(Owed::Sync { hidden: true });
        self.relay_on(index, &mut replies, &mut Capture::Off, &mut Trail::default()).await?;
        self.settle_hidden(index);
        self.release();
        Ok(())
    }

    /// Waits for more of a request; what has come without an end is returned after a while.
    pub async fn await_rest(&mut self, collector: &mut Collector) -> Result<Option<Request>, End> {
        if !collector.has_unfinished() {
            return self.await_client().await.map(|()| None);
        }
        // Cancel-safe: what has been read is in the client's buffer, what is to be sent stays in its other one.
        match Box::pin(tokio::time::timeout(PATIENCE, self.await_client())).await {
            Ok(more) => more.map(|()| None),
            Err(_) => Ok(collector.unfinished()),
        }
    }

    /// Waits for bytes from the client; meanwhile passes on what held Backends say by themselves.
    async fn await_client(&mut self) -> Result<(), End> {
        loop {
            let (client, held, stats) = (&mut self.client, &mut self.held, &self.stats);
            let event = std::future::poll_fn(|cx| {
                if stats.is_ordered() {
                    return std::task::Poll::Ready(Event::Ordered);
                }
                if let std::task::Poll::Ready(received) = client.poll_receive(cx) {
                    return std::task::Poll::Ready(Event::Client(received));
                }
                for (index, held) in held.iter_mut().enumerate() {
                    if !held.lease.busy
                        && let std::task::Poll::Ready(frame) = held.lease.poll_frame(cx)
                    {
                        return std::task::Poll::Ready(Event::Backend(index, frame));
                    }
                }
                std::task::Poll::Pending
            })
            .await;
            match event {
                Event::Client(Ok(0) | Err(_)) => return Err(End::ClientGone),
                Event::Client(Ok(_)) => return Ok(()),
                Event::Backend(index, frame) => self.unasked(index, frame).await?,
                Event::Ordered => {
                    if let Some(order) = self.stats.take_order(self.client.received_bytes) {
                        return Err(End::Fatal(order.error()));
                    }
                }
            }
        }
    }

    /// A held Backend spoke although nothing was asked: a notification, a setting, or its end.
    async fn unasked(&mut self, index: usize, frame: io::Result<(u8, Bytes)>) -> Result<(), End> {
        let gone = || {
            UserError::new(Blame::Server, sqlstate::ADMIN_SHUTDOWN, "the server connection of this session was closed")
                .hint("Connect again; the open transaction has been rolled back.")
                .fatal()
        };
        match frame {
            Ok((kind @ (tag::NOTIFICATION | tag::NOTICE | tag::PARAMETER_STATUS), body)) => {
                self.client.put_aside(kind, &body);
                self.client.send().await.map_err(|_| End::ClientGone)
            }
            Ok((tag::ERROR, body)) => {
                // The server's own last words, and then the end, as on Postgres.
                self.held[index].lease.doubt("terminated by the server");
                self.db.stats.server_error_body(&body);
                weir_wire::frame::put(&mut self.client.out, tag::ERROR, |out| out.extend_from_slice(&body));
                let _ = self.client.send().await;
                Err(End::ClientGone)
            }
            Ok(_) | Err(_) => {
                self.held[index].lease.doubt("spoke out of turn or hung up");
                Err(End::Fatal(gone()))
            }
        }
    }
}

enum Event {
    Client(io::Result<usize>),
    Backend(usize, io::Result<(u8, Bytes)>),
    /// To end, by a time-out or an administrator.
    Ordered,
}
