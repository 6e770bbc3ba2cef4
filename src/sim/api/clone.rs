//! Cloning VMs and moving disks (qemu-server `API2/Qemu.pm:clone_vm`, `move_vm_disk`, `template`).

use super::copy::{self, Target};
use super::update::{check_lock, free_name};
use super::volume;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::{Conf, Values};
use crate::sim::rules::drive::Drive;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{pending, plugin};
use crate::sim::start::uuid_of;
use crate::sim::state::{Vm, VolumeKey};
use crate::sim::world::{Guest, Kind};
use serde_json::json;
use std::collections::BTreeMap;

/// Whether a linked clone can stand on the volume (`volume_has_feature`, feature `clone`).
fn clonable(call: &Call, key: &VolumeKey, snapshot: bool) -> bool {
    call.sim.read(|state| {
        let kind = state.config_of(key).map(|config| config.kind);
        match kind {
            Ok(Kind::Lvmthin | Kind::Btrfs) => snapshot || key.name.contains("base-"),
            Ok(_) => !snapshot && key.name.contains("base-"),
            Err(_) => false,
        }
    })
}

/// The disks of the VM or of its snapshot.
fn disks_of(values: &Values) -> Vec<(String, Drive)> {
    Conf::disks(values).map(|(slot, drive)| (slot.to_owned(), drive)).collect()
}

fn section(call: &Call) -> Result<(Conf, Values), PveError> {
    call.sim.read(|state| {
        let conf = state.vm_on(call.node(), call.vmid())?.conf.clone();
        let values = match call.get("snapname") {
            Some(name) => conf
                .snapshots
                .get(name)
                .cloned()
                .ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?,
            None => conf.current.clone(),
        };
        Ok((conf, values))
    })
}

/// `GET feature` (`API2/Qemu.pm:vm_feature`).
pub(super) fn feature(call: &Call) -> Result<Reply, PveError> {
    let (_, values) = section(call)?;
    let snapshot = call.get("snapname").is_some();
    let all = disks_of(&values).iter().all(|(_, drive)| {
        let key = call.sim.read(|state| state.volume_key(call.node(), &drive.file));
        key.is_ok_and(|key| match call.text("feature") {
            "clone" => clonable(call, &key, snapshot),
            "snapshot" => call.sim.read(|state| {
                state.config_of(&key).is_ok_and(|config| plugin::has_snapshots(config, &key.name))
            }),
            _ => true,
        })
    });
    Ok(json!({ "hasFeature": u8::from(all), "nodes": [call.node()] }).into())
}

