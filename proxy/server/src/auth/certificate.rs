//! What authentication reads from X.509 certificates: the common name, and the hash that channel binding uses.
//!
//! Non-goal: trust. A client's certificate that comes here has been verified by the TLS layer.

use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::signature_algorithm::SignatureAlgorithm;

/// tls-server-end-point (RFC 5929 §4.1): the certificate under the hash of its own signature, MD5 and SHA-1 raised to
/// SHA-256. `None` where the signature has no such hash (Ed25519): then there is no channel binding.
pub fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let hash: Option<Vec<u8>> = match SignatureAlgorithm::try_from(&parsed.signature_algorithm) {
        Ok(SignatureAlgorithm::RSASSA_PSS(parameters)) => hash_named(parameters.hash_algorithm_oid(), certificate),
        _ => {
            let oid = parsed.signature_algorithm.algorithm.to_id_string();
            hash_of_signature(&oid, certificate)
        }
    };
    hash
}

/// By the signature algorithms of RFC 3279, 4055 and 5758.
fn hash_of_signature(oid: &str, data: &[u8]) -> Option<Vec<u8>> {
    match oid {
        // md5, sha1 and sha256 WithRSAEncryption; ecdsa-with-SHA1 and -SHA256
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(data).to_vec()),
        "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" => Some(Sha224::digest(data).to_vec()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(data).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(data).to_vec()),
        _ => None,
    }
}

/// By the hash algorithms that RSASSA-PSS names.
fn hash_named(oid: &Oid<'_>, data: &[u8]) -> Option<Vec<u8>> {
    match oid.to_id_string().as_str() {
        "1.3.14.3.2.26" | "2.16.840.1.101.3.4.2.1" => Some(Sha256::digest(data).to_vec()),
        "2.16.840.1.101.3.4.2.2" => Some(Sha384::digest(data).to_vec()),
        "2.16.840.1.101.3.4.2.3" => Some(Sha512::digest(data).to_vec()),
        "2.16.840.1.101.3.4.2.4" => Some(Sha224::digest(data).to_vec()),
        _ => None,
    }
}

/// The subject's first common name; `None` if there is none or it holds NUL (CVE-2009-4034).
pub fn common_name(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    (!name.contains('\0')).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_no_certificate() {
        for nonsense in [&b""[..], b"\x30\x00", b"\x30\x82\xff\xff", &[0xff; 64]] {
            assert_eq!((end_point_hash(nonsense), common_name(nonsense)), (None, None));
        }
    }
}
