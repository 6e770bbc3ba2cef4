//! One writer for each VM, and single steps of changing a VM's drives.
//!
//! [`VmQueue::enter`] gives the turn; [`Turn::read`] tells what the VM is now; [`Turn::change`] carries out one step and takes it
//! back out of pending when it fails. First come, first served (tokio's mutex is fair).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use super::{
    Dated, Volumes,
    index::{Index, Seen},
    placement::Machine,
    sweep::RECENT,
};
use crate::{
    pve::{
        ApiError, Client,
        qemu::{VmConfig, VmStatus},
        task::TaskError,
    },
    types::{Bytes, NodeName, Region, ScsiSlot, VmId, props::PropertyString},
};

/// How long a change of a VM is waited for: 10 s for Proxmox's lock and the slowest unplug of about 25 s, twice.
const CHANGE_PATIENCE: Duration = Duration::from_secs(75);
/// How long a resize is waited for.
const RESIZE_PATIENCE: Duration = Duration::from_mins(5);

/// The turns of all VMs.
#[derive(Default)]
pub(super) struct VmQueue {
    vms: Mutex<BTreeMap<(Region, VmId), SharedMemory>>,
}

type SharedMemory = Arc<tokio::sync::Mutex<Memory>>;

/// What is remembered of a VM between turns.
#[derive(Default)]
pub(super) struct Memory {
    /// Whether no task of an earlier time can be running: not so at the first touch and after an unknown outcome.
    settled: bool,
}

/// A VM can't be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It can't be read.
    #[error("cannot read VM {vmid}")]
    Read {
        /// The VM.
        vmid: VmId,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// An earlier task of it may still be running.
    #[error("cannot tell whether an earlier task of VM {vmid} has ended")]
    Unsettled {
        /// The VM.
        vmid: VmId,
        /// Why.
        #[source]
        source: UnsettledCause,
    },
    /// The VMID is another VM's now.
    #[error(
        "VM {vmid} has the SMBIOS uuid {found} and is not the VM of the node any more, which has {expected}"
    )]
    Stranger {
        /// The VM.
        vmid: VmId,
        /// The uuid it has, or none.
        found: String,
        /// The uuid it must have, or none.
        expected: String,
    },
    /// It is locked.
    #[error(
        "VM {vmid} is locked ({lock}); hint: wait until that has ended, or, if nothing runs any more, `qm unlock {vmid}`"
    )]
    Locked {
        /// The VM.
        vmid: VmId,
        /// By what.
        lock: String,
    },
    /// It is protected.
    #[error("VM {vmid} is protected, so that no drive can be removed; hint: `qm set {vmid} --protection 0`")]
    Protected {
        /// The VM.
        vmid: VmId,
    },
    /// Disks can't be plugged or unplugged while it runs.
    #[error("VM {vmid} runs with hotplug of disks off; hint: `qm set {vmid} --hotplug network,disk,usb`")]
    HotplugOff {
        /// The VM.
        vmid: VmId,
    },
    /// Its SCSI controller can't carry volumes.
    #[error(
        "VM {vmid} has SCSI controller `{found}`, and volumes need a virtio-scsi one; hint: shut it down and `qm set {vmid} --scsihw virtio-scsi-single`"
    )]
    ScsiHardware {
        /// The VM.
        vmid: VmId,
        /// What it has; `lsi` where none is set.
        found: String,
    },
    /// QEMU does not answer.
    #[error("the QEMU process of VM {vmid} does not answer, so that it is not known which drives it has")]
    QemuSilent {
        /// The VM.
        vmid: VmId,
    },
    /// QEMU has a drive the config does not know.
    #[error(
        "the QEMU of VM {vmid} has drive {key}, which its config does not know and which may be the volume; hint: look at it with `qm monitor {vmid}`, `info block`"
    )]
    Stray {
        /// The VM.
        vmid: VmId,
        /// The drive.
        key: String,
    },
    /// A request to change it gave no good answer.
    #[error("cannot {step} of VM {vmid}{left}")]
    Request {
        /// The VM.
        vmid: VmId,
        /// What was to be done.
        step: String,
        /// What it left behind.
        left: Leftover,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The task that was to change it did not end well.
    #[error("cannot {step} of VM {vmid}{left}")]
    Task {
        /// The VM.
        vmid: VmId,
        /// What was to be done.
        step: String,
        /// What it left behind.
        left: Leftover,
        /// Why.
        #[source]
        source: TaskError,
    },
    /// The slot is to get another volume, which unplugging ours would drop.
    #[error(
        "drive {key} of VM {vmid} waits to be replaced by `{pending}`, which unplugging it now would forget; hint: shut the VM down and start it again, or take the change back (`qm set {vmid} --revert {key}`)"
    )]
    PendingOther {
        /// The VM.
        vmid: VmId,
        /// The drive.
        key: String,
        /// What waits.
        pending: String,
    },
    /// Somebody else changes the VM all the time, or a change that was reported done does not show.
    #[error("VM {vmid} does not come to the state that was asked for: {detail}")]
    NoProgress {
        /// The VM.
        vmid: VmId,
        /// What was seen last.
        detail: String,
    },
}

