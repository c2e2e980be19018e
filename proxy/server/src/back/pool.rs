//! Backends of one user on one server, shared by all sessions: strictly first come, first served.
//!
//! The policy is [`weir_core::pool::Shelf`]; here are the sockets and wakers. Invariant: a [`Lease`] always gives its place
//! back, whatever happens to the task that held it.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::pool::{Acquire, Bounds, Counts, Release, Shelf, Ticket};
use weir_core::session::vars::{VarSet, replay};
use weir_wire::backend::{report_field, tag};
use weir_wire::frame;

use super::conn::Backend;
use super::connect::{Login, Parameters};
use super::follow;
use crate::config::Endpoint;
use crate::roles::Route;

/// Bounds of one pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    pub bounds: Bounds,
    /// Opened ahead, and kept however long they have been idle.
    pub min: usize,
    /// A client that has waited so long may have one of the reserve.
    pub reserve_after: Duration,
    /// Statements one Backend keeps prepared.
    pub prepared_max: usize,
    pub wait_max: Duration,
    /// Idle ones older than this are closed.
    pub idle_max: Duration,
    /// Closed when returned after this age.
    pub lifetime: Duration,
}

pub struct Pool {
    /// "shop/shard0/primary", for messages.
    pub name: String,
    /// What is to be raised where there are too few.
    size_key: &'static str,
    login: Login,
    limits: Mutex<PoolLimits>,
    /// `limits.lifetime`, for every return.
    lifetime_ms: AtomicU64,
    made: Instant,
    /// Backends from before this many microseconds since `made` are not lent again.
    fresh_from_us: AtomicU64,
    inner: Mutex<Inner>,
    /// What the server reported at the latest login.
    parameters: Mutex<Option<Arc<Parameters>>>,
    /// What the server reported for clients' startup settings, latest last.
    settings: Mutex<VecDeque<(VarSet, Bytes)>>,
    pub wait_us_total: AtomicU64,
    pub leases_total: AtomicU64,
}

/// How often a client that waits during a pause looks whether it is over.
const PAUSE_LOOK: Duration = Duration::from_secs(1);
/// Different startup settings whose effect is remembered.
const SETTINGS_MAX: usize = 64;

struct Inner {
    shelf: Shelf<Box<Backend>>,
    callers: HashMap<Ticket, oneshot::Sender<Handed>>,
    /// When the longest waiting caller of now came.
    waiting_since: HashMap<Ticket, Instant>,
}

/// What a waiter is called with.
enum Handed {
    Backend(Box<Backend>),
    /// Permission to open one.
    Open,
}

impl Pool {
    pub fn new(name: String, login: Login, limits: PoolLimits) -> Arc<Self> {
        Self::for_key(name, login, limits, "pool.size")
    }

    /// With another key of the configuration that says how large it is.
    pub fn for_key(name: String, login: Login, limits: PoolLimits, size_key: &'static str) -> Arc<Self> {
        let shelf = Shelf::new(limits.bounds);
        Arc::new(Pool {
            name,
            size_key,
            login,
            limits: Mutex::new(limits),
            lifetime_ms: AtomicU64::new(limits.lifetime.as_millis() as u64),
            made: Instant::now(),
            fresh_from_us: AtomicU64::new(0),
            inner: Mutex::new(Inner { shelf, callers: HashMap::new(), waiting_since: HashMap::new() }),
            parameters: Mutex::new(None),
            settings: Mutex::default(),
            wait_us_total: AtomicU64::new(0),
            leases_total: AtomicU64::new(0),
        })
    }

    /// One that leads elsewhere and is otherwise as this one is now.
    pub fn to_another(&self, name: String, route: Route) -> Arc<Self> {
        let login = Login { route, ..self.login.clone() };
        let pool = Pool::for_key(name, login, *self.limits.lock(), self.size_key);
        if self.inner.lock().shelf.is_paused() {
            pool.pause();
        }
        pool
    }

    /// A Backend that can be had without waiting.
    pub fn lease_idle(self: &Arc<Self>) -> Option<Lease> {
        loop {
            let backend = self.inner.lock().shelf.take_idle()?;
            if let Some(lease) = self.lend(backend) {
                return Some(lease);
            }
        }
    }

