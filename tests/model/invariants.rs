//! What must be true after each step, whatever happened: looked at in the simulator's own state, never through the driver.
//!
//! `judge` looks at requests before they go out, `calls` at answers when they are heard, and `quiesce` at what is left in the end.

use std::collections::{BTreeMap, BTreeSet};

use proxmox_csi::sim::{VmView, rules::drive::Drive, state::VolumeKey};

use crate::{
    holds::{Hold, wwn},
    ledger::Foreign,
    rig::Rig,
    support::settings,
};

impl Rig {
    /// Checks all of them.
    pub fn check(&self) {
        let views: BTreeMap<u32, VmView> =
            self.sim.vmids().into_iter().filter_map(|vmid| Some((vmid, self.sim.vm(vmid)?))).collect();
        let holds: Vec<Hold> = views.iter().flat_map(|(vmid, vm)| self.holds_in(*vmid, vm)).collect();
        self.forget_what_is_over(&holds);
        self.one_writer(&holds);
        self.a_disk_answers_with_its_volumes_own_name(&holds);
        self.nothing_of_others_changes(&views);
        self.all_is_modelled();
        self.ledger().tidy();
    }

    /// A volume that was plugged in by hand and has left the VM is no excuse any more.
    fn forget_what_is_over(&self, holds: &[Hold]) {
        let held: BTreeSet<(usize, u32)> = holds.iter().map(|hold| (hold.volume, hold.vm)).collect();
        self.ledger().by_hand.retain(|key, since| since.is_none() || held.contains(key));
    }

    /// P1: a volume is in one VM, in force, pending or in its QEMU, unless all only read it, or a person put it into the others.
    fn one_writer(&self, holds: &[Hold]) {
        let mut users: BTreeMap<usize, BTreeMap<u32, bool>> = BTreeMap::new();
        {
            let ledger = self.ledger();
            for hold in holds.iter().filter(|hold| !ledger.by_hand.contains_key(&(hold.volume, hold.vm))) {
                let writes = users.entry(hold.volume).or_default().entry(hold.vm).or_default();
                *writes |= !hold.read_only;
            }
        }
        for (volume, vms) in users {
            if vms.len() > 1 && (vms.values().any(|writes| *writes) || !self.setup.volumes[volume].many) {
                let where_: Vec<_> = holds.iter().filter(|hold| hold.volume == volume).collect();
                let text = format!("pvc-{volume} is in several VMs: {where_:?}");
                self.ledger().wrong("one_writer", text);
            }
        }
    }

    /// P3: what a drive of a VM answers with is the name of the volume behind it. What people plugged in by hand may have none.
    fn a_disk_answers_with_its_volumes_own_name(&self, holds: &[Hold]) {
        let ours = |hold: &&Hold| !settings().holders.contains(&hold.vm);
        for hold in holds.iter().filter(ours) {
            let name = wwn(&self.setup.volumes[hold.volume]);
            if hold.wwn.as_ref().is_some_and(|wwn| *wwn != name) {
                let text = format!("{hold:?}, which is not {name}");
                self.ledger().wrong("a_disk_answers_with_its_volumes_own_name", text);
            }
        }
    }

    /// P7: disks, slots, tags, names and descriptions of others are what their owners made them, and so are volumes of others.
    fn nothing_of_others_changes(&self, views: &BTreeMap<u32, VmView>) {
        let mut ledger = self.ledger();
        let mut found = Vec::new();
        for (vmid, expected) in &ledger.foreign {
            if ledger.busy.contains_key(vmid) {
                continue;
            }
            match views.get(vmid).map(|vm| self.foreign_in(vm)) {
                Some(now) if now == *expected => {}
                Some(now) => found.push(format!("VM {vmid} was {expected:?} and is {now:?}")),
                None => found.push(format!("VM {vmid} is gone")),
            }
        }
        for vmid in views.keys() {
            if !ledger.foreign.contains_key(vmid)
                && !ledger.busy.contains_key(vmid)
                && !settings().holders.contains(vmid)
            {
                found.push(format!("VM {vmid} came from nowhere"));
            }
        }
        if ledger.busy.is_empty() {
            let now = self.foreign_volumes();
            if now != ledger.foreign_volumes {
                let expected = &ledger.foreign_volumes;
                let gone: Vec<_> = expected.keys().filter(|key| !now.contains_key(key)).collect();
                let new: Vec<_> = now.keys().filter(|key| !expected.contains_key(key)).collect();
                found.push(format!("volumes of others: gone {gone:?}, new {new:?}, or of another size"));
            }
        }
        if let Some(text) = found.into_iter().next() {
            ledger.wrong("nothing_of_others_changes", text);
        }
    }

    /// The simulator knows every request that was sent.
    fn all_is_modelled(&self) {
        let unknown = self.sim.unmodelled();
        if !unknown.is_empty() {
            self.ledger().wrong("all_is_modelled", format!("{unknown:?}"));
        }
    }

    /// What of a VM is not ours: every key but those whose drive is a volume of ours, and those that Proxmox writes itself.
    fn foreign_in(&self, vm: &VmView) -> Foreign {
        let is_ours = |key: &str, text: &str| {
            let file = text.split(',').next().unwrap_or_default();
            text.contains("9999")
                && (key.starts_with("unused") || Drive::stored(key, text).is_some())
                && (self.volume_of(&vm.node, file).is_some()
                    || self.setup.volumes.iter().any(|spec| spec.key.volid() == file))
        };
        let mut foreign = Foreign::new();
        // What waits for the next start counts as there: any change of a VM that is not running brings it about, ours too (qemu-server
        // `API2/Qemu.pm:update_vm_api`), and what it replaces becomes `unusedN`.
        for (key, text) in vm.conf.merged() {
            let by_proxmox = matches!(key.as_str(), "lock" | "parent") || key.starts_with("unused");
            if !by_proxmox && !is_ours(&key, &text) {
                foreign.insert(key, text);
            }
        }
        foreign.insert("node".to_owned(), vm.node.clone());
        foreign
    }

    fn foreign_volumes(&self) -> BTreeMap<VolumeKey, u64> {
        let is_ours = |key: &VolumeKey| self.setup.volumes.iter().any(|spec| spec.key == *key);
        self.sim
            .volumes()
            .into_iter()
            .filter(|volume| !is_ours(&volume.key))
            .map(|volume| (volume.key, volume.size))
            .collect()
    }

    /// What a VM has now is as its administrators want it.
    pub fn take_for_granted(&self, vmid: u32) {
        if settings().holders.contains(&vmid) {
            return;
        }
        let foreign = self.sim.vm(vmid).map(|vm| self.foreign_in(&vm));
        let volumes = self.foreign_volumes();
        let mut ledger = self.ledger();
        match foreign {
            Some(foreign) => drop(ledger.foreign.insert(vmid, foreign)),
            None => drop(ledger.foreign.remove(&vmid)),
        }
        ledger.foreign_volumes = volumes;
    }

    /// All that is there now is of others.
    pub fn take_all_for_granted(&self) {
        for vmid in self.sim.vmids() {
            self.take_for_granted(vmid);
        }
    }
}
