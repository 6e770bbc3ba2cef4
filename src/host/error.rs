//! Why a node could not do what it was asked: one enum per intent.

use std::{io, path::PathBuf, time::Duration};

use super::{DeviceNumber, FsKind, blank::NotBlank};
use crate::types::{Bytes, Wwn};

/// A file of the node could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} `{}`", path.display())]
pub struct PathError {
    /// What was tried.
    pub what: &'static str,
    /// The path.
    pub path: PathBuf,
    /// What the kernel said.
    pub source: io::Error,
}

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("`{tool}` is not installed in {directories}")]
    Missing {
        /// The tool.
        tool: &'static str,
        /// Where it was looked for.
        directories: String,
    },
    /// It could not be run.
    #[error("cannot run `{tool}`")]
    Run {
        /// The tool.
        tool: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It ran for too long and was stopped.
    #[error("`{tool}` did not end within {after:?}")]
    TimedOut {
        /// The tool.
        tool: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// It failed.
    #[error("`{tool}` ended with {status}: {said}")]
    Failed {
        /// The tool.
        tool: &'static str,
        /// Its exit status, in words.
        status: String,
        /// What it said.
        said: String,
    },
}

/// Why the disks can't be listed.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// A file of sysfs can't be read.
    #[error("cannot list the disks of this node")]
    Read(#[from] PathError),
}

/// Why the kernel can't be made to look for a disk.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// A scan file can't be written.
    #[error("cannot scan for a disk")]
    Write(#[from] PathError),
    /// There is nothing to scan.
    #[error("this node has no SCSI host to scan; does the VM have a `virtio-scsi` controller?")]
    NoHost,
}

/// Why a disk can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its node can't be opened, or a file of sysfs can't be read.
    #[error("cannot open disk `{name}`")]
    Io {
        /// The disk.
        name: String,
        /// What failed.
        source: PathError,
    },
    /// It has no node. Right after a hot-plug it gets one in a moment.
    #[error("disk `{name}` has no node `{}`; is the host's `/dev` mounted into the container?", path.display())]
    NoNode {
        /// The disk.
        name: String,
        /// The node.
        path: PathBuf,
    },
    /// Its node is not a block device of the number sysfs names.
    #[error("`{}` is not the device {expected} that sysfs names but {found}", path.display())]
    Number {
        /// The node.
        path: PathBuf,
        /// What sysfs says.
        expected: DeviceNumber,
        /// What was opened.
        found: String,
    },
    /// The opened device has another size than sysfs says.
    #[error("disk `{name}` has {opened}, and sysfs says {listed}")]
    Size {
        /// The disk.
        name: String,
        /// Of the opened device.
        opened: Bytes,
        /// As sysfs says.
        listed: Bytes,
    },
    /// The device answers another name than it did a moment ago, or two at once.
    #[error("disk `{name}` was {} and answers {}", wwn_text(*listed), wwn_text(*answered))]
    Changed {
        /// The disk.
        name: String,
        /// When it was listed.
        listed: Option<Wwn>,
        /// After it was opened.
        answered: Option<Wwn>,
    },
    /// The kernel has given the device up: it takes no request any more, whatever comes.
    #[error(
        "disk `{name}` is in state `{state}` and the kernel uses it no more; delete the pod: the volume is then detached, and comes back where the next pod runs"
    )]
    Offline {
        /// The disk.
        name: String,
        /// The state.
        state: String,
    },
    /// The device does not take requests just now: it is being made, removed, or brought back.
    #[error("disk `{name}` is in state `{state}`, which passes")]
    NotRunning {
        /// The disk.
        name: String,
        /// The state.
        state: String,
    },
}

fn wwn_text(wwn: Option<Wwn>) -> String {
    wwn.map_or_else(|| "without a name".to_owned(), |wwn| wwn.to_string())
}

/// Why it is not known what is on a disk.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// blkid failed.
    #[error("cannot find out what is on disk `{name}`")]
    Tool {
        /// The disk.
        name: String,
        /// How.
        source: ToolError,
    },
    /// The superblock can't be read or means nothing.
    #[error("cannot read the superblock of the file system on disk `{name}`")]
    Superblock {
        /// The disk.
        name: String,
        /// How.
        source: io::Error,
    },
}

/// Why a disk was not formatted.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The kernel may be unable to mount what mkfs would make.
    #[error(
        "disk `{name}` is not formatted: the block size {block_size} is above the page size of this node, {page_size}, and Linux before 6.12 \
         could not mount such an xfs; make a new volume of a StorageClass with a `blockSize` of {page_size} or less"
    )]
    BlockSize {
        /// The disk.
        name: String,
        /// What was asked for, in bytes.
        block_size: u32,
        /// The kernel's page size, in bytes.
        page_size: usize,
    },
    /// What is on it is not known.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// What the kernel remembers of it can't be dropped, so that what is on it can't be read.
    #[error("disk `{name}` is not formatted: cannot flush the kernel's buffers of it")]
    Flush {
        /// The disk.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It holds something.
    #[error("disk `{name}` is not formatted: it holds {found}")]
    Holds {
        /// The disk.
        name: String,
        /// What was found.
        found: String,
    },
    /// It is not proven to be blank.
    #[error(
        "disk `{name}` is not formatted: it is not proven to be blank; if the volume is new and a power loss cut off its mkfs, delete it and create it again"
    )]
    NotBlank {
        /// The disk.
        name: String,
        /// What was read.
        source: NotBlank,
    },
    /// mkfs failed.
    #[error("cannot make {kind} on disk `{name}`")]
    Mkfs {
        /// The disk.
        name: String,
        /// The file system.
        kind: FsKind,
        /// How.
        source: ToolError,
    },
    /// cryptsetup failed.
    #[error("cannot encrypt disk `{name}`")]
    Encrypt {
        /// The disk.
        name: String,
        /// How.
        source: ToolError,
    },
    /// cryptsetup said that all went well, and the header is not there.
    #[error("encrypting disk `{name}` ended well, and the disk holds {found}")]
    NotEncrypted {
        /// The disk.
        name: String,
        /// What is there instead.
        found: String,
    },
    /// mkfs said that all went well, and the file system is not there.
    #[error("mkfs of {kind} on disk `{name}` ended well, and the disk holds {found}")]
    Vanished {
        /// The disk.
        name: String,
        /// The file system.
        kind: FsKind,
        /// What is there instead.
        found: String,
    },
}

