//! A plan in words, for ROUTE and EXPLAIN.

use super::{Access, ExplainFormat, Plan, Target};
use crate::id::ShardId;
use crate::merge::{FoldKind, MergeSpec};
use crate::sql::lex::Token;
use crate::sql::word;
use crate::topology::{KeySet, Topology};

impl ExplainFormat {
    /// The format that the tokens in front of the explained statement ask for; `None`: another one.
    pub fn of(sql: &str, options: &[Token]) -> Option<Self> {
        let Some(at) = options.iter().position(|token| token.is_word(sql, "format")) else {
            return Some(ExplainFormat::Text);
        };
        let token = *options.get(at + 1)?;
        let name =
            word::name(sql, token).or_else(|| word::string_value(sql, token).map(|value| value.to_lowercase()))?;
        match &*name {
            "text" => Some(ExplainFormat::Text),
            "json" => Some(ExplainFormat::Json),
            "yaml" => Some(ExplainFormat::Yaml),
            "xml" => Some(ExplainFormat::Xml),
            _ => None,
        }
    }

    /// The rows of the answer: what weir does ([`explain`] and more), then what each shard says (`(its name, its rows)`).
    pub fn join(self, facts: &[(String, String)], shards: &[(&str, Vec<String>)]) -> Vec<String> {
        match self {
            ExplainFormat::Text => {
                let mut rows = vec!["Weir".to_owned()];
                rows.extend(facts.iter().map(|(name, value)| format!("  {name}: {value}")));
                for (name, lines) in shards {
                    rows.push(format!("Shard {name}"));
                    rows.extend(lines.iter().map(|line| format!("  {line}")));
                }
                rows
            }
            ExplainFormat::Json => {
                let facts: Vec<String> =
                    facts.iter().map(|(name, value)| format!("      {}: {}", json(name), json(value))).collect();
                let shard = |(name, rows): &(&str, Vec<String>)| {
                    format!("      {{\"Shard\": {}, \"Explain\": {}}}", json(name), rows.join("\n"))
                };
                let shards: Vec<String> = shards.iter().map(shard).collect();
                vec![format!(
                    "[\n  {{\n    \"Weir\": {{\n{}\n    }},\n    \"Shards\": [\n{}\n    ]\n  }}\n]",
                    facts.join(",\n"),
                    shards.join(",\n")
                )]
            }
            ExplainFormat::Yaml => {
                let mut lines = vec!["- Weir: ".to_owned()];
                // A JSON string is a YAML one.
                lines.extend(facts.iter().map(|(name, value)| format!("    {name}: {}", json(value))));
                lines.push("  Shards: ".to_owned());
                for (name, rows) in shards {
                    lines.push(format!("    - Shard: {}", json(name)));
                    lines.push("      Explain: ".to_owned());
                    lines.extend(indented(rows, 8));
                }
                vec![lines.join("\n")]
            }
            ExplainFormat::Xml => {
                let mut lines = vec!["<explain xmlns=\"http://www.postgresql.org/2009/explain\">".to_owned()];
                lines.push("  <Weir>".to_owned());
                lines.extend(facts.iter().map(|(name, value)| format!("    <{name}>{}</{name}>", xml(value))));
                lines.push("  </Weir>".to_owned());
                for (name, rows) in shards {
                    lines.push(format!("  <Shard name=\"{}\">", xml(name)));
                    lines.extend(indented(rows, 4));
                    lines.push("  </Shard>".to_owned());
                }
                lines.push("</explain>".to_owned());
                vec![lines.join("\n")]
            }
        }
    }
}

/// A shard's text some columns further in.
fn indented(rows: &[String], columns: usize) -> impl Iterator<Item = String> {
    let blanks = " ".repeat(columns);
    rows.iter().flat_map(|row| row.lines()).map(move |line| format!("{blanks}{line}"))
}

/// Text of an element or attribute.
fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A JSON string.
fn json(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => quoted.extend(format!("\\u{:04x}", u32::from(letter)).chars()),
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

/// Name and value of everything an operator may want to know of a plan, in reading order.
pub fn explain(plan: &Plan, topology: &Topology) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
    row("target", target_name(&plan.target).to_owned());
    row("shards", shards(&plan.target, topology));
    if let Some(slots) = slots(plan) {
        row("slots", slots);
    }
    if let Some(guests) = guests(plan, topology) {
        row("guests", guests);
    }
    row(
        "access",
        match plan.access {
            Access::Read if plan.target == Target::Engine => {
                "read: the hub, from the primaries of all shards".to_owned()
            }
            Access::Read => "read: a replica that is fresh enough, or the primary".to_owned(),
            Access::PrimaryRead(reason) => format!("read on the primary: {reason}"),
            Access::Write => "write: the primary".to_owned(),
        },
    );
    row("reason", plan.reason.sentence(topology));
    row("merge", plan.merge.as_deref().map_or_else(|| "none".to_owned(), merge));
    row(
        "cache",
        match (plan.cacheable, plan.stale_ms) {
            (Ok(()), None) => "cacheable".to_owned(),
            (Ok(()), Some(stale_ms)) => {
                format!("cacheable; an overtaken answer is served for up to {stale_ms} ms while it is refreshed")
            }
            (Err(reason), _) => format!("not cached: {reason}"),
        },
    );
    rows
}

