//! `/nodes/N/storage` (pve-storage `API2/Storage/Status.pm`, `API2/Storage/Content.pm`).

use super::{blocking, volume, wait};
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::rules::{dirplugin, plugin};
use crate::sim::state::{State, Storage, Volume, VolumeKey};
use crate::sim::world::{self, Kind};
use serde_json::{Value, json};

fn space(state: &State, node: &str, id: &str, storage: &Storage) -> Value {
    let used = if storage.full { storage.total } else { state.used(node, id).min(storage.total) };
    let gone = state.unmounted.contains(id) && plugin::inactive(&storage.config).is_some();
    let active = storage.config.enabled && !gone;
    let (total, used) = if active { (storage.total, used) } else { (0, 0) };
    json!({
        "type": storage.config.kind.word(),
        "content": storage.config.content,
        "shared": u8::from(storage.config.shared),
        "enabled": u8::from(storage.config.enabled),
        "active": u8::from(active),
        "total": total,
        "used": used,
        "avail": total - used,
    })
}

/// `GET storage`: what the caller may see (`Status.pm:index`).
pub(super) async fn list(call: &Call) -> Result<Reply, PveError> {
    let sim = call.sim.clone();
    let call = call.clone();
    let entries = blocking(move || {
        sim.read(|state| {
            let wanted: Option<Vec<&str>> = call.get("content").map(|list| split_list(list).collect());
            let mut entries = Vec::new();
            for (id, storage) in &state.storages {
                let path = format!("/storage/{id}");
                let seen =
                    state.access.has(&call.user, &path, &["Datastore.Audit", "Datastore.AllocateSpace"])
                        && storage.config.is_on(call.node())
                        && call.get("target").is_none_or(|target| storage.config.is_on(target))
                        && call.get("storage").is_none_or(|only| only == id)
                        && (storage.config.enabled || !call.flag("enabled"))
                        && wanted.as_ref().is_none_or(|wanted| {
                            split_list(&storage.config.content).any(|content| wanted.contains(&content))
                        });
                if !seen {
                    continue;
                }
                let mut entry = space(state, call.node(), id, storage);
                entry["storage"] = json!(id);
                entry["used_fraction"] = match (entry["used"].as_f64(), entry["total"].as_f64()) {
                    (Some(used), Some(total)) if total > 0.0 => json!(used / total),
                    _ => json!(0),
                };
                entries.push(entry);
            }
            entries
        })
    })
    .await?;
    Ok(entries.into())
}

/// `GET storage/S/status` (`Status.pm:read_status`).
pub(super) fn status(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| {
        let id = call.text("storage");
        match state.storages.get(id) {
            Some(storage) if storage.config.is_on(call.node()) => {
                Ok(space(state, call.node(), id, storage).into())
            }
            // Not for this node: as if it were disabled.
            Some(storage) => {
                let mut entry = space(state, call.node(), id, storage);
                for key in ["enabled", "active", "total", "used", "avail"] {
                    entry[key] = json!(0);
                }
                Ok(entry.into())
            }
            None => Err(PveError::parameter("storage", "No such storage.")),
        }
    })
}

/// `GET storage/S/content`: volumes the caller may not use are left out without a word (`Content.pm:index`). Every
/// image costs a run of qemu-img.
pub(super) async fn content(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage");
    call.sim.read(|state| state.storage(call.node(), id).map(|_| ()))?;
    let owner = call.get("vmid").map(|_| call.vmid());
    let asked = call.get("content").is_none_or(|content| content == "images");
    let (scanned, entries) = call.sim.read(|state| {
        let mut scanned = 0;
        let mut entries = Vec::new();
        let storage = state.storages.get(id).map(|storage| &storage.config);
        // A storage that may not hold images is not looked at (`Storage.pm:volume_list`).
        for config in storage.into_iter().filter(|config| asked && config.has_content("images")) {
            for (key, found) in state.volumes_on(call.node(), config) {
                let Ok(name) = plugin::parse(config, &key.name) else { continue };
                if owner.is_some_and(|owner| owner != name.owner) {
                    continue;
                }
                scanned += u32::from(config.kind.is_directory());
                if state.access.check_volume(&call.user, id, name.owner, None).is_ok() {
                    entries.push(entry(config, &state.volid_through(id, key), key, found));
                }
            }
        }
        (scanned, entries)
    });
    call.sim.clock().spend_times(Cost::ListImage, scanned).await;
    Ok(entries.into())
}

