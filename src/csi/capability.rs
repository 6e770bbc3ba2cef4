//! Volume capabilities: which ones the driver takes, for controller and node alike.

use tonic::Status;

use super::proto::{
    VolumeCapability,
    volume_capability::{AccessMode, AccessType as WireAccessType, access_mode::Mode},
};
pub(super) use crate::types::sharing::Sharing;

/// How a volume is given to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AccessType {
    /// As a device node.
    Block,
    /// As a mounted file system.
    Mount {
        /// The file system; empty where the caller leaves it to the driver.
        fs_type: String,
        /// Mount options. They may be sensitive: never logged.
        flags: Vec<String>,
        /// The group the files are to belong to; taken care of by the kubelet, not by this driver.
        group: String,
    },
}

/// A capability that is understood and supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capability {
    /// How the volume is given to a pod.
    pub(super) access: AccessType,
    /// Who may use it at once.
    pub(super) sharing: Sharing,
}

/// Reads one capability.
pub(super) fn check(capability: Option<&VolumeCapability>) -> Result<Capability, Status> {
    let capability = capability.ok_or_else(|| Status::invalid_argument("`volume_capability` is missing"))?;
    let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, AccessMode::mode);
    let sharing = match mode {
        Mode::SingleNodeWriter => Sharing::OneNode,
        Mode::SingleNodeSingleWriter => Sharing::OnePlace,
        Mode::SingleNodeMultiWriter => Sharing::ManyPlaces,
        Mode::SingleNodeReaderOnly => Sharing::OneReader,
        Mode::MultiNodeReaderOnly => Sharing::ManyReaders,
        // A file system of one kernel is corrupted by a second one that writes.
        Mode::Unknown | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
            return Err(Status::invalid_argument(format!(
                "access mode {} is not supported; hint: ReadWriteOnce, ReadWriteOncePod and, on shared storages, ReadOnlyMany are",
                mode.as_str_name()
            )));
        }
    };
    let access = match capability.access_type.as_ref() {
        Some(WireAccessType::Block(_)) => AccessType::Block,
        Some(WireAccessType::Mount(mount)) => {
            if !matches!(mount.fs_type.as_str(), "" | "ext4" | "xfs" | "btrfs") {
                return Err(Status::invalid_argument(format!(
                    "file system `{}` is not supported; hint: ext4, xfs and btrfs are",
                    mount.fs_type
                )));
            }
            AccessType::Mount {
                fs_type: mount.fs_type.clone(),
                flags: mount.mount_flags.clone(),
                group: mount.volume_mount_group.clone(),
            }
        }
        None => {
            return Err(Status::invalid_argument("a capability must say whether it is for block or mount"));
        }
    };
    Ok(Capability { access, sharing })
}

/// Reads all capabilities of a volume: every one must be supported.
pub(super) fn check_all(capabilities: &[VolumeCapability]) -> Result<Vec<Capability>, Status> {
    if capabilities.is_empty() {
        return Err(Status::invalid_argument("`volume_capabilities` is missing"));
    }
    capabilities.iter().map(|capability| check(Some(capability))).collect()
}
