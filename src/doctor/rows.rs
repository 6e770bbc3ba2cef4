//! The book as rows: one volume each, plain text and numbers, for tables and for programs.

use serde::Serialize;

use super::{
    book::{Book, Entry, Held, How, State},
    view::View,
};

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its handle.
    pub handle: String,
    /// The region.
    pub region: String,
    /// The Proxmox node of a local storage; absent for a shared one.
    pub zone: Option<String>,
    /// The storage.
    pub storage: String,
    /// Its name on the storage.
    pub name: String,
    /// The VMID that owns it, where its name says so.
    pub owner: Option<u32>,
    /// What it is doing.
    pub state: State,
    /// Its size; absent where its storage was not listed.
    pub size_bytes: Option<u64>,
    /// Its format.
    pub format: Option<String>,
    /// The name that its disk answers with, when it was attached by this driver.
    pub wwn: String,
    /// The VMs that hold it.
    pub held_by: Vec<HeldBy>,
    /// Its PV.
    pub pv: Option<String>,
    /// `namespace/name` of its claim.
    pub claim: Option<String>,
    /// Its class.
    pub storage_class: Option<String>,
    /// Phase of the PV.
    pub phase: Option<String>,
    /// What becomes of it with its PV.
    pub reclaim_policy: Option<String>,
    /// The Nodes that a VolumeAttachment names.
    pub attachments: Vec<String>,
}

/// A VM that holds a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeldBy {
    /// The VM.
    pub vmid: u32,
    /// Its name.
    pub vm: String,
    /// Its Proxmox node.
    pub host: String,
    /// The Kubernetes node that it is.
    pub node: Option<String>,
    /// `drive`, `placeholder` (the stopped owner of a replicated volume), `unused` or `snapshot`.
    pub kind: &'static str,
    /// The slot, the `unusedN`, or the name of the snapshot.
    pub key: String,
    /// Whether a drive is in force in the config.
    pub in_force: bool,
    /// Whether a change of the slot waits for the next start.
    pub pending: bool,
    /// Whether QEMU refuses writes to a drive.
    pub read_only: bool,
    /// Whether QEMU has a drive in the slot; absent where the VM does not run or QEMU did not say.
    pub in_qemu: Option<bool>,
}

impl HeldBy {
    pub(super) fn of(held: &Held) -> Self {
        let (kind, in_force, pending, in_qemu) = match &held.how {
            How::Drive { current, pending, deleting, qemu, .. } => {
                ("drive", *current, *pending || *deleting, *qemu)
            }
            How::Unused => ("unused", true, false, None),
            How::Snapshot => ("snapshot", true, false, None),
        };
        let kind = if held.is_placeholder { "placeholder" } else { kind };
        Self {
            vmid: held.vmid.get(),
            vm: held.name.clone(),
            host: held.host.to_string(),
            node: held.node.clone(),
            kind,
            key: held.key.clone(),
            in_force,
            pending,
            read_only: held.only_reads(),
            in_qemu,
        }
    }
}

impl Row {
    pub(super) fn of(entry: &Entry, knows_volumes: bool) -> Self {
        let pv = entry.pvs.first();
        let names = entry.attachments.iter().map(|one| {
            let how = match (one.attached, one.deleting) {
                (_, true) => " (detaching)",
                (false, false) => " (attaching)",
                (true, false) => "",
            };
            format!("{}{how}", one.node)
        });
        Self {
            handle: entry.handle(),
            region: entry.key.region.to_string(),
            zone: entry.key.zone.as_ref().map(ToString::to_string),
            storage: entry.key.volid.storage.to_string(),
            name: entry.key.volid.name.to_string(),
            owner: entry.key.volid.name.owner().map(crate::types::VmId::get),
            state: entry.state(knows_volumes),
            size_bytes: entry.size.map(crate::types::Bytes::get),
            format: entry.format.clone(),
            wwn: entry.key.wwn().to_string(),
            held_by: entry.held.iter().map(HeldBy::of).collect(),
            pv: pv.map(|pv| pv.name.clone()),
            claim: pv.and_then(|pv| pv.claim.clone()),
            storage_class: pv.and_then(|pv| pv.class.clone()),
            phase: pv.map(|pv| pv.phase.clone()),
            reclaim_policy: pv.and_then(|pv| pv.reclaim.clone()),
            attachments: names.collect(),
        }
    }
}

/// Which volumes are asked for; what is not given does not matter.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// The region.
    pub region: Option<String>,
    /// The storage.
    pub storage: Option<String>,
    /// The Proxmox node of a local storage.
    pub zone: Option<String>,
    /// A Kubernetes node, a VM's name or a VMID that holds it.
    pub node: Option<String>,
    /// The namespace of the claim.
    pub namespace: Option<String>,
    /// What it is doing: any of these, or all where there is none.
    pub states: Vec<State>,
}

impl Filter {
    fn takes(&self, row: &Row) -> bool {
        let is = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        let held_there = |node: &str| {
            row.held_by.iter().any(|held| {
                held.node.as_deref() == Some(node) || held.vm == node || held.vmid.to_string() == node
            })
        };
        is(&self.region, Some(&row.region))
            && is(&self.storage, Some(&row.storage))
            && is(&self.zone, row.zone.as_deref())
            && self.node.as_deref().is_none_or(held_there)
            && is(&self.namespace, row.claim.as_deref().and_then(|claim| claim.split('/').next()))
            && (self.states.is_empty() || self.states.contains(&row.state))
    }
}

/// The volumes that a filter takes, by region, zone and name.
pub fn rows(view: &View, book: &Book, filter: &Filter) -> Vec<Row> {
    let knows = view.knows_volumes();
    book.volumes.values().map(|entry| Row::of(entry, knows)).filter(|row| filter.takes(row)).collect()
}

/// What could not be looked at, so that rows may lack or be incomplete.
pub fn gaps(view: &View, wanted_listings: bool) -> Vec<String> {
    let mut gaps = Vec::new();
    if view.cluster.is_none() {
        gaps.push("Kubernetes was not asked (--kubeconfig): PVs are not known".to_owned());
    }
    if let Some(cluster) = &view.cluster {
        for (kind, why) in [
            ("PVs", cluster.volumes.as_ref().err()),
            ("VolumeAttachments", cluster.attachments.as_ref().err()),
        ] {
            gaps.extend(why.map(|why| format!("{kind} can not be listed: {why}")));
        }
    }
    if !wanted_listings {
        gaps.push(
            "storages were not listed (--fast): sizes, orphans and missing volumes are not known".to_owned(),
        );
    }
    for region in &view.regions {
        if let Err(why) = &region.resources {
            gaps.push(format!("region {}: {why}", region.region));
        }
        for (vmid, vm) in &region.vms {
            if let Err(why) = &vm.seen {
                gaps.push(format!("region {}: VM {vmid} can not be read: {why}", region.region));
            }
        }
        for listing in &region.listings {
            if let Err(why) = &listing.images {
                gaps.push(format!(
                    "region {}: storage {} can not be listed: {why}",
                    region.region, listing.storage
                ));
            }
        }
    }
    gaps
}

/// Whether any gap means that volumes may be there that no row shows, though all were asked for.
pub fn is_incomplete(view: &View) -> bool {
    view.regions.iter().any(|region| {
        region.resources.is_err()
            || region.vms.values().any(|vm| vm.seen.is_err())
            || region.listings.iter().any(|listing| listing.images.is_err())
    }) || view
        .cluster
        .as_ref()
        .is_some_and(|cluster| cluster.volumes.is_err() || cluster.attachments.is_err())
}
