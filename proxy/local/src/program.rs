//! Our own two programs, as children: weir and the storefront, each awaited until it says that it is ready.
//!
//! Non-goal: building them. A binary that is not there is an error that says how to build it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::ChildStdout;
use tokio::time::{Instant, sleep, timeout};

use crate::{Process, Run, StopSignal};

const READY_WAIT: Duration = Duration::from_secs(60);
const HTTP_WAIT: Duration = Duration::from_secs(2);
/// Loading a large catalogue on a busy machine.
const LOAD_WAIT: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(15);
/// A reply of ours is far smaller; a stranger on our port might send for ever.
const HTTP_BYTES_MAX: u64 = 16 << 20;

/// A running weir.
#[derive(Debug)]
pub struct Weir {
    run: Arc<Run>,
    binary: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
    http_port: u16,
    process: Mutex<Option<Process>>,
}

impl Weir {
    /// Runs `binary run --config <config>` and waits until its /readyz says 200.
    pub async fn start(run: &Arc<Run>, binary: &Path, config: &Path, http_port: u16) -> Result<Self> {
        Self::start_with(run, binary, vec!["run".into(), "--config".into(), config.into()], (&[], http_port)).await
    }

    /// Runs `binary` with these arguments and (environment, HTTP port), and waits until its /readyz says 200.
    pub async fn start_with(
        run: &Arc<Run>,
        binary: &Path,
        arguments: Vec<OsString>,
        (environment, http_port): (&[(String, String)], u16),
    ) -> Result<Self> {
        must_exist(binary)?;
        let weir = Self {
            run: Arc::clone(run),
            binary: binary.to_owned(),
            arguments,
            environment: environment.to_vec(),
            http_port,
            process: Mutex::new(None),
        };
        weir.launch(&[]).await?;
        Ok(weir)
    }

    /// Its process id; none while it is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.process.lock().as_ref().map(Process::pid)
    }

    /// How it ended, if it was running and ended by itself.
    pub fn exited(&self) -> Option<ExitStatus> {
        self.process.lock().as_mut().and_then(Process::exited)
    }

    /// All it has logged, over all its starts.
    pub fn log(&self) -> String {
        crate::process::read_log(&self.run.log_path("weir"))
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        crate::log_tail(&self.run.log_path("weir"))
    }

    /// SIGTERM, then SIGKILL if it does not end in time.
    pub fn stop(&self) {
        if let Some(mut process) = self.process.lock().take() {
            process.stop_with(StopSignal::Terminate);
        }
    }

    /// SIGKILL.
    pub fn kill9(&self) {
        if let Some(mut process) = self.process.lock().take() {
            process.kill9();
        }
    }

    /// Kills it if it runs, starts it again on the same configuration and waits until it is ready.
    pub async fn restart(&self) -> Result<()> {
        self.restart_with(&[]).await
    }

    /// The same, with more variables in its environment for this once.
    pub async fn restart_with(&self, environment: &[(String, String)]) -> Result<()> {
        self.kill9();
        self.launch(environment).await
    }

    async fn launch(&self, environment: &[(String, String)]) -> Result<()> {
        let mut command = Command::new(&self.binary);
        command.args(&self.arguments).envs(self.environment.iter().chain(environment).cloned());
        *self.process.lock() = Some(self.run.spawn("weir", StopSignal::Kill, command)?);
        let deadline = Instant::now() + READY_WAIT;
        loop {
            if let Some(status) = self.exited() {
                bail!("weir did not start ({status}). Its log ends with:\n{}", self.log_tail());
            }
            let last = match http_get(self.http_port, "/readyz").await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("/readyz says {status}: {body}"),
                Err(error) => format!("/readyz does not answer: {error:#}"),
            };
            if Instant::now() > deadline {
                bail!(
                    "weir is not ready after {} s. {last}\nIts log ends with:\n{}",
                    READY_WAIT.as_secs(),
                    self.log_tail()
                );
            }
            sleep(POLL).await;
        }
    }
}

/// A running storefront.
#[derive(Debug)]
pub struct Storefront {
    process: Mutex<Process>,
    ready: Ready,
    /// Held open: the storefront must be able to write to it.
    _stdout: BufReader<ChildStdout>,
}

