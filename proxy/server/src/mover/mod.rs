//! The mover: takes slots from one shard to another while clients go on.
//!
//! Invariant: what is true of a move lies in the hub (its phase) and on its two servers (guards, fences, slots, progress); this process
//! keeps nothing that cannot be found again. Of all proxies one drives the moves of a database, by a lock on the hub; when it dies another
//! one goes on from the phase. Every phase may be begun again. The owner of slots changes in one transaction of the hub, made on the
//! connection that holds the lock.
//! Non-goals: what statements do meanwhile ([`crate::front`]), and which slots ought to move (`weir_core::reshard`).

mod apply;
mod census;
mod clear;
mod copy;
mod cutover;
mod guard;
mod index;
mod join;
mod mend;
mod reach;
mod sql;
mod throttle;
mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use weir_core::id::Epoch;
use weir_core::reshard::phase::{Aim, Phase, next};
use weir_core::reshard::script::{MovedTable, Script};
use weir_core::topology::{KeySet, TableRules};

use self::apply::Follower;
use self::census::{Census, SETTLED_MAX};
use self::cutover::{BACK, THERE};
use self::index::Indexes;
use self::join::Joiner;
use self::reach::Reach;
use self::throttle::Meter;
use crate::app::App;
use crate::config::ReshardConfig;
use crate::database::{Database, Shard};
use crate::hub::moves::{Driving, MoveProgress, MoveRow};
use crate::hub::{Hub, HubError};

/// How often moves are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often a move looks what is wanted of it.
const ORDERS: Duration = Duration::from_millis(200);
/// Pause after a failure; it doubles up to the longest.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(10);
/// While nobody writes what it would read, the slot of the way back must not keep WAL.
const ADVANCE_EVERY: Duration = Duration::from_secs(20);

/// A move, its two servers and its tables.
#[derive(Clone)]
struct Pair {
    id: i32,
    keys: KeySet,
    script: Script,
    tables: Vec<MovedTable>,
    source: Reach,
    target: Reach,
    /// Of source and target: how far their replicas are.
    shards: [Arc<Shard>; 2],
    /// Tables as they are declared.
    rules: Arc<TableRules>,
    config: ReshardConfig,
}

/// One move and what drives it.
struct Mover {
    driving: Arc<Driving>,
    pair: Pair,
    progress: MoveProgress,
    noted: Instant,
    /// What is applied now, from whichever side owns the slots.
    follower: Option<Follower>,
    /// When the slot of the way back was last moved on.
    advanced: Instant,
    census: Census,
    indexes: Indexes,
    meter: Meter,
    /// Changes of owner that were tried in vain, one after the other.
    vain: u32,
}

