//! `weir cache warm`: the cache of a weir that has just started is filled with what another one was asked for most.

use anyhow::{Context, Result, ensure};
use tokio::process::Command;
use weir_harness::{Proxy, Tier, weir_binary};

use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};

/// Runs the command; gives what it prints.
async fn warm(arguments: &[&str]) -> Result<String> {
    let output = Command::new(weir_binary()?).args(["cache", "warm"]).args(arguments).output().await?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

async fn hits(proxy: &Proxy) -> Result<i64> {
    cache_figure(proxy, "hit_local").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_weir_is_warmed_by_what_another_one_is_asked() -> Result<()> {
    const PLAIN: &str = "SELECT count(*) FROM products";
    const KEYED: &str = "SELECT name, user_id FROM users WHERE user_id = $1";
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 1..=3_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'x')", &[&key]).await?;
    }
    client.batch_execute("INSERT INTO products VALUES (1, 'tea', 500)").await?;
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'").await?;
    let keyed = client.prepare(KEYED).await?;
    until(async || {
        client.query(&keyed, &[&1_i64]).await?;
        Ok(hits(tier.proxy()).await? > 0)
    })
    .await?;
    // Enough that each is among the one in sixteen that are counted.
    for round in 0..400_i64 {
        client.query(&keyed, &[&(round % 2 + 1)]).await?;
        column(&client, PLAIN).await?;
        if round % 7 == 0 {
            column(&client, "SELECT 1").await?;
        }
    }
    let (from, other) = (tier.dsn("shop"), tier.another().await?);
    let to = other.dsn("shop");
    let told = warm(&["--weir", &to, "--from", &from, "--dry-run"]).await?;
    assert!(told.contains(PLAIN) && told.contains(KEYED) && told.contains("3 reads would be asked"), "{told}");
    assert_eq!(cache_figure(&other, "stored").await?, 0, "a dry run asks nothing");
    until(async || {
        let told = warm(&["--weir", &to, "--from", &from]).await?;
        assert!(told.contains("asked 3 of 3 reads"), "{told}");
        Ok(cache_figure(&other, "stored").await? >= 3)
    })
    .await?;
    // The same client, asking the other weir for the first time, is answered from memory.
    let client = other.connect().await?;
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'").await?;
    let keyed = client.prepare(KEYED).await?;
    let before = hits(&other).await?;
    for key in 1..=2_i64 {
        assert_eq!(client.query_one(&keyed, &[&key]).await?.get::<_, i64>("user_id"), key);
    }
    assert_eq!(column(&client, PLAIN).await?, ["1"]);
    assert_eq!(hits(&other).await? - before, 3);

    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), "SELECT name FROM products; SELECT nonsense;")?;
    let path = file.path().to_str().context("a path")?;
    let told = warm(&["--weir", &to, "--statements", path, "--database", "shop"]).await?;
    assert!(told.contains("failed: SELECT nonsense") && told.contains("asked 1 of 2 reads"), "{told}");
    Ok(())
}
