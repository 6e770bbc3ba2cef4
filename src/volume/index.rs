//! What was last read of each VM of a region: by a sweep, and by every turn of a VM.
//!
//! Each reading has a number that was taken before it began, so that an older one that ends later does not replace a newer one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::time::Instant;
use uuid::Uuid;

use super::attachments::Hold;
use crate::{
    pve::{
        ApiError,
        qemu::{VmConfig, VmStatus, is_unused},
    },
    types::{NodeName, ScsiSlot, VmId},
};

/// When something began, in the order of this process and not of a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

impl Moment {
    /// Before everything.
    pub(super) const START: Self = Self(0);
}

/// The VMs of a region.
#[derive(Default)]
pub(super) struct Index {
    order: AtomicU64,
    vms: Mutex<BTreeMap<VmId, Known>>,
}

/// What is known of a VM.
#[derive(Debug, Clone)]
pub(super) struct Known {
    /// The PVE node its config was on.
    pub(super) node: NodeName,
    /// Its name.
    pub(super) name: String,
    /// When it was read.
    pub(super) began: Moment,
    /// The same on the clock.
    pub(super) at: Instant,
    /// When it was last changed, or may have been.
    pub(super) changed: Moment,
    /// What it has, or why that could not be read.
    pub(super) seen: Result<Seen, Arc<ApiError>>,
}

impl Known {
    /// What was read of a VM since `began`.
    pub(super) fn new(
        node: NodeName,
        name: String,
        (began, at): (Moment, Instant),
        seen: Result<Seen, Arc<ApiError>>,
    ) -> Self {
        Self { node, name, began, at, changed: Moment::START, seen }
    }

    /// Whether the VM was changed since it was read, or may have been.
    pub(super) fn is_stale(&self) -> bool {
        self.changed > self.began
    }
}

/// What a VM has.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// Its config.
    pub(super) config: Arc<VmConfig>,
    /// What its QEMU has, and when that was read; none for a VM that was not running.
    pub(super) status: Option<(VmStatus, Instant)>,
    /// Which volumes its snapshots have.
    pub(super) snapshots: Arc<Snapshots>,
}

/// Volumes in the snapshots of a VM.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    /// The config they were read with: its digest covers them.
    pub(super) digest: String,
    /// Volids with their snapshots.
    pub(super) references: BTreeSet<(String, String)>,
}

impl Seen {
    /// How the VM holds a volume; a stray drive may be any volume. With `by_name`, only drives of that WWN count.
    pub(super) fn holds(&self, volid: &str, by_name: Option<&str>) -> Vec<Hold> {
        let drives = self.config.volumes().filter(|held| held.volid == volid);
        let drives =
            drives.filter(|held| by_name.is_none_or(|wwn| held.wwn.as_deref() == Some(wwn))).map(|held| {
                match held.key {
                    key if is_unused(&key) => Hold::Unused { key },
                    key => Hold::Config { key, read_only: held.read_only },
                }
            });
        if by_name.is_some() {
            return drives.collect();
        }
        let snapshots = self.snapshots.references.iter().filter(|(held, _)| held == volid);
        let stray = self.status.iter().flat_map(|(status, _)| stray_drives(&self.config, status));
        drives
            .chain(snapshots.map(|(_, snapshot)| Hold::Snapshot { snapshot: snapshot.clone() }))
            .chain(stray.map(|key| Hold::Stray { key }))
            .collect()
    }
}

/// SCSI drives that QEMU has and the config does not know.
pub(super) fn stray_drives(config: &VmConfig, status: &VmStatus) -> impl Iterator<Item = String> {
    let known: Vec<&str> = config.current_drives().collect();
    let drives = status.drives.iter().flatten();
    drives
        .filter(|key| key.parse::<ScsiSlot>().is_ok() && !known.contains(&key.as_str()))
        .cloned()
        .collect::<Vec<_>>()
        .into_iter()
}

impl Index {
    /// Now: before anything that begins after it.
    pub(super) fn now(&self) -> Moment {
        Moment(self.order.fetch_add(1, Ordering::SeqCst))
    }

