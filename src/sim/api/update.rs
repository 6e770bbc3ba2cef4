//! Changing a config: PUT, POST and unlink are one piece of code in PVE, differing in when they answer
//! (qemu-server `API2/Qemu.pm:$update_vm_api`).

use super::copy::{self, Target};
use super::{hotplug, volume, wait};
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::conf::Conf;
use crate::sim::rules::drive::{Drive, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use crate::sim::rules::schema::split_list;
use crate::sim::rules::{options, pending};
use crate::sim::state::{State, VolumeKey};
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

/// `PUT config`: answers when it is done.
pub(super) async fn put(call: Call) -> Result<Reply, PveError> {
    let change = Change::from_call(&call)?;
    change.early_checks(&call.sim)?;
    change.run(&call.sim, &TaskLog::nowhere(&call.sim)).await?;
    Ok(Reply::null())
}

/// `POST config`: a task, waited for with `background_delay`.
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
        let as_sent = |key: &String, value: &String| call.sent.get(key).unwrap_or(value).clone();
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
            if let Some(privilege) = options::privilege(key)? {
                call.check(&vms, &[privilege])?;
            }
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
    pub(super) async fn run_locked(mut self, sim: &Sim, log: &TaskLog) -> Result<(), PveError> {
        self.early_checks(sim)?;
        // Drives are checked one by one as they are written, so in the task (recorded as H-PRIV-import).
        if self.delete.iter().chain(self.set.keys()).any(|key| is_drive_key(key)) {
            let path = format!("/vms/{}", self.vmid);
            sim.read(|state| state.access.check(&self.user, &path, &["VM.Config.Disk"]))?;
        }
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
        }

        if !modified.is_empty() {
            super::check_writable(sim, &self.node, vmid)?;
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
                let errors = hotplug::apply(sim, vmid, &modified).await?;
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
                hotplug::destroy(sim, vmid, doomed, log).await
            }
        }
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
            sim.change(|state| state.vm_on_mut(&self.node, vmid).map(|vm| vm.conf.current.remove(key)))?;
            return Ok(true);
        }
        if is_drive_key(key) {
            check_protection(&conf, &format!("can't remove drive '{key}'"))?;
        }
        sim.change(|state| {
            let vm = state.vm_on_mut(&self.node, vmid)?;
            vm.conf.pending.remove(key);
            // A boot disk leaves the boot order too, as a pending change of its own.
            let mut order = conf.boot_order();
            if order.iter().any(|name| name == key) && !self.delete.iter().any(|name| name == "boot") {
                order.retain(|name| name != key);
                vm.conf.pending.insert("boot".to_owned(), boot_of(&order));
            }
            if let Some(drive) = was_pending.filter(|_| is_drive_key(key)) {
                pending::register_unused(&mut vm.conf, vmid, &drive);
            }
            vm.conf.pending_delete.insert(key.to_owned(), self.force);
            Ok(true)
        })
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
        } else {
            value.to_owned()
        };
        sim.change(|state| {
            let vm = state.vm_on_mut(&self.node, vmid)?;
            if let Some(old) =
                old_pending.and_then(|old| Drive::stored(key, &old)).filter(|_| is_drive_key(key))
            {
                pending::register_unused(&mut vm.conf, vmid, &old);
            }
            vm.conf.pending.insert(key.to_owned(), value);
            vm.conf.pending_delete.remove(key);
            Ok(())
        })
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

/// Without `vmid`: that every drive names a storage and volume that can be. With it: that the caller may plug them
/// into that VM (`API2/Qemu.pm:$check_storage_access`).
pub(super) fn check_drives(
    call: &Call,
    node: &str,
    vmid: Option<u32>,
    set: &BTreeMap<String, String>,
) -> Result<(), PveError> {
    let drives = set
        .iter()
        .filter(|(key, _)| is_drive_key(key))
        .filter_map(|(key, value)| Some((key, Drive::stored(key, value)?)));
    for (key, drive) in drives.filter(|(_, drive)| !drive.is_cdrom()) {
        if drive.file.starts_with('/') {
            return Err(PveError::die(
                "Only root can pass arbitrary filesystem paths. at /usr/share/perl5/PVE/Storage.pm line 651.",
            ));
        }
        // A VM that is being made has no job yet.
        if vmid.is_none() {
            let vmid = call.vmid();
            call.sim.read(|state| super::jobs::check_drive(state, node, vmid, &drive))?;
        }
        if let Some(source) = drive.options.get("import-from") {
            check_import(call, node, vmid, key, &drive, source)?;
        }
        if let Some((storage, _)) = drive.new_disk() {
            let images = call
                .sim
                .read(|state| state.storage(node, storage).map(|found| found.config.has_content("images")))?;
            if vmid.is_some() {
                call.check(&format!("/storage/{storage}"), &["Datastore.AllocateSpace"])?;
                if !images {
                    return Err(no_images(storage));
                }
            }
            continue;
        }
        let key = call.sim.read(|state| state.volume_key(node, &drive.file))?;
        if let Some(vmid) = vmid {
            let owner = key.owner();
            call.sim.read(|state| state.access.check_volume(&call.user, &key.storage, owner, Some(vmid)))?;
        }
    }
    Ok(())
}

