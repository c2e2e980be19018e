//! The same storefront binary and the same journey on plain Postgres and on weir: one suite, two DSNs.

use anyhow::Result;
use weir_harness::{Plain, Storefront, Tier};

use crate::journey;

#[tokio::test(flavor = "multi_thread")]
async fn journey_on_plain_postgres() -> Result<()> {
    let plain = Plain::start().await?;
    let shop = Storefront::start(&plain.dsn()).await?;
    shop.load_generated().await?;
    journey::run(shop.url(), "plain").await
}

#[tokio::test(flavor = "multi_thread")]
async fn journey_on_weir() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).redis(true).start().await?;
    let shop = Storefront::start(&tier.dsn("shop")).await?;
    shop.load_generated().await?;
    journey::run(shop.url(), "weir").await
}
