//! What is there: one look at each region, and at Kubernetes where there is one.
//!
//! [`look`] reads and concludes nothing. What could not be read stays in the view as the reason why, so that nobody takes it for empty.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    sync::Arc,
};

use futures_util::{StreamExt as _, future::join_all, stream};

use super::server::{self, Server, ServerView};
use crate::{
    k8s::inventory::Inventory,
    pve::{
        ApiError, Client,
        access::Permissions,
        audit::AclRow,
        cluster::{Resources, VmRow},
        inventory::{ContentRow, StorageConfig},
        qemu::{VmConfig, VmStatus},
        storage::StorageStatus,
    },
    telemetry::log::chain,
    types::{NodeName, Region, StorageId, VmId, VolumeHandle, cluster::NodeRecord},
};

/// VMs that are read at once.
const WIDTH: usize = 4;

/// Tells a person who waits what is being looked at.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(&str) + Send + Sync>);

impl Progress {
    /// Tells `say`.
    pub fn new(say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(say))
    }

    /// Tells nobody.
    pub fn silent() -> Self {
        Self::new(|_| {})
    }

    pub(super) fn say(&self, what: &str) {
        (self.0)(what);
    }
}

/// What the driver is set to, as far as it matters here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of the driver in Kubernetes.
    pub driver: String,
    /// The owner of new volumes.
    pub owner: VmId,
    /// The VMIDs of short-lived VMs.
    pub holders: RangeInclusive<u32>,
}

impl Settings {
    /// Whether a VM looks like a short-lived one of the driver.
    pub fn is_holder(&self, vmid: VmId, name: Option<&str>) -> bool {
        self.holders.contains(&vmid.get()) && name == Some(crate::volume::holder::NAME)
    }
}

/// A region as it is reached.
pub struct Source {
    /// Over all of its servers.
    pub client: Client,
    /// Over each of its servers alone.
    pub servers: Vec<Server>,
    /// Who the driver is there: `user@realm!name` of a token, or `user@realm`.
    pub who: String,
}

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Whether servers, certificates and the token are tried one by one.
    pub servers: bool,
    /// Whether storages are listed, which is slow.
    pub listings: bool,
}

/// All that was read.
pub struct View {
    /// What the driver is set to.
    pub settings: Settings,
    /// The regions.
    pub regions: Vec<RegionView>,
    /// Kubernetes, where it was asked.
    pub cluster: Option<Inventory>,
    /// The nodes that are known, from Kubernetes or from a file.
    pub nodes: Vec<NodeRecord>,
}

/// A region.
pub struct RegionView {
    /// Its name.
    pub region: Region,
    /// Who the driver is there: `user@realm!name` of a token, or `user@realm`.
    pub who: String,
    /// Its servers, one by one, where they were tried.
    pub servers: Vec<ServerView>,
    /// What the token may do.
    pub permissions: Result<Permissions, String>,
    /// Nodes, VMs and storages.
    pub resources: Result<Resources, String>,
    /// Storages as they are configured.
    pub storages: Result<Vec<StorageConfig>, String>,
    /// The access control list, as far as the token may see it.
    pub acl: Vec<AclRow>,
    /// The roles in it, each with its privileges.
    pub roles: BTreeMap<String, Vec<String>>,
    /// Whether a VM has the owner's VMID, also one that the token does not see.
    pub owner_exists: Result<bool, String>,
    /// The VMs.
    pub vms: BTreeMap<VmId, SeenVm>,
    /// The used storages on the nodes that are online and have them, where they were asked.
    pub states: Vec<(StorageId, NodeName, Result<StorageStatus, String>)>,
    /// What lies on the storages, where they were listed.
    pub listings: Vec<Listing>,
}

/// A VM.
pub struct SeenVm {
    /// Its row among all VMs.
    pub row: VmRow,
    /// What it is, or why that is not known.
    pub seen: Result<VmFacts, String>,
}

/// What a VM is.
pub struct VmFacts {
    /// Its config.
    pub config: VmConfig,
    /// What its QEMU says.
    pub status: VmStatus,
    /// Volids in the configs of its snapshots, each with the snapshot.
    pub snapshots: BTreeSet<(String, String)>,
}

/// What lies on a storage.
pub struct Listing {
    /// The storage.
    pub storage: StorageId,
    /// The node of a local storage; `None` for a shared one.
    pub zone: Option<NodeName>,
    /// The images, or why they could not be listed.
    pub images: Result<Vec<ContentRow>, String>,
}

impl RegionView {
    /// The region as text, under which its findings stand.
    pub fn area(&self) -> String {
        format!("region {}", self.region)
    }

    /// Whether every VM of the region was read.
    pub fn is_whole(&self) -> bool {
        self.resources.is_ok() && self.vms.values().all(|vm| vm.seen.is_ok())
    }

    /// Whether a storage is shared: `None` where the token sees no such storage.
    pub fn is_shared(&self, storage: &StorageId) -> Option<bool> {
        self.resources.as_ref().ok()?.storage(storage).next().map(|row| row.shared)
    }

