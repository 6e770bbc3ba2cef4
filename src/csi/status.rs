//! The only place that knows gRPC codes.

mod controller;
mod node;

use tonic::{Code, Status};

use crate::telemetry::log::chain;

/// A status whose text is the error and its causes, each once.
pub(super) fn with_chain(code: Code, error: &dyn std::error::Error) -> Status {
    Status::new(code, chain(error))
}
