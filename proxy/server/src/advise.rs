//! `weir advise`: which tables of a database to shard, and how much of its traffic would then stay on one shard.
//!
//! Reads only: the catalogue, and the statements `pg_stat_statements` has counted or a file lists. What it prints can be
//! pasted into weir.toml.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use tokio_postgres::Client;
use weir_core::advise::{Advice, Digest, Link, Outcome, advise};
use weir_core::sql::lex::lex;
use weir_core::sql::normal::split_statements;
use weir_core::topology::Placement;

use crate::catalog::{self, ForeignKey, check_rules};
use crate::control::Target;

/// How many statements that do not stay on one shard are shown.
const SHOWN_MAX: usize = 12;
const SHOWN_CHARS: usize = 100;
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The most called statements of this database.
const DIGESTS: &str = "
SELECT s.query, s.calls::int8 FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
WHERE d.datname = current_database() AND s.query IS NOT NULL ORDER BY s.calls DESC LIMIT 1000";
const SEARCH_PATH: &str = "SELECT array(SELECT s::text FROM unnest(current_schemas(false)) AS s)";

#[derive(Clone, Debug, clap::Args)]
pub struct AdviseArgs {
    /// The database, as postgres://user@host:port/database; the password may come from PGPASSWORD
    #[arg(long, value_name = "DSN")]
    upstream: String,
    /// Statements to go by, separated by `;`, each counted as often as it stands there [default: pg_stat_statements]
    #[arg(long, value_name = "FILE")]
    statements: Option<PathBuf>,
}

/// The whole answer as text.
pub async fn run(arguments: AdviseArgs) -> Result<String> {
    let upstream = Target::of_command(&arguments.upstream).context("--upstream")?;
    let client = upstream.open().await.context("cannot log in to the upstream")?;
    let digests = match &arguments.statements {
        Some(file) => from_file(file)?,
        None => counted(&client).await?,
    };
    let catalog = catalog::read(&client, 1).await.context("reading the catalogue")?;
    let foreign_keys = catalog::foreign_keys(&client).await.context("reading the foreign keys")?;
    let path: Vec<String> = client.query_one(SEARCH_PATH, &[]).await?.try_get(0)?;
    let path: Vec<Box<str>> = path.into_iter().map(String::into_boxed_str).collect();
    let database: String = client.query_one("SELECT current_database()::text", &[]).await?.try_get(0)?;
    let advice = advise(&digests, &links(&foreign_keys), &catalog, &path);
    let problems: Vec<String> = check_rules(&advice.rules(), &catalog, &foreign_keys)
        .iter()
        .filter(|problem| problem.is_problem())
        .map(ToString::to_string)
        .collect();
    Ok(shown(&advice, &database, &problems))
}

async fn counted(client: &Client) -> Result<Vec<Digest>> {
    let rows = client.query(DIGESTS, &[]).await.context(
        "pg_stat_statements cannot be read here: install it (CREATE EXTENSION pg_stat_statements, with its library in \
         shared_preload_libraries), or give a file of statements with --statements",
    )?;
    let read = |row: &tokio_postgres::Row| {
        let calls: i64 = row.try_get(1)?;
        Ok(Digest { sql: row.try_get(0)?, calls: u64::try_from(calls).unwrap_or(0) })
    };
    rows.iter().map(read).collect()
}

fn from_file(path: &std::path::Path) -> Result<Vec<Digest>> {
    Ok(statements_of(path)?.into_iter().map(|(sql, calls)| Digest { sql, calls }).collect())
}

/// The statements of a file, and how often each stands there.
pub(crate) fn statements_of(path: &std::path::Path) -> Result<std::collections::BTreeMap<String, u64>> {
    let size = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
    ensure!(size <= FILE_BYTES_MAX, "{} is larger than 64 MiB; leave some statements out", path.display());
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut tokens = Vec::new();
    if lex(&text, &mut tokens).is_err() {
        bail!("{} cannot be cut into statements: a quote or a comment is not closed", path.display());
    }
    let mut calls = std::collections::BTreeMap::new();
    for statement in split_statements(&text, &tokens).filter(|range| !range.is_empty()) {
        let (first, last) = (tokens[statement.start], tokens[statement.end - 1]);
        *calls.entry(text[first.start as usize..last.end as usize].to_owned()).or_default() += 1;
    }
    Ok(calls)
}

