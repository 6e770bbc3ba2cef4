//! Whether a volume that is mounted still works: its disk may be gone, or its file system may have stopped taking writes.

use std::path::Path;

use super::Node;
use crate::host::{
    Condition, DeviceNumber, Disk, Mount,
    error::{DisksError, OpenError, PathError},
};

/// What is wrong with a volume that is mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// The disk is not there any more.
    #[error("the disk of the volume is gone: it was taken out of the VM while it was in use")]
    Gone,
    /// The kernel has given the disk up.
    #[error("disk `{disk}` is in state `{state}`: the kernel has given it up after errors")]
    Offline {
        /// The disk.
        disk: String,
        /// The state.
        state: String,
    },
    /// The file system takes no writes though it was mounted for them.
    #[error("the {fs} on disk `{disk}` went read-only after an error")]
    Readonly {
        /// The file system.
        fs: String,
        /// The disk.
        disk: String,
    },
    /// The file system has shut itself down.
    #[error("the {fs} on disk `{disk}` has shut itself down after an error")]
    ShutDown {
        /// The file system.
        fs: String,
        /// The disk.
        disk: String,
    },
}

/// Why it is not known whether a volume works.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The disk can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file system can't be asked.
    #[error(transparent)]
    Path(#[from] PathError),
}

impl Node {
    /// The disk and the device of this number, which is the disk's own or that of a mapping over it.
    pub(super) async fn disk_under(&self, number: DeviceNumber) -> Result<Option<(Disk, Disk)>, DisksError> {
        let disks = self.host.disks().await?;
        let disk = |number| disks.iter().find(|disk| disk.number == number).cloned();
        if let Some(disk) = disk(number) {
            return Ok(Some((disk.clone(), disk)));
        }
        let mappings = self.host.mappings().await?;
        let mapping = mappings.into_iter().find(|mapping| mapping.device.number == number);
        Ok(mapping.and_then(|mapping| Some((disk(mapping.over?)?, mapping.device))))
    }

    /// What is wrong with the device of this number, a disk's or a mapping's.
    pub(super) async fn device_trouble(&self, number: DeviceNumber) -> Result<Option<Trouble>, HealthError> {
        let Some((disk, _)) = self.disk_under(number).await? else { return Ok(Some(Trouble::Gone)) };
        match self.host.open(&disk).await {
            Ok(open) => Ok((!self.host.in_use(&open).await?).then_some(Trouble::Gone)),
            Err(OpenError::Offline { name, state }) => Ok(Some(Trouble::Offline { disk: name, state })),
            Err(error) => Err(error.into()),
        }
    }

    /// What is wrong with a mounted file system. Its root is opened, which hangs where the disk answers nothing.
    pub(super) async fn trouble(
        &self,
        mounts: &[Mount],
        mount: &Mount,
        path: &Path,
    ) -> Result<Option<Trouble>, HealthError> {
        let trouble = self.device_trouble(mount.number).await?;
        if trouble.is_some() {
            return Ok(trouble);
        }
        let shut_down = || Trouble::ShutDown { fs: mount.fs.clone(), disk: mount.number.to_string() };
        match condition(mounts, mount.number) {
            Condition::ShutDown => return Ok(Some(shut_down())),
            Condition::Readonly => {
                let (fs, disk) = (mount.fs.clone(), mount.number.to_string());
                return Ok(Some(Trouble::Readonly { fs, disk }));
            }
            Condition::Writable => {}
        }
        Ok((!self.host.responds(path).await?).then(shut_down))
    }
}

/// The condition of a file system by all its mounts. That it takes no writes is an error only where one of them was made for writing.
fn condition(mounts: &[Mount], number: DeviceNumber) -> Condition {
    let mut of = mounts.iter().filter(|mount| mount.number == number);
    let worst = of.clone().find(|mount| mount.condition == Condition::ShutDown);
    let denied = of.find(|mount| !mount.readonly && mount.condition == Condition::Readonly);
    worst.or(denied).map_or(Condition::Writable, |mount| mount.condition)
}
