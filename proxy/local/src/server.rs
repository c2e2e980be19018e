//! One Postgres server process and how to reach it: what primaries and replicas have in common.
//!
//! Invariant: a [`Server`] that was returned to a caller accepts connections, until the caller stops or kills it.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

use crate::cluster::{Role, SUPERUSER};
use crate::{Process, Run, StopSignal, port, settings, template};

/// From the start of the process to the first answered connection; recovery after a kill is part of it.
const READY_WAIT: Duration = Duration::from_secs(60);
const CONNECT_WAIT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(15);
/// Attempts at a port before giving up: another process may take it between our look and the server's.
const PORT_ATTEMPTS: u32 = 8;

/// A Postgres server of a run. Reached through [`crate::Cluster`] or [`crate::Replica`].
#[derive(Debug)]
pub struct Server {
    pub(crate) run: Arc<Run>,
    pub(crate) name: String,
    pub(crate) roles: Vec<Role>,
    pub(crate) log_statements: bool,
    /// Settings of this server alone, as (name, value).
    pub(crate) settings: Vec<(String, String)>,
    /// Set by the first [`Self::launch`], and then fixed.
    pub(crate) port: u16,
    process: Mutex<Option<Process>>,
}

impl Server {
    pub(crate) fn new(run: &Arc<Run>, name: &str, roles: Vec<Role>, port: u16) -> Self {
        Self {
            run: Arc::clone(run),
            name: name.to_owned(),
            roles,
            log_statements: false,
            settings: Vec::new(),
            port,
            process: Mutex::new(None),
        }
    }

    /// What it is called: also its directory, its log and its `application_name` when it replicates.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its TCP port on 127.0.0.1. A restart keeps it.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:5442`, as weir's configuration wants it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The directory that holds `data`, private to the servers' account.
    pub fn dir(&self) -> PathBuf {
        self.run.path().join(&self.name)
    }

    /// The postmaster's process id; none while it is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.process.lock().as_ref().map(Process::pid)
    }

    /// How the postmaster ended, if it was running and ended by itself.
    pub fn exited(&self) -> Option<std::process::ExitStatus> {
        self.process.lock().as_mut().and_then(Process::exited)
    }

    /// A URL for `user` on `database`; with the password if the user is one this cluster was made with.
    pub fn dsn(&self, database: &str, user: &str) -> String {
        let password = self.roles.iter().find(|role| role.name == user).map(|role| format!(":{}", role.password));
        format!("postgres://{user}{}@127.0.0.1:{}/{database}", password.unwrap_or_default(), self.port)
    }

    /// A URL for the superuser.
    pub fn admin_dsn(&self, database: &str) -> String {
        self.dsn(database, SUPERUSER)
    }

    /// A connection of the superuser. Its driver task ends with the client.
    pub async fn admin(&self, database: &str) -> Result<Client> {
        connect(&self.admin_dsn(database)).await.with_context(|| format!("connecting to {}", self.name))
    }

    /// All the server has logged, over all its starts.
    pub fn log(&self) -> String {
        crate::process::read_log(&self.run.log_path(&self.name))
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        crate::log_tail(&self.run.log_path(&self.name))
    }

    /// Stops the server (immediate shutdown). Does nothing if it is stopped.
    pub fn stop(&self) {
        drop(self.process.lock().take());
    }

    /// Stops the server after a checkpoint, so that its next start recovers nothing. Connections are cut.
    pub fn stop_cleanly(&self) {
        if let Some(mut process) = self.process.lock().take() {
            process.stop_with(StopSignal::Interrupt);
        }
    }

    /// Kills the postmaster and all its backends at once, as a power cut would.
    pub fn kill9(&self) {
        if let Some(mut process) = self.process.lock().take() {
            process.kill9();
        }
    }

    /// Stops the server if it runs, starts it on the same port and data, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        self.stop();
        self.start_on(self.port, self.superuser_password()?).await
    }

    pub(crate) fn superuser_password(&self) -> Result<&str> {
        let superuser = self.roles.iter().find(|role| role.name == SUPERUSER);
        Ok(&superuser.context("a server has a superuser")?.password)
    }

    /// Stops it and all its backends where they are, as a machine that hangs.
    pub fn freeze(&self) {
        if let Some(process) = &*self.process.lock() {
            process.freeze();
        }
    }

    /// Lets them go on, as if nothing had been.
    pub fn thaw(&self) {
        if let Some(process) = &*self.process.lock() {
            process.thaw();
        }
    }

    /// First start: picks a port (`self.port` if that is set and free) and waits until the superuser can log in.
    pub(crate) async fn launch(&mut self, password: &str) -> Result<()> {
        if self.port == 0 || !port::is_free(self.port) {
            self.port = port::free()?;
        }
        for _ in 1..PORT_ATTEMPTS {
            match self.start_on(self.port, password).await {
                Err(error) if error.is::<PortTaken>() => self.port = port::free()?,
                other => return other,
            }
        }
        self.start_on(self.port, password).await
    }

    async fn start_on(&self, port: u16, password: &str) -> Result<()> {
        let data = self.dir().join("data");
        let conf = data.join("weir-local.conf");
        std::fs::write(&conf, settings::text(port, &self.dir(), self.log_statements, &self.settings))
            .with_context(|| format!("cannot write {}", conf.display()))?;
        std::fs::set_permissions(&conf, Permissions::from_mode(0o600))?;
        self.run.account().own(&conf)?;
        let mut command = template::command(self.run.account(), &self.run.binaries().postgres("postgres"));
        command.arg("-D").arg(&data);
        let log_before = self.log().len();
        *self.process.lock() = Some(self.run.spawn(&self.name, StopSignal::Quit, command)?);
        let ready = self.wait_ready(port, password, log_before).await;
        if ready.is_err() {
            self.stop();
        }
        ready
    }

    async fn wait_ready(&self, port: u16, password: &str, log_before: usize) -> Result<()> {
        let dsn = format!("postgres://{SUPERUSER}:{password}@127.0.0.1:{port}/postgres");
        let deadline = Instant::now() + READY_WAIT;
        loop {
            if let Some(status) = self.exited() {
                let log = self.log();
                if log.get(log_before..).is_some_and(|new| new.contains("could not bind")) {
                    return Err(anyhow!(PortTaken(port)));
                }
                bail!(
                    "PostgreSQL server {} did not start ({status}). Its log ends with:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            match connect(&dsn).await {
                Ok(client) => return self.check_identity(&client).await,
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!(
                        "PostgreSQL server {} does not answer after {} s. Its log ends with:\n{}",
                        self.name,
                        READY_WAIT.as_secs(),
                        self.log_tail()
                    )));
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }

    /// The port may belong to someone else's server while ours is still finding out that it is taken.
    async fn check_identity(&self, client: &Client) -> Result<()> {
        let data: String = client.query_one("SHOW data_directory", &[]).await?.get(0);
        if data != self.dir().join("data").display().to_string() {
            return Err(anyhow!(PortTaken(self.port)));
        }
        Ok(())
    }
}

/// The one start error that is worth another port.
#[derive(Debug)]
struct PortTaken(u16);

impl std::fmt::Display for PortTaken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {} is taken by another process", self.0)
    }
}

impl std::error::Error for PortTaken {}

/// Connects within a bounded time and drives the connection in a task of its own.
pub(crate) async fn connect(dsn: &str) -> Result<Client> {
    let connecting = tokio_postgres::connect(dsn, NoTls);
    let (client, connection) = tokio::time::timeout(CONNECT_WAIT, connecting).await.context("no answer")??;
    tokio::spawn(connection);
    Ok(client)
}
