//! Partitioned tables, whose rows move partition by partition.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use futures_util::TryStreamExt as _;
use tokio_postgres::Client;
use weir_harness::{Tier, connect};

use super::{SLOTS, all_reach, nothing_is_left, nothing_is_left_on, order, reaches, rows};
use crate::placement::column;

const SCHEMA: &str = "
CREATE TABLE events (user_id bigint, day date, id bigint, note text, PRIMARY KEY (user_id, day, id)) PARTITION BY RANGE (day);
CREATE TABLE events_old PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2026-01-01');
CREATE TABLE events_new PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') PARTITION BY HASH (id);
CREATE TABLE events_new_0 PARTITION OF events_new FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE events_new_1 PARTITION OF events_new FOR VALUES WITH (MODULUS 2, REMAINDER 1)";

const LEAVES: [&str; 3] = ["events_old", "events_new_0", "events_new_1"];
const USERS: i64 = 600;

/// A tier with events of a year and a half.
async fn filled() -> Result<(Tier, Client, Client)> {
    let tier = Tier::builder().shards(2).tables(&["events(user_id bigint)"]).start().await?;
    let client = tier.connect().await?;
    for statement in SCHEMA.split(';') {
        client.batch_execute(statement).await?;
    }
    let fill = "INSERT INTO events SELECT n, date '2025-06-01' + (n % 540)::int, n * 10, 'first' FROM generate_series(1, $1::int8) n";
    client.execute(fill, &[&USERS]).await?;
    let console = connect(&tier.admin_dsn()).await?;
    Ok((tier, client, console))
}

/// Rows come, go, change, and change their partition; every shard that is asked answers for its own alone.
async fn changes(client: &Client, turn: i64) -> Result<()> {
    for user in (1 + turn..=USERS).step_by(5) {
        let sql = match user % 4 {
            0 => {
                "UPDATE events SET day = CASE WHEN day < '2026-01-01' THEN day + 180 ELSE day - 180 END WHERE user_id = $1"
            }
            1 => "UPDATE events SET note = note || '!', id = id + 1 WHERE user_id = $1",
            2 => "DELETE FROM events WHERE user_id = $1",
            _ => {
                "INSERT INTO events SELECT $1, '2026-06-01', max(id) + 7, 'more' FROM events WHERE user_id = $1 HAVING count(*) > 0"
            }
        };
        client.execute(sql, &[&user]).await.with_context(|| format!("{sql} of {user}"))?;
    }
    Ok(())
}