/// Why a file system is not mounted before somebody has looked at it.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is damaged beyond what is repaired without asking.
    #[error(
        "the ext4 on disk `{name}` is damaged and is not mounted: look at it on this node with `e2fsck -n`, keep a copy of the disk, and repair it with `e2fsck`"
    )]
    Damaged {
        /// The disk.
        name: String,
        /// What e2fsck said.
        source: ToolError,
    },
    /// It could not be checked.
    #[error("cannot check the file system on disk `{name}`")]
    Tool {
        /// The disk.
        name: String,
        /// How.
        source: ToolError,
    },
}

/// Why a file system was not grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The superblock can't be read or means nothing.
    #[error("cannot read the superblock of the file system on disk `{name}`")]
    Superblock {
        /// The disk.
        name: String,
        /// How.
        source: io::Error,
    },
    /// It is none of the file systems that this driver makes.
    #[error("the file system on disk `{name}` is neither ext4 nor xfs nor btrfs; grow it by hand")]
    Foreign {
        /// The disk.
        name: String,
    },
    /// The kernel does not let this process grow a mounted ext4.
    #[error(
        "the kernel wants CAP_SYS_RESOURCE for growing the mounted ext4 on disk `{name}`; run the node plugin privileged, or add the \
         capability to its container: until then the file system keeps its size"
    )]
    Capability {
        /// The disk.
        name: String,
        /// What resize2fs said.
        source: ToolError,
    },
    /// The tool failed.
    #[error("cannot grow the file system on disk `{name}`")]
    Tool {
        /// The disk.
        name: String,
        /// How.
        source: ToolError,
    },
}

/// Why something was not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot mount {what} at `{}`", target.display())]
    Kernel {
        /// What was to be mounted.
        what: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file system is damaged (EUCLEAN).
    #[error(
        "cannot mount {what} at `{}`: it is damaged; look at it on this node without changing it (`xfs_repair -n`, `btrfs check`, `e2fsck -n`), and keep a copy of the disk before it is repaired", target.display()
    )]
    Damaged {
        /// What was to be mounted.
        what: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A log has to be replayed first, and the disk takes no writes (EROFS). Never mounted without its log (`norecovery`, `noload`): what a
    /// pod would see then is not what was written.
    #[error(
        "cannot mount {what} at `{}`: it was not unmounted before, its log has to be replayed, and the disk takes no writes; let one pod use the volume writable (ReadWriteOnce) and end", target.display()
    )]
    Unreplayed {
        /// What was to be mounted.
        what: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else than the disk is at the path after mounting; it was taken away again.
    #[error("mounting {what} at `{}` gave another device", target.display())]
    Wrong {
        /// What was to be mounted.
        what: String,
        /// Where.
        target: PathBuf,
    },
}

/// Why something was not unmounted.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// It is in use.
    #[error("`{}` is still in use after {after:?}", target.display())]
    Busy {
        /// Where.
        target: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
    /// The kernel refused.
    #[error("cannot unmount `{}`", target.display())]
    Kernel {
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a disk was not taken out of the kernel.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Another device is made of it.
    #[error("disk `{name}` is held by {holders}; close that first")]
    Held {
        /// The disk.
        name: String,
        /// The names of the devices.
        holders: String,
    },
    /// The kernel has not given it up, so that it has to be flushed.
    #[error("disk `{name}` is not offline any more")]
    NotOffline {
        /// The disk.
        name: String,
    },
    /// Something has it mounted or claimed, maybe in another mount namespace.
    #[error("disk `{name}` is still mounted or claimed after {after:?}{by}")]
    Busy {
        /// The disk.
        name: String,
        /// How long it was waited for.
        after: Duration,
        /// Who has it mounted, where that can be seen; begins with a colon.
        by: String,
    },
    /// What was written could not be flushed.
    #[error("cannot flush disk `{name}`")]
    Flush {
        /// The disk.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of sysfs can't be read or written.
    #[error("cannot take disk `{name}` out of the kernel")]
    Delete {
        /// The disk.
        name: String,
        /// What failed.
        source: PathError,
    },
    /// The disks can't be listed.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// It is still there.
    #[error("disk `{name}` is still in the kernel {after:?} after its removal was asked for")]
    Stays {
        /// The disk.
        name: String,
        /// How long it was waited for.
        after: Duration,
    },
}

/// Why space in use is not known.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// statvfs failed.
    #[error("cannot measure the file system")]
    Read(#[from] PathError),
}

/// Why the identity of the VM is not known.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file can't be read.
    #[error("cannot read the identity of this VM")]
    Read(#[from] PathError),
    /// The file holds no uuid.
    #[error("the identity of this VM is `{0}`, which is not a uuid")]
    Uuid(String),
}
