//! Where the schemas of a database's shards differ.
//!
//! Invariant: a drift names every shard, with what the object is there or that it is missing. Non-goal: which of them is right.

use std::collections::{BTreeMap, BTreeSet};

/// A column, index, constraint or sequence of a declared table, or the table itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Object {
    /// With its schema.
    pub table: String,
    /// `table`, `column`, `index`, `constraint`, `sequence`.
    pub kind: String,
    pub name: String,
}

/// The objects of one shard with their definitions, as that server writes them.
pub type Objects = BTreeMap<Object, String>;

/// An object that is not the same everywhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Drift {
    pub object: Object,
    /// Its definition on each shard, in their order.
    pub definitions: Vec<Option<String>>,
}

/// What differs. Where a table itself is missing on a shard, its parts are not listed besides.
pub fn drift(shards: &[Objects]) -> Vec<Drift> {
    let objects: BTreeSet<&Object> = shards.iter().flat_map(BTreeMap::keys).collect();
    let mut found = Vec::new();
    let mut missing = BTreeSet::new();
    let is_table = |object: &Object| object.kind == "table";
    let mut look = |object: &Object| {
        let definitions: Vec<Option<&String>> = shards.iter().map(|shard| shard.get(object)).collect();
        if definitions.windows(2).any(|pair| pair[0] != pair[1]) && !missing.contains(&object.table) {
            if is_table(object) {
                missing.insert(object.table.clone());
            }
            let definitions = definitions.into_iter().map(Option::<&String>::cloned).collect();
            found.push(Drift { object: object.clone(), definitions });
        }
    };
    objects.iter().copied().filter(|object| is_table(object)).for_each(&mut look);
    objects.iter().copied().filter(|object| !is_table(object)).for_each(&mut look);
    found.sort_by(|one, other| one.object.cmp(&other.object));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(objects: &[(&str, &str, &str)]) -> Objects {
        let object = |(kind, name, definition): &(&str, &str, &str)| {
            let table = if *kind == "table" { *name } else { "t" };
            (Object { table: table.into(), kind: (*kind).into(), name: (*name).into() }, (*definition).to_owned())
        };
        objects.iter().map(object).collect()
    }

    #[test]
    fn what_differs_is_named_with_every_shard() {
        let (table, a) = (("table", "t", "table"), ("column", "a", "bigint"));
        assert!(drift(&[shard(&[table, a]), shard(&[table, a])]).is_empty());
        let found = drift(&[shard(&[table, a]), shard(&[table, ("column", "a", "text"), ("index", "i", "on a")])]);
        let shown: Vec<_> = found.iter().map(|drift| (&*drift.object.name, drift.definitions.clone())).collect();
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(shown, [("a", vec![some("bigint"), some("text")]), ("i", vec![None, some("on a")])]);
        let missing = drift(&[shard(&[table, a]), shard(&[])]);
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].definitions, [some("table"), None]);
    }
}
