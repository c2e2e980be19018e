//! Columns that are declared `global_unique`: what the shards keep for them, and what a statement's notes mean.
//!
//! A row trigger of the table notes, in the same transaction, which values a statement has taken (+1) and given up (-1). weir
//! settles those notes before it acknowledges the statement: each value has one row in the lookup table of the shard that owns
//! the slot of its hash, written in the same distributed transaction.
//!
//! Invariant: whoever commits without having settled is refused by the shard itself (a deferred trigger), so that a path that
//! weir has forgotten, or a client that goes round weir, can fail but never write an unchecked value.
//! Non-goals: sending anything, and when to do it (the server crate's `exec/unique.rs`).

pub mod script;

use std::fmt::Write as _;

use crate::id::{ShardId, Slot};
use crate::topology::SlotMap;
use crate::topology::hash::hash_bytes_extended;

/// Longest name of an object in Postgres, in bytes (NAMEDATALEN - 1).
const NAME_BYTES_MAX: usize = 63;

/// One globally unique column, as the shards' tables name it: the same on every shard and for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleId(pub i64);

impl RuleId {
    pub fn of(schema: &str, table: &str, column: &str) -> Self {
        RuleId(hash_bytes_extended(format!("{schema}\0{table}\0{column}").as_bytes(), 0) as i64)
    }
}

/// A declared column with all that its shards' objects are made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    pub schema: String,
    pub table: String,
    pub column: String,
    /// The table's shard key.
    pub key: String,
}

impl Rule {
    pub fn id(&self) -> RuleId {
        RuleId::of(&self.schema, &self.table, &self.column)
    }

    /// The name that an error gives the constraint: what Postgres calls a UNIQUE of one column.
    pub fn constraint(&self) -> String {
        const TAIL: &str = "_key";
        let mut name = format!("{}_{}", self.table, self.column);
        let end = (0..=name.len().min(NAME_BYTES_MAX - TAIL.len())).rev().find(|at| name.is_char_boundary(*at));
        name.truncate(end.unwrap_or(0));
        name + TAIL
    }

    /// The name of its trigger for `what` (`insert`, `update`, `delete`, `truncate`), and of its function.
    pub fn object(&self, what: &str) -> String {
        let mut name = String::from("weir_unique_");
        // Writing to a String cannot fail.
        let _ = write!(name, "{:016x}_{what}", self.id().0);
        name
    }
}

/// The slots that `shard` owns, as the bits of a bytea in Postgres's own order (byteaGetBit in src/backend/utils/adt/varlena.c).
pub fn owned_bits(slots: &SlotMap, shard: ShardId) -> [u8; Slot::COUNT / 8] {
    let mut bits = [0; Slot::COUNT / 8];
    for (slot, owner) in slots.owners().iter().enumerate() {
        if *owner == shard {
            bits[slot / 8] |= 1 << (slot % 8);
        }
    }
    bits
}

/// What a shard has noted of one value, in the form and encoding it was said in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note<'a> {
    /// Of the value's hash; `None`: the table was emptied, and all its values are free.
    pub slot: Option<Slot>,
    pub rule: &'a [u8],
    pub value: Option<&'a [u8]>,
    pub key: Option<&'a [u8]>,
    pub delta: &'a [u8],
}

