//! Snapshots of VMs (pve-guest-common
//! `AbstractConfig.pm:snapshot_create`, `snapshot_delete`, qemu-server `API2/Qemu.pm:snapshot_list`).

use super::update::check_lock;
use super::volume;
use crate::sim::Sim;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::{Conf, Values};
use crate::sim::rules::drive::in_order;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{options, pending, plugin, snap};
use crate::sim::state::{State, Volume, VolumeKey};
use crate::sim::tasks::TaskLog;
use crate::sim::world::Kind;
use serde_json::{Map, Value, json};

/// `GET snapshot`: every snapshot, and `current` with the digest (`API2/Qemu.pm:snapshot_list`).
pub(super) fn list(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| {
        let vm = state.vm_on(call.node(), call.vmid())?;
        let mut entries = Vec::new();
        for (name, values) in &vm.conf.snapshots {
            let mut entry = json!({
                "name": name,
                "snaptime": values.get("snaptime").and_then(|time| time.parse::<u64>().ok()).unwrap_or(0),
                "vmstate": u8::from(values.contains_key("vmstate")),
                "description": values.get("description").cloned().unwrap_or_default(),
            });
            for key in ["parent", "snapstate"] {
                if let Some(value) = values.get(key) {
                    entry[key] = json!(value);
                }
            }
            entries.push(entry);
        }
        let mut current = json!({
            "name": "current", "description": "You are here!", "digest": vm.conf.digest(),
            "running": u8::from(vm.running),
        });
        if let Some(parent) = vm.conf.current.get("parent") {
            current["parent"] = json!(parent);
        }
        entries.push(current);
        Ok(entries.into())
    })
}

/// `GET snapshot/{name}/config` (`API2/Qemu.pm:get_snapshot_config`).
pub(super) fn config(call: &Call) -> Result<Reply, PveError> {
    let name = call.text("snapname");
    call.sim.read(|state| {
        let conf = &state.vm_on(call.node(), call.vmid())?.conf;
        let values = conf
            .snapshots
            .get(name)
            .ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?;
        let data: Map<String, Value> =
            values.iter().map(|(key, value)| (key.clone(), options::to_json(key, value))).collect();
        Ok(Value::Object(data).into())
    })
}

/// The disks of a section and where their volumes are.
fn volumes(state: &State, node: &str, values: &Values) -> Result<Vec<(String, VolumeKey)>, PveError> {
    let mut disks: Vec<_> = Conf::disks(values).collect();
    disks.sort_by_key(|(slot, _)| in_order(slot));
    disks
        .into_iter()
        .map(|(slot, drive)| Ok((slot.to_owned(), state.volume_key(node, &drive.file)?)))
        .collect()
}

/// Takes the snapshot `name` of one volume.
async fn take_one(sim: &Sim, key: &VolumeKey, name: &str, log: &TaskLog) -> Result<(), PveError> {
    let lines = sim.read(|state| {
        let config = state.config_of(key)?;
        let volume = state.volumes.get(key).ok_or_else(|| plugin::missing(config, &key.name))?;
        snap::take(config, &key.name, name, volume.size, &volume.snapshot_names())
    })?;
    volume::snapshot(sim, key, name).await?;
    log.lines(lines);
    Ok(())
}

/// Deletes the snapshot `name` of one volume.
async fn delete_one(sim: &Sim, key: &VolumeKey, name: &str, log: &TaskLog) -> Result<(), PveError> {
    let (lines, error) = sim.read(|state| {
        let config = state.config_of(key)?;
        let existing = state.volumes.get(key).map(Volume::snapshot_names);
        if let Some(snapshot) = state.cloned_snapshot(key, Some(name)) {
            return Err(plugin::rbd::has_clones(&key.name, &snapshot));
        }
        Ok(snap::delete(config, &key.name, name, existing.as_deref()))
    })?;
    volume::drop_snapshot(sim, key, name).await?;
    log.lines(lines);
    error.map_or(Ok(()), Err)
}

fn is_template(conf: &Conf) -> bool {
    conf.current.get("template").is_some_and(|value| value == "1")
}

/// Writes or takes away the `lock` of a config.
fn set_lock(sim: &Sim, node: &str, vmid: u32, lock: Option<&str>) -> Result<(), PveError> {
    sim.change(|state| {
        let conf = &mut state.vm_on_mut(node, vmid)?.conf;
        match lock {
            Some(lock) => conf.current.insert("lock".to_owned(), lock.to_owned()),
            None => conf.current.remove("lock"),
        };
        Ok(())
    })
}