/// Drives the moves of a database whenever nobody else does, for ever.
pub async fn run(app: Arc<App>, hub: Hub, db: Arc<Database>) {
    loop {
        // Where statements wait for a mover that is gone, it is not waited for longer than need be.
        let pause = if db.view().topology.moves.givers().next().is_some() { ORDERS } else { LOOK };
        let _ordered = timeout(pause, db.moves.ordered.notified()).await;
        if is_idle(&hub, &db).await {
            continue;
        }
        match in_line(&hub, &db).await {
            Ok(Some(driving)) => {
                if let Err(error) = drive(&app, &db, Arc::new(driving)).await {
                    tracing::warn!(database = %db.name, "the mover has lost the hub: {error:#}");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(database = %db.name, "the mover cannot ask the hub: {error}"),
        }
    }
}

/// Looks what moves there are.
async fn is_idle(hub: &Hub, db: &Database) -> bool {
    let Ok(moves) = hub.moves(&db.name, true).await else { return true };
    let all_over = moves.iter().all(|one| one.phase.is_final());
    *db.moves.rows.lock() = moves;
    // A hub that has forgotten something would have it done again, and perhaps otherwise.
    all_over || db.maps.hub_is_behind()
}

/// Waits in line to drive them, and shows meanwhile how far another one is.
async fn in_line(hub: &Hub, db: &Database) -> Result<Option<Driving>, HubError> {
    let view = db.view_arc();
    let got = hub.drive(&db.name, &view.topology.shards[usize::from(view.topology.home.0)]);
    tokio::pin!(got);
    loop {
        // The line is kept from turn to turn, and a pause may be dropped.
        tokio::select! {
            got = &mut got => return got,
            () = sleep(LOOK) => {}
        }
        if is_idle(hub, db).await {
            return Ok(None);
        }
    }
}

/// Until there are no moves, or the hub is lost.
async fn drive(app: &Arc<App>, db: &Arc<Database>, driving: Arc<Driving>) -> Result<()> {
    let mut running: HashMap<i32, AbortHandle> = HashMap::new();
    // Dropped with this future, and all of them with it.
    let mut tasks = JoinSet::new();
    loop {
        let mut moves = driving.moves().await?;
        db.moves.rows.lock().clone_from(&moves);
        moves.retain(|one| !one.phase.is_final());
        running.retain(|_, task| !task.is_finished());
        if moves.is_empty() && running.is_empty() {
            return Ok(());
        }
        // One copies at a time: two would share the same servers. Indexes of a new shard wait for all copies.
        let rests = |phase: Phase| phase.rests() || matches!(phase, Phase::Queued | Phase::Index);
        let mut is_free = moves.iter().all(|one| rests(one.phase));
        for one in moves {
            if running.contains_key(&one.id) || one.phase == Phase::Queued && !is_free && one.aim != Aim::Cancelled {
                continue;
            }
            is_free &= one.phase != Phase::Queued;
            let (app, db, driving) = (Arc::clone(app), Arc::clone(db), Arc::clone(&driving));
            let id = one.id;
            running.insert(id, tasks.spawn(async move { attend(&app, &db, driving, id).await }));
        }
        // What waits in line for one that is over begins soon.
        tokio::select! {
            _over = tasks.join_next(), if !tasks.is_empty() => sleep(ORDERS).await,
            () = db.moves.ordered.notified() => {}
            () = sleep(LOOK) => {}
        }
    }
}

/// One move, to its end; failures are noted and it begins again.
async fn attend(app: &Arc<App>, db: &Arc<Database>, driving: Arc<Driving>, id: i32) {
    let mut pause = AGAIN / 2;
    loop {
        let begun = Instant::now();
        let error = match attempt(app, db, &driving, id).await {
            Ok(()) => return,
            Err(error) => format!("{error:#}"),
        };
        tracing::warn!(database = %db.name, move_id = id, "the move is interrupted: {error}");
        if driving.note_error(id, &error).await.is_err() {
            return;
        }
        pause = if begun.elapsed() > AGAIN_MAX { AGAIN } else { (pause * 2).min(AGAIN_MAX) };
        // Statements must not wait for that.
        let is_awaited = driving.move_now(id).await.is_ok_and(|row| row.phase.is_awaited());
        sleep(if is_awaited { ORDERS } else { pause }).await;
    }
}

async fn attempt(app: &Arc<App>, db: &Arc<Database>, driving: &Arc<Driving>, id: i32) -> Result<()> {
    let row = driving.move_now(id).await?;
    if row.phase == Phase::Queued && row.aim != Aim::Cancelled {
        let hub = db.hub.as_ref().context("there is no hub")?;
        if let Some(unique) = &db.unique {
            unique.rests().await?;
        }
        Joiner { app, db, hub, driving, shard: &row.to }.join().await.context("the new shard")?;
    }
    let pair = Pair::of(app, db, (driving, &row)).await?;
    let progress = row.progress;
    let mut mover = Mover {
        driving: Arc::clone(driving),
        pair,
        progress,
        noted: Instant::now(),
        follower: None,
        advanced: Instant::now(),
        census: Census::default(),
        indexes: Indexes::Unknown,
        meter: Meter::default(),
        vain: 0,
    };
    mover.mend().await?;
    mover.go().await
}

impl Pair {
    async fn of(app: &App, db: &Database, (driving, row): (&Arc<Driving>, &MoveRow)) -> Result<Pair> {
        let config = app.config();
        let known = |name: &str| {
            let shard = db.shards.iter().find(|shard| *shard.name == *name);
            shard.cloned().ok_or_else(|| anyhow!("shard {name} is not known here"))
        };
        let shards = [known(&row.from)?, known(&row.to)?];
        let logins = shards.each_ref().map(|shard| crate::app::primary_login(&config, &db.config, &shard.roles));
        let [source, target] = Reach::new(driving, &row.id.to_string(), logins);
        source.be_alone().await.context("the source")?;
        target.be_alone().await.context("the target")?;
        let rules = Arc::clone(&db.view().rules);
        let client = source.open().await.context("the source")?;
        let tables = sql::tables(&client, &rules, &row.keys).await.context("the tables of the source")?;
        let script = Script::new(row.id, &row.keys);
        let (id, keys) = (row.id, row.keys.clone());
        Ok(Pair { id, keys, script, tables, source, target, shards, rules, config: config.reshard })
    }
}

impl Mover {
    /// From whatever phase it is in to where it is to rest for good.
    async fn go(&mut self) -> Result<()> {
        loop {
            let row = self.driving.move_now(self.pair.id).await?;
            if row.phase.is_final() {
                return Ok(());
            }
            if let Some(next) = next(row.phase, row.aim) {
                self.turn(&row, next).await?;
                continue;
            }
            if self.lets_go(&row).await? {
                continue;
            }
            if row.paused {
                self.follower = None;
                sleep(ORDERS).await;
                continue;
            }
            self.work(&row).await?;
        }
    }

    /// An order leads to another phase.
    async fn turn(&mut self, row: &MoveRow, next: Phase) -> Result<()> {
        match next {
            Phase::Cutover => return self.hand_over(row, &THERE).await,
            Phase::Cutback => return self.hand_over(row, &BACK).await,
            Phase::ClearTarget | Phase::ClearSource => {
                self.follower = None;
                self.indexes = Indexes::Unknown;
            }
            // It may have been the one with which the target has joined.
            Phase::Cancelled => {
                if let Err(error) = self.pair.make_indexes().await {
                    tracing::warn!(move_id = self.pair.id, "indexes of the target cannot be made: {error:#}");
                }
            }
            _ => {}
        }
        self.driving.step(row, next, None).await?;
        Ok(())
    }

    async fn work(&mut self, row: &MoveRow) -> Result<()> {
        match row.phase {
            Phase::Queued => {
                self.driving.step(row, Phase::Prepare, None).await?;
            }
            Phase::Prepare => self.prepare(row).await?,
            Phase::Copy => {
                self.follower = self.copy(row).await?;
                if self.follower.is_some() {
                    // Whatever was said last: this is how much it was.
                    self.driving.note(self.pair.id, &self.progress).await?;
                    self.driving.step(row, Phase::Catchup, None).await?;
                }
            }
            Phase::Catchup => {
                if !self.is_held(row).await? && self.follow(Side::Source).await? {
                    self.driving.step(row, Phase::Index, None).await?;
                }
            }
            Phase::Index => {
                if self.index(row).await? {
                    self.driving.step(row, Phase::Verify, None).await?;
                }
            }
            Phase::Verify => {
                self.verify().await?;
                guard::way_back(&self.pair).await?;
                guard::advance_way_back(&self.pair).await?;
                self.driving.step(row, Phase::Ready, None).await?;
            }
            Phase::Ready => {
                self.follow(Side::Source).await?;
                if self.advanced.elapsed() >= ADVANCE_EVERY {
                    guard::advance_way_back(&self.pair).await?;
                    self.advanced = Instant::now();
                }
            }
            // Begun by somebody who is gone.
            Phase::Cutover => self.take_back(row, &THERE).await?,
            Phase::Reverse => {
                self.follow(Side::Target).await?;
            }
            Phase::Forward => sleep(ORDERS).await,
            Phase::Cutback => self.take_back(row, &BACK).await?,
            Phase::ClearTarget => self.clear(row, Side::Target).await?,
            Phase::ClearSource => self.clear(row, Side::Source).await?,
            Phase::Done | Phase::Cancelled | Phase::RolledBack => {}
        }
        Ok(())
    }

    async fn prepare(&mut self, row: &MoveRow) -> Result<()> {
        self.driving.forget_proxies().await?;
        let epoch = self.driving.epoch().await?;
        let behind = self.settled(epoch, SETTLED_MAX).await?;
        if !behind.is_empty() {
            return Err(anyhow!("waits for proxies that still work by an older map: {}", behind.join(", ")));
        }
        guard::prepare(&self.pair, Side::Source).await?;
        // One of them may have been closed by a change of owner that came to nothing.
        self.reopen(Side::Source).await?;
        self.driving.step(row, Phase::Copy, None).await?;
        Ok(())
    }

    /// Applies what comes from the side that owns the slots, until it is time to look for orders. True: it is in step.
    async fn follow(&mut self, owner: Side) -> Result<bool> {
        if self.follower.is_none() {
            // What the other one would be read from is not needed any more: it would keep WAL.
            if owner == Side::Target {
                sql::drop_slot(&sql::plain(&self.pair.source).await?, &self.pair.script.name()).await?;
            }
            // Somebody may have been about to hand over, and nobody knows how far he was.
            self.close(owner.other()).await?;
            self.follower = Some(Follower::open(&self.pair, owner).await?);
        }
        let Some(follower) = &mut self.follower else { return Ok(false) };
        let in_step = follower.follow_for(ORDERS).await?;
        self.progress.lag_bytes = follower.lag_bytes().await?;
        self.progress.changes += follower.take_changes();
        self.note().await?;
        Ok(in_step)
    }

    /// Says how far it is, once a second at most.
    async fn note(&mut self) -> Result<()> {
        if self.noted.elapsed() >= LOOK {
            self.driving.note(self.pair.id, &self.progress).await?;
            self.noted = Instant::now();
        }
        Ok(())
    }

    /// Waits until no proxy works by an older epoch. Those that still do after `longest`.
    async fn settled(&mut self, epoch: Epoch, longest: Duration) -> Result<Vec<String>> {
        let servers = self.pair.servers();
        self.census.settled((&self.driving, servers), epoch, longest).await
    }

    /// The same where statements wait for it.
    async fn settled_soon(&mut self, epoch: Epoch, longest: Duration) -> Result<Vec<String>> {
        let servers = self.pair.servers();
        self.census.settled_soon((&self.driving, servers), epoch, longest).await
    }
}

/// One of the two servers of a move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Source,
    Target,
}

impl Pair {
    fn at(&self, side: Side) -> &Reach {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    fn servers(&self) -> [&Reach; 2] {
        [&self.source, &self.target]
    }
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Source => Side::Target,
            Side::Target => Side::Source,
        }
    }
}
