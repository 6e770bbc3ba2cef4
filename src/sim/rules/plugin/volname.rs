//! Names of volumes: what they tell, which ones a storage takes, and which PVE gives to disks of its own making
//! (pve-storage `parse_volname`, `find_free_diskname` of the plugins, `Plugin.pm:get_next_vm_diskname`).

use super::super::dirplugin;
use super::super::error::PveError;
use crate::sim::world::{Kind, Storage};

/// What a volume's name tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeName {
    /// The VM id that owns it.
    pub owner: u32,
    /// The name without the base volume in front: what the volume is called where it is stored.
    pub name: String,
    /// The base volume of a linked clone, where the name has it in front.
    pub base: Option<String>,
    /// Whether it is a template's disk.
    pub is_base: bool,
    /// Image format.
    pub format: &'static str,
}

/// The VM id of `KIND-ID-REST`, where `KIND` is one of these and `REST` is not empty.
fn owner_after(name: &str, kinds: &[&str]) -> Option<u32> {
    let rest = kinds.iter().find_map(|kind| name.strip_prefix(kind)?.strip_prefix('-'))?;
    let (digits, rest) = rest.split_once('-')?;
    (!rest.is_empty() && !rest.contains(char::is_whitespace)).then_some(())?;
    digits.parse().ok()
}

