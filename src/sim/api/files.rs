//! What is no disk image on a storage: ISO images, container templates, files to import. They are uploaded, listed,
//! given to CD-ROM drives and removed (pve-storage `API2/Storage/Status.pm:upload`, `API2/Storage/Content.pm`).

use crate::sim::Sim;
use crate::sim::http::{Call, Reply};
use crate::sim::records::StorageFile;
use crate::sim::rules::drive::{Drive, format_size};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::split_list;
use crate::sim::state::VolumeKey;
use serde_json::{Value, json};

/// Content types that are files of their own directory, and the endings of their names (`Storage.pm:$ISO_EXT_RE_0`,
/// `$VZTMPL_EXT_RE_1`, `$UPLOAD_IMPORT_EXT_RE_1`).
const TYPES: &[(&str, &[&str])] = &[
    ("iso", &[".iso", ".img"]),
    ("vztmpl", &[".tar", ".tar.gz", ".tar.xz", ".tar.zst", ".tar.bz2"]),
    ("import", &[".ova", ".qcow2", ".raw", ".vmdk"]),
    ("snippets", &[]),
];

/// Whether the name of a volume is that of such a file (`Storage/Plugin.pm:parse_volname`).
pub(super) fn is_file(name: &str) -> bool {
    name.split_once('/').is_some_and(|(kind, rest)| {
        !rest.is_empty() && !rest.contains('/') && TYPES.iter().any(|(known, _)| *known == kind)
    })
}

/// The content type of a volume, by its name (`Storage.pm:parse_volname`).
pub(super) fn content_of(name: &str) -> &str {
    if is_file(name) { name.split('/').next().unwrap_or_default() } else { "images" }
}

/// The endings that files of a content type have (`API2/Storage/Status.pm:upload`).
pub(super) fn endings_of(content: &str) -> &'static [&'static str] {
    TYPES.iter().find(|(kind, _)| *kind == content).map_or(&[], |(_, endings)| *endings)
}

/// The name that a file gets (`Storage.pm:normalize_content_filename`).
pub(super) fn normalized(name: &str) -> String {
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let fits = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    name.chars().map(|c| if fits(c) { c } else { '_' }).collect()
}

pub(super) fn key_of(call: &Call, name: &str) -> VolumeKey {
    let id = call.text("storage");
    let shared = call.sim.read(|state| state.storages.get(id).is_some_and(|storage| storage.config.shared));
    VolumeKey {
        storage: id.to_owned(),
        node: (!shared).then(|| call.node().to_owned()),
        name: name.to_owned(),
    }
}

/// The name of the file that a call is about, if it is about one.
pub(super) fn named(call: &Call) -> Option<String> {
    let volume = call.text("volume");
    let name = volume.split_once(':').map_or(volume, |(_, name)| name);
    is_file(name).then(|| name.to_owned())
}

/// `POST storage/S/upload`. A file of the same name is overwritten (`API2/Storage/Status.pm:upload`).
pub(super) fn upload(call: &Call) -> Result<Reply, PveError> {
    let (id, content) = (call.text("storage"), call.text("content"));
    let config =
        call.sim.read(|state| state.storage(call.node(), id).map(|storage| storage.config.clone()))?;
    if config.kind.is_lvm() {
        return Err(PveError::die(format!("can't upload to storage type '{}'", config.kind.word())));
    }
    let size = call.upload.ok_or_else(|| PveError::die("missing temporary file name"))?;
    let filename = normalized(call.text("filename"));
    if !endings_of(content).iter().any(|ending| filename.to_ascii_lowercase().ends_with(ending)) {
        return Err(PveError::parameter("filename", "wrong file extension"));
    }
    if !split_list(&config.content).any(|kind| kind == content) {
        return Err(PveError::die(format!("storage '{id}' does not support '{content}' content")));
    }
    let key = key_of(call, &format!("{content}/{filename}"));
    let (sim, node) = (call.sim.clone(), call.node().to_owned());
    let directory = format!("{}/template/{content}/{filename}", config.directory());
    let upid = call.sim.start_task(call.node(), "imgcopy", "", &call.user, move |log| async move {
        let temporary = "/var/tmp/pveupload-0123456789abcdef";
        log.line(format!("starting file import from: {temporary}"));
        log.line(format!("target node: {node}"));
        log.line(format!("target file: {directory}"));
        log.line(format!("file size is: {size}"));
        log.line(format!("command: cp -- {temporary} {directory}"));
        let ctime = sim.clock().now();
        sim.change(|state| {
            state.files.retain(|file| file.key != key);
            state.files.push(StorageFile { key, size, ctime });
        });
        log.line("finished file import successfully");
        Ok(())
    });
    Ok(json!(upid).into())
}

