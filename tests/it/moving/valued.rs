//! Columns that are unique over all shards while slots move: what is known of their values goes along, and none is there twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use weir_harness::{Tier, connect};

use super::{SLOTS, all_reach, doctor, nothing_is_left, nothing_is_left_on, order, reaches, rows};
use crate::freshness::until;
use crate::placement::column;
use crate::unique::{TABLES, are_in_step, create, in_step, state};

const FILLED: i64 = 400;
const TRADERS: i64 = 4;

/// A tier whose users have addresses, all of them unique.
async fn filled(tables: &[&str]) -> Result<(Tier, Client, Client)> {
    let tier = Tier::builder().shards(2).tables(tables).start().await?;
    let client = tier.connect().await?;
    create(&client).await?;
    client.batch_execute("ALTER TABLE notes REPLICA IDENTITY FULL").await?;
    state(&tier, "valid").await?;
    let fill = "INSERT INTO users SELECT n, 'e' || n FROM generate_series(1, $1::int8) n";
    client.execute(fill, &[&FILLED]).await?;
    let console = connect(&tier.admin_dsn()).await?;
    Ok((tier, client, console))
}

/// Clients who take addresses from each other, until they are told to stop.
struct Traders {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<u64>>>,
}

impl Traders {
    fn open(tier: &Tier) -> Traders {
        let stop = Arc::new(AtomicBool::new(false));
        let trade = |number| tokio::spawn(trade(tier.dsn("shop"), number, Arc::clone(&stop)));
        let tasks = (0..TRADERS).map(trade).collect();
        Traders { stop, tasks }
    }

    /// Errors: a statement on its own failed for another reason than the value it wanted.
    async fn close(self) -> Result<()> {
        self.stop.store(true, SeqCst);
        for task in self.tasks {
            let written = task.await??;
            ensure!(written > 0, "somebody never got anything");
        }
        Ok(())
    }
}

async fn trade(dsn: String, number: i64, stop: Arc<AtomicBool>) -> Result<u64> {
    let client = connect(&dsn).await?;
    let mut written = 0;
    for turn in 0.. {
        if stop.load(SeqCst) {
            break;
        }
        let (user, email) = (number * 1000 + turn % 50, format!("e{}", (turn * 7 + number * 3) % (FILLED / 2)));
        let sql = match turn % 4 {
            0 => format!("INSERT INTO users VALUES ({user}, '{email}') ON CONFLICT (user_id) DO NOTHING"),
            1 => format!("UPDATE users SET email = '{email}' WHERE user_id = {}", user - 1),
            2 => format!("DELETE FROM users WHERE user_id = {}", user - 2),
            _ => format!(
                "INSERT INTO users VALUES ({user}, 't{number}-{turn}') ON CONFLICT (user_id) DO UPDATE SET email = excluded.email"
            ),
        };
        match client.batch_execute(&sql).await {
            Ok(()) => written += 1,
            // It is taken, or two want each other's.
            Err(error) if error.code().is_some_and(|code| matches!(code.code(), "23505" | "40P01")) => {}
            Err(error) => return Err(error).context(sql),
        }
    }
    Ok(written)
}

