//! What differs between storage types: names, paths, sizes, and what a volume that is not there looks like
//! (pve-storage `Storage/Plugin.pm`, `DirPlugin.pm`, `BTRFSPlugin.pm`, `LVMPlugin.pm`, `LvmThinPlugin.pm`).
//!
//! Directory storages have their names in `dirplugin`; everything here asks the storage's type first.

use super::dirplugin;
use super::error::PveError;
use crate::sim::world::{Kind, Storage};

/// Bytes of an LVM extent.
pub const EXTENT: u64 = 4 << 20;

/// The image format of this name.
pub fn format_named(word: &str) -> Option<&'static str> {
    ["raw", "qcow2", "vmdk", "subvol"].into_iter().find(|format| *format == word)
}

/// The VM id a volume's name stands for, whatever storage it is on: `9999/x.raw`, `vm-9999-x`.
pub fn owner_of_name(name: &str) -> Option<u32> {
    if name.contains('/') {
        return dirplugin::parse_volname(name).ok().map(|volume| volume.owner);
    }
    let digits = name.strip_prefix("vm-").or_else(|| name.strip_prefix("base-"))?;
    digits.split_once('-')?.0.parse().ok()
}

/// Whether LVM takes the name (`LVMPlugin.pm:parse_lvm_name`).
fn is_lvm_name(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric();
    name.len() > 1
        && name.starts_with(word)
        && name.ends_with(word)
        && name.chars().all(|c| word(c) || "._-".contains(c))
}

/// Refuses a name that no volume of the storage can have.
pub fn parse(storage: &Storage, name: &str) -> Result<u32, PveError> {
    if !storage.kind.is_lvm() {
        return dirplugin::parse_volname(name).map(|volume| volume.owner);
    }
    if !is_lvm_name(name) {
        return Err(PveError::die(format!("lvm name '{name}' contains illegal characters")));
    }
    owner_of_name(name).ok_or_else(|| PveError::die(format!("unable to parse lvm volume name '{name}'")))
}

/// The format of a volume, by its name.
pub fn format_of(storage: &Storage, name: &str) -> &'static str {
    if storage.kind.is_lvm() {
        let chained =
            storage.kind == Kind::Lvm && name.rsplit_once('.').is_some_and(|(_, end)| end == "qcow2");
        return if chained { "qcow2" } else { "raw" };
    }
    dirplugin::parse_volname(name).map_or("raw", |volume| volume.format)
}

/// The name and format that an allocation of `file` for `owner` gets (`API2/Storage/Content.pm:create`,
/// `alloc_image` of the plugins).
pub fn allocate(
    storage: &Storage,
    owner: u32,
    file: &str,
    format: Option<&str>,
) -> Result<(String, &'static str), PveError> {
    if !storage.kind.is_lvm() {
        let found = dirplugin::parse_filename(file)?;
        return Ok((format!("{owner}/{file}"), found));
    }
    if storage.kind == Kind::Lvmthin {
        if let Some(format) = format.filter(|format| *format != "raw") {
            return Err(PveError::die(format!(
                "unsupported format '{format}' at /usr/share/perl5/PVE/Storage/LvmThinPlugin.pm line 102."
            )));
        }
        if !file.starts_with(&format!("vm-{owner}-")) {
            return Err(PveError::die(format!("illegal name '{file}' - should be 'vm-{owner}-*'")));
        }
        return Ok((file.to_owned(), "raw"));
    }
    parse(storage, file)?;
    let found = format_of(storage, file);
    if format == Some("qcow2") && found != "qcow2" {
        return Err(PveError::die(format!(
            "volume name '{file}' does not match requested format 'qcow2' (did you mean '{file}.qcow2'?)"
        )));
    }
    Ok((file.to_owned(), found))
}

/// The name of the `index`th disk PVE itself makes for a VM (`Plugin.pm:get_next_vm_diskname`).
pub fn disk_name(storage: &Storage, vmid: u32, index: u32, format: &str) -> String {
    if storage.kind.is_lvm() {
        let end = if format == "qcow2" { ".qcow2" } else { "" };
        return format!("vm-{vmid}-disk-{index}{end}");
    }
    format!("{vmid}/vm-{vmid}-disk-{index}.{format}")
}

/// Bytes that a volume of this size gets.
pub fn round(storage: &Storage, size: u64) -> u64 {
    if storage.kind.is_lvm() { size.div_ceil(EXTENT) * EXTENT } else { size }
}

/// The path of a volume on its node (`filesystem_path`).
pub fn path(storage: &Storage, name: &str) -> String {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => format!("/dev/{}/{name}", storage.volume_group()),
        Kind::Btrfs => format!("{}/disk.raw", subvolume(storage, name)),
        _ => format!("{}/images/{name}", storage.directory()),
    }
}

/// The btrfs subvolume of a volume.
fn subvolume(storage: &Storage, name: &str) -> String {
    format!("{}/images/{}", storage.directory(), name.trim_end_matches(".raw"))
}

/// The answer to an allocation of a name that is taken.
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
        _ => dirplugin::exists(&path(storage, name)),
    }
}

