//! VMs: their config as it is and as it is pending, what QEMU has, and changes.
//!
//! [`VmConfig`] is the truth of a config: current values, pending values and pending deletes, with the digest of just that state.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ApiError,
    client::{Call, Client},
    limits::Class,
    wire,
};
use crate::types::{Bytes, NodeName, ScsiSlot, Upid, VmId, VolId, props::PropertyString};

/// A VM's config: `GET …/pending`. Source: qemu-server `API2/Qemu.pm`, `vm_pending`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmConfig {
    digest: String,
    entries: BTreeMap<String, Entry>,
}

/// A key of a config.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// The value in force.
    pub current: Option<String>,
    /// The value that takes its place when it can, at the latest at the next start.
    pub pending: Option<String>,
    /// Whether the key is to be deleted when that can be done.
    pub pending_delete: bool,
}

/// A drive of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    properties: PropertyString,
}

impl Drive {
    /// Reads a drive string; `None` where it is none.
    pub fn read(text: &str) -> Option<Self> {
        text.parse().ok().map(|properties| Self { properties })
    }

    /// The volume as Proxmox prints it, `none` for an empty CD-ROM drive.
    pub fn volid(&self) -> Option<&str> {
        self.properties.bare().or_else(|| self.properties.get("file"))
    }

    /// Whether the drive is just this volume.
    pub fn is(&self, volid: &VolId) -> bool {
        self.volid() == Some(volid.to_string().as_str())
    }

    /// The option `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.properties.get(key)
    }

    /// Whether QEMU may only read it (`ro`).
    pub fn is_read_only(&self) -> bool {
        self.get("ro").is_some_and(|value| matches!(value, "1" | "on" | "yes" | "true"))
    }

    /// The size that was asked for, which is the size a running QEMU was told.
    pub fn size(&self) -> Option<Bytes> {
        self.properties.get("size")?.parse().ok()
    }
}

/// A volume in a config.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeKey {
    /// The volume as Proxmox prints it.
    pub volid: String,
    /// The key.
    pub key: String,
    /// The drive's WWN as it stands there.
    pub wwn: Option<String>,
    /// Whether QEMU may only read it.
    pub read_only: bool,
}

/// Whether a key is a drive: a place where QEMU gets a volume from (qemu-server `QemuServer/Drive.pm`, and `vmstate`).
fn is_drive(key: &str) -> bool {
    key == "vmstate"
        || matches!(numbered(key), Some("scsi" | "virtio" | "sata" | "ide" | "efidisk" | "tpmstate"))
}

/// Whether a key is a mere reference to a volume that the VM does not use. **Deleting it destroys the volume where the VM owns it**
/// (qemu-server `QemuServer.pm:try_deallocate_drive`).
pub fn is_unused(key: &str) -> bool {
    numbered(key) == Some("unused")
}

/// The part of a key before its number.
fn numbered(key: &str) -> Option<&str> {
    let stem = key.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.len() < key.len()).then_some(stem)
}

impl VmConfig {
    /// The digest of this very state, for a compare-and-swap.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The entry of a key.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// The value in force of a key.
    pub fn current(&self, key: &str) -> Option<&str> {
        self.entries.get(key)?.current.as_deref()
    }

    /// The drives that are `volid`, in force or pending. `unusedN` is no drive.
    pub fn holders_of<'a>(&'a self, volid: &'a VolId) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        let holds = |text: &Option<String>| {
            text.as_deref().and_then(Drive::read).is_some_and(|drive| drive.is(volid))
        };
        self.entries
            .iter()
            .filter(move |(key, entry)| is_drive(key) && (holds(&entry.current) || holds(&entry.pending)))
            .map(|(key, entry)| (key.as_str(), entry))
    }

    /// The volumes of all drives, in force and pending, and of all `unusedN`.
    pub fn volumes(&self) -> impl Iterator<Item = VolumeKey> {
        self.entries.iter().filter(|(key, _)| is_drive(key) || is_unused(key)).flat_map(|(key, entry)| {
            let read = |text: &Option<String>| {
                let drive = Drive::read(text.as_deref()?)?;
                let wwn = drive.get("wwn").map(str::to_owned);
                let volid = drive.volid()?.to_owned();
                Some(VolumeKey { volid, key: key.clone(), wwn, read_only: drive.is_read_only() })
            };
            let both: BTreeSet<VolumeKey> =
                [read(&entry.current), read(&entry.pending)].into_iter().flatten().collect();
            both
        })
    }

    /// The keys of drives in force, and `unusedN`.
    pub fn current_drives(&self) -> impl Iterator<Item = &str> {
        self.entries
            .iter()
            .filter(|(key, entry)| (is_drive(key) || is_unused(key)) && entry.current.is_some())
            .map(|(key, _)| key.as_str())
    }

    /// The SMBIOS uuid (`smbios1: uuid=…`).
    pub fn uuid(&self) -> Option<uuid::Uuid> {
        let smbios: PropertyString = self.current("smbios1")?.parse().ok()?;
        smbios.get("uuid")?.parse().ok()
    }

    /// What locks the VM: `backup`, `migrate`, `snapshot`, …
    pub fn lock(&self) -> Option<&str> {
        self.current("lock")
    }

    /// Whether `protection` forbids to remove drives.
    pub fn is_protected(&self) -> bool {
        self.current("protection").is_some_and(|value| value != "0")
    }

    /// Whether disks can be plugged while the VM runs (qemu-server `QemuServer.pm:parse_hotplug_features`).
    pub fn hotplugs_disks(&self) -> bool {
        match self.current("hotplug") {
            None | Some("1") => true,
            Some(features) => features.split(',').any(|feature| feature.trim() == "disk"),
        }
    }

    /// The SCSI controller model; `lsi` where none is set.
    pub fn scsi_hardware(&self) -> &str {
        self.current("scsihw").unwrap_or("lsi")
    }
}