/// What a storefront is started with.
#[derive(Clone, Debug)]
pub struct StorefrontSpec {
    /// Names its log, so that one run can have several.
    pub label: String,
    pub binary: PathBuf,
    pub database_url: String,
    /// 0 for a free one.
    pub port: u16,
    /// More environment, as (name, value): secrets, costs.
    pub environment: Vec<(String, String)>,
}

/// The line `storefront serve --ready-json` prints.
#[derive(Debug, Deserialize)]
struct Ready {
    listening: String,
    payments: String,
}

impl Storefront {
    /// Runs `storefront serve`, which makes its tables first, and waits for its line.
    pub async fn start(run: &Arc<Run>, spec: &StorefrontSpec) -> Result<Self> {
        must_exist(&spec.binary)?;
        let label = &spec.label;
        let mut command = Command::new(&spec.binary);
        command.arg("serve").arg(format!("--listen=127.0.0.1:{}", spec.port)).args(["--migrate", "--ready-json"]);
        command.env("DATABASE_URL", &spec.database_url).envs(spec.environment.iter().cloned());
        let (mut process, stdout) = run.spawn_piped(label, StopSignal::Kill, command)?;
        let mut stdout = BufReader::new(ChildStdout::from_std(stdout)?);
        let mut line = String::new();
        let failed = match timeout(READY_WAIT, stdout.read_line(&mut line)).await {
            Ok(Ok(n)) if n > 0 => {
                let ready = serde_json::from_str(&line).with_context(|| format!("{label} said {line:?}"))?;
                return Ok(Self { process: Mutex::new(process), ready, _stdout: stdout });
            }
            Ok(Ok(_)) => "ended before it was ready".to_owned(),
            Ok(Err(error)) => format!("cannot be heard ({error})"),
            Err(_) => format!("is not ready after {} s", READY_WAIT.as_secs()),
        };
        process.stop();
        bail!("{label} {failed}. Its log ends with:\n{}", process.log_tail())
    }

    /// Runs one of the storefront's commands (`migrate`, `load …`) to its end; its words are the error if it fails.
    pub async fn command(binary: &Path, arguments: &[&str], database_url: &str) -> Result<()> {
        must_exist(binary)?;
        let mut command = tokio::process::Command::new(binary);
        command.args(arguments).env("DATABASE_URL", database_url).kill_on_drop(true).stdin(std::process::Stdio::null());
        let what = format!("storefront {}", arguments.join(" "));
        let said = timeout(LOAD_WAIT, command.output())
            .await
            .with_context(|| format!("{what} is not done after {} s", LOAD_WAIT.as_secs()))??;
        if !said.status.success() {
            bail!("{what} failed ({}):\n{}", said.status, String::from_utf8_lossy(&said.stderr));
        }
        Ok(())
    }

    /// Its base URL, without a slash at the end.
    pub fn url(&self) -> &str {
        self.ready.listening.trim_end_matches('/')
    }

    /// The base URL of its sandbox payment provider.
    pub fn payments_url(&self) -> &str {
        self.ready.payments.trim_end_matches('/')
    }

    /// Lets it finish the requests under way, for at most 5 s.
    pub fn stop(&self) {
        self.process.lock().stop_with(StopSignal::Terminate);
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.lock().pid()
    }

    /// How it ended, if it did.
    pub fn exited(&self) -> Option<ExitStatus> {
        self.process.lock().exited()
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        self.process.lock().log()
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        self.process.lock().log_tail()
    }
}

/// A GET of a small page on 127.0.0.1, within 2 s: (status, body).
pub async fn http_get(port: u16, path: &str) -> Result<(u16, String)> {
    timeout(HTTP_WAIT, async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        // HTTP/1.0: the body ends with the connection, never in chunks.
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n").as_bytes()).await?;
        let mut reply = Vec::new();
        stream.take(HTTP_BYTES_MAX).read_to_end(&mut reply).await?;
        let reply = String::from_utf8_lossy(&reply);
        let (head, body) = reply.split_once("\r\n\r\n").context("no HTTP reply")?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no HTTP status")?;
        Ok((status, body.to_owned()))
    })
    .await
    .context("no answer")?
}

fn must_exist(binary: &Path) -> Result<()> {
    if !binary.is_file() {
        bail!("{} is not there. Build it first: cargo build --workspace", binary.display());
    }
    Ok(())
}
