//! VMs that stand for this machine: their disks are loop devices, listed in a sysfs and a dev tree of each VM's own
//! which a node plugin reads instead of `/sys` and `/dev`.
//!
//! The trees hold ordinary files. Writes to `delete`, `scan` and `rescan` are noticed by inotify and take effect a few
//! milliseconds after the write has returned, not before it as in a kernel. Two more differences: a disk that was
//! taken away while mounted goes on serving that mount until it is unmounted (its loop device lives as long as a user
//! of it), and every disk has a controller of its own whatever `scsihw` says. The trees must be on a filesystem that
//! allows device nodes. `plug` is the function to read first.

pub mod cut;
mod identity;
pub mod memory;
mod tree;
mod watch;

use crate::host::linux::loopdev::LoopDevice;
use rustix::fd::OwnedFd;
use rustix::fs::inotify;
use std::collections::BTreeMap;
use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tree::{Place, Tree};
use watch::Watched;

/// A disk as the hypervisor plugs it.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Slot number and LUN.
    pub slot: u32,
    /// File with the contents.
    pub image: PathBuf,
    /// World wide name.
    pub wwn: Option<u64>,
    /// Serial number.
    pub serial: Option<String>,
    /// Whether it says that nothing rotates.
    pub ssd: bool,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The trees of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRoots {
    /// Stands for `/sys`.
    pub sys: PathBuf,
    /// Stands for `/dev`.
    pub dev: PathBuf,
}

/// All guests of a cluster. Its calls block: run them off the async runtime.
#[derive(Debug)]
pub struct Guests {
    directory: PathBuf,
    inner: Mutex<Inner>,
    inotify: OwnedFd,
}

#[derive(Debug, Default)]
struct Inner {
    guests: BTreeMap<u32, Guest>,
    watches: BTreeMap<i32, Watched>,
}

#[derive(Debug)]
struct Guest {
    tree: Tree,
    disks: BTreeMap<u32, Plugged>,
    diskseq: u64,
    /// Controllers stay unseen until the PCI bus is scanned again.
    blind: bool,
}

/// A disk the hypervisor has plugged in.
#[derive(Debug)]
struct Plugged {
    disk: Disk,
    /// Host number once the guest has seen the controller.
    host: Option<u32>,
    /// The disk in the guest's tree; absent after the guest deleted it.
    shown: Option<Shown>,
}

#[derive(Debug)]
struct Shown {
    name: String,
    device: LoopDevice,
}

impl Guests {
    /// Makes `guests` under the directory, in place of what an earlier run has left there.
    pub fn create(directory: &Path) -> Result<Self> {
        let directory = directory.join("guests");
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::create_dir_all(&directory)?;
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        Ok(Self { directory, inner: Mutex::default(), inotify })
    }

    /// The directory with all trees.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a guest without disks.
    pub fn add_machine(&self, vmid: u32, uuid: Option<&str>) -> Result<()> {
        let tree = Tree::create(&self.directory.join(vmid.to_string()), uuid)?;
        let mut inner = self.lock();
        self.watch_directory(&mut inner, &tree.bus_watch(), Watched::Bus { vmid })?;
        inner.guests.insert(vmid, Guest { tree, disks: BTreeMap::new(), diskseq: 0, blind: false });
        Ok(())
    }

    /// Where a guest's trees are.
    pub fn roots(&self, vmid: u32) -> Option<GuestRoots> {
        let inner = self.lock();
        let tree = &inner.guests.get(&vmid)?.tree;
        Some(GuestRoots { sys: tree.sys.clone(), dev: tree.dev.clone() })
    }

    /// Makes a guest miss new controllers until its PCI bus is scanned again, as q35 machines without ACPI hotplug do.
    /// Returns whether there is such a guest.
    pub fn set_blind(&self, vmid: u32, blind: bool) -> bool {
        self.lock().guests.get_mut(&vmid).map(|guest| guest.blind = blind).is_some()
    }

    /// Plugs a disk into a guest, with a controller of its own. A guest that is not one is left alone.
    pub fn plug(&self, vmid: u32, disk: Disk) -> Result<()> {
        let mut inner = self.lock();
        let Some(guest) = inner.guests.get_mut(&vmid) else { return Ok(()) };
        let (slot, blind) = (disk.slot, guest.blind);
        guest.disks.insert(slot, Plugged { disk, host: None, shown: None });
        let result = if blind { Ok(()) } else { self.discover(&mut inner, vmid, slot) };
        if result.is_err() {
            // A disk that could not be shown is not plugged: QEMU takes back what it has begun.
            let _ = Self::take_out(&mut inner, vmid, slot);
        }
        result
    }

    /// The guest notices a controller and scans it.
    fn discover(&self, inner: &mut Inner, vmid: u32, slot: u32) -> Result<()> {
        let Some(guest) = inner.guests.get_mut(&vmid) else { return Ok(()) };
        let taken: Vec<u32> = guest.disks.values().filter_map(|disk| disk.host).collect();
        let Some(plugged) = guest.disks.get_mut(&slot) else { return Ok(()) };
        if plugged.host.is_some() {
            return Ok(());
        }
        let host = (0..u32::MAX).find(|host| !taken.contains(host)).unwrap_or_default();
        let place = Place { slot, host };
        plugged.host = Some(host);
        guest.tree.add_host(place)?;
        let watched = guest.tree.host_watch(place);
        self.watch_directory(inner, &watched, Watched::Host { vmid, slot })?;
        self.scan(inner, vmid, slot)
    }

