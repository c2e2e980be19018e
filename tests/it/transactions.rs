//! Transactions on one shard and over several.

use std::time::Duration;

use anyhow::Result;
use weir_harness::{Tier, connect};

use crate::placement::{column, create_schema};
use crate::raw::Raw;

async fn tier() -> Result<Tier> {
    let tier = Tier::builder().shards(2).config_extra("admin_users = [\"shop\"]").start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    for key in 1..=10_i64 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '100')", &[&key]).await?;
    }
    Ok(tier)
}

async fn total(client: &tokio_postgres::Client) -> Result<i64> {
    Ok(column(client, "SELECT sum(name::bigint) FROM users").await?[0].parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_over_shards_commits_or_fails_as_one() -> Result<()> {
    let tier = tier().await?;
    let mut client = tier.connect().await?;
    // Keys 1 and 2 are on different shards (slots 3280 and 809 of a levelled map of two), and if not, the sum holds anyway.
    for (commit, expected) in [(true, "99"), (false, "99")] {
        let transaction = client.transaction().await?;
        for key in 1..=4_i64 {
            let by = if key % 2 == 1 { -1_i64 } else { 1 };
            transaction
                .execute("UPDATE users SET name = (name::bigint + $2)::text WHERE user_id = $1", &[&key, &by])
                .await?;
        }
        if commit {
            transaction.commit().await?;
        } else {
            transaction.rollback().await?;
        }
        assert_eq!(column(&client, "SELECT name FROM users WHERE user_id = 1").await?, [expected]);
        assert_eq!(total(&client).await?, 1000);
    }
    // An error on one shard undoes the other's part.
    let transaction = client.transaction().await?;
    transaction.execute("UPDATE users SET name = '0' WHERE user_id = $1", &[&1_i64]).await?;
    for key in 2..=6_i64 {
        if transaction.execute("INSERT INTO users (user_id) VALUES ($1)", &[&key]).await.is_err() {
            break;
        }
    }
    let refused =
        transaction.execute("UPDATE users SET name = '0' WHERE user_id = $1", &[&3_i64]).await.expect_err("aborted");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("25P02"));
    transaction.rollback().await?;
    assert_eq!(total(&client).await?, 1000);
    for shard in &tier.shards {
        let open = column(&shard.primary.admin("shop").await?, "SELECT count(*) FROM pg_prepared_xacts").await?;
        assert_eq!(open, ["0"]);
    }
    Ok(())
}

/// Constraints that are checked at the end refuse on every shard; the client has one COMMIT and one answer.
#[tokio::test(flavor = "multi_thread")]
async fn several_refusals_of_a_commit_are_one_error() -> Result<()> {
    let tier = Tier::builder().shards(3).tables(&["parts(user_id bigint)"]).start().await?;
    let client = tier.connect().await?;
    client
        .batch_execute("CREATE TABLE parts (user_id bigint, n int, UNIQUE (user_id, n) DEFERRABLE INITIALLY DEFERRED)")
        .await?;
    let twice: Vec<String> = (1..=20).flat_map(|key| [format!("({key}, 1)"), format!("({key}, 1)")]).collect();
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    raw.query("BEGIN").await?;
    assert_eq!(raw.query(&format!("INSERT INTO parts VALUES {}", twice.join(", "))).await?.0, "CZ");
    let (tags, told) = raw.query("COMMIT").await?;
    assert_eq!(tags, "EZ", "{told:?}");
    assert!(told[0].starts_with("23505"), "{told:?}");
    assert_eq!(column(&client, "SELECT count(*) FROM parts").await?, ["0"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_hold_on_every_shard() -> Result<()> {
    let tier = tier().await?;
    let client = tier.connect().await?;
    client.batch_execute("BEGIN").await?;
    client.batch_execute("UPDATE users SET name = '101' WHERE user_id = 1").await?;
    client.batch_execute("SAVEPOINT a").await?;
    for key in 2..=6 {
        client.batch_execute(&format!("UPDATE users SET name = '0' WHERE user_id = {key}")).await?;
    }
    client.batch_execute("ROLLBACK TO SAVEPOINT a").await?;
    client.batch_execute("UPDATE users SET name = '99' WHERE user_id = 2").await?;
    client.batch_execute("COMMIT").await?;
    assert_eq!(total(&client).await?, 1000);
    assert_eq!(
        column(&client, "SELECT name FROM users WHERE user_id IN (1, 2) ORDER BY user_id").await?,
        ["101", "99"]
    );
    // An error after a savepoint can be taken back, on whichever shard it was.
    client.batch_execute("BEGIN").await?;
    client.batch_execute("UPDATE users SET name = '100' WHERE user_id = 1").await?;
    client.batch_execute("SAVEPOINT b").await?;
    assert!(client.batch_execute("INSERT INTO users (user_id) VALUES (2)").await.is_err());
    client.batch_execute("ROLLBACK TO b").await?;
    client.batch_execute("UPDATE users SET name = '100' WHERE user_id = 2").await?;
    client.batch_execute("COMMIT").await?;
    assert_eq!(total(&client).await?, 1000);
    assert!(client.batch_execute("ROLLBACK TO nowhere").await.is_err());
    Ok(())
}

/// A text that opens a block means the same as its statements one by one, on every shard the block reaches later.
#[tokio::test(flavor = "multi_thread")]
async fn a_block_may_begin_in_a_text_with_more_in_it() -> Result<()> {
    let tier = tier().await?;
    let client = tier.connect().await?;
    client.batch_execute("BEGIN; SET LOCAL statement_timeout = '7s'; SELECT name FROM users WHERE user_id = 1").await?;
    for key in 1..=10 {
        let sql = format!("SELECT current_setting('statement_timeout') FROM users WHERE user_id = {key}");
        assert_eq!(column(&client, &sql).await?, ["7s"], "key {key}");
    }
    client.batch_execute("COMMIT").await?;
    assert_eq!(column(&client, "SHOW statement_timeout").await?, ["0"]);

    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT name FROM users WHERE user_id = 1").await?;
    let refused = client.simple_query("SELECT count(*) FROM users").await.expect_err("no common snapshot");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("0A000"));
    client.batch_execute("ROLLBACK").await?;

    // Nor where the block begins amid a text that one shard runs as it is.
    client.batch_execute("SET application_name TO a; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT name FROM users WHERE user_id = 1").await?;
    let refused = client.simple_query("SELECT count(*) FROM users").await.expect_err("no common snapshot");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("0A000"));
    client.batch_execute("ROLLBACK").await?;

    let moves = |by: i64| {
        let each =
            |(key, by): (i64, i64)| format!("UPDATE users SET name = (name::int + {by})::text WHERE user_id = {key}; ");
        [(1, -by), (2, by), (3, -by), (4, by)].map(each).concat()
    };
    client.batch_execute(&format!("BEGIN; {} COMMIT", moves(1))).await?;
    assert_eq!(
        column(&client, "SELECT name FROM users WHERE user_id IN (1, 2) ORDER BY user_id").await?,
        ["99", "101"]
    );
    client.batch_execute(&format!("BEGIN; {} ROLLBACK", moves(5))).await?;
    assert!(client.batch_execute(&format!("BEGIN; {} SELECT 1/0; COMMIT", moves(5))).await.is_err());
    let refused = client.simple_query("SELECT 1").await.expect_err("what follows an error is not run, COMMIT neither");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("25P02"));
    client.batch_execute("ROLLBACK").await?;
    assert_eq!(
        column(&client, "SELECT name FROM users WHERE user_id IN (1, 2) ORDER BY user_id").await?,
        ["99", "101"]
    );
    assert_eq!(total(&client).await?, 1000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_and_read_only_transactions_cost_nothing_and_say_the_right_things() -> Result<()> {
    let tier = tier().await?;
    let client = tier.connect().await?;
    client.batch_execute("BEGIN").await?;
    client.batch_execute("COMMIT").await?;
    client.batch_execute("COMMIT").await?;
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    assert_eq!(column(&client, "SHOW transaction_isolation").await?, ["repeatable read"]);
    let refused = client.simple_query("SELECT count(*) FROM users").await.expect_err("no common snapshot");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("0A000"));
    client.batch_execute("ROLLBACK").await?;
    assert_eq!(total(&client).await?, 1000);
    // It stays on the shard of its first row, by any protocol; what sees no rows may go elsewhere.
    client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE").await?;
    assert_eq!(column(&client, "SELECT name FROM users WHERE user_id = 1").await?, ["100"]);
    column(&client, "SELECT relname FROM pg_class LIMIT 1").await?;
    client.batch_execute("SAVEPOINT before").await?;
    let refused =
        client.query("SELECT name FROM users WHERE user_id = $1", &[&2_i64]).await.expect_err("another shard");
    assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("0A000"));
    client.batch_execute("ROLLBACK TO before").await?;
    assert_eq!(client.query("SELECT name FROM users WHERE user_id = $1", &[&1_i64]).await?.len(), 1);
    client.batch_execute("COMMIT").await?;
    Ok(())
}

/// A proxy that dies between PREPARE and COMMIT PREPARED leaves nothing in doubt: the next one finishes it.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_proxy_left_prepared_is_finished() -> Result<()> {
    let tier = tier().await?;
    let (anchor, other) = (&tier.shards[0], &tier.shards[1]);
    let log = connect(&anchor.primary.dsn("shop", "shop")).await?;
    // As the coordinator leaves it: one decided (row on the anchor), one not, and one that somebody else wants to decide, who
    // sees names but does not know their numbers. The names end with the digests of 1, 2 and 3.
    for (key, digest, known) in [
        (1001, "4bf5122f344554c53bde2ebb8cd2b7e3", Some("01")),
        (1002, "dbc1b4c900ffe48d575b5da5c6380401", None),
        (1003, "084fed08b978af4d7d196a7446a86b58", Some("04")),
    ] {
        let gid = format!("weir_shard0_1_{digest}");
        let part = other.primary.admin("shop").await?;
        part.batch_execute(&format!("BEGIN; INSERT INTO users (user_id, name) VALUES ({key}, '0')")).await?;
        part.batch_execute(&format!("PREPARE TRANSACTION '{gid}'")).await?;
        if let Some(secret) = known {
            let row = format!("INSERT INTO weir.txlog (gid, secret) VALUES ('{gid}', '\\x{secret}')");
            log.batch_execute(&row).await?;
        }
        let forged = format!("INSERT INTO weir.txlog (gid, decision) VALUES ('{gid}', 'a')");
        let refused = log.batch_execute(&forged).await.expect_err("only recovery decides without a number");
        assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("42501"));
    }
    let direct = other.primary.admin("shop").await?;
    let console = connect(&tier.dsn("weir")).await?;
    let mut shown = 0;
    for _ in 0..300 {
        shown = shown.max(column(&console, "SHOW PREPARED TRANSACTIONS").await?.len());
        if column(&direct, "SELECT count(*) FROM pg_prepared_xacts").await? == ["0"] {
            let rows = column(&direct, "SELECT user_id FROM users WHERE user_id > 1000").await?;
            assert_eq!(rows, ["1001"], "the decided one is committed, the others rolled back");
            assert_eq!(shown, 3, "younger than three seconds they were only shown");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    anyhow::bail!("transactions are still in doubt");
}

/// Transfers between shards while the proxy is killed again and again: the sum never changes.
#[tokio::test(flavor = "multi_thread")]
async fn killing_the_proxy_conserves_money() -> Result<()> {
    let tier = tier().await?;
    for round in 0..4_u64 {
        let mut workers = Vec::new();
        for worker in 0..4_i64 {
            let dsn = tier.dsn("shop");
            workers.push(tokio::spawn(async move {
                let Ok(mut client) = weir_harness::connect(&dsn).await else { return };
                for step in 0..10_000_i64 {
                    let (from, to) = ((worker + step) % 10 + 1, (worker + step * 3 + 1) % 10 + 1);
                    let moved = async {
                        let transaction = client.transaction().await?;
                        // In key order, so that workers do not wait for each other in a circle.
                        for (key, by) in if from < to { [(from, -1_i64), (to, 1)] } else { [(to, 1), (from, -1)] } {
                            transaction
                                .execute(
                                    "UPDATE users SET name = (name::bigint + $2)::text WHERE user_id = $1",
                                    &[&key, &by],
                                )
                                .await?;
                        }
                        transaction.commit().await
                    };
                    if moved.await.is_err() && client.is_closed() {
                        return;
                    }
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(300 + 170 * round)).await;
        tier.kill_weir();
        for worker in workers {
            worker.await?;
        }
        tier.restart_weir().await?;
        for shard in &tier.shards {
            let direct = shard.primary.admin("shop").await?;
            for attempt in 0.. {
                if column(&direct, "SELECT count(*) FROM pg_prepared_xacts").await? == ["0"] {
                    break;
                }
                assert!(attempt < 200, "transactions are still in doubt");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        assert_eq!(total(&tier.connect().await?).await?, 1000, "round {round}");
    }
    Ok(())
}
