//! The harness against the binaries of this build: what it says is up is up, and it all goes with the values it returned.

use weir_harness::{Plain, Storefront, Tier, connect};

#[tokio::test]
async fn a_tier_serves_dies_and_returns() {
    let tier = Tier::builder().shards(2).replicas(1).log_statements(true).start().await.expect("starts");
    let path = tier.run.path().to_owned();
    let client = tier.connect().await.expect("connects");
    let one: i32 = client.query_one("SELECT 1", &[]).await.expect("answers").get(0);
    assert_eq!(one, 1);
    assert_eq!(tier.http_get("/readyz").await.expect("answers").0, 200);
    assert_eq!((tier.shards.len(), tier.shards[1].replicas.len(), tier.redis.is_none()), (2, 1, true));

    let pid = tier.weir_pid().expect("runs");
    tier.kill_weir();
    assert!(tier.connect().await.is_err() && tier.weir_pid().is_none());
    tier.restart_weir().await.expect("starts again");
    assert_ne!(tier.weir_pid(), Some(pid));
    tier.connect().await.expect("connects").simple_query("SELECT 1").await.expect("answers");
    drop(tier);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_wrong_configuration_is_an_error_with_weirs_words() {
    let error = Tier::builder().shards(1).config_extra("no_such_key = 1").start().await.expect_err("refused");
    assert!(format!("{error:#}").contains("no_such_key"), "{error:#}");
}

#[tokio::test]
async fn the_storefront_opens_on_plain_postgres() {
    let plain = Plain::start().await.expect("starts");
    let shop = Storefront::start(&plain.dsn()).await.expect("opens");
    shop.load_generated().await.expect("loads");
    let client = connect(&plain.dsn()).await.expect("connects");
    let products: i64 = client.query_one("SELECT count(*) FROM products", &[]).await.expect("answers").get(0);
    assert!(products > 100, "{products} products");
    let port = shop.url().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    assert_eq!(weir_local::http_get(port, "/healthz").await.expect("answers").0, 200);
}
