//! One key gets a shard of its choice: it moves alone, its slot goes without it, and it comes back.

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_harness::Tier;

use super::{doctor, filled, nothing_is_left, order, reaches, rows};
use crate::engine::route;
use crate::placement::column;

const STAR: i64 = 42;

/// Users of the celebrity's slot, as each shard has them.
async fn of_slot(tier: &Tier, slot: i64) -> Result<Vec<Vec<String>>> {
    let mut found = Vec::new();
    for shard in &tier.shards {
        let sql = format!(
            "SELECT user_id FROM users WHERE (hashint8extended(user_id, 0) >> 52) & 4095 = {slot} ORDER BY user_id"
        );
        found.push(column(&shard.primary.admin("shop").await?, &sql).await?);
    }
    Ok(found)
}

/// What `SHOW SLOTS` says of keys: key and shard.
async fn isolated(console: &Client) -> Result<Vec<(String, String)>> {
    let rows = rows(console, "SHOW SLOTS").await?;
    let key = |row: &tokio_postgres::SimpleQueryRow| Some((row.get("key")?.to_owned(), row.get("name")?.to_owned()));
    Ok(rows.iter().filter_map(key).collect())
}

struct Stage {
    tier: Tier,
    client: Client,
    console: Client,
    slot: i64,
    /// Where the key is at first, and the other shard.
    home: usize,
    other: usize,
}

/// A celebrity with a hundred orders, and a neighbour in its slot.
async fn stage() -> Result<Stage> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let client = tier.connect().await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let slot: i64 =
        client.query_one("SELECT (hashint8extended($1::int8, 0) >> 52) & 4095", &[&STAR]).await?.try_get(0)?;
    // There is always one among so many.
    let sql = "SELECT k FROM generate_series(100000::int8, 200000) k WHERE (hashint8extended(k, 0) >> 52) & 4095 = $1 LIMIT 1";
    let direct = tier.shards[0].primary.admin("shop").await?;
    let neighbour: i64 = direct.query_one(sql, &[&slot]).await?.try_get(0)?;
    client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'neighbour')", &[&neighbour]).await?;
    client
        .execute(
            "INSERT INTO orders (user_id, order_id, status, total_cents) SELECT $1::int8, gen_random_uuid(), 'new', n \
             FROM generate_series(1, 100) n",
            &[&STAR],
        )
        .await?;
    let home = usize::from(of_slot(&tier, slot).await?[0].is_empty());
    Ok(Stage { tier, client, console, slot, home, other: 1 - home })
}

impl Stage {
    /// Everybody is there once, whoever asks and however.
    async fn all_are_there(&self) -> Result<()> {
        assert_eq!(column(&self.client, "SELECT count(*) FROM users").await?, ["2001"]);
        let joined = "SELECT count(*) FROM users u JOIN orders o USING (user_id)";
        assert_eq!(column(&self.client, joined).await?, ["100"]);
        // Joined by something else than the key: the fallback engine's.
        let apart = "SELECT count(*) FROM users u JOIN orders o ON u.user_id + 0 = o.user_id + 0";
        assert_eq!(column(&self.client, apart).await?, ["100"]);
        let by_key = format!("SELECT count(*) FROM orders o, users u WHERE o.user_id = {STAR} AND u.user_id = 1");
        assert_eq!(column(&self.client, &by_key).await?, ["100"]);
        assert_eq!(column(&self.client, &format!("SELECT name FROM users WHERE user_id = {STAR}")).await?, ["u42"]);
        Ok(())
    }

