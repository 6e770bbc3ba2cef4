//! The Controller service: requests become typed commands, and each command runs in a task of its own.

mod list;
mod validate;

use std::{collections::BTreeMap, sync::Arc};

use tonic::{Request, Response, Status};

use super::{
    capability::{self, AccessType, Capability, Sharing},
    notice,
    proto::{self, controller_server::Controller},
    request::{object, range, required, run, signed},
};
use crate::{
    runtime::Operations,
    types::{Bytes, VolumeHandle, attributes::Attributes, params::Parameters, topology},
    volume::{Volumes, attach::Use, create::NewVolume},
};

/// The Controller service over the volumes of all regions.
#[derive(Clone)]
pub struct ControllerService {
    volumes: Volumes,
    operations: Operations,
    may_act: Gate,
}

/// Says whether this process may act: whether it holds the Lease, where there is one.
pub type Gate = Arc<dyn Fn() -> bool + Send + Sync>;

impl ControllerService {
    /// The service; `operations` is drained when the process ends.
    pub fn new(volumes: Volumes, operations: Operations) -> Self {
        Self { volumes, operations, may_act: Arc::new(|| true) }
    }

    /// The service that answers UNAVAILABLE while the gate is closed: what another controller does meanwhile makes any answer untrue.
    #[must_use]
    pub fn behind(mut self, gate: Gate) -> Self {
        self.may_act = gate;
        self
    }

    fn check_may_act(&self) -> Result<(), Status> {
        if (self.may_act)() {
            return Ok(());
        }
        Err(Status::unavailable(
            "this controller does not hold the lease; another one acts, or will in a moment",
        ))
    }

    /// The handle of a volume id; `None` for an id that this driver never gave to a volume.
    ///
    /// An id that begins like a handle of a configured region is somebody's volume, though it can't be read: nothing may be said of it.
    fn parse_ours(&self, volume_id: &str) -> Result<Option<VolumeHandle>, Status> {
        match volume_id.parse::<VolumeHandle>() {
            Ok(handle) => Ok(Some(handle)),
            Err(error) => {
                let region = volume_id.split('/').next().unwrap_or_default();
                let looks_like_ours = volume_id.matches('/').count() >= 3
                    && self.volumes.regions().any(|known| known.as_str() == region);
                if looks_like_ours { Err(Status::invalid_argument(error.to_string())) } else { Ok(None) }
            }
        }
    }
}

/// A volume id that is no handle is the id of a volume that does not exist.
fn parse_existing(volume_id: &str) -> Result<VolumeHandle, Status> {
    required("volume_id", volume_id)?;
    volume_id
        .parse()
        .map_err(|error| Status::not_found(format!("volume `{volume_id}` does not exist: {error}")))
}

/// The places a volume may be in, preferred ones first, each once.
fn places(requirements: Option<&proto::TopologyRequirement>) -> Result<Vec<topology::Place>, Status> {
    let mut places = Vec::new();
    for topology in requirements.iter().flat_map(|r| r.preferred.iter().chain(&r.requisite)) {
        let place = topology::Place::from_segments(&topology.segments)
            .map_err(|error| Status::invalid_argument(format!("the topology can not be read: {error}")))?;
        if let Some(place) = place
            && !places.contains(&place)
        {
            places.push(place);
        }
    }
    Ok(places)
}

