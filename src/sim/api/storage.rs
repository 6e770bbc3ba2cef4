//! `/nodes/N/storage` (pve-storage `API2/Storage/Status.pm`, `API2/Storage/Content.pm`).

use super::{blocking, volume, wait};
use crate::sim::clock::Cost;
use crate::sim::http::{Call, Reply};
use crate::sim::rules::dirplugin::{self, parse_volname};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::state::{State, Storage, VolumeKey};
use serde_json::{Value, json};

fn space(state: &State, node: &str, id: &str, storage: &Storage) -> Value {
    let used = if storage.full { storage.total } else { state.used(node, id).min(storage.total) };
    let active = storage.config.enabled;
    let (total, used) = if active { (storage.total, used) } else { (0, 0) };
    json!({
        "type": "dir",
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
    Ok(json!(entries).into())
}

/// `GET storage/S/status` (`Status.pm:read_status`).
pub(super) fn status(call: &Call) -> Result<Reply, PveError> {
    call.sim.read(|state| {
        let id = call.text("storage");
        match state.storages.get(id) {
            Some(storage) if storage.config.is_on(call.node()) => {
                Ok(space(state, call.node(), id, storage).into())
            }
            _ => Err(PveError::parameter("storage", "No such storage.")),
        }
    })
}

/// `GET storage/S/content`: volumes the caller may not use are left out without a word (`Content.pm:index`). Every
/// image costs a run of qemu-img.
pub(super) async fn content(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage");
    call.sim.read(|state| state.storage(call.node(), id).map(|_| ()))?;
    let owner = call.get("vmid").map(|_| call.vmid());
    let images = call.get("content").is_none_or(|content| content == "images");
    let (scanned, entries) = call.sim.read(|state| {
        let mut scanned = 0;
        let mut entries = Vec::new();
        let here = state.volumes.iter().filter(|(key, _)| {
            key.storage == id && key.node.as_deref().is_none_or(|node| node == call.node())
        });
        for (key, found) in here.filter(|_| images) {
            let Ok(name) = parse_volname(&key.name) else { continue };
            if owner.is_some_and(|owner| owner != name.owner) {
                continue;
            }
            scanned += 1;
            if state.access.check_volume(&call.user, id, name.owner, None).is_ok() {
                entries.push(json!({
                    "volid": key.volid(), "content": "images", "format": found.format, "size": found.size,
                    "used": found.used(), "ctime": found.ctime, "vmid": name.owner, "parent": null,
                }));
            }
        }
        (scanned, entries)
    });
    call.sim.clock().spend_times(Cost::ListImage, scanned).await;
    Ok(json!(entries).into())
}

/// `POST storage/S/content`: only `Datastore.AllocateSpace` is asked for, whoever owns the id (`Content.pm:create`).
pub(super) async fn alloc(call: &Call) -> Result<Reply, PveError> {
    let (node, id) = (call.node(), call.text("storage"));
    let (file, owner) = (call.text("filename"), call.vmid());
    let shared = call.sim.read(|state| state.storage(node, id).map(|storage| storage.config.shared))?;
    if let Some((_, extension)) = file.rsplit_once('.')
        && let Some(format) = call.get("format")
        && ["raw", "qcow2", "vmdk", "subvol"].contains(&extension)
        && extension != format
    {
        return Err(PveError::parameter(
            "format",
            format!("different storage formats ({format} != {extension})"),
        ));
    }
    let format = dirplugin::parse_filename(file)?;
    let size = dirplugin::alloc_bytes(call.text("size")).unwrap_or(u64::MAX);
    let key = VolumeKey {
        storage: id.to_owned(),
        node: (!shared).then(|| node.to_owned()),
        name: format!("{owner}/{file}"),
    };
    let volid = key.volid();
    let _lock = call.sim.locks().storage((!shared).then_some(node), id).await?;
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
    let owner = parse_volname(&key.name)?.owner;
    call.sim.read(|state| {
        state.access.check_volume(&call.user, &key.storage, owner, None)?;
        let found = state.volumes.get(&key).ok_or_else(|| dirplugin::no_format(&key.volid()))?;
        Ok(json!({
            "path": state.path_of(&key), "size": found.size, "used": found.used(), "format": found.format,
        })
        .into())
    })
}

/// `DELETE storage/S/content/V`: a task, whoever uses the volume; a missing one is no error on a directory
/// (`Content.pm:delete`, `Storage.pm:vdisk_free`, `Plugin.pm:free_image`).
pub(super) async fn delete(call: &Call) -> Result<Reply, PveError> {
    let key = find(call)?;
    call.check(&format!("/storage/{}", key.storage), &["Datastore.Allocate"])?;
    call.sim.read(|state| state.storage(call.node(), &key.storage).map(|_| ()))?;
    let owner = parse_volname(&key.name)?.owner;
    let sim = call.sim.clone();
    let id = format!("{owner}@{}", key.storage);
    let upid = call.sim.start_task(call.node(), "imgdel", &id, &call.user, move |log| async move {
        let _lock = sim.locks().storage(key.node.as_deref(), &key.storage).await?;
        sim.clock().spend(Cost::Free).await;
        if !volume::free(&sim, &key).await? {
            let path = sim.read(|state| state.path_of(&key));
            log.line(format!("disk image '{path}' does not exist"));
        }
        log.line(format!("Removed volume '{}'", key.volid()));
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
