//! From the errors of node operations to gRPC codes.
//!
//! The kubelet asks again whatever the code is. It only makes a difference when a pod is deleted meanwhile: after a final code of
//! `NodeStageVolume` it takes the volume for not staged and never unstages it, so a stage that may have left something is
//! `DeadlineExceeded`, Unavailable or Aborted. Of `NodeExpandVolume` it takes `InvalidArgument`, `OutOfRange` and `NotFound` as hopeless.

use std::{error::Error, io};

use tonic::{Code, Status};

use super::with_chain;
use crate::{
    host::{
        error::{
            CheckError, DisksError, FormatError, GrowError, MountError, OpenError, ReleaseError, ToolError,
        },
        luks::{GrowMappingError, LockError, UnlockError},
    },
    node::{
        ExpandError, FindError, HealthError, InfoError, PublishError, StageError, StatsError, UnpublishError,
        UnstageError,
    },
};

macro_rules! into_status {
    ($($error:ty => $code:ident),* $(,)?) => {
        $(impl From<$error> for Status {
            fn from(error: $error) -> Self {
                // A call that did not end may still take effect, whatever it was part of.
                let code = if timed_out(&error) { Code::DeadlineExceeded } else { $code(&error) };
                with_chain(code, &error)
            }
        })*
    };
}

into_status!(
    StageError => stage,
    PublishError => publish,
    UnpublishError => unpublish,
    UnstageError => unstage,
    ExpandError => expand,
    StatsError => stats,
    InfoError => info,
);

fn timed_out(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io: Option<&io::Error> = error.downcast_ref();
        let tool: Option<&ToolError> = error.downcast_ref();
        if io.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
            || tool.is_some_and(|error| matches!(error, ToolError::TimedOut { .. }))
        {
            return true;
        }
        next = error.source();
    }
    false
}

fn disks(error: &DisksError) -> Code {
    match error {
        DisksError::Read(_) => Code::Internal,
    }
}

fn open(error: &OpenError) -> Code {
    match error {
        // What vanished or changed under our hands is looked for again by the next call.
        OpenError::Io { .. }
        | OpenError::NoNode { .. }
        | OpenError::Number { .. }
        | OpenError::Size { .. }
        | OpenError::Changed { .. }
        | OpenError::NotRunning { .. } => Code::Unavailable,
        OpenError::Offline { .. } => Code::FailedPrecondition,
    }
}

fn find(error: &FindError) -> Code {
    match error {
        FindError::Disks(error) => disks(error),
        // It may appear yet.
        FindError::Absent { .. } => Code::Unavailable,
        FindError::OtherVolume { .. }
        | FindError::Several { .. }
        | FindError::OtherSlot { .. }
        | FindError::TooSmall { .. } => Code::FailedPrecondition,
        FindError::Open(error) => open(error),
    }
}

fn format(error: &FormatError) -> Code {
    match error {
        FormatError::BlockSize { .. } | FormatError::Holds { .. } | FormatError::NotBlank { .. } => {
            Code::FailedPrecondition
        }
        FormatError::Probe(_)
        | FormatError::Flush { .. }
        | FormatError::Encrypt { .. }
        | FormatError::NotEncrypted { .. }
        | FormatError::Mkfs { .. }
        | FormatError::Vanished { .. } => Code::Internal,
    }
}

fn mount(error: &MountError) -> Code {
    match error {
        // Something has the disk or the path just now: udev, a scanner, an earlier mount that is on its way out.
        MountError::Kernel { source, .. } if source.kind() == io::ErrorKind::ResourceBusy => {
            Code::Unavailable
        }
        MountError::Kernel { .. } | MountError::Wrong { .. } => Code::Internal,
        MountError::Damaged { .. } | MountError::Unreplayed { .. } => Code::FailedPrecondition,
    }
}

fn unlock(error: &UnlockError) -> Code {
    match error {
        UnlockError::WrongPassphrase { .. } => Code::Unauthenticated,
        UnlockError::Tool { .. } => Code::Internal,
        // It may be there, and unstage closes it.
        UnlockError::Vanished { .. } => Code::Unavailable,
        UnlockError::Disks(error) => disks(error),
    }
}

fn lock(error: &LockError) -> Code {
    match error {
        LockError::Busy { .. } | LockError::Stays { .. } => Code::Unavailable,
        LockError::Flush { .. } | LockError::Tool { .. } => Code::Internal,
        LockError::Open(error) => open(error),
        LockError::Disks(error) => disks(error),
    }
}

fn check(error: &CheckError) -> Code {
    match error {
        CheckError::Damaged { .. } => Code::FailedPrecondition,
        CheckError::Tool { .. } => Code::Internal,
    }
}

fn health(error: &HealthError) -> Code {
    match error {
        HealthError::Disks(error) => disks(error),
        HealthError::Open(error) => open(error),
        HealthError::Path(_) => Code::Internal,
    }
}

