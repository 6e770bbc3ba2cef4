//! Contents of volumes: made sparse, grown, copied, renamed, put back, removed (pve-storage `Storage/Plugin.pm:alloc_image`,
//! `free_image`, `volume_resize`, `rename_volume`, `volume_snapshot`, `volume_snapshot_rollback`), in files or in memory.

use super::blocking;
use crate::sim::Sim;
use crate::sim::contents::Contents;
use crate::sim::rules::error::PveError;
use crate::sim::rules::plugin;
use crate::sim::state::{Freed, Snapshot, State, Volume, VolumeKey};
use crate::sim::tasks::TaskLog;
use crate::sim::world::Kind;
use std::path::PathBuf;
use std::time::Duration;

/// Works on contents: off the runtime where they are files; at once where they are in memory, so that a paused clock is
/// not disturbed.
async fn on_contents<T: Send + 'static>(
    sim: &Sim,
    work: impl FnOnce(&Contents) -> std::io::Result<T> + Send + 'static,
) -> Result<T, PveError> {
    let done = match sim.contents() {
        Contents::Memory(_) => work(sim.contents()),
        Contents::Files => {
            let sim = sim.clone();
            blocking(move || work(sim.contents())).await?
        }
    };
    done.map_err(|error| PveError::die(format!("simulator: contents of a volume: {error}")))
}

/// Makes a volume that is not there yet (`Storage.pm:vdisk_alloc`).
pub(super) async fn make(sim: &Sim, key: VolumeKey, size: u64, format: &'static str) -> Result<(), PveError> {
    let size = sim.read(|state| {
        let config = state.config_of(&key)?;
        if state.volumes.contains_key(&key) {
            return Err(plugin::exists(config, &key.name));
        }
        let size = plugin::round(config, &key.name, size)?;
        let full = state.storages.get(&key.storage).is_some_and(|storage| storage.full);
        // How much is free is asked of every volume, so only where it decides.
        if full || plugin::is_thick(config) {
            let free = state.free(key.node.as_deref().unwrap_or_default(), &key.storage);
            if full || plugin::taken(config, size, 0) > free {
                return Err(plugin::no_space(config, &key.name, size, free));
            }
        }
        Ok(size)
    })?;
    let (image, file) = (sim.image_of(&key), sim.place_of(&key));
    let old = if format == "raw" { take_freed(sim, &key) } else { None };
    on_contents(sim, move |contents| match old {
        Some(old) => {
            contents.rename(&old, &file)?;
            contents.resize(&file, size)?;
            contents.wipe_signatures(&file, size)
        }
        None => contents.make(&file, size),
    })
    .await?;
    let ctime = sim.clock().now();
    sim.change(|state| {
        state.volumes.insert(key, Volume { size, ctime, format, image, snapshots: Vec::new(), parent: None })
    });
    Ok(())
}

/// Blocks that a new volume gets with what was written there before: those that were freed last. Only thick LVM hands
/// out such (`LVMPlugin.pm:lvcreate`).
fn take_freed(sim: &Sim, key: &VolumeKey) -> Option<PathBuf> {
    sim.change(|state| {
        let config = state.config_of(key).ok().filter(|config| config.kind == Kind::Lvm)?;
        let place = config.place();
        let at = state.freed.iter().rposition(|old| old.place == place && old.node == key.node)?;
        Some(state.freed.remove(at).file)
    })
}

/// Blocks of how many volumes are kept for each volume group.
const KEPT: usize = 4;

/// Keeps what a volume held for the next one of its volume group. Returns what is to be removed: this file where nobody
/// would see it again, or one that is kept long enough. With `saferemove` nothing stays
/// (`LVMPlugin.pm:free_lvm_volumes_locked`).
fn keep_freed(state: &mut State, key: &VolumeKey, file: PathBuf, kept: Option<PathBuf>) -> Disposal {
    let config = state.config_of(key).ok().filter(|config| config.kind == Kind::Lvm);
    let safe = config.is_some_and(|config| config.properties.get("saferemove").is_some_and(|v| v == "1"));
    let (Some(config), Some(kept), false) = (config, kept, safe) else {
        return Disposal { keep: None, remove: Some(file) };
    };
    let place = config.place();
    let of_group = |old: &Freed| old.place == place && old.node == key.node;
    let oldest = state.freed.iter().position(of_group);
    let full = state.freed.iter().filter(|old| of_group(old)).count() >= KEPT;
    let remove = oldest.filter(|_| full).map(|at| state.freed.remove(at).file);
    state.freed.push(Freed { node: key.node.clone(), place, file: kept.clone() });
    Disposal { keep: Some((file, kept)), remove }
}

