//! The 22 queries of TPC-H on generated rows: each is answered as by one Postgres, in text and in binary, or refused.
//!
//! Tables, rows and queries are [`weir_harness::tpch`]'s.
//! `WEIR_TPCH_SCALE=0.01` makes more rows than the default. Non-goals: speed, and rows that change.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weir_harness::{Plain, Tier, tpch};

use super::near::Near;
use super::{Answer, Order, Right, Statement, binary, how, text, verdict};

/// What takes longer is said.
const LONG: Duration = Duration::from_secs(2);
const SCALE: f64 = 0.002;

#[tokio::test(flavor = "multi_thread")]
async fn the_queries_of_tpc_h_are_answered_as_by_one_postgres_or_refused() -> Result<()> {
    let scale = std::env::var("WEIR_TPCH_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(SCALE);
    let (plain, tier) = (Plain::start().await?, Tier::builder().shards(2).tables(tpch::TABLES).start().await?);
    let (single, sharded) = (weir_harness::connect(&plain.dsn()).await?, tier.connect().await?);
    let console = weir_harness::connect(&tier.admin_dsn()).await?;
    tpch::load(&single, scale).await.context("loading plain Postgres")?;
    tpch::load(&sharded, scale).await.context("loading through weir")?;
    let (mut how_many, exact) = (BTreeMap::<String, Vec<usize>>::new(), Near::default());
    for number in 1..=22 {
        let sql = tpch::query(number).with_context(|| format!("query {number}"))?;
        let family = "TPC-H".to_owned();
        let statement =
            Statement { family, must_be_answered: false, order: Order::Any, near: false, sql, parameters: Vec::new() };
        let expected = text(&single, &statement.sql).await?;
        ensure!(matches!(expected, Answer::Rows { .. }), "query {number} on plain Postgres: {expected:?}");
        let begun = Instant::now();
        let got = text(&sharded, &statement.sql).await.with_context(|| format!("query {number} through weir"))?;
        if begun.elapsed() > LONG {
            eprintln!("query {number} took {:?}", begun.elapsed());
        }
        let right =
            verdict(&statement, &expected, &got, (&exact, false)).with_context(|| format!("query {number}, text"))?;
        let (expected, got) = (binary(&single, &statement).await?, binary(&sharded, &statement).await?);
        let again =
            verdict(&statement, &expected, &got, (&exact, true)).with_context(|| format!("query {number}, binary"))?;
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
