//! Disturbances with rows of their own, which no writer writes: what a proxy must say of them is known to the last value.
//!
//! Reading order: the rows → writes of a dead proxy → commits that a crash loses.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use rustix::process::Signal;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use weir_harness::{Proxy, Server};

use super::desk::{Desk, OWN, PATIENCE};
use super::disturbance::signal;
use super::traffic::{READ, query_all};

/// Of each shard, for writes that stay behind when their proxy dies.
const ORPHANS: usize = 2;
/// How long it may take until all of them wait; one that does not is not counted on.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// A commit is tried to lose so often: another's synchronous commit saves it.
const LOSSES_TRIED: usize = 20;
/// Words are pending for a while after a commit, and nothing is kept: it is read so often, with pauses.
const READ_TIMES: u32 = 6;
const READ_PAUSE: Duration = Duration::from_millis(40);

/// A row and its value.
#[derive(Clone, Copy, Debug)]
struct Row {
    id: usize,
    value: i64,
}

/// Our own rows of a server's shard, as it has them.
async fn rows(server: &Server) -> Result<Vec<Row>> {
    let sql = "SELECT user_id, name::int8 FROM users WHERE user_id >= $1 ORDER BY user_id";
    let rows = server.admin("shop").await?.query(sql, &[&OWN]).await?;
    ensure!(rows.len() > ORPHANS, "{} has too few rows of our own", server.name());
    Ok(rows.iter().map(|row| Row { id: row.get::<_, i64>(0) as usize, value: row.get(1) }).collect())
}

fn update(id: usize, value: i64) -> String {
    format!("UPDATE users SET name = '{value}' WHERE user_id = {id}")
}

/// Every row through each proxy: whatever one says must be what its primary said before it was asked.
async fn check(desk: &Desk, proxies: &[usize], truth: &[Row], since: &str) -> Result<()> {
    let ids: Vec<usize> = truth.iter().map(|row| row.id).collect();
    for proxy in proxies {
        let Some((client, read)) = desk.open(*proxy, READ).await else { return Ok(()) };
        let answers = query_all((&client, &read), &ids).await?;
        for (row, answer) in truth.iter().zip(answers) {
            // A proxy that cannot ask yet says so.
            if let Ok(value) = answer
                && value != row.value
            {
                let text = format!("row {} is {} {since}, and proxy {} says {value}", row.id, row.value, proxy % 3);
                desk.find("stale", text);
            }
        }
    }
    Ok(())
}

// ---- writes of a dead proxy ----

/// A proxy is killed while its writes wait for rows, which they get afterwards: those of the writers, and of our own.
pub async fn orphan_writes(desk: &Desk, place: usize, moment: Duration) -> Result<()> {
    let proxy = desk.proxy(place);
    let others = [place + 1, place + 2];
    let (mut holders, mut orphans) = (Vec::new(), Vec::new());
    for shard in 0..desk.tier.shards.len() {
        let primary = desk.primary(shard);
        let own: Vec<Row> = rows(primary).await?.into_iter().take(ORPHANS).collect();
        let ids: Vec<i64> = own.iter().map(|row| row.id as i64).collect();
        let holder = primary.admin("shop").await?;
        holder.batch_execute("BEGIN").await?;
        holder.query("SELECT FROM users WHERE user_id < 8 OR user_id = ANY ($1) FOR UPDATE", &[&ids]).await?;
        holders.push(holder);
        orphans.extend(own);
    }
    let writes = join_all(orphans.iter().map(|row| write(proxy, *row)));
    let killed = async {
        let waiting = until_waiting(&holders, orphans.len()).await;
        desk.count_answers(proxy).await;
        proxy.kill_weir();
        waiting
    };
    let (_, killed) = tokio::join!(writes, killed);
    killed?;
    // What the others think of these writes shows now: rows are read, and kept if nothing seems to be under way.
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) + moment {
        check(desk, &others, &orphans, "as long as its writer waits").await?;
        sleep(Duration::from_millis(20)).await;
    }
    for holder in &holders {
        holder.batch_execute("COMMIT").await?;
    }
    until_waiting(&holders, 0).await?;
    let mut truth = Vec::new();
    for shard in 0..desk.tier.shards.len() {
        truth.extend(rows(desk.primary(shard)).await?.into_iter().take(ORPHANS));
    }
    check(desk, &others, &truth, "since a dead proxy's write").await?;
    proxy.restart_weir().await
}

/// Its proxy dies before it is answered; what becomes of it is seen on its primary.
async fn write(proxy: &Proxy, row: Row) {
    let written = async { anyhow::Ok(proxy.connect().await?.batch_execute(&update(row.id, row.value + 1)).await?) };
    let _ = timeout(PATIENCE, written).await;
}

