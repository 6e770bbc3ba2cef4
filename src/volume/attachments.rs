//! Who holds what: a sweep over the configs of a region's VMs.
//!
//! Proxmox lets one volume be plugged into two VMs without a word, so the driver looks before it plugs or deletes. What the sweep
//! could not read is never taken for an absence.
//!
//! [`Sweeps`] lets operations share a sweep: an operation needs one that began after it did, so of many that wait while one is running
//! a single next one serves all. Snapshots are read again only for a VM whose config changed: the digest covers them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use tokio::{sync::Mutex, time::Instant};

use super::{
    Volumes,
    placement::{Place, SWEEP_WIDTH},
    vmqueue::{Doubt, UnsettledCause, settle},
};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, VmRow},
        qemu::{VmConfig, VmStatus, VolumeKey, is_unused},
    },
    types::{NodeName, Region, VmId},
};

/// A VM that holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The VM.
    pub vmid: VmId,
    /// Its name.
    pub name: String,
    /// The PVE node its config is on.
    pub node: NodeName,
    /// How it holds the volume.
    pub hold: Hold,
}

/// How a VM holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// In its config, in force or pending.
    Config {
        /// The key.
        key: String,
        /// Whether it may only read the volume.
        read_only: bool,
    },
    /// As `unusedN`: a reference that QEMU has nothing of, left by the deletion of a snapshot for instance.
    Unused {
        /// The key.
        key: String,
    },
    /// In the config of a snapshot: a rollback would plug it in again.
    Snapshot {
        /// The snapshot.
        snapshot: String,
    },
    /// Its QEMU has a drive that its config does not know: it may be any volume.
    Stray {
        /// The drive's key.
        key: String,
    },
}

impl Holder {
    /// What ends the hold.
    pub(super) fn hint(&self) -> String {
        let vmid = self.vmid;
        match &self.hold {
            Hold::Config { key, .. } => {
                format!("delete the pod that uses it, or detach it by hand (`qm set {vmid} --delete {key}`)")
            }
            Hold::Unused { key } => format!("the VM owns it; look at {key} of VM {vmid}"),
            Hold::Snapshot { snapshot } => {
                format!("delete the snapshot (`qm delsnapshot {vmid} {snapshot}`)")
            }
            Hold::Stray { .. } => {
                format!("look at it with `qm monitor {vmid}`, `info block`, or restart the VM")
            }
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VM {} ({}) on node `{}`, ", self.vmid, self.name, self.node)?;
        match &self.hold {
            Hold::Config { key, .. } => write!(f, "slot {key}"),
            Hold::Unused { key } => write!(f, "as {key}"),
            Hold::Snapshot { snapshot } => write!(f, "snapshot `{snapshot}`"),
            Hold::Stray { key } => write!(f, "drive {key} of its QEMU, which its config does not know"),
        }
    }
}

/// It can't be told who holds a volume.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A VM can't be read.
    #[error("cannot tell whether VM {vmid} on node `{node}` holds the volume")]
    Unreadable {
        /// The VM.
        vmid: VmId,
        /// Its node.
        node: NodeName,
        /// Why.
        #[source]
        source: Arc<ApiError>,
    },
    /// An earlier task may still be running.
    #[error("cannot tell whether earlier tasks of node `{node}` have ended")]
    Unsettled {
        /// The node.
        node: NodeName,
        /// Why.
        #[source]
        source: UnsettledCause,
    },
    /// The VMs can't be listed.
    #[error("cannot list the VMs that could hold the volume")]
    List(#[source] Arc<ApiError>),
    /// The token may not see every VM.
    #[error(
        "the token may not see every VM, so that it can not be told who holds the volume; hint: grant VM.Audit on /vms ({gaps})"
    )]
    Hidden {
        /// The paths where the privilege lacks.
        gaps: String,
    },
    /// The token's privileges can't be read.
    #[error("cannot read the privileges of the token")]
    Permissions(#[source] ApiError),
}

impl Volumes {
    /// Asks now who holds a volume of a region.
    pub(super) fn ask(&self, region: &Region) -> Asked {
        self.inner.regions.get(region).map_or(Asked(0), |region| region.sweeps.ask())
    }

