//! Numbers of sharded tables: serial and identity columns, defaults and calls of nextval(), and what currval() and lastval()
//! say of them, as one Postgres would; and across proxies and restarts never the same number twice.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use tokio_postgres::types::ToSql;
use weir_harness::Tier;
use weir_wire::frontend::{Execute, Object, Parse, Target, put_sync, tag};

use crate::placement::column;
use crate::raw::Raw;
use crate::rows::{Pair, put_bind, same_prepared, text};

const TABLES: &[&str] = &["accounts(account_id bigint)", "people(person_id bigint)", "orders(user_id bigint)", "tags"];

const SCHEMA: &str = r#"
CREATE TABLE accounts (account_id bigserial PRIMARY KEY, name text);
CREATE TABLE people (name text, person_id int GENERATED ALWAYS AS IDENTITY (START 10 INCREMENT 5) PRIMARY KEY);
CREATE SEQUENCE "Tickets";
CREATE TABLE orders (user_id bigint, id smallserial, note text, ticket bigint NOT NULL DEFAULT nextval('"Tickets"'),
    made timestamptz DEFAULT now(), PRIMARY KEY (user_id, id));
CREATE TABLE tags (id serial PRIMARY KEY, name text UNIQUE);
CREATE TABLE local (id serial PRIMARY KEY, name text);
CREATE SEQUENCE plain"#;

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_given_as_one_postgres_would() -> Result<()> {
    let pair = Pair::start(2, TABLES, SCHEMA).await?;
    texts(&pair).await?;
    asked(&pair).await?;
    parameters(&pair).await?;
    set(&pair).await?;
    everywhere_alike(&pair).await?;
    unnamed(&pair).await?;
    // What fails has drawn numbers for all its rows, where Postgres draws as far as it comes: gaps, as ever.
    pair.fails("INSERT INTO accounts (account_id, name) VALUES (1000, 'twice'), (DEFAULT, 'new')", "23505").await?;
    pair.fails("INSERT INTO accounts (nothing) VALUES (1), (2)", "42703").await?;
    Ok(())
}

async fn texts(pair: &Pair) -> Result<()> {
    for sql in [
        "INSERT INTO accounts (name) VALUES ('a') RETURNING account_id",
        "INSERT INTO accounts (name) VALUES ('b'), ('c'), ('d'), ('e') RETURNING *",
        "INSERT INTO accounts VALUES (DEFAULT, 'f'), (DEFAULT, 'g') RETURNING *",
        "INSERT INTO accounts VALUES (DEFAULT, 'h'), (1000, 'i'), (DEFAULT, 'j') RETURNING *",
        "INSERT INTO accounts DEFAULT VALUES RETURNING *",
        "INSERT INTO public.accounts AS a (name) VALUES ('k'), ('l') ON CONFLICT (account_id) DO NOTHING RETURNING a.account_id",
        "INSERT INTO accounts (account_id, name) VALUES (nextval('accounts_account_id_seq'), 'm'), \
         (nextval('public.accounts_account_id_seq'::regclass), 'n'), (DEFAULT, 'o') RETURNING *",
        "INSERT INTO people VALUES ('a'), ('b'), ('c') RETURNING *",
        "INSERT INTO people (name, person_id) VALUES ('d', DEFAULT), ('e', DEFAULT) RETURNING *",
        "INSERT INTO people OVERRIDING SYSTEM VALUE VALUES ('f', 1000), ('g', DEFAULT) RETURNING *",
        "INSERT INTO people DEFAULT VALUES RETURNING person_id",
        "INSERT INTO orders (user_id, note) VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, NULL) RETURNING user_id, id, note, ticket",
        "INSERT INTO orders VALUES (1), (2), (3) RETURNING user_id, id, note, ticket",
        "INSERT INTO orders (user_id, id, ticket) VALUES (1, DEFAULT, 77), (2, 99, DEFAULT), (3, DEFAULT, DEFAULT) RETURNING id, ticket",
        "BEGIN",
        "INSERT INTO accounts (name) VALUES ('p') RETURNING account_id",
        "INSERT INTO orders (user_id) VALUES (9), (10) RETURNING user_id, id, ticket",
        "ROLLBACK",
        "INSERT INTO accounts (name) VALUES ('q'); INSERT INTO orders (user_id) VALUES (5), (6)",
        "INSERT INTO tags (name) VALUES ('x'), ('y') RETURNING *",
        "INSERT INTO tags DEFAULT VALUES RETURNING id",
        "INSERT INTO local (name) VALUES ('x'), ('y') RETURNING *",
        "SELECT account_id, name FROM accounts ORDER BY account_id",
        "SELECT person_id, name FROM people ORDER BY person_id",
        "SELECT user_id, id, note, ticket FROM orders ORDER BY user_id, id",
        "SELECT * FROM tags ORDER BY id",
    ] {
        pair.fine(sql).await?;
    }
    pair.fails("INSERT INTO people (name, person_id) VALUES ('z', 5), ('z', 6)", "428C9").await?;
    pair.fine("INSERT INTO accounts (name) VALUES ('r') RETURNING account_id").await?;
    Ok(())
}

