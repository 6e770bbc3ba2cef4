//! Scripted faults. Those that hit requests are used up; those that change the cluster last until they are taken back.

use serde::{Deserialize, Serialize};

/// Which requests a fault hits.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Match {
    /// Method, any when absent.
    #[serde(default)]
    pub method: Option<String>,
    /// Text that the path (behind `/api2/json`, still encoded) contains, any when absent.
    #[serde(default)]
    pub path: Option<String>,
    /// Requests to let pass first.
    #[serde(default)]
    pub skip: u32,
    /// How many requests it hits; 0 for all.
    #[serde(default = "once")]
    pub times: u32,
}

fn once() -> u32 {
    1
}

fn on() -> bool {
    true
}

/// A fault.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum Fault {
    /// The request is answered with an error and does nothing.
    Refuse {
        /// Which requests.
        #[serde(flatten)]
        on: Match,
        /// Status of the answer, 500 when absent.
        #[serde(default = "internal_error")]
        status: u16,
        /// Reason phrase and message.
        text: String,
    },
    /// The connection ends before the request is read: it does nothing.
    LoseRequest {
        /// Which requests.
        #[serde(flatten)]
        on: Match,
    },
    /// The request is carried out, but the connection ends before its answer.
    LoseAnswer {
        /// Which requests.
        #[serde(flatten)]
        on: Match,
    },
    /// The request waits before it is carried out.
    Delay {
        /// Which requests.
        #[serde(flatten)]
        on: Match,
        /// How long.
        ms: u64,
    },
    /// The request is carried out at once and its answer waits.
    DelayAnswer {
        /// Which requests.
        #[serde(flatten)]
        on: Match,
        /// How long.
        ms: u64,
    },
    /// Loses requests and answers at random until it is cleared; the same seed and the same order of requests give the
    /// same losses.
    Chaos {
        /// Where the random numbers start.
        seed: u64,
        /// How many of a hundred requests are hit: one half loses the request, the other the answer.
        percent: u8,
        /// Text that the path contains, any when absent.
        #[serde(default)]
        path: Option<String>,
    },
    /// The next task of a kind ends with an error.
    FailTask {
        /// Worker type: `qmconfig`, `imgdel`, `resize`, `qmcreate`, `qmdestroy`, …
        worker: String,
        /// Exit status.
        text: String,
        /// Whether the work is done all the same.
        #[serde(default)]
        after: bool,
        /// How many tasks; 0 for all.
        #[serde(default = "once")]
        times: u32,
    },
    /// The next task of a kind takes longer.
    DelayTask {
        /// Worker type.
        worker: String,
        /// How long it waits before it works.
        ms: u64,
        /// How many tasks; 0 for all.
        #[serde(default = "once")]
        times: u32,
    },
    /// The guest does not serve the removal of a controller: `still busy in guest?` after 17 s. The disk itself goes.
    HangUnplug {
        /// The VM.
        vmid: u32,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// The guest does not see new controllers until its PCI bus is scanned again (`bus/pci/rescan`).
    BlindGuest {
        /// The VM.
        vmid: u32,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// The VM's QEMU does not answer: no blockstat, every hotplug fails after 5 s.
    HangQemu {
        /// The VM.
        vmid: u32,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A lock is held, as by a process that does not end.
    HoldLock {
        /// `vm/100`, `storage/pve1/local`, or `storage/*/shared` over the cluster.
        lock: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A node and the others do not hear each other: 595 between them. It goes on running without quorum.
    CutNode {
        /// The node.
        node: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A node goes down, its VMs with it, and comes back; those with `onboot: 1` start.
    RebootNode {
        /// The node.
        node: String,
        /// How long it is down.
        #[serde(default = "boot_time")]
        ms: u64,
    },
    /// A user or token loses a privilege everywhere.
    DropPrivilege {
        /// `user@realm` or `user@realm!name`.
        who: String,
        /// The privilege.
        privilege: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// QEMU and the config of a running VM part: QEMU gets a disk that the config lacks, or loses one that it has.
    Drift {
        /// The VM.
        vmid: u32,
        /// The slot, such as `scsi3`.
        slot: String,
        /// Volume that QEMU gets; without it QEMU loses what it has in the slot.
        #[serde(default)]
        volume: Option<String>,
    },
    /// No ticket that was given so far is taken any longer.
    ExpireTickets,
    /// What a file has that is fetched from a URL; without it 1 MiB.
    Download {
        /// Text that the URL contains.
        url: String,
        /// Its bytes.
        #[serde(default)]
        size: Option<u64>,
        /// What the server says in place of it, such as `404 Not Found`.
        #[serde(default)]
        error: Option<String>,
    },
    /// How a command ends that the guest agent is told to run; without it every command ends with 0 and says nothing.
    AgentExec {
        /// The VM, any when absent.
        #[serde(default)]
        vmid: Option<u32>,
        /// Text that the command line contains.
        command: String,
        /// Its exit code.
        #[serde(default)]
        exitcode: i64,
        /// What it writes.
        #[serde(default)]
        out: String,
        /// What it complains of.
        #[serde(default)]
        err: String,
    },
    /// What the HA manager says of a VM, such as `fence` or `error`.
    HaState {
        /// The VM.
        vmid: u32,
        /// The state; absent makes the VM no resource of the manager.
        #[serde(default)]
        state: Option<String>,
    },
    /// In which order the keys of config calls are applied. Proxmox takes that of a Perl hash, which nobody can rely
    /// on; without the fault it is drawn anew for each call from a fixed seed.
    KeyOrder {
        /// Where the drawing starts.
        #[serde(default)]
        seed: u64,
        /// The order in the next call that has one of these keys; other keys follow.
        #[serde(default)]
        keys: Vec<String>,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A node is dead: 595, its VMs keep their last known state.
    KillNode {
        /// The node.
        node: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// The nodes that live are too few: configs and shared storages cannot be written.
    LoseQuorum {
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// What should be mounted at a storage's mount point is not.
    Unmount {
        /// The storage.
        storage: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// The guest agent of a VM does not answer.
    SilentAgent {
        /// The VM.
        vmid: u32,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A storage has no room left.
    FillStorage {
        /// The storage.
        storage: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// A token is no longer taken.
    ExpireToken {
        /// `user@realm!name`.
        token: String,
        /// `false` takes the fault back.
        #[serde(default = "on")]
        on: bool,
    },
    /// Sets or takes away a key of a VM's config behind the API's back, such as `lock`.
    SetKey {
        /// The VM.
        vmid: u32,
        /// The key.
        key: String,
        /// Its value; absent takes the key away.
        #[serde(default)]
        value: Option<String>,
    },
}

fn boot_time() -> u64 {
    60_000
}

fn internal_error() -> u16 {
    500
}

impl Fault {
    fn matching(&mut self) -> Option<&mut Match> {
        match self {
            Self::Refuse { on, .. }
            | Self::LoseRequest { on }
            | Self::LoseAnswer { on }
            | Self::Delay { on, .. }
            | Self::DelayAnswer { on, .. } => Some(on),
            _ => None,
        }
    }

    fn worker(&mut self) -> Option<(&str, &mut u32)> {
        match self {
            Self::FailTask { worker, times, .. } | Self::DelayTask { worker, times, .. } => {
                Some((worker, times))
            }
            _ => None,
        }
    }
}

/// Whether a counted fault is used up by this hit; 0 counts as endless.
fn used_up(times: &mut u32) -> bool {
    match *times {
        0 => false,
        1 => true,
        _ => {
            *times -= 1;
            false
        }
    }
}

/// splitmix64 (Steele, Lea, Flood 2014): a small generator that replays from its seed.
fn next_random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The faults that wait for requests and tasks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Pending(Vec<Fault>);

impl Pending {
    /// Adds one; faults of the cluster's state do not belong here.
    pub fn push(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// All that still wait.
    pub fn all(&self) -> &[Fault] {
        &self.0
    }

    /// The faults that hit this request, which uses them up.
    pub fn hit_request(&mut self, method: &str, path: &str) -> Vec<Fault> {
        let mut hits = Vec::new();
        self.0.retain_mut(|fault| {
            if let Fault::Chaos { seed, percent, path: wanted } = fault {
                if wanted.as_deref().is_none_or(|wanted| path.contains(wanted)) {
                    let draw = next_random(seed);
                    let on = Match { times: 1, ..Match::default() };
                    match (draw % 100 < u64::from(*percent), draw >> 63) {
                        (false, _) => {}
                        (true, 0) => hits.push(Fault::LoseRequest { on }),
                        (true, _) => hits.push(Fault::LoseAnswer { on }),
                    }
                }
                return true;
            }
            let copy = fault.clone();
            let Some(on) = fault.matching() else { return true };
            let fits = on.method.as_deref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method))
                && on.path.as_deref().is_none_or(|wanted| path.contains(wanted));
            if !fits {
                return true;
            }
            if on.skip > 0 {
                on.skip -= 1;
                return true;
            }
            hits.push(copy);
            !used_up(&mut on.times)
        });
        hits
    }

    /// How a command in the guest of a VM ends, where it is scripted: `(exitcode, out, err)`.
    pub fn exec_of(&self, vm: u32, line: &str) -> Option<(i64, String, String)> {
        self.0.iter().rev().find_map(|fault| match fault {
            Fault::AgentExec { vmid, command, exitcode, out, err }
                if vmid.is_none_or(|vmid| vmid == vm) && line.contains(command.as_str()) =>
            {
                Some((*exitcode, out.clone(), err.clone()))
            }
            _ => None,
        })
    }

    /// What a fetched file has, where it is scripted: its size, or an error.
    pub fn download_of(&self, wanted: &str) -> Option<(Option<u64>, Option<String>)> {
        self.0.iter().rev().find_map(|fault| match fault {
            Fault::Download { url, size, error } if wanted.contains(url.as_str()) => {
                Some((*size, error.clone()))
            }
            _ => None,
        })
    }

    /// The faults that hit a new task, which uses them up.
    pub fn hit_task(&mut self, kind: &str) -> Vec<Fault> {
        let mut hits = Vec::new();
        self.0.retain_mut(|fault| {
            let copy = fault.clone();
            let Some((worker, times)) = fault.worker() else { return true };
            if worker != kind {
                return true;
            }
            hits.push(copy);
            !used_up(times)
        });
        hits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chaos_replays_from_its_seed() {
        let run = |seed| {
            let mut pending = Pending::default();
            pending.push(Fault::Chaos { seed, percent: 30, path: None });
            let hits = (0..200).map(|_| format!("{:?}", pending.hit_request("GET", "/version")));
            hits.collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let hit = run(7).iter().filter(|hits| *hits != "[]").count();
        assert!((40..80).contains(&hit), "{hit} of 200");
    }

    #[test]
    fn a_fault_reads_from_json_and_is_used_up() {
        let fault = r#"{"fault":"lose_answer","method":"POST","path":"/qemu/101/config","skip":1}"#;
        let mut pending = Pending::default();
        pending.push(serde_json::from_str(fault).expect("the fault is well formed"));
        assert!(pending.hit_request("GET", "/nodes/pve1/qemu/101/config").is_empty());
        assert!(pending.hit_request("POST", "/nodes/pve1/qemu/101/config").is_empty());
        assert_eq!(pending.hit_request("POST", "/nodes/pve1/qemu/101/config").len(), 1);
        assert!(pending.hit_request("POST", "/nodes/pve1/qemu/101/config").is_empty());
        let fault: Fault =
            serde_json::from_str(r#"{"fault":"hang_unplug","vmid":101}"#).expect("well formed");
        assert!(matches!(fault, Fault::HangUnplug { vmid: 101, on: true }));
    }
}
