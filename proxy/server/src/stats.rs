//! Who is connected, and counting on behalf of a session.
//!
//! Figures live in [`crate::metrics`]; here are the sessions themselves, for SHOW CLIENTS and for draining, and the one
//! place that knows which figure an event belongs to.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime};

use hashbrown::HashMap;
use parking_lot::Mutex;
use weir_core::cache::CacheKey;
use weir_core::fresh::PrimaryBecause;
use weir_core::hot::Use;
use weir_core::id::{Epoch, ShardId, Slot};
use weir_core::plan::{Access, NoCacheReason, Plan, Target};
use weir_core::pool::Mode;
use weir_core::session::pin::Pin;

use crate::database::progress::Waited;
use crate::digests::Digests;
use crate::exec::relay::Trail;
use crate::front::cancel::CancelSlot;
use crate::front::client::Client;
use crate::front::time_out::Order;
use crate::hot::{Given, HotKeys, SAMPLE};
use crate::load::SlotCounts;
use crate::metrics::{CacheResult, DatabaseMetrics, Fill, Metrics, Role, RouteKind, SessionMetrics};
use crate::seats::Seats;

/// Of a packed charge: the slot's number from 1; above are microseconds since the session's start.
const SLOT_BITS: u32 = 16;

/// One connected session.
pub struct SessionStats {
    pub id: u64,
    pub user: Arc<str>,
    pub address: std::net::SocketAddr,
    pub tls: bool,
    pub application_name: String,
    pub connected: SystemTime,
    started: Instant,
    /// When the current request began, in microseconds since `started`; 0: none is running.
    busy_since_us: AtomicU64,
    /// Which slot the time since then is charged to, packed; 0: none.
    charge: AtomicU64,
    /// How long the current statement has waited for a server connection.
    waited_us: AtomicU64,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    /// The epoch that the current request is planned by, times two; odd: no slot that moves matters to it. 0: none.
    works_by: AtomicU64,
    /// Requests that ended outside a transaction, times two; odd: the last one ended inside one.
    rests: AtomicU64,
    /// What [`crate::front::time_out`] wants of it; 0: nothing.
    order: AtomicU64,
    waker: OnceLock<Waker>,
    metrics: SessionMetrics,
    hot: Arc<HotKeys>,
    load: Arc<SlotCounts>,
    digests: Arc<Digests>,
    /// Statements since the last one that was sampled.
    unsampled: AtomicU32,
    /// Its seats are given back with it.
    entry: Entry,
}

/// What a session is admitted with.
pub struct Entry {
    pub seats: Seats,
    pub mode: Mode,
    pub cancel: Arc<CancelSlot>,
}

/// A session as the sweep sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// How long the current request has been running.
    pub busy_for: Option<Duration>,
    pub received_bytes: u64,
    pub rests: u64,
    pub in_transaction: bool,
}

impl SessionStats {
    pub fn mode(&self) -> Mode {
        self.entry.mode
    }

    pub fn glance(&self) -> Glance {
        let busy_since_us = self.busy_since_us.load(Relaxed);
        let busy_for = self.started.elapsed().saturating_sub(Duration::from_micros(busy_since_us));
        let rests = self.rests.load(Relaxed);
        Glance {
            busy_for: (busy_since_us != 0).then_some(busy_for),
            received_bytes: self.received_bytes.load(Relaxed),
            rests: rests >> 1,
            in_transaction: rests & 1 == 1,
        }
    }

    /// Cancels on the server what it runs now, in the background. False: nothing does.
    pub fn cancel_running(&self) -> bool {
        let running = self.entry.cancel.is_running();
        if running {
            let slot = Arc::clone(&self.entry.cancel);
            tokio::spawn(async move { slot.cancel_running().await });
        }
        running
    }

    /// Notes the task that awaits this as the session's, which [`SessionStats::order`] wakes. It never changes.
    pub async fn runs_here(&self) {
        std::future::poll_fn(|cx| {
            self.waker.get_or_init(|| cx.waker().clone());
            std::task::Poll::Ready(())
        })
        .await;
    }

