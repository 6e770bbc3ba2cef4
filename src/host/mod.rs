//! What a Linux node can do for a volume, as intents.
//!
//! [`Host`] is the seam: the real node is [`linux::LinuxHost`], a second implementation can keep its disks in memory. Every
//! method is async: an implementation puts what blocks on threads of its own. What only reads has a deadline; what changes
//! something is awaited to its end, mkfs above all, and ends when the kernel lets it. Read [`Host`] first, then [`blank`],
//! which decides what may be formatted.

pub mod blank;
pub mod error;
pub mod guard;
pub mod linux;
pub mod luks;
pub mod superblock;

use std::{
    any::Any,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use futures_util::future::BoxFuture;

use crate::types::{Bytes, ParseError, ScsiSlot, VmId, Wwn, params::FilesystemOptions};
use error::{
    CheckError, DisksError, FormatError, GrowError, IdentityError, MountError, OpenError, PathError,
    ProbeError, ReleaseError, ScanError, UnmountError, UsageError,
};

/// What a method of [`Host`] returns.
pub type Answer<'a, T, E> = BoxFuture<'a, Result<T, E>>;

/// A Linux node that volumes are attached to.
pub trait Host: luks::Luks {
    /// The SCSI disks of the node, in the order of their names.
    fn disks(&self) -> Answer<'_, Vec<Disk>, DisksError>;

    /// Whether the kernel has a block device of this number, of whatever kind.
    fn exists(&self, number: DeviceNumber) -> Answer<'_, bool, DisksError>;

    /// Makes the kernel look for a disk at exactly this LUN of every SCSI host that could have it.
    fn scan(&self, lun: ScsiSlot) -> Answer<'_, (), ScanError>;

    /// Makes the kernel look for controllers whose hot-plug event it never got.
    fn scan_bus(&self) -> Answer<'_, (), ScanError>;

    /// Opens the disk once and proves that what was opened is the disk that was listed: its number, its size, its answer
    /// to who it is. All that follows works on what was opened, which can't become another disk while it is held.
    fn open<'a>(&'a self, disk: &'a Disk) -> Answer<'a, OpenDisk, OpenError>;

    /// Whether something in the kernel has the disk for itself: a mount in any namespace, a mapping. A mount whose number is the disk's
    /// while the disk is not in use is a dead one, of a disk that had the number before.
    fn in_use<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, bool, OpenError>;

    /// Makes the kernel ask the disk for its size again; returns the disk as it is then.
    fn refresh<'a>(&'a self, disk: &'a Disk) -> Answer<'a, Disk, OpenError>;

    /// What is on the disk.
    fn probe<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, Found, ProbeError>;

    /// Makes a file system on the disk after proving that the disk holds nothing. There is no way to format without the
    /// proof, and nothing is forced. Once begun it runs to its end.
    fn format_blank<'a>(&'a self, disk: &'a OpenDisk, format: &'a Format) -> Answer<'a, (), FormatError>;

    /// Repairs what can be repaired of an unmounted file system that needs it before it is mounted: ext4. The others replay their logs
    /// when they are mounted. Refuses one that is damaged beyond that. Once begun it runs to its end.
    fn check<'a>(&'a self, disk: &'a OpenDisk, kind: FsKind) -> Answer<'a, (), CheckError>;

    /// Grows the file system on the disk, mounted at the path, to the disk's size. Only ever while it is mounted: the kernel journals
    /// each step then, and an ext4 whose growing offline was cut off can't be mounted any more. Does nothing where nothing is to
    /// be gained.
    fn grow<'a>(&'a self, disk: &'a OpenDisk, mounted_at: &'a Path) -> Answer<'a, (), GrowError>;

    /// Every mount of the node's namespace, in the order of mounting.
    fn mounts(&self) -> Answer<'_, Vec<Mount>, PathError>;

    /// Mounts the file system on the disk at the directory.
    fn mount<'a>(
        &'a self,
        disk: &'a OpenDisk,
        target: &'a Path,
        options: &'a MountOptions,
    ) -> Answer<'a, (), MountError>;

    /// Makes the tree mounted at the directory `source` appear at the directory `target` too; read-only there is read-only for
    /// everyone who sees that mount. Refused where the tree is not on the device: what lies under a mount that went meanwhile
    /// is the node's own disk.
    fn bind<'a>(
        &'a self,
        source: &'a Path,
        device: DeviceNumber,
        target: &'a Path,
        readonly: bool,
    ) -> Answer<'a, (), MountError>;

    /// Makes the disk itself appear at the file `target`.
    fn bind_disk<'a>(&'a self, disk: &'a OpenDisk, target: &'a Path) -> Answer<'a, (), MountError>;

    /// Writes out what the file system mounted at the path holds back.
    fn sync<'a>(&'a self, mounted_at: &'a Path) -> Answer<'a, (), PathError>;

    /// Takes the topmost mount at the path away, never lazily. Succeeds where nothing is mounted.
    fn unmount<'a>(&'a self, target: &'a Path) -> Answer<'a, (), UnmountError>;

    /// Flushes the disk and takes it out of the kernel, if nothing in the kernel holds it any more.
    fn release(&self, disk: OpenDisk) -> Answer<'_, (), ReleaseError>;

    /// Takes a disk that the kernel has given up (see [`OpenError::Offline`]) out of it, if nothing is made of it and it is mounted
    /// nowhere. Nothing is flushed: it takes nothing any more.
    fn discard<'a>(&'a self, disk: &'a Disk) -> Answer<'a, (), ReleaseError>;

    /// The path as the mount table spells it: without links in the directories above it. What is at the path itself is not
    /// asked, since it may be dead.
    fn resolve<'a>(&'a self, path: &'a Path) -> Answer<'a, PathBuf, PathError>;

    /// What is at a path.
    fn look<'a>(&'a self, path: &'a Path) -> Answer<'a, Place, PathError>;

    /// Makes an empty directory or file for a mount, and the directories above it.
    fn make_place<'a>(&'a self, path: &'a Path, kind: PlaceKind) -> Answer<'a, (), PathError>;

    /// Removes an empty directory or file that a mount was on. Succeeds where there is none.
    fn remove_place<'a>(&'a self, path: &'a Path) -> Answer<'a, (), PathError>;

    /// Whether the file system mounted at the path still answers: one that has shut itself down gives errors for everything.
    fn responds<'a>(&'a self, path: &'a Path) -> Answer<'a, bool, PathError>;

    /// Space and inodes of the file system mounted at the path.
    fn usage<'a>(&'a self, path: &'a Path) -> Answer<'a, Usage, UsageError>;

    /// What the machine says of itself.
    fn identity(&self) -> Answer<'_, Identity, IdentityError>;
}

