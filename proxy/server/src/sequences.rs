//! Numbers for the sequences of sharded and reference tables: taken from the hub in blocks, handed out by this process.
//!
//! Invariant: the hub's row only ever grows, and starts above every number that any shard's sequence or column has, so no
//! number is handed out twice, by any proxy; a promoted hub's row, which may have forgotten the last blocks, starts so again; a block whose proxy dies is a gap, as after a crash of Postgres. Waits are bounded by the hub's
//! own; while it is away, blocks that are there go on, and after a failure nobody asks it again for a second.
//! Non-goals: which statement needs which number (that is `weir_core::plan`'s Filling).

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use weir_core::error::{Blame, UserError, sqlstate};
use weir_core::plan::Sequence;
use weir_core::sql::word::quote_name;
use weir_core::topology::catalog::RelationName;

use crate::database::Primaries;
use crate::hub::Hub;
use crate::hub::sequence::{Rebase, Taken};

/// After the hub has failed, others are told so without asking it for this long.
const QUIET: Duration = Duration::from_secs(1);
/// Longest wait for what the shards' sequences and columns have.
const PATIENCE: Duration = Duration::from_secs(10);
/// Numbers that a promoted hub leaves out: as many may have been given away in blocks that it has never heard of.
const LOST_MAX: i64 = 100_000;

/// The sequences of one database.
pub struct Sequences {
    database: String,
    hub: Option<Hub>,
    /// Weir's own login on each shard.
    shards: Arc<Primaries>,
    known: Mutex<HashMap<RelationName, Arc<Stock>>>,
}

/// What this process holds of one sequence.
#[derive(Default)]
struct Stock {
    block: Mutex<Block>,
    refilling: tokio::sync::Mutex<Option<(Instant, UserError)>>,
}

/// Numbers `next`, `next + step`, … below `end`.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Block {
    pub next: i128,
    pub end: i128,
    pub step: i128,
}

impl Block {
    fn len(self) -> usize {
        if self.step == 0 {
            0
        } else {
            usize::try_from((self.end - self.next).max(0) / self.step).unwrap_or(usize::MAX)
        }
    }

    /// Leaves out what comes before `next`, if that is within the block.
    fn skip_to(&mut self, next: i128) -> bool {
        let inside = self.next <= next && next < self.end;
        if inside {
            self.next = next;
        }
        inside
    }

    /// Moves up to `count` numbers to `out`.
    fn take(&mut self, count: usize, out: &mut Vec<i64>) {
        for _ in 0..count.min(self.len()) {
            out.extend(i64::try_from(self.next));
            self.next += self.step;
        }
    }
}

impl Sequences {
    pub fn new(database: &str, hub: Option<Hub>, shards: Arc<Primaries>) -> Self {
        Sequences { database: database.to_owned(), hub, shards, known: Mutex::default() }
    }

    /// The next `count` numbers. Errors: 2200H when the sequence is at its end, 57P03 when the hub is needed and away.
    pub async fn draw(&self, sequence: &Sequence, count: usize, block_size: usize) -> Result<Vec<i64>, UserError> {
        let stock = Arc::clone(self.known.lock().entry(sequence.name.clone()).or_default());
        if let Some(numbers) = stock.all(count) {
            return Ok(numbers);
        }
        let mut failed = stock.refilling.lock().await;
        if let Some(numbers) = stock.all(count) {
            return Ok(numbers);
        }
        if let Some((_, error)) = failed.as_ref().filter(|(at, _)| at.elapsed() < QUIET) {
            return Err(error.clone());
        }
        *failed = None;
        let mut fresh = match self.fetch(sequence, count.max(block_size)).await {
            Ok(block) => block,
            Err(error) => {
                *failed = Some((Instant::now(), error.clone()));
                return Err(error);
            }
        };
        let mut numbers = Vec::with_capacity(count);
        let mut block = stock.block.lock();
        block.take(count, &mut numbers);
        fresh.take(count - numbers.len(), &mut numbers);
        *block = fresh;
        if numbers.len() < count {
            return Err(exhausted(sequence));
        }
        Ok(numbers)
    }

    /// As setval(): numbers drawn from now on are above `value`, or begin with it. It can only be raised.
    pub async fn set(&self, sequence: &Sequence, value: i64, drawn: bool) -> Result<(), UserError> {
        if value > sequence.rule.max || value < 1.min(sequence.rule.start) {
            return Err(out_of_bounds(sequence, value));
        }
        let next = i128::from(value) + if drawn { i128::from(sequence.rule.increment) } else { 0 };
        let stock = Arc::clone(self.known.lock().entry(sequence.name.clone()).or_default());
        let _refilling = stock.refilling.lock().await;
        if stock.block.lock().skip_to(next) {
            return Ok(());
        }
        let started = self.started(sequence, 0).await?;
        if i128::from(started) > next {
            return Err(lower(sequence, value));
        }
        let hub = self.hub.as_ref().ok_or_else(|| away(sequence, "there is none"))?;
        let next = i64::try_from(next).unwrap_or(i64::MAX);
        hub.raise_sequence(&self.database, &sequence.name, next)
            .await
            .map_err(|error| away(sequence, &error.to_string()))?;
        *stock.block.lock() = Block::default();
        Ok(())
    }

    /// The number that the next block begins with: no proxy has it, or any behind it.
    pub async fn next(&self, sequence: &Sequence) -> Result<i64, UserError> {
        self.started(sequence, 0).await
    }

