//! Columns that are unique over all shards (`global_unique`): no value twice, whichever way it is written, and the lookup tables
//! always in step with the rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::Client;
use weir_harness::{Tier, connect};

use crate::freshness::until;
use crate::placement::column;
use crate::rows::{Pair, same_prepared, text};

pub const TABLES: &[&str] = &["users(user_id bigint) unique email", "notes(user_id bigint)"];

const SCHEMA: &str = "
CREATE TABLE users (user_id bigint PRIMARY KEY, email text UNIQUE, name text);
CREATE TABLE notes (user_id bigint, note text)";

/// What the rows say, what the lookup tables say: the same, each value on the shard of its slot, nothing noted or prepared.
pub async fn in_step(tier: &Tier) -> Result<()> {
    let mut directs = Vec::new();
    for shard in &tier.shards {
        directs.push(shard.primary.admin("shop").await?);
    }
    are_in_step(&directs).await
}

/// The same of these servers.
pub async fn are_in_step(directs: &[Client]) -> Result<()> {
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    let mut slots = Vec::<Vec<String>>::new();
    for direct in directs {
        rows.extend(column(direct, "SELECT email || ' ' || user_id FROM users WHERE email IS NOT NULL").await?);
        values.extend(column(direct, "SELECT value || ' ' || key FROM weir.unique_value").await?);
        let slot = "SELECT DISTINCT (hashtextextended(value, 0) >> 52) & 4095 FROM weir.unique_value";
        slots.push(column(direct, slot).await?);
        let left = "SELECT (SELECT count(*) FROM weir.unique_pending) + (SELECT count(*) FROM pg_prepared_xacts)";
        ensure!(column(direct, left).await? == ["0"], "something is left");
    }
    rows.sort();
    values.sort();
    ensure!(rows == values, "the rows say {rows:?}, the lookup tables {values:?}");
    for (at, mine) in slots.iter().enumerate() {
        ensure!(slots[at + 1..].iter().flatten().all(|slot| !mine.contains(slot)), "a slot is on two shards");
    }
    let mut emails: Vec<&str> = rows.iter().filter_map(|row| row.split(' ').next()).collect();
    let count = emails.len();
    emails.dedup();
    ensure!(emails.len() == count, "a value is there twice: {rows:?}");
    Ok(())
}

