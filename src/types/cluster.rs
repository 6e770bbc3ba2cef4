//! What the driver needs to know of the cluster it serves, whoever knows it.
//!
//! One small trait, so that the layers above have no Kubernetes in them: it is answered by a file or flags where
//! there is no Kubernetes, and by the Kubernetes API where there is.

use std::num::NonZeroU32;

use futures_util::future::BoxFuture;

use super::{
    Region, VmId,
    attributes::Attributes,
    notice::{About, Notice},
    topology::Place,
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

/// What the cluster says of the node that this process runs on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnNode {
    /// Where it is.
    pub place: Option<Place>,
    /// How many volumes it takes.
    pub max_volumes: Option<NonZeroU32>,
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

/// What the cluster keeps of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeRecord {
    /// What was changed since the volume was made.
    pub attributes: Attributes,
    /// Whether the disk is to stay when the volume is deleted.
    pub keep: bool,
}

/// What the cluster keeps of a volume can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} what the cluster keeps of volume `{volume}`")]
pub struct RecordError {
    /// `look up` or `write`.
    pub what: &'static str,
    /// The volume's handle.
    pub volume: String,
    /// What went wrong.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The cluster that the driver serves.
pub trait Cluster: Send + Sync {
    /// The record of the node with this CSI node id (`name` or `name/vmid`); `None` where there is no such node.
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>>;

    /// The records of all living nodes.
    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>>;

    /// What is kept of the volume with this handle; `None` where nothing is.
    fn volume<'a>(&'a self, _handle: &'a str) -> BoxFuture<'a, Result<Option<VolumeRecord>, RecordError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Keeps what was changed of a volume, in place of what was kept. Where there is nothing to keep it in, it is lost with the process.
    fn keep_attributes<'a>(
        &'a self,
        _handle: &'a str,
        _attributes: &'a Attributes,
    ) -> BoxFuture<'a, Result<(), RecordError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Says something to whoever looks after the cluster. Returns at once and never fails: no work depends on being heard. Where there is
    /// nobody to tell, nothing happens.
    fn tell(&self, about: About, notice: Notice) {
        drop((about, notice));
    }
}
