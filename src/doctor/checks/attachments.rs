//! Who holds what: VolumeAttachments against the configs of VMs against QEMU.

use super::{Code, Finding, Report, View, joined};
use crate::{
    doctor::{
        book::{self, Book, Entry, Held, How, Listed},
        repair,
    },
    k8s::inventory::AttachmentObject,
    types::{ScsiSlot, Wwn, publish::PublishedDisk},
};

/// Where findings of this kind stand.
const AREA: &str = "volumes";

pub(super) fn check(view: &View, book: &Book, report: &mut Report) {
    for entry in book.volumes.values() {
        several(entry, report);
        for held in entry.held.iter().filter(|held| held.is_drive() && !held.is_holder) {
            slot(view, entry, held, report);
        }
        for attachment in &entry.attachments {
            attached(view, entry, attachment, report);
        }
    }
    strays(view, report);
    orphans(view, report);
}

fn place(held: &Held) -> String {
    let node = held.node.as_ref().map(|node| format!(", Node `{node}`")).unwrap_or_default();
    format!("VM {} ({}) on `{}`{node}, {}", held.vmid, held.name, held.host, held.key)
}

fn several(entry: &Entry, report: &mut Report) {
    let drives: Vec<&Held> = entry.held.iter().filter(|held| held.is_drive()).collect();
    let machines = drives.iter().map(|held| held.vmid).collect::<std::collections::BTreeSet<_>>().len();
    let only_reads = drives.iter().all(|held| held.only_reads()) && machines == drives.len();
    if drives.len() < 2 || only_reads {
        return;
    }
    let places = drives.iter().map(|held| place(held)).collect::<Vec<_>>().join("; and ");
    let text = format!("`{}` is held by {places}", entry.key.volid);
    let mut finding = Finding::new(Code::DoubleAttachment, AREA, entry.handle(), text).hint(
        "two that write to one file system destroy it. Stop the pods that use it, find out which VM has it mounted, and detach it from the others",
    );
    for held in &drives {
        finding = finding.command(format!(
            "qm set {} --delete {}   # on {}, if it is not this one",
            held.vmid, held.key, held.host
        ));
    }
    report.find(finding);
}

fn slot(view: &View, entry: &Entry, held: &Held, report: &mut Report) {
    let How::Drive { current, pending, deleting, qemu, wwn, .. } = &held.how else { return };
    let find = |code, text: String| Finding::new(code, AREA, entry.handle(), text);
    let volid = &entry.key.volid;
    if *pending || *deleting || !*current {
        let what = match (*deleting, *current) {
            (true, _) => "its removal is pending",
            (false, true) => "another volume waits for its slot",
            (false, false) => "that is pending and not in force",
        };
        let text = format!("`{volid}` is held by {}: {what}", place(held));
        report.find(
            find(Code::SlotPending, text)
                .hint("it would be applied at the next start of the VM. An attach or detach by the driver finishes it or takes it back")
                .command(format!("qm pending {}", held.vmid))
                .command(format!("qm set {} --revert {}   # takes it back", held.vmid, held.key)),
        );
    }
    if *current && *qemu == Some(false) {
        let text = format!("`{volid}` is in the config of {}, and its QEMU does not have it", place(held));
        report.find(
            find(Code::QemuLacks, text)
                .hint("what is left of an unplug that ended half way: the guest has no such disk. Delete the pod that uses it: the next attach mends it"),
        );
    }
    if entry.listed == Listed::No && entry.pvs.is_empty() {
        let text = format!("`{volid}` is held by {}, and its storage does not list it", place(held));
        report.find(
            find(Code::SlotVolumeGone, text)
                .hint("the VM does not start with a volume that is gone")
                .command(format!("qm set {} --delete {}", held.vmid, held.key)),
        );
    }
    let Some(cluster) = &view.cluster else { return };
    if cluster.attachments.is_err() || !view.knows_volumes() {
        return;
    }
    let attachment = entry.attachments.iter().find(|one| held.node.as_deref() == Some(one.node.as_str()));
    match attachment {
        Some(attachment) => told(entry, held, *wwn, attachment, report),
        // The own disk of a VM is nobody's attachment.
        None if volid.name.owner() == Some(held.vmid) => {}
        None => dangling(view, entry, held, report),
    }
}

/// A slot that no attachment accounts for.
fn dangling(view: &View, entry: &Entry, held: &Held, report: &mut Report) {
    let no_pv = if entry.pvs.is_empty() { ", nor a PV" } else { "" };
    let none = if entry.attachments.is_empty() {
        "there is no VolumeAttachment of it"
    } else {
        "no VolumeAttachment has it there"
    };
    let text = format!("`{}` is held by {}, and {none}{no_pv}", entry.key.volid, place(held));
    let mut finding = Finding::new(Code::SlotDangling, AREA, entry.handle(), text);
    match repair::may_detach(view, entry, held) {
        Ok(()) => {
            finding.repair = Some(format!("detach it from VM {}", held.vmid));
            finding = finding
                .hint("no pod uses its claim, and the kubelet of the Node does not say that it is in use");
        }
        Err(why) => finding = finding.hint(format!("not repaired: {why}")),
    }
    report.find(finding.command(format!(
        "qm set {} --delete {}   # on {}, once nothing in the VM has it mounted",
        held.vmid, held.key, held.host
    )));
}

