//! What clients see while a server below weir, or weir itself, goes away and comes back.
//!
//! Invariant of every test: an answer is right or it is an error of class 08 or 57; nothing waits without a bound, and a
//! moment that matters is observed, never slept for. Non-goals: kills of weir itself (`transactions.rs`), Redis
//! (`freshness.rs`), failover to another server.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use weir_harness::Tier;

use crate::checker::disturbance::signal;
use crate::freshness::{cache_figure, replica_reads};
use crate::placement::{column, create_schema};

/// For anything that is to happen by itself.
const WAIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
const KEYS: i64 = 20;
const WRITE: &str = "UPDATE users SET name = $2 WHERE user_id = $1";
const READ: &str = "SELECT name FROM users WHERE user_id = $1";

/// Asks until it is so.
async fn until(what: &str, mut so: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + WAIT;
    while !so().await? {
        ensure!(Instant::now() < deadline, "{what}: not within {} s", WAIT.as_secs());
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

async fn filled(tier: &Tier) -> Result<Client> {
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 0..KEYS {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&key]).await?;
    }
    Ok(client)
}

/// How an error counts: by its SQLSTATE, or as a connection that was cut.
fn code(error: &tokio_postgres::Error) -> String {
    error.code().map_or_else(|| format!("no SQLSTATE: {error}"), |state| state.code().to_owned())
}

fn is_outage(error: &tokio_postgres::Error) -> bool {
    error.is_closed()
        || ["08", "57"].iter().any(|class| error.code().is_some_and(|state| state.code().starts_with(class)))
}

/// One writer and two readers of the same rows. Each row holds a number that only grows.
struct Traffic {
    stop: Arc<AtomicBool>,
    /// Statements answered well.
    answered: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<Result<()>>>,
}

/// What is known of a row: a reader that began after `acknowledged` or `shown` was raised must not see less, and nobody
/// sees more than was tried.
#[derive(Default)]
struct Known {
    acknowledged: AtomicI64,
    shown: AtomicI64,
    tried: AtomicI64,
}

