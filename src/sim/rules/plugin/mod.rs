//! What differs between storage types: paths, sizes, and what a volume that is or is not there looks like (pve-storage
//! `Storage/Plugin.pm` and the plugins beside it).
//!
//! Everything here asks the storage's type first; names are in `volname`, what volumes can do in `feature`, and what
//! the types without a directory say for themselves in `zfspool` and `rbd`, directories' in `dirplugin`.

pub mod feature;
pub mod rbd;
pub mod volname;
pub mod zfspool;

pub use volname::{VolumeName, base_name, disk_name, disk_number, owner_of_name, parse};

use super::dirplugin;
use super::error::PveError;
use crate::sim::world::{Kind, Storage};

/// Bytes of an LVM extent.
pub const EXTENT: u64 = 4 << 20;

/// The image format of this name.
pub fn format_named(word: &str) -> Option<&'static str> {
    ["raw", "qcow2", "vmdk", "subvol"].into_iter().find(|format| *format == word)
}

/// The format of a volume, by its name (`Storage/Plugin.pm:parse_name_dir`).
pub fn format_of(storage: &Storage, name: &str) -> &'static str {
    parse(storage, name).map_or("raw", |name| name.format)
}

/// The formats that new volumes may have; the first is what one gets without asking (`Storage/Plugin.pm:get_formats`,
/// `LVMPlugin.pm:get_formats`).
pub fn formats(storage: &Storage) -> &'static [&'static str] {
    match storage.kind {
        Kind::Dir => &["raw", "qcow2", "vmdk", "subvol"],
        Kind::Nfs | Kind::Cifs => &["raw", "qcow2", "vmdk"],
        Kind::Btrfs | Kind::Zfspool => &["raw", "subvol"],
        Kind::Lvm if storage.chains() => &["qcow2", "raw"],
        Kind::Lvm | Kind::Lvmthin | Kind::Rbd => &["raw"],
    }
}

/// The format that a new volume gets without asking: what the entry says, or the type's own
/// (`Storage.pm:storage_default_format`).
pub fn default_format(storage: &Storage) -> &'static str {
    let own = formats(storage).first().copied().unwrap_or("raw");
    let set = storage.properties.get("format").and_then(|word| format_named(word));
    set.filter(|_| storage.kind.is_directory()).unwrap_or(own)
}

/// The base volume that a name has in front, by the parent that the storage knows of a volume. Thin LVM and btrfs
/// know none; ZFS and Ceph show that of a template only (`Storage/Plugin.pm:list_images`,
/// `ZFSPoolPlugin.pm:list_images`, `RBDPlugin.pm:list_images`).
pub fn base_of<'a>(storage: &Storage, parent: &'a str) -> Option<&'a str> {
    match storage.kind {
        Kind::Dir | Kind::Nfs | Kind::Cifs => Some(parent),
        Kind::Zfspool | Kind::Rbd => parent.strip_suffix("@__base__"),
        Kind::Btrfs | Kind::Lvm | Kind::Lvmthin => None,
    }
}

fn illegal(file: &str, prefix: &str, owner: u32) -> PveError {
    PveError::die(format!("illegal name '{file}' - should be '{prefix}-{owner}-*'"))
}

/// A Perl `die` without a line feed says where it stands.
fn unsupported(format: &str, plugin: &str, line: u32) -> PveError {
    PveError::die(format!(
        "unsupported format '{format}' at /usr/share/perl5/PVE/Storage/{plugin}.pm line {line}."
    ))
}

