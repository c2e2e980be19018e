//! What weir presents to the servers when it logs in as a user.
//!
//! Invariant: keys learnt from a client are in memory only; nothing here is ever printed.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::scram::ScramKeys;
use super::secret::Md5Hash;

/// Strongest last.
#[derive(Clone, Default)]
pub enum Credential {
    /// Only a server that asks for nothing (trust, cert) lets weir in.
    #[default]
    None,
    /// For servers that ask for an MD5 hash.
    Md5(Md5Hash),
    /// For servers that have the same SCRAM verifier.
    Scram(Arc<ScramKeys>),
    /// For every server.
    Password(Arc<str>),
}

/// The credential of one user's pools. Clones share it, so that connections opened from now on use what was learnt last.
#[derive(Clone, Debug)]
pub struct Keyring(Arc<ArcSwap<Credential>>);

impl Credential {
    /// `None` for the empty password, which no server accepts.
    pub fn password(password: &str) -> Self {
        if password.is_empty() { Credential::None } else { Credential::Password(password.into()) }
    }
}

impl Keyring {
    pub fn new(credential: Credential) -> Self {
        Keyring(Arc::new(ArcSwap::from_pointee(credential)))
    }

    pub fn now(&self) -> Arc<Credential> {
        self.0.load_full()
    }

    /// Replaces what is there, unless nothing was learnt (a login without a password).
    pub fn learn(&self, credential: Credential) {
        if !matches!(credential, Credential::None) {
            self.0.store(Arc::new(credential));
        }
    }
}

impl From<Credential> for Keyring {
    fn from(credential: Credential) -> Self {
        Keyring::new(credential)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::None => "None",
            Credential::Md5(_) => "Md5(***)",
            Credential::Scram(_) => "Scram(***)",
            Credential::Password(_) => "Password(***)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_learnt_reaches_all_clones_and_nothing_is_printed() {
        let ring = Keyring::new(Credential::None);
        let clone = ring.clone();
        ring.learn(Credential::password("pencil"));
        ring.learn(Credential::None);
        assert!(matches!(&*clone.now(), Credential::Password(password) if &**password == "pencil"));
        assert!(!format!("{clone:?}").contains("pencil"));
        assert!(matches!(Credential::password(""), Credential::None));
    }
}
