//! The tables, rows and queries of TPC-H, for a test that compares answers and a bench that compares times.
//!
//! Orders and their lines are sharded by order, customers by customer; parts, suppliers, nations and regions are reference tables. Rows and
//! query texts come from the `tpchgen` crate.

use std::fmt::Display;

use anyhow::{Context as _, Result, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::SinkExt as _;
use tokio_postgres::Client;
use tpchgen::generators as made;
use tpchgen::q_and_a::queries;

/// A COPY is sent in pieces of about this size.
const PIECE_BYTES: usize = 64 * 1024;

/// For [`Builder::tables`](crate::Builder::tables).
pub const TABLES: &[&str] = &[
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

/// The n-th query (1 to 22) as Postgres wants it, with the parameters that the specification validates with.
pub fn query(number: usize) -> Result<String> {
    let mut sql =
        queries::query(number as i32).context("no such query")?.replace(" day (3)", " day").replace(":s", "_0");
    for (at, value) in PARAMETERS[number - 1].iter().enumerate().rev() {
        sql = sql.replace(&format!(":{}", at + 1), value);
    }
    let mut parts = sql.split(';').map(str::trim).filter(|part| !part.is_empty());
    let first = parts.next().context("an empty query")?.to_owned();
    // A view that is made for one query and dropped behind it says the same as WITH.
    Ok(match (first.strip_prefix("create view "), parts.next()) {
        (Some(view), Some(select)) => {
            let (head, body) = view.split_once(" as").context("a view without AS")?;
            format!("with {head} as ({body}) {select}")
        }
        _ => first,
    })
}

/// Makes the tables and fills them. `scale`: 1 is 6 million lines.
pub async fn load(client: &Client, scale: f64) -> Result<()> {
    for table in SCHEMA {
        client.batch_execute(table).await?;
    }
    copy(client, "region", made::RegionGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "nation", made::NationGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "part", made::PartGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "supplier", made::SupplierGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "partsupp", made::PartSuppGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "customer", made::CustomerGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "orders", made::OrderGenerator::new(scale, 1, 1).iter()).await?;
    copy(client, "lineitem", made::LineItemGenerator::new(scale, 1, 1).iter()).await
}

async fn copy(client: &Client, table: &str, rows: impl Iterator<Item = impl Display>) -> Result<()> {
    let sink = client.copy_in(&format!("COPY {table} FROM STDIN (DELIMITER '|')")).await?;
    let mut sink = std::pin::pin!(sink);
    let (mut piece, mut sent) = (BytesMut::new(), 0);
    for row in rows {
        // The generator ends a row with a delimiter, too.
        let printed = row.to_string();
        piece.extend_from_slice(printed.trim_end_matches('|').as_bytes());
        piece.extend_from_slice(b"\n");
        sent += 1;
        if piece.len() > PIECE_BYTES {
            sink.send(piece.split().freeze()).await.with_context(|| table.to_owned())?;
        }
    }
    sink.send(Bytes::from(piece)).await?;
    let taken = sink.finish().await.with_context(|| table.to_owned())?;
    ensure!(taken == sent, "{table}: {taken} of {sent} rows were taken");
    Ok(())
}
