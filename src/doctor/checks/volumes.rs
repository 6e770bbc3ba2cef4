//! PVs and what lies on the storages: read, there, large enough, within reach, and nothing left over.

use std::collections::BTreeMap;

use super::{Code, Finding, Report, View, joined, quoted};
use crate::{
    doctor::book::{Book, Entry, How, Listed},
    k8s::{
        inventory::{NodeObject, PvObject},
        node::ZONE,
    },
    types::VmId,
};

/// Where findings of this kind stand.
const AREA: &str = "volumes";

pub(super) fn check(view: &View, book: &Book, report: &mut Report) {
    for pv in &book.unreadable {
        let text = format!(
            "PV `{}` has the handle `{}`, which is none: it must have the form `region/zone/storage/name`",
            pv.name, pv.handle
        );
        report.find(
            Finding::new(Code::PvHandle, AREA, &pv.name, text)
                .hint("nothing can be done with it by this driver"),
        );
    }
    for listing in view.regions.iter().flat_map(|region| region.listings.iter().map(move |one| (region, one)))
    {
        let (region, listing) = listing;
        if let Err(why) = &listing.images {
            let on = listing.zone.as_ref().map(|zone| format!(" on `{zone}`")).unwrap_or_default();
            report.unseen(&region.area(), format!("what lies on storage `{}`{on}: {why}", listing.storage));
        }
    }
    if view.regions.iter().all(|region| region.listings.is_empty()) {
        report.unseen(AREA, "volumes without a PV, and PVs without a volume: no storage was listed");
    }
    for entry in book.volumes.values() {
        one(view, entry, report);
    }
    snapshots(book, report);
}

fn one(view: &View, entry: &Entry, report: &mut Report) {
    let handle = entry.handle();
    let find = |code, text: String| Finding::new(code, AREA, &handle, text);
    let names = joined(entry.pvs.iter().map(|pv| format!("`{}`", pv.name)));
    if let [_, _, ..] = entry.pvs.as_slice() {
        let text = format!("PVs {names} are all the volume `{}`", entry.key.volid);
        report.find(find(Code::PvTwice, text).hint("two claims would share one disk: delete one of the PVs, with `persistentVolumeReclaimPolicy: Retain` set before"));
    }
    let Some(region) = view.region(&entry.key.region) else {
        let known = joined(view.regions.iter().map(|region| &region.region));
        let text = format!(
            "PV {names} is in region `{}`, which is not configured (known: {known})",
            entry.key.region
        );
        report.find(
            find(Code::PvHandle, text)
                .hint("add it to the clusters of the configuration under this very name"),
        );
        return;
    };
    match &entry.presence {
        Some(Ok(false)) => {
            let text = format!("the volume of PV {names} is not on storage `{}`", entry.key.volid.storage);
            report.find(find(Code::VolumeMissing, text).hint(
                "somebody deleted or renamed it. Restore it from a backup under this very name, or delete the PV and its claim",
            ));
        }
        Some(Err(why)) => {
            let text = format!("it can not be told whether the volume of PV {names} is there: {why}");
            report.find(find(Code::VolumeUnproven, text));
        }
        Some(Ok(true)) | None => {}
    }
    for pv in &entry.pvs {
        if let (Some(size), Some(capacity)) = (entry.size, pv.capacity)
            && size.get() < capacity
        {
            let text = format!(
                "the volume of PV `{}` has {size}, and the PV says {}",
                pv.name,
                crate::types::Bytes::new(capacity)
            );
            report.find(find(Code::VolumeSize, text).hint(
                "an expansion did not reach the disk, or the volume was replaced: ask for a size above both",
            ));
        }
        reach(view, pv, report);
    }
    if view.knows_volumes() && entry.pvs.is_empty() && entry.listed == Listed::Yes && entry.held.is_empty() {
        let size = entry.size.map(|size| format!(" ({size})")).unwrap_or_default();
        let host = entry.key.zone.as_ref().map_or_else(|| "any node".to_owned(), ToString::to_string);
        let text = format!("no PV is the volume `{}`{size}, and no VM holds it", entry.key.volid);
        let mut finding = find(Code::VolumeOrphan, text).hint(
            "its PV was deleted with `Retain`, or by hand, or it is of another cluster that shares this Proxmox. Look at it before anything else: a PV with this handle brings it back",
        );
        if region.owner_exists == Ok(false) {
            finding = finding.command(format!(
                "pvesm free {}   # on {host}; DESTROYS ITS DATA, and no check is made",
                quoted(&entry.key.volid.to_string())
            ));
        }
        report.find(finding);
    }
}

