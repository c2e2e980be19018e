//! A Rust file as far as the house rules need to see it: code without comments and literals, functions, imports, tests.
//!
//! Invariant: what is blanked keeps its length and its lines, so that every offset and line number is that of the file.
//! Non-goal: a parser.

use std::path::Path;

/// One Rust file, with comments and the insides of literals blanked out so that what is left is code.
pub struct Source {
    pub path: String,
    pub text: String,
    /// As long as `text`, line for line.
    code: String,
    pub is_test: bool,
}

pub struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

impl Source {
    pub fn load(path: String, text: String) -> Self {
        let code = blank(&text);
        // Crates of tests and their support; `benches` is a program like any other.
        let is_test = path.starts_with("tests/") && !path.starts_with("tests/harness/") || path.contains("/tests/");
        Source { path, text, code, is_test }
    }

    /// Lines (from 1) of code outside `#[cfg(test)]` items.
    pub fn code_lines(&self) -> Vec<(usize, &str)> {
        let tests = self.test_spans();
        let outside = |line: &usize| !tests.iter().any(|(first, last)| (*first..=*last).contains(line));
        self.code.lines().enumerate().map(|(index, text)| (index + 1, text)).filter(|(line, _)| outside(line)).collect()
    }

    pub fn lines_without_tests(&self) -> usize {
        self.code_lines().len()
    }

    /// First and last line of every item under `#[cfg(test)]`.
    fn test_spans(&self) -> Vec<(usize, usize)> {
        let mut spans = Vec::new();
        for (at, mark) in self.code.match_indices("#[cfg(test)]") {
            let body = &self.code[at + mark.len()..];
            let end = match (body.find('{'), body.find(';')) {
                (Some(open), semicolon) if semicolon.is_none_or(|semicolon| open < semicolon) => {
                    at + mark.len() + open + closing_brace(&body[open..])
                }
                (_, Some(semicolon)) => at + mark.len() + semicolon,
                _ => continue,
            };
            spans.push((self.line_at(at), self.line_at(end)));
        }
        spans
    }

    /// Paths of the files that this one declares as `#[cfg(test)] mod name;`.
    pub fn test_modules(&self) -> Vec<String> {
        let path = Path::new(&self.path);
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let folder = path.parent().unwrap_or(Path::new(""));
        let folder = if ["mod", "lib", "main"].contains(&stem.as_ref()) {
            folder.to_path_buf()
        } else {
            folder.join(stem.as_ref())
        };
        let named = self.code.split("#[cfg(test)]").skip(1).filter_map(|rest| {
            let name = rest.trim_start().trim_start_matches("pub(crate) ").strip_prefix("mod ")?;
            name.split_once(';')
                .map(|(name, _)| name)
                .filter(|name| name.chars().all(|c| c.is_alphanumeric() || c == '_'))
        });
        named.map(|name| folder.join(format!("{name}.rs")).to_string_lossy().into_owned()).collect()
    }

    /// Functions with a body outside `#[cfg(test)]` items.
    pub fn functions(&self) -> Vec<Function> {
        let tests = self.test_spans();
        let mut functions = Vec::new();
        for (at, _) in self.code.match_indices("fn ") {
            let before = self.code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                continue;
            }
            let rest = &self.code[at + 3..];
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let Some(open) = rest.find('{') else { continue };
            if name.is_empty() || body_is_missing(&rest[..open]) {
                continue;
            }
            let line = self.line_at(at);
            let last = self.line_at(at + 3 + open + closing_brace(&rest[open..]));
            if !tests.iter().any(|(first, end)| (*first..=*end).contains(&line)) {
                functions.push(Function { name, line, lines: last - line + 1 });
            }
        }
        functions
    }

    /// Sibling modules named as `crate::x` outside tests, with their lines; braces after `crate::` included.
    pub fn crate_imports(&self) -> Vec<(usize, String)> {
        let mut imports = Vec::new();
        for (line, text) in self.code_lines() {
            for (at, mark) in text.match_indices("crate::") {
                let rest = &text[at + mark.len()..];
                let names: Vec<&str> = match rest.strip_prefix('{') {
                    // One level is enough: what follows a name's first `::` is inside that sibling.
                    Some(group) => group.split(',').map(str::trim).collect(),
                    None => vec![rest],
                };
                for name in names {
                    let name: String = name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    if !name.is_empty() && name.chars().all(|c| c.is_lowercase() || c == '_') {
                        imports.push((line, name));
                    }
                }
            }
        }
        imports
    }

    fn line_at(&self, at: usize) -> usize {
        self.code[..at].matches('\n').count() + 1
    }
}

