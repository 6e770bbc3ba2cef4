//! Who holds what: a sweep over the configs of a region's VMs.
//!
//! Proxmox lets one volume be plugged into two VMs without a word, so the driver looks before it plugs or deletes. What the sweep
//! could not read is never taken for an absence.

use futures_util::{StreamExt as _, stream};

use super::{
    Volumes,
    placement::{Place, SWEEP_WIDTH},
};
use crate::{
    pve::{
        ApiError, Client,
        cluster::{Resources, VmRow},
        qemu::{VmConfig, VmStatus},
    },
    types::{NodeName, VmId},
};

/// A VM that holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The VM.
    pub vmid: VmId,
    /// Its name.
    pub name: String,
    /// The PVE node its config is on.
    pub node: NodeName,
    /// How it holds the volume.
    pub hold: Hold,
}

/// How a VM holds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hold {
    /// In its config, in force or pending.
    Config {
        /// The key.
        key: String,
    },
    /// In the config of a snapshot: a rollback would plug it in again.
    Snapshot {
        /// The snapshot.
        snapshot: String,
    },
    /// Its QEMU has a drive that its config does not know: it may be any volume.
    Stray {
        /// The drive's key.
        key: String,
    },
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VM {} ({}) on node `{}`, ", self.vmid, self.name, self.node)?;
        match &self.hold {
            Hold::Config { key } => write!(f, "slot {key}"),
            Hold::Snapshot { snapshot } => write!(f, "snapshot `{snapshot}`"),
            Hold::Stray { key } => write!(f, "drive {key} of its QEMU, which its config does not know"),
        }
    }
}

/// Which ways to hold a volume are looked for, besides configs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// None.
    Configs,
    /// Drives of a running QEMU that its VM's config does not know.
    Qemu,
    /// Snapshots.
    Snapshots,
}

/// It can't be told who holds a volume.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A VM can't be read.
    #[error("cannot tell whether VM {vmid} on node `{node}` holds the volume")]
    Unreadable {
        /// The VM.
        vmid: VmId,
        /// Its node.
        node: NodeName,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The token may not see every VM.
    #[error(
        "the token may not see every VM, so that it can not be told who holds the volume; hint: grant VM.Audit on /vms ({gaps})"
    )]
    Hidden {
        /// The paths where the privilege lacks.
        gaps: String,
    },
    /// The token's privileges can't be read.
    #[error("cannot read the privileges of the token")]
    Permissions(#[source] ApiError),
}

impl Volumes {
    /// The VMs other than `except` that hold a volume. A volume on a local storage can only be held by VMs of its node.
    pub(super) async fn holders(
        &self,
        client: &Client,
        place: &Place,
        resources: &Resources,
        except: Option<VmId>,
        depth: Depth,
    ) -> Result<Vec<Holder>, SweepError> {
        let gaps = self.hidden_vms(&place.region).await.map_err(SweepError::Permissions)?;
        if let Some(gaps) = gaps {
            return Err(SweepError::Hidden { gaps });
        }
        let rows: Vec<VmRow> = resources
            .vms
            .iter()
            .filter(|row| {
                place.zone.as_ref().is_none_or(|zone| *zone == row.node) && Some(row.vmid) != except
            })
            .cloned()
            .collect();
        let mut looks = stream::iter(rows)
            .map(|row| async move {
                let found = look(client, place, &row, depth).await;
                found.map_err(|source| SweepError::Unreadable { vmid: row.vmid, node: row.node, source })
            })
            .buffered(SWEEP_WIDTH);
        let mut holders = Vec::new();
        while let Some(found) = looks.next().await {
            holders.extend(found?);
        }
        Ok(holders)
    }
}

async fn look(client: &Client, place: &Place, row: &VmRow, depth: Depth) -> Result<Vec<Holder>, ApiError> {
    let holder = |hold| Holder {
        vmid: row.vmid,
        name: row.name.clone().unwrap_or_else(|| "no name".to_owned()),
        node: row.node.clone(),
        hold,
    };
    let config = client.vm_config(&row.node, row.vmid).await?;
    let mut found: Vec<Holder> = config
        .holders_of(&place.volid)
        .map(|(key, _)| holder(Hold::Config { key: key.to_owned() }))
        .collect();
    match depth {
        Depth::Qemu if row.running => {
            let status = client.vm_status(&row.node, row.vmid).await?;
            if status.running && status.drives.is_none() {
                // A drive that the config does not know comes of edits by hand only, and there is no sign of one.
                tracing::warn!(vm = %row.vmid, node = %row.node, "qemu does not answer; its config is trusted");
            }
            found.extend(stray_drives(&config, &status).map(|key| holder(Hold::Stray { key })));
        }
        Depth::Configs | Depth::Qemu => {}
        Depth::Snapshots => {
            for snapshot in client.snapshots(&row.node, row.vmid).await? {
                if client.snapshot_references(&row.node, row.vmid, &snapshot, &place.volid).await? {
                    found.push(holder(Hold::Snapshot { snapshot }));
                }
            }
        }
    }
    Ok(found)
}

/// SCSI drives that QEMU has and the config does not know.
pub(super) fn stray_drives(config: &VmConfig, status: &VmStatus) -> impl Iterator<Item = String> {
    let known: Vec<&str> = config.current_drives().collect();
    let drives = status.drives.iter().flatten();
    drives
        .filter(|key| key.parse::<crate::types::ScsiSlot>().is_ok() && !known.contains(&key.as_str()))
        .cloned()
        .collect::<Vec<_>>()
        .into_iter()
}
