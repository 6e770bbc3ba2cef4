//! Creating and destroying VMs, as far as volume holders need it (qemu-server `API2/Qemu.pm:create_vm`, `destroy_vm`,
//! `QemuServer.pm:destroy_vm`).

use super::disks::{check_drives, make_disk};
use super::update::{boot_of, check_lock, check_protection, check_right};
use super::{ha, hacommand, hotplug, jobs, volume};
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::is_drive_key;
use crate::sim::rules::error::PveError;
use crate::sim::rules::options::Right;
use crate::sim::rules::{cloudinit, options, pending};
use crate::sim::state::{Vm, VolumeKey};
use crate::sim::world::Guest;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// `POST /nodes/N/qemu`: `VM.Allocate` on the VM or on the pool it is to join (`API2/Qemu.pm:create_vm`).
pub(super) fn create(call: &Call) -> Result<Reply, PveError> {
    let vmid = call.vmid();
    let node = call.node().to_owned();
    let mut set = call.params.clone();
    for name in ["node", "vmid", "pool", "start"] {
        set.remove(name);
    }
    let pool = call.get("pool").map(str::to_owned);
    if let Some(pool) = &pool
        && !call.sim.read(|state| state.pools.contains(pool))
    {
        return Err(PveError::die(format!("no such pool '{pool}'")));
    }
    let vms = format!("/vms/{vmid}");
    let in_pool = |any: &[&str]| pool.as_ref().is_some_and(|pool| call.may(&format!("/pool/{pool}"), any));
    if !call.may(&vms, &["VM.Allocate"]) && !in_pool(&["VM.Allocate"]) {
        return Err(PveError::Status(403, "Permission check failed".to_owned()));
    }
    let pool_path = pool.as_ref().map(|pool| format!("/pool/{pool}"));
    let paths: Vec<&str> = std::iter::once(vms.as_str()).chain(pool_path.as_deref()).collect();
    for (key, value) in &set {
        check_right(call, &paths, key)?;
        if options::right(key) == Right::ByValue && call.user != "root@pam" {
            for privilege in options::right_of_value(key, value)? {
                if !in_pool(&[privilege]) {
                    call.check(&vms, &[privilege])?;
                }
            }
        }
    }
    check_drives(call, &node, Some(vmid), &set)?;
    super::check_quorum(call)?;
    let now = call.sim.clock().now();
    call.sim.change(|state| {
        // pve-cluster `Cluster.pm:check_vmid_unused`; a clone says `config file already exists` instead.
        if let Some(vm) = state.vms.get(&vmid) {
            return Err(PveError::die(format!(
                "unable to create VM {vmid} - VM {vmid} already exists on node '{}'",
                vm.node
            )));
        }
        state.counter += 1;
        let salt = state.counter;
        let mut conf = Conf::default();
        let made = [
            ("meta", format!("creation-qemu=10.0.13,ctime={now}")),
            ("smbios1", format!("uuid={}", crate::sim::start::uuid_of(&format!("smbios1 {vmid} {salt}")))),
            ("vmgenid", crate::sim::start::uuid_of(&format!("vmgenid {vmid} {salt}"))),
            ("lock", "create".to_owned()),
        ];
        conf.current.extend(made.into_iter().map(|(key, value)| (key.to_owned(), value)));
        state.vms.insert(
            vmid,
            Vm {
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
            },
        );
        state.access.pools.extend(pool.map(|pool| (vmid, pool)));
        Ok(())
    })?;
    let (sim, user) = (call.sim.clone(), call.user.clone());
    let start = call.flag("start");
    let upid =
        call.sim.start_task(&node.clone(), "qmcreate", &vmid.to_string(), &user, move |log| async move {
            sim.clock().spend(Cost::Power).await;
            let mut values = BTreeMap::new();
            for (key, value) in &set {
                let made = if key == "cipassword" {
                    let salt = sim.change(|state| {
                        state.counter += 1;
                        state.counter
                    });
                    Ok(cloudinit::keep_password(value, salt))
                } else if is_drive_key(key) {
                    make_disk(&sim, &node, vmid, key, value, &log).await
                } else {
                    Ok(value.clone())
                };
                match made {
                    Ok(value) => drop(values.insert(key.clone(), value)),
                    Err(error) => {
                        sim.change(|state| state.vms.remove(&vmid));
                        let text = format!("unable to create VM {vmid} - {}", error.message());
                        return Err(PveError::die(text));
                    }
                }
            }
            let boot: Vec<String> = values.keys().filter(|key| is_drive_key(key)).cloned().collect();
            sim.change(|state| {
                let vm = state.vm_on_mut(&node, vmid)?;
                vm.conf.current.remove("lock");
                if !values.contains_key("boot") {
                    vm.conf.current.insert("boot".to_owned(), boot_of(&boot));
                }
                vm.conf.current.extend(values);
                Ok::<_, PveError>(())
            })?;
            if start { super::power::power_on(&sim, vmid).await } else { Ok(()) }
        });
    Ok(json!(upid).into())
}

