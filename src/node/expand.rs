//! Expand: a volume whose disk was grown gets the space.

use tokio::time::{Instant, sleep};

use super::{MountPath, Node, contents::Carrier, mounted_at};
use crate::{
    host::{
        DeviceNumber, Disk, Place,
        error::{DisksError, GrowError, OpenError, PathError},
        luks::{GrowMappingError, Mapping, Passphrase},
    },
    types::Bytes,
};

/// A volume to expand.
#[derive(Debug, Clone)]
pub struct Expand {
    /// The volume's handle.
    pub volume: String,
    /// Where it is staged or published.
    pub path: MountPath,
    /// The size it must have at least.
    pub required: Option<Bytes>,
    /// The size it may have at most.
    pub limit: Option<Bytes>,
    /// The key of an encrypted volume, where it came along.
    pub key: Option<Passphrase>,
}

/// Why a volume was not expanded.
#[derive(Debug, thiserror::Error)]
pub enum ExpandError {
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The mount table or the path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The volume is not there.
    #[error("no volume is staged or published at `{0}`")]
    NotThere(MountPath),
    /// The disk behind it was taken away.
    #[error("the disk of the volume at `{0}` is gone")]
    DiskGone(MountPath),
    /// The disk has not grown.
    #[error("disk {disk} has not grown to {required}: the controller has to expand the volume first")]
    Small {
        /// The disk.
        disk: String,
        /// The size it should have.
        required: Bytes,
    },
    /// The disk is larger than the volume may be.
    #[error("disk {disk} is larger than the limit of {limit}, and a volume never shrinks")]
    Large {
        /// The disk.
        disk: String,
        /// The limit.
        limit: Bytes,
    },
    /// The disk can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Growing the mapping of an encrypted volume.
    #[error(transparent)]
    Mapping(#[from] GrowMappingError),
    /// Growing the file system.
    #[error(transparent)]
    Grow(#[from] GrowError),
}

const POLL: std::time::Duration = std::time::Duration::from_millis(200);

impl Node {
    /// Expands a volume; returns the size of its disk.
    pub async fn expand(&self, command: &Expand) -> Result<Bytes, ExpandError> {
        let path = self.resolve(&command.path).await?;
        let path = path.as_path();
        let mounts = self.host.mounts().await?;
        let mount = mounted_at(&mounts, path).ok_or_else(|| ExpandError::NotThere(command.path.clone()))?;
        let (number, raw) = match self.host.look(path).await? {
            Place::BlockDevice(number) => (number, true),
            _ => (mount.number, false),
        };
        let gone = || ExpandError::DiskGone(command.path.clone());
        let mapping = self.mapping_at(number).await?;
        let under = mapping.as_ref().map_or(Some(number), |mapping| mapping.over).ok_or_else(gone)?;
        let disk = self.host.disks().await?.into_iter().find(|disk| disk.number == under);
        let disk = self.grown(disk.ok_or_else(gone)?, command.required).await?;
        if let Some(limit) = command.limit.filter(|limit| disk.size > *limit) {
            return Err(ExpandError::Large { disk: disk.to_string(), limit });
        }
        let mut carrier = Carrier::Disk(disk.clone());
        if let Some(mapping) = mapping {
            self.host.grow_mapping(&mapping, command.key.as_ref()).await?;
            carrier = Carrier::Mapping(self.mapping_at(number).await?.ok_or_else(gone)?);
        }
        // A read-only target has a writable mount elsewhere, or the file system can't grow at all.
        let writable = mounts.iter().find(|mount| mount.number == number && !mount.readonly);
        if let (false, Some(mount)) = (raw, writable) {
            let open = self.open_carrier(&carrier).await?;
            self.host.grow(&open, &mount.target).await?;
        }
        tracing::info!(volume = command.volume, size = %disk.size, "volume expanded");
        Ok(disk.size)
    }

    /// The mapping whose device has this number.
    async fn mapping_at(&self, number: DeviceNumber) -> Result<Option<Mapping>, DisksError> {
        let mut mappings = self.host.mappings().await?.into_iter();
        Ok(mappings.find(|mapping| mapping.device.number == number))
    }

    /// The disk, once it has the size.
    async fn grown(&self, disk: Disk, required: Option<Bytes>) -> Result<Disk, ExpandError> {
        let Some(required) = required else { return Ok(disk) };
        let deadline = Instant::now() + self.options.size_timeout;
        let mut disk = disk;
        while disk.size < required {
            if Instant::now() >= deadline {
                return Err(ExpandError::Small { disk: disk.to_string(), required });
            }
            disk = self.host.refresh(&disk).await?;
            if disk.size < required {
                sleep(POLL).await;
            }
        }
        Ok(disk)
    }
}
