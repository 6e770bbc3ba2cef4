//! The machine as the node plugin sees it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Machine;
use super::device::Pin;
use super::disks::pin_of;
use super::mounts::Unmounted;
use super::ondisk::Entry;
use crate::host::{
    Answer, DeviceNumber, Disk, Format, Found, FsKind, Host, Identity, Mount, MountOptions, OpenDisk, Place,
    PlaceKind, Usage,
    error::{
        CheckError, DisksError, FormatError, GrowError, IdentityError, MountError, OpenError, PathError,
        ProbeError, ReleaseError, ScanError, UnmountError, UsageError,
    },
    luks::{GrowMappingError, KeyCost, LockError, Luks, Mapping, Passphrase, UnlockError},
};
use crate::types::ScsiSlot;

const POLL: Duration = Duration::from_millis(50);

/// What comes of mounting.
fn mounted(what: String, target: &Path, done: std::io::Result<bool>) -> Result<(), MountError> {
    use rustix::io::Errno;
    let target = target.to_owned();
    match done {
        Ok(true) => Ok(()),
        Ok(false) => Err(MountError::Wrong { what, target }),
        Err(source) => Err(match source.raw_os_error() {
            Some(code) if code == Errno::UCLEAN.raw_os_error() => {
                MountError::Damaged { what, target, source }
            }
            Some(code) if code == Errno::ROFS.raw_os_error() => {
                MountError::Unreplayed { what, target, source }
            }
            _ => MountError::Kernel { what, target, source },
        }),
    }
}

fn on_path<T>(what: &'static str, path: &Path, done: std::io::Result<T>) -> Result<T, PathError> {
    done.map_err(|source| PathError { what, path: path.to_owned(), source })
}

impl Machine {
    fn mount_at(&self, pin: &Pin, target: &Path, options: &MountOptions) -> std::io::Result<bool> {
        let mut kernel = self.kernel();
        // Mounted is by the node's path, which has to be the device's.
        let number = kernel.node(&pin.device.name).ok_or(rustix::io::Errno::NOENT)?;
        if number != pin.device.number {
            return Ok(false);
        }
        kernel.mount(&pin.device, target, options).map(|()| true)
    }

    fn look_at(&self, path: &Path) -> Place {
        let kernel = self.kernel();
        let spot = match kernel.walk(path, false) {
            Ok(spot) => spot,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Place::Absent;
            }
            Err(_) => return Place::Other,
        };
        if let Some(number) = kernel.node_at(&spot) {
            return Place::BlockDevice(number);
        }
        if kernel.fs_of(&spot).is_ok_and(|fs| fs.usable().is_err()) {
            return Place::Other;
        }
        match kernel.entry(&spot) {
            Ok(Entry::Directory) => Place::Directory,
            Ok(Entry::File(_)) => Place::File,
            _ => Place::Other,
        }
    }

    /// The path with the directories above it resolved, as far down as there are any.
    fn resolved(&self, path: &Path) -> std::io::Result<PathBuf> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(path.to_owned());
        };
        let walked = self.kernel().walk(parent, true);
        match walked {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(self.resolved(parent)?.join(name)),
            walked => Ok(walked?.path.join(name)),
        }
    }

    fn usage_of(&self, path: &Path) -> std::io::Result<Usage> {
        let kernel = self.kernel();
        let spot = kernel.walk(path, true)?;
        let fs = kernel.fs_of(&spot)?;
        fs.usable()?;
        let used = fs.tree.values().map(|entry| match entry {
            Entry::File(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX).next_multiple_of(4096),
            _ => 4096,
        });
        // A part is the file system's own: a log, tables.
        let total_bytes = fs.size - fs.size / 64;
        let used_bytes = used.sum::<u64>().min(total_bytes);
        let total_inodes = if fs.name == "btrfs" { 0 } else { fs.size / 16384 };
        let used_inodes =
            u64::try_from(fs.tree.len()).unwrap_or(u64::MAX).saturating_add(3).min(total_inodes);
        Ok(Usage {
            total_bytes,
            used_bytes,
            available_bytes: total_bytes - used_bytes,
            total_inodes,
            used_inodes,
            free_inodes: total_inodes - used_inodes,
        })
    }
}

