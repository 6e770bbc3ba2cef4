//! Kubernetes: a client, a Lease that lets one process act, Events, and Nodes as the answer to "which VM is that?".
//!
//! The seam is `kube::Client::new(service)`: tests put a fake API server there, and everything above is what runs in a cluster.
//! Read [`lease`] for who may act, and [`cluster`] for how a node is found.

pub mod client;
pub mod cluster;
pub mod events;
pub mod inventory;
pub mod lease;
pub mod node;
pub mod notices;
pub mod own_node;
pub mod volumes;

use k8s_openapi::jiff::Timestamp;

pub(crate) use crate::telemetry::log::chain;

/// The date, for what people read in objects. Nothing is decided by it: clocks of other machines are not ours.
pub(crate) fn date() -> Timestamp {
    Timestamp::now()
}

/// A moment as people read it, in UTC; nothing where it is out of the calendar.
pub fn moment(seconds_since_1970: u64) -> String {
    let seconds = i64::try_from(seconds_since_1970).ok();
    seconds
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .map(|at| at.to_string())
        .unwrap_or_default()
}

/// The clock of this machine, in seconds since 1970: to be compared with what others show, and for nothing else.
pub fn now_seconds() -> i64 {
    date().as_second()
}

/// The date as a metric has it.
pub(crate) fn seconds_since_1970() -> f64 {
    date().as_duration().as_secs_f64()
}