/// Whether a Node fits a PV, now and once zone labels are true.
fn reach(view: &View, pv: &PvObject, report: &mut Report) {
    let Some(Ok(nodes)) = view.cluster.as_ref().map(|cluster| &cluster.nodes) else { return };
    if pv.affinity.is_empty() || nodes.is_empty() || pv.deleting {
        return;
    }
    let now = nodes.iter().any(|node| pv.fits(&node.labels));
    let then = nodes.iter().any(|node| pv.fits(&true_labels(view, node)));
    let wanted = affinity(pv);
    let claim = pv.claim.as_deref().map(|claim| format!(" of claim {claim}")).unwrap_or_default();
    let find = |code, text| Finding::new(code, AREA, &pv.name, text);
    match (now, then) {
        (true, true) => {}
        (false, after) => {
            let text = format!("PV `{}`{claim} wants {wanted}, which no Node has", pv.name);
            let hint = if after {
                "a Node would fit once its zone label is true: see node-zone"
            } else {
                "its node affinity can't be changed. Bring a worker VM to where the volume is, or copy its data to a new volume"
            };
            report.find(find(Code::PvStranded, text).hint(hint));
        }
        (true, false) => {
            let text = format!(
                "PV `{}`{claim} wants {wanted}; the Nodes that have it are labelled so and are elsewhere",
                pv.name
            );
            report.find(find(Code::PvWouldStrand, text).hint(
                "it is out of reach already if its storage is local. Migrate a worker VM back before you correct the labels, or copy its data to a new volume",
            ));
        }
    }
}

fn true_labels(view: &View, node: &NodeObject) -> BTreeMap<String, String> {
    let mut labels = node.labels.clone();
    if let Ok(Some(record)) = &node.record
        && let [(_, vm, _)] = view.vms_of(record).collect::<Vec<_>>().as_slice()
    {
        labels.insert(ZONE.to_owned(), vm.row.node.to_string());
    }
    labels
}

fn affinity(pv: &PvObject) -> String {
    let term = |term: &crate::k8s::inventory::Term| {
        term.iter()
            .map(|(key, values)| format!("{key}={}", values.join("|")))
            .collect::<Vec<_>>()
            .join(" and ")
    };
    pv.affinity.iter().map(term).collect::<Vec<_>>().join(", or ")
}

/// Snapshots of VMs that hold volumes, one finding for each.
fn snapshots(book: &Book, report: &mut Report) {
    let mut seen: BTreeMap<(VmId, &str), Vec<String>> = BTreeMap::new();
    for entry in book.volumes.values() {
        for held in entry.held.iter().filter(|held| held.how == How::Snapshot) {
            seen.entry((held.vmid, &held.key)).or_default().push(entry.key.volid.to_string());
        }
    }
    for ((vmid, snapshot), volids) in seen {
        let text = format!("snapshot `{snapshot}` of VM {vmid} holds {}", joined(&volids));
        report.find(
            Finding::new(Code::VmSnapshot, AREA, format!("VM {vmid}"), text)
                .hint("none of them is deleted while the snapshot is there; take no snapshots of VMs with volumes")
                .command(format!("qm delsnapshot {vmid} {snapshot}")),
        );
    }
}