    /// The zone that tells a volume from others of its volid: none on a shared storage, whatever its handle says.
    pub fn zone_of(&self, handle: &VolumeHandle) -> Option<NodeName> {
        if self.is_shared(handle.storage()) == Some(true) {
            return None;
        }
        // A replicated volume is where its placeholder is, and moves with it.
        let owner = || Some(self.vms.get(&handle.name().owner()?)?.row.node.clone());
        handle.zone.clone().or_else(owner)
    }
}

impl View {
    /// The region of this name.
    pub fn region(&self, region: &Region) -> Option<&RegionView> {
        self.regions.iter().find(|view| view.region == *region)
    }

    /// Whether everything was read that says who holds what: else nothing is said to be in order.
    pub fn is_whole(&self) -> bool {
        let regions = self.regions.iter().all(RegionView::is_whole);
        let cluster = |cluster: &Inventory| {
            cluster.volumes.is_ok() && cluster.attachments.is_ok() && cluster.nodes.is_ok()
        };
        regions && self.cluster.as_ref().is_none_or(cluster)
    }

    /// Whether the PVs of the cluster are known, so that a volume without one is told from one whose PV was not seen.
    pub fn knows_volumes(&self) -> bool {
        self.cluster.as_ref().is_some_and(|cluster| cluster.volumes.is_ok())
    }

    /// The node whose VM this is: whose uuid it has.
    pub fn node_of(&self, region: &Region, config: &VmConfig) -> Option<&NodeRecord> {
        let uuid = config.uuid()?;
        self.nodes.iter().find(|node| node.region == *region && node.uuid == uuid)
    }

    /// The VMs of a region that have the uuid of a node.
    pub fn vms_of<'a>(
        &'a self,
        node: &'a NodeRecord,
    ) -> impl Iterator<Item = (VmId, &'a SeenVm, &'a VmFacts)> {
        let vms = self.region(&node.region).map(|view| &view.vms);
        vms.into_iter().flatten().filter_map(|(vmid, vm)| {
            let facts = vm.seen.as_ref().ok()?;
            (facts.config.uuid() == Some(node.uuid)).then_some((*vmid, vm, facts))
        })
    }

    /// The storages of a region that the driver uses or is to use: those of StorageClasses, PVs and attached volumes. Without
    /// Kubernetes every storage that takes images.
    pub fn used_storages(&self, region: &RegionView) -> BTreeSet<StorageId> {
        used_storages(&self.settings, region, self.cluster.as_ref())
    }
}

fn used_storages(
    settings: &Settings,
    region: &RegionView,
    cluster: Option<&Inventory>,
) -> BTreeSet<StorageId> {
    let mut used = BTreeSet::new();
    if let Some(cluster) = cluster {
        let classes = cluster.classes.iter().flatten();
        used.extend(classes.filter_map(|class| class.parameters.get("storage")?.parse().ok()));
        let handles =
            cluster.volumes.iter().flatten().filter_map(|pv| pv.handle.parse::<VolumeHandle>().ok());
        used.extend(
            handles.filter(|handle| handle.region == region.region).map(|handle| handle.volid.storage),
        );
    } else {
        let storages = region.storages.iter().flatten().filter(|storage| storage.takes_images());
        used.extend(storages.map(|storage| storage.storage.clone()));
    }
    for vm in region.vms.values() {
        let Ok(facts) = &vm.seen else { continue };
        let volids = facts.config.volumes().filter_map(|held| held.volid.parse::<crate::types::VolId>().ok());
        used.extend(volids.filter(|v| v.name.owner() == Some(settings.owner)).map(|v| v.storage));
    }
    used
}

/// Looks at every region.
pub async fn look(
    settings: Settings,
    sources: &[Source],
    cluster: Option<Inventory>,
    nodes: Vec<NodeRecord>,
    depth: Depth,
    progress: &Progress,
) -> View {
    let mut regions = Vec::new();
    for source in sources {
        let mut region = look_at(&settings, source, depth, progress).await;
        let used = used_storages(&settings, &region, cluster.as_ref());
        if depth.servers {
            region.states = states(source, &region, &used).await;
        }
        if depth.listings {
            region.listings = list(source, &region, &used, progress).await;
        }
        regions.push(region);
    }
    View { settings, regions, cluster, nodes }
}

