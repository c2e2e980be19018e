//! Started from the command line: one server, all its databases, as they come and go.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio_postgres::Client;
use weir_harness::{Cluster, ClusterSpec, Front, Run};

use crate::placement::column;

/// Longest wait for something that happens by itself within a few seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server with two users and two databases, and weir in front of it by `--upstream` alone: it learns from the server who may
/// log in, and from their logins how to log in to the server as them.
async fn served(config: &str) -> Result<(Arc<Run>, Cluster, Front)> {
    let run = Run::temporary("start")?;
    let cluster = Cluster::start(&run, spec("upstream")).await?;
    let front = Front::builder()
        .argument(format!("--upstream=postgres://weir_admin@127.0.0.1:{}", cluster.port()))
        .variable("PGPASSWORD", "admin's")
        .role("app", "app's")
        .role("other", "other's")
        .role("weir_admin", "admin's")
        .config(config)
        .start(&run)
        .await?;
    Ok((run, cluster, front))
}

fn spec(name: &str) -> ClusterSpec {
    ClusterSpec::new(name, "admin's").database("one", "app", "app's").database("two", "other", "other's")
}

pub fn code(error: &anyhow::Error) -> String {
    let error = error.downcast_ref::<tokio_postgres::Error>().and_then(tokio_postgres::Error::as_db_error);
    error.map_or_else(String::new, |error| format!("{} {}", error.code().code(), error.message()))
}

