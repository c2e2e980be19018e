//! Read-only transactions that see all shards as they were at one moment, under load: money is conserved in every one of them, and
//! none sees a write without those that were acknowledged before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use weir_harness::{Builder, Tier};

use crate::differential::Dice;
use crate::dump::dump;
use crate::placement::column;

const SHARED: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
const ACCOUNTS: i64 = 20;
const START: i64 = 100;
/// Their rows are on different shards, if the first and the second of a pair are.
const PAIRS: [(i64, i64); 3] = [(1001, 1002), (1003, 1004), (1005, 1006)];

/// Accounts, and marks that clients move one after the other.
async fn tier() -> Result<Tier> {
    started(Tier::builder()).await
}

async fn started(builder: Builder) -> Result<Tier> {
    let tier = builder.shards(2).tables(&["users(user_id bigint)", "marks(user_id bigint)"]).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, cents bigint NOT NULL)").await?;
    client.batch_execute("CREATE TABLE marks (user_id bigint PRIMARY KEY, pair bigint, place int, n bigint)").await?;
    for account in 1..=ACCOUNTS {
        client.execute("INSERT INTO users VALUES ($1, $2)", &[&account, &START]).await?;
    }
    Ok(tier)
}

/// Keys of the marks of each pair: on the first shard and on the second.
async fn mark(tier: &Tier) -> Result<Vec<(i64, i64)>> {
    let client = tier.connect().await?;
    let rows: Vec<String> = (1000..1100).map(|key| format!("({key}, 0, 0, 0)")).collect();
    client.batch_execute(&format!("INSERT INTO marks VALUES {}", rows.join(", "))).await?;
    let mut keys = Vec::new();
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        keys.push(column(&direct, "SELECT user_id FROM marks ORDER BY 1 LIMIT 3").await?);
    }
    let mut pairs = Vec::new();
    for (pair, (one, other)) in keys[0].iter().zip(&keys[1]).enumerate() {
        // Every second chain goes the other way round.
        let (first, second) = if pair % 2 == 0 { (one, other) } else { (other, one) };
        for (place, key) in [first, second].into_iter().enumerate() {
            let sql = format!("UPDATE marks SET pair = {}, place = {place} WHERE user_id = {key}", pair + 1);
            client.batch_execute(&sql).await?;
        }
        pairs.push((first.parse()?, second.parse()?));
    }
    client.batch_execute("DELETE FROM marks WHERE pair = 0").await?;
    ensure!(pairs.len() == PAIRS.len());
    Ok(pairs)
}

/// Clients that write until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    workers: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    /// Transfers over both shards, and chains: a mark on one shard, and when that is acknowledged, one on the other.
    async fn start(tier: &Tier) -> Result<Load> {
        let pairs = mark(tier).await?;
        let mut load = Load::empty();
        for pair in pairs {
            let client = tier.connect().await?;
            load.spawn(
                move |n| {
                    let [first, second] =
                        [pair.0, pair.1].map(|key| format!("UPDATE marks SET n = {n} WHERE user_id = {key}"));
                    vec![first, second]
                },
                client,
            );
        }
        for worker in 0..3 {
            load.transfer(tier.connect().await?, worker);
        }
        Ok(load)
    }

    fn empty() -> Load {
        Load { stop: Arc::default(), written: Arc::default(), workers: Vec::new() }
    }

    fn transfer(&mut self, client: Client, worker: u64) {
        let mut dice = Dice::new(worker + 7);
        self.spawn(
            move |_| {
                let (from, to) = (1 + dice.roll(ACCOUNTS as usize), 1 + dice.roll(ACCOUNTS as usize));
                let update =
                    |key: usize, by: i64| format!("UPDATE users SET cents = cents + {by} WHERE user_id = {key}");
                // In key order, so that workers do not wait for each other in a circle.
                let (low, high) =
                    if from < to { (update(from, -1), update(to, 1)) } else { (update(to, 1), update(from, -1)) };
                vec!["BEGIN".to_owned(), low, high, "COMMIT".to_owned()]
            },
            client,
        );
    }

    fn spawn(&mut self, mut statements: impl FnMut(i64) -> Vec<String> + Send + 'static, client: Client) {
        let (stop, written) = (Arc::clone(&self.stop), Arc::clone(&self.written));
        self.workers.push(tokio::spawn(async move {
            for n in 1.. {
                for sql in statements(n) {
                    client.batch_execute(&sql).await.with_context(|| sql.clone())?;
                }
                written.fetch_add(1, Relaxed);
                if stop.load(Relaxed) {
                    break;
                }
            }
            Ok(())
        }));
    }

    /// How often something was written.
    async fn end(self) -> Result<u64> {
        self.stop.store(true, Relaxed);
        for worker in self.workers {
            worker.await??;
        }
        Ok(self.written.load(Relaxed))
    }
}