/// Nobody gets an address that another user has, whichever shard knows of it.
async fn are_all_taken(client: &Client) -> Result<()> {
    let taken = column(client, "SELECT email FROM users WHERE email IS NOT NULL").await?;
    ensure!(taken.len() as i64 > FILLED / 2, "only {} are left", taken.len());
    for (number, email) in taken.iter().enumerate() {
        let insert = client.execute("INSERT INTO users VALUES ($1, $2)", &[&(100_000 + number as i64), email]).await;
        let refused = insert.as_ref().err().and_then(tokio_postgres::Error::code).map(|code| code.code().to_owned());
        ensure!(refused.as_deref() == Some("23505"), "{email}: {insert:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn values_go_along_there_and_back() -> Result<()> {
    let (tier, client, console) = filled(TABLES).await?;
    for end in ["ROLLBACK", "COMPLETE"] {
        let traders = Traders::open(&tier);
        rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
        reaches(&console, "ready").await?;
        order(&console, "RESHARD CUTOVER").await?;
        reaches(&console, "reverse").await?;
        order(&console, &format!("RESHARD {end}")).await?;
        reaches(&console, if end == "ROLLBACK" { "rolled_back" } else { "done" }).await?;
        traders.close().await?;
        in_step(&tier).await.context(end)?;
        are_all_taken(&client).await.context(end)?;
        nothing_is_left(&tier).await?;
    }
    let direct = tier.shards[0].primary.admin("shop").await?;
    let left = "SELECT count(*) FROM weir.unique_value WHERE (hashtextextended(value, 0) >> 52) & 4095 < 2048";
    assert_eq!(column(&direct, left).await?, ["0"]);
    let told = doctor(&tier, &[])?;
    assert!(told.contains("Nothing is left of any move"), "{told}");
    // What lies where nobody looks for it is found.
    direct.batch_execute("INSERT INTO weir.unique_value SELECT 1, n::text, 'k' FROM generate_series(1, 50) n").await?;
    let told = doctor(&tier, &[])?;
    assert!(told.contains("rows of \"weir\".\"unique_value\" are of keys that another shard owns"), "{told}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_shard_knows_of_them_before_it_has_rows() -> Result<()> {
    let (tier, client, console) = filled(TABLES).await?;
    let added = crate::reshard::empty_server(&tier).await?;
    let home = tier.shards[0].primary.admin("shop").await?;
    let since = column(&home, "SELECT changed FROM weir.unique_rule WHERE state = 'valid'").await?;
    let traders = Traders::open(&tier);
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '127.0.0.1:{}'", added.port())).await?;
    all_reach(&console, "ready").await?;
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    traders.close().await?;
    let mut directs = vec![added.admin("shop").await?];
    for shard in &tier.shards {
        directs.push(shard.primary.admin("shop").await?);
    }
    for (number, direct) in directs.iter().enumerate() {
        let shares = "SELECT (SELECT count(*) > 50 FROM users) AND (SELECT count(*) > 50 FROM weir.unique_value)";
        assert_eq!(column(direct, shares).await?, ["t"], "server {number} has its share");
        nothing_is_left_on(direct).await?;
    }
    are_in_step(&directs).await?;
    are_all_taken(&client).await?;
    let still = column(&home, "SELECT changed FROM weir.unique_rule WHERE state = 'valid'").await?;
    assert_eq!(still, since, "nothing had to be looked up anew");
    Ok(())
}

/// Rows that are on two shards cannot be looked up, so a column that is declared meanwhile has to wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_comes_while_slots_move_is_unique_after_that() -> Result<()> {
    let (tier, client, console) = filled(&[TABLES, &["accounts(user_id bigint) unique handle"]].concat()).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    client.batch_execute("CREATE TABLE accounts (user_id bigint PRIMARY KEY, handle text)").await?;
    let insert = "INSERT INTO accounts VALUES (1, 'ada'), (2, 'bob')";
    let early = client.batch_execute(insert).await.expect_err("it is not unique yet");
    assert_eq!(early.code().map(tokio_postgres::error::SqlState::code), Some("55000"), "{early:?}");
    client.batch_execute("INSERT INTO users VALUES (5000, 'others go on')").await?;
    order(&console, "RESHARD CANCEL").await?;
    reaches(&console, "cancelled").await?;
    until(async || Ok(client.batch_execute(insert).await.is_ok())).await?;
    let twice = client.batch_execute("INSERT INTO accounts VALUES (3, 'ada')").await.expect_err("it is unique");
    assert_eq!(twice.code().map(tokio_postgres::error::SqlState::code), Some("23505"), "{twice:?}");
    nothing_is_left(&tier).await
}
