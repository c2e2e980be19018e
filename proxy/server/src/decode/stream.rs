//! The replication connection: a temporary slot, the plugin's messages, and the answers that keep the server from holding WAL.
//!
//! Invariant: what is confirmed has been announced. Non-goals: resuming (the slot is gone with the connection, and whoever made
//! another voids everything).

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use weir_core::fresh::decoded::{Committed, Decoded, Known};
use weir_core::fresh::{Dependencies, WordSet};
use weir_wire::pgoutput::{Copied, read_copied, read_message};

use super::{Decoder, told};
use crate::back::connect::Login;
use crate::back::walsender::Walsender;
use crate::database::View;

const STATUS_EVERY: Duration = Duration::from_secs(1);
/// Commits that follow each other more closely share a status: each costs a system call, and only WAL is held meanwhile.
const STATUS_GAP: Duration = Duration::from_millis(20);
/// Commits that are announced together, at most: their words are pending until the last of them is shown.
const TOGETHER_MAX: usize = 64;
/// Frames that are looked at, at most, before what they told is announced.
const FRAMES_MAX: usize = 256;
/// While commits follow each other more closely than this, what comes is left to gather a little: waking up costs more than a
/// commit does, and by then most have been settled by the sessions they came through.
const CLOSE: Duration = Duration::from_millis(5);
const GATHER: Duration = Duration::from_millis(1);

pub(super) struct Stream {
    server: Walsender,
    decoded: Decoded,
    /// All below was announced.
    handled: u64,
    confirmed_at: Instant,
}

impl Stream {
    /// Makes the slot, which waits for all transactions that are running, and starts. The caller bounds the wait.
    pub(super) async fn open(login: &Login, publications: &[String]) -> Result<Stream> {
        let settings = [
            // The least there is: a large transaction comes while it runs, and holds up nobody who commits meanwhile.
            ("logical_decoding_work_mem", "64kB"),
            ("idle_session_timeout", "60s"),
        ];
        let mut server = Walsender::connect(login, "weir decoding", &settings).await?;
        let slot = format!("weir_{:016x}", rand::random::<u64>());
        server
            .command(&format!("CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT"))
            .await
            .context("the replication slot")?;
        let publications: Vec<String> = publications.iter().map(|name| format!("\"{name}\"")).collect();
        let start = format!(
            "START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '2', streaming 'on', messages 'true', \
             publication_names '{}')",
            publications.join(",")
        );
        server.start(&start).await?;
        Ok(Stream { server, decoded: Decoded::default(), handled: 0, confirmed_at: Instant::now() })
    }

    /// Announces what is decoded, until the connection fails. `pid`: as for [`crate::fresh::announce`].
    pub(super) async fn follow(&mut self, decoder: &Decoder, pid: i32) -> Result<Infallible> {
        let mut ticks = interval(STATUS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut view = decoder.db.view_arc();
        let (mut last_commit, mut more_is_there): (Option<Instant>, bool) = (None, false);
        loop {
            if last_commit.is_some_and(|at| at.elapsed() < CLOSE) && !more_is_there {
                sleep(GATHER).await;
            }
            // Both may be dropped while they wait: a frame is taken whole or not at all, a tick is not used up.
            let mut frame = tokio::select! {
                frame = self.server.receive() => Some(frame),
                _ = ticks.tick() => None,
            };
            let mut asked = frame.is_none();
            // What is there already is announced together.
            let (mut committed, mut frames) = (Vec::new(), 0);
            while let Some(received) = frame.take() {
                asked |= self.on_frame(&received?, decoder, (&mut view, &mut committed))?;
                frames += 1;
                if frames < FRAMES_MAX && committed.len() < TOGETHER_MAX {
                    frame = self.server.receive().now_or_never();
                }
            }
            more_is_there = frames >= FRAMES_MAX || committed.len() >= TOGETHER_MAX;
            if let Some(last) = committed.last().map(|last| last.end_lsn) {
                last_commit = Some(Instant::now());
                announce(&mut committed, decoder, pid).await?;
                self.handled = self.handled.max(last);
            }
            decoder.decoding().counters.handled.store(self.handled, Relaxed);
            if asked || self.is_quiet_since(STATUS_GAP) {
                self.confirm().await?;
            }
        }
    }

    fn is_quiet_since(&self, gap: Duration) -> bool {
        self.confirmed_at.elapsed() >= gap
    }

    /// True: the server wants an answer now.
    fn on_frame(
        &mut self,
        body: &Bytes,
        decoder: &Decoder,
        (view, committed): (&mut Arc<View>, &mut Vec<Committed>),
    ) -> Result<bool> {
        let counters = &decoder.decoding().counters;
        match read_copied(body)? {
            Copied::Keepalive { wal_end, reply_now, .. } => {
                // All that committed below has been sent; what of it is not announced yet is before the next confirmation.
                self.handled = self.handled.max(wal_end);
                Ok(reply_now)
            }
            Copied::Data { sent_at, message, .. } => {
                let message = read_message(message, self.decoded.is_streamed())?;
                let now = decoder.db.view();
                if now.version != view.version {
                    *view = Arc::clone(&now);
                }
                let known = Known { catalog: &view.catalog, rules: &view.rules, version: view.version };
                if let Some(one) = self.decoded.on_message(&message, known)? {
                    counters.lag_us.store(sent_at.saturating_sub(one.committed_at).max(0), Relaxed);
                    committed.push(one);
                }
                counters.open.store(self.decoded.open_count() as u64, Relaxed);
                Ok(false)
            }
        }
    }

    async fn confirm(&mut self) -> Result<()> {
        self.confirmed_at = Instant::now();
        self.server.confirm(self.handled).await
    }
}

/// Raises the words of commits and hands them over to be ended. `committed` keeps those whose words had to be moved: most came
/// through weir, which has moved them since.
async fn announce(committed: &mut Vec<Committed>, decoder: &Decoder, pid: i32) -> Result<()> {
    let counters = &decoder.decoding().counters;
    counters.transactions.fetch_add(committed.len() as u64, Relaxed);
    let clock = &decoder.here().clock;
    committed.retain(|one| one.schema_changed || !clock.has_shown(one.xid, &WordSet::of(&one.writes)));
    if committed.is_empty() {
        return Ok(());
    }
    let writes: Dependencies = committed.iter().flat_map(|one| one.writes.iter().copied()).collect();
    let announcement = crate::fresh::announce(decoder.here(), &writes, pid).await.map_err(told)?;
    counters.words.fetch_add(announcement.intent.words().indexes().len() as u64, Relaxed);
    decoder.settling.put(committed, announcement)
}
