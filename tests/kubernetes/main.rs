//! What speaks to Kubernetes, over a fake API server in process and under a paused clock.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "the fake server offers more than each test uses"
)]

mod apiserver;
mod ccm;
mod cluster;
mod command;
mod lease;
mod life;
mod node_events;
mod notices;
mod own_node;
mod rig;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod volumes;
