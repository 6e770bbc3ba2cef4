//! Disks in a call: what naming one takes, and how a new one is made (qemu-server `API2/Qemu.pm:$check_storage_access`,
//! `create_disks`).

use super::copy::{self, Target};
use super::volume;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::Call;
use crate::sim::rules::drive::{Drive, is_drive_key};
use crate::sim::rules::error::PveError;
use crate::sim::rules::{cloudinit, plugin};
use crate::sim::state::{State, VolumeKey};
use crate::sim::tasks::TaskLog;
use std::collections::{BTreeMap, BTreeSet};

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
    for (key, drive) in drives {
        let is_iso = drive.volume().is_some_and(|(_, name)| name.starts_with("iso/"));
        if is_iso && !drive.is_cdrom() {
            return Err(PveError::parameter(key, "explicit 'media=cdrom' is required for iso images"));
        }
        if is_iso && vmid.is_some() {
            super::files::check_access(call, &drive.file)?;
        }
        if drive.is_cdrom() || cloudinit::is_drive(&drive.file) {
            continue;
        }
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

/// The refusal to make a disk on a storage that is for other things (`API2/Qemu.pm:$check_storage_access`).
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
    if drive.volume().is_some_and(|(_, name)| name == "cloudinit") {
        return super::cloudinit::make_drive(sim, node, vmid, slot, drive, log).await;
    }
    if drive.is_cdrom() {
        return super::files::with_size(sim, node, drive).map(|drive| drive.to_string());
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
