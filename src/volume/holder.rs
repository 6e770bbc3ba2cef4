//! Holder VMs: how a volume that is attached nowhere is grown.
//!
//! Proxmox grows a volume only through a VM's slot. So a VM without hardware is made, never started, given the volume for a moment, and
//! destroyed. It must not own the volume: a VM's own volumes die with it. One that is left over by a crash is recognised by its
//! VMID, its name and the volume it holds, and is finished off by whoever comes next.

use std::time::Duration;

use super::{
    RegionState, Volumes,
    attachments::{Hold, Holder},
    placement::{Machine, Place},
    step::{Carried, Step},
    vmerror::VmError,
    vmqueue::{Turn, machine_now},
};
use crate::{
    pve::{ApiError, Client, task::TaskError},
    types::{Bytes, NodeName, Region, ScsiSlot, VmId, VolId, props::PropertyString},
};

/// The name of every holder.
pub const NAME: &str = "csi-holder";
/// How long making or destroying a holder is waited for.
const PATIENCE: Duration = Duration::from_mins(1);
/// VMIDs that are tried for a new holder before it is given up.
const TRIES: u32 = 20;

/// A holder can't be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// The token may not make one.
    #[error(
        "a volume that is attached nowhere is grown through a short-lived VM, which the token may not make; hint: grant VM.Allocate and VM.Config.Options on /vms, or start the pod and grow the volume while it is attached"
    )]
    Forbidden(#[source] ApiError),
    /// All VMIDs for holders are taken.
    #[error(
        "no VMID from {first} to {last} is free for a short-lived VM; hint: look for leftovers named `{NAME}`"
    )]
    NoVmid {
        /// The first VMID tried.
        first: u32,
        /// The last one.
        last: u32,
    },
    /// A request gave no good answer.
    #[error("cannot {what} the short-lived VM {vmid} on node `{node}`")]
    Request {
        /// What was to be done.
        what: &'static str,
        /// The VM.
        vmid: VmId,
        /// Its node.
        node: NodeName,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// A task did not end well.
    #[error("cannot {what} the short-lived VM {vmid} on node `{node}`")]
    Task {
        /// What was to be done.
        what: &'static str,
        /// The VM.
        vmid: VmId,
        /// Its node.
        node: NodeName,
        /// Why.
        #[source]
        source: TaskError,
    },
    /// It can't be read or changed.
    #[error("cannot use the short-lived VM")]
    Vm(#[from] VmError),
    /// It holds something that was not put there.
    #[error(
        "VM {vmid} is named like a short-lived VM of this driver but has `{key}`; hint: look at it, and rename it if it is yours"
    )]
    NotOurs {
        /// The VM.
        vmid: VmId,
        /// What it has.
        key: String,
    },
}

/// The one slot a holder uses.
fn slot() -> ScsiSlot {
    ScsiSlot::new(0).expect("scsi0 is a slot")
}

impl Volumes {
    /// Whether a holder of a volume is one of ours, left over by an expansion that did not end.
    pub(super) fn is_own_holder(&self, holder: &Holder) -> bool {
        self.inner.settings.holders.contains(&holder.vmid.get())
            && holder.name == NAME
            && holder.hold == (Hold::Config { key: slot().to_string(), read_only: false })
    }

    /// Whether a holder of a volume is its placeholder: a stopped VM that the driver before this one made to own a replicated volume, named
    /// as the volume is. It never runs, so that the volume may be plugged in elsewhere; one that runs is a VM like any other.
    pub(super) async fn is_placeholder(
        &self,
        client: &Client,
        place: &Place,
        holder: &Holder,
    ) -> Result<bool, VmError> {
        let vmid = holder.vmid;
        let named = matches!(holder.hold, Hold::Config { .. })
            && place.volid.name.owner() == Some(vmid)
            && place.volid.name.as_str() == format!("vm-{vmid}-{}", holder.name);
        if !named {
            return Ok(false);
        }
        let status = client.vm_status(&holder.node, vmid).await;
        let status = status.map_err(|source| VmError::Read { vmid, source })?;
        Ok(!status.running)
    }

    /// Grows a volume that no other VM holds, through a new holder or the one that holds it already.
    pub(super) async fn grow_through_holder(
        &self,
        client: &Client,
        place: &Place,
        left_over: Option<&Holder>,
        size: Bytes,
    ) -> Result<(), HolderError> {
        // Nothing is tidied up meanwhile: a holder is empty when it was just made.
        let growing = self.inner.regions.get(&place.region).map(|state| &state.growing);
        let _growing = match growing {
            Some(growing) => Some(growing.read().await),
            None => None,
        };
        let machine = match left_over {
            Some(holder) => machine_now(client, &place.region, holder.vmid, &holder.node).await?,
            None => self.make_holder(client, place).await?,
        };
        let mut turn = self.turn(client, machine.clone()).await;
        let grown = grow(&mut turn, place, size).await;
        let removed = remove(client, &mut turn, Some(&place.volid), &machine).await;
        if let (Err(_), Err(error)) = (&grown, &removed) {
            tracing::warn!(vm = %machine.vmid, %error, "a holder vm is left over; the next operation on the volume removes it");
        }
        grown?;
        removed
    }

