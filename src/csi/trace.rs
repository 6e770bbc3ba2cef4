//! One span for each call, and one line at its end.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::time::Instant;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, field::Empty};

use crate::telemetry::metrics::Metrics;

/// Puts every call into a span with the fields `rpc`, `id` and `volume`; the handlers record the volume, the id is the call's own. So every
/// line of the call's work, down to the ids of Proxmox's tasks, can be found by one id. Nothing else of a request is logged.
#[derive(Clone)]
pub(super) struct TraceLayer(pub(super) Metrics);

/// See [`TraceLayer`].
#[derive(Clone)]
pub(super) struct Trace<S>(S, Metrics);

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace(inner, self.0.clone())
    }
}

/// Asked every few seconds by sidecars and the kubelet; of interest only when they fail.
const FREQUENT: [&str; 6] = [
    "Probe",
    "GetPluginInfo",
    "GetPluginCapabilities",
    "NodeGetCapabilities",
    "NodeGetVolumeStats",
    "ControllerGetCapabilities",
];

impl<S, B, R> Service<http::Request<B>> for Trace<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let rpc = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        // Unique among the calls of all processes that log to one place.
        let id = &uuid::Uuid::new_v4().simple().to_string()[..12];
        let span = tracing::info_span!("rpc", rpc, id, volume = Empty);
        let (started, counted) = (Instant::now(), self.1.csi().rpc(&rpc));
        let call = span.in_scope(|| self.0.call(request));
        let traced = async move {
            let result = call.await;
            if let Ok(response) = &result {
                let status = Status::from_header_map(response.headers());
                counted.answered(name(status.as_ref().map_or(Code::Ok, Status::code)));
                log(&rpc, started, status);
            }
            result
        };
        Box::pin(traced.instrument(span))
    }
}

/// A failed unary call has its status in the headers; one that went well has it in the trailers, which come later.
fn log(rpc: &str, started: Instant, status: Option<Status>) {
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    match status {
        Some(status) if status.code() != Code::Ok => {
            tracing::warn!(elapsed_ms, code = ?status.code(), error = status.message(), "call failed");
        }
        _ if FREQUENT.contains(&rpc) => tracing::debug!(elapsed_ms, code = "Ok", "call ended"),
        _ => tracing::info!(elapsed_ms, code = "Ok", "call ended"),
    }
}

/// A code's name, as a label.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "Ok",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}
