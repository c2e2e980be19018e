//! What is done with stored answers besides serving them: how they lie in Redis, which tables have none, and FLUSH.

use anyhow::Result;
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::fleet::{cache_figure, name_of, warm};
use crate::freshness::until;
use crate::placement::create_schema;

async fn write_name(client: &Client, user: i64, name: &str) -> Result<()> {
    client.execute("UPDATE users SET name = $1 WHERE user_id = $2", &[&name, &user]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn long_answers_lie_compressed_in_redis_and_come_out_as_they_were() -> Result<()> {
    let tier = Tier::builder().shards(2).redis(true).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    // One proxy takes over the other's stamps in its own time.
    let mut round = 0;
    until(async || {
        round += 1;
        let name = format!("Ann {round} ").repeat(2000);
        write_name(&here, 1, &name).await?;
        warm(tier.proxy(), &here, 1).await?;
        let before = cache_figure(&other, "hits_redis").await?;
        assert_eq!(name_of(&there, 1).await?, name);
        Ok(cache_figure(&other, "hits_redis").await? > before)
    })
    .await?;
    assert!(cache_figure(tier.proxy(), "redis_compressed").await? > 0);
    assert!(cache_figure(tier.proxy(), "redis_bytes_spared").await? > 10_000);
    // Short ones are left alone.
    let compressed = cache_figure(tier.proxy(), "redis_compressed").await?;
    write_name(&here, 1, "Bea").await?;
    warm(tier.proxy(), &here, 1).await?;
    assert_eq!(name_of(&there, 1).await?, "Bea");
    assert_eq!(cache_figure(tier.proxy(), "redis_compressed").await?, compressed);
    Ok(())
}
