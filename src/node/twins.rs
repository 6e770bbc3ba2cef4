//! Mounts that are one mount seen twice.
//!
//! Where the kubelet's directory is bound at a second path, the kernel shows what is mounted below it at both: it propagates a mount
//! from one to the other, and its end as well. Such a twin is no second use of a volume. A bind for a pod is, though it is of the same
//! peer group: so the proof is that both lie at the same place of mounts which are peers.

use std::path::{Path, PathBuf};

use crate::host::Mount;

/// Whether `other` is `mount`, propagated: it goes when that is unmounted.
pub(super) fn is_twin(mounts: &[Mount], mount: &Mount, other: &Mount) -> bool {
    let same = (mount.number, &mount.root) == (other.number, &other.root);
    if mount.id == other.id || !same || mount.peers.is_none() || mount.peers != other.peers {
        return false;
    }
    let parent = |of: &Mount| mounts.iter().find(|mount| mount.id == of.parent);
    let (Some(under), Some(under_other)) = (parent(mount), parent(other)) else { return false };
    under.id != under_other.id
        && under.peers.is_some()
        && under.peers == under_other.peers
        && place(under, &mount.target).is_some_and(|at| Some(at) == place(under_other, &other.target))
}

/// Where a path below a mount is within the mounted file system.
fn place(mount: &Mount, path: &Path) -> Option<PathBuf> {
    Some(mount.root.join(path.strip_prefix(&mount.target).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Condition, DeviceNumber};

    fn mount(id: u64, parent: u64, peers: Option<u64>, minor: u32, root: &str, target: &str) -> Mount {
        Mount {
            id,
            parent,
            peers,
            number: DeviceNumber { major: 8, minor },
            root: root.into(),
            target: target.into(),
            readonly: false,
            fs: "ext4".to_owned(),
            condition: Condition::Writable,
        }
    }

    #[test]
    fn a_twin_lies_at_the_same_place_of_a_peer_and_a_bind_for_a_pod_does_not() {
        let table = |kubelet, bound, staged, twin, pod| {
            vec![
                mount(1, 0, Some(1), 0, "/", "/"),
                mount(2, 1, kubelet, 1, "/", "/var/lib/kubelet"),
                mount(3, 1, bound, 1, "/", "/data/kubelet"),
                mount(4, 2, staged, 16, "/", "/var/lib/kubelet/plugins/globalmount"),
                mount(5, 3, twin, 16, "/", "/data/kubelet/plugins/globalmount"),
                mount(6, 2, pod, 16, "/", "/var/lib/kubelet/pods/1/mount"),
            ]
        };
        let twins = |mounts: &[Mount]| -> Vec<u64> {
            mounts.iter().filter(|other| is_twin(mounts, &mounts[3], other)).map(|other| other.id).collect()
        };
        assert_eq!(twins(&table(Some(7), Some(7), Some(9), Some(9), Some(9))), [5]);
        assert_eq!(
            twins(&table(Some(7), Some(7), Some(9), Some(8), Some(9))),
            [0; 0],
            "mounted by another hand"
        );
        assert_eq!(
            twins(&table(Some(7), Some(8), Some(9), Some(9), Some(9))),
            [0; 0],
            "nothing is propagated"
        );
        assert_eq!(twins(&table(None, None, None, None, None)), [0; 0]);
    }

    #[test]
    fn parts_of_one_file_system_are_compared_by_the_place_in_it() {
        let mounts = |root: &str| {
            vec![
                mount(2, 1, Some(7), 1, "/", "/var/lib"),
                mount(3, 1, Some(7), 1, root, "/k"),
                mount(4, 2, Some(9), 16, "/", "/var/lib/kubelet/x"),
                mount(5, 3, Some(9), 16, "/", "/k/x"),
            ]
        };
        let of = |root| {
            let mounts = mounts(root);
            is_twin(&mounts, &mounts[2], &mounts[3])
        };
        assert!(of("/kubelet"));
        assert!(!of("/other"));
    }
}
