//! The seam between the typed client and HTTP: a boxed tower service from request to response.
//!
//! Requests carry a path and query only; the transport knows the server. Its error says the one thing that decides what may be
//! retried: whether the request was certainly not sent. Tests put the simulator's router here, in process.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tower::{ServiceBuilder, ServiceExt as _, util::BoxCloneSyncService};

use crate::telemetry::log::chain;

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
    /// PEM certificates to trust instead of the system's.
    pub ca_pem: Option<Vec<u8>>,
    /// Accept any certificate.
    pub insecure: bool,
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

/// Requests that may be under way to one region at once, so that the admins' own use keeps its workers
/// (pve-http-server runs 3 of them for each daemon).
const IN_FLIGHT: usize = 6;

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
    if let Some(pem) = &options.ca_pem {
        let certificates = reqwest::Certificate::from_pem_bundle(pem).map_err(SetupError::Ca)?;
        builder = builder.tls_certs_only(certificates);
    }
    if options.insecure {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    let client = builder.build().map_err(SetupError::Tls)?;

    let service = tower::service_fn(move |request: HttpRequest| {
        let (client, url) = (client.clone(), format!("{base}{}", request.uri()));
        async move { send(&client, &url, request).await }
    });
    Ok(BoxCloneSyncService::new(service))
}

/// Several servers of one region as one transport.
///
/// A request goes to the server that answered last. Where it was certainly not sent it goes to the next one; where it may have arrived it
/// is not sent again, but the next request goes elsewhere. There must be at least one server; `None` otherwise. No more requests are
/// under way at once than one region's servers may be given.
pub fn region(servers: Vec<Transport>) -> Option<Transport> {
    if servers.is_empty() {
        return None;
    }
    let servers: Arc<[Transport]> = servers.into();
    let preferred = Arc::new(AtomicUsize::new(0));
    let service = tower::service_fn(move |request: HttpRequest| {
        let (servers, preferred) = (Arc::clone(&servers), Arc::clone(&preferred));
        async move {
            let first = preferred.load(Ordering::Relaxed);
            let mut last = TransportError::NotSent("no server".to_owned());
            for turn in 0..servers.len() {
                let index = (first + turn) % servers.len();
                match servers[index].clone().oneshot(request.clone()).await {
                    Ok(response) => {
                        preferred.store(index, Ordering::Relaxed);
                        return Ok(response);
                    }
                    Err(TransportError::NotSent(why)) => {
                        tracing::debug!(
                            server = index,
                            error = why,
                            "cannot reach a server; trying the next one"
                        );
                        last = TransportError::NotSent(why);
                    }
                    Err(error) => {
                        preferred.store((index + 1) % servers.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
            Err(last)
        }
    });
    Some(limited(service))
}

/// Any service as a transport, with the limit on requests under way.
pub fn limited<S>(service: S) -> Transport
where
    S: tower::Service<HttpRequest, Response = HttpResponse, Error = TransportError>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    BoxCloneSyncService::new(ServiceBuilder::new().concurrency_limit(IN_FLIGHT).service(service))
}

/// A transport through which requests that change something leave only while `may` says so. It is asked when the request is about to
/// leave, behind every queue: whoever lost the right to write meanwhile does not.
pub fn gated(inner: Transport, may: impl Fn() -> bool + Send + Sync + 'static) -> Transport {
    let may = Arc::new(may);
    BoxCloneSyncService::new(tower::service_fn(move |request: HttpRequest| {
        let (inner, may) = (inner.clone(), Arc::clone(&may));
        async move {
            if request.method() != http::Method::GET && !may() {
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

    /// A server that does `answer`, and how often it was asked.
    fn server(answer: fn() -> Result<HttpResponse, TransportError>) -> (Transport, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let service = tower::service_fn(move |_: HttpRequest| {
            count.fetch_add(1, Ordering::Relaxed);
            async move { answer() }
        });
        (limited(service), asked)
    }

    async fn ask(transport: &Transport) -> Result<HttpResponse, TransportError> {
        transport.clone().oneshot(http::Request::new(Bytes::new())).await
    }

    #[tokio::test]
    async fn what_was_not_sent_goes_to_the_next_server_and_stays_there() {
        let (dead, dead_asked) = server(|| Err(TransportError::NotSent("refused".into())));
        let (good, good_asked) = server(|| Ok(http::Response::new(Bytes::new())));
        let both = region(vec![dead, good]).expect("two servers");
        for _ in 0..3 {
            ask(&both).await.expect("an answer");
        }
        assert_eq!((dead_asked.load(Ordering::Relaxed), good_asked.load(Ordering::Relaxed)), (1, 3));
    }

    #[tokio::test]
    async fn what_may_have_arrived_is_never_sent_again_but_the_next_request_goes_elsewhere() {
        let (half_dead, asked) = server(|| Err(TransportError::MaybeSent("reset".into())));
        let (good, good_asked) = server(|| Ok(http::Response::new(Bytes::new())));
        let both = region(vec![half_dead, good]).expect("two servers");
        assert!(matches!(ask(&both).await, Err(TransportError::MaybeSent(_))));
        ask(&both).await.expect("an answer");
        assert_eq!((asked.load(Ordering::Relaxed), good_asked.load(Ordering::Relaxed)), (1, 1));
    }

    #[tokio::test]
    async fn where_no_server_can_be_reached_nothing_was_sent() {
        let (a, _) = server(|| Err(TransportError::NotSent("a".into())));
        let (b, _) = server(|| Err(TransportError::NotSent("b".into())));
        let both = region(vec![a, b]).expect("two servers");
        assert!(matches!(ask(&both).await, Err(TransportError::NotSent(_))));
        assert!(region(Vec::new()).is_none());
    }

    #[tokio::test]
    async fn only_reads_pass_a_closed_gate() {
        use std::sync::atomic::AtomicBool;

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
        open.store(true, Ordering::Relaxed);
        assert!(send(http::Method::DELETE).await.is_ok());
    }
}