impl Host for Machine {
    fn disks(&self) -> Answer<'_, Vec<Disk>, DisksError> {
        Box::pin(async { Ok(self.kernel().list()) })
    }

    fn exists(&self, number: DeviceNumber) -> Answer<'_, bool, DisksError> {
        Box::pin(async move { Ok(self.kernel().device(number).is_some()) })
    }

    fn scan(&self, lun: ScsiSlot) -> Answer<'_, (), ScanError> {
        Box::pin(async move {
            sleep(Duration::from_millis(20)).await;
            if self.kernel().scan(u32::from(lun.index())) { Ok(()) } else { Err(ScanError::NoHost) }
        })
    }

    fn scan_bus(&self) -> Answer<'_, (), ScanError> {
        Box::pin(async {
            sleep(Duration::from_millis(20)).await;
            self.kernel().scan_bus();
            Ok(())
        })
    }

    fn open<'a>(&'a self, disk: &'a Disk) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(async { self.open_disk(disk) })
    }

    fn in_use<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, bool, OpenError> {
        Box::pin(async { self.is_in_use(disk) })
    }

    fn refresh<'a>(&'a self, disk: &'a Disk) -> Answer<'a, Disk, OpenError> {
        Box::pin(async { self.measured(disk) })
    }

    fn probe<'a>(&'a self, disk: &'a OpenDisk) -> Answer<'a, Found, ProbeError> {
        Box::pin(async { self.probe_disk(disk) })
    }

    fn format_blank<'a>(&'a self, disk: &'a OpenDisk, format: &'a Format) -> Answer<'a, (), FormatError> {
        Box::pin(self.format(disk, format))
    }

    fn check<'a>(&'a self, disk: &'a OpenDisk, kind: FsKind) -> Answer<'a, (), CheckError> {
        Box::pin(self.check_disk(disk, kind))
    }

    fn grow<'a>(&'a self, disk: &'a OpenDisk, mounted_at: &'a Path) -> Answer<'a, (), GrowError> {
        Box::pin(async {
            sleep(POLL).await;
            self.grow_filesystem(disk, mounted_at)
        })
    }

    fn mounts(&self) -> Answer<'_, Vec<Mount>, PathError> {
        Box::pin(async { Ok(self.kernel().table()) })
    }

    fn mount<'a>(
        &'a self,
        disk: &'a OpenDisk,
        target: &'a Path,
        options: &'a MountOptions,
    ) -> Answer<'a, (), MountError> {
        Box::pin(async move {
            sleep(Duration::from_millis(20)).await;
            let what = format!("{} on disk `{}`", options.kind, disk.disk().name);
            mounted(what, target, self.mount_at(&pin_of(disk), target, options))
        })
    }

    fn bind<'a>(
        &'a self,
        source: &'a Path,
        device: DeviceNumber,
        target: &'a Path,
        readonly: bool,
    ) -> Answer<'a, (), MountError> {
        Box::pin(async move {
            let done = self.kernel().bind(source, Some(device), target, readonly);
            mounted(format!("`{}`", source.display()), target, done)
        })
    }

    fn bind_disk<'a>(&'a self, disk: &'a OpenDisk, target: &'a Path) -> Answer<'a, (), MountError> {
        Box::pin(async move {
            let done = self.kernel().bind_node(&pin_of(disk).device, target);
            mounted(format!("disk `{}`", disk.disk().name), target, done.map(|()| true))
        })
    }

    fn sync<'a>(&'a self, mounted_at: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(async move {
            sleep(Duration::from_millis(10)).await;
            let mut kernel = self.kernel();
            let fs = kernel.walk(mounted_at, true).and_then(|spot| Ok(kernel.mounted(spot.mount)?.fs));
            let done = fs.and_then(|id| match kernel.filesystems.get_mut(&id) {
                Some(fs) => fs.write_out(true),
                None => Ok(()),
            });
            on_path("write out", mounted_at, done)
        })
    }

    fn unmount<'a>(&'a self, target: &'a Path) -> Answer<'a, (), UnmountError> {
        Box::pin(async move {
            let deadline = Instant::now() + self.busy_timeout;
            loop {
                sleep(Duration::from_millis(10)).await;
                let done = self.kernel().unmount(target);
                match done {
                    Ok(Unmounted::Gone) => return Ok(()),
                    Ok(Unmounted::Busy) if Instant::now() < deadline => sleep(POLL).await,
                    Ok(Unmounted::Busy) => {
                        return Err(UnmountError::Busy {
                            target: target.to_owned(),
                            after: self.busy_timeout,
                        });
                    }
                    Err(source) => return Err(UnmountError::Kernel { target: target.to_owned(), source }),
                }
            }
        })
    }

    fn release(&self, disk: OpenDisk) -> Answer<'_, (), ReleaseError> {
        Box::pin(self.release_disk(disk))
    }

    fn discard<'a>(&'a self, disk: &'a Disk) -> Answer<'a, (), ReleaseError> {
        Box::pin(async { self.discard_disk(disk) })
    }

    fn resolve<'a>(&'a self, path: &'a Path) -> Answer<'a, PathBuf, PathError> {
        Box::pin(async { on_path("resolve", path, self.resolved(path)) })
    }

    fn look<'a>(&'a self, path: &'a Path) -> Answer<'a, Place, PathError> {
        Box::pin(async { Ok(self.look_at(path)) })
    }

    fn make_place<'a>(&'a self, path: &'a Path, kind: PlaceKind) -> Answer<'a, (), PathError> {
        Box::pin(async move {
            let mut kernel = self.kernel();
            let done = match kind {
                PlaceKind::Directory => kernel.make_directories(path),
                PlaceKind::File => kernel.make_file(path),
            };
            on_path("make", path, done)
        })
    }

    fn remove_place<'a>(&'a self, path: &'a Path) -> Answer<'a, (), PathError> {
        Box::pin(async { on_path("remove", path, self.kernel().remove(path)) })
    }

    fn responds<'a>(&'a self, path: &'a Path) -> Answer<'a, bool, PathError> {
        Box::pin(async move {
            let kernel = self.kernel();
            let answers = match kernel.walk(path, true) {
                Ok(spot) => kernel.fs_of(&spot).map(|fs| fs.usable().is_ok()),
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(false),
                Err(error) => Err(error),
            };
            on_path("open", path, answers)
        })
    }

    fn usage<'a>(&'a self, path: &'a Path) -> Answer<'a, Usage, UsageError> {
        Box::pin(async { Ok(on_path("measure", path, self.usage_of(path))?) })
    }

    fn identity(&self) -> Answer<'_, Identity, IdentityError> {
        Box::pin(async { Ok(Identity { uuid: self.kernel().uuid, vmid: None, no_vm: None }) })
    }
}

