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

use tokio::{sync::OwnedMutexGuard, time::Instant};
use uuid::Uuid;

use super::{
    Volumes,
    index::{Index, Seen},
    placement::Machine,
    step::{Carried, Step},
    sweep::RECENT,
    vmerror::{Leftover, UnsettledCause, VmError},
};
use crate::{
    pve::{
        Client,
        qemu::{VmConfig, VmStatus},
        task::TaskError,
    },
    telemetry::csi::Queued,
    types::{NodeName, Region, VmId},
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

impl VmQueue {
    /// Waits for the turn of a VM. `doubt` is told of changes whose outcome is not known.
    async fn enter(&self, client: &Client, machine: Machine, doubt: Doubt, index: Arc<Index>) -> Turn {
        let key = (machine.region.clone(), machine.vmid);
        let queued = client.metrics().csi().queued(key.0.as_str());
        let vm = Arc::clone(super::lock(&self.vms).entry(key).or_default());
        Turn { client: client.clone(), machine, memory: vm.lock_owned().await, doubt, index, _queued: queued }
    }
}

impl Volumes {
    /// Waits for the turn of a VM.
    pub(super) async fn turn(&self, client: &Client, machine: Machine) -> Turn {
        let region = self.inner.regions.get(&machine.region);
        let sweeps = region.map(|region| &region.sweeps);
        sweeps.inspect(|sweeps| sweeps.note_use(machine.vmid));
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

/// How long a request may be on its way whose connection broke: no task shows of it before it arrives, and if the VM is what it was, its
/// digest is good then.
const ON_ITS_WAY: Duration = Duration::from_secs(20);

/// Whether a task that nobody waits for may still change a VM of the region: so at the start, and after an unknown outcome.
#[derive(Clone)]
pub(super) struct Doubt {
    raised: Arc<AtomicBool>,
    /// When a request was last lost sight of.
    since: Arc<Mutex<Option<Instant>>>,
}

impl Default for Doubt {
    fn default() -> Self {
        Self { raised: Arc::new(AtomicBool::new(true)), since: Arc::default() }
    }
}

impl Doubt {
    /// Whether there is doubt.
    pub(super) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// From now on there is doubt: a request was sent, and it is not known what became of it.
    pub(super) fn raise(&self) {
        *super::lock(&self.since) = Some(Instant::now());
        self.raised.store(true, Ordering::SeqCst);
    }

    /// Waits until whatever was on its way has arrived, and shows as a task or in a config.
    pub(super) async fn arrived(&self) {
        let since = *super::lock(&self.since);
        if let Some(since) = since {
            tokio::time::sleep_until(since + ON_ITS_WAY).await;
        }
    }

    /// The doubt, where there is any: it is back when what was taken is dropped without having been dispelled.
    pub(super) fn take(&self) -> Option<TakenDoubt> {
        self.raised.swap(false, Ordering::SeqCst).then(|| TakenDoubt(Some(self.clone())))
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
            doubt.raised.store(true, Ordering::SeqCst);
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
    /// Counts it until it is dropped.
    _queued: Queued,
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
        let snapshots = self.index.snapshots(self.machine.vmid);
        let seen =
            Seen { config: Arc::clone(&config), status: Some((status.clone(), Instant::now())), snapshots };
        self.index.saw(self.machine.vmid, &self.machine.node, began, seen);
        Ok((config, status))
    }

    /// The config of the VM now, where what QEMU has does not matter. `kept` is what it had, where nothing since can have changed that.
    pub(super) async fn read_config(&mut self, kept: Option<&Seen>) -> Result<Arc<VmConfig>, VmError> {
        self.settle().await?;
        let began = self.index.now();
        let config = self.read_own_config().await?;
        if let Some(kept) = kept {
            let seen = Seen { config: Arc::clone(&config), ..kept.clone() };
            self.index.saw(self.machine.vmid, &self.machine.node, began, seen);
        }
        Ok(config)
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

    /// What the VM had not long ago, where what its QEMU has does not matter.
    pub(super) fn recall_seen(&self) -> Option<Seen> {
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

    /// Refuses a VM that runs and whose QEMU does not answer.
    pub(super) async fn check_answers(&self) -> Result<(), VmError> {
        let status = self.read_status().await?;
        if status.running && status.drives.is_none() {
            return Err(VmError::QemuSilent { vmid: self.machine.vmid });
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), VmError> {
        if self.memory.settled {
            return Ok(());
        }
        let vmid = self.machine.vmid;
        self.doubt.arrived().await;
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
            Step::Plug { slot, drive } | Step::Tune { slot, drive } => {
                self.client.set_drive(node, vmid, *slot, drive, digest).await
            }
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
            (Step::Plug { drive, .. } | Step::Tune { drive, .. }, Some(entry)) => entry
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
