//! What is counted comes out of /metrics under the promised names.

use super::*;
use weir_core::id::{Epoch, ShardId};
use weir_core::topology::SlotMap;

fn metrics() -> Metrics {
    let shards =
        vec![("s0".to_owned(), vec!["h:1".to_owned(), "h:2".to_owned()]), ("s1".to_owned(), vec!["h:3".to_owned()])];
    Metrics::new(&[Subject { database: "shop".to_owned(), shards }]).expect("registered")
}

/// Value of the series with this name and all these label pairs.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<String> {
    let matches = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    };
    text.lines().find(matches).and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
}

#[test]
fn what_is_counted_is_rendered() {
    let metrics = metrics();
    let (_, session) = metrics.session(&metrics.database("shop").expect("declared"));
    let (_, other) = metrics.session(&metrics.database("shop").expect("declared"));
    session.sent_to(RouteKind::Single, ShardId(1), Role::Primary);
    other.sent_to(RouteKind::Single, ShardId(1), Role::Primary);
    session.query(Duration::from_millis(3));
    session.transaction(Duration::from_millis(4));
    session.assigned(Duration::from_micros(10));
    session.read_by(ShardId(0), 1);
    session.cache(CacheResult::HitLocal);
    session.pinned("temp_table");
    session.traffic(100, 200);
    metrics.error("0A000");
    metrics.error("not a code");
    let database = metrics.database("shop").expect("declared");
    database.topology(Epoch(3), &SlotMap::single(ShardId(1)));
    database.endpoint(ShardId(0), 1).expect("a replica").probed(true, false, true, Some(Duration::from_millis(1500)));
    database.pool(ShardId(0), Role::Primary).expect("a pool").active.set(2.0);
    database.clients_waiting.set(7.0);

    metrics.shared.set((3, 2), [5, 4, 1]);
    let text = metrics.render();
    for (name, labels, expected) in [
        ("weir_queries_total", &["shard=\"s1\"", "route=\"single\"", "role=\"primary\""][..], "2"),
        ("weir_reads_total", &["endpoint=\"h:2\""], "1"),
        ("weir_cache_requests_total", &["result=\"hit_local\""], "1"),
        ("weir_cache_requests_total", &["result=\"miss_absent\""], "0"),
        ("weir_pins_total", &["reason=\"temp_table\"", "database=\"shop\""], "1"),
        ("weir_errors_total", &["sqlstate=\"0A000\""], "1"),
        ("weir_errors_total", &["sqlstate=\"other\""], "1"),
        ("weir_slots", &["shard=\"s1\""], "4096"),
        ("weir_slots", &["shard=\"s0\""], "0"),
        ("weir_topology_epoch", &[], "3"),
        ("weir_replica_lag_seconds", &["endpoint=\"h:2\""], "1.5"),
        ("weir_server_up", &["endpoint=\"h:2\""], "1"),
        ("weir_server_connections", &["shard=\"s0\"", "role=\"primary\"", "state=\"active\""], "2"),
        ("weir_client_connections", &["pool=\"shop\"", "state=\"waiting\""], "7"),
        ("weir_client_sent_bytes_total", &[], "200"),
        ("weir_transactions_total", &[], "1"),
        ("weir_query_duration_seconds_count", &[], "1"),
        ("weir_query_duration_seconds_bucket", &["le=\"0.002\""], "0"),
        ("weir_query_duration_seconds_bucket", &["le=\"0.005\""], "1"),
        ("weir_transaction_duration_seconds_count", &[], "1"),
        ("weir_pool_wait_duration_seconds_count", &[], "1"),
        ("weir_config_last_reload_success", &[], "1"),
        ("weir_redis_servers", &["state=\"down\""], "1"),
        ("weir_cache_leases_total", &["result=\"waited\""], "4"),
        ("weir_build_info", &["version="], "1"),
    ] {
        assert_eq!(value(&text, name, labels).as_deref(), Some(expected), "{name} {labels:?}\n{text}");
    }
}

#[test]
fn every_series_has_help_and_every_counter_ends_in_total() {
    let text = metrics().render();
    for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
        let mut words = line.split(' ').skip(2);
        let (name, kind) = (words.next().expect("a name"), words.next().expect("a type"));
        assert!(name.starts_with("weir_"), "{line}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no help");
    }
}

#[test]
fn labels_that_clients_choose_are_bounded() {
    let metrics = metrics();
    for number in 0..5000 {
        metrics.error(&format!("X{number:04}"));
    }
    let series = metrics.render().lines().filter(|line| line.starts_with("weir_errors_total{")).count();
    assert!(series <= 129, "{series}");
}

#[test]
fn averages_are_of_the_last_period() {
    let metrics = metrics();
    let (_, session) = metrics.session(&metrics.database("shop").expect("declared"));
    for _ in 0..100 {
        session.query(Duration::from_millis(2));
    }
    metrics.tick(Duration::from_secs(10));
    let database = metrics.database("shop").expect("declared");
    let averages = database.averages();
    assert_eq!((averages.queries, averages.query_us), (10, 2000));
    assert_eq!(database.totals().queries, 100);
    metrics.tick(Duration::from_secs(10));
    assert_eq!(database.averages().queries, 0);
}

#[test]
fn stripes_add_up() {
    let counter = std::sync::Arc::new(Striped::default());
    let threads: Vec<_> = (0..20)
        .map(|session| {
            let counter = counter.clone();
            std::thread::spawn(move || (0..1000).for_each(|_| counter.add(Stripe::of(session), 1)))
        })
        .collect();
    for thread in threads {
        thread.join().expect("counted");
    }
    assert_eq!(counter.value(), 20_000);
}
