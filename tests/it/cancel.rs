//! A cancel request reaches the statement it was sent for, and no other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::NoTls;
use weir_harness::Tier;
use weir_wire::startup::put_cancel;

use crate::placement::column;
use crate::raw::Raw;

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_the_running_statement() -> Result<()> {
    let tier = Tier::builder().shards(2).start().await?;
    let mut raw = Raw::login(&tier.dsn("shop"), &[]).await?;
    weir_wire::frontend::put_query(&mut raw.out, "SELECT pg_sleep(30)");
    raw.flush().await?;
    cancel_until_answered(&tier, &mut raw).await?;
    let (tags, bodies) = raw.until_ready().await?;
    assert!(tags.ends_with("EZ"), "{tags}");
    assert_eq!(crate::raw::error_text(&bodies[bodies.len() - 2]), "57014 canceling statement due to user request");
    assert_eq!(raw.query("SELECT 1").await?.1, ["1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_came_to_another_proxy_is_passed_on() -> Result<()> {
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    let other = tier.another().await?;
    let mut raw = Raw::login(&other.dsn("shop"), &[]).await?;
    weir_wire::frontend::put_query(&mut raw.out, "SELECT pg_sleep(30)");
    raw.flush().await?;
    // A wrong secret reaches nobody, here or there.
    cancel(&tier, raw.process, &[1; 4]).await?;
    cancel_until_answered(&tier, &mut raw).await?;
    let (_, bodies) = raw.until_ready().await?;
    assert_eq!(crate::raw::error_text(&bodies[bodies.len() - 2]), "57014 canceling statement due to user request");
    assert_eq!(raw.query("SELECT 1").await?.1, ["1"]);
    Ok(())
}

/// Until the statement runs a cancel has nothing to end, so it is repeated. None is under way afterwards.
async fn cancel_until_answered(tier: &Tier, raw: &mut Raw) -> Result<()> {
    let start = Instant::now();
    loop {
        cancel(tier, raw.process, &raw.secret).await?;
        if tokio::time::timeout(Duration::from_millis(100), raw.peeked()).await.is_ok() {
            return Ok(());
        }
        assert!(start.elapsed() < Duration::from_secs(20), "never cancelled");
    }
}

/// One Backend, two clients: one floods cancels while the other works. None may hit the other.
#[tokio::test(flavor = "multi_thread")]
async fn late_cancels_never_hit_another_client() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 1").start().await?;
    let (hostile, victim) = (tier.connect().await?, tier.connect().await?);
    let token = hostile.cancel_token();
    let flood = tokio::spawn(async move {
        for _ in 0..150 {
            let (_, cancelled) = tokio::join!(hostile.batch_execute("SELECT 1"), token.cancel_query(NoTls));
            cancelled.ok();
        }
        hostile
    });
    let mut served = 0;
    while !flood.is_finished() {
        assert_eq!(column(&victim, "SELECT 'mine' FROM pg_sleep(0.002)").await?, ["mine"]);
        served += 1;
    }
    assert!(served > 0);
    flood.await?;
    Ok(())
}

/// Sends a CancelRequest and waits until it has been dealt with.
async fn cancel(tier: &Tier, process: i32, secret: &[u8]) -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
    let mut request = BytesMut::new();
    put_cancel(&mut request, process, secret);
    stream.write_all(&request).await?;
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut [0; 1])).await.context("closed")?;
    assert_eq!(read.unwrap_or(0), 0, "a cancel request is never answered");
    Ok(())
}

fn code_of(result: Result<(), tokio_postgres::Error>) -> Option<String> {
    result.err().and_then(|error| error.code().map(|code| code.code().to_owned()))
}

/// How many clients wait for a Backend, as the console says.
async fn waiting(tier: &Tier) -> Result<u64> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let mut waiting = 0;
    for message in console.simple_query("SHOW POOLS").await? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            waiting += row.get("cl_waiting").unwrap_or("0").parse::<u64>()?;
        }
    }
    Ok(waiting)
}

