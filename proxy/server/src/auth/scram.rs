//! What both sides of SCRAM-SHA-256 share: keys, signatures, proofs (RFC 5802 §3, src/common/scram-common.c).
//!
//! Invariant: a key is never printed, and comparisons of secrets take the same time wherever they differ.

use std::fmt;

use hmac::{Hmac, Mac as _};
use sha2::{Digest as _, Sha256};

use super::secret::{Key, Verifier};

pub const PLAIN: &str = "SCRAM-SHA-256";
/// With channel binding.
pub const PLUS: &str = "SCRAM-SHA-256-PLUS";
/// The only kind of channel binding Postgres knows (RFC 5929 §4).
pub const TLS_SERVER_END_POINT: &str = "tls-server-end-point";

/// All that is needed to log in as a user wherever the verifier is the same, without the password: what a client's own
/// proof gives away to a server that knows the verifier.
#[derive(PartialEq, Eq)]
pub struct ScramKeys {
    pub client_key: Key,
    pub verifier: Verifier,
}

/// HMAC-SHA-256 of the concatenated parts.
pub fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    // HMAC takes keys of every length; an impossible error gives a signature that nothing fits.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

pub fn sha256(data: &[u8]) -> Key {
    Sha256::digest(data).into()
}

/// ClientProof from ClientKey and ClientSignature, and ClientKey from ClientProof and ClientSignature.
pub fn xor(left: &Key, right: &Key) -> Key {
    std::array::from_fn(|index| left[index] ^ right[index])
}

/// Equal? In the same time for every pair of the same lengths.
pub fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

/// A fresh nonce: 18 random bytes in base64, as Postgres makes them (SCRAM_RAW_NONCE_LEN).
pub fn nonce() -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 18]>())
}

impl fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScramKeys(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn primitives() {
        // RFC 4231, test case 2.
        let mac = hmac(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        assert_eq!(mac[..4], [0x5b, 0xdc, 0xc1, 0x46]);
        assert_eq!(xor(&xor(&[5; 32], &[9; 32]), &[9; 32]), [5; 32]);
        assert!(same(b"ab", b"ab") && !same(b"ab", b"ac") && !same(b"ab", b"abc"));
        assert_ne!(nonce(), nonce());
    }
}
