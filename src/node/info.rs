//! Info: who the node is, where it is, and how many volumes it takes. Asked for again and again, so it reads little and waits for
//! nobody who need not be asked.

use std::{num::NonZeroU32, time::Duration};

use super::Node;
use crate::{host::Disk, types::topology};

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its id.
    pub node_id: String,
    /// How many volumes it takes.
    pub max_volumes: NonZeroU32,
    /// Where it is; nowhere in particular where nothing says.
    pub place: Option<topology::Place>,
}

/// Why a node can't say it.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// Kubernetes has not been heard of yet.
    #[error(
        "the Node `{0}` was not read from Kubernetes yet; may the node plugin get, list and watch it, and is the API server in reach?"
    )]
    NotRead(String),
    /// The labels are missing.
    #[error(
        "the Node `{0}` has no labels that say where it is (`topology.kubernetes.io/region` and `/zone`); run `proxmox-csi ccm`, which sets them, or start the node plugin with --region and --zone"
    )]
    NoPlace(String),
}

/// Slots `scsi1` to `scsi30` of a VM.
const SLOTS: u32 = 30;
/// How long the first word of Kubernetes is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

impl Node {
    /// What the node says of itself. What the command line says of its place goes before what Kubernetes says, and what Kubernetes
    /// says of the number of volumes before the command line.
    pub async fn info(&self) -> Result<Info, InfoError> {
        let options = &self.options;
        let node_id = options.node_id.clone();
        let (mut place, mut limit) = (options.place.clone(), options.max_volumes);
        if let Some(labels) = &options.labels {
            let mut labels = labels.clone();
            let read = labels.wait_for(Option::is_some);
            let own = match tokio::time::timeout(PATIENCE, read).await {
                Ok(Ok(own)) => own.clone(),
                // Kubernetes is not needed then, and a limit of its that is not known yet is told the next time.
                _ if place.is_some() => None,
                _ => return Err(InfoError::NotRead(node_id)),
            };
            let own = own.unwrap_or_default();
            place = place.or(own.place);
            limit = own.max_volumes.unwrap_or(limit);
            if place.is_none() {
                return Err(InfoError::NoPlace(node_id));
            }
        }
        // Zero would be no limit at all.
        let free = SLOTS.saturating_sub(self.foreign_disks().await);
        let max_volumes = NonZeroU32::new(limit.get().min(free)).unwrap_or(NonZeroU32::MIN);
        Ok(Info { node_id, max_volumes, place })
    }

    /// How many of the slots for volumes other disks have.
    async fn foreign_disks(&self) -> u32 {
        match self.host.disks().await {
            Ok(disks) => u32::try_from(disks.iter().filter(|disk| is_foreign(disk)).count()).unwrap_or(SLOTS),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "how many slots are taken is not known");
                0
            }
        }
    }
}

/// Whether a disk is in a slot for volumes and is none: neither this driver nor the one before it named it.
fn is_foreign(disk: &Disk) -> bool {
    let in_a_slot = disk.virtio && disk.lun.is_some_and(|lun| (1..=u64::from(SLOTS)).contains(&lun));
    in_a_slot && !disk.wwn.is_some_and(|wwn| wwn.is_ours() || wwn.legacy_slot().is_some())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::watch;

    use super::*;
    use crate::{
        host::{
            DeviceNumber,
            linux::{LinuxHost, LinuxOptions},
        },
        node::NodeOptions,
        types::{Bytes, cluster::OwnNode},
    };

    fn disk(lun: u64, wwn: Option<&str>, virtio: bool) -> Disk {
        let wwn = wwn.and_then(|wwn| wwn.parse().ok());
        let number = DeviceNumber { major: 8, minor: 0 };
        Disk {
            name: "sda".to_owned(),
            number,
            wwn,
            lun: Some(lun),
            size: Bytes::GIB,
            readonly: false,
            virtio,
        }
    }

    #[test]
    fn only_disks_of_others_in_the_slots_for_volumes_count() {
        let ours = "0x3c5137f0a94ede58";
        assert!(is_foreign(&disk(1, None, true)) && is_foreign(&disk(30, Some("0x5000c50015ea71aa"), true)));
        assert!(!is_foreign(&disk(0, None, true)), "the root disk has a slot that volumes do not get");
        assert!(!is_foreign(&disk(1, Some(ours), true)), "a volume");
        assert!(!is_foreign(&disk(1, Some("0x5056432d49443031"), true)), "a volume of the driver before");
        assert!(!is_foreign(&disk(1, None, false)), "iSCSI has no slot");
    }

    /// A machine with disks of others at these LUNs.
    fn machine(luns: std::ops::Range<u32>) -> (tempfile::TempDir, LinuxHost) {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(root.path().join("block")).expect("the tree is writable");
        for lun in luns {
            let (block, scsi) =
                (root.path().join(format!("block/sd{lun}")), root.path().join(format!("2:0:0:{lun}")));
            for directory in [&block, &scsi] {
                std::fs::create_dir(directory).expect("the tree is writable");
            }
            for (file, text) in [("dev", format!("8:{lun}\n")), ("size", "2048\n".to_owned())] {
                std::fs::write(block.join(file), text).expect("a file");
            }
            std::os::unix::fs::symlink(&scsi, block.join("device")).expect("a link");
        }
        let host = LinuxHost::new(LinuxOptions { sysfs_root: root.path().into(), ..LinuxOptions::default() });
        (root, host)
    }

    fn place(zone: &str) -> topology::Place {
        topology::Place { region: "region".parse().expect("a region"), zone: zone.parse().ok() }
    }

    async fn info(luns: std::ops::Range<u32>, options: NodeOptions) -> Result<Info, InfoError> {
        let (_tree, host) = machine(luns);
        Node::new(Arc::new(host), options).info().await
    }

    #[tokio::test]
    async fn the_slots_that_other_disks_have_are_not_promised() {
        let max =
            async |luns| info(luns, NodeOptions::new("n")).await.expect("it is known").max_volumes.get();
        assert_eq!(max(0..1).await, 24);
        assert_eq!(max(1..5).await, 24, "26 are free");
        assert_eq!(max(1..11).await, 20);
        assert_eq!(max(1..31).await, 1, "zero would mean that there is no limit");
    }

    #[tokio::test(start_paused = true)]
    async fn labels_say_where_the_node_is_and_how_many_volumes_it_takes() {
        let (told, labels) = watch::channel(None);
        let labelled = NodeOptions { labels: Some(labels), ..NodeOptions::new("n") };
        let early = info(0..0, labelled.clone()).await;
        assert!(matches!(early, Err(InfoError::NotRead(_))), "{early:?}");
        let flagged = NodeOptions { place: Some(place("pve-1")), ..labelled.clone() };
        assert_eq!(info(0..0, flagged.clone()).await.expect("flags suffice").place, Some(place("pve-1")));

        told.send_replace(Some(OwnNode::default()));
        assert!(matches!(info(0..0, labelled.clone()).await, Err(InfoError::NoPlace(_))));
        told.send_replace(Some(OwnNode { place: Some(place("pve-2")), max_volumes: NonZeroU32::new(7) }));
        let by_labels = info(0..0, labelled).await.expect("it is known");
        assert_eq!((by_labels.place, by_labels.max_volumes.get()), (Some(place("pve-2")), 7));
        let by_flags = info(0..0, flagged).await.expect("it is known");
        assert_eq!((by_flags.place, by_flags.max_volumes.get()), (Some(place("pve-1")), 7));
    }
}
