//! Transfers over three shards while weir and the primaries are killed (-9) at random moments: money is conserved, what was
//! acknowledged is there, and nothing stays in doubt.
//!
//! `make test` kills a few times. A long run prints its figures at the end:
//!
//! ```text
//! WEIR_LEDGER_KILLS=1000 WEIR_LEDGER_SEED=7 cargo test -p weir-tests --test it -- --nocapture ledger
//! ```
//!
//! Each round: transfers run, somebody is killed a moment after one of them was acknowledged and is started again; then the
//! workers pause, and the books are read on the primaries themselves. Non-goal: reads through weir meanwhile
//! (`freshness.rs`).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use tokio::sync::RwLock;
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::differential::Dice;
use crate::placement::column;

const KILLS: u64 = 8;
const SHARDS: u32 = 3;
const ACCOUNTS: i64 = 24;
const WORKERS: u64 = 5;
const START: i64 = 1000;
/// Nothing may be in doubt for longer, once everything runs again: 5 s, and some for machines that do much else.
const DOUBT_MAX: Duration = Duration::from_secs(15);
/// No transfer may take longer, whoever is killed.
const TRANSFER_WAIT: Duration = Duration::from_secs(60);

/// What the workers share with the one who kills.
#[derive(Default)]
struct Desk {
    /// Held for reading by everybody who transfers.
    open: RwLock<()>,
    acknowledged: Mutex<Vec<String>>,
    count: AtomicU64,
    failed: AtomicU64,
    closed: AtomicBool,
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_balances_whoever_is_killed() -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let (kills, seed) = (number("WEIR_LEDGER_KILLS").unwrap_or(KILLS), number("WEIR_LEDGER_SEED").unwrap_or(fresh));
    eprintln!("ledger: {kills} kills, seed {seed}");
    let tier = Tier::builder().shards(SHARDS).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, cents bigint NOT NULL)").await?;
    client.batch_execute("CREATE TABLE payments (user_id bigint, id text, PRIMARY KEY (user_id, id))").await?;
    for account in 1..=ACCOUNTS {
        client.execute("INSERT INTO users VALUES ($1, $2)", &[&account, &START]).await?;
    }
    let desk = Arc::new(Desk::default());
    let workers: Vec<_> =
        (0..WORKERS).map(|worker| tokio::spawn(work(tier.dsn("shop"), Arc::clone(&desk), seed ^ worker))).collect();
    let mut dice = Dice::new(seed);
    let (mut killed, mut doubt) = ([0_u32; SHARDS as usize + 1], Duration::ZERO);
    let ran = async {
        for kill in 0..kills {
            let victim = dice.pick(&[0, 0, 0, 1, 2, 3]);
            one_kill(&tier, &desk, victim, &mut dice).await.with_context(|| format!("kill {kill} of {victim}"))?;
            killed[victim] += 1;
            let settled = books(&tier, &desk).await.with_context(|| format!("after kill {kill} of {victim}"))?;
            doubt = doubt.max(settled);
            if (kill + 1) % 50 == 0 {
                let acknowledged = desk.count.load(SeqCst);
                eprintln!("{} kills ({killed:?}), {acknowledged} transfers, in doubt for at most {doubt:?}", kill + 1);
            }
        }
        anyhow::Ok(())
    };
    let ran = ran.await;
    desk.closed.store(true, SeqCst);
    for worker in workers {
        worker.await??;
    }
    eprintln!(
        "weir was killed {} times, the primaries {:?} times; {} transfers acknowledged, {} failed; in doubt for at most {doubt:?}; \
         money conserved: {}",
        killed[0],
        &killed[1..],
        desk.count.load(SeqCst),
        desk.failed.load(SeqCst),
        ran.is_ok()
    );
    ran
}

