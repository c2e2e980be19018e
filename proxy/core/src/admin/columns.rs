//! Names and order of every table's columns, next to the cells that fill them.

use super::command::Show;
use super::reshard::moves_table;
use super::rows::*;
use super::table::{Cell, Column, Kind, Table};

/// `name` of int8, or text when it starts with `'`. The mark keeps a table readable as one line of names.
fn columns(names: &[&'static str]) -> Vec<Column> {
    names
        .iter()
        .map(|name| match name.strip_prefix('\'') {
            Some(name) => Column { name, kind: Kind::Text },
            None => Column { name, kind: Kind::Int8 },
        })
        .collect()
}

fn table(names: &[&'static str], rows: Vec<Vec<Cell>>) -> Table {
    Table { columns: columns(names), rows, tag: "SHOW" }
}

fn pairs<V>(names: [&'static str; 2], rows: &[(String, V)]) -> Table
where
    V: Clone,
    Cell: From<V>,
{
    table(&names, rows.iter().map(|(name, value)| vec![name.into(), value.clone().into()]).collect())
}

/// The answer to a SHOW.
pub fn show(show: Show, snapshot: &Snapshot) -> Table {
    match show {
        Show::Cache => pairs(["'item", "value"], &snapshot.cache),
        Show::Clients => sockets(snapshot, false),
        Show::Config => config(&snapshot.config),
        Show::Databases => databases(&snapshot.databases),
        Show::Decoding => decoding(&snapshot.decoding),
        Show::Digests => digests(&snapshot.digests),
        Show::Drift => drift(&snapshot.drift),
        Show::Help => help(),
        Show::HotKeys => hot_keys(&snapshot.hot),
        Show::Lists => pairs(["'list", "items"], &snapshot.lists),
        Show::Moves => moves_table(&snapshot.moves, "SHOW"),
        Show::Peers => peers(&snapshot.peers),
        Show::Pins => pins(&snapshot.pins),
        Show::Engine => engine(&snapshot.engine),
        Show::Pools => pools(&snapshot.pools),
        Show::PreparedTransactions => prepared_transactions(&snapshot.prepared),
        Show::Replicas => replicas(&snapshot.endpoints),
        Show::Servers => sockets(snapshot, true),
        Show::Shards => shards(&snapshot.shards),
        Show::SlotLoad => slot_load(&snapshot.slot_load),
        Show::Slots => slots(&snapshot.slots),
        Show::State => pairs(["'key", "'value"], &snapshot.state),
        Show::Stats => stats(&snapshot.stats),
        Show::StatsAverages => stats_averages(&snapshot.stats),
        Show::StatsTotals => stats_totals(&snapshot.stats),
        Show::Totals => totals(&snapshot.stats),
        Show::Unique => unique(&snapshot.unique),
        Show::Users => users(&snapshot.users),
        Show::Version => table(&["'version"], vec![vec![Cell::from(&snapshot.version)]]),
    }
}

/// The answer to ROUTE: name and sentence, both text.
pub fn route(rows: Vec<(String, String)>) -> Table {
    Table {
        tag: "ROUTE",
        ..table(&["'item", "'value"], rows.into_iter().map(|(item, value)| vec![item.into(), value.into()]).collect())
    }
}

/// One value, as drivers expect of a SELECT.
pub fn select(name: &'static str, cell: Cell) -> Table {
    let kind = if matches!(cell, Cell::Int(_)) { Kind::Int8 } else { Kind::Text };
    Table { columns: vec![Column { name, kind }], rows: vec![vec![cell]], tag: "SELECT 1" }
}

fn help() -> Table {
    let shows = Show::ALL.iter().map(|show| vec![Cell::from(format!("SHOW {}", show.name())), show.meaning().into()]);
    let others = [
        ("ROUTE [database] '<sql>'", "where a statement would go and why, without running it"),
        ("RELOAD", "read the configuration again, as a whole or not at all"),
        ("PAUSE [database]", "let running transactions end, then keep everybody waiting"),
        ("RESUME [database]", "end a pause"),
        ("RECONNECT [database]", "replace every server connection at its next idle moment"),
        ("KILL <database>", "end all its sessions; newcomers wait until RESUME"),
        ("KILL_CLIENT <id>", "end one session of SHOW CLIENTS"),
    ];
    let others = others.into_iter().map(|(name, meaning)| vec![Cell::from(name), meaning.into()]);
    table(&["'command", "'meaning"], shows.chain(others).collect())
}

#[rustfmt::skip]
fn pools(rows: &[PoolRow]) -> Table {
    let names = [
        "'database", "'user", "cl_active", "cl_waiting", "cl_active_cancel_req", "cl_waiting_cancel_req", "sv_active",
        "sv_active_cancel", "sv_being_canceled", "sv_idle", "sv_used", "sv_tested", "sv_login", "maxwait", "maxwait_us",
        "'pool_mode", "'load_balance_hosts",
    ];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.database), (&row.user).into(), row.cl_active.into(), row.cl_waiting.into(),
        row.cl_active_cancel_req.into(), row.cl_waiting_cancel_req.into(), row.sv_active.into(),
        row.sv_active_cancel.into(), row.sv_being_canceled.into(), row.sv_idle.into(), row.sv_used.into(),
        row.sv_tested.into(), row.sv_login.into(), (row.wait_us_max / 1_000_000).into(),
        (row.wait_us_max % 1_000_000).into(), row.mode.into(), Cell::Null,
    ]).collect())
}

