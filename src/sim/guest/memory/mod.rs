//! A VM as a Linux node without a machine under it: disks, file systems, mounts and mappings in memory.
//!
//! [`Machine`] is both sides of it. The hypervisor plugs disks in and takes them away; the node plugin works through [`Host`], which it
//! implements. What is modelled is the kernel and the tools *behind* that trait, strictly: names and numbers of disks are used again at
//! once, a disk that is pulled leaves a dead mount, a size is seen when somebody looks, a controller may be missed, half an mkfs is no
//! file system and no blank disk. Contents are bytes ([`Image`]): superblocks at their real places, so that the driver's own proof of
//! blankness and its readers of superblocks work on them; a file system's files are bytes of its disk as well and go where that goes.
//!
//! No thread, no file, no clock but tokio's and no chance: two runs of the same calls are the same. What takes time takes it with
//! `tokio::time::sleep`, so a caller may pause the clock, and may drop a call at such a point, as a process dies.
//!
//! Not modelled: a page cache in front of a disk, quotas, permissions, what goes on below `/proc`; reading a path never hangs by itself.
//!
//! [`Machine::new`] makes one that stands alone; [`crate::sim::Sim::guest_of`] gives that of a simulated VM.
//!
//! [`Host`]: crate::host::Host

mod device;
mod disks;
mod files;
mod formats;
mod host;
mod kernel;
mod luks;
mod mounts;
mod ondisk;
mod signs;

use std::io::Result;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::host::{Condition, FsKind, Mount};
use crate::sim::contents::Image;
use crate::types::Wwn;
use device::Loose;
use kernel::Kernel;
use ondisk::Entry;

pub use kernel::Drive;

/// A VM as a Linux node; clones are handles to the same one.
///
/// A new [`crate::node::Node`] over a clone is a node plugin that was started anew over the kernel as it is.
#[derive(Debug, Clone)]
pub struct Machine {
    kernel: Arc<Mutex<Kernel>>,
    /// How long to wait for what is in use.
    busy_timeout: Duration,
}

/// What a file system holds and how it fares, read from the bytes of its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Which.
    pub kind: FsKind,
    /// Its size in bytes.
    pub size: u64,
    /// It was mounted for writing and not unmounted since.
    pub dirty: bool,
    /// Its uuid, which each mkfs makes anew.
    pub uuid: uuid::Uuid,
    /// Its files, by their paths in it.
    pub files: std::collections::BTreeMap<PathBuf, Vec<u8>>,
}

impl Volume {
    /// The file system in the contents of a volume of this size; `None` where there is none, or none that makes sense.
    pub fn read(image: &Image, size: u64) -> Option<Self> {
        let found = ondisk::read(&Loose { image, size }).ok()??;
        let body = found.body.ok().filter(|_| !found.unfinished)?;
        let file = |(path, entry)| match entry {
            Entry::File(bytes) => Some((path, bytes)),
            _ => None,
        };
        let files = body.tree.into_iter().filter_map(file).collect();
        Some(Self { kind: found.kind, size: found.size, dirty: body.dirty, uuid: found.uuid, files })
    }

    /// Makes an empty file system in the contents of a volume that no VM has plugged in.
    pub fn make(image: &Image, size: u64, kind: FsKind) -> Result<()> {
        let disk = Loose { image, size };
        let uuid = uuid::Uuid::from_u128(0x8b3f_0c1e_2d4a_4f6b_9c8d_0123_4567_89ab ^ u128::from(size));
        ondisk::begin(&disk, kind, uuid, 4096)?;
        ondisk::finish(&disk, kind, uuid, 4096)
    }

    /// What an mkfs leaves that is cut off.
    pub fn make_half(image: &Image, size: u64, kind: FsKind) -> Result<()> {
        ondisk::begin(&Loose { image, size }, kind, uuid::Uuid::nil(), 4096)
    }

    /// Damages the file system in the contents of a volume; `marked`: it has the mark of an error, so that a check looks closely. One
    /// that is `beyond` needs a person's answers, any other is repaired without asking.
    pub fn damage(image: &Image, size: u64, beyond: bool, marked: bool) -> Result<()> {
        let disk = Loose { image, size };
        let body = ondisk::read(&disk)?.and_then(|found| found.body.ok());
        let mut body = body.ok_or(std::io::ErrorKind::InvalidData)?;
        (body.damaged, body.errors) = (body.damaged || beyond, marked);
        ondisk::write_body(&disk, &body)
    }

    /// Encrypts the contents of a volume that no VM has plugged in; `ours`: with this driver's mark in the header.
    pub fn encrypt(image: &Image, size: u64, passphrase: &[u8], ours: bool) -> Result<()> {
        luks::encrypt(image, size, passphrase, ours)
    }

    /// Whether the passphrase opens the contents of a volume.
    pub fn opens(image: &Image, size: u64, passphrase: &[u8]) -> bool {
        luks::opens(image, size, passphrase)
    }
}

