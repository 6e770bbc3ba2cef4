//! Storages of the simulator: what volumes hold, and what each type of storage allows and says. The rules tested here
//! were read in Proxmox's source; the tests name the file and function.

#![allow(unreachable_pub, missing_docs, reason = "modules of one test binary")]

mod cluster;
mod contents;
mod order;
mod properties;
mod types;
