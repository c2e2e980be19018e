//! No read, on any connection, shows less than what was acknowledged before it was asked; whoever answers it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use weir_harness::{Proxy, Tier};

use crate::placement::{column, create_schema};

/// A figure of SHOW CACHE of one proxy.
pub async fn cache_figure(proxy: &Proxy, name: &str) -> Result<i64> {
    let console = weir_harness::connect(&proxy.admin_dsn()).await?;
    for message in console.simple_query("SHOW CACHE").await? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message
            && row.get(0) == Some(&format!("shop.{name}"))
        {
            return Ok(row.get(1).context("value")?.parse()?);
        }
    }
    anyhow::bail!("no figure {name}")
}

/// Reads answered by replicas, over all shards.
pub async fn replica_reads(tier: &Tier) -> Result<i64> {
    replica_reads_of(tier.proxy()).await
}

/// Those that one weir has sent there.
pub async fn replica_reads_of(proxy: &Proxy) -> Result<i64> {
    let console = weir_harness::connect(&proxy.admin_dsn()).await?;
    let mut reads = 0;
    for message in console.simple_query("SHOW REPLICAS").await? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message
            && row.get("role") == Some("replica")
        {
            reads += row.get("reads").context("reads")?.parse::<i64>()?;
        }
    }
    Ok(reads)
}