/// `POST snapshot`: every disk of the VM, or none when one cannot (`API2/Qemu.pm:snapshot`,
/// `AbstractConfig.pm:snapshot_create`).
pub(super) fn create(call: Call) -> Result<Reply, PveError> {
    let name = call.text("snapname").to_owned();
    if matches!(name.as_str(), "current" | "pending") {
        return Err(PveError::die(format!("unable to use snapshot name '{name}' (reserved name)")));
    }
    let (sim, node, vmid) = (call.sim.clone(), call.node().to_owned(), call.vmid());
    let user = call.user.clone();
    let upid = sim.start_task(&node, "qmsnapshot", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let node = call.node();
        let _lock = sim.locks().vm(vmid).await?;
        let now = sim.clock().now();
        let (values, disks) = sim.read(|state| {
            let vm = state.vm_on(node, vmid)?;
            if is_template(&vm.conf) {
                return Err(PveError::die("you can't take a snapshot if it's a template"));
            }
            check_lock(&vm.conf)?;
            if vm.conf.snapshots.contains_key(&name) {
                return Err(PveError::die(format!("snapshot name '{name}' already used")));
            }
            let disks = volumes(state, node, &vm.conf.current)?;
            for (_, key) in &disks {
                state.storage(node, &key.storage)?;
            }
            let able = |key: &VolumeKey| {
                state.config_of(key).is_ok_and(|config| plugin::has_snapshots(config, &key.name))
            };
            if !disks.iter().all(|(_, key)| able(key)) {
                return Err(PveError::die("snapshot feature is not available"));
            }
            let mut values = vm.conf.current.clone();
            values.retain(|key, _| !key.starts_with("unused") && key != "lock" && key != "description");
            values.insert("snaptime".to_owned(), now.to_string());
            values.extend(call.get("description").map(|text| ("description".to_owned(), text.to_owned())));
            Ok((values, disks))
        })?;
        set_lock(sim, node, vmid, Some("snapshot"))?;
        for (index, (slot, key)) in disks.iter().enumerate() {
            log.line(format!("snapshotting 'drive-{slot}' ({})", key.volid()));
            if let Err(error) = take_one(sim, key, &name, &log).await {
                // What was taken so far goes again (`AbstractConfig.pm:snapshot_create`).
                log.line("snapshot create failed: starting cleanup");
                for (_, key) in disks.iter().take(index) {
                    let _ = delete_one(sim, key, &name, &log).await;
                }
                set_lock(sim, node, vmid, None)?;
                // It dies of the text with a line feed more.
                return Err(PveError::die(format!("{}\n", error.message().trim_end())));
            }
        }
        sim.change(|state| {
            let conf = &mut state.vm_on_mut(node, vmid)?.conf;
            conf.current.remove("lock");
            conf.snapshots.insert(name.clone(), values);
            conf.current.insert("parent".to_owned(), name);
            Ok(())
        })
    });
    Ok(json!(upid).into())
}

/// `DELETE snapshot/{name}`: a disk that is nowhere else in the config comes back as `unusedN`, whoever owns it. A
/// volume that is gone leaves the VM locked (`API2/Qemu.pm:delsnapshot`, `AbstractConfig.pm:snapshot_delete`).
pub(super) fn delete(call: Call) -> Reply {
    let name = call.text("snapname").to_owned();
    let (sim, node, vmid) = (call.sim.clone(), call.node().to_owned(), call.vmid());
    let user = call.user.clone();
    let upid = sim.start_task(&node, "qmdelsnapshot", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let node = call.node();
        let _lock = sim.locks().vm(vmid).await?;
        let force = call.flag("force");
        let (values, disks) = sim.read(|state| {
            let vm = state.vm_on(node, vmid)?;
            check_lock(&vm.conf)?;
            let values = vm.conf.snapshots.get(&name).cloned();
            let values = values.ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?;
            let disks = volumes(state, node, &values)?;
            Ok::<_, PveError>((values, disks))
        })?;
        set_lock(sim, node, vmid, Some("snapshot-delete"))?;
        for (_, key) in &disks {
            if let Err(error) = delete_one(sim, key, &name, &log).await
                && !force
            {
                return Err(error);
            }
        }
        sim.change(|state| {
            let conf = &mut state.vm_on_mut(node, vmid)?.conf;
            conf.current.remove("lock");
            forget(conf, &name, &values);
            Ok(())
        })
    });
    json!(upid).into()
}