    /// Lends what was idle, unless it was terminated on its shelf: that must not cost a client its statement.
    fn lend(self: &Arc<Self>, mut backend: Box<Backend>) -> Option<Lease> {
        if backend.is_cut() || backend.has_news() {
            drop(backend);
            self.vacate();
            return None;
        }
        self.leases_total.fetch_add(1, Relaxed);
        Some(Lease { backend: Some(backend), pool: Arc::clone(self) })
    }

    /// A Backend to use; waits its turn for `wait_max` at most. Errors: 53300 when the queue is full or the wait over,
    /// 08001 when the server cannot be reached.
    pub async fn lease(self: &Arc<Self>) -> Result<Lease, UserError> {
        let receiver = loop {
            let mut inner = self.inner.lock();
            break match inner.shelf.acquire() {
                Acquire::Idle(backend) => {
                    drop(inner);
                    match self.lend(backend) {
                        Some(lease) => return Ok(lease),
                        None => continue,
                    }
                }
                Acquire::Open => None,
                Acquire::Wait(ticket) => {
                    let (sender, receiver) = oneshot::channel();
                    inner.callers.insert(ticket, sender);
                    inner.waiting_since.insert(ticket, Instant::now());
                    Some((ticket, receiver))
                }
                Acquire::Refused => return Err(self.full(inner.shelf.counts())),
            };
        };
        self.leases_total.fetch_add(1, Relaxed);
        match receiver {
            None => self.open().await,
            Some((ticket, receiver)) => self.wait(ticket, receiver).await,
        }
    }

    async fn wait(self: &Arc<Self>, ticket: Ticket, receiver: oneshot::Receiver<Handed>) -> Result<Lease, UserError> {
        let start = Instant::now();
        let mut place = Place { pool: self, ticket, receiver };
        let handed = self.called(&mut place).await;
        self.wait_us_total.fetch_add(start.elapsed().as_micros() as u64, Relaxed);
        match handed {
            Some(Handed::Backend(backend)) => Ok(Lease { backend: Some(backend), pool: Arc::clone(self) }),
            Some(Handed::Open) => self.open().await,
            None => Err(self.timed_out()),
        }
    }

    /// What the waiter is called with; draws on the reserve when its time has come. `None`: not in time.
    async fn called(&self, place: &mut Place<'_>) -> Option<Handed> {
        let limits = *self.limits.lock();
        let mut patience = limits.wait_max;
        // During a pause the end of the wait is RESUME's to tell, as with PgBouncer.
        while self.inner.lock().shelf.is_paused() {
            if let Ok(called) = tokio::time::timeout(PAUSE_LOOK, &mut place.receiver).await {
                return called.ok();
            }
        }
        if limits.bounds.reserve > 0 && limits.reserve_after < patience {
            if let Ok(called) = tokio::time::timeout(limits.reserve_after, &mut place.receiver).await {
                return called.ok();
            }
            if self.draw_reserve(place.ticket) {
                return Some(Handed::Open);
            }
            patience -= limits.reserve_after;
        }
        tokio::time::timeout(patience, &mut place.receiver).await.ok()?.ok()
    }

    fn draw_reserve(&self, ticket: Ticket) -> bool {
        let mut inner = self.inner.lock();
        let granted = inner.shelf.draw_reserve(ticket);
        if granted {
            inner.callers.remove(&ticket);
            inner.waiting_since.remove(&ticket);
        }
        granted
    }

    async fn open(self: &Arc<Self>) -> Result<Lease, UserError> {
        // Until the login is done this stands for the place that is taken, so a dropped task gives it back.
        let mut lease = Lease { backend: None, pool: Arc::clone(self) };
        // Boxed: every session's task would else carry room for it.
        let PoolLimits { wait_max, prepared_max, .. } = *self.limits.lock();
        let (mut backend, parameters) = Box::pin(follow::open(&self.login, wait_max)).await?;
        backend.prepared_max = prepared_max;
        *self.parameters.lock() = Some(Arc::new(parameters));
        lease.backend = Some(Box::new(backend));
        Ok(lease)
    }

    /// What the server reports at login; logs in once if nobody has yet.
    pub async fn parameters(self: &Arc<Self>) -> Result<Arc<Parameters>, UserError> {
        if let Some(known) = self.parameters.lock().clone() {
            return Ok(known);
        }
        drop(self.lease().await?);
        self.parameters.lock().clone().ok_or_else(|| self.timed_out())
    }

