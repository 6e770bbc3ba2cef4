//! Modify: options of a volume that may change while it exists.
//!
//! Kubernetes keeps the parameters of a PV for ever as they were, and a class that a PV names later is not passed to an attach. Nor may a change
//! be read from the class alone: a key that a class lacks stays what it was. So what was changed is kept as one record with the PV
//! (see [`Cluster::keep_attributes`](crate::types::cluster::Cluster)), and an attach goes by it. The record is written first and the drives
//! after it; where one of them can't be changed, those that were and the record are put back.

use std::collections::BTreeMap;

use super::{
    Volumes,
    attach::MAX_STEPS,
    attachments::{Hold, Holder, Need, SweepError},
    delete::PresenceError,
    placement::{Machine, Place, PlaceError},
    step::{Carried, Step},
    vmerror::VmError,
    vmqueue::machine_now,
};
use crate::{
    pve::{
        Client,
        qemu::{Drive, VmConfig},
    },
    types::{
        ScsiSlot, VmId, VolumeHandle, attributes::Attributes, cluster::RecordError, props::PropertyString,
    },
};

/// A volume can't be changed, or it can't be told that it is.
#[derive(Debug, thiserror::Error)]
pub enum ModifyError {
    /// The VM that has it in its config is not where the volume is: what it has there, if anything, is another volume of that name.
    #[error(
        "cannot change `{handle}`: it is held by {holder}, away from the volume; hint: migrate the VM back, or detach the volume"
    )]
    Elsewhere {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        holder: Holder,
    },
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The volume is not there, or it can't be told.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// What was changed can't be looked up or kept.
    #[error("cannot change `{handle}`")]
    Record {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: RecordError,
    },
    /// It can't be told who holds the volume.
    #[error("cannot change `{handle}`")]
    Sweep {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: SweepError,
    },
    /// Options of the drive wait for the next start of the VM, and would be lost.
    #[error(
        "cannot change `{handle}`: other options of drive {key} of VM {vmid} wait for its next start; hint: restart the VM, or take them back (`qm set {vmid} --revert {key}`)"
    )]
    Pending {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        vmid: VmId,
        /// The drive.
        key: String,
    },
    /// The VM that has it can't be read or changed.
    #[error("cannot change `{handle}`")]
    Vm {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: VmError,
    },
}

impl Volumes {
    /// What was changed of a volume since it was made.
    ///
    /// Read once and then remembered: only this process changes it, while it may act at all.
    pub async fn attributes(&self, handle: &VolumeHandle) -> Result<Attributes, RecordError> {
        let key = handle.to_string();
        let remembered = super::lock(&self.inner.attributes).get(&key).cloned();
        if let Some(attributes) = remembered {
            return Ok(attributes);
        }
        let Some(record) = self.inner.cluster.volume(&key).await? else { return Ok(Attributes::default()) };
        let attributes = record.attributes;
        super::lock(&self.inner.attributes).insert(key, attributes.clone());
        Ok(attributes)
    }

    async fn keep_attributes(
        &self,
        handle: &VolumeHandle,
        attributes: &Attributes,
    ) -> Result<(), RecordError> {
        let key = handle.to_string();
        // Until it is known to be kept nothing is remembered: the next one who asks reads what is there.
        super::lock(&self.inner.attributes).remove(&key);
        self.inner.cluster.keep_attributes(&key, attributes).await?;
        super::lock(&self.inner.attributes).insert(key, attributes.clone());
        Ok(())
    }

