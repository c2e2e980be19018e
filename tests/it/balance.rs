//! Load is measured by slot, advice follows from it, and weights stay what they were made.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio_postgres::{Client, SimpleQueryRow};
use weir_harness::{Proxy, Tier};

use crate::moving::{USERS, filled, order, reaches, rows};
use crate::placement::column;

/// Users by shard, some of them.
async fn users(tier: &Tier) -> Result<[Vec<i64>; 2]> {
    let mut found = [Vec::new(), Vec::new()];
    for (shard, users) in tier.shards.iter().zip(&mut found) {
        let direct = shard.primary.admin("shop").await?;
        let sql = "SELECT user_id FROM users ORDER BY user_id LIMIT 300";
        *users = direct.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect();
    }
    Ok(found)
}

/// Reads each of these users, so many times.
async fn read(client: &Client, users: &[i64], times: usize) -> Result<()> {
    let statement = client.prepare("SELECT name FROM users WHERE user_id = $1").await?;
    for _ in 0..times {
        for user in users {
            client.query_one(&statement, &[user]).await?;
        }
    }
    Ok(())
}

fn number(row: &SimpleQueryRow, column: &str) -> Result<i64> {
    Ok(row.get(column).with_context(|| column.to_owned())?.parse()?)
}

/// Slots that are shown for each shard, and their share of the time in thousandths.
async fn shown(console: &Client) -> Result<[(usize, i64); 2]> {
    let mut sums = [(0, 0); 2];
    for row in rows(console, "SHOW SLOT LOAD").await? {
        let sum = &mut sums[number(&row, "shard")? as usize];
        *sum = (sum.0 + 1, sum.1 + number(&row, "share_permille")?);
    }
    Ok(sums)
}

fn notes<'r>(plan: &'r [SimpleQueryRow], what: &str) -> Vec<&'r str> {
    plan.iter().filter(|row| row.get("what") == Some(what)).filter_map(|row| row.get("note")).collect()
}

async fn code(console: &Client, command: &str) -> Option<String> {
    let error = console.simple_query(command).await.err()?;
    error.code().map(|code| code.code().to_owned())
}

