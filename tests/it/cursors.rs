//! Reads in parts over three shards: portals with a row limit and cursors, beside one plain Postgres that is told the same.
//!
//! Reading order: the tests → [`Both`].

use anyhow::{Result, ensure};
use bytes::Bytes;
use weir_harness::{Plain, Tier};
use weir_wire::backend::{report_field, tag};
use weir_wire::frontend::{Bind, Execute, Object, Parse, Target, put_flush, put_query, put_sync};

use crate::raw::Raw;

struct Both {
    _plain: Plain,
    tier: Tier,
    single: Raw,
    sharded: Raw,
}

/// A frame as it is compared: errors by SQLSTATE, descriptions without the tables they come from.
fn shown(kind: u8, body: &Bytes) -> Result<String> {
    Ok(match kind {
        tag::ERROR => format!("E{}", String::from_utf8_lossy(report_field(body, b'C').unwrap_or_default())),
        tag::ROW_DESCRIPTION => {
            let fields = weir_wire::row::fields(body)?;
            let names =
                fields.iter().map(|field| format!("{} {}", String::from_utf8_lossy(field.name), field.type_oid));
            format!("T{:?}", names.collect::<Vec<_>>())
        }
        _ => format!("{}{body:?}", char::from(kind)),
    })
}

async fn told(raw: &mut Raw) -> Result<Vec<String>> {
    let (tags, bodies) = raw.until_ready().await?;
    tags.bytes().zip(&bodies).map(|(kind, body)| shown(kind, body)).collect()
}

impl Both {
    async fn start() -> Result<Both> {
        let (tier, plain) = (Tier::builder().shards(3).start().await?, Plain::start().await?);
        let (through, direct) = (tier.connect().await?, weir_harness::connect(&plain.dsn()).await?);
        for client in [&through, &direct] {
            client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, name text, visits int)").await?;
            for key in 1..=700 {
                let insert = format!("INSERT INTO users VALUES ({key}, 'name {}', {})", key * 7 % 100, key % 13);
                client.batch_execute(&insert).await?;
            }
        }
        let sharded = Raw::login(&tier.dsn("shop"), &[]).await?;
        let single = Raw::login(&plain.dsn(), &[]).await?;
        Ok(Both { _plain: plain, tier, single, sharded })
    }

    /// Both are told the same by `put` and answer the same.
    async fn same(&mut self, put: impl Fn(&mut Raw)) -> Result<Vec<String>> {
        put(&mut self.single);
        let expected = told(&mut self.single).await?;
        put(&mut self.sharded);
        let answer = told(&mut self.sharded).await?;
        ensure!(answer == expected, "plain: {expected:#?}\nweir:  {answer:#?}");
        Ok(answer)
    }

    async fn text(&mut self, sql: &str) -> Result<Vec<String>> {
        let answer = self.same(|raw| put_query(&mut raw.out, sql)).await;
        answer.map_err(|error| error.context(sql.to_owned()))
    }
}

fn put_bind(raw: &mut Raw, portal: &[u8], binary: bool) {
    let body: &[u8] = if binary { b"\0\0\0\0\0\0\0\x01\0\x01" } else { b"\0\0\0\0\0\0\0\0" };
    let bind = Bind::read(body).expect("a Bind");
    bind.on_portal(portal).put_for(b"", &mut raw.out);
}

fn put_execute(raw: &mut Raw, portal: &[u8], rows_max: i32) {
    Execute { portal, rows_max }.put(&mut raw.out);
}

/// Opens portal `p` and asks for its first seven rows, in two parts.
fn put_first_parts(raw: &mut Raw, sql: &[u8], binary: bool) {
    Parse { name: b"", sql, types: b"" }.put(&mut raw.out);
    put_bind(raw, b"p", binary);
    Target { object: Object::Portal, name: b"p" }.put(b'D', &mut raw.out);
    put_execute(raw, b"p", 3);
    put_execute(raw, b"p", 4);
    put_sync(&mut raw.out);
}

const ORDERED: &[u8] = b"SELECT user_id, visits FROM users WHERE user_id <> 5 ORDER BY visits DESC, user_id";

