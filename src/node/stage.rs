//! Stage: the disk is found and proven to be the volume's; its file system is made if need be and mounted.

use super::{
    Access, FindError, HealthError, MountFlags, MountPath, Node, Trouble,
    contents::{Carrier, Opened, is_named_for},
    mounted_at,
};
use crate::{
    host::{
        Disk, Format, Found, FsKind, Mount, MountOptions, OpenDisk, PlaceKind,
        error::{
            CheckError, DisksError, FormatError, MountError, OpenError, PathError, ProbeError, UnmountError,
        },
        luks::{LockError, Passphrase, UnlockError},
    },
    types::{
        params::FilesystemOptions,
        publish::{Contents, PublishedDisk},
        sharing::Sharing,
    },
};

/// A volume to stage.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The volume's handle.
    pub volume: String,
    /// Where the file system is mounted.
    pub staging: MountPath,
    /// The disk as the controller attached it.
    pub disk: PublishedDisk,
    /// How the volume is used.
    pub access: Access,
    /// Who may use it at once.
    pub sharing: Sharing,
    /// How the file system is made and mounted.
    pub options: FilesystemOptions,
    /// The key of a volume that is, or is to be, encrypted.
    pub key: Option<Passphrase>,
}

/// Why a volume was not staged. Nothing is mounted then that was not before.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The disk.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// Whether the disk is in use is not known.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mount table or the staging path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Another device is mounted at the staging path.
    #[error(
        "device {device} is mounted at the staging path `{staging}`, which is not disk `{disk}` of the volume"
    )]
    Occupied {
        /// The path.
        staging: MountPath,
        /// The number of the other device.
        device: String,
        /// The disk of the volume.
        disk: String,
    },
    /// The volume is staged there in another way.
    #[error("the volume is staged at `{staging}` already, as {is}, and was asked for as {asked}")]
    Differs {
        /// The path.
        staging: MountPath,
        /// What it is.
        is: String,
        /// What was asked for.
        asked: String,
    },
    /// A dead mount at the staging path does not go.
    #[error("cannot take away the mount of a disk that is gone")]
    Dead(#[source] UnmountError),
    /// What is on the disk is not known.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// What is on the disk is not what was asked for, and is not formatted over.
    #[error("cannot use disk `{disk}`")]
    Refused {
        /// The disk.
        disk: String,
        /// Why.
        source: Box<Refusal>,
    },
    /// Several nodes are to read the disk, and this one could write to it.
    #[error(
        "disk `{disk}` is attached writable and several nodes are to read it: mounting alone may write; detach the volume and attach it again"
    )]
    Writable {
        /// The disk.
        disk: String,
    },
    /// Opening an encrypted volume.
    #[error(transparent)]
    Unlock(#[from] UnlockError),
    /// Closing what is left of an encrypted volume.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file system is damaged, or it could not be checked.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// The volume is staged and does not work any more.
    #[error(
        "the volume is staged at `{staging}`, and {trouble}; delete the pods that have it: it is then unstaged, and checked when it is staged again"
    )]
    Trouble {
        /// The path.
        staging: MountPath,
        /// What is wrong.
        trouble: Trouble,
    },
    /// Whether a staged volume works is not known.
    #[error(transparent)]
    Health(#[from] HealthError),
    /// Making the file system.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Mounting.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// Why what is on a disk is neither mounted nor formatted over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another file system.
    #[error(
        "it holds the file system `{found}` and `{wanted}` was asked for; set the file system type of the PV to what is there, or copy the data and delete the volume"
    )]
    OtherFilesystem {
        /// What is there.
        found: String,
        /// What was asked for.
        wanted: FsKind,
    },
    /// A file system that was never finished.
    #[error("an mkfs of this volume ({0}) was cut off; if the volume is new, delete it and create it again")]
    Unfinished(FsKind),
    /// Encryption. No word of wiping: it may well be the volume's own data.
    #[error(
        "it holds an encrypted volume (`crypto_LUKS`), and no passphrase came along: set `csi.storage.k8s.io/node-stage-secret-name` and `-namespace` for the volume, and the secret's key `encryption-passphrase`"
    )]
    Encrypted,
    /// Data in plain text where encrypted data was asked for.
    #[error(
        "it holds `{0}` in plain text, and an encrypted volume was asked for; it is neither used nor encrypted: copy the data to a new volume"
    )]
    Plain(String),
    /// Nothing that is known, and the volume is to be encrypted.
    #[error(
        "it holds nothing that is known and is to be encrypted, and it is not known that it was allocated blank: it is left as it is; a volume on a storage that hands out zeroed blocks can be encrypted"
    )]
    NotEncrypted,
    /// Something else.
    #[error(
        "it holds {0}, which this driver did not make; it is not formatted over: if the data is not needed, wipe it by hand with `wipefs`"
    )]
    Foreign(String),
    /// Nothing that is known, on a storage that hands out blocks as they were.
    #[error(
        "it holds no file system, and its storage hands out blocks that were never wiped, so that data can't be told from rubbish; if the volume is new, make the file system once by hand (`mkfs.{0}` on this disk)"
    )]
    Unwiped(FsKind),
    /// Nothing that is known, and nobody says that the volume was allocated blank.
    #[error(
        "it holds no file system, and the attachment does not say that the volume was allocated blank; detach it and attach it again, or if the volume is new make the file system once by hand (`mkfs.{0}` on this disk)"
    )]
    Unknown(FsKind),
    /// Nothing that is known, and nothing may be written.
    #[error("it holds no file system, and it is used read-only, so none is made")]
    Readonly,
}

