//! The schema of a new shard: what the home shard's server has, made on a server that has nothing yet.
//!
//! Invariant: each section is there as a whole or not at all (one transaction), and what is weir's own is never taken along. All of it may
//! be done again after a crash: [`had`] says what is there. Rows are not touched. Non-goals: keeping two schemas alike later on
//! (DDL through weir does that), and whether the server is fit at all (`weir_core::reshard::survey`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tokio_postgres::Client;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::topology::TableRules;

use super::late::{self, Late};
use super::roles;
use crate::auth::credential::Credential;
use crate::back::connect::Login;
use crate::back::tls::ServerTlsMode;

/// Longest time for one program.
const PROGRAM_MAX: Duration = Duration::from_secs(600);
/// Of what a program says of its failure, so much is told.
const SAID_BYTES_MAX: usize = 2000;
/// Objects that are named where something stands in the way.
const NAMED_MAX: usize = 5;

/// A part of a schema, in the words of pg_dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Section {
    /// Types, functions, tables and sequences, with owners, grants and comments: what rows need to be there.
    PreData,
    /// Indexes, constraints, triggers, policies, rules: what is quicker made, or may only fire, when the rows are there.
    PostData,
}

/// What a server has of another one's schema.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Had {
    Nothing,
    PreData,
    All,
    /// Something else: objects that the other one does not have, or only some of its own. A few of them.
    Strange(Vec<String>),
}