/// The name and format that an allocation of `file` for `owner` gets (`Storage.pm:vdisk_alloc`,
/// `Storage/Plugin.pm:alloc_image`). `API2/Storage/Content.pm:create` has taken the format from the name's end by then.
pub fn allocate(
    storage: &Storage,
    owner: u32,
    file: &str,
    format: Option<&str>,
) -> Result<(String, &'static str), PveError> {
    let own = |prefix: &str| file.starts_with(&format!("{prefix}-{owner}-"));
    match storage.kind {
        Kind::Dir | Kind::Nfs | Kind::Cifs | Kind::Btrfs => {
            let found = dirplugin::parse_filename(file)?;
            let wanted = format.unwrap_or_else(|| default_format(storage));
            if wanted != found {
                return Err(PveError::die(format!(
                    "illegal name '{file}' - wrong extension for format ('{found} != '{wanted}')"
                )));
            }
            Ok((format!("{owner}/{file}"), found))
        }
        Kind::Lvmthin | Kind::Rbd => {
            if storage.kind == Kind::Lvmthin
                && let Some(format) = format.filter(|format| *format != "raw")
            {
                return Err(unsupported(format, "LvmThinPlugin", 102));
            }
            if own("vm") { Ok((file.to_owned(), "raw")) } else { Err(illegal(file, "vm", owner)) }
        }
        Kind::Zfspool => match format.unwrap_or("raw") {
            "raw" if own("vm") => Ok((file.to_owned(), "raw")),
            "raw" => Err(illegal(file, "vm", owner)),
            "subvol" if own("subvol") => Ok((file.to_owned(), "subvol")),
            "subvol" => Err(illegal(file, "subvol", owner)),
            format => Err(unsupported(format, "ZFSPoolPlugin", 292)),
        },
        // `LVMPlugin.pm:verify_volname_format`, `alloc_lvm_image`
        Kind::Lvm => {
            let found = parse(storage, file)?.format;
            let wanted = format.unwrap_or_else(|| default_format(storage));
            if wanted == "qcow2" && found != "qcow2" {
                let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
                return Err(PveError::die(format!(
                    "volume name '{file}' does not match requested format 'qcow2' (did you mean '{stem}.qcow2'?)"
                )));
            }
            if wanted == "qcow2" && !storage.chains() {
                return Err(PveError::die(
                    "snapshot-as-volume-chain option need to be enabled to use qcow2 format at \
                     /usr/share/perl5/PVE/Storage/LVMPlugin.pm line 698.",
                ));
            }
            Ok((file.to_owned(), found))
        }
    }
}

/// Bytes that a new volume of this size gets, or why there can be none of it (`LVMPlugin.pm:lvcreate`,
/// `ZFSPoolPlugin.pm:zfs_create_zvol`, `RBDPlugin.pm:alloc_image`).
pub fn round(storage: &Storage, name: &str, size: u64) -> Result<u64, PveError> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => Ok(size.div_ceil(EXTENT).saturating_mul(EXTENT)),
        Kind::Zfspool => {
            let size = zfspool::round(size);
            zfspool::check(storage, name, size)?;
            Ok(size)
        }
        Kind::Rbd => Ok(rbd::round(size)),
        _ if size > dirplugin::LARGEST_IMAGE => Err(dirplugin::too_large(&path(storage, name))),
        _ => Ok(size),
    }
}

/// Bytes that a volume takes from its storage, `allocated` being written. Thick volumes take their size
/// (`LVMPlugin.pm:status`, `ZFSPoolPlugin.pm:zfs_create_zvol`).
pub fn taken(storage: &Storage, size: u64, allocated: u64) -> u64 {
    match storage.kind {
        Kind::Lvm => size,
        Kind::Zfspool if !storage.is_sparse() => zfspool::reservation(storage, size),
        _ => allocated,
    }
}

/// Bytes that a snapshot takes beside its volume, which had `size` bytes and had written `allocated` of them: a
/// volume of a chain is as thick as any, and what a snapshot of ZFS keeps comes on top of the reservation
/// (`LVMPlugin.pm:volume_snapshot`, `ZFSPoolPlugin.pm:volume_snapshot`).
pub fn kept(storage: &Storage, size: u64, allocated: u64) -> u64 {
    match storage.kind {
        Kind::Lvm => size,
        Kind::Zfspool if !storage.is_sparse() => allocated,
        _ => 0,
    }
}

/// Whether volumes take all of their space when they are made, so that there may be no room for one
/// (`LVMPlugin.pm:lvcreate`, `ZFSPoolPlugin.pm:zfs_create_zvol`).
pub fn is_thick(storage: &Storage) -> bool {
    storage.kind == Kind::Lvm || (storage.kind == Kind::Zfspool && !storage.is_sparse())
}

