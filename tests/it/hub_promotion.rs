//! The hub's primary dies and a replica of it is promoted: proxies find it, hear of new maps there, and give no number twice; the old
//! one, back to life, is not asked. And a hub that has forgotten the map in force is not followed.
//!
//! Non-goals: what the fallback engine answers (`engine.rs`), and moves themselves (`moving.rs`).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_harness::{Server, Tier};

use crate::engine::{HARD, load, rows};
use crate::placement::column;

const WAIT: Duration = Duration::from_secs(60);
/// More than a proxy's pause between two words to the hub.
const BEATS: Duration = Duration::from_secs(4);
/// More than one block.
const MANY: &str = "INSERT INTO accounts (name) SELECT 'n' || i FROM generate_series(1, 150) i";

async fn gauge(tier: &Tier, name: &str) -> Result<u64> {
    let (_, metrics) = tier.http_get("/metrics").await?;
    let line = metrics.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains("\"shop\""));
    let value = line.and_then(|line| line.rsplit(' ').next()).with_context(|| format!("{name} is not shown"))?;
    Ok(value.parse::<f64>()? as u64)
}

async fn until(tier: &Tier, name: &str, wanted: u64) -> Result<()> {
    let began = Instant::now();
    while gauge(tier, name).await? != wanted {
        ensure!(began.elapsed() < WAIT, "{name} is {} and not {wanted}\n{}", gauge(tier, name).await?, tier.weir_log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// On a server of the hub; gives the epoch then.
async fn add_to_epoch(hub: &Server, steps: i64) -> Result<u64> {
    let admin = hub.admin("weir_hub").await?;
    let sql = "UPDATE weir.topology SET epoch = epoch + $1 WHERE database = 'shop' RETURNING epoch";
    let epoch: i64 = admin.query_one(sql, &[&steps]).await?.get(0);
    admin.batch_execute("NOTIFY weir_topology").await?;
    Ok(epoch as u64)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_replica_of_the_hub_is_followed() -> Result<()> {
    let tier = Tier::builder().hub_replicas(1).tables(&["accounts(account_id bigint)"]).start().await?;
    let (old, heir) = (&*tier.hub, &tier.hub_replicas[0]);
    let client = tier.connect().await?;
    load(&client).await?;
    client.batch_execute("CREATE TABLE accounts (account_id bigserial PRIMARY KEY, name text)").await?;
    client.batch_execute(MANY).await?;
    let hard = rows(&client, HARD[2]).await?;
    // The heir never hears of the blocks that are given away from here on.
    let admin = heir.admin("postgres").await?;
    heir.catch_up().await?;
    admin.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    let began = Instant::now();
    while column(&admin, "SELECT count(*) FROM pg_stat_wal_receiver").await? != ["0"] {
        ensure!(began.elapsed() < WAIT, "the heir goes on receiving");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for _ in 0..4 {
        client.batch_execute(MANY).await?;
    }
    old.kill9();
    heir.promote().await?;
    // It needs blocks again and again, and gets them from whoever is the primary now.
    let mut written = 0;
    let began = Instant::now();
    while written < 4 {
        written += u32::from(client.batch_execute(MANY).await.is_ok());
        ensure!(began.elapsed() < WAIT, "no numbers since the promotion\n{}", tier.weir_log());
    }
    let counts = column(&client, "SELECT count(*) - count(DISTINCT account_id) FROM accounts").await?;
    assert_eq!(counts, ["0"], "a number was given twice");
    assert_eq!(column(&client, "SELECT count(*) FROM accounts").await?, ["1350"]);
    // News are heard there, and nothing that the old one says when it lives again.
    let epoch = add_to_epoch(heir, 1).await?;
    until(&tier, "weir_topology_epoch", epoch).await?;
    old.restart().await?;
    add_to_epoch(old, 100).await?;
    let epoch = add_to_epoch(heir, 1).await?;
    until(&tier, "weir_topology_epoch", epoch).await?;
    let epoch = add_to_epoch(heir, 1).await?;
    until(&tier, "weir_topology_epoch", epoch).await?;
    assert_eq!(gauge(&tier, "weir_hub_behind").await?, 0);
    // The fallback engine has gone along.
    assert_eq!(rows(&client, HARD[2]).await?, hard);
    // One that starts now asks the right one, too.
    tier.restart_weir().await?;
    until(&tier, "weir_topology_epoch", epoch).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_has_forgotten_the_map_in_force_is_not_followed() -> Result<()> {
    let tier = Tier::builder().start().await?;
    let hub = &*tier.hub;
    let epoch = add_to_epoch(hub, 1).await?;
    until(&tier, "weir_topology_epoch", epoch).await?;
    add_to_epoch(hub, -1).await?;
    until(&tier, "weir_hub_behind", 1).await?;
    ensure!(tier.weir_log().contains("the hub shows an older map"), "{}", tier.weir_log());
    assert_eq!(gauge(&tier, "weir_topology_epoch").await?, epoch);
    // Another map under the same number.
    let admin = hub.admin("weir_hub").await?;
    admin.batch_execute("UPDATE weir.slot SET shard = 1 - shard WHERE slot = 7").await?;
    add_to_epoch(hub, 1).await?;
    // Neither is it followed, nor does this proxy say any more by which epoch it works: who changes maps has to wait for it.
    let said = "SELECT max(seen)::text FROM weir.proxy";
    tokio::time::sleep(BEATS).await;
    let before = column(&admin, said).await?;
    tokio::time::sleep(BEATS).await;
    assert_eq!((column(&admin, said).await?, gauge(&tier, "weir_hub_behind").await?), (before, 1));
    // Back to what is in force, and then onwards.
    admin.batch_execute("UPDATE weir.slot SET shard = 1 - shard WHERE slot = 7").await?;
    add_to_epoch(hub, 0).await?;
    until(&tier, "weir_hub_behind", 0).await?;
    let epoch = add_to_epoch(hub, 1).await?;
    until(&tier, "weir_topology_epoch", epoch).await
}