#[rustfmt::skip]
const STATS: [&str; 25] = [
    "'database",
    "total_server_assignment_count", "total_xact_count", "total_query_count", "total_received", "total_sent",
    "total_xact_time", "total_query_time", "total_wait_time", "total_client_parse_count", "total_server_parse_count",
    "total_bind_count", "total_client_login_count",
    "avg_server_assignment_count", "avg_xact_count", "avg_query_count", "avg_recv", "avg_sent", "avg_xact_time",
    "avg_query_time", "avg_wait_time", "avg_client_parse_count", "avg_server_parse_count", "avg_bind_count",
    "avg_client_login_count",
];

fn stat_cells(counts: &StatCounts) -> impl Iterator<Item = Cell> {
    counts.in_order().into_iter().map(Cell::from)
}

fn stats(rows: &[StatRow]) -> Table {
    let cells = |row: &StatRow| {
        std::iter::once(Cell::from(&row.database))
            .chain(stat_cells(&row.totals))
            .chain(stat_cells(&row.averages))
            .collect()
    };
    table(&STATS, rows.iter().map(cells).collect())
}

#[rustfmt::skip]
fn stats_totals(rows: &[StatRow]) -> Table {
    let names = [
        "'database", "server_assignment_count", "xact_count", "query_count", "bytes_received", "bytes_sent", "xact_time",
        "query_time", "wait_time", "client_parse_count", "server_parse_count", "bind_count", "client_login_count",
    ];
    let cells = |row: &StatRow| std::iter::once(Cell::from(&row.database)).chain(stat_cells(&row.totals)).collect();
    table(&names, rows.iter().map(cells).collect())
}

#[rustfmt::skip]
fn stats_averages(rows: &[StatRow]) -> Table {
    let names = [
        "'database", "server_assignment_count", "xact_count", "query_count", "bytes_received", "bytes_sent", "xact_time",
        "query_time", "wait_time", "avg_client_parse_count", "avg_server_parse_count", "avg_bind_count",
        "avg_client_login_count",
    ];
    let cells = |row: &StatRow| std::iter::once(Cell::from(&row.database)).chain(stat_cells(&row.averages)).collect();
    table(&names, rows.iter().map(cells).collect())
}

/// Sums over all databases under the names of STATS; the `avg_*_time` rows are means over the databases that have any.
fn totals(rows: &[StatRow]) -> Table {
    let mut sums = [0u64; 24];
    let mut counted = [0u64; 24];
    for row in rows {
        let values = row.totals.in_order().into_iter().chain(row.averages.in_order());
        for ((sum, counted), value) in sums.iter_mut().zip(&mut counted).zip(values) {
            *sum = sum.saturating_add(value);
            *counted += u64::from(value > 0);
        }
    }
    let row = |((name, sum), counted): ((&&'static str, u64), u64)| {
        let mean = name.starts_with("avg_") && name.ends_with("_time");
        vec![Cell::from(*name), (if mean { sum / counted.max(1) } else { sum }).into()]
    };
    table(&["'name", "value"], STATS[1..].iter().zip(sums).zip(counted).map(row).collect())
}

#[rustfmt::skip]
fn sockets(snapshot: &Snapshot, servers: bool) -> Table {
    let names = [
        "'type", "'user", "'database", "'replication", "'state", "'addr", "port", "'local_addr", "local_port",
        "'connect_time", "'request_time", "wait", "wait_us", "close_needed", "'ptr", "'link", "remote_pid", "'tls",
        "'application_name", "prepared_statements", "id",
    ];
    let rows = snapshot.sockets.iter().filter(|row| row.is_server == servers);
    let mut table = table(&names, rows.map(|row| vec![
        Cell::from(if servers { "S" } else { "C" }), (&row.user).into(), (&row.database).into(), "none".into(),
        row.state.into(), (&row.address).into(), row.port.into(), (&row.local_address).into(), row.local_port.into(),
        (&row.connect_time).into(), (&row.request_time).into(), (row.wait_us / 1_000_000).into(),
        (row.wait_us % 1_000_000).into(), i64::from(row.close_needed).into(), format!("{:#x}", row.id).into(),
        row.link.map_or_else(String::new, |id| format!("{id:#x}")).into(), row.remote_pid.into(), (&row.tls).into(),
        (&row.application_name).into(), row.prepared_statements.into(), row.id.into(),
    ]).collect());
    // Behind PgBouncer's columns, so that theirs stay where they are.
    if !servers {
        table.columns.push(Column { name: "pool_mode", kind: Kind::Text });
        let clients = snapshot.sockets.iter().filter(|row| !row.is_server);
        for (cells, row) in table.rows.iter_mut().zip(clients) {
            cells.push(row.mode.into());
        }
    }
    table
}

#[rustfmt::skip]
fn databases(rows: &[DatabaseRow]) -> Table {
    let names = [
        "'name", "'host", "port", "'database", "'force_user", "pool_size", "min_pool_size", "reserve_pool_size",
        "server_lifetime", "'pool_mode", "'load_balance_hosts", "max_connections", "current_connections",
        "max_client_connections", "current_client_connections", "paused", "disabled",
    ];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.name), (&row.host).into(), row.port.into(), (&row.database).into(), Cell::Null,
        row.pool_size.into(), row.min_pool_size.into(), row.reserve_pool_size.into(), row.server_lifetime.into(),
        row.mode.into(),
        Cell::Null, 0i64.into(), row.current_connections.into(), row.max_client_connections.into(),
        row.current_client_connections.into(), i64::from(row.paused).into(), 0i64.into(),
    ]).collect())
}

