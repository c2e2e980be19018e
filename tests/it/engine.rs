//! The fallback engine: what neither one shard nor a merge can answer is answered by Postgres on the hub, as one Postgres would.
//!
//! Reading order: answers → roles and secrets → in step with DDL → transactions → outages and limits. Every test has a tier of its own;
//! a plain Postgres with the same rows is the judge. Non-goals: every kind of statement (`differential.rs`) and speed.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Front, Plain, Tier, connect};

use crate::placement::column;

const SCHEMA: &[&str] = &[
    "CREATE TABLE users (user_id bigint PRIMARY KEY, email text NOT NULL, country text NOT NULL, born date)",
    "CREATE TABLE orders (user_id bigint, order_id bigint, status text NOT NULL, total numeric(12,2) NOT NULL, day date NOT NULL, \
     PRIMARY KEY (user_id, order_id))",
    "CREATE TABLE order_items (user_id bigint, order_id bigint, line int, product_id bigint NOT NULL, qty int NOT NULL, \
     PRIMARY KEY (user_id, order_id, line))",
    "CREATE TABLE products (product_id bigint PRIMARY KEY, name text NOT NULL, category text NOT NULL)",
    "CREATE TABLE inventory (product_id bigint PRIMARY KEY, on_hand int NOT NULL)",
    "CREATE TABLE user_emails (email text PRIMARY KEY, user_id bigint NOT NULL)",
    "CREATE TABLE settings (name text PRIMARY KEY, value text)",
];

/// None of them belongs on one shard, and none can be merged.
pub const HARD: &[&str] = &[
    // Joined by another column, on tables of other keys.
    "SELECT a.product_id, b.product_id, count(*) FROM order_items a JOIN order_items b ON a.order_id = b.order_id \
     AND a.product_id < b.product_id GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 7",
    "SELECT u.country, sum(i.on_hand) FROM order_items o JOIN inventory i USING (product_id) JOIN users u ON u.user_id = o.user_id \
     GROUP BY 1 ORDER BY 1",
    "SELECT * FROM (SELECT user_id, order_id, total, rank() OVER (PARTITION BY status ORDER BY total DESC, order_id) r FROM orders) x \
     WHERE r <= 3 ORDER BY total, order_id",
    "WITH RECURSIVE chain(user_id, depth) AS (SELECT min(user_id), 1 FROM users UNION ALL SELECT \
     (SELECT min(u.user_id) FROM users u WHERE u.user_id > c.user_id), depth + 1 FROM chain c WHERE depth < 9) SELECT * FROM chain ORDER BY depth",
    "SELECT user_id, total FROM orders o WHERE total > (SELECT avg(total) * 1.5 FROM orders p WHERE p.status = o.status) ORDER BY 1, 2 LIMIT 20",
    "SELECT user_id FROM users EXCEPT SELECT user_id FROM orders WHERE status = 'paid' ORDER BY 1",
    "SELECT country, status, count(*), sum(total) FROM users JOIN orders USING (user_id) \
     GROUP BY GROUPING SETS ((country), (status), ()) ORDER BY 1, 2, 3",
    "SELECT DISTINCT ON (status) status, rank() OVER (ORDER BY total, order_id) FROM orders ORDER BY status, total, order_id",
    "SELECT u.user_id, p.product_id FROM users u FULL JOIN products p ON p.product_id = u.user_id ORDER BY 1, 2",
    "SELECT c.country, t.order_id FROM (SELECT DISTINCT country FROM users) c, LATERAL (SELECT o.order_id FROM orders o \
     JOIN users u USING (user_id) WHERE u.country = c.country ORDER BY o.total DESC, o.order_id LIMIT 2) t ORDER BY 1, 2",
    "SELECT count(*) FROM (SELECT user_id FROM orders ORDER BY total DESC, order_id LIMIT 11) top JOIN users u USING (user_id)",
    "SELECT user_id, email FROM users WHERE user_id IN (SELECT user_id FROM orders ORDER BY total, order_id LIMIT 4) ORDER BY 1",
    "TABLE users ORDER BY user_id LIMIT 3",
    "SELECT p.name, string_agg(qty::text, ',' ORDER BY qty) FROM order_items JOIN products p USING (product_id) GROUP BY p.name ORDER BY 1",
    "SELECT s.value, count(*) FROM settings s, users u WHERE u.country = s.name GROUP BY 1 ORDER BY 1",
];