/// The files in a listing of a storage, those of one content type where it is asked for (`Storage.pm:volume_list`,
/// `template_list`).
pub(super) fn list(call: &Call) -> Vec<Value> {
    let id = call.text("storage");
    let any = &["Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];
    if call.get("vmid").is_some() || !call.may(&format!("/storage/{id}"), any) {
        return Vec::new();
    }
    call.sim.read(|state| {
        let here = state.files.iter().filter(|file| {
            file.key.storage == id && file.key.node.as_deref().is_none_or(|node| node == call.node())
        });
        here.filter_map(|file| {
            let (content, name) = file.key.name.split_once('/')?;
            call.get("content").is_none_or(|wanted| wanted == content).then(|| {
                let format =
                    if content == "iso" { "iso" } else { name.rsplit('.').next().unwrap_or_default() };
                json!({
                    "volid": file.key.volid(), "content": content, "format": format, "size": file.size,
                    "ctime": file.ctime,
                })
            })
        })
        .collect()
    })
}

/// `GET storage/S/content/V` of a file (`API2/Storage/Content.pm:info`).
pub(super) fn get(call: &Call, name: &str) -> Result<Reply, PveError> {
    let key = key_of(call, name);
    let any = &["Datastore.Allocate", "Datastore.AllocateSpace", "Datastore.Audit"];
    call.check(&format!("/storage/{}", key.storage), any)?;
    call.sim.read(|state| {
        let directory = state.config_of(&key)?.directory();
        let path = format!("{directory}/template/{name}");
        let file = state.files.iter().find(|file| file.key == key).ok_or_else(|| {
            PveError::die(format!("volume_size_info on '{}' failed - no format", key.volid()))
        })?;
        Ok(json!({ "path": path, "size": file.size, "used": file.size, "format": "raw" }).into())
    })
}

/// `DELETE storage/S/content/V` of a file; one that is not there is no error (`API2/Storage/Content.pm:delete`).
pub(super) fn delete(call: &Call, name: &str) -> Result<Reply, PveError> {
    let key = key_of(call, name);
    call.check(&format!("/storage/{}", key.storage), &["Datastore.Allocate"])?;
    call.sim.read(|state| state.storage(call.node(), &key.storage).map(|_| ()))?;
    let sim = call.sim.clone();
    let id = key.storage.clone();
    let upid = call.sim.start_task(call.node(), "imgdel", &id, &call.user, move |log| async move {
        sim.change(|state| state.files.retain(|file| file.key != key));
        log.line(format!("Removed volume '{}'", key.volid()));
        Ok(())
    });
    Ok(json!(upid).into())
}

/// Refuses who may not use the file that a drive names (`Storage.pm:check_volume_access`).
pub(super) fn check_access(call: &Call, file: &str) -> Result<(), PveError> {
    let path = format!("/storage/{}", file.split(':').next().unwrap_or_default());
    if call.may(&path, &["Datastore.Allocate"]) {
        return Ok(());
    }
    call.check(&path, &["Datastore.AllocateSpace", "Datastore.Audit"])
}

/// A CD-ROM drive with the size of the file in it, which must be there (qemu-server `API2/Qemu.pm:create_disks`).
pub(super) fn with_size(sim: &Sim, node: &str, mut drive: Drive) -> Result<Drive, PveError> {
    if drive.volume().is_none_or(|(_, name)| !is_file(name)) {
        drive.options.remove("size");
        return Ok(drive);
    }
    let size = sim.read(|state| {
        check_there(state, node, &drive.file)?;
        let here = |file: &&StorageFile| {
            file.key.volid() == drive.file && file.key.node.as_deref().is_none_or(|of| of == node)
        };
        Ok(state.files.iter().find(here).map_or(0, |file| file.size))
    })?;
    drive.options.insert("size".to_owned(), format_size(size));
    Ok(drive)
}

/// Whether the file that a CD-ROM drive names is there, as a start needs it (qemu-server
/// `QemuServer.pm:vm_start_nolock`, pve-storage `Storage.pm:activate_volumes`).
pub(super) fn check_there(state: &crate::sim::state::State, node: &str, file: &str) -> Result<(), PveError> {
    let Some((id, name)) = file.split_once(':').filter(|(_, name)| is_file(name)) else { return Ok(()) };
    state.storage(node, id)?;
    let here = |file: &StorageFile| {
        file.key.storage == id
            && file.key.name == name
            && file.key.node.as_deref().is_none_or(|of| of == node)
    };
    if state.files.iter().any(here) {
        return Ok(());
    }
    Err(PveError::die(format!("volume '{file}' does not exist")))
}
