//! Which server of a shard is its primary now, for everything that connects to it; and the end of the last one's time.
//!
//! Invariant: a *generation* stands for one server on one timeline at most. Connections to a primary belong to the
//! generation in which they were opened, and are cut when it is over: whatever a primary that was replaced still says, reaches nobody,
//! and nothing that is acknowledged later was written there. Who acts on what the primary says compares generations first.
//!
//! A shard with one server has one generation, and nothing here happens. Non-goals: judging ([`weir_core::election`]), and promoting.

use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use socket2::{SockRef, Socket};
use tokio::net::TcpStream;
use tokio::sync::watch;
use weir_core::election::{Force, NoPrimary, Past, Role, Seen, judge};
use weir_core::error::{Blame, UserError, sqlstate};

use crate::config::Endpoint;
use crate::probe::EndpointView;

/// Counts the primaries that a shard has had.
pub type Generation = Arc<AtomicU64>;

/// The servers of one shard, and who of them is what.
pub struct Roles {
    shard: Box<str>,
    /// In the order of the configuration; the first is the one that it calls the primary.
    servers: Vec<Arc<EndpointView>>,
    generation: Generation,
    standing: watch::Sender<Standing>,
    /// Connections to the primary.
    cuts: Mutex<Vec<Weak<Cut>>>,
    /// The newest timeline seen. Held while somebody judges.
    newest: Mutex<u32>,
    /// Somebody has not found the primary where it should be.
    doubted: watch::Sender<()>,
}

/// Who is the primary.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    pub generation: u64,
    /// The last one known.
    pub force: Option<Force>,
    /// It is not in force now: why.
    pub lost: Option<NoPrimary>,
    /// When it came into force, or ceased to be.
    pub since: Instant,
}

/// A shard without a primary.
#[derive(Clone, Debug, thiserror::Error)]
#[error("shard {shard} has no primary: {why}")]
pub struct Vacant {
    shard: Box<str>,
    why: NoPrimary,
}

/// A connection to a primary, as somebody else can end it. It lives as long as the connection.
#[derive(Debug)]
pub struct Cut {
    socket: Socket,
    generation: u64,
    done: AtomicBool,
}

/// Where to connect to.
#[derive(Clone)]
pub enum Route {
    Server(Arc<Endpoint>),
    /// Whoever it is then.
    Primary(Arc<Roles>),
}

/// A route as it is now.
pub struct Way<'a> {
    pub endpoint: &'a Endpoint,
    /// The shard whose primary it leads to, and the generation.
    of: Option<(&'a Roles, u64)>,
}

/// A generation as long as it lasts.
#[derive(Clone)]
pub struct Tenure {
    number: u64,
    generation: Generation,
    standing: Option<watch::Receiver<Standing>>,
}

impl Standing {
    /// The primary, also while it cannot be reached, but not when it may have been replaced.
    fn in_force(&self) -> Option<Force> {
        self.force.filter(|_| self.lost.is_none_or(NoPrimary::may_be_reached))
    }
}

impl Vacant {
    /// Have the servers not been asked yet?
    pub fn is_unasked(&self) -> bool {
        self.why == NoPrimary::Unasked
    }

    pub fn told(&self) -> UserError {
        let message = format!("shard \"{}\" has no primary now", self.shard);
        UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT, message).detail(format!("{}.", self.why)).hint(
            "weir follows a promotion and makes none. SHOW REPLICAS in the admin database says how each server stands.",
        )
    }
}

impl Cut {
    pub fn is_done(&self) -> bool {
        self.done.load(SeqCst)
    }

