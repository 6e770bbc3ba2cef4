//! Nodes whose VMs were not found: asked for once more, watched, and deleted only when all is proven.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use tokio::time::Instant;

use super::{
    instances::{Located, Regions},
    lifecycle::{Evidence, Fate, fate, most_at_once},
    provider_id::is_cluster_api,
    reconcile::{Reconciler, uid},
};
use crate::{
    k8s::{self, events::Notice, node::is_ready},
    types::{Region, VmId},
};

/// How long an answer of the oracle is remembered.
const ORACLE_FOR: Duration = Duration::from_secs(30);
/// What counts as at once.
const AT_ONCE: Duration = Duration::from_mins(10);
/// How long the oracle may take.
const ORACLE_DEADLINE: Duration = Duration::from_secs(10);

impl Reconciler {
    /// Judges the Nodes whose VMs were not found; `managed` is how many Nodes there are in all.
    pub(super) async fn judge_missing(
        &mut self,
        missing: Vec<(&Node, Located)>,
        regions: &Regions,
        managed: usize,
    ) {
        let now = Instant::now();
        self.deletions.retain(|at| now.duration_since(*at) < AT_ONCE);
        let polls = self.regions.iter().map(|handle| handle.polled.borrow().good_at);
        // The oldest of the last good polls: what is gone in all of them was gone then.
        let Some(Some(seen_at)) = polls.min() else { return };
        let quorate = regions.values().all(|facts| facts.quorate);
        let sees_all = regions.values().all(|facts| facts.sees_all);

        let (mut proven, mut suspects) = (Vec::new(), 0);
        for (node, located) in missing {
            let vmid_exists = match &located {
                Located::Absent { recorded: Some((region, vmid)) } if !is_ready(node) => {
                    self.vmid_exists(node, region, *vmid, now).await
                }
                // The kubelet lives: whatever the oracle says, the Node stays.
                Located::Absent { recorded: Some(_) } => Some(true),
                _ => None,
            };
            let gone_since = self.memory.entry(uid(node)).or_default().gone_since;
            let evidence = Evidence {
                ready: is_ready(node),
                vmid_exists,
                quorate,
                sees_all,
                leave_to_cluster_api: is_cluster_api(node, &[]) && !self.settings.delete_cluster_api,
                seen_gone_for: gone_since.map_or(Duration::ZERO, |at| seen_at.saturating_duration_since(at)),
            };
            let fate = fate(&located, evidence);
            let memory = self.memory.entry(uid(node)).or_default();
            match fate {
                Fate::Keep => memory.gone_since = None,
                Fate::Refuse(why) => {
                    memory.gone_since = None;
                    self.metrics.ccm().refusal("not_proven_gone");
                    self.say(node, Notice::warning("NotDeleted", why)).await;
                }
                Fate::Wait => {
                    memory.gone_since.get_or_insert(seen_at);
                    suspects += 1;
                }
                Fate::Delete => {
                    suspects += 1;
                    proven.push((node, located));
                }
            }
        }
        if proven.is_empty() {
            return;
        }
        let recent = self.deletions.len();
        let most = most_at_once(managed + recent);
        if suspects + recent > most {
            let text = format!(
                "its VM is gone, but {suspects} nodes are at once and {recent} were just now: more than {most}; none is deleted before somebody has looked; hint: delete the Nodes by hand if that is right"
            );
            for (node, _) in proven {
                self.metrics.ccm().refusal("too_many_at_once");
                self.say(node, Notice::warning("DeletionHalted", text.clone())).await;
            }
            return;
        }
        for (node, located) in proven {
            self.delete(node, &located).await;
        }
    }

    /// Deletes a Node after a last look.
    async fn delete(&mut self, node: &Node, located: &Located) {
        if !self.settings.delete_nodes {
            self.metrics.ccm().refusal("deletion_off");
            let text = "its VM is gone, but deletion of Nodes is off";
            return self.say(node, Notice::warning("NotDeleted", text)).await;
        }
        if let Located::Absent { recorded: Some((region, vmid)) } = located
            && self.ask(region, *vmid).await != Some(false)
        {
            return;
        }
        self.say(node, Notice::normal("DeletingNode", "its VM is proven gone")).await;
        if self.writer.delete(node).await {
            tracing::info!(node = node.name_any(), "deleted the Node of a VM that is gone");
            self.deletions.push(Instant::now());
        }
    }

    /// Whether the VMID exists, by an answer not too old.
    async fn vmid_exists(&mut self, node: &Node, region: &Region, vmid: VmId, now: Instant) -> Option<bool> {
        let known = self.memory.get(&uid(node)).and_then(|memory| memory.oracle);
        if let Some((at, exists)) = known
            && now.duration_since(at) < ORACLE_FOR
        {
            return Some(exists);
        }
        let exists = self.ask(region, vmid).await?;
        self.memory.entry(uid(node)).or_default().oracle = Some((Instant::now(), exists));
        Some(exists)
    }

    async fn ask(&self, region: &Region, vmid: VmId) -> Option<bool> {
        let handle = self.regions.iter().find(|handle| handle.client.region() == region)?;
        match tokio::time::timeout(ORACLE_DEADLINE, handle.client.vmid_exists(vmid)).await {
            Ok(Ok(exists)) => Some(exists),
            Ok(Err(error)) => {
                tracing::debug!(%region, %vmid, error = k8s::chain(&error), "cannot ask whether a VMID exists");
                None
            }
            Err(_) => None,
        }
    }
}
