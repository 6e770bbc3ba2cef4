//! Detach: a volume is gone from a VM's config, from what is pending, and from QEMU.

use super::{
    Dated, Volumes,
    attach::MAX_STEPS,
    attachments::{Hold, Need, SweepError},
    index::stray_drives,
    placement::{LocateError, Machine, Place, PlaceError, place},
    step::{Carried, Step},
    vmerror::VmError,
    vmqueue::{Turn, machine_now},
};
use crate::{
    pve::{
        Client,
        cluster::Resources,
        qemu::{Drive, VmConfig, VmStatus},
    },
    types::{NodeName, VolumeHandle, cluster::NodeRecord, props::PropertyString},
};

/// A volume can't be detached, or it can't be told that it is.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The node's VM can't be told.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// It can't be told who holds the volume.
    #[error("cannot tell whether `{handle}` is still attached")]
    Sweep {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: SweepError,
    },
    /// The VM can't be read or changed.
    #[error("cannot detach `{handle}`")]
    Vm {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: VmError,
    },
}

impl DetachError {
    /// What it may come of.
    fn dated(&self) -> Option<Dated> {
        match self {
            Self::Place(error) => error.dated(),
            Self::Vm { source, .. } => source.dated(),
            Self::Locate(_) | Self::Sweep { .. } => None,
        }
    }
}

impl Volumes {
    /// Detaches a volume from a node; from every VM, where no node is named. A volume that is not attached is detached already.
    ///
    /// Where the node is unknown or its VM proven gone, only VMs that no living node claims are touched: the volume may have
    /// its next home already.
    pub async fn detach(&self, handle: &VolumeHandle, node_id: Option<&str>) -> Result<(), DetachError> {
        match Box::pin(self.detach_as_seen(handle, node_id)).await {
            Err(error) if self.look_again(&handle.region, error.dated()).await => {
                Box::pin(self.detach_as_seen(handle, node_id)).await
            }
            answer => answer,
        }
    }

