//! Ceph pools (pve-storage `Storage/RBDPlugin.pm`); what `rbd` itself says is from ceph (`src/tools/rbd/action`).
//!
//! Which line of `rbd` an error shows: with one line it is that one, with more it is the last but one, as the last is
//! still held back when the command fails (`RBDPlugin.pm:run_rbd_command`, pve-common `Cmd.pm:run`).

use super::super::error::PveError;
use crate::sim::world::Storage;

/// Sizes are whole MiB (`RBDPlugin.pm:alloc_image`, `volume_resize`).
const UNIT: u64 = 1 << 20;

/// What stands in front of a line of librbd's log.
const LOG: &str = "2026-11-20T12:00:00.000+0000 7f2b1c5fe640 -1 librbd";

/// Bytes that a volume gets of whom this many were asked for (`RBDPlugin.pm:alloc_image`).
pub fn round(size: u64) -> u64 {
    size.div_ceil(UNIT).saturating_mul(UNIT)
}

/// The path QEMU opens, or the device with `krbd` (`RBDPlugin.pm:path`, on a cluster that PVE itself runs).
pub fn path(storage: &Storage, name: &str) -> String {
    if storage.krbd() {
        return format!("/dev/rbd-pve/00000000-0000-4000-8000-000000000000/{}/{name}", spec(storage));
    }
    format!(
        "rbd:{}/{name}:conf=/etc/pve/ceph.conf:id=admin:keyring=/etc/pve/priv/ceph/{}.keyring",
        spec(storage),
        storage.id
    )
}

/// Pool and namespace (`RBDPlugin.pm:get_rbd_path`).
fn spec(storage: &Storage) -> String {
    match storage.properties.get("namespace") {
        Some(namespace) => format!("{}/{namespace}", storage.pool()),
        None => storage.pool().to_owned(),
    }
}

/// The answer to an allocation of a name that is taken (`RBDPlugin.pm:alloc_image`).
pub fn exists(name: &str) -> PveError {
    PveError::die(format!("rbd create '{name}' error: {LOG}: rbd image {name} already exists"))
}

/// The answer to an allocation in a pool that is full (`RBDPlugin.pm:alloc_image`).
pub fn no_space(name: &str) -> PveError {
    PveError::die(format!("rbd create '{name}' error: rbd: create error: (28) No space left on device"))
}

/// The answer to growing a volume in a pool that is full (`RBDPlugin.pm:volume_resize`).
pub fn no_space_to_grow(name: &str) -> PveError {
    PveError::die(format!("rbd resize '{name}' error: Resizing image: 0% complete...failed."))
}

/// The error of every command on a volume that is not there (`RBDPlugin.pm:rbd_volume_info`, `rbd_ls_snap`).
pub fn missing(name: &str) -> PveError {
    PveError::die(format!("rbd error: rbd: error opening image {name}: (2) No such file or directory"))
}

/// The error of starting QEMU on a volume that is not there: librbd's own, as `activate_volume` does nothing without
/// `krbd` (`RBDPlugin.pm:activate_volume`).
pub fn not_opened(storage: &Storage, name: &str) -> PveError {
    if storage.krbd() {
        return PveError::die(format!("can't map rbd volume {name}: rbd: sysfs write failed"));
    }
    missing(name)
}

/// The refusal to remove a volume that QEMU has open (`RBDPlugin.pm:free_image`).
pub fn in_use(name: &str) -> PveError {
    PveError::die(format!("rbd rm '{name}' error: rbd: error: image still has watchers"))
}

/// The refusal to remove a volume, or a snapshot of it, that clones stand on (`RBDPlugin.pm:free_image`).
pub fn has_clones(name: &str, snapshot: &str) -> PveError {
    PveError::die(format!(
        "rbd unprotect {name} snap '{snapshot}' error: {LOG}::SnapshotUnprotectRequest: 0x5601e4e6c520 \
         should_complete_error: ret_val=-16"
    ))
}

/// The refusal of a snapshot of a name that is taken (`RBDPlugin.pm:volume_snapshot`).
pub fn snapshot_exists(name: &str) -> PveError {
    PveError::die(format!("rbd snapshot '{name}' error: Creating snap: 10% complete...failed."))
}

/// The error of a snapshot that is not there (`RBDPlugin.pm:volume_snapshot_rollback`).
pub fn snapshot_missing() -> PveError {
    PveError::die("rbd error: rbd: error setting snapshot context: (2) No such file or directory")
}

/// The error of a cluster that does not answer (`RBDPlugin.pm:status`).
pub fn inactive() -> PveError {
    PveError::die("rbd error: rbd: couldn't connect to the cluster!")
}