#[rustfmt::skip]
fn users(rows: &[UserRow]) -> Table {
    let names = [
        "'name", "pool_size", "reserve_pool_size", "'pool_mode", "max_user_connections", "current_connections",
        "max_user_client_connections", "current_client_connections",
    ];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.name), row.pool_size.into(), row.reserve_pool_size.into(), row.mode.into(), 0i64.into(),
        row.current_connections.into(), row.max_client_connections.into(), row.current_client_connections.into(),
    ]).collect())
}

fn config(rows: &[ConfigRow]) -> Table {
    let cells = |row: &ConfigRow| {
        let changeable = if row.is_changeable { "yes" } else { "no" };
        vec![Cell::from(&row.key), (&row.value).into(), row.default.as_deref().into(), changeable.into()]
    };
    table(&["'key", "'value", "'default", "'changeable"], rows.iter().map(cells).collect())
}

#[rustfmt::skip]
fn shards(rows: &[ShardRow]) -> Table {
    let names = [
        "'database", "shard", "'name", "'primary", "'replicas", "slots", "weight", "'up", "replicas_up", "lag_ms", "epoch",
        "'state",
    ];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.database), row.shard.0.into(), (&row.name).into(), (&row.primary).into(),
        row.replicas.join(",").into(), row.slots.into(), row.weight.into(), row.is_up.into(), row.replicas_up.into(),
        row.lag_ms.into(), row.epoch.0.into(), row.state.into(),
    ]).collect())
}

fn slots(rows: &[SlotRange]) -> Table {
    let cells = |row: &SlotRange| {
        let count = if row.key.is_some() { 0 } else { i64::from(row.last) - i64::from(row.first) + 1 };
        vec![
            Cell::from(&row.database),
            row.first.into(),
            row.last.into(),
            count.into(),
            row.shard.0.into(),
            (&row.shard_name).into(),
            row.epoch.0.into(),
            row.key.as_ref().into(),
        ]
    };
    table(
        &["'database", "first_slot", "last_slot", "slots", "shard", "'name", "epoch", "'key"],
        rows.iter().map(cells).collect(),
    )
}

#[rustfmt::skip]
fn slot_load(rows: &[SlotLoadRow]) -> Table {
    let names =
        ["'database", "slot", "shard", "'name", "statements_per_min", "time_us_per_s", "share_permille"];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.database), row.slot.into(), row.shard.into(), (&row.shard_name).into(),
        row.statements_per_min.into(), row.time_us_per_s.into(), row.permille.into(),
    ]).collect())
}

#[rustfmt::skip]
fn replicas(rows: &[EndpointRow]) -> Table {
    let names = [
        "'database", "shard", "'role", "'address", "'up", "'in_recovery", "'replay_lsn", "lag_ms", "reads", "'last_error",
        "timeline", "'zone",
    ];
    table(&names, rows.iter().map(|row| vec![
        Cell::from(&row.database), row.shard.0.into(), row.role.into(), (&row.address).into(), row.is_up.into(),
        row.in_recovery.into(), row.replay_lsn.map(|lsn| lsn.to_string()).into(), row.lag_ms.into(), row.reads.into(),
        row.last_error.as_deref().into(), row.timeline.into(), row.zone.as_deref().into(),
    ]).collect())
}