/// currval(), lastval() and nextval() by themselves.
async fn asked(pair: &Pair) -> Result<()> {
    for sql in [
        "SELECT nextval('accounts_account_id_seq')",
        "SELECT currval('accounts_account_id_seq'), lastval() AS l",
        "SELECT nextval('\"Tickets\"') AS a, nextval('\"Tickets\"'::regclass)::int, 5 AS b;",
        "SELECT pg_catalog.currval('public.\"Tickets\"')",
        "INSERT INTO orders (user_id) VALUES (20)",
        "SELECT currval(pg_get_serial_sequence('orders', 'id')), lastval()",
        "INSERT INTO accounts (name) VALUES ('s'), ('t')",
        "SELECT lastval()",
        "INSERT INTO orders (user_id, note) VALUES (currval('accounts_account_id_seq'), 'child'), (21, 'x') RETURNING user_id",
        "UPDATE accounts SET name = 'last' WHERE account_id = currval('accounts_account_id_seq') RETURNING *",
        "SELECT name FROM accounts WHERE account_id = currval('accounts_account_id_seq')",
        "SELECT nextval('plain')",
        "SELECT currval('plain')",
        "SELECT lastval()",
        "INSERT INTO local (name) VALUES ('z')",
        "SELECT lastval(), currval('local_id_seq')",
        "INSERT INTO accounts (name) VALUES ('u')",
        "SELECT lastval(); SELECT nextval('accounts_account_id_seq')",
        "INSERT INTO orders (user_id, note) SELECT n, 'selected' FROM generate_series(1, 5) n ORDER BY n RETURNING *",
        "SELECT lastval()",
    ] {
        pair.fine(sql).await?;
    }
    for sql in [
        "SELECT coalesce(currval('accounts_account_id_seq'), 1)",
        "SELECT nextval('accounts_account_id_seq') FROM generate_series(1, 3)",
        "SELECT nextval('accounts_account_id_seq') + 1",
        "SELECT setval('accounts_account_id_seq', (SELECT 5000))",
        "SELECT setval('accounts_account_id_seq', 1)",
        "INSERT INTO orders (user_id, note) VALUES (1, (SELECT nextval('\"Tickets\"')::text))",
        "WITH x AS (SELECT 1) INSERT INTO orders (user_id) VALUES (1)",
        "UPDATE orders SET ticket = DEFAULT WHERE user_id = 1",
        "ALTER SEQUENCE accounts_account_id_seq RESTART",
        "ALTER TABLE people ALTER person_id RESTART WITH 5",
        "TRUNCATE accounts RESTART IDENTITY",
        "EXPLAIN ANALYZE SELECT nextval('accounts_account_id_seq')",
    ] {
        let told = text(&pair.sharded, sql).await;
        ensure!(told.as_ref().is_err_and(|error| error.0 == "0A000"), "{sql}: {told:?}");
    }
    Ok(())
}

async fn parameters(pair: &Pair) -> Result<()> {
    let sql = "INSERT INTO accounts (name) VALUES ($1), ($2), ($3) RETURNING account_id";
    same_prepared(pair, sql, &[&[&"a", &"b", &"c"], &[&"d", &"e", &"f"], &[&"g", &"h", &"i"]]).await?;
    let sql = "INSERT INTO orders (user_id, note) VALUES ($1, $2) RETURNING id::bigint";
    let none: Option<&str> = None;
    same_prepared(pair, sql, &[&[&30_i64, &"a"], &[&31_i64, &none], &[&32_i64, &"c"], &[&33_i64, &"d"]]).await?;
    let sql = "INSERT INTO people (name) VALUES ('x'), ($1) RETURNING person_id::bigint";
    same_prepared(pair, sql, &[&[&"a"], &[&"b"]]).await?;
    same_prepared(
        pair,
        "INSERT INTO tags (name) VALUES ($1) RETURNING id::bigint",
        &[&[&"p"], &[&"q"], &[&"p"], &[&"r"]],
    )
    .await?;
    for sql in [
        "SELECT nextval('accounts_account_id_seq')",
        "SELECT currval('accounts_account_id_seq')",
        "SELECT lastval()",
        "SELECT nextval('plain')",
        "SELECT lastval()",
        "INSERT INTO accounts DEFAULT VALUES RETURNING account_id",
    ] {
        same_prepared(pair, sql, &[&[] as &[&(dyn ToSql + Sync)], &[]]).await?;
    }
    Ok(())
}

