//! SHOW HOT KEYS: what is read and written most, and who may see its values.

use anyhow::{Context, Result};
use tokio_postgres::SimpleQueryMessage;
use weir_harness::Tier;

use crate::placement::{column, create_schema};

/// Rows of SHOW HOT KEYS: table, key, reads, hits, writes.
async fn hot_keys(tier: &Tier) -> Result<Vec<(String, String, [u64; 3])>> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let mut rows = Vec::new();
    for message in console.simple_query("SHOW HOT KEYS").await? {
        if let SimpleQueryMessage::Row(row) = message {
            let text = |at: usize| row.get(at).unwrap_or("").to_owned();
            let number = |at: usize| row.get(at).context("a number")?.parse::<u64>().context("a number");
            rows.push((text(1), text(2), [number(3)?, number(4)?, number(5)?]));
        }
    }
    Ok(rows)
}

/// Key 7 is read a hundred times as often as any other, and key 8 is written.
async fn busy(config: &str) -> Result<Tier> {
    let tier = Tier::builder().shards(2).config_extra(config).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    let insert = client.prepare("INSERT INTO users (user_id, name) VALUES ($1, 'x')").await?;
    for key in 1..=20_i64 {
        client.execute(&insert, &[&key]).await?;
    }
    let read = client.prepare("SELECT name FROM users WHERE user_id = $1").await?;
    for round in 0..1_600_i64 {
        let key = if round % 5 == 0 { round / 5 % 20 + 1 } else { 7 };
        client.query_one(&read, &[&key]).await?;
        if round % 4 == 0 {
            column(&client, "UPDATE users SET name = 'y' WHERE user_id = 8").await?;
        }
    }
    Ok(tier)
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_keys_are_shown_to_admins() -> Result<()> {
    let tier = busy("").await?;
    let rows = hot_keys(&tier).await?;
    let (table, key, [reads, hits, writes]) = rows.first().context("the hottest")?;
    assert_eq!((table.as_str(), key.as_str()), ("public.users", "7"), "{rows:?}");
    // One in sixteen is counted, so this is near 1,300.
    assert!((650..2_600).contains(reads) && hits <= reads && *hits > 0, "{rows:?}");
    assert!(*writes <= 64, "{rows:?}");
    let written = rows.iter().max_by_key(|row| row.2[2]).context("written")?;
    assert_eq!((written.0.as_str(), written.1.as_str()), ("public.users", "8"), "{rows:?}");
    assert!((200..800).contains(&written.2[2]), "near 400: {rows:?}");
    let (_, page) = tier.http_get("/metrics").await?;
    let share = page.lines().find_map(|line| line.strip_prefix("weir_hot_key_share{database=\"shop\"} "));
    assert!(share.context("share")?.parse::<f64>()? > 0.3, "{share:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_only_look_sees_no_values() -> Result<()> {
    let tier = busy("admin_users = []\nstats_users = ['shop']").await?;
    let rows = hot_keys(&tier).await?;
    let (table, key, _) = rows.first().context("the hottest")?;
    assert!(table == "public.users" && key.starts_with('#') && key.len() == 17, "{rows:?}");
    Ok(())
}
