//! The book of volumes: what Kubernetes, the storages, the configs of VMs and their QEMU say of each, side by side.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::view::{RegionView, SeenVm, Settings, View, VmFacts};
use crate::{
    k8s::inventory::{AttachmentObject, PvObject},
    pve::qemu::{Drive, is_unused},
    telemetry::log::chain,
    types::{Bytes, NodeName, Region, ScsiSlot, VmId, VolId, VolumeHandle, Wwn},
    volume::{
        Volumes,
        delete::{ExistsError, PresenceError},
    },
};

/// What tells a volume from every other, whatever its handle looks like.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The region.
    pub region: Region,
    /// The node of a local storage.
    pub zone: Option<NodeName>,
    /// The volid.
    pub volid: VolId,
}

impl Key {
    /// The key of a handle.
    pub fn of(view: &View, handle: &VolumeHandle) -> Self {
        let zone = match view.region(&handle.region) {
            Some(region) => region.zone_of(handle),
            None => handle.zone.clone(),
        };
        Self { region: handle.region.clone(), zone, volid: handle.volid.clone() }
    }

    /// The handle that a new PV of the volume would have.
    pub fn handle(&self) -> VolumeHandle {
        VolumeHandle { region: self.region.clone(), zone: self.zone.clone(), volid: self.volid.clone() }
    }

    /// The name that its disk answers with.
    pub fn wwn(&self) -> Wwn {
        Wwn::of_volume(&self.region, self.zone.as_ref(), &self.volid)
    }
}

/// Whether a storage lists a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    /// It does.
    Yes,
    /// It was listed, and the volume is not there. That is no proof: what the token may not use is left out.
    No,
    /// It was not, or could not be, listed.
    NotLooked,
}

/// How a VM holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// As a drive.
    Drive {
        /// Whether that is in force.
        current: bool,
        /// Whether it, or another volume in its place, waits for the next start.
        pending: bool,
        /// Whether its removal waits.
        deleting: bool,
        /// Whether QEMU has a drive of that key; `None` where it did not say.
        qemu: Option<bool>,
        /// The name its disk answers with.
        wwn: Option<Wwn>,
        /// Whether QEMU refuses writes to it.
        read_only: bool,
    },
    /// As `unusedN`, a mere reference.
    Unused,
    /// In a snapshot.
    Snapshot,
}

/// A VM that holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The VM.
    pub vmid: VmId,
    /// Its name.
    pub name: String,
    /// Its Proxmox node.
    pub host: NodeName,
    /// Whether it runs.
    pub running: bool,
    /// The Kubernetes node that it is.
    pub node: Option<String>,
    /// Whether it is a short-lived VM of the driver.
    pub is_holder: bool,
    /// Whether it is the placeholder of a replicated volume: a stopped VM that the Go driver made to own it, named as it is.
    pub is_placeholder: bool,
    /// The key of the drive, or the name of the snapshot.
    pub key: String,
    /// How.
    pub how: How,
}

impl Held {
    /// Whether the VM has it as a drive that takes no writes: then others may have it too.
    pub fn only_reads(&self) -> bool {
        matches!(self.how, How::Drive { read_only: true, .. })
    }

    /// Whether the VM has the volume as a drive, now or at its next start, and may use it: a placeholder never runs.
    pub fn is_drive(&self) -> bool {
        matches!(self.how, How::Drive { .. }) && !self.is_placeholder
    }
}

/// A volume.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is.
    pub key: Key,
    /// Its PVs: one, none, or by mistake several.
    pub pvs: Vec<PvObject>,
    /// The attachments of its PVs.
    pub attachments: Vec<AttachmentObject>,
    /// The VMs that hold it.
    pub held: Vec<Held>,
    /// Whether its storage lists it.
    pub listed: Listed,
    /// Its size, by the listing.
    pub size: Option<Bytes>,
    /// Its format, by the listing.
    pub format: Option<String>,
    /// Where it was looked for because no listing had it: whether it is there, or why that can't be told.
    pub presence: Option<Result<bool, String>>,
}

/// What a volume is doing, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// One VM has it, or several that only read.
    Attached,
    /// No VM has it.
    Free,
    /// One VM is to get or to lose it at its next start.
    Pending,
    /// A short-lived VM of the driver has it.
    Holder,
    /// Several VMs have it, and not all of them only read; or one has it twice.
    Conflict,
    /// No PV of this cluster is it, and no VM has it.
    Orphan,
    /// Its storage does not list it.
    Missing,
}

