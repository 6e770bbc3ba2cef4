//! The chart, the manifests made of it, and what they bring: what is rendered, what a real API server says to it, and the CSI sidecars at
//! work with the rights and arguments that the chart gives them. `make test-deploy` builds what it needs and runs it; it needs no root.

mod chart;
mod cozystack;
mod helm;
mod life;
mod manifests;
mod monitoring;
mod rights;
mod server;
mod tenant;

#[path = "../support/kubernetes/mod.rs"]
mod kubernetes;
#[allow(dead_code, reason = "shared with the tests of the commands, which use all of it")]
#[path = "../kubernetes_real/rig.rs"]
mod rig;
#[path = "../support/mod.rs"]
mod support;
