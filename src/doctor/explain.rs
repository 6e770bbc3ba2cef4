//! All about one volume, and what the driver would do with it now.
//!
//! What it would do is not guessed: [`Rehearsal`] lets the driver's own code do it, over a transport through which nothing passes that
//! changes something, and hears where it stopped.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Serialize;

use super::{
    book::{self, Book, Entry, Key, State},
    checks,
    finding::{Finding, Report},
    rows::{HeldBy, Row},
    view::{Progress, RegionView, Source, View},
};
use crate::{
    k8s,
    k8s::inventory::PvObject,
    telemetry::log::chain,
    types::{NodeName, VmId, VolumeHandle, params::Parameters},
    volume::{Volumes, attach::Use, delete::DeleteError, holder::HolderError, vmerror::VmError},
};

/// How long one rehearsal may take: it waits for running tasks of a VM, as the driver does.
const PATIENCE: Duration = Duration::from_secs(40);
/// How many of a VM's last tasks are told.
const TASKS: usize = 5;

/// Volumes over a transport that stops every change.
pub struct Rehearsal {
    volumes: Volumes,
    stopped: Arc<AtomicBool>,
}

impl Rehearsal {
    /// `volumes` must be made over clients whose gate is [`Rehearsal::gate`] of the same `stopped`.
    pub fn new(volumes: Volumes, stopped: Arc<AtomicBool>) -> Self {
        Self { volumes, stopped }
    }

    /// The volumes, for what only reads.
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// A gate that lets nothing pass, and remembers that something wanted to.
    pub fn gate(stopped: &Arc<AtomicBool>) -> Arc<dyn Fn() -> bool + Send + Sync> {
        let stopped = Arc::clone(stopped);
        Arc::new(move || {
            stopped.store(true, Ordering::SeqCst);
            false
        })
    }

    async fn play<T, E: std::error::Error>(
        &self,
        operation: String,
        act: impl Future<Output = Result<T, E>>,
        step: fn(&E) -> Option<String>,
        nothing: impl FnOnce(T) -> String,
    ) -> Rehearsed {
        self.stopped.store(false, Ordering::SeqCst);
        let result = tokio::time::timeout(PATIENCE, act).await;
        let stopped = self.stopped.load(Ordering::SeqCst);
        let (outcome, text) = match result {
            Err(_) => (
                "unknown",
                format!(
                    "not told within {} s: it waits for a running task, or for a node that does not answer",
                    PATIENCE.as_secs()
                ),
            ),
            Ok(Ok(done)) => ("nothing", nothing(done)),
            Ok(Err(error)) if stopped => {
                ("would", step(&error).unwrap_or_else(|| "change something".to_owned()))
            }
            Ok(Err(error)) => ("refuses", chain(&error)),
        };
        Rehearsed { operation, outcome, text }
    }
}

/// What an operation would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Rehearsed {
    /// The operation.
    pub operation: String,
    /// `nothing`: all is as it should be after it; `would`: this is its first change; `refuses`: this is why; `unknown`.
    pub outcome: &'static str,
    /// What, or why.
    pub text: String,
}

/// A task of Proxmox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Its id.
    pub upid: String,
    /// What it did.
    pub kind: String,
    /// On which VM.
    pub vmid: u32,
    /// Who started it.
    pub user: String,
    /// When, in UTC.
    pub started: String,
    /// How it ended, or `running`.
    pub status: String,
}

/// A pod that uses the claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PodUse {
    /// `namespace/name`.
    pub name: String,
    /// The Node.
    pub node: Option<String>,
    /// Its phase.
    pub phase: String,
}

