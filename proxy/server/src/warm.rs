//! `weir cache warm`: asks a weir for what another one (or itself, before a restart) is asked for most, so that its cache is filled
//! before the clients come.
//!
//! The list is SHOW DIGESTS of a running weir, or a file of statements. Each read is asked exactly as its clients ask: same text,
//! parameters, formats and settings; else the cache would keep it under another name. Bounds: how many reads, how many at a time,
//! the time of each. Non-goals: what is never cached, and reads of other users than the one it logs in as: their answers are not
//! shared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bytes::BufMut;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio_postgres::SimpleQueryMessage;
use tokio_postgres::config::Host;
use weir_wire::backend::{report_field, tag};
use weir_wire::frame;
use weir_wire::frontend::{self, Execute, Object, Parse, put_query, put_sync};

use crate::advise::statements_of;
use crate::auth::credential::Credential;
use crate::back::conn::Backend;
use crate::back::connect::{Login, connect};
use crate::back::tls::{Material, ServerTls, ServerTlsMode};
use crate::config::Endpoint;
use crate::control::Target;
use crate::roles::Route;

/// Longest wait for one answer, and for a login.
const PATIENCE: Duration = Duration::from_secs(30);
const PASSWORD: &str = "PGPASSWORD";

#[derive(Clone, Debug, clap::Args)]
pub struct CacheArgs {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum CacheCommand {
    /// Fill the cache of a running weir with what is asked for most.
    Warm(WarmArgs),
}

#[derive(Clone, Debug, clap::Args)]
pub struct WarmArgs {
    /// The weir whose cache is to be filled, as postgres://user@host:port; the password may come from PGPASSWORD. Only what is
    /// asked by this user can be warmed
    #[arg(long, value_name = "DSN", default_value = "postgres://127.0.0.1:6432")]
    weir: String,
    /// The weir that says what is asked for most, by one of its admin_users [default: the same]
    #[arg(long, value_name = "DSN", conflicts_with = "statements")]
    from: Option<String>,
    /// Statements without parameters instead, separated by `;`
    #[arg(long, value_name = "FILE", requires = "database")]
    statements: Option<PathBuf>,
    /// Only this database; the one that the statements of a file are for
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// How many reads at most, the most asked first
    #[arg(long, value_name = "COUNT", default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    most: u16,
    /// How many at the same time
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    connections: u8,
    /// Only say what would be asked
    #[arg(long)]
    dry_run: bool,
}

/// One read, as its clients ask it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    database: String,
    user: Option<String>,
    settings: Settings,
    statement: String,
    parameters: Vec<Parameter>,
    formats: Vec<i16>,
}

/// A parameter as SHOW DIGESTS has it: `value` in hexadecimal digits; none: NULL.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Parameter {
    #[serde(rename = "type")]
    type_oid: u32,
    binary: bool,
    value: Option<String>,
}

/// What a session has set: each with the SQL text that stands behind SET … TO.
type Settings = Vec<(String, String)>;

/// A connection, and what it can ask.
struct Open {
    backend: Backend,
    database: String,
    settings: Settings,
}

/// What became of them.
#[derive(Default)]
struct Tally {
    warmed: usize,
    failed: Vec<String>,
}