/// What SHOW UNIQUE says of users.email, once it is in this state.
pub async fn state(tier: &Tier, wanted: &str) -> Result<String> {
    let console = connect(&tier.admin_dsn()).await?;
    let start = Instant::now();
    loop {
        let told = text(&console, "SHOW UNIQUE").await.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let row =
            told.iter().find(|line| line.starts_with("row shop|public.users|email|")).cloned().unwrap_or_default();
        if row.contains(&format!("|{wanted}|")) {
            return Ok(row);
        }
        ensure!(start.elapsed() < Duration::from_secs(90), "SHOW UNIQUE still says {told:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_shards_hold_no_value_twice() -> Result<()> {
    as_one_postgres(2).await
}

#[tokio::test(flavor = "multi_thread")]
async fn three_shards_hold_no_value_twice() -> Result<()> {
    as_one_postgres(3).await
}

/// Every way to write, on one Postgres with a UNIQUE column and on weir: the same answers and errors.
async fn as_one_postgres(shards: u32) -> Result<()> {
    let pair = Pair::start(shards, TABLES, SCHEMA).await?;
    state(&pair.tier, "valid").await?;
    plain_writes(&pair).await?;
    in_step(&pair.tier).await?;
    parameters(&pair).await?;
    in_step(&pair.tier).await?;
    transactions(&pair).await?;
    in_step(&pair.tier).await?;
    copies(&pair).await?;
    in_step(&pair.tier).await?;
    let all = "SELECT user_id, email, name FROM users ORDER BY user_id";
    pair.fine(all).await?;
    pair.fine("TRUNCATE users").await?;
    in_step(&pair.tier).await?;
    pair.fine("INSERT INTO users VALUES (1, 'e5'), (2, 'e6')").await?;
    pair.fine(all).await?;
    in_step(&pair.tier).await
}

async fn plain_writes(pair: &Pair) -> Result<()> {
    for id in 1..=12 {
        pair.fine(&format!("INSERT INTO users VALUES ({id}, 'e{id}', 'n')")).await?;
    }
    for id in 20..=26 {
        pair.fails(&format!("INSERT INTO users VALUES ({id}, 'e5')"), "23505").await?;
        pair.fails(&format!("INSERT INTO users VALUES ({id}, 'e6') RETURNING user_id"), "23505").await?;
    }
    // Nulls are no values.
    pair.fine("INSERT INTO users VALUES (30, NULL), (31, NULL), (32, NULL), (33, NULL)").await?;
    pair.fine("INSERT INTO users (user_id) VALUES (34)").await?;
    pair.fine("INSERT INTO users VALUES (40, 'f40') RETURNING user_id, email").await?;
    pair.fine("INSERT INTO users VALUES (41, 'f41'), (42, 'f42'), (43, 'f43'), (44, 'f44'), (45, 'f45')").await?;
    pair.fails("UPDATE users SET email = 'e1' WHERE user_id = 2", "23505").await?;
    pair.fails("UPDATE users SET email = 'e3' WHERE user_id = 4", "23505").await?;
    pair.fails("UPDATE users SET email = 'e1' WHERE user_id = 7", "23505").await?;
    pair.fine("UPDATE users SET email = 'g2' WHERE user_id = 2").await?;
    pair.fine("INSERT INTO users VALUES (50, 'e2')").await?;
    pair.fine("UPDATE users SET name = 'other' WHERE user_id = 3").await?;
    pair.fine("UPDATE users SET email = email WHERE user_id = 3").await?;
    pair.fine("UPDATE users SET email = NULL WHERE user_id = 50").await?;
    pair.fine("UPDATE users SET email = 'h' || user_id WHERE user_id > 40").await?;
    pair.fine("UPDATE users SET name = 'all'").await?;
    pair.fine("DELETE FROM users WHERE user_id = 1").await?;
    pair.fine("INSERT INTO users VALUES (61, 'e1')").await?;
    pair.fine("DELETE FROM users WHERE user_id IN (9, 10, 11, 12)").await?;
    pair.fine("INSERT INTO users VALUES (62, 'e9'), (63, 'e10'), (64, 'e11'), (65, 'e12')").await?;
    // Several statements in one text commit or fail as one.
    pair.fails("INSERT INTO users VALUES (70, 'i70'); INSERT INTO users VALUES (71, 'i71'); INSERT INTO users VALUES (72, 'i70')", "23505").await?;
    pair.fine("INSERT INTO users VALUES (70, 'i70'); INSERT INTO users VALUES (71, 'i71')").await?;
    pair.fine("INSERT INTO notes VALUES (1, 'x')").await?;
    Ok(())
}

async fn parameters(pair: &Pair) -> Result<()> {
    let mut calls: Vec<(i64, Option<String>)> = (100..110).map(|id| (id, Some(format!("p{id}")))).collect();
    calls.extend((110..115).map(|id| (id, None)));
    for (id, email) in &calls {
        same_prepared(pair, "INSERT INTO users VALUES ($1, $2) RETURNING user_id", &[&[id, email]]).await?;
    }
    let mut refused = 0;
    for client in [&pair.single, &pair.sharded] {
        let insert = client.prepare("INSERT INTO users VALUES ($1, $2)").await?;
        for id in 120..130_i64 {
            let error = client.execute(&insert, &[&id, &"p105"]).await.expect_err("a duplicate");
            let error = error.as_db_error().context("an error of the server")?;
            assert_eq!(error.code().code(), "23505");
            assert_eq!(error.constraint(), Some("users_email_key"));
            assert_eq!((error.schema(), error.table()), (Some("public"), Some("users")));
            assert_eq!(error.detail(), Some("Key (email)=(p105) already exists."));
            refused += 1;
        }
        let update = client.prepare("UPDATE users SET email = $2 WHERE user_id = $1").await?;
        assert_eq!(client.execute(&update, &[&105_i64, &"q105"]).await?, 1);
        assert_eq!(client.execute(&insert, &[&131_i64, &"p105"]).await?, 1);
    }
    assert_eq!(refused, 20);
    Ok(())
}

async fn transactions(pair: &Pair) -> Result<()> {
    let begin = async || -> Result<()> {
        pair.fine("BEGIN").await?;
        Ok(())
    };
    // A value that was rolled back is free, also to a savepoint; one that was given up is free at once.
    begin().await?;
    pair.fine("INSERT INTO users VALUES (200, 't200')").await?;
    pair.fine("ROLLBACK").await?;
    begin().await?;
    pair.fine("INSERT INTO users VALUES (201, 't200')").await?;
    pair.fine("SAVEPOINT a").await?;
    pair.fine("INSERT INTO users VALUES (202, 't202')").await?;
    pair.fails("INSERT INTO users VALUES (203, 't200')", "23505").await?;
    pair.fine("ROLLBACK TO SAVEPOINT a").await?;
    pair.fine("INSERT INTO users VALUES (204, 't202')").await?;
    pair.fine("DELETE FROM users WHERE user_id = 201").await?;
    pair.fine("INSERT INTO users VALUES (205, 't200')").await?;
    pair.fine("UPDATE users SET email = 't205' WHERE user_id = 205").await?;
    pair.fine("INSERT INTO users VALUES (206, 't200')").await?;
    pair.fine("COMMIT").await?;
    in_step(&pair.tier).await?;
    begin().await?;
    pair.fails("INSERT INTO users VALUES (210, 't200')", "23505").await?;
    pair.fails("SELECT 1", "25P02").await?;
    pair.fine("ROLLBACK").await?;
    begin().await?;
    pair.fine("DELETE FROM users WHERE user_id > 199").await?;
    pair.fine("INSERT INTO users VALUES (211, 't200'), (212, 't205'), (213, 't202')").await?;
    pair.fine("ROLLBACK").await?;
    Ok(())
}

async fn copy(client: &Client, rows: &str) -> Result<u64, tokio_postgres::Error> {
    let sink = client.copy_in("COPY users (user_id, email) FROM STDIN").await?;
    futures_util::pin_mut!(sink);
    sink.send(Bytes::from(rows.to_owned())).await?;
    sink.finish().await
}

async fn copies(pair: &Pair) -> Result<()> {
    let rows = |ids: std::ops::Range<u32>| ids.map(|id| format!("{id}\tc{id}\n")).collect::<Vec<_>>().concat();
    let (fresh, twice) = (rows(300..400), rows(400..420) + "420\tc399\n");
    for client in [&pair.single, &pair.sharded] {
        assert_eq!(copy(client, &fresh).await?, 100);
        let error = copy(client, &twice).await.expect_err("a duplicate");
        assert_eq!(error.code().map(tokio_postgres::error::SqlState::code), Some("23505"));
        assert_eq!(copy(client, "400\t\\N\n401\t\\N\n402\tc402\n").await?, 3);
    }
    Ok(())
}

/// Connections that all want the same values at the same time, with rows on different shards: one has each, and nobody hangs.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_want_a_value_one_gets_it() -> Result<()> {
    // Far fewer server connections than clients: whoever holds one on one shard must not wait for ever for one on another.
    let tier = Tier::builder().shards(3).tables(TABLES).config_extra("[pool]\nsize = 3").start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    state(&tier, "valid").await?;
    let (workers, rounds) = (16_i64, 12_i64);
    let start = Instant::now();
    let tasks = (0..workers).map(|worker| tokio::spawn(compete(tier.dsn("shop"), worker, workers, rounds)));
    let mut won = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        won.extend(task.await??);
    }
    won.sort_unstable();
    assert_eq!(won, (0..rounds).collect::<Vec<_>>());
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    in_step(&tier).await
}