async fn current_database(client: &Client) -> Result<String> {
    Ok(column(client, "SELECT current_database()").await?.remove(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_flag_serves_every_database_of_a_server() -> Result<()> {
    let (_run, cluster, front) = served("").await?;
    for (database, user) in [("one", "app"), ("two", "other"), ("postgres", "app"), ("one", "other")] {
        assert_eq!(current_database(&front.connect(database, user).await?).await?, database);
    }
    let wrong = front.dsn("one", "app").replace("app's", "wrong");
    let refused = weir_harness::connect(&wrong).await.expect_err("a wrong password");
    assert!(code(&refused).starts_with("28P01"), "{refused:#}");
    let console = front.connect("weir", "weir_admin").await.context("weir's own user is its administrator")?;
    assert_eq!(column(&console, "SHOW DATABASES").await?, ["one", "postgres", "two"]);
    // Refused in the server's own words.
    let refused = front.connect("nowhere", "app").await.expect_err("there is none");
    assert_eq!(code(&refused), "3D000 database \"nowhere\" does not exist");
    let refused = front.connect("template0", "app").await.expect_err("nobody may");
    assert!(code(&refused).starts_with("55000 database \"template0\" is not currently accepting"), "{refused:#}");

    // Made and dropped behind weir.
    let admin = cluster.admin("postgres").await?;
    admin.batch_execute("CREATE DATABASE later OWNER app").await?;
    let later = front.connect("later", "app").await?;
    later.batch_execute("CREATE TABLE t (v int); INSERT INTO t VALUES (1)").await?;
    assert_eq!(column(&later, "SELECT v FROM t").await?, ["1"]);
    assert_eq!(column(&later, "SELECT v FROM t").await?, ["1"], "from the cache");
    // Idle server connections go by themselves; the session stays.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = admin.batch_execute("DROP DATABASE later").await {
        assert!(Instant::now() < deadline, "weir still holds on to it: {error}");
    }
    let refused = later.simple_query("SELECT v FROM t").await.expect_err("it is gone");
    assert_eq!(refused.as_db_error().context("told")?.code().code(), "3D000", "{refused}");
    assert_eq!(
        code(&front.connect("later", "app").await.expect_err("gone")),
        "3D000 database \"later\" does not exist"
    );
    // Another one of the same name is another one.
    admin.batch_execute("CREATE DATABASE later OWNER app").await?;
    let direct = cluster.admin("later").await?;
    direct.batch_execute("CREATE TABLE t (v int); GRANT ALL ON t TO app; INSERT INTO t VALUES (2)").await?;
    drop(direct);
    assert_eq!(column(&later, "SELECT v FROM t").await?, ["2"], "nothing of the old one is remembered");
    assert_eq!(column(&front.connect("later", "app").await?, "SELECT v FROM t").await?, ["2"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_are_dropped_and_copied_through_weir() -> Result<()> {
    let (_run, cluster, front) = served("").await?;
    cluster.admin("postgres").await?.batch_execute("ALTER ROLE app CREATEDB").await?;
    let client = front.connect("postgres", "app").await?;
    client.batch_execute("CREATE DATABASE \"Mine\"").await?;
    let mine = front.connect("Mine", "app").await?;
    mine.batch_execute("CREATE TABLE t (v int)").await?;
    // weir keeps an idle connection to it; Postgres alone would wait 5 s and refuse.
    let begun = Instant::now();
    client.batch_execute("CREATE DATABASE copy TEMPLATE \"Mine\"").await?;
    assert_eq!(column(&front.connect("copy", "app").await?, "SELECT count(*) FROM t").await?, ["0"]);
    assert_eq!(column(&mine, "SELECT count(*) FROM t").await?, ["0"]);
    client.execute("DROP DATABASE \"Mine\"", &[]).await?;
    assert!(begun.elapsed() < PATIENCE);
    let refused = mine.simple_query("SELECT count(*) FROM t").await.expect_err("it is gone");
    assert_eq!(refused.as_db_error().context("told")?.code().code(), "3D000", "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn databases_nobody_uses_are_taken_down_and_their_number_is_bounded() -> Result<()> {
    let config = "admin_users = [\"app\"]\n[limits]\nwildcard_databases_max = 2\nwildcard_idle_max = \"1s\"";
    let (_run, _cluster, front) = served(config).await?;
    let (one, two) = (front.connect("one", "app").await?, front.connect("two", "other").await?);
    let refused = front.connect("postgres", "app").await.expect_err("both places are taken");
    assert_eq!(code(&refused), "53300 too many databases are in use");
    drop(two);
    let deadline = Instant::now() + PATIENCE;
    // Who has left makes room at once.
    let third = loop {
        match front.connect("postgres", "app").await {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
        }
    };
    drop((one, third));
    let console = front.connect("weir", "app").await?;
    while !column(&console, "SHOW DATABASES").await?.is_empty() {
        assert!(Instant::now() < deadline, "they stay up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(current_database(&front.connect("one", "app").await?).await?, "one");
    let (status, metrics) = front.http_get("/metrics").await?;
    assert!(status == 200 && metrics.contains("database=\"one\""), "{metrics}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn named_databases_win_over_the_wildcard() -> Result<()> {
    let run = Run::temporary("start")?;
    let cluster = Cluster::start(&run, spec("upstream")).await?;
    let address = cluster.address();
    let config = format!(
        "[database.one]\nserver_database = \"two\"\n[[database.one.shard]]\nname = \"only\"\nprimary = \"{address}\"\n\
         [[database.\"*\".shard]]\nname = \"any\"\nprimary = \"{address}\"\n[cache]\nenabled = false\n\
         [server_auth]\nuser = \"weir_admin\"\npassword_env = \"ADMIN_PASSWORD\""
    );
    let front =
        Front::builder().config(&config).variable("ADMIN_PASSWORD", "admin's").user("app", "app's").start(&run).await?;
    assert_eq!(current_database(&front.connect("one", "app").await?).await?, "two");
    assert_eq!(current_database(&front.connect("two", "app").await?).await?, "two");
    assert_eq!(current_database(&front.connect("postgres", "app").await?).await?, "postgres");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_and_replicas_come_from_flags_as_well() -> Result<()> {
    let run = Run::temporary("start")?;
    let upstream = Cluster::start(&run, spec("upstream")).await?;
    let replica = upstream.replica("replica").await?;
    let second = Cluster::start(&run, spec("second")).await?;
    let front = Front::builder()
        .argument(format!("--upstream=postgres://weir_admin:admin's@127.0.0.1:{}/postgres", upstream.port()))
        .argument(format!("--replica=postgres://127.0.0.1:{}", replica.port()))
        .argument(format!("--shard=127.0.0.1:{}", second.port()))
        .config("[[database.\"*\".table]]\nname = \"users\"\nkind = \"sharded\"\nkey = \"id\"\ntype = \"bigint\"")
        .user("app", "app's")
        .start(&run)
        .await?;
    let client = front.connect("one", "app").await?;
    client.batch_execute("CREATE TABLE users (id bigint PRIMARY KEY)").await?;
    for id in 1..=40_i64 {
        client.execute("INSERT INTO users VALUES ($1)", &[&id]).await?;
    }
    assert_eq!(column(&client, "SELECT count(*) FROM users").await?, ["40"]);
    for server in [&upstream, &second] {
        let here: i64 = server.admin("one").await?.query_one("SELECT count(*) FROM users", &[]).await?.get(0);
        assert!((1..40).contains(&here), "{here} of 40 on {}", server.name());
    }
    let hub = upstream.admin("weir").await.context("weir has made its own database")?;
    let slots: i64 = hub.query_one("SELECT count(*) FROM weir.slot WHERE database = 'one'", &[]).await?.get(0);
    assert_eq!(slots, 4096);
    Ok(())
}

/// What `weir run` says when it cannot start, and its exit status.
fn failed(arguments: &[&str], dir: &std::path::Path) -> Result<(Option<i32>, String)> {
    let binary = weir_harness::weir_binary()?;
    let mut command = Command::new(binary);
    command.arg("run").args(arguments).current_dir(dir).env_remove("PGPASSWORD").env("PGPASSFILE", dir.join("none"));
    let output = command.output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_says_what_to_do() -> Result<()> {
    let (_run, cluster, _front) = served("").await?;
    let dir = tempfile::tempdir()?;
    let (status, said) = failed(&[], dir.path())?;
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("weir run --upstream postgres://") && said.contains("weir run --config"), "{said}");
    let (status, said) = failed(&["--config", "nowhere.toml"], dir.path())?;
    assert!(status == Some(2) && said.contains("nowhere.toml"), "{said}");
    let (status, said) = failed(&["--upstream", "postgres://127.0.0.1"], dir.path())?;
    assert!(status == Some(2) && said.contains("--upstream") && said.contains("user"), "{said}");
    let (status, said) = failed(&["--shard", "postgres://127.0.0.1", "--config", "/dev/null"], dir.path())?;
    assert!(status == Some(2) && said.contains("--shard"), "{said}");

    let listen = ["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"];
    let with = |dsn: String| {
        let upstream = format!("--upstream={dsn}");
        failed(&[&listen[..], &[upstream.as_str()]].concat(), dir.path())
    };
    let (status, said) = with(format!("postgres://weir_admin:s3cret@127.0.0.1:{}", cluster.port()))?;
    assert!(status == Some(1) && said.contains("PGPASSWORD"), "{said}");
    let shown = format!("postgres://weir_admin@127.0.0.1:{}/postgres", cluster.port());
    assert!(said.contains(&shown) && !said.contains("s3cret"), "{said}");
    let (_, said) = with(format!("postgres://weir_admin@127.0.0.1:{}", cluster.port()))?;
    assert!(said.contains("give its password in PGPASSWORD"), "{said}");
    let (_, said) = with(format!("postgres://weir_admin:admin's@127.0.0.1:{}/missing", cluster.port()))?;
    assert!(said.contains("name a database"), "{said}");
    let (_, said) = with("postgres://weir_admin:s3cret@127.0.0.1:1".to_owned())?;
    assert!(said.contains("check host and port") && !said.contains("s3cret"), "{said}");
    Ok(())
}
