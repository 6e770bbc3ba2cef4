//! What a failed operation left behind, as far as is known.

use crate::pve::{ApiError, task::TaskError};

/// What is known after an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is under way, and the same request will fail the same way until somebody changes something.
    Final,
    /// Something may be under way, or the state could not be read: asking again is right.
    Unknown,
}

impl From<&ApiError> for Outcome {
    fn from(error: &ApiError) -> Self {
        // A VM that moved has no config where it was, and is found the next time.
        let moved = "Configuration file 'nodes/";
        match error.refusal() {
            None => Self::Unknown,
            Some((_, refusal)) if is_passing(&refusal.message) || refusal.message.contains(moved) => {
                Self::Unknown
            }
            Some(_) => Self::Final,
        }
    }
}

impl From<&TaskError> for Outcome {
    fn from(error: &TaskError) -> Self {
        let cut_off = ["unexpected status", "interrupt"];
        match error.exit_status() {
            None => Self::Unknown,
            Some(text) if is_passing(text) || cut_off.iter().any(|cut_off| text.contains(cut_off)) => {
                Self::Unknown
            }
            Some(_) => Self::Final,
        }
    }
}

/// Refusals that pass by themselves: a lock that was held for too long, work under it that was cut off, a quorum that was lost, a
/// backup that began meanwhile, a QEMU that does not answer (pve-cluster `Cluster.pm:cfs_lock`, pve-guest-common
/// `AbstractConfig.pm:check_lock`, qemu-server `QMPClient.pm:open_connection`).
fn is_passing(text: &str) -> bool {
    [
        "got timeout",
        "qmp socket - timeout",
        "no quorum",
        "cfs-lock",
        "-locked command timed out",
        "unable to open file '/etc/pve",
        "checksum mismatch",
        " is locked (",
    ]
    .iter()
    .any(|passing| text.contains(passing))
}