/// The path of a volume on its node (`Storage/Plugin.pm:filesystem_path`, `LVMPlugin.pm:filesystem_path`).
pub fn path(storage: &Storage, name: &str) -> String {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => format!("/dev/{}/{name}", storage.volume_group()),
        Kind::Btrfs if format_of(storage, name) == "raw" => format!("{}/disk.raw", subvolume(storage, name)),
        Kind::Zfspool if format_of(storage, name) == "subvol" => {
            format!("/{}", zfspool::dataset(storage, name))
        }
        Kind::Zfspool => format!("/dev/zvol/{}", zfspool::dataset(storage, name)),
        Kind::Rbd => rbd::path(storage, name),
        _ => format!("{}/images/{name}", storage.directory()),
    }
}

/// The btrfs subvolume of a volume (`BTRFSPlugin.pm:raw_name_to_dir`).
fn subvolume(storage: &Storage, name: &str) -> String {
    format!("{}/images/{}", storage.directory(), name.trim_end_matches(".raw"))
}

/// The answer to an allocation of a name that is taken (`Storage/Plugin.pm:alloc_image`, `LVMPlugin.pm:lvcreate`).
pub fn exists(storage: &Storage, name: &str) -> PveError {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let group = storage.volume_group();
            PveError::die(format!(
                "lvcreate '{group}/{name}' error:   Logical Volume \"{name}\" already exists in volume group \
                 \"{group}\""
            ))
        }
        Kind::Btrfs => dirplugin::exists(&subvolume(storage, name)),
        Kind::Zfspool => zfspool::exists(storage, name),
        Kind::Rbd => rbd::exists(name),
        _ => dirplugin::exists(&path(storage, name)),
    }
}

/// The answer to a new name that is taken already (`Storage/Plugin.pm:rename_volume`).
pub fn target_exists(name: &str) -> PveError {
    let name = name.rsplit('/').next().unwrap_or(name);
    PveError::die(format!("target volume '{name}' already exists"))
}

/// The answer to an allocation that does not fit, `free` bytes being left (`Storage/Plugin.pm:alloc_image`,
/// `LVMPlugin.pm:lvcreate`).
pub fn no_space(storage: &Storage, name: &str, size: u64, free: u64) -> PveError {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let group = storage.volume_group();
            PveError::die(format!(
                "lvcreate '{group}/{name}' error:   Volume group \"{group}\" has insufficient free space ({} extents): \
                 {} required.",
                free / EXTENT,
                size.div_ceil(EXTENT)
            ))
        }
        Kind::Zfspool => zfspool::no_space(storage, name),
        Kind::Rbd => rbd::no_space(name),
        _ => dirplugin::no_space(&path(storage, name)),
    }
}

/// The answer to growing a volume by `more` to `size` when there is no room (`Storage/Plugin.pm:volume_resize`,
/// `LVMPlugin.pm:volume_resize`).
pub fn no_space_to_grow(storage: &Storage, name: &str, size: u64, more: u64, free: u64) -> PveError {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => PveError::die(format!(
            "error resizing volume '{}':   Insufficient free space: {} extents needed, but only {} available",
            path(storage, name),
            more.div_ceil(EXTENT),
            free / EXTENT
        )),
        Kind::Zfspool => zfspool::no_space_to_grow(storage, name),
        Kind::Rbd => rbd::no_space_to_grow(name),
        _ => PveError::die(format!(
            "command '/usr/bin/qemu-img resize -f raw {} {size}' failed: exit code 1",
            path(storage, name)
        )),
    }
}

fn not_found(storage: &Storage, name: &str) -> String {
    format!("  Failed to find logical volume \"{}/{name}\"", storage.volume_group())
}

