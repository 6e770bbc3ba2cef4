//! The admin port: `/livez`, `/readyz` and `/metrics`.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use axum::{Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get};
use tokio::net::TcpListener;

use super::metrics::Metrics;

/// Tells whether the process serves its callers.
pub type Ready = Arc<dyn Fn() -> bool + Send + Sync>;

#[derive(Clone)]
struct Admin {
    metrics: Metrics,
    ready: Ready,
}

/// The admin port's routes.
pub fn router(metrics: Metrics, ready: Ready) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render))
        .with_state(Admin { metrics, ready })
}

async fn readyz(State(admin): State<Admin>) -> impl IntoResponse {
    if (admin.ready)() { (StatusCode::OK, "ok\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
}

async fn render(State(admin): State<Admin>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], admin.metrics.render())
}

/// Serves the admin port until `stop` is ready; returns the address it listens on and the future that serves.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    ready: Ready,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<(SocketAddr, impl Future<Output = io::Result<()>>)> {
    let listener = match TcpListener::bind(address).await {
        // All addresses, on a machine without IPv6.
        Err(_) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        listener => listener,
    }?;
    let bound = listener.local_addr()?;
    let router = router(metrics, ready);
    Ok((bound, async move { axum::serve(listener, router).with_graceful_shutdown(stop).await }))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::{body::Body, http::Request};
    use tower::ServiceExt as _;

    use super::*;

    #[tokio::test]
    async fn readiness_shows_and_metrics_keep_their_names() {
        let (metrics, ready) = (Metrics::default(), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&ready);
        metrics.pve().request("resources", "read", std::time::Duration::from_millis(3), "refused");
        metrics.csi().rpc("CreateVolume").answered("Ok");
        let router = router(metrics, Arc::new(move || told.load(Ordering::Relaxed)));
        let get = async |path: &str| {
            let request = Request::get(path).body(Body::empty()).expect("a request");
            router.clone().oneshot(request).await.expect("an answer")
        };
        assert_eq!(get("/livez").await.status(), StatusCode::OK);
        assert_eq!(get("/readyz").await.status(), StatusCode::SERVICE_UNAVAILABLE);
        ready.store(true, Ordering::Relaxed);
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
