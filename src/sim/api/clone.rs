//! Cloning VMs and making templates of them (qemu-server `API2/Qemu.pm:clone_vm`, `vm_feature`, `template`).

use super::copy::{self, Target};
use super::disks::no_images;
use super::update::check_lock;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::{Conf, Values};
use crate::sim::rules::drive::{Drive, index_of};
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin::{self, feature, feature::Feature};
use crate::sim::rules::{cloudinit, net};
use crate::sim::start::uuid_of;
use crate::sim::state::{State, Vm};
use crate::sim::world::Guest;
use serde_json::json;
use std::collections::BTreeMap;

/// Whether a volume, or its snapshot, has the feature (`Storage.pm:volume_has_feature`).
fn has(call: &Call, file: &str, snapshot: bool, feature: Feature) -> bool {
    call.sim.read(|state| {
        let Ok(key) = state.volume_key(call.node(), file) else { return false };
        state.config_of(&key).is_ok_and(|config| {
            plugin::parse(config, &key.name).is_ok_and(|name| feature::has(config, &name, snapshot, feature))
        })
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

/// `GET feature` (`API2/Qemu.pm:vm_feature`, `QemuConfig.pm:has_feature`); the nodes are those that have all storages
/// of the disks (`QemuServer.pm:shared_nodes`).
pub(super) fn feature(call: &Call) -> Result<Reply, PveError> {
    let (_, values) = section(call)?;
    let snapshot = call.get("snapname").is_some();
    let disks = disks_of(&values);
    let all = Feature::named(call.text("feature"))
        .is_some_and(|feature| disks.iter().all(|(_, drive)| has(call, &drive.file, snapshot, feature)));
    let nodes: Vec<String> = call.sim.read(|state| {
        let reaches = |node: &str| {
            disks.iter().all(|(_, drive)| {
                let storage = drive.volume().and_then(|(storage, _)| state.storages.get(storage));
                storage.is_none_or(|storage| {
                    if storage.config.shared { storage.config.is_on(node) } else { node == call.node() }
                })
            })
        };
        state.nodes.keys().filter(|node| reaches(node)).cloned().collect()
    });
    Ok(json!({ "hasFeature": u8::from(all), "nodes": nodes }).into())
}

/// `POST clone` (`API2/Qemu.pm:clone_vm`).
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
    if let Some(storage) = call.get("storage") {
        let images = call.sim.read(|state| {
            state.storage(&node, storage).map(|storage| storage.config.has_content("images"))
        })?;
        if !images {
            return Err(no_images(storage));
        }
        if !full {
            return Err(PveError::die("parameter 'storage' not allowed for linked clones"));
        }
    }
    if call.get("format").is_some() && !full {
        return Err(PveError::die("parameter 'format' not allowed for linked clones"));
    }
    for (slot, drive) in &disks {
        let key = call.sim.read(|state| state.volume_key(&node, &drive.file))?;
        let (kind, feature) = if full { ("Full", Feature::Copy) } else { ("Linked", Feature::Clone) };
        if !has(&call, &drive.file, snapshot, feature) {
            let what = if snapshot { " a snapshot of" } else { "" };
            return Err(PveError::die(format!(
                "{kind} clone feature is not supported for{what} '{}' ({slot})",
                drive.file
            )));
        }
        let storage = call.get("storage").filter(|_| full).unwrap_or(&key.storage);
        call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
    }
    // Only what all nodes see can be there at once (`API2/Qemu.pm:clone_vm`).
    let target = call.get("target").filter(|target| *target != node).map(str::to_owned);
    if let Some(target) = &target {
        let known = call.sim.read(|state| state.nodes.contains_key(target));
        if !known {
            return Err(PveError::parameter("target", format!("no such cluster node '{target}'")));
        }
        for (_, drive) in &disks {
            let id = drive.file.split(':').next().unwrap_or_default();
            let id = call.get("storage").filter(|_| full).unwrap_or(id);
            if !call.sim.read(|state| state.storages.get(id).is_some_and(|storage| storage.config.shared)) {
                return Err(PveError::die(format!(
                    "Can't clone VM to node '{target}' (VM uses local storage)"
                )));
            }
        }
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
        // Each clone has a cloud-init drive of its own, and other hardware addresses (`QemuServer.pm:clone_disk`).
        let written = cloudinit::drive_of(&fresh, None).map(str::to_owned);
        if let Some(slot) = written {
            let drive = fresh.get(&slot).and_then(|value| Drive::stored(&slot, value));
            let storage =
                drive.as_ref().and_then(|drive| drive.volume()).map(|(storage, _)| storage.to_owned());
            let storage =
                call.get("storage").filter(|_| full).map(str::to_owned).or(storage).unwrap_or_default();
            let wanted = Drive { file: format!("{storage}:cloudinit"), options: BTreeMap::new() };
            let made = super::cloudinit::make_drive(sim, &node, newid, &slot, wanted, &log).await;
            match made {
                Ok(value) => drop(fresh.insert(slot, value)),
                Err(error) => {
                    sim.change(|state| state.vms.remove(&newid));
                    return Err(PveError::die(format!("clone failed: {}", error.message())));
                }
            }
        }
        for (key, value) in fresh.iter_mut().filter(|(key, _)| index_of(key, "net").is_some()) {
            let salt = sim.change(State::salt);
            *value = net::with_other_address(value, &format!("{newid} {key} {salt}"));
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
            // All else that `smbios1` says stays.
            let old = fresh.get("smbios1").cloned().unwrap_or_default();
            let others = old.split(',').filter(|part| !part.is_empty() && !part.starts_with("uuid="));
            let uuid = format!("uuid={}", uuid_of(&format!("smbios1 {newid} {salt}")));
            let parts: Vec<&str> = std::iter::once(uuid.as_str()).chain(others).collect();
            fresh.insert("smbios1".to_owned(), parts.join(","));
            if fresh.contains_key("vmgenid") {
                fresh.insert("vmgenid".to_owned(), uuid_of(&format!("vmgenid {newid} {salt}")));
            }
            let vm = state.vm_on_mut(&node, newid)?;
            vm.conf.current = fresh;
            if let Some(target) = target {
                vm.node = target;
            }
            Ok(())
        })
    });
    Ok(json!(upid).into())
}

