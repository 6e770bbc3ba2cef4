//! What is on a disk, making file systems and growing them: the tools, and what their answers mean.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    device::Device,
    exec::{Output, THE_DISK, Tool, Tools},
    xfs::XfsFeatures,
};
use crate::{
    host::{
        Format, Found, FsKind,
        blank::{NotBlank, ReadAt as _},
        error::{FormatError, GrowError, ProbeError},
        guard::{self, Signs},
        luks,
        superblock::Superblock,
    },
    types::Bytes,
};

/// A probe reads a few hundred KiB.
const PROBE_DEADLINE: Duration = Duration::from_mins(1);
/// The proof of blankness reads up to some 40,000 places.
const PROOF_DEADLINE: Duration = Duration::from_mins(10);
/// Growing a mounted file system is quick; the tool may be stopped, the kernel does the work in steps that are whole.
const GROW_DEADLINE: Duration = Duration::from_mins(10);

/// What blkid finds on the device, low level (blkid(8), `-p`): superblocks and partition tables.
pub(super) async fn probe(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<Found, ProbeError> {
    let fail = |source| ProbeError::Tool { name: name.to_owned(), source };
    let tool = Tool::new("blkid", ["-p", "-o", "export", THE_DISK]);
    let output = tools.run(tool.on(Arc::clone(device)).within(PROBE_DEADLINE)).await.map_err(fail)?;
    match output.code {
        Some(0) => match found(&output.stdout) {
            // blkid takes an XFS for whole whose mkfs was cut off, and no mount of it ever succeeds.
            Found::Filesystem { name: fs, .. } if fs == "xfs" && unfinished(tools, name, device).await? => {
                Ok(Found::Unfinished(FsKind::Xfs))
            }
            found => Ok(found),
        },
        // 2 is also what it says when it can't open the device, but then it says so.
        Some(2) if output.stderr.trim().is_empty() && output.stdout.trim().is_empty() => {
            Ok(Found::NoSignature)
        }
        // 8: signatures of several things. An error as well: somebody has to look.
        _ => Err(fail(output.failure())),
    }
}

async fn unfinished(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<bool, ProbeError> {
    let read = superblock(tools, device).await;
    let superblock = read.map_err(|source| ProbeError::Superblock { name: name.to_owned(), source })?;
    Ok(superblock.is_some_and(|superblock| superblock.unfinished))
}

async fn superblock(tools: &Tools, device: &Arc<Device>) -> std::io::Result<Option<Superblock>> {
    let reader = Arc::clone(device);
    let read = move || Superblock::read(&*reader);
    tools.calls.blocking("read the superblock of", device.node(), PROBE_DEADLINE, read).await?
}

/// `KEY=value` lines.
fn found(output: &str) -> Found {
    let value = |key: &str| {
        output.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    };
    let signs = Signs {
        kind: value("TYPE"),
        usage: value("USAGE"),
        table: value("PTTYPE"),
        uuid: value("UUID"),
        subsystem: value("SUBSYSTEM"),
    };
    signs.found()
}

/// Drops what the kernel remembers of the device: a proof has to read the disk.
async fn forget(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<(), FormatError> {
    let flushed = Arc::clone(device);
    let work = move || flushed.flush();
    let flushed = tools.calls.blocking("flush", device.node(), PROBE_DEADLINE, work).await;
    flushed.flatten().map_err(|source| FormatError::Flush { name: name.to_owned(), source })
}

async fn no_signature(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<(), FormatError> {
    guard::unsigned(name, &probe(tools, name, device).await?)
}

fn unread(name: &str, source: std::io::Error) -> FormatError {
    let source = NotBlank::Unreadable { offset: 0, length: 0, source };
    FormatError::NotBlank { name: name.to_owned(), source }
}

/// Proves that the device holds nothing.
pub(super) async fn prove_blank(tools: &Tools, name: &str, device: &Arc<Device>) -> Result<(), FormatError> {
    forget(tools, name, device).await?;
    no_signature(tools, name, device).await?;
    let reader = Arc::clone(device);
    let prove = move || crate::host::blank::prove(&*reader);
    let proof = tools.calls.blocking("read", device.node(), PROOF_DEADLINE, prove).await;
    let proof = proof.map_err(|source| unread(name, source))?;
    guard::proven(name, proof)
}

/// Makes file systems.
pub(super) struct Formats<'a> {
    pub(super) tools: &'a Tools,
    pub(super) xfs: &'a XfsFeatures,
}

impl Formats<'_> {
    /// Makes the file system, after the proof.
    pub(super) async fn format_blank(
        &self,
        name: &str,
        device: &Arc<Device>,
        format: &Format,
    ) -> Result<(), FormatError> {
        guard::mountable(name, format, rustix::param::page_size())?;
        let features = self.features(format.kind).await;
        prove_blank(self.tools, name, device).await?;
        self.mkfs(name, device, format, features).await
    }

    /// Makes the file system in a mapping, after the proof that nothing was written through it yet.
    pub(super) async fn format_inside(
        &self,
        (under, inside): (&str, &str),
        disk: &Arc<Device>,
        mapping: &Arc<Device>,
        format: &Format,
    ) -> Result<(), FormatError> {
        guard::mountable(inside, format, rustix::param::page_size())?;
        let features = self.features(format.kind).await;
        forget(self.tools, inside, mapping).await?;
        forget(self.tools, under, disk).await?;
        no_signature(self.tools, inside, mapping).await?;
        let (reader, name) = (Arc::clone(disk), under.to_owned());
        let prove = move || luks::prove_untouched(&*reader, &name);
        let proof = self.tools.calls.blocking("read", disk.node(), PROOF_DEADLINE, prove).await;
        proof.map_err(|source| unread(under, source))??;
        self.mkfs(inside, mapping, format, features).await
    }

    /// What mkfs must leave out so that this kernel can mount what it makes.
    async fn features(&self, kind: FsKind) -> &[&'static str] {
        match kind {
            FsKind::Xfs => self.xfs.to_leave_out(self.tools).await,
            FsKind::Ext4 | FsKind::Btrfs => &[],
        }
    }

    async fn mkfs(
        &self,
        name: &str,
        device: &Arc<Device>,
        format: &Format,
        features: &[&'static str],
    ) -> Result<(), FormatError> {
        let kind = format.kind;
        let args = arguments(format, features);
        let mkfs = match kind {
            FsKind::Ext4 => Tool::new("mkfs.ext4", args),
            FsKind::Xfs => Tool::new("mkfs.xfs", args),
            FsKind::Btrfs => Tool::new("mkfs.btrfs", args),
        };
        tracing::info!(disk = name, fs = kind.as_str(), "formatting a blank disk");
        // No deadline: a disk with half a file system would never be formatted again.
        let made = self.tools.run(mkfs.on(Arc::clone(device))).await.and_then(Output::success);
        made.map_err(|source| FormatError::Mkfs { name: name.to_owned(), kind, source })?;

        guard::made(name, kind, &probe(self.tools, name, device).await?)
    }
}

/// Nothing here forces anything (`-f`, `-F`). mkfs.xfs and mkfs.btrfs then refuse a disk with a signature by themselves; mkfs.ext4
/// without a terminal does not, so the proof stands alone there. Blocks are not discarded: a blank volume has none to give back.
fn arguments(format: &Format, features: &[&'static str]) -> Vec<String> {
    let mut args: Vec<String> = match format.kind {
        FsKind::Ext4 => ["-q", "-m0", "-E", "nodiscard"].map(str::to_owned).into(),
        FsKind::Xfs | FsKind::Btrfs => ["-q", "-K"].map(str::to_owned).into(),
    };
    let options = &format.options;
    let mut add = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
    match format.kind {
        FsKind::Ext4 => {
            options.block_size.into_iter().for_each(|size| add("-b", size.to_string()));
            options.inode_size.into_iter().for_each(|size| add("-I", size.to_string()));
        }
        FsKind::Xfs => {
            options.block_size.into_iter().for_each(|size| add("-b", format!("size={size}")));
            options.inode_size.into_iter().for_each(|size| add("-i", format!("size={size}")));
        }
        // Its sectors have the size of a page, and its inodes no size of their own.
        FsKind::Btrfs => {}
    }
    args.extend(features.iter().map(|feature| (*feature).to_owned()));
    args.push(THE_DISK.to_owned());
    args
}

/// Grows what is on the device and mounted at the path to the device's size.
pub(super) async fn grow(
    tools: &Tools,
    name: &str,
    device: &Arc<Device>,
    mounted_at: &Path,
) -> Result<(), GrowError> {
    let superblock = superblock(tools, device).await;
    let superblock = superblock.map_err(|source| GrowError::Superblock { name: name.to_owned(), source })?;
    let device_size = Bytes::new(device.size());
    let fail = |source| GrowError::Tool { name: name.to_owned(), source };
    let path = || mounted_at.to_string_lossy().into_owned();
    let tool = match superblock {
        // What is mounted may have grown since its superblock was last written; XFS tells nobody. The tool does nothing then.
        Some(Superblock { kind: FsKind::Xfs, .. }) => Tool::new("xfs_growfs", ["-d".to_owned(), path()]),
        // Like XFS: the superblock is written with the next transaction.
        Some(Superblock { kind: FsKind::Btrfs, .. }) => {
            let words = ["filesystem", "resize", "max"].map(str::to_owned);
            Tool::new("btrfs", words.into_iter().chain([path()]))
        }
        // Of ext4 what is read is what the kernel has: both go through the device's page cache.
        Some(Superblock { kind: FsKind::Ext4, size, .. }) if size < device_size => {
            Tool::new("resize2fs", [THE_DISK]).on(Arc::clone(device))
        }
        Some(Superblock { kind: FsKind::Ext4, .. }) => return Ok(()),
        None => return Err(GrowError::Foreign { name: name.to_owned() }),
    };
    let output = tools.run(tool.within(GROW_DEADLINE)).await.map_err(fail)?;
    let denied = output.stderr.contains("Permission denied to resize");
    output.success().map(drop).map_err(|source| {
        if denied { GrowError::Capability { name: name.to_owned(), source } } else { fail(source) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::params::FilesystemOptions;

    #[test]
    fn what_blkid_says_is_understood() {
        let ext4 = "DEVNAME=/proc/self/fd/0\nUUID=aa20e2c9\nVERSION=1.0\nTYPE=ext4\nUSAGE=filesystem\n";
        let is = Found::Filesystem { name: "ext4".into(), uuid: Some("aa20e2c9".into()) };
        assert_eq!(found(ext4), is);
        assert_eq!(found("PTUUID=1\nPTTYPE=gpt\n"), Found::Other("a partition table (`gpt`)".into()));
        assert_eq!(found("TYPE=crypto_LUKS\nUSAGE=crypto\n"), Found::Luks { ours: false });
        let ours = "UUID=1\nSUBSYSTEM=proxmox-csi\nTYPE=crypto_LUKS\nUSAGE=crypto\n";
        assert_eq!(found(ours), Found::Luks { ours: true });
        assert_eq!(found("TYPE=swap\nUSAGE=other\n"), Found::Other("`swap`".into()));
    }

    #[tokio::test]
    async fn a_file_system_that_is_none_of_ours_is_not_said_to_have_grown() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(8192).expect("it can have that size");
        let device = Arc::new(Device::open(file.path()).expect("it opens"));
        let tools = Tools::new(&[], super::super::call::Calls::default());
        let grown = grow(&tools, "sdb", &device, Path::new("/")).await;
        assert!(matches!(grown, Err(GrowError::Foreign { .. })), "{grown:?}");
    }

    #[test]
    fn sizes_reach_mkfs_and_nothing_is_forced() {
        let options = FilesystemOptions { block_size: Some(4096), inode_size: Some(512), noatime: false };
        for (kind, expected) in [
            (FsKind::Ext4, "-q -m0 -E nodiscard -b 4096 -I 512 /proc/self/fd/0"),
            (FsKind::Xfs, "-q -K -b size=4096 -i size=512 /proc/self/fd/0"),
            (FsKind::Btrfs, "-q -K /proc/self/fd/0"),
        ] {
            let args = arguments(&Format { kind, options: options.clone() }, &[]);
            assert_eq!(args.join(" "), expected);
        }
        let args = arguments(
            &Format { kind: FsKind::Xfs, options: FilesystemOptions::default() },
            &["-i", "nrext64=0"],
        );
        assert_eq!(args.join(" "), "-q -K -i nrext64=0 /proc/self/fd/0");
    }
}
