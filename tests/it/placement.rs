//! Where statements run: each server's own log is the witness.

use anyhow::Result;
use tokio_postgres::SimpleQueryMessage;
use weir_harness::Tier;

/// Tables of the storefront's placement, as far as these tests need them.
pub const SCHEMA: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, email text, name text);
CREATE TABLE orders (user_id bigint REFERENCES users, order_id uuid, status text NOT NULL, total_cents bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (user_id, order_id));
CREATE TABLE products (product_id bigint PRIMARY KEY, name text NOT NULL, price_cents bigint NOT NULL);
CREATE TABLE user_emails (email text PRIMARY KEY, user_id bigint NOT NULL);
CREATE TABLE settings (name text PRIMARY KEY, value text)";

/// Creates [`SCHEMA`] through weir, a statement at a time.
pub async fn create_schema(client: &tokio_postgres::Client) -> Result<()> {
    for statement in SCHEMA.split(';') {
        client.batch_execute(statement).await?;
    }
    Ok(())
}

/// The first column of every row.
pub async fn column(client: &tokio_postgres::Client, sql: &str) -> Result<Vec<String>> {
    let messages = client.simple_query(sql).await?;
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    Ok(rows.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn keyed_statements_run_on_their_shard_alone() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).log_statements(true).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    // Slots 3280 (key 1) and 809 (key 2); the map says whose they are.
    for key in 1..=200_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, $2)", &[&key, &format!("user {key}")]).await?;
    }
    let mut counts = Vec::new();
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let count: i64 = direct.query_one("SELECT count(*) FROM users", &[]).await?.get(0);
        // Every row lies where the slot of its key says, computed by Postgres itself.
        let slots: Vec<i64> = direct
            .query("SELECT DISTINCT (hashint8extended(user_id, 0) >> 52) & 4095 FROM users", &[])
            .await?
            .iter()
            .map(|row| row.get(0))
            .collect();
        counts.push((count, slots));
    }
    assert_eq!(counts.iter().map(|(count, _)| count).sum::<i64>(), 200);
    assert!(counts.iter().all(|(count, _)| *count > 50), "users spread over both shards: {counts:?}");
    assert!(counts[0].1.iter().all(|slot| !counts[1].1.contains(slot)), "no slot is on two shards");

    client.batch_execute("UPDATE users SET name = 'here only' WHERE user_id = 42").await?;
    let homes: Vec<usize> = (0..2).filter(|shard| tier.shards[*shard].primary.log().contains("here only")).collect();
    assert_eq!(homes.len(), 1, "the update ran on one shard");
    // Reads go to a replica of that shard as soon as it is known to be fresh, and to no other server's.
    for round in 0.. {
        let sql = format!("SELECT name AS seen_{round} FROM users WHERE user_id = 42");
        assert_eq!(column(&client, &sql).await?, ["here only"]);
        let seen = |log: String| log.contains(&format!("AS seen_{round} "));
        assert!(!seen(tier.shards[1 - homes[0]].primary.log()), "the other shard was not asked");
        assert!(!seen(tier.shards[1 - homes[0]].replicas[0].log()), "nor was its replica");
        if seen(tier.shards[homes[0]].replicas[0].log()) {
            break;
        }
        assert!(round < 200, "no replica ever answered");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn reference_tables_are_written_everywhere_and_read_anywhere() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    let written = client.execute("INSERT INTO products VALUES ($1, $2, $3)", &[&1_i64, &"tea", &500_i64]).await?;
    assert_eq!(written, 1, "one row, however many copies");
    let copied: Vec<_> =
        client.query("UPDATE products SET price_cents = 550 WHERE product_id = 1 RETURNING name", &[]).await?;
    assert_eq!(copied.len(), 1);
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let price: i64 = direct.query_one("SELECT price_cents FROM products", &[]).await?.get(0);
        assert_eq!(price, 550);
        let open: i64 = direct.query_one("SELECT count(*) FROM pg_prepared_xacts", &[]).await?.get(0);
        assert_eq!(open, 0);
    }
    // A copy that one shard refuses is refused everywhere.
    tier.shards[1]
        .primary
        .admin("shop")
        .await?
        .batch_execute("INSERT INTO products VALUES (9, 'only here', 1)")
        .await?;
    let error = client
        .execute("INSERT INTO products VALUES ($1, $2, $3)", &[&9_i64, &"x", &1_i64])
        .await
        .expect_err("duplicate on one shard");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("23505"));
    let direct = tier.shards[0].primary.admin("shop").await?;
    let rows: i64 = direct.query_one("SELECT count(*) FROM products WHERE product_id = 9", &[]).await?.get(0);
    assert_eq!(rows, 0, "rolled back on the shard that had accepted it");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn scatter_reads_equal_one_postgres() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let plain = weir_harness::Plain::start().await?;
    let sharded = tier.connect().await?;
    let single = weir_harness::connect(&plain.dsn()).await?;
    for client in [&sharded, &single] {
        create_schema(client).await?;
        for key in 1..=60_i64 {
            let email = format!("u{key}@example.com");
            client.execute("INSERT INTO users VALUES ($1, $2, $3)", &[&key, &email, &format!("n{}", key % 7)]).await?;
            for order in 0..key % 4 {
                let id = uuid::Uuid::from_u128((key * 10 + order) as u128);
                client
                    .execute("INSERT INTO orders (user_id, order_id, status, total_cents, created_at) VALUES ($1, $2, $3, $4, '2026-01-01'::timestamptz + $5 * interval '1 day')",
                        &[&key, &id, &["paid", "pending", "sent"][(key % 3) as usize], &(key * 100 + order), &((key % 5) as f64)])
                    .await?;
            }
        }
    }
    for sql in [
        "SELECT count(*), sum(total_cents), min(total_cents), max(total_cents), avg(total_cents) FROM orders",
        "SELECT user_id, total_cents FROM orders ORDER BY total_cents DESC, user_id LIMIT 7 OFFSET 3",
        "SELECT status, count(*), avg(total_cents), count(DISTINCT user_id) FROM orders GROUP BY status ORDER BY status",
        "SELECT date_trunc('day', created_at) AS day, count(*), sum(total_cents) FROM orders GROUP BY 1 ORDER BY 1",
        "SELECT u.name, count(*) AS orders FROM users u JOIN orders o USING (user_id) GROUP BY 1 ORDER BY orders DESC, 1 LIMIT 3",
        "SELECT DISTINCT status FROM orders ORDER BY status",
        "SELECT name FROM users WHERE user_id IN (3, 14, 15, 59) ORDER BY user_id",
        "SELECT user_id FROM users WHERE user_id = ANY('{5,6,7,8}') ORDER BY 1 DESC",
        "SELECT email FROM users ORDER BY email LIMIT 5",
        "SELECT count(*) FROM users WHERE false",
        "SELECT sum(total_cents) FROM orders WHERE total_cents < 0",
    ] {
        let text = |messages: Vec<SimpleQueryMessage>| {
            let rows = messages.into_iter().filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => {
                    Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect::<Vec<_>>())
                }
                _ => None,
            });
            rows.collect::<Vec<_>>()
        };
        let ours = text(sharded.simple_query(sql).await?);
        let theirs = text(single.simple_query(sql).await?);
        assert_eq!(ours, theirs, "{sql}");
        // The extended protocol asks for binary results: a prepared statement must describe and decode alike.
        let ours = sharded.query(sql, &[]).await?;
        let theirs = single.query(sql, &[]).await?;
        assert_eq!(ours.len(), theirs.len(), "{sql}");
        for (one, other) in ours.iter().zip(&theirs) {
            let types = |row: &tokio_postgres::Row| {
                row.columns()
                    .iter()
                    .map(|column| (column.name().to_owned(), column.type_().clone()))
                    .collect::<Vec<_>>()
            };
            assert_eq!(types(one), types(other), "{sql}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_right_is_refused_with_a_reason() -> Result<()> {
    let tier = Tier::builder().shards(2).config_extra("[engine]\nenabled = false").start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for sql in [
        "SELECT u.name FROM users u JOIN users v ON u.name = v.name",
        "SELECT string_agg(status, ',' ORDER BY order_id) FROM orders",
        "SELECT name, rank() OVER (ORDER BY name) FROM users",
        "INSERT INTO users (name) VALUES ('no key')",
        "UPDATE users SET user_id = o.order_id FROM orders o WHERE o.user_id = users.user_id",
        "SELECT name FROM users UNION SELECT name FROM products",
        "COPY users FROM '/nowhere'",
        "WITH gone AS (DELETE FROM users RETURNING name) SELECT count(*) FROM gone",
        "UPDATE products SET price_cents = random()",
    ] {
        let error = client.simple_query(sql).await.expect_err(sql);
        let error = error.as_db_error().unwrap_or_else(|| panic!("{sql}: {error}"));
        assert_eq!(error.code().code(), "0A000", "{sql}: {error}");
        assert!(error.detail().is_some_and(|text| !text.is_empty()), "{sql}: says why");
        assert!(error.hint().is_some_and(|text| !text.is_empty()), "{sql}: says what to do");
    }
    // The session goes on after a refusal.
    assert_eq!(column(&client, "SELECT 1").await?, ["1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tables_live_on_the_home_shard() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.batch_execute("INSERT INTO settings VALUES ('colour', 'green')").await?;
    assert_eq!(column(&client, "SELECT value FROM settings").await?, ["green"]);
    let mut rows = Vec::new();
    for shard in &tier.shards {
        let count: i64 =
            shard.primary.admin("shop").await?.query_one("SELECT count(*) FROM settings", &[]).await?.get(0);
        rows.push(count);
    }
    assert_eq!(rows, [1, 0], "the table is everywhere, its rows are at home");
    Ok(())
}

/// What the catalogue of a real server says of views, functions, triggers and defaults is what planning goes by.
#[tokio::test(flavor = "multi_thread")]
async fn what_hides_a_table_is_found_in_the_catalogue() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for statement in [
        "CREATE VIEW recent AS SELECT user_id FROM orders",
        "CREATE VIEW busy AS SELECT count(*) FROM recent",
        "CREATE VIEW listing AS SELECT name FROM products",
        "CREATE FUNCTION total() RETURNS bigint LANGUAGE plpgsql STABLE AS 'BEGIN RETURN (SELECT count(*) FROM Orders); END'",
        "CREATE FUNCTION outer_total() RETURNS bigint LANGUAGE sql AS 'SELECT total()'",
        "CREATE FUNCTION product_count() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM products'",
        "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS \
         'BEGIN INSERT INTO user_emails VALUES (NEW.name, 1); RETURN NEW; END'",
        "CREATE TRIGGER noting AFTER INSERT ON settings FOR EACH ROW EXECUTE FUNCTION note()",
        "ALTER TABLE products ADD COLUMN added timestamptz DEFAULT now(), ADD COLUMN stars int DEFAULT 3",
    ] {
        client.batch_execute(statement).await?;
    }
    for refused in [
        "SELECT outer_total()",
        "DO 'BEGIN PERFORM outer_total(); END'",
        "INSERT INTO settings VALUES ('a', 'b')",
        "INSERT INTO products (product_id, name, price_cents) VALUES (1, 'tea', 5)",
        "CREATE TEMP TABLE mine AS SELECT * FROM orders",
    ] {
        let error = client.batch_execute(refused).await.expect_err(refused);
        let error = error.as_db_error().expect("told by weir");
        assert_eq!(error.code().code(), "0A000", "{refused}: {error}");
        assert!(error.detail().is_some() && error.hint().is_some(), "{refused}");
    }
    client
        .batch_execute("INSERT INTO products (product_id, name, price_cents, added) VALUES (1, 'tea', 5, '2026-01-01')")
        .await?;
    assert_eq!(column(&client, "SELECT name FROM listing").await?, ["tea"]);
    assert_eq!(column(&client, "SELECT product_count()").await?, ["1"]);
    // Reads over sharded tables in disguise: the fallback engine sees all shards.
    client.batch_execute("INSERT INTO users (user_id) VALUES (1)").await?;
    client
        .batch_execute(
            "INSERT INTO orders (user_id, order_id, status, total_cents) VALUES (1, gen_random_uuid(), 'new', 5)",
        )
        .await?;
    assert_eq!(column(&client, "SELECT * FROM recent").await?, ["1"]);
    assert_eq!(column(&client, "SELECT * FROM busy").await?, ["1"]);
    assert_eq!(column(&client, "SELECT total()").await?, ["1"]);
    assert_eq!(column(&client, "SELECT one()").await?, ["1"]);
    assert_eq!(column(&client, "SELECT * FROM settings").await?, Vec::<String>::new());
    Ok(())
}
