//! House rules, checked over the tree: sizes, layers, purity of wire and core, openings, leftovers, links.
//!
//! Invariant: every finding names file and line, and every exception is listed here with its reason; an exception that is no longer
//! needed is a failure too. Non-goals: style that rustfmt or clippy already see; understanding Rust beyond comments,
//! strings and braces.

#[path = "tidy/source.rs"]
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use source::Source;

/// STYLE: files under this without their tests.
const FILE_LINES_MAX: usize = 600;
/// STYLE: functions fit a screen.
const FUNCTION_LINES_MAX: usize = 70;

/// `(path, function, why)`: functions that may be longer, because splitting them would hide what they say.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[];

/// `(path, why)`: files that may be longer.
const LONG_FILES: &[(&str, &str)] = &[];

/// What each module of weir-core may import from its siblings, beside itself. Bottom first; no cycles by construction.
const CORE_LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    // `id` documents itself by a link into topology, nothing more: links live in comments, which are not looked at.
    ("id", &[]),
    ("lock", &[]),
    ("election", &["id"]),
    ("hba", &["error"]),
    ("topology", &["error", "id"]),
    ("sql", &["error", "id", "topology"]),
    ("fresh", &["error", "id", "topology"]),
    ("engine", &["id", "topology", "sql"]),
    ("unique", &["id", "topology", "sql"]),
    // An expression over aggregates keeps the operations the parser has names for.
    ("merge", &["error", "id", "topology", "sql"]),
    ("copy", &["error", "id", "topology", "sql"]),
    // A plan says how its parts are merged, so the merge specification lies below it and the merger never sees a plan.
    ("plan", &["error", "id", "topology", "sql", "fresh", "merge", "copy"]),
    ("advise", &["error", "id", "topology", "sql", "fresh", "merge", "copy", "plan"]),
    ("session", &["error", "id", "topology", "sql"]),
    ("pool", &["error", "id"]),
    ("cache", &["error", "id", "topology", "sql", "fresh"]),
    ("hot", &["fresh"]),
    ("reshard", &["error", "id", "lock", "topology", "sql"]),
    ("admin", &["error", "id", "topology", "reshard"]),
    ("snapshot", &[]),
];

/// What wire and core never mention outside their tests: IO, clocks, the environment, randomness and async runtimes.
const IMPURE: &[&str] = &[
    "std::net",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
    "tokio",
    "rand::",
    ".await",
];

/// Directories that hold nothing of ours.
const SKIPPED_DIRS: &[&str] = &["target", ".git", ".demo", "node_modules"];

// ---- rules -------------------------------------------------------------------------------------------------------

#[test]
fn files_open_with_their_purpose() {
    let mut findings = Findings::default();
    for source in rust_sources() {
        if !source.text.starts_with("//! ") {
            findings.add(&source.path, 1, "does not start with a //! line that says what the file is for");
        }
    }
    findings.report();
}

#[test]
fn files_are_short() {
    let mut findings = Findings::default();
    let mut excused = BTreeSet::new();
    for source in rust_sources().iter().filter(|source| !source.is_test) {
        let lines = source.lines_without_tests();
        if lines <= FILE_LINES_MAX {
            continue;
        }
        if LONG_FILES.iter().any(|(path, _)| *path == source.path) {
            excused.insert(source.path.clone());
            continue;
        }
        findings.add(&source.path, 1, &format!("{lines} lines without tests, more than {FILE_LINES_MAX}"));
    }
    for (path, _) in LONG_FILES.iter().filter(|(path, _)| !excused.contains(*path)) {
        findings.add(path, 1, "is listed in LONG_FILES but is not long: remove the exception");
    }
    findings.report();
}

#[test]
fn functions_fit_a_screen() {
    let mut findings = Findings::default();
    let mut excused = BTreeSet::new();
    for source in rust_sources().iter().filter(|source| !source.is_test) {
        for function in source.functions() {
            if function.lines <= FUNCTION_LINES_MAX {
                continue;
            }
            let exception =
                LONG_FUNCTIONS.iter().position(|(path, name, _)| *path == source.path && *name == function.name);
            match exception {
                Some(index) => drop(excused.insert(index)),
                None => findings.add(
                    &source.path,
                    function.line,
                    &format!("fn {} has {} lines, more than {FUNCTION_LINES_MAX}", function.name, function.lines),
                ),
            }
        }
    }
    for (index, (path, name, _)) in LONG_FUNCTIONS.iter().enumerate() {
        if !excused.contains(&index) {
            findings.add(
                path,
                1,
                &format!("fn {name} is listed in LONG_FUNCTIONS but is not long: remove the exception"),
            );
        }
    }
    findings.report();
}