/// What to do with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Mount what is there.
    Mount(FsKind),
    /// Prove that there is nothing, and make a file system.
    Format(FsKind),
}

/// Decides from what was found. Only a volume that was allocated blank may be formatted; the proof is still to come.
fn plan(contents: Contents, wanted: Option<FsKind>, found: &Found, readonly: bool) -> Result<Plan, Refusal> {
    let kind = wanted.unwrap_or(FsKind::Ext4);
    match (found, contents) {
        (Found::Filesystem { name, .. }, _) => match name.parse() {
            Ok(there) if wanted.is_none_or(|wanted| wanted == there) => Ok(Plan::Mount(there)),
            _ => Err(Refusal::OtherFilesystem { found: name.clone(), wanted: kind }),
        },
        (Found::Unfinished(there), _) => Err(Refusal::Unfinished(*there)),
        (Found::Luks { .. }, _) => Err(Refusal::Encrypted),
        (Found::Other(what), _) => Err(Refusal::Foreign(what.clone())),
        (Found::NoSignature, _) if readonly => Err(Refusal::Readonly),
        (Found::NoSignature, Contents::Blank) => Ok(Plan::Format(kind)),
        (Found::NoSignature, Contents::Unwiped) => Err(Refusal::Unwiped(kind)),
        (Found::NoSignature, Contents::Unknown) => Err(Refusal::Unknown(kind)),
    }
}

impl Node {
    /// Stages a volume. A volume that is staged so already stays as it is.
    pub async fn stage(&self, command: &Stage) -> Result<(), StageError> {
        let disk = self.find(&command.volume, &command.disk).await?;
        if command.sharing == Sharing::ManyReaders && !disk.disk().readonly {
            // A journal is replayed even by a mount that is read-only.
            return Err(StageError::Writable { disk: disk.disk().name.clone() });
        }
        let carrier = self.carrier(&command.volume, disk.disk()).await?;
        let command = &Stage { staging: self.resolve(&command.staging).await?, ..command.clone() };
        match &command.access {
            Access::Block => self.stage_block(&disk, &carrier, command).await,
            Access::Filesystem { kind, flags } => {
                self.stage_filesystem(&disk, &carrier, command, (*kind, flags)).await
            }
        }
    }

    /// A raw block volume is bound from its device for each pod: here it is only found, and decrypted where it is to be.
    async fn stage_block(
        &self,
        disk: &OpenDisk,
        carrier: &Carrier,
        command: &Stage,
    ) -> Result<(), StageError> {
        let locked = command.key.is_none() && matches!(carrier, Carrier::Disk(_));
        if locked && self.is_encrypted(disk).await {
            let source = Box::new(Refusal::Encrypted);
            return Err(StageError::Refused { disk: disk.disk().name.clone(), source });
        }
        let readonly = disk.disk().readonly || command.sharing.is_read_only();
        self.unlocked(disk, carrier, command, readonly).await.map(drop)
    }