    /// The VMs other than `except` that hold a volume, as a sweep saw them that began after `asked`, and not long ago.
    ///
    /// A volume on a local storage is held by VMs of its node, and by those elsewhere whose drive has its very WWN: a failover moves
    /// configs, not disks.
    pub(super) async fn holders(
        &self,
        place: &Place,
        except: Option<VmId>,
        asked: Asked,
    ) -> Result<Vec<Holder>, SweepError> {
        // Callers have found the place in the region, so that it is configured.
        let Some(region) = self.inner.regions.get(&place.region) else { return Ok(Vec::new()) };
        let gaps = self.hidden_vms(&place.region).await.map_err(SweepError::Permissions)?;
        if let Some(gaps) = gaps {
            return Err(SweepError::Hidden { gaps });
        }
        let seen = region.sweeps.after(&region.client, asked).await?;
        let volid = place.volid.to_string();
        let wwn = place.wwn().to_string();
        let mut holders = Vec::new();
        for vm in seen.iter().filter(|vm| Some(vm.row.vmid) != except) {
            let here = place.zone.as_ref().is_none_or(|zone| *zone == vm.row.node);
            let holds = match &vm.holds {
                Ok(holds) => holds,
                Err(_) if !here => continue,
                Err(source) => {
                    let (vmid, node) = (vm.row.vmid, vm.row.node.clone());
                    return Err(SweepError::Unreadable { vmid, node, source: Arc::clone(source) });
                }
            };
            let by_name = if here { None } else { Some(wwn.as_str()) };
            holders.extend(holds.of(&volid, by_name).into_iter().map(|hold| Holder {
                vmid: vm.row.vmid,
                name: holds.name.clone(),
                node: vm.row.node.clone(),
                hold,
            }));
        }
        Ok(holders)
    }
}

/// How old a sweep may be when something is concluded from it, however long the question is ago.
const SWEEP_AGE: Duration = Duration::from_secs(5);

/// A question that only a sweep answers that began after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked(u64);

/// The sweeps of a region.
#[derive(Default)]
pub(super) struct Sweeps {
    /// Held while one is running; who waits for it is served in order.
    last: Mutex<Option<Sweep>>,
    /// Counts questions and sweeps, so that which came first is known whatever the clock says.
    order: AtomicU64,
    /// Whether running tasks must be awaited before anything is concluded from what is not there.
    pub(super) doubt: Doubt,
}

struct Sweep {
    order: u64,
    began: Instant,
    seen: Arc<Vec<SeenVm>>,
}

/// What a sweep saw of a VM.
#[derive(Clone)]
struct SeenVm {
    row: VmRow,
    holds: Result<Holds, Arc<ApiError>>,
}

/// What a VM holds.
#[derive(Clone)]
struct Holds {
    name: String,
    digest: String,
    /// Drives and `unusedN`, in force or pending.
    config: Vec<VolumeKey>,
    /// Volids with their snapshots.
    snapshots: Arc<BTreeSet<(String, String)>>,
    /// Drives that QEMU has and the config does not know.
    stray: Vec<String>,
}

impl Holds {
    /// How the VM holds a volume; a stray drive may be any volume. With `by_name`, only drives of that WWN count.
    fn of(&self, volid: &str, by_name: Option<&str>) -> Vec<Hold> {
        let config = self.config.iter().filter(|held| held.volid == volid);
        let config =
            config.filter(|held| by_name.is_none_or(|wwn| held.wwn.as_deref() == Some(wwn))).map(|held| {
                match held.key.clone() {
                    key if is_unused(&key) => Hold::Unused { key },
                    key => Hold::Config { key, read_only: held.read_only },
                }
            });
        if by_name.is_some() {
            return config.collect();
        }
        let snapshots = self.snapshots.iter().filter(|(held, _)| held == volid);
        config
            .chain(snapshots.map(|(_, snapshot)| Hold::Snapshot { snapshot: snapshot.clone() }))
            .chain(self.stray.iter().map(|key| Hold::Stray { key: key.clone() }))
            .collect()
    }
}

