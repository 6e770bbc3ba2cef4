//! Why a VM can't be read or changed.

use super::Dated;
use crate::{
    pve::{ApiError, task::TaskError},
    types::VmId,
};

/// A VM can't be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It can't be read.
    #[error("cannot read VM {vmid}")]
    Read {
        /// The VM.
        vmid: VmId,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// An earlier task of it may still be running.
    #[error("cannot tell whether an earlier task of VM {vmid} has ended")]
    Unsettled {
        /// The VM.
        vmid: VmId,
        /// Why.
        #[source]
        source: UnsettledCause,
    },
    /// The VMID is another VM's now.
    #[error(
        "VM {vmid} has the SMBIOS uuid {found} and is not the VM of the node any more, which has {expected}"
    )]
    Stranger {
        /// The VM.
        vmid: VmId,
        /// The uuid it has, or none.
        found: String,
        /// The uuid it must have, or none.
        expected: String,
    },
    /// It is locked.
    #[error(
        "VM {vmid} is locked ({lock}); hint: wait until that has ended, or, if nothing runs any more, `qm unlock {vmid}`"
    )]
    Locked {
        /// The VM.
        vmid: VmId,
        /// By what.
        lock: String,
    },
    /// It is protected.
    #[error("VM {vmid} is protected, so that no drive can be removed; hint: `qm set {vmid} --protection 0`")]
    Protected {
        /// The VM.
        vmid: VmId,
    },
    /// Disks can't be plugged or unplugged while it runs.
    #[error("VM {vmid} runs with hotplug of disks off; hint: `qm set {vmid} --hotplug network,disk,usb`")]
    HotplugOff {
        /// The VM.
        vmid: VmId,
    },
    /// Its SCSI controller can't carry volumes.
    #[error(
        "VM {vmid} has SCSI controller `{found}`, and volumes need a virtio-scsi one; hint: shut it down and `qm set {vmid} --scsihw virtio-scsi-single`"
    )]
    ScsiHardware {
        /// The VM.
        vmid: VmId,
        /// What it has; `lsi` where none is set.
        found: String,
    },
    /// QEMU does not answer.
    #[error("the QEMU process of VM {vmid} does not answer, so that it is not known which drives it has")]
    QemuSilent {
        /// The VM.
        vmid: VmId,
    },
    /// QEMU has a drive the config does not know.
    #[error(
        "the QEMU of VM {vmid} has drive {key}, which its config does not know and which may be the volume; hint: look at it with `qm monitor {vmid}`, `info block`"
    )]
    Stray {
        /// The VM.
        vmid: VmId,
        /// The drive.
        key: String,
    },
    /// A request to change it gave no good answer.
    #[error("cannot {step} of VM {vmid}{left}")]
    Request {
        /// The VM.
        vmid: VmId,
        /// What was to be done.
        step: String,
        /// What it left behind.
        left: Leftover,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// The task that was to change it did not end well.
    #[error("cannot {step} of VM {vmid}{left}")]
    Task {
        /// The VM.
        vmid: VmId,
        /// What was to be done.
        step: String,
        /// What it left behind.
        left: Leftover,
        /// Why.
        #[source]
        source: TaskError,
    },
    /// The slot is to get another volume, which unplugging ours would drop.
    #[error(
        "drive {key} of VM {vmid} waits to be replaced by `{pending}`, which unplugging it now would forget; hint: shut the VM down and start it again, or take the change back (`qm set {vmid} --revert {key}`)"
    )]
    PendingOther {
        /// The VM.
        vmid: VmId,
        /// The drive.
        key: String,
        /// What waits.
        pending: String,
    },
    /// Somebody else changes the VM all the time, or a change that was reported done does not show.
    #[error("VM {vmid} does not come to the state that was asked for: {detail}")]
    NoProgress {
        /// The VM.
        vmid: VmId,
        /// What was seen last.
        detail: String,
    },
}

impl VmError {
    /// Whether Proxmox said no, and nothing of what was asked for can still be under way.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Request { source, .. } => !source.is_unknown(),
            Self::Task { source, .. } => !source.is_unknown(),
            _ => false,
        }
    }

    /// What it may come of.
    pub(super) fn dated(&self) -> Option<Dated> {
        match self {
            Self::Stranger { vmid, .. } => Some(Dated::Vm(*vmid)),
            Self::Read { vmid, source } | Self::Request { vmid, source, .. } if source.is_no_such_vm() => {
                Some(Dated::Vm(*vmid))
            }
            _ => None,
        }
    }
}

/// Why it can't be told that an earlier task has ended.
#[derive(Debug, thiserror::Error)]
pub enum UnsettledCause {
    /// The running tasks can't be listed.
    #[error(transparent)]
    List(ApiError),
    /// A task still runs, or its state can't be read.
    #[error(transparent)]
    Task(TaskError),
}

/// What a failed change left in `pending`, where it would strike at the next start of the VM.
#[derive(Debug)]
pub enum Leftover {
    /// Nothing.
    Nothing,
    /// A pending change that was taken back.
    TakenBack,
    /// A pending change that could not be taken back.
    Left {
        /// The key.
        key: String,
        /// Why not.
        why: String,
    },
    /// It is not known, because the outcome is not.
    Unknown,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing | Self::Unknown => Ok(()),
            Self::TakenBack => f.write_str(" (the pending change was taken back)"),
            Self::Left { key, why } => {
                write!(
                    f,
                    " (the change of {key} is still pending and would be applied at the next start: {why})"
                )
            }
        }
    }
}
