//! Unpublish: a volume disappears from the path of a pod, and the path with it.

use super::{MountPath, Node, mounted_at};
use crate::host::error::{PathError, UnmountError};

/// A target to take away.
#[derive(Debug, Clone)]
pub struct Unpublish {
    /// The volume's handle.
    pub volume: String,
    /// The path.
    pub target: MountPath,
}

/// Why a target was not taken away.
#[derive(Debug, thiserror::Error)]
pub enum UnpublishError {
    /// The mount table or the target.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Unmounting.
    #[error(transparent)]
    Unmount(#[from] UnmountError),
}

impl Node {
    /// Takes a target away. Succeeds where it is gone already.
    pub async fn unpublish(&self, command: &Unpublish) -> Result<(), UnpublishError> {
        let target = self.resolve(&command.target).await?;
        self.unmount_all(&target).await?;
        self.host.remove_place(target.as_path()).await?;
        tracing::info!(volume = command.volume, "volume unpublished");
        Ok(())
    }

    /// Unmounts everything at the path: mounts can lie on each other where a propagated mount table doubles them.
    pub(super) async fn unmount_all(&self, path: &MountPath) -> Result<(), UnpublishError> {
        while mounted_at(&self.host.mounts().await?, path.as_path()).is_some() {
            self.host.unmount(path.as_path()).await?;
        }
        Ok(())
    }
}
