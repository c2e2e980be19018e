//! What the checker does to servers, replicas, Redis and proxies while registers are read and written: one thing at a time, and all
//! is in order again when it returns.

use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;
use weir_harness::{Redis, Server, Shard};

use super::desk::{ASYNCHRONOUS, Desk};
use super::traffic::{READ, ask, query_all};
use crate::differential::Dice;

/// Where a weir built with the feature `unsound` can die on the way of a write (`weir::unsound::Place`).
const PLACES: [&str; 8] = ["raised", "told", "sent", "answered", "posted", "placed", "lowered", "decoded"];
/// How long it may take to get there.
const DIES_MAX: Duration = Duration::from_secs(5);
/// Longer than a proxy's lease.
const STOPPED: Duration = Duration::from_millis(2500);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disturbance {
    ReplayPaused,
    /// `recovery_min_apply_delay`, up to 5 s.
    ReplayDelayed,
    ReplicaKilled,
    /// The primary waits for a synchronous standby that there is not: what has reached replicas is not shown by the primary. And
    /// the replicas' own processes stand still while it begins.
    StandbyStalled,
    RedisKilled,
    RedisEmptied,
    /// Killed, and started again with what it had a while ago.
    RedisFailedOver,
    RedisCutOff,
    ProxyKilled,
    /// And while it stands still and others write, reads wait at its door.
    ProxyStopped,
    /// Killed while its writes wait for a row, which they get afterwards.
    WritesOrphaned,
    PrimaryKilled,
    /// A primary's crash loses commits with `synchronous_commit = off`, which had been read and cached.
    CommitsLost,
    /// Only with a weir that can be told where to die.
    ProxyDiesOnItsWay,
}

impl Disturbance {
    /// All that can be done to a weir as it is.
    pub const ALL: [Disturbance; 13] = [
        Disturbance::ReplayPaused,
        Disturbance::ReplayDelayed,
        Disturbance::ReplicaKilled,
        Disturbance::StandbyStalled,
        Disturbance::RedisKilled,
        Disturbance::RedisEmptied,
        Disturbance::RedisFailedOver,
        Disturbance::RedisCutOff,
        Disturbance::ProxyKilled,
        Disturbance::ProxyStopped,
        Disturbance::WritesOrphaned,
        Disturbance::PrimaryKilled,
        Disturbance::CommitsLost,
    ];

    pub async fn happen(self, desk: &Desk, dice: &mut Dice) -> Result<()> {
        let place = dice.roll(1000);
        let shard = &desk.tier.shards[place % desk.tier.shards.len()];
        let replica = || shard.replicas.get(place % shard.replicas.len().max(1)).context("a replica");
        let proxy = desk.proxy(place);
        let moment = desk.settings.moment.mul_f64(0.5 + dice.roll(100) as f64 / 100.0);
        match self {
            Disturbance::ReplayPaused => {
                replica()?.pause_replay().await?;
                sleep(moment).await;
                replica()?.resume_replay().await
            }
            Disturbance::ReplayDelayed => {
                let delay = format!("{}ms", dice.roll(5000));
                set(replica()?, "recovery_min_apply_delay", Some(&delay)).await?;
                sleep(moment).await;
                set(replica()?, "recovery_min_apply_delay", None).await
            }
            Disturbance::ReplicaKilled => {
                replica()?.kill9();
                sleep(moment).await;
                replica()?.restart().await
            }
            Disturbance::StandbyStalled => stall_standby(shard, moment).await,
            Disturbance::RedisKilled => {
                redis(desk)?.kill9();
                sleep(moment).await;
                redis(desk)?.restart().await
            }
            Disturbance::RedisEmptied => redis_says(desk, &["FLUSHALL"]).await.map(drop),
            Disturbance::RedisFailedOver => fail_redis_over(desk, moment).await,
            Disturbance::RedisCutOff => {
                signal(redis(desk)?.pid(), Signal::STOP)?;
                sleep(moment).await;
                signal(redis(desk)?.pid(), Signal::CONT)
            }
            Disturbance::ProxyKilled => {
                desk.count_answers(proxy).await;
                proxy.kill_weir();
                sleep(moment).await;
                proxy.restart_weir().await
            }
            Disturbance::ProxyStopped => stop_proxy(desk, place).await,
            Disturbance::WritesOrphaned => orphan_writes(desk, place, moment).await,
            Disturbance::PrimaryKilled => {
                shard.primary.kill9();
                shard.primary.restart().await
            }
            Disturbance::CommitsLost => lose_commits(desk, shard, place).await,
            Disturbance::ProxyDiesOnItsWay => {
                desk.count_answers(proxy).await;
                let failpoint = format!("{}:{}", dice.pick(&PLACES), 1 + dice.roll(100));
                proxy.restart_weir_with(&[("WEIR_FAILPOINT".to_owned(), failpoint)]).await?;
                let began = Instant::now();
                while proxy.weir_exited().is_none() && began.elapsed() < DIES_MAX && !desk.is_closed() {
                    sleep(Duration::from_millis(20)).await;
                }
                proxy.restart_weir().await
            }
        }
    }
}