    fn cut(&self) {
        self.done.store(true, SeqCst);
        // Whoever waits for the other side is told that nothing will come. It may be closed already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Roles {
    /// `servers`: first the one that the configuration calls the primary.
    pub fn new(shard: &str, servers: Vec<Arc<EndpointView>>) -> Arc<Self> {
        let lost = (servers.len() > 1).then_some(NoPrimary::Unasked);
        if let [only] = servers.as_slice() {
            only.take_role(Role::Primary);
        }
        let standing = Standing { generation: 0, force: None, lost, since: Instant::now() };
        Arc::new(Roles {
            shard: shard.into(),
            servers,
            generation: Arc::default(),
            standing: watch::Sender::new(standing),
            cuts: Mutex::default(),
            newest: Mutex::default(),
            doubted: watch::Sender::new(()),
        })
    }

    /// May another server become the primary?
    pub fn may_change(&self) -> bool {
        self.servers.len() > 1
    }

    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// The place of the primary among the servers, or of the last one.
    pub fn primary(&self) -> usize {
        self.standing.borrow().force.map_or(0, |force| force.server)
    }

    /// Where the server is that is configured as the primary.
    pub fn first(&self) -> Arc<Endpoint> {
        Arc::clone(&self.servers[0].endpoint)
    }

    /// May that server, by its place in the configuration, say what the primary would say while there is none? One that was replaced may
    /// not.
    pub fn may_stand_in(&self, server: usize) -> bool {
        let Some(view) = self.servers.get(server) else { return false };
        view.is_replica() || (self.standing.borrow().force.is_none() && view.role() != Role::Superseded)
    }

    /// Has a primary been reached since the start?
    pub fn has_been_up(&self) -> bool {
        if self.may_change() { self.standing.borrow().force.is_some() } else { self.servers[0].has_been_up() }
    }

    /// Can the primary be reached?
    pub fn is_up(&self) -> bool {
        !self.is_vacant() && self.view().is_up()
    }

    /// The primary, or the last one.
    pub fn view(&self) -> &Arc<EndpointView> {
        &self.servers[self.primary()]
    }

    pub fn tenure(&self) -> Tenure {
        let standing = self.may_change().then(|| self.standing.subscribe());
        Tenure { number: self.generation.load(SeqCst), generation: Arc::clone(&self.generation), standing }
    }

    /// Waits until it is known who is the primary, or for so long.
    pub async fn decided(&self, patience: Duration) {
        let mut standing = self.standing.subscribe();
        let known = standing.wait_for(|now| !matches!(now.lost, Some(NoPrimary::Unasked)));
        let _ = tokio::time::timeout(patience, known).await;
    }

    /// Until something about the primary has changed, or for so long.
    pub async fn changed_within(&self, pause: Duration) {
        let mut standing = self.standing.subscribe();
        let _ = tokio::time::timeout(pause, standing.changed()).await;
    }

    /// Somebody has not found the primary where it should be: the servers are asked at once.
    pub fn doubt(&self) {
        self.doubted.send_replace(());
    }

    /// Changes with each doubt, for probes.
    pub fn doubts(&self) -> watch::Receiver<()> {
        self.doubted.subscribe()
    }

    /// Is somebody to be found who is the primary? Then the servers are asked often.
    pub fn is_vacant(&self) -> bool {
        self.standing.borrow().lost.is_some()
    }

    fn way(&self) -> Result<Way<'_>, Vacant> {
        let now = *self.standing.borrow();
        let server = match (now.in_force(), now.lost) {
            (None, Some(why)) => return Err(Vacant { shard: self.shard.clone(), why }),
            (force, _) => force.map_or(0, |force| force.server),
        };
        let of = self.may_change().then_some((self, now.generation));
        Ok(Way { endpoint: &self.servers[server].endpoint, of })
    }

    /// Judges anew. Called after each answer of a server.
    pub fn look(&self) {
        if !self.may_change() {
            return;
        }
        let mut newest = self.newest.lock();
        let last = self.standing();
        let seen: Vec<Seen> = self.servers.iter().map(|server| server.seen()).collect();
        let verdict = judge(&seen, Past { last: last.force, newest: *newest });
        *newest = verdict.newest;
        let force = verdict.primary.ok().or(last.force);
        let mut next = Standing { force, lost: verdict.primary.err(), ..last };
        let began = last.in_force().is_some() && last.in_force() != next.in_force();
        if last.in_force() != next.in_force() {
            next.generation += u64::from(began);
            next.since = Instant::now();
        }
        if began {
            // First this: from here on nothing counts that the last one says.
            self.generation.store(next.generation, SeqCst);
        }
        for (server, role) in self.servers.iter().zip(verdict.roles) {
            server.take_role(role);
        }
        if began {
            self.cut_before(next.generation);
        }
        if (last.force, last.lost) != (next.force, next.lost) {
            self.tell(&last, &next);
            self.standing.send_replace(next);
        }
    }

