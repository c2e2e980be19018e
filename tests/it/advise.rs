//! `weir advise`: what it proposes for the shop's own schema, and for a database without use for shards.

use anyhow::{Context, Result};
use weir_harness::{Plain, connect};

/// The shop's schema as it makes it itself.
const SCHEMA: &str = include_str!("../../storefront/src/store/schema.sql");

/// What the shop mostly sends, as `pg_stat_statements` would show it.
const STATEMENTS: &str = "
SELECT name, email FROM users WHERE user_id = $1;
SELECT order_id, status FROM orders WHERE user_id = $1 ORDER BY created_at DESC LIMIT $2;
SELECT o.order_id, i.name FROM orders o JOIN order_items i USING (user_id, order_id) WHERE o.user_id = $1;
SELECT c.product_id, p.name, c.qty * p.price_cents FROM cart_items c JOIN products p USING (product_id) WHERE c.user_id = $1;
INSERT INTO cart_items (user_id, product_id, qty) VALUES ($1, $2, $3) ON CONFLICT (user_id, product_id) DO UPDATE SET qty = excluded.qty;
INSERT INTO orders (user_id, order_id, status, total_cents) VALUES ($1, $2, 'new', $3);
SELECT product_id, name FROM products WHERE category_id = $1; SELECT product_id, name FROM products WHERE category_id = $2;
SELECT name FROM categories WHERE slug = $1;
SELECT available FROM inventory WHERE product_id = $1;
UPDATE inventory SET available = available - $2 WHERE product_id = $1;
INSERT INTO stock_holds (product_id, order_id, user_id, qty, expires_at) VALUES ($1, $2, $3, $4, now() + interval $5);
SELECT user_id FROM user_emails WHERE email = $1;
INSERT INTO user_emails (email, user_id) VALUES ($1, $2);
SELECT status, count(*) FROM orders GROUP BY status;
BEGIN;
COMMIT;
";

/// Standard output of `weir advise`, or standard error where it fails.
async fn advise(dsn: &str, statements: Option<&str>) -> Result<Result<String, String>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("statements.sql");
    let mut command = tokio::process::Command::new(weir_harness::weir_binary()?);
    command.args(["advise", "--upstream", dsn]);
    if let Some(statements) = statements {
        std::fs::write(&file, statements)?;
        command.arg("--statements").arg(&file);
    }
    let said = command.output().await.context("weir advise")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if said.status.success() { Ok(text(&said.stdout)) } else { Err(text(&said.stderr)) })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shops_tables_are_proposed_as_they_were_designed() -> Result<()> {
    let plain = Plain::start().await?;
    let client = connect(&plain.dsn()).await?;
    client.batch_execute(SCHEMA).await?;
    let said = advise(&plain.dsn(), Some(STATEMENTS)).await?.map_err(anyhow::Error::msg)?;
    for (table, lines) in [
        ("users", "kind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\""),
        ("orders", "kind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\""),
        ("order_items", "kind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\""),
        ("cart_items", "kind = \"sharded\"\nkey = \"user_id\"\ntype = \"bigint\""),
        ("inventory", "kind = \"sharded\"\nkey = \"product_id\"\ntype = \"bigint\""),
        ("stock_holds", "kind = \"sharded\"\nkey = \"product_id\"\ntype = \"bigint\""),
        ("products", "kind = \"reference\""),
        ("categories", "kind = \"reference\""),
        ("user_emails", "kind = \"sharded\"\nkey = \"email\"\ntype = \"text\""),
    ] {
        assert!(said.contains(&format!("name = \"{table}\"\n{lines}\n")), "{table} in\n{said}");
    }
    // 14 statements about rows, one of them twice, and one a report over all users.
    assert!(said.contains("Where 15 calls would run (and 2 more that are not about rows)"), "{said}");
    assert!(
        said.contains("  6.7 %  several shards, merged     SELECT status, count(*) FROM orders GROUP BY status"),
        "{said}"
    );

    let nothing =
        advise(&plain.dsn(), Some("SELECT count(*) FROM orders; SELECT max(total_cents) FROM orders")).await?;
    let nothing = nothing.map_err(anyhow::Error::msg)?;
    assert!(nothing.contains("leave the database in one piece"), "{nothing}");
    let missing = advise(&plain.dsn(), None).await?.expect_err("it has not been installed there");
    assert!(missing.contains("CREATE EXTENSION pg_stat_statements") && missing.contains("--statements"), "{missing}");
    let unclosed = advise(&plain.dsn(), Some("SELECT 'a")).await?.expect_err("an open quote");
    assert!(unclosed.contains("not closed"), "{unclosed}");
    Ok(())
}
