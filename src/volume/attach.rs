//! Attach: a volume is plugged into the VM of a node, and QEMU has it.
//!
//! [`plan`] is the whole decision, over what was read; [`Volumes::attach`] carries out its steps one at a time and reads again
//! after each, so that its answer is what was seen last and never what was hoped for.

use super::{
    Dated, Volumes,
    attachments::{Hold, Holder, Need, SweepError},
    delete::PresenceError,
    index::stray_drives,
    placement::{LocateError, Machine, Place, PlaceError, place},
    step::{Carried, Step},
    vmerror::VmError,
    vmqueue::Turn,
};
use crate::{
    pve::qemu::{Drive, VmConfig, VmStatus},
    types::{
        Bytes, NodeName, ParseError, ScsiSlot, VmId, VolumeHandle, Wwn,
        params::DriveOptions,
        props::PropertyString,
        publish::{Contents, PublishedDisk},
    },
};

/// Steps and digest conflicts after which an operation gives up and is asked again.
pub(super) const MAX_STEPS: usize = 6;

/// A volume can't be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The node's VM can't be told.
    #[error(transparent)]
    Locate(#[from] LocateError),
    /// The volume can't be reached.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The volume is in another region than the node.
    #[error("volume `{handle}` is in region `{}`, node `{node}` in region `{region}`", handle.region)]
    WrongRegion {
        /// The handle.
        handle: VolumeHandle,
        /// The node.
        node: String,
        /// Its region.
        region: crate::types::Region,
    },
    /// The volume is local to another PVE node.
    #[error(
        "volume `{handle}` is on a storage local to Proxmox node `{zone}`, but VM {vmid} of node `{node}` runs on `{vm_node}`; hint: migrate the VM back, or schedule the pod to a node in zone `{zone}`"
    )]
    WrongZone {
        /// The handle.
        handle: VolumeHandle,
        /// Where the volume is.
        zone: NodeName,
        /// The node.
        node: String,
        /// Its VM.
        vmid: VmId,
        /// Where the VM is.
        vm_node: NodeName,
    },
    /// The volume is not there, or it can't be told.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// It can't be told who holds the volume.
    #[error("cannot attach `{handle}`")]
    Sweep {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: SweepError,
    },
    /// Several nodes are to read a volume that only one PVE node has.
    #[error(
        "`{handle}` is on storage `{}`, which is local to Proxmox node `{zone}`: it can not be given to several nodes; hint: ReadOnlyMany needs a shared storage", handle.storage()
    )]
    Local {
        /// The handle.
        handle: VolumeHandle,
        /// The node.
        zone: NodeName,
    },
    /// The VM has the volume already, in the other one of writable and read-only.
    #[error("VM {vmid} has `{handle}` in slot {slot} already, {}", if *read_only { "read-only, and it is to be writable" } else { "writable, and it is to be read-only" })]
    Incompatible {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        vmid: VmId,
        /// The slot.
        slot: ScsiSlot,
        /// Whether it has it read-only.
        read_only: bool,
    },
    /// Another VM holds the volume.
    #[error("cannot attach `{handle}` to node `{node}`: it is held by {holder}; hint: {}", holder.hint())]
    Held {
        /// The handle.
        handle: VolumeHandle,
        /// The node.
        node: String,
        /// Who holds it.
        holder: Holder,
    },
    /// No slot is free.
    #[error("cannot attach `{handle}`: slots scsi1 to scsi30 of VM {vmid} are all taken")]
    Full {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        vmid: VmId,
    },
    /// The VM holds the volume in a way that the node could not use.
    #[error(
        "VM {vmid} holds `{handle}` as {key}, {why}; hint: detach it there (`qm set {vmid} --delete {key}`)"
    )]
    Unusable {
        /// The handle.
        handle: VolumeHandle,
        /// The VM.
        vmid: VmId,
        /// The key, or several.
        key: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The drive string can't be written.
    #[error("cannot write the drive string of `{handle}`")]
    DriveString {
        /// The handle.
        handle: VolumeHandle,
        /// Why.
        #[source]
        source: ParseError,
    },
    /// The VM can't be read or changed.
    #[error("cannot attach `{handle}` to node `{node}`")]
    Vm {
        /// The handle.
        handle: VolumeHandle,
        /// The node.
        node: String,
        /// Why.
        #[source]
        source: VmError,
    },
    /// A holder VM that was left over could not be removed.
    #[error(transparent)]
    Holder(#[from] super::holder::HolderError),
}

impl AttachError {
    /// What it may come of.
    fn dated(&self) -> Option<Dated> {
        match self {
            Self::Place(error) => error.dated(),
            Self::WrongZone { .. } => Some(Dated::Region),
            Self::Vm { source, .. } => source.dated(),
            _ => None,
        }
    }
}

/// Storages of Proxmox whose new volumes read as zeros. Thick LVM is not among them, and of plugins of others it is not known.
pub const ZEROED: [&str; 9] =
    ["dir", "nfs", "cifs", "btrfs", "cephfs", "glusterfs", "lvmthin", "zfspool", "rbd"];

/// A volume in a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plugged {
    slot: ScsiSlot,
    wwn: Wwn,
    /// Its size as Proxmox wrote it into the drive string when it was plugged in (qemu-server `API2/Qemu.pm:create_disks`).
    size: Option<Bytes>,
}

