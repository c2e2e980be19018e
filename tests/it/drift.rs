//! Schemas of shards that differ: statements that fail half-way shard by shard, and changes made behind weir.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_harness::Tier;

use crate::placement::{column, create_schema};

/// What SHOW DRIFT says, as `table kind name shard definition`, once it says what is `wanted`.
async fn drift(tier: &Tier, wanted: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let start = Instant::now();
    loop {
        let mut shown = Vec::new();
        for message in console.simple_query("SHOW DRIFT").await? {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                shown.push((1..6).map(|column| row.get(column).unwrap_or("-")).collect::<Vec<_>>().join(" "));
            }
        }
        if wanted(&shown) {
            return Ok(shown);
        }
        ensure!(start.elapsed() < Duration::from_secs(60), "SHOW DRIFT still says {shown:#?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_behind_weir_is_found() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    create_schema(&tier.connect().await?).await?;
    let second = tier.shards[1].primary.admin("shop").await?;
    for sql in [
        "ALTER TABLE users ADD COLUMN extra int DEFAULT 7",
        "CREATE INDEX users_by_name ON users (name)",
        "ALTER TABLE products ALTER COLUMN price_cents TYPE numeric",
        "ALTER TABLE users ADD CONSTRAINT named CHECK (name <> '')",
    ] {
        second.batch_execute(sql).await?;
    }
    let shown = drift(&tier, |shown| shown.len() >= 8).await?;
    let found = |start: &str, end: &str| shown.iter().any(|line| line.starts_with(start) && line.ends_with(end));
    assert!(
        found("public.users column extra ", " -") && found("public.users column extra ", "integer DEFAULT 7"),
        "{shown:#?}"
    );
    assert!(found("public.users index users_by_name ", "(name)"), "{shown:#?}");
    assert!(found("public.products column price_cents ", "bigint NOT NULL"), "{shown:#?}");
    assert!(found("public.products column price_cents ", "numeric NOT NULL"), "{shown:#?}");
    assert!(found("public.users constraint named ", "CHECK ((name <> ''::text))"), "{shown:#?}");
    assert_eq!(shown.len(), 8, "{shown:#?}");
    // The command line says the same, and ends with 2.
    let output = compared(&tier)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("column extra of public.users") && text.contains(": missing"), "{text}");
    for sql in [
        "ALTER TABLE users DROP COLUMN extra, DROP CONSTRAINT named",
        "DROP INDEX users_by_name",
        "ALTER TABLE products ALTER COLUMN price_cents TYPE bigint",
    ] {
        second.batch_execute(sql).await?;
    }
    drift(&tier, <[String]>::is_empty).await?;
    assert_eq!(compared(&tier)?.status.code(), Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stops_half_way_says_where_and_can_go_on() -> Result<()> {
    let tier = Tier::builder().shards(3).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    let second = tier.shards[1].primary.admin("shop").await?;
    // Two rows on one shard only, so that a unique index cannot be made there.
    second.batch_execute("INSERT INTO users (user_id, email) VALUES (-1, 'same'), (-2, 'same')").await?;
    let create = "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS users_email ON users (email)";
    let error = client.simple_query(create).await.expect_err("duplicates");
    let error = error.as_db_error().context("an answer")?;
    assert_eq!(error.code().code(), "23505");
    let (detail, hint) = (error.detail().unwrap_or_default(), error.hint().unwrap_or_default());
    let names: Vec<&str> = tier.shards.iter().map(|shard| &*shard.name).collect();
    for part in [
        format!("Done on: {}.", names[0]),
        format!("Failed on: {}.", names[1]),
        format!("Not begun on: {}.", names[2]),
        format!("INVALID indexes on {}: public.users_email.", names[1]),
    ] {
        assert!(detail.contains(&part), "{part}: {detail}");
    }
    assert!(hint.contains("drop the INVALID index"), "{hint}");
    drift(&tier, |shown| shown.iter().any(|line| line.contains("users_email") && line.ends_with("(INVALID)"))).await?;
    second.batch_execute("DELETE FROM users; DROP INDEX users_email").await?;
    client.simple_query(create).await?;
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'users_email'::regclass";
        assert_eq!(column(&direct, valid).await?, ["t"]);
    }
    drift(&tier, <[String]>::is_empty).await?;
    Ok(())
}

/// What `weir check --connect` says of a tier.
pub fn compared(tier: &Tier) -> Result<std::process::Output> {
    let config = tier.run.path().join("weir.toml");
    let mut check = std::process::Command::new(weir_harness::weir_binary()?);
    check.args(["check", "--connect"]).arg(config).output().context("weir check")
}
