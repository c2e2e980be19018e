//! Read-only transactions that see all shards as they were at one moment, under load: money is conserved in every one of them, and
//! none sees a write without those that were acknowledged before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use weir_harness::Tier;

use crate::differential::Dice;
use crate::placement::column;

const SHARED: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
const ACCOUNTS: i64 = 20;
const START: i64 = 100;
/// Their rows are on different shards, if the first and the second of a pair are.
const PAIRS: [(i64, i64); 3] = [(1001, 1002), (1003, 1004), (1005, 1006)];

/// Accounts, and marks that clients move one after the other.
async fn tier() -> Result<Tier> {
    let tier = Tier::builder().shards(2).tables(&["users(user_id bigint)", "marks(user_id bigint)"]).start().await?;
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
        let mut load = Load { stop: Arc::default(), written: Arc::default(), workers: Vec::new() };
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
        for worker in 0..3_u64 {
            let client = tier.connect().await?;
            let mut dice = Dice::new(worker + 7);
            load.spawn(
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
        Ok(load)
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
    let marks = "SELECT pair || ' ' || string_agg(n::text, ' ' ORDER BY place) FROM marks GROUP BY pair, place";
    let mut marks_seen = Vec::new();
    for _ in 0..2 {
        let rows = client.simple_query("SELECT pair, place, n FROM marks ORDER BY pair, place").await?;
        let rows: Vec<i64> = rows
            .iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(2)?.parse().ok(),
                _ => None,
            })
            .collect();
        marks_seen.push(rows);
    }
    let _ = marks;
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
