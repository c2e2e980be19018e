//! A streaming standby of a cluster, whose replay can be paused: how tests make a replica provably stale. And what makes one a
//! primary, and a primary that was replaced a standby.
//!
//! Invariant: a [`Replica`] that was returned to a caller streams from its primary.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::cluster::{SUPERUSER, check_name};
use crate::server::{Server, connect};
use crate::template;

/// How long streaming, pausing and catching up may take.
const SETTLE_WAIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(15);
/// Asked of a primary, of a standby's name.
const STREAMS: &str =
    "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming'";

/// A running standby. Dropping it stops it; its files go with the run.
#[derive(Debug)]
pub struct Replica {
    server: Server,
    primary_admin_dsn: String,
}

impl Deref for Replica {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Replica {
    pub(crate) async fn start(primary: &Server, name: &str, port: u16) -> Result<Self> {
        check_name(name)?;
        let mut server = Server::new(&primary.run, name, primary.roles.clone(), port);
        server.log_statements = primary.log_statements;
        server.settings.clone_from(&primary.settings);
        let password = primary.superuser_password()?.to_owned();
        server.settings.push(("primary_conninfo".to_owned(), conninfo(primary, name)?));
        let mut replica = Self { server, primary_admin_dsn: primary.admin_dsn("postgres") };
        let kept = replica.dir().join("ready").exists();
        if kept && replica.launch(&password).await.is_ok() {
            return Ok(replica);
        }
        // New, or its primary has gone on without it: copy the primary.
        replica.server.stop();
        copy(primary, &replica.server).await?;
        replica.launch(&password).await?;
        std::fs::write(replica.dir().join("ready"), "")?;
        Ok(replica)
    }

    async fn launch(&mut self, password: &str) -> Result<()> {
        self.server.launch(password).await?;
        self.wait_streaming().await
    }

    /// Waits until the primary that it was made from says that it streams to this replica.
    pub async fn wait_streaming(&self) -> Result<()> {
        let primary = connect(&self.primary_admin_dsn).await?;
        self.server.poll("stream", (&primary, STREAMS), &[&self.name()]).await
    }

    /// Waits until everything the primary has written by now is visible here.
    pub async fn catch_up(&self) -> Result<()> {
        let primary = connect(&self.primary_admin_dsn).await?;
        let lsn: String = primary.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get(0);
        let admin = self.admin("postgres").await?;
        let sql = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
        self.server.poll("catch up", (&admin, sql), &[&lsn]).await
    }
}

impl Server {
    /// Stops replay: WAL still arrives, but queries see nothing newer. Returns when replay stands still.
    pub async fn pause_replay(&self) -> Result<()> {
        let admin = self.admin("postgres").await?;
        admin.batch_execute("SELECT pg_wal_replay_pause()").await?;
        // Until PostgreSQL 13 a pause could only be asked for; from 14 on it can be seen to hold.
        let sql = if self.run.binaries().postgres_major() >= 14 {
            "SELECT pg_get_wal_replay_pause_state() = 'paused'"
        } else {
            "SELECT pg_is_wal_replay_paused()"
        };
        self.poll("pause replay", (&admin, sql), &[]).await
    }

    /// Lets replay go on.
    pub async fn resume_replay(&self) -> Result<()> {
        Ok(self.admin("postgres").await?.batch_execute("SELECT pg_wal_replay_resume()").await?)
    }

    /// Makes it a primary of its own; returns when it accepts writes.
    pub async fn promote(&self) -> Result<()> {
        let admin = self.admin("postgres").await?;
        let promoted: bool = admin.query_one("SELECT pg_promote(true, 30)", &[]).await?.get(0);
        if !promoted {
            bail!("{} was not promoted within 30 s. Its log ends with:\n{}", self.name(), self.log_tail());
        }
        Ok(())
    }

    /// A standby receives from another primary from now on, also after a restart. Returns when it streams.
    pub async fn follow(&self, primary: &Server) -> Result<()> {
        let conninfo = conninfo(primary, self.name())?.replace('\'', "''");
        let admin = self.admin("postgres").await?;
        admin.batch_execute(&format!("ALTER SYSTEM SET primary_conninfo = '{conninfo}'")).await?;
        admin.batch_execute("SELECT pg_reload_conf()").await?;
        self.streams_from(primary).await
    }

    /// A primary that was replaced, running or not, becomes a standby of the new one: what it had is thrown away, and a copy
    /// is made. Returns when it streams.
    pub async fn rejoin(&self, primary: &Server) -> Result<()> {
        self.stop();
        copy(primary, self).await?;
        let auto = self.dir().join("data/postgresql.auto.conf");
        let mut text = std::fs::read_to_string(&auto)?;
        let conninfo = conninfo(primary, self.name())?.replace('\'', "''");
        text.extend(["primary_conninfo = '", &conninfo, "'\n"]);
        std::fs::write(&auto, text)?;
        std::fs::write(self.dir().join("ready"), "")?;
        self.restart().await?;
        self.streams_from(primary).await
    }

    async fn streams_from(&self, primary: &Server) -> Result<()> {
        let asked = primary.admin("postgres").await?;
        self.poll("stream", (&asked, STREAMS), &[&self.name()]).await
    }

    /// Asks `sql` on `client`, a question with one boolean answer, until that is yes.
    async fn poll(&self, what: &str, (client, sql): (&Client, &str), values: &[&(dyn ToSql + Sync)]) -> Result<()> {
        let deadline = Instant::now() + SETTLE_WAIT;
        while !client.query_one(sql, values).await?.get::<_, bool>(0) {
            if Instant::now() > deadline {
                bail!(
                    "{} did not {what} within {} s. Its log ends with:\n{}",
                    self.name(),
                    SETTLE_WAIT.as_secs(),
                    self.log_tail()
                );
            }
            sleep(POLL).await;
        }
        Ok(())
    }
}

/// How a standby called `name` connects to its primary.
fn conninfo(primary: &Server, name: &str) -> Result<String> {
    let (port, password) = (primary.port(), primary.superuser_password()?);
    Ok(format!("host=127.0.0.1 port={port} user={SUPERUSER} password={password} application_name={name}"))
}

/// Puts a copy of the primary in place of all that a stopped server has, to be started as a standby.
async fn copy(primary: &Server, server: &Server) -> Result<()> {
    let (run, dir) = (Arc::clone(&server.run), server.dir());
    let mut copy = template::command(run.account(), &run.binaries().postgres("pg_basebackup"));
    copy.args(["--host=127.0.0.1", "--wal-method=stream", "--checkpoint=fast", "--no-sync", "--no-password"]);
    copy.arg(format!("--port={}", primary.port())).arg(format!("--username={SUPERUSER}"));
    copy.arg("--pgdata").arg(dir.join("data")).env("PGPASSWORD", primary.superuser_password()?);
    tokio::task::spawn_blocking(move || {
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        run.account().create_dir(&dir)?;
        template::output(copy)?;
        let signal = dir.join("data/standby.signal");
        std::fs::write(&signal, "")?;
        run.account().own(&signal)
    })
    .await?
    .with_context(|| format!("copying {} to {}", primary.name(), server.name()))
}