async fn look_at(settings: &Settings, source: &Source, depth: Depth, progress: &Progress) -> RegionView {
    let client = &source.client;
    let region = client.region().clone();
    let mut view = RegionView {
        who: source.who.clone(),
        servers: Vec::new(),
        permissions: Err(String::new()),
        resources: Err(String::new()),
        storages: Err(String::new()),
        acl: Vec::new(),
        roles: BTreeMap::new(),
        owner_exists: Err(String::new()),
        vms: BTreeMap::new(),
        states: Vec::new(),
        listings: Vec::new(),
        region,
    };
    if depth.servers {
        progress.say(&format!("asking the servers of region {}", view.region));
        view.servers = join_all(source.servers.iter().map(|one| server::look(one, &source.who))).await;
        // Where no server gives an answer there is nothing more to ask, and a wrong token costs 3 s each time.
        if let Some(why) = view.servers.iter().find_map(|server| server.answer.as_ref().err())
            && view.servers.iter().all(|server| server.answer.is_err())
        {
            let why = why.text.clone();
            view.permissions = Err(why.clone());
            view.resources = Err(why.clone());
            view.storages = Err(why.clone());
            view.owner_exists = Err(why);
            return view;
        }
    }
    progress.say(&format!("reading privileges, storages and VMs of region {}", view.region));
    view.permissions = client.permissions().await.map_err(text);
    view.resources = client.resources().await.map_err(text);
    view.storages = client.storage_configs().await.map_err(text);
    view.owner_exists = client.vmid_exists(settings.owner).await.map_err(text);
    if depth.servers {
        view.acl = client.acl().await.unwrap_or_default();
        let roles: BTreeSet<String> = view.acl.iter().map(|row| row.role.clone()).collect();
        for role in roles {
            let privileges = client.role(&role).await.unwrap_or_default();
            view.roles.insert(role, privileges);
        }
    }
    if let Ok(resources) = &view.resources {
        view.vms = sweep(client, resources, progress).await;
    }
    view
}

/// Reads every VM. A node that is offline is not asked: each question would take half a minute.
async fn sweep(client: &Client, resources: &Resources, progress: &Progress) -> BTreeMap<VmId, SeenVm> {
    let count = resources.vms.len();
    let mut seen = stream::iter(resources.vms.clone())
        .map(|row| async move {
            let facts = if resources.is_online(&row.node) {
                facts(client, &row).await.map_err(text)
            } else {
                Err(format!("its node `{}` is offline", row.node))
            };
            SeenVm { row, seen: facts }
        })
        .buffered(WIDTH);
    let mut vms = BTreeMap::new();
    while let Some(vm) = seen.next().await {
        vms.insert(vm.row.vmid, vm);
        progress.say(&format!("reading VM {} of {count} in region {}", vms.len(), client.region()));
    }
    vms
}

async fn facts(client: &Client, row: &VmRow) -> Result<VmFacts, ApiError> {
    let config = client.vm_config(&row.node, row.vmid).await?;
    let status = client.vm_status(&row.node, row.vmid).await?;
    let mut snapshots = BTreeSet::new();
    for snapshot in client.snapshots(&row.node, row.vmid).await? {
        let volids = client.snapshot_volumes(&row.node, row.vmid, &snapshot).await?;
        snapshots.extend(volids.into_iter().map(|volid| (volid, snapshot.clone())));
    }
    Ok(VmFacts { config, status, snapshots })
}

/// Asks each node for its storages: what a node said of them to the others is minutes old.
async fn states(
    source: &Source,
    view: &RegionView,
    used: &BTreeSet<StorageId>,
) -> Vec<(StorageId, NodeName, Result<StorageStatus, String>)> {
    let Ok(resources) = &view.resources else { return Vec::new() };
    let rows =
        resources.storages.iter().filter(|row| used.contains(&row.storage) && resources.is_online(&row.node));
    let places: Vec<_> = rows.map(|row| (row.storage.clone(), row.node.clone())).collect();
    stream::iter(places)
        .map(|(storage, node)| async move {
            let status = source.client.storage_status(&node, &storage).await.map_err(text);
            (storage, node, status)
        })
        .buffered(WIDTH)
        .collect()
        .await
}

/// Lists the used storages one after the other: a listing keeps one of a node's few workers busy.
async fn list(
    source: &Source,
    view: &RegionView,
    used: &BTreeSet<StorageId>,
    progress: &Progress,
) -> Vec<Listing> {
    let Ok(resources) = &view.resources else { return Vec::new() };
    let mut listings = Vec::new();
    for storage in used {
        let rows: Vec<_> = resources.storage(storage).collect();
        let usable =
            |row: &&&crate::pve::cluster::StorageRow| row.available && resources.is_online(&row.node);
        let shared = rows.first().is_some_and(|row| row.shared);
        let places = if shared {
            rows.iter().filter(usable).take(1).collect()
        } else {
            rows.iter().collect::<Vec<_>>()
        };
        if shared && places.is_empty() {
            let images = Err("it is not available on any node".to_owned());
            listings.push(Listing { storage: storage.clone(), zone: None, images });
        }
        for row in places {
            progress.say(&format!("listing storage {storage} on {} (slow)", row.node));
            let images = if usable(&row) {
                source.client.contents(&row.node, storage, None).await.map_err(text)
            } else {
                Err(format!("it is not available on node `{}`", row.node))
            };
            let zone = (!shared).then(|| row.node.clone());
            listings.push(Listing { storage: storage.clone(), zone, images });
        }
    }
    listings
}

pub(super) fn text(error: ApiError) -> String {
    let shown = chain(&error);
    drop(error);
    shown
}
