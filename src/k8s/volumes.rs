//! What Kubernetes keeps of a volume: its `PersistentVolume`, found by the volume handle.
//!
//! The API server finds no PV by its handle, but the provisioner calls the PV what it calls the volume, and the disk bears that name. So a PV is
//! asked for by that name first, and only where that is another's are all PVs looked through.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::api::{core::v1::PersistentVolume, storage::v1::VolumeAttributesClass};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};

use crate::types::{
    VolumeHandle,
    attributes::Attributes,
    cluster::{RecordError, VolumeRecord},
};

/// Annotation of a PV: `keep` keeps the disk when the PV is deleted.
pub const LIFECYCLE: &str = "csi.proxmox.sinextra.dev/lifecycle";
/// Annotation of a PV, written by the controller: what was changed since the volume was made, as JSON.
pub const ATTRIBUTES: &str = "csi.proxmox.sinextra.dev/attributes";

/// PVs of one page of a listing.
const PAGE: u32 = 500;

/// The PVs of a Kubernetes cluster.
#[derive(Clone)]
pub(super) struct PersistentVolumes {
    volumes: Api<PersistentVolume>,
    classes: Api<VolumeAttributesClass>,
    /// Names of PVs that had to be looked for, by handle. Hints only.
    names: Arc<Mutex<BTreeMap<String, String>>>,
}

/// The API server does not let the controller look.
#[derive(Debug, thiserror::Error)]
#[error(
    "hint: the ClusterRole of the controller needs `get`, `list` and `patch` on persistentvolumes and `get` on volumeattributesclasses"
)]
struct Forbidden(#[source] Failed);

fn record_error(what: &'static str, handle: &str, error: Failed) -> RecordError {
    let source = match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) if status.code == 403 => Box::new(Forbidden(error)),
        _ => error,
    };
    RecordError { what, volume: handle.to_owned(), source }
}

/// There is no PV in which something could be kept.
#[derive(Debug, thiserror::Error)]
#[error("no PersistentVolume has this handle, so that the change can not be kept")]
struct NoVolume;

pub(super) type Failed = Box<dyn std::error::Error + Send + Sync>;

impl PersistentVolumes {
    pub(super) fn new(client: Client) -> Self {
        Self { volumes: Api::all(client.clone()), classes: Api::all(client), names: Arc::default() }
    }

    pub(super) async fn record(&self, handle: &str) -> Result<Option<VolumeRecord>, RecordError> {
        let read = async {
            let Some(volume) = self.find(handle).await? else { return Ok(None) };
            let keep = volume.annotations().get(LIFECYCLE).is_some_and(|value| value.trim() == "keep");
            Ok(Some(VolumeRecord { attributes: self.attributes(&volume).await?, keep }))
        };
        read.await.map_err(|error| record_error("look up", handle, error))
    }

    pub(super) async fn keep(&self, handle: &str, attributes: &Attributes) -> Result<(), RecordError> {
        let write = async {
            let volume = self.find(handle).await?.ok_or(NoVolume)?;
            let text = serde_json::to_string(&attributes.to_map())?;
            let patch = serde_json::json!({ "metadata": { "annotations": { ATTRIBUTES: text } } });
            self.volumes.patch(&volume.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await?;
            Ok::<_, Failed>(())
        };
        write.await.map_err(|error| record_error("write", handle, error))
    }

    /// What was changed: our own record, or what the class says that the PV names: the driver before this one kept no record.
    async fn attributes(&self, volume: &PersistentVolume) -> Result<Attributes, Failed> {
        if let Some(text) = volume.annotations().get(ATTRIBUTES) {
            let map: BTreeMap<String, String> = serde_json::from_str(text)
                .map_err(|error| format!("its annotation `{ATTRIBUTES}` can not be read: {error}"))?;
            return Ok(Attributes::parse_known(&map));
        }
        let class = volume.spec.as_ref().and_then(|spec| spec.volume_attributes_class_name.as_deref());
        let Some(class) = class.filter(|class| !class.is_empty()) else { return Ok(Attributes::default()) };
        let parameters = self.classes.get_opt(class).await?.and_then(|class| class.parameters);
        Ok(parameters.map(|map| Attributes::parse_known(&map)).unwrap_or_default())
    }

    /// The PV of a volume.
    pub(super) async fn find(&self, handle: &str) -> Result<Option<PersistentVolume>, Failed> {
        let has = |volume: &PersistentVolume| {
            let csi = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref());
            csi.is_some_and(|csi| csi.volume_handle == handle)
        };
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner).get(handle).cloned();
        if let Some(name) = names.or_else(|| likely_name(handle))
            && let Some(volume) = self.volumes.get_opt(&name).await?.filter(has)
        {
            return Ok(Some(volume));
        }
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = self.volumes.list(&params).await?;
            if let Some(volume) = page.items.into_iter().find(has) {
                let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                names.insert(handle.to_owned(), volume.name_any());
                return Ok(Some(volume));
            }
            match page.metadata.continue_ {
                Some(next) if !next.is_empty() => params = params.continue_token(&next),
                _ => return Ok(None),
            }
        }
    }
}

/// The name of the PV that the provisioner made for a disk: `pvc-1` of `…/9999/vm-9999-pvc-1.raw`.
fn likely_name(handle: &str) -> Option<String> {
    let handle: VolumeHandle = handle.parse().ok()?;
    let disk = handle.name().as_str().rsplit('/').next()?;
    let disk = [".raw", ".qcow2"].iter().find_map(|ending| disk.strip_suffix(ending)).unwrap_or(disk);
    let (_, name) = disk.strip_prefix("vm-")?.split_once('-')?;
    // What can't be a name is not asked for: it would be another path.
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    (!name.is_empty() && name.chars().all(legal)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_bears_the_name_of_its_volume() {
        for (handle, name) in [
            ("r//shared/9999/vm-9999-pvc-1.raw", Some("pvc-1")),
            ("r/pve1/local/9999/vm-9999-pvc-1.qcow2", Some("pvc-1")),
            ("r/pve1/lvm/vm-9999-pvc-0e6c", Some("pvc-0e6c")),
            ("r/pve1/zfs/vm-100-disk-1", Some("disk-1")),
            ("r/pve1/zfs/vm-100-Disk", None),
            ("r/pve1/zfs/other", None),
            ("nonsense", None),
        ] {
            assert_eq!(likely_name(handle).as_deref(), name, "{handle}");
        }
    }
}
