//! A replica is promoted under traffic: everything goes to it, nothing to the primary that it has replaced, and no read shows less than
//! what is in force.
//!
//! Reading order: under load, one proxy and two → what was lost → a primary that comes back to life → several shards.
//! Non-goals: who promotes, and the hub's failover.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Proxy, Replica, Tier, connect};

use crate::engine::{HARD, rows};
use crate::fleet::{Register, keep_reading, keep_writing, name_of, warm};
use crate::placement::{column, create_schema};

const WAIT: Duration = Duration::from_secs(30);
const READ: &str = "SELECT name FROM users WHERE user_id = 1";

/// How one server stands, as SHOW REPLICAS says it.
pub async fn shown(proxy: &Proxy, address: &str, column: &str) -> Result<String> {
    let console = connect(&proxy.admin_dsn()).await?;
    for message in console.simple_query("SHOW REPLICAS").await? {
        if let SimpleQueryMessage::Row(row) = message
            && row.get("address") == Some(address)
        {
            return Ok(row.get(column).unwrap_or_default().to_owned());
        }
    }
    anyhow::bail!("{address} is not shown")
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    while !holds().await? {
        ensure!(start.elapsed() < WAIT, "not within {WAIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(start.elapsed())
}

pub async fn until_role(proxy: &Proxy, address: &str, role: &str) -> Result<Duration> {
    let is_so = async || Ok(shown(proxy, address, "role").await? == role && shown(proxy, address, "up").await? == "t");
    until(&format!("{address} is {role}\n{}", proxy.weir_log()), is_so).await
}

/// Writes until one is acknowledged; each attempt on a connection of its own.
async fn until_written(proxy: &Proxy, name: &str) -> Result<Duration> {
    let sql = format!("UPDATE users SET name = '{name}' WHERE user_id = 1");
    let wrote = async || {
        let Ok(client) = proxy.connect().await else { return Ok(false) };
        Ok(client.execute(&sql, &[]).await.is_ok())
    };
    until("a write", wrote).await
}

/// A commit is acknowledged when both replicas have it.
const SYNCHRONOUS: &str = "ALTER SYSTEM SET synchronous_standby_names = 'ANY 2 (*)'";

/// The replica that has received most and the other one, which can follow it. The primary must be gone.
async fn heir_and_other(replicas: &[Replica]) -> Result<(&Replica, &Replica)> {
    let mut received = Vec::new();
    for replica in &replicas[..2] {
        let sql = "SELECT (pg_last_wal_receive_lsn() - '0/0'::pg_lsn)::bigint";
        received.push(column(&replica.admin("postgres").await?, sql).await?[0].parse::<i64>()?);
    }
    let heir = usize::from(received[1] > received[0]);
    Ok((&replicas[heir], &replicas[1 - heir]))
}

/// Gives the promoted one.
async fn registers_survive<'a>(tier: &'a Tier, proxies: &[&Proxy]) -> Result<&'a Replica> {
    let shard = &tier.shards[0];
    let primary = &shard.primary;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    let registers: Vec<Register> = (1..=3).map(|user| Register { user, told: AtomicI64::new(0) }).collect();
    for register in &registers {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&register.user]).await?;
    }
    let admin = primary.admin("postgres").await?;
    admin.batch_execute(SYNCHRONOUS).await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    until_role(tier.proxy(), &shard.replicas[0].address(), "replica").await?;
    let stop = AtomicBool::new(false);
    let told = || registers.iter().map(|register| register.told.load(Ordering::SeqCst)).sum::<i64>();
    let goes_on = async |when: &str| {
        let before = told();
        until(&format!("traffic {when}"), async || Ok(told() > before + 100)).await
    };
    let course = async {
        goes_on("before").await?;
        primary.kill9();
        let killed = Instant::now();
        let (heir, other) = heir_and_other(&shard.replicas).await?;
        heir.promote().await?;
        let promoted = Instant::now();
        let before = told();
        until("writes after the promotion", async || Ok(told() > before + 3)).await?;
        println!("promotion took {:?}, and writes worked again {:?} later", promoted - killed, promoted.elapsed());
        other.follow(heir).await?;
        goes_on("after").await?;
        for proxy in proxies {
            until_role(proxy, &heir.address(), "primary").await?;
            until_role(proxy, &other.address(), "replica").await?;
        }
        primary.rejoin(heir).await?;
        goes_on("with the old primary as a replica").await?;
        for proxy in proxies {
            until_role(proxy, &primary.address(), "replica").await?;
        }
        let reads = async || anyhow::Ok(shown(tier.proxy(), &primary.address(), "reads").await?.parse::<i64>()?);
        let before = reads().await?;
        until("reads from the old primary", async || Ok(reads().await? > before)).await?;
        anyhow::Ok(heir)
    };
    let course = async {
        let ended = course.await;
        stop.store(true, Ordering::SeqCst);
        ended
    };
    let writers = futures_util::future::try_join_all(registers.iter().map(|one| keep_writing(proxies, one, &stop)));
    let readers = futures_util::future::try_join_all(
        registers.iter().flat_map(|one| proxies.iter().map(|proxy| keep_reading(proxy, one, &stop))),
    );
    let (heir, _, reads) = tokio::try_join!(course, writers, readers)?;
    println!("{} reads, {} writes", reads.iter().sum::<u64>(), told());
    let truth = heir.admin("shop").await?;
    for register in &registers {
        let held = name_of(&truth, register.user).await?.parse::<i64>()?;
        ensure!(held >= register.told.load(Ordering::SeqCst), "user {}: {held} is left", register.user);
        for proxy in proxies {
            let client = proxy.connect().await?;
            warm(proxy, &client, register.user).await?;
            assert_eq!(name_of(&client, register.user).await?, held.to_string());
        }
    }
    Ok(heir)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_and_fresh_reads_go_on_at_the_promoted_replica() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(2).start().await?;
    let heir = registers_survive(&tier, &[tier.proxy()]).await?.address();
    let metrics = tier.http_get("/metrics").await?.1;
    let figure = |name: &str, label: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name) && line.contains(label));
        line.and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
    };
    assert_eq!(figure("weir_server_primary", &heir).as_deref(), Some("1"));
    assert_eq!(figure("weir_server_primary", &tier.shards[0].primary.address()).as_deref(), Some("0"));
    assert_eq!(figure("weir_promotions_total", "shard0").as_deref(), Some("1"));
    // One that starts now finds it by itself.
    tier.restart_weir().await?;
    until_role(tier.proxy(), &heir, "primary").await?;
    until_written(tier.proxy(), "1000000").await?;
    let console = connect(&tier.admin_dsn()).await?;
    for (show, name) in [("SHOW SHARDS", "primary"), ("SHOW DATABASES", "port")] {
        let messages = console.simple_query(show).await?;
        let shown = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) if row.get("name") != Some("weir") => row.get(name).map(str::to_owned),
            _ => None,
        });
        ensure!(shown.as_ref().is_some_and(|shown| heir.ends_with(shown)), "{show}: {shown:?}, not {heir}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_proxies_follow_a_promotion() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(2).peers(true).start().await?;
    let other = tier.another().await?;
    registers_survive(&tier, &[tier.proxy(), &other]).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_promotion_has_lost_is_not_served() -> Result<()> {
    lost_is_lost("").await
}

/// Where an overtaken answer may be served, one that was never true is none.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_promotion_has_lost_is_not_served_as_an_overtaken_answer_either() -> Result<()> {
    lost_is_lost(
        "[[database.shop.table]]\nname = 'users'\nkind = 'sharded'\nkey = 'user_id'\ntype = 'bigint'\n\
         cache = { stale_while_revalidate = '10m' }",
    )
    .await
}

