//! What a view, rule, policy, partition or function reaches: from the direct uses a server's catalogue tells to everything
//! behind them.
//!
//! Invariant: nothing that is mentioned by name is left out; a word that happens to be a table's name counts as the table, so
//! the answer may hold too much, never too little. Non-goal: names that a body puts together at run time.

use std::collections::{BTreeMap, BTreeSet};

use super::{Catalog, RelationName};

/// Longer bodies are not read.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// What one relation or function uses directly.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    pub relations: BTreeSet<RelationName>,
    /// By bare name: all functions of that name together.
    pub functions: BTreeSet<Box<str>>,
}

/// The direct uses of a whole catalogue.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Graph {
    pub relations: BTreeMap<RelationName, Uses>,
    pub functions: BTreeMap<Box<str>, Uses>,
    /// What the triggers of a relation use.
    pub triggers: BTreeMap<RelationName, Uses>,
    /// Functions that may leave state behind in the session by themselves.
    pub keepers: BTreeSet<Box<str>>,
}

impl Graph {
    /// Adds what the body of a user function mentions; `None`: it could not be read.
    pub fn add_body(&mut self, function: &str, body: Option<&str>, names: &Names, catalog: &mut Catalog) {
        match body {
            Some(body) if body.len() <= BODY_BYTES_MAX => {
                let uses = self.functions.entry(function.into()).or_default();
                names.mentioned(body, uses);
                uses.functions.remove(function);
            }
            _ => catalog.user_functions.entry(function.into()).or_default().opaque = true,
        }
    }

    /// Fills in [`super::Relation::reads`], [`super::Relation::triggers`], [`super::UserFunction::mentions`] and
    /// [`super::Catalog::keepers`].
    pub fn close(&self, catalog: &mut Catalog) {
        let opaque: BTreeSet<Box<str>> = catalog
            .user_functions
            .iter()
            .filter(|(_, function)| function.opaque)
            .map(|(name, _)| name.clone())
            .collect();
        let keeps = |called: &BTreeSet<Box<str>>| called.iter().any(|name| self.keepers.contains(name));
        for (name, uses) in &self.relations {
            let (mut reached, called) = self.follow(uses);
            if keeps(&called) {
                catalog.keepers.read.insert(name.1.clone());
            }
            reached.remove(name);
            if let Some(relation) = catalog.relations.get_mut(&name.0).and_then(|names| names.get_mut(&name.1)) {
                relation.reads = reached.into_iter().collect();
            }
        }
        for (name, uses) in &self.triggers {
            let (mut reached, called) = self.follow(uses);
            if keeps(&called) {
                catalog.keepers.written.insert(name.1.clone());
            }
            reached.remove(name);
            if let Some(relation) = catalog.relations.get_mut(&name.0).and_then(|names| names.get_mut(&name.1)) {
                relation.triggers = reached.into_iter().collect();
            }
        }
        for (name, uses) in &self.functions {
            let (reached, called) = self.follow(uses);
            if keeps(&called) || self.keepers.contains(name) {
                catalog.keepers.functions.insert(name.clone());
            }
            let function = catalog.user_functions.entry(name.clone()).or_default();
            function.mentions = reached.into_iter().collect();
            function.opaque |= called.iter().any(|name| opaque.contains(name));
        }
    }

    /// All relations behind some uses, and all functions on the way.
    fn follow(&self, start: &Uses) -> (BTreeSet<RelationName>, BTreeSet<Box<str>>) {
        let mut relations = BTreeSet::new();
        let mut functions = BTreeSet::new();
        let mut open = vec![start];
        while let Some(uses) = open.pop() {
            for name in &uses.relations {
                if relations.insert(name.clone()) {
                    open.extend(self.relations.get(name));
                }
            }
            for name in &uses.functions {
                if functions.insert(name.clone()) {
                    open.extend(self.functions.get(name));
                }
            }
        }
        (relations, functions)
    }
}

/// Names a body may mention.
#[derive(Clone, Debug, Default)]
pub struct Names {
    relations: BTreeMap<Box<str>, Vec<RelationName>>,
    functions: BTreeSet<Box<str>>,
}

impl Names {
    /// The relations outside the system schemas, and the user's functions, of what is known so far.
    pub fn of(catalog: &Catalog) -> Self {
        let mut names = Names { functions: catalog.user_functions.keys().cloned().collect(), ..Names::default() };
        for (schema, relations) in catalog.relations.iter().filter(|(schema, _)| !is_system_schema(schema)) {
            for name in relations.keys() {
                names.relations.entry(name.clone()).or_default().push((schema.clone(), name.clone()));
            }
        }
        names
    }

