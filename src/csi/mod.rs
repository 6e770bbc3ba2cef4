//! The CSI services over gRPC; the only place that knows tonic.

mod capability;
pub mod controller;
pub mod identity;
pub mod node;
mod notice;
pub mod proto;
mod request;
pub mod server;
mod status;
mod trace;
