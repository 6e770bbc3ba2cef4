//! What a CSI operation means in terms of Proxmox.
//!
//! Read [`attach`] first: a pure plan over what a VM's config and QEMU say, and a loop that carries out one step, reads again
//! and plans again, until the plan says that nothing is left to do. An answer is given only from what was read.

pub mod attach;
pub mod attachments;
mod background;
mod candidates;
pub mod capacity;
pub mod create;
pub mod delete;
pub mod detach;
mod disk;
pub mod expand;
pub mod holder;
mod index;
pub mod inventory;
mod lookup;
pub mod modify;
pub mod outcome;
pub mod placement;
mod poll;
mod step;
mod sweep;
pub mod vmerror;
pub mod vmqueue;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    pve::{ApiError, Client, access::Permissions},
    types::{Region, VmId, attributes::Attributes, cluster::Cluster},
};

/// How long the privileges of a token are remembered.
const PERMISSIONS_AGE: Duration = Duration::from_mins(1);

/// What the controller was configured with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The owner of new volumes: a VMID that no VM has.
    pub owner: VmId,
    /// The VMIDs of short-lived holder VMs, through which a volume that is attached nowhere is grown.
    pub holders: RangeInclusive<u32>,
}

/// The volumes of all regions. Clones share their state.
#[derive(Clone)]
pub struct Volumes {
    inner: Arc<Inner>,
}

struct Inner {
    regions: BTreeMap<Region, RegionState>,
    cluster: Arc<dyn Cluster>,
    settings: Settings,
    queue: vmqueue::VmQueue,
    /// Volumes whose allocation may have been done or not, by disk, with the place that was asked.
    doubtful: Mutex<BTreeMap<String, create::Sent>>,
    /// What was changed of volumes, by handle.
    attributes: Mutex<BTreeMap<String, Attributes>>,
    /// Volumes that were to be kept when they were deleted, by handle.
    kept: Mutex<VecDeque<String>>,
    /// The last volumes that were deleted, by key.
    deleted: Mutex<VecDeque<String>>,
}

struct RegionState {
    client: Client,
    permissions: tokio::sync::Mutex<Option<(Instant, Permissions)>>,
    inventory: inventory::Inventory,
    poll: poll::Poll,
    sweeps: sweep::Sweeps,
    /// Shared by those who grow volumes through holders; had alone by who tidies up behind them.
    growing: tokio::sync::RwLock<()>,
    /// Holders that were empty when they were looked at last.
    empty_holders: Mutex<BTreeSet<VmId>>,
}

/// What an error may come of: a view that is some seconds old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dated {
    /// Where storages and VMs are.
    Region,
    /// A VM: it is another one now, or elsewhere.
    Vm(VmId),
}

/// A region that is not configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "region `{region}` is not configured; hint: add it to the clusters of the config file (known: {known})"
)]
pub struct UnknownRegion {
    /// The region.
    pub region: Region,
    /// Those that are configured.
    pub known: String,
}

impl Volumes {
    /// The volumes of these regions, for the nodes of this cluster.
    pub fn new(clients: Vec<Client>, cluster: Arc<dyn Cluster>, settings: Settings) -> Self {
        let regions = clients.into_iter().map(|client| {
            let region = client.region().clone();
            let state = RegionState {
                client,
                permissions: tokio::sync::Mutex::default(),
                inventory: inventory::Inventory::default(),
                poll: poll::Poll::default(),
                sweeps: sweep::Sweeps::default(),
                growing: tokio::sync::RwLock::default(),
                empty_holders: Mutex::default(),
            };
            (region, state)
        });
        Self {
            inner: Arc::new(Inner {
                regions: regions.collect(),
                cluster,
                settings,
                queue: vmqueue::VmQueue::default(),
                doubtful: Mutex::default(),
                attributes: Mutex::default(),
                kept: Mutex::default(),
                deleted: Mutex::default(),
            }),
        }
    }

    /// The configured regions.
    pub fn regions(&self) -> impl Iterator<Item = &Region> {
        self.inner.regions.keys()
    }

    /// The cluster that the nodes belong to, and that is told what somebody should know.
    pub fn cluster(&self) -> &dyn Cluster {
        &*self.inner.cluster
    }

    /// Who the driver is in a region: the id of its token, or its user.
    pub async fn who(&self, region: &Region) -> String {
        match self.client(region) {
            Ok(client) => client.who().await,
            Err(_) => String::new(),
        }
    }

    /// Looks anew at what an operation went by that was refused. Whether that may help.
    async fn look_again(&self, region: &Region, dated: Option<Dated>) -> bool {
        let (Some(dated), Some(state)) = (dated, self.inner.regions.get(region)) else { return false };
        tracing::debug!(%region, ?dated, "looking again at what may have changed");
        if state.poll.fresh(&state.client).await.is_err() {
            return false;
        }
        match dated {
            Dated::Region => true,
            Dated::Vm(vmid) => state.sweeps.again(state, vmid).await.is_ok(),
        }
    }

    fn client(&self, region: &Region) -> Result<&Client, UnknownRegion> {
        self.region(region).map(|state| &state.client)
    }

    fn region(&self, region: &Region) -> Result<&RegionState, UnknownRegion> {
        self.inner.regions.get(region).ok_or_else(|| UnknownRegion {
            region: region.clone(),
            known: self.regions().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        })
    }
}

impl RegionState {
    /// Where the token may not see VMs; `None` where it sees them all. A listing that lacks a VM proves something only then.
    ///
    /// One gap can't be seen: Proxmox leaves a path on which the token has no privilege at all out of its answer (pve-access-control
    /// `RPCEnvironment.pm:get_effective_permissions`). The README tells not to give the token `NoAccess` on single VMs or pools.
    ///
    /// Asked anew, behind the listing: a privilege that was taken away since it was looked at last makes VMs vanish from it.
    async fn hidden_vms(&self) -> Result<Option<String>, ApiError> {
        let permissions = self.permissions_now().await?;
        let mut gaps: Vec<&str> = permissions.gaps_below("/vms", "VM.Audit").collect();
        if !permissions.allow_below("/vms", "VM.Audit") {
            gaps.insert(0, "/vms");
        }
        Ok((!gaps.is_empty()).then(|| format!("it lacks on {}", gaps.join(", "))))
    }

    /// What the token may do, at most a minute old.
    async fn permissions(&self) -> Result<Permissions, ApiError> {
        let mut cached = self.permissions.lock().await;
        if let Some((read, permissions)) = &*cached
            && read.elapsed() < PERMISSIONS_AGE
        {
            return Ok(permissions.clone());
        }
        self.read_permissions(&mut cached).await
    }

    /// What the token may do now: for a proof by what a listing lacks, to be asked behind the listing.
    async fn permissions_now(&self) -> Result<Permissions, ApiError> {
        self.read_permissions(&mut *self.permissions.lock().await).await
    }

    async fn read_permissions(
        &self,
        cached: &mut Option<(Instant, Permissions)>,
    ) -> Result<Permissions, ApiError> {
        let permissions = self.client.permissions().await?;
        *cached = Some((Instant::now(), permissions.clone()));
        Ok(permissions)
    }
}

/// What the locks guard is changed by single calls, so that a panic can't leave it half changed.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