impl Machine {
    /// A machine with this SMBIOS uuid and no disk.
    pub fn new(uuid: Option<uuid::Uuid>) -> Self {
        Self { kernel: Arc::new(Mutex::new(Kernel::new(uuid))), busy_timeout: Duration::from_secs(5) }
    }

    /// Shows disks only this long after they were plugged in. At once, unless this is set; a VM takes 0.3 to 0.8 s.
    #[must_use]
    pub fn slow_to_see(self, after: Duration) -> Self {
        self.kernel().appear_after = after;
        self
    }

    /// Waits this long for what is in use, instead of 5 s.
    #[must_use]
    pub fn patient_for(mut self, after: Duration) -> Self {
        self.busy_timeout = after;
        self
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        // Nothing below panics half way; should it, the kernel is as good as after a bug of a real one.
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        kernel.tick(Instant::now());
        kernel
    }
}

/// The hypervisor's side.
impl Machine {
    /// Plugs a disk into a slot, with a controller of its own. What is there is taken away.
    pub fn plug(&self, slot: u32, drive: Drive) {
        self.kernel().plug(slot, drive, Instant::now());
    }

    /// Plugs a disk in at a controller that the kernel has, and the event is lost: only a scan of its LUN finds it.
    pub fn plug_quietly(&self, slot: u32, drive: Drive) {
        self.kernel().plug_quietly(slot, drive);
    }

    /// Takes a disk away, whatever the guest does with it.
    pub fn unplug(&self, slot: u32) {
        self.kernel().unplug(slot);
    }

    /// Takes the power away, and the disks with it: nothing is written out. The files of the machine itself stay.
    pub fn power_off(&self) {
        let mut kernel = self.kernel();
        kernel.power_off();
        kernel.unplug_all();
    }

    /// The power goes and comes back with all disks plugged in.
    pub fn restart(&self) {
        self.kernel().restart();
    }

    /// Tells of a new size, which the kernel takes over when it is made to look.
    pub fn resize(&self, slot: u32, size: u64) {
        self.kernel().resize(slot, size);
    }

    /// Tells of a new size, and the kernel takes it over at once, as it does where QEMU's event reaches it.
    pub fn resize_now(&self, slot: u32, size: u64) {
        let mut kernel = self.kernel();
        kernel.resize(slot, size);
        if let Some(name) = kernel.in_slot(slot).map(|shown| shown.device.name.clone()) {
            kernel.measure(&name);
        }
    }

    /// Makes the guest miss new controllers until its bus is scanned again.
    pub fn set_blind(&self, blind: bool) {
        self.kernel().set_blind(blind);
    }
}

/// What goes wrong.
impl Machine {
    /// Makes the disk in a slot answer another name.
    pub fn rename(&self, slot: u32, wwn: Wwn) {
        self.kernel().rename(slot, wwn);
    }

    /// Makes the disk in a slot take no writes.
    pub fn write_protect(&self, slot: u32) {
        self.kernel().write_protect(slot);
    }

    /// Makes a range of the disk in a slot answer with EIO, until it is repaired or found anew.
    pub fn break_at(&self, slot: u32, range: Range<u64>) {
        if let Some(shown) = self.kernel().in_slot(slot) {
            shown.device.break_at(range);
        }
    }

    /// The disk in a slot answers again everywhere.
    pub fn repair(&self, slot: u32) {
        if let Some(shown) = self.kernel().in_slot(slot) {
            shown.device.repair();
        }
    }

    /// Puts the disk in a slot into a state: `running`, `offline`, `blocked`.
    pub fn set_state(&self, slot: u32, state: &str) {
        if let Some(shown) = self.kernel().in_slot(slot) {
            state.clone_into(&mut shown.state);
        }
    }

    /// Makes sysfs say another size of the disk in a slot than it has.
    pub fn list_size(&self, slot: u32, size: Option<u64>) {
        if let Some(shown) = self.kernel().in_slot(slot) {
            shown.listed_size = size;
        }
    }

    /// Gives the node below `/dev` of one disk to another name; without a name it goes.
    pub fn move_node(&self, name: &str, to: Option<&str>) {
        let mut kernel = self.kernel();
        if let (Some(number), Some(to)) = (kernel.nodes.remove(name), to) {
            kernel.nodes.insert(to.to_owned(), number);
        }
    }

    /// Makes mappings keep their keys in the kernel's keyring, as those of the driver before this one do.
    pub fn use_keyring(&self) {
        self.kernel().keyring = true;
    }

    /// Takes away what growing a mounted ext4 needs.
    pub fn forbid_growing_ext4(&self) {
        self.kernel().grows_ext4 = false;
    }

