//! `weir dev --json` as a tool drives it: one line, addresses that work, and nothing left after Ctrl-C.
//!
//! Non-goals: the page for people, and the storefront (`shop.rs` and the demo look at both).

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::placement::column;

/// Six servers on a busy machine.
const READY_WAIT: Duration = Duration::from_secs(180);
const END_WAIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// A `weir dev` that is ready.
struct Dev {
    child: Child,
    stdout: BufReader<ChildStdout>,
    line: Value,
    state_dir: PathBuf,
    /// Removes what is around the state directory.
    _around: tempfile::TempDir,
}

impl Dev {
    async fn start(arguments: &[&str]) -> Result<Self> {
        // As root the servers run as somebody else, who must be able to get there.
        let open = std::fs::Permissions::from_mode(0o711);
        let around = tempfile::Builder::new().prefix("weir-it-dev-").permissions(open).tempdir()?;
        let state_dir = around.path().join("state");
        let mut command = Command::new(weir()?);
        command.args(["dev", "--json", "--no-storefront", "--weir-port=0", "--http-port=0", "--state-dir"]);
        command.arg(&state_dir).args(arguments);
        // A test that fails kills it, and then its reaper ends the servers.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("standard output")?);
        let mut line = String::new();
        timeout(READY_WAIT, stdout.read_line(&mut line)).await.context("not ready in time")??;
        let line = serde_json::from_str(&line).with_context(|| format!("not a line of JSON: {line:?}"))?;
        Ok(Self { child, stdout, line, state_dir, _around: around })
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.line[key].as_str().with_context(|| format!("{key} is not text in {}", self.line))
    }

    fn pids(&self) -> Result<BTreeMap<String, u64>> {
        Ok(serde_json::from_value(self.line["pids"].clone())?)
    }

    /// Ctrl-C. It must end by itself, in order, with nothing further to say on standard output.
    async fn interrupt(mut self) -> Result<()> {
        let pids = self.pids()?;
        ensure!(pids.values().all(|pid| runs(*pid)), "they run before: {pids:?}");
        ensure!(self.state_dir.is_dir(), "the state directory is in use");
        let ourselves = self.child.id().context("it runs")?;
        ensure!(std::process::Command::new("kill").args(["-INT", &ourselves.to_string()]).status()?.success(), "kill");
        let status = timeout(END_WAIT, self.child.wait()).await.context("it does not end")??;
        ensure!(status.success(), "{status}");
        let mut rest = String::new();
        timeout(END_WAIT, self.stdout.read_to_string(&mut rest)).await.context("somebody holds its output open")??;
        ensure!(rest.is_empty(), "more than one line: {rest}");
        let deadline = Instant::now() + END_WAIT;
        while pids.values().any(|pid| runs(*pid)) {
            ensure!(
                Instant::now() < deadline,
                "still running: {:?}",
                pids.iter().filter(|(_, pid)| runs(**pid)).collect::<Vec<_>>()
            );
            tokio::time::sleep(POLL).await;
        }
        ensure!(!self.state_dir.exists(), "the state directory is left");
        Ok(())
    }
}

/// The binary of this build, found as the harness finds it.
fn weir() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("WEIR_BIN") {
        return Ok(path.into());
    }
    let ourselves = std::env::current_exe()?;
    let profile = ourselves.parent().and_then(|deps| deps.parent()).context("target/<profile>/deps")?;
    Ok(profile.join("weir"))
}

fn runs(pid: u64) -> bool {
    let asked = std::process::Command::new("kill").args(["-0", &pid.to_string()]).stderr(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}

async fn answer(dsn: &str, sql: &str) -> Result<String> {
    let client = weir_harness::connect(dsn).await.with_context(|| sql.to_owned())?;
    Ok(column(&client, sql).await?.first().context("no row")?.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_line_of_json_says_where_everything_is_and_ctrl_c_leaves_nothing() -> Result<()> {
    let dev = Dev::start(&[]).await?;
    let keys: Vec<&str> = dev.line.as_object().context("an object")?.keys().map(String::as_str).collect();
    for key in ["weir", "admin", "hub", "shards", "redis", "storefront", "metrics", "pids"] {
        ensure!(keys.contains(&key), "{key} is missing from {}", dev.line);
    }
    ensure!(dev.line["storefront"].is_null(), "none was asked for");

    let client = weir_harness::connect(dev.text("weir")?).await?;
    client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, name text)").await?;
    for key in 1..=20_i64 {
        client.execute("INSERT INTO users VALUES ($1, $2)", &[&key, &format!("user {key}")]).await?;
    }
    ensure!(column(&client, "SELECT name FROM users WHERE user_id = 7").await? == ["user 7"]);
    ensure!(column(&client, "SELECT count(*) FROM users").await? == ["20"]);
    ensure!(answer(dev.text("hub")?, "SELECT count(*) > 0 FROM pg_namespace WHERE nspname = 'weir'").await? == "t");
    let console = weir_harness::connect(dev.text("admin")?).await?;
    ensure!(column(&console, "SHOW SHARDS").await?.len() == 2);

    let shards = dev.line["shards"].as_array().context("shards")?;
    ensure!(shards.len() == 2, "{shards:?}");
    let mut rows = 0;
    for shard in shards {
        ensure!(shard["name"].is_string(), "{shard}");
        let primary = shard["primary"].as_str().context("primary")?;
        ensure!(answer(primary, "SELECT pg_is_in_recovery()").await? == "f");
        rows += answer(primary, "SELECT count(*) FROM users").await?.parse::<u32>()?;
        let replicas = shard["replicas"].as_array().context("replicas")?;
        ensure!(replicas.len() == 1, "{shard}");
        ensure!(answer(replicas[0].as_str().context("replica")?, "SELECT pg_is_in_recovery()").await? == "t");
    }
    ensure!(rows == 20, "{rows} rows on the shards");

    let page = reqwest::get(dev.text("metrics")?).await?.error_for_status()?.text().await?;
    ensure!(page.contains("weir_queries_total"), "{page}");
    if let Some(redis) = dev.line["redis"].as_str() {
        let address = redis.strip_prefix("redis://").context("a URL of Redis")?.trim_end_matches('/');
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut reply = [0; 5];
        timeout(END_WAIT, stream.read_exact(&mut reply)).await??;
        ensure!(&reply == b"+PONG");
    }
    let expected = 1 + 2 * 2 + 1 + usize::from(dev.line["redis"].is_string());
    ensure!(dev.pids()?.len() == expected && dev.pids()?.contains_key("weir"), "{:?}", dev.pids());
    dev.interrupt().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_shards_and_replicas_is_as_asked() -> Result<()> {
    let dev = Dev::start(&["--shards", "3", "--replicas", "0"]).await?;
    let console = weir_harness::connect(dev.text("admin")?).await?;
    ensure!(column(&console, "SHOW SHARDS").await?.len() == 3);
    let shards = dev.line["shards"].as_array().context("shards")?;
    ensure!(
        shards.len() == 3 && shards.iter().all(|shard| shard["replicas"] == Value::Array(Vec::new())),
        "{shards:?}"
    );
    dev.interrupt().await
}
