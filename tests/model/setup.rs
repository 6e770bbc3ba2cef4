//! The cluster that a seed stands for: its nodes, storages and VMs, and the volumes that are going to be made.

use std::collections::BTreeMap;

use proxmox_csi::sim::{
    World,
    state::VolumeKey,
    world::{Guest, Kind, Storage, Vm},
};

use crate::{chance::Chance, support::REGION};

/// A volume that may be made.
#[derive(Debug, Clone)]
pub struct VolumeSpec {
    /// What the provisioner calls it.
    pub name: String,
    /// Where it is, when it is.
    pub key: VolumeKey,
    /// Its handle, when it is there.
    pub handle: String,
    /// Whether many nodes may read it, and none write.
    pub many: bool,
}

/// A VM as it is at the start.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its VMID.
    pub vmid: u32,
    /// The index of its node.
    pub node: usize,
    /// Whether it is a Kubernetes node.
    pub is_worker: bool,
}

/// A cluster and its volumes.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Names of the nodes.
    pub nodes: Vec<String>,
    /// Ids of the storages, and whether they are shared.
    pub storages: Vec<(String, bool)>,
    /// The VMs.
    pub vms: Vec<VmSpec>,
    /// The volumes.
    pub volumes: Vec<VolumeSpec>,
    /// Whether the token may make holder VMs.
    pub holders: bool,
    /// What the simulator runs.
    pub world: World,
}

/// The uuid of a VM, of which there may be several one after the other under one VMID.
pub fn uuid(vmid: u32, generation: u32) -> String {
    format!("00000000-0000-4000-8000-{generation:04}{vmid:08}")
}

/// The config that a VM has from the start; `boot` is its storage.
pub fn config(vmid: u32, boot: &str, generation: u32, data: Option<&str>) -> BTreeMap<String, String> {
    let disk = |storage: &str, number: u32, size: &str| {
        let owner = if storage == "files" || storage == "nfs" { format!("{vmid}/") } else { String::new() };
        let ending = if owner.is_empty() { "" } else { ".raw" };
        format!("{storage}:{owner}vm-{vmid}-disk-{number}{ending},size={size}")
    };
    let mut config = BTreeMap::from([
        ("scsi0".to_owned(), disk(boot, 0, "1G")),
        ("smbios1".to_owned(), format!("uuid={}", uuid(vmid, generation))),
        ("tags".to_owned(), "of-others".to_owned()),
        ("description".to_owned(), "kept by others".to_owned()),
    ]);
    if let Some(storage) = data {
        config.insert("scsi2".to_owned(), disk(storage, 1, "2G"));
    }
    config
}

impl Setup {
    /// The cluster of a seed.
    pub fn of(seed: u64) -> Self {
        let mut chance = Chance::new(seed ^ 0x5E7A);
        let nodes: Vec<String> = (1..=chance.within(2, 4)).map(|n| format!("pve{n}")).collect();
        let storages: Vec<(&str, Kind, bool)> = vec![
            ("files", Kind::Dir, false),
            ("thin", Kind::Lvmthin, false),
            ("nfs", Kind::Nfs, true),
            ("ceph", Kind::Rbd, true),
        ];
        let mut vms = Vec::new();
        let mut world = World::builtin();
        world.nodes.clone_from(&nodes);
        world.storages = storages
            .iter()
            .map(|(id, kind, shared)| Storage {
                id: (*id).to_owned(),
                kind: *kind,
                shared: *shared,
                // A directory that lists nothing at all may be one that is not mounted.
                is_mountpoint: kind.is_directory(),
                capacity: "100G".to_owned(),
                content: "images".to_owned(),
                enabled: true,
                ..Storage::default()
            })
            .collect();
        world.vms = Vec::new();
        let count = chance.within(3, 8);
        for number in 0..count {
            let vmid = 101 + u32::try_from(number).expect("small");
            let node = chance.below(nodes.len());
            let boot = *chance.pick(&["files", "thin", "ceph", "nfs", "ceph"]);
            let data = chance.percent(30).then(|| *chance.pick(&["thin", "ceph"]));
            let is_worker = number < 2 || chance.percent(80);
            let mut config = config(vmid, boot, 0, data);
            if chance.percent(20) {
                config.insert("scsihw".to_owned(), "virtio-scsi-pci".to_owned());
            }
            world.vms.push(Vm {
                vmid,
                node: nodes[node].clone(),
                name: format!("worker-{vmid}"),
                running: chance.percent(90),
                guest: Guest::Memory,
                config,
                pool: None,
                hastate: None,
            });
            vms.push(VmSpec { vmid, node, is_worker });
        }
        let count = if chance.percent(70) { chance.within(5, 12) } else { chance.within(13, 50) };
        let volumes = (0..count).map(|number| {
            let (storage, _, shared) = *chance.pick(&storages);
            let host = &nodes[chance.pick(&vms).node];
            let zone = (!shared).then(|| host.clone());
            let name = format!("pvc-{number}");
            let is_file = matches!(storage, "files" | "nfs");
            let disk = if is_file { format!("9999/vm-9999-{name}.raw") } else { format!("vm-9999-{name}") };
            VolumeSpec {
                handle: format!("{REGION}/{}/{storage}/{disk}", zone.as_deref().unwrap_or_default()),
                key: VolumeKey { storage: storage.to_owned(), node: zone, name: disk },
                name,
                many: shared && chance.percent(20),
            }
        });
        let volumes = volumes.collect();
        Self {
            nodes,
            storages: storages.iter().map(|(id, _, shared)| ((*id).to_owned(), *shared)).collect(),
            vms,
            volumes,
            holders: chance.percent(80),
            world,
        }
    }
}