/// What is left to do.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Plan {
    /// Nothing: current, pending and QEMU have the volume in this slot.
    Attached(Plugged),
    /// One step.
    Do(Step),
}

/// Why nothing can be done.
#[derive(Debug)]
enum Obstacle {
    Full,
    /// The slot has the volume, and may read only or not as said, which is the opposite of what is asked for.
    Incompatible {
        slot: ScsiSlot,
        read_only: bool,
    },
    Unusable {
        key: String,
        why: &'static str,
    },
    Vm(VmError),
}

/// How a volume is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// By one node, which may write.
    Write,
    /// By one node, which only reads.
    Read,
    /// By any number of nodes, all of which only read.
    ReadByMany,
}

impl Volumes {
    /// Attaches a volume to a node and returns how the node finds its disk. Repeating it gives the same answer.
    ///
    /// Several VMs get a volume only where each of them may only read it: QEMU refuses writes of such a drive, whatever the guest does.
    pub async fn attach(
        &self,
        handle: &VolumeHandle,
        node_id: &str,
        options: &DriveOptions,
        usage: Use,
    ) -> Result<PublishedDisk, AttachError> {
        match Box::pin(self.attach_as_seen(handle, node_id, options, usage)).await {
            Err(error) if self.look_again(&handle.region, error.dated()).await => {
                Box::pin(self.attach_as_seen(handle, node_id, options, usage)).await
            }
            answer => answer,
        }
    }