    async fn fetch(&self, sequence: &Sequence, count: usize) -> Result<Block, UserError> {
        let rule = sequence.rule;
        let step = i128::from(rule.increment);
        // The last block may be shorter than asked for.
        let span = (count as i128 * step).min(i128::from(i64::MAX / 4));
        let next = i128::from(self.started(sequence, span as i64).await?);
        let end = (next + span).min(i128::from(rule.max) + 1);
        if next > i128::from(rule.max) {
            return Err(exhausted(sequence));
        }
        // A number that is not above the maximum starts below the end, however long the step is.
        let numbers = (end - next + step - 1) / step;
        Ok(Block { next, end: next + numbers * step, step })
    }

    /// Takes `span` off the hub's row, which is made if it is not there; what it was before.
    async fn started(&self, sequence: &Sequence, span: i64) -> Result<i64, UserError> {
        let hub = self.hub.as_ref().ok_or_else(|| away(sequence, "there is none"))?;
        let lost = |error: crate::hub::HubError| away(sequence, &error.to_string());
        let taken = hub.take_numbers(&self.database, &sequence.name, span).await.map_err(lost)?;
        if let Taken::From(next) = taken {
            return Ok(next);
        }
        let first = tokio::time::timeout(PATIENCE, self.first(sequence));
        let first = first.await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
        let first = first.map_err(|error| away(sequence, &format!("a shard's numbers cannot be read: {error:#}")))?;
        if taken == Taken::Promoted {
            let (max, step) = (sequence.rule.max, sequence.rule.increment.max(1));
            let skip = LOST_MAX.saturating_mul(step);
            tracing::warn!(sequence = %sequence.name.1, first, "the hub has been promoted or restored: numbers are left out");
            let rebase = Rebase { first, skip, max, step };
            hub.rebase_sequence(&self.database, &sequence.name, rebase).await.map_err(lost)?;
        } else {
            hub.start_sequence(&self.database, &sequence.name, first).await.map_err(lost)?;
        }
        match hub.take_numbers(&self.database, &sequence.name, span).await.map_err(lost)? {
            Taken::From(next) => Ok(next),
            Taken::Unknown | Taken::Promoted => Err(away(sequence, "its row has gone again")),
        }
    }

    /// The first number above all that any shard has, in the sequence itself or in a column that is filled from it.
    async fn first(&self, sequence: &Sequence) -> anyhow::Result<i64> {
        let qualified = |name: &RelationName| format!("{}.{}", quote_name(&name.0), quote_name(&name.1));
        let mut highest = format!(
            "SELECT CASE WHEN is_called THEN last_value::numeric ELSE NULL END AS used FROM {}",
            qualified(&sequence.name)
        );
        for (table, column) in &sequence.columns {
            let (column, table) = (quote_name(column), qualified(table));
            let _ = write!(highest, " UNION ALL SELECT max({column})::numeric FROM {table}");
        }
        let mut used: Option<i64> = None;
        for (_, login) in self.shards.active() {
            let client = crate::control::connect(&login).await?;
            // A policy that hides rows is an error here, not a lower number.
            client.batch_execute("SET row_security = off").await?;
            let sql = format!("SELECT max(used)::bigint FROM ({highest}) AS each");
            used = used.max(client.query_one(&sql, &[]).await?.try_get(0)?);
        }
        let (start, step) = (sequence.rule.start, sequence.rule.increment);
        Ok(used.map_or(start, |used| {
            if used < start { start } else { used.saturating_sub((used - start) % step).saturating_add(step) }
        }))
    }
}

impl Stock {
    /// `count` numbers, if there are so many.
    fn all(&self, count: usize) -> Option<Vec<i64>> {
        let mut block = self.block.lock();
        if block.len() < count {
            return None;
        }
        let mut numbers = Vec::with_capacity(count);
        block.take(count, &mut numbers);
        Some(numbers)
    }
}

/// As nextval_internal says it (src/backend/commands/sequence.c).
fn exhausted(sequence: &Sequence) -> UserError {
    let message = format!("nextval: reached maximum value of sequence \"{}\" ({})", sequence.name.1, sequence.rule.max);
    UserError::new(Blame::Client, "2200H", message)
}

fn out_of_bounds(sequence: &Sequence, value: i64) -> UserError {
    let (name, rule) = (&sequence.name.1, sequence.rule);
    let message =
        format!("setval: value {value} is out of bounds for sequence \"{name}\" ({}..{})", rule.start, rule.max);
    UserError::new(Blame::Client, "22003", message)
}

fn lower(sequence: &Sequence, value: i64) -> UserError {
    UserError::new(Blame::Client, sqlstate::FEATURE_NOT_SUPPORTED, "this sequence can only be raised")
        .detail(format!(
            "Numbers of {} up to {value} and beyond are in blocks that sessions on other proxies may hold.",
            sequence.name.1
        ))
        .hint("To start it anew, drop and make the table anew.")
}

fn away(sequence: &Sequence, why: &str) -> UserError {
    let message = format!("no more numbers of sequence \"{}\" for now", sequence.name.1);
    UserError::new(Blame::Server, sqlstate::CANNOT_CONNECT_NOW, message)
        .detail(format!("The block that weir held is used up, and the hub gives no other: {why}"))
        .hint("Try again when the hub is back, or give the column a value. Statements that need no number go on.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_gives_each_number_once_and_no_more() {
        let mut block = Block { next: 5, end: 20, step: 5 };
        let mut numbers = Vec::new();
        block.take(2, &mut numbers);
        assert_eq!((block.len(), &*numbers), (1, &[5, 10][..]));
        block.take(2, &mut numbers);
        assert_eq!((block.len(), &*numbers), (0, &[5, 10, 15][..]));
        assert_eq!(Block::default().len(), 0);
        let mut block = Block { next: 5, end: 20, step: 1 };
        assert!(!block.skip_to(4) && !block.skip_to(20) && block.skip_to(18));
        assert_eq!((block.next, block.len()), (18, 2));
    }
}
