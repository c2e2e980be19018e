//! Many equal reads that miss the cache at once cost the server one statement. The server's log is the witness.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};

/// Takes a server about a second, and may be cached.
pub const SLOW: &str = "SELECT count(*) FROM users, generate_series(1, 4000000)";

async fn tier() -> Result<Tier> {
    let tier = Tier::builder().shards(1).log_statements(true).config_extra("[pool]\nsize = 100").start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.batch_execute("INSERT INTO users (user_id, name) VALUES (1, 'one')").await?;
    // Until the catalogue has been read again after DDL, nothing is cached.
    until(async || {
        column(&client, "SELECT name FROM users WHERE user_id = 1").await?;
        Ok(cache_figure(tier.proxy(), "hit_local").await? > 0)
    })
    .await?;
    Ok(tier)
}

/// How often the server was asked.
pub fn asked(tier: &Tier, sql: &str) -> usize {
    tier.shards[0].primary.log().matches(sql).count()
}

/// `count` sessions ask at the same moment.
async fn all_at_once(tier: &Tier, count: usize, sql: &'static str) -> Result<JoinSet<Result<Vec<String>>>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(tier.connect().await?);
    }
    Ok(ask_at_once(clients, sql))
}

/// These ask at the same moment.
pub fn ask_at_once(clients: Vec<Client>, sql: &'static str) -> JoinSet<Result<Vec<String>>> {
    let start = Arc::new(Barrier::new(clients.len()));
    let mut sessions = JoinSet::new();
    for client in clients {
        let start = Arc::clone(&start);
        sessions.spawn(async move {
            start.wait().await;
            column(&client, sql).await
        });
    }
    sessions
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_misses_at_once_are_one_statement() -> Result<()> {
    let tier = tier().await?;
    let mut sessions = all_at_once(&tier, 1000, SLOW).await?;
    while let Some(answer) = sessions.join_next().await {
        assert_eq!(answer??, ["4000000"]);
    }
    assert_eq!(asked(&tier, SLOW), 1, "the server's log");
    let (shared, hits) =
        (cache_figure(tier.proxy(), "hit_coalesced").await?, cache_figure(tier.proxy(), "hit_local").await?);
    assert!(shared > 0 && shared + hits >= 999, "{shared} waited, {hits} came late");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_followed_a_leader_that_died_asks_for_itself() -> Result<()> {
    let tier = tier().await?;
    let leader = tier.connect().await?;
    let token = leader.cancel_token();
    let leading = tokio::spawn(async move { column(&leader, SLOW).await });
    until(async || Ok(asked(&tier, SLOW) == 1)).await?;
    let mut followers = all_at_once(&tier, 5, SLOW).await?;
    // A follower can be cancelled while it waits.
    let impatient = tier.connect().await?;
    let impatience = impatient.cancel_token();
    let waiting = tokio::spawn(async move { column(&impatient, SLOW).await });
    let cancelled = |answer: Result<Vec<String>>| {
        let error = answer.expect_err("cancelled");
        let error = error.downcast_ref::<tokio_postgres::Error>().and_then(|error| error.code().cloned());
        assert_eq!(error, Some(tokio_postgres::error::SqlState::QUERY_CANCELED));
    };
    // A cancel that comes before it has begun is forgotten, as on Postgres.
    let mut waiting = waiting;
    let answer = loop {
        impatience.cancel_query(tokio_postgres::NoTls).await?;
        if let Ok(answer) = tokio::time::timeout(Duration::from_millis(50), &mut waiting).await {
            break answer?;
        }
    };
    cancelled(answer);
    token.cancel_query(tokio_postgres::NoTls).await?;
    cancelled(leading.await?);
    while let Some(answer) = followers.join_next().await {
        assert_eq!(answer??, ["4000000"], "the followers were not cancelled with it");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_parts_those_before_it_from_those_after() -> Result<()> {
    let tier = tier().await?;
    let (early, writer, late) = (tier.connect().await?, tier.connect().await?, tier.connect().await?);
    let early = tokio::spawn(async move { column(&early, SLOW).await });
    until(async || Ok(asked(&tier, SLOW) == 1)).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (2, 'two')", &[]).await?;
    assert_eq!(column(&late, SLOW).await?, ["8000000"], "not what was read before the write");
    assert_eq!(early.await??, ["4000000"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_to_share_is_waited_for_once() -> Result<()> {
    const LARGE: &str = "SELECT repeat(name, 1000) FROM users, generate_series(1, 1000)";
    let tier = tier().await?;
    for round in 1..=2 {
        let mut sessions = all_at_once(&tier, 10, LARGE).await?;
        while let Some(answer) = sessions.join_next().await {
            assert_eq!(answer??.len(), 1000);
        }
        assert_eq!(asked(&tier, LARGE), 10 * round);
    }
    assert_eq!(cache_figure(tier.proxy(), "hit_coalesced").await?, 0);
    assert!(cache_figure(tier.proxy(), "fill_too_large").await? >= 10);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_before_every_read_is_soon_kept_no_more() -> Result<()> {
    const READ: &str = "SELECT name FROM users WHERE user_id = 1";
    let tier = tier().await?;
    let client = tier.connect().await?;
    let write = client.prepare("UPDATE users SET name = $1 WHERE user_id = 1").await?;
    for round in 0..200 {
        let name = round.to_string();
        client.execute(&write, &[&name]).await?;
        // Until the write has its position nothing is kept anyhow.
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(column(&client, READ).await?, [name]);
    }
    assert!(cache_figure(tier.proxy(), "fill_write_hot").await? > 50);
    // Read again and again without a write, it is kept again.
    let before = cache_figure(tier.proxy(), "hit_local").await?;
    for _ in 0..200 {
        assert_eq!(column(&client, READ).await?, ["199"]);
    }
    assert!(cache_figure(tier.proxy(), "hit_local").await? - before > 150);
    Ok(())
}
