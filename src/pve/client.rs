//! One request: sent once, with a deadline, answered or not.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;
use tower::{Service as _, ServiceExt as _};

use super::{
    error::{ApiError, Refusal, RequestName},
    transport::{Transport, TransportError},
    wire::Envelope,
};
use crate::{telemetry::metrics::Metrics, types::Region};

/// How long an ordinary answer may take: a dead node's neighbour answers for it after up to 30 s.
const DEADLINE: Duration = Duration::from_secs(35);
/// How long a request may wait for a place among those under way.
const QUEUE_DEADLINE: Duration = Duration::from_mins(2);
/// How long a synchronous allocation or deletion may take: 10 s for the lock and 60 s of work under it
/// (pve-cluster `Cluster.pm:cfs_lock`).
pub(super) const SLOW_DEADLINE: Duration = Duration::from_secs(90);

/// What a path segment, a form key or a form value may hold as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A client of one region. Clones share its connections.
#[derive(Clone)]
pub struct Client {
    region: Region,
    transport: Transport,
    token: HeaderValue,
    metrics: Metrics,
    /// The date of the last answer in seconds since 1970; 0 before the first.
    date: Arc<AtomicU64>,
}

/// An API token: `user@realm!name` and its secret.
#[derive(Clone)]
pub struct Token {
    /// `user@realm!name`.
    pub id: String,
    /// The secret.
    pub secret: String,
}

/// The secret is never printed.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A token that can't be a header.
#[derive(Debug, thiserror::Error)]
#[error("the token of region `{region}` has characters that no Proxmox token has")]
pub struct TokenError {
    region: Region,
}

/// A request being put together.
pub(super) struct Call {
    name: &'static str,
    method: Method,
    path: String,
    form: String,
    deadline: Duration,
}

impl Call {
    /// A request to `/api2/json/…`. `name` labels it in metrics; each of `segments` is encoded, so that no value can leave its place.
    pub(super) fn new(name: &'static str, method: Method, segments: &[&dyn fmt::Display]) -> Self {
        let mut path = String::from("/api2/json");
        for segment in segments {
            path.push('/');
            path.extend(utf8_percent_encode(&segment.to_string(), PLAIN));
        }
        Self { name, method, path, form: String::new(), deadline: DEADLINE }
    }

    /// Adds a parameter: to the query of a GET or DELETE, to the body of others.
    pub(super) fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        if !self.form.is_empty() {
            self.form.push('&');
        }
        self.form.extend(utf8_percent_encode(key, PLAIN));
        self.form.push('=');
        self.form.extend(utf8_percent_encode(&value.to_string(), PLAIN));
        self
    }

    /// Gives the server the time of a synchronous storage operation.
    pub(super) fn slow(mut self) -> Self {
        self.deadline = SLOW_DEADLINE;
        self
    }
}

impl Client {
    /// A client of `region` over `transport`.
    pub fn new(
        region: Region,
        transport: Transport,
        token: &Token,
        metrics: Metrics,
    ) -> Result<Self, TokenError> {
        let header = HeaderValue::try_from(format!("PVEAPIToken={}={}", token.id, token.secret));
        let Ok(mut header) = header else { return Err(TokenError { region }) };
        header.set_sensitive(true);
        Ok(Self { region, transport, token: header, metrics, date: Arc::default() })
    }

    /// The region.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// What the server's clock showed in the last answer, in seconds since 1970.
    pub fn server_date(&self) -> Option<u64> {
        Some(self.date.load(Ordering::Relaxed)).filter(|date| *date > 0)
    }

    /// Sends one request, once, and reads the `data` of its answer.
    pub(super) async fn call<T: DeserializeOwned>(&self, call: Call) -> Result<T, ApiError> {
        let started = Instant::now();
        let label = call.name;
        let result = self.send(call).await;
        self.metrics.pve_request(label, started.elapsed(), result.is_ok());
        result
    }