/// Runs the command; what it gives is to be printed.
pub async fn run(arguments: CacheArgs) -> Result<String> {
    let CacheCommand::Warm(arguments) = arguments.command;
    let target = Target::of_command(&arguments.weir).context("--weir")?;
    let own = target.config.get_user().context("--weir names no user: postgres://user@host:port")?.to_owned();
    let found = match &arguments.statements {
        Some(file) => from_file(file, arguments.database.clone().unwrap_or_default())?,
        None => asked_most(arguments.from.as_deref().unwrap_or(&arguments.weir)).await?,
    };
    let chosen = found.into_iter().filter(|one| arguments.database.as_ref().is_none_or(|only| one.database == *only));
    let (mut mine, others): (Vec<_>, Vec<_>) =
        chosen.partition(|one| one.user.as_ref().is_none_or(|user| *user == own));
    mine.truncate(usize::from(arguments.most));
    let mut text = String::new();
    let mut by_user: BTreeMap<&str, usize> = BTreeMap::new();
    others.iter().filter_map(|one| one.user.as_deref()).for_each(|user| *by_user.entry(user).or_default() += 1);
    for (user, count) in by_user {
        let _ = writeln!(text, "left out: {count} reads of user {user}; log in as that user to warm them");
    }
    if arguments.dry_run {
        for one in &mine {
            let _ = writeln!(text, "{}: {}", one.database, shown(one));
        }
        let _ = writeln!(text, "{} reads would be asked as {own}", mine.len());
        return Ok(text);
    }
    let (count, progress) = (mine.len(), indicatif::ProgressBar::new(mine.len() as u64));
    // Next to each other, those that one connection can ask.
    mine.sort_by(|one, other| (&one.database, &one.settings).cmp(&(&other.database, &other.settings)));
    let login = login(&target, &own)?;
    let (queue, tally) = (Arc::new(Mutex::new(mine.into_iter())), Arc::new(Mutex::new(Tally::default())));
    let mut workers = JoinSet::new();
    for _ in 0..arguments.connections {
        workers.spawn(work(login.clone(), Arc::clone(&queue), Arc::clone(&tally), progress.clone()));
    }
    while let Some(worker) = workers.join_next().await {
        worker?;
    }
    progress.finish_and_clear();
    let tally = tally.lock();
    for why in &tally.failed {
        let _ = writeln!(text, "failed: {why}");
    }
    let _ = writeln!(text, "asked {} of {count} reads as {own}; SHOW CACHE says what is kept", tally.warmed);
    Ok(text)
}

fn shown(one: &Wanted) -> String {
    const CHARS_MAX: usize = 120;
    let text = one.statement.split_whitespace().collect::<Vec<_>>().join(" ");
    let more =
        if one.parameters.is_empty() { String::new() } else { format!(" [{} parameters]", one.parameters.len()) };
    format!("{}{more}", text.chars().take(CHARS_MAX).collect::<String>())
}

fn from_file(file: &Path, database: String) -> Result<Vec<Wanted>> {
    let plain = |statement: String| Wanted {
        database: database.clone(),
        user: None,
        settings: Vec::new(),
        statement,
        parameters: Vec::new(),
        formats: Vec::new(),
    };
    Ok(statements_of(file)?.into_keys().map(plain).collect())
}

/// What SHOW DIGESTS lists.
async fn asked_most(dsn: &str) -> Result<Vec<Wanted>> {
    let mut source = Target::of_command(dsn).context("--from")?;
    source.config.dbname("weir").application_name("weir cache warm");
    let client = source.open().await.context("cannot reach weir's admin database")?;
    let mut found = Vec::new();
    for message in client.simple_query("SHOW DIGESTS").await? {
        let SimpleQueryMessage::Row(row) = message else { continue };
        let text = |name: &str| row.get(name).unwrap_or_default();
        ensure!(row.get("statement").is_some(), "SHOW DIGESTS shows statements to admin_users only");
        found.push(Wanted {
            database: text("database").to_owned(),
            user: Some(text("user").to_owned()),
            settings: serde_json::from_str(text("settings")).context("the settings of a digest")?,
            statement: text("statement").to_owned(),
            parameters: serde_json::from_str(text("parameters")).context("the parameters of a digest")?,
            formats: serde_json::from_str(text("result_formats")).context("the formats of a digest")?,
        });
    }
    Ok(found)
}

fn login(target: &Target, user: &str) -> Result<Login> {
    let host = match target.config.get_hosts().first() {
        Some(Host::Tcp(host)) => host.clone(),
        None => "127.0.0.1".to_owned(),
        #[cfg(unix)]
        Some(Host::Unix(_)) => bail!("--weir: name a host, not a directory of sockets"),
    };
    let port = target.config.get_ports().first().copied().unwrap_or(6432);
    let password = target.config.get_password().map(|password| String::from_utf8_lossy(password).into_owned());
    let password = password.with_context(|| format!("the password is neither in --weir nor in {PASSWORD}"))?;
    Ok(Login {
        route: Route::Server(Arc::new(Endpoint { host, port })),
        user: user.into(),
        database: "".into(),
        credential: Credential::password(&password).into(),
        tls: ServerTls::new(ServerTlsMode::Prefer, Material::default()).map_err(anyhow::Error::msg)?,
        deadline: PATIENCE,
    })
}

