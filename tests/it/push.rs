//! Several proxies that push: no write waits for another proxy, what a proxy has acknowledged it shows at once, and what others have
//! acknowledged within one lease, whatever dies or is cut off.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Proxy, Tier};

use crate::fleet::{Passing, Relay, name_of, warm};
use crate::freshness::{cache_figure, until};
use crate::placement::create_schema;

/// As the proxies of these tests have it, which is the default.
const LEASE: Duration = Duration::from_secs(1);

async fn tier_of_two() -> Result<(Tier, Proxy)> {
    let tier = Tier::builder().shards(1).peers_mode("push").start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    Ok((tier, other))
}

/// Two proxies of which the first tells the second by way of a relay.
async fn tier_with_relay() -> Result<(Tier, Proxy, Relay)> {
    let tier = Tier::builder().shards(1).peers_mode("push").start().await?;
    create_schema(&tier.connect().await?).await?;
    let listens = weir_harness::free_port()?;
    let relay = Relay::start(listens).await?;
    let other = tier.another_behind(Some((relay.port, listens))).await?;
    Ok((tier, other, relay))
}

async fn rename(client: &Client, user: i64, name: &str) -> Result<Duration> {
    let before = Instant::now();
    client.execute("UPDATE users SET name = $1 WHERE user_id = $2", &[&name, &user]).await?;
    Ok(before.elapsed())
}

