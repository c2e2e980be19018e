//! Golden column names, the grammar, and what the source is asked for.

use super::command::parse;
use super::*;
use crate::error::sqlstate;
use crate::id::{Epoch, ShardId};
use crate::topology::SlotMap;

/// One row everywhere.
struct Fake;

impl AdminSource for Fake {
    fn snapshot(&self, _: Show) -> Snapshot {
        let counts = StatCounts { transactions: 5, query_us: 9, ..StatCounts::default() };
        let stat = StatRow { database: "shop".into(), totals: counts, averages: counts };
        let socket = SocketRow { user: "u".into(), state: "active", link: Some(7), ..SocketRow::default() };
        let names: Vec<Box<str>> = vec!["a".into(), "b".into()];
        let mut owners = vec![ShardId(0); 4096];
        owners[10..=20].fill(ShardId(1));
        let map = SlotMap::new(owners).expect("all slots");
        Snapshot {
            pools: vec![PoolRow { database: "shop".into(), wait_us_max: 2_000_003, ..PoolRow::default() }],
            stats: vec![stat.clone(), stat],
            sockets: vec![socket.clone(), SocketRow { is_server: true, ..socket }],
            databases: vec![DatabaseRow::default()],
            users: vec![UserRow::default()],
            shards: vec![ShardRow {
                database: "shop".into(),
                shard: ShardId(1),
                name: "b".into(),
                state: "active",
                primary: "h:1".into(),
                replicas: vec!["h:2".into(), "h:3".into()],
                slots: 11,
                weight: 1,
                epoch: Epoch(4),
                is_up: true,
                replicas_up: 2,
                lag_ms: None,
            }],
            slot_load: vec![SlotLoadRow { database: "shop".into(), slot: 7, ..SlotLoadRow::default() }],
            slots: slot_ranges("shop", (Epoch(4), &map), &names, true),
            endpoints: vec![EndpointRow {
                database: "shop".into(),
                shard: ShardId(0),
                role: "replica",
                address: "h:2".into(),
                is_up: true,
                in_recovery: true,
                timeline: Some(1),
                replay_lsn: Some(crate::id::Lsn(0x10)),
                lag_ms: Some(3),
                reads: 0,
                last_error: None,
                zone: None,
            }],
            pins: vec![PinRow { database: "shop".into(), reason: "temp_table", current: 1, total: 2 }],
            moves: vec![MovesRow { database: "shop".into(), phase: "copy", ..MovesRow::default() }],
            peers: vec![PeerRow { database: "shop".into(), role: "self", lease_ms: Some(700), ..PeerRow::default() }],
            engine: vec![EngineRow { database: "shop".into(), state: "ready".into(), ..EngineRow::default() }],
            prepared: vec![PreparedRow { database: "shop".into(), shard: "s0".into(), ..PreparedRow::default() }],
            cache: vec![("hits".into(), 3)],
            lists: vec![("databases".into(), 1)],
            state: vec![("active".into(), "yes".into())],
            digests: vec![DigestRow { database: "shop".into(), reads: 16, ..DigestRow::default() }],
            hot: vec![HotRow {
                database: "shop".into(),
                table: "public.users".into(),
                key: Some("7".into()),
                ..HotRow::default()
            }],
            unique: vec![UniqueRow { database: "shop".into(), state: "valid", ..UniqueRow::default() }],
            decoding: vec![DecodingRow { database: "shop".into(), state: "up", ..DecodingRow::default() }],
            drift: vec![DriftRow { database: "shop".into(), definition: None, ..DriftRow::default() }],
            config: vec![ConfigRow { key: "listen".into(), ..ConfigRow::default() }],
            version: "weir 1".into(),
        }
    }

    fn route(&self, database: Option<&str>, sql: &str) -> Result<Vec<(String, String)>, crate::error::UserError> {
        Ok(vec![("database".into(), database.unwrap_or("-").into()), ("sql".into(), sql.into())])
    }
}

fn run(text: &str) -> Table {
    answer(&parse(text).expect("parses"), &Fake).expect("answers")
}

fn names(table: &Table) -> String {
    table.columns.iter().map(|column| column.name).collect::<Vec<_>>().join(", ")
}

