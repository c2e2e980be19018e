//! Drafts from measured load: never worse, as few rows as it takes, and hot slots by name.

use proptest::prelude::*;

use super::*;
use crate::id::ShardId;
use crate::reshard::load::Cost;

struct Case {
    shards: Vec<Weighed>,
    slots: SlotMap,
    load: SlotLoad,
    rows: BTreeMap<Slot, Rows>,
}

impl Case {
    /// Slots in turn to the shards by `owner`; `(slot, time, rows)`.
    fn new(weights: &[u32], owner: impl Fn(usize) -> u16, used: &[(u16, f64, f64)]) -> Case {
        let weighed =
            |(number, weight): (usize, &u32)| Weighed { name: format!("shard{number}").into(), weight: *weight };
        let slots = SlotMap::new(Slot::all().map(|slot| ShardId(owner(slot.index()))).collect()).expect("all slots");
        let (mut load, mut rows) = (SlotLoad::default(), BTreeMap::new());
        for (number, time_us, count) in used {
            let slot = Slot::new(*number).expect("a slot");
            load.add(slot, Cost { statements: 1.0, time_us: *time_us });
            rows.insert(slot, Rows { rows: *count, bytes: *count * 100.0 });
        }
        Case { shards: weights.iter().enumerate().map(weighed).collect(), slots, load, rows }
    }

    fn balanced(&self) -> Result<Balanced, UserError> {
        balance(&Measured { shards: &self.shards, slots: &self.slots, load: &self.load, rows: &self.rows })
    }
}

/// The lower half belongs to shard0.
fn halves(slot: usize) -> u16 {
    u16::from(slot >= 2048)
}

fn moved(balanced: &Balanced) -> Vec<usize> {
    balanced.steps.iter().flat_map(|step| step.keys.slots().iter().map(Slot::index)).collect()
}

#[test]
fn as_few_rows_move_as_it_takes() {
    // 60 to 40: ten have to go, and there are dear and cheap ones.
    let used = [(0, 10.0, 100_000.0), (1, 10.0, 50.0), (2, 20.0, 10.0), (3, 20.0, 10.0), (3000, 40.0, 1.0)];
    let balanced = Case::new(&[1, 1], halves, &used).balanced().expect("a draft");
    assert_eq!(moved(&balanced), [1], "the same time with fewer rows");
    assert!(balanced.steps.iter().all(|step| (&*step.from, &*step.to) == ("shard0", "shard1")));
    let shares: Vec<(f64, f64)> = balanced.shares.iter().map(|share| (share.now, share.then)).collect();
    assert_eq!(shares, [(0.6, 0.5), (0.4, 0.5)]);
}

#[test]
fn weights_are_shares() {
    let used: Vec<(u16, f64, f64)> = (0..100).map(|number| (number * 40, 1.0, 1.0)).collect();
    let case = Case::new(&[3, 1], |slot| (slot % 80 / 40) as u16, &used);
    let balanced = case.balanced().expect("a draft");
    let then = balanced.shares[0].then;
    assert!((0.71..=0.79).contains(&then), "{then}");
    assert!(balanced.steps.iter().all(|step| &*step.to == "shard0"));
    // A shard that takes no part gives up all that is used, and gets nothing.
    let case = Case::new(&[1, 0, 1], |slot| (slot / 40 % 3) as u16, &used);
    let balanced = case.balanced().expect("a draft");
    assert!(
        balanced.shares[1].then < 1e-9 && balanced.steps.iter().all(|step| &*step.from == "shard1"),
        "{balanced:?}"
    );
}

#[test]
fn what_is_nearly_level_is_left_alone() {
    let used = [(0, 52.0, 1.0), (1, 2.0, 1.0), (3000, 46.0, 1.0)];
    let error = Case::new(&[1, 1], halves, &used).balanced().expect_err("8 % off");
    assert_eq!(error.sqlstate, "22023");
    assert!(error.detail.is_some_and(|detail| detail.contains("54.0 % of the time now")));
    let error = Case::new(&[1, 1], halves, &[]).balanced().expect_err("nothing was measured");
    assert_eq!(error.sqlstate, "55000");
}

