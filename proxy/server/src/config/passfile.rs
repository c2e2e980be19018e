//! Passwords from a file of the form that libpq reads from `~/.pgpass` or PGPASSFILE.
//!
//! Invariant: the first line that fits counts, as in libpq (passwordFromFile in src/interfaces/libpq/fe-connect.c); a file
//! that others can read is refused.

use std::path::{Path, PathBuf};

use super::{ConfigError, Secret, checked};

/// host:port:database:user:password, line by line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassFile(Vec<Line>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    /// host, port, database, user; `None` for `*`.
    keys: [Option<String>; 4],
    password: Secret,
}

impl PassFile {
    /// What libpq would read: PGPASSFILE, else `.pgpass` in the home directory. `None` if there is no such file.
    pub(super) fn default_path() -> Option<PathBuf> {
        let named = std::env::var_os("PGPASSFILE").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".pgpass"));
        named.or_else(home).filter(|path| path.is_file())
    }

    pub(super) fn load(path: &Path) -> Result<Self, ConfigError> {
        checked::private_file(path, checked::OTHERS)?;
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::unreadable(path, &error))?;
        Ok(Self::parse(&text))
    }

    /// Lines that are none of the form are passed over, as libpq does.
    fn parse(text: &str) -> Self {
        PassFile(text.lines().filter(|line| !line.starts_with('#')).filter_map(line).collect())
    }

    pub fn find(&self, host: &str, port: u16, database: &str, user: &str) -> Option<&Secret> {
        let port = port.to_string();
        let asked = [host, &port, database, user];
        let fits = |line: &&Line| {
            line.keys.iter().zip(asked).all(|(key, asked)| key.as_deref().is_none_or(|key| key == asked))
        };
        self.0.iter().find(fits).map(|line| &line.password)
    }
}

fn line(text: &str) -> Option<Line> {
    let mut fields = Vec::with_capacity(5);
    let mut rest = text.strip_suffix('\r').unwrap_or(text);
    while fields.len() < 4 {
        let (field, after) = field(rest)?;
        fields.push(field);
        rest = after;
    }
    // The password goes to the end of the line; colons in it may be escaped or not.
    let password = unescape(rest);
    if password.is_empty() {
        return None;
    }
    Some(Line { keys: fields.try_into().ok()?, password: Secret::new(password) })
}

/// Up to the next colon that is not escaped, and what follows it.
fn field(text: &str) -> Option<(Option<String>, &str)> {
    let mut escaped = false;
    let end = text.find(|char| {
        let end = char == ':' && !escaped;
        escaped = char == '\\' && !escaped;
        end
    })?;
    let key = &text[..end];
    Some(((key != "*").then(|| unescape(key)), &text[end + 1..]))
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        plain.push(if char == '\\' { chars.next().unwrap_or('\\') } else { char });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_counts() {
        let file = PassFile::parse(
            "# comment:*:*:*:no\n\
             too:few:fields\n\
             db1:5432:shop:ann:one\n\
             db1:*:*:ann:two\r\n\
             we\\:ird\\\\:5432:*:*:th\\:r\\\\ee:more\n\
             *:5433:*:*:four\n\
             *:*:*:empty:\n",
        );
        let find =
            |host, port, database, user| file.find(host, port, database, user).map(|found| found.expose().to_owned());
        assert_eq!(find("db1", 5432, "shop", "ann").as_deref(), Some("one"));
        assert_eq!(find("db1", 5433, "shop", "ann").as_deref(), Some("two"));
        assert_eq!(find("we:ird\\", 5432, "shop", "bob").as_deref(), Some("th:r\\ee:more"));
        assert_eq!(find("db2", 5433, "x", "y").as_deref(), Some("four"));
        assert_eq!(find("db2", 5432, "x", "empty"), None);
        assert_eq!(find("db1", 5432, "shop", "bob"), None);
        assert!(!format!("{file:?}").contains("three"));
    }
}
