//! A move loses what it needs, with a server or without: it begins again by itself, or says that there is no way back.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use weir_harness::{Cluster, Replica, Server, Tier};

use super::{SLOTS, USERS, begun, nothing_is_left, nothing_is_left_on, on_shards, order, reaches};
use crate::placement::column;
use crate::promotion::until_role;

const MOVED: &str = "(hashint8extended(user_id, 0) >> 52) & 4095 < 2048";

/// Two shards with a replica each, without which nothing is acknowledged: a promotion loses nothing.
async fn tier() -> Result<Tier> {
    let tier = Tier::builder().shards(2).replicas(1).start().await?;
    for shard in &tier.shards {
        let admin = shard.primary.admin("postgres").await?;
        // By its name: `*` would mean weir's own decoding, too, which confirms what no replica has.
        let names = format!("ALTER SYSTEM SET synchronous_standby_names = '\"{}\"'", shard.replicas[0].name());
        admin.batch_execute(&names).await?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
    }
    Ok(tier)
}

/// The replica takes the place of the primary, which dies.
async fn promote<'a>(tier: &'a Tier, (primary, heir): (&Cluster, &'a Replica)) -> Result<Client> {
    primary.kill9();
    heir.promote().await?;
    let admin = heir.admin("postgres").await?;
    // Nobody is there to confirm what it writes.
    admin.batch_execute("ALTER SYSTEM SET synchronous_standby_names = ''").await?;
    admin.batch_execute("SELECT pg_reload_conf()").await?;
    until_role(tier.proxy(), &heir.address(), "primary").await?;
    heir.admin("shop").await
}

/// Every user is on one of both servers, as it is expected, and those that moved are on the second.
async fn all_are_there([source, target]: [&Client; 2], expected: &BTreeMap<i64, String>) -> Result<()> {
    let mut found = BTreeMap::new();
    for server in [source, target] {
        for row in server.query("SELECT user_id, name FROM users", &[]).await? {
            let twice = found.insert(row.get::<_, i64>(0), row.get::<_, String>(1));
            ensure!(twice.is_none(), "user {} is there twice", row.get::<_, i64>(0));
        }
    }
    assert_eq!(&found, expected);
    assert_eq!(column(source, &format!("SELECT count(*) FROM users WHERE {MOVED}")).await?, ["0"]);
    Ok(())
}

async fn cut_over(console: &Client) -> Result<()> {
    order(console, "RESHARD CUTOVER").await?;
    reaches(console, "reverse").await.map(drop)
}

async fn complete(console: &Client) -> Result<()> {
    order(console, "RESHARD COMPLETE").await?;
    reaches(console, "done").await.map(drop)
}

/// Slots that have moved: a client, the console, how many users the target had before, and who is to be found now.
async fn moved(tier: &Tier) -> Result<(Client, Client, usize, BTreeMap<i64, String>)> {
    let (client, console, before) = begun(tier).await?;
    let own = before[1].len();
    let mut expected = before.into_iter().flatten().collect();
    cut_over(&console).await?;
    write_some(&client, &mut expected, "moved").await?;
    Ok((client, console, own, expected))
}