/// `POST clone`.
pub(super) fn clone(call: Call) -> Result<Reply, PveError> {
    let (node, vmid) = (call.node().to_owned(), call.vmid());
    let newid: u32 = call.text("newid").parse().unwrap_or_default();
    let (conf, values) = section(&call)?;
    check_lock(&conf)?;
    let snapshot = call.get("snapname").is_some();
    let template = conf.current.get("template").is_some_and(|value| value == "1");
    let full = call.get("full").map_or(!template, |_| call.flag("full"));
    if call.sim.read(|state| state.vms.contains_key(&newid)) {
        return Err(PveError::die(format!("unable to create VM {newid}: config file already exists")));
    }
    let disks = disks_of(&values);
    for (slot, drive) in &disks {
        let key = call.sim.read(|state| state.volume_key(&node, &drive.file))?;
        if !full && !clonable(&call, &key, snapshot) {
            let what = if snapshot { "a snapshot of" } else { "drive" };
            return Err(PveError::die(format!(
                "Linked clone feature is not supported for {what} '{}' ({slot})",
                drive.file
            )));
        }
        let storage = call.get("storage").filter(|_| full).unwrap_or(&key.storage);
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    }
    let pool = call.get("pool").map(str::to_owned);
    call.sim.change(|state| {
        let mut conf = Conf::default();
        conf.current.insert("lock".to_owned(), "clone".to_owned());
        conf.current.insert("description".to_owned(), " qmclone temporary file".to_owned());
        let vm = Vm {
            node: node.clone(),
            conf,
            running: false,
            guest: Guest::Memory,
            drives: BTreeMap::new(),
            hung: false,
            busy: false,
            paused: false,
            stuck: false,
            hastate: None,
            started: 0,
        };
        state.vms.insert(newid, vm);
        state.access.pools.extend(pool.map(|pool| (newid, pool)));
    });
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmclone", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        log.line(format!("creating a clone of VM {vmid} with ID {newid}"));
        sim.clock().spend(Cost::Power).await;
        let mut fresh = values;
        fresh.retain(|key, _| {
            !key.starts_with("unused")
                && !matches!(
                    key.as_str(),
                    "lock" | "parent" | "snaptime" | "template" | "description" | "protection"
                )
        });
        let snapshot = call.get("snapname");
        for (slot, drive) in &disks {
            let source = sim.read(|state| state.volume_key(&node, &drive.file))?;
            let key = if full {
                log.line(format!("create full clone of drive {slot} ({})", drive.file));
                let storage = call.get("storage").unwrap_or(&source.storage);
                let target = Target { node: &node, vmid: newid, storage, format: call.get("format") };
                copy::full(sim, &source, snapshot, &target, &log).await
            } else {
                log.line(format!("create linked clone of drive {slot} ({})", drive.file));
                copy::linked(sim, &source, snapshot, &node, newid, &log).await
            };
            match key {
                Ok(key) => drop(fresh.insert(slot.clone(), copy::on_volume(sim, drive, &key)?.to_string())),
                Err(error) => {
                    sim.change(|state| state.vms.remove(&newid));
                    return Err(PveError::die(format!("clone failed: {}", error.message())));
                }
            }
        }
        let name = match call.get("name") {
            Some(name) => name.to_owned(),
            None => format!("Copy-of-VM-{}", fresh.get("name").cloned().unwrap_or_else(|| vmid.to_string())),
        };
        fresh.insert("name".to_owned(), name);
        fresh.extend(call.get("description").map(|text| ("description".to_owned(), text.to_owned())));
        sim.change(|state| {
            state.counter += 1;
            let salt = state.counter;
            fresh.insert(
                "smbios1".to_owned(),
                format!("uuid={}", uuid_of(&format!("smbios1 {newid} {salt}"))),
            );
            if fresh.contains_key("vmgenid") {
                fresh.insert("vmgenid".to_owned(), uuid_of(&format!("vmgenid {newid} {salt}")));
            }
            state.vm_on_mut(&node, newid)?.conf.current = fresh;
            Ok(())
        })
    });
    Ok(json!(upid).into())
}

/// `POST template`: the disks get `base-` names and the VM does not start any more.
pub(super) fn template(call: Call) -> Result<Reply, PveError> {
    let (node, vmid) = (call.node().to_owned(), call.vmid());
    let (conf, values) = section(&call)?;
    check_lock(&conf)?;
    if !conf.snapshots.is_empty() {
        return Err(PveError::die("unable to create template, because VM contains snapshots"));
    }
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmtemplate", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let mut fresh = values;
        for (slot, drive) in disks_of(&fresh) {
            let from = sim.read(|state| state.volume_key(&node, &drive.file))?;
            let to = VolumeKey { name: from.name.replacen("vm-", "base-", 1), ..from.clone() };
            copy::rename(sim, &from, &to, &log).await?;
            fresh.insert(slot, Drive { file: to.volid(), ..drive }.to_string());
        }
        fresh.insert("template".to_owned(), "1".to_owned());
        sim.change(|state| {
            state.vm_on_mut(&node, vmid)?.conf.current = fresh;
            Ok(())
        })
    });
    Ok(json!(upid).into())
}

/// `POST move_disk`: to another storage, or to another VM.
pub(super) fn move_disk(call: Call) -> Result<Reply, PveError> {
    if call.get("target-vmid").is_some() { reassign(call) } else { to_storage(call) }
}

fn drive_of(call: &Call, vmid: u32, slot: &str) -> Result<Drive, PveError> {
    let missing = || PveError::die(format!("Disk '{slot}' for VM '{vmid}' does not exist"));
    call.sim.read(|state| {
        let value = state.vm_on(call.node(), vmid)?.conf.current.get(slot).cloned().ok_or_else(missing)?;
        Drive::parse(slot, &value).map_err(|_| missing())
    })
}