/// Kills weir (0) or a primary (1, 2, …) a moment after the next few acknowledgements, and starts it again.
async fn one_kill(tier: &Tier, desk: &Desk, victim: usize, dice: &mut Dice) -> Result<()> {
    let wanted = desk.count.load(SeqCst) + 1 + dice.roll(30) as u64;
    let begun = Instant::now();
    while desk.count.load(SeqCst) < wanted {
        ensure!(begun.elapsed() < TRANSFER_WAIT, "transfers stand still");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // A commit takes some milliseconds: any of its steps may be under way.
    tokio::time::sleep(Duration::from_micros(dice.roll(8000) as u64)).await;
    if victim == 0 {
        tier.kill_weir();
        return tier.restart_weir().await;
    }
    let primary = &tier.shards[victim - 1].primary;
    primary.kill9();
    primary.restart().await
}

/// Stops the transfers and reads the books on the primaries. Gives how long something was in doubt.
async fn books(tier: &Tier, desk: &Desk) -> Result<Duration> {
    let closed = tokio::time::timeout(TRANSFER_WAIT, desk.open.write()).await.context("a transfer hangs")?;
    let begun = Instant::now();
    let mut primaries = Vec::new();
    for shard in &tier.shards {
        primaries.push(shard.primary.admin("shop").await?);
    }
    for primary in &primaries {
        while column(primary, "SELECT count(*) FROM pg_prepared_xacts").await? != ["0"] {
            ensure!(begun.elapsed() < DOUBT_MAX, "a transaction is still in doubt");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let settled = begun.elapsed();
    let (mut money, mut accounts, mut paid) = (0, 0, HashSet::new());
    for primary in &primaries {
        let sums = column(primary, "SELECT coalesce(sum(cents), 0) FROM users").await?;
        money += sums[0].parse::<i64>()?;
        accounts += column(primary, "SELECT count(*) FROM users").await?[0].parse::<i64>()?;
        paid.extend(column(primary, "SELECT id FROM payments").await?);
    }
    ensure!(accounts == ACCOUNTS && money == ACCOUNTS * START, "{accounts} accounts hold {money}");
    // What has been looked at once is not looked at again.
    let lost: Vec<String> = desk.acknowledged.lock().drain(..).filter(|id| !paid.contains(id)).collect();
    ensure!(lost.is_empty(), "acknowledged, but gone: {lost:?}");
    drop(closed);
    Ok(settled)
}

/// Transfers until the desk closes, over a new connection whenever the old one broke.
async fn work(dsn: String, desk: Arc<Desk>, seed: u64) -> Result<()> {
    let mut dice = Dice::new(seed.wrapping_mul(0x9e37_79b9));
    let mut client: Option<Client> = None;
    let mut number = 0_u64;
    while !desk.closed.load(SeqCst) {
        let _open = desk.open.read().await;
        let Some(connected) = &mut client else {
            client = weir_harness::connect(&dsn).await.ok();
            if client.is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            continue;
        };
        number += 1;
        let id = format!("{seed:x}-{number}");
        let keys = (1 + dice.roll(ACCOUNTS as usize) as i64, 1 + dice.roll(ACCOUNTS as usize) as i64);
        let cents = 1 + dice.roll(50) as i64;
        let moved = tokio::time::timeout(TRANSFER_WAIT, transfer(connected, keys, cents, &id)).await;
        match moved.context("a transfer hangs")? {
            Ok(()) => {
                desk.acknowledged.lock().push(id);
                desk.count.fetch_add(1, SeqCst);
            }
            Err(_) => {
                desk.failed.fetch_add(1, SeqCst);
                if connected.is_closed() {
                    client = None;
                }
            }
        }
    }
    Ok(())
}

/// Moves money between two accounts and says so in a third row, mostly on several shards.
async fn transfer(
    client: &mut Client,
    (from, to): (i64, i64),
    cents: i64,
    id: &str,
) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // In key order, so that workers do not wait for each other in a circle.
    for (key, by) in if from < to { [(from, -cents), (to, cents)] } else { [(to, cents), (from, -cents)] } {
        transaction.execute("UPDATE users SET cents = cents + $2 WHERE user_id = $1", &[&key, &by]).await?;
    }
    transaction.execute("INSERT INTO payments VALUES ($1, $2)", &[&from, &id]).await?;
    transaction.commit().await
}
