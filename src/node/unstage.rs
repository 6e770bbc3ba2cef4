//! Unstage: nothing of the volume is left on the node. It is written out, unmounted, and its disk taken out of the kernel before the
//! controller unplugs it. A disk that is gone already is fine at every step.

use std::path::PathBuf;

use super::{
    MountPath, Node, UnpublishError,
    contents::{Carrier, is_named_for, is_ours},
    find, mounted_at, twins, uses,
};
use crate::{
    host::{
        Disk, FsKind, Mount,
        error::{DisksError, OpenError, PathError, ReleaseError},
        luks::{LockError, Mapping},
    },
    types::Wwn,
};

/// A volume to unstage.
#[derive(Debug, Clone)]
pub struct Unstage {
    /// The volume's handle.
    pub volume: String,
    /// Where it is staged.
    pub staging: MountPath,
}

/// Why a volume was not unstaged.
#[derive(Debug, thiserror::Error)]
pub enum UnstageError {
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The mount table.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Another volume is staged there.
    #[error(
        "{mounted} is mounted at the staging path `{staging}`, and is not the volume's; unmount it by hand if nothing needs it"
    )]
    OtherVolume {
        /// The path.
        staging: MountPath,
        /// What is mounted.
        mounted: String,
    },
    /// The volume is in use. It is never taken from a pod.
    #[error("the volume is still published at `{}`", at.display())]
    Published {
        /// Where.
        at: PathBuf,
    },
    /// Unmounting.
    #[error("cannot unmount the staging path")]
    Unmount(#[source] UnpublishError),
    /// The disk can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mapping of an encrypted volume does not go.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The disk does not go.
    #[error(transparent)]
    Release(#[from] ReleaseError),
}

/// What the kernel has of a volume.
#[derive(Debug, Clone, Copy, Default)]
struct Held<'a> {
    disk: Option<&'a Disk>,
    mapping: Option<&'a Mapping>,
}

impl Node {
    /// Unstages a volume. Succeeds where it is not staged, after making sure that its disk is out of the kernel.
    ///
    /// Which disk is the volume's is read from what is mounted at the staging path; where nothing is (a raw block volume, or
    /// a repeated call), from the name that the handle gives the disk. A raw block volume that the driver before this one attached
    /// can be told by neither: its disk stays in the kernel until the controller unplugs it, which does no harm, since a
    /// device that nobody has open has nothing to flush.
    pub async fn unstage(&self, command: &Unstage) -> Result<(), UnstageError> {
        let names = find::names(&command.volume);
        let command = &Unstage { staging: self.resolve(&command.staging).await?, ..command.clone() };
        let mounts = self.host.mounts().await?;
        let disks = self.host.disks().await?;
        let mappings = self.host.mappings().await?;
        let staged = mounted_at(&mounts, command.staging.as_path());
        let mut held = self.staged_here(staged, (&disks, &mappings), command).await?;
        held.disk = held.disk.or_else(|| named(&disks, &names, &command.volume));
        held.mapping = held.mapping.or_else(|| mapping_of(&mappings, held.disk, &disks, &command.volume));
        if let Some(disk) = held.disk {
            let foreign = disk.wwn.is_some_and(|wwn| wwn.is_ours() && !names.contains(&wwn));
            if foreign {
                let (staging, mounted) = (command.staging.clone(), format!("disk {disk}"));
                return Err(UnstageError::OtherVolume { staging, mounted });
            }
        }
        let devices: Vec<&Disk> =
            held.disk.into_iter().chain(held.mapping.map(|mapping| &mapping.device)).collect();
        let here = |other: &Mount| {
            other.target == command.staging.as_path()
                || staged.is_some_and(|staged| twins::is_twin(&mounts, staged, other))
        };
        let uses = uses(&*self.host, &mounts, &devices).await?;
        for other in uses.into_iter().filter(|other| !here(other)) {
            if !self.is_dead_use(other, staged, held).await {
                return Err(UnstageError::Published { at: other.target.clone() });
            }
        }
        if staged.is_some() {
            self.unmount_staged(command).await?;
        }
        if let Some(mapping) = held.mapping {
            self.host.lock(mapping).await?;
        }
        if let Some(disk) = held.disk {
            self.let_go(disk, &command.volume).await?;
        }
        tracing::info!(volume = command.volume, "volume unstaged");
        Ok(())
    }

