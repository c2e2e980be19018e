//! What the cache and the count of hot keys say of a database.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use weir_core::admin::{DigestRow, HotRow, SlotLoadRow};
use weir_core::cache::CacheKey;
use weir_core::fresh::TableHash;
use weir_core::hot::Hot;
use weir_core::id::Slot;
use weir_core::reshard::load::Cost;
use weir_core::sql::word::{quote_literal, quote_name};
use weir_core::topology::{Key, Placement};

use crate::database::{Database, View};

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
        isolate: None,
    };
    let mut rows: Vec<HotRow> = hottest.into_iter().map(row).collect();
    for row in rows.iter_mut().filter(|_| sees_keys && !view.topology.is_single()) {
        row.isolate = isolating(&view, row);
    }
    rows
}

/// The command that gives a key a shard to itself, where its share of all uses is at least half of what a shard has of them.
fn isolating(view: &View, row: &HotRow) -> Option<String> {
    let shards = view.topology.active().len() as u64;
    let (schema, table) = row.table.split_once('.')?;
    let Placement::Sharded { key_type, .. } = view.rules.placement(schema, table) else { return None };
    let text = row.key.as_deref().filter(|text| row.permille * shards >= 500 && !text.starts_with('#'))?;
    // A literal has its quotes on. What has been cut off is nobody's key.
    let inner = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\'')).unwrap_or(text);
    if inner.contains(['\'', '\\']) || inner.len() >= crate::hot::TEXT_BYTES_MAX {
        return None;
    }
    let key = Key::parse(inner.as_bytes().into(), *key_type)?;
    if view.topology.slots.isolated().iter().any(|isolated| isolated.hash == key.hash()) {
        return None;
    }
    let owner = view.topology.shard_of(&key);
    let to = view.topology.active().iter().rev().find(|shard| **shard != owner)?;
    let to = quote_name(&view.topology.name_of(*to));
    Some(format!("RESHARD START ISOLATE KEY {} TYPE {} TO {}", quote_literal(inner), key_type.name(), to))
}

/// The slots whose statements take most of the time.
pub(super) fn slot_load(db: &Database) -> Vec<SlotLoadRow> {
    const SHOWN: usize = 50;
    let rates = db.stats.load.rates(Instant::now());
    let total = rates.total().time_us.max(f64::MIN_POSITIVE);
    let view = db.view();
    let row = |(slot, cost): (Slot, Cost)| {
        let owner = view.topology.slots.owner(slot);
        SlotLoadRow {
            database: db.name.to_string(),
            slot: slot.index() as u16,
            shard: owner.0,
            shard_name: view.topology.name_of(owner),
            statements_per_min: (cost.statements * 60.0).round() as u64,
            time_us_per_s: cost.time_us.round() as u64,
            permille: (cost.time_us / total * 1000.0).round() as u64,
        }
    };
    rates.costliest(SHOWN).into_iter().map(row).collect()
}
