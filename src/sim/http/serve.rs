//! The listener: TLS with a certificate authority of its own, and connections as pveproxy keeps them: closed after
//! every answer of 400 and above, after 100 requests, and after 5 s without one (pve-http-server `AnyEvent.pm`).

use super::{Lost, Via};
use crate::sim::Sim;
use crate::sim::state::NodeState;
use crate::types::Fingerprint;
use axum::body::Body;
use http::header::{CONNECTION, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
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
    /// The key of the certificate authority cannot be read or written.
    #[error("cannot use `{0}`")]
    Key(PathBuf, #[source] std::io::Error),
    /// There is no node of this name to listen for.
    #[error("the simulated cluster has no node `{0}` to listen for")]
    Node(String),
    /// The address cannot be listened on.
    #[error("cannot listen on {0}")]
    Listen(SocketAddr, #[source] std::io::Error),
}

/// Writes what only the owner may read.
fn write_secret(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
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
        Self::with_authority(names, KeyPair::generate()?, false)
    }

    /// The same with a certificate that has expired long ago, for clients that are to notice.
    pub fn expired(names: &[String]) -> Result<Self, ServeError> {
        Self::with_authority(names, KeyPair::generate()?, true)
    }

    /// Makes a server certificate under the authority whose key is in the directory (`ca.key`, made if missing), and
    /// leaves the authority's certificate there for clients (`ca.pem`). Clients that trust it go on doing so after a
    /// restart.
    pub fn kept_in(directory: &Path, names: &[String]) -> Result<Self, ServeError> {
        let path = directory.join("ca.key");
        let io = |error| ServeError::Key(path.clone(), error);
        let key = match std::fs::read_to_string(&path) {
            Ok(pem) => KeyPair::from_pem(&pem)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = KeyPair::generate()?;
                write_secret(&path, &key.serialize_pem()).map_err(io)?;
                key
            }
            Err(error) => return Err(io(error)),
        };
        let mut tls = Self::with_authority(names, key, false)?;
        let certificate = directory.join("ca.pem");
        match std::fs::read_to_string(&certificate) {
            // The same key and name: what it signs is what the one made now signs.
            Ok(pem) if !pem.is_empty() => tls.ca = pem,
            _ => {
                let fresh = certificate.with_extension("new");
                std::fs::write(&fresh, &tls.ca).map_err(io)?;
                std::fs::rename(&fresh, &certificate).map_err(io)?;
            }
        }
        Ok(tls)
    }

    fn with_authority(names: &[String], authority_key: KeyPair, expired: bool) -> Result<Self, ServeError> {
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        authority.distinguished_name.push(DnType::CommonName, "pve-sim certificate authority");
        let authority = CertifiedIssuer::self_signed(authority, authority_key)?;

        let mut all: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
        all.extend(names.iter().cloned());
        let mut server = CertificateParams::new(all)?;
        server.distinguished_name.push(DnType::CommonName, "pve-sim");
        if expired {
            server.not_after = rcgen::date_time_ymd(2020, 1, 1);
        }
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
    /// Serves the API over TLS until the answer is dropped, as no node in particular: it answers while any node does.
    pub async fn listen(&self, address: SocketAddr, tls: &Tls) -> Result<Listening, ServeError> {
        self.listen_as(None, address, tls).await
    }

    /// The same as the pveproxy of `node`: it refuses connections, and ends those it has, while the node is down.
    pub async fn listen_as(
        &self,
        node: Option<&str>,
        address: SocketAddr,
        tls: &Tls,
    ) -> Result<Listening, ServeError> {
        if let Some(unknown) = node.filter(|node| !self.read(|state| state.nodes.contains_key(*node))) {
            return Err(ServeError::Node(unknown.to_owned()));
        }
        let failed = |error| ServeError::Listen(address, error);
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.config));
        let door = Door { sim: self.clone(), acceptor, node: node.map(str::to_owned) };
        Ok(Listening { address, accept: tokio::spawn(door.keep(address, listener)) })
    }
}

/// What stands behind an address.
struct Door {
    sim: Sim,
    acceptor: TlsAcceptor,
    node: Option<String>,
}

impl Door {
    fn is_open(&self) -> bool {
        let Some(node) = &self.node else { return true };
        let fares = self.sim.read(|state| state.nodes.get(node).copied());
        matches!(fares, Some(NodeState::Online | NodeState::Cut))
    }

    /// Listens whenever the node is up.
    async fn keep(self, address: SocketAddr, listener: TcpListener) {
        let mut first = Some(listener);
        loop {
            let changed = self.sim.node_notification();
            if !self.is_open() {
                changed.await;
                continue;
            }
            drop(changed);
            let listener = match first.take() {
                Some(listener) => listener,
                None => match TcpListener::bind(address).await {
                    Ok(listener) => listener,
                    Err(error) => {
                        tracing::warn!(%address, %error, "cannot listen again; trying on");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            self.serve(listener).await;
        }
    }

    /// Serves until the node goes down; its connections end with it.
    async fn serve(&self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            let changed = self.sim.node_notification();
            if !self.is_open() {
                return;
            }
            tokio::select! {
                biased;
                () = changed => {}
                // What has ended is forgotten.
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (sim, acceptor) = (self.sim.clone(), self.acceptor.clone());
                        drop(connections.spawn(connection(sim, acceptor, self.node.clone(), stream)));
                    }
                    Err(error) => {
                        // Out of descriptors: let some connections end.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }
}

async fn connection(sim: Sim, acceptor: TlsAcceptor, node: Option<String>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(IDLE, acceptor.accept(stream)).await else { return };
    let router = sim.router();
    let seen = AtomicU32::new(0);
    let service = service_fn(|mut request: http::Request<hyper::body::Incoming>| {
        let mut router = router.clone();
        if let Some(node) = &node {
            request.extensions_mut().insert(Via(node.clone()));
        }
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
