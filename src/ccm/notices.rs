//! What is said about a Node in Events, and counted as refused. The same sentence is said once an hour.

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;

use super::{
    instances::{NotOurs, Unclear, VmFacts},
    lifecycle::{Power, power},
    poll::Polled,
    reconcile::Reconciler,
    taints::UNINITIALIZED,
};
use crate::{
    k8s::{
        events::{Notice, Said},
        node::{self, is_ready, taint},
    },
    types::{Region, VmId},
};

impl Reconciler {
    /// Says something about a node in an event, in a dry run only in the log. Tells whether it was not said just before.
    pub(super) async fn say(&self, node: &Node, notice: Notice) -> bool {
        if !self.writer.is_dry() {
            return self.recorder.about_node(node, notice).await == Said::Written;
        }
        let news = self.recorder.is_news_about(node, &notice);
        if news {
            let Notice { reason, note, .. } = notice;
            tracing::info!(node = node.name_any(), reason, note, "would say, but this is a dry run");
        }
        news
    }

    /// Says why something was not done, and counts it where that is news.
    pub(super) async fn refuse(&self, node: &Node, what: &'static str, notice: Notice) {
        if self.say(node, notice).await {
            self.metrics.ccm().refusal(what);
        }
    }

    pub(super) async fn say_twins(
        &self,
        node: &Node,
        region: &Region,
        vm: &VmFacts,
        twins: &[(Region, VmId)],
    ) {
        if !twins.is_empty() {
            let text = format!(
                "VM {} of region `{region}` is this node, but its uuid is also that of {}; hint: a restored or copied VM needs a uuid of its own",
                vm.vmid,
                shown(twins)
            );
            self.say(node, Notice::warning("DuplicateUuid", text)).await;
        }
    }

    pub(super) async fn say_unrecorded_twins(&self, node: &Node, places: &[(Region, VmId)]) {
        let text = format!(
            "several VMs have its uuid: {}; nothing records which one it is, so it is left as it is; hint: give all but one a new uuid (`qm set <vmid> --smbios1 uuid=…`)",
            shown(places)
        );
        self.refuse(node, "duplicate_uuid", Notice::warning("DuplicateUuid", text)).await;
    }

    pub(super) async fn say_elsewhere(
        &self,
        node: &Node,
        region: &Region,
        vm: &VmFacts,
        recorded_elsewhere: Option<(Region, VmId)>,
    ) {
        if let Some(place) = recorded_elsewhere {
            let text = format!(
                "its uuid is that of VM {} of region `{region}`, but it is recorded as {}, which is not it any more",
                vm.vmid,
                shown(&[place])
            );
            self.say(node, Notice::warning("RecordedElsewhere", text)).await;
        }
    }

    pub(super) async fn say_not_ours(&self, node: &Node, why: &NotOurs) {
        let reason = match why {
            NotOurs::Foreign(_) => "ForeignProviderId",
            NotOurs::OtherRegion(_) => "RegionNotConfigured",
            NotOurs::Host(_) => "ProxmoxHost",
        };
        self.say(node, Notice::normal(reason, format!("left as it is: {why}"))).await;
    }

    /// Why nothing is done with a node that waits for something to be done.
    pub(super) async fn say_unclear(&self, node: &Node, why: &Unclear) {
        tracing::debug!(node = node.name_any(), %why, "cannot tell its VM now");
        let reason = match why {
            // A kubelet that is about to tell it.
            Unclear::NoUuid => return,
            Unclear::Silent { .. } => "RegionUnreachable",
            Unclear::Unread { .. } => "ConfigUnreadable",
        };
        if !is_ready(node) || taint(node, UNINITIALIZED).is_some() {
            let text = format!("it can't be told which VM it is, so it is left as it is: {why}");
            self.refuse(node, "vm_unclear", Notice::warning(reason, text)).await;
        }
    }

    /// Where the VM is, if that is new or bad, and what can't be asked of it.
    pub(super) async fn say_place(&self, node: &Node, region: &Region, vm: &VmFacts, polled: &Polled) {
        let host = vm.host.as_str();
        if let Some(before) = node.labels().get(node::OWN_ZONE).filter(|zone| *zone != host)
            && !self.settings.labels.zone_is_ha_group
        {
            let text = format!("VM {} moved from `{before}` to `{host}`", vm.vmid);
            self.say(node, Notice::normal("VmMoved", text)).await;
        }
        if power(vm) == Power::HostUnreachable && !is_ready(node) {
            let text = format!(
                "the Proxmox node `{host}` of VM {} is not heard of; the VM may run there, so the node is not given up",
                vm.vmid
            );
            self.refuse(node, "host_unreachable", Notice::warning("HostUnreachable", text)).await;
        }
        if let Some(why) = polled.agents_refuse.get(&vm.vmid) {
            let text = format!(
                "the guest agent of VM {} of region `{region}` may not be asked for addresses: {why}; hint: give the token VM.GuestAgent.Audit (before PVE 9: VM.Monitor) on /vms/{}",
                vm.vmid, vm.vmid
            );
            self.say(node, Notice::warning("MissingPrivilege", text)).await;
        }
    }
}

fn shown(places: &[(Region, VmId)]) -> String {
    let texts: Vec<String> =
        places.iter().map(|(region, vmid)| format!("VM {vmid} of region `{region}`")).collect();
    texts.join(", ")
}
