//! Putting disks into a running VM and taking them out (qemu-server `QemuServer.pm:vmconfig_hotplug_pending`,
//! `vm_deviceplug`, `vm_deviceunplug`). The guest is never asked: a mounted disk goes as any other.

use super::{blocking, volume};
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{Drive, index_of};
use crate::sim::rules::error::PveError;
use crate::sim::rules::{cloudinit, options, pending};
use crate::sim::state::QemuDrive;
use crate::sim::tasks::TaskLog;
use crate::sim::world::Guest;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a QMP command to a hung QEMU takes to fail.
const QMP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long PVE waits for a controller to go: 15 s of polling after the disk's own first second (recorded as F31).
const BUSY: Duration = Duration::from_secs(17);

/// Why one change did not reach QEMU.
enum Stop {
    /// It cannot be made live; it stays pending without an error.
    Skip,
    /// It failed, and stays pending.
    Failed(String),
}

fn failed(error: &PveError) -> Stop {
    Stop::Failed(format!("{}\n", error.message()))
}

/// Applies the pending changes of the keys in `modified` to a running VM. The caller holds the config's lock
/// (`QemuServer.pm:vmconfig_hotplug_pending`).
pub(super) async fn apply(
    sim: &Sim,
    vmid: u32,
    modified: &BTreeSet<String>,
    log: &TaskLog,
) -> Result<BTreeMap<String, String>, PveError> {
    let conf = sim.change(|state| {
        let vm = state.vms.get_mut(&vmid)?;
        let fast: Vec<String> = vm.conf.pending.keys().filter(|key| options::is_fast(key)).cloned().collect();
        for key in fast {
            let (old, new) = (vm.conf.current.get(&key).cloned(), vm.conf.pending.get(&key).cloned());
            cloudinit::note(&mut vm.conf, &key, old.as_deref(), new.as_deref());
            // None of these is a drive, whose volume could have to go.
            let _ = pending::put_in(&mut vm.conf, vmid, &key);
        }
        Some(vm.conf.clone())
    });
    let Some(conf) = conf else { return Ok(BTreeMap::new()) };
    let features = conf.current.get("hotplug").map(String::as_str);
    let hotplug = options::hotplugs_disks(features);
    let is_net = |key: &str| options::hotplugs(features, "network") && index_of(key, "net").is_some();
    let mut errors = BTreeMap::new();

    for (key, force) in conf.pending_delete.iter().filter(|(key, _)| modified.contains(*key)) {
        let result = match options::kind_of(key) {
            Some(options::Kind::Drive) if !hotplug || !is_hotpluggable(key) => Err(Stop::Skip),
            Some(options::Kind::Drive) => unplug(sim, vmid, key).await,
            _ if options::is_fast(key) || key == "hotplug" || is_net(key) => Ok(()),
            _ => Err(Stop::Skip),
        };
        match result {
            Ok(()) => {
                let doomed = sim.change(|state| {
                    let vm = state.vms.get_mut(&vmid)?;
                    let old = vm.conf.current.get(key).cloned();
                    cloudinit::note(&mut vm.conf, key, old.as_deref(), None);
                    pending::take_out(&mut vm.conf, vmid, key, *force)
                });
                destroy(sim, vmid, doomed, &TaskLog::nowhere(sim)).await?;
            }
            Err(Stop::Skip) => {}
            Err(Stop::Failed(text)) => drop(errors.insert(key.clone(), format!("hotplug problem - {text}"))),
        }
    }

    let pending: Vec<String> = conf.pending.keys().filter(|key| modified.contains(*key)).cloned().collect();
    for key in &sim.change(|state| state.key_order.draw(pending)) {
        let Some(value) = conf.pending.get(key) else { continue };
        let result = match options::kind_of(key) {
            Some(options::Kind::Drive) => update_disk(sim, vmid, &conf, key, value, hotplug).await,
            _ if key == "hotplug" && !value.contains("memory") => Ok(()),
            _ if is_net(key) => Ok(()),
            _ => Err(Stop::Skip),
        };
        match result {
            Ok(()) => {
                let doomed = sim.change(|state| {
                    let vm = state.vms.get_mut(&vmid)?;
                    let old = vm.conf.current.get(key).cloned();
                    cloudinit::note(&mut vm.conf, key, old.as_deref(), Some(value));
                    pending::put_in(&mut vm.conf, vmid, key)
                });
                destroy(sim, vmid, doomed, log).await?;
            }
            Err(Stop::Skip) => {}
            Err(Stop::Failed(text)) => drop(errors.insert(key.clone(), format!("hotplug problem - {text}"))),
        }
    }
    Ok(errors)
}