/// One transaction: the sum, and the marks, each read twice.
async fn look(client: &Client) -> Result<()> {
    client.batch_execute(SHARED).await?;
    let sum = column(client, "SELECT sum(cents) FROM users").await?;
    let mut marks_seen = Vec::new();
    for _ in 0..2 {
        let rows = column(client, "SELECT n FROM marks ORDER BY pair, place").await?;
        marks_seen.push(rows.iter().map(|n| n.parse()).collect::<Result<Vec<i64>, _>>()?);
    }
    let again = column(client, "SELECT sum(cents) FROM users").await?;
    client.batch_execute("COMMIT").await?;
    ensure!(sum == [(ACCOUNTS * START).to_string()] && sum == again, "the sum is {sum:?}, then {again:?}");
    ensure!(marks_seen[0] == marks_seen[1], "{marks_seen:?}");
    for pair in marks_seen[0].chunks(2) {
        let [first, second] = pair else { anyhow::bail!("half a pair: {marks_seen:?}") };
        // The second is written when the first is acknowledged.
        ensure!(first == second || *first == second + 1, "inverted: {marks_seen:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_snapshot_conserves_money_and_keeps_the_order_of_writes() -> Result<()> {
    let tier = tier().await?;
    let load = Load::start(&tier).await?;
    let mut readers = Vec::new();
    for _ in 0..3 {
        let client = tier.connect().await?;
        readers.push(tokio::spawn(async move {
            for number in 0..150 {
                look(&client).await.with_context(|| format!("snapshot {number}"))?;
            }
            anyhow::Ok(())
        }));
    }
    for reader in readers {
        reader.await??;
    }
    let written = load.end().await?;
    ensure!(written > 200, "only {written} writes beside 450 snapshots");
    Ok(())
}

/// What pg_dump reads is one moment, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_under_load_is_of_one_moment() -> Result<()> {
    let tier = tier().await?;
    let load = Load::start(&tier).await?;
    for _ in 0..3 {
        let script = dump(&["--data-only"], &tier.dsn("shop"))?;
        let rows = |table: &str| -> Result<Vec<Vec<i64>>> {
            let lines = script.lines().skip_while(|line| !line.starts_with(&format!("COPY public.{table} "))).skip(1);
            let lines = lines.take_while(|line| *line != "\\.");
            lines.map(|line| Ok(line.split('\t').map(str::parse).collect::<Result<Vec<i64>, _>>()?)).collect()
        };
        let cents: i64 = rows("users")?.iter().map(|row| row[1]).sum();
        assert_eq!(cents, ACCOUNTS * START);
        let mut marks = rows("marks")?;
        marks.sort_by_key(|row| (row[1], row[2]));
        for pair in marks.chunks(2) {
            let behind = pair[0][3] - pair[1][3];
            assert!((0..=1).contains(&behind), "{marks:?}");
        }
    }
    load.end().await?;
    Ok(())
}

/// A write that takes long is in the snapshot or not, and nobody waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_write_keeps_nobody_from_a_snapshot() -> Result<()> {
    let tier = tier().await?;
    let (writer, reader) = (tier.connect().await?, tier.connect().await?);
    let cancel = writer.cancel_token();
    let long = "UPDATE users SET cents = cents + 1 WHERE user_id = 1 AND pg_sleep(60)::text IS NOT NULL";
    let writing = tokio::spawn(async move { writer.batch_execute(long).await });
    until(&tier, "SELECT sum((query LIKE '%pg_sleep(60)%' AND wait_event = 'PgSleep')::int) FROM pg_stat_activity")
        .await?;
    reader.batch_execute(SHARED).await?;
    assert_eq!(column(&reader, "SELECT sum(cents) FROM users").await?, [(ACCOUNTS * START).to_string()]);
    reader.batch_execute("COMMIT; UPDATE users SET cents = cents WHERE user_id = 2").await?;
    assert!(!writing.is_finished());
    cancel.cancel_query(tokio_postgres::NoTls).await?;
    assert!(writing.await?.is_err());
    Ok(())
}

