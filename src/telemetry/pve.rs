//! What the client of the Proxmox VE API counts.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::metrics::{RegionLabel, seconds};

/// A handle; clones share the counts.
#[derive(Clone)]
pub struct PveMetrics {
    duration: Family<RequestLabel, Histogram>,
    errors: Family<RequestLabel, Counter>,
    requests: Family<OutcomeLabels, Counter>,
    in_flight: Family<PlaceLabels, Gauge>,
    waiting: Family<RegionLabel, Gauge>,
    waited: Family<ClassLabel, Histogram>,
    tasks: Family<TaskLabels, Histogram>,
    failovers: Family<RegionLabel, Counter>,
    logins: Family<LoginLabels, Counter>,
    reloads: Family<RegionLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabel {
    request: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabel {
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    class: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlaceLabels {
    region: String,
    node: String,
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: String,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoginLabels {
    region: String,
    result: &'static str,
}

impl Default for PveMetrics {
    fn default() -> Self {
        Self {
            duration: Family::new_with_constructor(seconds),
            errors: Family::default(),
            requests: Family::default(),
            in_flight: Family::default(),
            waiting: Family::default(),
            waited: Family::new_with_constructor(seconds),
            tasks: Family::new_with_constructor(seconds),
            failovers: Family::default(),
            logins: Family::default(),
            reloads: Family::default(),
        }
    }
}

impl PveMetrics {
    /// The encoder adds `_total` to the name of a counter.
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "proxmox_api_request_duration_seconds",
            "Duration of requests to the Proxmox VE API, by request",
            self.duration.clone(),
        );
        registry.register(
            "proxmox_api_request_errors",
            "Requests to the Proxmox VE API that gave no usable answer or were refused, by request",
            self.errors.clone(),
        );
        registry.register(
            "proxmox_api_requests",
            "Requests to the Proxmox VE API, by class (read, slow, change, login) and outcome (ok, refused, unknown, not_sent)",
            self.requests.clone(),
        );
        registry.register(
            "proxmox_api_requests_in_flight",
            "Requests to the Proxmox VE API that wait for an answer, by region, PVE node (empty where none is named) and class",
            self.in_flight.clone(),
        );
        registry.register(
            "proxmox_api_requests_waiting",
            "Requests to the Proxmox VE API that wait for their turn, by region",
            self.waiting.clone(),
        );
        registry.register(
            "proxmox_api_queue_duration_seconds",
            "How long requests to the Proxmox VE API waited for their turn, by class",
            self.waited.clone(),
        );
        registry.register(
            "proxmox_task_duration_seconds",
            "How long tasks of Proxmox VE were waited for, by type of task and result (ok, failed, unknown)",
            self.tasks.clone(),
        );
        registry.register(
            "proxmox_api_failovers",
            "Changes from one server of a region to another because one failed, by region",
            self.failovers.clone(),
        );
        registry.register(
            "proxmox_api_logins",
            "Logins with a password, by region and result (ok, refused, unknown)",
            self.logins.clone(),
        );
        registry.register(
            "proxmox_api_credentials_reloads",
            "Changed credentials that were read from their files, by region",
            self.reloads.clone(),
        );
    }

    /// Counts a request that was answered, or given up. `outcome` is one of `ok`, `refused`, `unknown` and `not_sent`.
    pub fn request(
        &self,
        request: &'static str,
        class: &'static str,
        elapsed: Duration,
        outcome: &'static str,
    ) {
        let label = RequestLabel { request };
        self.duration.get_or_create(&label).observe(elapsed.as_secs_f64());
        if outcome != "ok" {
            self.errors.get_or_create(&label).inc();
        }
        self.requests.get_or_create(&OutcomeLabels { class, outcome }).inc();
    }

    /// A request waits for its turn, until the guard is dropped; then how long it waited is counted.
    pub fn waiting(&self, region: &str, class: &'static str) -> Waiting {
        let gauge = self.waiting.get_or_create_owned(&RegionLabel { region: region.to_owned() });
        gauge.inc();
        let waited = self.waited.get_or_create_owned(&ClassLabel { class });
        Waiting { gauge, waited, since: tokio::time::Instant::now() }
    }

    /// A request is under way until the guard is dropped.
    pub fn in_flight(&self, region: &str, node: &str, class: &'static str) -> InFlight {
        let labels = PlaceLabels { region: region.to_owned(), node: node.to_owned(), class };
        let gauge = self.in_flight.get_or_create_owned(&labels);
        gauge.inc();
        InFlight(gauge)
    }

    /// Counts a task that was waited for. `result` is one of `ok`, `failed` and `unknown`.
    pub fn task(&self, task: &str, elapsed: Duration, result: &'static str) {
        let labels = TaskLabels { task: task.to_owned(), result };
        self.tasks.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// Counts a change of server.
    pub fn failover(&self, region: &str) {
        self.failovers.get_or_create(&RegionLabel { region: region.to_owned() }).inc();
    }

    /// Counts a login. `result` is one of `ok`, `refused` and `unknown`.
    pub fn login(&self, region: &str, result: &'static str) {
        self.logins.get_or_create(&LoginLabels { region: region.to_owned(), result }).inc();
    }

    /// Counts credentials that changed in their files.
    pub fn reload(&self, region: &str) {
        self.reloads.get_or_create(&RegionLabel { region: region.to_owned() }).inc();
    }
}

/// A request that waits for its turn.
pub struct Waiting {
    gauge: Gauge,
    waited: Histogram,
    since: tokio::time::Instant,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.gauge.dec();
        self.waited.observe(self.since.elapsed().as_secs_f64());
    }
}

/// A request that is under way.
pub struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}
