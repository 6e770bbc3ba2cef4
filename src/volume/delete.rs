//! Delete, and the proof that a volume is not there.

use std::time::Duration;

use super::{
    Volumes,
    attachments::{Hold, Holder, Need, SweepError},
    candidates::places_of,
    holder::HolderError,
    placement::{Place, PlaceError},
    step::Step,
    vmerror::VmError,
    vmqueue::machine_now,
};
use crate::{
    pve::{
        ApiError, Client,
        qemu::{VolumeKey, is_unused},
        storage::VolumeInfo,
        task::TaskError,
    },
    types::{
        Bytes, VmId, VolumeHandle,
        cluster::RecordError,
        notice::{About, Notice},
        topology,
    },
};

/// How long a deletion is waited for: large volumes on zfspool and rbd take minutes.
const DELETE_PATIENCE: Duration = Duration::from_mins(5);

/// Storages on which a deletion that succeeds means that the volume is gone: they fail where the volume group, pool or cluster is not there
/// (pve-storage `LVMPlugin.pm:activate_storage`, `ZFSPoolPlugin.pm:activate_storage`, `RBDPlugin.pm:free_image`).
const TELLS_THE_TRUTH: [&str; 4] = ["lvm", "lvmthin", "zfspool", "rbd"];

/// How many deletions are remembered, for calls that are repeated because their answer was lost.
const REMEMBERED: usize = 1000;

