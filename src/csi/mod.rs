//! The CSI services over gRPC; the only place that knows tonic.

pub mod proto;