    /// Tells the session to end; it looks at this when it waits for its client.
    pub fn order(&self, order: Order) {
        self.order.store(order.packed(), Relaxed);
        if let Some(waker) = self.waker.get() {
            waker.wake_by_ref();
        }
    }

    pub fn is_ordered(&self) -> bool {
        self.order.load(Relaxed) != 0
    }

    /// The order, if it is still meant: the client may have come back to life meanwhile.
    pub fn take_order(&self, received_bytes: u64) -> Option<Order> {
        let order = Order::unpacked(self.order.swap(0, Relaxed))?;
        order.holds(received_bytes, self.rests.load(Relaxed) >> 1).then_some(order)
    }

    /// What is planned from here to the end of the request is planned by this epoch. Look whether it is still in force afterwards:
    /// who puts another into force looks here after that.
    pub fn works_by(&self, epoch: Epoch) {
        self.works_by.store(epoch.0 << 1, Relaxed);
        fence(SeqCst);
    }

    /// No slot that moves matters to what is under way.
    pub fn stands_aside(&self) {
        let now = self.works_by.load(Relaxed);
        self.works_by.store(now | u64::from(now != 0), Release);
    }

    /// Nothing is planned by any epoch now.
    pub fn works_by_none(&self) {
        self.works_by.store(0, Release);
    }

    /// The epoch that the current request is planned by, and whether slots that move matter to it.
    pub fn working_by(&self) -> Option<(Epoch, bool)> {
        let now = self.works_by.load(Acquire);
        (now != 0).then_some((Epoch(now >> 1), now & 1 == 0))
    }

    pub fn begin(&self) {
        self.waited_us.store(0, Relaxed);
        self.busy_since_us.store(self.started.elapsed().as_micros().max(1) as u64, Relaxed);
    }

    /// `keeps_map`: what comes next in the transaction is planned by the same epoch.
    pub fn end(&self, client: &Client, in_transaction: bool, keeps_map: bool) {
        if !keeps_map {
            self.works_by_none();
        }
        // The session's task alone writes it.
        let rests = self.rests.load(Relaxed);
        self.rests.store(if in_transaction { rests | 1 } else { (rests & !1) + 2 }, Relaxed);
        let now_us = self.started.elapsed().as_micros() as u64;
        self.settle(now_us);
        let took = Duration::from_micros(now_us.saturating_sub(self.busy_since_us.swap(0, Relaxed)));
        self.metrics.query(took);
        let received = client.received_bytes - self.received_bytes.swap(client.received_bytes, Relaxed);
        let sent = client.sent_bytes - self.sent_bytes.swap(client.sent_bytes, Relaxed);
        self.metrics.traffic(received, sent);
    }

    /// A statement is sent to the primary of a shard.
    pub fn sent_to(&self, plan: &Plan, shard: ShardId, values: Given<'_>) {
        self.used(plan, if plan.access == Access::Write { Use::Write } else { Use::Read }, values);
        let kind = match (&plan.target, plan.access) {
            (Target::Home, _) => RouteKind::Home,
            (Target::One(_), _) => RouteKind::Single,
            (Target::Any, _) => RouteKind::Any,
            (Target::Engine, _) => return self.metrics.sent_to(RouteKind::Engine, shard, Role::Primary),
            (_, Access::Write) => RouteKind::Broadcast,
            _ => RouteKind::Scatter,
        };
        self.metrics.sent_to(kind, shard, Role::Primary);
        self.metrics.read_by_primary(shard);
    }

    /// What a statement reads or writes was used once more.
    pub fn used(&self, plan: &Plan, used: Use, values: Given<'_>) {
        if used != Use::Hit {
            self.charge(plan);
        }
        // The session's task alone counts here.
        let turn = self.unsampled.load(Relaxed) + 1;
        self.unsampled.store(turn % SAMPLE, Relaxed);
        if turn == SAMPLE {
            self.hot.record(plan, used, values);
        }
    }

