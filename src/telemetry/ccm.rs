//! What the cloud-controller loop counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// A handle; clones share the counts.
#[derive(Clone, Default)]
pub struct CcmMetrics {
    last_good_poll: Family<RegionLabel, Gauge<f64, AtomicU64>>,
    polls: Family<PollLabels, Counter>,
    reconciles: Counter,
    actions: Family<ActionLabel, Counter>,
    refusals: Family<ReasonLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RegionLabel {
    region: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PollLabels {
    region: String,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActionLabel {
    action: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl CcmMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "proxmox_ccm_last_good_poll_timestamp_seconds",
            "When a region last answered a poll, in seconds since 1970, by region",
            self.last_good_poll.clone(),
        );
        // The encoder adds `_total` to the name of a counter.
        registry.register("proxmox_ccm_polls", "Polls of regions, by region and result", self.polls.clone());
        registry.register(
            "proxmox_ccm_reconciles",
            "Comparisons of all Nodes with their VMs",
            self.reconciles.clone(),
        );
        registry.register(
            "proxmox_ccm_actions",
            "Writes to Nodes, by what they changed",
            self.actions.clone(),
        );
        registry.register(
            "proxmox_ccm_refusals",
            "Acts on Nodes that were not done for want of proof, by reason",
            self.refusals.clone(),
        );
    }

    /// Counts a poll of a region; `now` in seconds since 1970.
    pub fn poll(&self, region: &str, ok: bool, now: f64) {
        let result = if ok { "ok" } else { "failed" };
        self.polls.get_or_create(&PollLabels { region: region.to_owned(), result }).inc();
        if ok {
            self.last_good_poll.get_or_create(&RegionLabel { region: region.to_owned() }).set(now);
        }
    }

    /// Counts a reconcile.
    pub fn reconcile(&self) {
        self.reconciles.inc();
    }

    /// Counts a write to a Node.
    pub fn action(&self, action: &'static str) {
        self.actions.get_or_create(&ActionLabel { action }).inc();
    }

    /// Counts an act that was refused.
    pub fn refusal(&self, reason: &'static str) {
        self.refusals.get_or_create(&ReasonLabel { reason }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::Metrics;

    #[test]
    fn every_metric_of_the_loop_keeps_its_name() {
        let metrics = Metrics::default();
        let ccm = metrics.ccm();
        ccm.poll("r1", true, 1_700_000_000.5);
        ccm.reconcile();
        ccm.action("labels");
        ccm.refusal("not_proven_gone");
        let text = metrics.render();
        let ours: Vec<&str> = text.lines().filter(|line| line.contains("proxmox_ccm_")).collect();
        insta::assert_snapshot!(ours.join("\n"));
    }
}
