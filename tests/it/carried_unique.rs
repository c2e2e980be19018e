//! Writes that weir carries, on tables with columns that are unique over all shards, and while weir is killed amid them: no value
//! twice, the lookup tables in step, no row lost and none doubled.
//!
//! Non-goals: carried writes themselves (`carried.rs`), and unique columns themselves (`unique.rs`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use weir_harness::{Tier, connect};

use crate::differential::Dice;
use crate::placement::column;
use crate::rows::{Pair, same_prepared};
use crate::unique::{in_step, state};

const TABLES: &[&str] = &["users(user_id bigint) unique email", "leads(lead_id bigint)", "batches(id bigint)"];

const SCHEMA: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, email text UNIQUE, name text);
CREATE TABLE leads (lead_id bigint PRIMARY KEY, mail text, name text);
CREATE TABLE batches (id bigint PRIMARY KEY, batch bigint NOT NULL)";

const KEYS: &[(&str, &str)] = &[("users", "hashint8extended(user_id, 0)"), ("leads", "hashint8extended(lead_id, 0)")];

async fn as_it_should_be(pair: &Pair, after: &str) -> Result<()> {
    pair.same_rows_of(KEYS).await.with_context(|| after.to_owned())?;
    in_step(&pair.tier).await.with_context(|| after.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_weir_carries_is_unique_over_all_shards() -> Result<()> {
    let pair = Pair::start(3, TABLES, SCHEMA).await?;
    state(&pair.tier, "valid").await?;
    let mut inside = false;
    for sql in [
        "INSERT INTO leads SELECT n, 'm' || n, 'lead' FROM generate_series(1, 30) n",
        "INSERT INTO leads VALUES (101, 'twin', 'a'), (102, 'twin', 'b'), (103, 'twin', 'c'), (104, NULL, 'd'), (105, NULL, 'e')",
        // Rows of other keys, in values that nobody has yet.
        "INSERT INTO users (user_id, email, name) SELECT lead_id + 500, mail, name FROM leads WHERE lead_id <= 20",
        "INSERT INTO users (user_id, email) SELECT lead_id + 600, mail FROM leads WHERE lead_id > 103",
        "INSERT INTO users (user_id, email) SELECT max(user_id) + 1, 'max' FROM users RETURNING user_id, email",
        "INSERT INTO users (user_id, email) SELECT lead_id + 800, mail FROM leads WHERE lead_id = 101 ON CONFLICT (user_id) DO NOTHING",
        // Rows that move keep their values, change them, or give them up.
        "UPDATE users SET user_id = 1501 WHERE user_id = 501 RETURNING user_id, email",
        "UPDATE users SET user_id = 1502, email = 'own' WHERE user_id = 502 RETURNING *",
        "UPDATE users SET user_id = 1503, email = NULL WHERE user_id = 503",
        "UPDATE users SET user_id = user_id + 2000, name = 'moved' WHERE user_id BETWEEN 504 AND 512",
        "INSERT INTO users VALUES (1, 'm2'), (2, 'm3')",
        "BEGIN",
        "UPDATE users SET user_id = 3000 WHERE user_id = 1502",
        "INSERT INTO users SELECT lead_id + 3000, mail || '!' FROM leads WHERE lead_id BETWEEN 21 AND 25",
        "ROLLBACK",
        "BEGIN",
        "UPDATE users SET user_id = 3000 WHERE user_id = 1502",
        "INSERT INTO users SELECT lead_id + 3000, mail || '!' FROM leads WHERE lead_id BETWEEN 21 AND 25",
        "COMMIT",
        // On the rows of one key each.
        "MERGE INTO users u USING leads l ON u.user_id = l.lead_id AND l.lead_id < 10 WHEN MATCHED THEN UPDATE SET email = 'merged' || l.lead_id \
         WHEN NOT MATCHED AND l.lead_id BETWEEN 26 AND 28 THEN INSERT (user_id, email) VALUES (l.lead_id, l.mail)",
    ] {
        pair.fine(sql).await.with_context(|| sql.to_owned())?;
        inside = sql == "BEGIN" || inside && sql != "COMMIT" && sql != "ROLLBACK";
        if !inside {
            in_step(&pair.tier).await.with_context(|| sql.to_owned())?;
        }
    }
    as_it_should_be(&pair, "what succeeds").await?;
    for sql in [
        // Twice in one statement, on whichever shards.
        "INSERT INTO users (user_id, email) SELECT lead_id + 9000, mail FROM leads WHERE lead_id IN (102, 103)",
        "INSERT INTO users (user_id, email) SELECT lead_id + 9000, 'same' FROM leads WHERE lead_id <= 20",
        "UPDATE users SET user_id = user_id + 5000, email = 'same' WHERE user_id BETWEEN 513 AND 520",
        // Somebody has it.
        "INSERT INTO users (user_id, email) SELECT lead_id + 9000, mail FROM leads WHERE lead_id IN (15, 25)",
        "INSERT INTO users (user_id, email) SELECT 9999, 'max' FROM leads WHERE lead_id = 1",
        "UPDATE users SET user_id = 4001, email = 'max' WHERE user_id = 1501",
        "UPDATE users SET user_id = 4001, email = 'm15' WHERE user_id = 2504",
        "MERGE INTO users u USING leads l ON u.user_id = l.lead_id AND l.lead_id < 10 WHEN MATCHED THEN UPDATE SET email = 'max'",
        "MERGE INTO users u USING leads l ON u.user_id = l.lead_id WHEN NOT MATCHED AND l.lead_id = 15 THEN INSERT (user_id, email) VALUES (l.lead_id, l.mail)",
    ] {
        pair.fails(sql, "23505").await.with_context(|| sql.to_owned())?;
        in_step(&pair.tier).await.with_context(|| sql.to_owned())?;
    }
    let moved = "UPDATE users SET user_id = $1, email = $2 WHERE user_id = $3 RETURNING user_id";
    same_prepared(
        &pair,
        moved,
        &[&[&6001_i64, &"bound", &1501_i64], &[&6002_i64, &"max", &6001_i64], &[&6003_i64, &"m1", &6001_i64]],
    )
    .await?;
    let copied = "INSERT INTO users (user_id, email) SELECT lead_id + $1, mail || $2 FROM leads WHERE lead_id = 7 RETURNING user_id";
    same_prepared(&pair, copied, &[&[&7000_i64, &"?"], &[&7001_i64, &"?"], &[&7002_i64, &"??"]]).await?;
    as_it_should_be(&pair, "statements with parameters").await?;
    // A failure inside a transaction takes back what the transaction had noted.
    for sql in ["BEGIN", "UPDATE users SET user_id = 8001, email = 'fresh' WHERE user_id = 6003"] {
        pair.fine(sql).await?;
    }
    pair.fails("INSERT INTO users SELECT 8002, 'fresh' FROM leads WHERE lead_id = 1", "23505").await?;
    pair.fine("ROLLBACK").await?;
    pair.fine("INSERT INTO users SELECT 8003, 'fresh' FROM leads WHERE lead_id = 1").await?;
    as_it_should_be(&pair, "a failed transaction").await
}

const ROWS: usize = 60;
const SEEDS: usize = 50;
const WORKERS: u64 = 5;
const KILLS: u64 = 6;
const WAIT: Duration = Duration::from_secs(60);

/// What the workers tell.
#[derive(Default)]
struct Desk {
    acknowledged: AtomicU64,
    /// Batches that weir said were committed.
    batches: Mutex<Vec<i64>>,
    closed: AtomicBool,
}

/// weir is killed (-9) while workers give rows other keys and copy many at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_weir_loses_no_row_that_it_carries_and_doubles_none() -> Result<()> {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    eprintln!("carried: seed {seed}");
    let tier = Tier::builder().shards(3).tables(TABLES).start().await?;
    let client = tier.connect().await?;
    for statement in SCHEMA.split(';') {
        client.batch_execute(statement).await?;
    }
    state(&tier, "valid").await?;
    let fill = format!("INSERT INTO users SELECT n, 'v' || n FROM generate_series(1, {ROWS}) n");
    client.batch_execute(&fill).await?;
    client.batch_execute(&format!("INSERT INTO leads SELECT n FROM generate_series(1, {SEEDS}) n")).await?;
    let mut dice = Dice::new(seed);
    for kill in 0..KILLS {
        let desk = Arc::new(Desk::default());
        let carrier = |worker| carry(tier.dsn("shop"), Arc::clone(&desk), kill * WORKERS + worker);
        let workers: Vec<_> = (0..WORKERS).map(|worker| tokio::spawn(carrier(worker))).collect();
        let (begun, wanted) = (Instant::now(), 10 + dice.roll(30) as u64);
        while desk.acknowledged.load(SeqCst) < wanted {
            ensure!(begun.elapsed() < WAIT, "nothing is done\n{}", tier.weir_log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Any step of a carried write may be under way.
        tokio::time::sleep(Duration::from_micros(dice.roll(8000) as u64)).await;
        tier.kill_weir();
        desk.closed.store(true, SeqCst);
        for worker in workers {
            tokio::time::timeout(WAIT, worker).await.context("a worker hangs")??;
        }
        tier.restart_weir().await?;
        let begun = Instant::now();
        while let Err(error) = in_step(&tier).await {
            ensure!(begun.elapsed() < WAIT, "kill {kill}: {error:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        conserved(&tier, &desk).await.with_context(|| format!("kill {kill}, seed {seed}"))?;
    }
    Ok(())
}

/// Each row is there once, and each batch whole or not at all.
async fn conserved(tier: &Tier, desk: &Desk) -> Result<()> {
    let (mut emails, mut batches) = (Vec::new(), HashMap::<i64, usize>::new());
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        emails.extend(column(&direct, "SELECT email FROM users").await?);
        for batch in column(&direct, "SELECT batch FROM batches").await? {
            *batches.entry(batch.parse()?).or_default() += 1;
        }
    }
    let distinct: HashSet<&String> = emails.iter().collect();
    ensure!(emails.len() == ROWS && distinct.len() == ROWS, "{} rows, {} values", emails.len(), distinct.len());
    let torn: Vec<_> = batches.iter().filter(|(_, rows)| **rows != SEEDS).collect();
    ensure!(torn.is_empty(), "in parts only: {torn:?}");
    let lost: Vec<i64> = desk.batches.lock().iter().copied().filter(|batch| !batches.contains_key(batch)).collect();
    ensure!(lost.is_empty(), "acknowledged, but gone: {lost:?}");
    Ok(())
}

/// Carried writes until weir is gone. `lane`: a number of its own.
async fn carry(dsn: String, desk: Arc<Desk>, lane: u64) {
    let Ok(client) = connect(&dsn).await else { return };
    for turn in 0.. {
        let unique = i64::try_from(1_000_000 * (lane + 1) + 1000 * turn).unwrap_or(i64::MAX);
        let batch = turn % 2 == 1;
        let sql = if batch {
            format!("INSERT INTO batches SELECT lead_id + {unique}, {unique} FROM leads")
        } else {
            format!("UPDATE users SET user_id = {unique} WHERE email = 'v{}'", 1 + (7 * turn + 3 * lane) % ROWS as u64)
        };
        let told = client.batch_execute(&sql).await;
        match told {
            Ok(()) => {
                desk.acknowledged.fetch_add(1, SeqCst);
                if batch {
                    desk.batches.lock().push(unique);
                }
            }
            Err(error) if error.as_db_error().is_none() || client.is_closed() => return,
            Err(_) if desk.closed.load(SeqCst) => return,
            Err(_) => {}
        }
    }
}