/// What a machine says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The SMBIOS uuid, if it has one.
    pub uuid: Option<uuid::Uuid>,
    /// The VMID, where somebody wrote it into the SMBIOS serial. A copy of the VM has the same: it is only a hint.
    pub vmid: Option<VmId>,
    /// Why it can't be a VM of Proxmox, in words; `None` where it can.
    pub no_vm: Option<String>,
}

/// The number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// The driver's part.
    pub major: u32,
    /// The device's part.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseError::new("device number", text, "it must be `major:minor`");
        let (major, minor) = text.split_once(':').ok_or_else(err)?;
        Ok(Self { major: major.parse().map_err(|_| err())?, minor: minor.parse().map_err(|_| err())? })
    }
}

/// A SCSI disk as the kernel lists it. Names and numbers are reused at once after a detach: never keep one across calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The kernel's name: `sdb`.
    pub name: String,
    /// The number of its node.
    pub number: DeviceNumber,
    /// What the device answers when it is asked who it is, where it answers with an NAA.
    pub wwn: Option<Wwn>,
    /// The LUN, which is the slot's index; a device that is made of another has none.
    pub lun: Option<u64>,
    /// The size as the kernel knows it.
    pub size: Bytes,
    /// Whether the device takes no writes.
    pub readonly: bool,
    /// Whether it is on a controller such as the slots of a VM are on.
    pub virtio: bool,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lun {
            Some(lun) => write!(f, "{} ({}, LUN {lun}, {})", self.name, self.number, self.size),
            None => write!(f, "{} ({}, {})", self.name, self.number, self.size),
        }
    }
}