impl VmError {
    /// Whether Proxmox said no, and nothing of what was asked for can still be under way.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Request { source, .. } => !source.is_unknown(),
            Self::Task { source, .. } => !source.is_unknown(),
            _ => false,
        }
    }

    /// What it may come of.
    pub(super) fn dated(&self) -> Option<Dated> {
        match self {
            Self::Stranger { vmid, .. } => Some(Dated::Vm(*vmid)),
            Self::Read { vmid, source } | Self::Request { vmid, source, .. } if source.is_no_such_vm() => {
                Some(Dated::Vm(*vmid))
            }
            _ => None,
        }
    }
}

/// Why it can't be told that an earlier task has ended.
#[derive(Debug, thiserror::Error)]
pub enum UnsettledCause {
    /// The running tasks can't be listed.
    #[error(transparent)]
    List(ApiError),
    /// A task still runs, or its state can't be read.
    #[error(transparent)]
    Task(TaskError),
}

/// What a failed change left in `pending`, where it would strike at the next start of the VM.
#[derive(Debug)]
pub enum Leftover {
    /// Nothing.
    Nothing,
    /// A pending change that was taken back.
    TakenBack,
    /// A pending change that could not be taken back.
    Left {
        /// The key.
        key: String,
        /// Why not.
        why: String,
    },
    /// It is not known, because the outcome is not.
    Unknown,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing | Self::Unknown => Ok(()),
            Self::TakenBack => f.write_str(" (the pending change was taken back)"),
            Self::Left { key, why } => {
                write!(
                    f,
                    " (the change of {key} is still pending and would be applied at the next start: {why})"
                )
            }
        }
    }
}

/// A single change of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Plug a volume in.
    Plug { slot: ScsiSlot, drive: PropertyString },
    /// Take a drive out.
    Unplug { key: String },
    /// Take a pending change of a drive back.
    Revert { key: String },
    /// Grow a drive.
    Grow { key: String, size: Bytes },
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plug { slot, drive } => {
                write!(f, "plug `{}` into slot {slot}", drive.bare().unwrap_or_default())
            }
            Self::Unplug { key } => write!(f, "unplug drive {key}"),
            Self::Revert { key } => write!(f, "take back the pending change of drive {key}"),
            Self::Grow { key, size } => write!(f, "grow drive {key} to {size}"),
        }
    }
}

impl Step {
    /// What tasks that do this have in common.
    fn act(&self) -> &'static str {
        match self {
            Self::Plug { .. } => "plug",
            Self::Unplug { .. } => "unplug",
            Self::Revert { .. } => "take_back",
            Self::Grow { .. } => "grow",
        }
    }

    fn key(&self) -> String {
        match self {
            Self::Plug { slot, .. } => slot.to_string(),
            Self::Unplug { key } | Self::Revert { key } | Self::Grow { key, .. } => key.clone(),
        }
    }
}

/// Whether a step was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carried {
    /// Proxmox says so; what came of it has to be read.
    Out,
    /// The config changed meanwhile and nothing was done: read and decide again.
    NotOut,
}

impl VmQueue {
    /// Waits for the turn of a VM. `doubt` is told of changes whose outcome is not known.
    async fn enter(&self, client: &Client, machine: Machine, doubt: Doubt, index: Arc<Index>) -> Turn {
        let key = (machine.region.clone(), machine.vmid);
        let vm = Arc::clone(super::lock(&self.vms).entry(key).or_default());
        Turn { client: client.clone(), machine, memory: vm.lock_owned().await, doubt, index }
    }
}

impl Volumes {
    /// Waits for the turn of a VM.
    pub(super) async fn turn(&self, client: &Client, machine: Machine) -> Turn {
        let region = self.inner.regions.get(&machine.region);
        let sweeps = region.map(|region| &region.sweeps);
        let doubt = sweeps.map(|sweeps| sweeps.doubt.clone()).unwrap_or_default();
        let index = sweeps.map(|sweeps| Arc::clone(&sweeps.index)).unwrap_or_default();
        self.inner.queue.enter(client, machine, doubt, index).await
    }
}

/// A VM as it is now, whoever's it is: for VMs that are not known as a node's.
pub(super) async fn machine_now(
    client: &Client,
    region: &Region,
    vmid: VmId,
    node: &NodeName,
) -> Result<Machine, VmError> {
    let config = client.vm_config(node, vmid).await.map_err(|source| VmError::Read { vmid, source })?;
    Ok(Machine {
        node_name: config.current("name").unwrap_or("no name").to_owned(),
        region: region.clone(),
        vmid,
        uuid: config.uuid(),
        node: node.clone(),
    })
}

