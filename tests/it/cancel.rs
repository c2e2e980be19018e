//! A cancel request reaches the statement it was sent for, and no other.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_postgres::NoTls;
use weir_harness::Tier;

use crate::placement::column;

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_the_running_statement() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let client = tier.connect().await?;
    let token = client.cancel_token();
    let start = Instant::now();
    let (sleep, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(30)"), async {
        // Until the statement runs a cancel has nothing to end, so it is repeated.
        while start.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if token.cancel_query(NoTls).await.is_err() || start.elapsed() > Duration::from_secs(3) {
                break;
            }
        }
    });
    let error = sleep.expect_err("cancelled");
    assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("57014"));
    assert_eq!(column(&client, "SELECT 1").await?, ["1"]);
    Ok(())
}

/// One Backend, two clients: one floods cancels while the other works. None may hit the other.
#[tokio::test(flavor = "multi_thread")]
async fn late_cancels_never_hit_another_client() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 1").start().await?;
    let (hostile, victim) = (tier.connect().await?, tier.connect().await?);
    let token = hostile.cancel_token();
    let flood = tokio::spawn(async move {
        for _ in 0..150 {
            let (_, cancelled) = tokio::join!(hostile.batch_execute("SELECT 1"), token.cancel_query(NoTls));
            cancelled.ok();
        }
        hostile
    });
    let mut served = 0;
    while !flood.is_finished() {
        assert_eq!(column(&victim, "SELECT 'mine' FROM pg_sleep(0.002)").await?, ["mine"]);
        served += 1;
    }
    assert!(served > 0);
    flood.await?;
    Ok(())
}