/// What a VolumeAttributesClass says.
fn attributes(map: &BTreeMap<String, String>) -> Result<Attributes, Status> {
    Attributes::parse(map).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// Places as CSI writes them.
fn topologies(places: &[topology::Place]) -> Vec<proto::Topology> {
    places.iter().map(|place| proto::Topology { segments: place.segments() }).collect()
}

/// Whether several nodes are to use a volume at once.
fn is_for_many(capabilities: &[Capability]) -> bool {
    capabilities.iter().any(|capability| capability.sharing == Sharing::ManyReaders)
}

/// What a PV keeps of the parameters: all but what Kubernetes added for this request.
fn volume_context(parameters: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let keep = |key: &str| !key.starts_with("csi.storage.k8s.io/");
    parameters.iter().filter(|(key, _)| keep(key)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Namespace and name of the claim that a volume is made for, where the provisioner tells it.
fn claim(parameters: &BTreeMap<String, String>) -> Option<(String, String)> {
    let get = |key: &str| parameters.get(&format!("csi.storage.k8s.io/pvc/{key}")).cloned();
    get("namespace").zip(get("name"))
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<proto::CreateVolumeRequest>,
    ) -> Result<Response<proto::CreateVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("name", &request.name)?;
        let capabilities = capability::check_all(&request.volume_capabilities)?;
        if request.volume_content_source.is_some() {
            return Err(Status::invalid_argument(
                "volumes can not be made from snapshots or other volumes yet",
            ));
        }
        let mut asked = request.parameters.clone();
        attributes(&request.mutable_parameters)?.write_to(&mut asked);
        let (parameters, warnings) =
            Parameters::of_new_volume(&asked).map_err(|error| Status::invalid_argument(error.to_string()))?;
        for warning in warnings {
            tracing::warn!(volume = request.name, warning, "odd storageclass");
        }
        let (required, limit) = range(request.capacity_range.as_ref())?;
        let new = NewVolume {
            name: request.name.clone(),
            required,
            limit,
            parameters,
            for_many: is_for_many(&capabilities),
            places: places(request.accessibility_requirements.as_ref())?,
        };
        let (volumes, context) = (self.volumes.clone(), volume_context(&asked));
        let claim = claim(&request.parameters);
        run(&self.operations, "CreateVolume", (&request.name, &request.name), &request, async move {
            let created = notice::create(&volumes, claim, &new, volumes.create(&new).await).await?;
            let volume = proto::Volume {
                capacity_bytes: signed(created.size),
                volume_id: created.handle.to_string(),
                volume_context: context,
                content_source: None,
                accessible_topology: topologies(&created.places),
            };
            Ok::<_, Status>(proto::CreateVolumeResponse { volume: Some(volume) })
        })
        .await
    }

    async fn delete_volume(
        &self,
        request: Request<proto::DeleteVolumeRequest>,
    ) -> Result<Response<proto::DeleteVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let Some(handle) = self.parse_ours(&request.volume_id)? else {
            // There is nothing of it to delete.
            return Ok(Response::new(proto::DeleteVolumeResponse {}));
        };
        let volumes = self.volumes.clone();
        run(&self.operations, "DeleteVolume", (&request.volume_id, &object(&handle)), &request, async move {
            notice::delete(&volumes, &handle, volumes.delete(&handle).await).await?;
            Ok::<_, Status>(proto::DeleteVolumeResponse {})
        })
        .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<proto::ControllerPublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerPublishVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        required("node_id", &request.node_id)?;
        let usage = match capability::check(request.volume_capability.as_ref())?.sharing {
            Sharing::ManyReaders => Use::ReadByMany,
            sharing if sharing.is_read_only() || request.readonly => Use::Read,
            _ => Use::Write,
        };
        let handle = parse_existing(&request.volume_id)?;
        let (mut parameters, warnings) = Parameters::of_existing_volume(&request.volume_context);
        for warning in warnings {
            tracing::warn!(volume = %handle, warning, "odd volume context");
        }
        let (volumes, node_id) = (self.volumes.clone(), request.node_id.clone());
        run(
            &self.operations,
            "ControllerPublishVolume",
            (&request.volume_id, &object(&handle)),
            &request,
            async move {
                volumes.attributes(&handle).await?.apply_to(&mut parameters.drive);
                let attached = volumes.attach(&handle, &node_id, &parameters.drive, usage).await;
                let disk = notice::attach(&volumes, &handle, &node_id, attached).await?;
                Ok::<_, Status>(proto::ControllerPublishVolumeResponse { publish_context: disk.to_context() })
            },
        )
        .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<proto::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerUnpublishVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let Some(handle) = self.parse_ours(&request.volume_id)? else {
            // It is attached nowhere.
            return Ok(Response::new(proto::ControllerUnpublishVolumeResponse {}));
        };
        let (volumes, node_id) = (self.volumes.clone(), request.node_id.clone());
        run(
            &self.operations,
            "ControllerUnpublishVolume",
            (&request.volume_id, &object(&handle)),
            &request,
            async move {
                let detached =
                    volumes.detach(&handle, Some(node_id.as_str()).filter(|id| !id.is_empty())).await;
                notice::detach(&volumes, &handle, &node_id, detached).await?;
                Ok::<_, Status>(proto::ControllerUnpublishVolumeResponse {})
            },
        )
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<proto::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<proto::ValidateVolumeCapabilitiesResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("`volume_capabilities` is missing"));
        }
        let handle = parse_existing(&request.volume_id)?;
        let found = self.volumes.find(&handle).await?;
        let refused =
            |message: String| proto::ValidateVolumeCapabilitiesResponse { confirmed: None, message };
        match capability::check_all(&request.volume_capabilities) {
            Err(status) => return Ok(Response::new(refused(status.message().to_owned()))),
            Ok(capabilities) if is_for_many(&capabilities) && found.place.zone.is_some() => {
                let storage = handle.storage();
                return Ok(Response::new(refused(format!(
                    "storage `{storage}` is local to a Proxmox node: its volumes can not be given to several nodes"
                ))));
            }
            Ok(_) => {}
        }
        if let Err(status) = attributes(&request.mutable_parameters) {
            return Ok(Response::new(refused(status.message().to_owned())));
        }
        if let Err(why) = validate::matches(&found, &request) {
            return Ok(Response::new(refused(why)));
        }
        let confirmed = proto::validate_volume_capabilities_response::Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
            mutable_parameters: request.mutable_parameters,
        };
        let response =
            proto::ValidateVolumeCapabilitiesResponse { confirmed: Some(confirmed), message: String::new() };
        Ok(Response::new(response))
    }

    async fn get_capacity(
        &self,
        request: Request<proto::GetCapacityRequest>,
    ) -> Result<Response<proto::GetCapacityResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        let capabilities: Result<Vec<_>, _> =
            request.volume_capabilities.iter().map(|one| capability::check(Some(one))).collect();
        let Ok(capabilities) = capabilities else {
            // No volume with such a capability can be made, so there is no room for one.
            return Ok(Response::new(proto::GetCapacityResponse::default()));
        };
        let (parameters, _) = Parameters::of_new_volume(&request.parameters)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let place = match &request.accessible_topology {
            Some(topology) => topology::Place::from_segments(&topology.segments).map_err(|error| {
                Status::invalid_argument(format!("the topology can not be read: {error}"))
            })?,
            None => None,
        };
        let capacity = self.volumes.capacity(&parameters, place.as_ref(), is_for_many(&capabilities)).await?;
        Ok(Response::new(proto::GetCapacityResponse {
            available_capacity: signed(capacity.available),
            maximum_volume_size: Some(signed(capacity.largest_volume)),
            minimum_volume_size: Some(signed(Bytes::VOLUME_STEP)),
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<proto::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<proto::ControllerGetCapabilitiesResponse>, Status> {
        use proto::controller_service_capability::{Rpc, Type, rpc};
        let capabilities = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::PublishUnpublishVolume,
            rpc::Type::GetCapacity,
            rpc::Type::ExpandVolume,
            rpc::Type::PublishReadonly,
            rpc::Type::ListVolumes,
            rpc::Type::GetVolume,
            rpc::Type::ModifyVolume,
            rpc::Type::SingleNodeMultiWriter,
        ];
        let capabilities = capabilities.map(|kind| proto::ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        });
        Ok(Response::new(proto::ControllerGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<proto::ControllerExpandVolumeRequest>,
    ) -> Result<Response<proto::ControllerExpandVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let (needed, limit) = range(request.capacity_range.as_ref())?;
        let needed =
            needed.ok_or_else(|| Status::invalid_argument("`capacity_range.required_bytes` is missing"))?;
        let handle = parse_existing(&request.volume_id)?;
        // A raw block volume has nothing to grow on the node; without a capability it is not known to be one.
        let is_block = match &request.volume_capability {
            Some(capability) => capability::check(Some(capability))?.access == AccessType::Block,
            None => false,
        };
        let volumes = self.volumes.clone();
        run(
            &self.operations,
            "ControllerExpandVolume",
            (&request.volume_id, &object(&handle)),
            &request,
            async move {
                let expanded = volumes.expand(&handle, needed, limit).await;
                let size = notice::expand(&volumes, &handle, expanded).await?;
                Ok::<_, Status>(proto::ControllerExpandVolumeResponse {
                    capacity_bytes: signed(size),
                    node_expansion_required: !is_block,
                })
            },
        )
        .await
    }

    async fn list_volumes(
        &self,
        request: Request<proto::ListVolumesRequest>,
    ) -> Result<Response<proto::ListVolumesResponse>, Status> {
        self.check_may_act()?;
        list::list_volumes(&self.volumes, request.get_ref()).await.map(Response::new)
    }

    async fn create_snapshot(
        &self,
        _: Request<proto::CreateSnapshotRequest>,
    ) -> Result<Response<proto::CreateSnapshotResponse>, Status> {
        Err(not_advertised("CreateSnapshot"))
    }

    async fn delete_snapshot(
        &self,
        _: Request<proto::DeleteSnapshotRequest>,
    ) -> Result<Response<proto::DeleteSnapshotResponse>, Status> {
        Err(not_advertised("DeleteSnapshot"))
    }

    async fn list_snapshots(
        &self,
        _: Request<proto::ListSnapshotsRequest>,
    ) -> Result<Response<proto::ListSnapshotsResponse>, Status> {
        Err(not_advertised("ListSnapshots"))
    }

    async fn get_snapshot(
        &self,
        _: Request<proto::GetSnapshotRequest>,
    ) -> Result<Response<proto::GetSnapshotResponse>, Status> {
        Err(not_advertised("GetSnapshot"))
    }

    async fn controller_get_volume(
        &self,
        request: Request<proto::ControllerGetVolumeRequest>,
    ) -> Result<Response<proto::ControllerGetVolumeResponse>, Status> {
        self.check_may_act()?;
        let handle = parse_existing(&request.get_ref().volume_id)?;
        list::get_volume(&self.volumes, &handle).await.map(Response::new)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<proto::ControllerModifyVolumeRequest>,
    ) -> Result<Response<proto::ControllerModifyVolumeResponse>, Status> {
        self.check_may_act()?;
        let request = request.into_inner();
        let handle = parse_existing(&request.volume_id)?;
        let changes = attributes(&request.mutable_parameters)?;
        if changes.is_empty() {
            return Err(Status::invalid_argument("`mutable_parameters` is missing"));
        }
        let volumes = self.volumes.clone();
        run(
            &self.operations,
            "ControllerModifyVolume",
            (&request.volume_id, &object(&handle)),
            &request,
            async move {
                notice::modify(&volumes, &handle, volumes.modify(&handle, &changes).await).await?;
                Ok::<_, Status>(proto::ControllerModifyVolumeResponse {})
            },
        )
        .await
    }
}

/// A call that belongs to a capability this driver does not advertise.
fn not_advertised(call: &str) -> Status {
    Status::unimplemented(format!("{call} is not among the capabilities of this driver"))
}
