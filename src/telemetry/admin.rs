//! The admin port: `/livez`, `/readyz` and `/metrics`.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get};
use tokio::net::TcpListener;

use super::metrics::Metrics;

/// Whether the process serves its callers; clones share the answer.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Says whether the process serves its callers from now on.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    /// Whether it does.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Admin {
    metrics: Metrics,
    readiness: Readiness,
}

/// The admin port's routes.
pub fn router(metrics: Metrics, readiness: Readiness) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(render))
        .with_state(Admin { metrics, readiness })
}

async fn ready(State(admin): State<Admin>) -> impl IntoResponse {
    if admin.readiness.get() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}

async fn render(State(admin): State<Admin>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], admin.metrics.render())
}

/// Serves the admin port until `stop` is ready; returns the address it listens on and the future that serves.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    readiness: Readiness,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<(SocketAddr, impl Future<Output = io::Result<()>>)> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let router = router(metrics, readiness);
    Ok((bound, async move { axum::serve(listener, router).with_graceful_shutdown(stop).await }))
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn readiness_shows_and_metrics_keep_their_names() {
        let (metrics, readiness) = (Metrics::default(), Readiness::default());
        metrics.pve_request("resources", std::time::Duration::from_millis(3), false);
        metrics.rpc("CreateVolume", "Ok", std::time::Duration::from_millis(3));
        let router = router(metrics, readiness.clone());
        let get = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            router.clone().oneshot(request).await.expect("an answer")
        };
        assert_eq!(get("/livez").await.status(), StatusCode::OK);
        assert_eq!(get("/readyz").await.status(), StatusCode::SERVICE_UNAVAILABLE);
        readiness.set(true);
        assert_eq!(get("/readyz").await.status(), StatusCode::OK);
        let body = axum::body::to_bytes(get("/metrics").await.into_body(), 1 << 20).await.expect("a body");
        let text = String::from_utf8(body.to_vec()).expect("text");
        for expected in [
            "# TYPE proxmox_api_request_duration_seconds histogram",
            "proxmox_api_request_duration_seconds_count{request=\"resources\"} 1",
            "proxmox_api_request_errors_total{request=\"resources\"} 1",
            "csi_rpc_duration_seconds_count{rpc=\"CreateVolume\",code=\"Ok\"} 1",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }
}