    fn tell(&self, last: &Standing, next: &Standing) {
        let shard = &*self.shard;
        let name = |force: Option<Force>| force.map(|force| self.servers[force.server].endpoint.to_string());
        let position = |force: Option<Force>| Some(self.servers[force?.server].last_report()?.position);
        match (next.lost, next.force) {
            (None, Some(force)) if next.generation != last.generation => tracing::warn!(
                shard,
                primary = name(next.force),
                timeline = force.timeline,
                replaced = name(last.force),
                position = position(next.force).map(tracing::field::display),
                replaced_position = position(last.force).map(tracing::field::display),
                "another primary is in force"
            ),
            (None, Some(force)) => {
                tracing::info!(shard, primary = name(next.force), timeline = force.timeline, "the primary is known");
            }
            (Some(why), _) => tracing::warn!(shard, last = name(next.force), "no primary: {why}"),
            (None, None) => {}
        }
    }

    /// Ends what is connected to earlier primaries.
    fn cut_before(&self, generation: u64) {
        let mut cuts = self.cuts.lock();
        cuts.retain(|cut| {
            let Some(cut) = cut.upgrade() else { return false };
            if cut.generation < generation {
                cut.cut();
            }
            cut.generation >= generation
        });
    }

    /// A connection that is to be cut when its generation is over.
    fn guard(&self, stream: &TcpStream, generation: u64) -> io::Result<Arc<Cut>> {
        let socket = SockRef::from(stream).try_clone()?;
        let cut = Arc::new(Cut { socket, generation, done: AtomicBool::new(false) });
        let mut cuts = self.cuts.lock();
        if self.generation.load(SeqCst) != generation {
            return Err(io::Error::other("another server has become the primary"));
        }
        if cuts.len() == cuts.capacity() {
            cuts.retain(|cut| cut.strong_count() > 0);
        }
        cuts.push(Arc::downgrade(&cut));
        Ok(cut)
    }
}

impl Route {
    pub fn now(&self) -> Result<Way<'_>, Vacant> {
        match self {
            Route::Server(endpoint) => Ok(Way { endpoint, of: None }),
            Route::Primary(roles) => roles.way(),
        }
    }

    /// Where it leads, or did last: for people.
    pub fn endpoint(&self) -> &Endpoint {
        match self {
            Route::Server(endpoint) => endpoint,
            Route::Primary(roles) => &roles.view().endpoint,
        }
    }

    /// The shard whose primary it leads to, if that may become another.
    pub fn follows(&self) -> Option<&Arc<Roles>> {
        match self {
            Route::Primary(roles) if roles.may_change() => Some(roles),
            Route::Primary(_) | Route::Server(_) => None,
        }
    }

    pub fn tenure(&self) -> Tenure {
        match self {
            Route::Primary(roles) => roles.tenure(),
            Route::Server(_) => Tenure::unending(),
        }
    }

    /// A pause between attempts, which ends when something about the primary has changed.
    pub async fn pause(&self, pause: Duration) {
        match self.follows() {
            Some(roles) => roles.changed_within(pause).await,
            None => tokio::time::sleep(pause).await,
        }
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Route({})", self.endpoint())
    }
}

impl Way<'_> {
    /// Is it to a primary that may become another?
    pub fn follows(&self) -> bool {
        self.of.is_some()
    }

    /// Notes the connection, so that it is cut when its time is over. Errors: it is over already.
    pub fn guard(&self, stream: &TcpStream) -> io::Result<Option<Arc<Cut>>> {
        self.of.map(|(roles, generation)| roles.guard(stream, generation)).transpose()
    }
}