/// Whether a task that nobody waits for may still change a VM of the region: so at the start, and after an unknown outcome.
#[derive(Clone)]
pub(super) struct Doubt(Arc<AtomicBool>);

impl Default for Doubt {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Doubt {
    /// Whether there is doubt.
    pub(super) fn is_raised(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// From now on there is doubt.
    pub(super) fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// The doubt, where there is any: it is back when what was taken is dropped without having been dispelled.
    pub(super) fn take(&self) -> Option<TakenDoubt> {
        self.0.swap(false, Ordering::SeqCst).then(|| TakenDoubt(Some(self.clone())))
    }
}

/// A doubt that somebody looks into, until it is dispelled.
pub(super) struct TakenDoubt(Option<Doubt>);

impl TakenDoubt {
    /// It was looked into, and there is nothing in it.
    pub(super) fn dispel(mut self) {
        self.0 = None;
    }
}

impl Drop for TakenDoubt {
    fn drop(&mut self) {
        if let Some(doubt) = &self.0 {
            doubt.raise();
        }
    }
}

/// Waits for tasks that may change VMs of a node, or one VM of it.
pub(super) async fn settle(
    client: &Client,
    node: &NodeName,
    vmid: Option<VmId>,
) -> Result<(), UnsettledCause> {
    for upid in client.running_changes(node, vmid).await.map_err(UnsettledCause::List)? {
        tracing::info!(%node, %upid, "waiting for an earlier task");
        match client.wait("earlier", &upid, CHANGE_PATIENCE).await {
            // How it ended shows in the config.
            Ok(()) | Err(TaskError::Failed { .. }) => {}
            Err(error) => return Err(UnsettledCause::Task(error)),
        }
    }
    Ok(())
}

/// The right to change a VM, until it is dropped.
pub(super) struct Turn {
    client: Client,
    machine: Machine,
    memory: OwnedMutexGuard<Memory>,
    doubt: Doubt,
    index: Arc<Index>,
}

impl Turn {
    /// The outcome of a change is not known.
    fn unsettle(&mut self) {
        self.memory.settled = false;
        self.doubt.raise();
    }

    pub(super) fn vmid(&self) -> VmId {
        self.machine.vmid
    }

    /// What the VM is now. Waits first for tasks of an earlier time that may still change it.
    pub(super) async fn read(&mut self) -> Result<(Arc<VmConfig>, VmStatus), VmError> {
        self.settle().await?;
        let began = self.index.now();
        let config = self.read_own_config().await?;
        let status = self.read_status().await?;
        self.index.saw(self.machine.vmid, &self.machine.node, began, (Arc::clone(&config), status.clone()));
        Ok((config, status))
    }

    /// The config of the VM now, where what QEMU has does not matter.
    pub(super) async fn read_config(&mut self) -> Result<Arc<VmConfig>, VmError> {
        self.settle().await?;
        self.read_own_config().await
    }

    /// What the VM was not long ago, as far as is known. It may suggest a step, which Proxmox refuses where the config has changed since;
    /// an answer it is not.
    pub(super) async fn recall(&self) -> Option<(Arc<VmConfig>, VmStatus)> {
        let seen = self.recall_seen()?;
        let status = match seen.status {
            Some((status, at)) if at.elapsed() < RECENT => status,
            _ => self.read_status().await.ok()?,
        };
        Some((seen.config, status))
    }

    /// The config the VM had not long ago, where what its QEMU has does not matter.
    pub(super) fn recall_config(&self) -> Option<Arc<VmConfig>> {
        Some(self.recall_seen()?.config)
    }

    fn recall_seen(&self) -> Option<Seen> {
        let known = self.index.get(self.machine.vmid)?;
        if !self.memory.settled
            || known.is_stale()
            || known.node != self.machine.node
            || known.at.elapsed() >= RECENT
        {
            return None;
        }
        known.seen.ok().filter(|seen| seen.config.uuid() == self.machine.uuid)
    }

    async fn read_own_config(&self) -> Result<Arc<VmConfig>, VmError> {
        let vmid = self.machine.vmid;
        let config = self.client.vm_config(&self.machine.node, vmid).await;
        let config = config.map_err(|source| VmError::Read { vmid, source })?;
        if config.uuid() != self.machine.uuid {
            let shown = |uuid: Option<Uuid>| uuid.map_or_else(|| "none".to_owned(), |uuid| uuid.to_string());
            let (found, expected) = (shown(config.uuid()), shown(self.machine.uuid));
            return Err(VmError::Stranger { vmid, found, expected });
        }
        Ok(Arc::new(config))
    }