/// Why a schema cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error("pg_dump {needed} or newer is needed, and {found}")]
    NoProgram { needed: i32, found: String },
    #[error("{program} failed: {said}")]
    Failed { program: &'static str, said: String },
    #[error("{program} took longer than {} s", PROGRAM_MAX.as_secs())]
    TooLong { program: &'static str },
    #[error("the new server has something else already: {}", .0.join(", "))]
    Occupied(Vec<String>),
    #[error(transparent)]
    Server(#[from] tokio_postgres::Error),
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
    #[error("a file for {program} cannot be written: {error}")]
    File { program: &'static str, error: std::io::Error },
}

impl SchemaError {
    /// As whoever asked for the shard reads it.
    pub fn told(&self) -> UserError {
        let error = |code, hint: &str| {
            UserError::new(Blame::Proxy, code, "the new shard's schema cannot be made")
                .detail(self.to_string())
                .hint(hint.to_owned())
        };
        match self {
            SchemaError::NoProgram { needed, .. } => error(
                sqlstate::FEATURE_NOT_SUPPORTED,
                &format!(
                    "Install Postgres's client programs where weir runs (Debian: postgresql-client-{needed}), or put them on its PATH."
                ),
            ),
            SchemaError::Occupied(_) => error(
                "55006",
                "A new shard's database must be empty: drop what is there, or drop the database and make it anew.",
            ),
            _ => error(
                sqlstate::CANNOT_CONNECT,
                "Nothing is half done: what failed was one transaction. Mend it and go on.",
            ),
        }
    }
}

/// Makes what `home` has on `target`, as far as it is not there. What a person has still to do there, in sentences. Errors: see
/// [`SchemaError`]. Left out are indexes of sharded tables that [`super::late`] makes when the rows are there.
pub async fn make(
    home: &Login,
    target: &Login,
    (section, rules): (Section, &TableRules),
) -> Result<Vec<String>, SchemaError> {
    let (from, to) = (crate::control::connect(home).await?, crate::control::connect(target).await?);
    let needed = match (had(&from, &to, rules).await?, section) {
        (Had::Strange(objects), _) => return Err(SchemaError::Occupied(objects)),
        (Had::All, _) | (Had::PreData, Section::PreData) => &[][..],
        (Had::Nothing, Section::PreData) => &[Section::PreData],
        (Had::PreData, Section::PostData) => &[Section::PostData],
        (Had::Nothing, Section::PostData) => &[Section::PreData, Section::PostData],
    };
    // Roles belong to the whole server, so they may be missing whatever the database has.
    let left = roles::make(&from, &to, &target.database).await?;
    if needed.is_empty() {
        return Ok(left);
    }
    let version: i32 =
        from.query_one("SELECT current_setting('server_version_num')::int4 / 10000", &[]).await?.try_get(0)?;
    let programs = Programs::find(version).await?;
    let files = Files::new()?;
    programs.dump(home, &files).await?;
    let late = late::late(&from, rules).await?;
    for section in needed {
        programs.restore(target, (*section, &late), &files).await?;
    }
    Ok(left)
}

/// Everything but weir's own and what belongs to extensions, as `section, kind and name, definition`.
const OBJECTS: &str = r"
WITH own AS (
    SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'weir')),
extension AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
relation AS (
    SELECT c.oid, c.relkind, c.relname, c.relnamespace, c.relnamespace::regnamespace::text || '.' || quote_ident(c.relname) AS name
    FROM pg_class c WHERE c.relnamespace IN (SELECT oid FROM own)
      AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_class'::regclass AND e.objid = c.oid))
SELECT false, 'schema ' || nspname, '' FROM pg_namespace n JOIN own USING (oid)
WHERE nspname <> 'public' AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_namespace'::regclass AND e.objid = n.oid)
UNION ALL SELECT false, 'extension ' || extname, '' FROM pg_extension WHERE extname <> 'plpgsql'
UNION ALL SELECT false, 'function ' || p.oid::regprocedure, md5(CASE WHEN p.prokind = 'a' THEN '' ELSE pg_get_functiondef(p.oid) END)
FROM pg_proc p WHERE p.pronamespace IN (SELECT oid FROM own)
  AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_proc'::regclass AND e.objid = p.oid)
UNION ALL SELECT false, 'type ' || format_type(t.oid, NULL),
    t.typtype::text || array(SELECT enumlabel FROM pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder)::text
FROM pg_type t WHERE t.typnamespace IN (SELECT oid FROM own) AND t.typtype IN ('e', 'd', 'r')
  AND NOT EXISTS (SELECT FROM extension e WHERE e.classid = 'pg_type'::regclass AND e.objid = t.oid)
UNION ALL SELECT false, 'relation ' || r.name, r.relkind::text || (
    SELECT coalesce(string_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
        a.attgenerated::text, pg_get_expr(f.adbin, f.adrelid)), ', ' ORDER BY a.attname), '')
    FROM pg_attribute a LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
    WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped AND r.relkind IN ('r', 'p', 'f'))
FROM relation r WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
UNION ALL SELECT true, 'index ' || r.name, pg_get_indexdef(r.oid) FROM relation r WHERE r.relkind IN ('i', 'I')
UNION ALL SELECT true, 'constraint ' || k.conname || ' of ' || r.name, pg_get_constraintdef(k.oid)
FROM pg_constraint k JOIN relation r ON r.oid = k.conrelid WHERE k.contype IN ('p', 'u', 'f', 'x')
UNION ALL SELECT true, 'trigger ' || t.tgname || ' of ' || r.name, pg_get_triggerdef(t.oid) || t.tgenabled::text
FROM pg_trigger t JOIN relation r ON r.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid
WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND p.pronamespace IS DISTINCT FROM to_regnamespace('weir')
UNION ALL SELECT true, 'policy ' || p.polname || ' of ' || r.name, concat_ws(' ', p.polcmd::text, p.polpermissive,
    pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
FROM pg_policy p JOIN relation r ON r.oid = p.polrelid
UNION ALL SELECT true, 'rule ' || w.rulename || ' of ' || r.name, pg_get_ruledef(w.oid)
FROM pg_rewrite w JOIN relation r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'";

/// With the path that makes names come out whole.
async fn objects(client: &Client) -> Result<[BTreeSet<(String, String)>; 2], tokio_postgres::Error> {
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL search_path = pg_catalog").await?;
    let rows = client.query(OBJECTS, &[]).await;
    client.batch_execute("COMMIT").await?;
    let mut sections = [BTreeSet::new(), BTreeSet::new()];
    for row in rows? {
        sections[usize::from(row.try_get::<_, bool>(0)?)].insert((row.try_get(1)?, row.try_get(2)?));
    }
    Ok(sections)
}

/// What `target` has of the schema of `home`. Indexes that may come late may be there or not.
pub async fn had(home: &Client, target: &Client, rules: &TableRules) -> Result<Had, tokio_postgres::Error> {
    let (mut wanted, mut there) = (objects(home).await?, objects(target).await?);
    let late: BTreeSet<String> = late::late(home, rules).await?.into_iter().map(|index| index.object).collect();
    for [_, later] in [&mut wanted, &mut there] {
        later.retain(|(name, _)| !late.contains(name));
    }
    Ok(compare(&wanted, &there))
}

type Sections = [BTreeSet<(String, String)>; 2];

fn compare([wanted, wanted_later]: &Sections, [there, later]: &Sections) -> Had {
    if there == wanted && later == wanted_later {
        return Had::All;
    }
    if there.is_empty() && later.is_empty() {
        return Had::Nothing;
    }
    if there == wanted && later.is_empty() {
        return Had::PreData;
    }
    let differing = there.symmetric_difference(wanted).chain(later.symmetric_difference(wanted_later));
    let mut names: Vec<String> = differing.map(|(name, _)| name.clone()).collect();
    names.sort_unstable();
    names.dedup();
    names.truncate(NAMED_MAX);
    Had::Strange(names)
}

/// pg_dump and pg_restore.
struct Programs {
    dump: PathBuf,
    restore: PathBuf,
}

/// What they hand each other; gone when this is dropped.
struct Files(PathBuf);

impl Files {
    fn new() -> Result<Self, SchemaError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("weir-schema-{:016x}", rand::random::<u64>()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| SchemaError::File { program: "pg_dump", error })?;
        Ok(Files(path))
    }

    fn archive(&self) -> PathBuf {
        self.0.join("archive")
    }

    fn list(&self) -> PathBuf {
        self.0.join("list")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("{} cannot be removed: {error}", self.0.display());
        }
    }
}

