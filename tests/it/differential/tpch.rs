//! The 22 queries of TPC-H on generated rows: each is answered as by one Postgres, in text and in binary, or refused.
//!
//! Orders and their lines are sharded by order, customers by customer, parts, suppliers, nations and regions are reference
//! tables. Rows and query texts come from the `tpchgen` crate; the parameters are those the specification validates with.
//! `WEIR_TPCH_SCALE=0.01` makes more rows than the default. Non-goals: speed, and rows that change.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::Client;
use tpchgen::generators as made;
use tpchgen::q_and_a::queries;
use weir_harness::{Plain, Tier};

use super::{Answer, Order, Right, Statement, binary, how, text, verdict};

/// What takes longer is said.
const LONG: Duration = Duration::from_secs(2);
const SCALE: f64 = 0.002;
/// Rows in one INSERT of a reference table.
const ROWS_AT_ONCE: usize = 500;
const DECLARED: &[&str] = &[
    "orders(o_orderkey bigint)",
    "lineitem(l_orderkey bigint)",
    "customer(c_custkey bigint)",
    "part",
    "partsupp",
    "supplier",
    "nation",
    "region",
];

/// Small scales repeat pairs of part and supplier, so that partsupp has no key.
const SCHEMA: [&str; 9] = [
    "CREATE TABLE region (r_regionkey bigint PRIMARY KEY, r_name char(25), r_comment varchar(152))",
    "CREATE TABLE nation (n_nationkey bigint PRIMARY KEY, n_name char(25), n_regionkey bigint, n_comment varchar(152))",
    "CREATE TABLE part (p_partkey bigint PRIMARY KEY, p_name varchar(55), p_mfgr char(25), p_brand char(10),
        p_type varchar(25), p_size int, p_container char(10), p_retailprice numeric(15,2), p_comment varchar(23))",
    "CREATE TABLE supplier (s_suppkey bigint PRIMARY KEY, s_name char(25), s_address varchar(40), s_nationkey bigint,
        s_phone char(15), s_acctbal numeric(15,2), s_comment varchar(101))",
    "CREATE TABLE partsupp (ps_partkey bigint, ps_suppkey bigint, ps_availqty int, ps_supplycost numeric(15,2),
        ps_comment varchar(199))",
    "CREATE TABLE customer (c_custkey bigint PRIMARY KEY, c_name varchar(25), c_address varchar(40), c_nationkey bigint,
        c_phone char(15), c_acctbal numeric(15,2), c_mktsegment char(10), c_comment varchar(117))",
    "CREATE TABLE orders (o_orderkey bigint PRIMARY KEY, o_custkey bigint, o_orderstatus char(1),
        o_totalprice numeric(15,2), o_orderdate date, o_orderpriority char(15), o_clerk char(15), o_shippriority int,
        o_comment varchar(79))",
    "CREATE TABLE lineitem (l_orderkey bigint, l_partkey bigint, l_suppkey bigint, l_linenumber int,
        l_quantity numeric(15,2), l_extendedprice numeric(15,2), l_discount numeric(15,2), l_tax numeric(15,2),
        l_returnflag char(1), l_linestatus char(1), l_shipdate date, l_commitdate date, l_receiptdate date,
        l_shipinstruct char(25), l_shipmode char(10), l_comment varchar(44), PRIMARY KEY (l_orderkey, l_linenumber))",
    // Without it query 20 reads the whole table once for each part of a supplier.
    "CREATE INDEX ON lineitem (l_partkey, l_suppkey)",
];

/// The values of `:1`, `:2` … in the queries' texts.
const PARAMETERS: [&[&str]; 22] = [
    &["90"],
    &["15", "BRASS", "EUROPE"],
    &["BUILDING", "1995-03-15"],
    &["1993-07-01"],
    &["ASIA", "1994-01-01"],
    &["1994-01-01", "0.06", "24"],
    &["FRANCE", "GERMANY"],
    &["BRAZIL", "AMERICA", "ECONOMY ANODIZED STEEL"],
    &["green"],
    &["1993-10-01"],
    &["GERMANY", "0.0001"],
    &["MAIL", "SHIP", "1994-01-01"],
    &["special", "requests"],
    &["1995-09-01"],
    &["1996-01-01"],
    &["Brand#45", "MEDIUM POLISHED", "49", "14", "23", "45", "19", "3", "36", "9"],
    &["Brand#23", "MED BOX"],
    &["300"],
    &["Brand#12", "Brand#23", "Brand#34", "1", "10", "20"],
    &["forest", "1994-01-01", "CANADA"],
    &["SAUDI ARABIA"],
    &["13", "31", "23", "29", "30", "18", "17"],
];