    async fn stage_filesystem(
        &self,
        disk: &OpenDisk,
        carrier: &Carrier,
        command: &Stage,
        (kind, flags): (Option<FsKind>, &MountFlags),
    ) -> Result<(), StageError> {
        // Mounted writable, a disk that takes no writes is refused by the kernel.
        let readonly = flags.readonly() || disk.disk().readonly || command.sharing.is_read_only();
        let mounts = self.host.mounts().await?;
        if let Some(mount) = mounted_at(&mounts, command.staging.as_path()) {
            if mount.number == carrier.device().number && self.is_in_use(carrier).await? {
                staged(mount, command, kind, readonly)?;
                return match self.trouble(&mounts, mount, command.staging.as_path()).await? {
                    None => Ok(()),
                    Some(trouble) => Err(StageError::Trouble { staging: command.staging.clone(), trouble }),
                };
            }
            self.take_away_dead(mount, command, disk.disk()).await?;
        }
        let Opened { device, fresh } = self.unlocked(disk, carrier, command, readonly).await?;
        let mounted = self.mount_carrier(disk, &device, command, (kind, flags), readonly).await;
        if let (Err(_), Some(mapping)) = (&mounted, fresh) {
            drop(device);
            self.lock_again(&mapping, &command.volume).await;
        }
        mounted?;
        tracing::info!(volume = command.volume, disk = disk.disk().name, "volume staged");
        Ok(())
    }

    /// Mounts what carries the data: the disk itself, or the mapping over it.
    async fn mount_carrier(
        &self,
        disk: &OpenDisk,
        device: &OpenDisk,
        command: &Stage,
        (kind, flags): (Option<FsKind>, &MountFlags),
        readonly: bool,
    ) -> Result<(), StageError> {
        let found = self.host.probe(device).await?;
        let plan = plan(command.disk.contents, kind, &found, readonly);
        let refused =
            |source| StageError::Refused { disk: device.disk().name.clone(), source: Box::new(source) };
        let kind = match plan.map_err(refused)? {
            Plan::Mount(kind) => {
                // Read-only, it is mounted as it is: nothing is repaired on a disk that may not be written to. In use, it is
                // mounted somewhere already, and e2fsck must not touch it.
                if !readonly && !self.host.in_use(device).await? {
                    self.host.check(device, kind).await?;
                }
                kind
            }
            Plan::Format(kind) => {
                let format = Format { kind, options: command.options.clone() };
                if device.disk().number == disk.disk().number {
                    self.host.format_blank(disk, &format).await?;
                } else {
                    self.host.format_inside(disk, device, &format).await?;
                }
                kind
            }
        };
        self.host.make_place(command.staging.as_path(), PlaceKind::Directory).await?;
        let options = MountOptions { kind, readonly, flags: mount_flags(kind, flags, &command.options) };
        self.host.mount(device, command.staging.as_path(), &options).await?;
        if !readonly {
            self.grow_staged(device, command).await;
        }
        Ok(())
    }

    /// A volume that grew while it was nowhere mounted. It is of use without the space, and an expansion, which the kubelet asks for
    /// after staging, answers for it.
    async fn grow_staged(&self, disk: &OpenDisk, command: &Stage) {
        if let Err(error) = self.host.grow(disk, command.staging.as_path()).await {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(volume = command.volume, error, "the file system was not grown to its disk");
        }
    }

    /// Takes away the mount of a disk that was pulled while it was mounted: the volume has come back as another device. A mount
    /// of a device that is there is somebody's.
    async fn take_away_dead(&self, mount: &Mount, command: &Stage, disk: &Disk) -> Result<(), StageError> {
        // The number of a disk that went may be another's by now, even this volume's own.
        let mappings = self.host.mappings().await?;
        let disks = self.host.disks().await?;
        let over_a_disk = |over| disks.iter().any(|disk| Some(disk.number) == over);
        let of_a_mapping = mappings.iter().any(|mapping| {
            mapping.device.number == mount.number
                && is_named_for(mapping, &command.volume)
                && !over_a_disk(mapping.over)
        });
        let there = mount.number != disk.number
            && (self.host.exists(mount.number).await? || over_a_disk(Some(mount.number)));
        // A btrfs whose device node is gone has a number that no driver gave.
        let of_a_disk = !there && (mount.number.major == disk.number.major || mount.number.major == 0);
        if !(of_a_disk || of_a_mapping) || mount.fs.parse::<FsKind>().is_err() {
            return Err(StageError::Occupied {
                staging: command.staging.clone(),
                device: mount.number.to_string(),
                disk: disk.name.clone(),
            });
        }
        tracing::warn!(volume = command.volume, "a disk that is gone is still mounted at the staging path");
        self.host.unmount(command.staging.as_path()).await.map_err(StageError::Dead)
    }
}

