//! Calls of the simulator: what volumes hold, what each type of storage allows and says, and the life of VMs: power, the
//! HA manager, cloud-init. The rules tested here were read in Proxmox's source; the tests name the file and function.

#![allow(unreachable_pub, missing_docs, reason = "modules of one test binary")]

mod cloudinit;
mod cluster;
mod contents;
mod faults;
mod order;
mod power;
mod properties;
mod types;
