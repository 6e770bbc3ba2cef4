//! The listener: TLS with a certificate authority of its own, and connections as pveproxy keeps them: closed after
//! every answer of 400 and above, after 100 requests, and after 5 s without one (pve-http-server `AnyEvent.pm`).

use super::Lost;
use crate::sim::Sim;
use crate::types::Fingerprint;
use axum::body::Body;
use http::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tower::Service as _;

/// `AnyEvent.pm`: keep-alive timeout and requests per connection.
const IDLE: Duration = Duration::from_secs(5);
const REQUESTS: u32 = 100;

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates cannot be made.
    #[error("cannot make the certificates")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refuses them.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
}

/// A certificate authority and a server certificate it has signed for `localhost`, the loopback addresses and the
/// names given.
pub struct Tls {
    ca: String,
    fingerprint: Fingerprint,
    config: Arc<rustls::ServerConfig>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// Makes both, fresh.
    pub fn generate(names: &[String]) -> Result<Self, ServeError> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name.push(DnType::CommonName, "pve-sim certificate authority");
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;

        let mut all: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
        all.extend(names.iter().cloned());
        let mut server = CertificateParams::new(all)?;
        server.distinguished_name.push(DnType::CommonName, "pve-sim");
        let key = KeyPair::generate()?;
        let certificate = server.signed_by(&key, &authority)?;

        let fingerprint = Fingerprint::new(Sha256::digest(certificate.der()).into());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { ca: authority.pem(), fingerprint, config: Arc::new(config) })
    }

    /// The authority's certificate, which clients are to trust.
    pub fn ca_pem(&self) -> &str {
        &self.ca
    }

    /// The fingerprint of the server's certificate, which clients may trust instead of the authority.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }
}

/// A listener at work; it ends when this is dropped.
#[derive(Debug)]
pub struct Listening {
    address: SocketAddr,
    accept: tokio::task::JoinHandle<()>,
}

impl Listening {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL for clients.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

impl Sim {
    /// Serves the API over TLS until the answer is dropped.
    pub async fn listen(&self, address: SocketAddr, tls: &Tls) -> Result<Listening, ServeError> {
        let failed = |error| ServeError::Listen(address, error);
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
        let sim = self.clone();
        let accept = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(connection(sim.clone(), acceptor.clone(), stream))),
                    Err(error) => {
                        // Out of descriptors: let some connections end.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(Listening { address, accept })
    }
}

async fn connection(sim: Sim, acceptor: TlsAcceptor, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(IDLE, acceptor.accept(stream)).await else { return };
    let router = sim.router();
    let seen = AtomicU32::new(0);
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| {
        let mut router = router.clone();
        let number = seen.fetch_add(1, Ordering::Relaxed) + 1;
        async move {
            let mut response = match router.call(request.map(Body::new)).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            if response.extensions().get::<Lost>().is_some() {
                return Err(std::io::Error::from(std::io::ErrorKind::ConnectionAborted));
            }
            if number >= REQUESTS {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended");
    }
}