/// Whether what is mounted is what was asked for.
fn staged(mount: &Mount, command: &Stage, kind: Option<FsKind>, readonly: bool) -> Result<(), StageError> {
    let same_kind = kind.is_none_or(|kind| kind.as_str() == mount.fs);
    if same_kind && readonly == mount.readonly {
        return Ok(());
    }
    let words = |fs: String, readonly| format!("{fs}, {}", if readonly { "read-only" } else { "writable" });
    Err(StageError::Differs {
        staging: command.staging.clone(),
        is: words(mount.fs.clone(), mount.readonly),
        asked: words(kind.map_or_else(|| mount.fs.clone(), |kind| kind.to_string()), readonly),
    })
}

/// `nouuid`: a snapshot or clone of an XFS volume has the uuid of its source, and both may be on one node.
fn mount_flags(kind: FsKind, flags: &MountFlags, options: &FilesystemOptions) -> Vec<String> {
    let mut all: Vec<String> = flags.others().cloned().collect();
    let mut add = |flag: &str| {
        if !all.iter().any(|other| other == flag) {
            all.push(flag.to_owned());
        }
    };
    if options.noatime {
        add("noatime");
    }
    if kind == FsKind::Xfs {
        add("nouuid");
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fs(name: &str) -> Found {
        Found::Filesystem { name: name.to_owned(), uuid: None }
    }

    #[test]
    fn what_is_there_is_mounted_whatever_the_contents_are_said_to_be() {
        for contents in [Contents::Blank, Contents::Unwiped, Contents::Unknown] {
            assert_eq!(plan(contents, Some(FsKind::Xfs), &fs("xfs"), false), Ok(Plan::Mount(FsKind::Xfs)));
            assert_eq!(plan(contents, None, &fs("xfs"), true), Ok(Plan::Mount(FsKind::Xfs)));
            assert!(plan(contents, Some(FsKind::Ext4), &fs("xfs"), false).is_err());
            assert!(plan(contents, None, &fs("f2fs"), false).is_err());
        }
    }

    #[test]
    fn p4_of_an_encrypted_volume_nobody_is_told_to_wipe_it() {
        for contents in [Contents::Blank, Contents::Unwiped, Contents::Unknown] {
            let refusal =
                plan(contents, None, &Found::Luks { ours: false }, false).expect_err("it is not mounted");
            assert_eq!(refusal, Refusal::Encrypted);
            assert!(!refusal.to_string().contains("wipe"), "{refusal}");
        }
    }

    proptest! {
        #[test]
        fn only_an_empty_volume_that_was_allocated_blank_may_be_formatted(
            contents in prop_oneof![Just(Contents::Blank), Just(Contents::Unwiped), Just(Contents::Unknown)],
            wanted in prop_oneof![Just(None), Just(Some(FsKind::Ext4)), Just(Some(FsKind::Btrfs))],
            found in prop_oneof![
                Just(Found::NoSignature), Just(Found::Luks { ours: true }), "[a-z0-9]{1,8}".prop_map(|name| fs(&name)), ".*".prop_map(Found::Other),
            ],
            readonly: bool,
        ) {
            if let Ok(Plan::Format(kind)) = plan(contents, wanted, &found, readonly) {
                prop_assert_eq!((contents, &found, readonly), (Contents::Blank, &Found::NoSignature, false));
                prop_assert_eq!(kind, wanted.unwrap_or(FsKind::Ext4));
            }
        }
    }

    #[test]
    fn an_xfs_on_an_ssd_is_mounted_with_both_options() {
        let flags = MountFlags::new(&["noatime".to_owned(), "ro".to_owned()]).expect("harmless");
        let options = FilesystemOptions { noatime: true, ..FilesystemOptions::default() };
        assert_eq!(mount_flags(FsKind::Xfs, &flags, &options), ["noatime", "nouuid"]);
    }
}
