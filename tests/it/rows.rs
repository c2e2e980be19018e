//! INSERTs whose rows belong to several shards, on one plain Postgres and on weir with two and three shards: the same
//! statements give the same answers, and afterwards the same rows are there, each on the shard that owns its key's slot.

use anyhow::{Context as _, Result, ensure};
use bytes::BytesMut;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, SimpleQueryMessage};
use weir_harness::{Plain, Tier};
use weir_wire::frontend::{Execute, Parse, put_sync, tag};

use crate::placement::column;
use crate::raw::Raw;

const TABLES: &[&str] = &[
    "users(user_id bigint)",
    "cart_items(user_id bigint)",
    "user_emails(email text)",
    "devices(device_id uuid)",
    "products",
];

const SCHEMA: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, email text UNIQUE, name text NOT NULL DEFAULT 'nobody');
CREATE TABLE products (product_id bigint PRIMARY KEY, name text);
CREATE TABLE cart_items (user_id int, product_id bigint REFERENCES products, qty int NOT NULL DEFAULT 1 CHECK (qty > 0),
    note varchar(5), PRIMARY KEY (user_id, product_id));
CREATE TABLE user_emails (email varchar(40) PRIMARY KEY, user_id smallint);
CREATE TABLE devices (device_id uuid PRIMARY KEY, label text);
INSERT INTO products VALUES (1, 'one'), (2, 'two'), (3, 'three')";

/// Each sharded table and how Postgres hashes its key.
const KEYS: &[(&str, &str)] = &[
    ("users", "hashint8extended(user_id, 0)"),
    ("cart_items", "hashint8extended(user_id, 0)"),
    ("user_emails", "hashtextextended(email, 0)"),
    ("devices", "uuid_hash_extended(device_id, 0)"),
];

/// One Postgres and a tier with the same tables.
pub struct Pair {
    pub tier: Tier,
    /// Keeps the one Postgres running.
    _plain: Plain,
    pub single: Client,
    pub sharded: Client,
}

/// What a client is told: columns, rows and row counts, or the error.
pub type Told = std::result::Result<Vec<String>, (String, String)>;

impl Pair {
    pub async fn start(shards: u32, tables: &[&str], schema: &str) -> Result<Pair> {
        let (tier, plain) = (Tier::builder().shards(shards).tables(tables).start().await?, Plain::start().await?);
        let (single, sharded) = (weir_harness::connect(&plain.dsn()).await?, tier.connect().await?);
        for statement in schema.split(';') {
            single.batch_execute(statement).await?;
            sharded.batch_execute(statement).await.with_context(|| statement.to_owned())?;
        }
        Ok(Pair { tier, _plain: plain, single, sharded })
    }

    /// A simple query on both.
    pub async fn same(&self, sql: &str) -> Result<Told> {
        let (expected, got) = (text(&self.single, sql).await, text(&self.sharded, sql).await);
        ensure!(expected == got, "{sql}\nPostgres: {expected:?}\nweir: {got:?}");
        Ok(got)
    }

    /// A simple query that must succeed on both.
    pub async fn fine(&self, sql: &str) -> Result<Vec<String>> {
        self.same(sql).await?.map_err(|error| anyhow::anyhow!("{sql}: {error:?}"))
    }

    /// As [`Pair::fine`], for rows in any order.
    pub async fn same_set(&self, sql: &str) -> Result<()> {
        let mut told = [text(&self.single, sql).await, text(&self.sharded, sql).await];
        for told in told.iter_mut().flatten() {
            told.sort();
        }
        let [expected, got] = told;
        ensure!(expected.is_ok() && expected == got, "{sql}\nPostgres: {expected:?}\nweir: {got:?}");
        Ok(())
    }

    /// An error on both, with this SQLSTATE.
    pub async fn fails(&self, sql: &str, code: &str) -> Result<()> {
        let told = self.same(sql).await?;
        ensure!(told.as_ref().is_err_and(|error| error.0 == code), "{sql}: {told:?}");
        Ok(())
    }

    /// Every table has the same rows on both, and every row is where its slot is.
    async fn same_rows(&self) -> Result<()> {
        self.same_rows_of(KEYS).await
    }

