//! The whole of a region in one request.

use std::collections::BTreeSet;

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ApiError,
    client::{Call, Client},
    transport::Answerer,
    wire,
};
use crate::types::{Bytes, NodeName, StorageId, VmId};

/// What `GET /cluster/resources` tells: VMs, storages and nodes that the token may see.
///
/// A VM or storage that is missing here may be hidden from the token: absence is never concluded from this alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    /// QEMU VMs.
    pub vms: Vec<VmRow>,
    /// Storages, one row for each node that has it.
    pub storages: Vec<StorageRow>,
    /// PVE nodes.
    pub nodes: Vec<NodeRow>,
    /// The ids of all guests, containers and templates too.
    pub guests: BTreeSet<VmId>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRow {
    /// Its id.
    pub vmid: VmId,
    /// The PVE node its config is on.
    pub node: NodeName,
    /// Its name; VMs whose node is down may have none.
    pub name: Option<String>,
    /// Whether it runs, as last heard: up to 10 s old, 5 min where the node is down.
    pub running: bool,
    /// `running`, `stopped`, or `unknown` where the node was not heard of for 5 min.
    pub status: String,
    /// What locks it: `migrate`, `backup`, `suspended`, …
    pub lock: Option<String>,
    /// What the HA manager does with it, where it is its resource: `started`, `fence`, `recovery`, …
    /// (pve-ha-manager `Manager.pm`).
    pub hastate: Option<String>,
    /// Whether it is a template, which never runs.
    pub template: bool,
    /// Its virtual processors.
    pub cpus: Option<u64>,
    /// Its memory.
    pub memory: Option<Bytes>,
    /// Seconds since it was started.
    pub uptime: u64,
    /// Its tags.
    pub tags: Vec<String>,
}

/// A storage on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageRow {
    /// The id.
    pub storage: StorageId,
    /// The PVE node.
    pub node: NodeName,
    /// `dir`, `lvmthin`, `zfspool`, `rbd`, …
    pub plugin: String,
    /// Whether every node that has the storage sees the same volumes.
    pub shared: bool,
    /// Whether it is active on the node.
    pub available: bool,
    /// Its size; zero without the privilege to see it.
    pub total: Bytes,
    /// What is used of it.
    pub used: Bytes,
}

impl StorageRow {
    /// What is free.
    pub fn free(&self) -> Bytes {
        Bytes::new(self.total.get().saturating_sub(self.used.get()))
    }
}

/// A PVE node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Its name.
    pub node: NodeName,
    /// Whether it is in the cluster's quorate part.
    pub online: bool,
    /// What the HA manager thinks of it: `online`, `maintenance`, `unknown`, `fence`, `gone`.
    pub hastate: Option<String>,
}

#[derive(Deserialize)]
struct RawRow {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    node: Option<String>,
    #[serde(default)]
    status: Option<String>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    vmid: Option<u64>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    lock: Option<String>,
    #[serde(default)]
    hastate: Option<String>,
    #[serde(default)]
    tags: Option<String>,
    #[serde(default, deserialize_with = "wire::flag")]
    template: bool,
    #[serde(default, deserialize_with = "wire::optional_number")]
    maxcpu: Option<u64>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    maxmem: Option<u64>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    uptime: Option<u64>,
    #[serde(default)]
    storage: Option<String>,
    #[serde(default)]
    plugintype: Option<String>,
    #[serde(default, deserialize_with = "wire::flag")]
    shared: bool,
    #[serde(default, deserialize_with = "wire::optional_number")]
    maxdisk: Option<u64>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    disk: Option<u64>,
}

/// Proxmox separates tags by `;`, and takes `,` and blanks as well.
fn tags(text: &str) -> Vec<String> {
    text.split([';', ',', ' ']).filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
}

impl Resources {
    /// Whether more than half of the region's nodes are online, as the node that answered sees it: what is absent there is then not
    /// just out of its sight. Every token sees the rows of nodes.
    pub fn is_quorate(&self) -> bool {
        self.nodes.iter().filter(|row| row.online).count() * 2 > self.nodes.len()
    }

    /// How many of the nodes are online as the node that answered sees it, in words.
    pub fn sight(&self) -> String {
        let online = self.nodes.iter().filter(|row| row.online).count();
        format!("it sees {online} of {} nodes of its cluster online", self.nodes.len())
    }

