//! What people do in Proxmox while the driver is at work, and what breaks there. All of it is noted before it begins, so that the
//! invariants know what is not the driver's doing.

use std::time::Duration;

use bytes::Bytes;
use proxmox_csi::sim::{
    World,
    faults::Fault,
    world::{Guest, Vm},
};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tower::ServiceExt as _;

use crate::{
    chance::Chance,
    holds::{Where, volid},
    ledger::Chaos,
    plan::{Admin, Trouble},
    rig::Rig,
    setup,
    support::{CSI, HOLDER, in_process},
};

/// How long a person waits for a task.
const PATIENCE: u32 = 100;

impl Rig {
    /// One call of an administrator; the error is what Proxmox said.
    pub async fn ask(&self, method: &str, path: &str, form: &str) -> Result<Value, String> {
        let world = World::builtin();
        let token = world.token("root@pam!root").expect("an administrator");
        let in_query = matches!(method, "GET" | "DELETE") && !form.is_empty();
        let uri = if in_query { format!("/api2/json{path}?{form}") } else { format!("/api2/json{path}") };
        let request = http::Request::builder()
            .method(method)
            .uri(uri)
            .header("authorization", token.header())
            .header("content-type", "application/x-www-form-urlencoded")
            .body(Bytes::from(if in_query { String::new() } else { form.to_owned() }))
            .expect("a request");
        let answer = in_process(&self.sim).oneshot(request).await.map_err(|error| error.to_string())?;
        let body: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
        if answer.status().is_success() {
            return Ok(body["data"].clone());
        }
        Err(format!("{} {}", answer.status().as_u16(), body["message"].as_str().unwrap_or_default().trim()))
    }

    /// The same, and waits for the task that it starts.
    pub async fn ask_task(&self, method: &str, path: &str, form: &str) -> Result<Value, String> {
        let started = self.ask(method, path, form).await?;
        let Some(upid) = started.as_str().filter(|text| text.starts_with("UPID:")) else {
            return Ok(started);
        };
        let node = upid.split(':').nth(1).unwrap_or_default();
        for _ in 0..PATIENCE {
            let status = self.ask("GET", &format!("/nodes/{node}/tasks/{upid}/status"), "").await;
            match status {
                Ok(status) if status["status"] == "stopped" => {
                    let exit = status["exitstatus"].as_str().unwrap_or_default();
                    return if exit == "OK" { Ok(started) } else { Err(exit.to_owned()) };
                }
                Ok(_) | Err(_) => sleep(Duration::from_secs(1)).await,
            }
        }
        Err("it does not end".to_owned())
    }

    /// Where the config of a VM is.
    fn path(&self, vmid: u32) -> Result<String, String> {
        let vm = self.sim.vm(vmid).ok_or_else(|| format!("there is no VM {vmid}"))?;
        Ok(format!("/nodes/{}/qemu/{vmid}", vm.node))
    }

    /// A person acts.
    pub async fn administer(&self, act: &Admin) {
        let (vm, volume) = about(act);
        let vmid = vm.map(|vm| self.setup.vms[vm].vmid);
        let touch = {
            let mut ledger = self.ledger();
            if let Some(vmid) = vmid {
                *ledger.busy.entry(vmid).or_default() += 1;
            }
            ledger.touch(vmid, volume)
        };
        let done = Box::pin(self.carry_out(act)).await;
        let mut ledger = self.ledger();
        ledger.touched(touch);
        let said = match done {
            Ok(()) => "done".to_owned(),
            Err(error) => error.lines().next().unwrap_or_default().to_owned(),
        };
        ledger.say(&format!("  admin {act:?} -> {said}"));
        drop(ledger);
        if let Some(vmid) = vmid {
            self.settled(vmid);
        }
    }