    async fn send<T: DeserializeOwned>(&self, call: Call) -> Result<T, ApiError> {
        let shown = call.path.strip_prefix("/api2/json").unwrap_or(&call.path);
        let request = RequestName(format!("{} {shown}", call.method));
        let started = Instant::now();
        let in_query = matches!(call.method, Method::GET | Method::DELETE);
        let (uri, body) = match (in_query, call.form.is_empty()) {
            (true, false) => (format!("{}?{}", call.path, call.form), Bytes::new()),
            (true, true) => (call.path, Bytes::new()),
            (false, _) => (call.path, Bytes::from(call.form)),
        };
        let mut builder = http::Request::builder().method(call.method).uri(uri);
        builder = builder.header(header::AUTHORIZATION, self.token.clone());
        if !in_query {
            builder = builder.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        let http = builder.body(body).map_err(|error| ApiError::NotSent {
            request: request.clone(),
            source: TransportError::NotSent(error.to_string()),
        })?;

        // Waiting for a place among the requests under way is not yet sending: the deadline of the answer begins after it.
        let mut transport = self.transport.clone();
        let answer = match tokio::time::timeout(QUEUE_DEADLINE, transport.ready()).await {
            Ok(Ok(ready)) => tokio::time::timeout(call.deadline, ready.call(http))
                .await
                .unwrap_or(Err(TransportError::Deadline(call.deadline))),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(TransportError::NotSent("too many requests wait for an answer".to_owned())),
        };
        let elapsed_ms = started.elapsed().as_millis();
        let response = match answer {
            Ok(response) => response,
            Err(source) => {
                tracing::debug!(region = %self.region, %request, elapsed_ms, error = %source, "proxmox gave no answer");
                return Err(match source {
                    TransportError::NotSent(_) => ApiError::NotSent { request, source },
                    TransportError::MaybeSent(_) | TransportError::Deadline(_) => {
                        ApiError::MaybeSent { request, source }
                    }
                });
            }
        };
        let date = response
            .headers()
            .get(header::DATE)
            .and_then(|date| super::httpdate::seconds(date.to_str().ok()?));
        self.date.store(date.unwrap_or(0), Ordering::Relaxed);
        let status = response.status().as_u16();
        tracing::debug!(region = %self.region, %request, status, elapsed_ms, "proxmox answered");
        if !response.status().is_success() {
            return Err(refused(request, status, &response));
        }
        match serde_json::from_slice::<Envelope<T>>(response.body()) {
            Ok(envelope) => Ok(envelope.data),
            Err(error) => Err(ApiError::Unreadable { request, why: error.to_string() }),
        }
    }
}

/// Reads a refusal. The text is in the body since pve-http-server 6, before that only in the reason phrase.
fn refused(request: RequestName, status: u16, response: &http::Response<Bytes>) -> ApiError {
    let reason = response
        .extensions()
        .get::<hyper::ext::ReasonPhrase>()
        .map(|reason| String::from_utf8_lossy(reason.as_bytes()).into_owned())
        .or_else(|| response.status().canonical_reason().map(str::to_owned))
        .unwrap_or_default();
    let body: Value = serde_json::from_slice(response.body()).unwrap_or(Value::Null);
    // 595 to 599 are AnyEvent's own statuses for a connection that failed; 502 to 504 a reverse proxy's.
    if (595..=599).contains(&status) || (502..=504).contains(&status) {
        return ApiError::Unreachable { request, status, message: reason };
    }
    let message = match body.get("message").and_then(Value::as_str) {
        Some(message) => message.trim_end().to_owned(),
        None => reason,
    };
    let errors = body.get("errors").and_then(Value::as_object).map(|errors| {
        errors.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
    });
    ApiError::Refused { request, status, refusal: Refusal { message, errors: errors.unwrap_or_default() } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_leaves_its_place_in_a_url() {
        let call = Call::new("test", Method::GET, &[&"nodes", &"../x?y#z", &"local:9999/vm-9999-a.raw"])
            .with("a&b", "c=d&e");
        assert_eq!(call.path, "/api2/json/nodes/..%2Fx%3Fy%23z/local%3A9999%2Fvm-9999-a.raw");
        assert_eq!(call.form, "a%26b=c%3Dd%26e");
    }

    #[test]
    fn a_token_is_never_printed() {
        let token = Token { id: "csi@pve!csi".into(), secret: "s3cret".into() };
        assert!(!format!("{token:?}").contains("s3cret"));
    }

    #[test]
    fn the_words_of_proxmox_are_kept() {
        let answer = |status: u16, body: &'static str| {
            let mut response = http::Response::new(Bytes::from_static(body.as_bytes()));
            *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
            refused(RequestName("PUT /x".into()), status, &response)
        };
        let error = answer(
            400,
            r#"{"data":null,"message":"Parameter verification failed.\n","errors":{"scsi4":"bad\n"}}"#,
        );
        assert_eq!(
            error.to_string(),
            "PUT /x: Proxmox answered 400 Parameter verification failed. scsi4: bad"
        );
        let error =
            answer(500, r#"{"data":null,"message":"checksum mismatch (file change by other user?)\n"}"#);
        assert!(error.is_digest_mismatch() && !error.is_unknown() && !error.changed_nothing());
        assert!(answer(595, "").is_unknown());
        assert!(answer(403, "{\"data\":null}").changed_nothing());
    }
}
