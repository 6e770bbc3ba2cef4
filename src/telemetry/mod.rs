//! What the process tells of itself: logs, metrics, and the admin port.

pub mod admin;
pub mod ccm;
pub mod csi;
pub mod log;
pub mod metrics;
pub mod pve;
