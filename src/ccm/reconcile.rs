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
    lifecycle::{Power, power},
    poll::{Polled, Wanted},
    provider_id::{self, Decision, Format},
    taints::{self, Seen},
    writes::Writer,
};
use crate::{
    k8s::{
        self,
        events::{Notice, Recorder},
        node::{self, ProviderId, is_ready},
    },
    pve::Client,
    telemetry::metrics::Metrics,
    types::{Region, VmId},
};

/// How old a good poll may be to be believed.
const BELIEVED_FOR: Duration = Duration::from_mins(1);

/// A region, and what its poller tells.
pub struct RegionHandle {
    /// Its client, for the questions that are asked before something is taken away.
    pub client: Client,
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
}

/// What was seen of a Node before.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// What its VM does, and the first poll that said so.
    power: Option<(Power, Instant)>,
    /// The poll that first said that its VM is gone.
    pub(super) gone_since: Option<Instant>,
    /// Whether its VMID exists, and when that was asked.
    pub(super) oracle: Option<(Instant, bool)>,
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
        Self { regions, settings, writer, recorder, metrics, memory: BTreeMap::new(), deletions: Vec::new() }
    }

    /// Compares these Nodes, which are all there are, with their VMs, and writes what differs.
    pub async fn reconcile(&mut self, nodes: &[Node]) {
        self.metrics.ccm().reconcile();
        let now = Instant::now();
        let polled: BTreeMap<Region, Polled> = self
            .regions
            .iter()
            .map(|handle| (handle.client.region().clone(), handle.polled.borrow().clone()))
            .collect();
        let regions: Regions = polled
            .iter()
            .map(|(region, polled)| {
                let mut facts = polled.facts.clone();
                facts.fresh &= polled.good_at.is_some_and(|at| now.duration_since(at) <= BELIEVED_FOR);
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
            if !matches!(located, Located::Absent { .. } | Located::Replaced { .. })
                && let Some(memory) = self.memory.get_mut(&uid(node))
            {
                memory.gone_since = None;
            }
            match located {
                Located::Vm { region, vm, twins, recorded_elsewhere } => {
                    managed += 1;
                    wanted.entry(region.clone()).or_default().insert(vm.vmid);
                    self.say_odd(node, &region, &vm, &twins, recorded_elsewhere).await;
                    if let Some(polled) = polled.get(&region) {
                        self.alive(node, &region, &vm, polled, some_have_uuids).await;
                    }
                }
                Located::Twins(places) => {
                    managed += 1;
                    self.metrics.ccm().refusal("duplicate_uuid");
                    let text = format!(
                        "several VMs have its uuid: {}; nothing records which one it is, so it is left as it is; hint: give all but one a new uuid (`qm set <vmid> --smbios1 uuid=…`)",
                        shown(&places)
                    );
                    self.say(node, Notice::warning("DuplicateUuid", text)).await;
                }
                Located::NotOurs(why) => {
                    self.say(node, Notice::normal("NotManaged", format!("left as it is: {why}"))).await;
                }
                Located::Unknown(why) => {
                    managed += 1;
                    tracing::debug!(node = node.name_any(), why, "cannot tell its VM now");
                }
                missed @ (Located::Absent { .. } | Located::Replaced { .. }) => {
                    managed += 1;
                    missing.push((node, missed));
                }
            }
        }
        for handle in &self.regions {
            let wanted = wanted.remove(handle.client.region()).unwrap_or_default();
            *handle.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        }
        if !self.settings.labels_only {
            self.judge_missing(missing, &regions, managed).await;
        }
    }

    /// Says something about a node in an event; in a dry run only in the log.
    pub(super) async fn say(&self, node: &Node, notice: Notice) {
        if self.writer.is_dry() {
            let Notice { reason, note, .. } = notice;
            tracing::info!(node = node.name_any(), reason, note, "would say, but this is a dry run");
        } else {
            self.recorder.about_node(node, notice).await;
        }
    }

    async fn say_odd(
        &self,
        node: &Node,
        region: &Region,
        vm: &VmFacts,
        twins: &[(Region, VmId)],
        recorded_elsewhere: Option<(Region, VmId)>,
    ) {
        if !twins.is_empty() {
            let text = format!(
                "VM {} of region `{region}` is this node, but its uuid is also that of {}; hint: a restored or copied VM needs a uuid of its own",
                vm.vmid,
                shown(twins)
            );
            self.say(node, Notice::warning("DuplicateUuid", text)).await;
        }
        if let Some(place) = recorded_elsewhere {
            let text = format!(
                "its uuid is that of VM {} of region `{region}`, but it is recorded as {}",
                vm.vmid,
                shown(&[place])
            );
            self.say(node, Notice::warning("RecordedElsewhere", text)).await;
        }
        let host = vm.host.as_str();
        if let Some(before) = node.labels().get(node::OWN_ZONE).filter(|zone| *zone != host)
            && !self.settings.labels.zone_is_ha_group
        {
            let text = format!("VM {} moved from `{before}` to `{host}`", vm.vmid);
            self.say(node, Notice::normal("VmMoved", text)).await;
        }
        if power(vm) == Power::HostUnreachable && !is_ready(node) {
            let text = format!(
                "the Proxmox node `{host}` of VM {} is not heard of; the VM may run there, so the node is not given up",
                vm.vmid
            );
            self.say(node, Notice::warning("HostUnreachable", text)).await;
        }
    }

    /// Brings a node whose VM was found to what it is to be.
    async fn alive(
        &mut self,
        node: &Node,
        region: &Region,
        vm: &VmFacts,
        polled: &Polled,
        some_have_uuids: bool,
    ) {
        let no_groups = BTreeSet::new();
        let groups = polled.groups.as_ref().map(|groups| groups.get(&vm.host).unwrap_or(&no_groups));
        let desired = match labels::desired(node, region, vm, self.settings.labels, groups) {
            Ok(labels) => labels,
            Err(error) => {
                self.metrics.ccm().refusal("zone_unknown");
                return self.say(node, Notice::warning("ZoneUnknown", error.to_string())).await;
            }
        };
        let uuid = vm.identity.as_ref().and_then(|identity| identity.uuid);
        let decision = match uuid {
            Some(uuid) if !self.settings.labels_only => {
                let format = self.settings.provider_id;
                provider_id::decide(node, &vm.tags, format, some_have_uuids, region, vm.vmid, uuid)
            }
            _ => Decision::Keep,
        };
        let numbered = matches!(ProviderId::of(node), ProviderId::Vm(..))
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
                self.metrics.ccm().refusal("provider_id_unclear");
                self.say(node, Notice::warning("ProviderIdUnclear", why.clone())).await;
                None
            }
        };
        let Some(good_at) = polled.good_at else { return };
        let seen = self.seen(node, region, vm, good_at, complete).await;
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
        initialised: bool,
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
        if taints::gives_up(node, seen) && power == Power::Off && !self.is_stopped_now(region, vm).await {
            self.metrics.ccm().refusal("may_still_write");
            seen.out_of_service = false;
        }
        if let Some(taint) = taints::may_return(node, seen) {
            seen.old_volumes_gone = self.writer.old_volumes_gone(node, taint).await;
        }
        seen
    }

    /// Whether the VM's own host says now that it is stopped.
    async fn is_stopped_now(&self, region: &Region, vm: &VmFacts) -> bool {
        let Some(handle) = self.regions.iter().find(|handle| handle.client.region() == region) else {
            return false;
        };
        let asked = handle.client.vm_status(&vm.host, vm.vmid);
        let locked = handle.client.vm_config(&vm.host, vm.vmid);
        let both = async { tokio::join!(asked, locked) };
        match tokio::time::timeout(Duration::from_secs(10), both).await {
            Ok((Ok(status), Ok(config))) => !status.running && config.lock().is_none(),
            _ => false,
        }
    }
}

/// What tells a Node from another of its name.
pub(super) fn uid(node: &Node) -> String {
    node.metadata.uid.clone().unwrap_or_else(|| node.name_any())
}

fn shown(places: &[(Region, VmId)]) -> String {
    let texts: Vec<String> =
        places.iter().map(|(region, vmid)| format!("VM {vmid} of region `{region}`")).collect();
    texts.join(", ")
}
