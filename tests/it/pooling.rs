//! Limits of clients and pools, their time-outs and modes, and changing them while weir runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_harness::{Cluster, ClusterSpec, Front, Run};

use crate::placement::column;
use crate::start::code;

/// Longest wait for something that happens by itself within a few seconds.
const PATIENCE: Duration = Duration::from_secs(30);

async fn served(config: &str) -> Result<(Arc<Run>, Cluster, Front)> {
    let run = Run::temporary("pooling")?;
    let spec = ClusterSpec::new("server", "admin").database("one", "app", "app").database("two", "other", "other");
    let cluster = Cluster::start(&run, spec).await?;
    let front = Front::builder()
        .argument(format!("--upstream=postgres://weir_admin@{}", cluster.address()))
        .variable("PGPASSWORD", "admin")
        .user("app", "app")
        .user("other", "other")
        .config(&format!("admin_users = [\"app\"]\n{config}"))
        .start(&run)
        .await?;
    Ok((run, cluster, front))
}

async fn pid(client: &Client) -> Result<String> {
    Ok(column(client, "SELECT pg_backend_pid()").await?.remove(0))
}

/// How many connections of `user` the server has.
async fn connections(cluster: &Cluster, user: &str) -> Result<i64> {
    let admin = cluster.admin("postgres").await?;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
    Ok(admin.query_one(sql, &[&user]).await?.get(0))
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await? {
        anyhow::ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The error that ends or refuses a query.
async fn refusal(client: &Client, sql: &str) -> Result<String> {
    let error = client.simple_query(sql).await.err().with_context(|| format!("{sql} was not refused"))?;
    Ok(code(&error.into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_databases_have_connection_limits() -> Result<()> {
    let config = "[limits]\nuser_connections_max = 3\ndatabase_connections_max = 2\n\
                  [user.other]\nconnections_max = 1\n";
    let (_run, _cluster, front) = served(config).await?;
    let (first, _second) = (front.connect("one", "app").await?, front.connect("one", "app").await?);
    let refused = front.connect("one", "other").await.expect_err("two in this database");
    assert_eq!(code(&refused), "53300 too many connections for database \"one\"");
    let _third = front.connect("two", "app").await?;
    let refused = front.connect("postgres", "app").await.expect_err("three of this user");
    assert_eq!(code(&refused), "53300 too many connections for role \"app\"");
    let _other = front.connect("two", "other").await?;
    let refused = front.connect("postgres", "other").await.expect_err("one of this user");
    assert_eq!(code(&refused), "53300 too many connections for role \"other\"");
    drop(first);
    until("the place of who has left is free", async || Ok(front.connect("one", "app").await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reserve_helps_who_has_waited_and_the_minimum_is_kept_open() -> Result<()> {
    let config = "[pool]\nsize = 1\nreserve = 1\nreserve_after = \"200ms\"\nwait_max = \"1s\"\n\
                  [user.other]\npool_size = 4\npool_min = 3\n";
    let (_run, cluster, front) = served(config).await?;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(front.connect("one", "app").await?);
    }
    clients[0].batch_execute("BEGIN; SELECT 1").await?;
    let begun = Instant::now();
    clients[1].batch_execute("BEGIN; SELECT 1").await?;
    assert!(begun.elapsed() >= Duration::from_millis(200), "the reserve is not for newcomers");
    assert!(refusal(&clients[2], "SELECT 1").await?.starts_with("53300"), "one in reserve is all");
    clients[1].batch_execute("COMMIT").await?;
    assert_eq!(column(&clients[2], "SELECT 1").await?, ["1"]);
    clients[0].batch_execute("COMMIT").await?;
    until("the surplus is closed", async || Ok(connections(&cluster, "app").await? <= 1)).await?;

    let _other = front.connect("two", "other").await?;
    until("three are opened ahead", async || Ok(connections(&cluster, "other").await? == 3)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_take_too_long_are_told_as_postgres_does() -> Result<()> {
    let config = "[limits]\nidle_client_max = \"2s\"\nidle_in_transaction_max = \"700ms\"\nquery_time_max = \"1s\"\n\
                  transaction_time_max = \"3s\"\n";
    let (_run, cluster, front) = served(config).await?;
    let (idle, lazy, slow, long) = (
        front.connect("one", "app").await?,
        front.connect("one", "app").await?,
        front.connect("one", "app").await?,
        front.connect("one", "app").await?,
    );
    // What runs too long is cancelled, and the session goes on.
    let begun = Instant::now();
    let cancelled = refusal(&slow, "SELECT pg_sleep(60)").await?;
    assert!(cancelled.starts_with("57014"), "{cancelled}");
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(column(&slow, "SELECT 1").await?, ["1"]);

    lazy.batch_execute("BEGIN; CREATE TABLE half (v int)").await?;
    until("it is disconnected", async || Ok(lazy.is_closed())).await?;
    assert_eq!(connections_in_transaction(&cluster).await?, 0, "and its transaction is rolled back");

    // Never idle for long, but for ever in one transaction.
    long.batch_execute("BEGIN").await?;
    let begun = Instant::now();
    while long.simple_query("SELECT 1").await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "it goes on for ever");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(begun.elapsed() >= Duration::from_secs(3));
    until("the idle one is disconnected", async || Ok(idle.is_closed())).await
}

async fn connections_in_transaction(cluster: &Cluster) -> Result<i64> {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state LIKE 'idle in transaction%'";
    Ok(cluster.admin("postgres").await?.query_one(sql, &[]).await?.get(0))
}

/// Everything the server of `raw` says until it hangs up, as text.
async fn last_words(mut raw: crate::raw::Raw) -> Result<String> {
    let mut words = String::new();
    while let Ok((_, body)) = raw.next().await {
        words.push_str(&String::from_utf8_lossy(&body));
    }
    Ok(words)
}

#[tokio::test(flavor = "multi_thread")]
async fn time_outs_end_sessions_with_their_sqlstate() -> Result<()> {
    let config = "[limits]\nidle_client_max = \"300ms\"\nidle_in_transaction_max = \"200ms\"\n";
    let (_run, _cluster, front) = served(config).await?;
    let idle = crate::raw::Raw::login(&front.dsn("one", "app"), &[]).await?;
    let words = last_words(idle).await?;
    assert!(words.contains("57P05") && words.contains("idle-session timeout"), "{words}");
    let mut open = crate::raw::Raw::login(&front.dsn("one", "app"), &[]).await?;
    open.query("BEGIN").await?;
    open.query("SELECT 1").await?;
    let words = last_words(open).await?;
    assert!(words.contains("25P03") && words.contains("idle-in-transaction timeout"), "{words}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn session_mode_keeps_one_server_connection_for_good() -> Result<()> {
    let config = "[database.one]\npool_mode = \"session\"\n[[database.one.shard]]\nname = \"only\"\nprimary = \"ADDRESS\"\n\
                  [user.other]\npool_mode = \"transaction\"\n";
    let run = Run::temporary("pooling")?;
    let spec = ClusterSpec::new("server", "admin").database("one", "app", "app").database("two", "other", "other");
    let cluster = Cluster::start(&run, spec).await?;
    let config = format!("admin_users = [\"app\"]\n{}", config.replace("ADDRESS", &cluster.address()));
    let front = Front::builder()
        .config(&format!("{config}[server_auth]\nuser = \"weir_admin\"\npassword_env = \"ADMIN\""))
        .variable("ADMIN", "admin")
        .user("app", "app")
        .user("other", "other")
        .start(&run)
        .await?;
    let (one, two) = (front.connect("one", "app").await?, front.connect("one", "app").await?);
    let (pid_one, pid_two) = (pid(&one).await?, pid(&two).await?);
    assert_ne!(pid_one, pid_two);
    one.batch_execute("CREATE TEMP TABLE mine (v int); SET search_path = pg_catalog; SELECT pg_advisory_lock(7)")
        .await?;
    one.batch_execute("DISCARD ALL").await?;
    assert_eq!(pid(&one).await?, pid_one, "also after DISCARD ALL");
    assert!(refusal(&one, "SELECT * FROM mine").await?.starts_with("42P01"));
    one.batch_execute("LISTEN news").await?;
    assert_eq!(pid(&one).await?, pid_one);
    drop(one);
    until("it is closed with its session", async || Ok(connections(&cluster, "app").await? == 1)).await?;
    let other = front.connect("one", "other").await?;
    let first = pid(&other).await?;
    let again = front.connect("one", "other").await?;
    assert_eq!(pid(&again).await?, first, "the user's mode wins");

    let console = front.connect("weir", "app").await?;
    let modes = console.simple_query("SHOW POOLS").await?;
    let modes: Vec<(String, String)> = modes
        .iter()
        .filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => {
                Some((row.get("user")?.to_owned(), row.get("pool_mode")?.to_owned()))
            }
            _ => None,
        })
        .collect();
    assert!(
        modes.contains(&("app".into(), "session".into())) && modes.contains(&("other".into(), "transaction".into()))
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn statement_mode_refuses_transaction_blocks() -> Result<()> {
    let (_run, cluster, front) = served("[pool]\nmode = \"statement\"").await?;
    let client = front.connect("one", "app").await?;
    client.batch_execute("CREATE TABLE t (v int)").await?;
    client.batch_execute("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)").await?;
    for block in
        ["BEGIN", "START TRANSACTION", "BEGIN; INSERT INTO t VALUES (3); COMMIT", "INSERT INTO t VALUES (3); BEGIN"]
    {
        let refused = refusal(&client, block).await?;
        assert_eq!(refused, "0A000 transaction blocks are not allowed in statement pooling mode", "{block}");
    }
    let refused = client.execute("BEGIN", &[]).await.err().context("also in the extended protocol")?;
    assert!(code(&refused.into()).starts_with("0A000"));
    assert_eq!(column(&client, "SELECT sum(v) FROM t").await?, ["3"], "nothing of it was run");
    assert_eq!(connections_in_transaction(&cluster).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_change_while_weir_runs_and_the_rest_says_that_it_cannot() -> Result<()> {
    let upstream = |config: &str| format!("admin_users = [\"app\"]\n{config}");
    let (_run, _cluster, front) = served("[pool]\nsize = 1\nwait_max = \"300ms\"").await?;
    let (one, two) = (front.connect("one", "app").await?, front.connect("one", "app").await?);
    one.batch_execute("BEGIN; SELECT 1").await?;
    assert!(refusal(&two, "SELECT 1").await?.starts_with("53300"));
    let console = front.connect("weir", "app").await?;

    front
        .rewrite_config(&upstream("[pool]\nsize = 2\n[limits]\nuser_connections_max = 2\nclient_conections_max = 3"))?;
    let error = console.simple_query("RELOAD").await.err().context("a typo")?;
    let error = error.as_db_error().context("told")?;
    assert!(
        error.detail().is_some_and(|detail| detail.contains("front.toml:") && detail.contains("client_conections_max"))
    );
    assert!(refusal(&two, "SELECT 1").await?.starts_with("53300"), "a broken file changes nothing");

    front.rewrite_config(&upstream(
        "[pool]\nsize = 2\nwait_max = \"300ms\"\n[limits]\nuser_connections_max = 2\n[cache]\nenabled = false",
    ))?;
    console.simple_query("RELOAD").await?;
    assert_eq!(column(&two, "SELECT 1").await?, ["1"], "pools have grown");
    assert!(code(&front.connect("one", "app").await.expect_err("a new limit")).starts_with("53300"));
    assert!(front.log().contains("these need a restart: cache"), "{}", front.log());

    // SIGHUP does the same.
    front.rewrite_config(&upstream("[pool]\nsize = 2"))?;
    let pid = front.pid().context("weir runs")?;
    assert!(std::process::Command::new("kill").args(["-HUP", &pid.to_string()]).status()?.success());
    until("the limit is gone", async || Ok(front.connect("one", "app").await.is_ok())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_pause_resume_and_end_sessions() -> Result<()> {
    let (_run, cluster, front) = served("stats_users = [\"other\"]").await?;
    let (busy, waiting) = (front.connect("one", "app").await?, front.connect("one", "app").await?);
    let console = front.connect("weir", "app").await?;
    let refused = front.connect("weir", "other").await?.simple_query("PAUSE").await.err().context("may only look")?;
    assert!(code(&refused.into()).starts_with("42501"));
    busy.batch_execute("BEGIN; SELECT 1").await?;
    let pause = tokio::spawn(async move { console.simple_query("PAUSE one").await.map(|_| console) });
    let other = front.connect("weir", "app").await?;
    let paused = async || {
        let rows = other.simple_query("SHOW DATABASES").await?;
        Ok(rows
            .iter()
            .any(|row| matches!(row, tokio_postgres::SimpleQueryMessage::Row(row) if row.get("paused") == Some("1"))))
    };
    until("it is pausing", paused).await?;
    let wait = tokio::spawn(async move { waiting.simple_query("SELECT 1").await.map(|_| waiting) });
    assert_eq!(column(&busy, "SELECT 2").await?, ["2"], "what runs may end");
    assert!(!pause.is_finished() && !wait.is_finished());
    busy.batch_execute("COMMIT").await?;
    let console = pause.await??;
    until("a paused database has no server connection", async || Ok(connections(&cluster, "app").await? == 0)).await?;
    assert!(!wait.is_finished());
    console.simple_query("RESUME one").await?;
    let waiting = wait.await??;

    let before = pid(&waiting).await?;
    console.execute("RECONNECT", &[]).await?;
    assert_ne!(pid(&waiting).await?, before, "another server connection");

    let clients = console.simple_query("SHOW CLIENTS").await?;
    let ids: Vec<&str> = clients
        .iter()
        .filter_map(|row| match row {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get("id"),
            _ => None,
        })
        .collect();
    assert_eq!(ids.len(), 2, "{ids:?}");
    for id in ids {
        console.simple_query(&format!("KILL_CLIENT {id}")).await?;
    }
    until("both are gone", async || Ok(busy.is_closed() && waiting.is_closed())).await?;
    assert!(code(&console.simple_query("KILL_CLIENT 99").await.err().context("none")?.into()).starts_with("42704"));

    let victim = crate::raw::Raw::login(&front.dsn("one", "app"), &[]).await?;
    console.simple_query("KILL one").await?;
    let words = last_words(victim).await?;
    assert!(words.contains("57P01") && words.contains("administrator"), "{words}");
    console.simple_query("RESUME").await?;
    assert_eq!(column(&front.connect("one", "app").await?, "SELECT 1").await?, ["1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn new_sessions_begin_with_what_is_set_now() -> Result<()> {
    let (_run, cluster, front) = served("").await?;
    let begins_with = async |setting: &str| {
        let client = front.connect("one", "app").await?;
        Ok::<_, anyhow::Error>(column(&client, &format!("SHOW {setting}")).await?.remove(0))
    };
    let own = front.connect("one", "app").await?;
    own.batch_execute("SET work_mem = '5MB'").await?;
    begins_with("work_mem").await?;
    let admin = cluster.admin("one").await?;
    for (sql, setting, value) in [
        ("ALTER ROLE app SET work_mem = '7MB'", "work_mem", "7MB"),
        ("ALTER DATABASE one SET timezone = 'Asia/Tokyo'", "timezone", "Asia/Tokyo"),
        ("ALTER ROLE app IN DATABASE one SET work_mem = '9MB'", "work_mem", "9MB"),
        ("ALTER ROLE app IN DATABASE one RESET work_mem", "work_mem", "7MB"),
    ] {
        admin.batch_execute(sql).await?;
        until(sql, async || Ok(begins_with(setting).await? == value)).await?;
    }
    assert_eq!(column(&own, "SHOW work_mem").await?, ["5MB"], "what a session has set itself stays");
    Ok(())
}
