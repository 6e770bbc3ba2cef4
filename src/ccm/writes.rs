//! Writes to Node objects: each small, each guarded, none in a dry run.
//!
//! Labels and the annotation are applied by a field manager of our own, so that what we no longer apply goes away. Taints, providerID and
//! addresses are lists and immutable values: their patches carry the resourceVersion that was read, and a conflict is left to the next
//! reconcile, which sees the Node as it is.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    core::v1::{Node, NodeAddress, Taint},
    storage::v1::VolumeAttachment,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions},
};
use serde_json::{Value, json};

use crate::{
    k8s::{chain, lease::Leadership, node::is_ready},
    telemetry::metrics::Metrics,
};

/// The name under which fields are owned.
pub const FIELD_MANAGER: &str = "proxmox-ccm";

/// Writes to Nodes.
pub struct Writer {
    nodes: Api<Node>,
    attachments: Api<VolumeAttachment>,
    leadership: Option<Leadership>,
    dry_run: bool,
    metrics: Metrics,
}

impl Writer {
    /// A writer that acts only while the lease is held, where there is one.
    pub fn new(client: Client, leadership: Option<Leadership>, dry_run: bool, metrics: Metrics) -> Self {
        Self { nodes: Api::all(client.clone()), attachments: Api::all(client), leadership, dry_run, metrics }
    }

    /// Whether nothing is written.
    pub fn is_dry(&self) -> bool {
        self.dry_run
    }

    /// Whether a write may be made now; logs it where it is not to be.
    fn may(&self, node: &Node, action: &'static str, detail: &str) -> bool {
        let name = node.name_any();
        if self.dry_run {
            tracing::info!(node = name, action, detail, "would write, but this is a dry run");
            return false;
        }
        if self.leadership.as_ref().is_some_and(|leadership| !leadership.holds()) {
            tracing::warn!(node = name, action, "not written: the lease is not held");
            return false;
        }
        true
    }

