//! weir-local against real servers: what it starts works, and nothing of it is left behind.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weir_local::{Cluster, ClusterSpec, ConfigSpec, Redis, RedisSpec, Run, Tier, TierSpec, TierState};

/// Whether any process of this machine names `path` in its arguments.
fn running_in(path: &std::path::Path) -> bool {
    let said = Command::new("ps").args(["-A", "-ww", "-o", "args="]).output().expect("ps runs");
    String::from_utf8_lossy(&said.stdout).lines().any(|line| line.contains(&path.display().to_string()))
}

fn spec() -> ClusterSpec {
    ClusterSpec::new("shard0", "pw").database("shop", "shop", "it's a \\ secret")
}

async fn client(dsn: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(dsn, tokio_postgres::NoTls).await.expect("connects");
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn a_cluster_starts_answers_and_leaves_nothing() {
    let run = Run::temporary("localtest").expect("a run");
    let path = run.path().to_owned();
    drop(Cluster::start(&run, ClusterSpec::new("warm", "pw")).await.expect("the template is made"));
    let begun = Instant::now();
    let cluster = Cluster::start(&run, ClusterSpec::new("shard0", "pw").database("shop", "shop", "secret"))
        .await
        .expect("starts");
    eprintln!("start took {:?}", begun.elapsed());
    let shop = client(&cluster.dsn("shop", "shop")).await;
    shop.batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await.expect("the owner may create");
    let row = shop
        .query_one(
            "SELECT rolsuper, current_setting('wal_level'), current_setting('server_encoding') \
        FROM pg_roles WHERE rolname = current_user",
            &[],
        )
        .await
        .expect("answers");
    assert_eq!((row.get(0), row.get(1), row.get(2)), (false, "logical", "UTF8"));
    assert!(running_in(&path));
    drop((cluster, run));
    assert!(!running_in(&path), "a process is left");
    assert!(!path.exists(), "the directory is left");
}

#[tokio::test]
async fn passwords_are_checked_and_may_hold_anything() {
    let run = Run::temporary("localtest").expect("a run");
    let cluster = Cluster::start(&run, spec()).await.expect("starts");
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(cluster.port()).user("shop").dbname("shop").password("it's a \\ secret");
    config.connect(tokio_postgres::NoTls).await.map(|_| ()).expect("the right password");
    config.password("wrong");
    let error = config.connect(tokio_postgres::NoTls).await.map(|_| ()).expect_err("a wrong password");
    assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::INVALID_PASSWORD));
}

#[tokio::test]
async fn a_replica_streams_pauses_and_survives_kills() {
    let run = Run::temporary("localtest").expect("a run");
    let mut spec = spec();
    spec.log_statements = true;
    let cluster = Cluster::start(&run, spec).await.expect("starts");
    let begun = Instant::now();
    let replica = cluster.replica("shard0-r0").await.expect("streams");
    eprintln!("replica took {:?}", begun.elapsed());
    let write = cluster.admin("shop").await.expect("primary");
    write.batch_execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)").await.expect("written");
    replica.catch_up().await.expect("catches up");
    let read = replica.admin("shop").await.expect("replica");
    let count =
        async || -> i64 { read.query_one("SELECT count(*) FROM t /* here */", &[]).await.expect("read").get(0) };
    assert_eq!(count().await, 1);

    replica.pause_replay().await.expect("pauses");
    write.batch_execute("INSERT INTO t VALUES (2)").await.expect("written");
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(count().await, 1, "replay is paused");
    replica.resume_replay().await.expect("resumes");
    replica.catch_up().await.expect("catches up");
    assert_eq!(count().await, 2);
    assert!(replica.log().contains("/* here */") && !cluster.log().contains("/* here */"), "each logs its own");

    cluster.kill9();
    assert!(cluster.pid().is_none() && cluster.admin("shop").await.is_err());
    assert_eq!(count().await, 2, "the replica outlives its primary");
    cluster.restart().await.expect("recovers");
    cluster.admin("shop").await.expect("again").batch_execute("INSERT INTO t VALUES (3)").await.expect("written");
    replica.wait_streaming().await.expect("streams again");
    replica.catch_up().await.expect("catches up");
    assert_eq!(count().await, 3);

    replica.promote().await.expect("promoted");
    replica.admin("shop").await.expect("again").batch_execute("INSERT INTO t VALUES (4)").await.expect("writes");
}