/// Reads until `name` has been shown for as long as a lease and a half after `told`. Nothing else may be shown to a read that began
/// a lease after it. How old was the oldest answer, if any was?
async fn stale_for(client: &Client, user: i64, name: &str, told: Instant) -> Result<Option<Duration>> {
    let mut stale = None;
    while told.elapsed() < LEASE * 3 / 2 {
        let asked = told.elapsed();
        let found = name_of(client, user).await?;
        if found != name {
            anyhow::ensure!(asked < LEASE, "{found} was shown {asked:?} after {name} was acknowledged");
            stale = Some(asked);
        }
    }
    Ok(stale)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_write_waits_and_nothing_is_older_than_a_lease() -> Result<()> {
    let (tier, other, relay) = tier_with_relay().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann'), (2, 'Ben'), (3, 'Cid')", &[]).await?;
    let mut worst = None;
    for (round, passing) in [Passing::Held, Passing::Cut, Passing::Held, Passing::Cut].into_iter().enumerate() {
        for user in [1, 2, 3] {
            warm(&other, &there, user).await?;
            warm(tier.proxy(), &here, user).await?;
        }
        relay.does.send_replace(passing);
        let name = format!("Bea {round}");
        let took = rename(&here, 1, &name).await?.max(rename(&here, 2, &name).await?);
        let told = Instant::now();
        assert!(took < LEASE / 2, "{passing:?}: a write took {took:?}");
        assert_eq!(name_of(&here, 1).await?, name, "a proxy shows its own writes at once");
        worst = worst.max(stale_for(&there, 1, &name, told).await?);
        // It may not serve, so it cannot be told; it writes all the same, and shows that at once.
        assert!(rename(&there, 3, &name).await? < LEASE / 2);
        assert_eq!(name_of(&there, 3).await?, name);
        relay.does.send_replace(Passing::On);
        // Nobody had read the second one since; what was lost on its way must not come back with the connection.
        warm(&other, &there, 1).await?;
        assert_eq!(name_of(&there, 2).await?, name, "{passing:?}");
        assert_eq!(name_of(&here, 3).await?, name);
    }
    let worst = worst.context("the second proxy never used its cache while it was cut off: nothing was tried")?;
    println!("cut off: what another proxy had acknowledged was shown after at most {worst:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_seen_soon() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann'), (2, 'Ben')", &[]).await?;
    warm(&other, &there, 1).await?;
    warm(&other, &there, 2).await?;
    let mut delays = Vec::new();
    for round in 0..300_i64 {
        let name = format!("Ann {round}");
        let (writer, reader) = if round % 2 == 0 { (&here, &there) } else { (&there, &here) };
        rename(writer, 1, &name).await?;
        let told = Instant::now();
        let mut delay = Duration::ZERO;
        while name_of(reader, 1).await? != name {
            delay = told.elapsed();
            assert!(delay < LEASE, "{delay:?}");
        }
        delays.push(delay);
        assert_eq!(name_of(writer, 1).await?, name);
        assert_eq!(name_of(reader, 2).await?, "Ben");
    }
    delays.sort_unstable();
    let [half, most, all] = [delays.len() / 2, delays.len() * 99 / 100, delays.len() - 1].map(|at| delays[at]);
    println!("acknowledged to seen through the other proxy: p50 {half:?}, p99 {most:?}, max {all:?}");
    println!("{} hits in the second proxy's memory", cache_figure(&other, "hits_memory").await?);
    warm(&other, &there, 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_that_die_or_stand_still_hold_nobody_up() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await?;
    other.kill_weir();
    for round in 0..50 {
        let took = rename(&here, 1, &format!("Bea {round}")).await?;
        assert!(took < LEASE / 2, "{took:?}");
    }
    // Once nothing of the dead one can be under way, its silence means nothing any more.
    warm(tier.proxy(), &here, 1).await?;
    other.restart_weir().await?;
    let there = other.connect().await?;
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await?;

    let mut waiting = Vec::new();
    for _ in 0..20 {
        let client = other.connect().await?;
        let read = client.prepare("SELECT name FROM users WHERE user_id = 1").await?;
        client.query_one(&read, &[]).await?;
        waiting.push((client, read));
    }
    let pid = Pid::from_raw(other.weir_pid().context("it runs")?.cast_signed()).context("a pid")?;
    kill_process(pid, Signal::STOP)?;
    let took = rename(&here, 1, "Cid").await?;
    let told = Instant::now();
    // It stands still for longer than a lease, with the old name in its cache; these reads are the first it finds.
    while told.elapsed() < LEASE + LEASE / 10 {
        tokio::time::sleep(LEASE / 10).await;
    }
    let asked: Vec<_> = waiting
        .into_iter()
        .map(|(client, read)| {
            tokio::spawn(async move { anyhow::Ok(client.query_one(&read, &[]).await?.get::<_, String>(0)) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    kill_process(pid, Signal::CONT)?;
    assert!(took < LEASE / 2, "{took:?}");
    for answer in asked {
        assert_eq!(answer.await??, "Cid");
    }
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await?;
    rename(&there, 1, "Dan").await?;
    let told = Instant::now();
    stale_for(&here, 1, "Dan", told).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_schema_is_waited_for() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    crate::fleet::new_triggers_are_known(&tier, &other, false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn all_proxies_of_a_tier_have_one_mode() -> Result<()> {
    let (tier, _other) = tier_of_two().await?;
    let refused = tier.another_in_mode("leased").await.map(|_| ()).map_err(|error| format!("{error:#}"));
    let error = refused.expect_err("it must not start");
    assert!(error.contains("[peers] mode is leased here and push at 127.0.0.1:"), "{error}");
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    until(async || {
        let rows = console.simple_query("SHOW PEERS").await?;
        let rows = rows.iter().filter_map(|row| match row {
            SimpleQueryMessage::Row(row) => Some((row.get("state")?.to_owned(), row.get("mode")?.to_owned())),
            _ => None,
        });
        let rows: Vec<(String, String)> = rows.collect();
        assert!(rows.len() <= 2 && rows.iter().all(|(_, mode)| mode == "push"), "{rows:?}");
        Ok(rows.iter().map(|(state, _)| state.as_str()).collect::<Vec<_>>() == ["serving", "told"])
    })
    .await
}

/// A register and when its values were acknowledged.
struct Register {
    user: i64,
    told: Mutex<BTreeMap<Instant, i64>>,
    /// The highest that each proxy has acknowledged.
    own: [AtomicI64; 3],
}

impl Register {
    /// What a read through a proxy must show now: the proxy's own writes, and others' of a lease ago.
    fn least(&self, proxy: usize) -> i64 {
        let own = self.own[proxy].load(Ordering::SeqCst);
        let told = self.told.lock();
        let Some(before) = Instant::now().checked_sub(LEASE) else { return own };
        told.range(..before).next_back().map_or(own, |(_, value)| own.max(*value))
    }
}

async fn keep_writing(proxies: &[&Proxy], register: &Register, stop: &AtomicBool) -> Result<()> {
    let (mut turn, mut value) = (0, 0);
    while !stop.load(Ordering::SeqCst) {
        turn += 1;
        let proxy = turn % proxies.len();
        let Ok(client) = proxies[proxy].connect().await else { continue };
        for _ in 0..20 {
            value += 1;
            // Never backwards, also when a server still works on what a dead proxy sent.
            let write = "UPDATE users SET name = $1 WHERE user_id = $2 AND name::int8 < $3";
            if client.execute(write, &[&value.to_string(), &register.user, &value]).await.is_err() {
                break;
            }
            register.told.lock().insert(Instant::now(), value);
            register.own[proxy].fetch_max(value, Ordering::SeqCst);
            // Not so often that nobody keeps it.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

async fn keep_reading(proxies: &[&Proxy], at: usize, register: &Register, stop: &AtomicBool) -> Result<u64> {
    let mut reads = 0;
    while !stop.load(Ordering::SeqCst) {
        let Ok(client) = proxies[at].connect().await else { continue };
        loop {
            let least = register.least(at);
            let Ok(name) = name_of(&client, register.user).await else { break };
            let value: i64 = name.parse()?;
            anyhow::ensure!(value >= least, "user {}: proxy {at} showed {value}, not {least}", register.user);
            reads += 1;
            if stop.load(Ordering::SeqCst) || reads % 500 == 0 {
                break;
            }
        }
    }
    Ok(reads)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_are_never_older_than_a_lease_while_proxies_die() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).peers_mode("push").start().await?;
    create_schema(&tier.connect().await?).await?;
    let (second, third) = (tier.another().await?, tier.another().await?);
    let proxies = [tier.proxy(), &second, &third];
    let client = tier.connect().await?;
    let registers: Vec<Register> =
        (1..=3).map(|user| Register { user, told: Mutex::default(), own: [const { AtomicI64::new(0) }; 3] }).collect();
    for register in &registers {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&register.user]).await?;
    }
    let stop = AtomicBool::new(false);
    let disturb = async {
        for round in 0..4 {
            // The others need about three leases until they use their caches again.
            tokio::time::sleep(LEASE * 4).await;
            let victim = proxies[round % 3];
            victim.kill_weir();
            tokio::time::sleep(Duration::from_millis(300)).await;
            victim.restart_weir().await?;
        }
        tokio::time::sleep(LEASE * 4).await;
        stop.store(true, Ordering::SeqCst);
        anyhow::Ok(())
    };
    let writers = futures_util::future::try_join_all(registers.iter().map(|one| keep_writing(&proxies, one, &stop)));
    let places = registers.iter().flat_map(|one| (0..3).map(move |at| (one, at)));
    let readers = futures_util::future::try_join_all(places.map(|(one, at)| keep_reading(&proxies, at, one, &stop)));
    let ((), _, reads) = tokio::try_join!(disturb, writers, readers)?;
    let reads: u64 = reads.iter().sum();
    assert!(reads > 100, "{reads} reads");
    // Nothing old is left anywhere.
    let beside = tier.shards[0].primary.admin("shop").await?;
    for register in &registers {
        let truth = name_of(&beside, register.user).await?;
        for proxy in proxies {
            let client = proxy.connect().await?;
            warm(proxy, &client, register.user).await?;
            assert_eq!(name_of(&client, register.user).await?, truth);
        }
    }
    Ok(())
}
