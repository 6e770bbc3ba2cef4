//! The files of a guest's sysfs and dev trees. What a reader finds is complete: a disk's directory is made before the
//! link under `block` and goes after it, and a changed file is replaced, never rewritten.

use super::{Disk, identity};
use crate::host::linux::loopdev::LoopDevice;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

/// Read by nobody: reading it fails with EINVAL, as `wwid` does where the kernel cannot make one.
const EINVAL_ON_READ: &str = "/proc/self/clear_refs";

/// The trees of one guest.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) sys: PathBuf,
    pub(super) dev: PathBuf,
}

/// Where a disk's controller is: one for each disk, as `virtio-scsi-single` makes them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) slot: u32,
    pub(super) host: u32,
}

impl Place {
    /// `devices/pci0000:00/0000:00:05.0/0000:01:02.0`, behind the bridge PVE puts these controllers on.
    fn controller(self) -> String {
        format!("devices/pci0000:00/0000:00:05.0/0000:01:{:02x}.0", self.slot + 1)
    }

    fn host_dir(self) -> String {
        format!("{}/virtio{}/host{}", self.controller(), self.host, self.host)
    }

    fn scsi_host(self) -> String {
        format!("{}/scsi_host/host{}", self.host_dir(), self.host)
    }

    fn address(self) -> String {
        format!("{}:0:0:{}", self.host, self.slot)
    }

    fn device(self) -> String {
        format!("{}/target{}:0:0/{}", self.host_dir(), self.host, self.address())
    }
}