impl Tenure {
    /// Of a server that is what it is.
    pub fn unending() -> Tenure {
        Tenure { number: 0, generation: Arc::default(), standing: None }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// What counts on after it.
    pub fn generation(&self) -> Generation {
        Arc::clone(&self.generation)
    }

    /// Has another server become the primary since?
    pub fn is_over(&self) -> bool {
        self.generation.load(SeqCst) != self.number
    }

    /// Ready when it is over. Cancel-safe.
    pub async fn over(&mut self) {
        let number = self.number;
        let Some(standing) = &mut self.standing else { return std::future::pending().await };
        // An error would mean that the shard is gone, and nothing changes any more.
        if standing.wait_for(|now| now.generation != number).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// How many primaries shards have had after their first, in sum: what is made of where they are is out of date when it changes.
pub fn age<'a>(routes: impl IntoIterator<Item = &'a Route>) -> u64 {
    let of = |route: &Route| route.follows().map_or(0, |roles| roles.generation.load(SeqCst));
    routes.into_iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use weir_core::election::Report;
    use weir_core::id::Lsn;

    use super::*;
    use crate::probe::{Health, Observation};

    fn says(server: &EndpointView, in_recovery: bool, timeline: u32) {
        let report = Report { in_recovery, system: 1, timeline, position: Lsn(9), started: i64::from(timeline) };
        server.publish(&Health::Up(Observation { report, lag: None }));
    }

    fn two() -> (Arc<Roles>, Vec<Arc<EndpointView>>) {
        let server = |port| EndpointView::new(Endpoint { host: "127.0.0.1".into(), port });
        let servers = vec![server(1), server(2)];
        (Roles::new("shard0", servers.clone()), servers)
    }

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let near = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connects");
        (near, listener.accept().await.expect("accepts").0)
    }

    #[tokio::test]
    async fn what_is_connected_to_the_last_primary_is_cut() {
        let (roles, servers) = two();
        let route = Route::Primary(Arc::clone(&roles));
        assert!(route.now().is_err(), "nobody has said anything");
        says(&servers[0], false, 1);
        says(&servers[1], true, 1);
        roles.look();
        let mut tenure = roles.tenure();
        let way = route.now().expect("known");
        assert_eq!(way.endpoint.port, 1);
        let (near, _far) = connection().await;
        let cut = way.guard(&near).expect("in time").expect("it follows");
        servers[0].publish(&Health::Down { failures: 1, error: "gone".into() });
        roles.look();
        assert!(!cut.is_done() && !tenure.is_over(), "it may come back");
        assert_eq!(route.now().expect("worth a try").endpoint.port, 1);
        says(&servers[1], false, 2);
        roles.look();
        tenure.over().await;
        assert!(cut.is_done());
        near.readable().await.expect("ended");
        assert_eq!(near.try_read(&mut [0; 1]).expect("ended"), 0);
        assert_eq!(route.now().expect("known").endpoint.port, 2);
        let (late, _far) = connection().await;
        assert!(way.guard(&late).is_err(), "opened by what was true before");
        // The old one comes back, and is no primary.
        says(&servers[0], false, 1);
        roles.look();
        assert_eq!((roles.primary(), servers[0].role()), (1, Role::Superseded));
        servers[1].publish(&Health::Down { failures: 1, error: "gone".into() });
        roles.look();
        assert!(route.now().is_err_and(|vacant| vacant.to_string().contains("timeline 2 has replaced")));
        says(&servers[1], false, 2);
        roles.look();
        assert_eq!(route.now().expect("back").endpoint.port, 2);
    }

    #[test]
    fn one_server_is_the_primary_whatever_it_says() {
        let server = EndpointView::new(Endpoint { host: "127.0.0.1".into(), port: 1 });
        let roles = Roles::new("shard0", vec![Arc::clone(&server)]);
        says(&server, true, 1);
        roles.look();
        let route = Route::Primary(Arc::clone(&roles));
        assert!(!route.now().expect("always").follows() && route.follows().is_none() && !roles.is_vacant());
    }
}