    fn mentioned(&self, body: &str, uses: &mut Uses) {
        let mut seen = |name: &str| {
            uses.relations.extend(self.relations.get(name).into_iter().flatten().cloned());
            uses.functions.extend(self.functions.get(name).cloned());
        };
        let mut unusual = Vec::new();
        for name in self.relations.keys().chain(&self.functions) {
            // A name that is not one word can only stand in double quotes.
            if !is_word(name) && body.contains(&*name.replace('"', "\"\"")) {
                unusual.push(name);
            }
        }
        for name in unusual {
            seen(name);
        }
        for_each_word(body, &mut seen);
    }
}

/// Calls `seen` with every word of a text, as it is written and as Postgres folds it.
pub fn for_each_word(text: &str, seen: &mut impl FnMut(&str)) {
    for word in text.split(|char: char| !is_word_char(char)).filter(|word| !word.is_empty()) {
        seen(word);
        if word.bytes().any(|byte| byte.is_ascii_uppercase()) {
            seen(&word.to_ascii_lowercase());
        }
    }
}

/// Is it a schema whose relations describe the server itself?
pub fn is_system_schema(schema: &str) -> bool {
    matches!(schema, "pg_catalog" | "information_schema" | "pg_toast")
}

fn is_word(name: &str) -> bool {
    name.chars().all(is_word_char)
}

fn is_word_char(char: char) -> bool {
    char.is_ascii_alphanumeric() || matches!(char, '_' | '$') || !char.is_ascii()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::catalog::{Relation, RelationKind, UserFunction};

    fn named(name: &str) -> RelationName {
        ("public".into(), name.into())
    }

    fn catalog() -> Catalog {
        let mut catalog = Catalog::default();
        let public = catalog.relations.entry("public".into()).or_default();
        for name in ["orders", "orders_view", "top", "Odd name", "other"] {
            let relation = Relation {
                kind: RelationKind::View,
                columns: Vec::new(),
                writes_spread: false,
                referenced: false,
                unique_columns: Vec::new(),
                reads: Vec::new(),
                triggers: Vec::new(),
            };
            public.insert(name.into(), relation);
        }
        for name in ["direct", "indirect", "innocent", "huge", "calls_huge"] {
            catalog.user_functions.insert(name.into(), UserFunction::default());
        }
        catalog
    }

    fn reads<'c>(catalog: &'c Catalog, name: &str) -> &'c [RelationName] {
        catalog.relation("public", name).map_or(&[], |relation| relation.reads.as_slice())
    }

    #[test]
    fn views_and_functions_reach_what_is_behind_them() {
        let mut catalog = catalog();
        let names = Names::of(&catalog);
        let mut graph = Graph::default();
        graph.relations.entry(named("orders_view")).or_default().relations.insert(named("orders"));
        graph.triggers.entry(named("other")).or_default().functions.insert("direct".into());
        graph.relations.entry(named("top")).or_default().functions.insert("indirect".into());
        let huge = "x".repeat(BODY_BYTES_MAX + 1);
        for (function, body) in [
            ("direct", Some("BEGIN RETURN (SELECT count(*) FROM Orders); END")),
            ("indirect", Some("select 1 from orders_view; select * from \"Odd name\"")),
            ("innocent", Some("select 'reorders', orders2, disorders")),
            ("huge", Some(huge.as_str())),
            ("calls_huge", Some("select HUGE()")),
        ] {
            graph.add_body(function, body, &names, &mut catalog);
        }
        graph.keepers.insert("direct".into());
        graph.close(&mut catalog);
        assert_eq!(catalog.keepers.functions, ["direct".into()].into());
        assert_eq!(catalog.keepers.written, ["other".into()].into());
        assert_eq!(reads(&catalog, "orders_view"), [named("orders")]);
        assert_eq!(reads(&catalog, "top"), [named("Odd name"), named("orders"), named("orders_view")]);
        assert!(reads(&catalog, "orders").is_empty() && reads(&catalog, "other").is_empty());
        assert_eq!(catalog.relation("public", "other").expect("there").triggers, [named("orders")]);
        let function = |name: &str| catalog.user_functions[name].clone();
        assert_eq!(function("direct").mentions, [named("orders")]);
        assert_eq!(function("indirect").mentions, [named("Odd name"), named("orders"), named("orders_view")]);
        assert_eq!(function("innocent"), UserFunction::default());
        assert!(function("huge").opaque && function("calls_huge").opaque);
    }

    #[test]
    fn a_circle_ends() {
        let mut catalog = catalog();
        let mut graph = Graph::default();
        graph.relations.entry(named("orders")).or_default().relations.insert(named("other"));
        graph.relations.entry(named("other")).or_default().relations.insert(named("orders"));
        graph.close(&mut catalog);
        assert_eq!(reads(&catalog, "orders"), [named("other")]);
        assert_eq!(reads(&catalog, "other"), [named("orders")]);
    }
}
