//! The tools: probing, mkfs, fsck, growing, luksFormat. What they decide is the driver's own code over the bytes ([`guard`],
//! [`blank`], [`luks::prove_untouched`]).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Machine;
use super::device::Device;
use super::disks::{failed, pin_of};
use super::{luks as header, ondisk, signs};
use crate::host::{
    Format, Found, FsKind, OpenDisk, blank,
    error::{CheckError, FormatError, GrowError, ProbeError},
    guard,
    luks::{self, Passphrase},
    superblock::Superblock,
};

/// Of the guests' kernel.
const PAGE: usize = 4096;
/// Between the proof and the tool: it has to be started.
const START: Duration = Duration::from_millis(5);
/// What half an mkfs and half a luksFormat take.
const HALF: Duration = Duration::from_millis(150);

impl Machine {
    pub(super) fn probe_disk(&self, disk: &OpenDisk) -> Result<Found, ProbeError> {
        // What is due happens first: the disk may go this moment.
        drop(self.kernel());
        signs::probe(&*pin_of(disk)).map_err(|error| ProbeError::Tool {
            name: disk.disk().name.clone(),
            source: failed("blkid", error.to_string()),
        })
    }

    fn prove(&self, disk: &OpenDisk) -> Result<(), FormatError> {
        let name = &disk.disk().name;
        guard::unsigned(name, &self.probe_disk(disk)?)?;
        guard::proven(name, blank::prove(&*pin_of(disk)))
    }

    pub(super) async fn format(&self, disk: &OpenDisk, format: &Format) -> Result<(), FormatError> {
        guard::mountable(&disk.disk().name, format, PAGE)?;
        self.prove(disk)?;
        self.mkfs(disk, format).await
    }

    pub(super) async fn format_mapping(
        &self,
        disk: &OpenDisk,
        mapping: &OpenDisk,
        format: &Format,
    ) -> Result<(), FormatError> {
        let (under, inside) = (&disk.disk().name, &mapping.disk().name);
        guard::mountable(inside, format, PAGE)?;
        guard::unsigned(inside, &self.probe_disk(mapping)?)?;
        luks::prove_untouched(&*pin_of(disk), under)?;
        self.mkfs(mapping, format).await
    }

    /// Makes the file system in two halves: a caller that dies in between leaves the first.
    async fn mkfs(&self, disk: &OpenDisk, format: &Format) -> Result<(), FormatError> {
        let (name, kind, device) = (disk.disk().name.clone(), format.kind, Arc::clone(&pin_of(disk).device));
        let tool = match kind {
            FsKind::Ext4 => "mkfs.ext4",
            FsKind::Xfs => "mkfs.xfs",
            FsKind::Btrfs => "mkfs.btrfs",
        };
        let mkfs = |source: std::io::Error| FormatError::Mkfs {
            name: name.clone(),
            kind,
            source: failed(tool, source.to_string()),
        };
        let block = format.options.block_size.unwrap_or(4096);
        sleep(START).await;
        let uuid = {
            let mut kernel = self.kernel();
            if kernel.is_claimed(&device) {
                return Err(mkfs(rustix::io::Errno::BUSY.into()));
            }
            let uuid = kernel.fresh_uuid();
            ondisk::begin(&*device, kind, uuid, block).map_err(mkfs)?;
            uuid
        };
        sleep(2 * HALF).await;
        drop(self.kernel());
        ondisk::finish(&*device, kind, uuid, block).map_err(mkfs)?;
        guard::made(&name, kind, &self.probe_disk(disk)?)
    }

    pub(super) async fn encrypt_disk(&self, disk: &OpenDisk, key: &Passphrase) -> Result<(), FormatError> {
        self.prove(disk)?;
        let (name, device) = (disk.disk().name.clone(), Arc::clone(&pin_of(disk).device));
        let encrypt = |source: std::io::Error| FormatError::Encrypt {
            name: name.clone(),
            source: failed("cryptsetup", source.to_string()),
        };
        sleep(START).await;
        let uuid = self.kernel().fresh_uuid().to_string();
        header::begin(&*device, &uuid, key, true).map_err(encrypt)?;
        sleep(HALF).await;
        drop(self.kernel());
        header::finish(&*device, &uuid, key, true).map_err(encrypt)?;
        match self.probe_disk(disk)? {
            Found::Luks { ours: true } => Ok(()),
            found => Err(FormatError::NotEncrypted { name, found: guard::describe(&found) }),
        }
    }

    /// e2fsck(8), `-p`: it takes the word of a mark that says all is well.
    pub(super) async fn check_disk(&self, disk: &OpenDisk, kind: FsKind) -> Result<(), CheckError> {
        if kind != FsKind::Ext4 {
            return Ok(());
        }
        let name = || disk.disk().name.clone();
        let tool = |said: String| CheckError::Tool { name: name(), source: failed("e2fsck", said) };
        sleep(Duration::from_millis(20)).await;
        let device = Arc::clone(&pin_of(disk).device);
        let kernel = self.kernel();
        if kernel.is_claimed(&device) {
            return Err(tool(format!("{} is in use.", name())));
        }
        let found = ondisk::read(&*device).map_err(|error| tool(error.to_string()))?;
        let found =
            found.filter(|found| found.kind == kind).ok_or_else(|| tool("Bad magic number".to_owned()))?;
        let mut body = found.body.map_err(|error| tool(error.to_string()))?;
        if !(body.errors || body.dirty) {
            return Ok(());
        }
        if body.damaged {
            let source = failed("e2fsck", "Root inode is not a directory; UNEXPECTED INCONSISTENCY");
            return Err(CheckError::Damaged { name: name(), source });
        }
        (body.errors, body.dirty) = (false, false);
        ondisk::write_body(&*device, &body).map_err(|error| tool(error.to_string()))
    }

    /// Each tool at what it grows by: the path it is mounted at.
    pub(super) fn grow_filesystem(&self, disk: &OpenDisk, mounted_at: &Path) -> Result<(), GrowError> {
        let name = || disk.disk().name.clone();
        let mut kernel = self.kernel();
        let device: Arc<Device> = Arc::clone(&pin_of(disk).device);
        let superblock = Superblock::read(&*device);
        let superblock = superblock.map_err(|source| GrowError::Superblock { name: name(), source })?;
        let superblock = superblock.ok_or_else(|| GrowError::Foreign { name: name() })?;
        let tool = |said: String| GrowError::Tool { name: name(), source: failed("resize2fs", said) };
        if superblock.kind == FsKind::Ext4 && superblock.size.get() >= device.size() {
            return Ok(());
        }
        let mount = kernel.walk(mounted_at, true).map_err(|error| tool(error.to_string()))?.mount;
        let id = kernel.mounted(mount).map_err(|error| tool(error.to_string()))?.fs;
        let grows = kernel.grows_ext4;
        let of_it = |fs: &&mut super::files::FileSystem| {
            fs.device.as_ref().is_some_and(|own| Arc::ptr_eq(own, &device))
        };
        let fs = kernel.filesystems.get_mut(&id).filter(of_it);
        let fs = fs.ok_or_else(|| tool("the device is not mounted there".to_owned()))?;
        if fs.kind() == Some(FsKind::Ext4) && !grows {
            let source = failed("resize2fs", "Permission denied to resize filesystem");
            return Err(GrowError::Capability { name: name(), source });
        }
        fs.grow().map_err(|error| tool(error.to_string()))
    }
}
