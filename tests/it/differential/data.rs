//! The rows of `differential.rs`: many types, NULLs, negative keys, equal and nearly equal values, the same on every run.
//!
//! Invariant: numerics of column `score` that are equal are written alike, so that which of two equal values a DISTINCT
//! keeps cannot be seen; column `dup` is the opposite. Floats of `ratio` and `weight` add up exactly, those of `wobble`
//! do not. Non-goal: realism.

use anyhow::Result;
use tokio_postgres::Client;

const USERS: i64 = 300;
const PRODUCTS: i64 = 40;

const SCHEMA: [&str; 7] = [
    "CREATE TABLE users (user_id bigint PRIMARY KEY, email text, name text, nick varchar(20), code char(4), age int,
        tiny smallint, big bigint, score numeric, cash numeric(12,2), dup numeric, ratio float8, wobble float8, odd float8,
        weight float4, born date, joined timestamp, seen timestamptz, wake time, span interval, active boolean,
        token uuid, extra jsonb, blob bytea, ip inet, tags text[])",
    "CREATE TABLE orders (user_id bigint, order_no int, status text NOT NULL, total_cents bigint NOT NULL, discount numeric,
        placed timestamptz, day date, paid boolean, category_id int, PRIMARY KEY (user_id, order_no))",
    "CREATE TABLE order_items (user_id bigint, order_no int, line int, product_id bigint, qty int, price numeric(10,2),
        PRIMARY KEY (user_id, order_no, line))",
    "CREATE TABLE products (product_id bigint PRIMARY KEY, name text NOT NULL, category_id int, price_cents bigint)",
    "CREATE TABLE categories (category_id int PRIMARY KEY, name text NOT NULL, parent int)",
    "CREATE TABLE inventory (product_id bigint PRIMARY KEY, on_hand int, reserved int, place text)",
    "CREATE TABLE user_emails (email text PRIMARY KEY, user_id bigint NOT NULL)",
];

const NAMES: [&str; 17] = [
    "Anna", "anna", "Änne", "änne", "Zoë", "zoe", "", " ", "Öztürk", "Müller", "Mueller", "MÜLLER", "O''Hara", "李雷",
    "Books", "a-b", "ab",
];
const ODD: [&str; 9] = ["'NaN'", "'Infinity'", "'-Infinity'", "0", "'-0'", "1e-300", "-1.5e300", "0.1", "3.25"];
const SPANS: [&str; 8] =
    ["1 mon", "30 days", "29 days 24:00:00", "-1 day", "1 year 2 mons", "00:00:00.000001", "0", "-3 mons 5 days"];
const STATUS: [&str; 5] = ["open", "paid", "Paid", "shipped", "käuflich"];
const CATEGORIES: [&str; 8] = ["Books", "Music", "Jazz", "Teas", "Tees", "Ölfarben", "zebra", "Äpfel"];

/// Makes the tables and fills them, each row by a statement that names its key.
pub async fn load(client: &Client) -> Result<()> {
    for table in SCHEMA {
        client.batch_execute(table).await?;
    }
    client.batch_execute(&categories()).await?;
    client.batch_execute(&products()).await?;
    for product in 1..=PRODUCTS {
        let place = nullable(product, 6, || format!("'shelf {}'", product % 5));
        let row = format!("INSERT INTO inventory VALUES ({product}, {}, {}, {place})", product * 3, product % 4);
        client.batch_execute(&row).await?;
    }
    for index in 1..=USERS {
        client.batch_execute(&user(index)).await?;
        client.batch_execute(&format!("INSERT INTO user_emails VALUES ('{}', {})", email(index), key(index))).await?;
        for statement in orders(index) {
            client.batch_execute(&statement).await?;
        }
    }
    Ok(())
}

/// Mostly the index; some negative and some beyond 32 bits.
fn key(index: i64) -> i64 {
    match index % 50 {
        0 => -index,
        1 if index > 50 => index * 5_000_000_000,
        _ => index,
    }
}

fn email(index: i64) -> String {
    match index % 5 {
        3 => format!("USER{index}@example.com"),
        4 => format!("Üser{index}@example.com"),
        _ => format!("user{index}@example.com"),
    }
}

/// NULL for every `each`-th row.
fn nullable(index: i64, each: i64, value: impl Fn() -> String) -> String {
    if index % each == 0 { "NULL".to_owned() } else { value() }
}

fn pick<'a>(from: &[&'a str], index: i64) -> &'a str {
    from[usize::try_from(index).unwrap_or(0) % from.len()]
}

/// A numeric of 0 to 3 decimal places whose last digit is not 0, so that its text is the only one of its value.
fn score(index: i64) -> String {
    let digits = (index * 37 - 4000) * 10 + 1 + index % 9;
    let (places, sign) = (index % 4, if digits < 0 { "-" } else { "" });
    let unit = 10_i64.pow(u32::try_from(places).unwrap_or(0));
    let whole = digits.abs() / unit;
    if places == 0 {
        format!("{sign}{whole}")
    } else {
        format!("{sign}{whole}.{:0w$}", digits.abs() % unit, w = places as usize)
    }
}