impl Traffic {
    /// `outages`: whether a statement may fail in class 08 or 57 (the client then connects again).
    fn start(tier: &Tier, outages: bool) -> Self {
        let rows: Arc<Vec<Known>> = Arc::new((0..KEYS).map(|_| Known::default()).collect());
        let mut traffic = Self { stop: Arc::default(), answered: Arc::default(), tasks: Vec::new() };
        for number in 0..3 {
            let (stop, answered) = (Arc::clone(&traffic.stop), Arc::clone(&traffic.answered));
            let (rows, dsn) = (Arc::clone(&rows), tier.dsn("shop"));
            traffic.tasks.push(tokio::spawn(async move {
                let mut client = weir_harness::connect(&dsn).await?;
                let mut round = number;
                while !stop.load(SeqCst) {
                    round += 1;
                    let key = round % KEYS;
                    let row = &rows[usize::try_from(key)?];
                    let asked =
                        if number == 0 { write(&client, row, key, round).await } else { read(&client, row, key).await };
                    match asked {
                        Ok(()) => {
                            answered.fetch_add(1, SeqCst);
                        }
                        Err(error) => {
                            let outage = error.downcast_ref::<tokio_postgres::Error>().is_some_and(is_outage);
                            ensure!(outages && outage, "key {key}: {error:#}, {:?}", error.downcast_ref().map(code));
                            if client.is_closed() {
                                client = again(&dsn, &stop).await?;
                            }
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Ok(())
            }));
        }
        traffic
    }

    /// Waits until `more` further statements were answered well; fails at once when one was wrong.
    async fn goes_on(&self, more: u64, when: &str) -> Result<()> {
        let goal = self.answered.load(SeqCst) + more;
        until(&format!("traffic {when}"), async || {
            ensure!(self.tasks.iter().all(|task| !task.is_finished()), "traffic ended {when}");
            Ok(self.answered.load(SeqCst) >= goal)
        })
        .await
    }

    /// Ends it; what was wrong is the error. The first error counts, so this is also asked when a wait has failed.
    async fn end(self, so_far: Result<()>) -> Result<()> {
        self.stop.store(true, SeqCst);
        for task in self.tasks {
            task.await??;
        }
        so_far
    }
}

/// A new connection, as soon as there can be one.
async fn again(dsn: &str, stop: &AtomicBool) -> Result<Client> {
    let deadline = Instant::now() + WAIT;
    loop {
        match weir_harness::connect(dsn).await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline || stop.load(SeqCst) => return Err(error),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

async fn write(client: &Client, row: &Known, key: i64, value: i64) -> Result<()> {
    row.tried.store(value, SeqCst);
    client.execute(WRITE, &[&key, &value.to_string()]).await?;
    row.acknowledged.store(value, SeqCst);
    Ok(())
}

async fn read(client: &Client, row: &Known, key: i64) -> Result<()> {
    let least = row.acknowledged.load(SeqCst).max(row.shown.load(SeqCst));
    let shown: i64 = client.query_one(READ, &[&key]).await?.get::<_, String>(0).parse()?;
    let most = row.tried.load(SeqCst);
    ensure!((least..=most).contains(&shown), "read {shown}, which is not within {least} to {most}");
    row.shown.fetch_max(shown, SeqCst);
    Ok(())
}

/// All slots have a shard, says the console.
async fn all_slots_shown(tier: &Tier) -> Result<bool> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let mut slots = 0;
    for message in console.simple_query("SHOW SLOTS").await? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            slots += row.get(3).context("the number of slots")?.parse::<u32>()?;
        }
    }
    Ok(slots == 4096)
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_go_on_without_the_hub() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let traffic = Traffic::start(&tier, false);
    let course = async {
        traffic.goes_on(200, "before").await?;
        for round in 1..=2 {
            tier.hub.kill9();
            let said = || tier.weir_log().matches("the hub is out of reach").count();
            until("weir sees that the hub is gone", async || Ok(said() >= round)).await?;
            traffic.goes_on(500, "without the hub").await?;
            ensure!(tier.http_get("/readyz").await?.0 == 200, "not ready without the hub");
            ensure!(all_slots_shown(&tier).await?, "slots without the hub");
            let newcomer = tier.connect().await?;
            ensure!(column(&newcomer, "SELECT count(*) FROM users").await? == [KEYS.to_string()]);
            tier.hub.restart().await?;
            traffic.goes_on(500, "with the hub back").await?;
            ensure!(tier.http_get("/readyz").await?.0 == 200, "not ready with the hub back");
            ensure!(all_slots_shown(&tier).await?, "slots with the hub back");
        }
        Ok(())
    };
    let so_far = course.await;
    traffic.end(so_far).await
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_go_on_right_when_replicas_die_and_return() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).config_extra("[cache]\nenabled = false").start().await?;
    filled(&tier).await?;
    let traffic = Traffic::start(&tier, false);
    let course = async {
        until("replicas take part", async || Ok(replica_reads(&tier).await? > 20)).await?;
        tier.shards[0].replicas[0].kill9();
        traffic.goes_on(500, "without one replica").await?;
        tier.shards[1].replicas[0].kill9();
        traffic.goes_on(500, "without any replica").await?;
        ensure!(tier.http_get("/readyz").await?.0 == 200, "not ready without replicas");
        for shard in &tier.shards {
            shard.replicas[0].restart().await?;
            shard.replicas[0].wait_streaming().await?;
        }
        let before = replica_reads(&tier).await?;
        until("replicas take part again", async || Ok(replica_reads(&tier).await? > before + 20)).await
    };
    let so_far = course.await;
    traffic.end(so_far).await
}

/// A client whose connection's own end can be asked for its SQLSTATE.
async fn watched(tier: &Tier) -> Result<(Client, JoinHandle<Result<(), tokio_postgres::Error>>)> {
    let (client, connection) = tokio_postgres::connect(&tier.dsn("shop"), NoTls).await?;
    Ok((client, tokio::spawn(connection)))
}

/// A primary may be back before weir asks it anything, without the commits that its crash has lost.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_cached_before_a_crash_comes_after_it() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    filled(&tier).await?;
    let primary = &tier.shards[0].primary;
    let hits = async || cache_figure(tier.proxy(), "hits_memory").await;
    for round in 1..=3 {
        let before = hits().await?;
        // A connection of its own: the one before may have been told of the crash.
        until("an answer from the cache", async || match tier.connect().await?.query_one(READ, &[&1_i64]).await {
            Err(error) if !is_outage(&error) => Err(error.into()),
            _ => Ok(hits().await? > before),
        })
        .await?;
        let client = tier.connect().await?;
        let before = hits().await?;
        // weir hears of the end when all is over: whoever looks who is the primary finds the same server again.
        signal(tier.weir_pid(), Signal::STOP)?;
        primary.restart().await?;
        signal(tier.weir_pid(), Signal::CONT)?;
        // The end was there before this question, and weir has a turn to hear of it. Waiting until it says so would let a slow one pass.
        tokio::time::sleep(POLL).await;
        let read = client.query_one(READ, &[&1_i64]).await;
        ensure!(read.as_ref().err().is_none_or(is_outage), "{read:?}");
        ensure!(hits().await? == before, "in round {round} the cache has answered from an earlier life of the primary");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_primary_breaks_what_ran_there_and_nothing_else() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = filled(&tier).await?;
    let direct = tier.shards[1].primary.admin("shop").await?;
    let key: i64 = column(&direct, "SELECT min(user_id) FROM users").await?[0].parse()?;
    let elsewhere: i64 =
        column(&tier.shards[0].primary.admin("shop").await?, "SELECT min(user_id) FROM users").await?[0].parse()?;

    let (idle, idle_end) = watched(&tier).await?;
    idle.batch_execute(&format!("BEGIN; UPDATE users SET name = 'lost' WHERE user_id = {key}")).await?;
    let (busy, _busy_end) = watched(&tier).await?;
    let other_shard = tier.connect().await?;
    other_shard.batch_execute(&format!("BEGIN; UPDATE users SET name = '1' WHERE user_id = {elsewhere}")).await?;
    // It waits for the row that `idle` has changed, so it is under way until the server goes.
    let running = tokio::spawn(async move { busy.execute(WRITE, &[&key, &"lost too"]).await });
    until("a statement waits", async || {
        Ok(column(&direct, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'").await? == ["1"])
    })
    .await?;
    tier.shards[1].primary.restart().await?;

    let error =
        tokio::time::timeout(WAIT, running).await.context("the running statement hangs")??.expect_err("cut off");
    ensure!(error.code().is_some() && is_outage(&error), "the running statement: {}", code(&error));
    let end = tokio::time::timeout(WAIT, idle_end).await.context("the idle transaction is not told")??;
    let error = end.expect_err("the transaction is lost");
    ensure!(error.code().is_some() && is_outage(&error), "the idle transaction: {}", code(&error));
    other_shard.batch_execute("COMMIT").await.context("a transaction on the other shard")?;

    until("writes work again", async || {
        let client = tier.connect().await?;
        match client.execute(WRITE, &[&key, &"2"]).await {
            Ok(rows) => Ok(rows == 1),
            Err(error) => {
                ensure!(error.code().is_some() && is_outage(&error), "meanwhile: {}", code(&error));
                Ok(false)
            }
        }
    })
    .await?;
    let names = "SELECT name FROM users WHERE user_id = ";
    let fresh = tier.connect().await?;
    ensure!(column(&fresh, &format!("{names}{key}")).await? == ["2"], "what was written after the restart");
    ensure!(column(&fresh, &format!("{names}{elsewhere}")).await? == ["1"], "what the other shard committed");
    // The first client has held nothing while the server was away: it does not notice, or sees one error.
    let survived = column(&client, &format!("{names}{key}")).await;
    ensure!(survived.is_err() || survived? == ["2"], "a stale read");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_is_stale_while_primaries_restart() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    filled(&tier).await?;
    let traffic = Traffic::start(&tier, true);
    let course = async {
        traffic.goes_on(300, "before").await?;
        for shard in [1, 0] {
            tier.shards[shard].primary.restart().await?;
            traffic.goes_on(500, "after a restart").await?;
            tier.shards[shard].primary.kill9();
            tier.shards[shard].primary.restart().await?;
            traffic.goes_on(500, "after a kill").await?;
        }
        // Statements wait for a server that is soon back, so none need have failed.
        let noticed = tier.weir_log().matches("clock: lost the primary").count();
        ensure!(noticed >= 4, "of four restarts {noticed} were noticed");
        Ok(())
    };
    let so_far = course.await;
    traffic.end(so_far).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_statements_finish_and_nobody_in() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = filled(&tier).await?;
    let mut holders = Vec::new();
    for shard in &tier.shards {
        let holder = shard.primary.admin("shop").await?;
        holder.batch_execute("BEGIN; SELECT FROM users WHERE user_id = 1 FOR UPDATE").await?;
        holders.push(holder);
    }
    let running = tokio::spawn(async move { client.execute(WRITE, &[&1_i64, &"finished"]).await });
    until("the statement waits", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        let mut count = 0;
        for holder in &holders {
            count += column(holder, waiting).await?[0].parse::<u32>()?;
        }
        Ok(count == 1)
    })
    .await?;

    let pid = tier.weir_pid().context("weir runs")?;
    ensure!(Command::new("kill").args(["-TERM", &pid.to_string()]).status()?.success(), "kill");
    until("nobody is let in", async || match weir_harness::connect(&tier.dsn("shop")).await {
        Ok(_) => Ok(false),
        Err(error) => {
            let refusal = error.downcast_ref::<tokio_postgres::Error>().and_then(|error| error.code().cloned());
            ensure!(
                refusal.is_none_or(|state| state == SqlState::CANNOT_CONNECT_NOW || state == SqlState::ADMIN_SHUTDOWN),
                "{error:#}"
            );
            Ok(true)
        }
    })
    .await?;
    ensure!(!running.is_finished(), "the statement was cut off: {:?}", running.await?);
    for holder in &holders {
        holder.batch_execute("COMMIT").await?;
    }
    let rows = tokio::time::timeout(WAIT, running).await.context("the statement hangs")??;
    ensure!(rows.context("the statement")? == 1);
    until("weir ends", async || Ok(tier.http_get("/livez").await.is_err())).await?;
    tier.restart_weir().await?;
    if column(&tier.connect().await?, "SELECT name FROM users WHERE user_id = 1").await? != ["finished"] {
        bail!("what was acknowledged is lost");
    }
    Ok(())
}