/// Reads until somebody else than the primary has answered; what they answer must be right all the while.
pub async fn until(mut what: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    // Ends after half a minute, on a machine that does nothing else.
    for _ in 0..600 {
        if what().await? {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("it never happened")
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_answer_reads_and_never_stale_ones() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).config_extra("[cache]\nenabled = false").start().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    create_schema(&writer).await?;
    for key in 1..=20_i64 {
        writer.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&key]).await?;
    }
    until(async || {
        assert_eq!(column(&reader, "SELECT name FROM users WHERE user_id = 7").await?, ["0"]);
        Ok(replica_reads(&tier).await? > 0)
    })
    .await?;
    for round in 1..=100_i64 {
        let key = round % 20 + 1;
        writer.execute("UPDATE users SET name = $2 WHERE user_id = $1", &[&key, &round.to_string()]).await?;
        let row = reader.query_one("SELECT name FROM users WHERE user_id = $1", &[&key]).await?;
        assert_eq!(row.get::<_, String>(0), round.to_string(), "read right after a write on another connection");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_replica_is_never_believed() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).config_extra("[cache]\nenabled = false").start().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    create_schema(&writer).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (1, 'before'), (2, 'quiet')", &[]).await?;
    until(async || {
        column(&reader, "SELECT name FROM users WHERE user_id = 1").await?;
        Ok(replica_reads(&tier).await? > 0)
    })
    .await?;
    tier.shards[0].replicas[0].pause_replay().await?;
    for round in 0..50 {
        let name = format!("after {round}");
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        assert_eq!(column(&reader, "SELECT name FROM users WHERE user_id = 1").await?, std::slice::from_ref(&name));
        assert_eq!(
            reader.query_one("SELECT name FROM users WHERE user_id = $1", &[&1_i64]).await?.get::<_, String>(0),
            name
        );
        assert_eq!(column(&reader, "SELECT name FROM users WHERE user_id = 2").await?, ["quiet"]);
    }
    tier.shards[0].replicas[0].resume_replay().await?;
    let before = replica_reads(&tier).await?;
    until(async || {
        assert_eq!(column(&reader, "SELECT name FROM users WHERE user_id = 1").await?, ["after 49"]);
        Ok(replica_reads(&tier).await? > before)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_answers_and_forgets_what_was_written() -> Result<()> {
    let tier = Tier::builder().shards(2).redis(true).start().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    create_schema(&writer).await?;
    writer.execute("INSERT INTO products VALUES (1, 'tea', 500)", &[]).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    let keyed = reader.prepare("SELECT name FROM users WHERE user_id = $1").await?;
    let table = reader.prepare("SELECT name, price_cents FROM products ORDER BY product_id").await?;
    until(async || {
        reader.query_one(&keyed, &[&1_i64]).await?;
        reader.query(&table, &[]).await?;
        Ok(cache_figure(tier.proxy(), "hits_memory").await? > 0)
    })
    .await?;
    for round in 0..100_i64 {
        let name = format!("Ann {round}");
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        writer.execute("UPDATE products SET price_cents = $1 WHERE product_id = 1", &[&round]).await?;
        for _ in 0..2 {
            assert_eq!(reader.query_one(&keyed, &[&1_i64]).await?.get::<_, String>(0), name);
            assert_eq!(reader.query_one(&table, &[]).await?.get::<_, i64>(1), round);
        }
    }
    // A write inside a transaction counts from its commit on, and not before.
    let before: String = reader.query_one(&keyed, &[&1_i64]).await?.get(0);
    writer.batch_execute("BEGIN; UPDATE users SET name = 'in flight' WHERE user_id = 1").await?;
    assert_eq!(reader.query_one(&keyed, &[&1_i64]).await?.get::<_, String>(0), before);
    writer.batch_execute("COMMIT").await?;
    assert_eq!(reader.query_one(&keyed, &[&1_i64]).await?.get::<_, String>(0), "in flight");
    // DDL changes what a cached statement means.
    writer.batch_execute("ALTER TABLE users RENAME COLUMN name TO label").await?;
    assert!(reader.query("SELECT name FROM users WHERE user_id = 1", &[]).await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_redis_changes_nothing_but_speed() -> Result<()> {
    let tier = Tier::builder().shards(2).redis(true).start().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    create_schema(&writer).await?;
    writer.execute("INSERT INTO users (user_id, name) VALUES (1, '0')", &[]).await?;
    let redis = tier.redis.as_ref().context("redis")?;
    for round in 1..=60_i64 {
        if round == 20 {
            redis.kill9();
        }
        if round == 40 {
            redis.restart().await?;
        }
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&round.to_string()]).await?;
        for _ in 0..3 {
            assert_eq!(column(&reader, "SELECT name FROM users WHERE user_id = 1").await?, [round.to_string()]);
        }
        let (status, body) = tier.http_get("/readyz").await?;
        assert_eq!(status, 200, "without Redis weir stays ready: {body}");
    }
    Ok(())
}

/// One register per key under concurrent writers and readers: a read shows at least what was acknowledged before it began,
/// and never less than an earlier read has shown.
#[tokio::test(flavor = "multi_thread")]
async fn registers_are_fresh_and_monotonic_under_load() -> Result<()> {
    const KEYS: usize = 8;
    let tier = Tier::builder().shards(2).replicas(1).redis(true).start().await?;
    let setup = tier.connect().await?;
    create_schema(&setup).await?;
    for key in 0..KEYS as i64 {
        setup.execute("INSERT INTO orders (user_id, order_id, status, total_cents) SELECT u, '00000000-0000-0000-0000-000000000000', 's', 0 FROM (SELECT $1::bigint AS u) x WHERE false", &[&key]).await.ok();
        setup.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&key]).await?;
    }
    let acked: Arc<Vec<AtomicI64>> = Arc::new((0..KEYS).map(|_| AtomicI64::new(0)).collect());
    let shown: Arc<Vec<AtomicI64>> = Arc::new((0..KEYS).map(|_| AtomicI64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for half in 0..2 {
        let (client, acked, stop) = (tier.connect().await?, Arc::clone(&acked), Arc::clone(&stop));
        writers.push(tokio::spawn(async move {
            let update = client.prepare("UPDATE users SET name = $2 WHERE user_id = $1").await?;
            let mut value = 0_i64;
            while !stop.load(Ordering::Relaxed) {
                value += 1;
                let key = (value as usize * 2 + half) % KEYS;
                client.execute(&update, &[&(key as i64), &value.to_string()]).await?;
                acked[key].fetch_max(value, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
            anyhow::Ok(())
        }));
    }
    let mut readers = Vec::new();
    for reader in 0..4 {
        let (client, acked, shown) = (tier.connect().await?, Arc::clone(&acked), Arc::clone(&shown));
        readers.push(tokio::spawn(async move {
            let select = client.prepare("SELECT name FROM users WHERE user_id = $1").await?;
            for round in 0..1500_usize {
                let key = (round * 7 + reader) % KEYS;
                let least = acked[key].load(Ordering::SeqCst).max(shown[key].load(Ordering::SeqCst));
                let value: i64 = client.query_one(&select, &[&(key as i64)]).await?.get::<_, String>(0).parse()?;
                anyhow::ensure!(value >= least, "key {key}: read {value} after {least} was known");
                shown[key].fetch_max(value, Ordering::SeqCst);
            }
            anyhow::Ok(())
        }));
    }
    for reader in readers {
        reader.await??;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await??;
    }
    assert!(cache_figure(tier.proxy(), "hits_memory").await? > 0, "the cache took part");
    assert!(replica_reads(&tier).await? > 0, "replicas took part");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_in_the_own_zone_answer_as_long_as_there_is_one() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(2).config_extra("[cache]\nenabled = false").start().await?;
    let [far, near] = [0, 1].map(|number| &tier.shards[0].replicas[number]);
    let path = tier.run.path().join("weir.toml");
    let config = std::fs::read_to_string(&path)?;
    let zones = format!("[server_zones]\n\"{}\" = \"a\"\n\"{}\" = \"b\"\n", near.address(), far.address());
    std::fs::write(&path, format!("zone = \"a\"\n{config}\n{zones}"))?;
    tier.restart_weir().await?;
    let reader = tier.connect().await?;
    create_schema(&reader).await?;
    let said = async |server: &str, what| crate::promotion::shown(tier.proxy(), server, what).await;
    let reads = async |server: &str| anyhow::Ok(said(server, "reads").await?.parse::<i64>()?);
    let read = async || column(&reader, "SELECT name FROM users WHERE user_id = 1").await;
    let answers = async |server: &str| {
        until(async || {
            let before = reads(server).await?;
            for _ in 0..20 {
                read().await?;
            }
            Ok(reads(server).await? >= before + 20)
        })
        .await
    };
    answers(&near.address()).await?;
    let before = reads(&far.address()).await?;
    for _ in 0..100 {
        read().await?;
    }
    assert_eq!(reads(&far.address()).await?, before, "nobody leaves the zone");
    assert_eq!((said(&near.address(), "zone").await?, said(&far.address(), "zone").await?), ("a".into(), "b".into()));
    near.kill9();
    answers(&far.address()).await
}