/// What becomes of files when a volume goes.
struct Disposal {
    keep: Option<(PathBuf, PathBuf)>,
    remove: Option<PathBuf>,
}

/// How long ZFS is asked again to give up a volume that is open, once a second (`ZFSPoolPlugin.pm:zfs_delete_zvol`).
const BUSY: Duration = Duration::from_secs(6);

/// Removes a volume as its storage allows it (`Storage.pm:vdisk_free`): nobody looks at the configs of VMs, but a
/// template's disk that clones stand on stays, and so does what LVM, ZFS or Ceph has open.
pub(super) async fn remove(sim: &Sim, key: &VolumeKey, log: &TaskLog) -> Result<(), PveError> {
    let (lines, open) = sim.read(|state| {
        let config = state.config_of(key)?;
        if state.is_base_in_use(key) {
            return Err(plugin::base_in_use(&key.name));
        }
        let Some(found) = state.volumes.get(key) else {
            return Ok((plugin::free_missing(config, &key.name)?.into_iter().collect(), None));
        };
        if let Some(snapshot) = state.cloned_snapshot(key, None) {
            return Err(plugin::rbd::has_clones(&key.name, &snapshot));
        }
        let open = plugin::guards_open_volumes(config) && state.is_open(key);
        let lines = plugin::free_lines(config, &key.name, &found.snapshot_names());
        Ok((lines, open.then(|| (config.kind, plugin::in_use(config, &key.name)))))
    })?;
    if let Some((kind, error)) = open {
        if kind == Kind::Zfspool {
            tokio::time::sleep(BUSY).await;
        }
        return Err(error);
    }
    free(sim, key).await?;
    log.lines(lines);
    Ok(())
}

/// Removes a volume with its snapshots; returns whether there was one. A loop device keeps the contents as an open
/// file would.
async fn free(sim: &Sim, key: &VolumeKey) -> Result<bool, PveError> {
    let Some(volume) = sim.change(|state| state.volumes.remove(key)) else { return Ok(false) };
    let (file, snapshots, raw) = (sim.place_of(key), sim.snapshots_of(key), volume.format == "raw");
    let volume = key.volid();
    let disposal = sim.change(|state| {
        let lvm = state.config_of(key).is_ok_and(|config| config.kind == Kind::Lvm);
        let kept = (raw && lvm).then(|| {
            state.counter += 1;
            sim.freed_file(key, state.counter)
        });
        keep_freed(state, key, file, kept)
    });
    on_contents(sim, move |contents| {
        if let Some((file, kept)) = disposal.keep {
            contents.rename(&file, &kept)?;
        }
        if let Some(file) = disposal.remove
            && !contents.remove(&file)?
        {
            tracing::warn!(volume, "a volume's file was not there");
        }
        contents.remove(&snapshots)
    })
    .await?;
    Ok(true)
}

/// Grows a volume; what is added on thick LVM is what others have left there (`Storage.pm:volume_resize`,
/// `LVMPlugin.pm:volume_resize`, which wipes nothing).
pub(super) async fn grow(sim: &Sim, key: &VolumeKey, size: u64) -> Result<(), PveError> {
    let found = sim.read(|state| state.volumes.get(key).map(|volume| (volume.size, volume.format)));
    if let Some((before, format)) = found {
        let old = if format == "raw" && size > before { take_freed(sim, key) } else { None };
        let file = sim.place_of(key);
        let work = move |contents: &Contents| {
            contents.resize(&file, size)?;
            let Some(old) = old else { return Ok(()) };
            contents.give(&old, &file, before, size - before)?;
            contents.remove(&old).map(drop)
        };
        on_contents(sim, work).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.size = size;
        }
    });
    Ok(())
}

/// Gives a volume another name on its storage, contents and snapshots with it. Who has it open keeps it open
/// (`Storage.pm:rename_volume`).
pub(super) async fn rename(sim: &Sim, from: &VolumeKey, to: &VolumeKey) -> Result<(), PveError> {
    let image = sim.image_of(to);
    if sim.read(|state| state.volumes.contains_key(from)) {
        let moves = [(sim.place_of(from), sim.place_of(to)), (sim.snapshots_of(from), sim.snapshots_of(to))];
        let work =
            move |contents: &Contents| moves.iter().try_for_each(|(from, to)| contents.rename(from, to));
        on_contents(sim, work).await?;
    }
    sim.change(|state| {
        let Some(mut volume) = state.volumes.remove(from) else {
            return Err(plugin::missing(state.config_of(from)?, &from.name));
        };
        volume.image = image;
        state.volumes.insert(to.clone(), volume);
        // Ceph knows its clones' parents by more than their names.
        let (old, new) = (format!("{}@", from.name), format!("{}@", to.name));
        let stands_on = |volume: &Volume| volume.parent.as_ref().is_some_and(|of| of.starts_with(&old));
        let clones: Vec<VolumeKey> = state
            .volumes
            .iter()
            .filter(|(key, volume)| key.storage == to.storage && key.node == to.node && stands_on(volume))
            .map(|(key, _)| key.clone())
            .collect();
        for clone in clones {
            if let Some(volume) = state.volumes.get_mut(&clone) {
                volume.parent = volume.parent.take().map(|parent| parent.replacen(&old, &new, 1));
            }
        }
        for vmid in state.holders.of(&state.vms, from) {
            for drive in state.vms.get_mut(&vmid).into_iter().flat_map(|vm| vm.drives.values_mut()) {
                if drive.volume == *from {
                    drive.volume = to.clone();
                }
            }
        }
        Ok(())
    })
}

