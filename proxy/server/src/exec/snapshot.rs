//! A read-only transaction that sees all shards as they were at one moment.
//!
//! Its first statement that needs a snapshot has every shard take one, while the commit gate of the database is shut
//! ([`crate::snapshot`]); Backends are leased and told of the transaction before. The gate is opened in time even if a shard
//! does not answer; then, and when another proxy's commit was caught half-way, the snapshots are thrown away and taken anew, a few times.
//!
//! Invariant: a statement of such a transaction runs on Backends that all hold their snapshot, and on those only; each has said
//! that its transaction is read-only and keeps its snapshot. Non-goals: what may read it (`front/simple.rs` keeps the fallback
//! engine out), and how it ends (`commit.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::id::ShardId;
use weir_core::sql::class::Class;
use weir_wire::backend::tag;
use weir_wire::row;

use super::failures::unexpected;
use super::fan::Question;
use super::own_types::says;
use crate::front::batch::Ending;
use crate::front::extended::{Step, Survey};
use crate::front::names::Portal;
use crate::front::session::{Failure, Session};
use crate::front::transaction::Snapshot;
use crate::snapshot::{SHUT_MAX, Shut, Snapshots, Taken};

/// With the pauses between them long enough for recovery to finish what a lost proxy has left half done.
const ATTEMPTS: u32 = 8;
/// Behind the first attempt; twice as long behind each further one.
const PAUSE: Duration = Duration::from_millis(50);
/// Takes the snapshot and tells it; and whether the server keeps it.
const TAKE: &str = "SELECT pg_catalog.pg_current_snapshot()::text, \
    pg_catalog.current_setting('transaction_read_only') = 'on' \
    AND pg_catalog.current_setting('transaction_isolation') IN ('repeatable read', 'serializable')";

impl Session {
    /// Waits while snapshots of all shards are taken. Call before anything is sent that may commit.
    pub async fn pass_gate(&self) {
        if let Some(snapshots) = self.db.snapshots.as_ref().filter(|snapshots| snapshots.is_shut()) {
            Box::pin(snapshots.opened()).await;
        }
    }

    /// Does its transaction see all shards as they are, or will be, at one moment?
    pub fn sees_all_shards(&self) -> bool {
        self.txn.as_ref().is_some_and(|txn| txn.sees() == Snapshot::AllShards) && self.db.snapshots.is_some()
    }

    /// Before a statement runs in a transaction: if it is the first one that needs a snapshot, and the transaction is to see all
    /// shards at one moment, all snapshots are taken now.
    pub async fn see(&mut self, sql: &[u8], class: &Class) -> Result<(), Failure> {
        if self.sees_all_shards() && exports(sql) {
            return Err(not_exported().into());
        }
        let Some(txn) = self.txn.as_mut().filter(|txn| txn.snapshot == Snapshot::NotYet) else { return Ok(()) };
        match class {
            Class::Show | Class::Empty => return Ok(()),
            // Postgres takes locks before the snapshot: what its holder has written until then is seen.
            Class::Lock => {
                txn.locked = true;
                return Ok(());
            }
            _ => {}
        }
        let wanted = txn.wanted();
        if let (Snapshot::AllShards, Some(snapshots)) = (wanted, self.db.snapshots.clone()) {
            let view = self.view();
            Box::pin(self.take_snapshots(&snapshots)).await?;
            self.keep_map(&view);
        }
        if let Some(txn) = &mut self.txn {
            txn.snapshot = wanted;
        }
        Ok(())
    }

    /// What may have to wait before a batch is relayed: its snapshot is taken, and what a Sync ends may commit with it.
    pub async fn before_batch(&mut self, survey: &Survey, ending: Ending) -> Result<(), Failure> {
        if self.txn.is_none() && self.pipelining().is_none() {
            return Ok(());
        }
        for step in &survey.steps {
            if let Step::Parse { prepared, .. }
            | Step::DescribeStatement { prepared, .. }
            | Step::Bind { bound: Portal { prepared, .. }, .. } = step
            {
                self.see(&prepared.sql, &prepared.shape.class).await?;
            }
        }
        if self.pipelining().is_some() && ending == Ending::Sync {
            self.pass_gate().await;
        }
        Ok(())
    }

