//! One corpus of SELECTs on one plain Postgres and on weir with two and with three shards: every answer is equal, in text
//! and in the binary format, or it is a refusal (0A000) that says why and what to do. Nothing else.
//!
//! Reading order: the two tests → [`compare`] (one statement) → [`verdict`] → [`answer`] → the corpus's syntax. The rows
//! are made in `data.rs`. Equal means the same names and types of columns and the same bytes of every value (but for sums of floats,
//! `near.rs`), in the same order where the statement decides it. Errors are equal if their SQLSTATE is.
//! Non-goals: speed, and which shard is asked (`placement.rs`).

mod data;
mod near;
mod random;
mod tpch;

pub use random::Dice;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::BytesMut;
use near::Near;
use tokio_postgres::types::{Format, FromSql, IsNull, ToSql, Type};
use tokio_postgres::{Client, SimpleQueryMessage};
use weir_harness::{Builder, Plain, Tier};

const CORPUS: &str = include_str!("differential/corpus.txt");
/// The corpus has at least this many statements, or something went wrong with reading it.
const STATEMENTS_MIN: usize = 500;
/// For one statement, on a busy machine.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// Statements that are known to be answered wrongly. One that is put right must leave this list.
const KNOWN_WRONG: [&str; 0] = [];

/// How far a statement decides the order of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Total,
    Any,
    /// Not even which rows: only how many.
    CountOnly,
}

/// A line of the corpus.
#[derive(Clone, Debug)]
struct Statement {
    family: String,
    /// A refusal is a failure.
    must_be_answered: bool,
    order: Order,
    /// It adds floating-point numbers: their last digits may differ.
    near: bool,
    sql: String,
    parameters: Vec<Parameter>,
}

/// How a statement went right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    Equal,
    Refused,
}

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Rows { columns: Vec<String>, rows: Vec<Vec<Option<Vec<u8>>>> },
    Failed { code: String, message: String, explained: bool },
}

