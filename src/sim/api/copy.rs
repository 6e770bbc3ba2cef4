//! Volumes made from volumes: full copies, linked clones, renames (qemu-server `QemuServer.pm:clone_disk`,
//! pve-storage `Storage.pm:vdisk_clone`, `rename_volume`). Contents are copied where they are kept.

use super::update::free_name;
use super::volume;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{drive, plugin};
use crate::sim::state::VolumeKey;
use crate::sim::tasks::TaskLog;
use crate::sim::world::Kind;

/// A size as the progress of a copy shows it (pve-common `Tools.pm:render_size`).
fn human(bytes: u64) -> String {
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter();
    let (mut whole, mut tenths, mut unit) = (bytes, 0, units.next().unwrap_or_default());
    while whole >= 1024 {
        tenths = (whole % 1024) * 10 / 1024;
        whole /= 1024;
        unit = units.next().unwrap_or("PiB");
    }
    format!("{whole}.{tenths} {unit}")
}

/// Where a copy goes.
pub(super) struct Target<'a> {
    pub(super) node: &'a str,
    pub(super) vmid: u32,
    pub(super) storage: &'a str,
    pub(super) format: Option<&'a str>,
}

/// The format a copy gets: the wanted one, or that of the source where the storage has it.
fn format_on(sim: &Sim, target: &Target<'_>, source: &str) -> Result<&'static str, PveError> {
    sim.read(|state| {
        let config = &state.storage(target.node, target.storage)?.config;
        let wanted = target.format.unwrap_or(source);
        let raw_only = matches!(config.kind, Kind::Btrfs) || (config.kind.is_lvm() && !config.chains());
        Ok(if wanted == "qcow2" && !raw_only { "qcow2" } else { "raw" })
    })
}

/// Copies a volume, or its snapshot, in full under the next free name of the VM.
pub(super) async fn full(
    sim: &Sim,
    source: &VolumeKey,
    snapshot: Option<&str>,
    target: &Target<'_>,
    log: &TaskLog,
) -> Result<VolumeKey, PveError> {
    let (size, format) =
        sim.read(|state| state.existing(source).map(|volume| (volume.size, volume.format)))?;
    let format = format_on(sim, target, format)?;
    let key = sim.read(|state| free_name(state, target.node, target.vmid, target.storage, format))?;
    {
        let _lock = sim.locks().storage(key.node.as_deref(), &key.storage).await?;
        sim.clock().spend(Cost::Alloc).await;
        volume::make(sim, key.clone(), size, format).await?;
    }
    let line = sim.read(|state| {
        Ok::<_, PveError>(plugin::made_lines(state.config_of(&key)?, &key.name, size, format))
    })?;
    log.lines(line);
    log.line(format!("allocated target volume '{}'", key.volid()));
    log.line(format!("transferred 0.0 B of {} (0.00%)", human(size)));
    volume::copy(sim, source, snapshot, &key).await?;
    log.line(format!("transferred {0} of {0} (100.00%)", human(size)));
    Ok(key)
}

/// Makes a volume that shares what it has with the source, a base volume or a snapshot. On btrfs a snapshot is not
/// looked at: the clone has what the volume has now (`BTRFSPlugin.pm:clone_image`, recorded as H-E3d-btr-data).
pub(super) async fn linked(
    sim: &Sim,
    source: &VolumeKey,
    snapshot: Option<&str>,
    node: &str,
    vmid: u32,
    log: &TaskLog,
) -> Result<VolumeKey, PveError> {
    let (size, format) =
        sim.read(|state| state.existing(source).map(|volume| (volume.size, volume.format)))?;
    let key = sim.read(|state| free_name(state, node, vmid, &source.storage, format))?;
    volume::make(sim, key.clone(), size, format).await?;
    let kind = sim.read(|state| state.config_of(&key).map(|config| config.kind))?;
    volume::copy(sim, source, snapshot.filter(|_| kind != Kind::Btrfs), &key).await?;
    if kind.is_lvm() {
        log.line(format!("  Logical volume \"{}\" created.", key.name));
    }
    Ok(key)
}

/// Gives a volume a new name on its storage.
pub(super) async fn rename(
    sim: &Sim,
    from: &VolumeKey,
    to: &VolumeKey,
    log: &TaskLog,
) -> Result<(), PveError> {
    volume::rename(sim, from, to).await?;
    let group = sim.read(|state| {
        state.config_of(to).map(|config| config.kind.is_lvm().then(|| config.volume_group().to_owned()))
    })?;
    log.lines(
        group.map(|group| {
            format!("  Renamed \"{}\" to \"{}\" in volume group \"{group}\"", from.name, to.name)
        }),
    );
    Ok(())
}

/// The drive on another volume, with that one's size.
pub(super) fn on_volume(sim: &Sim, drive: &drive::Drive, key: &VolumeKey) -> Result<drive::Drive, PveError> {
    let size = sim.read(|state| state.existing(key).map(|volume| volume.size))?;
    let mut drive = drive.clone();
    drive.file = key.volid();
    drive.options.remove("format");
    drive.options.insert("size".to_owned(), drive::format_size(size));
    Ok(drive)
}