    /// The same of these tables, with how Postgres hashes their keys.
    pub async fn same_rows_of(&self, keys: &[(&str, &str)]) -> Result<()> {
        for (table, hash) in keys {
            let sql = format!("SELECT {table}::text FROM {table}");
            let mut expected = column(&self.single, &sql).await?;
            expected.sort();
            let (mut all, mut slots) = (Vec::new(), Vec::<Vec<String>>::new());
            for shard in &self.tier.shards {
                let direct = shard.primary.admin("shop").await?;
                all.extend(column(&direct, &sql).await?);
                slots.push(column(&direct, &format!("SELECT DISTINCT ({hash} >> 52) & 4095 FROM {table}")).await?);
                let open = column(&direct, "SELECT count(*) FROM pg_prepared_xacts").await?;
                ensure!(open == ["0"], "nothing is left prepared");
            }
            all.sort();
            ensure!(all == expected, "{table}: {all:?}, not {expected:?}");
            for (at, mine) in slots.iter().enumerate() {
                let shared = slots[at + 1..].iter().flatten().find(|slot| mine.contains(slot));
                ensure!(shared.is_none(), "{table}: slot {shared:?} is on two shards");
            }
        }
        Ok(())
    }
}

fn told(error: &Error) -> (String, String) {
    let error = error.as_db_error().expect("an error of the server");
    let detail = error.detail().unwrap_or_default();
    (error.code().code().to_owned(), format!("{} {detail} {:?}", error.message(), error.position()))
}

pub async fn text(client: &Client, sql: &str) -> Told {
    let messages = client.simple_query(sql).await.map_err(|error| told(&error))?;
    let shown = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let cells = (0..row.len()).map(|at| row.get(at).unwrap_or("NULL"));
            format!("row {}", cells.collect::<Vec<_>>().join("|"))
        }
        SimpleQueryMessage::RowDescription(columns) => {
            format!("columns {:?}", columns.iter().map(tokio_postgres::SimpleColumn::name).collect::<Vec<_>>())
        }
        SimpleQueryMessage::CommandComplete(rows) => format!("{rows} rows"),
        _ => "something else".to_owned(),
    };
    Ok(messages.iter().map(shown).collect())
}