#[tokio::test(flavor = "multi_thread")]
async fn two_shards_answer_as_one_postgres_or_refuse() -> Result<()> {
    run(2, Tier::builder().shards(2)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn three_shards_with_replicas_and_redis_answer_as_one_postgres_or_refuse() -> Result<()> {
    run(3, Tier::builder().shards(3).replicas(1).redis(true)).await
}

async fn run(shards: u32, tier: Builder) -> Result<()> {
    run_prepared(shards, tier, async |_| Ok(())).await
}

/// The corpus on a tier that something was done to once its rows were there; what that returned is kept until the end.
pub async fn run_prepared<T>(shards: u32, tier: Builder, prepare: impl AsyncFnOnce(&Tier) -> Result<T>) -> Result<()> {
    let statements = corpus()?;
    let (tier, plain) = (tier.start().await?, Plain::start().await?);
    let (mut sharded, single) = (tier.connect().await?, weir_harness::connect(&plain.dsn()).await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    data::load(&single).await?;
    data::load(&sharded).await.context("loading through weir")?;
    let _kept = prepare(&tier).await?;
    let (mut wrong, mut right_again, mut totals) = (String::new(), Vec::new(), BTreeMap::<String, u32>::new());
    for statement in &statements {
        let known = KNOWN_WRONG.contains(&&*statement.sql);
        match compare(&single, &sharded, statement).await {
            Ok(right) => {
                if right == Right::Refused {
                    eprintln!("refused: [{}] {}", statement.family, statement.sql);
                }
                *totals.entry(how(&console, statement, right).await).or_default() += 1;
                if known {
                    right_again.push(&statement.sql);
                }
            }
            Err(error) => {
                if known {
                    eprintln!("known to be wrong: {error:#}");
                } else {
                    writeln!(wrong, "[{}] {}\n{error:#}\n", statement.family, statement.sql)?;
                }
                // The connection may be stuck in that statement.
                sharded = tier.connect().await?;
            }
        }
    }
    eprintln!("{shards} shards, {} statements: {totals:?}", statements.len());
    ensure!(wrong.is_empty(), "with {shards} shards:\n{wrong}");
    ensure!(right_again.is_empty(), "no longer wrong, to be taken off the list: {right_again:?}");
    Ok(())
}

/// One statement on both, in text, in text again (a cache may answer now), and in binary.
async fn compare(single: &Client, sharded: &Client, statement: &Statement) -> Result<Right> {
    let literal = statement.with_literals();
    let near = Near::of(single, statement).await?;
    let expected = text(single, &literal).await?;
    let mut right = Right::Equal;
    for round in ["text", "text, again"] {
        let got = text(sharded, &literal).await.with_context(|| format!("weir, {round}"))?;
        right = verdict(statement, &expected, &got, (&near, false)).with_context(|| format!("{round}: {literal}"))?;
    }
    let got = binary(sharded, statement).await.context("weir, binary")?;
    let in_binary = verdict(statement, &binary(single, statement).await?, &got, (&near, true)).context("binary")?;
    // A parameter may decide less than a literal, but never the other way round.
    // What Postgres refuses itself may be refused by either.
    ensure!(
        in_binary == right || !statement.parameters.is_empty() || matches!(expected, Answer::Failed { .. }),
        "text {right:?}, binary {in_binary:?}: the format decides whether it runs"
    );
    if right == Right::Equal && in_binary == Right::Equal { Ok(Right::Equal) } else { Ok(Right::Refused) }
}

fn verdict(statement: &Statement, expected: &Answer, got: &Answer, near: (&Near, bool)) -> Result<Right> {
    let (near, in_binary) = near;
    let differs = || format!("plain Postgres: {}\nweir:           {}", show(expected), show(got));
    match (expected, got) {
        (_, Answer::Failed { code, explained, .. }) if code == "0A000" => {
            ensure!(*explained, "a refusal without DETAIL or HINT\n{}", differs());
            ensure!(!statement.must_be_answered, "refused, but this family is answered\n{}", differs());
            Ok(Right::Refused)
        }
        (Answer::Failed { code, .. }, Answer::Failed { code: other, .. }) if code == other => Ok(Right::Equal),
        (Answer::Rows { columns, rows }, Answer::Rows { columns: other_columns, rows: other_rows }) => {
            ensure!(columns == other_columns, "other columns: {columns:?}, {other_columns:?}");
            let (mut left, mut right) = (rows.clone(), other_rows.clone());
            let same = match statement.order {
                Order::Total => near.in_order(&left, &right, in_binary),
                Order::Any => near.in_any_order(&left, &right, in_binary),
                Order::CountOnly => left.len() == right.len(),
            };
            if statement.order != Order::Total {
                left.sort();
                right.sort();
            }
            ensure!(same, "{}", first_difference(&left, &right));
            Ok(Right::Equal)
        }
        _ => bail!("{}", differs()),
    }
}

/// Whether one shard answered, several were merged, or it was refused.
async fn how(console: &Client, statement: &Statement, right: Right) -> String {
    if right == Right::Refused {
        return "refused".to_owned();
    }
    match weir_harness::route_target(console, "shop", &statement.with_literals()).await.as_deref() {
        Some("all shards" | "several shards") => "merged".to_owned(),
        Some("fallback engine") => "answered by the engine".to_owned(),
        Some(_) => "answered by one shard".to_owned(),
        None => "failed alike".to_owned(),
    }
}

async fn text(client: &Client, sql: &str) -> Result<Answer> {
    let messages = match tokio::time::timeout(ANSWER_WAIT, client.simple_query(sql)).await.context("no answer")? {
        Ok(messages) => messages,
        Err(error) => return failed(error),
    };
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    for message in messages {
        match message {
            SimpleQueryMessage::RowDescription(described) => {
                columns = described.iter().map(|column| column.name().to_owned()).collect();
            }
            SimpleQueryMessage::Row(row) => {
                rows.push((0..row.len()).map(|at| row.get(at).map(|value| value.as_bytes().to_vec())).collect());
            }
            _ => {}
        }
    }
    Ok(Answer::Rows { columns, rows })
}

async fn binary(client: &Client, statement: &Statement) -> Result<Answer> {
    let asked = async {
        let prepared = client.prepare(&statement.sql).await?;
        let parameters = statement.parameters.iter().map(|parameter| parameter as &(dyn ToSql + Sync));
        // The driver itself insists on the number of parameters, by a panic.
        if parameters.len() != prepared.params().len() {
            return Ok(None);
        }
        let parameters: Vec<_> = parameters.collect();
        let columns = prepared.columns().iter().map(|column| format!("{} {}", column.name(), column.type_().name()));
        let columns = columns.collect::<Vec<_>>();
        client.query(&prepared, &parameters).await.map(|rows| Some((columns, rows)))
    };
    let (columns, rows) = match tokio::time::timeout(ANSWER_WAIT, asked).await.context("no answer")? {
        Ok(answered) => answered.context("another number of parameters")?,
        Err(error) => return failed(error),
    };
    let raw = |row: &tokio_postgres::Row| -> Result<Vec<Option<Vec<u8>>>> {
        (0..row.len()).map(|at| Ok(row.try_get::<_, Option<Raw>>(at)?.map(|value| value.0))).collect()
    };
    Ok(Answer::Rows { columns, rows: rows.iter().map(raw).collect::<Result<_>>()? })
}

fn failed(error: tokio_postgres::Error) -> Result<Answer> {
    let Some(told) = error.as_db_error() else { return Err(error).context("not an answer of the server") };
    Ok(Answer::Failed {
        code: told.code().code().to_owned(),
        message: format!("{} / {} / {}", told.message(), told.detail().unwrap_or("-"), told.hint().unwrap_or("-")),
        explained: told.detail().is_some_and(|text| !text.is_empty())
            && told.hint().is_some_and(|text| !text.is_empty()),
    })
}

/// A value as it came, whatever its type.
struct Raw(Vec<u8>);

impl<'a> FromSql<'a> for Raw {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(raw.to_vec()))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A parameter of the corpus: integers and text go in binary, everything else as text.
#[derive(Clone, Debug)]
struct Parameter(Option<String>);

impl ToSql for Parameter {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let Some(text) = &self.0 else { return Ok(IsNull::Yes) };
        match *ty {
            Type::INT8 => text.parse::<i64>()?.to_sql(ty, out),
            Type::INT4 => text.parse::<i32>()?.to_sql(ty, out),
            _ => {
                out.extend_from_slice(text.as_bytes());
                Ok(IsNull::No)
            }
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, ty: &Type) -> Format {
        if *ty == Type::INT8 || *ty == Type::INT4 { Format::Binary } else { Format::Text }
    }

    fn to_sql_checked(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        self.to_sql(ty, out)
    }
}

impl Statement {
    /// The statement for the simple protocol, with its parameters written into it.
    fn with_literals(&self) -> String {
        let mut sql = self.sql.clone();
        for (number, parameter) in self.parameters.iter().enumerate().rev() {
            let literal = match &parameter.0 {
                None => "NULL".to_owned(),
                Some(text) if text.parse::<u64>().is_ok() => text.clone(),
                Some(text) => format!("'{}'", text.replace('\'', "''")),
            };
            sql = sql.replace(&format!("${}", number + 1), &literal);
        }
        sql
    }
}

/// Reads the corpus; its own first lines say how it is written.
fn corpus() -> Result<Vec<Statement>> {
    let (mut statements, mut family, mut must_be_answered) = (Vec::new(), "", false);
    for line in CORPUS.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(header) = line.strip_prefix("## ") {
            must_be_answered = header.ends_with(": answered");
            family = header.trim_end_matches(": answered");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (mark, rest) = line.split_once(' ').with_context(|| format!("a line of one word: {line}"))?;
        let near = mark.ends_with('≈');
        let order = match mark.trim_end_matches('≈') {
            ">" => Order::Total,
            "=" => Order::Any,
            "~" => Order::CountOnly,
            _ => bail!("not a line of the corpus: {line}"),
        };
        let (sql, parameters) = rest.split_once(" @@ ").unwrap_or((rest, ""));
        let parameter = |text: &str| Parameter((text != "NULL").then(|| text.to_owned()));
        let parameters =
            if parameters.is_empty() { Vec::new() } else { parameters.split(" | ").map(parameter).collect() };
        let (family, sql) = (family.to_owned(), sql.to_owned());
        statements.push(Statement { family, must_be_answered, order, near, sql, parameters });
    }
    ensure!(statements.len() >= STATEMENTS_MIN, "only {} statements", statements.len());
    Ok(statements)
}

fn show(answer: &Answer) -> String {
    match answer {
        Answer::Failed { code, message, .. } => format!("{code} {message}"),
        Answer::Rows { columns, rows } => {
            let first: Vec<String> = rows.iter().take(3).map(|row| show_row(Some(row))).collect();
            format!("{} rows of {columns:?}, first {}", rows.len(), first.join(" "))
        }
    }
}

fn show_row(row: Option<&Vec<Option<Vec<u8>>>>) -> String {
    let value =
        |value: &Option<Vec<u8>>| value.as_ref().map_or("NULL".to_owned(), |bytes| bytes.escape_ascii().to_string());
    row.map_or("no row".to_owned(), |row| format!("({})", row.iter().map(value).collect::<Vec<_>>().join(", ")))
}

fn first_difference(left: &[Vec<Option<Vec<u8>>>], right: &[Vec<Option<Vec<u8>>>]) -> String {
    let at = (0..left.len().max(right.len())).find(|at| left.get(*at) != right.get(*at)).unwrap_or(0);
    format!(
        "row {at} of {} and {}\nplain Postgres: {}\nweir:           {}",
        left.len(),
        right.len(),
        show_row(left.get(at)),
        show_row(right.get(at))
    )
}
