//! Sums of floating-point numbers: Postgres promises no order of rows, and its own parallel plans differ from its others in the last
//! digits. Of statements that say so, the columns that are floats are compared as numbers, within a bound far below what a lost
//! or doubled row would do; every other column, and every other statement, byte by byte.

use anyhow::{Result, ensure};
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Answer, Dice, Statement, first_difference, text};

/// Largest difference as a part of the larger number.
const OF_FLOAT8: f64 = 1e-9;
const OF_FLOAT4: f64 = 1e-4;

pub type Row = Vec<Option<Vec<u8>>>;

/// How far each column of an answer may be off; empty: not at all.
#[derive(Clone, Default)]
pub struct Near(Vec<Option<f64>>);

impl Near {
    /// As plain Postgres describes the statement.
    pub async fn of(single: &Client, statement: &Statement) -> Result<Self> {
        if !statement.near {
            return Ok(Near::default());
        }
        let Ok(prepared) = single.prepare(&statement.sql).await else { return Ok(Near::default()) };
        let bound = |ty: &Type| match *ty {
            Type::FLOAT8 => Some(OF_FLOAT8),
            Type::FLOAT4 => Some(OF_FLOAT4),
            _ => None,
        };
        Ok(Near(prepared.columns().iter().map(|column| bound(column.type_())).collect()))
    }

    /// One by one.
    pub fn in_order(&self, left: &[Row], right: &[Row], binary: bool) -> bool {
        left.len() == right.len() && left.iter().zip(right).all(|(left, right)| self.same(left, right, binary))
    }

    /// Each row of one side has its own on the other.
    pub fn in_any_order(&self, left: &[Row], right: &[Row], binary: bool) -> bool {
        let (mut left, mut right) = (left.to_vec(), right.to_vec());
        left.sort();
        right.sort();
        if self.0.iter().all(Option::is_none) {
            return left == right;
        }
        let mut found = |row: &Row| {
            let at = right.iter().position(|other| self.same(row, other, binary));
            at.map(|at| right.swap_remove(at)).is_some()
        };
        left.iter().all(&mut found) && right.is_empty()
    }

    /// Only these columns, in that order.
    pub fn by(&self, columns: &[usize]) -> Self {
        Near(columns.iter().map(|at| self.0.get(*at).copied().flatten()).collect())
    }

    fn same(&self, left: &Row, right: &Row, binary: bool) -> bool {
        let one = |at: usize| {
            let (left, right) = (left[at].as_deref(), right[at].as_deref());
            left == right || close(left, right, self.0.get(at).copied().flatten(), binary)
        };
        left.len() == right.len() && (0..left.len()).all(one)
    }
}

fn close(left: Option<&[u8]>, right: Option<&[u8]>, bound: Option<f64>, binary: bool) -> bool {
    let number = |bytes: &[u8]| match (binary, bytes.len()) {
        (true, 8) => bytes.try_into().ok().map(f64::from_be_bytes),
        (true, 4) => bytes.try_into().ok().map(f32::from_be_bytes).map(f64::from),
        (true, _) => None,
        (false, _) => std::str::from_utf8(bytes).ok()?.parse().ok(),
    };
    let (Some(bound), Some(left), Some(right)) = (bound, left.and_then(number), right.and_then(number)) else {
        return false;
    };
    // ∞ - ∞ has another sign bit than a NaN that was stored; infinities are equal as bytes or not at all.
    left.is_nan() && right.is_nan()
        || (left - right).abs() <= bound * left.abs().max(right.abs()) && left.is_finite() && right.is_finite()
}