async fn until_waiting(tier: &Tier, wanted: u64) -> Result<()> {
    let start = Instant::now();
    while waiting(tier).await? != wanted {
        if start.elapsed() > Duration::from_secs(10) {
            bail!("never saw {wanted} clients waiting");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_waits_for_a_backend_is_cancelled() -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra("[pool]\nsize = 1\nwait_queue_max = 1").start().await?;
    let (holder, waiter) = (tier.connect().await?, tier.connect().await?);
    holder.batch_execute("BEGIN; SELECT 1").await?;
    for round in 0..20 {
        // The queue has one place: if a cancelled statement kept it, the next round would be refused.
        let token = waiter.cancel_token();
        let (waited, cancelled) = tokio::join!(waiter.simple_query("SELECT 'never'"), async {
            until_waiting(&tier, 1).await?;
            anyhow::Ok(token.cancel_query(NoTls).await?)
        });
        cancelled?;
        let error = waited.expect_err("cancelled");
        let error = error.as_db_error().context("a server error")?;
        assert_eq!(
            (error.code().code(), error.message()),
            ("57014", "canceling statement due to user request"),
            "{round}"
        );
        until_waiting(&tier, 0).await?;
    }
    // In a transaction it aborts it, as on Postgres; and the extended protocol waits alike.
    waiter.batch_execute("BEGIN").await?;
    let token = waiter.cancel_token();
    let (waited, cancelled) = tokio::join!(waiter.query("SELECT 1", &[]), async {
        until_waiting(&tier, 1).await?;
        anyhow::Ok(token.cancel_query(NoTls).await?)
    });
    cancelled?;
    assert_eq!(code_of(waited.map(drop)).as_deref(), Some("57014"));
    holder.batch_execute("COMMIT").await?;
    assert_eq!(code_of(waiter.batch_execute("SELECT 1").await).as_deref(), Some("25P02"));
    waiter.batch_execute("ROLLBACK").await?;
    assert_eq!(column(&waiter, "SELECT 'served'").await?, ["served"]);
    Ok(())
}

/// Several clients on one Backend, each cancelled at random moments: of waiting, running and finished statements. Whoever was not
/// sent a cancel must never be hit, and neither a later statement of whoever was.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_cancels_never_hit_a_later_statement() -> Result<()> {
    let tier = Tier::builder().shards(2).config_extra("[pool]\nsize = 1").start().await?;
    let deadline = Instant::now() + Duration::from_secs(30);
    let hunts = (0..3).map(|seed| hunt(&tier, seed, deadline));
    let hunted = futures_util::future::try_join_all(hunts);
    let watched = async {
        let victim = tier.connect().await?;
        for _ in 0..100 {
            assert_eq!(column(&victim, "SELECT 'mine' FROM pg_sleep(0.001)").await?, ["mine"]);
        }
        anyhow::Ok(())
    };
    let (hunted, watched) = tokio::join!(hunted, watched);
    watched?;
    let (races, hits) = hunted?.into_iter().fold((0, 0), |sum, hunt| (sum.0 + hunt.0, sum.1 + hunt.1));
    assert!(races >= 300 && hits > 0, "{races} races, {hits} hits");
    until_waiting(&tier, 0).await?;
    Ok(())
}

/// Races a statement with its cancel, 150 times; what follows, uncancelled, must succeed. Gives the races and how many hit.
async fn hunt(tier: &Tier, seed: u64, deadline: Instant) -> Result<(u32, u32)> {
    let mut client = Raw::login(&tier.dsn("shop"), &[]).await?;
    let (process, secret) = (client.process, client.secret.clone());
    let (mut races, mut hits, mut state) = (0, 0, seed);
    while races < 150 && Instant::now() < deadline {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let delay = Duration::from_micros((state >> 40) % 4_000);
        let (run, cancelled) = tokio::join!(client.query("SELECT pg_sleep(0.001)"), async {
            tokio::time::sleep(delay).await;
            cancel(tier, process, &secret).await
        });
        cancelled?;
        let (tags, values) = run?;
        match tags.as_str() {
            "TDCZ" => {}
            "EZ" | "TEZ" if values[0].starts_with("57014") => hits += 1,
            _ => bail!("{tags} {values:?}"),
        }
        // The cancel is over, so this statement is not meant by it.
        let (tags, values) = client.query("SELECT 'next' FROM pg_sleep(0.0005)").await?;
        assert_eq!((tags.as_str(), values[0].as_str()), ("TDCZ", "next"), "a later statement was hit");
        races += 1;
    }
    Ok((races, hits))
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_as_long_as_the_protocol_says_and_wrong_ones_do_nothing() -> Result<()> {
    let tier = Tier::builder().shards(1).start().await?;
    for (minor, bytes) in [(0, 4), (1, 4), (2, 32), (9, 32)] {
        let settings: &[(&str, &str)] = if minor == 9 { &[("_pq_.colour", "1"), ("_pq_.more", "x")] } else { &[] };
        let mut raw = Raw::login_minor(&tier.dsn("shop"), minor, settings).await?;
        assert_eq!(raw.secret.len(), bytes, "3.{minor}");
        let wanted = (minor == 9).then(|| (3 << 16 | 2, vec!["_pq_.colour".to_owned(), "_pq_.more".to_owned()]));
        assert_eq!(raw.negotiated, wanted, "3.{minor}");
        weir_wire::frontend::put_query(&mut raw.out, "SELECT pg_sleep(20)");
        raw.flush().await?;
        let (process, secret) = (raw.process, raw.secret.clone());
        let mut wrong = secret.to_vec();
        wrong[bytes - 1] ^= 1;
        for guess in [&wrong[..], &secret[..bytes - 1], &[&secret[..], b"x"].concat(), &[0; 4], &[7; 256]] {
            cancel(&tier, process, guess).await?;
        }
        cancel(&tier, process.wrapping_add(1), &secret).await?;
        let still = tokio::time::timeout(Duration::from_millis(300), raw.next()).await;
        assert!(still.is_err(), "a wrong key ended the statement: {still:?}");
        cancel_until_answered(&tier, &mut raw).await?;
        let (tags, bodies) = raw.until_ready().await?;
        assert!(tags.ends_with("EZ"), "{tags}");
        assert_eq!(crate::raw::error_text(&bodies[bodies.len() - 2]), "57014 canceling statement due to user request");
    }
    let old = Raw::login_minor(&tier.dsn("shop"), 3, &[]).await?;
    assert_eq!(old.negotiated, Some((3 << 16 | 2, Vec::new())), "a newer minor version is talked down");
    let odd = Raw::login_minor(&tier.dsn("shop"), 0, &[("_pq_.x", "1")]).await?;
    assert_eq!(odd.negotiated, Some((3 << 16, vec!["_pq_.x".to_owned()])), "3.0 stays 3.0");
    Ok(())
}
