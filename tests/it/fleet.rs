//! Several proxies in front of the same servers: what one has acknowledged, none shows less of, whatever dies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_postgres::Client;
use weir_harness::{Proxy, Tier};

use crate::freshness::{cache_figure, until};
use crate::placement::{column, create_schema};
use crate::tls::Authority;

pub async fn name_of(client: &Client, user: i64) -> Result<String> {
    Ok(client.query_one("SELECT name FROM users WHERE user_id = $1", &[&user]).await?.get(0))
}

/// Reads until the proxy answers from its own cache.
pub async fn warm(proxy: &Proxy, client: &Client, user: i64) -> Result<()> {
    until(async || {
        let before = cache_figure(proxy, "hits_memory").await?;
        name_of(client, user).await?;
        name_of(client, user).await?;
        Ok(cache_figure(proxy, "hits_memory").await? > before)
    })
    .await
}

async fn tier_of_two() -> Result<(Tier, Proxy)> {
    let tier = Tier::builder().shards(2).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    Ok((tier, other))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_through_one_proxy_is_seen_through_the_other() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann'), (2, 'Ben')", &[]).await?;
    for user in [1, 2] {
        warm(&other, &there, user).await?;
        warm(tier.proxy(), &here, user).await?;
    }
    let hits = cache_figure(&other, "hits_memory").await?;
    for round in 0..200_i64 {
        let name = format!("Ann {round}");
        let (writer, reader) = if round % 2 == 0 { (&here, &there) } else { (&there, &here) };
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        assert_eq!(name_of(reader, 1).await?, name, "through the other proxy, right after the write");
        assert_eq!(name_of(writer, 1).await?, name);
        assert_eq!(name_of(&there, 2).await?, "Ben");
    }
    assert!(cache_figure(&other, "hits_memory").await? > hits + 50, "what nobody wrote stays cached");
    // A transaction over both shards, and one that is rolled back.
    let mut here = here;
    let transaction = here.transaction().await?;
    transaction.execute("UPDATE users SET name = 'both'", &[]).await?;
    transaction.commit().await?;
    assert_eq!(column(&there, "SELECT DISTINCT name FROM users").await?, ["both"]);
    let transaction = here.transaction().await?;
    transaction.execute("UPDATE users SET name = 'neither'", &[]).await?;
    transaction.rollback().await?;
    assert_eq!(name_of(&there, 1).await?, "both");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_changed_through_one_proxy_holds_for_the_other() -> Result<()> {
    let tier = Tier::builder().shards(1).peers(true).start().await?;
    let other = tier.another().await?;
    create_schema(&tier.connect().await?).await?;
    new_triggers_are_known(&tier, &other, true).await
}

/// A trigger made through one proxy counts at once in what another one writes. `at_both`: and what that one has written is seen at
/// once through the first.
pub async fn new_triggers_are_known(tier: &Tier, other: &Proxy, at_both: bool) -> Result<()> {
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.batch_execute("CREATE TABLE audit (user_id bigint)").await?;
    let audited = "SELECT count(*)::text FROM audit";
    until(async || {
        let before = cache_figure(other, "hits_memory").await?;
        assert_eq!(column(&there, audited).await?, ["0"]);
        Ok(cache_figure(other, "hits_memory").await? > before)
    })
    .await?;
    // What the other proxy knows of writes of users is not true any more.
    here.batch_execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO audit VALUES (NEW.user_id); RETURN NEW; END $$;
         CREATE TRIGGER noted AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION note()",
    )
    .await?;
    for user in 1..=20_i64 {
        there.execute("INSERT INTO users (user_id, name) VALUES ($1, 'Ann')", &[&user]).await?;
        assert_eq!(column(&there, audited).await?, [user.to_string()], "what it writes by the new trigger, too");
        if at_both {
            assert_eq!(column(&here, audited).await?, [user.to_string()]);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_is_killed_holds_nobody_up_for_long() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await?;
    other.kill_weir();
    // The write waits until the dead one can serve nothing any more, and then goes through.
    let before = std::time::Instant::now();
    here.execute("UPDATE users SET name = 'Bea' WHERE user_id = 1", &[]).await?;
    assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
    assert_eq!(name_of(&here, 1).await?, "Bea");
    warm(tier.proxy(), &here, 1).await?;
    other.restart_weir().await?;
    let there = other.connect().await?;
    here.execute("UPDATE users SET name = 'Cid' WHERE user_id = 1", &[]).await?;
    assert_eq!(name_of(&there, 1).await?, "Cid");
    warm(&other, &there, 1).await?;
    here.execute("UPDATE users SET name = 'Dan' WHERE user_id = 1", &[]).await?;
    assert_eq!(name_of(&there, 1).await?, "Dan");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_was_stopped_serves_nothing_old_when_it_goes_on() -> Result<()> {
    let (tier, other) = tier_of_two().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    warm(&other, &there, 1).await?;
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let client = other.connect().await?;
        let read = client.prepare("SELECT name FROM users WHERE user_id = 1").await?;
        client.query_one(&read, &[]).await?;
        waiting.push((client, read));
    }
    let pid = Pid::from_raw(other.weir_pid().context("it runs")?.cast_signed()).context("a pid")?;
    kill_process(pid, Signal::STOP)?;
    let wrote = here.execute("UPDATE users SET name = 'Bea' WHERE user_id = 1", &[]).await;
    // It has heard of nothing, its cache still has the old name, and these reads are the first it finds when it goes on.
    let asked = waiting.into_iter().map(|(client, read)| {
        tokio::spawn(async move { anyhow::Ok(client.query_one(&read, &[]).await?.get::<_, String>(0)) })
    });
    let asked: Vec<_> = asked.collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    kill_process(pid, Signal::CONT)?;
    wrote?;
    for answer in asked {
        assert_eq!(answer.await??, "Bea");
    }
    assert_eq!(name_of(&there, 1).await?, "Bea");
    warm(&other, &there, 1).await?;
    there.execute("UPDATE users SET name = 'Cid' WHERE user_id = 1", &[]).await?;
    assert_eq!(name_of(&here, 1).await?, "Cid");
    Ok(())
}

/// Passes bytes on between peers until it is told to do otherwise.
pub struct Relay {
    pub port: u16,
    pub does: watch::Sender<Passing>,
}

/// What becomes of bytes between peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Passing {
    On,
    /// They wait.
    Held,
    /// Connections end, and new ones at once.
    Cut,
}

impl Relay {
    pub async fn start(to: u16) -> Result<Relay> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let does = watch::Sender::new(Passing::On);
        let doing = does.subscribe();
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let Ok(to) = TcpStream::connect(("127.0.0.1", to)).await else { continue };
                let ((from_read, from_write), (to_read, to_write)) = (from.into_split(), to.into_split());
                tokio::spawn(pass_on(from_read, to_write, doing.clone()));
                tokio::spawn(pass_on(to_read, from_write, doing.clone()));
            }
        });
        Ok(Relay { port, does })
    }
}