fn prepared_transactions(rows: &[PreparedRow]) -> Table {
    let cells = |row: &PreparedRow| {
        vec![Cell::from(&row.database), (&row.shard).into(), (&row.gid).into(), (&row.owner).into(), row.age_ms.into()]
    };
    table(&["'database", "'shard", "'gid", "'owner", "age_ms"], rows.iter().map(cells).collect())
}

fn drift(rows: &[DriftRow]) -> Table {
    let cells = |row: &DriftRow| {
        let definition = row.definition.as_ref().map_or(Cell::Null, Cell::from);
        vec![
            Cell::from(&row.database),
            (&row.table).into(),
            (&row.kind).into(),
            (&row.name).into(),
            (&row.shard).into(),
            definition,
        ]
    };
    table(&["'database", "'table", "'kind", "'name", "'shard", "'definition"], rows.iter().map(cells).collect())
}

fn decoding(rows: &[DecodingRow]) -> Table {
    let cells = |row: &DecodingRow| {
        let counts = [row.lag_bytes, row.lag_ms, row.open, row.waiting, row.transactions, row.words, row.reconnects];
        let mut cells: Vec<Cell> = [&row.database, &row.shard].into_iter().map(Cell::from).collect();
        cells.extend([Cell::from(row.state), (&row.reason).into()]);
        cells.extend(counts.map(Cell::from));
        cells.push((&row.gaps).into());
        cells
    };
    let names = [
        "'database",
        "'shard",
        "'state",
        "'reason",
        "lag_bytes",
        "lag_ms",
        "open",
        "waiting",
        "transactions",
        "words",
        "reconnects",
        "'gaps",
    ];
    table(&names, rows.iter().map(cells).collect())
}

fn unique(rows: &[UniqueRow]) -> Table {
    let cells = |row: &UniqueRow| {
        let reason = row.reason.as_ref().map_or(Cell::Null, Cell::from);
        vec![Cell::from(&row.database), (&row.table).into(), (&row.column).into(), row.state.into(), reason]
    };
    table(&["'database", "'table", "'column", "'state", "'reason"], rows.iter().map(cells).collect())
}

fn digests(rows: &[DigestRow]) -> Table {
    let cells = |row: &DigestRow| {
        vec![
            Cell::from(&row.database),
            (&row.user).into(),
            row.reads.into(),
            row.statement.as_deref().into(),
            row.parameters.as_deref().into(),
            row.result_formats.as_str().into(),
            row.settings.as_str().into(),
        ]
    };
    table(
        &["'database", "'user", "reads", "'statement", "'parameters", "'result_formats", "'settings"],
        rows.iter().map(cells).collect(),
    )
}

fn hot_keys(rows: &[HotRow]) -> Table {
    let cells = |row: &HotRow| {
        vec![
            Cell::from(&row.database),
            (&row.table).into(),
            row.key.as_deref().into(),
            row.reads.into(),
            row.hits.into(),
            row.writes.into(),
            row.permille.into(),
            row.isolate.as_deref().into(),
        ]
    };
    table(
        &["'database", "'table", "'key", "reads", "hits", "writes", "share_permille", "'isolate"],
        rows.iter().map(cells).collect(),
    )
}

fn engine(rows: &[EngineRow]) -> Table {
    let cells = |row: &EngineRow| {
        let epoch = row.epoch.map_or(Cell::Null, |epoch| Cell::Int(epoch.0 as i64));
        let object = row.object.as_ref().map_or(Cell::Null, Cell::from);
        vec![Cell::from(&row.database), (&row.engine).into(), (&row.state).into(), epoch, object, (&row.reason).into()]
    };
    table(&["'database", "'engine", "'state", "epoch", "'object", "'reason"], rows.iter().map(cells).collect())
}

fn peers(rows: &[PeerRow]) -> Table {
    let cells = |row: &PeerRow| {
        let lease = row.lease_ms.map_or(Cell::Null, Cell::from);
        let (address, role, state) = ((&row.address).into(), row.role.into(), row.state.into());
        vec![
            Cell::from(&row.database),
            (&row.shard).into(),
            address,
            role,
            state,
            lease,
            row.writes.into(),
            row.mode.into(),
        ]
    };
    table(
        &["'database", "'shard", "'address", "'role", "'state", "lease_ms", "writes", "'mode"],
        rows.iter().map(cells).collect(),
    )
}

fn pins(rows: &[PinRow]) -> Table {
    let cells = |row: &PinRow| vec![Cell::from(&row.database), row.reason.into(), row.current.into(), row.total.into()];
    table(&["'database", "'reason", "current", "total"], rows.iter().map(cells).collect())
}
