//! Publish: a staged volume appears at the path of a pod.

use std::path::PathBuf;

use super::{
    Access, FindError, HealthError, MountPath, Node, Trouble, contents::Carrier, find, mounted_at, twins,
    uses,
};
use crate::{
    host::{
        Disk, Found, Mount, OpenDisk, Place, PlaceKind,
        error::{DisksError, MountError, OpenError, PathError},
    },
    types::{publish::PublishedDisk, sharing::Sharing},
};

/// A staged volume to publish.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The volume's handle.
    pub volume: String,
    /// Where it is staged.
    pub staging: MountPath,
    /// Where it shall appear.
    pub target: MountPath,
    /// The disk as the controller attached it.
    pub disk: PublishedDisk,
    /// How the volume is used.
    pub access: Access,
    /// Who may use it at once.
    pub sharing: Sharing,
    /// Whether nothing may be written through this target.
    pub readonly: bool,
    /// Whether the volume is to be encrypted.
    pub encrypted: bool,
}

/// Why a volume was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The disk of a raw block volume.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The disk can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mount table or the target.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Nothing is mounted at the staging path.
    #[error("nothing is mounted at the staging path `{0}`: the volume has to be staged first")]
    NotStaged(MountPath),
    /// What is mounted at the staging path is not on the disk of the volume.
    #[error(
        "what is mounted at the staging path `{staging}` is not on the disk with WWN {wwn}: the disk is gone, or another volume is staged there"
    )]
    OtherStaged {
        /// The path.
        staging: MountPath,
        /// The name of the volume's disk.
        wwn: crate::types::Wwn,
    },
    /// The encrypted volume was not opened, or is closed again.
    #[error("the encrypted volume on disk `{disk}` is not open: it has to be staged first")]
    Locked {
        /// The disk.
        disk: String,
    },
    /// The volume does not work any more.
    #[error(
        "the volume is not given to a pod: {0}; delete the pods that have it: it is then unstaged, and checked when it is staged again"
    )]
    Trouble(Trouble),
    /// Whether the volume works is not known.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// The target is taken.
    #[error("`{target}` is {is} already, and was asked for as {asked}")]
    Differs {
        /// The path.
        target: MountPath,
        /// What is there.
        is: &'static str,
        /// What was asked for.
        asked: &'static str,
    },
    /// The volume is for one pod alone, which is another.
    #[error("the volume is for one pod (ReadWriteOncePod) and is published at `{}` already", at.display())]
    Taken {
        /// Where.
        at: PathBuf,
    },
    /// A raw block volume can't be made read-only by mounting.
    #[error(
        "a raw block volume is not read-only by how it is mounted; ask for a read-only disk by the access mode"
    )]
    ReadonlyBlock,
    /// Mounting.
    #[error(transparent)]
    Mount(#[from] MountError),
}

const WRITABLE: &str = "this volume, writable";
const READONLY: &str = "this volume, read-only";

impl Node {
    /// Publishes a volume. A volume that is published so already stays as it is.
    ///
    /// A second target is as good as the first, unless the volume is for one alone: `SINGLE_NODE_WRITER` leaves it open how many pods
    /// of the node use it (CSI, `NodePublishVolume`, second table).
    pub async fn publish(&self, command: &Publish) -> Result<(), PublishError> {
        let (staging, target) = (self.resolve(&command.staging).await?, self.resolve(&command.target).await?);
        let readonly = command.readonly || command.sharing.is_read_only();
        let command = &Publish { staging, target, readonly, ..command.clone() };
        match command.access {
            Access::Filesystem { .. } => self.publish_filesystem(command).await,
            Access::Block => self.publish_block(command).await,
        }
    }

