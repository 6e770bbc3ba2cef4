//! Snapshots of VMs, as far as directory storages have them: none of raw images (pve-guest-common
//! `AbstractConfig.pm:snapshot_create`, `snapshot_delete`, qemu-server `API2/Qemu.pm:snapshot_list`).

use super::update::check_lock;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::dirplugin::parse_volname;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{options, pending};
use serde_json::{Map, Value, json};

/// `GET snapshot`: every snapshot, and `current` with the digest.
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
        Ok(json!(entries).into())
    })
}

/// `GET snapshot/{name}/config`.
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

/// Of the images of a directory, only qcow2 has snapshots (pve-storage `Plugin.pm:volume_has_feature`).
fn can_be_snapshotted(file: &str) -> bool {
    file.split_once(':')
        .and_then(|(_, name)| parse_volname(name).ok())
        .is_some_and(|volume| volume.format == "qcow2")
}

/// `POST snapshot`: refused in the task when one disk cannot have one.
pub(super) fn create(call: Call) -> Result<Reply, PveError> {
    let name = call.text("snapname").to_owned();
    if matches!(name.as_str(), "current" | "pending") {
        return Err(PveError::die(format!("unable to use snapshot name '{name}' (reserved name)")));
    }
    let (sim, node, vmid) = (call.sim.clone(), call.node().to_owned(), call.vmid());
    sim.read(|state| state.vm_on(&node, vmid).map(|_| ()))?;
    let user = call.user.clone();
    let upid = sim.start_task(&node, "qmsnapshot", &vmid.to_string(), &user, move |_| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let now = sim.clock().now();
        sim.change(|state| {
            let vm = state.vm_on_mut(call.node(), vmid)?;
            check_lock(&vm.conf)?;
            if vm.conf.snapshots.contains_key(&name) {
                return Err(PveError::die(format!("snapshot name '{name}' already used")));
            }
            if Conf::disks(&vm.conf.current).any(|(_, drive)| !can_be_snapshotted(&drive.file)) {
                return Err(PveError::die("snapshot feature is not available"));
            }
            let mut values = vm.conf.current.clone();
            values.retain(|key, _| !key.starts_with("unused") && key != "lock" && key != "description");
            values.insert("snaptime".to_owned(), now.to_string());
            values.extend(call.get("description").map(|text| ("description".to_owned(), text.to_owned())));
            vm.conf.snapshots.insert(name.clone(), values);
            vm.conf.current.insert("parent".to_owned(), name);
            Ok(())
        })
    });
    Ok(json!(upid).into())
}

/// `DELETE snapshot/{name}`: a disk that is nowhere else in the config comes back as `unusedN`, whoever owns it. A
/// volume that is gone leaves the VM locked, unless forced.
pub(super) fn delete(call: Call) -> Result<Reply, PveError> {
    let name = call.text("snapname").to_owned();
    let (sim, node, vmid) = (call.sim.clone(), call.node().to_owned(), call.vmid());
    sim.read(|state| state.vm_on(&node, vmid).map(|_| ()))?;
    let user = call.user.clone();
    let upid = sim.start_task(&node, "qmdelsnapshot", &vmid.to_string(), &user, move |_| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        sim.change(|state| {
            let vm = state.vm_on(call.node(), vmid)?;
            let force = call.flag("force");
            if !force {
                check_lock(&vm.conf)?;
            }
            let values = vm
                .conf
                .snapshots
                .get(&name)
                .cloned()
                .ok_or_else(|| PveError::die(format!("snapshot '{name}' does not exist")))?;
            let disks: Vec<_> = Conf::disks(&values).map(|(_, drive)| drive).collect();
            let missing = disks.iter().find_map(|drive| {
                let key = state.volume_key(call.node(), &drive.file).ok()?;
                (!state.volumes.contains_key(&key)).then(|| state.path_of(&key))
            });
            let changed = state.vm_on_mut(call.node(), vmid)?;
            if let (Some(path), false) = (missing, force) {
                changed.conf.current.insert("lock".to_owned(), "snapshot-delete".to_owned());
                return Err(PveError::die(format!(
                    "qemu-img: Could not open '{path}': No such file or directory"
                )));
            }
            changed.conf.snapshots.remove(&name);
            if changed.conf.current.get("parent") == Some(&name) {
                match values.get("parent") {
                    Some(parent) => changed.conf.current.insert("parent".to_owned(), parent.clone()),
                    None => changed.conf.current.remove("parent"),
                };
            }
            for drive in disks {
                let attached = Conf::disks(&changed.conf.current).any(|(_, other)| other.file == drive.file);
                let listed = changed.conf.current.values().any(|value| *value == drive.file);
                let free = (0..256)
                    .map(|i| format!("unused{i}"))
                    .find(|key| !changed.conf.current.contains_key(key));
                if let (false, false, Some(key)) = (attached, listed, free) {
                    changed.conf.current.insert(key, drive.file);
                }
            }
            pending::cleanup(&mut changed.conf);
            Ok(())
        })
    });
    Ok(json!(upid).into())
}
