//! Gauges are read off the state when somebody asks.

use std::time::Instant;

use weir_core::id::ShardId;

use crate::database::{Database, Server};
use crate::metrics::Role as PoolRole;

/// All of one database.
pub(super) fn publish(db: &Database) {
    let metrics = &db.stats.database;
    let live = db.stats.live();
    let busy = live.iter().filter(|session| session.is_busy()).count();
    let mut waiting = 0;
    let mut totals = vec![[(0, 0); 2]; db.shards.len()];
    for (_, pools) in db.all_pools() {
        for (shard, primary, pool) in pools.iter() {
            let counts = pool.counts();
            waiting += counts.waiting;
            let role = if primary { PoolRole::Primary } else { PoolRole::Replica };
            // The engine is no shard.
            let Some(total) = totals.get_mut(usize::from(shard.0)) else { continue };
            let total = &mut total[role as usize];
            *total = (total.0 + counts.busy, total.1 + counts.idle);
        }
    }
    let (hottest, total) = db.stats.hot.hottest(1);
    let most = hottest.first().map_or(0, |hot| hot.count - hot.error);
    metrics.hot_share.set(most as f64 / total.max(1) as f64);
    db.stats.database.moves.publish(&db.moves.rows.lock());
    publish_load(db);
    metrics.clients_active.set(busy as f64);
    metrics.clients_idle.set((live.len() - busy) as f64);
    metrics.clients_waiting.set(waiting as f64);
    for (number, roles) in totals.iter().enumerate() {
        for role in PoolRole::ALL {
            if let Some(pool) = metrics.pool(ShardId(number as u16), role) {
                pool.active.set(roles[role as usize].0 as f64);
                pool.idle.set(roles[role as usize].1 as f64);
            }
        }
    }
    for (id, shard) in db.shards.by_shard() {
        let primary = shard.roles.primary();
        metrics.primary(id, primary, shard.roles.standing().generation);
        for (index, Server { view, is_near, .. }) in shard.servers.iter().enumerate() {
            if let Some(endpoint) = metrics.endpoint(id, index) {
                let is_primary = index == primary && shard.roles.is_up();
                endpoint.probed(
                    view.is_up(),
                    is_primary,
                    *is_near,
                    view.lag_ms().map(std::time::Duration::from_millis),
                );
            }
        }
    }
    let view = db.view();
    metrics.topology(view.topology.epoch, &view.topology.slots);
}

/// By what this process has measured.
fn publish_load(db: &Database) {
    let rates = db.stats.load.rates(Instant::now());
    let total = rates.total().time_us.max(f64::MIN_POSITIVE);
    let view = db.view();
    let shares = rates.by_shard(&view.topology.slots, db.shards.len()).into_iter().map(|cost| cost.time_us / total);
    let hottest = rates.costliest(1).first().map_or(0.0, |(_, cost)| cost.time_us / total);
    db.stats.database.load(shares, hottest);
}
