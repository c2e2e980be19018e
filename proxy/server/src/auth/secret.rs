//! What weir keeps of a user to check a SCRAM-SHA-256 proof: never the password.
//!
//! Source: parse_scram_secret and mock_scram_secret in src/backend/libpq/auth-scram.c.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pgwire::api::auth::sasl::scram::ScramSecret;
use sha2::{Digest as _, Sha256};

const KEY_BYTES: usize = 32;
const MOCK_SALT_BYTES: usize = 16;
/// What Postgres itself uses by default (`scram_iterations`); a mock must not stand out.
const MOCK_ITERATIONS: u32 = 4096;

/// A verifier as Postgres stores it in `pg_authid.rolpassword`, or a mock of one.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    salt: Vec<u8>,
    iterations: u32,
    stored_key: [u8; KEY_BYTES],
    server_key: [u8; KEY_BYTES],
    known: bool,
}

/// A random value of this process; it makes the salts of unknown users stable and unpredictable.
#[derive(Clone, Copy)]
pub struct MockKey(pub [u8; KEY_BYTES]);

impl Secret {
    /// Reads `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    pub fn parse(verifier: &str) -> Option<Self> {
        let rest = verifier.strip_prefix("SCRAM-SHA-256$")?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let key = |text: &str| <[u8; KEY_BYTES]>::try_from(STANDARD.decode(text).ok()?).ok();
        Some(Secret {
            salt: STANDARD.decode(salt).ok().filter(|salt| !salt.is_empty())?,
            iterations: iterations.parse().ok().filter(|&count: &u32| count > 0 && i32::try_from(count).is_ok())?,
            stored_key: key(stored_key)?,
            server_key: key(server_key)?,
            known: true,
        })
    }

    /// Derives a verifier with a fresh salt: SASLprep where it applies, 4096 rounds of PBKDF2, as the server would. Takes
    /// milliseconds, so call it when users are loaded and not when they log in.
    pub fn derive(password: &str) -> Option<Self> {
        Self::parse(&postgres_protocol::password::scram_sha_256(password.as_bytes()))
    }

    /// A secret no password fits, with the same salt each time `user` is asked for.
    pub fn mock(key: MockKey, user: &str) -> Self {
        let digest = |purpose: &[u8]| -> [u8; KEY_BYTES] {
            Sha256::new()
                .chain_update(key.0)
                .chain_update(purpose)
                .chain_update([0])
                .chain_update(user)
                .finalize()
                .into()
        };
        Secret {
            salt: digest(b"salt")[..MOCK_SALT_BYTES].to_vec(),
            iterations: MOCK_ITERATIONS,
            stored_key: digest(b"stored"),
            server_key: digest(b"server"),
            known: false,
        }
    }

    /// False for a mock, whose exchange fails whatever the client proves.
    pub(super) fn is_known(&self) -> bool {
        self.known
    }

    pub(super) fn to_pgwire(&self) -> ScramSecret {
        ScramSecret::Verifier {
            salt: self.salt.clone(),
            iterations: self.iterations as usize,
            stored_key: self.stored_key.to_vec(),
            server_key: self.server_key.to_vec(),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
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
        let secret = Secret::derive("pencil").expect("derives");
        assert_eq!((secret.iterations, secret.salt.len(), secret.known), (4096, 16, true));
        assert_eq!(format!("{secret:?}"), "Secret(***)");
        let key = STANDARD.encode([7; 32]);
        assert!(Secret::parse(&format!("SCRAM-SHA-256$4096:AAAA${key}:{key}")).is_some());
        for bad in [
            String::new(),
            "md5d41d8cd98f00b204e9800998ecf8427e".to_owned(),
            format!("SCRAM-SHA-256$0:AAAA${key}:{key}"),
            format!("SCRAM-SHA-256$4294967295:AAAA${key}:{key}"),
            format!("SCRAM-SHA-256$4096:${key}:{key}"),
            format!("SCRAM-SHA-256$4096:AAAA${key}"),
            format!("SCRAM-SHA-256$4096:AAAA$AAAA:{key}"),
            format!("SCRAM-SHA-256$4096:AAAA${key}:{key}x"),
        ] {
            assert_eq!(Secret::parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_mock_is_stable_per_user_and_key() {
        let key = MockKey([1; 32]);
        assert_eq!(Secret::mock(key, "a"), Secret::mock(key, "a"));
        assert_ne!(Secret::mock(key, "a").salt, Secret::mock(key, "b").salt);
        assert_ne!(Secret::mock(key, "a").salt, Secret::mock(MockKey([2; 32]), "a").salt);
        assert_ne!(Secret::mock(key, "a").stored_key[..16], Secret::mock(key, "a").salt[..]);
    }
}