impl State {
    /// All states.
    pub const ALL: [State; 7] = [
        Self::Attached,
        Self::Free,
        Self::Pending,
        Self::Holder,
        Self::Conflict,
        Self::Orphan,
        Self::Missing,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Free => "free",
            Self::Pending => "pending",
            Self::Holder => "holder",
            Self::Conflict => "conflict",
            Self::Orphan => "orphan",
            Self::Missing => "missing",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Entry {
    pub(super) fn new(key: Key) -> Self {
        Self {
            key,
            pvs: Vec::new(),
            attachments: Vec::new(),
            held: Vec::new(),
            listed: Listed::NotLooked,
            size: None,
            format: None,
            presence: None,
        }
    }

    /// Its handle: that of its PV, which is never rewritten, or the one that a new PV would have.
    pub fn handle(&self) -> String {
        self.pvs.first().map_or_else(|| self.key.handle().to_string(), |pv| pv.handle.clone())
    }

    /// The drives that are it, those of short-lived VMs left out.
    pub fn drives(&self) -> impl Iterator<Item = &Held> {
        self.held.iter().filter(|held| held.is_drive() && !held.is_holder)
    }

    /// The different VMs that have it as a drive.
    pub fn machines(&self) -> Vec<VmId> {
        let mut vmids: Vec<VmId> =
            self.held.iter().filter(|held| held.is_drive()).map(|held| held.vmid).collect();
        vmids.dedup();
        vmids
    }

    /// What it is doing. `has_cluster`: whether the PVs are known.
    pub fn state(&self, has_cluster: bool) -> State {
        let drives: Vec<&Held> = self.held.iter().filter(|held| held.is_drive()).collect();
        match drives.as_slice() {
            _ if self.presence == Some(Ok(false)) => State::Missing,
            _ if self.presence.is_none() && self.listed == Listed::No => State::Missing,
            [] if has_cluster && self.pvs.is_empty() => State::Orphan,
            [] => State::Free,
            [held] if held.is_holder => State::Holder,
            [held] => match held.how {
                How::Drive { current: true, pending: false, deleting: false, .. } => State::Attached,
                _ => State::Pending,
            },
            several if several.iter().all(|held| held.only_reads()) => State::Attached,
            _ => State::Conflict,
        }
    }
}

/// The book.
#[derive(Debug, Clone, Default)]
pub struct Book {
    /// The volumes.
    pub volumes: BTreeMap<Key, Entry>,
    /// PVs whose handle can't be read.
    pub unreadable: Vec<PvObject>,
}

impl Book {
    /// Everything that is known of every volume of the driver: of each that a PV names, and of each that belongs to the driver's owner.
    pub fn of(view: &View) -> Self {
        let mut book = Self::default();
        book.take_cluster(view);
        for region in &view.regions {
            for (vmid, vm) in &region.vms {
                if let Ok(facts) = &vm.seen {
                    book.take_vm(view, region, *vmid, vm, facts);
                }
            }
            // Last, so that what only a config names is looked for in the listings too.
            book.take_listings(&view.settings, region);
        }
        book
    }

    /// Asks for each volume of a PV that no listing has whether it is there: a listing is no proof.
    pub async fn prove(&mut self, volumes: &Volumes) {
        let doubtful =
            self.volumes.values_mut().filter(|entry| entry.listed == Listed::No && !entry.pvs.is_empty());
        for entry in doubtful {
            entry.presence = Some(is_there(volumes, &entry.key.handle()).await.map(|size| size.is_some()));
        }
    }

    fn entry(&mut self, key: Key) -> &mut Entry {
        self.volumes.entry(key.clone()).or_insert_with(|| Entry::new(key))
    }

    fn take_cluster(&mut self, view: &View) {
        let Some(cluster) = &view.cluster else { return };
        for pv in cluster.volumes.iter().flatten() {
            let Ok(handle) = pv.handle.parse::<VolumeHandle>() else {
                self.unreadable.push(pv.clone());
                continue;
            };
            let entry = self.entry(Key::of(view, &handle));
            entry.pvs.push(pv.clone());
            let mine = |one: &&AttachmentObject| one.volume.as_deref() == Some(pv.name.as_str());
            entry.attachments.extend(cluster.attachments.iter().flatten().filter(mine).cloned());
        }
    }

    fn take_listings(&mut self, settings: &Settings, region: &RegionView) {
        let owner = region.vms.get(&settings.owner).and_then(|vm| vm.seen.as_ref().ok());
        let owners_own: BTreeSet<String> =
            owner.iter().flat_map(|facts| facts.config.volumes()).map(|held| held.volid).collect();
        for listing in &region.listings {
            let Ok(images) = &listing.images else { continue };
            let here = |key: &Key| {
                key.region == region.region
                    && key.zone == listing.zone
                    && key.volid.storage == listing.storage
            };
            for entry in self.volumes.values_mut().filter(|entry| here(&entry.key)) {
                entry.listed = Listed::No;
            }
            for row in images {
                let Ok(volid) = row.volid.parse::<VolId>() else { continue };
                // A VM under the owner's own VMID has disks of its own.
                let of_vm = owners_own.contains(&row.volid);
                let ours = volid.name.owner() == Some(settings.owner) && !of_vm;
                let key = Key { region: region.region.clone(), zone: listing.zone.clone(), volid };
                if !ours && !self.volumes.contains_key(&key) {
                    continue;
                }
                let entry = self.entry(key);
                entry.listed = Listed::Yes;
                entry.size = row.size;
                entry.format = Some(row.format.clone());
            }
        }
    }

    fn take_vm(&mut self, view: &View, region: &RegionView, vmid: VmId, vm: &SeenVm, facts: &VmFacts) {
        let name = facts.config.current("name").map(str::to_owned);
        let is_placeholder = |volid: &VolId| {
            let named =
                name.as_deref().is_some_and(|name| volid.name.as_str() == format!("vm-{vmid}-{name}"));
            named && !facts.status.running
        };
        let held = |volid: &VolId, key: &str, how| Held {
            vmid,
            name: name.clone().unwrap_or_else(|| "no name".to_owned()),
            host: vm.row.node.clone(),
            running: facts.status.running,
            node: view.node_of(&region.region, &facts.config).map(|node| node.name.clone()),
            is_holder: view.settings.is_holder(vmid, name.as_deref()),
            is_placeholder: is_placeholder(volid),
            key: key.to_owned(),
            how,
        };
        for volume in facts.config.volumes() {
            let Ok(volid) = volume.volid.parse::<VolId>() else { continue };
            let wwn: Option<Wwn> = volume.wwn.as_deref().and_then(|wwn| wwn.parse().ok());
            let Some(key) = self.key_of(view, region, vm, volid.clone(), wwn) else { continue };
            let how =
                if is_unused(&volume.key) { How::Unused } else { drive(facts, &volume.key, &volid, wwn) };
            self.entry(key).held.push(held(&volid, &volume.key, how));
        }
        for (volid, snapshot) in &facts.snapshots {
            let Ok(volid) = volid.parse::<VolId>() else { continue };
            if let Some(key) = self.key_of(view, region, vm, volid.clone(), None) {
                self.entry(key).held.push(held(&volid, snapshot, How::Snapshot));
            }
        }
    }

    /// Which volume a volid in the config of a VM is, where it is one of the driver's.
    fn key_of(
        &self,
        view: &View,
        region: &RegionView,
        vm: &SeenVm,
        volid: VolId,
        wwn: Option<Wwn>,
    ) -> Option<Key> {
        let shared = region.is_shared(&volid.storage) == Some(true);
        // A VM under the owner's own VMID has disks of its own, which are none of the driver's.
        let ours = volid.name.owner() == Some(view.settings.owner) && vm.row.vmid != view.settings.owner;
        let zone = (!shared).then(|| vm.row.node.clone());
        let here = Key { region: region.region.clone(), zone, volid };
        if !shared && let Some(wwn) = wwn {
            // A failover moves configs and not disks: then the drive's own name tells which volume was meant.
            let named = self.volumes.keys().find(|key| {
                key.volid == here.volid
                    && key.region == here.region
                    && key.zone != here.zone
                    && key.wwn() == wwn
            });
            if let Some(key) = named {
                return Some(key.clone());
            }
        }
        (ours || self.volumes.contains_key(&here)).then_some(here)
    }
}

/// The size of a volume; none where it is proven not to be there. Else why that can't be told.
pub(super) async fn is_there(volumes: &Volumes, handle: &VolumeHandle) -> Result<Option<Bytes>, String> {
    match volumes.find(handle).await {
        Ok(found) => Ok(Some(found.size)),
        Err(ExistsError::Presence(PresenceError::Absent { .. })) => Ok(None),
        Err(error) => Err(chain(&error)),
    }
}

fn drive(facts: &VmFacts, key: &str, volid: &VolId, wwn: Option<Wwn>) -> How {
    let entry = facts.config.entry(key);
    let is =
        |text: Option<&String>| text.and_then(|text| Drive::read(text)).is_some_and(|drive| drive.is(volid));
    How::Drive {
        current: entry.is_some_and(|entry| is(entry.current.as_ref())),
        pending: entry.is_some_and(|entry| {
            let other = entry.pending.as_deref().and_then(Drive::read).is_some_and(|drive| !drive.is(volid));
            other || (is(entry.pending.as_ref()) && !is(entry.current.as_ref()))
        }),
        deleting: entry.is_some_and(|entry| entry.pending_delete),
        qemu: if facts.status.running { facts.status.has(key) } else { None },
        wwn,
        read_only: entry.is_some_and(|entry| {
            let values = [&entry.current, &entry.pending].into_iter().flatten();
            let drives = values.filter_map(|text| Drive::read(text)).filter(|drive| drive.is(volid));
            drives.into_iter().all(|drive| drive.get("ro") == Some("1"))
        }),
    }
}

/// SCSI drives that the QEMU of a VM has and its config does not know.
pub fn stray_drives(facts: &VmFacts) -> Vec<String> {
    let known: Vec<&str> = facts.config.current_drives().collect();
    let drives = facts.status.drives.iter().flatten();
    drives.filter(|key| key.parse::<ScsiSlot>().is_ok() && !known.contains(&key.as_str())).cloned().collect()
}