async fn compete(dsn: String, worker: i64, workers: i64, rounds: i64) -> Result<Vec<i64>> {
    let client = connect(&dsn).await?;
    let mut won = Vec::new();
    for round in 0..rounds {
        let (id, email) = (round * workers + worker, format!("round{round}"));
        let told = match worker % 3 {
            0 => client.execute("INSERT INTO users VALUES ($1, $2)", &[&id, &email]).await.map(|_| ()),
            1 => client.batch_execute(&format!("INSERT INTO users VALUES ({id}, '{email}')")).await,
            _ => {
                client.batch_execute(&format!("INSERT INTO users VALUES ({id})")).await?;
                client.execute("UPDATE users SET email = $2 WHERE user_id = $1", &[&id, &email]).await.map(|_| ())
            }
        };
        match told {
            Ok(()) => won.push(round),
            Err(error) => {
                let code = error.code().map(tokio_postgres::error::SqlState::code);
                ensure!(code == Some("23505"), "{error:?}");
            }
        }
    }
    Ok(won)
}

pub async fn create(client: &Client) -> Result<()> {
    for statement in SCHEMA.split(';') {
        client.batch_execute(statement).await?;
    }
    Ok(())
}

async fn code(client: &Client, sql: &str) -> Option<String> {
    client.batch_execute(sql).await.err().and_then(|error| error.code().map(|code| code.code().to_owned()))
}

