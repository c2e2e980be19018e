//! Declared tables against the real schema: what would go wrong, said before it does.

use std::fmt;

use tokio_postgres::{Error, Row};
use weir_core::sql::facts::family;
use weir_core::topology::catalog::{Catalog, Relation, RelationKind};
use weir_core::topology::{KeyType, Placement, TableRules};

/// One foreign key; the columns pair up by index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignKey {
    /// Schema and name of the referencing table.
    pub table: (String, String),
    pub referenced: (String, String),
    pub columns: Vec<String>,
    pub referenced_columns: Vec<String>,
}

/// Something that a declaration and the schema do not agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleProblem {
    /// `schema.table`
    pub table: String,
    pub reason: RuleReason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleReason {
    /// Fine: it can still be created through weir.
    NotYetCreated,
    /// Fine unless such rows are written: no shard owns a null key.
    NullableKey {
        key: String,
    },
    NotATable {
        kind: RelationKind,
    },
    NoKeyColumn {
        key: String,
    },
    KeyTypeDiffers {
        key: String,
        declared: KeyType,
        type_oid: u32,
    },
    /// Each shard would enforce it for its own rows only.
    UniqueWithoutKey {
        key: String,
        columns: Vec<String>,
    },
    /// The rows of both sides do not always meet on one shard.
    ForeignKeyApart {
        referenced: String,
        why: &'static str,
    },
}

impl RuleProblem {
    /// False for what is only worth knowing.
    pub fn is_problem(&self) -> bool {
        !matches!(self.reason, RuleReason::NotYetCreated | RuleReason::NullableKey { .. })
    }
}

impl fmt::Display for RuleProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {}: ", self.table)?;
        match &self.reason {
            RuleReason::NotYetCreated => write!(f, "declared, but not yet created"),
            RuleReason::NullableKey { key } => write!(f, "key column {key} may be null; declare it NOT NULL"),
            RuleReason::NotATable { kind } => write!(f, "declared as a table, but it is a {kind:?}"),
            RuleReason::NoKeyColumn { key } => write!(f, "has no column {key}, its declared key"),
            RuleReason::KeyTypeDiffers { key, declared, type_oid } => {
                write!(f, "key column {key} is declared {} but has type OID {type_oid}", declared.name())
            }
            RuleReason::UniqueWithoutKey { key, columns } => {
                let columns = columns.iter().map(|name| if name.is_empty() { "<expression>" } else { name });
                let columns = columns.collect::<Vec<_>>().join(", ");
                write!(f, "unique ({columns}) lacks the key {key}, so it holds within each shard only; add {key} to it")
            }
            RuleReason::ForeignKeyApart { referenced, why } => write!(f, "foreign key to {referenced}: {why}"),
        }
    }
}

/// Everything that the declarations and the schema disagree on, in order of table.
pub fn check_rules(rules: &TableRules, catalog: &Catalog, foreign_keys: &[ForeignKey]) -> Vec<RuleProblem> {
    let mut problems = Vec::new();
    for (schema, name, placement) in rules.iter() {
        let mut push = |reason| problems.push(RuleProblem { table: format!("{schema}.{name}"), reason });
        let Some(relation) = catalog.relation(schema, name) else {
            push(RuleReason::NotYetCreated);
            continue;
        };
        if !matches!(relation.kind, RelationKind::PlainTable | RelationKind::OtherTable)
            && *placement != Placement::Global
        {
            push(RuleReason::NotATable { kind: relation.kind });
            continue;
        }
        if let Placement::Sharded { key, key_type } = placement {
            let everywhere = rules.unique_columns(schema, name);
            sharded(relation, (key, *key_type), everywhere, &mut push);
        }
    }
    problems.extend(foreign_keys.iter().filter_map(|foreign_key| apart(rules, foreign_key)));
    problems
}

/// `everywhere`: columns that weir keeps unique over all shards.
fn sharded(
    relation: &Relation,
    (key, declared): (&str, KeyType),
    everywhere: &[Box<str>],
    push: &mut impl FnMut(RuleReason),
) {
    let Some(column) = relation.columns.iter().find(|column| &*column.name == key) else {
        push(RuleReason::NoKeyColumn { key: key.to_owned() });
        return;
    };
    if family(column.type_oid) != Some(declared) {
        push(RuleReason::KeyTypeDiffers { key: key.to_owned(), declared, type_oid: column.type_oid });
    }
    if !column.not_null {
        push(RuleReason::NullableKey { key: key.to_owned() });
    }
    for columns in &relation.unique_columns {
        let kept = matches!(columns.as_slice(), [only] if everywhere.contains(only));
        if !kept && columns.iter().all(|column| &**column != key) {
            let columns = columns.iter().map(ToString::to_string).collect();
            push(RuleReason::UniqueWithoutKey { key: key.to_owned(), columns });
        }
    }
}

fn apart(rules: &TableRules, foreign_key: &ForeignKey) -> Option<RuleProblem> {
    let placement = |(schema, name): &(String, String)| rules.placement(schema, name);
    let why = match (placement(&foreign_key.table), placement(&foreign_key.referenced)) {
        // A copy is everywhere.
        (_, Placement::Reference) | (Placement::Global, Placement::Global) => None,
        (Placement::Sharded { key, key_type }, Placement::Sharded { key: other, key_type: other_type }) => {
            let mut pairs = foreign_key.columns.iter().zip(&foreign_key.referenced_columns);
            let together = key_type == other_type && pairs.any(|(from, to)| **from == **key && **to == **other);
            (!together).then_some("it does not pair the shard keys, so the rows may live on different shards")
        }
        (Placement::Sharded { .. }, Placement::Global) => {
            Some("the referenced table is on the home shard only; declare it as a reference table")
        }
        (Placement::Reference, _) => Some("a reference table is on every shard, the referenced rows are not"),
        (Placement::Global, Placement::Sharded { .. }) => Some("the referenced rows are spread over the shards"),
    };
    let name = |(schema, name): &(String, String)| format!("{schema}.{name}");
    why.map(|why| RuleProblem {
        table: name(&foreign_key.table),
        reason: RuleReason::ForeignKeyApart { referenced: name(&foreign_key.referenced), why },
    })
}

