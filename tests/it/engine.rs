//! The fallback engine: what neither one shard nor a merge can answer is answered by Postgres on the hub, as one Postgres would.
//!
//! Reading order: answers → roles and secrets → in step with DDL → transactions → outages and limits. Every test has a tier of its own;
//! a plain Postgres with the same rows is the judge. Non-goals: every kind of statement (`differential.rs`) and speed.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Plain, Tier, connect};

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
const HARD: &[&str] = &[
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
    "SELECT DISTINCT ON (status) status, total, order_id FROM orders ORDER BY status, total DESC, order_id",
    "SELECT u.user_id, p.product_id FROM users u FULL JOIN products p ON p.product_id = u.user_id ORDER BY 1, 2",
    "SELECT c.country, t.order_id FROM (SELECT DISTINCT country FROM users) c, LATERAL (SELECT o.order_id FROM orders o \
     JOIN users u USING (user_id) WHERE u.country = c.country ORDER BY o.total DESC, o.order_id LIMIT 2) t ORDER BY 1, 2",
    "SELECT count(*) FROM (SELECT user_id FROM orders ORDER BY total DESC, order_id LIMIT 11) top JOIN users u USING (user_id)",
    "SELECT user_id, email FROM users WHERE user_id IN (SELECT user_id FROM orders ORDER BY total, order_id LIMIT 4) ORDER BY 1",
    "TABLE users ORDER BY user_id LIMIT 3",
    "SELECT p.name, sum(qty) FROM order_items JOIN products p USING (product_id) GROUP BY p.name HAVING sum(qty) > 3 ORDER BY 2 DESC, 1",
    "SELECT s.value, count(*) FROM settings s, users u WHERE u.country = s.name GROUP BY 1 ORDER BY 1",
];

async fn load(client: &Client) -> Result<()> {
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
            .batch_execute(&format!("INSERT INTO users VALUES ({user}, 'u{user}@x.com', '{country}', date '1980-01-01' + {user})"))
            .await?;
        for order in 0..user % 4 {
            let id = user * 10 + order;
            let (status, total) = (["new", "paid", "sent"][id % 3], id * 7 % 500);
            client
                .batch_execute(&format!("INSERT INTO orders VALUES ({user}, {id}, '{status}', {total}.5, date '2026-01-01' + {order})"))
                .await?;
            for line in 1..=2 {
                let product = 1 + (id * 3 + line * 5) % 20;
                client.batch_execute(&format!("INSERT INTO order_items VALUES ({user}, {id}, {line}, {product}, {line})")).await?;
            }
        }
    }
    Ok(())
}

/// All rows of a simple query as text.
async fn rows(client: &Client, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
    let messages = client.simple_query(sql).await.with_context(|| sql.to_owned())?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
        _ => None,
    };
    Ok(messages.iter().filter_map(row).collect())
}

async fn compare(sharded: &Client, single: &Client, statements: &[&str]) -> Result<()> {
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
async fn refusal(client: &Client, sql: &str) -> Result<(String, String, String)> {
    let Err(error) = client.simple_query(sql).await else { anyhow::bail!("not refused: {sql}") };
    let error = error.as_db_error().context("not an error of the server's")?;
    let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
    Ok((error.code().code().to_owned(), text(error.detail()), text(error.hint())))
}

async fn route(tier: &Tier, sql: &str) -> Result<String> {
    let console = connect(&tier.admin_dsn()).await?;
    let rows = rows(&console, &format!("ROUTE '{}'", sql.replace('\'', "''"))).await?;
    Ok(rows.iter().filter_map(|row| Some(format!("{}={}", row[0].as_deref()?, row[1].as_deref()?))).collect::<Vec<_>>().join("; "))
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
    let (tier, plain) = (Tier::builder().config_extra("[engine]\npartitions = false").start().await?, Plain::start().await?);
    let (sharded, single) = (tier.connect().await?, connect(&plain.dsn()).await?);
    load(&single).await?;
    load(&sharded).await?;
    compare(&sharded, &single, HARD).await?;
    let hub = tier.hub.admin("weir_engine_shop").await?;
    assert_eq!(column(&hub, "SELECT relkind FROM pg_class WHERE oid = 'public.users'::regclass").await?, ["v"]);
    Ok(())
}
