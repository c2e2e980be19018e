//! Messages of the extended protocol that neither Sync nor Flush follows.
//!
//! Postgres works each message off as it comes and reports an error at once; a client may wait for that without asking.

use std::time::Duration;

use weir_core::session::replies::{Owed, Replies};
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
        match tokio::time::timeout(PATIENCE, self.await_client()).await {
            Ok(more) => more.map(|()| None),
            Err(_) => Ok(collector.unfinished()),
        }
    }
}