/// What weir shows is what the shards have that own it, each row once.
async fn all_are_there(client: &Client, directs: &[&Client]) -> Result<()> {
    let all = "SELECT concat_ws(' ', user_id, day, id, note) FROM events";
    let shown = column(client, all).await?;
    let mut kept = Vec::new();
    for direct in directs {
        kept.extend(column(direct, all).await?);
    }
    let distinct: BTreeSet<&String> = shown.iter().collect();
    ensure!(distinct.len() == shown.len() && !shown.is_empty(), "some rows are shown twice");
    ensure!(kept.len() == shown.len(), "{} are kept, {} shown", kept.len(), shown.len());
    ensure!(kept.iter().collect::<BTreeSet<_>>() == distinct, "kept are others than shown");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_partition_goes_along_there_and_back() -> Result<()> {
    let (tier, client, console) = filled().await?;
    let (source, target) = (tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?);
    let code = |error: tokio_postgres::Error| error.code().map(|code| code.code().to_owned());
    for end in ["rolled_back", "done"] {
        rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
        reaches(&console, "ready").await?;
        changes(&client, 0).await?;
        let mut truth = 0;
        for user in 1..=USERS {
            let one = client.query_one("SELECT count(*) FROM events WHERE user_id = $1", &[&user]).await?;
            truth += one.get::<_, i64>(0);
        }
        assert_eq!(
            column(&client, "SELECT count(*) FROM events").await?,
            [truth.to_string()],
            "with guests on a shard"
        );
        let emptied = client.batch_execute("TRUNCATE events_old").await.expect_err("rows of it are on their way");
        assert_eq!(code(emptied).as_deref(), Some("55006"));
        let detached = client.batch_execute("ALTER TABLE events DETACH PARTITION events_old").await;
        assert_eq!(code(detached.expect_err("rows of it are on their way")).as_deref(), Some("55006"));
        order(&console, "RESHARD CUTOVER").await?;
        reaches(&console, "reverse").await?;
        changes(&client, 1).await?;
        let stale = source.execute("UPDATE events SET note = 'stale'", &[]).await.expect_err("some it does not own");
        assert_eq!(code(stale).as_deref(), Some("40001"));
        order(&console, if end == "done" { "RESHARD COMPLETE" } else { "RESHARD ROLLBACK" }).await?;
        reaches(&console, end).await?;
        changes(&client, 2).await?;
        all_are_there(&client, &[&source, &target]).await.context(end)?;
        nothing_is_left(&tier).await?;
    }
    let left = "SELECT count(*) FROM events WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048";
    assert_eq!(column(&source, left).await?, ["0"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_shard_has_all_partitions_and_one_that_comes_meanwhile() -> Result<()> {
    let (tier, client, console) = filled().await?;
    let added = crate::reshard::empty_server(&tier).await?;
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '127.0.0.1:{}'", added.port())).await?;
    all_reach(&console, "ready").await?;
    client
        .batch_execute("CREATE TABLE events_next PARTITION OF events FOR VALUES FROM ('2027-01-01') TO (MAXVALUE)")
        .await?;
    let more = "INSERT INTO events SELECT n, '2027-05-05', 1, 'next' FROM generate_series(1, $1::int8) n";
    client.execute(more, &[&USERS]).await?;
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    changes(&client, 0).await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    let direct = added.admin("shop").await?;
    for leaf in LEAVES.iter().chain(&["events_next"]) {
        assert_eq!(column(&direct, &format!("SELECT count(*) > 20 FROM ONLY {leaf}")).await?, ["t"], "{leaf}");
    }
    let others = [tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?];
    all_are_there(&client, &[&others[0], &others[1], &direct]).await?;
    nothing_is_left(&tier).await?;
    nothing_is_left_on(&direct).await
}

/// What a partition has, by way of weir and on the shards.
async fn are_alike(client: &Client, directs: &[&Client], table: &str, wanted: i64) -> Result<()> {
    let shown: i64 = client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await?.get(0);
    let mut copied = 0;
    let rows = client.copy_out(&format!("COPY (SELECT * FROM {table}) TO STDOUT")).await.context("COPY")?;
    for piece in rows.try_collect::<Vec<_>>().await? {
        copied += piece.split(|byte| *byte == b'\n').count() as i64 - 1;
    }
    ensure!((shown, copied) == (wanted, wanted), "{table}: {shown} shown, {copied} copied, {wanted} wanted");
    for direct in directs {
        ensure!(
            column(direct, &format!("SELECT count(*) > 20 FROM {table}")).await? == ["t"],
            "{table} is on one shard"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_is_named_is_a_part_of_its_table() -> Result<()> {
    let (tier, client, console) = filled().await?;
    let (source, target) = (tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?);
    let directs = [&source, &target];
    // Days of 2025, and those of both partitions of 2026.
    let (old, new) = (214 + 60, 326);
    for (table, wanted) in [("events_old", old), ("events_new", new)] {
        are_alike(&client, &directs, table, wanted).await?;
    }
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    are_alike(&client, &directs, "events_old", old).await?;
    for (sql, written) in [
        ("INSERT INTO events_old SELECT n, '2025-01-01', n, 'named' FROM generate_series(1001, 1100) n", 100),
        ("UPDATE events_old SET note = 'changed' WHERE user_id = 1001", 1),
        ("UPDATE events_old SET note = 'changed' WHERE note = 'named'", 99),
        ("DELETE FROM events_old e USING events_old f WHERE e.user_id = 1002 AND f.user_id = e.user_id", 1),
    ] {
        assert_eq!(client.execute(sql, &[]).await.context(sql)?, written, "{sql}");
    }
    let wrong =
        client.execute("INSERT INTO events_old VALUES (1, '2026-05-05', 1, '')", &[]).await.expect_err("its day");
    assert_eq!(wrong.code().map(tokio_postgres::error::SqlState::code), Some("23514"), "{wrong:?}");
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    are_alike(&client, &[&target], "events_old", old + 99).await?;
    let changed = "SELECT count(*) FROM events WHERE note = 'changed'";
    assert_eq!(column(&client, changed).await?, ["99"]);
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    all_are_there(&client, &directs).await
}