impl ForeignKey {
    pub(super) fn from_row(row: &Row) -> Result<Self, Error> {
        Ok(ForeignKey {
            table: (row.try_get(0)?, row.try_get(1)?),
            referenced: (row.try_get(2)?, row.try_get(3)?),
            columns: row.try_get(4)?,
            referenced_columns: row.try_get(5)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weir_core::topology::catalog::{Column, DefaultKind};

    fn relation(columns: &[(&str, u32)], unique: &[&[&str]]) -> Relation {
        let column = |(name, type_oid): &(&str, u32)| Column {
            name: (*name).into(),
            type_oid: *type_oid,
            byte_order: true,
            not_null: !name.starts_with("maybe"),
            default: DefaultKind::None,
        };
        Relation {
            kind: RelationKind::PlainTable,
            columns: columns.iter().map(column).collect(),
            writes_spread: false,
            referenced: false,
            unique_columns: unique.iter().map(|names| names.iter().map(|name| (*name).into()).collect()).collect(),
            reads: Vec::new(),
            triggers: Vec::new(),
        }
    }

    fn by(key: &str, key_type: KeyType) -> Placement {
        Placement::Sharded { key: key.into(), key_type }
    }

    /// Problems of one sharded table `t`.
    fn problems(relation: Relation, placement: Placement) -> Vec<RuleReason> {
        let mut rules = TableRules::default();
        rules.insert("public", "t", placement);
        let mut catalog = Catalog::default();
        catalog.relations.entry("public".into()).or_default().insert("t".into(), relation);
        check_rules(&rules, &catalog, &[]).into_iter().map(|problem| problem.reason).collect()
    }

    #[test]
    fn a_good_table_has_no_problem() {
        assert!(
            problems(relation(&[("id", 23), ("name", 25)], &[&["name", "id"], &["id"]]), by("id", KeyType::Int))
                .is_empty()
        );
        assert!(problems(relation(&[("mail", 1043)], &[]), by("mail", KeyType::Text)).is_empty());
    }

    #[test]
    fn keys_must_exist_and_have_their_type() {
        let missing = problems(relation(&[("id", 20)], &[]), by("user_id", KeyType::Int));
        assert_eq!(missing, [RuleReason::NoKeyColumn { key: "user_id".into() }]);
        for (oid, declared) in [(1042, KeyType::Text), (25, KeyType::Int), (1700, KeyType::Int), (25, KeyType::Uuid)] {
            let found = problems(relation(&[("id", oid)], &[]), by("id", declared));
            assert!(matches!(&found[..], [RuleReason::KeyTypeDiffers { .. }]), "{oid}: {found:?}");
        }
        let nullable = problems(relation(&[("maybe", 20)], &[]), by("maybe", KeyType::Int));
        assert_eq!(nullable, [RuleReason::NullableKey { key: "maybe".into() }]);
    }

    #[test]
    fn unique_indexes_must_hold_the_key() {
        let found = problems(relation(&[("id", 20)], &[&["email"], &["", "id"], &[""]]), by("id", KeyType::Int));
        let columns: Vec<_> = found
            .iter()
            .map(|reason| match reason {
                RuleReason::UniqueWithoutKey { columns, .. } => columns.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(columns, [vec!["email".to_owned()], vec![String::new()]]);
    }

    #[test]
    fn an_absent_table_is_no_problem() {
        let mut rules = TableRules::default();
        rules.insert("public", "later", Placement::Reference);
        let found = check_rules(&rules, &Catalog::default(), &[]);
        assert_eq!(found.len(), 1);
        assert!(!found[0].is_problem());
    }

    #[test]
    fn foreign_keys_must_stay_on_one_shard() {
        let mut rules = TableRules::default();
        rules.insert("public", "users", by("user_id", KeyType::Int));
        rules.insert("public", "orders", by("buyer", KeyType::Int));
        rules.insert("public", "products", Placement::Reference);
        let key = |table: &str, referenced: &str, columns: &[(&str, &str)]| ForeignKey {
            table: ("public".into(), table.into()),
            referenced: ("public".into(), referenced.into()),
            columns: columns.iter().map(|(from, _)| (*from).into()).collect(),
            referenced_columns: columns.iter().map(|(_, to)| (*to).into()).collect(),
        };
        let is_bad =
            |foreign_key| check_rules(&rules, &Catalog::default(), &[foreign_key]).iter().any(RuleProblem::is_problem);
        assert!(!is_bad(key("orders", "users", &[("buyer", "user_id")])));
        assert!(is_bad(key("orders", "users", &[("seller", "user_id")])));
        assert!(!is_bad(key("orders", "products", &[("product", "id")])));
        assert!(!is_bad(key("other", "products", &[("product", "id")])));
        assert!(!is_bad(key("other", "another", &[("a", "b")])));
        assert!(is_bad(key("orders", "other", &[("a", "b")])));
        assert!(is_bad(key("other", "users", &[("a", "user_id")])));
        assert!(is_bad(key("products", "users", &[("a", "user_id")])));
        assert!(is_bad(key("products", "other", &[("a", "b")])));
    }
}
