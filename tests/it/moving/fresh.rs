//! Neither a cached answer nor a replica nor another proxy shows what was before the owner changed; a transaction with one snapshot
//! shows just that.

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_harness::Tier;

use super::{SLOTS, filled, nothing_is_left, order, reaches, rows};
use crate::placement::column;

const NAME: &str = "SELECT name FROM users WHERE user_id = $1";
/// All of them on both shards; some move.
const READ: std::ops::RangeInclusive<i64> = 1..=30;

async fn all_are(clients: &[&Client], expected: &str) -> Result<()> {
    for client in clients {
        for user in READ {
            let name: String = client.query_one(NAME, &[&user]).await?.try_get(0)?;
            assert_eq!(name, expected, "user {user}");
        }
    }
    Ok(())
}

async fn write(client: &Client, name: &str) -> Result<()> {
    for user in READ {
        client.execute("UPDATE users SET name = $2 WHERE user_id = $1", &[&user, &name]).await?;
    }
    Ok(())
}

/// Replicas of both shards have stopped replaying while slots go there and back, and answers were cached on the way: each read shows the
/// last write.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_shows_what_was_before_the_owner_changed() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).redis(true).peers(true).start().await?;
    let other = tier.another().await?;
    filled(&tier).await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    // Cached on the shards of now.
    write(&here, "first").await?;
    for _ in 0..3 {
        all_are(&[&here, &there], "first").await?;
    }
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    for shard in &tier.shards {
        shard.replicas[0].pause_replay().await?;
    }
    write(&there, "second").await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    for _ in 0..3 {
        all_are(&[&here, &there], "second").await?;
    }
    write(&here, "third").await?;
    for _ in 0..3 {
        all_are(&[&there, &here], "third").await?;
    }
    // What was cached on the first owner is of long ago.
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    for _ in 0..3 {
        all_are(&[&here, &there], "third").await?;
    }
    for shard in &tier.shards {
        shard.replicas[0].resume_replay().await?;
    }
    write(&there, "fourth").await?;
    all_are(&[&here, &there], "fourth").await?;
    nothing_is_left(&tier).await
}

/// The owner changes while a transaction with one snapshot is open: it goes on by the map of its snapshot, and loses or doubles nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_keeps_its_map() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let (client, writer) = (tier.connect().await?, tier.connect().await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    write(&writer, "before").await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let sums = "SELECT count(*), sum(user_id)::int8, count(*) FILTER (WHERE name = 'before') FROM users";
    let seen = |row: &tokio_postgres::Row| [0, 1, 2].map(|column| row.get::<_, i64>(column));
    let before = seen(&client.query_one(sums, &[]).await?);
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    write(&writer, "after").await?;
    writer.execute("DELETE FROM users WHERE user_id > 1990", &[]).await.context("deleting")?;
    assert_eq!(seen(&client.query_one(sums, &[]).await?), before);
    for user in READ {
        let name: String = client.query_one(NAME, &[&user]).await?.try_get(0)?;
        assert_eq!(name, "before", "user {user}");
    }
    client.batch_execute("COMMIT").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE name = 'after'").await?, [READ.count().to_string()]);
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    nothing_is_left(&tier).await
}

/// Slots move for good while a transaction with one snapshot is open that has not touched them: by the map it keeps it would write rows
/// where nobody looks for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_writes_nothing_that_has_another_owner_since() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let client = tier.connect().await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let direct = tier.shards[0].primary.admin("shop").await?;
    // New ones, of slots that the first shard owns.
    let user = async |slots: &str| -> Result<i64> {
        let slot = |key: &str| format!("(hashint8extended({key}, 0) >> 52) & 4095");
        let sql = format!(
            "SELECT min(n) FROM generate_series(10000, 100000) n WHERE {new} {slots} AND {new} IN (SELECT {known} FROM users)",
            new = slot("n"),
            known = slot("user_id")
        );
        Ok(i64::from(direct.query_one(&sql, &[]).await?.try_get::<_, i32>(0)?))
    };
    let (moved, stays) = (user("< 2048").await?, user(">= 2048").await?);
    let add = |user: i64| format!("INSERT INTO users VALUES ({user})");
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
    client.batch_execute(begin).await?;
    column(&client, "SELECT * FROM settings").await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    client.batch_execute(&add(stays)).await.context("whose owner is as it was")?;
    let late = client.execute("INSERT INTO users VALUES ($1)", &[&moved]).await;
    let late = late.expect_err("it has another owner");
    assert_eq!(late.code().map(tokio_postgres::error::SqlState::code), Some("40001"), "{late:?}");
    client.batch_execute("ROLLBACK").await?;
    client.batch_execute(&format!("{begin}; {}; {}; COMMIT", "SELECT * FROM settings", add(stays))).await?;
    client.batch_execute(&add(moved)).await?;
    for user in [stays, moved] {
        assert_eq!(column(&client, &format!("SELECT count(*) FROM users WHERE user_id = {user}")).await?, ["1"]);
    }
    nothing_is_left(&tier).await
}