/// `POST template`: the disks become base volumes, where the storage has such, and the VM does not start any more
/// (`API2/Qemu.pm:template`, `QemuServer.pm:template_create`).
pub(super) fn template(call: Call) -> Result<Reply, PveError> {
    let (node, vmid) = (call.node().to_owned(), call.vmid());
    let only = call.get("disk").map(str::to_owned);
    let check = {
        let (node, only) = (node.clone(), only.clone());
        move |sim: &Sim| {
            sim.read(|state| {
                let vm = state.vm_on(&node, vmid)?;
                check_lock(&vm.conf)?;
                let template = vm.conf.current.get("template").is_some_and(|value| value == "1");
                if !vm.conf.snapshots.is_empty() {
                    return Err(PveError::die("unable to create template, because VM contains snapshots"));
                }
                if template && only.is_none() {
                    return Err(PveError::die("you can't convert a template to a template"));
                }
                if vm.running {
                    return Err(PveError::die("you can't convert a VM to template if VM is running"));
                }
                Ok(disks_of(&vm.conf.current))
            })
        }
    };
    check(&call.sim)?;
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let upid = sim.start_task(&node.clone(), "qmtemplate", &vmid.to_string(), &user, move |log| async move {
        let sim = &call.sim;
        let _lock = sim.locks().vm(vmid).await?;
        let disks = check(sim)?;
        let set = |key: &str, value: String| {
            sim.change(|state| {
                state.vm_on_mut(&node, vmid).map(|vm| drop(vm.conf.current.insert(key.to_owned(), value)))
            })
        };
        set("template", "1".to_owned())?;
        for (slot, drive) in disks {
            if only.as_ref().is_some_and(|only| *only != slot)
                || !has(&call, &drive.file, false, Feature::Template)
            {
                continue;
            }
            let base = copy::make_base(sim, &node, &drive, &log).await?;
            set(&slot, base.to_string())?;
        }
        Ok(())
    });
    Ok(json!(upid).into())
}