pub async fn load(client: &Client) -> Result<()> {
    for table in SCHEMA {
        client.batch_execute(table).await?;
    }
    for product in 1..=20 {
        let row = format!("INSERT INTO products VALUES ({product}, 'product {product}', 'c{}')", product % 3);
        client.batch_execute(&row).await?;
        client.batch_execute(&format!("INSERT INTO inventory VALUES ({product}, {})", product * 3 % 11)).await?;
    }
    for (name, value) in [("DE", "Germany"), ("JP", "Japan")] {
        client.batch_execute(&format!("INSERT INTO settings VALUES ('{name}', '{value}')")).await?;
    }
    for user in 1..=40 {
        let country = ["DE", "JP", "BR"][user % 3];
        client
            .batch_execute(&format!(
                "INSERT INTO users VALUES ({user}, 'u{user}@x.com', '{country}', date '1980-01-01' + {user})"
            ))
            .await?;
        for order in 0..user % 4 {
            let id = user * 10 + order;
            let (status, total) = (["new", "paid", "sent"][id % 3], id * 7 % 500);
            client
                .batch_execute(&format!(
                    "INSERT INTO orders VALUES ({user}, {id}, '{status}', {total}.5, date '2026-01-01' + {order})"
                ))
                .await?;
            for line in 1..=2 {
                let product = 1 + (id * 3 + line * 5) % 20;
                client
                    .batch_execute(&format!("INSERT INTO order_items VALUES ({user}, {id}, {line}, {product}, {line})"))
                    .await?;
            }
        }
    }
    Ok(())
}

/// All rows of a simple query as text.
pub async fn rows(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
    let messages = client.simple_query(sql).await.with_context(|| sql.to_owned())?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
        _ => None,
    };
    Ok(messages.iter().filter_map(row).collect())
}

pub async fn compare(sharded: &Client, single: &Client, statements: &[&str]) -> Result<()> {
    let mut wrong = String::new();
    for sql in statements {
        let (left, right) = (rows(sharded, sql).await, rows(single, sql).await?);
        match left {
            Ok(left) if left == right => {}
            Ok(left) => writeln!(wrong, "{sql}\n  weir  {left:?}\n  plain {right:?}")?,
            Err(error) => writeln!(wrong, "{sql}\n  weir {error:?}")?,
        }
    }
    ensure!(wrong.is_empty(), "{wrong}");
    Ok(())
}

/// The refusal of a statement: its SQLSTATE, DETAIL and HINT.
pub async fn refusal(client: &Client, sql: &str) -> Result<(String, String, String)> {
    let Err(error) = client.simple_query(sql).await else { anyhow::bail!("not refused: {sql}") };
    let error = error.as_db_error().context("not an error of the server's")?;
    let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
    Ok((error.code().code().to_owned(), text(error.detail()), text(error.hint())))
}

pub async fn route(tier: &Tier, sql: &str) -> Result<String> {
    let console = connect(&tier.admin_dsn()).await?;
    let rows = rows(&console, &format!("ROUTE '{}'", sql.replace('\'', "''"))).await?;
    Ok(rows
        .iter()
        .filter_map(|row| Some(format!("{}={}", row[0].as_deref()?, row[1].as_deref()?)))
        .collect::<Vec<_>>()
        .join("; "))
}

