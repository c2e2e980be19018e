//! Proposing which shard should own which slot: a consistent-hash ring says where slots like to be, levelling says how
//! many each shard gets.
//!
//! Invariants: owners keep their slots unless they have too many; slots per weight differ by at most one between any two
//! shards; adding a shard moves slots only to it, removing one moves only its own. The same input gives the same map on
//! every machine and version, so points are hashed from explicit bytes.
//! Non-goals: being on the query path. The slot map in the hub is the placement; this only proposes the next one.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::hash::{Hash, Hasher};

use consistent_hash::{Node, RingHash, StaticHashRing};

use super::SlotMap;
use super::hash::hash_bytes_extended;
use crate::id::{ShardId, Slot};

/// Points on the ring per unit of weight (fewer only if all shards together would need more than [`POINTS_MAX`]).
const POINTS_PER_WEIGHT: u64 = 500;
/// Bound of the ring's size.
const POINTS_MAX: u64 = 1 << 18;

/// A shard that may own slots. Its [`ShardId`] in the proposed map is its position in the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingShard<'a> {
    /// Its lasting name: what the ring hashes and what tells whether a current owner is still there.
    pub name: &'a str,
    /// Its share of the slots relative to the others. Zero: it gives up all it has.
    pub weight: u32,
}

/// The placement to start from.
#[derive(Clone, Copy, Debug)]
pub struct Placed<'a> {
    /// Names in the [`ShardId`] order of `slots`.
    pub shards: &'a [Box<str>],
    pub slots: &'a SlotMap,
}

/// The slot map for `shards`, as near to `current` as a level one can be. `None` if no shard has a weight, two share a
/// name, or there are more than [`ShardId`] can number.
///
/// How many slots each gets is Webster's apportionment, because that is monotone: a new shard never makes an old one's
/// share grow, so nothing moves between old ones.
pub fn propose(shards: &[RingShard<'_>], current: Option<Placed<'_>>) -> Option<SlotMap> {
    if shards.len() > usize::from(u16::MAX) || shards.iter().all(|shard| shard.weight == 0) || has_duplicates(shards) {
        return None;
    }
    let ring = ring(shards);
    let owners: Vec<Option<usize>> = match current {
        Some(placed) => kept_owners(shards, placed),
        None => {
            Slot::all().map(|slot| ring.calc_candidates(&Point::of_slot(slot)).next().map(|node| node.value)).collect()
        }
    };
    let mut held = vec![0; shards.len()];
    for &owner in owners.iter().flatten() {
        held[owner] += 1;
    }
    let mut levelling = Levelling { targets: targets(shards, &held), held, owners };
    // First the moves the ring itself would make, then wherever there is room.
    levelling.settle(&ring, true);
    levelling.settle(&ring, false);
    let owners = levelling.owners.into_iter().map(|owner| owner.map(|index| ShardId(index as u16)));
    SlotMap::new(owners.collect::<Option<_>>()?)
}

fn has_duplicates(shards: &[RingShard<'_>]) -> bool {
    let mut names: Vec<_> = shards.iter().map(|shard| shard.name).collect();
    names.sort_unstable();
    names.windows(2).any(|pair| pair[0] == pair[1])
}

/// Owners by position in `shards`; `None` where the owner is no longer there.
fn kept_owners(shards: &[RingShard<'_>], placed: Placed<'_>) -> Vec<Option<usize>> {
    let kept: Vec<_> = placed.shards.iter().map(|name| shards.iter().position(|shard| shard.name == &**name)).collect();
    placed.slots.owners().iter().map(|owner| kept.get(usize::from(owner.0)).copied().flatten()).collect()
}

/// A shard's bid for its next slot: the one with the lowest `(2 * seats + 1) / weight` wins.
#[derive(PartialEq, Eq)]
struct Bid<'a> {
    seats: usize,
    shard: RingShard<'a>,
    index: usize,
    /// It holds that slot today, which decides ties: nothing moves to break one.
    holds: bool,
}

impl Ord for Bid<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let ratio = |seats: usize, weight: u32| (2 * seats as u64 + 1) * u64::from(weight);
        ratio(other.seats, self.shard.weight)
            .cmp(&ratio(self.seats, other.shard.weight))
            .then(self.holds.cmp(&other.holds))
            .then_with(|| other.shard.name.cmp(self.shard.name))
    }
}

