//! Pending changes: how they are listed, cleaned up and applied, and what becomes of a volume that leaves its slot
//! (pve-guest-common `AbstractConfig.pm`, qemu-server `QemuServer.pm:vmconfig_apply_pending`).

use super::cloudinit;
use super::conf::Conf;
use super::drive::{Drive, is_drive_key};
use super::options;
use super::plugin::owner_of_name;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The list in the config file; `!` in front of a key asks for its volume to be destroyed
/// (`AbstractConfig.pm:print_pending_delete`).
pub fn print_delete(keys: &BTreeMap<String, bool>) -> String {
    let keys: Vec<String> =
        keys.iter().map(|(key, force)| format!("{}{key}", if *force { "!" } else { "" })).collect();
    keys.join(",")
}

/// The inverse of `print_delete` (`AbstractConfig.pm:parse_pending_delete`).
pub fn parse_delete(list: &str) -> BTreeMap<String, bool> {
    list.split(',')
        .filter(|key| !key.is_empty())
        .map(|key| key.strip_prefix('!').map_or((key.to_owned(), false), |key| (key.to_owned(), true)))
        .collect()
}

/// `GET pending` (`GuestHelpers.pm:config_with_pending_array`): one entry per key, the digest among them.
pub fn listing(conf: &Conf) -> Vec<Value> {
    let mut entries = Vec::new();
    for (key, value) in &conf.current {
        let hidden = (key == "cipassword").then_some(cloudinit::HIDDEN);
        let mut entry = json!({ "key": key, "value": options::to_json(key, hidden.unwrap_or(value)) });
        if let Some(pending) = conf.pending.get(key) {
            entry["pending"] = options::to_json(key, pending);
        }
        if let Some(force) = conf.pending_delete.get(key) {
            entry["delete"] = json!(if *force { 2 } else { 1 });
        }
        entries.push(entry);
    }
    entries.push(json!({ "key": "digest", "value": conf.digest() }));
    for (key, value) in conf.pending.iter().filter(|(key, _)| !conf.current.contains_key(*key)) {
        entries.push(json!({ "key": key, "pending": options::to_json(key, value) }));
    }
    for (key, force) in conf.pending_delete.iter().filter(|(key, _)| !conf.current.contains_key(*key)) {
        if !conf.pending.contains_key(key) {
            entries.push(json!({ "key": key, "delete": if *force { 2 } else { 1 } }));
        }
    }
    entries
}

/// Drops pending changes that change nothing (`AbstractConfig.pm:cleanup_pending`).
pub fn cleanup(conf: &mut Conf) {
    let Conf { current, pending, pending_delete, .. } = conf;
    pending.retain(|key, value| current.get(key) != Some(value));
    pending_delete.retain(|key, _| current.contains_key(key));
}

/// The VM id that owns a volume, by its name (`QemuServer.pm:vm_is_volid_owner`).
pub fn owner_of(file: &str) -> Option<u32> {
    let (_, name) = file.split_once(':')?;
    owner_of_name(name)
}

/// Keeps a volume that leaves its slot as `unusedN` when the VM owns it; one of another owner just vanishes
/// (`QemuServer.pm:vmconfig_register_unused_drive`). Returns a volume that is to be destroyed: that of cloud-init.
#[must_use]
pub fn register_unused(conf: &mut Conf, vmid: u32, drive: &Drive) -> Option<String> {
    if cloudinit::is_drive(&drive.file) {
        conf.cloudinit.clear();
        return Some(drive.file.clone());
    }
    if !drive.is_cdrom() && owner_of(&drive.file) == Some(vmid) {
        add_unused(conf, &drive.file);
    }
    None
}

/// Lists a volume as `unusedN`, whoever owns it, and returns the key (`AbstractConfig.pm:add_unused_volume`).
pub fn add_unused(conf: &mut Conf, file: &str) -> Option<String> {
    if conf.current.iter().any(|(key, value)| key.starts_with("unused") && value == file) {
        return None;
    }
    let free = (0..256).map(|index| format!("unused{index}")).find(|key| !conf.current.contains_key(key))?;
    conf.current.insert(free.clone(), file.to_owned());
    Some(free)
}

