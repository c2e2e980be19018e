//! A set of keys: those of some slots, and single keys that stand on their own.
//!
//! Invariant: a key is meant by its 64-bit hash, here and on servers, so that keys which hash alike always go together. Non-goal: who
//! owns what ([`super::SlotMap`]).

use std::fmt;

use super::SlotSet;
use crate::id::Slot;

/// Keys by slot, and by hash where a key is in or out on its own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeySet {
    slots: SlotSet,
    /// Hashes and whether they are in, whatever their slot says; each once, ascending.
    apart: Vec<(u64, bool)>,
}

impl KeySet {
    /// Just this key, and what hashes alike.
    pub fn single(hash: u64) -> Self {
        KeySet { slots: SlotSet::default(), apart: vec![(hash, true)] }
    }

    /// Slots, and keys that are in or out whatever their slot says.
    pub fn new(slots: SlotSet, apart: impl IntoIterator<Item = (u64, bool)>) -> Self {
        let differs = |(hash, is_in): &(u64, bool)| slots.contains(Slot::of_hash(*hash)) != *is_in;
        let mut apart: Vec<_> = apart.into_iter().filter(differs).collect();
        apart.sort_unstable();
        apart.dedup();
        KeySet { slots, apart }
    }

    /// As [`fmt::Display`] writes it: slots as [`SlotSet::parse`] reads them, `+` and `-` with sixteen hexadecimal digits for the
    /// hash of a key that is in or out on its own.
    pub fn parse(text: &str) -> Option<KeySet> {
        let is_key = |part: &&str| part.starts_with(['+', '-']);
        let (keys, slots): (Vec<&str>, Vec<&str>) = text.split(',').map(str::trim).partition(is_key);
        let key = |part: &str| {
            let is_hash = part.len() == 17 && part[1..].bytes().all(|byte| byte.is_ascii_hexdigit());
            is_hash.then(|| Some((u64::from_str_radix(&part[1..], 16).ok()?, part.starts_with('+'))))?
        };
        let keys = keys.into_iter().map(key).collect::<Option<Vec<_>>>()?;
        let slots = if slots.is_empty() { SlotSet::default() } else { SlotSet::parse(&slots.join(","))? };
        Some(KeySet::new(slots, keys))
    }

    /// Is a key with this hash among them?
    pub fn contains(&self, hash: u64) -> bool {
        // The common case first: asked for every row of a stream.
        if self.apart.is_empty() {
            return self.slots.contains(Slot::of_hash(hash));
        }
        match self.apart.binary_search_by_key(&hash, |(hash, _)| *hash) {
            Ok(at) => self.apart[at].1,
            Err(_) => self.slots.contains(Slot::of_hash(hash)),
        }
    }

    pub fn slots(&self) -> &SlotSet {
        &self.slots
    }

    /// Hashes of keys that are in although their slot is not.
    pub fn beside(&self) -> impl Iterator<Item = u64> {
        self.apart.iter().filter(|(_, is_in)| *is_in).map(|(hash, _)| *hash)
    }

    /// Hashes of keys that are not in although their slot is.
    pub fn except(&self) -> impl Iterator<Item = u64> {
        self.apart.iter().filter(|(_, is_in)| !*is_in).map(|(hash, _)| *hash)
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.beside().next().is_none()
    }

    /// The keys of both.
    #[must_use]
    pub fn with(&self, others: &KeySet) -> KeySet {
        let hashes = self.apart.iter().chain(&others.apart).map(|(hash, _)| *hash);
        let apart = hashes.map(|hash| (hash, self.contains(hash) || others.contains(hash)));
        KeySet::new(self.slots.with(&others.slots), apart)
    }
}

impl From<SlotSet> for KeySet {
    fn from(slots: SlotSet) -> Self {
        KeySet { slots, apart: Vec::new() }
    }
}

/// As [`KeySet::parse`] reads it.
impl fmt::Display for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.slots.fmt(f)?;
        for (number, (hash, is_in)) in self.apart.iter().enumerate() {
            let comma = if number > 0 || !self.slots.is_empty() { ", " } else { "" };
            write!(f, "{comma}{}{hash:016x}", if *is_in { '+' } else { '-' })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(slot: u64, rest: u64) -> u64 {
        slot << 52 | rest
    }

    #[test]
    fn a_key_on_its_own_counts_more_than_its_slot() {
        let set = KeySet::new(
            SlotSet::parse("1-3").expect("a set"),
            [(hash(2, 7), false), (hash(9, 1), true), (hash(1, 5), true)],
        );
        for (key, expected) in
            [(hash(2, 7), false), (hash(2, 8), true), (hash(9, 1), true), (hash(9, 2), false), (hash(1, 5), true)]
        {
            assert_eq!(set.contains(key), expected, "{key:x}");
        }
        assert_eq!(
            set.to_string(),
            "1-3, -0020000000000007, +0090000000000001",
            "what its slot says anyway is not listed"
        );
        assert_eq!((set.beside().collect::<Vec<_>>(), set.except().count()), (vec![hash(9, 1)], 1));
        assert!(KeySet::default().is_empty() && !KeySet::single(0).is_empty());
        for wrong in ["", "1-3, +", "+g", "1, +0", "1, ++000000000000001", "5-3"] {
            assert_eq!(KeySet::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn both_have_what_one_has_and_are_read_as_written(
            slots in prop::array::uniform2(prop::collection::vec(0_u64..4, 0..4)),
            keys in prop::array::uniform2(prop::collection::vec((0_u64..4, 0_u64..3, any::<bool>()), 0..6)),
        ) {
            let sets: Vec<KeySet> = (0..2).map(|which| {
                let slots = slots[which].iter().filter_map(|slot| Slot::new(*slot as u16)).collect();
                // Each key says one thing.
                let keys: std::collections::BTreeMap<u64, bool> =
                    keys[which].iter().map(|(slot, rest, is_in)| (hash(*slot, *rest), *is_in)).collect();
                KeySet::new(slots, keys)
            }).collect();
            let both = sets[0].with(&sets[1]);
            for key in (0..5).flat_map(|slot| (0..4).map(move |rest| hash(slot, rest))) {
                prop_assert_eq!(both.contains(key), sets[0].contains(key) || sets[1].contains(key));
            }
            if !both.to_string().is_empty() {
                prop_assert_eq!(KeySet::parse(&both.to_string()), Some(both));
            }
        }
    }
}
