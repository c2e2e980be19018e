//! One client's session: its loop, its state, and the Backends it holds.
//!
//! Invariant: outside a transaction, a pipeline and a pin, a session holds no Backend. A Backend that is held has the
//! session's settings applied before the first statement runs on it. Errors of weir's own abort the transaction exactly
//! as an error of the server would. Non-goal: how statements are run ([`crate::exec`]) and what they mean ([`super::simple`],
//! [`super::extended`]).

use std::sync::Arc;

use parking_lot::Mutex;
use smallvec::SmallVec;
use weir_core::error::{Blame, Severity, UserError, sqlstate};
use weir_core::fresh::Dependencies;
use weir_core::id::ShardId;
use weir_core::plan::Noting;
use weir_core::session::pin::Pin;
use weir_core::session::replies::{Owed, Replies};
use weir_core::session::vars::{VarSet, Vars};
use weir_core::topology::Width;
use weir_wire::backend::{Status, put_command_complete, put_ready};

use super::batch::{Batch, Collector, Ending, Request};
use super::cancel::Registration;
use super::client::Client;
use super::draw::Drawn;
use super::extended::Survey;
use super::names::{Names, Undo};
pub use super::transaction::{Joined, Transaction};
use crate::app::App;
use crate::back::pool::{Lease, Pool};
use crate::database::{Database, UserPools, View};
use crate::exec::failures::{lost, state_not_taken_over};
use crate::exec::open::OpenRead;
use crate::exec::relay::{Broken, Capture, Flow, Trail, relay};
use crate::fresh::Announced;
use crate::statements::Scratch;

/// Why a session is over.
#[derive(Debug)]
pub enum End {
    /// The client left, cleanly or not.
    ClientGone,
    /// Told to the client as FATAL.
    Fatal(UserError),
    /// The server ended the connection with a FATAL of its own, which has been passed on.
    Told,
}

/// Why a statement did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// The server's own error has been passed on.
    Reported,
    /// Weir's error, not yet passed on.
    Refused(UserError),
    End(End),
}

impl From<UserError> for Failure {
    fn from(error: UserError) -> Self {
        match error.severity {
            Severity::Error => Failure::Refused(error),
            Severity::Fatal => Failure::End(End::Fatal(error)),
        }
    }
}

impl From<End> for Failure {
    fn from(end: End) -> Self {
        Failure::End(end)
    }
}

/// A Backend of this session.
pub struct Held {
    pub shard: ShardId,
    pub lease: Lease,
    pub pinned: Option<Pin>,
    /// It has been sent this transaction's prelude, or the client's own BEGIN.
    pub begun: bool,
    /// Something has been bound or run in a pipeline whose Sync has not come.
    pub piped: bool,
    pub wrote: bool,
    /// It wrote rows or schema, not only what a read may have drawn.
    pub changed: bool,
    /// What it has written in this transaction.
    pub dirty: Dependencies,
    /// It wrote rows of slots that are on their way, in this transaction.
    pub wrote_moving: bool,
    /// What it may have noted of globally unique columns in this transaction, and is not yet settled.
    pub noting: Noting,
    /// Settings it had when the transaction began; a rollback takes it back there.
    pub vars_before: VarSet,
}

