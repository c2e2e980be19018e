//! TLS towards clients.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::config::{TlsConfig, TlsMode};

/// `None` when TLS is configured off.
pub fn acceptor(config: &TlsConfig) -> Result<Option<TlsAcceptor>> {
    if config.mode == TlsMode::Disable {
        return Ok(None);
    }
    let open =
        |path: &Path| File::open(path).map(BufReader::new).with_context(|| format!("cannot read {}", path.display()));
    let chain = CertificateDer::pem_reader_iter(open(&config.certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{} is not a PEM certificate chain", config.certificate.display()))?;
    let key = PrivateKeyDer::from_pem_reader(open(&config.key)?)
        .with_context(|| format!("{} is not a PEM key", config.key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("certificate and key do not fit each other")?;
    Ok(Some(TlsAcceptor::from(Arc::new(server))))
}
