//! What happens in a run: a list of steps that is drawn from the seed before anything runs, so that steps can be left out of it.

use std::fmt;

use crate::{chance::Chance, setup::Setup};

/// One step.
#[derive(Debug, Clone)]
pub struct Step {
    /// What happens.
    pub act: Act,
    /// How long time passes then, in milliseconds.
    pub pause: u64,
}

/// What happens.
#[derive(Debug, Clone)]
pub enum Act {
    /// A sidecar calls.
    Call(Call),
    /// A person changes something in Proxmox.
    Admin(Admin),
    /// Something breaks and is well again after so many seconds.
    Trouble(Trouble, u64),
    /// A request of a controller is cut: one that changes something, if `writes`, after `skip` others.
    Cut { cut: Cut, writes: bool, skip: u32 },
    /// What happens to a controller's process.
    Process(Process),
}

/// A call, repeated as the sidecars do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub kind: Kind,
    /// Of which volume.
    pub volume: usize,
    /// For which VM, by its place in the setup.
    pub vm: usize,
    /// How often it is tried.
    pub tries: u32,
    /// Seconds until the caller gives up.
    pub deadline: u64,
    /// Whether the controller that does not lead is asked.
    pub other: bool,
}

/// The calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Create,
    Delete,
    Publish,
    PublishReadOnly,
    Unpublish,
    UnpublishAll,
    /// To so many GiB.
    Expand(u8),
    /// With so many operations in a second.
    Modify(u8),
    Validate,
    List,
    Capacity,
}

/// What a person does. Numbers of VMs, volumes, nodes and storages are places in the setup.
#[derive(Debug, Clone)]
pub enum Admin {
    Stop(usize),
    Start(usize),
    Restart(usize),
    Migrate(usize, usize),
    /// What a fencing and a recovery by hand leave: the VM stands on another node, without power.
    Failover(usize, usize),
    Rename(usize),
    Tag(usize),
    Hotplug(usize, bool),
    Protect(usize, bool),
    Lock(usize, bool),
    AddDisk(usize, u8),
    DropDisk(usize),
    /// Plugs a volume in by hand.
    Plug(usize, usize, u8),
    /// Takes a volume out by hand.
    Unplug(usize, usize),
    /// Leaves a disk in `pending`, for the next start.
    PendingDisk(usize, u8),
    Snapshot(usize),
    Rollback(usize),
    DropSnapshot(usize),
    Destroy(usize),
    /// A new VM under the VMID of an old one.
    Recreate(usize, usize),
    /// The kubelet of the VM registers its node anew, or the node is removed with it.
    Register(usize),
    DeleteVolume(usize),
    /// QEMU loses the drive of a volume.
    DriftLose(usize, usize),
    /// QEMU gets a drive of a volume that the config does not know.
    DriftGain(usize, usize),
    /// Keys of config calls are applied in another order from now on.
    KeyOrder(u64),
}

/// What breaks.
#[derive(Debug, Clone)]
pub enum Trouble {
    Privilege(&'static str),
    Token,
    Fill(usize),
    Unmount(usize),
    Kill(usize),
    Cut(usize),
    Reboot(usize),
    Quorum,
    BusyGuest(usize),
    HungQemu(usize),
    HeldVm(usize),
    HeldStorage(usize, usize),
    /// So many of a hundred requests or answers are lost.
    Chaos(u64, u64),
    /// The next tasks of this kind take so many seconds longer.
    SlowTasks(&'static str, u64),
}

/// How a request is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    NotSent,
    LoseRequest,
    LoseAnswer,
    /// The connection fails, and Proxmox gets the request so many seconds later.
    Late(u8),
    Deadline,
    Refuse500,
    Unreachable595,
    FailTask,
    FailTaskAfter,
}

/// What happens to a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// It ends at once and begins anew.
    Crash { leader: bool },
    /// It is asked to end, and gives its lease back.
    Stop,
    /// It does not reach the API server for so many seconds.
    Partition { leader: bool, seconds: u64 },
}

/// What the generator believes of a volume, so that most calls make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Believed {
    Nothing,
    Made,
    At(usize),
}

/// The steps of a seed.
pub fn steps(seed: u64, count: usize, setup: &Setup) -> Vec<Step> {
    let mut drawer = Drawer {
        chance: Chance::new(seed),
        setup,
        believed: vec![Believed::Nothing; setup.volumes.len()],
        last: Vec::new(),
        calm: seed % 4,
    };
    (0..count).map(|_| drawer.step()).collect()
}

