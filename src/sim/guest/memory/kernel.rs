//! The kernel of a guest: which disks it has, under which names and numbers, and who holds them.
//!
//! Names and numbers are the lowest that are free, at once after a disk went, even while a dead mount of it stays; only an open node
//! keeps its own (measured on kernels 6.1 and 6.12).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::device::Device;
use super::files::{FileSystem, FsId, Namespace};
use super::luks::Opened;
use crate::host::{DeviceNumber, Disk};
use crate::sim::contents::Image;
use crate::sim::guest::disk_name;
use crate::types::{Bytes, Wwn};

/// A disk as the hypervisor plugs it.
#[derive(Debug, Clone)]
pub struct Drive {
    /// What it holds.
    pub image: Image,
    /// Bytes the guest sees.
    pub size: u64,
    /// What it answers when it is asked who it is.
    pub wwn: Option<u64>,
    /// Whether writes are refused.
    pub readonly: bool,
}

/// Whether the kernel knows that there is something in a slot.
#[derive(Debug, Clone, Copy)]
enum Seen {
    /// Its controller will show at this time.
    At(Instant),
    /// Never, unless somebody scans the bus.
    Blind,
    /// It has the controller.
    Yes,
}

#[derive(Debug)]
struct Plugged {
    drive: Drive,
    seen: Seen,
    /// The name under which the kernel has the disk, until somebody deletes it.
    shown: Option<String>,
}

/// A disk that the kernel has.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) device: Arc<Device>,
    slot: u32,
    pub(super) wwn: Option<Wwn>,
    pub(super) state: String,
    /// The size that sysfs says, where it is not the device's.
    pub(super) listed_size: Option<u64>,
}

impl Shown {
    fn as_disk(&self) -> Disk {
        Disk {
            name: self.device.name.clone(),
            number: self.device.number,
            wwn: self.wwn,
            lun: Some(u64::from(self.slot)),
            size: Bytes::new(self.listed_size.unwrap_or_else(|| self.device.size())),
            readonly: self.device.is_readonly(),
            virtio: true,
        }
    }
}

/// All that a guest's kernel knows.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) uuid: Option<uuid::Uuid>,
    pub(super) appear_after: Duration,
    blind: bool,
    slots: BTreeMap<u32, Plugged>,
    pub(super) disks: BTreeMap<String, Shown>,
    /// The nodes below `/dev`.
    pub(super) nodes: BTreeMap<String, DeviceNumber>,
    /// Disks that went while somebody had their node open.
    dead: Vec<Arc<Device>>,
    pub(super) mappings: Vec<Opened>,
    pub(super) filesystems: BTreeMap<FsId, FileSystem>,
    pub(super) last_fs: u64,
    /// The first one is that of the node plugin and of everybody else who has none of his own.
    pub(super) namespaces: Vec<Namespace>,
    pub(super) last_peers: u64,
    /// Mount points at which a process has something open.
    pub(super) held: Vec<PathBuf>,
    /// Whether mappings keep their keys in the keyring, as those of the driver before this one.
    pub(super) keyring: bool,
    /// Whether this process may grow a mounted ext4.
    pub(super) grows_ext4: bool,
    made: u64,
}

impl Kernel {
    pub(super) fn new(uuid: Option<uuid::Uuid>) -> Self {
        let mut kernel = Self {
            uuid,
            appear_after: Duration::ZERO,
            blind: false,
            slots: BTreeMap::new(),
            disks: BTreeMap::new(),
            nodes: BTreeMap::new(),
            dead: Vec::new(),
            mappings: Vec::new(),
            filesystems: BTreeMap::new(),
            last_fs: 0,
            namespaces: Vec::new(),
            last_peers: 0,
            held: Vec::new(),
            keyring: false,
            grows_ext4: true,
            made: 0,
        };
        kernel.boot();
        kernel
    }

