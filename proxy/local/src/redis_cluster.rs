//! Redis servers that share their slots, as a Cluster does: masters only, each with an equal part of the slots.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::{Instant, sleep};

use crate::{Redis, RedisSpec, Run, port};

const SLOTS: usize = 16_384;
/// Until all know of all.
const MEET_WAIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// Starts `count` masters and returns when each says that the Cluster is whole. One that dies takes only its own slots along.
pub async fn start_redis_cluster(run: &Arc<Run>, count: usize) -> Result<Vec<Redis>> {
    let mut masters = Vec::new();
    let mut meet = Vec::new();
    for number in 0..count {
        let bus = port::free()?;
        let spec = RedisSpec {
            name: format!("redis-{number}"),
            lines: format!(
                "cluster-enabled yes\ncluster-config-file nodes.conf\ncluster-port {bus}\ncluster-node-timeout 1000\n\
                 cluster-require-full-coverage no\n"
            ),
            ..RedisSpec::default()
        };
        let master = Redis::start_as(run, spec).await?;
        let (first, last) = (SLOTS * number / count, SLOTS * (number + 1) / count - 1);
        ok(&master, &format!("CLUSTER ADDSLOTSRANGE {first} {last}")).await?;
        ok(&master, &format!("CLUSTER SET-CONFIG-EPOCH {}", number + 1)).await?;
        meet.push(format!("CLUSTER MEET 127.0.0.1 {} {bus}", master.port()));
        masters.push(master);
    }
    for command in &meet[1..] {
        ok(&masters[0], command).await?;
    }
    let deadline = Instant::now() + MEET_WAIT;
    for master in &masters {
        loop {
            let info = master.command("CLUSTER INFO").await?;
            let says = |what: &str| info.lines().any(|line| line == what);
            if says("cluster_state:ok") && says("cluster_slots_assigned:16384") {
                break;
            }
            ensure!(Instant::now() < deadline, "the Redis Cluster does not come together: {info}");
            sleep(POLL).await;
        }
    }
    Ok(masters)
}

async fn ok(redis: &Redis, command: &str) -> Result<()> {
    let said = redis.command(command).await?;
    ensure!(said == "+OK\r\n", "{command}: {said}");
    Ok(())
}
