//! Starting and stopping (qemu-server `API2/Qemu.pm:vm_start`, `vm_stop`, `QemuServer.pm:vm_start_nolock`).

use super::hacommand::{self, Wish};
use super::hotplug::{blocking_on_guest, destroy};
use super::suspend;
use super::update::check_lock;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::drive::{Drive, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::pending;
use crate::sim::state::{State, Vm};
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// Parameters of a start that are for migrations and for root.
const ROOTS_OF_START: &[&str] = &[
    "stateuri",
    "skiplock",
    "migratedfrom",
    "migration_type",
    "migration_network",
    "targetstorage",
    "force-cpu",
    "with-conntrack-state",
    "nets-host-mtu",
];

/// `POST status/start`: whether there is such a VM is seen in the task (`API2/Qemu.pm:vm_start`).
pub(super) fn start(call: &Call) -> Result<Reply, PveError> {
    super::root_only(call, ROOTS_OF_START)?;
    super::check_quorum(call)?;
    if let Some(asked) = hacommand::ask(call, &Wish::Start) {
        return Ok(asked);
    }
    let (sim, vmid, node) = (call.sim.clone(), call.vmid(), call.node().to_owned());
    let upid =
        call.sim.start_task(call.node(), "qmstart", &vmid.to_string(), &call.user, move |_| async move {
            sim.read(|state| state.vm_on(&node, vmid).map(|_| ()))?;
            power_on(&sim, vmid).await
        });
    Ok(json!(upid).into())
}

/// `POST status/stop` (`API2/Qemu.pm:vm_stop`).
pub(super) fn stop(call: &Call) -> Result<Reply, PveError> {
    super::root_only(call, &["skiplock", "keepActive", "migratedfrom"])?;
    let overrule = call.flag("overrule-shutdown");
    if overrule && call.sim.read(|state| hacommand::is_managed(state, call.vmid())) {
        return Err(PveError::parameter("overrule-shutdown", "Not applicable for HA resources."));
    }
    if let Some(asked) = hacommand::ask(call, &Wish::Stop(0)) {
        return Ok(asked);
    }
    let (call, vmid) = (call.clone(), call.vmid());
    let (sim, node, user) = (call.sim.clone(), call.node().to_owned(), call.user.clone());
    let upid = sim.start_task(&node, "qmstop", &vmid.to_string(), &user, move |log| async move {
        if overrule {
            let overruled = super::task::abort(&call, "qmshutdown", vmid);
            if !overruled.is_empty() {
                log.line(format!("overruled qmshutdown tasks: {}", overruled.join(", ")));
            }
        }
        let _lock = call.sim.locks().vm(vmid).await?;
        switch_off(&call.sim, call.node(), vmid, &log).await
    });
    Ok(json!(upid).into())
}

/// The config of a VM that `check_running` looks for (`QemuServer.pm:check_running`,
/// `QemuConfig.pm:assert_config_exists_on_node`).
pub(super) fn find<'a>(state: &'a State, node: &str, vmid: u32) -> Result<&'a Vm, PveError> {
    state.vm_on(node, vmid).map_err(|_| {
        PveError::die(format!("unable to find configuration file for VM {vmid} on node '{node}'"))
    })
}

/// Stops a VM, and then applies what is pending; one that does not run is left as it is, locked or not. The caller holds
/// the config's lock (`QemuServer.pm:_do_vm_stop`, `vm_stop_cleanup`).
async fn switch_off(sim: &Sim, node: &str, vmid: u32, log: &TaskLog) -> Result<(), PveError> {
    let running = sim.read(|state| {
        let vm = find(state, node, vmid)?;
        if vm.running { check_lock(&vm.conf).map(|()| true) } else { Ok(false) }
    })?;
    if !running {
        return Ok(());
    }
    sim.clock().spend(Cost::Power).await;
    cut(sim, vmid).await;
    let doomed = sim.change(|state| {
        let vm = state.vms.get_mut(&vmid);
        vm.map(|vm| pending::apply_all(&mut vm.conf, vmid)).unwrap_or_default()
    });
    destroy(sim, vmid, doomed, log).await
}