/// Takes reads from the queue until it is empty.
async fn work(
    login: Login,
    queue: Arc<Mutex<std::vec::IntoIter<Wanted>>>,
    tally: Arc<Mutex<Tally>>,
    progress: indicatif::ProgressBar,
) {
    let mut open: Option<Open> = None;
    loop {
        let Some(wanted) = queue.lock().next() else { return };
        let fits = |open: &Open| open.database == wanted.database && open.settings == wanted.settings;
        let asked = match open.take().filter(fits) {
            Some(open) => Ok(open),
            None => enter(&login, &wanted).await,
        };
        let asked = match asked {
            Ok(mut connection) => {
                let asked = tokio::time::timeout(PATIENCE, ask(&mut connection.backend, &wanted)).await;
                asked.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}"))).map(|()| connection)
            }
            Err(error) => Err(error),
        };
        match asked {
            Ok(connection) => {
                open = Some(connection);
                tally.lock().warmed += 1;
            }
            Err(error) => tally.lock().failed.push(format!("{}: {error:#}", shown(&wanted))),
        }
        progress.inc(1);
    }
}

/// A connection with the settings that a read is asked under.
async fn enter(login: &Login, wanted: &Wanted) -> Result<Open> {
    let login = Login { database: wanted.database.as_str().into(), ..login.clone() };
    let (mut backend, _) = connect(&login).await.map_err(|error| anyhow!("{}", error.message))?;
    for (name, value) in &wanted.settings {
        put_query(&mut backend.out, &format!("SET {} TO {value}", weir_core::sql::word::quote_name(name)));
        finish(&mut backend).await?;
    }
    Ok(Open { backend, database: wanted.database.clone(), settings: wanted.settings.clone() })
}

async fn ask(backend: &mut Backend, wanted: &Wanted) -> Result<()> {
    if wanted.parameters.is_empty() && wanted.formats.is_empty() {
        put_query(&mut backend.out, &wanted.statement);
        return finish(backend).await;
    }
    let types: Vec<u8> = wanted.parameters.iter().flat_map(|one| one.type_oid.to_be_bytes()).collect();
    Parse { name: b"", sql: wanted.statement.as_bytes(), types: &types }.put(&mut backend.out);
    let values = wanted.parameters.iter().map(|one| one.value.as_deref().map(unhex).transpose());
    let values: Vec<Option<Vec<u8>>> = values.collect::<Result<_>>()?;
    frame::put(&mut backend.out, frontend::tag::BIND, |out| {
        out.put_slice(b"\0\0");
        out.put_u16(wanted.parameters.len() as u16);
        wanted.parameters.iter().for_each(|one| out.put_u16(u16::from(one.binary)));
        out.put_u16(values.len() as u16);
        for value in &values {
            match value {
                None => out.put_i32(-1),
                Some(value) => {
                    out.put_i32(value.len() as i32);
                    out.put_slice(value);
                }
            }
        }
        out.put_u16(wanted.formats.len() as u16);
        wanted.formats.iter().for_each(|format| out.put_i16(*format));
    });
    frontend::Target { object: Object::Portal, name: b"" }.put(frontend::tag::DESCRIBE, &mut backend.out);
    Execute { portal: b"", rows_max: 0 }.put(&mut backend.out);
    put_sync(&mut backend.out);
    finish(backend).await
}

/// Sends what is to be sent, and reads up to the end of the reply. Errors: the first one of it.
async fn finish(backend: &mut Backend) -> Result<()> {
    backend.send().await?;
    let mut failed = None;
    loop {
        let (kind, body) = backend.receive().await?;
        match kind {
            tag::READY => return failed.map_or(Ok(()), Err),
            tag::ERROR if failed.is_none() => {
                let message = report_field(&body, b'M').unwrap_or_default();
                failed = Some(anyhow!("{}", String::from_utf8_lossy(message)));
            }
            _ => {}
        }
    }
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits = |at: usize| text.get(at..at + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    (0..text.len()).step_by(2).map(|at| digits(at).context("a value of a digest")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_hexadecimal() {
        assert_eq!(unhex("00ff7a").expect("valid"), [0, 255, 122]);
        assert!(unhex("0").is_err() && unhex("xx").is_err() && unhex("").expect("empty").is_empty());
    }
}
