//! From the errors of volume operations to gRPC codes.
//!
//! external-provisioner takes Canceled, `DeadlineExceeded`, Unavailable and Aborted as "may still be running" and asks again with the same
//! arguments; every other code is final, and a volume that was made all the same is then leaked. So whatever is not known is Unavailable.

use tonic::{Code, Status};

use super::with_chain;
use crate::{
    pve::{ApiError, task::TaskError},
    types::cluster::RecordError,
    volume::{
        attach::AttachError,
        attachments::SweepError,
        capacity::CapacityError,
        create::CreateError,
        delete::{DeleteError, ExistsError, PresenceError},
        detach::DetachError,
        expand::ExpandError,
        holder::HolderError,
        inventory::ListError,
        modify::ModifyError,
        outcome::Outcome,
        placement::{LocateError, PlaceError},
        vmerror::{UnsettledCause, VmError},
    },
};

macro_rules! into_status {
    ($($error:ty => $code:ident),* $(,)?) => {
        $(impl From<$error> for Status {
            fn from(error: $error) -> Self {
                with_chain($code(&error), &error)
            }
        })*
    };
}

into_status!(
    AttachError => attach,
    CapacityError => capacity,
    CreateError => create,
    DeleteError => delete,
    DetachError => detach,
    ExistsError => exists,
    ExpandError => expand,
    ListError => list,
    ModifyError => modify,
    RecordError => record,
);

fn api(error: &ApiError) -> Code {
    match Outcome::from(error) {
        Outcome::Unknown => Code::Unavailable,
        Outcome::Final if error.is_unauthenticated() => Code::Unauthenticated,
        Outcome::Final if error.is_forbidden() => Code::PermissionDenied,
        Outcome::Final => Code::Internal,
    }
}

fn task(error: &TaskError) -> Code {
    match Outcome::from(error) {
        Outcome::Unknown => Code::Unavailable,
        // A privilege that is only checked in the task.
        Outcome::Final
            if error.exit_status().is_some_and(|text| text.contains("Permission check failed")) =>
        {
            Code::PermissionDenied
        }
        Outcome::Final => Code::Internal,
    }
}

fn locate(error: &LocateError) -> Code {
    match error {
        LocateError::Lookup(_) | LocateError::CutOff { .. } => Code::Unavailable,
        LocateError::NoSuchNode { .. } | LocateError::NoSuchVm { .. } => Code::NotFound,
        LocateError::Region { .. } | LocateError::Hidden { .. } | LocateError::Ambiguous { .. } => {
            Code::FailedPrecondition
        }
        LocateError::Api { source, .. } => api(source),
    }
}

fn place(error: &PlaceError) -> Code {
    match error {
        PlaceError::Region { .. } | PlaceError::NoSuchStorage { .. } => Code::FailedPrecondition,
        PlaceError::Api { source, .. } => api(source),
        PlaceError::NoZone { .. } => Code::InvalidArgument,
        PlaceError::Inactive { .. } => Code::Unavailable,
    }
}

fn presence(error: &PresenceError) -> Code {
    match error {
        PresenceError::Absent { .. } => Code::NotFound,
        // What could not be proven may be there: never NotFound, and never final but for a missing privilege.
        PresenceError::Unproven { source, .. } => match api(source) {
            code @ (Code::PermissionDenied | Code::Unauthenticated) => code,
            _ => Code::Unavailable,
        },
    }
}

fn sweep(error: &SweepError) -> Code {
    match error {
        // A VM that moves while it is looked for is found the next time.
        SweepError::Unreadable { source, .. } | SweepError::List(source) => api(source),
        SweepError::Permissions(source)
        | SweepError::Unsettled { source: UnsettledCause::List(source), .. } => api(source),
        SweepError::Unsettled { source: UnsettledCause::Task(_), .. } => Code::Unavailable,
        SweepError::Hidden { .. } => Code::FailedPrecondition,
    }
}

fn vm(error: &VmError) -> Code {
    match error {
        VmError::Read { source, .. }
        | VmError::Request { source, .. }
        | VmError::Unsettled { source: UnsettledCause::List(source), .. } => api(source),
        // A task ends; the node's VM is looked for again by its uuid; a lock passes; a hung QEMU answers again or is stopped.
        VmError::Unsettled { source: UnsettledCause::Task(_), .. }
        | VmError::Stranger { .. }
        | VmError::Locked { .. }
        | VmError::QemuSilent { .. } => Code::Unavailable,
        VmError::Protected { .. }
        | VmError::HotplugOff { .. }
        | VmError::ScsiHardware { .. }
        | VmError::PendingOther { .. }
        | VmError::Stray { .. } => Code::FailedPrecondition,
        VmError::Task { source, .. } => task(source),
        VmError::NoProgress { .. } => Code::Aborted,
    }
}

fn holder(error: &HolderError) -> Code {
    match error {
        HolderError::Forbidden(_) | HolderError::NoVmid { .. } | HolderError::NotOurs { .. } => {
            Code::FailedPrecondition
        }
        HolderError::Request { source, .. } => api(source),
        HolderError::Task { source, .. } => task(source),
        HolderError::Vm(error) => vm(error),
    }
}

