//! Who is this user? The users file first, then `auth_query`.
//!
//! Invariant: nobody is let in whom neither knows, by whatever method. What tells known from unknown users is never shown
//! before a proof.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use weir_core::error::UserError;
use weir_core::session::vars::VarSet;

use super::credential::Credential;
use super::query::AuthQuery;
use super::scram_server::Expected;
use super::secret::{Md5Hash, MockKey, Stored, Verifier};
use crate::config::{Proof, Users};

/// Everybody weir knows.
pub struct Directory {
    file: ArcSwap<HashMap<Box<str>, Arc<Entry>>>,
    query: Option<AuthQuery>,
    mock_key: MockKey,
}

/// What is known of one user.
#[derive(Clone, Default)]
pub struct Entry {
    /// `None`: no password gets in.
    stored: Option<Stored>,
    /// The password itself, where the users file has it.
    password: Option<Arc<str>>,
    /// Defaults of the user's sessions.
    pub settings: VarSet,
}

impl Directory {
    /// Derives a verifier for each password: milliseconds per user, here and never at a login.
    pub fn new(users: &Users, query: Option<AuthQuery>) -> Self {
        let directory = Directory { file: ArcSwap::default(), query, mock_key: MockKey(rand::random()) };
        directory.set_users(users);
        directory
    }

    /// The users file was read again. As costly as the first time.
    pub fn set_users(&self, users: &Users) {
        let file = users.iter().map(|(name, user)| {
            let (stored, password) = match &user.proof {
                Proof::Elsewhere => (None, None),
                Proof::Stored(stored) => (Some(stored.clone()), None),
                Proof::Password(password) => {
                    (Verifier::derive(password.expose()).map(Stored::Scram), Some(password.expose().into()))
                }
            };
            (name.into(), Arc::new(Entry { stored, password, settings: user.settings.clone() }))
        });
        self.file.store(Arc::new(file.collect()));
    }

    /// `None`: there is no such user, or not one that may log in. Errors: 08001, the same for all, if nobody can be asked.
    pub async fn find(&self, user: &str) -> Result<Option<Arc<Entry>>, UserError> {
        let in_file = self.file.load().get(user).cloned();
        let Some(query) = &self.query else { return Ok(in_file) };
        if let Some(entry) = &in_file
            && entry.stored.is_some()
        {
            return Ok(in_file);
        }
        let Some(role) = query.role(user).await? else { return Ok(None) };
        // An expired password is none.
        let stored = role.stored.clone().filter(|_| role.is_valid(SystemTime::now()));
        let settings = in_file.map(|entry| entry.settings.clone()).unwrap_or_default();
        Ok(Some(Arc::new(Entry { stored, password: None, settings })))
    }

    /// A proof of this user has failed: what is remembered may be out of date.
    pub fn doubt(&self, user: &str) {
        if let Some(query) = &self.query {
            query.doubt(user);
        }
    }

    /// What a SCRAM proof is checked against; one that nothing fits where there is nothing to check it against.
    pub fn expected(&self, user: &str, entry: Option<&Entry>) -> Expected {
        match entry.and_then(|entry| entry.stored.as_ref()) {
            Some(Stored::Scram(verifier)) => Expected { verifier: verifier.clone(), known: true },
            _ => Expected { verifier: Verifier::mock(self.mock_key, user), known: false },
        }
    }
}

impl Entry {
    /// The stored MD5 hash, if that is what is stored.
    pub fn md5(&self) -> Option<Md5Hash> {
        match &self.stored {
            Some(Stored::Md5(hash)) => Some(hash.clone()),
            _ => None,
        }
    }

    /// An MD5 hash, if need be made from the password.
    pub fn md5_of(&self, user: &str) -> Option<Md5Hash> {
        self.md5().or_else(|| self.password.as_deref().map(|password| Md5Hash::derive(user, password)))
    }

    /// What weir can log in to the servers with when the client has proved nothing, or less than the password is worth.
    pub fn credential(&self) -> Credential {
        self.password.as_ref().map_or(Credential::None, |password| Credential::Password(Arc::clone(password)))
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({:?})", self.stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Secret, User};

    #[tokio::test]
    async fn the_file_knows_its_users_and_nobody_else() {
        let ann = ("ann".to_owned(), User::with_password(Secret::new("pencil")));
        let directory = Directory::new(&[ann, ("cert".to_owned(), User::default())].into_iter().collect(), None);
        let ann = directory.find("ann").await.expect("no servers").expect("known");
        assert!(directory.expected("ann", Some(&ann)).known);
        assert!(ann.md5().is_none() && ann.md5_of("ann") == Some(Md5Hash::derive("ann", "pencil")));
        assert!(matches!(ann.credential(), Credential::Password(_)));
        let cert = directory.find("cert").await.expect("no servers").expect("known");
        assert!(!directory.expected("cert", Some(&cert)).known && matches!(cert.credential(), Credential::None));
        assert!(directory.find("bob").await.expect("no servers").is_none());
        let mock = |user| directory.expected(user, None).verifier.salt;
        assert_eq!(mock("bob"), mock("bob"));
        assert!(!format!("{ann:?}").contains("pencil"));
    }
}
