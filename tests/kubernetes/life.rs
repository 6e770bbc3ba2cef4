//! A thousand hours of a cluster's life, played by chance: VMs migrated, stopped, suspended, fenced, deleted, restored once and twice,
//! in sight and out of it, copied, and made anew under an old VMID; hosts, servers, regions, privileges, kubelets and the API server lost
//! and regained. Each write to a Node is judged at the moment it is made, by what is true then.
//!
//! A failure names its seed; `LIFE_SEED=<seed>` plays that one alone, `LIFE_LIVES=<count>` plays more. What a life is made of is in
//! `events.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use proxmox_csi::{
    ccm::Settings,
    sim::{Sim, World},
};
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    apiserver::{ApiServer, Change},
    rig::{
        NODES, OUT_OF_SERVICE, Planted, Region, Running, UNINITIALIZED, ZONE, label, new_node, secs,
        set_ready, start_with, taints,
    },
};

mod events;

/// Things that happen in a life, half an hour apart in the mean.
const STEPS: u32 = 300;
/// Lives in the test, of about eight days each.
const LIVES: u64 = 12;
/// How long a look may be old when what follows from it is written: no clock is the same everywhere.
const INSTANT: Duration = Duration::from_secs(15);
/// How long a kubelet is silent before it counts as that, and a VM runs before it is heard of.
const KUBELET: Duration = Duration::from_secs(40);

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

    fn seconds(&mut self, from: u64, to: u64) -> Duration {
        secs(from + self.next() % (to - from + 1))
    }
}

/// A machine that is, or was, a node.
struct Machine {
    name: String,
    region: usize,
    uuid: String,
    /// Its kubelet does not reach the API server, whatever its VM does.
    silent: bool,
    /// Whether its kubelet could be heard, and since when.
    heard: (bool, Instant),
    /// The same, when its Node was last told.
    told: Option<(bool, Instant)>,
}

/// What is true, for the judge.
#[derive(Default)]
struct Truth {
    sims: Vec<(&'static str, Sim)>,
    /// When a VM of this uuid last came to life, or to be.
    alive_since: BTreeMap<String, Instant>,
    /// VMs that the loop can't see.
    unseen: BTreeSet<(usize, u32)>,
    wrong: Vec<String>,
    tally: Tally,
}

/// What happened: a life without some of it has not tried it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    hours: u64,
    deleted: u32,
    given_up: u32,
    taken_back: u32,
    moved: u32,
}

impl Truth {
    /// The VMs that have a uuid: region, VMID, and whether it may write or be started as it is.
    fn of<'a>(&'a self, uuid: &'a str) -> impl Iterator<Item = (usize, u32, bool)> + 'a {
        self.sims.iter().enumerate().flat_map(move |(index, (_, sim))| {
            sim.vmids().into_iter().filter_map(move |vmid| {
                let vm = sim.vm(vmid)?;
                let is_it = vm.conf.uuid().is_some_and(|it| it.eq_ignore_ascii_case(uuid));
                (is_it && vm.current("template") != Some("1"))
                    .then(|| (index, vmid, vm.running || vm.current("lock").is_some()))
            })
        })
    }

    /// Whether the VM of a node may still write. It is the one that is recorded; where that is not there any more, each that has its uuid,
    /// and in any case each of those that can be seen.
    fn may_write(&self, node: &Value, uuid: &str) -> bool {
        let recorded = |region: usize, vmid: u32| {
            let id = format!("proxmox://{}/{vmid}", self.sims[region].0);
            node["spec"]["providerID"].as_str() == Some(id.as_str())
        };
        let all: Vec<_> = self.of(uuid).collect();
        let is_there = all.iter().any(|(region, vmid, _)| recorded(*region, *vmid));
        all.iter().any(|(region, vmid, writes)| {
            let counts = !is_there || recorded(*region, *vmid) || !self.unseen.contains(&(*region, *vmid));
            *writes && counts
        })
    }

