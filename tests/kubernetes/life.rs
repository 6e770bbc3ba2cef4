//! Hours of a cluster's life, played by chance: VMs migrated, stopped, suspended, restored, deleted and re-created, hosts, regions,
//! privileges and the API server lost and regained. What must never happen is looked for after every second.
//!
//! A failure names its seed; `LIFE_SEED=<seed>` plays that one alone, `LIFE_SEEDS=<count>` plays more.

use std::collections::{BTreeMap, BTreeSet};

use proxmox_csi::ccm::Settings;
use serde_json::json;
use tokio::time::sleep;

use crate::{
    apiserver::ApiServer,
    rig::{
        NODES, OUT_OF_SERVICE, Region, ZONE, admin, label, new_node, node, secs, set_ready, start_with,
        taints,
    },
};

/// Things that happen in a life, 45 s apart in the mean.
const STEPS: u32 = 200;

/// splitmix64: replays from its seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n).expect("small")).expect("small")
    }
}

/// A machine that is, or was, a node.
struct Machine {
    name: String,
    region: usize,
    uuid: String,
    /// The VM, while there is one.
    vmid: Option<u32>,
}

struct Life {
    seed: u64,
    chance: Chance,
    server: ApiServer,
    regions: Vec<Region>,
    machines: Vec<Machine>,
    hidden: Vec<BTreeSet<u32>>,
    given_up: BTreeSet<String>,
    deleted: BTreeSet<String>,
    /// Nodes that were deleted, and given up: what a run without any has not tried.
    counts: (u32, u32),
    log: Vec<String>,
}

impl Life {
    async fn begin(seed: u64) -> Self {
        let regions = vec![Region::new("r1"), Region::new("r2")];
        let server = ApiServer::default();
        let mut machines = Vec::new();
        for (index, region) in regions.iter().enumerate() {
            for vmid in [101, 102, 103] {
                let uuid = format!("00000000-0000-4000-8000-000000{index:03}{vmid}");
                region.sim.set_vm_key(vmid, "smbios1", Some(&format!("uuid={uuid}")));
                let name = format!("{}-{vmid}", region.name);
                server.put(NODES, new_node(&name, &uuid));
                machines.push(Machine { name, region: index, uuid, vmid: Some(vmid) });
            }
        }
        sleep(secs(1)).await;
        let hidden = vec![BTreeSet::new(), BTreeSet::new()];
        Self {
            seed,
            chance: Chance(seed),
            server,
            regions,
            machines,
            hidden,
            given_up: BTreeSet::new(),
            deleted: BTreeSet::new(),
            counts: (0, 0),
            log: Vec::new(),
        }
    }

    fn region(&self, machine: usize) -> Region {
        self.regions[self.machines[machine].region].clone()
    }

    /// Every misfortune ends.
    fn heal(&mut self) {
        self.server.set_down(false);
        for (region, hidden) in self.regions.iter().zip(&mut self.hidden) {
            region.sim.clear_faults();
            region.set_dead(false);
            hidden.clear();
            region.hide(&[]);
        }
    }

    /// Something happens.
    async fn step(&mut self) {
        // Most misfortunes come alone, or nothing else could be seen behind them.
        if self.chance.below(3) > 0 {
            self.heal();
        }
        let index = self.chance.below(self.machines.len());
        let region = self.region(index);
        let vmid = self.machines[index].vmid;
        let host = ["pve1", "pve2"][self.chance.below(2)];
        let on = self.chance.below(2) == 0;
        let kind = self.chance.below(16);
        self.log.push(format!("{kind} {} {vmid:?} {host} {on}", self.machines[index].name));
        match (kind, vmid) {
            (0 | 1, Some(vmid)) => drop(region.sim.move_vm(vmid, host)),
            (2 | 3, Some(vmid)) => drop(region.sim.stop_vm(vmid).await),
            (4 | 5, Some(vmid)) => {
                region.sim.set_vm_key(vmid, "lock", None);
                // It may run already, or its host be dead.
                drop(region.sim.start_vm(vmid).await);
            }
            (6, Some(vmid)) => {
                region.sim.set_vm_key(vmid, "lock", Some("suspended"));
                region.sim.stop_vm(vmid).await;
            }
            (7, Some(vmid)) => {
                region.sim.stop_vm(vmid).await;
                region.sim.forget_vm(vmid);
                self.machines[index].vmid = None;
            }
            // Restored under its VMID, or another VM made there.
            (8 | 9, None) => {
                let vmid: u32 =
                    self.machines[index].name[3..].parse().expect("the name ends in the first VMID");
                region.sim.clear_faults();
                let uuid =
                    if on { self.machines[index].uuid.clone() } else { uuid::Uuid::new_v4().to_string() };
                let form = format!("vmid={vmid}&name=again&smbios1=uuid%3D{uuid}");
                if region.sim.vm(vmid).is_none() {
                    admin(&region, "POST", &format!("/nodes/{host}/qemu"), &form).await;
                    sleep(secs(2)).await;
                    if on {
                        self.machines[index].vmid = Some(vmid);
                        if self.server.get(NODES, &self.machines[index].name).is_none() {
                            self.server.put(NODES, new_node(&self.machines[index].name, &uuid));
                        }
                    }
                }
            }
            (10, _) => {
                let hidden = &mut self.hidden[self.machines[index].region];
                if let (true, Some(vmid)) = (on, vmid) {
                    hidden.insert(vmid);
                } else {
                    hidden.clear();
                }
                region.hide(&hidden.iter().copied().collect::<Vec<_>>());
            }
            (11, _) => region.set_dead(on),
            (12, _) => region.fault(json!({"fault": "kill_node", "node": host, "on": on})),
            (13, _) => region.fault(json!({"fault": "expire_token", "token": "csi@pve!csi", "on": on})),
            (14, _) => self.server.set_down(on),
            (15, _) => self.server.compact(),
            _ => {}
        }
    }

