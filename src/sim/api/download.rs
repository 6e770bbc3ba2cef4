//! Files that come from a URL (pve-storage `API2/Storage/Status.pm:download_url`, pve-common
//! `Tools.pm:download_file_from_url`, pve-manager `API2/Nodes.pm:query_url_metadata`).
//!
//! Nothing is fetched: a file of 1 MiB is there, unless the fault `download` says another size or an error. A host name
//! that ends in `.invalid` resolves nowhere (RFC 2606). Checksums are believed.

use super::files::{endings_of, key_of, normalized};
use crate::sim::http::{Call, Reply};
use crate::sim::records::StorageFile;
use crate::sim::rules::error::PveError;
use serde_json::json;

/// Bytes of a file that no fault says anything of.
const SIZE: u64 = 1 << 20;

/// What the web says of a URL: how many bytes, or which status.
fn look_up(call: &Call, url: &str) -> Result<u64, String> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.split(['/', ':', '?']).next().unwrap_or_default();
    if host.ends_with(".invalid") {
        return Err(format!("500 Can't connect to {host}:443 (Name or service not known)"));
    }
    match call.sim.read(|state| state.faults.download_of(url)) {
        Some((_, Some(error))) => Err(error),
        Some((size, None)) => Ok(size.unwrap_or(SIZE)),
        None => Ok(SIZE),
    }
}

/// `GET query-url-metadata` (`API2/Nodes.pm:query_url_metadata`).
pub(super) fn metadata(call: &Call) -> Result<Reply, PveError> {
    let url = call.text("url");
    let size =
        look_up(call, url).map_err(|error| PveError::die(format!("invalid server response: '{error}'")))?;
    let name = url.split('?').next().and_then(|path| path.rsplit_once('/')).map(|(_, name)| name);
    let mut data = json!({ "size": size, "mimetype": "application/octet-stream" });
    if let Some(name) = name.filter(|name| !name.is_empty()) {
        data["filename"] = json!(name);
    }
    Ok(data.into())
}

/// `POST storage/S/download-url` (`API2/Storage/Status.pm:download_url`).
pub(super) fn download(call: &Call) -> Result<Reply, PveError> {
    let (id, content, url) = (call.text("storage"), call.text("content"), call.text("url"));
    let config =
        call.sim.read(|state| state.storage(call.node(), id).map(|storage| storage.config.clone()))?;
    if !config.kind.is_directory() {
        return Err(PveError::die(format!(
            "can't upload to storage type '{}', not a file based storage!",
            config.kind.word()
        )));
    }
    if !config.has_content(content) {
        return Err(PveError::die(format!("storage '{id}' is not configured for content-type '{content}'")));
    }
    let filename = normalized(call.text("filename"));
    if !endings_of(content).iter().any(|ending| filename.to_ascii_lowercase().ends_with(ending)) {
        let text =
            if content == "import" { "invalid filename or wrong extension" } else { "wrong file extension" };
        return Err(PveError::parameter("filename", text));
    }
    let key = key_of(call, &format!("{content}/{filename}"));
    let found = look_up(call, url);
    let path = format!("{}/template/{content}/{filename}", config.directory());
    let checked = call.get("checksum").is_some();
    let compressed = call.get("compression").is_some_and(|_| content != "iso");
    let (sim, url, what) = (call.sim.clone(), url.to_owned(), content.to_owned());
    let upid = call.sim.start_task(call.node(), "download", &filename, &call.user, move |log| async move {
        if compressed {
            return Err(PveError::die(format!("decompression not supported for {what}")));
        }
        log.line(format!("downloading {url} to {path}"));
        if sim.read(|state| state.files.iter().any(|file| file.key == key)) {
            if checked {
                log.line("calculating checksum of existing file...OK, got correct file already, no need to download");
                return Ok(());
            }
            return Err(PveError::die(format!("refusing to override existing file '{path}'")));
        }
        let size = found.map_err(|error| {
            log.line(error);
            PveError::die("download failed: exit code 8")
        })?;
        if checked {
            log.line("calculating checksum...OK, checksum verified");
        }
        let ctime = sim.clock().now();
        sim.change(|state| state.files.push(StorageFile { key, size, ctime }));
        log.line(format!("download of '{url}' to '{path}' finished"));
        Ok(())
    });
    Ok(json!(upid).into())
}
