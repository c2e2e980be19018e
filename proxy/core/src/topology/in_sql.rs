//! Hashes and slots of keys, as a server computes them: SQL text that means the same under any search_path and setting.

use std::fmt::Write as _;

use super::{KeySet, KeyType, SlotSet};
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
fn bitmap(slots: &SlotSet) -> String {
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

/// A condition that holds where the key, an SQL expression, is in the set.
pub fn inside(keys: &KeySet, expression: &str, key_type: KeyType) -> String {
    condition(keys, (expression, key_type), &Words { yes: "=", no: "<>", and: "AND", or: "OR", any: "ANY", all: "ALL" })
}

/// A condition that holds where the key, an SQL expression, is not in the set.
///
/// One look at a constant: about 0.1 µs per row. It says `<> 1` and not `= 0` because the planner takes an inequality it
/// knows nothing of to hold for nearly all rows, an equality for nearly none.
pub fn outside(keys: &KeySet, expression: &str, key_type: KeyType) -> String {
    // Each word denied: de Morgan.
    condition(keys, (expression, key_type), &Words { yes: "<>", no: "=", and: "OR", or: "AND", any: "ALL", all: "ANY" })
}

/// What [`condition`] is made of.
struct Words {
    yes: &'static str,
    no: &'static str,
    and: &'static str,
    or: &'static str,
    any: &'static str,
    all: &'static str,
}

/// In words for "inside": one of the slots, and none of those that stay apart; or one of the keys beside.
fn condition(keys: &KeySet, (expression, key_type): (&str, KeyType), words: &Words) -> String {
    let Words { yes, no, and, or, any, all } = words;
    let hash = hash(expression, key_type);
    let beside = listed(keys.beside()).map(|beside| format!("{hash} OPERATOR(pg_catalog.{yes}) {any} ({beside})"));
    if let (true, Some(beside)) = (keys.slots().is_empty(), &beside) {
        return beside.clone();
    }
    let (bitmap, slot) = (bitmap(keys.slots()), slot(expression, key_type));
    let mut condition = format!("pg_catalog.get_bit({bitmap}, {slot}) OPERATOR(pg_catalog.{yes}) 1");
    if let Some(except) = listed(keys.except()) {
        condition = format!("({condition} {and} {hash} OPERATOR(pg_catalog.{no}) {all} ({except}))");
    }
    match beside {
        Some(beside) => format!("({condition} {or} {beside})"),
        None => condition,
    }
}

/// An array of hashes; `None`: there are none. Digits only, whose quotes mean the same under any setting.
fn listed(hashes: impl Iterator<Item = u64>) -> Option<String> {
    // The smallest number cannot be written as a minus and a number.
    let numbers: Vec<String> = hashes.map(|hash| format!("'{}'", hash as i64)).collect();
    (!numbers.is_empty()).then(|| format!("ARRAY[{}]::pg_catalog.int8[]", numbers.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_a_bit_of_the_constant() {
        let set = KeySet::parse("0, 9, 4095").expect("a set");
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
    #[test]
    fn keys_on_their_own_are_named_by_their_hash() {
        let hash = "pg_catalog.hashint8extended(k, 0)";
        let single = KeySet::single(42);
        assert_eq!(
            inside(&single, "k", KeyType::Int),
            format!("{hash} OPERATOR(pg_catalog.=) ANY (ARRAY['42']::pg_catalog.int8[])")
        );
        assert_eq!(
            outside(&single, "k", KeyType::Int),
            format!("{hash} OPERATOR(pg_catalog.<>) ALL (ARRAY['42']::pg_catalog.int8[])")
        );
        let mixed = KeySet::parse("4095, -ffffffffffffffff, +8000000000000000").expect("a set");
        let (is_in, is_out) = (inside(&mixed, "k", KeyType::Int), outside(&mixed, "k", KeyType::Int));
        for (text, parts) in [
            (is_in, ["= ", "<>) ALL (ARRAY['-1']", "=) ANY (ARRAY['-9223372036854775808']"]),
            (is_out, ["<>) 1", "=) ANY (ARRAY['-1']", "<>) ALL (ARRAY['-9223372036854775808']"]),
        ] {
            assert!(parts.iter().skip(1).all(|part| text.contains(part)), "{text}");
        }
    }
}
