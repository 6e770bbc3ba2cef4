//! `/storage`: the entries of `storage.cfg` (pve-storage `API2/Storage/Config.pm`).

use crate::sim::http::{Call, Reply};
use crate::sim::rules::error::PveError;
use crate::sim::rules::schema::{Params, split_list};
use crate::sim::state::{State, Storage};
use crate::sim::world::{self, Kind};
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use std::fmt::Write as _;

/// Keys that come back as numbers (`SectionConfig.pm:check_value` leaves what the schema calls boolean an integer,
/// `is_mountpoint` is a string).
const NUMBERS: &[&str] = &["snapshot-as-volume-chain", "sparse", "krbd", "saferemove", "mkdir"];

/// SHA-1 over all entries, as over the file.
fn digest(state: &State) -> String {
    let mut text = String::new();
    for storage in state.storages.values() {
        let _ = writeln!(text, "{:?}", storage.config);
    }
    Sha1::digest(text).iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// One entry with the keys it has in the file.
fn entry(id: &str, config: &world::Storage, digest: &str) -> Value {
    let mut entry =
        json!({ "storage": id, "type": config.kind.word(), "content": config.content, "digest": digest });
    if config.kind.is_directory() {
        entry["path"] = json!(config.directory());
    }
    if config.shared {
        entry["shared"] = json!(1);
    }
    if !config.nodes.is_empty() {
        entry["nodes"] = json!(config.nodes.join(","));
    }
    if !config.enabled {
        entry["disable"] = json!(1);
    }
    if config.is_mountpoint {
        entry["is_mountpoint"] = json!("1");
    }
    for (key, value) in &config.properties {
        entry[key] = match value.parse::<i64>() {
            Ok(number) if NUMBERS.contains(&key.as_str()) => json!(number),
            _ => json!(value),
        };
    }
    entry
}

/// `GET /storage`: what the caller may see (`Config.pm:index`).
pub(super) fn list(call: &Call) -> Reply {
    let entries: Vec<Value> = call.sim.read(|state| {
        let digest = digest(state);
        let seen = |id: &str| {
            let any = &["Datastore.Audit", "Datastore.AllocateSpace"];
            state.access.has(&call.user, &format!("/storage/{id}"), any)
        };
        state
            .storages
            .iter()
            .filter(|(id, storage)| {
                seen(id) && call.get("type").is_none_or(|kind| kind == storage.config.kind.word())
            })
            .map(|(id, storage)| entry(id, &storage.config, &digest))
            .collect()
    });
    entries.into()
}

/// `GET /storage/{id}` (`Config.pm:read`).
pub(super) fn get(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage");
    call.sim.read(|state| {
        let storage = state.storages.get(id).ok_or_else(|| unknown(id))?;
        Ok(entry(id, &storage.config, &digest(state)).into())
    })
}

fn unknown(id: &str) -> PveError {
    PveError::die(format!("storage '{id}' does not exist"))
}

/// Puts the keys of a call into an entry; PVE's `disable` is the opposite of our `enabled`.
fn apply(config: &mut world::Storage, params: &Params) {
    let flag = |value: &str| matches!(value, "1" | "on" | "yes" | "true");
    for (key, value) in params {
        match key.as_str() {
            "storage" | "type" | "digest" | "delete" => {}
            "disable" => config.enabled = !flag(value),
            "nodes" => config.nodes = split_list(value).map(str::to_owned).collect(),
            "shared" => config.shared = flag(value),
            "content" => config.content.clone_from(value),
            "path" => config.path = Some(value.clone()),
            "is_mountpoint" => config.is_mountpoint = flag(value) || value.starts_with('/'),
            _ => drop(config.properties.insert(key.clone(), value.clone())),
        }
    }
    for key in params.get("delete").map(String::as_str).into_iter().flat_map(split_list) {
        match key {
            "disable" => config.enabled = true,
            "nodes" => config.nodes.clear(),
            "shared" => config.shared = false,
            "is_mountpoint" => config.is_mountpoint = false,
            _ => drop(config.properties.remove(key)),
        }
    }
}

/// `POST /storage` (`Config.pm:create`).
pub(super) fn create(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage").to_owned();
    let kind = Kind::from_word(call.text("type")).ok_or_else(|| {
        PveError::NotImplemented(format!("storages of type '{}' are not modelled", call.text("type")))
    })?;
    call.sim.change(|state| {
        if state.storages.contains_key(&id) {
            return Err(PveError::die(format!("create storage failed: storage ID '{id}' already defined")));
        }
        let mut config = world::Storage {
            id: id.clone(),
            kind,
            enabled: true,
            content: "images".to_owned(),
            ..world::Storage::default()
        };
        apply(&mut config, &call.params);
        config.shared |= kind.is_always_shared();
        // `options` of the plugins: what an entry cannot be without.
        let needed: &[&str] = match kind {
            Kind::Zfspool => &["pool"],
            Kind::Lvm => &["vgname"],
            Kind::Lvmthin => &["vgname", "thinpool"],
            _ => &[],
        };
        if let Some(missing) = needed.iter().find(|key| !config.properties.contains_key(**key)) {
            return Err(PveError::parameter(*missing, "property is missing and it is not optional"));
        }
        let total = state.storages.values().map(|storage| storage.total).next().unwrap_or(1 << 30);
        state.storages.insert(id.clone(), Storage { config, total, full: false });
        state.sums.forget();
        Ok(json!({ "storage": id, "type": kind.word() }).into())
    })
}

/// `PUT /storage/{id}` (`Config.pm:update`).
pub(super) fn update(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage");
    call.sim.change(|state| {
        if call.get("digest").is_some_and(|wanted| wanted != digest(state)) {
            return Err(PveError::die(
                "update storage failed: detected modified configuration - file changed by other user? Try again.",
            ));
        }
        let storage = state
            .storages
            .get_mut(id)
            .ok_or_else(|| PveError::die(format!("update storage failed: storage '{id}' does not exist")))?;
        apply(&mut storage.config, &call.params);
        state.sums.forget();
        Ok(json!({ "storage": id, "type": storage.config.kind.word() }).into())
    })
}

/// `DELETE /storage/{id}` (`Config.pm:delete`): the entry goes, what it holds stays where it is.
pub(super) fn delete(call: &Call) -> Result<Reply, PveError> {
    let id = call.text("storage");
    call.sim.change(|state| match state.storages.remove(id) {
        Some(_) => {
            state.sums.forget();
            Ok(Reply::null())
        }
        None => Err(PveError::die(format!("delete storage failed: storage '{id}' does not exist"))),
    })
}
