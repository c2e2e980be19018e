//! The freshness checker: registers that are written and read through three proxies, with replicas and Redis, while everything
//! that can be disturbed is. No read may show less than was acknowledged, or than anybody had read, before it was asked.
//!
//! `make test` looks for some seconds. A long run prints its figures at the end:
//!
//! ```text
//! WEIR_CHECKER_READS=10000000 WEIR_CHECKER_SEED=7 cargo test -p weir-tests --test it -- --nocapture the_checker
//! ```
//!
//! Each register has one writer, so that its values only rise; the time of a read's question is that of the values it is checked
//! against. At the end all is still, and every register is compared through every proxy with its primary.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use weir_harness::{Proxy, Tier};

use crate::differential::Dice;
use crate::fleet::warm;
use crate::freshness::cache_figure;
use crate::placement::create_schema;

/// Reads that are checked unless more are asked for.
const READS: u64 = 3_000;
const REGISTERS: usize = 48;
const WRITERS: usize = 4;
const READERS: usize = 8;
const SHARDS: usize = 2;
/// Statements on one connection before another is opened.
const PER_CONNECTION: usize = 400;
/// One statement may wait for a dead proxy's lease, a server's start, and a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);
/// Never backwards, also when a server still works on what a dead proxy sent.
const WRITE: &str = "UPDATE users SET name = $1 WHERE user_id = $2 AND name::int8 < $3";
const READ: &str = "SELECT name FROM users WHERE user_id = $1";

struct Desk {
    tier: Tier,
    more: Vec<Proxy>,
    /// By register: the highest value that was acknowledged or read.
    told: Vec<AtomicI64>,
    /// The register that was written last.
    written: AtomicU64,
    writes: AtomicU64,
    failed: AtomicU64,
    reads: AtomicU64,
    /// Of those, how many began right after a write of the same register was acknowledged on another connection.
    right_after: AtomicU64,
    wanted: u64,
    closed: AtomicBool,
}

impl Desk {
    fn proxy(&self, number: usize) -> &Proxy {
        match number % (self.more.len() + 1) {
            0 => self.tier.proxy(),
            other => &self.more[other - 1],
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_checker_finds_nothing_stale_whatever_is_disturbed() -> Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    let (wanted, seed) = (number("WEIR_CHECKER_READS").unwrap_or(READS), number("WEIR_CHECKER_SEED").unwrap_or(fresh));
    eprintln!("checker: {wanted} reads, seed {seed}");
    let tier = Tier::builder().shards(SHARDS as u32).replicas(1).redis(true).peers(true).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for register in 0..REGISTERS as i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&register]).await?;
    }
    let more = vec![tier.another().await?, tier.another().await?];
    let desk = Arc::new(Desk {
        tier,
        more,
        told: (0..REGISTERS).map(|_| AtomicI64::new(0)).collect(),
        written: AtomicU64::new(0),
        writes: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        reads: AtomicU64::new(0),
        right_after: AtomicU64::new(0),
        wanted,
        closed: AtomicBool::new(false),
    });
    let begun = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        workers.spawn(keep_writing(Arc::clone(&desk), writer, Dice::new(seed ^ writer as u64)));
    }
    for reader in 0..READERS {
        workers.spawn(keep_reading(Arc::clone(&desk), reader, Dice::new(seed ^ (1000 + reader as u64))));
    }
    let disturbed = disturb(&desk, Dice::new(seed ^ 0x4d)).await;
    desk.closed.store(true, SeqCst);
    while let Some(ended) = workers.join_next().await {
        ended??;
    }
    let disturbances = disturbed?;
    compare_all(&desk).await?;
    let figure = |count: &AtomicU64| count.load(SeqCst);
    eprintln!(
        "checker: {} reads in {:?}, {} right after a write, {} writes, {} statements failed, {disturbances} disturbances",
        figure(&desk.reads),
        begun.elapsed(),
        figure(&desk.right_after),
        figure(&desk.writes),
        figure(&desk.failed)
    );
    let mut hits = 0;
    for proxy in [desk.tier.proxy()].into_iter().chain(&desk.more) {
        hits += cache_figure(proxy, "hits_memory").await? + cache_figure(proxy, "hits_redis").await?;
    }
    eprintln!("checker: {hits} hits of proxies since each was last started");
    ensure!(figure(&desk.right_after) * 20 >= figure(&desk.reads), "too few reads right after a write");
    Ok(())
}

