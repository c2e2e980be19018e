//! The users file: who may log in, with the password used on both sides.
//!
//! Invariant: read only from a file that nobody else can read.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::error::Source;
use super::{ConfigError, Secret, checked};

/// All users, by name.
#[derive(Clone, Debug, Default)]
pub struct Users(BTreeMap<String, User>);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Clients prove it by SCRAM; weir logs in to the servers with it.
    pub password: Secret,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    user: BTreeMap<String, User>,
}

impl Users {
    /// Reads a file of mode 0600 (or stricter).
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        checked::private_file(path, checked::OTHERS)?;
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::unreadable(path, &error))?;
        Self::parse(&Source { path: path.into(), text })
    }

    pub(super) fn parse(source: &Source) -> Result<Self, ConfigError> {
        let file: File = source.parse()?;
        for (name, user) in &file.user {
            if user.password.expose().is_empty() {
                return Err(source.whole(format!("user `{name}` has an empty password")));
            }
        }
        Ok(Users(file.user))
    }

    pub fn get(&self, name: &str) -> Option<&User> {
        self.0.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &User)> {
        self.0.iter().map(|(name, user)| (name.as_str(), user))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
