//! Several proxies that miss the same entry at once agree on who asks the server. The server's log is the witness.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_postgres::Client;
use weir_harness::{Proxy, Tier};

use crate::fleet::{name_of, warm};
use crate::flights::{self, ask_at_once, asked};
use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};

/// Takes a server long enough for others to come, far less than they wait, and may be cached.
const SLOW: &str = "SELECT max(name) FROM users, generate_series(1, 100000)";

const COUNT: &str = "SELECT count(*) FROM users";

/// Reads until what was written is over and done for this proxy: it keeps what it reads.
async fn settle(proxy: &Proxy, client: &Client) -> Result<()> {
    until(async || {
        let before = cache_figure(proxy, "hits_memory").await?;
        column(client, COUNT).await?;
        Ok(cache_figure(proxy, "hits_memory").await? > before)
    })
    .await
}

/// A tier with one user and this many proxies besides its own, all of which read from Redis what the first has stored.
async fn tier_with(others: usize) -> Result<(Tier, Vec<Proxy>)> {
    let tier = Tier::builder().shards(1).redis(true).peers(true).lease("10s").log_statements(true).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    let mut proxies = Vec::new();
    for _ in 0..others {
        let other = tier.another().await?;
        let there = other.connect().await?;
        // Stamps are taken over from each other in their own time.
        let shares = async {
            loop {
                client.execute("UPDATE users SET name = 'Ann'", &[]).await?;
                settle(tier.proxy(), &client).await?;
                let before = cache_figure(&other, "hits_redis").await?;
                column(&there, COUNT).await?;
                if cache_figure(&other, "hits_redis").await? > before {
                    return anyhow::Ok(());
                }
                // Asked for again and again, it is not taken for what is written more often than read.
                for _ in 0..3 {
                    column(&there, COUNT).await?;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), shares).await??;
        proxies.push(other);
    }
    Ok((tier, proxies))
}

async fn sessions(proxies: &[&Proxy], each: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..each {
        for proxy in proxies {
            clients.push(proxy.connect().await?);
        }
    }
    Ok(clients)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_proxy_has_read_again_the_other_takes_from_redis() -> Result<()> {
    let (tier, others) = tier_with(1).await?;
    let (here, there) = (tier.connect().await?, others[0].connect().await?);
    warm(&others[0], &there, 1).await?;
    let mut round = 0;
    until(async || {
        round += 1;
        let name = format!("Ann {round}");
        here.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        warm(tier.proxy(), &here, 1).await?;
        // In memory there is what was true before.
        let before = cache_figure(&others[0], "hits_redis").await?;
        assert_eq!(name_of(&there, 1).await?, name);
        Ok(cache_figure(&others[0], "hits_redis").await? > before)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_misses_over_three_proxies_are_few_statements() -> Result<()> {
    let (tier, others) = tier_with(2).await?;
    let proxies = [tier.proxy(), &others[0], &others[1]];
    let writer = tier.connect().await?;
    let mut later = 0;
    for version in 1..=3 {
        let name = format!("Ann {version}");
        writer.execute("UPDATE users SET name = $1", &[&name]).await?;
        for proxy in proxies {
            settle(proxy, &proxy.connect().await?).await?;
        }
        let before = asked(&tier, SLOW);
        let mut answers = ask_at_once(sessions(&proxies, 334).await?, SLOW);
        while let Some(answer) = answers.join_next().await {
            assert_eq!(answer??, std::slice::from_ref(&name));
        }
        let statements = asked(&tier, SLOW) - before;
        let mut waits = Vec::new();
        for proxy in proxies {
            waits.push((cache_figure(proxy, "leases").await?, cache_figure(proxy, "lease_waits").await?));
        }
        eprintln!("version {version}: {statements} statements; leases and waits {waits:?}");
        assert!((1..=proxies.len()).contains(&statements), "version {version}: {statements}");
        later += if version == 1 { 0 } else { statements };
    }
    // Once each proxy knows that several wait, one asks for all; a proxy that Redis keeps waiting may still ask for itself.
    assert!(later < 2 * proxies.len(), "{later} for two versions");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_dies_with_a_lease_holds_nobody_up_for_long() -> Result<()> {
    let (tier, others) = tier_with(1).await?;
    let writer = tier.connect().await?;
    // Both learn that several wait for it.
    for proxy in [tier.proxy(), &others[0]] {
        writer.execute("UPDATE users SET name = 'Ben'", &[]).await?;
        settle(proxy, &proxy.connect().await?).await?;
        let mut answers = ask_at_once(sessions(&[proxy], 5).await?, flights::SLOW);
        while let Some(answer) = answers.join_next().await {
            answer??;
        }
    }
    writer.execute("UPDATE users SET name = 'Cid'", &[]).await?;
    for proxy in [tier.proxy(), &others[0]] {
        settle(proxy, &proxy.connect().await?).await?;
    }
    let (leases, before) = (cache_figure(&others[0], "leases").await?, asked(&tier, flights::SLOW));
    let mut dying = ask_at_once(sessions(&[&others[0]], 5).await?, flights::SLOW);
    until(async || Ok(cache_figure(&others[0], "leases").await? > leases && asked(&tier, flights::SLOW) == before + 1))
        .await?;
    let (begun, waits) = (Instant::now(), cache_figure(tier.proxy(), "lease_waits").await?);
    let mut answers = ask_at_once(sessions(&[tier.proxy()], 5).await?, flights::SLOW);
    until(async || Ok(cache_figure(tier.proxy(), "lease_waits").await? > waits)).await?;
    others[0].kill_weir();
    while dying.join_next().await.is_some() {}
    while let Some(answer) = answers.join_next().await {
        assert_eq!(answer??, ["4000000"]);
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // One for each, and none for who waited, unless it waited for so long that it asked for itself (5 s): that is the machine's pace.
    let statements = asked(&tier, flights::SLOW) - before;
    assert!((2..=6).contains(&statements), "{statements}");
    Ok(())
}
