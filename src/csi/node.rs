//! The Node service: requests become typed commands, and each command runs in a task of its own.

use std::{collections::BTreeMap, future::Future};

use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    capability::{self, AccessType},
    proto::{
        self, NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
        NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodeGetVolumeStatsRequest,
        NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
        NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
        NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, VolumeUsage,
        node_server, node_service_capability, volume_usage::Unit,
    },
    request::{object, range, required, run, signed},
};
use crate::{
    host::{Usage, luks::Passphrase},
    node::{Access, Expand, MountFlags, MountPath, Node, Publish, Stage, Stats, Unpublish, Unstage},
    runtime::Operations,
    types::{Bytes, VolumeHandle, params::Parameters, publish::PublishedDisk, sharing::Sharing},
};

/// The Node service over this node.
#[derive(Clone)]
pub struct NodeService {
    node: Node,
    operations: Operations,
    unfit: Option<String>,
}

impl NodeService {
    /// The service; `operations` is drained when the process ends.
    pub fn new(node: Node, operations: Operations) -> Self {
        Self { node, operations, unfit: None }
    }

    /// Refuses, where there is a reason, to give volumes to this machine; to take them away is always allowed.
    #[must_use]
    pub fn unfit(mut self, reason: Option<String>) -> Self {
        self.unfit = reason;
        self
    }

    fn fit(&self) -> Result<(), Status> {
        self.unfit.as_ref().map_or(Ok(()), |reason| Err(Status::failed_precondition(reason)))
    }

    /// Runs work on a volume in a task of its own.
    async fn run<R, T, E, F>(
        &self,
        what: &'static str,
        volume: &str,
        request: &R,
        work: impl FnOnce(Node) -> F,
    ) -> Result<Response<T>, Status>
    where
        R: Message,
        T: Clone + Send + Sync + 'static,
        E: Into<Status>,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        let work = work(self.node.clone());
        // An id that is no handle is a key as well: a volume of it may be mounted by another hand.
        let object =
            volume.parse().map_or_else(|_| volume.to_owned(), |handle: VolumeHandle| object(&handle));
        run(&self.operations, what, (volume, &object), request, work).await
    }
}

fn path(field: &str, value: &str) -> Result<MountPath, Status> {
    required(field, value)?;
    MountPath::new(value).ok_or_else(|| {
        Status::invalid_argument(format!("`{field}` is `{value}`, and must be absolute and without `..`"))
    })
}

/// The path of a volume that exists. At a path that can't be one there is none.
fn volume_path(value: &str) -> Result<MountPath, Status> {
    required("volume_path", value)?;
    MountPath::new(value)
        .ok_or_else(|| Status::not_found(format!("no volume is at `{value}`: it is no absolute path")))
}

/// The access that a capability asks for, and who may have it at once.
fn access(capability: Option<&proto::VolumeCapability>) -> Result<(Access, Sharing), Status> {
    let capability::Capability { access, sharing } = capability::check(capability)?;
    let access = match access {
        AccessType::Block => Access::Block,
        AccessType::Mount { fs_type, flags, group: _ } => {
            let invalid = |error: &dyn std::error::Error| Status::invalid_argument(error.to_string());
            let kind = if fs_type.is_empty() { None } else { Some(fs_type.parse()) };
            let kind = kind.transpose().map_err(|error: crate::types::ParseError| invalid(&error))?;
            let flags = MountFlags::new(&flags).map_err(|error| invalid(&error))?;
            Access::Filesystem { kind, flags }
        }
    };
    Ok((access, sharing))
}

/// The passphrase of a volume that is, or is to be, encrypted.
fn key(secrets: &BTreeMap<String, String>) -> Result<Option<Passphrase>, Status> {
    let Some(key) = secrets.get("encryption-passphrase") else { return Ok(None) };
    if key.is_empty() {
        return Err(Status::invalid_argument("the secret's key `encryption-passphrase` is empty"));
    }
    Ok(Some(Passphrase::new(key.as_bytes())))
}