/// The answer to an allocation that does not fit, `free` bytes being left.
pub fn no_space(storage: &Storage, name: &str, size: u64, free: u64) -> PveError {
    if storage.kind.is_lvm() {
        let group = storage.volume_group();
        return PveError::die(format!(
            "lvcreate '{group}/{name}' error:   Volume group \"{group}\" has insufficient free space ({} extents): \
             {} required.",
            free / EXTENT,
            size.div_ceil(EXTENT)
        ));
    }
    dirplugin::no_space(&path(storage, name))
}

/// The answer to growing a volume further than there is room.
pub fn no_space_to_grow(storage: &Storage, name: &str, more: u64, free: u64) -> PveError {
    if storage.kind.is_lvm() {
        return PveError::die(format!(
            "error resizing volume '{}':   Insufficient free space: {} extents needed, but only {} available",
            path(storage, name),
            more.div_ceil(EXTENT),
            free / EXTENT
        ));
    }
    PveError::die(format!(
        "command '/usr/bin/qemu-img resize -f raw {} {more}' failed: exit code 1",
        path(storage, name)
    ))
}

fn not_found(storage: &Storage, name: &str) -> String {
    format!("  Failed to find logical volume \"{}/{name}\"", storage.volume_group())
}

/// The error of reading a volume that is not there (`volume_size_info`).
pub fn unreadable(storage: &Storage, name: &str) -> PveError {
    if storage.kind.is_lvm() && format_of(storage, name) == "raw" {
        return PveError::die(format!(
            "can't get size of '{}': {}",
            path(storage, name),
            not_found(storage, name)
        ));
    }
    dirplugin::no_format(&format!("{}:{name}", storage.id))
}

/// The error of using a volume that is not there (`activate_volume`).
pub fn missing(storage: &Storage, name: &str) -> PveError {
    match storage.kind {
        Kind::Lvmthin => PveError::die(format!("no such logical volume {}/{name}", storage.volume_group())),
        Kind::Lvm => PveError::die(format!(
            "can't activate LV '{}': {}",
            path(storage, name),
            not_found(storage, name)
        )),
        _ => dirplugin::missing(&format!("{}:{name}", storage.id)),
    }
}

/// What removing a volume that is not there ends with: a line of the log, or an error (`free_image`).
pub fn free_missing(storage: &Storage, name: &str) -> Result<Option<String>, PveError> {
    match storage.kind {
        Kind::Lvmthin => Ok(None),
        Kind::Lvm => Err(PveError::die(format!(
            "lvremove '{}/{name}' error: {}",
            storage.volume_group(),
            not_found(storage, name)
        ))),
        Kind::Btrfs => Err(PveError::die(format!(
            "command 'btrfs subvolume delete -- {}' failed: ERROR: Could not statfs: No such file or directory",
            subvolume(storage, name)
        ))),
        _ => Ok(Some(format!("disk image '{}' does not exist", path(storage, name)))),
    }
}

/// What the tools say when a volume with these snapshots is removed.
pub fn free_lines(storage: &Storage, name: &str, snapshots: &[String]) -> Vec<String> {
    if !storage.kind.is_lvm() {
        return Vec::new();
    }
    let snaps = snapshots.iter().map(|snapshot| format!("snap_{name}_{snapshot}"));
    snaps
        .chain([name.to_owned()])
        .map(|name| format!("  Logical volume \"{name}\" successfully removed."))
        .collect()
}

/// What the tools say when a volume is made.
pub fn made_lines(storage: &Storage, name: &str, size: u64, format: &str) -> Vec<String> {
    match storage.kind {
        Kind::Lvm | Kind::Lvmthin => {
            let mut lines = vec![format!("  Logical volume \"{name}\" created.")];
            if format == "qcow2" {
                lines.push(dirplugin::formatting(&path(storage, name), size, format));
            }
            lines
        }
        Kind::Btrfs => Vec::new(),
        _ => vec![dirplugin::formatting(&path(storage, name), size, format)],
    }
}

/// Bytes a volume has that was to grow to `size`: whole extents, or whole KiB of a file.
pub fn grown(lvm: bool, size: u64) -> u64 {
    let unit = if lvm { EXTENT } else { 1024 };
    size.div_ceil(unit) * unit
}

/// What the tools say when a volume has grown.
pub fn grown_lines(storage: &Storage, name: &str) -> Vec<String> {
    if !storage.kind.is_lvm() {
        return vec!["Image resized.".to_owned()];
    }
    let group = storage.volume_group();
    vec![
        format!("  Size of logical volume {group}/{name} changed."),
        format!("  Logical volume {group}/{name} successfully resized."),
    ]
}

/// Whether the volume can have snapshots (`volume_has_feature`).
pub fn has_snapshots(storage: &Storage, name: &str) -> bool {
    match storage.kind {
        Kind::Lvmthin | Kind::Btrfs => true,
        _ => format_of(storage, name) == "qcow2" && (storage.kind != Kind::Lvm || storage.chains()),
    }
}

/// Whether a storage of this type refuses to remove a volume that a running VM has open.
pub fn guards_open_volumes(storage: &Storage) -> bool {
    storage.kind.is_lvm()
}

/// That refusal.
pub fn in_use(storage: &Storage, name: &str) -> PveError {
    let group = storage.volume_group();
    PveError::die(format!("lvremove '{group}/{name}' error:   Logical volume {group}/{name} in use."))
}