/// The VM id a volume's name stands for, whatever storage it is on: `9999/x.raw`, `vm-9999-x`, `base-100-x/vm-101-x`
/// (pve-storage `Storage.pm:parse_volname`).
pub fn owner_of_name(name: &str) -> Option<u32> {
    if name.starts_with(|c: char| c.is_ascii_digit()) {
        return dirplugin::parse_volname(name).ok().map(|volume| volume.owner);
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    owner_after(last, &["vm", "base", "subvol", "basevol"])
}

/// Whether LVM takes the name (`Plugin.pm:parse_lvm_name`).
fn is_lvm_name(name: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric();
    name.len() > 1
        && name.starts_with(word)
        && name.ends_with(word)
        && name.chars().all(|c| word(c) || "._-".contains(c))
}

/// Whether ZFS takes the name of a volume (openzfs `zcommon/zfs_namecheck.c:valid_char`).
pub(super) fn bad_zfs_character(name: &str) -> Option<char> {
    name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_.: ".contains(*c)))
}

/// Reads the name of a volume, or refuses one that no volume of the storage can have
/// (`Storage/Plugin.pm:parse_volname`, `LVMPlugin.pm:parse_volname`, `ZFSPoolPlugin.pm:parse_volname`).
pub fn parse(storage: &Storage, name: &str) -> Result<VolumeName, PveError> {
    match storage.kind {
        Kind::Dir | Kind::Nfs | Kind::Cifs | Kind::Btrfs => {
            let found = dirplugin::parse_volname(name)?;
            Ok(VolumeName {
                owner: found.owner,
                name: format!("{}/{}", found.owner, found.file),
                base: found.base.map(str::to_owned),
                is_base: found.file.starts_with("base-"),
                format: found.format,
            })
        }
        Kind::Lvm | Kind::Lvmthin => {
            if !is_lvm_name(name) {
                return Err(PveError::die(format!("lvm name '{name}' contains illegal characters")));
            }
            let kinds: &[&str] = if storage.kind == Kind::Lvm { &["vm"] } else { &["vm", "base"] };
            let owner = owner_after(name, kinds)
                .ok_or_else(|| PveError::die(format!("unable to parse lvm volume name '{name}'")))?;
            let chained = storage.kind == Kind::Lvm && name.strip_suffix(".qcow2").is_some();
            let format = if chained { "qcow2" } else { "raw" };
            Ok(VolumeName {
                owner,
                name: name.to_owned(),
                base: None,
                is_base: name.starts_with("base-"),
                format,
            })
        }
        Kind::Zfspool | Kind::Rbd => {
            let (zfs, what) = (storage.kind == Kind::Zfspool, storage.kind.word().trim_end_matches("pool"));
            let unable = || PveError::die(format!("unable to parse {what} volume name '{name}'"));
            let (bases, all): (&[&str], &[&str]) = if zfs {
                (&["base", "basevol"], &["base", "basevol", "vm", "subvol"])
            } else {
                (&["base"], &["base", "vm"])
            };
            let (base, last) = match name.split_once('/') {
                Some((base, last)) => (Some(base), last),
                None => (None, name),
            };
            if base.is_some_and(|base| owner_after(base, bases).is_none()) {
                return Err(unable());
            }
            let owner = owner_after(last, all).ok_or_else(unable)?;
            let subvol = zfs && (last.starts_with("subvol-") || last.starts_with("basevol-"));
            Ok(VolumeName {
                owner,
                name: last.to_owned(),
                base: base.map(str::to_owned),
                is_base: last.starts_with("base"),
                format: if subvol { "subvol" } else { "raw" },
            })
        }
    }
}

/// The number of a disk of PVE's own making that stands in the way of the next one in this format. Directories on the
/// node, btrfs and ZFS count the disks of every format, as they know subvolumes; the others only those that end alike
/// (`Plugin.pm:$get_vm_disk_number`).
pub fn disk_number(storage: &Storage, vmid: u32, format: &str, name: &str) -> Option<u32> {
    let (kinds, suffix): (&[&str], String) = match storage.kind {
        Kind::Dir | Kind::Btrfs | Kind::Zfspool => (&["vm", "base", "subvol", "basevol"], String::new()),
        Kind::Nfs | Kind::Cifs => (&["vm", "base"], format!(".{format}")),
        Kind::Lvm if format == "qcow2" => (&["vm", "base"], ".qcow2".to_owned()),
        Kind::Lvm | Kind::Lvmthin | Kind::Rbd => (&["vm", "base"], String::new()),
    };
    kinds.iter().find_map(|kind| {
        let (_, rest) = name.split_once(&format!("{kind}-{vmid}-disk-"))?;
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest.get(end..)?.starts_with(&suffix).then(|| rest.get(..end)?.parse().ok())?
    })
}

/// The name of the `index`th disk PVE itself makes for a VM (`Plugin.pm:get_next_vm_diskname`).
pub fn disk_name(storage: &Storage, vmid: u32, index: u32, format: &str) -> String {
    match storage.kind {
        Kind::Lvm if format == "qcow2" => format!("vm-{vmid}-disk-{index}.qcow2"),
        Kind::Lvm | Kind::Lvmthin | Kind::Zfspool | Kind::Rbd => format!("vm-{vmid}-disk-{index}"),
        Kind::Dir | Kind::Nfs | Kind::Cifs | Kind::Btrfs => {
            format!("{vmid}/vm-{vmid}-disk-{index}.{format}")
        }
    }
}

/// The name that a volume gets as a template's disk: `vm-` in front becomes `base-`, any other name stays
/// (`Storage/Plugin.pm:create_base`, `LvmThinPlugin.pm:create_base`).
pub fn base_name(name: &str) -> String {
    let (directory, file) = name.rsplit_once('/').map_or(("", name), |(d, file)| (d, file));
    let file = match (file.strip_prefix("vm-"), file.strip_prefix("subvol-")) {
        (Some(rest), _) => format!("base-{rest}"),
        (_, Some(rest)) => format!("basevol-{rest}"),
        _ => file.to_owned(),
    };
    if directory.is_empty() { file } else { format!("{directory}/{file}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(kind: Kind) -> Storage {
        Storage { id: "s".to_owned(), kind, ..Storage::default() }
    }

    #[test]
    fn names_tell_owner_base_and_format() {
        let read = |kind, name: &str| {
            parse(&storage(kind), name)
                .map(|n| (n.owner, n.name, n.base, n.is_base, n.format))
                .map_err(|error| error.message().to_owned())
        };
        let base = Some("base-100-disk-0".to_owned());
        assert_eq!(
            read(Kind::Zfspool, "base-100-disk-0/vm-101-disk-0"),
            Ok((101, "vm-101-disk-0".to_owned(), base.clone(), false, "raw"))
        );
        assert_eq!(
            read(Kind::Rbd, "base-100-disk-0/vm-101-disk-0"),
            Ok((101, "vm-101-disk-0".to_owned(), base, false, "raw"))
        );
        assert_eq!(
            read(Kind::Zfspool, "subvol-100-disk-0"),
            Ok((100, "subvol-100-disk-0".to_owned(), None, false, "subvol"))
        );
        assert_eq!(
            read(Kind::Dir, "100/base-100-disk-0.raw/101/vm-101-disk-0.qcow2"),
            Ok((
                101,
                "101/vm-101-disk-0.qcow2".to_owned(),
                Some("100/base-100-disk-0.raw".to_owned()),
                false,
                "qcow2"
            ))
        );
        assert_eq!(read(Kind::Zfspool, "pvc-1"), Err("unable to parse zfs volume name 'pvc-1'".to_owned()));
        assert_eq!(
            read(Kind::Rbd, "subvol-1-x"),
            Err("unable to parse rbd volume name 'subvol-1-x'".to_owned())
        );
        assert_eq!(read(Kind::Lvm, "base-1-x"), Err("unable to parse lvm volume name 'base-1-x'".to_owned()));
        assert_eq!(read(Kind::Lvmthin, "base-1-x").map(|n| n.3), Ok(true));
        assert_eq!(owner_of_name("base-100-disk-0/vm-101-disk-0"), Some(101));
        assert_eq!(owner_of_name("100/base-100-disk-0.raw/101/vm-101-disk-0.qcow2"), Some(101));
        assert_eq!(owner_of_name("pvc"), None);
    }

    #[test]
    fn which_disks_count_depends_on_the_storage() {
        let number = |kind, format: &str, name: &str| disk_number(&storage(kind), 100, format, name);
        assert_eq!(number(Kind::Dir, "raw", "100/vm-100-disk-3.qcow2"), Some(3));
        assert_eq!(number(Kind::Nfs, "raw", "100/vm-100-disk-3.qcow2"), None);
        assert_eq!(number(Kind::Nfs, "qcow2", "100/vm-100-disk-3.qcow2"), Some(3));
        assert_eq!(number(Kind::Lvm, "raw", "vm-100-disk-3.qcow2"), Some(3));
        assert_eq!(number(Kind::Lvm, "qcow2", "vm-100-disk-3"), None);
        assert_eq!(number(Kind::Rbd, "raw", "base-100-disk-0"), Some(0));
        assert_eq!(number(Kind::Rbd, "raw", "vm-1000-disk-0"), None);
    }
}
