//! What the cache and the count of hot keys say of a database.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;

use weir_core::admin::{DigestRow, HotRow};
use weir_core::cache::CacheKey;
use weir_core::fresh::TableHash;
use weir_core::hot::Hot;

use crate::database::Database;

pub(super) fn cache(db: &Database) -> Vec<(String, i64)> {
    let name = |figure: &str| format!("{}.{figure}", db.name);
    let company = db.shards.iter().filter(|shard| shard.clock.sole().has_company()).count();
    let Some(cache) = &db.cache else { return vec![(name("enabled"), 0), (name("another_weir"), company as i64)] };
    let counters = cache.counters();
    let (entries, bytes) = cache.local_size();
    let [leases, lease_waits, lease_timeouts] = cache.leases();
    let (redis_servers, redis_servers_up) = cache.redis_servers().unwrap_or_default();
    let sum = |counts: &[std::sync::atomic::AtomicU64]| counts.iter().map(|count| count.load(Relaxed)).sum::<u64>();
    [
        ("enabled", 1),
        ("another_weir", company as u64),
        ("entries", entries as u64),
        ("bytes", bytes),
        ("hits_memory", counters.hits_l1.load(Relaxed)),
        ("hits_redis", counters.hits_l2.load(Relaxed)),
        ("misses_memory", sum(&counters.misses_l1)),
        ("misses_redis", sum(&counters.misses_l2)),
        ("stored", counters.stored.load(Relaxed)),
        ("not_stored", counters.not_stored.load(Relaxed)),
        ("leases", leases),
        ("lease_waits", lease_waits),
        ("lease_timeouts", lease_timeouts),
        ("redis_errors", counters.redis_errors.load(Relaxed)),
        ("redis_dropped", counters.redis_dropped.load(Relaxed)),
        ("redis_compressed", counters.redis_compressed.load(Relaxed)),
        ("redis_bytes_spared", counters.redis_bytes_spared.load(Relaxed)),
        ("redis_servers", redis_servers as u64),
        ("redis_servers_up", redis_servers_up as u64),
        ("redis_up", u64::from(cache.redis_up() == Some(true))),
        ("replica_answers_rejected", db.stats.replica_rejected.load(Relaxed)),
    ]
    .into_iter()
    .map(|(figure, value)| (name(figure), value as i64))
    .chain(db.stats.database.cache_figures().into_iter().map(|(figure, value)| (name(&figure), value as i64)))
    .collect()
}

/// Reads by what their answers are kept under. Statements and parameters hold values, which not everybody may see.
pub(super) fn digests(db: &Database, sees_keys: bool) -> Vec<DigestRow> {
    const SHOWN: usize = 500;
    let row = |read: Hot<u128, CacheKey>| {
        let parts = read.text?.read()?;
        let parameter = |(oid, binary, value): (u32, bool, Option<Vec<u8>>)| serde_json::json!({ "type": oid, "binary": binary, "value": value.as_deref().map(hex) });
        let parameters: Vec<_> = parts.params.into_iter().map(parameter).collect();
        Some(DigestRow {
            database: db.name.to_string(),
            user: parts.role,
            reads: read.reads,
            statement: Some(parts.statement).filter(|_| sees_keys),
            parameters: Some(serde_json::json!(parameters).to_string()).filter(|_| sees_keys),
            result_formats: serde_json::json!(parts.result_formats).to_string(),
            settings: serde_json::json!(parts.settings).to_string(),
        })
    };
    db.stats.digests.most_asked(SHOWN).into_iter().filter_map(row).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Keys by their hashes, for those who may not see values.
pub(super) fn hot_keys(db: &Database, sees_keys: bool) -> Vec<HotRow> {
    const SHOWN: usize = 50;
    let (hottest, total) = db.stats.hot.hottest(SHOWN);
    let view = db.view();
    let relations =
        view.catalog.relations.iter().flat_map(|(schema, names)| names.keys().map(move |name| (schema, name)));
    let names: BTreeMap<u64, String> =
        relations.map(|(schema, name)| (TableHash::of(schema, name).0, format!("{schema}.{name}"))).collect();
    let row = |hot: Hot| HotRow {
        database: db.name.to_string(),
        table: names.get(&hot.subject.table.0).cloned().unwrap_or_else(|| format!("#{:016x}", hot.subject.table.0)),
        key: hot
            .subject
            .key
            .map(|key| hot.text.filter(|_| sees_keys).map_or_else(|| format!("#{:016x}", key.0), String::from)),
        reads: hot.reads,
        hits: hot.hits,
        writes: hot.writes,
        permille: (hot.count - hot.error) * 1000 / total.max(1),
    };
    hottest.into_iter().map(row).collect()
}
