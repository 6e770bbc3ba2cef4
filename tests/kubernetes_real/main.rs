//! The commands that speak to Kubernetes, as processes, over etcd and kube-apiserver as processes: what their service accounts may do, what
//! becomes of Nodes and Leases, and what kubectl shows of it. `make test-kubernetes` builds the servers and runs it; it needs no root.
//!
//! Each test has a control plane and a simulated Proxmox of its own.

mod controller;
mod lease;
mod nodes;
mod removal;
mod rig;
mod rights;

#[path = "../support/kubernetes/mod.rs"]
mod kubernetes;
#[path = "../support/mod.rs"]
mod support;