/// Removes volumes that left a config with `force`, or whose VM goes. One that its storage does not give up stays
/// (`QemuServer.pm:destroy_vm`, `try_deallocate_drive`).
pub(super) async fn destroy(
    sim: &Sim,
    vmid: u32,
    doomed: impl IntoIterator<Item = String>,
    log: &TaskLog,
) -> Result<(), PveError> {
    for volid in doomed {
        let key = sim.read(|state| {
            let key = state.volume_key(&state.vms.get(&vmid)?.node, &volid).ok()?;
            state.volumes.contains_key(&key).then_some(key)
        });
        let Some(key) = key else { continue };
        if let Err(error) = volume::remove(sim, &key, log).await {
            log.line(format!("Could not remove disk '{volid}', check manually: {}", error.message()));
        }
    }
    Ok(())
}

fn is_hotpluggable(key: &str) -> bool {
    index_of(key, "scsi").is_some() || index_of(key, "virtio").is_some()
}

/// `QemuServer.pm:vmconfig_update_disk`.
async fn update_disk(
    sim: &Sim,
    vmid: u32,
    conf: &Conf,
    key: &str,
    value: &str,
    hotplug: bool,
) -> Result<(), Stop> {
    let Some(drive) = Drive::stored(key, value) else { return Err(Stop::Skip) };
    if let Some(old) = conf.current.get(key).and_then(|old| Drive::stored(key, old)) {
        if old.is_cdrom() != drive.is_cdrom() {
            return Err(Stop::Failed("unable to change media type\n".to_owned()));
        }
        // Another medium takes no hotplug.
        if old.is_cdrom() {
            return Ok(());
        }
        if old.file == drive.file {
            if drive.differs_coldly(&old) {
                return Err(Stop::Skip);
            }
            if drive.throttles_otherwise(&old) {
                // `Blockdev.pm:set_io_throttle` asks first which machine it is (`Machine.pm:get_current_qemu_machine`).
                let asked = qmp(sim, vmid, "query-machines").await;
                asked.map_err(|text| Stop::Failed(format!("{text}\n")))?;
            }
            return Ok(());
        }
        if !hotplug {
            return Err(Stop::Skip);
        }
        unplug(sim, vmid, key).await?;
    }
    if !hotplug || !is_hotpluggable(key) {
        return Err(Stop::Skip);
    }
    plug(sim, vmid, key, drive).await
}

/// The VM's devices, as `query-pci` lists them: fails when QEMU does not answer.
async fn devices(sim: &Sim, vmid: u32) -> Result<BTreeSet<String>, Stop> {
    let devices = sim
        .read(|state| state.vms.get(&vmid).map(|vm| vm.drives.keys().cloned().collect()).unwrap_or_default());
    qmp(sim, vmid, "query-pci").await.map_err(|text| Stop::Failed(format!("{text}\n")))?;
    Ok(devices)
}

/// Sends a command to the VM's QEMU: one that hangs does not answer, which is said after a while (`QMPClient.pm:cmd`).
pub(super) async fn qmp(sim: &Sim, vmid: u32, command: &str) -> Result<(), String> {
    if !sim.read(|state| state.vms.get(&vmid).is_some_and(|vm| vm.hung)) {
        return Ok(());
    }
    tokio::time::sleep(QMP_TIMEOUT).await;
    // The command that got no answer holds the socket: later ones do not get in (recorded as M20 and M22).
    let stuck =
        sim.change(|state| state.vms.get_mut(&vmid).is_some_and(|vm| std::mem::replace(&mut vm.stuck, true)));
    let why = if stuck {
        format!("unable to connect to VM {vmid} qmp socket - timeout after 51 retries")
    } else {
        "got timeout".to_owned()
    };
    Err(format!("VM {vmid} qmp command '{command}' failed - {why}"))
}

