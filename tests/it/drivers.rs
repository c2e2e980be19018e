//! What drivers' own test suites rely on, in our words. The suites themselves: tests/compat.

use anyhow::{Context, Result};
use weir_harness::Tier;
use weir_wire::frontend::{Execute, Object, Parse, Target, put_flush, put_query, put_sync, tag};

use crate::placement::column;
use crate::protocol::bind;
use crate::raw::{Raw, error_text};

async fn one_shard() -> Result<Tier> {
    Tier::builder().shards(1).start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_never_change_their_shape_under_a_description() -> Result<()> {
    let tier = one_shard().await?;
    let one = tier.connect().await?;
    one.batch_execute("CREATE TABLE item (id int, price int); INSERT INTO item VALUES (1, 5)").await?;
    let all = one.prepare("SELECT * FROM item").await?;
    let price = one.prepare("SELECT id FROM item").await?;
    tier.connect().await?.batch_execute("ALTER TABLE item ALTER price TYPE text").await?;
    for _ in 0..2 {
        let error = one.query(&all, &[]).await.expect_err("read by the old description");
        let error = error.as_db_error().context("from the server")?;
        assert_eq!((error.code().code(), error.message()), ("0A000", "cached plan must not change result type"));
        assert_eq!(error.routine(), Some("RevalidateCachedQuery"), "drivers prepare anew when they see this");
    }
    assert_eq!(one.query(&price, &[]).await?.len(), 1, "its columns are what they were");
    let all = one.prepare("SELECT * FROM item").await?;
    assert_eq!(one.query_one(&all, &[]).await?.get::<_, String>(1), "5");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_begins_also_behind_a_description_without_sync() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    client.query("CREATE TABLE item (id int)").await?;
    Parse { name: b"add", sql: b"INSERT INTO item VALUES (1)", types: b"" }.put(&mut client.out);
    Target { object: Object::Statement, name: b"add" }.put(tag::DESCRIBE, &mut client.out);
    put_flush(&mut client.out);
    for expected in *b"1tn" {
        assert_eq!(client.next().await?.0, expected);
    }
    assert_eq!(client.query("BEGIN").await?.0, "CZ");
    bind(&mut client.out, b"", b"add", None);
    Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
    put_sync(&mut client.out);
    let (tags, bodies) = client.until_ready().await?;
    assert_eq!((&*tags, &*bodies[2]), ("2CZ", &b"T"[..]));
    client.query("ROLLBACK").await?;
    assert_eq!(client.query("SELECT count(*) FROM item").await?.1, ["0"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rollback_in_a_pipeline_takes_back_what_stands_before_it() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    client.query("CREATE TABLE item (id int)").await?;
    for flushed in [false, true] {
        Parse { name: b"", sql: b"INSERT INTO item VALUES (1)", types: b"" }.put(&mut client.out);
        bind(&mut client.out, b"", b"", None);
        Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
        if flushed {
            put_flush(&mut client.out);
            for expected in *b"12C" {
                assert_eq!(client.next().await?.0, expected);
            }
        }
        Parse { name: b"", sql: b"ROLLBACK", types: b"" }.put(&mut client.out);
        bind(&mut client.out, b"", b"", None);
        Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
        put_sync(&mut client.out);
        // Postgres warns that there is no transaction block, and rolls back all the same.
        let tags = client.until_ready().await?.0;
        assert_eq!(tags, if flushed { "12NCZ" } else { "12C12NCZ" });
        assert_eq!(client.query("SELECT count(*) FROM item").await?.1, ["0"], "flushed: {flushed}");
    }
    // A simple query in the middle of a pipeline ends its transaction, for better or worse.
    Parse { name: b"", sql: b"INSERT INTO item VALUES (1)", types: b"" }.put(&mut client.out);
    bind(&mut client.out, b"", b"", None);
    Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
    put_flush(&mut client.out);
    put_query(&mut client.out, "SELECT 1/0");
    assert_eq!(client.until_ready().await?.0, "12CEZ");
    assert_eq!(client.query("SELECT count(*) FROM item").await?.1, ["0"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_are_fetched_in_the_extended_protocol() -> Result<()> {
    let tier = one_shard().await?;
    let one = tier.connect().await?;
    one.batch_execute("BEGIN").await?;
    one.execute("DECLARE c CURSOR FOR SELECT n FROM generate_series(1, 5) AS n", &[]).await?;
    let rows = one.query("FETCH 2 FROM c", &[]).await?;
    assert_eq!(rows.iter().map(|row| row.get::<_, i32>("n")).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(one.execute("MOVE 1 FROM c", &[]).await?, 1);
    assert_eq!(one.query_one("FETCH NEXT FROM c", &[]).await?.get::<_, i32>(0), 4);
    one.execute("CLOSE c", &[]).await?;
    one.batch_execute("COMMIT").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_a_connection_has_the_last_word() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    put_query(&mut client.out, "SELECT pg_terminate_backend(pg_backend_pid())");
    // The row's description may have been sent already.
    let mut last = client.next().await?;
    while last.0 != b'E' {
        last = client.next().await?;
    }
    assert_eq!(error_text(&last.1), "57P01 terminating connection due to administrator command");
    assert!(client.closed().await);
    // Held idle inside a transaction, it is told at once.
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    client.query("BEGIN").await?;
    let process = client.query("SELECT pg_backend_pid()").await?.1.remove(0);
    column(&tier.connect().await?, &format!("SELECT pg_terminate_backend({process})")).await?;
    assert_eq!(error_text(&client.next().await?.1), "57P01 terminating connection due to administrator command");
    assert!(client.closed().await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_bear_the_number_clients_know_and_come_with_commit() -> Result<()> {
    let tier = one_shard().await?;
    let dsn = tier.dsn("shop");
    let (mut listener, mut other) = (Raw::login(&dsn, &[]).await?, Raw::login(&dsn, &[]).await?);
    listener.query("LISTEN news").await?;
    let sender = |body: &[u8]| i32::from_be_bytes([body[0], body[1], body[2], body[3]]);
    // Its own comes before ReadyForQuery.
    put_query(&mut listener.out, "NOTIFY news, 'own'");
    let (tags, bodies) = listener.until_ready().await?;
    let own = tags.bytes().position(|kind| kind == b'A').context("its own notification")?;
    assert_eq!(sender(&bodies[own]), listener.process);
    // What others send while it is in a transaction comes when that ends.
    listener.query("BEGIN").await?;
    listener.query("SELECT 1").await?;
    other.query("SELECT pg_notify('news', 'other')").await?;
    put_query(&mut listener.out, "COMMIT");
    loop {
        let (kind, body) = listener.next().await?;
        if kind == b'A' {
            assert_eq!(sender(&body), other.process);
            return Ok(());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_prepared_by_the_client_is_seen_once_it_commits() -> Result<()> {
    let tier = one_shard().await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    one.batch_execute("CREATE TABLE item (id int)").await?;
    one.batch_execute("BEGIN").await?;
    one.batch_execute("SET timezone TO 'Asia/Tokyo'").await?;
    one.batch_execute("INSERT INTO item VALUES (1)").await?;
    if one.batch_execute("PREPARE TRANSACTION 'two'").await.is_err() {
        // This server keeps no prepared transactions: the transaction is gone, and its settings with it.
        assert_ne!(column(&one, "SHOW timezone").await?, ["Asia/Tokyo"]);
        return Ok(());
    }
    assert_eq!(column(&one, "SHOW timezone").await?, ["Asia/Tokyo"]);
    // Answers that may be kept.
    for _ in 0..3 {
        assert_eq!(column(&other, "SELECT count(*) FROM item").await?, ["0"]);
    }
    one.batch_execute("COMMIT PREPARED 'two'").await?;
    assert_eq!(column(&other, "SELECT count(*) FROM item").await?, ["1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_of_sql_are_described_and_statements_follow_types_made_anew() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    client.query("BEGIN; DECLARE c CURSOR FOR SELECT 1 AS n").await?;
    Target { object: Object::Portal, name: b"c" }.put(tag::DESCRIBE, &mut client.out);
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "TZ");
    client.query("COMMIT").await?;
    for inside in [false, true] {
        if inside {
            client.query("BEGIN").await?;
        }
        for name in [&b"first"[..], b"second"] {
            client.query("CREATE TYPE mood AS ENUM ('low', 'high')").await?;
            Parse { name, sql: b"SELECT $1::mood", types: b"" }.put(&mut client.out);
            bind(&mut client.out, b"", name, Some(b"low"));
            Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
            Target { object: Object::Statement, name }.put(tag::CLOSE, &mut client.out);
            put_sync(&mut client.out);
            assert_eq!(client.until_ready().await?.0, "12DC3Z", "in a transaction: {inside}");
            client.query("DROP TYPE mood").await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_reported_before_any_sync_asks_for_it() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    Parse { name: b"", sql: b"SELEC 1", types: b"" }.put(&mut client.out);
    assert_eq!(client.next().await?.0, b'E');
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "Z");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_made_inside_a_pipeline_are_known_afterwards() -> Result<()> {
    let tier = one_shard().await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    client.query("CREATE TABLE item (id int)").await?;
    client.query("BEGIN").await?;
    for sql in [&b"INSERT INTO item VALUES (1)"[..], b"SAVEPOINT s", b"INSERT INTO item VALUES (2)"] {
        Parse { name: b"", sql, types: b"" }.put(&mut client.out);
        bind(&mut client.out, b"", b"", None);
        Execute { portal: b"", rows_max: 0 }.put(&mut client.out);
    }
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "12C12C12CZ");
    assert_eq!(client.query("ROLLBACK TO s").await?.0, "CZ");
    client.query("COMMIT").await?;
    assert_eq!(client.query("SELECT array_agg(id) FROM item").await?.1, ["{1}"]);
    Ok(())
}