fn put(path: &Path, content: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    std::fs::write(path, content)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Replaces a file in one step.
fn replace(path: &Path, content: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    put(&fresh, content, 0o444)?;
    std::fs::rename(fresh, path)
}

fn gone(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Tree {
    /// Makes the trees with what every guest has.
    pub(super) fn create(root: &Path, uuid: Option<&str>) -> Result<Self> {
        let tree = Self { sys: root.join("sys"), dev: root.join("dev") };
        for directory in [
            "block",
            "class/block",
            "class/scsi_host",
            "class/scsi_device",
            "class/scsi_disk",
            "bus/pci",
            "devices",
        ] {
            std::fs::create_dir_all(tree.sys.join(directory))?;
        }
        put(&tree.sys.join("bus/pci/rescan"), "", 0o200)?;
        let dmi = tree.sys.join("class/dmi/id");
        std::fs::create_dir_all(&dmi)?;
        put(&dmi.join("sys_vendor"), "QEMU\n", 0o444)?;
        put(&dmi.join("product_name"), "Standard PC (i440FX + PIIX, 1996)\n", 0o444)?;
        put(&dmi.join("product_serial"), "\n", 0o400)?;
        if let Some(uuid) = uuid.filter(|uuid| uuid.chars().any(|c| c != '0' && c != '-')) {
            put(&dmi.join("product_uuid"), format!("{}\n", uuid.to_lowercase()), 0o400)?;
        }
        std::fs::create_dir_all(tree.dev.join("disk/by-id"))?;
        std::fs::create_dir_all(tree.dev.join("disk/by-path"))?;
        Ok(tree)
    }

    /// The directory with a host's `scan`.
    pub(super) fn host_watch(&self, place: Place) -> PathBuf {
        self.sys.join(place.scsi_host())
    }

    /// The directory with a disk's `delete` and `rescan`.
    pub(super) fn disk_watch(&self, place: Place) -> PathBuf {
        self.sys.join(place.device())
    }

    /// The directory with the PCI bus's `rescan`.
    pub(super) fn bus_watch(&self) -> PathBuf {
        self.sys.join("bus/pci")
    }

    /// Shows a controller.
    pub(super) fn add_host(&self, place: Place) -> Result<()> {
        let directory = self.sys.join(place.scsi_host());
        std::fs::create_dir_all(&directory)?;
        let controller = self.sys.join(place.controller());
        put(&controller.join("vendor"), "0x1af4\n", 0o444)?;
        put(&controller.join("device"), "0x1004\n", 0o444)?;
        put(&controller.join("class"), "0x010000\n", 0o444)?;
        put(&directory.join("scan"), "", 0o200)?;
        put(&directory.join("proc_name"), "virtio_scsi\n", 0o444)?;
        symlink(format!("../../../host{}", place.host), directory.join("device"))?;
        symlink(
            format!("../../{}", place.scsi_host()),
            self.sys.join(format!("class/scsi_host/host{}", place.host)),
        )
    }

    /// Takes a controller away.
    pub(super) fn remove_host(&self, place: Place) -> Result<()> {
        gone(std::fs::remove_file(self.sys.join(format!("class/scsi_host/host{}", place.host))))?;
        gone(std::fs::remove_dir_all(self.sys.join(place.controller())))
    }

    /// Whether a disk of this name is shown.
    pub(super) fn has(&self, name: &str) -> bool {
        self.sys.join("block").join(name).symlink_metadata().is_ok()
    }

    /// Shows a disk under `name`.
    pub(super) fn add_disk(
        &self,
        place: Place,
        name: &str,
        disk: &Disk,
        device: &LoopDevice,
        size: u64,
        diskseq: u64,
    ) -> Result<()> {
        let (major, minor) = device.number();
        let directory = self.sys.join(place.device());
        let block = directory.join("block").join(name);
        std::fs::create_dir_all(block.join("queue"))?;
        for (file, text) in [
            ("vendor", "QEMU    \n"),
            ("model", "QEMU HARDDISK   \n"),
            ("rev", "2.5+\n"),
            ("type", "0\n"),
            ("scsi_level", "6\n"),
        ] {
            put(&directory.join(file), text, 0o444)?;
        }
        for (file, text) in [("state", "running\n"), ("timeout", "30\n"), ("queue_depth", "128\n")] {
            put(&directory.join(file), text, 0o644)?;
        }
        put(&directory.join("delete"), "", 0o200)?;
        put(&directory.join("rescan"), "", 0o200)?;
        put(&directory.join("inquiry"), identity::INQUIRY, 0o444)?;
        put(&directory.join("vpd_pg0"), identity::vpd_pg0(disk.serial.as_deref()), 0o444)?;
        put(&directory.join("vpd_pg83"), identity::vpd_pg83(disk.slot, disk.wwn), 0o444)?;
        put(&directory.join("vpd_pgb1"), identity::vpd_pgb1(disk.ssd), 0o444)?;
        if let Some(page) = identity::vpd_pg80(disk.serial.as_deref()) {
            put(&directory.join("vpd_pg80"), page, 0o444)?;
        }
        match identity::wwid(disk.wwn) {
            Some(line) => put(&directory.join("wwid"), line, 0o444)?,
            None => symlink(EINVAL_ON_READ, directory.join("wwid"))?,
        }
        let address = place.address();
        for class in ["scsi_device", "scsi_disk"] {
            let entry = directory.join(class).join(&address);
            std::fs::create_dir_all(&entry)?;
            symlink(format!("../../../{address}"), entry.join("device"))?;
            symlink(
                format!("../../{}/{class}/{address}", place.device()),
                self.sys.join("class").join(class).join(&address),
            )?;
        }

        put(&block.join("size"), format!("{}\n", size / 512), 0o444)?;
        put(&block.join("dev"), format!("{major}:{minor}\n"), 0o444)?;
        put(&block.join("ro"), if disk.read_only { "1\n" } else { "0\n" }, 0o444)?;
        put(&block.join("removable"), "0\n", 0o444)?;
        put(&block.join("diskseq"), format!("{diskseq}\n"), 0o444)?;
        for (file, text) in [
            ("rotational", if disk.ssd { "0\n" } else { "1\n" }),
            ("logical_block_size", "512\n"),
            ("physical_block_size", "512\n"),
            ("discard_max_bytes", "1073741824\n"),
        ] {
            put(&block.join("queue").join(file), text, 0o444)?;
        }
        symlink(format!("../../../{address}"), block.join("device"))?;

        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
        mknodat(CWD, self.dev.join(name), FileType::BlockDevice, mode, makedev(major, minor))?;
        for link in self.links(disk) {
            // Two disks with one name: udev's link shows one of them.
            let _ = std::fs::remove_file(&link);
            symlink(format!("../../{name}"), link)?;
        }
        let target = format!("{}/block/{name}", place.device());
        symlink(format!("../../{target}"), self.sys.join("class/block").join(name))?;
        symlink(format!("../{target}"), self.sys.join("block").join(name))
    }

    fn links(&self, disk: &Disk) -> Vec<PathBuf> {
        let by_path = format!("pci-0000:01:{:02x}.0-scsi-0:0:0:{}", disk.slot + 1, disk.slot);
        identity::by_id(disk.slot, disk.wwn)
            .into_iter()
            .map(|name| self.dev.join("disk/by-id").join(name))
            .chain([self.dev.join("disk/by-path").join(by_path)])
            .collect()
    }

    /// Takes a disk away; its controller stays.
    pub(super) fn remove_disk(&self, place: Place, name: &str, disk: &Disk) -> Result<()> {
        gone(std::fs::remove_file(self.sys.join("block").join(name)))?;
        gone(std::fs::remove_file(self.sys.join("class/block").join(name)))?;
        for link in self.links(disk) {
            if std::fs::read_link(&link).is_ok_and(|target| target.ends_with(name)) {
                gone(std::fs::remove_file(link))?;
            }
        }
        gone(std::fs::remove_file(self.dev.join(name)))?;
        for class in ["scsi_device", "scsi_disk"] {
            gone(std::fs::remove_file(self.sys.join("class").join(class).join(place.address())))?;
        }
        let target = self.sys.join(place.host_dir()).join(format!("target{}:0:0", place.host));
        gone(std::fs::remove_dir_all(target))
    }

    /// Shows a disk's new size.
    pub(super) fn set_size(&self, place: Place, name: &str, size: u64) -> Result<()> {
        replace(
            &self.sys.join(place.device()).join("block").join(name).join("size"),
            &format!("{}\n", size / 512),
        )
    }
}