fn user(index: i64) -> String {
    let n = |each: i64, value: &dyn Fn() -> String| nullable(index, each, value);
    let values = [
        key(index).to_string(),
        n(31, &|| format!("'{}'", email(index))),
        n(19, &|| format!("'{}'", pick(&NAMES, index * 7))),
        n(4, &|| format!("'{}{}'", pick(&NAMES, index * 3), index % 6)),
        n(13, &|| format!("'{}'", ["A", "a ", "B1", "zz", "Ü"][(index % 5) as usize])),
        n(11, &|| (18 + index * 7 % 60).to_string()),
        n(9, &|| (index * 331 % 60000 - 30000).to_string()),
        n(8, &|| (index.wrapping_mul(6_000_000_000_000_000_017) / 3).to_string()),
        n(10, &|| score(index)),
        n(12, &|| format!("{}.{:02}", index * 13 % 700 - 300, index % 100)),
        n(14, &|| ["1", "1.0", "1.00", "-2.5", "-2.50", "0", "0.000", "100", "1e3"][(index % 9) as usize].to_owned()),
        n(7, &|| format!("{}", (index * 29 % 401 - 200) as f64 * 0.125)),
        n(15, &|| format!("{}", index as f64 * 0.1 + 1.0 / (index as f64))),
        n(16, &|| pick(&ODD, index).to_owned()),
        n(6, &|| format!("{}", (index * 17 % 200 - 100) as f32 * 0.5)),
        n(17, &|| {
            format!(
                "'{}-{:02}-{:02}{}'",
                1950 + index % 70,
                1 + index % 12,
                1 + index % 28,
                if index % 83 == 0 { " BC" } else { "" }
            )
        }),
        n(18, &|| format!("'2024-{:02}-{:02} {:02}:30:15.{:03}'", 1 + index % 12, 1 + index % 28, index % 24, index)),
        n(21, &|| {
            if index % 90 == 1 {
                "'infinity'".to_owned()
            } else {
                format!("'2025-{:02}-01 {:02}:00:00.5+{:02}'", 1 + index % 12, index % 24, index % 5)
            }
        }),
        n(22, &|| format!("'{:02}:{:02}:00.25'", index % 24, index % 60)),
        n(23, &|| format!("'{}'", pick(&SPANS, index))),
        n(5, &|| (index % 3 == 0).to_string()),
        n(24, &|| format!("'{:08x}-0000-0000-0000-{index:012x}'", index % 3 * 0x7fff_ffff)),
        n(25, &|| format!("'{{\"k\": \"{}\", \"n\": {}}}'", index % 7, index % 5)),
        n(26, &|| format!("'\\x{:02x}{:02x}'", index % 256, index * 3 % 256)),
        n(27, &|| format!("'10.0.{}.{}'", index % 3, index % 200)),
        n(28, &|| ["'{red}'", "'{red,blue}'", "'{}'", "'{NULL,green}'"][(index % 4) as usize].to_owned()),
    ];
    format!("INSERT INTO users VALUES ({})", values.join(", "))
}

/// No order for some users, up to four for others; each with one to three lines.
fn orders(index: i64) -> Vec<String> {
    let mut statements = Vec::new();
    for order in 1..=index % 5 {
        let seed = index * 5 + order;
        let row = [
            key(index).to_string(),
            order.to_string(),
            format!("'{}'", pick(&STATUS, seed * 3)),
            (seed * 97 % 1000).to_string(),
            nullable(seed, 4, || score(seed % 50)),
            nullable(seed, 9, || format!("'2025-0{}-11 0{}:15:00+00'", 1 + seed % 9, seed % 10)),
            format!("'2025-01-{:02}'", 1 + seed % 31),
            nullable(seed, 6, || (seed % 2 == 0).to_string()),
            nullable(seed, 7, || (1 + seed % 8).to_string()),
        ];
        statements.push(format!("INSERT INTO orders VALUES ({})", row.join(", ")));
        let lines: Vec<String> = (1..=1 + seed % 3)
            .map(|line| {
                let product = nullable(seed, 20, || (1 + (seed * 7 + line) % (PRODUCTS - 4)).to_string());
                format!(
                    "({}, {order}, {line}, {product}, {}, {}.{:02})",
                    key(index),
                    1 + seed % 5,
                    seed % 90,
                    seed % 100
                )
            })
            .collect();
        statements.push(format!("INSERT INTO order_items VALUES {}", lines.join(", ")));
    }
    statements
}

fn categories() -> String {
    let rows: Vec<String> = (1..)
        .zip(CATEGORIES)
        .map(|(id, name): (i64, _)| {
            format!("({id}, '{name}', {})", nullable(id, 3, || (id / 2 + 1).min(id - 1).to_string()))
        })
        .collect();
    format!("INSERT INTO categories VALUES {}", rows.join(", "))
}

fn products() -> String {
    let rows: Vec<String> = (1..=PRODUCTS)
        .map(|id| {
            let category = nullable(id, 9, || (1 + id % 8).to_string());
            format!("({id}, 'product {}', {category}, {})", id * 7 % 30, nullable(id, 11, || (id * 250).to_string()))
        })
        .collect();
    format!("INSERT INTO products VALUES {}", rows.join(", "))
}
