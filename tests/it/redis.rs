//! Redis as it is run in production: log-ins, TLS, Sentinel, Cluster. weir finds what is there, and whatever becomes of it, answers
//! stay right.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use weir_harness::{Proxy, Redis, RedisSpec, Run, Tier, free_port, start_redis_cluster};

use crate::fleet::{name_of, warm};
use crate::freshness::{cache_figure, until};
use crate::placement::create_schema;
use crate::tls::Authority;

/// Two proxies with this in their `[cache]`.
async fn tier_with(cache: &str) -> Result<(Tier, Proxy)> {
    let tier = Tier::builder().shards(1).peers(true).config_extra(&format!("[cache]\n{cache}")).start().await?;
    create_schema(&tier.connect().await?).await?;
    let other = tier.another().await?;
    Ok((tier, other))
}

/// Returns when one proxy has answered from what the other has stored in Redis. Users from `first` on are made for it.
async fn finds_what_the_other_stored(tier: &Tier, other: &Proxy, first: i64) -> Result<()> {
    let (here, there) = (tier.connect().await?, other.connect().await?);
    // One takes over the other's stamps in its own time, and asks Redis only for what it has not.
    let mut user = first;
    until(async || {
        user += 1;
        let name = format!("Ann {user}");
        here.execute("INSERT INTO users (user_id, name) VALUES ($1, $2)", &[&user, &name]).await?;
        warm(tier.proxy(), &here, user).await?;
        let before = cache_figure(other, "hits_redis").await?;
        assert_eq!(name_of(&there, user).await?, name);
        Ok(cache_figure(other, "hits_redis").await? > before)
    })
    .await
}

/// A file that holds it.
fn secret(run: &Run, word: &str) -> Result<String> {
    let file = run.path().join("secret");
    std::fs::write(&file, format!("{word}\n"))?;
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(file.display().to_string())
}

