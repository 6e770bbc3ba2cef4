//! Pausing a VM and letting it go on, in memory or through a disk (qemu-server `API2/Qemu.pm:vm_suspend`, `vm_resume`,
//! `QemuServer/RunState.pm`).

use super::hacommand;
use super::power::{cut, find, power_on};
use super::update::check_lock;
use super::volume;
use crate::sim::Sim;
use crate::sim::clock::date_of;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use crate::sim::state::{State, VolumeKey};
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// What the config of a VM keeps that was suspended to disk.
const KEPT: &[&str] = &["lock", "vmstate", "runningmachine", "runningcpu", "running-nets-host-mtu"];

/// `POST status/suspend`: a paused guest serves nothing, so controllers stay when disks go; with `todisk` QEMU ends,
/// and what it had in memory is a volume of the VM (`API2/Qemu.pm:vm_suspend`).
pub(super) fn suspend(call: &Call) -> Result<Reply, PveError> {
    super::root_only(call, &["skiplock"])?;
    let (vmid, node) = (call.vmid(), call.node().to_owned());
    if !call.sim.read(|state| find(state, &node, vmid).map(|vm| vm.running))? {
        return Err(PveError::die(format!("VM {vmid} not running")));
    }
    if !call.flag("todisk") {
        return Ok(pause(call, true));
    }
    if call.sim.read(|state| hacommand::is_managed(state, vmid)) {
        return Err(PveError::die("Cannot suspend HA managed VM to disk"));
    }
    call.check(&format!("/vms/{vmid}"), &["VM.Config.Disk"])?;
    let storage = match call.get("statestorage") {
        Some(storage) => storage.to_owned(),
        None => call.sim.read(|state| state.vm_on(&node, vmid).map(|vm| state_storage(state, &vm.conf)))?,
    };
    call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    let sim = call.sim.clone();
    let upid =
        call.sim.start_task(call.node(), "qmsuspend", &vmid.to_string(), &call.user, move |log| async move {
            to_disk(&sim, &node, vmid, &storage, &log).await
        });
    Ok(json!(upid).into())
}

/// Where the memory of a VM goes: a shared storage it uses before a local one, a directory before others
/// (`QemuConfig.pm:find_vmstate_storage`).
fn state_storage(state: &State, conf: &Conf) -> String {
    if let Some(named) = conf.current.get("vmstatestorage") {
        return named.clone();
    }
    let (mut shared, mut local) = (None, None);
    for (_, drive) in Conf::disks(&conf.current) {
        let id = drive.file.split(':').next().unwrap_or_default();
        let Some(storage) = state.storages.get(id) else { continue };
        let found = if storage.config.shared { &mut shared } else { &mut local };
        if found.is_none() || storage.config.kind.is_directory() {
            *found = Some(id.to_owned());
        }
    }
    shared.or(local).unwrap_or_else(|| "local".to_owned())
}

/// `RunState.pm:vm_suspend`, `QemuConfig.pm:__snapshot_save_vmstate`.
async fn to_disk(sim: &Sim, node: &str, vmid: u32, storage: &str, log: &TaskLog) -> Result<(), PveError> {
    let _lock = sim.locks().vm(vmid).await?;
    let date = date_of(sim.clock().now());
    let date = date.split(' ').next().unwrap_or_default();
    let (key, size) = sim.read(|state| {
        let conf = &state.vm_on(node, vmid)?.conf;
        check_lock(conf)?;
        let config = &state.storage(node, storage)?.config;
        let ending = if config.kind.is_directory() { ".raw" } else { "" };
        let file = format!("vm-{vmid}-state-suspend-{date}{ending}");
        let (name, _) = plugin::allocate(config, vmid, &file, Some("raw"))?;
        let memory: u64 = conf.current.get("memory").and_then(|value| value.parse().ok()).unwrap_or(512);
        Ok::<_, PveError>((state.resolve(node, config, &name), (memory * 2 + 500) << 20))
    })?;
    volume::make(sim, key.clone(), size, "raw").await?;
    sim.change(|state| {
        let machine = if state.version.is_eight() { "pc-i440fx-9.2+pve1" } else { "pc-i440fx-10.0+pve0" };
        let conf = &mut state.vm_on_mut(node, vmid)?.conf;
        let kept = [("lock", "suspended"), ("runningmachine", machine), ("vmstate", &key.volid())];
        conf.current.extend(kept.map(|(key, value)| (key.to_owned(), value.to_owned())));
        Ok::<_, PveError>(())
    })?;
    log.line("State saved, quitting");
    cut(sim, vmid).await;
    Ok(())
}

