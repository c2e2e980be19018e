//! What stands still in the midst of a change of owner: the proxy that drives it, and the server that is to take the slots.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::Client;
use weir_harness::{Proxy, Tier};

use super::kills::{Phases, driver};
use super::{SLOTS, filled, nothing_is_left, order, reaches, rows};
use crate::placement::column;

const WRITE: &str = "UPDATE users SET name = $2 WHERE user_id = $1";
const FENCE: &str = "SELECT last_value FROM weir.move_1_fence";

/// Two keys whose slots move.
async fn keys(tier: &Tier) -> Result<Vec<i64>> {
    let direct = tier.shards[0].primary.admin("shop").await?;
    let sql = "SELECT user_id FROM users WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048 ORDER BY 1 LIMIT 2";
    Ok(direct.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// A transaction that has written what moves, and is open: a change of owner waits for it, gives up and is tried again.
async fn holds_up(proxy: &Proxy, key: i64) -> Result<Client> {
    let client = proxy.connect().await?;
    client.batch_execute(&format!("BEGIN; UPDATE users SET name = 'open' WHERE user_id = {key}")).await?;
    Ok(client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mover_that_stands_still_is_replaced_and_changes_nothing_when_it_wakes_up() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    let (one, two) = (tier.another().await?, tier.another().await?);
    filled(&tier).await?;
    tier.stop_weir();
    let keys = keys(&tier).await?;
    let mut phases = Phases::listen(tier.hub.admin_dsn("weir_hub")).await?;
    let hub = tier.hub.admin("weir_hub").await?;
    let console = weir_harness::connect(&one.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    let driving = driver(&hub, &[&one, &two]).await?.context("somebody drives")?.0;
    let (stands, goes) = if driving == 0 { (&one, &two) } else { (&two, &one) };
    let open = holds_up(goes, keys[0]).await?;
    let console = weir_harness::connect(&goes.admin_dsn()).await?;
    order(&console, "RESHARD CUTOVER").await?;
    phases.reaches("cutover").await?;
    let process = Pid::from_raw(stands.weir_pid().context("it runs")?.cast_signed()).context("a pid")?;
    kill_process(process, Signal::STOP)?;
    let stopped = Instant::now();
    // Statements of those slots wait until another one has taken over, and no longer.
    let client = goes.connect().await?;
    let wrote = client.execute(WRITE, &[&keys[1], &"meanwhile"]).await;
    println!("a statement ended {:?} after the mover stood still", stopped.elapsed());
    let moved = async {
        wrote?;
        open.batch_execute("COMMIT").await?;
        reaches(&console, "reverse").await?;
        anyhow::Ok(client.execute(WRITE, &[&keys[0], &"there"]).await?)
    };
    let moved = moved.await;
    kill_process(process, Signal::CONT)?;
    moved.with_context(|| goes.weir_log())?;
    // It notices that it drives no more, and has nothing left to say to the servers.
    crate::freshness::until(async || Ok(stands.weir_log().contains("the mover has lost the hub"))).await?;
    let awake = stands.connect().await?;
    awake.execute(WRITE, &[&keys[1], &"awake"]).await?;
    for (shard, fence) in [(0, 2_i64), (1, 1)] {
        let direct = tier.shards[shard].primary.admin("shop").await?;
        assert_eq!(direct.query_one(FENCE, &[]).await?.get::<_, i64>(0), fence, "shard{shard}");
    }
    assert_eq!(column(&hub, "SELECT phase FROM weir.move").await?, ["reverse"]);
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    for (key, name) in [(keys[0], "there"), (keys[1], "awake")] {
        let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[&key]).await?;
        assert_eq!(row.get::<_, &str>(0), name);
    }
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stands_still_keeps_nobody_waiting_for_long() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let keys = keys(&tier).await?;
    let mut phases = Phases::listen(tier.hub.admin_dsn("weir_hub")).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    let (open, client) = (holds_up(tier.proxy(), keys[0]).await?, tier.connect().await?);
    order(&console, "RESHARD CUTOVER").await?;
    phases.reaches("cutover").await?;
    let target = &tier.shards[1].primary;
    target.freeze();
    let frozen = Instant::now();
    let goes_on = async {
        open.batch_execute("COMMIT").await?;
        let mut slowest = Duration::ZERO;
        for number in 0.. {
            let begun = Instant::now();
            client.execute(WRITE, &[&keys[number % 2], &number.to_string()]).await?;
            slowest = slowest.max(begun.elapsed());
            if frozen.elapsed() > Duration::from_secs(8) && number > 20 {
                break;
            }
        }
        anyhow::Ok(slowest)
    };
    let slowest = goes_on.await;
    target.thaw();
    let slowest = slowest.with_context(|| tier.weir_log())?;
    println!("the slowest statement took {slowest:?}");
    ensure!(slowest < Duration::from_secs(9), "{slowest:?}");
    reaches(&console, "reverse").await?;
    client.execute(WRITE, &[&keys[0], &"there"]).await?;
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[&keys[0]]).await?;
    assert_eq!(row.get::<_, &str>(0), "there");
    nothing_is_left(&tier).await
}
