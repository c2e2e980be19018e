//! What applications do to a private connection, on a shared one: functions with side effects, numbers just drawn, tables that
//! change under the cache, servers that hang up.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::placement::column;

async fn tier(pool_size: u32) -> Result<Tier> {
    Tier::builder().shards(1).config_extra(&format!("[pool]\nsize = {pool_size}")).start().await
}

/// Every server connection of the pool as a session of its own sees it: none of them may answer anything else.
async fn everywhere(tier: &Tier, pool_size: usize, sql: &str) -> Result<Vec<Vec<String>>> {
    let mut clients: Vec<Client> = Vec::new();
    let mut answers = Vec::new();
    for _ in 0..pool_size {
        let client = tier.connect().await?;
        client.batch_execute("BEGIN").await?;
        answers.push(column(&client, sql).await?);
        clients.push(client);
    }
    Ok(answers)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_functions_leave_behind_stays_with_their_callers() -> Result<()> {
    let tier = tier(4).await?;
    let maker = tier.connect().await?;
    maker
        .batch_execute(
            "CREATE FUNCTION tune() RETURNS void LANGUAGE plpgsql AS 'BEGIN SET work_mem = ''9MB''; END';
             CREATE FUNCTION indirectly() RETURNS void LANGUAGE sql AS 'SELECT tune()';
             CREATE FUNCTION on_write() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN PERFORM set_config(''my.mark'', ''left'', false); RETURN new; END';
             CREATE TABLE marked (a int);
             CREATE TRIGGER mark BEFORE INSERT ON marked FOR EACH ROW EXECUTE FUNCTION on_write();",
        )
        .await?;
    drop(maker);
    let caller = tier.connect().await?;
    column(&caller, "SELECT indirectly()").await?;
    let writer = tier.connect().await?;
    writer.batch_execute("INSERT INTO marked VALUES (1)").await?;
    for answer in
        everywhere(&tier, 2, "SELECT current_setting('work_mem') || coalesce(current_setting('my.mark', true), '')")
            .await?
    {
        assert_eq!(answer, ["4MB"], "seen by another session");
    }
    assert_eq!(column(&caller, "SHOW work_mem").await?, ["9MB"], "lost by its own");
    assert_eq!(column(&writer, "SELECT current_setting('my.mark')").await?, ["left"], "lost by its own");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_just_drawn_are_ones_own() -> Result<()> {
    let tier = tier(4).await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    one.batch_execute("CREATE SEQUENCE s").await?;
    assert_eq!(column(&one, "SELECT nextval('s')").await?, ["1"]);
    assert_eq!(column(&other, "SELECT nextval('s')").await?, ["2"]);
    assert_eq!(column(&one, "SELECT currval('s')").await?, ["1"]);
    assert_eq!(column(&other, "SELECT lastval()").await?, ["2"]);
    // Since somebody asks, what a table draws is kept as well.
    one.batch_execute("CREATE TABLE numbered (id serial, a int)").await?;
    let (third, fourth) = (tier.connect().await?, tier.connect().await?);
    third.batch_execute("INSERT INTO numbered (a) VALUES (1)").await?;
    fourth.batch_execute("INSERT INTO numbered (a) VALUES (1)").await?;
    assert_eq!(column(&third, "SELECT lastval()").await?, ["1"]);
    assert_eq!(column(&fourth, "SELECT currval('numbered_id_seq')").await?, ["2"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_others_are_not_seen() -> Result<()> {
    // One connection for all: nextval() cannot keep it.
    let tier = tier(1).await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    one.batch_execute("CREATE SEQUENCE s").await?;
    column(&one, "SELECT nextval('s')").await?;
    let error = column(&other, "SELECT currval('s')").await.err().context("another session's number")?;
    assert!(format!("{error:#}").contains("not yet defined in this session"), "{error:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ddl_makes_true_holds_for_the_next_read() -> Result<()> {
    let tier = tier(4).await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    one.batch_execute(
        "CREATE TABLE seen (a int); INSERT INTO seen VALUES (1); CREATE TABLE cause (a int);
         CREATE VIEW through AS SELECT a FROM seen;",
    )
    .await?;
    for round in 2..30 {
        // Asked twice: once for the cache, once of it.
        column(&other, "SELECT a FROM seen").await?;
        column(&other, "SELECT a FROM seen").await?;
        one.batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION effect() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN UPDATE seen SET a = {round}; RETURN new; END'"
        ))
        .await?;
        one.batch_execute("CREATE TRIGGER effect BEFORE INSERT ON cause FOR EACH ROW EXECUTE FUNCTION effect()")
            .await?;
        one.batch_execute("INSERT INTO cause VALUES (1)").await?;
        assert_eq!(column(&other, "SELECT a FROM seen").await?, [round.to_string()]);
        assert_eq!(column(&other, "SELECT a FROM through").await?, [round.to_string()]);
        one.batch_execute("DROP TRIGGER effect ON cause").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ended_on_its_shelf_costs_nobody_a_statement() -> Result<()> {
    let tier = tier(4).await?;
    let client = tier.connect().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    for _ in 0..5 {
        column(&client, "SELECT 1").await?;
        let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'shop'";
        assert!(admin.query_one(ended, &[]).await?.get::<_, i64>(0) > 0);
        let left = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'shop'";
        while admin.query_one(left, &[]).await?.get::<_, i64>(0) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        column(&client, "SELECT 2").await.context("after its idle server connection was ended")?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_told_no_settings_of_weirs_own() -> Result<()> {
    let tier = tier(4).await?;
    let client = tier.connect().await?;
    assert_eq!(column(&client, "SHOW application_name").await?, [""]);
    Ok(())
}