/// Two transactions that wait for each other's values on different shards: neither server sees it, and one of them ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_circle_over_shards_ends() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).start().await?;
    let (one, other) = (tier.connect().await?, tier.connect().await?);
    create(&one).await?;
    state(&tier, "valid").await?;
    one.batch_execute("BEGIN; INSERT INTO users VALUES (1, 'a')").await?;
    other.batch_execute("BEGIN; INSERT INTO users VALUES (2, 'abc')").await?;
    let crossed = async |client: &Client, sql: &str| {
        let told = code(client, sql).await;
        client.batch_execute("ROLLBACK").await.map(|()| told)
    };
    let (first, second) = tokio::join!(
        crossed(&one, "INSERT INTO users VALUES (3, 'abc')"),
        crossed(&other, "INSERT INTO users VALUES (4, 'a')")
    );
    let codes = [first?, second?];
    assert!(codes.iter().flatten().any(|code| code == "40P01"), "{codes:?}");
    in_step(&tier).await
}

/// weir is killed (-9) again and again while values change hands; afterwards rows and lookup tables say the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_weir_leaves_rows_and_values_in_step() -> Result<()> {
    let tier = Tier::builder().shards(3).tables(TABLES).start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    state(&tier, "valid").await?;
    for kill in 0..6_u64 {
        let turns = Arc::new(AtomicU64::new(0));
        let churn = |worker| tokio::spawn(churn(tier.dsn("shop"), worker, Arc::clone(&turns)));
        let workers: Vec<_> = (0..6).map(churn).collect();
        let start = Instant::now();
        while turns.load(SeqCst) < 40 + 11 * kill {
            ensure!(start.elapsed() < Duration::from_secs(60), "nothing is done");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tier.kill_weir();
        for worker in workers {
            worker.await?;
        }
        tier.restart_weir().await?;
        // Recovery ends what was in doubt.
        let start = Instant::now();
        while let Err(error) = in_step(&tier).await {
            ensure!(start.elapsed() < Duration::from_secs(30), "kill {kill}: {error:#}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

/// Inserts, changes and deletes until the connection is gone.
async fn churn(dsn: String, worker: i64, turns: Arc<AtomicU64>) {
    let Ok(client) = connect(&dsn).await else { return };
    for turn in 0.. {
        let id = worker * 100 + turn % 40;
        let email = format!("v{}", (turn * 7 + worker * 3) % 60);
        let sql = match turn % 3 {
            0 => format!("INSERT INTO users VALUES ({id}, '{email}') ON CONFLICT (user_id) DO NOTHING"),
            1 => format!("UPDATE users SET email = '{email}' WHERE user_id = {}", id - 1),
            _ => format!("DELETE FROM users WHERE user_id = {}", id - 2),
        };
        let told = client.batch_execute(&sql).await;
        if client.is_closed() || told.is_err_and(|error| error.as_db_error().is_none()) {
            return;
        }
        turns.fetch_add(1, SeqCst);
    }
}

/// Also while the first one decodes the WAL of both shards, under a lock of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_weir_comes_up_beside_the_first_and_asks_for_the_same_values() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).tables(TABLES).start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    state(&tier, "valid").await?;
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let decodes = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'weir decoding'";
        until(async || Ok(column(&direct, decodes).await? == ["1"])).await?;
    }
    let other = tier.another().await?;
    let there = connect(&other.dsn("shop")).await?;
    for user in 1..=20 {
        client.batch_execute(&format!("INSERT INTO users VALUES ({user}, 'e{user}')")).await?;
        let again = format!("INSERT INTO users VALUES ({}, 'e{user}')", user + 100);
        assert_eq!(code(&there, &again).await.as_deref(), Some("23505"));
    }
    in_step(&tier).await
}

/// What weir does not see is refused by the shard itself, and what it keeps is nobody else's.
#[tokio::test(flavor = "multi_thread")]
async fn what_goes_round_weir_is_refused() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    state(&tier, "valid").await?;
    client.batch_execute("INSERT INTO users VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')").await?;
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        assert_eq!(code(&direct, "INSERT INTO users VALUES (100, 'z')").await.as_deref(), Some("0A000"));
        let prepared = "BEGIN; INSERT INTO users VALUES (100, 'z'); PREPARE TRANSACTION 'x'";
        assert_eq!(code(&direct, prepared).await.as_deref(), Some("0A000"));
        direct.batch_execute("ROLLBACK").await?;
        assert_eq!(code(&direct, "UPDATE users SET name = 'by hand'").await, None);
    }
    for sql in [
        "SELECT * FROM weir.unique_value",
        "SELECT * FROM weir.unique_secret",
        "DELETE FROM weir.unique_pending",
        "SELECT weir.unique_put(1, 'a', 'b', 1)",
        "SELECT weir.unique_settle('guess', '')",
        "SELECT weir.unique_apply('guess', '{}', '{}', '{}', '{}')",
    ] {
        assert_eq!(code(&client, sql).await.as_deref(), Some("42501"), "{sql}");
    }
    in_step(&tier).await
}

