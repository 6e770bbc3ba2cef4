//! Nodes whose VMs were not found: asked for once more, watched, and deleted only when all is proven.
//!
//! A VM is gone when no region lists its uuid and its VMID is free, seen twice with a minute between; every region answers and is
//! quorate, the token sees every VM of it, and the second time each of its servers is asked for itself. Read
//! [`Reconciler::judge_missing`].

use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use tokio::time::Instant;

use super::{
    instances::{Located, Regions, node_uuids},
    lifecycle::{Evidence, Fate, Oracle, fate, most_at_once},
    provider_id::is_cluster_api,
    reconcile::{Reconciler, uid},
    sight::{Sight, hidden_vmid},
    witnesses::DEADLINE,
};
use crate::{
    k8s::{
        chain,
        events::Notice,
        node::{self, is_ready},
    },
    types::{Region, VmId},
};

/// What counts as at once.
const AT_ONCE: Duration = Duration::from_mins(10);

impl Reconciler {
    /// Judges the Nodes whose VMs were not found; `managed` is how many Nodes there are in all.
    pub(super) async fn judge_missing(
        &mut self,
        missing: Vec<(&Node, Located)>,
        regions: &Regions,
        managed: usize,
    ) {
        let now = Instant::now();
        self.deletions.retain(|at| now.duration_since(*at) < AT_ONCE);
        let polls = self.regions.iter().map(|handle| handle.polled.borrow().good_at);
        // The oldest of the last good polls: what is gone in all of them was gone then.
        let Some(Some(seen_at)) = polls.min() else { return };
        let quorate = regions.values().all(|facts| facts.quorate);
        let blind = regions.iter().find(|(_, facts)| !facts.sight.is_whole());
        let blind = blind.map(|(region, facts)| format!("in region `{region}` {}", facts.sight.missing()));

        let (mut proven, mut suspects) = (Vec::new(), 0);
        for (node, located) in missing {
            let gone_since = self.memory.entry(uid(node)).or_default().gone_since;
            let seen_gone_for = gone_since.map_or(Duration::ZERO, |at| seen_at.saturating_duration_since(at));
            let mut evidence = Evidence {
                ready: is_ready(node),
                leave_to_cluster_api: is_cluster_api(node, &[]) && !self.settings.delete_cluster_api,
                deletion_is_off: !self.settings.delete_nodes,
                oracle: Oracle::NotAsked,
                blind: blind.clone(),
                quorate,
                seen_gone_for: (seen_gone_for, self.settings.gone_for),
            };
            let mut found = fate(&located, &evidence);
            if found == Fate::Ask
                && let Located::Absent { recorded: Some((region, vmid)) } = &located
                && let Some(oracle) = self.remembered_oracle(node, region, *vmid, now).await
            {
                evidence.oracle = oracle;
                found = fate(&located, &evidence);
            }
            let memory = self.memory.entry(uid(node)).or_default();
            match found {
                Fate::Keep | Fate::Ask => memory.gone_since = None,
                Fate::Refuse(reason, why) => {
                    memory.gone_since = None;
                    self.refuse(node, "not_proven_gone", Notice::warning(reason, why)).await;
                }
                Fate::Wait => {
                    memory.gone_since.get_or_insert(seen_at);
                    suspects += 1;
                }
                Fate::Delete => {
                    suspects += 1;
                    proven.push((node, located));
                }
            }
        }
        if proven.is_empty() {
            return;
        }
        let most = most_at_once(managed + self.deletions.len());
        if suspects + self.deletions.len() > most {
            let text = format!(
                "its VM is gone, but so are those of more than {most} nodes at once: none is deleted before somebody has looked; hint: delete the Nodes by hand if that is right"
            );
            for (node, _) in proven {
                self.refuse(node, "too_many_at_once", Notice::warning("DeletionHalted", text.clone())).await;
            }
            return;
        }
        let looked = join_all(regions.keys().map(|region| self.look_again(region, regions))).await;
        let objection = looked.into_iter().find_map(Result::err);
        for (node, located) in proven {
            let objection = match &objection {
                Some(why) => Err(why.clone()),
                None => self.confirm(node, &located, regions).await,
            };
            match objection {
                Ok(()) => self.delete(node).await,
                Err(why) => {
                    let text = format!("its VM seems gone, but {why}");
                    self.refuse(node, "not_confirmed", Notice::warning("NotDeleted", text)).await;
                }
            }
        }
    }

    async fn delete(&mut self, node: &Node) {
        self.say(node, Notice::normal("DeletingNode", "its VM is proven gone")).await;
        if self.writer.delete(node).await {
            tracing::info!(node = node.name_any(), "deleted the Node of a VM that is gone");
            self.deletions.push(Instant::now());
        }
    }