/// A volume in a listing (`list_images` of the plugins).
fn entry(config: &world::Storage, volid: &str, key: &VolumeKey, found: &Volume) -> Value {
    let mut entry = json!({
        "volid": volid, "content": "images", "format": found.format, "size": found.size, "vmid": key.owner(),
    });
    match config.kind {
        Kind::Lvm | Kind::Lvmthin => entry["ctime"] = json!(found.ctime.to_string()),
        Kind::Zfspool | Kind::Rbd => {
            entry["name"] = json!(key.name);
            entry["parent"] = json!(found.parent);
        }
        Kind::Dir | Kind::Nfs | Kind::Cifs | Kind::Btrfs => {
            entry["ctime"] = json!(found.ctime);
            entry["used"] = json!(found.used());
            let file = key.name.rsplit('/').next().unwrap_or_default();
            entry["parent"] = match (found.snapshots.last(), &found.parent) {
                (Some(snapshot), _) if config.chains() => json!(format!("snap-{}-{file}", snapshot.name)),
                (_, Some(parent)) => json!(format!("../{parent}")),
                _ => Value::Null,
            };
        }
    }
    entry
}

/// `POST storage/S/content`: only `Datastore.AllocateSpace` is asked for, whoever owns the id (`Content.pm:create`).
pub(super) async fn alloc(call: &Call) -> Result<Reply, PveError> {
    let (node, id) = (call.node(), call.text("storage"));
    let (file, owner) = (call.text("filename"), call.vmid());
    let config = call.sim.read(|state| state.storage(node, id).map(|storage| storage.config.clone()))?;
    let shared = config.shared;
    // The end of a name says the format, whatever the storage makes of it.
    let ending =
        file.rsplit_once('.').map(|(_, end)| end).filter(|end| ["raw", "qcow2", "vmdk"].contains(end));
    if let (Some(ending), Some(format)) = (ending, call.get("format"))
        && ending != format
    {
        return Err(PveError::parameter(
            "format",
            format!("different storage formats ({format} != {ending})"),
        ));
    }
    let (name, format) = plugin::allocate(&config, owner, file, ending.or_else(|| call.get("format")))?;
    let size = dirplugin::alloc_bytes(call.text("size")).unwrap_or(u64::MAX);
    let key = call.sim.read(|state| state.resolve(node, &config, &name));
    let volid = format!("{id}:{name}");
    let _lock = super::storage_lock(&call.sim, node, (!shared).then_some(node), id, None).await?;
    call.sim.clock().spend(Cost::Alloc).await;
    volume::make(&call.sim, key, size, format).await?;
    Ok(json!(volid).into())
}

fn find(call: &Call) -> Result<VolumeKey, PveError> {
    let volid = dirplugin::full_volid(call.text("storage"), call.text("volume"))?;
    call.sim.read(|state| state.volume_key(call.node(), &volid))
}

/// `GET storage/S/content/V` (`Content.pm:info`): proves presence; the error of a missing one proves nothing.
pub(super) fn get(call: &Call) -> Result<Reply, PveError> {
    let key = find(call)?;
    call.sim.read(|state| {
        state.access.check_volume(&call.user, &key.storage, key.owner(), None)?;
        let config = state.config_of(&key)?;
        let found = state.volumes.get(&key).ok_or_else(|| plugin::unreadable(config, &key.name))?;
        if found.size == 0 && found.format != "subvol" {
            return Err(PveError::die(format!("volume '{}' has size zero", state.volid(&key))));
        }
        // LVM does not know (`LVMPlugin.pm:volume_size_info`).
        let used = if config.kind.is_lvm() && found.format == "raw" { 0 } else { found.used() };
        Ok(json!({
            "path": state.path_of(&key), "size": found.size, "used": used, "format": found.format,
        })
        .into())
    })
}

