//! Rows whose numbers weir draws from a sequence, while their slots change owner: which slot is theirs shows only when they are drawn.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use weir_harness::{Tier, connect};

use super::{SLOTS, order, reaches, rows};
use crate::placement::column;

const SCHEMA: &str = "
CREATE TABLE settings (name text PRIMARY KEY, setting text);
CREATE TABLE users (user_id bigserial PRIMARY KEY, name text);
CREATE TABLE notes (user_id bigint, note_id bigint GENERATED ALWAYS AS IDENTITY, note text, PRIMARY KEY (user_id, note_id))";
const USERS: usize = 50;

/// Two shards, and the first one's slots are about to have another owner.
async fn ready(notes: &str) -> Result<(Tier, Client, Client)> {
    let tier = Tier::builder().shards(2).tables(&["users(user_id bigint)", notes]).start().await?;
    let client = tier.connect().await?;
    client.batch_execute(SCHEMA).await?;
    client.batch_execute(&format!("INSERT INTO users (name) VALUES {}", vec!["('early')"; USERS].join(", "))).await?;
    let console = connect(&tier.admin_dsn()).await?;
    Ok((tier, client, console))
}

/// A key of a slot that moves.
async fn moving_user(tier: &Tier) -> Result<i64> {
    let direct = tier.shards[0].primary.admin("shop").await?;
    let mine = "SELECT min(user_id) FROM users WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048";
    Ok(direct.query_one(mine, &[]).await?.get(0))
}

async fn move_for_good(console: &Client) -> Result<()> {
    rows(console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await?;
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await?;
    Ok(())
}

/// A change of owner is tried again and again, because a transaction that has written what moves is open: what is drawn waits as long
/// as each attempt takes, and no statement fails.
#[tokio::test(flavor = "multi_thread")]
async fn rows_wait_for_another_owner_and_none_is_refused() -> Result<()> {
    let (tier, client, console) = ready("notes(user_id bigint)").await?;
    rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "ready").await?;
    let mine = moving_user(&tier).await?;
    let open = tier.connect().await?;
    open.batch_execute(&format!("BEGIN; UPDATE users SET name = 'open' WHERE user_id = {mine}")).await?;
    order(&console, "RESHARD CUTOVER").await?;

    let (mut users, mut notes) = (BTreeSet::new(), BTreeSet::new());
    let begun = Instant::now();
    let mut tried = 0;
    while tried < 3 {
        ensure!(begun.elapsed() < Duration::from_secs(60), "it was tried {tried} times only");
        let row = client.query_one("INSERT INTO users (name) VALUES ($1) RETURNING user_id", &[&"drawn"]).await;
        users.insert(row.context("its key is drawn")?.get::<_, i64>(0));
        let given = "INSERT INTO notes (user_id, note) VALUES ($1, 'n') RETURNING note_id";
        notes.insert(client.query_one(given, &[&mine]).await.context("its key is given")?.get::<_, i64>(0));
        let text = format!("INSERT INTO notes (user_id, note) VALUES ({mine}, 'n') RETURNING note_id");
        notes.insert(column(&client, &text).await.context("a simple query")?[0].parse()?);
        let said = rows(&console, "SHOW MOVES").await?;
        let error = said[0].get("error").unwrap_or_default();
        tried = error.split_once("was tried ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok()).unwrap_or(0);
    }
    open.batch_execute("COMMIT").await?;
    reaches(&console, "reverse").await?;
    order(&console, "RESHARD COMPLETE").await?;
    reaches(&console, "done").await?;
    let found = column(&client, "SELECT user_id FROM users WHERE name = 'drawn'").await?;
    assert_eq!(found.iter().map(|id| id.parse()).collect::<Result<BTreeSet<i64>, _>>()?, users);
    let found = column(&client, &format!("SELECT note_id FROM notes WHERE user_id = {mine}")).await?;
    assert_eq!(found.iter().map(|id| id.parse()).collect::<Result<BTreeSet<i64>, _>>()?, notes);
    Ok(())
}

/// By the map of its snapshot the row would be written where nobody looks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_draws_no_row_that_has_another_owner_since() -> Result<()> {
    let (tier, client, console) = ready("notes(user_id bigint)").await?;
    let mine = moving_user(&tier).await?;
    let snapshots = [tier.connect().await?, tier.connect().await?];
    for snapshot in &snapshots {
        snapshot.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
        // Nothing that moves: the end of the move would wait for it.
        column(snapshot, "SELECT * FROM settings").await?;
    }
    move_for_good(&console).await?;
    let [drawn, given] = &snapshots;
    let given = given.execute("INSERT INTO notes (user_id, note) VALUES ($1, 'late')", &[&mine]).await.err();
    assert_eq!(
        given.as_ref().and_then(tokio_postgres::Error::code),
        Some(&SqlState::T_R_SERIALIZATION_FAILURE),
        "{given:?}"
    );
    // Some slots have moved, some stay on the shard of the snapshot, and of the other ones it has none.
    let mut written = BTreeSet::new();
    let (mut stayed, mut moved) = (0, 0);
    for _ in 0..20 * USERS {
        drawn.batch_execute("SAVEPOINT one").await?;
        match drawn.query_one("INSERT INTO users (name) VALUES ($1) RETURNING user_id", &[&"late"]).await {
            Ok(row) => stayed += usize::from(written.insert(row.get::<_, i64>(0))),
            Err(error) => {
                moved += usize::from(error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE));
                assert!(moved > 0 || error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED), "{error:?}");
                drawn.batch_execute("ROLLBACK TO one").await?;
            }
        }
        if stayed.min(moved) > 0 {
            break;
        }
    }
    assert!(moved > 0, "{stayed} were written by the old map");
    drawn.batch_execute("COMMIT").await?;
    for id in &written {
        let found = column(&client, &format!("SELECT name FROM users WHERE user_id = {id}")).await?;
        assert_eq!(found, ["late"], "user {id} is where nobody looks");
    }
    Ok(())
}

/// A portal is bound, and no server knows of it yet; its slot moves for good, and only then it is executed.
#[tokio::test(flavor = "multi_thread")]
async fn a_portal_that_was_bound_before_writes_no_row_that_has_another_owner_since() -> Result<()> {
    let (tier, client, console) = ready("notes(user_id bigint) unique note").await?;
    let mine = moving_user(&tier).await?;
    let mut early = tier.connect().await?;
    let insert = early.prepare("INSERT INTO notes (user_id, note) VALUES ($1, 'late')").await?;
    let transaction = early.transaction().await?;
    let portal = transaction.bind(&insert, &[&mine]).await?;
    move_for_good(&console).await?;
    let refused = transaction.query_portal(&portal, 0).await.err().context("it was written by the old map")?;
    assert_eq!(refused.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE), "{refused:?}");
    transaction.rollback().await?;
    client.execute("INSERT INTO notes (user_id, note) VALUES ($1, 'again')", &[&mine]).await?;
    assert_eq!(column(&client, "SELECT note FROM notes").await?, ["again"]);
    Ok(())
}