#[tokio::test]
async fn a_server_that_cannot_start_shows_its_log() {
    let run = Run::temporary("localtest").expect("a run");
    let error = Cluster::start(&run, ClusterSpec::new("broken", "pw").setting("work_mem", "plenty"))
        .await
        .expect_err("refused");
    assert!(format!("{error:#}").contains("invalid value for parameter \"work_mem\""), "{error:#}");
}

#[tokio::test]
async fn a_taken_port_is_replaced() {
    let run = Run::temporary("localtest").expect("a run");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut spec = ClusterSpec::new("shard0", "pw");
    spec.port = taken.local_addr().expect("bound").port();
    let cluster = Cluster::start(&run, spec.clone()).await.expect("starts elsewhere");
    assert_ne!(cluster.port(), spec.port);
}

#[tokio::test]
async fn redis_answers_dies_and_returns_empty() {
    let run = Run::temporary("localtest").expect("a run");
    let spec = RedisSpec { password: Some("secret".to_owned()), ..RedisSpec::default() };
    let redis = Redis::start_as(&run, spec).await.expect("starts");
    let pid = redis.pid().expect("runs");
    redis.kill9();
    assert!(redis.pid().is_none() && tokio::net::TcpStream::connect(("127.0.0.1", redis.port())).await.is_err());
    redis.restart().await.expect("starts again");
    assert_ne!(redis.pid(), Some(pid));
    assert!(redis.url().starts_with("redis://:secret@127.0.0.1:"));
}

#[tokio::test]
async fn a_kept_run_is_taken_up_again() {
    let parent = Run::temporary("localtest").expect("a run");
    let dir = parent.path().join("state");
    let mut port = 0;
    for round in 0..2_i64 {
        // Once kept, it stays whatever a later start says.
        let later = [weir_local::Leftovers::Keep, weir_local::Leftovers::Remove];
        let run = Run::at(&dir, later[usize::try_from(round).expect("small")]).expect("a run");
        assert!(Run::at(&dir, weir_local::Leftovers::Keep).is_err(), "it is in use");
        let mut spec = ClusterSpec::new("shard0", "pw").database("shop", "shop", "secret");
        spec.port = port;
        let cluster = Cluster::start(&run, spec).await.expect("starts");
        let replica = cluster.replica("shard0-r0").await.expect("streams");
        let shop = client(&cluster.dsn("shop", "shop")).await;
        shop.batch_execute("CREATE TABLE IF NOT EXISTS t (a int); INSERT INTO t VALUES (1)").await.expect("written");
        replica.catch_up().await.expect("catches up");
        let seen = client(&replica.dsn("shop", "shop")).await;
        let count: i64 = seen.query_one("SELECT count(*) FROM t", &[]).await.expect("read").get(0);
        assert_eq!(count, round + 1);
        assert!(port == 0 || port == cluster.port(), "the same port");
        port = cluster.port();
        cluster.stop_cleanly();
    }
    assert!(dir.exists() && !running_in(&dir));
    std::fs::write(parent.path().join("mine.txt"), "precious").expect("written");
    let foreign = parent.path().join("log");
    std::fs::write(foreign.join("mine.txt"), "precious").expect("written");
    assert!(Run::at(&foreign, weir_local::Leftovers::Remove).is_err(), "a directory with other people's files");
}

