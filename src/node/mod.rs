//! What a CSI node operation means on a Linux node.
//!
//! Each operation is a command in a file of its own, with an error of its own, run by [`Node`] over [`Host`]. The layout is that of
//! the driver before this one: a file system is mounted at the staging path and bound to each target; a raw block volume is
//! the disk's node bound onto a file at each target, and its staging only proves that the disk is there.
//!
//! Nothing is recorded: what is staged and published is read from the mount table, and which disk is a volume's from what the
//! disks answer. A record could be lost, be stale or lie, and would not know what another driver staged. Read [`find`] first.

mod contents;
mod expand;
mod find;
mod health;
mod info;
mod options;
mod publish;
mod stage;
mod stats;
mod twins;
mod unpublish;
mod unstage;

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use expand::{Expand, ExpandError};
pub use find::FindError;
pub use health::{HealthError, Trouble};
pub use info::{Info, InfoError};
pub use options::{MountFlags, MountFlagsError};
pub use publish::{Publish, PublishError};
pub use stage::{Stage, StageError};
pub use stats::{Stats, StatsError};
pub use unpublish::{Unpublish, UnpublishError};
pub use unstage::{Unstage, UnstageError};

use tokio::sync::watch;

use crate::{
    host::{Disk, FsKind, Host, Mount, Place, error::PathError, luks::KeyCost},
    types::{cluster::OwnNode, topology},
};

/// What a node needs to know of itself.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The node's id: its name in Kubernetes, or that name and `/<vmid>`.
    pub node_id: String,
    /// Where the node is, if that is told.
    pub place: Option<topology::Place>,
    /// How many volumes it can hold: 24, as before.
    pub max_volumes: NonZeroU32,
    /// What Kubernetes says of the node, where it is asked; `None` in it until it has answered.
    pub labels: Option<watch::Receiver<Option<OwnNode>>>,
    /// How long to wait for a disk that was attached to appear.
    pub find_timeout: Duration,
    /// How long to wait for a disk that was grown to show its new size.
    pub size_timeout: Duration,
    /// What it costs to open a volume that is encrypted from now on.
    pub key_cost: KeyCost,
}

impl NodeOptions {
    /// The defaults for a node of this id.
    pub fn new(node_id: impl Into<String>) -> Self {
        Self {
            node_id: node_id.into(),
            place: None,
            labels: None,
            max_volumes: NonZeroU32::new(24).expect("24 is not zero"),
            find_timeout: Duration::from_secs(15),
            size_timeout: Duration::from_secs(10),
            key_cost: KeyCost::default(),
        }
    }
}

/// The operations of a node.
#[derive(Clone)]
pub struct Node {
    host: Arc<dyn Host>,
    options: Arc<NodeOptions>,
}

impl Node {
    /// A node over a host.
    pub fn new(host: Arc<dyn Host>, options: NodeOptions) -> Self {
        Self { host, options: Arc::new(options) }
    }

    /// A path as the mount table spells it.
    async fn resolve(&self, path: &MountPath) -> Result<MountPath, PathError> {
        Ok(MountPath(self.host.resolve(path.as_path()).await?))
    }

    /// What the node knows of itself.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }
}

/// An absolute path without `..`, as the orchestrator names places for mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPath(PathBuf);

impl MountPath {
    /// Checks a path; `None` where it is relative, the root, or leads upwards.
    pub fn new(text: &str) -> Option<Self> {
        use std::path::Component;
        let path = Path::new(text);
        let mut parts = path.components();
        let legal = parts.next() == Some(Component::RootDir)
            && parts.clone().next().is_some()
            && parts.all(|part| matches!(part, Component::Normal(_)))
            && !text.contains('\0');
        // Collected from its parts, it has no doubled or trailing slash, as the mount table has none.
        legal.then(|| Self(path.components().collect()))
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl std::fmt::Display for MountPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.display().fmt(f)
    }
}

/// How a volume is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// As a file system.
    Filesystem {
        /// Which; `None` where the orchestrator left it open.
        kind: Option<FsKind>,
        /// Options of the mount.
        flags: MountFlags,
    },
    /// As a raw block device.
    Block,
}

/// The topmost mount at exactly this path.
fn mounted_at<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.target == path)
}

/// The mounts by which the devices are used: of the file system on them, and of their nodes bound onto a file.
///
/// A bound node shows in the table as the file system that the node lies on and the node's path in it. Only mounts whose root
/// ends in the device's name are looked at: looking at every mount could hang on a dead network file system.
async fn uses<'a>(
    host: &dyn Host,
    mounts: &'a [Mount],
    devices: &[&Disk],
) -> Result<Vec<&'a Mount>, PathError> {
    let mut uses = Vec::new();
    for mount in mounts {
        let mounted = devices.iter().any(|device| mount.number == device.number);
        if mounted || is_bound(host, mount, devices).await? {
            uses.push(mount);
        }
    }
    Ok(uses)
}

/// Whether the mount is the node of one of the devices.
async fn is_bound(host: &dyn Host, mount: &Mount, devices: &[&Disk]) -> Result<bool, PathError> {
    let name = mount.root.file_name();
    for device in devices {
        if name.is_some_and(|name| name == device.name.as_str())
            && host.look(&mount.target).await? == Place::BlockDevice(device.number)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_could_be_another_is_refused() {
        for bad in ["", "/", "a/b", "/a/../b", "../a", "/a\0b"] {
            assert_eq!(MountPath::new(bad), None, "{bad:?}");
        }
        let path = MountPath::new("/a//b/").expect("a path");
        assert_eq!(path.as_path().as_os_str(), "/a/b");
    }
}