pub struct Session {
    pub app: Arc<App>,
    pub db: Arc<Database>,
    pub pools: Arc<UserPools>,
    pub user: Arc<str>,
    pub client: Client,
    pub cancel: Registration,
    pub names: Names,
    pub vars: Vars,
    pub txn: Option<Transaction>,
    pub held: SmallVec<[Held; 2]>,
    /// Portals and cursors over several shards that are read in parts.
    pub open_reads: Vec<OpenRead>,
    /// Portals over several shards that have been read to their end at once.
    pub read_portals: Vec<bytes::Bytes>,
    /// Makes the names of such portals on the shards.
    pub opened: u64,
    pub announced: Announced,
    pub scratch: Scratch,
    /// The last batch's survey, emptied, for the next one.
    pub spare_survey: Survey,
    /// The database's view and what this session's own search_path makes of it.
    own_view: Mutex<Option<(Arc<View>, Arc<View>)>>,
    /// The request touches slots that are on their way.
    pub touches_moving: bool,
    /// It may have prepared statements in SQL while there was one shard: what they ask for lies on several now.
    pub prepared_on_one: bool,
    /// After an error inside a pipeline: everything up to the next Sync is ignored.
    pub skipping: bool,
    /// The client has just sent COPY data to several shards: its Sync of before counts no more, the next one does.
    pub copied_in: bool,
    /// The server process on which it has last written, and so may have drawn from a sequence.
    pub drew_on: Option<i32>,
    /// It has been told that a hint of its means nothing.
    pub told_level: bool,
    /// What weir has drawn from sequences for this session.
    pub drawn: Option<Box<Drawn>>,
    /// The statement that the next Bind of the survey is for, where weir has filled it.
    pub filled: Option<Arc<crate::statements::Prepared>>,
    pub stats: Arc<crate::stats::SessionStats>,
}

impl Session {
    #[allow(clippy::too_many_arguments, reason = "the one place where a session is put together, from login's results")]
    pub fn new(
        app: Arc<App>,
        db: Arc<Database>,
        pools: Arc<UserPools>,
        user: Arc<str>,
        mut client: Client,
        cancel: Registration,
        vars: Vars,
        stats: Arc<crate::stats::SessionStats>,
    ) -> Self {
        client.notifiers = Some(Arc::clone(&db.notifiers));
        Session {
            app,
            db,
            pools,
            user,
            client,
            cancel,
            names: Names::default(),
            vars,
            txn: None,
            held: SmallVec::new(),
            open_reads: Vec::new(),
            read_portals: Vec::new(),
            opened: 0,
            announced: Announced::default(),
            scratch: Scratch::default(),
            spare_survey: Survey::default(),
            own_view: Mutex::default(),
            touches_moving: false,
            prepared_on_one: false,
            skipping: false,
            copied_in: false,
            drew_on: None,
            told_level: false,
            drawn: None,
            filled: None,
            stats,
        }
    }

    /// What statements are planned against now: the database's view, under this session's own search_path if it has one.
    pub fn view(&self) -> Arc<View> {
        let base = self.base_view();
        let Some(path) = self.vars.current().search_path() else { return base };
        let mut known = self.own_view.lock();
        if let Some((of, own)) = &*known
            && Arc::ptr_eq(of, &base)
            && own.search_path.iter().map(|name| &**name).eq(path.iter().map(String::as_str))
        {
            return Arc::clone(own);
        }
        let own = Arc::new(base.under_search_path(path));
        *known = Some((base, Arc::clone(&own)));
        own
    }

    /// Serves until the client leaves or something fatal happens, and says so to the client.
    pub async fn run(mut self: Box<Self>) {
        self.stats.runs_here().await;
        let end = self.serve().await;
        self.db.stats.close(&self.stats);
        if let End::Fatal(error) = &end {
            self.db.stats.error(error.sqlstate);
            self.client.put_error(error);
        }
        if !matches!(end, End::ClientGone) {
            // What the session held of the servers is not kept waiting for a client that must go.
            self.give_up_held();
            Box::pin(self.client.part()).await;
        }
    }

    /// What pinned a Backend dies with its session: such a Backend is closed, never lent again.
    fn give_up_held(&mut self) {
        self.give_up_announced();
        for mut held in self.held.drain(..) {
            if let Some(pin) = held.pinned {
                held.lease.doubt("pinned by a session that has ended");
                self.db.stats.unpinned(pin);
            }
        }
    }

