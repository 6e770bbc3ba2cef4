//! What a test sees of a running cluster, and what it may change behind the API's back.

use super::Sim;
use super::guest::GuestRoots;
use super::locks::Held;
use super::rules::conf::Conf;
use super::rules::error::PveError;
use super::state::{QemuDrive, State, VolumeKey};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A VM at the moment of looking.
#[derive(Debug, Clone)]
pub struct VmView {
    /// Node it is on.
    pub node: String,
    /// Whether QEMU runs.
    pub running: bool,
    /// The config with pending changes, snapshots and digest.
    pub conf: Conf,
    drives: BTreeMap<String, QemuDrive>,
    hung: bool,
}

/// A disk as the VM's guest would see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisk {
    /// Slot number, the LUN of the disk.
    pub slot: u32,
    /// Volume behind it.
    pub volume: VolumeKey,
    /// Bytes the guest sees.
    pub size: u64,
    /// `0x…` as configured.
    pub wwn: Option<String>,
    /// Serial number as configured.
    pub serial: Option<String>,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Where it is.
    pub key: VolumeKey,
    /// Bytes.
    pub size: u64,
}

impl VmView {
    /// Current value of a key.
    pub fn current(&self, key: &str) -> Option<&str> {
        self.conf.current.get(key).map(String::as_str)
    }

    /// Pending value of a key.
    pub fn pending(&self, key: &str) -> Option<&str> {
        self.conf.pending.get(key).map(String::as_str)
    }

    /// Whether the key is to be deleted at the next start.
    pub fn is_pending_delete(&self, key: &str) -> bool {
        self.conf.pending_delete.contains_key(key)
    }

    /// Slots that QEMU has; `None` when the VM is stopped or QEMU does not answer.
    pub fn blockstat(&self) -> Option<BTreeSet<&str>> {
        (self.running && !self.hung).then(|| self.drives.keys().map(String::as_str).collect())
    }

    /// The SCSI disks a guest sees, whatever the config says.
    pub fn guest_disks(&self) -> Vec<GuestDisk> {
        let disk = |(slot, drive): (&String, &QemuDrive)| {
            Some(GuestDisk {
                slot: super::rules::drive::index_of(slot, "scsi")?,
                volume: drive.volume.clone(),
                size: drive.size,
                wwn: drive.drive.options.get("wwn").cloned(),
                serial: drive.drive.options.get("serial").cloned(),
                read_only: drive.drive.flag("ro"),
            })
        };
        self.drives.iter().filter_map(disk).collect()
    }

    /// The volumes QEMU really has open.
    pub fn open_volumes(&self) -> impl Iterator<Item = &VolumeKey> {
        self.drives.values().map(|drive| &drive.volume)
    }
}

impl Sim {
    /// The VM as it is now.
    pub fn vm(&self, vmid: u32) -> Option<VmView> {
        self.read(|state| {
            state.vms.get(&vmid).map(|vm| VmView {
                node: vm.node.clone(),
                running: vm.running,
                conf: vm.conf.clone(),
                drives: vm.drives.clone(),
                hung: vm.hung,
            })
        })
    }

    /// Ids of all VMs.
    pub fn vmids(&self) -> Vec<u32> {
        self.read(|state| state.vms.keys().copied().collect())
    }

    /// All volumes.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.read(|state| {
            state
                .volumes
                .iter()
                .map(|(key, volume)| VolumeInfo { key: key.clone(), size: volume.size })
                .collect()
        })
    }

    /// What follows `Authorization: ` for each token that is taken, by its id.
    pub fn token_headers(&self) -> BTreeMap<String, String> {
        self.read(|state| {
            let good = state.tokens.iter().filter_map(|(id, secret)| Some((id, secret.as_ref()?)));
            good.map(|(id, secret)| (id.clone(), format!("PVEAPIToken={id}={secret}"))).collect()
        })
    }

    /// Where the sysfs and dev trees of a VM's guest are, if it stands for this machine.
    pub fn guest_roots(&self, vmid: u32) -> Option<GuestRoots> {
        self.guests().and_then(|guests| guests.roots(vmid))
    }

    /// Sets a key of a VM's current config, or takes it away; returns whether there is such a VM.
    pub fn set_vm_key(&self, vmid: u32, key: &str, value: Option<&str>) -> bool {
        self.change(|state| {
            let Some(vm) = state.vms.get_mut(&vmid) else { return false };
            match value {
                Some(value) => vm.conf.current.insert(key.to_owned(), value.to_owned()),
                None => vm.conf.current.remove(key),
            };
            true
        })
    }

    /// Stops a VM as if its power had been cut; returns whether there is such a VM.
    pub async fn stop_vm(&self, vmid: u32) -> bool {
        super::api::power::cut(self, vmid).await
    }

    /// Starts a VM as `status/start` does.
    pub async fn start_vm(&self, vmid: u32) -> Result<(), PveError> {
        super::api::power::power_on(self, vmid).await
    }

    /// Puts a VM on another node, as a migration leaves it; returns whether both are there.
    pub fn move_vm(&self, vmid: u32, node: &str) -> bool {
        self.change(|state| {
            let known = state.nodes.contains_key(node);
            match state.vms.get_mut(&vmid) {
                Some(vm) if known => {
                    node.clone_into(&mut vm.node);
                    true
                }
                _ => false,
            }
        })
    }

    /// Sets what the HA manager makes of a VM, such as `fence` or `recovery`, for no manager runs here; returns whether there is such a
    /// VM (pve-ha-manager `Manager.pm:$valid_service_states`).
    pub fn set_ha_state(&self, vmid: u32, state: Option<&str>) -> bool {
        self.change(|all| {
            let vm = all.vms.get_mut(&vmid);
            vm.map(|vm| vm.hastate = state.map(str::to_owned)).is_some()
        })
    }

    /// Takes a VM away with its config, leaving every volume.
    pub fn forget_vm(&self, vmid: u32) -> bool {
        self.change(|state| state.vms.remove(&vmid).is_some())
    }

    /// Holds the lock of a VM's config, as another process would.
    pub async fn hold_vm_lock(&self, vmid: u32) -> Option<Held> {
        self.locks().vm(vmid).await.ok()
    }

    /// The whole state as JSON: what `GET /_sim/state` answers.
    pub fn dump(&self) -> Value {
        self.read(|state: &State| {
            let volumes: Vec<Value> = state
                .volumes
                .iter()
                .map(|(key, volume)| {
                    json!({
                        "volid": key.volid(),
                        "node": key.node,
                        "size": volume.size,
                        "format": volume.format,
                        "image": volume.image,
                    })
                })
                .collect();
            json!({
                "nodes": state.nodes,
                "storages": state.storages,
                "volumes": volumes,
                "vms": state.vms,
                "tasks": state.tasks,
                "qemu": self.inner.real.as_ref().map(|machines| machines.dump()),
                "faults": state.faults.all(),
                "unmodelled": state.unmodelled,
            })
        })
    }
}
