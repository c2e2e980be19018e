//! The tables and rows of the random statements: every placement, three kinds of shard key, many types, NULLs, ties.
//!
//! Invariant: values that are equal are written alike (numerics have a fixed scale, floats are multiples of 1/8 and never
//! -0), so that which of two equal values is shown cannot be seen, and sums of floats are exact. Small numbers only:
//! nothing that is generated overflows. Non-goal: realism.

use anyhow::Result;
use tokio_postgres::Client;

/// What a column holds. `Ranked` is text in a collation that is not byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    Small,
    Int,
    Big,
    /// numeric with two decimal places
    Num,
    /// numeric without decimal places: a sum of bigint
    Whole,
    /// numeric whose scale depends on its value: an average
    Soft,
    Float,
    /// float8 that is not a multiple of 1/8: an average, a deviation. Sums of it are not exact
    Rough,
    Text,
    Ranked,
    Date,
    Stamp,
    Zoned,
    Uuid,
    Bytes,
    Bool,
    Words,
    Ints,
    Json,
}

/// A table of [`TABLES`].
#[derive(Debug)]
pub struct Table {
    pub name: &'static str,
    /// Columns that no two rows have alike.
    pub unique: &'static [&'static str],
    pub columns: &'static [(&'static str, Ty)],
}

/// Shard keys: `cid` of clients, bills and lines (colocated), `code` of notes, `tid` of tokens. Goods and kinds are
/// reference tables, marks has one home.
pub const TABLES: [Table; 8] = [
    Table {
        name: "clients",
        unique: &["cid"],
        columns: &[
            ("cid", Ty::Big),
            ("name", Ty::Text),
            ("city", Ty::Ranked),
            ("n", Ty::Int),
            ("s", Ty::Small),
            ("amount", Ty::Num),
            ("score", Ty::Num),
            ("ratio", Ty::Float),
            ("born", Ty::Date),
            ("joined", Ty::Stamp),
            ("seen", Ty::Zoned),
            ("token", Ty::Uuid),
            ("raw", Ty::Bytes),
            ("ok", Ty::Bool),
            ("tags", Ty::Words),
            ("nums", Ty::Ints),
            ("doc", Ty::Json),
        ],
    },
    Table {
        name: "bills",
        unique: &["cid", "no"],
        columns: &[
            ("cid", Ty::Big),
            ("no", Ty::Int),
            ("status", Ty::Text),
            ("total", Ty::Big),
            ("disc", Ty::Num),
            ("day", Ty::Date),
            ("paid", Ty::Bool),
            ("pid", Ty::Int),
        ],
    },
    Table {
        name: "lines",
        unique: &["cid", "no", "line"],
        columns: &[
            ("cid", Ty::Big),
            ("no", Ty::Int),
            ("line", Ty::Int),
            ("qty", Ty::Int),
            ("price", Ty::Num),
            ("pid", Ty::Int),
        ],
    },
    Table {
        name: "notes",
        unique: &["code"],
        columns: &[("code", Ty::Text), ("cid", Ty::Big), ("n", Ty::Int), ("body", Ty::Ranked), ("at", Ty::Stamp)],
    },
    Table {
        name: "tokens",
        unique: &["tid"],
        columns: &[("tid", Ty::Uuid), ("cid", Ty::Big), ("n", Ty::Small), ("ok", Ty::Bool)],
    },
    Table {
        name: "goods",
        unique: &["pid"],
        columns: &[("pid", Ty::Int), ("name", Ty::Text), ("kind", Ty::Int), ("price", Ty::Num)],
    },
    Table {
        name: "kinds",
        unique: &["kind"],
        columns: &[("kind", Ty::Int), ("name", Ty::Ranked), ("parent", Ty::Int)],
    },
    Table {
        name: "marks",
        unique: &["mid"],
        columns: &[("mid", Ty::Int), ("label", Ty::Text), ("n", Ty::Int), ("day", Ty::Date)],
    },
];

/// What the tier's configuration says of them.
pub const DECLARED: &[&str] = &[
    "clients(cid bigint)",
    "bills(cid bigint)",
    "lines(cid bigint)",
    "notes(code text)",
    "tokens(tid uuid)",
    "goods",
    "kinds",
];

const CLIENTS: i64 = 60;
const NAMES: [&str; 9] = ["Anna", "anna", "Änne", "zoe", "Zoë", "", "a-b", "ab", "Ω"];
const STATUS: [&str; 4] = ["open", "paid", "Paid", "sent"];

/// The SQL type of a column.
pub fn sql_type(ty: Ty) -> &'static str {
    match ty {
        Ty::Small => "smallint",
        Ty::Int => "int",
        Ty::Big => "bigint",
        Ty::Num => "numeric(10,2)",
        Ty::Whole | Ty::Soft => "numeric",
        Ty::Float | Ty::Rough => "float8",
        Ty::Text => "text",
        Ty::Ranked => "text COLLATE \"und-x-icu\"",
        Ty::Date => "date",
        Ty::Stamp => "timestamp",
        Ty::Zoned => "timestamptz",
        Ty::Uuid => "uuid",
        Ty::Bytes => "bytea",
        Ty::Bool => "boolean",
        Ty::Words => "text[]",
        Ty::Ints => "int[]",
        Ty::Json => "jsonb",
    }
}

