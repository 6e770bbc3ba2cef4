//! What the driver needs to know of the cluster it serves, whoever knows it.
//!
//! One small trait, so that the layers above have no Kubernetes in them: it is answered by a file or flags where
//! there is no Kubernetes, and by the Kubernetes API where there is.

use futures_util::future::BoxFuture;

use super::{
    Region, VmId,
    notice::{About, Notice},
};

/// What is known of a node: enough to find its VM and to prove that it is the one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// The name of the node, without a `/vmid` behind it.
    pub name: String,
    /// The Proxmox cluster the VM is in.
    pub region: Region,
    /// The VMID, where somebody recorded it.
    pub vmid: Option<VmId>,
    /// The SMBIOS uuid, which makes a VM the same VM: VMIDs are reused and templates copied.
    pub uuid: uuid::Uuid,
}

/// The cluster could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot look up node `{node}`")]
pub struct LookupError {
    /// The node that was looked up.
    pub node: String,
    /// What went wrong.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The cluster that the driver serves.
pub trait Cluster: Send + Sync {
    /// The record of the node with this CSI node id (`name` or `name/vmid`); `None` where there is no such node.
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>>;

    /// The records of all living nodes.
    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>>;

    /// Says something to whoever looks after the cluster. Returns at once and never fails: no work depends on being heard. Where there is
    /// nobody to tell, nothing happens.
    fn tell(&self, about: About, notice: Notice) {
        drop((about, notice));
    }
}