#[test]
fn columns_are_those_of_pgbouncer() {
    let sockets = "type, user, database, replication, state, addr, port, local_addr, local_port, connect_time, request_time, \
                   wait, wait_us, close_needed, ptr, link, remote_pid, tls, application_name, prepared_statements, id";
    let golden = [
        (
            "pools",
            "database, user, cl_active, cl_waiting, cl_active_cancel_req, cl_waiting_cancel_req, sv_active, sv_active_cancel, sv_being_canceled, sv_idle, sv_used, sv_tested, sv_login, maxwait, maxwait_us, pool_mode, load_balance_hosts",
        ),
        (
            "stats",
            "database, total_server_assignment_count, total_xact_count, total_query_count, total_received, total_sent, total_xact_time, total_query_time, total_wait_time, total_client_parse_count, total_server_parse_count, total_bind_count, total_client_login_count, avg_server_assignment_count, avg_xact_count, avg_query_count, avg_recv, avg_sent, avg_xact_time, avg_query_time, avg_wait_time, avg_client_parse_count, avg_server_parse_count, avg_bind_count, avg_client_login_count",
        ),
        (
            "stats_totals",
            "database, server_assignment_count, xact_count, query_count, bytes_received, bytes_sent, xact_time, query_time, wait_time, client_parse_count, server_parse_count, bind_count, client_login_count",
        ),
        (
            "stats_averages",
            "database, server_assignment_count, xact_count, query_count, bytes_received, bytes_sent, xact_time, query_time, wait_time, avg_client_parse_count, avg_server_parse_count, avg_bind_count, avg_client_login_count",
        ),
        ("totals", "name, value"),
        (
            "databases",
            "name, host, port, database, force_user, pool_size, min_pool_size, reserve_pool_size, server_lifetime, pool_mode, load_balance_hosts, max_connections, current_connections, max_client_connections, current_client_connections, paused, disabled",
        ),
        (
            "users",
            "name, pool_size, reserve_pool_size, pool_mode, max_user_connections, current_connections, max_user_client_connections, current_client_connections",
        ),
        ("lists", "list, items"),
        ("state", "key, value"),
        ("config", "key, value, default, changeable"),
        ("version", "version"),
        ("clients", &format!("{sockets}, pool_mode")),
        ("servers", sockets),
        ("shards", "database, shard, name, primary, replicas, slots, weight, up, replicas_up, lag_ms, epoch, state"),
        ("hot keys", "database, table, key, reads, hits, writes, share_permille, isolate"),
        ("slot load", "database, slot, shard, name, statements_per_min, time_us_per_s, share_permille"),
        ("slots", "database, first_slot, last_slot, slots, shard, name, epoch, key"),
    ];
    for (show, expected) in golden {
        assert_eq!(names(&run(&format!("SHOW {show}"))), expected, "{show}");
    }
}

#[test]
fn every_table_is_rectangular_and_typed() {
    for show in Show::ALL {
        let table = run(&format!("show  {} ;", show.name().to_lowercase()));
        assert!(!table.rows.is_empty(), "{show:?}");
        for row in &table.rows {
            assert_eq!(row.len(), table.columns.len(), "{show:?}");
            for (cell, column) in row.iter().zip(&table.columns) {
                let fits = matches!(
                    (cell, column.kind),
                    (Cell::Null, _) | (Cell::Text(_), Kind::Text) | (Cell::Int(_), Kind::Int8)
                );
                assert!(fits, "{show:?}.{}: {cell:?}", column.name);
            }
        }
    }
}

#[test]
fn values_land_in_their_columns() {
    let value = |table: &Table, name: &str| {
        let index = table.columns.iter().position(|column| column.name == name).expect("a column");
        table.rows[0][index].clone()
    };
    let pools = run("SHOW POOLS");
    assert_eq!((value(&pools, "maxwait"), value(&pools, "maxwait_us")), (Cell::Int(2), Cell::Int(3)));
    assert_eq!(value(&run("SHOW STATS"), "total_query_time"), Cell::Int(9));
    assert_eq!(value(&run("SHOW SHARDS"), "replicas"), Cell::from("h:2,h:3"));
    assert_eq!(value(&run("SHOW CLIENTS"), "type"), Cell::from("C"));
    assert_eq!(value(&run("SHOW SERVERS"), "link"), Cell::from("0x7"));
    let totals = run("SHOW TOTALS");
    let of = |name: &str| totals.rows.iter().find(|row| row[0] == Cell::from(name)).expect("a row")[1].clone();
    assert_eq!(of("total_xact_count"), Cell::Int(10));
    assert_eq!(of("avg_query_time"), Cell::Int(9), "a mean time is not a sum");
}