    /// Takes a volume out of a left-over holder and destroys that.
    pub(super) async fn release_holder(
        &self,
        client: &Client,
        place: &Place,
        holder: &Holder,
    ) -> Result<(), HolderError> {
        let machine = machine_now(client, &place.region, holder.vmid, &holder.node).await?;
        tracing::info!(vm = %machine.vmid, node = %machine.node, volume = %place.volid, "removing a left-over holder vm");
        let mut turn = self.turn(client, machine.clone()).await;
        remove(client, &mut turn, Some(&place.volid), &machine).await
    }

    /// Takes the volume out of a holder that is left over and destroys it, whichever volume it is. For an operator's tool: operations
    /// on the volume do the same when they come across it. Refuses a VM that is not one this driver made, or that has anything else.
    pub async fn remove_left_over(&self, region: &Region, vmid: VmId) -> Result<(), HolderError> {
        let not_ours = |key: &str| HolderError::NotOurs { vmid, key: key.to_owned() };
        let Ok(client) = self.client(region) else { return Err(not_ours("a region that is not configured")) };
        if !self.inner.settings.holders.contains(&vmid.get()) {
            return Err(not_ours("a VMID outside of `features.holderVmIDs`"));
        }
        let resources = client.resources().await.map_err(|source| VmError::Read { vmid, source })?;
        let Some(row) = resources.vm(vmid) else { return Err(not_ours("no config that the token sees")) };
        let machine = machine_now(client, region, vmid, &row.node).await?;
        let mut turn = self.turn(client, machine.clone()).await;
        let (config, _) = turn.read().await?;
        let entry = config.entry(&slot().to_string());
        let text = entry.and_then(|entry| entry.current.as_deref().or(entry.pending.as_deref()));
        let volid: Option<VolId> =
            text.and_then(|text| crate::pve::qemu::Drive::read(text)?.volid()?.parse().ok());
        tracing::info!(vm = %vmid, node = %machine.node, "removing a left-over holder vm");
        remove(client, &mut turn, volid.as_ref(), &machine).await
    }

    async fn make_holder(&self, client: &Client, place: &Place) -> Result<Machine, HolderError> {
        let range = &self.inner.settings.holders;
        let node = &place.host;
        for vmid in range.clone().take(usize::try_from(TRIES).unwrap_or(usize::MAX)).filter_map(VmId::new) {
            let request = |source| HolderError::Request { what: "make", vmid, node: node.clone(), source };
            if client.vmid_exists(vmid).await.map_err(request)? {
                match self.empty_holder(client, place, vmid).await? {
                    Some(machine) => return Ok(machine),
                    None => continue,
                }
            }
            tracing::info!(vm = %vmid, %node, volume = %place.volid, "making a holder vm");
            let upid = match client.create_vm(node, vmid, NAME).await {
                Ok(upid) => upid,
                Err(error) if error.is_already_exists() => continue,
                Err(error) if error.is_forbidden() => return Err(HolderError::Forbidden(error)),
                Err(source) => return Err(request(source)),
            };
            let made = client.wait("make_vm", &upid, PATIENCE).await;
            made.map_err(|source| HolderError::Task { what: "make", vmid, node: node.clone(), source })?;
            return Ok(machine_now(client, &place.region, vmid, node).await?);
        }
        let last = range.end().min(&range.start().saturating_add(TRIES - 1)).to_owned();
        Err(HolderError::NoVmid { first: *range.start(), last })
    }
}

impl Volumes {
    /// A holder that was made and never used, or emptied and not destroyed, where this VM is one that can reach the volume.
    async fn empty_holder(
        &self,
        client: &Client,
        place: &Place,
        vmid: VmId,
    ) -> Result<Option<Machine>, HolderError> {
        let request =
            |source| HolderError::Request { what: "look for", vmid, node: place.host.clone(), source };
        let resources = client.resources().await.map_err(request)?;
        let Some(row) = resources.vm(vmid).filter(|row| row.node == place.host) else { return Ok(None) };
        let machine = machine_now(client, &place.region, vmid, &row.node).await?;
        // Whoever uses it has its turn.
        let mut turn = self.turn(client, machine.clone()).await;
        Ok(is_empty(&mut turn).await.then_some(machine))
    }

    /// Destroys empty holders that are left over: a request that makes one may arrive when nobody waits for it any more. One that was empty
    /// the last time already: the driver of another cluster may have made it just now.
    pub async fn tidy(&self) {
        for state in self.inner.regions.values() {
            self.tidy_region(state).await;
        }
    }

