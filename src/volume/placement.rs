//! Where a node's VM runs and where a volume lives.

use std::sync::Arc;

use futures_util::{StreamExt as _, stream};
use uuid::Uuid;

use super::{Dated, UnknownRegion, Volumes};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, StorageRow},
    },
    types::{
        NodeName, Region, StorageId, VmId, VolId, VolumeHandle, Wwn,
        cluster::{LookupError, NodeRecord},
    },
};

/// Requests of one sweep that are under way at once.
pub(super) const SWEEP_WIDTH: usize = 4;

/// A VM that is known to be a node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The name of the node.
    pub node_name: String,
    /// The Proxmox cluster.
    pub region: Region,
    /// The VM.
    pub vmid: VmId,
    /// The uuid that makes it the VM it is; `None` for a VM that has none, which is then not known by more than its VMID.
    pub uuid: Option<Uuid>,
    /// The PVE node its config is on.
    pub node: NodeName,
}

impl PlaceError {
    /// What it may come of.
    pub(super) fn dated(&self) -> Option<Dated> {
        matches!(self, Self::NoSuchStorage { .. } | Self::Inactive { .. }).then_some(Dated::Region)
    }
}

/// The VM of a node can't be told.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// Who the node is can't be looked up.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// No such node.
    #[error("node `{node_id}` is not known")]
    NoSuchNode {
        /// The CSI node id.
        node_id: String,
    },
    /// Its region is not configured.
    #[error("node `{node_id}` can not be served")]
    Region {
        /// The CSI node id.
        node_id: String,
        /// Why.
        #[source]
        source: UnknownRegion,
    },
    /// Proxmox could not be asked.
    #[error("cannot find the VM of node `{node_id}`")]
    Api {
        /// The CSI node id.
        node_id: String,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// No VM has the node's uuid, and the token sees every VM.
    #[error("no VM in region `{region}` has the SMBIOS uuid {uuid} of node `{node_id}`")]
    NoSuchVm {
        /// The CSI node id.
        node_id: String,
        /// The region.
        region: Region,
        /// The uuid.
        uuid: Uuid,
    },
    /// No VM that the token sees has the node's uuid, but the token does not see every VM.
    #[error(
        "no VM that the token may see has the SMBIOS uuid {uuid} of node `{node_id}`; hint: grant VM.Audit on /vms ({gaps})"
    )]
    Hidden {
        /// The CSI node id.
        node_id: String,
        /// The uuid.
        uuid: Uuid,
        /// The paths where the privilege lacks.
        gaps: String,
    },
    /// No VM has the node's uuid, but the server that was asked may be cut off from its cluster: a VM that came since is not known there.
    #[error(
        "no VM in region `{region}` has the SMBIOS uuid {uuid} of node `{node_id}`, as far as the server that answered knows: {sight}; hint: bring the others back, or look with `pvecm status` why it is cut off"
    )]
    CutOff {
        /// The CSI node id.
        node_id: String,
        /// The region.
        region: Region,
        /// The uuid.
        uuid: Uuid,
        /// How much of the cluster it sees.
        sight: String,
    },
    /// Several VMs have the node's uuid.
    #[error(
        "VMs {vmids} both have the SMBIOS uuid {uuid} of node `{node_id}`; hint: give the copy a uuid of its own (`qm set VMID --smbios1 uuid=…`)"
    )]
    Ambiguous {
        /// The CSI node id.
        node_id: String,
        /// The VMs.
        vmids: String,
        /// The uuid.
        uuid: Uuid,
    },
}

/// A volume as it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The Proxmox cluster.
    pub region: Region,
    /// The volid.
    pub volid: VolId,
    /// The PVE node of a volume on a local storage; `None` on a shared one, whatever the handle says.
    pub zone: Option<NodeName>,
    /// A node through which the volume can be reached.
    pub host: NodeName,
    /// The storage plugin.
    pub plugin: String,
}

impl Place {
    /// The name that its disk answers with.
    pub fn wwn(&self) -> Wwn {
        Wwn::of_volume(&self.region, self.zone.as_ref(), &self.volid)
    }