async fn pass_on(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut does: watch::Receiver<Passing>) -> Result<()> {
    let mut buffer = vec![0; 4096];
    let mut cut = does.clone();
    loop {
        let count = tokio::select! {
            count = from.read(&mut buffer) => count?,
            _ = cut.wait_for(|does| *does == Passing::Cut) => return Ok(()),
        };
        let doing = *does.wait_for(|does| *does != Passing::Held).await?;
        if count == 0 || doing == Passing::Cut {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_cannot_be_told_serves_nothing_old() -> Result<()> {
    let tier = Tier::builder().shards(1).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let listens = weir_harness::free_port()?;
    let relay = Relay::start(listens).await?;
    let other = tier.another_behind(Some((relay.port, listens))).await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    for round in 0..3 {
        warm(&other, &there, 1).await?;
        relay.does.send_replace(Passing::Held);
        let name = format!("Bea {round}");
        here.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        for _ in 0..20 {
            assert_eq!(name_of(&there, 1).await?, name, "it has heard nothing, and must not trust its cache");
        }
        // Nor does it write behind the other's back.
        let wrote = there.execute("UPDATE users SET name = 'Cid' WHERE user_id = 1", &[]).await;
        let expected = if wrote.is_ok() { "Cid" } else { &name };
        assert_eq!(name_of(&here, 1).await?, expected);
        relay.does.send_replace(Passing::On);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_use_what_others_have_stored_in_redis() -> Result<()> {
    let tier = Tier::builder().shards(2).redis(true).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    for user in 1..=40_i64 {
        here.execute("INSERT INTO users (user_id, name) VALUES ($1, 'Ann')", &[&user]).await?;
    }
    // Whichever of the two asks the other for its stamps: in time each finds what the other has stored.
    for (stores, finds, reader, finder) in
        [(tier.proxy(), &other, &here, &there), (&other, tier.proxy(), &there, &here)]
    {
        let mut user = 0;
        until(async || {
            user = user % 40 + 1;
            here.execute("UPDATE users SET name = 'Bea' WHERE user_id = $1", &[&user]).await?;
            warm(stores, reader, user).await?;
            let before = cache_figure(finds, "hits_redis").await?;
            assert_eq!(name_of(finder, user).await?, "Bea");
            Ok(cache_figure(finds, "hits_redis").await? > before)
        })
        .await?;
    }
    // What is found there is never old.
    for round in 0..200_i64 {
        let (user, name) = (round % 5 + 1, format!("Cid {round}"));
        let (writer, reader) = if round % 2 == 0 { (&here, &there) } else { (&there, &here) };
        writer.execute("UPDATE users SET name = $1 WHERE user_id = $2", &[&name, &user]).await?;
        assert_eq!(name_of(reader, user).await?, name);
        assert_eq!(name_of(writer, user).await?, name);
    }
    Ok(())
}

/// One register per key; `told` is the highest value that was acknowledged.
pub struct Register {
    pub user: i64,
    pub told: AtomicI64,
}

/// Never backwards, also when a server still works on what a dead proxy sent.
const WRITE: &str = "UPDATE users SET name = $1 WHERE user_id = $2 AND name::int8 < $3";

pub async fn keep_writing(proxies: &[&Proxy], register: &Register, stop: &AtomicBool) -> Result<()> {
    let mut turn = 0;
    let mut value = 0;
    while !stop.load(Ordering::SeqCst) {
        turn += 1;
        let Ok(client) = proxies[turn % proxies.len()].connect().await else { continue };
        for _ in 0..20 {
            value += 1;
            let name = value.to_string();
            let wrote = client.execute(WRITE, &[&name, &register.user, &value]).await;
            if wrote.is_err() {
                break;
            }
            register.told.fetch_max(value, Ordering::SeqCst);
        }
    }
    Ok(())
}

/// Every read shows at least what was acknowledged, and what anybody had read, before it began.
pub async fn keep_reading(proxy: &Proxy, register: &Register, stop: &AtomicBool) -> Result<u64> {
    let mut reads = 0;
    while !stop.load(Ordering::SeqCst) {
        let Ok(client) = proxy.connect().await else { continue };
        loop {
            let least = register.told.load(Ordering::SeqCst);
            let Ok(name) = name_of(&client, register.user).await else { break };
            let value: i64 = name.parse()?;
            anyhow::ensure!(value >= least, "user {}: {value} was read after {least}", register.user);
            register.told.fetch_max(value, Ordering::SeqCst);
            reads += 1;
            if stop.load(Ordering::SeqCst) || reads % 500 == 0 {
                break;
            }
        }
    }
    Ok(reads)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_stay_fresh_while_proxies_die_and_join() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).peers(true).start().await?;
    create_schema(&tier.connect().await?).await?;
    let (second, third) = (tier.another().await?, tier.another().await?);
    let proxies = [tier.proxy(), &second, &third];
    let client = tier.connect().await?;
    let registers: Vec<Arc<Register>> =
        (1..=3).map(|user| Arc::new(Register { user, told: AtomicI64::new(0) })).collect();
    for register in &registers {
        client.execute("INSERT INTO users (user_id, name) VALUES ($1, '0')", &[&register.user]).await?;
    }
    let stop = AtomicBool::new(false);
    let disturb = async {
        for round in 0..4 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            let victim = proxies[round % 3];
            victim.kill_weir();
            tokio::time::sleep(Duration::from_millis(300)).await;
            victim.restart_weir().await?;
        }
        tokio::time::sleep(Duration::from_millis(1500)).await;
        stop.store(true, Ordering::SeqCst);
        anyhow::Ok(())
    };
    let writers = futures_util::future::try_join_all(registers.iter().map(|one| keep_writing(&proxies, one, &stop)));
    let readers = futures_util::future::try_join_all(
        registers.iter().flat_map(|one| proxies.iter().map(|proxy| keep_reading(proxy, one, &stop))),
    );
    let ((), _, reads) = tokio::try_join!(disturb, writers, readers)?;
    let reads: u64 = reads.iter().sum();
    assert!(reads > 100, "{reads} reads");
    // Nothing old is left anywhere.
    for register in &registers {
        let truth =
            column(&client_of(&tier).await?, &format!("SELECT name FROM users WHERE user_id = {}", register.user))
                .await?;
        for proxy in proxies {
            let client = proxy.connect().await?;
            warm(proxy, &client, register.user).await?;
            assert_eq!(name_of(&client, register.user).await?, truth[0]);
        }
    }
    Ok(())
}

/// A connection beside weir.
async fn client_of(tier: &Tier) -> Result<Client> {
    tier.shards[0].primary.admin("shop").await
}

/// Lines of the section of a peer whose certificate is for these hosts.
fn section(authority: &Authority, hosts: &[&str], name: &str) -> Result<String> {
    authority.sign(name, hosts)?;
    let file = |end: &str| authority.path(&format!("{name}.{end}")).display().to_string();
    let ca = authority.path("ca.crt");
    Ok(format!("ca = '{}'\ncertificate = '{}'\nkey = '{}'\n", ca.display(), file("crt"), file("key")))
}

/// Each reads at once what the other has written.
async fn hear_each_other(here: &Client, there: &Client) -> Result<()> {
    for round in 0..40_usize {
        warm_once(here).await?;
        let name = format!("round {round}");
        let (writer, reader) = if round % 2 == 0 { (here, there) } else { (there, here) };
        writer.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&name]).await?;
        assert_eq!(name_of(reader, 1).await?, name);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_peers_are_read_again() -> Result<()> {
    let (first, next) = (Authority::new()?, Authority::new()?);
    let tier =
        Tier::builder().shards(1).peers_with(&section(&first, &["127.0.0.1"], "one")?).lease("2s").start().await?;
    let here = tier.connect().await?;
    create_schema(&here).await?;
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    let hang_up = || {
        let pid = Pid::from_raw(tier.weir_pid().context("it runs")?.cast_signed()).context("a pid")?;
        anyhow::Ok(kill_process(pid, Signal::HUP)?)
    };
    let said = async |text: &str| until(async || Ok(tier.weir_log().contains(text))).await;
    // A file that is wrong changes nothing; the files of another authority count for whoever comes from then on.
    let key = std::fs::read(first.path("one.key"))?;
    std::fs::write(first.path("one.key"), "no key")?;
    hang_up()?;
    said("the configuration stays as it is").await?;
    std::fs::write(first.path("one.key"), key)?;
    section(&next, &["127.0.0.1"], "one")?;
    for file in ["ca.crt", "one.crt", "one.key"] {
        std::fs::copy(next.path(file), first.path(file))?;
    }
    hang_up()?;
    said("configuration reloaded").await?;
    ensure!(!tier.weir_log().contains("need a restart"), "{}", tier.weir_log());
    let other = tier.another_with(&section(&next, &["127.0.0.1"], "two")?).await?;
    let there = other.connect().await?;
    hear_each_other(&here, &there).await?;
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_speak_tls_and_only_to_their_own() -> Result<()> {
    let (ours, others) = (Authority::new()?, Authority::new()?);
    let tier =
        Tier::builder().shards(1).peers_with(&section(&ours, &["127.0.0.1"], "one")?).lease("2s").start().await?;
    let here = tier.connect().await?;
    create_schema(&here).await?;
    here.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    let other = tier.another_with(&section(&ours, &["127.0.0.1"], "two")?).await?;
    let there = other.connect().await?;
    hear_each_other(&here, &there).await?;
    warm(&other, &there, 1).await?;
    warm(tier.proxy(), &here, 1).await?;
    other.stop_weir();
    // Strangers are not talked to, whatever they show.
    for (lines, said) in [
        (String::new(), "plain TCP"),
        (section(&others, &["127.0.0.1"], "three")?, "TLS failed"),
        (section(&ours, &["elsewhere.example.com"], "four")?, "TLS failed"),
    ] {
        let stranger = tier.another_with(&lines).await?;
        let complaint = || {
            [tier.proxy(), &stranger].iter().any(|proxy| {
                proxy.weir_log().lines().any(|line| line.contains("is not talked to") && line.contains(said))
            })
        };
        until(async || Ok(complaint())).await?;
        stranger.kill_weir();
    }
    Ok(())
}

async fn warm_once(client: &Client) -> Result<()> {
    name_of(client, 1).await?;
    name_of(client, 1).await?;
    Ok(())
}