/// Sets a server's setting, or takes it back.
async fn set(server: &Server, name: &str, value: Option<&str>) -> Result<()> {
    let admin = server.admin("postgres").await?;
    let said =
        value.map_or(format!("ALTER SYSTEM RESET {name}"), |value| format!("ALTER SYSTEM SET {name} = '{value}'"));
    admin.batch_execute(&said).await?;
    Ok(admin.batch_execute("SELECT pg_reload_conf()").await?)
}

fn signal(pid: Option<u32>, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.context("it runs")?.cast_signed()).context("a pid")?;
    Ok(kill_process(pid, signal)?)
}

async fn stall_standby(shard: &Shard, moment: Duration) -> Result<()> {
    let mut stopped = Vec::new();
    for replica in &shard.replicas {
        const SESSIONS: &str =
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let rows = replica.admin("postgres").await?.query(SESSIONS, &[]).await?;
        stopped.extend(rows.iter().map(|row| row.get::<_, i32>(0).cast_unsigned()));
    }
    // One that has ended meanwhile needs no stopping.
    stopped.retain(|pid| signal(Some(*pid), Signal::STOP).is_ok());
    let stalled = set(&shard.primary, "synchronous_standby_names", Some("nobody")).await;
    sleep(Duration::from_millis(150)).await;
    for pid in stopped {
        let _ = signal(Some(pid), Signal::CONT);
    }
    stalled?;
    sleep(moment).await;
    set(&shard.primary, "synchronous_standby_names", None).await
}

// ---- Redis ----

fn redis(desk: &Desk) -> Result<&Redis> {
    desk.tier.redis.as_ref().context("there is a Redis")
}

async fn redis_says(desk: &Desk, command: &[&str]) -> Result<redis::Value> {
    let mut connection = redis::Client::open(redis(desk)?.url())?.get_multiplexed_async_connection().await?;
    Ok(redis::cmd(command[0]).arg(&command[1..]).query_async(&mut connection).await?)
}

async fn fail_redis_over(desk: &Desk, moment: Duration) -> Result<()> {
    let said = redis_says(desk, &["CONFIG", "GET", "dir"]).await?;
    let (_, dir): (String, PathBuf) = redis::from_redis_value::<Vec<(String, String)>>(said)?
        .into_iter()
        .next()
        .map(|(name, dir)| (name, PathBuf::from(dir)))
        .context("a directory")?;
    redis_says(desk, &["SAVE"]).await?;
    let (dump, old) = (dir.join("dump.rdb"), dir.join("old.rdb"));
    std::fs::rename(&dump, &old)?;
    // What is written meanwhile makes the copy stale.
    sleep(moment).await;
    redis(desk)?.kill9();
    std::fs::rename(&old, &dump)?;
    redis(desk)?.restart().await?;
    Ok(std::fs::remove_file(&dump)?)
}

// ---- proxies ----

