//! Storages and the volumes on them.

use http::Method;
use serde::Deserialize;

use super::{
    ApiError,
    client::{Call, Client},
    limits::Class,
    wire,
};
use crate::types::{Bytes, NodeName, StorageId, Upid, VmId, VolId, VolumeName};

/// A volume that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its size.
    pub size: Bytes,
}

/// The state of a storage on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageStatus {
    /// Enabled in the configuration, and allowed on the node.
    pub enabled: bool,
    /// Mounted, imported, connected.
    pub active: bool,
}

#[derive(Deserialize)]
struct RawVolume {
    #[serde(deserialize_with = "wire::number")]
    size: u64,
}

#[derive(Deserialize)]
struct RawStatus {
    #[serde(default, deserialize_with = "wire::flag")]
    enabled: bool,
    #[serde(default, deserialize_with = "wire::flag")]
    active: bool,
}

#[derive(Deserialize)]
struct RawContent {
    volid: String,
    /// Absent on storages that know it only by a look at each volume.
    #[serde(default, deserialize_with = "wire::optional_number")]
    size: Option<u64>,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(rename = "type")]
    plugin: String,
    #[serde(default, deserialize_with = "wire::flag")]
    is_mountpoint: bool,
}

impl Client {
    /// Allocates a volume and returns the volid that Proxmox gave it. Synchronous in Proxmox.
    /// Source: pve-storage `API2/Storage/Content.pm`, `create`. Needs `Datastore.AllocateSpace` on the storage.
    pub async fn allocate(
        &self,
        node: &NodeName,
        storage: &StorageId,
        owner: VmId,
        filename: &str,
        size_kib: u64,
    ) -> Result<VolId, ApiError> {
        let call = Call::new("allocate", Method::POST, &[&"nodes", node, &"storage", storage, &"content"])
            .with("vmid", owner)
            .with("filename", filename)
            .with("size", size_kib)
            .slow();
        let request = call_name(node, storage);
        let volid: String = self.call(call).await?;
        volid.parse().map_err(|error| unreadable(&request, &error))
    }

    /// Deletes a volume. Source: pve-storage `API2/Storage/Content.pm`, `delete`. Needs `Datastore.Allocate` on the storage.
    /// Proxmox checks neither VM configs nor snapshots.
    pub async fn delete_volume(&self, node: &NodeName, volid: &VolId) -> Result<Upid, ApiError> {
        let call = Call::new(
            "delete_volume",
            Method::DELETE,
            &[&"nodes", node, &"storage", &volid.storage, &"content", volid],
        );
        self.start(call, &call_name(node, &volid.storage)).await
    }

    /// A volume that is there. An error never proves that it is not (facts: pve-storage `Storage.pm:volume_size_info`).
    pub async fn volume(&self, node: &NodeName, volid: &VolId) -> Result<VolumeInfo, ApiError> {
        let call = Call::new(
            "volume",
            Method::GET,
            &[&"nodes", node, &"storage", &volid.storage, &"content", volid],
        )
        .class(Class::Slow);
        let raw: RawVolume = self.call(call).await?;
        Ok(VolumeInfo { size: Bytes::new(raw.size) })
    }

    /// The volids on a storage that the token may see. Slow: for a proof of absence only, never on the path of an operation.
    pub async fn list_volumes(&self, node: &NodeName, storage: &StorageId) -> Result<Vec<String>, ApiError> {
        let call =
            Call::new("list_volumes", Method::GET, &[&"nodes", node, &"storage", storage, &"content"]).slow();
        let rows: Vec<RawContent> = self.call(call).await?;
        Ok(rows.into_iter().map(|row| row.volid).collect())
    }

    /// The volumes on a storage that belong to a VMID and that the token may see, with their sizes (zero where the storage tells none). Slow, as above.
    /// Volids that can't be handles are left out.
    pub async fn list_owned(
        &self,
        node: &NodeName,
        storage: &StorageId,
        owner: VmId,
    ) -> Result<Vec<(VolumeName, Bytes)>, ApiError> {
        let call = Call::new("list_volumes", Method::GET, &[&"nodes", node, &"storage", storage, &"content"])
            .with("content", "images")
            .with("vmid", owner)
            .slow();
        let rows: Vec<RawContent> = self.call(call).await?;
        let read = |row: RawContent| {
            let volid: VolId = row.volid.parse().ok()?;
            (volid.storage == *storage).then(|| (volid.name, Bytes::new(row.size.unwrap_or_default())))
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    /// The state of a storage on a node.
    pub async fn storage_status(
        &self,
        node: &NodeName,
        storage: &StorageId,
    ) -> Result<StorageStatus, ApiError> {
        let call =
            Call::new("storage_status", Method::GET, &[&"nodes", node, &"storage", storage, &"status"])
                .class(Class::Slow);
        let raw: RawStatus = self.call(call).await?;
        Ok(StorageStatus { enabled: raw.enabled, active: raw.active })
    }

    /// Whether the storage notices when what it lists is not there: all plugins but a plain directory do, which Proxmox
    /// makes anew when its path has vanished. Needs `Datastore.Allocate` on the storage.
    pub async fn storage_notices_loss(&self, storage: &StorageId) -> Result<bool, ApiError> {
        let call = Call::new("storage_config", Method::GET, &[&"storage", storage]);
        let raw: RawConfig = self.call(call).await?;
        Ok(raw.plugin != "dir" || raw.is_mountpoint)
    }
}

fn call_name(node: &NodeName, storage: &StorageId) -> String {
    format!("storage `{storage}` on node `{node}`")
}

fn unreadable(request: &str, error: &crate::types::ParseError) -> ApiError {
    ApiError::unreadable(request, &error.to_string())
}
