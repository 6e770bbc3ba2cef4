//! Playing faults: those that change the cluster do so here, the others wait in `faults::Pending`.

use super::Sim;
use super::faults::Fault;
use super::rules::drive::{Drive, index_of};
use super::rules::order::KeyOrder;
use super::state::{NodeState, QemuDrive, State, Vm};
use std::sync::PoisonError;
use std::time::Duration;

/// A fault names something the cluster does not have, or that cannot be so.
#[derive(Debug, thiserror::Error)]
#[error("the simulated cluster has no {0}")]
pub struct UnknownTarget(String);

fn unknown<T>(what: String) -> Result<T, UnknownTarget> {
    Err(UnknownTarget(what))
}

fn vm(state: &mut State, vmid: u32) -> Result<&mut Vm, UnknownTarget> {
    state.vms.get_mut(&vmid).ok_or_else(|| UnknownTarget(format!("VM {vmid}")))
}

fn set<T: Ord>(set: &mut std::collections::BTreeSet<T>, what: T, on: bool) {
    if on {
        set.insert(what);
    } else {
        set.remove(&what);
    }
}

impl Sim {
    /// Plays a fault: one that changes the cluster at once, any other on the requests or tasks it names. Must be called
    /// within a tokio runtime.
    pub fn inject(&self, fault: Fault) -> Result<(), UnknownTarget> {
        match fault {
            Fault::BlindGuest { vmid, on } => {
                let on_disks = self.guests().is_some_and(|guests| guests.set_blind(vmid, on));
                if self.blind_in_memory(vmid, on) || on_disks {
                    Ok(())
                } else {
                    unknown(format!("guest of VM {vmid}"))
                }
            }
            Fault::HangQemu { vmid, on } if self.is_qemu(vmid) => {
                let Some(machine) = self.real_machine(vmid) else {
                    return unknown(format!("QEMU of VM {vmid}"));
                };
                machine.hang(on);
                self.change(|state| inject_into(state, Fault::HangQemu { vmid, on }))
            }
            Fault::HangUnplug { vmid, on } if self.is_qemu(vmid) => self.stop_processors(vmid, on),
            Fault::HoldLock { lock, on } => self.hold(&lock, on),
            Fault::KillNode { node, on } => {
                self.set_node(&node, if on { NodeState::Dead } else { NodeState::Online })
            }
            Fault::CutNode { node, on } => {
                self.set_node(&node, if on { NodeState::Cut } else { NodeState::Online })
            }
            Fault::RebootNode { node, ms } => self.reboot(node, Duration::from_millis(ms)),
            Fault::Unmount { storage, on } => {
                let now = self.clock().elapsed().as_secs();
                self.change(|state| {
                    if on {
                        state.unmounted.entry(storage).or_insert(now);
                    } else {
                        state.unmounted.remove(&storage);
                    }
                });
                Ok(())
            }
            Fault::Drift { vmid, slot, volume } => self.drift(vmid, &slot, volume.as_deref()),
            other => self.change(|state| inject_into(state, other)),
        }
    }

    fn set_node(&self, node: &str, fares: NodeState) -> Result<(), UnknownTarget> {
        let now = self.clock().elapsed().as_secs();
        self.change(|state| {
            match state.nodes.get_mut(node) {
                Some(known) => *known = fares,
                None => return unknown(format!("node `{node}`")),
            }
            state.died.remove(node);
            if fares != NodeState::Online {
                state.died.insert(node.to_owned(), now);
            }
            Ok(())
        })?;
        self.node_changed();
        Ok(())
    }