#[test]
fn a_slot_that_is_hotter_than_a_share_is_named_and_stays() {
    let used = [(17, 61.0, 1.0), (18, 15.0, 10.0), (19, 5.0, 10.0), (3000, 9.0, 10.0), (3001, 10.0, 10.0)];
    let case = Case::new(&[1, 1], halves, &used);
    let error = case.balanced().expect_err("the rest is level");
    assert!(error.detail.is_some_and(|detail| detail.contains("slot 17 has 61 % of the time")));
    assert!(error.hint.is_some_and(|hint| hint.contains("ISOLATE KEY")));
    // The rest is levelled; nothing is added to the shard that has the hot one.
    let used = [(17, 61.0, 1.0), (18, 15.0, 10.0), (19, 9.0, 10.0), (20, 5.0, 10.0), (3000, 10.0, 10.0)];
    let case = Case::new(&[1, 1], halves, &used);
    let balanced = case.balanced().expect("a draft");
    assert_eq!((moved(&balanced), balanced.hot[0].0.index()), (vec![19], 17));
    let findings = balanced.findings(&case.shards, &case.slots);
    assert_eq!((findings[0].gravity, findings[0].shard.as_str()), (Gravity::Warning, "shard0"));
    let used = [(17, 61.0, 1.0), (3000, 20.0, 10.0), (3001, 19.0, 10.0)];
    assert!(Case::new(&[1, 1], halves, &used).balanced().is_err(), "nobody gives to the shard with the hot slot");
}

/// Time for its weight, of the busiest shard.
fn busiest(case: &Case, balanced: &Balanced, of: fn(&Share) -> f64) -> f64 {
    let shards = case.shards.iter().zip(&balanced.shares);
    shards.map(|(shard, share)| of(share) / f64::from(shard.weight)).fold(0.0, f64::max)
}

fn some_load() -> impl Strategy<Value = Vec<(u16, f64, f64)>> {
    let slot = (0_u16..4096, prop_oneof![9 => 0.1_f64..10.0, 1 => 10.0_f64..2000.0], 0.0_f64..1000.0);
    proptest::collection::vec(slot, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_draft_is_never_worse_and_moves_nothing_twice(
        weights in proptest::collection::vec(1_u32..5, 2..6),
        salt in 1_usize..97,
        used in some_load(),
    ) {
        let count = weights.len();
        let case = Case::new(&weights, |slot| (slot * salt / 7 % count) as u16, &used);
        let Ok(balanced) = case.balanced() else { return Ok(()) };
        let slots = moved(&balanced);
        let mut once = slots.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), slots.len());
        for step in &balanced.steps {
            prop_assert!(step.from != step.to);
            for slot in step.keys.slots().iter() {
                let owner = usize::from(case.slots.owner(slot).0);
                prop_assert_eq!(&case.shards[owner].name, &step.from);
                prop_assert!(balanced.hot.iter().all(|(hot, _)| *hot != slot));
            }
        }
        let (now, then) = (busiest(&case, &balanced, |share| share.now), busiest(&case, &balanced, |share| share.then));
        prop_assert!(then <= now + 1e-9, "{now} to {then}");
        // A draft says what it comes to.
        let mut sums = vec![0.0; count];
        for (slot, cost) in case.load.used() {
            let to = balanced.steps.iter().find(|step| step.keys.slots().contains(slot)).map(|step| &step.to);
            let owner = to.and_then(|to| case.shards.iter().position(|shard| shard.name == *to));
            sums[owner.unwrap_or(usize::from(case.slots.owner(slot).0))] += cost.time_us / case.load.total().time_us;
        }
        for (sum, share) in sums.iter().zip(&balanced.shares) {
            prop_assert!((sum - share.then).abs() < 1e-6);
        }
    }

    #[test]
    fn fine_grained_load_is_brought_within_the_tolerance(
        weights in proptest::collection::vec(1_u32..4, 2..5),
        salt in 1_usize..97,
        times in proptest::collection::vec(0.5_f64..2.0, 1500),
    ) {
        let count = weights.len();
        let used: Vec<(u16, f64, f64)> =
            times.iter().enumerate().map(|(at, time)| (at as u16 * 2, *time, (at % 13) as f64)).collect();
        let case = Case::new(&weights, |slot| (slot * salt / 7 % count) as u16, &used);
        match case.balanced() {
            Ok(balanced) => for share in &balanced.shares {
                prop_assert!((share.then / share.wanted - 1.0).abs() <= OUT, "{:?}", balanced.shares);
            },
            Err(error) => {
                prop_assert_eq!(error.sqlstate, "22023");
                let sums = case.load.by_shard(&case.slots, count);
                let total = case.load.total().time_us;
                let all: u32 = weights.iter().sum();
                for (sum, weight) in sums.iter().zip(&weights) {
                    let off = sum.time_us / total / (f64::from(*weight) / f64::from(all)) - 1.0;
                    prop_assert!(off.abs() <= OUT + 1e-9, "{off}");
                }
            }
        }
    }
}