    /// The ParameterStatus and notice frames with which the server answers these settings. Errors: 22023 with the server's words, if it
    /// refuses one of them.
    pub async fn reported_settings(self: &Arc<Self>, vars: &VarSet) -> Result<Bytes, UserError> {
        if vars.is_empty() {
            return Ok(Bytes::new());
        }
        if let Some((_, known)) = self.settings.lock().iter().find(|(seen, _)| seen == vars) {
            return Ok(known.clone());
        }
        let mut lease = self.lease().await?;
        // From the server's defaults: it reports changes only, and an earlier session may have left some of these applied.
        settings_on(&mut lease, &VarSet::default()).await?;
        let reported = settings_on(&mut lease, vars).await?;
        let mut settings = self.settings.lock();
        if settings.len() >= SETTINGS_MAX {
            settings.pop_front();
        }
        settings.push_back((vars.clone(), reported.clone()));
        Ok(reported)
    }

    /// For a server connection of the client's own, outside the pool.
    pub fn login(&self) -> &Login {
        &self.login
    }

    /// Where it leads, or did last.
    pub fn endpoint(&self) -> &Endpoint {
        self.login.route.endpoint()
    }

    pub fn counts(&self) -> Counts {
        self.inner.lock().shelf.counts()
    }

    /// How long the longest waiting caller has waited.
    pub fn longest_wait(&self) -> Duration {
        self.inner.lock().waiting_since.values().min().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Closes what has been idle or alive for too long, and opens what is missing to the minimum. Call every few seconds.
    pub fn upkeep(self: &Arc<Self>, now: Instant) {
        let limits = *self.limits.lock();
        let mut inner = self.inner.lock();
        let counts = inner.shelf.counts();
        let mut spare = (counts.idle + counts.busy).saturating_sub(limits.min);
        let retired = inner.shelf.retire(|backend| {
            let old = now.duration_since(backend.since) > limits.lifetime;
            let unused = spare > 0 && now.duration_since(backend.idle_since) > limits.idle_max;
            spare -= usize::from(unused && !old);
            old || unused || backend.is_cut()
        });
        let mut ahead = 0;
        while inner.shelf.open_ahead(limits.min) {
            ahead += 1;
        }
        drop(inner);
        drop(retired);
        for _ in 0..ahead {
            // A failure is no news here: who needs a Backend learns of it, and the next round tries again.
            let opening = Arc::clone(self);
            tokio::spawn(async move { drop(opening.open().await) });
        }
    }

    /// Closes every idle Backend now. How many there were.
    pub fn close_idle(&self) -> usize {
        let closed = self.inner.lock().shelf.retire(|_| true);
        closed.len()
    }

    /// Other limits from now on.
    pub fn set_limits(&self, limits: PoolLimits) {
        *self.limits.lock() = limits;
        self.lifetime_ms.store(limits.lifetime.as_millis() as u64, Relaxed);
        let mut inner = self.inner.lock();
        let called = inner.shelf.resize(limits.bounds);
        inner.call_all(called);
    }

    /// Closes what is idle now and the rest as it comes back; nobody gets one until [`Pool::resume`].
    pub fn pause(&self) {
        let idle = self.inner.lock().shelf.pause();
        drop(idle);
    }

    pub fn resume(&self) {
        let mut inner = self.inner.lock();
        let called = inner.shelf.resume();
        inner.call_all(called);
    }

    /// Every Backend of now is closed when it is next idle, instead of being lent again.
    pub fn reconnect(&self) {
        self.fresh_from_us.store(self.made.elapsed().as_micros() as u64, Relaxed);
        // Whoever logs in from now on is told what a new one says.
        *self.parameters.lock() = None;
        self.close_idle();
    }

    fn give_back(&self, mut backend: Box<Backend>) {
        backend.idle_since = Instant::now();
        let age = backend.idle_since.duration_since(backend.since);
        let born_us = backend.since.saturating_duration_since(self.made).as_micros() as u64;
        let old = age.as_millis() as u64 > self.lifetime_ms.load(Relaxed) || born_us < self.fresh_from_us.load(Relaxed);
        if !backend.is_clean() || old {
            drop(backend);
            return self.vacate();
        }
        backend.shrink();
        let mut inner = self.inner.lock();
        loop {
            match inner.shelf.release(backend) {
                Release::Shelved | Release::Surplus(_) => return,
                Release::HandTo(ticket, handed) => match inner.call(ticket, Handed::Backend(handed)) {
                    Err(Handed::Backend(unwanted)) => backend = unwanted,
                    _ => return,
                },
            }
        }
    }

    /// A place is free because its Backend is gone.
    fn vacate(&self) {
        let mut inner = self.inner.lock();
        while let Some(ticket) = inner.shelf.closed() {
            if inner.call(ticket, Handed::Open).is_ok() {
                return;
            }
        }
    }

    fn full(&self, counts: Counts) -> UserError {
        self.exhausted("too many clients wait for a server connection", counts)
    }

    fn timed_out(&self) -> UserError {
        self.exhausted(&format!("no server connection within {:?}", self.limits.lock().wait_max), self.counts())
    }

    fn exhausted(&self, message: &str, counts: Counts) -> UserError {
        UserError::new(Blame::Proxy, sqlstate::TOO_MANY_CONNECTIONS, message.to_owned())
            .detail(format!("pool {} {}/{} busy, {} waiting", self.name, counts.busy, counts.size, counts.waiting))
            .hint(format!(
                "Raise {}, shorten transactions, or look for idle ones with SHOW CLIENTS in the admin database.",
                self.size_key
            ))
    }
}

/// Applies settings to a Backend; the ParameterStatus and notice frames that it answers with.
async fn settings_on(lease: &mut Lease, vars: &VarSet) -> Result<Bytes, UserError> {
    let Some(sql) = replay(&lease.vars, vars) else { return Ok(Bytes::new()) };
    lease.busy = true;
    lease.put_query(&sql);
    let lost = |error: std::io::Error| {
        UserError::new(Blame::Server, sqlstate::CONNECTION_FAILURE, "the server connection was lost")
            .detail(error.to_string())
    };
    lease.send().await.map_err(lost)?;
    let mut reported = BytesMut::new();
    let mut refused = None;
    loop {
        let (kind, body) = lease.receive().await.map_err(lost)?;
        match kind {
            tag::PARAMETER_STATUS | tag::NOTICE => frame::put(&mut reported, kind, |out| out.extend_from_slice(&body)),
            tag::ERROR => refused = report_field(&body, b'M').map(|text| String::from_utf8_lossy(text).into_owned()),
            tag::READY => break,
            _ => {}
        }
    }
    lease.busy = false;
    match refused {
        None => {
            lease.vars = vars.clone();
            Ok(reported.freeze())
        }
        Some(message) => {
            // Some settings may have been applied before the one that failed.
            lease.doubt("startup settings failed half-way");
            Err(UserError::new(Blame::Client, "22023", message).hint("Correct the setting in the connection string."))
        }
    }
}

impl Inner {
    /// Lets these waiters open one each; who has gone meanwhile passes the permission on.
    fn call_all(&mut self, tickets: Vec<Ticket>) {
        for ticket in tickets {
            let mut called = self.call(ticket, Handed::Open).is_ok();
            while !called {
                let Some(next) = self.shelf.closed() else { break };
                called = self.call(next, Handed::Open).is_ok();
            }
        }
    }

