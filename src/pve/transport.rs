//! The seam between the typed client and HTTP: a boxed tower service from request to response.
//!
//! Requests carry a path and query only; the transport knows the server. Its error says the one thing that decides what may be
//! retried: whether the request was certainly not sent. Tests put the simulator's router here, in process.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use tower::{ServiceExt as _, util::BoxCloneSyncService};

use super::transport_tls::pinned;
use crate::{telemetry::log::chain, types::Fingerprint};

/// A request with its whole body.
pub type HttpRequest = http::Request<Bytes>;
/// A response with its whole body.
pub type HttpResponse = http::Response<Bytes>;
/// From request to response.
pub type Transport = BoxCloneSyncService<HttpRequest, HttpResponse, TransportError>;

/// A response that did not come.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The request certainly did not leave: no connection, no TLS session.
    #[error("cannot connect: {0}")]
    NotSent(String),
    /// The request may have arrived.
    #[error("the connection failed: {0}")]
    MaybeSent(String),
    /// No response within the deadline; the request may have arrived.
    #[error("no answer within {} s", .0.as_secs())]
    Deadline(Duration),
}

/// How a server is reached and trusted.
#[derive(Debug, Clone, Default)]
pub struct HttpsOptions {
    /// The base, such as `https://pve1.example:8006`. A path is kept, and `/api2/json` at its end is dropped.
    pub url: String,
    /// Which certificates are believed.
    pub trust: Trust,
}

/// Which certificates are believed.
#[derive(Debug, Clone, Default)]
pub enum Trust {
    /// Those of the authorities that the system trusts.
    #[default]
    System,
    /// Those of the authorities in these PEM certificates, and no others.
    Ca(Vec<u8>),
    /// Just these, whoever signed them and whatever the name in them.
    Fingerprints(Vec<Fingerprint>),
    /// Any.
    Anything,
}

/// Marks a login: a POST that changes nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoginRequest;

/// What is done when the server that answered is doubted, given the reason.
type Doubt = Box<dyn Fn(&str) + Send + Sync>;

/// Goes with a request whose answer may show that another server would be a better one to ask: the server that answered is noted in it,
/// where there are several.
#[derive(Clone, Default)]
pub(super) struct Answerer(Arc<OnceLock<Doubt>>);

impl Answerer {
    /// Notes what is to be done when the server that answers is doubted. Only one server answers a request.
    pub(super) fn note(&self, doubt: impl Fn(&str) + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(doubt));
    }

    /// Doubts the server that answered, with the reason: it goes on being asked where no other answers.
    pub(super) fn doubt(&self, why: &str) {
        if let Some(doubt) = self.0.get() {
            doubt(why);
        }
    }
}

