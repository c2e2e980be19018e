//! What the slots of one database cost its servers, as this process sees it; and what all proxies together have measured, through the hub.
//!
//! Invariant: counting costs a statement one addition to a number that is its slot's alone, and no clock but the one that is read anyway.
//! Only statements that a server has answered count, and only those that one key sends somewhere: what the cache answers costs no
//! server, and what goes to several shards, or to a shard that a key was isolated on, moves with no slot. A statement of several keys of one shard is charged to the first.
//! Every proxy writes its rates into a row of the hub about twice a minute while there are any; losing a row loses advice, not traffic.
//! Non-goals: rates themselves (`weir_core::reshard::load`), and what follows from them (`weir_core::reshard::balance`).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::time::sleep;
use weir_core::fresh::Dependency;
use weir_core::id::{ShardId, Slot};
use weir_core::plan::{Plan, RouteReason};
use weir_core::reshard::load::{Cost, Decayed, SlotLoad};
use weir_core::topology::SlotMap;

use crate::database::Database;
use crate::hub::Hub;

/// How often counts become rates.
const FOLD: Duration = Duration::from_secs(10);
/// How many times that until the hub is told.
const TELL: u32 = 3;
/// Bits of a count that are microseconds; those above are statements. Ten seconds of both fit many times over.
const TIME_BITS: u32 = 40;

/// Counts and rates of one database. Without statements that are routed by key it takes no room.
#[derive(Debug, Default)]
pub struct SlotCounts {
    counts: OnceLock<Box<[AtomicU64]>>,
    /// The map, if it isolates keys: those move with no slot, so they are not charged to theirs.
    isolating: ArcSwapOption<SlotMap>,
    rates: Mutex<Rates>,
}

#[derive(Debug, Default)]
struct Rates {
    decayed: Decayed,
    folded: Option<Instant>,
}

impl SlotCounts {
    /// A statement of this slot has been answered.
    pub fn count(&self, slot: Slot, time_us: u64) {
        let counts = self.counts.get_or_init(|| Slot::all().map(|_| AtomicU64::new(0)).collect());
        counts[slot.index()].fetch_add(1 << TIME_BITS | time_us.min((1 << TIME_BITS) - 1), Relaxed);
    }

    /// A map is in force.
    pub fn follow(&self, slots: &SlotMap) {
        self.isolating.store((!slots.isolated().is_empty()).then(|| Arc::new(slots.clone())));
    }

    /// The slot that a statement is charged to.
    pub fn charged(&self, plan: &Plan) -> Option<Slot> {
        let (slot, owner) = charged(plan)?;
        let is_own = self.isolating.load().as_ref().is_none_or(|map| map.owner(slot) == owner);
        is_own.then_some(slot)
    }

    /// What each slot costs per second, by what this process has seen until `now`.
    pub fn rates(&self, now: Instant) -> SlotLoad {
        let mut rates = self.rates.lock();
        let seconds = rates.folded.map_or(FOLD, |folded| now.saturating_duration_since(folded)).as_secs_f64();
        let counts = self.counts.get().map(|counts| &**counts).unwrap_or_default();
        let counted = Slot::all().zip(counts).filter_map(|(slot, count)| {
            let counted = count.swap(0, Relaxed);
            let cost = || Cost {
                statements: (counted >> TIME_BITS) as f64,
                time_us: (counted & ((1 << TIME_BITS) - 1)) as f64,
            };
            (counted > 0).then(|| (slot, cost()))
        });
        rates.decayed.pass(seconds, counted);
        rates.folded = Some(now);
        rates.decayed.rates()
    }
}

/// The slot of a statement's first key, where one shard has all of them, and that shard.
fn charged(plan: &Plan) -> Option<(Slot, ShardId)> {
    match &plan.reason {
        RouteReason::Key { slot, shard, .. } => Some((*slot, *shard)),
        RouteReason::KeysTogether { shard, .. } => plan.writes.iter().chain(&plan.reads).find_map(|one| match one {
            Dependency::Key(_, key) => Some((Slot::of_hash(key.0), *shard)),
            _ => None,
        }),
        _ => None,
    }
}

/// Folds counts into rates and tells the hub, for ever.
pub async fn run(hub: Hub, db: Arc<Database>) {
    let (mut round, mut told) = (0, false);
    loop {
        sleep(FOLD).await;
        let rates = db.stats.load.rates(Instant::now());
        round += 1;
        let is_any = rates.used().next().is_some();
        if round % TELL != 0 || !is_any && !told {
            continue;
        }
        match hub.tell_load(&db.name, crate::map::proxy_id(), &rates).await {
            Ok(()) => told = is_any,
            Err(error) => tracing::debug!(database = %db.name, "the hub could not be told of the load: {error}"),
        }
    }
}
