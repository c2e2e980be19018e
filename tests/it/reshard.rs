//! RESHARD PLAN: what would move, and what stands in the way, before anything is touched.

use anyhow::{Context as _, Result};
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use weir_harness::{Cluster, ClusterSpec, Tier};

use crate::placement::create_schema;

const USERS: i64 = 3000;

async fn plan(console: &Client, goal: &str) -> Result<Vec<SimpleQueryRow>> {
    let messages = console.simple_query(&format!("RESHARD PLAN {goal}")).await?;
    Ok(messages
        .into_iter()
        .filter_map(|one| if let SimpleQueryMessage::Row(row) = one { Some(row) } else { None })
        .collect())
}

fn of<'a>(rows: &'a [SimpleQueryRow], what: &str) -> Vec<&'a SimpleQueryRow> {
    rows.iter().filter(|row| row.get("what") == Some(what)).collect()
}

fn number(row: &SimpleQueryRow, column: &str) -> i64 {
    row.get(column).and_then(|text| text.parse().ok()).unwrap_or(-1)
}

/// Rows of `users` that a plan would move, over all its steps.
fn users_moved(rows: &[SimpleQueryRow]) -> i64 {
    let users = of(rows, "table").into_iter().filter(|row| row.get("table") == Some("public.users"));
    users.map(|row| number(row, "rows")).sum()
}

async fn filled() -> Result<(Tier, Client)> {
    // A table that weir publishes cannot be made unlogged.
    let tier = Tier::builder().shards(2).config_extra("[cache]\ndecoding = \"off\"").start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client
        .execute("INSERT INTO users (user_id, name) SELECT n, 'u' || n FROM generate_series(1, $1::int8) n", &[&USERS])
        .await?;
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    Ok((tier, console))
}

/// A server that lets weir in and has none of the declared tables.
pub async fn empty_server(tier: &Tier) -> Result<Cluster> {
    let spec = ClusterSpec::new("added", &tier.state.admin_password);
    Cluster::start(&tier.run, spec.database("shop", "shop", &tier.state.shop_password)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_what_would_move_and_moves_nothing() -> Result<()> {
    let (tier, console) = filled().await?;
    let before = console.simple_query("SHOW SLOTS").await?.len();
    let given = plan(&console, "MOVE SLOTS 0-2047 TO shard1").await?;
    let step = of(&given, "move");
    assert!(step.len() == 1 && step[0].get("from") == Some("shard0") && step[0].get("to") == Some("shard1"));
    let truth: i64 = tier.shards[0]
        .primary
        .admin("shop")
        .await?
        .query_one("SELECT count(*) FROM users WHERE (hashint8extended(user_id, 0) >> 52) & 4095 < 2048", &[])
        .await?
        .get(0);
    assert!(truth > 0);
    assert_eq!(users_moved(&given), truth, "counted as the server itself counts");
    assert!(number(step[0], "bytes") > 0 && number(step[0], "seconds") >= 0);
    let removed = plan(&console, "shop REMOVE SHARD shard1").await?;
    let owned: i64 =
        tier.shards[1].primary.admin("shop").await?.query_one("SELECT count(*) FROM users", &[]).await?.get(0);
    assert_eq!(users_moved(&removed), owned);
    assert_eq!(number(of(&removed, "move")[0], "slots"), 2048);
    let thirds = plan(&console, "WEIGHT shard0 = 2, shard1 = 1").await?;
    assert_eq!(of(&thirds, "move").iter().map(|row| number(row, "slots")).sum::<i64>(), 2731 - 2048);
    assert_eq!(of(&given, "blocker").len(), 0, "{given:?}");
    assert_eq!(console.simple_query("SHOW SLOTS").await?.len(), before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_the_way_is_named_with_what_to_do() -> Result<()> {
    let (tier, console) = filled().await?;
    let shard0 = tier.shards[0].primary.admin("shop").await?;
    shard0
        .batch_execute("ALTER TABLE users DROP CONSTRAINT users_pkey CASCADE; ALTER TABLE user_emails SET UNLOGGED")
        .await?;
    let rows = plan(&console, "MOVE SLOTS 0-4095 TO shard1").await?;
    let says = |what: &str, table: &str, text: &str| {
        of(&rows, what)
            .iter()
            .any(|row| row.get("table") == Some(table) && row.get("note").is_some_and(|note| note.contains(text)))
    };
    assert!(says("blocker", "public.users", "cannot be told apart"), "{rows:?}");
    assert!(says("blocker", "public.user_emails", "unlogged"), "{rows:?}");
    assert!(says("blocker", "public.users", "is not the same on shard0 and shard1"), "{rows:?}");
    for (goal, code) in [
        ("MOVE SLOTS 0-1 TO nobody", "42704"),
        ("ADD SHARD shard1 'db:5432'", "42710"),
        ("ADD SHARD shard2 nowhere", "22023"),
        ("ADD SHARD shard2 '127.0.0.1:1'", "08001"),
        ("WEIGHT shard0 = 1", "22023"),
        ("sideways", "42601"),
        ("elsewhere REMOVE SHARD shard0", "3D000"),
    ] {
        let error = plan(&console, goal).await.expect_err(goal);
        let error =
            error.downcast_ref::<tokio_postgres::Error>().and_then(|error| error.as_db_error()).context("refused")?;
        assert_eq!(error.code().code(), code, "{goal}: {error}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_server_is_looked_at_before_it_is_added() -> Result<()> {
    let (tier, console) = filled().await?;
    let added = empty_server(&tier).await?;
    let rows = plan(&console, &format!("ADD SHARD shard2 '{}'", added.address())).await?;
    assert_eq!(of(&rows, "blocker").len(), 0, "{rows:?}");
    let slots: i64 = of(&rows, "move").iter().map(|row| number(row, "slots")).sum();
    assert!((1365..=1366).contains(&slots), "{slots}");
    let share = users_moved(&rows) as f64 / USERS as f64;
    assert!((0.31..0.36).contains(&share), "{share}");
    added.admin("shop").await?.batch_execute("CREATE TABLE users (user_id int8)").await?;
    let rows = plan(&console, &format!("ADD SHARD shard2 '{}'", added.address())).await?;
    assert!(of(&rows, "blocker")[0].get("note").is_some_and(|note| note.contains("tables of the same names")));
    // The command says the same to people.
    let said = std::process::Command::new(weir_harness::weir_binary()?)
        .args(["reshard", "plan", "add", "shard2", &added.address(), "--weir", &tier.admin_dsn()])
        .output()?;
    let said = String::from_utf8(said.stdout)?;
    assert!(
        said.contains("shard0 → shard2: 683 of 4096 slots") || said.contains("shard0 → shard2: 682 of 4096"),
        "{said}"
    );
    assert!(said.contains("BLOCKER: shard2") && said.contains("to mend before anything can move"), "{said}");
    Ok(())
}