async fn stop_proxy(desk: &Desk, place: usize) -> Result<()> {
    let proxy = desk.proxy(place);
    // The most popular ones, which it has in its cache.
    let registers: Vec<usize> = (0..8).collect();
    let mut doors = Vec::new();
    for _ in 0..4 {
        let Some((client, read)) = desk.open(place, READ).await else { return Ok(()) };
        ask(desk, (&client, &read), &registers, "before the proxy was stopped").await?;
        doors.push((client, read));
    }
    signal(proxy.weir_pid(), Signal::STOP)?;
    sleep(STOPPED).await;
    let waiting = doors.iter().map(|(client, read)| ask(desk, (client, read), &registers, "at a stopped proxy's door"));
    let woken = async {
        sleep(Duration::from_millis(50)).await;
        signal(proxy.weir_pid(), Signal::CONT)
    };
    let (answered, woken) = tokio::join!(futures_util::future::join_all(waiting), woken);
    woken?;
    answered.into_iter().try_for_each(|answer| answer.map(drop))
}

async fn orphan_writes(desk: &Desk, place: usize, moment: Duration) -> Result<()> {
    let proxy = desk.proxy(place);
    let mut holders = Vec::new();
    for shard in &desk.tier.shards {
        let holder = shard.primary.admin("shop").await?;
        holder.batch_execute("BEGIN; SELECT FROM users WHERE user_id < 8 FOR UPDATE").await?;
        holders.push(holder);
    }
    // Writers come to wait for them.
    sleep(Duration::from_millis(200)).await;
    desk.count_answers(proxy).await;
    proxy.kill_weir();
    // What the others think of its writes shows now: they are read, and kept if nothing seems to be under way.
    sleep(Duration::from_millis(1500) + moment).await;
    for holder in holders {
        holder.batch_execute("COMMIT").await?;
    }
    proxy.restart_weir().await
}

// ---- lost commits ----

/// Rows of their own, so that nobody else is told of what will be lost.
async fn lose_commits(desk: &Desk, shard: &Shard, place: usize) -> Result<()> {
    set(&shard.primary, "wal_writer_delay", Some("10s")).await?;
    let rows = asynchronous(shard).await?;
    let ids: Vec<usize> = rows.iter().map(|(id, _)| *id).collect();
    let Some((client, _)) = desk.open(place, READ).await else { return Ok(()) };
    let mut connections = Vec::new();
    for number in 0..3 {
        let Some(opened) = desk.open(number, READ).await else { return Ok(()) };
        connections.push(opened);
    }
    {
        // A synchronous commit of anybody would save them.
        let _still = desk.still.write().await;
        for (id, value) in &rows {
            let value = value + 1;
            let write = format!("UPDATE users SET name = '{value}' WHERE user_id = {id}");
            // One that is refused, because others could not be told of it, is not lost.
            let _ = client.batch_execute(&format!("BEGIN; SET LOCAL synchronous_commit = off; {write}; COMMIT")).await;
        }
        for (client, read) in &connections {
            for _ in 0..2 {
                query_all((client, read), &ids).await?;
            }
        }
        shard.primary.kill9();
    }
    shard.primary.restart().await?;
    set(&shard.primary, "wal_writer_delay", None).await?;
    let truth = asynchronous(shard).await?;
    let lost = rows.iter().zip(&truth).filter(|((_, before), (_, after))| before == after).count();
    desk.figures.lost_commits.fetch_add(lost as u64, SeqCst);
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) {
        for number in 0..3 {
            check_lost(desk, number, &ids, &truth).await?;
        }
    }
    Ok(())
}

/// Through one proxy all is as the primary has it; a proxy that cannot ask it yet says so.
async fn check_lost(desk: &Desk, proxy: usize, ids: &[usize], truth: &[(usize, i64)]) -> Result<()> {
    let Some((client, read)) = desk.open(proxy, READ).await else { return Ok(()) };
    let values = query_all((&client, &read), ids).await?;
    for ((id, truth), value) in truth.iter().zip(values) {
        if let Ok(value) = value
            && value != *truth
        {
            desk.find("lost commit", format!("row {id} is {truth} since the crash, and proxy {proxy} says {value}"));
        }
    }
    Ok(())
}

/// Rows and values, by row.
async fn asynchronous(shard: &Shard) -> Result<Vec<(usize, i64)>> {
    let sql = "SELECT user_id, name::int8 FROM users WHERE user_id >= $1 ORDER BY user_id";
    let rows = shard.primary.admin("shop").await?.query(sql, &[&ASYNCHRONOUS]).await?;
    ensure!(!rows.is_empty(), "no such row is on {}", shard.name);
    Ok(rows.iter().map(|row| (row.get::<_, i64>(0) as usize, row.get(1))).collect())
}
