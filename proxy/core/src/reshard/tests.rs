//! Drafts as data: what moves, and that nothing else does.

use proptest::prelude::*;

use super::*;
use crate::topology::Placement;

fn shards(weights: &[u32]) -> Vec<Weighed> {
    let weighed = |(index, weight): (usize, &u32)| Weighed { name: format!("shard{index}").into(), weight: *weight };
    weights.iter().enumerate().map(weighed).collect()
}

fn add(shard: &str) -> Goal {
    Goal::Add { shard: shard.into(), address: "db:5432".into(), weight: 1 }
}

fn levelled_map(weights: &[u32]) -> SlotMap {
    let all = shards(weights);
    let ring: Vec<_> = all.iter().map(|shard| RingShard { name: &shard.name, weight: shard.weight }).collect();
    propose(&ring, None).expect("weights")
}

/// The map after all steps.
fn after(steps: &[Step], names: &[&str], slots: &SlotMap) -> SlotMap {
    let mut map = slots.clone();
    for step in steps {
        let number = |name: &str| ShardId(names.iter().position(|known| *known == name).expect(name) as u16);
        for hash in step.keys.slots().iter().map(|slot| (slot.index() as u64) << 52).chain(step.keys.beside()) {
            assert_eq!(map.owner_of(hash), number(&step.from), "a step takes from who has it");
        }
        map = map.giving(&step.keys, number(&step.to));
    }
    map
}

fn drafted(goal: &Goal, shards: &[Weighed], slots: &SlotMap) -> Result<Vec<Step>, UserError> {
    draft(goal, Today { shards, slots, rules: &rules() })
}

fn rules() -> TableRules {
    let mut rules = TableRules::default();
    rules.insert("public", "users", Placement::Sharded { key: "id".into(), key_type: KeyType::Int });
    rules
}

#[test]
fn the_fourth_of_four_shards_takes_a_quarter_and_nothing_else_moves() {
    let map = levelled_map(&[1, 1, 1]);
    let steps = drafted(&add("shard3"), &shards(&[1, 1, 1]), &map).expect("a draft");
    assert!(steps.iter().all(|step| &*step.to == "shard3"));
    let moved: usize = steps.iter().map(|step| step.keys.slots().len()).sum();
    assert_eq!(moved, Slot::COUNT / 4);
    let map = after(&steps, &["shard0", "shard1", "shard2", "shard3"], &map);
    assert_eq!(map.counts(4), [1024; 4]);
}

#[test]
fn a_shard_that_goes_gives_up_all_it_has() {
    let map = levelled_map(&[1, 1, 2]);
    let steps = drafted(&Goal::Remove { shard: "shard2".into() }, &shards(&[1, 1, 2]), &map).expect("a draft");
    assert!(steps.iter().all(|step| &*step.from == "shard2"));
    assert_eq!(after(&steps, &["shard0", "shard1", "shard2"], &map).counts(3), [2048, 2048, 0]);
}

#[test]
fn given_slots_move_from_wherever_they_are() {
    let map = levelled_map(&[1, 1]);
    let wanted = SlotSet::parse("0-99").expect("a set");
    let there = wanted.iter().filter(|slot| map.owner(*slot) == ShardId(1)).count();
    let goal = Goal::Move { slots: wanted.clone(), to: "shard1".into() };
    let steps = drafted(&goal, &shards(&[1, 1]), &map).expect("a draft");
    assert_eq!(steps.iter().map(|step| step.keys.slots().len()).sum::<usize>(), 100 - there);
    let map = after(&steps, &["shard0", "shard1"], &map);
    assert!(wanted.iter().all(|slot| map.owner(slot) == ShardId(1)));
    assert_eq!(drafted(&goal, &shards(&[1, 1]), &map).expect_err("nothing is left").sqlstate, "22023");
}

