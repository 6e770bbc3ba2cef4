//! Nodes: which VM each is, what its labels and its registration say, and whether that VM can carry volumes.

use super::{Code, Finding, RegionView, Report, View, joined};
use crate::{
    doctor::view::{SeenVm, VmFacts},
    k8s::{
        inventory::{Inventory, NodeObject, Registration},
        node::{OWN_REGION, OWN_ZONE, REGION, ZONE},
    },
    types::{ScsiSlot, VmId, VolId, Wwn, cluster::NodeRecord},
};

/// How many slots of a VM volumes go into.
const SLOTS: usize = 30;

/// The Node objects, and what the driver registered on them.
pub(super) fn objects(view: &View, cluster: &Inventory, report: &mut Report) {
    let area = "kubernetes";
    let Ok(nodes) = &cluster.nodes else { return };
    let before = report.findings.len();
    let mut served = 0;
    let mut unknown = Vec::new();
    for node in nodes {
        let record = match &node.record {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            Err(why) => {
                report.find(
                    Finding::new(Code::NodeUnclear, area, &node.name, format!("Node `{}`: {why}", node.name))
                        .hint("no volume is attached there; the cloud-controller loop (`proxmox-csi ccm`) writes what is missing"),
                );
                continue;
            }
        };
        if view.vms_of(record).next().is_none()
            && view.region(&record.region).is_some_and(|region| !region.is_whole())
        {
            unknown.push(&node.name);
            continue;
        }
        served += 1;
        labels(view, node, record, report);
        if let Ok(registrations) = &cluster.registrations {
            let found = registrations.iter().find(|one| one.node == node.name);
            registration(view, node, record, found, report);
        }
    }
    if !unknown.is_empty() {
        report.unseen(area, format!("the VMs of Nodes {}: not every VM could be read", joined(unknown)));
    }
    if served > 0 {
        let text = format!(
            "{served} Node{}: VMs, labels and registrations agree",
            if served == 1 { "" } else { "s" }
        );
        report.pass_unless_found(before, area, text);
    }
}

fn labels(view: &View, node: &NodeObject, record: &NodeRecord, report: &mut Report) {
    let area = "kubernetes";
    let name = &node.name;
    let label = |own: &str, common: &str| node.labels.get(own).or_else(|| node.labels.get(common)).cloned();
    let Some(region) = view.region(&record.region) else {
        let known = joined(view.regions.iter().map(|region| &region.region));
        let text = format!(
            "Node `{name}` is in region `{}`, which is not configured (known: {known})",
            record.region
        );
        report.find(
            Finding::new(Code::NodeRegion, area, name, text)
                .hint("add it to the clusters of the configuration, or correct the label"),
        );
        return;
    };
    let set = |key: &str, value: &str| format!("kubectl label node {name} {key}={value} --overwrite");
    if label(OWN_REGION, REGION).is_none() {
        let text = format!("Node `{name}` has no label `{REGION}`");
        report.find(
            Finding::new(Code::NodeRegion, area, name, text)
                .hint("without it no volume is made for its pods; `proxmox-csi ccm` writes it")
                .command(set(REGION, record.region.as_str())),
        );
    }
    let vms: Vec<(VmId, &SeenVm, &VmFacts)> = view.vms_of(record).collect();
    match vms.as_slice() {
        [] => missing_vm(view, node, record, report),
        [(_, vm, _)] => {
            let host = vm.row.node.as_str();
            match label(OWN_ZONE, ZONE).or_else(|| node.labels.get(ZONE).cloned()) {
                None => {
                    let text = format!("Node `{name}` has no label `{ZONE}`; its VM runs on `{host}`");
                    report.find(
                        Finding::new(Code::NodeZone, area, name, text)
                            .hint("without it no volume is made on a local storage for its pods; `proxmox-csi ccm` writes it")
                            .command(set(ZONE, host)),
                    );
                }
                Some(_) if node.labels.get(ZONE).is_some_and(|zone| zone != host) => {
                    let zone = &node.labels[ZONE];
                    let text = format!(
                        "Node `{name}` has the zone `{zone}`, and its VM {} runs on `{host}`",
                        vm.row.vmid
                    );
                    report.find(
                        Finding::new(Code::NodeZone, area, name, text)
                            .hint("pods are sent where their local volumes are not. Before you change it, see which PVs would strand (pv-would-strand); or migrate the VM back. `features.zone_labels: follow` of `proxmox-csi ccm` keeps it true")
                            .command(set(ZONE, host)),
                    );
                }
                Some(_) => {}
            }
        }
        several => {
            let vmids = joined(several.iter().map(|(vmid, ..)| vmid));
            let text =
                format!("VMs {vmids} of region {} have the SMBIOS uuid of Node `{name}`", region.region);
            report.find(
                Finding::new(Code::NodeVmTwice, area, name, text)
                    .hint("a copy kept the uuid of its source: nothing is attached until the copy has one of its own")
                    .command("qm set VMID --smbios1 uuid=$(uuidgen)   # on the copy, then stop and start it"),
            );
        }
    }
}

