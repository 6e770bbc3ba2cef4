//! Starting and stopping (qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `QemuServer.pm:vm_start_nolock`).

use super::hotplug::{blocking_on_guest, destroy};
use super::update::check_lock;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{Drive, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::pending;
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// `POST status/start`.
pub(super) fn start(call: &Call) -> Result<Reply, PveError> {
    super::check_quorum(call)?;
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
        if vm.conf.current.get("template").is_some_and(|value| value == "1") {
            return Err(PveError::die("you can't start a vm if it's a template"));
        }
        if vm.running {
            return Err(PveError::die(format!("VM {vmid} already running")));
        }
        Ok(pending::apply_all(&mut vm.conf, vmid))
    })?;
    destroy(sim, vmid, doomed, &TaskLog::nowhere(sim)).await?;
    sim.read(|state| {
        let vm = state.vms.get(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        for (_, drive) in Conf::disks(&vm.conf.current) {
            let key = state.volume_key(&vm.node, &drive.file)?;
            state.storage(&vm.node, &key.storage)?;
            state.existing(&key)?;
        }
        for value in vm.conf.current.iter().filter(|(key, _)| is_drive_key(key)).map(|(_, value)| value) {
            let drive = Drive::stored("drive", value).filter(Drive::is_cdrom);
            drive.map_or(Ok(()), |drive| super::files::check_there(state, &vm.node, &drive.file))?;
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
    let real = sim.is_qemu(vmid);
    let memory = sim.guests().is_none() && !real;
    let handle = sim.clone();
    let booted = if memory { handle.boot(vmid) } else { super::blocking(move || handle.boot(vmid)).await? };
    booted.map_err(|(file, error)| PveError::die(format!("start failed: cannot open '{file}': {error}")))?;
    if let Some(machine) = sim.real_machine(vmid)
        && let Err(said) = machine.ready().await
    {
        cut(sim, vmid).await;
        return Err(PveError::die(format!("start failed: {said}")));
    }
    Ok(())
}

/// Takes the power away: QEMU and the guest's disks are gone. Returns whether there is such a VM.
pub(crate) async fn cut(sim: &Sim, vmid: u32) -> bool {
    if let Some(guests) = sim.guests().cloned() {
        let gone = blocking_on_guest(sim, vmid, move || guests.unplug_all(vmid)).await;
        if let Err(error) = gone {
            tracing::error!(vm = vmid, %error, "cannot take the disks of a stopped VM away");
        }
    }
    if let Some(machines) = sim.inner.real.clone() {
        // It fails only after a panic.
        let _ = super::blocking(move || machines.kill(vmid)).await;
    }
    sim.power_off_in_memory(vmid);
    sim.change(|state| {
        let Some(vm) = state.vms.get_mut(&vmid) else { return false };
        vm.running = false;
        vm.paused = false;
        vm.drives.clear();
        true
    })
}

/// `POST status/suspend` and `status/resume`: a paused guest serves nothing, so controllers stay when disks go.
pub(super) fn pause(call: &Call, on: bool) -> Result<Reply, PveError> {
    let (sim, vmid, node) = (call.sim.clone(), call.vmid(), call.node().to_owned());
    let vm = sim.read(|state| state.vm_on(&node, vmid).map(|vm| (vm.running, vm.conf.clone())))?;
    if !vm.0 {
        return Err(PveError::die(format!("VM {vmid} not running")));
    }
    let worker = if on { "qmpause" } else { "qmresume" };
    let upid = call.sim.start_task(&node, worker, &vmid.to_string(), &call.user, move |_| async move {
        let _lock = sim.locks().vm(vmid).await?;
        check_lock(&vm.1)?;
        if let Some(machine) = sim.real_machine(vmid) {
            let command = if on { "stop" } else { "cont" };
            let done = machine.command(command, json!({})).await;
            done.map_err(|error| PveError::die(error.to_string()))?;
        }
        sim.change(|state| {
            if let Some(vm) = state.vms.get_mut(&vmid) {
                vm.paused = on;
            }
        });
        Ok(())
    });
    Ok(json!(upid).into())
}

/// `POST status/shutdown`: the guest has no say in it here.
pub(super) fn shutdown(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| state.vm_on(call.node(), call.vmid()).map(|_| ()))?;
    let (sim, vmid) = (call.sim.clone(), call.vmid());
    let force = call.flag("forceStop");
    let upid = call.sim.start_task(
        call.node(),
        "qmshutdown",
        &vmid.to_string(),
        &call.user,
        move |log| async move {
            let _lock = sim.locks().vm(vmid).await?;
            sim.read(|state| state.vms.get(&vmid).map_or(Ok(()), |vm| check_lock(&vm.conf)))?;
            sim.clock().spend(Cost::Power).await;
            if force {
                log.line("VM still running - terminating now with SIGTERM");
            }
            cut(&sim, vmid).await;
            Ok(())
        },
    );
    Ok(json!(upid).into())
}

/// `POST status/reboot` and `status/reset`: QEMU goes on where a reset is asked for, and begins anew, with what is
/// pending, after a reboot (`API2/Qemu.pm:vm_reboot`, `vm_reset`).
pub(super) fn reboot(call: &Call, reset: bool) -> Result<Reply, PveError> {
    let (sim, vmid) = (call.sim.clone(), call.vmid());
    let running = call.sim.read(|state| state.vm_on(call.node(), vmid).map(|vm| vm.running))?;
    if !running {
        return Err(PveError::die(format!("VM {vmid} not running")));
    }
    let worker = if reset { "qmreset" } else { "qmreboot" };
    let upid = call.sim.start_task(call.node(), worker, &vmid.to_string(), &call.user, move |_| async move {
        {
            let _lock = sim.locks().vm(vmid).await?;
            sim.read(|state| state.vms.get(&vmid).map_or(Ok(()), |vm| check_lock(&vm.conf)))?;
            sim.clock().spend(Cost::Power).await;
            if reset {
                if let Some(machine) = sim.real_machine(vmid) {
                    let done = machine.command("system_reset", json!({})).await;
                    done.map_err(|error| PveError::die(error.to_string()))?;
                }
                return Ok(());
            }
            cut(&sim, vmid).await;
        }
        power_on(&sim, vmid).await
    });
    Ok(json!(upid).into())
}