#[tokio::test(flavor = "multi_thread")]
async fn the_queries_of_tpc_h_are_answered_as_by_one_postgres_or_refused() -> Result<()> {
    let scale = std::env::var("WEIR_TPCH_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(SCALE);
    let (plain, tier) = (Plain::start().await?, Tier::builder().shards(2).tables(DECLARED).start().await?);
    let (single, sharded) = (weir_harness::connect(&plain.dsn()).await?, tier.connect().await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    load(&single, scale).await.context("loading plain Postgres")?;
    load(&sharded, scale).await.context("loading through weir")?;
    let mut how_many = BTreeMap::<String, Vec<usize>>::new();
    for number in 1..=22 {
        let statement = query(number).with_context(|| format!("query {number}"))?;
        let expected = text(&single, &statement.sql).await?;
        ensure!(matches!(expected, Answer::Rows { .. }), "query {number} on plain Postgres: {expected:?}");
        let begun = Instant::now();
        let got = text(&sharded, &statement.sql).await.with_context(|| format!("query {number} through weir"))?;
        if begun.elapsed() > LONG {
            eprintln!("query {number} took {:?}", begun.elapsed());
        }
        let right = verdict(&statement, &expected, &got).with_context(|| format!("query {number}, text"))?;
        let (expected, got) = (binary(&single, &statement).await?, binary(&sharded, &statement).await?);
        let again = verdict(&statement, &expected, &got).with_context(|| format!("query {number}, binary"))?;
        ensure!(again == right, "query {number}: {right:?} in text, {again:?} in binary");
        if let (Right::Refused, Answer::Failed { message, .. }) = (right, &got) {
            eprintln!("query {number}: {message}");
        }
        how_many.entry(how(&console, &statement, right).await).or_default().push(number);
    }
    eprintln!("TPC-H, scale {scale}: {how_many:?}");
    let merged = how_many.get("merged").map_or(0, Vec::len);
    ensure!(merged >= 4, "hardly anything was merged: {how_many:?}");
    Ok(())
}

/// The n-th query as Postgres wants it, with its parameters.
fn query(number: usize) -> Result<Statement> {
    let mut sql =
        queries::query(number as i32).context("no such query")?.replace(" day (3)", " day").replace(":s", "_0");
    for (at, value) in PARAMETERS[number - 1].iter().enumerate().rev() {
        sql = sql.replace(&format!(":{}", at + 1), value);
    }
    let mut parts = sql.split(';').map(str::trim).filter(|part| !part.is_empty());
    let first = parts.next().context("an empty query")?.to_owned();
    // A view that is made for one query and dropped behind it says the same as WITH.
    let sql = match (first.strip_prefix("create view "), parts.next()) {
        (Some(view), Some(select)) => {
            let (head, body) = view.split_once(" as").context("a view without AS")?;
            format!("with {head} as ({body}) {select}")
        }
        _ => first,
    };
    let order = Order::Any;
    Ok(Statement { family: "TPC-H".to_owned(), must_be_answered: false, order, sql, parameters: Vec::new() })
}

async fn load(client: &Client, scale: f64) -> Result<()> {
    for table in SCHEMA {
        client.batch_execute(table).await?;
    }
    several(client, "region", made::RegionGenerator::new(scale, 1, 1).iter()).await?;
    several(client, "nation", made::NationGenerator::new(scale, 1, 1).iter()).await?;
    several(client, "part", made::PartGenerator::new(scale, 1, 1).iter()).await?;
    several(client, "supplier", made::SupplierGenerator::new(scale, 1, 1).iter()).await?;
    several(client, "partsupp", made::PartSuppGenerator::new(scale, 1, 1).iter()).await?;
    for customer in made::CustomerGenerator::new(scale, 1, 1).iter() {
        client.batch_execute(&format!("INSERT INTO customer VALUES {}", row(&customer))).await?;
    }
    let mut lines = made::LineItemGenerator::new(scale, 1, 1).iter().peekable();
    for order in made::OrderGenerator::new(scale, 1, 1).iter() {
        client.batch_execute(&format!("INSERT INTO orders VALUES {}", row(&order))).await?;
        let mut of_order = Vec::new();
        while let Some(line) = lines.next_if(|line| line.l_orderkey == order.o_orderkey) {
            of_order.push(row(&line));
        }
        client.batch_execute(&format!("INSERT INTO lineitem VALUES {}", of_order.join(", "))).await?;
    }
    ensure!(lines.next().is_none(), "lines without their order");
    Ok(())
}

async fn several(client: &Client, table: &str, rows: impl Iterator<Item = impl Display>) -> Result<()> {
    let rows: Vec<String> = rows.map(|made| row(&made)).collect();
    for some in rows.chunks(ROWS_AT_ONCE) {
        client.batch_execute(&format!("INSERT INTO {table} VALUES {}", some.join(", "))).await?;
    }
    Ok(())
}

/// A row as the generator prints it (`a|b|`) for VALUES.
fn row(made: &impl Display) -> String {
    let printed = made.to_string().replace('\'', "''");
    let values: Vec<String> = printed.trim_end_matches('|').split('|').map(|value| format!("'{value}'")).collect();
    format!("({})", values.join(", "))
}
