//! Writes that go round weir: seen in the WAL, so that neither the cache nor a replica keeps showing what was before.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::SinkExt as _;
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::Tier;

use crate::placement::{column, create_schema};

/// Well below cache.max_age, which is the default of a minute: what is gone by then was told.
const SOON: Duration = Duration::from_secs(30);

/// One column of SHOW DECODING, of every shard.
async fn shown(tier: &Tier, name: &str) -> Result<Vec<String>> {
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    let messages = console.simple_query("SHOW DECODING").await?;
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(name).unwrap_or_default().to_owned()),
        _ => None,
    });
    Ok(rows.collect())
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<Duration> {
    let start = Instant::now();
    while !holds().await? {
        ensure!(start.elapsed() < Duration::from_secs(30), "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(start.elapsed())
}

async fn until_up(tier: &Tier) -> Result<()> {
    let all_up = async || Ok(shown(tier, "state").await?.iter().all(|state| state == "up"));
    if let Err(error) = until("every shard is up", all_up).await {
        anyhow::bail!("{error}: {:?}; {}", shown(tier, "reason").await?, tier.weir_log());
    }
    Ok(())
}

/// Waits until what DDL has changed is published.
async fn until_published(tier: &Tier, direct: &Client, table: &str) -> Result<()> {
    let published = format!("SELECT count(*) FROM pg_publication_tables WHERE tablename = '{table}'");
    until(table, async || Ok(column(direct, &published).await? != ["0"])).await?;
    until_up(tier).await
}

/// Reads until the answer comes out of the cache. A write beside weir may have been seen by a read that went past the cache, and be
/// gone again until it is decoded.
async fn cached(tier: &Tier, reader: &Client, probe: &str, expected: &str) -> Result<()> {
    until(probe, async || {
        let before = crate::freshness::cache_figure(tier.proxy(), "hits_memory").await?;
        let as_expected = column(reader, probe).await?.join(",") == expected;
        Ok(as_expected && crate::freshness::cache_figure(tier.proxy(), "hits_memory").await? > before)
    })
    .await?;
    Ok(())
}

/// Reads until the answer stays the new one: how long that took. Until the write is decoded, a read that goes past the cache, because
/// this weir is not sure of something just then, shows it sooner than those that do not; after that it never goes back.
async fn seen(readers: &[Client], probe: &str, expected: &str) -> Result<Duration> {
    const IN_A_ROW: usize = 30;
    let start = Instant::now();
    let (mut took, mut in_a_row) = (Duration::ZERO, 0);
    for reader in readers.iter().cycle() {
        if in_a_row == IN_A_ROW {
            break;
        }
        let answer = column(reader, probe).await?.join(",");
        if answer == expected {
            in_a_row += 1;
        } else {
            took = start.elapsed();
            in_a_row = 0;
            ensure!(took < SOON, "{probe} still shows {answer:?}, not {expected}");
        }
    }
    Ok(took)
}

const OBJECTS: &str = "
CREATE TABLE audit (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO audit (what) VALUES (new.name); RETURN new; END $$;
CREATE TABLE watched (id bigint PRIMARY KEY, name text);
CREATE TRIGGER note AFTER UPDATE ON watched FOR EACH ROW EXECUTE FUNCTION note();
CREATE TABLE parents (id bigint PRIMARY KEY);
CREATE TABLE children (id bigint PRIMARY KEY, parent bigint REFERENCES parents ON DELETE CASCADE);
CREATE TABLE bare (id bigint, name text);
CREATE TABLE whole (id bigint, name text);
ALTER TABLE whole REPLICA IDENTITY FULL;
CREATE TABLE keyed_apart (id bigint PRIMARY KEY, name text)";

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_write_beside_weir_is_seen() -> Result<()> {
    let tier = Tier::builder().shards(1).replicas(1).start().await?;
    let direct = tier.shards[0].primary.admin("shop").await?;
    let readers = [tier.connect().await?, tier.connect().await?];
    create_schema(&readers[0]).await?;
    direct.batch_execute(OBJECTS).await?;
    direct
        .batch_execute(
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO shop; INSERT INTO users (user_id, name) SELECT i, 'a' FROM generate_series(1, 20) i;
             INSERT INTO watched VALUES (1, 'a'); INSERT INTO parents VALUES (1); INSERT INTO children VALUES (1, 1), (2, 1);
             INSERT INTO whole VALUES (1, 'a')",
        )
        .await?;
    until_published(&tier, &direct, "keyed_apart").await?;
    let named = "SELECT string_agg(name, ',' ORDER BY user_id) FROM users WHERE user_id IN (1, 2)";
    let of = |key: i64| format!("SELECT name FROM users WHERE user_id = {key}");
    let cases = [
        ("UPDATE users SET name = 'b' WHERE user_id = 1", vec![(of(1), "a", "b"), (named.into(), "a,a", "b,a")]),
        ("UPDATE users SET user_id = 1002 WHERE user_id = 2", vec![(of(2), "a", ""), (of(1002), "", "a")]),
        ("INSERT INTO users (user_id, name) VALUES (77, 'new')", vec![(of(77), "", "new")]),
        (
            "DELETE FROM users WHERE user_id = 3",
            vec![(of(3), "a", ""), ("SELECT count(*) FROM users".into(), "21", "20")],
        ),
        ("UPDATE watched SET name = 'b'", vec![("SELECT count(*) FROM audit".into(), "0", "1")]),
        ("DELETE FROM parents", vec![("SELECT count(*) FROM children".into(), "2", "0")]),
        ("INSERT INTO bare VALUES (1, 'a')", vec![("SELECT count(*) FROM bare".into(), "0", "1")]),
        ("UPDATE whole SET name = 'b'", vec![("SELECT name FROM whole".into(), "a", "b")]),
        (
            "BEGIN; UPDATE users SET name = '2pc' WHERE user_id = 4; PREPARE TRANSACTION 'mine'; COMMIT PREPARED 'mine'",
            vec![(of(4), "a", "2pc")],
        ),
        ("BEGIN; UPDATE users SET name = 'rolled' WHERE user_id = 5; ROLLBACK", vec![(of(5), "a", "a")]),
        ("TRUNCATE bare", vec![("SELECT count(*) FROM bare".into(), "1", "0")]),
        ("TRUNCATE users CASCADE", vec![(of(1), "b", ""), ("SELECT count(*) FROM users".into(), "20", "0")]),
    ];
    for (write, probes) in &cases {
        for (probe, before, _) in probes {
            cached(&tier, &readers[0], probe, before).await.with_context(|| (*write).to_owned())?;
        }
        for part in write.split("; ") {
            direct.batch_execute(part).await?;
        }
        for (probe, _, after) in probes {
            seen(&readers, probe, after).await.with_context(|| tier.weir_log()).with_context(|| (*write).to_owned())?;
        }
    }
    cached(&tier, &readers[0], "SELECT count(*) FROM keyed_apart", "0").await?;
    let sink = direct.copy_in("COPY keyed_apart FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    sink.send(bytes::Bytes::from_static(b"1\ta\n2\tb\n")).await?;
    sink.finish().await?;
    seen(&readers, "SELECT count(*) FROM keyed_apart", "2").await.with_context(|| tier.weir_log())?;
    ensure!(shown(&tier, "gaps").await?[0].contains("public.bare"), "{:?}", shown(&tier, "gaps").await?);
    Ok(())
}

/// A tier of one shard with the usual tables and 50 users named "a", decoded.
async fn with_users(builder: weir_harness::Builder) -> Result<(Tier, Client, Client)> {
    let tier = builder.shards(1).start().await?;
    let direct = tier.shards[0].primary.admin("shop").await?;
    let client = tier.connect().await?;
    create_schema(&client).await?;
    client.batch_execute("INSERT INTO users (user_id, name) SELECT i, 'a' FROM generate_series(1, 50) i").await?;
    until_published(&tier, &direct, "settings").await?;
    Ok((tier, direct, client))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_holds_nobody_up() -> Result<()> {
    let (tier, mut direct, client) = with_users(Tier::builder()).await?;
    let other = tier.shards[0].primary.admin("shop").await?;
    let readers = [client];
    cached(&tier, &readers[0], "SELECT count(*) FROM products", "0").await?;
    let large = direct.transaction().await?;
    large.batch_execute("INSERT INTO products SELECT i, repeat('x', 50), i FROM generate_series(1, 100000) i").await?;
    for round in 0..5 {
        let (probe, old) =
            ("SELECT name FROM users WHERE user_id = 7", if round == 0 { "a".to_owned() } else { round.to_string() });
        cached(&tier, &readers[0], probe, &old).await?;
        let new = (round + 1).to_string();
        other.execute("UPDATE users SET name = $1 WHERE user_id = 7", &[&new]).await?;
        seen(&readers, probe, &new).await.with_context(|| tier.weir_log())?;
    }
    cached(&tier, &readers[0], "SELECT count(*) FROM products", "0").await?;
    large.commit().await?;
    seen(&readers, "SELECT count(*) FROM products", "100000").await.with_context(|| tier.weir_log())?;
    // What is rolled back moves nothing for good.
    let large = direct.transaction().await?;
    large.batch_execute("DELETE FROM products").await?;
    large.rollback().await?;
    cached(&tier, &readers[0], "SELECT count(*) FROM products", "100000").await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_while_nobody_listens_is_seen_when_the_stream_is_back() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder().replicas(1)).await?;
    let readers = [client];
    for round in 1..=6_i64 {
        let probe = format!("SELECT name FROM users WHERE user_id = {round}");
        cached(&tier, &readers[0], &probe, "a").await?;
        // The walsender, the connection that asks what is shown, or both; then a write at once.
        let whom = ["backend_type = 'walsender'", "application_name = 'weir control'", "application_name LIKE 'weir%'"];
        let whom = whom[round as usize % 3];
        direct
            .batch_execute(&format!(
                "BEGIN; SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {whom} AND application_name LIKE 'weir%';
                 UPDATE users SET name = 'b' WHERE user_id = {round}; COMMIT"
            ))
            .await?;
        // While there is no stream, a replica may be behind what the primary has shown.
        until(&probe, async || Ok(column(&readers[0], &probe).await? == ["b"])).await?;
        until_up(&tier).await?;
        seen(&readers, &probe, "b").await.with_context(|| tier.weir_log())?;
    }
    ensure!(shown(&tier, "reconnects").await?[0].parse::<u64>()? >= 4, "the stream was lost");
    drop(direct);
    for round in 11..=12 {
        let probe = format!("SELECT name FROM users WHERE user_id = {round}");
        cached(&tier, &readers[0], &probe, "a").await?;
        tier.shards[0].primary.restart().await?;
        let direct = tier.shards[0].primary.admin("shop").await?;
        direct.execute("UPDATE users SET name = 'b' WHERE user_id = $1", &[&i64::from(round)]).await?;
        until(&probe, async || Ok(column(&readers[0], &probe).await.is_ok_and(|answer| answer == ["b"]))).await?;
        until_up(&tier).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ddl_beside_weir_is_noticed() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder().replicas(1)).await?;
    let readers = [client];
    let all = readers[0].prepare("SELECT * FROM users WHERE user_id = $1").await?;
    let simple = "SELECT * FROM users WHERE user_id = 1";
    let columns = async || {
        let messages = readers[0].simple_query(simple).await?;
        anyhow::Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.len()),
            _ => None,
        }))
    };
    readers[0].query(&all, &[&1_i64]).await?;
    cached(&tier, &readers[0], simple, "1").await?;
    direct.batch_execute("ALTER TABLE users ADD COLUMN extra text DEFAULT 'x'").await?;
    let took = until("the new column", async || Ok(columns().await? == Some(4))).await?;
    ensure!(took < SOON, "{took:?}");
    for _ in 0..20 {
        ensure!(columns().await? == Some(4), "it went back");
    }
    // Another table of the same name, and one that is new, whose writes are seen as soon as it is published.
    cached(&tier, &readers[0], "SELECT count(*) FROM settings", "0").await?;
    direct
        .batch_execute(
            "BEGIN; ALTER TABLE settings RENAME TO former; CREATE TABLE settings (name text PRIMARY KEY, value text);
            INSERT INTO settings VALUES ('a', 'b'); GRANT ALL ON settings TO shop; COMMIT",
        )
        .await?;
    seen(&readers, "SELECT count(*) FROM settings", "1").await.with_context(|| tier.weir_log())?;
    let twice = "SELECT count(*) FROM pg_publication_tables WHERE tablename IN ('settings', 'former')";
    until("both are published", async || Ok(column(&direct, twice).await? == ["2"])).await?;
    cached(&tier, &readers[0], "SELECT count(*) FROM settings", "1").await?;
    direct.batch_execute("INSERT INTO settings VALUES ('c', 'd')").await?;
    seen(&readers, "SELECT count(*) FROM settings", "2").await.with_context(|| tier.weir_log())?;
    // Privileges are DDL as well.
    let read = "SELECT value FROM settings WHERE name = 'a'";
    cached(&tier, &readers[0], read, "b").await?;
    direct.batch_execute("REVOKE ALL ON settings FROM shop").await?;
    until("the privilege is gone", async || Ok(readers[0].simple_query(read).await.is_err())).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn publications_are_in_nobodys_way() -> Result<()> {
    let (tier, direct, _client) = with_users(Tier::builder()).await?;
    // A primary key goes, rows are updated without one, and another comes: within one transaction, and after it.
    direct
        .batch_execute(
            "BEGIN; ALTER TABLE settings DROP CONSTRAINT settings_pkey; INSERT INTO settings VALUES ('a', 'b');
            UPDATE settings SET value = 'c'; ALTER TABLE settings ADD PRIMARY KEY (name); COMMIT",
        )
        .await?;
    direct.batch_execute("ALTER TABLE settings DROP CONSTRAINT settings_pkey").await?;
    direct.batch_execute("UPDATE settings SET value = 'd'").await?;
    let gap = async || anyhow::Ok(shown(&tier, "gaps").await?[0].contains("public.settings"));
    until("the table is named", gap).await?;
    direct.batch_execute("ALTER TABLE settings REPLICA IDENTITY FULL; DELETE FROM settings").await?;
    until("it is seen again", async || Ok(!gap().await?)).await?;
    // Tables, schemas and the publications themselves can go; those are made again.
    direct.batch_execute("CREATE SCHEMA other; CREATE TABLE other.t (id int PRIMARY KEY); DROP SCHEMA other CASCADE; DROP TABLE settings").await?;
    let names = column(&direct, "SELECT pubname FROM pg_publication ORDER BY 1").await?;
    ensure!(names.len() == 2, "{names:?}");
    direct.batch_execute(&format!("DROP PUBLICATION {}", names.join(", "))).await?;
    until("they are back", async || {
        Ok(column(&direct, "SELECT count(*) FROM pg_publication_tables WHERE tablename = 'users'").await? == ["1"])
    })
    .await?;
    // Temporary tables are nobody's business, and cost no transaction of their own.
    let before = shown(&tier, "transactions").await?;
    direct.batch_execute("CREATE TEMP TABLE mine (id int); INSERT INTO mine VALUES (1); DROP TABLE mine").await?;
    direct.batch_execute("CREATE TABLE other_one (id int PRIMARY KEY); DROP TABLE other_one").await?;
    until("the next one is seen", async || Ok(shown(&tier, "transactions").await? != before)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_slot_outlives_weir() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder()).await?;
    let slots = async || anyhow::Ok(column(&direct, "SELECT count(*) FROM pg_replication_slots").await?[0].clone());
    ensure!(slots().await? == "1");
    let temporary = "SELECT temporary AND slot_name LIKE 'weir\\_%' FROM pg_replication_slots";
    ensure!(column(&direct, temporary).await? == ["t"]);
    let signal = |name: &str| {
        let pid = tier.weir_pid().context("weir runs")?.to_string();
        let sent = std::process::Command::new("kill").args([name, &pid]).status()?;
        ensure!(sent.success(), "kill {name}");
        anyhow::Ok(())
    };
    signal("-STOP")?;
    let gone = until("wal_sender_timeout", async || Ok(slots().await? == "0")).await;
    signal("-CONT")?;
    ensure!(gone? > Duration::from_secs(3), "it was the time-out");
    until("it is made again", async || Ok(slots().await? == "1")).await?;
    until_up(&tier).await?;
    let readers = [client];
    direct.batch_execute("UPDATE users SET name = 'b' WHERE user_id = 1").await?;
    seen(&readers, "SELECT name FROM users WHERE user_id = 1", "b").await.with_context(|| tier.weir_log())?;
    tier.kill_weir();
    until("the connection is gone", async || Ok(slots().await? == "0")).await?;
    Ok(())
}

/// Of several proxies one decodes and tells the others; when it dies, another does.
#[tokio::test(flavor = "multi_thread")]
async fn one_proxy_of_several_decodes_for_all_and_another_takes_over() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder().peers(true)).await?;
    let other = tier.another().await?;
    let readers = [other.connect().await?];
    let console = weir_harness::connect(&other.admin_dsn()).await?;
    let state = async || {
        let messages = console.simple_query("SHOW DECODING").await?;
        anyhow::Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get("state").map(str::to_owned),
            _ => None,
        }))
    };
    let hits = async || {
        let messages = console.simple_query("SHOW CACHE").await?;
        let figures = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) if row.get(0) == Some("shop.hits_memory") => row.get(1)?.parse::<i64>().ok(),
            _ => None,
        });
        anyhow::Ok(figures.sum::<i64>())
    };
    let probe = |key: i64| format!("SELECT name FROM users WHERE user_id = {key}");
    let cached = async |key: i64, expected: &str| {
        until("a hit at the other proxy", async || {
            let before = hits().await?;
            let as_expected = column(&readers[0], &probe(key)).await? == [expected];
            Ok(as_expected && hits().await? > before)
        })
        .await
    };
    until("the second stands by", async || Ok(state().await?.as_deref() == Some("standby"))).await?;
    ensure!(shown(&tier, "state").await? == ["up"]);
    ensure!(column(&direct, "SELECT count(*) FROM pg_replication_slots").await? == ["1"]);
    for round in 1..=20 {
        let (old, new) = (if round == 1 { "a".to_owned() } else { (round - 1).to_string() }, round.to_string());
        cached(1, &old).await?;
        direct.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&new]).await?;
        seen(&readers, &probe(1), &new).await.with_context(|| tier.weir_log())?;
    }
    cached(2, "a").await?;
    drop(client);
    tier.kill_weir();
    direct.batch_execute("UPDATE users SET name = 'b' WHERE user_id = 2").await?;
    until("the second takes over", async || Ok(state().await?.as_deref() == Some("up"))).await?;
    seen(&readers, &probe(2), "b").await.with_context(|| tier.weir_log())?;
    cached(3, "a").await?;
    direct.batch_execute("UPDATE users SET name = 'b' WHERE user_id = 3").await?;
    seen(&readers, &probe(3), "b").await.with_context(|| tier.weir_log())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_decoding_is_required_nobody_else_answers_without_it() -> Result<()> {
    let (tier, direct, client) =
        with_users(Tier::builder().replicas(1).config_extra("[cache]\ndecoding = \"require\"")).await?;
    let probe = "SELECT name FROM users WHERE user_id = 1";
    cached(&tier, &client, probe, "a").await?;
    direct.batch_execute("ALTER SYSTEM SET wal_level = 'replica'").await?;
    tier.shards[0].primary.restart().await?;
    until("it says why", async || Ok(shown(&tier, "reason").await?[0].contains("wal_level is replica"))).await?;
    ensure!(shown(&tier, "state").await? == ["off"]);
    let direct = tier.shards[0].primary.admin("shop").await?;
    let figures = async || {
        let hits = crate::freshness::cache_figure(tier.proxy(), "hits_memory").await?;
        anyhow::Ok((hits, crate::freshness::replica_reads(&tier).await?))
    };
    until("a server connection", async || Ok(column(&client, probe).await.is_ok())).await?;
    let before = figures().await?;
    for round in 0..50 {
        direct.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&round.to_string()]).await?;
        ensure!(column(&client, probe).await? == [round.to_string()], "at once");
    }
    ensure!(figures().await? == before, "only the primary has answered");
    direct.batch_execute("ALTER SYSTEM RESET wal_level").await?;
    tier.shards[0].primary.restart().await?;
    until_up(&tier).await?;
    cached(&tier, &client, probe, "49").await
}

