//! Sweeps: reading every VM of a region, so that it can be told who holds a volume.
//!
//! [`Sweeps::after`] gives what a sweep saw that began after a question; operations that wait together share one. [`Sweeps::recent`] goes by
//! the last sweep while that is young, and reads only the VMs again that changed since. Snapshots are read again only for a VM whose config
//! changed: the digest covers them.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex as Lock},
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use super::{
    RegionState,
    attachments::SweepError,
    index::{Index, Known, Moment, Seen, Snapshots, stray_drives},
    placement::SWEEP_WIDTH,
    vmqueue::{Doubt, settle},
};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, VmRow},
        qemu::VmStatus,
    },
    types::{NodeName, VmId},
};

/// How often the background sweeps.
pub(super) const SWEEP_EVERY: Duration = Duration::from_secs(45);
/// How old a sweep may be by which it is told that nobody holds a volume on a local storage, and how old what is remembered of a VM.
pub(super) const RECENT: Duration = Duration::from_mins(1);
/// How old a sweep may be when it must have begun after a question, however long that is ago.
const FRESH: Duration = Duration::from_secs(5);
/// After how long without an operation the background rests.
const IDLE: Duration = Duration::from_mins(10);
/// How long a sweep goes by what QEMU said while the config stays what it was: of VMs that no operation was about, and, ahead of questions,
/// of all.
const STATUS_AGE: Duration = Duration::from_mins(10);

/// A question that only a sweep answers that began after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked(Moment);

impl Asked {
    /// Any sweep answers it.
    pub(super) const NEVER: Self = Self(Moment::START);
}

/// The sweeps of a region.
#[derive(Default)]
pub(super) struct Sweeps {
    /// Held while one is running; who waits for it is served in order.
    running: tokio::sync::Mutex<()>,
    last: Lock<Option<Sweep>>,
    used: Lock<Option<Instant>>,
    /// The VMs that operations were about: of those alone QEMU may have come to something of ours while the config is what it was.
    ours: Lock<BTreeSet<VmId>>,
    /// What was read of each VM, by sweeps and by turns.
    pub(super) index: Arc<Index>,
    /// Whether running tasks must be awaited before anything is concluded from what is not there.
    pub(super) doubt: Doubt,
}

/// A sweep that ended.
#[derive(Clone)]
struct Sweep {
    began: Moment,
    at: Instant,
    /// How it looked.
    depth: Depth,
    /// Where the token may not see VMs.
    gaps: Option<String>,
}

/// What is known of the VMs of a region.
pub(super) struct Sight {
    /// The VMs.
    pub(super) vms: Vec<(VmId, Known)>,
    /// Where the token may not see VMs; `None` where it sees them all.
    pub(super) gaps: Option<String>,
}

/// What is asked of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Configs, and QEMU of every VM that operations were about, or whose config is not what it was.
    Thorough,
    /// Configs, and QEMU where the config is not what it was.
    Configs,
}

impl Sweeps {
    /// Asks now.
    pub(super) fn ask(&self) -> Asked {
        *super::lock(&self.used) = Some(Instant::now());
        Asked(self.index.now())
    }

    /// An operation on a VM is under way: others may follow, so that the background goes on.
    pub(super) fn note_use(&self, vmid: VmId) {
        *super::lock(&self.used) = Some(Instant::now());
        super::lock(&self.ours).insert(vmid);
    }

    /// How old the last sweep is; `None` where there was none.
    pub(super) fn age(&self) -> Option<Duration> {
        super::lock(&self.last).as_ref().map(|sweep| sweep.at.elapsed())
    }

    fn sight(&self, gaps: Option<String>) -> Sight {
        Sight { vms: self.index.all(), gaps }
    }