    pub(super) async fn tidy_region(&self, state: &RegionState) {
        // Who grows a volume may just have made one.
        let Ok(_alone) = state.growing.try_write() else { return };
        let Ok(resources) = state.poll.recent(&state.client).await else { return };
        let ours = resources.vms.iter().filter(|row| {
            self.inner.settings.holders.contains(&row.vmid.get())
                && row.name.as_deref() == Some(NAME)
                && !row.running
        });
        let before = std::mem::take(&mut *super::lock(&state.empty_holders));
        for row in ours {
            let (client, region) = (&state.client, state.client.region());
            let Ok(machine) = machine_now(client, region, row.vmid, &row.node).await else { continue };
            let mut turn = self.turn(client, machine.clone()).await;
            if !is_empty(&mut turn).await {
                continue;
            }
            if !before.contains(&row.vmid) {
                super::lock(&state.empty_holders).insert(row.vmid);
                continue;
            }
            tracing::info!(vm = %row.vmid, node = %row.node, "removing an empty holder vm that nobody uses");
            if let Err(error) = destroy(client, &machine).await {
                tracing::warn!(vm = %row.vmid, node = %row.node, %error, "an empty holder vm is left over");
            }
        }
    }
}

/// Whether a VM is a holder that holds nothing.
async fn is_empty(turn: &mut Turn) -> bool {
    match turn.read().await {
        Ok((config, status)) => {
            config.current("name") == Some(NAME)
                && config.lock().is_none()
                && !status.running
                && config.volumes().next().is_none()
        }
        // Its user has destroyed it meanwhile.
        Err(error) => {
            tracing::debug!(vm = %turn.vmid(), %error, "no holder to be used again");
            false
        }
    }
}

/// Puts the volume into the holder and grows it there.
async fn grow(turn: &mut Turn, place: &Place, size: Bytes) -> Result<(), HolderError> {
    let no_text = "a volid and a flag are legal in a drive string";
    let mut drive = PropertyString::with_bare(&place.volid.to_string()).expect(no_text);
    drive.set("backup", "0").expect(no_text);
    for _ in 0..super::attach::MAX_STEPS {
        let (config, _) = turn.read().await?;
        let told = |text: &str| crate::pve::qemu::Drive::read(text).and_then(|drive| drive.size());
        let held = config.holders_of(&place.volid).next();
        let held = held.map(|(_, entry)| entry.current.as_deref().and_then(told).unwrap_or_default());
        let step = match held {
            // Proxmox replaces what is in a slot without a word.
            None if config.entry(&slot().to_string()).is_some() => {
                return Err(HolderError::NotOurs { vmid: turn.vmid(), key: slot().to_string() });
            }
            None => Step::Plug { slot: slot(), drive: drive.clone() },
            Some(now) if now < size => Step::Grow { key: slot().to_string(), size },
            Some(_) => return Ok(()),
        };
        // Out or not out: the next read tells.
        turn.change(&step, config.digest()).await?;
    }
    Err(VmError::NoProgress {
        vmid: turn.vmid(),
        detail: format!("`{}` did not grow to {size}", place.volid),
    }
    .into())
}

/// Takes the volume out of the holder, makes sure that nothing is left in it, and destroys it.
async fn remove(
    client: &Client,
    turn: &mut Turn,
    volid: Option<&VolId>,
    machine: &Machine,
) -> Result<(), HolderError> {
    let vmid = machine.vmid;
    for _ in 0..super::attach::MAX_STEPS {
        let (config, status) = turn.read().await?;
        if config.current("name") != Some(NAME) || status.running {
            return Err(HolderError::NotOurs { vmid, key: "another name, or a running QEMU".to_owned() });
        }
        let held = volid.and_then(|volid| config.holders_of(volid).map(|(key, _)| key.to_owned()).next());
        if let Some(key) = held {
            match turn.change(&Step::Unplug { key }, config.digest()).await? {
                Carried::Out | Carried::NotOut => continue,
            }
        }
        // Destroying a VM destroys what it owns; a holder owns nothing, and what it must not have it is not ours to destroy.
        if let Some(key) = config.current_drives().next() {
            return Err(HolderError::NotOurs { vmid, key: key.to_owned() });
        }
        return destroy(client, machine).await;
    }
    Err(VmError::NoProgress { vmid, detail: "its volume does not leave it".to_owned() }.into())
}

/// Destroys a holder that was just seen empty.
async fn destroy(client: &Client, machine: &Machine) -> Result<(), HolderError> {
    let (vmid, node) = (machine.vmid, &machine.node);
    let upid = client.destroy_vm(node, vmid).await.map_err(|source| HolderError::Request {
        what: "destroy",
        vmid,
        node: node.clone(),
        source,
    })?;
    let destroyed = client.wait("destroy_vm", &upid, PATIENCE).await;
    destroyed.map_err(|source| HolderError::Task { what: "destroy", vmid, node: node.clone(), source })
}
