//! What is asked anew before something is taken away: of each server of a region for itself, and of a VM's own host.
//!
//! A server that is cut off from its cluster goes on answering from what it last knew. So an answer counts only from one that sees more
//! than half of the hosts, and where a region has several servers two of them have to agree. Read [`Reconciler::listings`].

use std::time::Duration;

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use tokio::time::Instant;

use super::{
    instances::VmFacts,
    lifecycle::{Oracle, Power},
    reconcile::{Reconciler, RegionHandle},
};
use crate::{
    k8s::chain,
    pve::{Client, cluster::Resources},
    types::{Region, VmId},
};

/// How long any of these questions may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);
/// How long an answer to whether a VMID exists is remembered; before a Node is deleted it is asked again.
pub(super) const REMEMBERED: Duration = Duration::from_mins(5);
/// How long a host that did not answer is not asked again: it would hold up all that come after it.
const SPARED: Duration = Duration::from_secs(30);
/// How many servers have to agree, where there are that many.
const ENOUGH: usize = 2;

impl Reconciler {
    pub(super) fn handle(&self, region: &Region) -> Option<&RegionHandle> {
        self.regions.iter().find(|handle| handle.client.region() == region)
    }

    /// What each server of a region lists now: at least two answers where there are two servers, each of one that is quorate.
    pub(super) async fn listings(&self, region: &Region) -> Result<Vec<Resources>, String> {
        let handle = self.handle(region).ok_or("its region is not known")?;
        let servers = handle.servers();
        let asked: Vec<BoxFuture<'_, _>> =
            servers.iter().map(|server| tokio::time::timeout(DEADLINE, server.resources()).boxed()).collect();
        let mut listings = Vec::new();
        for answer in join_all(asked).await {
            match answer {
                Ok(Ok(listing)) if listing.is_quorate() => listings.push(listing),
                Ok(Ok(_)) => return Err(format!("a server of region `{region}` is not quorate")),
                Ok(Err(error)) => tracing::debug!(%region, error = chain(&error), "a server does not answer"),
                Err(_) => tracing::debug!(%region, "a server does not answer in time"),
            }
        }
        if listings.len() < servers.len().min(ENOUGH) {
            return Err(format!(
                "of the {} servers of region `{region}` only {} answered",
                servers.len(),
                listings.len()
            ));
        }
        Ok(listings)
    }

    /// Whether a VMID exists, by each server of its region.
    pub(super) async fn oracle(&self, region: &Region, vmid: VmId) -> Oracle {
        let Some(handle) = self.handle(region) else { return Oracle::Silent };
        let servers = handle.servers();
        let asked: Vec<BoxFuture<'_, _>> = servers
            .iter()
            .map(|server| tokio::time::timeout(DEADLINE, server.vmid_exists(vmid)).boxed())
            .collect();
        let mut free = 0;
        for answer in join_all(asked).await {
            match answer {
                Ok(Ok(true)) => return Oracle::Exists,
                Ok(Ok(false)) => free += 1,
                Ok(Err(error)) => {
                    tracing::debug!(%region, %vmid, error = chain(&error), "cannot ask for a VMID");
                }
                Err(_) => tracing::debug!(%region, %vmid, "cannot ask for a VMID in time"),
            }
        }
        if free < servers.len().min(ENOUGH) { Oracle::Silent } else { Oracle::Free }
    }

    /// Whether a VM that seems dead is, by what its region says now and, where it is stopped, by its own host.
    pub(super) async fn is_dead_now(&mut self, region: &Region, vm: &VmFacts, power: Power) -> bool {
        let listings = match self.listings(region).await {
            Ok(listings) => listings,
            Err(why) => {
                tracing::info!(%region, vm = %vm.vmid, why, "not given up");
                return false;
            }
        };
        let agree = |listing: &Resources| {
            listing.vm(vm.vmid).is_some_and(|row| {
                let same = row.node == vm.host && row.lock == vm.lock && row.hastate == vm.hastate;
                same && (power == Power::Recovery || row.status == "stopped")
            })
        };
        if !listings.iter().all(agree) {
            return false;
        }
        match power {
            // Its host is dead: the HA manager's word is all there is, and it has the host's lock.
            Power::Recovery => true,
            Power::Off => self.is_stopped_now(region, vm).await,
            _ => false,
        }
    }

    /// Whether the VM's own host says that it is stopped, unlocked and still the same.
    async fn is_stopped_now(&mut self, region: &Region, vm: &VmFacts) -> bool {
        let place = (region.clone(), vm.host.clone());
        let now = Instant::now();
        self.silent_hosts.retain(|_, at| now.duration_since(*at) < SPARED);
        if self.silent_hosts.contains_key(&place) {
            return false;
        }
        let Some(handle) = self.handle(region) else { return false };
        let asked = handle.client.vm_status(&vm.host, vm.vmid);
        let read = handle.client.vm_config(&vm.host, vm.vmid);
        let both = async { tokio::join!(asked, read) };
        match tokio::time::timeout(DEADLINE, both).await {
            Ok((Ok(status), Ok(config))) => {
                let is_it = vm.identity.as_ref().is_some_and(|identity| identity.uuid == config.uuid());
                !status.running && config.lock().is_none() && is_it
            }
            Ok(_) => false,
            Err(_) => {
                self.silent_hosts.insert(place, now);
                false
            }
        }
    }
}

impl RegionHandle {
    /// The region's servers, each by itself; its one client where there is but one server.
    pub(super) fn servers(&self) -> &[Client] {
        if self.servers.is_empty() { std::slice::from_ref(&self.client) } else { &self.servers }
    }
}
