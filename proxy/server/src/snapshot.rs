//! Snapshots of all shards of one database: the commit gate with those who wait at it, and the look at what other proxies decide.
//!
//! Invariant: who waits is woken by every change that may let it go on; who is dropped while it waits, or while it counts as under way,
//! leaves the gate. Every wait is bounded: takers by their caller, commits by the takers, of whom each leaves within
//! [`SHUT_MAX`] or so. Non-goals: who may go when ([`weir_core::snapshot`]), and what a session does with it (`exec/snapshot.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_postgres::Client;
use weir_core::id::ShardId;
use weir_core::snapshot::{Deciding, Gate, Taking, Window};

use crate::database::Primaries;
use crate::exec::commit::plain_name;
use crate::recover::COUNTS;

/// How long one taker keeps commits waiting at most. Far below the age at which recovery takes a prepared transaction for left behind.
pub const SHUT_MAX: Duration = Duration::from_millis(500);
/// Longest look at the decisions.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// What snapshots of all shards of one database need.
pub struct Snapshots {
    gate: Mutex<Gate>,
    /// Is the gate shut? Commits look here first.
    shut: AtomicBool,
    /// Changes whenever somebody who waits may go on.
    news: watch::Sender<()>,
    primaries: Arc<Primaries>,
    /// Weir's own connections to the shards, as far as there are any.
    clients: tokio::sync::Mutex<BTreeMap<ShardId, Client>>,
}

/// The gate is shut as long as this lives.
pub struct Shut {
    snapshots: Arc<Snapshots>,
}

/// A distributed transaction is being decided as long as this lives.
pub struct Decision {
    snapshots: Arc<Snapshots>,
    /// It has not begun: it waits for this window's end.
    waits: Option<Window>,
}

/// A shard with what its snapshot shows.
pub struct Taken {
    pub shard: String,
    /// As `pg_current_snapshot()` gives it.
    pub snapshot: String,
}

impl Snapshots {
    pub fn new(primaries: Arc<Primaries>) -> Arc<Self> {
        Arc::new(Snapshots {
            gate: Mutex::default(),
            shut: AtomicBool::new(false),
            news: watch::Sender::new(()),
            primaries,
            clients: tokio::sync::Mutex::default(),
        })
    }

    /// Before anything is sent that may commit: is the gate shut?
    ///
    /// A commit that finds it open just before it is shut was asked for before it was, which is all that counts. One that was asked
    /// for after the acknowledgement of what a snapshot does not show finds it shut: the flag was set before the snapshots were asked for.
    pub fn is_shut(&self) -> bool {
        self.shut.load(SeqCst)
    }

    /// Waits for the end of the window that there is now.
    pub async fn opened(&self) {
        let mut news = self.news.subscribe();
        let Some(window) = self.gate.lock().window() else { return };
        while !self.gate.lock().has_ended(window) {
            // An error would mean that the sender is gone, and it is ours.
            let _ = news.changed().await;
        }
    }

    /// Before a distributed transaction is decided; it counts as being decided until the result is dropped.
    pub async fn decide(self: &Arc<Self>) -> Decision {
        let mut news = self.news.subscribe();
        let waits = match self.gate.lock().decide() {
            Deciding::Now => None,
            Deciding::After(window) => Some(window),
        };
        let mut decision = Decision { snapshots: Arc::clone(self), waits };
        if let Some(window) = decision.waits {
            while !self.gate.lock().has_ended(window) {
                let _ = news.changed().await;
            }
            decision.waits = None;
        }
        decision
    }

    /// Shuts the gate and waits until nothing is being decided. `None`: it took too long.
    pub async fn shut(self: &Arc<Self>) -> Option<Shut> {
        let waited = tokio::time::timeout(SHUT_MAX, async {
            let mut news = self.news.subscribe();
            let shut = loop {
                if let Some(shut) = self.join() {
                    break shut;
                }
                let _ = news.changed().await;
            };
            while !self.gate.lock().is_still() {
                let _ = news.changed().await;
            }
            shut
        });
        waited.await.ok()
    }

    fn join(self: &Arc<Self>) -> Option<Shut> {
        let mut gate = self.gate.lock();
        match gate.take() {
            Taking::Shut => {
                self.shut.store(true, SeqCst);
                Some(Shut { snapshots: Arc::clone(self) })
            }
            Taking::After(_) => None,
        }
    }

    /// Changes the gate; who waits looks at it again.
    fn change(&self, change: impl FnOnce(&mut Gate)) {
        let mut gate = self.gate.lock();
        let was_shut = gate.window().is_some();
        change(&mut gate);
        self.shut.store(gate.window().is_some(), SeqCst);
        drop(gate);
        // While the gate is open nobody waits at it.
        if was_shut {
            self.news.send_replace(());
        }
    }