    /// The key under which operations on the volume exclude each other, equal for every form of its handle.
    pub fn key(&self) -> String {
        format!("{}/{}/{}", self.region, self.zone.as_ref().map_or("", NodeName::as_str), self.volid)
    }
}

/// A volume can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Its region is not configured.
    #[error("volume `{handle}` can not be served")]
    Region {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: UnknownRegion,
    },
    /// Proxmox could not be asked.
    #[error("cannot find the storage of volume `{handle}`")]
    Api {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The token sees no such storage.
    #[error(
        "the token sees no storage `{storage}` {wherever}; hint: check the name, and Datastore.Audit on /storage/{storage} (seen: {seen})"
    )]
    NoSuchStorage {
        /// The storage.
        storage: StorageId,
        /// In which region and on which node it was looked for.
        wherever: String,
        /// The storages the token sees there.
        seen: String,
    },
    /// The handle names no node, but the storage is local.
    #[error("volume `{handle}` names no zone, but storage `{}` is local to each node", handle.storage())]
    NoZone {
        /// The handle.
        handle: VolumeHandle,
    },
    /// No node that has the storage is online with it.
    #[error(
        "storage `{storage}` is not available on {nodes}; hint: check it with `pvesm status --storage {storage}` there"
    )]
    Inactive {
        /// The storage.
        storage: StorageId,
        /// The nodes.
        nodes: String,
    },
}

impl Volumes {
    /// The VM of a node, found by what is known of the region's VMs, by its recorded VMID or by its uuid. Whether the VM has the uuid is
    /// checked again whenever it is read.
    pub(super) async fn locate(&self, node_id: &str) -> Result<(Machine, Arc<Resources>), LocateError> {
        let record = self.inner.cluster.node(node_id).await?;
        let record = record.ok_or_else(|| LocateError::NoSuchNode { node_id: node_id.to_owned() })?;
        self.locate_record(node_id, &record).await
    }

    async fn locate_record(
        &self,
        node_id: &str,
        record: &NodeRecord,
    ) -> Result<(Machine, Arc<Resources>), LocateError> {
        let api = |source| LocateError::Api { node_id: node_id.to_owned(), source };
        let state = self
            .region(&record.region)
            .map_err(|source| LocateError::Region { node_id: node_id.to_owned(), source })?;
        let known = state.sweeps.index.with_uuid(record.uuid);
        if let [(vmid, _)] = known.as_slice() {
            let resources = state.poll.recent(&state.client).await.map_err(api)?;
            if let Some(row) = resources.vm(*vmid) {
                return Ok((machine(record, *vmid, row.node.clone()), resources));
            }
        }
        let resources = state.poll.fresh(&state.client).await.map_err(api)?;
        if let Some(vmid) = record.vmid
            && let Some(row) = resources.vm(vmid)
        {
            let config = state.client.vm_config(&row.node, vmid).await.map_err(api)?;
            if config.uuid() == Some(record.uuid) {
                return Ok((machine(record, vmid, row.node.clone()), resources));
            }
        }

        let found = find_by_uuid(&state.client, &resources, record.uuid).await.map_err(api)?;
        match found.as_slice() {
            [(vmid, node)] => Ok((machine(record, *vmid, node.clone()), resources)),
            [] => {
                let gaps = state.hidden_vms().await.map_err(api)?;
                Err(match gaps {
                    Some(gaps) => {
                        LocateError::Hidden { node_id: node_id.to_owned(), uuid: record.uuid, gaps }
                    }
                    None if !resources.is_quorate() => LocateError::CutOff {
                        node_id: node_id.to_owned(),
                        region: record.region.clone(),
                        uuid: record.uuid,
                        sight: resources.sight(),
                    },
                    None => LocateError::NoSuchVm {
                        node_id: node_id.to_owned(),
                        region: record.region.clone(),
                        uuid: record.uuid,
                    },
                })
            }
            several => Err(LocateError::Ambiguous {
                node_id: node_id.to_owned(),
                vmids: several.iter().map(|(vmid, _)| vmid.to_string()).collect::<Vec<_>>().join(" and "),
                uuid: record.uuid,
            }),
        }
    }

