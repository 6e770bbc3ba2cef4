//! Snapshots of single volumes: what the tools say and refuse (pve-storage `volume_snapshot`,
//! `volume_snapshot_delete`, `volume_rollback_is_possible`, `volume_snapshot_rollback` of `Plugin.pm`, `LVMPlugin.pm`,
//! `LvmThinPlugin.pm`, `BTRFSPlugin.pm`, `ZFSPoolPlugin.pm`, `RBDPlugin.pm`).

use super::error::PveError;
use super::plugin::{format_of, path, rbd, zfspool};
use crate::sim::world::{Kind, Storage};

/// The name of a snapshot beside the volume: a file or a logical volume of its own.
fn beside(storage: &Storage, name: &str, snapshot: &str) -> String {
    if storage.kind.is_lvm() {
        let (stem, end) =
            name.rsplit_once('.').map_or((name, String::new()), |(stem, end)| (stem, format!(".{end}")));
        return format!("snap_{stem}_{snapshot}{end}");
    }
    format!("snap-{snapshot}-{}", name.rsplit('/').next().unwrap_or_default())
}

fn chained(storage: &Storage, name: &str) -> bool {
    storage.chains() && format_of(storage, name) == "qcow2"
}

/// The path of a chain's older file.
fn chain_path(storage: &Storage, name: &str, snapshot: &str) -> String {
    let whole = path(storage, name);
    let directory = whole.rsplit_once('/').map_or("", |(directory, _)| directory);
    format!("{directory}/{}", beside(storage, name, snapshot))
}

/// Takes a snapshot of a volume that has `existing` ones; returns the lines of the log
/// (`Storage.pm:volume_snapshot`).
pub fn take(
    storage: &Storage,
    name: &str,
    snapshot: &str,
    size: u64,
    existing: &[String],
) -> Result<Vec<String>, PveError> {
    let exists = existing.iter().any(|other| other == snapshot);
    let group = storage.volume_group();
    let snap = beside(storage, name, snapshot);
    if chained(storage, name) {
        let formatting = format!(
            "Formatting '{}', fmt=qcow2 cluster_size=131072 extended_l2=on preallocation=metadata \
             compression_type=zlib size={size} backing_file={snap} backing_fmt=qcow2 lazy_refcounts=off \
             refcount_bits=16",
            path(storage, name)
        );
        return Ok(if storage.kind.is_lvm() {
            vec![
                format!("  Renamed \"{name}\" to \"{snap}\" in volume group \"{group}\""),
                format!("  Logical volume \"{name}\" created."),
                formatting,
            ]
        } else {
            vec![
                format!("rename {} to {}", path(storage, name), chain_path(storage, name, snapshot)),
                formatting,
            ]
        });
    }
    match storage.kind {
        Kind::Lvmthin if exists => Err(PveError::die(format!(
            "lvcreate snapshot '{group}/{snap}' error:   Logical Volume \"{snap}\" already exists in volume group \
             \"{group}\""
        ))),
        Kind::Lvmthin => Ok(vec![format!("  Logical volume \"{snap}\" created.")]),
        Kind::Btrfs if exists => {
            let volume = path(storage, name).trim_end_matches("/disk.raw").to_owned();
            Err(PveError::die(format!(
                "command 'btrfs subvolume snapshot -r -- {volume} {volume}@{snapshot}' failed: ERROR: cannot \
                 snapshot '{volume}': Read-only file system\n"
            )))
        }
        Kind::Zfspool if exists => {
            Err(zfspool::no_snapshot(storage, name, snapshot, "dataset already exists"))
        }
        Kind::Rbd if exists => Err(rbd::snapshot_exists(name)),
        Kind::Rbd => Ok(vec!["Creating snap: 100% complete...done.".to_owned()]),
        _ => Ok(Vec::new()),
    }
}

