//! Lives of volumes on a node by chance: calls in legal and illegal order, disks pulled and plugged in again, power losses, restarts of the
//! plugin, disks that fail for a while. After each step what must hold holds; once nothing fails any more, everything can be used and
//! taken away. A failure prints its seed: `SEED=n` runs it again, `LIVES=n` more of them.

mod node_suite;

use std::{sync::Arc, time::Duration};

use node_suite::{KEY, MIB, Volume, filesystem, node_options};
use proxmox_csi::{
    node::{Access, MountPath, Node, Publish, Stage},
    sim::{
        Image,
        guest::memory::{Drive, Machine, Volume as OnDisk},
    },
};
use tokio::time::timeout;

/// `SplitMix64`: the same numbers for the same seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(u64::try_from(end).expect("a length"))).expect("an index")
    }
}

/// A volume and what is known of it.
#[expect(clippy::struct_excessive_bools, reason = "each is a condition of its own, in any combination")]
struct Known {
    volume: Volume,
    fs: &'static str,
    encrypted: bool,
    raw: bool,
    image: Image,
    plugged: bool,
    /// Whether it was staged with success.
    staged: bool,
    uuid: Option<uuid::Uuid>,
    /// What a pod has written out, and what it wrote after that.
    kept: Option<String>,
    maybe: Vec<String>,
}

const SIZE: u64 = 512 * MIB;

impl Known {
    fn new(index: usize, chance: &mut Chance) -> Self {
        let staging = MountPath::new(&format!("/var/lib/kubelet/staging/{index}")).expect("a path");
        let lun = u8::try_from(index + 1).expect("few");
        Self {
            volume: Volume::new(&format!("pvc-{index}"), lun, SIZE, staging),
            fs: ["ext4", "xfs", "btrfs"][chance.index(3)],
            encrypted: chance.below(3) == 0,
            raw: chance.below(4) == 0,
            image: Image::default(),
            plugged: false,
            staged: false,
            uuid: None,
            kept: None,
            maybe: Vec::new(),
        }
    }

    fn slot(&self) -> u32 {
        u32::from(self.volume.published.slot.expect("it has a slot").index())
    }

    fn target(&self, number: u64) -> MountPath {
        MountPath::new(&format!("/var/lib/kubelet/pods/{number}/{}", self.volume.name)).expect("a path")
    }

    fn access(&self) -> Access {
        if self.raw { Access::Block } else { filesystem(self.fs) }
    }

    fn stage(&self) -> Stage {
        let stage = if self.encrypted {
            self.volume.stage_encrypted(self.fs, KEY)
        } else {
            self.volume.stage(self.fs)
        };
        Stage { access: self.access(), ..stage }
    }

    fn publish(&self, number: u64) -> Publish {
        let target = self.target(number);
        Publish { access: self.access(), encrypted: self.encrypted, ..self.volume.publish(&target) }
    }

    fn drive(&self) -> Drive {
        let wwn = u64::from_str_radix(self.volume.published.wwn.to_string().trim_start_matches("0x"), 16);
        Drive { image: self.image.clone(), size: SIZE, wwn: wwn.ok(), readonly: false }
    }
}

struct Life {
    machine: Machine,
    node: Node,
    volumes: Vec<Known>,
    history: Vec<String>,
}

/// How long the kubelet waits for an answer.
const PATIENCE: Duration = Duration::from_mins(2);

impl Life {
    fn new(chance: &mut Chance) -> Self {
        let machine = Machine::new(None).patient_for(Duration::from_secs(1));
        let node = node_over(&machine);
        let volumes = (0..3).map(|index| Known::new(index, chance)).collect();
        Self { machine, node, volumes, history: Vec::new() }
    }

    fn note(&mut self, what: String) {
        self.history.push(what);
    }

