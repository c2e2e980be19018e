//! Has the primary write out what was committed asynchronously: nothing is decoded before it is on disk.
//!
//! With synchronous_commit = off a commit is shown at once, and decoded only when the WAL writer comes round, after up to three
//! `wal_writer_delay`. A small commit of weir's own that waits for the disk takes along all that was before it. Bounded: at
//! most one in [`LOOK_MIN`], and none while everything is on disk; the question whether it is costs a round trip, ever more seldom
//! while the answer is yes. Non-goals: the order of anything, and durability, which the writers have chosen to do without.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{sleep, timeout};

use super::{OWN_NAMES, QUERY_TIMEOUT};
use crate::back::connect::Login;

const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(50);
/// A message that means nothing to anybody, in a transaction that has to be written out.
const TICK: &str = "SELECT pg_logical_emit_message(true, 'weir_tick', '') \
    WHERE pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()";

/// For ever, on a connection of its own: questions about what is shown must not wait for the disk.
pub(super) async fn run(login: &Login) -> Result<Infallible> {
    let client = timeout(QUERY_TIMEOUT, crate::control::connect(login)).await.context("no connection")??;
    client.batch_execute(OWN_NAMES).await?;
    // The disk of the primary alone: what a standby has does not matter to the decoder.
    client.batch_execute("SET synchronous_commit = local").await?;
    let tick = client.prepare(TICK).await?;
    let mut pause = LOOK_MIN;
    loop {
        sleep(pause).await;
        let ticked = timeout(QUERY_TIMEOUT, client.query_opt(&tick, &[])).await.context("no answer in time")??;
        pause = if ticked.is_some() { LOOK_MIN } else { (pause * 2).min(LOOK_MAX) };
    }
}