/// Code that weir cannot see through: in a block it is settled when that ends, else the shard refuses it.
#[tokio::test(flavor = "multi_thread")]
async fn a_function_is_settled_at_the_end_of_its_block() -> Result<()> {
    let tier = Tier::builder().shards(2).tables(TABLES).start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    state(&tier, "valid").await?;
    client.batch_execute("INSERT INTO users VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')").await?;
    let hidden = "CREATE FUNCTION hidden(id bigint, email text) RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN \
                  EXECUTE format('INSERT INTO %I VALUES (%L, %L)', 'us' || 'ers', id, email); RETURN id; END $$";
    client.batch_execute(hidden).await?;
    // A key of the home shard, where functions run.
    let direct = tier.shards[0].primary.admin("shop").await?;
    let there = column(&direct, "SELECT user_id, email FROM users ORDER BY 1 LIMIT 1").await?;
    let id = there.first().context("a row on the home shard")?;
    let elsewhere = column(&tier.shards[1].primary.admin("shop").await?, "SELECT email FROM users LIMIT 1").await?;
    client.batch_execute(&format!("DELETE FROM users WHERE user_id = {id}")).await?;
    assert_eq!(code(&client, &format!("SELECT hidden({id}, 'new')")).await.as_deref(), Some("0A000"));
    client.batch_execute("BEGIN").await?;
    client.batch_execute(&format!("SELECT hidden({id}, '{}')", elsewhere[0])).await?;
    assert_eq!(code(&client, "COMMIT").await.as_deref(), Some("23505"));
    client.batch_execute("BEGIN").await?;
    client.batch_execute(&format!("SELECT hidden({id}, 'new')")).await?;
    client.batch_execute("COMMIT").await?;
    for other in 50..56 {
        let insert = format!("INSERT INTO users VALUES ({other}, 'new')");
        assert_eq!(code(&client, &insert).await.as_deref(), Some("23505"));
    }
    in_step(&tier).await
}

/// ON CONFLICT sees its own shard alone; where that might matter, it is refused when it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_elsewhere_is_not_skipped() -> Result<()> {
    let pair = Pair::start(2, TABLES, SCHEMA).await?;
    state(&pair.tier, "valid").await?;
    for id in 1..=8 {
        for action in ["(email) DO NOTHING", "(email) DO UPDATE SET name = 'again'", "DO NOTHING"] {
            pair.fine(&format!("INSERT INTO users VALUES ({id}, 'e{id}') ON CONFLICT {action}")).await?;
        }
        pair.fine(&format!("INSERT INTO users VALUES ({id}, 'other') ON CONFLICT (user_id) DO NOTHING")).await?;
    }
    pair.fails("INSERT INTO users VALUES (9, 'e1') ON CONFLICT (user_id) DO NOTHING", "23505").await?;
    pair.fails("INSERT INTO users VALUES (10, 'e1') ON CONFLICT (user_id) DO NOTHING", "23505").await?;
    let mut refused = 0;
    for id in 20..30 {
        let sql = format!("INSERT INTO users VALUES ({id}, 'e1') ON CONFLICT DO NOTHING");
        match code(&pair.sharded, &sql).await.as_deref() {
            None => {}
            Some("0A000") => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 0, "ten keys are not all on one shard");
    pair.fine("SELECT user_id, email, name FROM users ORDER BY user_id").await?;
    in_step(&pair.tier).await
}