impl Programs {
    /// The oldest that are new enough: on the PATH, or where distributions put them.
    async fn find(needed: i32) -> Result<Self, SchemaError> {
        let mut best: Option<(i32, PathBuf)> = None;
        let mut newest_old = None;
        for directory in directories() {
            let program = directory.join("pg_dump");
            let Some(version) = version_of(&program).await.filter(|_| directory.join("pg_restore").exists()) else {
                continue;
            };
            if version < needed {
                newest_old = newest_old.max(Some(version));
            } else if best.as_ref().is_none_or(|(known, _)| version < *known) {
                best = Some((version, directory));
            }
        }
        let found = || newest_old.map_or("there is none".to_owned(), |version| format!("{version} is all there is"));
        let (_, directory) = best.ok_or_else(|| SchemaError::NoProgram { needed, found: found() })?;
        Ok(Programs { dump: directory.join("pg_dump"), restore: directory.join("pg_restore") })
    }

    async fn dump(&self, home: &Login, files: &Files) -> Result<(), SchemaError> {
        let mut command = command(&self.dump, home);
        command.args(["--schema-only", "--exclude-schema=weir", "--no-subscriptions", "--format=custom", "--file"]);
        command.arg(files.archive()).args(["--dbname", &home.database]);
        run("pg_dump", command).await.map(|_| ())
    }

    /// One section in one transaction.
    async fn restore(
        &self,
        target: &Login,
        (section, late): (Section, &[Late]),
        files: &Files,
    ) -> Result<(), SchemaError> {
        let section = match section {
            Section::PreData => "--section=pre-data",
            Section::PostData => "--section=post-data",
        };
        let mut listing = command(&self.restore, target);
        listing.args(["--list", section]).arg(files.archive());
        let list = run("pg_restore", listing).await?;
        let kept: String =
            list.lines().filter(|line| !is_weirs(line) && !is_late(line, late)).flat_map(|line| [line, "\n"]).collect();
        std::fs::write(files.list(), kept).map_err(|error| SchemaError::File { program: "pg_restore", error })?;
        let mut command = command(&self.restore, target);
        command.args(["--single-transaction", "--exit-on-error", section, "--use-list"]).arg(files.list());
        command.args(["--dbname", &target.database]).arg(files.archive());
        run("pg_restore", command).await.map(|_| ())
    }
}

