//! What is made of all volumes or all VMs and asked for often: how much of a storage is in use, and which VMs have a
//! volume open. Both follow the changes of what they are made of (`Tracked::changed_since`), so that a question costs
//! what has changed since the last one, however many volumes and VMs there are.

use super::state::{Vm, Volume, VolumeKey};
use super::tracked::Tracked;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

/// The parts of a sum, as of a revision.
#[derive(Debug, Default)]
struct Sum {
    revision: u64,
    total: u64,
    parts: BTreeMap<VolumeKey, u64>,
}

impl Sum {
    fn set(&mut self, key: &VolumeKey, part: Option<u64>) {
        let before = match part {
            Some(part) => {
                self.total = self.total.saturating_add(part);
                self.parts.insert(key.clone(), part)
            }
            None => self.parts.remove(key),
        };
        self.total -= before.unwrap_or(0);
    }
}

/// Bytes in use by storage, seen from a node (none for a shared one).
#[derive(Debug, Default)]
pub struct Sums(Mutex<BTreeMap<(String, Option<String>), Sum>>);

impl Sums {
    /// The sum of what `part` says of each volume. It says `None` of one that does not count; `all` are those to look
    /// at where nothing is known yet.
    pub(super) fn of<'a>(
        &self,
        volumes: &Tracked<VolumeKey, Volume>,
        of: (&str, Option<&str>),
        all: impl Iterator<Item = &'a VolumeKey>,
        part: impl Fn(&VolumeKey, &Volume) -> Option<u64>,
    ) -> u64 {
        let mut sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = (of.0.to_owned(), of.1.map(str::to_owned));
        let kept = sums.remove(&of);
        let part_of = |key: &VolumeKey| part(key, volumes.get(key)?);
        let known = kept.and_then(|kept| Some((volumes.changed_since(kept.revision)?, kept)));
        let mut sum = if let Some((changed, mut kept)) = known {
            changed.for_each(|key| kept.set(key, part_of(key)));
            kept
        } else {
            let mut fresh = Sum::default();
            all.for_each(|key| fresh.set(key, part_of(key)));
            fresh
        };
        sum.revision = volumes.revision();
        let total = sum.total;
        sums.insert(of, sum);
        total
    }

    /// Forgets all sums: what a storage is has changed.
    pub(super) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Who has which volume open.
#[derive(Debug, Default)]
pub struct Holders(Mutex<Index>);

#[derive(Debug, Default)]
struct Index {
    revision: u64,
    of_volume: BTreeMap<VolumeKey, BTreeSet<u32>>,
    of_vm: BTreeMap<u32, BTreeSet<VolumeKey>>,
}

impl Index {
    fn set(&mut self, vmid: u32, vm: Option<&Vm>) {
        for key in self.of_vm.remove(&vmid).into_iter().flatten() {
            if let Some(holders) = self.of_volume.get_mut(&key) {
                holders.remove(&vmid);
                if holders.is_empty() {
                    self.of_volume.remove(&key);
                }
            }
        }
        let open: BTreeSet<VolumeKey> =
            vm.into_iter().flat_map(|vm| vm.drives.values()).map(|drive| drive.volume.clone()).collect();
        for key in &open {
            self.of_volume.entry(key.clone()).or_default().insert(vmid);
        }
        if !open.is_empty() {
            self.of_vm.insert(vmid, open);
        }
    }
}

impl Holders {
    /// The VMs whose QEMU has the volume.
    pub(super) fn of(&self, vms: &Tracked<u32, Vm>, key: &VolumeKey) -> BTreeSet<u32> {
        let mut index = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(changed) = vms.changed_since(index.revision) {
            changed.for_each(|vmid| index.set(*vmid, vms.get(vmid)));
        } else {
            *index = Index::default();
            vms.iter().for_each(|(vmid, vm)| index.set(*vmid, Some(vm)));
        }
        index.revision = vms.revision();
        index.of_volume.get(key).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    fn key(number: u64) -> VolumeKey {
        VolumeKey { storage: "s".to_owned(), node: None, name: number.to_string() }
    }

    fn volume(size: u64) -> Volume {
        Volume { size, ctime: 1, format: "raw", image: None, snapshots: Vec::new(), parent: None }
    }

    proptest! {
        #[test]
        fn a_sum_that_follows_is_the_sum_of_all(acts in proptest::collection::vec((0_u64..5, 0_u64..4), 0..40)) {
            let (sums, mut volumes) = (Sums::default(), Tracked::default());
            for (name, act) in acts {
                match act {
                    0 => drop(volumes.remove(&key(name))),
                    1 => volumes.values_mut().for_each(|volume: &mut Volume| volume.size += 1),
                    size => drop(volumes.insert(key(name), volume(size))),
                }
                let counts = |key: &VolumeKey| key.name != "3";
                let sum = sums.of(&volumes, ("s", None), volumes.keys().filter(|key| counts(key)), |key, volume| {
                    counts(key).then_some(volume.size)
                });
                let all: u64 = volumes.iter().filter(|(key, _)| counts(key)).map(|(_, volume)| volume.size).sum();
                prop_assert_eq!(sum, all);
            }
        }
    }

    /// Counted, not timed: a question looks at what has changed, not at all there is.
    #[test]
    fn a_question_costs_what_has_changed() {
        let (sums, mut volumes) = (Sums::default(), Tracked::default());
        (0..10_000).for_each(|number| drop(volumes.insert(key(number), volume(1))));
        let looks = Cell::new(0);
        let ask = |volumes: &Tracked<VolumeKey, Volume>| {
            looks.set(0);
            let sum = sums.of(volumes, ("s", None), volumes.keys(), |_, volume| {
                looks.set(looks.get() + 1);
                Some(volume.size)
            });
            (sum, looks.get())
        };
        assert_eq!(ask(&volumes), (10_000, 10_000));
        assert_eq!(ask(&volumes), (10_000, 0));
        volumes.insert(key(10_000), volume(5));
        volumes.remove(&key(1));
        assert_eq!(ask(&volumes), (10_004, 1));
        sums.forget();
        assert_eq!(ask(&volumes), (10_004, 10_000));
    }
}