    /// What a sweep saw that began after a question was asked. Cancelling it does no harm: the next one who asks begins anew.
    pub(super) async fn after(&self, region: &RegionState, asked: Asked) -> Result<Sight, SweepError> {
        let running = self.running.lock().await;
        let last = super::lock(&self.last).clone().filter(|sweep| {
            sweep.depth == Depth::Thorough && sweep.began > asked.0 && sweep.at.elapsed() < FRESH
        });
        let gaps = match last {
            Some(sweep) => sweep.gaps,
            None => self.sweep(region, Depth::Thorough).await?,
        };
        drop(running);
        region.client.metrics().csi().answered(region.client.region().as_str());
        Ok(self.sight(gaps))
    }

    /// What the last sweep saw while it is young, with the VMs of a node read again that changed since; else what a new one sees.
    pub(super) async fn recent(&self, region: &RegionState, zone: &NodeName) -> Result<Sight, SweepError> {
        let asked = self.ask();
        let last = super::lock(&self.last).clone();
        let Some(sweep) = last.filter(|sweep| sweep.at.elapsed() < RECENT && !self.doubt.is_raised()) else {
            return self.after(region, asked).await;
        };
        let resources =
            region.poll.recent(&region.client).await.map_err(|e| SweepError::List(Arc::new(e)))?;
        let here = resources.vms.iter().filter(|row| row.node == *zone);
        let changed = here.filter(|row| match self.index.get(row.vmid) {
            Some(known) if known.is_stale() || known.node != row.node => true,
            // A node that does not answer is not asked by each of many operations.
            Some(known) => known.seen.is_err() && known.at.elapsed() > FRESH,
            None => true,
        });
        self.look_at_all(region, &resources, changed.cloned().collect(), Depth::Thorough).await;
        Ok(self.sight(sweep.gaps))
    }

    /// Reads one VM again.
    pub(super) async fn again(&self, region: &RegionState, vmid: VmId) -> Result<(), SweepError> {
        let resources =
            region.poll.recent(&region.client).await.map_err(|e| SweepError::List(Arc::new(e)))?;
        let rows = resources.vm(vmid).into_iter().cloned().collect();
        self.look_at_all(region, &resources, rows, Depth::Thorough).await;
        Ok(())
    }

    /// Sweeps for whoever asks next: once at the start, and while there are operations.
    pub(super) async fn ahead(&self, region: &RegionState) -> Result<(), SweepError> {
        let idle = match *super::lock(&self.used) {
            Some(used) => used.elapsed() > IDLE,
            None => self.age().is_some(),
        };
        if idle {
            return Ok(());
        }
        let _running = self.running.lock().await;
        self.sweep(region, Depth::Configs).await.map(drop)
    }

    /// One sweep, while `running` is held.
    async fn sweep(&self, region: &RegionState, depth: Depth) -> Result<Option<String>, SweepError> {
        let list = |error| SweepError::List(Arc::new(error));
        if let Some(doubt) = self.doubt.take() {
            self.doubt.arrived().await;
            let resources = region.poll.fresh(&region.client).await.map_err(list)?;
            settle_all(&region.client, &resources).await?;
            doubt.dispel();
        }
        let (began, at) = (self.index.now(), Instant::now());
        let resources = region.poll.fresh(&region.client).await.map_err(list)?;
        let gaps = region.hidden_vms().await.map_err(SweepError::Permissions)?;
        self.look_at_all(region, &resources, resources.vms.clone(), depth).await;
        self.index.retain(&resources.vms.iter().map(|row| row.vmid).collect(), began);
        tracing::debug!(region = %region.client.region(), vms = resources.vms.len(), elapsed_ms = at.elapsed().as_millis(), ?depth, "swept");
        region.client.metrics().csi().swept(region.client.region().as_str(), at);
        *super::lock(&self.last) = Some(Sweep { began, at, depth, gaps: gaps.clone() });
        Ok(gaps)
    }

