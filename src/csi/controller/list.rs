//! `ListVolumes` and `ControllerGetVolume`.

use tonic::Status;

use super::topologies;
use crate::{
    csi::{proto, request::signed},
    types::VolumeHandle,
    volume::{Volumes, inventory::ListedVolume},
};

/// A page of the volumes of all regions, in the order of their handles.
///
/// The token of the next page is the last handle of this one: what is made or deleted between two pages moves nothing else.
pub(super) async fn list_volumes(
    volumes: &Volumes,
    request: &proto::ListVolumesRequest,
) -> Result<proto::ListVolumesResponse, Status> {
    let most = usize::try_from(request.max_entries)
        .map_err(|_| Status::invalid_argument("`max_entries` is negative"))?;
    let after = after(volumes, &request.starting_token)?;
    let listed = volumes.list().await?;
    let mut rest =
        listed.into_iter().filter(|volume| after.as_ref().is_none_or(|after| volume.handle > *after));
    let page: Vec<ListedVolume> = rest.by_ref().take(if most == 0 { usize::MAX } else { most }).collect();
    let last = page.last().map(|volume| volume.handle.to_string());
    let next_token = rest.next().and(last).unwrap_or_default();
    let entry = |listed: ListedVolume| {
        let volume = proto::Volume {
            capacity_bytes: signed(listed.size),
            volume_id: listed.handle.to_string(),
            accessible_topology: topologies(&listed.places),
            ..proto::Volume::default()
        };
        proto::list_volumes_response::Entry { volume: Some(volume), status: None }
    };
    Ok(proto::ListVolumesResponse { entries: page.into_iter().map(entry).collect(), next_token })
}

/// The handle after which a page begins. A token that was never given is ABORTED: the listing is to begin anew.
fn after(volumes: &Volumes, token: &str) -> Result<Option<VolumeHandle>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    let handle: Option<VolumeHandle> = token.parse().ok();
    match handle.filter(|handle| volumes.regions().any(|region| *region == handle.region)) {
        Some(handle) => Ok(Some(handle)),
        None => {
            Err(Status::aborted(format!("`{token}` is no `next_token` of this driver; begin without one")))
        }
    }
}

/// One volume. Where it is attached is not told: only a look at every VM would say.
pub(super) async fn get_volume(
    volumes: &Volumes,
    handle: &VolumeHandle,
) -> Result<proto::ControllerGetVolumeResponse, Status> {
    let found = volumes.find(handle).await?;
    let volume = proto::Volume {
        capacity_bytes: signed(found.size),
        // As it is asked for: a volume may have two handles.
        volume_id: handle.to_string(),
        accessible_topology: topologies(&found.places),
        ..proto::Volume::default()
    };
    let status = proto::controller_get_volume_response::VolumeStatus::default();
    Ok(proto::ControllerGetVolumeResponse { volume: Some(volume), status: Some(status) })
}
