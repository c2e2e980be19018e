//! Declared tables: which keys each kind takes.

use std::collections::BTreeSet;
use std::time::Duration;

use toml::Spanned;
use weir_core::topology::{KeyType, Placement};

use super::super::error::Source;
use super::super::value::Time;
use super::super::{CachePolicy, TableRuleConfig, raw};
use super::{Checked, choice, non_empty, unknown};

#[derive(Clone, Copy)]
enum Kind {
    Sharded,
    Reference,
    Global,
}

const KINDS: [(&str, Kind); 3] = [("sharded", Kind::Sharded), ("reference", Kind::Reference), ("global", Kind::Global)];

pub(super) fn tables(source: &Source, raw: &[raw::Table], grows: bool) -> Checked<Vec<TableRuleConfig>> {
    let mut seen = BTreeSet::new();
    let mut tables = Vec::with_capacity(raw.len());
    for table in raw {
        let rule = rule(source, table)?;
        if let Some(column) = table.global_unique.iter().flatten().next().filter(|_| !grows) {
            let message = "global_unique is for databases of several shards";
            return Err(source.error(column.span(), message).hint(
                "with one shard a UNIQUE constraint of the table does it; with [hub] there may be several one day",
            ));
        }
        if !seen.insert((rule.schema.clone(), rule.name.clone())) {
            let message = format!("table `{}.{}` is declared twice", rule.schema, rule.name);
            return Err(source.error(table.name.span(), message));
        }
        tables.push(rule);
    }
    Ok(tables)
}

fn rule(source: &Source, raw: &raw::Table) -> Checked<TableRuleConfig> {
    let name = non_empty(source, &raw.name, "name")?;
    if let Some((schema, table)) = name.split_once('.') {
        let hint = format!("write schema = \"{schema}\" and name = \"{table}\"");
        return Err(source.error(raw.name.span(), "a table name has no dot").hint(hint));
    }
    let schema = match &raw.schema {
        None => "public".to_owned(),
        Some(schema) => non_empty(source, schema, "schema")?,
    };
    let placement = match choice(source, &raw.kind, "kind of table", &KINDS)? {
        Kind::Sharded => sharded(source, raw, &name)?,
        Kind::Reference => keyless(source, raw, Placement::Reference)?,
        Kind::Global => keyless(source, raw, Placement::Global)?,
    };
    let unique = unique(source, raw, &placement)?;
    let cache = raw.cache.as_ref().map_or(Ok(CachePolicy::Auto), |policy| policy_of(source, policy))?;
    Ok(TableRuleConfig { schema, name, placement, unique, cache })
}

/// Longest time for which an overtaken answer may be served.
const STALE_MAX: Duration = Duration::from_secs(3600);

fn policy_of(source: &Source, policy: &Spanned<toml::Value>) -> Checked<CachePolicy> {
    const KEY: &str = "stale_while_revalidate";
    const KNOWN: &str = "known: \"auto\", \"never\", { stale_while_revalidate = \"5s\" }";
    let refuse = |message: &str| Err(source.error(policy.span(), message).hint(KNOWN));
    match policy.get_ref() {
        toml::Value::String(word) if word == "auto" => Ok(CachePolicy::Auto),
        toml::Value::String(word) if word == "never" => Ok(CachePolicy::Never),
        toml::Value::Table(table) if table.len() == 1 && table.contains_key(KEY) => {
            match table[KEY].as_str().and_then(Time::parse) {
                Some(Time(time)) if !time.is_zero() && time <= STALE_MAX => {
                    Ok(CachePolicy::Stale(time.as_millis() as u32))
                }
                _ => refuse("stale_while_revalidate is a duration of more than 0 and at most 1h"),
            }
        }
        _ => refuse("unknown cache policy"),
    }
}

fn unique(source: &Source, raw: &raw::Table, placement: &Placement) -> Checked<Vec<String>> {
    let mut columns: Vec<String> = Vec::new();
    for column in raw.global_unique.iter().flatten() {
        let name = non_empty(source, column, "global_unique")?;
        let wrong = |message: String| source.error(column.span(), message);
        let Placement::Sharded { key, .. } = placement else {
            return Err(wrong(format!("a {} table has no global_unique", raw.kind.get_ref()))
                .hint("its rows are on every server that has it, so that a UNIQUE constraint of the table does it"));
        };
        if name.contains(',') {
            return Err(wrong("global_unique names single columns, not combinations of them".to_owned())
                .hint("make a generated column of them, or add the shard key to the UNIQUE constraint of the table"));
        }
        if *name == **key {
            return Err(wrong(format!("`{name}` is the shard key: equal keys meet on one shard"))
                .hint("remove it; a UNIQUE constraint of the table does it"));
        }
        if columns.contains(&name) {
            return Err(wrong(format!("`{name}` is named twice")));
        }
        columns.push(name);
    }
    Ok(columns)
}

fn sharded(source: &Source, raw: &raw::Table, name: &str) -> Checked<Placement> {
    let missing = |key: &str, example: &str| {
        source
            .error(raw.name.span(), format!("sharded table `{name}` has no {key}"))
            .hint(format!("add {key} = \"{example}\""))
    };
    let key = raw.key.as_ref().ok_or_else(|| missing("key", "user_id"))?;
    let key_type = raw.key_type.as_ref().ok_or_else(|| missing("type", "bigint"))?;
    let parsed = KeyType::parse(key_type.get_ref()).ok_or_else(|| {
        unknown(source, key_type, "key type", ["bigint", "text", "uuid", "integer", "smallint", "varchar"].into_iter())
    })?;
    Ok(Placement::Sharded { key: non_empty(source, key, "key")?.into(), key_type: parsed })
}

fn keyless(source: &Source, raw: &raw::Table, placement: Placement) -> Checked<Placement> {
    let stray: Option<&Spanned<String>> = raw.key.as_ref().or(raw.key_type.as_ref());
    match stray {
        None => Ok(placement),
        Some(stray) => {
            let message = format!("a {} table has neither key nor type", raw.kind.get_ref());
            Err(source.error(stray.span(), message).hint("remove them, or write kind = \"sharded\""))
        }
    }
}
