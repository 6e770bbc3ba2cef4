//! Volumes as files: made sparse, grown, removed (pve-storage `Storage/Plugin.pm:alloc_image`, `free_image`,
//! `volume_resize`). Where the simulator keeps no contents, only the record changes.

use super::blocking;
use crate::sim::Sim;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{dirplugin, plugin};
use crate::sim::state::{Volume, VolumeKey};
use crate::sim::world::Kind;
use std::fs::{File, OpenOptions};
use std::path::Path;

/// Makes a sparse file, or leaves the one that is there.
pub(crate) fn make_image(path: &Path, size: u64) -> std::io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    match File::create_new(path) {
        Ok(file) => file.set_len(size),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a volume that is not there yet.
pub(super) async fn make(sim: &Sim, key: VolumeKey, size: u64, format: &'static str) -> Result<(), PveError> {
    let (path, size) = sim.read(|state| {
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
        Ok((path, size))
    })?;
    let image = sim.image_of(&key);
    if let Some(file) = image.clone() {
        blocking(move || make_image(&file, size))
            .await?
            .map_err(|error| PveError::die(format!("unable to create image: qemu-img: {path}: {error}")))?;
    }
    let ctime = sim.clock().now();
    sim.change(|state| {
        state.volumes.insert(key, Volume { size, ctime, format, image, snapshots: Vec::new() })
    });
    Ok(())
}

/// Removes a volume; returns whether there was one. A loop device keeps the contents as an open file would.
pub(super) async fn free(sim: &Sim, key: &VolumeKey) -> Result<bool, PveError> {
    let Some(volume) = sim.change(|state| state.volumes.remove(key)) else { return Ok(false) };
    if let Some(file) = volume.image {
        let removed = blocking(move || std::fs::remove_file(file)).await?;
        if let Err(error) = removed {
            tracing::warn!(volume = key.volid(), %error, "a volume's file was not there");
        }
    }
    Ok(true)
}

/// Grows a volume.
pub(super) async fn grow(sim: &Sim, key: &VolumeKey, size: u64) -> Result<(), PveError> {
    let image = sim.read(|state| state.volumes.get(key).and_then(|volume| volume.image.clone()));
    if let Some(file) = image {
        blocking(move || OpenOptions::new().write(true).open(file)?.set_len(size))
            .await?
            .map_err(|error| PveError::die(format!("qemu-img: {error}")))?;
    }
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(key) {
            volume.size = size;
        }
    });
    Ok(())
}
