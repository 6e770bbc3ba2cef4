//! The checks: pure functions from what was seen to findings.

mod access;
mod attachments;
mod nodes;
mod storages;
mod volumes;

use super::{
    book::Book,
    finding::{Code, Finding, Report, Severity},
    server,
    view::{RegionView, View},
};

/// What is odd about the configuration file.
pub(super) fn configuration(warnings: &[String], view: &View, report: &mut Report) {
    let area = "configuration";
    for warning in warnings {
        let (text, hint) = match warning.split_once("; hint: ") {
            Some((text, hint)) => (text, Some(hint)),
            None => (warning.as_str(), None),
        };
        let finding = Finding::new(Code::Config, area, "the configuration file", text);
        report.find(match hint {
            Some(hint) => finding.hint(hint),
            None => finding,
        });
    }
    let regions: Vec<&str> = view.regions.iter().map(|region| region.region.as_str()).collect();
    let (owner, holders) = (view.settings.owner, &view.settings.holders);
    report.pass(
        area,
        format!(
            "read: {} {}, owner VMID {owner}, short-lived VMs {} to {}",
            if regions.len() == 1 { "region" } else { "regions" },
            regions.join(", "),
            holders.start(),
            holders.end()
        ),
    );
}

/// A region by itself: its servers, the token, storages, the owner's VMID, leftovers.
pub(super) fn region(view: &View, region: &RegionView, report: &mut Report) {
    let area = region.area();
    if !region.servers.is_empty() && !server::check(&area, &region.who, &region.servers, report) {
        report.unseen(&area, "privileges, storages, VMs and volumes: no server gave an answer");
        return;
    }
    let resources = match &region.resources {
        Ok(resources) => resources,
        Err(why) => {
            report.find(Finding::new(Code::ServerFailed, &area, "VMs and storages", why));
            return;
        }
    };
    if !resources.is_quorate() {
        let online = resources.nodes.iter().filter(|row| row.online).count();
        let text = format!("{online} of {} nodes are online", resources.nodes.len());
        let hint = "Proxmox writes no config until most nodes are back: nothing is attached or detached";
        report.find(Finding::new(Code::NoQuorum, &area, "cluster", text).hint(hint).command("pvecm status"));
    }
    for row in resources.nodes.iter().filter(|row| !row.online) {
        let vms = resources.vms.iter().filter(|vm| vm.node == row.node).count();
        let text = format!("Proxmox node `{}` is offline, with {vms} VMs on it", row.node);
        report.find(Finding::new(Code::HostOffline, &area, row.node.as_str(), text).hint(
            "what these VMs hold is not known, so that no volume they could hold is attached elsewhere or deleted",
        ));
    }
    access::privileges(view, region, report);
    access::owner(view, region, report);
    access::holders(view, region, report);
    storages::check(view, region, resources, report);
}

/// Kubernetes: Nodes, what is registered on them, classes.
pub(super) fn cluster(view: &View, report: &mut Report) {
    let area = "kubernetes";
    let Some(cluster) = &view.cluster else {
        report.unseen(area, "Nodes, PVs, VolumeAttachments: no cluster was named (--kubeconfig)");
        nodes::machines(view, report);
        return;
    };
    let lists: [(&str, Option<&String>); 6] = [
        ("nodes", cluster.nodes.as_ref().err()),
        ("csinodes.storage.k8s.io", cluster.registrations.as_ref().err()),
        ("persistentvolumes", cluster.volumes.as_ref().err()),
        ("volumeattachments.storage.k8s.io", cluster.attachments.as_ref().err()),
        ("storageclasses.storage.k8s.io", cluster.classes.as_ref().err()),
        ("pods", cluster.pods.as_ref().err()),
    ];
    for (kind, why) in lists.into_iter().filter_map(|(kind, why)| Some((kind, why?))) {
        let text = format!("cannot list {kind}: {why}");
        report.find(
            Finding::new(Code::ClusterForbidden, area, kind, text)
                .hint("what depends on it was not checked")
                .command(format!("kubectl auth can-i list {kind} --all-namespaces")),
        );
    }
    nodes::objects(view, cluster, report);
    nodes::machines(view, report);
    storages::classes(view, cluster, report);
}

/// The VMs of nodes, and those that can't be read.
pub(super) fn machines(view: &View, report: &mut Report) {
    nodes::machines(view, report);
}

/// Volumes, one by one: PVs, what lies on the storages, and who holds what.
pub(super) fn volumes(view: &View, book: &Book, report: &mut Report) {
    let before = report.findings.len();
    volumes::check(view, book, report);
    attachments::check(view, book, report);
    let held = book.volumes.values().filter(|entry| entry.drives().next().is_some()).count();
    let count = book.volumes.len();
    if view.is_whole() {
        let text = format!(
            "{count} volume{}, {held} attached: what is said of them agrees",
            if count == 1 { "" } else { "s" }
        );
        report.pass_unless_found(before, "volumes", text);
    } else {
        report.unseen("volumes", "whether what is said of volumes agrees: not everything could be read");
    }
}

/// A name for a shell: in quotes where a shell would make something else of it.
pub(super) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '@' | ':' | ',');
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Several names in a sentence.
fn joined<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn note(finding: Finding) -> Finding {
    finding.severity(Severity::Note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_would_read_otherwise_is_quoted() {
        assert_eq!(quoted("csi@pve!csi"), "'csi@pve!csi'");
        assert_eq!(quoted("local:9999/vm-9999-a.raw"), "local:9999/vm-9999-a.raw");
        assert_eq!(quoted("a'b"), r"'a'\''b'");
        assert_eq!(quoted(""), "''");
    }
}