/// An account that may replicate and owns its tables, and nothing more: writes are seen, DDL with the next change of its table, and
/// what it does not own is named.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_account_sees_its_own_tables() -> Result<()> {
    let run = weir_harness::Run::temporary("test")?;
    let spec = weir_harness::ClusterSpec::new("plain", "admin's").database("shop", "shop", "shop's");
    let cluster = weir_harness::Cluster::start(&run, spec).await?;
    let admin = cluster.admin("shop").await?;
    admin.batch_execute("ALTER ROLE shop REPLICATION; CREATE TABLE foreign_one (id int PRIMARY KEY)").await?;
    let owner = weir_harness::connect(&cluster.dsn("shop", "shop")).await?;
    owner
        .batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, name text); INSERT INTO users VALUES (1, 'a')")
        .await?;
    let config = format!(
        "admin_users = ['shop']\n[server_auth]\nuser = 'shop'\npassword_env = 'SHOP_PASSWORD'\n[[database.shop.shard]]\nname = 'only'\nprimary = '{}'\n",
        cluster.address()
    );
    let front = weir_harness::Front::builder()
        .config(&config)
        .variable("SHOP_PASSWORD", "shop's")
        .user("shop", "shop's")
        .start(&run)
        .await?;
    let console = front.connect("weir", "shop").await?;
    let shown = async |name: &str| {
        let messages = console.simple_query("SHOW DECODING").await?;
        anyhow::Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(name).map(str::to_owned),
            _ => None,
        }))
    };
    until("it is up", async || Ok(shown("state").await?.as_deref() == Some("up"))).await?;
    let gaps = shown("gaps").await?.unwrap_or_default();
    ensure!(gaps.contains("not seen: public.foreign_one") && gaps.contains("DDL is not told at once"), "{gaps}");
    let readers = [front.connect("shop", "shop").await?];
    for round in 1..=20 {
        // More often than not the answer is cached by the third read.
        for _ in 0..3 {
            column(&readers[0], "SELECT name FROM users WHERE user_id = 1").await?;
        }
        owner.execute("UPDATE users SET name = $1", &[&round.to_string()]).await?;
        seen(&readers, "SELECT name FROM users WHERE user_id = 1", &round.to_string())
            .await
            .with_context(|| front.log())?;
    }
    let columns = async || {
        let messages = readers[0].simple_query("SELECT * FROM users").await?;
        anyhow::Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.len()),
            _ => None,
        }))
    };
    ensure!(columns().await? == Some(2) && columns().await? == Some(2));
    owner.batch_execute("ALTER TABLE users ADD COLUMN extra int; UPDATE users SET extra = 1").await?;
    let took = until("the new column", async || Ok(columns().await? == Some(3))).await?;
    ensure!(took < SOON, "{took:?}");
    ensure!(columns().await? == Some(3) && columns().await? == Some(3));
    Ok(())
}