fn to_storage(call: Call) -> Result<Reply, PveError> {
    let (node, vmid, slot) = (call.node().to_owned(), call.vmid(), call.text("disk").to_owned());
    let storage = call.text("storage").to_owned();
    call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    let conf = call.sim.read(|state| state.vm_on(&node, vmid).map(|vm| vm.conf.clone()))?;
    check_lock(&conf)?;
    let drive = drive_of(&call, vmid, &slot)?;
    if drive.file.split(':').next() == Some(&storage) && call.get("format").is_none() {
        return Err(PveError::die("you can't move to the same storage with same format"));
    }
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmmove", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let source = sim.read(|state| state.volume_key(&node, &drive.file))?;
        log.line(format!("create full clone of drive {slot} ({})", drive.file));
        let target = Target { node: &node, vmid, storage: &storage, format: call.get("format") };
        let key = copy::full(sim, &source, None, &target, &log).await?;
        let moved = copy::on_volume(sim, &drive, &key)?;
        sim.change(|state| {
            let conf = &mut state.vm_on_mut(&node, vmid)?.conf;
            conf.current.insert(slot.clone(), moved.to_string());
            if !call.flag("delete") {
                pending::register_unused(conf, vmid, &drive);
            }
            Ok::<_, PveError>(())
        })?;
        if call.flag("delete") {
            volume::free(sim, &source).await?;
        }
        Ok(())
    });
    Ok(json!(upid).into())
}

fn reassign(call: Call) -> Result<Reply, PveError> {
    let (node, vmid, slot) = (call.node().to_owned(), call.vmid(), call.text("disk").to_owned());
    let target: u32 = call.text("target-vmid").parse().unwrap_or_default();
    let target_slot = call.get("target-disk").unwrap_or(&slot).to_owned();
    call.check(&format!("/vms/{target}"), &["VM.Config.Disk"])?;
    let known = |vmid: u32| call.sim.read(|state| state.vms.contains_key(&vmid));
    if !known(vmid) {
        return Err(PveError::die(format!("could not find VM {vmid}")));
    }
    if !known(target) {
        return Err(PveError::die(format!("could not find target VM {target}")));
    }
    let drive = drive_of(&call, vmid, &slot)?;
    call.sim.read(|state| {
        let from = state.vm_on(&node, vmid)?;
        let to = state.vm_on(&node, target)?;
        check_lock(&from.conf)?;
        check_lock(&to.conf)?;
        if to.conf.current.contains_key(&target_slot) {
            return Err(PveError::die(format!(
                "Target disk key '{target_slot}' is already in use for VM '{target}'"
            )));
        }
        Ok(())
    })?;
    let id = format!("{vmid}-{slot}>{target}-{target_slot}");
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmmove", &id, &user, move |log| async move {
        let sim = &call.sim;
        let _first = sim.locks().vm(vmid.min(target)).await?;
        let _second = sim.locks().vm(vmid.max(target)).await?;
        log.line(format!("reassign disk '{slot}' from VM '{vmid}' as '{target_slot}' to VM '{target}'"));
        let from = sim.read(|state| state.volume_key(&node, &drive.file))?;
        let format = sim.read(|state| state.existing(&from).map(|volume| volume.format))?;
        let to = sim.read(|state| free_name(state, &node, target, &from.storage, format))?;
        copy::rename(sim, &from, &to, &log).await?;
        log.line(format!("removing disk '{slot}' from VM '{vmid}' config"));
        let moved = Drive { file: to.volid(), ..drive };
        if !target_slot.starts_with("unused") {
            log.line(format!("update VM {target}: -{target_slot} {moved}"));
        }
        sim.change(|state| {
            state.vm_on_mut(&node, vmid)?.conf.current.remove(&slot);
            let value =
                if target_slot.starts_with("unused") { moved.file.clone() } else { moved.to_string() };
            let conf = &mut state.vm_on_mut(&node, target)?.conf;
            conf.current.insert(target_slot.clone(), value);
            conf.tidy();
            Ok(())
        })
    });
    Ok(json!(upid).into())
}