#[test]
fn a_wrong_sum_of_floats_is_still_found() {
    let rows = |values: [&str; 2]| vec![values.map(|value| Some(value.as_bytes().to_vec())).to_vec()];
    let near = Near(vec![None, Some(OF_FLOAT8)]);
    let same = |left: [&str; 2], right: [&str; 2]| {
        let (left, right) = (rows(left), rows(right));
        assert_eq!(near.in_order(&left, &right, false), near.in_any_order(&left, &right, false));
        near.in_order(&left, &right, false)
    };
    assert!(same(["a", "4206.042814569823"], ["a", "4206.042814569824"]));
    assert!(!same(["a", "4206.042814569823"], ["a", "4206.0429"]), "a row of 0.0001 is missing");
    assert!(
        !same(["a", "1"], ["a", "NaN"])
            && !same(["a", "Infinity"], ["a", "-Infinity"])
            && !same(["a", "0"], ["a", "1"])
    );
    assert!(!same(["1.0", "1"], ["1.00", "1"]), "other columns byte by byte");
    let other = [rows(["a", "4206.042814569823"]), rows(["a", "4206.042814569824"])];
    assert!(!Near::default().in_order(&other[0], &other[1], false), "other statements byte by byte");
    let binary = |value: f64| vec![vec![Some(b"a".to_vec()), Some(value.to_be_bytes().to_vec())]];
    assert!(near.in_any_order(&binary(0.1 + 0.2), &binary(0.3), true));
    assert!(!near.in_any_order(&binary(0.1 + 0.2), &binary(0.300_001), true));
    let more = [binary(1.0), binary(1.0)].concat();
    assert!(!near.in_any_order(&more, &binary(1.0), true) && !near.in_any_order(&binary(1.0), &more, true));
}

/// What weir writes itself: each group has one row with a number, and zeros on other shards, so that the sum is exact.
#[tokio::test(flavor = "multi_thread")]
async fn sums_of_floats_are_written_as_by_postgres() -> Result<()> {
    const GROUPS: u64 = 1500;
    let (plain, tier) = (weir_harness::Plain::start().await?, weir_harness::Tier::builder().start().await?);
    let (single, sharded) = (weir_harness::connect(&plain.dsn()).await?, tier.connect().await?);
    let mut dice = Dice::new(7);
    let mut bits = || (0..8).fold(0_u64, |bits, _| bits << 8 | dice.roll(256) as u64);
    let mut rows = Vec::new();
    for group in 0..GROUPS {
        let random = bits();
        let number = match group % 4 {
            0 => f64::from_bits(random),
            1 => f64::from_bits(random >> 53 << 52),
            2 => (random % 100_000_000) as f64 / 1000.0,
            _ => (random >> 40) as f64 * 10_f64.powi((random % 40) as i32 - 20),
        };
        let small = if group % 4 == 0 { f32::from_bits((random >> 32) as u32) } else { number as f32 };
        rows.push(format!("({}, {group}, '{number}', '{small}')", group * 2));
        rows.push(format!("({}, {group}, 0, 0)", group * 2 + 1));
    }
    for client in [&single, &sharded] {
        client.batch_execute("CREATE TABLE users (user_id bigint PRIMARY KEY, g int, x float8, y float4)").await?;
        for some in rows.chunks(500) {
            client.batch_execute(&format!("INSERT INTO users VALUES {}", some.join(", "))).await?;
        }
    }
    for digits in ["1", "0", "-5", "3"] {
        for client in [&single, &sharded] {
            client.batch_execute(&format!("SET extra_float_digits = {digits}")).await?;
        }
        for sql in [
            "SELECT g, sum(x), sum(y), sum(-x), avg(y) FROM users GROUP BY g ORDER BY g",
            "SELECT user_id, x FROM users WHERE x <> 0 ORDER BY x, y, user_id",
            "SELECT x, count(*) FROM users WHERE x > 0 AND x < 5 GROUP BY x ORDER BY x",
        ] {
            let (left, right) = (text(&single, sql).await?, text(&sharded, sql).await?);
            let (Answer::Rows { rows: left, .. }, Answer::Rows { rows: right, .. }) = (&left, &right) else {
                anyhow::bail!("extra_float_digits {digits}, {sql}: {left:?}\n{right:?}");
            };
            ensure!(left == right, "extra_float_digits {digits}, {sql}: {}", first_difference(left, right));
            ensure!(left.len() > 2);
        }
    }
    Ok(())
}
