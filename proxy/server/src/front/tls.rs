//! TLS towards clients.
//!
//! Invariant: a client whose certificate was not signed by `client_ca` does not get through the handshake; one without a
//! certificate does, and the HBA rules judge it. TLS that begins without SSLRequest must name the protocol by ALPN, so that
//! a client of something else cannot be brought to talk to weir (CVE-2021-3618, as Postgres 17 does).

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::auth::certificate::end_point_hash;
use crate::back::tls::ALPN;
use crate::config::{Config, TlsConfig, TlsMode};

/// What handshakes need: read at the start and whenever the configuration is read again.
pub struct ClientTls {
    acceptor: TlsAcceptor,
    /// Of our certificate, for SCRAM channel binding; `None` if its kind has none.
    pub end_point: Option<Arc<[u8]>>,
}

impl ClientTls {
    /// Reads the files the configuration names. `None` where TLS is off.
    pub fn of(config: &Config) -> Result<Option<Arc<ClientTls>>> {
        let tls = config.tls.as_ref().filter(|tls| tls.mode != TlsMode::Disable);
        tls.map(|tls| ClientTls::load(tls).map(Arc::new)).transpose()
    }

    fn load(config: &TlsConfig) -> Result<ClientTls> {
        let chain = certificates(&config.certificate)?;
        let key = PrivateKeyDer::from_pem_reader(open(&config.key)?)
            .with_context(|| format!("{} is not a PEM key", config.key.display()))?;
        let end_point = chain.first().and_then(|leaf| end_point_hash(leaf)).map(Arc::from);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            rustls::ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = match &config.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority).with_context(|| format!("{} cannot be used", path.display()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.allow_unauthenticated().build()?)
            }
        };
        let mut server = builder.with_single_cert(chain, key).context("certificate and key do not fit each other")?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ClientTls { acceptor: TlsAcceptor::from(Arc::new(server)), end_point })
    }

    /// The handshake. `direct`: the client began it without asking first.
    pub async fn accept(&self, stream: TcpStream, direct: bool) -> io::Result<TlsStream<TcpStream>> {
        let stream = self.acceptor.accept(stream).await?;
        if direct && stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::other("direct TLS without ALPN protocol negotiation"));
        }
        Ok(stream)
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    File::open(path).map(BufReader::new).with_context(|| format!("cannot read {}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_reader_iter(open(path)?)
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{} is not a PEM certificate chain", path.display()))
}
