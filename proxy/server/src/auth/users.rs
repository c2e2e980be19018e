//! The users weir knows, ready to be checked: built whole when the users file is read, replaced whole when it changes.
//!
//! Invariant: a name that is not known gets an answer of the same shape and cost as one that is (a mock secret), so that
//! the exchange does not tell which names exist.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::secret::{MockKey, Secret};

/// Permission bits that let anybody but the owner at the file.
const OTHERS: u32 = 0o077;

/// How a user proves to be who they say.
#[derive(Clone, Copy)]
pub enum Credential<'a> {
    /// In plain text; a verifier is derived from it at once.
    Password(&'a str),
    /// `SCRAM-SHA-256$…` as in `pg_authid.rolpassword`.
    Verifier(&'a str),
}

/// All users; wrap it in an `ArcSwap` to reload it.
pub struct Users {
    by_name: HashMap<String, User>,
    mock_key: MockKey,
}

struct User {
    secret: Secret,
    server_password: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    #[error("cannot read {path}: {error}")]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("{path} holds secrets but its mode is {mode:04o}; run: chmod 0600 {path}")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{path}: {error}")]
    Malformed { path: PathBuf, error: String },
    #[error("user \"{name}\": {fault}")]
    User { name: String, fault: &'static str },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    user: HashMap<String, RawUser>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUser {
    password: Option<String>,
    verifier: Option<String>,
    server_password: Option<String>,
}

impl Users {
    pub fn new(mock_key: MockKey) -> Self {
        Users { by_name: HashMap::new(), mock_key }
    }

    /// Reads a file of `[user.NAME]` tables, each with `password` or `verifier`, and `server_password` where weir is to log in to the
    /// servers with another password, or with one at all beside a verifier. Its mode must be 0600 or stricter.
    pub fn load(path: &Path, mock_key: MockKey) -> Result<Self, UsersError> {
        let unreadable = |error| UsersError::Unreadable { path: path.into(), error };
        let mode = std::fs::metadata(path).map_err(unreadable)?.mode() & 0o777;
        if mode & OTHERS != 0 {
            return Err(UsersError::Exposed { path: path.into(), mode });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        // The message alone: toml's own display shows the line, which may hold a password.
        let malformed = |error: toml::de::Error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            UsersError::Malformed { path: path.into(), error: format!("line {line}: {}", error.message()) }
        };
        let file: File = toml::from_str(&text).map_err(malformed)?;
        let mut users = Users::new(mock_key);
        for (name, raw) in &file.user {
            let credential = match (&raw.password, &raw.verifier) {
                (Some(password), None) => Credential::Password(password),
                (None, Some(verifier)) => Credential::Verifier(verifier),
                _ => return Err(UsersError::User { name: name.clone(), fault: "needs either password or verifier" }),
            };
            users.add(name, credential, raw.server_password.as_deref())?;
        }
        Ok(users)
    }

    /// Adds or replaces a user. Without `server_password` a plain password serves on both sides.
    pub fn add(
        &mut self,
        name: &str,
        credential: Credential<'_>,
        server_password: Option<&str>,
    ) -> Result<(), UsersError> {
        let fault = |fault| UsersError::User { name: name.to_owned(), fault };
        let (secret, plain) = match credential {
            Credential::Password(password) if password.is_empty() || password.contains('\0') => {
                return Err(fault("the password is empty or holds a NUL byte"));
            }
            Credential::Password(password) => (Secret::derive(password), Some(password)),
            Credential::Verifier(verifier) => (Secret::parse(verifier), None),
        };
        let secret = secret
            .ok_or_else(|| fault("the verifier is not SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>"))?;
        let server_password = server_password.or(plain).map(str::to_owned);
        self.by_name.insert(name.to_owned(), User { secret, server_password });
        Ok(())
    }

    /// What to check the user's proof against; a mock if there is no such user.
    pub fn lookup(&self, name: &str) -> Secret {
        let mock = Secret::mock(self.mock_key, name);
        self.by_name.get(name).map_or(mock, |user| user.secret.clone())
    }

    /// The password with which weir logs in to the servers as this user, if it has one.
    pub fn server_password(&self, name: &str) -> Option<&str> {
        self.by_name.get(name)?.server_password.as_deref()
    }

    /// The known names, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}