/// Runs a prepared statement that returns bigints on both clients.
pub async fn same_prepared(pair: &Pair, sql: &str, calls: &[&[&(dyn ToSql + Sync)]]) -> Result<()> {
    let (single, sharded) = (pair.single.prepare(sql).await?, pair.sharded.prepare(sql).await?);
    assert_eq!(single.params(), sharded.params(), "{sql}");
    for call in calls {
        let run = async |client: &Client, statement| -> std::result::Result<Vec<i64>, (String, String)> {
            let rows = client.query(statement, call).await.map_err(|error| told(&error))?;
            Ok(rows.iter().map(|row| row.get(0)).collect())
        };
        let (expected, got) = (run(&pair.single, &single).await, run(&pair.sharded, &sharded).await);
        ensure!(expected == got, "{sql} {call:?}\nPostgres: {expected:?}\nweir: {got:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_two_shards_are_inserted_as_one_postgres_would() -> Result<()> {
    as_one_postgres(2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_for_three_shards_are_inserted_as_one_postgres_would() -> Result<()> {
    as_one_postgres(3).await
}

async fn as_one_postgres(shards: u32) -> Result<()> {
    let pair = Pair::start(shards, TABLES, SCHEMA).await?;
    texts(&pair).await?;
    conflicts(&pair).await?;
    errors(&pair).await?;
    parameters(&pair).await?;
    changes(&pair).await?;
    pair.same_rows().await
}

async fn texts(pair: &Pair) -> Result<()> {
    let told =
        pair.fine("INSERT INTO users VALUES (1, 'a', 'A'), (2, 'b', DEFAULT), (3, NULL, 'C'), (4, 'd', 'D')").await?;
    assert_eq!(told, ["4 rows"]);
    for sql in [
        "INSERT INTO users (name, user_id) VALUES ('x', 11), ('y', '12'), ('z', 13::bigint), (E'\\'', -14), ($$d$$, 15) \
         RETURNING user_id, upper(name) AS n, users.*",
        "INSERT INTO public.users AS u (user_id, name) VALUES (21, lower('ÄB')), (22, 'a' || 'b'), (23, (SELECT name FROM products \
         WHERE product_id = 2)) RETURNING u.name, u.user_id",
        "insert into \"users\" (user_id) values (31) , /* comment; */ (32),\n(33) -- the end\n returning *",
        "INSERT INTO cart_items VALUES (1, 1, 5), (2, 2, 6), (1, 2, 7), (3, 1, 8), (2, 1, 9) RETURNING user_id, product_id, qty;",
        "INSERT INTO cart_items (user_id, product_id) VALUES (5, 1), (6, 1), (7, 1), (8, 1)",
        "INSERT INTO user_emails VALUES ('a@x', 1), ('b@x', 2), ('it''s', 3), ('ü@x', NULL), ('', 4) RETURNING email",
        "INSERT INTO devices VALUES ('a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 'a'), ('{B0EEBC999C0B4EF8BB6D6BB9BD380A12}', 'b'), \
         ('c0eebc99-9c0b-4ef8-bb6d-6bb9bd380a13'::uuid, 'c'), ('d0eebc99-9c0b-4ef8-bb6d-6bb9bd380a14', 'd') RETURNING *",
        "BEGIN",
        "INSERT INTO users VALUES (41, 'e41', 'x'), (42, 'e42', 'y'), (43, 'e43', 'z') RETURNING user_id",
        "SAVEPOINT s",
        "INSERT INTO users VALUES (44, 'e44', 'x'), (45, 'e45', 'y'), (46, 'e46', 'z')",
        "ROLLBACK TO s",
        "COMMIT",
        "BEGIN",
        "INSERT INTO users VALUES (51, 'e51', 'x'), (52, 'e52', 'y'), (53, 'e53', 'z') RETURNING user_id",
        "ROLLBACK",
        "INSERT INTO users VALUES (61, 'e61', 'x'), (62, 'e62', 'y'); INSERT INTO users VALUES (63, 'e63', 'x'), (64, 'e64', 'y')",
    ] {
        pair.fine(sql).await?;
    }
    let many: Vec<String> = (1000..11_000).map(|id| format!("({id}, 'mail{id}', 'somebody{id}')")).collect();
    let told = pair.fine(&format!("INSERT INTO users (user_id, email, name) VALUES {}", many.join(", "))).await?;
    assert_eq!(told, ["10000 rows"]);
    let some: Vec<String> = (20_000..21_000).map(|id| format!("({id}, NULL)")).collect();
    pair.fine(&format!("INSERT INTO users (user_id, email) VALUES {} RETURNING user_id, name", some.join(","))).await?;
    pair.same_rows().await
}

async fn conflicts(pair: &Pair) -> Result<()> {
    for sql in [
        "INSERT INTO cart_items VALUES (1, 1, 5), (4, 1, 6), (2, 2, 7), (9, 1, 8), (3, 1, 9), (10, 1, 1) ON CONFLICT DO NOTHING \
         RETURNING user_id, product_id, qty",
        "INSERT INTO cart_items VALUES (1, 1, 5), (4, 1, 6), (12, 2, 7), (9, 1, 8) ON CONFLICT (user_id, product_id) DO NOTHING",
        "INSERT INTO cart_items AS c VALUES (1, 1, 50), (2, 2, 60), (21, 1, 70), (3, 1, 80) ON CONFLICT (user_id, product_id) DO UPDATE \
         SET qty = c.qty + excluded.qty WHERE c.user_id <> 2 RETURNING *",
        "INSERT INTO users VALUES (1, 'new', 'x'), (2, 'new2', 'y'), (71, 'new3', 'z') ON CONFLICT (user_id) DO UPDATE \
         SET email = excluded.email, user_id = excluded.user_id RETURNING users.user_id, users.email",
        "INSERT INTO users OVERRIDING SYSTEM VALUE VALUES (81, 'e81', 'x'), (82, 'e82', 'y') ON CONFLICT DO NOTHING",
    ] {
        pair.fine(sql).await?;
    }
    pair.fails(
        "INSERT INTO cart_items VALUES (1, 1, 5), (2, 1, 6), (1, 1, 7) ON CONFLICT (user_id, product_id) DO UPDATE SET qty = 3",
        "21000",
    )
    .await?;
    pair.same_rows().await
}

/// What fails leaves nothing behind, and says what Postgres says.
async fn errors(pair: &Pair) -> Result<()> {
    for (sql, code) in [
        ("INSERT INTO users VALUES (91, 'e91', 'x'), (92, 'e92', 'y'), (1, 'e93', 'z')", "23505"),
        ("INSERT INTO users VALUES (91, 'e91', 'x'), (92, 'e92', NULL), (93, 'e93', 'z')", "23502"),
        ("INSERT INTO cart_items VALUES (91, 1), (92, 2), (93, 99), (94, 1)", "23503"),
        ("INSERT INTO cart_items VALUES (91, 1, 1), (92, 2, 0), (94, 1, 1)", "23514"),
        ("INSERT INTO cart_items VALUES (91, 1, 1, 'long'), (92, 1, 1, 'longer'), (94, 1, 1)", "42601"),
        ("INSERT INTO cart_items VALUES (91, 1, 1, 'long'), (92, 1, 1, 'longer'), (94, 1, 1, '')", "22001"),
        ("INSERT INTO users VALUES (91, 'e91'), (92, 'e92', 'x')", "42601"),
        ("INSERT INTO users (user_id, nothing) VALUES (91, 'e91'), (92, 'e92'), (93, 'e93')", "42703"),
        ("INSERT INTO cart_items (user_id, product_id) VALUES (91, 'x'), (92, 1), (93, 1)", "22P02"),
        ("INSERT INTO cart_items (user_id, product_id) VALUES (91, 1), (92, 1), (93, 'x')", "22P02"),
        ("INSERT INTO users (user_id, name) VALUES (91, generate_series(1, 2)::text), (92, 'x'), (93, 'y')", "0A000"),
        ("INSERT INTO users (user_id, name) VALUES (91, 'x'), (92, 'y'), (93, 'z') RETURNING nothing", "42703"),
        (
            "INSERT INTO users (user_id, name) VALUES (91, 'x'), (92, 'y'), (93, 'z') ON CONFLICT (name) DO NOTHING",
            "42P10",
        ),
    ] {
        pair.fails(sql, code).await?;
    }
    pair.fine("BEGIN").await?;
    pair.fails("INSERT INTO users VALUES (91, 'e91', 'x'), (92, 'e92', 'y'), (1, 'e93', 'z')", "23505").await?;
    pair.fails("INSERT INTO users VALUES (91, 'e91', 'x'), (92, 'e92', 'y')", "25P02").await?;
    pair.fine("ROLLBACK").await?;
    pair.same_rows().await
}

async fn parameters(pair: &Pair) -> Result<()> {
    let sql = "INSERT INTO users (user_id, email, name) VALUES ($1, $2, $3), ($4, $5, 'fixed'), ($6, NULL, $3) RETURNING user_id";
    let none: Option<&str> = None;
    same_prepared(
        pair,
        sql,
        &[
            &[&101_i64, &"p1", &"n", &102_i64, &"p2", &103_i64],
            &[&104_i64, &none, &"n", &105_i64, &none, &106_i64],
            &[&107_i64, &"p7", &"n", &101_i64, &"p8", &108_i64],
            &[&109_i64, &"p7", &"n", &110_i64, &"p8", &111_i64],
            &[&112_i64, &"p7", &"n", &113_i64, &"p8", &114_i64],
            &[&115_i64, &"p15", &none, &116_i64, &"p16", &117_i64],
        ],
    )
    .await?;
    let sql = "INSERT INTO cart_items (user_id, product_id, qty) VALUES ($1, $2, $3), ($4, $2, $5 + 1), ($6::int, 3, DEFAULT) \
               ON CONFLICT DO NOTHING RETURNING user_id::bigint";
    same_prepared(
        pair,
        sql,
        &[
            &[&201_i32, &1_i64, &1_i32, &202_i32, &2_i32, &203_i32],
            &[&201_i32, &1_i64, &1_i32, &204_i32, &2_i32, &205_i32],
            &[&206_i32, &1_i64, &1_i32, &204_i32, &2_i32, &203_i32],
            &[&207_i32, &9_i64, &1_i32, &208_i32, &2_i32, &209_i32],
        ],
    )
    .await?;
    let sql = "INSERT INTO user_emails (user_id, email) VALUES ($2, $1), ($4, $3), ($4, $5) RETURNING user_id::bigint";
    same_prepared(
        pair,
        sql,
        &[&[&"p1@x", &1_i16, &"p2@x", &2_i16, &"p3@x"], &[&"p4@x", &1_i16, &"p5@x", &2_i16, &"p6@x"]],
    )
    .await?;
    // Parameters by the thousand.
    let ids: Vec<i64> = (30_000..33_000).collect();
    let places: Vec<String> = (1..=ids.len()).map(|number| format!("(${number}, 'bulk')")).collect();
    let sql = format!("INSERT INTO users (user_id, name) VALUES {} RETURNING user_id", places.join(", "));
    let ids: Vec<&(dyn ToSql + Sync)> = ids.iter().map(|id| id as &(dyn ToSql + Sync)).collect();
    same_prepared(pair, &sql, &[&ids]).await?;
    // Declared types are kept.
    for client in [&pair.single, &pair.sharded] {
        let sql = "INSERT INTO cart_items (user_id, product_id) VALUES ($1, $2), ($3, $2), ($4, $2)";
        let statement = client.prepare_typed(sql, &[Type::INT8, Type::INT4, Type::INT2, Type::INT8]).await?;
        assert_eq!(client.execute(&statement, &[&301_i64, &1_i32, &302_i16, &303_i64]).await?, 3);
    }
    Ok(())
}

/// UPDATE and DELETE on some and on all shards.
async fn changes(pair: &Pair) -> Result<()> {
    for sql in [
        "UPDATE users SET name = name || '!' WHERE user_id IN (1, 2, 3, 4) RETURNING user_id, name",
        "UPDATE users SET name = name || '?' WHERE user_id = ANY('{11,12,13}') RETURNING *",
        "UPDATE cart_items c SET qty = c.qty + 1 FROM users u WHERE u.user_id = c.user_id AND u.user_id IN (1, 2, 3) RETURNING c.*",
        "UPDATE cart_items c SET note = left(p.name, 5) FROM products p WHERE p.product_id = c.product_id RETURNING c.user_id, note",
        "UPDATE cart_items c SET qty = c.qty + length(u.name) FROM users u WHERE u.user_id = c.user_id RETURNING c.*, u.name",
        "DELETE FROM cart_items c USING users u WHERE u.user_id = c.user_id AND u.user_id IN (1, 2) RETURNING c.user_id, u.name",
        "DELETE FROM cart_items USING products p WHERE p.product_id = cart_items.product_id AND p.name = 'two' RETURNING cart_items.*",
        "DELETE FROM cart_items WHERE user_id IN (SELECT user_id FROM users WHERE user_id < 20) RETURNING *",
        "DELETE FROM user_emails WHERE email IN ('a@x', 'b@x', 'nobody@x')",
        "INSERT INTO cart_items (user_id, product_id, qty) SELECT user_id, 3, 4 FROM users WHERE user_id IN (3, 3) RETURNING *",
        "INSERT INTO cart_items (user_id, product_id, qty) SELECT user_id, 3, 4 FROM users WHERE user_id IN (11, 12, 13, 15) RETURNING *",
        "INSERT INTO cart_items (qty, product_id, user_id) SELECT length(u.name), 2, u.user_id FROM users u JOIN products p ON p.product_id = 2 \
         WHERE u.user_id BETWEEN 2 AND 40 AND NOT EXISTS (SELECT FROM cart_items c WHERE c.user_id = u.user_id) RETURNING user_id",
        "INSERT INTO cart_items SELECT user_id, 1, count(*) FROM cart_items GROUP BY user_id ON CONFLICT (user_id, product_id) DO UPDATE \
         SET qty = excluded.qty + 10",
    ] {
        pair.same_set(sql).await?;
    }
    // Which of the rows is complained of is open.
    let failed = text(&pair.sharded, "UPDATE users SET name = NULL WHERE user_id IN (1, 2, 3, 4)").await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "23502"), "{failed:?}");
    let failed = text(&pair.sharded, "INSERT INTO users (user_id) SELECT product_id FROM cart_items").await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "23505"), "{failed:?}");
    // Not one statement any more, and of one shard only.
    let failed = text(&pair.sharded, "EXPLAIN INSERT INTO users (user_id) VALUES (901), (902), (903), (904)").await;
    ensure!(failed.as_ref().is_err_and(|error| error.0 == "0A000"), "{failed:?}");
    pair.same_rows().await
}

