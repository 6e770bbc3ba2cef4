//! Stats: how full a volume is.

use super::{HealthError, MountPath, Node, Trouble, mounted_at};
use crate::{
    host::{
        Place, Usage,
        error::{DisksError, OpenError, PathError, UsageError},
    },
    types::Bytes,
};

/// How full a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stats {
    /// Space and inodes of a file system.
    Filesystem(Usage),
    /// The size of a raw block volume.
    Block(Bytes),
}

/// Why it is not known how full a volume is.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The mount table or the path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The volume is not there.
    #[error("no volume is staged or published at `{0}`")]
    NotThere(MountPath),
    /// Measuring.
    #[error(transparent)]
    Usage(#[from] UsageError),
    /// Whether it works.
    #[error(transparent)]
    Health(#[from] HealthError),
}

impl Node {
    /// How full the volume at the path is.
    pub async fn stats(&self, path: &MountPath) -> Result<Stats, StatsError> {
        let path = &self.resolve(path).await?;
        let not_there = || StatsError::NotThere(path.clone());
        let mounts = self.host.mounts().await?;
        mounted_at(&mounts, path.as_path()).ok_or_else(not_there)?;
        match self.host.look(path.as_path()).await? {
            Place::BlockDevice(number) => {
                let (_, device) = self.disk_under(number).await?.ok_or_else(not_there)?;
                Ok(Stats::Block(device.size))
            }
            _ => Ok(Stats::Filesystem(self.host.usage(path.as_path()).await?)),
        }
    }

    /// What is wrong with the volume at the path.
    pub async fn condition(&self, path: &MountPath) -> Result<Option<Trouble>, StatsError> {
        let path = &self.resolve(path).await?;
        let mounts = self.host.mounts().await?;
        let mount = mounted_at(&mounts, path.as_path()).ok_or_else(|| StatsError::NotThere(path.clone()))?;
        match self.host.look(path.as_path()).await? {
            Place::BlockDevice(number) => match self.disk_under(number).await? {
                Some((disk, _)) => match self.host.open(&disk).await {
                    Err(OpenError::Offline { name, state }) => {
                        Ok(Some(Trouble::Offline { disk: name, state }))
                    }
                    _ => Ok(None),
                },
                None => Ok(Some(Trouble::Gone)),
            },
            _ => Ok(self.trouble(&mounts, mount, path.as_path()).await?),
        }
    }
}