impl Sweeps {
    /// Asks now.
    pub(super) fn ask(&self) -> Asked {
        Asked(self.order.fetch_add(1, Ordering::SeqCst))
    }

    /// What a sweep saw that began after a question was asked. Cancelling it does no harm: the next one who asks begins anew.
    async fn after(&self, client: &Client, asked: Asked) -> Result<Arc<Vec<SeenVm>>, SweepError> {
        let mut last = self.last.lock().await;
        if let Some(sweep) = &*last
            && sweep.order > asked.0
            && sweep.began.elapsed() < SWEEP_AGE
        {
            return Ok(Arc::clone(&sweep.seen));
        }
        let resources = client.resources().await.map_err(|error| SweepError::List(Arc::new(error)))?;
        if let Some(doubt) = self.doubt.take() {
            settle_all(client, &resources).await?;
            doubt.dispel();
        }
        let (order, began) = (self.order.fetch_add(1, Ordering::SeqCst), Instant::now());
        let resources = client.resources().await.map_err(|error| SweepError::List(Arc::new(error)))?;
        let known = last.as_ref().map(|sweep| known_snapshots(&sweep.seen)).unwrap_or_default();
        let seen = Arc::new(sweep(client, &resources, &known).await);
        *last = Some(Sweep { order, began, seen: Arc::clone(&seen) });
        Ok(seen)
    }
}

type Known = BTreeMap<(VmId, String), Arc<BTreeSet<(String, String)>>>;

fn known_snapshots(seen: &[SeenVm]) -> Known {
    let known = seen.iter().filter_map(|vm| {
        let holds = vm.holds.as_ref().ok()?;
        Some(((vm.row.vmid, holds.digest.clone()), Arc::clone(&holds.snapshots)))
    });
    known.collect()
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

async fn sweep(client: &Client, resources: &Resources, known: &Known) -> Vec<SeenVm> {
    // Each request to a dead node takes up to 30 s, so that it is not asked twice.
    let dead: std::sync::Mutex<BTreeSet<NodeName>> = std::sync::Mutex::default();
    let dead = &dead;
    stream::iter(resources.vms.clone())
        .map(|row| async move {
            let is_dead = !resources.is_online(&row.node) || super::lock(dead).contains(&row.node);
            let holds =
                if is_dead { Err(ApiError::offline(&row.node)) } else { look(client, &row, known).await };
            if let Err(ApiError::Unreachable { .. }) = &holds {
                super::lock(dead).insert(row.node.clone());
            }
            SeenVm { row, holds: holds.map_err(Arc::new) }
        })
        .buffered(SWEEP_WIDTH)
        .collect()
        .await
}

async fn look(client: &Client, row: &VmRow, known: &Known) -> Result<Holds, ApiError> {
    let config = client.vm_config(&row.node, row.vmid).await?;
    let stray = if row.running {
        let status = client.vm_status(&row.node, row.vmid).await?;
        if status.running && status.drives.is_none() {
            // A drive that the config does not know comes of edits by hand only, and there is no sign of one.
            tracing::warn!(vm = %row.vmid, node = %row.node, "qemu does not answer; its config is trusted");
        }
        stray_drives(&config, &status).collect()
    } else {
        Vec::new()
    };
    let digest = config.digest().to_owned();
    let snapshots = match known.get(&(row.vmid, digest.clone())) {
        Some(snapshots) => Arc::clone(snapshots),
        None => Arc::new(snapshots(client, row).await?),
    };
    let name = config.current("name").unwrap_or("no name").to_owned();
    Ok(Holds { name, digest, config: config.volumes().collect(), snapshots, stray })
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

/// SCSI drives that QEMU has and the config does not know.
pub(super) fn stray_drives(config: &VmConfig, status: &VmStatus) -> impl Iterator<Item = String> {
    let known: Vec<&str> = config.current_drives().collect();
    let drives = status.drives.iter().flatten();
    drives
        .filter(|key| key.parse::<crate::types::ScsiSlot>().is_ok() && !known.contains(&key.as_str()))
        .cloned()
        .collect::<Vec<_>>()
        .into_iter()
}
