//! Session state in transaction pooling: never lost, never seen by another client.

use anyhow::Result;
use weir_harness::Tier;

use crate::placement::column;
use crate::raw::Raw;

/// One Backend for everybody: whatever leaks is seen at once.
async fn narrow() -> Result<Tier> {
    Tier::builder().shards(1).config_extra("[pool]\nsize = 1").start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_follow_their_session_and_nobody_else() -> Result<()> {
    let tier = narrow().await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    let usual = column(&other, "SHOW timezone").await?;
    one.batch_execute("SET timezone TO 'Asia/Tokyo'").await?;
    one.batch_execute("SET search_path TO pg_catalog, public").await?;
    for _ in 0..3 {
        assert_eq!(column(&other, "SHOW timezone").await?, usual);
        assert_eq!(column(&one, "SHOW timezone").await?, ["Asia/Tokyo"]);
        assert_eq!(column(&one, "SHOW search_path").await?, ["pg_catalog, public"]);
    }
    // What a rolled-back transaction set is gone, what a committed one set stays.
    one.batch_execute("BEGIN").await?;
    one.batch_execute("SET timezone TO 'UTC'").await?;
    one.batch_execute("ROLLBACK").await?;
    column(&other, "SELECT 1").await?;
    assert_eq!(column(&one, "SHOW timezone").await?, ["Asia/Tokyo"]);
    one.batch_execute("BEGIN").await?;
    one.batch_execute("SET LOCAL timezone TO 'Europe/Paris'").await?;
    assert_eq!(column(&one, "SHOW timezone").await?, ["Europe/Paris"]);
    one.batch_execute("COMMIT").await?;
    assert_eq!(column(&one, "SHOW timezone").await?, ["Asia/Tokyo"]);
    one.batch_execute("RESET timezone").await?;
    assert_eq!(column(&one, "SHOW timezone").await?, usual);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_settings_hold_for_the_whole_session() -> Result<()> {
    let tier = narrow().await?;
    let dsn = tier.dsn("shop");
    let mut one = Raw::login(
        &dsn,
        &[("application_name", "till"), ("options", "-c statement_timeout=7s"), ("DateStyle", "German")],
    )
    .await?;
    let mut other = Raw::login(&dsn, &[]).await?;
    assert!(
        one.parameters.iter().any(|(name, value)| name == "DateStyle" && value.starts_with("German")),
        "reported as in force"
    );
    for _ in 0..3 {
        assert_eq!(one.query("SHOW statement_timeout").await?.1, ["7s"]);
        assert_eq!(one.query("SHOW application_name").await?.1, ["till"]);
        assert_eq!(other.query("SHOW statement_timeout").await?.1, ["0"]);
    }
    assert!(
        Raw::login(&dsn, &[("DateStyle", "no such style")]).await.is_err(),
        "a bad setting ends the login, as in Postgres"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn state_that_cannot_be_replayed_pins_and_dies_with_the_session() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 3").start().await?;
    let one = tier.connect().await?;
    one.batch_execute("CREATE TEMP TABLE scratch (x int)").await?;
    one.batch_execute("INSERT INTO scratch VALUES (1)").await?;
    let other = tier.connect().await?;
    assert!(other.batch_execute("SELECT * FROM scratch").await.is_err());
    assert_eq!(column(&one, "SELECT x FROM scratch").await?, ["1"]);
    assert_eq!(column(&one, "SELECT pg_try_advisory_lock(7)").await?, ["t"]);
    assert_eq!(column(&other, "SELECT pg_try_advisory_lock(7)").await?, ["f"], "held by the other session");
    drop(one);
    // The pinned connections close with their sessions; the lock is free and the table is gone.
    for _ in 0..100 {
        if column(&other, "SELECT pg_try_advisory_lock(7)").await? == ["t"] {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    anyhow::bail!("the lock of a session that has ended is still held");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_statement_may_leave_a_lock_that_nobody_else_gets() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 3").start().await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    // Volatile, so Postgres takes the lock before it divides; session locks outlive the error.
    assert!(one.simple_query("SELECT 1 / (length(pg_advisory_lock(8)::text) * 0)").await.is_err());
    assert_eq!(column(&other, "SELECT pg_try_advisory_lock(8)").await?, ["f"], "still held by the session that failed");
    assert_eq!(column(&one, "SELECT pg_advisory_unlock(8)").await?, ["t"]);
    assert_eq!(column(&other, "SELECT pg_try_advisory_lock(8)").await?, ["t"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_statements_work_on_any_backend() -> Result<()> {
    let tier = narrow().await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    one.batch_execute("CREATE TABLE item (id int PRIMARY KEY, name text)").await?;
    let insert = one.prepare("INSERT INTO item VALUES ($1, $2)").await?;
    let select = other.prepare("SELECT * FROM item WHERE id = $1").await?;
    for id in 0..20_i32 {
        one.execute(&insert, &[&id, &"x"]).await?;
        assert_eq!(other.query(&select, &[&id]).await?.len(), 1);
    }
    one.batch_execute("DEALLOCATE ALL").await?;
    assert_eq!(other.query(&select, &[&1]).await?.len(), 1, "another session's statements are its own");
    // After DDL a new session never sees "cached plan must not change result type".
    one.batch_execute("ALTER TABLE item ADD COLUMN price int DEFAULT 5").await?;
    let fresh = tier.connect().await?;
    let row = fresh.query_one("SELECT * FROM item WHERE id = $1", &[&1_i32]).await?;
    assert_eq!(row.len(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn discard_all_leaves_a_clean_session() -> Result<()> {
    let tier = narrow().await?;
    let one = tier.connect().await?;
    one.batch_execute("SET work_mem TO '7MB'").await?;
    one.batch_execute("CREATE TEMP TABLE scratch (x int)").await?;
    one.batch_execute("DISCARD ALL").await?;
    assert_ne!(column(&one, "SHOW work_mem").await?, ["7MB"]);
    // The one Backend is free again for others.
    let other = tier.connect().await?;
    assert_eq!(column(&other, "SELECT 1").await?, ["1"]);
    assert_ne!(column(&other, "SHOW work_mem").await?, ["7MB"]);
    Ok(())
}