/// All about a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What is known of it, as in a list of volumes.
    #[serde(flatten)]
    pub row: Row,
    /// The type of its storage, and whether that is shared; absent where the token does not see the storage.
    pub storage_type: Option<String>,
    /// Whether its storage is shared.
    pub shared: Option<bool>,
    /// Whether its owner is the one that the driver is set to: only then is it formatted at its first use.
    pub owner_is_configured: bool,
    /// `yes`, `no` (proven), or `unknown`.
    pub exists: &'static str,
    /// Why that is not known.
    pub exists_why: Option<String>,
    /// Nodes that fit the PV.
    pub fitting_nodes: Option<Vec<String>>,
    /// Pods that use its claim.
    pub pods: Vec<PodUse>,
    /// Whether the kubelet of a Node counts it among the volumes in use.
    pub in_use_on: Vec<String>,
    /// What the driver would do.
    pub operations: Vec<Rehearsed>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
    /// The last tasks of the VMs that hold it, or that it would be attached to; only those of this token, unless it may see more.
    pub tasks: Vec<Task>,
}

/// A volume that can't be told of.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// No handle, and no PV or claim of that name.
    #[error("`{name}` is no volume handle (region/zone/storage/name), and {why}")]
    NoSuchVolume {
        /// What was asked for.
        name: String,
        /// What was looked at.
        why: String,
    },
}

/// The volume of a handle, of a PV, or of a claim as `namespace/name`.
pub fn resolve(view: &View, name: &str) -> Result<VolumeHandle, ExplainError> {
    let no_such = |why: &str| ExplainError::NoSuchVolume { name: name.to_owned(), why: why.to_owned() };
    if let Ok(handle) = name.parse() {
        return Ok(handle);
    }
    let Some(cluster) = &view.cluster else {
        return Err(no_such("without Kubernetes (--kubeconfig) there are no PVs and claims to look for"));
    };
    let Ok(volumes) = &cluster.volumes else { return Err(no_such("the PVs can not be listed")) };
    let named = |pv: &&PvObject| pv.name == name || pv.claim.as_deref() == Some(name);
    let pv =
        volumes.iter().find(named).ok_or_else(|| no_such("no PV of this driver has that name or claim"))?;
    pv.handle.parse().map_err(|_| no_such("the PV of that name has a handle that can not be read"))
}

/// All about a volume. `node`: the node that an attach is rehearsed to, in place of the likeliest.
pub async fn explain(
    view: &View,
    book: &Book,
    sources: &[Source],
    rehearsal: &Rehearsal,
    handle: &VolumeHandle,
    node: Option<&str>,
    progress: &Progress,
) -> Explanation {
    let key = Key::of(view, handle);
    let entry = book.volumes.get(&key).cloned().unwrap_or_else(|| Entry::new(key.clone()));
    let region = view.region(&key.region);
    progress.say("looking for the volume");
    let found = book::is_there(&rehearsal.volumes, handle).await;
    let mut row = Row::of(&entry, view.knows_volumes());
    if entry.pvs.is_empty() {
        row.handle = handle.to_string();
    }
    let (exists, exists_why) = match &found {
        Ok(Some(size)) => {
            row.size_bytes = Some(size.get());
            ("yes", None)
        }
        Ok(None) => {
            row.state = State::Missing;
            ("no", None)
        }
        Err(why) => ("unknown", Some(why.clone())),
    };
    let resources = region.and_then(|region| region.resources.as_ref().ok());
    let storage = resources.and_then(|all| all.storage(handle.storage()).next());
    let target = node.map(str::to_owned).or_else(|| likely_node(view, &entry, region));
    let pods = pods_of(view, &entry);
    Explanation {
        storage_type: storage.map(|row| row.plugin.clone()),
        shared: storage.map(|row| row.shared),
        owner_is_configured: handle.name().owner() == Some(view.settings.owner),
        exists,
        exists_why,
        fitting_nodes: fitting(view, &entry),
        in_use_on: in_use_on(view, handle, &entry),
        operations: rehearse(rehearsal, handle, &entry, target.as_deref(), progress).await,
        findings: findings(view, &entry, &found),
        tasks: tasks(view, sources, &entry, target.as_deref(), progress).await,
        pods,
        row,
    }
}