    /// Judges a write.
    fn judge(&mut self, change: &Change<'_>) {
        let Some(old) = change.old.filter(|_| change.collection == NODES) else { return };
        let uuid = old["status"]["nodeInfo"]["systemUUID"].as_str().unwrap_or_default().to_owned();
        let just_now = self.alive_since.get(&uuid).is_some_and(|at| at.elapsed() < INSTANT);
        let has = |node: &Value, key: &str| {
            node["spec"]["taints"].as_array().into_iter().flatten().any(|taint| taint["key"] == key)
        };
        let name = change.name;
        if change.deleted {
            self.tally.deleted += 1;
            let there = self.of(&uuid).next();
            if !just_now && let Some((region, vmid, _)) = there {
                let place = self.sims[region].0;
                self.wrong.push(format!("the Node `{name}` of VM {vmid} in {place} was deleted"));
            }
            return;
        }
        if !has(old, OUT_OF_SERVICE) && has(change.new, OUT_OF_SERVICE) {
            self.tally.given_up += 1;
            if !just_now && self.may_write(change.new, &uuid) {
                self.wrong.push(format!("`{name}` was given up while its VM may still write"));
            }
        }
        self.tally.taken_back += u32::from(has(old, OUT_OF_SERVICE) && !has(change.new, OUT_OF_SERVICE));
        let zone = |node: &Value| node["metadata"]["labels"][ZONE].clone();
        self.tally.moved += u32::from(zone(old).is_string() && zone(old) != zone(change.new));
        let addresses = |node: &Value| {
            let all = node["status"]["addresses"].as_array();
            all.into_iter().flatten().filter(|address| address["type"] == "InternalIP").count()
        };
        if addresses(old) > 0 && addresses(change.new) == 0 {
            self.wrong.push(format!("the addresses of `{name}` were blanked"));
        }
    }
}

struct Life {
    seed: u64,
    chance: Chance,
    server: ApiServer,
    regions: Vec<Region>,
    machines: Vec<Machine>,
    truth: Arc<Mutex<Truth>>,
    settings: Settings,
    running: Option<Running>,
    /// What is to happen later on its own.
    due: Vec<(Instant, events::Then)>,
    /// When VMs were last out of everybody's sight.
    blinked: BTreeMap<(usize, u32), Instant>,
    log: Vec<String>,
}

/// Three hosts, and VMs that start wherever they are.
fn world() -> World {
    let mut world = World::builtin();
    world.nodes = ["pve1", "pve2", "pve3"].map(str::to_owned).into();
    world.storages.retain(|storage| storage.id == "local");
    for vm in &mut world.vms {
        vm.config.insert("scsi0".to_owned(), String::new());
    }
    world
}

impl Life {
    fn begin(seed: u64, planted: Option<Planted>, settings: Settings) -> Self {
        let regions = vec![Region::of("r1", world()).with_two_servers(), Region::of("r2", world())];
        let server = ApiServer::default();
        let (mut machines, mut truth) = (Vec::new(), Truth::default());
        for (index, region) in regions.iter().enumerate() {
            region.hands(|hand| (hand.planted, hand.remembers) = (planted, true));
            truth.sims.push((region.name, region.sim.clone()));
            for vmid in [101, 102, 103] {
                let uuid = format!("00000000-0000-4000-8000-000000{index:03}{vmid}");
                region.set_uuid(vmid, &uuid);
                let name = format!("{}-{vmid}", region.name);
                server.put(NODES, new_node(&name, &uuid));
                let heard = (true, Instant::now());
                machines.push(Machine { name, region: index, uuid, silent: false, heard, told: Some(heard) });
            }
        }
        let truth = Arc::new(Mutex::new(truth));
        let judge = Arc::clone(&truth);
        server.on_write(Arc::new(move |change| judge.lock().expect("no panic").judge(change)));
        let mut life = Self {
            seed,
            chance: Chance(seed),
            server,
            regions,
            machines,
            truth,
            settings,
            running: None,
            due: Vec::new(),
            blinked: BTreeMap::new(),
            log: Vec::new(),
        };
        life.restart();
        life
    }

