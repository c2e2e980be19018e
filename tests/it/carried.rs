//! Writes whose rows do not stay on their shards: INSERT … SELECT from elsewhere and UPDATE of the shard key, on one plain Postgres and
//! on weir with two and three shards. The same statements give the same answers, and afterwards the same rows are there, each on the
//! shard that owns its key's slot.

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::types::ToSql;

use crate::placement::column;
use crate::rows::{Pair, same_prepared, text};

pub const TABLES: &[&str] = &[
    "users(user_id bigint)",
    "cart_items(user_id bigint)",
    "user_emails(email text)",
    "devices(device_id uuid)",
    "tickets(id bigint)",
    "moods(mood_id bigint)",
    "archive(user_id bigint)",
    "products",
];

pub const SCHEMA: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, email text, name text NOT NULL DEFAULT 'nobody', born date);
CREATE TABLE products (product_id bigint PRIMARY KEY, name text, price numeric(8,2));
CREATE TABLE cart_items (user_id int, product_id bigint REFERENCES products, qty int NOT NULL DEFAULT 1 CHECK (qty > 0),
    note varchar(5), twice int GENERATED ALWAYS AS (qty * 2) STORED, PRIMARY KEY (user_id, product_id));
CREATE TABLE archive (user_id int, product_id bigint, qty int, why text);
CREATE TABLE user_emails (email varchar(40) PRIMARY KEY, user_id smallint);
CREATE TABLE devices (device_id uuid PRIMARY KEY, label text);
CREATE TABLE tickets (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text, at timestamptz, took interval, f float8, raw bytea,
    tags text[], doc jsonb);
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE TABLE moods (mood_id bigint PRIMARY KEY, mood mood, moods mood[]);
CREATE TABLE report (name text PRIMARY KEY, n bigint, total numeric);
INSERT INTO products VALUES (1, 'one', 1.5), (2, 'two', 2.25), (3, 'three', NULL);
INSERT INTO users SELECT n, 'u' || n || '@x', 'name ' || n, date '2000-01-01' + n::int FROM generate_series(1, 20) n;
INSERT INTO cart_items (user_id, product_id, qty) SELECT n, 1 + n % 3, n FROM generate_series(1, 20) n";

/// Each sharded table and how Postgres hashes its key.
pub const KEYS: &[(&str, &str)] = &[
    ("users", "hashint8extended(user_id, 0)"),
    ("cart_items", "hashint8extended(user_id, 0)"),
    ("archive", "hashint8extended(user_id, 0)"),
    ("user_emails", "hashtextextended(email, 0)"),
    ("devices", "uuid_hash_extended(device_id, 0)"),
    ("tickets", "hashint8extended(id, 0)"),
    ("moods", "hashint8extended(mood_id, 0)"),
];

