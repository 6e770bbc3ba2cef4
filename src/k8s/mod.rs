//! Kubernetes: a client, a Lease that lets one process act, Events, and Nodes as the answer to "which VM is that?".
//!
//! The seam is `kube::Client::new(service)`: tests put a fake API server there, and everything above is what runs in a cluster.
//! Read [`lease`] for who may act, and [`cluster`] for how a node is found.

pub mod client;
pub mod cluster;
pub mod events;
pub mod lease;
pub mod node;
pub mod notices;

use k8s_openapi::jiff::Timestamp;

pub(crate) use crate::telemetry::log::chain;

/// The date, for what people read in objects. Nothing is decided by it: clocks of other machines are not ours.
pub(crate) fn date() -> Timestamp {
    Timestamp::now()
}

/// The date as a metric has it.
pub(crate) fn seconds_since_1970() -> f64 {
    date().as_duration().as_secs_f64()
}