    async fn serve(&mut self) -> End {
        let mut collector = Collector::new(self.app.config().limits.message_bytes_max);
        if self.db.view().topology.is_single() {
            collector = collector.in_pieces();
        }
        loop {
            let request = match collector.next(&mut self.client.inbuf) {
                Err(unusable) => return End::Fatal(unusable.into()),
                Ok(Some(request)) => request,
                Ok(None) => match self.await_rest(&mut collector).await {
                    Ok(None) => continue,
                    Ok(Some(unfinished)) => unfinished,
                    Err(end) => return end,
                },
            };
            self.stats.begin();
            if collector.is_in_pieces() && !self.db.view().topology.is_single() {
                collector.in_batches();
            }
            let served = match request {
                Request::Query(_) | Request::FunctionCall(_) if self.skipping => Ok(()),
                Request::Query(sql) => self.simple(sql).await,
                Request::Batch(mut batch) => {
                    let served = self.batch(&mut batch).await;
                    collector.recycle(batch);
                    served
                }
                Request::FunctionCall(frame) => Box::pin(self.function_call(&frame)).await,
                Request::Terminate => return End::ClientGone,
            };
            if let Err(end) = served {
                return end;
            }
            if self.client.send().await.is_err() {
                return End::ClientGone;
            }
            self.client.shrink();
            self.scratch.shrink();
            let keeps_map = (self.txn.is_some() || self.pipelining().is_some()) && self.began_alone();
            self.stats.end(&self.client, self.txn.is_some(), keeps_map);
            if let Some(error) = self.breaks_mode() {
                return End::Fatal(error);
            }
        }
    }

    /// Status for ReadyForQuery.
    pub fn status(&self) -> Status {
        match &self.txn {
            None => Status::Idle,
            Some(txn) if txn.failed => Status::Failed,
            Some(_) => Status::InTransaction,
        }
    }

    pub fn put_ready(&mut self) {
        let status = self.status();
        put_ready(&mut self.client.out, status);
    }

    pub fn put_tag(&mut self, command: &str) {
        put_command_complete(&mut self.client.out, command);
    }

    /// Weir's own error: the client reads it, and an open transaction is aborted by it.
    pub fn fail(&mut self, error: &UserError) {
        self.db.stats.error(error.sqlstate);
        self.client.put_error(error);
        if let Some(txn) = &mut self.txn {
            txn.failed = true;
        }
    }

    /// Is one Backend in the middle of a pipeline whose Sync has not come?
    pub fn pipelining(&self) -> Option<usize> {
        self.held.iter().position(|held| held.lease.busy)
    }

    /// The Backend for `shard`, leased now if this session does not hold it yet.
    pub async fn hold(&mut self, shard: ShardId) -> Result<usize, UserError> {
        let index = match self.held.iter().position(|held| held.shard == shard) {
            Some(index) => index,
            None => {
                let lease = self.lease_from(self.pools.primary(shard)).await?;
                self.hold_lease(shard, lease)
            }
        };
        if self.db.shards.get(usize::from(shard.0)).is_some_and(|shard| !shard.map.covers()) {
            // Boxed: rare.
            Box::pin(self.await_map(shard)).await?;
        }
        Ok(index)
    }

    /// A Backend of this pool, for as long as the client does not cancel.
    pub async fn lease_from(&self, pool: &Arc<Pool>) -> Result<Lease, UserError> {
        if let Some(lease) = pool.lease_idle() {
            self.stats.assigned(std::time::Duration::ZERO);
            return Ok(lease);
        }
        let asked = std::time::Instant::now();
        let lease = Box::pin(self.cancel.slot.unless_cancelled(pool.lease())).await?;
        self.stats.assigned(asked.elapsed());
        Ok(lease)
    }

    /// Makes a Backend this session's one for `shard`.
    pub fn hold_lease(&mut self, shard: ShardId, lease: Lease) -> usize {
        let vars_before = lease.vars.clone();
        self.held.push(Held {
            shard,
            lease,
            pinned: None,
            begun: false,
            piped: false,
            wrote: false,
            changed: false,
            dirty: Dependencies::new(),
            wrote_moving: false,
            noting: Noting::None,
            vars_before,
        });
        self.held.len() - 1
    }

