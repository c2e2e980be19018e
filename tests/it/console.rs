//! The admin database and the HTTP side.

use anyhow::{Context, Result};
use tokio_postgres::SimpleQueryMessage;
use weir_harness::Tier;

use crate::placement::create_schema;

async fn table(client: &tokio_postgres::Client, sql: &str) -> Result<Vec<Vec<String>>> {
    let rows = client.simple_query(sql).await?.into_iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).unwrap_or("").to_owned()).collect()),
        _ => None,
    });
    Ok(rows.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_shows_what_runs() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    assert_eq!(table(&console, "SHOW POOLS").await?.len(), 1);
    let stats = table(&console, "show stats;").await?;
    assert_eq!(stats[0][0], "shop");
    assert!(stats[0][3].parse::<u64>()? >= 5, "queries are counted: {stats:?}");
    assert_eq!(
        table(&console, "SHOW SHARDS").await?.iter().map(|row| row[5].parse::<u32>().unwrap_or(0)).collect::<Vec<_>>(),
        [2048, 2048]
    );
    let slots = table(&console, "SHOW SLOTS").await?;
    assert_eq!(slots.iter().map(|row| row[3].parse::<u32>().unwrap_or(0)).sum::<u32>(), 4096);
    let route = table(&console, "ROUTE 'SELECT name FROM users WHERE user_id = 42'").await?;
    assert!(route.iter().any(|row| row[0] == "slots" && row[1] == "1778"), "{route:?}");
    // Where ROUTE says it goes is where the slot map says it lives.
    let owner = slots
        .iter()
        .find(|row| row[1].parse::<u32>().unwrap_or(0) <= 1778 && 1778 <= row[2].parse::<u32>().unwrap_or(0))
        .context("slot")?;
    assert!(route.iter().any(|row| row[0] == "shards" && row[1] == owner[5]), "{route:?} {owner:?}");
    // And so says the command line.
    let explain = |sql: &str| {
        let mut command = std::process::Command::new(weir_harness::weir_binary()?);
        let said = command.args(["explain", "--weir", &tier.admin_dsn(), "--database", "shop", sql]).output()?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned())
    };
    let said = explain("SELECT name FROM users WHERE user_id = 42")?;
    assert!(route.iter().all(|row| said.contains(&format!("{:<12}{}", row[0], row[1]))), "{said} {route:?}");
    let refused = explain("UPDATE users SET user_id = 2 WHERE user_id = 1")?;
    assert!(refused.contains("key"), "{refused}");
    // The extended protocol works too.
    assert_eq!(console.query("SHOW SHARDS", &[]).await?.len(), 2);
    let unknown = console.simple_query("SHOW NONSENSE").await.expect_err("unknown");
    assert!(unknown.as_db_error().and_then(tokio_postgres::error::DbError::hint).is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health_are_served() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("SELECT 1").await?;
    client.batch_execute("SELECT 1 FROM nowhere").await.expect_err("no such table");
    // The driver reports an error before the end of its reply; the next answer means that the request has been counted.
    client.batch_execute("SELECT 1").await?;
    let (status, page) = tier.http_get("/metrics").await?;
    assert_eq!(status, 200);
    for name in [
        "weir_queries_total",
        "weir_client_connections",
        "weir_query_duration_seconds_bucket",
        "weir_slots{",
        "weir_errors_total{sqlstate=\"42P01\"} 1",
        "weir_build_info",
    ] {
        assert!(page.contains(name), "{name} is missing from\n{page}");
    }
    assert_eq!(tier.http_get("/livez").await?.0, 200);
    assert_eq!(tier.http_get("/readyz").await?.0, 200);
    Ok(())
}