async fn lost_is_lost(config: &str) -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(2).config_extra(config).start().await?;
    let shard = &tier.shards[0];
    let (heir, other) = (&shard.replicas[0], &shard.replicas[1]);
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.execute("INSERT INTO users (user_id, name) VALUES (1, 'kept')", &[]).await?;
    heir.catch_up().await?;
    let admin = heir.admin("postgres").await?;
    admin.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    until("the heir receives nothing", async || {
        Ok(column(&admin, "SELECT count(*) FROM pg_stat_wal_receiver").await? == ["0"])
    })
    .await?;
    client.execute("UPDATE users SET name = 'lost' WHERE user_id = 1", &[]).await?;
    // The other replica has it, and so has the cache.
    other.catch_up().await?;
    warm(tier.proxy(), &client, 1).await?;
    assert_eq!(name_of(&client, 1).await?, "lost");
    shard.primary.kill9();
    heir.promote().await?;
    let mut readers = Vec::new();
    for _ in 0..3 {
        readers.push(tier.connect().await?);
    }
    for round in 0..300 {
        let reader = &readers[round % 3];
        let name = name_of(reader, 1).await?;
        ensure!(name == "kept", "round {round}: {name} was read");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    // It is on another history, and cannot follow.
    until_role(tier.proxy(), &other.address(), "other timeline").await?;
    until_written(tier.proxy(), "new").await?;
    // What it was before may be served once more where that is allowed.
    until("the new one is read", async || Ok(name_of(&readers[0], 1).await? == "new")).await?;
    warm(tier.proxy(), &readers[0], 1).await?;
    Ok(())
}