/// A column that is declared for a table with rows: duplicates are told, mended, and then it is enforced; what is not declared
/// any more leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn values_from_before_are_looked_up() -> Result<()> {
    let tier = Tier::builder().shards(3).tables(&["users(user_id bigint)"]).start().await?;
    let client = tier.connect().await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, email varchar(40), name text)").await?;
    let rows: Vec<String> = (0..2500).map(|id| format!("({id}, 'e{id}', 'n')")).collect();
    client.batch_execute(&format!("INSERT INTO users VALUES {}", rows.join(","))).await?;
    client.batch_execute("INSERT INTO users VALUES (5000, 'e7'), (5001, 'e1700'), (5002, NULL), (5003, NULL)").await?;
    drop(client);
    declare(&tier, true).await?;
    let told = state(&tier, "failed").await?;
    assert!(told.contains("(e7)") && told.contains("(e1700)"), "{told}");
    let client = tier.connect().await?;
    assert_eq!(code(&client, "INSERT INTO users VALUES (6000, 'fresh')").await.as_deref(), Some("55000"));
    client.batch_execute("DELETE FROM users WHERE user_id = 5000").await?;
    client.batch_execute("UPDATE users SET email = 'mended' WHERE user_id = 5001").await?;
    state(&tier, "valid").await?;
    in_step(&tier).await?;
    for id in 6000..6010 {
        assert_eq!(code(&client, &format!("INSERT INTO users VALUES ({id}, 'e{id}')")).await, None);
        let twice = format!("INSERT INTO users VALUES ({}, 'e7')", id + 100);
        assert_eq!(code(&client, &twice).await.as_deref(), Some("23505"));
    }
    in_step(&tier).await?;
    schema_changes(&tier, &client).await?;
    drop(client);
    declare(&tier, false).await?;
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let left = "SELECT (SELECT count(*) FROM weir.unique_value) + (SELECT count(*) FROM weir.unique_rule) \
                    + (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'weir%')";
        assert_eq!(column(&direct, left).await?, ["0"]);
        assert_eq!(code(&direct, "UPDATE users SET email = 'same' WHERE user_id < 3").await, None);
    }
    Ok(())
}

async fn schema_changes(tier: &Tier, client: &Client) -> Result<()> {
    // The table is made anew: its values are free, and the new one is enforced from its first row on.
    client.batch_execute("DROP TABLE users").await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, email varchar(40), name text)").await?;
    for id in 0..20 {
        client.batch_execute(&format!("INSERT INTO users VALUES ({id}, 'e{id}')")).await?;
    }
    for id in 30..40 {
        let twice = format!("INSERT INTO users VALUES ({id}, 'e3')");
        assert_eq!(code(client, &twice).await.as_deref(), Some("23505"));
    }
    in_step(tier).await?;
    // A column that is renamed is refused, not unchecked.
    client.batch_execute("ALTER TABLE users RENAME email TO mail").await?;
    assert!(code(client, "INSERT INTO users VALUES (50, 'e3')").await.is_some());
    client.batch_execute("ALTER TABLE users RENAME mail TO email").await?;
    assert_eq!(code(client, "ALTER TABLE users DROP COLUMN email").await.as_deref(), Some("2BP01"));
    state(tier, "valid").await?;
    assert_eq!(code(client, "INSERT INTO users VALUES (51, 'e51')").await, None);
    in_step(tier).await
}

/// Restarts weir with the column declared, or not.
async fn declare(tier: &Tier, declared: bool) -> Result<()> {
    let path = tier.run.path().join("weir.toml");
    let mut config: toml::Table = std::fs::read_to_string(&path)?.parse()?;
    let tables = config["database"]["shop"]["table"].as_array_mut().context("tables")?;
    for table in tables.iter_mut().filter_map(toml::Value::as_table_mut) {
        if table["name"].as_str() == Some("users") {
            table.remove("global_unique");
            if declared {
                table.insert("global_unique".into(), toml::Value::Array(vec!["email".into()]));
            }
        }
    }
    std::fs::write(&path, toml::to_string(&config)?)?;
    tier.restart_weir().await
}
