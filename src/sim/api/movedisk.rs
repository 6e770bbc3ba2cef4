//! Moving a disk to another storage or to another VM (qemu-server `API2/Qemu.pm:move_vm_disk`).

use super::copy::{self, Target};
use super::disks::{free_name, no_images};
use super::update::{Change, boot_of, check_lock};
use super::volume;
use crate::sim::Sim;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::Drive;
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin::{self, feature, feature::Feature};
use crate::sim::rules::{pending, snap};
use crate::sim::state::{State, VolumeKey};
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// `POST move_disk` (`API2/Qemu.pm:move_vm_disk`).
pub(super) fn move_disk(call: Call) -> Result<Reply, PveError> {
    let both = |text: &str| {
        let errors = ["storage", "target-vmid"].map(|name| (name.to_owned(), text.to_owned()));
        Err(PveError::Parameters(errors.into()))
    };
    match (call.get("target-vmid").is_some(), call.get("storage").is_some()) {
        (true, true) => both("either set 'storage' or 'target-vmid', but not both"),
        (true, false) => reassign(call),
        (false, true) => to_storage(call),
        (false, false) => both("both 'storage' and 'target-vmid' missing, either needs to be set"),
    }
}

/// pve-common `Tools.pm:assert_if_modified`
fn check_digest(conf: &Conf, digest: Option<&str>) -> Result<(), String> {
    match digest {
        Some(digest) if !digest.is_empty() && digest != conf.digest() => {
            Err("detected modified configuration - file changed by other user? Try again.".to_owned())
        }
        _ => Ok(()),
    }
}

/// Whether the VM has the volume anywhere but in this slot, its snapshots included (`Drive.pm:is_volume_in_use`).
fn is_elsewhere(conf: &Conf, slot: &str, file: &str) -> bool {
    conf.in_snapshot(file)
        || Conf::disks(&conf.current).any(|(other, drive)| other != slot && drive.file == file)
}

fn in_slot(conf: &Conf, slot: &str, missing: &str) -> Result<Drive, PveError> {
    let value = conf.current.get(slot).ok_or_else(|| PveError::die(missing))?;
    Drive::parse(slot, value).map_err(|_| PveError::die(missing))
}

/// What moving to another storage takes, checked before the task and again in it.
fn movable(sim: &Sim, call: &Call) -> Result<Drive, PveError> {
    let (slot, storage) = (call.text("disk"), call.text("storage"));
    sim.read(|state| {
        let conf = &state.vm_on(call.node(), call.vmid())?.conf;
        check_lock(conf)?;
        check_digest(conf, call.get("digest")).map_err(PveError::die)?;
        let drive = in_slot(conf, slot, &format!("disk '{slot}' does not exist"))?;
        if drive.is_cdrom() {
            return Err(PveError::die("you can't move a cdrom"));
        }
        let key = state.volume_key(call.node(), &drive.file)?;
        let format = plugin::format_of(state.config_of(&key)?, &key.name);
        let same = drive.volume().is_some_and(|(on, _)| on == storage);
        if same && call.get("format").is_none_or(|wanted| wanted == format) {
            return Err(PveError::die("you can't move to the same storage with same format"));
        }
        if !state.storage(call.node(), storage)?.config.has_content("images") {
            return Err(no_images(storage));
        }
        if call.flag("delete") && is_elsewhere(conf, slot, &drive.file) {
            return Err(PveError::die("you can't move a disk with snapshots and delete the source"));
        }
        Ok(drive)
    })
}

/// A copy takes the slot. Without `delete` the source becomes unused, whoever owns it; QEMU goes on with the copy.
fn to_storage(call: Call) -> Result<Reply, PveError> {
    let (node, vmid, slot) = (call.node().to_owned(), call.vmid(), call.text("disk").to_owned());
    let storage = call.text("storage").to_owned();
    call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    movable(&call.sim, &call)?;
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmmove", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let drive = movable(sim, &call)?;
        let (source, snapshotted) = sim.read(|state| {
            let elsewhere = is_elsewhere(&state.vm_on(&node, vmid)?.conf, &slot, &drive.file);
            Ok::<_, PveError>((state.volume_key(&node, &drive.file)?, elsewhere))
        })?;
        if snapshotted {
            log.line("moving disk with snapshots, snapshots will not be moved!");
        }
        log.line(format!("create full clone of drive {slot} ({})", drive.file));
        let target = Target { node: &node, vmid, storage: &storage, format: call.get("format") };
        let key = copy::full(sim, &source, None, &target, &log)
            .await
            .map_err(|error| PveError::die(format!("storage migration failed: {}", error.message())))?;
        let moved = copy::on_volume(sim, &drive, &key)?;
        volume::switch_over(sim, vmid, &slot, &key).await?;
        let delete = call.flag("delete");
        let template = sim.change(|state| {
            let conf = &mut state.vm_on_mut(&node, vmid)?.conf;
            conf.current.insert(slot.clone(), moved.to_string());
            if !delete {
                pending::add_unused(conf, &drive.file);
            }
            Ok::<_, PveError>(conf.current.get("template").is_some_and(|value| value == "1"))
        })?;
        if template {
            let base = copy::make_base(sim, &node, &moved, &log).await?;
            sim.change(|state| {
                let conf = &mut state.vm_on_mut(&node, vmid)?.conf;
                conf.current.insert(slot.clone(), base.to_string());
                Ok::<_, PveError>(())
            })?;
        }
        // A source that its storage does not give up stays, with a line in the log.
        if delete && let Err(error) = volume::remove(sim, &source, &log).await {
            log.line(error.message().to_owned());
        }
        Ok(())
    });
    Ok(json!(upid).into())
}