    /// Where a volume is, from what is seen of its storage.
    pub(super) async fn place(&self, handle: &VolumeHandle) -> Result<(Place, Arc<Resources>), PlaceError> {
        let state = self
            .region(&handle.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let api = |source| PlaceError::Api { handle: handle.clone(), source };
        let resources = state.poll.recent(&state.client).await.map_err(api)?;
        if let Ok(place) = place(handle, &resources, None) {
            return Ok((place, resources));
        }
        // A storage that came or came back just now.
        let resources = state.poll.fresh(&state.client).await.map_err(api)?;
        Ok((place(handle, &resources, None)?, resources))
    }
}

fn machine(record: &NodeRecord, vmid: VmId, node: NodeName) -> Machine {
    Machine {
        node_name: record.name.clone(),
        region: record.region.clone(),
        vmid,
        uuid: Some(record.uuid),
        node,
    }
}

/// Where a volume is. `near` is a node through which it is best reached, where it has the storage.
pub(super) fn place(
    handle: &VolumeHandle,
    resources: &Resources,
    near: Option<&NodeName>,
) -> Result<Place, PlaceError> {
    let rows: Vec<&StorageRow> = resources.storage(handle.storage()).collect();
    let no_such_storage = |node: Option<&NodeName>| PlaceError::NoSuchStorage {
        storage: handle.storage().clone(),
        wherever: match node {
            Some(node) => format!("on node `{node}` of region `{}`", handle.region),
            None => format!("in region `{}`", handle.region),
        },
        seen: storages_seen(resources),
    };
    let Some(first) = rows.first() else { return Err(no_such_storage(handle.zone.as_ref())) };
    let inactive = |rows: &[&StorageRow]| PlaceError::Inactive {
        storage: handle.storage().clone(),
        nodes: rows.iter().map(|row| format!("`{}`", row.node)).collect::<Vec<_>>().join(", "),
    };
    let usable = |row: &&StorageRow| row.available && resources.is_online(&row.node);

    let (zone, row) = if first.shared {
        let preferred = rows.iter().copied().filter(usable).find(|row| Some(&row.node) == near);
        let any = || rows.iter().copied().find(usable);
        (None, preferred.or_else(any).ok_or_else(|| inactive(&rows))?)
    } else {
        // A replicated volume is where the placeholder is under whose VMID it was made, and moves with it.
        let owner = || Some(&resources.vm(handle.name().owner()?)?.node);
        let zone = handle.zone.as_ref().or_else(owner);
        let zone = zone.ok_or_else(|| PlaceError::NoZone { handle: handle.clone() })?;
        let row = rows.iter().copied().find(|row| row.node == *zone);
        let row = row.ok_or_else(|| no_such_storage(Some(zone)))?;
        (Some(zone.clone()), Some(row).filter(usable).ok_or_else(|| inactive(&[row]))?)
    };
    Ok(Place {
        region: handle.region.clone(),
        volid: handle.volid.clone(),
        zone,
        host: row.node.clone(),
        plugin: row.plugin.clone(),
    })
}

/// The storages a token sees, for a message.
pub(super) fn storages_seen(resources: &Resources) -> String {
    let mut names: Vec<&str> = resources.storages.iter().map(|row| row.storage.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The VMs that have this uuid. A VM whose config can't be read makes the search fail: it may be the one.
async fn find_by_uuid(
    client: &Client,
    resources: &Resources,
    uuid: Uuid,
) -> Result<Vec<(VmId, NodeName)>, ApiError> {
    let mut configs = stream::iter(resources.vms.clone())
        .map(|row| async move { (client.vm_config(&row.node, row.vmid).await, row) })
        .buffered(SWEEP_WIDTH);
    let mut found = Vec::new();
    let mut unreadable = None;
    while let Some((config, row)) = configs.next().await {
        match config {
            Ok(config) if config.uuid() == Some(uuid) => found.push((row.vmid, row.node)),
            Ok(_) => {}
            Err(error) => unreadable = Some(error),
        }
    }
    match unreadable {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}