    fn done<T>(
        &self,
        node: &Node,
        action: &'static str,
        detail: &str,
        result: Result<T, kube::Error>,
    ) -> bool {
        let name = node.name_any();
        match result {
            Ok(_) => {
                tracing::info!(node = name, action, detail, "changed the node");
                self.metrics.ccm().action(action);
                true
            }
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                tracing::debug!(node = name, action, "the node changed meanwhile; it is looked at again");
                false
            }
            Err(error) => {
                tracing::warn!(node = name, action, detail, error = chain(&error), "cannot change the node");
                false
            }
        }
    }

    /// Applies the labels and annotations of ours, all of them; `stale` labels of other writers are taken away.
    pub async fn labels(
        &self,
        node: &Node,
        labels: &BTreeMap<String, String>,
        annotations: &BTreeMap<String, String>,
        stale: &[String],
    ) -> bool {
        let differs = |wanted: &BTreeMap<String, String>, there: &BTreeMap<String, String>| {
            let changed = wanted.iter().filter(|(key, value)| there.get(*key) != Some(value));
            changed.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>()
        };
        let mut detail = differs(labels, node.labels());
        detail.extend(differs(annotations, node.annotations()));
        detail.extend(stale.iter().map(|key| format!("{key}-")));
        let detail = detail.join(" ");
        if !self.may(node, "labels", &detail) {
            return self.dry_run;
        }
        let name = node.name_any();
        if !stale.is_empty() {
            let gone: BTreeMap<&String, Value> = stale.iter().map(|key| (key, Value::Null)).collect();
            let patch = json!({"metadata": {"labels": gone}});
            let taken = self.nodes.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            if !self.done(node, "labels", &detail, taken) {
                return false;
            }
        }
        let mut patch =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
        // An empty map would make us an owner of everybody's annotations.
        if !annotations.is_empty() {
            patch["metadata"]["annotations"] = json!(annotations);
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let applied = self.nodes.patch(&name, &params, &Patch::Apply(&patch)).await;
        self.done(node, "labels", &detail, applied)
    }

    /// Writes the addresses, where they are still those that were judged.
    pub async fn addresses(&self, node: &Node, addresses: &[NodeAddress]) -> bool {
        let detail: Vec<String> =
            addresses.iter().map(|one| format!("{}={}", one.type_, one.address)).collect();
        let detail = detail.join(" ");
        if !self.may(node, "addresses", &detail) {
            return self.dry_run;
        }
        let name = node.name_any();
        let now = match self.nodes.get(&name).await {
            Ok(now) => now,
            Err(error) => return self.done(node, "addresses", &detail, Err::<(), _>(error)),
        };
        let there = |node: &Node| node.status.as_ref().and_then(|status| status.addresses.clone());
        if now.metadata.uid != node.metadata.uid || there(&now) != there(node) {
            tracing::debug!(node = name, "the node changed meanwhile; it is looked at again");
            return false;
        }
        let patch = json!({"metadata": {"resourceVersion": now.metadata.resource_version},
            "status": {"addresses": addresses}});
        let patched = self.nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        self.done(node, "addresses", &detail, patched)
    }

    /// Writes the providerID, the taints, or both. The node is read again, and left alone where they
    /// are no longer those that were judged.
    pub async fn spec(&self, node: &Node, provider_id: Option<&str>, taints: Option<&[Taint]>) -> bool {
        let keys = taints.map(|all| all.iter().map(|taint| taint.key.as_str()).collect::<Vec<_>>().join(","));
        let detail = format!(
            "{}{}",
            provider_id.map(|id| format!("providerID={id} ")).unwrap_or_default(),
            keys.map(|keys| format!("taints=[{keys}]")).unwrap_or_default()
        );
        let action = if taints.is_some() { "taints" } else { "provider_id" };
        if !self.may(node, action, &detail) {
            return false;
        }
        let name = node.name_any();
        let now = match self.nodes.get(&name).await {
            Ok(now) => now,
            Err(error) => return self.done(node, action, &detail, Err::<(), _>(error)),
        };
        if now.metadata.uid != node.metadata.uid || now.spec != node.spec || is_ready(&now) != is_ready(node)
        {
            tracing::debug!(node = name, "the node changed meanwhile; it is looked at again");
            return false;
        }
        let mut spec = serde_json::Map::new();
        if let Some(provider_id) = provider_id {
            spec.insert("providerID".into(), json!(provider_id));
        }
        if let Some(taints) = taints {
            spec.insert("taints".into(), json!(taints));
        }
        let patch = json!({"metadata": {"resourceVersion": now.metadata.resource_version}, "spec": spec});
        let patched = self.nodes.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        self.done(node, action, &detail, patched)
    }

    /// Deletes a Node that is still the one that was judged, and whose kubelet is still silent.
    pub async fn delete(&self, node: &Node) -> bool {
        if !self.may(node, "delete", "its VM is gone") {
            return false;
        }
        let name = node.name_any();
        let now = match self.nodes.get(&name).await {
            Ok(now) => now,
            Err(error) => return self.done(node, "delete", "", Err::<(), _>(error)),
        };
        if now.metadata.uid != node.metadata.uid || is_ready(&now) {
            return false;
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: now.metadata.uid.clone(),
                resource_version: now.metadata.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        let deleted = self.nodes.delete(&name, &params).await;
        self.done(node, "delete", "its VM is gone", deleted)
    }

    /// Whether every volume that was attached to the node before its taint is detached; `None` where that can't be told.
    pub async fn old_volumes_gone(&self, node: &Node, taint: &Taint) -> Option<bool> {
        let name = node.name_any();
        let listed = match self.attachments.list(&ListParams::default()).await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(node = name, error = chain(&error), "cannot list the volume attachments");
                return None;
            }
        };
        let is_old = |attachment: &VolumeAttachment| {
            let made = attachment.metadata.creation_timestamp.as_ref();
            match (made, &taint.time_added) {
                (Some(made), Some(added)) => made.0 <= added.0,
                // A taint without a date: each may be an old one.
                _ => true,
            }
        };
        Some(!listed.items.iter().any(|one| one.spec.node_name == name && is_old(one)))
    }
}
