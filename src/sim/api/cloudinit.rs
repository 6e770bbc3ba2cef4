//! The cloud-init drive of a VM: how it is made, written, and what is said of it (qemu-server
//! `API2/Qemu.pm:cloudinit_pending`, `cloudinit_update`, `cloudinit_generated_config_dump`, `QemuServer/Cloudinit.pm`).
//!
//! The drive is a volume of the VM as any other. What it carries can be asked for; no ISO image is written into it.

use super::update::check_lock;
use super::volume;
use crate::sim::Sim;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::cloudinit::{self, SIZE};
use crate::sim::rules::drive::Drive;
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// `GET cloudinit` (`API2/Qemu.pm:cloudinit_pending`).
pub(super) fn get(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| Ok(cloudinit::listing(&state.vm_on(call.node(), call.vmid())?.conf).into()))
}

/// `GET cloudinit/dump`: the password is for who may change it (`API2/Qemu.pm:cloudinit_generated_config_dump`).
pub(super) fn dump(call: &Call) -> Result<Reply, PveError> {
    let vmid = call.vmid();
    let hide = !call.may(&format!("/vms/{vmid}"), &["VM.Config.Cloudinit"]);
    let values =
        call.sim.read(|state| Ok::<_, PveError>(state.vm_on(call.node(), vmid)?.conf.current.clone()))?;
    cloudinit::dump(&values, vmid, call.text("type"), hide).map(|text| json!(text).into())
}

/// `PUT cloudinit`: what the config says now is on the drive (`API2/Qemu.pm:cloudinit_update`,
/// `QemuServer.pm:vmconfig_update_cloudinit_drive`).
pub(super) async fn put(call: &Call) -> Result<Reply, PveError> {
    let (sim, vmid) = (&call.sim, call.vmid());
    let _lock = sim.locks().vm(vmid).await?;
    sim.read(|state| check_lock(&state.vm_on(call.node(), vmid)?.conf))?;
    super::check_writable(sim, call.node(), vmid)?;
    write(sim, vmid, &TaskLog::nowhere(sim)).await?;
    Ok(Reply::null())
}

/// The name and format of the drive of a VM (`API2/Qemu.pm:create_disks`).
fn file_of(config: &crate::sim::world::Storage, vmid: u32, asked: Option<&str>) -> (String, String) {
    let name = format!("vm-{vmid}-cloudinit");
    if config.kind.is_directory() {
        let format = asked.unwrap_or("qcow2");
        return (format!("{name}.{format}"), format.to_owned());
    }
    if config.chains() {
        let format = asked.unwrap_or("qcow2");
        let name = if format == "qcow2" { format!("{name}.qcow2") } else { name };
        return (name, format.to_owned());
    }
    (name, asked.unwrap_or("raw").to_owned())
}

/// Makes the drive that `STORE:cloudinit` asks for; a VM has one (`API2/Qemu.pm:create_disks`).
pub(super) async fn make_drive(
    sim: &Sim,
    node: &str,
    vmid: u32,
    slot: &str,
    mut drive: Drive,
    log: &TaskLog,
) -> Result<String, PveError> {
    let id = drive.volume().map(|(id, _)| id.to_owned()).unwrap_or_default();
    let asked = drive.options.remove("format");
    let (key, format) = sim.read(|state| {
        let conf = state.vms.get(&vmid).map(|vm| &vm.conf);
        let other = conf.and_then(|conf| {
            let of = |values| cloudinit::drive_of(values, Some(slot));
            of(&conf.current).or_else(|| of(&conf.pending))
        });
        if let Some(other) = other {
            return Err(PveError::die(format!("{slot} - cloud-init drive is already attached at '{other}'")));
        }
        let config = &state.storage(node, &id)?.config;
        let (file, format) = file_of(config, vmid, asked.as_deref());
        let (name, format) = plugin::allocate(config, vmid, &file, Some(&format))?;
        Ok((state.resolve(node, config, &name), format))
    })?;
    let _lock = sim.locks().storage(key.node.as_deref(), &id).await?;
    volume::make(sim, key.clone(), SIZE, format).await?;
    drive.file = key.volid();
    drive.options.insert("media".to_owned(), "cdrom".to_owned());
    log.line(format!("{slot}: successfully created disk '{drive}'"));
    Ok(drive.to_string())
}

/// Writes the drive of a VM anew, and makes it where it is missing; nothing waits to be written then
/// (`Cloudinit.pm:apply_cloudinit_config`, `commit_cloudinit_disk`).
pub(super) async fn write(sim: &Sim, vmid: u32, log: &TaskLog) -> Result<(), PveError> {
    let missing = sim.read(|state| {
        let Some(vm) = state.vms.get(&vmid) else { return Ok(None) };
        let Some(slot) = cloudinit::drive_of(&vm.conf.current, None) else { return Ok(None) };
        let drive = vm.conf.current.get(slot).and_then(|value| Drive::stored(slot, value));
        let Some(drive) = drive else { return Ok(None) };
        let key = state.volume_key(&vm.node, &drive.file)?;
        state.storage(&vm.node, &key.storage)?;
        // What cannot be written is refused as a whole.
        cloudinit::dump(&vm.conf.current, vmid, "meta", false)?;
        let format = plugin::format_of(state.config_of(&key)?, &key.name);
        Ok::<_, PveError>(Some((!state.volumes.contains_key(&key)).then_some((key, format))))
    })?;
    let Some(missing) = missing else { return Ok(()) };
    log.line("generating cloud-init ISO");
    if let Some((key, format)) = missing {
        volume::make(sim, key, SIZE, format).await?;
    }
    sim.change(|state| {
        if state.vms.get(&vmid).is_some_and(|vm| !vm.conf.cloudinit.is_empty())
            && let Some(vm) = state.vms.get_mut(&vmid)
        {
            vm.conf.cloudinit.clear();
        }
    });
    Ok(())
}
