//! An opened block device.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek as _, SeekFrom},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::libc;

use super::sys;
use crate::host::{DeviceNumber, blank::ReadAt};

/// A block device that is held open: as long as it is, the kernel gives its number to no other.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
    size: u64,
    node: PathBuf,
}

impl Device {
    /// Opens a device node. Not with `O_EXCL`: that would claim the device for us, and mkfs and mount could not have it.
    ///
    /// Only for reading: kernels may refuse to open for writing what is mounted (`BLK_DEV_WRITE_MOUNTED`), and each close of a writer
    /// makes udev probe the disk again. Flushing needs no more, and the tools open the disk again as they need it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).open(path)?;
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size, node: path.to_owned() })
    }

    /// The node that was opened: only a name for what this is called, since another device may have it by now.
    pub(super) fn node(&self) -> &Path {
        &self.node
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The number, or `None` where a file or something else was opened.
    pub(super) fn number(&self) -> io::Result<Option<DeviceNumber>> {
        let metadata = self.file.metadata()?;
        Ok(metadata.file_type().is_block_device().then(|| device_number(metadata.rdev())))
    }

    /// A path that names this very device in our process.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// A path that names this very device in a process that we start, as long as it is held open here.
    pub(super) fn path_for_children(&self) -> io::Result<PathBuf> {
        // Our id as this /proc knows it, which may be the host's.
        let own = std::fs::read_link("/proc/self")?;
        Ok(Path::new("/proc").join(own).join("fd").join(self.file.as_raw_fd().to_string()))
    }

    /// Claims the device for us alone; `EBUSY` while something in the kernel has it: a mount in any namespace, a mapping, swap.
    pub(super) fn claim(&self) -> io::Result<File> {
        OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(self.path())
    }

    /// Writes out and drops what the kernel holds of the device.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_all()?;
        sys::flush_buffers(self.file.as_fd())
    }
}

impl ReadAt for Device {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// A `dev_t` as the number that sysfs and the mount table print.
pub(super) fn device_number(dev: u64) -> DeviceNumber {
    DeviceNumber { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_opened_for_reading_only() {
        let device = Device::open(Path::new("/dev/null")).expect("it opens");
        let flags = rustix::fs::fcntl_getfl(device.file()).expect("its flags");
        assert_eq!(flags & rustix::fs::OFlags::ACCMODE, rustix::fs::OFlags::RDONLY);
    }
}
