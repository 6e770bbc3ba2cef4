//! What Proxmox VE decides, as pure functions over plain data: nothing here waits, touches a file or knows HTTP.
//!
//! One file per PVE module. A rule names its source as `file:function` of the Proxmox repository it stands in
//! (qemu-server, pve-storage, pve-guest-common, pve-access-control, pve-common). Read `conf` first.

pub mod access;
pub mod api;
pub mod cloudinit;
pub mod conf;
pub mod dirplugin;
pub mod drive;
pub mod error;
pub mod options;
pub mod order;
pub mod pending;
pub mod plugin;
pub mod roles;
pub mod schema;
pub mod snap;
pub mod upid;
