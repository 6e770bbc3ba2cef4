//! The name and the size of a new volume's disk.

use sha2::{Digest as _, Sha256};

use crate::types::{Bytes, VmId, VolumeName, params::ImageFormat};

/// The size a volume gets: what is asked for, rounded up to the step; less only where the limit forbids that.
pub(super) fn size_within(required: Bytes, limit: Option<Bytes>) -> Option<Bytes> {
    let limit = limit.unwrap_or(Bytes::new(u64::MAX));
    let fits = |size: &Bytes| *size <= limit;
    let required = required.max(Bytes::MIB);
    required
        .round_up(Bytes::VOLUME_STEP)
        .filter(fits)
        // 4 MiB is the extent of LVM, the largest unit of the storages.
        .or_else(|| required.round_up(Bytes::new(4 << 20)).filter(fits))
}

/// The name of a new volume's disk: `vm-<owner>-<name>`, cut where it would pass what LVM can take.
///
/// Characters that no storage takes are replaced, and then the name ends with the hash of what it stands for, so that no two names meet.
pub(super) fn disk_name(owner: VmId, name: &str) -> String {
    let legal: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .collect();
    let disk = format!("vm-{owner}-{legal}");
    if disk.len() <= 100 && legal == name {
        return disk;
    }
    let hash = Sha256::digest(name.as_bytes());
    let hex = hash[..8].iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    format!("{}-{hex}", &disk[..disk.len().min(80)])
}

/// What a new volume's disk is to be called on a storage of this type, and else why no such volume can be made there.
pub(super) fn filename(disk: &str, plugin: &str, format: ImageFormat) -> Result<String, &'static str> {
    match plugin {
        "btrfs" if format == ImageFormat::Qcow2 => Err("btrfs storages take raw images only"),
        _ if keeps_files(plugin) => Ok(format!("{disk}.{format}")),
        // Its blocks are not wiped, so a new volume can't be told from one with data.
        "lvm" => Err("it hands out blocks that still hold what was there before"),
        _ if format == ImageFormat::Qcow2 => Err("qcow2 images need a file storage"),
        _ => Ok(disk.to_owned()),
    }
}

/// Whether volumes on a storage of this type are files, whose name needs an ending.
pub(super) fn keeps_files(plugin: &str) -> bool {
    matches!(plugin, "dir" | "nfs" | "cifs" | "btrfs" | "cephfs" | "glusterfs")
}

/// Whether volumes on a storage of this type are called what was asked for: so on those that come with Proxmox.
pub(super) fn is_named_by_proxmox(plugin: &str) -> bool {
    keeps_files(plugin) || matches!(plugin, "lvm" | "lvmthin" | "zfspool" | "zfs" | "rbd")
}

/// Whether a disk that Proxmox takes for the owner's is a volume: snapshots of the driver before this one are disks of the same owner
/// (`vm-9999-snapshot-…`).
pub(super) fn is_volume(owner: VmId, name: &VolumeName) -> bool {
    let last = name.as_str().rsplit('/').next().unwrap_or_default();
    name.owner().is_none_or(|found| found == owner) && !last.starts_with(&format!("vm-{owner}-snapshot-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> VmId {
        VmId::new(9999).expect("a VMID")
    }

    #[test]
    fn names_stay_what_they_were() {
        let name = "pvc-0e6cf7a5-5b4b-4b32-a1b5-5b4b3f1d2c11";
        assert_eq!(disk_name(owner(), name), format!("vm-9999-{name}"));
    }

    #[test]
    fn long_and_strange_names_are_legal_and_do_not_meet() {
        let long = "x".repeat(128);
        let other = format!("{}y", "x".repeat(127));
        let names: Vec<String> =
            [long.as_str(), &other, "a/b", "a b", "a-b", "ä"].iter().map(|n| disk_name(owner(), n)).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(name.len() <= 100, "{name}");
            assert!(
                name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')),
                "{name}"
            );
            assert!(names[i + 1..].iter().all(|other| other != name), "{name}");
        }
        assert_eq!(&names[0][..80], &format!("vm-9999-{long}")[..80]);
    }

    #[test]
    fn sizes_round_up_and_keep_to_the_limit() {
        let gib = Bytes::GIB.get();
        let size = |required, limit: Option<u64>| {
            size_within(Bytes::new(required), limit.map(Bytes::new)).map(Bytes::get)
        };
        assert_eq!(size(1, None), Some(gib / 2));
        assert_eq!(size(gib, Some(gib)), Some(gib));
        assert_eq!(size(gib + 1, None), Some(gib + gib / 2));
        assert_eq!(size(gib + 1, Some(gib + (4 << 20))), Some(gib + (4 << 20)));
        assert_eq!(size(gib + 1, Some(gib + 2)), None);
        assert_eq!(size(u64::MAX, None), None);
    }
}
