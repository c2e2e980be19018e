//! A throw-away Redis server, or Sentinel: loopback only, in memory only, optionally with a password.
//!
//! Non-goal: persistence. A restarted server is empty, which is what tests of a forgetful cache need.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::{Process, Run, StopSignal, port, template};

const READY_WAIT: Duration = Duration::from_secs(20);
const ANSWER_WAIT: Duration = Duration::from_secs(1);
const ANSWER_BYTES_MAX: usize = 1 << 20;
const POLL: Duration = Duration::from_millis(10);
const PORT_ATTEMPTS: u32 = 8;

/// What a server is to be like.
#[derive(Clone, Debug)]
pub struct RedisSpec {
    /// Of its directory and its log: each server of a run has its own.
    pub name: String,
    /// Taken if it is free; 0: any.
    pub port: u16,
    /// Clients are asked for it.
    pub password: Option<String>,
    /// More lines of its configuration.
    pub lines: String,
    /// Names and texts of files that it finds in its working directory.
    pub files: Vec<(String, String)>,
    /// It watches over other servers and keeps no data.
    pub sentinel: bool,
}

impl Default for RedisSpec {
    fn default() -> Self {
        RedisSpec {
            name: "redis".to_owned(),
            port: 0,
            password: None,
            lines: String::new(),
            files: Vec::new(),
            sentinel: false,
        }
    }
}

/// A running Redis server. Dropping it stops it.
#[derive(Debug)]
pub struct Redis {
    run: Arc<Run>,
    /// With the port it has.
    spec: RedisSpec,
    process: Mutex<Option<Process>>,
}

impl Redis {
    /// Starts Redis on a free port. Fails with what to install if there is none on this machine.
    pub async fn start(run: &Arc<Run>) -> Result<Self> {
        Self::start_as(run, RedisSpec::default()).await
    }

    /// The same, as `spec` has it.
    pub async fn start_as(run: &Arc<Run>, spec: RedisSpec) -> Result<Self> {
        let mut redis = Self { run: Arc::clone(run), spec, process: Mutex::new(None) };
        for attempt in 1..=PORT_ATTEMPTS {
            if redis.spec.port == 0 || !port::is_free(redis.spec.port) || attempt > 1 {
                redis.spec.port = port::free()?;
            }
            match redis.launch().await {
                Err(_) if attempt < PORT_ATTEMPTS && redis.log().contains("bind: Address already in use") => {}
                other => return other.map(|()| redis),
            }
        }
        bail!("no free port for redis-server after {PORT_ATTEMPTS} attempts")
    }

    /// Its TCP port on 127.0.0.1. A restart keeps it.
    pub fn port(&self) -> u16 {
        self.spec.port
    }

    /// `redis://127.0.0.1:6379`, with the password if it has one.
    pub fn url(&self) -> String {
        let password = self.spec.password.as_ref().map(|password| format!(":{password}@")).unwrap_or_default();
        format!("redis://{password}127.0.0.1:{}", self.spec.port)
    }

    /// Its process id; none while it is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.process.lock().as_ref().map(Process::pid)
    }

    /// How it ended, if it was running and ended by itself.
    pub fn exited(&self) -> Option<std::process::ExitStatus> {
        self.process.lock().as_mut().and_then(Process::exited)
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        crate::process::read_log(&self.log_path())
    }

    /// Stops it, as its death: nothing is saved.
    pub fn kill9(&self) {
        if let Some(mut process) = self.process.lock().take() {
            process.kill9();
        }
    }

    /// Starts it again, empty, on the same port.
    pub async fn restart(&self) -> Result<()> {
        self.kill9();
        self.launch().await
    }

    fn write_file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        self.run.account().own(&path)?;
        Ok(path)
    }

    fn dir(&self) -> PathBuf {
        self.run.path().join(&self.spec.name)
    }

    fn log_path(&self) -> PathBuf {
        self.run.log_path(&self.spec.name)
    }

    async fn launch(&self) -> Result<()> {
        let dir = self.dir();
        self.run.account().create_dir(&dir)?;
        // In a file and not in arguments: those everybody on the machine can read.
        let mut text = format!("bind 127.0.0.1\nport {}\ndir {}\ndaemonize no\n", self.spec.port, dir.display());
        if !self.spec.sentinel {
            text.push_str("save \"\"\nappendonly no\nmaxmemory 256mb\nmaxmemory-policy allkeys-lru\n");
        }
        if let Some(password) = &self.spec.password {
            text.extend(["requirepass ", password, "\n"]);
        }
        text.push_str(&self.spec.lines);
        let conf = self.write_file("redis.conf", &text)?;
        for (name, text) in &self.spec.files {
            self.write_file(name, text)?;
        }
        let mut command = template::command(self.run.account(), self.run.binaries().redis_server()?);
        command.arg(&conf);
        if self.spec.sentinel {
            command.arg("--sentinel");
        }
        *self.process.lock() = Some(self.run.spawn(&self.spec.name, StopSignal::Kill, command)?);
        self.wait_ready().await
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_WAIT;
        loop {
            if let Some(status) = self.exited() {
                bail!(
                    "redis-server did not start ({status}). Its log ends with:\n{}",
                    crate::log_tail(&self.log_path())
                );
            }
            let answered = timeout(ANSWER_WAIT, self.ping()).await.context("no answer").and_then(|answered| answered);
            match answered {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!(
                        "redis-server does not answer. Its log ends with:\n{}",
                        crate::log_tail(&self.log_path())
                    )));
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }

    async fn ping(&self) -> Result<()> {
        self.command("PING").await.map(drop)
    }

    /// What it says to one command without line breaks, as it comes over the wire; empty for PING.
    pub async fn command(&self, line: &str) -> Result<String> {
        const END: &str = "+PONG\r\n";
        let mut stream = TcpStream::connect(("127.0.0.1", self.spec.port)).await?;
        let auth = self.spec.password.as_ref().map(|password| format!("AUTH {password}\r\n")).unwrap_or_default();
        stream.write_all(format!("{auth}{line}\r\nPING\r\n").as_bytes()).await?;
        let mut seen = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&seen);
            if let Some(answer) = text.strip_suffix(END) {
                let answer = if line == "PING" { "" } else { answer };
                return Ok(answer.strip_prefix("+OK\r\n").filter(|_| !auth.is_empty()).unwrap_or(answer).to_owned());
            }
            let mut part = [0_u8; 4096];
            let n = timeout(ANSWER_WAIT, stream.read(&mut part)).await??;
            if n == 0 || seen.len() > ANSWER_BYTES_MAX {
                bail!("redis-server said {text:?}");
            }
            seen.extend_from_slice(&part[..n]);
        }
    }
}
