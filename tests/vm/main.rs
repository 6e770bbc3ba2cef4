//! The driver over real guests: each worker VM is a QEMU with a kernel of its own, plugged and unplugged as Proxmox VE
//! does it, and the node plugin runs in it. What a kernel does is seen here and nowhere else.
//!
//! Needs QEMU and what `tests/guest-image/build.sh` names, not root. A guest has one processor in software: run one
//! test at a time, `make test-vm`.

mod churn;
mod disks;
mod faults;
mod kinds;
mod life;
mod process;
mod rig;
mod soak;
#[path = "../support/mod.rs"]
mod support;
