//! Where the server programs of this machine are.
//!
//! Invariant: all Postgres programs come from one directory, so that `pg_basebackup` and `postgres` are of one version
//! (Debian's /usr/bin holds wrappers for some of them and none for the others). Non-goal: installing anything.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// What a directory must hold to be taken for a Postgres installation.
const POSTGRES_PROGRAMS: [&str; 4] = ["initdb", "postgres", "pg_ctl", "pg_basebackup"];
/// What the directory that `PG_BIN` names must hold: some packages of the server come without `pg_basebackup`, and then
/// there are no replicas.
const SERVER_PROGRAMS: [&str; 3] = ["initdb", "postgres", "pg_ctl"];

/// The programs that [`crate::Cluster`] and [`crate::Redis`] start.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// The directory of `initdb`, `postgres`, `pg_ctl` and `pg_basebackup`.
    pub postgres_dir: PathBuf,
    /// The version as the server prints it, for example `15.14`.
    pub postgres_version: String,
    /// `psql`, if there is one: only people need it.
    pub psql: Option<PathBuf>,
    /// `redis-server` (or `valkey-server`), if there is one.
    pub redis_server: Option<PathBuf>,
}

impl Binaries {
    /// Looks in `PG_BIN` alone if set, else in `PATH` and then where distributions put Postgres, highest version first.
    ///
    /// Fails if there is no Postgres; a missing Redis is an error only when one is started ([`Self::redis_server`]).
    pub fn find() -> Result<Self> {
        let path = search_path();
        let candidates = match std::env::var_os("PG_BIN") {
            Some(dir) => vec![PathBuf::from(dir)],
            None => path.iter().cloned().chain(distribution_dirs()).collect(),
        };
        let needed = if std::env::var_os("PG_BIN").is_some() { &SERVER_PROGRAMS[..] } else { &POSTGRES_PROGRAMS[..] };
        let Some(postgres_dir) = candidates.iter().find(|dir| holds(dir, needed)) else {
            bail!(
                "no PostgreSQL server found (looked for {} in {}).\n{}",
                needed.join(", "),
                match std::env::var_os("PG_BIN") {
                    Some(dir) => format!("PG_BIN={}", dir.display()),
                    None => "PATH and /usr/lib/postgresql/*/bin".to_owned(),
                },
                INSTALL_HINT
            );
        };
        Ok(Self {
            postgres_version: version(&postgres_dir.join("postgres"))?,
            psql: in_dirs("psql", std::slice::from_ref(postgres_dir)).or_else(|| in_dirs("psql", &path)),
            redis_server: in_dirs("redis-server", &path).or_else(|| in_dirs("valkey-server", &path)),
            postgres_dir: postgres_dir.clone(),
        })
    }

    /// The path of one of Postgres's programs.
    pub fn postgres(&self, program: &str) -> PathBuf {
        self.postgres_dir.join(program)
    }

    /// The path of the Redis server, or what to install.
    pub fn redis_server(&self) -> Result<&Path> {
        self.redis_server.as_deref().with_context(|| format!("no redis-server found in PATH.\n{INSTALL_HINT}"))
    }

    /// The major version: 15 for `15.14`, 18 for `18beta1`.
    pub fn postgres_major(&self) -> u32 {
        let digits: String = self.postgres_version.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }
}

const INSTALL_HINT: &str = "Install them with one of:
  Debian, Ubuntu:  sudo apt-get install postgresql redis-server
  Fedora, RHEL:    sudo dnf install postgresql-server postgresql-contrib redis
  macOS:           brew install postgresql@17 redis
or set PG_BIN to the directory that holds initdb.";

fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

/// Debian and PGDG for Red Hat keep one directory per version; Homebrew too, on Intel and on Apple processors.
fn distribution_dirs() -> Vec<PathBuf> {
    let parents = [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt/homebrew/opt", "postgresql@"),
        ("/usr/local/opt", "postgresql@"),
    ];
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for (parent, prefix) in parents {
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|v| v.parse().ok());
            if let Some(version) = version {
                found.push((version, entry.path().join("bin")));
            }
        }
    }
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, dir)| dir).collect()
}

fn holds(dir: &Path, programs: &[&str]) -> bool {
    programs.iter().all(|program| dir.join(program).is_file())
}

fn in_dirs(program: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)` → `15.14`.
fn version(postgres: &Path) -> Result<String> {
    let said = Command::new(postgres)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {} --version", postgres.display()))?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split(") ").nth(1).and_then(|rest| rest.split_whitespace().next());
    version.map(str::to_owned).with_context(|| format!("{} --version said {said:?}", postgres.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_one_installation_and_its_version() {
        let found = Binaries::find().expect("PostgreSQL must be installed to run these tests");
        assert!(found.postgres_major() >= 12, "{found:?}");
        assert!(found.postgres("initdb").is_file());
    }

    #[test]
    fn a_missing_redis_says_what_to_install() {
        let found = Binaries {
            postgres_dir: PathBuf::new(),
            postgres_version: "18beta1".to_owned(),
            psql: None,
            redis_server: None,
        };
        assert_eq!(found.postgres_major(), 18);
        let error = found.redis_server().expect_err("there is none").to_string();
        assert!(error.contains("apt-get install postgresql redis-server") && error.contains("brew"), "{error}");
    }
}
