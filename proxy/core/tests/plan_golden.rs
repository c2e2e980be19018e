//! Planner decisions as data: every `tests/golden/plan/*.txt` holds statements, values, and the plan they must get.
//!
//! A block is the statement, optionally `params: …` (text values separated by `|`, `NULL` for null), a line `---`, and the
//! expected lines. `WEIR_BLESS=1` writes what the planner says into the files; the diff is reviewed like code.

mod plan_fixture;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use plan_fixture::{Fixture, describe};

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
                let _ = write!(written, "{}\n", block.comment);
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
                let _ = writeln!(failures, "{}: {}\nexpected:\n{}got:\n{got}", file.display(), block.sql, block.expected);
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