/// The notes that each of the `shards` that take part has to be told, ascending as they are. `clears`: how many shards have emptied a table; `Err`: not all
/// of them, so that its values on the others cannot be told apart.
pub fn deal<'a>(
    notes: Vec<Note<'a>>,
    slots: &SlotMap,
    shards: &[ShardId],
) -> Result<Vec<(ShardId, Vec<Note<'a>>)>, ClearedApart> {
    let mut parts: Vec<(ShardId, Vec<Note<'a>>)> = shards.iter().map(|shard| (*shard, Vec::new())).collect();
    let (cleared, changed): (Vec<_>, Vec<_>) = notes.into_iter().partition(|note| note.slot.is_none());
    let mut rules: Vec<&[u8]> = cleared.iter().map(|note| note.rule).collect();
    rules.sort_unstable();
    rules.dedup();
    for rule in rules {
        if cleared.iter().filter(|note| note.rule == rule).count() < shards.len() {
            return Err(ClearedApart);
        }
        for (_, part) in &mut parts {
            part.push(Note { slot: None, rule, value: None, key: None, delta: b"0" });
        }
    }
    for note in changed {
        let Some(slot) = note.slot else { continue };
        if let Ok(at) = shards.binary_search(&slots.owner(slot)) {
            parts[at].1.push(note);
        }
    }
    parts.retain(|(_, part)| !part.is_empty());
    Ok(parts)
}

/// Some shards have emptied a table and others have not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClearedApart;

#[cfg(test)]
mod tests {
    use super::*;

    fn note(slot: Option<u16>, value: &'static str, delta: &'static str) -> Note<'static> {
        let value = slot.map(|_| value.as_bytes());
        Note { slot: slot.and_then(Slot::new), rule: b"7", value, key: value, delta: delta.as_bytes() }
    }

    fn halves() -> SlotMap {
        let owners = (0..Slot::COUNT).map(|slot| ShardId(u16::from(slot >= 2048))).collect();
        SlotMap::new(owners).expect("complete")
    }

    #[test]
    fn every_shard_is_told_of_its_own_values_in_ascending_order() {
        let notes = vec![note(Some(4000), "c", "1"), note(Some(1), "a", "-1"), note(Some(2047), "b", "1")];
        let parts = deal(notes, &halves(), &[ShardId(0), ShardId(1)]).expect("dealt");
        let values: Vec<(u16, Vec<&[u8]>)> =
            parts.iter().map(|(shard, part)| (shard.0, part.iter().filter_map(|note| note.value).collect())).collect();
        assert_eq!(values, [(0, vec![&b"a"[..], b"b"]), (1, vec![&b"c"[..]])]);
        let parts = deal(vec![note(Some(1), "a", "1")], &halves(), &[ShardId(0), ShardId(1)]).expect("dealt");
        assert_eq!(parts.len(), 1);
    }

    #[test]
    fn a_table_is_emptied_on_all_shards_or_refused() {
        let parts =
            deal(vec![note(None, "", "0"), note(None, "", "0")], &halves(), &[ShardId(0), ShardId(1)]).expect("dealt");
        assert_eq!(parts.iter().map(|(shard, part)| (shard.0, part.len())).collect::<Vec<_>>(), [(0, 1), (1, 1)]);
        assert_eq!(deal(vec![note(None, "", "0")], &halves(), &[ShardId(0), ShardId(1)]), Err(ClearedApart));
    }

    #[test]
    fn owned_slots_are_bits_from_the_right_of_each_byte() {
        let bits = owned_bits(&halves(), ShardId(1));
        assert_eq!((bits[255], bits[256], bits[511]), (0, 0xff, 0xff));
        let owners = (0..Slot::COUNT).map(|slot| ShardId(u16::from(slot != 9))).collect();
        let bits = owned_bits(&SlotMap::new(owners).expect("complete"), ShardId(0));
        assert_eq!((bits[0], bits[1], bits[2]), (0, 2, 0));
    }

    #[test]
    fn names_fit_and_tell_columns_apart() {
        let rule = |table: &str, column: &str| Rule {
            schema: "public".into(),
            table: table.into(),
            column: column.into(),
            key: "id".into(),
        };
        assert_eq!(rule("users", "email").constraint(), "users_email_key");
        assert_eq!(rule(&"é".repeat(40), "email").constraint(), format!("{}_key", "é".repeat(29)));
        assert_ne!(rule("a", "b_c").id(), rule("a_b", "c").id());
        assert!(rule("users", "email").object("truncate").len() <= NAME_BYTES_MAX);
    }
}