    /// Changes options of a volume, in every VM that has it and for each later attach. What is not named stays. Repeating it changes nothing more;
    /// an error leaves what was.
    pub async fn modify(&self, handle: &VolumeHandle, changes: &Attributes) -> Result<(), ModifyError> {
        let (place, _) = self.place(handle).await?;
        let client = self
            .client(&place.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        self.require_present(client, &place, handle).await?;
        let record = |source| ModifyError::Record { handle: handle.clone(), source };
        let before = self.attributes(handle).await.map_err(record)?;
        let after = before.changed_by(changes);

        let sweep = |source| ModifyError::Sweep { handle: handle.clone(), source };
        let holders =
            self.holders(&place, None, Need::Fresh(self.ask(&place.region))).await.map_err(sweep)?;
        let mut machines: Vec<Machine> = Vec::new();
        for holder in holders {
            // Its owner is no node's VM: the placeholder of a replicated volume.
            let is_owner = place.volid.name.owner() == Some(holder.vmid);
            let has = matches!(holder.hold, Hold::Config { .. }) && !self.is_own_holder(&holder) && !is_owner;
            if has && place.zone.as_ref().is_some_and(|zone| *zone != holder.node) {
                return Err(ModifyError::Elsewhere { handle: handle.clone(), holder });
            }
            if has && machines.iter().all(|machine| machine.vmid != holder.vmid) {
                let machine = machine_now(client, &place.region, holder.vmid, &holder.node).await;
                machines.push(machine.map_err(|source| ModifyError::Vm { handle: handle.clone(), source })?);
            }
        }
        let wanted = after.of_drive();
        if machines.len() > 1 {
            // What stands in the way of one of them is seen before any is changed.
            for machine in &machines {
                let mut turn = self.turn(client, machine.clone()).await;
                let config = turn.read_config(None).await;
                let config = config.map_err(|source| ModifyError::Vm { handle: handle.clone(), source })?;
                next_change(&config, &place, handle, turn.vmid(), &wanted)?;
            }
        }
        if after != before {
            self.keep_attributes(handle, &after).await.map_err(record)?;
        }
        let mut tuned: Vec<(Machine, Options)> = Vec::new();
        for machine in machines {
            match Box::pin(self.retune(client, &place, handle, machine.clone(), &wanted)).await {
                Ok(Some(had)) => tuned.push((machine, had)),
                Ok(None) => {}
                Err(error) => {
                    Box::pin(self.put_back(client, &place, handle, tuned)).await;
                    if after != before
                        && let Err(left) = self.keep_attributes(handle, &before).await
                    {
                        tracing::warn!(volume = %handle, error = %left, "the change is kept though the drive was not changed; a retry changes it");
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Gives drives what they had before they were changed.
    async fn put_back(
        &self,
        client: &Client,
        place: &Place,
        handle: &VolumeHandle,
        changed: Vec<(Machine, Options)>,
    ) {
        for (machine, had) in changed {
            let vmid = machine.vmid;
            if let Err(error) = Box::pin(self.retune(client, place, handle, machine, &had)).await {
                let error = crate::telemetry::log::chain(&error);
                tracing::warn!(volume = %handle, vm = %vmid, error, "a drive keeps its change though that of another failed; a retry changes both");
            }
        }
    }

    /// Changes options of a drive, and returns what it had of them; `None` where nothing was to be changed. All of them go in one request,
    /// which Proxmox does or refuses as one.
    async fn retune(
        &self,
        client: &Client,
        place: &Place,
        handle: &VolumeHandle,
        machine: Machine,
        wanted: &Options,
    ) -> Result<Option<Options>, ModifyError> {
        let vm = |source| ModifyError::Vm { handle: handle.clone(), source };
        let mut turn = self.turn(client, machine).await;
        let vmid = turn.vmid();
        let (mut last, mut had) = (None, None);
        for _ in 0..MAX_STEPS {
            let (config, _) = turn.read().await.map_err(vm)?;
            let change = match next_change(&config, place, handle, vmid, wanted) {
                Ok(Some(change)) => change,
                Ok(None) => return Ok(had),
                Err(error) => {
                    if let (ModifyError::Pending { key, .. }, true) = (&error, last.is_some()) {
                        // What was just asked for can't be had before the next start: it is taken back.
                        let revert = Step::Revert { key: key.clone() };
                        turn.change(&revert, config.digest()).await.map_err(vm)?;
                    }
                    return Err(error);
                }
            };
            let step = Step::Tune { slot: change.slot, drive: change.drive };
            last = match turn.change(&step, config.digest()).await.map_err(vm)? {
                Carried::Out => {
                    had.get_or_insert(change.had);
                    Some(step)
                }
                Carried::NotOut => None,
            };
        }
        let detail = last.map_or_else(
            || "its config is changed by somebody else all the time".to_owned(),
            |step| format!("Proxmox reported that it did: {step}"),
        );
        Err(vm(VmError::NoProgress { vmid, detail }))
    }
}

/// Options of a drive by their keys; none for one that is not to be there.
type Options = BTreeMap<&'static str, Option<String>>;

/// A change of a drive.
struct Change {
    slot: ScsiSlot,
    drive: PropertyString,
    /// What it had of the options that are changed.
    had: Options,
}

/// What is to be changed in a VM that has the volume, or what stands in the way; `None` where nothing is.
fn next_change(
    config: &VmConfig,
    place: &Place,
    handle: &VolumeHandle,
    vmid: VmId,
    wanted: &Options,
) -> Result<Option<Change>, ModifyError> {
    // It left the VM meanwhile, or is to come: the next attach goes by the record.
    let Some((key, entry)) = config.holders_of(&place.volid).next() else { return Ok(None) };
    let current =
        entry.current.as_deref().filter(|text| Drive::read(text).is_some_and(|d| d.is(&place.volid)));
    let Some(drive) = current.and_then(|text| text.parse::<PropertyString>().ok()) else { return Ok(None) };
    if entry.pending.is_some() || entry.pending_delete {
        return Err(ModifyError::Pending { handle: handle.clone(), vmid, key: key.to_owned() });
    }
    let Some(tuned) = tuned(&drive, wanted) else { return Ok(None) };
    if let Some(lock) = config.lock() {
        let source = VmError::Locked { vmid, lock: lock.to_owned() };
        return Err(ModifyError::Vm { handle: handle.clone(), source });
    }
    let Ok(slot) = key.parse::<ScsiSlot>() else { return Ok(None) };
    let had = wanted.keys().map(|key| (*key, drive.get(key).map(str::to_owned))).collect();
    Ok(Some(Change { slot, drive: tuned, had }))
}

/// The drive with what is wanted of it; `None` where it has that.
fn tuned(drive: &PropertyString, wanted: &Options) -> Option<PropertyString> {
    let mut tuned = drive.clone();
    for (key, value) in wanted {
        match value {
            Some(value) => tuned.set(key, value).expect("it was in a drive string, or is a number"),
            None => tuned.remove(key),
        }
    }
    // Proxmox leaves a flag out where it has its default.
    let is_backed_up = |drive: &PropertyString| drive.get("backup").is_none_or(|value| value != "0");
    let differs =
        drive.iter().filter(|(key, _)| *key != "backup").ne(tuned.iter().filter(|(key, _)| *key != "backup"))
            || is_backed_up(drive) != is_backed_up(&tuned);
    differs.then_some(tuned)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_drive_keeps_all_but_what_is_changed() {
        let wanted = |pairs: &[(&str, &str)]| {
            let map: BTreeMap<_, _> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            Attributes::parse(&map).expect("legal attributes").of_drive()
        };
        let drive: PropertyString =
            "s:v,backup=0,iops_rd=5,iops_wr=6,queues=2,size=1G,wwn=0x1".parse().expect("a drive");
        let limits = wanted(&[("diskIOPS", "9"), ("backup", "1")]);
        let text = |drive: Option<PropertyString>| drive.map(|drive| drive.to_string());
        let after = text(tuned(&drive, &limits)).expect("a change");
        assert_eq!(after, "s:v,backup=1,iops_rd=9,iops_wr=9,queues=2,size=1G,wwn=0x1");
        assert_eq!(tuned(&after.parse().expect("a drive"), &limits), None);
        let none = text(tuned(&drive, &wanted(&[("diskIOPS", "0")])));
        assert_eq!(none.as_deref(), Some("s:v,backup=0,queues=2,size=1G,wwn=0x1"));
        // The default is not written.
        let bare: PropertyString = "s:v,size=1G".parse().expect("a drive");
        assert_eq!(tuned(&bare, &wanted(&[("backup", "1")])), None);
    }
}
