//! The shop's visitors look around: how much of what its pages read does the cache answer, once it is warm?

use anyhow::{Context, Result};
use weir_harness::{Storefront, Tier};

use crate::freshness::cache_figure;
use crate::placement::column;

/// Reads that the cache was asked for: hits, and misses.
async fn asked(tier: &Tier) -> Result<(i64, i64)> {
    let (mut hits, mut misses) = (0, 0);
    for hit in ["hit_local", "hit_shared", "hit_coalesced"] {
        hits += cache_figure(tier.proxy(), hit).await?;
    }
    for miss in ["miss_absent", "miss_pending", "miss_moved", "miss_too_old"] {
        misses += cache_figure(tier.proxy(), miss).await?;
    }
    Ok((hits, misses))
}

/// Looks at `count` pages: the home page, categories, products (few of them much more often than the rest), searches. The stock of
/// a product changes every `write_every` pages.
async fn browse(tier: &Tier, shop: &Storefront, (count, write_every): (u64, u64)) -> Result<()> {
    let stock = tier.connect().await?;
    let slugs = column(&stock, "SELECT slug FROM categories ORDER BY slug").await?;
    let products = column(&stock, "SELECT product_id FROM products ORDER BY product_id").await?;
    let http = reqwest::Client::new();
    let mut state = 42_u64;
    for page in 1..=count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (state >> 11) as f64 / (1_u64 << 53) as f64;
        // Zipf's law over what there is.
        let one_of = |all: &[String]| {
            let rank = (all.len() as f64).powf(uniform) as usize;
            all.get(rank.saturating_sub(1)).cloned().context("something to look at")
        };
        let path = match state >> 60 {
            0..=2 => "/".to_owned(),
            3..=6 => format!("/category/{}", one_of(&slugs)?),
            7..=14 => format!("/product/{}", one_of(&products)?),
            _ => "/search?q=a".to_owned(),
        };
        http.get(format!("{}{path}", shop.url())).send().await?.error_for_status()?;
        if page % write_every == 0 {
            let product: i64 = one_of(&products)?.parse()?;
            let sold = "UPDATE inventory SET available = available - 1 WHERE product_id = $1 AND available > 0";
            stock.execute(sold, &[&product]).await?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_read_from_the_cache_once_it_is_warm() -> Result<()> {
    let tier = Tier::builder().shards(2).config_extra("[cache]\nmax_age = '10m'").start().await?;
    let shop = Storefront::start(&tier.dsn("shop")).await?;
    shop.load_generated().await?;
    browse(&tier, &shop, (3_000, 50)).await?;
    let (hits, misses) = asked(&tier).await?;
    browse(&tier, &shop, (2_000, 50)).await?;
    let now = asked(&tier).await?;
    let (hits, misses) = (now.0 - hits, now.1 - misses);
    let ratio = hits as f64 / (hits + misses).max(1) as f64;
    println!(
        "browse mix, 2 % of the pages followed by a sale: {hits} hits, {misses} misses, {:.2} % hits",
        ratio * 100.0
    );
    assert!(hits > 2_000 && ratio >= 0.95, "{hits} hits, {misses} misses");
    Ok(())
}