/// `DELETE storage/S/content/V`: a task, whoever uses the volume; a missing one is no error on a directory
/// (`Content.pm:delete`, `Storage.pm:vdisk_free`, `Plugin.pm:free_image`).
pub(super) async fn delete(call: &Call) -> Result<Reply, PveError> {
    let key = find(call)?;
    let storage = call.text("storage");
    call.check(&format!("/storage/{storage}"), &["Datastore.Allocate"])?;
    call.sim.read(|state| state.storage(call.node(), storage).map(|_| ()))?;
    let volid = dirplugin::full_volid(storage, call.text("volume"))?;
    let (sim, node) = (call.sim.clone(), call.node().to_owned());
    let id = format!("{}@{storage}", key.owner());
    let upid = call.sim.start_task(call.node(), "imgdel", &id, &call.user, move |log| async move {
        let _lock = super::storage_lock(&sim, &node, key.node.as_deref(), &key.storage, Some(&log)).await?;
        sim.clock().spend(Cost::Free).await;
        volume::remove(&sim, &key, &log).await?;
        log.line(format!("Removed volume '{volid}'"));
        Ok(())
    });
    if let Some(delay) = call.get("delay").and_then(|delay| delay.parse().ok()) {
        return match wait(call, &upid, delay).await {
            Some(status) if status == "OK" => Ok(Reply::null()),
            Some(status) => Err(PveError::die(status)),
            None => Ok(json!(upid).into()),
        };
    }
    Ok(json!(upid).into())
}

/// `GET storage/S` (`Status.pm:diridx`).
pub(super) fn index() -> Reply {
    let parts = [
        "content",
        "download-url",
        "file-restore",
        "identity",
        "import-metadata",
        "oci-registry-pull",
        "prunebackups",
        "rrd",
        "rrddata",
        "status",
        "upload",
    ];
    json!(parts.map(|part| json!({ "subdir": part }))).into()
}

/// `GET storage/S/identity`: none of the types modelled has one (`Plugin.pm:get_identity`).
pub(super) fn identity() -> PveError {
    PveError::die(
        "get_identity not implemented for this plugin at /usr/share/perl5/PVE/Storage/Plugin.pm line 2681.",
    )
}

/// `PUT storage/S/content/V` (`Content.pm:updateattributes`).
pub(super) fn attributes(call: &Call) -> Result<Reply, PveError> {
    find(call)?;
    Err(PveError::die("only backups can have notes"))
}

/// `POST storage/S/content/V`: a full copy under a free name, here or on another node; only root with a ticket may
/// (`Content.pm:copy`, `Storage.pm:storage_migrate`).
pub(super) fn copy(call: &Call) -> Result<Reply, PveError> {
    let source = find(call)?;
    let node = call.get("target_node").unwrap_or(call.node()).to_owned();
    let wanted = dirplugin::full_volid(call.text("storage"), call.text("target"))
        .unwrap_or_else(|_| call.text("target").to_owned());
    let target = call.sim.read(|state| state.volume_key(&node, &wanted))?;
    let (sim, from) = (call.sim.clone(), call.node().to_owned());
    let upid = call.sim.start_task(&from.clone(), "imgcopy", "", &call.user, move |log| async move {
        log.begin();
        let (size, format) = sim.read(|state| state.existing(&source).map(|volume| (volume.size, volume.format)))?;
        if sim.read(|state| state.volumes.contains_key(&target)) {
            let address = sim.read(|state| state.address(&node));
            return Err(PveError::die(format!(
                "command 'set -o pipefail && pvesm export {} {format}+size - -with-snapshots 0 | /usr/bin/ssh -e none \
                 -o 'BatchMode=yes' -o 'HostKeyAlias={node}' -o 'UserKnownHostsFile=/etc/pve/nodes/{node}/ssh_known_hosts' \
                 -o 'GlobalKnownHostsFile=none' root@{address} -- pvesm import {} {format}+size - -with-snapshots 0 \
                 -allow-rename 0' failed: exit code 255",
                source.volid(),
                target.volid()
            )));
        }
        volume::make(&sim, target.clone(), size, format).await?;
        volume::copy(&sim, &source, None, &target).await?;
        log.end();
        Ok(())
    });
    Ok(json!(upid).into())
}