fn attach(error: &AttachError) -> Code {
    match error {
        AttachError::Locate(error) => locate(error),
        AttachError::Place(error) => place(error),
        AttachError::WrongRegion { .. }
        | AttachError::WrongZone { .. }
        | AttachError::Held { .. }
        | AttachError::Unusable { .. } => Code::FailedPrecondition,
        AttachError::Incompatible { .. } => Code::AlreadyExists,
        AttachError::Presence(error) => presence(error),
        AttachError::Sweep { source, .. } => sweep(source),
        AttachError::Full { .. } => Code::ResourceExhausted,
        // A capability that a volume on such a storage does not have; a parameter that is none.
        AttachError::Local { .. } | AttachError::DriveString { .. } => Code::InvalidArgument,
        AttachError::Vm { source, .. } => vm(source),
        AttachError::Holder(error) => holder(error),
    }
}

fn detach(error: &DetachError) -> Code {
    match error {
        DetachError::Locate(error) => locate(error),
        DetachError::Place(error) => place(error),
        DetachError::Sweep { source, .. } => sweep(source),
        DetachError::Vm { source, .. } => vm(source),
    }
}

fn delete(error: &DeleteError) -> Code {
    match error {
        DeleteError::Place(error) => place(error),
        DeleteError::Record(error) => record(error),
        DeleteError::Sweep { source, .. } => sweep(source),
        DeleteError::InUse { .. } | DeleteError::Owned { .. } | DeleteError::NoOwner { .. } => {
            Code::FailedPrecondition
        }
        DeleteError::Reference { source, .. } => vm(source),
        DeleteError::Presence(error) => presence(error),
        DeleteError::Forbidden { .. } => Code::PermissionDenied,
        DeleteError::Request { source, .. } => api(source),
        DeleteError::Task { source, .. } => task(source),
        DeleteError::Holder(error) => holder(error),
    }
}

fn exists(error: &ExistsError) -> Code {
    match error {
        ExistsError::Place(error) => place(error),
        ExistsError::Presence(error) => presence(error),
    }
}

fn expand(error: &ExpandError) -> Code {
    match error {
        ExpandError::Range { .. } | ExpandError::Shrink { .. } => Code::OutOfRange,
        ExpandError::Place(error) => place(error),
        ExpandError::Presence(error) => presence(error),
        ExpandError::Sweep { source, .. } => sweep(source),
        ExpandError::Shared { .. } | ExpandError::Elsewhere { .. } => Code::FailedPrecondition,
        ExpandError::Vm { source, .. } => vm(source),
        ExpandError::NoSpace { .. } => Code::ResourceExhausted,
        ExpandError::Holder { source, .. } => holder(source),
        ExpandError::NotGrown { .. } => Code::Aborted,
    }
}

fn create(error: &CreateError) -> Code {
    match error {
        CreateError::NoStorage
        | CreateError::Replicated
        | CreateError::Plugin { .. }
        | CreateError::Local { .. }
        | CreateError::NoRegion { .. }
        | CreateError::NoSuchStorage { .. } => Code::InvalidArgument,
        CreateError::Range { .. } => Code::OutOfRange,
        // Nothing was made: the pod may be scheduled elsewhere.
        CreateError::Region { .. } | CreateError::NoRoom { .. } | CreateError::NoSpace { .. } => {
            Code::ResourceExhausted
        }
        CreateError::Away { .. } | CreateError::Doubtful { .. } | CreateError::InDoubt { .. } => {
            Code::Unavailable
        }
        CreateError::Exists { .. } | CreateError::OtherFormat { .. } | CreateError::Elsewhere { .. } => {
            Code::AlreadyExists
        }
        CreateError::Forbidden { .. } => Code::PermissionDenied,
        CreateError::Api { source, .. } => api(source),
    }
}

/// The cluster is asked again.
fn record(_: &RecordError) -> Code {
    Code::Unavailable
}

fn modify(error: &ModifyError) -> Code {
    match error {
        ModifyError::Place(error) => place(error),
        ModifyError::Presence(error) => presence(error),
        ModifyError::Record { source, .. } => record(source),
        ModifyError::Sweep { source, .. } => sweep(source),
        ModifyError::Pending { .. } | ModifyError::Elsewhere { .. } => Code::FailedPrecondition,
        ModifyError::Vm { source, .. } => vm(source),
    }
}

fn list(error: &ListError) -> Code {
    match error {
        ListError::Region { source, .. } | ListError::Storage { source, .. } => api(source),
        ListError::Inactive { .. } => Code::Unavailable,
        ListError::Hidden { .. } => Code::PermissionDenied,
    }
}

fn capacity(error: &CapacityError) -> Code {
    match error {
        CapacityError::Region(_) => Code::InvalidArgument,
        CapacityError::Api { source, .. } => api(source),
    }
}
