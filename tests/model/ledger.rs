//! What the model remembers beside the simulator's state: what was asked for and answered, and what others than the driver did.
//!
//! The invariants excuse nothing but what stands here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    time::Duration,
};

use proxmox_csi::sim::state::VolumeKey;
use tokio::time::Instant;

use crate::{
    chance::Chance,
    plan::{Cut, Kind},
};

/// An invariant that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Its name.
    pub invariant: &'static str,
    /// What is the case instead.
    pub text: String,
}

/// Somebody who is not the driver changed something.
#[derive(Debug, Clone)]
pub struct Touch {
    /// When it began.
    pub from: Instant,
    /// When it ended; `None` while it is under way.
    pub to: Option<Instant>,
    /// The VM.
    pub vm: Option<u32>,
    /// The volume; nothing of both: everything.
    pub volume: Option<usize>,
}

/// A call to a controller.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The controller: each that ever began has its own number.
    pub controller: u32,
    /// Which call.
    pub kind: Kind,
    /// Of which volume.
    pub volume: usize,
    /// For which VM.
    pub vm: u32,
    /// When it was made.
    pub begun: Instant,
    /// When its caller heard or gave up.
    pub ended: Option<Instant>,
    /// Whether it was answered.
    pub answered: bool,
}

/// How long a call may be at work after its caller gave up.
const LONGEST_WORK: Duration = Duration::from_mins(10);

/// What became of a volume, as its callers know it.
#[derive(Debug, Clone, Default)]
pub struct Life {
    /// How its creation was answered last.
    pub created: Created,
    /// Whether a deletion was asked for since it was made.
    pub deletion: bool,
    /// VMs it was published to, where nothing says that it left.
    pub published: BTreeSet<u32>,
    /// How a publication was answered, and when.
    pub contexts: BTreeMap<(u32, bool), (Instant, BTreeMap<String, String>)>,
}

/// What is known of a volume's creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Created {
    /// It was not asked for, or refused for good, or the volume was deleted.
    #[default]
    No,
    /// It was asked for and nothing final was heard: the provisioner asks again.
    Unknown,
    /// It is there.
    Yes,
}

/// A cut that waits for its request.
#[derive(Debug, Clone)]
pub struct Armed {
    /// How.
    pub cut: Cut,
    /// Only requests that change something.
    pub writes: bool,
    /// How many to let pass.
    pub skip: u32,
}

/// Requests and answers are lost by chance.
#[derive(Debug, Clone)]
pub struct Chaos {
    pub chance: Chance,
    /// So many of a hundred.
    pub percent: u64,
    pub until: Instant,
}

/// What of a VM is not the driver's.
pub type Foreign = BTreeMap<String, String>;

/// All of it.
pub struct Ledger {
    start: Instant,
    /// What happened, a line each.
    pub lines: Vec<String>,
    /// A hash over everything that happened, requests and answers too.
    pub hash: u64,
    /// The first invariant that did not hold.
    pub wrong: Option<Wrong>,
    /// What others changed.
    pub touches: Vec<Touch>,
    /// What was asked for.
    pub asked: Vec<Asked>,
    /// The volumes.
    pub lives: Vec<Life>,
    /// Volumes that somebody plugged into a VM by hand, and since when that was so; `None` while it is under way.
    pub by_hand: BTreeMap<(usize, u32), Option<Instant>>,
    /// What VMs have that is of others.
    pub foreign: BTreeMap<u32, Foreign>,
    /// Volumes of others, with their sizes.
    pub foreign_volumes: BTreeMap<VolumeKey, u64>,
    /// How many acts on a VM are under way.
    pub busy: BTreeMap<u32, u32>,
    /// Cuts that wait.
    pub cuts: Vec<Armed>,
    /// Losses by chance.
    pub chaos: Option<Chaos>,
    /// VMs that a controller wrote to, by controller.
    pub written: BTreeSet<(u32, u32)>,
    /// Snapshots that were taken, by VM.
    pub snapshots: BTreeMap<u32, Vec<String>>,
    /// Requests of controllers.
    pub requests: u64,
    /// Answers by call and code.
    pub answers: BTreeMap<String, u64>,
    /// Goes up with everything that needs a new name.
    pub counter: u32,
}

