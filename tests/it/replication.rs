//! Replication connections through weir, with Postgres's own tools and over the raw wire.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use weir_harness::Tier;
use weir_local::Binaries;
use weir_wire::backend::tag;
use weir_wire::frontend::put_query;

use crate::raw::Raw;

const PATIENCE: Duration = Duration::from_secs(30);

async fn tier() -> Result<Tier> {
    let tier = Tier::builder().shards(2).start().await?;
    for shard in &tier.shards {
        shard.primary.admin("postgres").await?.batch_execute("ALTER ROLE shop REPLICATION").await?;
    }
    Ok(tier)
}

/// A connection string for Postgres's tools, to a shard.
fn conninfo(tier: &Tier, database: &str, shard: Option<&str>) -> String {
    let options = shard.map(|shard| format!(" options='-c weir.shard={shard}'")).unwrap_or_default();
    format!(
        "host=127.0.0.1 port={} user=shop password={} dbname={database}{options}",
        tier.port(),
        tier.state.shop_password
    )
}

fn tool(name: &str, args: &[&str]) -> Result<Command> {
    let mut command = Command::new(Binaries::find()?.postgres(name));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}

async fn run(mut command: Command) -> Result<Output> {
    let output = tokio::time::timeout(PATIENCE, command.output()).await.context("the tool does not end")??;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(output)
}

