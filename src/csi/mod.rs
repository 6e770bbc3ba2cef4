//! The CSI services over gRPC; the only place that knows tonic.

mod capability;
pub mod controller;
pub mod proto;
mod status;