/// The error of reading a volume that is not there (`LVMPlugin.pm:volume_size_info`,
/// `Storage/Plugin.pm:volume_size_info`).
pub fn unreadable(storage: &Storage, name: &str) -> PveError {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin if format_of(storage, name) == "raw" => PveError::die(format!(
            "can't get size of '{}': {}",
            path(storage, name),
            not_found(storage, name)
        )),
        Kind::Zfspool => zfspool::unreadable(storage, name),
        Kind::Rbd => rbd::missing(name),
        _ => dirplugin::no_format(&format!("{}:{name}", storage.id)),
    }
}

/// The error of using a volume that is not there (`activate_volume`, and what follows it where that notices nothing)
/// (`Storage/Plugin.pm:activate_volume`, `LVMPlugin.pm:activate_volume`, `LvmThinPlugin.pm:activate_volume`).
pub fn missing(storage: &Storage, name: &str) -> PveError {
    match storage.kind {
        Kind::Lvmthin => PveError::die(format!("no such logical volume {}/{name}", storage.volume_group())),
        Kind::Lvm => PveError::die(format!(
            "can't activate LV '{}': {}",
            path(storage, name),
            not_found(storage, name)
        )),
        Kind::Zfspool => zfspool::missing(name),
        Kind::Rbd => rbd::not_opened(storage, name),
        _ => dirplugin::missing(&format!("{}:{name}", storage.id)),
    }
}

/// What removing a volume that is not there ends with: a line of the log, or an error
/// (`Storage/Plugin.pm:free_image`, `LVMPlugin.pm:free_image`, `LvmThinPlugin.pm:free_image`,
/// `BTRFSPlugin.pm:free_image`).
pub fn free_missing(storage: &Storage, name: &str) -> Result<Option<String>, PveError> {
    match storage.kind {
        // ZFS's "dataset does not exist" is swallowed (`zfs_delete_zvol`).
        Kind::Lvmthin | Kind::Zfspool => Ok(None),
        Kind::Lvm => Err(PveError::die(format!(
            "lvremove '{}/{name}' error: {}",
            storage.volume_group(),
            not_found(storage, name)
        ))),
        Kind::Btrfs => Err(PveError::die(format!(
            "command 'btrfs subvolume delete -- {}' failed: ERROR: Could not statfs: No such file or directory",
            subvolume(storage, name)
        ))),
        Kind::Rbd => Err(rbd::missing(name)),
        _ => Ok(Some(format!("disk image '{}' does not exist", path(storage, name)))),
    }
}

/// What the tools say when a volume with these snapshots is removed (`LvmThinPlugin.pm:free_image`,
/// `RBDPlugin.pm:free_image`).
pub fn free_lines(storage: &Storage, name: &str, snapshots: &[String]) -> Vec<String> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let snaps = snapshots.iter().map(|snapshot| format!("snap_{name}_{snapshot}"));
            snaps
                .chain([name.to_owned()])
                .map(|name| format!("  Logical volume \"{name}\" successfully removed."))
                .collect()
        }
        Kind::Rbd => {
            let purged = (!snapshots.is_empty()).then_some("Removing all snapshots: 100% complete...done.");
            purged.into_iter().chain(["Removing image: 100% complete...done."]).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

/// What the tools say when a volume is made (`LVMPlugin.pm:lvcreate`, `Storage/Common.pm:qemu_img_create`).
pub fn made_lines(storage: &Storage, name: &str, size: u64, format: &str) -> Vec<String> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let mut lines = vec![format!("  Logical volume \"{name}\" created.")];
            if format == "qcow2" {
                lines.push(dirplugin::formatting(&path(storage, name), size, format));
            }
            lines
        }
        Kind::Btrfs | Kind::Zfspool | Kind::Rbd => Vec::new(),
        _ => vec![dirplugin::formatting(&path(storage, name), size, format)],
    }
}

/// Whether the storage itself grows a volume that a running VM has open. Otherwise that is QEMU's to do
/// (`LVMPlugin.pm:volume_resize`, `ZFSPoolPlugin.pm:volume_resize`, `RBDPlugin.pm:volume_resize`).
pub fn grows_open_volumes(storage: &Storage) -> bool {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin | Kind::Zfspool => true,
        Kind::Rbd => storage.krbd(),
        _ => false,
    }
}