/// The proxy works, and Redis has never let it in.
async fn works_without_redis(cache: &str) -> Result<()> {
    let tier = Tier::builder().shards(1).config_extra(&format!("[cache]\n{cache}")).start().await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.execute("INSERT INTO users (user_id, name) VALUES (1, 'Ann')", &[]).await?;
    warm(tier.proxy(), &client, 1).await?;
    until(async || Ok(cache_figure(tier.proxy(), "redis_errors").await? > 0)).await?;
    assert_eq!(cache_figure(tier.proxy(), "redis_up").await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_few_rights_is_enough_and_a_wrong_password_is_no_entry() -> Result<()> {
    let run = Run::temporary("test")?;
    let lines = "user default on nopass -@all +ping\n\
                 user weir on >s3cret:/@ ~weir:* ~{weir:* -@all +get +set +del +ping\n";
    let spec = RedisSpec { lines: lines.to_owned(), ..RedisSpec::default() };
    let redis = Redis::start_as(&run, spec).await?;
    let file = secret(&run, "s3cret:/@")?;
    let url = redis.url();
    let (tier, other) =
        tier_with(&format!("redis = {url:?}\nredis_user = \"weir\"\nredis_password_file = {file:?}")).await?;
    finds_what_the_other_stored(&tier, &other, 0).await?;
    assert!(!tier.weir_log().contains("s3cret"));
    drop((tier, other));

    let in_url = url.replace("//", "//weir:s3cret%3A%2F%40@");
    let (tier, other) = tier_with(&format!("redis = {in_url:?}")).await?;
    finds_what_the_other_stored(&tier, &other, 0).await?;
    works_without_redis(&format!("redis = {:?}", url.replace("//", "//weir:wrong@"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_reached_over_tls_with_certificates_of_ones_own() -> Result<()> {
    let authority = Authority::new()?;
    for name in ["redis", "client"] {
        authority.sign(name, &["127.0.0.1"])?;
    }
    let file = |name: &str| Ok::<_, anyhow::Error>((name.to_owned(), std::fs::read_to_string(authority.path(name))?));
    let run = Run::temporary("test")?;
    let port = free_port()?;
    let spec = RedisSpec {
        lines: format!(
            "tls-port {port}\ntls-cert-file redis.crt\ntls-key-file redis.key\ntls-ca-cert-file ca.crt\ntls-auth-clients yes\n"
        ),
        files: vec![file("redis.crt")?, file("redis.key")?, file("ca.crt")?],
        ..RedisSpec::default()
    };
    let _redis = Redis::start_as(&run, spec).await?;
    let url = format!("redis = \"rediss://127.0.0.1:{port}\"");
    let ca = format!("redis_ca = '{}'", authority.path("ca.crt").display());
    let identity = |authority: &Authority| {
        let (certificate, key) = (authority.path("client.crt"), authority.path("client.key"));
        format!("redis_certificate = '{}'\nredis_key = '{}'", certificate.display(), key.display())
    };
    let (tier, other) = tier_with(&[&*url, &ca, &identity(&authority)].join("\n")).await?;
    finds_what_the_other_stored(&tier, &other, 0).await?;
    drop((tier, other));
    let stranger = Authority::new()?;
    stranger.sign("client", &[])?;
    works_without_redis(&[&*url, &identity(&authority)].join("\n")).await?;
    works_without_redis(&[&*url, &ca].join("\n")).await?;
    works_without_redis(&[&*url, &ca, &identity(&stranger)].join("\n")).await
}

/// A master with a replica, and a Sentinel that watches them; each asks for a password.
struct Watched {
    master: Redis,
    replica: Redis,
    sentinel: Redis,
}

impl Watched {
    async fn start(run: &Arc<Run>) -> Result<Self> {
        let server = |name: &str, lines: String| RedisSpec {
            name: name.to_owned(),
            password: Some("theirs".to_owned()),
            lines: format!("masterauth theirs\nrepl-diskless-sync-delay 0\n{lines}"),
            ..RedisSpec::default()
        };
        let master = Redis::start_as(run, server("redis-a", String::new())).await?;
        let follow = format!("replicaof 127.0.0.1 {}\n", master.port());
        let replica = Redis::start_as(run, server("redis-b", follow)).await?;
        let lines = format!(
            "sentinel monitor shop 127.0.0.1 {} 1\nsentinel auth-pass shop theirs\n\
             sentinel down-after-milliseconds shop 1000\nsentinel failover-timeout shop 5000\n",
            master.port()
        );
        let password = Some("its-own".to_owned());
        let spec = RedisSpec { name: "sentinel".to_owned(), password, lines, sentinel: true, ..RedisSpec::default() };
        let sentinel = Redis::start_as(run, spec).await?;
        let watched = Watched { master, replica, sentinel };
        until(async || Ok(watched.sentinel.command("SENTINEL MASTER shop").await?.contains("num-slaves\r\n$1\r\n1")))
            .await?;
        until(async || Ok(watched.replica.command("INFO replication").await?.contains("master_link_status:up")))
            .await?;
        Ok(watched)
    }

    /// Behind a Sentinel that is not there.
    fn cache(&self, run: &Run) -> Result<String> {
        let (nobody, file) = (free_port()?, secret(run, "its-own")?);
        Ok(format!(
            "redis = \"redis+sentinel://:theirs@127.0.0.1:{nobody},127.0.0.1:{}/shop\"\nredis_sentinel_password_file = {file:?}",
            self.sentinel.port()
        ))
    }

    async fn replica_is_master(&self) -> Result<()> {
        // Whom a Sentinel promotes closes his connections, also the one that asks.
        until(async || Ok(self.replica.command("ROLE").await.is_ok_and(|role| role.contains("master")))).await?;
        until(async || {
            let named = self.sentinel.command("SENTINEL get-master-addr-by-name shop").await?;
            Ok(named.contains(&self.replica.port().to_string()))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_lead_to_the_next_master() -> Result<()> {
    let run = Run::temporary("test")?;
    let watched = Watched::start(&run).await?;
    let (tier, other) = tier_with(&watched.cache(&run)?).await?;
    finds_what_the_other_stored(&tier, &other, 0).await?;
    ensure!(watched.sentinel.command("SENTINEL FAILOVER shop").await? == "+OK\r\n");
    watched.replica_is_master().await?;
    finds_what_the_other_stored(&tier, &other, 1000).await?;
    ensure!(!watched.replica.command("DBSIZE").await?.starts_with(":0"), "what is stored now is stored there");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_to_a_stale_copy_costs_misses_alone() -> Result<()> {
    const USERS: i64 = 20;
    let run = Run::temporary("test")?;
    let watched = Watched::start(&run).await?;
    let (tier, other) = tier_with(&watched.cache(&run)?).await?;
    let (here, there) = (tier.connect().await?, other.connect().await?);
    for user in 1..=USERS {
        here.execute("INSERT INTO users (user_id, name) VALUES ($1, 'old')", &[&user]).await?;
        warm(tier.proxy(), &here, user).await?;
        warm(&other, &there, user).await?;
    }
    until(async || {
        let sizes = [watched.master.command("DBSIZE").await?, watched.replica.command("DBSIZE").await?];
        Ok(sizes[0] == sizes[1] && sizes[0][1..].trim().parse::<i64>()? >= USERS)
    })
    .await?;
    // The copy learns nothing of what is written now, and then is the one that is asked.
    let copy = Pid::from_raw(watched.replica.pid().context("it runs")?.cast_signed()).context("a pid")?;
    kill_process(copy, Signal::STOP)?;
    for user in 1..=USERS {
        here.execute("UPDATE users SET name = 'new' WHERE user_id = $1", &[&user]).await?;
        warm(tier.proxy(), &here, user).await?;
    }
    watched.master.kill9();
    kill_process(copy, Signal::CONT)?;
    watched.replica_is_master().await?;
    until(async || Ok(cache_figure(&other, "redis_up").await? == 1)).await?;
    // This one has nothing in memory: it asks Redis.
    let third = tier.another().await?;
    let asks = third.connect().await?;
    let errors = cache_figure(&third, "misses_redis").await?;
    // Not before the others tell it of their writes.
    until(async || {
        for user in 1..=USERS {
            for client in [&asks, &there, &here] {
                assert_eq!(name_of(client, user).await?, "new");
            }
        }
        Ok(cache_figure(&third, "misses_redis").await? > errors)
    })
    .await
    .context("Redis was asked")?;
    finds_what_the_other_stored(&tier, &other, 1000).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_has_each_entry_at_the_master_of_its_slot() -> Result<()> {
    let run = Run::temporary("test")?;
    let masters = start_redis_cluster(&run, 3).await?;
    let seeds: Vec<String> = masters[..2].iter().map(|master| format!("127.0.0.1:{}", master.port())).collect();
    let (tier, other) = tier_with(&format!("redis = \"redis+cluster://{}\"", seeds.join(","))).await?;
    finds_what_the_other_stored(&tier, &other, 0).await?;
    let here = tier.connect().await?;
    for user in 1001..=1040_i64 {
        here.execute("INSERT INTO users (user_id, name) VALUES ($1, 'Ann')", &[&user]).await?;
    }
    for master in &masters {
        until(async || {
            // What was read while its write was not over was not stored.
            for user in 1001..=1040_i64 {
                name_of(&here, user).await?;
            }
            Ok(!master.command("DBSIZE").await?.starts_with(":0"))
        })
        .await?;
    }
    assert_eq!(cache_figure(&other, "redis_servers").await?, 3);
    assert_eq!(cache_figure(&other, "redis_errors").await?, 0, "nobody was asked for another's keys");

    masters[2].kill9();
    // What became of a server is noticed by who asks it for something.
    let there = other.connect().await?;
    let asks_until = async |figure: &str, expected: i64| {
        until(async || {
            for user in 1001..=1040_i64 {
                here.execute("UPDATE users SET name = 'Bea' WHERE user_id = $1", &[&user]).await?;
                assert_eq!(name_of(&there, user).await?, "Bea");
            }
            Ok(cache_figure(&other, figure).await? == expected)
        })
        .await
        .with_context(|| format!("{figure} = {expected}"))
    };
    asks_until("redis_servers_up", 2).await?;
    finds_what_the_other_stored(&tier, &other, 2000).await?;
    masters[2].restart().await?;
    asks_until("redis_servers_up", 3).await?;

    // Its slots go to another. It is told first: of two who call a slot theirs, the others believe the one with the later epoch.
    let heir = masters[0].command("CLUSTER MYID").await?;
    let heir = heir.lines().nth(1).context("a name")?.to_owned();
    for master in masters.iter().rev() {
        let mut connection = redis::Client::open(master.url())?.get_multiplexed_async_connection().await?;
        let mut hand_over = redis::pipe();
        for slot in 16_384 * 2 / 3..16_384 {
            hand_over.cmd("CLUSTER").arg("SETSLOT").arg(slot).arg("NODE").arg(&heir).ignore();
        }
        redis::cmd("FLUSHALL").query_async::<()>(&mut connection).await?;
        hand_over.query_async::<()>(&mut connection).await?;
    }
    asks_until("redis_servers", 2).await?;
    finds_what_the_other_stored(&tier, &other, 3000).await
}