/// Takes a key out of the current values; a drive becomes unused or vanishes. Returns a volume that is to be
/// destroyed: `force` was asked for and the VM owns it (`QemuServer.pm:vmconfig_delete_or_detach_drive`).
pub fn take_out(conf: &mut Conf, vmid: u32, key: &str, force: bool) -> Option<String> {
    let value = conf.current.remove(key)?;
    conf.pending_delete.remove(key);
    let drive = is_drive_key(key).then(|| Drive::stored(key, &value)).flatten()?;
    if force {
        let disk = !drive.is_cdrom() || cloudinit::is_drive(&drive.file);
        return (owner_of(&drive.file) == Some(vmid) && disk).then_some(drive.file);
    }
    register_unused(conf, vmid, &drive)
}

/// Puts a pending value in place of the current one; the drive that was there becomes unused or vanishes. Returns a
/// volume that is to be destroyed (`QemuServer.pm:vmconfig_apply_pending`).
pub fn put_in(conf: &mut Conf, vmid: u32, key: &str) -> Option<String> {
    let value = conf.pending.remove(key)?;
    let stays = |old: &Drive| Drive::stored(key, &value).is_some_and(|new| new.file == old.file);
    let old =
        is_drive_key(key).then(|| conf.current.get(key).and_then(|old| Drive::stored(key, old))).flatten();
    let old = old.filter(|old| !stays(old));
    conf.current.insert(key.to_owned(), value);
    let doomed = old.and_then(|old| register_unused(conf, vmid, &old));
    conf.tidy();
    doomed
}

/// Applies all pending changes of a VM that is not running; returns the volumes to destroy
/// (`QemuServer.pm:vmconfig_apply_pending`).
pub fn apply_all(conf: &mut Conf, vmid: u32) -> Vec<String> {
    let deletes = std::mem::take(&mut conf.pending_delete);
    let mut doomed: Vec<String> =
        deletes.iter().filter_map(|(key, force)| take_out(conf, vmid, key, *force)).collect();
    cleanup(conf);
    let keys: Vec<String> = conf.pending.keys().cloned().collect();
    doomed.extend(keys.iter().filter_map(|key| put_in(conf, vmid, key)));
    conf.tidy();
    doomed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(pairs: &[(&str, &str)]) -> Conf {
        Conf {
            current: pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..Conf::default()
        }
    }

    #[test]
    fn an_owned_volume_becomes_unused_and_a_foreign_one_vanishes() {
        let mut conf = conf(&[("scsi1", "local:100/vm-100-x.raw"), ("scsi2", "local:9999/vm-9999-x.raw")]);
        assert_eq!(take_out(&mut conf, 100, "scsi1", false), None);
        assert_eq!(take_out(&mut conf, 100, "scsi2", false), None);
        assert_eq!(
            conf.current,
            BTreeMap::from([("unused0".to_owned(), "local:100/vm-100-x.raw".to_owned())])
        );
    }

    /// Recorded as C57: `force` does not destroy a volume of another owner.
    #[test]
    fn force_destroys_owned_volumes_only() {
        let mut conf = conf(&[("scsi1", "local:100/vm-100-x.raw"), ("scsi2", "local:9999/vm-9999-x.raw")]);
        assert_eq!(take_out(&mut conf, 100, "scsi1", true).as_deref(), Some("local:100/vm-100-x.raw"));
        assert_eq!(take_out(&mut conf, 100, "scsi2", true), None);
    }

    #[test]
    fn deletes_of_what_is_not_there_are_cleaned_up() {
        let mut conf = conf(&[("name", "w1")]);
        conf.pending_delete.insert("scsi9".to_owned(), false);
        conf.pending.insert("name".to_owned(), "w1".to_owned());
        cleanup(&mut conf);
        assert!(!conf.has_pending());
    }

    #[test]
    fn replacing_a_slot_of_a_stopped_vm_keeps_the_owned_volume_as_unused() {
        let mut conf = conf(&[("scsi1", "local:100/vm-100-x.raw")]);
        conf.pending.insert("scsi1".to_owned(), "local:9999/vm-9999-y.raw".to_owned());
        assert!(apply_all(&mut conf, 100).is_empty());
        assert_eq!(conf.current["scsi1"], "local:9999/vm-9999-y.raw");
        assert_eq!(conf.current["unused0"], "local:100/vm-100-x.raw");
    }
}