/// A volume can't be deleted, or it can't be told that it is.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It can't be told who holds the volume.
    #[error("cannot delete `{handle}`")]
    Sweep {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: SweepError,
    },
    /// It can't be told whether it is to be kept.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A VM or a snapshot holds it.
    #[error("cannot delete `{handle}`: it is held by {holder}; hint: {}", holder.hint())]
    InUse {
        /// The handle.
        handle: VolumeHandle,
        /// Who holds it.
        holder: Holder,
    },
    /// A VM keeps a reference to it that can't be dropped.
    #[error("cannot delete `{handle}`: {holder} keeps a reference to it")]
    Reference {
        /// The handle.
        handle: VolumeHandle,
        /// Who keeps it.
        holder: Holder,
        /// Why it can't be dropped.
        #[source]
        source: VmError,
    },
    /// It belongs to a VM that exists.
    #[error("will not delete `{handle}`: it belongs to VM {owner}, which exists")]
    Owned {
        /// The handle.
        handle: VolumeHandle,
        /// The owner.
        owner: VmId,
    },
    /// It follows no pattern by which it could be told whose it is.
    #[error("will not delete `{handle}`: its name does not say which VM owns it")]
    NoOwner {
        /// The handle.
        handle: VolumeHandle,
    },
    /// It can't be told whether it is there.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// The request gave no good answer.
    #[error("cannot delete `{handle}`; hint: the token needs Datastore.Allocate on /storage/{}", handle.storage())]
    Forbidden {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The request gave no good answer.
    #[error("cannot delete `{handle}`")]
    Request {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The task did not end well.
    #[error("cannot delete `{handle}`")]
    Task {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: TaskError,
    },
    /// A holder VM that was left over could not be removed.
    #[error(transparent)]
    Holder(#[from] HolderError),
}

impl DeleteError {
    /// Whether the volume may be gone all the same, now or later.
    fn is_unknown(&self) -> bool {
        match self {
            Self::Request { source, .. } => source.is_unknown(),
            Self::Task { source, .. } => source.is_unknown(),
            _ => false,
        }
    }
}

/// A volume is not there, or it can't be told whether it is.
#[derive(Debug, thiserror::Error)]
pub enum PresenceError {
    /// It is proven not to be there.
    #[error("volume `{handle}` does not exist")]
    Absent {
        /// The handle.
        handle: VolumeHandle,
    },
    /// It was not found, which is no proof.
    #[error("cannot tell whether volume `{handle}` exists: {why}")]
    Unproven {
        /// The handle.
        handle: VolumeHandle,
        /// What is missing for a proof.
        why: String,
        /// What Proxmox said.
        #[source]
        source: ApiError,
    },
}

impl Volumes {
    /// Deletes a volume. One that is not there is deleted already.
    ///
    /// Proxmox deletes what it is told to, in use or not, so VMs and snapshots are looked through first.
    pub async fn delete(&self, handle: &VolumeHandle) -> Result<(), DeleteError> {
        if self.is_to_be_kept(handle).await? {
            return Ok(());
        }
        super::lock(&self.inner.attributes).remove(&handle.to_string());
        let (place, _) = self.place(handle).await?;
        let request = |source| DeleteError::Request { handle: handle.clone(), source };
        let client = self
            .client(&place.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let owner =
            place.volid.name.owner().ok_or_else(|| DeleteError::NoOwner { handle: handle.clone() })?;
        if owner != self.inner.settings.owner && client.vmid_exists(owner).await.map_err(request)? {
            return Err(DeleteError::Owned { handle: handle.clone(), owner });
        }
        let sweep = |source| DeleteError::Sweep { handle: handle.clone(), source };
        let need = Need::Fresh(self.ask(&place.region));
        let holders = self.holders(&place, None, need).await.map_err(sweep)?;
        let (own, others): (Vec<_>, Vec<_>) =
            holders.into_iter().partition(|holder| self.is_own_holder(holder));
        // A reference of a VM that does not own the volume is dropped with it.
        let (references, others): (Vec<_>, Vec<_>) = others
            .into_iter()
            .partition(|holder| matches!(holder.hold, Hold::Unused { .. }) && holder.vmid != owner);
        if let Some(holder) = in_use(&others) {
            return Err(DeleteError::InUse { handle: handle.clone(), holder: holder.clone() });
        }
        for reference in &references {
            self.drop_reference(client, &place, reference).await.map_err(|source| {
                DeleteError::Reference { handle: handle.clone(), holder: reference.clone(), source }
            })?;
        }
        for holder in own {
            self.release_holder(client, &place, &holder).await?;
        }

        // Asked before where the deletion of what can't be seen is called a success: by a directory that is not mounted for instance
        // (pve-storage `Plugin.pm:free_image`).
        let look = !TELLS_THE_TRUTH.contains(&place.plugin.as_str());
        if look {
            match self.require_present(client, &place, handle).await {
                Ok(_) => {}
                Err(PresenceError::Absent { .. }) => {
                    self.note(&place, None);
                    return Ok(());
                }
                Err(PresenceError::Unproven { .. }) if self.was_deleted(&place) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        tracing::info!(volume = %handle, node = %place.host, "deleting a volume");
        let error = match client.delete_volume(&place.host, &place.volid).await {
            Ok(upid) => match client.wait("delete", &upid, DELETE_PATIENCE).await {
                Ok(()) => {
                    self.remember_deleted(&place);
                    self.note(&place, None);
                    return Ok(());
                }
                Err(source) => DeleteError::Task { handle: handle.clone(), source },
            },
            Err(source) if source.is_forbidden() => {
                return Err(DeleteError::Forbidden { handle: handle.clone(), source });
            }
            Err(source) => request(source),
        };
        // Somebody else may have deleted it meanwhile: then it must be proven gone.
        if let Err(PresenceError::Absent { .. }) = self.require_present(client, &place, handle).await {
            self.note(&place, None);
            return Ok(());
        }
        if look && error.is_unknown() {
            // It was just seen, and its deletion asked for: when it is not seen any more, that is why.
            self.remember_deleted(&place);
        }
        Err(error)
    }

    /// Whether the cluster says that the disk is to stay though its volume goes. A repeated call finds nothing there any more that says so.
    async fn is_to_be_kept(&self, handle: &VolumeHandle) -> Result<bool, RecordError> {
        let text = handle.to_string();
        if super::lock(&self.inner.kept).contains(&text) {
            return Ok(true);
        }
        let keep = self.inner.cluster.volume(&text).await?.is_some_and(|record| record.keep);
        if keep {
            tracing::info!(
                volume = text,
                "the disk is kept, as its annotation says; nothing refers to it from now on"
            );
            let note = format!(
                "the disk `{}` is kept, as the annotation of its PersistentVolume says; nothing refers to it from now on",
                handle.volid
            );
            self.inner.cluster.tell(About::Volume(text.clone()), Notice::normal("DiskKept", note));
            let mut kept = super::lock(&self.inner.kept);
            kept.push_back(text);
            if kept.len() > REMEMBERED {
                kept.pop_front();
            }
        }
        Ok(keep)
    }

    /// Whether this process saw the deletion of the volume succeed, or saw the volume and sent the deletion: a repeated call needs no proof
    /// from a storage that can give none.
    fn was_deleted(&self, place: &Place) -> bool {
        super::lock(&self.inner.deleted).contains(&place.key())
    }

    /// A volume of that name is there, again or still.
    pub(super) fn forget_deleted(&self, handle: &VolumeHandle) {
        let zone = handle.zone.as_ref().map_or("", crate::types::NodeName::as_str);
        let key = format!("{}/{zone}/{}", handle.region, handle.volid);
        super::lock(&self.inner.deleted).retain(|deleted| *deleted != key);
    }

    fn remember_deleted(&self, place: &Place) {
        let mut deleted = super::lock(&self.inner.deleted);
        deleted.push_back(place.key());
        if deleted.len() > REMEMBERED {
            deleted.pop_front();
        }
    }

    /// Takes `unusedN` of a volume that the VM does not own out of its config. That deletes no data: Proxmox deletes a volume with its
    /// reference only where the VM owns it, and that was just looked at.
    async fn drop_reference(&self, client: &Client, place: &Place, holder: &Holder) -> Result<(), VmError> {
        let vmid = holder.vmid;
        let machine = machine_now(client, &place.region, vmid, &holder.node).await?;
        let mut turn = self.turn(client, machine).await;
        for _ in 0..super::attach::MAX_STEPS {
            let (config, _) = turn.read().await?;
            let volid = place.volid.to_string();
            let held = config.volumes().find(|held| held.volid == volid && is_unused(&held.key));
            let Some(VolumeKey { key, .. }) = held else { return Ok(()) };
            if let Some(lock) = config.lock() {
                return Err(VmError::Locked { vmid, lock: lock.to_owned() });
            }
            turn.change(&Step::Unplug { key }, config.digest()).await?;
        }
        Err(VmError::NoProgress { vmid, detail: format!("`{}` stays in its config", place.volid) })
    }

    /// A volume that must exist: where it is and how large.
    pub async fn find(&self, handle: &VolumeHandle) -> Result<FoundVolume, ExistsError> {
        let (place, resources) = self.place(handle).await?;
        let client = self
            .client(&place.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let info = self.require_present(client, &place, handle).await?;
        let row = resources.storage(handle.storage()).find(|row| row.node == place.host);
        let places = row.map(|row| places_of(&place.region, &resources, row)).unwrap_or_default();
        Ok(FoundVolume { place, size: info.size, places })
    }

    /// A volume that must be there.
    pub(super) async fn require_present(
        &self,
        client: &Client,
        place: &Place,
        handle: &VolumeHandle,
    ) -> Result<VolumeInfo, PresenceError> {
        let source = match client.volume(&place.host, &place.volid).await {
            Ok(info) => return Ok(info),
            Err(source) => source,
        };
        let unproven = |why: String, source| PresenceError::Unproven { handle: handle.clone(), why, source };
        if !source.is_volume_unreadable() {
            return Err(unproven("Proxmox could not look".to_owned(), source));
        }
        match self.prove_absent(client, place).await {
            Ok(None) => Err(PresenceError::Absent { handle: handle.clone() }),
            Ok(Some(why)) => Err(unproven(why, source)),
            Err(error) => Err(unproven("the storage can not be listed".to_owned(), error)),
        }
    }

    /// Proves that a volume is not on its storage: `None`, or what is missing for the proof.
    ///
    /// A listing proves it only if the storage is active, the token would have seen the volume, and the storage is not a plain
    /// directory whose path may have vanished: Proxmox makes that anew and lists nothing.
    async fn prove_absent(&self, client: &Client, place: &Place) -> Result<Option<String>, ApiError> {
        let storage = &place.volid.storage;
        let status = client.storage_status(&place.host, storage).await?;
        if !(status.enabled && status.active) {
            return Ok(Some(format!("storage `{storage}` is not active on node `{}`", place.host)));
        }
        let Some(state) = self.inner.regions.get(&place.region) else {
            return Ok(Some("its region is not configured".to_owned()));
        };
        let listed = client.list_volumes(&place.host, storage).await?;
        let volid = place.volid.to_string();
        if listed.contains(&volid) {
            return Ok(Some("the storage lists it, but it can not be read".to_owned()));
        }
        // Behind the listing: a privilege that was just taken away makes volumes vanish from it.
        if !state.permissions_now().await?.allow(&format!("/storage/{storage}"), "Datastore.Allocate") {
            return Ok(Some(format!("the token lacks Datastore.Allocate on /storage/{storage}")));
        }
        if listed.is_empty() && !client.storage_notices_loss(storage).await? {
            return Ok(Some(format!(
                "storage `{storage}` lists nothing at all, which a directory that is not mounted would do as well; hint: set `is_mountpoint` on it"
            )));
        }
        Ok(None)
    }
}

/// The holders of a volume that are VMs in use, for a message.
fn in_use(holders: &[Holder]) -> Option<&Holder> {
    holders.iter().find(|holder| !matches!(holder.hold, Hold::Snapshot { .. })).or_else(|| holders.first())
}

/// A volume that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundVolume {
    /// Where it is.
    pub place: Place,
    /// Its size.
    pub size: Bytes,
    /// From where it can be reached.
    pub places: Vec<topology::Place>,
}

/// It can't be told whether a volume exists, or it does not.
#[derive(Debug, thiserror::Error)]
pub enum ExistsError {
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It is not there, or it can't be told.
    #[error(transparent)]
    Presence(#[from] PresenceError),
}