/// Whether the node looks for the disk that is in the slot.
fn told(entry: &Entry, held: &Held, wwn: Option<Wwn>, attachment: &AttachmentObject, report: &mut Report) {
    if !attachment.attached || attachment.metadata.is_empty() {
        return;
    }
    let find = |text: String| {
        Finding::new(Code::AttachmentName, AREA, entry.handle(), text)
            .hint("the node refuses the disk, or does not find it: delete the pod, so that it is detached and attached again")
    };
    match PublishedDisk::from_context(&attachment.metadata) {
        Err(error) => report.find(find(format!(
            "VolumeAttachment `{}` tells the node nothing that can be read: {error}",
            attachment.name
        ))),
        Ok(disk) => {
            let slot = held.key.parse::<ScsiSlot>().ok();
            let other_name = wwn != Some(disk.wwn);
            let other_slot = disk.slot.is_some() && slot.is_some() && disk.slot != slot;
            if other_name || other_slot {
                let shown = wwn.map_or_else(|| "no WWN".to_owned(), |wwn| format!("WWN {wwn}"));
                let lun = disk.slot.map(|slot| format!(" at {slot}")).unwrap_or_default();
                report.find(find(format!(
                    "VolumeAttachment `{}` tells Node `{}` to look for WWN {}{lun}, and the disk in {} has {shown}",
                    attachment.name, attachment.node, disk.wwn, held.key
                )));
            }
        }
    }
}

/// Whether an attachment is true.
fn attached(view: &View, entry: &Entry, attachment: &AttachmentObject, report: &mut Report) {
    let find = |code, text: String| Finding::new(code, AREA, entry.handle(), text);
    if let Some(error) = &attachment.error {
        let what = if attachment.deleting { "detach from" } else { "attach to" };
        let text = format!(
            "VolumeAttachment `{}`: the last {what} Node `{}` failed: {error}",
            attachment.name, attachment.node
        );
        report.find(
            find(Code::AttachmentFailed, text)
                .hint("it is tried again; `proxmox-csi explain` says what stands in the way now"),
        );
    }
    if !attachment.attached || attachment.deleting {
        return;
    }
    let on_node = |held: &&Held| held.node.as_deref() == Some(attachment.node.as_str());
    if entry.drives().any(|held| on_node(&held)) {
        return;
    }
    // What was not read says nothing.
    let record = view.nodes.iter().find(|node| node.name == attachment.node);
    let Some(machine) = record.filter(|record| view.vms_of(record).next().is_some()) else { return };
    let others: Vec<&Held> = entry.drives().collect();
    if others.is_empty() {
        let text = format!(
            "VolumeAttachment `{}` says that `{}` is attached to Node `{}`, and its VM does not hold it",
            attachment.name, entry.key.volid, machine.name
        );
        report.find(
            find(Code::AttachmentMissingSlot, text)
                .hint("somebody took it out by hand, or a rollback did. Delete the pod that uses it, so that it is detached and attached again"),
        );
    } else {
        let text = format!(
            "VolumeAttachment `{}` says that `{}` is attached to Node `{}`, and it is held by {}",
            attachment.name,
            entry.key.volid,
            machine.name,
            others.iter().map(|held| place(held)).collect::<Vec<_>>().join("; ")
        );
        report.find(find(Code::AttachmentElsewhere, text).hint(
            "the pod writes to nothing, or another VM writes to its volume: stop what uses it in both",
        ));
    }
}

/// Drives that only QEMU knows.
fn strays(view: &View, report: &mut Report) {
    for region in &view.regions {
        for (vmid, vm) in &region.vms {
            let Ok(facts) = &vm.seen else { continue };
            let strays = book::stray_drives(facts);
            if strays.is_empty() {
                continue;
            }
            let text = format!(
                "the QEMU of VM {vmid} on `{}` has {}, which its config does not know",
                vm.row.node,
                joined(&strays)
            );
            report.find(
                Finding::new(Code::QemuStray, &region.area(), format!("VM {vmid}"), text)
                    .hint("it may be any volume: nothing is attached elsewhere or deleted until it is gone")
                    .command(format!("echo 'info block' | qm monitor {vmid}   # which file it is")),
            );
        }
    }
}

/// Attachments of what is not there.
fn orphans(view: &View, report: &mut Report) {
    let Some(cluster) = &view.cluster else { return };
    let (Ok(attachments), Ok(volumes), Ok(nodes)) = (&cluster.attachments, &cluster.volumes, &cluster.nodes)
    else {
        return;
    };
    for attachment in attachments {
        let mut lacking = Vec::new();
        if let Some(name) = &attachment.volume
            && !volumes.iter().any(|pv| pv.name == *name)
        {
            lacking.push(format!("PV `{name}`"));
        }
        if !nodes.iter().any(|node| node.name == attachment.node) {
            lacking.push(format!("Node `{}`", attachment.node));
        }
        if lacking.is_empty() {
            continue;
        }
        let text = format!(
            "VolumeAttachment `{}` is of {}, which is not there",
            attachment.name,
            lacking.join(" and of ")
        );
        report.find(
            Finding::new(Code::AttachmentOrphan, AREA, &attachment.name, text)
                .hint("Kubernetes takes it away once the detach is answered; is the attacher running?")
                .command(format!("kubectl describe volumeattachment {}", attachment.name)),
        );
    }
}
