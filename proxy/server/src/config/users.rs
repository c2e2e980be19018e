//! The users file: who may log in, and what weir keeps to check it.
//!
//! Invariant: read only from a file that nobody else can read.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use weir_core::session::startup::startup_vars;
use weir_core::session::vars::VarSet;

use super::error::Source;
use super::{ConfigError, Secret, checked};
use crate::auth::secret::Stored;

/// All users, by name.
#[derive(Clone, Debug, Default)]
pub struct Users(BTreeMap<String, User>);

/// One user.
#[derive(Clone, Debug, Default)]
pub struct User {
    pub proof: Proof,
    /// Defaults of the user's sessions, as `ALTER ROLE … SET` makes them.
    pub settings: VarSet,
}

/// What a user's password is checked against.
#[derive(Clone, Debug, Default)]
pub enum Proof {
    /// The file says nothing: `auth_query`, a certificate or trust must.
    #[default]
    Elsewhere,
    /// weir logs in to the servers with it as well.
    Password(Secret),
    /// As Postgres stores it.
    Stored(Stored),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    user: BTreeMap<Spanned<String>, Raw>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    password: Option<Secret>,
    verifier: Option<Spanned<Secret>>,
    #[serde(default)]
    settings: BTreeMap<Spanned<String>, toml::Value>,
}

impl User {
    /// A user whose password is known.
    pub fn with_password(password: Secret) -> Self {
        User { proof: Proof::Password(password), settings: VarSet::default() }
    }
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
        let users = file.user.into_iter();
        let users = users.map(|(name, raw)| Ok((name.get_ref().clone(), user(source, &name, raw)?)));
        Ok(Users(users.collect::<Result<_, ConfigError>>()?))
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

impl FromIterator<(String, User)> for Users {
    fn from_iter<I: IntoIterator<Item = (String, User)>>(users: I) -> Self {
        Users(users.into_iter().collect())
    }
}

fn user(source: &Source, name: &Spanned<String>, raw: Raw) -> Result<User, ConfigError> {
    let proof = match (raw.password, raw.verifier) {
        (None, None) => Proof::Elsewhere,
        (Some(password), None) if password.expose().is_empty() => {
            return Err(source.error(name.span(), format!("user `{}` has an empty password", name.get_ref())));
        }
        (Some(password), None) => Proof::Password(password),
        (None, Some(verifier)) => {
            let stored = Stored::parse(verifier.get_ref().expose()).ok_or_else(|| {
                source
                    .error(verifier.span(), format!("the verifier of user `{}` cannot be read", name.get_ref()))
                    .hint("copy rolpassword from pg_authid: \"SCRAM-SHA-256$4096:…\" or \"md5…\"")
            })?;
            Proof::Stored(stored)
        }
        (Some(_), Some(_)) => {
            let message = format!("user `{}` has both a password and a verifier", name.get_ref());
            return Err(source.error(name.span(), message).hint("the password alone says everything"));
        }
    };
    Ok(User { proof, settings: settings(source, &raw.settings)? })
}

fn settings(source: &Source, raw: &BTreeMap<Spanned<String>, toml::Value>) -> Result<VarSet, ConfigError> {
    let mut all = VarSet::default();
    for (name, value) in raw {
        let value = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(yes) => if *yes { "on" } else { "off" }.to_owned(),
            _ => return Err(source.error(name.span(), format!("setting `{}` must be one value", name.get_ref()))),
        };
        // Names that are no settings would be passed over in silence.
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let reserved = ["user", "database", "replication", "options"];
        if name.get_ref().is_empty()
            || !name.get_ref().chars().all(plain)
            || reserved.contains(&name.get_ref().as_str())
        {
            return Err(source.error(name.span(), format!("`{}` is not the name of a setting", name.get_ref())));
        }
        let vars = startup_vars([(name.get_ref().as_str(), value.as_str())].into_iter())
            .map_err(|error| source.error(name.span(), error.message.into_owned()))?;
        if !vars.iter().all(|(name, value)| all.set(name, value)) {
            return Err(source.error(name.span(), "too many settings, or too long a value"));
        }
    }
    Ok(all)
}
