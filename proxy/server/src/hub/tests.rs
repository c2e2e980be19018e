//! What can be said of the hub without a server: first placement, and config against hub.

use weir_core::id::Slot;
use weir_core::reshard::phase::Phase;
use weir_core::topology::ShardState;

use super::shards::{Change, KnownShard, changes, map};
use super::*;
use crate::back::tls::ServerTls;
use crate::config::{Endpoint, Secret, ShardConfig};

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
    let topology = without_hub(&database(vec![shard("only", 1)])).topology;
    assert!(topology.is_single());
    assert_eq!(topology.slots.counts(1), [4096]);
}

/// A shard that the hub knows, with a server of its own and every slot from `first` to before `end`.
fn known(name: &str, state: ShardState, (first, end): (u16, u16)) -> KnownShard {
    let slots = (first..end).filter_map(Slot::new).collect();
    let servers = vec![Endpoint { host: name.into(), port: 5432 }];
    KnownShard { name: name.into(), weight: 1, servers, state, slots, keys: Vec::new() }
}

#[test]
fn the_hub_says_which_shards_there_are_and_in_which_order() {
    use ShardState::{Active, Joining, Retired};
    let known = vec![
        known("gone", Retired, (0, 0)),
        known("b", Active, (0, 4000)),
        known("added", Active, (4000, 4096)),
        known("a", Joining, (0, 0)),
    ];
    // The file names them in another order, and one elsewhere; what it does not name is taken from the hub.
    let mut file = database(vec![shard("a", 1), shard("b", 3)]);
    file.home = ShardId(1);
    file.shards[1].primary.port = 6000;
    assert!(matches!(&changes(&file, &known).expect("fits")[..], [Change::Address(ShardId(1), _)]));
    let HubMap { topology, shards } = map(&file, Epoch(7), known.clone(), Moves::default()).expect("complete");
    let names: Vec<&str> = shards.iter().map(|shard| shard.name.as_str()).collect();
    assert_eq!(names, ["gone", "b", "added", "a"]);
    assert_eq!((shards[1].primary.port, shards[2].primary.to_string()), (6000, "added:5432".to_owned()));
    assert_eq!((topology.home, topology.active()), (ShardId(1), &[ShardId(1), ShardId(2)][..]));
    assert_eq!(topology.slots.counts(4), [0, 4000, 96, 0]);
    // A shard that joins or has left owns nothing, and home takes part.
    let mut wrong = known.clone();
    wrong[2].state = Joining;
    assert!(
        map(&file, Epoch(7), wrong, Moves::default())
            .expect_err("owns slots")
            .to_string()
            .contains("added is joining and owns")
    );
    file.home = ShardId(0);
    assert!(map(&file, Epoch(7), known, Moves::default()).expect_err("joining").to_string().contains("home shard a"));
}

#[test]
fn a_shard_that_only_the_configuration_knows_joins() {
    let two = database(vec![shard("b", 1), shard("a", 1)]);
    let all = || known("a", ShardState::Active, (0, 4096));
    let changes = changes(&two, &[all()]).expect("room");
    assert!(matches!(&changes[..], [Change::Joins(shard)] if shard.name == "b"), "{changes:?}");
    // An earlier weir has written no addresses: what owns nothing is forgotten, what owns something must be named.
    let nowhere = |slots| KnownShard { servers: Vec::new(), ..known("c", ShardState::Active, slots) };
    assert_eq!(shards::changes(&two, &[all(), nowhere((0, 0))]).expect("room")[0], Change::Forgotten(ShardId(1)));
    let found = vec![known("a", ShardState::Active, (0, 4095)), nowhere((4095, 4096))];
    let mut one = database(vec![shard("a", 1)]);
    one.home = ShardId(0);
    assert!(map(&one, Epoch(1), found, Moves::default()).expect_err("where?").to_string().contains("where shard c is"));
    let many: Vec<KnownShard> =
        (0..SHARDS_MAX).map(|number| known(&number.to_string(), ShardState::Retired, (0, 0))).collect();
    assert!(shards::changes(&two, &many).is_err());
}

/// What the hub says of the shards: name, state, slots.
fn said(map: &HubMap) -> Vec<String> {
    let slots = map.topology.slots.counts(map.shards.len());
    let states = (0..map.shards.len()).map(|id| map.topology.roster.state(ShardId(id as u16)).map(ShardState::as_str));
    let rows = map.shards.iter().zip(states).zip(slots);
    rows.map(|((shard, state), slots)| format!("{} {} {slots}", shard.primary, state.unwrap_or("-"))).collect()
}