fn links(foreign_keys: &[ForeignKey]) -> Vec<Link> {
    let id = |(schema, name): &(String, String)| (schema.as_str().into(), name.as_str().into());
    let pairs = foreign_keys.iter().flat_map(|key| {
        key.columns.iter().zip(&key.referenced_columns).map(move |(column, other)| Link {
            table: id(&key.table),
            column: column.as_str().into(),
            referenced: id(&key.referenced),
            referenced_column: other.as_str().into(),
        })
    });
    pairs.collect()
}

fn shown(advice: &Advice, database: &str, problems: &[String]) -> String {
    let mut text = String::new();
    let total: u64 = advice.calls.iter().map(|(_, calls)| calls).sum();
    let share = |calls: u64| calls as f64 * 100.0 / total.max(1) as f64;
    if total == 0 {
        return "No statements on tables were found to go by: let the application run for a while, or use --statements.\n"
            .to_owned();
    }
    let _ = writeln!(text, "Where {total} calls would run (and {} more that are not about rows):\n", advice.skipped);
    for (outcome, calls) in advice.calls.iter().filter(|(_, calls)| *calls > 0) {
        let _ = writeln!(text, "  {:>5.1} %  {}", share(*calls), outcome.meaning());
    }
    if advice.tables.is_empty() {
        text.push_str("\nNo declaration makes more of them stay on one shard: leave the database in one piece.\n");
        return text;
    }
    text.push_str("\nTo declare, for weir.toml:\n");
    for declared in &advice.tables {
        let name = |name: &str| toml::Value::String(name.to_owned()).to_string();
        let table = match &*declared.table.0 {
            "public" => declared.table.1.to_string(),
            schema => format!("{schema}.{}", declared.table.1),
        };
        let _ = writeln!(
            text,
            "\n[[database.{}.table]]    # {}\nname = {}",
            toml_key(database),
            declared.why,
            name(&table)
        );
        let _ = match &declared.placement {
            Placement::Sharded { key, key_type } => {
                writeln!(text, "kind = \"sharded\"\nkey = {}\ntype = \"{}\"", name(key), key_type.name())
            }
            Placement::Reference => writeln!(text, "kind = \"reference\""),
            Placement::Global => writeln!(text, "kind = \"global\""),
        };
    }
    if !problems.is_empty() {
        text.push_str("\nTo mend before that:\n");
        for problem in problems {
            let _ = writeln!(text, "  - {problem}");
        }
    }
    not_on_one_shard(advice, share, &mut text);
    text
}

fn not_on_one_shard(advice: &Advice, share: impl Fn(u64) -> f64, text: &mut String) {
    if advice.elsewhere.is_empty() {
        return;
    }
    text.push_str("\nThe most called that do not stay on the shard of their key:\n");
    for (outcome, digest) in advice.elsewhere.iter().take(SHOWN_MAX) {
        let sql: String = digest.sql.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut: String = sql.chars().take(SHOWN_CHARS).collect();
        let more = if cut.len() < sql.len() { "…" } else { "" };
        let _ = writeln!(text, "  {:>5.1} %  {:<26} {cut}{more}", share(digest.calls), outcome.meaning());
    }
    if advice.elsewhere.iter().any(|(outcome, _)| *outcome == Outcome::Refused) {
        text.push_str("Why one is refused, ROUTE '<statement>' in the admin database says.\n");
    }
}

/// A database's name as a key of TOML.
fn toml_key(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    if bare { name.to_owned() } else { toml::Value::String(name.to_owned()).to_string() }
}