    /// What is mounted at the staging path: the disk, if it is there, and a mapping over it.
    async fn staged_here<'a>(
        &self,
        staged: Option<&Mount>,
        (disks, mappings): (&'a [Disk], &'a [Mapping]),
        command: &Unstage,
    ) -> Result<Held<'a>, UnstageError> {
        let Some(mount) = staged else { return Ok(Held::default()) };
        let mapping = mappings.iter().find(|mapping| mapping.device.number == mount.number);
        if let Some(mapping) = mapping {
            let disk = mapping.over.and_then(|over| disks.iter().find(|disk| disk.number == over));
            // Over its disk it is the volume's by what the disk is; without one it has only its name.
            let old = mapping.name.ends_with("-encrypted");
            if disk.is_none() && !old && !is_named_for(mapping, &command.volume) {
                let mounted = format!("mapping `{}`", mapping.name);
                return Err(UnstageError::OtherVolume { staging: command.staging.clone(), mounted });
            }
            return Ok(Held { disk, mapping: Some(mapping) });
        }
        let Some(disk) = disks.iter().find(|disk| disk.number == mount.number) else {
            return self.dead(mount, command).await.map(|()| Held::default());
        };
        match self.is_in_use(&Carrier::Disk(disk.clone())).await {
            // A disk that the kernel has given up is not asked, and its mount has to go for the disk to go.
            Ok(true) if self.has_only_its_number(disk, mappings, command).await => Ok(Held::default()),
            Ok(true) | Err(OpenError::Offline { .. }) => Ok(Held { disk: Some(disk), mapping: None }),
            // The mount is a dead one: the disk that has its number now is another.
            Ok(false) => Ok(Held::default()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether what is mounted at the staging path is dead, and another volume's disk has its number by now: a disk under a mapping is
    /// not mounted itself, and the file system of a disk that is there answers.
    async fn has_only_its_number(&self, disk: &Disk, mappings: &[Mapping], command: &Unstage) -> bool {
        let foreign =
            disk.wwn.is_some_and(|wwn| wwn.is_ours() && !find::names(&command.volume).contains(&wwn));
        let mapped = mappings.iter().any(|mapping| mapping.over == Some(disk.number));
        foreign && (mapped || matches!(self.host.responds(command.staging.as_path()).await, Ok(false)))
    }

    /// Whether a mount that has the number of the volume's device is one of a disk that had it before. All mounts of one file system
    /// answer, or none does; and a disk is not mounted that a mapping has, or nobody.
    async fn is_dead_use(&self, other: &Mount, staged: Option<&Mount>, held: Held<'_>) -> bool {
        let Some(disk) = held.disk.filter(|disk| disk.number == other.number) else { return false };
        let unused = async || matches!(self.is_in_use(&Carrier::Disk(disk.clone())).await, Ok(false));
        if held.mapping.is_some() || unused().await {
            return true;
        }
        let Some(staged) = staged.filter(|staged| staged.number == other.number) else { return false };
        matches!(self.host.responds(&staged.target).await, Ok(true))
            && matches!(self.host.responds(&other.target).await, Ok(false))
    }

    /// Refuses a mount of a device that is no SCSI disk and yet there, and of a file system that no volume has: that is something else's,
    /// maybe a volume that the driver before this one decrypted. What is left then is of a disk that was pulled.
    async fn dead(&self, mount: &Mount, command: &Unstage) -> Result<(), UnstageError> {
        if mount.fs.parse::<FsKind>().is_ok() && !self.host.exists(mount.number).await? {
            return Ok(());
        }
        let mounted = format!("`{}` on device {}", mount.fs, mount.number);
        Err(UnstageError::OtherVolume { staging: command.staging.clone(), mounted })
    }

    async fn unmount_staged(&self, command: &Unstage) -> Result<(), UnstageError> {
        if let Err(error) = self.host.sync(command.staging.as_path()).await {
            // Unmounting tries once more. Data that a dead disk did not take is lost either way.
            warn(&command.volume, &error, "the file system was not written out");
        }
        self.unmount_all(&command.staging).await.map_err(UnstageError::Unmount)
    }

    /// Takes the disk out of the kernel, unless it went by itself.
    async fn let_go(&self, disk: &Disk, volume: &str) -> Result<(), UnstageError> {
        match self.host.open(disk).await {
            Ok(open) => Ok(self.host.release(open).await?),
            Err(error @ OpenError::Offline { .. }) => {
                // What it was not given it never gets: waiting would only keep the pod from going elsewhere.
                warn(volume, &error, "the disk is taken out of the kernel without a flush");
                Ok(self.host.discard(disk).await?)
            }
            Err(error) => {
                let there = self
                    .host
                    .disks()
                    .await?
                    .iter()
                    .any(|now| (&now.name, now.number, now.wwn) == (&disk.name, disk.number, disk.wwn));
                if there { Err(error.into()) } else { Ok(()) }
            }
        }
    }
}

fn warn(volume: &str, error: &(dyn std::error::Error + 'static), what: &'static str) {
    tracing::warn!(volume, error, "{what}");
}

/// The mapping of a volume that is staged without being mounted, or whose unstage was cut off: over its disk, or by its name where
/// the disk that it lies over is gone. The volume may be back as another disk by then.
fn mapping_of<'a>(
    mappings: &'a [Mapping],
    disk: Option<&Disk>,
    disks: &[Disk],
    volume: &str,
) -> Option<&'a Mapping> {
    let over_it = |mapping: &&Mapping| disk.is_some_and(|disk| is_ours(mapping, volume, disk));
    let dead = |mapping: &&Mapping| {
        is_named_for(mapping, volume) && !disks.iter().any(|disk| mapping.over == Some(disk.number))
    };
    mappings.iter().find(over_it).or_else(|| mappings.iter().find(dead))
}

fn named<'a>(disks: &'a [Disk], names: &[Wwn], volume: &str) -> Option<&'a Disk> {
    names.iter().find_map(|wwn| match find::only(disks, *wwn) {
        Ok(disk) => disk,
        Err(error) => {
            // Not staged, so nothing has to be written out; which one to take away can't be told.
            warn(volume, &error, "the disks stay in the kernel");
            None
        }
    })
}