    async fn attach_as_seen(
        &self,
        handle: &VolumeHandle,
        node_id: &str,
        options: &DriveOptions,
        usage: Use,
    ) -> Result<PublishedDisk, AttachError> {
        let (machine, resources) = self.locate(node_id).await?;
        if machine.region != handle.region {
            return Err(AttachError::WrongRegion {
                handle: handle.clone(),
                node: machine.node_name,
                region: machine.region,
            });
        }
        let place = place(handle, &resources, Some(&machine.node))?;
        check_zone(handle, &place, &machine)?;
        if let (Use::ReadByMany, Some(zone)) = (usage, &place.zone) {
            return Err(AttachError::Local { handle: handle.clone(), zone: zone.clone() });
        }
        let client = self
            .client(&place.region)
            .map_err(|source| PlaceError::Region { handle: handle.clone(), source })?;
        let node = machine.node_name.clone();
        // Asked before the turn, looked at in it: the turn may be long in coming, and others who wait share the sweep.
        let (vmid, asked) = (machine.vmid, self.ask(&place.region));
        let mut turn = self.turn(client, machine).await;

        let sweep = |source| AttachError::Sweep { handle: handle.clone(), source };
        let need = if place.zone.is_some() { Need::Recent } else { Need::Fresh(asked) };
        for holder in self.holders(&place, Some(vmid), need).await.map_err(sweep)? {
            match holder.hold {
                Hold::Unused { .. } => continue,
                Hold::Snapshot { .. } => {
                    tracing::warn!(volume = %handle, %holder, "a rollback would plug the volume in there");
                    continue;
                }
                Hold::Config { read_only: true, .. } if usage == Use::ReadByMany => continue,
                Hold::Config { .. } | Hold::Stray { .. } => {}
            }
            let vm = |source| AttachError::Vm { handle: handle.clone(), node: node.clone(), source };
            if self.is_placeholder(client, &place, &holder).await.map_err(vm)? {
                continue;
            }
            if self.is_own_holder(&holder) {
                // Left over by an expansion that did not end; it never runs, and no expansion of this volume is running now.
                self.release_holder(client, &place, &holder).await?;
            } else {
                return Err(AttachError::Held { handle: handle.clone(), node, holder });
            }
        }

        let string = |source| AttachError::DriveString { handle: handle.clone(), source };
        let mut drive = PropertyString::with_bare(&place.volid.to_string()).map_err(string)?;
        options.write_to(&mut drive).map_err(string)?;
        drive.set("wwn", &place.wwn().to_string()).map_err(string)?;
        if usage != Use::Write {
            drive.set("ro", "1").map_err(string)?;
        }

        let plugged = plug(&mut turn, &place, &drive).await.map_err(|obstacle| match obstacle {
            Obstacle::Full => AttachError::Full { handle: handle.clone(), vmid: turn.vmid() },
            Obstacle::Unusable { key, why } => {
                AttachError::Unusable { handle: handle.clone(), vmid: turn.vmid(), key, why }
            }
            Obstacle::Incompatible { slot, read_only } => {
                AttachError::Incompatible { handle: handle.clone(), vmid: turn.vmid(), slot, read_only }
            }
            Obstacle::Vm(source) => AttachError::Vm { handle: handle.clone(), node, source },
        });
        let Plugged { slot, wwn, size } = match plugged {
            Ok(plugged) => plugged,
            // Proxmox refuses to plug in what is not there; which refusal that is, its storage tells.
            Err(error @ AttachError::Vm { source: VmError::Request { .. } | VmError::Task { .. }, .. }) => {
                return match self.require_present(client, &place, handle).await {
                    Err(absent @ PresenceError::Absent { .. }) => Err(absent.into()),
                    _ => Err(error),
                };
            }
            Err(error) => return Err(error),
        };
        let size = match size {
            Some(size) => size,
            // A drive string that was edited by hand.
            None => self.require_present(client, &place, handle).await?.size,
        };
        Ok(PublishedDisk { wwn, slot: Some(slot), size: Some(size), contents: self.contents(&place) })
    }

    /// What the volume holds where nobody wrote yet: zeros only if it was allocated under the configured owner, on a storage that
    /// hands out zeroed blocks.
    fn contents(&self, place: &Place) -> Contents {
        match place.volid.name.owner() {
            Some(owner) if owner == self.inner.settings.owner => {
                if ZEROED.contains(&place.plugin.as_str()) {
                    Contents::Blank
                } else {
                    Contents::Unwiped
                }
            }
            _ => Contents::Unknown,
        }
    }
}

fn check_zone(handle: &VolumeHandle, place: &Place, machine: &Machine) -> Result<(), AttachError> {
    match &place.zone {
        Some(zone) if *zone != machine.node => Err(AttachError::WrongZone {
            handle: handle.clone(),
            zone: zone.clone(),
            node: machine.node_name.clone(),
            vmid: machine.vmid,
            vm_node: machine.node.clone(),
        }),
        _ => Ok(()),
    }
}

/// Steps and reads until the plan says that the volume is attached.
async fn plug(turn: &mut Turn, place: &Place, drive: &PropertyString) -> Result<Plugged, Obstacle> {
    let mut last = String::new();
    let mut recalled = turn.recall().await;
    for _ in 0..MAX_STEPS {
        let (config, status) = match recalled.take() {
            Some((config, status)) => match plan(turn, &config, &status, place, drive) {
                Ok(Plan::Do(_)) => (config, status),
                // What is remembered answers nothing and refuses nothing.
                _ => turn.read().await.map_err(Obstacle::Vm)?,
            },
            None => turn.read().await.map_err(Obstacle::Vm)?,
        };
        match plan(turn, &config, &status, place, drive)? {
            Plan::Attached(plugged) => return Ok(plugged),
            Plan::Do(step) => {
                last = match turn.change(&step, config.digest()).await.map_err(Obstacle::Vm)? {
                    Carried::Out => format!("Proxmox reported that it did: {step}"),
                    Carried::NotOut => "its config is changed by somebody else all the time".to_owned(),
                };
            }
        }
    }
    Err(Obstacle::Vm(VmError::NoProgress { vmid: turn.vmid(), detail: last }))
}