    async fn is_on(&self, shard: &str) -> Result<()> {
        let found = route(&self.tier, &format!("SELECT * FROM orders WHERE user_id = {STAR}")).await?;
        assert!(found.contains(&format!("={shard}")), "{found}");
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_celebrity_moves_alone_and_comes_back() -> Result<()> {
    let stage = stage().await?;
    let Stage { tier, client, console, slot, home, other } = &stage;
    let [here, there] = [*home, *other].map(|shard| tier.shards[shard].name.clone());
    let isolate = format!("ISOLATE KEY '{STAR}' TYPE bigint TO {there}");
    let untyped = console.simple_query(&format!("RESHARD PLAN ISOLATE KEY {STAR} TO {there}")).await;
    assert_eq!(
        untyped.expect_err("tables have keys of two types").code().map(tokio_postgres::error::SqlState::code),
        Some("42804")
    );
    let plan = rows(console, &format!("RESHARD PLAN {isolate}")).await?;
    let step = plan.iter().find(|row| row.get("what") == Some("move")).context("a step")?;
    assert_eq!((step.get("rows"), step.get("slots"), step.get("note")), (Some("101"), Some("0"), Some("key 42")));
    rows(console, &format!("RESHARD START {isolate}")).await?;
    let row = reaches(console, "ready").await?;
    assert_eq!((row.get("key"), row.get("rows")), (Some("42"), Some("101")));
    stage.all_are_there().await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    stage.all_are_there().await?;
    stage.is_on(&there).await?;
    // Nobody can write it where it was, nor go on writing there its neighbour's rows elsewhere.
    let direct = tier.shards[*home].primary.admin("shop").await?;
    let error = direct.batch_execute(&format!("UPDATE users SET name = 'x' WHERE user_id = {STAR}")).await;
    assert_eq!(error.expect_err("refused").code().map(|code| code.code().to_owned()).as_deref(), Some("40001"));
    order(console, "RESHARD ROLLBACK").await?;
    reaches(console, "rolled_back").await?;
    assert_eq!(isolated(console).await?, []);
    stage.is_on(&here).await?;
    nothing_is_left(tier).await?;

    order(console, &format!("RESHARD START {isolate}")).await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    assert_eq!(isolated(console).await?, [("42".to_owned(), there.clone())]);
    let found = of_slot(tier, *slot).await?;
    assert!(found[*other] == ["42"] && found[*home].len() == 1, "{found:?}");
    stage.all_are_there().await?;
    assert!(doctor(tier, &[])?.contains("Nothing is left of any move"));

    // COPY deals it to where it is now.
    client.execute("DELETE FROM orders WHERE user_id = $1 AND total_cents <= 10", &[&STAR]).await?;
    let sink = client.copy_in("COPY orders (user_id, order_id, status, total_cents) FROM STDIN").await?;
    futures_util::pin_mut!(sink);
    for number in 1..=10 {
        let line = format!("{STAR}\t00000000-0000-0000-0000-00000000000{number:x}\tnew\t{number}\n");
        futures_util::SinkExt::send(&mut sink, bytes::Bytes::from(line)).await?;
    }
    sink.finish().await?;
    let there = tier.shards[*other].primary.admin("shop").await?;
    assert_eq!(column(&there, &format!("SELECT count(*) FROM orders WHERE user_id = {STAR}")).await?, ["100"]);
    order(console, &format!("RESHARD START RELEASE KEY {STAR} TYPE bigint")).await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    assert_eq!(isolated(console).await?, []);
    let found = of_slot(tier, *slot).await?;
    assert!(found[*other].is_empty() && found[*home].len() == 2, "{found:?}");
    stage.all_are_there().await?;
    nothing_is_left(tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_celebrity_gets_a_server_of_its_own_and_its_slot_moves_without_it() -> Result<()> {
    let stage = stage().await?;
    let Stage { tier, console, slot, home, other, .. } = &stage;
    let there = tier.shards[*other].name.clone();
    let added = crate::reshard::empty_server(tier).await?;
    order(console, &format!("RESHARD START ISOLATE KEY {STAR} TYPE bigint TO star AT '127.0.0.1:{}'", added.port()))
        .await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    let direct = added.admin("shop").await?;
    assert_eq!(column(&direct, "SELECT user_id FROM users").await?, ["42"]);
    assert_eq!(column(&direct, "SELECT count(*) FROM orders").await?, ["100"]);
    stage.all_are_there().await?;

    order(console, &format!("RESHARD START MOVE SLOTS {slot} TO {there}")).await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    stage.all_are_there().await?;
    stage.is_on("star").await?;
    let found = of_slot(tier, *slot).await?;
    assert!(found[*other].len() == 1 && found[*home].is_empty(), "{found:?}");

    // Gone with its server's shard it is where its slot is now.
    order(console, "RESHARD START REMOVE SHARD star").await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    assert_eq!(of_slot(tier, *slot).await?[*other].len(), 2);
    crate::freshness::until(async || {
        let states = rows(console, "SHOW SHARDS").await?;
        Ok(states.iter().any(|row| row.get("state") == Some("retired")))
    })
    .await?;
    drop(direct);
    added.kill9();
    stage.all_are_there().await?;
    nothing_is_left(tier).await
}
