//! How rows come to their new shard: in pieces, within limits, and indexes after them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio_postgres::{Client, SimpleQueryRow};
use weir_harness::Tier;

use super::{SLOTS, USERS, all_reach, filled, nothing_is_left, order, reaches, rows};
use crate::placement::column;

const INDEXES: &str =
    "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'users'::regclass AND indisvalid ORDER BY 1";

/// The line of a move.
async fn line(console: &Client, id: &str) -> Result<SimpleQueryRow> {
    rows(console, "SHOW MOVES").await?.into_iter().find(|row| row.get("id") == Some(id)).context("no such move")
}

/// Waits until the line of a move has these values.
async fn shows(console: &Client, id: &str, values: &[(&str, &str)]) -> Result<SimpleQueryRow> {
    let (begun, mut last) = (Instant::now(), None);
    while begun.elapsed() < Duration::from_secs(120) {
        // What was just begun is not shown at once.
        if let Ok(row) = line(console, id).await {
            if values.iter().all(|(column, value)| row.get(*column).unwrap_or("-") == *value) {
                return Ok(row);
            }
            last = Some(row);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("the line of move {id} does not show {values:?}: {last:?}")
}

/// While this is open no replication slot is made, so that a move stays at the beginning of its copy.
async fn hold(source: &Client) -> Result<()> {
    Ok(source.batch_execute("BEGIN; SELECT pg_current_xact_id()").await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_of_a_new_shard_are_made_when_all_rows_are_there() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let client = tier.connect().await?;
    for statement in [
        "CREATE INDEX users_by_name ON users (name) WHERE name <> ''",
        "CREATE UNIQUE INDEX users_once ON users (user_id, email)",
        "CREATE INDEX products_by_name ON products (name)",
    ] {
        client.batch_execute(statement).await?;
    }
    let holds = tier.shards[1].primary.admin("shop").await?;
    hold(&holds).await?;
    let added = crate::reshard::empty_server(&tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '{}'", added.address())).await?;
    shows(&console, "1", &[("phase", "index"), ("throttled_by", "copies of other moves")]).await?;
    let direct = added.admin("shop").await?;
    assert_eq!(column(&direct, INDEXES).await?, ["users_once", "users_pkey"]);
    assert_eq!(column(&direct, "SELECT count(*) FROM pg_class WHERE relname = 'products_by_name'").await?, ["1"]);
    // All statements for all shards go there, too, and changes come along.
    client.batch_execute("UPDATE users SET email = 'mail'").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE name <> ''").await?, [USERS.to_string()]);
    holds.batch_execute("COMMIT").await?;
    all_reach(&console, "ready").await?;
    assert_eq!(column(&direct, INDEXES).await?, ["users_by_name", "users_once", "users_pkey"]);
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users WHERE email = 'mail'").await?, [USERS.to_string()]);
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_has_joined_gets_its_indexes_also_if_nothing_moves() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    tier.connect().await?.batch_execute("CREATE INDEX users_by_name ON users (name)").await?;
    let holds = tier.shards[0].primary.admin("shop").await?;
    hold(&holds).await?;
    let added = crate::reshard::empty_server(&tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '{}'", added.address())).await?;
    shows(&console, "1", &[("phase", "copy")]).await?;
    let direct = added.admin("shop").await?;
    assert_eq!(column(&direct, INDEXES).await?, ["users_pkey"]);
    order(&console, "RESHARD CANCEL").await?;
    holds.batch_execute("COMMIT").await?;
    all_reach(&console, "cancelled").await?;
    assert_eq!(column(&direct, INDEXES).await?, ["users_by_name", "users_pkey"]);
    nothing_is_left(&tier).await
}

/// About 10 MB that move, in many pages.
async fn filled_wide(tier: &Tier) -> Result<()> {
    filled(tier).await?;
    let source = tier.shards[0].primary.admin("shop").await?;
    let wide =
        "UPDATE users SET email = (SELECT string_agg(md5(user_id || '-' || n), '') FROM generate_series(1, 400) n);
                ALTER TABLE users ALTER email SET STORAGE EXTERNAL; ALTER TABLE users SET (toast_tuple_target = 8160)";
    Ok(source.batch_execute(wide).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_keeps_to_its_rate_and_stands_still_when_it_is_told_to() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled_wide(&tier).await?;
    let source = tier.shards[0].primary.admin("shop").await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    hold(&source).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "copy").await?;
    let said = std::process::Command::new(weir_harness::weir_binary()?)
        .args(["reshard", "throttle", "1", "--rate", "1MiB", "--weir", &tier.admin_dsn()])
        .output()?;
    ensure!(said.status.success(), "{said:?}");
    shows(&console, "1", &[("limits", "rate=1MiB, lag=10000ms, active=off, wal=off")]).await?;
    source.batch_execute("COMMIT").await?;
    let begun = Instant::now();
    shows(&console, "1", &[("throttled_by", "rate")]).await?;
    order(&console, "RESHARD PAUSE").await?;
    let row = shows(&console, "1", &[("throttled_by", "paused")]).await?;
    let (bytes, total): (i64, i64) =
        (row.get("bytes").context("bytes")?.parse()?, row.get("rows_total").context("rows")?.parse()?);
    assert!((100_000..8_000_000).contains(&bytes), "{bytes}");
    assert!(total > USERS / 5 && total < USERS * 4 / 5, "{total} rows were expected");
    order(&console, "RESHARD RESUME").await?;
    let row = reaches(&console, "ready").await?;
    let bytes: u32 = row.get("bytes").context("bytes")?.parse()?;
    let fastest = Duration::from_secs_f64(f64::from(bytes) / 1_048_576.0 - 0.5);
    assert!(bytes > 5_000_000 && begun.elapsed() >= fastest, "{bytes} bytes in {:?}", begun.elapsed());
    assert_eq!(row.get("rows"), row.get("rows_total"));
    // More WAL than it may keep: it lets go, and begins again when it is told to.
    rows(&console, "RESHARD THROTTLE shop MOVE 1 rate = off, wal = '1MiB'").await?;
    source.batch_execute("CREATE TABLE heap AS SELECT md5(n::text) FROM generate_series(1, 50000) n").await?;
    let row = shows(&console, "1", &[("paused", "t"), ("phase", "prepare")]).await?;
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'weir_move_1'";
    crate::freshness::until(async || Ok(column(&source, slots).await? == ["0"])).await?;
    assert!(row.get("notice").is_some_and(|said| said.contains("RESHARD RESUME begins again")), "{row:?}");
    rows(&console, "RESHARD THROTTLE wal = off").await?;
    order(&console, "RESHARD RESUME").await?;
    reaches(&console, "ready").await?;
    order(&console, "RESHARD CANCEL").await?;
    reaches(&console, "cancelled").await?;
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_waits_for_replicas_and_for_who_is_busy() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    filled(&tier).await?;
    let [source, target] = [&tier.shards[0].primary, &tier.shards[1].primary];
    let replica = &tier.shards[1].replicas[0];
    replica.catch_up().await?;
    replica.pause_replay().await?;
    target.admin("shop").await?.batch_execute("CREATE TABLE later (n int); DROP TABLE later").await?;
    let begun = Instant::now();
    let lag = async || anyhow::Ok(crate::promotion::shown(tier.proxy(), &replica.address(), "lag_ms").await?);
    while lag().await?.parse::<i64>().unwrap_or(0) < 11_000 {
        ensure!(begun.elapsed() < Duration::from_secs(120), "the replica does not lag");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "copy").await?;
    let held_by = |what| [("throttled_by", what), ("rows", "0"), ("phase", "copy")];
    shows(&console, "1", &held_by("replica lag")).await?;
    let busy = source.admin("shop").await?;
    let cancel = busy.cancel_token();
    let sleeps = tokio::spawn(async move { busy.batch_execute("SELECT pg_sleep(600)").await });
    rows(&console, "RESHARD THROTTLE lag = off, active = 1").await?;
    shows(&console, "1", &held_by("active statements")).await?;
    cancel.cancel_query(tokio_postgres::NoTls).await?;
    assert!(sleeps.await?.is_err());
    // weir itself asks the source now and then.
    rows(&console, "RESHARD THROTTLE active = 50").await?;
    reaches(&console, "ready").await?;
    replica.resume_replay().await?;
    order(&console, "RESHARD CANCEL").await?;
    reaches(&console, "cancelled").await?;
    nothing_is_left(&tier).await
}
