//! Money is moved about while slots are, and proxies die: none is lost and none is made.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use weir_harness::Tier;

use super::{SLOTS, nothing_is_left, order, reaches};
use crate::differential::Dice;
use crate::placement::column;

const ACCOUNTS: i64 = 400;
const BALANCE: i64 = 1000;
const CLIENTS: u64 = 8;
/// A transaction that meets a change of owner may be told to begin again, as one that meets another may.
const AGAIN: [&str; 3] = ["40001", "40P01", "55P03"];

#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    singles: AtomicU64,
    transfers: AtomicU64,
    again: AtomicU64,
    /// The longest that a single statement has taken, in microseconds.
    slowest_us: AtomicU64,
}

/// Adds to accounts of its own, a statement each, and looks what they have; and moves money between accounts of all.
async fn client(tier_dsn: String, number: u64, tally: Arc<Tally>) -> Result<i64> {
    let mut dice = Dice::new(number);
    let mut connection = weir_harness::connect(&tier_dsn).await?;
    let own: Vec<i64> = (1..=ACCOUNTS).filter(|id| id % CLIENTS as i64 == number as i64).collect();
    let mut added = vec![0_i64; own.len()];
    while !tally.stop.load(Relaxed) {
        let which = dice.roll(own.len());
        let account = own[which];
        let begun = Instant::now();
        connection
            .execute("UPDATE ledger SET added = added + 1 WHERE user_id = $1", &[&account])
            .await
            .context("a single statement")?;
        added[which] += 1;
        let seen: i64 = connection
            .query_one("SELECT added FROM ledger WHERE user_id = $1", &[&account])
            .await
            .context("a single read")?
            .get(0);
        ensure!(seen == added[which], "account {account} has {seen} of {}", added[which]);
        tally.slowest_us.fetch_max(begun.elapsed().as_micros() as u64, Relaxed);
        tally.singles.fetch_add(2, Relaxed);
        let mut any = || dice.roll(ACCOUNTS as usize) as i64 + 1;
        let (from, to) = (any(), any());
        if from != to {
            let isolation = dice.pick(&["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]);
            match transfer(&mut connection, (from, to), isolation).await {
                Ok(()) => tally.transfers.fetch_add(1, Relaxed),
                Err(error) => {
                    let code = error.code().map(tokio_postgres::error::SqlState::code).unwrap_or_default().to_owned();
                    // A transaction of one snapshot stays on one shard.
                    ensure!(AGAIN.contains(&code.as_str()) || code == "0A000", "a transfer failed: {error:?}");
                    tally.again.fetch_add(1, Relaxed)
                }
            };
        }
    }
    Ok(added.iter().sum())
}

async fn transfer(client: &mut Client, (from, to): (i64, i64), isolation: &str) -> Result<(), tokio_postgres::Error> {
    let done = async {
        client.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).await?;
        // In the order of the numbers, so that two transfers do not wait for each other.
        for account in [from.min(to), from.max(to)] {
            let amount = if account == from { -1_i64 } else { 1 };
            client.execute("UPDATE ledger SET balance = balance + $2 WHERE user_id = $1", &[&account, &amount]).await?;
        }
        client.batch_execute("COMMIT").await
    };
    let done = done.await;
    if done.is_err() {
        client.batch_execute("ROLLBACK").await?;
    }
    done
}

async fn ledger(tier: &Tier) -> Result<()> {
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE ledger (user_id bigint PRIMARY KEY, balance bigint NOT NULL, added bigint NOT NULL DEFAULT 0)").await?;
    let sql = "INSERT INTO ledger (user_id, balance) SELECT n, $2::int8 FROM generate_series(1, $1::int8) n";
    client.execute(sql, &[&ACCOUNTS, &BALANCE]).await?;
    Ok(())
}

/// Sums as the shards have them, each row once.
async fn sums(tier: &Tier) -> Result<(i64, i64, i64)> {
    let mut all = (0, 0, 0);
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let sql = "SELECT count(*), coalesce(sum(balance), 0)::int8, coalesce(sum(added), 0)::int8 FROM ledger";
        let row = direct.query_one(sql, &[]).await?;
        all = (all.0 + row.get::<_, i64>(0), all.1 + row.get::<_, i64>(1), all.2 + row.get::<_, i64>(2));
    }
    Ok(all)
}

const TABLE: &str =
    "[[database.shop.table]]\nname = \"ledger\"\nkind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\"";

/// Clients of these proxies, which work until they are told to stop.
struct Market {
    tally: Arc<Tally>,
    clients: Vec<tokio::task::JoinHandle<Result<i64>>>,
}

impl Market {
    fn open(dsns: &[String]) -> Market {
        let tally = Arc::new(Tally::default());
        let client = |number: u64| {
            let dsn = dsns[number as usize % dsns.len()].clone();
            tokio::spawn(client(dsn, number, Arc::clone(&tally)))
        };
        let clients = (0..CLIENTS).map(client).collect();
        Market { tally, clients }
    }

