//! The API as a tower service in process, for clients that have a service as their transport.

use super::Lost;
use crate::sim::Sim;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tower::Service;

/// The connection ended before an answer came; the request may have been carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("connection closed before the answer was complete")]
pub struct ConnectionLost;

/// The simulator's router, whose faults are a transport's errors.
#[derive(Debug, Clone)]
pub struct SimService(Sim);

impl Sim {
    /// The API in process. Unlike `router`, a lost request or answer is an error.
    pub fn service(&self) -> SimService {
        SimService(self.clone())
    }
}

impl Service<Request<Body>> for SimService {
    type Response = Response;
    type Error = ConnectionLost;
    type Future = Pin<Box<dyn Future<Output = Result<Response, ConnectionLost>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectionLost>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let sim = self.0.clone();
        Box::pin(async move {
            // Most requests are for the API, which needs no router to be built.
            let response = if request.uri().path().starts_with("/_sim") {
                match sim.router().call(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            } else {
                super::api(State(sim), request).await
            };
            if response.extensions().get::<Lost>().is_some() { Err(ConnectionLost) } else { Ok(response) }
        })
    }
}