    fn call(&mut self, ticket: Ticket, handed: Handed) -> Result<(), Handed> {
        self.waiting_since.remove(&ticket);
        match self.callers.remove(&ticket) {
            Some(sender) => sender.send(handed),
            None => Err(handed),
        }
    }
}

/// A place in the queue that is given up when the waiting task is dropped or times out.
struct Place<'a> {
    pool: &'a Arc<Pool>,
    ticket: Ticket,
    receiver: oneshot::Receiver<Handed>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        {
            let mut inner = self.pool.inner.lock();
            inner.callers.remove(&self.ticket);
            inner.waiting_since.remove(&self.ticket);
            if inner.shelf.forget(self.ticket) {
                return;
            }
        }
        // Called already: what was handed over, if nobody took it, goes on to the next.
        match self.receiver.try_recv() {
            Ok(Handed::Backend(backend)) => self.pool.give_back(backend),
            Ok(Handed::Open) => self.pool.vacate(),
            Err(_) => {}
        }
    }
}

/// A Backend on loan. Dropping it returns the Backend if it is clean and closes it otherwise.
pub struct Lease {
    backend: Option<Box<Backend>>,
    pool: Arc<Pool>,
}

impl Lease {
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl Deref for Lease {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        self.backend.as_deref().expect("a lease that was handed out holds a backend")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Backend {
        self.backend.as_deref_mut().expect("a lease that was handed out holds a backend")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        match self.backend.take() {
            Some(backend) => self.pool.give_back(backend),
            None => self.pool.vacate(),
        }
    }
}
