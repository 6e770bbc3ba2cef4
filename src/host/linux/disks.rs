//! Finding, opening and removing SCSI disks through sysfs.
//!
//! Everything here blocks and runs on a thread for that. A disk may vanish between two reads; a file that is gone then means
//! "not this one", never an error.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::device::{Device, device_number};
use crate::{
    host::{
        DeviceNumber, Disk,
        error::{DisksError, OpenError, PathError, ScanError},
    },
    types::{Bytes, ScsiSlot, Wwn},
};

/// The roots of the trees that are read.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) sysfs: PathBuf,
    pub(super) dev: PathBuf,
}

impl Tree {
    pub(super) fn block(&self, name: &str) -> PathBuf {
        self.sysfs.join("block").join(name)
    }

    pub(super) fn node(&self, name: &str) -> PathBuf {
        self.dev.join(name)
    }

    /// The names of all block devices.
    pub(super) fn names(&self) -> Result<Vec<String>, PathError> {
        let root = self.sysfs.join("block");
        let fail = |source| PathError { what: "read", path: root.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&root).map_err(fail)? {
            names.extend(entry.map_err(fail)?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn disks(&self) -> Result<Vec<Disk>, DisksError> {
        let mut disks = Vec::new();
        for name in self.names()? {
            disks.extend(self.disk(&name)?);
        }
        Ok(disks)
    }

    /// The disk of this name; `None` where there is none or it is no SCSI disk.
    pub(super) fn disk(&self, name: &str) -> Result<Option<Disk>, PathError> {
        let block = self.block(name);
        let Some((host, lun)) = address_of(&block.join("device")) else { return Ok(None) };
        let Some((number, size, readonly)) = self.numbers(name)? else { return Ok(None) };
        let wwn = wwid(&block).or_else(|| vpd_naa(&block));
        let virtio = is_virtio(&self.sysfs.join(format!("class/scsi_host/host{host}")));
        Ok(Some(Disk { name: name.to_owned(), number, wwn, lun: Some(lun), size, readonly, virtio }))
    }

    /// Number, size, and whether it takes no writes, of the block device of this name.
    pub(super) fn numbers(&self, name: &str) -> Result<Option<(DeviceNumber, Bytes, bool)>, PathError> {
        let block = self.block(name);
        let (Some(number), Some(sectors)) = (read(&block.join("dev"))?, read(&block.join("size"))?) else {
            return Ok(None);
        };
        let odd = |path: PathBuf| PathError {
            what: "understand",
            path,
            source: io::Error::from(io::ErrorKind::InvalidData),
        };
        let number = number.parse().map_err(|_| odd(block.join("dev")))?;
        // Sysfs counts in units of 512 bytes, whatever the sector size.
        let size = sectors.parse::<u64>().ok().and_then(|sectors| sectors.checked_mul(512));
        let size = Bytes::new(size.ok_or_else(|| odd(block.join("size")))?);
        let readonly = read(&block.join("ro"))?.as_deref() == Some("1");
        Ok(Some((number, size, readonly)))
    }

    /// The one device that this one is made of; `None` where that is gone, or where there are several.
    pub(super) fn slave(&self, name: &str) -> Result<Option<DeviceNumber>, PathError> {
        let Ok(slaves) = fs::read_dir(self.block(name).join("slaves")) else { return Ok(None) };
        let slaves: Vec<_> = slaves.filter_map(Result::ok).collect();
        let [slave] = slaves.as_slice() else { return Ok(None) };
        Ok(read(&slave.path().join("dev"))?.and_then(|number| number.parse().ok()))
    }

    /// Whether there is a block device of this number.
    pub(super) fn exists(&self, number: DeviceNumber) -> Result<bool, PathError> {
        let path = self.sysfs.join("dev/block").join(number.to_string());
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(PathError { what: "look at", path, source }),
        }
    }

    /// The state of the device as the kernel sees it (`drivers/scsi/scsi_sysfs.c`, `sdev_states`).
    pub(super) fn state(&self, name: &str) -> Result<Option<String>, PathError> {
        read(&self.block(name).join("device/state"))
    }

    /// Opens the node of a device, and checks that it has the device's number.
    pub(super) fn open_node(&self, disk: &Disk) -> Result<Device, OpenError> {
        let path = self.node(&disk.name);
        let fail = |what| {
            let (name, path) = (disk.name.clone(), path.clone());
            move |source| OpenError::Io { name, source: PathError { what, path, source } }
        };
        let device = Device::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::NoNode { name: disk.name.clone(), path: path.clone() },
            _ => fail("open")(error),
        })?;
        let number = device.number().map_err(fail("examine"))?;
        if number != Some(disk.number) {
            let found = number.map_or_else(|| "no block device".to_owned(), |number| number.to_string());
            return Err(OpenError::Number { path, expected: disk.number, found });
        }
        Ok(device)
    }

