//! Random sequences of calls: a config that is written is a config that is read, its digest changes with it and with
//! nothing else, and what a volume held is lost only by the calls that lose it in Proxmox.

use super::cluster::Cluster;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// VMs that take part; 100 and 101 are stopped, 102 runs.
const VMS: [u32; 3] = [100, 101, 102];
const STORAGES: [(&str, &str); 6] =
    [("data", ".raw"), ("chain", ".qcow2"), ("btr", ".raw"), ("thin", ""), ("tank", ""), ("ceph", "")];

#[derive(Debug, Clone)]
enum Act {
    Alloc(usize),
    Attach { vm: usize, slot: u8, volume: usize },
    Own { vm: usize, slot: u8, storage: usize },
    Unlink { vm: usize, slot: u8, force: bool },
    DropUnused { vm: usize, index: u8 },
    Resize { vm: usize, slot: u8 },
    ToStorage { vm: usize, slot: u8, storage: usize, delete: bool },
    ToVm { vm: usize, slot: u8, target: usize },
    Snapshot { vm: usize, name: u8 },
    DropSnapshot { vm: usize, name: u8 },
    Rollback { vm: usize, name: u8 },
    Clone { vm: usize, full: bool },
    Revert { vm: usize, slot: u8 },
    Destroy { vm: usize },
    Delete { volume: usize },
    Power { vm: usize, on: bool },
}

fn act() -> impl Strategy<Value = Act> {
    let (vm, slot, storage) = (0..VMS.len(), 1..4_u8, 0..STORAGES.len());
    let (volume, name) = (0..8_usize, 1..3_u8);
    prop_oneof![
        4 => storage.clone().prop_map(Act::Alloc),
        6 => (vm.clone(), slot.clone(), volume.clone())
            .prop_map(|(vm, slot, volume)| Act::Attach { vm, slot, volume }),
        3 => (vm.clone(), slot.clone(), storage.clone())
            .prop_map(|(vm, slot, storage)| Act::Own { vm, slot, storage }),
        3 => (vm.clone(), slot.clone(), any::<bool>())
            .prop_map(|(vm, slot, force)| Act::Unlink { vm, slot, force }),
        1 => (vm.clone(), 0..2_u8).prop_map(|(vm, index)| Act::DropUnused { vm, index }),
        2 => (vm.clone(), slot.clone()).prop_map(|(vm, slot)| Act::Resize { vm, slot }),
        3 => (vm.clone(), slot.clone(), storage, any::<bool>())
            .prop_map(|(vm, slot, storage, delete)| Act::ToStorage { vm, slot, storage, delete }),
        3 => (vm.clone(), slot.clone(), vm.clone())
            .prop_map(|(vm, slot, target)| Act::ToVm { vm, slot, target }),
        2 => (vm.clone(), name.clone()).prop_map(|(vm, name)| Act::Snapshot { vm, name }),
        1 => (vm.clone(), name.clone()).prop_map(|(vm, name)| Act::DropSnapshot { vm, name }),
        1 => (vm.clone(), name).prop_map(|(vm, name)| Act::Rollback { vm, name }),
        2 => (vm.clone(), any::<bool>()).prop_map(|(vm, full)| Act::Clone { vm, full }),
        1 => (vm.clone(), slot).prop_map(|(vm, slot)| Act::Revert { vm, slot }),
        1 => vm.clone().prop_map(|vm| Act::Destroy { vm }),
        1 => volume.prop_map(|volume| Act::Delete { volume }),
        1 => (vm, any::<bool>()).prop_map(|(vm, on)| Act::Power { vm, on }),
    ]
}

/// What each volume holds at its start: a mark that was written when it was made, and goes wherever its contents go.
fn marks(cluster: &Cluster) -> BTreeMap<String, Vec<u8>> {
    cluster.volids().into_iter().map(|volid| (volid.clone(), cluster.read(&volid, 0, 8))).collect()
}

struct Run {
    cluster: Cluster,
    made: Vec<String>,
    counter: u32,
    newid: u32,
}

impl Run {
    fn mark_new(&mut self, before: &BTreeMap<String, Vec<u8>>) {
        for volid in self.cluster.volids() {
            if !before.contains_key(&volid) && self.cluster.read(&volid, 0, 8) == [0; 8] {
                self.counter += 1;
                self.cluster.write(&volid, 0, format!("{:08}", self.counter).as_bytes());
            }
        }
    }