#[test]
fn core_modules_import_only_what_lies_below_them() {
    let allowed: BTreeMap<&str, &[&str]> = CORE_LAYERS.iter().copied().collect();
    let mut findings = Findings::default();
    let mut below = BTreeSet::new();
    for (module, imports) in CORE_LAYERS {
        for import in imports.iter().filter(|import| !below.contains(*import)) {
            findings.add(
                "tests/tidy.rs",
                1,
                &format!("CORE_LAYERS lets {module} import {import}, which is not below it"),
            );
        }
        below.insert(*module);
    }
    let sources = rust_sources();
    for source in sources.iter().filter(|source| !source.is_test) {
        let Some(inside) = source.path.strip_prefix("proxy/core/src/") else { continue };
        let module = inside.split(['/', '.']).next().unwrap_or_default();
        if module == "lib" {
            continue;
        }
        let Some(allowed) = allowed.get(module) else {
            findings.add(&source.path, 1, &format!("module {module} has no place in CORE_LAYERS"));
            continue;
        };
        for (line, import) in source.crate_imports() {
            if import != module && !allowed.contains(&import.as_str()) {
                findings.add(&source.path, line, &format!("{module} may not import crate::{import}"));
            }
        }
    }
    findings.report();
}

#[test]
fn wire_and_core_do_no_io_and_know_no_time() {
    let mut findings = Findings::default();
    for source in rust_sources().iter().filter(|source| !source.is_test) {
        if !source.path.starts_with("proxy/core/src/") && !source.path.starts_with("proxy/wire/src/") {
            continue;
        }
        for (line, text) in source.code_lines() {
            for word in IMPURE.iter().filter(|word| contains_path(text, word)) {
                findings.add(&source.path, line, &format!("{word} has no place in wire or core"));
            }
        }
    }
    for (manifest, banned) in
        [("proxy/wire/Cargo.toml", ["weir-core", "weir"].as_slice()), ("proxy/core/Cargo.toml", ["weir"].as_slice())]
    {
        let parsed = parse_toml(manifest);
        let dependencies = parsed.get("dependencies").and_then(toml::Value::as_table).cloned().unwrap_or_default();
        for name in dependencies.keys() {
            if banned.contains(&name.as_str()) || ["tokio", "rand", "socket2", "axum", "redis"].contains(&name.as_str())
            {
                findings.add(manifest, 1, &format!("may not depend on {name}"));
            }
        }
    }
    findings.report();
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here so that this file does not find itself.
    let marks = [["TO", "DO"], ["FIX", "ME"], ["todo", "!("], ["unimple", "mented!("], ["#[ign", "ore"]]
        .map(|half| half.concat());
    let mut findings = Findings::default();
    for path in text_files() {
        for (index, line) in read(&path).lines().enumerate() {
            for mark in marks.iter().filter(|mark| contains_word(line, mark)) {
                findings.add(&path, index + 1, &format!("{mark}: finish it, or open an issue"));
            }
        }
    }
    findings.report();
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    let roots = ["work", "root", "tmp", "home", "Users"].map(|name| format!("/{name}/"));
    let mut findings = Findings::default();
    for path in text_files() {
        for (index, line) in read(&path).lines().enumerate() {
            for root in roots.iter().filter(|root| starts_a_path(line, root)) {
                findings.add(&path, index + 1, &format!("{root}… exists on one machine only"));
            }
        }
    }
    findings.report();
}

#[test]
fn every_crate_has_the_workspace_lints() {
    let workspace = parse_toml("Cargo.toml");
    let members = workspace["workspace"]["members"].as_array().expect("workspace members");
    let mut findings = Findings::default();
    for member in members {
        let manifest = format!("{}/Cargo.toml", member.as_str().expect("a member is a path"));
        let parsed = parse_toml(&manifest);
        let inherits = parsed.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        if inherits != Some(true) {
            findings.add(&manifest, 1, "does not say [lints] workspace = true");
        }
    }
    findings.report();
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut findings = Findings::default();
    for path in text_files().into_iter().filter(|path| has_extension(path, "md")) {
        let folder = Path::new(&path).parent().unwrap_or(Path::new("")).to_path_buf();
        for (index, line) in read(&path).lines().enumerate() {
            for target in link_targets(line) {
                if !root().join(&folder).join(target).exists() {
                    findings.add(&path, index + 1, &format!("links to {target}, which does not exist"));
                }
            }
        }
    }
    findings.report();
}

