//! The tables whose rows go with the slots of their keys.
//!
//! Invariant: what moves, what is guarded, what is counted and what is looked for afterwards are the same tables.

use super::{KeySet, KeyType, TableRules};

/// What is known of the values of unique columns, each shard a part of it: by the slot of the value's own hash.
const VALUES: Spread<'static> =
    Spread { schema: "weir", name: "unique_value", key: "value", key_type: KeyType::Text, by_slot: true };

/// One of them, by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spread<'r> {
    pub schema: &'r str,
    pub name: &'r str,
    pub key: &'r str,
    pub key_type: KeyType,
    /// Its keys are none of those that may be isolated: a row goes with its slot.
    pub by_slot: bool,
}

/// The declared tables, and what weir keeps by slot itself where columns are unique over all shards.
pub fn spread(rules: &TableRules) -> impl Iterator<Item = Spread<'_>> {
    let declared = rules.sharded();
    let declared = declared.map(|(schema, name, key, key_type)| Spread { schema, name, key, key_type, by_slot: false });
    declared.chain(rules.any_unique().then_some(VALUES))
}

/// Those that have rows of these keys.
pub fn spread_of<'r>(rules: &'r TableRules, keys: &KeySet) -> impl Iterator<Item = Spread<'r>> {
    let any_slot = !keys.slots().is_empty();
    spread(rules).filter(move |table| any_slot || !table.by_slot)
}

/// Tables as three columns: schemas, names, keys.
pub fn names<'r>(tables: impl Iterator<Item = Spread<'r>>) -> [Vec<&'r str>; 3] {
    let mut columns = [const { Vec::new() }; 3];
    for Spread { schema, name, key, .. } in tables {
        columns.iter_mut().zip([schema, name, key]).for_each(|(column, value)| column.push(value));
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::super::Placement;
    use super::*;

    #[test]
    fn values_of_unique_columns_go_with_slots_and_not_with_keys() {
        let mut rules = TableRules::default();
        rules.insert("public", "users", Placement::Sharded { key: "id".into(), key_type: KeyType::Int });
        let of = |rules: &TableRules, keys: &str| {
            let keys = KeySet::parse(keys).expect("keys");
            spread_of(rules, &keys).map(|table| table.name.to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(of(&rules, "1"), ["users"]);
        rules.insert_unique("public", "users", vec!["email".into()]);
        assert_eq!(of(&rules, "1"), ["users", "unique_value"]);
        assert_eq!(of(&rules, "+0090000000000001"), ["users"]);
    }
}