    /// An act on a VM has ended: what it has is as its administrators want it, unless another act is under way.
    fn settled(&self, vmid: u32) {
        let mut ledger = self.ledger();
        let left = ledger.busy.get_mut(&vmid).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            ledger.busy.remove(&vmid);
            drop(ledger);
            self.take_for_granted(vmid);
        }
    }

    async fn carry_out(&self, act: &Admin) -> Result<(), String> {
        let vmid = |vm: usize| self.setup.vms[vm].vmid;
        match *act {
            Admin::Stop(vm) => self.sim.stop_vm(vmid(vm)).await.then_some(()).ok_or("no such VM")?,
            Admin::Start(vm) => self.power(vmid(vm), "start").await?,
            Admin::Restart(vm) => {
                self.sim.stop_vm(vmid(vm)).await;
                sleep(Duration::from_secs(2)).await;
                self.power(vmid(vm), "start").await?;
            }
            Admin::Migrate(vm, node) => {
                let (path, target) = (self.path(vmid(vm))?, &self.setup.nodes[node]);
                let form = format!("target={target}&online=1");
                self.ask_task("POST", &format!("{path}/migrate"), &form).await?;
            }
            Admin::Failover(vm, node) => {
                self.sim.stop_vm(vmid(vm)).await;
                self.sim.move_vm(vmid(vm), &self.setup.nodes[node]);
            }
            Admin::Rename(vm) => self.set(vmid(vm), &format!("name=renamed-{}", self.number())).await?,
            Admin::Tag(vm) => self.set(vmid(vm), &format!("tags=tag{}", self.number())).await?,
            Admin::Hotplug(vm, on) => {
                let value = if on { "disk,network,usb" } else { "0" };
                self.set(vmid(vm), &format!("hotplug={value}")).await?;
            }
            Admin::Protect(vm, on) => self.set(vmid(vm), &format!("protection={}", u8::from(on))).await?,
            Admin::Lock(vm, on) => {
                self.sim.set_vm_key(vmid(vm), "lock", on.then_some("backup"));
            }
            Admin::AddDisk(vm, slot) => self.set(vmid(vm), &format!("scsi{slot}=thin:1")).await?,
            Admin::PendingDisk(vm, slot) => {
                self.set(vmid(vm), "hotplug=0").await?;
                self.set(vmid(vm), &format!("scsi{slot}=thin:1")).await?;
                self.set(vmid(vm), "hotplug=disk,network,usb").await?;
            }
            Admin::DropDisk(vm) => {
                let vm = vmid(vm);
                let view = self.sim.vm(vm).ok_or("no such VM")?;
                let own = view.conf.current.iter().find(|(key, text)| {
                    key.starts_with("scsi") && *key != "scsi0" && text.contains(&format!("vm-{vm}-disk"))
                });
                let (key, _) = own.ok_or("it has no disk of its own to spare")?;
                self.set(vm, &format!("delete={key}")).await?;
            }
            Admin::Plug(vm, volume, slot) => self.plug_by_hand(vmid(vm), volume, slot).await?,
            Admin::Unplug(vm, volume) => self.unplug_by_hand(vmid(vm), volume).await?,
            Admin::Snapshot(vm) => {
                let name = format!("s{}", self.number());
                let path = self.path(vmid(vm))?;
                self.ask_task("POST", &format!("{path}/snapshot"), &format!("snapname={name}")).await?;
            }
            Admin::Rollback(vm) => self.rollback(vmid(vm)).await?,
            Admin::DropSnapshot(vm) => self.drop_snapshot(vmid(vm)).await?,
            Admin::Destroy(vm) => self.destroy(vmid(vm)).await?,
            Admin::Recreate(vm, node) => {
                self.destroy(vmid(vm)).await.ok();
                if self.sim.vm(vmid(vm)).is_some() {
                    return Err("the old one is still there".to_owned());
                }
                let spec = self.world_vm(vmid(vm), &self.setup.nodes[node]);
                self.sim.add_vm(&spec).map_err(|error| error.to_string())?;
            }
            Admin::Register(vm) => self.register(vmid(vm)),
            Admin::DeleteVolume(volume) => {
                let spec = &self.setup.volumes[volume];
                let node = spec.key.node.as_ref().unwrap_or(&self.setup.nodes[0]);
                let id =
                    percent_encoding::utf8_percent_encode(&volid(spec), percent_encoding::NON_ALPHANUMERIC)
                        .to_string();
                let path = format!("/nodes/{node}/storage/{}/content/{id}", spec.key.storage);
                self.ask_task("DELETE", &path, "").await?;
            }
            Admin::DriftLose(vm, volume) => {
                let holds = self.holds_of(vmid(vm));
                let hold = holds.iter().find(|hold| hold.volume == volume && hold.at == Where::Qemu);
                let slot = hold.ok_or("QEMU does not have it")?.slot.clone();
                self.inject(Fault::Drift { vmid: vmid(vm), slot, volume: None })?;
            }
            Admin::DriftGain(vm, volume) => self.drift_gain(vmid(vm), volume)?,
            Admin::KeyOrder(seed) => self.inject(Fault::KeyOrder { seed, keys: Vec::new(), on: true })?,
        }
        Ok(())
    }

    fn number(&self) -> u32 {
        self.ledger().number()
    }

    fn inject(&self, fault: Fault) -> Result<(), String> {
        self.sim.inject(fault).map_err(|error| error.to_string())
    }

    async fn power(&self, vmid: u32, what: &str) -> Result<(), String> {
        let path = self.path(vmid)?;
        self.ask_task("POST", &format!("{path}/status/{what}"), "").await.map(drop)
    }

    async fn set(&self, vmid: u32, form: &str) -> Result<(), String> {
        let path = self.path(vmid)?;
        self.ask_task("POST", &format!("{path}/config"), form).await.map(drop)
    }

    /// Takes a VM for one that a person gave a volume to, from before it is so.
    fn by_hand(&self, volume: usize, vmid: u32) {
        self.ledger().by_hand.insert((volume, vmid), None);
    }

    /// It is so since now.
    fn by_hand_now(&self, volume: usize, vmid: u32) {
        if let Some(since) = self.ledger().by_hand.get_mut(&(volume, vmid)) {
            *since = Some(Instant::now());
        }
    }

    async fn plug_by_hand(&self, vmid: u32, volume: usize, slot: u8) -> Result<(), String> {
        let spec = &self.setup.volumes[volume];
        let view = self.sim.vm(vmid).ok_or("no such VM")?;
        let slot = format!("scsi{slot}");
        // A person sees what the slot has.
        if view.current(&slot).is_some() || view.pending(&slot).is_some() {
            return Err(format!("{slot} is taken"));
        }
        self.by_hand(volume, vmid);
        let done = self.set(vmid, &format!("{slot}={}", volid(spec))).await;
        self.by_hand_now(volume, vmid);
        done
    }

    async fn unplug_by_hand(&self, vmid: u32, volume: usize) -> Result<(), String> {
        let holds = self.holds_of(vmid);
        let hold = holds.iter().find(|hold| hold.volume == volume && hold.at != Where::Qemu);
        let slot = hold.ok_or("it does not have it")?.slot.clone();
        self.set(vmid, &format!("delete={slot}")).await
    }

    fn drift_gain(&self, vmid: u32, volume: usize) -> Result<(), String> {
        let spec = &self.setup.volumes[volume];
        let view = self.sim.vm(vmid).ok_or("no such VM")?;
        let free = |slot: &String| {
            view.current(slot).is_none()
                && view.pending(slot).is_none()
                && view.blockstat().is_none_or(|keys| !keys.contains(slot.as_str()))
        };
        let slot = (7..20).map(|number| format!("scsi{number}")).find(free).ok_or("no slot is free")?;
        self.by_hand(volume, vmid);
        let done = self.inject(Fault::Drift { vmid, slot, volume: Some(volid(spec)) });
        self.by_hand_now(volume, vmid);
        done
    }

    async fn rollback(&self, vmid: u32) -> Result<(), String> {
        let view = self.sim.vm(vmid).ok_or("no such VM")?;
        let (name, _) = view.conf.snapshots.iter().next_back().ok_or("it has no snapshot")?;
        let touched: Vec<usize> = (0..self.setup.volumes.len())
            .filter(|volume| self.snapshots_with(*volume).iter().any(|(vm, of)| *vm == vmid && of == name))
            .collect();
        for volume in &touched {
            self.by_hand(*volume, vmid);
        }
        let path = self.path(vmid)?;
        let done = self.ask_task("POST", &format!("{path}/snapshot/{name}/rollback"), "").await;
        for volume in touched {
            self.by_hand_now(volume, vmid);
        }
        done.map(drop)
    }

    pub async fn drop_snapshot(&self, vmid: u32) -> Result<(), String> {
        let view = self.sim.vm(vmid).ok_or("no such VM")?;
        let (name, _) = view.conf.snapshots.iter().next_back().ok_or("it has no snapshot")?;
        let path = format!("{}/snapshot/{name}", self.path(vmid)?);
        self.ask_task("DELETE", &path, "").await.map(drop)
    }

    async fn destroy(&self, vmid: u32) -> Result<(), String> {
        self.sim.stop_vm(vmid).await;
        let path = self.path(vmid)?;
        self.ask_task("DELETE", &path, "purge=1").await.map(drop)
    }

    /// A VM under an old VMID, which is another one.
    fn world_vm(&self, vmid: u32, node: &str) -> Vm {
        Vm {
            vmid,
            node: node.to_owned(),
            name: format!("worker-{vmid}"),
            running: true,
            guest: Guest::Memory,
            config: setup::config(vmid, "ceph", self.number(), None),
            pool: None,
            hastate: None,
        }
    }

    /// Something breaks, and is well again after so many seconds.
    pub async fn suffer(&self, trouble: &Trouble, seconds: u64) {
        let vmid = |vm: usize| self.setup.vms[vm].vmid;
        let node = |node: usize| self.setup.nodes[node].clone();
        let storage = |at: usize| self.setup.storages[at].0.clone();
        let token = if self.setup.holders { HOLDER } else { CSI }.to_owned();
        let fault = |on: bool| {
            Some(match trouble.clone() {
                Trouble::Privilege(name) => {
                    Fault::DropPrivilege { who: token.clone(), privilege: name.to_owned(), on }
                }
                Trouble::Token => Fault::ExpireToken { token: token.clone(), on },
                Trouble::Fill(at) => Fault::FillStorage { storage: storage(at), on },
                Trouble::Unmount(at) => Fault::Unmount { storage: storage(at), on },
                Trouble::Kill(at) => Fault::KillNode { node: node(at), on },
                Trouble::Cut(at) => Fault::CutNode { node: node(at), on },
                Trouble::Reboot(at) => Fault::RebootNode { node: node(at), ms: seconds * 1000 },
                Trouble::Quorum => Fault::LoseQuorum { on },
                Trouble::BusyGuest(vm) => Fault::HangUnplug { vmid: vmid(vm), on },
                Trouble::HungQemu(vm) => Fault::HangQemu { vmid: vmid(vm), on },
                Trouble::HeldVm(vm) => Fault::HoldLock { lock: format!("vm/{}", vmid(vm)), on },
                Trouble::HeldStorage(on_node, at) => {
                    let shared = self.setup.storages[at].1;
                    let place = if shared { "*".to_owned() } else { node(on_node) };
                    Fault::HoldLock { lock: format!("storage/{place}/{}", storage(at)), on }
                }
                // The wire loses them.
                Trouble::Chaos(..) => return None,
                Trouble::SlowTasks(worker, longer) => {
                    Fault::DelayTask { worker: worker.to_owned(), ms: longer * 1000, times: 2 }
                }
            })
        };
        if let Trouble::Chaos(seed, percent) = *trouble {
            let until = Instant::now() + Duration::from_secs(seconds);
            self.ledger().chaos = Some(Chaos { chance: Chance::new(seed), percent, until });
        }
        let play = |on: bool| fault(on).map_or(Ok(()), |fault| self.inject(fault));
        let reboots = matches!(trouble, Trouble::Reboot(_));
        let all = self.sim.vmids();
        let touch = reboots.then(|| {
            let mut ledger = self.ledger();
            for vmid in &all {
                *ledger.busy.entry(*vmid).or_default() += 1;
            }
            ledger.touch(None, None)
        });
        let begun = play(true);
        sleep(Duration::from_secs(seconds)).await;
        if reboots {
            sleep(Duration::from_secs(5)).await;
        } else if !matches!(trouble, Trouble::SlowTasks(..)) {
            play(false).ok();
        }
        if let Some(touch) = touch {
            self.ledger().touched(touch);
            for vmid in all {
                self.settled(vmid);
            }
        }
        let said = begun.err().unwrap_or_else(|| "over".to_owned());
        self.ledger().say(&format!("  {trouble:?} -> {said}"));
    }
}