fn target_name(target: &Target) -> &'static str {
    match target {
        Target::Home => "home",
        Target::One(_) => "one shard",
        Target::Any => "any shard",
        Target::Many(_) => "several shards",
        Target::All => "all shards",
        Target::Engine => "fallback engine",
    }
}

fn shards(target: &Target, topology: &Topology) -> String {
    let names = |shards: &[ShardId]| shards.iter().map(|shard| topology.name_of(*shard)).collect::<Vec<_>>().join(", ");
    match target {
        Target::Home => topology.name_of(topology.home),
        Target::One(shard) => topology.name_of(*shard),
        Target::Many(shards) => names(shards),
        Target::Any => format!("any of {}", names(topology.active())),
        Target::All | Target::Engine => names(topology.active()),
    }
}

fn slots(plan: &Plan) -> Option<String> {
    match &plan.reason {
        super::RouteReason::Key { slot, .. } => Some(slot.index().to_string()),
        _ => None,
    }
}

/// Which rows of the shards it is sent to are left out.
fn guests(plan: &Plan, topology: &Topology) -> Option<String> {
    let asked = |shard: ShardId| match &plan.target {
        Target::Many(shards) => shards.contains(&shard),
        _ => true,
    };
    let met = plan.guests.as_ref()?.iter().filter(|(shard, _)| asked(**shard));
    let one =
        |(shard, keys): (&ShardId, &KeySet)| format!("slots {keys} of {}", shards(&Target::One(*shard), topology));
    let met: Vec<String> = met.map(one).collect();
    (!met.is_empty()).then(|| format!("left out: {}", met.join(", ")))
}

/// The merge in one line.
pub fn merge(spec: &MergeSpec) -> String {
    let mut parts = Vec::new();
    if let Some(group) = &spec.group {
        let keys: Vec<String> = group.keys.iter().map(ToString::to_string).collect();
        let folds: Vec<String> =
            group.folds.iter().map(|fold| format!("{}:{}", fold.column, fold_name(fold.kind))).collect();
        parts.push(format!("group by [{}] folding [{}]", keys.join(" "), folds.join(" ")));
        if !group.computed.is_empty() {
            let computed: Vec<String> = group.computed.iter().map(|computed| computed.0.to_string()).collect();
            parts.push(format!("computing [{}]", computed.join(" ")));
        }
        if group.having.is_some() {
            parts.push("having".to_owned());
        }
    }
    if spec.distinct {
        parts.push("distinct".to_owned());
    }
    if !spec.distinct_on.is_empty() {
        let columns: Vec<String> = spec.distinct_on.iter().map(ToString::to_string).collect();
        parts.push(format!("first of each [{}]", columns.join(" ")));
    }
    if !spec.order.is_empty() {
        let keys: Vec<String> = spec
            .order
            .iter()
            .map(|key| {
                let direction = if key.descending { " desc" } else { "" };
                let nulls = if key.nulls_first { " nulls first" } else { " nulls last" };
                let bytes = if key.byte_order { " by bytes" } else { "" };
                format!("{}{direction}{nulls}{bytes}", key.column)
            })
            .collect();
        parts.push(format!("order by [{}]", keys.join(", ")));
    }
    if spec.offset > 0 {
        parts.push(format!("offset {}", spec.offset));
    }
    if let Some(limit) = spec.limit {
        parts.push(format!("limit {limit}{}", if spec.ties { " with ties" } else { "" }));
    }
    if spec.hidden > 0 {
        parts.push(format!("{} hidden", spec.hidden));
    }
    if parts.is_empty() { "rows as they come".to_owned() } else { parts.join(", ") }
}

fn fold_name(kind: FoldKind) -> String {
    match kind {
        FoldKind::Count => "count".to_owned(),
        FoldKind::Sum => "sum".to_owned(),
        FoldKind::Min { byte_order: true } => "min by bytes".to_owned(),
        FoldKind::Max { byte_order: true } => "max by bytes".to_owned(),
        FoldKind::Min { .. } => "min".to_owned(),
        FoldKind::Max { .. } => "max".to_owned(),
        FoldKind::Avg { sum, count } => format!("avg({sum}/{count})"),
        FoldKind::And => "and".to_owned(),
        FoldKind::Or => "or".to_owned(),
    }
}