#[tokio::test(flavor = "multi_thread")]
async fn portals_are_read_in_parts() -> Result<()> {
    let mut both = Both::start().await?;
    for binary in [false, true] {
        both.text("BEGIN").await?;
        both.same(|raw| put_first_parts(raw, ORDERED, binary)).await?;
        // Between the parts the transaction does other things, on the same servers.
        both.text("SELECT count(*) FROM users").await?;
        both.text("UPDATE users SET visits = 0 WHERE user_id <= 20").await?;
        let mut rows = 7;
        for part in [1, 300, 100, 290, 1, 0, 5, 0] {
            let answer = both
                .same(|raw| {
                    put_execute(raw, b"p", part);
                    put_sync(&mut raw.out);
                })
                .await?;
            rows += answer.iter().filter(|frame| frame.starts_with('D')).count();
        }
        assert_eq!(rows, 699);
        // A portal bound anew starts anew, and a closed one is gone.
        both.same(|raw| {
            Parse { name: b"", sql: ORDERED, types: b"" }.put(&mut raw.out);
            Target { object: Object::Portal, name: b"p" }.put(b'C', &mut raw.out);
            put_bind(raw, b"p", binary);
            put_execute(raw, b"p", 2);
            put_bind(raw, b"", binary);
            put_execute(raw, b"", 3);
            put_bind(raw, b"", binary);
            put_execute(raw, b"", 2);
            put_sync(&mut raw.out);
        })
        .await?;
        both.same(|raw| {
            Target { object: Object::Portal, name: b"p" }.put(b'C', &mut raw.out);
            put_execute(raw, b"p", 2);
            put_sync(&mut raw.out);
        })
        .await?;
        both.text("ROLLBACK").await?;
    }
    // Outside a transaction a part is all there is, and the next statement finds everything clean.
    for part in [2, 0] {
        both.same(|raw| {
            Parse { name: b"", sql: b"SELECT max(visits), visits % 3 FROM users GROUP BY 2 ORDER BY 2", types: b"" }
                .put(&mut raw.out);
            put_bind(raw, b"", false);
            put_execute(raw, b"", part);
            put_execute(raw, b"", part);
            put_sync(&mut raw.out);
        })
        .await?;
    }
    both.same(|raw| {
        Parse { name: b"", sql: b"UPDATE users SET name = 'x' WHERE visits = 3", types: b"" }.put(&mut raw.out);
        put_bind(raw, b"", false);
        put_execute(raw, b"", 1);
        put_sync(&mut raw.out);
    })
    .await?;
    both.text("SELECT count(*) FROM users WHERE name = 'x'").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_go_forward_over_shards() -> Result<()> {
    let mut both = Both::start().await?;
    for sql in [
        "BEGIN",
        "DECLARE c NO SCROLL CURSOR FOR SELECT name, user_id FROM users ORDER BY name COLLATE \"C\", user_id",
        "DECLARE \"Sum\" CURSOR FOR SELECT visits, count(*), sum(user_id) FROM users GROUP BY visits ORDER BY visits DESC",
        "FETCH c",
        "FETCH FORWARD 5 FROM c",
        "FETCH 2 FROM \"Sum\"",
        "DELETE FROM users WHERE user_id > 300",
        "FETCH 300 IN c",
        "MOVE 3 IN c",
        "FETCH NEXT c",
        "FETCH ALL FROM c",
        "FETCH ALL FROM c",
        "FETCH FORWARD ALL IN \"Sum\"",
        "CLOSE c",
        "DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id LIMIT 7 OFFSET 2",
        "FETCH 3 c",
        "SELECT count(*) FROM users",
        "MOVE ALL c",
        "CLOSE ALL",
        "SAVEPOINT s",
        "DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id",
        "ROLLBACK TO SAVEPOINT s",
        "DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id",
        "FETCH 1 FROM c",
        "DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id",
        "ROLLBACK",
        "FETCH c",
        "DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id",
        "SELECT count(*) FROM users",
    ] {
        both.text(sql).await?;
    }
    // By the extended protocol.
    both.text("BEGIN").await?;
    for sql in
        ["DECLARE c CURSOR FOR SELECT user_id, name FROM users WHERE visits < 5 ORDER BY user_id", "FETCH 4 FROM c"]
    {
        both.same(|raw| {
            Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut raw.out);
            Target { object: Object::Statement, name: b"" }.put(b'D', &mut raw.out);
            put_bind(raw, b"", false);
            Target { object: Object::Portal, name: b"" }.put(b'D', &mut raw.out);
            put_execute(raw, b"", 0);
            put_sync(&mut raw.out);
        })
        .await?;
    }
    both.text("COMMIT").await?;
    // What a merge cannot do is refused, and says so.
    for (sql, opens) in [
        ("FETCH BACKWARD 2 FROM c", true),
        ("FETCH ABSOLUTE 1 FROM c", true),
        ("DECLARE d SCROLL CURSOR FOR SELECT user_id FROM users ORDER BY user_id", false),
        ("DECLARE d CURSOR WITH HOLD FOR SELECT user_id FROM users ORDER BY user_id", false),
        ("DECLARE d BINARY CURSOR FOR SELECT user_id FROM users ORDER BY user_id", false),
    ] {
        both.text("BEGIN").await?;
        if opens {
            both.text("DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id").await?;
        }
        let (_, values) = both.sharded.query(sql).await?;
        assert!(values[0].starts_with("0A000"), "{sql}: {values:?}");
        both.single.query("ROLLBACK").await?;
        both.sharded.query("ROLLBACK").await?;
    }
    Ok(())
}

