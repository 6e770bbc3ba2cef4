//! All Nodes against all VMs, as often as either changes.
//!
//! Level-triggered: every reconcile looks at every Node, tainted or not, and writes only what differs. What needs time to be believed (a
//! VM is stopped, a VM is gone) is remembered by the Node's uid and measured by the polls, not by the clock in between. Read
//! [`Reconciler::reconcile`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::PoisonError,
    time::Duration,
};

use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;
use tokio::{sync::watch, time::Instant};

use super::{
    Settings, addresses,
    instances::{Located, Regions, VmFacts, locate},
    labels,
    lifecycle::{Oracle, Power, power},
    poll::{Polled, Wanted},
    provider_id::{self, Decision, Format},
    taints::{self, Seen},
    writes::Writer,
};
use crate::{
    k8s::{
        self,
        events::{Notice, Recorder},
        node::{ProviderId, is_ready},
    },
    pve::Client,
    telemetry::metrics::Metrics,
    types::{NodeName, Region, VmId},
};

/// How many questions about single VMIDs one reconcile may ask; the others wait for the next one.
const QUESTIONS: u32 = 16;
/// How long a VM that did not turn out dead is not asked about again.
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// A region, and what its poller tells.
pub struct RegionHandle {
    /// Its client, for the questions that are asked before something is taken away.
    pub client: Client,
    /// A client of each of its servers, where there are several.
    pub servers: Vec<Client>,
    /// What the poller tells.
    pub polled: watch::Receiver<Polled>,
    /// What the poller is told to look at.
    pub wanted: Wanted,
}

/// Compares Nodes with VMs.
pub struct Reconciler {
    pub(super) regions: Vec<RegionHandle>,
    pub(super) settings: Settings,
    pub(super) writer: Writer,
    pub(super) recorder: Recorder,
    pub(super) metrics: Metrics,
    pub(super) memory: BTreeMap<String, Memory>,
    pub(super) deletions: Vec<Instant>,
    /// How many questions this reconcile may still ask.
    pub(super) questions: u32,
    /// Hosts that did not answer, and when.
    pub(super) silent_hosts: BTreeMap<(Region, NodeName), Instant>,
}

/// What was seen of a Node before.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What its VM does, and the first poll that said so.
    power: Option<(Power, Instant)>,
    /// When its VM was last asked about and not found dead.
    not_dead_at: Option<Instant>,
    /// The poll that first said that its VM is gone.
    pub(super) gone_since: Option<Instant>,
    /// Where VMs of its uuid were seen: none of them may be there, unseen, when the Node goes.
    pub(super) places: BTreeSet<(Region, VmId)>,
    /// Whether its VMID exists, and when that was asked.
    pub(super) oracle: Option<(Instant, VmId, Oracle)>,
}

/// What of the other VMs and Nodes matters to one.
#[derive(Debug, Clone, Copy)]
struct Settled {
    /// Some node of the cluster has a providerID of the uuid form.
    some_have_uuids: bool,
    /// Other VMs have its uuid.
    has_twins: bool,
}

impl Reconciler {
    /// A reconciler of these regions.
    pub fn new(
        regions: Vec<RegionHandle>,
        settings: Settings,
        writer: Writer,
        recorder: Recorder,
        metrics: Metrics,
    ) -> Self {
        Self {
            regions,
            settings,
            writer,
            recorder,
            metrics,
            memory: BTreeMap::new(),
            deletions: Vec::new(),
            questions: 0,
            silent_hosts: BTreeMap::new(),
        }
    }

