//! TLS between proxies: each shows a certificate of the tier's own authority, and verifies the other's.
//!
//! Invariant: with TLS configured nothing is said before both certificates have been verified, the called one's for the host that was
//! dialled; without it nobody is talked to who speaks TLS. Who has it and who has not do not talk to each other at all, and say why.
//! Files that were read again count for connections that begin later. Non-goal: the secret, which is proven besides
//! ([`super::link::greet`]).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::config::{Endpoint, PeersTlsConfig};

/// The first byte of a TLS connection (RFC 8446, 5.1: handshake). No message of peers has this tag.
const HANDSHAKE: u8 = 22;
/// Between two complaints of the same kind in the log: peers try again many times a second.
const SAID_EVERY: Duration = Duration::from_secs(30);

/// A connection between two proxies.
pub type PeerStream = Box<dyn Both>;

pub trait Both: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Both for S {}

/// What certificate and key are used for, on either side.
pub struct Ends {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

/// Why a peer is not talked to.
#[derive(Clone, Copy)]
enum Complaint {
    SpeaksTls,
    SpeaksPlain,
    /// Also when the other one was shut down meanwhile, which must not keep the others from being told.
    Failed,
}

/// How connections between proxies begin.
pub struct PeerTls {
    ends: Option<ArcSwap<Ends>>,
    /// When each [`Complaint`] was made last.
    said: Mutex<[Option<Instant>; 3]>,
}

impl PeerTls {
    /// `None`: plain TCP. Errors are sentences for whoever wrote the configuration.
    pub fn new(config: Option<&PeersTlsConfig>) -> Result<Self, String> {
        let ends = config.map(Ends::read).transpose()?.map(ArcSwap::from_pointee);
        Ok(PeerTls { ends, said: Mutex::default() })
    }

    /// From now on connections begin so; whether they speak TLS at all does not change.
    pub fn renew(&self, fresh: Ends) {
        if let Some(ends) = &self.ends {
            ends.store(Arc::new(fresh));
        }
    }

    /// Begins a connection that this process has opened to `address`.
    pub async fn call(&self, address: &str, stream: TcpStream) -> io::Result<PeerStream> {
        let Some(ends) = &self.ends else { return Ok(Box::new(stream)) };
        let host = Endpoint::parse(address).map_or_else(|| address.to_owned(), |endpoint| endpoint.host);
        let name = ServerName::try_from(host).map_err(io::Error::other)?;
        match ends.load_full().connector.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(self.refused(address, Complaint::Failed, &format!("TLS failed: {error}"))),
        }
    }

    /// Begins a connection that somebody else has opened.
    pub async fn answer(&self, stream: TcpStream) -> io::Result<PeerStream> {
        let mut first = [0];
        let speaks_tls = stream.peek(&mut first).await? == 1 && first[0] == HANDSHAKE;
        let from = stream.peer_addr()?.to_string();
        match (&self.ends, speaks_tls) {
            (None, false) => Ok(Box::new(stream)),
            (None, true) => {
                Err(self.refused(&from, Complaint::SpeaksTls, "it speaks TLS, and [peers] names no certificate here"))
            }
            (Some(_), false) => {
                Err(self.refused(&from, Complaint::SpeaksPlain, "it speaks plain TCP, and [peers] demands TLS here"))
            }
            (Some(ends), true) => match ends.load_full().acceptor.accept(stream).await {
                Ok(stream) => Ok(Box::new(stream)),
                Err(error) => Err(self.refused(&from, Complaint::Failed, &format!("TLS failed: {error}"))),
            },
        }
    }

    fn refused(&self, peer: &str, complaint: Complaint, why: &str) -> io::Error {
        let said = &mut self.said.lock()[complaint as usize];
        if said.is_none_or(|said| said.elapsed() >= SAID_EVERY) {
            *said = Some(Instant::now());
            tracing::warn!(
                peer,
                "a peer is not talked to: {why}. All of them need ca, certificate and key in [peers], or none"
            );
        }
        io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned())
    }
}

impl Ends {
    /// Errors are sentences for whoever wrote the configuration.
    pub fn read(config: &PeersTlsConfig) -> Result<Ends, String> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(&config.authorities)? {
            roots.add(authority).map_err(|error| format!("`ca` holds a certificate that cannot be used: {error}"))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&config.certificate)?;
        let key = || PrivateKeyDer::from_pem_slice(config.key.expose().as_bytes()).map_err(|error| error.to_string());
        let unfit = |error: rustls::Error| format!("certificate and key do not fit each other: {error}");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key()?)
            .map_err(unfit)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(verifier.build().map_err(|error| format!("`ca`: {error}"))?)
            .with_single_cert(chain, key()?)
            .map_err(unfit)?;
        Ok(Ends { connector: TlsConnector::from(Arc::new(client)), acceptor: TlsAcceptor::from(Arc::new(server)) })
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    read.map_err(|error| format!("not a PEM certificate chain: {error}"))
}