#[tokio::test(flavor = "multi_thread")]
async fn hard_queries_are_answered_as_by_one_postgres() -> Result<()> {
    let (tier, plain) = (Tier::builder().shards(3).start().await?, Plain::start().await?);
    let (sharded, single) = (tier.connect().await?, connect(&plain.dsn()).await?);
    load(&single).await?;
    load(&sharded).await?;
    compare(&sharded, &single, HARD).await?;
    for sql in HARD {
        let way = route(&tier, sql).await?;
        ensure!(way.contains("target=fallback engine"), "{sql}: {way}");
    }
    // Prepared, with parameters, in binary, twice on the same connection.
    let sql = "SELECT u.user_id, count(*) OVER (PARTITION BY u.country) FROM users u JOIN orders o ON o.order_id > u.user_id \
               WHERE o.total > $1::numeric::float8 AND u.country = $2 ORDER BY 1, 2 LIMIT 30";
    for (total, country) in [(100.0_f64, "DE"), (3.5, "JP")] {
        let mut answers = Vec::new();
        for client in [&sharded, &single] {
            let statement = client.prepare(&sql.replace("::numeric::float8", "::float8")).await?;
            let rows = client.query(&statement, &[&total, &country]).await?;
            answers.push(rows.iter().map(|row| (row.get::<_, i64>(0), row.get::<_, i64>(1))).collect::<Vec<_>>());
        }
        assert_eq!(answers[0], answers[1]);
        assert!(!answers[0].is_empty());
    }
    // A client's own bound of time and a cancel work there too.
    let slow = "SELECT count(*) FROM users a, users b, users c, users d, users e, generate_series(1, 100) WHERE a.country <> b.email";
    sharded.batch_execute("SET statement_timeout = 200").await?;
    assert_eq!(refusal(&sharded, slow).await?.0, "57014");
    sharded.batch_execute("RESET statement_timeout").await?;
    let cancel = sharded.cancel_token();
    let (answer, _) = tokio::join!(sharded.simple_query(slow), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cancel.cancel_query(tokio_postgres::NoTls).await
    });
    assert_eq!(answer.err().and_then(|error| error.code().cloned()), Some(SqlState::QUERY_CANCELED));
    compare(&sharded, &single, &HARD[..2]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_operator_classes_views_answer_alike() -> Result<()> {
    let (tier, plain) =
        (Tier::builder().config_extra("[engine]\npartitions = false").start().await?, Plain::start().await?);
    let (sharded, single) = (tier.connect().await?, connect(&plain.dsn()).await?);
    load(&single).await?;
    load(&sharded).await?;
    compare(&sharded, &single, HARD).await?;
    let hub = tier.hub.admin("weir_engine_shop").await?;
    assert_eq!(column(&hub, "SELECT relkind FROM pg_class WHERE oid = 'public.users'::regclass").await?, ["v"]);
    Ok(())
}

/// As managed servers have it: the hub's account makes databases and roles, and what needs more is prepared for it (docs/dba.md).
#[tokio::test(flavor = "multi_thread")]
async fn a_hub_account_without_superuser_is_enough() -> Result<()> {
    let (tier, plain) = (Tier::builder().start().await?, Plain::start().await?);
    let (direct, single) = (tier.connect().await?, connect(&plain.dsn()).await?);
    load(&single).await?;
    load(&direct).await?;
    tier.kill_weir();
    let admin = tier.hub.admin("postgres").await?;
    for sql in [
        "CREATE ROLE modest LOGIN CREATEDB CREATEROLE PASSWORD 'chalk'",
        "CREATE DATABASE modest_hub OWNER modest",
        "CREATE DATABASE modest_engine OWNER modest",
    ] {
        admin.batch_execute(sql).await?;
    }
    let prepared = "CREATE SCHEMA weir_fdw; CREATE EXTENSION postgres_fdw SCHEMA weir_fdw;
        GRANT USAGE ON SCHEMA weir_fdw TO modest; GRANT USAGE ON FOREIGN DATA WRAPPER postgres_fdw TO modest";
    tier.hub.admin("modest_engine").await?.batch_execute(prepared).await?;
    let written = std::fs::read_to_string(tier.run.path().join("weir.toml"))?;
    let hub = format!("postgres://modest:chalk@{}/modest_hub", tier.hub.address());
    let config: Vec<String> = written
        .lines()
        .filter(|line| {
            !line.starts_with("listen") && !line.starts_with("http_listen") && !line.starts_with("users_file")
        })
        .map(|line| if line.starts_with("dsn = ") { format!("dsn = \"{hub}\"") } else { line.to_owned() })
        .collect();
    let config = config.join("\n") + "\n[engine]\ndatabase = \"modest_engine\"\n";
    let password = &tier.state.shop_password;
    let front = Front::builder().config(&config).user("shop", password).start(&tier.run).await?;
    compare(&front.connect("shop", "shop").await?, &single, HARD).await?;
    let engine = tier.hub.admin("modest_engine").await?;
    let made = "SELECT relkind::text || ' of ' || pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'public.users'::regclass";
    assert_eq!(column(&engine, made).await?, ["v of modest"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_hold_and_nobody_reads_the_credentials() -> Result<()> {
    let extra = "[auth_query]\n[pool]\nsize = 3";
    let tier = Tier::builder().config_extra(extra).start().await?;
    let client = tier.connect().await?;
    load(&client).await?;
    for shard in &tier.shards {
        let admin = shard.primary.admin("shop").await?;
        admin
            .batch_execute("CREATE ROLE readers NOLOGIN; CREATE ROLE clerk LOGIN PASSWORD 'pencil' IN ROLE readers")
            .await?;
        admin.batch_execute("CREATE ROLE guest LOGIN PASSWORD 'chalk'").await?;
    }
    client
        .batch_execute("GRANT SELECT ON users TO readers; GRANT SELECT (user_id, total) ON orders TO readers")
        .await?;
    let own = |user: &str, password: &str| format!("postgres://{user}:{password}@127.0.0.1:{}/shop", tier.port());
    let (clerk, guest) = (connect(&own("clerk", "pencil")).await?, connect(&own("guest", "chalk")).await?);
    let by_country = "SELECT country, rank() OVER (ORDER BY country) FROM users ORDER BY 1 LIMIT 1";
    let wait = Instant::now() + Duration::from_secs(60);
    // The new roles come with the next look at the shards: nothing told weir of them.
    while let Err(error) = rows(&clerk, by_country).await {
        ensure!(Instant::now() < wait, "{error:#}\n{}", tier.weir_log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    rows(&clerk, "SELECT user_id, rank() OVER (ORDER BY total) FROM orders").await?;
    for (who, sql) in [
        (&clerk, "SELECT status, rank() OVER (ORDER BY total) FROM orders"),
        (&clerk, "SELECT * FROM inventory a JOIN users u ON a.on_hand = u.user_id"),
        (&guest, by_country),
    ] {
        assert_eq!(refusal(who, sql).await?.0, "42501", "{sql}");
    }
    client.batch_execute("REVOKE SELECT ON users FROM readers").await?;
    assert_eq!(refusal(&clerk, by_country).await?.0, "42501", "a grant that is gone is gone at once");
    // Somebody who can reach the hub by himself.
    let direct = format!("postgres://clerk:pencil@{}/weir_engine_shop", tier.hub.address());
    let direct = connect(&direct).await?;
    let secrets = "SELECT coalesce(string_agg(t, ' '), '') FROM (\
         SELECT umoptions::text t FROM pg_user_mappings UNION ALL SELECT option_value FROM information_schema.user_mapping_options \
         UNION ALL SELECT srvoptions::text FROM pg_foreign_server UNION ALL SELECT option_value FROM information_schema.foreign_server_options) x";
    let seen = column(&direct, secrets).await?.join(" ");
    assert!(!seen.contains(&tier.state.admin_password) && !seen.contains("weir_admin"), "{seen}");
    direct.batch_execute("SET default_transaction_read_only = off").await?;
    for sql in [
        "SELECT * FROM pg_user_mapping",
        "SELECT digest FROM weir_engine.state",
        "CREATE TABLE mine (a int)",
        "CREATE TEMP TABLE mine (a int)",
        "CREATE SCHEMA mine",
        "CREATE USER MAPPING FOR clerk SERVER weir_shard0 OPTIONS (user 'x')",
        "ALTER SERVER weir_shard0 OPTIONS (SET host 'example.com')",
        "DELETE FROM users",
        "SELECT * FROM orders",
    ] {
        assert_eq!(refusal(&direct, sql).await?.0, "42501", "{sql}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_statement_on_any_connection_sees_new_schema() -> Result<()> {
    let tier = Tier::builder().start().await?;
    let (client, other) = (tier.connect().await?, tier.connect().await?);
    load(&client).await?;
    for round in 0..3 {
        client.batch_execute(&format!("ALTER TABLE users ADD COLUMN extra_{round} int DEFAULT {round}")).await?;
        let sql = format!("SELECT DISTINCT extra_{round}, rank() OVER (ORDER BY extra_{round}) FROM users");
        assert_eq!(rows(&other, &sql).await?, [[Some(round.to_string()), Some("1".to_owned())]]);
    }
    client.batch_execute("ALTER TABLE users DROP COLUMN extra_0").await?;
    assert_eq!(refusal(&other, "SELECT extra_0, rank() OVER (ORDER BY extra_0) FROM users").await?.0, "42703");
    client.batch_execute("ALTER TABLE users ALTER COLUMN extra_1 TYPE text USING 'text ' || extra_1").await?;
    let first = "SELECT max(extra_1) OVER (), rank() OVER (ORDER BY user_id) FROM users LIMIT 1";
    assert_eq!(rows(&other, first).await?[0][0].as_deref(), Some("text 1"));
    // Views, types and functions that only read.
    for statement in [
        "CREATE TYPE mood AS ENUM ('sad', 'happy')",
        "ALTER TABLE users ADD COLUMN feels mood DEFAULT 'happy'",
        "CREATE FUNCTION price(a bigint) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT on_hand * 2 FROM public.inventory WHERE product_id = a'",
        "CREATE VIEW big_orders AS SELECT o.user_id, o.total, u.country FROM orders o JOIN users u USING (user_id) WHERE total > 200",
        "CREATE VIEW by_country AS SELECT country, count(*) AS n, sum(total) AS total FROM big_orders GROUP BY country",
        "CREATE MATERIALIZED VIEW frozen AS SELECT count(*) AS n FROM users",
        "CREATE VIEW here AS SELECT current_database() AS name, count(*) FROM users",
    ] {
        client.batch_execute(statement).await.with_context(|| statement.to_owned())?;
    }
    let expected = rows(
        &other,
        "SELECT u.country, count(*), sum(total) FROM orders o JOIN users u ON u.user_id + 0 = o.user_id \
        WHERE total > 200 GROUP BY 1 ORDER BY 1",
    )
    .await?;
    assert_eq!(rows(&other, "SELECT * FROM by_country ORDER BY 1").await?, expected);
    assert!(expected.len() > 1);
    assert_eq!(
        column(&other, "SELECT sum(price(product_id)) FROM inventory").await?,
        column(&other, "SELECT sum(on_hand) * 2 + 0 FROM inventory").await?
    );
    let messages = other.simple_query("SELECT DISTINCT ON (feels) feels FROM users ORDER BY feels, country").await?;
    assert!(
        messages.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("happy")))
    );
    let typed = other.query("SELECT DISTINCT ON (feels) feels FROM users ORDER BY feels, country", &[]).await?;
    assert_eq!(typed[0].columns()[0].type_().name(), "mood", "types have the shards' numbers");
    // What would mean something else there is refused by name.
    for (sql, word) in [("SELECT * FROM frozen", "materialized"), ("SELECT * FROM here", "one server")] {
        let (code, detail, _) = refusal(&other, sql).await?;
        assert!(code == "0A000" && detail.contains(word), "{sql}: {code} {detail}");
    }
    client.batch_execute("ALTER TABLE orders ENABLE ROW LEVEL SECURITY").await?;
    let (code, detail, _) = refusal(&other, "SELECT rank() OVER (ORDER BY total) FROM orders").await?;
    assert!(code == "0A000" && detail.contains("row security"), "{code} {detail}");
    let console = connect(&tier.admin_dsn()).await?;
    let shown = rows(&console, "SHOW ENGINE").await?;
    let state = |row: &Vec<Option<String>>| format!("{:?} {:?} {:?}", row[2], row[4], row[5]);
    let shown: Vec<String> = shown.iter().map(state).collect();
    assert!(shown[0].contains("ready") && shown.iter().any(|row| row.contains("public.frozen")), "{shown:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_see_what_they_may() -> Result<()> {
    let tier = Tier::builder().start().await?;
    let (mut client, other) = (tier.connect().await?, tier.connect().await?);
    load(&client).await?;
    let count = "SELECT count(*) FROM (SELECT rank() OVER (ORDER BY country) FROM users) x";
    let n: i64 = client.query_one(count, &[]).await?.get(0);
    // In a transaction that only reads, each statement sees what was committed before it.
    let transaction = client.transaction().await?;
    transaction.query("SELECT email FROM users WHERE user_id = 7", &[]).await?;
    assert_eq!(transaction.query_one(count, &[]).await?.get::<_, i64>(0), n);
    other.batch_execute("INSERT INTO users VALUES (1000, 'new@x.com', 'DE')").await?;
    assert_eq!(transaction.query_one(count, &[]).await?.get::<_, i64>(0), n + 1);
    transaction.batch_execute("SAVEPOINT a").await?;
    let broken = transaction.simple_query("SELECT 1 / (count(*) - count(*)) OVER () FROM users").await;
    assert!(broken.is_err());
    transaction.batch_execute("ROLLBACK TO a").await?;
    // Its own writes it would not see: refused, with a way out.
    transaction.batch_execute("UPDATE users SET country = 'FR' WHERE user_id = 7").await?;
    let error = transaction.query_one(count, &[]).await.err().context("refused")?;
    let error = error.as_db_error().context("an error of weir's")?;
    assert_eq!(error.code(), &SqlState::FEATURE_NOT_SUPPORTED);
    assert!(error.detail().is_some_and(|detail| detail.contains("has written")), "{error:?}");
    assert!(error.hint().is_some_and(|hint| hint.contains("COMMIT")), "{error:?}");
    transaction.rollback().await?;
    // One snapshot cannot span shards.
    let transaction =
        client.build_transaction().isolation_level(tokio_postgres::IsolationLevel::RepeatableRead).start().await?;
    let error = transaction.query_one(count, &[]).await.err().context("refused")?;
    assert_eq!(error.code(), Some(&SqlState::FEATURE_NOT_SUPPORTED));
    transaction.rollback().await?;
    // What the session has set holds there, for the transaction or for good.
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'").await?;
    let zone =
        "SELECT to_char(timestamptz '2026-01-01 00:00+00', 'HH24'), rank() OVER (ORDER BY country) FROM users LIMIT 1";
    assert_eq!(column(&client, zone).await?, ["09"]);
    client.batch_execute("BEGIN").await?;
    client.batch_execute("SET LOCAL TimeZone = 'UTC'").await?;
    assert_eq!(column(&client, zone).await?, ["00"]);
    client.batch_execute("COMMIT").await?;
    assert_eq!(column(&client, zone).await?, ["09"]);
    assert_eq!(column(&other, zone).await?, ["00"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_hub_only_what_needs_it_fails() -> Result<()> {
    let tier = Tier::builder().start().await?;
    let client = tier.connect().await?;
    load(&client).await?;
    let hard = HARD[2];
    let expected = rows(&client, hard).await?;
    tier.hub.kill9();
    let (code, ..) = refusal(&client, hard).await?;
    assert!(["08001", "57P03", "08006"].contains(&&*code), "{code}");
    client.batch_execute("UPDATE users SET country = 'FR' WHERE user_id = 7").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, ["40"]);
    // Schema changes, and the engine cannot follow: never an answer of the old one.
    client.batch_execute("ALTER TABLE users ADD COLUMN extra int").await?;
    let (code, detail, hint) = refusal(&client, "SELECT *, rank() OVER (ORDER BY extra) FROM users").await?;
    assert!(["08001", "57P03", "08006"].contains(&&*code) && !hint.is_empty(), "{code} {detail} {hint}");
    tier.hub.restart().await?;
    let wait = Instant::now() + Duration::from_secs(30);
    loop {
        match rows(&client, hard).await {
            Ok(again) if again == expected => return Ok(()),
            Ok(other) => anyhow::bail!("{other:?}"),
            Err(error) => ensure!(Instant::now() < wait, "{error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_group_by_is_found_once_and_lasts_as_long_as_the_key() -> Result<()> {
    let tier = Tier::builder().log_statements(true).start().await?;
    let (client, other) = (tier.connect().await?, tier.connect().await?);
    load(&client).await?;
    let sql = "SELECT u.user_id, u.country, u.email, count(*) FROM users u JOIN orders o ON o.order_id > u.user_id + 390 GROUP BY u.user_id ORDER BY 1";
    let complaints = || tier.hub.log().matches("must appear in the GROUP BY").count();
    let expected = rows(&client, sql).await?;
    assert!(!expected.is_empty());
    let found = complaints();
    assert!(found > 0, "it had to be edited");
    for client in [&client, &other] {
        assert_eq!(rows(client, sql).await?, expected);
    }
    assert_eq!(complaints(), found, "it is known now");
    // With parameters, by its own types.
    let bound = sql.replace("390", "$1::bigint");
    for _ in 0..2 {
        let statement = client.prepare(&bound).await?;
        assert_eq!(client.query(&statement, &[&390_i64]).await?.len(), expected.len());
    }
    assert_eq!(complaints(), 2 * found);
    // Other settings ask again: names may mean something else.
    client.batch_execute("SET search_path = public, pg_catalog").await?;
    assert_eq!(rows(&client, sql).await?, expected);
    assert_eq!(complaints(), 3 * found);
    // Without the key no column is decided by it.
    client.batch_execute("ALTER TABLE users DROP CONSTRAINT users_pkey").await?;
    crate::freshness::until(async || {
        // It is being made anew meanwhile.
        let code = refusal(&other, sql).await?.0;
        anyhow::ensure!(matches!(&*code, "42803" | "0A000"), "{code}");
        Ok(code == "42803")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_wait_for_their_turn() -> Result<()> {
    let extra = "[engine]\npool_size = 1\nwait_max = \"30s\"\n[pool]\nwait_max = \"300ms\"";
    let tier = Tier::builder().config_extra(extra).start().await?;
    load(&tier.connect().await?).await?;
    let slow = "SELECT count(*) FROM (SELECT pg_sleep(0.02), rank() OVER (ORDER BY country) FROM users) x";
    let clients = [tier.connect().await?, tier.connect().await?, tier.connect().await?, tier.connect().await?];
    let [a, b, c, d] = clients.each_ref().map(|client| column(client, slow));
    let answers = tokio::join!(a, b, c, d);
    for answer in [answers.0, answers.1, answers.2, answers.3] {
        assert_eq!(answer?, ["40"]);
    }
    // Shorter than a statement takes: the second one is told what to raise.
    let path = tier.run.path().join("weir.toml");
    let config = std::fs::read_to_string(&path)?.replace("wait_max = \"30s\"", "wait_max = \"100ms\"");
    std::fs::write(&path, config)?;
    tier.restart_weir().await?;
    let clients = [tier.connect().await?, tier.connect().await?];
    let long = slow.replace("0.02", "0.05");
    let [one, other] = clients.each_ref().map(|client| rows(client, &long));
    let answers = tokio::join!(one, other);
    let (answer, refusal) = match answers {
        (Ok(answer), Err(refusal)) | (Err(refusal), Ok(answer)) => (answer, refusal),
        both => anyhow::bail!("{both:?}"),
    };
    assert_eq!(answer[0][0].as_deref(), Some("40"));
    let refusal = refusal.downcast::<tokio_postgres::Error>()?;
    let refusal = refusal.as_db_error().context("an error of weir's")?;
    assert_eq!(refusal.code(), &SqlState::TOO_MANY_CONNECTIONS);
    assert!(refusal.hint().is_some_and(|hint| hint.contains("engine.pool_size")), "{refusal:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_wants_too_much_is_told_so() -> Result<()> {
    let extra = "[engine]\nwork_mem = \"64KiB\"\ntemp_bytes_max = \"256KiB\"\nrows_max = 1500\ntime_max = \"2s\"";
    let tier = Tier::builder().config_extra(extra).start().await?;
    let client = tier.connect().await?;
    load(&client).await?;
    let wide = "SELECT a.user_id, repeat(b.email, 50), rank() OVER (ORDER BY b.email || c.email) FROM users a, users b, users c ORDER BY 2, 1, 3";
    let (code, _, hint) = refusal(&client, wide).await?;
    assert!(code == "54000" && hint.contains("engine.temp_bytes_max"), "{code} {hint}");
    // Also after the first rows have been sent.
    let late = "SELECT repeat(a.email, 100), pg_sleep(0.004), rank() OVER (ORDER BY a.email) FROM users a, users b WHERE b.user_id <= 25";
    let (code, _, hint) = refusal(&client, late).await?;
    assert!(code == "54000" && hint.contains("engine.time_max"), "{code} {hint}");
    let many = "SELECT repeat(a.email, 20), rank() OVER (ORDER BY a.user_id) FROM users a, users b";
    let (code, detail, hint) = refusal(&client, many).await?;
    assert!(
        code == "54000" && detail.contains("1500 rows") && hint.contains("engine.rows_max"),
        "{code} {detail} {hint}"
    );
    let portal = client.query(&many.replace("FROM", ", a.user_id FROM"), &[]).await.err().context("too many rows")?;
    assert_eq!(portal.code(), Some(&SqlState::PROGRAM_LIMIT_EXCEEDED));
    assert_eq!(rows(&client, &format!("{many} LIMIT 1500")).await?.len(), 1500);
    let long = "SELECT pg_sleep(0.2), rank() OVER (ORDER BY country) FROM users";
    let (code, _, hint) = refusal(&client, long).await?;
    assert!(code == "54000" && hint.contains("engine.time_max"), "{code} {hint}");
    // The client cannot lift the bound of time.
    client.batch_execute("SET statement_timeout = 0").await?;
    assert_eq!(refusal(&client, long).await?.0, "54000");
    assert!(!rows(&client, HARD[2]).await?.is_empty());
    Ok(())
}
