//! `PUT resize`: a task whose every error but those of schema and privilege is in its exit status
//! (qemu-server `API2/Qemu.pm:resize_vm`, `QemuServer/Blockdev.pm:resize`).

use super::hotplug::{blocking_on_guest, qmp};
use super::update::check_lock;
use super::volume;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::drive::{Drive, format_size, index_of, parse_size};
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use crate::sim::tasks::TaskLog;
use serde_json::json;

/// Starts the task (`API2/Qemu.pm:resize_vm`).
pub(super) fn resize(call: Call) -> Reply {
    let sim = call.sim.clone();
    let (node, vmid, user) = (call.node().to_owned(), call.text("vmid").to_owned(), call.user.clone());
    let upid =
        sim.start_task(
            &node,
            "resize",
            &vmid,
            &user,
            move |log| async move { run(&call.sim, &call, &log).await },
        );
    json!(upid).into()
}

async fn run(sim: &Sim, call: &Call, log: &TaskLog) -> Result<(), PveError> {
    let (node, vmid, slot) = (call.node(), call.vmid(), call.text("disk"));
    let _lock = sim.locks().vm(vmid).await?;
    let (drive, key, size, open) = sim.read(|state| {
        let vm = state.vm_on(node, vmid)?;
        if call.get("digest").is_some_and(|digest| !digest.is_empty() && digest != vm.conf.digest()) {
            return Err(PveError::die("checksum mismatch (file change by other user?)"));
        }
        check_lock(&vm.conf)?;
        let missing = || PveError::die(format!("disk '{slot}' does not exist"));
        let value = vm.conf.current.get(slot).ok_or_else(missing)?;
        let drive = Drive::stored(slot, value).ok_or_else(missing)?;
        if drive.is_cdrom() {
            return Err(PveError::die("you can't resize a cdrom"));
        }
        let key = state.volume_key(node, &drive.file)?;
        state.access.check(&call.user, &format!("/storage/{}", key.storage), &["Datastore.AllocateSpace"])?;
        state.storage(node, &key.storage)?;
        let size = state.existing(&key)?.size;
        Ok((drive, key, size, vm.running && vm.drives.contains_key(slot)))
    })?;
    let text = call.text("size");
    let number = parse_size(text.trim_start_matches('+')).unwrap_or(0);
    let wanted = if text.starts_with('+') { size.saturating_add(number) } else { number };
    if wanted < size {
        return Err(PveError::die("shrinking disks is not supported"));
    }
    // The trap: a storage that was grown without QEMU's knowledge counts as done.
    if wanted == size {
        return Ok(());
    }
    super::check_writable(sim, node, vmid)?;
    sim.clock().spend(Cost::Resize).await;
    let machine = sim.real_machine(vmid).filter(|_| open);
    let (lines, grown, ours) = sim.read(|state| {
        let config = state.config_of(&key)?;
        let free = state.free(node, &key.storage);
        let full = state.storages.get(&key.storage).is_some_and(|storage| storage.full);
        let grown = plugin::grown(config, wanted, open);
        let more = plugin::taken(config, grown, 0).saturating_sub(plugin::taken(config, size, 0));
        if full || (plugin::is_thick(config) && more > free) {
            return Err(plugin::no_space_to_grow(
                config,
                &key.name,
                wanted,
                grown.saturating_sub(size),
                free,
            ));
        }
        // What a running VM has open is QEMU's to grow, but for LVM and ZFS.
        let ours = !open || plugin::grows_open_volumes(config);
        let lines = if ours { plugin::grown_lines(config, &key.name) } else { Vec::new() };
        Ok((lines, grown, ours))
    })?;
    log.lines(lines);
    // The storage grows what is its to grow, and only then QEMU is told: where it does not answer, the one has grown and the other has
    // not (`QemuServer/Blockdev.pm:resize`, `get_block_info`).
    if ours {
        volume::grow(sim, &key, grown).await?;
    }
    // A real QEMU answers for itself.
    if open && machine.is_none() {
        qmp(sim, vmid, "query-block").await.map_err(PveError::die)?;
    }
    if !ours {
        volume::grow(sim, &key, grown).await?;
    }
    if open {
        sim.resize_in_memory(vmid, slot, wanted);
    }
    if let Some(machine) = machine {
        let told = machine.resize(slot, grown).await;
        told.map_err(|error| PveError::die(error.to_string().trim_end().to_owned()))?;
    } else if open && let (Some(guests), Some(number)) = (sim.guests().cloned(), index_of(slot, "scsi")) {
        blocking_on_guest(sim, vmid, move || guests.resize(vmid, number))
            .await
            .map_err(|error| PveError::die(format!("block_resize failed: {error}")))?;
    }
    sim.change(|state| {
        let vm = state.vm_on_mut(node, vmid)?;
        if let (true, Some(open)) = (open, vm.drives.get_mut(slot)) {
            open.size = wanted;
        }
        let mut drive = drive;
        drive.options.insert("size".to_owned(), format_size(wanted));
        vm.conf.current.insert(slot.to_owned(), drive.to_string());
        Ok(())
    })
}