    /// The path that a device is mounted from, which stays in the mount table. A mapping's is made of its own name: by that the driver
    /// before this one knows what to close, should it take over again.
    pub(super) fn mount_source(&self, disk: &Disk) -> PathBuf {
        let node = self.node(&disk.name);
        let name = if disk.lun.is_none() { read(&self.block(&disk.name).join("dm/name")) } else { Ok(None) };
        let Ok(Some(name)) = name else { return node };
        let named = self.dev.join("mapper").join(name);
        let is_it = |found: fs::Metadata| {
            found.file_type().is_block_device() && device_number(found.rdev()) == disk.number
        };
        if fs::metadata(&named).is_ok_and(is_it) { named } else { node }
    }

    pub(super) fn open(&self, disk: &Disk) -> Result<Device, OpenError> {
        let path = self.node(&disk.name);
        let block = self.block(&disk.name);
        let name = disk.name.clone();
        match self.state(&name).map_err(|source| OpenError::Io { name: disk.name.clone(), source })? {
            Some(state) if is_offline(&state) => return Err(OpenError::Offline { name, state }),
            Some(state) if state != "running" => return Err(OpenError::NotRunning { name, state }),
            _ => {}
        }
        let device = self.open_node(disk)?;
        // From here on the number can't become another device's: what sysfs says now, it says of what was opened.
        let again =
            self.disk(&disk.name).map_err(|source| OpenError::Io { name: disk.name.clone(), source })?;
        let gone = || {
            let source =
                PathError { what: "read", path: block.clone(), source: io::ErrorKind::NotFound.into() };
            OpenError::Io { name: disk.name.clone(), source }
        };
        let again = again.ok_or_else(gone)?;
        if again.number != disk.number {
            let found = again.number.to_string();
            return Err(OpenError::Number { path, expected: disk.number, found });
        }
        // Where the kernel can't print the name it is read from the page itself; where it prints one, the page must agree.
        let page = vpd_naa(&block);
        let answered = if page.is_some() { page } else { again.wwn };
        if again.wwn != disk.wwn || answered != disk.wwn {
            return Err(OpenError::Changed { name: disk.name.clone(), listed: disk.wwn, answered });
        }
        let opened = Bytes::new(crate::host::blank::ReadAt::size(&device));
        if opened != again.size {
            return Err(OpenError::Size { name: disk.name.clone(), opened, listed: again.size });
        }
        Ok(device)
    }

    /// The scan files of the virtio-scsi hosts. Which of them a slot's disk is on can't be told while the disk is absent; asking
    /// the others for a LUN they don't have is free.
    pub(super) fn scan_files(&self) -> Result<Vec<PathBuf>, ScanError> {
        let root = self.sysfs.join("class/scsi_host");
        let hosts = match fs::read_dir(&root) {
            Ok(hosts) => hosts,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ScanError::NoHost),
            Err(source) => return Err(PathError { what: "read", path: root, source }.into()),
        };
        let hosts = hosts.filter_map(Result::ok).map(|host| host.path());
        Ok(hosts.filter(|host| is_virtio(host)).map(|host| host.join("scan")).collect())
    }

    /// For q35 machines whose guest never hears of a new controller: ACPI hot-plug behind bridges is off there for old VMs.
    pub(super) fn scan_bus(&self) -> Result<(), ScanError> {
        Ok(write(&self.sysfs.join("bus/pci/rescan"), "1\n")?)
    }

    pub(super) fn rescan(&self, name: &str) -> Result<(), PathError> {
        write(&self.block(name).join("device/rescan"), "1\n")
    }

    pub(super) fn delete(&self, name: &str) -> Result<(), PathError> {
        match write(&self.block(name).join("device/delete"), "1\n") {
            Err(error) if is_gone(&error.source) => Ok(()),
            result => result,
        }
    }

    /// The devices that are made of the disk: mappings, arrays.
    pub(super) fn holders(&self, name: &str) -> Vec<String> {
        let Ok(holders) = fs::read_dir(self.block(name).join("holders")) else { return Vec::new() };
        holders.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }
}