#[test]
fn slots_are_shown_as_ranges_that_cover_everything() {
    let table = run("SHOW SLOTS");
    let bounds: Vec<_> = table.rows.iter().map(|row| (row[1].clone(), row[2].clone(), row[5].clone())).collect();
    assert_eq!(
        bounds,
        [
            (Cell::Int(0), Cell::Int(9), Cell::from("a")),
            (Cell::Int(10), Cell::Int(20), Cell::from("b")),
            (Cell::Int(21), Cell::Int(4095), Cell::from("a")),
        ]
    );
}

#[test]
fn route_takes_quoted_statements() {
    let route =
        |database: Option<&str>, sql: &str| Command::Route { database: database.map(Into::into), sql: sql.into() };
    for (text, expected) in [
        ("ROUTE 'SELECT 1'", route(None, "SELECT 1")),
        ("route'SELECT 1';", route(None, "SELECT 1")),
        ("Route shop 'SELECT ''a;b'''", route(Some("shop"), "SELECT 'a;b'")),
        ("ROUTE \"my shop\" 'SELECT 1'", route(Some("my shop"), "SELECT 1")),
        ("ROUTE $$SELECT '1'$$", route(None, "SELECT '1'")),
        ("ROUTE shop $q$SELECT $$x$$$q$ ;", route(Some("shop"), "SELECT $$x$$")),
    ] {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
    for bad in [
        "ROUTE",
        "ROUTE shop",
        "ROUTE SELECT 1",
        "ROUTE 'SELECT 1",
        "ROUTE '' ",
        "ROUTE 'a' 'b'",
        "ROUTE $$x",
        "ROUTE é$",
    ] {
        let error = parse(bad).expect_err(bad);
        assert_eq!(error.sqlstate, sqlstate::SYNTAX_ERROR, "{bad}");
        assert!(error.hint.is_some(), "{bad}");
    }
    let table = run("ROUTE shop 'SELECT 1'");
    assert_eq!(table.rows[1], [Cell::from("sql"), Cell::from("SELECT 1")]);
}

#[test]
fn what_drivers_send_is_tolerated() {
    for (text, tag) in [
        ("SET extra_float_digits = 3", "SET"),
        ("begin", "BEGIN"),
        ("COMMIT;", "COMMIT"),
        ("ROLLBACK", "ROLLBACK"),
        ("DISCARD ALL", "DISCARD ALL"),
        ("", ""),
        (" ; ", ""),
        ("select 1", "SELECT 1"),
        ("SELECT version();", "SELECT 1"),
        ("show transaction isolation level", "SELECT 1"),
    ] {
        assert_eq!(run(text).tag, tag, "{text}");
    }
    assert_eq!(run("SELECT 1").rows, [[Cell::Int(1)]]);
}

#[test]
fn an_unknown_command_lists_what_there_is() {
    for bad in ["SHOW POLLS", "SELECT * FROM users", "DROP TABLE users", "RELOAD now", "SHOW", "\u{1F980}"] {
        let error = parse(bad).expect_err(bad);
        assert_eq!(error.sqlstate, sqlstate::SYNTAX_ERROR);
        let detail = error.detail.expect("a list");
        assert!(Show::ALL.iter().all(|show| detail.contains(show.name())), "{detail}");
        assert!(error.hint.expect("a hint").contains("SHOW HELP"));
    }
    let long = format!("INSERT INTO cards VALUES ('{}')", "4".repeat(500));
    assert!(parse(&long).expect_err("unknown").message.len() < 120);
}

#[test]
fn commands_that_act_name_their_database() {
    let act = |text: &str| match command::parse(text) {
        Ok(Command::Act(act)) => Some(act),
        _ => None,
    };
    assert_eq!(act("reload;"), Some(Act::Reload));
    assert_eq!(act("PAUSE"), Some(Act::Pause(None)));
    assert_eq!(act("pause Shop ;"), Some(Act::Pause(Some("Shop".into()))));
    assert_eq!(act("RESUME \"my shop\""), Some(Act::Resume(Some("my shop".into()))));
    assert_eq!(act("KILL shop"), Some(Act::Kill("shop".into())));
    assert_eq!(act("KILL_CLIENT 12"), Some(Act::KillClient(12)));
    for wrong in ["KILL", "KILL_CLIENT shop", "PAUSE one two", "RECONNECT \"a\" b"] {
        assert_eq!(act(wrong), None, "{wrong}");
    }
    let tag = answer(&Command::Act(Act::Reconnect(None)), &Fake).map(|table| table.tag);
    assert_eq!(tag.ok(), Some("RECONNECT"));
}
