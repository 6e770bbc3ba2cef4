//! Migration (qemu-server `QemuMigrate.pm:phase1`, `scan_local_volumes`, `API2/Qemu.pm:migrate_vm`,
//! `migrate_vm_precondition`).

use super::files::content_of;
use super::hacommand::{self, Wish};
use super::update::check_lock;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{Drive, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::pending::owner_of;
use crate::sim::state::{State, Vm};
use serde_json::{Value, json};

/// Slots and volume ids on storages that only this node sees.
fn local_disks(state: &State, vm: &Vm) -> Vec<(String, String)> {
    let local = |file: &str| {
        let storage = file.split(':').next().and_then(|id| state.storages.get(id));
        storage.is_some_and(|storage| !storage.config.shared)
    };
    Conf::disks(&vm.conf.current)
        .filter(|(_, drive)| local(&drive.file))
        .map(|(slot, drive)| (slot.to_owned(), drive.file))
        .collect()
}

/// `GET migrate` (`API2/Qemu.pm:migrate_vm_precondition`).
pub(super) fn precondition(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| {
        let vm = state.vm_on(call.node(), call.vmid())?;
        let disks: Vec<Value> = local_disks(state, vm)
            .into_iter()
            .map(|(slot, volid)| {
                let key = state.volume_key(call.node(), &volid);
                let size = key.ok().and_then(|key| state.volumes.get(&key)).map_or(0, |volume| volume.size);
                json!({
                    "volid": volid, "drivename": slot, "size": size, "replicate": 1, "is_attached": 1, "is_unused": 0,
                    "is_vmstate": 0, "is_tpmstate": 0, "is_cloudinit": 0, "cdrom": 0, "shared": 0,
                })
            })
            .collect();
        let others: Vec<&String> = state.nodes.keys().filter(|node| *node != call.node()).collect();
        let not_allowed: serde_json::Map<String, Value> =
            others.iter().map(|node| ((*node).clone(), json!({}))).collect();
        Ok(json!({
            "running": u8::from(vm.running), "allowed_nodes": others, "not_allowed_nodes": not_allowed,
            "local_disks": disks, "local_resources": [], "mapped-resources": [], "mapped-resource-info": {},
            "has-dbus-vmstate": 1,
        })
        .into())
    })
}

/// Refuses a VM with a volume that the target does not see, or on a storage that is not for what it is
/// (`QemuServer.pm:check_storage_availability`).
fn check_storages(state: &State, vm: &Vm, target: &str) -> Result<(), PveError> {
    let drives = vm.conf.current.iter().filter(|(key, _)| is_drive_key(key) && !key.starts_with("unused"));
    for (key, value) in drives {
        let Some(drive) = Drive::stored(key, value) else { continue };
        let Some((id, name)) = drive.volume() else { continue };
        let config = &state.storage(&vm.node, id)?.config;
        state.storage(target, id)?;
        let content = content_of(name);
        if !config.has_content(content) {
            return Err(PveError::die(format!(
                "{}: content type '{content}' is not available on storage '{id}'",
                drive.file
            )));
        }
    }
    Ok(())
}

/// `POST migrate` (`API2/Qemu.pm:migrate_vm`, `QemuMigrate.pm:scan_local_volumes`).
pub(super) fn migrate(call: Call) -> Result<Reply, PveError> {
    let (node, vmid) = (call.node().to_owned(), call.vmid());
    let target = call.text("target").to_owned();
    if target == node {
        return Err(PveError::parameter("target", "target is local node."));
    }
    super::check_quorum(&call)?;
    if !call.sim.read(|state| state.nodes.contains_key(&target)) {
        return Err(PveError::die(format!("no such cluster node '{target}'")));
    }
    super::root_only(&call, &["force", "migration_type", "migration_network"])?;
    call.sim.read(|state| {
        let vm = state.vm_on(&node, vmid)?;
        check_lock(&vm.conf)?;
        if vm.running && !call.flag("online") {
            return Err(PveError::die("can't migrate running VM without --online"));
        }
        if call.get("targetstorage").is_none() {
            check_storages(state, vm, &target)?;
        }
        Ok(())
    })?;
    if let Some(asked) = hacommand::ask(&call, &Wish::Migrate(&target)) {
        return Ok(asked);
    }
    // A node that does not answer is noticed by the one that calls it.
    if !call.sim.read(|state| state.hears(Some(&node), &target)) {
        return Err(PveError::die(format!("no such cluster node '{target}'")));
    }
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmigrate", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let address = sim.read(|state| state.address(&target));
        let say = |text: String| log.line(format!("{} {text}", sim.clock().local()));
        say(format!("starting migration of VM {vmid} to node '{target}' ({address})"));
        let disks = sim.read(|state| state.vm_on(&node, vmid).map(|vm| local_disks(state, vm)))?;
        let mut bad = false;
        for (_, volid) in &disks {
            say(format!("found local disk '{volid}' (attached)"));
        }
        for (_, volid) in &disks {
            let owner = owner_of(volid).unwrap_or_default();
            if owner != vmid {
                say(format!("can't migrate local disk '{volid}': owned by other VM (owner = VM {owner})"));
                bad = true;
            }
        }
        if bad {
            let why = "Problem found while scanning volumes - can't migrate VM - check log";
            say(format!("ERROR: {why}"));
            say("aborting phase 1 - cleanup resources".to_owned());
            say(format!("ERROR: migration aborted (duration 00:00:00): {why}"));
            return Err(PveError::die("migration aborted"));
        }
        // Local volumes of the VM's own go with it.
        for (_, volid) in &disks {
            let from = sim.read(|state| state.volume_key(&node, volid).ok());
            if let Some(from) = from.filter(|from| sim.read(|state| state.volumes.contains_key(from))) {
                let to = crate::sim::state::VolumeKey { node: Some(target.clone()), ..from.clone() };
                super::volume::rename(sim, &from, &to).await?;
            }
        }
        sim.change(|state| {
            let now = sim.clock().elapsed().as_secs();
            let vm = state.vm_on_mut(&node, vmid)?;
            target.clone_into(&mut vm.node);
            vm.started = now;
            Ok::<_, PveError>(())
        })?;
        say("migration finished successfully (duration 00:00:01)".to_owned());
        Ok(())
    });
    Ok(json!(upid).into())
}