    /// The loop ends, and another one begins that remembers nothing.
    fn restart(&mut self) {
        self.running = None;
        let regions: Vec<&Region> = self.regions.iter().collect();
        self.running = Some(start_with(&self.server, &regions, self.settings.clone()));
    }

    fn touch(&self) {
        self.regions.iter().for_each(Region::touch);
    }

    fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().expect("no panic")
    }

    /// Kubelets live where a VM of theirs runs. Tells whether some change of that is still to come.
    fn kubelets(&mut self) -> bool {
        let now = Instant::now();
        let mut running: BTreeSet<String> = BTreeSet::new();
        for region in &self.regions {
            for vm in region.sim.vmids().into_iter().filter_map(|vmid| region.sim.vm(vmid)) {
                running.extend(vm.conf.uuid().filter(|_| vm.running).map(str::to_owned));
            }
        }
        let mut to_come = false;
        for machine in &mut self.machines {
            let heard = running.contains(&machine.uuid) && !machine.silent;
            if heard != machine.heard.0 {
                machine.heard = (heard, now);
            }
            if machine.told == Some(machine.heard) {
                continue;
            }
            if now.duration_since(machine.heard.1) < KUBELET {
                to_come = true;
                continue;
            }
            machine.told = Some(machine.heard);
            if self.server.get(NODES, &machine.name).is_some() {
                set_ready(&self.server, &machine.name, heard);
            } else if heard {
                self.server.put(NODES, new_node(&machine.name, &machine.uuid));
            }
        }
        // A Node that was deleted is registered again by its kubelet.
        let names = self.server.names(NODES);
        for machine in self.machines.iter().filter(|machine| machine.heard.0) {
            let known = names.binary_search(&machine.name).is_ok();
            if !known && now.duration_since(machine.heard.1) >= KUBELET {
                self.server.put(NODES, new_node(&machine.name, &machine.uuid));
            }
        }
        to_come
    }

    /// Time passes: closely looked at for a while after something happened, and then as it may.
    async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let tick = if self.kubelets() { Instant::now() + secs(10) } else { end };
            let next = self.due.iter().map(|(at, _)| *at).min().unwrap_or(end);
            tokio::time::sleep_until(end.min(tick).min(next)).await;
            while let Some(index) = self.due.iter().position(|(at, _)| *at <= Instant::now()) {
                let (_, then) = self.due.remove(index);
                self.then(then).await;
                self.touch();
            }
        }
        self.kubelets();
        for region in &self.regions {
            region.sim.clear_log();
        }
        self.server.writes();
    }

    /// Whether something went wrong, told with what happened before.
    fn verdict(&self) -> Result<(), String> {
        let truth = self.truth();
        let breaches = self.running.as_ref().map(|running| running.server.breaches()).unwrap_or_default();
        if truth.wrong.is_empty() && breaches.is_empty() {
            return Ok(());
        }
        let last: Vec<&str> = self.log.iter().rev().take(25).rev().map(String::as_str).collect();
        Err(format!("LIFE_SEED={}: {:?} {breaches:?}\n{}", self.seed, truth.wrong, last.join("\n")))
    }

    /// All is well again: what Nodes say is true in the end.
    async fn end(&mut self) {
        self.heal().await;
        self.touch();
        self.pass(Duration::from_mins(10)).await;
        self.settle().await;
        self.touch();
        self.pass(Duration::from_mins(40)).await;
        let seed = self.seed;
        for machine in &self.machines {
            let all: Vec<(usize, u32, bool)> = self.truth().of(&machine.uuid).collect();
            let Some(node) = self.server.get(NODES, &machine.name) else {
                assert!(all.is_empty(), "LIFE_SEED={seed}: `{}` did not come back", machine.name);
                continue;
            };
            if let [(region, vmid, _)] = all[..] {
                let host = self.regions[region].sim.vm(vmid).expect("it is there").node;
                let zone = label(&self.server, &machine.name, ZONE);
                assert_eq!(zone, Some(host), "LIFE_SEED={seed}: `{}`, VM {vmid}", machine.name);
                let taints = taints(&self.server, &machine.name);
                assert!(!taints.contains(UNINITIALIZED), "LIFE_SEED={seed}: `{}`", machine.name);
                assert!(!taints.contains(OUT_OF_SERVICE), "LIFE_SEED={seed}: `{}`", machine.name);
                assert!(node["spec"]["providerID"].is_string(), "LIFE_SEED={seed}: `{}`", machine.name);
            }
        }
    }
}