/// Is this line of a list an object that weir makes itself, outside its schema?
fn is_weirs(line: &str) -> bool {
    // `number; oid oid KIND schema name owner`; a table's trigger is named behind the table.
    let Some((_, entry)) = line.split_once("; ") else { return false };
    let words: Vec<&str> = entry.split(' ').skip(2).collect();
    match words.as_slice() {
        ["TRIGGER", _, _, name @ ..] => name.iter().any(|word| word.starts_with("weir_unique_")),
        ["EVENT", "TRIGGER", _, name, ..]
        | ["PUBLICATION", "TABLE", _, name, ..]
        | ["PUBLICATION", "TABLES", "IN", "SCHEMA", _, name, ..]
        | ["PUBLICATION", _, name, ..]
        | ["COMMENT", _, "PUBLICATION", name, ..]
        | ["COMMENT", _, "EVENT", "TRIGGER", name, ..] => name.starts_with("weir_"),
        ["COMMENT", _, "TRIGGER", name, ..] => name.starts_with("weir_unique_"),
        _ => false,
    }
}

/// Is this line of a list an index that is made later, or what is said of it?
fn is_late(line: &str, late: &[Late]) -> bool {
    let Some(entry) = line.split_once("; ").and_then(|(_, ids)| ids.splitn(3, ' ').nth(2)) else { return false };
    late.iter().any(|Late { schema, name, .. }| {
        entry.starts_with(&format!("INDEX {schema} {name} "))
            || entry.starts_with(&format!("COMMENT {schema} INDEX {name} "))
    })
}

fn directories() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    for root in ["/usr/lib/postgresql", "/usr/local/lib/postgresql"] {
        let versions = std::fs::read_dir(root).into_iter().flatten().flatten();
        directories.extend(versions.map(|version| version.path().join("bin")));
    }
    directories.retain(|directory| directory.join("pg_dump").exists());
    directories
}

/// The major version of a program that says "pg_dump (PostgreSQL) 15.18".
async fn version_of(program: &PathBuf) -> Option<i32> {
    let said = timeout(Duration::from_secs(10), Command::new(program).arg("--version").kill_on_drop(true).output());
    let said = String::from_utf8(said.await.ok()?.ok()?.stdout).ok()?;
    let version = said.split_once("(PostgreSQL) ")?.1;
    version[..version.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(version.len())].parse().ok()
}

/// A program that logs in as weir does. Nothing secret is on its command line.
fn command(program: &PathBuf, login: &Login) -> Command {
    let endpoint = login.route.endpoint();
    let mode = match login.tls.mode() {
        ServerTlsMode::Disable => "disable",
        ServerTlsMode::Prefer => "prefer",
        ServerTlsMode::Require => "require",
        ServerTlsMode::VerifyCa => "verify-ca",
        ServerTlsMode::VerifyFull => "verify-full",
    };
    let mut command = Command::new(program);
    for other in ["PGSERVICE", "PGHOSTADDR", "PGOPTIONS", "PGPASSWORD"] {
        command.env_remove(other);
    }
    command.env("PGHOST", &endpoint.host).env("PGPORT", endpoint.port.to_string()).env("PGUSER", &*login.user);
    command.env("PGSSLMODE", mode).env("PGCONNECT_TIMEOUT", login.deadline.as_secs().max(2).to_string());
    command.env("PGAPPNAME", "weir reshard");
    if let Credential::Password(password) = &*login.credential.now() {
        command.env("PGPASSWORD", &**password);
    }
    command.arg(OsString::from("--no-password")).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// What it has printed.
async fn run(program: &'static str, mut command: Command) -> Result<String, SchemaError> {
    let ended = timeout(PROGRAM_MAX, command.output()).await.map_err(|_| SchemaError::TooLong { program })?;
    let failed = |said: String| SchemaError::Failed { program, said };
    let ended = ended.map_err(|error| failed(error.to_string()))?;
    if ended.status.success() {
        return Ok(String::from_utf8_lossy(&ended.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    Err(failed(said.trim().chars().take(SAID_BYTES_MAX).collect()))
}

#[cfg(test)]
mod tests;
