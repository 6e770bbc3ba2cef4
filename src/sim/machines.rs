//! VMs as Linux nodes in memory, of a cluster that keeps its contents there: what QEMU plugs in, the guest's kernel sees.

use super::guest::memory::{Drive, Machine};
use super::rules::drive::index_of;
use super::state::{QemuDrive, VolumeKey};
use super::{Image, Sim};
use std::sync::PoisonError;
use std::time::Duration;

/// How long a guest takes to see a disk (0.3 to 0.8 s, measured).
const SEEN_AFTER: Duration = Duration::from_millis(500);

impl Sim {
    /// The VM as a Linux node, with the disks that its QEMU has: a [`crate::host::Host`] for a node plugin. From now on it sees what is
    /// plugged in, taken away and resized, and loses its mounts when the VM is stopped. The same one at each call, until the VM is
    /// created anew under its id. `None` where there is no such VM, or where the cluster keeps contents in files.
    pub fn guest_of(&self, vmid: u32) -> Option<Machine> {
        let (uuid, drives) = self.read(|state| {
            let vm = state.vms.get(&vmid)?;
            let uuid: Option<uuid::Uuid> = vm.conf.uuid().and_then(|uuid| uuid.parse().ok());
            Some((uuid, vm.drives.clone()))
        })?;
        // There are contents in memory, or there is no guest in it.
        self.contents().open(std::path::Path::new(""))?;
        if let Some((of, machine)) = self.machines().get(&vmid)
            && *of == uuid
        {
            return Some(machine.clone());
        }
        let machine = Machine::new(uuid).slow_to_see(SEEN_AFTER);
        self.machines().insert(vmid, (uuid, machine.clone()));
        for (slot, drive) in &drives {
            self.plug_in_memory(vmid, slot, drive);
        }
        Some(machine)
    }

    /// What a volume holds, to be read and written behind the back of everybody; `None` where contents are in files.
    pub fn image(&self, key: &VolumeKey) -> Option<Image> {
        self.contents().open(&self.place_of(key))
    }

    fn machines(&self) -> std::sync::MutexGuard<'_, super::Machines> {
        self.inner.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self, vmid: u32) -> Option<Machine> {
        self.machines().get(&vmid).map(|(_, machine)| machine.clone())
    }

    /// QEMU has a drive.
    pub(crate) fn plug_in_memory(&self, vmid: u32, slot: &str, drive: &QemuDrive) {
        let (Some(machine), Some(number)) = (self.machine(vmid), index_of(slot, "scsi")) else { return };
        let Some(image) = self.image(&drive.volume) else { return };
        let told = super::start::guest_disk(number, std::path::PathBuf::new(), &drive.drive);
        machine.plug(number, Drive { image, size: drive.size, wwn: told.wwn, readonly: told.read_only });
    }

    /// QEMU has a drive no more.
    pub(crate) fn unplug_in_memory(&self, vmid: u32, slot: &str) {
        if let (Some(machine), Some(number)) = (self.machine(vmid), index_of(slot, "scsi")) {
            machine.unplug(number);
        }
    }

    /// QEMU shows another size of a drive.
    pub(crate) fn resize_in_memory(&self, vmid: u32, slot: &str, size: u64) {
        if let (Some(machine), Some(number)) = (self.machine(vmid), index_of(slot, "scsi")) {
            machine.resize(number, size);
        }
    }

    /// QEMU has ended.
    pub(crate) fn power_off_in_memory(&self, vmid: u32) {
        if let Some(machine) = self.machine(vmid) {
            machine.power_off();
        }
    }

    /// Makes a guest miss new controllers, or not; returns whether there is such a guest.
    pub(crate) fn blind_in_memory(&self, vmid: u32, blind: bool) -> bool {
        self.machine(vmid).map(|machine| machine.set_blind(blind)).is_some()
    }
}