/// The node that the volume would most likely be attached to next.
fn likely_node(view: &View, entry: &Entry, region: Option<&RegionView>) -> Option<String> {
    let attached = entry.attachments.iter().find(|one| !one.deleting).map(|one| one.node.clone());
    let of_pod = || pods_of(view, entry).into_iter().find_map(|pod| pod.node);
    let held = || entry.drives().find_map(|held| held.node.clone());
    let near = || {
        let region = region?;
        let fits = |host: &NodeName| entry.key.zone.as_ref().is_none_or(|zone| zone == host);
        view.nodes
            .iter()
            .filter(|node| node.region == region.region)
            .find(|node| view.vms_of(node).next().is_some_and(|(_, vm, _)| fits(&vm.row.node)))
            .map(|node| node.name.clone())
    };
    attached.or_else(of_pod).or_else(held).or_else(near)
}

fn pods_of(view: &View, entry: &Entry) -> Vec<PodUse> {
    let claims: Vec<&String> = entry.pvs.iter().filter_map(|pv| pv.claim.as_ref()).collect();
    let pods = view.cluster.iter().flat_map(|cluster| cluster.pods.iter().flatten());
    pods.filter(|pod| !pod.has_ended() && pod.claims.iter().any(|claim| claims.contains(&claim)))
        .map(|pod| PodUse { name: pod.name.clone(), node: pod.node.clone(), phase: pod.phase.clone() })
        .collect()
}

fn fitting(view: &View, entry: &Entry) -> Option<Vec<String>> {
    let (pv, nodes) = (entry.pvs.first()?, view.cluster.as_ref()?.nodes.as_ref().ok()?);
    Some(nodes.iter().filter(|node| pv.fits(&node.labels)).map(|node| node.name.clone()).collect())
}

fn in_use_on(view: &View, handle: &VolumeHandle, entry: &Entry) -> Vec<String> {
    let text = handle.to_string();
    let is = |name: &String| *name == text || entry.pvs.iter().any(|pv| pv.handle == *name);
    let nodes = view.cluster.iter().flat_map(|cluster| cluster.nodes.iter().flatten());
    nodes.filter(|node| node.in_use.iter().any(is)).map(|node| node.name.clone()).collect()
}

/// What is wrong with this volume and no other.
fn findings(view: &View, entry: &Entry, found: &Result<Option<crate::types::Bytes>, String>) -> Vec<Finding> {
    let mut entry = entry.clone();
    if !entry.pvs.is_empty() {
        entry.presence = Some(found.clone().map(|size| size.is_some()));
    }
    let vms: Vec<String> = entry.held.iter().map(|held| format!("VM {}", held.vmid)).collect();
    let names: Vec<String> = entry.pvs.iter().map(|pv| pv.name.clone()).chain([entry.handle()]).collect();
    let mut only = Book::default();
    only.volumes.insert(entry.key.clone(), entry);
    let mut report = Report::default();
    checks::volumes(view, &only, &mut report);
    // Of this one alone, but for attachments of nothing; a stray drive may be any volume.
    let about = |finding: &Finding| names.contains(&finding.subject) || finding.subject.starts_with("VM ");
    report.findings.retain(about);
    let mut of_machines = Report::default();
    checks::machines(view, &mut of_machines);
    report.findings.extend(of_machines.findings.into_iter().filter(|one| vms.contains(&one.subject)));
    report.sort();
    report.findings
}

async fn rehearse(
    rehearsal: &Rehearsal,
    handle: &VolumeHandle,
    entry: &Entry,
    target: Option<&str>,
    progress: &Progress,
) -> Vec<Rehearsed> {
    let volumes = &rehearsal.volumes;
    let mut all = Vec::new();
    let options =
        entry.pvs.first().map(|pv| Parameters::of_existing_volume(&pv.context).0.drive).unwrap_or_default();
    if let Some(node) = target {
        progress.say("rehearsing an attach");
        let nothing = |disk: crate::types::publish::PublishedDisk| {
            let slot = disk.slot.map(|slot| format!(" in {slot}")).unwrap_or_default();
            format!("it is attached{slot}, WWN {}", disk.wwn)
        };
        let act = volumes.attach(handle, node, &options, usage(entry.pvs.first()));
        all.push(
            rehearsal.play(format!("attach to node {node}"), act, |error| step_of(error), nothing).await,
        );
    }
    progress.say("rehearsing a detach");
    let from = entry.drives().find_map(|held| held.node.as_deref()).or(target);
    let unclaimed = entry.drives().all(|held| held.node.is_none()) && entry.drives().next().is_some();
    let from = from.filter(|_| !unclaimed);
    let name =
        from.map_or_else(|| "detach from every VM".to_owned(), |node| format!("detach from node {node}"));
    let act = volumes.detach(handle, from);
    all.push(
        rehearsal.play(name, act, |error| step_of(error), |()| "it is not attached there".to_owned()).await,
    );
    progress.say("rehearsing a deletion");
    let nothing = |()| "it is gone already".to_owned();
    let step =
        |error: &DeleteError| Some(step_of(error).unwrap_or_else(|| "delete it, with its data".to_owned()));
    all.push(rehearsal.play("delete".to_owned(), volumes.delete(handle), step, nothing).await);
    all
}