/// Makes the tables and fills them; the same rows on every run.
pub async fn load(client: &Client) -> Result<()> {
    for table in &TABLES {
        let columns: Vec<String> = table.columns.iter().map(|(name, ty)| format!("{name} {}", sql_type(*ty))).collect();
        let (name, unique) = (table.name, table.unique.join(", "));
        let ddl = format!("CREATE TABLE {name} ({}, PRIMARY KEY ({unique}))", columns.join(", "));
        client.batch_execute(&ddl).await?;
    }
    for table in &TABLES {
        let rows: Vec<String> = rows_of(table);
        if matches!(table.name, "goods" | "kinds" | "marks") {
            client.batch_execute(&format!("INSERT INTO {} VALUES {}", table.name, rows.join(", "))).await?;
            continue;
        }
        for row in rows {
            client.batch_execute(&format!("INSERT INTO {} VALUES {row}", table.name)).await?;
        }
    }
    client.batch_execute("ANALYZE").await.or(Ok(()))
}

fn rows_of(table: &Table) -> Vec<String> {
    let keys: Vec<Vec<String>> = match table.name {
        "clients" => (1..=CLIENTS).map(|at| vec![cid(at).to_string()]).collect(),
        "bills" => bills().map(|(at, no)| vec![cid(at).to_string(), no.to_string()]).collect(),
        "lines" => bills()
            .flat_map(|(at, no)| {
                (1..=(at + no) % 3).map(move |line| vec![cid(at).to_string(), no.to_string(), line.to_string()])
            })
            .collect(),
        "notes" => (1..=40).map(|at| vec![format!("'{}{at}'", pick(&["n", "N", "ö"], at))]).collect(),
        "tokens" => (1..=30).map(|at| vec![uuid(at)]).collect(),
        "goods" => (1..=15).map(|at: i64| vec![at.to_string()]).collect(),
        "kinds" => (1..=5).map(|at: i64| vec![at.to_string()]).collect(),
        _ => (1..=8).map(|at: i64| vec![at.to_string()]).collect(),
    };
    (1_i64..)
        .zip(keys)
        .map(|(row, key)| {
            let others = table.columns.iter().enumerate().skip(key.len());
            let others = others.map(|(at, (name, ty))| value(row, at as i64, name, *ty));
            let values: Vec<String> = key.iter().cloned().chain(others).collect();
            format!("({})", values.join(", "))
        })
        .collect()
}

/// Mostly the index; some negative, some beyond 32 bits.
pub fn cid(at: i64) -> i64 {
    match at % 10 {
        0 => -at,
        7 => at * 5_000_000_000,
        _ => at,
    }
}

/// None to three for each client.
fn bills() -> impl Iterator<Item = (i64, i64)> {
    (1..=CLIENTS).flat_map(|at| (1..=at % 4).map(move |no| (at, no)))
}

fn pick<'a>(from: &[&'a str], at: i64) -> &'a str {
    from[at.rem_euclid(from.len() as i64) as usize]
}

fn uuid(at: i64) -> String {
    format!("'{:08x}-0000-4000-8000-{:012x}'", at % 4 * 0x3fff_ffff, at)
}

/// A value of row `row`, column `at`: one in about eight is NULL.
fn value(row: i64, at: i64, name: &str, ty: Ty) -> String {
    let seed = row * 7919 + at * 104_729 + row * at * 31;
    if seed % 8 == 0 {
        return "NULL".to_owned();
    }
    match (name, ty) {
        ("cid", _) => return cid(1 + seed % CLIENTS).to_string(),
        ("pid", _) => return (1 + seed % 17).to_string(),
        ("kind" | "parent", _) => return (1 + seed % 6).to_string(),
        ("status", _) => return format!("'{}'", pick(&STATUS, seed / 3)),
        _ => {}
    }
    match ty {
        Ty::Small => (seed % 9 - 4).to_string(),
        Ty::Int => (seed % 25 - 3).to_string(),
        Ty::Big => (seed % 900).to_string(),
        Ty::Num | Ty::Whole | Ty::Soft => format!("{}.{:02}", seed % 60 - 10, seed % 4 * 25),
        Ty::Float | Ty::Rough => format!("{}", ((seed % 40) as f64 + 1.0) * 0.125),
        Ty::Text | Ty::Ranked => format!("'{}'", pick(&NAMES, seed / 5)),
        Ty::Date => format!("'20{:02}-{:02}-{:02}'", 20 + seed % 4, 1 + seed % 12, 1 + seed % 3),
        Ty::Stamp => format!("'2024-{:02}-{:02} {:02}:30:00'", 1 + seed % 12, 1 + seed % 5, seed % 24),
        Ty::Zoned => format!("'2025-{:02}-01 {:02}:00:00.5+{:02}'", 1 + seed % 6, seed % 24, seed % 3),
        Ty::Uuid => uuid(seed % 12),
        Ty::Bytes => format!("'\\x{:02x}{:02x}'", seed % 256, seed % 3),
        Ty::Bool => (seed % 3 != 0).to_string(),
        Ty::Words => ["'{red}'", "'{red,blue}'", "'{}'", "'{NULL,green}'"][(seed % 4) as usize].to_owned(),
        Ty::Ints => ["'{1}'", "'{3,1,2}'", "'{}'", "'{2,NULL}'"][(seed % 4) as usize].to_owned(),
        Ty::Json => format!("'{{\"k\": \"{}\", \"n\": {}}}'", seed % 4, seed % 5),
    }
}
