//! Somebody else writes in the same database and is not heard of: a second weir without `[peers]`, or a second name of the database.
//! Neither cache nor replicas answer then, at any of them; and nothing that is overtaken is shown, then or later.

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_harness::{Cluster, ClusterSpec, Front, Proxy, Run, Tier};

use crate::fleet::{name_of, warm};
use crate::freshness::{cache_figure, replica_reads, until};
use crate::placement::{column, create_schema};

/// What is written elsewhere is heard of in no other way.
const UNHEARD: &str = "[cache]\ndecoding = \"off\"";

/// Writes through each in turn, and reads through both.
async fn take_turns(clients: [&Client; 2]) -> Result<()> {
    for round in 0..60_usize {
        let name = format!("round {round}");
        clients[round % 2].execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        for client in clients {
            assert_eq!(name_of(client, 1).await?, name);
            assert_eq!(name_of(client, 1).await?, name);
        }
    }
    Ok(())
}

async fn hits(proxies: [&Proxy; 2]) -> Result<[i64; 2]> {
    Ok([cache_figure(proxies[0], "hits_memory").await?, cache_figure(proxies[1], "hits_memory").await?])
}

#[tokio::test(flavor = "multi_thread")]
async fn two_weirs_without_peers_serve_nothing_until_one_is_gone() -> Result<()> {
    let tier = Tier::builder().shards(2).replicas(1).config_extra(UNHEARD).start().await?;
    let here = tier.connect().await?;
    create_schema(&here).await?;
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    warm(tier.proxy(), &here, 1).await?;
    let other = tier.another_without_peers().await?;
    let there = other.connect().await?;
    // On both shards. One that was slow to look has served nothing since its last look ran out.
    for proxy in [tier.proxy(), &other] {
        until(async || Ok(cache_figure(proxy, "another_weir").await? == 2)).await.with_context(|| proxy.weir_log())?;
    }
    let before = (hits([tier.proxy(), &other]).await?, replica_reads(&tier).await?);
    take_turns([&here, &there]).await?;
    assert_eq!((hits([tier.proxy(), &other]).await?, replica_reads(&tier).await?), before);
    for proxy in [tier.proxy(), &other] {
        assert!(proxy.weir_log().contains("another weir"), "{}", proxy.weir_log());
    }
    let (_, metrics) = tier.http_get("/metrics").await?;
    assert!(metrics.lines().any(|line| line.contains("reason=\"another_weir\"") && !line.ends_with(" 0")), "{metrics}");
    // It has the last word, and goes.
    there.execute("UPDATE users SET name = 'Zoe' WHERE user_id = 1", &[]).await?;
    other.kill_weir();
    assert_eq!(name_of(&here, 1).await?, "Zoe");
    warm(tier.proxy(), &here, 1).await?;
    assert_eq!(name_of(&here, 1).await?, "Zoe", "what was read before counts no more");
    assert_eq!(cache_figure(tier.proxy(), "another_weir").await?, 0);
    until(async || {
        let before = replica_reads(&tier).await?;
        column(&here, "/* weir: cache=never */ SELECT name FROM users WHERE user_id = 1").await?;
        Ok(replica_reads(&tier).await? > before)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_notice_one_that_is_none() -> Result<()> {
    let tier = Tier::builder().shards(1).peers(true).config_extra(UNHEARD).start().await?;
    let here = tier.connect().await?;
    create_schema(&here).await?;
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    let peer = tier.another().await?;
    warm(tier.proxy(), &here, 1).await?;
    warm(&peer, &peer.connect().await?, 1).await?;
    let stranger = tier.another_without_peers().await?;
    let there = stranger.connect().await?;
    take_turns([&here, &there]).await?;
    take_turns([&peer.connect().await?, &there]).await?;
    stranger.stop_weir();
    warm(tier.proxy(), &here, 1).await?;
    warm(&peer, &peer.connect().await?, 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_names_of_one_database_are_noticed_however_they_are_written() -> Result<()> {
    let run = Run::temporary("sole")?;
    let cluster = Cluster::start(&run, ClusterSpec::new("one", "admin's").database("shop", "shop", "shop's")).await?;
    let shard = |name: &str, host: &str| {
        let port = cluster.port();
        format!(
            "[database.{name}]\nserver_database = \"shop\"\n[[database.{name}.shard]]\nname = \"only\"\nprimary = \"{host}:{port}\"\n"
        )
    };
    let config = format!(
        "{UNHEARD}\n[server_auth]\nuser = \"weir_admin\"\npassword_env = \"ADMIN_PASSWORD\"\n{}{}",
        shard("one", "127.0.0.1"),
        shard("two", "localhost")
    );
    let front = Front::builder()
        .config(&config)
        .variable("ADMIN_PASSWORD", "admin's")
        .user("shop", "shop's")
        .start(&run)
        .await?;
    let (one, two) = (front.connect("one", "shop").await?, front.connect("two", "shop").await?);
    one.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, name text); INSERT INTO users VALUES (1, '')")
        .await?;
    take_turns([&one, &two]).await
}