/// What a VM's QEMU process says: `GET …/status/current`. Source: qemu-server `QemuServer.pm:vmstatus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    /// Whether there is a process.
    pub running: bool,
    /// The drives that QEMU really has, by key; `None` where it did not answer, which means unknown.
    pub drives: Option<BTreeSet<String>>,
}

impl VmStatus {
    /// Whether QEMU has the drive; `None` where that is not known. A VM that does not run has none.
    pub fn has(&self, key: &str) -> Option<bool> {
        if self.running { self.drives.as_ref().map(|drives| drives.contains(key)) } else { Some(false) }
    }
}

#[derive(Deserialize)]
struct RawEntry {
    key: String,
    #[serde(default)]
    value: Value,
    #[serde(default)]
    pending: Value,
    #[serde(default)]
    delete: Value,
}

#[derive(Deserialize)]
struct RawStatus {
    status: String,
    #[serde(default)]
    blockstat: Option<BTreeMap<String, Value>>,
    /// The version of the running QEMU: it answered, also where it has no drive to tell of.
    #[serde(default, rename = "running-qemu")]
    answered: Option<Value>,
}

#[derive(Deserialize)]
struct RawSnapshot {
    name: String,
}

impl Client {
    /// A VM's config with what is pending and the digest. Read without a lock, and answered by pveproxy itself.
    pub async fn vm_config(&self, node: &NodeName, vmid: VmId) -> Result<VmConfig, ApiError> {
        let call = Call::new("vm_config", Method::GET, &[&"nodes", node, &"qemu", &vmid, &"pending"]);
        let rows: Vec<RawEntry> = self.call(call).await?;
        let mut config = VmConfig::default();
        for row in rows {
            if row.key == "digest" {
                config.digest = wire::text(&row.value).unwrap_or_default();
                continue;
            }
            let entry = Entry {
                current: wire::text(&row.value),
                pending: wire::text(&row.pending),
                pending_delete: wire::read_flag(&row.delete),
            };
            config.entries.insert(row.key, entry);
        }
        if config.digest.is_empty() {
            return Err(ApiError::unreadable(&format!("the config of VM {vmid}"), "it has no digest"));
        }
        Ok(config)
    }

    /// What the VM's QEMU process says. Answers after 3 s where the process hangs.
    pub async fn vm_status(&self, node: &NodeName, vmid: VmId) -> Result<VmStatus, ApiError> {
        let call =
            Call::new("vm_status", Method::GET, &[&"nodes", node, &"qemu", &vmid, &"status", &"current"])
                .class(Class::Slow);
        let raw: RawStatus = self.call(call).await?;
        let drives = match (raw.blockstat, raw.answered) {
            (Some(drives), _) => Some(drives.into_keys().collect()),
            (None, Some(_)) => Some(BTreeSet::new()),
            (None, None) => None,
        };
        Ok(VmStatus { running: raw.status != "stopped", drives })
    }

    /// Sets one drive of a VM whose config still has this digest. Needs `VM.Config.Disk` on the VM and access to the volume.
    pub async fn set_drive(
        &self,
        node: &NodeName,
        vmid: VmId,
        slot: ScsiSlot,
        drive: &PropertyString,
        digest: &str,
    ) -> Result<Upid, ApiError> {
        self.change(node, vmid, "set_drive", &slot.to_string(), &drive.to_string(), digest).await
    }

    /// Takes one drive out of a VM whose config still has this digest. The volume itself stays, where its owner is not this VM.
    pub async fn delete_drive(
        &self,
        node: &NodeName,
        vmid: VmId,
        key: &str,
        digest: &str,
    ) -> Result<Upid, ApiError> {
        self.change(node, vmid, "delete_drive", "delete", key, digest).await
    }

    /// Takes a pending change of one key back.
    pub async fn revert(
        &self,
        node: &NodeName,
        vmid: VmId,
        key: &str,
        digest: &str,
    ) -> Result<Upid, ApiError> {
        self.change(node, vmid, "revert", "revert", key, digest).await
    }

    /// One key in one call: Proxmox applies several in random order and leaves some pending when one fails.
    /// Source: qemu-server `API2/Qemu.pm:update_vm_api`, `POST …/config`.
    async fn change(
        &self,
        node: &NodeName,
        vmid: VmId,
        name: &'static str,
        key: &str,
        value: &str,
        digest: &str,
    ) -> Result<Upid, ApiError> {
        let call = Call::new(name, Method::POST, &[&"nodes", node, &"qemu", &vmid, &"config"])
            .with(key, value)
            .with("digest", digest);
        self.task(call, vmid).await
    }

