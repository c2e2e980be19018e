//! Who reads and writes the registers, through weir and beside it.
//!
//! Reads go in pipelines, because millions are wanted; what each must not fall below is known before its pipeline is sent.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Statement};

use super::desk::{Desk, PATIENCE};
use crate::differential::Dice;

pub const READ: &str = "SELECT name FROM users WHERE user_id = $1";
/// Never backwards, also when a server still works on what a dead proxy sent.
const WRITE: &str = "UPDATE users SET name = $1 WHERE user_id = $2 AND name::int8 < $3";
/// Beside weir.
const COUNT_UP: &str = "UPDATE users SET name = name::int8 + 1 WHERE user_id = $1";
/// Reads of one pipeline; `join_all` begins so many in their order.
pub const BATCH: usize = 30;
/// Batches or writes on one connection before another is opened.
const PER_CONNECTION: usize = 300;
const READERS: usize = 8;
/// Percent of reads that are of registers which are written beside weir.
const READS_BESIDE: usize = 8;

pub fn begin(desk: &Arc<Desk>, seed: u64) -> tokio::task::JoinSet<Result<()>> {
    let mut workers = tokio::task::JoinSet::new();
    for writer in 0..desk.settings.writers {
        workers.spawn(keep_writing(Arc::clone(desk), writer, Dice::new(seed ^ writer as u64)));
    }
    for reader in 0..READERS {
        workers.spawn(keep_reading(Arc::clone(desk), reader, Dice::new(seed ^ (1000 + reader as u64))));
    }
    for shard in (0..desk.tier.shards.len()).filter(|_| desk.settings.beside) {
        workers.spawn(keep_writing_beside(Arc::clone(desk), shard, Dice::new(seed ^ (2000 + shard as u64))));
    }
    workers
}

/// The values of these registers, asked for in one pipeline.
pub async fn query_all(
    (client, read): (&Client, &Statement),
    registers: &[usize],
) -> Result<Vec<Result<i64, tokio_postgres::Error>>> {
    let asked = registers.iter().map(|register| async move {
        let row = client.query_one(read, &[&(*register as i64)]).await?;
        row.try_get::<_, &str>(0).map(str::to_owned)
    });
    let answers = timeout(PATIENCE, join_all(asked)).await.context("reads that never end")?;
    let read = answers.into_iter().map(|answer| match answer {
        Ok(text) => Ok(Ok(text.parse().context("a register holds a number")?)),
        Err(error) => Ok(Err(error)),
    });
    read.collect()
}

/// Reads and checks; false if any failed.
pub async fn ask(desk: &Desk, connection: (&Client, &Statement), registers: &[usize], how: &str) -> Result<bool> {
    let least: Vec<_> = registers.iter().map(|register| desk.least(*register)).collect();
    let answers = query_all(connection, registers).await?;
    let mut all = true;
    for ((register, least), answer) in registers.iter().zip(least).zip(answers) {
        match answer {
            Ok(value) => desk.check(*register, least, (value, how)),
            Err(_) => {
                desk.figures.failed.fetch_add(1, SeqCst);
                all = false;
            }
        }
    }
    Ok(all)
}

async fn keep_reading(desk: Arc<Desk>, reader: usize, mut dice: Dice) -> Result<()> {
    loop {
        let proxy = reader + dice.roll(97);
        let Some((client, read)) = desk.open(proxy, READ).await else { return Ok(()) };
        let how = format!("by reader {reader} through proxy {}", proxy % 3);
        for _ in 0..PER_CONNECTION {
            let moving = desk.still.read().await;
            let count = if dice.percent(30) || !desk.may_read() { 1 } else { BATCH };
            let registers: Vec<usize> = (0..count)
                .map(|_| if dice.percent(READS_BESIDE) { desk.beside(&mut dice) } else { desk.popular(&mut dice) })
                .collect();
            if !ask(&desk, (&client, &read), &registers, &how).await? {
                break;
            }
            drop(moving);
            if desk.is_closed() {
                return Ok(());
            }
            // Writes may have to wait for a server or a proxy; reads go on then, at another pace.
            for _ in 0..100 {
                if desk.may_read() || desk.is_closed() {
                    break;
                }
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

async fn keep_writing(desk: Arc<Desk>, writer: usize, mut dice: Dice) -> Result<()> {
    let mut next = vec![0_i64; desk.settings.registers];
    loop {
        let (here, there) = (dice.roll(97), dice.roll(97));
        let Some((client, write)) = desk.open(here, WRITE).await else { return Ok(()) };
        let Some((other, read)) = desk.open(there, READ).await else { return Ok(()) };
        let how = format!("right after its write through proxy {}, through proxy {}", here % 3, there % 3);
        for _ in 0..PER_CONNECTION {
            let (percent, may_write) = desk.may_write();
            if desk.is_closed() {
                return Ok(());
            }
            if !may_write {
                sleep(Duration::from_millis(1)).await;
                continue;
            }
            let _moving = desk.still.read().await;
            let register = if dice.percent(50) { desk.popular(&mut dice) } else { desk.any(&mut dice) };
            let register = register / desk.settings.writers * desk.settings.writers + writer;
            next[register] += 1;
            let value = next[register];
            let (name, id) = (value.to_string(), register as i64);
            let wrote = timeout(PATIENCE, client.execute(&write, &[&name, &id, &value])).await;
            if !wrote.context("a write that never ends")?.is_ok_and(|rows| rows == 1) {
                desk.figures.failed.fetch_add(1, SeqCst);
                break;
            }
            desk.acknowledged(register, value);
            // At least a tenth of all reads, unless writes have to wait for long.
            let echoes = if percent <= 10 { 4 } else { 2 };
            if !ask(&desk, (&other, &read), &vec![register; echoes], &how).await? {
                break;
            }
            desk.figures.right_after.fetch_add(echoes as u64, SeqCst);
        }
    }
}

/// Straight to a primary.
async fn keep_writing_beside(desk: Arc<Desk>, shard: usize, mut dice: Dice) -> Result<()> {
    while !desk.is_closed() {
        let Ok(client) = desk.primary(shard).admin("shop").await else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        for _ in 0..PER_CONNECTION {
            let moving = desk.still.read().await;
            // A row of the other shard is not here, and nothing happens.
            let register = desk.beside(&mut dice) as i64;
            let Ok(Ok(rows)) = timeout(PATIENCE, client.execute(COUNT_UP, &[&register])).await else { break };
            desk.figures.writes_beside.fetch_add(rows, SeqCst);
            drop(moving);
            if desk.is_closed() {
                return Ok(());
            }
            sleep(Duration::from_millis(10 + dice.roll(60) as u64)).await;
        }
    }
    Ok(())
}