/// Applies what is pending and starts QEMU with every disk of the config (`QemuServer.pm:vm_start`, `vm_start_nolock`).
/// One that was suspended to disk goes on where it was, without what is pending.
pub(crate) async fn power_on(sim: &Sim, vmid: u32) -> Result<(), PveError> {
    let _lock = sim.locks().vm(vmid).await?;
    sim.clock().spend(Cost::Power).await;
    let doomed = sim.change(|state| {
        let vm = state.vms.get_mut(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        if vm.conf.current.get("template").is_some_and(|value| value == "1") {
            return Err(PveError::die("you can't start a vm if it's a template"));
        }
        let suspended = suspend::is_suspended(&vm.conf);
        if !suspended {
            check_lock(&vm.conf)?;
        }
        if vm.running {
            return Err(PveError::die(format!("VM {vmid} already running")));
        }
        Ok(if suspended { Vec::new() } else { pending::apply_all(&mut vm.conf, vmid) })
    })?;
    destroy(sim, vmid, doomed, &TaskLog::nowhere(sim)).await?;
    super::cloudinit::write(sim, vmid, &TaskLog::nowhere(sim)).await?;
    sim.read(|state| {
        let vm = state.vms.get(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        let drives =
            vm.conf.current.iter().filter(|(key, _)| is_drive_key(key) && !key.starts_with("unused"));
        let drives: Vec<Drive> = drives.filter_map(|(key, value)| Drive::stored(key, value)).collect();
        for drive in &drives {
            check_content(state, &drive.file)?;
        }
        for drive in &drives {
            if drive.is_cdrom() {
                super::files::check_there(state, &vm.node, &drive.file)?;
                continue;
            }
            let key = state.volume_key(&vm.node, &drive.file)?;
            state.storage(&vm.node, &key.storage)?;
            state.existing(&key)?;
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
    suspend::forget_state(sim, vmid).await
}

/// Refuses a volume on a storage that is not for what it is (`QemuServer.pm:check_volume_storage_type`, which
/// `get_current_vm_volumes` asks of each before a start). Attaching one is not refused.
fn check_content(state: &State, file: &str) -> Result<(), PveError> {
    let Some((id, name)) = file.split_once(':').filter(|_| !file.starts_with('/')) else { return Ok(()) };
    let storage = state.storages.get(id);
    let storage = storage.ok_or_else(|| PveError::die(format!("storage '{id}' does not exist")))?;
    let content = super::files::content_of(name);
    if storage.config.has_content(content) {
        return Ok(());
    }
    Err(PveError::die(format!("storage '{id}' does not support content-type '{content}'")))
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

/// `POST status/shutdown`: the guest has no say in it here (`API2/Qemu.pm:vm_shutdown`).
pub(super) fn shutdown(call: &Call) -> Result<Reply, PveError> {
    super::root_only(call, &["skiplock", "keepActive"])?;
    let (sim, vmid, node) = (call.sim.clone(), call.vmid(), call.node().to_owned());
    let force = call.flag("forceStop");
    let is_paused = |vm: &Vm| vm.running && vm.paused;
    let paused = sim.read(|state| state.vm_on(&node, vmid).is_ok_and(is_paused));
    if paused && !force {
        return Err(PveError::die("VM is paused - cannot shutdown"));
    }
    let timeout = call.get("timeout").and_then(|timeout| timeout.parse().ok()).unwrap_or(60);
    if let Some(asked) = hacommand::ask(call, &Wish::Stop(timeout)) {
        return Ok(asked);
    }
    let upid = call.sim.start_task(
        call.node(),
        "qmshutdown",
        &vmid.to_string(),
        &call.user,
        move |log| async move {
            let _lock = sim.locks().vm(vmid).await?;
            if force && !paused {
                log.line("VM still running - terminating now with SIGTERM");
            }
            switch_off(&sim, &node, vmid, &log).await
        },
    );
    Ok(json!(upid).into())
}

/// `POST status/reboot` and `status/reset`: QEMU goes on where a reset is asked for, and begins anew, with what is
/// pending, after a reboot (`API2/Qemu.pm:vm_reboot`, `vm_reset`).
pub(super) fn reboot(call: &Call, reset: bool) -> Result<Reply, PveError> {
    super::root_only(call, &["skiplock"])?;
    let (sim, vmid) = (call.sim.clone(), call.vmid());
    let (running, paused) = call
        .sim
        .read(|state| find(state, call.node(), vmid).map(|vm| (vm.running, vm.running && vm.paused)))?;
    if paused && !reset {
        return Err(PveError::die("VM is paused - cannot shutdown"));
    }
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
