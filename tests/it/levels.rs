//! How fresh reads are where somebody asks for less than strictness: by configuration, session or statement.
//!
//! A replica whose replay is paused is the witness: what shows less than the last write was read there.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_harness::Tier;
use weir_wire::backend::tag;
use weir_wire::frontend::put_query;

use crate::freshness::{replica_reads, until};
use crate::placement::{column, create_schema};
use crate::raw::Raw;

const READ: &str = "SELECT name FROM users WHERE user_id = 1";

/// One shard with a replica that shows user 1 as `before` and will show nothing newer, while the primary says `after`.
async fn paused(config: &str) -> Result<(Tier, Client)> {
    let tier =
        Tier::builder().shards(1).replicas(1).config_extra("[cache]\nenabled = false").config_extra(config).start();
    let tier = tier.await?;
    let writer = tier.connect().await?;
    create_schema(&writer).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (1, 'before'), (2, 'quiet')", &[]).await?;
    let replica = &tier.shards[0].replicas[0];
    replica.catch_up().await?;
    replica.pause_replay().await?;
    writer.execute("UPDATE users SET name = 'after' WHERE user_id = 1", &[]).await?;
    Ok((tier, writer))
}

fn hinted(level: &str) -> String {
    format!("/* weir: freshness={level} */ {READ}")
}

