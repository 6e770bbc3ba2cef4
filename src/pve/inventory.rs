//! What the tools for operators read of storages: how they are configured, and everything that lies on them.

use http::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{
    ApiError,
    client::{Call, Client},
    wire,
};
use crate::types::{Bytes, NodeName, StorageId, VmId};

/// An entry of `storage.cfg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageConfig {
    /// The id.
    pub storage: StorageId,
    /// `dir`, `lvmthin`, `zfspool`, `rbd`, …
    pub plugin: String,
    /// What may lie on it: `images`, `iso`, …
    pub content: Vec<String>,
    /// The nodes that have it; empty means all.
    pub nodes: Vec<String>,
    /// Whether the entry says that every node sees the same volumes. Plugins such as `nfs` and `rbd` are shared without saying so.
    pub shared: bool,
    /// Whether it is switched off.
    pub disabled: bool,
    /// Whether its path must be a mount point.
    pub is_mountpoint: bool,
    /// The path of a directory.
    pub path: Option<String>,
}

impl StorageConfig {
    /// Whether disk images may lie on it.
    pub fn takes_images(&self) -> bool {
        self.content.iter().any(|content| content == "images")
    }
}

/// A volume in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentRow {
    /// The volid as Proxmox prints it.
    pub volid: String,
    /// Its size; listings may leave it out.
    pub size: Option<Bytes>,
    /// `raw`, `qcow2`, …
    pub format: String,
    /// The VM that Proxmox takes for its owner.
    pub owner: Option<VmId>,
}

#[derive(Deserialize)]
struct RawConfig {
    storage: String,
    #[serde(rename = "type")]
    plugin: String,
    #[serde(default)]
    content: String,
    #[serde(default)]
    nodes: String,
    #[serde(default, deserialize_with = "wire::flag")]
    shared: bool,
    #[serde(default, deserialize_with = "wire::flag")]
    disable: bool,
    // Proxmox writes `yes`, `1` or a path here.
    #[serde(default)]
    is_mountpoint: Option<Value>,
    #[serde(default)]
    path: Option<String>,
}

#[derive(Deserialize)]
struct RawContent {
    volid: String,
    #[serde(default, deserialize_with = "wire::optional_number")]
    size: Option<u64>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default, deserialize_with = "wire::optional_number")]
    vmid: Option<u64>,
}

fn words(list: &str) -> Vec<String> {
    list.split([',', ' ', ';']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn is_set(value: Option<&Value>) -> bool {
    value.and_then(wire::text).is_some_and(|text| !matches!(text.as_str(), "" | "0" | "no" | "off" | "false"))
}

impl Client {
    /// The storages that the token may see, as they are configured. Source: pve-storage `API2/Storage/Config.pm`, `index`; shown are
    /// those with `Datastore.Audit` or `Datastore.AllocateSpace`.
    pub async fn storage_configs(&self) -> Result<Vec<StorageConfig>, ApiError> {
        let rows: Vec<RawConfig> =
            self.call(Call::new("storage_configs", Method::GET, &[&"storage"])).await?;
        let read = |row: RawConfig| {
            Some(StorageConfig {
                storage: row.storage.parse().ok()?,
                plugin: row.plugin,
                content: words(&row.content),
                nodes: words(&row.nodes),
                shared: row.shared,
                disabled: row.disable,
                is_mountpoint: is_set(row.is_mountpoint.as_ref()),
                path: row.path,
            })
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    /// The images on a storage that the token may see, of one owner or of all. Slow, and it keeps one of the node's few workers busy:
    /// 500 raw files of a directory take 10 s. What the token may not use is left out without a word, so that a volume that is
    /// missing here is not thereby absent. Source: pve-storage `API2/Storage/Content.pm`, `index`.
    pub async fn contents(
        &self,
        node: &NodeName,
        storage: &StorageId,
        owner: Option<VmId>,
    ) -> Result<Vec<ContentRow>, ApiError> {
        let mut call = Call::new("contents", Method::GET, &[&"nodes", node, &"storage", storage, &"content"])
            .with("content", "images")
            .slow();
        if let Some(owner) = owner {
            call = call.with("vmid", owner);
        }
        let rows: Vec<RawContent> = self.call(call).await?;
        let read = |row: RawContent| ContentRow {
            volid: row.volid,
            size: row.size.map(Bytes::new),
            format: row.format.unwrap_or_default(),
            owner: row.vmid.and_then(|id| u32::try_from(id).ok()).and_then(VmId::new),
        };
        Ok(rows.into_iter().map(read).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_read_in_every_spelling() {
        for (value, expected) in [
            (serde_json::json!("1"), true),
            (serde_json::json!(1), true),
            (serde_json::json!("yes"), true),
            (serde_json::json!("/mnt/data"), true),
            (serde_json::json!(0), false),
            (serde_json::json!("no"), false),
        ] {
            assert_eq!(is_set(Some(&value)), expected, "{value}");
        }
        assert!(!is_set(None));
        assert_eq!(words("images,iso"), ["images", "iso"]);
    }
}
