//! The tools for operators as processes, over a simulated Proxmox behind TLS and a fake API server: one world for each finding.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "the shared servers offer more than each test uses"
)]

#[path = "../kubernetes/apiserver.rs"]
mod apiserver;
mod cluster;
mod explain;
mod findings;
mod repair;
mod rig;
#[path = "../support/mod.rs"]
mod support;
mod volumes;