    /// Kubelets live where their VMs run.
    fn kubelets(&self) {
        for machine in &self.machines {
            let region = &self.regions[machine.region];
            let runs = machine.vmid.and_then(|vmid| region.sim.vm(vmid)).is_some_and(|vm| vm.running);
            let Some(node) = self.server.get(NODES, &machine.name) else { continue };
            if (node["status"]["conditions"][0]["status"] == "True") != runs {
                set_ready(&self.server, &machine.name, runs);
            }
        }
    }

    fn judge(&mut self) {
        let tell = |what: &str, log: &[String]| {
            let last = log.iter().rev().take(30).rev().cloned().collect::<Vec<_>>().join("\n");
            panic!("LIFE_SEED={}: {what}\n{last}", self.seed)
        };
        for machine in &self.machines {
            let vm = machine.vmid.and_then(|vmid| self.regions[machine.region].sim.vm(vmid));
            let Some(_) = self.server.get(NODES, &machine.name) else {
                if vm.is_some() {
                    tell(&format!("the Node `{}` of a VM that exists was deleted", machine.name), &self.log);
                }
                self.counts.0 += u32::from(self.deleted.insert(machine.name.clone()));
                continue;
            };
            self.deleted.remove(&machine.name);
            let given_up = taints(&self.server, &machine.name).contains(OUT_OF_SERVICE);
            if given_up && self.given_up.insert(machine.name.clone()) {
                self.counts.1 += 1;
                let may_write = vm.is_some_and(|vm| vm.running || vm.current("lock").is_some());
                if may_write {
                    tell(&format!("`{}` was given up while its VM may still write", machine.name), &self.log);
                }
            } else if !given_up {
                self.given_up.remove(&machine.name);
            }
        }
    }

    /// All is well again: what Nodes say is true.
    async fn end(&mut self) {
        self.heal();
        for _ in 0..600 {
            sleep(secs(1)).await;
            self.kubelets();
            self.judge();
        }
        let mut truth = BTreeMap::new();
        for machine in &self.machines {
            let Some(vmid) = machine.vmid else { continue };
            let vm = self.regions[machine.region].sim.vm(vmid).expect("it is recorded");
            truth.insert(machine.name.clone(), vm.node);
        }
        for (name, host) in truth {
            assert_eq!(label(&self.server, &name, ZONE), Some(host), "LIFE_SEED={}: `{name}`", self.seed);
            let id = node(&self.server, &name)["spec"]["providerID"].clone();
            assert!(id.is_string(), "LIFE_SEED={}: `{name}` has no providerID", self.seed);
        }
    }
}

async fn live(seed: u64, steps: u32) -> (u32, u32) {
    let mut life = Life::begin(seed).await;
    let regions: Vec<Region> = life.regions.clone();
    let settings = Settings { out_of_service: true, ..Settings::default() };
    let _running = start_with(&life.server, &regions.iter().collect::<Vec<_>>(), settings);
    sleep(secs(10)).await;
    for _ in 0..steps {
        life.step().await;
        life.judge();
        for _ in 0..=life.chance.below(90) {
            sleep(secs(1)).await;
            life.kubelets();
            life.judge();
        }
    }
    life.end().await;
    life.counts
}

#[tokio::test(start_paused = true)]
async fn no_chance_deletes_a_living_node_or_gives_up_one_that_may_write() {
    if let Ok(seed) = std::env::var("LIFE_SEED") {
        live(seed.parse().expect("LIFE_SEED is a number"), STEPS).await;
        return;
    }
    let seeds = std::env::var("LIFE_SEEDS").map_or(2, |text| text.parse().expect("LIFE_SEEDS is a number"));
    let mut all = (0, 0);
    for seed in 1..=seeds {
        let (deleted, given_up) = live(seed, STEPS).await;
        all = (all.0 + deleted, all.1 + given_up);
    }
    assert!(all.0 > 0 && all.1 > 0, "nothing was deleted or given up: {all:?}");
    println!("{seeds} lives: {} nodes deleted, {} given up", all.0, all.1);
}
