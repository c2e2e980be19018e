//! The running process as the console and the HTTP side see it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use weir_core::admin::{
    AdminSource, ConfigRow, DatabaseRow, DecodingRow, DriftRow, EndpointRow, EngineRow, PinRow, PoolRow, PreparedRow,
    ShardRow, Show, Snapshot, SocketRow, StatRow, UniqueRow, UserRow, slot_ranges,
};
use weir_core::election::Role;
use weir_core::error::UserError;
use weir_core::id::ShardId;
use weir_core::topology::ShardState;
use weir_core::topology::catalog::UniqueState;
use weir_core::topology::drift::Drift;

use super::figures::{cache, digests, hot_keys, slot_load};
use crate::app::App;
use crate::database::{Database, Server, Shard};
use crate::engine::{Standing, State};
use crate::http::{Condition, Operator};

/// Borrows the process for one answer.
pub struct Source<'a> {
    pub app: &'a App,
    /// May the asker see values of keys?
    pub sees_keys: bool,
}

impl AdminSource for Source<'_> {
    fn snapshot(&self, show: Show) -> Snapshot {
        let app = self.app;
        let mut snapshot = Snapshot { version: format!("weir {}", env!("CARGO_PKG_VERSION")), ..Snapshot::default() };
        for db in &app.databases() {
            match show {
                Show::Pools => snapshot.pools.extend(pools(db)),
                Show::Stats | Show::StatsTotals | Show::StatsAverages | Show::Totals => snapshot.stats.push(stats(db)),
                Show::Clients => snapshot.sockets.extend(clients(db)),
                Show::Servers => snapshot.sockets.extend(servers(db)),
                Show::Databases => snapshot.databases.extend(databases(app, db)),
                Show::Users => snapshot.users.extend(users(app, db)),
                Show::Shards => snapshot.shards.extend(shards(db)),
                Show::Slots => {
                    let view = db.view();
                    let map = (view.topology.epoch, &view.topology.slots);
                    snapshot.slots.extend(slot_ranges(&db.name, map, &view.topology.shards, self.sees_keys));
                }
                Show::SlotLoad => snapshot.slot_load.extend(slot_load(db)),
                Show::Replicas => snapshot.endpoints.extend(endpoints(db)),
                Show::Peers => snapshot.peers.extend(crate::fleet::rows(db)),
                Show::Pins => snapshot.pins.extend(pins(db)),
                Show::Unique => snapshot.unique.extend(unique(db)),
                Show::Decoding => snapshot.decoding.extend(decoding(db)),
                Show::Drift => snapshot.drift.extend(drift(db)),
                Show::Moves => {
                    snapshot.moves.extend(db.moves.rows.lock().iter().map(|one| crate::reshard::moves_row(db, one)));
                }
                Show::PreparedTransactions => snapshot.prepared.extend(prepared(db)),
                Show::Engine => snapshot.engine.extend(engine(db)),
                Show::Cache => snapshot.cache.extend(cache(db)),
                Show::Digests => snapshot.digests.extend(digests(db, self.sees_keys)),
                Show::HotKeys => snapshot.hot.extend(hot_keys(db, self.sees_keys)),
                Show::Lists => snapshot.lists.extend(lists(app, db)),
                _ => {}
            }
        }
        if show == Show::State {
            let not_ready = app.not_ready();
            let state = if not_ready.is_empty() { "ready".to_owned() } else { not_ready.join("; ") };
            snapshot.state.push(("state".to_owned(), state));
            snapshot.state.push(("uptime_s".to_owned(), app.started.elapsed().as_secs().to_string()));
        }
        if show == Show::Config {
            snapshot.config = config(app);
        }
        snapshot
    }

    fn route(&self, database: Option<&str>, sql: &str) -> Result<Vec<(String, String)>, UserError> {
        let db = self.app.database_meant(database, ("ROUTE", "ROUTE <database> '<sql>'"))?;
        db.route(sql)
    }
}