fn disk(context: &BTreeMap<String, String>) -> Result<PublishedDisk, Status> {
    PublishedDisk::from_context(context).map_err(|error| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl node_server::Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        self.fit()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let key = key(&request.secrets)?;
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let (access, sharing) = access(request.volume_capability.as_ref())?;
        let disk = disk(&request.publish_context)?;
        let (parameters, warnings) = Parameters::of_existing_volume(&request.volume_context);
        if !warnings.is_empty() {
            tracing::debug!(volume = request.volume_id, ?warnings, "the volume context has odd values");
        }
        let volume = request.volume_id.clone();
        let options = parameters.filesystem;
        let command = Stage { volume, staging, disk, access, sharing, options, key };
        self.run("stage", &request.volume_id, &request, async move |node: Node| {
            node.stage(&command).await.map(|()| NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let command = Unstage { volume: request.volume_id.clone(), staging };
        self.run("unstage", &request.volume_id, &request, async move |node: Node| {
            node.unstage(&command).await.map(|()| NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        self.fit()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let encrypted = key(&request.secrets)?.is_some();
        let target = path("target_path", &request.target_path)?;
        let (access, sharing) = access(request.volume_capability.as_ref())?;
        // The CSI text: FAILED_PRECONDITION where the staging path is not given though the driver stages.
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition("`staging_target_path` is missing"));
        }
        let staging = path("staging_target_path", &request.staging_target_path)?;
        let disk = disk(&request.publish_context)?;
        let readonly = request.readonly;
        let volume = request.volume_id.clone();
        let command = Publish { volume, staging, target, disk, access, sharing, readonly, encrypted };
        self.run("publish", &request.volume_id, &request, async move |node: Node| {
            node.publish(&command).await.map(|()| NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let command = Unpublish { volume: request.volume_id.clone(), target };
        self.run("unpublish", &request.volume_id, &request, async move |node: Node| {
            node.unpublish(&command).await.map(|()| NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        tracing::Span::current().record("volume", &request.volume_id);
        required("volume_id", &request.volume_id)?;
        let path = volume_path(&request.volume_path)?;
        // Reads only, so it needs no task of its own and waits for no other operation.
        let trouble = self.node.condition(&path).await?;
        let usage = match (self.node.stats(&path).await, &trouble) {
            (Ok(Stats::Block(size)), _) => {
                vec![VolumeUsage { total: signed(size), unit: Unit::Bytes.into(), ..VolumeUsage::default() }]
            }
            (Ok(Stats::Filesystem(usage)), _) => usages(&usage),
            // What does not work need not be measurable.
            (Err(_), Some(_)) => Vec::new(),
            (Err(error), None) => return Err(error.into()),
        };
        let volume_condition = Some(proto::VolumeCondition {
            abnormal: trouble.is_some(),
            message: trouble.map_or_else(|| "nothing is wrong".to_owned(), |trouble| trouble.to_string()),
        });
        Ok(Response::new(NodeGetVolumeStatsResponse { usage, volume_condition }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        self.fit()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let key = key(&request.secrets)?;
        let path = volume_path(&request.volume_path)?;
        if request.volume_capability.is_some() {
            access(request.volume_capability.as_ref())?;
        }
        let (required, limit) = range(request.capacity_range.as_ref())?;
        let command = Expand { volume: request.volume_id.clone(), path, required, limit, key };
        self.run("expand", &request.volume_id, &request, async move |node: Node| {
            let size = node.expand(&command).await;
            size.map(|size| NodeExpandVolumeResponse { capacity_bytes: signed(size) })
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        use node_service_capability::{Rpc, Type, rpc};
        let capability = |kind: rpc::Type| proto::NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        let kinds = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::ExpandVolume,
            rpc::Type::VolumeCondition,
            rpc::Type::SingleNodeMultiWriter,
        ];
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: kinds.map(capability).into() }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        self.fit()?;
        let info = self.node.info().await?;
        Ok(Response::new(NodeGetInfoResponse {
            node_id: info.node_id,
            max_volumes_per_node: i64::from(info.max_volumes.get()),
            accessible_topology: info.place.map(|place| proto::Topology { segments: place.segments() }),
        }))
    }
}

/// Space, and inodes where their number has a limit: btrfs makes them as it needs them.
fn usages(usage: &Usage) -> Vec<VolumeUsage> {
    let bytes = volume_usage(Unit::Bytes, usage.total_bytes, usage.used_bytes, usage.available_bytes);
    let inodes = volume_usage(Unit::Inodes, usage.total_inodes, usage.used_inodes, usage.free_inodes);
    if usage.total_inodes == 0 { vec![bytes] } else { vec![bytes, inodes] }
}

fn volume_usage(unit: Unit, total: u64, used: u64, available: u64) -> VolumeUsage {
    let [total, used, available] = [total, used, available].map(|value| signed(Bytes::new(value)));
    VolumeUsage { available, total, used, unit: unit.into() }
}