    /// A uuid that this kernel has not made yet, the same in each run.
    pub(super) fn fresh_uuid(&mut self) -> uuid::Uuid {
        use sha1::Digest as _;
        self.made += 1;
        let hash = sha1::Sha1::digest(format!("{:?} {}", self.uuid, self.made));
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash[..16]);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    }

    /// Lets happen what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        let due = |plugged: &Plugged| matches!(plugged.seen, Seen::At(at) if at <= now);
        let slots: Vec<u32> =
            self.slots.iter().filter(|(_, plugged)| due(plugged)).map(|(slot, _)| *slot).collect();
        for slot in slots {
            self.discover(slot);
        }
        self.dead.retain(|device| device.is_open());
    }

    pub(super) fn set_blind(&mut self, blind: bool) {
        self.blind = blind;
    }

    /// The hypervisor plugs a disk, with a controller of its own.
    pub(super) fn plug(&mut self, slot: u32, drive: Drive, now: Instant) {
        self.unplug(slot);
        let seen = if self.blind { Seen::Blind } else { Seen::At(now + self.appear_after) };
        self.slots.insert(slot, Plugged { drive, seen, shown: None });
        self.tick(now);
    }

    /// The hypervisor plugs a disk at a controller that the kernel has, and the event is lost.
    pub(super) fn plug_quietly(&mut self, slot: u32, drive: Drive) {
        self.unplug(slot);
        self.slots.insert(slot, Plugged { drive, seen: Seen::Yes, shown: None });
    }

    fn discover(&mut self, slot: u32) {
        if let Some(plugged) = self.slots.get_mut(&slot) {
            plugged.seen = Seen::Yes;
        }
        self.show(slot);
    }

    /// The kernel finds the disk at a LUN, unless it has it.
    fn show(&mut self, slot: u32) {
        let taken = |name: &String| {
            self.disks.contains_key(name) || self.dead.iter().any(|dead| dead.name == *name && dead.is_open())
        };
        let Some(index) = (0..128).find(|index| !taken(&disk_name(*index))) else { return };
        let Some(plugged) = self.slots.get_mut(&slot) else { return };
        if plugged.shown.is_some() || !matches!(plugged.seen, Seen::Yes) {
            return;
        }
        let (name, number) = (disk_name(index), number_of(index));
        let Drive { image, size, wwn, readonly } = plugged.drive.clone();
        let device = Arc::new(Device::disk(name.clone(), number, image, size, readonly));
        plugged.shown = Some(name.clone());
        let wwn = wwn.and_then(|wwn| format!("0x{wwn:016x}").parse().ok());
        let shown = Shown { device, slot, wwn, state: "running".to_owned(), listed_size: None };
        self.disks.insert(name.clone(), shown);
        self.nodes.insert(name, number);
    }

    /// The hypervisor takes a disk away, whatever the guest does with it.
    pub(super) fn unplug(&mut self, slot: u32) {
        if let Some(name) = self.slots.remove(&slot).and_then(|plugged| plugged.shown) {
            self.goes(&name);
        }
    }

    pub(super) fn unplug_all(&mut self) {
        let slots: Vec<u32> = self.slots.keys().copied().collect();
        for slot in slots {
            self.unplug(slot);
        }
    }

    /// A disk leaves the kernel. What is mounted of it is dead from now on, and what was not written out is lost.
    fn goes(&mut self, name: &str) {
        let Some(shown) = self.disks.remove(name) else { return };
        self.nodes.remove(name);
        shown.device.goes();
        if shown.device.is_open() {
            self.dead.push(shown.device);
        }
    }

    /// The guest deletes a disk. The hypervisor keeps it.
    pub(super) fn delete(&mut self, name: &str) {
        for plugged in self.slots.values_mut().filter(|plugged| plugged.shown.as_deref() == Some(name)) {
            plugged.shown = None;
        }
        self.goes(name);
    }

    /// Looks for a disk at a LUN of every controller; `false` where there is no controller.
    pub(super) fn scan(&mut self, slot: u32) -> bool {
        let any = self.slots.values().any(|plugged| matches!(plugged.seen, Seen::Yes));
        self.show(slot);
        any
    }

    /// Looks for controllers that it never heard of.
    pub(super) fn scan_bus(&mut self) {
        let blind = |plugged: &Plugged| matches!(plugged.seen, Seen::Blind);
        let slots: Vec<u32> =
            self.slots.iter().filter(|(_, plugged)| blind(plugged)).map(|(slot, _)| *slot).collect();
        for slot in slots {
            self.discover(slot);
        }
    }

    /// The hypervisor tells of a new size. The kernel takes it over when it is asked to look.
    pub(super) fn resize(&mut self, slot: u32, size: u64) {
        if let Some(plugged) = self.slots.get_mut(&slot) {
            plugged.drive.size = size;
        }
    }

    /// The kernel asks a disk for its size.
    pub(super) fn measure(&mut self, name: &str) {
        let drive = self.slots.values().find(|plugged| plugged.shown.as_deref() == Some(name));
        if let (Some(drive), Some(shown)) = (drive, self.disks.get(name)) {
            shown.device.set_size(drive.drive.size);
        }
    }

    /// The disk in a slot, as the kernel has it.
    pub(super) fn in_slot(&mut self, slot: u32) -> Option<&mut Shown> {
        let name = self.slots.get(&slot)?.shown.clone()?;
        self.disks.get_mut(&name)
    }

    /// Makes the disk in a slot answer another name, now and whenever it is found again.
    pub(super) fn rename(&mut self, slot: u32, wwn: Wwn) {
        if let Some(plugged) = self.slots.get_mut(&slot) {
            plugged.drive.wwn = u64::from_str_radix(wwn.to_string().trim_start_matches("0x"), 16).ok();
        }
        if let Some(shown) = self.in_slot(slot) {
            shown.wwn = Some(wwn);
        }
    }

    /// Makes the disk in a slot take no writes, now and whenever it is found again.
    pub(super) fn write_protect(&mut self, slot: u32) {
        if let Some(plugged) = self.slots.get_mut(&slot) {
            plugged.drive.readonly = true;
        }
        if let Some(shown) = self.in_slot(slot) {
            shown.device.set_readonly();
        }
    }

    pub(super) fn list(&self) -> Vec<Disk> {
        self.disks.values().map(Shown::as_disk).collect()
    }

    pub(super) fn listed(&self, name: &str) -> Option<Disk> {
        self.disks.get(name).map(Shown::as_disk)
    }

    /// The device of a number.
    pub(super) fn device(&self, number: DeviceNumber) -> Option<Arc<Device>> {
        let disks = self.disks.values().map(|shown| &shown.device);
        let mut all = disks.chain(self.mappings.iter().map(|mapping| &mapping.device));
        all.find(|device| device.number == number).cloned()
    }

    /// Whether something in the kernel has the device for itself.
    pub(super) fn is_claimed(&self, device: &Arc<Device>) -> bool {
        self.is_mounted(device) || !self.holders(device).is_empty()
    }

    /// The devices that are made of a device.
    pub(super) fn holders(&self, device: &Arc<Device>) -> Vec<String> {
        let over =
            |mapping: &&Opened| mapping.device.over().is_some_and(|(over, _)| Arc::ptr_eq(over, device));
        self.mappings.iter().filter(over).map(|mapping| mapping.device.name.clone()).collect()
    }

    /// Whether a file system on the device is mounted, in whatever namespace.
    pub(super) fn is_mounted(&self, device: &Arc<Device>) -> bool {
        let of = |fs: &FileSystem| fs.device.as_ref().is_some_and(|own| Arc::ptr_eq(own, device));
        self.filesystems.values().any(of)
    }

    /// The power goes and comes back: nothing is written out, nothing is mounted, and the disks of the hypervisor are found anew.
    pub(super) fn restart(&mut self) {
        let root = self.boot_disk();
        self.power_off();
        self.boot();
        self.put_back(root);
        let slots: Vec<u32> = self.slots.keys().copied().collect();
        for slot in slots {
            self.discover(slot);
        }
    }

    /// The power goes.
    pub(super) fn power_off(&mut self) {
        let names: Vec<String> = self.disks.keys().cloned().collect();
        for name in &names {
            self.delete(name);
        }
        for mapping in self.mappings.drain(..) {
            mapping.device.goes();
        }
        self.dead.clear();
        self.held.clear();
        let root = self.boot_disk();
        self.filesystems.clear();
        self.namespaces.clear();
        self.boot();
        self.put_back(root);
    }

    /// All processes that have a device open end.
    pub(super) fn close_all(&mut self) {
        let disks = self.disks.values().map(|shown| &shown.device);
        for device in disks.chain(self.mappings.iter().map(|mapping| &mapping.device)).chain(&self.dead) {
            device.close_all();
        }
    }

    /// Whether a node of a name is there, and which number it has.
    pub(super) fn node(&self, name: &str) -> Option<DeviceNumber> {
        self.nodes.get(name).copied()
    }
}

/// The number of the disk with this index (Linux `drivers/scsi/sd.c`, `sd_major`): 16 for each disk, 16 disks for each major number.
fn number_of(index: u32) -> DeviceNumber {
    const MAJORS: [u32; 8] = [8, 65, 66, 67, 68, 69, 70, 71];
    let major = usize::try_from(index / 16).ok().and_then(|at| MAJORS.get(at)).copied().unwrap_or(128);
    DeviceNumber { major, minor: index % 16 * 16 }
}