fn pools(db: &Arc<Database>) -> Vec<PoolRow> {
    let live = db.stats.live();
    let rows = db.all_pools().into_iter().map(|(user, pools)| {
        let (database, user_name) = (db.name.to_string(), user.to_string());
        let mut row = PoolRow { database, user: user_name, mode: pools.mode().as_str(), ..PoolRow::default() };
        for (_, _, pool) in pools.iter() {
            let counts = pool.counts();
            row.sv_active += counts.busy as u64;
            row.sv_idle += counts.idle as u64;
            row.cl_waiting += counts.waiting as u64;
            row.wait_us_max = row.wait_us_max.max(pool.longest_wait().as_micros() as u64);
        }
        row.cl_active =
            (live.iter().filter(|session| session.user == user).count() as u64).saturating_sub(row.cl_waiting);
        row
    });
    rows.collect()
}

fn stats(db: &Database) -> StatRow {
    StatRow {
        database: db.name.to_string(),
        totals: db.stats.database.totals(),
        averages: db.stats.database.averages(),
    }
}

fn clients(db: &Database) -> Vec<SocketRow> {
    let rows = db.stats.live().into_iter().map(|session| SocketRow {
        is_server: false,
        user: session.user.to_string(),
        database: db.name.to_string(),
        state: if session.is_busy() { "active" } else { "idle" },
        address: session.address.ip().to_string(),
        port: session.address.port(),
        connect_time: utc(session.connected),
        tls: if session.tls { "TLS".to_owned() } else { String::new() },
        mode: session.mode().as_str(),
        application_name: session.application_name.clone(),
        id: session.id,
        ..SocketRow::default()
    });
    rows.collect()
}

fn servers(db: &Database) -> Vec<SocketRow> {
    let mut rows = Vec::new();
    for (user, pools) in db.all_pools() {
        for (_, _, pool) in pools.iter() {
            let counts = pool.counts();
            let row = |state, number: usize| SocketRow {
                is_server: true,
                user: user.to_string(),
                database: pool.name.clone(),
                state,
                address: pool.endpoint().host.clone(),
                port: pool.endpoint().port,
                id: number as u64,
                ..SocketRow::default()
            };
            rows.extend((0..counts.busy).map(|number| row("active", number)));
            rows.extend((0..counts.idle).map(|number| row("idle", counts.busy + number)));
        }
    }
    rows
}

fn databases(app: &App, db: &Database) -> Vec<DatabaseRow> {
    let connections: usize = db
        .all_pools()
        .iter()
        .flat_map(|(_, pools)| pools.iter().map(|(_, _, pool)| pool.counts()).collect::<Vec<_>>())
        .map(|counts| counts.busy + counts.idle)
        .sum();
    let config = app.config();
    // Without a user's own say.
    let pool = config.pool_of(&db.name, "");
    let max = config.database_connections_max(&db.name).unwrap_or(config.limits.client_connections_max);
    let rows = db.shards.iter().map(|shard| &shard.roles.view().endpoint).map(|primary| DatabaseRow {
        name: db.name.to_string(),
        host: primary.host.clone(),
        port: primary.port,
        database: db.config.server_database.clone(),
        pool_size: pool.size as u64,
        min_pool_size: pool.min as u64,
        reserve_pool_size: pool.reserve as u64,
        mode: pool.mode.as_str(),
        server_lifetime: pool.lifetime_max.as_secs(),
        current_connections: connections as u64,
        max_client_connections: max as u64,
        paused: db.is_paused(),
        current_client_connections: db.stats.live().len() as u64,
    });
    rows.collect()
}