    /// Brings a held Backend into the session's state: settings, then the open transaction.
    pub fn prime(&mut self, index: usize, replies: &mut Replies) {
        let wanted = self.vars.current().clone();
        let held = &mut self.held[index];
        if held.lease.vars != wanted {
            apply_vars(&mut held.lease, &wanted, replies);
            if !held.begun {
                held.vars_before = wanted;
            }
        }
        if let Some(txn) = &self.txn
            && !held.begun
        {
            let sql: Vec<&str> = txn.prelude.iter().map(|joined| &*joined.sql).collect();
            if !sql.is_empty() {
                held.lease.put_query(&sql.join("; "));
                replies.push(Owed::Query { hidden: true });
            }
            held.begun = true;
        }
    }

    /// As [`Session::prime`], for a Backend that is used for one read outside any transaction.
    pub fn prime_lease(&self, lease: &mut Lease, replies: &mut Replies) {
        let wanted = self.vars.current();
        if lease.vars != *wanted {
            apply_vars(lease, wanted, replies);
        }
    }

    /// Relays everything owed by a held Backend; the cancel key points at it meanwhile.
    pub async fn relay_on(
        &mut self,
        index: usize,
        replies: &mut Replies,
        capture: &mut Capture,
        trail: &mut Trail,
    ) -> Result<Flow, Failure> {
        let lease = &mut self.held[index].lease;
        self.cancel.slot.begin(&lease.cancel_key);
        let outcome = relay(&mut self.client, lease, replies, capture, trail).await;
        if !self.cancel.slot.end() && !Box::pin(self.cancel.slot.settle()).await {
            self.held[index].lease.doubt("a cancel request was still on its way");
        }
        outcome.map_err(|broken| match (self.broken(index, broken), trail.fatal) {
            (Failure::End(End::Fatal(_)), true) => Failure::End(End::Told),
            (failure, _) => failure,
        })
    }

    /// A relay broke: the Backend is lost, and what that means for the client.
    fn broken(&mut self, index: usize, broken: Broken) -> Failure {
        let held = &mut self.held[index];
        held.lease.doubt("a relay broke");
        let name = held.lease.pool().name.clone();
        self.give_up_announced();
        match broken {
            Broken::Client(_) => Failure::End(End::ClientGone),
            Broken::Protocol(_) => Failure::End(End::Fatal(malformed())),
            Broken::Hidden(why) if why.starts_with(sqlstate::QUERY_CANCELED) => {
                self.held.remove(index);
                Failure::Refused(super::cancel::cancelled())
            }
            // It was not this session's state: the server is going, or is not there yet.
            Broken::Hidden(why) if why.starts_with("57P") => Failure::End(End::Fatal(lost(&name, &why))),
            Broken::Hidden(why) => {
                self.held.remove(index);
                Failure::Refused(state_not_taken_over(&name, &why))
            }
            Broken::Server(error) => Failure::End(End::Fatal(lost(&name, &error.to_string()))),
            Broken::Desync(error) => Failure::End(End::Fatal(lost(&name, &error.to_string()))),
        }
    }

    /// Whether what was announced has happened is not known: it is over when the server processes that had it are gone.
    pub fn give_up_announced(&mut self) {
        let held = &self.held;
        let process_on =
            |shard| held.iter().find(|held| held.shard == shard).map_or(0, |held| held.lease.cancel_key.process);
        self.announced.unknown(process_on);
    }

    /// A transaction of weir's own, for one request of several statements or shards.
    pub fn begin_implicit(&mut self) {
        self.txn = Some(Transaction::implicit());
        self.vars.on_begin();
    }