    /// Grows a drive to `size`. Every error but a missing privilege is only in the task.
    /// Source: qemu-server `API2/Qemu.pm`, `resize_vm`. Needs `Datastore.AllocateSpace` on the storage too.
    pub async fn resize(
        &self,
        node: &NodeName,
        vmid: VmId,
        key: &str,
        size: Bytes,
        digest: &str,
    ) -> Result<Upid, ApiError> {
        let call = Call::new("resize", Method::PUT, &[&"nodes", node, &"qemu", &vmid, &"resize"])
            .with("disk", key)
            .with("size", size.get())
            .with("digest", digest);
        self.task(call, vmid).await
    }

    /// Makes a VM without any hardware that is never meant to run. Needs `VM.Allocate` and `VM.Config.Options`.
    pub async fn create_vm(&self, node: &NodeName, vmid: VmId, name: &str) -> Result<Upid, ApiError> {
        let call = Call::new("create_vm", Method::POST, &[&"nodes", node, &"qemu"])
            .with("vmid", vmid)
            .with("name", name);
        self.task(call, vmid).await
    }

    /// Destroys a VM and the volumes it owns. Source: qemu-server `QemuServer.pm:destroy_vm`. Needs `VM.Allocate`.
    pub async fn destroy_vm(&self, node: &NodeName, vmid: VmId) -> Result<Upid, ApiError> {
        let call = Call::new("destroy_vm", Method::DELETE, &[&"nodes", node, &"qemu", &vmid]);
        self.task(call, vmid).await
    }

    /// The names of a VM's snapshots.
    pub async fn snapshots(&self, node: &NodeName, vmid: VmId) -> Result<Vec<String>, ApiError> {
        let call = Call::new("snapshots", Method::GET, &[&"nodes", node, &"qemu", &vmid, &"snapshot"]);
        let rows: Vec<RawSnapshot> = self.call(call).await?;
        // `current` is the VM itself, listed among its snapshots.
        Ok(rows.into_iter().map(|row| row.name).filter(|name| name != "current").collect())
    }

    /// The volumes that a snapshot's config references.
    pub async fn snapshot_volumes(
        &self,
        node: &NodeName,
        vmid: VmId,
        snapshot: &str,
    ) -> Result<Vec<String>, ApiError> {
        let call = Call::new("snapshot_config", Method::GET, &[&"nodes", node, &"qemu", &vmid, &"config"])
            .with("snapshot", snapshot);
        let values: BTreeMap<String, Value> = self.call(call).await?;
        let drives = values.iter().filter(|(key, _)| is_drive(key));
        let volid = |value: &Value| Drive::read(value.as_str()?)?.volid().map(str::to_owned);
        Ok(drives.filter_map(|(_, value)| volid(value)).collect())
    }

    async fn task(&self, call: Call, vmid: VmId) -> Result<Upid, ApiError> {
        self.start(call, &format!("a change of VM {vmid}")).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(rows: &[(&str, Option<&str>, Option<&str>, bool)]) -> VmConfig {
        let entry = |current: Option<&str>, pending: Option<&str>, delete: bool| Entry {
            current: current.map(str::to_owned),
            pending: pending.map(str::to_owned),
            pending_delete: delete,
        };
        let entries = rows
            .iter()
            .map(|(key, current, pending, delete)| ((*key).to_owned(), entry(*current, *pending, *delete)));
        VmConfig { digest: "d".into(), entries: entries.collect() }
    }

    #[test]
    fn a_volume_is_matched_exactly() {
        let volid: VolId = "local:9999/vm-9999-pvc-1.raw".parse().expect("a volid");
        let config = config(&[
            ("scsi1", Some("local:9999/vm-9999-pvc-1.raw,size=1G"), None, false),
            ("scsi2", Some("local:9999/vm-9999-pvc-1.raw.raw,size=1G"), None, false),
            ("scsi3", Some("local:9999/vm-9999-pvc-10.raw,size=1G"), None, false),
            ("scsi4", None, Some("file=local:9999/vm-9999-pvc-1.raw"), false),
            ("description", Some("local:9999/vm-9999-pvc-1.raw"), None, false),
            ("unused0", Some("local:9999/vm-9999-pvc-1.raw"), None, false),
            ("scsihw", Some("virtio-scsi-single"), None, false),
        ]);
        assert_eq!(config.holders_of(&volid).map(|(key, _)| key).collect::<Vec<_>>(), ["scsi1", "scsi4"]);
    }

    #[test]
    fn hotplug_is_read_as_proxmox_reads_it() {
        for (value, expected) in [
            (None, true),
            (Some("1"), true),
            (Some("0"), false),
            (Some("network,usb"), false),
            (Some("network,disk"), true),
        ] {
            assert_eq!(config(&[("hotplug", value, None, false)]).hotplugs_disks(), expected, "{value:?}");
        }
    }
}