/// The VM and the volume that an act is about.
fn about(act: &Admin) -> (Option<usize>, Option<usize>) {
    match *act {
        Admin::Stop(vm)
        | Admin::Start(vm)
        | Admin::Restart(vm)
        | Admin::Migrate(vm, _)
        | Admin::Failover(vm, _)
        | Admin::Rename(vm)
        | Admin::Tag(vm)
        | Admin::Hotplug(vm, _)
        | Admin::Protect(vm, _)
        | Admin::Lock(vm, _)
        | Admin::AddDisk(vm, _)
        | Admin::DropDisk(vm)
        | Admin::PendingDisk(vm, _)
        | Admin::Snapshot(vm)
        | Admin::Rollback(vm)
        | Admin::DropSnapshot(vm)
        | Admin::Destroy(vm)
        | Admin::Recreate(vm, _)
        | Admin::Register(vm) => (Some(vm), None),
        Admin::Plug(vm, volume, _)
        | Admin::Unplug(vm, volume)
        | Admin::DriftLose(vm, volume)
        | Admin::DriftGain(vm, volume) => (Some(vm), Some(volume)),
        Admin::DeleteVolume(volume) => (None, Some(volume)),
        // It changes what comes, not what is.
        Admin::KeyOrder(_) => (None, Some(usize::MAX)),
    }
}
