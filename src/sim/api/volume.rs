//! Volumes as files: made sparse, grown, copied, renamed, put back, removed (pve-storage `Storage/Plugin.pm:alloc_image`,
//! `free_image`, `volume_resize`, `rename_volume`, `volume_snapshot`, `volume_snapshot_rollback`). Where the simulator
//! keeps no contents, only the record changes.

use super::blocking;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{dirplugin, plugin};
use crate::sim::state::{Snapshot, Volume, VolumeKey};
use crate::sim::world::Kind;
use crate::sim::{Sim, contents};
use std::path::PathBuf;

/// Runs file work off the runtime.
async fn on_files<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, PveError> {
    blocking(work).await?.map_err(|error| PveError::die(format!("simulator: contents of a volume: {error}")))
}

/// Makes a volume that is not there yet.
pub(super) async fn make(sim: &Sim, key: VolumeKey, size: u64, format: &'static str) -> Result<(), PveError> {
    let size = sim.read(|state| {
        let config = state.config_of(&key)?;
        let path = state.path_of(&key);
        if state.volumes.contains_key(&key) {
            return Err(plugin::exists(config, &key.name));
        }
        if size > dirplugin::LARGEST_IMAGE && !config.kind.is_lvm() {
            return Err(dirplugin::too_large(&path));
        }
        let size = plugin::round(config, size);
        let thick = config.kind == Kind::Lvm;
        let free = state.free(key.node.as_deref().unwrap_or_default(), &key.storage);
        let full = state.storages.get(&key.storage).is_some_and(|storage| storage.full);
        if full || (thick && size > free) {
            return Err(plugin::no_space(config, &key.name, size, free));
        }
        Ok(size)
    })?;
    let image = sim.image_of(&key);
    if let Some(file) = image.clone() {
        on_files(move || contents::make(&file, size)).await?;
    }
    let ctime = sim.clock().now();
    sim.change(|state| {
        state.volumes.insert(key, Volume { size, ctime, format, image, snapshots: Vec::new() })
    });
    Ok(())
}

/// Removes a volume with its snapshots; returns whether there was one. A loop device keeps the contents as an open
/// file would.
pub(super) async fn free(sim: &Sim, key: &VolumeKey) -> Result<bool, PveError> {
    let Some(volume) = sim.change(|state| state.volumes.remove(key)) else { return Ok(false) };
    let snapshots = sim.snapshots_of(key);
    if let Some(file) = volume.image {
        let volume = key.volid();
        on_files(move || {
            if !contents::remove(&file)? {
                tracing::warn!(volume, "a volume's file was not there");
            }
            snapshots.map_or(Ok(false), |snapshots| contents::remove(&snapshots))
        })
        .await?;
    }
    Ok(true)
}

/// Grows a volume.
pub(super) async fn grow(sim: &Sim, key: &VolumeKey, size: u64) -> Result<(), PveError> {
    let image = sim.read(|state| state.volumes.get(key).and_then(|volume| volume.image.clone()));
    if let Some(file) = image {
        on_files(move || contents::resize(&file, size)).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.size = size;
        }
    });
    Ok(())
}

/// Gives a volume another name on its storage, contents and snapshots with it. Who has it open keeps it open.
pub(super) async fn rename(sim: &Sim, from: &VolumeKey, to: &VolumeKey) -> Result<(), PveError> {
    let image = sim.image_of(to);
    let moves: Vec<(PathBuf, PathBuf)> = [
        sim.read(|state| state.volumes.get(from).and_then(|volume| volume.image.clone())).zip(image.clone()),
        sim.snapshots_of(from).zip(sim.snapshots_of(to)),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !moves.is_empty() {
        on_files(move || moves.iter().try_for_each(|(from, to)| contents::rename(from, to))).await?;
    }
    sim.change(|state| {
        let config = state.config_of(from)?.clone();
        let Some(mut volume) = state.volumes.remove(from) else {
            return Err(plugin::missing(&config, &from.name));
        };
        volume.image = image;
        state.volumes.insert(to.clone(), volume);
        for drive in state.vms.values_mut().flat_map(|vm| vm.drives.values_mut()) {
            if drive.volume == *from {
                drive.volume = to.clone();
            }
        }
        Ok(())
    })
}

/// The file of a volume or of its snapshot, where contents are kept.
fn file_of(sim: &Sim, key: &VolumeKey, snapshot: Option<&str>) -> Option<PathBuf> {
    match snapshot {
        Some(snapshot) => Some(sim.snapshots_of(key)?.join(snapshot)),
        None => sim.read(|state| state.volumes.get(key)?.image.clone()),
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
    on_files(move || contents::copy(&from, &to, size)).await
}

/// Takes a snapshot of a volume that is there.
pub(super) async fn snapshot(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    let Some(size) = sim.read(|state| Some(state.volumes.get(key)?.size)) else { return Ok(()) };
    if let Some((from, to)) = file_of(sim, key, None).zip(file_of(sim, key, Some(name))) {
        on_files(move || contents::copy(&from, &to, size)).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.snapshots.push(Snapshot { name: name.to_owned(), size });
        }
    });
    Ok(())
}

/// Forgets a snapshot, whether it is there or not.
pub(super) async fn drop_snapshot(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.snapshots.retain(|other| other.name != name);
        }
    });
    match file_of(sim, key, Some(name)) {
        Some(file) => on_files(move || contents::remove(&file)).await.map(drop),
        None => Ok(()),
    }
}

/// Puts a volume back to what it held, and to the size it had, when the snapshot was taken.
pub(super) async fn roll_back(sim: &Sim, key: &VolumeKey, name: &str) -> Result<(), PveError> {
    let size = sim.read(|state| {
        let volume = state.volumes.get(key)?;
        Some(volume.snapshots.iter().find(|snapshot| snapshot.name == name)?.size)
    });
    let Some(size) = size else { return Ok(()) };
    if let Some((from, to)) = file_of(sim, key, Some(name)).zip(file_of(sim, key, None)) {
        on_files(move || contents::copy(&from, &to, size)).await?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.size = size;
        }
    });
    Ok(())
}
