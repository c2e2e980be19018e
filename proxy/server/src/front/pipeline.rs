//! Pipelines whose Sync has not come, when something arrives that is not simply the next message of them.
//!
//! Drivers ask for a description with Flush and go on with whatever they like, BEGIN as a simple query included. Invariant:
//! a statement never runs outside the transaction that the client believes to be open: a pipeline in which nothing has been
//! bound is ended first, unseen; any other goes on, on its own server, and is followed from there.

use std::time::Duration;

use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::fresh::{Dependencies, Dependency};
use weir_core::session::pin::Pin;
use weir_core::session::replies::{Owed, Replies};
use weir_core::sql::class::{Class, Discard};
use weir_core::sql::lex::lex;
use weir_core::sql::normal::split_statements;
use weir_wire::frontend::put_sync;

use super::batch::{Collector, Request};
use super::extended::Step;
use super::session::{End, Failure, Session};
use crate::exec::relay::{Capture, Trail};

/// How long messages without a Sync or Flush behind them wait for one.
const PATIENCE: Duration = Duration::from_millis(20);

/// Who carries out a statement of the extended protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hand {
    /// The server, as it is.
    Server,
    /// weir, because only it knows what to do on which server.
    Own,
    /// weir, unless its place in a pipeline matters; then the server, and weir follows it from outside.
    Either,
}

impl Session {
    /// One server takes a long pipeline as it comes, so that its errors reach the client early. Over several shards a
    /// pipeline is looked at as a whole, as far as that is affordable.
    pub fn batch_bytes_max(&self) -> usize {
        if self.view().topology.is_single() { 64 * 1024 } else { 1024 * 1024 }
    }

    /// Waits for more of a request. A client may also wait for an error without having asked for it by Flush or Sync, since
    /// Postgres reports those at once; so what has come is worked off after a while.
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

    /// Ends a pipeline that has only prepared and described: no portal and no work is lost by it.
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

    /// Whether weir must carry a statement out itself.
    pub fn hand_for(&self, class: &Class) -> Hand {
        if !class.is_control() {
            return Hand::Server;
        }
        if !self.view().topology.is_single() {
            return Hand::Own;
        }
        let piped = self.pipelining().is_some_and(|index| self.held[index].piped);
        match class.concerns_one_server() {
            true => Hand::Server,
            false if !is_followed(class) => Hand::Own,
            false if piped => Hand::Server,
            false => Hand::Either,
        }
    }

    pub fn needs_own_hand(&self, class: &Class) -> bool {
        self.hand_for(class) != Hand::Server
    }

    /// Transaction control that the server is about to see: what the transaction wrote may become visible by it.
    pub fn note_controls(&mut self, index: usize, steps: &[Step]) -> Result<(), Failure> {
        let controls = steps.iter().any(
            |step| matches!(step, Step::Execute { portal, .. } if portal.prepared.shape.class.controls_transaction()),
        );
        if controls {
            self.note_write_of(index, &Dependencies::from_slice(&[Dependency::Anything]), true)?;
        }
        Ok(())
    }

    /// What statements that weir has only passed on mean for the session.
    pub fn follow_controls(&mut self, index: usize, steps: &[Step], failed: bool) {
        for step in steps {
            let Step::Execute { portal, .. } = step else { continue };
            let class = &portal.prepared.shape.class;
            if !is_followed(class) {
                continue;
            }
            if failed && class.sets_session() {
                // Whether it came that far is not known: the session keeps the connection that knows.
                self.pin(index, Pin::SetInsideUncertainTransaction);
            } else if class.sets_session() {
                self.note_setting(index, class);
            } else if !failed {
                self.vars.on_done(class, true);
            }
        }
    }

    /// A simple query in the middle of a pipeline: it joins the pipeline's transaction and ends it.
    pub async fn text_in_pipeline(&mut self, sql: &str) -> Result<(), Failure> {
        let view = self.view();
        let mut tokens = Vec::new();
        let mut understood = Vec::new();
        if lex(sql, &mut tokens).is_ok() {
            for part in split_statements(sql, &tokens) {
                let text = &sql[tokens[part.start].start as usize..tokens[part.end - 1].end as usize];
                understood.push(self.db.statements.understand(text, &view, &mut self.scratch));
            }
        }
        let followed =
            understood.iter().all(|known| !known.shape.class.is_control() || is_followed(&known.shape.class));
        match self.pipelining() {
            Some(index) if view.topology.is_single() && followed => {
                let shard = self.held[index].shard;
                self.together(shard, sql, &understood).await?;
                self.held.iter_mut().for_each(|held| held.piped = false);
                Ok(())
            }
            _ => Err(unsynced().into()),
        }
    }
}

/// Statements whose effect on the session can be seen from outside, from ReadyForQuery and the settings they name.
fn is_followed(class: &Class) -> bool {
    let settings = matches!(class, Class::Set { .. } | Class::Reset(_) | Class::SetCharacteristics(_));
    let sequences = matches!(class, Class::Discard(Discard::Plans | Discard::Sequences));
    class.controls_transaction() || class.concerns_one_server() || settings || sequences
}

fn unsynced() -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this query cannot join an open pipeline")
        .detail("Messages before it have been flushed but not synced, and it changes the state of the session.")
        .hint("Send Sync first.")
}
