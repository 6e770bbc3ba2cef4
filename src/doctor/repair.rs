//! Repairs: the few that are provably safe.
//!
//! [`plan`] is pure, and what it plans is what holds of the moment it was read. So before each act everything is read again and the act
//! must still be in the plan ([`carry_out`]). Acts go through [`Volumes`], as the driver's own do, by a process that holds the driver's
//! lease: no controller can attach meanwhile what is being detached.

use futures_util::future::BoxFuture;

use super::{
    book::{Book, Entry, Held, How},
    view::View,
};
use crate::{
    telemetry::log::chain,
    types::{Region, VmId, VolumeHandle},
    volume::Volumes,
};

/// A repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// A volume that nothing uses is detached from the VM of a node.
    Detach {
        /// The volume.
        handle: VolumeHandle,
        /// The Node.
        node: String,
        /// Its VM.
        vmid: VmId,
    },
    /// A short-lived VM of the driver that is left over is emptied and destroyed.
    RemoveHolder {
        /// The region.
        region: Region,
        /// The VM.
        vmid: VmId,
    },
}

impl std::fmt::Display for Act {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Detach { handle, node, vmid } => {
                write!(f, "detach `{handle}` from VM {vmid} of Node `{node}`")
            }
            Self::RemoveHolder { region, vmid } => {
                write!(f, "remove the left-over short-lived VM {vmid} of region {region}")
            }
        }
    }
}

/// Whether a volume may be taken out of a VM without a look by a person: it is proven that nothing uses it. Else what is missing for
/// the proof.
///
/// The proof: no VolumeAttachment of it exists, so that the attacher wants it nowhere; no pod that has not ended uses its claim; and the
/// kubelet of the Node, which works, does not count it among the volumes in use, as it does from before it mounts one until after it has
/// unmounted it (kubernetes `pkg/kubelet/volumemanager`). A VM that is stopped has nothing mounted.
pub fn may_detach(view: &View, entry: &Entry, held: &Held) -> Result<(), String> {
    let Some(cluster) = &view.cluster else {
        return Err("no cluster was named, so that its use is not known".to_owned());
    };
    let (Ok(nodes), Ok(pods), Ok(_), Ok(_)) =
        (&cluster.nodes, &cluster.pods, &cluster.attachments, &cluster.volumes)
    else {
        return Err("not everything of the cluster can be read".to_owned());
    };
    let [pv] = entry.pvs.as_slice() else {
        return Err("it has no PV, or several, so that its use is not known".to_owned());
    };
    if !entry.attachments.is_empty() {
        return Err("there is a VolumeAttachment of it elsewhere".to_owned());
    }
    if entry.held.iter().filter(|held| held.is_drive()).count() > 1 {
        return Err("it is held more than once".to_owned());
    }
    let Some(node) = held.node.as_ref().and_then(|name| nodes.iter().find(|node| node.name == *name)) else {
        return Err("the VM is no Node's, so that its use is not known".to_owned());
    };
    if let Some(pod) = pods
        .iter()
        .find(|pod| !pod.has_ended() && pv.claim.as_ref().is_some_and(|claim| pod.claims.contains(claim)))
    {
        return Err(format!("pod {} uses its claim", pod.name));
    }
    if node.in_use.contains(&pv.handle) {
        return Err(format!("the kubelet of Node `{}` says that it is in use", node.name));
    }
    if held.running && !node.ready {
        return Err(format!(
            "the kubelet of Node `{}` is silent, so that it may still be mounted",
            node.name
        ));
    }
    let facts =
        view.region(&entry.key.region).and_then(|region| region.vms.get(&held.vmid)?.seen.as_ref().ok());
    let Some(facts) = facts else { return Err(format!("VM {} can not be read", held.vmid)) };
    if let Some(lock) = facts.config.lock() {
        return Err(format!("VM {} is locked ({lock})", held.vmid));
    }
    if facts.config.is_protected() {
        return Err(format!("VM {} is protected", held.vmid));
    }
    if facts.status.running && !facts.config.hotplugs_disks() {
        return Err(format!("VM {} runs without hotplug of disks", held.vmid));
    }
    match held.how {
        How::Drive { .. } => Ok(()),
        How::Unused | How::Snapshot => Err("it is not held as a drive".to_owned()),
    }
}

/// What can be repaired.
pub fn plan(view: &View, book: &Book) -> Vec<Act> {
    let mut acts = Vec::new();
    for entry in book.volumes.values() {
        for held in entry.drives() {
            if let (Ok(()), Some(node), Some(pv)) =
                (may_detach(view, entry, held), &held.node, entry.pvs.first())
                && let Ok(handle) = pv.handle.parse()
            {
                acts.push(Act::Detach { handle, node: node.clone(), vmid: held.vmid });
            }
        }
    }
    for region in &view.regions {
        for (vmid, vm) in &region.vms {
            let is_holder = view.settings.is_holder(*vmid, vm.row.name.as_deref());
            let idle =
                vm.seen.as_ref().is_ok_and(|facts| !facts.status.running && facts.config.lock().is_none());
            if is_holder && idle && view.cluster.is_some() {
                acts.push(Act::RemoveHolder { region: region.region.clone(), vmid: *vmid });
            }
        }
    }
    acts
}

/// What became of an act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// It was done.
    Repaired,
    /// It was not needed, or not safe, any more.
    Skipped,
    /// It failed.
    Failed(String),
}

/// Does what is planned, one act after the other. `look` reads everything anew before each; `tell` hears what became of it.
pub async fn carry_out<'a>(
    acts: &[Act],
    volumes: &Volumes,
    look: impl Fn() -> BoxFuture<'a, (View, Book)>,
    mut tell: impl FnMut(&Act, &Done),
) -> bool {
    let mut all = true;
    for act in acts {
        let (view, book) = look().await;
        let done = if plan(&view, &book).contains(act) { perform(act, volumes).await } else { Done::Skipped };
        all &= !matches!(done, Done::Failed(_));
        tell(act, &done);
    }
    all
}

async fn perform(act: &Act, volumes: &Volumes) -> Done {
    let failed = |error: &dyn std::error::Error| Done::Failed(chain(error));
    match act {
        Act::Detach { handle, node, .. } => match volumes.detach(handle, Some(node)).await {
            Ok(()) => Done::Repaired,
            Err(error) => failed(&error),
        },
        Act::RemoveHolder { region, vmid } => match volumes.remove_left_over(region, *vmid).await {
            Ok(()) => Done::Repaired,
            Err(error) => failed(&error),
        },
    }
}