/// Bytes a volume has that was to grow to `size`: whole extents, MiB, or KiB where QEMU or a file has its way
/// (`volume_resize` of the plugins, `Storage.pm:volume_resize`).
pub fn grown(storage: &Storage, size: u64, open: bool) -> u64 {
    let unit = match storage.kind {
        Kind::Lvm | Kind::Lvmthin => EXTENT,
        Kind::Zfspool => 1 << 20,
        Kind::Rbd if !open || storage.krbd() => 1 << 20,
        _ => 1024,
    };
    size.div_ceil(unit).saturating_mul(unit)
}

/// What the tools say when a volume has grown (`LVMPlugin.pm:volume_resize`).
pub fn grown_lines(storage: &Storage, name: &str) -> Vec<String> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let group = storage.volume_group();
            vec![
                format!("  Size of logical volume {group}/{name} changed."),
                format!("  Logical volume {group}/{name} successfully resized."),
            ]
        }
        Kind::Zfspool => Vec::new(),
        Kind::Rbd => vec!["Resizing image: 100% complete...done.".to_owned()],
        _ => vec!["Image resized.".to_owned()],
    }
}

/// What the tools say of a new name (`LVMPlugin.pm:lvrename`).
pub fn renamed_lines(storage: &Storage, from: &str, to: &str) -> Vec<String> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            vec![format!("  Renamed \"{from}\" to \"{to}\" in volume group \"{}\"", storage.volume_group())]
        }
        _ => Vec::new(),
    }
}

/// Whether the volume can have snapshots (`Storage.pm:volume_has_feature`).
pub fn has_snapshots(storage: &Storage, name: &str) -> bool {
    parse(storage, name).is_ok_and(|name| feature::has(storage, &name, false, feature::Feature::Snapshot))
        && (storage.kind != Kind::Lvm || storage.chains())
}

/// Whether a storage of this type refuses to remove a volume that a running VM has open: LVM, ZFS and Ceph notice
/// (`LVMPlugin.pm:free_image`, `ZFSPoolPlugin.pm:zfs_delete_zvol`, `RBDPlugin.pm:free_image`).
pub fn guards_open_volumes(storage: &Storage) -> bool {
    !storage.kind.is_directory()
}

/// That refusal (`LVMPlugin.pm:free_image`).
pub fn in_use(storage: &Storage, name: &str) -> PveError {
    match storage.kind {
        Kind::Zfspool => zfspool::in_use(storage, name),
        Kind::Rbd => rbd::in_use(name),
        _ => {
            let group = storage.volume_group();
            PveError::die(format!("lvremove '{group}/{name}' error:   Logical volume {group}/{name} in use."))
        }
    }
}

/// The refusal to remove a template's disk that linked clones stand on (`Storage.pm:vdisk_free`). Thin LVM, whose
/// names do not show it, removes it.
pub fn base_in_use(name: &str) -> PveError {
    PveError::die(format!("base volume '{name}' is still in use by linked clones"))
}

/// The answer of a storage whose mount, pool or server is not there (`activate_storage`, `check_connection` of the
/// plugins, `Storage.pm:activate_storage`); nothing where it would not be noticed.
pub fn inactive(storage: &Storage) -> Option<PveError> {
    match storage.kind {
        Kind::Nfs | Kind::Cifs => Some(PveError::die(format!("storage '{}' is not online", storage.id))),
        Kind::Zfspool => Some(zfspool::inactive(storage)),
        Kind::Rbd => Some(rbd::inactive()),
        Kind::Lvmthin => {
            let pool = storage.properties.get("thinpool").unwrap_or(&storage.id);
            Some(PveError::die(format!("no such logical volume {}/{pool}", storage.volume_group())))
        }
        _ if storage.is_mountpoint => Some(PveError::die(format!(
            "unable to activate storage '{}' - directory is expected to be a mount point but is not mounted: '{}'",
            storage.id,
            storage.directory()
        ))),
        _ => None,
    }
}