/// Until so many statements of [`write`] are under way, or for a while.
async fn until_waiting(holders: &[Client], count: usize) -> Result<()> {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'UPDATE users%WHERE user_id = 200__'";
    let began = Instant::now();
    loop {
        let mut waiting = 0;
        for holder in holders {
            waiting += holder.query_one(sql, &[]).await?.get::<_, i64>(0);
        }
        if usize::try_from(waiting)? == count || began.elapsed() > WAIT_MAX {
            return Ok(());
        }
        sleep(Duration::from_millis(5)).await;
    }
}

// ---- lost commits ----

/// A primary's crash loses a commit with `synchronous_commit = off`, which had been read and cached everywhere. `quietly`: nobody
/// writes until each proxy answers from its cache again. Proxies that meet again after a crash doubt their catalogues, and a row
/// that is written meanwhile counts as all of them: that voids on its own ground whatever the crash has to void.
pub async fn lose_commits(desk: &Desk, shard: usize, quietly: bool) -> Result<()> {
    let primary = desk.primary(shard);
    // Only what proxies write of themselves can save it now.
    let still = desk.still.write().await;
    let written = write_lazily(desk, primary).await;
    let before = rows(primary).await;
    primary.kill9();
    let _still = quietly.then_some(still);
    primary.restart().await?;
    written?;
    let truth = rows(primary).await?;
    let lost = before?.iter().zip(&truth).filter(|(before, after)| after.value < before.value).count();
    desk.figures.lost_commits.fetch_add(lost as u64, SeqCst);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) && !desk.is_closed() {
        check(desk, &[0, 1, 2], &truth, "since the crash").await?;
    }
    // And when each of them answers from its cache again: what is of this shard, unless others read too.
    let ids: Vec<usize> = truth.iter().map(|row| row.id).collect();
    for proxy in desk.proxies() {
        desk.serves_again(proxy, &ids).await.context("after a crash")?;
    }
    check(desk, &[0, 1, 2], &truth, "since the crash").await
}

/// Until a commit is there that has been read through every proxy, and not been written to its server's files.
async fn write_lazily(desk: &Desk, primary: &Server) -> Result<()> {
    let mut connections = Vec::new();
    for number in 0..3 {
        let Some(opened) = desk.open(number, READ).await else { return Ok(()) };
        connections.push(opened);
    }
    let admin = primary.admin("shop").await?;
    let own = rows(primary).await?;
    // They write for others, also for those that do not ask for it; so does weir, for what is decoded. They end with their server.
    let writers = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() \
                   AND (backend_type IN ('walwriter', 'walsender', 'checkpointer', 'background writer') OR query LIKE '%weir_tick%')";
    for row in admin.query(writers, &[]).await? {
        let _ = signal(Some(row.get::<_, i32>(0).cast_unsigned()), Signal::STOP);
    }
    for attempt in 0..LOSSES_TRIED {
        let row = own[attempt % own.len()];
        let begins: i64 = admin.query_one(&position("insert_lsn"), &[]).await?.get(0);
        let value = row.value + 1 + attempt as i64;
        let writer = &connections[attempt % 3].0;
        // One that is refused, because others could not be told of it, is not lost.
        let written = commit_lazily(writer, &update(row.id, value)).await;
        if written.is_err() {
            let _ = writer.batch_execute("ROLLBACK").await;
        }
        for _ in 0..READ_TIMES {
            let ids = [row.id];
            let reads = connections.iter().map(|(client, read)| query_all((client, read), &ids));
            join_all(reads).await.into_iter().collect::<Result<Vec<_>>>()?;
            sleep(READ_PAUSE).await;
        }
        if written.is_ok() && admin.query_one(&position("lsn"), &[]).await?.get::<_, i64>(0) <= begins {
            break;
        }
    }
    Ok(())
}

/// One statement after the other: a text of several may have changed the schema, for all that the other proxies know, and they
/// would keep nothing until they have looked.
async fn commit_lazily(writer: &Client, update: &str) -> Result<(), tokio_postgres::Error> {
    for statement in ["BEGIN", "SET LOCAL synchronous_commit = off", update, "COMMIT"] {
        writer.batch_execute(statement).await?;
    }
    Ok(())
}

/// A question for a place in the WAL: where the next record goes (`insert_lsn`), or up to where it is in the files (`lsn`).
fn position(what: &str) -> String {
    format!("SELECT (pg_current_wal_{what}() - '0/0'::pg_lsn)::int8")
}