/// A client that leaves with everything half read leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_half_read_ends_with_its_session() -> Result<()> {
    let mut both = Both::start().await?;
    for _ in 0..20 {
        let mut leaving = Raw::login(&both.tier.dsn("shop"), &[]).await?;
        leaving.query("BEGIN").await?;
        leaving.query("DECLARE c CURSOR FOR SELECT user_id FROM users ORDER BY user_id").await?;
        Parse { name: b"", sql: ORDERED, types: b"" }.put(&mut leaving.out);
        put_bind(&mut leaving, b"", false);
        put_execute(&mut leaving, b"", 3);
        put_flush(&mut leaving.out);
        while leaving.next().await?.0 != tag::PORTAL_SUSPENDED {}
    }
    both.text("SELECT count(*) FROM users").await?;
    Ok(())
}

/// The fallback engine's rows are kept here between two fetches.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_engine_answers_is_read_in_parts_too() -> Result<()> {
    let mut both = Both::start().await?;
    let ranked = b"SELECT user_id, name, rank() OVER (ORDER BY visits, user_id) FROM users ORDER BY 1";
    for binary in [false, true] {
        both.text("BEGIN").await?;
        both.same(|raw| put_first_parts(raw, ranked, binary)).await?;
        // What is written meanwhile is not in a portal that is open.
        both.text("UPDATE users SET name = 'later' WHERE user_id = 699").await?;
        let mut rows = 7;
        for part in [1, 600, 0, 5] {
            let answer = both
                .same(|raw| {
                    put_execute(raw, b"p", part);
                    put_sync(&mut raw.out);
                })
                .await?;
            rows += answer.iter().filter(|frame| frame.starts_with('D')).count();
        }
        assert_eq!(rows, 700);
        both.same(|raw| {
            Target { object: Object::Portal, name: b"p" }.put(b'C', &mut raw.out);
            put_execute(raw, b"p", 2);
            put_sync(&mut raw.out);
        })
        .await?;
        both.text("ROLLBACK").await?;
    }
    for sql in [
        "BEGIN",
        "DECLARE c CURSOR FOR SELECT user_id, lag(user_id) OVER (ORDER BY user_id) FROM users ORDER BY 1 DESC",
        "FETCH 2 FROM c",
        "SAVEPOINT s",
        "DECLARE d CURSOR FOR SELECT DISTINCT ON (visits) visits, rank() OVER (ORDER BY user_id) FROM users ORDER BY 1, 2",
        "FETCH FORWARD 3 FROM d",
        "MOVE 2 IN d",
        "FETCH NEXT d",
        "SELECT count(*) FROM users",
        "ROLLBACK TO SAVEPOINT s",
        "FETCH 3 FROM c",
        "FETCH 1 FROM d",
        "ROLLBACK TO SAVEPOINT s",
        "DECLARE c CURSOR FOR SELECT rank() OVER (ORDER BY user_id) FROM users",
        "ROLLBACK TO SAVEPOINT s",
        "CLOSE c",
        "DECLARE c CURSOR FOR SELECT rank() OVER (ORDER BY user_id) FROM users ORDER BY 1",
        "FETCH ALL FROM c",
        "FETCH ALL FROM c",
        "CLOSE ALL",
        "COMMIT",
        "FETCH c",
        "DECLARE c CURSOR FOR SELECT rank() OVER (ORDER BY user_id) FROM users",
        "SELECT count(*) FROM users",
    ] {
        if sql == "FETCH 1 FROM d" {
            // It has ended with its savepoint; whose it was is not known any more.
            for (raw, code) in [(&mut both.single, "34000"), (&mut both.sharded, "0A000")] {
                let (_, told) = raw.query(sql).await?;
                ensure!(told[0].starts_with(code), "{told:?}");
            }
            continue;
        }
        both.text(sql).await?;
    }
    // By the extended protocol.
    both.text("BEGIN").await?;
    for sql in [
        "DECLARE c CURSOR FOR SELECT user_id, rank() OVER (ORDER BY name, user_id) FROM users ORDER BY 2",
        "FETCH 4 FROM c",
    ] {
        both.same(|raw| {
            Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut raw.out);
            put_bind(raw, b"", false);
            Target { object: Object::Portal, name: b"" }.put(b'D', &mut raw.out);
            put_execute(raw, b"", 0);
            put_sync(&mut raw.out);
        })
        .await?;
    }
    both.text("COMMIT").await?;
    // Outside a transaction a part is all there is.
    for part in [2, 0] {
        both.same(|raw| {
            Parse { name: b"", sql: ranked, types: b"" }.put(&mut raw.out);
            put_bind(raw, b"", false);
            put_execute(raw, b"", part);
            put_execute(raw, b"", part);
            put_sync(&mut raw.out);
        })
        .await?;
    }
    Ok(())
}
