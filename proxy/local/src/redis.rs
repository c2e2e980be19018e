//! A throw-away Redis server: loopback only, in memory only, optionally with a password.
//!
//! Non-goal: persistence. A restarted server is empty, which is what tests of a forgetful cache need.

use std::os::unix::fs::PermissionsExt as _;
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
const POLL: Duration = Duration::from_millis(10);
const PORT_ATTEMPTS: u32 = 8;

/// A running Redis server. Dropping it stops it.
#[derive(Debug)]
pub struct Redis {
    run: Arc<Run>,
    port: u16,
    password: Option<String>,
    process: Mutex<Option<Process>>,
}

impl Redis {
    /// Starts Redis on a free port. Fails with what to install if there is none on this machine.
    pub async fn start(run: &Arc<Run>) -> Result<Self> {
        Self::start_on(run, 0, None).await
    }

    /// As [`Self::start`], on `wanted` if that is free, and asking clients for a password if there is one.
    pub async fn start_on(run: &Arc<Run>, wanted: u16, password: Option<&str>) -> Result<Self> {
        let mut redis = Self {
            run: Arc::clone(run),
            port: wanted,
            password: password.map(str::to_owned),
            process: Mutex::new(None),
        };
        for attempt in 1..=PORT_ATTEMPTS {
            if redis.port == 0 || !port::is_free(redis.port) || attempt > 1 {
                redis.port = port::free()?;
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
        self.port
    }

    /// `redis://127.0.0.1:6379`, with the password if it has one.
    pub fn url(&self) -> String {
        let password = self.password.as_ref().map(|password| format!(":{password}@")).unwrap_or_default();
        format!("redis://{password}127.0.0.1:{}", self.port)
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
        crate::process::read_log(&self.run.log_path("redis"))
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

    async fn launch(&self) -> Result<()> {
        let dir = self.run.path().join("redis");
        self.run.account().create_dir(&dir)?;
        let conf = dir.join("redis.conf");
        // In a file and not in arguments: those everybody on the machine can read.
        let mut text = format!(
            "bind 127.0.0.1\nport {}\ndir {}\nsave \"\"\nappendonly no\ndaemonize no\n\
            maxmemory 256mb\nmaxmemory-policy allkeys-lru\n",
            self.port,
            dir.display()
        );
        if let Some(password) = &self.password {
            text.extend(["requirepass ", password, "\n"]);
        }
        std::fs::write(&conf, text)?;
        std::fs::set_permissions(&conf, std::fs::Permissions::from_mode(0o600))?;
        self.run.account().own(&conf)?;
        let mut command = template::command(self.run.account(), self.run.binaries().redis_server()?);
        command.arg(&conf);
        *self.process.lock() = Some(self.run.spawn("redis", StopSignal::Kill, command)?);
        self.wait_ready().await
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_WAIT;
        loop {
            if let Some(status) = self.exited() {
                bail!(
                    "redis-server did not start ({status}). Its log ends with:\n{}",
                    crate::log_tail(&self.run.log_path("redis"))
                );
            }
            let answered = timeout(ANSWER_WAIT, self.ping()).await.context("no answer").and_then(|answered| answered);
            match answered {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!(
                        "redis-server does not answer. Its log ends with:\n{}",
                        crate::log_tail(&self.run.log_path("redis"))
                    )));
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }

    async fn ping(&self) -> Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let auth = self.password.as_ref().map(|password| format!("AUTH {password}\r\n")).unwrap_or_default();
        stream.write_all(format!("{auth}PING\r\n").as_bytes()).await?;
        let mut seen = Vec::new();
        while !seen.windows(5).any(|window| window == b"+PONG") {
            let mut part = [0_u8; 256];
            let n = stream.read(&mut part).await?;
            if n == 0 || seen.len() > 4096 {
                bail!("redis-server said {:?}", String::from_utf8_lossy(&seen));
            }
            seen.extend_from_slice(&part[..n]);
        }
        Ok(())
    }
}