#[test]
fn one_key_moves_and_nothing_else() {
    let map = levelled_map(&[1, 1]);
    let all = shards(&[1, 1]);
    let key = |text: &str| NamedKey { text: text.into(), key_type: None };
    let hash = key("42").hash(&rules()).expect("a key");
    let [here, there] = if map.owner_of(hash) == ShardId(0) { ["shard0", "shard1"] } else { ["shard1", "shard0"] };
    let isolate = |to: &str| Goal::Isolate { key: key("42"), to: to.into(), address: None };
    let steps = drafted(&isolate(there), &all, &map).expect("a draft");
    let expected = Step { from: here.into(), to: there.into(), keys: KeySet::single(hash) };
    assert_eq!(steps, [expected]);
    let isolated = after(&steps, &["shard0", "shard1"], &map);
    assert_ne!(isolated.owner_of(hash), map.owner_of(hash));
    assert_eq!(isolated.owners(), map.owners());
    // Its slot goes without it.
    let slot = Slot::of_hash(hash);
    let with_slot = Goal::Move { slots: [slot].into_iter().collect(), to: there.into() };
    let steps = drafted(&with_slot, &all, &isolated).expect("a draft");
    assert!(!steps[0].keys.contains(hash) && steps[0].keys.contains(hash ^ 1));
    // It goes back, by itself or with the shard it was given to.
    for goal in [Goal::Release { key: key("42") }, Goal::Remove { shard: there.into() }] {
        let steps = drafted(&goal, &all, &isolated).expect("a draft");
        assert!(steps.iter().all(|step| *step.from == *there && *step.to == *here));
        assert!(steps.iter().any(|step| step.keys.contains(hash)));
    }
    // A new shard for it alone.
    let alone = Goal::Isolate { key: key("42"), to: "star".into(), address: Some("db9:5432".into()) };
    assert_eq!(drafted(&alone, &all, &map).expect("a draft")[0].keys, KeySet::single(hash));
    for (goal, code) in [
        (isolate(here), "22023"),
        (isolate("star"), "42704"),
        (Goal::Release { key: key("43") }, "42704"),
        (Goal::Isolate { key: key("a lot"), to: there.into(), address: None }, "22P02"),
    ] {
        assert_eq!(drafted(&goal, &all, &map).expect_err("refused").sqlstate, code, "{goal:?}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let map = levelled_map(&[1, 1]);
    let all = shards(&[1, 1]);
    for (goal, code) in [
        (add("shard1"), "42710"),
        (Goal::Remove { shard: "shard7".into() }, "42704"),
        (Goal::Weigh(vec![("shard0".into(), 0), ("shard1".into(), 0)]), "22023"),
        (Goal::Weigh(vec![("shard0".into(), 3), ("shard1".into(), 3)]), "22023"),
        (Goal::Move { slots: SlotSet::parse("1").expect("a slot"), to: "nobody".into() }, "42704"),
    ] {
        assert_eq!(drafted(&goal, &all, &map).expect_err("refused").sqlstate, code, "{goal:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn changed_weights_move_the_least(before in proptest::collection::vec(1_u32..9, 2..6), change in 0_usize..6, to in 0_u32..9) {
        let map = levelled_map(&before);
        let which = change % before.len();
        let goal = Goal::Weigh(vec![(format!("shard{which}"), to)]);
        let mut weights = before.clone();
        weights[which] = to;
        prop_assume!(weights.iter().any(|weight| *weight > 0));
        let names: Vec<String> = (0..before.len()).map(|index| format!("shard{index}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match drafted(&goal, &shards(&before), &map) {
            Ok(steps) => {
                // Only to or from the shard whose weight changed.
                let name = names[which];
                prop_assert!(steps.iter().all(|step| (&*step.from == name) != (&*step.to == name)));
                let counts = after(&steps, &names, &map).counts(before.len());
                let total: u32 = weights.iter().sum();
                for (count, weight) in counts.iter().zip(&weights) {
                    let fair = Slot::COUNT as f64 * f64::from(*weight) / f64::from(total);
                    prop_assert!((*count as f64 - fair).abs() < 2.0, "{counts:?} for {weights:?}");
                }
            }
            Err(error) => prop_assert_eq!(error.sqlstate, "22023"),
        }
    }
}
