//! A replica of the hub runs what the fallback engine answers: as one Postgres would, whatever becomes of the replica.
//!
//! Reading order: answers and lag → outages. Non-goals: what the engine can answer (`engine.rs`).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_harness::{Plain, Tier, connect};
use weir_wire::frontend::put_query;

use crate::engine::{HARD, compare, load, route, rows};
use crate::placement::column;
use crate::raw::Raw;

const WAIT: Duration = Duration::from_secs(60);

/// On a shard: statements of the engine that read this table stand still.
const HALT: &str = "BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE";
const HALTED: &str = "SELECT count(*) FROM (SELECT rank() OVER (ORDER BY country) FROM users) x";

/// How SHOW ENGINE says that the first replica stands.
async fn standing(tier: &Tier) -> Result<String> {
    let console = connect(&tier.admin_dsn()).await?;
    let shown = rows(&console, "SHOW ENGINE").await?;
    let row = shown.into_iter().find(|row| row[2].as_deref() == Some("replica")).context("no replica is shown")?;
    row[5].clone().context("a reason")
}

async fn until_standing(tier: &Tier, wanted: &str) -> Result<()> {
    let deadline = Instant::now() + WAIT;
    loop {
        let now = standing(tier).await?;
        if now.starts_with(wanted) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{now} instead of {wanted}\n{}", tier.weir_log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many statements the first replica was chosen for.
async fn asked(tier: &Tier) -> Result<u64> {
    let now = standing(tier).await?;
    let count = now.rsplit("; ").next().and_then(|text| text.strip_suffix(" statements"));
    Ok(count.context("a count")?.parse()?)
}

async fn runs_on_replica(tier: &Tier) -> Result<bool> {
    Ok(route(tier, HARD[2]).await?.contains("hub=replica"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_the_hub_answers_and_never_with_old_rows_or_tables() -> Result<()> {
    let (tier, plain) = (Tier::builder().hub_replicas(1).start().await?, Plain::start().await?);
    let (sharded, single) = (tier.connect().await?, connect(&plain.dsn()).await?);
    load(&single).await?;
    load(&sharded).await?;
    rows(&sharded, HARD[2]).await?;
    until_standing(&tier, "in step").await?;
    ensure!(runs_on_replica(&tier).await?, "{}", route(&tier, HARD[2]).await?);
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    put_query(&mut raw.out, &format!("EXPLAIN {}", HARD[2]));
    let (tags, bodies) = raw.until_ready().await?;
    let notice = String::from_utf8_lossy(&bodies[0]).into_owned();
    ensure!(tags.starts_with("NTD") && notice.contains("on the hub's replica 127.0.0.1"), "{tags} {notice}");
    let before = asked(&tier).await?;
    compare(&sharded, &single, HARD).await?;
    for country in ["DE", "JP"] {
        let sql = "SELECT count(*) FROM users a JOIN orders b ON a.user_id < b.order_id WHERE a.country = $1";
        let (left, right) = (sharded.query_one(sql, &[&country]).await?, single.query_one(sql, &[&country]).await?);
        assert_eq!(left.get::<_, i64>(0), right.get::<_, i64>(0));
    }
    let ran = asked(&tier).await? - before;
    ensure!(ran >= HARD.len() as u64, "only {ran} statements ran on the replica\n{}", tier.weir_log());

    // Rows come from the shards, however far behind the hub's replica is.
    let replica = &tier.hub_replicas[0];
    replica.pause_replay().await?;
    let count = "SELECT count(*) FROM (SELECT rank() OVER (ORDER BY country) FROM users) x";
    for number in 0..5 {
        let insert = format!("INSERT INTO users VALUES ({}, 'n{number}@x.com', 'DE')", 1000 + number);
        sharded.batch_execute(&insert).await?;
        assert_eq!(column(&sharded, count).await?, [(41 + number).to_string()]);
    }
    ensure!(asked(&tier).await? >= before + ran + 5, "a standby that shows the right build is asked");
    // A schema it has not seen yet: the primary answers.
    let before = asked(&tier).await?;
    sharded.batch_execute("ALTER TABLE users ADD COLUMN extra int DEFAULT 7").await?;
    let sql = "SELECT DISTINCT extra, rank() OVER (ORDER BY extra) FROM users";
    assert_eq!(rows(&sharded, sql).await?, [[Some("7".to_owned()), Some("1".to_owned())]]);
    // Settings of the database count from the login on, and those of its connections are older than these.
    let float = "SELECT max(user_id / 3.0::float8) OVER (), rank() OVER (ORDER BY user_id) FROM users LIMIT 1";
    let long = rows(&sharded, float).await?[0][0].clone();
    for shard in &tier.shards {
        shard.primary.admin("shop").await?.batch_execute("ALTER DATABASE shop SET extra_float_digits = -10").await?;
    }
    sharded.batch_execute("ALTER TABLE users DROP COLUMN extra").await?;
    assert_eq!(rows(&sharded, "SELECT *, rank() OVER (ORDER BY country) FROM users").await?[0].len(), 5);
    ensure!(!runs_on_replica(&tier).await?, "{}", route(&tier, HARD[2]).await?);
    assert_eq!(asked(&tier).await?, before, "{}", standing(&tier).await?);
    replica.resume_replay().await?;
    until_standing(&tier, "in step").await?;
    let short = rows(&sharded, float).await?[0][0].clone();
    ensure!(asked(&tier).await? > before, "{}", standing(&tier).await?);
    ensure!(short.as_ref().map(String::len) < long.as_ref().map(String::len), "{short:?} {long:?}");
    // What a standby refuses is for the primary.
    sharded.batch_execute("BEGIN READ WRITE").await?;
    assert_eq!(column(&sharded, count).await?, ["45"]);
    sharded.batch_execute("COMMIT").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_befalls_a_replica_of_the_hub_befalls_no_statement() -> Result<()> {
    let tier = Tier::builder().hub_replicas(1).start().await?;
    let (client, other) = (tier.connect().await?, tier.connect().await?);
    load(&client).await?;
    let n = column(&client, "SELECT count(*) FROM users").await?;
    let expected = rows(&client, HARD[2]).await?;
    until_standing(&tier, "in step").await?;
    // Its replay comes to a new build and does not wait for the statement: 40001, and the primary answers.
    let replica = &tier.hub_replicas[0];
    let admin = replica.admin("postgres").await?;
    admin.batch_execute("ALTER SYSTEM SET max_standby_streaming_delay = 0").await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    let shard = tier.shards[1].primary.admin("shop").await?;
    let before = asked(&tier).await?;
    shard.batch_execute(HALT).await?;
    let (answer, changed) = tokio::join!(column(&client, HALTED), async {
        until_asked(&tier, before + 1).await?;
        other.batch_execute("ALTER TABLE inventory ADD COLUMN extra int").await.context("DDL")?;
        let deadline = Instant::now() + WAIT;
        while !replica.log().contains("due to conflict with recovery") {
            ensure!(Instant::now() < deadline, "no conflict:\n{}", replica.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        shard.batch_execute("ROLLBACK").await.context("the shard goes on")
    });
    changed?;
    assert_eq!(answer?, n);
    until_standing(&tier, "in step").await?;
    // It is killed amid a statement, and is not there for the next ones.
    let before = asked(&tier).await?;
    shard.batch_execute(HALT).await?;
    let (answer, killed) = tokio::join!(column(&client, HALTED), async {
        until_asked(&tier, before + 1).await?;
        replica.kill9();
        shard.batch_execute("ROLLBACK").await.context("the shard goes on")
    });
    killed?;
    assert_eq!(answer?, n);
    for _ in 0..5 {
        assert_eq!(rows(&client, HARD[2]).await?, expected);
    }
    until_standing(&tier, "away").await?;
    ensure!(!runs_on_replica(&tier).await?);
    replica.restart().await?;
    until_standing(&tier, "in step").await?;
    let before = asked(&tier).await?;
    assert_eq!(rows(&client, HARD[2]).await?, expected);
    assert_eq!(asked(&tier).await?, before + 1);
    // It takes the primary's place: what is under way then is cut, and the next statements run on it, as on a primary.
    replica.promote().await?;
    let answered = async |sql: &str| {
        let deadline = Instant::now() + WAIT;
        loop {
            match rows(&client, sql).await {
                Ok(found) => return anyhow::Ok(found),
                Err(error) => ensure!(Instant::now() < deadline, "{error:#}\n{}", tier.weir_log()),
            }
        }
    };
    assert_eq!(answered(HARD[2]).await?, expected);
    until_standing(&tier, "away: it is no standby").await?;
    client.batch_execute("ALTER TABLE users ADD COLUMN extra int").await?;
    // Another connection to the one before may be found cut only now.
    assert_eq!(answered("SELECT *, rank() OVER (ORDER BY country) FROM users").await?[0].len(), 6);
    assert_eq!(rows(&client, HARD[2]).await?, expected);
    Ok(())
}

/// Until the first replica was chosen for so many statements.
async fn until_asked(tier: &Tier, wanted: u64) -> Result<()> {
    let deadline = Instant::now() + WAIT;
    while asked(tier).await? < wanted {
        ensure!(Instant::now() < deadline, "the replica is not asked: {}", standing(tier).await?);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