fn users(app: &App, db: &Database) -> Vec<UserRow> {
    let live = db.stats.live();
    let pools = db.all_pools();
    let config = app.config();
    let rows = config.users.iter().map(|(name, _)| {
        let pool = config.pool_of(&db.name, name);
        UserRow {
            name: name.to_owned(),
            pool_size: pool.size as u64,
            reserve_pool_size: pool.reserve as u64,
            mode: pool.mode.as_str(),
            current_connections: pools
                .iter()
                .filter(|(user, _)| &**user == name)
                .flat_map(|(_, pools)| pools.iter().map(|(_, _, pool)| pool.counts()).collect::<Vec<_>>())
                .map(|counts| (counts.busy + counts.idle) as u64)
                .sum(),
            max_client_connections: config.user_connections_max(name).unwrap_or(0) as u64,
            current_client_connections: live.iter().filter(|session| &*session.user == name).count() as u64,
        }
    });
    rows.collect()
}

fn shards(db: &Database) -> Vec<ShardRow> {
    let view = db.view();
    let slots = view.topology.slots.counts(db.shards.len());
    let rows = db.shards.by_shard().map(|(id, shard)| ShardRow {
        database: db.name.to_string(),
        shard: id,
        name: shard.name.to_string(),
        // One that has just been appended is in no map yet.
        state: view.topology.roster.state(id).unwrap_or(ShardState::Joining).as_str(),
        primary: shard.roles.view().endpoint.to_string(),
        replicas: others(shard).map(|server| server.view.endpoint.to_string()).collect(),
        slots: slots.get(usize::from(id.0)).copied().unwrap_or_default() as u64,
        weight: db.weight(id),
        epoch: view.topology.epoch,
        is_up: shard.roles.is_up(),
        replicas_up: others(shard).filter(|server| server.stands_by()).count() as u64,
        lag_ms: others(shard).filter(|server| server.stands_by()).filter_map(|server| server.view.lag_ms()).max(),
    });
    rows.collect()
}

/// All servers of a shard but its primary, or the last one.
fn others(shard: &Shard) -> impl Iterator<Item = &Server> {
    let primary = shard.roles.primary();
    shard.servers.iter().enumerate().filter(move |(number, _)| *number != primary).map(|(_, server)| server)
}

fn endpoints(db: &Database) -> Vec<EndpointRow> {
    let mut rows = Vec::new();
    for (id, shard) in db.shards.by_shard() {
        for (index, server) in shard.servers.iter().enumerate() {
            let last = if index == shard.roles.primary() { Role::Primary } else { Role::Replica };
            rows.push(endpoint(db, (id, index), server, last));
        }
    }
    rows
}

/// `last`: what it is taken for while it is away.
fn endpoint(db: &Database, (shard, index): (ShardId, usize), server: &Server, last: Role) -> EndpointRow {
    let view = &server.view;
    EndpointRow {
        database: db.name.to_string(),
        shard,
        role: Some(view.role()).filter(|role| *role != Role::Away).unwrap_or(last).as_str(),
        address: view.endpoint.to_string(),
        is_up: view.is_up(),
        in_recovery: view.in_recovery(),
        timeline: view.last_report().map(|report| report.timeline),
        replay_lsn: Some(view.replay_lsn()).filter(|lsn| lsn.0 != 0),
        lag_ms: view.lag_ms(),
        reads: db.stats.database.endpoint(shard, index).map_or(0, crate::metrics::EndpointMetrics::reads),
        last_error: if view.is_up() { None } else { view.last_error() },
        zone: server.zone.as_deref().map(str::to_owned),
    }
}