async fn write_some(client: &Client, expected: &mut BTreeMap<i64, String>, name: &str) -> Result<()> {
    for user in (1..=USERS).step_by(9) {
        client.execute("UPDATE users SET name = $2 WHERE user_id = $1", &[&user, &name]).await?;
        expected.insert(user, name.to_owned());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_whose_source_is_replaced_begins_again() -> Result<()> {
    let tier = tier().await?;
    let (client, console, before) = begun(&tier).await?;
    let mut expected: BTreeMap<i64, String> = before.into_iter().flatten().collect();
    reaches(&console, "ready").await?;
    write_some(&client, &mut expected, "before").await?;
    let shard = &tier.shards[0];
    let source = promote(&tier, (&shard.primary, &shard.replicas[0])).await?;
    // Its slot did not come along.
    let row = until_noticed(&console).await?;
    ensure!(row.contains("begun again in phase ready") && row.contains("replication slot is gone"), "{row}");
    let client = tier.connect().await?;
    write_some(&client, &mut expected, "after").await?;
    reaches(&console, "ready").await?;
    cut_over(&console).await?;
    write_some(&client, &mut expected, "moved").await?;
    complete(&console).await?;
    let target = tier.shards[1].primary.admin("shop").await?;
    all_are_there([&source, &target], &expected).await?;
    nothing_is_left_on(&source).await?;
    nothing_is_left_on(&target).await
}

/// What the line of the move says has happened to it.
async fn until_noticed(console: &Client) -> Result<String> {
    let mut notice = None;
    crate::freshness::until(async || {
        let moves = super::rows(console, "SHOW MOVES").await?;
        notice = moves.last().and_then(|row| row.get("notice")).map(str::to_owned);
        Ok(notice.is_some())
    })
    .await?;
    notice.context("a notice")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_with_whoever_is_promoted_and_what_it_has_kept() -> Result<()> {
    let tier = tier().await?;
    let source = tier.shards[0].primary.admin("shop").await?;
    let holds = tier.shards[0].primary.admin("shop").await?;
    super::filled(&tier).await?;
    let expected: BTreeMap<i64, String> = on_shards(&tier).await?.into_iter().flatten().collect();
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    // A slot is made when all that write are through.
    holds.batch_execute("BEGIN; SELECT pg_current_xact_id()").await?;
    super::rows(&console, &format!("RESHARD START MOVE SLOTS {SLOTS} TO shard1")).await?;
    reaches(&console, "copy").await?;
    let shard = &tier.shards[1];
    let target = promote(&tier, (&shard.primary, &shard.replicas[0])).await?;
    holds.batch_execute("COMMIT").await?;
    reaches(&console, "ready").await?;
    cut_over(&console).await?;
    complete(&console).await?;
    all_are_there([&source, &target], &expected).await?;
    nothing_is_left_on(&source).await?;
    nothing_is_left_on(&target).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_replaced_after_the_cut_over_keeps_the_slots_and_there_is_no_way_back() -> Result<()> {
    let tier = tier().await?;
    let (_, console, _, mut expected) = moved(&tier).await?;
    let shard = &tier.shards[1];
    let target = promote(&tier, (&shard.primary, &shard.replicas[0])).await?;
    let row = reaches(&console, "forward").await?;
    ensure!(row.get("notice").is_some_and(|said| said.contains("no way back")), "{row:?}");
    let refused = console.simple_query("RESHARD ROLLBACK").await.expect_err("there is no way back");
    let refused = refused.as_db_error().context("an error of weir's")?;
    assert_eq!(refused.code().code(), "55000");
    ensure!(refused.hint().is_some_and(|hint| hint.contains("RESHARD COMPLETE")), "{refused:?}");
    // Everybody goes on.
    let client = tier.connect().await?;
    write_some(&client, &mut expected, "forward").await?;
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, [USERS.to_string()]);
    complete(&console).await?;
    let source = tier.shards[0].primary.admin("shop").await?;
    all_are_there([&source, &target], &expected).await?;
    nothing_is_left_on(&source).await?;
    nothing_is_left_on(&target).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_back_leads_to_whoever_has_replaced_the_source_and_has_it_all() -> Result<()> {
    let tier = tier().await?;
    let (_, console, own, mut expected) = moved(&tier).await?;
    let shard = &tier.shards[0];
    let source = promote(&tier, (&shard.primary, &shard.replicas[0])).await?;
    let client = tier.connect().await?;
    write_some(&client, &mut expected, "later").await?;
    order(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    let target = tier.shards[1].primary.admin("shop").await?;
    assert_eq!(column(&target, "SELECT count(*) FROM users").await?, [own.to_string()]);
    assert_eq!(column(&source, &format!("SELECT count(*) > 0 FROM users WHERE {MOVED}")).await?, ["t"]);
    for (user, name) in &expected {
        let row = client.query_one("SELECT name FROM users WHERE user_id = $1", &[user]).await?;
        assert_eq!(row.get::<_, &str>(0), name);
    }
    nothing_is_left_on(&source).await?;
    nothing_is_left_on(&target).await
}

/// As max_slot_wal_keep_size does it, without a gigabyte of WAL.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_alone_is_made_anew() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let (client, console, before) = begun(&tier).await?;
    let mut expected: BTreeMap<i64, String> = before.into_iter().flatten().collect();
    reaches(&console, "ready").await?;
    let [source, target] = [tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?];
    for server in [&source, &target] {
        crate::freshness::until(async || {
            server
                .batch_execute(
                    "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'weir_move_1'",
                )
                .await?;
            let dropped =
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'weir_move_1'";
            Ok(server.query(dropped, &[]).await.is_ok_and(|rows| rows.len() == 1))
        })
        .await?;
        write_some(&client, &mut expected, "lost").await?;
        reaches(&console, "ready").await?;
    }
    ensure!(until_noticed(&console).await?.contains("begun again"));
    cut_over(&console).await?;
    complete(&console).await?;
    all_are_there([&source, &target], &expected).await?;
    nothing_is_left(&tier).await
}

/// The hub's replica, which has all that the hub has, takes its place.
async fn replace_hub(tier: &Tier) -> Result<()> {
    let heir = &tier.hub_replicas[0];
    heir.catch_up().await?;
    tier.hub.kill9();
    heir.promote().await
}

/// Says it again until somebody knows who the hub is.
async fn order_of_new_hub(console: &Client, command: &str) -> Result<()> {
    let mut last = None;
    let obeyed = crate::freshness::until(async || {
        last = order(console, command).await.err();
        Ok(last.is_none())
    });
    obeyed.await.with_context(|| format!("{command}: {last:?}"))
}

/// How many of the slots that move are the source's, as a server of the hub has it.
async fn owned_by_source(hub: &Server) -> Result<Vec<String>> {
    let hub = hub.admin("weir_hub").await?;
    column(&hub, "SELECT count(*) FROM weir.slot WHERE database = 'shop' AND slot < 2048 AND shard = 0").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_goes_on_from_where_it_was_when_the_hub_is_replaced() -> Result<()> {
    let tier = Tier::builder().shards(2).hub_replicas(1).start().await?;
    let holds = tier.shards[0].primary.admin("shop").await?;
    holds.batch_execute("BEGIN; SELECT pg_current_xact_id()").await?;
    let (client, console, before) = begun(&tier).await?;
    let mut expected: BTreeMap<i64, String> = before.into_iter().flatten().collect();
    reaches(&console, "copy").await?;
    replace_hub(&tier).await?;
    // Nobody's statements need it.
    write_some(&client, &mut expected, "meanwhile").await?;
    holds.batch_execute("COMMIT").await?;
    reaches(&console, "ready").await?;
    write_some(&client, &mut expected, "ready").await?;
    order_of_new_hub(&console, "RESHARD CUTOVER").await?;
    reaches(&console, "reverse").await?;
    assert_eq!(owned_by_source(&tier.hub_replicas[0]).await?, ["0"]);
    write_some(&client, &mut expected, "moved").await?;
    complete(&console).await?;
    let [source, target] = [tier.shards[0].primary.admin("shop").await?, tier.shards[1].primary.admin("shop").await?];
    all_are_there([&source, &target], &expected).await?;
    nothing_is_left(&tier).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_back_stays_open_when_the_hub_is_replaced() -> Result<()> {
    let tier = Tier::builder().shards(2).hub_replicas(1).start().await?;
    let owned = owned_by_source(&tier.hub).await?;
    let (client, console, own, mut expected) = moved(&tier).await?;
    replace_hub(&tier).await?;
    write_some(&client, &mut expected, "meanwhile").await?;
    order_of_new_hub(&console, "RESHARD ROLLBACK").await?;
    reaches(&console, "rolled_back").await?;
    assert_eq!(owned_by_source(&tier.hub_replicas[0]).await?, owned);
    write_some(&client, &mut expected, "back").await?;
    let found: BTreeMap<i64, String> = on_shards(&tier).await?.into_iter().flatten().collect();
    assert_eq!(found, expected);
    assert_eq!(on_shards(&tier).await?[1].len(), own);
    nothing_is_left(&tier).await
}
