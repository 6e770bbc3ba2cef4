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
        // Refusals that pass by themselves: a lock that was held for too long, a quorum that was lost.
        let passing =
            ["got timeout", "no quorum", "cfs-lock", "checksum mismatch", "Configuration file 'nodes/"];
        match error.refusal() {
            None => Self::Unknown,
            Some((_, refusal)) if passing.iter().any(|text| refusal.message.contains(text)) => Self::Unknown,
            Some(_) => Self::Final,
        }
    }
}

impl From<&TaskError> for Outcome {
    fn from(error: &TaskError) -> Self {
        let passing =
            ["got timeout", "no quorum", "cfs-lock", "checksum mismatch", "unexpected status", "interrupt"];
        match error.exit_status() {
            None => Self::Unknown,
            Some(text) if passing.iter().any(|passing| text.contains(passing)) => Self::Unknown,
            Some(_) => Self::Final,
        }
    }
}