fn engine(db: &Database) -> Vec<EngineRow> {
    let base = EngineRow { database: db.name.to_string(), ..EngineRow::default() };
    let engine = db.engine.as_ref().filter(|_| !db.view().topology.is_single());
    let Some(engine) = engine else { return vec![EngineRow { state: "off".to_owned(), ..base }] };
    let base = EngineRow { engine: engine.database.clone(), ..base };
    let mut rows = match engine.state() {
        State::Starting => vec![EngineRow { state: "starting".to_owned(), ..base.clone() }],
        State::Failed { problem, .. } => {
            vec![EngineRow { state: "failed".to_owned(), reason: problem.to_string(), ..base.clone() }]
        }
        State::Ready(ready) => {
            let first = EngineRow { state: "ready".to_owned(), epoch: Some(ready.epoch), ..base.clone() };
            let missing = ready.skipped.iter().map(|skipped| EngineRow {
                state: skipped.kind.clone(),
                object: Some(skipped.shown.clone()),
                reason: skipped.reason.clone(),
                ..base.clone()
            });
            std::iter::once(first).chain(missing).collect()
        }
    };
    rows.extend(engine.replicas.iter().map(|replica| {
        let how = match replica.standing() {
            Standing::InStep(_) => "in step".to_owned(),
            Standing::Behind => "behind".to_owned(),
            Standing::Away(why) => format!("away: {why}"),
        };
        EngineRow {
            state: "replica".to_owned(),
            object: Some(replica.endpoint.to_string()),
            reason: format!("{how}; {} statements", replica.asked.load(Relaxed)),
            ..base.clone()
        }
    }));
    rows
}

fn pins(db: &Database) -> Vec<PinRow> {
    let counts = db.stats.database.pins.counts();
    let total = |reason: &str| counts.iter().find(|(name, _)| name == reason).map_or(0, |(_, count)| *count);
    let rows = weir_core::session::pin::Pin::ALL.into_iter().map(|pin| PinRow {
        database: db.name.to_string(),
        reason: pin.as_str(),
        current: db.stats.pinned_now(pin),
        total: total(pin.as_str()),
    });
    rows.collect()
}

fn unique(db: &Database) -> Vec<UniqueRow> {
    let view = db.view();
    let row = |rule: &weir_core::unique::Rule| {
        let (state, reason) = match crate::unique::state_of(&view, rule) {
            None => ("absent", None),
            Some(UniqueState::Building) => ("building", None),
            Some(UniqueState::Valid) => ("valid", None),
            Some(UniqueState::Failed { reason, .. }) => ("failed", Some(reason.to_string())),
        };
        UniqueRow {
            database: db.name.to_string(),
            table: format!("{}.{}", rule.schema, rule.table),
            column: rule.column.clone(),
            state,
            reason,
        }
    };
    db.unique.iter().flat_map(|unique| unique.rules()).map(row).collect()
}

fn decoding(db: &Database) -> Vec<DecodingRow> {
    let row = |(shard, decoding): (&Arc<Shard>, &crate::decode::Decoding)| {
        let (state, counters) = (decoding.state(), &decoding.counters);
        let (word, reason) = state.shown();
        DecodingRow {
            database: db.name.to_string(),
            shard: shard.name.to_string(),
            state: word,
            reason: reason.to_owned(),
            lag_bytes: counters.lag_bytes.load(Relaxed),
            lag_ms: counters.lag_us.load(Relaxed) as u64 / 1000,
            open: counters.open.load(Relaxed),
            waiting: counters.waiting.load(Relaxed),
            transactions: counters.transactions.load(Relaxed),
            words: counters.words.load(Relaxed),
            reconnects: counters.reconnects.load(Relaxed),
            gaps: decoding.gaps().to_string(),
        }
    };
    db.shards.iter().zip(db.decoding.iter()).map(row).collect()
}

fn drift(db: &Database) -> Vec<DriftRow> {
    let compared = db.drift.lock().clone();
    let rows = |drift: &Drift| {
        let shards = compared.shards.iter().map(|shard| db.shards[*shard].name.to_string());
        let row = |(shard, definition): (String, &Option<String>)| DriftRow {
            database: db.name.to_string(),
            table: drift.object.table.clone(),
            kind: drift.object.kind.clone(),
            name: drift.object.name.clone(),
            shard,
            definition: definition.clone(),
        };
        shards.zip(&drift.definitions).map(row).collect::<Vec<_>>()
    };
    compared.found.iter().flat_map(rows).collect()
}

