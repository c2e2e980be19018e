//! Several proxies in front of the same servers: each tells the others of its writes before they can commit, so that every
//! proxy's cache and replicas stay as fresh as its own writes keep them.
//!
//! Invariant: while a proxy answers reads from its cache or from replicas (it *serves*), every other proxy that can commit a
//! write on that shard either has told it before, or has first made sure that it no longer serves. The shard's primary is the
//! judge: table `weir.member` says who takes part, and who has not been able to ask it for one lease serves nothing.
//!
//! Parts: [`member`] is one proxy at one shard; [`keeper`] keeps its place in the table and its lease; [`link`] speaks to
//! another process and [`inbound`] listens. Messages are `weir_wire::peer`. Without `[peers]` there is one proxy, and nothing here
//! runs.
//!
//! Non-goals: agreeing on anything else. Messages name word numbers and process ids, and who sends them is authenticated when a connection
//! is opened; without TLS ([`tls`]) they belong on a private network.

mod inbound;
pub mod keeper;
mod link;
pub mod member;
pub mod tls;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result};
use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use weir_core::admin::PeerRow;
use weir_core::fresh::fleet::{Hearing, Standing};
use weir_wire::peer::Message;

use crate::config::{PeersConfig, PeersMode, Secret};
use crate::control::Target;
use crate::database::{Database, Shard};
use crate::front::cancel::CancelRegistry;
use link::Link;
use tls::{Ends, PeerTls};

/// Longest wait for the members to leave their tables when the process ends.
const LEAVE_MAX: Duration = Duration::from_secs(2);
/// Between two questions for a sixteenth of a shard's stamps: at first, and once all were asked for.
const STAMPS_AT_FIRST: Duration = Duration::from_millis(50);
const STAMPS_EVERY: Duration = Duration::from_secs(2);

/// This process among the proxies.
pub struct Fleet {
    /// Where the others reach it.
    address: String,
    secret: Secret,
    tls: Arc<PeerTls>,
    mode: PeersMode,
    /// How long it may serve after the primary has answered.
    lease: Duration,
    tokens: AtomicU64,
    links: Mutex<HashMap<String, Arc<Link>>>,
    members: Mutex<HashMap<u64, Weak<Shard>>>,
    databases: Mutex<Vec<Weak<Database>>>,
    /// The sessions of this process, for cancel requests that came to another one.
    cancels: Arc<CancelRegistry>,
    leaving: AtomicBool,
    left: Notify,
}

/// This proxy and the others it knows of, for the console.
pub fn rows(db: &Database) -> Vec<PeerRow> {
    db.shards.iter().flat_map(|shard| shard.member.rows(&db.name, &shard.name)).collect()
}

/// Goes round the words, quickly until it has been round once.
async fn share_stamps(shard: Arc<Shard>) {
    let mut first = 0_u16;
    let mut been_round = false;
    loop {
        tokio::time::sleep(if been_round { STAMPS_EVERY } else { STAMPS_AT_FIRST }).await;
        if shard.member.take_stamps(first, inbound::STAMPS_MAX).await {
            first = first.wrapping_add(inbound::STAMPS_MAX);
            been_round |= first == 0;
        } else {
            been_round = false;
        }
    }
}

impl Fleet {
    /// Listens for the others. `port` 0 in `listen` and in `advertise` lets the system choose.
    pub async fn start(
        config: &PeersConfig,
        cancels: &Arc<CancelRegistry>,
        tasks: &mut JoinSet<()>,
    ) -> Result<Arc<Fleet>> {
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen for peers on {}", config.listen))?;
        let address = match &config.advertise {
            Some(address) => address.clone(),
            None => listener.local_addr()?.to_string(),
        };
        let fleet = Arc::new(Fleet {
            address,
            secret: config.secret.clone(),
            tls: Arc::new(PeerTls::new(config.tls.as_ref()).map_err(anyhow::Error::msg)?),
            mode: config.mode,
            lease: config.lease,
            // Not from 0: a token of an earlier life must not be taken for one of this.
            tokens: AtomicU64::new(u64::from(rand::random::<u32>()) << 32 | 1),
            links: Mutex::default(),
            members: Mutex::default(),
            databases: Mutex::default(),
            cancels: Arc::clone(cancels),
            leaving: AtomicBool::new(false),
            left: Notify::new(),
        });
        tasks.spawn(inbound::run(Arc::clone(&fleet), listener));
        Ok(fleet)
    }