async fn tier() -> Result<(Tier, Client)> {
    let tier = Tier::builder().shards(2).peers(true).config_extra("[cache]\nenabled = false").start().await?;
    filled(&tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    Ok((tier, console))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_shard_gives_slots_to_an_idle_one() -> Result<()> {
    let (tier, console) = tier().await?;
    let client = tier.connect().await?;
    let [busy, idle] = users(&tier).await?;
    read(&client, &busy, 8).await?;
    read(&client, &idle, 1).await?;
    let [first, second] = shown(&console).await?;
    assert!(first.0 + second.0 == 50 && first.1 > 2 * second.1, "{first:?} {second:?}");
    let (_, page) = tier.http_get("/metrics").await?;
    let share =
        page.lines().find_map(|line| line.strip_prefix("weir_shard_load_share{database=\"shop\",shard=\"shard0\"} "));
    assert!(share.context("share")?.parse::<f64>()? > 0.6, "{share:?}");
    let plan = rows(&console, "RESHARD PLAN BALANCE").await?;
    let steps: Vec<_> = plan.iter().filter(|row| row.get("what") == Some("move")).collect();
    assert!(steps.len() == 1 && steps[0].get("from") == Some("shard0"), "{plan:?}");
    let moved = number(steps[0], "rows")?;
    assert!((1..USERS / 4).contains(&moved), "what is not read stays: {moved} rows");
    assert!(notes(&plan, "note").iter().all(|note| note.contains("its weight stands for 50.0 %")), "{plan:?}");
    rows(&console, "RESHARD START BALANCE").await?;
    reaches(&console, "ready").await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    // What was measured is now read on both.
    assert_eq!(code(&console, "RESHARD PLAN BALANCE").await.as_deref(), Some("22023"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_that_another_weir_has_seen_counts() -> Result<()> {
    let (tier, console) = tier().await?;
    let other = tier.another().await?;
    let [busy, idle] = users(&tier).await?;
    assert_eq!(code(&console, "RESHARD PLAN BALANCE").await.as_deref(), Some("55000"), "nothing was measured");
    read(&other.connect().await?, &busy, 8).await?;
    told(&tier, &other).await?;
    read(&tier.connect().await?, &idle, 1).await?;
    assert_eq!(shown(&console).await?[0], (0, 0), "this one has seen nothing of it");
    let plan = rows(&console, "RESHARD PLAN BALANCE").await?;
    assert!(plan.iter().any(|row| row.get("what") == Some("move") && row.get("from") == Some("shard0")), "{plan:?}");
    Ok(())
}

/// Waits until the hub knows what a weir has measured.
async fn told(tier: &Tier, other: &Proxy) -> Result<()> {
    let hub = tier.hub.admin("weir_hub").await?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(100) {
        if column(&hub, "SELECT proxy FROM weir.slot_load WHERE cardinality(slots) >= 200").await?.len() == 1 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("the hub was not told. The log ends with:\n{}", other.weir_log())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_too_hot_is_named_with_the_command_that_helps() -> Result<()> {
    let (tier, console) = tier().await?;
    let client = tier.connect().await?;
    let [busy, idle] = users(&tier).await?;
    read(&client, &busy[..1], 2000).await?;
    read(&client, &idle[..100], 1).await?;
    let error = console.simple_query("RESHARD PLAN BALANCE").await.err().context("one key has it all")?;
    let error = error.as_db_error().context("from weir")?;
    let hint = error.hint().unwrap_or_default();
    assert!(error.code().code() == "22023" && hint.contains("ISOLATE KEY"), "{error:?}");
    assert!(error.detail().unwrap_or_default().contains("more than a shard's whole share"), "{error:?}");
    let hot = rows(&console, "SHOW HOT KEYS").await?;
    let hottest = hot.first().context("a key")?;
    let command = format!("RESHARD START ISOLATE KEY '{}' TYPE bigint TO \"shard1\"", busy[0]);
    assert_eq!(hottest.get("isolate"), Some(command.as_str()), "{hot:?}");
    assert!(hot[1..].iter().all(|row| row.get("isolate").is_none()), "{hot:?}");
    Ok(())
}

/// Waits until weir shows these weights.
async fn weighs(console: &Client, expected: [&str; 2]) -> Result<()> {
    let begun = Instant::now();
    let mut last = Vec::new();
    while begun.elapsed() < Duration::from_secs(30) {
        let shards = rows(console, "SHOW SHARDS").await?;
        last = shards.iter().map(|row| row.get("weight").unwrap_or_default().to_owned()).collect();
        if last == expected {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("weights are {last:?}, not {expected:?}")
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_count_once_their_moves_are_done() -> Result<()> {
    const WEIGHT: &str = "RESHARD START WEIGHT shard0 = 3, shard1 = 1";
    let (tier, console) = tier().await?;
    let hub = tier.hub.admin("weir_hub").await?;
    let next = "SELECT coalesce(next_weight::text, '-') FROM weir.shard ORDER BY id";
    rows(&console, WEIGHT).await?;
    assert_eq!(column(&hub, next).await?, ["3", "1"]);
    weighs(&console, ["1", "1"]).await?;
    order(&console, "RESHARD CANCEL").await?;
    reaches(&console, "cancelled").await?;
    assert_eq!(column(&hub, next).await?, ["-", "-"], "what was given up is forgotten");
    weighs(&console, ["1", "1"]).await?;
    order(&console, WEIGHT).await?;
    reaches(&console, "ready").await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    weighs(&console, ["1", "1"]).await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    weighs(&console, ["3", "1"]).await?;
    // Later plans begin there, whatever the file says, also after a restart.
    tier.restart_weir().await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    weighs(&console, ["3", "1"]).await?;
    assert_eq!(code(&console, "RESHARD PLAN WEIGHT shard1 = 1").await.as_deref(), Some("22023"));
    let plan = rows(&console, "RESHARD PLAN WEIGHT shard1 = 3").await?;
    let moved = plan.iter().filter(|row| row.get("what") == Some("move"));
    assert_eq!(moved.map(|row| number(row, "slots")).sum::<Result<i64>>()?, 1024);
    Ok(())
}
