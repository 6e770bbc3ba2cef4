//! Changing a config: PUT, POST and unlink are one piece of code in PVE, differing in when they answer
//! (qemu-server `API2/Qemu.pm:$update_vm_api`).

use super::disks::{check_drives, make_disk};
use super::{cloudinit, hotplug, wait};
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::misreading::Misreading;
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{Drive, index_of, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::options::Right;
use crate::sim::rules::schema::split_list;
use crate::sim::rules::{self, options, pending};
use crate::sim::state::State;
use crate::sim::tasks::TaskLog;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// A change whose parameters and privileges have been checked.
#[derive(Debug, Clone)]
pub(super) struct Change {
    node: String,
    vmid: u32,
    user: String,
    digest: Option<String>,
    force: bool,
    delete: Vec<String>,
    revert: BTreeSet<String>,
    set: BTreeMap<String, String>,
    /// The parameters as the task's log shows them.
    shown: String,
}

/// `PUT config`: answers when it is done (`API2/Qemu.pm:update_vm`).
pub(super) async fn put(call: Call) -> Result<Reply, PveError> {
    let change = Change::from_call(&call)?;
    change.early_checks(&call.sim)?;
    change.run(&call.sim, &TaskLog::nowhere(&call.sim)).await?;
    Ok(Reply::null())
}

/// `POST config`: a task, waited for with `background_delay` (`API2/Qemu.pm:update_vm_async`).
pub(super) async fn post(call: Call) -> Result<Reply, PveError> {
    let change = Change::from_call(&call)?;
    change.early_checks(&call.sim)?;
    let sim = call.sim.clone();
    let (node, vmid) = (change.node.clone(), change.vmid);
    let upid = call.sim.start_task(&node, "qmconfig", &vmid.to_string(), &call.user, move |log| async move {
        change.run(&sim, &log).await
    });
    if let Some(delay) = call.get("background_delay").and_then(|delay| delay.parse().ok()) {
        match wait(&call, &upid, delay).await {
            Some(status) if status == "OK" || status.starts_with("WARNINGS") => return Ok(Reply::null()),
            Some(status) => return Err(PveError::die(format!("failed to update VM {vmid}: {status}"))),
            None => {}
        }
    }
    Ok(json!(upid).into())
}

/// `PUT unlink`: a PUT config with `delete`, without a digest (`API2/Qemu.pm:unlink`).
pub(super) async fn unlink(mut call: Call) -> Result<Reply, PveError> {
    let list = call.params.remove("idlist").unwrap_or_default();
    call.params.insert("delete".to_owned(), list);
    put(call).await
}

impl Change {
    fn from_call(call: &Call) -> Result<Self, PveError> {
        let mut set = call.params.clone();
        for name in ["node", "vmid", "digest", "background_delay"] {
            set.remove(name);
        }
        let as_sent = |key: &String, value: &String| match key.as_str() {
            "cipassword" => "<hidden>".to_owned(),
            _ => call.sent.get(key).unwrap_or(value).clone(),
        };
        let shown: Vec<String> =
            set.iter().map(|(key, value)| format!("-{key} {}", as_sent(key, value))).collect();
        if set.remove("skiplock").is_some_and(|flag| flag == "1") {
            // Even a token of root is not root@pam.
            return Err(PveError::parameter("skiplock", "Only root may use this option."));
        }
        set.remove("force");
        let delete_list = set.remove("delete").unwrap_or_default();
        let revert_list = set.remove("revert").unwrap_or_default();
        if delete_list.is_empty() && revert_list.is_empty() && set.is_empty() {
            return Err(PveError::die("no options specified"));
        }
        let unknown = |list: &str, key: &str| PveError::parameter(list, format!("unknown option '{key}'"));
        let clash = |list: &str, key: &str, what: &str| {
            PveError::parameter(list, format!("you can't use '-{key}' and -{what} {key}' at the same time"))
        };
        let mut revert = BTreeSet::new();
        for key in split_list(&revert_list) {
            options::kind_of(key).ok_or_else(|| unknown("revert", key))?;
            if set.contains_key(key) {
                return Err(clash("delete", key, "revert"));
            }
            revert.insert(key.to_owned());
        }
        let mut delete = Vec::new();
        for key in split_list(&delete_list) {
            if set.contains_key(key) || revert.contains(key) {
                return Err(clash("delete", key, "delete"));
            }
            options::kind_of(key).ok_or_else(|| unknown("delete", key))?;
            delete.push(key.to_owned());
        }
        let change = Self {
            node: call.node().to_owned(),
            vmid: call.vmid(),
            user: call.user.clone(),
            digest: call.get("digest").map(str::to_owned),
            force: call.flag("force"),
            delete,
            revert,
            set,
            shown: shown.join(" "),
        };
        change.privileges(call)?;
        Ok(change)
    }

    /// The change that puts a drive into a slot of another VM (`API2/Qemu.pm:move_vm_disk`).
    pub(super) fn of_drive(call: &Call, vmid: u32, slot: &str, drive: &Drive) -> Self {
        Self {
            node: call.node().to_owned(),
            vmid,
            user: call.user.clone(),
            digest: call.get("target-digest").map(str::to_owned),
            force: false,
            delete: Vec::new(),
            revert: BTreeSet::new(),
            set: BTreeMap::from([(slot.to_owned(), drive.to_string())]),
            shown: format!("-{slot} {drive}"),
        }
    }

    /// `API2/Qemu.pm:$check_vm_modify_config_perm` and `$check_storage_access`.
    fn privileges(&self, call: &Call) -> Result<(), PveError> {
        let vms = format!("/vms/{}", self.vmid);
        // A storage that is not there is noticed first (`cleanup_drive_path`).
        check_drives(call, &self.node, None, &self.set)?;
        for key in self.delete.iter().chain(self.set.keys()) {
            check_right(call, &[&vms], key)?;
        }
        check_drives(call, &self.node, Some(self.vmid), &self.set)
    }

    /// Checks made before a task is started, and again under the lock (`$load_and_check_config`).
    fn early_checks(&self, sim: &Sim) -> Result<(), PveError> {
        sim.read(|state| {
            let vm = state.vm_on(&self.node, self.vmid)?;
            if self.digest.as_ref().is_some_and(|digest| !digest.is_empty() && *digest != vm.conf.digest()) {
                return Err(PveError::die("checksum mismatch (file change by other user?)"));
            }
            check_lock(&vm.conf)
        })
    }

    /// Writes the change to the pending section and applies it.
    async fn run(self, sim: &Sim, log: &TaskLog) -> Result<(), PveError> {
        let _lock = sim.locks().vm_in(self.vmid, Some(log)).await?;
        self.run_locked(sim, log).await
    }

    /// The same for who holds the VM's lock.
    async fn change(mut self, sim: &Sim, log: &TaskLog) -> Result<(), PveError> {
        self.early_checks(sim)?;
        // Drives are checked one by one as they are written, so in the task (recorded as H-PRIV-import).
        self.rights_of_values(sim)?;
        sim.clock().spend(Cost::Configure).await;
        log.line(format!("update VM {}: {}", self.vmid, self.shown));
        let vmid = self.vmid;
        for key in std::mem::take(&mut self.revert) {
            let conf = sim.read(|state| state.vm_on(&self.node, vmid).map(|vm| vm.conf.clone()))?;
            if let Some(value) = conf.current.get(&key) {
                self.set.insert(key, value.clone());
            } else if conf.pending.contains_key(&key) {
                self.delete.push(key);
            }
        }

        let mut modified = BTreeSet::new();
        for key in &self.delete {
            if self.delete_key(sim, key).await? {
                modified.insert(key.clone());
            }
        }
        let order = sim.change(|state| state.key_order.draw(self.set.keys().cloned().collect()));
        for key in order {
            let Some(value) = self.set.get(&key) else { continue };
            modified.insert(key.clone());
            self.set_key(sim, &key, value, log).await?;
            if Drive::stored(&key, value).is_some_and(|drive| drive.is_cdrom()) {
                modified.insert("boot".to_owned());
            }
        }

        let running = sim.change(|state| {
            let vm = state.vm_on_mut(&self.node, vmid)?;
            pending::cleanup(&mut vm.conf);
            vm.conf.tidy();
            Ok::<_, PveError>(vm.conf.has_pending().then_some(vm.running))
        })?;
        match running {
            None => Ok(()),
            Some(true) => {
                let before = sim.read(|state| state.vm_on(&self.node, vmid).map(|vm| vm.conf.clone()))?;
                let errors = hotplug::apply(sim, vmid, &modified, log).await?;
                let notes = sim.read(|state| {
                    let conf = &state.vm_on(&self.node, vmid)?.conf;
                    let on = options::hotplugs(conf.current.get("hotplug").map(String::as_str), "cloudinit");
                    Ok::<_, PveError>(on && !conf.cloudinit.is_empty())
                })?;
                if notes {
                    cloudinit::write(sim, vmid, log).await?;
                }
                // The config is written once QEMU has done its part; where that fails, the file stays behind QEMU.
                if let Err(error) = super::check_writable(sim, &self.node, vmid) {
                    sim.change(|state| state.vm_on_mut(&self.node, vmid).map(|vm| vm.conf = before))?;
                    return Err(error);
                }
                sim.change(|state| state.vm_on_mut(&self.node, vmid).map(|vm| vm.conf.tidy()))?;
                if errors.is_empty() { Ok(()) } else { Err(PveError::Parameters(errors)) }
            }
            Some(false) => {
                let doomed = sim.change(|state| {
                    state.vm_on_mut(&self.node, vmid).map(|vm| pending::apply_all(&mut vm.conf, vmid))
                })?;
                hotplug::destroy(sim, vmid, doomed, log).await?;
                if self.set.values().any(|value| value.contains("cloudinit")) {
                    cloudinit::write(sim, vmid, log).await?;
                }
                Ok(())
            }
        }
    }

    /// Values that are written one by one are checked then, the old ones as well as the new
    /// (`API2/Qemu.pm:$check_drive_perms`).
    fn rights_of_values(&self, sim: &Sim) -> Result<(), PveError> {
        let path = format!("/vms/{}", self.vmid);
        sim.read(|state| {
            let conf = &state.vm_on(&self.node, self.vmid)?.conf;
            let old = |key: &String| conf.current.get(key).or_else(|| conf.pending.get(key));
            let gone = self.delete.iter().filter_map(|key| Some((key, old(key)?)));
            let replaced = self.set.keys().filter_map(|key| Some((key, conf.current.get(key)?)));
            for (key, value) in gone.chain(replaced).chain(&self.set) {
                if options::right(key) == Right::ByValue && self.user != "root@pam" {
                    for privilege in options::right_of_value(key, value)? {
                        state.access.check(&self.user, &path, &[privilege])?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Does the change, and in the test of the replay that has it wrong forgets disks that became unused.
    pub(super) async fn run_locked(self, sim: &Sim, log: &TaskLog) -> Result<(), PveError> {
        let (node, vmid) = (self.node.clone(), self.vmid);
        let wrong = sim.read(|state| state.misreading == Some(Misreading::DetachedVanishes));
        let before = sim.read(|state| state.vm_on(&node, vmid).map(|vm| vm.conf.current.clone()));
        let result = self.change(sim, log).await;
        if let (true, Ok(before)) = (wrong, before) {
            sim.change(|state| {
                let vm = state.vm_on_mut(&node, vmid)?;
                vm.conf.current.retain(|key, _| !key.starts_with("unused") || before.contains_key(key));
                Ok::<_, PveError>(())
            })?;
        }
        result
    }

    /// Returns whether the key was there to be deleted.
    async fn delete_key(&self, sim: &Sim, key: &str) -> Result<bool, PveError> {
        let vmid = self.vmid;
        let conf = sim.read(|state| state.vm_on(&self.node, vmid).map(|vm| vm.conf.clone()))?;
        let Some(value) = conf.current.get(key).or_else(|| conf.pending.get(key)).cloned() else {
            return Ok(false);
        };
        let was_pending = conf.pending.get(key).and_then(|value| Drive::stored(key, value));
        let drive = Drive::stored(key, &value);
        if key.starts_with("unused") {
            let file = drive.map_or(value, |drive| drive.file);
            check_protection(&conf, &format!("can't remove unused disk '{file}'"))?;
            if pending::owner_of(&file) == Some(vmid) {
                let storage = file.split(':').next().unwrap_or_default().to_owned();
                sim.read(|state| {
                    state.access.check(
                        &self.user,
                        &format!("/storage/{storage}"),
                        &["Datastore.AllocateSpace"],
                    )
                })?;
                if conf.in_snapshot(&file) {
                    return Err(PveError::die(format!(
                        "unable to delete '{file}' - volume is still in use (snapshot?)"
                    )));
                }
                hotplug::destroy(sim, vmid, [file], &TaskLog::nowhere(sim)).await?;
            }
            super::check_writable(sim, &self.node, vmid)?;
            sim.change(|state| state.vm_on_mut(&self.node, vmid).map(|vm| vm.conf.current.remove(key)))?;
            return Ok(true);
        }
        if is_drive_key(key) {
            check_protection(&conf, &format!("can't remove drive '{key}'"))?;
        }
        // The config is written with each key (`update_vm_api`).
        super::check_writable(sim, &self.node, vmid)?;
        let doomed = sim.change(|state| {
            let vm = state.vm_on_mut(&self.node, vmid)?;
            vm.conf.pending.remove(key);
            // A boot disk leaves the boot order too, as a pending change of its own.
            let mut order = conf.boot_order();
            if order.iter().any(|name| name == key) && !self.delete.iter().any(|name| name == "boot") {
                order.retain(|name| name != key);
                vm.conf.pending.insert("boot".to_owned(), boot_of(&order));
            }
            let was_pending = was_pending.filter(|_| is_drive_key(key));
            let doomed = was_pending.and_then(|drive| pending::register_unused(&mut vm.conf, vmid, &drive));
            vm.conf.pending_delete.insert(key.to_owned(), self.force);
            Ok::<_, PveError>(doomed)
        })?;
        hotplug::destroy(sim, vmid, doomed, &TaskLog::nowhere(sim)).await?;
        Ok(true)
    }

    async fn set_key(&self, sim: &Sim, key: &str, value: &str, log: &TaskLog) -> Result<(), PveError> {
        let vmid = self.vmid;
        let old_pending =
            sim.read(|state| state.vm_on(&self.node, vmid).map(|vm| vm.conf.pending.get(key).cloned()))?;
        if old_pending.as_deref() == Some(value) {
            return Ok(());
        }
        let value = if is_drive_key(key) && !key.starts_with("unused") {
            make_disk(sim, &self.node, vmid, key, value, log).await?
        } else if index_of(key, "net").is_some() {
            let salt = sim.change(State::salt);
            rules::net::with_address(value, &format!("{vmid} {key} {salt}"))
        } else {
            value.to_owned()
        };
        super::check_writable(sim, &self.node, vmid)?;
        let doomed = sim.change(|state| {
            let salt = state.salt();
            let vm = state.vm_on_mut(&self.node, vmid)?;
            vm.conf.pending_delete.remove(key);
            // A password is no change that waits: nothing runs that knows the old one.
            if key == "cipassword" {
                vm.conf.current.insert(key.to_owned(), rules::cloudinit::keep_password(&value, salt));
                return Ok(None);
            }
            let old = old_pending.and_then(|old| Drive::stored(key, &old)).filter(|_| is_drive_key(key));
            let doomed = old.and_then(|old| pending::register_unused(&mut vm.conf, vmid, &old));
            boot_from_cdrom(&mut vm.conf, key, &value);
            vm.conf.pending.insert(key.to_owned(), value);
            Ok::<_, PveError>(doomed)
        })?;
        hotplug::destroy(sim, vmid, doomed, log).await
    }
}

/// A CD-ROM that comes anew is booted from too, after all else in the order (`API2/Qemu.pm:$update_vm_api`).
fn boot_from_cdrom(conf: &mut Conf, key: &str, value: &str) {
    let mut order = conf.boot_order();
    let cdrom = Drive::stored(key, value)
        .is_some_and(|drive| drive.is_cdrom() && !rules::cloudinit::is_drive(&drive.file));
    if is_drive_key(key) && cdrom && !order.is_empty() && !order.iter().any(|name| name == key) {
        order.push(key.to_owned());
        conf.pending.insert("boot".to_owned(), boot_of(&order));
    }
}

/// Refuses a caller who may not change a key of a VM, by what holds at one of the paths: the VM's own, or its pool's
/// (`API2/Qemu.pm:$check_vm_modify_config_perm`, pve-access-control `RPCEnvironment.pm:check_vm_perm`).
pub(super) fn check_right(call: &Call, paths: &[&str], key: &str) -> Result<(), PveError> {
    let Some((vm, pools)) = paths.split_first().filter(|_| call.user != "root@pam") else { return Ok(()) };
    let any = |any: &[&str]| {
        if pools.iter().any(|pool| call.may(pool, any)) { Ok(()) } else { call.check(vm, any) }
    };
    match options::right(key) {
        Right::Any(privileges) => any(privileges),
        Right::Startup => {
            any(&["VM.Config.Options"])?;
            call.check("/", &["Sys.Modify"])
        }
        Right::ByValue => Ok(()),
        Right::Root => Err(PveError::die(format!("only root can set '{key}' config"))),
    }
}

/// A boot order as the config has it; one blank when nothing is left to boot from (`QemuServer.pm:print_bootorder`,
/// recorded as D28).
pub(super) fn boot_of(order: &[String]) -> String {
    if order.is_empty() { " ".to_owned() } else { format!("order={}", order.join(";")) }
}

/// `AbstractConfig.pm:check_lock`.
pub(super) fn check_lock(conf: &Conf) -> Result<(), PveError> {
    match conf.current.get("lock") {
        Some(lock) => Err(PveError::die(format!("VM is locked ({lock})"))),
        None => Ok(()),
    }
}

/// `AbstractConfig.pm:check_protection`.
pub(super) fn check_protection(conf: &Conf, what: &str) -> Result<(), PveError> {
    if conf.current.get("protection").is_some_and(|value| value == "1") {
        return Err(PveError::die(format!("{what} - protection mode enabled")));
    }
    Ok(())
}
