//! A Postgres primary of a run, with the roles and databases it is asked for.
//!
//! Invariant: `ready` in its directory exists only when roles and databases are complete; anything less is wiped and
//! made again at the next start. Non-goal: changing the roles of a cluster that was kept.

use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tokio_postgres::Client;

use crate::server::{Server, connect};
use crate::{Replica, Run, template};

/// The superuser of every cluster.
pub(crate) const SUPERUSER: &str = "weir_admin";

/// A login role.
#[derive(Clone, Debug)]
pub struct Role {
    pub name: String,
    pub password: String,
}

/// A database and the role that owns it.
#[derive(Clone, Debug)]
pub struct Database {
    pub name: String,
    pub owner: String,
}

/// What a cluster is to be like.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// Names its directory and log; unique within a run.
    pub name: String,
    /// 0 picks a free one; a port that is taken is replaced by a free one.
    pub port: u16,
    /// Of the superuser `weir_admin`.
    pub password: String,
    pub roles: Vec<Role>,
    pub databases: Vec<Database>,
    /// Server settings on top of the throw-away ones, as (name, value).
    pub settings: Vec<(String, String)>,
    /// Log every statement (`log_statement = all`), on replicas too.
    pub log_statements: bool,
}

impl ClusterSpec {
    /// A cluster with nothing but its superuser, on a free port.
    pub fn new(name: &str, password: &str) -> Self {
        Self {
            name: name.to_owned(),
            port: 0,
            password: password.to_owned(),
            roles: Vec::new(),
            databases: Vec::new(),
            settings: Vec::new(),
            log_statements: false,
        }
    }

    /// Adds a login role that owns a database.
    #[must_use]
    pub fn database(mut self, database: &str, owner: &str, password: &str) -> Self {
        self.roles.push(Role { name: owner.to_owned(), password: password.to_owned() });
        self.databases.push(Database { name: database.to_owned(), owner: owner.to_owned() });
        self
    }

    /// Adds a server setting.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// A running primary. Dropping it stops it; its files go with the run.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
}

impl Deref for Cluster {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

impl Cluster {
    /// Starts a cluster, or takes up the one a kept run left under the same name. Returns when it answers.
    pub async fn start(run: &Arc<Run>, spec: ClusterSpec) -> Result<Self> {
        check_name(&spec.name)?;
        let mut roles = spec.roles.clone();
        roles.push(Role { name: SUPERUSER.to_owned(), password: spec.password.clone() });
        let mut server = Server::new(run, &spec.name, roles, spec.port);
        server.settings.clone_from(&spec.settings);
        server.log_statements = spec.log_statements;
        let ready = server.dir().join("ready");
        if ready.exists() {
            server.launch(&spec.password).await?;
            return Ok(Self { server });
        }
        let first_password = prepare(&server).await?;
        server.launch(&first_password).await?;
        set_up(&server, &spec, &first_password).await.with_context(|| format!("setting up {}", spec.name))?;
        std::fs::write(&ready, "")?;
        Ok(Self { server })
    }

    /// A streaming standby of this cluster. Returns when it streams and answers queries.
    pub async fn replica(&self, name: &str) -> Result<Replica> {
        Replica::start(&self.server, name, 0).await
    }

    /// As [`Self::replica`], on a port of the caller's choice if it is free.
    pub async fn replica_on(&self, name: &str, port: u16) -> Result<Replica> {
        Replica::start(&self.server, name, port).await
    }
}

/// A name is part of paths and of connection strings.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 40 || !name.chars().all(plain) {
        bail!("{name:?} cannot name a server: use 1 to 40 letters, digits, - and _");
    }
    Ok(())
}

/// An empty directory with a copy of the template; gives the superuser's password in it.
async fn prepare(server: &Server) -> Result<String> {
    let (run, dir, name) = (Arc::clone(&server.run), server.dir(), server.name().to_owned());
    tokio::task::spawn_blocking(move || {
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        run.account().create_dir(&dir)?;
        template::instantiate(&run, &name, &dir.join("data"))
    })
    .await?
}

async fn set_up(server: &Server, spec: &ClusterSpec, first_password: &str) -> Result<()> {
    let dsn = format!("postgres://{SUPERUSER}:{first_password}@127.0.0.1:{}/postgres", server.port());
    let client: Client = connect(&dsn).await?;
    client.batch_execute(&format!("ALTER ROLE {SUPERUSER} PASSWORD {}", literal(&spec.password))).await?;
    for role in &spec.roles {
        let sql = format!("CREATE ROLE {} LOGIN PASSWORD {}", identifier(&role.name), literal(&role.password));
        client.batch_execute(&sql).await?;
    }
    for database in &spec.databases {
        // Its owner may create in schema public.
        let sql = format!("CREATE DATABASE {} OWNER {}", identifier(&database.name), identifier(&database.owner));
        client.batch_execute(&sql).await?;
    }
    Ok(())
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Safe whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_passwords_cannot_break_out() {
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        assert!(check_name("shard0-replica_1").is_ok());
        assert!(["", "a b", "../x", "it's", &"x".repeat(41)].iter().all(|name| check_name(name).is_err()));
        assert_eq!(literal("it's\\"), "E'it''s\\\\'");
    }
}
