//! `stale_while_revalidate`: where a table opts in, an overtaken answer is served while it is refreshed; to nobody who asks for
//! more, never to whoever wrote, never beyond its time, and not after FLUSH or DDL.

use std::time::Duration;

use anyhow::Result;
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};

const READ: &str = "SELECT name FROM users WHERE user_id = 1";

/// Users opt in, orders do not. The answer to [`READ`], `before`, is in the cache.
async fn lenient(stale: &str) -> Result<(Tier, Client, Client)> {
    let table = |name: &str, more: &str| {
        format!(
            "[[database.shop.table]]\nname = '{name}'\nkind = 'sharded'\nkey = 'user_id'\ntype = 'bigint'\n{more}\n"
        )
    };
    let users = table("users", &format!("cache = {{ stale_while_revalidate = '{stale}' }}"));
    let tier = Tier::builder().shards(2).config_extra(&users).config_extra(&table("orders", "")).start().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    create_schema(&writer).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (1, 'before')", &[]).await?;
    cached(&tier, &reader, READ, "before").await?;
    Ok((tier, writer, reader))
}

/// Until memory has answered.
async fn cached(tier: &Tier, reader: &Client, sql: &str, value: &str) -> Result<()> {
    let before = cache_figure(tier.proxy(), "hit_local").await?;
    until(async || {
        let is_there = column(reader, sql).await? == [value];
        Ok(is_there && cache_figure(tier.proxy(), "hit_local").await? > before)
    })
    .await
}

async fn rename(writer: &Client, name: &str) -> Result<()> {
    writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overtaken_answer_is_served_while_it_is_refreshed() -> Result<()> {
    let (tier, writer, reader) = lenient("10m").await?;
    rename(&writer, "after").await?;
    assert_eq!(column(&reader, READ).await?, ["before"]);
    until(async || Ok(column(&reader, READ).await? == ["after"])).await?;
    assert!(cache_figure(tier.proxy(), "hit_stale").await? >= 1);
    // Whoever has written sees it, whatever others are served meanwhile.
    for round in 0..30 {
        let name = format!("round {round}");
        rename(&writer, &name).await?;
        column(&reader, READ).await?;
        assert_eq!(column(&writer, READ).await?, [name]);
    }
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let route = console.simple_query(&format!("ROUTE '{READ}'")).await?;
    assert!(format!("{route:?}").contains("for up to 600000 ms"), "{route:?}");
    // A table that has not opted in keeps its readers.
    let joined = "SELECT name FROM users JOIN orders USING (user_id) WHERE user_id = 1";
    writer
        .batch_execute(
            "INSERT INTO orders (user_id, order_id, status, total_cents) VALUES (1, gen_random_uuid(), 'new', 1)",
        )
        .await?;
    cached(&tier, &reader, joined, "round 29").await?;
    rename(&writer, "joined").await?;
    assert_eq!(column(&reader, joined).await?, ["joined"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn strictness_flush_and_ddl_end_it() -> Result<()> {
    let (tier, writer, reader) = lenient("10m").await?;
    rename(&writer, "hinted").await?;
    assert_eq!(column(&reader, &format!("/* weir: freshness=strict */ {READ}")).await?, ["hinted"]);
    rename(&writer, "set").await?;
    let strict = tier.connect().await?;
    strict.batch_execute("SET weir.freshness = 'strict'").await?;
    assert_eq!(column(&strict, READ).await?, ["set"]);

    cached(&tier, &reader, READ, "set").await?;
    rename(&writer, "flushed").await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    console.simple_query("FLUSH TABLE users").await?;
    assert_eq!(column(&reader, READ).await?, ["flushed"]);

    cached(&tier, &reader, READ, "flushed").await?;
    rename(&writer, "altered").await?;
    writer.batch_execute("ALTER TABLE users ADD COLUMN age int").await?;
    assert_eq!(column(&reader, READ).await?, ["altered"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_its_time() -> Result<()> {
    let (_tier, writer, reader) = lenient("200ms").await?;
    for round in 0..5 {
        let name = round.to_string();
        rename(&writer, &name).await?;
        // What was true before the write is older than that now.
        tokio::time::sleep(Duration::from_millis(210)).await;
        assert_eq!(column(&reader, READ).await?, [name]);
    }
    Ok(())
}
