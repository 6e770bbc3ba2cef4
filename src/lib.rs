//! A CSI driver and cloud-controller loop for Kubernetes on Proxmox VE.
//!
//! The layers, from left to right; nobody imports to the left of what stands here:
//!
//! ```text
//! types ← pve ← volume ← csi::controller ┐
//! types ← host ← node  ← csi::node       ├← cli ← main
//! types ← k8s ← ccm (→ pve)              │
//! volume, pve, k8s ← doctor ──────────────┤
//! types, host ← sim ─────────────────────┘      telemetry, runtime: leaves
//! ```
//!
//! `tests/architecture.rs` reads the `use` lines and keeps it so.

pub mod ccm;
pub mod cli;
pub mod config;
pub mod csi;
pub mod doctor;
pub mod host;
pub mod k8s;
pub mod node;
pub mod pve;
pub mod runtime;
pub mod sim;
pub mod telemetry;
pub mod types;
pub mod volume;