    async fn detach_as_seen(&self, handle: &VolumeHandle, node_id: Option<&str>) -> Result<(), DetachError> {
        if let Some(node_id) = node_id {
            match self.locate(node_id).await {
                Ok((machine, resources)) => return self.detach_from(handle, machine, &resources).await,
                Err(gone @ (LocateError::NoSuchNode { .. } | LocateError::NoSuchVm { .. })) => {
                    tracing::info!(volume = %handle, node = node_id, reason = %gone, "the node has no vm any more");
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.detach_from_unclaimed(handle, node_id.is_none()).await
    }

    async fn detach_from(
        &self,
        handle: &VolumeHandle,
        machine: Machine,
        resources: &Resources,
    ) -> Result<(), DetachError> {
        if machine.region != handle.region {
            return Ok(());
        }
        let client = self.detach_client(handle)?;
        let place = Self::detach_place(handle, resources, Some(&machine.node))?;
        // The same volid on another node's local storage is another volume, if there is one: a failover moves configs, not disks.
        let elsewhere = place.zone.as_ref().is_some_and(|zone| *zone != machine.node);
        let homonym = elsewhere
            && match client.volume(&machine.node, &place.volid).await {
                Ok(_) => true,
                Err(error) if error.is_unknown() || error.is_forbidden() || error.is_unauthenticated() => {
                    return Err(PlaceError::Api { handle: handle.clone(), source: error }.into());
                }
                Err(_) => false,
            };
        let mut turn = self.turn(client, machine).await;
        unplug(&mut turn, &place, homonym)
            .await
            .map_err(|source| DetachError::Vm { handle: handle.clone(), source })
    }

    /// The volume's place for a detach. A storage that is inactive or gone does not keep a drive in a VM.
    fn detach_place(
        handle: &VolumeHandle,
        resources: &Resources,
        near: Option<&NodeName>,
    ) -> Result<Place, DetachError> {
        match place(handle, resources, near) {
            Ok(place) => Ok(place),
            Err(error @ (PlaceError::Inactive { .. } | PlaceError::NoSuchStorage { .. })) => {
                let shared = resources.storage(handle.storage()).any(|row| row.shared);
                let zone = handle.zone.clone().filter(|_| !shared);
                let any = resources.nodes.first().map(|row| &row.node);
                let Some(host) = near.or(zone.as_ref()).or(any).cloned() else { return Err(error.into()) };
                let (region, volid) = (handle.region.clone(), handle.volid.clone());
                Ok(Place { region, volid, zone, host, plugin: String::new() })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn detach_client(&self, handle: &VolumeHandle) -> Result<&Client, DetachError> {
        let region = |source| PlaceError::Region { handle: handle.clone(), source };
        Ok(self.client(&handle.region).map_err(region)?)
    }

    /// Detaches a volume from the VMs that hold it: from all, or from those that no living node claims.
    async fn detach_from_unclaimed(&self, handle: &VolumeHandle, all: bool) -> Result<(), DetachError> {
        let client = self.detach_client(handle)?;
        let api = |source| PlaceError::Api { handle: handle.clone(), source };
        let region = self.region(&handle.region);
        let region = region.map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let resources = region.poll.fresh(client).await.map_err(api)?;
        let place = Self::detach_place(handle, &resources, None)?;
        let sweep = |source| DetachError::Sweep { handle: handle.clone(), source };
        let need = Need::Fresh(self.ask(&place.region));
        let holders = self.holders(&place, None, need).await.map_err(sweep)?;
        let claimed = self
            .inner
            .cluster
            .nodes()
            .await
            .map_err(|error| DetachError::Locate(LocateError::Lookup(error)))?;
        for holder in holders {
            match holder.hold {
                // A drive that only QEMU knows may be the volume: the VM is read again, and refused while it is there.
                Hold::Config { .. } | Hold::Stray { .. } => {}
                Hold::Unused { .. } | Hold::Snapshot { .. } => continue,
            }
            if self.is_own_holder(&holder) {
                continue;
            }
            if place.volid.name.owner() == Some(holder.vmid) {
                // Its owner is no node of ours: the placeholder of a replicated volume for instance.
                continue;
            }
            let vm = |source| DetachError::Vm { handle: handle.clone(), source };
            let machine = machine_now(client, &handle.region, holder.vmid, &holder.node).await.map_err(vm)?;
            if !all && claims(&claimed, &machine) {
                tracing::info!(volume = %handle, vm = %machine.vmid, "held by the vm of a living node, which a late call must not touch");
                continue;
            }
            self.detach_from(handle, machine, &resources).await?;
        }
        Ok(())
    }
}

fn claims(nodes: &[NodeRecord], machine: &Machine) -> bool {
    nodes.iter().any(|node| node.region == machine.region && Some(node.uuid) == machine.uuid)
}

/// Steps and reads until nothing of the volume is left in the VM.
async fn unplug(turn: &mut Turn, place: &Place, homonym: bool) -> Result<(), VmError> {
    let mut last = String::new();
    let mut recalled = turn.recall().await;
    for _ in 0..MAX_STEPS {
        let (config, status) = match recalled.take() {
            Some((config, status)) => match plan(turn, &config, &status, place, homonym) {
                Ok(Some(_)) => (config, status),
                // What is remembered answers nothing and refuses nothing.
                _ => turn.read().await?,
            },
            None => turn.read().await?,
        };
        let Some(step) = plan(turn, &config, &status, place, homonym)? else { return Ok(()) };
        last = match turn.change(&step, config.digest()).await? {
            Carried::Out => format!("Proxmox reported that it did: {step}"),
            Carried::NotOut => "its config is changed by somebody else all the time".to_owned(),
        };
    }
    Err(VmError::NoProgress { vmid: turn.vmid(), detail: last })
}

/// The next step towards a VM without the volume; `None` where it is proven to have none of it.
fn plan(
    turn: &Turn,
    config: &VmConfig,
    status: &VmStatus,
    place: &Place,
    homonym: bool,
) -> Result<Option<Step>, VmError> {
    let vmid = turn.vmid();
    let held = config.holders_of(&place.volid).find(|(_, entry)| {
        // Where the VM's node has a volume of that name too, only a drive that says it is ours is ours.
        let named = |text: &Option<String>| {
            let drive = text.as_deref().and_then(Drive::read);
            drive
                .is_some_and(|d| d.is(&place.volid) && d.get("wwn") == Some(place.wwn().to_string().as_str()))
        };
        !homonym || named(&entry.current) || named(&entry.pending)
    });
    let Some((key, entry)) = held else {
        if status.running && status.drives.is_none() {
            return Err(VmError::QemuSilent { vmid });
        }
        if let Some(key) = stray_drives(config, status).next() {
            return Err(VmError::Stray { vmid, key });
        }
        return Ok(None);
    };
    let in_force = entry.current.as_deref().and_then(Drive::read).is_some_and(|drive| drive.is(&place.volid));
    if !in_force {
        if let Some(lock) = config.lock() {
            return Err(VmError::Locked { vmid, lock: lock.to_owned() });
        }
        let pending = entry.pending.as_deref().and_then(|text| text.parse::<PropertyString>().ok());
        return Ok(Some(match (status.has(key), key.parse(), pending) {
            // QEMU has it and the config does not yet: a plug whose last step failed. Taking back what is pending would leave
            // the drive where nobody sees it, so the plug is finished first.
            (Some(true), Ok(slot), Some(drive)) => Step::Plug { slot, drive },
            _ => Step::Revert { key: key.to_owned() },
        }));
    }
    let pending = entry.pending.as_deref().and_then(Drive::read);
    if let Some(pending) = pending.filter(|pending| !pending.is(&place.volid)) {
        let pending = pending.volid().unwrap_or_default().to_owned();
        return Err(VmError::PendingOther { vmid, key: key.to_owned(), pending });
    }
    turn.check_changeable(config, status)?;
    if config.is_protected() {
        return Err(VmError::Protected { vmid });
    }
    Ok(Some(Step::Unplug { key: key.to_owned() }))
}
