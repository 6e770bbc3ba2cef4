//! Which failures an administrator must hear of, and where: an Event on the claim, the volume or the node. The table of errors is here, as
//! that of codes is in `status`; what passes by itself is said to nobody.

use crate::{
    pve::{
        ApiError,
        access::{Missing, missing_in},
    },
    telemetry::log::chain,
    types::{
        Region, VolumeHandle,
        notice::{About, Notice},
    },
    volume::{
        Volumes,
        attach::AttachError,
        attachments::{Hold, SweepError},
        create::{CreateError, NewVolume},
        delete::DeleteError,
        detach::DetachError,
        expand::ExpandError,
        holder::HolderError,
        modify::ModifyError,
        placement::{LocateError, PlaceError},
        vmerror::{Leftover, VmError},
    },
};

/// Whether a notice is about the volume or about the node of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Volume,
    Node,
}

/// The reason of every missing privilege.
const MISSING: &str = "MissingPrivilege";

type Verdict = Option<(On, &'static str)>;

/// Says why a volume could not be attached; the result passes through, as in the others.
pub(super) async fn attach<T>(
    volumes: &Volumes,
    handle: &VolumeHandle,
    node_id: &str,
    result: Result<T, AttachError>,
) -> Result<T, AttachError> {
    if let Err(error) = &result {
        tell(volumes, volume(handle), Some(node_id), &handle.region, of_attach(error), error).await;
    }
    result
}

/// Says why a volume could not be detached.
pub(super) async fn detach<T>(
    volumes: &Volumes,
    handle: &VolumeHandle,
    node_id: &str,
    result: Result<T, DetachError>,
) -> Result<T, DetachError> {
    if let Err(error) = &result {
        let node_id = Some(node_id).filter(|id| !id.is_empty());
        tell(volumes, volume(handle), node_id, &handle.region, of_detach(error), error).await;
    }
    result
}

/// Says why a volume could not be deleted.
pub(super) async fn delete<T>(
    volumes: &Volumes,
    handle: &VolumeHandle,
    result: Result<T, DeleteError>,
) -> Result<T, DeleteError> {
    if let Err(error) = &result {
        tell(volumes, volume(handle), None, &handle.region, of_delete(error), error).await;
    }
    result
}

/// Says why a volume could not be expanded.
pub(super) async fn expand<T>(
    volumes: &Volumes,
    handle: &VolumeHandle,
    result: Result<T, ExpandError>,
) -> Result<T, ExpandError> {
    if let Err(error) = &result {
        tell(volumes, volume(handle), None, &handle.region, of_expand(error), error).await;
    }
    result
}

/// Says why a volume could not be changed.
pub(super) async fn modify<T>(
    volumes: &Volumes,
    handle: &VolumeHandle,
    result: Result<T, ModifyError>,
) -> Result<T, ModifyError> {
    if let Err(error) = &result {
        tell(volumes, volume(handle), None, &handle.region, of_modify(error), error).await;
    }
    result
}

/// Says why a volume could not be made. Its claim is known where the provisioner tells it (`--extra-create-metadata`).
pub(super) async fn create<T>(
    volumes: &Volumes,
    claim: Option<(String, String)>,
    new: &NewVolume,
    result: Result<T, CreateError>,
) -> Result<T, CreateError> {
    if let (Err(error), Some((namespace, name))) = (&result, claim) {
        let region = new.places.first().map(|place| place.region.clone());
        if let Some(region) = region.or_else(|| volumes.regions().next().cloned()) {
            let about = About::Claim { namespace, name };
            tell(volumes, about, None, &region, of_create(error), error).await;
        }
    }
    result
}

fn volume(handle: &VolumeHandle) -> About {
    About::Volume(handle.to_string())
}

async fn tell(
    volumes: &Volumes,
    volume: About,
    node_id: Option<&str>,
    region: &Region,
    verdict: Verdict,
    error: &(dyn std::error::Error + Sync),
) {
    let mut note = chain(error);
    // A missing privilege and refused credentials are so wherever they show.
    let hidden = || verdict.filter(|(_, reason)| *reason == MISSING).map(|_| Missing::all_vms());
    let (on, reason) = if let Some(missing) = missing_in(&note).or_else(hidden) {
        note.push_str("; hint: ");
        note.push_str(&missing.remedy(&volumes.who(region).await));
        (On::Volume, MISSING)
    } else if is_unauthenticated(error) {
        // The text says for how long it is not asked again, which is another one each time.
        let who = volumes.who(region).await;
        note = format!(
            "Proxmox refuses the credentials of `{who}` for region `{region}`; hint: they may be expired or deleted; make new ones and put them where the configuration says"
        );
        (On::Volume, "CredentialsRefused")
    } else {
        let Some(verdict) = verdict else { return };
        verdict
    };
    let about = match (on, node_id) {
        (On::Node, Some(node_id)) => About::Node(node_id.to_owned()),
        _ => volume,
    };
    volumes.cluster().tell(about, Notice::warning(reason, note));
}

fn is_unauthenticated(error: &(dyn std::error::Error + Sync)) -> bool {
    let mut next = error.source();
    while let Some(cause) = next {
        let direct = cause.downcast_ref::<ApiError>();
        let shared = cause.downcast_ref::<std::sync::Arc<ApiError>>().map(AsRef::as_ref);
        if direct.or(shared).is_some_and(ApiError::is_unauthenticated) {
            return true;
        }
        next = cause.source();
    }
    false
}

fn of_attach(error: &AttachError) -> Verdict {
    match error {
        AttachError::Locate(error) => of_locate(error),
        AttachError::Place(error) => of_place(error),
        AttachError::WrongRegion { .. } | AttachError::WrongZone { .. } => {
            Some((On::Volume, "VolumeElsewhere"))
        }
        AttachError::Sweep { source, .. } => of_sweep(source),
        AttachError::Held { .. } => Some((On::Volume, "VolumeHeld")),
        AttachError::Full { .. } => Some((On::Node, "NoFreeSlot")),
        AttachError::Unusable { .. } => Some((On::Volume, "DriveUnusable")),
        AttachError::Vm { source, .. } => of_vm(source),
        AttachError::Holder(error) => of_holder(error),
        _ => None,
    }
}

fn of_detach(error: &DetachError) -> Verdict {
    match error {
        DetachError::Locate(error) => of_locate(error),
        DetachError::Place(error) => of_place(error),
        DetachError::Sweep { source, .. } => of_sweep(source),
        DetachError::Vm { source, .. } => of_vm(source),
    }
}

fn of_delete(error: &DeleteError) -> Verdict {
    match error {
        DeleteError::Place(error) => of_place(error),
        DeleteError::Sweep { source, .. } => of_sweep(source),
        DeleteError::InUse { holder, .. } if matches!(holder.hold, Hold::Snapshot { .. }) => {
            Some((On::Volume, "VolumeInSnapshot"))
        }
        DeleteError::InUse { .. } => Some((On::Volume, "VolumeHeld")),
        DeleteError::Owned { .. } | DeleteError::NoOwner { .. } => Some((On::Volume, "VolumeOfVm")),
        DeleteError::Reference { source, .. } => of_vm(source),
        DeleteError::Holder(error) => of_holder(error),
        _ => None,
    }
}

fn of_expand(error: &ExpandError) -> Verdict {
    match error {
        ExpandError::Place(error) => of_place(error),
        ExpandError::Sweep { source, .. } => of_sweep(source),
        ExpandError::Vm { source, .. } => of_vm(source),
        ExpandError::Elsewhere { .. } => Some((On::Volume, "VolumeElsewhere")),
        ExpandError::NoSpace { .. } => Some((On::Volume, "StorageFull")),
        ExpandError::Holder { source, .. } => of_holder(source),
        _ => None,
    }
}

fn of_modify(error: &ModifyError) -> Verdict {
    match error {
        ModifyError::Place(error) => of_place(error),
        ModifyError::Sweep { source, .. } => of_sweep(source),
        ModifyError::Elsewhere { .. } => Some((On::Volume, "VolumeElsewhere")),
        ModifyError::Pending { .. } => Some((On::Volume, "PendingChange")),
        ModifyError::Vm { source, .. } => of_vm(source),
        ModifyError::Presence(_) | ModifyError::Record { .. } => None,
    }
}

fn of_create(error: &CreateError) -> Verdict {
    match error {
        CreateError::NoRoom { .. } | CreateError::NoSpace { .. } => Some((On::Volume, "StorageFull")),
        CreateError::NoSuchStorage { .. } => Some((On::Volume, "NoSuchStorage")),
        CreateError::InDoubt { source, .. } => of_create(source),
        _ => None,
    }
}

fn of_locate(error: &LocateError) -> Verdict {
    match error {
        LocateError::Hidden { .. } => Some((On::Node, MISSING)),
        LocateError::Ambiguous { .. } => Some((On::Node, "DuplicateUuid")),
        LocateError::NoSuchVm { .. } => Some((On::Node, "NoSuchVm")),
        _ => None,
    }
}

fn of_place(error: &PlaceError) -> Verdict {
    match error {
        PlaceError::NoSuchStorage { .. } => Some((On::Volume, "NoSuchStorage")),
        PlaceError::Inactive { .. } => Some((On::Volume, "StorageInactive")),
        _ => None,
    }
}

fn of_sweep(error: &SweepError) -> Verdict {
    match error {
        SweepError::Hidden { .. } => Some((On::Volume, MISSING)),
        _ => None,
    }
}

fn of_holder(error: &HolderError) -> Verdict {
    match error {
        HolderError::Forbidden(_) => Some((On::Volume, MISSING)),
        HolderError::NoVmid { .. } | HolderError::NotOurs { .. } => Some((On::Volume, "NoHolderVm")),
        HolderError::Vm(error) => of_vm(error),
        _ => None,
    }
}

fn of_vm(error: &VmError) -> Verdict {
    let reason = match error {
        VmError::Locked { .. } => "VmLocked",
        VmError::Protected { .. } => "VmProtected",
        VmError::HotplugOff { .. } => "HotplugOff",
        VmError::ScsiHardware { .. } => "ScsiController",
        VmError::QemuSilent { .. } => "QemuSilent",
        VmError::Stray { .. } => "UnknownDrive",
        VmError::PendingOther { .. }
        | VmError::Request { left: Leftover::Left { .. }, .. }
        | VmError::Task { left: Leftover::Left { .. }, .. } => "PendingChange",
        _ => return None,
    };
    Some((On::Node, reason))
}
