//! What happens in a life, and what follows from it later.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Life;
use crate::rig::{NODES, Region, TOKEN, admin, secs};

const HOSTS: [&str; 3] = ["pve1", "pve2", "pve3"];
const US: &str = "tokens=csi%40pve%21csi&users=csi%40pve";

/// What follows from something that happened.
#[derive(Debug, Clone)]
pub(super) enum Then {
    /// A migration ends.
    Arrive { region: usize, vmid: u32, host: &'static str },
    /// The hosts of a region are heard of again.
    Fresh { region: usize },
    /// A VM that was out of everybody's sight is back.
    Back { region: usize, vmid: u32 },
    /// The HA manager has fenced the host of a VM.
    Fenced { region: usize, vmid: u32 },
    /// It starts the VM elsewhere, and the host comes back.
    Recovered { region: usize, vmid: u32, host: &'static str },
    /// A server is cut off from its cluster.
    CutOff { region: usize },
    /// It is part of it again.
    Joined { region: usize },
    /// A VM is restored.
    Restored { machine: usize, vmid: u32, host: &'static str, running: bool, how: Seen },
    /// A VM is started.
    Start { region: usize, vmid: u32 },
}

/// How much of a restored VM the token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// All.
    Whole,
    /// Nothing: a role without VM.Audit stands at its path.
    OtherRole,
}

impl Life {
    pub(super) async fn prepare(&self) {
        for region in &self.regions {
            admin(region, "POST", "/access/roles", "roleid=Other&privs=VM.Console").await;
        }
        // Here the token may read the access control list, so that nothing in it is hidden from it.
        admin(&self.regions[0], "POST", "/access/roles", "roleid=Auditor&privs=Sys.Audit").await;
        admin(&self.regions[0], "PUT", "/access/acl", &format!("path=%2Faccess&roles=Auditor&{US}")).await;
    }

    fn region(&self, index: usize) -> Region {
        self.regions[index].clone()
    }

    fn later(&mut self, after: Duration, then: Then) {
        self.due.push((Instant::now() + after, then));
    }

    /// A VM of this uuid is, or may write, from now on.
    fn came_alive(&mut self, region: usize, vmid: u32) {
        let uuid = self.regions[region].sim.vm(vmid).and_then(|vm| vm.conf.uuid().map(str::to_owned));
        if let Some(uuid) = uuid {
            self.truth().alive_since.insert(uuid, Instant::now());
        }
    }

    async fn start(&mut self, region: usize, vmid: u32) {
        let it = self.region(region);
        it.sim.set_vm_key(vmid, "lock", None);
        self.came_alive(region, vmid);
        // It may run already.
        drop(it.sim.start_vm(vmid).await);
        self.came_alive(region, vmid);
    }

    async fn acl(&mut self, region: usize, vmid: u32, role: &str, take_away: bool) {
        let delete = if take_away { "&delete=1" } else { "" };
        let form = format!("path=%2Fvms%2F{vmid}&roles={role}&{US}{delete}");
        admin(&self.region(region), "PUT", "/access/acl", &form).await;
        let mut truth = self.truth();
        if take_away {
            truth.unseen.remove(&(region, vmid))
        } else {
            truth.unseen.insert((region, vmid))
        };
    }

    async fn restore(&mut self, machine: usize, vmid: u32, host: &'static str, running: bool, how: Seen) {
        let (region, uuid) = (self.machines[machine].region, self.machines[machine].uuid.clone());
        let it = self.region(region);
        if it.sim.vm(vmid).is_some() {
            return;
        }
        if how == Seen::OtherRole {
            self.acl(region, vmid, "Other", false).await;
        }
        self.truth().alive_since.insert(uuid.clone(), Instant::now());
        self.make(&it, vmid, host, &uuid).await;
        self.came_alive(region, vmid);
        if running {
            self.start(region, vmid).await;
        }
    }

    async fn make(&self, region: &Region, vmid: u32, host: &str, uuid: &str) {
        let form = format!("vmid={vmid}&name=again&smbios1=uuid%3D{uuid}");
        let made = crate::rig::try_admin(region, "POST", &format!("/nodes/{host}/qemu"), &form).await;
        if made {
            sleep(secs(1)).await;
        }
    }

    /// What was to follow does.
    pub(super) async fn then(&mut self, then: Then) {
        self.log.push(format!("  then {then:?}"));
        match then {
            Then::Arrive { region, vmid, host } => {
                let it = self.region(region);
                it.sim.move_vm(vmid, host);
                it.sim.set_vm_key(vmid, "lock", None);
            }
            Then::Fresh { region } => self.regions[region].hands(|hand| hand.stale = false),
            Then::Back { region, vmid } => {
                self.regions[region].hands(|hand| hand.lost.retain(|lost| *lost != vmid));
            }
            Then::Fenced { region, vmid } => {
                let it = self.region(region);
                it.sim.stop_vm(vmid).await;
                it.sim.set_vm_key(vmid, "lock", None);
                it.sim.set_ha_state(vmid, Some("recovery"));
            }
            Then::Recovered { region, vmid, host } => {
                let it = self.region(region);
                it.sim.clear_faults();
                it.sim.move_vm(vmid, host);
                self.start(region, vmid).await;
                it.sim.set_ha_state(vmid, Some("started"));
            }
            Then::CutOff { region } => self.regions[region].hand(0).cut_off = true,
            Then::Joined { region } => self.regions[region].hand(0).cut_off = false,
            Then::Restored { machine, vmid, host, running, how } => {
                self.restore(machine, vmid, host, running, how).await;
            }
            Then::Start { region, vmid } => self.start(region, vmid).await,
        }
    }

    /// Every misfortune ends; VMs stay as they are.
    pub(super) async fn heal(&mut self) {
        self.server.set_down(false);
        self.server.refuse_events(false);
        self.server.set_lag(Duration::ZERO);
        self.server.conflict_every(0);
        let unseen: Vec<(usize, u32)> = self.truth().unseen.iter().copied().collect();
        for (region, vmid) in unseen {
            self.acl(region, vmid, "NoAccess", true).await;
            self.acl(region, vmid, "Other", true).await;
        }
        for machine in &mut self.machines {
            machine.silent = false;
        }
        for region in &self.regions {
            region.sim.clear_faults();
            region.hands(|hand| {
                (hand.dead, hand.hangs, hand.cut_off, hand.stale) = (false, false, false, false);
                hand.hidden.clear();
                hand.lost.clear();
            });
        }
    }

    /// What is left of each machine is one VM that runs.
    pub(super) async fn settle(&mut self) {
        for index in 0..self.machines.len() {
            let uuid = self.machines[index].uuid.clone();
            let all: Vec<(usize, u32, bool)> = self.truth().of(&uuid).collect();
            for (region, vmid, _) in all.iter().skip(1) {
                self.regions[*region].sim.stop_vm(*vmid).await;
                self.regions[*region].sim.forget_vm(*vmid);
            }
            if let Some((region, vmid, _)) = all.first() {
                self.regions[*region].sim.set_ha_state(*vmid, None);
                self.start(*region, *vmid).await;
            }
        }
    }

    /// Whether a node says that it is this VM: then the loop asks for it, seen or not.
    fn is_recorded(&self, name: &str, region: usize, vmid: u32) -> bool {
        let id = format!("proxmox://{}/{vmid}", self.regions[region].name);
        self.server.get(NODES, name).is_some_and(|node| node["spec"]["providerID"] == id.as_str())
    }

    /// A VMID that nobody has.
    fn free_vmid(&mut self, region: usize) -> Option<u32> {
        let vmid = 104 + u32::try_from(self.chance.below(40)).expect("small");
        self.regions[region].sim.vm(vmid).is_none().then_some(vmid)
    }

    /// Something happens.
    pub(super) async fn step(&mut self) {
        // Most misfortunes come alone or in twos, or nothing else could be seen behind them.
        if self.chance.below(4) == 0 {
            self.heal().await;
        }
        let machine = self.chance.below(self.machines.len());
        let region = self.machines[machine].region;
        let uuid = self.machines[machine].uuid.clone();
        let mine: Vec<(usize, u32, bool)> = self.truth().of(&uuid).collect();
        let vmid = if mine.is_empty() { None } else { Some(mine[self.chance.below(mine.len())].1) };
        let host = HOSTS[self.chance.below(3)];
        let on = self.chance.below(2) == 0;
        let soon = self.chance.seconds(5, 50);
        let long = self.chance.seconds(120, 900);
        let kind = self.chance.below(26);
        let name = self.machines[machine].name.clone();
        self.log.push(format!("{kind} {name} {vmid:?} {host} {on} {soon:?} {long:?}"));
        let it = self.region(region);
        match (kind, vmid) {
            (0, Some(vmid)) => {
                it.sim.move_vm(vmid, host);
            }
            (1, Some(vmid)) => {
                it.sim.set_vm_key(vmid, "lock", Some("migrate"));
                self.came_alive(region, vmid);
                self.later(soon, Then::Arrive { region, vmid, host });
            }
            (2 | 3, Some(vmid)) => {
                it.sim.stop_vm(vmid).await;
            }
            (4 | 5, Some(vmid)) => self.start(region, vmid).await,
            (6, Some(vmid)) => {
                it.sim.set_vm_key(vmid, "lock", Some("suspended"));
                self.came_alive(region, vmid);
                it.sim.stop_vm(vmid).await;
            }
            (7, Some(vmid)) => {
                it.sim.stop_vm(vmid).await;
                it.sim.forget_vm(vmid);
            }
            // Restored under its VMID or another one; twice; where the token does not see it.
            (8, None) => {
                let vmid = name[3..].parse().expect("the name ends in the first VMID");
                self.restore(machine, vmid, host, on, Seen::Whole).await;
            }
            (9, None) => {
                for _ in 0..2 {
                    if let Some(vmid) = self.free_vmid(region) {
                        self.restore(machine, vmid, host, on, Seen::Whole).await;
                    }
                }
            }
            (10, Some(vmid)) => {
                it.sim.stop_vm(vmid).await;
                it.sim.forget_vm(vmid);
                if let Some(vmid) = self.free_vmid(region) {
                    let how = if on { Seen::OtherRole } else { Seen::Whole };
                    let running = self.chance.below(3) == 0;
                    self.later(soon, Then::Restored { machine, vmid, host, running, how });
                }
            }
            // Another VM under its VMID.
            (11, None) => {
                let vmid = name[3..].parse().expect("the name ends in the first VMID");
                if it.sim.vm(vmid).is_none() {
                    let uuid = format!("ffffffff-0000-4000-8000-{:012x}", self.chance.next() >> 20);
                    self.make(&it, vmid, host, &uuid).await;
                }
            }
            // A copy beside it.
            (12, Some(_)) => {
                if let Some(vmid) = self.free_vmid(region) {
                    self.restore(machine, vmid, host, on, Seen::Whole).await;
                }
            }
            // Nothing is allowed there, and nothing says so.
            (13, Some(vmid)) if region == 0 || self.is_recorded(&name, region, vmid) => {
                self.acl(region, vmid, "NoAccess", false).await;
            }
            (14, Some(vmid)) if self.is_recorded(&name, region, vmid) => {
                it.hands(|hand| hand.hidden.extend([vmid]));
                self.truth().unseen.insert((region, vmid));
            }
            // For less than a minute nobody knows of it.
            (15, Some(vmid)) => {
                let place = (region, vmid);
                // Two of these would be two looks.
                if self.blinked.get(&place).is_some_and(|at| at.elapsed() < Duration::from_hours(1)) {
                    return;
                }
                self.blinked.insert(place, Instant::now());
                it.hands(|hand| hand.lost.extend([vmid]));
                self.later(soon, Then::Back { region, vmid });
            }
            // Its hosts tell nothing new; it may be started meanwhile.
            (16, Some(vmid)) => {
                it.hands(|hand| hand.stale = true);
                self.later(long, Then::Fresh { region });
                if on {
                    self.later(soon, Then::Start { region, vmid });
                }
            }
            // Its host dies, and the HA manager does what it does.
            (17, Some(vmid)) => {
                let here = it.sim.vm(vmid).map(|vm| vm.node).unwrap_or_default();
                let host = HOSTS.into_iter().find(|host| *host != here).unwrap_or("pve1");
                it.fault(json!({"fault": "kill_node", "node": here, "on": true}));
                it.sim.set_ha_state(vmid, Some("fence"));
                let fenced = self.chance.seconds(60, 150);
                self.later(fenced, Then::Fenced { region, vmid });
                self.later(fenced + soon * 3, Then::Recovered { region, vmid, host });
                if on {
                    self.later(fenced + soon * 2, Then::CutOff { region });
                    self.later(fenced + long, Then::Joined { region });
                }
            }
            // It is restored while the server is cut off that does not know of it.
            (18, Some(vmid)) => {
                it.sim.stop_vm(vmid).await;
                it.sim.forget_vm(vmid);
                self.later(secs(35), Then::CutOff { region });
                let running = self.chance.below(3) == 0;
                self.later(secs(40), Then::Restored { machine, vmid, host, running, how: Seen::Whole });
                self.later(secs(40) + long, Then::Joined { region });
            }
            (19, _) => it.hand(0).dead = on,
            (20, _) => it.hands(|hand| hand.dead = on),
            (21, _) => it.hand(0).hangs = on,
            (22, _) if on => it.fault(json!({"fault": "kill_node", "node": host, "on": true})),
            (22, _) => it.fault(json!({"fault": "expire_token", "token": TOKEN, "on": true})),
            (23, _) => self.machines[machine].silent = on,
            (24, _) => match self.chance.below(6) {
                0 => self.server.set_down(on),
                1 => self.server.compact(),
                2 => self.server.set_lag(soon / 4),
                3 => self.server.conflict_every(2),
                4 => self.server.end_watches(),
                _ => self.server.refuse_events(on),
            },
            (25, _) if on => self.restart(),
            // A kubelet that was gone, or an administrator who makes room.
            (25, _) if self.server.get(NODES, &name).is_some() && self.chance.below(4) == 0 => {
                self.server.take(NODES, &name);
            }
            _ => {}
        }
    }
}