/// Where the contents of a volume that is there, or of its snapshot, are.
fn file_of(sim: &Sim, key: &VolumeKey, snapshot: Option<&str>) -> Option<PathBuf> {
    match snapshot {
        Some(snapshot) => Some(sim.snapshots_of(key).join(snapshot)),
        None => sim.read(|state| state.volumes.contains_key(key)).then(|| sim.place_of(key)),
    }
}

/// Makes the volume `to` hold what `from`, or its snapshot, holds.
pub(super) async fn copy(
    sim: &Sim,
    from: &VolumeKey,
    snapshot: Option<&str>,
    to: &VolumeKey,
) -> Result<(), PveError> {
    let Some((from, to, size)) = file_of(sim, from, snapshot)
        .zip(file_of(sim, to, None))
        .and_then(|(from, into)| Some((from, into, sim.read(|state| Some(state.volumes.get(to)?.size))?)))
    else {
        return Ok(());
    };
    on_contents(sim, move |contents| contents.copy(&from, &to, size)).await
}

/// Takes a snapshot of a volume that is there (`Storage.pm:volume_snapshot`).
pub(super) async fn snapshot(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    let sizes = sim.read(|state| state.volumes.get(key).map(|volume| (volume.size, volume.used())));
    let Some((size, used)) = sizes else { return Ok(()) };
    if let Some((from, to)) = file_of(sim, key, None).zip(file_of(sim, key, Some(name))) {
        on_contents(sim, move |contents| contents.copy(&from, &to, size)).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.snapshots.push(Snapshot { name: name.to_owned(), size, used });
        }
    });
    Ok(())
}

/// Forgets a snapshot, whether it is there or not (`Storage.pm:volume_snapshot_delete`).
pub(super) async fn drop_snapshot(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.snapshots.retain(|other| other.name != name);
        }
    });
    match file_of(sim, key, Some(name)) {
        Some(file) => on_contents(sim, move |contents| contents.remove(&file)).await.map(drop),
        None => Ok(()),
    }
}

/// Puts a volume back to what it held, and to the size it had, when the snapshot was taken
/// (`Storage.pm:volume_snapshot_rollback`).
pub(super) async fn roll_back(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    let size = sim.read(|state| {
        let volume = state.volumes.get(key)?;
        Some(volume.snapshots.iter().find(|snapshot| snapshot.name == name)?.size)
    });
    let Some(size) = size else { return Ok(()) };
    if let Some((from, to)) = file_of(sim, key, Some(name)).zip(file_of(sim, key, None)) {
        on_contents(sim, move |contents| contents.copy(&from, &to, size)).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.size = size;
        }
    });
    Ok(())
}

/// Lets a running QEMU go on with the copy of a volume it has open: the file that is open becomes the copy's, and the
/// copy's becomes the source's (qemu-server `QemuServer/BlockJob.pm:mirror`).
pub(super) async fn switch_over(sim: &Sim, vmid: u32, slot: &str, to: &VolumeKey) -> Result<(), PveError> {
    let from = sim.read(|state| Some(state.vms.get(&vmid)?.drives.get(slot)?.volume.clone()));
    let Some(from) = from.filter(|from| from != to) else { return Ok(()) };
    let files = sim.read(|state| {
        let (source, copy) = (state.volumes.get(&from)?.size, state.volumes.get(to)?.size);
        Some((sim.place_of(&from), sim.place_of(to), source, copy))
    });
    if let Some((source, copy, source_size, copy_size)) = files {
        on_contents(sim, move |contents| {
            contents.exchange(&source, &copy)?;
            contents.resize(&source, source_size)?;
            contents.resize(&copy, copy_size)
        })
        .await?;
    }
    sim.change(|state| {
        if let Some(drive) = state.vms.get_mut(&vmid).and_then(|vm| vm.drives.get_mut(slot)) {
            drive.volume = to.clone();
        }
    });
    Ok(())
}