    async fn take_snapshots(&mut self, snapshots: &Arc<Snapshots>) -> Result<(), Failure> {
        let shards = self.view().topology.active().to_vec();
        let mut why = "";
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                sleep(PAUSE * (1 << (attempt - 1))).await;
            }
            // Before the gate is shut: these may take long.
            for &shard in &shards {
                self.hold(shard).await?;
            }
            self.begin_on_held().await?;
            let unfinished: Vec<String> = self.db.prepared.lock().iter().map(|known| known.gid.clone()).collect();
            let shutting = async { Ok(snapshots.shut().await) };
            let Some(shut) = Box::pin(self.cancel.slot.unless_cancelled(shutting)).await? else {
                why = "A commit over several shards took too long";
                continue;
            };
            why = match self.ask_for_snapshots(&shards, shut).await? {
                None => "A shard took too long to answer, and commits were waiting",
                Some(taken) => match snapshots.is_torn(&taken, &unfinished).await {
                    Ok(false) => return Ok(()),
                    Ok(true) => {
                        "Commits of another proxy, or one that is in doubt, were seen on some shards and not on others"
                    }
                    Err(error) => {
                        tracing::warn!(database = %self.db.name, "cannot look at the decisions: {error:#}");
                        "weir could not look whether all shards show the same commits"
                    }
                },
            };
            self.begin_anew().await?;
        }
        Err(no_snapshot(why).into())
    }

    /// One snapshot on each shard. `None`: it took so long that the gate had to be opened meanwhile.
    async fn ask_for_snapshots(&mut self, shards: &[ShardId], shut: Shut) -> Result<Option<Vec<Taken>>, Failure> {
        let mut shut = Some(shut);
        let asked = {
            let mut asking = std::pin::pin!(self.ask_each(shards));
            // The pinned future goes on where it was, so nothing is lost when the time is over first.
            tokio::select! {
                biased;
                asked = &mut asking => asked,
                () = sleep(SHUT_MAX) => {
                    shut = None;
                    asking.await
                }
            }
        };
        asked.map(|taken| shut.is_some().then_some(taken))
    }

    async fn ask_each(&mut self, shards: &[ShardId]) -> Result<Vec<Taken>, Failure> {
        let mut sources = self.ask(shards, Question::Text(TAKE)).await?;
        let mut taken = Vec::with_capacity(shards.len());
        for source in &mut sources {
            while !source.done {
                let (kind, body) = self.next_frame(source).await?;
                if kind != tag::DATA_ROW {
                    continue;
                }
                let values = row::values(&body).map_err(|_| unexpected("a malformed DataRow"))?;
                let [Some(snapshot), Some(b"t")] = values[..] else {
                    return Err(unexpected("a transaction that does not keep its snapshot"));
                };
                let shard = self.db.shard(self.held[source.index].shard).name.to_string();
                taken.push(Taken { shard, snapshot: String::from_utf8_lossy(snapshot).into_owned() });
            }
        }
        self.drain(&mut sources).await?;
        self.follow_all(&sources);
        match sources.iter_mut().find_map(|source| source.failed.take()) {
            Some(body) => Err(self.report(&body)),
            None => Ok(taken),
        }
    }

    /// Gives the snapshots up, so that others can be taken in the same transaction of the client's.
    async fn begin_anew(&mut self) -> Result<(), Failure> {
        if self.txn.as_ref().is_some_and(|txn| txn.locked) {
            // Locks would be lost, and with them what the client knows.
            return Err(
                no_snapshot("The transaction has taken locks before its snapshot, so it cannot be begun anew").into()
            );
        }
        let begun: Vec<usize> = (0..self.held.len()).filter(|index| self.held[*index].begun).collect();
        self.tell_all(&begun, "ROLLBACK").await?;
        for index in begun {
            let held = &mut self.held[index];
            held.lease.vars = held.vars_before.clone();
            held.begun = false;
        }
        Ok(())
    }
}

/// ERRCODE_LOCK_NOT_AVAILABLE.
const LOCK_NOT_AVAILABLE: &str = "55P03";

fn no_snapshot(why: &str) -> UserError {
    UserError::new(Blame::Proxy, LOCK_NOT_AVAILABLE, "no common snapshot of all shards could be taken")
        .detail(format!("{why}, and {ATTEMPTS} attempts are the limit."))
        .hint("Run the transaction again, or use READ COMMITTED. SHOW PREPARED TRANSACTIONS in the admin database shows commits that wait.")
}

/// Does the statement name the function that gives others one server's snapshot?
fn exports(sql: &[u8]) -> bool {
    const NAME: &str = "pg_export_snapshot";
    sql.windows(NAME.len()).any(|part| part.eq_ignore_ascii_case(NAME.as_bytes()))
        && says(&String::from_utf8_lossy(sql), &|name| name == NAME)
}

/// What one server alone could do with its snapshot.
pub fn not_exported() -> UserError {
    UserError::new(
        Blame::Client,
        sqlstate::FEATURE_NOT_SUPPORTED,
        "snapshots cannot be exported or imported over several shards",
    )
    .detail("Each shard has a snapshot of its own, and its name means nothing on another one.")
    .hint("Read everything in one REPEATABLE READ, READ ONLY transaction; pg_dump does so without --jobs.")
}