    /// Its VMs lose their power; what runs at boot starts when it is back.
    fn reboot(&self, node: String, down: Duration) -> Result<(), UnknownTarget> {
        self.set_node(&node, NodeState::Rebooting)?;
        let sim = self.clone();
        tokio::spawn(async move {
            let there = |vm: &Vm| vm.node == node;
            let running: Vec<u32> = sim.read(|state| {
                let running = state.vms.iter().filter(|(_, vm)| there(vm) && vm.running);
                running.map(|(vmid, _)| *vmid).collect()
            });
            for vmid in running {
                super::api::power::cut(&sim, vmid).await;
            }
            tokio::time::sleep(down).await;
            if sim.read(|state| state.nodes.get(&node) != Some(&NodeState::Rebooting)) {
                return;
            }
            // The node is known: it was set above.
            let _ = sim.set_node(&node, NodeState::Online);
            let boots: Vec<u32> = sim.read(|state| {
                let boots = |vm: &Vm| vm.conf.current.get("onboot").is_some_and(|value| value == "1");
                let found = state.vms.iter().filter(|(_, vm)| there(vm) && boots(vm));
                found.map(|(vmid, _)| *vmid).collect()
            });
            for vmid in boots {
                // `pve-guests` starts them as tasks of root (pve-manager `API2/Nodes.pm:startall`).
                let handle = sim.clone();
                sim.start_task(&node, "qmstart", &vmid.to_string(), "root@pam", move |_| async move {
                    super::api::power::power_on(&handle, vmid).await
                });
            }
            sim.save().await;
        });
        Ok(())
    }

    fn hold(&self, name: &str, on: bool) -> Result<(), UnknownTarget> {
        let mut held = self.inner.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !on {
            held.remove(name);
            return Ok(());
        }
        if held.contains_key(name) {
            return Ok(());
        }
        let known = self.read(|state| match name.split('/').collect::<Vec<_>>().as_slice() {
            ["vm", vmid] => vmid.parse().is_ok_and(|vmid| state.vms.contains_key(&vmid)),
            ["storage", node, id] => {
                let shared = state.storages.get(*id).map(|storage| storage.config.shared);
                shared.is_some_and(|shared| shared == (*node == "*"))
                    && (*node == "*" || state.nodes.contains_key(*node))
            }
            _ => false,
        });
        if !known {
            return unknown(format!(
                "lock `{name}` (it is `vm/100`, `storage/pve1/local`, or `storage/*/shared` for a shared one)"
            ));
        }
        match self.locks().try_hold(name) {
            Some(lock) => {
                held.insert(name.to_owned(), lock);
                Ok(())
            }
            None => unknown(format!("lock `{name}` that is free at the moment")),
        }
    }

    /// A guest whose processors stand still serves no removal.
    fn stop_processors(&self, vmid: u32, on: bool) -> Result<(), UnknownTarget> {
        let Some(machine) = self.real_machine(vmid) else { return unknown(format!("QEMU of VM {vmid}")) };
        self.change(|state| inject_into(state, Fault::HangUnplug { vmid, on }))?;
        tokio::spawn(async move {
            let command = if on { "stop" } else { "cont" };
            if let Err(error) = machine.command(command, serde_json::json!({})).await {
                tracing::error!(vm = vmid, %error, "a fault has not reached QEMU");
            }
        });
        Ok(())
    }

    /// QEMU gets a drive behind Proxmox's back, or loses one.
    fn drift(&self, vmid: u32, slot: &str, volume: Option<&str>) -> Result<(), UnknownTarget> {
        let shown = self.change(|state| {
            let node = vm(state, vmid)?.node.clone();
            let drive = match volume {
                Some(volid) => {
                    let key = state.volume_key(&node, volid).ok();
                    let size = key.as_ref().and_then(|key| state.volumes.get(key)).map(|volume| volume.size);
                    let (Some(volume), Some(size)) = (key, size) else {
                        return unknown(format!("volume `{volid}` on node `{node}`"));
                    };
                    let drive = Drive { file: volid.to_owned(), options: std::collections::BTreeMap::new() };
                    Some(QemuDrive { volume, drive, size })
                }
                None => None,
            };
            let vm = vm(state, vmid)?;
            if !vm.running {
                return unknown(format!("QEMU of VM {vmid}, which does not run"));
            }
            match drive.clone() {
                Some(drive) => drop(vm.drives.insert(slot.to_owned(), drive)),
                None if vm.drives.remove(slot).is_none() => {
                    return unknown(format!("`{slot}` in the QEMU of VM {vmid}"));
                }
                None => {}
            }
            Ok(drive)
        })?;
        match &shown {
            Some(drive) => self.plug_in_memory(vmid, slot, drive),
            None => self.unplug_in_memory(vmid, slot),
        }
        let (sim, slot) = (self.clone(), slot.to_owned());
        if let Some(machine) = self.real_machine(vmid) {
            tokio::spawn(async move {
                let done = match &shown {
                    Some(drive) => sim.plug_into(&machine, &slot, drive).await,
                    None => sim.unplug_from(&machine, &slot).await,
                };
                if let Err(error) = done {
                    tracing::error!(vm = vmid, slot, %error, "a QEMU has not what it drifted to");
                }
            });
            return Ok(());
        }
        let Some(guests) = self.guests().cloned() else { return Ok(()) };
        tokio::task::spawn_blocking(move || {
            let done = match (&shown, index_of(&slot, "scsi")) {
                (Some(drive), _) => sim.show(vmid, &slot, drive),
                (None, Some(number)) => guests.unplug(vmid, number),
                (None, None) => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!(vm = vmid, slot, %error, "a guest does not see what its QEMU has");
            }
        });
        Ok(())
    }

