//! What the checker does to servers, replicas, Redis and proxies while registers are read and written: one thing at a time, and all
//! is in order again when it returns.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;
use weir_harness::{Redis, Server};

use super::desk::{Desk, PATIENCE};
use super::own_rows;
use super::traffic::{READ, ask};
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
    /// The same, and nobody writes until every proxy answers from its cache again.
    CommitsLostQuietly,
    /// The primary is killed under load, the replica that has most takes its place, and the old primary becomes a replica of it.
    Promoted,
    /// Only with a weir that can be told where to die.
    ProxyDiesOnItsWay,
}

impl Disturbance {
    /// All that can be done to a weir as it is.
    pub const ALL: [Disturbance; 15] = [
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
        Disturbance::CommitsLostQuietly,
        Disturbance::Promoted,
    ];

    pub async fn happen(self, desk: &Desk, dice: &mut Dice) -> Result<()> {
        let place = dice.roll(1000);
        let shard = place % desk.tier.shards.len();
        let (primary, replicas) = desk.servers(shard);
        let replica = || replicas.get(place % replicas.len().max(1)).copied().context("a replica");
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
            Disturbance::StandbyStalled => stall_standby((primary, &replicas), moment).await,
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
            Disturbance::WritesOrphaned => own_rows::orphan_writes(desk, place, moment).await,
            Disturbance::PrimaryKilled => {
                primary.kill9();
                primary.restart().await
            }
            Disturbance::CommitsLost => own_rows::lose_commits(desk, shard, false).await,
            Disturbance::CommitsLostQuietly => own_rows::lose_commits(desk, shard, true).await,
            Disturbance::Promoted => promote(desk, shard).await,
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

pub fn signal(pid: Option<u32>, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.context("it runs")?.cast_signed()).context("a pid")?;
    Ok(kill_process(pid, signal)?)
}

async fn stall_standby((primary, replicas): (&Server, &[&Server]), moment: Duration) -> Result<()> {
    let mut stopped = Vec::new();
    for replica in replicas {
        const SESSIONS: &str =
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let rows = replica.admin("postgres").await?.query(SESSIONS, &[]).await?;
        stopped.extend(rows.iter().map(|row| row.get::<_, i32>(0).cast_unsigned()));
    }
    // One that has ended meanwhile needs no stopping.
    stopped.retain(|pid| signal(Some(*pid), Signal::STOP).is_ok());
    let stalled = set(primary, "synchronous_standby_names", Some("nobody")).await;
    sleep(Duration::from_millis(150)).await;
    for pid in stopped {
        let _ = signal(Some(pid), Signal::CONT);
    }
    stalled?;
    sleep(moment).await;
    set(primary, "synchronous_standby_names", None).await
}

// ---- promotion ----

/// From the moment when it is sure that every commit waits for all replicas, nothing that was acknowledged can be lost.
async fn promote(desk: &Desk, shard: usize) -> Result<()> {
    let (old, replicas) = desk.servers(shard);
    set(old, "synchronous_standby_names", Some(&format!("ANY {} (*)", replicas.len()))).await?;
    wait_for_synchronous(old, &replicas).await?;
    old.kill9();
    let mut received = Vec::new();
    for replica in &replicas {
        let sql = "SELECT (pg_last_wal_receive_lsn() - '0/0'::pg_lsn)::bigint";
        received.push((replica.admin("postgres").await?.query_one(sql, &[]).await?.get::<_, i64>(0), *replica));
    }
    let (_, heir) = received.into_iter().max_by_key(|(position, _)| *position).context("a replica")?;
    heir.promote().await?;
    desk.promoted(shard, heir);
    for other in replicas.into_iter().filter(|other| other.port() != heir.port()) {
        other.follow(heir).await?;
    }
    old.rejoin(heir).await
}

/// A replica stands still until a commit is seen to wait for it: then the setting is in force, and not only written.
async fn wait_for_synchronous(primary: &Server, replicas: &[&Server]) -> Result<()> {
    let admin = primary.admin("postgres").await?;
    let still = replicas.first().context("a replica")?;
    still.freeze();
    let began = Instant::now();
    let seen = async {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        while admin.query_one(waits, &[]).await?.get::<_, i64>(0) == 0 {
            ensure!(began.elapsed() < PATIENCE, "no commit waits for a replica that stands still");
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    };
    let commits = async {
        loop {
            commit_something(primary).await?;
            sleep(Duration::from_millis(5)).await;
        }
    };
    // Cancel-safe: nobody minds whether the last of these commits came to be.
    let seen = tokio::select! {
        seen = seen => seen,
        failed = commits => failed,
    };
    still.thaw();
    seen?;
    // It comes back when all replicas have it, and all that was acknowledged before.
    commit_something(primary).await
}

async fn commit_something(server: &Server) -> Result<()> {
    let admin = server.admin("postgres").await?;
    Ok(admin.batch_execute("SELECT pg_logical_emit_message(true, 'checker', '')").await?)
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