    /// The row of a VM.
    pub fn vm(&self, vmid: VmId) -> Option<&VmRow> {
        self.vms.iter().find(|row| row.vmid == vmid)
    }

    /// The rows of a storage, one for each node that has it.
    pub fn storage<'a>(&'a self, storage: &'a StorageId) -> impl Iterator<Item = &'a StorageRow> {
        self.storages.iter().filter(move |row| row.storage == *storage)
    }

    /// Whether a node is online.
    pub fn is_online(&self, node: &NodeName) -> bool {
        self.nodes.iter().any(|row| row.node == *node && row.online)
    }
}

impl Client {
    /// Nodes, VMs and storages of the region. Source: pve-manager `API2/Cluster.pm`, `resources`.
    ///
    /// A server that is cut off from its cluster goes on answering from what it last knew, and can change nothing: where there are
    /// others, those are asked from then on.
    pub async fn resources(&self) -> Result<Resources, ApiError> {
        let answerer = Answerer::default();
        let call = Call::new("resources", Method::GET, &[&"cluster", &"resources"]).noting(&answerer);
        let rows: Vec<RawRow> = self.call(call).await?;
        let mut resources = Resources::default();
        for row in rows {
            let Some(node) = row.node.as_deref().and_then(|node| node.parse::<NodeName>().ok()) else {
                continue;
            };
            let status = row.status.as_deref().unwrap_or_default();
            let vmid = row.vmid.and_then(|id| u32::try_from(id).ok()).and_then(VmId::new);
            resources.guests.extend(vmid);
            match row.kind.as_str() {
                "qemu" => {
                    let Some(vmid) = vmid else { continue };
                    resources.vms.push(VmRow {
                        vmid,
                        node,
                        running: status != "stopped",
                        status: status.to_owned(),
                        name: row.name,
                        lock: row.lock,
                        hastate: row.hastate,
                        template: row.template,
                        cpus: row.maxcpu,
                        memory: row.maxmem.map(Bytes::new),
                        uptime: row.uptime.unwrap_or(0),
                        tags: row.tags.as_deref().map(tags).unwrap_or_default(),
                    });
                }
                "storage" => {
                    let Some(storage) = row.storage.as_deref().and_then(|id| id.parse().ok()) else {
                        continue;
                    };
                    resources.storages.push(StorageRow {
                        storage,
                        node,
                        plugin: row.plugintype.unwrap_or_default(),
                        shared: row.shared,
                        available: status == "available",
                        total: Bytes::new(row.maxdisk.unwrap_or(0)),
                        used: Bytes::new(row.disk.unwrap_or(0)),
                    });
                }
                "node" => {
                    resources.nodes.push(NodeRow { node, online: status == "online", hastate: row.hastate });
                }
                _ => {}
            }
        }
        if !resources.is_quorate() {
            answerer.doubt(&resources.sight());
        }
        Ok(resources)
    }

    /// Whether a VM of this id exists anywhere in the cluster, also one the token may not see.
    /// Source: pve-manager `API2/Cluster.pm`, `nextid`: any user, from the cluster-wide list of VMs.
    pub async fn vmid_exists(&self, vmid: VmId) -> Result<bool, ApiError> {
        let call = Call::new("nextid", Method::GET, &[&"cluster", &"nextid"]).with("vmid", vmid);
        match self.call::<Value>(call).await {
            Ok(_) => Ok(false),
            Err(error) if error.is_already_exists() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The lowest VMID that no guest has, of those that the cluster hands out: all between the lowest it hands out and this one exist,
    /// also those the token may not see. Source: pve-manager `API2/Cluster.pm`, `nextid`: any user.
    pub async fn next_free_vmid(&self) -> Result<VmId, ApiError> {
        let call = Call::new("nextid", Method::GET, &[&"cluster", &"nextid"]);
        let answer: Value = self.call(call).await?;
        // A number, or its text.
        let text = answer.as_str().map_or_else(|| answer.to_string(), str::to_owned);
        let unreadable = |_| ApiError::unreadable("the next free VMID", "it is no VMID");
        text.parse().map_err(unreadable)
    }
}
