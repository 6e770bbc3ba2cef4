//! The whole system in one process: Proxmox, Kubernetes as far as the driver asks it, and two controllers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use futures_util::future::BoxFuture;
use proxmox_csi::{
    sim::{Options, Sim},
    types::{
        Region, VmId,
        attributes::Attributes,
        cluster::{Cluster, LookupError, NodeRecord, RecordError, VolumeRecord},
    },
};

use crate::{ledger::Ledger, process::Election, setup::Setup, support::REGION};

/// Handles to one running system.
#[derive(Clone)]
pub struct Rig(Arc<Inner>);

pub struct Inner {
    pub setup: Setup,
    pub sim: Sim,
    pub kubernetes: Arc<Kubernetes>,
    pub election: Mutex<Election>,
    ledger: Mutex<Ledger>,
}

impl std::ops::Deref for Rig {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Rig {
    /// A system without controllers.
    pub fn new(setup: Setup) -> Self {
        let options = Options::default();
        let sim = Sim::start(setup.world.clone(), options).expect("the world can be made");
        let kubernetes = Arc::new(Kubernetes::default());
        let ledger = Mutex::new(Ledger::new(setup.volumes.len()));
        let rig = Self(Arc::new(Inner { setup, sim, kubernetes, election: Mutex::default(), ledger }));
        for vm in &rig.setup.vms {
            if vm.is_worker {
                rig.register(vm.vmid);
            }
        }
        rig
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("no panic")
    }

    /// The kubelet of a VM registers its node as it is now; a VM that is not there has none.
    pub fn register(&self, vmid: u32) {
        let name = format!("worker-{vmid}");
        let uuid = self.sim.vm(vmid).and_then(|vm| vm.conf.uuid()?.parse().ok());
        let mut nodes = self.kubernetes.nodes.lock().expect("no panic");
        match uuid {
            Some(uuid) => {
                let region: Region = REGION.parse().expect("a region");
                nodes.insert(name.clone(), NodeRecord { name, region, vmid: VmId::new(vmid), uuid });
            }
            None => drop(nodes.remove(&name)),
        }
    }

    /// Whether the VM under this VMID is the one that its node is.
    pub fn is_its_node(&self, vmid: u32) -> bool {
        let nodes = self.kubernetes.nodes.lock().expect("no panic");
        let uuid = self.sim.vm(vmid).and_then(|vm| vm.conf.uuid()?.parse().ok());
        uuid.is_some() && nodes.get(&format!("worker-{vmid}")).map(|node| node.uuid) == uuid
    }
}

/// What the driver is told of the cluster.
#[derive(Default)]
pub struct Kubernetes {
    /// Nodes by name.
    pub nodes: Mutex<BTreeMap<String, NodeRecord>>,
    records: Mutex<BTreeMap<String, VolumeRecord>>,
}

impl Cluster for Kubernetes {
    fn node<'a>(&'a self, node_id: &'a str) -> BoxFuture<'a, Result<Option<NodeRecord>, LookupError>> {
        let found = self.nodes.lock().expect("no panic").get(node_id).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<NodeRecord>, LookupError>> {
        let all = self.nodes.lock().expect("no panic").values().cloned().collect();
        Box::pin(async move { Ok(all) })
    }

    fn volume<'a>(&'a self, handle: &'a str) -> BoxFuture<'a, Result<Option<VolumeRecord>, RecordError>> {
        let found = self.records.lock().expect("no panic").get(handle).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn keep_attributes<'a>(
        &'a self,
        handle: &'a str,
        attributes: &'a Attributes,
    ) -> BoxFuture<'a, Result<(), RecordError>> {
        let mut records = self.records.lock().expect("no panic");
        records.entry(handle.to_owned()).or_default().attributes = attributes.clone();
        Box::pin(async { Ok(()) })
    }
}