    /// Whether the region's servers still say what was concluded from: the second look, by each of them. An error is why it proves nothing.
    async fn look_again(&self, region: &Region, regions: &Regions) -> Result<(), String> {
        let facts = regions.get(region).ok_or("a region is not known")?;
        let handle = self.handle(region).ok_or("a region is not known")?;
        let listings = self.listings(region).await?;
        for listing in &listings {
            let known = |vmid: &VmId| facts.vms.get(vmid).is_some_and(|vm| vm.identity.is_some());
            let news = listing.vms.iter().filter(|row| !row.template).find(|row| !known(&row.vmid));
            if let Some(row) = news {
                return Err(format!("VM {} of region `{region}` has just appeared", row.vmid));
            }
        }
        // After the listings: what exists by now and is hidden was hidden by what is asked for here.
        match tokio::time::timeout(DEADLINE, Sight::of(&handle.client)).await {
            Ok(Sight::Whole) => {}
            Ok(other) => return Err(format!("in region `{region}` {}", other.missing())),
            Err(_) => return Err(format!("region `{region}` did not tell its privileges in time")),
        }
        for listing in &listings {
            match tokio::time::timeout(DEADLINE, hidden_vmid(&handle.client, listing)).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(vmid))) => {
                    return Err(format!(
                        "VM {vmid} of region `{region}` exists and the token does not see it; hint: it has no access there"
                    ));
                }
                Ok(Err(error)) => {
                    return Err(format!("region `{region}` did not tell its VMIDs: {}", chain(&error)));
                }
                Err(_) => return Err(format!("region `{region}` did not tell its VMIDs in time")),
            }
        }
        Ok(())
    }

    /// Whether the VM of a node is gone by the word of every server of its region.
    async fn confirm(&self, node: &Node, located: &Located, regions: &Regions) -> Result<(), String> {
        match located {
            Located::Absent { recorded: Some((region, vmid)) } => match self.oracle(region, *vmid).await {
                Oracle::Free => self.no_place_is_left(node, regions).await,
                Oracle::Exists => Err(format!("VM {vmid} of region `{region}` exists")),
                Oracle::NotAsked | Oracle::Silent => {
                    Err(format!("region `{region}` could not be asked for certain whether VM {vmid} exists"))
                }
            },
            Located::Replaced { region, vmid } => {
                let place =
                    regions.get(region).and_then(|facts| facts.vms.get(vmid)).zip(self.handle(region));
                let (vm, handle) = place.ok_or("its VM has just gone, too")?;
                let reading = handle.client.vm_config(&vm.host, *vmid);
                match tokio::time::timeout(DEADLINE, reading).await {
                    Ok(Ok(config)) if config.uuid().is_none_or(|uuid| !node_uuids(node).contains(&uuid)) => {
                        Ok(())
                    }
                    Ok(Ok(_)) => Err(format!("VM {vmid} of region `{region}` is the node's again")),
                    Ok(Err(error)) => Err(chain(&error)),
                    Err(_) => Err(format!("the config of VM {vmid} was not told in time")),
                }
            }
            _ => Err("nothing proves it".to_owned()),
        }
    }

    /// Whether nothing is where VMs of the node's uuid were ever seen, but what is seen and is another VM.
    async fn no_place_is_left(&self, node: &Node, regions: &Regions) -> Result<(), String> {
        let mut places = self.memory.get(&uid(node)).map(|memory| memory.places.clone()).unwrap_or_default();
        places.extend(node::region(node).zip(node::annotated_vmid(node)));
        for (region, vmid) in places {
            let Some(facts) = regions.get(&region) else { continue };
            if facts.vms.contains_key(&vmid) {
                continue;
            }
            if self.oracle(&region, vmid).await != Oracle::Free {
                return Err(format!(
                    "VM {vmid} of region `{region}`, which had its uuid, may exist where the token does not see it; hint: give it VM.Audit on /vms/{vmid}"
                ));
            }
        }
        Ok(())
    }

    /// The oracle, by an answer not too old; `None` where there were enough questions for now.
    pub(super) async fn remembered_oracle(
        &mut self,
        node: &Node,
        region: &Region,
        vmid: VmId,
        now: Instant,
    ) -> Option<Oracle> {
        let known = self.memory.get(&uid(node)).and_then(|memory| memory.oracle);
        if let Some((at, place, answer)) = known
            && place == vmid
            && now.duration_since(at) < super::witnesses::REMEMBERED
        {
            return Some(answer);
        }
        self.questions = self.questions.checked_sub(1)?;
        let answer = self.oracle(region, vmid).await;
        self.memory.entry(uid(node)).or_default().oracle = Some((now, vmid, answer));
        Some(answer)
    }
}
