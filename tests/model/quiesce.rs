//! The end of a run: people mend what they broke, nothing fails any more, and the sidecars go on until every volume is detached and
//! deleted. Then nothing of the driver is left anywhere.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    holds::Where,
    ledger::Created,
    plan::{Call, Kind},
    rig::Rig,
    support::settings,
};

/// How often a sidecar tries in a cluster that is well.
const TRIES: u32 = 9;

impl Rig {
    /// Mends everything, takes everything away, and looks at what is left.
    pub async fn quiesce(&self) {
        self.ledger().say("all is mended");
        self.mend().await;
        // The lease finds a holder, which waits until nothing of one before it can be at work.
        sleep(Duration::from_secs(100)).await;
        for volume in 0..self.setup.volumes.len() {
            self.finish(volume).await;
            if self.ledger().wrong.is_some() {
                return;
            }
        }
        // Holders that were left over are tidied up by sweeps: one that sees them, and one that sees them again.
        sleep(Duration::from_mins(4)).await;
        self.nothing_leaks();
        self.check();
    }

    /// People take back what they did, and reboot what parted from its config.
    async fn mend(&self) {
        self.sim.clear_faults();
        self.reunite();
        {
            let mut ledger = self.ledger();
            ledger.cuts.clear();
            ledger.chaos = None;
        }
        for vmid in self.sim.vmids() {
            if settings().holders.contains(&vmid) {
                continue;
            }
            for key in ["lock", "protection", "hotplug"] {
                self.sim.set_vm_key(vmid, key, None);
            }
            self.sim.stop_vm(vmid).await;
            while self.sim.vm(vmid).is_some_and(|vm| !vm.conf.snapshots.is_empty()) {
                if let Err(error) = self.drop_snapshot(vmid).await {
                    self.ledger().say(&format!("  a snapshot of VM {vmid} stays: {error}"));
                    self.sim.set_vm_key(vmid, "lock", None);
                    break;
                }
            }
            let by_hand: Vec<usize> = self
                .ledger()
                .by_hand
                .keys()
                .filter(|(_, vm)| *vm == vmid)
                .map(|(volume, _)| *volume)
                .collect();
            for hold in self.holds_of(vmid) {
                if by_hand.contains(&hold.volume) && hold.at != Where::Qemu {
                    let path = self.sim.vm(vmid).map(|vm| format!("/nodes/{}/qemu/{vmid}/config", vm.node));
                    let path = path.unwrap_or_default();
                    self.ask_task("POST", &path, &format!("delete={}", hold.slot)).await.ok();
                }
            }
            // One whose disk somebody deleted does not start.
            if let Err(error) = self.sim.start_vm(vmid).await {
                self.ledger().say(&format!("  VM {vmid} does not start: {error:?}"));
            }
            if self.setup.vms.iter().any(|vm| vm.vmid == vmid && vm.is_worker) {
                self.register(vmid);
            }
        }
        for vm in &self.setup.vms {
            self.register(vm.vmid);
        }
        self.take_all_for_granted();
        self.ledger().by_hand.clear();
    }

    /// What the sidecars still have to do about a volume.
    async fn finish(&self, volume: usize) {
        let (created, published) = {
            let ledger = self.ledger();
            (ledger.lives[volume].created, ledger.lives[volume].published.clone())
        };
        let call = |kind, vm| Call { kind, volume, vm, tries: TRIES, deadline: 300, other: false };
        if created == Created::Unknown {
            // The provisioner asks until it knows.
            self.it_comes_to_an_end_when_nothing_fails_any_more(&call(Kind::Create, 0), true).await;
        }
        for vmid in published {
            let vm = self.setup.vms.iter().position(|vm| vm.vmid == vmid).expect("it is of the setup");
            self.it_comes_to_an_end_when_nothing_fails_any_more(&call(Kind::Unpublish, vm), false).await;
        }
        if self.ledger().lives[volume].created != Created::No {
            self.it_comes_to_an_end_when_nothing_fails_any_more(&call(Kind::Delete, 0), false).await;
        }
    }

    /// A call that comes to an end in a cluster that is well; with `or_refused`, a final refusal is one.
    async fn it_comes_to_an_end_when_nothing_fails_any_more(&self, call: &Call, or_refused: bool) {
        match self.call(call).await {
            Some(Ok(_)) => {}
            Some(Err(status)) if or_refused && !crate::calls::is_unknown(status.code()) => {}
            last => {
                let text = format!("{:?} of pvc-{}: {last:?}", call.kind, call.volume);
                self.ledger().wrong("it_comes_to_an_end_when_nothing_fails_any_more", text);
            }
        }
    }

    /// P5: no volume, no drive and no holder of ours is left.
    fn nothing_leaks(&self) {
        let left: Vec<String> = self
            .sim
            .volumes()
            .into_iter()
            .filter(|volume| self.setup.volumes.iter().any(|spec| spec.key == volume.key))
            .map(|volume| volume.key.volid())
            .collect();
        if !left.is_empty() {
            self.ledger().wrong("nothing_leaks", format!("volumes {left:?}"));
        }
        let holds = self.holds();
        if !holds.is_empty() {
            self.ledger().wrong("nothing_leaks", format!("drives {holds:?}"));
        }
        let locked = |vmid: &u32| self.sim.vm(*vmid).is_some_and(|vm| vm.current("lock") == Some("create"));
        let holders: Vec<u32> = self
            .sim
            .vmids()
            .into_iter()
            // A VM whose creation was killed half way stays locked until an administrator unlocks it: nobody else can.
            .filter(|vmid| settings().holders.contains(vmid) && !locked(vmid))
            .collect();
        if !holders.is_empty() {
            self.ledger().wrong("nothing_leaks", format!("holders {holders:?}"));
        }
    }
}
