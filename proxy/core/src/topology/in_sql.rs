//! Hashes and slots of keys, as a server computes them: SQL text that means the same under any search_path and setting.

use std::fmt::Write as _;

use super::{KeyType, SlotSet};
use crate::id::Slot;

/// [`super::Key::hash`] of an SQL expression of that type.
pub fn hash(expression: &str, key_type: KeyType) -> String {
    let function = match key_type {
        KeyType::Int => "hashint8extended",
        KeyType::Text => "hashtextextended",
        KeyType::Uuid => "uuid_hash_extended",
    };
    format!("pg_catalog.{function}({expression}, 0)")
}

/// The slot of an SQL expression of that type, as an integer.
pub fn slot(expression: &str, key_type: KeyType) -> String {
    let hash = hash(expression, key_type);
    format!("pg_catalog.int8and(pg_catalog.int8shr({hash}, 52), {})::pg_catalog.int4", Slot::COUNT - 1)
}

/// A bytea of which `get_bit` says whether a slot is one of these. No literal, whose backslash means what
/// standard_conforming_strings says.
pub fn bitmap(slots: &SlotSet) -> String {
    // get_bit in src/backend/utils/adt/varlena.c counts from the lowest bit of the first byte.
    let mut bits = [0_u8; Slot::COUNT / 8];
    for slot in slots.iter() {
        bits[slot.index() / 8] |= 1 << (slot.index() % 8);
    }
    let mut bitmap = String::with_capacity(2 * bits.len() + 40);
    bitmap.push_str("pg_catalog.decode('");
    for byte in bits {
        // Writing to a String cannot fail.
        let _ = write!(bitmap, "{byte:02x}");
    }
    bitmap.push_str("', 'hex')");
    bitmap
}

/// A condition that holds where the key, an SQL expression, is in none of the slots.
///
/// One look at a constant: about 0.1 µs per row. It says `<> 1` and not `= 0` because the planner takes an inequality it
/// knows nothing of to hold for nearly all rows, an equality for nearly none.
pub fn outside(slots: &SlotSet, expression: &str, key_type: KeyType) -> String {
    let (bitmap, slot) = (bitmap(slots), slot(expression, key_type));
    format!("pg_catalog.get_bit({bitmap}, {slot}) OPERATOR(pg_catalog.<>) 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_a_bit_of_the_constant() {
        let set = SlotSet::parse("0, 9, 4095").expect("a set");
        let condition = outside(&set, "k", KeyType::Int);
        let bits = condition.split('\'').nth(1).expect("a constant");
        assert_eq!(bits.len(), 1024);
        assert!(bits.starts_with("010200") && bits.ends_with("0080"), "{condition}");
        assert_eq!(bits.trim_start_matches("0102").trim_end_matches("80").trim_matches('0'), "");
        assert!(condition.ends_with(
            "pg_catalog.int8and(pg_catalog.int8shr(pg_catalog.hashint8extended(k, 0), 52), 4095)::pg_catalog.int4) \
             OPERATOR(pg_catalog.<>) 1"
        ));
    }
}
