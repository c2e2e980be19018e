//! What is kept of a user's password: a SCRAM-SHA-256 verifier or an MD5 hash, as Postgres stores them.
//!
//! Invariant: neither is ever printed. A mock verifier is made and used exactly like a real one.
//! Source: parse_scram_secret and mock_scram_secret in src/backend/libpq/auth-scram.c, get_password_type in
//! src/backend/libpq/crypt.c.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

/// Length of every SCRAM-SHA-256 key, in bytes.
pub const KEY_BYTES: usize = 32;
const MOCK_SALT_BYTES: usize = 16;
/// What Postgres itself uses by default (`scram_iterations`); a mock must not stand out.
const MOCK_ITERATIONS: u32 = 4096;

/// A SCRAM-SHA-256 key.
pub type Key = [u8; KEY_BYTES];

/// `pg_authid.rolpassword`, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stored {
    Scram(Verifier),
    Md5(Md5Hash),
}

/// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, read.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    pub salt: Vec<u8>,
    pub iterations: u32,
    pub stored_key: Key,
    pub server_key: Key,
}

/// `md5` and the hash of password and user name, in 32 hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Md5Hash(Box<str>);

/// A random value of this process; it makes the salts of unknown users stable and unpredictable.
#[derive(Clone, Copy)]
pub struct MockKey(pub Key);

impl Stored {
    /// Reads what Postgres stores. `None`: neither form.
    pub fn parse(text: &str) -> Option<Self> {
        Verifier::parse(text).map(Stored::Scram).or_else(|| Md5Hash::parse(text).map(Stored::Md5))
    }
}

impl Verifier {
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let key = |text: &str| Key::try_from(STANDARD.decode(text).ok()?).ok();
        Some(Verifier {
            salt: STANDARD.decode(salt).ok().filter(|salt| !salt.is_empty())?,
            iterations: iterations.parse().ok().filter(|&count: &u32| count > 0 && i32::try_from(count).is_ok())?,
            stored_key: key(stored_key)?,
            server_key: key(server_key)?,
        })
    }

    /// Derives a verifier with a fresh salt: SASLprep where it applies, 4096 rounds of PBKDF2, as the server would. Takes
    /// milliseconds, so call it when users are loaded and not when they log in.
    pub fn derive(password: &str) -> Option<Self> {
        Self::parse(&postgres_protocol::password::scram_sha_256(password.as_bytes()))
    }

    /// A verifier no password fits, with the same salt each time `user` is asked for.
    pub fn mock(key: MockKey, user: &str) -> Self {
        let digest = |purpose: &[u8]| -> Key {
            Sha256::new()
                .chain_update(key.0)
                .chain_update(purpose)
                .chain_update([0])
                .chain_update(user)
                .finalize()
                .into()
        };
        Verifier {
            salt: digest(b"salt")[..MOCK_SALT_BYTES].to_vec(),
            iterations: MOCK_ITERATIONS,
            stored_key: digest(b"stored"),
            server_key: digest(b"server"),
        }
    }
}

impl Md5Hash {
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("md5")?;
        let hexadecimal = digits.len() == 32 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        hexadecimal.then(|| Md5Hash(digits.into()))
    }

    /// Of a password that is known as such.
    pub fn derive(user: &str, password: &str) -> Self {
        let text = postgres_protocol::password::md5(password.as_bytes(), user);
        Md5Hash(text.strip_prefix("md5").unwrap_or(&text).into())
    }

    /// The answer to an MD5 challenge: `md5` and the hash of hash and salt (pg_md5_encrypt in src/common/md5_common.c).
    pub fn answer(&self, salt: [u8; 4]) -> String {
        use md5::Digest as _;
        let digest = md5::Md5::new().chain_update(self.0.as_bytes()).chain_update(salt).finalize();
        digest.iter().fold(String::from("md5"), |mut text, byte| {
            for digit in [byte >> 4, byte & 15] {
                text.extend(char::from_digit(u32::from(digit), 16));
            }
            text
        })
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier(***)")
    }
}

impl fmt::Debug for Md5Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Md5Hash(***)")
    }
}

impl fmt::Debug for MockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MockKey(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifiers_are_read_as_postgres_stores_them() {
        let verifier = Verifier::derive("pencil").expect("derives");
        assert_eq!((verifier.iterations, verifier.salt.len()), (4096, 16));
        assert_eq!(format!("{:?}", Stored::Scram(verifier)), "Scram(Verifier(***))");
        let key = STANDARD.encode([7; 32]);
        assert!(Verifier::parse(&format!("SCRAM-SHA-256$4096:AAAA${key}:{key}")).is_some());
        for bad in [
            String::new(),
            "pencil".to_owned(),
            "md5d41d8cd98f00b204e9800998ecf8427".to_owned(),
            "md5D41D8CD98F00B204E9800998ECF8427E".to_owned(),
            format!("SCRAM-SHA-256$0:AAAA${key}:{key}"),
            format!("SCRAM-SHA-256$4294967295:AAAA${key}:{key}"),
            format!("SCRAM-SHA-256$4096:${key}:{key}"),
            format!("SCRAM-SHA-256$4096:AAAA${key}"),
            format!("SCRAM-SHA-256$4096:AAAA$AAAA:{key}"),
            format!("SCRAM-SHA-256$4096:AAAA${key}:{key}x"),
        ] {
            assert_eq!(Stored::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn md5_answers_are_those_of_the_driver() {
        let hash = Md5Hash::derive("ann", "pencil");
        let stored = postgres_protocol::password::md5(b"pencil", "ann");
        assert_eq!(Stored::parse(&stored), Some(Stored::Md5(hash.clone())));
        let salt = [0, 255, 7, 10];
        assert_eq!(hash.answer(salt), postgres_protocol::authentication::md5_hash(b"ann", b"pencil", salt));
        assert_eq!(format!("{hash:?}"), "Md5Hash(***)");
    }

    #[test]
    fn a_mock_is_stable_per_user_and_key() {
        let key = MockKey([1; 32]);
        assert_eq!(Verifier::mock(key, "a"), Verifier::mock(key, "a"));
        assert_ne!(Verifier::mock(key, "a").salt, Verifier::mock(key, "b").salt);
        assert_ne!(Verifier::mock(key, "a").salt, Verifier::mock(MockKey([2; 32]), "a").salt);
        assert_ne!(Verifier::mock(key, "a").stored_key[..16], Verifier::mock(key, "a").salt[..]);
    }
}
