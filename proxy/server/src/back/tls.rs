//! TLS towards the servers: one mode and one set of keys for everything weir connects to.
//!
//! Invariant: from `require` on nothing is sent before the handshake, and in the modes that verify nothing before the
//! certificate has been checked against the host that was dialled. A refused handshake is never followed by a plain try.
//! Modes mean what sslmode means to libpq (src/interfaces/libpq/fe-secure-openssl.c), but names are checked against
//! subjectAltName only.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::stream::Stream;
use crate::auth::certificate::end_point_hash;
use crate::auth::scram_client::Channel;

/// SSLRequest: length 8 and its code (src/include/libpq/pqcomm.h).
const SSL_REQUEST: [u8; 8] = *b"\0\0\0\x08\x04\xd2\x16\x2f";
/// What Postgres calls itself in ALPN (src/include/libpq/libpq-be.h).
pub const ALPN: &[u8] = b"postgresql";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerTlsMode {
    #[default]
    Disable,
    /// TLS where the server can.
    Prefer,
    Require,
    /// The certificate is signed by the authority.
    VerifyCa,
    /// And is for the host that was dialled.
    VerifyFull,
}

/// How to encrypt; cheap to clone.
#[derive(Clone, Default)]
pub struct ServerTls {
    mode: ServerTlsMode,
    config: Option<Arc<ClientConfig>>,
    /// Hash of what it was made from.
    origin: [u8; 32],
}

/// Files that have been read.
#[derive(Default)]
pub struct Material {
    /// Trusted authorities; empty: certificates cannot be verified.
    pub authorities: Vec<CertificateDer<'static>>,
    /// Chain and key that weir shows to servers.
    pub identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

impl Material {
    fn hash(&self) -> [u8; 32] {
        use sha2::Digest as _;
        let mut hash = sha2::Sha256::new();
        let identity = self.identity.as_ref();
        for certificate in self.authorities.iter().chain(identity.into_iter().flat_map(|(chain, _)| chain)) {
            hash.update(sha2::Sha256::digest(certificate));
        }
        hash.update(sha2::Sha256::digest(identity.map_or(&[][..], |(_, key)| key.secret_der())));
        hash.finalize().into()
    }
}

impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        (self.mode, self.origin) == (other.mode, other.origin)
    }
}

impl Eq for ServerTls {}

impl ServerTls {
    /// Errors are sentences for whoever wrote the configuration.
    pub fn new(mode: ServerTlsMode, material: Material) -> Result<Self, String> {
        if mode == ServerTlsMode::Disable {
            return Ok(ServerTls::default());
        }
        let verifies = matches!(mode, ServerTlsMode::VerifyCa | ServerTlsMode::VerifyFull);
        if verifies && material.authorities.is_empty() {
            return Err("verifying servers needs `ca`, the authority that signs their certificates".to_owned());
        }
        let origin = material.hash();
        let mut roots = RootCertStore::empty();
        for authority in &material.authorities {
            roots
                .add(authority.clone())
                .map_err(|error| format!("`ca` holds a certificate that cannot be used: {error}"))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            ServerVerifier { mode, roots, authorities: material.authorities, provider: Arc::clone(&provider) };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match material.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| format!("certificate and key do not fit each other: {error}"))?,
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(ServerTls { mode, config: Some(Arc::new(config)), origin })
    }

    pub fn mode(&self) -> ServerTlsMode {
        self.mode
    }

    /// The same for the driver of weir's own connections.
    pub fn driver_mode(&self) -> SslMode {
        match (self.mode, &self.config) {
            (ServerTlsMode::Disable, _) | (_, None) => SslMode::Disable,
            (ServerTlsMode::Prefer, _) => SslMode::Prefer,
            _ => SslMode::Require,
        }
    }

    /// Asks the server for TLS and does the handshake, as the mode says. The caller bounds the time.
    pub async fn encrypt(&self, host: &str, mut stream: TcpStream) -> io::Result<Stream> {
        let Some(config) = &self.config else { return Ok(Stream::Plain(stream)) };
        stream.write_all(&SSL_REQUEST).await?;
        // One byte and no more: what follows it belongs to the handshake.
        let mut answer = [0];
        stream.read_exact(&mut answer).await?;
        match answer {
            [b'S'] => {
                let name = server_name(host)?;
                let stream = TlsConnector::from(Arc::clone(config)).connect(name, stream).await?;
                Ok(Stream::Tls(Box::new(stream)))
            }
            [b'N'] if self.mode == ServerTlsMode::Prefer => Ok(Stream::Plain(stream)),
            [b'N'] => Err(io::Error::other("it does not speak TLS, and server_tls demands it")),
            _ => Err(io::Error::other("it does not speak the Postgres protocol")),
        }
    }
}

impl Stream {
    /// What a login over it can be bound to.
    pub fn channel(&self) -> Channel {
        match self {
            Stream::Plain(_) => Channel::Plain,
            Stream::Tls(stream) => Channel::Tls(peer_hash(stream)),
        }
    }
}

fn peer_hash<S>(stream: &TlsStream<S>) -> Option<Vec<u8>> {
    let (_, session) = stream.get_ref();
    session.peer_certificates().and_then(<[_]>::first).and_then(|certificate| end_point_hash(certificate))
}

fn server_name(host: &str) -> io::Result<ServerName<'static>> {
    ServerName::try_from(host.to_owned())
        .map_err(|_| io::Error::other(format!("\"{host}\" is not a name that TLS can verify")))
}

// ---- weir's own connections -----------------------------------------------------------------------------------------

impl<S> MakeTlsConnect<S> for ServerTls
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = ControlStream<S>;
    type TlsConnect = ControlConnect;
    type Error = io::Error;

    fn make_tls_connect(&mut self, host: &str) -> io::Result<ControlConnect> {
        Ok(ControlConnect { config: self.config.clone(), host: host.to_owned() })
    }
}

/// One handshake of the driver.
pub struct ControlConnect {
    config: Option<Arc<ClientConfig>>,
    host: String,
}

impl<S> TlsConnect<S> for ControlConnect
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = ControlStream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<ControlStream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            let config = self.config.ok_or_else(|| io::Error::other("TLS is not configured"))?;
            let name = server_name(&self.host)?;
            TlsConnector::from(config).connect(name, stream).await.map(ControlStream)
        })
    }
}

/// The driver's stream.
pub struct ControlStream<S>(TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> tokio_postgres::tls::TlsStream for ControlStream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        peer_hash(&self.0).map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for ControlStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ControlStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

// ---- verification ---------------------------------------------------------------------------------------------------

/// Checks as much of a server's certificate as the mode asks for; with a `ca` at hand `require` verifies like `verify-ca`,
/// as in libpq.
#[derive(Debug)]
struct ServerVerifier {
    mode: ServerTlsMode,
    roots: RootCertStore,
    authorities: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerVerifier {
    fn verify_chain(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        match verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms) {
            // A self-signed certificate that is itself listed as trusted: it has been found valid at this time, and there is no
            // signature of another to check. `openssl req -x509` makes such ones.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(error)))
                if format!("{error:?}").contains("CaUsedAsEndEntity")
                    && self.authorities.iter().any(|authority| authority == certificate) =>
            {
                Ok(())
            }
            result => result,
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.mode != ServerTlsMode::Prefer && !self.roots.is_empty() {
            self.verify_chain(end_entity, intermediates, now)?;
        }
        if self.mode == ServerTlsMode::VerifyFull {
            verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerTls({:?})", self.mode)
    }
}