fn prepared(db: &Database) -> Vec<PreparedRow> {
    let shards = &db.view().topology.shards;
    let row = |prepared: &crate::recover::Prepared| PreparedRow {
        database: db.name.to_string(),
        shard: shards.get(usize::from(prepared.shard.0)).map(ToString::to_string).unwrap_or_default(),
        gid: prepared.gid.clone(),
        owner: prepared.owner.clone(),
        age_ms: (prepared.age_s.max(0.0) * 1000.0) as u64,
    };
    db.prepared.lock().iter().map(row).collect()
}

fn lists(app: &App, db: &Database) -> Vec<(String, i64)> {
    let pools = db.all_pools();
    let counts: Vec<_> = pools
        .iter()
        .flat_map(|(_, pools)| pools.iter().map(|(_, _, pool)| pool.counts()).collect::<Vec<_>>())
        .collect();
    [
        ("databases", app.databases().len()),
        ("users", app.config().users.len()),
        ("pools", pools.len()),
        ("free_clients", 0),
        ("used_clients", app.clients.now() as usize),
        ("login_clients", 0),
        ("free_servers", counts.iter().map(|counts| counts.idle).sum()),
        ("used_servers", counts.iter().map(|counts| counts.busy).sum()),
    ]
    .into_iter()
    .map(|(name, count)| (name.to_owned(), count as i64))
    .collect()
}

fn config(app: &App) -> Vec<ConfigRow> {
    let config = app.config();
    let row = |key: &str, value: String| ConfigRow { key: key.to_owned(), value, default: None, is_changeable: true };
    let fixed = |key: &str, value: String| ConfigRow { is_changeable: false, ..row(key, value) };
    let time = |time: Option<std::time::Duration>| time.map_or_else(|| "off".to_owned(), |time| format!("{time:?}"));
    let count = |count: Option<usize>| count.map_or_else(|| "off".to_owned(), |count| count.to_string());
    let (pool, limits) = (&config.pool, &config.limits);
    vec![
        fixed("listen", config.listen.to_string()),
        fixed("http_listen", config.http_listen.to_string()),
        row("pool.size", pool.size.to_string()),
        row("pool.min", pool.min.to_string()),
        row("pool.reserve", pool.reserve.to_string()),
        row("pool.reserve_after", format!("{:?}", pool.reserve_after)),
        row("pool.mode", pool.mode.as_str().to_owned()),
        row("pool.wait_queue_max", pool.wait_queue_max.to_string()),
        row("pool.wait_max", format!("{:?}", pool.wait_max)),
        row("limits.client_connections_max", limits.client_connections_max.to_string()),
        row("limits.user_connections_max", count(limits.user_connections_max)),
        row("limits.database_connections_max", count(limits.database_connections_max)),
        row("limits.idle_client_max", time(limits.idle_client_max)),
        row("limits.idle_in_transaction_max", time(limits.idle_in_transaction_max)),
        row("limits.query_time_max", time(limits.query_time_max)),
        row("limits.transaction_time_max", time(limits.transaction_time_max)),
        row("limits.merge_bytes_max", limits.merge_bytes_max.to_string()),
        row("limits.sequence_block", limits.sequence_block.to_string()),
        fixed("engine.enabled", config.engine.enabled.to_string()),
        fixed("engine.database", config.engine.database.clone()),
        fixed("engine.pool_size", config.engine.pool_size.to_string()),
        fixed("engine.wait_max", format!("{:?}", config.engine.wait_max.unwrap_or(pool.wait_max))),
        fixed("engine.temp_bytes_max", config.engine.temp_bytes_max.to_string()),
        fixed("engine.time_max", format!("{:?}", config.engine.time_max)),
        fixed("cache.enabled", config.cache.enabled.to_string()),
        fixed("cache.decoding", config.cache.decoding.as_str().to_owned()),
        fixed("cache.other_weirs", config.cache.other_weirs.as_str().to_owned()),
        fixed("cache.l1_bytes", config.cache.l1_bytes.to_string()),
        fixed("cache.compress_above", config.cache.compress_above.to_string()),
        fixed("cache.max_age", format!("{:?}", config.cache.max_age)),
        fixed("tls", if config.tls.is_some() { "on" } else { "off" }.to_owned()),
        row("log.level", config.log.level.as_str().to_owned()),
    ]
}

