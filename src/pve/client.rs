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
use http::{Method, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;
use tower::ServiceExt as _;

use super::{
    auth::{Auth, AuthError, Pass},
    error::{ApiError, Refusal, RequestName},
    limits::{Class, Limits},
    task::Pace,
    transport::{Answerer, LoginRequest, Transport, TransportError},
    wire::Envelope,
};
use crate::{
    telemetry::metrics::Metrics,
    types::{Credentials, Region, credentials::Source},
};

/// Where the API begins.
const PREFIX: &str = "/api2/json";

/// How long an ordinary answer may take: a dead node's neighbour answers for it after up to 30 s.
const DEADLINE: Duration = Duration::from_secs(35);
/// How long a request may wait for a place among those under way.
const QUEUE_DEADLINE: Duration = Duration::from_mins(2);
/// How long a synchronous allocation or deletion may take: 10 s for the lock and 60 s of work under it
/// (pve-cluster `Cluster.pm:cfs_lock`).
pub(super) const SLOW_DEADLINE: Duration = Duration::from_secs(90);

/// What a path segment, a form key or a form value may hold as it is.
pub(super) const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A client of one region. Clones share its connections, its limits and its credentials.
#[derive(Clone)]
pub struct Client {
    region: Region,
    transport: Transport,
    pub(super) auth: Auth,
    limits: Limits,
    metrics: Metrics,
    /// The date of the last answer in seconds since 1970; 0 where it had none.
    date: Arc<AtomicU64>,
    /// How long tasks take.
    pub(super) pace: Arc<Pace>,
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

/// A request being put together.
pub(super) struct Call {
    name: &'static str,
    method: Method,
    path: String,
    form: String,
    deadline: Duration,
    /// The PVE node that has to do it.
    node: Option<String>,
    class: Class,
    /// Where the server that answers is noted.
    answerer: Option<Answerer>,
}

impl Call {
    /// A request to `/api2/json/…`. `name` labels it in metrics; each of `segments` is encoded, so that no value can leave its place.
    pub(super) fn new(name: &'static str, method: Method, segments: &[&dyn fmt::Display]) -> Self {
        let mut path = String::from(PREFIX);
        for segment in segments {
            path.push('/');
            path.extend(utf8_percent_encode(&segment.to_string(), PLAIN));
        }
        let node = match segments {
            [nodes, node, ..] if nodes.to_string() == "nodes" => Some(node.to_string()),
            _ => None,
        };
        let class = if method == Method::GET { Class::Read } else { Class::Change };
        Self { name, method, path, form: String::new(), deadline: DEADLINE, node, class, answerer: None }
    }

    /// The request as people read it.
    pub(super) fn request(&self) -> RequestName {
        RequestName(format!("{} {}", self.method, self.path.strip_prefix(PREFIX).unwrap_or(&self.path)))
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

    /// Says what the request costs the server, where it is no plain read or change.
    pub(super) fn class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// Asks which server answers.
    pub(super) fn noting(mut self, answerer: &Answerer) -> Self {
        self.answerer = Some(answerer.clone());
        self
    }

    /// The request occupies a worker of the node for as long as a storage takes, and is given the time for it.
    pub(super) fn slow(mut self) -> Self {
        self.deadline = SLOW_DEADLINE;
        self.class(Class::Slow)
    }

    fn http(&self, pass: Option<&Pass>) -> Result<http::Request<Bytes>, http::Error> {
        let in_query = matches!(self.method, Method::GET | Method::DELETE);
        let (uri, body) = match (in_query, self.form.is_empty()) {
            (true, false) => (format!("{}?{}", self.path, self.form), Bytes::new()),
            (true, true) => (self.path.clone(), Bytes::new()),
            (false, _) => (self.path.clone(), Bytes::from(self.form.clone())),
        };
        let mut builder = http::Request::builder().method(self.method.clone()).uri(uri);
        if !in_query {
            builder = builder.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        }
        if let Some(pass) = pass {
            for (name, value) in &pass.headers {
                builder = builder.header(name, value.clone());
            }
            if let Some(csrf) = pass.csrf.as_ref().filter(|_| self.method != Method::GET) {
                builder = builder.header("CSRFPreventionToken", csrf.clone());
            }
        }
        if self.class == Class::Login {
            builder = builder.extension(LoginRequest);
        }
        if let Some(answerer) = &self.answerer {
            builder = builder.extension(answerer.clone());
        }
        builder.body(body)
    }
}

impl Client {
    /// A client of `region` over `transport` with an API token.
    pub fn new(
        region: Region,
        transport: Transport,
        token: &Token,
        metrics: Metrics,
    ) -> Result<Self, AuthError> {
        let (id, secret) = (Source::inline(&token.id), Source::inline(&token.secret));
        Self::with_credentials(region, transport, Credentials::Token { id, secret }, metrics)
    }

    /// A client of `region` over `transport`. Files of the credentials are read now, and again when they change. Nothing is sent.
    pub fn with_credentials(
        region: Region,
        transport: Transport,
        credentials: Credentials,
        metrics: Metrics,
    ) -> Result<Self, AuthError> {
        let auth = Auth::new(region.clone(), credentials, metrics.pve().clone())?;
        let limits = Limits::new(&region, metrics.pve().clone());
        Ok(Self { region, transport, auth, limits, metrics, date: Arc::default(), pace: Arc::default() })
    }

    /// The region.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Where requests of this region, and what is done with them, are counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What the server's clock showed in the last answer, in seconds since 1970.
    pub fn server_date(&self) -> Option<u64> {
        Some(self.date.load(Ordering::Relaxed)).filter(|date| *date > 0)
    }

    /// Who the client is to Proxmox: `user@realm!name` of a token, or `user@realm`.
    pub async fn who(&self) -> String {
        self.auth.who().await
    }

    /// Sends one request and reads the `data` of its answer. It is sent once; a second time only where the credentials were refused and are
    /// others by now, for a request without valid ones is not looked at.
    pub(super) async fn call<T: DeserializeOwned>(&self, call: Call) -> Result<T, ApiError> {
        let mut again = true;
        loop {
            let pass = self.pass(&call).await?;
            match self.exchange(&call, Some(&pass)).await {
                Err(error) if error.is_unauthenticated() => {
                    if !self.auth.refused(&pass, &error.words()).await || !again {
                        return Err(error);
                    }
                    again = false;
                }
                answer => {
                    if !matches!(answer, Err(ApiError::NotSent { .. } | ApiError::MaybeSent { .. })) {
                        self.auth.accepted(&pass).await;
                    }
                    return answer;
                }
            }
        }
    }

    /// Waits for a place among the requests under way, sends once, and reads the answer.
    pub(super) async fn exchange<T: DeserializeOwned>(
        &self,
        call: &Call,
        pass: Option<&Pass>,
    ) -> Result<T, ApiError> {
        // Waiting for a place is not yet sending: the deadline of the answer begins after it.
        let place = self.limits.enter(call.node.as_deref(), call.class);
        let Ok(place) = tokio::time::timeout(QUEUE_DEADLINE, place).await else {
            let source = TransportError::NotSent("too many requests wait for an answer".to_owned());
            return Err(ApiError::NotSent { request: call.request(), source });
        };
        let started = Instant::now();
        let result = self.send(call, pass).await;
        drop(place);
        let outcome = match &result {
            Ok(_) => "ok",
            Err(ApiError::NotSent { .. }) => "not_sent",
            Err(error) if error.is_unknown() => "unknown",
            Err(_) => "refused",
        };
        self.metrics.pve().request(call.name, call.class.as_str(), started.elapsed(), outcome);
        result
    }

    async fn send<T: DeserializeOwned>(&self, call: &Call, pass: Option<&Pass>) -> Result<T, ApiError> {
        let request = call.request();
        let started = Instant::now();
        let http = call.http(pass).map_err(|error| ApiError::NotSent {
            request: request.clone(),
            source: TransportError::NotSent(error.to_string()),
        })?;
        let answer = tokio::time::timeout(call.deadline, self.transport.clone().oneshot(http)).await;
        let answer = answer.unwrap_or(Err(TransportError::Deadline(call.deadline)));
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