/// While a synchronous standby keeps a commit waiting, the WAL has it and the primary does not show it: what is read meanwhile is
/// right, and must not stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_decoded_long_before_it_is_shown_leaves_nothing_stale() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder()).await?;
    let probe = "SELECT name FROM users WHERE user_id = 1";
    cached(&tier, &client, probe, "a").await?;
    direct.batch_execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").await?;
    direct.batch_execute("SELECT pg_reload_conf()").await?;
    until("it is in force", async || Ok(column(&direct, "SHOW synchronous_standby_names").await? == ["nobody"]))
        .await?;
    let stuck = tier.shards[0].primary.admin("shop").await?;
    let before = shown(&tier, "transactions").await?;
    let writing =
        tokio::spawn(async move { stuck.batch_execute("UPDATE users SET name = 'b' WHERE user_id = 1").await });
    until("it is decoded", async || Ok(shown(&tier, "transactions").await? != before)).await?;
    for _ in 0..100 {
        ensure!(column(&client, probe).await? == ["a"], "nobody has been told yet");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ensure!(!writing.is_finished());
    direct.batch_execute("ALTER SYSTEM RESET synchronous_standby_names").await?;
    direct.batch_execute("SELECT pg_reload_conf()").await?;
    writing.await??;
    seen(&[client], probe, "b").await.with_context(|| tier.weir_log())?;
    Ok(())
}

