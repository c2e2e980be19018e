//! Planner decisions as data: every `tests/golden/plan/*.txt` holds statements, values, and the plan they must get.
//!
//! A block is the statement, optionally `params: …` (text values separated by `|`, `NULL` for null), a line `---`, and the
//! expected lines. `WEIR_BLESS=1` writes what the planner says into the files; the diff is reviewed like code.

mod plan_fixture;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use plan_fixture::{Fixture, TABLES};
use weir_core::fresh::{Dependency, TableHash};
use weir_core::plan::{Access, Compiled, Datum, Plan, Target, Values, explain};
use weir_core::sql::lex::lex;
use weir_core::topology::hash::hash_bytes_extended;

struct Block {
    /// Comment lines in front of it.
    comment: String,
    sql: String,
    params: Option<String>,
    expected: String,
}

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/plan")
}

fn parse(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    for chunk in text.split("\n\n").filter(|chunk| !chunk.trim().is_empty()) {
        let mut block = Block { comment: String::new(), sql: String::new(), params: None, expected: String::new() };
        let mut below = false;
        for line in chunk.trim_matches('\n').lines() {
            if below {
                let _ = writeln!(block.expected, "{line}");
            } else if line == "---" {
                below = true;
            } else if line.starts_with('#') {
                let _ = writeln!(block.comment, "{line}");
            } else if let Some(params) = line.strip_prefix("params:") {
                block.params = Some(params.trim().to_owned());
            } else {
                if !block.sql.is_empty() {
                    block.sql.push('\n');
                }
                block.sql.push_str(line);
            }
        }
        blocks.push(block);
    }
    blocks
}

#[test]
#[allow(clippy::disallowed_methods)] // a test reads its own data, and one switch
fn plans_are_as_written_down() {
    let fixture = Fixture::storefront(4);
    let bless = std::env::var("WEIR_BLESS").is_ok();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(golden_dir()).expect("golden directory").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no golden files");
    let mut failures = String::new();
    for file in files {
        let blocks = parse(&std::fs::read_to_string(&file).expect("golden file"));
        let mut written = String::new();
        for block in &blocks {
            if block.sql.is_empty() {
                let _ = writeln!(written, "{}", block.comment);
                continue;
            }
            let params: Vec<Option<&str>> = block
                .params
                .iter()
                .flat_map(|params| params.split('|'))
                .map(|param| Some(param.trim()).filter(|param| *param != "NULL"))
                .collect();
            let got = describe(&fixture, &block.sql, &params);
            if got != block.expected && !bless {
                let _ =
                    writeln!(failures, "{}: {}\nexpected:\n{}got:\n{got}", file.display(), block.sql, block.expected);
            }
            let params = block.params.as_ref().map_or(String::new(), |params| format!("params: {params}\n"));
            let _ = write!(written, "{}{}\n{params}---\n{got}\n", block.comment, block.sql);
        }
        if bless {
            std::fs::write(&file, written).expect("write golden file");
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

/// The plan of a statement with text parameters, in a few lines.
fn describe(fixture: &Fixture, sql: &str, params: &[Option<&str>]) -> String {
    let (compiled, normal) = fixture.compile(sql);
    let datums: Vec<Datum<'_>> =
        params.iter().map(|param| param.map_or(Datum::Null, |text| Datum::Text(text.as_bytes()))).collect();
    let values = Values { params: &datums, sql, literals: &normal.literals };
    let mut text = String::new();
    match compiled.template.bind(&values, &fixture.topology) {
        Err(error) => {
            let _ = writeln!(text, "refused {}: {}", error.sqlstate, error.message);
            for (name, part) in [("detail", &error.detail), ("hint", &error.hint)] {
                if let Some(part) = part {
                    let _ = writeln!(text, "  {name}: {part}");
                }
            }
        }
        Ok(plan) => plan_text(fixture, sql, &compiled, &plan, &mut text),
    }
    if !compiled.structural.is_empty() {
        let _ = writeln!(text, "  structural: {:?}", compiled.structural);
    }
    text
}

fn plan_text(fixture: &Fixture, sql: &str, compiled: &Compiled, plan: &Plan, text: &mut String) {
    let rows: BTreeMap<String, String> = explain(plan, &fixture.topology).into_iter().collect();
    let access = match plan.access {
        Access::Read => "read".to_owned(),
        Access::PrimaryRead(reason) => format!("primary read ({})", reason.as_str()),
        Access::Write => "write".to_owned(),
    };
    let shards = if plan.target == Target::All || plan.target == Target::Any { "" } else { &rows["shards"] };
    let _ = writeln!(text, "{} {shards}, {access}", rows["target"]);
    let _ = writeln!(text, "  why: {}", rows["reason"]);
    if plan.merge.is_some() {
        let _ = writeln!(text, "  merge: {}", rows["merge"]);
        let rewrite = compiled.template.rewrite().expect("a merged plan has a text for the shards");
        let mut tokens = Vec::new();
        lex(sql, &mut tokens).expect("statement lexes");
        let rewritten = rewrite.apply(sql, &tokens);
        if rewritten != sql {
            let _ = writeln!(text, "  shards: {rewritten}");
        }
    }
    for (name, dependencies) in [("reads", &plan.reads), ("writes", &plan.writes)] {
        if !dependencies.is_empty() {
            let shown: Vec<String> = dependencies.iter().map(dependency).collect();
            let _ = writeln!(text, "  {name}: {}", shown.join(" "));
        }
    }
    let cache = plan.cacheable.map_or_else(|reason| format!("no ({})", reason.as_str()), |()| "yes".to_owned());
    let _ = writeln!(text, "  cache: {cache}");
}

fn dependency(dependency: &Dependency) -> String {
    let table = |hash: &TableHash| {
        let named = TABLES.iter().map(|table| table.0).chain(["fresh_table"]);
        let found =
            named.into_iter().find(|name| hash_bytes_extended(format!("public.{name}").as_bytes(), 0) == hash.0);
        found.unwrap_or("?").to_owned()
    };
    match dependency {
        Dependency::Anything => "G".to_owned(),
        Dependency::AnyRows => "G, rows".to_owned(),
        Dependency::Table(hash) => format!("A({})", table(hash)),
        Dependency::Keyless(hash) => format!("B({})", table(hash)),
        Dependency::Flushed(hash) => format!("F({})", table(hash)),
        Dependency::Key(hash, key) => format!("K({},{:04x})", table(hash), key.0 >> 48),
    }
}