/// An HTTPS transport can't be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The URL is not one.
    #[error("`{url}` is not an https URL of a Proxmox server, such as https://pve1.example:8006")]
    Url {
        /// The refused text.
        url: String,
    },
    /// The CA file can't be used.
    #[error("the CA file does not hold PEM certificates")]
    Ca(#[source] reqwest::Error),
    /// TLS can't be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] reqwest::Error),
    /// TLS can't be set up for fingerprints.
    #[error("cannot set up TLS")]
    Pins(#[source] rustls::Error),
    /// The CA file can't be read.
    #[error("cannot read the CA file `{path}`")]
    CaFile {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Reads a CA file.
pub fn read_ca(path: &Path) -> Result<Vec<u8>, SetupError> {
    std::fs::read(path).map_err(|source| SetupError::CaFile { path: path.display().to_string(), source })
}

/// A transport to one server over HTTPS.
pub fn https(options: &HttpsOptions) -> Result<Transport, SetupError> {
    let bad_url = || SetupError::Url { url: options.url.clone() };
    let base = options.url.trim_end_matches('/').trim_end_matches("/api2/json").to_owned();
    let uri: http::Uri = base.parse().map_err(|_| bad_url())?;
    if uri.scheme_str() != Some("https") || uri.host().is_none() {
        return Err(bad_url());
    }

    // Another part of the process may have installed it already: then that one is in force, and it is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .http1_only()
        .connect_timeout(Duration::from_secs(5))
        // pveproxy closes a connection after 5 s without a request (pve-http-server AnyEvent.pm).
        .pool_idle_timeout(Duration::from_secs(4))
        .redirect(reqwest::redirect::Policy::none());
    builder = match &options.trust {
        Trust::System => builder,
        Trust::Ca(pem) => {
            let certificates = reqwest::Certificate::from_pem_bundle(pem).map_err(SetupError::Ca)?;
            builder.tls_certs_only(certificates)
        }
        Trust::Fingerprints(fingerprints) => {
            builder.tls_backend_preconfigured(pinned(fingerprints).map_err(SetupError::Pins)?)
        }
        Trust::Anything => builder.tls_danger_accept_invalid_certs(true),
    };
    let client = builder.build().map_err(SetupError::Tls)?;

    let service = tower::service_fn(move |request: HttpRequest| {
        let (client, url) = (client.clone(), format!("{base}{}", request.uri()));
        async move { send(&client, &url, request).await }
    });
    Ok(BoxCloneSyncService::new(service))
}

/// Any service as a transport.
pub fn boxed<S>(service: S) -> Transport
where
    S: tower::Service<HttpRequest, Response = HttpResponse, Error = TransportError>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(service)
}

/// A transport through which requests that change something leave only while `may` says so. It is asked when the request is about to
/// leave, behind every queue: whoever lost the right to write meanwhile does not.
pub fn gated(inner: Transport, may: impl Fn() -> bool + Send + Sync + 'static) -> Transport {
    let may = Arc::new(may);
    BoxCloneSyncService::new(tower::service_fn(move |request: HttpRequest| {
        let (inner, may) = (inner.clone(), Arc::clone(&may));
        async move {
            let changes =
                request.method() != http::Method::GET && request.extensions().get::<LoginRequest>().is_none();
            if changes && !may() {
                return Err(TransportError::NotSent("this process does not hold the lease".to_owned()));
            }
            inner.oneshot(request).await
        }
    }))
}

async fn send(
    client: &reqwest::Client,
    url: &str,
    request: HttpRequest,
) -> Result<HttpResponse, TransportError> {
    let (parts, body) = request.into_parts();
    let response = client.request(parts.method, url).headers(parts.headers).body(body).send().await;
    let response = response.map_err(|error| {
        // The request's own name says where it went.
        let error = error.without_url();
        if error.is_connect() || error.is_builder() {
            TransportError::NotSent(chain(&error))
        } else {
            TransportError::MaybeSent(chain(&error))
        }
    })?;
    let mut answer = http::Response::new(Bytes::new());
    *answer.status_mut() = response.status();
    *answer.headers_mut() = response.headers().clone();
    *answer.extensions_mut() = response.extensions().clone();
    *answer.body_mut() = response.bytes().await.map_err(|error| TransportError::MaybeSent(chain(&error)))?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_reads_pass_a_closed_gate() {
        use std::sync::atomic::{AtomicBool, Ordering};

        let answer = |_: HttpRequest| async { Ok::<_, TransportError>(HttpResponse::default()) };
        let open = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&open);
        let inner = BoxCloneSyncService::new(tower::service_fn(answer));
        let gate = gated(inner, move || told.load(Ordering::Relaxed));
        let send = async |method: http::Method| {
            let mut request = HttpRequest::default();
            *request.method_mut() = method;
            gate.clone().oneshot(request).await
        };
        assert!(send(http::Method::GET).await.is_ok());
        assert!(matches!(send(http::Method::POST).await, Err(TransportError::NotSent(_))));
        let mut login = HttpRequest::default();
        *login.method_mut() = http::Method::POST;
        login.extensions_mut().insert(LoginRequest);
        assert!(gate.clone().oneshot(login).await.is_ok(), "who may only read has to log in for that, too");
        open.store(true, Ordering::Relaxed);
        assert!(send(http::Method::DELETE).await.is_ok());
    }
}