/// A declaration without a body ends with `;` before any brace. Array types `[u8; 4]` hold a semicolon too.
fn body_is_missing(signature: &str) -> bool {
    let mut depth = 0_i32;
    for c in signature.chars() {
        match c {
            '[' | '(' => depth += 1,
            ']' | ')' => depth -= 1,
            ';' if depth == 0 => return true,
            _ => {}
        }
    }
    false
}

/// Offset of the brace that closes the one at the start of `code`.
fn closing_brace(code: &str) -> usize {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return at,
            b'}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

// ---- text --------------------------------------------------------------------------------------------------------

/// The source with comments and the contents of string and character literals turned into blanks, byte for byte.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(bytes, at);
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8(out).expect("only whole literals are blanked")
}

/// End of the comment or literal that starts at `at`, or `at` if none does.
fn literal_end(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let inside_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if rest.starts_with(b"//") {
        return at + rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    }
    if rest.starts_with(b"/*") {
        return at + block_comment(rest);
    }
    if rest[0] == b'"' {
        return at + quoted(rest, b'"');
    }
    if rest[0] == b'\'' {
        return at + character(rest);
    }
    if !inside_word && (rest[0] == b'r' || rest.starts_with(b"br") || rest.starts_with(b"cr")) {
        let prefix = if rest[0] == b'r' { 1 } else { 2 };
        let hashes = rest[prefix..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(prefix + hashes) == Some(&b'"') {
            let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            let body = prefix + hashes + 1;
            let length = rest[body..].windows(close.len()).position(|window| window == close);
            return at + length.map_or(rest.len(), |length| body + length + close.len());
        }
    }
    at
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// A character literal, or nothing when the quote starts a lifetime or label.
fn character(rest: &[u8]) -> usize {
    match rest.get(1) {
        Some(b'\\') => quoted(rest, b'\''),
        Some(first) => {
            let width = match first {
                0..=0x7f => 1,
                0xc0..=0xdf => 2,
                0xe0..=0xef => 3,
                _ => 4,
            };
            if rest.get(1 + width) == Some(&b'\'') { width + 2 } else { 0 }
        }
        None => 0,
    }
}

#[test]
fn the_scanner_sees_code_alone() {
    let text =
        "let a = \"}//\"; // tokio\nlet b = '{'; let c: &'static str = r#\"fn x() {\"#; /* { /* */ } */ fn y() {\n}\n";
    let code = blank(text);
    assert_eq!(code.len(), text.len());
    assert!(!code.contains("tokio") && !code.contains("fn x"), "{code}");
    assert!(code.contains("&'static str") && code.contains("fn y() {"), "{code}");
    assert_eq!(code.matches(['{', '}']).count(), 2, "{code}");
}

#[test]
fn the_scanner_measures_functions_and_leaves_tests_out() {
    let text = "//! x\nfn a(x: [u8; 4]) {\n    b();\n}\ntrait T { fn c(); }\n#[cfg(test)]\nmod tests {\n    fn d() {\n    }\n}\nuse crate::{id, plan::Plan};\n";
    let source = Source::load("x.rs".to_owned(), text.to_owned());
    let functions: Vec<(String, usize)> = source.functions().into_iter().map(|f| (f.name, f.lines)).collect();
    assert_eq!(functions, [("a".to_owned(), 3)]);
    assert_eq!(source.lines_without_tests(), 6);
    assert_eq!(source.crate_imports(), [(11, "id".to_owned()), (11, "plan".to_owned())]);
}
