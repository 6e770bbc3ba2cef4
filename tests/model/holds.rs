//! Which VM has which of the volumes: read from the simulator's own state, never through the driver.

use proxmox_csi::{
    sim::{
        VmView,
        rules::{conf::Conf, drive::Drive},
        state::VolumeKey,
    },
    types::{NodeName, VolumeHandle, Wwn},
};

use crate::{rig::Rig, setup::VolumeSpec, support::REGION};

/// Where a VM has a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Where {
    Current,
    Pending,
    Qemu,
}

/// A VM has a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Which one.
    pub volume: usize,
    pub vm: u32,
    pub slot: String,
    pub at: Where,
    pub read_only: bool,
    /// The name its disk answers with.
    pub wwn: Option<String>,
}

/// What Proxmox calls a volume.
pub fn volid(spec: &VolumeSpec) -> String {
    spec.key.volid()
}

/// The name that the disk of a volume must answer with.
pub fn wwn(spec: &VolumeSpec) -> String {
    let handle: VolumeHandle = spec.handle.parse().expect("a handle");
    let zone: Option<NodeName> = spec.key.node.as_ref().map(|node| node.parse().expect("a node"));
    Wwn::of_volume(&REGION.parse().expect("a region"), zone.as_ref(), &handle.volid).to_string()
}

impl Rig {
    /// The volume behind a drive of a VM on this node, if it is one of ours.
    pub fn volume_of(&self, node: &str, volid: &str) -> Option<usize> {
        let is_it = |spec: &VolumeSpec| {
            spec.key.node.as_deref().is_none_or(|of| of == node)
                && volid.strip_prefix(&spec.key.storage).and_then(|rest| rest.strip_prefix(':'))
                    == Some(&spec.key.name)
        };
        self.setup.volumes.iter().position(is_it)
    }

    fn volume_at(&self, key: &VolumeKey) -> Option<usize> {
        self.setup.volumes.iter().position(|spec| spec.key == *key)
    }

    /// Every hold of every VM.
    pub fn holds(&self) -> Vec<Hold> {
        self.sim.vmids().into_iter().flat_map(|vmid| self.holds_of(vmid)).collect()
    }

    /// Every hold of a VM.
    pub fn holds_of(&self, vmid: u32) -> Vec<Hold> {
        self.sim.vm(vmid).map(|vm| self.holds_in(vmid, &vm)).unwrap_or_default()
    }

    /// Every hold of a VM as it was seen.
    pub fn holds_in(&self, vmid: u32, vm: &VmView) -> Vec<Hold> {
        let mut all = Vec::new();
        for (at, values) in [(Where::Current, &vm.conf.current), (Where::Pending, &vm.conf.pending)] {
            for (slot, text) in values {
                // A cheap look first: most keys are no drives.
                if !text.contains("9999") || slot.starts_with("unused") {
                    continue;
                }
                let Some(drive) = Drive::stored(slot, text) else { continue };
                let Some(volume) = self.volume_of(&vm.node, &drive.file) else { continue };
                let (read_only, wwn) = (drive.flag("ro"), drive.options.get("wwn").cloned());
                all.push(Hold { volume, vm: vmid, slot: slot.clone(), at, read_only, wwn });
            }
        }
        for disk in vm.guest_disks() {
            if let Some(volume) = self.volume_at(&disk.volume) {
                let slot = format!("scsi{}", disk.slot);
                let (read_only, wwn) = (disk.read_only, disk.wwn);
                all.push(Hold { volume, vm: vmid, slot, at: Where::Qemu, read_only, wwn });
            }
        }
        all
    }

    /// Snapshots that have a volume: VM and name.
    pub fn snapshots_with(&self, volume: usize) -> Vec<(u32, String)> {
        let id = volid(&self.setup.volumes[volume]);
        let mut found = Vec::new();
        for vmid in self.sim.vmids() {
            let Some(vm) = self.sim.vm(vmid) else { continue };
            for (name, values) in &vm.conf.snapshots {
                if Conf::disks(values).any(|(_, drive)| drive.file == id)
                    && self.volume_of(&vm.node, &id) == Some(volume)
                {
                    found.push((vmid, name.clone()));
                }
            }
        }
        found
    }
}
