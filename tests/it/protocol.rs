//! The wire as Postgres does it, frame by frame.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::SinkExt;
use weir_harness::Tier;
use weir_wire::frontend::{Execute, Object, Parse, Target, put_flush, put_query, put_sync, tag};

use crate::placement::{column, create_schema};
use crate::raw::Raw;

pub fn bind(out: &mut bytes::BytesMut, portal: &[u8], statement: &[u8], value: Option<&[u8]>) {
    weir_wire::frame::put(out, tag::BIND, |out| {
        weir_wire::frame::put_cstr(out, portal);
        weir_wire::frame::put_cstr(out, statement);
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&(value.iter().len() as u16).to_be_bytes());
        if let Some(value) = value {
            out.extend_from_slice(&(value.len() as i32).to_be_bytes());
            out.extend_from_slice(value);
        }
        out.extend_from_slice(&[0, 0]);
    });
}

async fn raw(tier: &Tier) -> Result<Raw> {
    Raw::login(&tier.dsn("shop"), &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn simple_queries_answer_as_postgres_does() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let mut client = raw(&tier).await?;
    for (sql, tags) in [
        ("", "IZ"),
        (" ; ;", "IZ"),
        ("SELECT 1", "TDCZ"),
        ("SELECT 1; SELECT 2", "TDCTDCZ"),
        ("SELECT 1; SELECT nothing; SELECT 2", "TDCEZ"),
        ("-- only a comment", "IZ"),
        ("BEGIN", "CZ"),
        ("SELECT 1", "TDCZ"),
        ("COMMIT", "CZ"),
        ("COMMIT", "NCZ"),
        ("SET application_name TO 'x'", "CSZ"),
    ] {
        assert_eq!(client.query(sql).await?.0, tags, "{sql:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelines_flush_and_errors_keep_their_order() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    create_schema(&tier.connect().await?).await?;
    let mut client = raw(&tier).await?;
    let out = &mut client.out;
    Parse { name: b"s", sql: b"SELECT $1::text", types: b"" }.put(out);
    bind(out, b"", b"s", Some(b"one"));
    Target { object: Object::Portal, name: b"" }.put(tag::DESCRIBE, out);
    Execute { portal: b"", rows_max: 0 }.put(out);
    bind(out, b"", b"s", Some(b"two"));
    Execute { portal: b"", rows_max: 0 }.put(out);
    put_sync(out);
    assert_eq!(client.until_ready().await?.0, "12TDC2DCZ");
    // Flush: answers come without a Sync, and the session waits for it.
    Target { object: Object::Statement, name: b"s" }.put(tag::DESCRIBE, &mut client.out);
    put_flush(&mut client.out);
    assert_eq!(client.next().await?.0, b't');
    assert_eq!(client.next().await?.0, b'T');
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "Z");
    // An error skips to the Sync, and what was skipped never happened.
    let out = &mut client.out;
    Parse { name: b"bad", sql: b"SELEC 1", types: b"" }.put(out);
    Parse { name: b"later", sql: b"SELECT 1", types: b"" }.put(out);
    put_sync(out);
    assert_eq!(client.until_ready().await?.0, "EZ");
    let out = &mut client.out;
    Target { object: Object::Statement, name: b"later" }.put(tag::DESCRIBE, out);
    put_sync(out);
    let (tags, bodies) = client.until_ready().await?;
    assert_eq!((tags.as_str(), &crate::raw::error_text(&bodies[0])[..5]), ("EZ", "26000"));
    // Names taken, names unknown, names closed: Postgres's own codes.
    let out = &mut client.out;
    Parse { name: b"s", sql: b"SELECT 2", types: b"" }.put(out);
    put_sync(out);
    let (_, bodies) = client.until_ready().await?;
    assert_eq!(&crate::raw::error_text(&bodies[0])[..5], "42P05");
    let out = &mut client.out;
    Target { object: Object::Statement, name: b"s" }.put(tag::CLOSE, out);
    bind(out, b"", b"s", Some(b"x"));
    put_sync(out);
    let (tags, bodies) = client.until_ready().await?;
    assert_eq!((tags.as_str(), &crate::raw::error_text(&bodies[1])[..5]), ("3EZ", "26000"));
    Ok(())
}

/// Drivers close statements when they have dropped them, whatever the servers are at by then.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_server_has_to_close_waits_for_none() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let mut client = raw(&tier).await?;
    let out = &mut client.out;
    Parse { name: b"s", sql: b"SELECT $1::text", types: b"" }.put(out);
    put_sync(out);
    assert_eq!(client.until_ready().await?.0, "1Z");
    tier.shards[0].primary.freeze();
    let out = &mut client.out;
    Target { object: Object::Statement, name: b"s" }.put(tag::CLOSE, out);
    Target { object: Object::Portal, name: b"" }.put(tag::CLOSE, out);
    put_sync(out);
    let closed = tokio::time::timeout(Duration::from_secs(30), client.until_ready()).await;
    tier.shards[0].primary.thaw();
    assert_eq!(closed??.0, "33Z");
    let out = &mut client.out;
    bind(out, b"", b"s", Some(b"x"));
    put_sync(out);
    let (tags, bodies) = client.until_ready().await?;
    assert_eq!((tags.as_str(), &crate::raw::error_text(&bodies[0])[..5]), ("EZ", "26000"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn portals_are_fetched_in_parts_inside_a_transaction() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let mut client = raw(&tier).await?;
    client.query("BEGIN").await?;
    let out = &mut client.out;
    Parse { name: b"", sql: b"SELECT generate_series(1, 5)", types: b"" }.put(out);
    bind(out, b"c", b"", None);
    Execute { portal: b"c", rows_max: 2 }.put(out);
    put_sync(out);
    assert_eq!(client.until_ready().await?.0, "12DDsZ");
    Execute { portal: b"c", rows_max: 2 }.put(&mut client.out);
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "DDsZ");
    Execute { portal: b"c", rows_max: 0 }.put(&mut client.out);
    put_sync(&mut client.out);
    assert_eq!(client.until_ready().await?.0, "DCZ");
    client.query("COMMIT").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_in_and_out_end_in_every_way() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    // A reference table: every shard gets the rows.
    let sink = client.copy_in("COPY products FROM STDIN").await?;
    futures_util::pin_mut!(sink);
    for chunk in ["1\ttea\t5", "00\n2\tcof", "fee\t700\n"] {
        sink.send(Bytes::from(chunk)).await?;
    }
    assert_eq!(sink.finish().await?, 2);
    for shard in &tier.shards {
        assert_eq!(column(&shard.primary.admin("shop").await?, "SELECT count(*) FROM products").await?, ["2"]);
    }
    // A home table, in and out.
    let sink = client.copy_in("COPY settings FROM STDIN").await?;
    futures_util::pin_mut!(sink);
    sink.send(Bytes::from_static(b"a\t1\n")).await?;
    assert_eq!(sink.finish().await?, 1);
    let mut raw = raw(&tier).await?;
    let (tags, _) = raw.query("COPY settings TO STDOUT").await?;
    assert_eq!(tags, "HdcCZ");
    // A row that does not fit ends the copy; the client's late data is ignored and the session goes on.
    put_query(&mut raw.out, "COPY settings FROM STDIN");
    assert_eq!(raw.next().await?.0, b'G');
    for _ in 0..3 {
        weir_wire::frame::put(&mut raw.out, tag::COPY_DATA, |out| out.extend_from_slice(b"only one column\n"));
    }
    weir_wire::frame::put(&mut raw.out, tag::COPY_DONE, |_| {});
    assert_eq!(raw.until_ready().await?.0, "EZ");
    assert_eq!(raw.query("SELECT 1").await?.0, "TDCZ");
    // The client gives up.
    put_query(&mut raw.out, "COPY settings FROM STDIN");
    assert_eq!(raw.next().await?.0, b'G');
    weir_wire::frontend::put_copy_fail(&mut raw.out, "changed my mind");
    assert_eq!(raw.until_ready().await?.0, "EZ");
    assert_eq!(raw.query("SELECT count(*) FROM settings").await?.1, ["1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_and_large_results_flow() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    let client = tier.connect().await?;
    let row = client.query_one("SELECT repeat('x', 20000000)", &[]).await?;
    assert_eq!(row.get::<_, &str>(0).len(), 20_000_000);
    let big = "y".repeat(8_000_000);
    assert_eq!(client.query_one("SELECT length($1::text)", &[&big]).await?.get::<_, i32>(0), 8_000_000);
    let rows = client.query("SELECT i, repeat('z', 100) FROM generate_series(1, 100000) i", &[]).await?;
    assert_eq!(rows.len(), 100_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_end_only_their_own_session() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    for hostile in
        [&b"P\0\0\0\x05x"[..], b"B\0\0\0\x04", b"E\0\0\0\x03", b"\0\0\0\0\x04", b"Q\xff\xff\xff\xff", b"D\0\0\0\x06Xa"]
    {
        let mut client = raw(&tier).await?;
        client.out.extend_from_slice(hostile);
        assert!(client.closed().await, "{hostile:?}");
    }
    assert_eq!(column(&tier.connect().await?, "SELECT 1").await?, ["1"]);
    Ok(())
}