/// As drivers do it that send everything at once, without names; and with the statement's description asked for in between.
async fn unnamed(pair: &Pair) -> Result<()> {
    let mut raw = Raw::login(&pair.tier.dsn("shop"), &[]).await?;
    let mut last = 0;
    for sql in [
        "INSERT INTO accounts (name) VALUES ($1) RETURNING account_id",
        "INSERT INTO accounts (name) VALUES ($1), ('b'), ('c') RETURNING account_id",
    ] {
        for _ in 0..3 {
            Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut raw.out);
            put_bind(&mut raw.out, &["x"]);
            for object in [Object::Portal, Object::Statement] {
                Target { object, name: b"" }.put(tag::DESCRIBE, &mut raw.out);
            }
            Execute { portal: b"", rows_max: 0 }.put(&mut raw.out);
            put_sync(&mut raw.out);
            let (tags, bodies) = raw.until_ready().await?;
            let rows = tags.matches('D').count();
            ensure!(tags == format!("12TtT{}CZ", "D".repeat(rows)) && rows % 2 == 1, "{tags}");
            // The client has one parameter, whatever weir has added.
            ensure!(bodies[3][..2] == [0, 1], "{:?}", bodies[3]);
            for body in &bodies[5..5 + rows] {
                let number: i64 = std::str::from_utf8(&body[6..])?.parse()?;
                ensure!(number > last, "{number} after {last}");
                last = number;
            }
        }
    }
    ensure!(raw.query("SELECT lastval()").await?.1 == [last.to_string()]);
    Ok(())
}

async fn set(pair: &Pair) -> Result<()> {
    for sql in [
        "SELECT setval('accounts_account_id_seq', 5000)",
        "SELECT currval('accounts_account_id_seq')",
        "INSERT INTO accounts (name) VALUES ('a'), ('b') RETURNING account_id",
        "SELECT setval('accounts_account_id_seq', 6000, false) AS s",
        "INSERT INTO accounts (name) VALUES ('a'), ('b') RETURNING account_id",
        "SELECT setval('orders_id_seq', 32766)",
        "INSERT INTO orders (user_id) VALUES (40) RETURNING id",
    ] {
        pair.fine(sql).await?;
    }
    pair.fails("INSERT INTO orders (user_id) VALUES (41)", "2200H").await?;
    pair.fails("SELECT setval('orders_id_seq', 40000)", "22003").await
}

async fn everywhere_alike(pair: &Pair) -> Result<()> {
    let sql = "SELECT tags::text FROM tags ORDER BY id";
    let expected = column(&pair.single, sql).await?;
    for shard in &pair.tier.shards {
        ensure!(column(&shard.primary.admin("shop").await?, sql).await? == expected, "every copy has the same numbers");
    }
    Ok(())
}

/// What a connection does not know of it cannot answer; what is full it begins anew, above what is there.
#[tokio::test(flavor = "multi_thread")]
async fn no_number_is_given_twice_by_sessions_restarts_or_a_hub_that_was_away() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).config_extra("[limits]\nsequence_block = 7").start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE accounts (account_id serial PRIMARY KEY, name text)").await?;
    // What was there before weir counted: rows with numbers of their own, and a shard's sequence that has counted.
    client.batch_execute("INSERT INTO accounts VALUES (41, 'old')").await?;
    let direct = tier.shards[1].primary.admin("shop").await?;
    direct.batch_execute("SELECT setval('accounts_account_id_seq', 50)").await?;
    let first = column(&client, "INSERT INTO accounts (name) VALUES ('first') RETURNING account_id").await?;
    assert_eq!(first, ["51"]);
    let undefined = tier.connect().await?.simple_query("SELECT currval('accounts_account_id_seq')").await;
    let undefined = undefined.expect_err("it has drawn nothing");
    assert_eq!(undefined.code().map(tokio_postgres::error::SqlState::code), Some("55000"));

    let mut seen = BTreeSet::new();
    for round in 0..3 {
        let mut sessions = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let client = tier.connect().await?;
            sessions.spawn(async move {
                let statement =
                    client.prepare("INSERT INTO accounts (name) VALUES ($1), ('x') RETURNING account_id").await?;
                let mut mine = Vec::new();
                for _ in 0..5 {
                    let rows = client.query(&statement, &[&"y"]).await?;
                    mine.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
                }
                anyhow::Ok(mine)
            });
        }
        while let Some(mine) = sessions.join_next().await {
            for number in mine?? {
                ensure!(seen.insert(number), "{number} was given twice");
            }
        }
        assert_eq!(seen.len(), 80 * (round + 1));
        tier.kill_weir();
        tier.restart_weir().await?;
    }

    let client = tier.connect().await?;
    client.batch_execute("INSERT INTO accounts (name) VALUES ('a block')").await?;
    tier.hub.stop();
    let mut given = 0;
    let refused = loop {
        match client.batch_execute("INSERT INTO accounts (name) VALUES ('without the hub')").await {
            Ok(()) => given += 1,
            Err(error) => break error,
        }
        ensure!(given < 7, "there were only so many in the block");
    };
    assert_eq!(given, 6, "the block goes on");
    let refused = refused.as_db_error().expect("an error for the client");
    assert_eq!((refused.code().code(), refused.hint().is_some()), ("57P03", true));
    client.batch_execute("INSERT INTO accounts VALUES (100000, 'its own')").await?;
    assert_eq!(column(&client, "SELECT name FROM accounts WHERE account_id = 100000").await?, ["its own"]);
    Ok(())
}
