//! The metrics, one registry for each process role.

use std::sync::Arc;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{histogram::Histogram, info::Info},
    registry::Registry,
};

use super::{ccm::CcmMetrics, csi::CsiMetrics, pve::PveMetrics};

/// A handle on the metrics; clones share them.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    pve: PveMetrics,
    csi: CsiMetrics,
    ccm: CcmMetrics,
}

/// The label of what is counted by region.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RegionLabel {
    pub(super) region: String,
}

/// From a cheap read to a task that waits for a lock.
const SECONDS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// A histogram of durations.
pub(super) fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let (pve, csi, ccm) = (PveMetrics::default(), CsiMetrics::default(), CcmMetrics::default());
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("proxmox_csi_build", "The version of this program", build);
        pve.register(&mut registry);
        csi.register(&mut registry);
        ccm.register(&mut registry);
        Self(Arc::new(Inner { registry, pve, csi, ccm }))
    }
}

impl Metrics {
    /// The counts of the client of Proxmox.
    pub fn pve(&self) -> &PveMetrics {
        &self.0.pve
    }

    /// The counts of the driver.
    pub fn csi(&self) -> &CsiMetrics {
        &self.0.csi
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