    /// Is a distributed transaction in some of these snapshots and not in all that it should be in? Other proxies may have
    /// decided it meanwhile, or recovery is still to finish it. `unfinished`: names of what recovery knew to be prepared before
    /// the snapshots were taken.
    ///
    /// Whoever decides writes down which transaction of each shard takes part. A decision that is not there yet when this looks comes
    /// behind all snapshots, so none of its parts is in one. One that is over a minute old is finished on all shards, or recovery knows it.
    pub async fn is_torn(&self, taken: &[Taken], unfinished: &[String]) -> Result<bool> {
        let look = async {
            let mut clients = self.clients.lock().await;
            let shards: Vec<String> = taken.iter().map(|taken| plain_name(&taken.shard)).collect();
            let snapshots: Vec<&str> = taken.iter().map(|taken| &*taken.snapshot).collect();
            for (shard, login) in self.primaries.lately_active() {
                let kept = clients.remove(&shard).filter(|client| !client.is_closed());
                let asked = match kept {
                    Some(client) => client,
                    None => crate::control::connect(&login).await?,
                };
                let torn = asked.query_opt(&torn(), &[&shards, &snapshots, &unfinished]).await?;
                if let Some(torn) = torn {
                    tracing::debug!(gid = torn.try_get::<_, &str>(0)?, "a snapshot would show a part of it only");
                    clients.insert(shard, asked);
                    return anyhow::Ok(true);
                }
                clients.insert(shard, asked);
            }
            Ok(false)
        };
        tokio::time::timeout(LOOK_MAX, look).await.context("the shards did not answer in time")?
    }
}

/// Decisions of which some of the snapshots ($2, of the shards $1) show the part and others do not.
fn torn() -> String {
    format!(
        "SELECT gid FROM weir.txlog t WHERE decision = 'c' AND (at > clock_timestamp() - interval '1 minute' OR gid = ANY($3)) \
         AND (SELECT bool_or(seen) AND NOT bool_and(seen) FROM (\
           SELECT pg_visible_in_snapshot(split_part(p.part, ':', 2)::xid8, s.snapshot::pg_snapshot) AS seen \
           FROM unnest(string_to_array(t.parts, ',')) AS p(part) \
           JOIN unnest($1::text[], $2::text[]) AS s(shard, snapshot) ON s.shard = split_part(p.part, ':', 1)) parts) \
         AND {COUNTS} LIMIT 1"
    )
}

impl Drop for Shut {
    fn drop(&mut self) {
        self.snapshots.change(Gate::leave);
    }
}

impl Drop for Decision {
    fn drop(&mut self) {
        let waits = self.waits;
        self.snapshots.change(|gate| match waits {
            None => gate.decided(),
            Some(window) => gate.give_up(window),
        });
    }
}

#[cfg(test)]
mod tests {
    use weir_core::topology::Roster;

    use super::*;

    #[tokio::test]
    async fn a_decision_waits_for_the_gate_and_the_gate_for_decisions() {
        let snapshots = Snapshots::new(Primaries::new(Vec::new(), &Roster::fixed(0)));
        let decision = snapshots.decide().await;
        assert!(snapshots.shut().await.is_none(), "it is not still");
        assert!(!snapshots.is_shut(), "and it is open again");
        let shutting = tokio::spawn({
            let snapshots = Arc::clone(&snapshots);
            async move { snapshots.shut().await }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(snapshots.is_shut(), "commits wait from the first moment on");
        drop(decision);
        let shut = shutting.await.expect("no panic").expect("still");
        let mut waiting = tokio::spawn({
            let snapshots = Arc::clone(&snapshots);
            async move {
                snapshots.opened().await;
                snapshots.decide().await
            }
        });
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err());
        drop(shut);
        let decision = waiting.await.expect("no panic");
        assert!(!snapshots.is_shut());
        assert!(!snapshots.gate.lock().is_still());
        drop(decision);
        assert_eq!(snapshots.gate.lock().window(), None);
        assert!(snapshots.gate.lock().is_still());
    }

    #[tokio::test]
    async fn who_is_dropped_at_the_gate_has_left_it() {
        let snapshots = Snapshots::new(Primaries::new(Vec::new(), &Roster::fixed(0)));
        let shut = snapshots.shut().await.expect("nobody decides");
        for _ in 0..3 {
            let waiting = tokio::time::timeout(Duration::from_millis(1), snapshots.decide());
            assert!(waiting.await.is_err(), "it waits");
        }
        let late = tokio::spawn({
            let snapshots = Arc::clone(&snapshots);
            async move { snapshots.decide().await }
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
        drop(shut);
        // It counts as under way already, and its task has not run since.
        late.abort();
        assert!(late.await.is_err());
        assert!(snapshots.gate.lock().is_still());
        assert!(snapshots.shut().await.is_some());
    }

    #[tokio::test]
    async fn takers_share_a_window_until_the_first_one_leaves() {
        let snapshots = Snapshots::new(Primaries::new(Vec::new(), &Roster::fixed(0)));
        let (one, two) = (snapshots.shut().await.expect("still"), snapshots.shut().await.expect("still"));
        drop(one);
        let third = tokio::spawn({
            let snapshots = Arc::clone(&snapshots);
            async move { snapshots.shut().await.is_some() }
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(snapshots.is_shut() && !third.is_finished());
        drop(two);
        assert!(third.await.expect("no panic"));
        assert!(!snapshots.is_shut());
    }
}