    /// Compares these Nodes, which are all there are, with their VMs, and writes what differs.
    pub async fn reconcile(&mut self, nodes: &[Node]) {
        self.metrics.ccm().reconcile();
        self.questions = QUESTIONS;
        let now = Instant::now();
        let polled: BTreeMap<Region, Polled> = self
            .regions
            .iter()
            .map(|handle| (handle.client.region().clone(), handle.polled.borrow().clone()))
            .collect();
        let believed_for = self.settings.believed_for();
        let regions: Regions = polled
            .iter()
            .map(|(region, polled)| {
                let mut facts = polled.facts.clone();
                facts.fresh &= polled.good_at.is_some_and(|at| now.duration_since(at) <= believed_for);
                (region.clone(), facts)
            })
            .collect();
        let living: BTreeSet<String> = nodes.iter().map(uid).collect();
        self.memory.retain(|uid, _| living.contains(uid));
        let has_uuid = |node: &&Node| matches!(ProviderId::of(node), ProviderId::Uuid(_));
        let some_have_uuids = nodes.iter().find(has_uuid).is_some();

        let mut wanted: BTreeMap<Region, BTreeSet<VmId>> = BTreeMap::new();
        let (mut missing, mut managed) = (Vec::new(), 0);
        for node in nodes {
            let located = locate(node, &regions);
            let is_missing = matches!(located, Located::Absent { .. } | Located::Replaced { .. });
            if !is_missing && let Some(memory) = self.memory.get_mut(&uid(node)) {
                memory.gone_since = None;
            }
            managed += usize::from(!matches!(located, Located::NotOurs(_)));
            self.remember_places(node, &located);
            match located {
                Located::Vm { region, vm, twins, recorded_elsewhere } => {
                    wanted.entry(region.clone()).or_default().insert(vm.vmid);
                    self.say_twins(node, &region, &vm, &twins).await;
                    let sure = match &recorded_elsewhere {
                        Some(place) => self.is_not_at(node, place, &regions, now).await,
                        None => true,
                    };
                    if let (true, Some(polled)) = (sure, polled.get(&region)) {
                        self.say_elsewhere(node, &region, &vm, recorded_elsewhere).await;
                        self.say_place(node, &region, &vm, polled).await;
                        let settled = Settled { some_have_uuids, has_twins: !twins.is_empty() };
                        self.alive(node, &region, &vm, polled, settled).await;
                    }
                }
                Located::Twins(places) => self.say_unrecorded_twins(node, &places).await,
                Located::NotOurs(why) => self.say_not_ours(node, &why).await,
                Located::Unknown(why) => self.say_unclear(node, &why).await,
                missed @ (Located::Absent { .. } | Located::Replaced { .. }) => missing.push((node, missed)),
            }
        }
        for handle in &self.regions {
            let vms = wanted.remove(handle.client.region()).unwrap_or_default();
            let mut wanted = handle.wanted.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.vms = vms;
            wanted.in_doubt = !missing.is_empty();
        }
        if !self.settings.labels_only {
            self.judge_missing(missing, &regions, managed).await;
        }
    }

    fn remember_places(&mut self, node: &Node, located: &Located) {
        let memory = self.memory.entry(uid(node)).or_default();
        match located {
            Located::Vm { region, vm, twins, .. } => {
                memory.places.insert((region.clone(), vm.vmid));
                memory.places.extend(twins.iter().cloned());
            }
            Located::Twins(all) => memory.places.extend(all.iter().cloned()),
            _ => {}
        }
    }

    /// Whether a node's VM is certainly not where the node is recorded: that VMID is another VM's, or nobody's. A VM that has the node's
    /// uuid elsewhere may be a copy of one that the token does not see any more.
    async fn is_not_at(
        &mut self,
        node: &Node,
        place: &(Region, VmId),
        regions: &Regions,
        now: Instant,
    ) -> bool {
        let (region, vmid) = place;
        let row = regions.get(region).and_then(|facts| facts.vms.get(vmid));
        if let Some(vm) = row {
            return vm.identity.is_some();
        }
        match self.remembered_oracle(node, region, *vmid, now).await {
            Some(Oracle::Free) => true,
            Some(Oracle::Exists) => {
                let text = format!(
                    "it is recorded as VM {vmid} of region `{region}`, which exists and which the token does not see; another VM has its uuid, and may be a copy: the node is left as it is; hint: give the token VM.Audit on /vms/{vmid}"
                );
                self.refuse(node, "recorded_vm_hidden", Notice::warning("MissingPrivilege", text)).await;
                false
            }
            _ => false,
        }
    }

