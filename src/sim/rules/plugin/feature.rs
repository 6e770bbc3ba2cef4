//! What can be done with a volume (pve-storage `volume_has_feature` of the plugins; `Storage.pm:storage_can_replicate`).

use super::volname::VolumeName;
use crate::sim::world::{Kind, Storage};

/// Something that a volume may be able to take part in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// A snapshot can be taken.
    Snapshot,
    /// A linked clone can be made.
    Clone,
    /// It can become a template's disk.
    Template,
    /// A full clone can be made.
    Copy,
    /// It can be given to another VM.
    Rename,
    /// It can be replicated to another node.
    Replicate,
}

impl Feature {
    /// The feature of this name, as far as `GET feature` takes it (qemu-server `API2/Qemu.pm:vm_feature`).
    pub fn named(word: &str) -> Option<Self> {
        match word {
            "snapshot" => Some(Self::Snapshot),
            "clone" => Some(Self::Clone),
            "copy" => Some(Self::Copy),
            _ => None,
        }
    }
}

/// What is asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    Base,
    Current,
    Snapshot,
}

/// Whether the volume, or a snapshot of it, has the feature (`Storage.pm:volume_has_feature`).
pub fn has(storage: &Storage, name: &VolumeName, snapshot: bool, feature: Feature) -> bool {
    let of = match (snapshot, name.is_base) {
        (true, _) => Of::Snapshot,
        (false, true) => Of::Base,
        (false, false) => Of::Current,
    };
    let (qcow2, subvol) = (name.format == "qcow2", name.format == "subvol");
    match storage.kind {
        // `Plugin.pm`
        Kind::Dir | Kind::Nfs | Kind::Cifs => match (feature, of) {
            (Feature::Snapshot, Of::Current | Of::Snapshot) | (Feature::Copy, Of::Snapshot) => qcow2,
            (Feature::Clone, Of::Base)
            | (Feature::Copy, Of::Base | Of::Current)
            | (Feature::Rename, Of::Current) => !subvol,
            (Feature::Template, Of::Current) => true,
            _ => false,
        },
        // `BTRFSPlugin.pm`
        Kind::Btrfs => match (feature, of) {
            (Feature::Snapshot, Of::Current | Of::Snapshot) | (Feature::Copy, Of::Snapshot) => {
                name.format != "vmdk"
            }
            (Feature::Clone, Of::Current | Of::Snapshot) => name.format == "raw",
            (Feature::Clone, Of::Base)
            | (Feature::Template, Of::Current)
            | (Feature::Copy, Of::Base | Of::Current) => true,
            (Feature::Rename, Of::Current) => !subvol,
            _ => false,
        },
        // `LVMPlugin.pm`
        Kind::Lvm => match (feature, of) {
            (Feature::Snapshot, Of::Current | Of::Snapshot) | (Feature::Copy, Of::Snapshot) => qcow2,
            (Feature::Copy, Of::Base | Of::Current) | (Feature::Rename, Of::Current) => true,
            _ => false,
        },
        // `LvmThinPlugin.pm`
        Kind::Lvmthin => matches!(
            (feature, of),
            (Feature::Snapshot | Feature::Template | Feature::Rename, Of::Current)
                | (Feature::Clone, Of::Base | Of::Snapshot)
                | (Feature::Copy, _)
        ),
        // `ZFSPoolPlugin.pm`: nothing can be copied or cloned from a snapshot.
        Kind::Zfspool => matches!(
            (feature, of),
            (Feature::Snapshot, Of::Current | Of::Snapshot)
                | (Feature::Clone, Of::Base)
                | (Feature::Template | Feature::Rename, Of::Current)
                | (Feature::Copy | Feature::Replicate, Of::Base | Of::Current)
        ),
        // `RBDPlugin.pm`
        Kind::Rbd => matches!(
            (feature, of),
            (Feature::Snapshot, Of::Current | Of::Snapshot)
                | (Feature::Clone, Of::Base | Of::Snapshot)
                | (Feature::Template | Feature::Rename, Of::Current)
                | (Feature::Copy, _)
        ),
    }
}

/// Whether volumes of this format can be replicated to another node (`ZFSPoolPlugin.pm:storage_can_replicate`; no
/// other type can).
pub fn can_replicate(storage: &Storage, format: &str) -> bool {
    storage.kind == Kind::Zfspool && matches!(format, "raw" | "subvol")
}

#[cfg(test)]
mod tests {
    use super::super::volname::parse;
    use super::*;

    #[test]
    fn what_a_volume_can_do_is_the_plugins_table() {
        let can = |kind, name: &str, snapshot, feature| {
            let storage = Storage { id: "s".to_owned(), kind, ..Storage::default() };
            has(&storage, &parse(&storage, name).expect("a name"), snapshot, feature)
        };
        assert!(!can(Kind::Zfspool, "vm-1-x", true, Feature::Copy));
        assert!(!can(Kind::Zfspool, "vm-1-x", true, Feature::Clone));
        assert!(can(Kind::Zfspool, "base-1-x", false, Feature::Clone));
        assert!(can(Kind::Rbd, "vm-1-x", true, Feature::Copy));
        assert!(can(Kind::Rbd, "vm-1-x", true, Feature::Clone));
        assert!(!can(Kind::Rbd, "vm-1-x", false, Feature::Clone));
        assert!(can(Kind::Btrfs, "1/vm-1-x.raw", false, Feature::Clone));
        assert!(!can(Kind::Dir, "1/vm-1-x.raw", false, Feature::Clone));
        assert!(can(Kind::Dir, "1/base-1-x.raw", false, Feature::Clone));
        assert!(!can(Kind::Lvm, "vm-1-x", false, Feature::Template));
        assert!(can(Kind::Nfs, "1/vm-1-x.qcow2", false, Feature::Snapshot));
        assert!(!can(Kind::Cifs, "1/vm-1-x.raw", false, Feature::Snapshot));
    }
}