    async fn step(&mut self, chance: &mut Chance) {
        let at = chance.index(self.volumes.len());
        let (name, slot) = (self.volumes[at].volume.name.clone(), self.volumes[at].slot());
        let number = chance.below(2);
        match chance.below(24) {
            0..=4 => {
                let call = timeout(PATIENCE, self.node.stage(&self.volumes[at].stage())).await;
                self.volumes[at].staged |= matches!(call, Ok(Ok(())));
                self.note(format!("stage {name}: {call:?}"));
            }
            5..=8 => {
                let call = timeout(PATIENCE, self.node.publish(&self.volumes[at].publish(number))).await;
                self.note(format!("publish {name} {number}: {call:?}"));
            }
            9 | 10 => {
                let known = &self.volumes[at];
                let unpublish = known.volume.unpublish(&known.target(number));
                let call = timeout(PATIENCE, self.node.unpublish(&unpublish)).await;
                self.note(format!("unpublish {name} {number}: {call:?}"));
            }
            11 | 12 => {
                let call = timeout(PATIENCE, self.node.unstage(&self.volumes[at].volume.unstage())).await;
                if matches!(call, Ok(Ok(()))) {
                    self.is_clean(at, "unstaged");
                }
                self.note(format!("unstage {name}: {call:?}"));
            }
            13 | 14 => self.write(at, chance),
            15 => {
                let stats = timeout(PATIENCE, self.node.condition(&self.volumes[at].volume.staging)).await;
                self.note(format!("condition {name}: {stats:?}"));
            }
            16 | 17 => {
                let known = &mut self.volumes[at];
                if known.plugged {
                    self.machine.unplug(slot);
                } else if chance.below(2) == 0 {
                    self.machine.plug(slot, known.drive());
                } else {
                    self.machine.plug_quietly(slot, known.drive());
                }
                known.plugged = !known.plugged;
                let what = if known.plugged { "plugged in" } else { "pulled" };
                self.note(format!("{name} is {what}"));
            }
            18 => {
                self.machine.restart();
                self.note("power loss".to_owned());
            }
            19 => {
                self.machine.end_process();
                self.node = node_over(&self.machine);
                self.note("the plugin was started anew".to_owned());
            }
            20 => {
                // It dies in the midst of whatever it does.
                let after = Duration::from_millis(chance.below(700));
                let call = timeout(after, self.node.stage(&self.volumes[at].stage())).await;
                let died = call.is_err();
                self.machine.end_process();
                self.node = node_over(&self.machine);
                self.note(format!("stage {name}, and the plugin ended after {after:?}: {died}"));
                if died {
                    self.make_again(at);
                }
                self.volumes[at].staged |= matches!(call, Ok(Ok(())));
            }
            21 => {
                let place = chance.below(SIZE);
                self.machine.break_at(slot, place..place + 4096);
                self.note(format!("{name} fails at {place}"));
            }
            22 => {
                self.machine.repair(slot);
                self.note(format!("{name} answers again"));
            }
            _ => {
                self.machine.set_state(slot, if chance.below(2) == 0 { "offline" } else { "running" });
                self.note(format!("{name} changes its state"));
            }
        }
    }

    /// A first stage that was cut off may leave half a file system, which is refused for ever: an administrator makes the volume again.
    fn make_again(&mut self, at: usize) {
        let known = &mut self.volumes[at];
        if !known.image.is_blank() && !known.staged {
            self.machine.unplug(known.slot());
            known.plugged = false;
            known.image.truncate(0);
            known.uuid = None;
            self.history.push("an administrator makes the volume again".to_owned());
        }
    }

    /// A pod writes, and maybe writes out.
    fn write(&mut self, at: usize, chance: &mut Chance) {
        let text = format!("{}", chance.below(1000));
        let known = &mut self.volumes[at];
        if known.raw {
            return;
        }
        let staged = known.volume.staging.as_path().join("data");
        let is_mounted =
            self.machine.table().iter().any(|mount| mount.target == known.volume.staging.as_path());
        if !is_mounted || self.machine.write(&staged, text.as_bytes()).is_err() {
            return;
        }
        known.maybe.push(text.clone());
        let before = OnDisk::read(&known.image, SIZE);
        self.machine.sync_all();
        // In plain text it can be seen whether it came there.
        let after = OnDisk::read(&known.image, SIZE);
        let there = |found: &Option<OnDisk>| {
            found.as_ref().and_then(|found| found.files.get(std::path::Path::new("/data")))
                == Some(&text.clone().into_bytes())
        };
        if there(&after) && (!there(&before) || known.kept.is_none()) {
            known.kept = Some(text.clone());
            known.maybe.clear();
        }
        let name = known.volume.name.clone();
        self.note(format!("a pod of {name} writes {text}"));
    }