    /// Makes the call; whether it succeeds is Proxmox's affair.
    async fn play(&mut self, act: &Act) {
        let qemu = |vm: usize| format!("/nodes/pve1/qemu/{}", VMS[vm]);
        let scsi = |slot: u8| format!("scsi{slot}");
        let call =
            |method: &'static str, path: String, form: Vec<(&'static str, String)>| (method, path, form);
        let (method, path, form) = match act {
            Act::Alloc(storage) => {
                let (storage, end) = STORAGES[*storage];
                let name = format!("vm-9999-v{}{end}", self.made.len());
                let directory = if end.is_empty() { "" } else { "9999/" };
                self.made.push(format!("{storage}:{directory}{name}"));
                let form = vec![("filename", name), ("vmid", "9999".to_owned()), ("size", "8M".to_owned())];
                call("POST", format!("/nodes/pve1/storage/{storage}/content"), form)
            }
            Act::Attach { vm, slot, volume } => {
                let Some(volid) = self.made.get(*volume) else { return };
                call("PUT", format!("{}/config", qemu(*vm)), vec![(SLOTS[usize::from(*slot)], volid.clone())])
            }
            Act::Own { vm, slot, storage } => {
                let value = format!("{}:0.0078125", STORAGES[*storage].0);
                call("PUT", format!("{}/config", qemu(*vm)), vec![(SLOTS[usize::from(*slot)], value)])
            }
            Act::Unlink { vm, slot, force } => {
                let form = vec![("idlist", scsi(*slot)), ("force", u8::from(*force).to_string())];
                call("PUT", format!("{}/unlink", qemu(*vm)), form)
            }
            Act::DropUnused { vm, index } => {
                call("PUT", format!("{}/config", qemu(*vm)), vec![("delete", format!("unused{index}"))])
            }
            Act::Resize { vm, slot } => {
                let form = vec![("disk", scsi(*slot)), ("size", "+4M".to_owned())];
                call("PUT", format!("{}/resize", qemu(*vm)), form)
            }
            Act::ToStorage { vm, slot, storage, delete } => {
                let storage = STORAGES[*storage].0.to_owned();
                let delete = u8::from(*delete).to_string();
                let form = vec![("disk", scsi(*slot)), ("storage", storage), ("delete", delete)];
                call("POST", format!("{}/move_disk", qemu(*vm)), form)
            }
            Act::ToVm { vm, slot, target } => {
                let form = vec![("disk", scsi(*slot)), ("target-vmid", VMS[*target].to_string())];
                call("POST", format!("{}/move_disk", qemu(*vm)), form)
            }
            Act::Snapshot { vm, name } => {
                call("POST", format!("{}/snapshot", qemu(*vm)), vec![("snapname", format!("s{name}"))])
            }
            Act::DropSnapshot { vm, name } => {
                call("DELETE", format!("{}/snapshot/s{name}", qemu(*vm)), Vec::new())
            }
            Act::Rollback { vm, name } => {
                call("POST", format!("{}/snapshot/s{name}/rollback", qemu(*vm)), Vec::new())
            }
            Act::Clone { vm, full } => {
                self.newid += 1;
                let form = vec![("newid", self.newid.to_string()), ("full", u8::from(*full).to_string())];
                call("POST", format!("{}/clone", qemu(*vm)), form)
            }
            Act::Revert { vm, slot } => {
                call("PUT", format!("{}/config", qemu(*vm)), vec![("revert", scsi(*slot))])
            }
            Act::Destroy { vm } => call("DELETE", qemu(*vm), Vec::new()),
            Act::Delete { volume } => {
                let Some(volid) = self.made.get(*volume) else { return };
                let storage = volid.split(':').next().expect("a storage");
                let volid = volid.replace('/', "%2F");
                call("DELETE", format!("/nodes/pve1/storage/{storage}/content/{volid}"), Vec::new())
            }
            Act::Power { vm, on } => {
                let what = if *on { "start" } else { "stop" };
                call("POST", format!("{}/status/{what}", qemu(*vm)), Vec::new())
            }
        };
        let form: Vec<(&str, &str)> = form.iter().map(|(key, value)| (*key, value.as_str())).collect();
        self.cluster.try_to(method, &path, &form).await;
    }

    /// The marks that the act may lose: those of the volume that is deleted, or of the ones that the VM owns.
    fn may_lose(&self, act: &Act, before: &BTreeMap<String, Vec<u8>>) -> BTreeSet<Vec<u8>> {
        let owned = |vm: usize| {
            let part = format!("vm-{}-", VMS[vm]);
            before.iter().filter(|(volid, _)| volid.contains(&part)).map(|(_, mark)| mark.clone()).collect()
        };
        match act {
            Act::Delete { volume } => {
                self.made.get(*volume).and_then(|volid| before.get(volid)).into_iter().cloned().collect()
            }
            Act::Unlink { vm, force: true, .. } | Act::DropUnused { vm, .. } | Act::Destroy { vm } => {
                owned(*vm)
            }
            // A forced unlink that QEMU did not take is done when the VM stops and starts.
            Act::Power { vm, on: true } => owned(*vm),
            // What a volume held after the snapshot is what a rollback is meant to lose.
            Act::Rollback { .. } => before.values().cloned().collect(),
            _ => BTreeSet::new(),
        }
    }
}

const SLOTS: [&str; 4] = ["scsi0", "scsi1", "scsi2", "scsi3"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn no_volume_is_lost_but_by_the_calls_that_lose_it(acts in proptest::collection::vec(act(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let mut run = Run { cluster: Cluster::wide(), made: Vec::new(), counter: 0, newid: 300 };
            let mut files: BTreeMap<u32, (String, String)> = BTreeMap::new();
            for act in &acts {
                let before = marks(&run.cluster);
                run.play(act).await;
                let after: BTreeSet<Vec<u8>> = marks(&run.cluster).into_values().collect();
                let may_lose = run.may_lose(act, &before);
                for (volid, mark) in &before {
                    prop_assert!(
                        after.contains(mark) || may_lose.contains(mark),
                        "{act:?} loses what {volid} held"
                    );
                }
                run.mark_new(&before);
                for vmid in run.cluster.sim.vmids() {
                    let Some(vm) = run.cluster.sim.vm(vmid) else { continue };
                    let (text, digest) = (vm.conf.render(), vm.conf.digest());
                    prop_assert_eq!(&proxmox_csi::sim::rules::conf::Conf::parse(&text), &vm.conf);
                    if let Some((old, seen)) = files.get(&vmid) {
                        prop_assert_eq!(old == &text, seen == &digest, "the digest of VM {}", vmid);
                    }
                    files.insert(vmid, (text, digest));
                }
            }
            Ok(())
        })?;
    }
}