    /// The file system at a path meets an error: it takes no more writes, or shuts down altogether.
    pub fn fail_filesystem(&self, path: &Path, shut_down: bool) -> Result<()> {
        let mut kernel = self.kernel();
        let mount = kernel.walk(path, true)?.mount;
        let id = kernel.mounted(mount)?.fs;
        if let Some(fs) = kernel.filesystems.get_mut(&id) {
            fs.errors = true;
            // The log is on the disk; what was not in it is lost.
            let written = fs.write_out(true);
            fs.condition = if shut_down { Condition::ShutDown } else { Condition::Readonly };
            return written;
        }
        Ok(())
    }

    /// A process has something open at a mount point, until [`Machine::let_go`].
    pub fn hold(&self, path: &Path) {
        self.kernel().held.push(path.to_owned());
    }

    /// Nobody has anything open there any more.
    pub fn let_go(&self, path: &Path) {
        self.kernel().held.retain(|held| held != path);
    }

    /// A process in a mount namespace of its own keeps all mounts that are there now; returns its number.
    pub fn leak_namespace(&self) -> usize {
        self.kernel().leak_namespace()
    }

    /// That process ends.
    pub fn end_namespace(&self, number: usize) {
        self.kernel().end_namespace(number);
    }
}

/// What others do on the machine: the kubelet, pods, people.
impl Machine {
    /// Writes a file.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.kernel().put(path, Entry::File(bytes.to_vec()))
    }

    /// Reads a file.
    pub fn read(&self, path: &Path) -> Result<Vec<u8>> {
        self.kernel().read_file(path)
    }

    /// Writes to the raw disk whose node is at a path.
    pub fn write_device(&self, path: &Path, bytes: &[u8], offset: u64) -> Result<()> {
        self.kernel().write_device(path, bytes, offset)
    }

    /// Writes out what every file system holds back.
    pub fn sync_all(&self) {
        for fs in self.kernel().filesystems.values_mut().filter(|fs| fs.unsynced) {
            // As sync(1): what a disk does not take is nobody's business.
            let _ = fs.write_out(true);
        }
    }

    /// Makes a directory and those above it.
    pub fn make_directory(&self, path: &Path) -> Result<()> {
        self.kernel().make_directories(path)
    }

    /// Makes a symbolic link.
    pub fn link(&self, path: &Path, to: &Path) -> Result<()> {
        self.kernel().put(path, Entry::Link(to.to_owned()))
    }

    /// The node plugin's process ends, and what it had open is closed. Its tasks have to be stopped by whoever runs them.
    pub fn end_process(&self) {
        self.kernel().close_all();
    }

    /// Mounts a file system in memory.
    pub fn mount_tmpfs(&self, path: &Path) -> Result<()> {
        self.kernel().mount_tmpfs(path)
    }

    /// Binds what is at one path at another.
    pub fn bind_by_hand(&self, source: &Path, target: &Path) -> Result<()> {
        self.kernel().bind(source, None, target, false).map(drop)
    }

    /// Mounts the file system on the device of this name.
    pub fn mount_by_hand(&self, name: &str, path: &Path, kind: FsKind) -> Result<()> {
        let mut kernel = self.kernel();
        let device = kernel.node(name).and_then(|number| kernel.device(number));
        let device = device.ok_or(rustix::io::Errno::NOENT)?;
        let options = crate::host::MountOptions { kind, readonly: false, flags: vec!["nouuid".to_owned()] };
        kernel.mount(&device, path, &options)
    }

    /// Opens the encrypted device of this name under another.
    pub fn unlock_by_hand(&self, name: &str, passphrase: &[u8], mapping: &str) -> bool {
        let mut kernel = self.kernel();
        let device = kernel.node(name).and_then(|number| kernel.device(number));
        let key = crate::host::luks::Passphrase::new(passphrase);
        device.is_some_and(|device| kernel.unlock(&device, &key, mapping).is_ok())
    }

    /// Takes the topmost mount at a path away; `false` where it is in use.
    pub fn unmount_by_hand(&self, path: &Path) -> Result<bool> {
        Ok(self.kernel().unmount(path)? == mounts::Unmounted::Gone)
    }

    /// Makes the mount at a path pass on what happens below it, or not. At first all do.
    pub fn set_shared(&self, path: &Path, shared: bool) -> Result<()> {
        self.kernel().set_shared(path, shared)
    }

    /// The mount table.
    pub fn table(&self) -> Vec<Mount> {
        self.kernel().table()
    }

    /// The names of the disks that the kernel has.
    pub fn disk_names(&self) -> Vec<String> {
        self.kernel().disks.keys().cloned().collect()
    }

    /// The name of the disk in a slot, if the kernel has it.
    pub fn name_in_slot(&self, slot: u32) -> Option<String> {
        self.kernel().in_slot(slot).map(|shown| shown.device.name.clone())
    }

    /// The names of the open mappings.
    pub fn mapping_names(&self) -> Vec<String> {
        self.kernel().mappings.iter().map(|mapping| mapping.name.clone()).collect()
    }

    /// Whether there is anything at a path.
    pub fn has(&self, path: &Path) -> bool {
        self.kernel().walk(path, false).is_ok()
    }
}
