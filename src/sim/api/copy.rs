//! Volumes made from volumes: full copies, linked clones, renames (qemu-server `QemuServer.pm:clone_disk`,
//! pve-storage `Storage.pm:vdisk_clone`, `rename_volume`). Contents are copied where they are kept.

use super::disks::free_name;
use super::volume;
use crate::sim::Sim;
use crate::sim::clock::Cost;
use crate::sim::rules::error::PveError;
use crate::sim::rules::{drive, plugin};
use crate::sim::state::{Snapshot, VolumeKey};
use crate::sim::tasks::TaskLog;
use crate::sim::world::Kind;

/// A size as the progress of a copy shows it (pve-common `Format.pm:render_bytes`).
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

/// The format a copy gets: the wanted one or that of the source where the storage has it, its default else
/// (qemu-server `QemuServer.pm:resolve_dst_disk_format`, `Storage.pm:resolve_format_hint`).
fn format_on(sim: &Sim, target: &Target<'_>, source: &str) -> Result<&'static str, PveError> {
    sim.read(|state| {
        let config = &state.storage(target.node, target.storage)?.config;
        let wanted = target.format.unwrap_or(source);
        let found = plugin::formats(config).iter().copied().find(|format| *format == wanted);
        Ok(found.unwrap_or_else(|| plugin::default_format(config)))
    })
}

/// Copies a volume, or its snapshot, in full under the next free name of the VM (qemu-server
/// `QemuServer.pm:clone_disk`).
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
    let (size, kind, format) = sim.read(|state| {
        let volume = state.existing(source)?;
        let config = state.config_of(source)?;
        // The clone of a file is a qcow2 image that has it behind it.
        let file = config.kind.is_directory() && config.kind != Kind::Btrfs;
        Ok::<_, PveError>((volume.size, config.kind, if file { "qcow2" } else { volume.format }))
    })?;
    let key = sim.read(|state| free_name(state, node, vmid, &source.storage, format))?;
    let stands_on = snapshot.unwrap_or("__base__");
    let parent = match kind {
        Kind::Dir | Kind::Nfs | Kind::Cifs => Some(source.name.clone()),
        Kind::Zfspool | Kind::Rbd => Some(format!("{}@{stands_on}", source.name)),
        Kind::Btrfs | Kind::Lvm | Kind::Lvmthin => None,
    };
    volume::make(sim, key.clone(), size, format).await?;
    sim.change(|state| {
        if let Some(volume) = state.volumes.get_mut(&key) {
            volume.parent = parent;
        }
    });
    volume::copy(sim, source, snapshot.filter(|_| kind != Kind::Btrfs), &key).await?;
    match kind {
        Kind::Lvm | Kind::Lvmthin => log.line(format!("  Logical volume \"{}\" created.", key.name)),
        Kind::Rbd => {
            log.line(format!("clone {}: {} snapname {stands_on} to {}", source.name, source.name, key.name));
        }
        Kind::Dir | Kind::Nfs | Kind::Cifs => {
            let file = key.name.rsplit('/').next().unwrap_or_default();
            log.line(format!(
                "clone {}: images, {file}, {vmid} to {file} (base=../{})",
                source.name, source.name
            ));
        }
        Kind::Btrfs | Kind::Zfspool => {}
    }
    Ok(key)
}

/// Gives a volume a new name on its storage (pve-storage `Storage.pm:rename_volume`).
pub(super) async fn rename(
    sim: &Sim,
    from: &VolumeKey,
    to: &VolumeKey,
    log: &TaskLog,
) -> Result<(), PveError> {
    volume::rename(sim, from, to).await?;
    log.lines(sim.read(|state| {
        Ok::<_, PveError>(plugin::renamed_lines(state.config_of(to)?, &from.name, &to.name))
    })?);
    Ok(())
}

/// Makes a template's disk of a volume and returns the drive on it (pve-storage `Storage.pm:vdisk_create_base`).
pub(super) async fn make_base(
    sim: &Sim,
    node: &str,
    drive: &drive::Drive,
    log: &TaskLog,
) -> Result<drive::Drive, PveError> {
    let from = sim.read(|state| state.volume_key(node, &drive.file))?;
    let to = VolumeKey { name: plugin::base_name(&from.name), ..from.clone() };
    if from != to {
        rename(sim, &from, &to, log).await?;
    }
    let file = sim.change(|state| {
        let kind = state.config_of(&to)?.kind;
        let volume = state.volumes.get_mut(&to);
        // Clones of it stand on a snapshot; what it holds does not change any more.
        if let (Kind::Zfspool | Kind::Rbd, Some(volume)) = (kind, volume) {
            let snapshot = Snapshot { name: "__base__".to_owned(), size: volume.size, used: 0 };
            volume.snapshots.push(snapshot);
        }
        Ok::<_, PveError>(state.volid(&to))
    })?;
    Ok(drive::Drive { file, ..drive.clone() })
}

/// The drive on another volume, with that one's size.
pub(super) fn on_volume(sim: &Sim, drive: &drive::Drive, key: &VolumeKey) -> Result<drive::Drive, PveError> {
    let (size, file) = sim.read(|state| state.existing(key).map(|volume| (volume.size, state.volid(key))))?;
    let mut drive = drive.clone();
    drive.file = file;
    drive.options.remove("format");
    drive.options.insert("size".to_owned(), drive::format_size(size));
    Ok(drive)
}