    /// From here on, or from the start of the request if this is its first, time is spent for the slot of this statement.
    fn charge(&self, plan: &Plan) {
        let charged = self.load.charged(plan);
        let mut since_us = self.busy_since_us.load(Relaxed);
        if self.charge.load(Relaxed) != 0 {
            since_us = self.started.elapsed().as_micros() as u64;
            self.settle(since_us);
        }
        if let Some(slot) = charged {
            self.charge.store(since_us << SLOT_BITS | (slot.index() as u64 + 1), Relaxed);
        }
    }

    /// What was charged until now is counted.
    fn settle(&self, now_us: u64) {
        let charge = self.charge.load(Relaxed);
        if charge == 0 {
            return;
        }
        self.charge.store(0, Relaxed);
        let time_us = now_us.saturating_sub(charge >> SLOT_BITS).saturating_sub(self.waited_us.load(Relaxed));
        self.waited_us.store(0, Relaxed);
        if let Some(slot) = Slot::new((charge & ((1 << SLOT_BITS) - 1)) as u16 - 1) {
            self.load.count(slot, time_us);
        }
    }

    /// The cache is about to be asked for this. To be called before [`SessionStats::used`], whose samples these are, too.
    pub fn wanted(&self, key: &CacheKey) {
        if self.unsampled.load(Relaxed) + 1 == SAMPLE {
            self.digests.record(key);
        }
    }

    /// A server connection was handed over after this wait.
    pub fn assigned(&self, wait: Duration) {
        if !wait.is_zero() {
            self.waited_us.store(self.waited_us.load(Relaxed) + wait.as_micros() as u64, Relaxed);
        }
        self.metrics.assigned(wait);
    }

    /// A read was answered by a replica that was proven fresh.
    pub fn read_replica(&self, shard: ShardId, server: usize) {
        self.metrics.sent_to(RouteKind::Single, shard, Role::Replica);
        self.metrics.read_by(shard, server);
    }

    /// The primary answers a read that a replica might have.
    pub fn read_primary(&self, shard: ShardId, because: PrimaryBecause) {
        self.metrics.read_primary(shard, because);
    }

    /// A read has waited for a replica that was nearly far enough.
    pub fn waited(&self, waited: Waited) {
        self.metrics.waited(waited);
    }

    pub fn cache(&self, result: CacheResult) {
        self.metrics.cache(result);
    }

    pub fn fill(&self, fill: Fill) {
        self.metrics.fill(fill);
    }

    pub fn uncacheable(&self, reason: NoCacheReason) {
        self.metrics.uncacheable(reason);
    }

    pub fn transaction(&self) {
        let now_us = self.started.elapsed().as_micros() as u64;
        self.metrics.transaction(Duration::from_micros(now_us.saturating_sub(self.busy_since_us.load(Relaxed))));
    }

    pub fn parse(&self) {
        self.metrics.client_parse();
    }

    pub fn bind(&self) {
        self.metrics.bind();
    }

    pub fn is_busy(&self) -> bool {
        self.busy_since_us.load(Relaxed) != 0
    }
}

/// The sessions of one database, and its rare events.
pub struct DatabaseStats {
    live: Mutex<HashMap<u64, Arc<SessionStats>>>,
    pub two_phase_commits: AtomicU64,
    /// Replica answers that could not be proven fresh and were thrown away.
    pub replica_rejected: AtomicU64,
    pinned_now: [AtomicU64; Pin::ALL.len()],
    metrics: Arc<Metrics>,
    pub database: Arc<DatabaseMetrics>,
    pub hot: Arc<HotKeys>,
    pub load: Arc<SlotCounts>,
    pub digests: Arc<Digests>,
}