    /// Reads these VMs.
    async fn look_at_all(&self, region: &RegionState, resources: &Resources, rows: Vec<VmRow>, depth: Depth) {
        let ours = super::lock(&self.ours).clone();
        let (index, ours) = (&self.index, &ours);
        // Each request to a dead node takes up to 30 s, so that it is not asked twice.
        let dead: Lock<BTreeSet<NodeName>> = Lock::default();
        let dead = &dead;
        stream::iter(rows)
            .map(|row| async move {
                let (began, at) = (index.now(), Instant::now());
                let is_dead = !resources.is_online(&row.node) || super::lock(dead).contains(&row.node);
                let seen = if is_dead {
                    Err(ApiError::offline(&row.node))
                } else {
                    let ask = depth == Depth::Thorough && ours.contains(&row.vmid);
                    look(&region.client, &row, index.get(row.vmid), ask).await
                };
                if let Err(ApiError::Unreachable { .. }) = &seen {
                    super::lock(dead).insert(row.node.clone());
                }
                let name = match &seen {
                    Ok(seen) => seen.config.current("name").unwrap_or("no name").to_owned(),
                    Err(_) => row.name.unwrap_or_default(),
                };
                let seen = seen.map_err(Arc::new);
                index.put(row.vmid, Known::new(row.node, name, (began, at), seen));
            })
            .buffered(SWEEP_WIDTH)
            .for_each(|()| std::future::ready(()))
            .await;
    }
}

/// Waits for tasks of an earlier time, ours or an earlier process's, that may still plug something in.
async fn settle_all(client: &Client, resources: &Resources) -> Result<(), SweepError> {
    // The VMs of a node that is offline are unreadable anyway.
    for node in resources.nodes.iter().filter(|row| row.online).map(|row| &row.node) {
        let settled = settle(client, node, None).await;
        settled.map_err(|source| SweepError::Unsettled { node: node.clone(), source })?;
    }
    Ok(())
}

/// Reads a VM; what its QEMU has only where that may be other than `before`, or with `ask`.
async fn look(client: &Client, row: &VmRow, before: Option<Known>, ask: bool) -> Result<Seen, ApiError> {
    let mut config = Arc::new(client.vm_config(&row.node, row.vmid).await?);
    let before = before.and_then(|known| known.seen.ok());
    let unchanged = before.as_ref().filter(|seen| seen.config.digest() == config.digest());
    let known = unchanged.and_then(|seen| seen.status.clone());
    // What stands in the way is looked at anew: the VM may have been restarted since.
    let in_the_way = |status: &VmStatus| stray_drives(&config, status).next().is_some();
    let known = known.filter(|(status, at)| {
        !ask && status.running == row.running && at.elapsed() < STATUS_AGE && !in_the_way(status)
    });
    let status = match known {
        Some(known) => Some(known),
        None if row.running => Some((status(client, row).await?, Instant::now())),
        None => None,
    };
    // A drive that the config does not know may have been plugged in between the two: then the config knows it by now.
    if let Some((status, _)) = &status
        && stray_drives(&config, status).next().is_some()
    {
        config = Arc::new(client.vm_config(&row.node, row.vmid).await?);
    }
    let snapshots = match before.map(|seen| seen.snapshots) {
        Some(snapshots) if snapshots.digest == config.digest() => snapshots,
        _ => {
            let references = snapshots(client, row).await?;
            Arc::new(Snapshots { digest: config.digest().to_owned(), references })
        }
    };
    Ok(Seen { config, status, snapshots })
}

async fn status(client: &Client, row: &VmRow) -> Result<VmStatus, ApiError> {
    let status = client.vm_status(&row.node, row.vmid).await?;
    if status.running && status.drives.is_none() {
        // A drive that the config does not know comes of edits by hand only, and there is no sign of one.
        tracing::warn!(vm = %row.vmid, node = %row.node, "qemu does not answer; its config is trusted");
    }
    Ok(status)
}

async fn snapshots(client: &Client, row: &VmRow) -> Result<BTreeSet<(String, String)>, ApiError> {
    let mut references = BTreeSet::new();
    for snapshot in client.snapshots(&row.node, row.vmid).await? {
        for volid in client.snapshot_volumes(&row.node, row.vmid, &snapshot).await? {
            references.insert((volid, snapshot.clone()));
        }
    }
    Ok(references)
}
