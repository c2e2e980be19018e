//! Writes that go round weir: seen in the WAL, so that neither the cache nor a replica keeps showing what was before.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::SinkExt as _;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::Tier;

use crate::placement::{column, create_schema};

/// Well below cache.max_age, which is the default of a minute: what is gone by then was told.
const SOON: Duration = Duration::from_secs(10);

/// One column of SHOW DECODING, of every shard.
async fn shown(tier: &Tier, name: &str) -> Result<Vec<String>> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let messages = console.simple_query("SHOW DECODING").await?;
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(name).unwrap_or_default().to_owned()),
        _ => None,
    });
    Ok(rows.collect())
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    while !holds().await? {
        ensure!(start.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(start.elapsed())
}

async fn until_up(tier: &Tier) -> Result<()> {
    let all_up = async || Ok(shown(tier, "state").await?.iter().all(|state| state == "up"));
    if let Err(error) = until("every shard is up", all_up).await {
        anyhow::bail!("{error}: {:?}; {}", shown(tier, "reason").await?, tier.weir_log());
    }
    Ok(())
}

/// Waits until what DDL has changed is published.
async fn until_published(tier: &Tier, direct: &Client, table: &str) -> Result<()> {
    let published = format!("SELECT count(*) FROM pg_publication_tables WHERE tablename = '{table}'");
    until(table, async || Ok(column(direct, &published).await? != ["0"])).await?;
    until_up(tier).await
}

/// Reads until the answer comes out of the cache.
async fn cached(tier: &Tier, reader: &Client, probe: &str, expected: &str) -> Result<()> {
    until(probe, async || {
        let before = crate::freshness::cache_figure(tier, "hits_memory").await?;
        ensure!(column(reader, probe).await?.join(",") == expected, "{probe}: {:?}", column(reader, probe).await?);
        Ok(crate::freshness::cache_figure(tier, "hits_memory").await? > before)
    })
    .await?;
    Ok(())
}

/// Reads until the answer is the new one, and then for a while to see that it never goes back.
async fn seen(readers: &[Client], probe: &str, expected: &str) -> Result<Duration> {
    let start = Instant::now();
    while column(&readers[0], probe).await?.join(",") != expected {
        ensure!(start.elapsed() < SOON, "{probe} still shows {:?}, not {expected}", column(&readers[0], probe).await?);
    }
    let took = start.elapsed();
    for round in 0..30 {
        let answer = column(&readers[round % readers.len()], probe).await?.join(",");
        ensure!(answer == expected, "{probe} went back to {answer}");
    }
    Ok(took)
}

const OBJECTS: &str = "
CREATE TABLE audit (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO audit (what) VALUES (new.name); RETURN new; END $$;
CREATE TABLE watched (id bigint PRIMARY KEY, name text);
CREATE TRIGGER note AFTER UPDATE ON watched FOR EACH ROW EXECUTE FUNCTION note();
CREATE TABLE parents (id bigint PRIMARY KEY);
CREATE TABLE children (id bigint PRIMARY KEY, parent bigint REFERENCES parents ON DELETE CASCADE);
CREATE TABLE bare (id bigint, name text);
CREATE TABLE whole (id bigint, name text);
ALTER TABLE whole REPLICA IDENTITY FULL;
CREATE TABLE keyed_apart (id bigint PRIMARY KEY, name text)";

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_write_beside_weir_is_seen() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).start().await?;
    let direct = tier.shards[0].primary.admin("shop").await?;
    let readers = [tier.connect().await?, tier.connect().await?];
    create_schema(&readers[0]).await?;
    direct.batch_execute(OBJECTS).await?;
    direct
        .batch_execute(
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO shop; INSERT INTO users (user_id, name) SELECT i, 'a' FROM generate_series(1, 20) i;
             INSERT INTO watched VALUES (1, 'a'); INSERT INTO parents VALUES (1); INSERT INTO children VALUES (1, 1), (2, 1);
             INSERT INTO whole VALUES (1, 'a')",
        )
        .await?;
    until_published(&tier, &direct, "keyed_apart").await?;
    let named = "SELECT string_agg(name, ',' ORDER BY user_id) FROM users WHERE user_id IN (1, 2)";
    let of = |key: i64| format!("SELECT name FROM users WHERE user_id = {key}");
    let cases: Vec<(&str, Vec<(String, &str, &str)>)> = vec![
        ("UPDATE users SET name = 'b' WHERE user_id = 1", vec![(of(1), "a", "b"), (named.into(), "a,a", "b,a")]),
        ("UPDATE users SET user_id = 1002 WHERE user_id = 2", vec![(of(2), "a", ""), (of(1002), "", "a")]),
        ("INSERT INTO users (user_id, name) VALUES (77, 'new')", vec![(of(77), "", "new")]),
        (
            "DELETE FROM users WHERE user_id = 3",
            vec![(of(3), "a", ""), ("SELECT count(*) FROM users".into(), "21", "20")],
        ),
        ("UPDATE watched SET name = 'b'", vec![("SELECT count(*) FROM audit".into(), "0", "1")]),
        ("DELETE FROM parents", vec![("SELECT count(*) FROM children".into(), "2", "0")]),
        ("INSERT INTO bare VALUES (1, 'a')", vec![("SELECT count(*) FROM bare".into(), "0", "1")]),
        ("UPDATE whole SET name = 'b'", vec![("SELECT name FROM whole".into(), "a", "b")]),
        (
            "BEGIN; UPDATE users SET name = '2pc' WHERE user_id = 4; PREPARE TRANSACTION 'mine'; COMMIT PREPARED 'mine'",
            vec![(of(4), "a", "2pc")],
        ),
        ("BEGIN; UPDATE users SET name = 'rolled' WHERE user_id = 5; ROLLBACK", vec![(of(5), "a", "a")]),
        ("TRUNCATE bare", vec![("SELECT count(*) FROM bare".into(), "1", "0")]),
        ("TRUNCATE users CASCADE", vec![(of(1), "b", ""), ("SELECT count(*) FROM users".into(), "20", "0")]),
    ];
    for (write, probes) in &cases {
        for (probe, before, _) in probes {
            cached(&tier, &readers[0], probe, before).await.with_context(|| (*write).to_owned())?;
        }
        for part in write.split("; ") {
            direct.batch_execute(part).await?;
        }
        for (probe, _, after) in probes {
            seen(&readers, probe, after).await.with_context(|| (*write).to_owned())?;
        }
    }
    cached(&tier, &readers[0], "SELECT count(*) FROM keyed_apart", "0").await?;
    let sink = direct.copy_in("COPY keyed_apart FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from_static(b"1\ta\n2\tb\n")).await?;
    sink.finish().await?;
    seen(&readers, "SELECT count(*) FROM keyed_apart", "2").await?;
    ensure!(shown(&tier, "gaps").await?[0].contains("public.bare"), "{:?}", shown(&tier, "gaps").await?);
    Ok(())
}