    /// What is known of a VM.
    pub(super) fn get(&self, vmid: VmId) -> Option<Known> {
        super::lock(&self.vms).get(&vmid).cloned()
    }

    /// What is known of all VMs.
    pub(super) fn all(&self) -> Vec<(VmId, Known)> {
        super::lock(&self.vms).iter().map(|(vmid, known)| (*vmid, known.clone())).collect()
    }

    /// The VMs that were read with this uuid.
    pub(super) fn with_uuid(&self, uuid: Uuid) -> Vec<(VmId, Known)> {
        let vms = super::lock(&self.vms);
        let has = |known: &Known| known.seen.as_ref().is_ok_and(|seen| seen.config.uuid() == Some(uuid));
        vms.iter().filter(|(_, known)| has(known)).map(|(vmid, known)| (*vmid, known.clone())).collect()
    }

    /// Keeps what was read of a VM, unless something newer is known.
    pub(super) fn put(&self, vmid: VmId, known: Known) {
        let mut vms = super::lock(&self.vms);
        let before = vms.get(&vmid);
        if before.is_none_or(|before| before.began < known.began) {
            let changed = before.map_or(known.changed, |before| before.changed);
            vms.insert(vmid, Known { changed, ..known });
        }
    }

    /// Which volumes the snapshots of a VM had when that was read last; the digest there says whether that still holds.
    pub(super) fn snapshots(&self, vmid: VmId) -> Arc<Snapshots> {
        self.get(vmid).and_then(|known| Some(known.seen.ok()?.snapshots)).unwrap_or_default()
    }

    /// Keeps what a turn read of a VM.
    pub(super) fn saw(&self, vmid: VmId, node: &NodeName, began: Moment, seen: Seen) {
        let name = seen.config.current("name").unwrap_or("no name").to_owned();
        self.put(vmid, Known::new(node.clone(), name, (began, Instant::now()), Ok(seen)));
    }

    /// The VM was changed, or may have been: what is known of it suggests nothing any more.
    pub(super) fn mark_stale(&self, vmid: VmId) {
        if let Some(known) = super::lock(&self.vms).get_mut(&vmid) {
            known.changed = self.now();
        }
    }

    /// Forgets VMs that a complete listing lacks, which began at `began`.
    pub(super) fn retain(&self, listed: &BTreeSet<VmId>, began: Moment) {
        super::lock(&self.vms).retain(|vmid, known| listed.contains(vmid) || known.began > began);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(index: &Index) -> Known {
        let seen = Seen { config: Arc::default(), status: None, snapshots: Arc::default() };
        let node = "pve1".parse().expect("a node");
        Known::new(node, String::new(), (index.now(), Instant::now()), Ok(seen))
    }

    #[tokio::test]
    async fn what_was_read_before_a_change_does_not_hide_it() {
        let index = Index::default();
        let vmid = VmId::new(101).expect("a vmid");
        let (first, second) = (known(&index), known(&index));
        index.put(vmid, second.clone());
        index.put(vmid, first);
        assert_eq!(index.get(vmid).map(|known| known.began), Some(second.began));
        let slow = known(&index);
        index.mark_stale(vmid);
        index.put(vmid, slow.clone());
        let kept = index.get(vmid).expect("the vm is known");
        assert!(kept.is_stale(), "it was read before the change");
        assert_eq!(kept.began, slow.began, "and yet it is newer than what was known");
        index.put(vmid, known(&index));
        assert!(index.get(vmid).is_some_and(|known| !known.is_stale()));
    }

    #[tokio::test]
    async fn a_vm_that_was_read_after_a_listing_began_is_not_forgotten_by_it() {
        let index = Index::default();
        let vmid = VmId::new(101).expect("a vmid");
        let listing = index.now();
        index.put(vmid, known(&index));
        index.retain(&BTreeSet::new(), listing);
        assert!(index.get(vmid).is_some());
        index.retain(&BTreeSet::new(), index.now());
        assert!(index.get(vmid).is_none());
    }
}