struct Drawer<'a> {
    chance: Chance,
    setup: &'a Setup,
    believed: Vec<Believed>,
    last: Vec<Call>,
    /// 0: nothing breaks; 1: nobody interferes; others: all of it.
    calm: u64,
}

impl Drawer<'_> {
    fn step(&mut self) -> Step {
        let act = match (self.chance.below(100), self.calm) {
            (0..=14, 0 | 2 | 3) => Act::Admin(self.admin()),
            (15..=22, 1..=3) => {
                let trouble = self.trouble();
                Act::Trouble(trouble, self.chance.within(1, 90))
            }
            (23..=34, 1..=3) => self.cut(),
            (35..=36, 1..=3) => Act::Process(self.process()),
            _ => Act::Call(self.call()),
        };
        let pause = match self.chance.below(100) {
            0..=29 => 0,
            30..=54 => self.chance.within(1, 900),
            55..=84 => self.chance.within(900, 6_000),
            85..=96 => self.chance.within(6_000, 40_000),
            _ => self.chance.within(40_000, 110_000),
        };
        Step { act, pause }
    }

    fn worker(&mut self) -> usize {
        loop {
            let vm = self.chance.below(self.setup.vms.len());
            if self.setup.vms[vm].is_worker {
                return vm;
            }
        }
    }

    /// A worker that could use the volume, mostly.
    fn worker_for(&mut self, volume: usize) -> usize {
        let mut vm = self.worker();
        for _ in 0..6 {
            let host = &self.setup.nodes[self.setup.vms[vm].node];
            if self.setup.volumes[volume].key.node.as_ref().is_none_or(|node| node == host) {
                break;
            }
            vm = self.worker();
        }
        vm
    }

    fn volume(&mut self) -> usize {
        // Few of many, so that things happen to the same ones.
        let all = self.setup.volumes.len();
        if self.chance.percent(60) { self.chance.below(all.min(4)) } else { self.chance.below(all) }
    }

    fn call(&mut self) -> Call {
        if !self.last.is_empty() && self.chance.percent(12) {
            return self.chance.pick(&self.last).clone();
        }
        let volume = self.volume();
        let sensible = self.chance.percent(85);
        let (kind, vm) = if sensible { self.sensible(volume) } else { (self.any_kind(), self.worker()) };
        let call = Call {
            kind,
            volume,
            vm,
            tries: *self.chance.pick(&[1, 2, 4, 7]),
            deadline: *self.chance.pick(&[1, 3, 10, 15, 60, 120]),
            other: self.chance.percent(4),
        };
        self.last.push(call.clone());
        if self.last.len() > 8 {
            self.last.remove(0);
        }
        call
    }

    fn sensible(&mut self, volume: usize) -> (Kind, usize) {
        let roll = self.chance.below(100);
        let (kind, vm, then) = match (self.believed[volume], roll) {
            (Believed::Nothing, _) => (Kind::Create, 0, Believed::Made),
            (Believed::Made, 0..=64) => {
                let vm = self.worker_for(volume);
                let read_only = self.chance.percent(10);
                let kind = if read_only { Kind::PublishReadOnly } else { Kind::Publish };
                (kind, vm, Believed::At(vm))
            }
            (Believed::Made, 65..=79) => (Kind::Delete, 0, Believed::Nothing),
            (Believed::At(vm), 0..=54) => (Kind::Unpublish, vm, Believed::Made),
            // Elsewhere, though it was not told to leave.
            (Believed::At(_), 55..=64) => {
                let vm = self.worker_for(volume);
                (Kind::Publish, vm, Believed::At(vm))
            }
            (believed, 80..=89) => {
                (Kind::Expand(u8::try_from(self.chance.within(1, 5)).expect("small")), 0, believed)
            }
            (believed, 90..=94) => {
                (Kind::Modify(u8::try_from(self.chance.within(10, 20)).expect("small")), 0, believed)
            }
            (believed, _) => (*self.chance.pick(&[Kind::Validate, Kind::List, Kind::Capacity]), 0, believed),
        };
        self.believed[volume] = then;
        (kind, vm)
    }

    fn any_kind(&mut self) -> Kind {
        *self.chance.pick(&[
            Kind::Create,
            Kind::Delete,
            Kind::Publish,
            Kind::PublishReadOnly,
            Kind::Unpublish,
            Kind::Unpublish,
            Kind::UnpublishAll,
            Kind::Expand(3),
            Kind::Modify(30),
        ])
    }

    fn admin(&mut self) -> Admin {
        let vm = self.chance.below(self.setup.vms.len());
        let (volume, node) = (self.volume(), self.chance.below(self.setup.nodes.len()));
        let slot = u8::try_from(self.chance.within(1, 6)).expect("small");
        let on = self.chance.percent(40);
        match self.chance.below(36) {
            0 => Admin::Stop(vm),
            3 | 4 => Admin::Restart(vm),
            5 | 6 => Admin::Migrate(vm, node),
            7 => Admin::Failover(vm, node),
            8 => Admin::Rename(vm),
            9 => Admin::Tag(vm),
            10 | 11 => Admin::Hotplug(vm, on),
            12 => Admin::Protect(vm, on),
            13 => Admin::Lock(vm, on),
            14 | 15 => Admin::AddDisk(vm, slot),
            16 => Admin::DropDisk(vm),
            17 | 18 => Admin::Plug(vm, volume, slot),
            19 | 20 => Admin::Unplug(vm, volume),
            21 => Admin::PendingDisk(vm, slot),
            22 | 23 => Admin::Snapshot(vm),
            24 => Admin::Rollback(vm),
            25 => Admin::DropSnapshot(vm),
            26 => Admin::Destroy(vm),
            27 => Admin::Recreate(vm, node),
            28 => Admin::Register(vm),
            29 => Admin::DeleteVolume(volume),
            30 => Admin::DriftLose(vm, volume),
            31 => Admin::DriftGain(vm, volume),
            32 => Admin::KeyOrder(self.chance.next()),
            _ => Admin::Start(vm),
        }
    }

    fn trouble(&mut self) -> Trouble {
        let vm = self.chance.below(self.setup.vms.len());
        let (node, storage) =
            (self.chance.below(self.setup.nodes.len()), self.chance.below(self.setup.storages.len()));
        match self.chance.below(18) {
            0 | 1 => Trouble::Privilege(self.chance.pick::<&'static str>(&[
                "VM.Audit",
                "VM.Config.Disk",
                "Datastore.Allocate",
                "Datastore.AllocateSpace",
                "Datastore.Audit",
            ])),
            2 => Trouble::Token,
            3 => Trouble::Fill(storage),
            4 => Trouble::Unmount(storage),
            5 => Trouble::Kill(node),
            6 => Trouble::Cut(node),
            7 => Trouble::Reboot(node),
            8 => Trouble::Quorum,
            9 | 10 => Trouble::BusyGuest(vm),
            11 | 12 => Trouble::HungQemu(vm),
            13 => Trouble::HeldVm(vm),
            14 => Trouble::HeldStorage(node, storage),
            15 | 16 => {
                let percent = self.chance.within(5, 40);
                Trouble::Chaos(self.chance.next(), percent)
            }
            _ => {
                let worker = *self.chance.pick(&["qmconfig", "imgdel", "resize", "qmcreate", "qmdestroy"]);
                Trouble::SlowTasks(worker, self.chance.within(2, 40))
            }
        }
    }

    fn cut(&mut self) -> Act {
        let late = Cut::Late(u8::try_from(self.chance.within(1, 15)).expect("small"));
        let cut = *self.chance.pick(&[
            Cut::NotSent,
            Cut::LoseRequest,
            Cut::LoseAnswer,
            Cut::LoseAnswer,
            late,
            Cut::Deadline,
            Cut::Refuse500,
            Cut::Unreachable595,
            Cut::FailTask,
            Cut::FailTaskAfter,
        ]);
        let tasks = matches!(cut, Cut::FailTask | Cut::FailTaskAfter);
        let skip = u32::try_from(self.chance.below(3)).expect("small");
        Act::Cut { cut, writes: tasks || self.chance.percent(75), skip }
    }

    fn process(&mut self) -> Process {
        let leader = self.chance.percent(70);
        match self.chance.below(3) {
            0 => Process::Crash { leader },
            1 => Process::Stop,
            _ => Process::Partition { leader, seconds: self.chance.within(5, 60) },
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.act {
            Act::Call(call) => write!(f, "call {:?} of pvc-{}", call.kind, call.volume)?,
            act => write!(f, "{act:?}")?,
        }
        if let Act::Call(call) = &self.act {
            if matches!(call.kind, Kind::Publish | Kind::PublishReadOnly | Kind::Unpublish) {
                write!(f, " worker-{}", 101 + call.vm)?;
            }
            write!(f, ", {} tries of {} s", call.tries, call.deadline)?;
            if call.other {
                write!(f, ", of the one that does not lead")?;
            }
        }
        write!(f, "; then {} ms", self.pause)
    }
}