    async fn read_status(&self) -> Result<VmStatus, VmError> {
        let vmid = self.machine.vmid;
        let status = self.client.vm_status(&self.machine.node, vmid).await;
        status.map_err(|source| VmError::Read { vmid, source })
    }

    async fn settle(&mut self) -> Result<(), VmError> {
        if self.memory.settled {
            return Ok(());
        }
        let vmid = self.machine.vmid;
        let settled = settle(&self.client, &self.machine.node, Some(vmid)).await;
        settled.map_err(|source| VmError::Unsettled { vmid, source })?;
        self.memory.settled = true;
        Ok(())
    }

    /// Refuses a VM that is locked, or that runs without hotplug of disks.
    pub(super) fn check_changeable(&self, config: &VmConfig, status: &VmStatus) -> Result<(), VmError> {
        let vmid = self.machine.vmid;
        if let Some(lock) = config.lock() {
            return Err(VmError::Locked { vmid, lock: lock.to_owned() });
        }
        if status.running && !config.hotplugs_disks() {
            return Err(VmError::HotplugOff { vmid });
        }
        Ok(())
    }

    /// Carries out one step on the config of this digest, and waits for its end.
    pub(super) async fn change(&mut self, step: &Step, digest: &str) -> Result<Carried, VmError> {
        // Before, so that no reading from before counts; and after, so that none counts that was made meanwhile.
        self.index.mark_stale(self.machine.vmid);
        let carried = self.carry_out(step, digest).await;
        self.index.mark_stale(self.machine.vmid);
        carried
    }

    async fn carry_out(&mut self, step: &Step, digest: &str) -> Result<Carried, VmError> {
        let (node, vmid) = (&self.machine.node, self.machine.vmid);
        tracing::info!(vm = %vmid, %node, %step, "changing a vm");
        let sent = match step {
            Step::Plug { slot, drive } => self.client.set_drive(node, vmid, *slot, drive, digest).await,
            Step::Unplug { key } => self.client.delete_drive(node, vmid, key, digest).await,
            Step::Revert { key } => self.client.revert(node, vmid, key, digest).await,
            Step::Grow { key, size } => self.client.resize(node, vmid, key, *size, digest).await,
        };
        let upid = match sent {
            Ok(upid) => upid,
            Err(error) if error.is_digest_mismatch() => return Ok(Carried::NotOut),
            Err(source) => {
                let left = if source.changed_nothing() || source.is_no_such_vm() {
                    Leftover::Nothing
                } else if source.is_unknown() {
                    self.unsettle();
                    Leftover::Unknown
                } else {
                    self.take_back(step).await
                };
                return Err(VmError::Request { vmid, step: step.to_string(), left, source });
            }
        };
        let patience = if matches!(step, Step::Grow { .. }) { RESIZE_PATIENCE } else { CHANGE_PATIENCE };
        match self.client.wait(step.act(), &upid, patience).await {
            Ok(()) => Ok(Carried::Out),
            // What was warned about shows when the VM is read again.
            Err(error) if error.is_warnings() => Ok(Carried::Out),
            Err(error) if error.is_digest_mismatch() => Ok(Carried::NotOut),
            Err(source) => {
                let left = if source.is_unknown() {
                    self.unsettle();
                    Leftover::Unknown
                } else {
                    self.take_back(step).await
                };
                Err(VmError::Task { vmid, step: step.to_string(), left, source })
            }
        }
    }

    /// Takes what a failed step left in `pending` back. Only the step's own key is looked at.
    async fn take_back(&mut self, step: &Step) -> Leftover {
        if matches!(step, Step::Revert { .. } | Step::Grow { .. }) {
            return Leftover::Nothing;
        }
        let (node, vmid, key) = (&self.machine.node, self.machine.vmid, step.key());
        let left = |why: String| Leftover::Left { key: key.clone(), why };
        let config = match self.client.vm_config(node, vmid).await {
            Ok(config) => config,
            Err(error) => return left(error.to_string()),
        };
        let pending = match (step, config.entry(&key)) {
            (Step::Plug { drive, .. }, Some(entry)) => entry
                .pending
                .as_deref()
                .and_then(crate::pve::qemu::Drive::read)
                .is_some_and(|pending| pending.volid() == drive.bare()),
            (Step::Unplug { .. }, Some(entry)) => entry.pending_delete,
            _ => false,
        };
        if !pending {
            return Leftover::Nothing;
        }
        match self.client.revert(node, vmid, &key, config.digest()).await {
            Ok(upid) => match self.client.wait("take_back", &upid, CHANGE_PATIENCE).await {
                Ok(()) => Leftover::TakenBack,
                Err(error) => {
                    if error.is_unknown() {
                        self.unsettle();
                    }
                    left(error.to_string())
                }
            },
            Err(error) => {
                if error.is_unknown() {
                    self.unsettle();
                }
                left(error.to_string())
            }
        }
    }
}