/// The refusal to make a disk on a storage that is for other things.
pub(super) fn no_images(storage: &str) -> PveError {
    PveError::parameter("storage", format!("storage '{storage}' does not support vm images"))
}

/// What importing a volume takes: the special syntax, `VM.Clone` on its owner, and a name that can be one
/// (`API2/Qemu.pm:$check_storage_access`).
fn check_import(
    call: &Call,
    node: &str,
    vmid: Option<u32>,
    slot: &str,
    drive: &Drive,
    source: &str,
) -> Result<(), PveError> {
    if drive.new_disk().is_none_or(|(_, size)| size > 0.0) {
        return Err(PveError::parameter(
            slot,
            "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>",
        ));
    }
    let key = call.sim.read(|state| state.volume_key(node, source))?;
    if vmid.is_some() {
        call.check(&format!("/vms/{}", key.owner()), &["VM.Clone"])?;
    }
    Ok(())
}

/// The next name PVE gives a disk of its own making (`Plugin.pm:find_free_diskname`).
pub(super) fn free_name(
    state: &State,
    node: &str,
    vmid: u32,
    storage: &str,
    format: &str,
) -> Result<VolumeKey, PveError> {
    let config = &state.storage(node, storage)?.config;
    let taken: BTreeSet<u32> = state
        .volumes_on(node, config)
        .filter_map(|(key, _)| plugin::disk_number(config, vmid, format, &key.name))
        .collect();
    // `Plugin.pm:$MAX_VOLUMES_PER_GUEST`
    let index = (0..1024).find(|index| !taken.contains(index));
    index
        .map(|index| state.resolve(node, config, &plugin::disk_name(config, vmid, index, format)))
        .ok_or_else(|| {
            PveError::die(format!("unable to allocate an image name for VM {vmid} in storage '{storage}'"))
        })
}

/// The value a drive gets in the config: a new disk is made, an existing one must be there, and `size=` is the
/// volume's (`API2/Qemu.pm:create_disks`).
pub(super) async fn make_disk(
    sim: &Sim,
    node: &str,
    vmid: u32,
    slot: &str,
    value: &str,
    log: &TaskLog,
) -> Result<String, PveError> {
    let mut drive = Drive::parse(slot, value).map_err(|error| PveError::parameter(slot, error))?;
    if drive.is_cdrom() {
        return Ok(drive.to_string());
    }
    if let Some((storage, gigabytes)) = drive.new_disk() {
        let storage = storage.to_owned();
        let size = crate::sim::rules::drive::parse_size(&format!("{gigabytes}G"))
            .ok_or_else(|| PveError::die(format!("bad size of '{slot}'")))?;
        let asked = drive.options.remove("format");
        if let Some(source) = drive.options.remove("import-from") {
            let source = sim.read(|state| state.volume_key(node, &source))?;
            log.line(format!("create full clone of drive ({})", source.volid()));
            let target = Target { node, vmid, storage: &storage, format: asked.as_deref() };
            let key = copy::full(sim, &source, None, &target, log).await?;
            let made = copy::on_volume(sim, &drive, &key)?;
            log.line(format!("{slot}: successfully created disk '{made}'"));
            return Ok(made.to_string());
        }
        let (key, format) = sim.read(|state| {
            let config = &state.storage(node, &storage)?.config;
            let format = asked.as_deref().unwrap_or_else(|| plugin::default_format(config));
            let key = free_name(state, node, vmid, &storage, format)?;
            let file = key.name.rsplit('/').next().unwrap_or_default();
            let (_, format) = plugin::allocate(config, vmid, file, Some(format))?;
            Ok::<_, PveError>((key, format))
        })?;
        let _lock = sim.locks().storage(key.node.as_deref(), &storage).await?;
        sim.clock().spend(Cost::Alloc).await;
        drive.file = key.volid();
        volume::make(sim, key.clone(), size, format).await?;
        let line = sim.read(|state| {
            let config = state.config_of(&key)?;
            Ok::<_, PveError>(plugin::made_lines(config, &key.name, size, format))
        })?;
        log.lines(line);
        let size = crate::sim::rules::drive::format_size(size);
        log.line(format!("{slot}: successfully created disk '{},size={size}'", drive.file));
    }
    let size = sim.read(|state| {
        let key = state.volume_key(node, &drive.file)?;
        state.storage(node, &key.storage)?;
        state.existing(&key).map(|volume| volume.size)
    })?;
    if size == 0 {
        return Err(PveError::die(format!("volume {} does not exist", drive.file)));
    }
    drive.options.insert("size".to_owned(), crate::sim::rules::drive::format_size(size));
    Ok(drive.to_string())
}
