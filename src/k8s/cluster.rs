//! [`Cluster`] by the objects of Kubernetes: which VM is a node, and what is kept of a volume?
//!
//! The VMID comes from the node id, the providerID or the annotation, and is only a hint; the uuid is what makes a VM the node's.

use futures_util::future::BoxFuture;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, ResourceExt as _, api::ListParams};

use super::{
    node::{self, ProviderId},
    notices::Notices,
    volumes::PersistentVolumes,
};
use crate::types::{
    Region, VmId,
    attributes::Attributes,
    cluster::{Cluster, LookupError, NodeRecord, RecordError, VolumeRecord},
    notice::{About, Notice},
};

/// The nodes of a Kubernetes cluster.
#[derive(Clone)]
pub struct KubeCluster {
    nodes: Api<Node>,
    volumes: PersistentVolumes,
    only_region: Option<Region>,
    notices: Option<Notices>,
}

/// A Node object does not say which VM it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unclear {
    #[error(
        "it has no region; hint: label it `topology.kubernetes.io/region`, or run the cloud-controller loop (`proxmox-csi ccm`)"
    )]
    Region,
    #[error("its status has no usable systemUUID, and its providerID no uuid")]
    Uuid,
    #[error("its providerID `{0}` is of another provider")]
    Foreign(String),
}

impl KubeCluster {
    /// The nodes that `client` sees. A node that names no region is in `only_region`, where just one is configured.
    pub fn new(client: Client, only_region: Option<Region>) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            volumes: PersistentVolumes::new(client),
            only_region,
            notices: None,
        }
    }

    /// The same, which says in Events what it is told.
    #[must_use]
    pub fn with_notices(mut self, notices: Notices) -> Self {
        self.notices = Some(notices);
        self
    }

    pub(super) fn record(&self, node: &Node, told: Option<VmId>) -> Result<NodeRecord, Unclear> {
        let provider_id = ProviderId::of(node);
        if let ProviderId::Foreign(text) = provider_id {
            return Err(Unclear::Foreign(text));
        }
        let region = node::region(node).or_else(|| self.only_region.clone()).ok_or(Unclear::Region)?;
        let system = node::system_uuid(node);
        let uuid = match &provider_id {
            // The same machine in the other byte order: the providerID's is the one of the VM's config.
            ProviderId::Uuid(uuid) if system.is_none_or(|system| node::byte_swapped(system) == *uuid) => {
                *uuid
            }
            _ => system.ok_or(Unclear::Uuid)?,
        };
        let vmid = told.or(match provider_id {
            ProviderId::Vm(_, vmid) => Some(vmid),
            _ => node::annotated_vmid(node),
        });
        Ok(NodeRecord { name: node.name_any(), region, vmid, uuid })
    }
}

/// Whether a node has anything of ours, so that not to understand it is an error.
fn is_claimed(node: &Node) -> bool {
    matches!(ProviderId::of(node), ProviderId::Vm(..) | ProviderId::Uuid(_))
        || node::annotated_vmid(node).is_some()
        || node.labels().contains_key(node::OWN_REGION)
}

impl Cluster for KubeCluster {
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>> {
        Box::pin(async move {
            let lookup = |source: Box<dyn std::error::Error + Send + Sync>| LookupError {
                node: node_id.to_owned(),
                source,
            };
            let (name, told) = match node_id.split_once('/') {
                Some((name, vmid)) => (name, vmid.parse().ok()),
                None => (node_id, None),
            };
            // What can't be a name is not asked for: it would be another path.
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
            if name.is_empty() || name.len() > 253 || !name.chars().all(legal) {
                return Ok(None);
            }
            let Some(node) = self.nodes.get_opt(name).await.map_err(|error| lookup(error.into()))? else {
                return Ok(None);
            };
            self.record(&node, told).map(Some).map_err(|error| lookup(error.into()))
        })
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>> {
        Box::pin(async move {
            let listed = self
                .nodes
                .list(&ListParams::default())
                .await
                .map_err(|error| LookupError { node: "all nodes".to_owned(), source: error.into() })?;
            let mut records = Vec::new();
            for node in &listed.items {
                match self.record(node, None) {
                    Ok(record) => records.push(record),
                    // Left out, its VM would look as if nobody claimed it.
                    Err(error) if is_claimed(node) => {
                        return Err(LookupError { node: node.name_any(), source: error.into() });
                    }
                    Err(error) => {
                        tracing::debug!(node = node.name_any(), %error, "not a node of ours");
                    }
                }
            }
            Ok(records)
        })
    }

    fn volume<'a>(&'a self, handle: &'a str) -> BoxFuture<'a, Result<Option<VolumeRecord>, RecordError>> {
        Box::pin(self.volumes.record(handle))
    }

    fn keep_attributes<'a>(
        &'a self,
        handle: &'a str,
        attributes: &'a Attributes,
    ) -> BoxFuture<'a, Result<(), RecordError>> {
        Box::pin(self.volumes.keep(handle, attributes))
    }

    fn tell(&self, about: About, notice: Notice) {
        if let Some(notices) = &self.notices {
            notices.tell(about, notice);
        }
    }
}