/// A connection with its statement prepared; tries until there is one, or nobody wants it any more.
async fn open(desk: &Desk, proxy: usize, sql: &str) -> Option<(Client, Statement)> {
    while !desk.is_closed() {
        let opened = timeout(PATIENCE, async {
            let client = desk.proxy(proxy).connect().await?;
            let statement = client.prepare(sql).await?;
            anyhow::Ok((client, statement))
        });
        if let Ok(Ok(opened)) = opened.await {
            return Some(opened);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}

async fn keep_writing(desk: Arc<Desk>, writer: usize, mut dice: Dice) -> Result<()> {
    let mut next = vec![0_i64; REGISTERS];
    while let Some((client, write)) = open(&desk, dice.roll(97), WRITE).await {
        for _ in 0..PER_CONNECTION {
            let register = skewed(&mut dice) / WRITERS * WRITERS + writer;
            next[register] += 1;
            let value = next[register];
            let wrote =
                timeout(PATIENCE, client.execute(&write, &[&value.to_string(), &(register as i64), &value])).await;
            if !wrote.context("a write that never ends")?.is_ok_and(|rows| rows == 1) {
                desk.failed.fetch_add(1, SeqCst);
                break;
            }
            desk.told[register].fetch_max(value, SeqCst);
            desk.written.store(register as u64, SeqCst);
            desk.writes.fetch_add(1, SeqCst);
            // From none to some milliseconds, so that registers are at rest as well.
            tokio::time::sleep(Duration::from_millis(dice.roll(25) as u64)).await;
            if desk.is_closed() {
                return Ok(());
            }
        }
    }
    Ok(())
}

async fn keep_reading(desk: Arc<Desk>, reader: usize, mut dice: Dice) -> Result<()> {
    while let Some((client, read)) = open(&desk, reader + dice.roll(97), READ).await {
        for _ in 0..PER_CONNECTION {
            let right_after = dice.percent(20);
            let register = if right_after { desk.written.load(SeqCst) as usize } else { skewed(&mut dice) };
            let least = desk.told[register].load(SeqCst);
            let answer = timeout(PATIENCE, client.query_one(&read, &[&(register as i64)])).await;
            let Ok(row) = answer.context("a read that never ends")? else {
                desk.failed.fetch_add(1, SeqCst);
                break;
            };
            let value: i64 = row.get::<_, &str>(0).parse()?;
            ensure!(value >= least, "register {register}: {value} was read after {least} had been told");
            desk.told[register].fetch_max(value, SeqCst);
            desk.reads.fetch_add(1, SeqCst);
            desk.right_after.fetch_add(u64::from(right_after), SeqCst);
            if desk.is_closed() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Some registers far more often than others.
fn skewed(dice: &mut Dice) -> usize {
    let spread = 1 + dice.roll(REGISTERS);
    dice.roll(spread)
}

/// Until enough was read: one disturbance after the other, each at another place. Gives how many there were.
async fn disturb(desk: &Desk, mut dice: Dice) -> Result<u64> {
    let mut disturbances = 0;
    // At least one of each kind, in the order the dice give, however soon enough was read.
    let mut left: Vec<usize> = (0..KINDS).collect();
    while desk.reads.load(SeqCst) < desk.wanted || !left.is_empty() {
        tokio::time::sleep(Duration::from_millis(50 + dice.roll(300) as u64)).await;
        let kind = if left.is_empty() { dice.roll(KINDS) } else { left.swap_remove(dice.roll(left.len())) };
        let place = dice.roll(100);
        timeout(4 * PATIENCE, disturb_once(desk, kind, place)).await.context("a disturbance that never ends")??;
        disturbances += 1;
    }
    Ok(disturbances)
}

const KINDS: usize = 7;

async fn disturb_once(desk: &Desk, kind: usize, place: usize) -> Result<()> {
    let shard = &desk.tier.shards[place % SHARDS];
    let (replica, proxy) = (&shard.replicas[0], desk.proxy(place));
    let moment = || tokio::time::sleep(Duration::from_millis(300));
    match kind {
        0 => {
            replica.pause_replay().await?;
            moment().await;
            replica.resume_replay().await
        }
        1 => {
            replica.kill9();
            moment().await;
            replica.restart().await
        }
        2 => {
            let redis = desk.tier.redis.as_ref().context("redis")?;
            redis.kill9();
            moment().await;
            redis.restart().await
        }
        3 => {
            let redis = redis::Client::open(desk.tier.redis.as_ref().context("redis")?.url())?;
            let mut connection = redis.get_multiplexed_async_connection().await?;
            Ok(redis::cmd("FLUSHALL").query_async(&mut connection).await?)
        }
        4 => {
            proxy.kill_weir();
            moment().await;
            proxy.restart_weir().await
        }
        5 => {
            let pid = Pid::from_raw(proxy.weir_pid().context("it runs")?.cast_signed()).context("a pid")?;
            kill_process(pid, Signal::STOP)?;
            tokio::time::sleep(Duration::from_millis(1500)).await;
            Ok(kill_process(pid, Signal::CONT)?)
        }
        _ => {
            shard.primary.kill9();
            shard.primary.restart().await
        }
    }
}

/// Every register, through every proxy, is what its primary has.
async fn compare_all(desk: &Desk) -> Result<()> {
    let mut truth = vec![None; REGISTERS];
    for shard in &desk.tier.shards {
        for row in shard.primary.admin("shop").await?.query("SELECT user_id, name FROM users", &[]).await? {
            truth[row.get::<_, i64>(0) as usize] = Some(row.get::<_, String>(1));
        }
    }
    for number in 0..=desk.more.len() {
        let client = desk.proxy(number).connect().await?;
        // Whatever was done to it, it answers from its cache again.
        warm(desk.proxy(number), &client, 0).await.with_context(|| format!("proxy {number}"))?;
        let read = client.prepare(READ).await?;
        for (register, truth) in truth.iter().enumerate() {
            let name: String = client.query_one(&read, &[&(register as i64)]).await?.get(0);
            ensure!(Some(&name) == truth.as_ref(), "register {register} is {truth:?}, and proxy {number} says {name}");
            let told = desk.told[register].load(SeqCst);
            ensure!(name.parse::<i64>()? >= told, "register {register}: {told} was told and is lost");
        }
    }
    Ok(())
}