/// Deletes a snapshot; `existing` is `None` when the volume itself is gone. Returns the lines of the log, those too
/// that come before an error (`Storage.pm:volume_snapshot_delete`).
pub fn delete(
    storage: &Storage,
    name: &str,
    snapshot: &str,
    existing: Option<&[String]>,
) -> (Vec<String>, Option<PveError>) {
    let exists = existing.is_some_and(|all| all.iter().any(|other| other == snapshot));
    let group = storage.volume_group();
    let snap = beside(storage, name, snapshot);
    if chained(storage, name) && exists {
        let mut lines = vec![
            format!("{name}: deleting snapshot '{snapshot}' by commiting snapshot 'current'"),
            format!("running 'qemu-img commit {}'", path(storage, name)),
            "Image committed.".to_owned(),
        ];
        if storage.kind.is_lvm() {
            lines.extend([
                format!("delete {name}"),
                format!("  Logical volume \"{name}\" successfully removed."),
                format!("rename {snap} to {name}"),
                format!("  Renamed \"{snap}\" to \"{name}\" in volume group \"{group}\""),
            ]);
        } else {
            lines.push(format!("rename {} to {}", chain_path(storage, name, snapshot), path(storage, name)));
        }
        return (lines, None);
    }
    match storage.kind {
        Kind::Lvmthin if exists => (vec![format!("  Logical volume \"{snap}\" successfully removed.")], None),
        Kind::Lvmthin => {
            let error = format!(
                "lvremove snapshot '{group}/{snap}' error:   Failed to find logical volume \"{group}/{snap}\""
            );
            (Vec::new(), Some(PveError::die(error)))
        }
        Kind::Zfspool if existing.is_none() => (Vec::new(), Some(zfspool::unreadable(storage, name))),
        Kind::Zfspool if !exists => (Vec::new(), Some(zfspool::snapshot_missing())),
        Kind::Btrfs | Kind::Zfspool => (Vec::new(), None),
        Kind::Rbd if existing.is_none() => (Vec::new(), Some(rbd::missing(name))),
        Kind::Rbd if !exists => (Vec::new(), Some(rbd::snapshot_missing())),
        Kind::Rbd => (vec!["Removing snap: 100% complete...done.".to_owned()], None),
        _ if existing.is_none() && chained(storage, name) => {
            let path = path(storage, name);
            let line = format!(
                "command '/usr/bin/qemu-img info '--output=json' {path} --backing-chain' failed: exit code 1"
            );
            let error = format!(
                "qemu-img: Could not open '{path}': Could not open '{path}': No such file or directory"
            );
            (vec![line], Some(PveError::die(error)))
        }
        _ if existing.is_none() => {
            let path = path(storage, name);
            let line = format!(
                "qemu-img: Could not open '{path}': Could not open '{path}': No such file or directory"
            );
            let error =
                format!("command '/usr/bin/qemu-img snapshot -d {snapshot} {path}' failed: exit code 1");
            (vec![line], Some(PveError::die(error)))
        }
        _ => (Vec::new(), None),
    }
}

/// Whether a volume can get another name: not while a chain of volumes carries its snapshots (`Plugin.pm:rename_volume`,
/// `LVMPlugin.pm:rename_volume`).
pub fn rename_is_possible(storage: &Storage, name: &str, existing: &[String]) -> Result<(), PveError> {
    if !chained(storage, name) || existing.is_empty() {
        return Ok(());
    }
    Err(PveError::die(if storage.kind.is_lvm() {
        format!("can't rename volume '{name}' - external snapshot exists")
    } else {
        "we can't rename volume if a snapshot backed by a volume-chain exists".to_owned()
    }))
}

/// Whether a volume can be put back to a snapshot: on ZFS and in a chain of volumes only to the most recent one
/// (`Storage.pm:volume_rollback_is_possible`).
pub fn rollback_is_possible(
    storage: &Storage,
    name: &str,
    snapshot: &str,
    existing: Option<&[String]>,
) -> Result<(), PveError> {
    let who = match storage.kind {
        Kind::Zfspool => format!("{}:{name}", storage.id),
        _ if chained(storage, name) => name.to_owned(),
        Kind::Lvm => {
            return Err(PveError::die(format!(
                "can't rollback snapshot for '{}' volume",
                format_of(storage, name)
            )));
        }
        _ => return Ok(()),
    };
    let Some(existing) = existing else {
        return match storage.kind {
            Kind::Zfspool => Err(zfspool::unreadable(storage, name)),
            _ => Ok(()),
        };
    };
    match existing.iter().position(|other| other == snapshot) {
        None => {
            Err(PveError::die(format!("can't rollback, snapshot '{snapshot}' does not exist on '{who}'")))
        }
        Some(at) if at + 1 < existing.len() => {
            Err(PveError::die(format!("can't rollback, '{snapshot}' is not most recent snapshot on '{who}'")))
        }
        Some(_) => Ok(()),
    }
}

/// Puts a volume back to a snapshot (`Storage.pm:volume_snapshot_rollback`).
pub fn rollback(storage: &Storage, name: &str, existing: Option<&[String]>) -> Result<Vec<String>, PveError> {
    let group = storage.volume_group();
    match (storage.kind, existing) {
        (Kind::Lvmthin, Some(_)) => Ok(vec![
            format!("  Logical volume \"{name}\" successfully removed."),
            format!("  Logical volume \"{name}\" created."),
        ]),
        (Kind::Lvmthin, None) => Err(PveError::die(format!(
            "lvremove '{group}/{name}' error:   Failed to find logical volume \"{group}/{name}\""
        ))),
        (Kind::Rbd, Some(_)) => Ok(vec!["Rolling back to snapshot: 100% complete...done.".to_owned()]),
        (_, Some(_)) => Ok(Vec::new()),
        (Kind::Zfspool, None) => Err(zfspool::unreadable(storage, name)),
        (Kind::Rbd, None) => Err(rbd::missing(name)),
        (_, None) => Err(PveError::die(format!("volume '{}:{name}' does not exist", storage.id))),
    }
}