    /// What they have added.
    async fn close(self) -> Result<i64> {
        self.tally.stop.store(true, Relaxed);
        let mut added = 0;
        for client in self.clients {
            added += client.await??;
        }
        let [singles, transfers, again] =
            [&self.tally.singles, &self.tally.transfers, &self.tally.again].map(|count| count.load(Relaxed));
        let slowest_ms = self.tally.slowest_us.load(Relaxed) / 1000;
        println!(
            "{singles} single statements, the slowest pair took {slowest_ms} ms; {transfers} transfers, {again} begun again"
        );
        Ok(added)
    }
}

/// Every account is on one shard, and all there is adds up.
async fn balances(tier: &Tier, added: i64) -> Result<()> {
    // Two-phase commits end a moment after they are told.
    crate::freshness::until(async || {
        let mut prepared = Vec::new();
        for shard in &tier.shards {
            prepared.extend(column(&shard.primary.admin("shop").await?, "SELECT gid FROM pg_prepared_xacts").await?);
        }
        Ok(prepared.is_empty())
    })
    .await?;
    assert_eq!(sums(tier).await?, (ACCOUNTS, ACCOUNTS * BALANCE, added));
    nothing_is_left(tier).await
}

/// The slots go to this shard, and the way back is open.
async fn there(console: &Client, to: &str) -> Result<()> {
    order(console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO {to}")).await?;
    order(console, "RESHARD CUTOVER").await?;
    let row = reaches(console, "reverse").await?;
    println!("there: {:?} us", row.get("pause_us"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

/// One account gets to the other shard than it is on, and the way back is open.
async fn isolated(console: &Client) -> Result<()> {
    let isolate = |shard: &str| format!("RESHARD START ISOLATE KEY 7 TYPE bigint TO {shard}");
    if let Err(error) = order(console, &isolate("shard0")).await {
        // It is there already.
        let code = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::code);
        ensure!(code.is_some_and(|code| code.code() == "22023"), "{error:?}");
        order(console, &isolate("shard1")).await?;
    }
    order(console, "RESHARD CUTOVER").await?;
    let row = reaches(console, "reverse").await?;
    println!("isolated: {:?} us", row.get("pause_us"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

async fn back(console: &Client) -> Result<()> {
    order(console, "RESHARD ROLLBACK").await?;
    let row = reaches(console, "rolled_back").await?;
    println!("back: {:?} us", row.get("pause_us"));
    Ok(())
}

async fn stay(console: &Client) -> Result<()> {
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn money_is_conserved_while_slots_move_there_and_back() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).config_extra(TABLE).start().await?;
    let other = tier.another().await?;
    ledger(&tier).await?;
    let market = Market::open(&[tier.dsn("shop"), other.dsn("shop")]);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let moving = async {
        there(&console, "shard1").await?;
        back(&console).await?;
        there(&console, "shard1").await?;
        stay(&console).await?;
        isolated(&console).await?;
        back(&console).await?;
        isolated(&console).await?;
        stay(&console).await
    };
    let moved = moving.await;
    let added = market.close().await;
    moved?;
    balances(&tier, added?).await
}

/// The proxies that may drive the move are killed one after the other; clients and orders come through one that lives.
/// `WEIR_MOVING_SEED`, and `WEIR_MOVING_ROUNDS` for a longer run.
#[tokio::test(flavor = "multi_thread")]
async fn money_is_conserved_while_movers_are_killed() -> Result<()> {
    let given = |name| std::env::var(name).ok().and_then(|number| number.parse().ok());
    let (seed, rounds) = (given("WEIR_MOVING_SEED").unwrap_or(1), given("WEIR_MOVING_ROUNDS").unwrap_or(1));
    let tier = Tier::builder().shards(2).peers(true).config_extra(TABLE).start().await?;
    let (lives, dies) = (tier.another().await?, tier.another().await?);
    ledger(&tier).await?;
    let market = Market::open(&[lives.dsn("shop")]);
    let console = weir_harness::connect(&lives.admin_dsn()).await?;
    let over = AtomicBool::new(false);
    let killing = async {
        let (mut dice, mut kills) = (Dice::new(seed), 0);
        while !over.load(Relaxed) {
            let victim = if kills % 2 == 0 { tier.proxy() } else { &dies };
            tokio::time::sleep(Duration::from_millis(dice.roll(2500) as u64)).await;
            victim.kill_weir();
            tokio::time::sleep(Duration::from_millis(dice.roll(500) as u64)).await;
            victim.restart_weir().await?;
            kills += 1;
        }
        anyhow::Ok(kills)
    };
    let moving = async {
        let moved = async {
            let (mut dice, mut to) = (Dice::new(!seed), ["shard1", "shard0"]);
            for _ in 0..rounds {
                there(&console, to[0]).await?;
                if dice.percent(50) {
                    back(&console).await?;
                } else {
                    stay(&console).await?;
                    to.swap(0, 1);
                }
            }
            anyhow::Ok(())
        };
        let moved = moved.await;
        over.store(true, Relaxed);
        moved
    };
    let (kills, moved) = tokio::join!(killing, moving);
    println!("{} kills", kills?);
    let added = market.close().await;
    moved.with_context(|| format!("seed {seed}; the log of who lives:\n{}", lives.weir_log()))?;
    balances(&tier, added.with_context(|| format!("seed {seed}"))?).await
}