/// Until the replica answers a read, once the proxy knows that it is there.
async fn reads(client: &Client, sql: &str, value: &str) -> Result<()> {
    until(async || Ok(column(client, sql).await? == [value])).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hint_chooses_the_level_of_one_statement() -> Result<()> {
    let (tier, writer) = paused("").await?;
    let reader = tier.connect().await?;
    // Any server: the replica, as soon as it is known to be there.
    reads(&reader, &hinted("any"), "before").await?;
    assert_eq!(column(&reader, READ).await?, ["after"], "the same statement without a hint is strict");
    assert_eq!(column(&reader, &format!("{READ} /*weir_freshness='any'*/")).await?, ["before"]);
    assert_eq!(column(&reader, &format!("{READ} -- weir: freshness=any")).await?, ["before"]);
    // Prepared statements carry their hint along.
    let loose = reader.prepare(&format!("{} OR user_id = $1", hinted("any"))).await?;
    let strict = reader.prepare(&format!("{READ} OR user_id = $1")).await?;
    for (statement, value) in [(&loose, "before"), (&strict, "after"), (&loose, "before")] {
        assert_eq!(reader.query_one(statement, &[&1_i64]).await?.get::<_, String>(0), value);
    }
    // A session that has written nothing may read it; one that has may not. (What ran before the catalogue was read again after
    // DDL counts as written.)
    assert_eq!(column(&tier.connect().await?, &hinted("session")).await?, ["before"]);
    for _ in 0..20 {
        assert_eq!(column(&writer, &hinted("session")).await?, ["after"], "not older than its own write");
    }
    // What it says to weir changes nothing for Postgres, also inside a transaction.
    reader.batch_execute("BEGIN").await?;
    assert_eq!(column(&reader, &hinted("any")).await?, ["after"], "in a transaction the primary answers");
    reader.batch_execute("COMMIT").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_may_lag_as_far_as_was_said_and_no_further() -> Result<()> {
    let (tier, writer) = paused("").await?;
    let reader = tier.connect().await?;
    reads(&reader, &hinted("any"), "before").await?;
    // An hour is granted: all that was acknowledged an hour ago is there. A second is not, once one has passed.
    reads(&reader, &hinted("lag<=60min"), "before").await?;
    reads(&reader, &hinted("lag <= 1s"), "after").await?;
    for round in 0..20 {
        let name = format!("after {round}");
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        assert_eq!(column(&reader, &hinted("lag <= 1s")).await?, [name]);
    }
    // When replay goes on, it serves again: also a short lag, and also while nothing is written.
    tier.shards[0].replicas[0].resume_replay().await?;
    tier.shards[0].replicas[0].catch_up().await?;
    let before = replica_reads(&tier).await?;
    until(async || {
        assert_eq!(column(&reader, &hinted("lag<=500ms")).await?, ["after 19"]);
        Ok(replica_reads(&tier).await? > before + 10)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn session_role_and_database_choose_too_and_the_nearer_one_wins() -> Result<()> {
    let (tier, _writer) = paused("[database.shop]\nfreshness = 'session'\n[user.shop]\nfreshness = 'any'").await?;
    let reader = tier.connect().await?;
    reads(&reader, READ, "before").await?;
    reader.batch_execute("SET weir.freshness = 'strict'").await?;
    assert_eq!(column(&reader, READ).await?, ["after"], "the session wins over the role");
    assert_eq!(column(&reader, "SHOW weir.freshness").await?, ["strict"]);
    assert_eq!(column(&reader, &hinted("any")).await?, ["before"], "the statement wins over the session");
    reader.batch_execute("RESET weir.freshness").await?;
    assert_eq!(column(&reader, READ).await?, ["before"]);
    reader.batch_execute("SET weir.freshness TO 'lag <= 100ms'").await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(column(&reader, READ).await?, ["after"]);
    // In the connection string, as any setting.
    let other = weir_harness::connect(&format!("{}?options=-c%20weir.freshness%3Dstrict", tier.dsn("shop"))).await?;
    assert_eq!(column(&other, READ).await?, ["after"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_of_a_replica_are_passed_on_as_they_come() -> Result<()> {
    let (tier, writer) = paused("").await?;
    let reader = tier.connect().await?;
    reads(&reader, &hinted("any"), "before").await?;
    let large = "SELECT repeat(name, 100) FROM users, generate_series(1, 20000) WHERE user_id = 1";
    let before = replica_reads(&tier).await?;
    for _ in 0..3 {
        let rows = column(&reader, &format!("/* weir: freshness=any */ {large}")).await?;
        assert_eq!(rows.len(), 20_000);
        assert!(rows.iter().all(|row| *row == "before".repeat(100)));
    }
    assert_eq!(replica_reads(&tier).await?, before + 3);
    assert!(column(&reader, large).await?.iter().all(|row| *row == "after".repeat(100)));
    // An error half-way is the client's, and the session goes on.
    let fails =
        "/* weir: freshness=any */ SELECT repeat('x', 1000), 1 / (500 - n) FROM users, generate_series(1, 1000) n";
    let error = reader.simple_query(fails).await.expect_err("division by zero");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("22012"));
    assert_eq!(column(&reader, &hinted("any")).await?, ["before"]);
    drop(writer);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_understood_is_said() -> Result<()> {
    let (tier, _writer) = paused("").await?;
    let (mut raw, mut told) = (Raw::login(&tier.dsn("shop"), &[]).await?, Vec::new());
    for sql in [hinted("soon"), "/* weir: colour=blue */ SELECT 1".to_owned(), READ.to_owned()] {
        put_query(&mut raw.out, &sql);
        raw.flush().await?;
        let mut notices = 0;
        loop {
            match raw.next().await?.0 {
                tag::READY => break,
                kind => notices += usize::from(kind == tag::NOTICE),
            }
        }
        told.push(notices);
    }
    assert_eq!(told, [1, 0, 0], "once in a session");
    let reader = tier.connect().await?;
    reads(&reader, &hinted("any"), "before").await?;
    assert_eq!(column(&reader, &hinted("soon")).await?, ["after"], "and it is read strictly");
    let error = reader.batch_execute("SET weir.freshness = 'soon'").await.expect_err("no level");
    let error = error.as_db_error().context("an answer")?;
    assert_eq!(error.code().code(), "22023");
    assert!(error.hint().is_some_and(|hint| hint.contains("lag <= 500ms")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_route_and_metrics_say_who_answers_and_why() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).config_extra("[cache]\nenabled = false").start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.execute("INSERT INTO users (user_id, name) VALUES (1, 'before')", &[]).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let item = async |sql: &str, name: &str| {
        let rows = console.simple_query(&format!("ROUTE $${sql}$$")).await?;
        let found = rows.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) if row.get(0) == Some(name) => row.get(1).map(str::to_owned),
            _ => None,
        });
        found.with_context(|| format!("no {name} in ROUTE"))
    };
    assert!(item(READ, "freshness").await?.starts_with("strict, configured for the database"));
    assert_eq!(item(&hinted("lag<=2s"), "freshness").await?, "lag <= 2000ms, said by the statement's hint");
    until(async || Ok(item(&hinted("any"), "answered_by").await?.starts_with("replica 127.0.0.1:"))).await?;
    assert!(item("SELECT count(*) FROM users", "answered_by").await?.starts_with("the primaries"));
    client.batch_execute("SET weir.freshness = 'any'").await?;
    let plan = column(&client, &format!("EXPLAIN {READ}")).await?.join("\n");
    assert!(plan.contains("freshness: any, set by the session") && plan.contains("answered_by: replica 127"), "{plan}");
    client.batch_execute("RESET weir.freshness").await?;
    for replica in tier.shards.iter().flat_map(|shard| &shard.replicas) {
        replica.pause_replay().await?;
    }
    client.execute("UPDATE users SET name = 'after' WHERE user_id = 1", &[]).await?;
    until(async || {
        assert_eq!(column(&client, READ).await?, ["after"]);
        Ok(item(READ, "answered_by").await? == "the primary: no replica is known to have replayed far enough")
    })
    .await?;
    let (_, page) = tier.http_get("/metrics").await?;
    // Known to be behind, or waited for in vain.
    let tells = |line: &&str| line.contains("behind\"") || line.contains("\"waited_in_vain\"");
    let behind = page.lines().filter(|line| line.starts_with("weir_primary_reads_total{")).filter(tells);
    let behind: u64 = behind.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
    assert!(behind > 0, "{page}");
    Ok(())
}
