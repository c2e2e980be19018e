//! The map that this proxy works by: takes new ones over from the hub, and tells it when nothing works by an older one any more.
//!
//! Invariant: an epoch is acknowledged only after it is in force and every request that was planned by an older one has ended, but for
//! those to which no slot on its way matters. Whoever changes the owner of slots waits for that.
//! Non-goal: what becomes of requests that touch such slots ([`crate::front`] lets them wait).

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use weir_core::id::Epoch;
use weir_core::topology::Topology;
use weir_core::topology::follow::Shown;

use crate::app::Basis;
use crate::config::Config;
use crate::database::Database;
use crate::hub::{Hub, HubEvent, HubMap};
use crate::servers::Joining;

/// How often the hub hears that this proxy is there.
pub const HEARTBEAT: Duration = Duration::from_secs(2);
/// How often requests of older epochs are looked for: at first, and at most.
const LOOK: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(5);
/// Pause after the hub could not be told.
const AGAIN: Duration = Duration::from_millis(250);

/// Which epochs this proxy's requests may still be planned by.
#[derive(Debug)]
pub struct Maps {
    in_force: watch::Sender<Epoch>,
    /// All slots that are on their way now have been since this epoch, and so has a shard that enters.
    same_moves_since: AtomicU64,
    /// The hub shows an older map than the one in force, or another one under its number.
    hub_is_behind: AtomicBool,
}

impl Maps {
    pub fn new(epoch: Epoch) -> Self {
        Maps {
            in_force: watch::Sender::new(epoch),
            same_moves_since: AtomicU64::new(epoch.0),
            hub_is_behind: AtomicBool::new(false),
        }
    }

    /// Call after `new` is in force in place of `old`.
    pub fn note(&self, old: &Topology, new: &Topology) {
        let known = |id| old.moves.iter().any(|one| one.id == id);
        let enters = new.roster.is_anyone_entering() && !old.roster.is_anyone_entering();
        if enters || !new.moves.iter().all(|one| known(one.id)) {
            self.same_moves_since.store(new.epoch.0, Relaxed);
        }
        fence(SeqCst);
        self.in_force.send_replace(new.epoch);
    }

    /// Has the hub forgotten the map in force? Then this proxy works on by that one, and helps nobody to change maps: it neither drives
    /// moves nor says by which epoch it works.
    pub fn hub_is_behind(&self) -> bool {
        self.hub_is_behind.load(Relaxed)
    }

    /// Waits until another epoch than this one is in force. False: it took longer than `longest`.
    pub async fn left(&self, epoch: Epoch, longest: Duration) -> bool {
        let mut epochs = self.in_force.subscribe();
        // The sender lives as long as the database.
        timeout(longest, epochs.wait_for(|now| *now > epoch)).await.is_ok()
    }

    /// Waits until there is more than one shard.
    pub async fn several(&self, db: &Database) {
        // The sender lives as long as the database.
        let _ = self.in_force.subscribe().wait_for(|_| !db.view().topology.is_single()).await;
    }

    /// Below this epoch nothing is under way that minds the slots that move.
    fn safe(&self, db: &Database) -> Epoch {
        let in_force = db.view().topology.epoch;
        fence(SeqCst);
        let since = Epoch(self.same_moves_since.load(Relaxed));
        let used = db.stats.live();
        let used = used.iter().filter_map(|session| session.working_by());
        let minds = used.filter(|(epoch, minds)| *minds || *epoch < since).map(|(epoch, _)| epoch);
        minds.min().unwrap_or(in_force).min(in_force)
    }
}

/// This process among those that the hub knows.
pub fn proxy_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| format!("{:016x}", rand::random::<u64>()))
}

/// Follows the hub, for ever.
pub async fn run(hub: Hub, db: Arc<Database>, config: Arc<Config>, basis: Basis) {
    // Of several maps only the newest counts.
    let (newest, maps) = watch::channel(None);
    let told = hub.watch(db.config.clone(), db.view().topology.clone(), |event| match event {
        HubEvent::Changed(map) => {
            newest.send_replace(Some(map));
        }
        HubEvent::Read(shown, epoch) => note_shown(&db, shown, epoch),
        HubEvent::Lost(error) => {
            tracing::warn!(database = %db.name, "the hub is out of reach, the last map stays in force: {error}");
        }
    });
    let (news, heard) = watch::channel(None);
    let joining = Joining::new(&db, config, basis);
    tokio::join!(told, admit(&joining, maps, news), keep(&hub, &db, heard));
}

/// Said once each time.
fn note_shown(db: &Database, shown: Shown, epoch: Epoch) {
    let (behind, ours) = (shown.is_backward(), db.view().topology.epoch);
    if db.maps.hub_is_behind.swap(behind, Relaxed) == behind {
        return;
    }
    db.stats.database.hub_is_behind(behind);
    if behind {
        tracing::error!(
            database = %db.name, hub = %epoch, ours = %ours,
            "the hub shows an older map than the one in force, or another one under its number: it was restored, or promoted without its last \
             transactions. It is not followed, and no slots move, until its epoch is higher than ours: see \"The hub\" in docs/operator.md"
        );
    } else {
        tracing::info!(database = %db.name, hub = %epoch, "the hub's map is followed again");
    }
}

/// Brings up the shards of each map, then passes it on.
async fn admit(joining: &Joining, mut maps: watch::Receiver<Option<HubMap>>, news: watch::Sender<Option<Topology>>) {
    // The sender lives as long as this does.
    while maps.changed().await.is_ok() {
        let map = maps.borrow_and_update().clone();
        if let Some(map) = map
            && let Some(topology) = joining.admit(map).await
        {
            news.send_replace(Some(topology));
        }
    }
}

async fn keep(hub: &Hub, db: &Arc<Database>, mut heard: watch::Receiver<Option<Topology>>) {
    let (mut told, mut told_at, mut look) = (Epoch(0), None::<Instant>, LOOK);
    loop {
        let news = heard.borrow_and_update().clone();
        if let Some(topology) = news.filter(|topology| topology.epoch > db.view().topology.epoch) {
            tracing::info!(database = %db.name, epoch = %topology.epoch, "new topology");
            db.install_topology(topology);
            look = LOOK;
        }
        let safe = db.maps.safe(db);
        let silent = told_at.map_or(HEARTBEAT, |at| at.elapsed());
        let mut pause = HEARTBEAT.saturating_sub(silent);
        if db.maps.hub_is_behind() {
            pause = HEARTBEAT;
        } else if safe > told || pause.is_zero() {
            match hub.acknowledge(&db.name, proxy_id(), safe).await {
                Ok(()) => (told, told_at, pause) = (safe, Some(Instant::now()), HEARTBEAT),
                Err(error) => {
                    tracing::debug!(database = %db.name, "the hub could not be told of the epoch: {error}");
                    pause = AGAIN;
                }
            }
        }
        if told < db.view().topology.epoch && pause > look {
            (pause, look) = (look, (look * 2).min(LOOK_MAX));
        }
        // Both may be dropped while they wait.
        tokio::select! {
            _ = heard.changed() => {}
            () = sleep(pause) => {}
        }
    }
}