/// A disk that was opened and proven to be the one that was listed. Closed when the last clone is dropped.
#[derive(Clone)]
pub struct OpenDisk {
    disk: Disk,
    pin: Arc<dyn Any + Send + Sync>,
}

impl OpenDisk {
    /// An opened disk; `pin` is what the implementation of [`Host`] keeps open, and gets back from [`OpenDisk::pin`].
    pub fn new(disk: Disk, pin: Arc<dyn Any + Send + Sync>) -> Self {
        Self { disk, pin }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What the implementation keeps open, if it is of this type.
    pub fn pin<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.pin).downcast().ok()
    }
}

impl fmt::Debug for OpenDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenDisk").field(&self.disk).finish()
    }
}

/// The file systems that volumes are formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsKind {
    /// The default.
    Ext4,
    /// XFS.
    Xfs,
    /// Btrfs, on one disk.
    Btrfs,
}

impl FsKind {
    /// The name, as mount and blkid say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }
}

impl fmt::Display for FsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FsKind {
    type Err = ParseError;

    /// Parses a file system's name; nothing means the default, ext4.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" | "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            "btrfs" => Ok(Self::Btrfs),
            _ => Err(ParseError::new("file system", text, "it must be ext4, xfs or btrfs")),
        }
    }
}

/// What is on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No signature of anything. That is no proof of blankness: see [`blank`].
    NoSignature,
    /// One file system and nothing else.
    Filesystem {
        /// Its name as libblkid says it.
        name: String,
        /// Its uuid, where it has one.
        uuid: Option<String>,
    },
    /// A file system whose mkfs was cut off.
    Unfinished(FsKind),
    /// A LUKS header: an encrypted volume.
    Luks {
        /// Whether the header says that this driver made it.
        ours: bool,
    },
    /// Something else: a partition table, a volume manager; or signatures that contradict each other.
    Other(String),
}

/// The file system to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    /// Which.
    pub kind: FsKind,
    /// Its block and inode size.
    pub options: FilesystemOptions,
}

/// How a file system is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// The file system.
    pub kind: FsKind,
    /// Whether nothing may be written.
    pub readonly: bool,
    /// Further options, each one word; already checked.
    pub flags: Vec<String>,
}

/// What the mount table says of a file system's condition. Not all of them say it there: see [`Host::responds`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is wrong that the table tells.
    Writable,
    /// The file system takes no writes: by its mount options or, where a mount of it is writable, after an error.
    Readonly,
    /// The file system takes nothing any more.
    ShutDown,
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount's own number, which another may get once it is gone.
    pub id: u64,
    /// The number of the mount that it lies on.
    pub parent: u64,
    /// The group of mounts that events are propagated to and from, where it is shared.
    pub peers: Option<u64>,
    /// The device of the mounted file system. A btrfs has a number of its own in the table, which no device has: the one here is then
    /// that of the node it was mounted from, as the node is now.
    pub number: DeviceNumber,
    /// What of the file system is mounted: `/` for all of it.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Whether this mount takes no writes.
    pub readonly: bool,
    /// The file system's name.
    pub fs: String,
    /// The condition of the file system, whatever this mount of it may do.
    pub condition: Condition,
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing.
    Absent,
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A block device.
    BlockDevice(DeviceNumber),
    /// Something else, or something that answers with an error: the root of a dead disk's file system.
    Other,
}

/// What a mount needs underneath.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlaceKind {
    /// A directory, for a file system.
    Directory,
    /// A file, for a disk.
    File,
}

/// Space and inodes of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The size, in bytes.
    pub total_bytes: u64,
    /// In use, in bytes.
    pub used_bytes: u64,
    /// Free for ordinary users, in bytes.
    pub available_bytes: u64,
    /// All inodes.
    pub total_inodes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
    /// Free inodes.
    pub free_inodes: u64,
}
