//! Slots move from one shard to another while clients go on: there, back, given up, and taken over by another proxy.

mod beside;
mod company;
mod copied;
mod crowd;
mod drawn;
mod fresh;
mod isolating;
mod kills;
mod least;
mod ledger;
mod partitioned;
mod promoted;
mod stopped;
mod valued;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use weir_harness::Tier;

use crate::placement::{column, create_schema};

pub const USERS: i64 = 2000;
/// Of the 4096 slots these go from shard0 to shard1, where shard0 has them.
pub const SLOTS: &str = "0-2047";

/// What the console answers.
pub async fn rows(console: &Client, command: &str) -> Result<Vec<SimpleQueryRow>> {
    let messages = console.simple_query(command).await.with_context(|| command.to_owned())?;
    Ok(messages
        .into_iter()
        .filter_map(|one| if let SimpleQueryMessage::Row(row) = one { Some(row) } else { None })
        .collect())
}

/// Waits until the move is in this phase.
pub async fn reaches(console: &Client, phase: &str) -> Result<SimpleQueryRow> {
    let begun = Instant::now();
    let mut last = String::new();
    while begun.elapsed() < Duration::from_secs(120) {
        match rows(console, "SHOW MOVES").await.map(|moves| moves.into_iter().last()) {
            Ok(Some(row)) if row.get("phase") == Some(phase) => return Ok(row),
            Ok(Some(row)) => last = format!("{:?}: {:?}", row.get("phase"), row.get("error")),
            Ok(None) => {}
            // The hub may be away for a while.
            Err(error) => last = format!("{error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("the move did not reach {phase}; it is in {last}")
}

/// Waits until every move that is not over is in this phase, or all are over.
async fn all_reach(console: &Client, phase: &str) -> Result<()> {
    let begun = Instant::now();
    let mut last = Vec::new();
    while begun.elapsed() < Duration::from_secs(180) {
        let moves = rows(console, "SHOW MOVES").await?;
        let over = |phase: Option<&str>| matches!(phase, Some("done" | "cancelled" | "rolled_back"));
        if moves.iter().any(|row| row.get("phase") == Some(phase))
            && moves.iter().all(|row| row.get("phase") == Some(phase) || over(row.get("phase")))
        {
            return Ok(());
        }
        last = moves.iter().map(|row| format!("{:?} {:?}", row.get("phase"), row.get("error"))).collect();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("not all moves reached {phase}: {last:?}")
}

/// Says something to the move, again while it has just gone on.
pub async fn order(console: &Client, command: &str) -> Result<()> {
    let mut last = String::new();
    for _ in 0..100 {
        match console.simple_query(command).await {
            Ok(_) => return Ok(()),
            // It has just gone on, or this weir does not know yet that the last one is over.
            Err(error) if error.code().is_some_and(|code| matches!(code.code(), "55000" | "55006")) => {
                last = format!("{error:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!("{command} is refused: {last}\n{:?}", rows(console, "SHOW MOVES").await?)
}

pub async fn filled(tier: &Tier) -> Result<()> {
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client
        .execute("INSERT INTO users (user_id, name) SELECT n, 'u' || n FROM generate_series(1, $1::int8) n", &[&USERS])
        .await?;
    Ok(())
}

/// A filled tier whose slots begin to move: a client, the console, and what the shards had before.
async fn begun(tier: &Tier) -> Result<(Client, Client, Vec<BTreeMap<i64, String>>)> {
    filled(tier).await?;
    let before = on_shards(tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    Ok((tier.connect().await?, console, before))
}

/// User and name, as each shard has them itself.
pub async fn on_shards(tier: &Tier) -> Result<Vec<BTreeMap<i64, String>>> {
    let mut found = Vec::new();
    for shard in &tier.shards {
        let direct = shard.primary.admin("shop").await?;
        let rows = direct.query("SELECT user_id, name FROM users", &[]).await?;
        found.push(rows.iter().map(|row| (row.get(0), row.get(1))).collect());
    }
    Ok(found)
}

/// Nothing of any move is left on any server.
pub async fn nothing_is_left(tier: &Tier) -> Result<()> {
    for shard in &tier.shards {
        nothing_is_left_on(&shard.primary.admin("shop").await?).await.context(shard.name.clone())?;
    }
    Ok(())
}

/// The same of one server.
pub async fn nothing_is_left_on(direct: &Client) -> Result<()> {
    for sql in [
        "SELECT slot_name::text FROM pg_replication_slots WHERE slot_name LIKE 'weir_move%'",
        "SELECT pubname::text FROM pg_publication WHERE pubname LIKE 'weir_move%'",
        "SELECT tgname::text FROM pg_trigger WHERE tgname LIKE '%weir_move%'",
        "SELECT relname::text FROM pg_class WHERE relname LIKE 'move\\_%' AND relname NOT LIKE 'move_applied%'",
        "SELECT proname::text FROM pg_proc WHERE proname LIKE 'move\\_%'",
    ] {
        let left = column(direct, sql).await?;
        ensure!(left.is_empty(), "{left:?}: {sql}");
    }
    // Only who has taken part in a move has this table.
    if column(direct, "SELECT relname FROM pg_class WHERE oid = to_regclass('weir.move_applied')").await?.is_empty() {
        return Ok(());
    }
    let left = column(direct, "SELECT move::text FROM weir.move_applied").await?;
    ensure!(left.is_empty(), "progress of moves {left:?} is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_move_there_and_stay() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (client, console, before) = begun(&tier).await?;
    reaches(&console, "ready").await?;
    // What changes after the copy comes along.
    for user in 1..=USERS {
        match user % 3 {
            0 => client.execute("UPDATE users SET name = name || '!' WHERE user_id = $1", &[&user]).await?,
            1 if user % 2 == 0 => client.execute("DELETE FROM users WHERE user_id = $1", &[&user]).await?,
            _ => 0,
        };
    }
    let expected: BTreeMap<i64, String> = before
        .iter()
        .flatten()
        .filter(|(user, _)| **user % 3 != 1 || **user % 2 == 1)
        .map(|(user, name)| (*user, if user % 3 == 0 { format!("{name}!") } else { name.clone() }))
        .collect();
    order(&console, "RESHARD CUTOVER").await?;
    let row = reaches(&console, "reverse").await?;
    let pause_us: i64 = row.get("pause_us").context("it took a while")?.parse()?;
    println!("statements waited for {pause_us} us");
    let (_, page) = tier.http_get("/metrics").await?;
    assert!(page.lines().any(|line| line == "weir_moves{database=\"shop\"} 1"), "one is under way");
    for (user, name) in &expected {
        let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[user]).await?;
        assert_eq!(row.get::<_, &str>(0), name);
    }
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    let after = on_shards(&tier).await?;
    assert_eq!(after[0].len() + after[1].len(), expected.len(), "each row is on one shard");
    let direct = tier.shards[0].primary.admin("shop").await?;
    let left = "SELECT count(*)::text FROM users WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048";
    assert_eq!(column(&direct, left).await?, ["0"]);
    assert_eq!(after.into_iter().flatten().collect::<BTreeMap<_, _>>(), expected);
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_after_the_cut_over_comes_back_with_a_rollback() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (client, console, before) = begun(&tier).await?;
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    // Who goes past weir is refused by the server that does not own the rows any more.
    let direct = tier.shards[0].primary.admin("shop").await?;
    let moved = "(hashint8extended(user_id, 0) >> 52) & 4095 < 2048";
    let stale = direct.execute(&format!("UPDATE users SET name = 'stale' WHERE {moved}"), &[]).await;
    let stale = stale.expect_err("it owns them no more");
    assert_eq!(stale.code().map(tokio_postgres::error::SqlState::code), Some("40001"), "{stale}");
    let (mut expected, mut changed) = (before.into_iter().flatten().collect::<BTreeMap<_, _>>(), 0);
    for user in 1..=300_i64 {
        client.execute("UPDATE users SET name = 'later' WHERE user_id = $1", &[&user]).await?;
        expected.insert(user, "later".to_owned());
        changed += 1;
    }
    for user in USERS + 1..=USERS + 100 {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, 'new')", &[&user]).await?;
        expected.insert(user, "new".to_owned());
    }
    assert!(changed > 0);
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    let after = on_shards(&tier).await?;
    assert_eq!(after[0].len() + after[1].len(), expected.len(), "each row is on one shard");
    assert_eq!(after.into_iter().flatten().collect::<BTreeMap<_, _>>(), expected);
    assert_eq!(column(&direct, &format!("SELECT count(*) > 100 FROM users WHERE {moved}")).await?, ["t"]);
    for user in [1, 7, USERS + 1, USERS + 50] {
        let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[&user]).await?;
        assert_eq!(row.get::<_, &str>(0), expected[&user]);
    }
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_cancelled_leaves_nothing() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let before = on_shards(&tier).await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    let again =
        console.simple_query("RESHARD START MOVE SLOTS 2048-4095 TO shard1").await.expect_err("one is under way");
    assert_eq!(again.code().map(tokio_postgres::error::SqlState::code), Some("55006"), "{again:?}");
    let client = tier.connect().await?;
    let late = client.batch_execute("ALTER TABLE users ADD COLUMN late text").await.expect_err("rows are on their way");
    assert_eq!(late.code().map(tokio_postgres::error::SqlState::code), Some("55006"), "{late:?}");
    client.batch_execute("CREATE INDEX ON users (name)").await?;
    // Nobody writes the copies.
    let direct = tier.shards[1].primary.admin("shop").await?;
    let guests = "UPDATE users SET name = 'mine' WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048";
    assert!(direct.execute(guests, &[]).await.is_err() || before[1].len() as i64 == USERS);
    order(&console, "RESHARD CANCEL").await?;
    reaches(&console, "cancelled").await?;
    assert_eq!(on_shards(&tier).await?, before);
    // As soon as the proxy knows that it is over.
    crate::freshness::until(async || Ok(client.batch_execute("ALTER TABLE users ADD COLUMN late text").await.is_ok()))
        .await?;
    let late = console.simple_query("RESHARD CUTOVER MOVE 1").await.expect_err("it is over");
    assert_eq!(late.code().map(tokio_postgres::error::SqlState::code), Some("55000"), "{late}");
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_added_and_taken_away() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    filled(&tier).await?;
    let client = tier.connect().await?;
    client.batch_execute("INSERT INTO products VALUES (1, 'pen', 100), (2, 'ink', 200)").await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let added = crate::reshard::empty_server(&tier).await?;
    let before = on_shards(&tier).await?;
    let expected: BTreeMap<i64, String> = before.iter().flatten().map(|(user, name)| (*user, name.clone())).collect();
    rows(&console, &format!("RESHARD START ADD SHARD shard2 '127.0.0.1:{}'", added.port())).await?;
    all_reach(&console, "ready").await?;
    // It takes part: what all shards have it has, too.
    client.batch_execute("INSERT INTO products VALUES (3, 'cap', 50)").await?;
    let direct = added.admin("shop").await?;
    assert_eq!(column(&direct, "SELECT name FROM products ORDER BY product_id").await?, ["pen", "ink", "cap"]);
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    for user in (1..=USERS).step_by(7) {
        let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[&user]).await?;
        assert_eq!(row.get::<_, &str>(0), expected[&user]);
    }
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, [USERS.to_string()], "each once");
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    let thirds: i64 = column(&direct, "SELECT count(*) FROM users").await?[0].parse()?;
    assert!((USERS / 4..USERS / 2).contains(&thirds), "{thirds} of {USERS}");
    nothing_is_left(&tier).await?;

    rows(&console, "RESHARD START REMOVE SHARD shard2").await?;
    order(&console, "RESHARD CUTOVER").await?;
    all_reach(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    all_reach(&console, "done").await?;
    assert_eq!(column(&direct, "SELECT count(*) FROM users").await?, ["0"]);
    assert_eq!(on_shards(&tier).await?.into_iter().flatten().collect::<BTreeMap<_, _>>(), expected);
    // It takes part no more: it may be stopped.
    drop(direct);
    crate::freshness::until(async || {
        let states = rows(&console, "SHOW SHARDS").await?;
        Ok(states.iter().any(|row| row.get("state") == Some("retired")))
    })
    .await?;
    added.kill9();
    client.batch_execute("INSERT INTO products VALUES (4, 'pad', 70)").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, [USERS.to_string()]);
    nothing_is_left(&tier).await
}

/// A proxy that stands still is waited for until its right to the old map has ended, and shows nothing of before when it wakes up.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_stands_still_neither_holds_a_cut_over_up_nor_shows_what_was() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    let (lives, stands) = (tier.another().await?, tier.another().await?);
    filled(&tier).await?;
    let (here, there) = (lives.connect().await?, stands.connect().await?);
    let console = weir_harness::connect(&lives.admin_dsn()).await?;
    // Who drives must be one that lives.
    tier.stop_weir();
    let process = |proxy: &weir_harness::Proxy| {
        Pid::from_raw(proxy.weir_pid().context("it runs")?.cast_signed()).context("a pid")
    };
    let name = "SELECT name FROM users WHERE user_id = $1";
    for user in 1..=40_i64 {
        there.query_one(name, &[&user]).await?;
    }
    kill_process(process(&stands)?, Signal::STOP)?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    order(&console, "RESHARD CUTOVER").await?;
    let moved = reaches(&console, "reverse").await;
    for user in 1..=40_i64 {
        here.execute("UPDATE users SET name = 'new' WHERE user_id = $1", &[&user]).await?;
    }
    let kept = async {
        moved?;
        order(&console, "RESHARD COMPLETE").await?;
        // It might have been about to write: as long as it is there, the servers go on refusing that.
        crate::freshness::until(async || {
            let moves = rows(&console, "SHOW MOVES").await?;
            Ok(moves.iter().any(|row| row.get("error").is_some_and(|error| error.contains("the guards stay"))))
        })
        .await?;
        let source = tier.shards[0].primary.admin("shop").await?;
        column(&source, "SELECT count(*) FROM pg_trigger WHERE tgname = 'zzzz_weir_move_1'").await
    };
    let kept = kept.await;
    kill_process(process(&stands)?, Signal::CONT)?;
    assert_ne!(kept?, ["0"]);
    for user in 1..=40_i64 {
        let row = there.query_one(name, &[&user]).await?;
        assert_eq!(row.get::<_, &str>(0), "new", "user {user}");
        there.execute("UPDATE users SET name = 'newer' WHERE user_id = $1", &[&user]).await?;
        assert_eq!(here.query_one(name, &[&user]).await?.get::<_, &str>(0), "newer", "user {user}");
    }
    reaches(&console, "done").await?;
    nothing_is_left(&tier).await
}

/// What `weir doctor` says.
fn doctor(tier: &Tier, arguments: &[&str]) -> Result<String> {
    let said = std::process::Command::new(weir_harness::weir_binary()?)
        .arg("doctor")
        .arg(tier.run.path().join("weir.toml"))
        .args(arguments)
        .output()?;
    anyhow::ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    Ok(String::from_utf8(said.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_is_found_and_taken_away() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (_, console, _) = begun(&tier).await?;
    reaches(&console, "ready").await?;
    let well = "Nothing is left of any move, and every row is where it belongs.";
    assert!(doctor(&tier, &["--repair"])?.contains(well), "a move that is under way is left alone");
    order(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    assert!(doctor(&tier, &[])?.contains(well));
    // As a server has it that was restored from before the end.
    let direct = tier.shards[0].primary.admin("shop").await?;
    direct
        .batch_execute(
            "CREATE SEQUENCE weir.move_1_fence;
             CREATE FUNCTION weir.move_1_guard_0() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER zzzz_weir_move_1 BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION weir.move_1_guard_0();
             CREATE PUBLICATION weir_move_1 FOR TABLE users",
        )
        .await?;
    direct.query("SELECT pg_create_logical_replication_slot('weir_move_1', 'pgoutput')", &[]).await?;
    let stranger = "INSERT INTO users (user_id, name) SELECT n, 'stray' FROM generate_series(100000, 101000) n
                    WHERE (hashint8extended(n, 0) >> 52) & 4095 < 2048 LIMIT 3";
    direct.batch_execute(stranger).await?;
    let said = doctor(&tier, &[])?;
    assert_eq!(said.matches("of move 1, which is over").count(), 5, "{said}");
    assert!(said.contains("3 rows of \"public\".\"users\" are of keys that another shard owns"), "{said}");
    let said = doctor(&tier, &["--repair"])?;
    assert_eq!(said.matches("taken away").count(), 5, "{said}");
    nothing_is_left(&tier).await?;
    assert_eq!(column(&direct, "SELECT count(*) FROM users WHERE name = 'stray'").await?, ["3"], "no row is deleted");
    Ok(())
}