    /// The guest scans a LUN: a disk that is not in its tree comes back under the next free name.
    fn scan(&self, inner: &mut Inner, vmid: u32, slot: u32) -> Result<()> {
        let Some(guest) = inner.guests.get_mut(&vmid) else { return Ok(()) };
        let Some(plugged) = guest.disks.get_mut(&slot) else { return Ok(()) };
        let (Some(host), None) = (plugged.host, &plugged.shown) else { return Ok(()) };
        let place = Place { slot, host };
        let device = LoopDevice::attach(&plugged.disk.image, plugged.disk.read_only)?;
        let size = std::fs::metadata(&plugged.disk.image)?.len();
        let name = (0..u32::MAX).map(disk_name).find(|name| !guest.tree.has(name)).unwrap_or_default();
        guest.diskseq += 1;
        if let Err(error) = guest.tree.add_disk(place, &name, &plugged.disk, &device, size, guest.diskseq) {
            // What stands half way must not be found.
            let _ = guest.tree.remove_disk(place, &name, &plugged.disk);
            return Err(error);
        }
        plugged.shown = Some(Shown { name, device });
        let watched = guest.tree.disk_watch(place);
        self.watch_directory(inner, &watched, Watched::Disk { vmid, slot })
    }

    /// The guest deletes a disk: it leaves the tree whoever uses it, and the hypervisor keeps it.
    fn delete(inner: &mut Inner, vmid: u32, slot: u32) -> Result<()> {
        let Some(guest) = inner.guests.get_mut(&vmid) else { return Ok(()) };
        let Some(plugged) = guest.disks.get_mut(&slot) else { return Ok(()) };
        let (Some(host), Some(shown)) = (plugged.host, plugged.shown.take()) else { return Ok(()) };
        guest.tree.remove_disk(Place { slot, host }, &shown.name, &plugged.disk)
    }

    fn take_out(inner: &mut Inner, vmid: u32, slot: u32) -> Result<()> {
        let deleted = Self::delete(inner, vmid, slot);
        inner.watches.retain(|_, watched| {
            !matches!(watched, Watched::Host { vmid: v, slot: s } | Watched::Disk { vmid: v, slot: s }
                if *v == vmid && *s == slot)
        });
        let Some(guest) = inner.guests.get_mut(&vmid) else { return Ok(()) };
        let host = guest.disks.remove(&slot).and_then(|plugged| plugged.host);
        deleted?;
        host.map_or(Ok(()), |host| guest.tree.remove_host(Place { slot, host }))
    }

    /// Takes a disk and its controller out; the guest is not asked.
    pub fn unplug(&self, vmid: u32, slot: u32) -> Result<()> {
        Self::take_out(&mut self.lock(), vmid, slot)
    }

    /// Takes every disk of a guest out.
    pub fn unplug_all(&self, vmid: u32) -> Result<()> {
        let mut inner = self.lock();
        let slots: Vec<u32> =
            inner.guests.get(&vmid).map(|g| g.disks.keys().copied().collect()).unwrap_or_default();
        slots.into_iter().try_for_each(|slot| Self::take_out(&mut inner, vmid, slot))
    }

    /// Tells a guest that a disk's file has grown (QEMU's `block_resize`).
    pub fn resize(&self, vmid: u32, slot: u32) -> Result<()> {
        let inner = self.lock();
        let Some((guest, plugged)) = inner.guests.get(&vmid).and_then(|g| Some((g, g.disks.get(&slot)?)))
        else {
            return Ok(());
        };
        let (Some(host), Some(shown)) = (plugged.host, &plugged.shown) else { return Ok(()) };
        shown.device.refresh_size()?;
        let size = std::fs::metadata(&plugged.disk.image)?.len();
        guest.tree.set_size(Place { slot, host }, &shown.name, size)
    }

    /// Takes everything out of every guest and removes the trees. Errors are logged: this is the way out.
    pub fn shutdown(&self) {
        let mut inner = self.lock();
        let all: Vec<(u32, u32)> = inner
            .guests
            .iter()
            .flat_map(|(vmid, g)| g.disks.keys().map(move |slot| (*vmid, *slot)))
            .collect();
        for (vmid, slot) in all {
            if let Err(error) = Self::take_out(&mut inner, vmid, slot) {
                tracing::error!(vm = vmid, slot, %error, "cannot take a disk out of a guest");
            }
        }
        inner.guests.clear();
        match std::fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(%error, "cannot remove the guests' trees");
            }
            _ => {}
        }
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// `sda` … `sdz`, `sdaa` … (Linux `drivers/scsi/sd.c:sd_format_disk_name`).
fn disk_name(index: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or_default()));
        rest /= 26;
    }
    letters.push('d');
    letters.push('s');
    letters.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_names_go_on_after_z() {
        assert_eq!(
            [0, 1, 25, 26, 27, 701, 702].map(disk_name),
            ["sda", "sdb", "sdz", "sdaa", "sdab", "sdzz", "sdaaa"]
        );
    }
}