/// Writes `0 0 <lun>` to the scan file of a host. Never a wildcard: on a controller with one disk that blocks for 6 s, and a detach
/// meanwhile makes the kernel warn in `virtscsi_remove`.
pub(super) fn scan(file: &Path, lun: ScsiSlot) -> Result<(), PathError> {
    write(file, &format!("0 0 {}\n", lun.index()))
}

/// Whether a device in this state takes no request any more.
pub(super) fn is_offline(state: &str) -> bool {
    matches!(state, "offline" | "transport-offline")
}

/// Whether an error only means that the device is no longer there.
pub(super) fn is_gone(error: &io::Error) -> bool {
    use nix::libc::{ENODEV, ENOENT, ENXIO};
    matches!(error.raw_os_error(), Some(ENOENT | ENODEV | ENXIO))
}

/// H and N of `device -> …/H:0:0:N`.
fn address_of(device: &Path) -> Option<(u64, u64)> {
    let target = fs::canonicalize(device).ok()?;
    let parts: Option<Vec<u64>> =
        target.file_name()?.to_str()?.split(':').map(|part| part.parse().ok()).collect();
    match parts?[..] {
        [host, _, _, lun] => Some((host, lun)),
        _ => None,
    }
}

/// Whether a SCSI host is the kind that the slots of a VM are on; so is one that does not say.
fn is_virtio(host: &Path) -> bool {
    read(&host.join("proc_name")).ok().flatten().is_none_or(|driver| driver == "virtio_scsi")
}

/// The NAA in `device/wwid`. The read fails with EINVAL for names whose first digit is not 3 to 6, and with ENOENT when the disk
/// goes: both mean that there is no such name here.
fn wwid(block: &Path) -> Option<Wwn> {
    let line = fs::read_to_string(block.join("device/wwid")).ok()?;
    format!("0x{}", line.trim_end().strip_prefix("naa.")?).parse().ok()
}

fn vpd_naa(block: &Path) -> Option<Wwn> {
    naa_of_page(&fs::read(block.join("device/vpd_pg83")).ok()?)
}

/// The 8-byte NAA designator of the logical unit in a device identification page (SPC-5, 7.7.6).
fn naa_of_page(page: &[u8]) -> Option<Wwn> {
    let mut rest = page.get(4..)?;
    while let [code_set, kind, _, length, tail @ ..] = rest {
        let designator = tail.get(..usize::from(*length))?;
        if code_set & 0xf == 1 && kind & 0x3f == 3 && designator.len() == 8 {
            let number = u64::from_be_bytes(designator.try_into().ok()?);
            return format!("0x{number:016x}").parse().ok();
        }
        rest = &tail[usize::from(*length)..];
    }
    None
}

/// The line in a file; `None` where there is no such file or the device behind it went.
pub(super) fn read(path: &Path) -> Result<Option<String>, PathError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(PathError { what: "read", path: path.to_owned(), source }),
    }
}

fn write(path: &Path, text: &str) -> Result<(), PathError> {
    // Truncated like the shell's `>`: sysfs does not care, and in a tree of plain files nothing longer may stay behind.
    let result = OpenOptions::new().write(true).truncate(true).open(path);
    result.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|source| PathError {
        what: "write to",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_name_in_a_page_of_qemu_is_read() {
        let page =
            b"\x00\x83\x00\x1b\x02\x00\x00\x0bdrive-scsi1\x01\x03\x00\x08\x3c\x51\xaa\xbb\xcc\xdd\xee\xff";
        assert_eq!(naa_of_page(page), "0x3c51aabbccddeeff".parse().ok());
        assert_eq!(naa_of_page(b"\x00\x83\x00\x0f\x02\x00\x00\x0bdrive-scsi4"), None);
    }

    proptest! {
        #[test]
        fn no_page_panics(page in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = naa_of_page(&page);
        }
    }
}