// ---- the tree ----------------------------------------------------------------------------------------------------

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests live one below the root").to_path_buf()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("cannot read {path}: {error}"))
}

fn parse_toml(path: &str) -> toml::Value {
    toml::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file of ours that people write, relative to the root, in order.
fn text_files() -> Vec<String> {
    const EXTENSIONS: &[&str] =
        &["rs", "toml", "md", "yml", "yaml", "sh", "py", "sql", "conf", "html", "css", "json", "env"];
    const NAMES: &[&str] = &["Makefile", "run"];
    let walk = walkdir::WalkDir::new(root()).sort_by_file_name().into_iter();
    let ours = walk.filter_entry(|entry| !SKIPPED_DIRS.contains(&entry.file_name().to_string_lossy().as_ref()));
    ours.map(|entry| entry.expect("the tree is readable"))
        .filter(|entry| entry.file_type().is_file())
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy();
            let extension = name.rsplit_once('.').map(|(_, extension)| extension);
            extension.is_some_and(|found| EXTENSIONS.contains(&found))
                || NAMES.contains(&name.as_ref())
                || name.starts_with("Dockerfile")
        })
        .map(|entry| entry.path().strip_prefix(root()).expect("below the root").to_string_lossy().into_owned())
        .collect()
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

fn rust_sources() -> Vec<Source> {
    let paths: Vec<String> = text_files().into_iter().filter(|path| has_extension(path, "rs")).collect();
    let mut sources: Vec<Source> = paths
        .into_iter()
        .map(|path| {
            let text = read(&path);
            Source::load(path, text)
        })
        .collect();
    assert!(sources.len() > 50, "the walk found only {} sources", sources.len());
    // A module that its parent declares under #[cfg(test)] is a test file as a whole.
    let declared: BTreeSet<String> = sources.iter().flat_map(Source::test_modules).collect();
    for source in &mut sources {
        source.is_test |= declared.iter().any(|module| {
            source.path == *module || source.path.starts_with(&format!("{}/", module.trim_end_matches(".rs")))
        });
    }
    sources
}

// ---- text -----------------------------------------------------------------------------------------------------------

/// `word` in `line`, not as a part of a longer word.
fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let longer_after = word.ends_with(is_word) && line[at + word.len()..].starts_with(is_word);
        !line[..at].ends_with(is_word) && !longer_after
    })
}

/// As [`contains_word`], but `.await` and `rand::` carry their own boundary.
fn contains_path(code: &str, path: &str) -> bool {
    if path.starts_with('.') { code.contains(path) } else { contains_word(code, path) }
}

/// Is `root` the start of a path here, and not the middle of `a/tmp/b` or of a URL?
fn starts_a_path(line: &str, root: &str) -> bool {
    line.match_indices(root)
        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_-./}~*:".contains(c)))
}

/// Relative targets of Markdown links `[…](target)`, without fragments.
fn link_targets(line: &str) -> Vec<&str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    targets
        .filter(|target| !target.contains("://") && !target.starts_with('#') && !target.starts_with("mailto:"))
        .map(|target| target.split('#').next().unwrap_or(target))
        .collect()
}

#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    fn add(&mut self, path: &str, line: usize, what: &str) {
        self.0.push(format!("{path}:{line}: {what}"));
    }

    fn report(self) {
        assert!(self.0.is_empty(), "{} findings\n{}", self.0.len(), self.0.join("\n"));
    }
}

#[test]
fn words_paths_and_links_are_told_apart() {
    assert!(contains_word("use std::fs;", "std::fs") && !contains_word("use std::fsx;", "std::fs"));
    assert!(starts_a_path("cd /srv/x", "/srv/") && !starts_a_path("$dir/srv/x", "/srv/"));
    assert_eq!(link_targets("[a](b.md#c) and [d](https://e.org) [f](#g)"), ["b.md"]);
}