/// How Kubernetes would ask for it.
fn usage(pv: Option<&PvObject>) -> Use {
    match pv {
        Some(pv) if !pv.modes.is_empty() && pv.modes.iter().all(|mode| mode == "ReadOnlyMany") => {
            Use::ReadByMany
        }
        Some(pv) if pv.read_only => Use::Read,
        _ => Use::Write,
    }
}

/// The step that was stopped.
fn step_of(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(VmError::Request { vmid, step, .. }) = error.downcast_ref() {
            return Some(format!("{step} of VM {vmid}"));
        }
        if let Some(HolderError::Request { what, vmid, .. }) = error.downcast_ref() {
            return Some(format!("{what} the short-lived VM {vmid}"));
        }
        next = error.source();
    }
    None
}

async fn tasks(
    view: &View,
    sources: &[Source],
    entry: &Entry,
    target: Option<&str>,
    progress: &Progress,
) -> Vec<Task> {
    let Some(source) = sources.iter().find(|source| *source.client.region() == entry.key.region) else {
        return Vec::new();
    };
    progress.say("reading the last tasks");
    let mut machines: Vec<(VmId, NodeName)> =
        entry.held.iter().map(|held| (held.vmid, held.host.clone())).collect();
    if machines.is_empty() {
        let target = view.nodes.iter().find(|node| Some(node.name.as_str()) == target);
        let vms = target.into_iter().flat_map(|node| view.vms_of(node));
        machines.extend(vms.map(|(vmid, vm, _)| (vmid, vm.row.node.clone())));
    }
    machines.sort();
    machines.dedup();
    let mut all = Vec::new();
    for (vmid, host) in machines {
        // Without an answer there are just none to tell of.
        let rows = source.client.recent_tasks(&host, vmid, TASKS).await.unwrap_or_default();
        all.extend(rows.into_iter().map(|row| Task {
            upid: row.upid.to_string(),
            kind: row.kind,
            vmid: vmid.get(),
            user: row.user,
            started: k8s::moment(row.started),
            status: row.status.unwrap_or_else(|| "running".to_owned()),
        }));
    }
    all
}

impl Explanation {
    /// Whether somebody has to act.
    pub fn needs_action(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity != super::finding::Severity::Note)
            || self.exists == "no"
    }

    /// The VMs that hold it as a drive.
    pub fn drives(&self) -> impl Iterator<Item = &HeldBy> {
        self.row.held_by.iter().filter(|held| held.kind == "drive")
    }

    /// What to do next, for a person.
    pub fn advice(&self) -> String {
        if let Some(worst) = self.findings.iter().find(|one| one.severity != super::finding::Severity::Note) {
            let hint = worst.hint.as_deref().map(|hint| format!(": {hint}")).unwrap_or_default();
            return format!("{}{hint}", worst.code);
        }
        if self.exists == "no" {
            return "the volume is proven not to be there; nothing is left to do with it".to_owned();
        }
        let attach = self.operations.iter().find(|one| one.operation.starts_with("attach"));
        match attach {
            Some(one) if one.outcome == "refuses" => {
                "an attach would be refused for the reason above".to_owned()
            }
            Some(one) if one.outcome == "unknown" => "ask again when the running tasks have ended".to_owned(),
            _ => "nothing: it is as it should be".to_owned(),
        }
    }
}