#[tokio::test]
async fn a_tier_starts_whole_and_names_its_servers() {
    use std::os::unix::fs::PermissionsExt as _;
    let run = Run::temporary("localtest").expect("a run");
    let spec = TierSpec { shards: 2, replicas: 1, hub_replicas: 0, redis: true, log_statements: true };
    let started = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&started);
    let begun = Instant::now();
    let tier =
        Tier::start(&run, &spec, Arc::new(move |_| _ = counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
    let tier = tier.await.expect("starts");
    eprintln!("tier took {:?}", begun.elapsed());
    assert_eq!(started.load(std::sync::atomic::Ordering::Relaxed), 6, "hub, redis, 2 x (primary, replica)");
    assert_eq!(tier.shards.iter().map(|shard| shard.name.as_str()).collect::<Vec<_>>(), ["shard0", "shard1"]);
    assert!(tier.first_dead().is_none());

    let system = async |server: &weir_local::Server| -> i64 {
        let sql = "SELECT system_identifier FROM pg_control_system()";
        server.admin("postgres").await.expect("connects").query_one(sql, &[]).await.expect("answers").get(0)
    };
    let (zero, one) = (system(&tier.shards[0].primary).await, system(&tier.shards[1].primary).await);
    assert_ne!(zero, one, "as different as real servers are");
    assert_eq!(one, system(&tier.shards[1].replicas[0]).await, "a replica is its primary's");

    let path = tier.write_config(&ConfigSpec { port: 1, http_port: 2, extra: "[pool]\nsize = 3".to_owned() });
    let path = path.expect("written");
    let config: toml::Table = std::fs::read_to_string(&path).expect("there").parse().expect("TOML");
    let shard = &config["database"]["shop"]["shard"][1];
    assert_eq!(shard["primary"].as_str(), Some(tier.shards[1].primary.address().as_str()));
    assert_eq!(shard["replicas"][0].as_str(), Some(tier.shards[1].replicas[0].address().as_str()));
    assert_eq!(config["pool"]["size"].as_integer(), Some(3));
    for secret in ["weir.toml", "users.toml", "admin.pw", "tier.json"] {
        let mode = std::fs::metadata(run.path().join(secret)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    assert!(TierState::load_or_new(&run, 3).is_err(), "adding a shard is no matter of starting it");

    tier.shards[1].replicas[0].admin("shop").await.expect("a replica of the shop");
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &tier.shards[1].primary.pid().expect("runs").to_string()])
            .status()
            .expect("kill runs")
            .success()
    );
    wait_until("the death is seen", || tier.first_dead().is_some_and(|(name, _)| name == "shard1"));
}

/// Not a test of its own: the child of the two tests below, which starts a cluster and waits to be killed.
#[tokio::test]
async fn victim() {
    let Ok(kind) = std::env::var("WEIR_LOCAL_VICTIM") else { return };
    let run = Run::temporary(&kind).expect("a run");
    let _cluster = Cluster::start(&run, ClusterSpec::new("shard0", "pw")).await.expect("starts");
    println!("\nrunning in {}", run.path().display());
    tokio::time::sleep(Duration::from_secs(120)).await;
}

/// Starts the victim in a process of its own; gives it and its directory.
fn start_victim(kind: &str) -> (std::process::Child, std::path::PathBuf) {
    use std::io::BufRead as _;
    let mut child = Command::new(std::env::current_exe().expect("ourselves"))
        .args(["--exact", "victim", "--nocapture", "--test-threads=1"])
        .env("WEIR_LOCAL_VICTIM", kind)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let lines = std::io::BufReader::new(child.stdout.take().expect("piped")).lines();
    let path =
        lines.map_while(Result::ok).find_map(|line| line.strip_prefix("running in ").map(Into::into)).expect("a path");
    (child, path)
}

fn wait_until(what: &str, reached: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(45);
    while !reached() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_killed_owner_leaves_nothing() {
    let (mut child, path) = start_victim("reaped");
    assert!(running_in(&path));
    child.kill().expect("killed");
    child.wait().expect("reaped");
    wait_until("the reaper ends the servers", || !running_in(&path));
    wait_until("the reaper removes the directory", || !path.exists());
}

#[test]
fn a_stale_run_is_swept() {
    let (mut child, path) = start_victim("swept");
    let reaper = std::fs::read_to_string(path.join("reaper.pid")).expect("recorded");
    let reaper = reaper.split_whitespace().next().expect("a pid").to_owned();
    assert!(Command::new("kill").args(["-9", &reaper]).status().expect("kill runs").success());
    child.kill().expect("killed");
    child.wait().expect("reaped");
    std::thread::sleep(Duration::from_millis(300));
    assert!(running_in(&path) && path.exists(), "with its reaper dead too, the run is stale");
    let other = Run::temporary("other").expect("a run of another kind");
    assert!(path.exists(), "which is none of its business");
    drop(other);
    drop(Run::temporary("swept").expect("the next run"));
    assert!(!path.exists() && !running_in(&path), "swept");
}
