//! Volume handles: what Kubernetes keeps in a PV.

use std::{fmt, str::FromStr};

use super::{NodeName, ParseError, Region, StorageId, VolId, VolumeName};

/// The identity of a volume: `region/zone/storage/name`, split at the first three slashes.
///
/// The zone is empty for shared storages; older releases of the driver before this one set it all the same, so
/// two handles may name one shared volume. A handle is never rewritten; compare volumes, not handles.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeHandle {
    /// The Proxmox cluster.
    pub region: Region,
    /// The Proxmox node, for a volume on a local storage.
    pub zone: Option<NodeName>,
    /// The storage and the name on it.
    pub volid: VolId,
}

impl VolumeHandle {
    /// The storage.
    pub fn storage(&self) -> &StorageId {
        &self.volid.storage
    }

    /// The name on the storage.
    pub fn name(&self) -> &VolumeName {
        &self.volid.name
    }
}

impl fmt::Display for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zone = self.zone.as_ref().map_or("", NodeName::as_str);
        write!(f, "{}/{zone}/{}/{}", self.region, self.volid.storage, self.volid.name)
    }
}

impl FromStr for VolumeHandle {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(4, '/');
        let (Some(region), Some(zone), Some(storage), Some(name)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ParseError::new(
                "volume handle",
                text,
                "it must have the form `region/zone/storage/name`",
            ));
        };
        Ok(Self {
            region: region.parse()?,
            zone: if zone.is_empty() { None } else { Some(zone.parse()?) },
            volid: VolId { storage: storage.parse()?, name: name.parse()? },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_in_use_parses_and_prints_itself() {
        for text in [
            "region/pve-1/local-lvm/vm-9999-pvc-0e6cf7a5-5b4b-4b32-a1b5-5b4b3f1d2c11",
            "region/pve-1/local/9999/vm-9999-pvc-1.raw",
            "region/pve-1/local/9999/vm-9999-pvc-1.qcow2",
            "region//rbd/vm-9999-pvc-1",
            "region//nfs/9999/vm-9999-pvc-1.raw",
            "region/pve-1/rbd/vm-9999-pvc-1",
            "region//zfs/vm-10000-pvc-1",
            "region/pve-1/local-lvm/vm-9999-snapshot-1",
            "dev-1/pve-m-4/zfs/vm-100-disk-1",
        ] {
            assert_eq!(text.parse::<VolumeHandle>().map(|h| h.to_string()).as_deref(), Ok(text));
        }
    }

    #[test]
    fn foreign_ids_are_refused() {
        for text in
            ["fake-vol-id-1234", "", "a/b/c", "//local/x", "r/z z/local/x", "r//local/../x", "r//local/x,y"]
        {
            assert!(text.parse::<VolumeHandle>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn print_and_parse_are_inverse(
            region in "[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", zone in "([a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?)?",
            storage in "[a-z][a-z0-9_.-]{0,10}[a-z0-9]", name in "[a-zA-Z0-9_+@:-]{1,40}(/[a-zA-Z0-9_+@:-]{1,40})?",
        ) {
            let text = format!("{region}/{zone}/{storage}/{name}");
            prop_assert_eq!(text.parse::<VolumeHandle>().map(|h| h.to_string()), Ok(text));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<VolumeHandle>();
        }
    }
}