/// What nobody has waited to see on disk is decoded all the same, also where the WAL writer takes its time.
#[tokio::test(flavor = "multi_thread")]
async fn asynchronous_commits_do_not_wait_for_the_wal_writer() -> Result<()> {
    let (tier, direct, client) = with_users(Tier::builder()).await?;
    direct.batch_execute("ALTER SYSTEM SET wal_writer_delay = '10s'").await?;
    direct.batch_execute("SELECT pg_reload_conf()").await?;
    direct.batch_execute("SET synchronous_commit = off").await?;
    let (probe, readers) = ("SELECT name FROM users WHERE user_id = 1", [client]);
    let (mut old, mut took) = ("a".to_owned(), Duration::ZERO);
    for round in 0..10 {
        cached(&tier, &readers[0], probe, &old).await?;
        old = format!("round {round}");
        direct.execute("UPDATE users SET name = $1 WHERE user_id = 1", &[&old]).await?;
        took += seen(&readers, probe, &old).await.with_context(|| tier.weir_log())?;
    }
    ensure!(took < SOON, "ten commits took {took:?} to be seen");
    Ok(())
}

/// Many readers while somebody writes beside weir: nothing that is stale stays. `WEIR_DECODING_WRITES` makes it longer,
/// `WEIR_DECODING_ASYNC` has the writer not wait for the disk. Prints how long it takes from a commit until nobody is shown what
/// was before.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_stale_stays_however_reads_race_with_writes() -> Result<()> {
    const KEYS: i64 = 8;
    let writes: i64 = std::env::var("WEIR_DECODING_WRITES").ok().and_then(|text| text.parse().ok()).unwrap_or(2000);
    let (tier, direct, client) = with_users(Tier::builder().replicas(1)).await?;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut readers = Vec::new();
    for reader in 0..4 {
        let (client, stop) = (tier.connect().await?, std::sync::Arc::clone(&stop));
        readers.push(tokio::spawn(async move {
            let select = client.prepare("SELECT name FROM users WHERE user_id = $1").await?;
            let mut round = reader;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                round += 1;
                client.query_one(&select, &[&(round % KEYS + 1)]).await?;
            }
            anyhow::Ok(())
        }));
    }
    if std::env::var_os("WEIR_DECODING_ASYNC").is_some() {
        direct.batch_execute("SET synchronous_commit = off").await?;
    }
    let update = direct.prepare("UPDATE users SET name = $2 WHERE user_id = $1").await?;
    let select = client.prepare("SELECT name FROM users WHERE user_id = $1").await?;
    let mut took = Vec::new();
    for write in 1..=writes {
        let key = write % KEYS + 1;
        direct.execute(&update, &[&key, &write.to_string()]).await?;
        if write % 4 == 0 {
            let start = Instant::now();
            while client.query_one(&select, &[&key]).await?.get::<_, String>(0) != write.to_string() {
                ensure!(start.elapsed() < SOON, "key {key} is stale");
            }
            took.push(start.elapsed());
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for reader in readers {
        reader.await??;
    }
    took.sort_unstable();
    let at = |share: usize| took[(took.len() - 1) * share / 100];
    println!("commit until gone: p50 {:?}, p99 {:?}, max {:?} of {}", at(50), at(99), at(100), took.len());
    for key in 1..=KEYS {
        let expected = column(&direct, &format!("SELECT name FROM users WHERE user_id = {key}")).await?;
        let shows = async || anyhow::Ok(client.query_one(&select, &[&key]).await?.get::<_, String>(0) == expected[0]);
        let stays = async || {
            for _ in 0..20 {
                if !shows().await? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        until("the last write is shown, and stays", stays).await?;
    }
    Ok(())
}