/// Lives one life; an error is what went wrong in it.
async fn live(seed: u64, steps: u32, planted: Option<Planted>, settings: Settings) -> Result<Tally, String> {
    let begun = Instant::now();
    let mut life = Life::begin(seed, planted, settings);
    life.prepare().await;
    life.pass(secs(60)).await;
    for _ in 0..steps {
        life.step().await;
        life.touch();
        // Mostly soon after the last, so that things coincide; sometimes nothing happens for long.
        let pause = match life.chance.below(8) {
            0 => life.chance.seconds(3600, 8 * 3600),
            1..=3 => life.chance.seconds(60, 300),
            _ => life.chance.seconds(1, 60),
        };
        life.pass(pause).await;
        life.verdict()?;
    }
    if planted.is_none() {
        life.end().await;
        life.verdict()?;
    }
    let mut tally = life.truth().tally;
    tally.hours = begun.elapsed().as_secs() / 3600;
    Ok(tally)
}

/// The settings of a life: everything that can be taken away is, and a poll is rare, so that there is more life in a test.
fn settings() -> Settings {
    Settings { out_of_service: true, interval: secs(60), ..Settings::default() }
}

fn lived<T>(life: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(life)
}

/// Lives these lives on two threads, each life in a runtime of its own.
fn lives(seeds: &[u64], planted: Option<Planted>, settings: &Settings) -> Vec<Result<Tally, String>> {
    std::thread::scope(|scope| {
        let halves = seeds.chunks(seeds.len().div_ceil(2).max(1));
        let threads: Vec<_> = halves
            .map(|half| {
                scope.spawn(move || {
                    half.iter()
                        .map(|seed| lived(live(*seed, STEPS, planted, settings.clone())))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("its panic is told above")).collect()
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn no_chance_deletes_the_node_of_a_vm_or_gives_up_one_that_may_write() {
    let seeds: Vec<u64> = match number("LIFE_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("LIFE_LIVES").unwrap_or(LIVES)).collect(),
    };
    let mut all = Tally::default();
    for result in lives(&seeds, None, &settings()) {
        let tally = result.unwrap_or_else(|wrong| panic!("{wrong}"));
        all.hours += tally.hours;
        all.deleted += tally.deleted;
        all.given_up += tally.given_up;
        all.taken_back += tally.taken_back;
        all.moved += tally.moved;
    }
    println!("{} lives: {all:?}", seeds.len());
    if seeds.len() > 1 {
        let each = [all.deleted, all.given_up, all.taken_back, all.moved];
        assert!(each.iter().all(|count| *count >= 10), "too little happened: {all:?}");
    }
}

#[test]
fn a_life_replays_from_its_seed() {
    let once = || lived(live(7, 60, None, settings()));
    let life = once();
    assert!(life.is_ok(), "{life:?}");
    assert_eq!(life, once());
}

/// Each safeguard, taken out of the loop, lets some life end badly: so the lives do try it.
#[track_caller]
fn caught(planted: Option<Planted>, settings: &Settings) {
    for seeds in (1..=LIVES).collect::<Vec<_>>().chunks(2) {
        if let Some(wrong) = lives(seeds, planted, settings).into_iter().find_map(Result::err) {
            println!("caught: {}", wrong.lines().next().unwrap_or_default());
            return;
        }
    }
    panic!("{planted:?} was not caught in {LIVES} lives");
}

#[test]
fn a_life_without_the_oracle_ends_badly() {
    caught(Some(Planted::Oracle), &settings());
}

#[test]
fn a_life_without_the_quorum_ends_badly() {
    caught(Some(Planted::Quorum), &settings());
}

#[test]
fn a_life_without_the_proof_of_sight_ends_badly() {
    caught(Some(Planted::Sight), &settings());
}
