//! Who holds what: the one question whose wrong answer costs data.
//!
//! Proxmox lets one volume be plugged into two VMs without a word, so the driver looks before it plugs or deletes. What could not be read is
//! never taken for an absence. [`Volumes::holders`] answers; [`super::sweep`] reads the VMs.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    Volumes,
    index::{Known, Seen},
    placement::Place,
    sweep::{Asked, Sight},
    vmerror::UnsettledCause,
};
use crate::{
    pve::ApiError,
    types::{NodeName, Region, VmId},
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
        /// Whether it may only read the volume.
        read_only: bool,
    },
    /// As `unusedN`: a reference that QEMU has nothing of, left by the deletion of a snapshot for instance.
    Unused {
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

impl Holder {
    /// What ends the hold.
    pub(super) fn hint(&self) -> String {
        let vmid = self.vmid;
        match &self.hold {
            Hold::Config { key, .. } => {
                format!("delete the pod that uses it, or detach it by hand (`qm set {vmid} --delete {key}`)")
            }
            Hold::Unused { key } => format!("the VM owns it; look at {key} of VM {vmid}"),
            Hold::Snapshot { snapshot } => {
                format!("delete the snapshot (`qm delsnapshot {vmid} {snapshot}`)")
            }
            Hold::Stray { .. } => {
                format!("look at it with `qm monitor {vmid}`, `info block`, or restart the VM")
            }
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VM {} ({}) on node `{}`, ", self.vmid, self.name, self.node)?;
        match &self.hold {
            Hold::Config { key, .. } => write!(f, "slot {key}"),
            Hold::Unused { key } => write!(f, "as {key}"),
            Hold::Snapshot { snapshot } => write!(f, "snapshot `{snapshot}`"),
            Hold::Stray { key } => write!(f, "drive {key} of its QEMU, which its config does not know"),
        }
    }
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
        source: Arc<ApiError>,
    },
    /// An earlier task may still be running.
    #[error("cannot tell whether earlier tasks of node `{node}` have ended")]
    Unsettled {
        /// The node.
        node: NodeName,
        /// Why.
        #[source]
        source: UnsettledCause,
    },
    /// The VMs can't be listed.
    #[error("cannot list the VMs that could hold the volume")]
    List(#[source] Arc<ApiError>),
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

/// How new an answer must be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Need {
    /// Seen after this question was asked.
    Fresh(Asked),
    /// Seen not long ago, where the volume is on a local storage: for an attach, behind which the VM itself is looked at. A positive answer
    /// is checked against the VM that it names.
    Recent,
}

impl Volumes {
    /// Asks now who holds a volume of a region.
    pub(super) fn ask(&self, region: &Region) -> Asked {
        self.inner.regions.get(region).map_or(Asked::NEVER, |region| region.sweeps.ask())
    }

    /// The VMs other than `except` that hold a volume.
    ///
    /// A volume on a local storage is held by VMs of its node, and by those elsewhere whose drive has its very WWN: a failover moves
    /// configs, not disks.
    pub(super) async fn holders(
        &self,
        place: &Place,
        except: Option<VmId>,
        need: Need,
    ) -> Result<Vec<Holder>, SweepError> {
        // Callers have found the place in the region, so that it is configured.
        let Some(region) = self.inner.regions.get(&place.region) else { return Ok(Vec::new()) };
        let (asked, zone) = match (need, &place.zone) {
            (Need::Fresh(asked), _) => (asked, None),
            (Need::Recent, None) => (region.sweeps.ask(), None),
            (Need::Recent, Some(zone)) => (region.sweeps.ask(), Some(zone)),
        };
        let Some(zone) = zone else {
            return holders_in(region.sweeps.after(region, asked).await?, place, except);
        };
        let found = holders_in(region.sweeps.recent(region, zone).await?, place, except)?;
        let named: BTreeSet<VmId> = found.iter().map(|holder| holder.vmid).collect();
        if named.is_empty() {
            return Ok(found);
        }
        for vmid in named {
            region.sweeps.again(region, vmid).await?;
        }
        holders_in(region.sweeps.recent(region, zone).await?, place, except)
    }
}

fn holders_in(sight: Sight, place: &Place, except: Option<VmId>) -> Result<Vec<Holder>, SweepError> {
    if let Some(gaps) = sight.gaps {
        return Err(SweepError::Hidden { gaps });
    }
    let volid = place.volid.to_string();
    let wwn = place.wwn().to_string();
    let mut holders = Vec::new();
    for (vmid, known) in sight.vms.into_iter().filter(|(vmid, _)| Some(*vmid) != except) {
        let Known { node, name, seen, .. } = known;
        let here = place.zone.as_ref().is_none_or(|zone| *zone == node);
        let holds = match seen {
            Ok(seen) => Seen::holds(&seen, &volid, if here { None } else { Some(&wwn) }),
            Err(_) if !here => continue,
            Err(source) => return Err(SweepError::Unreadable { vmid, node, source }),
        };
        holders.extend(holds.into_iter().map(|hold| Holder {
            vmid,
            name: name.clone(),
            node: node.clone(),
            hold,
        }));
    }
    Ok(holders)
}