async fn system_of(tier: &Tier, shard: usize) -> Result<String> {
    let admin = tier.shards[shard].primary.admin("postgres").await?;
    let row = admin.query_one("SELECT system_identifier::text FROM pg_control_system()", &[]).await?;
    Ok(row.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reaches_the_server_it_names() -> Result<()> {
    let tier = tier().await?;
    let (home, other) = (system_of(&tier, 0).await?, system_of(&tier, 1).await?);
    assert_ne!(home, other);
    for (mode, settings, system) in [
        ("true", vec![], &home),
        ("database", vec![], &home),
        ("database", vec![("options", "-c weir.shard=shard1")], &other),
        ("1", vec![("options", "-c weir.shard=shop/shard1 -c application_name=a\\ b")], &other),
        ("on", vec![("weir.shard", "shard0")], &home),
    ] {
        let mut parameters = vec![("replication", mode)];
        parameters.extend(settings);
        let mut client = Raw::login(&tier.dsn("shop"), &parameters).await?;
        let (tags, values) = client.query("IDENTIFY_SYSTEM").await?;
        assert_eq!((tags.as_str(), &values[0]), ("TDCZ", system), "{parameters:?}");
        let (tags, values) = client.query("SHOW server_version_num").await?;
        assert_eq!(tags, "TDCZ", "{values:?}");
        // SQL is for logical connections; the server itself says so.
        let (tags, _) = client.query("SELECT 1").await?;
        assert_eq!(tags, if mode == "database" { "TDCZ" } else { "EZ" });
    }
    // Physical connections need no database, logical ones do.
    let nowhere = tier.dsn("replication");
    let mut client = Raw::login(&nowhere, &[("replication", "true")]).await?;
    assert_eq!(client.query("IDENTIFY_SYSTEM").await?.1, [home]);
    for (dsn, settings, code) in [
        (&nowhere, &[("replication", "database")][..], "3D000"),
        (&nowhere, &[("replication", "perhaps")], "22023"),
        (&tier.dsn("shop"), &[("replication", "true"), ("weir.shard", "shard7")], "22023"),
    ] {
        let error = Raw::login(dsn, settings).await.err().context("refused")?.to_string();
        assert!(error.contains(code), "{settings:?}: {error}");
    }
    let mut plain = Raw::login(&tier.dsn("shop"), &[("replication", "off")]).await?;
    assert_eq!(plain.query("SELECT 1").await?.0, "TDCZ", "an ordinary session");
    // A login without the right is for the server to refuse, in its own words.
    tier.shards[0].primary.admin("postgres").await?.batch_execute("ALTER ROLE shop NOREPLICATION").await?;
    let error = Raw::login(&tier.dsn("shop"), &[("replication", "true")]).await.err().context("refused")?;
    assert!(error.to_string().contains("42501"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_connection_ends_with_the_clients_and_is_never_lent() -> Result<()> {
    let tier = tier().await?;
    let mut client =
        Raw::login(&tier.dsn("shop"), &[("replication", "database"), ("application_name", "walk")]).await?;
    let (_, values) = client.query("SELECT pg_backend_pid()").await?;
    let process = values[0].clone();
    let admin = tier.shards[0].primary.admin("postgres").await?;
    let seen = format!("SELECT application_name FROM pg_stat_activity WHERE pid = {process}");
    assert_eq!(admin.query_one(&seen, &[]).await?.get::<_, &str>(0), "walk");
    // Cancel works on it as on any other.
    put_query(&mut client.out, "SELECT pg_sleep(30)");
    client.flush().await?;
    let start = Instant::now();
    loop {
        let mut stream = TcpStream::connect(("127.0.0.1", tier.port())).await?;
        let mut request = BytesMut::new();
        weir_wire::startup::put_cancel(&mut request, client.process, &client.secret);
        stream.write_all(&request).await?;
        assert_eq!(stream.read(&mut [0; 1]).await?, 0, "a cancel request is never answered");
        if tokio::time::timeout(Duration::from_millis(100), client.peeked()).await.is_ok() {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "never cancelled");
    }
    let (tags, bodies) = client.until_ready().await?;
    let error = tags.find('E').context("an error")?;
    assert!(crate::raw::error_text(&bodies[error]).starts_with("57014"), "{tags}");
    drop(client);
    let start = Instant::now();
    while !admin.query(&seen, &[]).await?.is_empty() {
        assert!(start.elapsed() < PATIENCE, "the server connection outlived its client");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(tier.connect().await?.query("SELECT 1", &[]).await?.len(), 1);
    Ok(())
}

/// CopyBoth by hand: WAL comes, status updates go, and the stream ends from either side.
#[tokio::test(flavor = "multi_thread")]
async fn wal_streams_both_ways() -> Result<()> {
    let tier = tier().await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    let mut client = Raw::login(&tier.dsn("shop"), &[("replication", "true")]).await?;
    let start = admin.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get::<_, String>(0);
    put_query(&mut client.out, &format!("START_REPLICATION PHYSICAL {start}"));
    assert_eq!(client.next().await?.0, tag::COPY_BOTH);
    admin.batch_execute("CREATE TABLE streamed AS SELECT i FROM generate_series(1, 200000) i").await?;
    let mut streamed = 0;
    while streamed < 4_000_000 {
        let (kind, body) = client.next().await?;
        assert_eq!(kind, tag::COPY_DATA);
        streamed += body.len();
        if body[0] == b'k' || streamed % 7 == 0 {
            let mut status = vec![b'r'];
            status.extend_from_slice(&body[9..17]);
            status.extend_from_slice(&[0; 25]);
            weir_wire::frame::put(&mut client.out, tag::COPY_DATA, |out| out.extend_from_slice(&status));
        }
    }
    weir_wire::frame::put(&mut client.out, tag::COPY_DONE, |_| {});
    let (tags, _) = client.until_ready().await?;
    assert!(tags.trim_start_matches('d').starts_with('c') && tags.ends_with("CZ"), "{tags}");
    // The server goes away: so does the connection.
    tier.shards[0].primary.stop();
    assert!(client.closed().await);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_basebackup_and_pg_receivewal_take_a_named_shard() -> Result<()> {
    let tier = tier().await?;
    let dir = tempfile::tempdir()?;
    let backup = dir.path().join("backup");
    let (target, conn) = (backup.to_string_lossy().into_owned(), conninfo(&tier, "shop", Some("shard1")));
    run(tool("pg_basebackup", &["-D", &target, "-d", &conn, "-X", "stream", "-c", "fast"])?).await?;
    let control = run(tool("pg_controldata", &[&target])?).await?;
    let said = String::from_utf8_lossy(&control.stdout).into_owned();
    assert!(said.contains(&system_of(&tier, 1).await?), "a backup of another server:\n{said}");
    run(tool("pg_verifybackup", &[&target])?).await?;

    let wal = dir.path().join("wal");
    std::fs::create_dir(&wal)?;
    let home = conninfo(&tier, "shop", None);
    run(tool("pg_receivewal", &["-d", &home, "--slot", "archive", "--create-slot"])?).await?;
    let admin = tier.shards[0].primary.admin("shop").await?;
    admin.batch_execute("CREATE TABLE archived AS SELECT 1").await?;
    let end = admin.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get::<_, String>(0);
    admin.batch_execute("CREATE TABLE more AS SELECT generate_series(1, 1000)").await?;
    let target = wal.to_string_lossy().into_owned();
    run(tool("pg_receivewal", &["-D", &target, "-d", &home, "--slot", "archive", "--no-loop", "--endpos", &end])?)
        .await?;
    let received = files(&wal);
    let size = received.first().context("a WAL file")?.metadata()?.len();
    assert!(size > 0, "{received:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_recvlogical_follows_a_database() -> Result<()> {
    let tier = tier().await?;
    let dir = tempfile::tempdir()?;
    let changes = dir.path().join("changes");
    let (target, conn) = (changes.to_string_lossy().into_owned(), conninfo(&tier, "shop", Some("shard1")));
    run(tool("pg_recvlogical", &["-d", &conn, "--slot", "feed", "--create-slot", "-P", "test_decoding"])?).await?;
    let mut receiver =
        tool("pg_recvlogical", &["-d", &conn, "--slot", "feed", "--start", "-f", &target, "-F", "1", "-s", "1"])?
            .spawn()?;
    let admin = tier.shards[1].primary.admin("shop").await?;
    admin.batch_execute("CREATE TABLE followed (word text); INSERT INTO followed VALUES ('heard')").await?;
    until_written(&mut receiver, "the change", || {
        std::fs::read_to_string(&changes).is_ok_and(|text| text.contains("word[text]:'heard'"))
    })
    .await?;
    drop(receiver);
    Ok(())
}

fn files(dir: &PathBuf) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Waits for what a running tool writes.
async fn until_written(tool: &mut Child, what: &str, done: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > PATIENCE {
            tool.start_kill()?;
            let mut said = String::new();
            tool.stderr.take().context("stderr")?.read_to_string(&mut said).await?;
            bail!("never wrote {what}; it said: {said}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