/// A replaced primary does all it can to be taken for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_primary_that_comes_back_to_life_is_neither_read_nor_written() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(2).log_statements(true).start().await?;
    let shard = &tier.shards[0];
    let (old, heir) = (&shard.primary, &shard.replicas[0]);
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.execute("INSERT INTO users (user_id, name) VALUES (1, 'before'), (2, 'before')", &[]).await?;
    for replica in &shard.replicas {
        replica.catch_up().await?;
    }
    let idle: Vec<Client> = futures_util::future::try_join_all((0..5).map(|_| tier.connect())).await?;
    for one in &idle {
        name_of(one, 1).await?;
    }
    let open = tier.connect().await?;
    open.batch_execute("BEGIN; UPDATE users SET name = 'amid' WHERE user_id = 2").await?;
    // There is a second server connection then: who has to log in first has sent nothing, and writes to the next primary.
    client.execute("UPDATE users SET name = 'before' WHERE user_id = 1", &[]).await?;
    old.freeze();
    let sent = tier.connect().await?;
    let sent = tokio::spawn(async move { sent.execute("UPDATE users SET name = 'sent' WHERE user_id = 1", &[]).await });
    // Besides the open transaction.
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    crate::freshness::until(async || {
        let pools = crate::moving::rows(&console, "SHOW POOLS").await?;
        let busy = pools.iter().filter_map(|row| row.get("sv_active")?.parse::<u32>().ok());
        Ok(busy.sum::<u32>() >= 2)
    })
    .await
    .context("the write is not sent")?;
    heir.promote().await?;
    until_role(tier.proxy(), &heir.address(), "primary").await?;
    until_written(tier.proxy(), "after").await?;
    let sent = tokio::time::timeout(WAIT, sent).await.context("a write on the old primary hangs")??;
    ensure!(sent.is_err(), "a write that the old primary never answered");
    old.thaw();
    // It lives, accepts writes, and has what it was sent.
    let direct = old.admin("shop").await?;
    direct.execute("UPDATE users SET name = 'wrong'", &[]).await?;
    until_role(tier.proxy(), &old.address(), "superseded").await?;
    ensure!(open.batch_execute("COMMIT").await.is_err(), "a transaction on the old primary was committed");
    let fresh = tier.connect().await?;
    for round in 0..200 {
        let (reader, user) = (if round % 2 == 0 { &fresh } else { &idle[round % 5] }, 1 + (round % 3 / 2) as i64);
        // A connection that was idle has lost nothing by the change.
        let name = name_of(reader, user).await.with_context(|| format!("round {round}\n{}", tier.weir_log()))?;
        let truth = if user == 1 { "after" } else { "before" };
        ensure!(name == truth, "round {round}: {name} was read");
        fresh.simple_query(&format!("/* weir: cache=never */ {READ} -- round {round}")).await?;
    }
    ensure!(!old.log().contains("-- round"), "the old primary was read");
    fresh.execute("UPDATE users SET name = 'last' WHERE user_id = 2", &[]).await?;
    assert_eq!(name_of(&heir.admin("shop").await?, 2).await?, "last");
    assert_eq!(name_of(&direct, 2).await?, "wrong");
    ensure!(!old.log().contains("'last'"), "the old primary was written");
    // The other replica still follows it, and therefore answers nothing.
    until_role(tier.proxy(), &shard.replicas[1].address(), "other timeline").await?;
    // Once the one in force is gone, nobody is the primary.
    heir.kill9();
    until("the shard has no primary", async || {
        match tier.connect().await?.execute("UPDATE users SET name = 'nobody' WHERE user_id = 1", &[]).await {
            Ok(_) => anyhow::bail!("the old primary was written"),
            Err(error) => Ok(format!("{error:?}").contains("has no primary now")),
        }
    })
    .await?;
    heir.restart().await?;
    until_written(tier.proxy(), "again").await?;
    assert_eq!(name_of(&heir.admin("shop").await?, 1).await?, "again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_log_in_and_what_is_compared_is_asked_of_the_promoted_one() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).config_extra("[auth_query]\n").start().await?;
    create_schema(&tier.connect().await?).await?;
    let (old, heir) = (&tier.shards[0].primary, &tier.shards[0].replicas[0]);
    heir.catch_up().await?;
    let output = crate::drift::compared(&tier)?;
    ensure!(output.status.success(), "{output:?}");
    // The old one goes on, and is wrong about everything.
    heir.promote().await?;
    until_role(tier.proxy(), &heir.address(), "primary").await?;
    old.admin("postgres")
        .await?
        .batch_execute("CREATE ROLE ann LOGIN PASSWORD 'old'; CREATE ROLE bob LOGIN PASSWORD 'old'")
        .await?;
    let admin = heir.admin("shop").await?;
    admin.batch_execute("CREATE ROLE ann LOGIN PASSWORD 'new'; ALTER TABLE users ADD COLUMN extra int").await?;
    let dsn = |user: &str, password: &str| format!("postgres://{user}:{password}@127.0.0.1:{}/shop", tier.port());
    connect(&dsn("ann", "new")).await.context("whom the promoted one knows")?;
    for user in ["ann", "bob"] {
        let refused = connect(&dsn(user, "old")).await.err().with_context(|| format!("{user} was let in"))?;
        ensure!(format!("{refused:?}").contains("password authentication failed"), "{refused:?}");
    }
    let said = String::from_utf8_lossy(&crate::drift::compared(&tier)?.stdout).into_owned();
    ensure!(said.contains("column extra of public.users"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn distributed_commits_the_engine_and_decoding_follow() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    let client = tier.connect().await?;
    crate::engine::load(&client).await?;
    let before = rows(&client, HARD[2]).await?;
    let shard = &tier.shards[0];
    let heir = &shard.replicas[0];
    heir.catch_up().await?;
    shard.primary.freeze();
    heir.promote().await?;
    until_role(tier.proxy(), &heir.address(), "primary").await?;
    shard.primary.thaw();
    shard.primary.admin("shop").await?.execute("UPDATE orders SET total = 0", &[]).await?;
    let client = tier.connect().await?;
    assert_eq!(rows(&client, HARD[2]).await?, before, "the engine reads from the promoted one");
    client.execute("UPDATE users SET country = 'XX'", &[]).await?;
    let held = column(&heir.admin("shop").await?, "SELECT DISTINCT country FROM users").await?;
    assert_eq!(held, ["XX"], "both shards were written");
    // Beside weir, at the new primary.
    let direct = heir.admin("shop").await?;
    let user: i64 = column(&direct, "SELECT min(user_id) FROM users").await?.first().context("a user")?.parse()?;
    let read = format!("SELECT country FROM users WHERE user_id = {user}");
    until("decoding", async || {
        let console = connect(&tier.admin_dsn()).await?;
        let shown = rows(&console, "SHOW DECODING").await?;
        Ok(shown.iter().all(|row| row.iter().flatten().any(|value| value == "up")))
    })
    .await?;
    for _ in 0..3 {
        assert_eq!(column(&client, &read).await?, ["XX"]);
    }
    direct.execute("UPDATE users SET country = 'YY' WHERE user_id = $1", &[&user]).await?;
    until("a write beside weir", async || Ok(column(&client, &read).await? == ["YY"])).await?;
    Ok(())
}