    async fn publish_filesystem(&self, command: &Publish) -> Result<(), PublishError> {
        let (staging, target) = (&command.staging, &command.target);
        let mounts = self.host.mounts().await?;
        let staged = mounted_at(&mounts, staging.as_path());
        let staged = staged.ok_or_else(|| PublishError::NotStaged(staging.clone()))?;
        let disks = self.host.disks().await?;
        let wwn = command.disk.wwn;
        find::named_for(&command.volume, wwn)?;
        let other = || PublishError::OtherStaged { staging: staging.clone(), wwn };
        let disk = find::only(&disks, wwn)?.ok_or_else(other)?;
        let carrier = self.carrier(&command.volume, disk).await?;
        if carrier.device().number != staged.number || !self.is_in_use(&carrier).await? {
            return Err(other());
        }
        if let Some(trouble) = self.trouble(&mounts, staged, staging.as_path()).await? {
            return Err(PublishError::Trouble(trouble));
        }

        // A bind can't give back what the staged mount has not.
        let readonly = command.readonly || staged.readonly;
        let asked = if readonly { READONLY } else { WRITABLE };
        if let Some(mount) = mounted_at(&mounts, target.as_path()) {
            let is = match (mount.number == staged.number, mount.readonly) {
                (true, is_readonly) if is_readonly == readonly => return Ok(()),
                (true, true) => READONLY,
                (true, false) => WRITABLE,
                (false, _) => "the place of another mount",
            };
            return Err(PublishError::Differs { target: target.clone(), is, asked });
        }
        self.alone(&mounts, command, &[disk, carrier.device()]).await?;
        self.host.make_place(target.as_path(), PlaceKind::Directory).await?;
        let bound = self.host.bind(staging.as_path(), staged.number, target.as_path(), readonly).await;
        self.done(command, bound).await
    }

    async fn publish_block(&self, command: &Publish) -> Result<(), PublishError> {
        let target = &command.target;
        let disk: OpenDisk = self.find(&command.volume, &command.disk).await?;
        if command.readonly && !disk.disk().readonly {
            return Err(PublishError::ReadonlyBlock);
        }
        let under = disk.disk().clone();
        let disk = match self.carrier(&command.volume, &under).await? {
            Carrier::Mapping(mapping) => self.host.open_mapping(&mapping).await?,
            // A pod would write over what is encrypted.
            Carrier::Disk(listed) if command.encrypted || self.is_encrypted(&disk).await => {
                return Err(PublishError::Locked { disk: listed.name });
            }
            Carrier::Disk(_) => disk,
        };
        let mounts = self.host.mounts().await?;
        if mounted_at(&mounts, target.as_path()).is_some() {
            if self.host.look(target.as_path()).await? == Place::BlockDevice(disk.disk().number) {
                return Ok(());
            }
            let (is, asked) = ("the place of another mount", "this volume's disk");
            return Err(PublishError::Differs { target: target.clone(), is, asked });
        }
        self.alone(&mounts, command, &[&under, disk.disk()]).await?;
        self.host.make_place(target.as_path(), PlaceKind::File).await?;
        let bound = self.host.bind_disk(&disk, target.as_path()).await;
        self.done(command, bound).await
    }

    /// Refuses a second target of a volume that is for one alone.
    async fn alone(
        &self,
        mounts: &[Mount],
        command: &Publish,
        devices: &[&Disk],
    ) -> Result<(), PublishError> {
        if command.sharing != Sharing::OnePlace {
            return Ok(());
        }
        let staged = mounted_at(mounts, command.staging.as_path());
        let here = |other: &Mount| {
            other.target == command.staging.as_path()
                || staged.is_some_and(|staged| twins::is_twin(mounts, staged, other))
        };
        let uses = uses(&*self.host, mounts, devices).await?;
        match uses.into_iter().find(|other| !here(other)) {
            Some(other) => Err(PublishError::Taken { at: other.target.clone() }),
            None => Ok(()),
        }
    }

    /// Whether a raw block volume is one that this driver encrypted. Where it can't be told what a pod has written there, it is not.
    pub(super) async fn is_encrypted(&self, disk: &OpenDisk) -> bool {
        matches!(self.host.probe(disk).await, Ok(Found::Luks { ours: true }))
    }

    /// Leaves no empty place behind where nothing was mounted on it.
    async fn done(&self, command: &Publish, bound: Result<(), MountError>) -> Result<(), PublishError> {
        if let Err(error) = bound {
            if let Err(error) = self.host.remove_place(command.target.as_path()).await {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(volume = command.volume, error, "an empty target path stays behind");
            }
            return Err(error.into());
        }
        tracing::info!(volume = command.volume, "volume published");
        Ok(())
    }
}