    /// Brings a node whose VM was found to what it is to be.
    async fn alive(&mut self, node: &Node, region: &Region, vm: &VmFacts, polled: &Polled, settled: Settled) {
        let no_groups = BTreeSet::new();
        let groups = polled.groups.as_ref().map(|groups| groups.get(&vm.host).unwrap_or(&no_groups));
        let desired = match labels::desired(node, region, vm, self.settings.labels, groups) {
            Ok(labels) => labels,
            Err(error) => {
                return self
                    .refuse(node, "zone_unknown", Notice::warning("ZoneUnknown", error.to_string()))
                    .await;
            }
        };
        let uuid = vm.identity.as_ref().and_then(|identity| identity.uuid);
        let decision = match uuid {
            Some(uuid) if !self.settings.labels_only => {
                let format = self.settings.provider_id;
                provider_id::decide(node, &vm.tags, format, settled.some_have_uuids, region, vm.vmid, uuid)
            }
            _ => Decision::Keep,
        };
        let numbered = matches!(ProviderId::of(node), ProviderId::Vm(_, vmid) if vmid == vm.vmid)
            || matches!(&decision, Decision::Write(_) if self.settings.provider_id == Format::RegionVmid
                && !provider_id::is_cluster_api(node, &vm.tags));
        let annotations = if numbered { BTreeMap::new() } else { labels::annotations(vm) };
        let stale = labels::stale(node, &desired);
        let there = |wanted: &BTreeMap<String, String>, all: &BTreeMap<String, String>| {
            wanted.iter().all(|(key, value)| all.get(key) == Some(value))
        };
        let mut complete =
            stale.is_empty() && there(&desired, node.labels()) && there(&annotations, node.annotations());
        if !complete {
            complete = self.writer.labels(node, &desired, &annotations, &stale).await;
        }
        if self.settings.labels_only {
            return;
        }
        if addresses::is_ours_to_write(node) {
            let interfaces = polled.interfaces.get(&vm.vmid).map(Vec::as_slice);
            let wanted = addresses::desired(node, &self.settings.addresses, interfaces);
            if !addresses::holds(node, &wanted) {
                complete &= self.writer.addresses(node, &wanted).await;
            }
        }
        let provider_id = match &decision {
            Decision::Keep => None,
            Decision::Write(text) => Some(text.as_str()),
            Decision::Refuse(why) => {
                complete = false;
                let notice = Notice::warning("ProviderIdUnclear", why.clone());
                self.refuse(node, "provider_id_unclear", notice).await;
                None
            }
        };
        let Some(good_at) = polled.good_at else { return };
        let seen = self.seen(node, region, vm, good_at, (complete, settled)).await;
        let wanted = taints::desired(node, seen, k8s::date());
        if provider_id.is_some() || wanted.is_some() {
            self.writer.spec(node, provider_id, wanted.as_deref()).await;
        }
    }

    /// What the taints are decided by; asks more where something is given up or comes back.
    async fn seen(
        &mut self,
        node: &Node,
        region: &Region,
        vm: &VmFacts,
        good_at: Instant,
        (initialised, settled): (bool, Settled),
    ) -> Seen {
        let power = power(vm);
        let memory = self.memory.entry(uid(node)).or_default();
        let since = match memory.power {
            Some((before, since)) if before == power => since,
            _ => good_at,
        };
        memory.power = Some((power, since));
        let mut seen = Seen {
            ready: is_ready(node),
            power,
            lasted: good_at.saturating_duration_since(since),
            initialised,
            out_of_service: self.settings.out_of_service,
            old_volumes_gone: None,
        };
        if taints::gives_up(node, seen) {
            let now = Instant::now();
            let lately = memory.not_dead_at.is_some_and(|at| now.duration_since(at) < ASK_AGAIN);
            // One of several VMs of a uuid is no proof of what the others do.
            if lately || settled.has_twins || !self.is_dead_now(region, vm, power).await {
                seen.out_of_service = false;
            }
            if !lately && !seen.out_of_service {
                self.memory.entry(uid(node)).or_default().not_dead_at = Some(now);
                let text = format!(
                    "VM {} of region `{region}` seems dead, but that is not certain: it may still write, so the node is not given up",
                    vm.vmid
                );
                self.refuse(node, "may_still_write", Notice::warning("NotGivenUp", text)).await;
            }
        }
        if let Some(taint) = taints::may_return(node, seen) {
            seen.old_volumes_gone = self.writer.old_volumes_gone(node, taint).await;
        }
        seen
    }
}

/// What tells a Node from another of its name.
pub(super) fn uid(node: &Node) -> String {
    node.metadata.uid.clone().unwrap_or_else(|| node.name_any())
}