/// Takes away what a VM had in memory when it was suspended to disk, once it runs again
/// (`QemuServer.pm:vm_start_nolock`). The caller holds the config's lock.
pub(super) async fn forget_state(sim: &Sim, vmid: u32) -> Result<(), PveError> {
    let key: Option<VolumeKey> = sim.change(|state| {
        let (node, volid) = {
            let vm = state.vms.get(&vmid)?;
            (vm.node.clone(), vm.conf.current.get("vmstate").cloned())
        };
        if volid.is_some() || is_suspended(&state.vms.get(&vmid)?.conf) {
            let conf = &mut state.vms.get_mut(&vmid)?.conf;
            conf.current.retain(|key, _| !KEPT.contains(&key.as_str()));
        }
        state.volume_key(&node, &volid?).ok()
    });
    match key {
        Some(key) => volume::remove(sim, &key, &TaskLog::nowhere(sim)).await,
        None => Ok(()),
    }
}

/// Whether the VM was suspended to disk, which is a lock that a start ignores (`QemuServer.pm:vm_start`).
pub(super) fn is_suspended(conf: &Conf) -> bool {
    conf.current.get("lock").is_some_and(|lock| lock == "suspended")
}

/// `POST status/resume`: one that was suspended to disk starts (`API2/Qemu.pm:vm_resume`).
pub(super) fn resume(call: &Call) -> Result<Reply, PveError> {
    super::root_only(call, &["skiplock", "nocheck"])?;
    let (vmid, node) = (call.vmid(), call.node().to_owned());
    let on_disk = call.sim.read(|state| state.vm_on(&node, vmid).is_ok_and(|vm| is_suspended(&vm.conf)));
    if on_disk {
        let sim = call.sim.clone();
        let work = move |_| async move { power_on(&sim, vmid).await };
        return Ok(json!(call.sim.start_task(&node, "qmresume", &vmid.to_string(), &call.user, work)).into());
    }
    if !call.sim.read(|state| find(state, &node, vmid).map(|vm| vm.running))? {
        return Err(PveError::die(format!("VM {vmid} not running")));
    }
    Ok(pause(call, false))
}

fn pause(call: &Call, on: bool) -> Reply {
    let (sim, vmid, node) = (call.sim.clone(), call.vmid(), call.node().to_owned());
    let worker = if on { "qmpause" } else { "qmresume" };
    let upid = call.sim.start_task(call.node(), worker, &vmid.to_string(), &call.user, move |_| async move {
        let _lock = sim.locks().vm(vmid).await?;
        sim.change(|state| {
            let vm = state.vm_on_mut(&node, vmid)?;
            // One that runs already is not asked whether it is locked.
            let saved = vm.conf.current.get("lock").is_some_and(|lock| lock == "backup");
            if (on || vm.paused) && !saved {
                check_lock(&vm.conf)?;
            }
            vm.paused = on;
            Ok::<_, PveError>(())
        })?;
        if let Some(machine) = sim.real_machine(vmid) {
            let done = machine.command(if on { "stop" } else { "cont" }, json!({})).await;
            done.map_err(|error| PveError::die(error.to_string()))?;
        }
        Ok(())
    });
    json!(upid).into()
}