/// A type of one's own has another number on each server; a part of a statement says nothing of the parameters it left out.
#[tokio::test(flavor = "multi_thread")]
async fn parameters_of_types_with_other_numbers_on_each_shard() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).start().await?;
    tier.shards[1].primary.admin("shop").await?.batch_execute("CREATE TABLE only_here (a int)").await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TYPE mood AS ENUM ('sad', 'glad')").await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, mood mood, moods mood[])").await?;
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    let sql = "INSERT INTO users VALUES ($1, $2, NULL), ($3, $4, $5), ($6, 'sad', '{}'), ($7, $2, $5) RETURNING user_id, mood";
    for (round, expected) in [(0, "12DDDDCZ"), (1, "12DDDDCZ"), (1, "12EZ")] {
        let values: Vec<String> = [1, 0, 2, 0, 0, 3, 4].iter().map(|id| (round * 10 + id).to_string()).collect();
        let mut values: Vec<&str> = values.iter().map(String::as_str).collect();
        (values[1], values[3], values[4]) = ("glad", "sad", "{sad,glad}");
        Parse { name: b"", sql: sql.as_bytes(), types: b"" }.put(&mut raw.out);
        put_bind(&mut raw.out, &values);
        Execute { portal: b"", rows_max: 0 }.put(&mut raw.out);
        put_sync(&mut raw.out);
        let (tags, bodies) = raw.until_ready().await?;
        assert_eq!(tags, expected, "{round}: {bodies:?}");
    }
    assert_eq!(column(&client, "SELECT user_id || ' ' || mood::text FROM users").await?.len(), 8);
    // Without RETURNING a limit means nothing: some drivers always send one.
    let sql = b"INSERT INTO users (user_id) VALUES (31), (32), (33), (34)";
    Parse { name: b"", sql, types: b"" }.put(&mut raw.out);
    put_bind(&mut raw.out, &[]);
    Execute { portal: b"", rows_max: 1 }.put(&mut raw.out);
    put_sync(&mut raw.out);
    assert_eq!(raw.until_ready().await?.0, "12CZ");
    Ok(())
}