impl PartialOrd for Bid<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Slots each shard shall have, by Webster's method (Sainte-Laguë).
fn targets(shards: &[RingShard<'_>], held: &[usize]) -> Vec<usize> {
    let bid = |index: usize, seats: usize| Bid { seats, shard: shards[index], index, holds: seats < held[index] };
    let mut bids: BinaryHeap<_> =
        (0..shards.len()).filter(|&index| shards[index].weight > 0).map(|index| bid(index, 0)).collect();
    let mut targets = vec![0; shards.len()];
    for _ in 0..Slot::COUNT {
        if let Some(Bid { index, .. }) = bids.pop() {
            targets[index] += 1;
            bids.push(bid(index, targets[index]));
        }
    }
    targets
}

type Ring = StaticHashRing<'static, Point, usize, ExplicitHash>;

struct Levelling {
    targets: Vec<usize>,
    held: Vec<usize>,
    owners: Vec<Option<usize>>,
}

impl Levelling {
    /// Moves slots without an owner, and those an owner has too many of, to a shard that lacks some: the first such on the
    /// ring, or with `first_choice_only` only if it is the very first.
    fn settle(&mut self, ring: &Ring, first_choice_only: bool) {
        let mut order: Vec<Slot> = Slot::all().collect();
        // In ring order, so that the surplus is taken from everywhere in the key space.
        order.sort_by_cached_key(|&slot| (ExplicitHash.hash_item(&Point::of_slot(slot)), slot));
        for slot in order {
            let owner = self.owners[slot.index()];
            if owner.is_some_and(|owner| self.held[owner] <= self.targets[owner]) {
                continue;
            }
            let candidates = if first_choice_only { 1 } else { self.targets.len() };
            let point = Point::of_slot(slot);
            let mut candidates = ring.calc_candidates(&point).take(candidates).map(|node| node.value);
            let Some(taker) = candidates.find(|&shard| self.held[shard] < self.targets[shard]) else {
                continue;
            };
            if let Some(owner) = owner {
                self.held[owner] -= 1;
            }
            self.held[taker] += 1;
            self.owners[slot.index()] = Some(taker);
        }
    }
}

fn ring(shards: &[RingShard<'_>]) -> Ring {
    let wanted: u64 = shards.iter().map(|shard| u64::from(shard.weight) * POINTS_PER_WEIGHT).sum();
    let nodes = shards.iter().enumerate().filter(|(_, shard)| shard.weight > 0).map(|(index, shard)| {
        let points = u64::from(shard.weight) * POINTS_PER_WEIGHT;
        let points = if wanted > POINTS_MAX { points * POINTS_MAX / wanted } else { points };
        Node::new(Point::of_shard(shard.name)).value(index).quantity(points.max(1) as usize)
    });
    StaticHashRing::new(ExplicitHash, nodes)
}

/// What is hashed onto the ring, as the exact bytes that are hashed: the standard library's encoding of strings and
/// tuples is not promised to stay.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Point(Vec<u8>);

impl Point {
    fn of_shard(name: &str) -> Self {
        Point([b"shard:", name.as_bytes()].concat())
    }

    fn of_slot(slot: Slot) -> Self {
        Point([&b"slot:"[..], &(slot.index() as u32).to_le_bytes()].concat())
    }
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

/// Collects what a [`Point`] writes.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Hasher for Bytes {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        hash_bytes_extended(&self.0, 0)
    }
}

/// Postgres's extended hash over explicit bytes.
#[derive(Debug)]
struct ExplicitHash;

impl RingHash for ExplicitHash {
    fn hash_item<T: Hash>(&self, item: &T) -> u64 {
        let mut bytes = Bytes::default();
        item.hash(&mut bytes);
        bytes.finish()
    }

    fn hash_vnode<K: Hash>(&self, node_key: &K, vnode_seq: usize) -> u64 {
        let mut bytes = Bytes::default();
        node_key.hash(&mut bytes);
        bytes.write(&(vnode_seq as u64).to_le_bytes());
        bytes.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(count: usize) -> Vec<Box<str>> {
        (0..count).map(|index| format!("shard_{index}").into()).collect()
    }

    fn shards<'a>(names: &'a [Box<str>], weights: &[u32]) -> Vec<RingShard<'a>> {
        names.iter().zip(weights).map(|(name, &weight)| RingShard { name, weight }).collect()
    }

    /// Slots per weight differ by at most one between any two shards with a weight.
    fn is_level(map: &SlotMap, weights: &[u32]) -> bool {
        let counts = map.counts(weights.len());
        let pairs: Vec<_> =
            counts.iter().zip(weights).map(|(&count, &weight)| (count as i64, i64::from(weight))).collect();
        counts.iter().sum::<usize>() == Slot::COUNT
            && pairs.iter().all(|&(count, weight)| {
                if weight == 0 {
                    return count == 0;
                }
                pairs
                    .iter()
                    .filter(|other| other.1 > 0)
                    .all(|other| (count * other.1 - other.0 * weight).abs() <= weight * other.1)
            })
    }

    fn moves(from: &SlotMap, to: &SlotMap) -> Vec<(ShardId, ShardId)> {
        from.owners().iter().zip(to.owners()).filter(|(a, b)| a != b).map(|(a, b)| (*a, *b)).collect()
    }

    #[test]
    fn what_cannot_be_placed_is_refused() {
        let names = names(2);
        assert_eq!(propose(&[], None), None);
        assert_eq!(propose(&shards(&names, &[0, 0]), None), None);
        assert_eq!(propose(&[RingShard { name: "a", weight: 1 }; 2], None), None);
    }

    #[test]
    fn equal_shards_grow_by_exact_shares() {
        let names = names(17);
        let mut map = propose(&shards(&names[..1], &[1]), None).expect("one shard");
        assert_eq!(map, SlotMap::single(ShardId(0)));
        for count in 2..=17 {
            let weights = vec![1; count];
            let placed = Placed { shards: &names[..count - 1], slots: &map };
            let next = propose(&shards(&names[..count], &weights), Some(placed)).expect("proposal");
            let moves = moves(&map, &next);
            assert!(
                (Slot::COUNT / count..=Slot::COUNT.div_ceil(count)).contains(&moves.len()),
                "{count}: {}",
                moves.len()
            );
            assert!(moves.iter().all(|(_, to)| usize::from(to.0) == count - 1));
            assert!(is_level(&next, &weights));
            map = next;
        }
    }

    #[test]
    fn the_first_proposal_is_the_same_for_ever() {
        let names = names(3);
        let map = propose(&shards(&names, &[1, 1, 2]), None).expect("proposal");
        let digest =
            map.owners().iter().fold(0_u64, |digest, owner| hash_bytes_extended(&owner.0.to_le_bytes(), digest));
        assert_eq!(
            (map.counts(3), digest),
            (vec![1024, 1024, 2048], 4_110_558_252_314_279_983),
            "a new version must not move slots of new clusters"
        );
    }

    #[test]
    fn a_level_map_stays_whoever_holds_the_odd_slots() {
        let names = names(3);
        for odd in 0..3 {
            let owner = |slot: Slot| if slot.index() == 0 { odd } else { (slot.index() - 1) as u16 % 3 };
            let map = SlotMap::new(Slot::all().map(|slot| ShardId(owner(slot))).collect()).expect("one owner per slot");
            assert_eq!(propose(&shards(&names, &[1; 3]), Some(Placed { shards: &names, slots: &map })), Some(map));
        }
    }

    #[test]
    fn a_weight_of_millions_does_not_make_a_ring_of_millions() {
        let names = names(3);
        let map = propose(&shards(&names, &[u32::MAX, u32::MAX, 1]), None).expect("proposal");
        assert_eq!(map.counts(3), [2048, 2048, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn proposals_are_level_and_deterministic(weights in prop::collection::vec(1_u32..6, 1..=16)) {
            let names = names(weights.len());
            let map = propose(&shards(&names, &weights), None).expect("proposal");
            prop_assert!(is_level(&map, &weights));
            prop_assert_eq!(&map, &propose(&shards(&names, &weights), None).expect("again"));
            let placed = Placed { shards: &names, slots: &map };
            prop_assert_eq!(&map, &propose(&shards(&names, &weights), Some(placed)).expect("no change"));
        }

        #[test]
        fn adding_and_removing_move_only_what_must(weights in prop::collection::vec(1_u32..6, 2..=16), gone in any::<prop::sample::Index>()) {
            let count = weights.len();
            let gone = gone.index(count);
            let all_names = names(count);
            let all = shards(&all_names, &weights);
            // Add one shard after the other.
            let mut map = propose(&all[..1], None).expect("one shard");
            for end in 2..=count {
                let placed = Placed { shards: &all_names[..end - 1], slots: &map };
                let next = propose(&all[..end], Some(placed)).expect("proposal");
                prop_assert!(moves(&map, &next).iter().all(|(_, to)| usize::from(to.0) == end - 1));
                prop_assert!(is_level(&next, &weights[..end]));
                map = next;
            }
            // Take one away, wherever it stands: ids shift, names do not.
            let mut rest = all.clone();
            rest.remove(gone);
            let placed = Placed { shards: &all_names, slots: &map };
            let next = propose(&rest, Some(placed)).expect("proposal");
            for (before, after) in map.owners().iter().zip(next.owners()) {
                let name = &*all_names[usize::from(before.0)];
                prop_assert!(name == all[gone].name || name == rest[usize::from(after.0)].name);
            }
            let mut rest_weights = weights.clone();
            rest_weights.remove(gone);
            prop_assert!(is_level(&next, &rest_weights));
        }

        #[test]
        fn a_skewed_map_gives_up_only_its_surplus(owners in prop::collection::vec(0_u16..5, Slot::COUNT), weights in prop::collection::vec(1_u32..5, 5)) {
            let names = names(5);
            let map = SlotMap::new(owners.into_iter().map(ShardId).collect()).expect("one owner per slot");
            let next = propose(&shards(&names, &weights), Some(Placed { shards: &names, slots: &map })).expect("proposal");
            prop_assert!(is_level(&next, &weights));
            let surplus: usize = map.counts(5).iter().zip(next.counts(5)).map(|(before, after)| before.saturating_sub(after)).sum();
            prop_assert_eq!(moves(&map, &next).len(), surplus);
        }
    }
}