fn missing_vm(view: &View, node: &NodeObject, record: &NodeRecord, report: &mut Report) {
    let area = "kubernetes";
    let Some(region) = view.region(&record.region) else { return };
    let hidden = region.permissions.as_ref().is_ok_and(|permissions| {
        !permissions.allow_below("/vms", "VM.Audit")
            || permissions.gaps_below("/vms", "VM.Audit").next().is_some()
    });
    let recorded = record.vmid.map(|vmid| format!(" (recorded as VM {vmid})")).unwrap_or_default();
    let text = format!(
        "no VM that is seen in region {} has the SMBIOS uuid {} of Node `{}`{recorded}",
        record.region, record.uuid, node.name
    );
    if hidden {
        report.find(
            Finding::new(Code::NodeVmHidden, area, &node.name, text)
                .hint("the token does not see every VM: see privilege-missing"),
        );
    } else {
        report.find(
            Finding::new(Code::NodeVmMissing, area, &node.name, text)
                .hint("the VM is gone, or was made anew with another uuid, or is hidden by a `NoAccess` entry; is the region right?"),
        );
    }
}

fn registration(
    view: &View,
    node: &NodeObject,
    record: &NodeRecord,
    found: Option<&Registration>,
    report: &mut Report,
) {
    let area = "kubernetes";
    let name = &node.name;
    let Some((found, id)) = found.and_then(|found| Some((found, found.id.as_deref()?))) else {
        let text = format!("the node plugin {} is not registered on Node `{name}`", view.settings.driver);
        report.find(
            Finding::new(Code::NotRegistered, area, name, text)
                .hint("no pod with a volume can run there. Does the DaemonSet run on it? What does its registrar say? Is there a taint that keeps it away on purpose?")
                .command(format!("kubectl get csinode {name} -o yaml")),
        );
        return;
    };
    let lacking: Vec<&str> =
        [REGION, ZONE].into_iter().filter(|key| !found.topology_keys.iter().any(|one| one == key)).collect();
    if !lacking.is_empty() {
        let text = format!(
            "the node plugin on Node `{name}` registered without the topology keys {}",
            lacking.join(" and ")
        );
        report.find(
            Finding::new(Code::TopologyKeys, area, name, text)
                .hint("volumes are made without regard to where its pods can reach them: restart the node plugin with region and zone"),
        );
    }
    let (id_name, id_vmid) = match id.split_once('/') {
        Some((id_name, vmid)) => (id_name, vmid.parse::<VmId>().ok()),
        None => (id, None),
    };
    let vmids: Vec<VmId> = view.vms_of(record).map(|(vmid, ..)| vmid).collect();
    let wrong_vm = id_vmid.is_some_and(|vmid| !vmids.is_empty() && !vmids.contains(&vmid));
    if id_name != name || wrong_vm {
        let text = format!(
            "the node plugin on Node `{name}` registered with the id `{id}`, and its VM is {}",
            joined(&vmids)
        );
        report.find(
            Finding::new(Code::NodeId, area, name, text)
                .hint("the uuid decides in the end; a template that kept its serial has this. Restart the node plugin with `--node-id` of the Node's name"),
        );
    }
    if let (Some(limit), [(vmid, _, facts)]) =
        (found.limit, view.vms_of(record).collect::<Vec<_>>().as_slice())
    {
        let foreign = foreign_slots(view, facts);
        let room = SLOTS - foreign.len();
        if usize::try_from(limit).is_ok_and(|limit| limit > room) {
            let text = format!(
                "the scheduler puts up to {limit} volumes on Node `{name}`, and VM {vmid} has {room} slots for them: {} are disks of its own",
                joined(&foreign)
            );
            report.find(
                Finding::new(Code::NodeLimit, area, name, text)
                    .hint("pods above that would wait for a slot")
                    .command(format!("kubectl label node {name} csi.proxmox.sinextra.dev/max-volume-attachments={room} --overwrite")),
            );
        }
    }
}

/// Slots for volumes that something else is in.
fn foreign_slots(view: &View, facts: &VmFacts) -> Vec<ScsiSlot> {
    let ours = |text: &str| {
        let volid =
            crate::pve::qemu::Drive::read(text).and_then(|drive| drive.volid()?.parse::<VolId>().ok());
        volid.is_some_and(|volid| {
            let of_pv = |pv: &crate::k8s::inventory::PvObject| {
                pv.handle.ends_with(&format!("/{}/{}", volid.storage, volid.name))
            };
            let pvs = view.cluster.iter().flat_map(|cluster| cluster.volumes.iter().flatten());
            volid.name.owner() == Some(view.settings.owner) || pvs.into_iter().any(of_pv)
        })
    };
    ScsiSlot::for_volumes()
        .filter(|slot| facts.config.current(&slot.to_string()).is_some_and(|text| !ours(text)))
        .collect()
}