fn stage(error: &StageError) -> Code {
    match error {
        StageError::Find(error) => find(error),
        StageError::Disks(error) => disks(error),
        StageError::Open(error) => open(error),
        StageError::Mount(error) => mount(error),
        StageError::Path(_) | StageError::Probe(_) => Code::Internal,
        StageError::Differs { .. } => Code::AlreadyExists,
        StageError::Occupied { .. } | StageError::Refused { .. } | StageError::Writable { .. } => {
            Code::FailedPrecondition
        }
        // A mount that is there stays there.
        StageError::Dead(_) => Code::Unavailable,
        StageError::Trouble { .. } => Code::FailedPrecondition,
        StageError::Health(error) => health(error),
        StageError::Unlock(error) => unlock(error),
        StageError::Lock(error) => lock(error),
        StageError::Check(error) => check(error),
        StageError::Format(error) => format(error),
    }
}

fn publish(error: &PublishError) -> Code {
    match error {
        PublishError::Find(error) => find(error),
        PublishError::Disks(error) => disks(error),
        PublishError::Open(error) => open(error),
        PublishError::Mount(error) => mount(error),
        PublishError::Path(_) => Code::Internal,
        PublishError::NotStaged(_)
        | PublishError::OtherStaged { .. }
        | PublishError::Locked { .. }
        | PublishError::Taken { .. }
        | PublishError::Trouble(_) => Code::FailedPrecondition,
        PublishError::Health(error) => health(error),
        PublishError::Differs { .. } => Code::AlreadyExists,
        PublishError::ReadonlyBlock => Code::InvalidArgument,
    }
}

fn unpublish(error: &UnpublishError) -> Code {
    match error {
        UnpublishError::Path(_) => Code::Internal,
        UnpublishError::Unmount(_) => Code::Unavailable,
    }
}

fn unstage(error: &UnstageError) -> Code {
    match error {
        UnstageError::Disks(error) => disks(error),
        UnstageError::Path(_) => Code::Internal,
        UnstageError::OtherVolume { .. } | UnstageError::Published { .. } => Code::FailedPrecondition,
        UnstageError::Unmount(error) => unpublish(error),
        UnstageError::Open(error) => open(error),
        UnstageError::Lock(error) => lock(error),
        UnstageError::Release(error) => release(error),
    }
}

fn release(error: &ReleaseError) -> Code {
    match error {
        ReleaseError::Held { .. } => Code::FailedPrecondition,
        ReleaseError::NotOffline { .. } | ReleaseError::Busy { .. } | ReleaseError::Stays { .. } => {
            Code::Unavailable
        }
        ReleaseError::Flush { .. } | ReleaseError::Delete { .. } => Code::Internal,
        ReleaseError::Disks(error) => disks(error),
    }
}

fn expand(error: &ExpandError) -> Code {
    match error {
        ExpandError::Disks(error) => disks(error),
        ExpandError::Grow(GrowError::Capability { .. } | GrowError::Foreign { .. }) => {
            Code::FailedPrecondition
        }
        ExpandError::Mapping(GrowMappingError::Passphrase { .. }) => Code::Unauthenticated,
        ExpandError::Mapping(GrowMappingError::Tool { .. }) | ExpandError::Path(_) | ExpandError::Grow(_) => {
            Code::Internal
        }
        ExpandError::NotThere(_) => Code::NotFound,
        ExpandError::DiskGone(_) | ExpandError::Small { .. } => Code::Unavailable,
        ExpandError::Large { .. } => Code::OutOfRange,
        ExpandError::Open(error) => open(error),
    }
}

fn stats(error: &StatsError) -> Code {
    match error {
        StatsError::Disks(error) => disks(error),
        StatsError::NotThere(_) => Code::NotFound,
        StatsError::Path(_) | StatsError::Usage(_) => Code::Internal,
        StatsError::Health(error) => health(error),
    }
}

fn info(error: &InfoError) -> Code {
    match error {
        InfoError::NotRead(_) => Code::Unavailable,
        InfoError::NoPlace(_) => Code::FailedPrecondition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::error::PathError;

    #[test]
    fn a_call_that_did_not_end_is_never_final() {
        let source = io::Error::new(io::ErrorKind::TimedOut, "it did not end within 30s");
        let error = StageError::Path(PathError { what: "make", path: "/a".into(), source });
        let status = Status::from(error);
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(status.message(), "cannot make `/a`: it did not end within 30s");
    }

    #[test]
    fn a_mount_that_finds_the_disk_busy_may_be_asked_for_again() {
        let busy = |kind: io::ErrorKind| {
            let (what, target) = ("xfs".to_owned(), "/a".into());
            Status::from(StageError::Mount(MountError::Kernel { what, target, source: kind.into() })).code()
        };
        assert_eq!(busy(io::ErrorKind::ResourceBusy), Code::Unavailable);
        assert_eq!(busy(io::ErrorKind::InvalidInput), Code::Internal);
    }
}
