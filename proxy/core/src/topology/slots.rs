//! A set of slots, as people write it: `0-99, 200`.

use std::fmt;

use crate::id::Slot;

/// Some of the 4096 slots, each once, ascending.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SlotSet(Vec<Slot>);

impl SlotSet {
    /// Numbers and ranges between commas, in any order. `None`: it is not that, or a number is none of a slot.
    pub fn parse(text: &str) -> Option<SlotSet> {
        let number = |text: &str| text.trim().parse().ok().and_then(Slot::new);
        let mut slots = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return None;
            }
            slots.extend(Slot::all().skip(first.index()).take(last.index() - first.index() + 1));
        }
        Some(slots.into_iter().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = Slot> {
        self.0.iter().copied()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, slot: Slot) -> bool {
        self.0.binary_search(&slot).is_ok()
    }
}

impl SlotSet {
    /// The slots of both.
    #[must_use]
    pub fn with(&self, others: &SlotSet) -> SlotSet {
        self.iter().chain(others.iter()).collect()
    }
}

impl FromIterator<Slot> for SlotSet {
    fn from_iter<I: IntoIterator<Item = Slot>>(slots: I) -> Self {
        let mut slots: Vec<Slot> = slots.into_iter().collect();
        slots.sort_unstable();
        slots.dedup();
        SlotSet(slots)
    }
}

/// Ranges, as [`SlotSet::parse`] reads them.
impl fmt::Display for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|one, next| one.index() + 1 == next.index());
        for (number, run) in runs.enumerate() {
            f.write_str(if number > 0 { ", " } else { "" })?;
            match run {
                [one] => write!(f, "{}", one.index())?,
                [first, .., last] => write!(f, "{}-{}", first.index(), last.index())?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_as_they_are_written() {
        for (text, shown, count) in [
            ("0", "0", 1),
            ("0-4095", "0-4095", 4096),
            ("7, 3-5 ,6", "3-7", 5),
            ("5,5,5-5", "5", 1),
            ("10-12,20,22-23", "10-12, 20, 22-23", 6),
        ] {
            let set = SlotSet::parse(text).expect(text);
            assert_eq!((set.to_string(), set.len()), (shown.to_owned(), count));
            assert_eq!(SlotSet::parse(shown), Some(set));
        }
        for wrong in ["", "-", "4096", "5-3", "1,,2", "a", "1-", "-1", "1 2"] {
            assert_eq!(SlotSet::parse(wrong), None, "{wrong}");
        }
        let set = SlotSet::parse("3-5").expect("a set");
        assert!(set.contains(Slot::new(4).expect("a slot")) && !set.contains(Slot::new(6).expect("a slot")));
    }
}