/// `DELETE /nodes/N/qemu/V`: volumes the VM owns go, those of another owner stay; with `destroy-unreferenced-disks`
/// everything of its id on every storage of the node goes (`API2/Qemu.pm:destroy_vm`, `QemuServer.pm:destroy_vm`).
pub(super) fn destroy(call: &Call) -> Result<Reply, PveError> {
    let (node, vmid) = (call.node().to_owned(), call.vmid());
    super::root_only(call, &["skiplock"])?;
    let purge = call.flag("purge");
    let check = {
        let node = node.clone();
        move |sim: &crate::sim::Sim| {
            sim.read(|state| {
                let vm = state.vm_on(&node, vmid)?;
                check_protection(&vm.conf, &format!("can't remove VM {vmid}"))?;
                if !purge {
                    if hacommand::is_configured(state, vmid) {
                        return Err(PveError::die(format!(
                            "unable to remove VM {vmid} - used in HA resources and purge parameter not set."
                        )));
                    }
                    jobs::refuse_replicated(state, vmid)?;
                }
                if vm.running {
                    return Err(PveError::die(format!("VM {vmid} is running - destroy failed")));
                }
                Ok(vm.conf.clone())
            })
        }
    };
    check(&call.sim)?;
    let unreferenced = call.flag("destroy-unreferenced-disks");
    let sim = call.sim.clone();
    let upid = call.sim.start_task(
        &node.clone(),
        "qmdestroy",
        &vmid.to_string(),
        &call.user,
        move |log| async move {
            let _lock = sim.locks().vm(vmid).await?;
            let conf = check(&sim)?;
            check_lock(&conf)?;
            sim.clock().spend(Cost::Power).await;
            let mut files: BTreeSet<String> =
                Conf::disks(&conf.current).map(|(_, drive)| drive.file).collect();
            files.extend(
                conf.current
                    .iter()
                    .filter(|(key, _)| key.starts_with("unused"))
                    .map(|(_, value)| value.clone()),
            );
            files.extend(conf.current.get("vmstate").cloned());
            let owned = files.into_iter().filter(|file| pending::owner_of(file) == Some(vmid));
            hotplug::destroy(&sim, vmid, owned, &log).await?;
            if unreferenced {
                let left: Vec<VolumeKey> = sim.read(|state| {
                    let here = |key: &VolumeKey| key.node.as_deref().is_none_or(|on| on == node);
                    let of_vm = |key: &VolumeKey| pending::owner_of(&key.volid()) == Some(vmid);
                    state.volumes.keys().filter(|key| here(key) && of_vm(key)).cloned().collect()
                });
                for key in left {
                    if let Err(error) = volume::remove(&sim, &key, &log).await {
                        log.line(format!("WARN: {}", error.message()));
                    }
                }
            }
            if purge {
                log.line(format!("purging VM {vmid} from related configurations.."));
                let managed = sim.change(|state| {
                    jobs::forget(state, vmid);
                    let managed = hacommand::is_configured(state, vmid);
                    ha::forget(state, &format!("vm:{vmid}"), true);
                    managed
                });
                if managed {
                    log.line(format!("NOTE: removed VM {vmid} from HA resource configuration."));
                }
            }
            sim.change(|state| {
                state.vms.remove(&vmid);
                state.access.pools.remove(&vmid);
                let path = format!("/vms/{vmid}");
                state.access.acl.retain(|entry| entry.path != path);
            });
            Ok(())
        },
    );
    Ok(json!(upid).into())
}