/// What giving a disk to another VM takes, checked before the task and again in it.
fn assignable(state: &State, call: &Call) -> Result<Drive, PveError> {
    let (vmid, slot) = (call.vmid(), call.text("disk"));
    let target: u32 = call.text("target-vmid").parse().unwrap_or_default();
    let target_slot = call.get("target-disk").unwrap_or(slot);
    let node_of = |vmid: u32| state.vms.get(&vmid).map(|vm| vm.node.clone());
    let from = node_of(vmid).ok_or_else(|| PveError::die(format!("could not find VM {vmid}")))?;
    let to = node_of(target).ok_or_else(|| PveError::die(format!("could not find target VM {target}")))?;
    if from != to {
        return Err(PveError::die(format!("Both VMs need to be on the same node ({from} != {to})")));
    }
    let (from, to) = (state.vm_on(call.node(), vmid)?, state.vm_on(call.node(), target)?);
    check_lock(&from.conf)?;
    check_lock(&to.conf)?;
    let template = |conf: &Conf| conf.current.get("template").is_some_and(|value| value == "1");
    if template(&from.conf) || template(&to.conf) {
        return Err(PveError::die("Can't move disks from or to template VMs"));
    }
    for (id, conf, digest) in [(vmid, &from.conf, "digest"), (target, &to.conf, "target-digest")] {
        check_digest(conf, call.get(digest)).map_err(|text| PveError::die(format!("VM {id}: {text}")))?;
    }
    let drive = in_slot(&from.conf, slot, &format!("Disk '{slot}' for VM '{vmid}' does not exist"))?;
    if to.conf.current.contains_key(target_slot) {
        return Err(PveError::die(format!(
            "Target disk key '{target_slot}' is already in use for VM '{target}'"
        )));
    }
    if drive.is_cdrom() {
        return Err(PveError::die("CD drive contents can't be moved to another VM"));
    }
    if is_elsewhere(&from.conf, slot, &drive.file) {
        return Err(PveError::die("Can't move disk used by a snapshot to another VM"));
    }
    let key = state.volume_key(call.node(), &drive.file)?;
    let config = state.config_of(&key)?;
    let name = plugin::parse(config, &key.name)?;
    if !feature::has(config, &name, false, Feature::Rename) {
        return Err(PveError::die("Storage does not support moving of this disk to another VM"));
    }
    if from.running && !slot.starts_with("unused") {
        return Err(PveError::die(
            "Cannot move disk to another VM while the source VM is running - detach first",
        ));
    }
    if super::jobs::is_replicated(state, target) && !feature::can_replicate(config, name.format) {
        return Err(PveError::die(
            "Cannot move disk to a replicated VM. Storage does not support replication!",
        ));
    }
    Ok(drive)
}

/// The volume gets a name of the other VM's and becomes its own.
fn reassign(call: Call) -> Result<Reply, PveError> {
    let (node, vmid, slot) = (call.node().to_owned(), call.vmid(), call.text("disk").to_owned());
    let target: u32 = call.text("target-vmid").parse().unwrap_or_default();
    let target_slot = call.get("target-disk").unwrap_or(&slot).to_owned();
    call.check(&format!("/vms/{target}"), &["VM.Config.Disk"])?;
    if vmid == target {
        return Err(PveError::parameter(
            "target-vmid",
            "must be different than source VMID to reassign disk",
        ));
    }
    let drive = call.sim.read(|state| assignable(state, &call))?;
    if let Some((storage, _)) = drive.volume() {
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    }
    let id = format!("{vmid}-{slot}>{target}-{target_slot}");
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmmove", &id, &user, move |log| async move {
        let sim = &call.sim;
        let _first = sim.locks().vm(vmid.min(target)).await?;
        let _second = sim.locks().vm(vmid.max(target)).await?;
        let drive = sim.read(|state| assignable(state, &call))?;
        log.line(format!("reassign disk '{slot}' from VM '{vmid}' as '{target_slot}' to VM '{target}'"));
        let from = sim.read(|state| state.volume_key(&node, &drive.file))?;
        let to = rename_for(sim, &node, &from, target, &log).await?;
        let moved = Drive { file: sim.read(|state| state.volid(&to)), ..drive };
        let boots = sim.change(|state| {
            let conf = &mut state.vm_on_mut(&node, vmid)?.conf;
            conf.current.remove(&slot);
            let mut order = conf.boot_order();
            let boots = order.contains(&slot);
            if boots {
                order.retain(|name| *name != slot);
                conf.current.insert("boot".to_owned(), boot_of(&order));
            }
            Ok::<_, PveError>(boots)
        })?;
        if boots {
            log.line(format!("removing disk '{slot}' from boot order config"));
        }
        log.line(format!("removing disk '{slot}' from VM '{vmid}' config"));
        if target_slot.starts_with("unused") {
            return sim.change(|state| {
                let conf = &mut state.vm_on_mut(&node, target)?.conf;
                conf.current.insert(target_slot, moved.file);
                Ok(())
            });
        }
        Change::of_drive(&call, target, &target_slot, &moved).run_locked(sim, &log).await
    });
    Ok(json!(upid).into())
}

/// Gives a volume the next free name of a VM (`Storage.pm:rename_volume`).
async fn rename_for(
    sim: &Sim,
    node: &str,
    from: &VolumeKey,
    vmid: u32,
    log: &TaskLog,
) -> Result<VolumeKey, PveError> {
    let to = sim.read(|state| {
        let volume = state.existing(from)?;
        let config = state.config_of(from)?;
        snap::rename_is_possible(config, &from.name, &volume.snapshot_names())?;
        free_name(state, node, vmid, &from.storage, volume.format)
    })?;
    let _lock = super::storage_lock(sim, node, from.node.as_deref(), &from.storage, None).await?;
    copy::rename(sim, from, &to, log).await?;
    Ok(to)
}