pub fn put_bind(out: &mut BytesMut, values: &[&str]) {
    weir_wire::frame::put(out, tag::BIND, |out| {
        out.extend_from_slice(&[0, 0, 0, 0]);
        out.extend_from_slice(&(values.len() as u16).to_be_bytes());
        for value in values {
            out.extend_from_slice(&(value.len() as i32).to_be_bytes());
            out.extend_from_slice(value.as_bytes());
        }
        out.extend_from_slice(&[0, 0]);
    });
}

/// Rows of several shards, while the proxy is killed again and again: all of a statement's rows are there, or none.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_proxy_leaves_whole_statements_only() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).start().await?;
    tier.connect().await?.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, name text)").await?;
    let mut acknowledged = 0;
    for round in 0..3_i64 {
        let mut workers = tokio::task::JoinSet::new();
        for worker in 0..4_i64 {
            let client = tier.connect().await?;
            workers.spawn(async move {
                let sql = "INSERT INTO users VALUES ($1, $5), ($2, $5), ($3, $5), ($4, $5)";
                let statement = client.prepare(sql).await?;
                for step in 0.. {
                    let first = ((round * 4 + worker) * 1_000_000 + step) * 4;
                    let name = first.to_string();
                    let done =
                        client.execute(&statement, &[&first, &(first + 1), &(first + 2), &(first + 3), &name]).await;
                    if done.is_err() {
                        return anyhow::Ok(step);
                    }
                }
                Ok(0)
            });
        }
        tokio::time::sleep(std::time::Duration::from_millis(300 + 170 * round as u64)).await;
        tier.kill_weir();
        while let Some(done) = workers.join_next().await {
            acknowledged += done??;
        }
        tier.restart_weir().await?;
    }
    let client = tier.connect().await?;
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        for attempt in 0.. {
            if column(&direct, "SELECT count(*) FROM pg_prepared_xacts").await? == ["0"] {
                break;
            }
            ensure!(attempt < 200, "transactions are still in doubt");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
    let mut statements = std::collections::BTreeMap::<String, u32>::new();
    for name in column(&client, "SELECT name FROM users").await? {
        *statements.entry(name).or_default() += 1;
    }
    ensure!(statements.values().all(|rows| *rows == 4), "a part of a statement was left: {statements:?}");
    ensure!(statements.len() as i64 >= acknowledged && acknowledged > 0, "{} of {acknowledged}", statements.len());
    Ok(())
}