/// The VMs of nodes: what they need to carry volumes.
pub(super) fn machines(view: &View, report: &mut Report) {
    for node in &view.nodes {
        let Some(region) = view.region(&node.region) else { continue };
        for (vmid, vm, facts) in view.vms_of(node) {
            machine(region, node, vmid, vm, facts, report);
        }
    }
    for region in &view.regions {
        let area = region.area();
        let unread = region.vms.iter().filter_map(|(vmid, vm)| Some((vmid, vm, vm.seen.as_ref().err()?)));
        for (vmid, vm, why) in unread {
            let text =
                format!("VM {vmid} ({}) can not be read: {why}", vm.row.name.as_deref().unwrap_or("no name"));
            report.find(
                Finding::new(Code::VmUnreadable, &area, format!("VM {vmid}"), text).hint(
                    "it may hold any volume: none is attached elsewhere or deleted until it can be read",
                ),
            );
        }
        for (vmid, vm) in &region.vms {
            let Ok(facts) = &vm.seen else { continue };
            if facts.status.running && facts.status.drives.is_none() {
                let text = format!("the QEMU process of VM {vmid} on `{}` does not answer", vm.row.node);
                report.find(
                    Finding::new(Code::VmSilent, &area, format!("VM {vmid}"), text)
                        .hint("it is not known which drives it has: nothing is attached to it or detached from it")
                        .command(format!("qm status {vmid} --verbose; qm stop {vmid} && qm start {vmid}   # if it stays so")),
                );
            }
        }
    }
}

fn machine(
    region: &RegionView,
    node: &NodeRecord,
    vmid: VmId,
    vm: &SeenVm,
    facts: &VmFacts,
    report: &mut Report,
) {
    let (config, before, area) = (&facts.config, report.findings.len(), region.area());
    let of = format!("VM {vmid} of Node `{}`", node.name);
    let find = |code, text: String| Finding::new(code, &area, format!("VM {vmid}"), text);
    let hardware = config.scsi_hardware();
    if !hardware.starts_with("virtio-scsi-") {
        report.find(
            find(
                Code::VmScsiHardware,
                format!("{of} has the SCSI controller `{hardware}`, and volumes need a virtio-scsi one"),
            )
            .command(format!(
                "qm shutdown {vmid} && qm set {vmid} --scsihw virtio-scsi-single && qm start {vmid}"
            )),
        );
    }
    if !config.hotplugs_disks() {
        let value = config.current("hotplug").unwrap_or_default();
        report.find(
            find(
                Code::VmHotplug,
                format!(
                    "{of} has `hotplug: {value}`, without `disk`: volumes can not be plugged while it runs"
                ),
            )
            .command(format!("qm set {vmid} --hotplug network,disk,usb")),
        );
    }
    if config.is_protected() {
        report.find(
            find(
                Code::VmProtection,
                format!("{of} is protected: Proxmox plugs volumes in, and refuses to take them out"),
            )
            .command(format!("qm set {vmid} --protection 0")),
        );
    }
    if let Some(lock) = config.lock() {
        report.find(
            find(
                Code::VmLocked,
                format!("{of} is locked ({lock}): nothing is attached or detached meanwhile"),
            )
            .hint("if nothing runs any more that holds the lock, take it away")
            .command(format!("qm unlock {vmid}")),
        );
    }
    if config.current("agent").is_none_or(|agent| agent.starts_with('0') || agent.contains("enabled=0")) {
        report.find(
            find(Code::VmAgent, format!("{of} has no guest agent"))
                .hint("volumes do without it; shutdowns, backups with a quiet file system, and addresses from `proxmox-csi ccm` need it")
                .command(format!("qm set {vmid} --agent 1   # and install qemu-guest-agent in it")),
        );
    }
    if vm.row.hastate.is_some() {
        let local = local_volumes(region, facts);
        if !local.is_empty() {
            report.find(
                find(Code::HaLocalVolume, format!("{of} is a resource of the HA manager and holds the local {}", joined(&local)))
                    .hint("after a failover it can not start elsewhere with them: keep it out of HA, or give its pods shared storage")
                    .command(format!("ha-manager remove vm:{vmid}")),
            );
        }
    }
    report.pass_unless_found(before, &area, format!("{of}: {hardware}, hotplug of disks, no lock"));
}

/// Volumes of the driver, told by their WWN, on storages that no other Proxmox node has.
fn local_volumes(region: &RegionView, facts: &VmFacts) -> Vec<String> {
    let is_ours =
        |wwn: &str| wwn.parse::<Wwn>().is_ok_and(|wwn| wwn.is_ours() || wwn.legacy_slot().is_some());
    let is_local =
        |volid: &str| volid.parse::<VolId>().is_ok_and(|v| region.is_shared(&v.storage) == Some(false));
    let volumes = facts.config.volumes().filter(|held| held.wwn.as_deref().is_some_and(is_ours));
    volumes.map(|held| held.volid).filter(|volid| is_local(volid)).collect()
}
