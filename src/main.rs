//! The `proxmox-csi` binary.
fn main() {}