/// The next step towards a VM that has the volume in one slot, or what stands in its way.
fn plan(
    turn: &Turn,
    config: &VmConfig,
    status: &VmStatus,
    place: &Place,
    drive: &PropertyString,
) -> Result<Plan, Obstacle> {
    let vmid = turn.vmid();
    let held: Vec<_> = config.holders_of(&place.volid).collect();
    match held.as_slice() {
        [] => {
            check_pluggable(turn, config, status)?;
            if let Some(key) = stray_drives(config, status).next() {
                return Err(Obstacle::Vm(VmError::Stray { vmid, key }));
            }
            let slot = free_slot(config, status).ok_or(Obstacle::Full)?;
            Ok(Plan::Do(Step::Plug { slot, drive: drive.clone() }))
        }
        [(key, entry)] => {
            let unusable = |why| Obstacle::Unusable { key: (*key).to_owned(), why };
            let slot: ScsiSlot = key.parse().map_err(|_| unusable("which is not a SCSI slot"))?;
            let current = entry.current.as_deref().and_then(Drive::read).filter(|c| c.is(&place.volid));
            let Some(current) = current else {
                // Pending only: an attach that failed half way, or was made while hotplug was off. The same value again retries it.
                check_pluggable(turn, config, status)?;
                if entry.current.is_some() {
                    return Err(unusable("where another drive is still in force"));
                }
                return Ok(Plan::Do(Step::Plug { slot, drive: drive.clone() }));
            };
            let read_only = current.is_read_only();
            if read_only != drive.get("ro").is_some() {
                return Err(Obstacle::Incompatible { slot, read_only });
            }
            // Another volume that waits for this slot was put there by somebody: that is not ours to take back.
            let pending = entry.pending.as_deref().and_then(Drive::read);
            if let Some(pending) = pending.filter(|pending| !pending.is(&place.volid)) {
                let (key, pending) = ((*key).to_owned(), pending.volid().unwrap_or_default().to_owned());
                return Err(Obstacle::Vm(VmError::PendingOther { vmid, key, pending }));
            }
            if entry.pending_delete {
                turn.check_changeable(config, status).map_err(Obstacle::Vm)?;
                return Ok(Plan::Do(Step::Revert { key: (*key).to_owned() }));
            }
            if let Some(pending) = &entry.pending {
                tracing::warn!(vm = %vmid, slot = key, pending, "options of the drive wait for the next start of the vm");
            }
            match status.has(key) {
                None => return Err(Obstacle::Vm(VmError::QemuSilent { vmid })),
                Some(false) if status.running => {
                    // The config has the disk and QEMU does not: what is left of an unplug that ended half way. Nothing can be
                    // using it, so it is taken out and plugged in again.
                    turn.check_changeable(config, status).map_err(Obstacle::Vm)?;
                    return Ok(Plan::Do(Step::Unplug { key: (*key).to_owned() }));
                }
                // QEMU has it, or there is no QEMU: a VM that does not run gets its disks when it starts.
                Some(_) => {}
            }
            let wwn = current.get("wwn").and_then(|wwn| wwn.parse().ok());
            let wwn = wwn.ok_or_else(|| unusable("without a WWN by which the node could find it"))?;
            Ok(Plan::Attached(Plugged { slot, wwn, size: current.size() }))
        }
        several => Err(Obstacle::Unusable {
            key: several.iter().map(|(key, _)| *key).collect::<Vec<_>>().join(" and "),
            why: "more than once",
        }),
    }
}

fn check_pluggable(turn: &Turn, config: &VmConfig, status: &VmStatus) -> Result<(), Obstacle> {
    let vmid = turn.vmid();
    if !config.scsi_hardware().starts_with("virtio-scsi-") {
        let found = config.scsi_hardware().to_owned();
        return Err(Obstacle::Vm(VmError::ScsiHardware { vmid, found }));
    }
    turn.check_changeable(config, status).map_err(Obstacle::Vm)?;
    if status.running && status.drives.is_none() {
        return Err(Obstacle::Vm(VmError::QemuSilent { vmid }));
    }
    Ok(())
}

/// The first slot that neither the config, nor anything pending, nor QEMU knows.
fn free_slot(config: &VmConfig, status: &VmStatus) -> Option<ScsiSlot> {
    ScsiSlot::for_volumes().find(|slot| {
        let key = slot.to_string();
        config.entry(&key).is_none() && status.has(&key) != Some(true)
    })
}
