//! Starting and stopping (qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `QemuServer.pm:vm_start_nolock`).

use super::hotplug::{blocking_on_guest, destroy};
use super::update::check_lock;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{dirplugin, pending};
use serde_json::json;

/// `POST status/start`.
pub(super) fn start(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| state.vm_on(call.node(), call.vmid()).map(|_| ()))?;
    let (sim, vmid) = (call.sim.clone(), call.vmid());
    let upid =
        call.sim.start_task(call.node(), "qmstart", &vmid.to_string(), &call.user, move |_| async move {
            power_on(&sim, vmid).await
        });
    Ok(json!(upid).into())
}

/// `POST status/stop`.
pub(super) fn stop(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| state.vm_on(call.node(), call.vmid()).map(|_| ()))?;
    let (sim, vmid) = (call.sim.clone(), call.vmid());
    let upid =
        call.sim.start_task(call.node(), "qmstop", &vmid.to_string(), &call.user, move |_| async move {
            let _lock = sim.locks().vm(vmid).await?;
            sim.read(|state| state.vms.get(&vmid).map_or(Ok(()), |vm| check_lock(&vm.conf)))?;
            sim.clock().spend(Cost::Power).await;
            cut(&sim, vmid).await;
            Ok(())
        });
    Ok(json!(upid).into())
}

/// Applies what is pending and starts QEMU with every disk of the config.
pub(crate) async fn power_on(sim: &Sim, vmid: u32) -> Result<(), PveError> {
    let _lock = sim.locks().vm(vmid).await?;
    sim.clock().spend(Cost::Power).await;
    let doomed = sim.change(|state| {
        let vm = state.vms.get_mut(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        check_lock(&vm.conf)?;
        if vm.running {
            return Err(PveError::die(format!("VM {vmid} already running")));
        }
        Ok(pending::apply_all(&mut vm.conf, vmid))
    })?;
    destroy(sim, vmid, doomed).await?;
    sim.read(|state| {
        let vm = state.vms.get(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        for (_, drive) in Conf::disks(&vm.conf.current) {
            let key = state.volume_key(&vm.node, &drive.file)?;
            state.storage(&vm.node, &key.storage)?;
            if !state.volumes.contains_key(&key) {
                return Err(dirplugin::missing(&drive.file));
            }
        }
        Ok(())
    })?;
    let now = sim.clock().elapsed().as_secs();
    sim.change(|state| {
        if let Some(vm) = state.vms.get_mut(&vmid) {
            vm.running = true;
            vm.hung = false;
            vm.started = now;
        }
    });
    let memory = sim.guests().is_none();
    let handle = sim.clone();
    let booted = if memory { handle.boot(vmid) } else { super::blocking(move || handle.boot(vmid)).await? };
    booted.map_err(|(file, error)| PveError::die(format!("start failed: cannot open '{file}': {error}")))
}

/// Takes the power away: QEMU and the guest's disks are gone. Returns whether there is such a VM.
pub(crate) async fn cut(sim: &Sim, vmid: u32) -> bool {
    if let Some(guests) = sim.guests().cloned() {
        let gone = blocking_on_guest(sim, vmid, move || guests.unplug_all(vmid)).await;
        if let Err(error) = gone {
            tracing::error!(vm = vmid, %error, "cannot take the disks of a stopped VM away");
        }
    }
    sim.change(|state| {
        let Some(vm) = state.vms.get_mut(&vmid) else { return false };
        vm.running = false;
        vm.drives.clear();
        true
    })
}
