//! Shards that join and leave while clients go on, at two proxies: the hub is told, and nobody is restarted.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use weir_harness::{Cluster, ClusterSpec, Proxy, Tier};

use crate::placement::{SCHEMA, column, create_schema};

/// Longest wait for a proxy to hear of a new map.
const PATIENCE: Duration = Duration::from_secs(30);

/// A row of SHOW SHARDS: name, state and slots.
async fn shards(proxy: &Proxy) -> Result<Vec<String>> {
    let console = weir_harness::connect(&proxy.admin_dsn()).await?;
    let mut shown = Vec::new();
    for message in console.simple_query("SHOW SHARDS").await? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            let of = |name: &str| row.get(name).unwrap_or("-").to_owned();
            shown.push(format!("{} {} {} {}", of("name"), of("state"), of("slots"), of("up")));
        }
    }
    Ok(shown)
}

async fn all_show(proxies: [&Proxy; 2], wanted: &[&str]) -> Result<()> {
    for proxy in proxies {
        let start = Instant::now();
        loop {
            let shown = shards(proxy).await?;
            if shown == wanted {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "SHOW SHARDS says {shown:?} and not {wanted:?}\n{}", proxy.weir_log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

/// As the mover registers a shard.
async fn add(hub: &Client, name: &str, address: &str) -> Result<()> {
    let sql = format!(
        "BEGIN; INSERT INTO weir.shard (database, id, name, weight, servers, state) \
         SELECT 'shop', max(id) + 1, '{name}', 1, ARRAY['{address}'], 'joining' FROM weir.shard; {RAISE}; COMMIT"
    );
    Ok(hub.batch_execute(&sql).await?)
}

/// As the mover lets it take part, or no more.
async fn set_state(hub: &Client, name: &str, state: &str) -> Result<()> {
    let sql = format!("BEGIN; UPDATE weir.shard SET state = '{state}' WHERE name = '{name}'; {RAISE}; COMMIT");
    Ok(hub.batch_execute(&sql).await?)
}

/// Rows are left where they are: only the map changes.
async fn give(hub: &Client, slots: &str, name: &str) -> Result<()> {
    let sql = format!(
        "BEGIN; UPDATE weir.slot SET shard = (SELECT id FROM weir.shard WHERE name = '{name}') WHERE slot BETWEEN {slots}; \
         {RAISE}; COMMIT"
    );
    Ok(hub.batch_execute(&sql).await?)
}

const RAISE: &str = "UPDATE weir.topology SET epoch = epoch + 1; NOTIFY weir_topology";

/// A server that lets weir and its clients in.
async fn new_server(tier: &Tier, name: &str) -> Result<Cluster> {
    let spec = ClusterSpec::new(name, &tier.state.admin_password).database("shop", "shop", &tier.state.shop_password);
    Cluster::start(&tier.run, spec.setting("wal_level", "logical").setting("max_prepared_transactions", "20")).await
}

async fn count(server: &Cluster, sql: &str) -> Result<i64> {
    Ok(server.admin("shop").await?.query_one(sql, &[]).await?.try_get(0)?)
}

/// A key whose slot is in the range.
async fn key_in(server: &Client, slots: &str) -> Result<i64> {
    let sql = format!(
        "SELECT k FROM generate_series(100000::int8, 200000) k WHERE (hashint8extended(k, 0) >> 52) & 4095 BETWEEN {slots} LIMIT 1"
    );
    Ok(server.query_one(&sql, &[]).await?.try_get(0)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_joins_takes_part_and_leaves_while_clients_go_on() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    let second = tier.another().await?;
    let proxies = [tier.proxy(), &second];
    let (one, two) = (tier.connect().await?, second.connect().await?);
    create_schema(&one).await?;
    for key in 1..=100_i64 {
        one.execute("INSERT INTO users (user_id, name) VALUES ($1, 'x')", &[&key]).await?;
    }
    one.batch_execute("INSERT INTO products VALUES (1, 'tea', 500)").await?;
    let hub = tier.hub.admin("weir_hub").await?;
    let added = new_server(&tier, "added").await?;
    // What the mover will copy: the schema, and reference tables.
    let direct = added.admin("shop").await?;
    direct
        .batch_execute(&format!("SET ROLE shop; {SCHEMA}; RESET ROLE; INSERT INTO products VALUES (1, 'tea', 500)"))
        .await?;
    // A transaction and a session of before go on through all of it.
    two.batch_execute("BEGIN; UPDATE users SET name = 'open' WHERE user_id = 7").await?;

    add(&hub, "added", &added.address()).await?;
    all_show(proxies, &["shard0 active 2048 t", "shard1 active 2048 t", "added joining 0 t"]).await?;
    // Joining: no write of a copy, no DDL, no scatter reaches it.
    one.batch_execute("INSERT INTO products VALUES (2, 'cup', 900)").await?;
    one.batch_execute("CREATE TABLE later (user_id bigint PRIMARY KEY)").await?;
    direct.batch_execute("INSERT INTO users (user_id, name) VALUES (-1, 'guest')").await?;
    for client in [&one, &two] {
        assert_eq!(column(client, "SELECT count(*) FROM users").await?, ["100"]);
        assert_eq!(column(client, "SELECT count(*) FROM products").await?, ["2"]);
    }
    assert_eq!(count(&added, "SELECT count(*) FROM products").await?, 1);
    assert_eq!(count(&added, "SELECT count(*) FROM pg_class WHERE relname = 'later'").await?, 0);
    // Weir's own tables are there before it takes part.
    assert_eq!(count(&added, "SELECT count(*) FROM pg_class WHERE relname = 'txlog'").await?, 1);
    two.batch_execute("COMMIT").await?;

    direct.batch_execute("DELETE FROM users; INSERT INTO products VALUES (2, 'cup', 900); CREATE TABLE later (user_id bigint PRIMARY KEY); ALTER TABLE later OWNER TO shop").await?;
    set_state(&hub, "added", "active").await?;
    all_show(proxies, &["shard0 active 2048 t", "shard1 active 2048 t", "added active 0 t"]).await?;
    two.batch_execute("INSERT INTO products VALUES (3, 'pot', 1900)").await?;
    two.batch_execute("ALTER TABLE products ADD COLUMN stock int").await?;
    assert_eq!(count(&added, "SELECT count(stock) + count(*) FROM products").await?, 3);
    direct.batch_execute("INSERT INTO users (user_id, name) VALUES (-1, 'seen by scatters')").await?;
    for client in [&one, &two] {
        assert_eq!(column(client, "SELECT count(*) FROM users").await?, ["101"]);
    }
    direct.batch_execute("DELETE FROM users").await?;

    // Keys of its slots are its, and a distributed transaction takes it in.
    let key = key_in(&direct, "0 AND 99").await?;
    one.execute("INSERT INTO users (user_id, name) VALUES ($1, 'before')", &[&key]).await?;
    assert_eq!(count(&added, "SELECT count(*) FROM users").await?, 0);
    one.execute("DELETE FROM users WHERE user_id = $1", &[&key]).await?;
    give(&hub, "0 AND 99", "added").await?;
    let owned: i64 = hub.query_one("SELECT count(*) FROM weir.slot WHERE shard = 0", &[]).await?.get(0);
    let shown = [format!("shard0 active {owned} t"), format!("shard1 active {} t", 3996 - owned)];
    all_show(proxies, &[&shown[0], &shown[1], "added active 100 t"]).await?;
    for (client, name) in [(&two, "theirs"), (&one, "ours")] {
        client.batch_execute("BEGIN").await?;
        client.execute("DELETE FROM users WHERE user_id = $1", &[&key]).await?;
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, $2)", &[&key, &name]).await?;
        client.execute("UPDATE users SET name = $1 WHERE user_id BETWEEN 1 AND 5", &[&name]).await?;
        client.batch_execute("COMMIT").await?;
        let found = added.admin("shop").await?.query_one("SELECT name FROM users WHERE user_id = $1", &[&key]).await?;
        assert_eq!(found.get::<_, String>(0), name);
        let text = format!("SELECT name FROM users WHERE user_id = {key}");
        for reader in [&one, &two] {
            assert_eq!(column(reader, &text).await?, [name], "read at once through both");
        }
    }

    // And back: nothing reaches it any more, and its connections go.
    one.execute("DELETE FROM users WHERE user_id = $1", &[&key]).await?;
    give(&hub, "0 AND 99", "shard0").await?;
    set_state(&hub, "added", "retired").await?;
    let shown = [format!("shard0 active {} t", owned + 100), shown[1].clone()];
    let all = [shown[0].as_str(), shown[1].as_str()];
    all_show(proxies, &[all[0], all[1], "added retired 0 t"]).await?;
    one.batch_execute("INSERT INTO products VALUES (4, 'lid', 100)").await?;
    assert_eq!(count(&added, "SELECT count(*) FROM products").await?, 3);
    let start = Instant::now();
    while count(&added, "SELECT count(*) FROM pg_stat_activity WHERE usename = 'shop'").await? > 0 {
        ensure!(start.elapsed() < PATIENCE, "clients' connections to a retired shard stay");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // It may go for good; a proxy that starts then does not miss it.
    added.stop();
    tier.restart_weir().await?;
    let shown = shards(tier.proxy()).await?;
    assert_eq!((shown.len(), shown[2].as_str()), (3, "added retired 0 f"));
    assert_eq!(column(&tier.connect().await?, "SELECT count(*) FROM users").await?, ["100"]);
    assert_eq!(column(&two, "SELECT count(*) FROM users").await?, ["100"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_in_the_file_means_nothing_and_what_it_does_not_name_is_taken_from_the_hub() -> Result<()> {
    let tier = Tier::builder().shards(3).peers(true).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 1..=60_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'x')", &[&key]).await?;
    }
    let before = column(&client, "SELECT user_id FROM users ORDER BY user_id").await?;
    client.batch_execute("INSERT INTO settings VALUES ('at', 'home')").await?;
    // One shard less in the file, the others the other way round; and one that nobody knows.
    let added = new_server(&tier, "added").await?;
    let path = tier.run.path().join("weir.toml");
    let mut config: toml::Table = std::fs::read_to_string(&path)?.parse()?;
    let database = config["database"]["shop"].as_table_mut().context("database.shop")?;
    let shards_of = database["shard"].as_array_mut().context("shards")?;
    shards_of.remove(1);
    shards_of.reverse();
    let mut unknown = toml::Table::new();
    unknown.insert("name".to_owned(), "added".into());
    unknown.insert("primary".to_owned(), added.address().into());
    shards_of.insert(0, unknown.into());
    database.insert("home".to_owned(), "shard0".into());
    std::fs::write(&path, toml::to_string(&config)?)?;
    tier.restart_weir().await?;
    let start = Instant::now();
    let shown = loop {
        let shown = shards(tier.proxy()).await?;
        if shown.get(3).is_some_and(|shard| shard == "added joining 0 t") {
            break shown;
        }
        ensure!(start.elapsed() < PATIENCE, "{shown:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let names: Vec<&str> = shown.iter().filter_map(|row| row.split(' ').next()).collect();
    assert_eq!(names, ["shard0", "shard1", "shard2", "added"]);
    assert!(tier.weir_log().contains("weir reshard start add added"), "the log says what to do");
    let client = tier.connect().await?;
    assert_eq!(column(&client, "SELECT user_id FROM users ORDER BY user_id").await?, before);
    for key in 1..=60_i64 {
        assert_eq!(column(&client, &format!("SELECT name FROM users WHERE user_id = {key}")).await?, ["x"]);
    }
    assert_eq!(column(&client, "SELECT value FROM settings").await?, ["home"]);
    Ok(())
}