/// Takes a snapshot's section away: its children get its parent, its disks become unused where nothing else has them.
fn forget(conf: &mut Conf, name: &str, values: &Values) {
    conf.snapshots.remove(name);
    let parent = values.get("parent").cloned();
    for section in std::iter::once(&mut conf.current).chain(conf.snapshots.values_mut()) {
        if section.get("parent").is_some_and(|of| of == name) {
            match &parent {
                Some(parent) => section.insert("parent".to_owned(), parent.clone()),
                None => section.remove("parent"),
            };
        }
    }
    let files: Vec<String> = Conf::disks(values).map(|(_, drive)| drive.file).collect();
    for file in files {
        let attached = Conf::disks(&conf.current).any(|(_, other)| other.file == file);
        let listed = conf.current.values().any(|value| *value == file);
        if !attached && !listed {
            pending::add_unused(conf, &file);
        }
    }
    pending::cleanup(conf);
}

/// `POST snapshot/{name}/rollback`: the disks of the snapshot come back, whatever became of them meanwhile; a failure
/// leaves the VM locked (`AbstractConfig.pm:snapshot_rollback`).
pub(super) fn rollback(call: Call) -> Reply {
    let name = call.text("snapname").to_owned();
    let (sim, node, vmid) = (call.sim.clone(), call.node().to_owned(), call.vmid());
    let user = call.user.clone();
    let upid = sim.start_task(&node, "qmrollback", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let node = call.node();
        let _lock = sim.locks().vm(vmid).await?;
        let (values, disks) = sim.read(|state| {
            let vm = state.vm_on(node, vmid)?;
            let values = vm.conf.snapshots.get(&name).cloned();
            let values = values.ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?;
            if is_template(&vm.conf) {
                return Err(PveError::die("you can't rollback if vm is a template"));
            }
            let disks = volumes(state, node, &values)?;
            for (_, key) in &disks {
                state.storage(node, &key.storage)?;
                let existing = state.volumes.get(key).map(Volume::snapshot_names);
                snap::rollback_is_possible(state.config_of(key)?, &key.name, &name, existing.as_deref())?;
            }
            check_lock(&vm.conf)?;
            Ok::<_, PveError>((values, disks))
        })?;
        super::power::cut(sim, vmid).await;
        set_lock(sim, node, vmid, Some("rollback"))?;
        for (_, key) in &disks {
            let lines = sim.read(|state| {
                let existing = state.volumes.get(key).map(Volume::snapshot_names);
                let config = state.config_of(key)?;
                // Thin LVM removes the volume and makes it anew, which another VM that has it open prevents.
                if config.kind == Kind::Lvmthin && state.is_open(key) {
                    return Err(plugin::in_use(config, &key.name));
                }
                snap::rollback(config, &key.name, existing.as_deref())
            })?;
            volume::roll_back(sim, key, &name).await?;
            log.lines(lines);
        }
        sim.change(|state| {
            state.counter += 1;
            let fresh = crate::sim::start::uuid_of(&format!("rollback {vmid} {}", state.counter));
            let conf = &mut state.vm_on_mut(node, vmid)?.conf;
            let mut values = values;
            values.retain(|key, _| {
                !matches!(key.as_str(), "snaptime" | "snapstate" | "vmstate" | "description")
            });
            values.insert("parent".to_owned(), name);
            if values.contains_key("vmgenid") {
                values.insert("vmgenid".to_owned(), fresh);
            }
            // What the snapshot does not have becomes unused, whoever owns it; the description stays
            // (`QemuConfig.pm:__snapshot_rollback_get_unused`, `AbstractConfig.pm:__snapshot_apply_config`).
            let kept: Vec<String> = Conf::disks(&values).map(|(_, drive)| drive.file).collect();
            let left: Vec<String> = Conf::disks(&conf.current)
                .map(|(_, drive)| drive.file)
                .filter(|file| !kept.contains(file))
                .collect();
            for file in left {
                pending::add_unused(conf, &file);
            }
            let stays = |key: &str| key.starts_with("unused") || key == "description";
            let stay = conf.current.iter().filter(|(key, _)| stays(key));
            values.extend(stay.map(|(key, value)| (key.clone(), value.clone())));
            conf.current = values;
            conf.pending.clear();
            conf.pending_delete.clear();
            Ok(())
        })
    });
    json!(upid).into()
}