impl Luks for Machine {
    fn mappings(&self) -> Answer<'_, Vec<Mapping>, DisksError> {
        Box::pin(async { Ok(self.kernel().opened()) })
    }

    fn encrypt_blank<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        _: &'a KeyCost,
    ) -> Answer<'a, (), FormatError> {
        Box::pin(self.encrypt_disk(disk, key))
    }

    fn unlock<'a>(
        &'a self,
        disk: &'a OpenDisk,
        key: &'a Passphrase,
        name: &'a str,
    ) -> Answer<'a, Mapping, UnlockError> {
        Box::pin(self.unlock_disk(disk, key, name))
    }

    fn open_mapping<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, OpenDisk, OpenError> {
        Box::pin(async { self.open_mapped(mapping) })
    }

    fn format_inside<'a>(
        &'a self,
        disk: &'a OpenDisk,
        mapping: &'a OpenDisk,
        format: &'a Format,
    ) -> Answer<'a, (), FormatError> {
        Box::pin(self.format_mapping(disk, mapping, format))
    }

    fn lock<'a>(&'a self, mapping: &'a Mapping) -> Answer<'a, (), LockError> {
        Box::pin(self.lock_mapping(mapping))
    }

    fn grow_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        key: Option<&'a Passphrase>,
    ) -> Answer<'a, (), GrowMappingError> {
        Box::pin(async move { self.grow_mapped(mapping, key) })
    }
}