    /// After a ReadyForQuery of the only Backend in use: what it says of the transaction, and what may go back.
    pub fn follow(&mut self, index: usize, status: Status) {
        self.held[index].piped = false;
        match (status, &mut self.txn) {
            (Status::Idle, txn) if self.held[index].begun || txn.is_none() => {
                if txn.take().is_some_and(|txn| txn.changed_schema) {
                    self.db.doubt_catalog();
                }
                self.stats.transaction();
            }
            (Status::Idle, _) => {}
            (status, Some(txn)) => txn.failed = status == Status::Failed,
            (status, txn @ None) => {
                *txn = Some(Transaction::begun_by_client(status == Status::Failed));
                self.held[index].begun = true;
            }
        }
    }

    /// Gives back what nothing holds any more.
    pub fn release(&mut self) {
        if self.txn.is_some() {
            return;
        }
        self.names.forget_portals();
        self.open_reads.clear();
        self.read_portals.clear();
        if self.vars.is_uncertain() {
            (0..self.held.len()).for_each(|index| self.pin(index, Pin::SetInsideUncertainTransaction));
        }
        self.keep_for_mode();
        for held in &mut self.held {
            held.begun = false;
            held.wrote = false;
            held.changed = false;
            held.wrote_moving = false;
            held.noting = Noting::None;
            held.dirty.clear();
        }
        self.held.retain(|held| held.pinned.is_some() && held.lease.status == Status::Idle);
    }

    /// Pins the session to a Backend; the reason is counted once.
    pub fn pin(&mut self, index: usize, pin: Pin) {
        self.prepared_on_one |= pin == Pin::SqlPrepare && self.view().width != Width::Several;
        // From now on all that comes through it is this session's, also what no text shows.
        self.db.notifiers.note(self.held[index].lease.cancel_key.process, self.cancel.process);
        if self.held[index].pinned.is_none() {
            self.held[index].pinned = Some(pin);
            self.db.stats.pinned(pin);
        }
    }

    pub fn pinned_index(&self) -> Option<usize> {
        self.held.iter().position(|held| held.pinned.is_some())
    }

    /// Takes back what an error in a pipeline undid.
    pub fn undo(&mut self, index: usize, log: &mut [Undo], undone: &[u32]) {
        for op in undone.iter().rev() {
            match log.get_mut(*op as usize).map(|undo| std::mem::replace(undo, Undo::BackendUnnamed)) {
                Some(Undo::BackendPrepared { id }) => self.held[index].lease.forget_prepared(id),
                Some(undo) => {
                    if let Undo::Statement { backend: Some(id), .. } = undo {
                        self.held[index].lease.forget_prepared(id);
                    }
                    self.names.undo(undo);
                }
                None => {}
            }
        }
        if !undone.is_empty() {
            self.held[index].lease.unnamed = None;
        }
    }

    /// The end of a simple request: the error if there is one, ReadyForQuery, and Backends go back.
    pub fn conclude(&mut self, result: Result<(), Failure>) -> Result<(), End> {
        match result {
            Ok(()) | Err(Failure::Reported) => {}
            Err(Failure::Refused(error)) => {
                self.announced.publish();
                self.fail(&error);
            }
            Err(Failure::End(end)) => return Err(end),
        }
        self.put_ready();
        self.release();
        Ok(())
    }

    async fn batch(&mut self, batch: &mut Batch) -> Result<(), End> {
        if self.skipping {
            if batch.ending == Ending::Flush {
                return Ok(());
            }
            self.skipping = false;
            return self.sync_only().await;
        }
        self.extended(batch).await
    }
}

fn apply_vars(lease: &mut Lease, wanted: &VarSet, replies: &mut Replies) {
    if let Some(sql) = weir_core::session::vars::replay(&lease.vars, wanted) {
        lease.put_query(&sql);
        replies.push(Owed::Query { hidden: true });
    }
    lease.vars = wanted.clone();
}

impl Drop for Session {
    fn drop(&mut self) {
        self.give_up_held();
    }
}

pub fn malformed() -> UserError {
    UserError::new(Blame::Client, sqlstate::PROTOCOL_VIOLATION, "malformed protocol message")
        .detail("The length or layout of a message does not fit its type.")
        .fatal()
}