    /// Keeps this process a member at `shard`, whose primary is `server`.
    pub fn take_part(self: &Arc<Self>, shard: &Arc<Shard>, server: Target, tasks: &mut JoinSet<()>) {
        self.members.lock().insert(shard.member.id, Arc::downgrade(shard));
        tasks.spawn(keeper::run(Arc::clone(self), Arc::clone(shard), server));
        // Where writes are seen before they are heard of, equal stamps would not mean that the same ones were seen.
        if self.mode == PeersMode::Leased {
            tasks.spawn(share_stamps(Arc::clone(shard)));
        }
    }

    /// Its catalogue is doubted when another proxy writes what may change it.
    pub fn enroll(&self, database: &Arc<Database>) {
        let mut databases = self.databases.lock();
        databases.retain(|known| known.strong_count() > 0);
        databases.push(Arc::downgrade(database));
    }

    /// Connections to others begin with these certificates from now on.
    pub fn renew_tls(&self, ends: Ends) {
        self.tls.renew(ends);
    }

    /// Before the process ends: the others need not wait for its lease.
    pub async fn leave(&self) {
        self.leaving.store(true, Relaxed);
        let here: Vec<Arc<Shard>> = self.members.lock().values().filter_map(Weak::upgrade).collect();
        for shard in &here {
            shard.member.poke();
        }
        let all_left = async {
            while here.iter().any(|shard| shard.member.standing() != Standing::Left) {
                self.left.notified().await;
            }
        };
        if tokio::time::timeout(LEAVE_MAX, all_left).await.is_err() {
            tracing::warn!("not every primary has heard that this proxy leaves; the others wait for its lease");
        }
    }

    /// A client's request to cancel what a session runs that is not of this process: a balancer may have sent it to any. Nobody
    /// says whether the key is his, and where there is no connection to another proxy it is forgotten.
    pub fn cancel_elsewhere(&self, process: i32, secret: &[u8]) {
        for link in self.links.lock().values() {
            link.send_if_idle(Message::Cancel { process, secret: secret.to_vec() });
        }
    }

    /// Every token is used for one write, or for one attachment.
    fn token(&self) -> u64 {
        self.tokens.fetch_add(1, Relaxed)
    }

    fn hearing(&self) -> Hearing {
        match self.mode {
            PeersMode::Leased => Hearing::Leased,
            PeersMode::Push => Hearing::Pushed,
        }
    }

    fn lease_us(&self) -> u64 {
        self.lease.as_micros() as u64
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    /// The connection to the process at `address`, opened if there is none or it has ended.
    fn link(&self, address: &str) -> Arc<Link> {
        let mut links = self.links.lock();
        links.retain(|_, link| !link.is_down());
        Arc::clone(
            links
                .entry(address.to_owned())
                .or_insert_with(|| Link::open(address.to_owned(), self.secret.clone(), Arc::clone(&self.tls))),
        )
    }

    /// A shard where this process takes part under the name `member`.
    fn shard_of(&self, member: u64) -> Option<Arc<Shard>> {
        self.members.lock().get(&member)?.upgrade()
    }

    /// Another proxy writes, or has written, what may have changed the schema.
    fn doubt_catalogs(&self, shard: &Arc<Shard>) {
        let here: Vec<Arc<Database>> = self.databases.lock().iter().filter_map(Weak::upgrade).collect();
        for db in here {
            if db.shards.iter().any(|other| Arc::ptr_eq(other, shard)) {
                db.doubt_catalog();
            }
        }
    }
}
