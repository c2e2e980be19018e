//! What is done with stored answers besides serving them: how they lie in Redis, which tables have none, and FLUSH.

use anyhow::{Context as _, Result};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::Tier;

use crate::fleet::{name_of, warm};
use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};

async fn write_name(client: &Client, user: i64, name: &str) -> Result<()> {
    client.execute("UPDATE users SET name = $1 WHERE user_id = $2", &[&name, &user]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn long_answers_lie_compressed_in_redis_and_come_out_as_they_were() -> Result<()> {
    let tier = Tier::builder().shards(2).redis(true).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    // One proxy takes over the other's stamps in its own time, and asks Redis only for what it has never had.
    let mut user = 0_i64;
    until(async || {
        user += 1;
        let name = format!("Ann {user} ").repeat(2000);
        here.execute("INSERT INTO users (user_id, name) VALUES ($1, $2)", &[&user, &name]).await?;
        warm(tier.proxy(), &here, user).await?;
        let before = cache_figure(&other, "hits_redis").await?;
        assert_eq!(name_of(&there, user).await?, name);
        Ok(cache_figure(&other, "hits_redis").await? > before)
    })
    .await?;
    assert!(cache_figure(tier.proxy(), "redis_compressed").await? > 0);
    assert!(cache_figure(tier.proxy(), "redis_bytes_spared").await? > 10_000);
    // Short ones are left alone.
    let compressed = cache_figure(tier.proxy(), "redis_compressed").await?;
    write_name(&here, user, "Bea").await?;
    warm(tier.proxy(), &here, user).await?;
    assert_eq!(name_of(&there, user).await?, "Bea");
    assert_eq!(cache_figure(tier.proxy(), "redis_compressed").await?, compressed);
    Ok(())
}

/// One shard with the tables `secrets`, which is never cached, and `notes`.
async fn with_policy() -> Result<(Tier, Client)> {
    let table = |name: &str, more: &str| {
        format!(
            "[[database.shop.table]]\nname = \"{name}\"\nkind = \"sharded\"\nkey = \"id\"\ntype = \"bigint\"\n{more}\n"
        )
    };
    let tables = table("secrets", "cache = \"never\"") + &table("notes", "cache = \"auto\"");
    let tier = Tier::builder().shards(2).config_extra(&tables).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE secrets (id bigint PRIMARY KEY, what text)").await?;
    client.batch_execute("CREATE TABLE notes (id bigint PRIMARY KEY, what text)").await?;
    client.execute("INSERT INTO secrets VALUES (1, 'one')", &[]).await?;
    client.execute("INSERT INTO notes VALUES (1, 'uno')", &[]).await?;
    Ok((tier, client))
}

/// What ROUTE says about the cache.
async fn verdict(tier: &Tier, sql: &str) -> Result<String> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    for message in console.simple_query(&format!("ROUTE shop '{sql}'")).await? {
        if let SimpleQueryMessage::Row(row) = message
            && row.get(0) == Some("cache")
        {
            return Ok(row.get(1).context("a verdict")?.to_owned());
        }
    }
    anyhow::bail!("no verdict")
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_and_statements_may_ask_not_to_be_cached() -> Result<()> {
    let (tier, client) = with_policy().await?;
    let notes = "SELECT what FROM notes WHERE id = 1";
    until(async || {
        let before = cache_figure(tier.proxy(), "hits_memory").await?;
        assert_eq!(column(&client, notes).await?, ["uno"]);
        Ok(cache_figure(tier.proxy(), "hits_memory").await? > before)
    })
    .await?;
    let hits = cache_figure(tier.proxy(), "hits_memory").await?;
    let stored = cache_figure(tier.proxy(), "stored").await?;
    let secrets = "SELECT what FROM secrets WHERE id = 1";
    let both = "SELECT n.what || s.what FROM notes n JOIN secrets s ON s.id = n.id WHERE n.id = 1";
    let within = "SELECT what FROM notes WHERE id = 1 AND id IN (SELECT id FROM secrets WHERE id = 1)";
    let hinted = format!("/* weir: cache=never */ {notes}");
    let prepared = client.prepare(&format!("{hinted} OR id = $1 AND id = 1")).await?;
    for _ in 0..20 {
        assert_eq!(column(&client, secrets).await?, ["one"]);
        assert_eq!(column(&client, both).await?, ["unoone"]);
        assert_eq!(column(&client, within).await?, ["uno"]);
        assert_eq!(column(&client, &hinted).await?, ["uno"]);
        assert_eq!(client.query(&prepared, &[&1_i64]).await?[0].get::<_, String>(0), "uno");
    }
    assert_eq!(cache_figure(tier.proxy(), "hits_memory").await?, hits, "none of these was answered from the cache");
    assert_eq!(cache_figure(tier.proxy(), "stored").await?, stored, "or kept");
    assert_eq!(cache_figure(tier.proxy(), "uncacheable_policy").await?, 60);
    assert!(cache_figure(tier.proxy(), "uncacheable_hint").await? >= 20);
    assert!(verdict(&tier, secrets).await?.contains("cache = \"never\""));
    assert!(verdict(&tier, both).await?.contains("cache = \"never\""));
    assert!(verdict(&tier, &hinted).await?.contains("hint"));
    assert_eq!(verdict(&tier, notes).await?, "cacheable");
    Ok(())
}

/// Writes past weir, on whichever shard has the rows.
async fn write_beside(tier: &Tier, name: &str) -> Result<()> {
    for shard in &tier.shards {
        shard.primary.admin("shop").await?.execute("UPDATE users SET name = $1", &[&name]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_answers_are_void_in_every_proxy_and_in_redis() -> Result<()> {
    // What is written beside weir stays unseen, so that it shows whose answers are void.
    let unseen = "[cache]\ndecoding = \"off\"\nmax_age = \"10m\"";
    let tier = Tier::builder().shards(2).redis(true).peers(true).config_extra(unseen).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'first'), (2, 'first')", &[]).await?;
    let all_are = async |user: i64, name: &str| {
        for client in [&here, &there].repeat(10) {
            assert_eq!(name_of(client, user).await?, name, "user {user}");
        }
        anyhow::Ok(())
    };
    let cached_is = async |user: i64, name: &str| {
        for client in [&here, &there] {
            until(async || Ok(name_of(client, user).await? == name)).await?;
        }
        anyhow::Ok(())
    };
    let warm_both = async || {
        for user in [1, 2] {
            warm(tier.proxy(), &here, user).await?;
            warm(&other, &there, user).await?;
        }
        anyhow::Ok(())
    };
    warm_both().await?;
    write_beside(&tier, "second").await?;
    cached_is(1, "first").await?;
    console.batch_execute("FLUSH KEY users 1").await?;
    all_are(1, "second").await?;
    cached_is(2, "first").await?;
    console.batch_execute("flush table public.\"users\";").await?;
    all_are(2, "second").await?;

    let mut name = "second".to_owned();
    for command in ["FLUSH", "FLUSH shop", "FLUSH TABLE users"] {
        warm_both().await?;
        let next = format!("{name}, then {command}");
        write_beside(&tier, &next).await?;
        cached_is(1, &name).await?;
        // From the other proxy, in the extended protocol.
        weir_harness::connect(&other.admin_dsn()).await?.execute(command, &[]).await?;
        all_are(1, &next).await?;
        all_are(2, &next).await?;
        name = next;
    }
    for (command, sqlstate) in [
        ("FLUSH TABLE nowhere", "42P01"),
        ("FLUSH KEY products 1", "42809"),
        ("FLUSH KEY users one", "22P02"),
        ("FLUSH nowhere", "3D000"),
        ("FLUSH KEY users", "42601"),
    ] {
        let refused = console.batch_execute(command).await.expect_err(command);
        assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some(sqlstate), "{command}");
    }
    Ok(())
}