/// `QemuServer.pm:vm_deviceplug`. A device that is already there counts as plugged, whatever volume it has.
async fn plug(sim: &Sim, vmid: u32, key: &str, drive: Drive) -> Result<(), Stop> {
    let entry = sim.read(|state| {
        let vm = state.vms.get(&vmid).ok_or_else(|| PveError::die(format!("no VM {vmid}")))?;
        let volume = state.volume_key(&vm.node, &drive.file)?;
        let size = state.existing(&volume)?.size;
        Ok(QemuDrive { volume, drive: drive.clone(), size })
    });
    let entry = entry.map_err(|error| failed(&error))?;
    if let Some(machine) = sim.real_machine(vmid) {
        if machine.has(key).await.map_err(|error| Stop::Failed(error.to_string()))? {
            return Ok(());
        }
        sim.plug_into(&machine, key, &entry).await.map_err(Stop::Failed)?;
        sim.change(|state| {
            if let Some(vm) = state.vms.get_mut(&vmid) {
                vm.drives.insert(key.to_owned(), entry);
            }
        });
        return Ok(());
    }
    if devices(sim, vmid).await?.contains(key) {
        return Ok(());
    }
    sim.clock().spend(Cost::Plug).await;
    let (handle, slot, shown) = (sim.clone(), key.to_owned(), entry.clone());
    sim.plug_in_memory(vmid, key, &entry);
    let result = blocking_on_guest(sim, vmid, move || handle.show(vmid, &slot, &shown)).await;
    result.map_err(|error| Stop::Failed(format!("adding drive failed: {error}\n")))?;
    sim.change(|state| {
        if let Some(vm) = state.vms.get_mut(&vmid) {
            vm.drives.insert(key.to_owned(), entry);
        }
    });
    Ok(())
}

/// `QemuServer.pm:vm_deviceunplug`.
async fn unplug(sim: &Sim, vmid: u32, key: &str) -> Result<(), Stop> {
    let machine = sim.real_machine(vmid);
    let there = match &machine {
        Some(machine) => machine.has(key).await.map_err(|error| Stop::Failed(error.to_string()))?,
        None => devices(sim, vmid).await?.contains(key),
    };
    if !there {
        return Ok(());
    }
    let (boot, busy) = sim.read(|state| {
        let vm = state.vms.get(&vmid);
        (
            vm.is_some_and(|vm| vm.conf.boot_order().iter().any(|name| name == key)),
            vm.is_some_and(|vm| vm.busy || vm.paused),
        )
    });
    if boot {
        return Err(Stop::Failed(format!("can't unplug bootdisk '{key}'\n")));
    }
    if let Some(machine) = machine {
        let result = sim.unplug_from(&machine, key).await;
        // The controller may stay where its disk went.
        if result.is_ok() || matches!(machine.has(key).await, Ok(false)) {
            sim.change(|state| {
                if let Some(vm) = state.vms.get_mut(&vmid) {
                    vm.drives.remove(key);
                }
            });
        }
        return result.map_err(Stop::Failed);
    }
    sim.unplug_in_memory(vmid, key);
    if let (Some(guests), Some(slot)) = (sim.guests().cloned(), index_of(key, "scsi")) {
        let result = blocking_on_guest(sim, vmid, move || guests.unplug(vmid, slot)).await;
        result.map_err(|error| Stop::Failed(format!("deleting device '{key}' failed: {error}\n")))?;
    }
    sim.change(|state| {
        if let Some(vm) = state.vms.get_mut(&vmid) {
            vm.drives.remove(key);
        }
    });
    if busy {
        tokio::time::sleep(BUSY).await;
        let controller = key.replacen("scsi", "virtioscsi", 1);
        return Err(Stop::Failed(format!(
            "error on hot-unplugging device '{controller}' - still busy in guest?\n"
        )));
    }
    sim.clock().spend(Cost::Unplug).await;
    Ok(())
}

/// Runs guest work off the runtime; without a guest there is nothing to run, and a paused clock is not disturbed.
pub(super) async fn blocking_on_guest(
    sim: &Sim,
    vmid: u32,
    work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> std::io::Result<()> {
    let machine = sim.read(|state| state.vms.get(&vmid).is_some_and(|vm| vm.guest == Guest::Machine));
    if !machine {
        return Ok(());
    }
    blocking(work).await.map_err(|error| std::io::Error::other(error.message().to_owned()))?
}
