//! The `pve-sim` binary.
fn main() {}