#[tokio::test]
async fn a_hub_of_version_1_is_brought_up_to_date_and_shards_come_and_go() {
    let run = weir_local::Run::temporary("hubtest").expect("a run");
    let spec = weir_local::ClusterSpec::new("hub", "secret").database("weir_hub", "weir", "weir");
    let server = weir_local::Cluster::start(&run, spec).await.expect("a server");
    let direct = server.admin("weir_hub").await.expect("connects");
    let old = "INSERT INTO weir.topology VALUES ('shop', 7);
        INSERT INTO weir.shard VALUES ('shop', 0, 'b', 1), ('shop', 1, 'a', 1), ('shop', 2, 'emptied', 1);
        INSERT INTO weir.slot SELECT 'shop', slot, slot % 2, 1 FROM generate_series(0, 4095) slot;";
    direct.batch_execute(&format!("{}{old}", schema::TABLES)).await.expect("as version 1 made it");
    let config = HubConfig {
        dsn: Secret::new(server.admin_dsn("weir_hub")),
        password: None,
        tls: ServerTls::default(),
        replicas: Vec::new(),
        made_from: None,
    };
    let hub = Hub::connect(&config).await.expect("brought up to date");
    Hub::connect(&config).await.expect("and left so");
    let mut file = database(vec![shard("a", 1), shard("b", 1)]);
    file.home = ShardId(1);
    let map = hub.load_or_propose(&file).await.expect("a map");
    assert_eq!(said(&map), ["b:5432 active 2048", "a:5432 active 2048", "emptied:5432 retired 0"]);
    assert_eq!((map.topology.home, map.topology.epoch), (ShardId(0), Epoch(8)), "the emptied one has left");
    // One more in the file, and one by the mover; again changes nothing.
    file.shards.insert(0, shard("c", 2));
    file.home = ShardId(2);
    let added = ShardConfig { replicas: vec![Endpoint { host: "d2".into(), port: 1 }], ..shard("d", 1) };
    for _ in 0..2 {
        hub.load_or_propose(&file).await.expect("a map");
        assert_eq!(hub.add_shard("shop", &added).await.expect("room"), ShardId(4));
    }
    let map = hub.read(&file).await.expect("a map");
    assert_eq!(said(&map)[3..], ["c:5432 joining 0", "d:5432 joining 0"]);
    assert_eq!((map.shards[4].replicas.len(), map.shards[3].weight, map.topology.epoch), (1, 2, Epoch(10)));
    for (shard, wrong) in [("b", "cannot join"), ("emptied", "is retired and cannot join")] {
        let error = hub.add_shard("shop", &self::shard(shard, 1)).await.expect_err(wrong).to_string();
        assert!(error.contains(wrong), "{error}");
    }
    assert!(hub.activate("shop", "nobody").await.is_err() && hub.activate("shop", "emptied").await.is_err());
    hub.activate("shop", "d").await.expect("takes part");
    hub.activate("shop", "d").await.expect("as before");
    // Who has given up what it owned leaves with the last move, in the same step; home stays.
    let driving = hub.drive("shop", "b").await.expect("the hub").expect("nobody else");
    let moves = "INSERT INTO weir.move (database, source, target, slots, phase, aim) \
                 SELECT 'shop', s, 1, '0-9', 'clear_source', 'moved' FROM unnest(ARRAY[4, 4, 4, 0]) s";
    direct.batch_execute(moves).await.expect("moves");
    let steps = [
        (4, 10, "d:5432 active 10"),
        (1, 10, "d:5432 active 0"),
        (1, 10, "d:5432 retired 0"),
        (1, 4096, "b:5432 active 0"),
    ];
    for (owner, end, wanted) in steps {
        direct.batch_execute(&format!("UPDATE weir.slot SET shard = {owner} WHERE slot < {end}")).await.expect("owned");
        let row = driving.moves().await.expect("moves").into_iter().find(|row| !row.phase.is_final()).expect("open");
        driving.step(&row, Phase::Done, None).await.expect("done");
        assert!(said(&hub.read(&file).await.expect("a map")).iter().any(|shard| shard == wanted), "{wanted}");
    }
    let map = hub.read(&file).await.expect("a map");
    assert_eq!((said(&map)[4].as_str(), map.topology.epoch), ("d:5432 retired 0", Epoch(16)));
    assert_eq!(map.topology.active(), [ShardId(0), ShardId(1)]);
}