impl DatabaseStats {
    pub fn new(metrics: Arc<Metrics>, database: Arc<DatabaseMetrics>) -> Self {
        DatabaseStats {
            live: Mutex::default(),
            two_phase_commits: AtomicU64::new(0),
            replica_rejected: AtomicU64::new(0),
            pinned_now: Default::default(),
            metrics,
            database,
            hot: Arc::default(),
            load: Arc::default(),
            digests: Arc::default(),
        }
    }

    pub fn open(&self, user: Arc<str>, client: &Client, application_name: String, entry: Entry) -> Arc<SessionStats> {
        let (id, metrics) = self.metrics.session(&self.database);
        metrics.login();
        metrics.traffic(client.received_bytes, client.sent_bytes);
        let stats = Arc::new(SessionStats {
            id,
            user,
            address: client.address,
            tls: client.is_tls(),
            application_name,
            connected: SystemTime::now(),
            started: Instant::now(),
            busy_since_us: AtomicU64::new(0),
            charge: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
            load: Arc::clone(&self.load),
            received_bytes: AtomicU64::new(client.received_bytes),
            sent_bytes: AtomicU64::new(client.sent_bytes),
            works_by: AtomicU64::new(0),
            rests: AtomicU64::new(0),
            order: AtomicU64::new(0),
            waker: OnceLock::new(),
            metrics,
            hot: Arc::clone(&self.hot),
            digests: Arc::clone(&self.digests),
            // Sessions of one statement each are sampled as well as others.
            unsampled: AtomicU32::new(id as u32 % SAMPLE),
            entry,
        });
        self.live.lock().insert(stats.id, Arc::clone(&stats));
        stats
    }

    pub fn close(&self, stats: &SessionStats) {
        self.live.lock().remove(&stats.id);
    }

    pub fn live(&self) -> Vec<Arc<SessionStats>> {
        self.live.lock().values().cloned().collect()
    }

    /// A session has just been pinned.
    pub fn pinned(&self, pin: Pin) {
        self.database.pins.add(pin.as_str());
        self.pinned_now[pin as usize].fetch_add(1, Relaxed);
    }

    /// A pinned Backend was let go.
    pub fn unpinned(&self, pin: Pin) {
        self.pinned_now[pin as usize].fetch_sub(1, Relaxed);
    }

    pub fn pinned_now(&self, pin: Pin) -> u64 {
        self.pinned_now[pin as usize].load(Relaxed)
    }

    pub fn error(&self, sqlstate: &str) {
        self.metrics.error(sqlstate);
    }

    /// Counts the server error of a relay, if there was one.
    pub fn server_error(&self, trail: &Trail) {
        if trail.failed {
            let code = trail.sqlstate.unwrap_or(*b"?????");
            self.metrics.error(&String::from_utf8_lossy(&code));
        }
    }

    pub fn server_error_body(&self, body: &[u8]) {
        let code = weir_wire::backend::report_field(body, b'C').unwrap_or_default();
        self.metrics.error(&String::from_utf8_lossy(code));
    }
}

/// How many clients are connected, against a limit.
#[derive(Debug)]
pub struct ClientCount {
    now: AtomicU32,
    max: AtomicU32,
}

impl ClientCount {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(ClientCount { now: AtomicU32::new(0), max: AtomicU32::new(max as u32) })
    }

    /// `None` when the limit is reached.
    pub fn enter(self: &Arc<Self>) -> Option<ClientSeat> {
        let max = self.max();
        let entered = self.now.fetch_update(Relaxed, Relaxed, |now| (now < max).then_some(now + 1));
        entered.ok().map(|_| ClientSeat(Arc::clone(self)))
    }

    pub fn now(&self) -> u32 {
        self.now.load(Relaxed)
    }

    pub fn max(&self) -> u32 {
        self.max.load(Relaxed)
    }

    pub fn set_max(&self, max: usize) {
        self.max.store(max as u32, Relaxed);
    }
}

/// One connected client.
#[derive(Debug)]
pub struct ClientSeat(Arc<ClientCount>);

impl Drop for ClientSeat {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Relaxed);
    }
}
