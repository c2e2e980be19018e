//! Secrets of the shop: one root secret, and what is derived from it for each use.
//!
//! Invariant: no secret is printed, and none is stored in the database; sessions are stored as SHA-256 of a random value.
//! Non-goal: rotation without a restart.

use std::path::Path;

use anyhow::Context as _;
use hmac::{Hmac, Mac as _};
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};

/// The keys derived from the shop's root secret.
#[derive(Clone)]
pub struct Keys {
    order: [u8; 32],
    webhook: [u8; 32],
    provider: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(hidden)")
    }
}

/// Where the root secret came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Given by the operator: references and webhooks stay valid across restarts and instances.
    Given,
    /// Made up for this process: order references of earlier runs are no longer valid.
    MadeUp,
}

impl Keys {
    /// Derives every key from `secret`.
    pub fn from_secret(secret: &str) -> Self {
        let derive = |purpose: &str| hmac_sha256(secret.as_bytes(), &[purpose.as_bytes()]);
        Self { order: derive("order reference"), webhook: derive("webhook"), provider: hex(&derive("provider key")) }
    }

    /// The secret from its value, else from its file, else a random one.
    pub fn load(value: Option<&str>, file: Option<&Path>) -> anyhow::Result<(Self, Origin)> {
        let given = match (value, file) {
            (Some(value), _) => Some(value.trim().to_owned()),
            (None, Some(path)) => Some(
                std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the secret file {}", path.display()))?
                    .trim()
                    .to_owned(),
            ),
            (None, None) => None,
        };
        match given {
            Some(secret) if secret.len() < 16 => anyhow::bail!("the secret has fewer than 16 characters"),
            Some(secret) => Ok((Self::from_secret(&secret), Origin::Given)),
            None => Ok((Self::from_secret(&hex(&random_bytes())), Origin::MadeUp)),
        }
    }

    /// The key that payment webhooks are signed with.
    pub fn webhook(&self) -> &[u8] {
        &self.webhook
    }

    /// The bearer token the shop shows to the payment provider's API.
    pub fn provider(&self) -> &str {
        &self.provider
    }

    pub(crate) fn sign_order(&self, ids: &[u8]) -> [u8; 32] {
        hmac_sha256(&self.order, &[ids])
    }

    /// Compares a truncated signature in constant time.
    pub(crate) fn order_signature_fits(&self, ids: &[u8], signature: &[u8]) -> bool {
        let mut mac = new_hmac(&self.order);
        mac.update(ids);
        !signature.is_empty() && mac.verify_truncated_left(signature).is_ok()
    }
}

/// What the cookie carries and, as its SHA-256, the sessions table stores: 32 random bytes.
pub fn random_bytes() -> [u8; 32] {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// SHA-256 over `parts`, each preceded by its length so that no two lists of parts collide.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// HMAC-SHA256 over the concatenation of `parts`.
pub fn hmac_sha256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = new_hmac(key);
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// Whether `signature` is the HMAC-SHA256 of `parts`, compared in constant time.
pub fn hmac_fits(key: &[u8], parts: &[&[u8]], signature: &[u8]) -> bool {
    let mut mac = new_hmac(key);
    for part in parts {
        mac.update(part);
    }
    mac.verify_slice(signature).is_ok()
}

fn new_hmac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of every length")
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)] as char).collect()
}

/// The bytes of lower- or upper-case hexadecimal.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(hex(&[0, 15, 255]), "000fff");
        assert_eq!(unhex("000FfF"), Some(vec![0, 15, 255]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
    }

    #[test]
    fn short_secrets_are_refused_and_none_is_made_up() {
        assert!(Keys::load(Some("short"), None).is_err());
        assert_eq!(Keys::load(None, None).expect("random").1, Origin::MadeUp);
        assert_eq!(Keys::load(Some("sixteen letters!"), None).expect("given").1, Origin::Given);
    }

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(sha256(&[b"ab", b"c"]), sha256(&[b"a", b"bc"]));
    }
}
