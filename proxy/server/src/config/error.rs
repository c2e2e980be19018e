//! Where a configuration is wrong, why, and what was probably meant.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file's text with its name, so that byte offsets can become line numbers.
pub(super) struct Source {
    pub path: PathBuf,
    pub text: String,
}

/// One thing wrong in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub path: PathBuf,
    /// 1-based; `None` when it concerns the file as a whole.
    pub line: Option<usize>,
    /// One sentence, without the place and the hint.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ConfigError {
    pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Self {
        ConfigError { path: path.into(), line: None, message: format!("cannot read it: {error}"), hint: None }
    }

    #[must_use]
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl Source {
    /// No file at all: only the command line speaks, and relative paths are relative to where weir was started.
    pub fn none() -> Self {
        Source { path: PathBuf::from("the command line"), text: String::new() }
    }

    /// An error at a byte range of the text.
    pub fn error(&self, span: Range<usize>, message: impl Into<String>) -> ConfigError {
        let before = self.text.get(..span.start).unwrap_or(&self.text);
        let line = before.matches('\n').count() + 1;
        ConfigError { path: self.path.clone(), line: Some(line), message: message.into(), hint: None }
    }

    /// An error about the file as a whole.
    pub fn whole(&self, message: impl Into<String>) -> ConfigError {
        ConfigError { path: self.path.clone(), line: None, message: message.into(), hint: None }
    }

    /// Parses the text; unknown keys and wrong types become errors with a line and, if one is near, a suggestion.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| self.translate(&error))
    }

    fn translate(&self, error: &toml::de::Error) -> ConfigError {
        // A syntax error's message may quote the line, and the line may hold a secret: keep the first line only.
        let message = error.message().lines().next().unwrap_or("not valid TOML");
        let place = |message: String| match error.span() {
            Some(span) => self.error(span, message),
            None => self.whole(message),
        };
        let Some(rest) = message.strip_prefix("unknown field `") else {
            return place(message.to_owned());
        };
        let mut names = rest.split('`');
        let unknown = names.next().unwrap_or_default();
        // What follows alternates between separators and quoted names.
        let known: Vec<&str> = names.skip(1).step_by(2).collect();
        let error = place(format!("unknown key `{unknown}`"));
        match nearest(unknown, known.iter().copied()) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint(format!("known keys here: {}", known.join(", "))),
        }
    }
}

/// The candidate within a third of the word's length in edits (at least two), if any.
pub(super) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(2);
    candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edit distance with insertions, deletions and substitutions (Wagner and Fischer, 1974).
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[right.len()]
}
