//! What the driver counts: CSI calls, what waits for a VM, what is known of who holds what, the Lease and Events.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{
        MetricType, counter::Counter, family::Family, gauge::ConstGauge, gauge::Gauge, histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use tokio::time::Instant;

use super::metrics::{RegionLabel, seconds};

/// A handle; clones share the counts.
#[derive(Clone)]
pub struct CsiMetrics {
    duration: Family<RpcLabels, Histogram>,
    in_flight: Family<RpcLabel, Gauge>,
    queue: Family<RegionLabel, Gauge>,
    sweeps: Family<RegionLabel, Counter>,
    answered: Family<RegionLabel, Counter>,
    events: Family<EventLabels, Counter>,
    now: Arc<Now>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    rpc: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabel {
    rpc: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    reason: &'static str,
    result: &'static str,
}

/// What is looked at when somebody asks.
#[derive(Default)]
struct Now {
    swept: Mutex<BTreeMap<String, Instant>>,
    lease: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Now").finish_non_exhaustive()
    }
}

/// The names of the calls that the services have: others are what a caller made up.
const RPCS: [&str; 25] = [
    "ControllerExpandVolume",
    "ControllerGetCapabilities",
    "ControllerGetVolume",
    "ControllerModifyVolume",
    "ControllerPublishVolume",
    "ControllerUnpublishVolume",
    "CreateSnapshot",
    "CreateVolume",
    "DeleteSnapshot",
    "DeleteVolume",
    "GetCapacity",
    "GetPluginCapabilities",
    "GetPluginInfo",
    "ListSnapshots",
    "ListVolumes",
    "NodeExpandVolume",
    "NodeGetCapabilities",
    "NodeGetInfo",
    "NodeGetVolumeStats",
    "NodePublishVolume",
    "NodeStageVolume",
    "NodeUnpublishVolume",
    "NodeUnstageVolume",
    "Probe",
    "ValidateVolumeCapabilities",
];
fn known(rpc: &str) -> String {
    if RPCS.contains(&rpc) { rpc.to_owned() } else { "other".to_owned() }
}

impl Default for CsiMetrics {
    fn default() -> Self {
        Self {
            duration: Family::new_with_constructor(seconds),
            in_flight: Family::default(),
            queue: Family::default(),
            sweeps: Family::default(),
            answered: Family::default(),
            events: Family::default(),
            now: Arc::default(),
        }
    }
}

impl CsiMetrics {
    /// The encoder adds `_total` to the name of a counter, and `_seconds` where that is the unit.
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "csi_rpc_duration_seconds",
            "Duration of CSI calls, by call and gRPC code",
            self.duration.clone(),
        );
        registry.register(
            "csi_rpcs_in_flight",
            "CSI calls that are answered now, by call",
            self.in_flight.clone(),
        );
        registry.register(
            "proxmox_csi_vm_queue_length",
            "Operations that wait for their turn at a VM or have it, by region",
            self.queue.clone(),
        );
        registry.register(
            "proxmox_csi_sweeps",
            "Complete readings of who holds what, by region",
            self.sweeps.clone(),
        );
        registry.register(
            "proxmox_csi_sweep_operations",
            "Operations that a new reading of who holds what answered, by region; of each reading several may",
            self.answered.clone(),
        );
        registry.register(
            "proxmox_csi_events",
            "Kubernetes Events of the driver, by reason and result (written, repeated, dropped, failed)",
            self.events.clone(),
        );
        registry.register_collector(Box::new(Arc::clone(&self.now)));
    }

    /// A CSI call is answered until the guard is told its code.
    pub fn rpc(&self, rpc: &str) -> Rpc {
        let rpc = known(rpc);
        let gauge = self.in_flight.get_or_create_owned(&RpcLabel { rpc: rpc.clone() });
        gauge.inc();
        Rpc { metrics: self.clone(), gauge, name: rpc, since: Instant::now() }
    }

    /// An operation waits for a VM of the region or has its turn, until the guard is dropped.
    pub fn queued(&self, region: &str) -> Queued {
        let gauge = self.queue.get_or_create_owned(&RegionLabel { region: region.to_owned() });
        gauge.inc();
        Queued(gauge)
    }

    /// Who holds what in a region was read as a whole; the reading began at `began`.
    pub fn swept(&self, region: &str, began: Instant) {
        // A panic while the map was locked can't have left it half changed: each change is one call.
        let mut swept = self.now.swept.lock().unwrap_or_else(PoisonError::into_inner);
        swept.insert(region.to_owned(), began);
        self.sweeps.get_or_create_owned(&RegionLabel { region: region.to_owned() }).inc();
    }

    /// A reading of who holds what answered an operation that waited for a new one.
    pub fn answered(&self, region: &str) {
        self.answered.get_or_create_owned(&RegionLabel { region: region.to_owned() }).inc();
    }

    /// What tells whether this process holds the lease; set once.
    pub fn lease(&self, holds: impl Fn() -> bool + Send + Sync + 'static) {
        // A second one would be of a second service in one process, which has one registry.
        let _ = self.now.lease.set(Box::new(holds));
    }

    /// Counts an Event. `result` is one of `written`, `repeated`, `dropped` and `failed`.
    pub fn event(&self, reason: &'static str, result: &'static str) {
        self.events.get_or_create(&EventLabels { reason, result }).inc();
    }
}

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !swept.is_empty() {
            let mut metric = encoder.encode_descriptor(
                "proxmox_csi_index_age",
                "How long ago the newest complete reading of who holds what began, by region.",
                Some(&Unit::Seconds),
                MetricType::Gauge,
            )?;
            for (region, began) in swept {
                let labels = RegionLabel { region };
                let age = ConstGauge::new(began.elapsed().as_secs_f64());
                age.encode(metric.encode_family(&labels)?)?;
            }
        }
        if let Some(holds) = self.lease.get() {
            let metric = encoder.encode_descriptor(
                "proxmox_csi_lease_held",
                "Whether this process holds the lease and so may act: 1 or 0.",
                None,
                MetricType::Gauge,
            )?;
            ConstGauge::new(i64::from(holds())).encode(metric)?;
        }
        Ok(())
    }
}

/// A CSI call that is answered.
pub struct Rpc {
    metrics: CsiMetrics,
    gauge: Gauge,
    name: String,
    since: Instant,
}

impl Rpc {
    /// The call was answered with this gRPC code.
    pub fn answered(&self, code: &'static str) {
        let labels = RpcLabels { rpc: self.name.clone(), code };
        self.metrics.duration.get_or_create(&labels).observe(self.since.elapsed().as_secs_f64());
    }
}

impl Drop for Rpc {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// An operation in the queue of a VM.
pub struct Queued(Gauge);

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.dec();
    }
}