    fn is_clean(&self, at: usize, what: &str) {
        let known = &self.volumes[at];
        let staging = known.volume.staging.as_path();
        assert!(
            self.machine.table().iter().all(|mount| mount.target != staging),
            "{what}: {:#?}",
            self.history
        );
        assert_eq!(self.machine.name_in_slot(known.slot()), None, "{what}: {:#?}", self.history);
    }

    /// What holds after each step.
    fn check(&mut self) {
        for known in &mut self.volumes {
            let targets = [known.volume.staging.clone(), known.target(0), known.target(1)];
            for path in &targets {
                let there =
                    self.machine.table().iter().filter(|mount| mount.target == path.as_path()).count();
                assert!(there <= 1, "{path} is mounted {there} times: {:#?}", self.history);
            }
            let now = OnDisk::read(&known.image, SIZE).map(|found| found.uuid);
            assert!(
                known.uuid.is_none() || known.uuid == now,
                "{} was formatted again: {:#?}",
                known.volume.name,
                self.history
            );
            known.uuid = now;
        }
    }

    /// Nothing fails any more: the kubelet takes everything away, and the volumes can be used.
    async fn quiesce(&mut self) {
        for at in 0..self.volumes.len() {
            let slot = self.volumes[at].slot();
            if !self.volumes[at].plugged {
                self.machine.plug(slot, self.volumes[at].drive());
                self.volumes[at].plugged = true;
            }
            self.machine.repair(slot);
            self.machine.set_state(slot, "running");
        }
        // Pods first: the node of a raw disk that was pulled is that of whatever has its number by now.
        for known in &self.volumes {
            for number in 0..2 {
                let unpublish = known.volume.unpublish(&known.target(number));
                let call = self.node.unpublish(&unpublish).await;
                assert!(call.is_ok(), "{call:?}: {:#?}", self.history);
            }
        }
        for at in 0..self.volumes.len() {
            let known = &self.volumes[at];
            let call = self.node.unstage(&known.volume.unstage()).await;
            assert!(call.is_ok(), "{} does not go: {call:?}: {:#?}", known.volume.name, self.history);
            self.is_clean(at, "in the end");
        }
        assert!(self.machine.mapping_names().is_empty(), "{:#?}", self.history);
        for known in &self.volumes {
            let call = self.node.stage(&known.stage()).await;
            assert!(call.is_ok(), "{} can not be used: {call:?}: {:#?}", known.volume.name, self.history);
            if let (false, Some(kept)) = (known.raw, &known.kept) {
                let data = self.machine.read(&known.volume.staging.as_path().join("data"));
                let data = String::from_utf8(data.expect("it was written out")).expect("text");
                let legal = data == *kept || known.maybe.contains(&data);
                assert!(legal, "{} lost {kept} and has {data}: {:#?}", known.volume.name, self.history);
            }
        }
    }
}

fn node_over(machine: &Machine) -> Node {
    Node::new(Arc::new(machine.clone()), node_options())
}

async fn live(seed: u64) {
    let mut chance = Chance(seed);
    let mut life = Life::new(&mut chance);
    life.note(format!("SEED={seed}"));
    for known in &life.volumes {
        let (name, fs) = (&known.volume.name, known.fs);
        life.history.push(format!("{name}: {fs}, raw {}, encrypted {}", known.raw, known.encrypted));
    }
    for _ in 0..60 {
        life.step(&mut chance).await;
        life.check();
    }
    life.quiesce().await;
    life.check();
}

#[tokio::test(start_paused = true)]
async fn p8_whatever_happened_to_a_node_its_volumes_keep_their_data_and_can_be_taken_away() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("SEED") {
        return live(seed).await;
    }
    for seed in 0..number("LIVES").unwrap_or(300) {
        live(seed).await;
    }
}
