//! What can be said of the hub without a server: first placement, and config against hub.

use super::*;
use crate::config::{Endpoint, ShardConfig};

fn shard(name: &str, weight: u32) -> ShardConfig {
    ShardConfig { name: name.into(), primary: Endpoint { host: name.into(), port: 5432 }, replicas: Vec::new(), weight }
}

fn database(shards: Vec<ShardConfig>) -> DatabaseConfig {
    DatabaseConfig {
        name: "shop".into(),
        server_database: "shop".into(),
        shards,
        tables: Vec::new(),
        home: ShardId(0),
        replica_wait_max: None,
        overrides: crate::config::Overrides::default(),
    }
}

fn known(name: &str, slots: i64) -> KnownShard {
    KnownShard { name: name.into(), slots }
}

#[test]
fn slots_are_placed_by_weight() {
    let counts = |weights: &[u32]| {
        let shards: Vec<ShardConfig> =
            weights.iter().enumerate().map(|(i, weight)| shard(&format!("s{i}"), *weight)).collect();
        let count = shards.len();
        propose(&database(shards)).expect("placed").counts(count)
    };
    assert_eq!(counts(&[1]), [4096]);
    assert_eq!(counts(&[1, 1]), [2048, 2048]);
    for (count, weight) in counts(&[1, 2, 4]).into_iter().zip([1.0, 2.0, 4.0]) {
        assert!((count as f64 - 4096.0 * weight / 7.0).abs() < 2.0, "{count}");
    }
}

#[test]
fn one_shard_needs_no_hub() {
    let topology = without_hub(&database(vec![shard("only", 1)]));
    assert!(topology.is_single());
    assert_eq!(topology.slots.counts(1), [4096]);
}

#[test]
fn config_and_hub_must_name_the_same_shards() {
    let two = database(vec![shard("a", 1), shard("b", 1)]);
    assert!(compare(&two, &[known("b", 2048), known("a", 2048)]).is_ok());
    assert!(compare(&two, &[known("a", 2048), known("b", 2048), known("emptied", 0)]).is_ok());
    let unknown = compare(&two, &[known("a", 4096)]).expect_err("b is new").to_string();
    assert!(unknown.contains("shard(s) b which the hub does not know"), "{unknown}");
    let missing =
        compare(&two, &[known("a", 1), known("b", 1), known("c", 4094)]).expect_err("c owns slots").to_string();
    assert!(missing.contains("shard(s) c that own slots"), "{missing}");
}