    /// Takes every fault back, those of the cluster's state too; keys that were set, HA states and drives that drifted
    /// stay.
    pub fn clear_faults(&self) {
        for vmid in self.vmids() {
            self.blind_in_memory(vmid, false);
            if let Some(guests) = self.guests() {
                guests.set_blind(vmid, false);
            }
            let (hung, busy) =
                self.read(|state| state.vms.get(&vmid).map_or((false, false), |vm| (vm.hung, vm.busy)));
            if let Some(machine) = self.real_machine(vmid).filter(|_| hung) {
                machine.hang(false);
            }
            if busy && self.is_qemu(vmid) {
                // Its QEMU is there, or there is nothing to let go on.
                let _ = self.stop_processors(vmid, false);
            }
        }
        self.inner.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.change(|state| {
            state.faults.clear();
            state.nodes.values_mut().for_each(|fares| *fares = NodeState::Online);
            state.died.clear();
            state.quorum_lost = false;
            state.key_order = KeyOrder::default();
            state.silent_agents.clear();
            state.unmounted.clear();
            state.access.dropped.clear();
            state.storages.values_mut().for_each(|storage| storage.full = false);
            for vm in state.vms.values_mut() {
                vm.busy = false;
                vm.hung = false;
            }
            for (token, secret) in std::mem::take(&mut state.expired) {
                state.tokens.insert(token, Some(secret));
            }
        });
        self.node_changed();
    }
}

fn inject_into(state: &mut State, fault: Fault) -> Result<(), UnknownTarget> {
    match fault {
        Fault::HangUnplug { vmid, on } => vm(state, vmid)?.busy = on,
        Fault::HangQemu { vmid, on } => {
            let vm = vm(state, vmid)?;
            vm.hung = on;
            vm.stuck = false;
        }
        Fault::LoseQuorum { on } => state.quorum_lost = on,
        Fault::KeyOrder { seed, keys, on } => {
            state.key_order = if on { KeyOrder::new(seed, keys) } else { KeyOrder::default() };
        }
        Fault::SilentAgent { vmid, on } => set(&mut state.silent_agents, vmid, on),
        Fault::FillStorage { storage, on } => match state.storages.get_mut(&storage) {
            Some(storage) => storage.full = on,
            None => return unknown(format!("storage `{storage}`")),
        },
        Fault::ExpireToken { token, on } => {
            let Some(secret) = state.tokens.get_mut(&token) else {
                return unknown(format!("token `{token}`"));
            };
            if on {
                state.expired.extend(secret.take().map(|secret| (token, secret)));
            } else if let Some(old) = state.expired.remove(&token) {
                *secret = Some(old);
            }
        }
        Fault::ExpireTickets => state.ticket_age += 1,
        Fault::DropPrivilege { who, privilege, on } => {
            if !super::rules::roles::ALL_PRIVILEGES.contains(&privilege.as_str()) {
                return unknown(format!("privilege `{privilege}`"));
            }
            set(&mut state.access.dropped, (who, privilege), on);
        }
        Fault::HaState { vmid, state: said } => vm(state, vmid)?.hastate = said,
        Fault::SetKey { vmid, key, value } => {
            let values = &mut vm(state, vmid)?.conf.current;
            match value {
                Some(value) => drop(values.insert(key, value)),
                None => drop(values.remove(&key)),
            }
        }
        waiting => state.faults.push(waiting),
    }
    Ok(())
}
