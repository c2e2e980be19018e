//! What is done to tables on the servers themselves, past weir, while rows of them are on their way.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio_postgres::error::SqlState;
use weir_harness::Tier;

use super::{begun, nothing_is_left, on_shards, order, reaches, rows};
use crate::placement::column;

/// What the last move says it fails at.
async fn fails_at(console: &tokio_postgres::Client, text: &str) -> Result<()> {
    let (begun, mut said) = (Instant::now(), None);
    // It is tried again with growing pauses.
    while begun.elapsed() < Duration::from_secs(60) {
        let moves = rows(console, "SHOW MOVES").await?;
        said = moves.last().context("a move")?.get("error").map(str::to_owned);
        if said.as_ref().is_some_and(|error| error.contains(text)) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("it does not say: {text}; but {said:?}")
}

#[tokio::test(flavor = "multi_thread")]
async fn truncate_waits_for_the_end_of_a_move() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (_, console, before) = begun(&tier).await?;
    reaches(&console, "ready").await?;
    let mut servers = Vec::new();
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        for sql in ["TRUNCATE users CASCADE", "TRUNCATE user_emails"] {
            let error = direct.batch_execute(sql).await.expect_err("rows are on their way");
            assert_eq!(error.code(), Some(&SqlState::OBJECT_IN_USE), "{error:?}");
        }
        servers.push(direct);
    }
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    assert!(servers[0].batch_execute("TRUNCATE users CASCADE").await.is_err(), "it would empty the way back");
    assert!(servers[1].batch_execute("TRUNCATE users CASCADE").await.is_err());
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    assert_eq!(on_shards(&tier).await?, before);
    nothing_is_left(&tier).await?;
    servers[0].batch_execute("TRUNCATE users CASCADE").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_changed_beside_weir_is_not_handed_over() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (client, console, before) = begun(&tier).await?;
    reaches(&console, "ready").await?;
    let (source, target) = (tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?);
    // Nothing of it is in the WAL's changes: nobody has written the table since.
    source.batch_execute("ALTER TABLE users DROP COLUMN email").await?;
    order(&console, "RESHARD CUTOVER").await?;
    fails_at(&console, "public.users is not the same on both servers").await?;
    // And when somebody does, the stream or the next look at the tables stops it; nothing is applied that has lost a column.
    client.batch_execute("UPDATE users SET name = 'later'").await?;
    fails_at(&console, "changed beside weir while its rows were on their way").await?;
    assert_eq!(column(&target, "SELECT count(*) FROM users WHERE name <> 'later'").await?.len(), 1);
    // Who makes them alike lets it go on.
    target.batch_execute("ALTER TABLE users DROP COLUMN email").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    let count = before.iter().map(std::collections::BTreeMap::len).sum::<usize>();
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE name = 'later'").await?, [count.to_string()]);
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_comes_while_slots_move_is_not_left_behind() -> Result<()> {
    let tables = ["users(user_id bigint)", "orders(user_id bigint)", "notes(author bigint)", "later(user_id bigint)"];
    let tier = Tier::builder().shards(2).tables(&tables).start().await?;
    let (client, console, _) = begun(&tier).await?;
    reaches(&console, "ready").await?;
    client.batch_execute("CREATE TABLE notes (author bigint PRIMARY KEY, note text)").await?;
    for user in 1..=50_i64 {
        client.execute("INSERT INTO notes VALUES ($1, 'x')", &[&user]).await?;
    }
    // It begins again, with all tables.
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM notes").await?, ["50"]);
    let one = client.query_one("SELECT count(*) FROM notes WHERE author IN (1, 2, 3, 4, 5, 6, 7, 8)", &[]).await?;
    assert_eq!(one.get::<_, i64>(0), 8);
    // The guards of those that were there before ask for their own keys still.
    client
        .batch_execute("INSERT INTO orders SELECT n, gen_random_uuid(), 'new', 1 FROM generate_series(1, 50) n")
        .await?;
    // One that comes now is on the new owner alone: its rows would not find the way back.
    client.batch_execute("CREATE TABLE later (user_id bigint PRIMARY KEY)").await?;
    client.batch_execute("INSERT INTO later SELECT n FROM generate_series(1, 50) n").await?;
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "forward").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    for table in ["notes", "later"] {
        assert_eq!(column(&client, &format!("SELECT count(*) FROM {table}")).await?, ["50"], "{table}");
    }
    nothing_is_left(&tier).await
}