pub async fn same_rows(pair: &Pair) -> Result<()> {
    pair.same_rows_of(KEYS).await?;
    let sql = "SELECT products::text FROM products ORDER BY product_id";
    let expected = column(&pair.single, sql).await?;
    for shard in &pair.tier.shards {
        let copy = column(&shard.primary.admin("shop").await?, sql).await?;
        ensure!(copy == expected, "a copy of products: {copy:?}, not {expected:?}");
    }
    let sql = "SELECT report::text FROM report ORDER BY name";
    ensure!(column(&pair.single, sql).await? == column(&pair.sharded, sql).await?, "report");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_queries_go_to_the_shards_of_their_keys() -> Result<()> {
    let pair = Pair::start(2, TABLES, SCHEMA).await?;
    same_rows(&pair).await?;
    inserts(&pair).await?;
    prepared(&pair).await?;
    refused(&pair).await?;
    same_rows(&pair).await
}

/// The rows' order is that of the query where it has one; one row comes in one order anyway.
pub async fn inserts(pair: &Pair) -> Result<()> {
    for sql in [
        // From another key, by ORDER BY, with literals of unknown type, NULL and conversions.
        "INSERT INTO user_emails (email, user_id) SELECT email, user_id FROM users ORDER BY user_id DESC RETURNING user_id, email",
        "INSERT INTO users (user_id, email, born) SELECT user_id + 100, NULL, '2020-02-29' FROM users ORDER BY 1 LIMIT 7 RETURNING *",
        "INSERT INTO users (name, user_id) SELECT 'it''s \\ ' || name, user_id::numeric + 200 FROM users WHERE user_id < 5 ORDER BY user_id RETURNING name",
        // From reference, global, no tables, aggregates and sub-queries of VALUES.
        "INSERT INTO users AS u (user_id, name) SELECT 300 + product_id, name FROM products ORDER BY 1 RETURNING u.user_id, upper(u.name) AS n",
        "INSERT INTO report SELECT name, count(*), sum(user_id) FROM users WHERE user_id < 3 GROUP BY name ORDER BY 1 RETURNING *",
        "INSERT INTO report (name, n) SELECT 'all', count(*) FROM users",
        "INSERT INTO users (user_id, name) SELECT 400 + row_number() OVER (ORDER BY name), name FROM report ORDER BY name RETURNING user_id",
        "INSERT INTO users (user_id) SELECT 500 + n FROM generate_series(1, 9) n ORDER BY n RETURNING user_id, name",
        "INSERT INTO users (user_id, name) SELECT max(user_id) + 1000, 'max' FROM users RETURNING user_id",
        "INSERT INTO users (user_id, name) SELECT * FROM (VALUES (601, 'a'), (602, 'b'), (603, NULL), (604, 'd')) v (i, n) \
         WHERE n IS NOT NULL ORDER BY i RETURNING *",
        "INSERT INTO users (user_id, name) (SELECT 610 + product_id, 'p' FROM products) ON CONFLICT DO NOTHING",
        "INSERT INTO devices SELECT ('a0eebc99-9c0b-4ef8-bb6d-6bb9bd3803' || lpad(user_id::text, 2, '0'))::uuid, name FROM users \
         WHERE user_id < 12 ORDER BY user_id RETURNING device_id",
        // Engine: a join that is not by the keys.
        "INSERT INTO cart_items (user_id, product_id, qty, note) SELECT e.user_id + 50, 2, 3, 'e' FROM user_emails e JOIN users u ON u.user_id = e.user_id \
         WHERE u.user_id < 9 ORDER BY 1 RETURNING user_id, product_id, twice",
        // Numbers that weir draws: the key itself, ALWAYS, and all kinds of values.
        "INSERT INTO tickets (what, at, took, f, raw, tags, doc) SELECT name, timestamptz '2024-03-01 10:00:00.123456+01' + user_id * interval '1 day', \
         user_id * interval '1 mon 2 days 03:04:05.6', 1.0 / user_id, decode('00ff27' || lpad(user_id::text, 2, '0'), 'hex'), ARRAY[name, NULL, 'a,\"b'], \
         jsonb_build_object('n', name) FROM users WHERE user_id < 8 ORDER BY user_id RETURNING what, f, tags",
        "INSERT INTO tickets (id, what) OVERRIDING SYSTEM VALUE SELECT 5000 + user_id, 'own' FROM users WHERE user_id < 6 ORDER BY 1 RETURNING id, what",
        "INSERT INTO moods SELECT user_id, (ARRAY['sad', 'glad']::mood[])[1 + user_id % 2], ARRAY['glad', NULL]::mood[] FROM users \
         WHERE user_id < 9 ORDER BY user_id RETURNING mood_id, mood, moods",
        "INSERT INTO moods (mood_id, mood) SELECT mood_id + 20, mood FROM moods ORDER BY mood DESC, mood_id RETURNING mood",
        // Into copies.
        "INSERT INTO products (product_id, name, price) SELECT 10 + user_id, name, user_id * 1.005 FROM users WHERE user_id < 9 ORDER BY 1 \
         RETURNING product_id, price",
        "INSERT INTO products SELECT product_id + 100, name FROM products ORDER BY 1 ON CONFLICT DO NOTHING RETURNING *",
        "INSERT INTO products (product_id, price) SELECT 500, sum(price) FROM products",
        // Conflicts.
        "INSERT INTO users (user_id, name) SELECT user_id, email FROM user_emails ORDER BY user_id LIMIT 4 ON CONFLICT (user_id) \
         DO UPDATE SET name = excluded.name || '!' RETURNING user_id, users.name",
        "INSERT INTO cart_items AS c (user_id, product_id, qty) SELECT n % 4 + 30, n % 3 + 1, n FROM generate_series(1, 12) n ORDER BY n \
         ON CONFLICT (user_id, product_id) DO NOTHING",
        // Nothing at all.
        "INSERT INTO users (user_id, name) SELECT product_id, name FROM products WHERE false RETURNING user_id",
        "INSERT INTO user_emails SELECT email FROM users WHERE user_id < 0",
        "BEGIN",
        "INSERT INTO users (user_id, name) SELECT 700 + product_id, 'in' FROM products ORDER BY 1 LIMIT 3 RETURNING user_id",
        "INSERT INTO users (user_id, name) SELECT user_id + 10, name FROM users WHERE user_id > 700 ORDER BY 1 RETURNING *",
        "SAVEPOINT s",
        "INSERT INTO users (user_id, name) SELECT user_id + 20, name FROM users WHERE user_id > 700",
        "ROLLBACK TO s",
        "COMMIT",
    ] {
        pair.fine(sql).await?;
    }
    for (sql, code) in [
        ("INSERT INTO users (user_id, name) SELECT product_id, name FROM products WHERE product_id = 1", "23505"),
        (
            "INSERT INTO users (user_id, name) SELECT 800 + product_id, nullif(name, 'one') FROM products WHERE product_id < 3",
            "23502",
        ),
        (
            "INSERT INTO cart_items (user_id, product_id, qty) SELECT 900 + product_id, product_id, 0 FROM products WHERE product_id = 1",
            "23514",
        ),
        (
            "INSERT INTO cart_items (user_id, product_id, note) SELECT 900, product_id, 'too long' FROM products WHERE product_id = 1",
            "22001",
        ),
        ("INSERT INTO cart_items (user_id, product_id) SELECT 900, 7 FROM products WHERE product_id = 1", "23503"),
        (
            "INSERT INTO cart_items (user_id, product_id) SELECT 90000000000, product_id FROM products WHERE product_id = 1",
            "22003",
        ),
        ("INSERT INTO users (user_id, born) SELECT 900, name FROM products", "42804"),
        ("INSERT INTO users (user_id, born) SELECT 900, 'no date' FROM products", "22007"),
        ("INSERT INTO users (user_id, name) SELECT 1, 'a', 'b' FROM products", "42601"),
        (
            "INSERT INTO users (user_id, name) SELECT 900 / (product_id - 2), 'a' FROM products WHERE product_id = 2",
            "22012",
        ),
        ("INSERT INTO tickets (id, what) SELECT product_id, name FROM products", "428C9"),
        (
            "INSERT INTO users (user_id, name) SELECT 5 + n % 2, 'x' FROM generate_series(1, 4) n ON CONFLICT (user_id) DO UPDATE SET name = 'y'",
            "21000",
        ),
    ] {
        pair.fails(sql, code).await?;
    }
    Ok(())
}

pub async fn prepared(pair: &Pair) -> Result<()> {
    let calls: &[&[&(dyn ToSql + Sync)]] =
        &[&[&2000_i64, &"a", &5_i64], &[&2100_i64, &"b", &3_i64], &[&2100_i64, &"c", &7_i64]];
    let sql = "INSERT INTO users (user_id, name, born) SELECT $1 + product_id, $2, '2001-01-01' FROM products WHERE product_id <= $3 \
               ORDER BY product_id ON CONFLICT (user_id) DO UPDATE SET name = $2 || excluded.name RETURNING user_id";
    same_prepared(pair, sql, calls).await?;
    let sql = "INSERT INTO users (user_id, name) SELECT user_id + $1, $2 FROM users WHERE user_id IN ($3, 4, 5) ORDER BY 1 RETURNING user_id";
    same_prepared(pair, sql, &[&[&3000_i64, &"a", &5_i64], &[&3100_i64, &"b", &3_i64], &[&3100_i64, &"b", &3_i64]])
        .await?;
    same_prepared(
        pair,
        "INSERT INTO report SELECT $1, count(*), 1.5 FROM users WHERE user_id > $2 RETURNING n",
        &[&[&"prepared", &3_i64]],
    )
    .await?;
    Ok(())
}

async fn refused(pair: &Pair) -> Result<()> {
    for sql in [
        "INSERT INTO users (user_id) SELECT user_id + 0.5 FROM users WHERE user_id < 3",
        "INSERT INTO users (user_id) SELECT NULL FROM products",
        "INSERT INTO products SELECT product_id + 900, now()::text FROM products ON CONFLICT (product_id) DO UPDATE SET name = now()::text",
        "EXPLAIN INSERT INTO user_emails SELECT email FROM users",
    ] {
        let failed = text(&pair.sharded, sql).await;
        ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{sql}: {failed:?}");
    }
    pair.sharded.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    let failed = text(&pair.sharded, "INSERT INTO user_emails SELECT email FROM users").await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{failed:?}");
    pair.sharded.batch_execute("ROLLBACK; SET DateStyle TO SQL").await?;
    let failed = text(&pair.sharded, "INSERT INTO user_emails SELECT 'x' || email FROM users").await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{failed:?}");
    pair.sharded.batch_execute("RESET DateStyle").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_move_when_their_key_changes() -> Result<()> {
    let pair = Pair::start(3, TABLES, SCHEMA).await?;
    for sql in [
        "UPDATE cart_items SET user_id = 40 WHERE user_id = 3 RETURNING *",
        "UPDATE public.cart_items AS c SET qty = c.qty + 1, user_id = c.user_id + 50, note = 'x' WHERE c.user_id = 4 RETURNING c.user_id, qty, twice",
        "UPDATE cart_items c SET user_id = '41' WHERE user_id = 5",
        "UPDATE cart_items SET user_id = user_id WHERE user_id = 6 RETURNING user_id",
        "UPDATE cart_items SET user_id = 6 WHERE user_id = 6 AND product_id = 1 RETURNING user_id",
        "UPDATE cart_items SET user_id = user_id + 10 WHERE user_id = -1 RETURNING user_id, note",
        "UPDATE devices SET device_id = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380311' WHERE label = 'nothing'",
        "INSERT INTO user_emails SELECT email, user_id FROM users",
        "UPDATE user_emails SET email = 'new@x' WHERE email = 'u7@x' RETURNING *",
        "INSERT INTO tickets (what, took, f, tags) SELECT 't', '1 day', 0.1, '{a}' FROM products",
        "UPDATE tickets SET what = upper(what) WHERE id > 0",
        "BEGIN",
        "UPDATE cart_items SET user_id = 77 WHERE user_id = 8 RETURNING user_id",
        "UPDATE cart_items SET user_id = 78, qty = (SELECT count(*) FROM products) WHERE user_id = 77 RETURNING user_id, qty",
        "ROLLBACK",
    ] {
        pair.fine(sql).await?;
    }
    for sql in [
        "UPDATE cart_items SET user_id = user_id + 1000 RETURNING *",
        "UPDATE cart_items SET user_id = user_id + 1000, qty = qty * 2 WHERE user_id IN (1009, 1010, 1011, 1012) RETURNING user_id, qty",
        "UPDATE user_emails SET email = 'x' || email WHERE user_id < 15 RETURNING *",
    ] {
        pair.same_set(sql).await?;
    }
    for (sql, code) in [
        ("UPDATE cart_items SET user_id = 1014, product_id = 3 WHERE user_id = 1013", "23505"),
        ("UPDATE cart_items SET user_id = 2, qty = 0 WHERE user_id = 1014", "23514"),
        ("UPDATE cart_items SET user_id = 2, note = 'too long' WHERE user_id = 1014", "22001"),
        ("UPDATE cart_items SET user_id = 2, product_id = 99 WHERE user_id = 1014", "23503"),
        ("UPDATE cart_items SET user_id = 2, twice = 1 WHERE user_id = 1014", "428C9"),
        ("UPDATE cart_items SET user_id = 2, nothing = 1 WHERE user_id = 1014", "42703"),
        ("UPDATE tickets SET id = 2 WHERE id = 1", "428C9"),
    ] {
        pair.fails(sql, code).await?;
    }
    let ids = "UPDATE cart_items SET user_id = $1, qty = qty + $2 WHERE user_id = $3 RETURNING user_id::bigint";
    same_prepared(
        &pair,
        ids,
        &[&[&3000_i32, &1_i32, &1014_i32], &[&3000_i32, &1_i32, &1014_i32], &[&3001_i32, &1_i32, &3000_i32]],
    )
    .await?;
    for sql in [
        // Whether Postgres finds equal keys on the way depends on the order of rows.
        "UPDATE cart_items SET user_id = user_id + 1 WHERE user_id IN (1015, 1016)",
        "UPDATE cart_items SET user_id = NULL WHERE user_id = 1015",
        "UPDATE cart_items SET (user_id, qty) = (1, 2) WHERE user_id = 1015",
        "UPDATE cart_items SET user_id = u.user_id + 9 FROM users u WHERE u.user_id = 1",
        "UPDATE cart_items SET user_id = DEFAULT WHERE user_id = 1015",
    ] {
        let failed = text(&pair.sharded, sql).await;
        ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{sql}: {failed:?}");
    }
    pair.sharded
        .batch_execute(
            "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; \
             CREATE TRIGGER noted BEFORE UPDATE ON devices FOR EACH ROW EXECUTE FUNCTION noted()",
        )
        .await?;
    let sql = "UPDATE devices SET device_id = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380311' WHERE device_id = 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380312'";
    let failed = text(&pair.sharded, sql).await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{failed:?}");
    same_rows(&pair).await
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_with_write_each_shards_own_rows() -> Result<()> {
    let pair = Pair::start(2, TABLES, SCHEMA).await?;
    for sql in [
        "WITH moved AS (DELETE FROM cart_items WHERE user_id = 3 RETURNING user_id, product_id, qty) \
         INSERT INTO archive SELECT user_id, product_id, qty, 'one' FROM moved RETURNING *",
        "WITH moved AS (DELETE FROM cart_items WHERE qty IN (5, 6, 7, 8) RETURNING *) \
         INSERT INTO archive (user_id, product_id, qty) SELECT user_id, product_id, qty FROM moved",
        "WITH gone AS (DELETE FROM cart_items c WHERE c.user_id IN (9, 10, 11) RETURNING c.*) \
         UPDATE users u SET name = u.name || g.qty FROM gone g WHERE g.user_id = u.user_id",
        "WITH added AS (INSERT INTO users (user_id, name) VALUES (101, 'new') RETURNING user_id) \
         INSERT INTO archive (user_id, why) SELECT user_id, 'added' FROM added RETURNING user_id, why",
        "WITH added AS (INSERT INTO users (user_id, name) VALUES (102, 'new') RETURNING *), \
         again AS (INSERT INTO archive (user_id, why) SELECT added.user_id, added.name FROM added RETURNING user_id) \
         INSERT INTO cart_items (user_id, product_id) SELECT user_id, 1 FROM again RETURNING user_id, product_id, twice",
        "WITH raised AS (UPDATE cart_items SET qty = qty + 1 WHERE user_id > 11 RETURNING user_id, qty AS more) \
         DELETE FROM archive a USING raised r WHERE r.user_id = a.user_id",
        "WITH twice AS (INSERT INTO archive (user_id, why) SELECT user_id, name FROM users WHERE user_id < 6 RETURNING user_id) \
         DELETE FROM cart_items USING twice WHERE twice.user_id = cart_items.user_id",
        "WITH a AS (DELETE FROM archive WHERE user_id = 1), b AS (DELETE FROM cart_items WHERE user_id = 2) UPDATE users SET name = 'three' WHERE user_id = 3",
        "WITH a AS (UPDATE users SET name = 'x' WHERE user_id = 1), b AS (DELETE FROM cart_items WHERE user_id = 12) DELETE FROM archive WHERE user_id = 1",
    ] {
        pair.fine(sql).await?;
        same_rows(&pair).await.with_context(|| sql.to_owned())?;
    }
    for sql in [
        "BEGIN",
        "WITH moved AS (DELETE FROM cart_items RETURNING *) INSERT INTO archive SELECT user_id, product_id, qty FROM moved",
        "ROLLBACK",
    ] {
        pair.fine(sql).await?;
    }
    for sql in [
        "WITH gone AS (DELETE FROM cart_items WHERE user_id > 14 RETURNING *) SELECT user_id, qty, twice FROM gone",
        "WITH gone AS (DELETE FROM archive WHERE user_id > 4 RETURNING user_id, why) SELECT g.user_id, u.name FROM gone g JOIN users u ON u.user_id = g.user_id",
    ] {
        pair.same_set(sql).await?;
    }
    let moved = "WITH moved AS (DELETE FROM cart_items WHERE user_id = $1 RETURNING *) INSERT INTO archive (user_id, qty, why) \
                 SELECT user_id, qty + $2, $3 FROM moved RETURNING user_id::bigint";
    same_prepared(&pair, moved, &[&[&13_i32, &1_i32, &"p"], &[&13_i32, &1_i32, &"p"], &[&14_i32, &1_i32, &"p"]])
        .await?;
    for sql in [
        // What is read of a part has to meet rows of other keys, or all rows together.
        "WITH gone AS (DELETE FROM archive RETURNING *) SELECT count(*) FROM gone",
        "WITH gone AS (DELETE FROM archive RETURNING *) INSERT INTO user_emails SELECT why FROM gone",
        "WITH gone AS (DELETE FROM archive RETURNING product_id AS user_id) INSERT INTO archive SELECT user_id FROM gone",
        "WITH gone AS (DELETE FROM archive RETURNING qty::int AS q) INSERT INTO archive (user_id) SELECT q FROM gone",
        "WITH gone AS (DELETE FROM archive RETURNING *) DELETE FROM users WHERE user_id IN (SELECT product_id FROM gone)",
        "WITH a AS (INSERT INTO users (user_id) VALUES (201), (202), (203), (204) RETURNING user_id) INSERT INTO archive (user_id) SELECT user_id FROM a",
        "WITH a AS (INSERT INTO users (user_id) VALUES (201) RETURNING user_id) DELETE FROM archive",
        "WITH a AS (INSERT INTO users (user_id) VALUES (201) RETURNING user_id, name) DELETE FROM archive \
         WHERE why = 'x' OR EXISTS (SELECT FROM a WHERE a.user_id = archive.user_id)",
        "WITH a AS (INSERT INTO users (user_id) VALUES (201) RETURNING user_id, name) UPDATE archive \
         SET why = (SELECT name FROM a WHERE a.user_id = archive.user_id)",
        "WITH gone AS (DELETE FROM archive RETURNING *) UPDATE products SET name = 'x' FROM gone WHERE gone.product_id = products.product_id",
        "WITH gone AS (DELETE FROM archive WHERE user_id < 9 RETURNING *) SELECT u.user_id FROM users u LEFT JOIN gone g ON g.user_id = u.user_id ORDER BY 1",
    ] {
        let failed = text(&pair.sharded, sql).await;
        ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{sql}: {failed:?}");
    }
    same_rows(&pair).await
}

#[tokio::test(flavor = "multi_thread")]
async fn merge_runs_where_its_rows_are() -> Result<()> {
    let pair = Pair::start(2, TABLES, SCHEMA).await?;
    for sql in [
        "INSERT INTO archive SELECT n, n % 3 + 1, n, 'old' FROM generate_series(2, 30, 2) n",
        "MERGE INTO cart_items AS c USING archive AS a ON c.user_id = a.user_id AND c.product_id = a.product_id \
         WHEN MATCHED AND a.qty > 10 THEN DELETE WHEN MATCHED THEN UPDATE SET qty = CASE WHEN a.qty > 5 THEN a.qty ELSE c.qty + 100 END, note = 'm' \
         WHEN NOT MATCHED AND a.user_id > 28 THEN DO NOTHING WHEN NOT MATCHED THEN INSERT (user_id, product_id, qty) VALUES (a.user_id, 1, a.qty)",
        "MERGE INTO users u USING (SELECT user_id, qty FROM cart_items WHERE qty > 3) s ON s.user_id = u.user_id \
         WHEN MATCHED THEN UPDATE SET name = u.name || s.qty WHEN NOT MATCHED THEN INSERT (name, user_id) VALUES ('m' || s.qty, s.user_id)",
        "MERGE INTO cart_items c USING products p ON p.product_id = c.product_id WHEN MATCHED AND p.price > 2 THEN UPDATE SET note = left(p.name, 5)",
        "MERGE INTO users u USING (VALUES (901, 'v')) AS s(id, n) ON u.user_id = s.id WHEN MATCHED THEN UPDATE SET name = s.n \
         WHEN NOT MATCHED THEN INSERT (user_id, name) VALUES (s.id, s.n)",
        "MERGE INTO users u USING (SELECT 901 AS id, 'w' AS n) s ON u.user_id = s.id WHEN MATCHED THEN UPDATE SET name = s.n \
         WHEN NOT MATCHED THEN INSERT (user_id, name) VALUES (s.id, s.n)",
        "MERGE INTO products p USING (VALUES (1, 'uno'), (9, 'nine')) s(id, n) ON p.product_id = s.id WHEN MATCHED THEN UPDATE SET name = s.n \
         WHEN NOT MATCHED THEN INSERT (product_id, name) VALUES (s.id, s.n)",
        "BEGIN",
        "MERGE INTO archive a USING users u ON u.user_id = a.user_id WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (user_id) VALUES (u.user_id)",
        "ROLLBACK",
    ] {
        pair.fine(sql).await.with_context(|| sql.to_owned())?;
    }
    same_rows(&pair).await?;
    pair.fails(
        "MERGE INTO users u USING archive a ON a.user_id = u.user_id AND u.user_id > 4 WHEN NOT MATCHED AND a.user_id = 2 \
         THEN INSERT (user_id, name) VALUES (a.user_id, 'there')",
        "23505",
    )
    .await?;
    for client in [&pair.single, &pair.sharded] {
        let sql = "MERGE INTO users u USING (SELECT $1::bigint AS id, $2::text AS n) s ON u.user_id = s.id \
                   WHEN MATCHED THEN UPDATE SET name = s.n WHEN NOT MATCHED THEN INSERT (user_id, name) VALUES (s.id, s.n)";
        for id in 895_i64..905 {
            ensure!(client.execute(sql, &[&id, &"merged"]).await? == 1, "{id}");
        }
    }
    for sql in [
        "MERGE INTO users u USING products p ON p.product_id = u.user_id WHEN NOT MATCHED THEN INSERT (user_id) VALUES (p.product_id)",
        "MERGE INTO users u USING archive a ON a.product_id = u.user_id WHEN MATCHED THEN UPDATE SET name = 'x'",
        "MERGE INTO users u USING archive a ON a.user_id = u.user_id WHEN NOT MATCHED THEN INSERT (user_id) VALUES (a.product_id)",
        "MERGE INTO users u USING archive a ON a.user_id = u.user_id WHEN MATCHED THEN UPDATE SET user_id = 5",
        "MERGE INTO users u USING (VALUES (951), (952), (953), (954)) s(id) ON u.user_id = s.id WHEN NOT MATCHED THEN INSERT (user_id) VALUES (s.id)",
        "MERGE INTO products p USING users u ON p.product_id = u.user_id WHEN MATCHED THEN UPDATE SET name = u.name",
        "MERGE INTO tickets t USING users u ON t.id = u.user_id WHEN NOT MATCHED THEN INSERT (what) VALUES ('x')",
    ] {
        let failed = text(&pair.sharded, sql).await;
        ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{sql}: {failed:?}");
    }
    same_rows(&pair).await
}
