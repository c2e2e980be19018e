//! What a statement touches without naming it: tables behind views, in the bodies of functions, in DO blocks, and the
//! defaults of columns it leaves out.
//!
//! Invariant: only asked where there are several shards; a declared table that is reached in such a way is refused unless every
//! server would answer alike. Non-goal: names that a body puts together at run time.

use super::refuse;
use crate::error::UserError;
use crate::sql::facts::{Facts, Instance, Schema, TableName};
use crate::sql::lex::Token;
use crate::sql::word;
use crate::topology::Placement;
use crate::topology::catalog::reach::{for_each_word, is_system_schema};
use crate::topology::catalog::{Catalog, DefaultKind, Relation, RelationKind, RelationName};

/// The first declared tables among some names.
#[derive(Default)]
struct Behind<'n> {
    sharded: Option<&'n RelationName>,
    reference: Option<&'n RelationName>,
}

fn behind<'n>(names: &'n [RelationName], schema: &Schema<'_>) -> Behind<'n> {
    let mut behind = Behind::default();
    for name in names {
        match schema.rules.placement(&name.0, &name.1) {
            Placement::Sharded { .. } => behind.sharded = behind.sharded.or(Some(name)),
            Placement::Reference => behind.reference = behind.reference.or(Some(name)),
            Placement::Global => {}
        }
    }
    behind
}

fn table((schema, name): &RelationName) -> TableName {
    TableName { schema: schema.clone(), name: name.clone() }
}

/// Why a statement cannot be answered rightly, because of what stands behind the relations and functions it names.
pub fn refusal(facts: &Facts, schema: &Schema<'_>) -> Option<UserError> {
    let of_relations = facts.instances.iter().find_map(|instance| relation_refusal(instance, schema));
    of_relations.or_else(|| {
        let own = facts.functions.iter().filter(|function| function.schema.as_deref() != Some("pg_catalog"));
        own.into_iter().find_map(|function| function_refusal(&function.name, schema))
    })
}

/// A sharded table's own policies, rules, triggers and partitions are about colocated rows: that is the declaration's promise.
/// Triggers of a reference table run on every shard, and may use what is the same there.
pub fn relation_refusal(instance: &Instance, schema: &Schema<'_>) -> Option<UserError> {
    let placement = schema.placement(&instance.table);
    if matches!(placement, Placement::Sharded { .. }) {
        return None;
    }
    let relation = schema.relation(&instance.table)?;
    let reads = behind(&relation.reads, schema);
    if let Some(sharded) = reads.sharded {
        return Some(refuse::view_sharded(&instance.table, &table(sharded)));
    }
    let fired = behind(&relation.triggers, schema);
    let fired = fired.sharded.or(fired.reference.filter(|_| *placement == Placement::Global));
    if let Some(reached) = fired.filter(|_| instance.usage.is_write()) {
        return Some(refuse::trigger_reaches(&instance.table, &table(reached)));
    }
    let reference = reads.reference.filter(|_| instance.usage.is_write() && *placement == Placement::Global)?;
    Some(refuse::view_reference_write(&instance.table, &table(reference)))
}

/// A function runs on one server with that server's rows. One that cannot write may read what is the same everywhere.
pub fn function_refusal(name: &str, schema: &Schema<'_>) -> Option<UserError> {
    let function = schema.catalog.user_functions.get(name)?;
    if function.opaque && !schema.rules.is_empty() {
        return Some(refuse::function_opaque(name));
    }
    let behind = behind(&function.mentions, schema);
    let reached = behind.sharded.or(behind.reference.filter(|_| function.may_write))?;
    Some(refuse::function_reaches(name, &table(reached)))
}

/// Is it a view of nothing but reference tables, so that every shard shows the same?
pub fn is_reference_view(name: &TableName, schema: &Schema<'_>) -> bool {
    let is_view = |relation: &Relation| relation.kind == RelationKind::View;
    schema.relation(name).is_some_and(|relation| {
        is_view(relation)
            && !relation.reads.is_empty()
            && relation.reads.iter().all(|name| {
                *schema.rules.placement(&name.0, &name.1) == Placement::Reference
                    || schema.catalog.relation(&name.0, &name.1).is_some_and(is_view)
            })
    })
}

/// A name among tokens that is, or leads to, a sharded or reference table.
pub fn named(text: &str, tokens: &[Token], schema: &Schema<'_>) -> Option<String> {
    tokens.iter().filter_map(|&token| word::name(text, token)).find(|name| leads_to_declared(name, schema))
}

/// The same for any word of a text, in whatever quotes.
pub fn named_anywhere(text: &str, schema: &Schema<'_>) -> Option<String> {
    let mut found = None;
    for_each_word(text, &mut |word| {
        if found.is_none() && leads_to_declared(word, schema) {
            found = Some(word.to_owned());
        }
    });
    let odd =
        |name: &str| !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') && text.contains(name);
    found.or_else(|| declared(schema).find(|name| odd(name)).map(str::to_owned))
}

fn declared<'s>(schema: &Schema<'s>) -> impl Iterator<Item = &'s str> {
    schema.rules.iter().filter(|(_, _, placement)| **placement != Placement::Global).map(|(_, name, _)| name)
}

fn leads_to_declared(name: &str, schema: &Schema<'_>) -> bool {
    declared(schema).any(|table| table == name)
        || relations(name, schema.catalog).any(|relation| {
            let behind = behind(&relation.reads, schema);
            behind.sharded.is_some() || behind.reference.is_some()
        })
        || function_refusal(name, schema).is_some()
}

/// The user's relations of that name in any schema.
fn relations<'c>(name: &'c str, catalog: &'c Catalog) -> impl Iterator<Item = &'c Relation> {
    let own = catalog.relations.iter().filter(|(schema, _)| !is_system_schema(schema));
    own.filter_map(move |(_, relations)| relations.get(name))
}

/// Does a CREATE put rows of sharded tables into something that is not sharded (CREATE TABLE … AS, a temporary view)?
pub fn created_from(text: &str, tokens: &[Token], schema: &Schema<'_>) -> Option<String> {
    let query = tokens.iter().position(|token| token.depth == 0 && token.is_word(text, "as"))?;
    named(text, &tokens[query..], schema).filter(|name| {
        let of_rules = schema.rules.sharded().any(|(_, table, ..)| table == name);
        of_rules
            || relations(name, schema.catalog).any(|relation| behind(&relation.reads, schema).sharded.is_some())
            || function_refusal(name, schema).is_some()
    })
}

/// A column whose default may differ and that COPY does not fill; `listed`: the columns it names.
pub fn copy_default(name: &TableName, listed: Option<&[String]>, schema: &Schema<'_>) -> Option<UserError> {
    let listed = listed?;
    let left_out = schema.relation(name)?.columns.iter().find(|column| {
        column.default == DefaultKind::Differs && !listed.iter().any(|listed| **listed == *column.name)
    })?;
    Some(refuse::reference_default(name, &left_out.name))
}