/// Waits until the query gives something else than 0 on some shard.
async fn until(tier: &Tier, sql: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        for shard in &tier.shards {
            if !matches!(&*column(&shard.primary.admin("shop").await?, sql).await?.concat(), "0" | "NULL") {
                return Ok(());
            }
        }
        ensure!(begun.elapsed() < Duration::from_secs(30), "{sql} stays 0");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A commit over both shards that takes a second to decide: snapshots wait for it, writers do not wait for snapshots that long.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_commit_is_waited_for_and_writers_go_on() -> Result<()> {
    let tier = tier().await?;
    let keys = mark(&tier).await?[0];
    let client = tier.connect().await?;
    for sql in [
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1.2); RETURN NULL; END'",
        "CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON marks DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (new.n = -1) EXECUTE FUNCTION slow()",
    ] {
        client.batch_execute(sql).await?;
    }
    // The first shard that is written decides.
    client.batch_execute("BEGIN").await?;
    client.batch_execute(&format!("UPDATE marks SET n = -1 WHERE user_id = {}", keys.0)).await?;
    client.batch_execute(&format!("UPDATE marks SET n = -2 WHERE user_id = {}", keys.1)).await?;
    let committing = tokio::spawn(async move { client.batch_execute("COMMIT").await });
    until(&tier, "SELECT count(*) FROM pg_prepared_xacts").await?;
    let (reader, writer) = (tier.connect().await?, tier.connect().await?);
    let reading = tokio::spawn(async move {
        reader.batch_execute(SHARED).await?;
        column(&reader, "SELECT n FROM marks WHERE pair = 1 ORDER BY place").await
    });
    while !reading.is_finished() {
        let write = writer.batch_execute("UPDATE users SET cents = cents WHERE user_id = 1");
        tokio::time::timeout(Duration::from_secs(5), write).await.context("a writer starves")??;
    }
    let seen = reading.await??;
    // Before it was decided, or when all shards knew.
    assert!(seen == ["0", "0"] || seen == ["-1", "-2"], "{seen:?}");
    committing.await??;
    Ok(())
}

/// A transaction that a lost proxy has decided and not finished is seen whole, as soon as recovery has finished it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_doubt_is_never_seen_by_half() -> Result<()> {
    let tier = tier().await?;
    let (anchor, other) = (tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?);
    // The name ends with the digest of 1.
    let gid = "weir_shard0_1_4bf5122f344554c53bde2ebb8cd2b7e3";
    let change = |by: i64| {
        format!(
            "UPDATE users SET cents = cents + {by} WHERE user_id = (SELECT min(user_id) FROM users); SELECT pg_current_xact_id()"
        )
    };
    let number = |rows: Vec<String>| rows.last().cloned().unwrap_or_default();
    other.batch_execute("BEGIN").await?;
    let there = number(column(&other, &change(-7)).await?);
    other.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
    anchor.batch_execute("BEGIN").await?;
    let here = number(column(&anchor, &change(7)).await?);
    let row = format!(
        "INSERT INTO weir.txlog (gid, secret, parts) VALUES ('{gid}', '\\x01', 'shard0:{here},shard1:{there}')"
    );
    anchor.batch_execute(&row).await?;
    anchor.batch_execute("COMMIT").await?;
    assert_eq!(column(&other, "SELECT count(*) FROM pg_prepared_xacts").await?, ["1"]);
    let client = tier.connect().await?;
    client.batch_execute(SHARED).await?;
    assert_eq!(column(&client, "SELECT sum(cents) FROM users").await?, [(ACCOUNTS * START).to_string()]);
    assert_eq!(column(&other, "SELECT count(*) FROM pg_prepared_xacts").await?, ["0"]);
    Ok(())
}

/// Commits through another proxy do not see this one's gate, and are seen whole nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn commits_through_another_proxy_are_seen_whole() -> Result<()> {
    let tier = started(Tier::builder().peers(true)).await?;
    let second = tier.another().await?;
    let mut load = Load::empty();
    for worker in 0..3 {
        load.transfer(second.connect().await?, worker);
    }
    let client = tier.connect().await?;
    for _ in 0..100 {
        client.batch_execute(SHARED).await?;
        assert_eq!(column(&client, "SELECT sum(cents) FROM users").await?, [(ACCOUNTS * START).to_string()]);
        client.batch_execute("COMMIT").await?;
    }
    let written = load.end().await?;
    ensure!(written > 100, "only {written} transfers");
    Ok(())
}