/// `YYYY-MM-DD HH:MM:SS UTC`, by the civil-from-days rule.
fn utc(time: std::time::SystemTime) -> String {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// The process for the HTTP side.
pub struct HttpSource(pub Arc<App>);

impl AdminSource for HttpSource {
    fn snapshot(&self, show: Show) -> Snapshot {
        Source { app: &self.0, sees_keys: false }.snapshot(show)
    }

    fn route(&self, database: Option<&str>, sql: &str) -> Result<Vec<(String, String)>, UserError> {
        Source { app: &self.0, sees_keys: false }.route(database, sql)
    }
}

impl Operator for HttpSource {
    fn metrics(&self) -> String {
        for db in self.0.databases().iter().filter(|db| db.stats.database.name() == &*db.name) {
            super::gauges::publish(db);
        }
        // All databases have the same.
        if let Some(cache) = self.0.databases().iter().find_map(|db| db.cache.clone()) {
            self.0.metrics.shared.set(cache.redis_servers().unwrap_or_default(), cache.leases());
        }
        self.0.metrics.render()
    }

    fn readiness(&self) -> Vec<Condition> {
        let app = &self.0;
        let mut conditions = vec![condition("listening", app.listening.load(Relaxed), true, "clients can connect")];
        conditions.push(condition("draining", !app.draining.load(Relaxed), true, "not shutting down"));
        // Databases on demand share the servers of the wildcard.
        if let Some(any) = app.databases.wildcard() {
            any.shards.iter().for_each(|shard| server_conditions((&any.config.name, true), shard, &mut conditions));
        }
        for db in app.databases().iter().filter(|db| !db.on_demand) {
            conditions.push(condition(
                &format!("topology {}", db.name),
                true,
                true,
                &format!("epoch {}", db.view().topology.epoch),
            ));
            let roster = &db.view_arc().topology.roster;
            for (id, shard) in db.shards.by_shard().filter(|(id, _)| roster.state(*id) != Some(ShardState::Retired)) {
                server_conditions((&db.name, roster.is_active(id)), shard, &mut conditions);
            }
            if let Some(up) = db.cache.as_ref().and_then(|cache| cache.redis_up()) {
                conditions.push(condition(&format!("redis {}", db.name), up, false, "second level of the cache"));
            }
        }
        conditions
    }

    fn admin(&self) -> &dyn AdminSource {
        self
    }
}

/// `required`: traffic waits for its primary.
fn server_conditions((database, required): (&str, bool), shard: &Shard, conditions: &mut Vec<Condition>) {
    let primary = shard.roles.view();
    let why = || shard.roles.standing().lost.map(|why| why.to_string());
    let reason = primary.last_error().filter(|_| !primary.is_up()).or_else(why);
    let reason = reason.unwrap_or_else(|| primary.endpoint.to_string());
    let name = format!("primary {database}/{}", shard.name);
    conditions.push(condition(&name, shard.roles.has_been_up(), required, &reason));
    for server in others(shard) {
        let name = format!("replica {database}/{} {}", shard.name, server.view.endpoint);
        let reason = server.view.last_error().filter(|_| !server.view.is_up());
        let reason = reason.unwrap_or_else(|| server.view.role().as_str().to_owned());
        conditions.push(condition(&name, server.stands_by(), false, &reason));
    }
}

fn condition(name: &str, ok: bool, required: bool, reason: &str) -> Condition {
    Condition { name: name.to_owned(), ok, required, reason: reason.to_owned() }
}