impl Ledger {
    pub fn new(volumes: usize) -> Self {
        Self {
            start: Instant::now(),
            lines: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            wrong: None,
            touches: Vec::new(),
            asked: Vec::new(),
            lives: vec![Life::default(); volumes],
            by_hand: BTreeMap::new(),
            foreign: BTreeMap::new(),
            foreign_volumes: BTreeMap::new(),
            busy: BTreeMap::new(),
            cuts: Vec::new(),
            chaos: None,
            written: BTreeSet::new(),
            snapshots: BTreeMap::new(),
            requests: 0,
            answers: BTreeMap::new(),
            counter: 0,
        }
    }

    /// A number that was not given out before.
    pub fn number(&mut self) -> u32 {
        self.counter += 1;
        self.counter
    }

    /// Adds to the hash. FNV-1a, as the same seed has to give the same on every machine.
    pub fn mix(&mut self, text: &[u8]) {
        let now = self.start.elapsed().as_nanos().to_le_bytes();
        for byte in now.iter().chain(text) {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Something happened that is worth a line.
    pub fn say(&mut self, text: &str) {
        self.mix(text.as_bytes());
        let mut line = String::new();
        let _ = write!(line, "{:>9.3} s  {text}", self.start.elapsed().as_secs_f64());
        self.lines.push(line);
    }

    /// An invariant does not hold. The first one is kept: others follow from it.
    pub fn wrong(&mut self, invariant: &'static str, text: String) {
        if self.wrong.is_none() {
            self.say(&format!("WRONG: {invariant}: {text}"));
            self.wrong = Some(Wrong { invariant, text });
        }
    }

    /// Others begin to change something; returns what ends it.
    pub fn touch(&mut self, vm: Option<u32>, volume: Option<usize>) -> usize {
        self.touches.push(Touch { from: Instant::now(), to: None, vm, volume });
        self.touches.len() - 1
    }

    /// They have changed it.
    pub fn touched(&mut self, touch: usize) {
        self.touches[touch].to = Some(Instant::now());
    }

    /// Whether others changed the VM or the volume since, or are about it.
    pub fn is_touched(&self, since: Instant, vm: Option<u32>, volume: usize) -> bool {
        self.touches.iter().any(|touch| {
            let about = match (touch.vm, touch.volume) {
                (None, None) => true,
                (of, volumes) => (of.is_some() && of == vm) || volumes == Some(volume),
            };
            about && touch.to.is_none_or(|to| to >= since)
        })
    }

    /// The calls that may be at work in a controller.
    pub fn at_work(&self, controller: u32) -> impl Iterator<Item = &Asked> {
        self.asked.iter().filter(move |asked| {
            asked.controller == controller
                && !asked.answered
                && asked.ended.is_none_or(|ended| ended.elapsed() < LONGEST_WORK)
        })
    }

    /// Since when a controller may have been at work on a call of this kind.
    pub fn at_work_since(&self, controller: u32, kind: Kind, volume: usize, vm: u32) -> Option<Instant> {
        let same = |asked: &&Asked| asked.kind == kind && asked.volume == volume && asked.vm == vm;
        self.at_work(controller).filter(same).map(|asked| asked.begun).min()
    }

    /// A call begins.
    pub fn ask(&mut self, controller: u32, kind: Kind, volume: usize, vm: u32) -> usize {
        let begun = Instant::now();
        self.asked.push(Asked { controller, kind, volume, vm, begun, ended: None, answered: false });
        self.asked.len() - 1
    }

    /// It was answered, and so was every equal one before it that waited for the same work.
    pub fn answered(&mut self, call: usize) {
        let Asked { controller, kind, volume, vm, .. } = self.asked[call].clone();
        for asked in &mut self.asked[..=call] {
            if (asked.controller, asked.kind, asked.volume, asked.vm) == (controller, kind, volume, vm)
                && (asked.ended.is_some())
            {
                asked.answered = true;
            }
        }
        let asked = &mut self.asked[call];
        asked.answered = true;
        asked.ended = Some(Instant::now());
    }

    /// Its caller gave up.
    pub fn given_up(&mut self, call: usize) {
        self.asked[call].ended = Some(Instant::now());
    }

    /// Forgets what can matter no more.
    pub fn tidy(&mut self) {
        if self.touches.len() > 400 && self.touches.iter().all(|touch| touch.to.is_some()) {
            self.touches.retain(|touch| touch.to.is_none_or(|to| to.elapsed() < LONGEST_WORK));
        }
    }
}
