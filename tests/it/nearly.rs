//! Reads whose replica is a few milliseconds behind: they wait for it, a little, and are never stale.
//!
//! Replay that is delayed on purpose (`recovery_min_apply_delay`) is the witness: what a replica answers right after a write was
//! waited for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use weir_harness::Tier;

use crate::freshness::{replica_reads, until};
use crate::placement::{column, create_schema};

const READ: &str = "SELECT name FROM users WHERE user_id = 1";

/// One shard with a replica that replays commits so much later, and twenty users.
async fn delayed(delay: &str, wait_max: &str) -> Result<Tier> {
    let config = format!("[cache]\nenabled = false\n[database.shop]\nreplica_wait_max = '{wait_max}'");
    let tier = Tier::builder().shards(1).replicas(1).config_extra(&config).start().await?;
    let writer = tier.connect().await?;
    create_schema(&writer).await?;
    for key in 1..=20_i64 {
        writer.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&key]).await?;
    }
    until(async || {
        assert_eq!(column(&writer, READ).await?, ["0"]);
        Ok(replica_reads(&tier).await? > 0)
    })
    .await?;
    let replica = tier.shards[0].replicas[0].admin("postgres").await?;
    replica.batch_execute(&format!("ALTER SYSTEM SET recovery_min_apply_delay = '{delay}'")).await?;
    replica.batch_execute("SELECT pg_reload_conf()").await?;
    until(async || Ok(column(&replica, "SHOW recovery_min_apply_delay").await? == [delay])).await?;
    Ok(tier)
}

/// Reads that waited for a replica, by what came of it.
async fn waits(tier: &Tier, result: &str) -> Result<u64> {
    let (_, page) = tier.http_get("/metrics").await?;
    let series = format!("weir_replica_waits_total{{database=\"shop\",result=\"{result}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&series)).context("the series")?.parse().context("a number")
}

/// Writes, and reads what was written until the replica has answered once: right all the while.
async fn write_and_read(tier: &Tier, round: u32) -> Result<()> {
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    let name = round.to_string();
    writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
    let before = replica_reads(tier).await?;
    until(async || {
        assert_eq!(column(&reader, READ).await?, [name.as_str()]);
        Ok(replica_reads(tier).await? > before)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_nearly_there_is_waited_for() -> Result<()> {
    let tier = delayed("100ms", "1s").await?;
    for round in 1..=10 {
        write_and_read(&tier, round).await?;
    }
    // What the console is asked in between takes a few milliseconds, and the replica is always a hundred behind.
    assert!(waits(&tier, "caught_up").await? >= 5, "{}", waits(&tier, "caught_up").await?);
    assert_eq!(waits(&tier, "full").await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_long_and_nobody_where_it_is_switched_off() -> Result<()> {
    let tier = delayed("1min", "20ms").await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    let before = Instant::now();
    let mut round = 0;
    while round < 200 || before.elapsed() < Duration::from_secs(1) {
        let name = round.to_string();
        round += 1;
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        assert_eq!(column(&reader, READ).await?, [name]);
    }
    let (took, in_vain) = (before.elapsed(), waits(&tier, "in_vain").await?);
    let most = 10 * (took.as_secs() + 2);
    assert!((1..=most).contains(&in_vain), "now and then one tries, ten times a second: {in_vain} in {took:?}");
    assert_eq!(waits(&tier, "caught_up").await?, 0);

    let tier = delayed("100ms", "0ms").await?;
    write_and_read(&tier, 1).await?;
    assert_eq!((waits(&tier, "caught_up").await?, waits(&tier, "in_vain").await?), (0, 0));
    Ok(())
}

/// Eight sessions, one statement in twenty a write, one read in ten of the whole table: which share of the reads did the replica
/// answer?
async fn share_off_the_primary(wait_max: &str) -> Result<f64> {
    const SESSIONS: i64 = 8;
    const STATEMENTS: i64 = 600;
    let tier = delayed("5ms", wait_max).await?;
    let before = replica_reads(&tier).await?;
    let mut sessions = JoinSet::new();
    for session in 0..SESSIONS {
        let client = tier.connect().await?;
        sessions.spawn(async move {
            let (mut reads, mut at) = (0, session);
            for turn in 0..STATEMENTS {
                at = (at * 31 + turn * 7 + 11) % 9_973;
                let key = at % 20 + 1;
                match at % 20 {
                    0 => drop(client.execute("UPDATE users SET name = 'x' WHERE user_id = $1", &[&key]).await?),
                    1 | 2 => drop(client.query("SELECT count(*) FROM users WHERE name <> ''", &[]).await?),
                    _ => drop(client.query("SELECT name FROM users WHERE user_id = $1", &[&key]).await?),
                }
                reads += i64::from(at % 20 != 0);
                // An application does something with an answer.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            anyhow::Ok(reads)
        });
    }
    let mut reads = 0;
    while let Some(done) = sessions.join_next().await {
        reads += done??;
    }
    Ok((replica_reads(&tier).await? - before) as f64 / reads as f64)
}

#[tokio::test(flavor = "multi_thread")]
async fn most_reads_leave_the_primary_at_5_ms_of_lag() -> Result<()> {
    let mut shares = Vec::new();
    for wait_max in ["0ms", "5ms", "20ms"] {
        let share = share_off_the_primary(wait_max).await?;
        println!(
            "off the primary at 5 ms of lag and 5 % writes, replica_wait_max = {wait_max}: {:.1} %",
            share * 100.0
        );
        shares.push(share);
    }
    // The aim is 0.9 on a machine of its own; here others take their part.
    assert!(shares[2] > 0.6, "{shares:?}");
    Ok(())
}
