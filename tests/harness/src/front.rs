//! weir in front of servers that a test has started itself, by its command line and, if wanted, a config file.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio_postgres::Client;
use weir_local::{Run, Weir, free_port, http_get};

use crate::{binary, connect};

/// weir's ports are picked before it binds them; another process may be quicker.
const PORT_ATTEMPTS: u32 = 4;

/// A running weir. Dropping it stops it.
#[derive(Debug)]
pub struct Front {
    weir: Weir,
    port: u16,
    http_port: u16,
    config: PathBuf,
    users: Vec<(String, String)>,
    known: Vec<(String, String)>,
}

/// How it is to be started.
#[derive(Clone, Debug, Default)]
pub struct FrontBuilder {
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
    config: String,
    users: Vec<(String, String)>,
    roles: Vec<(String, String)>,
}

impl FrontBuilder {
    /// One more argument of `weir run`.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// One more variable of its environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The text of its weir.toml, without the users file.
    #[must_use]
    pub fn config(mut self, toml: &str) -> Self {
        toml.clone_into(&mut self.config);
        self
    }

    /// Somebody whom the servers know; for [`Front::dsn`] alone.
    #[must_use]
    pub fn role(mut self, name: &str, password: &str) -> Self {
        self.roles.push((name.to_owned(), password.to_owned()));
        self
    }

    /// Somebody who may log in because the users file says so.
    #[must_use]
    pub fn user(mut self, name: &str, password: &str) -> Self {
        self.users.push((name.to_owned(), password.to_owned()));
        self
    }

    /// Starts weir in the directory of `run` and returns when it is ready.
    pub async fn start(self, run: &Arc<Run>) -> Result<Front> {
        let binary = binary("WEIR_BIN", "weir")?;
        let config = run.path().join("front.toml");
        let mut fixed: Vec<OsString> = vec!["run".into()];
        // Without anything to say in it there is no file.
        if !self.config.is_empty() || !self.users.is_empty() {
            write_config(&config, &self.config, &self.users)?;
            fixed.extend(["--config".into(), config.clone().into()]);
        }
        let known: Vec<(String, String)> = self.users.iter().chain(&self.roles).cloned().collect();
        for attempt in 1.. {
            let (port, http_port) = (free_port()?, free_port()?);
            let mut arguments = fixed.clone();
            arguments.push(format!("--listen=127.0.0.1:{port}").into());
            arguments.push(format!("--http-listen=127.0.0.1:{http_port}").into());
            arguments.extend(self.arguments.iter().cloned());
            match Weir::start_with(run, &binary, arguments, (&self.environment, http_port)).await {
                Ok(weir) => return Ok(Front { weir, port, http_port, config, users: self.users, known }),
                Err(error) if attempt < PORT_ATTEMPTS && format!("{error:#}").contains("in use") => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last attempt returns")
    }
}

impl Front {
    /// `weir run` with what is added from there.
    pub fn builder() -> FrontBuilder {
        FrontBuilder::default()
    }

    /// A URL for one of the users on `database` through weir.
    pub fn dsn(&self, database: &str, user: &str) -> String {
        let password = self.known.iter().find(|(name, _)| name == user).map_or("", |(_, password)| password.as_str());
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// A new connection through weir.
    pub async fn connect(&self, database: &str, user: &str) -> Result<Client> {
        connect(&self.dsn(database, user))
            .await
            .with_context(|| format!("connecting to weir. Its log ends with:\n{}", self.weir.log_tail()))
    }

    /// Puts another config file in the place of the one it was started with; weir reads it when it is told to.
    pub fn rewrite_config(&self, toml: &str) -> Result<()> {
        write_config(&self.config, toml, &self.users)
    }

    /// A GET on weir's HTTP port: (status, body).
    pub async fn http_get(&self, path: &str) -> Result<(u16, String)> {
        http_get(self.http_port, path).await
    }

    /// weir's port for Postgres clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// weir's process id.
    pub fn pid(&self) -> Option<u32> {
        self.weir.pid()
    }

    /// All weir has logged.
    pub fn log(&self) -> String {
        self.weir.log()
    }
}

fn write_config(path: &Path, toml: &str, users: &[(String, String)]) -> Result<()> {
    let users_file = path.with_file_name("front-users.toml");
    let mut text = String::new();
    for (name, password) in users {
        writeln!(text, "[user.\"{name}\"]\npassword = \"{password}\"")?;
    }
    write_private(&users_file, &text)?;
    // Keys of the file itself come before its first section.
    let named = if users.is_empty() { String::new() } else { format!("users_file = '{}'\n", users_file.display()) };
    write_private(path, &format!("{named}{toml}\n"))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    let _ = std::fs::remove_file(path);
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
