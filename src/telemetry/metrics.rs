//! The metrics, one registry for each process role.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::ccm::CcmMetrics;

/// A handle on the metrics; clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    pve_duration: Family<PveLabels, Histogram>,
    pve_errors: Family<PveLabels, Counter>,
    rpc_duration: Family<RpcLabels, Histogram>,
    ccm: CcmMetrics,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PveLabels {
    request: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    rpc: String,
    code: &'static str,
}

/// From a cheap read to a task that waits for a lock.
const SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        let pve_duration = Family::<PveLabels, Histogram>::new_with_constructor(histogram);
        let pve_errors = Family::<PveLabels, Counter>::default();
        let rpc_duration = Family::<RpcLabels, Histogram>::new_with_constructor(histogram);
        registry.register(
            "proxmox_api_request_duration_seconds",
            "Duration of requests to the Proxmox VE API, by request",
            pve_duration.clone(),
        );
        // The encoder adds `_total` to the name of a counter.
        registry.register(
            "proxmox_api_request_errors",
            "Requests to the Proxmox VE API that gave no usable answer or were refused, by request",
            pve_errors.clone(),
        );
        registry.register(
            "csi_rpc_duration_seconds",
            "Duration of CSI calls, by call and gRPC code",
            rpc_duration.clone(),
        );
        let ccm = CcmMetrics::default();
        ccm.register(&mut registry);
        Self(Arc::new(Inner { registry, pve_duration, pve_errors, rpc_duration, ccm }))
    }
}

impl Metrics {
    /// Counts a request to Proxmox.
    pub fn pve_request(&self, request: &'static str, elapsed: Duration, ok: bool) {
        let labels = PveLabels { request };
        self.0.pve_duration.get_or_create(&labels).observe(elapsed.as_secs_f64());
        if !ok {
            self.0.pve_errors.get_or_create(&labels).inc();
        }
    }

    /// Counts a CSI call.
    pub fn rpc(&self, rpc: &str, code: &'static str, elapsed: Duration) {
        // What a caller may make up is no label.
        let rpc = if code == "Unimplemented" { "other".to_owned() } else { rpc.to_owned() };
        self.0.rpc_duration.get_or_create(&RpcLabels { rpc, code }).observe(elapsed.as_secs_f64());
    }

    /// The counts of the cloud-controller loop.
    pub fn ccm(&self) -> &CcmMetrics {
        &self.0.ccm
    }

    /// All metrics in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string fails only where a metric's own encoder does, which these do not.
        match encode(&mut text, &self.0.registry) {
            Ok(()) => text,
            Err(error) => format!("# cannot encode metrics: {error}\n# EOF\n"),
        }
    }
}