/// Whoever dies at the gate, on either side of it, leaves it.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_vanish_at_the_gate_keep_nobody_waiting() -> Result<()> {
    let tier = tier().await?;
    let load = Load::start(&tier).await?;
    let mut dice = Dice::new(11);
    for round in 0..60 {
        let client = tier.connect().await?;
        let last = if round % 2 == 0 {
            client.batch_execute("BEGIN; UPDATE users SET cents = cents + 1 WHERE user_id = 1").await?;
            client.batch_execute("UPDATE users SET cents = cents - 1 WHERE user_id = 2").await?;
            "COMMIT"
        } else {
            client.batch_execute(SHARED).await?;
            "SELECT sum(cents) FROM users"
        };
        // Dropped amid it, or a moment later.
        let _ = tokio::time::timeout(Duration::from_micros(dice.roll(4000) as u64), client.batch_execute(last)).await;
    }
    let client = tier.connect().await?;
    for number in 0..20 {
        look(&client).await.with_context(|| format!("snapshot {number}"))?;
    }
    load.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_common_snapshot_allows_and_what_not() -> Result<()> {
    let tier = tier().await?;
    mark(&tier).await?;
    let (client, writer) = (tier.connect().await?, tier.connect().await?);
    let sum = "SELECT sum(cents) FROM users";
    let all = [(ACCOUNTS * START).to_string()];
    for begin in [
        &["BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"][..],
        &["START TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE"],
        &["BEGIN", "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"],
        &["BEGIN READ ONLY", "SET LOCAL statement_timeout = '30s'", "SET transaction_isolation = 'repeatable read'"],
        &["SET default_transaction_isolation = 'repeatable read'", "BEGIN READ ONLY", "SHOW transaction_isolation"],
        &["BEGIN READ ONLY", "LOCK TABLE users IN ACCESS SHARE MODE"],
        &["BEGIN READ ONLY; SAVEPOINT one"],
        &["ROLLBACK", "BEGIN READ ONLY", "COMMIT AND CHAIN"],
    ] {
        for sql in begin {
            client.batch_execute(sql).await.with_context(|| format!("{begin:?}"))?;
        }
        // Its first statement takes all snapshots, also of shards that it does not touch yet.
        column(&client, "SELECT cents FROM users WHERE user_id = 1").await?;
        writer.batch_execute("UPDATE users SET cents = cents + 1").await?;
        assert_eq!(column(&client, sum).await?, all, "{begin:?}");
        for key in 1..=4 {
            let sql = format!("SELECT cents FROM users WHERE user_id = {key}");
            assert_eq!(column(&client, &sql).await?, [START.to_string()], "{begin:?}");
        }
        assert_eq!(client.query("SELECT cents FROM users ORDER BY user_id", &[]).await?.len(), ACCOUNTS as usize);
        let denied = client.simple_query("DELETE FROM users").await.expect_err("read only");
        assert_eq!(denied.code().map(tokio_postgres::error::SqlState::code), Some("25006"), "{begin:?}");
        client.batch_execute("ROLLBACK").await?;
        writer.batch_execute("UPDATE users SET cents = cents - 1").await?;
    }
    client.batch_execute("RESET default_transaction_isolation").await?;
    // Cursors over all shards and of one, and the protocol's own statements.
    client.batch_execute(SHARED).await?;
    client.batch_execute("DECLARE every CURSOR FOR SELECT user_id FROM users ORDER BY user_id").await?;
    client.batch_execute("DECLARE one CURSOR FOR SELECT cents FROM users WHERE user_id = 3").await?;
    writer.batch_execute("DELETE FROM users WHERE user_id > 3").await?;
    assert_eq!(column(&client, "FETCH 2 FROM every").await?, ["1", "2"]);
    assert_eq!(column(&client, "FETCH 2 FROM one").await?, [START.to_string()]);
    assert_eq!(column(&client, "FETCH 3 FROM every").await?, ["3", "4", "5"]);
    let seen = client.query("SELECT count(*) FROM users WHERE user_id <> $1", &[&1_i64]).await?;
    assert_eq!(seen[0].get::<_, i64>(0), ACCOUNTS - 1);
    for (sql, wanted) in [
        ("SELECT count(*) FROM users a JOIN marks b ON a.cents = b.n", "the engine would see another one"),
        ("SELECT pg_export_snapshot()", "Each shard has a snapshot of its own"),
        ("SET TRANSACTION SNAPSHOT '00000003-0000001B-1'", "Each shard has a snapshot of its own"),
    ] {
        client.batch_execute("ROLLBACK").await?;
        client.batch_execute(SHARED).await?;
        let refused = client.simple_query(sql).await.expect_err(sql);
        let refused = refused.as_db_error().context(sql)?;
        assert_eq!(refused.code().code(), "0A000", "{refused:?}");
        assert!(refused.detail().is_some_and(|detail| detail.contains(wanted)), "{refused:?}");
    }
    client.batch_execute("ROLLBACK").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, ["3"]);
    Ok(())
}
